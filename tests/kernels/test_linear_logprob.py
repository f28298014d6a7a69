"""Slices of the vocabulary: kept and made again alike, targets at their edges, what they hold in memory. (Values: test_logps.py.)

And the Triton kernel that scores without slices: run by the interpreter where there is no GPU, compiled ahead of time for two.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign.kernels import linear_logprob
from minialign.kernels.linear_logprob import LinearLogps, vocabulary_slices
from minialign.logps import linear_logps
from tests.kernels.test_logprob import DEVICE, pytestmark  # noqa: F401  (on a GPU all of this file is marked gpu)
from tests.test_logps import narrow, problem


@pytest.mark.parametrize(("n", "v"), [(1, 11), (1, 50257), (100, 50304), (2048, 50304), (100_000, 32000), (0, 5)])
def test_slices_are_a_partition_of_the_vocabulary(n, v):
    """In order, no gap, no overlap; all but the last equally wide, a multiple of 128; of n rows about SLICE_BYTES, or 256 wide."""
    parts = vocabulary_slices(n, v, torch.device("cpu"))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(v))
    widths = {part.stop - part.start for part in parts[:-1]}
    assert len(widths) <= 1 and all(width % 128 == 0 for width in widths)
    assert all(4 * n * width <= max(linear_logprob.SLICE_BYTES["cpu"], 4 * n * 256) for width in widths)


def gradients(times=1, **changes):
    hidden, weight, targets = problem(13, v=50, **changes)
    logps, entropy = LinearLogps.apply(hidden, weight, targets, 0.7, True)
    g, e = torch.randn(2, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(times):
        hidden.grad = weight.grad = None
        ((g * logps).sum() + (e * entropy).sum()).backward(retain_graph=True)
    return logps, entropy, hidden.grad, weight.grad


def test_a_second_backward_gives_the_same_gradients(monkeypatch):
    """Seven slices of 8 columns: each is made once in the forward pass and once in every backward pass through the same graph."""
    narrow(monkeypatch, 8, rows=4)
    made = []
    monkeypatch.setattr(linear_logprob, "logits_of", lambda *args, real=linear_logprob.logits_of: made.append(1) or real(*args))
    expected = gradients()
    assert len(made) == 14
    for a, b in zip(expected, gradients(times=3), strict=True):
        assert torch.equal(a, b)
    assert len(made) == 14 + 28


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 49])
def test_targets_at_the_edges_of_slices(monkeypatch, at):
    narrow(monkeypatch, 8)
    hidden, weight, _ = problem(3, v=50)
    logps, _ = LinearLogps.apply(hidden, weight, torch.tensor([at, at, at]), 1.0, False)
    assert torch.allclose(logps, (hidden @ weight.T).log_softmax(1)[:, at], atol=1e-12)


def test_log_probs_are_never_above_zero(monkeypatch):
    """A target that takes almost all: its logit and the log-sum-exp come from the same numbers, so their difference is at most 0."""
    narrow(monkeypatch, 8)
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50)
    logps, _ = LinearLogps.apply(40 * weight, weight, targets, 1.0, False)
    assert (logps <= 0).all() and (logps > -1e-6).any()


class Float32(TorchDispatchMode):
    """The most bytes of a float32 tensor made under it."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.nbytes for x in tree_leaves(out) if torch.is_tensor(x) and x.dtype == torch.float32)])
        return out


def test_bfloat16_heads_have_no_float32_twin(monkeypatch):
    """V = 4096, C = 16, slices of 256: the head's gradient is written slice by slice in bfloat16; no float32 tensor of V x C is made."""
    narrow(monkeypatch, 256, rows=32)
    hidden, weight, targets = problem(40, c=16, v=4096, dtype=torch.bfloat16)
    with Float32() as seen:
        logps, entropy = LinearLogps.apply(hidden, weight, targets, 1.0, True)
        (logps.sum() + entropy.sum()).backward()
    assert seen.most == 4 * 40 * 256 < 4 * 4096 * 16 and weight.grad.dtype == torch.bfloat16


