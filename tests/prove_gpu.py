"""Runs, on a GPU, all that the project claims for GPUs, in ten minutes and with no network; prints Markdown.

    python tests/prove_gpu.py stories.txt     stories between lines <|endoftext|>; without: the bundled ones
    python tests/prove_gpu.py stories.txt --nanogpt FOLDER --rounds 5   beside a clone of nanoGPT, in turns
    python tests/prove_gpu.py --dry-run       the same code, tiny, on a CPU: says nothing about any GPU

Each stage is a process of its own, which yields rows (claim, figure) and has a share of the time. One that
fails or runs over loses its other rows, and the next goes on. Checks, which are not timed, run side by side.
TIKTOKEN_CACHE_DIR is where GPT-2's vocabulary is; without it the default settings train with `bpe`.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import train
from config import PRESETS, Config, UserError
from model import LinearCrossEntropy, Transformer

TINY = {"model.n_layers": 2, "model.d_model": 32, "model.n_heads": 2, "model.d_ff": 64,
        "model.max_seq_len": 64, "training.batch_size": 4, "training.bpe_vocab_size": 300,
        "data.max_stories": 100, "training.max_steps": 40, "training.eval_interval": 10,
        "training.eval_batches": 1}
SHORT = {"data.dataset": "sample", "training.tokenizer_type": "bpe", "model.n_layers": 2, "model.dropout": 0}
VOCABULARIES = {"gpt2": 50257, "bpe": 4096}
PEAKS = {  # dense TFLOP/s in bfloat16 (T4: float16), by NVIDIA's data sheets; of cards whose name ends so
    "H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756, "H100 NVL": 835, r"A100\S*( \S+)*": 312,
    "L40S": 362, "L4": 121, "A10": 125, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "T4": 65}
Rows = Iterator[tuple[str, str]]
Options = argparse.Namespace  # stories, nanogpt, rounds, dry_run; device, folder, seconds until it is killed


# ---------------------------------------------------------------- what the stages share

def configured(o: Options, name: str, settings: dict) -> Config:
    """Returns the defaults with `settings`, tiny in a dry run, for a run in the folder `name`."""
    made, folder = Config(), f"{o.folder}/{name}"
    where = {"data.data_dir": f"{o.folder}/data", "training.checkpoint_dir": folder,
             "training.log_dir": folder, "training.device": o.device}
    for key, value in (settings | (TINY if o.dry_run else {}) | where).items():
        made.set(key, value)
    return made


def verdict(passed: bool, figure: str) -> str:
    return f"{'passed' if passed else 'failed'}: {figure}"


def forget() -> None:
    """Frees what compiled code and finished runs hold."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(function: Callable, device: str) -> float:
    """Returns how long a call takes, until the device is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def apart(ours: list[float], theirs: list[float]) -> float:
    """Returns the largest difference, as a share of the value."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def steps_of(config: Config, steps: int) -> tuple[list[float], int, train.Run]:
    """Makes the first steps of a run here. Returns their losses, how often it gave up compiling, the run."""
    printed, train.say = [], lambda message: (printed.append(message), print(message, file=sys.stderr))
    run = train.Run(config, train.Machine(config.training))
    losses = torch.stack([train.next_step(run)[0] for _ in range(steps)]).tolist()
    return losses, sum("torch.compile failed" in line for line in printed), run


def trained(config: Config, stop_at: str = "") -> tuple[dict[str, float], list[dict]]:
    """Runs train.py, with a SIGTERM once it prints a line that begins so. Returns its lines, with the seconds
    since the start, and the metrics.
    """
    began, lines = time.monotonic(), {}
    command = [sys.executable, str(ROOT / "train.py"), *(f"{k}={v}" for k, v in config.flat().items())]
    process = subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        lines[line.rstrip()] = time.monotonic() - began
        print(line, end="", file=sys.stderr)
        if stop_at and line.startswith(stop_at):
            process.terminate()
    if process.wait() != (143 if stop_at else 0):
        raise RuntimeError(f"exit code {process.returncode} of train.py: {''.join(list(lines)[-1:])}")
    metrics = Path(config.training.log_dir, "metrics.jsonl").read_text()
    return lines, [json.loads(line) for line in metrics.splitlines()]


