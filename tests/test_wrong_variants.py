"""The checks have teeth: each mistake that is easy to make is made, one at a time, and a test must fail. There are two tables.

VARIANTS are mistakes in a method. A variant is the method's own file with one piece of text exchanged, executed as a module (`rewards`:
minialign/rewards.py). It is put through every test of tests/methods/test_<method>.py that takes the module as its only argument `m`.
Training alone would let half of these through: with the KL in the reward the advantages are constant at π*, so a policy trained with
advantages that are too small, or divided by the wrong spread, still lands there (the ones marked "invisible at π*").

MUTANTS are mistakes in the other files, which the rest of minialign imports by name. tests/mutating.py makes each in a process of its own
and runs the tests that the table names, as the default run would. These take minutes, so they are marked slow. SURVIVORS lists the mutants
that no test notices, each with the reason.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from minialign.batch import collate
from minialign.logps import seq_logps
from tests.enumerable import EOS, LANGUAGE, MAX_NEW, N_CONTENT, all_completions, tiny_gpt

FOLDER = Path(__file__).parent.parent / "minialign"

# Texts that several variants exchange.
ALIGNED = "score(reward_model, demos), score(reward_model, samples)"
INCREASES = "demo_rewards - base_demo_rewards.detach(), sample_rewards - base_sample_rewards.detach()"
SMOOTHED = "(1 - label_smoothing) * F.softplus(-margin) + label_smoothing * F.softplus(margin)"
CHOSEN, REJECTED = "beta * (chosen_logps - ref_chosen_logps)", "beta * (rejected_logps - ref_rejected_logps)"
SUMMED = "torch.where(batch.mask, numbers[:, 1:], 0)"
EXCHANGED = [("(policy, pairs.chosen, pairs.rejected)", "(policy, pairs.rejected, pairs.chosen)")]
REFS_EXCHANGED = [(old.replace("policy", "ref"), new.replace("policy", "ref")) for old, new in EXCHANGED]
WEIGHED = "desirable_weight * lost, undesirable_weight * lost"
SIGMA = "torch.sigmoid(rewards[::2] - rewards[1::2])"
STABLE = "torch.log(-torch.expm1(a))"
BOUNDED = "config.reward_bound * torch.sigmoid(rewards) if config.reward_bound else rewards"

IN_THE_REWARD = ("reinforce", "rloo", "rebel")


def kl_reward(expression):
    """In the place of kl.kl_rewards, for the method alone: another value of the reward with the KL inside."""
    wrong = f"def kl_rewards(rewards, logps, ref_logps, *, beta):\n    return {expression}\n\n\n@dataclass\nclass Config("
    return [("import kl_rewards", "import k1, kl_rewards"), ("@dataclass\nclass Config(", wrong)]


NOT_DETACHED = kl_reward("rewards - beta * k1(logps, ref_logps).sum(1)")

# method, what is wrong, [(text in the file, what stands there instead)]
VARIANTS = [
    # the KL in the reward
    *[(method, "KL sign flipped", kl_reward("(rewards + beta * k1(logps, ref_logps).sum(1)).detach()")) for method in IN_THE_REWARD],
    *[(method, "KL averaged over tokens, not summed", kl_reward("(rewards - beta * k1(logps, ref_logps).mean(1)).detach()"))
      for method in IN_THE_REWARD],
    ("reinforce", "KL reward not detached", [*NOT_DETACHED, ("advantages.detach() * seq", "advantages * seq")]),
    ("rloo", "KL reward not detached", [*NOT_DETACHED, ("ratio.exp(), advantages.detach()", "ratio.exp(), advantages")]),
    ("rebel", "KL reward not detached", [*NOT_DETACHED, ("other_rewards).detach()", "other_rewards)")]),
    *[(method, "no KL", kl_reward("rewards.detach()")) for method in IN_THE_REWARD],
    # the loss
    ("reinforce", "mean log-prob instead of the sum (invisible at π*)", [("logps, 0).sum(1)  # (B,)", "logps, 0).sum(1) / mask.sum(1)")]),
    ("reinforce", "minus lost", [("return -(advantages", "return (advantages")]),
    ("rloo", "ratio of the mean log-prob", [("old_logps.detach(), 0).sum(1)", "old_logps.detach(), 0).sum(1) / mask.sum(1)")]),
    ("rloo", "max instead of min in the clip", [("-torch.minimum(", "-torch.maximum(")]),
    ("rloo", "clip of one side only", [("ratio.clamp(1 - eps, 1 + eps)", "ratio.clamp(max=1 + eps)")]),
    ("rloo", "padding in the ratio", [("torch.where(mask.bool(), logps - old_logps.detach(), 0)", "(logps - old_logps.detach())")]),
    # advantages: all invisible at π*
    ("rloo", "leave-one-out over the wrong axis", [("rewards.view(-1, group_size)", "rewards.view(group_size, -1).T")]),
    ("rloo", "the sample itself in its baseline", [
        ("(groups.sum(1, keepdim=True) - groups) / (group_size - 1)", "groups.mean(1, keepdim=True)"),
    ]),
    ("rloo", "baseline of the whole batch", [
        ("groups.sum(1, keepdim=True) - groups) / (group_size - 1)", "groups.sum() - groups) / (groups.numel() - 1)"),
    ]),
    ("grpo", "groups over the wrong axis", [("rewards.view(-1, group_size)  # (N, G)", "rewards.view(group_size, -1).T")]),
    ("grpo", "population instead of sample spread", [("normalize=True, ddof=1", "normalize=True, ddof=0")]),
    ("grpo", "sample spread whatever ddof says", [("correction=ddof", "correction=1")]),
    ("grpo", "spread of the whole batch", [("groups.std(1, correction=ddof, keepdim=True)", "groups.std(correction=ddof)")]),
    ("grpo", "leave-one-out mean", [
        ("groups - groups.mean(1, keepdim=True)", "(groups - groups.mean(1, keepdim=True)) * group_size / (group_size - 1)"),
    ]),
    ("grpo", "0/0 in a group of equal rewards", [("torch.where(equal, 0, advantages).flatten()", "advantages.flatten()")]),
    # GRPO's loss
    ("grpo", "k1 in the loss", [
        ("kl = k3(torch.where(mask, logps, 0), torch.where(mask, ref_logps.detach(), 0))", "kl = logps - ref_logps"),
    ]),
    ("grpo", "k2 in the loss", [
        ("kl = k3(torch.where(mask, logps, 0), torch.where(mask, ref_logps.detach(), 0))", "kl = (logps - ref_logps) ** 2 / 2"),
    ]),
    ("grpo", "k3 of the wrong direction", [
        ("k3(torch.where(mask, logps, 0), torch.where(mask, ref_logps.detach(), 0))",
         "k3(torch.where(mask, ref_logps, 0), torch.where(mask, logps, 0))"),
    ]),
    ("grpo", "KL sign flipped", [("beta * kl - surrogate", "-beta * kl - surrogate")]),
    ("grpo", "k3 without a gradient", [("beta * kl - surrogate", "beta * kl.detach() - surrogate")]),
    ("grpo", "grpo and dapo exchanged", [
        ('if aggregate == "grpo":', 'if aggregate == "dapo":'),
        ('if aggregate == "dapo":  # mean over all', 'if aggregate == "grpo":  # mean over all'),
    ]),
    ("grpo", "dr_grpo divides by the tokens there are", [("losses.sum() / (len(losses) * max_len)", "losses.sum() / mask.sum()")]),
    ("grpo", "sequence ratio", [("0).exp()  # (B, T)", "0).sum(1, keepdim=True).exp().expand_as(logps)")]),
    # PPO
    ("ppo", "penalty of the other sign", [("loss + penalty * approx_kl", "loss - penalty * approx_kl")]),
    ("ppo", "penalty without a gradient", [("loss + penalty * approx_kl", "loss + penalty * approx_kl.detach()")]),
    ("ppo", "penalty of the other direction", [("torch.expm1(logratio) - logratio", "torch.expm1(-logratio) + logratio")]),
    ("ppo", "k1 for the penalty", [("torch.expm1(logratio) - logratio", "-logratio")]),
    ("ppo", "step forgets the penalty", [("eps=cfg.eps, penalty=penalty)", "eps=cfg.eps)")]),
    ("ppo", "values bootstrapped past EOS", [
        ("mask.bool(), torch.where(mask.bool(), values.detach(), 0)", "mask.bool(), values.detach()"),
    ]),
    ("ppo", "advantages run on past EOS", [
        ("torch.where(mask[:, t], delta + gamma * lam * following, 0)", "delta + gamma * lam * following"),
    ]),
    ("ppo", "gamma lost in delta", [("+ gamma * next_values[:, t]", "+ next_values[:, t]")]),
    ("ppo", "lambda lost", [("gamma * lam * following", "gamma * following")]),
    ("ppo", "returns without the values", [("torch.where(mask, advantages + values, 0)", "advantages")]),
    ("ppo", "critic differentiated through GAE", [("torch.where(mask.bool(), values.detach(), 0)", "torch.where(mask.bool(), values, 0)")]),
    ("ppo", "max instead of min in the clip", [("-torch.minimum(", "-torch.maximum(")]),
    ("ppo", "min instead of max in the value clip", [("torch.maximum(", "torch.minimum(")]),
    ("ppo", "half lost in the value loss", [("loss = 0.5 * masked_mean", "loss = masked_mean")]),
    ("ppo", "value clipped around the return", [
        ("old_values + (values - old_values).clamp(-eps, eps)", "returns + (values - returns).clamp(-eps, eps)"),
    ]),
    # selection
    ("best_of_n", "the worst of n", [("rewards.argmax(-1)", "rewards.argmin(-1)")]),
    ("best_of_n", "of equals the last", [("rewards.argmax(-1)", "rewards.shape[-1] - 1 - rewards.flip(-1).argmax(-1)")]),
    ("best_of_n", "bound log n", [("math.log(n) - (n - 1) / n", "math.log(n)")]),
    ("best_of_n", "maximum of draws with replacement", [
        ("math.comb(i - 1, n - 1) / math.comb(N, n) * reward", "((i / N) ** n - ((i - 1) / N) ** n) * reward"),
    ]),
    ("best_of_n", "mean over tokens", [("0).sum(1).mean()", "0).sum() / mask.sum()")]),
    ("rest", "not strictly above", [("rewards > threshold", "rewards >= threshold")]),
    ("rest", "no guard", [("above if above.any() else rewards == rewards.max()", "above")]),
    ("rest", "below instead of above", [("rewards > threshold", "rewards < threshold")]),
    ("rest", "minus lost", [("loss = -torch", "loss = torch")]),
    # IFT
    ("ift", "prefix sums: later tokens heavier, as Eq. 22 prints", [
        ("for t in reversed(range(losses.shape[1])):", "for t in range(losses.shape[1]):"),
        ("columns[::-1]", "columns"),
    ]),
    ("ift", "weights of sum 1", [("weights * sizes / weights.sum", "weights / weights.sum")]),
    ("ift", "weights differentiated", [("weights.detach() if detach_weights else weights", "weights")]),
    ("ift", "the limit γ → 0 of the formula", [("if decay == 0:", "if False:")]),
    ("ift", "mean over tokens", [("loss = (losses * weights / sizes).sum(1)  # (B,)", "loss = (losses * weights).sum() / mask.sum()")]),
    ("ift", "guesses not shifted", [("torch.cat([batch.inputs[:, :1], further[:, :-1]], dim=1)", "further")]),
    ("ift", "prompt guessed too", [("[batch.mask], policy.head_weight", "[batch.mask | True], policy.head_weight"),
                                   ("masked_scatter(batch.mask, guesses)", "masked_scatter(batch.mask | True, guesses)")]),
    ("ift", "mix and 1 − mix exchanged", [("embeds + mix * (policy", "embeds + (1 - mix) * (policy")]),
    # REBEL
    ("rebel", "1/η instead of η", [("other_logratio) / eta", "other_logratio) * eta")]),
    ("rebel", "the released code's scale", [("(logratio - other_logratio) / eta - target", "logratio - other_logratio - eta * target")]),
    ("rebel", "μ's completion first", [("zip(answers.completions, others,", "zip(others, answers.completions,")]),
    ("rebel", "μ's log-probs at temperature 1", [("token_logps(model, micro, tau=cfg.tau), batch", "token_logps(model, micro), batch")]),
    ("rebel", "ref's log-probs for the policy's", [("for model in (policy, ref))", "for model in (ref, policy))")]),
    ("rebel", "sign of the target", [("/ eta - target)", "/ eta + target)")]),
    # learned rewards
    ("rft", "1/β lost", [("value = -margin / beta", "value = -margin")]),
    ("rft", "β instead of 1/β", [("value = -margin / beta", "value = -margin * beta")]),
    ("rft", "sign flipped", [("value = -margin / beta", "value = margin / beta")]),
    ("rft", "sign flipped in bt", [("value = F.softplus(-margin)", "value = F.softplus(margin)")]),
    ("rft", "1/β in bt", [("value = F.softplus(-margin)", "value = F.softplus(-margin / beta)")]),
    ("rft", "demonstration and own answer exchanged", [(ALIGNED, "score(reward_model, samples), score(reward_model, demos)")]),
    ("rft", "own answer's gradient lost", [("margin = demo_rewards - sample_rewards", "margin = demo_rewards - sample_rewards.detach()")]),
    ("rft", "ridge on the demonstration only", [("ridge * (demo_rewards**2 + sample_rewards**2)", "ridge * demo_rewards**2")]),
    ("rft", "ridge on the margin", [("ridge * (demo_rewards**2 + sample_rewards**2)", "ridge * margin**2")]),
    ("rft", "ridge without its square", [("ridge * (demo_rewards**2 + sample_rewards**2)", "ridge * (demo_rewards + sample_rewards)")]),
    ("rft", "sum over the batch", [("return value.mean(), {name: stat", "return value.sum(), {name: stat")]),
    ("rft", "policy steps first", [("of_reward = j < n_reward", "of_reward = length - 1 - j < n_reward")]),
    ("rft", "one count for both kinds", [("plan.append((t, of_reward, counts[of_reward]))", "plan.append((t, of_reward, len(plan)))")]),
    ("rft", "a round without a reward step", [("max(1, round(cfg.reward_share * length))", "round(cfg.reward_share * length)")]),
    ("rft", "a round without a policy step", [("min(n_reward, length - 1)", "min(n_reward, length)")]),
    ("rft", "policy step without its pull", [("kl_rewards(rewards, answers.old_logps, answers.ref_logps, beta=cfg.beta)", "rewards")]),
    ("rft", "policy step with the method's own β", [("method.Config(beta=cfg.beta, tau=cfg.tau,", "method.Config(tau=cfg.tau,")]),
    ("rft", "policy step at temperature 1", [("method.Config(beta=cfg.beta, tau=cfg.tau,", "method.Config(beta=cfg.beta,")]),
    ("rft", "PPO's advantages not whitened", [("ppo.credit(answers, rewards, settings)",
                                               "ppo.credit(answers, rewards, method.Config(beta=cfg.beta, whiten=False))")]),
    ("rft", "PPO's micro-batches counted by completions", [("tokens / sum(map(len, answers.completions))  # means", "share  # means")]),
    ("rft", "PPO's critic left out", [("loss, share = loss + critic_loss,", "loss, share = loss,")]),
    # learned rewards, in rounds
    ("irl", "base not subtracted", [(INCREASES, "demo_rewards, sample_rewards")]),
    ("irl", "base added", [(INCREASES, INCREASES.replace("-", "+"))]),
    ("irl", "base of the demonstration twice", [(INCREASES, INCREASES.replace("base_sample", "base_demo"))]),
    ("irl", "base not detached", [(INCREASES, INCREASES.replace(".detach()", ""))]),
    ("irl", "sign of the margin", [("F.softplus(-margin) + ridge", "F.softplus(margin) + ridge")]),
    ("irl", "ridge on the rewards", [("(demo_increase**2 + sample_increase**2)", "(demo_rewards**2 + sample_rewards**2)")]),
    ("irl", "ridge on one side", [("(demo_increase**2 + sample_increase**2)", "demo_increase**2")]),
    ("irl", "demonstration and own answer exchanged", [(ALIGNED, "score(reward_model, samples), score(reward_model, demos)")]),
    ("irl", "base asked about itself", [("score(base, demos), score(base, samples)", ALIGNED)]),
    ("irl", "base trained along", [("torch.no_grad():  # what the rounds", "torch.enable_grad():  # what the rounds"),
                                   (INCREASES, INCREASES.replace(".detach()", ""))]),
    ("irl", "linear without its 1/β", [("beta=cfg.beta, ridge=cfg.ridge)\n    with", "beta=1.0, ridge=cfg.ridge)\n    with")]),
    ("irl", "base in linear too", [('if cfg.mode == "linear":\n        return', 'if cfg.mode == "lost":\n        return')]),
    ("irl", "best and worst exchanged", [("rows(best_of_n.pick(rewards)), rows(best_of_n.pick(-rewards))",
                                          "rows(best_of_n.pick(-rewards)), rows(best_of_n.pick(rewards))")]),
    ("irl", "best of the wrong prompt", [("answers.completions[b * cfg.n + i]", "answers.completions[i * len(picked) + b]")]),
    ("irl", "selection without its anchor", [("dpo.step(policy, anchor,", "dpo.step(policy, policy,")]),
    ("irl", "selection with DPO's own β", [("dpo.Config(beta=cfg.beta)", "dpo.Config()")]),
    # DPO
    ("dpo", "ref lost", [(CHOSEN, "beta * chosen_logps"), (REJECTED, "beta * rejected_logps")]),
    ("dpo", "ref of one side lost", [(REJECTED, "beta * rejected_logps")]),
    ("dpo", "ref added", [(CHOSEN, CHOSEN.replace("-", "+")), (REJECTED, REJECTED.replace("-", "+"))]),
    ("dpo", "sign flipped", [("margin = chosen_reward - rejected_reward", "margin = rejected_reward - chosen_reward")]),
    ("dpo", "label smoothing on the wrong side", [(SMOOTHED, SMOOTHED.replace("margin", "-margin").replace("--", ""))]),
    ("dpo", "label smoothing on one side", [(SMOOTHED, SMOOTHED.removeprefix("(1 - label_smoothing) * "))]),
    ("dpo", "smoothed labels subtracted", [("+ label_smoothing * F.softplus(margin)", "- label_smoothing * F.softplus(margin)")]),
    ("dpo", "β on one side only", [(REJECTED, REJECTED.removeprefix("beta * "))]),
    ("dpo", "1/β instead of β", [(CHOSEN, "1 / " + CHOSEN), (REJECTED, "1 / " + REJECTED)]),
    ("dpo", "rejected answer's gradient lost", [(REJECTED, REJECTED.replace("(rejected_logps", "(rejected_logps.detach()"))]),
    ("dpo", "answers exchanged in step", EXCHANGED),
    ("dpo", "ref's answers exchanged", REFS_EXCHANGED),
    ("dpo", "the policy as its own ref", [
        ("seq_logps(ref, pairs.chosen, pairs.rejected)", "[x.detach() for x in seq_logps(policy, pairs.chosen, pairs.rejected)]")]),
    ("dpo", "ref trained along", [("torch.no_grad():  # ref is", "torch.enable_grad():  # ref is")]),
    # online pairs
    ("pairs", "labels reversed", [(".manual_seed(seed)) >= first", ".manual_seed(seed)) < first")]),
    ("pairs", "a coin instead of σ", [(SIGMA, "torch.full_like(rewards[::2], 0.5)")]),
    ("pairs", "the larger reward always chosen", [(SIGMA, "(rewards[::2] > rewards[1::2]).double()")]),
    ("pairs", "σ of half the difference", [(SIGMA, SIGMA.replace("rewards", "0.5 * rewards"))]),
    ("pairs", "answers of two prompts as a pair", [("zip(completions[::2], completions[1::2]",
                                               "zip(completions[: len(first)], completions[len(first) :]")]),
    ("pairs", "one answer twice", [("(x, pair[c], pair[1 - c])", "(x, pair[c], pair[c])")]),
    ("pairs", "labels from no seed", [("generator=torch.Generator().manual_seed(seed)", "generator=None")]),
    # IPO
    *[(method, wrong, exchanges) for method in ("ipo", "gpo") for wrong, exchanges in [
        ("ref lost", [(CHOSEN, "beta * chosen_logps"), (REJECTED, "beta * rejected_logps")]),
        ("ref of one side lost", [(REJECTED, "beta * rejected_logps")]),
        ("ref added", [(CHOSEN, CHOSEN.replace("-", "+")), (REJECTED, REJECTED.replace("-", "+"))]),
        ("sign flipped", [("margin = chosen_reward - rejected_reward", "margin = rejected_reward - chosen_reward")]),
        ("β on one side only", [(REJECTED, REJECTED.removeprefix("beta * "))]),
        ("rejected answer's gradient lost", [(REJECTED, REJECTED.replace("(rejected_logps", "(rejected_logps.detach()"))]),
        ("answers exchanged in step", EXCHANGED), ("ref's answers exchanged", REFS_EXCHANGED),
        ("ref trained along", [("torch.no_grad():  # ref is", "torch.enable_grad():  # ref is")]),
        ("averages instead of sums", [("import seq_logps", "import mean_logps as seq_logps")]),
        ("sum over the batch", [("return loss.mean(), {name", "return loss.sum(), {name")]),
    ]],
    ("ipo", "target 1/β", [("1 / (2 * beta)", "1 / beta")]),
    ("ipo", "target β/2", [("1 / (2 * beta)", "beta / 2")]),
    ("ipo", "target of the other sign", [("- 1 / (2 * beta)", "+ 1 / (2 * beta)")]),
    ("ipo", "β in the margin: the lecture's square", [("margin / beta - 1 / (2 * beta)", "margin - 1")]),
    ("ipo", "a hinge: past the target nothing pulls back", [("(margin / beta - 1 / (2 * beta)) ** 2",
                                                             "(margin / beta - 1 / (2 * beta)).clamp(max=0) ** 2")]),
    ("ipo", "half the square", [("loss = (margin", "loss = 0.5 * (margin")]),
    # GPO
    ("gpo", "1/β instead of β", [(CHOSEN, "1 / " + CHOSEN), (REJECTED, "1 / " + REJECTED)]),
    ("gpo", "always the logistic", [("FUNCTIONS[f](margin)", "F.softplus(-margin)")]),
    ("gpo", "step forgets f", [("beta=cfg.beta, f=cfg.f)", "beta=cfg.beta)")]),
    ("gpo", "hinge on the wrong side", [('"hinge": lambda x: F.relu(1 - x)', '"hinge": lambda x: F.relu(1 + x)')]),
    ("gpo", "hinge at 0: a perceptron", [('"hinge": lambda x: F.relu(1 - x)', '"hinge": lambda x: F.relu(-x)')]),
    ("gpo", "IPO's target in the square", [('"squared": lambda x: (x - 1) ** 2', '"squared": lambda x: (x - 0.5) ** 2')]),
    ("gpo", "square truncated on the wrong side", [('quadratic": lambda x: F.relu(1 - x)', 'quadratic": lambda x: F.relu(x - 1)')]),
    ("gpo", "square not truncated", [('quadratic": lambda x: F.relu(1 - x) ** 2', 'quadratic": lambda x: (1 - x) ** 2')]),
    ("gpo", "square of the truncated lost", [('quadratic": lambda x: F.relu(1 - x) ** 2', 'quadratic": lambda x: F.relu(1 - x)')]),
    ("gpo", "exponential of the other sign", [("torch.exp(-x)", "torch.exp(x)")]),
    ("gpo", "savage without its square", [("torch.sigmoid(-x) ** 2", "torch.sigmoid(-x)")]),
    ("gpo", "savage of the other sign", [("torch.sigmoid(-x) ** 2", "torch.sigmoid(x) ** 2")]),
    ("gpo", "f'' of the wrong point", [("x = torch.zeros((), dtype", "x = torch.full((), 0.1, dtype")]),
    # SimPO
    ("simpo", "sums instead of averages", [("import mean_logps", "import seq_logps as mean_logps")]),
    ("simpo", "sign of γ", [("target_margin - margin", "-target_margin - margin")]),
    ("simpo", "γ lost", [("F.softplus(target_margin - margin)", "F.softplus(-margin)")]),
    ("simpo", "γ scaled", [("F.softplus(target_margin - margin)", "F.softplus(target_margin * scale - margin)")]),
    ("simpo", "sign flipped", [("F.softplus(target_margin - margin)", "F.softplus(target_margin + margin)")]),
    ("simpo", "1/scale", [("scale * chosen_logps", "chosen_logps / scale"), ("scale * rejected_logps", "rejected_logps / scale")]),
    ("simpo", "scale on one side only", [("scale * rejected_logps", "rejected_logps")]),
    ("simpo", "γ in the logged margin", [("chosen_reward - rejected_reward", "chosen_reward - rejected_reward - target_margin"),
                                         ("F.softplus(target_margin - margin)", "F.softplus(-margin)")]),
    ("simpo", "rejected answer's gradient lost", [("scale * rejected_logps", "scale * rejected_logps.detach()")]),
    # ORPO
    ("orpo", "sums instead of averages", [("import mean_logps", "import seq_logps as mean_logps")]),
    ("orpo", "log-probs instead of log odds", [("return a - torch.log(-torch.expm1(a))", "return a")]),
    ("orpo", "1 − P added", [("return a - torch.log(-torch.expm1(a))", "return a + torch.log(-torch.expm1(a))")]),
    ("orpo", "sign of the likelihood", [("loss = -chosen_logps +", "loss = chosen_logps +")]),
    ("orpo", "likelihood of the rejected answer", [("loss = -chosen_logps +", "loss = -rejected_logps +")]),
    ("orpo", "likelihood lost", [("loss = -chosen_logps + weight", "loss = weight")]),
    ("orpo", "sign of the odds ratio", [("weight * F.softplus(-margin)", "weight * F.softplus(margin)")]),
    ("orpo", "odds ratio subtracted", [("+ weight * F.softplus(-margin)", "- weight * F.softplus(-margin)")]),
    ("orpo", "weight on both terms", [("-chosen_logps + weight * F.softplus(-margin)", "weight * (-chosen_logps + F.softplus(-margin))")]),
    ("orpo", "log(1 − e^a) by subtraction", [(STABLE, "torch.log(1 - torch.exp(a))")]),
    ("orpo", "no clamp at P = 1", [("mean_logps.clamp(max=-1e-7)", "mean_logps")]),
    ("orpo", "a clamp that bites", [("mean_logps.clamp(max=-1e-7)", "mean_logps.clamp(max=-1e-3)")]),
    ("orpo", "odds of the logistic", [("loss = -chosen_logps + weight * F.softplus(-margin)", "loss = -chosen_logps - weight * margin")]),
    # SLiC
    ("slic", "hinge on the wrong side", [("F.relu(delta - margin)", "F.relu(margin - delta)")]),
    ("slic", "answers exchanged", [("margin = chosen_logps - rejected_logps", "margin = rejected_logps - chosen_logps")]),
    ("slic", "δ of the other sign", [("F.relu(delta - margin)", "F.relu(-delta - margin)")]),
    ("slic", "δ lost", [("F.relu(delta - margin)", "F.relu(-margin)")]),
    ("slic", "no hinge", [("F.relu(delta - margin)", "(delta - margin)")]),
    ("slic", "softplus for the hinge", [("F.relu(delta - margin)", "F.softplus(delta - margin)")]),
    ("slic", "sign of the likelihood", [("- weight * target_logps", "+ weight * target_logps")]),
    ("slic", "likelihood lost", [(" - weight * target_logps", "")]),
    ("slic", "weight on the hinge", [("F.relu(delta - margin) - weight * target_logps", "weight * F.relu(delta - margin) - target_logps")]),
    ("slic", "target is the rejected answer", [("if targets else chosen_logps", "if targets else rejected_logps")]),
    ("slic", "y_ref of the demonstrations ignored", [("target_logps[0] if targets", "chosen_logps if targets")]),
    ("slic", "likelihood without a gradient", [("if targets else chosen_logps", "if targets else chosen_logps.detach()"),
                                               ("weight * target_logps", "weight * target_logps.detach()")]),
    ("slic", "averages instead of sums", [("import seq_logps", "import mean_logps as seq_logps")]),
    ("slic", "rejected answer's gradient lost", [("chosen_logps - rejected_logps  # (B,)", "chosen_logps - rejected_logps.detach()")]),
    # KTO
    ("kto", "z₀ not detached", [(".clamp(min=0).detach()", ".clamp(min=0)")]),
    ("kto", "z₀ not clamped", [(".mean().clamp(min=0)", ".mean()")]),
    ("kto", "z₀'s terms clamped, not their mean", [(".mean().clamp(min=0)", ".clamp(min=0).mean()")]),
    ("kto", "z₀ of the other sign", [("(logps - ref_logps).mean().clamp", "(ref_logps - logps).mean().clamp")]),
    ("kto", "z₀ a sum", [(".mean().clamp(min=0)", ".sum().clamp(min=0)")]),
    ("kto", "z₀ added", [("logratio - kl, kl - logratio", "logratio + kl, -kl - logratio")]),
    ("kto", "z₀ lost", [("logratio - kl, kl - logratio", "logratio, -logratio")]),
    ("kto", "z₀ for liked answers only", [("logratio - kl, kl - logratio", "logratio - kl, -logratio")]),
    ("kto", "labels exchanged", [("logratio - kl, kl - logratio", "kl - logratio, logratio - kl")]),
    ("kto", "λ_D and λ_U exchanged", [(WEIGHED, "undesirable_weight * lost, desirable_weight * lost")]),
    ("kto", "λ exchanged in step", [("desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight",
                                     "desirable_weight=cfg.undesirable_weight, undesirable_weight=cfg.desirable_weight")]),
    ("kto", "step forgets λ", [(", desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight", "")]),
    ("kto", "weights lost", [(WEIGHED, "lost, lost")]),
    ("kto", "σ of the other sign", [("1 - torch.sigmoid(x)", "torch.sigmoid(x)")]),
    ("kto", "log σ: no saturation", [("1 - torch.sigmoid(x)", "F.softplus(-x)")]),
    ("kto", "concave saturates", [("F.softplus(-x)", "torch.sigmoid(-x)")]),
    ("kto", "neutral of the other sign", [("lambda x: -x,", "lambda x: x,")]),
    ("kto", "losses weigh as gains", [("aversion * size, -size", "size, -size")]),
    ("kto", "gains weigh as losses", [("aversion * size, -size", "aversion * size, -aversion * size")]),
    ("kto", "a loss is a gain", [("torch.where(x < 0, aversion * size", "torch.where(x > 0, aversion * size")]),
    ("kto", "no power", [("power=0.88", "power=1.0")]),
    ("kto", "no slope at 0", [("torch.where(x < 0, -x, x)", "x.abs()")]),
    ("kto", "no chord", [("size * near ** (power - 1)", "size**power")]),
    ("kto", "value forgotten", [("VALUES[value]", 'VALUES["logistic"]')]),
    ("kto", "step forgets the value", [("        value=cfg.value,\n", "")]),
    ("kto", "ref asked without a reference", [("torch.zeros_like(logps)", "torch.zeros_like(logps) - 1")]),
    ("kto", "z₀ clamped without a reference", [("return logps.mean().detach()", "return logps.mean().clamp(min=0).detach()")]),
    ("kto", "1/β instead of β", [("VALUES[value](beta * gain)", "VALUES[value](gain / beta)")]),
    ("kto", "β on the log-ratio only", [("gain = torch.where(desirable, logratio - kl, kl - logratio)",
                                         "gain = torch.where(desirable, beta * logratio - kl, kl - beta * logratio)"),
                                        ("VALUES[value](beta * gain)", "VALUES[value](gain)")]),
    ("kto", "ref lost", [("logratio = logps - ref_logps", "logratio = logps")]),
    ("kto", "accuracy against 0, not z₀", [("(gain > 0).float() + 0.5 * (gain == 0)",
                                            "((logratio > 0) == desirable).float() + 0.5 * (logratio == 0)")]),
    ("kto", "stats of the wrong kind", [('("chosen", desirable), ("rejected",', '("rejected", desirable), ("chosen",')]),
    ("kto", "rotation lost", [("(x, rows[i - 1][1])", "(x, rows[i][1])")]),
    ("kto", "rotated the other way", [("(x, rows[i - 1][1])", "(x, rows[(i + 1) % len(rows)][1])")]),
    ("kto", "rotated within a micro-batch", [
        ("(x, rows[i - 1][1])", "(x, rows[i - 1 if i % (size or len(rows)) else min(i + size, len(rows)) - 1][1])"),
    ]),
    ("kto", "z₀ of the first micro-batch", [
        ("range(len(moved)), size,", "range(len(moved))[: size or None], size,"),
        (" moved) for model", " moved[: size or None]) for model"),
    ]),
    ("kto", "z₀ of policy and policy", [("for model in (policy, ref)", "for model in (policy, policy)")]),
    ("kto", "z₀ of ref and policy", [("for model in (policy, ref)", "for model in (ref, policy)")]),
    ("kto", "averages instead of sums", [("import seq_logps", "import mean_logps as seq_logps")]),
    ("kto", "ref trained along", [("torch.no_grad():  # ref is", "torch.enable_grad():  # ref is")]),
    ("kto", "the policy as its own ref", [("ref_logps = seq_logps(ref, batch)", "ref_logps = seq_logps(policy, batch).detach()")]),
    # how a reward is read
    ("rewards", "prompt in the sum", [(SUMMED, SUMMED.replace("batch.mask", "batch.mask.flip(1).cumsum(1).flip(1) > 0"))]),
    ("rewards", "padding in the sum", [(SUMMED, SUMMED.replace("batch.mask", "batch.mask.cumsum(1) > 0"))]),
    ("rewards", "the sum one token early", [(SUMMED, SUMMED.replace("1:", ":-1"))]),
    ("rewards", "a mean over tokens", [(SUMMED + ".sum(1)", SUMMED + ".sum(1) / batch.mask.sum(1)")]),
    ("rewards", "bound lost", [(BOUNDED, "rewards")]),
    ("rewards", "bound of 1", [(BOUNDED, BOUNDED.removeprefix("config.reward_bound * "))]),
    ("rewards", "bound on every token", [(BOUNDED, "rewards"),
                                         (SUMMED, SUMMED.replace("numbers[:, 1:]", BOUNDED.replace("rewards", "numbers[:, 1:]")))]),
    ("rewards", "another squeeze", [(BOUNDED, BOUNDED.replace("sigmoid", "tanh"))]),
    ("rewards", "sum and last exchanged", [('config.reward_read == "sum"', 'config.reward_read == "last"')]),
    ("rewards", "last read one token early", [("batch.mask, places, 0).amax(dim=1)", "batch.mask, places - 1, 0).amax(dim=1)")]),
    ("rewards", "last read at the end of the padding", [("batch.mask, places, 0).amax(dim=1)",
                                                         "batch.mask, places, 0).amax(dim=1) * 0 + places[-1]")]),
]


def source_of(method):
    """A method's file, or another of minialign's."""
    return next(path for path in (FOLDER / f"methods/{method}.py", FOLDER / f"{method}.py") if path.is_file())


def variant(method, exchanges):
    source = source_of(method).read_text(encoding="utf-8")
    for old, new in exchanges:
        assert source.count(old) == 1, (method, old, source.count(old))  # the file has changed: change the variant with it
        source = source.replace(old, new)
    module = types.ModuleType(f"wrong_{method}")
    exec(compile(source, f"{method}.py (wrong variant)", "exec"), module.__dict__)
    return module


def failing(method, module):
    """The names of the tests of the method that fail for `module`, as they are found."""
    tests = importlib.import_module(f"tests.{'methods.' * (source_of(method).parent.name == 'methods')}test_{method}")
    for name, test in vars(tests).items():
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["m"]:
            try:
                test(module)
            except Exception:  # AssertionError mostly; a shape that no longer fits is caught as well
                yield name


@pytest.mark.parametrize(("method", "wrong", "exchanges"), VARIANTS, ids=[f"{method}: {wrong}" for method, wrong, _ in VARIANTS])
def test_a_wrong_variant_fails_a_test(method, wrong, exchanges):
    assert next(failing(method, variant(method, exchanges)), None)


@pytest.mark.parametrize("method", sorted({method for method, *_ in VARIANTS}))
def test_the_right_one_passes_them_all(method):
    assert list(failing(method, variant(method, []))) == []


# --------------------------------------------------------------------------------------------- outside the methods

# Tests that several mutants name. {}: the body of a kernel, torch or triton.
KL, BATCH, LOGPS, SAMPLE = "test_kl.py", "test_batch.py", "test_logps.py", "test_sample.py"
SAVED, COMMON, RUN, SAFETY = (f"engine/test_{name}.py" for name in ("checkpoint", "common", "run", "safety"))
FUSED, KERNEL, WEIGHTS = "kernels/test_linear_logprob.py::", "kernels/test_logprob.py::", "test_weights.py::"
SCORES = FUSED + "test_scores_without_logits"
NUMBERS, FOLD, GRADIENT = (KERNEL + test for test in (
    "test_three_numbers_a_row[{}-0.7-dtype0-7]", "test_the_fold_by_the_definition[{}-1-1]",
    "test_the_gradient_over_the_logits[{}-both-dtype0-7]"))
CHUNKED = LOGPS + "::test_chunked_equals_naive_forward_and_backward[logps-1-1]"
RESUME = "engine/test_resume.py::"
GUARD = SAMPLE + "::test_the_guard_looks_at_both_sides_and_at_every_token"
REFUSED_STEP = RUN + "::test_a_step_that_is_not_finite_is_skipped_and_named"
KNOWN = "test_precompute_ref.py::test_a_row_is_known_in_any_batch_and_padding"
SHAPED = "test_shaped_rewards_by_hand"
FLUSHED = "test_every_file_is_flushed_before_the_rename_and_the_folder_after_it"

# file under minialign/, what is wrong, [(text in the file, what stands there instead)], the tests that notice it (nodes below tests/)
MUTANTS = [
    # kl.py
    *[("kl.py", wrong, [exchange], "methods/test_ppo.py::" + test) for wrong, exchange, test in [
        ("PPO's rewards without KL", ("-beta * torch.where(mask, k1(logps, ref_logps), 0)", "0 * logps"), SHAPED),
        ("the sign of the KL in PPO's rewards", ("token_rewards = -beta *", "token_rewards = beta *"), SHAPED),
        ("PPO's score at the first token", ("last[:, None], rewards", "0 * last[:, None], rewards"), SHAPED),
        ("PPO's score one slot late", (".argmax(1)  # (B,) from", ".argmax(1).add(1).clamp(max=mask.shape[1] - 1)  # (B,) from"), SHAPED),
        ("PPO's score at every token", ("token_rewards.scatter_add(1, last[:, None], rewards.to(token_rewards)[:, None])",
                                        "(token_rewards + rewards[:, None])"), SHAPED),
        ("κ adapted the wrong way", ("2.0 if moved_by > 1.5 * target else 0.5", "0.5 if moved_by > 1.5 * target else 2.0"),
         "test_the_penalty_adapts"),
        ("κ never halved", ("else 0.5 if", "else 1.0 if"), "test_the_penalty_adapts"),
    ]],
    ("kl.py", "k1 of the wrong sign", [("return logps - ref_logps", "return ref_logps - logps")], KL),
    ("kl.py", "half lost in k2", [("(logps - ref_logps) ** 2 / 2", "(logps - ref_logps) ** 2")], KL),
    ("kl.py", "k3 of the wrong direction", [("ref_logratio = ref_logps - logps", "ref_logratio = logps - ref_logps")], KL),
    ("kl.py", "k3 loses its digits near 0", [("torch.expm1(ref_logratio.clamp(max=MAX_EXPONENT))",
                                              "ref_logratio.clamp(max=MAX_EXPONENT).exp() - 1")], KL),
    ("kl.py", "a clip before the exponential", [(" + tangent - ref_logratio", " - ref_logratio")], KL),
    ("kl.py", "exact KL of the wrong direction", [("(logps.exp() * logratio)", "(ref_logps.exp() * -logratio)")], KL),
    ("kl.py", "0·log 0 is NaN", [("torch.where(logps.isneginf(), 0, logps - ref_logps)", "logps - ref_logps")], KL),
    ("kl.py", "exact KL averaged over the vocabulary", [("logratio).sum(-1)", "logratio).mean(-1)")], KL),
    ("kl.py", "KL added to the reward", [("(rewards - beta *", "(rewards + beta *")], KL),
    ("kl.py", "KL of a token in the place of the completion's", [("k1(logps, ref_logps).sum(1)).detach()",
                                                                  "k1(logps, ref_logps).mean(1)).detach()")], KL),
    ("kl.py", "reward with a gradient", [("k1(logps, ref_logps).sum(1)).detach()", "k1(logps, ref_logps).sum(1))")], KL),
    ("kl.py", "a policy that has only lost is not moved", [("(logps - old_logps).abs().max()", "(logps - old_logps).max()")], KL),
    # batch.py
    ("batch.py", "first token of the answer not scored", [("mask[b, len(prompts_ids[b]) - 1 :", "mask[b, len(prompts_ids[b]) :")],
     BATCH + "::test_docstring_example"),
    ("batch.py", "EOS never scored", [(": len(row) - 1] = True", ": len(row) - 2] = True")],
     BATCH + "::test_docstring_example"),
    ("batch.py", "padding scored", [(": len(row) - 1] = True", ":] = True")],
     BATCH + "::test_a_ragged_batch_by_hand"),
    ("batch.py", "last token of the prompt scored", [("len(prompts_ids[b]) - 1 : len", "max(0, len(prompts_ids[b]) - 2) : len")],
     BATCH + "::test_docstring_example"),
    ("batch.py", "a long row loses its beginning", [("[:max_len])", "[-(max_len or 0) :])")],
     BATCH + "::test_max_len_cuts_the_end_and_invents_nothing"),
    ("batch.py", "targets not shifted", [("targets=tokens[:, 1:]", "targets=tokens[:, :-1]")],
     BATCH + "::test_docstring_example"),
    ("batch.py", "a mean over all entries", [("mask.sum().clamp(min=1)", "mask.numel()")],
     BATCH + "::test_masked_mean_by_hand"),
    ("batch.py", "NaN times 0", [("torch.where(mask, x, 0).sum()", "(x * mask).sum()")],
     BATCH + "::test_masked_entries_may_be_anything"),
    ("batch.py", "0/0 where nothing is scored", [("mask.sum().clamp(min=1)", "mask.sum()")],
     BATCH + "::test_masked_mean_by_hand"),
    ("batch.py", "sample variance", [("masked_mean((x - mean) ** 2, mask)", "((x - mean)[mask] ** 2).sum() / (mask.sum() - 1)")],
     BATCH + "::test_whiten_uses_the_population_variance"),
    ("batch.py", "epsilon beside the root", [("torch.rsqrt(variance + 1e-8)", "1 / (variance.sqrt() + 1e-8)")],
     BATCH + "::test_whiten_uses_the_population_variance"),
    ("batch.py", "equal entries whitened to rounding errors", [("torch.where(mask & differ,", "torch.where(mask,")],
     BATCH + "::test_whiten_of_equal_or_no_entries_is_zero"),
    ("batch.py", "stacked rows padded on the left", [("(0, T - batch.mask.shape[1])", "(T - batch.mask.shape[1], 0)")],
     BATCH + "::test_stacked_batches_are_their_rows_padded"),
    ("batch.py", "trimmed to the shortest row", [("T = max(self.sizes) if", "T = min(self.sizes) if")],
     BATCH + "::test_the_rows_of_a_batch_are_picked_and_trimmed"),
    ("batch.py", "sizes of other rows", [("[part[b] for b in rows]", "part[: len(rows)]")],
     BATCH + "::test_the_rows_of_a_batch_are_picked_and_trimmed"),
    # logps.py
    ("logps.py", "remembered without the targets", [("(inputs[:end], targets[:end], mask[:end])", "(inputs[:end], mask[:end])")],
     KNOWN),
    ("logps.py", "remembered without the mask", [("(inputs[:end], targets[:end], mask[:end])", "(inputs[:end], targets[:end])")],
     KNOWN),
    ("logps.py", "remembered with the padding", [("(inputs[:end], targets[:end], mask[:end])", "(inputs, targets, mask)")],
     KNOWN),
    ("logps.py", "an average over the padding too", [("batch.mask.sum(1).clamp(min=1)", "batch.mask.shape[1]")],
     LOGPS + "::test_mean_logps_divide_by_what_is_scored"),
    ("logps.py", "0/0 where nothing is scored", [("batch.mask.sum(1).clamp(min=1)", "batch.mask.sum(1)")],
     LOGPS + "::test_mean_logps_divide_by_what_is_scored"),
    ("logps.py", "times tau", [("(logits if tau == 1.0 else logits / tau)", "(logits * tau)")], LOGPS + "::test_against_numpy"),
    ("logps.py", "tau lost", [("targets, tau=tau, entropy=entropy)  # (N,)", "targets, entropy=entropy)  # (N,)")],
     LOGPS + "::test_token_logps_is_log_softmax_and_gather_where_scored_and_zero_elsewhere"),
    ("logps.py", "entropy of the wrong sign", [("-(all_logps.exp() * all_logps).sum(-1)", "(all_logps.exp() * all_logps).sum(-1)")],
     LOGPS + "::test_worked_number"),
    ("logps.py", "log-probs of the inputs", [("batch.targets.flatten()[scored]", "batch.inputs.flatten()[scored]")],
     LOGPS + "::test_token_logps_is_log_softmax_and_gather_where_scored_and_zero_elsewhere"),
    ("logps.py", "a mean over tokens", [("token_logps(policy, batch).sum(1)", "token_logps(policy, batch).mean(1)")],
     LOGPS + "::test_token_logps_is_log_softmax_and_gather_where_scored_and_zero_elsewhere"),
    ("logps.py", "bfloat16 logits", [("wide = torch.promote_types(hidden.dtype, torch.float32)", "wide = hidden.dtype")],
     LOGPS + "::test_bfloat16_inputs_give_float32_statistics"),
    # sample.py
    ("sample.py", "top-k without the k-th", [("logits < kth", "logits <= kth")], SAMPLE + "::test_the_rules_by_hand"),
    ("sample.py", "top-p one token late at its bound", [("(before >= p).scatter(1, order, before >= p)",
                                                         "(before > p).scatter(1, order, before > p)")],
                                                          SAMPLE + "::test_the_rules_by_hand"),
    ("sample.py", "top-p in the sorted order", [("(before >= p).scatter(1, order, before >= p)", "before >= p")],
     SAMPLE + "::test_the_rules_by_hand"),
    ("sample.py", "top-p counts the token itself", [("running_sums(probs) - probs", "running_sums(probs)")],
     SAMPLE + "::test_the_rules_by_hand"),
    ("sample.py", "a forbidden token drawn at its edge", [("point, right=True)", "point, right=False)")],
     SAMPLE + "::test_draw_inverts_the_cumulative_distribution"),
    ("sample.py", "top-p before top-k", [("allowed if top_k is None else keep_top_k(allowed, top_k)",
                                          "allowed if top_p in (None, 1) else keep_top_p(allowed, top_p)"),
                                         ("allowed if top_p in (None, 1) else keep_top_p(allowed, top_p)\n            token",
                                          "allowed if top_k is None else keep_top_k(allowed, top_k)\n            token")],
     SAMPLE + "::test_frequencies_follow_the_law"),
    ("sample.py", "temperature applied twice", [("probs = logits.softmax(-1)  #", "probs = (logits / tau).softmax(-1)  #")],
     SAMPLE + "::test_chi_square_has_teeth"),
    ("sample.py", "log-probs of the truncated distribution", [("logits.gather(1, token[:, None]) - logits.logsumexp(-1, keepdim=True)",
                                                               "allowed.gather(1, token[:, None]) - allowed.logsumexp(-1, keepdim=True)")],
     SAMPLE + "::test_old_logps_equal_token_logps"),
    ("sample.py", "one seed for all samples of a prompt", [("count[own] += 1", "pass")],
     SAMPLE + "::test_duplicates_continue_where_n_would"),
    ("sample.py", "one seed for all prompts", [("derive_seed(*own, count", "derive_seed(own[0], count")],
     SAMPLE + "::test_samples_of_different_prompts_are_independent"),
    ("sample.py", "EOS not counted in the length", [("torch.where(ended, t + 1,", "torch.where(ended, t,")],
     SAMPLE + "::test_fields_agree_with_each_other"),
    ("sample.py", "a cut answer counts as finished", [("return tokens, token_logps, new_lengths, finished",
                                                       "return tokens, token_logps, new_lengths, finished | (new_lengths == max_new)")],
     SAMPLE + "::test_fields_agree_with_each_other"),
    ("sample.py", "only the first EOS ends", [("sorted({eos_id, *config.eos_ids})", "[eos_id]")],
     "methods/test_irft.py::test_any_eos_of_the_folder_ends_an_own_answer"),
    ("sample.py", "padding of the vocabulary sampled", [(" and config.n_tokens in (None, config.vocab_size)", "")],
     SAMPLE + "::test_padding_rows_of_the_vocabulary_are_never_sampled"),
    ("sample.py", "short prompts continued behind their padding", [("device=device), lengths - 1][source]",
                                                                    "device=device), longest - 1][source]")],
     SAMPLE + "::test_a_row_is_the_same_alone_and_in_any_batch"),
    ("sample.py", "the last place of the context not used", [("longest + max_new - 1 > config.max_len",
                                                              "longest + max_new > config.max_len")],
     SAMPLE + "::test_the_context_is_used_to_its_last_position"),
    ("sample.py", "passes not put back in order", [("part[torch.tensor(order).argsort().to", "part[torch.tensor(order).to")],
     SAMPLE + "::test_passes_of_any_size_draw_the_same"),
    ("sample.py", "memory of the keys alone", [("cache = 2 * config.n_layer", "cache = config.n_layer")],
     SAMPLE + "::test_rows_that_fit_by_hand"),
    ("sample.py", "ref at temperature 1", [("token_logps(ref, micro, tau=cfg.tau), answers", "token_logps(ref, micro), answers")],
     "methods/test_mains.py::test_reinforce"),
    ("sample.py", "bfloat16's old log-probs at temperature 1", [("token_logps(policy, micro, tau=tau)", "token_logps(policy, micro)")],
     SAMPLE + "::test_the_kl_of_equal_models_is_0_in_bfloat16"),
    # what a run does with its seeds
    ("methods/irft.py", "seed not varied by step", [('derive_seed("irft", cfg.seed, j)', 'derive_seed("irft", cfg.seed)')],
     "methods/test_irft.py::test_a_prompt_gets_other_answers_in_another_step"),
    ("methods/ppo.py", "policy at temperature 1", [("token_logps(policy, answers, tau=cfg.tau, entropy=True)",
                                                    "token_logps(policy, answers, entropy=True)")],
     "methods/test_mains.py::test_ppo[True]"),
    # engine/checkpoint.py
    *[("engine/checkpoint.py", wrong, [exchange], f"{SAVED}::{test}") for wrong, exchange, test in [
        ("no fsync", ("        os.fsync(descriptor)", "        pass"),
         FLUSHED),
        ("rename not flushed", ("    flush_to_disk(final.parent)\n", "\n"),
         FLUSHED),
        ("manifest not flushed", ('    flush_to_disk(temporary / "manifest.json")\n', "\n"),
         FLUSHED),
        ("copied, not renamed", ("os.replace(temporary, final)", "shutil.copytree(temporary, final)"),
         FLUSHED),
        ("hash not compared", (' and sha256(path) == manifest[name]["sha256"]', ""), "test_damage_is_noticed_and_stepped_over"),
        ("an empty manifest is enough", ('sorted({*manifest, "rng.safetensors", "state.json"})', "sorted(manifest)"),
         "test_a_manifest_that_names_nothing_is_damage"),
        ("the oldest first", ("reverse=True", "reverse=False"), "test_damage_is_noticed_and_stepped_over"),
        ("steps compared as text", ("{int(path.name[5:]): path", "{path.name[5:]: path"),
         "test_steps_are_compared_as_numbers"),
        ("the newest deleted", ("if number <= step)[-keep:]", "if number <= step)[:keep]"), "test_keeps_the_newest_and_sweeps_up"),
        ("damaged later ones kept", ("for number in numbers if number <= step)", "for number in numbers)"),
         "test_damaged_later_ones_do_not_push_out_a_sound_one"),
        ("half-written ones kept", (' + list(folder.glob("*.tmp-*"))', ""), "test_keeps_the_newest_and_sweeps_up"),
        ("random numbers not restored", ('    torch.set_rng_state(generators["cpu"])', "    pass"), "test_round_trip_is_bitwise"),
        ("optimizer not restored", ("optimizer.load_state_dict(packed[name])", "pass"), "test_round_trip_is_bitwise"),
        ("the optimizer's numbers not restored", ('dict(state["optimizers"][name]["numbers"])', "{}"),
         "test_an_optimizers_numbers_and_settings_come_back"),
        ("the optimizer's settings not restored", ('{"param_groups": state["optimizers"][name]["param_groups"], "state": {}}',
                                                   '{"param_groups": optimizers[name].state_dict()["param_groups"], "state": {}}'),
         "test_an_optimizers_numbers_and_settings_come_back"),
        ("frozen weights stored beside adapters", ("if (key, p.shape) not in base:", "if True:"),
         "test_beside_adapters_the_frozen_weights_are_not_stored"),
        ("a shared weight stored twice", ("found.setdefault(id(p), (f\"{name}.{key}\", p))", "found[name, key] = (f\"{name}.{key}\", p)"),
         "test_a_weight_that_two_modules_share_is_stored_once"),
    ]],
    # engine/common.py
    ("engine/common.py", "no second try", [("enumerate((*RETRY_SECONDS, None)", "enumerate((None,)")],
     f"{SAVED}::test_one_stumble_is_retried"),
    ("engine/common.py", "half a line stays in the log", [("            file.truncate(size)", "            file.seek(0, 2)")],
     f"{COMMON}::test_a_line_that_was_half_written_is_written_again_whole"),
    ("engine/common.py", "what waiting cannot mend is waited for", [('getattr(error, "errno", None) in FOR_GOOD', "False")],
     f"{COMMON}::test_a_line_that_was_half_written_is_written_again_whole"),
    *[("data.py", wrong, [exchange], f"engine/test_long_files.py::{test}") for wrong, exchange, test in [
        ("a row that cannot be used ends the part", ("itertools.chain(range(i, len(self)), range(i))", "range(i, len(self))"),
         "test_the_next_row_of_the_same_part_takes_the_place_of_one_that_cannot_be_used"),
        ("the next row of the file, not of the part", ("if (row := self.read(self.places[j])) is not None",
                                                       "if (row := self.read(j)) is not None"),
         "test_the_next_row_of_the_same_part_takes_the_place_of_one_that_cannot_be_used"),
        ("prompts that fill the row are trained on", ("        return ids if scored else None", "        return ids"),
         "test_the_next_row_of_the_same_part_takes_the_place_of_one_that_cannot_be_used"),
        ("the same rows checked at each step", ("        self.checked = min(total, begin + AT_ONCE)\n", "        self.checked = AT_ONCE\n"),
         "test_a_bad_row_far_behind_stops_the_run_early"),
        ("a changed file is read on", ("(now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns)", "False"),
         "test_a_file_that_changes_is_named"),
        ("the last line without its end lost", ("starts if starts[-1] == end else np.append(starts, end)", "starts"),
         "test_lines_start_where_they_do"),
        ("blank lines are rows", ("np.delete(np.arange(len(starts) - 1), blank)", "np.arange(len(starts) - 1)"),
         "test_lines_start_where_they_do"),
        ("line numbers from 0", ('return f"{self.path}:{number + 1}", *_parse', 'return f"{self.path}:{number}", *_parse'),
         "test_a_bad_row_far_behind_stops_the_run_early"),
        ("a guard is not asked", ("                guard(ids)\n", "                pass\n"),
         "test_a_prompt_without_room_is_named_when_it_is_read"),
    ]],
    ("lora.py", "modules that PEFT leaves out", [("if not selected(config, theirs):", "if False:")],
     "test_fuzz.py::test_an_adapter_of_a_module_that_its_config_leaves_out_is_refused"),
    *[("engine/common.py", wrong, [exchange], f"{COMMON}::{test}") for wrong, exchange, test in [
        ("every epoch in the same order", ('derive_seed("epoch", seed, epoch)', 'derive_seed("epoch", seed)'),
         "test_batch_rows_are_permutations_epoch_by_epoch"),
        ("every seed has the same order", ('derive_seed("epoch", seed, epoch)', 'derive_seed("epoch", epoch)'),
         "test_batch_rows_are_permutations_epoch_by_epoch"),
        ("an epoch begins anew at every step", ("permutation[offset : offset + batch_size - len(rows)]",
                                                "permutation[: batch_size - len(rows)]"),
         "test_batch_rows_are_permutations_epoch_by_epoch"),
        ("warm-up from 0", ("lr * (step + 1) / warmup_steps", "lr * step / warmup_steps"), "test_lr_schedules"),
        ("decay begins before the warm-up", ("(step - warmup_steps) / max(1, steps - warmup_steps)", "step / steps"), "test_lr_schedules"),
        ("linear upwards", ("lr * (1 - done)", "lr * done"), "test_lr_schedules"),
        ("twice the rate", ("lr * 0.5 * (1 + math.cos", "lr * (1 + math.cos"), "test_lr_schedules"),
        ("the shortest rows first", ("key=lambda g: -size[g]), [], 0", "key=lambda g: size[g]), [], 0"), "test_rows_are_dealt_by_length"),
        ("short rows beside long ones", (" and size[units[end]] >= SHORTEST * size[units[start]]", ""), "test_rows_are_dealt_by_length"),
        ("every process gets the first one's rows", ("[rank::world]", "[::world]"), "test_rows_are_dealt_by_length"),
        ("units taken apart", ("[g * unit + i for g in units[start:end][rank::world] for i in range(unit)]",
                               "[g + i * (n // unit) for g in units[start:end][rank::world] for i in range(unit)]"),
         "test_rows_are_dealt_by_length"),
        ("weights of a mean lost", ("sums.get(name, 0.0) + value * weight", "sums.get(name, 0.0) + value"), "test_mean_of_micro_batches"),
        ("one weight for all means", ("sums[name] / weights[name]", "sums[name] / max(weights.values())"), "test_mean_of_micro_batches"),
        ("a seed of 64 bits", ('"little") >> 1', '"little")'), "test_derive_seed_is_fixed_for_ever"),
        ("no fsync", ("os.fsync(file.fileno())", "pass"), "test_write_atomic_keeps_the_old_content_when_it_fails"),
        ("written in place", ('path.with_name(f"{path.name}.tmp-{os.getpid()}")', "path"),
         "test_write_atomic_keeps_the_old_content_when_it_fails"),
        ("a damaged line passed over", ("elif number != len(lines):", "elif False:"), "test_rows_of_a_killed_run"),
        ("a torn last line refused", ("elif number != len(lines):", "else:"), "test_rows_of_a_killed_run"),
        ("outputs not put back in order", ("joined[torch.tensor(order).argsort()", "joined[torch.tensor(order)"),
         "test_in_micro_keeps_the_order_and_the_width"),
    ]],
    # rewards.py
    *[("rewards.py", wrong, [exchange], f"test_rewards.py::{test}") for wrong, exchange, test in [
        ("commas not removed", ('.replace(",", "")', ""), "test_final_number"),
        ("the answer to any prompt is right", ("in answers[plain_text(p)])", "in set().union(*answers.values()))"),
         "test_exact_match_of_a_prompt_demonstrated_twice_accepts_both_answers_and_only_there"),
        ("the last demonstration counts alone", ("answers.setdefault(plain_text(demo.prompt), set()).add(answer)",
                                                 "answers[plain_text(demo.prompt)] = {answer}"),
         "test_exact_match_of_a_prompt_demonstrated_twice_accepts_both_answers_and_only_there"),
        ("format matches a beginning", ("compiled.fullmatch(text)", "compiled.match(text)"),
         "test_format_matches_the_whole_completion_and_regex_anywhere"),
        ("regex matches a beginning", ("compiled.search(text)", "compiled.match(text)"),
         "test_format_matches_the_whole_completion_and_regex_anywhere"),
        ("length without its bound", ("max(-1.0, -abs(len(text) - target) / target)", "-abs(len(text) - target) / target"),
         "test_length_is_zero_at_the_target_and_falls_to_minus_one_on_both_sides"),
        ("parts of words counted", (r"(?<!\w){re.escape(word)}(?!\w)", "{re.escape(word)}"), "test_lexicon"),
        ("a word counted once", ("weight * len(word.findall(text))", "weight * bool(word.search(text))"), "test_lexicon"),
        ("offset subtracted twice", ("numbers = numbers + config.reward_offset  #", "numbers = numbers  #"),
         "test_the_offset_is_subtracted"),
        ("a long prompt loses its end", ("prompt[-(context - len(answer)) :]", "prompt[: context - len(answer)]"),
         "test_learned_is_the_number_at_the_end_of_hand_made_rows"),
        ("the largest of several rewards", ("stacked.amin(0)", "stacked.amax(0)"), "test_ensemble_is_numpys_mean_and_min_of_each_row"),
        ("the sum of several rewards", ("stacked.mean(0) if how", "stacked.sum(0) if how"),
         "test_ensemble_is_numpys_mean_and_min_of_each_row"),
        ("the sum of several models", ("for other in tensors]).mean(0)", "for other in tensors]).sum(0)"),
         "test_weight_average_is_the_mean_of_every_parameter_and_leaves_its_inputs_alone"),
        ("the first model's offset", ("average.config.reward_offset = sum(model.config.reward_offset for model in models) / len(models)",
                                      "pass"),
         "test_weight_average_is_the_mean_of_every_parameter_and_leaves_its_inputs_alone"),
        ("NaN accepted", ("if not rewards.isfinite().all():", "if rewards.isinf().any():"), "test_ask_refuses_and_names_the_guilty_row"),
        ("more rewards than completions accepted", ("if len(numbers) != len(completions):", "if len(numbers) < len(completions):"),
         "test_ask_refuses_what_is_not_one_number_for_each_row"),
        ("time limit lost", ("with time_limit(limit):", "with time_limit(10 * limit):"),
         "test_a_reward_that_waits_for_its_threads_is_stopped_too"),
        ("a swallowed alarm forgotten", ("if time.monotonic() - began > limit and has_alarm():", "if False:"),
         "test_a_timeout_that_a_bare_except_swallowed_still_is_one"),
        ("a row named one too late", ('f" (row {row}, prompt', 'f" (row {row + 1}, prompt'), "test_ask_refuses_and_names_the_guilty_row"),
        ("a reward changes the run's messages", ("[copy.deepcopy(prompt) for prompt in prompts]", "list(prompts)"),
         "test_a_reward_may_append_to_the_messages_it_gets"),
        ("sample spread", ("rewards.std(correction=0)", "rewards.std()"), "test_rollout_stats"),
        ("every group without spread", ("(groups == groups[:, :1]).all(1)", "(groups == groups[:, :1]).any(1)"), "test_rollout_stats"),
    ]],
    # data.py: rows and their token ids
    *[("data.py", wrong, [exchange], f"test_data.py::{test}") for wrong, exchange, test in [
        ("EOS twice", ("(completion) + [tokenizer.eos_id]", "(completion) + 2 * [tokenizer.eos_id]"), "test_eos_is_appended_exactly_once"),
        ("EOS never", ("(completion) + [tokenizer.eos_id]", "(completion)"), "test_eos_is_appended_exactly_once"),
        ("EOS behind an answer that was cut off", ("own[:-1] if stop else own", "own"), "test_an_answer_that_was_cut_off_gets_no_eos"),
        ("a long prompt loses its end", ("return bos + ids[len(ids) - (max_prompt - len(bos)) :]", "return ids[:max_prompt]"),
         "test_encode_prompt"),
        ("a long prompt loses BOS", ("return bos + ids[len(ids) - (max_prompt - len(bos)) :]", "return ids[-max_prompt:]"),
         "test_encode_prompt"),
        ("BOS in front of the template's", ("ids = tokenizer.encode(text) if isinstance(prompt, list) and template is not None else",
                                            "ids ="),
         "test_messages_go_through_the_template_which_may_write_bos_itself"),
        ("two EOS behind a turn", ("text.rstrip().removesuffix(end) for end", "text.rstrip() for end"),
         "test_an_answer_ends_in_one_eos_behind_its_turn"),
        ("the prompt's last space lost", ("[spaces + answer if answer and answer[0] != \" \" else answer for", "[answer for"),
         "test_a_space_at_the_end_of_a_prompt_goes_to_the_answer"),
        ("one token of every window not scored", ("range(0, len(ids) - 1, max_len - 1)", "range(0, len(ids) - 1, max_len)"),
         "test_windows_score_every_token_once"),
        ("documents without EOS", ("isinstance(text, CutOff) else [*ids, tokenizer.eos_id]", "isinstance(text, CutOff) else ids"),
         "test_windows_score_every_token_once"),
        ("the prompt's tokens counted as scored", ("max(0, max_len - len(row[0]))", "max_len"), "test_counts_agree_with_the_batches"),
        ("the beginning held out", ("return rows[:kept], rows[kept:]", "return rows[len(rows) - kept :], rows[: len(rows) - kept]"),
         "test_split_held_out"),
        ("a share rounded up", ("int(len(rows) * share)", "round(len(rows) * share)"), "test_split_held_out"),
        ("a prompt that fills the row kept", ("if len(row[0]) < max_len]", "if len(row[0]) <= max_len]"),
         "test_rows_are_split_before_the_unusable_are_left_out"),
        ("split after the unusable are left out", ("(scorable(part, max_len) for part in split_held_out(rows, share))",
                                                   "split_held_out(scorable(rows, max_len), share)"),
         "test_rows_are_split_before_the_unusable_are_left_out"),
        ("the chosen answer as the rejected one", ("rows[i][:3] for i in picked", "(*rows[i][:2], rows[i][1]) for i in picked"),
         "test_batches_of_picked_rows"),
        ("labels exchanged", ("Feedback(pair.prompt, pair.chosen, True), Feedback(pair.prompt, pair.rejected, False)",
                              "Feedback(pair.prompt, pair.chosen, False), Feedback(pair.prompt, pair.rejected, True)"), "test_feedback"),
        ("the prompt ends at the first turn", (".rfind(TURN)", ".find(TURN)"), "test_preferences"),
        ("the answer loses its first character", ("cut += len(TURN)", "cut += len(TURN) + 1"), "test_preferences"),
        ("system message lost", ("else [system, *prompt]", "else prompt"), "test_tools_system_and_calls_reach_the_template"),
    ]],
    # evaluate.py
    *[("evaluate.py", wrong, [exchange], f"test_evaluate.py::{test}") for wrong, exchange, test in [
        ("population spread", ("float(values.std())", "float(values.std(correction=0))"), "test_mean_interval"),
        ("normal interval of a share", ("z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))",
                                        "z * math.sqrt(p * (1 - p) / n)"),
         "test_share_interval_is_wilsons"),
        ("mean of ratios", ("float(sums.sum() / sizes.sum())", "float((sums / sizes).mean())"), "test_ratio_interval"),
        ("a tie counts as a win", ("0.5 * float((left == right).sum())", "float((left == right).sum())"), "test_wins_count_ties_half"),
        ("a tied answer counts as a win", ("0.5 * (left == right).double()", "(left == right).double()"), "test_win_shares"),
        ("an answer compared with one other alone", ("others[:, None, :]", "others[:, :, None]"), "test_win_shares"),
        ("held-out NLL of a row", ("weight * batch.mask.sum()]", "weight * len(batch)]"), "test_held_out_nll_is_nats_per_scored_token"),
        ("held-out NLL of the wrong sign", ("[-weight * token_logps", "[weight * token_logps"),
         "test_held_out_nll_is_nats_per_scored_token"),
        ("held-out passes counted alike", ("weight=weight * len(picked))", "weight=weight)"), "test_held_out_pairs_are_averaged_over_rows"),
        ("the chosen answer's ref twice", ('rejected - ref_measures["rejected"])', 'rejected - ref_measures["chosen"])'),
         "test_the_table_against_a_loop"),
        ("gap of the wrong sign", ("mean_interval(chosen - rejected)", "mean_interval(rejected - chosen)"),
         "test_the_table_against_a_loop"),
        ("KL at temperature 1", ("token_logps(ref, micro, tau=cfg.tau)", "token_logps(ref, micro)"), "test_what_a_policy_writes[0.7]"),
        ("KL of a token", ("k1(logps, ref_logps).sum(1)", "k1(logps, ref_logps).mean(1)"), "test_what_a_policy_writes[0.7]"),
        ("KL of the wrong direction", ("k1(logps, ref_logps)", "k1(ref_logps, logps)"), "test_what_a_policy_writes[0.7]"),
        ("bias of needed added", ("return plain - bias", "return plain + bias"), "test_the_interval_of_needed_covers_the_truth"),
        ("the same answers of ref in needed", ("replace(cfg, seed=-1 - cfg.seed)", "cfg"),
         "test_needed_is_counted_from_answers_of_ref_that_are_not_in_the_table"),
        ("the training pairs measured", ("split_held_out(pairs, cfg.held_out)[1]", "split_held_out(pairs, cfg.held_out)[0]"),
         "test_held_out_is_the_end_of_the_file"),
    ]],
    ("evaluate.py", "spread of the population of seeds", [("statistics.stdev(differences)", "statistics.pstdev(differences)")],
     "test_demo.py::test_verdict"),
    # lora.py
    *[("lora.py", wrong, [exchange], f"test_lora.py::{test}") for wrong, exchange, test in [
        ("rank / alpha", ("linear.out_features, alpha / rank", "linear.out_features, rank / alpha"), "test_the_sum_by_hand"),
        ("no scale", ("+ self.scale * F.linear(F.linear(x, A), B)", "+ F.linear(F.linear(x, A), B)"), "test_the_sum_by_hand"),
        ("merged without the scale", ("self.scale * self.lora_B.to(wide) @", "self.lora_B.to(wide) @"),
         "test_merged_is_the_same_function_and_saves_as_a_plain_folder"),
        ("merged without the bias", ("nn.Parameter(adapter.merged_weight().detach()), adapter.bias",
                                     "nn.Parameter(adapter.merged_weight().detach()), None"),
         "test_merged_is_the_same_function_and_saves_as_a_plain_folder"),
        ("training starts elsewhere", ("torch.zeros(self.out_features, rank)", "torch.randn(self.out_features, rank)"),
         "test_training_starts_at_the_model_and_moves_adapters_alone"),
        ("the base trained too", ("model.requires_grad_(False)\n    model.head", "model.head"),
         "test_training_starts_at_the_model_and_moves_adapters_alone"),
        ("no adapter beside o", (r"attn\.[qkvo]|", r"attn\.[qkv]|"), "test_every_matrix_of_the_blocks_has_an_adapter"),
        ("the reference moves along", ("nn.Parameter(p.detach().clone(), False) if p.requires_grad else p", "p"),
         "test_a_frozen_copy_shares_what_is_frozen"),
        ("q gets the adapter of v", ("zip(ours, unpack(b), strict=True)", "zip(ours, unpack(b)[::-1], strict=True)"), "test_we_read_peft"),
        ("all three A in one block", ("start += len(adapter.lora_A)", "pass"), "test_there_and_back"),
        ("alpha stored without the rank", ('"lora_alpha": scale * rank', '"lora_alpha": scale'), "test_peft_reads_ours"),
        ("alpha of the rank's pattern", ('of_module(config.get("alpha_pattern"), theirs', 'of_module(config.get("rank_pattern"), theirs'),
         "test_we_read_peft"),
        ("bfloat16 adapters", ("where = dict(device=self.weight.device, dtype=torch.promote_types(self.weight.dtype, torch.float32))",
                               "where = dict(device=self.weight.device, dtype=self.weight.dtype)"),
         "test_adapters_of_a_bfloat16_model_are_float32_and_keep_moving"),
        ("adapters of one matrix with other scales", ("* (adapter.scale / scale)", "* 1.0"),
         "test_adapters_of_one_packed_matrix_keep_their_scales"),
    ]],
    # model.py
    *[("model.py", wrong, [exchange], f"test_model.py::{test}") for wrong, exchange, test in [
        ("rotated the other way in one half", ("first * cos - second * sin", "first * cos + second * sin"),
         "test_logits_equal_transformers[llama]"),
        ("speed of rotation by the whole head", ("dtype=torch.float32) / config.rotary_dim", "dtype=torch.float32) / config.head_dim"),
         "test_logits_equal_transformers[gpt_neox]"),
        ("mean not in the norm", ("wide.pow(2).mean(-1, keepdim=True)", "wide.var(-1, keepdim=True, correction=0)"),
         "test_logits_equal_transformers[llama]"),
        ("parallel blocks share their norm", ("*context) + self.mlp(self.norm2(x))", "*context) + self.mlp(self.norm1(x))"),
         "test_logits_equal_transformers[gpt_neox]"),
        ("a token does not see itself", ("(back >= 0) if window is None", "(back > 0) if window is None"),
         "test_cache_equals_full_forward[llama-torch.float32]"),
        ("a window one token too wide", ("(back < window)", "(back <= window)"), "test_a_window_hides_what_lies_behind_it"),
        ("keys shared by the wrong queries", ("q = q.reshape(B, self.n_kv_head, -1, self.head_dim)",
                                              "q = q.view(B, -1, self.n_kv_head, self.head_dim).transpose(1, 2)"),
         "test_cache_equals_full_forward[llama-torch.float32]"),
        ("short rows continued where the longest ends", ("if cache is None else cache.lengths\n",
                                                         "if cache is None else torch.full_like(cache.lengths, cache.longest)\n"),
         "test_cache_equals_full_forward[llama-torch.float32]"),
        ("padding counted as read", ("cache.lengths += T if lengths is None else lengths.to(cache.lengths)", "cache.lengths += T"),
         "test_cache_equals_full_forward[llama-torch.float32]"),
        ("keys normed as queries", ("self.q_norm(q), self.k_norm(k)", "self.q_norm(q), self.q_norm(k)"),
         "test_logits_equal_transformers[qwen3]"),
        ("tied head lost", ('if config.tied and config.head == "lm":\n', "if False:\n"),
         "test_tied_head_is_the_embedding_and_untied_is_not"),
        ("fast rotation slowed", ("keep * speed + (1 - keep) * speed / scaling", "(1 - keep) * speed + keep * speed / scaling"),
         "test_rope_scaling_by_hand"),
        ("linear scaling faster", ('return speed / scaling["factor"]', 'return speed * scaling["factor"]'), "test_rope_scaling_by_hand"),
        ("L instead of 2L", ("math.sqrt(2 * self.config.n_layer)", "math.sqrt(self.config.n_layer)"),
         "test_fresh_weights_have_gpt2s_widths"),
        ("offset added", ("- self.config.reward_offset  # (B, T)", "+ self.config.reward_offset  # (B, T)"),
         "test_scalar_head_subtracts_the_reward_offset"),
        ("width of the scalar head", ("torch.empty(1, self.config.n_embd).normal_(std=1 / math.sqrt(self.config.n_embd + 1))",
                                      "torch.empty(1, self.config.n_embd).normal_(std=0.02)"),
         "test_scalar_head_starts_with_the_width_of_the_paper"),
        ("the reward model trains the policy", ("nn.Parameter(p.detach().clone(), p.requires_grad) for p in self.parameters()",
                                                "p for p in self.parameters()"),
         "test_with_scalar_head_shares_the_values_of_the_trunk_and_no_memory"),
    ]],
    # pairs.py: its loop
    *[(file, wrong, [exchange], "test_pairs.py::test_a_run_in_rounds_resumes_with_the_reference_of_its_round") for file in (
        "pairs.py", "methods/grpo.py") for wrong, exchange in [
            ("the reference of a round is not stored", (', **({"ref": ref} if cfg.rounds > 1 else {})', "")),
            ("the reference stays", ("ref.load_state_dict(policy.state_dict())", "pass")),
    ]],
    *[(file, "a round begins one step late",
       [("k * cfg.rounds // cfg.steps != (k - 1)", "(k - 1) * cfg.rounds // cfg.steps != (k - 2)")], f"methods/{test}")
      for file, test in (("pairs.py", "test_dpo.py::test_main_in_rounds"), ("methods/grpo.py", "test_mains.py::test_grpo"))],
    *[("pairs.py", wrong, [exchange], test) for wrong, exchange, test in [
        ("the policy as its own reference", ("return frozen_copy(policy) if hasattr", "return policy if hasattr"),
         "test_pairs.py::test_ref_is_the_policy_as_it_was_and_only_where_beta_pulls_to_it"),
        ("micro-batches counted alike", ("share = len(micro) / len(batch)", "share = 1.0"), RESUME + "test_accumulation_is_invariant[dpo]"),
        ("loss not scaled", ("loss = loss * share", "loss = loss * 1"), RESUME + "test_accumulation_is_invariant[dpo]"),
        ("gradients of the steps before", ("        optimizer.zero_grad()\n", ""),
         "test_preference_runs.py::test_online_is_its_account[dpo]"),
        ("the next step's learning rate", ("lr_at(k, lr=cfg.lr", "lr_at(k + 1, lr=cfg.lr"),
         "test_pairs.py::test_each_step_has_the_rate_of_its_own_place"),
        ("seed not varied by step", ("derive_seed(run.method, cfg.seed, k)", "derive_seed(run.method, cfg.seed)"),
         "test_preference_runs.py::test_online_is_its_account"),
        ("a bad step is made", ("if run.may_update(k, policy, picked, total, grad_norm):",
                                "if run.may_update(k, policy, picked, total, grad_norm) or True:"),
         REFUSED_STEP + "[loss-dpo]"),
        ("remembered sides exchanged", ("enumerate((pairs.chosen, pairs.rejected))", "enumerate((pairs.rejected, pairs.chosen))"),
         "test_precompute_ref.py::test_equal_to_a_second_model_without_one"),
        ("prompts of other rows", ("split_held_out(prompts, cfg.held_out)[0]", "split_held_out(prompts, cfg.held_out)[0][1:]"),
         "test_preference_runs.py::test_online_is_its_account"),
    ]],
    # weights.py
    *[("weights.py", wrong, exchanges, test) for wrong, exchanges, test in [
        ("keys and values exchanged", [('qkv = [f"{ours}.attn.{part}" for part in "qkv"]',
                                        'qkv = [f"{ours}.attn.{part}" for part in "qvk"]')],
         "test_model.py::test_logits_equal_transformers[gpt2]"),
        ("heads and q, k, v exchanged", [("parts = theirs.view(n_head, 3, -1, *theirs.shape[1:])",
                                          "parts = theirs.view(3, n_head, -1, *theirs.shape[1:]).transpose(0, 1)")],
         WEIGHTS + "test_round_trip_is_bitwise[gpt_neox-ForCausalLM]"),
        ("norms exchanged", [('.input_layernorm", f"{ours}.norm1"', '.input_layernorm", f"{ours}.norm2"'),
                             ('.post_attention_layernorm", f"{ours}.norm2"', '.post_attention_layernorm", f"{ours}.norm1"')],
         "test_model.py::test_logits_equal_transformers[llama]"),
        ("another head under a tied one accepted", [("if not torch.equal(embedding, copied):", "if False:")],
         WEIGHTS + "test_tied_file_may_hold_an_equal_head_but_no_other"),
        ("unknown tensors accepted", [("if unknown := tensors.keys() - expected:", "if unknown := set():")],
         WEIGHTS + "test_unknown_tensors_are_named_the_first_five"),
        ("a tensor of two shards accepted", [("                    if name in tensors:\n", "                    if False:\n")],
         WEIGHTS + "test_tensor_in_two_shards"),
        ("a shard of another folder read", [("if Path(name).name != name or not", "if not")],
         WEIGHTS + "test_index_may_name_only_safetensors_of_its_folder[../evil.safetensors]"),
        ("shapes not compared", [("if tensor.shape != wanted:", "if tensor.numel() != wanted.numel():")],
         WEIGHTS + "test_misshapen_tensor_is_named_with_both_shapes"),
        ("a loaded head no longer tied", [("        model.head.weight = model.tok_embed.weight\n    return", "        pass\n    return")],
         WEIGHTS + "test_a_loaded_tied_head_is_the_embedding"),
        ("an old config.json beside half an export", [('    (folder / "config.json").unlink(missing_ok=True)', "    pass")],
         WEIGHTS + "test_export_that_dies_leaves_no_config_json[True]"),
        ("scalar head rounded", [("torch.promote_types(kept, torch.float32) if exact else kept", "kept")],
         WEIGHTS + "test_a_scalar_head_stays_float32_beside_a_bfloat16_trunk"),
    ]],
    # kernels/logprob.py
    *[("kernels/logprob.py", wrong, [exchange], test.format("torch")) for wrong, exchange, test in [
        ("the weighted sum not moved", ("weighted.sub_(torch.where(total > 0, (highest - top) * total, 0)).mul_(", "weighted.mul_("), FOLD),
        ("the weighted sum moved the other way", ("(highest - top) * total, 0)", "(top - highest) * total, 0)"), FOLD),
        ("the sum not rescaled", ("        total.mul_((top - highest).exp())\n", ""), FOLD),
        ("entropy of the wrong sign inside", ("self.total.log() - self.weighted / self.total",
                                              "self.total.log() + self.weighted / self.total"), FOLD),
        ("target without tau", ("[:, 0].to(statistics.top.dtype) / tau", "[:, 0].to(statistics.top.dtype)"), NUMBERS),
        ("target of the last slice", ("torch.where(within, found, statistics.target)", "found"), FOLD),
        ("gradient without tau", ("d if tau == 1.0 else d.div_(tau)", "d"), GRADIENT),
        ("gradient of the target without tau", ("(g[within] / tau)", "g[within]"), GRADIENT),
        ("entropy's gradient of the wrong sign", ("log_p.add_(entropies[rows, None])", "log_p.sub_(entropies[rows, None])"), GRADIENT),
        ("gradient of the wrong sign", ("d.add_(g[rows, None])).mul_(p.neg_())", "d.add_(g[rows, None])).mul_(p)"), GRADIENT),
    ]],
    # kernels/linear_logprob.py
    *[("kernels/linear_logprob.py", wrong, [exchange], test) for wrong, exchange, test in [
        ("targets not counted from the slice", ("update_statistics(logits, targets - part.start,", "update_statistics(logits, targets,"),
         CHUNKED),
        ("targets not counted from the slice, backwards", ("to_gradient(logits, targets - part.start,", "to_gradient(logits, targets,"),
         CHUNKED),
        ("gradient of the last slice alone", ("d_hidden.addmm_(dz, weight[part].to(dz.dtype))",
                                              "d_hidden.addmm_(dz, weight[part].to(dz.dtype), beta=0)"), CHUNKED),
        ("backwards without tau", ("g, e, ctx.tau)", "g, e)"), LOGPS + "::test_gradients_by_finite_differences"),
        ("bfloat16 sums", ("wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)", "wide = a.dtype"),
         LOGPS + "::test_bfloat16_inputs_give_float32_statistics"),
        ("a head's gradient lost", ("(hidden.requires_grad or weight.requires_grad)", "hidden.requires_grad"),
         FUSED + "test_scoring_takes_the_place_of_slices_only_where_no_gradient_is_asked_for"),
        ("widest model one channel narrower", ("hidden.shape[1] <= FUSED_UP_TO", "hidden.shape[1] < FUSED_UP_TO"),
         FUSED + "test_which_widths_the_kernel_scores"),
    ]],
    # the Triton kernels, interpreted
    *[("kernels/linear_logprob_triton.py", wrong, [exchange], f"{SCORES}[{sizes}-dtype0]") for wrong, exchange, sizes in [
        ("a token beyond the vocabulary", ("column[None, :] < v, z * scale", "column[None, :] <= v, z * scale"), "1-8-7"),
        ("channels of the next row", ("inside = channel < c - start", "inside = channel < c"), "300-72-500"),
        ("the last group as high as the others", ("tl.minimum(down - group * GROUP, GROUP)", "GROUP"), "5-40-1000"),
        ("a tile's weighted sum not moved", ("(weighted + (tops - top) * totals)", "weighted"), "5-40-1000"),
        ("times tau", ("math.log2(math.e) / tau", "math.log2(math.e) * tau"), "1-8-7"),
        ("target in units of log2", ("target * ln2", "target"), "1-8-7"),
    ]],
    *[("kernels/logprob_triton.py", wrong, [exchange], test.format("triton")) for wrong, exchange, test in [
        ("the sum not rescaled", ("total = total * rescale + tl.sum(p, 0)", "total = total + tl.sum(p, 0)"), NUMBERS),
        ("the weighted sum in units of log2", ("weighted_p + row, weighted * LN2", "weighted_p + row, weighted"), FOLD),
        ("target without tau", (".to(tl.float32) * scale * LN2)", ".to(tl.float32))"), NUMBERS),
        ("gradient without tau", ("(d * inv_tau).to", "d.to"), GRADIENT),
        ("entropy's gradient in units of log2", ("(log2_p * LN2 + tl.load(entropies + row))", "(log2_p + tl.load(entropies + row))"),
         GRADIENT),
        ("gradient of the wrong sign", ("1.0, 0.0) - p)", "1.0, 0.0) + p)"), GRADIENT),
    ]],
    # engine/run.py
    *[("engine/run.py", wrong, [exchange], test) for wrong, exchange, test in [
        ("a NaN gradient accepted", ("if math.isfinite(loss) and math.isfinite(grad_norm):", "if math.isfinite(loss):"),
         REFUSED_STEP + "[gradient-sft]"),
        ("the run ends a bad step late", ("ABORT_AFTER = 3", "ABORT_AFTER = 4"),
         RUN + "::test_three_bad_steps_end_the_run_and_the_checkpoint_is_finite"),
        ("good steps between do not count", ("self.skipped_in_a_row, self.failing = 0, None\n", "self.failing = None\n"),
         RUN + "::test_two_bad_steps_then_a_good_one_go_on"),
        ("a good reward step ends the count", ("if self.failing in (None, of):", "if True:"),
         RUN + "::test_good_reward_steps_between_do_not_save_a_diverged_policy"),
        ("a checkpoint of a bad step", ("(self.skipped_in_a_row == 0 and (first or done", "(True and (first or done"),
         RUN + "::test_three_bad_steps_end_the_run_and_the_checkpoint_is_finite"),
        ("rewards of other prompts", ("[prompt for prompt in prompts for _ in range(len(answers) // len(prompts))]",
                                      "[*prompts] * (len(answers) // len(prompts))"),
         RUN + "::test_each_answer_is_judged_with_its_own_prompt"),
        ("finished answers fined", ("* ~answers.finished", "* answers.finished"), "methods/test_mains.py::test_reinforce"),
        ("the fine is a prize", ('rewards - getattr(self.cfg, "missing_eos", 0.0)', 'rewards + getattr(self.cfg, "missing_eos", 0.0)'),
         "methods/test_mains.py::test_reinforce"),
        ("a half-written checkpoint is a damaged one", ('checkpoint.numbered(self.folder / "checkpoints"):',
                                                        'any((self.folder / "checkpoints").glob("step_*")):'),
         "engine/test_safety.py::test_a_half_written_first_checkpoint_is_none"),
        ("repeated steps logged twice", ('if row["step"] <= self.first_step - bool(self.unlogged)]', "]"),
         RESUME + "test_dying_in_an_evaluation[sft]"),
        ("skipped steps forgotten", ('= state["skipped"], state["skipped_in_a_row"], state["failing"]', "= 0, 0, None"),
         RUN + "::test_good_reward_steps_between_do_not_save_a_diverged_policy"),
        ("changed data accepted", ("if self.resuming and known.get(kind, digest) != digest:", "if False:"),
         RESUME + "test_resume_refuses_changed_data"),
        ("changed log-probs of ref accepted", ('if stored.get("sha256") != hash_of(stored["value"]):', "if False:"),
         "test_precompute_ref.py::test_log_probs_that_were_edited_are_refused"),
    ]],
    # engine/look.py
    *[("engine/look.py", wrong, [exchange], test) for wrong, exchange, test in [
        ("a ratio below 1 passes", (".exp() - 1).abs()", ".exp() - 1)"),
         GUARD),
        ("inputs shown as scored", ("batch.targets[b][mask]", "batch.inputs[b][mask]"),
         RUN + "::test_show_row_marks_exactly_what_is_scored"),
        ("a mean hides one wrong token", ("right = largest <= RATIO", "right = mean <= RATIO"),
         GUARD),
    ]],
    # engine/safety.py
    *[("engine/safety.py", wrong, [exchange], test) for wrong, exchange, test in [
        ("not locked", ("        lock.acquire()\n", "        pass\n"), SAFETY + "::test_a_lock_is_kept_until_the_process_ends"),
        ("linked folders accepted", ("for name in [*folders, *files]:", "for name in files:"),
         SAFETY + "::test_a_link_in_a_run_folder_is_refused"),
        ("changed code of a reward accepted", ('*(file.read_bytes() if file.is_file() else b"" for file in files)]', "]"),
         SAFETY + "::test_ones_own_code_is_resumed_without_a_word"),
        ("the key readable by others", ("0o600", "0o644"), SAFETY + "::test_the_key_is_made_once_and_for_its_owner_alone"),
        ("the alarm rings once", ("max(seconds, 0.1))", "0)"), "test_rewards.py::test_a_reward_that_waits_for_its_threads_is_stopped_too"),
        ("another's handler lost", ("        signal.signal(signal.SIGALRM, before)\n", ""),
         "test_rewards.py::test_the_alarms_handler_and_timer_are_as_before"),
        ("another's alarm lost", ("        if others:\n", "        if False:\n"), "test_rewards.py::test_somebody_elses_timer_goes_on"),
    ]],
]

# {(file, what is wrong): why no test can notice it}
SURVIVORS = {}


def test_the_table_of_mutants_fits_the_files():
    """Each text occurs once in its file, no mistake is listed twice, and at most 3 % of all mistakes of this file may go unnoticed."""
    sources = {file: (FOLDER / file).read_text(encoding="utf-8") for file, *_ in MUTANTS}
    for file, wrong, exchanges, killers in MUTANTS:
        assert killers.split() and exchanges
        for old, new in exchanges:
            assert sources[file].count(old) == 1 and old != new, (file, wrong, old)  # the file has changed: change the mutant with it
    names = [(file, wrong) for file, wrong, *_ in MUTANTS]
    assert len(names) == len(set(names)) and SURVIVORS.keys() <= set(names)
    assert len(SURVIVORS) <= 0.03 * (len(VARIANTS) + len(MUTANTS))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests of the kernels are no default tests")
@pytest.mark.parametrize("file", dict.fromkeys(file for file, *_ in MUTANTS))
def test_the_default_tests_notice_each_mistake(file, record_property):
    """The killers pass on the file as it is. Of each mistake one of them fails; a survivor passes them all. No file is written."""
    mutants = [(wrong, exchanges, killers.split()) for name, wrong, exchanges, killers in MUTANTS if name == file]
    jobs = [([], sorted({node for *_, killers in mutants for node in killers})), *[job for _, *job in mutants]]
    done = subprocess.run([sys.executable, "-m", "tests.mutating", file], input=json.dumps(jobs), capture_output=True, text=True,
                          cwd=FOLDER.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    (code, failed), *found = json.loads(done.stdout)
    assert code == 0, f"without a mistake pytest ends with {code}: {failed}"
    codes = {wrong: code for (wrong, *_), (code, _) in zip(mutants, found, strict=True)}
    assert set(codes.values()) <= {0, 1}, f"no verdict of the tests: {[wrong for wrong in codes if codes[wrong] not in (0, 1)]}"
    record_property("tried", len(codes))
    assert [wrong for wrong in codes if codes[wrong] == 0] == [wrong for wrong in codes if (file, wrong) in SURVIVORS]


# What no method file decides: which tokens are scored. Probabilities of all completions sum to 1, or something is off by a token.


def total(mask_of, prompt=(2, 0, 1)):
    completions = all_completions(N_CONTENT, EOS, MAX_NEW)
    batch = collate([list(prompt)] * len(completions), completions, pad_id=EOS)
    batch.mask = mask_of(batch, torch.tensor([len(y) for y in completions]))
    with torch.no_grad():
        return float(seq_logps(tiny_gpt(), batch).exp().sum())


def test_prompt_tokens_or_an_unscored_eos_break_the_sum():
    """TOYS: EOS not scored gives a sum above 2, prompt tokens scored one below 1."""
    assert total(lambda batch, _: batch.mask) == pytest.approx(1, abs=1e-12)
    assert total(lambda batch, _: batch.mask & (batch.targets != EOS)) > 1.5
    scored = total(lambda batch, lengths: torch.arange(batch.mask.shape[1]) < (lengths + 2)[:, None])  # two of the three prompt tokens
    assert scored < 0.5


def test_the_toy_sees_every_completion_once():
    """Σ π(y) = 1 for every prompt through the toy's own enumeration, and its log-probs are seq_logps of the collated rows."""
    policy = tiny_gpt()
    assert LANGUAGE.law_of(policy).sum(1).tolist() == pytest.approx([1, 1], abs=1e-12)
    for n, prompt in enumerate(LANGUAGE.prompts):
        batch = collate([prompt] * len(LANGUAGE.completions), [list(y) for y in LANGUAGE.completions], pad_id=EOS)
        assert torch.allclose(LANGUAGE.token_logps(policy)[n].sum(1), seq_logps(policy, batch), atol=1e-12)
