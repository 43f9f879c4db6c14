"""Trains the model: optimizer, schedule, loop, checkpoints, metrics.

    python train.py                      resumes by itself; --help lists every setting
    torchrun --nproc_per_node=2 train.py
"""

import contextlib
import copy
import dataclasses
import datetime
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

CHECKPOINT_FORMAT = 1
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
    embedding = [model.embed_tokens.weight]
    assert len(matrices) + len(norms) + 1 == len(list(model.parameters())), "the groups must partition the parameters"
    device = embedding[0].device.type
    return Muon([{"params": matrices, "muon": training.optimizer == "muon"}, {"params": embedding},
                 {"params": norms, "weight_decay": 0.0}], lr=training.learning_rate, weight_decay=training.weight_decay,
                betas=(0.9, 0.95), fused=device in ("cpu", "cuda"))


def learning_rate(step: int, peak: float, warmup_steps: int, decay_start: float, end: int) -> float:
    """Returns the rate of the update after `step` updates: linear warm-up, constant, linear decay to zero at `end`."""
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (end - step) / max(1, end - decay_start)
    return peak * min(1.0, warmup, decay)


# ---------------------------------------------------------------- device and precision

def matmul_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where the device multiplies it faster than float32, else float16 on CUDA, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Returns the torch device of `training.device`. Raises UserError where this machine has none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"training.device = {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
                            "use training.device=auto or cpu")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("training.device = 'mps': this machine has no Apple GPU; use training.device=auto or cpu")
    return device


def choose_precision(device: torch.device, use_amp: bool) -> tuple[torch.dtype, str]:
    """Returns the dtype of matrix products and the reason for it."""
    if not use_amp:
        return torch.float32, "training.use_amp is false"
    dtype = matmul_dtype(device)
    reason = {torch.bfloat16: f"this {device.type.upper()} multiplies it natively", torch.float32: "bfloat16 is slow on this device",
              torch.float16: "this GPU has no bfloat16; losses are scaled"}[dtype]
    return dtype, reason


def autocast(device: torch.device, dtype: torch.dtype):
    """Returns the context in which matrix products run in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


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


def save_checkpoint(path: Path, checkpoint: dict, keep: Path | None = None) -> None:
    """Writes a checkpoint atomically; `keep` becomes the one before. Raises UserError where the disk is full.

    The file is torch.save's and, after it, its SHA-256: torch.load takes no notice of that, `load_checkpoint` does.
    """
    buffer = io.BytesIO()  # not the file itself: torch.save hides why it could not write
    torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, buffer)
    content = buffer.getbuffer()
    with atomic_write(path, lambda written: len(content), keep) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Returns the checkpoint at `path`, its tensors on `device`. Raises UserError where it is missing, damaged, of
    another format or not a checkpoint. Code in the file does not run, and a single changed bit is noticed: without the
    SHA-256, torch.load returns wrong weights for most of them.
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


def find_checkpoint(directory: Path) -> tuple[dict, Path] | None:
    """Returns the checkpoint to go on from and its path: latest.pt, or previous.pt with a warning; None for a new run."""
    problems = []
    for path in (directory / "latest.pt", directory / "previous.pt"):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
            if "optimizer" not in checkpoint:
                raise UserError(f"{path} is a copy of best_model.pt, which has the weights and not the state to go on from")
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"WARNING: {problems[0]}; going on from {path}, update {checkpoint['step']:,}", file=sys.stderr)
        return checkpoint, path
    if problems or (directory / "best_model.pt").exists():
        raise UserError("; ".join(problems or [f"{directory} holds best_model.pt and no latest.pt"]) + "; there is nothing to resume from: "
                        "use --fresh, which moves the old run aside and starts a new one, or put a checkpoint back")
    return None


def check_settings(config: Config, checkpoint: dict, path: Path) -> None:
    """Raises UserError where a setting that makes the run what it is differs from the checkpoint's; prints other changes."""
    saved, fixed, free = {f"{s}.{k}": v for s, values in checkpoint["config"].items() for k, v in values.items()}, [], []
    for name, value in config.flat().items():
        if saved.get(name, value) != value:
            must_match = name.startswith(("model.", "data.dataset", "data.max_")) or name in (
                "training.tokenizer_type", "training.bpe_vocab_size", "training.batch_size", "training.seed", "training.optimizer")
            (fixed if must_match else free).append(f"{name} was {saved[name]!r} and is {value!r}")
    if fixed:
        raise another_run(path, fixed)
    if free:
        log(f"changed since update {checkpoint['step']:,}: {'; '.join(free)}")


