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

from minialign.batch import Pairs, collate
from minialign.engine.common import BadInput, in_micro, split_micro
from minialign.engine.opening import open_policy
from minialign.engine.run import Run
from minialign.lora import frozen_copy
from minialign.methods import best_of_n, dpo
from minialign.methods.rft import align, alternate, check_rounds, completions_per_prompt, constant_reward, reward_alignment_loss
from minialign.rewards import rollout_stats, score
from minialign.settings import OnDemonstrations


@dataclass
class Config(OnDemonstrations):
    mode: str = "linear"            # what a round does to the reward: linear, accumulate or literal
    anchor: str = "initial"         # the reference of the policy step: initial, or current (the policy that began the round)
    beta: float = 1.0               # β: the pull to the reference, in units of reward
    rounds: int = 12                # number of rounds, each with steps of the reward and then steps of the policy
    reward_share: float = 0.4       # share of a round's steps that train the reward; the others train the policy. 1 = reward only
    bound: float = 6.0              # R: rewards lie in [0, R]; 0 = unbounded
    ridge: float = 0.0              # weight of the squared rewards (linear), or of their squared increase in the round
    read: str = "sum"               # the reward of a completion: sum (over its tokens) or last (at its last token)
    reward_lr: float = 5e-4         # peak learning rate of the reward
    policy_step: str = "rloo"       # ppo, rloo, grpo, rebel, bon_sft or bon_dpo
    group_size: int = 4             # completions of each prompt in rloo and grpo
    n: int = 8                      # completions of each prompt in bon_sft and bon_dpo
    tau: float = 1.0                # sampling temperature, and that of every log-prob here (bon_sft, bon_dpo: log-probs are at 1)
    steps: int = 120                # steps of all rounds together, of the reward and of the policy
    batch_size: int = 32            # demonstrations per reward step, completions per policy step
    lr: float = 3e-4                # peak learning rate of the policy's AdamW (for models with billions of weights: 1e-6)
    schedule: str = "linear"
    warmup: float = 0.0
    log_every: int = 10
    eval_every: int = 20
    save_every: int = 50


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


def select_best(policy, anchor, prompts_ids, reward_of, cfg, tokenizer, seed):
    """Policy step by selection: n completions of each prompt, the best imitated (bon_sft) or preferred to the worst (bon_dpo).

    Returns the same three as rft.align. If all n have equal rewards, best and worst are the same completion, and DPO's gradient is 0.
    """
    answers = best_of_n.rollout(policy, prompts_ids, cfg, tokenizer.eos_id, seed)
    rewards = reward_of(answers).view(-1, cfg.n)  # (N, n)

    def rows(picked):  # (N,) places within the groups -> Batch
        completions = [answers.completions[b * cfg.n + i] for b, i in enumerate(picked.tolist())]
        return collate(prompts_ids, completions, pad_id=tokenizer.pad_id).to(rewards.device)

    best, worst = rows(best_of_n.pick(rewards)), rows(best_of_n.pick(-rewards))
    metrics = rollout_stats(rewards.flatten(), answers, group_size=cfg.n) | {"reward/best": rewards.amax(1).mean()}

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
    """Run it; returns the run folder. The learned reward lies beside the policy, in reward/. The loop is rft.alternate."""
    run = Run("irl", cfg)
    cfg = run.cfg
    if cfg.mode not in ("linear", "accumulate", "literal") or cfg.anchor not in ("initial", "current"):
        raise BadInput(f"--mode {cfg.mode} --anchor {cfg.anchor}: expected linear, accumulate or literal, and initial or current")
    if cfg.policy_step not in ("ppo", "rloo", "grpo", "rebel", "bon_sft", "bon_dpo"):
        raise BadInput(f"--policy_step {cfg.policy_step}: must be ppo, rloo, grpo, rebel, bon_sft or bon_dpo")
    selecting = cfg.policy_step.startswith("bon")
    per_prompt = cfg.n if selecting else completions_per_prompt(cfg)
    check_rounds(cfg, per_prompt)
    policy, tokenizer = open_policy(run)
    anchor, reward_model = frozen_copy(policy), constant_reward(policy, cfg)
    base = frozen_copy(reward_model)  # r_{k−1}; with mode literal, the reward that every round begins from

    def begin_round(reward_optimizer):
        if cfg.mode == "literal":
            reward_model.load_state_dict(base.state_dict())
        else:
            base.load_state_dict(reward_model.state_dict())
        if cfg.mode != "linear":
            reward_optimizer.state.clear()  # a new problem
        if cfg.anchor == "current":
            anchor.load_state_dict(policy.state_dict())

    def reward_of(answers):
        rewards = in_micro(lambda micro: score(reward_model, micro), answers, cfg.micro_batch)  # (B,)
        return rewards - in_micro(lambda micro: score(base, micro), answers, cfg.micro_batch) if cfg.anchor == "current" else rewards

    def policy_update(value_model, prompts_ids, seed):
        if selecting:
            return select_best(policy, anchor, prompts_ids, reward_of, cfg, tokenizer, seed)
        return align(policy, value_model, anchor, prompts_ids, reward_of, cfg, tokenizer.eos_id, seed)

    return alternate(
        run, policy, tokenizer, reward_model, {"base": base, "anchor": anchor}, per_prompt=per_prompt, begin_round=begin_round,
        reward_step=lambda demos, samples: step(reward_model, base, demos, samples, cfg), policy_update=policy_update,
    )
