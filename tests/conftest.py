"""What the tests share: tiny models, tiny runs, processes that die, and how two runs are compared.

Most runs here are in this process; where it must really die, or be two, it is forked, which spares the import
of torch. kill_harness.py uses the same parts with a new process for each start.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIKTOKEN_CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or ROOT.parent / "shared" / "tiktoken")
if TIKTOKEN_CACHE.is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(TIKTOKEN_CACHE)
sys.path.insert(0, str(ROOT))

import torch

import data
import train
from config import Config, ModelConfig, run_main
from model import Transformer

torch.set_num_threads(1)  # the fastest for models as small as these

needs_gpt2 = pytest.mark.skipif(not TIKTOKEN_CACHE.is_dir(), reason="GPT-2's vocabulary is not here")
TINY = {
    "model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.d_ff": 32, "model.max_seq_len": 32,
    "training.tokenizer_type": "char", "training.batch_size": 4, "training.max_steps": 24,
    "training.warmup_steps": 3, "training.eval_interval": 4, "training.eval_batches": 1,
    "training.checkpoint_interval": 3, "training.use_amp": False, "training.device": "cpu",
}
TIMES = ("timestamp", "elapsed_seconds", "tokens_per_second")


# ---------------------------------------------------------------- small things to test with

def make_model(vocab_size: int, **settings) -> Transformer:
    """A small model, in evaluation mode, whose weights are large enough to make every part matter."""
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 48, "max_seq_len": 48}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape | settings), vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def make_qwen3(ours: Transformer):
    """The same model as transformers has it, with the same weights."""
    transformers, m = pytest.importorskip("transformers"), ours.config
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=ours.vocab_size, hidden_size=m.d_model, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.n_heads, head_dim=m.d_model // m.n_heads,
        intermediate_size=m.d_ff, max_position_embeddings=m.max_seq_len, rms_norm_eps=1e-6,
        rope_theta=10_000.0, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)).eval()
    theirs.model.load_state_dict(ours.state_dict())
    return theirs


def write_stories(path: Path, stories: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"\n{data.END_OF_TEXT}\n".join(stories) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """The bundled stories."""
    return list(data.open_dataset("sample", True)["train"]())


def tiny_config(folder: Path, **settings) -> Config:
    """A run in `folder` that takes a fraction of a second; `model__d_model=8` sets model.d_model."""
    dataset = folder / "stories.txt"
    if not dataset.exists():
        whole = itertools.islice(data.open_dataset("sample", True)["train"](), 60)
        write_stories(dataset, [story[:200].strip() for story in whole])
    made = Config()
    folders = {"data.dataset": dataset, "data.data_dir": folder / "data",
               "training.checkpoint_dir": folder / "checkpoints", "training.log_dir": folder / "logs"}
    for name, value in (TINY | {k: str(v) for k, v in folders.items()}).items():
        made.set(name, value)
    for name, value in settings.items():
        made.set(name.replace("__", "."), value)
    made.validate()
    return made


def command_line(config: Config) -> list[str]:
    return [f"{name}={value}" for name, value in config.flat().items()]


def run_script(script: str, *arguments: str, cwd: Path, without: tuple = (),
               **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of the project in `cwd`; returns the finished process and what it printed, as text."""
    kept = {k: v for k, v in os.environ.items() if k not in without}
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True,
                          encoding="utf-8", env=kept | environment, timeout=60)


# ---------------------------------------------------------------- runs in this process

@pytest.fixture
def one_process(monkeypatch):
    """For tests of runs: signal handlers come back; no story is told, which is half of the time."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(train, "tell_story", lambda *args, **kwargs: "")
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def opened(config: Config, fresh: bool = False):
    """A Run whose locks end with the block."""
    run = train.Run(config, train.Machine(config.training), fresh)
    with run.locks:
        yield run


def go(config: Config, fresh: bool = False, clock=time.perf_counter) -> train.Run:
    """Trains as main() does, from the last checkpoint on; the exit code is in `run.code`."""
    with opened(config, fresh) as run:
        train.describe(run)
        run.code = train.train(run, clock)
        return run


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


@contextlib.contextmanager
def before_step(step: int, act):
    """Calls act() when step number `step` begins."""
    next_step = train.next_step

    def patched(run):
        if run.state.step + 1 == step:
            act()
        return next_step(run)

    train.next_step = patched
    try:
        yield
    finally:
        train.next_step = next_step


def raises(error: BaseException):
    def act(*args, **kwargs):
        raise error
    return act


def signals(*numbers: int):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)
    return act


def stop_after(config: Config, step: int) -> train.Run:
    """Trains until SIGTERM, which comes during step number `step`."""
    with before_step(step, signals(signal.SIGTERM)):
        run = go(config)
    assert run.code == 143 and run.state.step == step
    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    go(tiny_config(folder))
    return folder


@pytest.fixture(scope="session")
def stopped(tmp_path_factory) -> Path:
    """The folder of the same run, stopped after step 10."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(tiny_config(folder), 10)
    return folder


@pytest.fixture
def halfway(stopped, tmp_path) -> tuple[Path, Config]:
    """A copy of the stopped run, and the config to go on with."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    return folder, tiny_config(folder, data__dataset=str(stopped / "stories.txt"))


# ---------------------------------------------------------------- runs in processes that die

def forked(work) -> int:
    """Calls work() in a copy of this process, which exits with work's code, as run_main. Returns its id."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        run_main(work)
    except SystemExit as error:
        code = error.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_code(pid: int, seconds: float = 60) -> int:
    """Waits for a process of ours; one that hangs is killed, and -9 comes back."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


# ---------------------------------------------------------------- how runs are compared

def snapshot(*folders: Path) -> dict:
    """Every file and its bytes, locks and whose they are aside."""
    paths = (p for folder in folders for p in folder.rglob("*") if p.name not in (".lock", ".owner"))
    return {p: p.read_bytes() for p in paths if p.is_file()}


def metrics(folder: Path) -> list[dict]:
    """The metrics of a run, times aside."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def flatten(value, name: str = "") -> dict:
    """Nested dictionaries as one, {"model.norm.weight": ...}."""
    if isinstance(value, dict):
        parts = (flatten(child, f"{name}.{key}".strip(".")) for key, child in value.items())
        return {k: v for part in parts for k, v in part.items()}
    return {name: value}


def contents(path: Path) -> dict:
    """All that a checkpoint holds, times and folders aside, bit for bit comparable."""
    flat = flatten(train.load_checkpoint(path))
    ignored = ("elapsed_seconds", "evaluation_seconds", "steps_per_second",  # of a clock
               "metrics", "checkpoint_dir", "log_dir", "data_dir", "dataset")
    return {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) if isinstance(v, torch.Tensor) else v
            for k, v in flat.items() if k.split(".")[-1] not in ignored}


def differences(folder: Path, reference: Path) -> list[str]:
    """In what a finished run differs from another, times aside; leftovers included, but those of streams,
    which another run may be writing.
    """
    found = [f"leftover {p}" for p in folder.rglob("*.tmp") if p.parent.name != "data"]
    if metrics(folder) != metrics(reference):
        found.append("metrics.jsonl")
    for name in ("latest.pt", "best_model.pt"):
        ours, theirs = (contents(f / "checkpoints" / name) for f in (folder, reference))
        found += [f"{name}: {k}" for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]
    return found
