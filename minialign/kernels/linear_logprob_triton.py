"""linear_logprob.py's forward pass for a GPU when no gradient is needed: hidden and head in, Statistics out, no logits in between.

The naive implementation, and the bytes it moves per logit in bfloat16, besides what the product reads:

    logits = hidden @ weight.T                              # write 2
    top, total, weighted = three sums over each row         # read 2, in one pass at best (logprob_triton.py)

Here a program computes one tile of the product, tokens x vocabulary. The tensor cores leave it in registers in float32, and the program
reduces it there. It writes three numbers per row of the tile, 12 bytes for every VOCAB logits, and a few lines of torch combine them. No
program waits and no two write to one place (no locks, no atomics), so the results are the same every time. It takes 2 N V C flops: the
product is the bottleneck. The reduction adds one exp2 per logit, 3 to 6 % of the product.

Checked by tests/kernels/test_linear_logprob.py: against float64 under Triton's interpreter, and compiled for sm_80 and sm_90.
"""

import math

import torch
import triton
import triton.language as tl

from minialign.kernels.logprob import Statistics

TOKENS, VOCAB, CHANNELS = 128, 128, 64  # size of a tile, and channels multiplied at a time. One tile per program: two would spill registers
WARPS, STAGES = 8, 3
GROUP = 8  # this many tiles of tokens with the same weights run together, so the weights are read from memory once, then from cache
PARTIAL_BYTES = 64 * 2**20  # for the tiles' three numbers; limits how many tokens are scored at a time


@triton.jit
def score_kernel(hidden, weight, targets, top_p, total_p, weighted_p, target_p, n, v, c, hidden_stride, weight_stride, scale,
                 ENTROPY: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, VOCAB: tl.constexpr, CHANNELS: tl.constexpr,
                 GROUP: tl.constexpr):
    down, across = tl.cdiv(n, TOKENS), tl.cdiv(v, VOCAB)
    group = tl.program_id(0) // (GROUP * across)  # GROUP rows of tiles, walked column by column
    height = tl.minimum(down - group * GROUP, GROUP)  # the last group may have fewer rows
    within = tl.program_id(0) % (GROUP * across)
    tile_n, tile_v = group * GROUP + within % height, within // height

    row = tile_n * TOKENS + tl.arange(0, TOKENS)
    column = tile_v * VOCAB + tl.arange(0, VOCAB)
    channel = tl.arange(0, CHANNELS)
    # Rows and columns beyond the end read the last ones instead, so that loads need no mask for them. Their results are left out below.
    hidden_at = hidden + tl.minimum(row, n - 1).to(tl.int64)[:, None] * hidden_stride + channel[None, :]
    weight_at = weight + tl.minimum(column, v - 1).to(tl.int64)[None, :] * weight_stride + channel[:, None]
    z = tl.zeros([TOKENS, VOCAB], dtype=tl.float32)
    for start in range(0, c, CHANNELS):
        inside = channel < c - start
        h = tl.load(hidden_at, mask=inside[None, :], other=0.0)  # (TOKENS, CHANNELS)
        w = tl.load(weight_at, mask=inside[:, None], other=0.0)  # (CHANNELS, VOCAB)
        if WIDE:  # float32 inputs, and the interpreter, which cannot multiply bfloat16
            z = tl.dot(h.to(tl.float32), w.to(tl.float32), z, input_precision="ieee")
        else:
            z = tl.dot(h, w, z)
        hidden_at += CHANNELS
        weight_at += CHANNELS

    z = tl.where(column[None, :] < v, z * scale, -float("inf"))  # scale is log2(e)/tau: from here on in units of log2
    top = tl.max(z, 1)  # (TOKENS,)
    shifted = z - top[:, None]
    p = tl.exp2(shifted)
    out = tile_v.to(tl.int64) * n + row
    tl.store(top_p + out, top, mask=row < n)
    tl.store(total_p + out, tl.sum(p, 1), mask=row < n)
    if ENTROPY:
        tl.store(weighted_p + out, tl.sum(p * tl.where(p > 0, shifted, 0.0), 1), mask=row < n)  # 0·−∞ counts as 0
    target = tl.load(targets + row, mask=row < n, other=-1)
    hit = column[None, :] == target[:, None]
    mine = (target >= tile_v * VOCAB) & (target < tile_v * VOCAB + VOCAB)  # True in the one tile with this row's target
    tl.store(target_p + row, tl.sum(tl.where(hit, z, 0.0), 1), mask=(row < n) & mine)


def fused_statistics(hidden, weight, targets, tau, entropy):
    """hidden (N, C), weight (V, C), targets (N,) -> Statistics of the N rows of hidden @ weight.T / tau."""
    assert hidden.stride(1) == weight.stride(1) == 1, "the channels of a row must lie side by side"
    tiles = triton.cdiv(len(weight), VOCAB)
    size = max(TOKENS, PARTIAL_BYTES // (12 * tiles) // TOKENS * TOKENS)
    parts = [score_some(h, y, weight, tau, entropy) for h, y in zip(hidden.split(size), targets.contiguous().split(size), strict=True)]
    return Statistics(*(torch.cat(numbers) for numbers in zip(*parts, strict=True)))


def score_some(hidden, targets, weight, tau, entropy):
    (n, c), v = hidden.shape, len(weight)
    tiles = triton.cdiv(v, VOCAB)
    tops, totals, weighted = torch.empty(3, tiles, n, dtype=torch.float32, device=hidden.device)  # (tiles, N) each
    target = torch.zeros(n, dtype=torch.float32, device=hidden.device)
    if n:
        score_kernel[(triton.cdiv(n, TOKENS) * tiles,)](
            hidden, weight, targets, tops, totals, weighted, target, n, v, c, hidden.stride(0), weight.stride(0), math.log2(math.e) / tau,
            ENTROPY=entropy, WIDE=wide(hidden), TOKENS=TOKENS, VOCAB=VOCAB, CHANNELS=CHANNELS, GROUP=GROUP, num_warps=WARPS,
            num_stages=STAGES)
    top = tops.amax(0)  # (N,)
    rescale = torch.exp2(tops - top)  # (tiles, N)
    total = (totals * rescale).sum(0)
    # The terms z − top of a tile are relative to the tile's own max. Relative to the row's max they are lower by the difference.
    moved = ((weighted + (tops - top) * totals) * rescale).sum(0) if entropy else torch.zeros_like(top)
    ln2 = math.log(2)
    return top * ln2, total, moved * ln2, target * ln2


def wide(hidden):
    return hidden.dtype == torch.float32 or not hidden.is_cuda
