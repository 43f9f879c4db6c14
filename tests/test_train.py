"""The loop: optimizer, schedule, precision, divergence, where a run ends, the average of the weights, memory.
"""

import contextlib
import copy
import functools
import gc
import itertools
import math
import random
import resource
import signal
import tracemalloc
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    Killed, before_step, differences, flatten, go, make_model, metrics, opened, raises, signals, stop_after,
    tiny_config)

import train
from config import TrainingConfig, UserError
from data import prepare

pytestmark = pytest.mark.usefixtures("one_process")


# ---------------------------------------------------------------- optimizer and schedule

@pytest.mark.parametrize("exact", [True, False])
def test_muon_is_torch_optims(monkeypatch, exact):
    """In float32 to rounding; in bfloat16, which torch.optim.Muon always takes, to a hundredth of a step."""
    model = make_model(50, d_ff=80)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    theirs = [p.detach().clone().requires_grad_() for p in matrices]
    before = [p.detach().clone() for p in matrices]
    if exact:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)
    training = TrainingConfig(learning_rate=0.02, weight_decay=0.3)
    ours = train.make_optimizer(model, training, torch.float32 if exact else torch.bfloat16)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.3, momentum=train.Muon.MOMENTUM, nesterov=True,
        ns_steps=train.Muon.ITERATIONS, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for p, q in zip(matrices, theirs, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        reference.step()
    for p, q, start in zip(matrices, theirs, before, strict=True):
        moved = (q - start).square().mean().sqrt()
        difference = (p - q).square().mean().sqrt()
        assert moved > 0.01 and difference < (1e-5 if exact else 0.02) * moved


@pytest.mark.parametrize("steps_per_epoch, steps", [(200, 300), (20, 200), (1e6, 5000)])
def test_weights_fade_in_one_and_a_half_epochs_or_in_200_to_5000_steps(steps_per_epoch, steps):
    """Each step takes that share of them; norms stay as they are."""
    model = make_model(50)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train.make_optimizer(model, TrainingConfig(), torch.float32, steps_per_epoch)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for name, p in model.named_parameters():
        left = 1 if p.ndim == 1 else (1 - 1 / steps) ** 10
        torch.testing.assert_close(p, before[name] * left, rtol=1e-5, atol=0)


def test_the_embedding_and_the_norms_are_adamws(monkeypatch):
    model = make_model(50)
    others = [p for name, p in model.named_parameters() if not name.startswith("layers.") or p.ndim == 1]
    theirs = [p.detach().clone().requires_grad_() for p in others]
    ours = train.make_optimizer(model, TrainingConfig(learning_rate=0.02, weight_decay=0.3), torch.float32)
    reference = torch.optim.AdamW([{"params": [p for p in theirs if p.ndim == 2], "weight_decay": 0.3},
                                   {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0}],
                                  lr=0.02, betas=(0.9, 0.98))
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p, q in zip(others, theirs, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(others, theirs)


@pytest.mark.parametrize(("step", "rate"), [
    (0, 0.25), (1, 0.5), (2, 0.75), (3, 1), (4, 1), (9, 1), (10, 1),  # four steps of warm-up, then constant
    (11, 0.9), (15, 0.5), (19, 0.1), (20, 0)])  # the decay, from 10 to the end at 20
def test_the_learning_rate(step, rate):
    training = TrainingConfig(learning_rate=3.0, warmup_steps=4, decay_fraction=0.5)
    assert train.learning_rate(step, step / 20, training) == pytest.approx(3 * rate)


def test_the_learning_rate_without_warm_up_or_decay_and_where_they_overlap():
    constant = TrainingConfig(learning_rate=2.0, warmup_steps=0, decay_fraction=0)
    assert [train.learning_rate(step, step / 4, constant) for step in range(5)] == [2, 2, 2, 2, 0]
    both = TrainingConfig(learning_rate=8.0, warmup_steps=8, decay_fraction=1)
    assert [train.learning_rate(step, step / 8, both) for step in range(9)] == [1, 2, 3, 4, 4, 3, 2, 1, 0]


def test_the_rates_of_a_run_are_those_of_its_steps(tmp_path, monkeypatch):
    """The share of the run, added up step by step, gives each step's share to the last bits."""
    rates = []
    monkeypatch.setattr(train, "average_weights", lambda *args: None)
    monkeypatch.setattr(train, "train_step", lambda loss_of, optimizer, *args: (
        rates.append(optimizer.param_groups[0]["lr"]), (torch.ones(()), torch.ones(())))[1])
    run = go(tiny_config(tmp_path, training__max_steps=700, training__eval_interval=700))
    expected = [train.learning_rate(step, step / 700, run.config.training) for step in range(700)]
    assert rates == pytest.approx(expected, rel=1e-9) and run.state.progress == 1


def test_a_run_learns_more_than_how_often_each_token_occurs(tmp_path):
    config = tiny_config(tmp_path, model__d_model=32, model__d_ff=64, training__max_steps=150,
                         training__eval_interval=50, training__learning_rate=0.02, training__weight_decay=0.1,
                         training__batch_size=8)
    tokens = prepare(config)[1].tokens
    shares = np.bincount(tokens) / len(tokens)
    entropy = -sum(share * math.log(share) for share in shares if share)  # the best without any context
    go(config)
    first, *_, last = metrics(tmp_path)
    assert 2 < entropy < 3.5 and last["train_loss"] < first["train_loss"]
    assert last["train_loss"] < entropy - 0.2 and last["val_loss"] < entropy - 0.2


# ---------------------------------------------------------------- values that are not finite

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
    message = r"not finite at step 15 and nothing of it was saved; .*latest.pt is from before; try a smaller"
    with before_step(15, lambda: now.update(diverged=True)), pytest.raises(UserError, match=message):
        go(config)
    for path in (folder / "checkpoints").glob("*.pt"):
        checkpoint = train.load_checkpoint(path)
        assert checkpoint["step"] < 15 and all(w.isfinite().all() for w in checkpoint["model"].values())
    now.clear()
    assert go(config).code == 0
    assert differences(folder, reference) == []


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_float16_overflow_skips_the_whole_step_and_halves_the_scale(tmp_path, optimizer):
    with opened(tiny_config(tmp_path, training__optimizer=optimizer)) as run:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step() -> tuple[dict, dict]:
        """Makes one step; returns the weights and the optimizer's state."""
        batch, autocast = run.batches.at(0), contextlib.nullcontext
        train.train_step(run.objective, run.optimizer, scaler, *batch, 4, 1.0, autocast)
        return copy.deepcopy((run.model.state_dict(), flatten(run.optimizer.state_dict()["state"])))

    weights, state = step()
    hook = run.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    for before, after in zip((weights, state), step()):
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert scaler.get_scale() == 512
    hook.remove()
    after, _ = step()
    assert scaler.get_scale() == 512 and not any(torch.equal(weights[k], after[k]) for k in weights)


def test_float16_training_skips_an_overflow_and_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "choose_precision", lambda *args: (torch.float16, "a test"))
    overflowing = functools.partial(torch.amp.GradScaler, init_scale=2.0**26, growth_interval=5)  # at once
    monkeypatch.setattr(torch.amp, "GradScaler", overflowing)
    whole = go(tiny_config(tmp_path / "whole"))
    assert whole.scaler.get_scale() < 2.0**26
    config = tiny_config(tmp_path / "pieces")
    stop_after(config, 7)
    run = go(config)
    assert differences(tmp_path / "pieces", tmp_path / "whole") == []
    assert run.scaler.state_dict() == whole.scaler.state_dict()


# ---------------------------------------------------------------- a budget of time

class Clock:
    """Seconds that pass when a step is made: `cost(step)` of them."""

    def __init__(self):
        self.now, self.cost = 1000.0, lambda step: 1.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    def next_step(run, next_step=train.next_step):
        clock.now += clock.cost(run.state.step + 1)
        return next_step(run)

    monkeypatch.setattr(train, "next_step", next_step)
    return clock


def budget_config(folder, seconds: float, **settings):
    return tiny_config(folder, training__max_steps=10**6, training__max_minutes=seconds / 60, **settings)


def test_max_minutes_is_used_up_although_the_first_steps_were_slow(tmp_path, clock):
    clock.cost = lambda step: 7.0 if step <= 4 else 1.0
    run = go(clock=clock, config=budget_config(tmp_path, 200))
    assert run.code == 0 and 0.95 * 200 < run.state.elapsed_seconds <= 200
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path)}  # constant for 80 s, then down to zero
    assert rates[52] == max(rates.values()) > 50 * rates[run.state.step] > 0


