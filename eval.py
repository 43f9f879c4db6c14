"""Evaluates a checkpoint: its loss, its stories beside real ones, understanding probes, plots; and tells stories.

Evaluation is in float32 whatever precision training used, so that its numbers depend on neither batch size nor device.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import re
import secrets
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import ArgumentParser, Config, ModelConfig, TrainingConfig, UserError, run_main
from data import Stream, atomic_write, encode_stories, open_dataset, prepare, progress, tokenizer_from_spec
from model import Transformer
from train import choose_device, evaluate, load_checkpoint, story_windows

BATCH_SIZE = 32
PROBES = Path(__file__).parent / "data" / "probes.json"


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple:
    """Returns (model, tokenizer, checkpoint) of the checkpoint at `path`, the model on `device` and in evaluation mode.

    Raises UserError where the file is missing, damaged, not a checkpoint, or its weights do not fit its config, and where
    this machine has no such device.
    """
    path, device = Path(path), choose_device(str(device))
    if not path.exists():
        others = "".join(f" {other}" for other in sorted(Path("checkpoints").glob("*/best_model.pt")))
        raise UserError(f"there is no checkpoint {path}: train first (python train.py), or name one with --checkpoint"
                        + (f", such as{others}" if others else ""))
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


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


@contextlib.contextmanager
def naming(option: str, setting: str):
    """Errors raised inside about a setting of config.py name the command-line option that set it."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(setting, option)) from None


# ---------------------------------------------------------------- data

def open_streams(checkpoint: dict) -> tuple[Stream, Stream]:
    """Returns the training and the validation stream of a checkpoint, prepared anew where they are gone.

    Raises UserError where they cannot be had or are no longer the tokens that the checkpoint was trained with.
    """
    settings = Config()
    for section, values in checkpoint["config"].items():
        for name, value in values.items():
            settings.set(f"{section}.{name}", value)
    settings.data.dataset = checkpoint["dataset"]["train"]["dataset"]  # what `auto` was, and its tokenizer
    settings.training.tokenizer_type = checkpoint["tokenizer"]["type"]
    _, *streams = prepare(settings)
    for stream in streams:
        trained = checkpoint["dataset"][stream.info["split"]]
        if stream.info["sha256"] != trained["sha256"]:
            raise UserError(f"the {trained['split']} stories of {trained['dataset']!r} are not those of the checkpoint any more "
                            f"(sha256 {trained['sha256'][:12]}, now {stream.info['sha256'][:12]}); restore them, or use --data")
    return tuple(streams)


def read_stream(name: str, tokenizer) -> Stream:
    """Returns the stories of any dataset or .txt file as a stream: its validation split if it has one, else all of them."""
    with naming("--data", "data.dataset"):
        splits, chunks = open_dataset(name, limited=True), []
        split, stories = ("validation", splits["validation"]) if "validation" in splits else ("all", splits["train"])
        counts = encode_stories(progress(stories(), None, "tokenizing", "stories"), tokenizer, chunks.append)
        if not counts["stories"]:
            raise UserError(f"data.dataset = {name!r} has no stories")
    return Stream(np.frombuffer(b"".join(chunks), np.uint16), {"dataset": name, "split": split, **counts})


def story_texts(tokens: np.ndarray, tokenizer) -> Iterator[str]:
    """Yields the text of each story of a stream."""
    for start, end in story_windows(tokens, tokenizer.eot_id, len(tokens)):
        yield tokenizer.decode(tokens[start:end - 1])


# ---------------------------------------------------------------- loss

