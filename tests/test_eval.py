"""Evaluation: loss against independent computations, quality with known answers, probes, every mode."""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, exit_code, forked, go, make_model, make_qwen3, tiny_config, write_stories
from matplotlib.figure import Figure

import data
import eval as evaluation
from config import Config, ModelConfig, UserError, run_main
from data import BPETokenizer, CharTokenizer, Stream, encode_stories, prepare, save_checkpoint
from eval import (
    Continuation, copy_figures, load_model, loss_figures, ngrams, quality_figures, split_words)

CONTEXT = 48
NAMES, THINGS = ("Tom", "Mia", "Sue", "Ben", "Amy"), ("red ball", "big dog", "little boat", "café")
STORIES = [
    f'Once upon a time {name} had a {thing}. {name} said, "I like my {thing}!"' + i % 3 * " They played."
    for i, (name, thing) in enumerate(itertools.product(NAMES, THINGS))]


def make_checkpoint(folder: Path, tokenizer_type: str = "bpe", **settings) -> Path:
    """Prepares the stories and saves a model for them, as train.py does; everything lies in `folder`."""
    write_stories(folder / "stories.txt", STORIES)
    settings |= {"training__tokenizer_type": tokenizer_type, "training__bpe_vocab_size": 300}
    config = tiny_config(folder, **settings)
    tokenizer, training, validation = prepare(config)
    model = make_model(tokenizer.vocab_size, max_seq_len=CONTEXT)
    config.model = model.config
    path = folder / "checkpoints" / "best_model.pt"
    save_checkpoint(path, {"step": 7, "config": dataclasses.asdict(config), "tokenizer": tokenizer.spec(),
                           "dataset": {"train": training.info, "validation": validation.info},
                           "model": model.state_dict(), "val_loss": 1.0})
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs eval.py in an empty folder: command(arguments, stdin="") -> exit code, its output, its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            run_main(evaluation.main)
        return ended.value.code or 0, *capsys.readouterr()

    return run


def stream_of(stories: list[str], tokenizer) -> Stream:
    chunks = []
    info = encode_stories(stories, tokenizer, chunks.append)
    return Stream(np.frombuffer(b"".join(chunks), np.uint16), info)


def files(folder: Path) -> dict[str, str]:
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


# ---------------------------------------------------------------- loss

@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train(STORIES, 300)


@torch.no_grad()
def test_loss_and_what_derives_from_it_equal_a_brute_force_loop(tokenizer):
    model, texts = make_model(tokenizer.vocab_size, max_seq_len=16), STORIES[:6]  # longer than the context
    figures = loss_figures(model, tokenizer, stream_of(texts, tokenizer))
    losses, hits, at_start = [], [], []
    for text in texts:
        story = [*tokenizer.encode(text), tokenizer.eot_id]
        for t, target in enumerate(story):
            begin = t - t % 16
            logits = model(torch.tensor([[tokenizer.eot_id, *story][begin:t + 1]]))[0, -1]
            losses.append(F.cross_entropy(logits, torch.tensor(target)).item())
            hits.append(logits.argmax().item() == target)
            if t == begin:
                at_start.append(losses[-1])
    assert len(at_start) > len(texts)
    assert figures["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / n_bytes, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(np.mean(hits), abs=1e-9)
    first = {"loss": pytest.approx(np.mean(at_start), rel=1e-5), "tokens": len(at_start)}
    assert figures["loss_by_position"]["0"] == first
    rows = figures["loss_by_position"].values()
    assert sum(row["tokens"] for row in rows) == len(losses)
    assert sum(row["loss"] * row["tokens"] for row in rows) == pytest.approx(sum(losses), rel=1e-5)


def test_perplexity_is_that_of_transformers_qwen3_with_the_same_weights(tokenizer):
    ours = make_model(tokenizer.vocab_size, max_seq_len=128)
    theirs = make_qwen3(ours)
    total = n_tokens = 0
    for text in STORIES:
        tokens = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text), tokenizer.eot_id]])
        with torch.no_grad():
            total += theirs(tokens, labels=tokens).loss.item() * (tokens.numel() - 1)
        n_tokens += tokens.numel() - 1
    perplexity = loss_figures(ours, tokenizer, stream_of(STORIES, tokenizer))["perplexity"]
    assert perplexity == pytest.approx(math.exp(total / n_tokens), rel=1e-4)


def test_uniform_logits_have_the_vocabulary_as_perplexity(tokenizer):
    model, stream = make_model(tokenizer.vocab_size), stream_of(STORIES, tokenizer)
    torch.nn.init.zeros_(model.embed_tokens.weight)
    figures = loss_figures(model, tokenizer, stream)
    assert figures["perplexity"] == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    bits = len(stream.tokens) * math.log2(tokenizer.vocab_size)
    assert figures["bits_per_byte"] == pytest.approx(bits / stream.info["bytes"])
    assert figures["loss_stderr"] == pytest.approx(0, abs=1e-6)