@pytest.mark.parametrize(("seconds", "most"), [(30, 0), (43, 0.25), (160, 1)])
def test_another_max_minutes_goes_on_at_the_rate_of_the_time_that_is_left(tmp_path, clock, seconds, most):
    go(clock=clock, config=budget_config(tmp_path, 40))
    before = len(metrics(tmp_path))
    assert go(clock=clock, config=budget_config(tmp_path, seconds)).code == 0
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert len(rates) > before and max(rates[before:]) <= most * max(rates) and rates[-1] < 0.15 * max(rates)


@pytest.mark.parametrize("interval", [3, 7, None])
def test_a_run_with_max_minutes_killed_after_a_checkpoint_is_the_undisturbed_run(
        tmp_path, clock, monkeypatch, interval):
    settings = {"training__checkpoint_interval": interval, "training__early_stopping_evals": None}
    whole = go(clock=clock, config=budget_config(tmp_path / "whole", 100, **settings))
    assert whole.state.end == whole.state.step and 90 < whole.state.step <= 100
    config, saves, kills = budget_config(tmp_path / "killed", 100, **settings), itertools.count(1), 0

    def save_latest(run, save_latest=train.Run.save_latest):
        save_latest(run)
        if run.state.step and next(saves) in kill_at:
            raise Killed

    kill_at = {1, 3, 8, 11, 12, 13, 17}
    monkeypatch.setattr(train.Run, "save_latest", save_latest)
    while True:
        try:
            run = go(clock=clock, config=config)
            break
        except Killed:
            kills += 1
            clock.now += 1234.5  # the time in which nothing runs does not count
    assert kills >= 6 and run.code == 0 and run.state.step == whole.state.step
    assert differences(tmp_path / "killed", tmp_path / "whole") == []
    run.state.metrics = whole.state.metrics  # compared above, their timestamps aside
    assert run.state == whole.state  # times, too


