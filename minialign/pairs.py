"""The loop of the six methods that train a policy on pairs: dpo, ipo, slic, gpo, simpo, orpo. They differ only in Config, loss and step.

The pairs come from the file of --pairs. With --online (Guo et al. 2024, arXiv:2402.04792) only their prompts are used: at every step the
current policy samples two answers to each prompt, and a reward labels them. With the Bradley-Terry probability σ(r₁ − r₂) the first
answer is the chosen one, otherwise the second. The answers are data: no gradient flows through the sampling.

With --precompute_ref the log-probs of the reference are computed once, before step 1, and stored in the run folder; then no second model
is kept in memory. The reference is the policy before training, so the policy itself computes them, before its first update.

Checked by tests/test_pairs.py, tests/test_precompute_ref.py and tests/test_preference_runs.py.
"""

import functools

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.data import (
    Rows,
    encode_pairs,
    encode_prompts,
    long_pairs,
    pair_batch,
    pick,
    read_preferences,
    split_held_out,
    split_scorable,
)
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, eval_rows, in_micro, lr_at, micro_batches, set_lr
from minialign.engine.look import first_look
from minialign.engine.opening import (
    batches_of,
    check_context,
    encoded_once,
    long_or_encoded,
    open_optimizer,
    open_policy,
    open_rewards,
    open_second_demos,
)
from minialign.engine.run import Run
from minialign.evaluate import held_out_pairs
from minialign.logps import Remembered, seq_logps
from minialign.lora import frozen_copy
from minialign.sample import sample
from minialign.task import builtin_pairs


def train(method, cfg, step):
    """Run the method named `method` and return the run folder. step is the method's own: step(policy, ref, pairs, cfg) -> (loss, stats)."""
    run = Run(method, cfg)
    cfg = run.cfg
    policy, tokenizer = open_policy(run)
    rows, held_out, batch_of, prompts = open_pairs(run, tokenizer)
    answer = answer_online(run, policy, tokenizer, prompts) if cfg.online else None
    check_rounds(method, cfg)
    targets_of = open_targets(run, tokenizer) if getattr(cfg, "demos", "") else None
    ref = frozen_reference(policy, cfg)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer, **({"ref": ref} if cfg.rounds > 1 else {}))
    first_look(run, tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), {"policy": policy, "ref": ref})
    if precomputes(cfg):
        ref = remember_pairs(run, policy, rows, held_out, batch_of)
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_pairs(lambda pairs: step(policy, ref, pairs, cfg), held_out, batch_of, cfg))

    for k in run.steps(cfg.steps):
        if k and k * cfg.rounds // cfg.steps != (k - 1) * cfg.rounds // cfg.steps:  # a round begins
            ref.load_state_dict(policy.state_dict())
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        batch, metrics = answer(k, picked) if cfg.online else ([rows[i] for i in picked], {})
        if batch is None:  # online, and the reward failed
            continue
        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        for micro in micro_batches(range(len(batch)), batch, cfg):
            pairs = batch_of(batch, micro)
            if targets_of:
                pairs.target = targets_of(k, micro)
            loss, micro_stats = step(policy, ref, pairs, cfg)
            share = len(micro) / len(batch)  # the loss is a mean over pairs: a micro-batch is weighted by its number of pairs
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add(micro_stats, weight=share)
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)


def open_pairs(run, tokenizer):
    """(rows to train on, held-out rows, batch_of, prompts) of --pairs. A row is (prompt ids, chosen ids, rejected ids).

    batch_of(rows, picked) -> Pairs of the picked rows, on the run's device. prompts: with --online [(prompt ids, prompt as it is in the
    file)] of all pairs, else none.
    """
    cfg = run.cfg
    run.same_input("data", cfg.pairs)

    @functools.cache
    def read():
        pairs = builtin_pairs() if cfg.pairs == "builtin" else read_preferences(cfg.pairs, skip_bad=cfg.skip_bad)
        rows = encode_pairs(tokenizer, pairs, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad)  # with skip_bad, drops bad ones from pairs
        return rows, pairs

    def encode_prompts_of_pairs():
        return encode_prompts(tokenizer, [pair.prompt for pair in read()[1]], max_prompt=cfg.max_prompt)

    if getattr(cfg, "online", False):
        rows, prompts = encoded_once(lambda: read()[0], parts=3), encoded_once(encode_prompts_of_pairs, parts=1)
    else:
        rows, prompts = long_or_encoded(run, long_pairs, cfg.pairs, tokenizer, lambda: read()[0], parts=3), []
    rows, held_out = split_scorable(rows, cfg.held_out, cfg.max_len)
    return rows, held_out, batches_of(run, tokenizer, pair_batch), prompts


