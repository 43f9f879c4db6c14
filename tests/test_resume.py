"""Resume is exact and nothing is lost, whatever happens. kill_harness.py, run by hand, does the same with many kills.

Most runs here are in this process; where it must really die, or be two, it is forked, which spares the import of torch.
"""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kill_harness import MOMENTS, ONCE, ROOT, contents, differences, flatten, kill_at, metrics, tiny_config

import data
import train
from config import Config, UserError, run_main
from data import prepare

TIKTOKEN_CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or ROOT.parent / "shared" / "tiktoken")
needs_gpt2 = pytest.mark.skipif(not TIKTOKEN_CACHE.is_dir(), reason="GPT-2's vocabulary is not on this machine")
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full, a disk without space, is Linux's")


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


@pytest.fixture(autouse=True)
def one_process_after_another(monkeypatch):
    """What a new process brings: no lock held, the usual signal handlers."""
    threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
    monkeypatch.setattr(train, "tell_story", lambda *args, **kwargs: "")  # half of the time; the harness tells them
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def opened(config: Config, fresh: bool = False):
    """A Run whose locks end with the block."""
    held, lock = [], train.lock
    train.lock = lambda directory: held.append(lock(directory)) or held[-1]
    try:
        yield train.Run(config, fresh)
    finally:
        train.lock = lock
        for one in held:
            one.release()


def go(config: Config, fresh: bool = False) -> train.Run:
    """Trains as main() does, from the last checkpoint on; the exit code is in `run.code`."""
    with opened(config, fresh) as run:
        train.describe(run)
        run.code = train.train(run, time.monotonic())
        return run


@contextlib.contextmanager
def before_update(step: int, act):
    """Calls act() when update number `step` begins."""
    update = train.update

    def patched(run):
        if run.state.step + 1 == step:
            act()
        return update(run)

    train.update = patched
    try:
        yield
    finally:
        train.update = update


def raises(error: BaseException):
    def act():
        raise error
    return act


def signals(*numbers: int):
    def act():
        for number in numbers:
            os.kill(os.getpid(), number)
    return act


def stop_after(config: Config, step: int) -> train.Run:
    """Trains until SIGTERM, which comes during update number `step`."""
    with before_update(step, signals(signal.SIGTERM)):
        run = go(config)
    assert run.code == 143 and run.state.step == step
    return run


def forked(work) -> int:
    """Calls work() in a copy of this process, whose exit code is work's, as run_main gives it. Returns its id."""
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