# ---------------------------------------------------------------- checks

def machine(o: Options) -> Rows:
    """device, versions, what train.py decides"""
    made, gpu = train.Machine(configured(o, "", {}).training), "skipped: needs CUDA"
    if o.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        gpu = f"{found} (driver), compute capability {torch.cuda.get_device_capability()}"
    yield "GPU", gpu
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    yield "versions", (f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA "
                       f"{torch.version.cuda}, triton {triton}; {os.cpu_count()} CPU cores")
    yield "train.py chooses", f"{made.device}, {made.dtype} ({made.reason}), compile: {made.compiles}"


def compiler(o: Options) -> Rows:
    """a broken compiler: goes on eagerly, with one warning"""
    import torch._inductor.compile_fx as inductor

    def broken(*args, **options):
        raise RuntimeError("broken on purpose")

    eager = steps_of(configured(o, "eager", SHORT | {"training.compile": "off"}), 5)[0]
    for stage, backend in {"while compiling": broken, "at launch": lambda *_, **__: broken}.items():
        forget()
        inductor.compile_fx = backend
        losses, warnings, _ = steps_of(configured(o, stage, SHORT | {"training.compile": "on"}), 5)
        error = apart(losses, eager)
        yield f"a compiler that breaks {stage}: goes on eagerly", verdict(
            warnings == 1 and error < 1e-2, f"{warnings} warning, losses within {error:.1e} of eager ones")


def float16(o: Options) -> Rows:
    """float16 forced"""
    has_bfloat16 = o.dry_run or torch.cuda.get_device_capability() >= (8, 0)
    for dtype in (torch.float16, torch.bfloat16 if has_bfloat16 else torch.float32):
        forget()
        train.choose_precision = lambda device, use_amp, dtype=dtype: (dtype, "forced")
        losses, gave_up, run = steps_of(configured(o, str(dtype), SHORT), 30 if o.dry_run else 100)
        last = mean(losses[-10:])
        scale = run.scaler.get_scale()
        yield f"{dtype} forced: the loss falls", verdict(last < losses[0] - 0.1 and not gave_up, (
            f"{losses[0]:.3f}, after {len(losses)} steps {last:.3f} (loss scale {scale:,.0f})"))


def resume(o: Options) -> Rows:
    """a run that is stopped by SIGTERM and goes on, beside two that are not"""
    settings = SHORT | {"model.dropout": 0.1, "training.eval_interval": 40, "training.max_steps": 400,
                        "training.early_stopping_evals": None}
    runs = [configured(o, name, settings) for name in ("quiet", "again", "stopped")]
    trained(runs[2], f"step {2 * runs[2].training.eval_interval}:")
    metrics = [trained(config)[1] for config in runs]
    steps = [[line["step"] for line in lines] for lines in metrics]
    yield "resume: metrics lines neither lost nor doubled", verdict(
        steps[2] == steps[0], f"{len(steps[2])} of {len(steps[0])}")
    quiet, *others = (train.load_checkpoint(Path(config.training.checkpoint_dir, "latest.pt"))["last_weights"]
                      for config in runs)
    weights = [max((w - other[k]).abs().max().item() for k, w in quiet.items()) for other in others]
    curves = [[line["val_loss"] for line in lines] for lines in metrics]
    own, losses = (apart(curve, curves[0]) for curve in curves[1:])
    yield "resume: the stopped run beside an undisturbed one", verdict(losses < max(0.01, 3 * own), (
        f"weights differ by at most {weights[1]:.1e}, validation losses by {losses:.1e} of their value; "
        f"two undisturbed ones by {weights[0]:.1e} and {own:.1e}"))


