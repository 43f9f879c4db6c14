"""Trains the model: device, optimizer, schedule, checkpoints, metrics, and the loop.

    python train.py                      resumes by itself; --help lists every setting
    torchrun --nproc_per_node=2 train.py
"""

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from config import (
    ArgumentParser, Config, SamplingConfig, TrainingConfig, UserError, config, run_main, signals_handled)
from data import Batches, atomic_write, first_line, prepare, story_windows, write_error
from model import Transformer

CHECKPOINT_FORMAT, READABLE_FORMATS = 3, (2, 3)  # a best_model.pt of format 2 is the same
FIXED = ("model.", "data.max_", "training.tokenizer_type", "training.bpe_vocab_size",
         "training.batch_size", "training.seed", "training.optimizer",
         "the sha256", "the tokenizer")  # another value makes it another run
FELL_BACK = "WARNING: this run is on the bundled sample stories, since TinyStories could not be reached"


# ---------------------------------------------------------------- device, precision, processes

def matmul_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where it is faster than float32 on the device, else float16 on CUDA, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the torch device of `training.device`. Raises UserError where this machine has none such."""
    counts = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
              "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(next(kind for kind, count in counts.items() if count) if name == "auto" else name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    kind, count = device.type.upper(), counts.get(device.type, 1)
    if (device.index or 0) >= count:
        raise UserError(f"training.device = {name!r}: there are {count} {kind} devices here; use auto or cpu")
    return device


def choose_precision(device: torch.device, use_amp: bool) -> tuple[torch.dtype, str]:
    """Returns the dtype of matrix products and the reason for it."""
    dtype = matmul_dtype(device) if use_amp else torch.float32
    reasons = {torch.bfloat16: f"this {device.type.upper()} multiplies it natively",
               torch.float16: "this GPU has no bfloat16; losses are scaled",
               torch.float32: "bfloat16 is slow on this device" if use_amp else "training.use_amp is false"}
    return dtype, reasons[dtype]


def idle_gpu() -> str | None:
    """Returns why torch cannot use the NVIDIA GPU of this machine, and what to do, or None."""
    if torch.cuda.is_available() or not (command := shutil.which("nvidia-smi")):
        return None
    if "GPU" not in subprocess.run([command, "-L"], capture_output=True, text=True).stdout:
        return None
    if torch.version.cuda is None:
        version = torch.__version__.split("+")[0]
        return (f"this torch is built without CUDA; pip install --force-reinstall torch=={version} "
                "--index-url https://download.pytorch.org/whl/cu130 brings the one for it")
    return (f"CUDA {torch.version.cuda} does not start, mostly because NVIDIA's driver is too old for it "
            "(CUDA 13 wants 580 or newer); update the driver, or install a torch for an older CUDA")


class Machine:
    """What computes, and how, decided once: processes, device, precision and its reason, compiling."""

    def __init__(self, training: TrainingConfig):
        self.rank, self.world, local_rank = 0, 1, 0
        if dist.is_torchelastic_launched():
            self.rank, self.world, local_rank = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        elif (world := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            raise UserError(f"WORLD_SIZE = {world} is set, but not by torchrun: unset it, or use torchrun")
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
            try:
                torch.zeros(1, device=self.device).add_(1).item()
            except RuntimeError as error:
                name = torch.cuda.get_device_name()
                raise UserError(f"torch {torch.__version__} cannot compute on {name}: {first_line(error)}; "
                                "use training.device=cpu, or a torch that can") from error
        elif self.rank == 0 and (reason := idle_gpu()):
            log(f"{'!' * 100}\nWARNING: this machine's NVIDIA GPU stays idle: {reason}\n{'!' * 100}")
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


def log(message: str) -> None:
    """Prints a line of progress, above the progress bar; the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # nobody listens any more
            tqdm.write(message, file=sys.stderr)


# ---------------------------------------------------------------- optimizer and schedule

