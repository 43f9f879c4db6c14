"""What each choice of model and optimizer is worth: variants trained for the same time, on the same batches.

    python tests/ablation.py ../shared/tinystories/train.txt --seconds 120

The time of a step is measured for all variants in turns, and each then makes as many steps as fit into the
seconds; so a slower moment of the machine does not count against the one that happens to run in it. Prints a
table of Markdown.
"""

import argparse
import contextlib
import copy
import math
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import model as model_module
from config import Config
from data import Batches, prepare
from model import Transformer, evaluate
from train import (
    Machine, Muon, Objective, keep_freed_memory, learning_rate, make_optimizer, train_step)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y, device = super().forward(x), x.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


class TwoMatrixMLP(nn.Module):
    def __init__(self, mlp: nn.Module, activation):
        super().__init__()
        self.up_proj, self.down_proj, self.activation = mlp.up_proj, mlp.down_proj, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class PositionedEmbedding(nn.Embedding):
    """Token embedding plus a learned one of the position; `weight`, the output matrix, is the tokens'."""

    def __init__(self, embedding: nn.Embedding, max_seq_len: int):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.positions = nn.Parameter(0.02 * torch.randn(max_seq_len, embedding.embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.positions[:tokens.shape[1]]


class UntiedEmbedding(nn.Embedding):
    """Embeds with a matrix of its own; `weight` is the output matrix alone."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.table = nn.Parameter(0.02 * torch.randn_like(embedding.weight))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table)


def use_layer_norm(model: Transformer) -> None:
    width = model.config.d_model
    for block in model.layers:
        block.input_layernorm, block.post_attention_layernorm = LayerNorm(width), LayerNorm(width)
    model.norm = LayerNorm(width)


def use_no_qk_norm(model: Transformer) -> None:
    for block in model.layers:
        block.self_attn.q_norm = block.self_attn.k_norm = nn.Identity()


def use_two_matrices(activation):
    def change(model: Transformer) -> None:
        for block in model.layers:
            block.mlp = TwoMatrixMLP(block.mlp, activation)
    return change


def use_learned_positions(model: Transformer) -> None:
    model.embed_tokens = PositionedEmbedding(model.embed_tokens, model.config.max_seq_len)
    model.no_rotation = True


def use_untied_embeddings(model: Transformer) -> None:
    model.embed_tokens = UntiedEmbedding(model.embed_tokens)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


GPT2 = (use_layer_norm, use_no_qk_norm, use_two_matrices(F.gelu), use_learned_positions)
VARIANTS = {  # name: (changes to the model, settings that differ from the laptop preset's)
    "ours": ((), {}),
    "without QK-norm": ((use_no_qk_norm,), {}),
    "LayerNorm with biases": ((use_layer_norm,), {}),
    "GELU MLP, two matrices": ((use_two_matrices(F.gelu),), {}),
    "ReLU-squared MLP, two matrices": ((use_two_matrices(relu_squared),), {}),
    "learned positions": ((use_learned_positions,), {}),
    "untied embeddings": ((use_untied_embeddings,), {}),
    "GPT-2's block": (GPT2, {}),
    "weight decay 1.0": ((), {"training.weight_decay": 1.0}),
    "4 layers, d_ff 768": ((), {"model.n_layers": 4, "model.d_ff": 768}),
    "no copy heads": ((), {"model.copy_heads": 0}),
    "5 Newton-Schulz iterations": ((), {"iterations": 5}),
    "AdamW 5e-4": ((), {"training.optimizer": "adamw", "training.learning_rate": 5e-4}),
    "AdamW 1e-3": ((), {"training.optimizer": "adamw", "training.learning_rate": 1e-3}),
    "AdamW 2e-3": ((), {"training.optimizer": "adamw", "training.learning_rate": 2e-3}),
    "GPT-2's block, AdamW 1e-3": (GPT2, {"training.optimizer": "adamw", "training.learning_rate": 1e-3}),
}


class Trial:
    """One variant with its optimizer; `make_step` makes a step."""

    def __init__(self, name: str, config: Config, machine: Machine, vocab_size: int, seed: int,
                 steps_per_epoch: float):
        changes, settings = VARIANTS[name]
        config = copy.deepcopy(config)
        for setting in settings.keys() - {"iterations"}:
            config.set(setting, settings[setting])
        self.training, self.machine = config.training, machine
        torch.manual_seed(seed)
        self.model = Transformer(config.model, vocab_size)
        self.model.no_rotation = False
        for change in changes:
            change(self.model)
        self.model.to(machine.device)
        self.optimizer = make_optimizer(self.model, self.training, machine.dtype, steps_per_epoch)
        self.optimizer.ITERATIONS = settings.get("iterations", Muon.ITERATIONS)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)

    def rotation(self):
        if not self.model.no_rotation:
            return contextlib.nullcontext()
        return mock.patch.object(model_module, "rotate", lambda x, rope: x)

    def make_step(self, tokens: Tensor, targets: Tensor, step: int, steps: int) -> None:
        training = self.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, step / steps, training)
        with self.rotation():
            train_step(Objective(self.model), self.optimizer, self.scaler, tokens, targets, len(tokens),
                       training.grad_clip, self.machine.autocast)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("dataset", help="whatever train.py takes as data.dataset")
    parser.add_argument("--seconds", type=float, default=120, help="training time of each variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339],
                        help="of initialisation and data order")
    names = list(VARIANTS)
    parser.add_argument("--variants", nargs="*", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    keep_freed_memory()
    config = Config()
    config.apply_preset("laptop")
    config.data.dataset = options.dataset
    tokenizer, train_stream, val_stream = prepare(config)
    machine, size, seq_len = Machine(config.training), config.training.batch_size, config.model.max_seq_len
    batches = {seed: Batches(train_stream.tokens, tokenizer.eot_id, size, seq_len, seed, machine.device)
               for seed in options.seeds}

    def train(name: str, seed: int, steps: int, until: int) -> Trial:
        trial = Trial(name, config, machine, tokenizer.vocab_size, seed, batches[seed].steps_per_epoch)
        for step in range(until):
            trial.make_step(*batches[seed].at(step), step, steps)
        return trial

    times = {name: [] for name in options.variants}
    for _ in range(6):
        for name in options.variants:
            trial = train(name, options.seeds[0], 100, until=1)
            tokens, targets = batches[options.seeds[0]].at(1)
            start = time.perf_counter()
            trial.make_step(tokens, targets, 1, 100)
            times[name].append(time.perf_counter() - start)
    print(f"\n{options.seconds:g} s each, {torch.get_num_threads()} threads, seeds {options.seeds}; "
          "differences are from the first row, seed by seed, with their standard error\n\n"
          "| | parameters | s per step | steps | bits per byte | difference |\n|---|---|---|---|---|---|")
    first = None
    for name in options.variants:
        steps, bits = round(options.seconds / (seconds := statistics.median(times[name]))), []
        for seed in options.seeds:
            trial = train(name, seed, steps, until=steps)
            with trial.rotation():
                losses, _ = evaluate(trial.model, val_stream.tokens, tokenizer.eot_id)
            bits.append(losses.sum(dtype="float64") / math.log(2) / val_stream.info["bytes"])
        first = first or bits
        differences = [b - f for b, f in zip(bits, first, strict=True)]
        error = f" ± {statistics.stdev(differences) / len(bits)**0.5:.3f}" if len(bits) > 1 else ""
        parameters = sum(p.numel() for p in trial.model.parameters())
        print(f"| {name} | {parameters:,} | {seconds:.3f} | {steps} | {statistics.mean(bits):.3f} | "
              f"{statistics.mean(differences):+.3f}{error} |", flush=True)


if __name__ == "__main__":
    main()
