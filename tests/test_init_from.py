"""A run that begins with another checkpoint's weights: what it takes over, refuses, and how it resumes."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    Killed, before_step, differences, exit_code, forked, go, metrics, raises, snapshot, stop_after,
    tiny_config, write_stories)
from kill_harness import kill_at

import train
from config import UserError
from data import load_checkpoint
from eval import load_model, open_streams
from model import evaluate

pytestmark = pytest.mark.usefixtures("one_process")
THINGS = ("mat", "bed", "box", "hat", "log", "bus", "big red chair", "wall")
STORIES = [f"Once there was a cat that sat on a {one} all day. Then it sat on a {other} and sang."
           for one in THINGS for other in THINGS]


def fine_tuning(folder: Path, first: Path, **settings):
    """The config of a run on other stories, in `folder`, that begins with the model of the run in `first`."""
    write_stories(folder / "stories.txt", STORIES)
    settings = {"training__max_steps": 12, "training__init_from": str(first / "checkpoints")} | settings
    return tiny_config(folder, **settings)


def by_default(config):
    """The same, without the settings that the checkpoint knows: those are as by default."""
    default = type(config)()
    config.model, config.training.tokenizer_type = default.model, default.training.tokenizer_type
    return config


@pytest.fixture
def first(reference, tmp_path):
    """A copy of a finished run's best model, which a test may delete."""
    best = tmp_path / "first" / "checkpoints" / "best_model.pt"
    best.parent.mkdir(parents=True)
    best.write_bytes((reference / "checkpoints" / "best_model.pt").read_bytes())
    return tmp_path / "first"


def test_model_tokenizer_and_weights_are_the_checkpoints_and_step_0_is_measured(tmp_path, first):
    before, tokenizer, saved = load_model(first / "checkpoints")
    run = go(by_default(fine_tuning(tmp_path, first)))
    assert run.code == 0 and run.tokenizer.spec() == tokenizer.spec()
    assert run.config.model == before.config and run.config.training.tokenizer_type == "char"
    start, *others = metrics(tmp_path)
    losses, _ = evaluate(before, run.val_tokens, tokenizer.eot_id)
    assert start["step"] == 0 and start["train_loss"] is None
    assert start["val_loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert [line["step"] for line in others] == [4, 8, 12] and others[-1]["val_loss"] < start["val_loss"]
    about = json.loads((tmp_path / "logs" / "run.json").read_text())
    latest = load_checkpoint(run.latest)
    assert others[0]["tokens"] == 4 * 4 * 32  # steps, sequences, the checkpoint's context
    assert about["origin"] == latest["origin"] == run.origin and len(run.origin) == 64
    assert about["config"]["training"]["init_from"] == str(first / "checkpoints")
    model, _, _ = load_model(tmp_path / "checkpoints")
    assert saved["step"] == 24 and not torch.equal(model.norm.weight, before.norm.weight)


def test_the_same_seeds_give_the_same_bits_and_the_first_checkpoint_is_not_needed_to_go_on(tmp_path, first):
    go(fine_tuning(tmp_path / "whole", first))
    config = fine_tuning(tmp_path / "pieces", first)
    with before_step(2, raises(Killed())), pytest.raises(Killed):  # after the evaluation of step 0
        go(config)
    (first / "checkpoints" / "best_model.pt").unlink()
    stop_after(config, 5)
    assert go(config).code == 0
    assert differences(tmp_path / "pieces", tmp_path / "whole") == []


@pytest.mark.parametrize("moment", ["write best_model.pt", "rename best_model.pt", "write metrics.jsonl"])
def test_killed_while_step_0_is_kept(tmp_path, first, moment):
    go(fine_tuning(tmp_path / "whole", first))
    config = fine_tuning(tmp_path / "killed", first)

    def work():
        kill_at(moment, 1 + (moment == "write metrics.jsonl"))
        return go(config).code

    assert exit_code(forked(work)) == -signal.SIGKILL
    assert go(config).code == 0
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.parametrize(("name", "value", "theirs"), [
    ("model.d_ff", 64, 32), ("model.n_layers", 3, 1), ("training.tokenizer_type", "bpe", "char")])
def test_a_setting_that_contradicts_the_checkpoint_is_one_sentence_with_both_values(
        tmp_path, first, name, value, theirs):
    config = by_default(fine_tuning(tmp_path, first))
    config.set(name, value)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=f"{name} is {value!r}, and {theirs!r} in training.init_from = "):
        go(config)
    assert snapshot(tmp_path) == before


