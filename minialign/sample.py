"""Sampling: greedy, temperature, top-k, top-p; batched generation with a ragged KV cache.

The batch is ragged, not left-padded: each row continues at its own position. One prefill serves all n samples of a prompt. Finished rows
are removed once they are a quarter of the batch. The result is a Rollout in the layout of training: its rows go straight into a loss.

Every row has its own random generator, seeded by (seed, the prompt's ids, the sample's index among those of its prompt). So the same seed
gives the same completion in any batch.

`old_logps` are log-probs of the tempered but UNtruncated softmax. With them, the ratio π/π_old starts at exactly 1.
With log-probs renormalised after top-k or top-p it would start below 1, at the probability that was kept. Truncate for display, not for RL.

Checked by tests/test_sample.py: chi-square on an enumerable model, invariance to the batch, equality with token_logps.
"""

import functools
from types import SimpleNamespace

import torch

from minialign.batch import Rollout, collate, to_device
from minialign.engine import parallel, tracking
from minialign.engine.common import BadInput, derive_seed, in_micro, note
from minialign.kernels.decode import Decoder
from minialign.kernels.linear_logprob import logits_of
from minialign.logps import token_logps
from minialign.model import KVCache

# Each rule takes logits (B, V) and sets those of forbidden tokens to −inf. Temperature comes first, then top-k, then top-p.


