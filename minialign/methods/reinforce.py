"""REINFORCE with a baseline. Williams 1992; for completions as single actions: Ahmadian et al. 2024, arXiv:2402.14740.

    L(θ) = −E_{x~D, y~π_θ(·|x)} [ sg(R − b) · log π_θ(y|x) ],        R = r(x, y) − β·log π_θ(y|x)/π_ref(y|x)

Symbols  r → scores (B,), R → rewards (B,), b → baseline, R − b → advantages (B,), log π_θ(y|x) = Σ_t logps (B, T), sg → detached.
Idea     ∇E_π[R] = E_π[R·∇log π]: make completions likelier in proportion to their reward. Any constant b leaves the expectation as
         it is and can take out most of the variance.
Differs  from sft.py: own completions instead of demonstrations, each weighted by its reward. rloo.py gets b from the other samples of the
         prompt, grpo.py from their mean and spread, ppo.py from a learned value of every prefix.
Details  One completion is one action: its log-probs are summed, not averaged. Averaging (1/|y|) is another, biased gradient, though
         it comes to rest at the same policy.
         R is a constant of the objective. The KL estimator k1 in it, log π/π_ref, is not differentiated: E[R·∇log π] already is the
         gradient of the KL too, because E[∇log π] = 0. With R differentiated inside R·log π the law becomes ∝ √(ref·e^{r/β}).
         b is the running mean of earlier rewards, with Adam's correction for its start at 0. It never contains the current batch:
         a batch mean that does shrinks the gradient by (B − 1)/B.
         missing_eos is subtracted from r where max_new cut the completion off.
         Everything is at the sampling temperature: ref's logits are divided by tau as well, and the law is that of the tempered
         policy.
Law      π* ∝ ref·e^{r/β}, the maximiser of E_π[r] − β·KL(π‖ref). With β = 0: whatever completion pays most, alone.
Checked  tests/methods/test_reinforce.py (the gradient by enumeration, any baseline), toy/tiny_language.py (the law).

    python -m minialign reinforce                                            # built-in task, laptop CPU
    python -m minialign reinforce --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
    python -m minialign reinforce --reward rewards.py:politeness             # any function (prompts, completions) -> numbers
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from minialign.batch import masked_mean
from minialign.common import Mean, batch_rows, cli, derive_seed, exit_codes, in_micro, lr_at, set_lr, split_micro
from minialign.evaluate import held_out_reward
from minialign.kl import k1
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import rollout_stats
from minialign.run import Run
from minialign.sample import sample


@dataclass
class Config:
    beta: float = 0.05              # β: the pull to ref; 0 lets the policy go anywhere
    decay: float = 0.9              # of the running mean of rewards that is the baseline; 0 = the last batch's mean, 1 = none
    policy: str = "builtin"         # start from, and the reference: builtin, a folder, a hub name
    prompts: str = "builtin"        # prompts: builtin, or a JSONL/JSON(.gz) file
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # exact_match, FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # of several rewards: mean, min, or warm (one reward model of averaged weights)
    reward_limit: float = 60.0      # seconds that the reward may take for one batch
    missing_eos: float = 0.0        # subtracted from the reward of a completion that max_new cut off
    steps: int = 100                # optimizer steps, each on fresh completions
    batch_size: int = 64            # completions per step, one of each prompt
    micro_batch: int = 0            # rows per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 3e-4                # peak learning rate of AdamW (for models with billions of weights: 1e-6)
    schedule: str = "linear"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.0             # share of the steps over which the learning rate rises
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    max_new: int = 64               # most tokens of a completion
    tau: float = 1.0                # sampling temperature, and that of every log-prob here
    held_out: float = 0.25          # the last share of the prompts, never trained on
    seed: int = 0                   # prompt order, samples
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16, float64, or mixed: float32 weights, bfloat16 arithmetic (needs torchrun)
    parallel: str = "fsdp"          # under torchrun: fsdp (each process holds a part of the weights) or ddp (all of them)
    activation_checkpointing: bool = False  # make activations again in the backward pass: less memory, a third more time
    lora: int = 0                   # rank of adapters that are trained in the place of the weights; 0 trains the weights
    lora_alpha: float = 16.0        # their products count lora_alpha / lora times
    log_every: int = 10             # steps between lines on the terminal
    eval_every: int = 25            # steps between evaluations on the held-out prompts
    save_every: int = 50            # steps between checkpoints
    snapshots: bool = False         # export the model at every evaluation too, to snapshots/<step>/
    out: str = ""                   # run folder; default runs/reinforce-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def reinforce_loss(logps, advantages, mask):
    """logps, mask: (B, T); advantages: (B,), constants. Returns the scalar loss, stats (none: its value means nothing)."""
    assert logps.dim() == 2 and logps.shape == mask.shape and advantages.shape == logps.shape[:1], (logps.shape, advantages.shape)
    seq_logps = torch.where(mask.bool(), logps, 0).sum(1)  # (B,)
    return -(advantages.detach() * seq_logps).mean(), {}


def kl_rewards(scores, logps, ref_logps, *, beta):
    """R = r − β·Σ_t k1_t, detached: scores (B,), log-probs (B, T) that are 0 where nothing is scored -> (B,)."""
    return (scores - beta * k1(logps, ref_logps).sum(1)).detach()


class Baseline(nn.Module):
    """The running mean of past rewards; a module, so that a checkpoint holds it."""

    def __init__(self, decay):
        super().__init__()
        self.decay = decay
        self.sums = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)  # decayed Σ reward, decayed Σ 1

    @property
    def value(self):
        """Before the first batch there is nothing to go by: 0."""
        return float(self.sums[0] / self.sums[1]) if self.sums[1] else 0.0

    def update(self, rewards):
        self.sums.mul_(self.decay).add_(torch.tensor([float(rewards.mean()), 1.0], dtype=torch.float64) * (1 - self.decay))


def rollout(policy, ref, prompts_ids, cfg, eos_id, seed):
    """One completion of each prompt by the current policy, and what ref thinks of its tokens: Rollout, ref_logps (B, T)."""
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=eos_id, seed=seed)
    ref_logps = in_micro(lambda micro: token_logps(ref, micro, tau=cfg.tau), answers, cfg.micro_batch)  # constants of the objective
    return answers, ref_logps


def step(policy, answers, advantages, cfg):
    """One batch of completions to one loss: the only place where the policy meets the equation."""
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    loss, stats = reinforce_loss(logps, advantages, answers.mask)
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("reinforce", cfg)
    cfg = run.cfg
    reward_fn = run.open_reward()
    policy, tokenizer = run.open_policy(cfg.policy)
    rows, held_out = run.open_prompts(policy, tokenizer)

    ref = frozen_copy(policy)
    baseline = Baseline(cfg.decay)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(policy=policy, baseline=baseline, optimizer=optimizer)
    run.first_rollout(tokenizer, rows, reward_fn, policy=policy, ref=ref)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        answers, ref_logps = rollout(policy, ref, prompts_ids, cfg, tokenizer.eos_id, derive_seed("reinforce", cfg.seed, k))
        scores = run.ask(k, reward_fn, prompts, [tokenizer.decode(ids) for ids in answers.completions])  # (B,)
        if scores is None:
            continue
        scores = scores - cfg.missing_eos * ~answers.finished
        metrics = rollout_stats(scores, answers, ref_logps)
        rewards = kl_rewards(scores, answers.old_logps, ref_logps, beta=cfg.beta)
        metrics["baseline"] = baseline.value
        advantages = rewards - baseline.value  # (B,)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        optimizer.zero_grad()
        total, stats = 0.0, Mean()
        for micro, micro_advantages in zip(*[split_micro(x, cfg.micro_batch) for x in (answers, advantages)], strict=True):
            loss, micro_stats = step(policy, micro, micro_advantages, cfg)
            share = len(micro) / len(answers)  # the loss is a mean over completions: a micro-batch counts by its completions
            (loss * share).backward()
            total += loss.item() * share
            stats.add(micro_stats, weight=int(micro.mask.sum()))  # means over tokens
        total = run.sum(total)
        grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        if run.finite(k, policy, picked, total, grad_norm):
            optimizer.step()
            baseline.update(rewards)  # after it was used

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        if run.due(k):
            metrics |= held_out_reward(policy, tokenizer, held_out, reward_fn, cfg)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]], tau=cfg.tau)
            run.snapshot(k, policy, tokenizer)
        run.log(k, **metrics)
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign reinforce"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign reinforce", description=__doc__))
