"""Reward-learning fine-tuning (RFT; not rejection sampling). Li et al. 2024, "Getting More Juice Out of the SFT Data", Algorithm 1,
Eq. 5 and 9.

    L(φ)    = −(1/β)·E_{(x,y)~D, ỹ~π_t(·|x)}[ r_φ(x, y) − r_φ(x, ỹ) ]             reward alignment: K steps
    π_{t+1} = argmax_π E_π[r_φ(x, y)] − β·KL(π‖ref)  ∝  ref·e^{r_φ/β}             policy alignment: M rollouts

Symbols  y: demonstration → demo; ỹ: the policy's own answer → sample; r_φ: rewards → *_rewards (B,); T → rounds; K, M: numbers of reward
         and policy steps in a round (reward_share: K's share); π_t: the policy at the start of the round; ref: the policy before the run.
Idea     Inverse reinforcement learning by maximum likelihood: find the reward whose best policy makes the demonstrations most likely.
         Each round raises the reward of the demonstrations and lowers that of the policy's own answers; then RL trains the policy on it.
Differs  from irft.py: the reward is a separate model, and RL trains the policy on it. From irl.py: one reward throughout, trained by the
         gradient of the likelihood, and the KL is always to ref. From reward_model.py: no labels; the policy samples the other answer.
Details  L is linear in r and has no minimum: an unbounded reward grows as long as it is trained. So it is bounded (bound R: r = R·σ(·),
         within [0, R]), or regularised (bound 0 and ridge c: + c·(r(y)² + r(ỹ)²)), or stopped early by few steps and many rounds.
         loss="bt" is Bradley-Terry with the demonstration as chosen answer, as in the released code. Its gradient shrinks as margins grow.
         The reward starts constant (its head is zero), so no random initial reward moves the policy. In step 1 only the head changes.
         read="sum" adds one number per token, "last" takes one number at the last token. With few demonstrations "sum" learns faster.
         Policy alignment is ppo.py, rloo.py, grpo.py or rebel.py with their defaults for flags that rft lacks; ppo's critic shares lr.
         (The released code has advantage-induced policy alignment: docs/ERRATA.md.) With ppo the metric loss includes the critic's loss.
         The policy does not change in a round's K steps, so sampling own answers at each step gives the distribution of Algorithm 1.
Law      For exact policy steps. Unbounded reward, small steps: π converges monotonically to E, the expert.
         Within [0, R]: π = ref·clip(Z·E/ref, 1, e^{R/β})/Z, the papers' Table 1 if E takes one action. So the bound regularises.
         Ridge: r = (E − π)/(2cβ·(E + π)); the expert for c → 0, ref for c → ∞. bt: π ∝ E^{1/(1+β)}·ref^{β/(1+β)}, never E; after one
         converged round ref·(E/ref)^{1/β}. All are derived in toy/closed_form.py. grpo has other laws and reaches none of these exactly.
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

from minialign.batch import collate
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, in_micro, lr_at, micro_batches, set_lr
from minialign.engine.look import check_sampler, first_look
from minialign.engine.opening import check_context, open_demos, open_optimizer, open_policy
from minialign.engine.run import Run
from minialign.evaluate import held_out_nll
from minialign.kl import kl_rewards
from minialign.lora import frozen_copy
from minialign.methods import grpo, ppo, rebel, rloo
from minialign.rewards import rollout_stats, score
from minialign.sample import rollout, sample
from minialign.settings import OnDemonstrations


@dataclass
class Config(OnDemonstrations):
    beta: float = 1.0               # β: strength of the pull to ref, in units of reward; the fixed point depends only on bound / beta
    rounds: int = 1                 # T: number of rounds, each with reward steps, then policy steps
    reward_share: float = 0.4       # share of a round's steps that train the reward (K); the others train the policy. 1 = reward only
    loss: str = "linear"            # reward alignment: linear (the paper's gradient) or bt (Bradley-Terry, the released code's)
    bound: float = 6.0              # R: rewards lie in [0, R]; 0 = unbounded
    ridge: float = 0.0              # c: weight of the squared rewards
    read: str = "sum"               # the reward of a completion: sum (over its tokens) or last (at its last token)
    reward_lr: float = 1e-3         # peak learning rate of the reward
    policy_step: str = "rloo"       # policy alignment: rloo, ppo, grpo or rebel
    group_size: int = 4             # completions of each prompt in rloo and grpo
    tau: float = 1.0                # temperature of sampling and of every log-prob in the training
    batch_size: int = 32            # demonstrations per reward step, completions per policy step
    lr: float = 3e-4                # peak learning rate of the policy (for models with billions of weights: 1e-6)
    log_every: int = 10
    eval_every: int = 20
    save_every: int = 50


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


def step(reward_model, demos, samples, cfg):
    """Reward alignment: compute the loss of one batch. Only this function connects the reward model and its equation."""
    return reward_alignment_loss(score(reward_model, demos), score(reward_model, samples), beta=cfg.beta, loss=cfg.loss, ridge=cfg.ridge)


def policy_alignment(policy, value_model, ref, prompts_ids, reward_of, cfg, eos_id, seed):
    """Policy alignment: sample one rollout for the method cfg.policy_step. reward_of(Rollout) -> (B,) gives its rewards.

    Returns (metrics of the rollout, number of updates on it, update). update(epoch, stats) yields (loss, share) of each micro-batch; the
    loss of the update is the sum of loss·share. prompts_ids: one prompt for each group of completions. value_model: for ppo only.
    """
    method = {"ppo": ppo, "rloo": rloo, "grpo": grpo, "rebel": rebel}[cfg.policy_step]
    groups = {"group_size": cfg.group_size} if method in (rloo, grpo) else {}
    settings = method.Config(beta=cfg.beta, tau=cfg.tau, max_new=cfg.max_new, micro_batch=cfg.micro_batch, **groups)
    if method is ppo:
        answers = ppo.rollout_with_values(policy, value_model, ref, prompts_ids, settings, eos_id, seed)
    else:
        answers = rollout(policy, ref, prompts_ids, settings, n=completions_per_prompt(cfg), eos_id=eos_id, seed=seed)
    rewards = reward_of(answers)  # (B,)
    metrics = rollout_stats(rewards, answers, group_size=completions_per_prompt(cfg))
    if method is ppo:
        ppo.credit(answers, rewards, settings)
        metrics["explained_variance"] = ppo.explained_variance(answers.values, answers.returns, answers.mask)
    elif method is grpo:
        answers.advantages = grpo.group_advantages(rewards, group_size=cfg.group_size)
    else:
        answers.rewards = kl_rewards(rewards, answers.old_logps, answers.ref_logps, beta=cfg.beta)
        answers.advantages = rloo.leave_one_out(answers.rewards, group_size=cfg.group_size) if method is rloo else None

    size, unit = ((cfg.micro_batch + 1) // 2 * 2, 2) if method is rebel else (cfg.micro_batch, 1)  # whole pairs
    micros = answers.micro_batches(size, unit=unit)

    def update(epoch, stats):
        for micro in micros:
            tokens, share = sum(map(len, micro.completions)), len(micro) / len(answers)  # the loss is a mean over completions
            if method is ppo:
                loss, critic_loss, micro_stats = ppo.step(policy, value_model, micro, settings, on_policy=epoch == 0)
                loss, share = loss + critic_loss, tokens / sum(map(len, answers.completions))  # means over tokens
            else:
                loss, micro_stats = method.step(policy, micro, settings, on_policy=epoch == 0)
            stats.add({"entropy": micro_stats.pop("entropy")}, weight=tokens)
            stats.add(micro_stats, weight=tokens if method in (ppo, grpo) else len(micro))
            yield loss, share

    return metrics, settings.epochs, update


def completions_per_prompt(cfg):
    """Completions of one prompt in a policy step."""
    return {"ppo": 1, "rebel": 2}.get(cfg.policy_step, cfg.group_size)


def plan_turns(cfg):
    """Returns for each step (round, whether it trains the reward, number of earlier steps of its kind), and {kind: number of steps}."""
    plan, counts = [], {True: 0, False: 0}
    begins = [math.ceil(t * cfg.steps / cfg.rounds) for t in range(cfg.rounds + 1)]  # the same rounds as in irft.py
    for t in range(cfg.rounds):
        length = begins[t + 1] - begins[t]
        n_reward = max(1, round(cfg.reward_share * length))
        if cfg.reward_share < 1:
            n_reward = min(n_reward, length - 1)  # the policy has at least one step
        for j in range(length):
            of_reward = j < n_reward
            plan.append((t, of_reward, counts[of_reward]))
            counts[of_reward] += 1
    return plan, counts


def check_rounds(cfg, per_prompt):
    """Refuse another --read, too many rounds, and batches of parts of groups. per_prompt: completions of one prompt in a policy step."""
    if cfg.read not in ("sum", "last"):
        raise BadInput(f"--read {cfg.read}: must be sum or last")
    if cfg.rounds > cfg.steps // (2 if cfg.reward_share < 1 else 1):
        raise BadInput(f"--rounds {cfg.rounds}: {cfg.steps} steps are too few for a reward step and a policy step in each round")
    if cfg.batch_size % per_prompt or per_prompt < 2 and cfg.policy_step != "ppo":
        raise BadInput(f"--batch_size {cfg.batch_size}: {cfg.policy_step} needs a whole number of groups of at least 2 completions")


def constant_reward(policy, cfg):
    """A reward model: the policy's trunk with a new head of zeros. So r_0 is constant and π_0 = ref."""
    reward_model = policy.with_scalar_head(reward_read=cfg.read, reward_bound=cfg.bound)
    torch.nn.init.zeros_(reward_model.head_weight)
    return reward_model