class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the groups with `muon=True`, whose parameters are matrices.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
    semi-orthogonal matrix, scaled here to the size of an AdamW step (Liu et al. 2025, arXiv:2502.16982), so
    that one learning rate serves both. torch.optim.Muon takes a matrix at a time, this all of one shape.
    """

    MOMENTUM, ITERATIONS = 0.9, 3  # five take a tenth more time on a CPU and teach hardly more

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, **options)
        self._step_supports_amp_scaling = False  # GradScaler skips the whole step, not only AdamW's part

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group.get("muon"):
                shapes = defaultdict(list)
                for p in group["params"]:
                    shapes[p.shape].append(p)
                for parameters in shapes.values():
                    self._muon_step(parameters, group["lr"], group["weight_decay"])
        super().step()

    def _muon_step(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        gradients, momenta = [p.grad for p in parameters], []
        for p in parameters:
            if not self.state[p]:  # AdamW's loader looks for `step`
                self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))
            momenta.append(self.state[p]["momentum"])
            p.grad = None  # AdamW passes over it
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)
        updates = orthogonalize(torch.stack(nesterov), self.ITERATIONS).to(parameters[0].dtype)
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, updates.unbind(), alpha=-lr * scale)


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Returns, for each of (K, rows, columns), about U V^T of its singular value decomposition, by the
    Newton-Schulz iteration with Jordan's quintic coefficients.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # before float16, which could not hold it
    x = x.to(matmul_dtype(x.device))
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizer(model: Transformer, training: TrainingConfig) -> Muon:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms; or AdamW for all of them.
    """
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p not in set(matrices)]
    groups = [{"params": matrices, "muon": training.optimizer == "muon"},
              {"params": [p for p in others if p.ndim == 2]},
              {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]
    return Muon(groups, lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.98),
                fused=matrices[0].device.type in ("cpu", "cuda"))


def learning_rate(step: int, peak: float, warmup_steps: int, decay_start: float, end: int) -> float:
    """Returns the rate after `step` steps: linear warm-up, constant, linear decay to zero at `end`."""
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (end - step) / max(1, end - decay_start)
    return peak * min(1.0, warmup, decay)


# ---------------------------------------------------------------- a step, an evaluation, a story

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

    Returns the loss and the gradient's norm before clipping, as tensors, without waiting for the device.
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

    The averaged model is the one that is evaluated and kept. At any time it has about half of what a decayed
    learning rate would give, so that the best of a run that overfits before its rate decays is not lost.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(1 / 50, 10 / (step + 10)))


def evaluate(model: Transformer, tokens: np.ndarray, eot_id: int, batch_size: int, autocast: Callable,
             progress: Callable = iter) -> tuple[np.ndarray, np.ndarray]:
    """Returns each of the tokens' (N,) cross-entropy in nats, float32, and whether it was the likeliest.

    Each story is predicted from end-of-text and its own beginning, so that the sum of a story's values is its
    exact negative log-likelihood; beyond max_seq_len the context starts anew. Dropout is off.
    """
    device, training = model.embed_tokens.weight.device, model.training
    previous = np.concatenate(([eot_id], tokens[:-1]))
    windows = story_windows(tokens, eot_id, model.config.max_seq_len)
    windows = windows[np.argsort(windows[:, 0] - windows[:, 1], kind="stable")]  # longest first
    losses, hits = np.empty(len(tokens), np.float32), np.empty(len(tokens), bool)
    model.eval()
    for i in progress(range(0, len(windows), batch_size)):
        starts, ends = windows[i:i + batch_size].T[..., None]
        index = starts + np.arange(ends[0, 0] - starts[0, 0])  # (B, T)
        inside, index = index < ends, np.minimum(index, ends - 1)  # shorter windows are padded
        x, y = (torch.from_numpy(a[index].astype(np.int64)).to(device) for a in (previous, tokens))
        with autocast():
            loss, hit = model.token_losses(x, y)
        losses[index[inside]], hits[index[inside]] = loss.cpu().numpy()[inside], hit.cpu().numpy()[inside]
    model.train(training)
    return losses, hits


