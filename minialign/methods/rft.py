"""Reward-learning fine-tuning (RFT; not rejection sampling). Li et al. 2024, "Getting More Juice Out of the SFT Data", Algorithm 1,
Eq. 5 and 9.

    L(φ)    = −(1/β)·E_{(x,y)~D, ỹ~π_t(·|x)}[ r_φ(x, y) − r_φ(x, ỹ) ]             reward alignment: K steps
    π_{t+1} = argmax_π E_π[r_φ(x, y)] − β·KL(π‖ref)  ∝  ref·e^{r_φ/β}             policy alignment: M rollouts

Symbols  y → demo, ỹ → sample (the policy's own answer), r_φ → *_rewards (B,), T → rounds, K → the share reward_share of a round's steps,
         M → the others, π_t → policy at the start of the round, ref → the policy before the run.
Idea     Maximum-likelihood inverse reinforcement learning: look for the reward under which the demonstrations are what the best policy
         would do. Raise the reward of what the expert did, lower that of what the policy does instead, then follow the reward, and again.
Differs  from irft.py: the reward is a model of its own, the policy follows it by RL. From irl.py: one reward throughout, by the
         likelihood's own gradient, and the pull is always to ref. From reward_model.py: nobody labelled the other answer, it is sampled.
Details  Linear in r, L has no minimum: unbounded, the reward grows as long as it is trained. So it is bounded (bound R: r = R·σ(·),
         within [0, R]) or regularised (bound 0 and ridge c: + c·(r(y)² + r(ỹ)²)), or it is stopped early by few steps and many rounds.
         loss="bt" is Bradley-Terry on (demonstration over own answer), what the released code runs: it slows as the pairs separate.
         The reward starts constant (a head of zeros), so no noise of a new head steers the policy; only its head moves in step 1.
         read="sum" adds a number for every token, "last" reads one at the last token; sums learn faster from few demonstrations.
         Policy alignment is ppo.py, rloo.py, grpo.py or rebel.py with their own defaults, but for one lr that ppo's critic shares
         (what the released code runs instead, advantage-induced policy alignment: docs/ERRATA.md). With ppo, loss holds the critic's too.
         During a round's K steps the policy stands still, so each step's own answers are drawn when needed: the law is that of Algorithm 1.
Law      Exact policies. Unbounded and in small steps π → E, the expert, monotonically.
         Within [0, R]: π = ref·clip(Z·E/ref, 1, e^{R/β})/Z, the papers' Table 1 where E shows one action: the bound regularises.
         Ridge: r = (E − π)/(2cβ·(E + π)), the expert for c → 0, ref for c → ∞. bt: π ∝ E^{1/(1+β)}·ref^{β/(1+β)}, never E; one
         converged round of it ref·(E/ref)^{1/β}. All derived in toy/closed_form.py; grpo.py, with laws of its own, reaches none exactly.
Checked  tests/methods/test_rft.py (gradients by enumeration, every law), toy/three_actions.py, toy/tiny_language.py (a GPT, sampled).

    python -m minialign rft                                                  # built-in task, laptop CPU
    python -m minialign rft --demos demos.jsonl --policy runs/sft/final --policy_step ppo --rounds 4
    python -m minialign best_of_n --policy runs/sft/final --prompts prompts.jsonl --reward runs/rft/reward         # the reward it learned
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from minialign.batch import collate, whiten
from minialign.common import BadInput, Mean, batch_rows, cli, derive_seed, exit_codes, in_micro, lr_at, set_lr, split_micro
from minialign.data import builtin_demos, demo_batch, encode_demos, read_demonstrations, split_scorable
from minialign.evaluate import held_out_nll
from minialign.lora import frozen_copy
from minialign.methods import grpo, ppo, rebel, rloo
from minialign.rewards import rollout_stats, score
from minialign.run import Run
from minialign.sample import sample


@dataclass
class Config:
    beta: float = 1.0               # β: the pull to ref, in units of reward; only the ratio of bound to it matters to the law
    rounds: int = 1                 # T: how often reward and policy take turns
    reward_share: float = 0.4       # share of a round's steps that train the reward (K), the others the policy; 1 = the reward alone
    loss: str = "linear"            # reward alignment: linear (the paper's gradient) or bt (Bradley-Terry, the released code's)
    bound: float = 6.0              # R: rewards lie in [0, R]; 0 = unbounded
    ridge: float = 0.0              # c: weight of the squared rewards
    read: str = "sum"               # the reward of a completion: sum (over its tokens) or last (at its last token)
    reward_lr: float = 1e-3         # peak learning rate of the reward
    policy_step: str = "rloo"       # policy alignment: rloo, ppo, grpo or rebel
    group_size: int = 4             # completions of each prompt in rloo and grpo
    policy: str = "builtin"         # start from, and the reference: builtin, a folder, a hub name
    demos: str = "builtin"          # demonstrations: builtin, or a JSONL/JSON(.gz) file
    steps: int = 100                # steps of all rounds together, of the reward and of the policy
    batch_size: int = 32            # demonstrations per reward step, completions per policy step
    micro_batch: int = 0            # rows per forward pass; 0 = all of the step's at once (fewer saves memory, changes nothing)
    lr: float = 3e-4                # peak learning rate of the policy's AdamW (for models with billions of weights: 1e-6)
    schedule: str = "cosine"        # cosine, linear or constant, after the warm-up
    warmup: float = 0.1             # share of the steps over which the learning rates rise
    weight_decay: float = 0.0       # AdamW's
    max_grad_norm: float = 1.0      # gradients longer than this are shortened to it
    max_len: int = 256              # most tokens of a row, prompt and completion; the end is cut off
    max_prompt: int | None = None   # most tokens of a prompt; its beginning is cut off
    max_new: int = 64               # most tokens of an own answer
    tau: float = 1.0                # sampling temperature, and that of every log-prob here
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
    out: str = ""                   # run folder; default runs/rft-<time>
    resume: str = ""                # continue this run folder, bit for bit
    skip_bad: bool = False          # count and pass over bad rows of a file instead of stopping at the first


def reward_alignment_loss(demo_rewards, sample_rewards, *, beta, loss="linear", ridge=0.0):
    """demo_rewards, sample_rewards: (B,). Returns the scalar loss, stats. Raises BadInput for another loss."""
    assert demo_rewards.dim() == 1 and demo_rewards.shape == sample_rewards.shape
    margin = demo_rewards - sample_rewards  # (B,)
    if loss == "linear":
        value = -margin / beta
    elif loss == "bt":
        value = F.softplus(-margin)
    else:
        raise BadInput(f"loss={loss!r} is unknown: use linear or bt")
    value = value + ridge * (demo_rewards**2 + sample_rewards**2)
    stats = {
        "rewards/demo": demo_rewards.mean(), "rewards/sample": sample_rewards.mean(), "rewards/margins": margin.mean(),
        "rewards/accuracies": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
    }
    return value.mean(), {name: stat.detach() for name, stat in stats.items()}


def rollout(policy, prompts_ids, cfg, eos_id, seed):
    """The policy's own answer to each prompt: ỹ ~ π_t."""
    return sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=eos_id, seed=seed)