def test_figures_do_not_depend_on_the_batch_size(tokenizer, monkeypatch):
    model, stream, results = make_model(tokenizer.vocab_size), stream_of(STORIES, tokenizer), []
    for batch_size in (1, 3, 64):
        monkeypatch.setattr(evaluation, "BATCH_SIZE", batch_size)
        results.append(loss_figures(model, tokenizer, stream))
    for other in results[1:]:
        assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)
        assert other["loss_stderr"] == pytest.approx(results[0]["loss_stderr"], rel=1e-4)
        assert other["accuracy"] == results[0]["accuracy"]


def test_standard_error_is_that_of_the_mean_where_stories_have_one_length():
    tokenizer = CharTokenizer.train(["abcdefgh "])
    stories = ["abcd", "hgfe", "aaaa", "bd h", "ceeg"]
    model = make_model(tokenizer.vocab_size)
    means = [loss_figures(model, tokenizer, stream_of([story], tokenizer))["loss"] for story in stories]
    figures = loss_figures(model, tokenizer, stream_of(stories, tokenizer))
    assert figures["loss_stderr"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(stories)), rel=1e-4)
    assert loss_figures(model, tokenizer, stream_of(stories[:1], tokenizer))["loss_stderr"] is None


def test_losses_fall_into_the_right_ranges():
    figures = evaluation.loss_by_position(np.arange(20.0), np.arange(20))
    assert figures == {"0": {"loss": 0, "tokens": 1}, "1-3": {"loss": 2, "tokens": 3},
                       "4-15": {"loss": 9.5, "tokens": 12}, "16-63": {"loss": 17.5, "tokens": 4}}
    assert list(evaluation.loss_by_position(np.ones(3), np.array([255, 9999, 256]))) == ["64-255", "256+"]


# ---------------------------------------------------------------- quality

def story(text: str, ended: bool = True) -> Continuation:
    return Continuation(split_words(text), ended)


def test_words_and_ngrams():
    words = ["don't", "stop", "tom's", "dog", "café", "12"]
    assert split_words("Don't STOP, Tom's dog! Café 12") == words
    assert split_words("我有3只猫。") == ["我", "有", "3", "只", "猫"]
    assert "".join(split_words("ฉันรักแมว")) == "ฉันรักแมว" and len(split_words("ฉันรักแมว")) > 4
    assert split_words("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"] and split_words("...!? —") == []
    assert ngrams(list("abcd"), 3) == [("a", "b", "c"), ("b", "c", "d")] and ngrams(["a"], 2) == []


def test_quality_figures_of_texts_with_known_answers():
    figures = quality_figures([story("a b c d a b c d"), story("a b x", ended=False), story("", ended=False)])
    assert figures == {
        "ended": pytest.approx(1 / 3), "words": pytest.approx(11 / 3),
        "repeated_4grams": pytest.approx(1 / 5),  # the second abcd; the short stories have none
        # the first two share ab, of 7 and 2: 2 * 1 / 9; the empty one shares nothing
        "self_similarity": pytest.approx((2 / 9 + 2 / 9 + 0) / 3)}
    identical = quality_figures([story("the cat sat on the mat")] * 3)
    assert identical["self_similarity"] == 1
    assert quality_figures([story("a b")])["self_similarity"] is None  # there is no other story
    assert quality_figures([story("")])["repeated_4grams"] is None


def test_copies_of_training_stories_are_found():
    training = ["The cat sat on the mat. Then it slept.", "A dog ran to the park and played."]
    copied, inside, original, short = copy_figures([
        [story("the cat sat on the mat then it slept")],
        [story("One cat sat on the moon"), story("to the park and glorped")],
        [story("the slept cat ran mat")], [story("a dog")]], training)
    assert copied == {"copied_4grams": 1, "unseen_words": 0}
    # "cat sat on the" and "to the park and", of 3 + 2; unseen: one, moon, glorped of 11
    assert inside == {"copied_4grams": 0.4, "unseen_words": pytest.approx(3 / 11)}
    assert original == {"copied_4grams": 0, "unseen_words": 0}
    assert short == {"copied_4grams": None, "unseen_words": 0}
    # A copy does not run on into the next story.
    across, = copy_figures([[story("it slept a dog ran")]], training)
    assert across["copied_4grams"] == 0


@pytest.fixture
def quality_of(checkpoint, monkeypatch):
    """quality_of(stories) -> the figures, prompts and rows of generation, the stories of both columns."""
    model, tokenizer, _ = load_model(checkpoint)
    seen, told = [], []

    def figures(stories, figures=quality_figures):
        seen.append(stories)
        return figures(stories)

    def generate(prompts, *args, generate=model.generate, **options):
        told.append((prompts, generate(prompts, *args, **options)))
        return told[-1][1]

    def measure(stories: list[str], training: Stream | None = None, limit: int = 400, seed: int = 0) -> tuple:
        sampling = {"temperature": 1.0, "top_k": None, "top_p": None, "max_new_tokens": limit}
        stream = stream_of(stories, tokenizer)
        quality = evaluation.generation_quality(model, tokenizer, stream, training, sampling, seed)
        return quality, *told[-1], *seen[-2:]

    monkeypatch.setattr(evaluation, "quality_figures", figures)
    monkeypatch.setattr(model, "generate", generate)
    return measure


