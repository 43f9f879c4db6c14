"""The transformer: agreement with transformers' Qwen3, causality, loss, generation."""

import contextlib
import functools
import math

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import make_qwen3

import model as model_module
import train
from config import ModelConfig, TrainingConfig
from model import (
    COPY_EMBEDDING_STD, COPY_GAIN, RMSNorm, Transformer, candidates, causal_attention, next_logits,
    sample)
from train import Objective

VOCAB, CONTEXT = 97, 24
make_model = functools.partial(conftest.make_model, VOCAB, n_layers=3, n_heads=4, max_seq_len=CONTEXT)


def make_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_logits_and_greedy_generation_agree_with_transformers_qwen3():
    ours, tokens = make_model(), make_tokens(3, CONTEXT)
    theirs = make_qwen3(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
        loss = ours.loss(tokens[:, :-1], tokens[:, 1:])
        torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss)
    prompts = tokens[:, :5]
    greedy = theirs.generate(prompts, max_new_tokens=19, do_sample=False, pad_token_id=0)
    assert ours.generate(prompts, 19, temperature=0) == greedy.tolist()


def test_a_later_token_never_changes_an_earlier_logit():
    model, tokens = make_model(), make_tokens(1, 24)
    with torch.no_grad():
        before = model(tokens)
        for t in (1, 11, 23):
            changed = tokens.clone()
            changed[0, t] = (changed[0, t] + 1) % VOCAB
            after = model(changed)
            assert torch.equal(before[0, :t], after[0, :t])
            assert not torch.allclose(before[0, t], after[0, t])


def test_loss_and_gradients_are_those_of_plain_cross_entropy(monkeypatch):
    # 2 x 24 targets in chunks of five, the last one smaller; the vocabulary is padded to 128
    monkeypatch.setitem(model_module.LOGITS_AT_ONCE, "cpu", 7 * VOCAB)
    model, tokens, targets = make_model(), make_tokens(2, 24), make_tokens(2, 24).flip(0)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    losses, hits = model.token_losses(tokens, targets, rows=5)
    torch.testing.assert_close(losses.mean(), expected)
    assert torch.equal(hits, model(tokens).argmax(-1) == targets)


def test_loss_in_bfloat16_is_close_and_not_rounded_to_bfloat16():
    model, tokens, targets = make_model(), make_tokens(4, 24), make_tokens(4, 24).flip(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    assert loss.dtype == torch.float32 and abs(loss - model.loss(tokens, targets)) < 0.02
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_and_its_gradients_are_those_of_pytorch(autocast):
    norm, x = RMSNorm(16, eps=1e-6), torch.randn(3, 5, 16, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    expected = F.rms_norm(x, (16,), norm.weight, 1e-6)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = {"rtol": 0.02, "atol": 0.02} if autocast else {}
    torch.testing.assert_close(y.float(), expected, **tolerance)
    tolerance = {"rtol": 0.02, "atol": 0.2} if autocast else {"rtol": 1e-4, "atol": 1e-4}
    sums = ((output * torch.arange(16)).sum() for output in (y, expected))
    ours, theirs = (torch.autograd.grad(total, (x, norm.weight)) for total in sums)
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("length", [1, 256, 600])
def test_attention_in_blocks_is_causal_attention(length):
    q, k, v = torch.randn(3, 2, 4, length, 16).bfloat16().requires_grad_().unbind()
    ours = causal_attention(q, k, v)
    theirs = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.03)
    ours, theirs = (torch.autograd.grad((o * o.detach()).sum(), (q, k, v)) for o in (ours, theirs))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0.05, atol=0.1)


def test_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(), 5000).eval()
    tokens = torch.randint(5000, (2, 64))
    with torch.no_grad():
        assert abs(model.loss(tokens, tokens.roll(1)) - math.log(5000)) < 0.15


def test_every_parameter_is_initialised_and_residual_projections_are_smaller():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_layers=8, d_model=64, n_heads=2, d_ff=256), 100)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(p.std() / expected - 1) < 0.1, name
    counts = model.parameter_counts()
    total = sum(p.numel() for p in model.parameters())
    assert counts["total"] == total == counts["embedding"] + counts["blocks"]


def test_dropout_is_only_active_in_training():
    model, tokens = make_model(dropout=0.5), make_tokens(1, 8)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.generate(tokens, 1)
    assert model.training


def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """Greedy generation with neither cache nor batch."""
    row = list(prompt)
    for _ in range(n):
        row.append(int(model(torch.tensor([row[-model.config.max_seq_len:]]))[0, -1].argmax()))
    return row


def test_cached_generation_equals_uncached_past_the_context_length_and_in_a_ragged_batch():
    model = make_model()
    prompts = [make_tokens(n).tolist() for n in (3, 9, 1, 30)]
    rows = model.generate(prompts, 40, temperature=0)
    assert rows == [greedy(model, prompt, 40) for prompt in prompts]


