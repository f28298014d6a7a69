"""logprob.py's update_statistics and to_gradient for a GPU, in Triton: one pass, one exp2 per logit.

The running statistics are scalars. A vector with one number per lane would double the exponentials and make them the bottleneck. exp2 is
one instruction. Each logit is multiplied once, by log2(e)/tau, and the results are multiplied by ln 2 at the end. Row offsets are int64,
because row · stride passes 2^31 from 16384 rows of 131072 on.
"""

import math

import torch
import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
FOLD_BLOCK, FOLD_WARPS = 2048, 4  # 32 registers, 16-byte loads; a whole row in one block spills registers at V = 50304
GRADIENT_BLOCK, GRADIENT_WARPS = 4096, 8


@triton.jit
def fold_kernel(logits, places, top_p, total_p, weighted_p, target_p, stride, width, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(top_p + row) * LOG2E  # from earlier slices, in units of log2
    total = tl.load(total_p + row)
    weighted = tl.load(weighted_p + row) * LOG2E
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)  # int32 is enough within a row
        z = tl.load(logits + row * stride + column, mask=column < width, other=-float("inf"))
        z = z.to(tl.float32) * scale  # convert first: bfloat16 arithmetic would round
        highest = tl.maximum(top, tl.max(z, 0))
        shifted = z - highest
        p = tl.exp2(shifted)
        rescale = tl.exp2(top - highest)  # 0 as long as top is −∞
        if ENTROPY:
            moved = tl.where(total > 0, highest - top, 0.0) * total  # each z − top falls by highest − top
            weighted = (weighted - moved) * rescale + tl.sum(p * tl.where(p > 0, shifted, 0.0), 0)  # 0·−∞ counts as 0
        total = total * rescale + tl.sum(p, 0)
        top = highest
    tl.store(top_p + row, top * LN2)
    tl.store(total_p + row, total)
    if ENTROPY:
        tl.store(weighted_p + row, weighted * LN2)
    place = tl.load(places + row)
    if (place >= 0) & (place < width):
        tl.store(target_p + row, tl.load(logits + row * stride + place).to(tl.float32) * scale * LN2)


@triton.jit
def gradient_kernel(logits, places, lse, entropies, g, e, stride, width, scale, inv_tau,
                    HAS_G: tl.constexpr, HAS_E: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows on axis 0: the other axes allow only 65535 programs
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = logits + row * stride + column
    log2_p = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale - tl.load(lse + row) * LOG2E
    p = tl.exp2(log2_p)
    d = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_G:
        d += tl.load(g + row) * (tl.where(column == tl.load(places + row), 1.0, 0.0) - p)
    if HAS_E:
        d -= tl.load(e + row) * p * (log2_p * LN2 + tl.load(entropies + row))
    tl.store(at, (d * inv_tau).to(logits.dtype.element_ty), mask=inside)  # in place: no other program reads these columns


def update_statistics(logits, places, statistics, tau, entropy):
    assert logits.stride(1) == 1, "the logits of a row must lie side by side"
    if len(logits):
        fold_kernel[(len(logits),)](
            logits, places.contiguous(), statistics.top, statistics.total, statistics.weighted, statistics.target, logits.stride(0),
            logits.shape[1],
            LOG2E.value / tau, ENTROPY=entropy, BLOCK=FOLD_BLOCK, num_warps=FOLD_WARPS)


def to_gradient(logits, places, lse, entropies, g, e, tau):
    assert logits.stride(1) == 1, "the logits of a row must lie side by side"
    if len(logits):
        gradient_kernel[(len(logits), triton.cdiv(logits.shape[1], GRADIENT_BLOCK))](
            logits, places.contiguous(), lse, entropies, *(lse if x is None else x.to(torch.float32).contiguous() for x in (g, e)),
            logits.stride(0),
            logits.shape[1], LOG2E.value / tau, 1 / tau, HAS_G=g is not None, HAS_E=e is not None, BLOCK=GRADIENT_BLOCK,
            num_warps=GRADIENT_WARPS)