def alternate(run, policy, tokenizer, reward_model, frozen, *, reward_step, policy_update, per_prompt, begin_round=None):
    """The loop of rft and irl: each round has first reward steps, then policy steps. Returns the run folder.

    frozen: {name: model} of the models that are not trained; the last is the reference. reward_step(demos, samples) -> (loss, stats).
    policy_update(value_model, prompts_ids, seed) -> what policy_alignment returns. begin_round(reward_optimizer) is called when a round
    begins. It may update the frozen models, which are then part of a checkpoint.
    """
    cfg = run.cfg
    rows, held_out, batch_of = open_demos(run, tokenizer)
    check_context(run, policy, rows)
    reward_optimizer = open_optimizer(cfg, reward_model, lr=cfg.reward_lr)
    value_model = policy.with_scalar_head() if cfg.policy_step == "ppo" else None
    optimizer = open_optimizer(cfg, policy, value_model)
    models = {"policy": policy, "reward_model": reward_model} | ({"value_model": value_model} if value_model else {})
    run.register(**models, **(frozen if begin_round else {}), optimizer=optimizer, reward_optimizer=reward_optimizer)
    first_look(run, tokenizer, rows, batch_of(rows, batch_rows(len(rows), cfg.batch_size, 0, cfg.seed)), models | frozen)
    check_sampler(run, tokenizer, [row[0] for row in rows[:3]], policy=policy, ref=list(frozen.values())[-1])

    plan, counts = plan_turns(cfg)
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_nll(policy, held_out, batch_of, cfg), tau=cfg.tau, reward_model=reward_model)

    for k in run.steps(cfg.steps):
        t, of_reward, nth = plan[k]  # the nth step of its kind
        if begin_round and (k == 0 or t != plan[k - 1][0]):
            begin_round(reward_optimizer)
        picked = batch_rows(len(rows), cfg.batch_size if of_reward else cfg.batch_size // per_prompt, nth, (cfg.seed, of_reward))
        prompts_ids, seed = [rows[row][0] for row in picked], derive_seed(run.method, cfg.seed, k)
        losses, stats = [], Mean()
        if of_reward:
            answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=tokenizer.eos_id, seed=seed)
            set_lr(reward_optimizer, lr_at(nth, lr=cfg.reward_lr, steps=counts[True], warmup=cfg.warmup, schedule=cfg.schedule))
            reward_optimizer.zero_grad()
            both = [(*rows[i], own) for i, own in zip(picked, answers.completions, strict=True)]  # prompt, demonstration, own answer
            for micro in micro_batches(range(len(both)), both, cfg):
                own = collate([both[i][0] for i in micro], [both[i][2] for i in micro], pad_id=tokenizer.pad_id)
                loss, micro_stats = reward_step(batch_of(both, micro), own.to(run.device))
                share = len(micro) / len(both)  # the loss is a mean over rows: a micro-batch is weighted by its number of rows
                loss = loss * share
                loss.backward()
                losses.append(loss.detach())
                stats.add(micro_stats, weight=share)
            total = run.sum(losses)
            grad_norm = clip_grad_norm_(reward_model.parameters(), cfg.max_grad_norm)
            if run.may_update(k, reward_model, picked, total, grad_norm, of="reward"):
                reward_optimizer.step()
            metrics = {"completions/mean_length": answers.lengths.float().mean(), "completions/finished": answers.finished.float().mean()}
        else:  # one rollout; update() then yields the loss of each micro-batch in each epoch
            metrics, epochs, update = policy_update(value_model, prompts_ids, seed)
            set_lr(optimizer, lr_at(nth, lr=cfg.lr, steps=counts[False], warmup=cfg.warmup, schedule=cfg.schedule))
            total = 0.0
            for epoch in range(epochs):
                optimizer.zero_grad()
                losses = []
                for loss, share in update(epoch, stats):
                    loss = loss * share
                    loss.backward()
                    losses.append(loss.detach())
                epoch_total = run.sum(losses)
                grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                critic_norm = clip_grad_norm_(value_model.parameters(), cfg.max_grad_norm) if value_model else 0.0
                total += epoch_total / epochs
                suspect = value_model if value_model and grad_norm.isfinite() else policy  # may_update looks here for non-finite gradients
                if not run.may_update(k, suspect, picked, epoch_total, grad_norm + critic_norm):
                    break  # the other epochs of this rollout would fail in the same way
                optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "round": t, **stats.result()}
        metrics["lr"] = (reward_optimizer if of_reward else optimizer).param_groups[0]["lr"]
        run.end_of_step(k, metrics)
    run.export(reward_model, tokenizer, "reward")
    return run.close(policy, tokenizer)


def main(cfg):
    """Run the method and return the run folder. The learned reward is saved beside the policy, in reward/."""
    run = Run("rft", cfg)
    cfg = run.cfg
    if cfg.loss not in ("linear", "bt") or cfg.policy_step not in ("rloo", "ppo", "grpo", "rebel"):
        raise BadInput(f"--loss {cfg.loss} --policy_step {cfg.policy_step}: expected linear or bt, and rloo, ppo, grpo or rebel")
    check_rounds(cfg, completions_per_prompt(cfg))
    policy, tokenizer = open_policy(run)
    ref, reward_model = frozen_copy(policy), constant_reward(policy, cfg)

    def reward_of(answers):
        return in_micro(lambda micro: score(reward_model, micro), answers, cfg.micro_batch)  # (B,)

    def policy_update(value_model, prompts_ids, seed):
        return policy_alignment(policy, value_model, ref, prompts_ids, reward_of, cfg, tokenizer.eos_id, seed)

    return alternate(
        run, policy, tokenizer, reward_model, {"ref": ref}, per_prompt=completions_per_prompt(cfg), policy_update=policy_update,
        reward_step=lambda demos, samples: step(reward_model, demos, samples, cfg),
    )