@torch.no_grad()
def test_a_chunk_on_a_filled_cache_gives_the_hidden_states_of_the_whole_sequence():
    model, tokens = make_model(), make_tokens(2, CONTEXT)
    whole, m = model.hidden(tokens), model.config
    for ends in ((CONTEXT,), (5, 9, 10, CONTEXT), (1, 2, 23, CONTEXT), (20, CONTEXT)):
        cache = torch.full((m.n_layers, 2, 2, m.n_heads, CONTEXT, m.d_model // m.n_heads), math.nan)
        parts, past = [], 0
        for end in ends:
            parts.append(model.hidden(tokens[:, past:end], cache, past))
            past = end
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_the_objective_compiles_into_one_graph():
    model, tokens = make_model(dropout=0.1), make_tokens(2, CONTEXT)
    compiled = torch.compile(Objective(model), fullgraph=True, backend="aot_eager")
    gradients = []
    for loss_of in (compiled, Objective(model)):
        loss = loss_of(tokens, tokens.roll(-1, 1))
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    model.train()
    compiled(tokens, tokens.roll(-1, 1)).backward()  # with dropout
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_generation_streams_its_tokens_and_stops_at_end_of_text():
    model, streamed, prompt = make_model(), [], [1, 2, 3]
    full = model.generate([prompt], 20, temperature=0)[0]
    eot = full[8]
    row = model.generate([prompt], 20, temperature=0, eot_id=eot, stream=lambda *new: streamed.append(new))[0]
    assert row == full[:full.index(eot, 3) + 1]
    assert streamed == [(0, token) for token in row[3:]]
    with pytest.raises(ValueError, match="at least one token"):
        model.generate([[]], 3)


def test_sampling_is_reproducible_and_leaves_the_global_random_state_alone():
    model = make_model()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rows = [model.generate([[1, 2]], 20, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert rows[0] == rows[1] != rows[2]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, None, None), (0.7, None, None), (1.0, 5, None), (1.0, None, 0.6), (1.5, 20, 0.8), (0.5, 1, 0.1),
    (1.0, 1000, 1.0)])
def test_sampling_matches_transformers_logits_processors(temperature, top_k, top_p):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    weights, ids = candidates(logits, temperature, top_k, top_p)
    ours = torch.zeros_like(logits).scatter(-1, ids, weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(ours, expected.softmax(-1))
    generator = torch.Generator().manual_seed(0)
    many = sample(logits.repeat(500, 1), temperature, top_k, top_p, generator).view(500, 4)
    for row, column in zip(expected, many.T, strict=True):
        assert row[column].isfinite().all()


@pytest.mark.parametrize(("vocab_size", "rows"), [(63, 1), (64, 1), (VOCAB, 1), (VOCAB, 3), (4096, 5)])
def test_logits_of_a_generated_token_are_those_of_a_linear_layer(vocab_size, rows):
    x, weight = torch.randn(rows, 16), torch.randn(vocab_size, 16)
    torch.testing.assert_close(next_logits(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-5)


def test_tokens_beyond_the_context_are_refused():
    with pytest.raises(ValueError, match="max_seq_len = 24"):
        make_model()(make_tokens(1, 25))


# ---------------------------------------------------------------- copy heads

@torch.no_grad()
def test_copy_heads_begin_by_adding_what_they_attend_to():
    """The output columns of those heads, and of no others, are the transpose of orthogonal value rows."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_layers=2, d_model=32, n_heads=4, copy_heads=2), 50)
    first, last = (block.self_attn for block in model.layers)
    value, output = last.v_proj.weight[:16], last.o_proj.weight[:, :16]
    torch.testing.assert_close(value @ value.mT, COPY_GAIN**2 * torch.eye(16), rtol=1e-4, atol=1e-4)
    assert torch.equal(output, value.mT)
    assert last.v_proj.weight[16:].std() < 0.03 and last.o_proj.weight[:, 16:].std() < 0.03
    assert first.v_proj.weight.std() < 0.03 and first.o_proj.weight.std() < 0.03
    assert model.embed_tokens.weight.std() == pytest.approx(COPY_EMBEDDING_STD, rel=0.1)


@pytest.mark.parametrize(("copy_heads", "least", "most"), [(0, 0, 0.2), (2, 0.9, 1)])
def test_copy_heads_name_again_within_40_steps_what_others_do_not(copy_heads, least, most):
    """One of 100 names, drawn for each sequence, comes again after a mark, among random tokens."""
    names, mark, places = 100, 100, (25, 50)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_layers=2, d_model=64, n_heads=4, d_ff=128, max_seq_len=64, dropout=0,
                                    copy_heads=copy_heads), 160)
    optimizer = train.make_optimizer(model, TrainingConfig(), torch.float32)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def batch():
        tokens = torch.randint(mark + 1, 160, (16, 65))
        name = torch.randint(names, (16,))
        for place in (1, *places):
            tokens[:, place], tokens[:, place + 1] = mark, name
        return tokens[:, :-1], tokens[:, 1:]

    for _ in range(40):
        train.train_step(train.Objective(model), optimizer, scaler, *batch(), 16, 1.0, contextlib.nullcontext)
    tokens, targets = batch()
    right = (model(tokens).argmax(-1) == targets)[:, places].float().mean()
    assert least <= right <= most