def step(reward_model, demos, samples, cfg):
    """Reward alignment. One batch of demonstrations and own answers to one loss: the only place where the reward meets its equation."""
    return reward_alignment_loss(score(reward_model, demos), score(reward_model, samples), beta=cfg.beta, loss=cfg.loss, ridge=cfg.ridge)


def align(policy, value_model, ref, prompts_ids, reward_of, cfg, eos_id, seed):
    """Policy alignment. One rollout of the method that cfg.policy_step names, as its own main has it, paid by reward_of: Rollout -> (B,).

    Returns the rollout's metrics, how many updates to make on it, and update(epoch, stats), which yields (loss, share) of each
    micro-batch: the update's loss is the sum of loss·share. prompts_ids: one for each group of completions; value_model: of ppo only.
    """
    method = {"ppo": ppo, "rloo": rloo, "grpo": grpo, "rebel": rebel}[cfg.policy_step]
    groups = {"group_size": cfg.group_size} if method in (rloo, grpo) else {}
    settings = method.Config(beta=cfg.beta, tau=cfg.tau, max_new=cfg.max_new, micro_batch=cfg.micro_batch, **groups)
    if method is ppo:
        answers, ref_logps, values = ppo.rollout(policy, value_model, ref, prompts_ids, settings, eos_id, seed)
    else:
        answers, ref_logps = method.rollout(policy, ref, prompts_ids, settings, eos_id, seed)
    scores = reward_of(answers)  # (B,)
    metrics = rollout_stats(scores, answers, ref_logps, group_size=in_group(cfg))

    if method is ppo:
        token_rewards = ppo.shape_rewards(scores, answers.old_logps, ref_logps, answers.mask, beta=cfg.beta)
        advantages, returns = ppo.gae(token_rewards, values, answers.mask, gamma=settings.gamma, lam=settings.lam)
        parts = values, whiten(advantages, answers.mask), returns
        metrics["explained_variance"] = ppo.explained_variance(values, returns, answers.mask)
    elif method is grpo:
        parts = ref_logps, grpo.group_advantages(scores, group_size=cfg.group_size)
    else:
        rewards = method.kl_rewards(scores, answers.old_logps, ref_logps, beta=cfg.beta)
        parts = (rewards if method is rebel else rloo.leave_one_out(rewards, group_size=cfg.group_size),)

    def update(epoch, stats):
        size = (cfg.micro_batch + 1) // 2 * 2 if method is rebel else cfg.micro_batch  # whole pairs
        for micro, *pieces in zip(*[split_micro(x, size) for x in (answers, *parts)], strict=True):
            tokens, share = int(micro.mask.sum()), len(micro) / len(answers)  # the loss is a mean over completions
            if method is ppo:
                loss, critic_loss, micro_stats = ppo.step(policy, value_model, micro, *pieces, settings, on_policy=epoch == 0)
                loss, share = loss + critic_loss, tokens / int(answers.mask.sum())  # means over tokens
            else:
                loss, micro_stats = method.step(policy, micro, *pieces, settings, on_policy=epoch == 0)
            stats.add({"entropy": micro_stats.pop("entropy")}, weight=tokens)
            stats.add(micro_stats, weight=tokens if method in (ppo, grpo) else len(micro))
            yield loss, share

    return metrics, settings.epochs, update