def tell_story(model: Transformer, tokenizer, sampling: SamplingConfig, length: int) -> str:
    """Returns a story of at most `length` tokens, sampled with a random state of its own."""
    prompt = [tokenizer.eot_id, *tokenizer.encode("Once upon a time")]
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(sampling.seed or 0)
    story, = model.generate([prompt], length, sampling.temperature, sampling.top_k, sampling.top_p,
                            tokenizer.eot_id, generator)
    return tokenizer.decode(token for token in story if token != tokenizer.eot_id)


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Writes a checkpoint atomically; the old file becomes `keep`. Raises UserError where the disk is full.

    The file is torch.save's and, after it, its SHA-256, which torch.load ignores; `load_checkpoint` does not.
    """
    buffer = io.BytesIO()  # not the file itself: torch.save hides why it could not write
    torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, buffer)
    content = buffer.getbuffer()
    with atomic_write(path, len(content), keep) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Returns the checkpoint at `path`, its tensors on `device`. Code in the file does not run. Raises
    UserError where it is missing, of another format, or a bit has changed: torch.load might not notice.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-32]).digest() != content[-32:]:
            raise ValueError("its SHA-256 does not match")
        checkpoint = dict(torch.load(io.BytesIO(content), map_location=device, weights_only=True))
        version = checkpoint["format"]
        missing = {"step", "config", "tokenizer", "dataset", "model"} - checkpoint.keys()
        if version in READABLE_FORMATS and missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except PermissionError:  # it may be good
        raise
    except Exception as error:  # whatever torch makes of a damaged or crafted file
        reason = first_line(error)[:120]
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({reason})") from error
    if version not in READABLE_FORMATS:
        raise UserError(f"{path} has format {version} and this version reads {CHECKPOINT_FORMAT}")
    return checkpoint


def find_checkpoint(folder: Path) -> tuple[dict | None, Path | None]:
    """Returns the checkpoint to go on from and its path: latest.pt, previous.pt with a warning, or None."""
    problems = []
    for path in filter(Path.exists, (folder / "latest.pt", folder / "previous.pt")):
        try:
            checkpoint = load_checkpoint(path)
            if "last_weights" not in checkpoint:
                raise UserError(f"{path} is a best_model.pt or of an earlier version, not all to go on from")
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            log(f"WARNING: {problems[0]}; going on from {path}, step {checkpoint['step']:,}")
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
        log(f"changed since {path}: {'; '.join(changed.values())}")


def identity(dataset: dict) -> dict:
    """Returns what makes a checkpoint's streams what they are, as {name: value}."""
    return {f"the {key} of the {split} stories": info[key]
            for split, info in dataset.items() for key in ("sha256", "tokenizer")}


def lock(folder: Path) -> contextlib.AbstractContextManager:
    """Returns the lock of a run's folder, held until it is left. Raises UserError if another has it."""
    owner = folder / ".pid"  # a file of its own: on Windows a locked one cannot be written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / ".lock", is_singleton=True).acquire(timeout=0)
        owner.write_text(str(os.getpid()))
        return held
    except filelock.Timeout:
        raise UserError(f"process {owner.read_text()} is training in {folder}; wait for it, stop it, or "
                        "choose another training.checkpoint_dir and training.log_dir") from None
    except OSError as error:
        raise write_error(folder, error) from error


def move_aside(folder: Path) -> None:
    """Moves an old run's files into a folder old-DATE inside their own folder."""
    names = ("metrics.jsonl", "run.json", "training_curves.png")
    if files := [path for path in folder.iterdir() if path.suffix == ".pt" or path.name in names]:
        old = folder / f"old-{datetime.now():%Y%m%d-%H%M%S-%f}"
        old.mkdir()
        for file in files:
            file.rename(old / file.name)
        log(f"the old run's files are now in {old}")


# ---------------------------------------------------------------- the run

@dataclass
class State:
    """What survives beside weights and optimizer. Data order, dropout and rates are functions of `step`."""
    step: int = 0  # completed steps
    decay_start: float | None = None  # the plan, once max_minutes or early stopping has made one:
    end: int | None = None            # where the decay begins, and where the run ends
    last_step: int | None = None      # the latest end that early stopping allows
    best_loss: float = math.inf
    evals_since_best: int = 0
    train_loss_sum: float = 0.0  # since the last metrics line
    train_loss_count: int = 0
    elapsed_seconds: float = 0.0
    steps_per_second: float | None = None  # of late, with evaluations and checkpoints
    metrics_bytes: int = 0  # length of metrics.jsonl

    @property
    def train_loss(self) -> float:
        return self.train_loss_sum / self.train_loss_count


