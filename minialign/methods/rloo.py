"""REINFORCE leave-one-out (RLOO). Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740; the clip as in TRL.

What this deletes from PPO, as the paper does, and why:
    1. the critic and its advantage estimation. The other completions of the prompt give an unbiased baseline without any training.
    2. tokens as actions. The reward judges the whole completion, so the completion is the action and has one ratio and one advantage.
    3. several updates on one rollout. With epochs = 1, the default, the ratio is exactly 1 and the clip never acts.

    L(θ) = −E[ min( ρ·A, clip(ρ, 1 − ε, 1 + ε)·A ) ],     A_i = R_i − (1/(G−1)) Σ_{j≠i} R_j,     R = r − β·log π_θ/π_ref

Symbols  G → group_size completions of one prompt, A → advantages (B,), ρ = π_θ(y|x)/π_old(y|x) of whole completions → ratio (B,).
Idea     Sample several answers to a prompt. Compare the reward of each with the mean reward of the others: an answer above it becomes
         more likely, one below it less likely. That mean does not depend on the answer, so the gradient stays unbiased.
Differs  from reinforce.py: the baseline is for this prompt and the current policy, not from earlier steps. From grpo.py: it leaves out
         the sample itself, nothing is divided by a standard deviation, the KL is in the reward, and the ratio is of the sequence.
Details  A_i = G/(G−1)·(R_i − mean of the group). The advantages of a group sum to 0. G must be at least 2.
         With epochs = 1 the old log-probs are those of the same forward pass, and this is plain REINFORCE. With more epochs the same
         completions are used again, and the clip limits how far the policy moves on them.
         R is treated as a constant. Its KL estimator k1 is summed over tokens, not averaged, as in reinforce.py.
Law      π* ∝ ref·e^{r/β}, the maximiser of E_π[r] − β·KL(π‖ref). At π* the reward R is equal for all completions of a prompt, so the
         advantages are 0 and the gradient has no noise.
Checked  tests/methods/test_rloo.py (all pairs enumerated, hand numbers, clip), toy/tiny_language.py (the law).

    python -m minialign rloo                                                 # built-in task, laptop CPU
    python -m minialign rloo --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import masked_mean
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer
from minialign.engine.run import Run
from minialign.evaluate import held_out_reward
from minialign.kl import kl_rewards, moved
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import rollout_stats
from minialign.sample import rollout
from minialign.settings import OnPrompts


@dataclass
class Config(OnPrompts):
    beta: float = 0.05              # β: the pull to ref; 0 lets the policy go anywhere
    eps: float = 0.2                # ε: how far the ratio may move in the updates on one rollout; matters with epochs > 1
    group_size: int = 4             # G: completions of each prompt
    epochs: int = 1                 # updates on the same completions


def leave_one_out(rewards, *, group_size):
    """rewards: (B,), the G of one prompt adjacent -> advantages (B,): each reward minus the mean of the others of its group.

    A group with equal rewards gives exactly 0. (Adam would turn a rounding error into a step of full size.)
    """
    assert rewards.dim() == 1 and group_size >= 2 and len(rewards) % group_size == 0, (rewards.shape, group_size)
    groups = rewards.view(-1, group_size)  # (N, G)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)  # (N, G)
    return torch.where((groups == groups[:, :1]).all(1, keepdim=True), 0, groups - others).flatten()


def rloo_loss(logps, old_logps, advantages, mask, *, eps):
    """logps, old_logps, mask: (B, T); advantages: (B,), constants. Returns the scalar loss, stats."""
    assert logps.dim() == 2 and logps.shape == old_logps.shape == mask.shape and advantages.shape == logps.shape[:1]
    logratio = torch.where(mask.bool(), logps - old_logps.detach(), 0).sum(1)  # (B,) one completion is one action
    logratio = logratio.clamp(max=80)  # e^89 is inf in float32, and then the clip's gradient would be 0·inf = NaN
    ratio, advantages = logratio.exp(), advantages.detach()  # (B,)
    clipped = ratio.clamp(1 - eps, 1 + eps)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)  # (B,)
    stats = {"ratio": ratio.mean(), "clip_ratio/region_mean": (clipped * advantages < ratio * advantages).float().mean()}
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(policy, answers, cfg, *, on_policy):
    """Compute the loss of one batch of completions. Only this function connects policy and equation.

    on_policy: no update since sampling, so the old log-probs are set to those of this forward pass and the ratio is exactly 1.
    """
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    if on_policy:
        answers.old_logps.copy_(logps.detach())
    loss, stats = rloo_loss(logps, answers.old_logps, answers.advantages, answers.mask, eps=cfg.eps)
    assert not (on_policy and moved(logps, answers.old_logps)), "the policy that samples is not the one that is trained"
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("rloo", cfg)
    cfg = run.cfg
    if cfg.group_size < 2:
        raise BadInput("--group_size 1: the baseline is the mean of the other completions, so there must be at least 2")
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    ref = frozen_copy(policy)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer)
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": ref})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size // cfg.group_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        seed = derive_seed("rloo", cfg.seed, k)
        answers = rollout(policy, ref, prompts_ids, cfg, n=cfg.group_size, eos_id=tokenizer.eos_id, seed=seed)
        rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B,)
        if rewards is None:
            continue
        metrics = rollout_stats(rewards, answers, group_size=cfg.group_size)
        rewards = kl_rewards(rewards, answers.old_logps, answers.ref_logps, beta=cfg.beta)
        answers.advantages = leave_one_out(rewards, group_size=cfg.group_size)  # (B,)
        micros = answers.micro_batches(cfg.micro_batch)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        total, stats = 0.0, Mean()
        for epoch in range(cfg.epochs):
            optimizer.zero_grad()
            losses = []
            for micro in micros:
                loss, micro_stats = step(policy, micro, cfg, on_policy=epoch == 0)
                share = len(micro) / len(answers)  # the loss is a mean over completions: a micro-batch is weighted by its number of them
                loss = loss * share
                loss.backward()
                losses.append(loss.detach())
                stats.add({"entropy": micro_stats.pop("entropy")}, weight=micro.mask.sum())  # a mean over tokens
                stats.add(micro_stats, weight=share)
            epoch_total = run.sum(losses)
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            total += epoch_total / cfg.epochs
            if not run.may_update(k, policy, picked, epoch_total, grad_norm):
                break  # the other epochs of this rollout would fail in the same way
            optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