def test_the_gradient_of_bfloat16_inputs_is_as_good_as_one_rounding(monkeypatch):
    """Against float64 on the same numbers: within half a unit of the last place of bfloat16, 2^-8 of the largest entry's size or better."""
    narrow(monkeypatch, 64)
    hidden, weight, targets = problem(60, c=32, v=500, dtype=torch.bfloat16)
    g = torch.randn(60, generator=torch.Generator().manual_seed(1))
    (LinearLogps.apply(hidden, weight, targets, 1.0, False)[0] * g).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps = (exact[0] @ exact[1].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (logps * g.double()).sum().backward()
    for found, expected in zip((hidden.grad, weight.grad), (x.grad for x in exact), strict=True):
        error = (found.double() - expected).abs()
        assert (error <= 2.0**-8 * expected.abs() + 1e-6).all(), np.asarray(error.max())


# ------------------------------------------------------------------------------------------- scoring without logits (Triton)


@pytest.fixture
def score():
    """The kernel: compiled where there is a GPU, interpreted where there is none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from minialign.kernels.linear_logprob_triton import fused_statistics

    return fused_statistics


def scored(n, c, v, dtype, seed=0):
    """hidden, weight whose logits have standard deviation 5, targets, and float64's log-probs and entropies of the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, c, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(v, c, generator=generator) * 5 / c**0.5).to(dtype).to(DEVICE)
    targets = torch.randint(v, (n,), generator=generator).to(DEVICE)

    def exact(tau):
        log_p = (hidden.double() @ weight.double().T / tau).log_softmax(1)
        return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)

    return hidden, weight, targets, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "c", "v"), [(1, 8, 7), (5, 40, 1000), (130, 64, 4096), (300, 72, 500), (3, 130, 5003), (129, 16, 128)])
def test_scores_without_logits(score, n, c, v, dtype):
    """Log-prob within 2e-5, entropy within 1e-4 of float64 on the same inputs: tiles that end beyond N, V and C, groups that end early."""
    hidden, weight, targets, exact = scored(n, c, v, dtype)
    for tau in (1.0, 0.7):
        statistics = score(hidden, weight, targets, tau, True)
        logps, entropies = exact(tau)
        assert (statistics.target - statistics.lse() - logps).abs().max() < 2e-5
        assert (statistics.entropy() - entropies).abs().max() < 1e-4
        alone = score(hidden, weight, targets, tau, False)
        assert torch.equal(alone.lse(), statistics.lse()) and torch.equal(alone.target, statistics.target)


def test_scores_of_more_tokens_than_go_at_a_time(score, monkeypatch):
    """Partial numbers for 256 tokens at a time, of 300: nothing changes. Twice the same run: not a bit differs."""
    from minialign.kernels import linear_logprob_triton

    hidden, weight, targets, _ = scored(300, 16, 200, torch.float32)
    whole, again = (score(hidden, weight, targets, 1.0, True) for _ in range(2))
    monkeypatch.setattr(linear_logprob_triton, "PARTIAL_BYTES", 12 * 2 * 256)
    parts = score(hidden, weight, targets, 1.0, True)
    for name in ("top", "total", "weighted", "target"):
        assert torch.equal(getattr(whole, name), getattr(again, name)) and torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.slow
@pytest.mark.parametrize("v", [50257, 50304])
def test_scores_over_whole_vocabularies(score, v):
    hidden, weight, targets, exact = scored(4, 16, v, torch.bfloat16)
    statistics = score(hidden, weight, targets, 1.0, True)
    logps, entropies = exact(1.0)
    assert (statistics.target - statistics.lse() - logps).abs().max() < 2e-5 and (statistics.entropy() - entropies).abs().max() < 1e-4


def test_no_row_and_rows_of_any_stride(score):
    assert score(torch.zeros(0, 8, device=DEVICE), torch.zeros(9, 8, device=DEVICE), torch.zeros(0, dtype=torch.long, device=DEVICE), 1.0,
                 True).lse().shape == (0,)
    hidden, weight, targets, exact = scored(10, 32, 300, torch.float32)
    sparse = torch.zeros(20, 64, device=DEVICE)
    sparse[::2, 8:40] = hidden
    statistics = score(sparse[::2, 8:40], weight, torch.stack([targets, targets * 0], dim=1)[:, 0], 1.0, True)
    assert (statistics.target - statistics.lse() - exact(1.0)[0]).abs().max() < 2e-5
    with pytest.raises(AssertionError, match="side by side"):
        score(hidden.T.contiguous().T, weight, targets, 1.0, True)


