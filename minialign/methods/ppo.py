"""Proximal policy optimisation (PPO). Schulman et al. 2017, arXiv:1707.06347, Eq. 7 and 11; for language models Ouyang et al. 2022,
arXiv:2203.02155, with the details of Huang et al. 2024 ("N+ implementation details"), arXiv:2403.17031.

What this deletes from the papers, and why:
    1. one network for policy and value (Eq. 9). The critic is a model of its own with its own learning rate, so there is no weight c1.
    2. the entropy bonus (Eq. 9). The pull to ref already keeps the policy from collapsing; N+ has no bonus either. Entropy is logged.
    3. mini-batches within an epoch. Each epoch is one update on the whole rollout (N+ has one mini-batch too).

    L(θ) = −E_t[ min( ρ_t·A_t, clip(ρ_t, 1 − ε, 1 + ε)·A_t ) ] + κ·KL(π_old‖π_θ),          ρ_t = π_θ(y_t|x, y_<t) / π_old(y_t|x, y_<t)
    L(φ) = ½·E_t[ max( (V_t − G_t)², (V_old,t + clip(V_t − V_old,t, ±ε_V) − G_t)² ) ],            V_t = V_φ(x, y_<t)
           δ_t = r_t + γ·V_old,t+1 − V_old,t,      A_t = Σ_l (γλ)^l δ_{t+l},      G_t = A_t + V_old,t,      V beyond the end = 0

Symbols  r_t = −β·k1_t, plus the reward of the completion at its last token → token_rewards (B, T); A → advantages, G → returns,
         V → values (B, T), the value of the prefix before token t; ρ → ratio (B, T).
Idea     Every token is an action. A critic learns the expected return of each prefix, so each token is credited with the change it caused.
         The clip allows several updates on one rollout: it removes the gradient of tokens whose ratio has moved far enough.
Differs  from rloo.py: advantages per token from a learned value, not per completion from the other samples; ratio and clip per token.
         From grpo.py: the KL is in the reward, where it gives the right gradient.
Details  The critic is a copy of the policy's trunk under a new scalar head, or a whole reward model (--value). A new head is random, as
         in N+: under a head of zeros the trunk would get no gradient at first.
         The reward is at the last real token: EOS, or where max_new cut. V = 0 after it, without bootstrapping. (N+: one slot after EOS.)
         missing_eos is subtracted from the reward of a completion without EOS (TRL). N+ replaces the reward by −1 instead.
         λ = 1: A_t is the Monte-Carlo return minus V, unbiased for any V (γ = 1, no whitening). λ < 1: less noise, biased while V is wrong.
         Advantages are whitened over the rollout's real tokens, with the population variance, after the returns are computed. The old
         log-probs are those of the first epoch's own forward pass, so the ratio starts at exactly 1, and at first nothing is clipped.
         --penalty is κ (Eq. 8; 0 by default), beside the clip, or in its place with --eps 1000. The KL is estimated by k3, over π_old's own
         tokens; --target_kl adapts κ by its value before the last update. --ptx adds −ptx·log π per token of a text (Ouyang et al., Eq. 2).
Law      π* ∝ ref·e^{r/β}, the maximiser of E_π[r] − β·KL(π‖ref), for γ = 1 and any κ; clip and critic errors make it noisier than rloo.py.
         One rollout with κ alone, solved exactly, gives κ·π_old/(c − A). With ptx and --no-whiten it is ptx_law of toy/closed_form.py, if
         the texts are answers behind their prompts and as long as the completions.
Checked  tests/methods/test_ppo.py (GAE by hand, with any and with exact values, clips), toy/tiny_language.py (the law).

    python -m minialign ppo                                                  # built-in task, laptop CPU
    python -m minialign ppo --prompts prompts.jsonl --policy runs/sft/final --reward runs/reward_model/final --value runs/reward_model/final
"""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from minialign.batch import masked_mean, whiten
from minialign.engine.common import BadInput, Mean, batch_rows, derive_seed, in_micro, lr_at, set_lr
from minialign.engine.look import first_rollout
from minialign.engine.opening import open_online, open_optimizer, open_texts, open_value_model
from minialign.engine.run import Run
from minialign.evaluate import held_out_reward
from minialign.kl import adapted, moved, shape_rewards
from minialign.logps import token_logps
from minialign.lora import frozen_copy
from minialign.rewards import explained_variance, rollout_stats, values_of
from minialign.sample import rollout
from minialign.settings import OnPrompts