def snapshot(*folders: Path) -> dict:
    """Every file and its bytes, lock files aside."""
    return {p: p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def replace_checkpoint(folder: Path, raw: bytes, name: str = "latest.pt") -> None:
    """Puts a file of torch.save's format there, with the SHA-256 that load_checkpoint asks for."""
    (folder / "checkpoints" / name).write_bytes(raw + hashlib.sha256(raw).digest())


def command_line(config: Config) -> list[str]:
    return [f"{name}={value}" for name, value in config.flat().items()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    go(tiny_config(folder))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of the same run, stopped after update 10."""
    folder = tmp_path_factory.mktemp("stopped")
    stop_after(tiny_config(folder), 10)
    return folder


@pytest.fixture
def halfway(stopped, tmp_path) -> tuple[Path, Config]:
    """A copy of the stopped run, and the config to go on with."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    return folder, tiny_config(folder, data__dataset=str(stopped / "stories.txt"))


# ---------------------------------------------------------------- 1 exact resume

@pytest.mark.parametrize("tokenizer, optimizer", [
    ("char", "muon"), ("char", "adamw"), ("bpe", "muon"), pytest.param("gpt2", "adamw", marks=needs_gpt2)])
def test_a_run_in_pieces_is_the_run_in_one_piece_bit_for_bit(tmp_path, tokenizer, optimizer):
    settings = dict(training__tokenizer_type=tokenizer, training__bpe_vocab_size=300, training__optimizer=optimizer,
                    data__max_stories=12, training__micro_batch_size=3)
    whole = go(tiny_config(tmp_path / "whole", **settings))
    config = tiny_config(tmp_path / "pieces", **settings)
    assert config.model.dropout > 0 and config.training.micro_batch_size < config.training.batch_size
    end_of_epoch = whole.batches.windows_per_epoch // config.training.batch_size
    assert 2 < end_of_epoch < 20
    for step in (end_of_epoch - 1, end_of_epoch, end_of_epoch + 1):  # saved in time
        stop_after(config, step)
    with before_update(24, raises(Killed())), pytest.raises(Killed):  # not saved: goes on from update 21
        go(config)
    assert go(config).code == 0
    assert differences(tmp_path / "pieces", tmp_path / "whole") == []
    assert [line["step"] for line in metrics(tmp_path / "pieces")] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize("step", [12, 24])
def test_a_stop_where_an_evaluation_is_due_or_at_the_end_loses_no_line(halfway, reference, step):
    folder, config = halfway
    stop_after(config, step)
    assert go(config).code == 0
    assert differences(folder, reference) == []


def test_evaluation_does_not_change_the_weights(reference, tmp_path):
    go(tiny_config(tmp_path, training__eval_interval=7, training__eval_batches=3))
    often, seldom = (contents(f / "checkpoints" / "latest.pt") for f in (reference, tmp_path))
    assert all(often[k] == seldom[k] for k in often if k.startswith(("model.", "optimizer.")))


def test_a_finished_run_stays_as_it_is_and_leftovers_are_removed(reference):
    before = snapshot(reference / "checkpoints")
    (reference / "checkpoints" / "best_model.pt.tmp").write_bytes(b"half")
    assert go(tiny_config(reference)).code == 0
    assert snapshot(reference / "checkpoints") == before


# ---------------------------------------------------------------- 2 kill -9

@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moment(tmp_path, reference, moment):
    config = tiny_config(tmp_path)

    def work():
        kill_at(moment, 1 if moment in ONCE else 3)
        return go(config).code

    assert exit_code(forked(work)) == -signal.SIGKILL
    assert go(config).code == 0
    assert differences(tmp_path, reference) == []


def test_killed_again_and_again_at_random(tmp_path, reference):
    config, rng, kills = tiny_config(tmp_path), random.Random(0), 0
    while (pid := forked(lambda: go(config).code)) and kills < 6:
        time.sleep(rng.uniform(0.02, 0.4))  # any moment will do
        os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code in (-signal.SIGKILL, 0)
        kills += 1
    assert exit_code(pid) == 0
    assert differences(tmp_path, reference) == []


# ---------------------------------------------------------------- 3 signals

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_update_and_says_how_to_go_on(tmp_path, capsys, number, code):
    with before_update(7, signals(number)):
        assert go(tiny_config(tmp_path)).code == code
    assert train.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")["step"] == 7
    assert f"saved in {tmp_path / 'checkpoints' / 'latest.pt'}; run the same command again to go on" in capsys.readouterr().err


def test_the_exit_code_of_the_process_is_the_conventional_one(tmp_path):
    settings = command_line(tiny_config(tmp_path, training__max_steps=10**6, training__eval_interval=10**6))
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *settings], stderr=subprocess.PIPE, text=True)
    while not process.stderr.readline().startswith("update "):
        pass
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "run the same command again to go on" in printed


@pytest.mark.parametrize("where", ["update", "fsync", "replace"])
def test_a_second_interrupt_stops_at_once_and_leaves_a_good_checkpoint(tmp_path, reference, monkeypatch, where):
    config, interrupted = tiny_config(tmp_path), []
    function = getattr(os, where, None)

    def interrupt(*args):
        if function:
            function(*args)  # fsync: complete and not renamed; replace: latest.pt has become previous.pt
        if interrupted == ["once"]:
            interrupted.append("twice")
            signals(signal.SIGINT)()

    if function:
        monkeypatch.setattr(data.os, where, interrupt)
    with before_update(15, lambda: (signals(signal.SIGINT)(), interrupted.append("once"), function or interrupt())):
        with pytest.raises(KeyboardInterrupt):
            go(config)
    monkeypatch.undo()
    assert interrupted == ["once", "twice"] and not list(tmp_path.rglob("*.tmp"))
    assert train.find_checkpoint(tmp_path / "checkpoints")[0]["step"] == 12
    monkeypatch.setattr(train, "tell_story", lambda *args, **kwargs: "")
    assert go(config).code == 0
    assert differences(tmp_path, reference) == []


