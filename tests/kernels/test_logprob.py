"""fold and to_gradient: the torch body by the definition, the Triton body against float64 and against it, on ragged shapes.

Without a GPU Triton's interpreter runs the kernels, and a compiler that needs none says what they would be on sm_80 and sm_90.
"""

import os
import subprocess
import sys

import pytest
import torch

from minialign.kernels import logprob
from minialign.kernels.linear_logprob import LinearLogps
from minialign.kernels.logprob import Statistics, to_gradient, update_statistics
from tests.test_logps import narrow, problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []  # on a GPU: compiled and run there, `python -m pytest -m gpu`


@pytest.fixture(params=["torch", "triton"])
def body(request, monkeypatch):
    """Which body runs; on a CPU the Triton one is interpreted."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr(logprob, "fused", lambda logits: request.param == "triton")
    return request.param


def logits_of(n, v, dtype, seed=0, spread=5.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, v, generator=generator) * spread).to(dtype).to(DEVICE), torch.randint(v, (n,), generator=generator).to(DEVICE)


def exact(logits, targets, tau, g=None, e=None):
    """log-prob, entropy and gradient by float64 autograd on the same numbers."""
    z = logits.detach().double().requires_grad_()
    log_p = (z / tau).log_softmax(1)
    logps, entropies = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    loss = (0 if g is None else (g.double() * logps).sum()) + (0 if e is None else (e.double() * entropies).sum())
    return logps.detach(), entropies.detach(), torch.autograd.grad(loss, z)[0] if torch.is_tensor(loss) else None


def folded(logits, targets, tau, width, entropy=True):
    statistics = Statistics.empty(len(logits), torch.promote_types(logits.dtype, torch.float32), logits.device)
    for start in range(0, logits.shape[1], width):
        update_statistics(logits[:, start : start + width], targets - start, statistics, tau, entropy=entropy)
    return statistics


@pytest.mark.parametrize("v", [7, 1000, 4096, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_three_numbers_a_row(body, v, dtype, tau):
    """Log-prob within 2e-5 and entropy within 1e-4 of float64 on the same inputs, logits of standard deviation 5; in one slice or in three.
    Logits rounded once more to bfloat16 would be off by a thousand times that."""
    logits, targets = logits_of(5, v, dtype)
    logps, entropies, _ = exact(logits, targets, tau)
    for width in (v, v // 3 + 1):
        statistics = folded(logits, targets, tau, width)
        assert (statistics.target - statistics.lse() - logps).abs().max() < 2e-5
        assert (statistics.entropy() - entropies).abs().max() < 1e-4
        alone = folded(logits, targets, tau, width, entropy=False)
        assert torch.equal(alone.lse(), statistics.lse()) and not alone.weighted.any()


@pytest.mark.slow
@pytest.mark.parametrize("v", [50257, 50304])
def test_three_numbers_of_whole_vocabularies(body, v):
    """GPT-2's odd one, whose rows start at odd addresses, and Pythia's."""
    logits, targets = logits_of(4, v, torch.bfloat16)
    logps, entropies, _ = exact(logits, targets, 1.0)
    statistics = folded(logits, targets, 1.0, v)
    assert (statistics.target - statistics.lse() - logps).abs().max() < 2e-5 and (statistics.entropy() - entropies).abs().max() < 1e-4


TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of the largest entry: half a unit of its last place


@pytest.mark.parametrize("v", [7, 1000, 5003])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("upstream", ["g", "e", "both"])
def test_the_gradient_over_the_logits(body, v, dtype, upstream):
    """Any upstream gradient per row, of one output or both: float64's, but for the rounding of what is stored."""
    logits, targets = logits_of(5, v, dtype)
    g, e = torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    g, e = None if upstream == "e" else g, None if upstream == "g" else e
    _, _, expected = exact(logits, targets, 0.7, g, e)
    statistics = folded(logits, targets, 0.7, v)
    memory = logits.data_ptr()
    to_gradient(logits, targets, statistics.lse(), statistics.entropy(), g, e, 0.7)
    assert logits.data_ptr() == memory
    assert (logits.double() - expected).abs().max() <= 1.5 * TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("width", [1, 3, 100])
def test_the_fold_by_the_definition(body, order, width):
    """Whether the largest logit comes first or last, with offsets of ±1000: max, Σ e^{z − max} and Σ e^{z − max}·(z − max)."""
    z = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).mul(5).sort(1).values
    z = ((z if order > 0 else z.flip(1)) + torch.tensor([0.0, 1000, -1000, 3, -3, 50])[:, None]).to(DEVICE)
    statistics = folded(z, torch.full((6,), 3, device=DEVICE), 1.0, width)
    shifted = z.double() - z.double().amax(1, keepdim=True)
    assert torch.allclose(statistics.top, z.amax(1), rtol=1e-6) and torch.allclose(statistics.target, z[:, 3], rtol=1e-6)
    # (in units of log2, as the kernel has them, 1000 has an error of 6e-5: what matters is the sum of both)
    assert torch.allclose(statistics.lse().double(), z.double().logsumexp(1), rtol=1e-6, atol=1e-5)
    assert torch.allclose(statistics.entropy().double(), -(shifted.softmax(1) * shifted.log_softmax(1)).sum(1), atol=2e-3)


