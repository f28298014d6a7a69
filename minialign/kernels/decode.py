"""Runs the model on one more token of every row, on a CPU: GPT.hidden with a cache for T = 1, in as few operations as possible.

Two things limit the speed of a small model: the number of operations, 5 to 20 µs each, and products of a few rows with matrices that are
stored as (out, in). So this file, and only this file, does the following:

    the matrices of a layer are copied as (in, out) for one call of `sample`. Multiplying 16 rows then takes 0.5 to 0.7 of the time if the
        matrix fits in the processor's cache (and the same time if it does not)
    matrices with the same input are merged into one: queries, keys and values; gate and up. Adapters are merged too
    the rotation of each row is a (D, D) matrix, computed once for all layers: one product rotates queries and keys
    attention is written out as scores, softmax and weighted sum, each for all H/KV queries that share a key at once. With one query per
        row this is faster than PyTorch's attention kernel, which is made for sequences
    while all rows have the same length and no layer has a window, there is no mask, and new keys are written to a slice, not by index

A step of 16 rows takes 0.57 of GPT.hidden's time with 128 channels, 0.68 with 256, and 0.87 with 512, where most of the time goes into
reading the weights. The copy takes as long as one or two steps.

Checked by tests/kernels/test_decode.py against GPT.hidden: every family, ragged rows, windows, adapters.
"""

import functools

import torch

from minialign.model import rotary_angles, rotate


class Decoder:
    """Tokens (A,) that continue the rows of a cache -> hidden states (A, C)."""

    def __init__(self, policy, cache):
        config, (capacity, D), dtype = policy.config, cache.keys.shape[3:], cache.keys.dtype
        self.policy = policy
        if config.positions == "rotary":
            tables = rotary_angles(config, torch.arange(capacity)[None])  # (1, 1, capacity, rotary_dim/2) each
            self.cos, self.sin = (table[0, 0].to(dtype) for table in tables)
            self.unturned = torch.eye(D, dtype=dtype)
        self.continue_from(cache)

    @functools.cached_property
    def layers(self):
        """The copies are made at the first step. There may be no step at all, because every row may end with its first token."""
        return [Layer(block) for block in self.policy.blocks]

    def continue_from(self, cache):
        self.cache, self.rows = cache, torch.arange(len(cache.lengths))
        self.even = bool((cache.lengths == cache.longest).all()) and not any(self.policy.config.windows)

    def select(self, rows):
        """Continue with these rows only."""
        self.continue_from(self.cache.select(rows))
        return self

    def __call__(self, tokens):
        config, cache, at, span = self.policy.config, self.cache, self.cache.lengths, self.cache.longest + 1
        H, KV, D, A = config.n_head, config.n_kv_head, config.head_dim, len(tokens)
        x = self.policy.tok_embed(tokens)  # (A, C)
        if config.positions == "learned":
            x = x + self.policy.pos_embed(at)
        else:
            cos, sin = self.cos[at][:, None, None], self.sin[at][:, None, None]  # (A, 1, 1, rotary_dim/2)
            turn = rotate(self.unturned.expand(A, 1, D, D), cos, sin).squeeze(1)  # (A, D, D): the rotated unit vectors
        masks = dict.fromkeys(config.windows)  # None where no mask is needed, else (A·KV, H/KV, S)
        if not self.even:
            for window in masks:
                mask = self.policy.mask(at[:, None], span, window, False, x.dtype)  # (A, 1, H/KV, S)
                masks[window] = mask.expand(-1, KV, -1, -1).flatten(0, 1)

        for layer, window, keys, values in zip(self.layers, config.windows, cache.keys, cache.values, strict=True):
            heads = layer.qkv(layer.norm1(x)).view(A, H + 2 * KV, D)
            qk, v = heads[:, : H + KV], heads[:, H + KV :]
            if layer.q_norm is not None:
                qk = torch.cat([layer.q_norm(qk[:, :H]), layer.k_norm(qk[:, H:])], dim=1)
            if config.positions == "rotary":
                qk = torch.bmm(qk, turn)
            if self.even:
                keys[:, :, span - 1], values[:, :, span - 1] = qk[:, H:], v
            else:
                keys[self.rows, :, at], values[self.rows, :, at] = qk[:, H:], v
            q, k, v = (qk[:, :H] * D**-0.5).view(A * KV, H // KV, D), keys.flatten(0, 1)[:, :span], values.flatten(0, 1)[:, :span]
            scores = torch.bmm(q, k.transpose(1, 2))  # (A·KV, H/KV, S)
            scores = scores if masks[window] is None else scores + masks[window]
            y = torch.bmm(scores.softmax(-1), v).view(A, H * D)
            after = x + layer.o(y)
            x = after + layer.mlp(layer.norm2(x if config.parallel_residual else after))
        cache.lengths += 1
        cache.longest += 1
        return self.policy.norm(x)


class Layer:
    """A block with copies of its matrices. Those with the same input are merged into one."""

    def __init__(self, block):
        attn, mlp = block.attn, block.mlp
        self.norm1, self.norm2, self.q_norm, self.k_norm = block.norm1, block.norm2, attn.q_norm, attn.k_norm
        self.qkv, self.o, self.down = side_by_side(attn.q, attn.k, attn.v), side_by_side(attn.o), side_by_side(mlp.down)
        self.gated, self.activation = mlp.gate is not None, mlp.activation
        self.up = side_by_side(mlp.gate, mlp.up) if self.gated else side_by_side(mlp.up)

    def mlp(self, x):
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        return self.down(self.activation(self.up(x)))


def side_by_side(*linears):
    """Returns a function x (A, in) -> (A, out): the outputs of the given linear layers, side by side. Either all have a bias or none."""
    weights = [linear.merged_weight() if hasattr(linear, "merged_weight") else linear.weight for linear in linears]  # (lora.LoRALinear)
    weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).T.contiguous()  # (in, out)
    if linears[0].bias is None:
        return lambda x: x @ weight
    bias = torch.cat([linear.bias for linear in linears])
    return lambda x: torch.addmm(bias, x, weight)
