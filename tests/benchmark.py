"""Ours beside transformers' GPT-2 and Qwen3 of the same shape, in one run; prints tables of Markdown.

    python tests/benchmark.py --quick      a minute or two
    python tests/benchmark.py              all of it: training, generation, tokenization
    python tests/benchmark.py --sizes      parameters and memory of the presets with each tokenizer
    python tests/benchmark.py --nanogpt FOLDER      beside a clone of nanoGPT, too

Every measurement runs in a process of its own (so that its peak memory is its own), in turns, and the median
of the repetitions is printed: this compares on one machine in one run, nothing else does.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from config import PRESETS, Config
from data import BPETokenizer, encode_stories, open_dataset
from model import Transformer
from train import (
    Machine, Objective, average_weights, choose_device, choose_precision, keep_freed_memory, make_optimizer,
    train_step)

VOCABULARIES = {"gpt2": 50257, "bpe": 4096}


def build(name: str, config: Config, vocab_size: int, nanogpt: str = "") -> torch.nn.Module:
    m = config.model
    if name == "ours":
        return Transformer(m, vocab_size)
    if name == "nanoGPT":
        theirs = runpy.run_path(str(Path(nanogpt, "model.py")))
        return theirs["GPT"](theirs["GPTConfig"](
            block_size=m.max_seq_len, vocab_size=vocab_size, n_layer=m.n_layers, n_head=m.n_heads,
            n_embd=m.d_model, dropout=m.dropout, bias=False))
    import transformers

    if name == "GPT2LMHeadModel":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=m.max_seq_len, n_embd=m.d_model, n_layer=m.n_layers,
            n_head=m.n_heads, n_inner=m.d_ff, bos_token_id=None, eos_token_id=None))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=vocab_size, hidden_size=m.d_model, num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads, num_key_value_heads=m.n_heads, head_dim=m.d_model // m.n_heads,
        intermediate_size=m.d_ff, max_position_embeddings=m.max_seq_len, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None))


def peak_memory(device: torch.device) -> float:
    """In MB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def seconds(function, repetitions: int, device: torch.device) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for _ in range(repetitions + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def training_speed(name: str, vocabulary: str, batch_size: int, use_amp: bool, repetitions: int,
                   optimizer: str = "adamw", nanogpt: str = "") -> dict:
    """A step at the default shape, dropout 0.1: tokens/s, model FLOP/s (6 x parameters), peak MB."""
    config = Config()
    config.training.optimizer, config.training.use_amp = optimizer, use_amp
    machine = Machine(config.training)
    device, compiled = machine.device, machine.device.type == "cuda"
    if name == "ours":
        keep_freed_memory()  # as train.py does
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints
        model = build(name, config, VOCABULARIES[vocabulary], nanogpt).to(device).train()
    shape = (batch_size, config.model.max_seq_len + 1)
    tokens = torch.randint(VOCABULARIES[vocabulary], shape, device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if name == "ours":
        optimizer = make_optimizer(model, config.training, machine.dtype)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        forward = torch.compile(Objective(model)) if compiled else Objective(model)
        average = copy.deepcopy(model).requires_grad_(False)

        def step():
            train_step(forward, optimizer, scaler, x, y, batch_size, 1.0, machine.autocast)
            average_weights(average, model, step=1000)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type in ("cpu", "cuda"))
        forward = torch.compile(model) if compiled else model

        def step():
            optimizer.zero_grad(set_to_none=True)
            with machine.autocast():
                if name == "nanoGPT":
                    _, loss = forward(x, y)
                else:
                    loss = forward(x, labels=x).loss  # transformers shifts the labels itself
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    elapsed = seconds(step, repetitions, device)
    parameters = sum(p.numel() for p in model.parameters())
    rate = x.numel() / elapsed
    return {"tokens/s": rate, "GFLOP/s": 6 * parameters * rate / 1e9, "MB": peak_memory(device),
            "parameters": parameters}


def matmul_speed(vocabulary: str, batch_size: int, use_amp: bool, repetitions: int) -> dict:
    """The matrix products of a step alone, without attention: what this machine could reach. GFLOP/s."""
    keep_freed_memory()
    m, device = Config().model, choose_device("auto")
    dtype, _ = choose_precision(device, use_amp)
    n = batch_size * m.max_seq_len
    shapes = m.n_layers * (4 * [(m.d_model, m.d_model)] + 2 * [(m.d_model, m.d_ff)] + [(m.d_ff, m.d_model)])
    head = VOCABULARIES[vocabulary]
    randn = functools.partial(torch.randn, device=device, dtype=dtype)
    operands = {(a, b): (randn(n, a), randn(b, a), randn(n, b)) for a, b in set(shapes)}
    rows = min(n, 1024)
    x, w, g = randn(rows, m.d_model), randn(head, m.d_model), randn(rows, head)

    def products():
        for a, b, c in (operands[s] for s in shapes):
            F.linear(a, b), c @ b, c.mT @ a
        for _ in range(n // rows):
            F.linear(x, w), g @ w, g.mT @ x

    flop = 6 * n * (sum(a * b for a, b in shapes) + m.d_model * head)
    return {"GFLOP/s": flop / seconds(products, repetitions, device) / 1e9}


def generation_speed(name: str, n_prompts: int, repetitions: int) -> dict:
    """100 new tokens after 4, temperature 0.8, top-k 50, GPT-2's vocabulary: tokens/s over all rows."""
    device, prompts = choose_device("auto"), torch.tensor([[50256, 7454, 2402, 257]])
    model = build(name, Config(), VOCABULARIES["gpt2"]).to(device).eval()
    prompts = prompts.repeat(n_prompts, 1).to(device)

    def ours(new_tokens: int):
        model.generate(prompts, new_tokens, temperature=0.8, top_k=50)

    def theirs(new_tokens: int):
        model.generate(prompts, max_new_tokens=new_tokens, do_sample=True, temperature=0.8, top_k=50,
                       pad_token_id=0)

    generate = ours if name == "ours" else theirs
    rate = n_prompts * 100 / seconds(lambda: generate(100), repetitions, device)
    first = seconds(lambda: generate(1), repetitions, device)
    return {"tokens/s": rate, "ms to the first": 1000 * first}


def tokenization_speed(name: str, copies: int) -> dict:
    """MB/s of the bundled stories, `copies` times over, by our streams or datasets.map, same tokenizer."""
    stories = list(open_dataset("sample", True)["train"]()) * copies
    tokenizer = BPETokenizer.train(stories[:600], 4096)
    megabytes = sum(len(s.encode()) for s in stories) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        if name == "ours":
            start = time.perf_counter()
            with open(Path(folder, "stream.bin"), "wb") as file:
                encode_stories(stories, tokenizer, file.write)
        else:
            import datasets

            datasets.disable_progress_bars()
            dataset = datasets.Dataset.from_dict({"text": stories})
            start = time.perf_counter()
            encode = tokenizer._encoding.encode_ordinary_batch
            encoded = dataset.map(lambda rows: {"ids": encode(rows["text"])}, batched=True,
                                  remove_columns="text", num_proc=os.cpu_count(), new_fingerprint="f")
            length = sum(map(len, encoded["ids"]))
            stream = np.memmap(Path(folder, "stream.bin"), np.uint16, "w+", shape=length)
            position = 0
            for batch in encoded.with_format("numpy").iter(1024):  # as nanoGPT's prepare.py writes its file
                tokens = np.concatenate(batch["ids"])
                stream[position:position + len(tokens)] = tokens
                position += len(tokens)
            stream.flush()
        return {"MB/s": megabytes / (time.perf_counter() - start)}


def measured(function: str, **arguments) -> dict:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", function, json.dumps(arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{function} {arguments} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def table(title: str, rows: dict[str, tuple], rounds: int, reference: str) -> None:
    """Measures every row in turns and prints medians, and ratios to the reference row."""
    results = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (function, arguments) in rows.items():
            results[name].append(measured(function, **arguments))
    medians = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]}
               for name, runs in results.items()}
    columns = [k for k in medians[reference] if k != "parameters"]
    first, rule = columns[0], "---|" * (len(columns) + 2)
    print(f"\n{title}\n\n| | {' | '.join(columns)} | {first}, ratio to {reference} |\n|{rule}")
    for name, values in medians.items():
        cells = [f"{values[c]:,.0f}" if c in values else "" for c in columns]
        ratio = f"{values[first] / medians[reference][first]:.2f}" if first in values else ""
        print(f"| {name} | {' | '.join(cells)} | {ratio} |", flush=True)