def open_targets(run, tokenizer):
    """The function (k, micro) -> Batch: of the rows of --demos that belong to step k, as many as pairs, those at the places `micro`."""
    cfg, batch_of = run.cfg, batches_of(run, tokenizer)
    rows, _ = split_scorable(open_second_demos(run, tokenizer, "demos"), 0.0, cfg.max_len)

    def targets_of(k, micro):
        picked = batch_rows(len(rows), cfg.batch_size, k, derive_seed("targets", cfg.seed))
        return batch_of(rows, [picked[i] for i in micro])

    return targets_of


def answer_online(run, policy, tokenizer, prompts):
    """With --online: the function (k, picked) -> (new pairs of step k, metrics). Both are None if the reward failed: skip the step."""
    cfg = run.cfg
    if precomputes(cfg):
        raise BadInput("--precompute_ref: --online samples new answers at every step; drop one of the two")
    reward_fn = open_rewards(run)
    prompts = split_held_out(prompts, cfg.held_out)[0]
    prompts = pick(prompts, [i for i, row in enumerate(prompts) if len(row[0]) < cfg.max_len])  # the same rows as split_scorable
    check_context(run, policy, prompts, max_len=cfg.max_len)

    def answer(k, picked):
        prompts_ids, asked = zip(*[prompts[i] for i in picked], strict=True)
        seed = derive_seed(run.method, cfg.seed, k)
        answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=2, eos_id=tokenizer.eos_id, seed=seed)
        rewards = run.ask(k, reward_fn, tokenizer, asked, answers)  # (2·B,)
        if rewards is None:
            return None, None
        return label_by_reward(prompts_ids, answers.completions, rewards, seed), {"reward": rewards.mean()}

    return answer


def label_by_reward(prompts_ids, completions, rewards, seed):
    """B prompts and their 2·B answers, two of each prompt adjacent; rewards (2·B,) -> [(prompt ids, chosen ids, rejected ids)]."""
    first = torch.sigmoid(rewards[::2] - rewards[1::2]).cpu()  # (B,) probability that the first answer is the chosen one
    chosen = torch.rand(len(first), generator=torch.Generator().manual_seed(seed)) >= first  # (B,) False: the first, True: the second
    both = zip(completions[::2], completions[1::2], strict=True)
    return [(x, pair[c], pair[1 - c]) for x, pair, c in zip(prompts_ids, both, chosen.int().tolist(), strict=True)]


def check_rounds(method, cfg):
    """Refuse --rounds where there is no reference to renew, or not enough steps."""
    if cfg.rounds > 1 and not hasattr(cfg, "beta"):
        raise BadInput(f"--rounds {cfg.rounds}: {method} has no reference that a round could renew; dpo, ipo and gpo have one")
    if cfg.rounds > 1 and precomputes(cfg):
        raise BadInput("--precompute_ref: with --rounds the reference changes; drop one of the two")
    if cfg.rounds > cfg.steps:
        raise BadInput(f"--rounds {cfg.rounds}: there are only {cfg.steps} steps to divide into rounds")


def precomputes(cfg):
    return getattr(cfg, "precompute_ref", False)


def frozen_reference(policy, cfg):
    """A frozen copy of the policy as it is now. None if the loss has no β, because then it has no reference, and with --precompute_ref."""
    return frozen_copy(policy) if hasattr(cfg, "beta") and not precomputes(cfg) else None


def remember_pairs(run, policy, rows, held_out, batch_of):
    """The reference as a Remembered model: the policy's log-probs, before step 1, of all pairs that the run will use."""
    cfg = run.cfg
    used = {i for k in range(cfg.steps) for i in batch_rows(len(rows), cfg.batch_size, k, cfg.seed)}
    rows = pick(rows, sorted(used))
    rows = rows + held_out if isinstance(rows, Rows) else [*rows, *held_out]

    def logps_of(micro):
        pairs = batch_of(rows, micro)
        return torch.stack([seq_logps(policy, pairs.chosen), seq_logps(policy, pairs.rejected)], 1)  # (b, 2)

    def compute():
        print(f"computing the reference's log-probs of {len(rows):,} pairs", flush=True)
        return in_micro(logps_of, range(len(rows)), eval_rows(cfg), rows).tolist()  # (rows, 2)

    stored, ref = run.compute_or_read("ref_logps.json", 0, compute), Remembered()
    logps = torch.tensor(stored, dtype=torch.promote_types(run.dtype, torch.float32))  # (rows, 2)
    for start in range(0, len(rows), cfg.batch_size):
        pairs = batch_of(rows, range(start, min(start + cfg.batch_size, len(rows))))
        for i, side in enumerate((pairs.chosen, pairs.rejected)):
            ref.learn(side, logps[start : start + cfg.batch_size, i])
    return ref