def loss(o: Options) -> Rows:
    """loss and gradients beside F.cross_entropy in float64"""
    n, size = (64, 300) if o.dry_run else (3000, VOCABULARIES["gpt2"])  # more rows than a chunk has
    x, w = torch.randn(n, 256, device=o.device), torch.randn(size, 256, device=o.device) / 16
    y, (half, _) = torch.randint(size, (n,), device=o.device), train.choose_precision(x.device, True)

    def with_gradients(loss: Callable, x: Tensor, w: Tensor) -> list[Tensor]:
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = loss(x, w)
        return [t.detach().double() for t in (value, *torch.autograd.grad(value, (x, w)))]

    exact = with_gradients(lambda x, w: F.cross_entropy(x @ w.T, y), x.double(), w.double())
    eager = lambda x, w: LinearCrossEntropy.apply(x, w, y)
    kinds = {"float32": (eager, x, 1e-5), str(half): (eager, x.to(half), 2e-2)}
    if not o.dry_run:
        kinds["float32, compiled"] = torch.compile(eager, dynamic=False), x, 1e-5
    for kind, (function, inputs, allowed) in kinds.items():
        found = zip(with_gradients(function, inputs, w), exact, strict=True)
        errors = [((a - b).norm() / b.norm()).item() for a, b in found]
        figure = "relative errors {:.1e}, {:.1e}, {:.1e}".format(*errors)
        yield f"{loss.__doc__}: {kind}", verdict(max(errors) < allowed, figure)


def cache(o: Options) -> Rows:
    """generation beside the model without a cache, evaluation beside the CPU's"""
    size = 300 if o.dry_run else VOCABULARIES["gpt2"]
    model = Transformer(configured(o, "", {"model.n_layers": 4}).model, size).to(o.device).eval()
    tokens, gaps = np.random.default_rng(0).integers(0, size, 5000), []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # so that every part matters
        for row in model.generate([tokens[:3], tokens[:9], tokens[:20]], 40, temperature=0):
            logits = model(torch.tensor([row[:-1]], device=o.device))[0, -40:]
            chosen = logits[range(40), row[-40:]]
            gaps.append(((logits.amax(1) - chosen).max() / logits.std()).item())
    yield "generation with its cache chooses as without", verdict(
        max(gaps) < 1e-3, f"tokens at most {max(gaps):.1e} deviations below the likeliest")
    there, here = (train.evaluate(each, tokens, 1)[0]
                   for each in (model, copy.deepcopy(model).cpu()))
    error = np.abs(there - here).max() / here.mean()
    yield "evaluate() beside the CPU's", verdict(error < 1e-3, f"a loss differs by at most {error:.1e}")


def memory(o: Options) -> Rows:
    """out of memory: halves the micro-batch and goes on"""
    if o.dry_run:
        yield memory.__doc__, "skipped: needs CUDA"
        return
    whole = steps_of(configured(o, "whole", SHORT), 10)[0]
    peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    forget()
    torch.cuda.set_per_process_memory_fraction(0.5 * peak / total)
    losses, gave_up, run = steps_of(configured(o, "halved", SHORT), 10)
    before, after, error = run.config.training.batch_size, run.micro_batch_size, apart(losses, whole)
    yield memory.__doc__, verdict(after < before and error < 1e-2 and not gave_up, (
        f"{before} sequences at a time became {after} with half of {peak / 1e9:.2f} GB; "
        f"losses of 10 steps within {error:.1e}; compiling given up {gave_up} times"))


# ---------------------------------------------------------------- what is timed

