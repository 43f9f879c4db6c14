"""Trains the model: optimizer, schedule, loop, checkpoints, metrics.

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
import signal
import sys
import time
import zipfile
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

from config import ArgumentParser, Config, TrainingConfig, UserError, config, run_main
from data import Batches, atomic_write, prepare, write_error
from model import Transformer

CHECKPOINT_FORMAT = 2
FIXED_SETTINGS = ("model.", "data.dataset", "data.max_", "training.tokenizer_type", "training.bpe_vocab_size",
                  "training.batch_size", "training.seed", "training.optimizer")  # another value makes it another run
FELL_BACK = "WARNING: this run is on the bundled sample stories, not on TinyStories, which could not be reached when it began"


# ---------------------------------------------------------------- optimizer and schedule

class Muon(torch.optim.AdamW):
    """AdamW, and Muon for the groups with `muon=True`, whose parameters are matrices.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
    semi-orthogonal matrix, scaled here to the size of an AdamW update (Liu et al. 2025, arXiv:2502.16982), so that one
    learning rate serves both. Matrices of one shape are orthogonalised in one batch.
    """

    MOMENTUM, ITERATIONS = 0.9, 5

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
            if not self.state[p]:
                self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))  # AdamW's loader looks for `step`
            momenta.append(self.state[p]["momentum"])
            p.grad = None  # AdamW passes over it
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)
        updates = orthogonalize(torch.stack(nesterov), self.ITERATIONS).to(parameters[0].dtype)
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, updates.unbind(), alpha=-lr * scale)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Returns, for each of (K, rows, columns), about U V^T of its singular value decomposition, by the Newton-Schulz
    iteration with Jordan's quintic coefficients.
    """
    x = matrices.to(matmul_dtype(matrices.device))
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def make_optimizer(model: Transformer, training: TrainingConfig) -> Muon:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms; or AdamW for all of them."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    in_blocks = set(matrices)
    embedding = [p for p in model.parameters() if p.ndim == 2 and p not in in_blocks]
    assert len(matrices) + len(norms) + len(embedding) == len(list(model.parameters())), "the groups must partition the parameters"
    device = embedding[0].device.type
    return Muon([{"params": matrices, "muon": training.optimizer == "muon"}, {"params": embedding},
                 {"params": norms, "weight_decay": 0.0}], lr=training.learning_rate, weight_decay=training.weight_decay,
                betas=(0.9, 0.98), fused=device in ("cpu", "cuda"))


def learning_rate(step: int, peak: float, warmup_steps: int, decay_start: float, end: int) -> float:
    """Returns the rate of the update after `step` updates: linear warm-up, constant, linear decay to zero at `end`."""
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (end - step) / max(1, end - decay_start)
    return peak * min(1.0, warmup, decay)


# ---------------------------------------------------------------- device, precision, processes

def matmul_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where the device multiplies it faster than float32, else float16 on CUDA, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the torch device of `training.device`. Raises UserError where this machine has none such."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    device = torch.device(next(kind for kind, count in counts.items() if count) if name == "auto" else name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    count = counts.get(device.type, 1)
    if (device.index or 0) >= count:
        raise UserError(f"training.device = {name!r}: this machine has {count} {device.type.upper()} devices; "
                        "use training.device=auto or cpu")
    return device


def choose_precision(device: torch.device, use_amp: bool) -> tuple[torch.dtype, str]:
    """Returns the dtype of matrix products and the reason for it."""
    dtype = matmul_dtype(device) if use_amp else torch.float32
    reasons = {torch.bfloat16: f"this {device.type.upper()} multiplies it natively",
               torch.float16: "this GPU has no bfloat16; losses are scaled",
               torch.float32: "bfloat16 is slow on this device" if use_amp else "training.use_amp is false"}
    return dtype, reasons[dtype]


