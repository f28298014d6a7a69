"""Slices of the vocabulary: kept and made again alike, targets at their edges, what they hold in memory. (Values: test_logps.py.)"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minialign.kernels import linear_logprob
from minialign.kernels.linear_logprob import LinearLogps, slices
from tests.test_logps import narrow, problem


@pytest.mark.parametrize(("n", "v"), [(1, 11), (1, 50257), (100, 50304), (2048, 50304), (100_000, 32000), (0, 5)])
def test_slices_are_a_partition_of_the_vocabulary(n, v):
    """In order, no gap, no overlap; all but the last equally wide, a multiple of 128; of n rows about SLICE_BYTES, or 256 wide."""
    parts = slices(n, v, torch.device("cpu"))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(v))
    widths = {part.stop - part.start for part in parts[:-1]}
    assert len(widths) <= 1 and all(width % 128 == 0 for width in widths)
    assert all(4 * n * width <= max(linear_logprob.SLICE_BYTES["cpu"], 4 * n * 256) for width in widths)


def gradients(keep_bytes, times=1, **changes):
    hidden, weight, targets = problem(13, v=50, **changes)
    logps, entropy = LinearLogps.apply(hidden, weight, targets, 0.7, True, keep_bytes)
    g, e = torch.randn(2, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(times):
        hidden.grad = weight.grad = None
        ((g * logps).sum() + (e * entropy).sum()).backward(retain_graph=True)
    return logps, entropy, hidden.grad, weight.grad


def test_kept_partly_kept_and_recomputed_slices_give_the_same_gradients(monkeypatch):
    """Slices of 8 columns of 13 rows in float64 have 832 bytes: none, two, or all of the seven are kept. A second backward through the same
    graph has nothing kept any more, and must give the same."""
    narrow(monkeypatch, 8, rows=4)
    made = []
    monkeypatch.setattr(linear_logprob, "logits_of", lambda *args, real=linear_logprob.logits_of: made.append(1) or real(*args))
    expected, counts = gradients(0), []
    for keep_bytes, times in ((0, 1), (2 * 832, 1), (10**6, 1), (10**6, 2), (2 * 832, 3)):
        made.clear()
        for a, b in zip(expected, gradients(keep_bytes, times), strict=True):
            assert torch.equal(a, b)
        counts.append(len(made))
    assert counts == [14, 12, 7, 14, 26]  # products with the head: seven slices, forward and backward, less what was kept


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 49])
def test_targets_at_the_edges_of_slices(monkeypatch, at):
    narrow(monkeypatch, 8)
    hidden, weight, _ = problem(3, v=50)
    logps, _ = LinearLogps.apply(hidden, weight, torch.tensor([at, at, at]), 1.0, False, 0)
    assert torch.allclose(logps, (hidden @ weight.T).log_softmax(1)[:, at], atol=1e-12)


def test_log_probs_are_never_above_zero(monkeypatch):
    """A target that takes almost all: its logit and the log-sum-exp come from the same numbers, so their difference is at most 0."""
    narrow(monkeypatch, 8)
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50)
    logps, _ = LinearLogps.apply(40 * weight, weight, targets, 1.0, False, 0)
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
        logps, entropy = LinearLogps.apply(hidden, weight, targets, 1.0, True, 0)
        (logps.sum() + entropy.sum()).backward()
    assert seen.most == 4 * 40 * 256 < 4 * 4096 * 16 and weight.grad.dtype == torch.bfloat16


def test_the_gradient_of_bfloat16_inputs_is_as_good_as_one_rounding(monkeypatch):
    """Against float64 on the same numbers: within half a unit of the last place of bfloat16, 2^-8 of the largest entry's size or better."""
    narrow(monkeypatch, 64)
    hidden, weight, targets = problem(60, c=32, v=500, dtype=torch.bfloat16)
    g = torch.randn(60, generator=torch.Generator().manual_seed(1))
    (LinearLogps.apply(hidden, weight, targets, 1.0, False, 0)[0] * g).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logps = (exact[0] @ exact[1].T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (logps * g.double()).sum().backward()
    for found, expected in zip((hidden.grad, weight.grad), (x.grad for x in exact), strict=True):
        error = (found.double() - expected).abs()
        assert (error <= 2.0**-8 * expected.abs() + 1e-6).all(), np.asarray(error.max())