@dataclass
class Config(OnPrompts):
    beta: float = 0.05              # β: the pull to ref; 0 lets the policy go anywhere
    gamma: float = 1.0              # γ: discount per token; below 1 the fixed point is not π*
    lam: float = 0.95               # λ: 1 uses all later rewards, 0 only the token's own and the critic's value of the next prefix
    eps: float = 0.2                # ε: how far the ratio of a token may move in the updates on one rollout
    eps_value: float = 0.2          # ε_V: how far a value may move in the updates on one rollout
    whiten: bool = True             # shift and scale the advantages of a rollout to mean 0 and variance 1
    penalty: float = 0.0            # κ: weight of the KL to the policy that sampled; with --target_kl its first value
    target_kl: float = 0.0          # adapt κ to this KL per token in the last epoch of a rollout, in nats; 0 keeps κ constant
    ptx: float = 0.0                # weight of −log π of the texts in --text, batch_size rows a rollout, a mean over tokens
    text: str = "builtin"           # with --ptx: builtin, a .txt, or a JSONL/JSON(.gz) file
    epochs: int = 4                 # updates on the same completions
    value: str = "policy"           # what the critic starts as: the policy's trunk (policy), or a reward model's folder or hub name
    value_lr: float = 1e-3          # the critic's peak learning rate
    steps: int = 60                 # rollouts, each with `epochs` updates
    batch_size: int = 64            # completions per step, one of each prompt


def policy_loss(logps, old_logps, advantages, mask, *, eps, penalty=0.0):
    """All inputs (B, T); advantages are constants. Returns the loss, a mean over the tokens in the mask, and stats."""
    assert logps.dim() == 2 and logps.shape == old_logps.shape == advantages.shape == mask.shape, (logps.shape, advantages.shape)
    logratio = torch.where(mask.bool(), logps - old_logps.detach(), 0)  # (B, T)
    ratio, advantages = logratio.exp(), advantages.detach()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    loss = masked_mean(-torch.minimum(ratio * advantages, clipped * advantages), mask)
    approx_kl = masked_mean(torch.expm1(logratio) - logratio, mask)  # k3 of KL(old‖π): the old policy drew the tokens
    stats = {
        "ratio": masked_mean(ratio, mask),
        "clip_ratio/region_mean": masked_mean((clipped * advantages < ratio * advantages).to(ratio), mask),
        "approx_kl": approx_kl}
    return loss + penalty * approx_kl if penalty else loss, {name: value.detach() for name, value in stats.items()}


def value_loss(values, old_values, returns, mask, *, eps):
    """All inputs (B, T); old_values and returns are constants. Returns the loss, a mean over the tokens in the mask, and stats."""
    assert values.dim() == 2 and values.shape == old_values.shape == returns.shape == mask.shape, (values.shape, returns.shape)
    old_values, returns = old_values.detach(), returns.detach()
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    loss = 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)
    # Within ±eps `clipped` may differ from `values` by a rounding error, which is not clipping.
    acts = ((values - old_values).abs() > eps) & ((clipped - returns) ** 2 > (values - returns) ** 2)
    return loss, {"value_clip_ratio": masked_mean(acts.to(values), mask).detach(), "loss/value": loss.detach()}


def gae(token_rewards, values, mask, *, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, Eq. 16): all (B, T) -> advantages, returns (B, T).

    The tokens in a row's mask are adjacent. The value after the last of them is 0. Both results are 0 where mask is False.
    """
    assert token_rewards.dim() == 2 and token_rewards.shape == values.shape == mask.shape, (token_rewards.shape, values.shape)
    mask, values = mask.bool(), torch.where(mask.bool(), values.detach(), 0)
    advantages, following = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)  # (B, T) V of the state after token t
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_values[:, t] - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0)  # (B,)
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, 0)


def rollout_with_values(policy, value_model, ref, prompts_ids, cfg, eos_id, seed):
    """A Rollout of one completion of each prompt, with ref's log-probs and the critic's value of each prefix, (B, T). All are constants."""
    answers = rollout(policy, ref, prompts_ids, cfg, eos_id=eos_id, seed=seed)
    answers.values = in_micro(lambda micro: values_of(value_model, micro), answers, cfg.micro_batch)
    return answers


def credit(answers, rewards, cfg):
    """Fill in a rollout's advantages and returns, (B, T), from the rewards of its completions, (B,)."""
    token_rewards = shape_rewards(rewards, answers.old_logps, answers.ref_logps, answers.mask, beta=cfg.beta)
    answers.advantages, answers.returns = gae(token_rewards, answers.values, answers.mask, gamma=cfg.gamma, lam=cfg.lam)
    if cfg.whiten:
        answers.advantages = whiten(answers.advantages, answers.mask)


def step(policy, value_model, answers, cfg, *, on_policy, penalty=0.0):
    """Compute both losses of one batch of completions. Only this function connects models and equations.

    on_policy: no update since sampling, so the old log-probs are set to those of this forward pass and the ratio is exactly 1.
    """
    logps, entropy = token_logps(policy, answers, tau=cfg.tau, entropy=True)  # (B, T)
    if on_policy:
        answers.old_logps.copy_(logps.detach())
    loss, stats = policy_loss(logps, answers.old_logps, answers.advantages, answers.mask, eps=cfg.eps, penalty=penalty)
    assert not (on_policy and moved(logps, answers.old_logps)), "the policy that samples is not the one that is trained"
    values = values_of(value_model, answers)  # (B, T)
    critic_loss, critic_stats = value_loss(values, answers.values, answers.returns, answers.mask, eps=cfg.eps_value)
    return loss, critic_loss, {**stats, **critic_stats, "entropy": masked_mean(entropy.detach(), answers.mask)}