def keep_freed_memory() -> None:
    """Makes malloc keep what is freed for the next tensor. By itself glibc returns large blocks to the kernel, and to get
    them back, page by page, is a tenth to a third of an update on a CPU. Does nothing where the C library has no such option.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(option, 2**31 - 1)


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def over_processes(*values: float) -> Tensor:
    """Returns the values of every process, (processes, values) float64 on the CPU; the first process's come first."""
    box = torch.tensor([values], dtype=torch.float64)
    if not dist.is_initialized():
        return box
    boxes = [torch.empty_like(box) for _ in range(dist.get_world_size())]
    dist.all_gather(boxes, box)
    return torch.cat(boxes)


def log(message: str) -> None:
    """Prints a line of progress, above the progress bar; the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(message, file=sys.stderr)


# ---------------------------------------------------------------- checkpoints

@dataclass
class State:
    """What survives beside weights and optimizer. Data order, dropout and rates are functions of `step`."""
    step: int = 0  # completed updates
    decay_start: float | None = None  # where the decay begins and the run ends, once max_minutes or early
    end: int | None = None            # stopping has fixed it; None: as the settings say
    best_loss: float = math.inf
    evals_since_best: int = 0
    train_loss_sum: float = 0.0  # since the last metrics line
    train_loss_count: int = 0
    elapsed_seconds: float = 0.0
    metrics_bytes: int = 0  # length of metrics.jsonl

    @property
    def train_loss(self) -> float:
        return self.train_loss_sum / self.train_loss_count


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Writes a checkpoint atomically; `keep` becomes the one before. Raises UserError where the disk is full.

    The file is torch.save's and, after it, its SHA-256: torch.load takes no notice of that, `load_checkpoint` does.
    """
    buffer = io.BytesIO()  # not the file itself: torch.save hides why it could not write
    torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, buffer)
    content = buffer.getbuffer()
    with atomic_write(path, len(content), keep) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Returns the checkpoint at `path`, its tensors on `device`. Code in the file does not run. Raises UserError where it is
    missing, of another format, or a single bit has changed: from most such files torch.load returns wrong weights.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-32]).digest() != content[-32:]:
            raise ValueError("its SHA-256 does not match")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # a size that a crafted file only claims must not be allocated
            if sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise ValueError("it is smaller than its contents")
        checkpoint = dict(torch.load(io.BytesIO(content), map_location=device, weights_only=True))
        version = checkpoint["format"]
        missing = {"step", "config", "tokenizer", "dataset", "model"} - checkpoint.keys()
        if version == CHECKPOINT_FORMAT and missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:  # whatever zipfile and torch make of a damaged or crafted file
        detail = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({detail})") from error
    if version != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has format {version} and this version reads {CHECKPOINT_FORMAT}")
    return checkpoint


def find_checkpoint(directory: Path) -> tuple[dict | None, Path | None]:
    """Returns the checkpoint to go on from, which is latest.pt, or previous.pt with a warning, and its path; or None, None."""
    problems = []
    for path in filter(Path.exists, (directory / "latest.pt", directory / "previous.pt")):
        try:
            checkpoint = load_checkpoint(path)
            if "optimizer" not in checkpoint:
                raise UserError(f"{path} is a copy of best_model.pt, which has the weights and not the state to go on from")
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            log(f"WARNING: {problems[0]}; going on from {path}, update {checkpoint['step']:,}")
        return checkpoint, path
    if not problems and (directory / "best_model.pt").exists():
        problems.append(f"{directory} holds best_model.pt and no latest.pt")
    if problems:
        raise UserError(f"{'; '.join(problems)}; there is nothing to resume from: use --fresh, which moves the old run aside "
                        "and starts a new one, or put a checkpoint back")
    return None, None


def check_unchanged(path: Path, old: dict, new: dict, naming: str, fixed: tuple[str, ...]) -> None:
    """Compares what the checkpoint at `path` has as {section: {name: value}} with what the run has now. Raises UserError
    where a value differs whose name, written as in `naming`, begins with one of `fixed`; prints other differences.
    """
    changed = {}
    for section, values in new.items():
        for key, value in values.items():
            if (was := old[section].get(key, value)) != value:
                name = naming.format(section, key)
                changed[name] = f"{name} was {was!r} and is {value!r}"
    if another := [change for name, change in changed.items() if name.startswith(fixed)]:
        raise UserError(f"this is not the run in {path}: {'; '.join(another)}; undo that to go on with the old run, or use "
                        "--fresh, which moves it aside and starts a new one")
    if changed:
        log(f"changed since {path}: {'; '.join(changed.values())}")


