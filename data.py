"""Stories -> tokenizer -> token stream -> batches.

`prepare(config)` turns a dataset into two streams of uint16 tokens on disk, every story followed by
end-of-text, and `Batches` reads training batches from one. `python data.py` prepares and describes them.
"""

import base64
import codecs
import contextlib
import errno
import functools
import hashlib
import heapq
import io
import itertools
import json
import logging
import mmap
import multiprocessing
import os
import re
import reprlib
import secrets
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
import torch.distributed as dist
from tqdm import tqdm

from config import ArgumentParser, Config, UserError, config, run_main

CHECKPOINT_FORMAT = 4
END_OF_TEXT, UNKNOWN = "<|endoftext|>", "\ufffd"
SAMPLE = Path(__file__).parent / "data" / "sample_stories.txt"
SPLITS = ("train", "validation")
VOCAB_LIMIT = 2**16  # token ids are uint16
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
HUB = {"auto": "roneneldan/TinyStories", "tinystories": "roneneldan/TinyStories"}
LOOKALIKE = re.compile(  # what looks like a separator: a token, a line of dashes, three newlines
    rb"(?im)<\|(?!start|begin|bos|im_start)\w+\|>|</s>|<(?:eos|eot|end|sep)>|\[(?:eos|end|sep)\]"
    rb"|^(?:[-=*#_~][ \t]*){3,}\r?$|\n(?:[ \t\r]*\n){2,}")


# ---------------------------------------------------------------- stories

class DatasetUnavailable(UserError):
    """The dataset cannot be read. With `auto` the bundled stories are used instead."""


def within(seconds: float, work: Callable, *args):
    """Returns work(*args). Raises multiprocessing.TimeoutError after `seconds`; the work itself goes on."""
    with ThreadPool(1) as pool:
        return pool.apply_async(work, args).get(seconds)


def read_text(path: Path, separator: str, is_first: bool) -> Iterator[str]:
    """Yields the stories of a text file. A separator ends a story only at the end of a line. If the first
    file of a dataset has none, a warning names what looks like one.
    """
    pattern = re.escape(separator.encode()).replace(b"\\\n", rb"\r?\n[ \t]*")
    pattern += b"" if separator.endswith("\n") else rb"[ \t\r]*$\n?"
    start = 0
    if not path.stat().st_size:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for match in re.finditer(b"(?m)" + pattern, text):
            yield text[start:match.start()].decode("utf-8-sig")
            start = match.end()
        yield text[start:].decode("utf-8-sig")
        if is_first and start == 0 and (match := LOOKALIKE.search(text)):
            mark = match[0].strip().decode() or "\n\n\n"
            advice = "put each on a line of its own" if mark == separator else f"use data.separator={mark!r}"
            say_once(f"WARNING: {path} is read as one story, since no line ends with data.separator="
                     f"{separator!r}; if {mark!r} separates its stories, {advice} (it counts only at the end "
                     "of a line)")


def read_json(path: Path) -> Iterator:
    """Yields the values in a JSON file, or the elements if it is one array. Reads it line by line, but at
    once if the first line is not a whole value.
    """
    values, is_first = [], True
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file):
            try:
                values = json.loads(f"[{line}]")
            except ValueError:
                text = line.strip() if values else line + file.read()
                text = re.sub(r"\}(\s*\n\s*)\{", r"},\1{", text)  # objects one after another
                values = json.loads(f"{number * chr(10)}[{text}]")  # so that an error names the line
            for value in values:
                yield from value if isinstance(value, list) and is_first else [value]
                is_first = False


