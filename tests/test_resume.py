"""Resume is exact: in pieces, after kills and signals, with other processes. kill_harness.py kills more."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT, Killed, before_step, command_line, contents, differences, exit_code, forked, go, metrics,
    needs_gpt2, raises, signals, snapshot, stop_after, tiny_config)
from kill_harness import MOMENTS, ONCE, kill_at

import data
import train

pytestmark = pytest.mark.usefixtures("one_process")


# ---------------------------------------------------------------- exact resume

@pytest.mark.parametrize(("tokenizer", "optimizer"), [
    ("char", "muon"), ("char", "adamw"), ("bpe", "muon"), pytest.param("gpt2", "adamw", marks=needs_gpt2)])
def test_a_run_in_pieces_is_the_run_in_one_piece_bit_for_bit(tmp_path, tokenizer, optimizer):
    settings = {"training__tokenizer_type": tokenizer, "training__bpe_vocab_size": 300,
                "training__optimizer": optimizer, "training__micro_batch_size": 3, "data__max_stories": 12}
    whole = go(tiny_config(tmp_path / "whole", **settings))
    config = tiny_config(tmp_path / "pieces", **settings)
    assert config.model.dropout > 0 and config.training.micro_batch_size < config.training.batch_size
    end_of_epoch = whole.batches.windows_per_epoch // config.training.batch_size
    assert 2 < end_of_epoch < 20
    for step in (end_of_epoch - 1, end_of_epoch, end_of_epoch + 1):  # saved in time
        stop_after(config, step)
    with before_step(24, raises(Killed())), pytest.raises(Killed):  # not saved: goes on from step 21
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
    go(tiny_config(tmp_path, training__eval_interval=7))
    often, seldom = (contents(f / "checkpoints" / "latest.pt") for f in (reference, tmp_path))
    assert all(often[k] == seldom[k] for k in often if k.startswith(("model.", "optimizer.")))


def test_a_finished_run_stays_as_it_is_and_leftovers_are_removed(reference):
    before = snapshot(reference / "checkpoints")
    old, new = reference / "data" / "a.bin.00000000.tmp", reference / "data" / "b.bin.00000000.tmp"
    for path in (reference / "checkpoints" / "best_model.pt.tmp", old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert go(tiny_config(reference)).code == 0
    assert snapshot(reference / "checkpoints") == before
    assert new.exists() and not old.exists()  # another run may be writing the new one
    new.unlink()


# ---------------------------------------------------------------- kill -9

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


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(tmp_path, capsys, number, code):
    latest = tmp_path / "checkpoints" / "latest.pt"
    with before_step(7, signals(number)):
        assert go(tiny_config(tmp_path)).code == code
    assert train.load_checkpoint(latest)["step"] == 7
    assert f"saved in {latest}; run the same command again to go on" in capsys.readouterr().err


def start_training(folder: Path, *options: str) -> subprocess.Popen:
    """Starts train.py on an endless run, with options of Python; returns the process once it makes steps."""
    endless = tiny_config(folder, training__max_steps=10**6, training__eval_interval=10**6)
    process = subprocess.Popen([sys.executable, *options, ROOT / "train.py", *command_line(endless)],
                               stderr=subprocess.PIPE, text=True)
    while not (line := process.stderr.readline()).startswith("step "):
        assert line or process.poll() is None
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_code_of_the_process_is_the_conventional_one(tmp_path, number, code):
    process = start_training(tmp_path)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == code and "run the same command again to go on" in printed


def test_a_hangup_that_is_ignored_as_under_nohup_does_not_stop_a_run(tmp_path, reference):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it; one_process puts it back
    with before_step(7, signals(signal.SIGHUP)):
        assert go(tiny_config(tmp_path)).code == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert differences(tmp_path, reference) == []


@pytest.mark.parametrize("ending", ["done", "stopped", "an exception"])
def test_the_signal_handlers_are_put_back(tmp_path, ending):
    numbers, before = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), []
    for number in numbers:
        before.append(lambda *_: None)
        signal.signal(number, before[-1])
    during = []
    acts = {"done": list, "stopped": signals(signal.SIGTERM), "an exception": raises(Killed())}
    watching = before_step(4, lambda: during.extend(map(signal.getsignal, numbers)))
    with watching, before_step(5, acts[ending]), contextlib.suppress(Killed):
        go(tiny_config(tmp_path))
    assert not set(during) & set(before) and list(map(signal.getsignal, numbers)) == before


def test_training_off_the_main_thread(tmp_path, reference):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(go(tiny_config(tmp_path))))
    thread.start()
    thread.join()
    assert runs and runs[0].code == 0
    assert differences(tmp_path, reference) == []


@pytest.mark.parametrize("where", ["step", "fsync", "replace"])
def test_a_second_interrupt_stops_at_once_and_leaves_a_good_checkpoint(
        tmp_path, reference, monkeypatch, where):
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
    def act():
        signals(signal.SIGINT)()
        interrupted.append("once")
        if not function:
            interrupt()

    with before_step(15, act), pytest.raises(KeyboardInterrupt):
        go(config)
    monkeypatch.undo()
    assert interrupted == ["once", "twice"] and not list(tmp_path.rglob("*.tmp"))
    assert train.find_checkpoint(tmp_path / "checkpoints")[0]["step"] == 12
    monkeypatch.setattr(train, "tell_story", lambda *args, **kwargs: "")
    assert go(config).code == 0
    assert differences(tmp_path, reference) == []


# ---------------------------------------------------------------- several processes

def rank(i: int, port: int, work) -> int:
    """Runs work() as process `i` of the two of a torchrun."""
    os.environ.update(TORCHELASTIC_RUN_ID="one", RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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
        return go(config, clock=lambda: 10**6 * time.perf_counter()).code

    def second() -> int:
        refuse = raises(AssertionError("only the first process writes"))
        train.save_checkpoint = train.atomic_write = refuse
        with before_step(15, signals(signal.SIGTERM)):  # only one of them hears it
            return go(config).code

    pids = [forked(lambda: rank(0, port, first)), forked(lambda: rank(1, port, second))]
    assert [exit_code(pid) for pid in pids] == [143, 143]
    assert go(config).state.step == 24
    for one, both in zip(metrics(tmp_path / "one"), metrics(tmp_path / "both"), strict=True):
        assert both == pytest.approx(one, rel=1e-4)


def test_a_signal_to_torchrun_stops_all_processes_and_saves(tmp_path):
    process = start_training(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process.terminate()
    printed = process.communicate(timeout=60)[1]
    assert printed.count("run the same command again to go on") == 1
    stopped_after = re.search("stopped after step ([0-9,]+)", printed)[1]
    latest = train.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")
    assert latest["step"] == int(stopped_after.replace(",", ""))
    assert not list(tmp_path.rglob("*.tmp"))