def check_dataset(dataset: dict, checkpoint: dict, path: Path) -> None:
    """Raises UserError where the tokens or the tokenizer are not the checkpoint's, though the settings are."""
    changed = [f"the {key} of the {split} stories was {old[key]} and is {dataset[split][key]}"
               for split, old in checkpoint["dataset"].items()
               for key in ("tokenizer", "sha256") if old[key] != dataset[split][key]]
    if changed:
        raise another_run(path, changed)


def another_run(path: Path, changes: list[str]) -> UserError:
    return UserError(f"this is not the run in {path}: {'; '.join(changes)}; undo that to go on with the old run, or use --fresh, "
                     "which moves it aside and starts a new one")


def lock(directory: Path) -> filelock.FileLock:
    """Returns the held lock of a run's folder, which ends with the process. Raises UserError where another run holds it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(directory / ".lock")
        held.acquire(timeout=0)
        (directory / ".lock").write_text(str(os.getpid()))
        return held
    except filelock.Timeout:
        raise UserError(f"process {(directory / '.lock').read_text()} is training in {directory}; wait for it, stop it, or choose "
                        "another training.checkpoint_dir and training.log_dir") from None
    except OSError as error:
        raise write_error(directory, error) from error


def move_aside(*directories: Path) -> None:
    """Moves an old run's files into a folder old-DATE inside their own folder."""
    for directory in directories:
        files = [p for names in ("*.pt", "metrics.jsonl", "run.json", "training_curves.png") for p in directory.glob(names)]
        if files:
            old = directory / f"old-{datetime.datetime.now():%Y%m%d-%H%M%S}"
            old.mkdir()
            for file in files:
                file.rename(old / file.name)
            print(f"the old run's files are now in {old}", file=sys.stderr)


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


def story_windows(tokens: np.ndarray, eot_id: int, seq_len: int) -> list[tuple[int, int]]:
    """Returns the (start, end) of every story, end-of-text included; stories longer than `seq_len` in pieces."""
    ends = np.flatnonzero(tokens == eot_id) + 1
    if len(tokens) and (len(ends) == 0 or ends[-1] < len(tokens)):
        ends = np.append(ends, len(tokens))
    starts = np.concatenate(([0], ends[:-1]))
    return [(s, min(s + seq_len, end)) for start, end in zip(starts.tolist(), ends.tolist())
            for s in range(start, end, seq_len)]


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


def tell_story(model: Transformer, tokenizer, seed: int = 0, opening: str = "Once upon a time", length: int = 60) -> str:
    """Returns a story sampled with a random state of its own, at temperature 0.8 and top_k 50."""
    prompt = [tokenizer.eot_id, *tokenizer.encode(opening)]
    generator = torch.Generator(model.embed_tokens.weight.device).manual_seed(seed)
    story = model.generate([prompt], length, 0.8, 50, eot_id=tokenizer.eot_id, generator=generator)[0][1:]
    return tokenizer.decode(story[:-1] if story[-1] == tokenizer.eot_id else story)


# ---------------------------------------------------------------- the run

def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of an update's dropout."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def agree(value: float) -> float:
    """Returns rank 0's value on every process."""
    if not dist.is_initialized():
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(box, 0)
    return box.item()


