"""Evaluates a checkpoint: its loss, its stories beside real ones, understanding probes, plots; and tells stories.

    from eval import load_model
    model, tokenizer, checkpoint = load_model("checkpoints/best_model.pt")
    logits = model(torch.tensor([tokenizer.encode("Once upon a time")]))  # (1, T, V)

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
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import ArgumentParser, Config, ModelConfig, UserError, run_main
from data import Stream, atomic_write, encode_stories, open_dataset, prepare, progress, tokenizer_from_spec
from model import Transformer
from train import choose_device, evaluate, load_checkpoint, story_windows

BATCH_SIZE = 32
PROBES = Path(__file__).parent / "data" / "probes.json"


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple:
    """Returns (model, tokenizer, checkpoint) of the checkpoint at `path`, the model on `device` and in evaluation mode.

    Raises UserError where the file is missing, damaged, not a checkpoint, or its weights do not fit its config.
    """
    path = Path(path)
    if not path.exists():
        others = "".join(f"; there is {other}" for other in sorted(Path("checkpoints").glob("*/best_model.pt")))
        raise UserError(f"there is no checkpoint {path}: train one first (python train.py), or name one with --checkpoint{others}")
    checkpoint = load_checkpoint(path, device)
    try:
        tokenizer = tokenizer_from_spec(checkpoint["tokenizer"])
        model = Transformer(ModelConfig(**checkpoint["config"]["model"]), tokenizer.vocab_size)
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, ArithmeticError, TypeError, ValueError, KeyError) as error:
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
    for stream, trained in zip(streams, checkpoint["dataset"].values()):
        if stream.info["sha256"] != trained["sha256"]:
            raise UserError(f"the {trained['split']} stories of {trained['dataset']!r} are no longer those of the checkpoint (sha256 "
                            f"{stream.info['sha256'][:12]}, was {trained['sha256'][:12]}); restore them, or use --data PATH")
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
    loss_by_position: by the number of the story's tokens in the context, after end-of-text; the context starts anew
        every max_seq_len tokens. loss_by_length: by the story's length in tokens.
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
        warn(f"{unknown:,} of {len(tokens):,} tokens are characters that the char tokenizer does not know: bits per byte is too "
             "low, since they are predicted as one unknown character")
    positions = np.concatenate([np.arange(e - s) for s, e in story_windows(tokens, eot_id, model.config.max_seq_len)])
    return {"loss": loss, "loss_stderr": stderr, "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": losses.sum() / math.log(2) / stream.info["bytes"], "accuracy": float(hits.mean()),
            "unknown_characters": unknown,
            "loss_by_position": loss_by(losses, positions, (0, 1, 4, 16, 64, 256)),
            "loss_by_length": loss_by(losses, np.repeat(lengths, lengths), (1, 64, 128, 256, 512, 1024))}


def loss_by(losses: np.ndarray, keys: np.ndarray, edges: tuple[int, ...]) -> dict[str, dict]:
    """Returns {"4-15": {"loss", "tokens"}, ...}, the mean loss of the tokens whose key (N,) is from an edge up to the next."""
    figures = {}
    for low, high in itertools.pairwise((*edges, math.inf)):
        inside = (keys >= low) & (keys < high)
        if inside.any():
            label = f"{low}+" if high == math.inf else f"{low}" if high == low + 1 else f"{low}-{high - 1}"
            figures[label] = {"loss": losses[inside].mean(), "tokens": int(inside.sum())}
    return figures


def print_loss(about: dict, figures: dict) -> None:
    error = "" if figures["loss_stderr"] is None else f" ± {figures['loss_stderr']:.4f} (standard error over stories)"
    print(f"{about['checkpoint']}, update {about['step']:,}\n"
          f"on {about['dataset']}, {about['split']}: {about['stories']:,} stories, {about['tokens']:,} tokens of the "
          f"{about['tokenizer']} tokenizer ({about['vocab_size']:,}), {about['bytes']:,} bytes\n\n"
          f"loss            {figures['loss']:.4f}{error}, nats per token\n"
          f"perplexity      {figures['perplexity']:.3f}\n"
          f"bits per byte   {figures['bits_per_byte']:.4f}\n"
          f"accuracy        {figures['accuracy']:.1%} of the tokens were the likeliest one\n")
    for title, key in (("tokens in context", "loss_by_position"), ("tokens in story", "loss_by_length")):
        print(f"{title:<20}{'loss':>8}{'tokens':>12}")
        for label, row in figures[key].items():
            print(f"{label:<20}{row['loss']:>8.3f}{row['tokens']:>12,}")
        print()


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


def opening(story: str) -> str:
    """Returns the first words of a story, eight, or half of a shorter story; punctuation and spaces as they are."""
    ends = [0, *(word.end() for word in re.finditer(r"\S+", story))]
    return story[:ends[min(OPENING_WORDS, len(ends) // 2)]]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _share(sum(known), len(known))


def rouge_2(a: Counter, b: Counter) -> float | None:
    """Returns the F1 of ROUGE-2 (Lin 2004): the 2-grams that two stories share over their mean number of 2-grams."""
    return _share(2 * (a & b).total(), a.total() + b.total())


def quality_figures(stories: list[Continuation]) -> dict[str, float | None]:
    """Returns figures of a set of stories, None where undefined. n-grams are of words, within a story.

    ended: share of stories that end by end-of-text. tokens, words: mean length of a story.
    distinct_n: distinct n-grams over all n-grams of the set (Li et al. 2016, arXiv:1510.03055); falls with the set's size.
    repeated_4grams: share of a story's 4-grams that it has used before, mean over stories (seq-rep-4, Welleck et al. 2019,
        arXiv:1908.04319).
    self_similarity: ROUGE-2 of a story with the story of the set most similar to it, mean over stories (as the TinyStories
        paper measures diversity, Eldan & Li 2023, arXiv:2305.07759).
    """
    figures = {"ended": _mean(story.ended for story in stories), "tokens": _mean(story.tokens for story in stories),
               "words": _mean(len(story.words) for story in stories)}
    for n in (1, 2, 3):
        grams = [gram for story in stories for gram in ngrams(story.words, n)]
        figures[f"distinct_{n}"] = _share(len(set(grams)), len(grams))
    four_grams = [ngrams(story.words, 4) for story in stories]
    figures["repeated_4grams"] = _mean(_share(len(grams) - len(set(grams)), len(grams)) for grams in four_grams)
    bigrams = [Counter(ngrams(story.words, 2)) for story in stories]
    figures["self_similarity"] = _mean(max((rouge_2(a, b) or 0.0 for b in bigrams if b is not a), default=None) for a in bigrams)
    return figures


def copy_figures(groups: list[list[Continuation]], training_stories: Iterable[str]) -> list[dict[str, float | None]]:
    """Returns, for each set of stories, how much of it stands in the training stories, which are read once, as a stream.

    copied_4grams: share of the set's 4-grams that some training story has. longest_copy: the most words in a row that a
    story of the set shares with a training story: memorisation (Eldan & Li 2023 look for it in the same way).
    unseen_words: share of the set's words that no training story has: misspellings, inventions.
    """
    def all_ngrams(group: list[Continuation], n: int) -> list[tuple[str, ...]]:
        return [gram for story in group for gram in ngrams(story.words, n)]

    words, four_grams = ({gram for group in groups for gram in all_ngrams(group, n)} for n in (1, 4))
    seen_words, seen_four_grams = set(), set()
    longest, longer = [0] * len(groups), [set(all_ngrams(group, 1)) for group in groups]  # longer: n-grams that would be a record
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
    eot_id, generator = tokenizer.eot_id, torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    texts = list(itertools.islice(story_texts(validation.tokens, tokenizer), MOST_STORIES))
    prompts = [[eot_id, *tokenizer.encode(opening(text))] for text in texts]
    limit = min(sampling["max_new_tokens"], max(1, model.config.max_seq_len - max(map(len, prompts))))
    rounds = math.ceil(FEWEST_STORIES / len(texts))
    groups = [[[*tokenizer.encode(text)[len(prompt) - 1:], eot_id][:limit] for text, prompt in zip(texts, prompts)]]
    with progress(None, rounds * len(texts) * limit, "generating, at most", "tokens") as bar:
        for _ in range(rounds):
            rows = model.generate(prompts, **{**sampling, "max_new_tokens": limit}, eot_id=eot_id, generator=generator,
                                  stream=lambda row, token: bar.update())
            groups.append([row[len(prompt):] for row, prompt in zip(rows, prompts)])

    def continuation(tokens: list[int]) -> Continuation:
        ended = tokens[-1] == eot_id
        return Continuation(split_words(tokenizer.decode(tokens[:-1] if ended else tokens)), len(tokens), ended)

    groups = [[continuation(tokens) for tokens in group] for group in groups]
    figures = [quality_figures(group) for group in groups]
    copies = [dict.fromkeys(("copied_4grams", "longest_copy", "unseen_words"))] * len(groups)
    if training:
        stories = progress(story_texts(training.tokens, tokenizer), training.info["stories"], "looking for copies", "stories")
        copies = copy_figures(groups, stories)
    human, *model_rounds = [quality | copied for quality, copied in zip(figures, copies)]
    return {"model": {name: _mean(figures[name] for figures in model_rounds) for name in human}, "human": human,
            "stories": rounds * len(texts), "openings": len(texts), **sampling, "max_new_tokens": limit, "seed": seed}


def print_quality(quality: dict) -> None:
    print(f"{quality['stories']} stories from {quality['openings']} validation openings (temperature {quality['temperature']:g}, "
          f"top_k {quality['top_k']}, top_p {quality['top_p']}, seed {quality['seed']}), the first {quality['max_new_tokens']} tokens\n"
          f"{'':<32}{'model':>10}{'human':>10}")
    for name, (label, style) in QUALITY.items():
        cells = ("-" if (value := quality[column][name]) is None else format(value, style) for column in ("model", "human"))
        print(f"{label:<32}{''.join(f'{cell:>10}' for cell in cells)}")
    print()


# ---------------------------------------------------------------- probes

def probe_figures(model: Transformer, tokenizer, groups: dict[str, list[dict]]) -> dict[str, dict]:
    """Returns {group: {"accuracy", "chance", "items", "failed"}} of items {"prompt", "right", "wrong": [...]}.

    A continuation's score is its log-likelihood after the prompt per UTF-8 byte; an item is passed when the right one
    scores highest. `failed` lists the others. (The groups follow Eldan & Li 2023, arXiv:2305.07759.)
    """
    texts = [(item["prompt"], ending) for items in groups.values() for item in items for ending in (item["right"], *item["wrong"])]
    rows = [(tokenizer.encode(prompt), tokenizer.encode(ending)) for prompt, ending in texts]
    tokens = np.array([token for prompt, ending in rows for token in (*prompt, *ending, tokenizer.eot_id)])
    losses, _ = evaluate(model, tokens, tokenizer.eot_id, BATCH_SIZE, contextlib.nullcontext,
                         lambda batches: progress(batches, len(batches), "probes", "batches"))
    end, scores = 0, []
    for (prompt, ending), (_, text) in zip(rows, texts):
        start, end = end + len(prompt), end + len(prompt) + len(ending)
        scores.append(-losses[start:end].sum(dtype=np.float64) / len(text.encode()))
        end += 1  # end-of-text
    figures, scores = {}, iter(scores)
    for group, items in groups.items():
        failed = []
        for item in items:
            right, *wrong = itertools.islice(scores, 1 + len(item["wrong"]))
            if right <= max(wrong):
                failed.append(item["prompt"] + item["right"])
        figures[group] = {"accuracy": 1 - len(failed) / len(items), "chance": _mean(1 / (1 + len(item["wrong"])) for item in items),
                          "items": len(items), "failed": failed}
    return figures


def print_probes(probes: dict[str, dict]) -> None:
    print(f"{'probes':<12}{'accuracy':>10}{'chance':>10}{'items':>8}")
    for group, row in probes.items():
        print(f"{group:<12}{row['accuracy']:>10.1%}{row['chance']:>10.1%}{row['items']:>8}")
    print(flush=True)


def evaluate_checkpoint(model: Transformer, tokenizer, checkpoint: dict, options: argparse.Namespace, sampling: dict) -> None:
    """Prints loss, probes and generation quality, what is quick first; as one JSON object with --json."""
    training = None
    try:
        training, stream = open_streams(checkpoint)
    except UserError as error:
        if not options.data:
            raise
        warn(f"{error}: copies of training stories cannot be counted")
    if options.data:
        stream = read_stream(options.data, tokenizer)
        if stream.info["split"] == "all" and options.data == checkpoint["dataset"]["train"]["dataset"]:
            warn(f"{options.data} holds the stories that the checkpoint was trained on")
    about = {"checkpoint": str(options.checkpoint), "step": checkpoint["step"], "dataset": stream.info["dataset"],
             "split": stream.info["split"], "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
             **{key: stream.info[key] for key in ("stories", "tokens", "bytes")}}
    results = dict(about)
    for compute, show in (
            (lambda: loss_figures(model, tokenizer, stream), lambda figures: print_loss(about, figures)),
            (lambda: {"probes": probe_figures(model, tokenizer, {name: items for name, items in json.loads(PROBES.read_text()).items()
                                                                 if name != "about"})}, lambda figures: print_probes(figures["probes"])),
            (lambda: {"quality": generation_quality(model, tokenizer, stream, training, sampling, options.seed or 0)},
             lambda figures: print_quality(figures["quality"]))):
        results |= (figures := compute())
        if not options.json:
            show(figures)
    if options.json:
        print(json.dumps(results, indent=1, allow_nan=False))
