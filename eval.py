"""Evaluates a checkpoint: its stories, its loss, its stories beside real ones, what it understands, what
surprises it, how it learned.

Evaluation is in float32 whatever training used: its numbers depend on neither batch size nor device.
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
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from config import (
    ArgumentParser, Config, ModelConfig, SamplingConfig, UserError, parse_value, run_main)
from data import (
    END_OF_TEXT, HUB, SAMPLE, Stream, atomic_write, content, encode_stories, find_streams, locate,
    open_dataset, prepare, progress, story_windows, tokenizer_from_spec, write_error)
from model import NORM_EPS, ROPE_THETA, Transformer
from train import choose_device, evaluate, load_checkpoint, log

BATCH_SIZE = 32
PROBES = Path(__file__).parent / "data" / "probes.json"


def best_model(path: str | Path) -> Path:
    """Returns the checkpoint that a path means: a file, or best_model.pt of a folder."""
    return Path(path, "best_model.pt") if Path(path).is_dir() else Path(path)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple:
    """Returns (model, tokenizer, checkpoint) of the checkpoint at `path`, the model on `device`, in
    evaluation mode.

    Raises UserError where the file is missing, damaged, not a checkpoint, or its weights do not fit its
    config, and where this machine has no such device.
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
    except (RuntimeError, ArithmeticError, AttributeError, TypeError, ValueError, KeyError) as error:
        detail = " ".join((str(error) or type(error).__name__).split())[:200]
        raise UserError(f"the weights in {path} do not fit its config and tokenizer ({detail})") from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{path} has weights that are not finite; use an earlier checkpoint")
    return model.to(device).eval(), tokenizer, checkpoint


# ---------------------------------------------------------------- telling stories

def sampling_of(options: argparse.Namespace) -> dict:
    """Returns the options that are arguments of Transformer.generate."""
    return {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}


def seeded_generator(model: Transformer, seed: int | None) -> torch.Generator:
    """Returns a generator on the model's device; without a seed a fresh one, which is printed."""
    if seed is None:
        seed = secrets.randbelow(2**31)
        log(f"seed {seed}")
    return torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)


def warn_of_unknown(tokenizer, text: str) -> None:
    if unknown := tokenizer.name == "char" and tokenizer.unknown(text):
        log(f"WARNING: the {tokenizer.name} tokenizer does not know {', '.join(map(repr, unknown))}: "
             "the model sees an unknown character")


