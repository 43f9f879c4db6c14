"""Trains the model: device, optimizer, schedule, checkpoints, metrics, and the loop.

    python train.py                      resumes by itself; --help lists every setting
    torchrun --nproc_per_node=2 train.py
"""

import contextlib
import copy
import ctypes
import dataclasses
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from config import ArgumentParser, Config, TrainingConfig, UserError, config, run_main, signals_handled
from data import (
    Batches, atomic_write, best_model, file_hash, first_line, load_checkpoint, prepare, save_checkpoint, say,
    tokenizer_from_spec, write_error)
from model import Transformer, evaluate, tell_story

FIXED = ("model.", "data.max_", "training.tokenizer_type", "training.bpe_vocab_size",
         "training.batch_size", "training.seed", "training.optimizer", "training.eval_batches",
         "the sha256")  # another value makes it another run, or losses that cannot be compared
FITTING = ("model.dropout", "model.max_seq_len", "model.copy_heads")  # may differ from init_from's checkpoint
CHECKPOINTS = ("latest.pt", "previous.pt", "best_model.pt")
LOGS = ("metrics.jsonl", "run.json", "training_curves.png")
FELL_BACK = "WARNING: this run is on the bundled sample stories, since TinyStories could not be reached"


# ---------------------------------------------------------------- device, precision, processes

def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the torch device of `training.device`. Raises UserError where torch cannot compute on it."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:  # no such device, no driver for it, no kernels for it
        raise UserError(f"training.device = {name!r}: torch {torch.__version__} cannot compute on it "
                        f"({first_line(error)}); use auto or cpu, or a torch that can") from error
    return device


def choose_precision(device: torch.device, use_amp: bool) -> tuple[torch.dtype, str]:
    """Returns the dtype in which the device multiplies matrices fastest, and the reason for it."""
    if not use_amp:
        return torch.float32, "training.use_amp is false"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16, "this GPU has no bfloat16; losses are scaled"
    if device.type == "cuda" or device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, f"this {device.type.upper()} multiplies it natively"
    return torch.float32, "bfloat16 is slow on this device"


def warn_of_idle_gpu() -> None:
    """Says why torch does not use this machine's NVIDIA GPU, where it seems to have one, and what to do."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return
    reason = (f"CUDA {torch.version.cuda} does not start: CUDA 13 needs NVIDIA's driver 580 or newer. Update "
              "the driver, or install a torch for an older CUDA" if torch.version.cuda else
              "this torch is built without CUDA. Install one with it: pip install --force-reinstall torch=="
              f"{torch.__version__.split('+')[0]} --index-url https://download.pytorch.org/whl/cu130")
    say(f"{'!' * 100}\nWARNING: torch cannot use this machine's NVIDIA GPU: {reason}\n{'!' * 100}")


class Machine:
    """What computes, and how, decided once: processes, device, precision and its reason, compiling."""

    def __init__(self, training: TrainingConfig):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK") if dist.is_torchelastic_launched() else ()
        self.rank, self.world, local_rank = [int(os.environ[name]) for name in names] or (0, 1, 0)
        if training.batch_size % self.world:
            raise UserError(f"training.batch_size = {training.batch_size} must be a multiple of the "
                            f"{self.world} processes")
        self.device = choose_device(training.device, local_rank)
        self.dtype, self.reason = choose_precision(self.device, training.use_amp)
        is_cuda, has_triton = self.device.type == "cuda", importlib.util.find_spec("triton") is not None
        self.compiles = training.compile == "on" or (training.compile == "auto" and is_cuda and has_triton)
        if is_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif training.device == "auto" and self.rank == 0:
            warn_of_idle_gpu()
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")

    def autocast(self):
        """Returns the context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed for the next tensor, where the C library can. By itself glibc returns
    large blocks to the kernel, and to get them back, page by page, is a tenth to a third of a step on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**31 - 1)


def from_all_processes(*values: float) -> Tensor:
    """Returns the values of every process, (processes, values) float64 on the CPU."""
    own = torch.tensor([values], dtype=torch.float64)
    if not dist.is_initialized():
        return own
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered)


# ---------------------------------------------------------------- optimizer and schedule