def test_both_columns_of_the_quality_table_describe_the_same_openings(checkpoint, quality_of):
    _, tokenizer, _ = load_model(checkpoint)
    training = stream_of(STORIES, tokenizer)
    quality, prompts, rows, generated, real = quality_of(STORIES, training, limit=12)
    assert quality["stories"] == len(STORIES) == len(prompts) == len(generated) == len(real)
    for text, prompt, row, other in zip(STORIES, prompts, rows, real, strict=True):  # each once, from its own
        tokens = tokenizer.encode(text)
        assert prompt == [tokenizer.eot_id, *tokens[:16]] and len(tokens) >= 32
        assert 1 <= len(row) - len(prompt) <= 12
        begun = split_words(tokenizer.decode(tokens[:16]))  # the last may be the beginning of a word
        assert begun + other.words == begun + split_words(tokenizer.decode(tokens[:28]))[len(begun):-1]
        assert not other.ended
    human = quality["human"]  # the stories are those of training, but cut after 12 tokens
    assert human["copied_4grams"] == 1 and human["unseen_words"] == 0 and human["ended"] == 0
    assert quality["model"]["unseen_words"] > 0.5
    assert quality == quality_of(STORIES, training, limit=12)[0]
    assert quality["model"] != quality_of(STORIES, training, limit=12, seed=1)[0]["model"]

    quality, _, rows, _, _ = quality_of(STORIES)  # a story must fit into the context with its opening
    assert quality["max_new_tokens"] == CONTEXT - 16 and quality["human"]["ended"] == 1
    assert max(map(len, rows)) <= CONTEXT + 1  # the last token is not read any more
    assert "copied_4grams" not in quality["human"] and "copied_4grams" not in quality["model"]
    assert quality_of([f"{story} {i}" for i in range(4) for story in STORIES])[0]["stories"] == 64


@pytest.mark.parametrize("extreme", [
    "See https://a.example/" + "x%20" * 225, "从前有一个小女孩。" * 15, "กาลครั้งหนึ่งนานมาแล้ว" * 9,
    "123456 " * 60, "!" * 200, "x", "\u200b", "Tom"])
def test_an_extreme_story_changes_nothing_for_the_others(checkpoint, quality_of, extreme):
    _, tokenizer, _ = load_model(checkpoint)
    alone, prompts, _, _, real = quality_of(STORIES, limit=30)
    quality, more_prompts, rows, _, more_real = quality_of([*STORIES, extreme], limit=30)
    assert quality["max_new_tokens"] == alone["max_new_tokens"] == 30
    assert more_prompts[:-1] == prompts and more_real[:-1] == real
    tokens = tokenizer.encode(extreme)
    assert more_prompts[-1] == [tokenizer.eot_id, *tokens[:min(16, (len(tokens) + 1) // 2)]]
    assert all(len(row) <= CONTEXT + 1 for row in rows)
    assert quality["model"]["words"] > 3 and quality["human"]["words"] > 3


def test_stories_without_spaces_have_figures(quality_of):
    stories = ["从前有一个小女孩，她有一只猫。", "小男孩去公园玩，他有一只狗。", "女孩看见了红色的球。"]
    quality, *_ = quality_of(stories)
    human = quality["human"]
    assert human["words"] > 5 and human["ended"] == 1 and human["self_similarity"] > 0
    quality, *_ = quality_of(stories[:1])
    assert quality["stories"] == 1 and quality["human"]["self_similarity"] is None
    assert "        -" in evaluation.quality_table(quality)


# ---------------------------------------------------------------- probes

class Unigram(torch.nn.Module):
    """A model in which a target costs what its table says, whatever comes before it."""

    def __init__(self, costs: torch.Tensor):
        super().__init__()
        self.config, self.costs = ModelConfig(max_seq_len=64), costs
        self.embed_tokens = torch.nn.Embedding(1, 1)

    def token_losses(self, tokens, targets):
        return self.costs[targets], torch.zeros_like(targets, dtype=torch.bool)


def test_probes_compare_the_likelihood_per_byte_of_the_continuation_only():
    tokenizer = CharTokenizer.train(["abcdé "])
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0, "é": 5.0, " ": 0.0}
    model = Unigram(torch.tensor([costs.get(c, 50.0) for c in tokenizer.characters] + [50.0, 50.0]))

    def item(right, *wrong, prompt="ddd"):
        return {"prompt": prompt, "right": right, "wrong": list(wrong)}

    groups = {"one": [item("a", "b"), item("bb", "a"), item("aaaa", "b"), item("a", "a")],
              "two": [item("é", "c", "d"), item("c", "é", "b", prompt="")]}
    figures = evaluation.probe_figures(model, tokenizer, groups)
    # passed: a < b; aaaa costs more than b in sum and less per byte; é: 2.5 a byte. A tie is not a pass.
    assert figures == {"one": {"accuracy": 0.5, "chance": 0.5, "items": 4, "failed": ["dddbb", "ddda"]},
                       "two": {"accuracy": 0.5, "chance": pytest.approx(1 / 3), "items": 2, "failed": ["c"]}}


def test_a_continuation_is_scored_after_its_prompt(tokenizer):
    model, scores = make_model(tokenizer.vocab_size), {}
    for ending in (" red.", " blue."):
        prompt, tokens = [tokenizer.eot_id, *tokenizer.encode("The ball was")], tokenizer.encode(ending)
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + tokens])).log_softmax(-1)[0]
        log_p = log_p[len(prompt) - 1:]
        scores[ending] = sum(log_p[i, token].item() for i, token in enumerate(tokens)) / len(ending)
    worse, better = sorted(scores, key=scores.get)
    for right, wrong, accuracy in ((better, worse, 1), (worse, better, 0)):
        groups = {"group": [{"prompt": "The ball was", "right": right, "wrong": [wrong]}]}
        assert evaluation.probe_figures(model, tokenizer, groups)["group"]["accuracy"] == accuracy