def loss_figures(model: Transformer, tokenizer, stream: Stream) -> dict:
    """Returns the loss over a whole stream and what derives from it.

    loss: the summed negative log-likelihood over the number of tokens, end-of-text included, in nats per token.
    loss_stderr: its standard error as a ratio estimator whose sampling unit is the story (Cochran 1977, section 6.4), since
        the tokens of a story are not independent; None for a single story.
    perplexity: exp(loss). bits_per_byte: the summed negative log-likelihood in bits over the UTF-8 bytes of the stories,
        which compares across tokenizers. accuracy: the share of tokens that were the likeliest one.
    loss_by_position: by the number of tokens of the story in the context, which starts anew every max_seq_len tokens.
    loss_by_length: by the story's length in tokens, end-of-text included.
    """
    tokens, eot_id = stream.tokens, tokenizer.eot_id
    losses, hits = evaluate(model, tokens, eot_id, BATCH_SIZE, contextlib.nullcontext,
                            lambda batches: progress(batches, len(batches), "loss", "batches"))
    losses = losses.astype(np.float64)
    starts, ends = np.array(story_windows(tokens, eot_id, len(tokens))).T
    story_losses, lengths, n_stories = np.add.reduceat(losses, starts), ends - starts, len(starts)
    loss = losses.sum() / len(losses)
    residuals = story_losses - loss * lengths
    stderr = math.sqrt(n_stories / (n_stories - 1) * (residuals @ residuals)) / len(losses) if n_stories > 1 else None
    unknown = int((tokens == tokenizer.unknown_id).sum()) if tokenizer.name == "char" else 0
    if unknown:
        warn(f"the char tokenizer does not know {unknown:,} of {len(tokens):,} characters: they count as one unknown character, "
             "so bits per byte is not that of a lossless code")
    positions = np.concatenate([np.arange(e - s) for s, e in story_windows(tokens, eot_id, model.config.max_seq_len)])
    return {"loss": loss, "loss_stderr": stderr, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": losses.sum() / math.log(2) / stream.info["bytes"], "accuracy": float(hits.mean()),
            "unknown_characters": unknown,
            "loss_by_position": loss_by(losses, positions, (0, 1, 4, 16, 64, 256)),
            "loss_by_length": loss_by(losses, np.repeat(lengths, lengths), (1, 100, 200, 300, 400, 600, 1000))}


def loss_by(losses: np.ndarray, keys: np.ndarray, edges: tuple[int, ...]) -> dict[str, dict]:
    """Returns {"4-15": {"loss", "tokens"}, ...}, the mean loss of the tokens whose key (N,) is from an edge up to the next."""
    figures = {}
    for low, high in itertools.pairwise((*edges, math.inf)):
        inside = (keys >= low) & (keys < high)
        if inside.any():
            label = f"{low}+" if high == math.inf else f"{low}" if high == low + 1 else f"{low}-{high - 1}"
            figures[label] = {"loss": losses[inside].mean(), "tokens": int(inside.sum())}
    return figures


def loss_table(results: dict) -> str:
    error = "" if results["loss_stderr"] is None else f" ± {results['loss_stderr']:.4f} (standard error over stories),"
    lines = [f"{results['checkpoint']}, update {results['step']:,}",
             f"on {results['dataset']}, {results['split']}: {results['stories']:,} stories, {results['tokens']:,} tokens of the "
             f"{results['tokenizer']} tokenizer ({results['vocab_size']:,}), {results['bytes']:,} bytes\n",
             f"loss            {results['loss']:.4f}{error} nats per token",
             f"perplexity      {results['perplexity']:.3f}",
             f"bits per byte   {results['bits_per_byte']:.4f}",
             f"accuracy        {results['accuracy']:.1%} of the tokens were the likeliest one\n"]
    for title, key in (("tokens in context", "loss_by_position"), ("tokens in story", "loss_by_length")):
        lines.append(f"{title:<20}{'loss':>8}{'tokens':>12}")
        lines += [f"{label:<20}{row['loss']:>8.3f}{row['tokens']:>12,}" for label, row in results[key].items()] + [""]
    return "\n".join(lines)


# ---------------------------------------------------------------- quality of generated stories

OPENING_WORDS = 8
MOST_STORIES, FEWEST_STORIES = 64, 50
QUALITY = {  # figure: (row of the table, format)
    "ended": ("end by themselves", ".1%"), "tokens": ("tokens, mean", ".1f"), "words": ("words, mean", ".1f"),
    "distinct_1": ("distinct words", ".1%"), "distinct_2": ("distinct 2-grams", ".1%"), "distinct_3": ("distinct 3-grams", ".1%"),
    "repeated_4grams": ("4-grams repeated in the story", ".1%"), "self_similarity": ("similarity to another story", ".1%"),
    "copied_4grams": ("4-grams found in training", ".1%"), "longest_copy": ("longest copy, words", ".1f"),
    "unseen_words": ("words not in training", ".2%"),
}