@pytest.mark.parametrize("ending", ["SIGTERM", "an exception"])
def test_the_plan_of_the_end_goes_on_after_a_stop_until_it_is_renewed(tmp_path, clock, ending):
    config = budget_config(tmp_path, 200, training__checkpoint_interval=10)
    step, act = (105, signals(signal.SIGTERM)) if ending == "SIGTERM" else (106, raises(Killed()))
    with before_step(step, act), contextlib.suppress(Killed):
        assert go(clock=clock, config=config).code == 143
    saved = train.load_checkpoint(tmp_path / "checkpoints" / "latest.pt")["state"]
    assert saved["step"] == (105 if ending == "SIGTERM" else 100)
    assert saved["progress"] > 0.4 and config.training.max_steps > saved["end"] > saved["step"]
    clock.cost = lambda step: 2.0  # slower now, but this is known only at the next checkpoint
    ends = {}

    def watch(run, next_step=train.next_step):
        ends[run.state.step + 1] = run.state.end
        return next_step(run)

    with mock.patch.object(train, "next_step", watch):
        run = go(clock=clock, config=config)
    renewed = saved["step"] // 10 * 10 + 10
    assert all(ends[step] == saved["end"] for step in range(saved["step"] + 1, renewed + 1))
    assert ends[renewed + 1] < saved["end"]
    assert run.code == 0 and 190 <= run.state.elapsed_seconds <= 210


@pytest.mark.parametrize(("step_takes", "evaluation_takes", "least", "most"), [
    (4.0, 0.1, 14, 16), (12.0, 2.0, 11, 16),  # a fast and a slow machine: ten points or more
    (4.0, 30.0, 2, 4)])                       # a large evaluation: no more than a tenth of the time
def test_a_run_with_max_minutes_has_a_curve_however_slow_the_machine_is(
        tmp_path, clock, monkeypatch, step_takes, evaluation_takes, least, most):
    def evaluate(model, tokens, eot_id):
        clock.now += evaluation_takes
        return np.ones(len(tokens), np.float32), None

    clock.cost = lambda step: step_takes
    monkeypatch.setattr(train, "evaluate", evaluate)
    run = go(budget_config(tmp_path, 600, training__eval_interval=None, training__early_stopping_evals=None),
             clock=clock)
    lines = metrics(tmp_path)
    assert run.code == 0 and least <= len(lines) <= most
    assert evaluation_takes * len(lines) <= 0.1 * 600 + 2 * evaluation_takes


