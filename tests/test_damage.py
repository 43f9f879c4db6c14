"""Nothing is lost: damaged files, full disks, hostile files, two trainers, a changed world, metrics.jsonl."""

import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    before_step, differences, exit_code, forked, go, metrics, opened, raises, snapshot, stop_after,
    tiny_config)

import data
import train
from config import UserError, run_main
from data import prepare

pytestmark = pytest.mark.usefixtures("one_process")
needs_dev_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="/dev/full, a disk without space, is Linux's")


def replace_checkpoint(folder: Path, raw: bytes, name: str = "latest.pt") -> None:
    """Puts a file of torch.save's format there, with the SHA-256 that load_checkpoint asks for."""
    (folder / "checkpoints" / name).write_bytes(raw + hashlib.sha256(raw).digest())


# ---------------------------------------------------------------- damage

def test_no_damage_is_overlooked(stopped, tmp_path):
    good, rng = (stopped / "checkpoints" / "latest.pt").read_bytes(), random.Random(0)
    path = tmp_path / "latest.pt"
    path.write_bytes(good)
    train.load_checkpoint(path)
    # With this flag of the directory, torch.load returns a tensor of whatever the memory holds.
    directory_flag = good.rfind(b"PK\1\2") + 38
    flips = [(rng.randrange(len(good)), 1 << rng.randrange(8)) for _ in range(600)]
    flips += [(directory_flag, 1 << 4)]
    flips += [(position, 1 << rng.randrange(8)) for position in range(len(good) - 60, len(good))]
    damaged = [good[:i] + bytes([good[i] ^ bit]) + good[i + 1:] for i, bit in flips]
    lengths = (*range(100), *rng.sample(range(len(good)), 200), *range(len(good) - 100, len(good)))
    damaged += [good[:n] for n in lengths]
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
        flipped = content[:-20000] + bytes([content[-20000] ^ 1]) + content[-19999:]
        path.write_bytes({"empty": b"", "half": content[:len(content) // 2], "a flipped bit": flipped,
                          "text": b"Once upon a time", "zeros": bytes(len(content))}[kind])


@pytest.mark.parametrize(
    "kind", ["a directory", "best_model.pt", "empty", "half", "a flipped bit", "text", "zeros"])
def test_previous_serves_where_latest_is_damaged(halfway, reference, capsys, kind):
    folder, config = halfway
    latest = folder / "checkpoints" / "latest.pt"
    damage(latest, kind)
    assert go(config).code == 0
    warning = capsys.readouterr().err
    assert f"WARNING: {latest} is {'a best_model.pt' if kind == 'best_model.pt' else 'damaged'}" in warning
    assert f"going on from {latest.with_name('previous.pt')}, step 9" in warning
    assert len(list(latest.parent.glob("damaged-*.pt"))) == 1
    assert differences(folder, reference) == []


def test_a_checkpoint_of_another_format_is_refused_in_one_sentence_and_kept(halfway):
    folder, config = halfway
    for name in ("latest.pt", "previous.pt", "best_model.pt"):
        path = folder / "checkpoints" / name
        replace_checkpoint(folder, saved({**train.load_checkpoint(path), "format": 2}), name)
        with pytest.raises(UserError, match="has format 2, and this version .* reads only"):
            train.load_checkpoint(path)
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"latest.pt has format 2.*nothing to resume from: use --fresh"):
        go(config)
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["a directory", "half"])
def test_without_a_usable_checkpoint_nothing_is_overwritten_and_fresh_starts_anew(halfway, reference, kind):
    folder, config = halfway
    for name in ("latest.pt", "previous.pt"):
        damage(folder / "checkpoints" / name, kind)
    before = snapshot(folder)
    both = r"latest.pt is damaged.*previous.pt is damaged.*nothing to resume from.*--fresh"
    with pytest.raises(UserError, match=both):
        go(config)
    assert snapshot(folder) == before
    assert go(config, fresh=True).code == 0
    assert differences(folder, reference) == []


# ---------------------------------------------------------------- a full disk

@needs_dev_full
@pytest.mark.parametrize(
    "name", ["checkpoints/latest.pt.7.tmp", "checkpoints/best_model.pt.7.tmp", "logs/metrics.jsonl.7.tmp"])