def training(o: Options) -> Rows:
    """the default settings on the stories"""
    kind = "gpt2"
    try:
        data.BPETokenizer.gpt2(ROOT / "data")
    except UserError:
        kind = "bpe"
        yield "note", "GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR: the default settings with bpe"
    minutes = round(0.8 * o.seconds / 60, 2)
    lines, metrics = trained(configured(o, "run", {
        "data.dataset": o.stories, "training.tokenizer_type": kind, "training.max_minutes": minutes}))
    begin, first = (next(s for line, s in lines.items() if line.startswith(text))
                    for text in ("device:", "step 1 "))
    gave_up = sum("torch.compile failed" in line for line in lines)
    yield "first step", verdict(not gave_up, f"{first:.0f} s after the start, of which {first - begin:.0f} s "
                                f"compiling, which was given up {gave_up} times")
    what = f"default settings, {kind}, {Path(o.stories).name}, max_minutes={minutes}"
    for target in (12, 7):
        found = [m for m in metrics if m["val_perplexity"] <= target]
        yield f"{what}: to perplexity {target}", (
            f"{found[0]['elapsed_seconds']:.0f} s, step {found[0]['step']:,}" if found else "not reached")
    best = min(metrics, key=lambda m: m["val_loss"])
    yield f"{what}: best", (
        f"perplexity {best['val_perplexity']:.2f}, {best['val_bits_per_byte']:.3f} bits per byte, step "
        f"{best['step']:,}, epoch {best['epoch']:.1f}, {best['elapsed_seconds']:.0f} s; "
        f"{median(m['tokens_per_second'] for m in metrics):,.0f} tokens/s")


def generation(o: Options) -> Rows:
    """generation"""
    model = Transformer(configured(o, "", {}).model, VOCABULARIES["gpt2"]).to(o.device)
    prompt, n = [50256, 7454, 2402, 257], 20 if o.dry_run else 200
    for rows in (1, 16):
        generate = lambda rows=rows: model.generate([prompt] * rows, n, temperature=0.8, top_k=50)
        took = median(seconds(generate, o.device) for _ in range(4))
        yield f"generation, default, gpt2, float32, prompts: {rows}", f"{rows * n / took:,.0f} tokens/s"


