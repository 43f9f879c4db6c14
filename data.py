"""Stories -> tokenizer -> token stream -> batches.

`prepare(config)` turns a dataset into two streams of uint16 tokens on disk, every story followed by
end-of-text, and `Batches` reads training batches from one. `python data.py` prepares and describes them.
"""

import base64
import codecs
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import mmap
import os
import re
import shutil
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock  # comes with torch
import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from tqdm import tqdm

from config import ArgumentParser, Config, UserError, config, run_main

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "\ufffd"
SAMPLE = Path(__file__).parent / "data" / "sample_stories.txt"
SPLITS = ("train", "validation")
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
PATIENCE = 120  # seconds to wait for the Hub, or for another process

SEPARATORS = (  # of stories, the likelier first
    rb"(?m)^(?:\xef\xbb\xbf)?<\|endoftext\|>[ \t\r]*$",  # a line; the first may have a byte-order mark
    rb"(?i)<\|\w+\|>|</?s>|<(?:bos|eos|eot|end|sep)>|\[(?:bos|eos|end|sep)\]",
    rb"(?m)^(?:[-=*#_~][ \t]*){3,}\r?$",
    rb"\n(?:[ \t\r]*\n){2,}")


# ---------------------------------------------------------------- stories

class DatasetUnavailable(UserError):
    """The dataset cannot be reached: `auto` falls back, a dataset named explicitly is an error."""


class TokenizerUnavailable(UserError):
    """GPT-2's vocabulary cannot be had."""


