"""REBEL: reinforcement learning by regressing relative rewards. Gao et al. 2024, arXiv:2404.16767, Algorithm 1.

What this deletes from the paper, and why:
    1. a base distribution μ of the second completion that is another model. Here it is π_t, or a data set (--mu).
    2. solving each rollout's regression to its minimum. A few gradient steps (epochs) on it are enough; many rollouts end at the same π*.
    3. general preferences instead of rewards. Such preferences need a model that compares two completions.

    L(θ) = E_{x, y~π_t, y'~μ} [ ( (1/η)·( log π_θ(y|x)/π_t(y|x) − log π_θ(y'|x)/π_t(y'|x) ) − (R(x, y) − R(x, y')) )² ]

Symbols  π_t → the policy that sampled, frozen; y, y' → rows 2i and 2i + 1; log π_θ/π_t of each → logratio, other_logratio (B/2,);
         R = r − β·log π_t/π_ref → rewards, other_rewards (B/2,); η → eta, the size of a policy step, in nats per unit of reward.
Idea     The exact step of mirror descent, π_{t+1} ∝ π_t·e^{ηR}, has log π_{t+1}/π_t = ηR + const(x). The constant cancels within a pair, so
         the difference of log-ratios can be fitted to the difference of rewards: policy optimisation as least squares.
Differs  from rloo.py: the loss is a squared error, so it shows when a step is done; there is no clip and no advantage. From dpo.py: the
         sizes of the rewards are fitted, not only which answer won.
Details  This is the paper's form. The released code has (Δ − η·ΔR)², which is η² times this: the same minimum, but gradients that are η²
         times as large (which hardly matters under Adam). η is 1 / (weight of the KL to π_t) and is independent of β.
         The KL to the first policy, ref, is inside R (k1, detached, summed over tokens), as in the released code. Without it every
         rollout would move the policy by another full step, without limit.
         Both completions of a pair stay in one micro-batch. Two identical completions are a pair like any other, with error 0.
         μ is π_t by default. With --mu FILE, y' is a completion that the file has for x. The reward judges it too, and R has its KL.
Law      One rollout solved exactly gives π_t·e^{ηR}/Z. So log π_t = (1 − ηβ)^t·log ref + (1 − (1 − ηβ)^t)·log π* + const, which converges
         to π* ∝ ref·e^{r/β} for 0 < ηβ < 2. With β = 0 the policy moves by η nats per unit of reward at every rollout, forever.
         The law is the same for every μ: the error is 0 only where log π_θ/π_t − ηR is one constant on all that π_t and μ can produce. An
         unfinished step goes another way: its first gradient is −(2/η)·(∇J + Σ μ·(R − E_π R)·∇log π), which also raises the better
         completions of μ.
Checked  tests/methods/test_rebel.py (the exact step has loss 0, hand numbers, both forms), toy/tiny_language.py (the law).

    python -m minialign rebel                                                # built-in task, laptop CPU
    python -m minialign rebel --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import Rollout, collate, masked_mean
from minialign.data import known
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, in_micro, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer, open_second_demos
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
    eta: float = 1.0                # η: how far one rollout moves the policy, in nats per unit of reward
    mu: str = ""                    # μ: builtin, or a file: its answers are the second of each pair; default: the policy samples them
    epochs: int = 4                 # updates on the same completions
    steps: int = 60                 # rollouts, each with `epochs` updates
    batch_size: int = 64            # completions per step, two of each prompt


def rebel_loss(logratio, other_logratio, rewards, other_rewards, *, eta):
    """All inputs (B/2,), one entry per pair: log π_θ/π_t summed over a completion, in nats, and R. Returns the scalar loss, stats."""
    assert logratio.dim() == 1 and logratio.shape == other_logratio.shape == rewards.shape == other_rewards.shape
    target = (rewards - other_rewards).detach()
    loss = ((logratio - other_logratio) / eta - target) ** 2
    return loss.mean(), {"target": (target**2).mean()}  # the loss of a policy that has not moved


def step(policy, answers, cfg, *, on_policy):
    """Compute the loss of one batch; the two completions of a pair are adjacent. Only this function connects policy and equation.

    on_policy: no update since sampling, so π_t's log-probs are set to those of this forward pass and every log-ratio is 0.
    """
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    if on_policy:
        answers.old_logps.copy_(logps.detach())
    logratio = (logps - answers.old_logps).sum(1)  # (B,) both log-probs are 0 where nothing is scored
    assert not (on_policy and moved(logps, answers.old_logps)), "the policy that samples is not the one that is trained"
    loss, stats = rebel_loss(logratio[0::2], logratio[1::2], answers.rewards[0::2], answers.rewards[1::2], eta=cfg.eta)
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def open_mu(run, policy, tokenizer, rows):
    """The function (prompt ids, seed) -> one of the prompt's completions in --mu. Raises BadInput for a prompt that has none there."""
    cfg, found, demos = run.cfg, {}, open_second_demos(run, tokenizer, "mu")
    for i, (prompt, _) in enumerate(demos):
        found.setdefault(tuple(prompt), []).append(i)

    def choose(prompt, seed):
        if not (options := found.get(tuple(prompt))):
            raise BadInput(f"--mu {cfg.mu}: has no completion of the prompt {tokenizer.decode_prompt(prompt)!r:.60}; name the same file "
                           "for --prompts and --mu, with a good completion in each row")
        if (longest := len(prompt) + max(len(demos[i][1]) for i in options) - 1) > policy.config.max_len:
            raise BadInput(f"--mu {cfg.mu}: a row of {longest + 1} tokens exceeds the policy's context of {policy.config.max_len}; "
                           "leave it out")
        return list(demos[options[seed % len(options)]][1])

    if long := getattr(rows, "long", None):  # its other rows are checked when they are read
        long.guards.append(lambda row: choose(row[0], 0))
    for prompt, _ in known(rows):
        choose(prompt, 0)
    return choose