def stepper(made: train.Machine, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable:
    """Returns a function of tokens and targets that makes a step as train.py does."""
    loss_of = train.Objective(model)
    loss_of = torch.compile(loss_of, dynamic=False) if made.compiles else loss_of
    scaler = torch.amp.GradScaler(made.device.type, enabled=made.dtype == torch.float16)
    average = copy.deepcopy(model).requires_grad_(False) if isinstance(model, Transformer) else None

    def step(tokens: Tensor, targets: Tensor) -> None:
        train.train_step(loss_of, optimizer, scaler, tokens, targets, len(tokens), 1.0, made.autocast)
        if average:
            train.average_weights(average, model, 1000)
    return step


def nanogpt_of(config: Config, folder: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Returns nanoGPT in this shape and its AdamW, as its train.py makes them; the vocabulary is padded."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder, "model.py"))
    theirs, m = importlib.util.module_from_spec(spec), config.model
    sys.modules[spec.name] = theirs  # where Dynamo looks for it
    spec.loader.exec_module(theirs)
    shape = theirs.GPTConfig(m.max_seq_len, 50304, m.n_layers, m.n_heads, m.d_model, m.dropout, False)
    with contextlib.redirect_stdout(sys.stderr):
        model = theirs.GPT(shape).to(device)
        model.loss = lambda tokens, targets: model(tokens, targets.contiguous())[1]  # what Objective calls
        return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)


def speeds(steps: list[Callable], config: Config, vocab_size: int, device: torch.device,
           rounds: int) -> np.ndarray:
    """Returns (rounds, steps) tokens/s of 20 steps on random tokens, in turns, after a round to warm up."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, 2**20).astype(np.uint16)
    batch_size, length, n = config.training.batch_size, config.model.max_seq_len, 20
    batches = data.Batches(tokens, 0, batch_size, length, 0, device)
    if device.type == "cpu":
        n = 2
    took = [[seconds(lambda step=step: [step(*batches.at(i)) for i in range(n)], device.type)
             for step in steps] for _ in range(1 + rounds)]
    return n * batch_size * length / np.array(took[1:])


def speed_of(config: Config, vocab_size: int, made: train.Machine, peak: float) -> str:
    """Returns the figure of a row: tokens/s, model FLOP utilisation and peak memory."""
    forget()
    model, m = Transformer(config.model, vocab_size).to(made.device).train(), config.model
    step = stepper(made, model, train.make_optimizer(model, config.training, made.dtype))
    rate = np.median(speeds([step], config, vocab_size, made.device, 5))
    n = model.parameter_counts()["total"]
    tflops = rate * (6 * n + 12 * m.n_layers * m.d_model * m.max_seq_len) / 1e12
    text = f"{rate:,.0f} tokens/s, {n / 1e6:.1f}M parameters, {tflops:.3g} model TFLOP/s"
    text += f" ({tflops / peak:.1%} of {peak})" if peak else ""
    is_cuda = made.device.type == "cuda"
    return text + (f", peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if is_cuda else "")


def speed(o: Options) -> Rows:
    """training speed, model FLOP utilisation and peak memory of the presets"""
    train.keep_freed_memory()
    made, peak = train.Machine(configured(o, "", {}).training), 0.0
    if o.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((value for card, value in PEAKS.items() if re.search(rf"\b{card}$", name)), 0.0)
        a = torch.randn(8192, 8192, device=o.device, dtype=made.dtype)
        took = median(seconds(lambda: a @ a, o.device) for _ in range(15))
        rate = 2 * 8192 ** 3 / took / 1e12
        del a  # which would count as memory of the first model
        yield f"a {made.dtype} product of 8,192 x 8,192", f"{rate:.0f} TFLOP/s; data sheet: {peak or '?'}"
    for preset in ("default",) if o.dry_run else ("default", "small", "large"):
        for vocabulary, size in VOCABULARIES.items():
            figure = speed_of(configured(o, "", PRESETS.get(preset, {})), size, made, peak)
            yield f"training, {preset}, {vocabulary}, {made.dtype}{', compiled' * made.compiles}", figure


def nanogpt(o: Options) -> Rows:
    """training beside nanoGPT, in turns"""
    if not o.nanogpt:
        yield nanogpt.__doc__, "skipped: no --nanogpt FOLDER"
        return
    train.keep_freed_memory()
    config, size = configured(o, "", {}), VOCABULARIES["gpt2"]
    made, model = train.Machine(config.training), Transformer(config.model, size)
    model = model.to(made.device).train()
    steps = [stepper(made, model, train.make_optimizer(model, config.training, made.dtype)),
             stepper(made, *nanogpt_of(config, o.nanogpt, made.device))]
    rates = speeds(steps, config, size, made.device, o.rounds)
    ours, theirs, ratios = *np.median(rates, axis=0), rates[:, 0] / rates[:, 1]
    yield f"{nanogpt.__doc__}: default, gpt2, {made.dtype}, {o.rounds} rounds", (
        f"{ours:,.0f} tokens/s with Muon, nanoGPT {theirs:,.0f} with AdamW; ratio {np.median(ratios):.2f} "
        f"({ratios.min():.2f} to {ratios.max():.2f})")


# ---------------------------------------------------------------- the stages, one after the other

CHECKS = {machine: 0.15, compiler: 0.3, float16: 0.3, resume: 0.45, loss: 0.2, cache: 0.2, memory: 0.25}
TIMED = {training: 0.34, generation: 0.1, speed: 0.42, nanogpt: 0.2}  # limits, as shares of all the time
STAGES = {stage.__name__: (stage, share) for stage, share in (CHECKS | TIMED).items()}


RUNNING = []  # processes


def kill(process: subprocess.Popen) -> None:
    """Ends a stage and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_stage(name: str, o: Options) -> list[tuple[str, str]]:
    """Runs a stage until its end or its limit; prints and returns its rows."""
    (stage, share), began = STAGES[name], time.monotonic()
    limit = min(60 * share * o.minutes, o.deadline - began)
    if limit < 5:
        return [(stage.__doc__, "not reached: no time was left")]
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=o.folder))
    options = json.dumps(vars(o) | {"folder": str(folder), "seconds": limit})
    command = [sys.executable, __file__, "--stage", name, options]
    with open(folder / "rows", "w") as rows, open(folder / "log", "w") as log:  # a pipe can be held open
        process = subprocess.Popen(command, stdout=rows, stderr=log, process_group=0)
    RUNNING.append(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)
    code = process.poll()
    kill(process)
    rows = [tuple(json.loads(line)) for line in (folder / "rows").read_text().splitlines()]
    if code is None:
        rows.append((stage.__doc__, f"not reached: over its limit of {limit:.0f} s"))
    elif code and not (rows and rows[-1][1].startswith("failed")):
        rows.append((stage.__doc__, f"failed: exit code {code}"))
    lines = [f"\n{name} ({stage.__doc__}), {time.monotonic() - began:.0f} s"]
    lines += [f"{claim}: {figure}" for claim, figure in rows]
    if code != 0:
        log = (folder / "log").read_text(errors="replace").splitlines()
        lines += [f"| {line[:200]}" for line in log[-12:]]
    print("\n    ".join(lines), flush=True)
    return rows