def tell_stories(model: Transformer, tokenizer, prompts: list[str], sampling: dict,
                 generator: torch.Generator) -> None:
    """Prints a story for each prompt, begun after end-of-text as in training; a single one token by token."""
    warn_of_unknown(tokenizer, "".join(prompts))
    rows = [[tokenizer.eot_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if len(rows) == 1:
        decode, show = tokenizer.decoder(), functools.partial(print, end="", flush=True)
        show(prompts[0])
        model.generate(rows, **sampling, eot_id=tokenizer.eot_id, generator=generator,
                       stream=lambda row, token: token == tokenizer.eot_id or show(decode(token)))
        print(decode(None))  # the rest of a character that the limit cut
        return
    for first in range(0, len(rows), BATCH_SIZE):
        batch = rows[first:first + BATCH_SIZE]
        told = model.generate(batch, **sampling, eot_id=tokenizer.eot_id, generator=generator)
        for i, tokens in enumerate(told, first + 1):
            story = tokenizer.decode(token for token in tokens if token != tokenizer.eot_id)
            print(f"--- {i} of {len(rows)} ---\n{story}", flush=True)


INTERACTIVE_HELP = """Type the beginning of a story and press Enter; nothing for a story from its first word.
  /temperature 0.5    how freely to choose the next token (0: always the likeliest)
  /top_k 20           choose among the 20 likeliest tokens (none: all)
  /top_p 0.9          choose among the likeliest tokens that have 90 % of the probability (none: all)
  /max_new_tokens 200
  /seed 1             make what follows reproducible
  /settings  /help    show them, show this
Ctrl-C ends a story, Ctrl-D leaves."""


def interact(model: Transformer, tokenizer, options: argparse.Namespace) -> None:
    """Reads openings and commands from standard input until its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history
    generator = seeded_generator(model, options.seed)
    print(INTERACTIVE_HELP)
    while True:
        try:
            line = input("\n> ")
            command, _, value = line.removeprefix("/").partition(" ")
            if not line.startswith("/"):
                tell_stories(model, tokenizer, [line] * options.num_samples, sampling_of(options), generator)
            elif command == "help":
                print(INTERACTIVE_HELP)
            elif command == "settings":
                print(", ".join(f"{name} {value}" for name, value in sampling_of(options).items()))
            elif f"sampling.{command}" in Config().flat():
                setattr(options, command, parse_value(f"sampling.{command}", value))
                if command == "seed":
                    generator.manual_seed(options.seed)
            else:
                print(f"there is no command /{command}; /help lists them")
        except UserError as error:
            print(str(error).replace("sampling.", "/", 1))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


# ---------------------------------------------------------------- the stories of a checkpoint, and any others

def found_in(places: Iterable[Path], name: str) -> Path:
    """Returns a file or folder in the first of the places that has it, else as it is named."""
    return next((place / name for place in places if (place / name).exists()), Path(name))


def open_streams(checkpoint: dict, path: str | Path = "") -> tuple[Stream, Stream]:
    """Returns the training and the validation stream of a checkpoint, wherever they lie: in its data_dir here
    or in a folder above its `path`, in the project's data/; or prepared anew from their text.

    Raises UserError where they cannot be had or are no longer those that the checkpoint was trained with.
    """
    config, above = Config.of(checkpoint["config"]), [Path(), *Path(path).absolute().parents]
    for folder in (*(place / config.data.data_dir for place in above), SAMPLE.parent):
        if found := find_streams(folder, content(checkpoint["dataset"])):
            return found[1:]
    if config.data.dataset not in ("sample", *HUB):
        config.data.dataset = str(found_in(above, config.data.dataset))
    try:
        _, *streams = prepare(config, checkpoint)
    except UserError as error:
        raise UserError(f"no stories of the checkpoint: {error}; name others with --data") from error
    for stream in streams:
        trained = checkpoint["dataset"][stream.info["split"]]
        if stream.info["sha256"] != trained["sha256"]:
            raise UserError(f"the {trained['split']} stories of {trained['dataset']!r} are not those of the "
                            f"checkpoint any more (sha256 {trained['sha256'][:12]}, now "
                            f"{stream.info['sha256'][:12]}); restore them, or use --data")
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


def story_texts(tokens: np.ndarray, tokenizer) -> Iterator[str]:
    """Yields the text of each story of a stream."""
    for start, end in story_windows(tokens, tokenizer.eot_id, len(tokens)):
        yield tokenizer.decode(tokens[start:end - 1])


# ---------------------------------------------------------------- loss

def loss_figures(model: Transformer, tokenizer, stream: Stream) -> dict:
    """Returns the loss over a whole stream and what derives from it.

    loss: the summed negative log-likelihood over the number of tokens, end-of-text included, in nats per
    token. loss_stderr: its standard error as a ratio estimator whose sampling unit is the story (Cochran
    1977, section
        6.4), since the tokens of a story are not independent; None for a single story.
    perplexity: exp(loss). bits_per_byte: the summed negative log-likelihood in bits over the UTF-8 bytes of
        the stories, which compares across tokenizers. accuracy: the share of tokens that were the likeliest
        one.
    loss_by_position: by the number of tokens of the story in the context, which starts anew every max_seq_len
    tokens. loss_by_length: by the story's length in tokens, end-of-text included.
    """
    tokens, eot_id = stream.tokens, tokenizer.eot_id
    losses, hits = evaluate(model, tokens, eot_id, BATCH_SIZE, contextlib.nullcontext,
                            lambda batches: progress(batches, len(batches), "loss, in batches"))
    losses = losses.astype(np.float64)
    starts, ends = story_windows(tokens, eot_id, len(tokens)).T
    story_losses, lengths, n_stories = np.add.reduceat(losses, starts), ends - starts, len(starts)
    loss = losses.sum() / len(losses)
    residuals = story_losses - loss * lengths
    stderr = None
    if n_stories > 1:
        stderr = math.sqrt(n_stories / (n_stories - 1) * (residuals @ residuals)) / len(losses)
    unknown = int((tokens == tokenizer.unknown_id).sum()) if tokenizer.name == "char" else 0
    if unknown:
        log(f"WARNING: the char tokenizer does not know {unknown:,} of {len(tokens):,} characters: they "
            "count as one unknown character, so bits per byte is not that of a lossless code")
    windows = story_windows(tokens, eot_id, model.config.max_seq_len)
    positions = np.concatenate([np.arange(end - start) for start, end in windows])
    bits_per_byte = losses.sum() / math.log(2) / stream.info["bytes"]
    return {"loss": loss, "loss_stderr": stderr, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": bits_per_byte, "accuracy": float(hits.mean()), "unknown_characters": unknown,
            "loss_by_position": loss_by(losses, positions, (0, 1, 4, 16, 64, 256)),
            "loss_by_length": loss_by(losses, np.repeat(lengths, lengths),
                                      (1, 100, 200, 300, 400, 600, 1000))}


def loss_by(losses: np.ndarray, keys: np.ndarray, edges: tuple[int, ...]) -> dict[str, dict]:
    """Returns {"4-15": {"loss", "tokens"}, ...}: the mean loss of tokens by where their key (N,) lies."""
    figures = {}
    for low, high in itertools.pairwise((*edges, math.inf)):
        inside = (keys >= low) & (keys < high)
        if inside.any():
            label = f"{low}+" if high == math.inf else f"{low}" if high == low + 1 else f"{low}-{high - 1}"
            figures[label] = {"loss": losses[inside].mean(), "tokens": int(inside.sum())}
    return figures


def loss_table(results: dict) -> str:
    error = results["loss_stderr"]
    shown = "" if error is None else f" ± {error:.4f} (standard error over stories),"
    lines = [f"{results['checkpoint']}, step {results['step']:,}",
             f"on {results['dataset']}, {results['split']}: {results['stories']:,} stories, "
             f"{results['tokens']:,} tokens of the {results['tokenizer']} tokenizer "
             f"({results['vocab_size']:,}), {results['bytes']:,} bytes\n",
             f"loss            {results['loss']:.4f}{shown} nats per token",
             f"perplexity      {results['perplexity']:.3f}",
             f"bits per byte   {results['bits_per_byte']:.4f}",
             f"accuracy        {results['accuracy']:.1%} of the tokens were the likeliest one\n"]
    for title, key in (("tokens in context", "loss_by_position"), ("tokens in story", "loss_by_length")):
        lines.append(f"{title:<20}{'loss':>8}{'tokens':>12}")
        rows = results[key].items()
        lines += [f"{label:<20}{row['loss']:>8.3f}{row['tokens']:>12,}" for label, row in rows] + [""]
    return "\n".join(lines)


# ---------------------------------------------------------------- quality of generated stories

OPENING_WORDS = 8
MOST_STORIES = 64
QUALITY = {  # figure: (row of the table, format)
    "ended": ("end by themselves", ".1%"), "words": ("words, mean", ".1f"),
    "distinct_2": ("distinct 2-grams", ".1%"), "repeated_4grams": ("4-grams repeated in the story", ".1%"),
    "self_similarity": ("similarity to another story", ".1%"),
    "copied_4grams": ("4-grams found in training", ".1%"), "longest_copy": ("longest copy, words", ".1f"),
    "unseen_words": ("words not in training", ".2%"),
}


@dataclasses.dataclass
class Continuation:
    """What follows an opening, in a real story or a generated one."""
    words: list[str]
    ended: bool  # by end-of-text, not by the limit


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n))))


def all_ngrams(stories: list[Continuation], n: int) -> list[tuple[str, ...]]:
    return [gram for story in stories for gram in ngrams(story.words, n)]


def opening(story: str) -> str:
    """Returns a story's first words, eight or half of a shorter story, with punctuation and spaces."""
    n_words = min(OPENING_WORDS, len(story.split()) // 2)
    return re.match(rf"(\s*\S+){{{n_words}}}", story)[0]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _share(sum(known), len(known))


def quality_figures(stories: list[Continuation]) -> dict[str, float | None]:
    """Returns figures of a set of stories, None where undefined. n-grams are of words, within a story.

    ended: share of stories that end by end-of-text. words: mean length of a story. distinct_2: distinct
    2-grams over all 2-grams (Li et al. 2016, arXiv:1510.03055); falls with the set's size. repeated_4grams:
    share of a story's 4-grams that it has used before, mean over stories (seq-rep-4, Welleck et al.
        2019, arXiv:1908.04319).
    self_similarity: ROUGE-2 F1 (Lin 2004: the 2-grams that two stories share over their mean number of
        2-grams) of a story with the one of the set most similar to it, mean over stories (as the TinyStories
        paper measures diversity, Eldan & Li 2023, arXiv:2305.07759).
    """
    grams = all_ngrams(stories, 2)
    four_grams = [ngrams(story.words, 4) for story in stories]
    counts = [Counter(ngrams(story.words, 2)) for story in stories]
    similarities = [[2 * (a & b).total() / max(1, a.total() + b.total()) for b in counts if b is not a]
                    for a in counts]
    return {"ended": _mean(story.ended for story in stories),
            "words": _mean(len(story.words) for story in stories),
            "distinct_2": _share(len(set(grams)), len(grams)),
            "repeated_4grams": _mean(_share(len(own) - len(set(own)), len(own)) for own in four_grams),
            "self_similarity": _mean(max(row, default=None) for row in similarities)}


def copy_figures(groups: list[list[Continuation]], training_stories: Iterable[str]) -> list[dict]:
    """Returns, for each set of stories, how much of it stands in the training stories, which are read once.

    copied_4grams: share of the set's 4-grams that some training story has. longest_copy: the most words in a
    row that a story of the set shares with a training story (n-gram overlap as a sign of memorisation: Eldan
    & Li 2023). unseen_words: share of the set's words that no training story has: misspellings, inventions.
    """
    words, four_grams = ({gram for group in groups for gram in all_ngrams(group, n)} for n in (1, 4))
    seen_words, seen_four_grams = set(), set()
    longest = [0] * len(groups)
    longer = [set(all_ngrams(group, 1)) for group in groups]  # n-grams of one word more
    for text in training_stories:
        story = split_words(text)
        seen_words.update(words.intersection(ngrams(story, 1)))
        seen_four_grams.update(four_grams.intersection(ngrams(story, 4)))
        for i, group in enumerate(groups):
            while not longer[i].isdisjoint(ngrams(story, longest[i] + 1)):
                longest[i] += 1
                longer[i] = set(all_ngrams(group, longest[i] + 1))
    return [{"copied_4grams": _mean(gram in seen_four_grams for gram in all_ngrams(group, 4)),
             "longest_copy": copy,
             "unseen_words": _mean(word not in seen_words for word in all_ngrams(group, 1))}
            for group, copy in zip(groups, longest)]


def generation_quality(model: Transformer, tokenizer, validation: Stream, training: Stream | None,
                       sampling: dict, seed: int) -> dict:
    """Returns {"model": figures, "human": figures, ...}: stories generated from the openings of validation
    stories, and what those stories really say after the same openings, cut at the same number of tokens. See
    the two functions above. Without training stories, copies are unknown.
    """
    eot_id, generator = tokenizer.eot_id, seeded_generator(model, seed)
    texts = list(itertools.islice(story_texts(validation.tokens, tokenizer), MOST_STORIES))
    prompts = [[eot_id, *tokenizer.encode(opening(text))] for text in texts]
    limit = min(sampling["max_new_tokens"], max(1, model.config.max_seq_len - max(map(len, prompts))))
    sampling = {**sampling, "max_new_tokens": limit}
    with progress(None, len(texts) * limit, "generating tokens, at most") as bar:
        rows = model.generate(prompts, **sampling, eot_id=eot_id, generator=generator,
                              stream=lambda row, token: bar.update())

    def continuation(tokens: list[int]) -> Continuation:
        ended = tokens[-1] == eot_id
        words = split_words(tokenizer.decode(tokens[:-1] if ended else tokens))
        return Continuation(words if ended else words[:-1], ended)  # the limit may cut the last word

    real = [[*tokenizer.encode(text)[len(prompt) - 1:], eot_id] for text, prompt in zip(texts, prompts)]
    groups = [[continuation(row[len(prompt):]) for row, prompt in zip(rows, prompts)],
              [continuation(row[:limit]) for row in real]]
    figures, copies = map(quality_figures, groups), [{}, {}]
    if training:
        stories = story_texts(training.tokens, tokenizer)
        stories = progress(stories, training.info["stories"], "looking for copies in stories")
        copies = copy_figures(groups, stories)
    columns = dict(zip(("model", "human"), (a | b for a, b in zip(figures, copies))))
    return {**columns, "stories": len(texts), **sampling, "seed": seed}


def quality_table(quality: dict) -> str:
    lines = [f"{quality['stories']} generated stories beside the real ones that begin so, the first "
             f"{quality['max_new_tokens']} tokens of each\n(temperature {quality['temperature']:g}, top_k "
             f"{quality['top_k']}, top_p {quality['top_p']}, seed {quality['seed']})\n",
             f"{'':<32}{'model':>10}{'human':>10}"]
    for name, (label, style) in QUALITY.items():
        values = [quality[column].get(name) for column in ("model", "human")]
        cells = ["-" if value is None else format(value, style) for value in values]
        lines.append(f"{label:<32}{cells[0]:>10}{cells[1]:>10}")
    return "\n".join(lines)


# ---------------------------------------------------------------- probes

def probe_figures(model: Transformer, tokenizer, groups: dict[str, list[dict]]) -> dict[str, dict]:
    """Returns {group: {"accuracy", "chance", "items", "failed"}} of items {"prompt", "right", "wrong": []}.

    A continuation's score is its log-likelihood after the prompt per UTF-8 byte; an item is passed when the
    right one scores highest; `failed` lists the others. (Groups as in Eldan & Li 2023, arXiv:2305.07759.)
    """
    texts = [(item["prompt"], ending)
             for items in groups.values() for item in items for ending in (item["right"], *item["wrong"])]
    rows = [[*tokenizer.encode(prompt), *tokenizer.encode(ending), tokenizer.eot_id]
            for prompt, ending in texts]
    losses, _ = evaluate(model, np.concatenate(rows), tokenizer.eot_id, BATCH_SIZE, contextlib.nullcontext,
                         lambda batches: progress(batches, len(batches), "probes, in batches"))
    losses = np.split(losses, np.cumsum([len(row) for row in rows]))  # and an empty rest
    scores = (-row[len(tokenizer.encode(prompt)):-1].sum(dtype=np.float64) / len(ending.encode())
              for row, (prompt, ending) in zip(losses, texts))
    figures = {}
    for group, items in groups.items():
        failed = []
        for item in items:
            right, *wrong = itertools.islice(scores, 1 + len(item["wrong"]))
            if right <= max(wrong):
                failed.append(item["prompt"] + item["right"])
        figures[group] = {"accuracy": 1 - len(failed) / len(items), "items": len(items), "failed": failed,
                          "chance": _mean(1 / (1 + len(item["wrong"])) for item in items)}
    return figures


def probe_table(probes: dict[str, dict]) -> str:
    rows = [f"{group:<12}{row['accuracy']:>10.1%}{row['chance']:>10.1%}{row['items']:>8}"
            for group, row in probes.items()]
    return "\n".join([f"{'probes':<12}{'accuracy':>10}{'chance':>10}{'items':>8}", *rows, ""])


# ---------------------------------------------------------------- evaluation

def run_evaluation(model: Transformer, tokenizer, checkpoint: dict, options: argparse.Namespace) -> None:
    """Prints loss, probes and generation quality, what is quick first; or all as one JSON object."""
    training, say = None, (lambda text: None) if options.json else functools.partial(print, flush=True)
    try:
        training, stream = open_streams(checkpoint, options.checkpoint)
    except UserError as error:
        if not options.data:
            raise
        log(f"WARNING: {error}; copies of training stories cannot be counted")
    if options.data:
        stream = read_stream(options.data, tokenizer, Config.of(checkpoint["config"]).data.separator)
    results = {"checkpoint": str(options.checkpoint), "step": checkpoint["step"],
               **{key: stream.info[key] for key in ("dataset", "split", "stories", "tokens", "bytes")},
               "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
               **loss_figures(model, tokenizer, stream)}
    say(loss_table(results))
    groups = json.loads(PROBES.read_text())
    groups.pop("about")
    results["probes"] = probe_figures(model, tokenizer, groups)
    say(probe_table(results["probes"]))
    results["quality"] = generation_quality(model, tokenizer, stream, training, sampling_of(options),
                                            options.seed or 0)
    say(quality_table(results["quality"]))
    if options.json:
        print(json.dumps(results, indent=1, allow_nan=False))


# ---------------------------------------------------------------- losses of a text

LOSS_COLOURS = (231, 230, 229, 222, 216, 209, 203, 196)  # of 256; one per nat: 0-1, ..., 7 and more


def text_losses(model: Transformer, tokenizer, text: str) -> list[tuple[str, float]]:
    """Returns the pieces of a text, tokens or several that share a character, and their losses in nats."""
    tokens = np.array(tokenizer.encode(text))
    losses, _ = evaluate(model, tokens, tokenizer.eot_id, 1, contextlib.nullcontext)
    decode, pieces, held_loss = tokenizer.decoder(), [], 0.0
    for token, loss in zip([*tokens, None], [*losses.tolist(), 0.0]):
        held_loss += loss
        if piece := decode(token):
            pieces.append((piece, held_loss))
            held_loss = 0.0
    return pieces


def print_losses(pieces: list[tuple[str, float]], coloured: bool) -> None:
    """Prints pieces on a background coloured by their loss; without colours a line each, loss first."""
    if not coloured:
        print("\n".join(f"{loss:7.2f}  {piece!r}" for piece, loss in pieces))
        return

    def paint(text: str, loss: float) -> str:
        start = f"\x1b[48;5;{LOSS_COLOURS[min(int(loss), len(LOSS_COLOURS) - 1)]};38;5;16m"
        # No colour runs on past its line.
        return re.sub("[^\n]+", f"{start}\\g<0>\x1b[0m", text.replace("\n", "↵\n"))

    legend = "".join(paint(f" {level} ", level) for level in range(len(LOSS_COLOURS)))
    print("".join(paint(*piece) for piece in pieces) + f"\n\n{legend}+ nats")


def run_inspection(model: Transformer, tokenizer, checkpoint: dict, text: str) -> None:
    if not text:
        raise UserError("--inspect needs a text that is not empty")
    warn_of_unknown(tokenizer, text)
    pieces = text_losses(model, tokenizer, text)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print_losses(pieces, coloured)
    total, n_tokens = sum(loss for _, loss in pieces), len(tokenizer.encode(text))
    mean, n_bytes = total / n_tokens, len(text.encode("utf-8", "replace"))
    dataset = checkpoint["dataset"]["train"]["dataset"]
    print(f"\n{n_tokens:,} tokens of the {tokenizer.name} tokenizer, {dataset} model: loss {mean:.3f} nats "
          f"per token, perplexity {math.exp(min(700, mean)):.2f}, "
          f"{total / math.log(2) / n_bytes:.3f} bits per byte")


# ---------------------------------------------------------------- training curves

PANELS = {"val_loss": "loss (nats per token, log scale)", "val_bits_per_byte": "bits per byte (log scale)",
          "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


def read_metrics(log_dir: Path) -> dict[str, np.ndarray]:
    """Returns each metric of a run as an array, one value an evaluation, NaN where it is missing. A line that
    is not complete yet is passed over. Raises UserError where there are no metrics.
    """
    path, rows = log_dir / "metrics.jsonl", []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; train first, or name a folder of logs: "
                        "--plot LOGDIR") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no metrics yet: they come with the first evaluation of a run")
    names = ("step", "train_loss", *PANELS)
    return {name: np.array([row.get(name) for row in rows], float) for name in names}


def draw_run(panels: dict, log_dir: Path, colour: str) -> None:
    """Draws a run's metrics into {metric: axes}; a star marks the lowest validation loss."""
    # matplotlib leaves out names that begin with _, and takes what is between dollars for a formula.
    label = " " + os.fsencode(log_dir).decode(errors="replace").replace("$", r"\$")
    run = read_metrics(log_dir)
    steps, losses = run["step"], run["val_loss"]
    style = {"color": colour, "marker": "." if len(steps) < 20 else ""}
    if not np.isnan(losses).all():
        best = np.nanargmin(losses)
        panels["val_loss"].plot(steps[best], losses[best], "*", color=colour, markersize=15, zorder=3)
        label += f"\nbest {losses[best]:.4f} at step {steps[best]:,.0f}"
    panels["val_loss"].plot(steps, run["train_loss"], "--", alpha=0.6, **style)
    for name, axes in panels.items():
        axes.plot(steps, run[name], label=label, **style)


def logs_of(path: Path) -> Path:
    """Returns the log folder of the checkpoint at `path`, which a relative one has above it."""
    return found_in(path.absolute().parents, load_checkpoint(path)["config"]["training"]["log_dir"])


def plot_training(log_dirs: list[Path]) -> Path:
    """Draws the training curves of one run or several; returns the PNG, in the first one's folder, or here if
    that is read-only.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplot_mosaic([["val_loss", "val_loss", "val_bits_per_byte", "lr"],
                                    ["val_loss", "val_loss", "grad_norm", "tokens_per_second"]])
    for i, log_dir in enumerate(log_dirs):
        draw_run(panels, log_dir, f"C{i}")
    for name, axes in panels.items():
        axes.set_title(PANELS[name], loc="left", fontsize=11)
        axes.set(xlabel="step", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.locator_params(axis="x", nbins=4, integer=True)
        if "log scale" in PANELS[name] and axes.dataLim.y1 > 0:  # it is not where every value is missing
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    panels["val_loss"].plot([], [], color="grey", label="validation")
    panels["val_loss"].plot([], [], "--", color="grey", label="training")
    panels["val_loss"].legend(loc="upper right", frameon=False, fontsize=9)
    path = (log_dirs[0] if os.access(log_dirs[0], os.W_OK) else Path()) / "training_curves.png"
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=200)
    return path


# ---------------------------------------------------------------- export

# Both formats write bytes as GPT-2 does: those that are not printable in Latin-1 have a stand-in.
STAND_INS = {byte: 256 + i for i, byte in enumerate((*range(33), *range(127, 161), 173))}
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
    """Returns tokenizer.json. A text begins with end-of-text, as in training."""
    eot, begin = tokenizer.eot_id, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    if tokenizer.name == "char":
        characters = [*tokenizer.characters, "<unk>", END_OF_TEXT]
        model = {"type": "WordLevel", "unk_token": "<unk>", "vocab": {c: i for i, c in enumerate(characters)}}
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "Fuse"}
    else:
        ids, merges = bpe_vocabulary(tokenizer)
        model = {"type": "BPE", "vocab": ids, "merges": merges}
        split = decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {"model": model, "pre_tokenizer": split, "decoder": decoder,
            "added_tokens": [{"id": eot, "content": END_OF_TEXT, "special": True, "normalized": False,
                              "single_word": False, "lstrip": False, "rstrip": False}],
            "post_processor": {
                "type": "TemplateProcessing", "single": [begin, first], "pair": [begin, first, second],
                "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [eot], "tokens": [END_OF_TEXT]}}}}


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
    """Writes a file for llama.cpp where `target` ends in .gguf, else a folder for transformers, and returns
    the lines that use it, with temperature, top_k and top_p of `sampling`. Raises UserError where it exists,
    cannot be written or cannot hold the tokenizer.
    """
    path, settings = Path(target), transformers_files(model, tokenizer, sampling)
    weights = {name: weight.cpu().numpy() for name, weight in model.state_dict().items()}
    if os.path.lexists(path):
        raise UserError(f"{path} exists: move it away, or choose another name")
    if path.suffix != ".gguf":
        files = {name: json.dumps(value, indent=1).encode() for name, value in settings.items()}
        files["model.safetensors"] = safetensors(weights)
    elif tokenizer.name == "char":
        raise UserError("llama.cpp has no char tokenizer: export a folder (a name without .gguf)")
    else:
        files = {"": gguf(settings["config.json"], tokenizer, weights)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
            finished = Path(folder, path.name)
            for name, content in files.items():
                with atomic_write(finished / name, len(content)) as file:
                    file.write(content)
            finished.rename(path)
    except OSError as error:
        raise write_error(path, error) from error
    chosen = f"--temp {sampling.temperature:g} --top-k {sampling.top_k or 0} --top-p {sampling.top_p or 1:g}"
    return (GGUF_USE if path.suffix == ".gguf" else FOLDER_USE).format(path.as_posix(), chosen)


# ---------------------------------------------------------------- command line

DESCRIPTION = """Evaluates a checkpoint, tells stories with it, draws how it learned.

  python eval.py                                                 all about checkpoints/best_model.pt
  python eval.py --checkpoint checkpoints/quick/best_model.pt    about another one
  python eval.py --data my_stories.txt                           on other stories
  python eval.py --generate "Once upon a time" "The little girl"
  python eval.py --interactive                                   type openings, watch the stories appear
  python eval.py --inspect "Once upon a time there was a cat."   what surprises the model
  python eval.py --plot logs/a logs/b                            compare two runs
  python eval.py --export my-model                               for transformers, as .gguf for llama.cpp

Without one of these: loss, perplexity, bits per byte and accuracy on all validation stories, understanding
probes, and generated stories beside real ones. Results go to standard output, progress to standard error."""


def dataset_name(text: str) -> str:
    """Returns the name of a dataset as --data has it. Raises UserError where there is none."""
    name = parse_value("data.dataset", text)
    locate(name)
    return name


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(DESCRIPTION)
    parser.add_argument("--checkpoint", metavar="FILE", type=best_model,
                        help="a file, or the folder of a run; default: checkpoints/best_model.pt")
    parser.add_argument("--data", metavar="NAME", type=dataset_name,
                        help="evaluate on any file, folder or dataset that train.py takes; default: the "
                        "checkpoint's validation stories")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--json", action="store_true", help="print the evaluation as one JSON object")
    modes.add_argument("--generate", nargs="+", metavar="OPENING", help='tell stories; "" is allowed')
    modes.add_argument("--interactive", action="store_true", help="tell stories as you type openings")
    modes.add_argument("--inspect", metavar="TEXT", help="print the text, each token coloured by its loss")
    modes.add_argument("--plot", nargs="*", metavar="LOGDIR", help="draw the training curves of one run or "
                       "several into the first folder; default: the logs of --checkpoint, or logs/")
    modes.add_argument("--export", metavar="NAME", help="write a folder for transformers, or where NAME ends "
                       "in .gguf a file for llama.cpp")
    for name, default in dataclasses.asdict(SamplingConfig()).items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*names, metavar="N", default=argparse.SUPPRESS,
                            help=f"default: the checkpoint's, mostly {str(default).lower()}",
                            type=functools.partial(parse_value, f"sampling.{name}"))
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps",
                        type=lambda text: choose_device(parse_value("training.device", text)))
    options = parser.parse_args()
    others = (options.generate, options.interactive or None, options.inspect, options.plot, options.export)
    if options.data and any(other is not None for other in others):
        raise UserError("--data is for an evaluation: leave --generate, --interactive, --inspect, --plot and "
                        "--export out, or --data")
    return options


def main() -> None:
    options = parse_options()
    if options.plot is not None:
        log_dirs = options.plot or [logs_of(options.checkpoint) if options.checkpoint else "logs"]
        print(plot_training([Path(log_dir) for log_dir in log_dirs]))
        return
    options.checkpoint = options.checkpoint or "checkpoints/best_model.pt"
    model, tokenizer, checkpoint = load_model(options.checkpoint, options.device)
    sampling = Config.of(checkpoint["config"]).sampling
    options = argparse.Namespace(**{**dataclasses.asdict(sampling), **vars(options)})
    if options.generate:
        prompts = [prompt for prompt in options.generate for _ in range(options.num_samples)]
        tell_stories(model, tokenizer, prompts, sampling_of(options), seeded_generator(model, options.seed))
    elif options.interactive:
        interact(model, tokenizer, options)
    elif options.inspect is not None:
        run_inspection(model, tokenizer, checkpoint, options.inspect)
    elif options.export is not None:
        print(export(model, tokenizer, SamplingConfig(**sampling_of(options)), options.export))
    else:
        run_evaluation(model, tokenizer, checkpoint, options)


if __name__ == "__main__":
    run_main(main)