class Run:
    """One training run: what it is made of, opened where the last checkpoint left it."""

    def __init__(self, config: Config, machine: Machine, fresh: bool = False):
        self.config, self.machine, training = config, machine, config.training
        self.locks = contextlib.ExitStack()  # of the run's folders, until it is left
        self.folder, self.log_dir = Path(training.checkpoint_dir), Path(training.log_dir)
        self.latest, self.best = self.folder / "latest.pt", self.folder / "best_model.pt"
        self.tokens_per_step = training.batch_size * config.model.max_seq_len
        self.micro_batch_size = min(training.micro_batch_size or training.batch_size,
                                    training.batch_size // machine.world)
        checkpoint, path = (None, None) if fresh else find_checkpoint(self.folder)
        if checkpoint:
            check_unchanged(path, Config.of(checkpoint["config"]).flat(), config.flat())
        self.open_data(checkpoint)
        if checkpoint:
            check_unchanged(path, identity(checkpoint["dataset"]), identity(self.dataset))

        # All that survives, as it is before the first step.
        torch.manual_seed(training.seed)
        self.model = Transformer(config.model, self.tokenizer.vocab_size).to(machine.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, training)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.state = State()
        if machine.rank == 0:
            self.claim_folders(is_new=not checkpoint)
        if checkpoint:
            self.restore(checkpoint, path)

        # What does not: the loss as it is computed, and what was measured or shown last.
        self.objective = Objective(self.model)
        self.loss_of = torch.compile(self.objective, dynamic=False) if machine.compiles else self.objective
        if machine.world > 1:
            self.loss_of = nn.parallel.DistributedDataParallel(self.loss_of)
        self.evaluation_seconds, self.scale_shown = 0.0, self.scaler.get_scale()

    def open_data(self, checkpoint: dict | None) -> None:
        """Prepares the streams, training batches and the validation tokens of every evaluation."""
        config, training, machine = self.config, self.config.training, self.machine
        if machine.rank:
            from_all_processes(0)  # the first process prepares the streams, and the others find them
        try:
            self.tokenizer, train_stream, val_stream = prepare(config, checkpoint)
        finally:
            if not machine.rank:
                from_all_processes(0)
        self.dataset = {"train": train_stream.info, "validation": val_stream.info}
        self.fell_back = config.data.dataset == "auto" and train_stream.info["dataset"] == "sample"
        self.batches = Batches(train_stream.tokens, self.tokenizer.eot_id, training.batch_size,
                               config.model.max_seq_len, training.seed, machine.device, machine.rank,
                               machine.world)
        epoch = self.batches.windows_per_epoch // training.batch_size  # steps
        self.eval_interval = training.eval_interval or min(max(100, epoch), 250)
        limit = None if training.eval_batches is None else training.eval_batches * self.tokens_per_step
        self.val_tokens, self.val_bytes = val_stream.head(limit, self.tokenizer)

    def claim_folders(self, is_new: bool) -> None:
        """Locks the run's folders, moves aside what another run left there, removes what is half written."""
        folders = {Path(os.path.realpath(folder)) for folder in (self.folder, self.log_dir)}
        for folder in folders:
            self.locks.enter_context(lock(folder))
        if is_new:
            for folder in folders:
                move_aside(folder)
        for folder in {*folders, Path(self.config.data.data_dir)}:
            for leftover in folder.glob("*.tmp"):
                with contextlib.suppress(OSError):
                    age = datetime.now().timestamp() - leftover.stat().st_mtime
                    if folder in folders or age > 600:  # other runs may be preparing their streams
                        leftover.unlink()

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Takes over a checkpoint; the settings of the optimizer are those of the config."""
        self.model.load_state_dict(checkpoint["last_weights"])
        self.average.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": checkpoint["optimizer"]})
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.state, saved = State(**checkpoint["state"]), checkpoint["config"]["training"]
        if any(saved[k] != getattr(self.config.training, k) for k in ("max_minutes", "early_stopping_evals")):
            self.state.decay_start = self.state.end = self.state.last_step = None  # they are planned anew
        if self.machine.rank == 0:
            if self.latest.exists() and path != self.latest:
                self.latest.rename(self.latest.with_name(f"damaged-{datetime.now():%Y%m%d-%H%M%S}.pt"))
            self.cut_metrics()

    def cut_metrics(self) -> None:
        """Cuts metrics.jsonl to its length at the checkpoint: what comes after will be written again."""
        path, state = self.log_dir / "metrics.jsonl", self.state
        lines = path.read_bytes() if path.exists() else b""
        if len(lines) < state.metrics_bytes:
            log(f"WARNING: {path} has lost lines since the checkpoint")
            state.metrics_bytes = lines.rfind(b"\n") + 1
        if lines:
            os.truncate(path, state.metrics_bytes)

    def plan(self) -> tuple[float, int]:
        """Returns where the decay of the rate begins and where the run ends."""
        state, training = self.state, self.config.training
        end = min(training.max_steps, state.end or training.max_steps)
        return end * (1 - training.decay_fraction) if state.decay_start is None else state.decay_start, end

    def is_over(self) -> bool:
        return self.state.step >= self.plan()[1]

    def checkpoint_is_due(self, seconds: float, step: int) -> bool:
        """Whether another is due after the one at `seconds` and `step`; with max_minutes 25 in a run."""
        state, training = self.state, self.config.training
        if training.checkpoint_interval:
            return state.step % training.checkpoint_interval == 0
        interval = 60 * min(1, (training.max_minutes or math.inf) / 25)
        return state.step >= step + 3 and state.elapsed_seconds - seconds > interval  # so that speed is known

    def save(self, path: Path, **more) -> None:
        """Writes what eval.py needs, the average as `model`, and `more`. Raises UserError if it diverged."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged()
        if self.machine.rank == 0:
            content = {"step": self.state.step, "config": dataclasses.asdict(self.config),
                       "dataset": self.dataset, "tokenizer": self.tokenizer.spec(),
                       "model": self.average.state_dict(), **more}
            save_checkpoint(path, content, self.folder / "previous.pt" if path == self.latest else None)

    def save_latest(self) -> None:
        """Writes everything into latest.pt; the one before becomes previous.pt."""
        self.save(self.latest, state=dataclasses.asdict(self.state), last_weights=self.model.state_dict(),
                  optimizer=self.optimizer.state_dict()["state"], scaler=self.scaler.state_dict())

    def diverged(self) -> UserError:
        kept = f"{self.latest} is from before" if self.latest.exists() else "no checkpoint was written"
        rate = self.config.training.learning_rate
        return UserError(f"the loss is not finite at step {self.state.step:,} and nothing of it was saved; "
                         f"{kept}; try a smaller training.learning_rate (now {rate:g}) or "
                         "training.grad_clip, then run again")


# ---------------------------------------------------------------- where the run ends

def begin_decay(run: Run, end: int, reason: str) -> None:
    """Lets the rate fall from what it is now to zero at step `end`, where the run ends; it never rises."""
    state, (start, old_end) = run.state, run.plan()
    if state.end is None:
        log(f"{reason}: the learning rate now decays to zero, until step {end:,}")
    share = (old_end - state.step) / (old_end - min(start, state.step))  # of the peak, now
    state.decay_start, state.end = end - (end - state.step) / share, end


def stop_early(run: Run, val_loss: float) -> None:
    """Begins the decay after too many evaluations without a better loss, as if the run had been planned so;
    ends the run where that happens in the decay, or where it overfits by more than a decay would give back.
    """
    state, training, (decay_start, end) = run.state, run.config.training, run.plan()
    if training.early_stopping_evals is None or state.evals_since_best < training.early_stopping_evals:
        return
    reason = f"no better loss in {state.evals_since_best} evaluations"
    if state.step < decay_start and val_loss < 1.02 * state.best_loss:
        state.evals_since_best, state.last_step = 0, round(state.step / (1 - training.decay_fraction))
        begin_decay(run, state.last_step, reason)
    elif state.step < end:
        state.end = state.step
        log(f"{reason}: the run ends here")


def end_in_time(run: Run, seconds: float, step: int) -> None:
    """Plans the end anew, if max_minutes fix it: where they will have passed at the speed since `seconds`
    and `step`, and half as much before. The decay begins when its share of the time is left.
    """
    state, training = run.state, run.config.training
    if state.step == step:
        return
    speed = (state.step - step) / (state.elapsed_seconds - seconds)
    state.steps_per_second = (speed + (state.steps_per_second or speed)) / 2
    decay_time = 60 * (training.max_minutes or math.inf) * max(0.1, 1 - training.decay_fraction)
    if state.elapsed_seconds < decay_time or run.is_over():
        return
    closing = 2 * run.evaluation_seconds  # the last evaluation, and the story
    left = 60 * training.max_minutes - state.elapsed_seconds - closing
    end = state.step + max(1, int(left * state.steps_per_second))
    end = min(end, training.max_steps, state.last_step or training.max_steps)
    begin_decay(run, int(from_all_processes(end)[0]), f"training.max_minutes={training.max_minutes:g}")


# ---------------------------------------------------------------- the loop

def next_step(run: Run) -> tuple[Tensor, Tensor]:
    """Makes step number state.step + 1; returns its loss and gradient norm, tensors not waited for."""
    training, state, machine = run.config.training, run.state, run.machine
    rate = learning_rate(state.step, training.learning_rate, training.warmup_steps, *run.plan())
    for group in run.optimizer.param_groups:
        group["lr"] = rate
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
                log(f"WARNING: torch.compile failed ({first_line(error)[:100]}): going on without it")
                run.loss_of = run.objective
    state.step += 1
    state.train_loss_count += 1
    average_weights(run.average, run.model, state.step)
    return loss, grad_norm


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory is what is missing, as torch, cuBLAS, a driver or the compiler put it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED", "OutOfMemoryError"))


def halve_micro_batch(run: Run) -> None:
    """Halves the number of sequences at a time. Raises UserError where it cannot."""
    size = run.micro_batch_size
    if size == 1 or run.machine.world > 1:
        raise UserError(f"out of memory on {run.machine.device} with {size} sequences at a time; use a "
                        "smaller training.micro_batch_size, model or model.max_seq_len")
    run.micro_batch_size = (size + 1) // 2
    log(f"out of memory: going on with training.micro_batch_size={run.micro_batch_size}, the same step again")
    torch.cuda.empty_cache()
    torch.compiler.reset()  # of the shapes so far: after eight, it would no longer compile and not say so


def evaluate_run(run: Run, grad_norm: float, tokens_per_second: float) -> float:
    """Evaluates, keeps the model if it is the best so far, writes a metrics line and tells a story. Returns
    the validation loss.
    """
    state, machine, val_loss, began = run.state, run.machine, 0.0, time.perf_counter()
    if machine.rank == 0:
        losses, _ = evaluate(run.average, run.val_tokens, run.tokenizer.eot_id,
                             run.config.training.batch_size, machine.autocast)
        val_loss = float(losses.mean(dtype=np.float64))
    val_loss = from_all_processes(val_loss)[0].item()
    if not math.isfinite(val_loss):
        raise run.diverged()
    state.evals_since_best += 1
    if better := val_loss < state.best_loss:
        state.best_loss, state.evals_since_best = val_loss, 0
        run.save(run.best, val_loss=val_loss)
    if machine.rank == 0:
        line = metrics_line(run, val_loss, grad_norm, tokens_per_second)
        state.metrics_bytes = append_line(run.log_dir / "metrics.jsonl", json.dumps(line))
        story = tell_story(run.average, run.tokenizer, run.config.sampling, length=60).replace("\n", " ")
        log(f"step {state.step:,}: train loss {state.train_loss:.4f}, validation loss {val_loss:.4f}"
            f"{' (best)' if better else ''}, {line['val_bits_per_byte']:.3f} bits per byte, "
            f"epoch {line['epoch']:.2f}, {tokens_per_second:,.0f} tokens/s\n    {story} ...")
    state.train_loss_sum, state.train_loss_count = 0.0, 0
    run.evaluation_seconds = time.perf_counter() - began
    return val_loss


def metrics_line(run: Run, val_loss: float, grad_norm: float, tokens_per_second: float) -> dict:
    """Returns what metrics.jsonl says of an evaluation."""
    state = run.state
    return {"step": state.step, "train_loss": state.train_loss, "val_loss": val_loss,
            "lr": run.optimizer.param_groups[0]["lr"], "val_perplexity": math.exp(min(val_loss, 700)),
            "val_bits_per_byte": val_loss * len(run.val_tokens) / math.log(2) / run.val_bytes,
            "tokens": state.step * run.tokens_per_step, "epoch": round(run.batches.epoch(state.step), 4),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens_per_second": round(tokens_per_second, 1),
            "elapsed_seconds": round(state.elapsed_seconds, 2),
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds")}


def append_line(path: Path, line: str) -> int:
    """Appends a line to a file, safely on disk; returns the file's length in bytes. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()
    except OSError as error:
        raise write_error(path, error) from error


def appender(signals: list[int]) -> Callable:
    """Returns a handler that appends a signal to the list, which the loop sees; a second stops at once."""
    def on_signal(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    return on_signal


def train(run: Run, started: float) -> int:
    """The loop: a step; then, when due or last, evaluate and save. `started` is when the command began, by
    time.perf_counter(). Returns 0, or 128 + the signal that stopped it.
    """
    state, stop = run.state, 0
    if not run.latest.exists():
        run.save_latest()
    bar = tqdm(total=run.plan()[1], initial=state.step, unit=" steps",
               disable=run.machine.rank > 0 or not sys.stderr.isatty())
    loss_sum = torch.tensor(state.train_loss_sum, device=run.machine.device)
    started -= state.elapsed_seconds  # as if one process had made all of the run
    first, saved = state.step + 1, (state.elapsed_seconds, state.step)
    clock, seconds, line = time.perf_counter(), 0.0, state.step  # `seconds` of steps alone, since `line`
    signals = []
    with bar, signals_handled(appender(signals), "SIGINT", "SIGTERM", "SIGHUP"):
        while not (run.is_over() or stop):
            loss, grad_norm = next_step(run)
            loss_sum += loss
            state.elapsed_seconds = time.perf_counter() - started

            # What is due now, the same in all processes. The clock says when progress was last shown.
            showing = state.step == first or time.perf_counter() - clock > (30 if bar.disable else 1)
            stop, showing, saving = from_all_processes(
                signals[-1] if signals else 0, showing, run.checkpoint_is_due(*saved)).amax(0).tolist()
            evaluating = run.is_over() or state.step % run.eval_interval == 0
            if not (stop or showing or saving or evaluating):
                continue

            # Only here the device is waited for. From here to the bottom the clock stands.
            state.train_loss_sum = from_all_processes(loss_sum.item()).mean().item()
            if not math.isfinite(state.train_loss_sum):
                raise run.diverged()
            seconds += time.perf_counter() - clock
            tokens_per_second = (state.step - line) * run.tokens_per_step / seconds
            show_progress(run, bar, tokens_per_second)
            if evaluating:
                stop_early(run, evaluate_run(run, grad_norm.item(), tokens_per_second))
                loss_sum.zero_()
            if saving or stop or run.is_over():
                end_in_time(run, *saved)
                run.save_latest()
            if saving or state.step == 1:  # the first step compiles, and is not timed
                saved = state.elapsed_seconds, state.step
            if evaluating or state.step == first:
                seconds, line = 0.0, state.step
            clock = time.perf_counter()
    if not stop:
        return 0
    log(f"stopped after step {state.step:,}, saved in {run.latest}; run the same command again to go on")
    return 128 + int(stop)


def show_progress(run: Run, bar: tqdm, tokens_per_second: float) -> None:
    """Moves the bar on a terminal; prints a line in a log file, and anywhere that float16 overflowed."""
    state, max_minutes, scale = run.state, run.config.training.max_minutes or math.inf, run.scaler.get_scale()
    if scale < run.scale_shown:
        log(f"step {state.step:,}: float16 overflowed, step skipped, loss scale now {scale:g}")
    run.scale_shown = scale
    steps_per_second = tokens_per_second / run.tokens_per_step
    time_left = max(0, 60 * max_minutes - state.elapsed_seconds)
    left = min(time_left, (run.plan()[1] - state.step) / steps_per_second)  # seconds
    end = state.step + round(left * steps_per_second)
    text = f"loss {state.train_loss:.3f}, {tokens_per_second:,.0f} tokens/s"
    if bar.disable:
        about = "about" if max_minutes < math.inf else "at most"  # it may end by itself
        log(f"step {state.step:,} of {about} {end:,}: {text}, {about} {timedelta(seconds=round(left))} left")
    else:
        bar.total = end
        bar.set_postfix_str(text, refresh=False)
        bar.update(state.step - bar.n)


def describe(run: Run) -> None:
    """Writes logs/run.json and prints what will run, on what, and why."""
    counts, machine = run.model.parameter_counts(), run.machine
    tokenizer, info = run.tokenizer, run.dataset["train"]
    is_cuda, precision = machine.device.type == "cuda", str(machine.dtype).removeprefix("torch.")
    name = torch.cuda.get_device_name(machine.device) if is_cuda else f"{torch.get_num_threads()} threads"
    about = {"config": dataclasses.asdict(run.config), "parameters": counts, "dataset": run.dataset,
             "tokenizer": {"type": tokenizer.name, "vocab_size": tokenizer.vocab_size},
             "device": f"{machine.device} ({name})", "precision": precision, "compile": machine.compiles,
             "processes": machine.world, "python": platform.python_version(), "torch": torch.__version__,
             "platform": platform.platform(), "command": sys.argv,
             "started": datetime.now(UTC).isoformat(timespec="seconds")}
    steps_per_epoch = run.batches.windows_per_epoch / run.config.training.batch_size
    compiling = "on" if machine.compiles else "off"
    log(f"data: {info['dataset']}, {info['stories']:,} stories, {info['tokens']:,} tokens of the "
        f"{tokenizer.name} tokenizer ({tokenizer.vocab_size:,}); {steps_per_epoch:,.1f} steps per epoch\n"
        f"model: {counts['total']:,} parameters, {counts['blocks']:,} of them in the blocks\n"
        f"device: {about['device']}, {precision} ({machine.reason}), torch.compile {compiling}"
        + (f", {machine.world} processes" if machine.world > 1 else ""))
    if machine.device.type == "cpu" and run.tokens_per_step > 4096:
        log("without a GPU, --preset laptop learns more in the same time")
    if machine.compiles:
        log("the first step compiles the model, which takes half a minute to a minute")
    if run.fell_back:
        log(FELL_BACK)
    if machine.rank == 0:
        with atomic_write(run.log_dir / "run.json") as file:
            file.write(json.dumps(about, indent=1).encode())


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
            log(f"going on from step {run.state.step:,}, best validation loss {run.state.best_loss:.4f}")
        code = train(run, started)
    if code == 0 and run.machine.rank == 0:
        best = load_checkpoint(run.best, run.machine.device)
        run.average.load_state_dict(best["model"])
        story = tell_story(run.average, run.tokenizer, settings.sampling, settings.sampling.max_new_tokens)
        loss, dataset = best["val_loss"], run.dataset["validation"]["dataset"]
        print(f"\n{story}\n\nbest validation loss {loss:.4f} (perplexity {math.exp(loss):.2f}) at step "
              f"{best['step']:,} of {run.state.step:,}, on {dataset} with the {run.tokenizer.name} tokenizer")
        print(f"more stories: python eval.py --checkpoint {run.best} --generate \"Once upon a time\"")
        if run.fell_back:
            log(FELL_BACK)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_main(main)