# ---------------------------------------------------------------- 4 damage

def test_no_damage_is_overlooked(stopped, tmp_path):
    good, path, rng = (stopped / "checkpoints" / "latest.pt").read_bytes(), tmp_path / "latest.pt", random.Random(0)
    path.write_bytes(good)
    train.load_checkpoint(path)
    directory_flag = good.rfind(b"PK\1\2") + 38  # with it, torch.load returns a tensor of whatever the memory holds
    flips = [(rng.randrange(len(good)), 1 << rng.randrange(8)) for _ in range(600)] + [(directory_flag, 1 << 4)]
    flips += [(position, 1 << rng.randrange(8)) for position in range(len(good) - 60, len(good))]
    damaged = [good[:i] + bytes([good[i] ^ bit]) + good[i + 1:] for i, bit in flips]
    damaged += [good[:n] for n in (*range(100), *rng.sample(range(len(good)), 200), *range(len(good) - 100, len(good)))]
    damaged += [good + b"\0", b"\0" + good, good[:5000] + bytes(4096) + good[9096:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            train.load_checkpoint(path)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    elif kind == "best_model.pt":
        shutil.copy(path.with_name("best_model.pt"), path)
    else:
        path.write_bytes({"empty": b"", "half": content[:len(content) // 2], "a flipped bit": content[:-20000] + bytes(
            [content[-20000] ^ 1]) + content[-19999:], "text": b"Once upon a time", "zeros": bytes(len(content))}[kind])


@pytest.mark.parametrize("kind", ["a directory", "best_model.pt", "empty", "half", "a flipped bit", "text", "zeros"])
def test_previous_serves_where_latest_is_damaged(halfway, reference, capsys, kind):
    folder, config = halfway
    latest = folder / "checkpoints" / "latest.pt"
    damage(latest, kind)
    assert go(config).code == 0
    warning = capsys.readouterr().err
    assert f"WARNING: {latest} is " in warning and f"going on from {latest.with_name('previous.pt')}, update 9" in warning
    assert len(list(latest.parent.glob("damaged-*.pt"))) == 1
    assert differences(folder, reference) == []


@pytest.mark.parametrize("kind", ["a directory", "half"])
def test_without_a_usable_checkpoint_nothing_is_overwritten_and_fresh_starts_anew(halfway, reference, kind):
    folder, config = halfway
    for name in ("latest.pt", "previous.pt"):
        damage(folder / "checkpoints" / name, kind)
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"latest.pt is damaged.*previous.pt is damaged.*nothing to resume from.*--fresh"):
        go(config)
    assert snapshot(folder) == before
    assert go(config, fresh=True).code == 0
    assert differences(folder, reference) == []


# ---------------------------------------------------------------- 5 a full disk

@needs_dev_full
@pytest.mark.parametrize("name", ["checkpoints/latest.pt.tmp", "checkpoints/best_model.pt.tmp", "logs/metrics.jsonl"])
def test_a_full_disk_while_training(halfway, reference, capsys, name):
    folder, config = halfway
    with opened(config) as run, pytest.raises(SystemExit) as ended:
        (folder / name).rename(folder / "aside") if (folder / name).exists() else None
        (folder / name).symlink_to("/dev/full")
        before = [p.read_bytes() for p in (run.latest, run.previous)]
        run_main(lambda: train.train(run, time.monotonic()))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    path = folder / name.removesuffix(".tmp")
    assert error.startswith(f"error: cannot write {path}: No space left on device; about 0.1 MB are needed and ")
    assert error.endswith("are free; make space and run the same command again") and "Traceback" not in error
    assert [p.read_bytes() for p in (run.latest, run.previous)] == before and not list(folder.glob("checkpoints/*.tmp"))
    if name.endswith("jsonl"):
        (folder / name).unlink()
        (folder / "aside").rename(folder / name)
    assert go(config).code == 0
    assert differences(folder, reference) == []


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_no_space_for_the_whole_checkpoint(halfway, reference, capfd, share):
    folder, config = halfway
    before = [(folder / "checkpoints" / name).read_bytes() for name in ("latest.pt", "previous.pt")]
    size = (folder / "checkpoints" / "latest.pt").stat().st_size
    with opened(config) as run:
        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(3000, int(share * size)), resource.RLIM_INFINITY))
            return train.train(run, time.monotonic())

        assert exit_code(forked(work)) == 2
    assert f"error: cannot write {folder / 'checkpoints'}" in capfd.readouterr().err
    assert [p.read_bytes() for p in (run.latest, run.previous)] == before and not list(folder.glob("checkpoints/*.tmp"))
    assert go(config).code == 0
    assert differences(folder, reference) == []