def test_the_probes_are_fair():
    groups = json.loads(evaluation.PROBES.read_text())
    assert groups.pop("about") and sum(map(len, groups.values())) >= 60
    for item in (item for items in groups.values() for item in items):
        endings = [item["right"], *item["wrong"]]
        assert len(set(endings)) == len(endings) >= 2 and not item["prompt"].endswith(" "), item
        assert all(ending.startswith(" ") for ending in endings), item  # so that no token spans both


# ---------------------------------------------------------------- the evaluation as a command

def test_json_is_one_object_with_every_figure(checkpoint, command):
    code, out, err = command("--checkpoint", checkpoint, "--json", "--max_new_tokens", 8)
    assert code == 0, err
    results = json.loads(out)  # the one object and nothing else
    model, tokenizer, saved = load_model(checkpoint)
    _, _, validation = prepare(Config.of(saved["config"]))
    expected = loss_figures(model, tokenizer, validation)
    assert {key: results[key] for key in expected} == expected
    assert results["checkpoint"] == str(checkpoint) and results["step"] == 7 and results["tokenizer"] == "bpe"
    assert results["dataset"] == saved["config"]["data"]["dataset"] and results["split"] == "validation"
    for key in ("stories", "tokens", "bytes", "sha256"):
        assert results[key] == validation.info[key]
    quality = results["quality"]
    assert quality["model"].keys() == quality["human"].keys() == evaluation.QUALITY.keys()
    assert quality["stories"] == validation.info["stories"]
    assert set(results["probes"]) == {"facts", "reasoning", "context"}

    code, text, _ = command("--checkpoint", checkpoint, "--max_new_tokens", 8)
    shown = [f"{expected['loss']:.4f}", f"{expected['perplexity']:.3f}", f"{expected['bits_per_byte']:.4f}"]
    labels = [label for label, _ in evaluation.QUALITY.values()]
    assert all(figure in text for figure in (*shown, *labels, "bpe tokenizer", results["dataset"], "facts"))


def test_changed_stories_are_an_error_and_not_evaluated_silently(tmp_path, command):
    checkpoint = make_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "data")  # the streams, which would serve
    write_stories(tmp_path / "stories.txt", STORIES[::-1])
    code, out, err = command("--checkpoint", checkpoint)
    assert (code, out) == (2, "") and err.startswith("error: ")
    assert "stories of" in err and "checkpoint" in err


def test_another_text_is_evaluated_as_a_whole(checkpoint, command, tmp_path):
    texts = ["Tom had a boat and it was big and red.", "Mia sat down.", "The end."]
    write_stories(tmp_path / "other.txt", texts)
    other = ("--data", "other.txt", "--json", "--max_new_tokens", 20)
    code, out, err = command("--checkpoint", checkpoint, *other)
    results, (model, tokenizer, _) = json.loads(out), load_model(checkpoint)
    expected = loss_figures(model, tokenizer, stream_of(texts, tokenizer))
    assert [results[key] for key in ("dataset", "split", "stories", "bytes")] == ["other.txt", "all", 3, 59]
    assert code == 0 and results["loss"] == expected["loss"]
    assert results["quality"]["human"]["copied_4grams"] == 0
    assert results["quality"]["model"]["unseen_words"] > 0
    assert "WARNING" not in err


def test_another_text_needs_no_training_stories_and_unknown_characters_are_counted(tmp_path, command):
    checkpoint = make_checkpoint(tmp_path, "char")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "stories.txt").unlink()
    (tmp_path / "other.txt").write_text("Zoë§ sat. Zoë ran.")
    other = ("--data", "other.txt", "--json", "--max_new_tokens", 4)
    code, out, err = command("--checkpoint", checkpoint, *other)
    results = json.loads(out)
    assert code == 0 and "5 of 19 characters" in err  # Z ë § Z ë; 19 with end-of-text
    assert "copied_4grams" not in results["quality"]["human"] and "copies" in err
    code, out, err = command("--checkpoint", checkpoint)
    assert (code, out) == (2, "") and "stories.txt" in err


# ---------------------------------------------------------------- generation

