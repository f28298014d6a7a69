"""Logits in, three numbers per row out: log-prob of the target, entropy, log-sum-exp. Then the gradient, written over the logits.

    z_v = logit_v / tau     lse = log Σ_v e^{z_v}     logp = z_y − lse     p_v = e^{z_v − lse}     S = −Σ_v p_v log p_v
    dlogit_v = (g (1[v = y] − p_v) − e p_v (log p_v + S)) / tau      for upstream gradients g of logp and e of S, one each per row

The naive implementation, and the bytes that each line moves per logit (bfloat16 logits, float32 in between):

    wide = logits.float() / tau                             # read 2, write 4, read 4, write 4
    log_p = wide.log_softmax(-1)                            # read 4, write 4 (and once more to find the max)
    logps = log_p.gather(1, targets[:, None])               # nothing: one number per row
    entropies = -(log_p.exp() * log_p).sum(-1)              # read 4, write 4, read 8, write 4, read 4
                                                            # about 50; backward moves as much again; three (N, V) float32 tensors alive

`update_statistics` reads each logit once; `to_gradient` reads and writes it once, in place: 2 and 4 bytes in bfloat16. At 4.3 TB/s,
V = 128256 and N = 8192 rows that is .49 and .98 ms. Memory is the bottleneck (some ten flops per byte), so one pass and wide loads matter.
One pass is enough because max, sum and weighted sum are running values, rescaled when the max changes (online softmax: Milakov and
Gimelshein 2018, arXiv:1805.02867). They may continue from another slice of the vocabulary, as in linear_logprob.py.

Both functions have two bodies: torch, which is the specification and runs on a CPU, and Triton for a GPU.

Checked by tests/kernels/test_logprob.py: both bodies by the definition and against float64, Triton's under its interpreter. Triton's also
compile ahead of time for sm_80 and sm_90 and use no byte of stack.
"""

import functools
from dataclasses import dataclass

import torch

BLOCK_ROWS = {"cpu": 128}  # a CPU takes this many rows at a time, so that its temporaries stay in cache; elsewhere all at once


@dataclass
class Statistics:
    """Statistics of each row over the logits seen so far, as z = logit / tau. All are (N,), float32 or wider."""
    top: torch.Tensor  # max z
    total: torch.Tensor  # Σ e^{z − top}
    weighted: torch.Tensor  # Σ e^{z − top}·(z − top)
    target: torch.Tensor  # z of the target, once it has been seen

    @classmethod
    def empty(cls, n, dtype, device):
        zeros = functools.partial(torch.zeros, n, dtype=dtype, device=device)
        return cls(torch.full((n,), -torch.inf, dtype=dtype, device=device), zeros(), zeros(), zeros())

    def lse(self):
        return self.top + self.total.log()

    def entropy(self):
        """S = lse − Σ p z = log total − weighted / total. This form subtracts no large numbers."""
        return self.total.log() - self.weighted / self.total


def fused(logits):
    """Whether to use the Triton bodies: on CUDA with Triton installed, but not for float64, because they compute in float32."""
    return logits.is_cuda and logits.dtype != torch.float64 and kernels() is not None


@functools.cache
def kernels():
    """The module of the Triton bodies, or None if Triton is not installed. Imported on first use, because the import takes a second."""
    try:
        from minialign.kernels import logprob_triton
    except ImportError:  # macOS, Windows
        return None
    return logprob_triton


def update_statistics(logits, places, statistics, tau=1.0, *, entropy=True):
    """Add logits (N, W), W any slice of the vocabulary, to the Statistics, in place. places (N,): column of each target in the slice.

    When the max rises by δ, every z − top falls by δ: weighted becomes (weighted − δ·total)·e^{−δ}, and total becomes total·e^{−δ}.
    A place outside 0 … W − 1 means that the target is not in this slice. Without entropy, `weighted` does not change.
    """
    if fused(logits):
        return kernels().update_statistics(logits, places, statistics, tau, entropy)
    within = (0 <= places) & (places < logits.shape[1])
    found = logits.gather(1, torch.where(within, places, 0)[:, None])[:, 0].to(statistics.top.dtype) / tau
    statistics.target.copy_(torch.where(within, found, statistics.target))
    for rows in blocks(len(logits), logits.device):
        z = logits[rows].to(statistics.top.dtype)
        z = z if tau == 1.0 else z / tau
        top, total, weighted = statistics.top[rows], statistics.total[rows], statistics.weighted[rows]
        highest = torch.maximum(top, z.amax(1))
        if entropy:
            weighted.sub_(torch.where(total > 0, (highest - top) * total, 0)).mul_((top - highest).exp())  # (no −∞·0 in the first slice)
        total.mul_((top - highest).exp())
        top.copy_(highest)
        shifted = z - top[:, None]
        p = shifted.exp()
        total += p.sum(1)
        if entropy:
            weighted += p.mul_(shifted).sum(1)


def to_gradient(logits, places, lse, entropies, g, e, tau=1.0):
    """Overwrite logits (N, W) with d loss / d logit. g, e (N,): upstream gradients of log-prob and entropy; one may be None."""
    if fused(logits):
        return kernels().to_gradient(logits, places, lse, entropies, g, e, tau)
    within = ((0 <= places) & (places < logits.shape[1])).nonzero()[:, 0]
    for rows in blocks(len(logits), logits.device):
        z = logits[rows].to(lse.dtype)
        log_p = (z if tau == 1.0 else z.div_(tau)).sub_(lse[rows, None])
        if e is None:
            d = log_p.exp_().mul_(-g[rows, None])
        else:
            p = log_p.exp()
            d = log_p.add_(entropies[rows, None]).mul_(e[rows, None])
            d = (d if g is None else d.add_(g[rows, None])).mul_(p.neg_())  # −p (g + e (log p + S))
        logits[rows] = d if tau == 1.0 else d.div_(tau)
    if g is not None:
        logits[within, places[within]] += (g[within] / tau).to(logits.dtype)


def blocks(n, device):
    size = BLOCK_ROWS.get(device.type, n) or 1
    return [slice(start, start + size) for start in range(0, n, size)]
