"""Kills real training with SIGKILL, at random and at the worst moments; compares with a run left in peace.

    python tests/kill_harness.py --kills 60

A run is started again, in a new process, until it is done; then a new one begins, until the kills are spent.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import differences, metrics, tiny_config

import data
import train
from config import config, run_main

MOMENTS = (  # in the middle of writing a file; just after a rename; between metrics and checkpoint
    "write latest.pt", "write best_model.pt", "write metrics.jsonl", "write run.json", "write char-train.bin",
    "write char.json", "rename previous.pt", "rename latest.pt", "rename best_model.pt",
    "rename metrics.jsonl", "save")
ONCE = ("write run.json", "write char-train.bin", "write char.json")  # in a process


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
        file, whole = open(path, mode, *args, **kwargs), re.sub(r"\.[0-9a-f]{8}\.tmp$", "", Path(path).name)
        return Torn(file) if mode == "wb" and reached(f"write {whole}") else file

    def replace(old, new, replace=os.replace):
        replace(old, new)
        if reached(f"rename {Path(new).name}"):
            die()

    def save_latest(run, save_latest=train.Run.save_latest):
        if reached("save"):
            die()
        save_latest(run)

    data.open = torn_open
    os.replace = replace
    train.Run.save_latest = save_latest


def start(folder: Path, seed: int, moment: str = "", occurrence: int = 0) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", str(folder), str(seed), moment, str(occurrence)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def child(folder: str, seed: str, moment: str, occurrence: str) -> int:
    settings = {"training__seed": seed, "training__max_steps": 400, "training__micro_batch_size": 3}
    made = tiny_config(Path(folder), **settings)
    config.model, config.data, config.training = made.model, made.data, made.training
    sys.argv = ["train.py"]
    if moment in MOMENTS:
        kill_at(moment, int(occurrence))
    return train.main()


def hammer(folder: Path, seed: int, kills: int, rng: random.Random, tally: Counter) -> int:
    """Trains until done, killing at most `kills` times; counts the kills in `tally`, returns how many."""
    done = 0
    while True:
        moments = [m for m in MOMENTS if "char" not in m or not done]  # the stream is written once
        moment = rng.choice((*moments, *["random"] * 5)) if done < kills else "none"
        process, printed = start(folder, seed, moment, 1 if moment in ONCE else rng.randint(1, 3)), b""
        if moment == "random":
            # Most of so short a run is the import of torch, in which there is nothing to disturb.
            while (line := process.stderr.readline()) and not line.startswith(b"device:"):
                printed += line
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
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
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