class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the groups whose `muon` is a dtype: matrices of one shape, orthogonalised in it.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
    semi-orthogonal matrix, scaled here to the size of an AdamW step (Liu et al. 2025, arXiv:2502.16982), so
    that one learning rate serves both. torch.optim.Muon takes a matrix at a time, this all of a group.
    """

    MOMENTUM, ITERATIONS = 0.9, 3  # five take a tenth more time on a CPU and teach hardly more

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(**group)
        super().step()

    def _muon_step(self, params: list[Tensor], lr: float, weight_decay: float, muon: torch.dtype,
                   **others) -> None:
        gradients, state = torch.stack([p.grad for p in params]), self.state[params[0]]  # (K, rows, columns)
        if not state:
            state.update(momentum=torch.zeros_like(gradients), step=torch.zeros(()))  # which AdamW loads
        momentum = state["momentum"].lerp_(gradients, 1 - self.MOMENTUM)
        nesterov = gradients.lerp_(momentum, self.MOMENTUM)
        updates = orthogonalize(nesterov, self.ITERATIONS, muon).to(nesterov.dtype)
        scale = 0.2 * math.sqrt(max(nesterov.shape[1:]))
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates.unbind(), alpha=-lr * scale)
        for p in params:
            p.grad = None  # so that AdamW passes over it


def orthogonalize(matrices: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """Returns, for each of (K, rows, columns), about U V^T of its singular value decomposition, by the
    Newton-Schulz iteration with Jordan's quintic coefficients.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(dtype)  # only now: a small norm underflows in float16
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizer(model: Transformer, training: TrainingConfig, dtype: torch.dtype,
                   steps_per_epoch: float = 0) -> Muon:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms; or AdamW for all of them.

    Weights fade in 1 / (learning rate x weight decay) steps, best in about an epoch (Wang & Aitchison 2024,
    arXiv:2405.13698). By default that is one and a half epochs at a rate of 5e-3, but 200 steps at least and
    5,000 at most. A smaller rate fades them later, so that fine-tuning keeps what it began with.
    """
    weight_decay = training.weight_decay
    if weight_decay is None:
        weight_decay = 200 / min(max(200, 1.5 * steps_per_epoch), 5000)
    by_shape, matrices = defaultdict(list), {p for p in model.layers.parameters() if p.ndim == 2}
    for p in model.parameters():
        by_shape[p.shape, p in matrices].append(p)
    optimizer = Muon([{"params": same, "muon": dtype if is_matrix and training.optimizer == "muon" else None,
                       "weight_decay": weight_decay if len(shape) == 2 else 0.0}
                      for (shape, is_matrix), same in by_shape.items()],
                     lr=training.learning_rate, betas=(0.9, 0.98),
                     fused=model.embed_tokens.weight.device.type in ("cpu", "cuda"))
    optimizer._step_supports_amp_scaling = False  # GradScaler skips the whole step, not only AdamW's part
    return optimizer


def learning_rate(step: int, progress: float, training: TrainingConfig) -> float:
    """Returns the learning rate of the step after `step` steps and the share `progress` of the run: linear
    warm-up, constant, linear decay to zero over the last `decay_fraction` of the run.
    """
    warmup = (step + 1) / max(1, training.warmup_steps)
    decay = (1 - progress) / (training.decay_fraction or 1e-9)
    return training.learning_rate * min(1.0, warmup, decay)


# ---------------------------------------------------------------- a step

class Objective(nn.Module):
    """model.loss as a forward, which is what torch.compile and DistributedDataParallel wrap."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