def log(message: str) -> None:
    """Prints a line of progress, above the progress bar; the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(message, file=sys.stderr)


class Run:
    """One training run: what it is made of, opened where the last checkpoint left it."""

    def __init__(self, config: Config, fresh: bool = False):
        training = config.training
        self.config, self.rank = config, int(os.environ.get("RANK", 0))
        self.world, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
        if training.batch_size % self.world:
            raise UserError(f"training.batch_size = {training.batch_size} must be a multiple of the {self.world} processes")
        self.device = choose_device(training.device, local_rank)
        self.dtype, self.dtype_reason = choose_precision(self.device, training.use_amp)
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")

        directory, self.log_dir = Path(training.checkpoint_dir), Path(training.log_dir)
        self.latest, self.previous, self.best = (directory / f"{n}.pt" for n in ("latest", "previous", "best_model"))
        self.metrics = self.log_dir / "metrics.jsonl"
        found = None if fresh else find_checkpoint(directory)
        if found:
            check_settings(config, *found)
        self.open_data(found[0] if found else None)
        if found:
            check_dataset(self.dataset, *found)

        # The model and everything that survives.
        torch.manual_seed(training.seed)
        self.model = Transformer(config.model, self.tokenizer.vocab_size).to(self.device)
        self.optimizer = make_optimizer(self.model, training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.state = State()
        if self.rank == 0:
            self.locks = [lock(d) for d in {directory, self.log_dir}]
            if fresh or (not found and self.metrics.exists()):
                move_aside(*{directory, self.log_dir})
            for leftover in (*directory.glob("*.tmp"), *self.log_dir.glob("*.tmp")):
                leftover.unlink()
        if found:
            self.restore(*found)
        self.objective = Objective(self.model)
        self.compiled = training.compile == "on" or (training.compile == "auto" and self.device.type == "cuda" and has_triton())
        self.forward = torch.compile(self.objective) if self.compiled else self.objective
        if self.world > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.forward)
        self.micro_batch_size = min(training.micro_batch_size or training.batch_size, training.batch_size // self.world)

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
            limit = min(limit, training.eval_batches * training.batch_size * config.model.max_seq_len)
        ends = np.flatnonzero(val_stream.tokens[:limit] == self.tokenizer.eot_id)
        self.val_tokens = np.array(val_stream.tokens[:ends[-1] + 1 if len(ends) else limit])
        self.val_bytes = len(self.tokenizer.decode(self.val_tokens[self.val_tokens != self.tokenizer.eot_id]).encode())

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Takes over a checkpoint; the settings of the optimizer are those of the config, its state the checkpoint's."""
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": checkpoint["optimizer"]})
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.state = State(**{f.name: checkpoint[f.name] for f in dataclasses.fields(State)})
        saved = checkpoint["config"]["training"]
        if any(saved[k] != getattr(self.config.training, k) for k in ("max_minutes", "early_stopping_evals")):
            self.state.decay_start = self.state.end = None  # they are fixed anew
        if self.rank == 0:
            if self.latest.exists() and path != self.latest:
                self.latest.rename(self.latest.with_name(f"damaged-{datetime.datetime.now():%Y%m%d-%H%M%S}.pt"))
            length = self.metrics.stat().st_size if self.metrics.exists() else 0
            if length < self.state.metrics_bytes:
                log(f"WARNING: {self.metrics} has lost lines since the checkpoint")
                self.state.metrics_bytes = self.metrics.read_bytes().rfind(b"\n") + 1 if length else 0
            if length:
                os.truncate(self.metrics, self.state.metrics_bytes)

    def checkpoint(self) -> dict:
        """Returns all that eval.py needs: weights, config, tokenizer, and where they come from."""
        return {"step": self.state.step, "config": dataclasses.asdict(self.config), "tokenizer": self.tokenizer.spec(),
                "dataset": self.dataset, "model": self.model.state_dict()}

    def save(self) -> None:
        """Writes latest.pt; the one before becomes previous.pt. Raises UserError where a weight is not finite."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged()
        if self.rank == 0:
            save_checkpoint(self.latest, {**self.checkpoint(), **dataclasses.asdict(self.state), "scaler": self.scaler.state_dict(),
                                          "optimizer": self.optimizer.state_dict()["state"]}, keep=self.previous)

    def diverged(self) -> UserError:
        kept = f"{self.latest} is from before" if self.latest.exists() else "no checkpoint was written"
        return UserError(f"the loss is not finite at update {self.state.step:,} and nothing of it was saved; {kept}; try a smaller "
                         f"training.learning_rate (now {self.config.training.learning_rate:g}) or training.grad_clip, then run again")

    def schedule(self) -> tuple[float, int]:
        """Returns where the decay begins and where the run ends."""
        training = self.config.training
        end = min(training.max_steps, self.state.end or training.max_steps)
        return self.state.decay_start or end * (1 - training.decay_fraction), end


def has_triton() -> bool:
    """Whether torch.compile has its GPU code generator."""
    return importlib.util.find_spec("triton") is not None


def update(run: Run) -> tuple[Tensor, Tensor, float]:
    """Makes update number state.step + 1; returns its loss and gradient norm (tensors, not waited for) and its rate."""
    training, step = run.config.training, run.state.step
    rate = learning_rate(step, training.learning_rate, training.warmup_steps, *run.schedule())
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    starts = run.batches.starts(step)[run.rank::run.world]
    tokens, targets = gather(run.stream, starts, run.config.model.max_seq_len)
    while True:
        torch.manual_seed(step_seed(training.seed, step, run.rank))
        try:
            return *train_step(run.forward, run.optimizer, run.scaler, tokens, targets, run.micro_batch_size,
                               training.grad_clip, lambda: autocast(run.device, run.dtype)), rate
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


def evaluate_run(run: Run, train_loss: float, rate: float, grad_norm: float, tokens_per_second: float) -> None:
    """Evaluates, writes a metrics line and best_model.pt, tells a story, and decides whether the run should wind down."""
    state, training = run.state, run.config.training
    if run.rank == 0:
        losses, _ = evaluate(run.model, run.val_tokens, run.tokenizer.eot_id, training.batch_size,
                             lambda: autocast(run.device, run.dtype))
    val_loss = agree(float(losses.mean(dtype=np.float64)) if run.rank == 0 else 0.0)
    if not math.isfinite(val_loss):
        raise run.diverged()
    better = val_loss < state.best_loss
    if better:
        state.best_loss, state.evals_since_best = val_loss, 0
        if run.rank == 0:
            save_checkpoint(run.best, {**run.checkpoint(), "val_loss": val_loss})
    else:
        state.evals_since_best += 1
    bits_per_byte = val_loss * len(run.val_tokens) / math.log(2) / run.val_bytes
    if run.rank == 0:
        line = {"step": state.step, "train_loss": train_loss, "val_loss": val_loss, "lr": rate,
                "val_perplexity": math.exp(min(val_loss, 700)), "val_bits_per_byte": bits_per_byte,
                "tokens": state.step * training.batch_size * run.config.model.max_seq_len,
                "epoch": round(run.batches.epoch(state.step), 4),
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None, "tokens_per_second": round(tokens_per_second, 1),
                "elapsed_seconds": round(state.elapsed_seconds, 2),
                "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        try:
            run.log_dir.mkdir(parents=True, exist_ok=True)
            with open(run.metrics, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                state.metrics_bytes = file.tell()
        except OSError as error:
            raise write_error(run.metrics, error) from error
    log(f"update {state.step:,}: train loss {train_loss:.4f}, validation loss {val_loss:.4f}{' (best)' if better else ''}, "
        f"{bits_per_byte:.3f} bits per byte, epoch {run.batches.epoch(state.step):.2f}, {tokens_per_second:,.0f} tokens/s")
    if run.rank == 0:
        log(f"    {tell_story(run.model, run.tokenizer).replace(chr(10), ' ')} ...")
    patience = training.early_stopping_evals
    if patience is not None and state.evals_since_best >= patience:
        decay_start, end = run.schedule()
        if state.step < decay_start:
            state.decay_start, state.end = state.step, min(end, state.step + max(1, state.step // 4))
            state.evals_since_best = 0
            log(f"no better loss in {patience} evaluations: the learning rate now decays to zero, until update {state.end:,}")
        elif state.step < end:
            state.end = state.step
            log(f"no better loss in {patience} evaluations: the run ends here")


def fix_end(run: Run, seconds_per_update: float, seconds_per_evaluation: float, budget: float) -> None:
    """Sets, once, the update at which `budget` seconds will have passed, from the speed measured so far."""
    training, state = run.config.training, run.state
    left = budget - state.elapsed_seconds - 2 * seconds_per_evaluation  # this one, and the last
    updates = max(1, int(left / (seconds_per_update + seconds_per_evaluation / training.eval_interval)))
    state.end = int(agree(min(training.max_steps, state.step + updates)))
    state.decay_start = state.end * (1 - training.decay_fraction)
    log(f"{seconds_per_update:.3g} s per update: training.max_minutes={training.max_minutes:g} end at update {state.end:,}")


def over_processes(operation, *values: float) -> list[float]:
    """Returns each value's maximum or mean over all processes."""
    if not dist.is_initialized():
        return list(values)
    box = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(box, operation)
    return (box / dist.get_world_size() if operation == dist.ReduceOp.SUM else box).tolist()


