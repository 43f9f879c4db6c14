"""Measures a checkpoint, tells stories with it, shows what surprises it, draws how it learned, exports it.

  python eval.py                                                 measures checkpoints/best_model.pt
  python eval.py --checkpoint checkpoints/quick/best_model.pt    measures another one
  python eval.py --data my_stories.txt                           on other stories
  python eval.py --generate "Once upon a time" "The little girl"
  python eval.py --interactive                                   type openings, watch the stories appear
  python eval.py --inspect "Once upon a time there was a cat."   each token coloured by its loss
  python eval.py --plot logs/a logs/b                            compares two runs
  python eval.py --export my-model                               for transformers; as .gguf for llama.cpp

Measuring covers loss, perplexity, bits per byte and accuracy over all validation stories, probes of what the
model understands, and generated stories compared with real ones, all in float32 whatever training used.
Results go to standard output, progress to standard error.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import secrets
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import regex
import torch

from config import (
    ArgumentParser, Config, ModelConfig, SamplingConfig, UserError, parse_value, run_main)
from data import (
    END_OF_TEXT, HUB, Stream, atomic_write, best_model, content, encode_stories, find_streams, first_line,
    load_checkpoint, locate, open_dataset, prepare, progress, say, tokenizer_from_spec)
from model import NORM_EPS, ROPE_THETA, Transformer, evaluate, story_windows
from train import choose_device

BATCH_SIZE = 32
PROBES = Path(__file__).parent / "data" / "probes.json"


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple:
    """Returns (model, tokenizer, checkpoint) of the checkpoint at `path`: the model is on `device` and in
    evaluation mode.

    Raises UserError if the file is missing, damaged or not a checkpoint, if its weights do not fit its
    config, or if this machine has no such device.
    """
    path, device = best_model(path), choose_device(str(device))
    if not path.exists():
        others = "".join(f" {other}" for other in sorted(Path("checkpoints").glob("*/best_model.pt")))
        raise UserError(f"there is no checkpoint {path}: train first (python train.py), or name one with "
                        "--checkpoint" + (f", such as{others}" if others else ""))
    checkpoint = load_checkpoint(path, device)
    try:
        tokenizer = tokenizer_from_spec(checkpoint["tokenizer"])
        model = Transformer(ModelConfig(**checkpoint["config"]["model"]), tokenizer.vocab_size)
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # an edited file can raise anything
        reason = first_line(error)
        raise UserError(f"the weights in {path} do not fit its config and tokenizer ({reason})") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{path} has weights that are not finite; use an earlier checkpoint")
    return model.to(device).eval(), tokenizer, checkpoint


def shown(batches: range) -> Iterable[int]:
    """Shows the progress of `evaluate`."""
    return progress(batches, len(batches), "evaluating")


# ---------------------------------------------------------------- telling stories

def seeded_generator(model: Transformer, seed: int | None) -> torch.Generator:
    """Returns a generator on the model's device. Without a seed it chooses one and prints it."""
    if seed is None:
        seed = secrets.randbelow(2**31)
        say(f"seed {seed}")
    return torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)


def warn_of_unknown(tokenizer, text: str) -> None:
    if unknown := tokenizer.name == "char" and tokenizer.unknown(text):
        say(f"WARNING: the char tokenizer does not know {', '.join(map(repr, unknown))}: "
            "the model sees one unknown character instead")


def tell_stories(model: Transformer, tokenizer, prompts: list[str], sampling: dict,
                 generator: torch.Generator) -> None:
    """Prints a story for each prompt. A single story appears token by token, several in batches."""
    warn_of_unknown(tokenizer, "".join(prompts))
    eot_id = tokenizer.eot_id
    generate = functools.partial(model.generate, **sampling, eot_id=eot_id, generator=generator)
    rows = [[eot_id, *tokenizer.encode(prompt)] for prompt in prompts]  # as stories begin in training
    if len(rows) == 1:
        decode, show = tokenizer.decoder(), functools.partial(print, end="", flush=True)
        show(prompts[0])
        generate(rows, stream=lambda row, token: token == eot_id or show(decode(token)))
        print(decode(None))  # the rest of a character that the limit cut
        return
    for first in range(0, len(rows), BATCH_SIZE):
        for i, story in enumerate(generate(rows[first:first + BATCH_SIZE]), first + 1):
            text = tokenizer.decode(token for token in story if token != eot_id)
            print(f"--- {i} of {len(rows)} ---\n{text}", flush=True)


