"""Kills real training with SIGKILL, at random and at the worst moments, and compares with a run that nobody disturbed.

    python tests/kill_harness.py --kills 60

A run is started again until it is done; then a new one begins, until the kills are spent. test_resume.py uses the parts.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import data
import train
from config import Config, config, run_main

TINY = {"model.n_layers": 1, "model.d_model": 16, "model.n_heads": 2, "model.d_ff": 32, "model.max_seq_len": 32,
        "training.tokenizer_type": "char", "training.batch_size": 4, "training.max_steps": 24, "training.warmup_steps": 3,
        "training.eval_interval": 4, "training.eval_batches": 1, "training.checkpoint_interval": 3, "training.use_amp": False,
        "training.device": "cpu"}
TIMES = ("timestamp", "elapsed_seconds", "tokens_per_second")
MOMENTS = (  # in the middle of writing a file; just after a rename; between metrics line and checkpoint
    "write latest.pt", "write best_model.pt", "write metrics.jsonl", "write run.json", "write char-train.bin",
    "write char.json", "rename previous.pt", "rename latest.pt", "rename best_model.pt", "save")
ONCE = ("write run.json", "write char-train.bin", "write char.json")  # in a process


def tiny_config(folder: Path, **settings) -> Config:
    """A run in `folder` that takes a fraction of a second; `model__d_model=8` sets model.d_model."""
    stories = folder / "stories.txt"
    if not stories.exists():
        folder.mkdir(parents=True, exist_ok=True)
        stories.write_text(f"\n{data.END_OF_TEXT}\n".join(story[:200] for story in list(data.read_stories(data.SAMPLE))[:60]))
    made = Config()
    folders = {"data.dataset": stories, "data.data_dir": folder / "data", "training.checkpoint_dir": folder / "checkpoints",
               "training.log_dir": folder / "logs"}
    for name, value in (TINY | {k: str(v) for k, v in folders.items()}).items():
        made.set(name, value)
    for name, value in settings.items():
        made.set(name.replace("__", "."), value)
    made.validate()
    return made


def kill_at(moment: str, occurrence: int) -> None:
    """From here on this process kills itself at the given occurrence of a moment of MOMENTS."""
    def reached(this: str) -> bool:
        nonlocal occurrence
        is_it = moment.split()[0] == this.split()[0] and this.endswith(moment.split()[-1])
        occurrence -= is_it
        return is_it and occurrence == 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Torn:
        """A file of which only a half is written."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:len(content) // 2])
            self.file.flush()
            die()

    def torn_open(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        return Torn(file) if mode in ("wb", "ab") and reached(f"write {Path(path).name.removesuffix('.tmp')}") else file

    def replace(old, new, replace=os.replace):
        replace(old, new)
        if reached(f"rename {Path(new).name}"):
            die()

    def save(run, save=train.Run.save):
        if reached("save"):
            die()
        save(run)

    data.open = train.open = torn_open
    os.replace = replace
    train.Run.save = save


def metrics(folder: Path) -> list[dict]:
    """The metrics of a run, times aside."""
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def flatten(value, name: str = "") -> dict:
    """Nested dictionaries as one, {"model.norm.weight": ...}."""
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in flatten(child, f"{name}.{key}".strip(".")).items()}
    return {name: value}


def contents(path: Path) -> dict:
    """All that a checkpoint holds, times and folders aside, bit for bit comparable."""
    flat = flatten(train.load_checkpoint(path))
    ignored = ("elapsed_seconds", "metrics_bytes", "checkpoint_dir", "log_dir", "data_dir", "dataset")
    return {k: (v.dtype, tuple(v.shape), v.numpy().tobytes()) if isinstance(v, torch.Tensor) else v
            for k, v in flat.items() if k.split(".")[-1] not in ignored}


def differences(folder: Path, reference: Path) -> list[str]:
    """In what a finished run differs from another, times aside; leftovers included."""
    found = [f"leftover {p}" for p in folder.rglob("*.tmp")]
    if metrics(folder) != metrics(reference):
        found.append("metrics.jsonl")
    for name in ("latest.pt", "best_model.pt"):
        ours, theirs = (contents(f / "checkpoints" / name) for f in (folder, reference))
        found += [f"{name}: {k}" for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]
    return found


# ---------------------------------------------------------------- by hand, with a new process for each start

def start(folder: Path, seed: int, moment: str = "", occurrence: int = 0) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "--child", str(folder), str(seed), moment, str(occurrence)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def child(folder: str, seed: str, moment: str, occurrence: str) -> int:
    made = tiny_config(Path(folder), training__seed=seed, training__max_steps=400, training__micro_batch_size=3)
    config.model, config.data, config.training = made.model, made.data, made.training
    sys.argv = ["train.py"]
    if moment in MOMENTS:
        kill_at(moment, int(occurrence))
    return train.main()


def hammer(folder: Path, seed: int, kills: int, rng: random.Random, tally: Counter) -> int:
    """Trains until done, killing at most `kills` times; counts the kills by moment in `tally` and returns how many."""
    done = 0
    while True:
        moments = [m for m in MOMENTS if "char" not in m or not done]  # the stream is written once
        moment = rng.choice((*moments, *["random"] * 5)) if done < kills else "none"
        process, printed = start(folder, seed, moment, 1 if moment in ONCE else rng.randint(1, 3)), b""
        if moment == "random":
            while (line := process.stderr.readline()) and not line.startswith(b"device:"):
                printed += line  # most of so short a run is the import of torch, in which there is nothing to disturb
            time.sleep(rng.uniform(0, 0.8))
            process.kill()
        printed += process.communicate()[1]
        code = process.returncode
        if code == -signal.SIGKILL:
            done += 1
            tally[moment] += 1
        elif code == 0:
            return done
        else:
            raise SystemExit(f"exit code {code} at {moment!r} in {folder}:\n{printed.decode()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    options = parser.parse_args()
    rng, tally, runs, begin = random.Random(options.seed), Counter(), 0, time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    print(f"seed {options.seed}, in {folder}")
    while tally.total() < options.kills:
        reference, hammered = folder / f"quiet-{runs}", folder / f"killed-{runs}"
        for f in (reference, hammered):
            tiny_config(f)  # writes the stories
        hammer(reference, runs, 0, rng, tally)
        kills = hammer(hammered, runs, options.kills - tally.total(), rng, tally)
        if found := differences(hammered, reference):
            raise SystemExit(f"run {runs} after {kills} kills differs: {found}")
        runs += 1
        print(f"run {runs}: {kills} kills, {len(metrics(hammered))} metrics lines, all the same")
    print(f"{tally.total()} kills in {runs} runs, {time.monotonic() - begin:.0f} s: "
          + ", ".join(f"{moment} {n}" for moment, n in tally.most_common()))
    return 0


if __name__ == "__main__":
    run_main(lambda: child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