def train_step(loss_of: nn.Module, optimizer: Muon, scaler: torch.amp.GradScaler, tokens: Tensor,
               targets: Tensor, micro_batch_size: int, grad_clip: float,
               autocast: Callable) -> tuple[Tensor, Tensor]:
    """One step on the mean loss over tokens (B, T), `micro_batch_size` sequences at a time.

    Returns the loss, the mean of all processes, and the gradient's norm before clipping, as tensors, without
    waiting for the device.
    """
    loss = torch.zeros((), device=tokens.device)
    optimizer.zero_grad(set_to_none=True)
    micro_batches = list(zip(tokens.split(micro_batch_size), targets.split(micro_batch_size)))
    for i, (x, y) in enumerate(micro_batches, 1):
        wait = i < len(micro_batches) and dist.is_initialized()  # the processes exchange gradients once
        with loss_of.no_sync() if wait else contextlib.nullcontext(), autocast():
            part = loss_of(x, y) * (len(x) / len(tokens))
        scaler.scale(part).backward()
        loss += part.detach()
    if dist.is_initialized():
        dist.all_reduce(loss.div_(dist.get_world_size()))
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(loss_of.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return loss, grad_norm


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, step: int) -> None:
    """Moves `average` towards the weights of `model` after `step` steps: an exponential moving average over
    the last 50, or the last tenth of them (Polyak and Juditsky 1992; Morales-Brotons et al. 2024,
    arXiv:2411.18704).

    The averaged model is the one that is evaluated and kept. It always has about half of the gain that a
    decay of the learning rate would bring, so a run that overfits before its decay still keeps a good model.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(1 / 50, 10 / (step + 10)))


# ---------------------------------------------------------------- checkpoints

def find_checkpoint(folder: Path) -> tuple[dict | None, Path | None]:
    """Returns the checkpoint to go on from and its path: latest.pt, previous.pt with a warning, or None."""
    problems = []
    for path in filter(Path.exists, (folder / "latest.pt", folder / "previous.pt")):
        try:
            checkpoint = load_checkpoint(path)
            if "last_weights" not in checkpoint:
                raise UserError(f"{path} is a best_model.pt, which holds too little to go on from")
        except UserError as error:
            problems.append(str(error))
            continue
        if path.name == "previous.pt":
            problem = problems[0] if problems else f"{folder} has no latest.pt"
            say(f"WARNING: {problem}; going on from {path}, step {checkpoint['step']:,}")
        return checkpoint, path
    if not problems and (folder / "best_model.pt").exists():
        problems.append(f"{folder} holds best_model.pt and no latest.pt")
    if problems:
        raise UserError(f"{'; '.join(problems)}; there is nothing to resume from: use --fresh, which moves "
                        "the old run aside and starts a new one, or put a checkpoint back")
    return None, None


def check_unchanged(path: Path, old: dict, new: dict) -> None:
    """Compares {name: value} of a checkpoint with the run's. Raises UserError where one of FIXED differs,
    prints other differences.
    """
    changed = {name: f"{name} was {old[name]!r} and is {value!r}"
               for name, value in new.items() if old[name] != value}
    if another := [text for name, text in changed.items() if name.startswith(FIXED)]:
        raise UserError(f"this is not the run in {path}: {'; '.join(another)}; undo that to go on with the "
                        "old run, or use --fresh, which moves it aside and starts a new one")
    if changed:
        say(f"changed since {path}: {'; '.join(changed.values())}")


def identity(dataset: dict, origin: str | None) -> dict:
    """Returns what makes a run the one that it is, beside its settings, as {name: value}."""
    return {"the sha256 of training.init_from": origin,
            **{f"the sha256 of the {split} stories": info["sha256"] for split, info in dataset.items()}}


def open_origin(folder: Path, init_from: str, checkpoint: dict | None) -> tuple[dict, str]:
    """Returns the checkpoint whose model and tokenizer the run in `folder` has, its own if there is one, and
    the SHA-256 of the one that it began from. Raises UserError.
    """
    first = best_model(init_from)
    if not checkpoint and folder.resolve() == first.parent.resolve():
        raise UserError(f"training.init_from = {init_from!r} lies in the new run's folder: choose another "
                        "training.checkpoint_dir and training.log_dir")
    source = checkpoint or load_checkpoint(first)
    if checkpoint and checkpoint["config"]["training"]["init_from"] == init_from:
        return source, checkpoint["origin"]  # whatever has become of the file
    return source, file_hash(first) if first.is_file() else "missing"


def begin_from(config: Config, source: dict) -> Config:
    """Returns `config` with the model and the tokenizer of the checkpoint `source`. Settings in FITTING
    may differ; any other that is neither the default nor that of the checkpoint is a UserError.
    """
    config, default, theirs = copy.deepcopy(config), Config().flat(), Config.of(source["config"]).flat()
    theirs["training.tokenizer_type"] = source["tokenizer"]["type"]
    for name, value in config.flat().items():
        if name.startswith(("model.", "training.tokenizer_type", "training.bpe_vocab_size")):
            if value == default[name]:
                config.set(name, theirs[name])
            elif value != theirs[name] and name not in FITTING:
                raise UserError(f"{name} is {value!r}, and {theirs[name]!r} in training.init_from = "
                                f"{config.training.init_from!r}: leave it out")
    if config.model.max_seq_len > theirs["model.max_seq_len"]:
        say(f"positions from {theirs['model.max_seq_len']:,} on are new to the model")
    return config


def lock(folder: Path, run: str) -> tuple[contextlib.AbstractContextManager, bool]:
    """Returns the lock of a run's folder, held until it is left, and whether it was `run` that wrote there
    last. Raises UserError if another process has the lock.
    """
    owner = folder / ".owner"  # a file of its own: on Windows a locked one cannot be written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        last = owner.read_text().partition(" ") if owner.exists() else ("?", "", "")
        held = filelock.FileLock(folder / ".lock", is_singleton=True).acquire(timeout=0)
        owner.write_text(f"{os.getpid()} {run}")
        return held, last[2] == run
    except filelock.Timeout:
        raise UserError(f"process {last[0]} is training in {folder}; wait for it, stop it, or choose another "
                        "training.checkpoint_dir and training.log_dir") from None
    except OSError as error:
        raise write_error(folder, error) from error


def move_aside(folder: Path, names: tuple[str, ...]) -> None:
    """Moves the files of these names into a folder old-DATE inside their own folder."""
    if files := [folder / name for name in names if (folder / name).exists()]:
        old = folder / f"old-{datetime.now():%Y%m%d-%H%M%S-%f}"
        old.mkdir()
        for file in files:
            file.rename(old / file.name)
        say(f"the files of an earlier run are now in {old}")


# ---------------------------------------------------------------- the run

@dataclass
class State:
    """What survives beside weights and optimizer. Data order, dropout and learning rate are functions of it.
    """
    end: int  # the step at which the run ends, as far as is known
    step: int = 0  # completed steps
    progress: float = 0.0  # the share of the run that is done; the learning rate is a function of it
    best_loss: float = math.inf
    evals_since_best: int = 0
    train_loss_sum: float = 0.0  # since the last evaluation
    elapsed_seconds: float = 0.0
    evaluation_seconds: float = 0.0  # of the last one
    steps_per_second: float | None = None  # of late, evaluations and checkpoints included
    metrics: list[dict] = field(default_factory=list)  # the lines of metrics.jsonl

    @property
    def train_loss(self) -> float | None:
        """The mean over the steps since the last evaluation; None where there was no step."""
        steps = self.step - (self.metrics[-1]["step"] if self.metrics else 0)
        return self.train_loss_sum / steps if steps else None


class Run:
    """One training run: what it is made of, opened where the last checkpoint left it."""

    def __init__(self, config: Config, machine: Machine, fresh: bool = False):
        training = config.training
        self.folder, self.log_dir = Path(training.checkpoint_dir), Path(training.log_dir)
        self.latest, self.best = self.folder / "latest.pt", self.folder / "best_model.pt"
        checkpoint, path = (None, None) if fresh else find_checkpoint(self.folder)

        # What the run is: its settings, its stories, and the checkpoint that it began from, if any.
        source = self.origin = None
        if training.init_from:
            source, self.origin = open_origin(self.folder, training.init_from, checkpoint)
            config = begin_from(config, source)
        self.config, self.machine = config, machine
        self.tokens_per_step = training.batch_size * config.model.max_seq_len
        self.micro_batch_size = min(training.micro_batch_size or training.batch_size,
                                    training.batch_size // machine.world)
        self.budget = 60 * (training.max_minutes or math.inf)  # seconds
        if checkpoint:
            check_unchanged(path, Config.of(checkpoint["config"]).flat(), config.flat())
        self.open_data(checkpoint, source and tokenizer_from_spec(source["tokenizer"]))
        if checkpoint:
            check_unchanged(path, identity(checkpoint["dataset"], checkpoint["origin"]),
                            identity(self.dataset, self.origin))

        # All that survives, as it is before the first step.
        torch.manual_seed(training.seed)
        self.model = Transformer(config.model, self.tokenizer.vocab_size).to(machine.device)
        if source:
            self.model.load_state_dict(source["model"])
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, training, machine.dtype, self.batches.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.state = State(training.max_steps)
        if checkpoint:
            self.restore(checkpoint)

        # What does not survive: the loss as it is computed, the locks, and when latest.pt was written.
        self.objective = Objective(self.model)
        self.loss_of = torch.compile(self.objective, dynamic=False) if machine.compiles else self.objective
        if machine.world > 1:
            self.loss_of = nn.parallel.DistributedDataParallel(self.loss_of)
        self.saved = self.state.elapsed_seconds, self.state.step
        self.locks = contextlib.ExitStack()
        if machine.rank == 0:
            self.claim_folders(path)

    def open_data(self, checkpoint: dict | None, tokenizer) -> None:
        """Prepares the streams, the training batches and the validation tokens of every evaluation."""
        config, training, machine = self.config, self.config.training, self.machine
        if machine.rank:
            from_all_processes(0)  # the first process prepares the streams, and the others find them
        try:
            self.tokenizer, train_stream, val_stream = prepare(config, checkpoint, tokenizer)
        finally:
            if not machine.rank:
                from_all_processes(0)
        self.dataset = {"train": train_stream.info, "validation": val_stream.info}
        self.fell_back = config.data.dataset == "auto" and train_stream.info["dataset"] == "sample"
        self.batches = Batches(train_stream.tokens, self.tokenizer.eot_id, training.batch_size,
                               config.model.max_seq_len, training.seed, machine.device, machine.rank,
                               machine.world)
        self.eval_interval = training.eval_interval or min(max(100, int(self.batches.steps_per_epoch)), 250)
        limit = None if training.eval_batches is None else training.eval_batches * self.tokens_per_step
        self.val_tokens, self.val_bytes = val_stream.head(limit, self.tokenizer)

    def restore(self, checkpoint: dict) -> None:
        """Takes over a checkpoint; the settings of the optimizer are those of the config."""
        self.model.load_state_dict(checkpoint["last_weights"])
        self.average.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": checkpoint["optimizer"]})
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.state = state = State(**checkpoint["state"])
        training, saved = self.config.training, checkpoint["config"]["training"]
        ends = ("max_steps", "max_minutes", "early_stopping_evals")
        if any(saved[name] != getattr(training, name) for name in ends):  # the end is planned anew
            done = max(state.step / training.max_steps, state.elapsed_seconds / self.budget)
            state.end, state.progress = training.max_steps, min(1.0, done)
            state.evals_since_best = 0

    def claim_folders(self, path: Path | None) -> None:
        """Locks the run's folders, moves aside what another run left there, and removes half-written files.
        `path` is the checkpoint that the run goes on from; None if it is new.
        """
        # The log folder comes last, and once: whose lines it holds is told by them, and by who wrote there.
        folders = dict.fromkeys(Path(os.path.realpath(folder)) for folder in (self.folder, self.log_dir))
        with contextlib.ExitStack() as locks:
            for folder in folders:
                held, is_last = lock(folder, os.path.relpath(os.path.realpath(self.folder), folder))
                locks.enter_context(held)
            self.locks = locks.pop_all()
        if not path:
            move_aside(self.folder, CHECKPOINTS)
        log = self.log_dir / "metrics.jsonl"
        lines, found = self.metrics_text(), log.read_bytes() if log.exists() else b""
        if not path or not (lines.startswith(found) or is_last and found.startswith(lines)):
            move_aside(self.log_dir, LOGS)
        if path == self.folder / "previous.pt" and self.latest.exists():
            self.latest.rename(self.latest.with_name(f"damaged-{datetime.now():%Y%m%d-%H%M%S}.pt"))
        for folder in {*folders, Path(self.config.data.data_dir)}:
            for leftover in folder.glob("*.tmp"):
                with contextlib.suppress(OSError):
                    age = datetime.now().timestamp() - leftover.stat().st_mtime
                    if folder in folders or age > 600:  # other runs may be preparing their streams
                        leftover.unlink()
        self.write_metrics()

    def evaluation_is_due(self) -> bool:
        """Every `eval_interval` steps. With max_minutes and no interval given: up to 15 times in a run, in at
        most a tenth of its time.
        """
        state, training = self.state, self.config.training
        if training.eval_interval or not training.max_minutes:
            return state.step % self.eval_interval == 0
        last = state.metrics[-1]["elapsed_seconds"] if state.metrics else 0
        return state.elapsed_seconds - last > max(self.budget / 15, 10 * state.evaluation_seconds)

    def checkpoint_is_due(self) -> bool:
        """After the first step, which compiles, and then each minute; with max_minutes 25 times in a run."""
        state, (seconds, step), interval = self.state, self.saved, self.config.training.checkpoint_interval
        if interval or state.step == 1:
            return state.step == 1 or state.step % interval == 0
        return state.step >= step + 3 and state.elapsed_seconds - seconds > min(60, self.budget / 25)

    def save(self, path: Path, **more) -> None:
        """Writes what eval.py needs, the average as `model`, and `more`. Raises UserError if it diverged."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged()
        if self.machine.rank == 0:
            content = {"step": self.state.step, "config": dataclasses.asdict(self.config),
                       "dataset": self.dataset, "tokenizer": self.tokenizer.spec(), "origin": self.origin,
                       "model": self.average.state_dict(), **more}
            save_checkpoint(path, content, self.folder / "previous.pt" if path == self.latest else None)

    def save_latest(self) -> None:
        """Writes everything into latest.pt; the one before becomes previous.pt."""
        self.saved = self.state.elapsed_seconds, self.state.step
        self.save(self.latest, state=dataclasses.asdict(self.state), last_weights=self.model.state_dict(),
                  optimizer=self.optimizer.state_dict()["state"], scaler=self.scaler.state_dict())

    def write_metrics(self) -> None:
        """Writes metrics.jsonl as a whole: nothing is ever appended to lines of another run."""
        with atomic_write(self.log_dir / "metrics.jsonl") as file:
            file.write(self.metrics_text())

    def metrics_text(self) -> bytes:
        return "".join(json.dumps(line) + "\n" for line in self.state.metrics).encode()

    def diverged(self) -> UserError:
        kept = f"{self.latest} is from before" if self.latest.exists() else "no checkpoint was written"
        rate = self.config.training.learning_rate
        return UserError(f"the loss is not finite at step {self.state.step:,} and nothing of it was saved; "
                         f"{kept}; try a smaller training.learning_rate (now {rate:g}) or "
                         "training.grad_clip, then run again")