def step_seconds(kind: str, seed: int) -> list[float]:
    """What a step takes in each tenth of a run, and beyond."""
    rng, found = random.Random(seed), [{"slower": 0.5, "faster": 4.0, "wandering": 2.0}[kind]]
    while len(found) < 15:
        change = {"slower": 2, "faster": 0.5}.get(kind, 1) if len(found) % 2 else 1
        found.append(found[-1] * (rng.choice((0.5, 0.7, 1.0, 1.4, 2.0)) if kind == "wandering" else change))
    return found


@pytest.mark.parametrize(("kind", "seed", "decay_fraction", "evaluation"), [
    ("slower", 0, 0.6, 4.0), ("faster", 0, 0.6, 4.0), ("slower", 0, 0.2, 20.0), ("faster", 0, 1.0, 1.0),
    *(("wandering", seed, fraction, 6.0) for seed, fraction in enumerate((0.6, 0.6, 0.2, 1.0)))])
def test_a_run_ends_within_its_budget_whatever_its_speed(
        tmp_path, clock, monkeypatch, kind, seed, decay_fraction, evaluation):
    budget, rates = 1000.0, []

    def evaluate(model, tokens, eot_id):
        clock.now += evaluation
        return np.ones(len(tokens), np.float32), None

    def train_step(loss_of, optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        return torch.ones(()), torch.ones(())

    def save_checkpoint(path, *args):
        clock.now += 0.5
        path.parent.mkdir(exist_ok=True)
        path.touch()

    began, by_tenth = clock.now, step_seconds(kind, seed)
    clock.cost = lambda step: by_tenth[int((clock.now - began) / (budget / 10))]
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(train, "average_weights", lambda *args: None)
    config = budget_config(
        tmp_path, budget, training__decay_fraction=decay_fraction, training__warmup_steps=20,
        training__eval_interval=50, training__checkpoint_interval=None, training__early_stopping_evals=None)
    run = go(clock=clock, config=config)
    clock.now += evaluation  # the closing story
    used = clock.now - began
    peak = max(rates)
    falls = next(i for i, rate in enumerate(rates) if i >= 20 and rate < peak)
    assert run.code == 0 and len(rates) == run.state.step == run.state.end and run.state.progress == 1
    assert 0.95 * budget <= used <= 1.05 * budget
    assert peak == pytest.approx(config.training.learning_rate, rel=1e-3) and rates[-1] < 0.15 * peak
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[falls:]))


# ---------------------------------------------------------------- where a run ends, and memory

@pytest.mark.parametrize(("batch_size", "advised"), [(8, False), (32, True)])
def test_without_a_gpu_large_steps_are_advised_against(tmp_path, capsys, batch_size, advised):
    with opened(tiny_config(tmp_path, training__batch_size=batch_size, model__max_seq_len=256)) as run:
        train.describe(run)
    assert ("--preset laptop" in capsys.readouterr().err) == advised


@pytest.mark.parametrize(
    ("decay_fraction", "planned", "evaluated"), [(0.2, 25, [24, 25]), (0.6, 50, [24, 28])])
def test_early_stopping_decays_the_rate_ends_and_keeps_the_best(
        tmp_path, monkeypatch, decay_fraction, planned, evaluated):
    def evaluate(model, tokens, *args):
        return np.full(len(tokens), 2.0 if at["run"].state.step == 12 else 2.03, np.float32), None

    def next_step(run, next_step=train.next_step):
        at["run"] = run
        return next_step(run)

    at = {}
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "next_step", next_step)
    config = tiny_config(tmp_path, training__max_steps=1000, training__early_stopping_evals=2,
                         training__decay_fraction=decay_fraction)
    stopped = stop_after(config, 22)  # in the decay, which begins at 20, after two evaluations that are worse
    assert stopped.state.end == planned  # of which the 20 before the decay are the constant part
    run = go(config)
    assert run.code == 0
    assert run.state.step == evaluated[-1] == run.state.end  # no better loss in the decay, either
    assert [line["step"] for line in metrics(tmp_path)] == [4, 8, 12, 16, 20, *evaluated]
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path)}
    assert rates[20] == config.training.learning_rate
    for step in evaluated:
        assert rates[step] == pytest.approx(rates[20] * (planned - step + 1) / (planned - 20))
    best = train.load_checkpoint(run.best)
    assert (best["step"], run.state.best_loss) == (12, 2.0)
    assert go(config).state.step == evaluated[-1]