def main(cfg):
    """Run the method and return the run folder."""
    run = Run("ppo", cfg)
    cfg = run.cfg
    if cfg.target_kl and not (cfg.penalty and cfg.epochs > 1):
        raise BadInput(f"--target_kl {cfg.target_kl:g}: needs a --penalty above 0 to adapt, and at least 2 --epochs for the policy to move")
    reward_fn, policy, tokenizer, rows, held_out = open_online(run)
    texts_of = open_texts(run, policy, tokenizer) if cfg.ptx else None
    ref = frozen_copy(policy)
    value_model = open_value_model(run, policy, tokenizer)
    optimizer, value_optimizer = open_optimizer(cfg, policy), open_optimizer(cfg, value_model, lr=cfg.value_lr)
    run.register(policy=policy, value_model=value_model, optimizer=optimizer, value_optimizer=value_optimizer)
    first_rollout(run, tokenizer, rows, reward_fn, {"policy": policy, "ref": ref, "value_model": value_model})
    run.at_evaluation(policy, tokenizer, held_out or rows,
                      lambda: held_out_reward(policy, tokenizer, held_out, reward_fn, cfg), tau=cfg.tau)

    for k in run.steps(cfg.steps):
        picked = batch_rows(len(rows), cfg.batch_size, k, cfg.seed)
        prompts_ids, prompts = zip(*[rows[i] for i in picked], strict=True)
        answers = rollout_with_values(policy, value_model, ref, prompts_ids, cfg, tokenizer.eos_id, derive_seed("ppo", cfg.seed, k))
        rewards = run.ask(k, reward_fn, tokenizer, prompts, answers)  # (B,)
        if rewards is None:
            continue
        metrics = rollout_stats(rewards, answers)
        credit(answers, rewards, cfg)
        micros = answers.micro_batches(cfg.micro_batch)

        for opt, lr in ((optimizer, cfg.lr), (value_optimizer, cfg.value_lr)):
            set_lr(opt, lr_at(k, lr=lr, steps=cfg.steps, warmup=cfg.warmup, schedule=cfg.schedule))
        total, stats, texts = 0.0, Mean(), texts_of(k) if texts_of else []
        penalty = optimizer.param_groups[0].get("penalty", cfg.penalty)  # (a checkpoint stores the optimizer's settings)
        for epoch in range(cfg.epochs):
            optimizer.zero_grad()
            value_optimizer.zero_grad()
            losses, critic_losses, kls = [], [], []
            for micro in micros:
                loss, critic_loss, micro_stats = step(policy, value_model, micro, cfg, on_policy=epoch == 0, penalty=penalty)
                share = sum(map(len, micro.completions)) / sum(map(len, answers.completions))  # both losses are means over tokens
                ((loss + critic_loss) * share).backward()
                losses.append(loss.detach() * share)
                critic_losses.append(critic_loss.detach() * share)
                kls.append(micro_stats["approx_kl"] * share)
                stats.add(micro_stats, weight=share)
            for micro in texts and texts.micro_batches(cfg.micro_batch):
                loss = -cfg.ptx * token_logps(policy, micro, tau=cfg.tau).sum() / texts.mask.sum()  # a mean over tokens
                loss.backward()
                losses.append(loss.detach())
            epoch_total, critic_total = run.sum(losses), run.sum(critic_losses)
            grad_norm = clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            value_grad_norm = clip_grad_norm_(value_model.parameters(), cfg.max_grad_norm)
            total += epoch_total / cfg.epochs
            suspect = policy if not grad_norm.isfinite() else value_model  # may_update looks here for non-finite gradients
            if not run.may_update(k, suspect, picked, epoch_total + critic_total, grad_norm + value_grad_norm):
                break  # the other epochs of this rollout would fail in the same way
            optimizer.step()
            value_optimizer.step()

        if cfg.target_kl:
            metrics["penalty"] = penalty
            optimizer.param_groups[0]["penalty"] = adapted(penalty, run.sum(kls), cfg.target_kl) if epoch + 1 == cfg.epochs else penalty
        metrics |= {"loss": total, "grad_norm": grad_norm, "value_grad_norm": value_grad_norm, "lr": optimizer.param_groups[0]["lr"]}
        metrics |= {"explained_variance": explained_variance(answers.values, answers.returns, answers.mask), **stats.result()}
        run.end_of_step(k, metrics)
    return run.close(policy, tokenizer)