def interact(model: Transformer, tokenizer, sampling: dict, num_samples: int,
             generator: torch.Generator) -> None:
    """Tells stories whose openings are the lines of standard input, until its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history
    print("Type the beginning of a story and press Enter. Ctrl-C ends a story, Ctrl-D ends the program.")
    while True:
        try:
            opening = input("\n> ")
            tell_stories(model, tokenizer, [opening] * num_samples, sampling, generator)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


# ---------------------------------------------------------------- a checkpoint's stories, or any others

def near(path: str | Path, name: str) -> Path:
    """Returns where `name` is: in the first folder above `path` that has it, else in the current folder."""
    places = Path(path).absolute().parents
    return next((place / name for place in places if (place / name).exists()), Path(name))


def open_streams(checkpoint: dict, path: str | Path) -> tuple[Stream, Stream]:
    """Returns the training and the validation stream of the checkpoint at `path`.

    They are read from its data_dir or, if they are not there, prepared again. Raises UserError if the text is
    missing or has changed.
    """
    config, trained = Config.of(checkpoint["config"]), content(checkpoint["dataset"])
    if found := find_streams(near(path, config.data.data_dir), trained):
        return found[1:]
    if config.data.dataset not in ("sample", *HUB):
        config.data.dataset = str(near(path, config.data.dataset))
    try:
        _, *streams = prepare(config, checkpoint)
    except UserError as error:
        raise UserError(f"the checkpoint's stories are missing: {error}; name others with --data") from error
    if [stream.info["sha256"] for stream in streams] != trained:
        raise UserError(f"the stories of {config.data.dataset!r} have changed since the checkpoint was made; "
                        "restore them, or name others with --data")
    return tuple(streams)


def read_stream(name: str, tokenizer, separator: str = END_OF_TEXT) -> Stream:
    """Returns the stories of any dataset as a stream: its validation split if it has one, else all."""
    splits, chunks = open_dataset(name, limited=True, separator=separator), []
    split = "validation" if "validation" in splits else "train"
    stories = progress(splits[split](), None, "tokenizing stories")
    counts = encode_stories(stories, tokenizer, chunks.append)
    if not counts["stories"]:
        raise UserError(f"the dataset {name!r} has no stories")
    info = {"dataset": name, "split": split.replace("train", "all"), **counts}
    return Stream(np.concatenate(chunks), info)


def stories_of(stream: Stream, eot_id: int) -> Iterator[np.ndarray]:
    """Yields the tokens of each story of a stream, end-of-text included."""
    for start, end in story_windows(stream.tokens, eot_id, len(stream.tokens)):
        yield stream.tokens[start:end]


# ---------------------------------------------------------------- loss

POSITIONS = {"0": 0, "1-3": 1, "4-15": 4, "16-63": 16, "64-255": 64, "256+": 256}  # where each range begins


def loss_figures(model: Transformer, tokenizer, stream: Stream) -> dict:
    """Returns the loss over a whole stream and the figures that derive from it.

    loss: the summed negative log-likelihood over the number of tokens, end-of-text included, in nats per
        token. perplexity: exp(loss). accuracy: the share of tokens that were the likeliest.
    loss_stderr: the standard error of a ratio whose sampling unit is the story (Cochran 1977, section 6.4),
        since the tokens of a story are not independent; None for a single story.
    bits_per_byte: the summed negative log-likelihood in bits over the UTF-8 bytes of the stories. Unlike the
        loss, it compares across tokenizers.
    loss_by_position: the loss by the number of tokens in the context, which restarts after max_seq_len.
    """
    tokens, eot_id = stream.tokens, tokenizer.eot_id
    losses, hits = evaluate(model, tokens, eot_id, shown)
    losses = losses.astype(np.float64)
    loss = losses.mean()

    # How far each story is above the loss of an average story of its length; they sum to zero.
    starts, ends = story_windows(tokens, eot_id, len(tokens)).T
    residuals, n_stories = np.add.reduceat(losses, starts) - loss * (ends - starts), len(starts)
    stderr = residuals.std(ddof=1) * math.sqrt(n_stories) / len(losses) if n_stories > 1 else None

    if tokenizer.name == "char" and (unknown := (tokens == tokenizer.unknown_id).sum()):
        say(f"WARNING: {unknown:,} of {len(tokens):,} characters are unknown to the char tokenizer, which "
            "does not tell them apart, so that bits per byte is too low")
    positions = (np.arange(len(tokens)) - np.repeat(starts, ends - starts)) % model.config.max_seq_len
    return {"loss": loss, "loss_stderr": stderr, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": losses.sum() / math.log(2) / stream.info["bytes"], "accuracy": hits.mean(),
            "loss_by_position": loss_by_position(losses, positions)}


def loss_by_position(losses: np.ndarray, positions: np.ndarray) -> dict[str, dict]:
    """Returns {"4-15": {"loss", "tokens"}, ...}: the mean loss of the tokens whose position is in a range."""
    ranges = np.searchsorted(list(POSITIONS.values()), positions, side="right") - 1
    totals, counts = np.bincount(ranges, losses), np.bincount(ranges)
    return {label: {"loss": total / count, "tokens": int(count)}
            for label, total, count in zip(POSITIONS, totals, counts) if count}


def loss_table(results: dict) -> str:
    error = results["loss_stderr"]
    rows = [f"{label:<20}{row['loss']:>8.3f}{row['tokens']:>12,}"
            for label, row in results["loss_by_position"].items()]
    return """\
{checkpoint}, step {step:,}
on {dataset}, {split}: {stories:,} stories, {bytes:,} bytes
{tokens:,} tokens of the {tokenizer} tokenizer ({vocab_size:,})