def test_a_run_that_overfits_ends_without_a_decay(tmp_path, monkeypatch, capsys):
    losses = iter((3.0, 2.0, 2.01, 2.05))
    monkeypatch.setattr(train, "evaluate", lambda model, tokens, *args: (
        np.full(len(tokens), next(losses), np.float32), None))
    run = go(tiny_config(tmp_path, training__max_steps=1000, training__early_stopping_evals=2))
    assert run.state.step == run.state.end == 16 and train.load_checkpoint(run.best)["step"] == 8
    assert metrics(tmp_path)[-1]["lr"] == run.config.training.learning_rate
    assert "no better loss in 2 evaluations: the run ends here" in capsys.readouterr().err


@pytest.mark.parametrize(("batch_size", "interval"), [(1, 250), (2, 179), (32, 100)])
def test_a_run_is_evaluated_once_an_epoch_but_not_too_often(tmp_path, batch_size, interval):
    config = tiny_config(tmp_path, training__batch_size=batch_size, training__eval_interval=None)
    with opened(config) as run:
        assert run.eval_interval == interval


def test_the_kept_model_is_the_average_of_the_last_steps(tmp_path, monkeypatch):
    seen, next_step = [], train.next_step

    def watched(run):
        result = next_step(run)
        seen.append([p.detach().double().clone() for p in run.model.parameters()])
        return result

    monkeypatch.setattr(train, "next_step", watched)
    config = tiny_config(tmp_path, training__max_steps=12, training__eval_interval=12)
    with opened(config) as run:
        average = [p.detach().double().clone() for p in run.model.parameters()]
        assert train.train(run) == 0
    for step, weights in enumerate(seen, 1):
        rate = max(1 / 50, 10 / (step + 10))
        average = [rate * w + (1 - rate) * a for w, a in zip(weights, average)]
    latest, best = (train.load_checkpoint(path)["model"] for path in (run.latest, run.best))
    for kept, other, expected, last in zip(latest.values(), best.values(), average, seen[-1], strict=True):
        torch.testing.assert_close(kept.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept, other) and not torch.equal(kept, last.float())
    state = train.load_checkpoint(run.latest)["last_weights"]
    assert all(torch.equal(w, last.float()) for w, last in zip(state.values(), seen[-1], strict=True))


def test_the_average_costs_no_memory_as_the_run_goes_on(tmp_path):
    config = tiny_config(tmp_path, training__max_steps=5)
    with opened(config) as run:
        assert train.train(run) == 0
    tensors = list(run.average.parameters())
    assert tensors and not any(p.requires_grad for p in tensors)
    assert all(p.grad_fn is None and p.grad is None for p in tensors)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for p in run.model.parameters():
        p.grad = None
    train.average_weights(run.average, run.model, 5)
    objects, pointers = alive(), [p.data_ptr() for p in tensors]
    tracemalloc.start()
    before, resident = tracemalloc.get_traced_memory()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(3000):
        train.average_weights(run.average, run.model, 6 + step)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert alive() <= objects and [p.data_ptr() for p in tensors] == pointers
    assert grown < 100_000  # bytes of Python's own
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 20_000  # kB, of all


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(tmp_path, monkeypatch, capsys):
    settings = {"model__dropout": 0, "training__max_steps": 8}
    whole = go(tiny_config(tmp_path / "whole", **settings))
    calls, forward = itertools.count(1), train.Objective.forward

    def small_memory(self, tokens, targets):
        if (call := next(calls)) in (3, 5):  # the third step; again, when half of its gradient is there
            raise torch.OutOfMemoryError(f"call {call}")
        return forward(self, tokens, targets)

    monkeypatch.setattr(train.Objective, "forward", small_memory)
    run = go(tiny_config(tmp_path / "small", **settings))
    printed = capsys.readouterr().err
    for n in (2, 1):
        assert f"out of memory: going on with training.micro_batch_size={n}, the same step again" in printed
    assert run.micro_batch_size == 1 and next(calls) == 1 + 2 + 1 + 2 + 4 * 6
    for ours, theirs in zip(run.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