@needs_dev_full
def test_a_full_disk_while_the_stream_is_written(tmp_path):
    config = tiny_config(tmp_path, data__max_stories=20)
    tokens = prepare(config)[1].tokens.copy()
    before = snapshot(tmp_path / "data")
    config.data.max_stories = 30
    stream, = (tmp_path / "data").glob("*-train.bin")
    temporary = stream.with_name(stream.name + ".tmp")
    temporary.symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"cannot write {stream}: No space left on device; about .* make space"):
        prepare(config)
    assert snapshot(tmp_path / "data") == before
    config.data.max_stories = 20
    assert np.array_equal(prepare(config)[1].tokens, tokens)


# ---------------------------------------------------------------- 6 hostile files

class Hostile:
    """Its pickle writes a file when it is loaded without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pickle", "torch.save", "torch.save, old format"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(halfway, tmp_path, form):
    folder, config = halfway
    marker, buffer = tmp_path / "it ran", io.BytesIO()
    content = {**train.load_checkpoint(folder / "checkpoints" / "latest.pt"), "format": Hostile(marker)}
    if form == "pickle":
        pickle.dump(content, buffer)
    else:
        torch.save(content, buffer, _use_new_zipfile_serialization=form == "torch.save")
    for name in ("latest.pt", "previous.pt"):
        replace_checkpoint(folder, buffer.getvalue(), name)
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        train.load_checkpoint(folder / "checkpoints" / "latest.pt")
    with pytest.raises(UserError, match="nothing to resume from"):
        go(config)
    assert not marker.exists()
    torch.load(io.BytesIO(saved(Hostile(marker))), weights_only=False)
    assert marker.exists()  # so it would have


@pytest.mark.parametrize("form", ["a compressed bomb", "a tensor of a terabyte"])
def test_sizes_that_a_file_only_claims_do_not_fill_the_memory(stopped, tmp_path, form):
    good, crafted = train.load_checkpoint(stopped / "checkpoints" / "latest.pt"), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(good))) as old, zipfile.ZipFile(crafted, "w") as new:
        for name in old.namelist():
            content, huge = old.read(name), form == "a compressed bomb" and name.endswith("/data/0")
            if name.endswith("/data.pkl") and form == "a tensor of a terabyte":
                count = good["model"]["embed_tokens.weight"].numel().to_bytes(2, "little")  # as pickle's BININT2
                assert b"M" + count in content
                content = content.replace(b"M" + count, b"\x8a\x06" + (2**38).to_bytes(6, "little"))  # as LONG1
            new.writestr(name, bytes(2**28) if huge else content, zipfile.ZIP_DEFLATED if huge else zipfile.ZIP_STORED, 1)
    (tmp_path / "checkpoints").mkdir()
    replace_checkpoint(tmp_path, crafted.getvalue())

    def work() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match="damaged or not a checkpoint"):
            train.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 100_000)  # kB

    assert exit_code(forked(work)) == 0


# ---------------------------------------------------------------- 7 two trainers

def test_a_second_trainer_stops_and_the_lock_of_a_killed_one_does_not_block(tmp_path, reference, capsys):
    config = tiny_config(tmp_path)
    ready, write = os.pipe()

    def work():
        with before_update(5, lambda: (os.write(write, b"!"), signal.pause())):
            return go(config).code

    first = forked(work)
    assert os.read(ready, 1) == b"!"
    before = snapshot(tmp_path)
    try:
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: go(config))
    finally:
        os.kill(first, signal.SIGKILL)
        exit_code(first)
    assert ended.value.code == 2
    assert f"error: process {first} is training in {tmp_path}" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert go(config).code == 0
    assert differences(tmp_path, reference) == []


# ---------------------------------------------------------------- 8 values that are not finite

@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_run_that_diverges_stops_before_it_is_saved(halfway, reference, monkeypatch, what):
    folder, config = halfway
    forward, now = train.Objective.forward, {}

    def diverging(self, tokens, targets):
        loss = forward(self, tokens, targets)
        if now and what == "loss":
            return loss + math.inf  # with a gradient as good as ever
        if now:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    monkeypatch.setattr(train.Objective, "forward", diverging)
    with before_update(15, lambda: now.update(diverged=True)), pytest.raises(
            UserError, match=r"not finite at update 15 and nothing of it was saved; .*latest.pt is from before; try a smaller"):
        go(config)
    for path in (folder / "checkpoints").glob("*.pt"):
        checkpoint = train.load_checkpoint(path)
        assert checkpoint["step"] < 15 and all(w.isfinite().all() for w in checkpoint["model"].values())
    now.clear()
    assert go(config).code == 0
    assert differences(folder, reference) == []


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_float16_overflow_skips_the_whole_update_and_halves_the_scale(tmp_path, optimizer):
    with opened(tiny_config(tmp_path, training__optimizer=optimizer)) as run:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step() -> tuple[dict, dict]:
        """Makes one update; returns the weights and the optimizer's state."""
        train.train_step(run.objective, run.optimizer, scaler, *train.gather(run.stream, run.batches.starts(0), 32), 4, 1.0,
                         contextlib.nullcontext)
        return copy.deepcopy((run.model.state_dict(), flatten(run.optimizer.state_dict()["state"])))

    weights, state = step()
    hook = run.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    for before, after in zip((weights, state), step()):
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert scaler.get_scale() == 512
    hook.remove()
    after, _ = step()
    assert scaler.get_scale() == 512 and not any(torch.equal(weights[k], after[k]) for k in weights)


