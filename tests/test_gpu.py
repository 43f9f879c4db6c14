"""What a run meets on a GPU, as far as a machine without one can imitate it: compilers and launches that
fail, memory that runs out, drivers and cards that torch cannot use, float16. prove_gpu.py uses a real one.
"""

import os
import re

import pytest
import torch

import train
from config import UserError
from conftest import contents, go, make_model, raises, tiny_config
from model import RMSNorm

pytestmark = pytest.mark.usefixtures("one_process")


# ---------------------------------------------------------------- compiled code that fails

class Compiled(torch.nn.Module):
    """A module as torch.compile returns it, which fails at one stage of its second call."""

    def __init__(self, module: torch.nn.Module, stage: str, error: Exception):
        super().__init__()
        self.module, self.stage, self.error, self.calls = module, stage, error, 0

    def forward(self, *args):
        self.calls += 1
        loss = self.module(*args)
        if self.calls == 2 and self.stage == "forward":
            raise self.error
        if self.calls == 2 and self.stage == "backward":
            loss.register_hook(raises(self.error))
        return loss


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("error", [
    AssertionError("inside Dynamo"), IndexError("inside Dynamo"), RuntimeError("CUDA error: invalid value"),
    torch._dynamo.exc.InternalTorchDynamoError("inside Dynamo")], ids=lambda error: type(error).__name__)
def test_a_run_survives_any_failure_of_compiled_code(tmp_path, monkeypatch, capsys, stage, error):
    go(tiny_config(tmp_path / "eager", training__max_steps=6))
    monkeypatch.setattr(torch, "compile", lambda module, **options: Compiled(module, stage, error))
    run = go(tiny_config(tmp_path / "compiled", training__max_steps=6, training__compile="on"))
    assert run.code == 0 and capsys.readouterr().err.count("WARNING: torch.compile failed") == 1
    ours, theirs = (contents(tmp_path / name / "checkpoints" / "latest.pt") for name in ("compiled", "eager"))
    assert [k for k in ours if ours[k] != theirs[k]] == ["config.training.compile"]


def test_a_compiler_that_fails_is_done_without(tmp_path, monkeypatch, capsys):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(
        module, backend=raises(NotImplementedError("no kernels for this card"))))
    assert go(tiny_config(tmp_path, training__max_steps=3, training__compile="on")).code == 0
    assert "WARNING: torch.compile failed" in capsys.readouterr().err


def test_a_mistake_that_is_not_the_compilers_is_raised_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Objective, "forward", raises(IndexError("a real mistake")))
    monkeypatch.setattr(torch, "compile", lambda module, **options: Compiled(module, "never", None))
    with pytest.raises(IndexError, match="a real mistake"):
        go(tiny_config(tmp_path, training__compile="on"))
    assert capsys.readouterr().err.count("WARNING: torch.compile failed") == 1


# ---------------------------------------------------------------- memory

@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    torch._dynamo.exc.InternalTorchDynamoError("backend='inductor' raised: OutOfMemoryError: Tried"),
], ids=lambda error: f"{type(error).__name__}, {str(error)[:12]}")
def test_memory_that_runs_out_halves_before_compiling_is_given_up(tmp_path, monkeypatch, error, capsys):
    monkeypatch.setattr(torch, "compile", lambda module, **options: Compiled(module, "forward", error))
    run = go(tiny_config(tmp_path, training__max_steps=4, training__compile="on"))
    printed = capsys.readouterr().err
    assert run.micro_batch_size == 2 and "going on with training.micro_batch_size=2" in printed
    assert isinstance(run.loss_of, Compiled) and "torch.compile failed" not in printed


def test_a_single_sequence_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Objective, "forward", raises(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(UserError, match="out of memory on cpu with 1 sequences at a time; use a smaller"):
        go(tiny_config(tmp_path))


# ---------------------------------------------------------------- drivers and cards

@pytest.mark.parametrize(("version", "advice"), [
    (None, "this torch is built without CUDA.*pip install"), ("13.0", "CUDA 13 needs NVIDIA's driver 580")])
def test_a_gpu_that_stays_idle_is_a_warning_with_the_way_out(tmp_path, monkeypatch, capsys, version, advice):
    script = tmp_path / "nvidia-smi"  # what an NVIDIA driver brings; it is not run
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    machine = train.Machine(tiny_config(tmp_path, training__device="auto").training)
    printed = capsys.readouterr().err
    assert machine.device.type == "cpu"
    assert "WARNING: torch cannot use this machine's NVIDIA GPU: " in printed and re.search(advice, printed)


def test_no_gpu_is_no_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    train.Machine(tiny_config(tmp_path, training__device="auto").training)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_here_is_one_sentence(tmp_path, device):
    with pytest.raises(UserError, match=f"training.device = '{device}': torch .* cannot compute on it"):
        train.Machine(tiny_config(tmp_path, training__device=device).training)


def test_a_card_without_kernels_in_this_torch_is_one_sentence(tmp_path, monkeypatch):
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")
    monkeypatch.setattr(torch, "zeros", raises(error))
    with pytest.raises(UserError, match="cannot compute on it .CUDA error: no kernel image is available"):
        train.Machine(tiny_config(tmp_path, training__device="cuda").training)


# ---------------------------------------------------------------- float16 and compiled arithmetic

def test_orthogonalizing_in_float16_holds_for_the_smallest_gradients():
    torch.manual_seed(0)
    matrices = torch.randn(2, 32, 64) * 1.7e-6
    expected = train.orthogonalize(matrices, 5, torch.float32)
    half = train.orthogonalize(matrices, 5, torch.float16)
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.02)


def test_the_gradient_of_a_norm_is_the_same_compiled_and_not():
    torch.manual_seed(0)
    norm, x = RMSNorm(64, eps=1e-6), torch.randn(8, 64, requires_grad=True)

    def gradients(module):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        return torch.autograd.grad(y.float().square().sum(), (x, norm.weight))

    compiled = gradients(torch.compile(norm, backend="aot_eager"))
    for ours, theirs in zip(compiled, gradients(norm)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_loss_and_gradients_of_the_form_for_gpus(monkeypatch):
    """The branch that torch.compile makes one kernel of, run on a CPU."""
    torch.manual_seed(0)
    model = make_model(97)
    tokens = torch.randint(97, (3, 32))
    expected = torch.autograd.grad(model.loss(tokens, tokens.flip(0)), list(model.parameters()))
    monkeypatch.setattr("model.SCATTERS", ())
    for ours, theirs in zip(torch.autograd.grad(model.loss(tokens, tokens.flip(0)), list(model.parameters())),
                            expected):
        torch.testing.assert_close(ours, theirs)