def test_stories_begin_with_their_openings_and_are_reproducible(checkpoint, command):
    openings = ("Tom", "", "Once upon a time")
    arguments = ("--checkpoint", checkpoint, "--generate", *openings, "--num_samples", 2,
                 "--max_new_tokens", 9)
    code, out, _ = command(*arguments, "--seed", 5)
    stories = out.split("--- ")[1:]
    assert code == 0 and len(stories) == 6
    for i, (text, opening) in enumerate(zip(stories, np.repeat(openings, 2)), 1):
        assert text.startswith(f"{i} of 6 ---\n{opening}")
    assert command(*arguments, "--seed", 5)[1] == out != command(*arguments, "--seed", 6)[1]
    _, out, err = command(*arguments)
    seed = err.split()[-1]  # a fresh one, printed
    assert command(*arguments, "--seed", seed)[1] == out


def test_a_batch_of_greedy_stories_is_the_single_stories(checkpoint, command, monkeypatch):
    greedy = ("--checkpoint", checkpoint, "--temperature", 0, "--max_new_tokens", 2 * CONTEXT, "--seed", 0,
              "--generate")
    openings = ["Tom", "Once upon a time", "", "Mia had a red ball", "Sue"]
    single = [command(*greedy, opening)[1] for opening in openings]
    model, tokenizer, _ = load_model(checkpoint)
    prompt = [tokenizer.eot_id, *tokenizer.encode("Tom")]
    tokens, = model.generate([prompt], 2 * CONTEXT, 0, eot_id=tokenizer.eot_id)
    assert len(tokens) > CONTEXT
    assert single[0] == tokenizer.decode([t for t in tokens if t != tokenizer.eot_id]) + "\n"
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 2)
    numbered = "".join(f"--- {i} of 5 ---\n{story}" for i, story in enumerate(single, 1))
    assert command(*greedy, *openings)[1] == numbered


def teller(capsys, tokens: list[int], shown: list[str]) -> types.SimpleNamespace:
    """A model that tells `tokens`, noting what stands on the screen before each of them and at the end."""
    def generate(prompts, max_new_tokens, eot_id, stream, **_):
        shown.append(capsys.readouterr().out)
        for token in tokens:
            stream(0, token)
            shown.append(capsys.readouterr().out)

    return types.SimpleNamespace(generate=generate)


def test_a_single_story_is_shown_as_it_grows(capsys):
    tokenizer, shown = CharTokenizer.train(["abcxyz"]), []
    tokens = [*tokenizer.encode("bcx"), tokenizer.eot_id]
    sampling = {"max_new_tokens": 4}
    evaluation.tell_stories(teller(capsys, tokens, shown), tokenizer, ["a"], sampling, None)
    assert shown == ["a", "b", "c", "x", ""] and capsys.readouterr().out == "\n"


def test_several_stories_are_shown_when_they_are_told(capsys, monkeypatch):
    tokenizer, calls = CharTokenizer.train(["abcxyz"]), []

    def generate(prompts, max_new_tokens, **_):
        calls.append((capsys.readouterr().out, [tokenizer.decode(prompt[1:]) for prompt in prompts]))
        return [[*prompt, *tokenizer.encode("z"), tokenizer.eot_id] for prompt in prompts]

    monkeypatch.setattr(evaluation, "BATCH_SIZE", 2)
    model = types.SimpleNamespace(generate=generate)
    evaluation.tell_stories(model, tokenizer, ["a", "x", "y"], {"max_new_tokens": 3}, None)
    assert calls == [("", ["a", "x"]), ("--- 1 of 3 ---\naz\n--- 2 of 3 ---\nxz\n", ["y"])]
    assert capsys.readouterr().out == "--- 3 of 3 ---\nyz\n"


@pytest.mark.parametrize("text", ["é", "naïve 😀 日本", "plain"])
def test_a_character_of_several_tokens_appears_whole(text):
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)])  # every byte a token
    decode = tokenizer.decoder()
    pieces = [decode(token) for token in tokenizer.encode(text)]
    assert [piece for piece in pieces if piece] == list(text) and decode(None) == ""


def test_bytes_that_are_no_character_are_not_lost():
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)])
    decode, tokens = tokenizer.decoder(), [0xC3, 0x41, 0xFF, 0xC3, 0xA9, 0xF0, 0x9F]
    assert "".join(map(decode, [*tokens, None])) == tokenizer.decode(tokens) == "\ufffdA\ufffdé\ufffd"


def test_a_decoder_is_that_of_all_tokens_at_once():
    rng, tokenizer = random.Random(0), BPETokenizer([bytes([b]) for b in range(256)])
    pieces = "Aé€😀".encode() + b"\xff"
    for _ in range(300):
        tokens = rng.choices(pieces, k=9)
        expected = bytes(tokens).decode(errors="replace")
        assert "".join(map(tokenizer.decoder(), [*tokens, None])) == tokenizer.decode(tokens) == expected
    char = CharTokenizer.train(["ab"])
    assert "".join(map(char.decoder(), [0, char.unknown_id, 1, None])) == "a\ufffdb"


@pytest.mark.parametrize(("text", "pieces"), [
    ("naïve 😀 日本".encode(), [*"naïve 😀 日本"]),
    (b"\xc3A\xff\xc3\xa9\xf0\x9f", ["\ufffdA", "\ufffd", "é"])])  # bytes that are no character are not lost