loss            {loss:.4f}{error} nats per token
perplexity      {perplexity:.3f}
bits per byte   {bits_per_byte:.4f}
accuracy        {accuracy:.1%} of the tokens were the likeliest one

tokens in context       loss      tokens
{rows}
""".format(**results, rows="\n".join(rows),
           error="" if error is None else f" ± {error:.4f} (standard error over stories),")


# ---------------------------------------------------------------- quality of generated stories

OPENING_TOKENS = 16
MOST_STORIES = 64
QUALITY = {  # figure: (row of the table, format)
    "ended": ("stories that reach their end", ".1%"), "words": ("words per story", ".1f"),
    "repeated_4grams": ("4-grams repeated in a story", ".1%"),
    "self_similarity": ("similarity to another story", ".1%"),
    "copied_4grams": ("4-grams found in training", ".1%"), "unseen_words": ("words not in training", ".2%"),
}


@dataclasses.dataclass
class Continuation:
    """What follows an opening, in a real story or a generated one."""
    words: list[str]
    ended: bool  # by end-of-text, not by the limit


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation, as Unicode divides it (Annex 29): in
    Chinese or Thai, which have no spaces, each character is a word.
    """
    return regex.findall(r"(?w)\b\w.*?\b", text.lower())


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n))))


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def quality_figures(stories: list[Continuation]) -> dict[str, float | None]:
    """Returns figures of a set of stories, None where undefined. n-grams are of words, within a story.

    ended: the share of stories that end by end-of-text. words: the mean length of a story.
    repeated_4grams: the share of a story's 4-grams that it has used before, mean over stories (seq-rep-4,
        Welleck et al. 2019, arXiv:1908.04319).
    self_similarity: the ROUGE-2 F1 of a story with the one of the set that is most similar to it, mean over
        stories, by which the TinyStories paper measures diversity (Eldan & Li 2023, arXiv:2305.07759). It is
        the number of 2-grams that two stories share over their mean number of 2-grams (Lin 2004).
    """
    four_grams = [grams for story in stories if (grams := ngrams(story.words, 4))]
    counts = [Counter(ngrams(story.words, 2)) for story in stories]
    similarities = [[2 * (a & b).total() / max(1, a.total() + b.total()) for b in counts if b is not a]
                    for a in counts]
    return {"ended": mean(story.ended for story in stories),
            "words": mean(len(story.words) for story in stories),
            "repeated_4grams": mean(1 - len(set(grams)) / len(grams) for grams in four_grams),
            "self_similarity": mean(max(row) for row in similarities if row)}


def copy_figures(groups: list[list[Continuation]], training_stories: Iterable[str]) -> list[dict]:
    """Returns, for each set of stories, how much of it stands in the training stories, which are read once.

    copied_4grams: the share of its 4-grams that some training story has, a sign of memorisation (Eldan & Li
        2023). unseen_words: the share of its words that no training story has: misspellings, inventions.
    """
    words, four_grams = ([[gram for story in group for gram in ngrams(story.words, n)] for group in groups]
                         for n in (1, 4))
    wanted, seen = set(itertools.chain(*words, *four_grams)), set()
    for story in map(split_words, training_stories):
        seen.update(wanted.intersection(ngrams(story, 1) + ngrams(story, 4)))
    return [{"copied_4grams": mean(gram in seen for gram in grams),
             "unseen_words": mean(word not in seen for word in own)} for own, grams in zip(words, four_grams)]