def within(seconds: float | None, work: Callable, *args, slow: Callable | None = None):
    """Returns work(*args); calls `slow` after a tenth of the time. Raises TimeoutError after `seconds`."""
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(work(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # which the end of the process does not wait for
    if slow:
        with contextlib.suppress(TimeoutError):
            return future.result(seconds / 10)
        slow()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None


def find_separator(path: Path, alone: bool = True) -> re.Pattern | None:
    """Returns what separates the stories of a text, by its first 16 MB; None where nothing does. Says what it
    is, and what looks like it and is not. In a text that is not `alone`, dashes and newlines are its own.
    """
    with open(path, "rb") as file:
        head, separator = file.read(2**24), None
    for pattern in SEPARATORS if alone else SEPARATORS[:2]:
        found = Counter(mark.strip().decode() or "three newlines" for mark in re.findall(pattern, head))
        names = ", ".join(sorted(found.keys() - {END_OF_TEXT}))
        if not separator and (found.total() > 1 or END_OF_TEXT in found):
            separator = re.compile(pattern)
            if pattern != SEPARATORS[0]:
                say(f"{path}: stories are separated by {names or END_OF_TEXT}")
        elif names and (not separator or pattern == SEPARATORS[1]):
            say(f"WARNING: {path}: {names} is read as text, not as the end of a story")
    return separator


def read_stories(path: Path, find: Callable = find_separator) -> Iterator[str]:
    """Yields the stories of a text file, stripped, without empty ones; all of it where nothing separates."""
    separator, start = find(path), 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for match in itertools.chain(separator.finditer(text) if separator else (), [None]):
            story = text[start:match and match.start()].decode("utf-8-sig")
            if story := story.replace("\r\n", "\n").replace("\r", "\n").strip():
                yield story
            start = match and match.end()


def read_rows(path: Path, find: Callable) -> Iterator:
    """Yields the stories of a text file, or the rows of a parquet or json file, an array or one a line."""
    if not path.stat().st_size:
        return
    if path.suffix.lower() == ".txt":
        yield from read_stories(path, find)
    elif path.suffix.lower() == ".parquet":
        import pyarrow.parquet  # comes with datasets

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    else:
        with open(path, encoding="utf-8-sig") as file:
            is_array = file.read(100).lstrip().startswith("[")
            file.seek(0)
            yield from json.load(file) if is_array else map(json.loads, filter(str.strip, file))


def read_texts(sources: dict[str, Callable[[], Iterator]]) -> Iterator[str]:
    """Yields the stories in {name: rows}, files or a Hub dataset, from their column text, story or content,
    or the only one with text, which must be the same in all of them. Raises UserError.
    """
    column = None
    for name, begin in sources.items():
        try:
            for row in begin():
                if isinstance(row, dict):
                    if column not in row:
                        known = [key for key in ("text", "story", "content") if key in row][:1]
                        known = known or [key for key, value in row.items() if isinstance(value, str)]
                        if column or len(known) != 1:
                            raise UserError(f"{name} has no column {column or 'text, story or content'}; its "
                                            f"columns are {', '.join(row)}")
                        column, = known
                    row = row[column]
                if not isinstance(row, str | None):
                    raise UserError(f"{name} holds {str(row)[:40]} in its column {column or 'of stories'}, "
                                    "which is no text")
                if row and (story := row.strip()):
                    yield story
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text ({error.reason}); convert it") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise DatasetUnavailable(f"cannot read {name}: {first_line(error)}") from error


def by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups files or splits: for validation are those with valid, val, dev or test in their names."""
    groups = {split: [] for split in SPLITS}
    for name in names:
        held_out = re.search(r"(?<![a-z])(valid|validation|val|dev|test)(?![a-z])", name.lower())
        groups["validation" if held_out else "train"].append(name)
    return groups if all(groups.values()) else {"train": list(names)}


def locate(name: str) -> dict[str, list[Path]] | None:
    """Returns the files of a local dataset by split, None for the Hub's. Raises UserError for neither."""
    path = SAMPLE if name == "sample" else Path(name)
    files = [p for p in (sorted(path.rglob("[!.]*")) if path.is_dir() else [path])
             if p.is_file() and p.suffix.lower() in SUFFIXES]
    if files:
        kind = max(files, key=lambda p: p.stat().st_size).suffix.lower()
        names = [p.relative_to(path).as_posix() for p in files if p.suffix.lower() == kind]
        return {split: [path / name for name in part] for split, part in by_split(names).items()}
    kinds = "no file and no folder of files " + ", ".join(SUFFIXES)
    if path.exists() or path.is_symlink():
        state = kinds if path.exists() else f"a link to {path.readlink()}, which is gone"
        raise UserError(f"data.dataset = {name!r} is {state}")
    if path.suffix.lower() in SUFFIXES or not re.fullmatch(r"tinystories|[\w.-]+/[\w.-]+", name):
        raise UserError(f"data.dataset = {name!r} does not exist: it is not auto, tinystories or sample, "
                        f"{kinds}, and not the name of a Hub dataset such as roneneldan/TinyStories")
    return None


def open_hub(name: str, limited: bool) -> dict[str, dict]:
    """Returns {split: {name: rows}} of a Hub dataset, streamed if `limited`. Raises UserError."""
    import datasets  # these take a second: imported only where they are used
    import huggingface_hub
    import requests

    for library in ("datasets", "huggingface_hub"):  # which print two lines at every retry
        logging.getLogger(library).setLevel(logging.ERROR)
    hub = huggingface_hub.constants
    try:
        if not hub.HF_HUB_OFFLINE:
            within(6, requests.head, hub.ENDPOINT)
    except (OSError, ValueError):  # no answer, or not an address at all
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # an earlier download serves
    streaming = limited and not hub.HF_HUB_OFFLINE
    ask = functools.partial(within, None)  # a download takes its time, and its retries end by themselves
    if streaming:
        waiting = f"the Hub does not answer: trying for {PATIENCE:g} seconds"
        ask = functools.partial(within, PATIENCE, slow=functools.cache(lambda: say(waiting)))  # once
    try:
        splits = ask(functools.partial(datasets.load_dataset, name, streaming=streaming))
    except Exception as error:  # datasets raises many kinds
        reason = "no answer from the Hub and no earlier download" if hub.HF_HUB_OFFLINE else first_line(error)
        raise DatasetUnavailable(f"cannot load the dataset {name!r}: {reason}") from error
    if "train" not in splits:
        raise UserError(f"the dataset {name!r} must have a split 'train'; it has {', '.join(splits)}")

    def rows(split: str) -> Iterator[dict]:
        batches = splits[split].iter(batch_size=1000)
        while batch := ask(next, batches, None):
            yield from (dict(zip(batch, values)) for values in zip(*batch.values()))

    return {split: {f"the dataset {name!r}": functools.partial(rows, split if split in part else part[0])}
            for split, part in by_split(splits).items()}


def open_dataset(name: str, limited: bool) -> dict[str, Callable[[], Iterator[str]]]:
    """Returns {"train": stories, "validation": stories}, functions that start an iteration; only "train"
    without a validation split. `limited`: stream from the Hub, do not download it all. Raises UserError.
    """
    if files := locate(name):
        sources = {}
        for split, paths in files.items():  # however often they are read, what separates them is said once
            find = functools.cache(functools.partial(find_separator, alone=len(paths) == 1))
            sources[split] = {str(path): functools.partial(read_rows, path, find) for path in paths}
    else:
        sources = open_hub("roneneldan/TinyStories" if name == "tinystories" else name, limited)
    return {split: functools.partial(read_texts, source) for split, source in sources.items()}


def hold_out(splits: dict, max_stories: int | None, max_val_stories: int | None) -> tuple[Callable, Callable]:
    """Returns two functions that start an iteration over the training and the validation stories.

    Without a validation split, the last 5 % of the stories (at least one) are held out, or of the only one. A
    training story that is also a validation story, word for word, is left out.
    """
    whole = splits["train"]
    if "validation" not in splits:
        n_stories = sum(1 for _ in progress(whole(), None, "counting stories", "stories"))
        if n_stories == 1:
            say(f"one long text, since no line {END_OF_TEXT} separates stories: its end is held out")
            text = next(whole())
            half, most = len(text) // 2, len(text) * 95 // 100
            end = text.rfind("\n", half, most) + 1 or text.rfind(". ", half, most) + 1
            n_stories, whole = 2, lambda: filter(None, map(str.strip, (text[:end], text[end:])))
        first = max(0, n_stories - max(1, round(0.05 * n_stories)))
        splits = {"train": lambda: itertools.islice(whole(), first),
                  "validation": lambda: itertools.islice(whole(), first, None)}

    def validation() -> Iterator[str]:
        return itertools.islice(splits["validation"](), max_val_stories)

    def training() -> Iterator[str]:
        unseen = (story for story in splits["train"]() if hash(story) not in seen)
        return itertools.islice(unseen, max_stories)

    seen = set(map(hash, validation()))
    return training, validation


# ---------------------------------------------------------------- tokenizers

class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), lossless on any text.

    `tokens` are byte strings in the order of their ranks; end-of-text comes last. Encoding is tiktoken's.
    """

    # GPT-2's split pattern; possessive, as in tiktoken: the same pieces, faster.
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

    def __init__(self, tokens: list[bytes], name: str = "bpe"):
        self.name = name
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.eot_id = len(tokens)
        self.vocab_size = len(tokens) + 1
        self._encoding = tiktoken.Encoding(name, pat_str=self.PATTERN, mergeable_ranks=self.ranks,
                                           special_tokens={END_OF_TEXT: self.eot_id})

    @classmethod
    def gpt2(cls, data_dir: str | Path) -> "BPETokenizer":
        """Returns GPT-2's tokenizer, from tiktoken's cache under `data_dir` or the network.

        Raises TokenizerUnavailable.
        """
        cache = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(data_dir, "tiktoken")))
        try:
            encoding = within(20, tiktoken.get_encoding, "gpt2")  # tiktoken itself has no timeout
        except (OSError, ValueError) as error:
            raise TokenizerUnavailable(
                f"GPT-2's vocabulary is not in {cache} and cannot be downloaded ({first_line(error)}); "
                "use training.tokenizer_type=bpe, or copy tiktoken's two cache files there") from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)], "gpt2")

    @classmethod
    def train(cls, stories: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Returns a tokenizer of `vocab_size` tokens: 256 bytes, merges, end-of-text; fewer if pairs run out.

        Merges the most frequent pair again and again; of equally frequent ones the lexicographically greatest
        pair of byte strings. Counts are kept per distinct word and changed only where a merge applies.
        """
        split = regex.compile(cls.PATTERN).findall
        longest = 256  # characters of a word that merges are learned from, which are quadratic in them
        word_counts = Counter(word[:longest] for story in stories for word in split(story))
        words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in word_counts]
        counts = list(word_counts.values())

        pair_counts, words_with = Counter(), defaultdict(set)

        def add(i: int, sign: int) -> None:
            for pair in itertools.pairwise(words[i]):
                pair_counts[pair] += sign * counts[i]
                words_with[pair].add(i)

        for i in range(len(words)):
            add(i, 1)
        tokens = {bytes([b]): None for b in range(256)}  # an ordered set
        for _ in progress(range(256, vocab_size - 1), None, "training the tokenizer", "tokens"):
            highest = max(pair_counts.values(), default=0)
            if highest == 0:
                break
            best = max(pair for pair, count in pair_counts.items() if count == highest)
            tokens[best[0] + best[1]] = None
            for i in words_with.pop(best):
                add(i, -1)
                _merge(words[i], best)
                add(i, 1)
        return cls(list(tokens))

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Returns `encode(text)` as an array: twice as fast, and threads run side by side."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # half a surrogate pair, as in a cut emoji, or too many blanks for the pattern
            pieces = re.split(r"(\s{10000})", text)
            return np.array([token for piece in pieces for token in self._encoding.encode_ordinary(piece)])

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode([int(t) for t in tokens])

    def decoder(self) -> Callable[[int | None], str]:
        """Returns a function that turns tokens into text as they come, characters whole; None ends it."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        token_bytes = self._encoding.decode_single_token_bytes
        return lambda token: decode(b"", True) if token is None else decode(token_bytes(int(token)))

    def unknown(self, text: str) -> list[str]:
        """Returns the characters of `text` that the tokenizer cannot represent."""
        return []

    def spec(self) -> dict:
        return {"type": self.name, "tokens": b" ".join(map(base64.b64encode, self.ranks)).decode()}


class CharTokenizer(BPETokenizer):
    """A token for each character of the training stories, then one for unknown ones, then end-of-text."""

    PATTERN = r"(?s)."

    def __init__(self, characters: str):
        super().__init__([character.encode() for character in characters + UNKNOWN], "char")
        self.characters, self.unknown_id = characters, len(characters)
        self._unknown = re.compile(f"[^{re.escape(characters + UNKNOWN)}]")

    @classmethod
    def train(cls, stories: Iterable[str]) -> "CharTokenizer":
        """Returns the tokenizer of the characters in `stories`, in code-point order."""
        characters = sorted(set(itertools.chain.from_iterable(stories)) - {UNKNOWN})
        return cls("".join(characters).encode("utf-8", "ignore").decode())

    def encode_array(self, text: str) -> np.ndarray:
        return super().encode_array(self._unknown.sub(UNKNOWN, text))

    def unknown(self, text: str) -> list[str]:
        return sorted(set(self._unknown.findall(text)))

    def spec(self) -> dict:
        return {"type": "char", "characters": self.characters}


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Merges the pair in the word, from the left, wherever it occurs."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i:i + 2] = [pair[0] + pair[1]]
        i += 1


def tokenizer_from_spec(spec: dict) -> BPETokenizer:
    """Rebuilds the tokenizer that returned this `spec()`; needs no file and no network."""
    if spec["type"] == "char":
        return CharTokenizer(spec["characters"])
    return BPETokenizer([base64.b64decode(token) for token in spec["tokens"].split(" ")], spec["type"])


# ---------------------------------------------------------------- token streams

@dataclass
class Stream:
    """A split as one array of tokens, every story followed by end-of-text."""
    tokens: np.ndarray  # (N,) uint16, a copy-on-write memmap
    info: dict  # dataset, split, stories, tokens, bytes (UTF-8), sha256 (of the tokens), tokenizer (hash)

    def head(self, limit: int | None, tokenizer) -> tuple[np.ndarray, int]:
        """Returns the first `limit` tokens, up to the end of a story if one ends, and their text's bytes."""
        ends = np.flatnonzero(self.tokens[:limit] == tokenizer.eot_id)
        tokens = np.array(self.tokens[:ends[-1] + 1 if len(ends) else limit])
        return tokens, len(tokenizer.decode(tokens[tokens != tokenizer.eot_id]).encode())