def pair_up(policy, ref, answers, prompts_ids, others, cfg, tokenizer):
    """A Rollout of 2·N rows: each of N sampled answers, and after it a completion of μ to the same prompt, with the log-probs of both."""
    completions = [ids for pair in zip(answers.completions, others, strict=True) for ids in pair]
    batch = collate([ids for ids in prompts_ids for _ in range(2)], completions, pad_id=tokenizer.pad_id).to(answers.mask.device)
    old_logps, ref_logps = (in_micro(lambda micro, model=model: token_logps(model, micro, tau=cfg.tau), batch, cfg.micro_batch)
                            for model in (policy, ref))  # (2N, T)
    finished = torch.tensor([bool(ids) and ids[-1] in tokenizer.eos_ids for ids in completions], device=batch.mask.device)
    return Rollout(**vars(batch), old_logps=old_logps, ref_logps=ref_logps, lengths=batch.mask.sum(1), finished=finished,
                   completions=completions)


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("rebel", cfg)
    cfg = run.cfg
    if cfg.batch_size % 2:
        raise BadInput(f"--batch_size {cfg.batch_size}: must be even, because completions come in pairs")
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    second = open_mu(run, policy, tokenizer, rows) if cfg.mu else None
    ref = frozen_copy(policy)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer)
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": ref})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size // 2, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        seed = derive_seed("rebel", cfg.seed, k)
        answers = rollout(policy, ref, prompts_ids, cfg, n=1 if second else 2, eos_id=tokenizer.eos_id, seed=seed)
        if second:
            others = [second(prompt, derive_seed("mu", seed, i)) for i, prompt in enumerate(prompts_ids)]
            answers = pair_up(policy, ref, answers, prompts_ids, others, cfg, tokenizer)
        rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B,)
        if rewards is None:
            continue
        metrics = rollout_stats(rewards[::2], answers[::2]) if second else rollout_stats(rewards, answers, group_size=2)
        answers.rewards = kl_rewards(rewards, answers.old_logps, answers.ref_logps, beta=cfg.beta)
        micros = answers.micro_batches((cfg.micro_batch + 1) // 2 * 2, unit=2)  # whole pairs

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        total, stats = 0.0, Mean()
        for epoch in range(cfg.epochs):
            optimizer.zero_grad()
            losses = []
            for micro in micros:
                loss, micro_stats = step(policy, micro, cfg, on_policy=epoch == 0)
                share = len(micro) / len(answers)  # the loss is a mean over pairs: a micro-batch is weighted by its number of pairs
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
        if metrics["target"] > 1e-8:
            metrics["explained"] = 1 - total / metrics["target"]
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