def generation_quality(model: Transformer, tokenizer, validation: Stream, training: Stream | None,
                       sampling: dict, seed: int) -> dict:
    """Returns {"model": figures, "human": figures, ...}: of stories generated from the openings of validation
    stories, and of how these stories really go on, both cut after the same number of tokens. The figures are
    those of the two functions above; without training stories, those of copies are missing.

    An opening is the first 16 tokens of a story, or half of a shorter one. Neither it nor the limit depends
    on the other stories, so that an odd one (a long URL, another script) changes nothing for them.
    """
    # An opening and what follows it fit into the context.
    eot_id, context = tokenizer.eot_id, model.config.max_seq_len
    limit = min(sampling["max_new_tokens"], max(1, context - OPENING_TOKENS))
    sampling = {**sampling, "max_new_tokens": limit}
    stories = [story.tolist() for story in itertools.islice(stories_of(validation, eot_id), MOST_STORIES)]
    openings = [story[:min(OPENING_TOKENS, len(story) // 2)] for story in stories]
    with progress(None, len(stories) * limit, "generating tokens, at most") as bar:
        rows = model.generate([[eot_id, *tokens] for tokens in openings], **sampling, eot_id=eot_id,
                              generator=seeded_generator(model, seed), stream=lambda *_: bar.update())

    def continuation(opening: list[int], story: list[int]) -> Continuation:
        ended = story[-1] == eot_id
        words = split_words(tokenizer.decode(story[:len(story) - ended]))
        begun = len(split_words(tokenizer.decode(opening)))  # a word that both parts share is the opening's
        return Continuation(words[begun:len(words) - (not ended)], ended)  # the limit may cut the last word

    real = [story[:len(opening) + limit] for opening, story in zip(openings, stories)]
    groups = [list(map(continuation, openings, group)) for group in ([row[1:] for row in rows], real)]
    columns = list(map(quality_figures, groups))
    if training:
        texts = (tokenizer.decode(story[:-1]) for story in stories_of(training, eot_id))
        texts = progress(texts, training.info["stories"], "looking for copies in stories")
        columns = [figures | copies for figures, copies in zip(columns, copy_figures(groups, texts))]
    return {"model": columns[0], "human": columns[1], "stories": len(stories), **sampling, "seed": seed}


def quality_table(quality: dict) -> str:
    rows = []
    for name, (label, style) in QUALITY.items():
        values = [quality[column].get(name) for column in ("model", "human")]
        cells = ["-" if value is None else format(value, style) for value in values]
        rows.append(f"{label:<32}{cells[0]:>10}{cells[1]:>10}")
    return """\
{stories} generated stories and the real ones with the same openings, up to {max_new_tokens} tokens of each
(temperature {temperature:g}, top_k {top_k}, top_p {top_p}, seed {seed})

                                     model     human
{rows}""".format(**quality, rows="\n".join(rows))


# ---------------------------------------------------------------- probes

def probe_figures(model: Transformer, tokenizer, groups: dict[str, list[dict]]) -> dict[str, dict]:
    """Returns {group: {"accuracy", "chance", "items", "failed"}} of items {"prompt", "right", "wrong": []}.

    The score of a continuation is its log-likelihood after the prompt per UTF-8 byte. An item is passed if
    the right one has the highest score; `failed` lists the others. (Groups as in Eldan & Li 2023,
    arXiv:2305.07759.)
    """
    encode, eot_id = tokenizer.encode, tokenizer.eot_id
    pairs = [(encode(item["prompt"]), ending)
             for items in groups.values() for item in items for ending in (item["right"], *item["wrong"])]
    # Each ending makes a story of its own: prompt, ending, end-of-text.
    rows = [[*prompt, *encode(ending), eot_id] for prompt, ending in pairs]
    losses, _ = evaluate(model, np.concatenate(rows), eot_id, shown)
    losses = np.split(losses, np.cumsum([len(row) for row in rows]))  # and an empty rest
    scores = (-row[len(prompt):-1].sum(dtype=np.float64) / len(ending.encode())
              for row, (prompt, ending) in zip(losses, pairs))
    figures = {}
    for group, items in groups.items():
        failed = [item["prompt"] + item["right"] for item in items
                  if next(scores) <= max(itertools.islice(scores, len(item["wrong"])))]
        figures[group] = {"accuracy": 1 - len(failed) / len(items), "items": len(items), "failed": failed,
                          "chance": mean(1 / (1 + len(item["wrong"])) for item in items)}
    return figures


def probe_table(probes: dict[str, dict]) -> str:
    rows = [f"{group:<12}{row['accuracy']:>10.1%}{row['chance']:>10.1%}{row['items']:>8}\n"
            for group, row in probes.items()]
    return "probes        accuracy    chance   items\n" + "".join(rows)


# ---------------------------------------------------------------- all measurements

def run_evaluation(model: Transformer, tokenizer, checkpoint: dict, sampling: dict, seed: int,
                   options: argparse.Namespace) -> None:
    """Prints loss, probes and quality, each as soon as it is known; or all of them as one JSON object."""
    training, show = None, (lambda text: None) if options.json else functools.partial(print, flush=True)
    try:
        training, stream = open_streams(checkpoint, options.checkpoint)
    except UserError as error:
        if not options.data:
            raise
        say(f"WARNING: {error}; copies of training stories cannot be counted")
    if options.data:
        stream = read_stream(options.data, tokenizer, Config.of(checkpoint["config"]).data.separator)
    results = {"checkpoint": str(options.checkpoint), "step": checkpoint["step"], **stream.info,
               "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
               **loss_figures(model, tokenizer, stream)}
    show(loss_table(results))
    groups = json.loads(PROBES.read_text())
    groups.pop("about")
    results["probes"] = probe_figures(model, tokenizer, groups)
    show(probe_table(results["probes"]))
    results["quality"] = generation_quality(model, tokenizer, stream, training, sampling, seed)
    show(quality_table(results["quality"]))
    if options.json:
        print(json.dumps(results, indent=1, allow_nan=False))


# ---------------------------------------------------------------- losses of a text

LOSS_COLOURS = (231, 230, 229, 222, 216, 209, 203, 196)  # of 256; one per nat: 0-1, ..., 7 and more


def paint(text: str, loss: float) -> str:
    """Returns a text on the background of its loss, for a terminal; no colour runs past the end of a line."""
    colour = LOSS_COLOURS[min(int(loss), len(LOSS_COLOURS) - 1)]
    return re.sub("[^\n]+", f"\x1b[48;5;{colour};38;5;16m\\g<0>\x1b[0m", text.replace("\n", "↵\n"))


def inspect(model: Transformer, tokenizer, text: str) -> None:
    """Prints a text, each token coloured by its loss; where there are no colours a line each, loss first."""
    if not text:
        raise UserError("--inspect needs a text that is not empty")
    warn_of_unknown(tokenizer, text)
    tokens = np.array(tokenizer.encode(text))
    losses, _ = evaluate(model, tokens, tokenizer.eot_id, shown)

    # Tokens that share a character are shown as one piece.
    decode, pieces, held = tokenizer.decoder(), [], 0.0
    for token, loss in zip([*tokens, None], [*losses.tolist(), 0.0]):
        held += loss
        if piece := decode(token):
            pieces.append((piece, held))
            held = 0.0
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        legend = "".join(paint(f" {level} ", level) for level in range(len(LOSS_COLOURS)))
        print("".join(itertools.starmap(paint, pieces)) + f"\n\n{legend}+ nats")
    else:
        print("\n".join(f"{loss:7.2f}  {piece!r}" for piece, loss in pieces))
    bits_per_byte = losses.sum() / math.log(2) / len(text.encode("utf-8", "replace"))
    print(f"\n{len(tokens):,} tokens of the {tokenizer.name} tokenizer: loss {losses.mean():.3f} nats per "
          f"token, {bits_per_byte:.3f} bits per byte")


# ---------------------------------------------------------------- training curves

PANELS = {"val_loss": "loss (nats per token, log scale)", "val_bits_per_byte": "bits per byte (log scale)",
          "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


def read_metrics(log_dir: Path):
    """Returns the metrics of a run as a table, a row for each evaluation, NaN where a value is missing.
    Raises UserError if there are none.
    """
    import pandas  # comes with datasets

    path, rows = log_dir / "metrics.jsonl", []
    with contextlib.suppress(OSError, ValueError):
        lines = path.read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be incomplete
    if not rows:
        raise UserError(f"{path} has no readable metrics: a run writes them at its first evaluation; --plot "
                        "LOGDIR names another folder")
    return pandas.DataFrame(rows, columns=["step", "train_loss", *PANELS], dtype=float)


def draw_run(panels: dict, log_dir: Path, colour: str) -> None:
    """Draws the metrics of a run into {metric: axes}, with a star at the lowest validation loss."""
    run = read_metrics(log_dir)
    best = run.sort_values("val_loss").iloc[0]
    label = f"best {best.val_loss:.4f} at step {best.step:,.0f}\n{log_dir}"
    label = os.fsencode(label).decode(errors="replace").replace("$", r"\$")  # else $...$ is a formula
    style = {"color": colour, "marker": "." if len(run) < 20 else ""}
    panels["val_loss"].plot(best.step, best.val_loss, "*", color=colour, markersize=15, zorder=3)
    panels["val_loss"].plot(run.step, run.train_loss, "--", alpha=0.6, **style)
    for name, axes in panels.items():
        axes.plot(run.step, run[name], label=label, **style)


def logs_of(path: Path) -> Path:
    """Returns the log folder of the checkpoint at `path`. Raises UserError if another run has used it since.
    """
    folder = near(path, load_checkpoint(path)["config"]["training"]["log_dir"])
    owner = folder / ".owner"
    if owner.exists() and (folder / owner.read_text().partition(" ")[2]).resolve() != path.parent.resolve():
        raise UserError(f"another run has written to {folder} since: name a folder of logs, --plot LOGDIR")
    return folder


def plot_training(log_dirs: list[Path]) -> Path:
    """Draws the training curves of one or several runs. Returns the PNG, which is in the first folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplot_mosaic([["val_loss", "val_loss", "val_bits_per_byte", "lr"],
                                    ["val_loss", "val_loss", "grad_norm", "tokens_per_second"]])
    for i, log_dir in enumerate(log_dirs):
        draw_run(panels, log_dir, f"C{i}")
    for name, axes in panels.items():
        axes.set(title=PANELS[name], xlabel="step", xlim=(0, None))
        axes.locator_params(axis="x", nbins=4)  # room for six digits
        axes.grid(alpha=0.25)
        if "log scale" in PANELS[name] and axes.dataLim.y1 > 0:  # it is not if every value is missing
            axes.set_yscale("log", subs=(2, 5))  # labels that do not touch
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    panels["val_loss"].legend(title="solid: validation, dashed: training", loc="upper right", frameon=False)
    path = log_dirs[0] / "training_curves.png"
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=200)
    return path


# ---------------------------------------------------------------- export

# Both formats write bytes as GPT-2 does: those that are not printable in Latin-1 have a stand-in.
STAND_INS = {byte: 256 + i for i, byte in enumerate((*range(33), *range(127, 161), 173))}
TOKENIZER_JSON = """{
 "added_tokens": [{"id": EOT_ID, "content": "<|endoftext|>", "special": true, "normalized": false,
                   "single_word": false, "lstrip": false, "rstrip": false}],
 "post_processor": {
  "type": "TemplateProcessing",
  "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
             {"Sequence": {"id": "A", "type_id": 0}}],
  "pair": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
           {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
  "special_tokens": {
   "<|endoftext|>": {"id": "<|endoftext|>", "ids": [EOT_ID], "tokens": ["<|endoftext|>"]}}}}"""
FOLDER_USE = """from transformers import pipeline
print(pipeline("text-generation", "{}")("Once upon a time")[0]["generated_text"])"""
GGUF_USE = """llama-completion -m "{0}" -no-cnv {1} --min-p 0 -p "Once upon a time"
llama-server -m "{0}" {1} --min-p 0    # and its /v1/completions"""
GGUF_SETTINGS = dict(re.findall(r"(\S+)=(\S+)", """
    context_length=max_position_embeddings embedding_length=hidden_size block_count=num_hidden_layers
    feed_forward_length=intermediate_size attention.head_count=num_attention_heads
    attention.head_count_kv=num_key_value_heads attention.key_length=head_dim attention.value_length=head_dim
    attention.layer_norm_rms_epsilon=rms_norm_eps rope.freq_base=rope_theta"""))  # its name in config.json
GGUF_NAMES = dict(re.findall(r"(\S+)=(\S*)", """
    layers=blk embed_tokens=token_embd norm=output_norm self_attn= mlp= input_layernorm=attn_norm
    q_proj=attn_q k_proj=attn_k v_proj=attn_v o_proj=attn_output q_norm=attn_q_norm k_norm=attn_k_norm
    post_attention_layernorm=ffn_norm gate_proj=ffn_gate up_proj=ffn_up down_proj=ffn_down"""))


def bpe_vocabulary(tokenizer) -> tuple[dict[str, int], list[str]]:
    """Returns the ids of a BPE tokenizer's tokens and its merges "left right", the first first."""
    ids = {token.decode("latin-1").translate(STAND_INS): i for token, i in tokenizer.ranks.items()}
    # Any two tokens that make a third are a merge, as in tiktoken.
    splits = ((token[:i], token[i:]) for token in ids for i in range(1, len(token)))
    merges = [f"{left} {right}" for left, right in splits if left in ids and right in ids]
    return ids | {END_OF_TEXT: tokenizer.eot_id}, merges


def tokenizer_json(tokenizer) -> dict:
    """Returns tokenizer.json, which puts end-of-text before a text, as in training."""
    if tokenizer.name == "char":
        characters = [*tokenizer.characters, "<unk>", END_OF_TEXT]
        model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {c: i for i, c in enumerate(characters)}}
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "Fuse"}
    else:
        ids, merges = bpe_vocabulary(tokenizer)
        model = {"type": "BPE", "vocab": ids, "merges": merges}
        split = decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    whole = json.loads(TOKENIZER_JSON.replace("EOT_ID", str(tokenizer.eot_id)))
    return whole | {"model": model, "pre_tokenizer": split, "decoder": decoder}


def transformers_files(model: Transformer, tokenizer, sampling: SamplingConfig) -> dict[str, dict]:
    """Returns the JSON files of a folder for transformers, its versions 4 and 5."""
    c = model.config
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
    return {
        "config.json": ends | {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float32",
            "vocab_size": model.vocab_size, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers,
            "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_heads,
            "head_dim": c.d_model // c.n_heads, "intermediate_size": c.d_ff,
            "max_position_embeddings": c.max_seq_len, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA,
            "tie_word_embeddings": True},
        "generation_config.json": ends | {
            "do_sample": sampling.temperature > 0, "temperature": sampling.temperature,
            "top_k": sampling.top_k, "top_p": sampling.top_p or 1.0},
        "tokenizer.json": tokenizer_json(tokenizer),
        # Without this file AutoTokenizer takes, in silence, a class that changes Unicode.
        "tokenizer_config.json": dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT) | {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.max_seq_len,
            "model_input_names": ["input_ids", "attention_mask"], "padding_side": "left",
            "clean_up_tokenization_spaces": False}}


def safetensors(weights: dict[str, np.ndarray]) -> bytes:
    """Returns a .safetensors file: the length of its header, the header, the numbers."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in weights.items():
        start, end = end, end + array.nbytes
        header[f"model.{name}"] = {"dtype": "F32", "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(weights.values())


def gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value) -> bytes:
    """Returns the number of a value's type, and the value. Lists are of strings, arrays of int32."""
    match value:
        case str():
            return struct.pack("<I", 8) + gguf_text(value)
        case list():
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_text, value))
        case np.ndarray():
            return struct.pack("<IIQ", 9, 5, len(value)) + value.astype(np.int32).tobytes()
    return struct.pack(*{int: ("<II", 4), float: ("<If", 6), bool: ("<I?", 7)}[type(value)], value)