@dataclass
class Continuation:
    """What follows an opening, in a real story or a generated one."""
    words: list[str]
    tokens: int
    ended: bool  # by end-of-text, not by the limit


def split_words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n))))


def all_ngrams(stories: list[Continuation], n: int) -> list[tuple[str, ...]]:
    return [gram for story in stories for gram in ngrams(story.words, n)]


def opening(story: str) -> str:
    """Returns the first words of a story, eight, or half of a shorter story; punctuation and spaces as they are."""
    n_words = min(OPENING_WORDS, len(story.split()) // 2)
    return re.match(rf"(\s*\S+){{{n_words}}}", story)[0]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _share(sum(known), len(known))


def quality_figures(stories: list[Continuation]) -> dict[str, float | None]:
    """Returns figures of a set of stories, None where undefined. n-grams are of words, within a story.

    ended: share of stories that end by end-of-text. tokens, words: mean length of a story.
    distinct_n: distinct n-grams over all n-grams of the set (Li et al. 2016, arXiv:1510.03055); falls with the set's size.
    repeated_4grams: share of a story's 4-grams that it has used before, mean over stories (seq-rep-4, Welleck et al. 2019,
        arXiv:1908.04319).
    self_similarity: ROUGE-2 F1 (Lin 2004: the 2-grams that two stories share over their mean number of 2-grams) of a story
        with the story of the set most similar to it, mean over stories (as the TinyStories paper measures diversity, Eldan
        & Li 2023, arXiv:2305.07759).
    """
    figures = {"ended": _mean(story.ended for story in stories), "tokens": _mean(story.tokens for story in stories),
               "words": _mean(len(story.words) for story in stories)}
    for n in (1, 2, 3):
        grams = all_ngrams(stories, n)
        figures[f"distinct_{n}"] = _share(len(set(grams)), len(grams))
    four_grams = [ngrams(story.words, 4) for story in stories]
    figures["repeated_4grams"] = _mean(_share(len(grams) - len(set(grams)), len(grams)) for grams in four_grams)
    bigrams = [Counter(ngrams(story.words, 2)) for story in stories]
    similarities = [[2 * (a & b).total() / max(1, a.total() + b.total()) for b in bigrams if b is not a] for a in bigrams]
    figures["self_similarity"] = _mean(max(row, default=None) for row in similarities)
    return figures


def copy_figures(groups: list[list[Continuation]], training_stories: Iterable[str]) -> list[dict[str, float | None]]:
    """Returns, for each set of stories, how much of it stands in the training stories, which are read once, as a stream.

    copied_4grams: share of the set's 4-grams that some training story has. longest_copy: the most words in a row that a
    story of the set shares with a training story (n-gram overlap as a sign of memorisation: Eldan & Li 2023).
    unseen_words: share of the set's words that no training story has: misspellings, inventions.
    """
    words, four_grams = ({gram for group in groups for gram in all_ngrams(group, n)} for n in (1, 4))
    seen_words, seen_four_grams = set(), set()
    longest, longer = [0] * len(groups), [set(all_ngrams(group, 1)) for group in groups]  # longer: one word more
    for text in training_stories:
        story = split_words(text)
        seen_words.update(words.intersection(ngrams(story, 1)))
        seen_four_grams.update(four_grams.intersection(ngrams(story, 4)))
        for i, group in enumerate(groups):
            while not longer[i].isdisjoint(ngrams(story, longest[i] + 1)):
                longest[i] += 1
                longer[i] = set(all_ngrams(group, longest[i] + 1))
    return [{"copied_4grams": _mean(gram in seen_four_grams for gram in all_ngrams(group, 4)), "longest_copy": longest[i],
             "unseen_words": _mean(word not in seen_words for word in all_ngrams(group, 1))} for i, group in enumerate(groups)]


def generation_quality(model: Transformer, tokenizer, validation: Stream, training: Stream | None, sampling: dict,
                       seed: int) -> dict:
    """Returns {"model": figures, "human": figures, ...}: stories generated from the openings of validation stories, and
    what those stories really say after the same openings, cut at the same number of tokens. See the two functions above.

    With fewer than 50 validation stories, every opening is used in several rounds and the model's figures are the means
    over the rounds, so that both columns describe sets of the same size. Without training stories, copies are unknown.
    """
    eot_id, generator = tokenizer.eot_id, seeded_generator(model, seed)
    texts = list(itertools.islice(story_texts(validation.tokens, tokenizer), MOST_STORIES))
    prompts = [[eot_id, *tokenizer.encode(opening(text))] for text in texts]
    limit = min(sampling["max_new_tokens"], max(1, model.config.max_seq_len - max(map(len, prompts))))
    sampling = {**sampling, "max_new_tokens": limit}
    rounds = math.ceil(FEWEST_STORIES / len(texts))
    groups = [[[*tokenizer.encode(text)[len(prompt) - 1:], eot_id][:limit] for text, prompt in zip(texts, prompts)]]
    with progress(None, rounds * len(texts) * limit, "generating, at most", "tokens") as bar:
        for _ in range(rounds):
            rows = model.generate(prompts, **sampling, eot_id=eot_id, generator=generator,
                                  stream=lambda row, token: bar.update())
            groups.append([row[len(prompt):] for row, prompt in zip(rows, prompts)])

    def continuation(tokens: list[int]) -> Continuation:
        ended = tokens[-1] == eot_id
        words = split_words(tokenizer.decode(tokens[:-1] if ended else tokens))
        return Continuation(words if ended else words[:-1], len(tokens), ended)  # the limit may cut the last word

    groups = [[continuation(tokens) for tokens in group] for group in groups]
    figures = [quality_figures(group) for group in groups]
    if training:
        stories = progress(story_texts(training.tokens, tokenizer), training.info["stories"], "looking for copies", "stories")
        figures = [quality | copies for quality, copies in zip(figures, copy_figures(groups, stories))]
    human, *generated = figures
    return {"model": {name: _mean(group.get(name) for group in generated) for name in QUALITY},
            "human": {name: human.get(name) for name in QUALITY},
            "stories": rounds * len(texts), "openings": len(texts), **sampling, "seed": seed}


def quality_table(quality: dict) -> str:
    lines = [f"{quality['stories']} generated stories beside the {quality['openings']} real ones that begin so, the first "
             f"{quality['max_new_tokens']} tokens of each\n(temperature {quality['temperature']:g}, top_k {quality['top_k']}, "
             f"top_p {quality['top_p']}, seed {quality['seed']})\n", f"{'':<32}{'model':>10}{'human':>10}"]
    for name, (label, style) in QUALITY.items():
        cells = ("-" if (value := quality[column][name]) is None else format(value, style) for column in ("model", "human"))
        lines.append(f"{label:<32}{''.join(f'{cell:>10}' for cell in cells)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- probes

def probe_figures(model: Transformer, tokenizer, groups: dict[str, list[dict]]) -> dict[str, dict]:
    """Returns {group: {"accuracy", "chance", "items", "failed"}} of items {"prompt", "right", "wrong": [...]}.

    A continuation's score is its log-likelihood after the prompt per UTF-8 byte; an item is passed when the right one
    scores highest. `failed` lists the others. (The groups follow Eldan & Li 2023, arXiv:2305.07759.)
    """
    texts = [(item["prompt"], ending)
             for items in groups.values() for item in items for ending in (item["right"], *item["wrong"])]
    rows = [[*tokenizer.encode(prompt), *tokenizer.encode(ending), tokenizer.eot_id] for prompt, ending in texts]
    losses, _ = evaluate(model, np.concatenate(rows), tokenizer.eot_id, BATCH_SIZE, contextlib.nullcontext,
                         lambda batches: progress(batches, len(batches), "probes", "batches"))
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
    rows = [f"{group:<12}{row['accuracy']:>10.1%}{row['chance']:>10.1%}{row['items']:>8}" for group, row in probes.items()]
    return "\n".join([f"{'probes':<12}{'accuracy':>10}{'chance':>10}{'items':>8}", *rows, ""])


def run_evaluation(model: Transformer, tokenizer, checkpoint: dict, options: argparse.Namespace) -> None:
    """Prints loss, probes and generation quality, what is quick first; or all as one JSON object."""
    training, say = None, (lambda text: None) if options.json else functools.partial(print, flush=True)
    try:
        training, stream = open_streams(checkpoint)
    except UserError as error:
        if not options.data:
            raise
        warn(f"{error}; copies of training stories cannot be counted")
    if options.data:
        stream = read_stream(options.data, tokenizer)
    results = {"checkpoint": str(options.checkpoint), "step": checkpoint["step"],
               **{key: stream.info[key] for key in ("dataset", "split", "stories", "tokens", "bytes")},
               "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, **loss_figures(model, tokenizer, stream)}
    say(loss_table(results))
    groups = json.loads(PROBES.read_text())
    groups.pop("about")
    results["probes"] = probe_figures(model, tokenizer, groups)
    say(probe_table(results["probes"]))
    results["quality"] = generation_quality(model, tokenizer, stream, training, sampling_of(options), options.seed or 0)
    say(quality_table(results["quality"]))
    if options.json:
        print(json.dumps(results, indent=1, allow_nan=False))


# ---------------------------------------------------------------- telling stories

SAMPLING = {  # option: (type, default, whether a value is allowed, what is allowed)
    "temperature": (float, 0.8, lambda v: v == 0 or 0.001 <= v <= 1000, "0 (the likeliest token) or between 0.001 and 1000"),
    "top_k": (int, 50, lambda v: v is None or v >= 1, "a whole number, at least 1, or none"),
    "top_p": (float, None, lambda v: v is None or 0 < v <= 1, "more than 0 and at most 1, or none"),
    "max_new_tokens": (int, 400, lambda v: 1 <= v <= 10**6, "a whole number between 1 and 1,000,000"),
    "num_samples": (int, 1, lambda v: 1 <= v <= 10**4, "a whole number between 1 and 10,000"),
    "seed": (int, None, lambda v: 0 <= v < 2**63, "a whole number, at least 0"),
}


def sampling_value(name: str, text: str):
    """Returns the value of a sampling option that was given as text. Raises UserError where it is not allowed."""
    kind, _, allowed, description = SAMPLING[name]
    with contextlib.suppress(ValueError, TypeError):
        if allowed(value := None if text.lower() == "none" else kind(text)):
            return value
    raise UserError(f"--{name} = {text} must be {description}")


def sampling_of(options: argparse.Namespace) -> dict:
    """Returns the options that are arguments of Transformer.generate."""
    return {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}


class StreamDecoder:
    """Turns tokens into text as they come: `decoder(token)` is the text that became complete, "" inside a character.

    A character of several bytes may span tokens; until its last byte is there, decoding ends in U+FFFD and is held back.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.held = tokenizer, []

    def __call__(self, token: int) -> str:
        self.held.append(token)
        return "" if self.tokenizer.decode(self.held).endswith("\ufffd") else self.rest()

    def rest(self) -> str:
        """Returns what is held back."""
        text, self.held = self.tokenizer.decode(self.held), []
        return text


def warn_of_unknown(tokenizer, text: str) -> None:
    if unknown := tokenizer.unknown(text):
        warn(f"the {tokenizer.name} tokenizer does not know {', '.join(map(repr, unknown))}: the model sees an unknown character")


def tell_stories(model: Transformer, tokenizer, prompts: list[str], sampling: dict, generator: torch.Generator) -> None:
    """Prints a story for each prompt, in order, as they grow: all are generated in one batch, the first unfinished one is
    shown token by token, and what the next ones have by then follows at once. Each begins after end-of-text, as in training.
    """
    warn_of_unknown(tokenizer, "".join(prompts))
    for first in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[first:first + BATCH_SIZE]
        texts = [f"--- {first + i} of {len(prompts)} ---\n{prompt}" if len(prompts) > 1 else prompt
                 for i, prompt in enumerate(batch, 1)]
        decoders, left = [StreamDecoder(tokenizer) for _ in batch], [sampling["max_new_tokens"]] * len(batch)

        def show():  # the rows before the first unfinished one have been printed
            for row in range(len(batch)):
                print(texts[row], end="", flush=True)
                texts[row] = ""
                if left[row]:
                    break

        def receive(row: int, token: int):
            left[row] = 0 if token == tokenizer.eot_id else left[row] - 1
            if token != tokenizer.eot_id:
                texts[row] += decoders[row](token)
            if not left[row]:
                texts[row] += decoders[row].rest() + "\n"
            show()

        show()
        model.generate([[tokenizer.eot_id, *tokenizer.encode(prompt)] for prompt in batch], **sampling,
                       eot_id=tokenizer.eot_id, generator=generator, stream=receive)


def seeded_generator(model: Transformer, seed: int | None) -> torch.Generator:
    """Returns a generator on the model's device; without a seed a fresh one, which is printed so that it can be repeated."""
    if seed is None:
        seed = secrets.randbelow(2**31)
        print(f"seed {seed}", file=sys.stderr)
    return torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)


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
    sys.stdin.reconfigure(errors="replace")
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
            elif command in SAMPLING:
                setattr(options, command, sampling_value(command, value.strip()))
                if command == "seed":
                    generator.manual_seed(options.seed)
            else:
                print(f"there is no command /{command}; /help lists them")
        except UserError as error:
            print(str(error).replace("--", "/", 1))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


# ---------------------------------------------------------------- losses of a text

# One colour per nat, of the 256 that terminals know: 0-1, 1-2, ..., 7 and more.
LOSS_COLOURS = {231: "#ffffff", 230: "#ffffd7", 229: "#ffffaf", 222: "#ffd787", 216: "#ffaf87", 209: "#ff875f", 203: "#ff5f5f",
                196: "#ff0000"}


def loss_level(loss: float) -> int:
    return min(int(loss), len(LOSS_COLOURS) - 1)


def text_losses(model: Transformer, tokenizer, text: str) -> list[tuple[str, float]]:
    """Returns the pieces of a text and their losses in nats; a piece is a token, or several that share a character."""
    tokens = np.array(tokenizer.encode(text))
    losses, _ = evaluate(model, tokens, tokenizer.eot_id, 1, contextlib.nullcontext)
    decoder, pieces, held_loss = StreamDecoder(tokenizer), [], 0.0
    for token, loss in zip(tokens, losses.tolist()):
        held_loss += loss
        if piece := decoder(token):
            pieces.append((piece, held_loss))
            held_loss = 0.0
    return pieces + ([(decoder.rest(), held_loss)] if decoder.held else [])


def print_losses(pieces: list[tuple[str, float]], coloured: bool) -> None:
    """Prints pieces on a background coloured by their loss; without colours a line each, loss first."""
    if not coloured:
        print("\n".join(f"{loss:7.2f}  {piece!r}" for piece, loss in pieces))
        return

    def paint(text: str, loss: float) -> str:
        start = f"\x1b[48;5;{list(LOSS_COLOURS)[loss_level(loss)]};38;5;16m"
        return re.sub("[^\n]+", f"{start}\\g<0>\x1b[0m", text.replace("\n", "↵\n"))  # no colour runs on past its line

    legend = "".join(paint(f" {level} ", level) for level in range(len(LOSS_COLOURS)))
    print("".join(paint(*piece) for piece in pieces) + f"\n\n{legend}+ nats")


def save_figure(figure, path: Path) -> None:
    with atomic_write(path) as file, warnings.catch_warnings(action="ignore", category=UserWarning):  # a glyph no font has
        figure.savefig(file, format="png", dpi=200)


def draw_losses(pieces: list[tuple[str, float]], path: Path, columns: int = 80) -> None:
    """Writes the pieces on a background coloured by their loss as a PNG."""
    from matplotlib.colors import ListedColormap  # matplotlib takes a second: imported only where it is used
    from matplotlib.figure import Figure

    cells, row, column = [], 0, 0  # a cell for each character
    for piece, loss in pieces:
        if column and column + len(piece) > columns:
            row, column = row + 1, 0
        for character in piece:
            cells.append((row, column, character.replace("\n", "↵"), loss_level(loss)))
            row, column = (row + 1, 0) if character == "\n" or column == columns - 1 else (row, column + 1)
    legend = [(f" {level} ", level) for level in range(len(LOSS_COLOURS))] + [("+ nats per token", 0)]
    legend = [(character, level) for label, level in legend for character in label]
    cells += [(row + 2, column, *cell) for column, cell in enumerate(legend)]

    figure = Figure(figsize=((columns + 2) / 8, (row + 4) * 0.26))  # inches
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, columns + 1), ylim=(row + 3.5, -0.5))
    axes.axis("off")
    levels = np.zeros((row + 3, columns))  # level 0 is white
    for y, x, character, level in cells:
        levels[y, x] = level
        axes.text(x + 0.5, y + 0.5, character, ha="center", va="center_baseline", parse_math=False,
                  family="DejaVu Sans Mono", size=15)
    axes.pcolormesh(levels, cmap=ListedColormap(list(LOSS_COLOURS.values())), vmin=0, vmax=len(LOSS_COLOURS))
    save_figure(figure, path)