def test_a_story_is_shown_in_whole_characters(text, pieces, capsys):
    tokenizer, shown = BPETokenizer([bytes([b]) for b in range(256)]), []  # every byte a token
    sampling = {"max_new_tokens": len(text)}
    evaluation.tell_stories(teller(capsys, list(text), shown), tokenizer, [""], sampling, None)
    assert [piece for piece in shown if piece] == pieces
    assert "".join(shown) + capsys.readouterr().out == tokenizer.decode(text) + "\n"


def test_unknown_characters_of_an_opening_are_named(tmp_path, command):
    checkpoint = make_checkpoint(tmp_path, "char")
    short = ("--checkpoint", checkpoint, "--max_new_tokens", 3, "--seed", 0, "--generate")
    code, out, err = command(*short, "Zoë")
    assert code == 0 and out.startswith("Zoë") and "'Z', 'ë'" in err and err.startswith("WARNING")
    assert "WARNING" not in command(*short, "Tom")[2]


def test_interactive(checkpoint, command, monkeypatch):
    short = ("--checkpoint", checkpoint, "--temperature", 0, "--max_new_tokens", 4)
    code, out, _ = command(*short, "--num_samples", 1, "--interactive", stdin="Tom\n\nMia")
    told = [command(*short, "--generate", opening)[1] for opening in ("Tom", "", "Mia")]
    assert code == 0 and out.endswith("\n> ".join(["", *told, "\n"])) and "Ctrl-D" in out
    assert command(*short, "--num_samples", 2, "--interactive", stdin="Tom")[1].count("Tom") == 2

    told = []

    def interrupted(model, tokenizer, prompts, *_):
        told.append(prompts)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "tell_stories", interrupted)
    code, _, _ = command("--checkpoint", checkpoint, "--interactive", stdin="one\ntwo\n")
    assert code == 0 and told == [["one"], ["two"]]  # Ctrl-C ends a story, not the program


# ---------------------------------------------------------------- pictures

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)
    return folder