def gguf(config: dict, tokenizer, weights: dict[str, np.ndarray]) -> bytes:
    """Returns a .gguf file: metadata, the tensors' names and shapes, their numbers; matrices are float16."""
    ids, merges = bpe_vocabulary(tokenizer)
    fields = {"general.architecture": "qwen3", "general.file_type": 1,  # mostly float16
              **{f"qwen3.{name}": config[setting] for name, setting in GGUF_SETTINGS.items()},
              "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
              "tokenizer.ggml.tokens": list(ids), "tokenizer.ggml.merges": merges,
              "tokenizer.ggml.token_type": np.repeat((1, 3), (len(ids) - 1, 1)),  # normal; control
              "tokenizer.ggml.bos_token_id": tokenizer.eot_id, "tokenizer.ggml.add_bos_token": True,
              "tokenizer.ggml.eos_token_id": tokenizer.eot_id}
    head, data = struct.pack("<4sIQQ", b"GGUF", 3, len(weights), len(fields)), bytearray()
    head += b"".join(gguf_text(name) + gguf_value(value) for name, value in fields.items())
    for name, array in weights.items():
        name = ".".join(filter(None, (GGUF_NAMES.get(part, part) for part in name.split("."))))
        half, shape = array.ndim > 1, array.shape[::-1]
        head += gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, half, len(data))
        data += array.astype(np.float16 if half else np.float32).tobytes()
        data += bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + data