def read_rows(path: Path, *how) -> Iterator:
    """Yields the stories of a text file, or the rows of a parquet or JSON file."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet  # comes with datasets

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    else:
        yield from read_text(path, *how) if kind == ".txt" else read_json(path)


def read_texts(sources: dict[str, Callable], separator: str) -> Iterator[str]:
    """Yields the stories of {name: function that reads rows}, stripped, without empty ones. In a table they
    are in the column text, story or content; or else in a column whose neighbours are empty or numbers, the
    same in all rows. Raises UserError.
    """
    column = None
    try:
        for name, begin in sources.items():
            for row in begin():
                full = []
                if isinstance(row, dict):
                    full = [key for key, value in row.items() if value and not isinstance(value, int | float)]
                    found = [key for key in ("text", "story", "content") if key in row][:1] or full
                    column = column or next(iter(found), None)
                    if found not in ([], [column]):
                        raise UserError(f"{name} has the columns {', '.join(row)}; give the one with the "
                                        "stories the name text, in every row")
                    row = row.get(column)
                if not isinstance(row, str | None):
                    raise UserError(f"{name} holds {reprlib.repr(row)} where a text is wanted")
                story = re.sub("\r\n?", "\n", re.sub("[\ud800-\udfff]", UNKNOWN, row or "")).strip()
                if separator in story:
                    say_once(f"WARNING: {separator!r} within a line or a row is read as text")
                if story:
                    yield story
                elif others := [key for key in full if key != column]:
                    say_once(f"WARNING: rows with nothing in column {column} are left out, though some have "
                             f"something in column {others[0]}")
    except (OSError, ValueError, RuntimeError) as error:
        advice = "; convert it to UTF-8" if isinstance(error, UnicodeError) else ""
        reason = first_line(error).partition(" column ")[0]
        raise DatasetUnavailable(f"cannot read {name}: {reason}{advice}") from error


def by_split(names: Iterable[str]) -> dict[str, list]:
    """Groups names of files or splits; valid, val, eval, dev or test in a name stands for validation."""
    held_out = re.compile(r"(?i)(?<![a-z])(valid(ation)?|val|eval(uation)?|dev|tests?)(?![a-z])").search
    groups = list(itertools.filterfalse(held_out, names)), list(filter(held_out, names))
    return dict(zip(SPLITS, groups)) if all(groups) else {"train": list(names)}


def locate(name: str) -> dict[str, list[Path]] | None:
    """Returns the files of a local dataset by split, or None for a dataset on the Hub. Raises UserError."""
    if name in HUB:
        return None
    path = SAMPLE if name == "sample" else Path(name)
    inside = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*"))]
    files = [p for name in inside or [""] if "/." not in f"/{name}"  # nothing hidden
             and (p := path / name).suffix.lower() in SUFFIXES and p.is_file()]
    if files:
        kinds = [[p for p in files if p.suffix.lower() == kind] for kind in SUFFIXES]
        most = max(kinds, key=len)
        largest = max(kinds, key=lambda kind: (sum(p.stat().st_size for p in kind), len(kind)))
        if len(largest) < len(most):
            raise UserError(f"most files in {path} are {most[0].suffix}, but most of their bytes are in "
                            f"{largest[0].suffix}; move what is no story elsewhere, or name a single file")
        splits = by_split([p.relative_to(path).as_posix() for p in largest])
        if inside:
            say_once(f"{path}: reading {reprlib.repr(splits)}")
        return {split: [path / name for name in names] for split, names in splits.items()}
    if (os.path.lexists(path) or path.suffix.lower() in SUFFIXES
            or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        raise UserError(
            f"data.dataset = {name!r} does not exist or cannot be read: it is not auto, tinystories or "
            f"sample, no file or folder of files {', '.join(SUFFIXES)} (or link to one), and not the name of "
            "one on the Hub, such as roneneldan/TinyStories")
    return None


def open_hub(name: str, limited: bool) -> dict[str, dict]:
    """Returns {split: {name: rows}} of a Hub dataset, streamed if `limited`. Raises UserError."""
    import datasets  # these take a second: imported only where they are used
    import huggingface_hub.constants as hub
    import requests

    for library in ("datasets", "huggingface_hub"):  # they print two lines at every retry
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.config.STREAMING_READ_MAX_RETRIES = 1  # each of which tries six times
    cause = None
    try:
        within(6, requests.head, hub.ENDPOINT)
        say(f"reading {name} from {hub.ENDPOINT}, for at most about two minutes without an answer")
    except (OSError, ValueError, multiprocessing.TimeoutError) as error:  # ValueError: not an address
        cause = f"no answer from {hub.ENDPOINT}, {type(error).__name__}"
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # use an earlier download
    try:
        splits = datasets.load_dataset(f"hf://datasets/{name}", streaming=limited)  # no local folder
    except Exception as error:  # datasets raises many kinds
        raise DatasetUnavailable(f"cannot load the dataset {name!r}: {cause or first_line(error)}") from error
    return {split: {f"the dataset {name!r}, split {part}": splits[part].__iter__
                    for part in parts} for split, parts in by_split(splits).items()}


def open_dataset(name: str, limited: bool, separator: str = END_OF_TEXT) -> dict[str, Callable]:
    """Returns {"train": stories, "validation": stories}, functions that start an iteration, without
    "validation" if the dataset has none. `limited` streams from the Hub instead of downloading everything.
    Raises UserError.
    """
    if files := locate(name):
        splits = {split: {str(path): functools.partial(read_rows, path, separator, path == files["train"][0])
                          for path in paths} for split, paths in files.items()}
    else:
        splits = open_hub(HUB.get(name, name), limited)
    return {split: functools.partial(read_texts, sources, separator) for split, sources in splits.items()}


def hold_out(splits: dict, max_stories: int | None, max_val_stories: int | None) -> tuple:
    """Returns two functions that start an iteration over the training and the validation stories.

    Without a validation split the last 5 % of the stories (at least one) are held out; of a single long text,
    its last 5 %. A training story that equals a validation story is left out.
    """
    whole, first = splits["train"], None
    if "validation" not in splits:
        n_stories = sum(1 for _ in progress(whole(), None, "counting stories"))
        if n_stories == 1:
            say("one long text: its last 5 % are held out")
            text = next(whole())
            end = len(text) * 95 // 100
            n_stories, whole = 2, lambda: filter(None, map(str.strip, (text[:end], text[end:])))
        first = n_stories * 95 // 100

    def training() -> Iterator[str]:
        unseen = (story for story in itertools.islice(whole(), first) if hash(story) not in seen)
        return itertools.islice(unseen, max_stories)

    def validation() -> Iterator[str]:
        held_out = itertools.islice(splits.get("validation", whole)(), first, None)
        return itertools.islice(held_out, max_val_stories)

    seen = set(map(hash, validation()))
    return training, validation


# ---------------------------------------------------------------- tokenizers

class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), lossless on any text.

    `tokens` are byte strings in the order of their ranks; end-of-text comes last. tiktoken does the encoding.
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
        """Returns GPT-2's tokenizer, cached in `data_dir` or downloaded. Raises UserError."""
        cache = os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(data_dir, "tiktoken")))
        try:
            encoding = within(20, tiktoken.get_encoding, "gpt2")  # which has no timeout
        except (OSError, ValueError, multiprocessing.TimeoutError) as error:
            raise UserError(
                f"GPT-2's vocabulary is not in {cache} and cannot be downloaded ({first_line(error)}); "
                "use training.tokenizer_type=bpe, or copy tiktoken's two cache files there") from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)], "gpt2")

    @classmethod
    def train(cls, stories: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns a vocabulary of `vocab_size` tokens: 256 bytes, merges, end-of-text; fewer if pairs run out.

        Again and again, the most frequent pair of tokens becomes a token; among equally frequent pairs, the
        lexicographically greatest pair of byte strings. A word is spelled as its tokens, "90z 9cz 9az". Each
        is hexadecimal, with 255 - b for every byte b and a final z, so that the greatest pair sorts first in
        a heap.
        """
        word_counts = Counter(word[0][:256] for story in stories  # longer words would be slow
                              for word in regex.finditer(cls.PATTERN, story))
        spelt = dict.fromkeys(word_counts, "")
        pair_counts, words_with, changed, heap = Counter(), defaultdict(set), set(), []

        def spell(word: str, spelling: str) -> None:
            changes = Counter(itertools.pairwise(spelling.split()))
            changes.subtract(itertools.pairwise(spelt[word].split()))
            spelt[word] = spelling
            for pair in filter(changes.get, changes):  # those whose count changes
                pair_counts[pair] += changes[pair] * word_counts[word]
                words_with[pair].add(word)
                changed.add(pair)

        numbers = [f"{255 - b:02x}z" for b in range(256)]
        for word in word_counts:
            spell(word, " ".join(map(numbers.__getitem__, word.encode())))
        tokens = dict.fromkeys(numbers)  # an ordered set
        for _ in progress(range(256, vocab_size - 1), None, "learning tokens"):
            for pair in filter(pair_counts.get, changed):
                heapq.heappush(heap, (-pair_counts[pair], pair))
            changed.clear()
            while heap and -heap[0][0] != pair_counts[heap[0][1]]:
                heapq.heappop(heap)  # its count has changed since
            if not heap:
                break
            left, right = pair = heap[0][1]
            token = left[:-1] + right
            tokens[token] = None
            for word in words_with.pop(pair):
                spell(word, re.sub(rf"\b{left} {right}", token, spelt[word]))
        return cls([bytes(255 - b for b in bytes.fromhex(token[:-1])) for token in tokens])

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Returns `encode(text)` as an array. This is twice as fast, and threads run in parallel."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # half a surrogate pair (a cut emoji), or too many blanks for the pattern
            pieces = re.split(r"(\s{10000})", text)
            return np.array([token for piece in pieces for token in self._encoding.encode_ordinary(piece)])

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode(list(map(int, tokens)))

    def decoder(self) -> Callable:
        """Returns a function from the next token to the text that it completes; None ends the text."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        token_bytes = self._encoding.decode_single_token_bytes
        return lambda token: decode(b"", True) if token is None else decode(token_bytes(int(token)))

    def spec(self) -> dict:
        return {"type": self.name, "tokens": b" ".join(map(base64.b64encode, self.ranks)).decode()}


class CharTokenizer(BPETokenizer):
    """A token for each character of the training stories, then unknown, then end-of-text."""

    PATTERN = r"(?s)."

    def __init__(self, characters: str):
        super().__init__([character.encode() for character in characters + UNKNOWN], "char")
        self.characters, self.unknown_id = characters, len(characters)
        self._unknown = re.compile(f"[^{re.escape(characters + UNKNOWN)}]")

    @classmethod
    def train(cls, stories: Iterable[str]) -> "CharTokenizer":
        """Returns a tokenizer of the characters in `stories`, at most as many as ids exist."""
        counts = Counter(itertools.chain.from_iterable(stories))
        del counts[UNKNOWN]
        return cls("".join(sorted(dict(counts.most_common(VOCAB_LIMIT - 2)))))

    def encode_array(self, text: str) -> np.ndarray:
        return super().encode_array(self._unknown.sub(UNKNOWN, text))

    def unknown(self, text: str) -> list[str]:
        """Returns the characters of `text` that the tokenizer cannot represent."""
        return sorted(set(self._unknown.findall(text)))

    def spec(self) -> dict:
        return {"type": "char", "characters": self.characters}


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

    def head(self, limit: int | None, tokenizer) -> tuple:
        """Returns the whole stories in the first `limit` tokens (all of these if no story ends), and their
        size in bytes.
        """
        ends = np.flatnonzero(self.tokens[:limit] == tokenizer.eot_id) + 1
        tokens = self.tokens[:max(ends, default=limit)]
        return tokens, len(tokenizer.decode(tokens).encode()) - len(ends) * len(END_OF_TEXT)


def encode_stories(stories: Iterable[str], tokenizer, write: Callable) -> dict:
    """Encodes stories, each followed by end-of-text, on all cores, and passes them in order to `write` as
    uint16 arrays. Returns counts and hash of what was written. Some thousand stories are in memory.
    """
    def encode(story: str) -> np.ndarray:
        return np.append(tokenizer.encode_array(story).astype(np.uint16), np.uint16(tokenizer.eot_id))

    stories, digest, counts = iter(stories), hashlib.sha256(), Counter(stories=0, tokens=0, bytes=0)
    with ThreadPool() as pool:
        while group := list(itertools.islice(stories, 4096)):
            tokens = np.concatenate(pool.map(encode, group, 64))
            write(tokens)
            digest.update(tokens)
            counts.update(stories=len(group), tokens=len(tokens),
                          bytes=sum(len(story.encode()) for story in group))
    return {**counts, "sha256": digest.hexdigest()}


def make_tokenizer(request: dict, data_dir: Path, stories: Callable):
    """Returns the tokenizer that a request names, trained on the stories if need be. Raises UserError."""
    kind = request["tokenizer_type"]
    if kind == "gpt2":
        return BPETokenizer.gpt2(data_dir)
    shown = progress(stories(), request["max_stories"], "reading stories for the tokenizer")
    if kind == "char":
        return CharTokenizer.train(shown)
    return BPETokenizer.train(shown, request["bpe_vocab_size"])


def build_streams(stem: Path, dataset: str, request: dict, tokenizer) -> None:
    """Writes the two streams and, last, the JSON that describes them. Raises UserError."""
    limits = request["max_stories"], request["max_val_stories"]
    stories = hold_out(open_dataset(dataset, limits[0] is not None, request["separator"]), *limits)
    tokenizer = tokenizer or make_tokenizer(request, stem.parent, stories[0])
    spec = tokenizer.spec()
    description = {"request": request, "tokenizer": spec}
    for split, begin, limit in zip(SPLITS, stories, limits):
        with atomic_write(Path(f"{stem}-{split}.bin")) as file:
            shown = progress(begin(), limit, f"tokenizing {split} stories")
            counts = encode_stories(shown, tokenizer, file.write)
            if not counts["stories"]:
                raise UserError(f"data.dataset = {dataset!r} has no story for the {split} split that is not "
                                "empty or in the other one; it needs at least two different ones, in a text "
                                f"with a line {request['separator']!r} between them")
        description[split] = {"dataset": dataset, "split": split, **counts, "tokenizer": json_hash(spec)}
    with atomic_write(Path(f"{stem}.json")) as file:
        file.write(json.dumps(description | {"sha256": json_hash(description)}, indent=1).encode())


def find_streams(folder: Path, wanted: dict | list) -> tuple | None:
    """Returns (tokenizer, train stream, validation stream) of the first undamaged streams in the folder that
    have the `wanted` request or content, or None.
    """
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(Exception):  # of any kind, if the JSON file is something else
            found = json.loads(path.read_text())
            if found.pop("sha256") == json_hash(found) and wanted in (found["request"], content(found)):
                streams = [Stream(np.memmap(path.with_name(f"{path.stem}-{split}.bin"), np.uint16, "c"),
                                  found[split]) for split in SPLITS]
                if content(found) == [hashlib.sha256(stream.tokens).hexdigest() for stream in streams]:
                    return tokenizer_from_spec(found["tokenizer"]), *streams
    return None


def content(dataset: dict) -> list[str]:
    """Returns the SHA-256 of the tokens of each split, from {split: info} as in a checkpoint."""
    return [dataset[split]["sha256"] for split in SPLITS]


def prepare(config: Config, checkpoint: dict | None = None, tokenizer=None) -> tuple:
    """Returns (tokenizer, train stream, validation stream); builds them if `data_dir` does not hold them yet.

    `auto` means what it meant when the checkpoint's run began. Without a checkpoint it is TinyStories. If
    that cannot be reached, it is the bundled stories, with a warning, and with the bpe tokenizer if GPT-2's
    cannot be had either. The streams' `info` says what was used. A `tokenizer` that is given is used as it
    is. Raises UserError.
    """
    dataset, kind = config.data.dataset, config.training.tokenizer_type
    if checkpoint:
        trained = checkpoint["dataset"]["train"]["dataset"]
        if checkpoint.get("origin"):  # the run began from another's weights, and has its tokenizer
            tokenizer = tokenizer_from_spec(checkpoint["tokenizer"])
        if dataset == checkpoint["config"]["data"]["dataset"] == "auto":
            dataset, kind = trained, checkpoint["tokenizer"]["type"]
        if Path(dataset).name == Path(trained).name and not os.path.lexists(dataset):  # or on the Hub
            if found := find_streams(Path(config.data.data_dir), content(checkpoint["dataset"])):
                say(f"using the streams of {dataset} in {config.data.data_dir}")
                return found
    try:
        return prepare_streams(config, "tinystories" if dataset == "auto" else dataset, kind, tokenizer)
    except DatasetUnavailable as error:
        if dataset != "auto":
            raise
        reason = error
    try:
        prepared = prepare_streams(config, "sample", kind, tokenizer)
    except UserError as error:
        prepared, reason = prepare_streams(config, "sample", "bpe", tokenizer), f"{reason}; {error}"
    say(f"{'!' * 100}\nWARNING: not TinyStories: {reason}.\nWARNING: using the {SAMPLE.name} that come with "
        f"the project (data.dataset=sample) and the {prepared[0].name} tokenizer: good to try things out, "
        f"too few to learn well from.\n{'!' * 100}")
    return prepared


def prepare_streams(config: Config, dataset: str, kind: str, tokenizer) -> tuple:
    """`prepare` without fallbacks. Streams that exist already are only read."""
    data, folder, files = config.data, Path(config.data.data_dir), locate(dataset)
    source = files and {split: [p.suffix.lower() + file_hash(p) for p in files[split]] for split in files}
    request = {"dataset": source or dataset, "max_stories": data.max_stories,  # wherever its files lie
               "max_val_stories": data.max_val_stories, "separator": data.separator, "tokenizer_type": kind}
    if kind == "bpe":
        request["bpe_vocab_size"] = config.training.bpe_vocab_size
    if tokenizer:
        request["tokenizer"] = json_hash(tokenizer.spec())
    if not (found := find_streams(folder, request)):
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(dataset).stem)[:40]
        build_streams(folder / f"{name}-{json_hash(request)}-{kind}", dataset, request, tokenizer)
        found = find_streams(folder, request)
    for stream in found[1:]:
        stream.info["dataset"] = dataset  # its name today
    return found