def training_table(vocabulary: str, device: torch.device, batch_size: int, repetitions: int, rounds: int,
                   nanogpt: str | None) -> None:
    """Prints the table of training speed with one of VOCABULARIES."""
    rows, common = {}, {"vocabulary": vocabulary, "batch_size": batch_size, "repetitions": repetitions}
    dtypes = {amp: str(choose_precision(device, amp)[0]).removeprefix("torch.") for amp in (True, False)}
    for name, amp in itertools.product(("ours", "Qwen3ForCausalLM", "GPT2LMHeadModel"), dtypes):
        arguments = {"name": name, "use_amp": amp, **common}
        rows[f"{name}, {dtypes[amp]}"] = "training_speed", arguments
        if name == "ours":
            rows[f"{name}, {dtypes[amp]}, Muon"] = "training_speed", {**arguments, "optimizer": "muon"}
    if nanogpt:
        arguments = {"name": "nanoGPT", "use_amp": False, "nanogpt": nanogpt, **common}
        rows["nanoGPT, float32"] = "training_speed", arguments
    for amp, dtype in dtypes.items():
        rows[f"matrix products alone, {dtype}"] = "matmul_speed", {"use_amp": amp, **common}
    title = (f"Training, {batch_size} x 512 tokens per step, vocabulary {VOCABULARIES[vocabulary]:,}, "
             "dropout 0.1, AdamW")
    table(title, rows, rounds, "Qwen3ForCausalLM, float32")