def export(model: Transformer, tokenizer, sampling: SamplingConfig, target: str) -> str:
    """Writes a file for llama.cpp if `target` ends in .gguf, else a folder for transformers. Returns the
    lines that use it, with temperature, top_k and top_p of `sampling`. Raises UserError if `target`
    exists, cannot be written or cannot hold the tokenizer.
    """
    path = Path(target)
    is_file = path.suffix == ".gguf"
    if os.path.lexists(path):
        raise UserError(f"{path} exists: move it away, or choose another name")
    if is_file and tokenizer.name == "char":
        raise UserError("llama.cpp has no char tokenizer: export a folder (a name without .gguf)")
    settings = transformers_files(model, tokenizer, sampling)
    weights = {name: weight.cpu().numpy() for name, weight in model.state_dict().items()}
    if is_file:
        files = {"": gguf(settings["config.json"], tokenizer, weights)}
    else:
        files = {name: json.dumps(value, indent=1).encode() for name, value in settings.items()}
        files["model.safetensors"] = safetensors(weights)
    # It gets its name when it is complete.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for name, content in files.items():
            with atomic_write(unfinished / name, len(content)) as file:
                file.write(content)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    chosen = f"--temp {sampling.temperature:g} --top-k {sampling.top_k or 0} --top-p {sampling.top_p or 1:g}"
    return (GGUF_USE if is_file else FOLDER_USE).format(path.as_posix(), chosen)


