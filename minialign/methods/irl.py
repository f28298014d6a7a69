"""Iterative inverse reinforcement learning (IRL) from demonstrations. "From Demonstrations to Rewards" (under review at ICLR 2025),
Algorithm 1, Eq. 10 and 11.

    L(φ)    = E_{(x,y)~D, ỹ~π_k(·|x)}[ log(1 + e^{−(s_φ(x,y) − s_φ(x,ỹ))}) ],     s_φ = r_φ − r_{k−1}         (accumulate)
    π_{k+1} = argmax_π E_π[r_φ(x, y)] − β·KL(π‖ref)

Symbols  y → demo, ỹ → sample (the policy's own answer), r_φ → *_rewards (B,), r_{k−1} → base_*_rewards, the reward when the round began,
         π_k → policy when it began, rounds → how often the two take turns.
Idea     Train a reward to tell the demonstrations from the policy's own answers, follow it, and do it again with the answers of the
         policy that followed: demonstrations alone become a reward model and a policy.
Differs  from rft.py: Bradley-Terry on what each round adds, and the choice of anchor; the policy may follow the reward by selection.
Details  mode says what a round does to the reward.
           linear      the gradient of the likelihood itself (Eq. 10; rft.py's loss): the reward goes on, few steps a round.
           accumulate  the arg min of Eq. 11 for what the round adds: r_φ starts at r_{k−1}, and its increase is fitted.
           literal     Algorithm 1 as printed: a reward from nothing in every round, the last one forgotten.
         Why literal fails: the arg min of Eq. 11 is log E/π_k, which speaks of the present policy and not of ref. Followed from ref with
         β = 1, the policy becomes ref·E/π_k: E when π_k is ref, and ref when π_k is E. It swings for ever; few steps a round hide it.
         anchor="current" pulls to the policy of the round's beginning and pays only the increase r_φ − r_{k−1}.
         policy_step: ppo (as the paper for summaries), rloo, grpo, rebel, bon_sft (maximum likelihood on the best of n) or bon_dpo (DPO on
         best over worst, which is what the code calls Best-of-N). bon_sft knows no β. Both follow only the order of the rewards, at full
         strength however flat these are: they never rest, none of the laws below is theirs, and after some rounds they do harm: stop early.
Law      Exact steps and a bound that does not bind (rft.py has the law of one that does). linear: E, the expert. accumulate, or
         anchor="current": π ∝ π_k·(E/π_k)^{1/β}, so log π/E is multiplied by 1 − 1/β in a round: to E if β > ½, at once if β = 1.
         literal: π ∝ ref·(E/π_k)^{1/β}: β = 1 swings between ref and E, β < 1 swings ever wider, β > 1 settles at
         E^{1/(1+β)}·ref^{β/(1+β)} (toy/closed_form.py, rounds_law).
Checked  tests/methods/test_irl.py (gradients by enumeration, the regimes), toy/three_actions.py, toy/tiny_language.py (a GPT, sampled).

    python -m minialign irl                                                  # built-in task, laptop CPU
    python -m minialign irl --mode literal --rounds 6 --steps 360 --schedule constant      # kl at the end of a round: up, down, up, …
    python -m minialign irl --demos demos.jsonl --policy runs/sft/final --policy_step bon_dpo --anchor current --rounds 2 --steps 40
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.batch import Pairs, collate
from minialign.common import BadInput, Mean, batch_rows, cli, derive_seed, exit_codes, in_micro, lr_at, set_lr, split_micro
from minialign.data import builtin_demos, demo_batch, encode_demos, read_demonstrations, split_scorable
from minialign.evaluate import held_out_nll
from minialign.lora import frozen_copy
from minialign.methods import best_of_n, dpo
from minialign.methods.rft import align, in_group, reward_alignment_loss, rollout, turns
from minialign.rewards import rollout_stats, score
from minialign.run import Run


@dataclass
class Config:
    mode: str = "linear"            # what a round does to the reward: linear, accumulate or literal
    anchor: str = "initial"         # the reference of the policy step: initial, or current (the policy that began the round)
    beta: float = 1.0               # β: the pull to it, in units of reward
    rounds: int = 12                # how often reward and policy take turns
    reward_share: float = 0.4       # share of a round's steps that train the reward, the others the policy; 1 = the reward alone
    bound: float = 6.0              # R: rewards lie in [0, R]; 0 = unbounded
    ridge: float = 0.0              # weight of the squared rewards (linear), or of their squared increase in the round
    read: str = "sum"               # the reward of a completion: sum (over its tokens) or last (at its last token)
    reward_lr: float = 5e-4         # peak learning rate of the reward
    policy_step: str = "rloo"       # ppo, rloo, grpo, rebel, bon_sft or bon_dpo
    group_size: int = 4             # completions of each prompt in rloo and grpo
    n: int = 8                      # completions of each prompt in bon_sft and bon_dpo
    policy: str = "builtin"         # start from, and the initial reference: builtin, a folder, a hub name
    demos: str = "builtin"          # demonstrations: builtin, or a JSONL/JSON(.gz) file
    steps: int = 120                # steps of all rounds together, of the reward and of the policy
    batch_size: int = 32            # demonstrations per reward step, completions per policy step
    micro_batch: int = 0            # rows per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 3e-4                # peak learning rate of the policy's AdamW (for models with billions of weights: 1e-6)
    schedule: str = "linear"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.0             # share of the steps over which the learning rates rise
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_len: int = 256              # most tokens of a row, prompt and completion; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    max_new: int = 64               # most tokens of an own answer
    tau: float = 1.0                # sampling temperature, and that of every log-prob here (bon_sft, bon_dpo: those are at 1)
    held_out: float = 0.1           # the last share of the file, never trained on
    seed: int = 0                   # data order, samples
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16, float64, or mixed: float32 weights, bfloat16 arithmetic (needs torchrun)
    parallel: str = "fsdp"          # under torchrun: fsdp (each process holds a part of the weights) or ddp (all of them)
    activation_checkpointing: bool = False  # make activations again in the backward pass: less memory, a third more time
    lora: int = 0                   # rank of adapters that are trained in the place of the weights; 0 trains the weights
    lora_alpha: float = 16.0        # their products count lora_alpha / lora times
    log_every: int = 10             # steps between lines on the terminal
    eval_every: int = 20            # steps between evaluations on the held-out rows
    save_every: int = 50            # steps between checkpoints
    snapshots: bool = False         # export policy and reward at every evaluation too, to snapshots/<step>/ and reward_snapshots/<step>/
    out: str = ""                   # run folder; default runs/irl-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def irl_loss(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards, *, ridge=0.0):
    """All inputs (B,); the base rewards are constants, 0 for Eq. 11 as printed. Returns the scalar loss, stats."""
    assert demo_rewards.dim() == 1 and demo_rewards.shape == sample_rewards.shape == base_demo_rewards.shape == base_sample_rewards.shape
    demo_increase, sample_increase = demo_rewards - base_demo_rewards.detach(), sample_rewards - base_sample_rewards.detach()  # (B,)
    margin = demo_increase - sample_increase  # (B,)
    loss = F.softplus(-margin) + ridge * (demo_increase**2 + sample_increase**2)
    stats = {
        "rewards/demo": demo_rewards.mean(), "rewards/sample": sample_rewards.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
    }
    return loss.mean(), {name: value.detach() for name, value in stats.items()}


def step(reward_model, base, demos, samples, cfg):
    """Reward step. One batch of demonstrations and own answers to one loss: the only place where the reward meets its equation."""
    demo_rewards, sample_rewards = score(reward_model, demos), score(reward_model, samples)  # (B,)
    if cfg.mode == "linear":
        return reward_alignment_loss(demo_rewards, sample_rewards, beta=cfg.beta, ridge=cfg.ridge)
    with torch.no_grad():  # what the rounds before have learned is a constant of this one
        base_demo_rewards, base_sample_rewards = score(base, demos), score(base, samples)
    return irl_loss(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards, ridge=cfg.ridge)


def select(policy, anchor, prompts_ids, reward_of, cfg, tokenizer, seed):
    """Policy step by selection: n completions of each prompt, the best imitated (bon_sft) or preferred to the worst (bon_dpo).

    Returns the same three as rft.align. Where all n pay the same, best and worst are one completion, and DPO's gradient is 0.
    """
    answers = best_of_n.rollout(policy, prompts_ids, cfg, tokenizer.eos_id, seed)
    scores = reward_of(answers).view(-1, cfg.n)  # (N, n)

    def rows(picked):  # (N,) places within the groups -> Batch
        completions = [answers.completions[b * cfg.n + i] for b, i in enumerate(picked.tolist())]
        return collate(prompts_ids, completions, pad_id=tokenizer.pad_id).to(scores.device)

    best, worst = rows(best_of_n.pick(scores)), rows(best_of_n.pick(-scores))
    metrics = rollout_stats(scores.flatten(), answers, group_size=cfg.n) | {"reward/best": scores.amax(1).mean()}

    def update(epoch, stats):
        for micro, micro_worst in zip(*[split_micro(x, cfg.micro_batch) for x in (best, worst)], strict=True):
            if cfg.policy_step == "bon_sft":
                loss, micro_stats = best_of_n.step(policy, micro, cfg)
            else:
                loss, micro_stats = dpo.step(policy, anchor, Pairs(micro, micro_worst), dpo.Config(beta=cfg.beta))
                micro_stats = {name.replace("rewards/", "implicit/"): value for name, value in micro_stats.items()}  # not the learned one
            stats.add(micro_stats, weight=int(micro.mask.sum()) if cfg.policy_step == "bon_sft" else len(micro))
            yield loss, len(micro) / len(best)

    return metrics, 1, update


def main(cfg):
    """Run it; returns the run folder. The learned reward lies beside the policy, in reward/."""
    run = Run("irl", cfg)
    cfg = run.cfg
    if cfg.mode not in ("linear", "accumulate", "literal") or cfg.anchor not in ("initial", "current"):
        raise BadInput(f"--mode {cfg.mode} --anchor {cfg.anchor}: expected linear, accumulate or literal, and initial or current")
    if cfg.policy_step not in ("ppo", "rloo", "grpo", "rebel", "bon_sft", "bon_dpo"):
        raise BadInput(f"--policy_step {cfg.policy_step}: must be ppo, rloo, grpo, rebel, bon_sft or bon_dpo")
    if cfg.rounds > cfg.steps // (2 if cfg.reward_share < 1 else 1):
        raise BadInput(f"--rounds {cfg.rounds}: {cfg.steps} steps are too few for a step of the reward and one of the policy in each round")
    selecting = cfg.policy_step.startswith("bon")
    group = cfg.n if selecting else in_group(cfg)
    if cfg.batch_size % group or group < 2 and cfg.policy_step != "ppo":
        raise BadInput(f"--batch_size {cfg.batch_size}: {cfg.policy_step} needs a whole number of groups, of 2 completions at least")
    policy, tokenizer = run.open_policy(cfg.policy)
    run.same_input("data", cfg.demos)
    demos = builtin_demos() if cfg.demos == "builtin" else read_demonstrations(cfg.demos, skip_bad=cfg.skip_bad)
    rows, held_out = split_scorable(encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt), cfg.held_out, cfg.max_len)
    run.check_context(policy, rows)

    def batch_of(source, picked):
        return demo_batch(source, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(run.device)

    anchor = frozen_copy(policy)
    reward_model = policy.with_scalar_head(reward_read=cfg.read, reward_bound=cfg.bound)
    torch.nn.init.zeros_(reward_model.head_weight)  # r_0 is constant: π_0 = ref
    base = frozen_copy(reward_model)  # r_{k−1}; of literal, the reward that every round begins from
    reward_optimizer = torch.optim.AdamW(
        reward_model.parameters(), lr=cfg.reward_lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True
    )
    value_model = policy.with_scalar_head() if cfg.policy_step == "ppo" else None
    trained = [*policy.parameters(), *(value_model.parameters() if value_model else [])]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    models = {"policy": policy, "reward_model": reward_model} | ({"value_model": value_model} if value_model else {})
    run.track(**models, base=base, anchor=anchor, optimizer=optimizer, reward_optimizer=reward_optimizer)
    first = batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed))
    run.first_look(tokenizer, rows, first, **models, base=base, anchor=anchor)
    run.check_sampler(tokenizer, [row[0] for row in rows[:3]], policy=policy, ref=anchor)

    def reward_of(answers):
        paid = in_micro(lambda micro: score(reward_model, micro), answers, cfg.micro_batch)  # (B,)
        return paid - in_micro(lambda micro: score(base, micro), answers, cfg.micro_batch) if cfg.anchor == "current" else paid

    plan, counts = turns(cfg)
    for k in run.steps(cfg.steps):
        t, of_reward, nth = plan[k]  # the nth step of its kind
        if k == 0 or t != plan[k - 1][0]:  # a round begins
            if cfg.mode == "literal":
                reward_model.load_state_dict(base.state_dict())
            else:
                base.load_state_dict(reward_model.state_dict())
            if cfg.mode != "linear":
                reward_optimizer.state.clear()  # a new problem
            if cfg.anchor == "current":
                anchor.load_state_dict(policy.state_dict())

        picked = batch_rows(len(rows), cfg.batch_size if of_reward else cfg.batch_size // group, nth, (cfg.seed, of_reward))
        prompts_ids, seed = [rows[row][0] for row in picked], derive_seed("irl", cfg.seed, k)
        total, stats = 0.0, Mean()
        if of_reward:
            answers = rollout(policy, prompts_ids, cfg, tokenizer.eos_id, seed)
            set_lr(reward_optimizer, lr_at(nth, lr=cfg.reward_lr, steps=counts[True], warmup=cfg.warmup, schedule=cfg.schedule))
            reward_optimizer.zero_grad()
            own = collate(prompts_ids, answers.completions, pad_id=tokenizer.pad_id).to(run.device)
            for micro, micro_own in zip(*[split_micro(x, cfg.micro_batch) for x in (batch_of(rows, picked), own)], strict=True):
                loss, micro_stats = step(reward_model, base, micro, micro_own, cfg)
                share = len(micro) / len(own)  # the loss is a mean over rows: a micro-batch counts by its rows
                (loss * share).backward()
                total += loss.item() * share
                stats.add(micro_stats, weight=share)
            total = run.sum(total)
            grad_norm = clip_grad_norm_(reward_model.parameters(), cfg.max_grad_norm)
            if run.finite(k, reward_model, picked, total, grad_norm, of="reward"):
                reward_optimizer.step()
            metrics = {"completions/mean_length": answers.lengths.float().mean(), "completions/finished": answers.finished.float().mean()}
        else:
            if selecting:
                metrics, epochs, update = select(policy, anchor, prompts_ids, reward_of, cfg, tokenizer, seed)
            else:
                metrics, epochs, update = align(policy, value_model, anchor, prompts_ids, reward_of, cfg, tokenizer.eos_id, seed)
            set_lr(optimizer, lr_at(nth, lr=cfg.lr, steps=counts[False], warmup=cfg.warmup, schedule=cfg.schedule))
            for epoch in range(epochs):
                optimizer.zero_grad()
                epoch_total = 0.0
                for loss, share in update(epoch, stats):
                    (loss * share).backward()
                    epoch_total += loss.item() * share
                epoch_total = run.sum(epoch_total)
                grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                critic_norm = clip_grad_norm_(value_model.parameters(), cfg.max_grad_norm) if value_model else 0.0
                total += epoch_total / epochs
                worse = value_model if value_model and grad_norm.isfinite() else policy  # whom to name
                if not run.finite(k, worse, picked, epoch_total, grad_norm + critic_norm):
                    break  # the rest of this rollout would fail in the same way
                optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "round": t, **stats.result()}
        metrics["lr"] = (reward_optimizer if of_reward else optimizer).param_groups[0]["lr"]
        if run.due(k):
            if held_out:
                metrics["eval/nll"] = held_out_nll(policy, held_out, batch_of, cfg.batch_size)
            run.log_samples(k, policy, tokenizer, [row[0] for row in (held_out or rows)[:4]], tau=cfg.tau)
            run.snapshot(k, policy, tokenizer)
            run.snapshot(k, reward_model, tokenizer, "reward_snapshots")
        run.log(k, **metrics)
    run.export(reward_model, tokenizer, "reward")
    return run.close(policy, tokenizer)


if __name__ == "__main__":
    import sys

    with exit_codes("minialign irl"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign irl", description=__doc__))