def test_rows_of_any_stride(body):
    """Every second row of a wider matrix, and a transposed one, which is refused by the kernel."""
    wide, targets = logits_of(10, 300, torch.float32)
    rows = wide[::2, 20:270]
    targets = targets[::2].clamp(max=200)
    logps, entropies, expected = exact(rows, targets, 1.0, torch.ones(5, device=DEVICE), None)
    statistics, before = folded(rows, targets, 1.0, 250), wide.clone()
    assert (statistics.target - statistics.lse() - logps).abs().max() < 2e-5
    to_gradient(rows, targets, statistics.lse(), statistics.entropy(), torch.ones(5, device=DEVICE), None)
    assert (rows.double() - expected).abs().max() < 1e-6
    untouched = torch.ones_like(wide, dtype=torch.bool)
    untouched[::2, 20:270] = False
    assert torch.equal(wide[untouched], before[untouched])  # nothing was written beside the rows
    if body == "triton":
        with pytest.raises(AssertionError, match="side by side"):
            folded(torch.zeros(4, 6, device=DEVICE).T, torch.zeros(6, dtype=torch.long, device=DEVICE), 1.0, 4)


def test_targets_of_any_stride(body):
    """One column of a table of targets."""
    logits, targets = logits_of(5, 300, torch.float32)
    table = torch.stack([targets, torch.zeros_like(targets)], dim=1)
    statistics = folded(logits, table[:, 0], 1.0, 300)
    assert (statistics.target - statistics.lse() - exact(logits, targets, 1.0)[0]).abs().max() < 2e-5


def test_no_rows_at_all(body):
    logits, targets = torch.zeros(0, 9, device=DEVICE), torch.zeros(0, dtype=torch.long, device=DEVICE)
    statistics = folded(logits, targets, 1.0, 9)
    assert statistics.lse().shape == statistics.entropy().shape == (0,)


def test_from_hidden_states_the_bodies_agree(monkeypatch):
    """linear_logprob's slices through the kernels, log-prob and both gradients within 1e-6 of the torch body in float32."""
    pytest.importorskip("triton", reason="Triton is not installed")
    narrow(monkeypatch, 40, rows=4)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(logprob, "fused", lambda logits, fused=fused: fused)
        hidden, weight, targets = (x.detach().to(DEVICE) for x in problem(13, c=8, v=150, dtype=torch.float32))
        hidden.requires_grad_(), weight.requires_grad_()
        logps, entropies = LinearLogps.apply(hidden, weight, targets, 0.7, True)
        g, e = torch.randn(2, 13, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        ((g * logps).sum() + (e * entropies).sum()).backward()
        results.append((logps.detach(), entropies.detach(), hidden.grad, weight.grad))
    for torch_body, triton_body in zip(*results, strict=True):
        assert (torch_body - triton_body).abs().max() <= 2e-6 * torch_body.abs().max().clamp(min=1)


AHEAD = r"""
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minialign.kernels import logprob_triton as kernels

def compiled(kernel, types, constants, warps, arch):
    names, types = kernel.arg_names, {**types, **{name: "constexpr" for name in constants}}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name][0] == "*" or name in ("stride", "width")}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})

tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
numbers = dict(places="*i64", stride="i32", width="i32", scale="fp32")
for arch in (80, 90):
    for dtype in ("bf16", "fp32"):
        folded = {"logits": "*" + dtype, **numbers, **{name: "*fp32" for name in ("top_p", "total_p", "weighted_p", "target_p")}}
        graded = {"logits": "*" + dtype, **numbers, "inv_tau": "fp32", **{name: "*fp32" for name in ("lse", "entropies", "g", "e")}}
        jobs = {
            "fold": compiled(kernels.fold_kernel, folded, dict(ENTROPY=True, BLOCK=kernels.FOLD_BLOCK), kernels.FOLD_WARPS, arch),
            "gradient": compiled(kernels.gradient_kernel, graded, dict(HAS_G=True, HAS_E=True, BLOCK=kernels.GRADIENT_BLOCK),
                                 kernels.GRADIENT_WARPS, arch),
        }
        for name, binary in jobs.items():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(binary.asm["cubin"])
                file.flush()
                usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
            registers, stack = (int(re.search(key + r":(\d+)", usage).group(1)) for key in ("REG", "STACK"))
            print(f"sm_{arch} {dtype} {name}: {registers} registers, {stack} bytes of stack, wide loads {'v4.b32' in binary.asm['ptx']}, "
                  f"64-bit offsets {'mul.wide' in binary.asm['ptx'] or 's64' in binary.asm['ptx']}")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton is for Linux")
def test_compiled_ahead_of_time():
    """For sm_80 and sm_90: nothing spills to the stack, at most 64 registers (so 1024 threads fit a multiprocessor), loads of 16 bytes,
    row offsets of 64 bits."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", AHEAD], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    print(result.stdout)
    assert len(lines) == 8
    for line in lines:
        assert " 0 bytes of stack" in line and "wide loads True" in line and "64-bit offsets True" in line, line
        assert int(line.split(": ")[1].split()[0]) <= 64, line