def test_float16_training_logs_an_overflow_and_resumes_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "choose_precision", lambda device, use_amp: (torch.float16, "a test"))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, scaler=torch.amp.GradScaler, **kwargs: scaler(
        *args, init_scale=2.0**26, growth_interval=5, **kwargs))  # overflows at once
    whole = go(tiny_config(tmp_path / "whole"))
    assert "float16 overflowed, update skipped, loss scale now" in capsys.readouterr().err
    config = tiny_config(tmp_path / "pieces")
    stop_after(config, 7)
    run = go(config)
    assert differences(tmp_path / "pieces", tmp_path / "whole") == []
    assert run.scaler.state_dict() == whole.scaler.state_dict()


# ---------------------------------------------------------------- 9 a changed world

@pytest.mark.parametrize("setting, old, new", [
    ("training.batch_size", 4, 8), ("training.tokenizer_type", "'char'", "'bpe'"), ("model.d_ff", 32, 64),
    ("training.seed", 1337, 1), ("data.max_stories", 10_000, 20), ("training.optimizer", "'muon'", "'adamw'")])
def test_another_setting_is_an_error_that_changes_nothing(halfway, setting, old, new):
    folder, config = halfway
    before = snapshot(folder)
    config.set(setting, str(new).strip("'"))
    with pytest.raises(UserError, match=f"{setting} was {old} and is {new}; undo that to go on with the old run, or use --fresh"):
        go(config)
    assert snapshot(folder) == before


