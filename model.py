"""A decoder-only transformer in Qwen3's layout, its loss, and generation.

Shapes: B batch, T time, C channels (d_model), H heads, D head size, V vocabulary, N = B*T.
The parameters have the names of transformers' Qwen3Model, which loads `state_dict()` as it is.
The last section replaces some of PyTorch's functions by faster ones for a CPU, which compute the same.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig, SamplingConfig

NORM_EPS = 1e-6
ROPE_THETA = 10_000.0
COPY_GAIN, COPY_EMBEDDING_STD = 1.5, 0.2  # smaller ones never found the colors of stories: tests/README.md
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**27}  # elements of the (N, V) matrix in memory
EVALUATED_AT_ONCE = 32  # windows
SCATTERS = ("cpu",)  # devices on which changing the target's gradient in place is faster
ATTENTION_BLOCK = 256  # queries at a time, on a CPU


# ---------------------------------------------------------------- transformer

def rotary_table(head_dim: int, length: int) -> Tensor:
    """Returns the (2, T, D) cosines and sines of the rotary angles (Su et al. 2021, arXiv:2104.09864).

    Half-split: the halves of a head turn together, and the first half's sines are negative.
    """
    frequencies = ROPE_THETA ** (-torch.arange(0, head_dim, 2) / head_dim)  # (D/2,)
    angles = torch.outer(torch.arange(length), frequencies)  # (T, D/2)
    return torch.stack((angles.cos().repeat(1, 2), torch.cat((-angles, angles), dim=1).sin()))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of queries or keys (B, H, T, D) by the angle of its position."""
    cos, sin = rope.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal multi-head attention, rotary positions, normalised queries and keys (arXiv:2010.04245)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.d_model // config.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(4))
        self.q_norm = RMSNorm(self.head_dim, eps=NORM_EPS)
        self.k_norm = RMSNorm(self.head_dim, eps=NORM_EPS)

    def forward(self, x: Tensor, rope: Tensor, cache: Tensor | None = None) -> Tensor:
        """Returns (B, T, C). `cache` (2, B, H, past + T, D) holds keys and values and receives those of x."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), rope)  # (B, H, T, D)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), rope)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            cache[..., -x.shape[1]:, :] = torch.stack((k, v))
            k, v = cache
        past = k.shape[2] - x.shape[1]
        if past == 0:
            y = causal_attention(q, k, v)
        elif x.shape[1] == 1:  # a single query, which sees all keys
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            seen = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, seen)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.d_model, eps=NORM_EPS)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor, cache: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Transformer(nn.Module):
    """`Transformer(config.model, vocab_size)(tokens)` are the logits."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model)  # its weight is the output matrix, too
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=NORM_EPS)
        rope = rotary_table(config.d_model // config.n_heads, config.max_seq_len)
        self.register_buffer("rope", rope, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets every parameter: matrices normal with deviation 0.02, those that write to the residual stream
        divided by sqrt(2 n_layers) (Radford et al. 2019), norms one. Uses torch's global random state.

        With `copy_heads`, that many heads of the last block begin by copying: their output columns are the
        transpose of their value rows, which are orthogonal, so that they add what they attend to as it came
        in, and the output matrix, the embedding, reads it as "this token again". By itself a small model
        learns to look back only after thousands of steps. The embedding begins larger, so that the blocks
        before do not drown which token it was. That is why at first most tokens predict themselves, and the
        loss is far above ln V.
        """
        initialised = set()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            else:
                continue
            initialised.add(module.weight)
        for block in self.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * len(self.layers)))
        if self.config.copy_heads:
            attention = self.layers[-1].self_attn
            value = attention.v_proj.weight[:self.config.copy_heads * attention.head_dim]
            attention.o_proj.weight[:, :len(value)] = nn.init.orthogonal_(value, gain=COPY_GAIN).mT
            self.embed_tokens.weight.normal_(std=COPY_EMBEDDING_STD)
        assert initialised == set(self.parameters()), "a parameter is left uninitialised"

    def parameter_counts(self) -> dict[str, int]:
        """Returns {"total", "embedding", "blocks"}; the tied embedding counts once."""
        total, embedding = sum(p.numel() for p in self.parameters()), self.embed_tokens.weight.numel()
        return {"total": total, "embedding": embedding, "blocks": total - embedding}

    def hidden(self, tokens: Tensor, cache: Tensor | None = None, past: int = 0) -> Tensor:
        """Returns the final hidden states (B, T, C) of tokens (B, T).

        `cache` (n_layers, 2, B, H, length, D) holds those of `past` earlier positions and receives these.
        """
        end = past + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens are more than max_seq_len = {self.config.max_seq_len}")
        x, rope = self.dropout(self.embed_tokens(tokens)), self.rope[:, past:end]
        for i, block in enumerate(self.layers):
            x = block(x, rope, None if cache is None else cache[i, ..., :end, :])
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits (B, T, V) of tokens (B, T), T at most max_seq_len (else ValueError)."""
        return F.linear(self.hidden(tokens), self.embed_tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean cross-entropy in nats, a scalar, of targets (B, T) given tokens (B, T)."""
        x = self.hidden(tokens).flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            return LinearCrossEntropy.apply(x, self.embed_tokens.weight, targets.flatten())

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, targets: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
        """Returns each target's (B, T) cross-entropy in nats, float32, and whether it is the likeliest."""
        losses, hits = [], []
        for x, y in zip(self.hidden(tokens).flatten(0, 1).split(rows), targets.flatten().split(rows)):
            logits = F.linear(x, self.embed_tokens.weight).float()
            losses.append(F.cross_entropy(logits, y, reduction="none"))
            hits.append(logits.argmax(-1) == y)
        return torch.cat(losses).view_as(targets), torch.cat(hits).view_as(targets)

    @torch.inference_mode()
    def generate(self, prompts: Iterable, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None, eot_id: int | None = None,
                 generator: torch.Generator | None = None,
                 stream: Callable[[int, int], object] | None = None) -> list[list[int]]:
        """Continues B prompts, lists of tokens or a (B, T) tensor; returns B lists: prompt, then new tokens.

        A row ends after `eot_id`, which it includes, or after `max_new_tokens`; `sample` says how it goes on.
        `stream(row, token)` is called with each new token. Keys and values are cached up to max_seq_len; past
        it, every token is a pass over the last max_seq_len. Dropout is off. ValueError on an empty prompt.
        """
        prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        rows = [[int(token) for token in prompt] for prompt in prompts]
        if not all(rows):
            raise ValueError("a prompt needs at least one token")
        weight, c, context = self.embed_tokens.weight, self.config, self.config.max_seq_len
        lengths = torch.tensor([len(row) for row in rows], device=weight.device)
        limits = [len(row) + max_new_tokens for row in rows]
        past, end, last = 0, min(map(len, rows)), max(limits)
        tokens = torch.tensor([row + [0] * (last - len(row)) for row in rows], device=weight.device)
        shape = (len(rows), c.n_heads, min(last, context), c.d_model // c.n_heads)  # (B, H, T, D)
        cache = weight.new_empty(c.n_layers, 2, *shape)
        active = set(range(len(rows))) if max_new_tokens > 0 else set()
        training = self.training
        self.eval()
        while active:
            # All rows are at position `end`; one whose prompt is longer takes its token from there.
            if end <= context:
                x, past = self.hidden(tokens[:, past:end], cache, past), end
            else:
                x = self.hidden(tokens[:, end - context:end])
            chosen = sample(next_logits(x[:, -1], weight), temperature, top_k, top_p, generator)
            tokens[:, end] = torch.where(lengths > end, tokens[:, end], chosen)
            for i, token in enumerate(chosen.tolist()):
                if i not in active or end < len(rows[i]):
                    continue
                rows[i].append(token)
                if stream:
                    stream(i, token)
                if token == eot_id or len(rows[i]) == limits[i]:
                    active.remove(i)
            end += 1
        self.train(training)
        return rows


# ---------------------------------------------------------------- sampling

def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           generator: torch.Generator | None = None) -> Tensor:
    """Returns (B,) tokens drawn from logits (B, V); the likeliest ones at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    weights, ids = candidates(logits, temperature, top_k, top_p)
    return ids.gather(-1, torch.multinomial(weights, 1, generator=generator)).squeeze(-1)


def candidates(logits: Tensor, temperature: float, top_k: int | None,
               top_p: float | None) -> tuple[Tensor, Tensor]:
    """Returns the weights and the ids, both (B, K), of the tokens that may be drawn from logits (B, V): the
    softmax of the logits over the temperature, of the `top_k` likeliest tokens, and of those only the
    likeliest that together have at least `top_p` of the probability (Holtzman et al. 2019, arXiv:1904.09751);
    the others weigh zero.
    """
    logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # likeliest first
    weights = (logits.float() / temperature).softmax(-1)
    if top_p is not None:
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0)
    return weights, ids


# ---------------------------------------------------------------- a loss over stories, a story

def story_windows(tokens: np.ndarray, eot_id: int, seq_len: int) -> np.ndarray:
    """Returns the (start, end) of every story, (W, 2), end-of-text included; or of pieces of `seq_len`."""
    ends = [0, *(np.flatnonzero(tokens[:-1] == eot_id) + 1).tolist(), len(tokens)]
    return np.array([(first, min(first + seq_len, end)) for start, end in itertools.pairwise(ends)
                     for first in range(start, end, seq_len)])


def evaluate(model: Transformer, tokens: np.ndarray, eot_id: int,
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
    for i in progress(range(0, len(windows), EVALUATED_AT_ONCE)):
        starts, ends = windows[i:i + EVALUATED_AT_ONCE].T[..., None]
        index = starts + np.arange(ends[0, 0] - starts[0, 0])  # (B, T)
        inside, index = index < ends, np.minimum(index, ends - 1)  # shorter windows are padded
        x, y = (torch.from_numpy(a[index].astype(np.int64)).to(device) for a in (previous, tokens))
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


# ---------------------------------------------------------------- the same functions, faster on a CPU

class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm whose result has autocast's dtype, converted once and not by every product that reads it."""

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled(x.device.type)
        if not (autocast or torch.is_grad_enabled()):  # less to do for a single token
            return super().forward(x)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        return RMSNormFunction.apply(x, self.weight, self.eps, dtype)


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight in `dtype`, for x (..., C), weight (C) (Zhang & Sennrich 2019, arXiv:1910.07467).

    Keeps only x and 1 / rms(x) for the gradients: on a CPU a third of F.rms_norm's time (torch 2.13).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, scale, weight)
        y = x * scale * weight  # neither in place nor .to(its own dtype): torch 2.11 compiles those wrongly
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        normalised = x * scale
        product = grad * normalised
        with torch.autocast(x.device.type, enabled=False):  # compiled code would use forward's autocast
            share = product @ weight / x.shape[-1]
        along_x = normalised.mul_(share[..., None])
        grad_x = (grad * weight).sub_(along_x).mul_(scale)
        return grad_x.to(x.dtype), product.flatten(0, -2).sum(0), None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns (B, H, T, D): the attention of queries to keys and values that are not later, all (B, H, T, D).

    On a CPU in bfloat16 the fused kernel takes twice the time of plain matrix products (torch 2.13). These go
    over the queries in blocks, so that most of what is masked is never computed.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    (B, H, T, D), blocks = q.shape, []
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (BH, T, D)
    bias = q.new_full((T, T), -math.inf).triu(1)
    for start in range(0, T, ATTENTION_BLOCK):
        end = min(T, start + ATTENTION_BLOCK)
        scores = torch.baddbmm(bias[start:end, :end], q[:, start:end], k[:, :end].mT, alpha=D ** -0.5)
        blocks.append(scores.softmax(-1) @ v[:, :end])
    return torch.cat(blocks, dim=1).view(B, H, T, D)


class LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of targets (N,) under logits x (N, C) @ weight.T, which never exist at once.

    The gradients are computed with the loss, chunk by chunk, so that nothing of size N x V is kept. Half the
    time of F.linear_cross_entropy, whose loss is, besides, off by up to 0.06 nats in bfloat16 (torch 2.13).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        vocab_size, loss = len(weight), torch.zeros((), device=x.device)
        w = F.pad(weight.to(x.dtype), (0, 0, 0, -vocab_size % 64))  # a multiple of 64 rows is fastest
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(w, dtype=weight.dtype)
        chunk = max(1, LOGITS_AT_ONCE.get(x.device.type, 2**26) // len(w))
        for i in range(0, len(x), chunk):
            rows = slice(i, i + chunk)
            target = targets[rows, None]
            logits = F.linear(x[rows], w)  # (rows, V and padding)
            logits[:, vocab_size:] = -math.inf
            p = logits.softmax(-1, dtype=torch.float32)
            loss -= p.gather(1, target).clamp_min(1e-37).log().sum()
            if x.device.type in SCATTERS:
                grad_logits = p.scatter_add_(1, target, torch.full(target.shape, -1.0))
            else:  # what torch.compile makes one kernel of
                grad_logits = p - (torch.arange(len(w), device=x.device) == target).float()
            grad_logits = grad_logits.to(x.dtype)
            grad_x[rows] = grad_logits @ w
            grad_weight += grad_logits.mT @ x[rows]
        ctx.save_for_backward(grad_x, grad_weight[:vocab_size])
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad / len(grad_x)
        return grad_x.mul_(scale), grad_weight.mul_(scale), None


def next_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Returns F.linear(x, weight), the logits (B, V) of x (B, C) and weight (V, C).

    MKL computes F.linear of one row, or of a few, on one core of a CPU from AMD. With the weight first, and a
    single row taken twice, the product takes a fifth of the time.
    """
    rows = x if len(x) > 1 else x.repeat(2, 1)
    return (weight @ rows.mT).mT[:len(x)]