def test_a_full_disk_while_training(halfway, reference, capsys, monkeypatch, name):
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "7")
    folder, config = halfway
    with opened(config) as run, pytest.raises(SystemExit) as ended:
        (folder / name).symlink_to("/dev/full")
        kept = (run.latest, run.folder / "previous.pt")
        before = [p.read_bytes() for p in kept]
        run_main(lambda: train.train(run))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    path = folder / name.removesuffix(".7.tmp")
    full = f"error: cannot write {path}: No space left on device; about 0.1 MB are needed and "
    assert error.startswith(full)
    assert error.endswith("are free; make space and run the same command again") and "Traceback" not in error
    assert [p.read_bytes() for p in kept] == before and not list(folder.glob("checkpoints/*.tmp"))
    assert go(config).code == 0
    assert differences(folder, reference) == []


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_no_space_for_the_whole_checkpoint(halfway, reference, capfd, share):
    folder, config = halfway
    kept = [folder / "checkpoints" / name for name in ("latest.pt", "previous.pt")]
    before = [p.read_bytes() for p in kept]
    size = (folder / "checkpoints" / "latest.pt").stat().st_size
    with opened(config) as run:
        def work():
            most = max(3000, int(share * size))
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            return train.train(run)

        assert exit_code(forked(work)) == 2
    assert f"error: cannot write {folder / 'checkpoints'}" in capfd.readouterr().err
    assert [p.read_bytes() for p in kept] == before and not list(folder.glob("checkpoints/*.tmp"))
    assert go(config).code == 0
    assert differences(folder, reference) == []


@needs_dev_full
def test_a_full_disk_while_the_stream_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(data.secrets, "token_hex", lambda n: "7")
    config = tiny_config(tmp_path, data__max_stories=20)
    tokens = prepare(config)[1].tokens.copy()
    before = snapshot(tmp_path / "data")
    config.data.max_stories, config.data.data_dir = 30, str(tmp_path / "elsewhere")
    prepare(config)
    stream, = (tmp_path / "elsewhere").glob("*-train.bin")  # what the next one will be called, too
    config.data.data_dir, stream = str(tmp_path / "data"), tmp_path / "data" / stream.name
    temporary = stream.with_name(stream.name + ".7.tmp")
    temporary.symlink_to("/dev/full")
    full = f"cannot write {stream}: No space left on device; about .* make space"
    with pytest.raises(UserError, match=full):
        prepare(config)
    assert snapshot(tmp_path / "data") == before
    config.data.max_stories = 20
    assert np.array_equal(prepare(config)[1].tokens, tokens)


# ---------------------------------------------------------------- hostile files

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


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(halfway, monkeypatch):
    folder, config = halfway
    before = snapshot(folder)
    denied = PermissionError(13, "Permission denied", "latest.pt")
    with monkeypatch.context() as patched, pytest.raises(PermissionError):
        patched.setattr(type(folder), "read_bytes", raises(denied))
        go(config)
    assert snapshot(folder) == before


# ---------------------------------------------------------------- two trainers

def test_a_second_trainer_stops_and_the_lock_of_a_killed_one_does_not_block(tmp_path, reference, capsys):
    config = tiny_config(tmp_path)
    ready, write = os.pipe()

    def work():
        with before_step(5, lambda: (os.write(write, b"!"), signal.pause())):
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


# ---------------------------------------------------------------- a changed world

@pytest.mark.parametrize(("setting", "old", "new"), [
    ("training.batch_size", 4, 8), ("training.tokenizer_type", "'char'", "'bpe'"), ("model.d_ff", 32, 64),
    ("training.seed", 1337, 1), ("data.max_stories", 10_000, 20),
    ("training.optimizer", "'muon'", "'adamw'"), ("training.eval_batches", 1, 2)])
def test_another_setting_is_an_error_that_changes_nothing(halfway, setting, old, new):
    folder, config = halfway
    before = snapshot(folder)
    config.set(setting, str(new).strip("'"))
    undo = "undo that to go on with the old run, or use --fresh"
    with pytest.raises(UserError, match=f"{setting} was {old} and is {new}; {undo}"):
        go(config)
    assert snapshot(folder) == before


def test_other_stories_under_the_same_path_are_an_error(tmp_path, reference):
    config = tiny_config(tmp_path)
    stop_after(config, 9)
    stories = tmp_path / "stories.txt"
    before = snapshot(tmp_path / "checkpoints", tmp_path / "logs")
    text = stories.read_text()
    stories.write_text(text.replace("Once", "Twice"))
    changed = r"the sha256 of the train stories was '\w+' and is '\w+';.* undo that .* or use --fresh"
    with pytest.raises(UserError, match=changed):
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
    aside = [p for kind in ("checkpoints", "logs") for p in folder.glob(f"{kind}/old-*/*")]
    assert sorted(p.read_bytes() for p in aside) == before
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
    alone = "holds best_model.pt and no latest.pt; there is nothing to resume from: use --fresh"
    with pytest.raises(UserError, match=alone):
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


# ---------------------------------------------------------------- metrics.jsonl

