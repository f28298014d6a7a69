"""Best-of-n, and fine-tuning on the winners (BoN-SFT, RAFT). Stiennon et al. 2020, arXiv:2009.01325; Dong et al. 2023, arXiv:2304.06767,
Algorithm 1; the KL bound as in Nakano et al. 2021 and Beirami et al. 2024, arXiv:2401.01879.

    L(θ) = −E_x[ log π_θ(y*|x) ],          y* = argmax_i r(x, y_i),  y_1 … y_n ~ π_t(·|x)

Symbols  (→ name in the code) π_t: the policy at the start of the round → old; ref: the policy at the start of the first round;
         y*: the best completion → winners; log π_θ(y*|x): the sum of logps (B, T).
Idea     Sample n completions and keep the one with the best reward. This is the simplest use of a reward: no gradient goes through it. Then
         train on the winners by maximum likelihood, so that one sample of the new policy is like the best of n of the old one.
Differs  from sft.py: the demonstrations are the policy's own best answers. From rloo.py: all answers but the winner are dropped, and only
         the number of rounds limits how far the policy moves from a reference.
Details  If rewards are equal, the first sample wins (a fair draw). missing_eos is subtracted from r if max_new cut the completion off.
         rounds=1 always samples from the initial policy. rounds=T samples in each round from the policy at its start. Every round
         sharpens the policy further: in the end only the best completions are left, whatever they look like.
         Samples are drawn at temperature tau, but the likelihood is at temperature 1. So the law holds with the tempered policy as ref.
Law      After one round, reward r has probability F(r)^n − F_−(r)^n, where ref samples a reward of at most r with probability F(r) and
         one below r with F_−(r). Completions of equal reward share it in proportion to ref (toy/closed_form.py, best_of_n_law).
         KL(law‖ref) is about log n − (n − 1)/n if no two rewards are equal and no completion is likely, and less otherwise (kl_bound).
Checked  tests/methods/test_best_of_n.py (enumeration, sampling, bound, expected maximum), toy/tiny_language.py (the law).

    python -m minialign best_of_n                                            # built-in task, laptop CPU
    python -m minialign best_of_n --n 16 --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import collate, masked_mean
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer
from minialign.engine.run import Run
from minialign.evaluate import held_out_reward
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import rollout_stats
from minialign.sample import drawn_with, sample
from minialign.settings import OnPrompts


@dataclass
class Config(OnPrompts):
    n: int = 8                      # completions sampled for each prompt; the one with the best reward is the winner
    rounds: int = 1                 # T: number of rounds; each samples from the policy at its start, the first from the initial policy
    batch_size: int = 16            # winners per step, one of each prompt
    tau: float = 1.0                # sampling temperature
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 5e-7)
    schedule: str = "cosine"
    warmup: float = 0.1


def best_of_n_loss(logps, mask):
    """Mean over the winners of −log π(y*): logps, mask (B, T). Returns the scalar loss, stats."""
    assert logps.dim() == 2 and logps.shape == mask.shape, (logps.shape, mask.shape)
    loss = -torch.where(mask.bool(), logps, 0).sum(1).mean()
    return loss, {"nll": -masked_mean(logps, mask).detach()}


def pick(rewards):
    """rewards (N, n), one row per prompt -> (N,) the index of the largest reward in each row (the first if several are equal)."""
    return rewards.argmax(-1)


def kl_bound(n):
    """log n − (n − 1)/n, in nats: an upper bound of KL(best of n‖ref), approached when no two rewards are equal and no completion is
    likely. Use it to choose n: n = 2 costs at most .19 nats, 8 at most 1.20, 32 at most 2.50. (The KL is also at most
    −log P(the largest reward), a bound that a pass-or-fail reward soon reaches.)"""
    return math.log(n) - (n - 1) / n


def expected_max(rewards, n):
    """Unbiased estimate, a float, of the expected best of n, from the rewards (N,) of N ≥ n independent samples.

    It is the mean of the maximum over all subsets of n. The i-th smallest reward is the maximum of C(i − 1, n − 1) of the C(N, n)
    subsets. For 0 1 2 3 and n = 2: (1·1 + 2·2 + 3·3)/6 = 2.333.
    """
    ordered, N = sorted(float(reward) for reward in rewards), len(rewards)
    if not 1 <= n <= N:
        raise BadInput(f"expected_max needs at least n={n} rewards, found {N}")
    return sum(math.comb(i - 1, n - 1) / math.comb(N, n) * reward for i, reward in enumerate(ordered, start=1))


def step(policy, winners, cfg):
    """Evaluate the policy on one batch of winners and compute the loss. Only this function connects policy and equation."""
    return best_of_n_loss(token_logps(policy, winners), winners.mask)


def draw_together(old, k, rows, cfg, eos_id):
    """{step: a Rollout of n answers of π_t to each of its prompts} of step k and of the steps that are drawn with it."""
    steps, B = drawn_with(k, old, rows, cfg, n=cfg.n), cfg.batch_size
    prompts_ids = [rows[i][0] for j in steps for i in batch_rows(len(rows), B, j, cfg.seed)]
    seeds = [derive_seed("best_of_n", cfg.seed, j) for j in steps for _ in range(B)]
    answers = sample(old, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=cfg.n, eos_id=eos_id, seed=seeds)
    return {j: answers[b * B * cfg.n : (b + 1) * B * cfg.n] for b, j in enumerate(steps)}


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("best_of_n", cfg)
    cfg = run.cfg
    if cfg.rounds > cfg.steps:
        raise BadInput(f"--rounds {cfg.rounds}: there are only {cfg.steps} steps to divide into rounds")
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    old = frozen_copy(policy)  # π_t: the policy at the start of the round
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, old=old, optimizer=optimizer)
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": old})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    drawn = {}  # {step: answers} of the steps that were drawn together
    for k in run.steps(cfg.steps):
        t, t_before = k * cfg.rounds // cfg.steps, (k - 1) * cfg.rounds // cfg.steps
        if t != t_before:  # a round begins
            old.load_state_dict(policy.state_dict())

        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        if k not in drawn:
            drawn = draw_together(old, k, rows, cfg, tokenizer.eos_id)
        answers = drawn[k]
        rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B·n,)
        if rewards is None:
            continue
        rewards = rewards.view(-1, cfg.n)  # (B, n)
        best = pick(rewards)  # (B,)
        completions = [answers.completions[b * cfg.n + i] for b, i in enumerate(best.tolist())]
        winners = collate(prompts_ids, completions, pad_id=tokenizer.pad_id).to(run.device)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        for micro in winners.micro_batches(cfg.micro_batch):
            loss, micro_stats = step(policy, micro, cfg)
            share = len(micro) / len(winners)  # the loss is a mean over winners: a micro-batch is weighted by its number of winners
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add(micro_stats, weight=micro.mask.sum())  # means over tokens
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()

        metrics = rollout_stats(rewards.flatten(), answers, group_size=cfg.n)
        metrics |= {"reward/best": rewards.amax(1).mean(), "round": t, "loss": total, "grad_norm": grad_norm}
        metrics |= {"lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