LINES = "".join(json.dumps({
    "step": step, "train_loss": 5 - step / 100, "val_loss": loss, "lr": 1e-3, "val_bits_per_byte": 1.5,
    "grad_norm": norm, "tokens_per_second": 1e4, "timestamp": "2026-01-01"}) + "\n"
    for step, loss, norm in ((100, 4.0, 1.0), (200, 3.0, None), (300, 3.5, 0.5)))


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures of plots, which are not painted: that takes half a second each."""
    figures = []

    def save(figure, file, **options):
        figures.append(figure)
        file.write(PNG)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def test_plot_reads_what_is_there(tmp_path):
    metrics = evaluation.read_metrics(write_metrics(tmp_path / "a", LINES + '{"step": 400, "val_lo'))
    assert metrics["step"].tolist() == [100, 200, 300] and metrics["val_loss"].tolist() == [4.0, 3.0, 3.5]
    np.testing.assert_array_equal(metrics["grad_norm"], [1.0, math.nan, 0.5])


def test_plot_draws_a_run_two_runs_and_the_shortest_run(checkpoint, command, tmp_path, drawn):
    for name, text in (("one", LINES + '{"step": 4'), ("two", LINES), ("short", LINES.splitlines()[0]),
                       ("nothing", '{"step": 1, "val_loss": null}\n'), ("new", '{"step": 1, "other": 3}\n')):
        write_metrics(tmp_path / name, text)
    for folders in (["one"], ["two", "one"], ["short"], ["nothing"], ["new"]):
        code, out, err = command("--plot", *folders)
        assert (code, out, err) == (0, f"{folders[0]}/training_curves.png\n", "")
        assert (tmp_path / folders[0] / "training_curves.png").read_bytes().startswith(PNG)
        losses, *others = drawn[-1].axes
        assert [axes.get_title() for axes in (losses, *others)] == list(evaluation.PANELS.values())
        legend = [text.get_text() for text in losses.get_legend().get_texts()]
        assert [label.split("\n")[1] for label in legend] == folders
        if folders[0] in ("one", "two"):
            star, dashed, solid = losses.lines[:3]
            assert star.get_xydata().tolist() == [[200, 3.0]] and "best 3.0000 at step 200" in legend[0]
            assert dashed.get_ydata().tolist() == [4, 3, 2] and solid.get_ydata().tolist() == [4, 3, 3.5]
            assert losses.get_yscale() == "log" and all(axes.lines for axes in others)
    assert not list(tmp_path.rglob("*.tmp"))
    logs = write_metrics(checkpoint.parent.parent / "logs", LINES)
    assert command("--checkpoint", checkpoint, "--plot")[1] == f"{logs}/training_curves.png\n"
    write_metrics(tmp_path / "logs", LINES)
    assert command("--plot")[1] == "logs/training_curves.png\n"


@pytest.mark.parametrize("lines", [LINES, '{"step": 1, "val_loss": null}\n'])
def test_the_picture_is_a_png_even_if_there_is_nothing_to_draw(tmp_path, lines):
    png = evaluation.plot_training([write_metrics(tmp_path, lines)]).read_bytes()
    assert png.startswith(PNG) and struct.unpack(">II", png[16:24]) == (2400, 1080)


@pytest.mark.parametrize("name", ["p$\\foo$", "_a", b"l\xff"])
def test_any_name_of_a_folder_is_in_the_legend(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    figure = Figure()
    axes = figure.subplots()
    evaluation.draw_run({"val_loss": axes}, write_metrics(Path(os.fsdecode(name)), LINES), "C0")
    label, = (text.get_text() for text in axes.legend().get_texts())
    assert "best 3.0000 at step 200" in label
    figure.savefig(io.BytesIO())


def test_no_dataset_is_no_dataset_to_evaluate_on(checkpoint, command):
    code, out, err = command("--checkpoint", checkpoint, "--data", "")
    assert (code, out) == (2, "") and "--data: data.dataset = '' must be text that is not empty" in err


def test_interactive_ends_where_there_is_no_standard_input(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--checkpoint", str(checkpoint), "--interactive"])

    def without_input():
        os.close(0)
        sys.stdin = None  # as Python has it then
        run_main(evaluation.main)

    assert exit_code(forked(without_input)) == 0


def test_sampling_is_the_checkpoints_where_no_option_says_otherwise(tmp_path, command):
    path = make_checkpoint(tmp_path, sampling__temperature=0.0, sampling__max_new_tokens=20)
    told = [command("--checkpoint", path, "--generate", "Tom", *options)[1] for options in (
        [], ["--seed", "1"], ["--seed", "1", "--temperature", "2"], ["--max-new-tokens", "3"])]
    assert told[0] == told[1] != told[2]
    assert told[0].startswith(told[3].strip()) and len(told[3]) < len(told[0])


def test_the_logs_of_a_checkpoint_are_found_from_any_folder(tmp_path, monkeypatch, command, drawn):
    (tmp_path / "project").mkdir()
    (tmp_path / "logs").mkdir()  # of another run
    monkeypatch.chdir(tmp_path / "project")
    config = tiny_config(tmp_path / "project")
    config.training.checkpoint_dir, config.training.log_dir = "checkpoints/mine", "logs/mine"
    go(config)
    monkeypatch.chdir(tmp_path)
    code, out, err = command("--checkpoint", "project/checkpoints/mine", "--plot")
    assert (code, out) == (0, f"{tmp_path}/project/logs/mine/training_curves.png\n"), err


@pytest.mark.parametrize("text", [None, "", '{"step": 1', "[1]\nnull\n\xff\n"])
def test_plot_without_metrics_is_one_sentence(command, tmp_path, text):
    if text is not None:
        write_metrics(tmp_path / "logs", text)
    before = files(tmp_path)
    code, out, err = command("--plot")
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert "logs/metrics.jsonl" in err
    assert files(tmp_path) == before


def test_inspect_shows_the_loss_of_every_token(checkpoint, command, tmp_path, capsys):
    text = "Once upon a time\nTom's café 日\ufffd"
    code, out, _ = command("--checkpoint", checkpoint, "--inspect", text)
    assert code == 0 and "\x1b" not in out and not list(tmp_path.iterdir())
    is_row = re.compile(r" *\d+\.\d\d  ").match
    rows = [line.split(maxsplit=1) for line in out.splitlines() if is_row(line)]
    model, tokenizer, _ = load_model(checkpoint)
    tokens = tokenizer.encode(text)
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.eot_id, *tokens[:-1]]]))[0]
    losses = F.cross_entropy(logits, torch.tensor(tokens), reduction="none")
    assert sum(float(loss) for loss, _ in rows) == pytest.approx(losses.sum().item(), abs=0.005 * len(rows))
    assert float(rows[0][0]) == pytest.approx(losses[0].item(), abs=0.006)
    assert "".join(eval(piece) for _, piece in rows) == text  # the builtin: reprs of strings
    assert f"loss {losses.mean():.3f}" in out and f"{len(tokens)} tokens" in out and "bpe" in out



def test_inspect_colours_each_token_in_a_terminal(checkpoint, command, monkeypatch, capsys):
    calm, odd = "\x1b[48;5;231;38;5;16m", "\x1b[48;5;196;38;5;16m"
    assert evaluation.paint("calm", 0.3) == f"{calm}calm\x1b[0m"
    assert evaluation.paint("odd\nword", 99.0) == f"{odd}odd↵\x1b[0m\n{odd}word\x1b[0m"
    model, tokenizer, _ = load_model(checkpoint)
    text = "Tom's café\n日"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    evaluation.inspect(model, tokenizer, text)
    out = capsys.readouterr().out
    painted, legend = out.split("\n\n")[:2]
    assert re.sub("\x1b\\[[0-9;]*m", "", painted) == text.replace("\n", "↵\n") and "+ nats" in legend
    monkeypatch.setenv("NO_COLOR", "1")
    evaluation.inspect(model, tokenizer, text)
    assert "\x1b" not in capsys.readouterr().out


# ---------------------------------------------------------------- mistakes

@pytest.mark.parametrize(("options", "names"), [
    (["--temperature", "-1"], ["argument --temperature: sampling.temperature = -1.0 must be"]),
    (["--temperature", "nan"], ["temperature", "nan"]),
    (["--temperature", "hot"], ["temperature", "hot"]), (["--temperature", "none"], ["temperature", "none"]),
    (["--temperature", "1e-30"], ["temperature"]),
    (["--top_k", "0"], ["argument --top_k/--top-k: sampling.top_k = 0 must be a whole number of at least 1"]),
    (["--top-k", "2.5"], ["top_k", "2.5"]), (["--top_p", "0"], ["top_p", "0"]),
    (["--top_p", "1.1"], ["top_p", "1.1"]), (["--max_new_tokens", "0"], ["max_new_tokens", "0"]),
    (["--num_samples", "0"], ["num_samples", "0"]),
    (["--seed", "-1"], ["seed", "-1"]), (["--device", "tpu"], ["--device", "tpu", "cuda"]),
    (["--device", "cuda:99"], ["--device", "cuda:99", "cpu"]), (["--generate"], ["--generate"]),
    (["--inspect", ""], ["--inspect"]),
    (["--nonsense"], ["--nonsense"]), (["--plot", "--json"], ["--plot", "--json"]),
    (["--json", "--generate", "x"], ["--json", "--generate"]), (["--inspect", "x", "--plot"], ["--inspect"]),
    (["--data", "nowhere.txt"], ["--data", "nowhere.txt", "does not exist"]),
    (["--data", "sample", "--generate", "y"], ["--data", "--generate"]),
    (["--data", "sample", "--inspect", "y"], ["--data", "--inspect"]),
    (["--data", "sample", "--plot"], ["--data", "--plot"]),
    (["--png", "x.png"], ["--png"])])
def test_a_mistake_is_one_sentence_and_changes_nothing(checkpoint, command, tmp_path, options, names):
    before = files(checkpoint.parent.parent)
    code, out, err = command("--checkpoint", checkpoint, *options)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(name in err for name in names)
    assert files(checkpoint.parent.parent) == before and not list(tmp_path.iterdir())


def test_a_missing_checkpoint_says_what_to_do(command, tmp_path):
    code, out, err = command()
    assert (code, out) == (2, "")
    assert all(word in err for word in ("checkpoints/best_model.pt", "train.py", "--checkpoint"))
    quick = tmp_path / "checkpoints/quick/best_model.pt"
    quick.parent.mkdir(parents=True)
    quick.touch()
    assert "checkpoints/quick/best_model.pt" in command()[2]


def test_load_model_is_ready_for_a_notebook(checkpoint):
    model, tokenizer, saved = load_model(str(checkpoint), device="cpu")
    assert not model.training and saved["step"] == 7
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    logits = model(tokens)
    assert logits.shape == (1, tokens.shape[1], tokenizer.vocab_size)
    torch.testing.assert_close(logits, make_model(tokenizer.vocab_size)(tokens))


def test_a_model_of_another_format_is_refused_in_one_sentence(checkpoint, tmp_path):
    _, _, saved = load_model(checkpoint)
    for version in (2, data.CHECKPOINT_FORMAT + 1):
        path = tmp_path / "old.pt"
        save_checkpoint(path, saved)
        content = path.read_bytes()[:-32]
        buffer = io.BytesIO()
        torch.save({**torch.load(io.BytesIO(content), weights_only=True), "format": version}, buffer)
        path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
        with pytest.raises(UserError, match=f"old.pt has format {version}, and this version of the project"):
            load_model(path)


@pytest.mark.parametrize("damage", ["layers", "width", "tokenizer", "spec", "setting", "nan"])
def test_weights_that_do_not_fit_are_one_sentence(checkpoint, tmp_path, damage):
    _, _, saved = load_model(checkpoint)
    if damage == "layers":
        saved["config"]["model"]["n_layers"] = 3
    elif damage == "width":
        saved["config"]["model"]["d_model"] = 64
    elif damage == "tokenizer":
        saved["tokenizer"] = CharTokenizer.train(STORIES).spec()
    elif damage == "spec":
        saved["tokenizer"] = {"type": "bpe"}
    elif damage == "setting":
        saved["config"]["model"]["n_experts"] = 2
    else:
        saved["model"]["norm.weight"][0] = math.nan
    save_checkpoint(tmp_path / "model.pt", saved)
    with pytest.raises(UserError, match="model.pt") as error:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


def test_code_in_a_checkpoint_does_not_run(tmp_path, command):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    parts = {"step": 1, "config": {}, "tokenizer": {}, "dataset": {}, "model": Malicious()}
    save_checkpoint(tmp_path / "saved.pt", parts)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious()))
    for name in ("saved.pt", "plain.pt"):
        code, out, err = command("--checkpoint", name)
        assert (code, out) == (2, "") and err.startswith("error: ") and name in err
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "ran").exists()  # it would have


def test_the_script_from_another_folder(checkpoint, tmp_path, command):
    def run(*arguments: str, **environment) -> subprocess.CompletedProcess:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, ROOT / "eval.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)

    code, helped, err = command("--help")
    assert code == 0 and err == ""
    for word in ("--generate", "--plot", "--top_p", "Once upon a time", "checkpoints/"):
        assert word in helped
    told = run("--checkpoint", str(checkpoint), "--generate", "Zo\u00eb 日\udcff", "--seed", "1",
               "--max_new_tokens", "5", PYTHONIOENCODING="ascii")
    assert told.returncode == 0 and told.stdout.startswith(b"Zo? ??") and told.stderr == b""