def test_other_stories_under_the_same_path_are_an_error(tmp_path, reference):
    config = tiny_config(tmp_path)
    stop_after(config, 9)
    before, stories = snapshot(tmp_path / "checkpoints", tmp_path / "logs"), tmp_path / "stories.txt"
    text = stories.read_text()
    stories.write_text(text.replace("Once", "Twice"))
    with pytest.raises(UserError, match=r"the sha256 of the train stories was '\w+' and is '\w+'; undo that .* or use --fresh"):
        go(config)
    assert snapshot(tmp_path / "checkpoints", tmp_path / "logs") == before
    stories.write_text(text)
    assert go(config).code == 0
    assert differences(tmp_path, reference) == []


def test_fresh_moves_the_old_run_aside_and_loses_nothing(halfway, reference):
    folder, config = halfway
    config.training.batch_size = 8
    before = sorted(snapshot(folder / "checkpoints", folder / "logs").values())
    with opened(config, fresh=True) as run:
        assert run.state.step == 0
    assert sorted(p.read_bytes() for kind in ("checkpoints", "logs") for p in folder.glob(f"{kind}/old-*/*")) == before
    config.training.batch_size = 4
    assert go(config).code == 0
    assert differences(folder, reference) == []


def test_metrics_without_a_checkpoint_are_moved_aside_too(halfway, reference):
    folder, config = halfway
    lines = (folder / "logs" / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    assert go(config).code == 0
    assert [p.read_bytes() for p in folder.glob("logs/old-*/metrics.jsonl")] == [lines]
    assert differences(folder, reference) == []


def test_best_model_alone_is_refused_and_kept(halfway):
    folder, config = halfway
    for name in ("latest.pt", "previous.pt"):
        (folder / "checkpoints" / name).unlink()
    before = snapshot(folder / "checkpoints", folder / "logs")
    with pytest.raises(UserError, match="holds best_model.pt and no latest.pt; there is nothing to resume from: use --fresh"):
        go(config)
    assert snapshot(folder / "checkpoints", folder / "logs") == before


def test_changes_that_are_safe_are_allowed_and_printed(halfway, capsys):
    folder, config = halfway
    config.training.max_steps, config.training.eval_interval = 16, 6
    run = go(config)
    printed = capsys.readouterr().err
    assert f"changed since {folder / 'checkpoints' / 'latest.pt'}: " in printed
    assert "training.max_steps was 24 and is 16; training.eval_interval was 4 and is 6" in printed
    assert run.code == 0 and [line["step"] for line in metrics(folder)] == [4, 8, 12, 16]


def test_any_damage_to_a_stream_or_its_description_is_noticed(tmp_path):
    config = tiny_config(tmp_path)
    tokenizer, stream, _ = prepare(config)
    tokens = stream.tokens.copy()  # the file that the memmap shows is damaged below
    files = {p: p.read_bytes() for p in sorted((tmp_path / "data").glob("[!.]*"))}
    assert len(files) == 3
    rng = random.Random(0)
    for path, content in files.items():
        for _ in range(15):
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
            again = prepare(config)
            assert np.array_equal(again[1].tokens, tokens) and again[1].info == stream.info
            assert again[0].spec() == tokenizer.spec()


# ---------------------------------------------------------------- 10 metrics.jsonl

@pytest.mark.parametrize("tail", [b'{"step": 24, "train_lo', b'{"step": 24}\n{"step": 30}\n', b"\0\0\0\0"])
def test_metrics_beyond_the_checkpoint_are_cut_off(halfway, reference, tail):
    folder, config = halfway
    with open(folder / "logs" / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert go(config).code == 0
    assert differences(folder, reference) == []


def test_lost_metrics_are_a_warning_and_the_rest_stays_readable(halfway, reference, capsys):
    folder, config = halfway
    os.truncate(folder / "logs" / "metrics.jsonl", 500)  # in the middle of a line
    assert go(config).code == 0
    assert "has lost lines since the checkpoint" in capsys.readouterr().err
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [4, 12, 16, 20, 24] and all(line in metrics(reference) for line in lines)


# ---------------------------------------------------------------- several processes

def rank(i: int, port: int, work) -> int:
    """Runs work() as process `i` of the two of a torchrun."""
    os.environ.update(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = work()
    torch.distributed.destroy_process_group()
    return code


def test_two_processes_go_on_where_one_stopped_and_one_where_two_stopped(tmp_path):
    go(tiny_config(tmp_path / "one", model__dropout=0))
    config = tiny_config(tmp_path / "both", model__dropout=0)
    stop_after(config, 6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def first() -> int:
        # A clock of its own: one process shows its progress when the other sees no reason to.
        train.time = types.SimpleNamespace(monotonic=lambda: 10**6 * time.monotonic())
        return go(config).code

    def second() -> int:
        train.save_checkpoint = train.atomic_write = train.open = raises(AssertionError("only the first process writes"))
        with before_update(15, signals(signal.SIGTERM)):  # only one of them hears it
            return go(config).code

    pids = [forked(lambda: rank(0, port, first)), forked(lambda: rank(1, port, second))]
    assert [exit_code(pid) for pid in pids] == [143, 143]
    assert go(config).state.step == 24
    for one, both in itertools.zip_longest(metrics(tmp_path / "one"), metrics(tmp_path / "both")):
        assert both == pytest.approx(one, rel=1e-4)


def test_a_signal_to_torchrun_stops_all_processes_and_saves(tmp_path):
    settings = command_line(tiny_config(tmp_path, training__max_steps=10**6, training__eval_interval=10**6))
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                ROOT / "train.py", *settings], stderr=subprocess.PIPE, text=True)
    while not (line := process.stderr.readline()).startswith("update "):
        assert line or process.poll() is None
    process.terminate()
    printed = process.communicate(timeout=60)[1]
    assert printed.count("run the same command again to go on") == 1
    stopped_after = re.search("stopped after update ([0-9,]+)", printed)[1]
    assert train.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")["step"] == int(stopped_after.replace(",", ""))
    assert not list(tmp_path.rglob("*.tmp"))


# ---------------------------------------------------------------- where a run ends, and memory

def test_max_minutes_fixes_the_end_once_and_the_rest_resumes_exactly(tmp_path, monkeypatch):
    config, fixed = tiny_config(tmp_path / "a", training__max_steps=10**6, training__max_minutes=0.01), []

    def fix_end(run, *args, fix_end=train.fix_end):
        fix_end(run, *args)
        fixed.append((run.state.step, run.state.end))
        signals(signal.SIGTERM)()

    monkeypatch.setattr(train, "fix_end", fix_end)
    assert go(config).code == 143
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = tiny_config(tmp_path / "b", training__max_steps=10**6, training__max_minutes=0.01, data__dataset=config.data.dataset)
    assert go(config).code == 0
    (step, end), = fixed
    with before_update(end, raises(Killed())), pytest.raises(Killed):
        go(again)
    assert go(again).state.step == end > step and len(fixed) == 1
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert metrics(tmp_path / "a")[-1]["lr"] <= config.training.learning_rate / (end - step) * 2.01  # decayed to its end


def test_max_minutes_is_used_up_although_the_first_updates_were_slow(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)

    def update(run, update=train.update):
        clock.now += 7.0 if run.state.step < 4 else 1.0
        return update(run)

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    with opened(tiny_config(tmp_path, training__max_steps=10**6, training__max_minutes=200 / 60)) as run:
        assert train.train(run, 0.0) == 0
    assert 0.8 * 200 < run.state.elapsed_seconds <= 200
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path)}
    assert rates[52] == max(rates.values()) > 50 * rates[run.state.step] > 0  # constant for 80 s, then down to its end