def in_group(cfg):
    """Completions of one prompt in a policy step."""
    return {"ppo": 1, "rebel": 2}.get(cfg.policy_step, cfg.group_size)


def turns(cfg):
    """For each step (round, whether it trains the reward, how many of its kind came before), and how many there are of each kind."""
    plan, counts = [], {True: 0, False: 0}
    begins = [math.ceil(t * cfg.steps / cfg.rounds) for t in range(cfg.rounds + 1)]  # the rounds of irft.py
    for t in range(cfg.rounds):
        length = begins[t + 1] - begins[t]
        n_reward = max(1, round(cfg.reward_share * length))
        if cfg.reward_share < 1:
            n_reward = min(n_reward, length - 1)  # the policy has a turn, too
        for j in range(length):
            of_reward = j < n_reward
            plan.append((t, of_reward, counts[of_reward]))
            counts[of_reward] += 1
    return plan, counts


def main(cfg):
    """Run it; returns the run folder. The learned reward lies beside the policy, in reward/."""
    run = Run("rft", cfg)
    cfg = run.cfg
    if cfg.loss not in ("linear", "bt") or cfg.policy_step not in ("rloo", "ppo", "grpo", "rebel"):
        raise BadInput(f"--loss {cfg.loss} --policy_step {cfg.policy_step}: expected linear or bt, and rloo, ppo, grpo or rebel")
    if cfg.rounds > cfg.steps // (2 if cfg.reward_share < 1 else 1):
        raise BadInput(f"--rounds {cfg.rounds}: {cfg.steps} steps are too few for a step of the reward and one of the policy in each round")
    if cfg.batch_size % in_group(cfg) or cfg.policy_step in ("rloo", "grpo") and cfg.group_size < 2:
        raise BadInput(f"--batch_size {cfg.batch_size}: {cfg.policy_step} needs a whole number of groups, of 2 completions at least")
    policy, tokenizer = run.open_policy(cfg.policy)
    run.same_input("data", cfg.demos)
    demos = builtin_demos() if cfg.demos == "builtin" else read_demonstrations(cfg.demos, skip_bad=cfg.skip_bad)
    rows, held_out = split_scorable(encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt), cfg.held_out, cfg.max_len)
    run.check_context(policy, rows)

    def batch_of(source, picked):
        return demo_batch(source, picked, pad_id=tokenizer.pad_id, max_len=cfg.max_len).to(run.device)

    ref = frozen_copy(policy)
    reward_model = policy.with_scalar_head(reward_read=cfg.read, reward_bound=cfg.bound)
    torch.nn.init.zeros_(reward_model.head_weight)  # r_0 is constant: π_0 = ref
    reward_optimizer = torch.optim.AdamW(
        reward_model.parameters(), lr=cfg.reward_lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True
    )
    value_model = policy.with_scalar_head() if cfg.policy_step == "ppo" else None
    trained = [*policy.parameters(), *(value_model.parameters() if value_model else [])]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    models = {"policy": policy, "reward_model": reward_model} | ({"value_model": value_model} if value_model else {})
    run.track(**models, optimizer=optimizer, reward_optimizer=reward_optimizer)
    run.first_look(tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), **models, ref=ref)
    run.check_sampler(tokenizer, [row[0] for row in rows[:3]], policy=policy, ref=ref)

    def reward_of(answers):
        return in_micro(lambda micro: score(reward_model, micro), answers, cfg.micro_batch)  # (B,)

    plan, counts = turns(cfg)
    for k in run.steps(cfg.steps):
        t, of_reward, nth = plan[k]  # the nth step of its kind
        picked = batch_rows(len(rows), cfg.batch_size if of_reward else cfg.batch_size // in_group(cfg), nth, (cfg.seed, of_reward))
        prompts_ids, seed = [rows[row][0] for row in picked], derive_seed("rft", cfg.seed, k)
        total, stats = 0.0, Mean()
        if of_reward:
            answers = rollout(policy, prompts_ids, cfg, tokenizer.eos_id, seed)
            set_lr(reward_optimizer, lr_at(nth, lr=cfg.reward_lr, steps=counts[True], warmup=cfg.warmup, schedule=cfg.schedule))
            reward_optimizer.zero_grad()
            own = collate(prompts_ids, answers.completions, pad_id=tokenizer.pad_id).to(run.device)
            for micro, micro_own in zip(*[split_micro(x, cfg.micro_batch) for x in (batch_of(rows, picked), own)], strict=True):
                loss, micro_stats = step(reward_model, micro, micro_own, cfg)
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
            # one rollout; update() then gives the losses of each epoch's micro-batches
            metrics, epochs, update = align(policy, value_model, ref, prompts_ids, reward_of, cfg, tokenizer.eos_id, seed)
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

    with exit_codes("minialign rft"):
        main(cli(Config, sys.argv[1:], prog="python -m minialign rft", description=__doc__))