# ---------------------------------------------------------------- command line

def dataset_name(text: str) -> str:
    """Returns the name of a dataset, as --data has it. Raises UserError if there is no such dataset."""
    name = parse_value("data.dataset", text)
    locate(name)
    return name


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", type=best_model,
                        help="a file, or the folder of a run; default: checkpoints/best_model.pt")
    parser.add_argument("--data", type=dataset_name,
                        help="measure on any file, folder or dataset that train.py takes; default: the "
                        "checkpoint's validation stories")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--json", action="store_true", help="print the measurements as one JSON object")
    modes.add_argument("--generate", nargs="+", metavar="OPENING",
                       help='tell stories with these openings; "" is allowed')
    modes.add_argument("--interactive", action="store_true", default=None,
                       help="tell stories with the openings that you type")
    modes.add_argument("--inspect", metavar="TEXT", help="print the text, each token coloured by its loss")
    modes.add_argument("--plot", nargs="*", metavar="LOGDIR", help="draw the training curves of one run or "
                       "several into the first folder; default: the logs of --checkpoint, or logs/")
    modes.add_argument("--export", metavar="NAME", help="write a folder for transformers, or, if NAME ends "
                       "in .gguf, a file for llama.cpp")
    for name, default in dataclasses.asdict(SamplingConfig()).items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*names, metavar="N", default=argparse.SUPPRESS,
                            help=f"default: the checkpoint's, usually {str(default).lower()}",
                            type=functools.partial(parse_value, f"sampling.{name}"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps",
                        type=lambda text: choose_device(parse_value("training.device", text)))
    options = parser.parse_args()
    for mode in ("generate", "interactive", "inspect", "plot", "export"):
        if options.data and getattr(options, mode) is not None:
            raise UserError(f"--data is for measuring: leave out --data or --{mode}")
    return options


