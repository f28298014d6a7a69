"""The checks have teeth: each mistake that is easy to make is made, one at a time, in the source of a method, and a test must fail.

A variant is the method's own file with one piece of text exchanged, executed as a module (`rewards`: minialign/rewards.py). It is put
through every test of tests/methods/test_<method>.py that takes the module as its only argument `m`. Training alone would let half of these
through: with the KL in the reward the advantages are constant at π*, so a policy trained with advantages that are too small, or divided by
the wrong spread, still lands there (the ones marked "invisible at π*").
"""

import importlib
import inspect
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
    ("ppo", "no KL", [("-beta * torch.where(mask, k1(logps, ref_logps), 0)", "0 * logps")]),
    ("ppo", "KL sign flipped", [("token_rewards = -beta *", "token_rewards = beta *")]),
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
    ("ppo", "score at the first token", [("last[:, None], rewards", "0 * last[:, None], rewards")]),
    ("ppo", "score one slot late", [(".argmax(1)  # (B,) from", ".argmax(1).add(1).clamp(max=mask.shape[1] - 1)  # (B,) from")]),
    ("ppo", "score at every token", [
        ("token_rewards.scatter_add(1, last[:, None], rewards.to(token_rewards)[:, None])", "(token_rewards + rewards[:, None])"),
    ]),
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
    ("slic", "target is the rejected answer", [("rejected_logps, chosen_logps, delta", "rejected_logps, rejected_logps, delta")]),
    ("slic", "likelihood without a gradient", [("rejected_logps, chosen_logps, delta", "rejected_logps, chosen_logps.detach(), delta"),
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
    ("kto", "σ of the other sign", [("1 - torch.sigmoid(beta * gain)", "torch.sigmoid(beta * gain)")]),
    ("kto", "log σ: no saturation", [("lost = 1 - torch.sigmoid(beta * gain)", "lost = -torch.sigmoid(beta * gain).log()")]),
    ("kto", "1/β instead of β", [("torch.sigmoid(beta * gain)", "torch.sigmoid(gain / beta)")]),
    ("kto", "β on the log-ratio only", [("gain = torch.where(desirable, logratio - kl, kl - logratio)",
                                         "gain = torch.where(desirable, beta * logratio - kl, kl - beta * logratio)"),
                                        ("torch.sigmoid(beta * gain)", "torch.sigmoid(gain)")]),
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
