"""REINFORCE leave-one-out (RLOO). Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740; the clip as in TRL.

    L(θ) = −E[ min( ρ·A, clip(ρ, 1 − ε, 1 + ε)·A ) ],     A_i = R_i − (1/(G−1)) Σ_{j≠i} R_j,     R = r − β·log π_θ/π_ref

Symbols  G → group_size completions of one prompt, A → advantages (B,), ρ = π_θ(y|x)/π_old(y|x) of whole completions → ratio (B,).
Idea     The other samples of the same prompt say what this prompt pays on average: a baseline that costs nothing, knows the prompt, and
         is independent of the sample it is subtracted from, so the gradient stays unbiased.
Differs  from reinforce.py: the baseline is of this prompt and this policy, not a memory. From grpo.py: the sample itself is not in its
         baseline, nothing is divided by a spread, the KL is in the reward, and the ratio is of the sequence.
Details  A_i = G/(G−1)·(R_i − mean of the group); the advantages of a group sum to 0; G must be at least 2.
         With epochs=1 the ratio is exactly 1 (old log-probs are those of the same forward pass) and this is plain REINFORCE; epochs > 1
         goes over the same completions again, and then the clip holds it back.
         R is a constant of the objective, k1 summed over tokens, not averaged, as in reinforce.py.
Law      π* ∝ ref·e^{r/β}, the maximiser of E_π[r] − β·KL(π‖ref). At π* the reward R is the same for every completion, so the
         advantages vanish and with them the noise.
Checked  tests/methods/test_rloo.py (all pairs enumerated, hand numbers, clip), toy/tiny_language.py (the law).

    python -m minialign rloo                                                 # built-in task, laptop CPU
    python -m minialign rloo --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
    python -m minialign rloo --reward rewards.py:politeness                  # any function (prompts, completions) -> numbers
"""

from dataclasses import dataclass, field

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import masked_mean
from minialign.common import BadInput, Mean, batch_rows, cli, derive_seed, exit_codes, in_micro, lr_at, set_lr, split_micro
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
    eps: float = 0.2                # ε: how far the ratio may carry an update; matters with epochs > 1
    group_size: int = 4             # G: completions of each prompt
    epochs: int = 1                 # updates on the same completions
    policy: str = "builtin"         # start from, and the reference: builtin, a folder, a hub name
    prompts: str = "builtin"        # prompts: builtin, or a JSONL/JSON(.gz) file
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # exact_match, FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # of several rewards: mean, min, or warm (one reward model of averaged weights)
    reward_limit: float = 60.0      # seconds that the reward may take for one batch
    missing_eos: float = 0.0        # subtracted from the reward of a completion that max_new cut off
    steps: int = 100                # rollouts, each with `epochs` updates
    batch_size: int = 64            # completions per step, of batch_size / group_size prompts
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
    out: str = ""                   # run folder; default runs/rloo-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def leave_one_out(rewards, *, group_size):
    """rewards: (B,), the G of one prompt adjacent -> advantages (B,): each reward minus the mean of the others of its group."""
    assert rewards.dim() == 1 and group_size >= 2 and len(rewards) % group_size == 0, (rewards.shape, group_size)
    groups = rewards.view(-1, group_size)  # (N, G)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)  # (N, G)
    return (groups - others).flatten()


def rloo_loss(logps, old_logps, advantages, mask, *, eps):
    """logps, old_logps, mask: (B, T); advantages: (B,), constants. Returns the scalar loss, stats."""
    assert logps.dim() == 2 and logps.shape == old_logps.shape == mask.shape and advantages.shape == logps.shape[:1]
    logratio = torch.where(mask.bool(), logps - old_logps.detach(), 0).sum(1)  # (B,) one completion is one action
    logratio = logratio.clamp(max=80)  # e^88 is inf in float32, and the clip's gradient 0·inf
    ratio, advantages = logratio.exp(), advantages.detach()  # (B,)
    clipped = ratio.clamp(1 - eps, 1 + eps)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)  # (B,)
    stats = {"ratio": ratio.mean(), "clip_ratio/region_mean": (clipped * advantages < ratio * advantages).float().mean()}
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def kl_rewards(scores, logps, ref_logps, *, beta):
    """R = r − β·Σ_t k1_t, detached: scores (B,), log-probs (B, T) that are 0 where nothing is scored -> (B,)."""
    return (scores - beta * k1(logps, ref_logps).sum(1)).detach()