def encode_stories(stories: Iterable[str], tokenizer, write: Callable[[np.ndarray], object]) -> dict:
    """Encodes stories, each followed by end-of-text, on all cores and hands them in their order to `write` as
    uint16 arrays. Returns counts and hash of what was written. Some thousand stories are in memory.
    """
    def encode(batch: list[str]) -> np.ndarray:
        parts = [part for story in batch for part in (tokenizer.encode_array(story), [tokenizer.eot_id])]
        return np.concatenate(parts, dtype=np.uint16, casting="unsafe")

    stories, digest, counts = iter(stories), hashlib.sha256(), Counter(stories=0, tokens=0, bytes=0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while group := list(itertools.islice(stories, 4096)):
            batches = [group[i:i + 64] for i in range(0, len(group), 64)]
            tokens = np.concatenate(list(pool.map(encode, batches)))
            write(tokens)
            digest.update(tokens)
            n_bytes = sum(len(story.encode("utf-8", "replace")) for story in group)
            counts.update(stories=len(group), tokens=len(tokens), bytes=n_bytes)
    return {**counts, "sha256": digest.hexdigest()}


def make_tokenizer(request: dict, data_dir: Path, stories: Callable[[], Iterator[str]]):
    """Returns the tokenizer that a request names, trained on the stories if need be. Raises UserError."""
    kind = request["tokenizer_type"]
    if kind == "gpt2":
        return BPETokenizer.gpt2(data_dir)
    shown = progress(stories(), request["max_stories"], "training the tokenizer", "stories")
    if kind == "bpe":
        return BPETokenizer.train(shown, request["bpe_vocab_size"])
    tokenizer = CharTokenizer.train(shown)
    if tokenizer.vocab_size > 2**16:
        raise UserError(f"the char tokenizer would have {tokenizer.vocab_size:,} tokens, a stream can have "
                        f"{2**16:,}; use training.tokenizer_type=bpe")
    return tokenizer


def build_streams(stem: Path, dataset: str, request: dict) -> None:
    """Writes the two streams and, last, the JSON that describes them. Raises UserError."""
    limits = request["max_stories"], request["max_val_stories"]
    stories = hold_out(open_dataset(dataset, limited=limits[0] is not None), *limits)
    tokenizer = make_tokenizer(request, stem.parent, stories[0])
    spec = tokenizer.spec()
    description = {"request": request, "tokenizer": spec}
    for split, begin, limit in zip(SPLITS, stories, limits):
        with atomic_write(Path(f"{stem}-{split}.bin")) as file:
            shown = progress(begin(), limit, f"tokenizing {split}", "stories")
            counts = encode_stories(shown, tokenizer, file.write)
            if not counts["stories"]:
                raise UserError(f"data.dataset = {dataset!r} has no stories for the {split} split; it needs "
                                f"at least two different ones, with a line {END_OF_TEXT} between them")
        description[split] = {"dataset": dataset, "split": split, **counts, "tokenizer": json_hash(spec)}
    description["content"] = content(description)
    with atomic_write(Path(f"{stem}.json")) as file:
        file.write(json.dumps(description | {"sha256": json_hash(description)}, indent=1).encode())


def find_streams(folder: Path, dataset: str | None = None, **wanted) -> tuple | None:
    """Returns (tokenizer, train stream, validation stream) of the first whole streams in the folder whose
    description has the wanted request or content, or None. `dataset` is what they are called now.
    """
    for path in sorted(folder.glob("*-train.bin")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stem, streams = str(path).removesuffix("-train.bin"), []
            description = json.loads(Path(stem + ".json").read_text())
            whole = description.pop("sha256") == json_hash(description)
            if whole and all(description[key] == value for key, value in wanted.items()):
                for split in SPLITS:
                    path, info = Path(f"{stem}-{split}.bin"), description[split]
                    streams.append(Stream(np.memmap(path, np.uint16, "c"), info))
                    info["dataset"] = dataset or info["dataset"]
                    whole = whole and file_hash(path) == info["sha256"]
                if whole:
                    return tokenizer_from_spec(description["tokenizer"]), *streams
    return None


def content(dataset: dict) -> list[str]:
    """What streams are: the SHA-256 of their tokens, of {split: info} as in a checkpoint."""
    return [dataset[split]["sha256"] for split in SPLITS]


def prepare(config: Config, checkpoint: dict | None = None) -> tuple:
    """Returns (tokenizer, train stream, validation stream), built where `data_dir` does not hold them yet.

    `auto` is what it was when the run of the checkpoint began; without one TinyStories, and where that cannot
    be reached the bundled stories, with a warning; if GPT-2's vocabulary cannot be had either, with the bpe
    tokenizer. The streams' `info` says what they really are. Raises UserError.
    """
    dataset, kind = config.data.dataset, config.training.tokenizer_type
    if dataset == "auto" and checkpoint:
        dataset, kind = checkpoint["dataset"]["train"]["dataset"], checkpoint["tokenizer"]["type"]
    if dataset != "auto":
        try:
            return prepare_streams(config, dataset, kind)
        except UserError as error:
            if not checkpoint or not (found := find_streams(
                    Path(config.data.data_dir), content=content(checkpoint["dataset"]))):
                raise
            say(f"{error}: its streams in {config.data.data_dir} serve")
            return found
    try:
        return prepare_streams(config, "tinystories", kind)
    except DatasetUnavailable as error:
        reason = str(error)
    try:
        prepared = prepare_streams(config, "sample", kind)
    except TokenizerUnavailable as error:
        prepared, reason = prepare_streams(config, "sample", "bpe"), f"{reason}; {error}"
    rule = "!" * 100
    print(f"{rule}\nWARNING: not TinyStories: {reason}.\nWARNING: using the {SAMPLE.name} that come with the "
          f"project (data.dataset=sample) and the {prepared[0].name} tokenizer: good to try things out, too "
          f"few to learn well from.\n{rule}", file=sys.stderr)
    return prepared


def prepare_streams(config: Config, dataset: str, kind: str) -> tuple:
    """`prepare` for a dataset and a type of tokenizer that are what they say. What is there is only read."""
    data, folder, files = config.data, Path(config.data.data_dir), locate(dataset)
    try:  # wherever its files lie
        source = files and {split: [p.suffix.lower() + file_hash(p) for p in files[split]] for split in files}
    except OSError as error:
        raise UserError(f"cannot read {dataset}: {first_line(error)}") from error
    request = {"dataset": source or dataset, "max_stories": data.max_stories,
               "max_val_stories": data.max_val_stories, "tokenizer_type": kind}
    if kind == "bpe":
        request["bpe_vocab_size"] = config.training.bpe_vocab_size
    if found := find_streams(folder, dataset, request=request):
        return found
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(dataset).stem)[:40]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    lock, owner = filelock.FileLock(folder / ".lock"), ""
    try:
        lock.acquire(timeout=5 * PATIENCE)  # several processes may prepare the same streams
    except (OSError, NotImplementedError) as error:
        owner = f"-{os.getpid()}"
        say(f"going on without the lock {folder / '.lock'}, which cannot be had: {first_line(error)}")
    try:
        if not (found := find_streams(folder, dataset, request=request)):
            build_streams(folder / f"{name}-{json_hash(request)}{owner}-{kind}", dataset, request)
            found = find_streams(folder, dataset, request=request)
        return found
    finally:
        lock.release()


# ---------------------------------------------------------------- batches

class Batches:
    """Training batches as a pure function of (seed, step), so that resuming needs only the step.

    In every epoch the stream is cut into non-overlapping windows at a random offset, and each is used once.
    Of the `world` processes that share a batch, each has its own part of the windows.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int,
                 device: torch.device | str = "cpu", rank: int = 0, world: int = 1):
        if len(tokens) <= seq_len:
            raise UserError(f"the training stories have {len(tokens):,} tokens, fewer than one window of "
                            f"model.max_seq_len = {seq_len:,}; use more stories or a shorter context")
        self.n_tokens, self.batch_size, self.seq_len, self.seed = len(tokens), batch_size, seq_len, seed
        self.rank, self.world = rank, world
        self.windows_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        self.stream = torch.from_numpy(tokens.view(np.int16)).to(device)  # torch lacks operators for uint16
        self._starts = {}

    def epoch(self, step: int) -> float:
        """Returns the number of passes over the data before step `step`."""
        return step * self.batch_size / self.windows_per_epoch

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens and targets (B, T) int64, on the device, of step `step`: this process's part."""
        starts = torch.from_numpy(self.starts(step)[self.rank::self.world])
        starts = starts.to(self.stream.device, non_blocking=True)
        positions = starts[:, None] + torch.arange(self.seq_len + 1, device=starts.device)
        windows = self.stream[positions].long() & 0xFFFF  # as uint16 again
        return windows[:, :-1], windows[:, 1:]

    def starts(self, step: int) -> np.ndarray:
        """Returns the (B,) positions in the stream at which the sequences of step `step` begin."""
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, position = np.divmod(index, self.windows_per_epoch)
        return np.array([self._epoch_starts(e)[p] for e, p in zip(epochs.tolist(), position.tolist())])

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        if epoch not in self._starts:
            rng = np.random.default_rng([self.seed, epoch])
            spare = self.n_tokens - self.windows_per_epoch * self.seq_len
            offset = rng.integers(min(self.seq_len, spare))
            self._starts = {epoch: offset + self.seq_len * rng.permutation(self.windows_per_epoch)}
        return self._starts[epoch]


def story_windows(tokens: np.ndarray, eot_id: int, seq_len: int) -> np.ndarray:
    """Returns the (start, end) of every story, (W, 2), end-of-text included; or of pieces of `seq_len`."""
    ends = np.union1d(np.flatnonzero(tokens == eot_id) + 1, len(tokens)).tolist()
    return np.array([(first, min(first + seq_len, end))
                     for start, end in zip([0, *ends], ends) for first in range(start, end, seq_len)])


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_write(path: Path, size: int = 0, keep: Path | None = None):
    """Yields a binary file that becomes `path` once it is complete and on disk, and not before.

    `size` is the whole size in bytes, where it is known, for the message where the disk is full. The old file
    becomes `keep`, if given. Raises UserError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:  # what is left of it is deleted before free space is measured
            with contextlib.suppress(OSError):
                size = max(size, temporary.stat().st_size + 1)
                temporary.unlink()
    except OSError as error:
        raise write_error(path, error, size) from error


def write_error(path: Path, error: OSError, size: int = 1) -> UserError:
    """The sentence for a file of `size` bytes that could not be written, and why."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"cannot write {path}: {error.strerror or error}")
    free = shutil.disk_usage(path.parent).free / 1e6
    return UserError(f"cannot write {path}: {error.strerror}; about {math.ceil(size / 1e5) / 10} MB are "
                     f"needed and {free:.1f} MB are free; make space and run the same command again")


def append_line(path: Path, line: str) -> int:
    """Appends a line to a file, safely on disk; returns the file's length in bytes. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise write_error(path, error) from error


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value) -> str:
    """The identity of a tokenizer's spec or of any other JSON value, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def first_line(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return reason.splitlines()[0]


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def progress(iterable: Iterable, total: int | None, description: str, unit: str) -> tqdm:
    """A progress bar on standard error, for what takes over a second; a line now and then in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, description, total, unit=f" {unit}", delay=1, mininterval=interval)


# ---------------------------------------------------------------- command line

def main() -> None:
    parser = ArgumentParser("Prepares the stories that train.py would use, and describes them.")
    settings, _ = parser.configure(config)
    tokenizer, train, validation = prepare(settings)
    for stream in (train, validation):
        info = stream.info
        print(f"{info['dataset']}, {info['split']}: {info['stories']:,} stories, {info['tokens']:,} tokens, "
              f"{info['bytes']:,} bytes, {info['bytes'] / info['tokens']:.2f} bytes per token")
    beginning = tokenizer.decode(train.tokens[:settings.model.max_seq_len])
    print(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens\n\n{beginning} ...")


if __name__ == "__main__":
    run_main(main)
