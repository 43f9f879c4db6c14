"""What each choice of the model and the optimizer is worth: every variant trained for the same time, on the same batches.

    python tests/ablation.py ../shared/tinystories/train.txt --seconds 120

The time of an update is measured for all variants in turns, and each then makes as many updates as fit into the seconds;
so a slower moment of the machine does not count against the one that happens to run in it. Prints a table of Markdown.
"""

import argparse
import contextlib
import dataclasses
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
from model import Transformer
from train import Objective, autocast, choose_device, choose_precision, evaluate, gather, keep_freed_memory, learning_rate, make_optimizer, train_step


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else y


class TwoMatrixMLP(nn.Module):
    def __init__(self, mlp: nn.Module, activation):
        super().__init__()
        self.up_proj, self.down_proj, self.activation = mlp.up_proj, mlp.down_proj, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class PositionedEmbedding(nn.Embedding):
    """Token embedding plus a learned one of the position; `weight`, the output matrix, is that of the tokens."""

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
VARIANTS = {  # name: (changes to the model, training settings that differ from the laptop preset's)
    "ours": ((), {}),
    "without QK-norm": ((use_no_qk_norm,), {}),
    "LayerNorm with biases": ((use_layer_norm,), {}),
    "GELU MLP, two matrices": ((use_two_matrices(F.gelu),), {}),
    "ReLU-squared MLP, two matrices": ((use_two_matrices(relu_squared),), {}),
    "learned positions": ((use_learned_positions,), {}),
    "untied embeddings": ((use_untied_embeddings,), {}),
    "GPT-2's block": (GPT2, {}),
    "weight decay 0.1": ((), {"weight_decay": 0.1}),
    "AdamW 5e-4": ((), {"optimizer": "adamw", "learning_rate": 5e-4}),
    "AdamW 1e-3": ((), {"optimizer": "adamw", "learning_rate": 1e-3}),
    "AdamW 2e-3": ((), {"optimizer": "adamw", "learning_rate": 2e-3}),
    "GPT-2's block, AdamW 1e-3": (GPT2, {"optimizer": "adamw", "learning_rate": 1e-3}),
}


class Trial:
    """One variant with its optimizer; `update` makes an update."""

    def __init__(self, name: str, config: Config, vocab_size: int, seed: int):
        changes, settings = VARIANTS[name]
        self.training, self.device = dataclasses.replace(config.training, **settings), choose_device(config.training.device)
        self.dtype, _ = choose_precision(self.device, config.training.use_amp)
        torch.manual_seed(seed)
        self.model = Transformer(config.model, vocab_size)
        self.model.no_rotation = False
        for change in changes:
            change(self.model)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, self.training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def context(self):
        return autocast(self.device, self.dtype)

    def rotation(self):
        return mock.patch.object(model_module, "rotate", lambda x, rope: x) if self.model.no_rotation else contextlib.nullcontext()

    def update(self, tokens: Tensor, targets: Tensor, step: int, steps: int) -> None:
        rate = learning_rate(step, self.training.learning_rate, self.training.warmup_steps, steps * (1 - self.training.decay_fraction), steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.rotation():
            train_step(Objective(self.model), self.optimizer, self.scaler, tokens, targets, len(tokens),
                       self.training.grad_clip, self.context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="whatever train.py takes as data.dataset")
    parser.add_argument("--seconds", type=float, default=120, help="training time of each variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339], help="of initialisation and data order")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    keep_freed_memory()
    config = Config()
    config.apply_preset("laptop")
    config.data.dataset = options.dataset
    tokenizer, train_stream, val_stream = prepare(config)
    stream = torch.from_numpy(train_stream.tokens.view("int16")).to(choose_device(config.training.device))
    batches = {seed: Batches(train_stream.tokens, config.training.batch_size, config.model.max_seq_len, seed) for seed in options.seeds}

    def train(name: str, seed: int, steps: int, until: int) -> Trial:
        trial = Trial(name, config, tokenizer.vocab_size, seed)
        for step in range(until):
            trial.update(*gather(stream, batches[seed].starts(step), config.model.max_seq_len), step, steps)
        return trial

    times = {name: [] for name in options.variants}
    for _ in range(6):
        for name in options.variants:
            trial = train(name, options.seeds[0], 100, until=1)
            tokens, targets = gather(stream, batches[options.seeds[0]].starts(1), config.model.max_seq_len)
            start = time.perf_counter()
            trial.update(tokens, targets, 1, 100)
            times[name].append(time.perf_counter() - start)
    print(f"\n{options.seconds:g} s each, {torch.get_num_threads()} threads, seeds {options.seeds}; differences are from the first row, "
          "seed by seed, with their standard error\n\n"
          "| | parameters | s per update | updates | bits per byte | difference |\n|---|---|---|---|---|---|")
    first = None
    for name in options.variants:
        steps, bits = round(options.seconds / (seconds := statistics.median(times[name]))), []
        for seed in options.seeds:
            trial = train(name, seed, steps, until=steps)
            with trial.rotation():
                losses, _ = evaluate(trial.model, val_stream.tokens, tokenizer.eot_id, 32, trial.context)
            bits.append(losses.sum(dtype="float64") / math.log(2) / val_stream.info["bytes"])
        first = first or bits
        differences = [b - f for b, f in zip(bits, first)]
        error = f" ± {statistics.stdev(differences) / len(bits)**0.5:.3f}" if len(bits) > 1 else ""
        parameters = sum(p.numel() for p in trial.model.parameters())
        print(f"| {name} | {parameters:,} | {seconds:.3f} | {steps} | {statistics.mean(bits):.3f} | "
              f"{statistics.mean(differences):+.3f}{error} |", flush=True)


if __name__ == "__main__":
    main()
