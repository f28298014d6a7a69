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
BOUNDED = "config.reward_bound * torch.sigmoid(rewards) if config.reward_bound else rewards"

# method, what is wrong, [(text in the file, what stands there instead)]
VARIANTS = [
    # the KL in the reward
    *[(method, "KL sign flipped", [("scores - beta * k1(", "scores + beta * k1(")]) for method in ("reinforce", "rloo", "rebel")],
    *[(method, "KL averaged over tokens, not summed", [("ref_logps).sum(1)).detach()", "ref_logps).mean(1)).detach()")])
      for method in ("reinforce", "rloo", "rebel")],
    ("reinforce", "KL reward not detached", [
        ("ref_logps).sum(1)).detach()", "ref_logps).sum(1))"),
        ("advantages.detach() * seq", "advantages * seq"),
    ]),
    ("rloo", "KL reward not detached", [
        ("ref_logps).sum(1)).detach()", "ref_logps).sum(1))"),
        ("ratio.exp(), advantages.detach()", "ratio.exp(), advantages"),
    ]),
    ("rebel", "KL reward not detached", [
        ("ref_logps).sum(1)).detach()", "ref_logps).sum(1))"),
        ("other_rewards).detach()", "other_rewards)"),
    ]),
    *[(method, "no KL", [("scores - beta * k1(logps, ref_logps).sum(1)", "scores")]) for method in ("reinforce", "rloo", "rebel")],
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
    ("ppo", "score at the first token", [("last[:, None], scores", "0 * last[:, None], scores")]),
    ("ppo", "score one slot late", [(".argmax(1)  # (B,) from", ".argmax(1).add(1).clamp(max=mask.shape[1] - 1)  # (B,) from")]),
    ("ppo", "score at every token", [
        ("token_rewards.scatter_add(1, last[:, None], scores.to(token_rewards)[:, None])", "(token_rewards + scores[:, None])"),
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
    ("rft", "policy step without its pull", [("method.kl_rewards(scores, answers.old_logps, ref_logps, beta=cfg.beta)", "scores")]),
    ("rft", "policy step with the method's own β", [("method.Config(beta=cfg.beta, tau=cfg.tau,", "method.Config(tau=cfg.tau,")]),
    ("rft", "policy step at temperature 1", [("method.Config(beta=cfg.beta, tau=cfg.tau,", "method.Config(beta=cfg.beta,")]),
    ("rft", "PPO's advantages not whitened", [("whiten(advantages, answers.mask), returns", "advantages, returns")]),
    ("rft", "PPO's micro-batches counted by completions", [("tokens / int(answers.mask.sum())  # means", "share  # means")]),
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
    ("irl", "best and worst exchanged", [("rows(best_of_n.pick(scores)), rows(best_of_n.pick(-scores))",
                                          "rows(best_of_n.pick(-scores)), rows(best_of_n.pick(scores))")]),
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
    ("dpo", "answers exchanged in step", [("(policy, pairs.chosen)", "(policy, pairs.other)"),
                                          ("(policy, pairs.rejected)", "(policy, pairs.chosen)"),
                                          ("(policy, pairs.other)", "(policy, pairs.rejected)")]),
    ("dpo", "ref's answers exchanged", [("(ref, pairs.chosen)", "(ref, pairs.other)"),
                                        ("(ref, pairs.rejected)", "(ref, pairs.chosen)"),
                                        ("(ref, pairs.other)", "(ref, pairs.rejected)")]),
    ("dpo", "the policy as its own ref", [("seq_logps(ref, pairs.chosen)", "seq_logps(policy, pairs.chosen).detach()"),
                                          ("seq_logps(ref, pairs.rejected)", "seq_logps(policy, pairs.rejected).detach()")]),
    ("dpo", "ref trained along", [("torch.no_grad():  # ref is", "torch.enable_grad():  # ref is")]),
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
    ("rewards", "last read one token early", [("places, 0).amax(dim=1)", "places - 1, 0).amax(dim=1)")]),
    ("rewards", "last read at the end of the padding", [("places, 0).amax(dim=1)", "places, 0).amax(dim=1) * 0 + places[-1]")]),
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
