"""REINFORCE with a baseline. Williams 1992; for completions as single actions: Ahmadian et al. 2024, arXiv:2402.14740.

What this deletes from the papers, and why:
    1. rewards and discounts at every token. The reward comes once, at the end, so the whole completion is one action.
    2. a learned baseline. The mean of earlier rewards costs nothing; rloo.py and ppo.py have better ones.
    3. old policies. Each rollout gets one update, so the policy that sampled is the policy that is trained: no ratio and no clip.

    L(θ) = −E_{x~D, y~π_θ(·|x)} [ sg(R − b) · log π_θ(y|x) ],        R = r(x, y) − β·log π_θ(y|x)/π_ref(y|x)

Symbols  r → rewards (B,), R: r minus the KL penalty (also rewards), b → baseline, R − b → advantages (B,), log π_θ(y|x) = Σ_t logps (B,
         T), sg: stop-gradient → detach.
Idea     Sample an answer and make it more likely in proportion to its reward: ∇E_π[R] = E_π[R·∇log π]. Subtracting a constant b from R
         does not change this expectation, but it can remove most of the variance.
Differs  from sft.py: the policy's own completions, weighted by their rewards, instead of demonstrations. rloo.py takes b from the other
         samples of the prompt, grpo.py from all (and divides by their standard deviation), ppo.py from a learned value per prefix.
Details  Log-probs are summed over the completion. Averaging them (1/|y|) gives another gradient, which is biased. It has the same fixed
         point only if b is each prompt's own mean reward, which the single b of this file is not.
         R is treated as a constant. The KL estimator k1 in it, log π/π_ref, is not differentiated, because E[R·∇log π] already contains
         the gradient of the KL (since E[∇log π] = 0). Differentiating R inside R·log π would change the law to ∝ √(ref·e^{r/β}).
         b is the running mean of earlier R, with Adam's correction for starting at 0. It never contains the current batch: a mean that
         contains it would shrink the gradient by (B − 1)/B.
         missing_eos is subtracted from r if max_new cut the completion off.
         All log-probs are at the sampling temperature: ref's logits are divided by tau too, and the law is that of the tempered policy.
Law      π* ∝ ref·e^{r/β}, the maximiser of E_π[r] − β·KL(π‖ref). With β = 0: only the completion with the largest reward.
Checked  tests/methods/test_reinforce.py (the gradient by enumeration, any baseline), toy/tiny_language.py (the law).

    python -m minialign reinforce                                            # built-in task, laptop CPU
    python -m minialign reinforce --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
    python -m minialign reinforce --reward rewards.py:politeness             # any function (prompts, completions) -> numbers
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minialign.batch import masked_mean
from minialign.engine.common import Mean, batch_rows, derive_seed, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer
from minialign.engine.run import Run
from minialign.evaluate import held_out_reward
from minialign.kl import kl_rewards
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import rollout_stats
from minialign.sample import rollout
from minialign.settings import OnPrompts


@dataclass
class Config(OnPrompts):
    beta: float = 0.05              # β: the pull to ref; 0 lets the policy go anywhere
    decay: float = 0.9              # decay of the baseline, a running mean of rewards: 0 = the mean of the last batch, 1 = no baseline
    batch_size: int = 64            # completions per step, one of each prompt


def reinforce_loss(logps, advantages, mask):
    """logps, mask: (B, T); advantages: (B,), constants. Returns the scalar loss, whose value means nothing, and empty stats."""
    assert logps.dim() == 2 and logps.shape == mask.shape and advantages.shape == logps.shape[:1], (logps.shape, advantages.shape)
    seq_logps = torch.where(mask.bool(), logps, 0).sum(1)  # (B,)
    return -(advantages.detach() * seq_logps).mean(), {}


class Baseline(nn.Module):
    """The running mean of past rewards. It is a module, so that checkpoints contain it."""

    def __init__(self, decay):
        super().__init__()
        self.decay = decay
        self.sums = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)  # decayed Σ reward, decayed Σ 1

    @property
    def value(self):
        """The running mean. Before the first batch it is 0."""
        return float(self.sums[0] / self.sums[1]) if self.sums[1] else 0.0

    def update(self, rewards):
        self.sums.mul_(self.decay).add_(torch.tensor([float(rewards.mean()), 1.0], dtype=torch.float64) * (1 - self.decay))


def step(policy, answers, cfg):
    """Compute the loss of one batch of completions (a Rollout with advantages). Only this function connects policy and equation."""
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    loss, stats = reinforce_loss(logps, answers.advantages, answers.mask)
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("reinforce", cfg)
    cfg = run.cfg
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    ref = frozen_copy(policy)
    baseline = Baseline(cfg.decay)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, baseline=baseline, optimizer=optimizer)
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": ref})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        answers = rollout(policy, ref, prompts_ids, cfg, eos_id=tokenizer.eos_id, seed=derive_seed("reinforce", cfg.seed, k))
        rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B,)
        if rewards is None:
            continue
        metrics = rollout_stats(rewards, answers)
        rewards = kl_rewards(rewards, answers.old_logps, answers.ref_logps, beta=cfg.beta)
        metrics["baseline"] = baseline.value
        answers.advantages = rewards - baseline.value  # (B,)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        losses, stats = [], Mean()
        for micro in answers.micro_batches(cfg.micro_batch):
            loss, micro_stats = step(policy, micro, cfg)
            share = len(micro) / len(answers)  # the loss is a mean over completions: a micro-batch is weighted by its number of them
            loss = loss * share
            loss.backward()
            losses.append(loss.detach())
            stats.add(micro_stats, weight=micro.mask.sum())  # means over tokens
        total = run.sum(losses)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.may_update(k, policy, picked, total, grad_norm):
            optimizer.step()
            baseline.update(rewards)  # only now, after the step has used it

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