def lock(directory: Path) -> filelock.FileLock:
    """Returns the held lock of a run's folder, which ends with the process. Raises UserError where another run holds it."""
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path)
        held.acquire(timeout=0)
        path.write_text(str(os.getpid()))
        return held
    except filelock.Timeout:
        raise UserError(f"process {path.read_text()} is training in {directory}; wait for it, stop it, or choose another "
                        "training.checkpoint_dir and training.log_dir") from None
    except OSError as error:
        raise write_error(directory, error) from error


def move_aside(directory: Path) -> None:
    """Moves an old run's files into a folder old-DATE inside their own folder."""
    files = [p for names in ("*.pt", "metrics.jsonl", "run.json", "training_curves.png") for p in directory.glob(names)]
    if files:
        old = directory / f"old-{datetime.now():%Y%m%d-%H%M%S}"
        old.mkdir(exist_ok=True)
        for file in files:
            file.rename(old / file.name)
        log(f"the old run's files are now in {old}")


# ---------------------------------------------------------------- updates and evaluation

class Objective(nn.Module):
    """model.loss as a forward, which is what torch.compile and DistributedDataParallel wrap."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.loss(tokens, targets)


def gather(stream: Tensor, starts: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and targets (B, T) int64, on the stream's device, of the windows that begin at `starts` (B,)."""
    positions = torch.from_numpy(starts).to(stream.device, non_blocking=True)[:, None]
    windows = stream[positions + torch.arange(seq_len + 1, device=stream.device)].long() & 0xFFFF  # stored as int16
    return windows[:, :-1], windows[:, 1:]


def train_step(objective: nn.Module, optimizer: Muon, scaler: torch.amp.GradScaler, tokens: Tensor, targets: Tensor,
               micro_batch_size: int, grad_clip: float, context: Callable) -> tuple[Tensor, Tensor]:
    """One update from the mean loss over tokens (B, T), `micro_batch_size` sequences at a time.

    Returns the loss and the gradient's norm before clipping, as tensors, without waiting for the device.
    """
    loss = torch.zeros((), device=tokens.device)
    optimizer.zero_grad(set_to_none=True)
    micro_batches = list(zip(tokens.split(micro_batch_size), targets.split(micro_batch_size)))
    for i, (x, y) in enumerate(micro_batches, 1):
        wait = i < len(micro_batches) and dist.is_initialized()  # the processes exchange gradients once
        with objective.no_sync() if wait else contextlib.nullcontext(), context():
            part = objective(x, y) * (len(x) / len(tokens))
        scaler.scale(part).backward()
        loss += part.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    return loss, grad_norm


def average_weights(average: nn.Module, model: nn.Module, step: int) -> None:
    """Moves `average` towards the weights of `model` after `step` updates: an exponential moving average over the last 50
    updates, or the last tenth of them (Polyak and Juditsky 1992; Morales-Brotons et al. 2024, arXiv:2411.18704).

    The averaged model is the one that is evaluated and kept. At any time it has about half of what a decayed learning rate
    would give, so that the best of a run that overfits before its rate decays is not lost.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), max(1 / 50, 10 / (step + 10)))


def story_windows(tokens: np.ndarray, eot_id: int, seq_len: int) -> list[tuple[int, int]]:
    """Returns the (start, end) of every story, end-of-text included; stories longer than `seq_len` in pieces."""
    ends = np.union1d(np.flatnonzero(tokens == eot_id) + 1, len(tokens)).tolist()
    return [(s, min(s + seq_len, end)) for start, end in zip([0, *ends], ends) for s in range(start, end, seq_len)]


def evaluate(model: Transformer, tokens: np.ndarray, eot_id: int, batch_size: int, context: Callable,
             progress: Callable = iter) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cross-entropy in nats (float32) and whether the likeliest token was right, for every one of `tokens` (N,).

    Each story is predicted from end-of-text and its own beginning, so that the sum of a story's values is its exact
    negative log-likelihood; beyond max_seq_len the context starts anew. Dropout is off.
    """
    device, training = model.embed_tokens.weight.device, model.training
    previous = np.concatenate(([eot_id], tokens[:-1]))
    windows = sorted(story_windows(tokens, eot_id, model.config.max_seq_len), key=lambda w: w[0] - w[1])  # longest first
    losses, hits = np.empty(len(tokens), np.float32), np.empty(len(tokens), bool)
    model.eval()
    for i in progress(range(0, len(windows), batch_size)):
        batch = windows[i:i + batch_size]
        index = np.array([[min(s + t, e - 1) for t in range(batch[0][1] - batch[0][0])] for s, e in batch])  # padded
        x, y = (torch.from_numpy(a[index].astype(np.int64)).to(device) for a in (previous, tokens))
        with context():
            loss, hit = model.token_losses(x, y)
        for (s, e), l, h in zip(batch, loss.cpu().numpy(), hit.cpu().numpy()):
            losses[s:e], hits[s:e] = l[:e - s], h[:e - s]
    model.train(training)
    return losses, hits