def rollout(policy, ref, prompts_ids, cfg, eos_id, seed):
    """G completions of each prompt by the current policy, and what ref thinks of their tokens: Rollout, ref_logps (B, T)."""
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=cfg.group_size, eos_id=eos_id, seed=seed)
    ref_logps = in_micro(lambda micro: token_logps(ref, micro, tau=cfg.tau), answers, cfg.micro_batch)  # constants of the objective
    return answers, ref_logps


def step(policy, answers, advantages, cfg, *, on_policy):
    """One batch of completions to one loss: the only place where the policy meets the equation.

    on_policy: nothing was updated since sampling, so the old log-probs are the very numbers of this forward pass: the ratio is exactly 1.
    """
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    if on_policy:
        answers.old_logps.copy_(logps.detach())
    loss, stats = rloo_loss(logps, answers.old_logps, advantages, answers.mask, eps=cfg.eps)
    assert not (on_policy and abs(stats["ratio"] - 1) > 0), stats  # (a NaN passes: the guard of the step names its rows)
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("rloo", cfg)
    cfg = run.cfg
    if cfg.group_size < 2:
        raise BadInput("--group_size 1: to leave one out there must be another; at least 2")
    reward_fn = run.open_reward()
    policy, tokenizer = run.open_policy(cfg.policy)
    rows, held_out = run.open_prompts(policy, tokenizer)

    ref = frozen_copy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(policy=policy, optimizer=optimizer)
    run.first_rollout(tokenizer, rows, reward_fn, policy=policy, ref=ref)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size // cfg.group_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        answers, ref_logps = rollout(policy, ref, prompts_ids, cfg, tokenizer.eos_id, derive_seed("rloo", cfg.seed, k))
        asked = [prompt for prompt in prompts for _ in range(cfg.group_size)]
        scores = run.ask(k, reward_fn, asked, [tokenizer.decode(ids) for ids in answers.completions])  # (B,)
        if scores is None:
            continue
        scores = scores - cfg.missing_eos * ~answers.finished
        metrics = rollout_stats(scores, answers, ref_logps, group_size=cfg.group_size)
        rewards = kl_rewards(scores, answers.old_logps, ref_logps, beta=cfg.beta)
        advantages = leave_one_out(rewards, group_size=cfg.group_size)  # (B,)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        total, stats = 0.0, Mean()
        for epoch in range(cfg.epochs):
            optimizer.zero_grad()
            epoch_total = 0.0
            for micro, micro_advantages in zip(*[split_micro(x, cfg.micro_batch) for x in (answers, advantages)], strict=True):
                loss, micro_stats = step(policy, micro, micro_advantages, cfg, on_policy=epoch == 0)
                share = len(micro) / len(answers)  # the loss is a mean over completions: a micro-batch counts by its completions
                (loss * share).backward()
                epoch_total += loss.item() * share
                stats.add({"entropy": micro_stats.pop("entropy")}, weight=int(micro.mask.sum()))  # a mean over tokens
                stats.add(micro_stats, weight=share)
            epoch_total = run.sum(epoch_total)
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            total += epoch_total / cfg.epochs
            if not run.finite(k, policy, picked, epoch_total, grad_norm):
                break  # the rest of this rollout would fail in the same way
            optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        if run.due(k):
            metrics |= held_out_reward(policy, tokenizer, held_out, reward_fn, cfg)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]], tau=cfg.tau)
            run.snapshot(k, policy, tokenizer)
        run.log(k, **metrics)
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign rloo"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign rloo", description=__doc__))