def block(rows: list[tuple[str, str]], o: Options, minutes: float) -> str:
    """Returns the Markdown for README."""
    kinds = ("passed", "failed", "not reached", "skipped")
    counts = ", ".join(f"{sum(figure.startswith(kind) for _, figure in rows)} {kind}" for kind in kinds)
    cells = [[text.replace("|", "\\|").replace("torch.", "") for text in row] for row in rows]
    return "\n".join([
        "**A dry run on a CPU: it says nothing about any GPU.**\n" if o.dry_run else "",
        f"`python tests/prove_gpu.py`, {time.strftime('%Y-%m-%d')}, {minutes:.1f} minutes; {counts}.\n",
        "| claim | figure |\n|---|---|", *(f"| {claim} | {figure} |" for claim, figure in cells)])


def child(name: str, options: str) -> int:
    """What the process of a stage does: prints its rows as they come."""
    stage = STAGES[name][0]
    try:
        for row in stage(Options(**json.loads(options))):
            print(json.dumps(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        reason = f"failed: {type(error).__name__}: {data.first_line(error)[:200]}"
        print(json.dumps((stage.__doc__, reason)), flush=True)
        return 1
    return 0


def arguments() -> Options:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("stories", nargs="?", type=os.path.abspath, default=str(data.SAMPLE),
                        metavar="STORIES.txt")
    parser.add_argument("--nanogpt", type=os.path.abspath, metavar="FOLDER", help="a clone of nanoGPT")
    parser.add_argument("--rounds", type=int, default=3, help="of ours and nanoGPT in turns")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                        help="some stages: " + ", ".join(STAGES))
    parser.add_argument("--dry-run", action="store_true")
    o = parser.parse_args()
    o.device = "cpu" if o.dry_run else "cuda"
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --dry-run tries the code on a CPU")
    return o


def main() -> int:
    o, rows, began = arguments(), [], time.monotonic()
    o.deadline = began + 60 * o.minutes

    def stop(*_) -> None:
        o.deadline = 0  # so that the other stages don't begin, and what is known is printed
        for process in RUNNING:
            if process.poll() is None:
                kill(process)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="prove-gpu-", ignore_cleanup_errors=True) as o.folder:
        for stages, at_once in ((CHECKS, max(1, (os.cpu_count() or 1) // 4)), (TIMED, 1)):
            names = [stage.__name__ for stage in stages if stage.__name__ in o.only]
            with ThreadPoolExecutor(at_once) as pool:
                for found in pool.map(lambda name: run_stage(name, o), names):
                    rows += found
    print(f"\n{block(rows, o, (time.monotonic() - began) / 60)}")
    return int(any(figure.startswith(("failed", "not reached: ")) for _, figure in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        os._exit(child(*sys.argv[2:]))  # at once: a compiler's processes may take long to end
    sys.exit(main())
