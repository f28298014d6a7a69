"""Sampling: greedy, temperature, top-k, top-p; batched generation with a ragged KV cache.

The batch is ragged, not left-padded: each row continues at its own position. One prefill serves all n samples of a prompt, and
finished rows leave the batch. What comes back is a Rollout in the layout of training, so its rows go straight into a loss.

Every row draws from its own generator, seeded by (seed, the prompt's ids, which sample of that prompt it is): the same seed gives the
same completion whatever else sits in the batch.

`old_logps` are those of the tempered but UNtruncated softmax, the one whose ratio to the trained policy is exactly 1: log-probs
renormalised after top-k or top-p would start training with a ratio below 1 (the kept mass). Truncate for display, not for RL.

Checked by tests/test_sample.py: chi-square on an enumerable model, invariance to the batch, equality with token_logps.
"""

import torch

from minialign.batch import Rollout, collate
from minialign.common import BadInput, derive_seed
from minialign.model import KVCache

# Each rule takes logits (B, V) and forbids tokens by −inf. They compose: temperature first, then top-k, then top-p.


def keep_top_k(logits, k):
    """Keep the k likeliest tokens of each row (more if several tie for the k-th place)."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits, p):
    """Keep the smallest set of likeliest tokens whose probability reaches p (nucleus; Holtzman et al. 2019, arXiv:1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # the mass of all likelier tokens; the likeliest has 0 and always stays
    return logits.masked_fill((before >= p).scatter(1, order, before >= p), -torch.inf)


def draw(logits, uniform):
    """One token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) in [0, 1) -> (B,)."""
    cumulative = logits.softmax(-1).cumsum(-1)  # (B, V)
    point = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).squeeze(1)  # a forbidden token has no width, so it is never hit
    last = cumulative.argmax(-1)  # the last token with mass: where rounding could push a point beyond the end
    return torch.minimum(token, last)


@torch.no_grad()
def sample(policy, prompts_ids, *, max_new, tau=1.0, top_k=None, top_p=None, n=1, eos_id, seed, greedy=False):
    """n completions of each of N prompts -> Rollout with B = N·n rows, the n of one prompt adjacent.

    prompts_ids: N non-empty lists of ids. max_new: most tokens of a completion. tau: temperature. top_k, top_p: None is off.
    eos_id: the token that ends a completion and is kept in it; None never stops. greedy takes the likeliest token.
    Ids from config.n_tokens on (padding rows of the vocabulary) are never sampled. The policy's mode and gradients are untouched.
    Raises BadInput for arguments out of range, and when prompt and max_new do not fit the model's context.
    """
    config, device = policy.config, policy.head_weight.device
    check_arguments(config, prompts_ids, max_new, tau, top_k, top_p, n)
    rows = [tuple(prompt) for prompt in prompts_ids for _ in range(n)]  # B prompts
    distinct = list(dict.fromkeys(rows))
    source = torch.tensor([distinct.index(row) for row in rows], device=device)  # (B,) which prefill a row continues

    count, uniforms = dict.fromkeys(distinct, 0), torch.zeros(len(rows), max_new, dtype=torch.float64)
    for b, row in enumerate(rows):
        generator = torch.Generator().manual_seed(derive_seed(seed, row, count[row]))
        uniforms[b] = torch.rand(max_new, generator=generator, dtype=torch.float64)  # drawn ahead: no schedule can change them
        count[row] += 1
    wide = torch.promote_types(policy.head_weight.dtype, torch.float32)  # logits rounded to bfloat16 would not equal token_logps
    uniforms, head = uniforms.to(device, wide), policy.head_weight.to(wide)  # (B, max_new), (V, C)

    # Prefill: each distinct prompt once, right-padded; its last real position holds the first prediction.
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in distinct], device=device)
    cache = KVCache(config, len(distinct), longest + max_new, device=device, dtype=policy.head_weight.dtype)
    hidden = policy.hidden(padded, cache=cache, lengths=lengths)  # (distinct, longest, C)
    hidden = hidden[torch.arange(len(distinct), device=device), lengths - 1][source]  # (B, C)
    cache = cache.select(source)

    alive = torch.arange(len(rows), device=device)  # (A,) the rows still in the batch
    tokens = torch.zeros(len(rows), max_new, dtype=torch.long, device=device)
    token_logps = torch.zeros(len(rows), max_new, dtype=wide, device=device)
    new_lengths = torch.full((len(rows),), max_new, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = hidden.to(wide) @ head.T / tau  # (A, V)
        allowed = logits
        if config.n_tokens is not None and config.n_tokens < config.vocab_size:
            allowed = allowed.clone()
            allowed[:, config.n_tokens :] = -torch.inf
        if greedy:
            token = allowed.argmax(-1)  # (A,)
        else:
            allowed = allowed if top_k is None else keep_top_k(allowed, top_k)
            allowed = allowed if top_p is None or top_p == 1 else keep_top_p(allowed, top_p)
            token = draw(allowed, uniforms[alive, t])
        tokens[alive, t] = token
        token_logps[alive, t] = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(-1)

        if eos_id is not None:
            ended = token == eos_id  # (A,)
            finished[alive[ended]], new_lengths[alive[ended]] = True, t + 1
            if ended.any():
                staying = (~ended).nonzero().squeeze(1)
                alive, token, cache = alive[staying], token[staying], cache.select(staying)
        if not len(alive) or t + 1 == max_new:
            break
        hidden = policy.hidden(token[:, None], cache=cache)[:, -1]  # (A, C)

    completions = [ids[:length] for ids, length in zip(tokens.tolist(), new_lengths.tolist(), strict=True)]
    batch = collate(rows, completions, pad_id=0 if eos_id is None else eos_id).to(device)
    real = torch.arange(max_new, device=device) < new_lengths[:, None]  # (B, max_new)
    old_logps = torch.zeros(batch.mask.shape, dtype=wide, device=device)
    old_logps = old_logps.masked_scatter(batch.mask, token_logps[real])  # both run row by row, in order
    return Rollout(batch.inputs, batch.targets, batch.mask, old_logps, new_lengths, finished, completions)


def check_arguments(config, prompts_ids, max_new, tau, top_k, top_p, n):
    if not len(prompts_ids) or not all(len(prompt) for prompt in prompts_ids):
        raise BadInput("sample needs at least one prompt, and at least one token in each (BOS or EOS)")
    if max_new < 1 or n < 1:
        raise BadInput(f"max_new={max_new} and n={n} must be at least 1")
    if not tau > 0:
        raise BadInput(f"the temperature tau={tau} must be above 0; for the likeliest token use greedy")
    if top_k is not None and top_k < 1:
        raise BadInput(f"top_k={top_k} must be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"top_p={top_p} must lie in (0, 1], or be None for no limit")
    longest = max(len(prompt) for prompt in prompts_ids)
    if longest + max_new - 1 > config.max_len:  # the last token sampled is never fed back
        raise BadInput(f"a prompt of {longest} tokens and max_new={max_new} exceed the model's context of {config.max_len}")
    lowest, highest = min(min(prompt) for prompt in prompts_ids), max(max(prompt) for prompt in prompts_ids)
    if lowest < 0 or highest >= config.vocab_size:
        worst = lowest if lowest < 0 else highest
        raise BadInput(f"a prompt holds the id {worst}, but the model has {config.vocab_size} embedding rows: wrong tokenizer?")