def sizes() -> None:
    """Prints, for each preset and tokenizer, the true parameter counts and the memory of weights, their
    average, gradients and optimizer.
    """
    print("| | layers | width | tokenizer | vocabulary | parameters | in the blocks | weights, average, "
          "gradients, optimizer, MB |\n|" + "---|" * 8)
    vocabularies = {**VOCABULARIES, "char": 100}.items()
    for preset, (tokenizer, vocab_size) in itertools.product(("small", "default", "large"), vocabularies):
        config = Config()
        if preset in PRESETS:
            config.apply_preset(preset)
        model = Transformer(config.model, vocab_size)
        counts = model.parameter_counts()
        optimizer = make_optimizer(model, config.training, torch.float32)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        state = sum(t.nbytes for values in optimizer.state.values() for t in values.values())
        total = (12 * counts["total"] + state) / 1e6
        m = config.model
        print(f"| {preset} | {m.n_layers} | {m.d_model} | {tokenizer} | {vocab_size:,} | "
              f"{counts['total']:,} | {counts['blocks']:,} | {total:,.0f} |", flush=True)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--nanogpt", metavar="FOLDER")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(globals()[options.one[0]](**json.loads(options.one[1]))))
        return
    if options.sizes:
        return sizes()
    device = choose_device("auto")
    gpu, quick = device.type == "cuda", options.quick
    batch_size, repetitions = (32, 20) if gpu else (4, 2 if quick else 5)
    rounds = 1 if gpu else options.rounds or (1 if quick else 3)
    processor = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}")
    for vocabulary in ("gpt2",) if quick else VOCABULARIES:
        training_table(vocabulary, device, batch_size, repetitions, rounds, options.nanogpt)
    for n_prompts in (1, 16):
        common = {"n_prompts": n_prompts, "repetitions": 1 if quick else 3}
        rows = {name: ("generation_speed", {"name": name, **common})
                for name in ("ours", "Qwen3ForCausalLM", "GPT2LMHeadModel")}
        table(f"Generation, {n_prompts} prompt{'s' * (n_prompts > 1)}", rows, rounds, "Qwen3ForCausalLM")
    rows = {name: ("tokenization_speed", {"name": name, "copies": 20 if quick else 200})
            for name in ("ours", "datasets.map")}
    table("Tokenization, bpe", rows, rounds, "datasets.map")


if __name__ == "__main__":
    main()
