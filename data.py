"""Stories -> tokenizer -> token stream -> batches.

`prepare(config)` turns a dataset into two streams of uint16 tokens on disk, every story followed by end-of-text, and
`Batches` reads training batches from one. `python data.py` prepares and describes them.
"""

import base64
import concurrent.futures
import contextlib
import copy
import errno
import hashlib
import itertools
import json
import math
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
from tqdm import tqdm

from config import ArgumentParser, Config, UserError, config, run_main

END_OF_TEXT = "<|endoftext|>"
SAMPLE = Path(__file__).parent / "data" / "sample_stories.txt"
SPLITS = ("train", "validation")


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_write(path: Path, size: int = 0, keep: Path | None = None):
    """Yields a binary file that becomes `path` once it is complete and on disk; until then `path` stays as it was.

    `size` is the whole size in bytes, where it is known, for the message where the disk is full. The old file becomes
    `keep`, if given. Raises UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        needed = max(size, 1 + (temporary.stat().st_size if temporary.exists() else 0))
        temporary.unlink(missing_ok=True)  # before the free space is measured
        raise write_error(path, error, needed) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError, needed: int = 1) -> UserError:
    """The sentence for a file that could not be written: which, why, and how much space is missing, in bytes."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"cannot write {path}: {error.strerror or error}")
    return UserError(f"cannot write {path}: {error.strerror}; about {math.ceil(needed / 1e5) / 10} MB are needed and "
                     f"{shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free; make space and run the same command again")


def progress(iterable: Iterable, total: int | None, description: str, unit: str) -> tqdm:
    """A progress bar on standard error, for what takes longer than a second; a line now and then in a log file."""
    return tqdm(iterable, description, total, unit=f" {unit}", delay=1, mininterval=0.2 if sys.stderr.isatty() else 30)


# ---------------------------------------------------------------- tokenizers