@pytest.mark.parametrize("batch_size, advised", [(8, False), (32, True)])
def test_without_a_gpu_large_updates_are_advised_against(tmp_path, capsys, batch_size, advised):
    with opened(tiny_config(tmp_path, training__batch_size=batch_size, model__max_seq_len=256)) as run:
        train.describe(run)
    assert ("--preset laptop" in capsys.readouterr().err) == advised


@pytest.mark.parametrize("decay_fraction, planned, evaluated", [(0.2, 25, [24, 25]), (0.6, 50, [24, 28])])
def test_early_stopping_decays_the_rate_ends_and_keeps_the_best(tmp_path, monkeypatch, decay_fraction, planned, evaluated):
    def evaluate(model, tokens, *args):
        losses.append({12: 2.0}.get(run_step(), 3.0))
        return np.full(len(tokens), losses[-1], np.float32), None

    losses, at = [], {}
    run_step = lambda: at["run"].state.step
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "update", lambda run, update=train.update: (at.update(run=run), update(run))[1])
    config = tiny_config(tmp_path, training__max_steps=1000, training__early_stopping_evals=2, training__decay_fraction=decay_fraction)
    stopped = stop_after(config, 22)  # in the decay, which begins after two evaluations that are not better, at 20
    assert stopped.schedule() == (20, planned)  # 20 is the part of the run before the decay
    run = go(config)
    assert run.code == 0 and run.state.step == evaluated[-1] == run.schedule()[1]  # no better loss in the decay, either
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 12, 16, 20, *evaluated]
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path)}
    assert rates[20] == config.training.learning_rate
    for step in evaluated:
        assert rates[step] == pytest.approx(rates[20] * (planned - step + 1) / (planned - 20))
    best = train.load_checkpoint(run.best)
    assert (best["step"], best["val_loss"]) == (12, 2.0)
    assert go(config).state.step == evaluated[-1]