# ---------------------------------------------------------------- where the run ends
#
# The learning rate is a function of state.progress, which every step moves towards 1, where it arrives at
# state.end. To end a run at another step is to change state.end: the rate bends, and never jumps.

def end_at(run: Run, end: int, reason: str) -> None:
    """Lets the run end at step `end`, and the decay of the learning rate begin now if it has not begun."""
    state, training = run.state, run.config.training
    if state.end == training.max_steps != end:
        say(f"{reason}: the learning rate now decays to zero, until about step {end:,}")
    state.end, state.progress = end, max(state.progress, 1 - training.decay_fraction)


def stop_early(run: Run, val_loss: float) -> None:
    """After too many evaluations without a better loss, begins the decay. Ends the run if the decay has begun
    already, or if the loss is 2 % above the best, which is more than a decay would give back.
    """
    state, training = run.state, run.config.training
    if state.evals_since_best < (training.early_stopping_evals or math.inf) or state.step == state.end:
        return
    reason, constant = f"no better loss in {state.evals_since_best} evaluations", 1 - training.decay_fraction
    if state.progress < constant and val_loss < 1.02 * state.best_loss:
        state.evals_since_best = 0
        end_at(run, round(state.step / constant), reason)
    else:
        state.end = state.step
        say(f"{reason}: the run ends here")