# ---------------------------------------------------------------- batches

@dataclass
class Batches:
    """Training batches as a pure function of (seed, step), so that resuming needs only the step.

    In every epoch the stories are laid end to end in a random order, as a ring, which is divided into equal
    parts of at most T tokens. The window of a part is the T tokens from the first story that begins in it,
    so that every story is read once from its beginning; where none begins, from where the part begins.
    Of the `world` processes that share a batch, each has its own part of the windows.
    """

    tokens: np.ndarray  # (N,) uint16
    eot_id: int
    batch_size: int
    seq_len: int
    seed: int
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        n_tokens, seq_len = len(self.tokens), self.seq_len
        if n_tokens <= seq_len:
            raise UserError(f"the training stories have {n_tokens:,} tokens, fewer than one window of "
                            f"model.max_seq_len = {seq_len:,}; use more stories or a shorter context")
        self.windows_per_epoch = -(-n_tokens // seq_len)
        self.steps_per_epoch = self.windows_per_epoch / self.batch_size
        ends = np.flatnonzero(self.tokens[:-1] == self.eot_id) + 1
        self.stories = np.stack((np.append(0, ends), np.append(ends, n_tokens)), axis=1)  # (start, end)
        self._ring = functools.lru_cache(2)(self._ring)

    def at(self, step: int) -> tuple:
        """Returns tokens and targets (B, T) int64, on the device, of step `step`: this process's part."""
        windows = self.tokens[self.positions(step)[self.rank::self.world]].astype(np.int64)
        windows = torch.from_numpy(windows).to(self.device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]

    def positions(self, step: int) -> np.ndarray:
        """Returns the positions in the stream (B, T + 1) of the windows of step `step`, and before each of
        them that of one more token: end-of-text, where a story begins.
        """
        first, n = step * self.batch_size, self.windows_per_epoch
        return np.stack([self._window(*divmod(i, n)) for i in range(first, first + self.batch_size)])

    def _window(self, epoch: int, i: int) -> np.ndarray:
        firsts, begins, shifts = self._ring(epoch)
        ring = (firsts[i] - 1 + np.arange(self.seq_len + 1)) % len(self.tokens)
        return ring + shifts[np.searchsorted(begins, ring, side="right") - 1]

    def _ring(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns where an epoch's windows begin on the ring, in their order; where the stories begin on it;
        and how much further on each of these lies in the stream.
        """
        rng = np.random.default_rng([self.seed, epoch])
        n_tokens, n = len(self.tokens), self.windows_per_epoch
        sources, ends = rng.permutation(self.stories).T
        begins = np.cumsum(ends - sources) - (ends - sources)
        bounds = rng.integers(n_tokens) + np.arange(n + 1) * n_tokens // n  # of the parts
        twice_round = np.concatenate((begins, begins + n_tokens, [2 * n_tokens]))
        story = twice_round[np.searchsorted(twice_round, bounds[:-1])]  # the next to begin
        return rng.permutation(np.where(story < bounds[1:], story, bounds[:-1])), begins, sources - begins


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_write(path: Path, size: int = 0, keep: Path | None = None):
    """Yields a binary file that becomes `path` once it is complete and on disk, and not before.

    `size` is the whole size in bytes, where it is known, for the message where the disk is full. The old file
    becomes `keep`, if given. Raises UserError.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # its own, if two write the same
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


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Writes a checkpoint atomically; the old file becomes `keep`. Raises UserError where the disk is full.

    The file is torch.save's and, after it, its SHA-256, which torch.load ignores; `load_checkpoint` does not.
    """
    buffer = io.BytesIO()  # not the file itself: torch.save hides why it could not write
    torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, buffer)
    content = buffer.getbuffer()
    with atomic_write(path, len(content), keep) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Returns the checkpoint at `path`, its tensors on `device`. Code in the file does not run. Raises
    UserError where it is missing, of another format, or a bit has changed: torch.load might not notice.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-32]).digest() != content[-32:]:
            raise ValueError("its SHA-256 does not match")
        checkpoint = dict(torch.load(io.BytesIO(content), map_location=device, weights_only=True))
        version = checkpoint["format"]
    except PermissionError:  # it may be good
        raise
    except Exception as error:  # whatever torch makes of a damaged or crafted file
        reason = first_line(error)[:120]
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error
    if version != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has format {version}, and this version of the project reads only format "
                        f"{CHECKPOINT_FORMAT}: train again, or use the version that wrote it")
    return checkpoint


def best_model(path: str | Path) -> Path:
    """Returns the checkpoint that a path means: a file, or best_model.pt of a folder."""
    return Path(path, "best_model.pt") if Path(path).is_dir() else Path(path)


def write_error(path: Path, error: OSError, size: int = 1) -> UserError:
    """The sentence for a file of `size` bytes that could not be written, and why."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"cannot write {path}: {error.strerror or error}")
    free = shutil.disk_usage(path.parent).free / 1e6
    return UserError(f"cannot write {path}: {error.strerror}; about {size / 1e6 + 0.05:.1f} MB are "
                     f"needed and {free:.1f} MB are free; make space and run the same command again")


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_hash(value) -> str:
    """The identity of a tokenizer's spec or of any other JSON value, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def first_line(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]


def say(message: str) -> None:
    """Prints a line of progress on standard error, above a progress bar; the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # nobody listens any more
            (tqdm.write if sys.stderr.isatty() else print)(message, file=sys.stderr)


say_once = functools.cache(say)  # while the process lives


def progress(iterable: Iterable, total: int | None, description: str) -> tqdm:
    """A progress bar on standard error, for what takes over a second; a line now and then in a log file."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(iterable, description, total, unit="", delay=1, mininterval=interval)


# ---------------------------------------------------------------- command line

def main() -> None:
    settings, _ = ArgumentParser("Prepares the stories that train.py would use.").configure(config)
    tokenizer, *streams = prepare(settings)
    for stream in streams:
        print("{dataset}, {split}: {stories:,} stories, {tokens:,} tokens, {bytes:,} bytes".format(
            **stream.info))
    print(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    run_main(main)