def test_the_kept_model_is_the_average_of_the_last_updates(tmp_path, monkeypatch):
    seen, update = [], train.update

    def watched(run):
        result = update(run)
        seen.append([p.detach().double().clone() for p in run.model.parameters()])
        return result

    monkeypatch.setattr(train, "update", watched)
    config = tiny_config(tmp_path, training__max_steps=12, training__eval_interval=12)
    with opened(config) as run:
        average = [p.detach().double().clone() for p in run.model.parameters()]
        assert train.train(run, time.monotonic()) == 0
    for step, weights in enumerate(seen, 1):
        rate = max(1 / 50, 10 / (step + 10))
        average = [rate * w + (1 - rate) * a for w, a in zip(weights, average)]
    latest, best = (train.load_checkpoint(path)["model"] for path in (run.latest, run.best))
    for kept, other, expected, last in zip(latest.values(), best.values(), average, seen[-1], strict=True):
        torch.testing.assert_close(kept.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept, other) and not torch.equal(kept, last.float())
    state = train.load_checkpoint(run.latest)["weights"]
    assert all(torch.equal(w, last.float()) for w, last in zip(state.values(), seen[-1], strict=True))


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_update(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "matmul_dtype", lambda device: torch.float32)  # Muon in bfloat16 can make 1e-4 of 1e-8
    settings = dict(model__dropout=0, training__max_steps=8)
    whole, calls, forward = go(tiny_config(tmp_path / "whole", **settings)), itertools.count(1), train.Objective.forward

    def small_memory(self, tokens, targets):
        if (call := next(calls)) in (3, 5):  # the third update; again, when half of its gradient is there
            raise torch.OutOfMemoryError(f"call {call}")
        return forward(self, tokens, targets)

    monkeypatch.setattr(train.Objective, "forward", small_memory)
    run = go(tiny_config(tmp_path / "small", **settings))
    printed = capsys.readouterr().err
    assert all(f"out of memory: going on with training.micro_batch_size={n}, the same update again" in printed for n in (2, 1))
    assert run.micro_batch_size == 1 and next(calls) == 1 + 2 + 1 + 2 + 4 * 6
    for ours, theirs in zip(run.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