def train(run: Run, started: float) -> int:
    """The loop: update; then, when due or last, evaluate and save. Returns 0, or 128 + the signal that stopped it."""
    state, training, signals = run.state, run.config.training, []

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(number, signal.default_int_handler)  # a second one stops at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if not run.latest.exists():
        run.save()
    tokens_per_update = training.batch_size * run.config.model.max_seq_len
    elapsed_before, loss_sum, scale = state.elapsed_seconds, torch.tensor(state.train_loss_sum, device=run.device), run.scaler.get_scale()
    begin, paused, shown, first, line = time.monotonic(), 0.0, 0.0, None, (0.0, state.step)
    bar = tqdm(total=run.schedule()[1], initial=state.step, unit=" updates", disable=run.rank > 0 or not sys.stderr.isatty())
    while state.step < run.schedule()[1]:
        loss, grad_norm, rate = update(run)
        state.step += 1
        state.train_loss_count += 1
        loss_sum += loss

        now = time.monotonic()
        trained, state.elapsed_seconds = now - begin - paused, elapsed_before + now - started  # trained: seconds in updates
        first = first or (trained, state.step)  # of this process: it compiles and warms up
        budget = 60 * (training.max_minutes or math.inf)
        stop, showing, fixing = over_processes(
            dist.ReduceOp.MAX, signals[-1] if signals else 0, now - shown > (30 if bar.disable else 1),
            state.end is None and state.elapsed_seconds > budget / 10 and state.step >= first[1] + 3)
        fixing = fixing and not stop  # an evaluation that is due is not put off: its line would be missing
        evaluating = fixing or state.step % training.eval_interval == 0 or state.step == run.schedule()[1]
        saving = stop or evaluating or state.step % training.checkpoint_interval == 0
        if saving or showing:  # only here the device is waited for
            state.train_loss_sum, = over_processes(dist.ReduceOp.SUM, loss_sum.item())
            shown = now = time.monotonic()
            trained = now - begin - paused
            if not math.isfinite(state.train_loss_sum):
                raise run.diverged()
            if run.scaler.get_scale() < scale:
                log(f"update {state.step:,}: float16 overflowed, update skipped, loss scale now {run.scaler.get_scale():g}")
            scale = run.scaler.get_scale()
            train_loss = state.train_loss_sum / state.train_loss_count
            tokens_per_second = (state.step - line[1]) * tokens_per_update / (trained - line[0])
            seconds_per_update = (trained - first[0]) / (state.step - first[1]) if state.step > first[1] else trained
            show_progress(run, bar, train_loss, tokens_per_second, seconds_per_update)
        if evaluating:
            evaluate_run(run, train_loss, rate, grad_norm.item(), tokens_per_second)
            line, state.train_loss_sum, state.train_loss_count = (trained, state.step), 0.0, 0
            loss_sum.zero_()
            if fixing:
                fix_end(run, seconds_per_update, time.monotonic() - now, budget)
        if saving:
            run.save()
            paused += time.monotonic() - now
        if stop:
            bar.close()
            log(f"stopped after update {state.step:,}, saved in {run.latest}; run the same command again to go on")
            return 128 + int(stop)
    bar.close()
    return 0