def test_dropout_and_the_context_may_be_others(tmp_path, first, capsys):
    config = fine_tuning(tmp_path, first, model__dropout=0.5, model__max_seq_len=48)
    run = go(config)
    assert (run.model.config.dropout, run.model.config.max_seq_len) == (0.5, 48)
    assert "positions from 32 on are new to the model" in capsys.readouterr().err


def test_unknown_characters_of_a_char_tokenizer_are_said_once_with_their_share(tmp_path, first, capsys):
    config = fine_tuning(tmp_path, first)
    write_stories(tmp_path / "stories.txt", [story.replace("cat", "\u65e5\u65e5") for story in STORIES])
    run = go(config)
    share = (run.batches.tokens == run.tokenizer.unknown_id).mean()
    said = f"the char tokenizer does not know {share:.2%} of the training stories' characters"
    assert 0.01 < share < 0.2 and capsys.readouterr().err.count(said) == 1


@pytest.mark.parametrize("kind", ["missing", "damaged", "foreign", "exported"])
def test_what_is_no_checkpoint_is_one_sentence_and_nothing_is_written(tmp_path, first, kind):
    best = first / "checkpoints" / "best_model.pt"
    content = best.read_bytes()
    best.unlink()
    if kind == "damaged":
        best.write_bytes(content[:-50] + bytes(50))
    elif kind == "foreign":
        torch.save({"model": {}}, best)
    elif kind == "exported":
        (best.parent / "model.safetensors").write_bytes(content)
    before = snapshot(tmp_path / "run")
    expected = "damaged or not a checkpoint" if kind in ("damaged", "foreign") else "there is no checkpoint"
    with pytest.raises(UserError, match=f"{expected}.*" if kind in ("missing", "exported") else expected):
        go(fine_tuning(tmp_path / "run", first))
    after = snapshot(tmp_path / "run")
    after.pop(tmp_path / "run" / "stories.txt")
    assert after == before


def test_what_becomes_of_the_first_checkpoint_does_not_matter_and_another_one_is_another_run(
        tmp_path, first):
    go(fine_tuning(tmp_path / "whole", first))
    config = fine_tuning(tmp_path / "run", first)
    stop_after(config, 5)
    best = first / "checkpoints" / "best_model.pt"
    model = load_checkpoint(best)
    for other in (tmp_path / "moved" / "best_model.pt", tmp_path / "other" / "best_model.pt"):
        other.parent.mkdir()
    best.rename(tmp_path / "moved" / "best_model.pt")
    train.save_checkpoint(tmp_path / "other" / "best_model.pt", {**model, "step": 7})
    for name in ("other", "nowhere"):
        config.training.init_from = str(tmp_path / name)
        with pytest.raises(UserError, match=r"the sha256 of training.init_from was '\w+' and is '\w+'; undo"):
            go(config)
    config.training.init_from = None
    with pytest.raises(UserError, match=r"the sha256 of training.init_from was '\w+' and is None"):
        go(config)
    config.training.init_from = str(tmp_path / "moved")
    stop_after(config, 8)
    train.save_checkpoint(tmp_path / "moved" / "best_model.pt", {**model, "step": 7})  # the base trains on
    assert go(config).code == 0
    found = differences(tmp_path / "run", tmp_path / "whole")
    assert [name for name in found if "init_from" not in name] == []


def test_a_run_without_init_from_does_not_go_on_with_it(tmp_path, first, halfway):
    _, config = halfway
    for name in (str(first / "checkpoints"), "nowhere.pt"):
        config.training.init_from = name
        with pytest.raises(UserError, match="the sha256 of training.init_from was None and is "):
            go(config)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_base_in_the_new_runs_own_folder_is_refused_and_stays(tmp_path, first, fresh):
    config = fine_tuning(tmp_path, first, training__checkpoint_dir=str(first / "checkpoints"))
    (first / "checkpoints" / "best_model.pt").rename(first / "checkpoints" / "base.pt")
    config.training.init_from = str(first / "checkpoints" / "base.pt")
    with pytest.raises(UserError, match="lies in the new run's folder: choose another"):
        go(config, fresh=fresh)
    assert (first / "checkpoints" / "base.pt").exists()


def test_eval_prepares_the_stories_again_with_the_same_tokenizer(tmp_path, first):
    run = go(fine_tuning(tmp_path, first))
    shutil.rmtree(tmp_path / "data")
    _, validation = open_streams(load_checkpoint(run.best), run.best)
    assert validation.info["sha256"] == run.dataset["validation"]["sha256"]


def test_the_streams_are_made_with_the_checkpoints_tokenizer(tmp_path, first):
    run = go(fine_tuning(tmp_path, first))
    text = run.tokenizer.decode(run.val_tokens.tolist())
    assert any(story in text for story in STORIES) and np.max(run.val_tokens) < run.tokenizer.vocab_size
