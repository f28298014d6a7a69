"""Iterative inverse reinforcement learning (IRL) from demonstrations. "From Demonstrations to Rewards" (under review at ICLR 2025),
Algorithm 1, Eq. 10 and 11.

    L(φ)    = E_{(x,y)~D, ỹ~π_k(·|x)}[ log(1 + e^{−(s_φ(x,y) − s_φ(x,ỹ))}) ],     s_φ = r_φ − r_{k−1}         (accumulate)
    π_{k+1} = argmax_π E_π[r_φ(x, y)] − β·KL(π‖ref)

Symbols  y: demonstration → demo; ỹ: the policy's own answer → sample; r_φ: rewards → *_rewards (B,); r_{k−1}: the reward when the round
         began → base_*_rewards; π_k: the policy at that time; rounds: how often reward and policy alternate.
Idea     Train a reward model to tell demonstrations from the policy's own answers, and train the policy on that reward. Repeat with the
         answers of the new policy. So demonstrations alone give a reward model and a policy.
Differs  from rft.py: its Bradley-Terry loss is on what a round adds; anchor chooses the reference; the policy step may select samples.
Details  mode says what a round does to the reward.
           linear      the gradient of the likelihood itself (Eq. 10; rft.py's loss). The same reward is trained on, a few steps per round.
           accumulate  the arg min of Eq. 11 for what the round adds: r_φ starts at r_{k−1}, and the loss is on its increase.
           literal     Algorithm 1 as printed: each round starts a new reward and forgets the one before.
         Why literal fails: the arg min of Eq. 11 is log E/π_k (E: the expert), relative to the current policy, not to ref. With β = 1 a
         policy step from ref gives ref·E/π_k: E when π_k is ref, ref when π_k is E, and so on forever (few steps per round hide it).
         anchor="current": the KL is to the policy at the start of the round, and the policy is rewarded only with r_φ − r_{k−1}.
         policy_step: ppo (the paper's for summaries), rloo, grpo, rebel, bon_sft (maximum likelihood on the best of n, no β) or bon_dpo
         (DPO on best over worst; the code calls it Best-of-N). These two use only the order of the rewards, at full strength even if
         rewards hardly differ. They never converge, no law below holds, and after some rounds they do harm: stop early.
Law      For exact steps and rewards that do not reach their bound (rft.py has the law if they do). linear converges to E. accumulate, or
         anchor="current": π ∝ π_k·(E/π_k)^{1/β}. So each round multiplies log π/E by 1 − 1/β, which leads to E if β > ½, in one round if
         β = 1. literal: π ∝ ref·(E/π_k)^{1/β}. This alternates between ref and E if β = 1, swings ever wider if β < 1, and converges to
         E^{1/(1+β)}·ref^{β/(1+β)} if β > 1 (toy/closed_form.py, rounds_law).
Checked  tests/methods/test_irl.py (gradients by enumeration, the regimes), toy/three_actions.py, toy/tiny_language.py (a GPT, sampled).

    python -m minialign irl                                                  # built-in task, laptop CPU
    python -m minialign irl --mode literal --rounds 6 --steps 360 --schedule constant      # kl at the end of a round: up, down, up, …
    python -m minialign irl --demos demos.jsonl --policy runs/sft/final --policy_step bon_dpo --anchor current --rounds 2 --steps 40
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minialign.batch import Pairs, collate
from minialign.engine.common import BadInput, in_micro
from minialign.engine.opening import open_policy
from minialign.engine.run import Run
from minialign.lora import frozen_copy
from minialign.methods import best_of_n, dpo
from minialign.methods.rft import alternate, check_rounds, completions_per_prompt, constant_reward, policy_alignment, reward_alignment_loss
from minialign.rewards import rollout_stats, score
from minialign.sample import sample
from minialign.settings import OnDemonstrations


@dataclass
class Config(OnDemonstrations):
    mode: str = "linear"            # what a round does to the reward: linear, accumulate or literal
    anchor: str = "initial"         # the reference of the policy step: initial, or current (the policy at the start of the round)
    beta: float = 1.0               # β: strength of the pull to the reference, in units of reward
    rounds: int = 12                # number of rounds, each with reward steps, then policy steps
    reward_share: float = 0.4       # share of a round's steps that train the reward; the others train the policy. 1 = reward only
    bound: float = 6.0              # R: rewards lie in [0, R]; 0 = unbounded
    ridge: float = 0.0              # weight of the squared rewards (linear), or of their squared increase in the round (other modes)
    read: str = "sum"               # the reward of a completion: sum (over its tokens) or last (at its last token)
    reward_lr: float = 5e-4         # peak learning rate of the reward
    policy_step: str = "rloo"       # ppo, rloo, grpo, rebel, bon_sft or bon_dpo
    group_size: int = 4             # completions of each prompt in rloo and grpo
    n: int = 8                      # completions of each prompt in bon_sft and bon_dpo
    tau: float = 1.0                # temperature of sampling and of log-probs (bon_sft, bon_dpo: log-probs are at 1)
    steps: int = 120                # reward and policy steps of all rounds together
    batch_size: int = 32            # demonstrations per reward step, completions per policy step
    lr: float = 3e-4                # peak learning rate of the policy (for models with billions of weights: 1e-6)
    schedule: str = "linear"
    warmup: float = 0.0
    log_every: int = 10
    eval_every: int = 20
    save_every: int = 50


def irl_loss(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards, *, ridge=0.0):
    """All inputs (B,). The base rewards are constants; they are 0 for Eq. 11 as printed. Returns the scalar loss, stats."""
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
    """Reward step: compute the loss of one batch. Only this function connects the reward model and its equation."""
    demo_rewards, sample_rewards = score(reward_model, demos), score(reward_model, samples)  # (B,)
    if cfg.mode == "linear":
        return reward_alignment_loss(demo_rewards, sample_rewards, beta=cfg.beta, ridge=cfg.ridge)
    with torch.no_grad():  # what the rounds before have learned is constant in this one
        base_demo_rewards, base_sample_rewards = score(base, demos), score(base, samples)
    return irl_loss(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards, ridge=cfg.ridge)


def select_best(policy, anchor, prompts_ids, reward_of, cfg, tokenizer, seed):
    """Policy step by selection: sample n completions of each prompt; imitate the best (bon_sft) or prefer it to the worst (bon_dpo).

    Returns what rft.policy_alignment returns. If all n rewards are equal, best and worst are the same completion: DPO's gradient is 0.
    """
    answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=cfg.n, eos_id=tokenizer.eos_id, seed=seed)
    rewards = reward_of(answers).view(-1, cfg.n)  # (N, n)

    def rows(picked):  # (N,) indices within the groups -> Batch
        completions = [answers.completions[b * cfg.n + i] for b, i in enumerate(picked.tolist())]
        return collate(prompts_ids, completions, pad_id=tokenizer.pad_id).to(rewards.device)

    best, worst = rows(best_of_n.pick(rewards)), rows(best_of_n.pick(-rewards))
    lengths = [max(sizes) for sizes in zip(best.sizes, worst.sizes, strict=True)]
    tied = (rewards == rewards[:, :1]).all()
    metrics = rollout_stats(rewards.flatten(), answers, group_size=cfg.n) | {"reward/best": rewards.amax(1).mean()}

    def update(epoch, stats):
        for micro, micro_worst in zip(*[x.micro_batches(cfg.micro_batch, lengths=lengths) for x in (best, worst)], strict=True):
            if cfg.policy_step == "bon_sft":
                loss, micro_stats = best_of_n.step(policy, micro, cfg)
            else:
                loss, micro_stats = dpo.step(policy, anchor, Pairs(micro, micro_worst), dpo.Config(beta=cfg.beta))
                loss = torch.where(tied, loss.detach(), loss)  # if all pairs are ties, the gradient is exactly 0, not a rounding error
                micro_stats = {name.replace("rewards/", "implicit/"): value for name, value in micro_stats.items()}  # not the learned one
            stats.add(micro_stats, weight=micro.mask.sum() if cfg.policy_step == "bon_sft" else len(micro))
            yield loss, len(micro) / len(best)

    return metrics, 1, update


def main(cfg):
    """Run the method and return the run folder. The learned reward is saved beside the policy, in reward/. The loop is rft.alternate."""
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
    base = frozen_copy(reward_model)  # r_{k−1}; in mode literal, the reward that every round starts from

    def begin_round(reward_optimizer):
        if cfg.mode == "literal":
            reward_model.load_state_dict(base.state_dict())
        else:
            base.load_state_dict(reward_model.state_dict())
        if cfg.mode != "linear":
            reward_optimizer.state.clear()  # the round fits a new problem
        if cfg.anchor == "current":
            anchor.load_state_dict(policy.state_dict())

    def reward_of(answers):
        rewards = in_micro(lambda micro: score(reward_model, micro), answers, cfg.micro_batch)  # (B,)
        return rewards - in_micro(lambda micro: score(base, micro), answers, cfg.micro_batch) if cfg.anchor == "current" else rewards

    def policy_update(value_model, prompts_ids, seed):
        if selecting:
            return select_best(policy, anchor, prompts_ids, reward_of, cfg, tokenizer, seed)
        return policy_alignment(policy, value_model, anchor, prompts_ids, reward_of, cfg, tokenizer.eos_id, seed)

    return alternate(
        run, policy, tokenizer, reward_model, {"base": base, "anchor": anchor}, per_prompt=per_prompt, begin_round=begin_round,
        reward_step=lambda demos, samples: step(reward_model, base, demos, samples, cfg), policy_update=policy_update,
    )