def end_in_time(run: Run) -> None:
    """Re-plans the last step from max_minutes, once only the decay's share of the time is left: as many more
    steps as fit into the time, at the mean of the speed since the last checkpoint and the estimate before.
    """
    state, training, (seconds, step) = run.state, run.config.training, run.saved
    if state.step == step:
        return
    speed = (state.step - step) / (state.elapsed_seconds - seconds)
    state.steps_per_second = (speed + (state.steps_per_second or speed)) / 2
    decay_begins = run.budget * max(0.1, 1 - training.decay_fraction)
    if decay_begins <= state.elapsed_seconds and state.step < state.end:
        closing = 2 * state.evaluation_seconds  # the last evaluation, and the story
        left = run.budget - state.elapsed_seconds - closing
        end = state.step + max(1, int(left * state.steps_per_second))
        end_at(run, min(end, training.max_steps), f"training.max_minutes={training.max_minutes:g}")


# ---------------------------------------------------------------- the loop

def next_step(run: Run) -> tuple[Tensor, Tensor]:
    """Makes step number state.step + 1; returns its loss and gradient norm, tensors not waited for."""
    training, state, machine = run.config.training, run.state, run.machine
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, state.progress, training)
    tokens, targets = run.batches.at(state.step)
    dropout_seed = np.random.SeedSequence([training.seed, state.step, machine.rank])
    while True:
        torch.manual_seed(int(dropout_seed.generate_state(1, np.uint64)[0] >> 1))
        try:
            loss, grad_norm = train_step(run.loss_of, run.optimizer, run.scaler, tokens, targets,
                                         run.micro_batch_size, training.grad_clip, machine.autocast)
            break
        except Exception as error:
            if is_out_of_memory(error):
                halve_micro_batch(run)
            elif run.loss_of is run.objective or machine.world > 1:  # which hooks into compiled code
                raise
            else:  # a mistake that is not the compiler's is raised again by the step without it
                say(f"WARNING: torch.compile failed ({first_line(error)[:100]}): going on without it")
                run.loss_of = run.objective
    state.progress += (1 - state.progress) / (state.end - state.step)
    state.step += 1
    average_weights(run.average, run.model, state.step)
    return loss, grad_norm


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what is missing, as torch, cuBLAS, a driver or the compiler put it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in (
        "out of memory", "ALLOC_FAILED", "OutOfMemoryError", "DefaultCPUAllocator"))