def main() -> None:
    options = parse_options()
    if options.plot is not None:
        log_dirs = options.plot or [logs_of(options.checkpoint) if options.checkpoint else "logs"]
        print(plot_training([Path(log_dir) for log_dir in log_dirs]))
        return
    options.checkpoint = options.checkpoint or "checkpoints/best_model.pt"
    model, tokenizer, checkpoint = load_model(options.checkpoint, options.device)
    sampling = dataclasses.asdict(Config.of(checkpoint["config"]).sampling)
    sampling |= {name: value for name, value in vars(options).items() if name in sampling}
    seed, num_samples = sampling.pop("seed"), sampling.pop("num_samples")
    if options.generate:
        prompts = [prompt for prompt in options.generate for _ in range(num_samples)]
        tell_stories(model, tokenizer, prompts, sampling, seeded_generator(model, seed))
    elif options.interactive:
        interact(model, tokenizer, sampling, num_samples, seeded_generator(model, seed))
    elif options.inspect is not None:
        inspect(model, tokenizer, options.inspect)
    elif options.export is not None:
        print(export(model, tokenizer, SamplingConfig(**sampling), options.export))
    else:
        run_evaluation(model, tokenizer, checkpoint, sampling, seed or 0, options)


if __name__ == "__main__":
    run_main(main)