def keep_top_k(logits, k):
    """Keep the k most likely tokens of each row (more if several tie for the k-th place)."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits, p):
    """Keep the smallest set of most likely tokens whose probability reaches p (nucleus; Holtzman et al. 2019, arXiv:1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    before = running_sums(probs) - probs  # total probability of all more likely tokens; 0 for the most likely one, which always stays
    return logits.masked_fill((before >= p).scatter(1, order, before >= p), -torch.inf)


def draw_tokens(probs, uniform):
    """Draw one token per row by inverting the cumulative distribution: probs (B, V) with any sum, uniform (B,) in [0, 1) -> (B,)."""
    cumulative = running_sums(probs)  # (B, V)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None].to(total) * total, total.nextafter(torch.zeros_like(total)))  # (u · total may round up to total)
    token = torch.searchsorted(cumulative, point, right=True).squeeze(1)  # a forbidden token has probability 0, so it is never hit
    return token.clamp_(max=probs.shape[-1] - 1)  # (NaN would give V)


def running_sums(probs):
    """cumsum(-1), also with --deterministic. Torch then refuses it on CUDA, because there it adds a single row up in no fixed order."""
    if not torch.are_deterministic_algorithms_enabled() or not probs.is_cuda:
        return probs.cumsum(-1)
    torch.use_deterministic_algorithms(False)
    try:
        return torch.cat([probs, probs[:1]]).cumsum(-1)[: len(probs)]  # of several rows each is added up by a loop over its blocks
    finally:
        torch.use_deterministic_algorithms(True)


@torch.no_grad()
def sample(policy, prompts_ids, *, max_new, tau=1.0, top_k=None, top_p=None, n=1, eos_id, seed, greedy=False):
    """Sample n completions of each of N prompts -> Rollout with B = N·n rows; the n of one prompt are adjacent.

    prompts_ids: N non-empty lists of ids. max_new: maximum tokens of a completion. tau: temperature. top_k, top_p: None means off.
    eos_id: the token that ends a completion and is kept in it, beside those in config.eos_ids; with None, no token ends one.
    seed: any value, or a list with one for each prompt. greedy: take the most likely token.
    Ids from config.n_tokens on (padding rows of the vocabulary) are never sampled. The policy's mode and gradients do not change.
    Under torchrun each process samples its share of the rows, and every process gets all of them. On a GPU they are drawn in passes of as
    many rows as its memory holds (most_rows), so any number may be asked for.
    Raises BadInput for arguments out of range, and when prompt and max_new do not fit the model's context.
    """
    check_arguments(policy.config, prompts_ids, max_new, tau, top_k, top_p, n)
    device, wide = policy.head_weight.device, torch.promote_types(policy.head_weight.dtype, torch.float32)
    rows = [tuple(prompt) for prompt in prompts_ids for _ in range(n)]  # B prompts
    seeds = [one for one in (seed if isinstance(seed, list) else [seed] * len(prompts_ids)) for _ in range(n)]
    count, uniforms = {}, torch.zeros(len(rows), max_new, dtype=torch.float64)
    for b, own in enumerate(zip(seeds, rows, strict=True)):
        generator = torch.Generator().manual_seed(derive_seed(*own, count.setdefault(own, 0)))
        uniforms[b] = torch.rand(max_new, generator=generator, dtype=torch.float64)  # drawn in advance: batching cannot change them
        count[own] += 1

    policy, own = parallel.full_copy(policy), parallel.local_rows(rows)
    drawn = [torch.zeros(0, max_new, dtype=torch.long), torch.zeros(0, max_new, dtype=wide), torch.zeros(0).long(), torch.zeros(0).bool()]
    if own:
        # inference_mode also skips version counters and view tracking, which saves a twentieth of a small model's time on a CPU.
        with torch.inference_mode() if device.type == "cpu" else torch.no_grad():
            how = dict(tau=tau, top_k=top_k, top_p=top_p, eos_id=eos_id, greedy=greedy)
            drawn = in_passes(policy, own, parallel.local_rows(uniforms), most_rows(policy, max(map(len, own)) + max_new), how)
        tracking.count(policy, sum(map(len, set(own))) + drawn[2].sum(), of_step=True)  # each prompt is read once, whatever n is
    drawn = [parallel.gather_rows(part.to(device).clone()) for part in drawn]  # cloned: inference_mode tensors cannot be saved for backward
    tokens, token_logps, lengths, finished = drawn

    completions = [ids[:length] for ids, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    batch = collate(rows, completions, pad_id=0 if eos_id is None else eos_id).to(device)
    real = torch.arange(max_new, device=device) < lengths[:, None]  # (B, max_new)
    old_logps = torch.zeros(batch.mask.shape, dtype=wide, device=device)
    old_logps = old_logps.masked_scatter(batch.mask, token_logps[real])  # both are in row order
    return Rollout(batch.inputs, batch.targets, batch.mask, old_logps, lengths, finished, completions, sizes=batch.sizes)


@torch.no_grad()
def rollout(policy, ref, prompts_ids, cfg, *, n=1, eos_id, seed):
    """What an online method trains on: a Rollout of n completions of each prompt by the current policy, with ref's log-probs of them.

    cfg: the method's Config, with max_new, tau and micro_batch. old_logps and ref_logps are at temperature tau and have no gradient.
    """
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=n, eos_id=eos_id, seed=seed)
    answers.old_logps = comparable_logps(policy, answers, cfg.tau, cfg.micro_batch)
    answers.ref_logps = in_micro(lambda micro: token_logps(ref, micro, tau=cfg.tau), answers, cfg.micro_batch)  # (B, T)
    return answers


def comparable_logps(policy, answers, tau, micro_batch):
    """The policy's log-probs of its answers, (B, T), to subtract those of another model's training pass from.

    In bfloat16 the sampler's differ from those of a training pass by rounding, which summed over a completion would be a KL of up to some
    nats between equal models. So there they come from a training pass too.
    """
    if not rounds_coarsely(policy):
        return answers.old_logps
    return in_micro(lambda micro: token_logps(policy, micro, tau=tau), answers, micro_batch)


def most_rows(policy, positions):
    """How many rows of `positions` tokens a process samples in one pass: on a GPU as many as fit into a quarter of its memory, else any
    number (None). Counted are the cache, a second one of the rows that stay when finished ones are removed, and the logits."""
    device = policy.head_weight.device
    if device.type != "cuda":
        return None
    return rows_that_fit(policy.config, positions, policy.head_weight.element_size(), torch.cuda.get_device_properties(device).total_memory)


def rows_that_fit(config, positions, element_size, memory):
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * element_size  # bytes of a position
    return max(1, int(memory / 4 / (1.75 * cache * positions + 16 * config.vocab_size)))


def drawn_with(k, policy, rows, cfg, *, n=1):
    """The steps whose answers are drawn together with those of step k: neighbours in its round, in which the policy that answers stays the
    same; on a GPU as many as its memory holds, on a CPU step k alone.

    rows: encoded rows, whose first part is the prompt. cfg: a Config with steps, rounds, batch_size and max_new. n: answers to a prompt.
    Which steps these are depends on the round, not on where a run was resumed, so a resumed run samples the same batches.
    """
    # (cards may differ)
    most = min(parallel.gather(most_rows(policy, max(len(row[0]) for row in getattr(rows, "known", rows)) + cfg.max_new) or 0))
    together = max(1, most * parallel.world() // (cfg.batch_size * n)) if most else 1
    steps = [j for j in range(cfg.steps) if j * cfg.rounds // cfg.steps == k * cfg.rounds // cfg.steps]
    start = (k - steps[0]) // together * together
    return steps[start : start + together]


def in_passes(policy, rows, uniforms, most, how):
    """generate() in passes of at most `most` rows of similar length; None is one pass. A pass that a GPU has no memory for is halved."""
    most = min(most or len(rows), len(rows))
    order = [*range(len(rows))] if most == len(rows) else sorted(range(len(rows)), key=lambda b: -len(rows[b]))
    parts, start = [], 0
    while start < len(rows):
        picked = order[start : start + most]
        try:
            parts.append(generate(policy, [rows[b] for b in picked], uniforms[picked], **how))
            start += most
        except torch.cuda.OutOfMemoryError:
            if most == 1:
                raise
            most = -(-most // 2)
            note(f"note: the GPU has no memory to sample {len(picked)} rows at once; {most} are sampled at once")
    drawn = [torch.cat(part) for part in zip(*parts, strict=True)]
    return drawn if len(parts) == 1 else [part[torch.tensor(order).argsort().to(part.device)] for part in drawn]


def rounds_coarsely(policy):
    """True if the policy computes in bfloat16, or in float32 with TF32 products (on CUDA). A sharded policy may hold wider weights."""
    weight = parallel.PLAIN.get(policy, policy).head_weight
    tf32 = policy.head_weight.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and tf32)


def generate(policy, rows, uniforms, *, tau, top_k, top_p, eos_id, greedy):
    """B prompts, one row each, and the uniform numbers (B, max_new) that decide the draws -> tokens (B, max_new), their log-probs
    (B, max_new), lengths (B,) (how many of them belong to the completion), and finished (B,) (whether EOS is among them)."""
    config, device, (B, max_new) = policy.config, policy.head_weight.device, uniforms.shape
    distinct = {row: i for i, row in enumerate(dict.fromkeys(rows))}  # each prompt and its number
    source = to_device(torch.tensor([distinct[row] for row in rows]), device)  # (B,) which prefill a row continues
    wide = torch.promote_types(policy.head_weight.dtype, torch.float32)  # bfloat16 logits would give log-probs that differ from token_logps
    uniforms = to_device(uniforms.to(wide), device)
    ends = None if eos_id is None else to_device(torch.tensor(sorted({eos_id, *config.eos_ids})), device)
    pure = not greedy and top_k is None and top_p in (None, 1) and config.n_tokens in (None, config.vocab_size)  # nothing is forbidden
    head = policy.head_weight if policy.head_weight.is_cuda else policy.head_weight.to(wide)  # (V, C)

    # Prefill: run each distinct prompt once, right-padded. Its last real position predicts the first new token.
    lengths = to_device(torch.tensor([len(prompt) for prompt in distinct]), device)
    longest = max(map(len, distinct))
    padded = to_device(torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in distinct]), device)
    cache = KVCache(config, len(distinct), longest + max_new, device=device, dtype=policy.head_weight.dtype)
    hidden = policy.hidden(padded, cache=cache, lengths=lengths)  # (distinct, longest, C)
    hidden = hidden[torch.arange(len(distinct), device=device), lengths - 1][source]  # (B, C)
    cache = cache if len(distinct) == B else cache.select(source)  # (no prompt appears twice: rows are already in order)
    step = stepper(policy, cache)
    del cache  # now only `step` holds it, so it is freed when rows are removed

    present = torch.arange(B, device=device)  # (A,) the rows still in the batch
    tokens = torch.zeros(B, max_new, dtype=torch.long, device=device)
    token_logps = torch.zeros(B, max_new, dtype=wide, device=device)
    new_lengths = torch.full((B,), max_new, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    sound = torch.ones((), dtype=torch.bool, device=device)  # all logits so far were finite
    every = 8 if device.type == "cuda" else 1  # tokens between two questions to the device, because a GPU has to be waited for
    for t in range(max_new):
        logits = logits_of(hidden, head)  # (A, V)
        logits = logits if tau == 1 else logits / tau
        sound = sound & logits.sum().isfinite()
        if pure:
            probs = logits.softmax(-1)  # (A, V), for the draw and the log-prob
            token = draw_tokens(probs, uniforms[present, t])  # (A,)
            logps = probs.gather(1, token[:, None]).log()
        else:
            allowed = logits[:, : config.n_tokens]
            allowed = allowed if top_k is None else keep_top_k(allowed, top_k)
            allowed = allowed if top_p in (None, 1) else keep_top_p(allowed, top_p)
            token = allowed.argmax(-1) if greedy else draw_tokens(allowed.softmax(-1), uniforms[present, t])
            logps = logits.gather(1, token[:, None]) - logits.logsumexp(-1, keepdim=True)
        tokens[present, t], token_logps[present, t] = token, logps.squeeze(1)
        if eos_id is not None:
            ended = torch.isin(token, ends) & ~finished[present]  # (A,)
            new_lengths[present] = torch.where(ended, t + 1, new_lengths[present])
            finished[present] = finished[present] | ended
        if (t + 1) % every == 0 or t + 1 == max_new:
            stopped = finished[present]  # (A,) they sample on, and what they sample is ignored
            going, finite = torch.stack([(~stopped).sum(), sound.long()]).tolist()
            if not finite:
                bad = next((name for name, p in policy.named_parameters() if not p.isfinite().all()), "no weight")
                raise BadInput(f"the policy cannot be sampled: its logits are not finite ({bad} holds NaN or inf)")
            if not going or t + 1 == max_new:
                break
            if going <= 3 / 4 * len(present):  # remove finished rows together: each removal copies the cache
                stay = stopped.long().argsort(stable=True)[:going]  # (nonzero() would make the host wait)
                present, token, step = present[stay], token[stay], step.select(stay)
        hidden = step(token)  # (A, C)
    return tokens, token_logps, new_lengths, finished


def stepper(policy, cache):
    """Returns a function: tokens (A,) that continue the rows of a cache -> hidden states (A, C). It is the Decoder on a CPU, in float32 or
    float64, with up to 512 channels; otherwise Step. In wider models nearly all time goes into reading the weights, and the Decoder's copy
    of them would be a second model in memory. In bfloat16 only PyTorch's attention kernel, which Step uses, sums in float32."""
    weight = policy.head_weight
    quick = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64) and policy.config.n_embd <= 512
    return (Decoder if quick else Step)(policy, cache)


class Step:
    """Runs the model as it is. On CUDA the hidden states that it returns are overwritten by its next call.

    On CUDA a step is recorded as a graph and replayed: one launch instead of about thirty per layer. These launches take most of a step's
    time while the batch is small. A recording is valid for one span of the cache, so one is made at 64 positions, 128, 256, and so on.
    """

    def __init__(self, policy, cache):
        self.policy, self.cache, self.span = policy, cache, None

    def select(self, rows):
        return Step(self.policy, self.cache.select(rows))

    def __call__(self, token):
        if not token.is_cuda:
            return self.policy.hidden(token[:, None], cache=self.cache)[:, -1]
        span = self.cache.span(self.cache.longest + 1)
        if span != self.span:
            self.span = span
            self.record(token)
        self.token.copy_(token[:, None])
        self.graph.replay()
        self.cache.longest += 1
        return self.hidden

    def record(self, token):
        self.token, self.graph, shared = token[:, None].clone(), torch.cuda.CUDAGraph(), recordings()
        lengths, longest = self.cache.lengths.clone(), self.cache.longest
        shared.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(shared.stream):
            self.policy.hidden(self.token, cache=self.cache)  # run once unrecorded: libraries set themselves up in their first call
            self.cache.lengths.copy_(lengths)
            self.cache.longest = longest
            # The context manager torch.cuda.graph would wait for the GPU and give back all of torch's spare memory, at every recording.
            # thread_local: other threads (NCCL's watchdog) may go on calling CUDA.
            self.graph.capture_begin(pool=shared.last and shared.last.pool(), capture_error_mode="thread_local")
            try:
                self.hidden = self.policy.hidden(self.token, cache=self.cache)[:, -1]  # records, does not run
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(shared.stream)
        self.cache.longest, shared.last = longest, self.graph


@functools.cache
def recordings():
    """What all recordings share: one stream, because cuBLAS keeps a workspace (32 MiB on Hopper) for every stream that it was ever used on,
    and the last recording, whose memory the next one reuses. Only the newest one is ever replayed."""
    return SimpleNamespace(stream=torch.cuda.Stream(), last=None)


def check_arguments(config, prompts_ids, max_new, tau, top_k, top_p, n):
    if not len(prompts_ids) or not all(len(prompt) for prompt in prompts_ids):
        raise BadInput("sample needs at least one prompt, and at least one token in each (BOS or EOS)")
    if max_new < 1 or n < 1:
        raise BadInput(f"max_new={max_new} and n={n} must be at least 1")
    if not tau > 0:
        raise BadInput(f"the temperature tau={tau} must be above 0; for the most likely token use greedy")
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
