"""Stories, tokenizers, token streams, batches."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from conftest import needs_gpt2, raises, tiny_config, write_stories

import data
from config import Config, UserError
from data import (
    Batches, BPETokenizer, CharTokenizer, encode_stories, hold_out, json_hash, open_dataset, prepare,
    tokenizer_from_spec)

UNICODE = [
    "", " ", "\n\n  x\t", "naïve café — “quoted” …", "日本語の文章と한국어", "🙂👩‍👩‍👧‍👦🇨🇭",
    "\x00\x01\x7f\u2028\ufeff", "a" * 3000, "<|endoftext|>", "x<|endoftext|>y <|endoftext|>",
    "1234567890 ½ Ⅷ", "don't we'll I'VE", "e\u0301\u0323",
    "\U0010ffff"]


@pytest.fixture(scope="module")
def stories(stories) -> list[str]:
    """A tenth of the bundled stories."""
    return stories[:400]


@pytest.fixture(autouse=True)
def small_sample(tmp_path_factory, stories, monkeypatch):
    """The dataset `sample` is as small."""
    path = tmp_path_factory.getbasetemp() / "sample_stories.txt"
    monkeypatch.setattr(data, "SAMPLE", path if path.exists() else write_stories(path, stories))


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.gpt2("unused")


def make_config(tmp_path: Path, **settings) -> Config:
    own = {"data__dataset": "sample", "training__tokenizer_type": "bpe", "training__bpe_vocab_size": 400}
    return tiny_config(tmp_path, **own | settings)


# ---------------------------------------------------------------- tokenizers

def textbook_bpe(stories: list[str], vocab_size: int) -> list[bytes]:
    """The algorithm as it is taught: count all pairs of all words anew for every merge."""
    words = Counter(word.encode() for story in stories for word in regex.findall(BPETokenizer.PATTERN, story))
    words = {tuple(bytes([b]) for b in word): count for word, count in words.items()}
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < vocab_size - 1:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = {}
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == best else 1
                new.append(b"".join(word[i:i + step]))
                i += step
            merged[tuple(new)] = merged.get(tuple(new), 0) + count
        words = merged
        if best[0] + best[1] not in vocabulary:
            vocabulary.append(best[0] + best[1])
    return vocabulary


def test_bpe_merges_are_those_of_the_textbook(stories):
    assert list(BPETokenizer.train(stories[:60], 450).ranks) == textbook_bpe(stories[:60], 450)


def test_bpe_ties_go_to_the_greatest_pair():
    ranks = BPETokenizer.train(["ab cd", "zz"], 300).ranks
    assert list(ranks)[256] == b"zz"  # every pair occurs once, and (z, z) is the greatest
    text = "aaaa aaa ababab ba bab\nabab"  # overlaps
    assert list(BPETokenizer.train([text], 300).ranks) == textbook_bpe([text], 300)


def test_bpe_on_random_text_with_many_ties():
    rng = random.Random(0)
    for _ in range(30):
        text = "".join(rng.choice("aab é ") for _ in range(rng.randrange(1, 80)))
        assert list(BPETokenizer.train([text], 290).ranks) == textbook_bpe([text], 290), repr(text)


def test_bpe_vocabulary_is_bytes_then_merges_then_end_of_text(stories):
    tokenizer = BPETokenizer.train(stories[:100], 500)
    assert list(tokenizer.ranks)[:256] == [bytes([b]) for b in range(256)]
    assert tokenizer.vocab_size == 500 and tokenizer.eot_id == 499
    assert list(tokenizer.ranks.values()) == list(range(499))


def round_trips(tokenizer, texts: list[str]) -> None:
    encoded = [tokenizer.encode(text) for text in texts]
    for text, tokens in zip(texts, encoded):
        assert tokenizer.decode(tokens) == text
        assert tokenizer.encode_array(text).tolist() == tokens
        assert all(0 <= t < tokenizer.vocab_size and t != tokenizer.eot_id for t in tokens)
    again = tokenizer_from_spec(json.loads(json.dumps(tokenizer.spec())))
    assert [again.encode(text) for text in texts] == encoded and again.vocab_size == tokenizer.vocab_size
    assert again.eot_id == tokenizer.eot_id and again.name == tokenizer.name
    assert json_hash(again.spec()) == json_hash(tokenizer.spec())


def test_bpe_is_lossless(stories):
    round_trips(BPETokenizer.train(stories, 2048), stories + UNICODE)


def test_half_a_surrogate_pair_in_a_prompt_is_replaced():
    tokenizer = BPETokenizer.train(["some text"], 260)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


def test_half_a_surrogate_pair_in_a_story_is_replaced(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a\ud83db", "whole \U0001f642")))
    assert list(open_dataset(str(path), True)["train"]()) == ["a\ufffdb", "whole \U0001f642"]


def test_stories_of_any_number_are_encoded_in_their_order():
    tokenizer, written = BPETokenizer.train(["some text"], 260), []
    stories = [f"Story {i}." for i in range(5000)]  # more than are in memory at once
    counts = encode_stories(iter(stories), tokenizer, written.append)
    tokens = np.frombuffer(b"".join(written), np.uint16)
    assert tokenizer.decode(tokens) == "".join(f"{story}<|endoftext|>" for story in stories)
    assert (counts["stories"], counts["tokens"]) == (5000, len(tokens))
    assert counts["bytes"] == len("".join(stories))


@needs_gpt2
def test_gpt2_is_lossless_and_is_tiktokens(stories, gpt2):
    import tiktoken

    round_trips(gpt2, stories + UNICODE)
    assert gpt2.vocab_size == 50257 and gpt2.eot_id == 50256
    theirs = tiktoken.get_encoding("gpt2")
    assert all(gpt2.encode(text) == theirs.encode_ordinary(text) for text in stories[:100] + UNICODE)


def test_any_character_can_be_a_token():
    text = "a]b[c^d-e\\f&&g~~h|i--j.*+?{}()$# \t\n\r\v\0\x85\u2028é日𝔘🙂"
    tokenizer = CharTokenizer.train([text])
    round_trips(tokenizer, [text, text[::-1], ""])
    assert tokenizer.vocab_size == len(set(text)) + 2 and tokenizer.unknown(text + "z") == ["z"]
    odd = CharTokenizer.train(["ab\ufffd"])  # what stands for unknown
    assert odd.characters == "ab" and odd.encode("a\ud83d\ufffdb") == [0, 2, 2, 1]
    assert CharTokenizer.train([]).encode("x") == [0]


def test_more_characters_than_a_stream_can_have_tokens_leave_the_rare_ones_unknown(monkeypatch):
    assert data.VOCAB_LIMIT == 2**16
    monkeypatch.setattr(data, "VOCAB_LIMIT", 2**10)
    text = "".join(map(chr, range(0x10000, 0x10000 + 2000)))
    tokenizer = CharTokenizer.train([text, text[-9:]])
    assert tokenizer.vocab_size == 2**10 and tokenizer.unknown(text[-9:]) == []
    assert len(tokenizer.unknown(text)) == 2000 - (2**10 - 2)


def test_char_is_lossless_on_its_stories_and_names_what_it_does_not_know(stories):
    tokenizer = CharTokenizer.train(stories)
    round_trips(tokenizer, stories)
    assert tokenizer.vocab_size == len(set("".join(stories))) + 2
    assert tokenizer.encode("aß") == [tokenizer.encode("a")[0], tokenizer.unknown_id]
    assert tokenizer.unknown("zßßä") == ["ß", "ä"] and tokenizer.unknown("abc") == []
    assert tokenizer.decode([tokenizer.unknown_id]) == "\ufffd"


# ---------------------------------------------------------------- datasets

def test_stories_of_a_file(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes("\ufeff<|endoftext|>\n One.\r\n\r\nMore <|endoftext|> inside.\n<|endoftext|>\n\n"
                     "<|endoftext|>  \nTwo ½.\n".encode())
    assert list(open_dataset(str(path), True)["train"]()) == ["One.\n\nMore <|endoftext|> inside.", "Two ½."]


def test_the_last_stories_are_held_out_and_never_shared(tmp_path):
    texts = [f"Story {i}." for i in range(100)]
    texts[3] = texts[97]  # a validation story that is also among the training stories
    path = str(write_stories(tmp_path / "s.txt", texts))
    training, validation = hold_out(open_dataset(path, True), None, None)
    assert list(validation()) == texts[95:]
    assert list(training()) == [t for t in texts[:95] if t != texts[97]]
    training, validation = hold_out(open_dataset(path, True), 10, 2)
    assert list(validation()) == texts[95:97] and list(training()) == texts[:10]


def test_a_folder_of_parquet_with_and_without_a_validation_split(tmp_path):
    pandas = pytest.importorskip("pandas")
    folder = tmp_path / "folder"
    folder.mkdir()
    texts = [f" Story {i}. " for i in range(40)]
    pandas.DataFrame({"text": [*texts, "", None]}).to_parquet(folder / "train.parquet")
    training, validation = hold_out(open_dataset(str(folder), True), None, None)
    assert list(validation()) == ["Story 38.", "Story 39."] and len(list(training())) == 38
    pandas.DataFrame({"text": ["Story 7.", "Other."]}).to_parquet(folder / "validation.parquet")
    training, validation = hold_out(open_dataset(str(folder), True), None, None)
    assert list(validation()) == ["Story 7.", "Other."]
    assert "Story 7." not in list(training()) and len(list(training())) == 39


def test_a_folder_without_a_text_column_is_refused(tmp_path):
    (tmp_path / "train.json").write_text('{"author": "x", "title": "y"}\n')
    with pytest.raises(UserError, match="train.json has the columns author, title; "):
        list(open_dataset(str(tmp_path), True)["train"]())


# ---------------------------------------------------------------- streams

def test_streams_are_the_stories_each_followed_by_end_of_text(tmp_path, stories):
    tokenizer, train, validation = prepare(make_config(tmp_path))
    n_training = len(stories) - round(0.05 * len(stories))
    held_out = set(stories[n_training:])  # of which none may be trained on
    training = [story for story in stories[:n_training] if story not in held_out]
    for stream, expected in ((train, training), (validation, stories[n_training:])):
        assert stream.tokens.dtype == np.uint16 and len(stream.tokens) == stream.info["tokens"]
        pieces = np.split(stream.tokens, np.flatnonzero(stream.tokens == tokenizer.eot_id) + 1)
        assert [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]] == expected and len(pieces[-1]) == 0
        assert stream.info["stories"] == len(expected)
        assert stream.info["bytes"] == sum(len(story.encode()) for story in expected)


def test_streams_are_reused_and_built_anew_for_another_request_or_file_or_after_damage(tmp_path, monkeypatch):
    path = write_stories(tmp_path / "mine.txt", [f"This is story number {i}, my dear." for i in range(50)])
    config = make_config(tmp_path, data__dataset=str(path))
    built = []

    def build_streams(*args, build_streams=data.build_streams):
        built.append(args)
        build_streams(*args)

    monkeypatch.setattr(data, "build_streams", build_streams)

    def builds() -> int:
        before = len(built)
        tokens = prepare(config)[1].tokens
        assert (tokens < 400).all()
        return len(built) - before

    assert [builds(), builds()] == [1, 0]
    config.data.max_stories = 20
    assert [builds(), builds()] == [1, 0]
    config.data.max_stories = None  # both stand beside each other
    assert [builds(), builds()] == [1, 0]
    config.data.max_stories = 20
    assert builds() == 0
    before = set((tmp_path / "data").iterdir())
    path.write_text(path.read_text().replace("number", "nummer"))
    assert [builds(), builds()] == [1, 0]
    made = set((tmp_path / "data").iterdir()) - before
    stream, = (file for file in made if file.name.endswith("-train.bin"))
    content = stream.read_bytes()
    for damaged in (content[:-2], content[:100] + b"\xff" + content[101:], b""):
        stream.write_bytes(damaged)
        assert [builds(), builds()] == [1, 0] and stream.read_bytes() == content
    description, = (file for file in made if file.suffix == ".json")
    description.write_text(description.read_text()[:50])
    assert [builds(), builds()] == [1, 0]
    assert not list((tmp_path / "data").glob("*.tmp"))


def test_an_interrupted_build_leaves_the_old_streams_usable(tmp_path, monkeypatch):
    config = make_config(tmp_path)
    before = prepare(config)[1].tokens.copy()
    config.data.max_stories = 10
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(data.os, "replace", raises(KeyboardInterrupt()))
        prepare(config)
    config.data.max_stories = 10_000
    assert np.array_equal(prepare(config)[1].tokens, before)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "no story"), (b"\n<|endoftext|>\n \n", "no story"), (b"x", "at least two"),
    (b"Same.\n<|endoftext|>\nSame.", "at least two"), (b"\xff\xfe\x00bad", "convert it to UTF-8"),
])
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(make_config(tmp_path, data__dataset=str(path)))


@pytest.mark.parametrize("name", ["missing.txt", "no such thing", "folder/that/is/not"])
def test_a_dataset_that_is_not_there_is_one_sentence_and_changes_nothing(tmp_path, name):
    config = make_config(tmp_path, data__dataset=name)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=name):
        prepare(config)
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------- batches

EOT = 9_999


def make_stream(n_tokens, mean_length, seed=0):
    """A stream of distinct tokens but for end-of-text, which ends a story of that length on average."""
    stream = np.arange(10_000, 10_000 + n_tokens).astype(np.uint16)
    stream[np.random.default_rng(seed).random(n_tokens) < 1 / mean_length] = EOT
    stream[-1] = EOT
    return stream


def windows_of_epochs(batches, epochs):
    """The positions of every window, (epochs, windows, T + 1)."""
    n = batches.windows_per_epoch
    drawn = np.concatenate([batches.positions(step) for step in range(-(-epochs * n // batches.batch_size))])
    return drawn[:epochs * n].reshape(epochs, n, -1)


@pytest.mark.parametrize(("n_tokens", "mean_length", "batch_size", "seq_len"), [
    (5000, 50, 4, 64), (5000, 10, 3, 64), (5000, 400, 64, 64), (101, 20, 1, 100), (5000, 1e9, 4, 64)])
def test_an_epoch_reads_every_story_once_from_its_beginning(n_tokens, mean_length, batch_size, seq_len):
    stream = make_stream(n_tokens, mean_length)
    begins = np.flatnonzero(np.roll(stream, 1) == EOT)
    batches = Batches(stream, EOT, batch_size, seq_len, seed=3)
    assert batches.windows_per_epoch == -(-n_tokens // seq_len)
    for windows in windows_of_epochs(batches, 3):
        firsts = windows[:, 1]
        assert len(set(firsts)) == len(firsts)  # no window twice
        assert np.isin(begins, windows[:, 1:]).all()
        for window in windows:
            starts_a_story = np.isin(window[1:], begins)
            # A window with a beginning of a story in its part begins with one.
            assert starts_a_story[0] or not starts_a_story[:seq_len // 2].any()
            # Tokens follow each other as in the stream, but where another story begins, after end-of-text.
            follows = np.diff(window) == 1
            assert (follows | starts_a_story & (stream[window[:-1]] == EOT)).all()


def test_a_text_without_stories_is_read_whole_in_every_epoch_and_cut_elsewhere():
    batches = Batches(make_stream(5000, 1e9), EOT, 4, 64, seed=3)
    one, other = windows_of_epochs(batches, 2)
    assert len(np.unique(one[:, 1:])) > 0.98 * 5000  # but for the end of the window that begins the text
    assert not np.isin(other[:, 1], one[:, 1]).all()


def test_batches_are_a_function_of_seed_and_step_alone():
    stream = make_stream(5000, 40)
    one, other = Batches(stream, EOT, 8, 32, seed=1), Batches(stream, EOT, 8, 32, seed=1)
    forwards = [one.positions(step) for step in range(60)]
    assert all(np.array_equal(other.positions(step), forwards[step]) for step in reversed(range(60)))
    assert not np.array_equal(Batches(stream, EOT, 8, 32, seed=2).positions(0), forwards[0])
    first, second = windows_of_epochs(one, 2)
    assert not np.array_equal(first, second)  # another order, other stories side by side
    assert len(set(map(tuple, second.tolist())) - set(map(tuple, first.tolist()))) > len(first) / 2


def test_targets_are_the_next_tokens_above_32767_too():
    stream = np.arange(2**16, dtype=np.uint16)
    batches = Batches(stream, 2**16 - 1, 6, 50, seed=0)
    for step in range(batches.windows_per_epoch // 6):
        x, y = batches.at(step)
        assert x.shape == y.shape == (6, 50) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, (x + 1) % 2**16) and torch.equal(x[:, 1:], y[:, :-1])
    seen = torch.cat([batches.at(step)[0] for step in range(200)])
    assert seen.min() >= 0 and (seen > 32_767).float().mean() > 0.45 and seen.max() > 65_000


def test_processes_share_a_batch():
    stream = make_stream(5000, 40)
    whole, _ = Batches(stream, EOT, 8, 32, seed=1).at(3)
    parts = [Batches(stream, EOT, 8, 32, seed=1, rank=rank, world=2).at(3)[0] for rank in (0, 1)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


def test_too_few_tokens_for_one_window_are_refused():
    with pytest.raises(UserError, match="64 tokens, fewer than one window of model.max_seq_len = 64"):
        Batches(np.zeros(64, np.uint16), EOT, 1, 64, seed=0)