class CharTokenizer:
    """One token for each character of the training stories, then one for unknown characters, then end-of-text."""

    def __init__(self, characters: str):
        self.characters = characters
        self.unknown_id, self.eot_id = len(characters), len(characters) + 1
        self.vocab_size = len(characters) + 2
        self.name = "char"
        self._ids = np.full(0x110000, self.unknown_id, dtype=np.uint32)  # of every code point
        self._ids[self._code_points(characters)] = np.arange(len(characters))

    @classmethod
    def train(cls, stories: Iterable[str]) -> "CharTokenizer":
        """Returns the tokenizer of the characters in `stories`, in code-point order."""
        return cls("".join(sorted(set(itertools.chain.from_iterable(stories)))))

    @staticmethod
    def _code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)

    def encode_array(self, text: str) -> np.ndarray:
        return self._ids[self._code_points(text)]

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        vocabulary = [*self.characters, "\ufffd", END_OF_TEXT]
        return "".join(vocabulary[int(t)] for t in tokens)

    def unknown(self, text: str) -> list[str]:
        """Returns the characters of `text` that the tokenizer cannot represent."""
        return sorted(set(text) - set(self.characters))

    def spec(self) -> dict:
        return {"type": "char", "characters": self.characters}


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), lossless on any text.

    `tokens` are byte strings in the order of their ranks; end-of-text comes after them. Encoding is tiktoken's.
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
    def gpt2(cls, data_dir: str) -> "BPETokenizer":
        """Returns GPT-2's tokenizer, from tiktoken's cache under `data_dir` or the network. Raises TokenizerUnavailable."""
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(data_dir, "tiktoken")))
        cache, host = Path(os.environ["TIKTOKEN_CACHE_DIR"]), "https://openaipublic.blob.core.windows.net"
        urls = [f"{host}/gpt-2/encodings/main/{name}" for name in ("vocab.bpe", "encoder.json")]
        cached = all((cache / hashlib.sha1(url.encode()).hexdigest()).exists() for url in urls)  # tiktoken's file names
        try:
            if not cached and not reachable(host):  # tiktoken has no timeout
                raise OSError(f"{host} cannot be reached")
            encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:
            raise TokenizerUnavailable(
                f"GPT-2's vocabulary is not in {cache} and cannot be downloaded ({_first_line(error)}); "
                "use training.tokenizer_type=bpe, or copy tiktoken's two cache files there") from error
        return cls([encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)], "gpt2")

    @classmethod
    def train(cls, stories: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Returns a tokenizer of `vocab_size` tokens (256 bytes, merges, end-of-text), fewer if the text has fewer pairs.

        Merges the most frequent pair again and again; of equally frequent ones the lexicographically greatest pair of
        byte strings. Counts are kept per distinct word and changed only where a merge applies.
        """
        split = regex.compile(cls.PATTERN).findall
        word_counts = Counter(itertools.chain.from_iterable(map(split, stories)))
        words = [[bytes([b]) for b in word.encode("utf-8", "replace")] for word in word_counts]
        counts = list(word_counts.values())

        pair_counts, words_with = Counter(), defaultdict(set)
        for i, word in enumerate(words):
            for pair in itertools.pairwise(word):
                pair_counts[pair] += counts[i]
                words_with[pair].add(i)

        tokens = {bytes([b]): None for b in range(256)}  # an ordered set
        while len(tokens) < vocab_size - 1 and pair_counts:
            highest = max(pair_counts.values())
            best = max(pair for pair, count in pair_counts.items() if count == highest)
            tokens[best[0] + best[1]] = None
            for i in words_with.pop(best):
                for pair in itertools.pairwise(words[i]):
                    pair_counts[pair] -= counts[i]
                    if not pair_counts[pair]:
                        del pair_counts[pair]
                _merge(words[i], best)
                for pair in itertools.pairwise(words[i]):
                    pair_counts[pair] += counts[i]
                    words_with[pair].add(i)
        return cls(list(tokens))

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """Returns `encode(text)` as an array: twice as fast, and threads run side by side."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair, as a cut emoji in a JSON file; `encode` replaces it
            return np.array(self.encode(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode([int(t) for t in tokens])

    def unknown(self, text: str) -> list[str]:
        return []

    def spec(self) -> dict:
        return {"type": self.name, "tokens": " ".join(base64.b64encode(token).decode() for token in self.ranks)}


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Merges the pair in the word, from the left, wherever it occurs."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i:i + 2] = [pair[0] + pair[1]]
        i += 1


def tokenizer_from_spec(spec: dict) -> CharTokenizer | BPETokenizer:
    """Rebuilds the tokenizer that returned this `spec()`; needs no file and no network."""
    if spec["type"] == "char":
        return CharTokenizer(spec["characters"])
    return BPETokenizer([base64.b64decode(token) for token in spec["tokens"].split(" ")], spec["type"])


def spec_hash(spec: dict) -> str:
    """The identity of a tokenizer or of any other JSON object, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- datasets

class DatasetUnavailable(UserError):
    """The dataset cannot be reached: `auto` falls back, a dataset named explicitly is an error."""


class TokenizerUnavailable(UserError):
    """GPT-2's vocabulary cannot be had."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reachable(url: str, seconds: float = 6) -> bool:
    """Whether a server answers within `seconds`, whatever it answers; name resolution that hangs counts as no."""
    import requests  # comes with datasets; imported only where it is used

    answers = []

    def ask():
        with contextlib.suppress(OSError, ValueError):  # requests' exceptions are OSErrors; ValueError: no address at all
            answers.append(requests.head(url, timeout=seconds))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return len(answers) > 0


def read_stories(path: Path) -> Iterator[str]:
    """Yields the stories of a text file, separated by lines `<|endoftext|>`, stripped, empty ones left out."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for separator, lines in itertools.groupby(file, key=lambda line: line.strip() == END_OF_TEXT):
                if not separator and (story := "".join(lines).strip()):
                    yield story
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} after about {error.start} bytes); convert it") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def locate(name: str) -> Path | None:
    """Returns the file or folder of a local dataset, None for one of the Hub's. Raises UserError where it is neither."""
    path = SAMPLE if name == "sample" else Path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".txt"):
        return path
    if path.is_file():
        raise UserError(f"data.dataset = {name!r} is not a .txt file; parquet or json files are read as a whole folder")
    if path.suffix in (".txt", ".json", ".jsonl", ".parquet", ".csv"):
        raise UserError(f"data.dataset = {name!r} does not exist")
    if name != "tinystories" and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"data.dataset = {name!r} is not auto, tinystories or sample, no file, no folder, "
                        "and not the name of a Hub dataset such as roneneldan/TinyStories")
    return None


def open_dataset(name: str, limited: bool) -> dict[str, Callable[[], Iterator[str]]]:
    """Returns {"train": stories, "validation": stories}, functions that start an iteration; a dataset with no validation
    split of its own has only "train". `limited`: stream from the Hub instead of downloading all of it. Raises UserError.
    """
    path = locate(name)
    if path and path.is_file():
        return {"train": lambda: read_stories(path)}
    name = "roneneldan/TinyStories" if name == "tinystories" else name
    offline = path is None and (os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
                                or not reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")))
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: an earlier download serves, at once
    import datasets  # takes a second: imported only where it is used

    try:
        splits = datasets.load_dataset(name, streaming=path is not None or (limited and not offline))
        columns = next(iter(splits.values())).column_names
    except Exception as error:  # datasets raises many kinds
        reason = "no answer from the Hub and no earlier download" if offline else _first_line(error)
        raise DatasetUnavailable(f"cannot load the dataset {name!r}: {reason}") from error
    if "train" not in splits or (columns is not None and "text" not in columns):
        raise UserError(f"the dataset {name!r} must have a split 'train' with a column 'text'; it has the splits "
                        f"{', '.join(splits)} and the columns {', '.join(columns or ['?'])}")

    def stories(split: str) -> Iterator[str]:
        try:
            for rows in splits[split].iter(batch_size=1000):
                yield from (story for text in rows["text"] if (story := (text or "").strip()))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DatasetUnavailable(f"reading the dataset {name!r} failed: {_first_line(error)}") from error

    validation = next((split for split in ("validation", "valid", "val") if split in splits), None)
    return {"train": lambda: stories("train")} | ({"validation": lambda: stories(validation)} if validation else {})


def hold_out(splits: dict, max_stories: int | None, max_val_stories: int | None) -> tuple[Callable, Callable]:
    """Returns two functions that start an iteration over the training and the validation stories.

    Without a validation split, the last 5 % of the stories (at least one) are held out. A training story that is also
    a validation story, word for word, is left out.
    """
    n_training = None  # all
    if "validation" not in splits:
        n_stories = sum(1 for _ in progress(splits["train"](), None, "counting stories", "stories"))
        n_training = max(0, n_stories - max(1, round(0.05 * n_stories)))

    def validation() -> Iterator[str]:
        held_out = splits["validation"]() if n_training is None else itertools.islice(splits["train"](), n_training, None)
        return itertools.islice(held_out, max_val_stories)

    def digest(story: str) -> bytes:
        return hashlib.blake2b(story.encode("utf-8", "replace"), digest_size=16).digest()

    seen = {digest(story) for story in validation()}

    def training() -> Iterator[str]:
        candidates = itertools.islice(splits["train"](), n_training)
        return itertools.islice((story for story in candidates if digest(story) not in seen), max_stories)

    return training, validation


# ---------------------------------------------------------------- token streams

@dataclass
class Stream:
    """A split as one array of tokens, every story followed by end-of-text."""
    tokens: np.ndarray  # (N,) uint16, a copy-on-write memmap
    info: dict  # dataset, split, stories, tokens, bytes (UTF-8, of the stories), sha256 (of the tokens), tokenizer (hash)


def encode_stories(stories: Iterable[str], tokenizer, write: Callable[[bytes], object]) -> dict:
    """Encodes stories, each followed by end-of-text, on all cores and hands them in their order to `write` as uint16 bytes.

    Returns the counts and the hash of what was written. At most a thousand stories per core are in memory.
    """
    end = np.array([tokenizer.eot_id])

    def encode(batch: list[str]) -> tuple[np.ndarray, int]:
        pieces = [piece for story in batch for piece in (tokenizer.encode_array(story), end)]
        return np.concatenate(pieces, dtype=np.uint16, casting="unsafe"), sum(len(s.encode("utf-8", "replace")) for s in batch)

    stories, digest, n_threads = iter(stories), hashlib.sha256(), os.cpu_count() or 1
    n_stories = n_tokens = n_bytes = 0
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        while group := list(itertools.islice(stories, 1024 * n_threads)):
            n_stories += len(group)
            for tokens, size in pool.map(encode, [group[i:i + 64] for i in range(0, len(group), 64)]):
                write(tokens.tobytes())
                digest.update(tokens)
                n_tokens += len(tokens)
                n_bytes += size
    return {"stories": n_stories, "tokens": n_tokens, "bytes": n_bytes, "sha256": digest.hexdigest()}


def _build(stem: Path, request: dict) -> tuple:
    """Writes the two streams and, last, the JSON that describes them; returns what `_open` does."""
    dataset, max_stories, max_val_stories = request["dataset"], request["max_stories"], request["max_val_stories"]
    training, validation = hold_out(open_dataset(dataset, limited=max_stories is not None), max_stories, max_val_stories)
    if request["tokenizer_type"] == "gpt2":
        tokenizer = BPETokenizer.gpt2(stem.parent)
    else:
        stories = progress(training(), max_stories, "training the tokenizer", "stories")
        tokenizer = (CharTokenizer.train(stories) if request["tokenizer_type"] == "char"
                     else BPETokenizer.train(stories, request["bpe_vocab_size"]))
    if tokenizer.vocab_size > 2**16:
        raise UserError(f"the {tokenizer.name} tokenizer would have {tokenizer.vocab_size:,} tokens and a stream of uint16 "
                        f"can have {2**16:,}; use training.tokenizer_type=bpe")
    spec, streams = tokenizer.spec(), []
    description = {"request": request, "tokenizer": spec}
    for split, stories, limit in zip(SPLITS, (training(), validation()), (max_stories, max_val_stories)):
        path = Path(f"{stem}-{split}.bin")
        with atomic_write(path) as file:
            counts = encode_stories(progress(stories, limit, f"tokenizing {split}", "stories"), tokenizer, file.write)
            if not counts["stories"]:
                raise UserError(f"data.dataset = {dataset!r} has no stories for the {split} split; it needs at least two "
                                "different ones")
        description[split] = {"dataset": dataset, "split": split, **counts, "tokenizer": spec_hash(spec)}
        streams.append(Stream(np.memmap(path, np.uint16, "c"), description[split]))
    with atomic_write(stem.with_suffix(".json")) as file:
        file.write(json.dumps(description | {"sha256": spec_hash(description)}, indent=1).encode())
    return tokenizer, *streams


def _open(stem: Path, request: dict) -> tuple | None:
    """Returns (tokenizer, train stream, validation stream) if they answer the request and are whole, else None."""
    try:
        description = json.loads(stem.with_suffix(".json").read_text())
        if description.pop("sha256") != spec_hash(description) or description["request"] != request:
            return None
        streams = []
        for split in SPLITS:
            path = Path(f"{stem}-{split}.bin")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != description[split]["sha256"]:
                    return None
            streams.append(Stream(np.memmap(path, np.uint16, "c"), description[split]))
        return tokenizer_from_spec(description["tokenizer"]), *streams
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fingerprint(dataset: str) -> str | None:
    """What changes when a local dataset does: the hash of a file, the names, sizes and times of a folder."""
    path = locate(dataset)
    if path is None:
        return None
    if path.is_dir():
        files = sorted((str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns)
                       for p in path.rglob("*") if p.is_file())
        return hashlib.sha256(repr(files).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(config: Config) -> tuple:
    """Returns (tokenizer, train stream, validation stream), built where `data_dir` does not hold them yet. Raises UserError.

    `auto` is TinyStories; where that cannot be reached, the bundled stories, with a warning; if GPT-2's vocabulary is out
    of reach, too, the bpe tokenizer. The streams' `info` says what they really are.
    """
    if config.data.dataset != "auto":
        return _prepare(config)
    config = copy.deepcopy(config)
    config.data.dataset = "tinystories"
    try:
        return _prepare(config)
    except DatasetUnavailable as error:
        reason = str(error)
    config.data.dataset = "sample"
    try:
        prepared = _prepare(config)
    except TokenizerUnavailable as error:
        config.training.tokenizer_type = "bpe"
        prepared, reason = _prepare(config), f"{reason}; {error}"
    rule = "!" * 100
    print(f"{rule}\nWARNING: not TinyStories: {reason}.\nWARNING: using the {SAMPLE.name} that come with the project "
          f"(data.dataset=sample) and the {prepared[0].name} tokenizer: good to try things out, too few to learn well from."
          f"\n{rule}", file=sys.stderr)
    return prepared


def _prepare(config: Config) -> tuple:
    data, training = config.data, config.training
    request = {"dataset": data.dataset, "fingerprint": _fingerprint(data.dataset), "max_stories": data.max_stories,
               "max_val_stories": data.max_val_stories, "tokenizer_type": training.tokenizer_type}
    kind = training.tokenizer_type
    if kind == "bpe":
        request["bpe_vocab_size"] = training.bpe_vocab_size
        kind += str(training.bpe_vocab_size)
    stem = Path(data.data_dir, f"{re.sub(r'[^A-Za-z0-9]+', '-', data.dataset).strip('-')}-{kind}")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(stem.with_name(".lock")):  # several processes may prepare the same streams
            return _open(stem, request) or _build(stem, request)
    except OSError as error:
        raise write_error(stem.parent, error) from error


# ---------------------------------------------------------------- batches

class Batches:
    """Training batches as a pure function of (seed, step), so that resuming needs only the step.

    In every epoch the stream is cut into non-overlapping windows at a random offset, and each window is used once.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seq_len: int, seed: int):
        if len(tokens) <= seq_len:
            raise UserError(f"the training stories have {len(tokens):,} tokens, fewer than one window of "
                            f"model.max_seq_len = {seq_len:,}; use more stories or a shorter context")
        self.tokens, self.batch_size, self.seq_len, self.seed = tokens, batch_size, seq_len, seed
        self.windows_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        self._starts = {}

    def epoch(self, step: int) -> float:
        """Returns the number of passes over the data before update `step`."""
        return step * self.batch_size / self.windows_per_epoch

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        if epoch not in self._starts:
            rng = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - self.windows_per_epoch * self.seq_len
            offset = rng.integers(min(self.seq_len, spare))
            self._starts = {epoch: offset + self.seq_len * rng.permutation(self.windows_per_epoch)}
        return self._starts[epoch]

    def starts(self, step: int) -> np.ndarray:
        """Returns the (B,) positions in the stream at which the sequences of update `step` begin."""
        index = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, position = np.divmod(index, self.windows_per_epoch)
        return np.array([self._epoch_starts(e)[p] for e, p in zip(epochs.tolist(), position.tolist())])


def main() -> None:
    ArgumentParser("Prepares the stories that train.py would use, and describes them.").configure(config)
    tokenizer, train, validation = prepare(config)
    for stream in (train, validation):
        info = stream.info
        print(f"{info['dataset']}, {info['split']}: {info['stories']:,} stories, {info['tokens']:,} tokens, {info['bytes']:,} "
              f"bytes, {info['bytes'] / info['tokens']:.2f} bytes per token")
    print(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens")
    batches = Batches(train.tokens, config.training.batch_size, config.model.max_seq_len, config.training.seed)
    start = batches.starts(0)[0]
    print(f"\nthe first window of the first update, {batches.seq_len} tokens:\n")
    print(tokenizer.decode(train.tokens[start:start + batches.seq_len]))


if __name__ == "__main__":
    run_main(main)