@pytest.mark.parametrize("change", [
    lambda text: text + b'{"step": 24, "train_lo', lambda text: text + b'{"step": 24}\n{"step": 30}\n',
    lambda text: text + b"\0\0\0\0", lambda text: text[:500], lambda text: b""])
def test_metrics_are_those_of_the_checkpoint_whatever_became_of_the_file(halfway, reference, change):
    folder, config = halfway
    log = folder / "logs" / "metrics.jsonl"
    log.write_bytes(change(log.read_bytes()))
    assert go(config).code == 0
    assert differences(folder, reference) == []
    assert not list(folder.glob("logs/old-*"))


def logs_of_others(folder):
    return sorted(path.read_bytes() for path in folder.glob("logs/old-*/metrics.jsonl"))


def test_two_runs_that_share_a_log_folder_keep_their_lines_apart(tmp_path, capsys):
    """The one's lines are moved aside when the other begins or goes on, and come back from its checkpoint."""
    one = tiny_config(tmp_path, training__max_steps=12, training__checkpoint_dir=str(tmp_path / "one"))
    other = tiny_config(tmp_path, training__max_steps=9, training__eval_interval=3, training__seed=5,
                        training__checkpoint_dir=str(tmp_path / "other"))
    go(one)
    first = (tmp_path / "logs" / "metrics.jsonl").read_bytes()
    go(other)
    second = (tmp_path / "logs" / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in metrics(tmp_path)] == [3, 6, 9] and logs_of_others(tmp_path) == [first]
    one.training.max_steps = 16
    capsys.readouterr()
    go(one)
    assert capsys.readouterr().err.count("the files of an earlier run are now in") == 1
    assert (tmp_path / "logs" / "metrics.jsonl").read_bytes().startswith(first)
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 12, 16]
    assert logs_of_others(tmp_path) == sorted([first, second])


def test_a_copied_checkpoint_folder_that_both_are_continued_from_cuts_nothing(halfway):
    folder, config = halfway
    shutil.copytree(folder / "checkpoints", folder / "copy")
    config.training.max_steps = 16
    go(config)
    first = (folder / "logs" / "metrics.jsonl").read_bytes()
    config.training.checkpoint_dir, config.training.eval_interval = str(folder / "copy"), 5
    go(config)
    assert logs_of_others(folder) == [first]
    assert [line["step"] for line in metrics(folder)] == [4, 8, 15, 16]


@pytest.mark.parametrize("owner", ["missing", "empty", "ours"])
def test_lines_that_are_not_the_runs_are_moved_aside_whoever_wrote_last(halfway, reference, owner):
    folder, config = halfway
    log, text = folder / "logs" / "metrics.jsonl", b'{"step": 5, "train_loss": 1.0, "val_loss": 2.0}\n'
    log.write_bytes(text)
    if owner != "ours":
        for path in (folder / "logs" / ".owner", folder / "checkpoints" / ".owner"):
            path.unlink() if owner == "missing" else path.write_text("")
    assert go(config).code == 0
    assert logs_of_others(folder) == [text]
    assert differences(folder, reference) == [] and not list(folder.glob("checkpoints/old-*"))


def test_a_log_folder_keeps_the_checkpoints_that_lie_there(tmp_path, reference):
    shutil.copytree(reference / "checkpoints", tmp_path / "logs")
    before = {p: content for p, content in snapshot(tmp_path / "logs").items() if p.suffix == ".pt"}
    go(tiny_config(tmp_path))
    after = snapshot(tmp_path / "logs")
    assert all(after[p] == content for p, content in before.items())


def test_previous_serves_with_a_warning_where_latest_is_gone(halfway, reference, capsys):
    folder, config = halfway
    (folder / "checkpoints" / "latest.pt").unlink()
    assert go(config).code == 0
    assert f"WARNING: {folder / 'checkpoints'} has no latest.pt; going on from" in capsys.readouterr().err
    assert differences(folder, reference) == []


def test_a_run_that_was_moved_with_its_logs_goes_on_in_them(halfway, reference):
    folder, config = halfway
    moved = folder.rename(folder.parent / "elsewhere")
    for name in ("checkpoint_dir", "log_dir"):
        setattr(config.training, name, str(moved / Path(getattr(config.training, name)).name))
    config.data.data_dir = str(moved / "data")
    assert go(config).code == 0
    assert differences(moved, reference) == [] and not list(moved.glob("logs/old-*"))


def test_a_finished_run_whose_best_model_is_gone_says_so(halfway, capsys):
    _, config = halfway
    with opened(config) as run:
        assert train.train(run) == 0
        train.close(run)
        assert "best validation loss" in capsys.readouterr().out
        run.best.unlink()
    with opened(config) as run:
        assert train.train(run) == 0
        train.close(run)
    assert f"this run is complete, but {run.best} is missing" in capsys.readouterr().err