def show_progress(run: Run, bar: tqdm, loss: float, tokens_per_second: float, seconds_per_update: float) -> None:
    """Moves the bar on a terminal; prints a line in a log file."""
    step, end = run.state.step, run.schedule()[1]
    text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
    if bar.disable:
        left = datetime.timedelta(seconds=round((end - step) * seconds_per_update))
        log(f"update {step:,} of {end:,}: {text}, {left} left")
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
             "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    log(f"data: {info['dataset']}, {info['stories']:,} stories, {info['tokens']:,} tokens of the {run.tokenizer.name} tokenizer "
        f"({run.tokenizer.vocab_size:,}); {run.batches.windows_per_epoch / run.config.training.batch_size:,.1f} updates per epoch\n"
        f"model: {counts['total']:,} parameters, {counts['blocks']:,} of them in {run.config.model.n_layers} blocks\n"
        f"device: {about['device']}, {about['precision']} ({run.dtype_reason}), torch.compile {'on' if run.compiled else 'off'}"
        + (f", {run.world} processes" if run.world > 1 else ""))
    if run.rank == 0:
        with atomic_write(run.log_dir / "run.json") as file:
            file.write(json.dumps(about, indent=1).encode())


def main() -> int:
    started = time.monotonic()
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
        run.model.load_state_dict(best["model"])
        print(f"\n{tell_story(run.model, run.tokenizer, length=400)}\n")
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