def test_scoring_takes_the_place_of_slices_only_where_no_gradient_is_asked_for(score, monkeypatch):
    """Through linear_logps: without a gradient no slice is made and the numbers agree; with one of either input the slices are."""
    monkeypatch.setattr(linear_logprob, "fused_scorer", lambda hidden, weight: score)
    made, real = [], linear_logprob.logits_of
    monkeypatch.setattr(linear_logprob, "logits_of", lambda *args: made.append(1) or real(*args))
    hidden, weight, targets, exact = scored(10, 32, 300, torch.float32)
    logps, entropies = linear_logps(hidden, weight, targets, tau=0.7, body="chunked")
    assert not made and (logps - exact(0.7)[0]).abs().max() < 2e-5 and (entropies - exact(0.7)[1]).abs().max() < 1e-4
    weight.requires_grad_()
    with torch.no_grad():
        linear_logps(hidden, weight, targets, body="chunked")
    assert not made
    linear_logps(hidden, weight, targets, body="chunked")[0].sum().backward()
    assert made and weight.grad is not None


def test_which_widths_the_kernel_scores():
    """On CUDA (pretended: two inputs of which only dtype, shape and device are read) up to FUSED_UP_TO channels, in half precision."""
    from types import SimpleNamespace

    def of(c, dtype=torch.bfloat16, is_cuda=True):
        return SimpleNamespace(dtype=dtype, shape=(4, c), is_cuda=is_cuda)

    assert linear_logprob.FUSED_UP_TO == 2048
    for c, fused in ((1024, True), (2048, True), (2049, False), (4096, False)):
        assert (linear_logprob.fused_scorer(of(c), of(c)) is not None) == (fused and linear_logprob.kernel() is not None)
    assert linear_logprob.fused_scorer(of(8, torch.float32), of(8, torch.float32)) is None
    assert linear_logprob.fused_scorer(of(8, is_cuda=False), of(8)) is None


AHEAD = r"""
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minialign.kernels import linear_logprob_triton as k

tool = Path(triton.__file__).parent / "backends/nvidia/bin"
names = k.score_kernel.arg_names
for arch in (80, 90):
    for dtype in ("bf16", "fp16"):
        types = {name: "i32" for name in ("n", "v", "c", "hidden_stride", "weight_stride")}
        types |= {name: "*fp32" for name in ("top_p", "total_p", "weighted_p", "target_p")}
        types |= {"hidden": "*" + dtype, "weight": "*" + dtype, "targets": "*i64", "scale": "fp32"}
        constants = dict(ENTROPY=True, WIDE=False, TOKENS=k.TOKENS, VOCAB=k.VOCAB, CHANNELS=k.CHANNELS, GROUP=k.GROUP)
        types |= {name: "constexpr" for name in constants}
        multiples = {name for name in names if types[name][0] == "*"} | {"c", "hidden_stride", "weight_stride"}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
        source = ASTSource(k.score_kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": k.WARPS, "num_stages": k.STAGES})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage, sass = (subprocess.run([tool / program, flag, file.name], capture_output=True, text=True, check=True).stdout
                           for program, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")))
        registers, stack = (int(re.search(key + r":(\d+)", usage).group(1)) for key in ("REG", "STACK"))
        unit = "HGMMA" if "HGMMA" in sass else "HMMA" if "HMMA" in sass else "none"
        print(f"sm_{arch} {dtype} score: {registers} registers, {stack} bytes of stack, {binary.metadata.shared} bytes shared, "
              f"tensor cores {unit}, asynchronous copies {'LDGSTS' in sass or 'UTMALDG' in sass}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
def test_the_scorer_compiled_ahead_of_time():
    """For sm_80 and sm_90: no byte of stack, tensor cores (sm_90: those of whole warp groups), copies that run ahead of the products."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert " 0 bytes of stack" in line and "copies True" in line, line
        assert f"tensor cores {'HGMMA' if line.startswith('sm_90') else 'HMMA'}" in line, line