def tell_story(model: Transformer, tokenizer, length: int) -> str:
    """Returns a story sampled with a random state of its own, at temperature 0.8 and top_k 50."""
    prompt = [tokenizer.eot_id, *tokenizer.encode("Once upon a time")]
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(0)
    story = model.generate([prompt], length, 0.8, 50, eot_id=tokenizer.eot_id, generator=generator)[0][1:]
    return tokenizer.decode(story[:-1] if story[-1] == tokenizer.eot_id else story)


# ---------------------------------------------------------------- the run

class Run:
    """One training run: what it is made of, opened where the last checkpoint left it."""

    def __init__(self, config: Config, fresh: bool = False):
        training = config.training
        folder, self.log_dir = Path(training.checkpoint_dir), Path(training.log_dir)
        self.latest, self.previous, self.best = (folder / f"{name}.pt" for name in ("latest", "previous", "best_model"))
        self.config, self.metrics = config, self.log_dir / "metrics.jsonl"
        self.tokens_per_update = training.batch_size * config.model.max_seq_len
        self.open_device()
        checkpoint, path = (None, None) if fresh else find_checkpoint(folder)
        if checkpoint:
            check_unchanged(path, checkpoint["config"], dataclasses.asdict(config), "{}.{}", FIXED_SETTINGS)
        self.open_data(checkpoint)
        if checkpoint:
            check_unchanged(path, checkpoint["dataset"], self.dataset, "the {1} of the {0} stories",
                            ("the tokenizer", "the sha256"))

        # All that survives, as it is before the first update.
        torch.manual_seed(training.seed)
        self.model = Transformer(config.model, self.tokenizer.vocab_size).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.state = State()
        if self.rank == 0:
            self.locks = [lock(f) for f in {folder, self.log_dir}]
            for f in {folder, self.log_dir}:
                if not checkpoint:
                    move_aside(f)
                for leftover in f.glob("*.tmp"):
                    leftover.unlink()
        if checkpoint:
            self.restore(checkpoint, path)

        self.scale = self.scaler.get_scale()  # when progress was last shown
        self.objective = Objective(self.model)
        self.forward = torch.compile(self.objective) if self.compiled else self.objective
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)

    def open_device(self) -> None:
        """Decides what computes, and how: processes, device, precision, compiling, micro-batches."""
        training = self.config.training
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if training.batch_size % self.world:
            raise UserError(f"training.batch_size = {training.batch_size} must be a multiple of the {self.world} processes")
        self.device = choose_device(training.device, int(os.environ.get("LOCAL_RANK", 0)))
        self.dtype, self.dtype_reason = choose_precision(self.device, training.use_amp)
        self.context = lambda: autocast(self.device, self.dtype)
        has_triton = importlib.util.find_spec("triton") is not None  # torch.compile's code generator on GPUs
        self.compiled = training.compile == "on" or (training.compile == "auto" and self.device.type == "cuda" and has_triton)
        self.micro_batch_size = min(training.micro_batch_size or training.batch_size, training.batch_size // self.world)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def open_data(self, checkpoint: dict | None) -> None:
        """Prepares the streams; what `auto` was when the run began, it remains."""
        config, training = self.config, self.config.training
        wanted = copy.deepcopy(config)
        if checkpoint and config.data.dataset == "auto":
            wanted.data.dataset = checkpoint["dataset"]["train"]["dataset"]
            wanted.training.tokenizer_type = checkpoint["tokenizer"]["type"]
        self.tokenizer, train_stream, val_stream = prepare(wanted)
        self.dataset = {"train": train_stream.info, "validation": val_stream.info}
        self.fell_back = config.data.dataset == "auto" and train_stream.info["dataset"] == "sample"
        self.batches = Batches(train_stream.tokens, training.batch_size, config.model.max_seq_len, training.seed)
        self.stream = torch.from_numpy(train_stream.tokens.view(np.int16)).to(self.device)
        limit = len(val_stream.tokens)
        if training.eval_batches is not None:
            limit = min(limit, training.eval_batches * self.tokens_per_update)
        ends = np.flatnonzero(val_stream.tokens[:limit] == self.tokenizer.eot_id)
        self.val_tokens = np.array(val_stream.tokens[:ends[-1] + 1 if len(ends) else limit])
        self.val_bytes = len(self.tokenizer.decode(self.val_tokens[self.val_tokens != self.tokenizer.eot_id]).encode())

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Takes over a checkpoint; the settings of the optimizer are those of the config, its state the checkpoint's."""
        self.model.load_state_dict(checkpoint["weights"])
        self.average.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": checkpoint["optimizer"]})
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.state = State(**{f.name: checkpoint[f.name] for f in dataclasses.fields(State)})
        saved = checkpoint["config"]["training"]
        if any(saved[k] != getattr(self.config.training, k) for k in ("max_minutes", "early_stopping_evals")):
            self.state.decay_start = self.state.end = None  # they are fixed anew
        if self.rank == 0:
            if self.latest.exists() and path != self.latest:
                self.latest.rename(self.latest.with_name(f"damaged-{datetime.now():%Y%m%d-%H%M%S}.pt"))
            lines = self.metrics.read_bytes() if self.metrics.exists() else b""
            if len(lines) < self.state.metrics_bytes:
                log(f"WARNING: {self.metrics} has lost lines since the checkpoint")
                self.state.metrics_bytes = lines.rfind(b"\n") + 1
            if lines:
                os.truncate(self.metrics, self.state.metrics_bytes)

    def checkpoint(self) -> dict:
        """Returns all that eval.py needs: averaged weights, config, tokenizer, and where they come from."""
        return {"step": self.state.step, "config": dataclasses.asdict(self.config), "tokenizer": self.tokenizer.spec(),
                "dataset": self.dataset, "model": self.average.state_dict()}

    def save(self) -> None:
        """Writes latest.pt; the one before becomes previous.pt. Raises UserError where a weight is not finite."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged()
        if self.rank == 0:
            save_checkpoint(self.latest, {**self.checkpoint(), **dataclasses.asdict(self.state), "weights": self.model.state_dict(),
                                          "optimizer": self.optimizer.state_dict()["state"],
                                          "scaler": self.scaler.state_dict()}, self.previous)

    def diverged(self) -> UserError:
        kept = f"{self.latest} is from before" if self.latest.exists() else "no checkpoint was written"
        return UserError(f"the loss is not finite at update {self.state.step:,} and nothing of it was saved; {kept}; try a smaller "
                         f"training.learning_rate (now {self.config.training.learning_rate:g}) or training.grad_clip, then run again")

    def schedule(self) -> tuple[float, int]:
        """Returns where the decay begins and where the run ends."""
        training = self.config.training
        end = min(training.max_steps, self.state.end or training.max_steps)
        return self.state.decay_start or end * (1 - training.decay_fraction), end


def update(run: Run) -> tuple[Tensor, Tensor]:
    """Makes update number state.step + 1; returns its loss and gradient norm as tensors, without waiting for them."""
    training, step = run.config.training, run.state.step
    rate = learning_rate(step, training.learning_rate, training.warmup_steps, *run.schedule())
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    tokens, targets = gather(run.stream, run.batches.starts(step)[run.rank::run.world], run.config.model.max_seq_len)
    dropout_seed = np.random.SeedSequence([training.seed, step, run.rank]).generate_state(1, np.uint64)[0] >> 1
    while True:
        torch.manual_seed(int(dropout_seed))
        try:
            return train_step(run.forward, run.optimizer, run.scaler, tokens, targets, run.micro_batch_size, training.grad_clip,
                              run.context)
        except torch.OutOfMemoryError:
            if run.micro_batch_size == 1 or run.world > 1:
                raise UserError(f"out of memory on {run.device} with {run.micro_batch_size} sequences at a time; use a smaller "
                                "training.micro_batch_size, model or model.max_seq_len") from None
            run.micro_batch_size = (run.micro_batch_size + 1) // 2
            log(f"out of memory: going on with training.micro_batch_size={run.micro_batch_size}, the same update again")
            torch.cuda.empty_cache()
        except torch._dynamo.exc.TorchDynamoException as error:
            if run.world > 1:  # its hooks on the parameters would remain
                raise UserError("torch.compile failed; use training.compile=off") from error
            log(f"torch.compile failed ({str(error).splitlines()[0][:100]}): going on without it")
            run.forward = run.objective


def evaluate_run(run: Run, grad_norm: float, tokens_per_second: float) -> None:
    """Evaluates, keeps the model if it is the best so far, writes a metrics line and tells a story."""
    state, val_loss = run.state, 0.0
    if run.rank == 0:
        losses, _ = evaluate(run.average, run.val_tokens, run.tokenizer.eot_id, run.config.training.batch_size, run.context)
        val_loss = float(losses.mean(dtype=np.float64))
    val_loss = over_processes(val_loss)[0].item()
    if not math.isfinite(val_loss):
        raise run.diverged()
    state.evals_since_best += 1
    if better := val_loss < state.best_loss:
        state.best_loss, state.evals_since_best = val_loss, 0
    if run.rank == 0:
        if better:
            save_checkpoint(run.best, {**run.checkpoint(), "val_loss": val_loss})
        line = write_metrics(run, val_loss, grad_norm, tokens_per_second)
        log(f"update {state.step:,}: train loss {state.train_loss:.4f}, validation loss {val_loss:.4f}"
            f"{' (best)' if better else ''}, {line['val_bits_per_byte']:.3f} bits per byte, epoch {line['epoch']:.2f}, "
            f"{tokens_per_second:,.0f} tokens/s\n"
            f"    {tell_story(run.average, run.tokenizer, length=60).replace(chr(10), ' ')} ...")


def write_metrics(run: Run, val_loss: float, grad_norm: float, tokens_per_second: float) -> dict:
    """Appends a line to metrics.jsonl and returns it."""
    state = run.state
    line = {"step": state.step, "train_loss": state.train_loss, "val_loss": val_loss, "lr": run.optimizer.param_groups[0]["lr"],
            "val_perplexity": math.exp(min(val_loss, 700)),
            "val_bits_per_byte": val_loss * len(run.val_tokens) / math.log(2) / run.val_bytes,
            "tokens": state.step * run.tokens_per_update, "epoch": round(run.batches.epoch(state.step), 4),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None, "tokens_per_second": round(tokens_per_second, 1),
            "elapsed_seconds": round(state.elapsed_seconds, 2),
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        run.log_dir.mkdir(parents=True, exist_ok=True)
        with open(run.metrics, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            state.metrics_bytes = file.tell()
    except OSError as error:
        raise write_error(run.metrics, error) from error
    return line


def stop_early(run: Run) -> None:
    """Begins the decay of the rate where too many evaluations brought no better loss, as if the run had been planned to
    begin it there; ends the run where that happens in the decay.
    """
    state, patience = run.state, run.config.training.early_stopping_evals
    decay_start, end = run.schedule()
    if patience is None or state.evals_since_best < patience or state.step >= end:
        return
    if state.step < decay_start:
        state.decay_start, state.end = state.step, round(state.step / (1 - run.config.training.decay_fraction))
        state.evals_since_best = 0
        log(f"no better loss in {patience} evaluations: the learning rate now decays to zero, until update {state.end:,}")
    else:
        state.end = state.step
        log(f"no better loss in {patience} evaluations: the run ends here")


def expected_end(run: Run, seconds_per_update: float, seconds_per_evaluation: float = 0.0) -> int:
    """Returns the update at which the run ends, or will if max_minutes, not fixed yet, pass at the speed measured so far."""
    training, state = run.config.training, run.state
    if training.max_minutes is None or state.end is not None:
        return run.schedule()[1]
    left = 60 * training.max_minutes - state.elapsed_seconds - 2 * seconds_per_evaluation  # this one, and the last
    updates = max(1, int(left / (seconds_per_update + seconds_per_evaluation / training.eval_interval)))
    return min(training.max_steps, state.step + updates)


def fix_end(run: Run, seconds_per_update: float, seconds_per_evaluation: float) -> None:
    """Begins the decay of the rate and sets, once, the update at which max_minutes will have passed."""
    decay_start, end = run.schedule()[0], expected_end(run, seconds_per_update, seconds_per_evaluation)
    run.state.decay_start, run.state.end = min(decay_start, run.state.step), int(over_processes(end)[0])
    log(f"{seconds_per_update:.3g} s per update: training.max_minutes={run.config.training.max_minutes:g} end at update "
        f"{run.state.end:,}, and until then the learning rate decays to zero")


def catch_signals() -> list[int]:
    """Returns a list to which SIGINT and SIGTERM are appended; a second one stops at once."""
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return signals


def train(run: Run, started: float) -> int:
    """The loop: update; then, when due or last, evaluate and save. Returns 0, or 128 + the signal that stopped it."""
    state, training, signals, stop = run.state, run.config.training, catch_signals(), 0
    if not run.latest.exists():
        run.save()
    loss_sum = torch.tensor(state.train_loss_sum, device=run.device)
    bar = tqdm(total=run.schedule()[1], initial=state.step, unit=" updates", disable=run.rank > 0 or not sys.stderr.isatty())
    started -= state.elapsed_seconds  # as if one process had made all of the run
    decay_time = 60 * (training.max_minutes or math.inf) * max(0.1, 1 - training.decay_fraction)  # by then speed is known
    first_step, paused, shown = state.step + 1, 0.0, -math.inf
    begin = line = (time.monotonic(), state.step)  # from where speed is measured: in this process, since the last metrics line
    while state.step < run.schedule()[1] and not stop:
        loss, grad_norm = update(run)
        state.step += 1
        average_weights(run.average, run.model, state.step)
        state.train_loss_count += 1
        loss_sum += loss

        now = time.monotonic()
        state.elapsed_seconds = now - started
        stop, showing, fixing = over_processes(
            signals[-1] if signals else 0, now - shown > (30 if bar.disable else 1),
            state.end is None and state.elapsed_seconds > decay_time and state.step >= first_step + 3).amax(0).tolist()
        fixing = fixing and not stop  # an evaluation that is due is not put off: its line would be missing
        evaluating = fixing or state.step % training.eval_interval == 0 or state.step == run.schedule()[1]
        saving = stop or evaluating or state.step % training.checkpoint_interval == 0
        if saving or showing:  # only here the device is waited for
            state.train_loss_sum = over_processes(loss_sum.item()).mean().item()
            if not math.isfinite(state.train_loss_sum):
                raise run.diverged()
            shown = time.monotonic()
            seconds_per_update = (shown - paused - begin[0]) / (state.step - begin[1])
            tokens_per_second = (state.step - line[1]) * run.tokens_per_update / (shown - paused - line[0])
            show_progress(run, bar, tokens_per_second, seconds_per_update)
        if evaluating:
            evaluate_run(run, grad_norm.item(), tokens_per_second)
            state.train_loss_sum, state.train_loss_count = 0.0, 0
            loss_sum.zero_()
            stop_early(run)
            if fixing:
                fix_end(run, seconds_per_update, time.monotonic() - shown)
        if saving:
            run.save()
            paused += time.monotonic() - shown
        if evaluating or state.step == first_step:
            line = (time.monotonic() - paused, state.step)
            begin = line if state.step == first_step else begin  # without the first update, which compiles
    bar.close()
    if stop:
        log(f"stopped after update {state.step:,}, saved in {run.latest}; run the same command again to go on")
    return 128 + int(stop) if stop else 0


def show_progress(run: Run, bar: tqdm, tokens_per_second: float, seconds_per_update: float) -> None:
    """Moves the bar on a terminal; prints a line in a log file, and anywhere that float16 overflowed."""
    step, end, scale = run.state.step, expected_end(run, seconds_per_update), run.scaler.get_scale()
    if scale < run.scale:
        log(f"update {step:,}: float16 overflowed, update skipped, loss scale now {scale:g}")
    run.scale = scale
    text = f"loss {run.state.train_loss:.3f}, {tokens_per_second:,.0f} tokens/s"
    if bar.disable:
        left = timedelta(seconds=round((end - step) * seconds_per_update))
        about = "about" if end != run.schedule()[1] else "at most"  # it may end by itself
        log(f"update {step:,} of {about} {end:,}: {text}, {about} {left} left")
    else:
        bar.total = end
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)


def describe(run: Run) -> None:
    """Writes logs/run.json and prints what will run, on what, and why."""
    counts, device, info = run.model.parameter_counts(), run.device, run.dataset["train"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    about = {"config": dataclasses.asdict(run.config), "parameters": counts, "dataset": run.dataset,
             "tokenizer": {"type": run.tokenizer.name, "vocab_size": run.tokenizer.vocab_size},
             "device": f"{device} ({name})", "precision": str(run.dtype).removeprefix("torch."), "compile": run.compiled,
             "processes": run.world, "python": platform.python_version(), "torch": torch.__version__,
             "numpy": np.__version__, "platform": platform.platform(), "command": sys.argv,
             "started": datetime.now(UTC).isoformat(timespec="seconds")}
    log(f"data: {info['dataset']}, {info['stories']:,} stories, {info['tokens']:,} tokens of the {run.tokenizer.name} tokenizer "
        f"({run.tokenizer.vocab_size:,}); {run.batches.windows_per_epoch / run.config.training.batch_size:,.1f} updates per epoch\n"
        f"model: {counts['total']:,} parameters, {counts['blocks']:,} of them in {run.config.model.n_layers} blocks\n"
        f"device: {about['device']}, {about['precision']} ({run.dtype_reason}), torch.compile {'on' if run.compiled else 'off'}"
        + (f", {run.world} processes" if run.world > 1 else "")
        + ("; --preset laptop learns more in the same time" if device.type == "cpu" and run.tokens_per_update > 4096 else ""))
    if run.rank == 0:
        with atomic_write(run.log_dir / "run.json") as file:
            file.write(json.dumps(about, indent=1).encode())


def main() -> int:
    started = time.monotonic()
    keep_freed_memory()
    parser = ArgumentParser("Trains the model; goes on from the last checkpoint if there is one.")
    parser.add_argument("--fresh", action="store_true", help="move an old run's files aside and start a new one")
    options = parser.configure(config)
    run = Run(config, options.fresh)
    describe(run)
    if run.state.step:
        if run.fell_back:
            log(FELL_BACK)
        done = run.state.step >= run.schedule()[1]
        log(f"{'finished at' if done else 'going on from'} update {run.state.step:,}, best validation loss {run.state.best_loss:.4f}")
    code = train(run, started)
    if code == 0 and run.rank == 0:
        best = load_checkpoint(run.best, run.device)
        run.average.load_state_dict(best["model"])
        print(f"\n{tell_story(run.average, run.tokenizer, length=400)}\n")
        print(f"best validation loss {best['val_loss']:.4f} (perplexity {math.exp(best['val_loss']):.2f}) at update {best['step']:,} of "
              f"{run.state.step:,}, on {best['dataset']['validation']['dataset']} with the {run.tokenizer.name} tokenizer\n"
              f"more stories: python eval.py --checkpoint {run.best} --generate \"Once upon a time\"")
        if run.fell_back:
            log(FELL_BACK)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_main(main)
