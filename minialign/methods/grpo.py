"""Group relative policy optimisation (GRPO). Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, Eq. 3-4.

What this deletes from the paper, and why:
    1. training the reward model between iterations, with replay of old data. The reward here is any fixed function: a rule or a model.
    2. rewards for single reasoning steps (process supervision). A completion has one reward, so all of its tokens have one advantage.
    3. several updates on one rollout: epochs is 1 by default, as in the paper's experiments. Then the ratio is 1 and the clip never acts.

    L(θ) = −(1/B) Σ_i (1/|y_i|) Σ_t [ min( ρ_{i,t}·A_i, clip(ρ_{i,t}, 1 − ε, 1 + ε)·A_i ) − β·k3_{i,t} ],
           A_i = (r_i − mean of its group) / (std of its group + std_eps),      k3 = π_ref/π_θ − 1 − log π_ref/π_θ

Symbols  G → group_size, A → advantages (B,), ρ = π_θ/π_old of each token → ratio (B, T), |y| → tokens of a completion.
Idea     PPO without a critic. Sample several answers to a prompt: their mean reward replaces the learned value, and their standard
         deviation sets the scale of the rewards.
Differs  from rloo.py: the mean contains the sample itself, the advantage is divided by a standard deviation, the ratio is per token, and
         the KL is a term of the loss instead of a part of the reward. From ppo.py: no critic, one advantage for all tokens of a completion.
Details  **The trap of k3.** Its value is an unbiased estimate of KL(π‖ref), but its gradient is not the gradient of that KL. For k3 of
         whole completions it is the gradient of the reverse divergence, KL(ref‖π). Per token it also ignores that a token changes the KL
         of later tokens. So GRPO does not maximise E[r] − β·KL; its law is below. For the maximiser π*, use rloo.py, or k1 in the reward.
         aggregate: with "grpo", the paper's, all completions weigh the same, so a token of a long one weighs less (a long wrong answer is
         punished less per token). With "dapo" (arXiv:2503.14476) all tokens have equal weight. "dr_grpo" (arXiv:2503.20783) divides by a
         constant, B·max_new, usually with --no-normalize. Its expected gradient then is that of E[r] up to a factor (dapo: for large B).
         A group with equal rewards has advantages of exactly 0, not 0/0; `frac_reward_zero_std` is the share of such groups. ddof = 1 is
         the sample standard deviation (TRL), 0 the population's: in a group of two the advantages are ±0.707 or ±1.
         Because the mean contains the sample itself, an advantage is (G − 1)/G times the leave-one-out one. The KL term is not scaled by
         that factor, so without normalize the effective pull is β·G/(G − 1).
         --rounds is the paper's outer loop: at the start of each round ref becomes the policy so far. The learning rate goes on as planned.
         At ratio 1 the surrogate is 0 ("grpo") or a multiple of the covariance of advantage and length (the others): it shows no progress.
Law      Without normalize and with dr_grpo: π(a|s) = β'·ref(a|s) / (c_s + β' − Q(s, a)), with β' = β·G/(G − 1), Q = E_π[r | s, a] and the
         c_s for which it sums to 1 (a: token after prefix s), from the last token backwards (token_k3_law of toy/closed_form.py). The
         paper's form with G → ∞ has the same law with A/|y| for r and β/|y| for β (group_normalised_law). Dividing by the standard
         deviation makes the pull about β·std_π(r), so π is sharper than without it if std_π(r) < 1 at the fixed point. None of these is π*.
         After T rounds, each trained to its end: the law applied T times, each time to the result of the round before.
Checked  tests/methods/test_grpo.py (hand numbers, aggregates, gradients by enumeration), toy/tiny_language.py (the laws).

    python -m minialign grpo                                                 # built-in task, laptop CPU
    python -m minialign grpo --prompts gsm8k_train.jsonl --reward exact_match --policy runs/sft/final
    python -m minialign grpo --aggregate dr_grpo --no-normalize              # "GRPO done right"
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import masked_mean
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer
from minialign.engine.run import Run
from minialign.evaluate import held_out_reward
from minialign.kl import k3, moved
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import rollout_stats
from minialign.sample import rollout
from minialign.settings import OnPrompts


@dataclass
class Config(OnPrompts):
    beta: float = 0.05              # β: weight of k3, the pull to ref; 0 lets the policy go anywhere
    eps: float = 0.2                # ε: how far the ratio of a token may move in the updates on one rollout; matters with epochs > 1
    group_size: int = 8             # G: completions of each prompt
    normalize: bool = True          # divide the advantages of a group by the standard deviation of its rewards
    ddof: int = 1                   # 1: the sample standard deviation, 0: the population's
    std_eps: float = 1e-4           # added to the standard deviation before dividing by it
    aggregate: str = "grpo"         # how token losses become one number: grpo, dapo or dr_grpo
    epochs: int = 1                 # updates on the same completions
    rounds: int = 1                 # the steps are divided into rounds; each takes the policy so far as its reference


def group_advantages(rewards, *, group_size, normalize=True, ddof=1, std_eps=1e-4):
    """rewards: (B,), the G of one prompt adjacent -> advantages (B,): (reward − mean) / (std + std_eps) within its group.

    ddof: 1 for the sample standard deviation, 0 for the population's. A group with equal rewards gives exactly 0.
    """
    assert rewards.dim() == 1 and group_size >= 2 and len(rewards) % group_size == 0, (rewards.shape, group_size)
    groups = rewards.view(-1, group_size)  # (N, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(1, correction=ddof, keepdim=True) + std_eps)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)  # the mean of equal numbers may be off by a rounding error
    return torch.where(equal, 0, advantages).flatten()


def aggregate_tokens(losses, mask, aggregate, max_len):
    """losses (B, T), 0 where masked -> a scalar. For [1, 1] and [2, 2, 2, 2], max_len 4: grpo 1.5, dapo 10/6, dr_grpo 10/8."""
    if aggregate == "grpo":  # mean over the tokens of a completion, then over completions
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if aggregate == "dapo":  # mean over all tokens
        return losses.sum() / mask.sum().clamp(min=1)
    if aggregate == "dr_grpo":  # sum over tokens, divided by a constant
        return losses.sum() / (len(losses) * max_len)
    raise BadInput(f"--aggregate {aggregate} is unknown: use grpo, dapo or dr_grpo")


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, *, eps, beta, aggregate="grpo", max_len=None):
    """logps, old_logps, ref_logps, mask: (B, T); advantages: (B,), constants. max_len: the constant of dr_grpo, in tokens.

    Returns the scalar loss, stats. Raises BadInput for another aggregate.
    """
    assert logps.dim() == 2 and logps.shape == old_logps.shape == ref_logps.shape == mask.shape and advantages.shape == logps.shape[:1]
    mask, advantages = mask.bool(), advantages.detach()[:, None]  # (B, T), (B, 1) one advantage for all tokens of a completion
    ratio = torch.where(mask, logps - old_logps.detach(), 0).exp()  # (B, T)
    clipped = ratio.clamp(1 - eps, 1 + eps)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    kl = k3(torch.where(mask, logps, 0), torch.where(mask, ref_logps.detach(), 0))  # (B, T), not detached
    losses = torch.where(mask, beta * kl - surrogate, 0)
    stats = {"ratio": masked_mean(ratio, mask),
             "clip_ratio/region_mean": masked_mean((clipped * advantages < ratio * advantages).to(ratio), mask)}
    return aggregate_tokens(losses, mask, aggregate, max_len), {name: value.detach() for name, value in stats.items()}


def step(policy, answers, cfg, *, on_policy):
    """Compute the loss of one batch of completions. Only this function connects policy and equation.

    on_policy: no update since sampling, so the old log-probs are set to those of this forward pass and the ratio is exactly 1.
    """
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    if on_policy:
        answers.old_logps.copy_(logps.detach())
    loss, stats = grpo_loss(
        logps, answers.old_logps, answers.ref_logps, answers.advantages, answers.mask,
        eps=cfg.eps, beta=cfg.beta, aggregate=cfg.aggregate, max_len=cfg.max_new,
    )
    assert not (on_policy and moved(logps, answers.old_logps)), "the policy that samples is not the one that is trained"
    return loss, {**stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("grpo", cfg)
    cfg = run.cfg
    if cfg.group_size < 2:
        raise BadInput("--group_size 1: the mean of one reward is that reward, so the advantage is always 0; use at least 2")
    if cfg.aggregate not in ("grpo", "dapo", "dr_grpo"):
        raise BadInput(f"--aggregate {cfg.aggregate}: must be grpo, dapo or dr_grpo")
    if cfg.ddof not in (0, 1):
        raise BadInput(f"--ddof {cfg.ddof}: must be 1 (sample) or 0 (population)")
    if cfg.rounds > cfg.steps:
        raise BadInput(f"--rounds {cfg.rounds}: there are only {cfg.steps} steps to divide into rounds")
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    ref = frozen_copy(policy)
    optimizer = open_optimizer(cfg, policy)
    run.register(policy=policy, optimizer=optimizer, **({"ref": ref} if cfg.rounds > 1 else {}))
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": ref})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    for k in run.steps(cfg.steps):
        if k and k * cfg.rounds // cfg.steps != (k - 1) * cfg.rounds // cfg.steps:  # a round begins
            ref.load_state_dict(policy.state_dict())
        picked = batch_rows(len(rows), cfg.batch_size // cfg.group_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        seed = derive_seed("grpo", cfg.seed, k)
        answers = rollout(policy, ref, prompts_ids, cfg, n=cfg.group_size, eos_id=tokenizer.eos_id, seed=seed)
        rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B,)
        if rewards is None:
            continue
        metrics = rollout_stats(rewards, answers, group_size=cfg.group_size)
        how = dict(group_size=cfg.group_size, normalize=cfg.normalize, ddof=cfg.ddof, std_eps=cfg.std_eps)
        answers.advantages = group_advantages(rewards, **how)  # (B,)
        micros = answers.micro_batches(cfg.micro_batch)

        set_lr(optimizer, lr_at(k, lr=cfg.lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        total, stats = 0.0, Mean()
        for epoch in range(cfg.epochs):
            optimizer.zero_grad()
            losses = []
            for micro in micros:
                loss, micro_stats = step(policy, micro, cfg, on_policy=epoch == 0)
                share = len(micro) / len(answers)  # weighted by completions, or by tokens where the loss is a mean over tokens
                if cfg.aggregate == "dapo":
                    share = sum(map(len, micro.completions)) / sum(map(len, answers.completions))
                loss = loss * share
                loss.backward()
                losses.append(loss.detach())
                stats.add(micro_stats, weight=micro.mask.sum())  # means over tokens
            epoch_total = run.sum(losses)
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            total += epoch_total / cfg.epochs
            if not run.may_update(k, policy, picked, epoch_total, grad_norm):
                break  # the other epochs of this rollout would fail in the same way
            optimizer.step()

        metrics |= {"loss": total, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"], **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