def halve_micro_batch(run: Run) -> None:
    """Halves the number of sequences at a time. Raises UserError where it cannot."""
    size = run.micro_batch_size
    if size == 1 or run.machine.world > 1:
        raise UserError(f"out of memory on {run.machine.device} with {size} sequences at a time; use a "
                        "smaller training.micro_batch_size, model or model.max_seq_len")
    run.micro_batch_size = (size + 1) // 2
    say(f"out of memory: going on with training.micro_batch_size={run.micro_batch_size}, the same step again")
    torch.cuda.empty_cache()
    torch.compiler.reset()  # of the shapes so far: after eight, it would no longer compile and not say so


def evaluate_run(run: Run, grad_norm: float, tokens_per_second: float) -> None:
    """Evaluates, keeps the model if it is the best so far, writes the metrics, tells a story, stops early."""
    state, val_loss = run.state, 0.0
    if run.machine.rank == 0:
        losses, _ = evaluate(run.average, run.val_tokens, run.tokenizer.eot_id)
        val_loss = float(losses.mean(dtype=np.float64))
    val_loss = from_all_processes(val_loss)[0].item()
    if not math.isfinite(val_loss):
        raise run.diverged()

    # The model is kept before its line is written: a kill between the two repeats both.
    state.evals_since_best += 1
    if better := val_loss < state.best_loss:
        state.best_loss, state.evals_since_best = val_loss, 0
        run.save(run.best)
    line = {"step": state.step, "train_loss": state.train_loss, "val_loss": val_loss,
            "lr": run.optimizer.param_groups[0]["lr"] if state.step else None,
            "val_perplexity": math.exp(min(val_loss, 700)),
            "val_bits_per_byte": val_loss * len(run.val_tokens) / math.log(2) / run.val_bytes,
            "tokens": state.step * run.tokens_per_step,
            "epoch": round(state.step / run.batches.steps_per_epoch, 4),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_second": round(tokens_per_second, 1),
            "elapsed_seconds": round(state.elapsed_seconds, 2),
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds")}
    state.metrics.append(line)
    state.train_loss_sum = 0.0
    if run.machine.rank == 0:
        run.write_metrics()
        story = tell_story(run.average, run.tokenizer, run.config.sampling, length=60).replace("\n", " ")
        train_loss = "" if line["train_loss"] is None else f"train loss {line['train_loss']:.4f}, "
        say(f"step {state.step:,}: {train_loss}validation loss {val_loss:.4f}{' (best)' if better else ''}, "
            f"{line['val_bits_per_byte']:.3f} bits per byte, epoch {line['epoch']:.2f}, "
            f"{tokens_per_second:,.0f} tokens/s\n    {story} ...")
    stop_early(run, val_loss)


def signal_handler(signals: list[int]) -> Callable:
    """Returns a handler that appends a signal to the list; a second signal stops the command at once."""
    def on_signal(number, frame):
        if signals[-1]:
            raise KeyboardInterrupt
        signals.append(number)

    return on_signal


def train(run: Run, clock: Callable = time.perf_counter, started: float | None = None) -> int:
    """The loop: a step; then, when due or last, evaluate and save. `clock()` is the time in seconds,
    `started` what it was when the command began. Returns 0, or 128 + the signal that stopped the run.
    """
    state, signals, stop = run.state, [0], 0
    started = (clock() if started is None else started) - state.elapsed_seconds  # as if never interrupted

    def now() -> list[float]:  # seconds, and the signal: the same in all processes, which so decide alike
        return from_all_processes(clock() - started, signals[-1]).amax(0).tolist()

    if not run.latest.exists():
        run.save_latest()
    bar = tqdm(total=state.end, initial=state.step, unit=" steps",
               disable=run.machine.rank > 0 or not sys.stderr.isatty())
    loss_sum = torch.tensor(state.train_loss_sum, device=run.machine.device)
    first, paused_at, paused_step = state.step + 1, clock(), state.step
    with bar, signals_handled(signal_handler(signals), "SIGINT", "SIGTERM", "SIGHUP"):
        if run.origin and not state.metrics:
            evaluate_run(run, math.nan, tokens_per_second=0)  # what the run begins with
        while state.step < state.end and not stop:
            loss, grad_norm = next_step(run)
            loss_sum += loss

            # What is due.
            state.elapsed_seconds, stop = now()
            saving = stop or run.checkpoint_is_due()
            evaluating = run.evaluation_is_due() or state.step == state.end
            showing = state.step == first or clock() - paused_at > (30 if bar.disable else 1)
            if not (saving or evaluating or showing):
                continue

            # Only here do we wait for the device. What follows does not count in tokens per second.
            state.train_loss_sum = loss_sum.item()
            if not math.isfinite(state.train_loss_sum):
                raise run.diverged()
            tokens_per_second = (state.step - paused_step) * run.tokens_per_step / (clock() - paused_at)
            show_progress(run, bar, tokens_per_second)
            if evaluating:
                evaluate_run(run, grad_norm.item(), tokens_per_second)
                state.evaluation_seconds = now()[0] - state.elapsed_seconds
                loss_sum.zero_()
            if saving or state.step == state.end:
                end_in_time(run)
                run.save_latest()
            paused_at, paused_step = clock(), state.step
    if not stop:
        return 0
    say(f"stopped after step {state.step:,}, saved in {run.latest}; run the same command again to go on")
    return 128 + int(stop)


def show_progress(run: Run, bar: tqdm, tokens_per_second: float) -> None:
    """Moves the bar on a terminal; prints a line in a log file."""
    state, steps_per_second = run.state, tokens_per_second / run.tokens_per_step
    left = max(0, min((state.end - state.step) / steps_per_second, run.budget - state.elapsed_seconds))
    bar.total = state.step + round(left * steps_per_second)
    text = f"loss {state.train_loss:.3f}, {tokens_per_second:,.0f} tokens/s"
    if bar.disable:
        about = "about" if run.config.training.max_minutes else "at most"  # it may end by itself
        say(f"step {state.step:,} of {about} {bar.total:,}: {text}, {about} "
            f"{timedelta(seconds=round(left))} left")
    else:
        bar.set_postfix_str(text, refresh=False)
        bar.update(state.step - bar.n)


def describe(run: Run) -> None:
    """Writes logs/run.json and prints what will run, on what, and why."""
    counts, machine = run.model.parameter_counts(), run.machine
    tokenizer, info, is_cuda = run.tokenizer, run.dataset["train"], machine.device.type == "cuda"
    name = torch.cuda.get_device_name(machine.device) if is_cuda else f"{torch.get_num_threads()} threads"
    device = (f"{machine.device} ({name}), {str(machine.dtype).removeprefix('torch.')} ({machine.reason}), "
              f"torch.compile {'on' if machine.compiles else 'off'}, {machine.world} processes")
    steps, weight_decay = run.batches.steps_per_epoch, run.optimizer.param_groups[0]["weight_decay"]
    say(f"data: {info['dataset']}, {info['stories']:,} stories, {info['tokens']:,} tokens of the "
        f"{tokenizer.name} tokenizer ({tokenizer.vocab_size:,}); {steps:,.1f} steps per epoch\n"
        f"model: {counts['total']:,} parameters, {counts['blocks']:,} of them in the blocks; weight decay "
        f"{weight_decay:.2g}\n"
        f"device: {device.removesuffix(', 1 processes')}")
    if machine.device.type == "cpu" and run.tokens_per_step > 4096:
        say("without a GPU, --preset laptop learns more in the same time")
    if machine.compiles:
        say("the first step compiles the model, which takes half a minute to a minute")
    if run.fell_back:
        say(FELL_BACK)
    if tokenizer.name == "char" and (unknown := (run.batches.tokens == tokenizer.unknown_id).mean()):
        say(f"WARNING: the char tokenizer does not know {unknown:.2%} of the training stories' characters")
    if machine.rank == 0:
        about = {"config": dataclasses.asdict(run.config), "parameters": counts, "dataset": run.dataset,
                 "tokenizer": {"type": tokenizer.name, "vocab_size": tokenizer.vocab_size}, "device": device,
                 "origin": run.origin, "weight_decay": weight_decay,
                 "python": platform.python_version(), "torch": torch.__version__, "command": sys.argv,
                 "platform": platform.platform(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
        with atomic_write(run.log_dir / "run.json") as file:
            file.write(json.dumps(about, indent=1).encode())


def close(run: Run) -> None:
    """Prints a story of the best model and its loss."""
    if not run.best.exists():
        say(f"this run is complete, but {run.best} is missing: put it back, or train again with --fresh")
        return
    best, sampling = load_checkpoint(run.best, run.machine.device), run.config.sampling
    run.average.load_state_dict(best["model"])
    story = tell_story(run.average, run.tokenizer, sampling, sampling.max_new_tokens)
    loss, dataset = run.state.best_loss, run.dataset["validation"]["dataset"]
    print(f"\n{story}\n\nbest validation loss {loss:.4f} (perplexity {math.exp(loss):.2f}) at step "
          f"{best['step']:,} of {run.state.step:,}, on {dataset} with the {run.tokenizer.name} tokenizer\n"
          f"more stories: python eval.py --checkpoint {run.best} --generate \"Once upon a time\"")
    if run.fell_back:
        say(FELL_BACK)


def main() -> int:
    started = time.perf_counter() - time.process_time()  # with the imports
    keep_freed_memory()
    parser = ArgumentParser("Trains the model; goes on from the last checkpoint if there is one.")
    parser.add_argument("--fresh", action="store_true", help="move an old run aside and start a new one")
    settings, options = parser.configure(config)
    run = Run(settings, Machine(settings.training), options.fresh)
    with run.locks:
        describe(run)
        if run.state.step:
            begin = "going on from" if run.state.step < run.state.end else "this run is complete at"
            best = f", best validation loss {run.state.best_loss:.4f}" if run.state.metrics else ""
            say(f"{begin} step {run.state.step:,}{best}")
        code = train(run, started=started)
    if code == 0 and run.machine.rank == 0:
        close(run)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_main(main)
