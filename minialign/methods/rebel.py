"""REBEL: reinforcement learning by regressing relative rewards. Gao et al. 2024, arXiv:2404.16767, Algorithm 1.

    L(θ) = E_{x, y~π_t, y'~π_t} [ ( (1/η)·( log π_θ(y|x)/π_t(y|x) − log π_θ(y'|x)/π_t(y'|x) ) − (R(x, y) − R(x, y')) )² ]

Symbols  π_t → the policy that sampled, frozen; y, y' → rows 2i and 2i + 1; the differences to π_t → logratio, other_logratio (B/2,);
         R = r − β·log π_t/π_ref → rewards, other_rewards (B/2,); η → eta, the size of a policy step, in nats per unit of reward.
Idea     The exact step of mirror descent, π_{t+1} ∝ π_t·e^{ηR}, has log π_{t+1}/π_t = ηR + const(x). A pair has the constant in common,
         so regress the difference of log-ratios on the difference of rewards: policy optimisation as least squares.
Differs  from rloo.py: a squared error with a target, so it knows when a step is done; no clip, no advantage. From dpo.py: the sizes of
         the rewards are regressed, not only who won.
Details  This is the paper's form. The released code has (Δ − η·ΔR)², which is η² times this: the same minimum, but at a given learning
         rate another step size (under Adam hardly). η is 1 / (weight of the KL to π_t) and has nothing to do with β.
         The KL to the first policy, ref, is inside R (k1, detached, summed over tokens), as the code does: without it every rollout
         takes another full step and nothing holds the policy.
         Both completions of a pair stay in one micro-batch. Identical completions are a pair like any other: their error is 0.
Law      One rollout solved to the end: π_t·e^{ηR}/Z. So log π_t = (1 − ηβ)^t·log ref + (1 − (1 − ηβ)^t)·log π* + const, which tends to
         π* ∝ ref·e^{r/β} for 0 < ηβ < 2; with β = 0 it moves η nats per unit of reward at every rollout, for ever.
Checked  tests/methods/test_rebel.py (the exact step has loss 0, hand numbers, both forms), toy/tiny_language.py (the law).

    python -m minialign rebel                                                # built-in task, laptop CPU
    python -m minialign rebel --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
    python -m minialign rebel --reward rewards.py:politeness                 # any function (prompts, completions) -> numbers
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
    eta: float = 1.0                # η: how far one rollout moves the policy, in nats per unit of reward
    epochs: int = 4                 # updates on the same completions
    policy: str = "builtin"         # start from, and the reference: builtin, a folder, a hub name
    prompts: str = "builtin"        # prompts: builtin, or a JSONL/JSON(.gz) file
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # exact_match, FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # of several rewards: mean, min, or warm (one reward model of averaged weights)
    reward_limit: float = 60.0      # seconds that the reward may take for one batch
    missing_eos: float = 0.0        # subtracted from the reward of a completion that max_new cut off
    steps: int = 60                 # rollouts, each with `epochs` updates
    batch_size: int = 64            # completions per step, two of each prompt
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
    out: str = ""                   # run folder; default runs/rebel-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def rebel_loss(logratio, other_logratio, rewards, other_rewards, *, eta):
    """All inputs (B/2,): of each pair log π_θ/π_t summed over the completion, in nats, and R. Returns the scalar loss, stats."""
    assert logratio.dim() == 1 and logratio.shape == other_logratio.shape == rewards.shape == other_rewards.shape
    target = (rewards - other_rewards).detach()
    loss = ((logratio - other_logratio) / eta - target) ** 2
    return loss.mean(), {"target": (target**2).mean()}  # what the loss is where nothing has moved


def kl_rewards(scores, logps, ref_logps, *, beta):
    """R = r − β·Σ_t k1_t, detached: scores (B,), log-probs (B, T) that are 0 where nothing is scored -> (B,)."""
    return (scores - beta * k1(logps, ref_logps).sum(1)).detach()


def rollout(policy, ref, prompts_ids, cfg, eos_id, seed):
    """Two completions of each prompt by the current policy, and what ref thinks of their tokens: Rollout, ref_logps (B, T)."""
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=2, eos_id=eos_id, seed=seed)
    ref_logps = in_micro(lambda micro: token_logps(ref, micro, tau=cfg.tau), answers, cfg.micro_batch)  # constants of the objective
    return answers, ref_logps


def step(policy, answers, rewards, cfg, *, on_policy):
    """One batch of pairs, the two of a prompt adjacent, to one loss: the only place where the policy meets the equation.

    on_policy: nothing was updated since sampling, so π_t's log-probs are the very numbers of this forward pass: every log-ratio is 0.
    """
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    if on_policy:
        answers.old_logps.copy_(logps.detach())
    logratio = (logps - answers.old_logps).sum(1)  # (B,) both are 0 where nothing is scored
    assert not (on_policy and logratio.abs().max() > 0), logratio  # (a NaN passes: the guard of the step names its rows)
    loss, stats = rebel_loss(logratio[0::2], logratio[1::2], rewards[0::2], rewards[1::2], eta=cfg.eta)
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run it; returns the run folder."""
    run = Run("rebel", cfg)
    cfg = run.cfg
    if cfg.batch_size % 2:
        raise BadInput(f"--batch_size {cfg.batch_size}: must be even, completions come in pairs")
    reward_fn = run.open_reward()
    policy, tokenizer = run.open_policy(cfg.policy)
    rows, held_out = run.open_prompts(policy, tokenizer)

    ref = frozen_copy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    run.track(policy=policy, optimizer=optimizer)
    run.first_rollout(tokenizer, rows, reward_fn, policy=policy, ref=ref)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size // 2, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        answers, ref_logps = rollout(policy, ref, prompts_ids, cfg, tokenizer.eos_id, derive_seed("rebel", cfg.seed, k))
        asked = [prompt for prompt in prompts for _ in range(2)]
        scores = run.ask(k, reward_fn, asked, [tokenizer.decode(ids) for ids in answers.completions])  # (B,)
        if scores is None:
            continue
        scores = scores - cfg.missing_eos * ~answers.finished
        metrics = rollout_stats(scores, answers, ref_logps, group_size=2)
        rewards = kl_rewards(scores, answers.old_logps, ref_logps, beta=cfg.beta)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        total, stats, size = 0.0, Mean(), (cfg.micro_batch + 1) // 2 * 2  # whole pairs
        for epoch in range(cfg.epochs):
            optimizer.zero_grad()
            epoch_total = 0.0
            for micro, micro_rewards in zip(split_micro(answers, size), split_micro(rewards, size), strict=True):
                loss, micro_stats = step(policy, micro, micro_rewards, cfg, on_policy=epoch == 0)
                share = len(micro) / len(answers)  # the loss is a mean over pairs: a micro-batch counts by its pairs
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
        if metrics["target"] > 1e-8:
            metrics["explained"] = 1 - total / metrics["target"]
        if run.due(k):
            metrics |= held_out_reward(policy, tokenizer, held_out, reward_fn, cfg)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]], tau=cfg.tau)
            run.snapshot(k, policy, tokenizer)
        run.log(k, **metrics)
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign rebel"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign rebel", description=__doc__))