def run_inspection(model: Transformer, tokenizer, checkpoint: dict, options: argparse.Namespace) -> None:
    if not options.inspect:
        raise UserError("--inspect needs a text that is not empty")
    warn_of_unknown(tokenizer, options.inspect)
    pieces = text_losses(model, tokenizer, options.inspect)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    print_losses(pieces, coloured)
    total, n_tokens = sum(loss for _, loss in pieces), len(tokenizer.encode(options.inspect))
    print(f"\n{n_tokens:,} tokens of the {tokenizer.name} tokenizer, {checkpoint['dataset']['train']['dataset']} model: loss "
          f"{total / n_tokens:.3f} nats per token, perplexity {math.exp(min(700, total / n_tokens)):.2f}, "
          f"{total / math.log(2) / len(options.inspect.encode('utf-8', 'replace')):.3f} bits per byte")
    if options.png:
        draw_losses(pieces, Path(options.png))
        print(options.png)


# ---------------------------------------------------------------- training curves

PANELS = {"val_loss": "loss (nats per token, log scale)", "val_bits_per_byte": "bits per byte (log scale)",
          "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


def read_metrics(log_dir: Path) -> dict[str, np.ndarray]:
    """Returns each metric of a run as an array, one value an evaluation, NaN where it is missing. A line that is not
    complete yet is passed over. Raises UserError where there are no metrics.
    """
    path, rows = log_dir / "metrics.jsonl", []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; train first, or name a folder of logs: --plot LOGDIR") from None
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no metrics yet: they come with the first evaluation of a run")
    return {name: np.array([row.get(name) for row in rows], float) for name in ("step", "train_loss", *PANELS)}


def describe_run(log_dir: Path) -> str:
    """Returns a run's folder and, where run.json tells, its dataset, tokenizer and size."""
    try:
        run = json.loads((log_dir / "run.json").read_text())
        return (f"{log_dir}: {Path(run['dataset']['train']['dataset']).name}, {run['tokenizer']['type']} tokenizer, "
                f"{run['parameters']['total'] / 1e6:.1f}M parameters")
    except (OSError, ValueError, KeyError, TypeError):
        return str(log_dir)


def draw_run(panels: dict, log_dir: Path, colour: str) -> None:
    """Draws a run's metrics into {metric: axes}; a star marks the evaluation with the lowest validation loss."""
    run, label = read_metrics(log_dir), describe_run(log_dir)
    steps, losses = run["step"], run["val_loss"]
    style = {"color": colour, "marker": "." if len(steps) < 20 else ""}
    if not np.isnan(losses).all():
        best = np.nanargmin(losses)
        panels["val_loss"].plot(steps[best], losses[best], "*", color=colour, markersize=15, markeredgecolor="white", zorder=3)
        label += f"\nbest {losses[best]:.4f} at update {steps[best]:,.0f}"
    panels["val_loss"].plot(steps, run["train_loss"], "--", alpha=0.6, **style)
    for name, axes in panels.items():
        axes.plot(steps, run[name], label=label, **style)


def plot_training(log_dirs: list[Path]) -> Path:
    """Draws the training curves of one run or several over each other; returns the PNG, in the first one's folder."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplot_mosaic([["val_loss", "val_loss", "val_bits_per_byte", "lr"],
                                    ["val_loss", "val_loss", "grad_norm", "tokens_per_second"]])
    for i, log_dir in enumerate(log_dirs):
        draw_run(panels, log_dir, f"C{i}")
    for name, axes in panels.items():
        axes.set_title(PANELS[name], loc="left", fontsize=11)
        axes.set(xlabel="update", xlim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if "log scale" in PANELS[name] and axes.dataLim.y1 > 0:  # it is not where every value is missing
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    panels["tokens_per_second"].yaxis.set_major_formatter(EngFormatter(sep=""))
    panels["val_loss"].plot([], [], color="grey", label="validation")
    panels["val_loss"].plot([], [], "--", color="grey", label="training")
    panels["val_loss"].legend(loc="upper right", frameon=False, fontsize=9)
    path = log_dirs[0] / "training_curves.png"
    save_figure(figure, path)
    return path


# ---------------------------------------------------------------- command line

DESCRIPTION = """Evaluates a checkpoint, tells stories with it, draws how it learned.

  python eval.py                                                 all about checkpoints/best_model.pt
  python eval.py --checkpoint checkpoints/quick/best_model.pt    about another one
  python eval.py --data my_stories.txt                           on another text (stories separated by lines <|endoftext|>)
  python eval.py --generate "Once upon a time" "The little girl"
  python eval.py --interactive                                   type openings, watch the stories appear
  python eval.py --inspect "Once upon a time there was a cat."   what surprises the model
  python eval.py --plot logs/a logs/b                            compare two runs

Without --generate, --interactive, --inspect or --plot: loss, perplexity, bits per byte and accuracy on all validation
stories, understanding probes, and generated stories beside real ones. Results go to standard output, progress to standard
error."""


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(DESCRIPTION, settings=False)
    parser.add_argument("--checkpoint", metavar="FILE", help="default: checkpoints/best_model.pt")
    parser.add_argument("--data", metavar="NAME", help="evaluate on a .txt file or any dataset that train.py takes; default: the "
                        "checkpoint's validation stories")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--json", action="store_true", help="print the evaluation as one JSON object")
    modes.add_argument("--generate", nargs="+", metavar="OPENING", help='tell stories; "" is allowed')
    modes.add_argument("--interactive", action="store_true", help="tell stories as you type openings")
    modes.add_argument("--inspect", metavar="TEXT", help="print the text, each token coloured by its loss")
    modes.add_argument("--plot", nargs="*", metavar="LOGDIR", help="draw the training curves of one run or several into the "
                       "first folder; default: the logs of --checkpoint, or logs/")
    parser.add_argument("--png", metavar="FILE", help="with --inspect: draw it, too")
    for name, (_, default, _, description) in SAMPLING.items():
        shown = "random, 0 in an evaluation" if name == "seed" else str(default).lower()
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), metavar="N", default=default,
                            type=functools.partial(sampling_value, name), help=f"{description}; default: {shown}")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps; default: auto")
    options = parser.parse_args()
    story_mode = options.generate or options.interactive or options.inspect is not None or options.plot is not None
    if options.data and story_mode:
        raise UserError("--data is for an evaluation: leave --generate, --interactive, --inspect and --plot out, or --data")
    if options.png and options.inspect is None:
        raise UserError("--png draws what --inspect prints: add --inspect TEXT")
    return options


def main() -> None:
    options = parse_options()
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 must not end a story
    if options.plot is not None:
        saved = load_checkpoint(Path(options.checkpoint)) if options.checkpoint and not options.plot else None
        log_dirs = options.plot or [saved["config"]["training"]["log_dir"] if saved else "logs"]
        print(plot_training([Path(log_dir) for log_dir in log_dirs]))
        return
    options.checkpoint = options.checkpoint or "checkpoints/best_model.pt"
    with naming("--device", "training.device"):
        Config(training=TrainingConfig(device=options.device)).validate()
        model, tokenizer, checkpoint = load_model(options.checkpoint, options.device)
    if options.generate:
        prompts = [prompt for prompt in options.generate for _ in range(options.num_samples)]
        tell_stories(model, tokenizer, prompts, sampling_of(options), seeded_generator(model, options.seed))
    elif options.interactive:
        interact(model, tokenizer, options)
    elif options.inspect is not None:
        run_inspection(model, tokenizer, checkpoint, options)
    else:
        run_evaluation(model, tokenizer, checkpoint, options)


if __name__ == "__main__":
    run_main(main)
