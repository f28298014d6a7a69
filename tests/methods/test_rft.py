"""RFT. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck

from minialign import sample
from minialign.batch import collate, whiten
from minialign.data import encode_pairs, pair_batch, read_preferences
from minialign.engine.common import BadInput, Mean, read_rows
from minialign.methods import grpo, ppo, rebel, rft, rloo
from minialign.rewards import open_reward, score
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained
from tests.alternating import Account
from tests.enumerable import EOS, LANGUAGE, expected, relative, tiny_gpt, tiny_reward_model
from toy import closed_form
from toy.three_actions import minimise


@pytest.fixture
def m():
    return rft


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


E, REF, UNIFORM = f64(0.1, 0.2, 0.7), f64(0.5, 0.3, 0.2), f64(1, 1, 1) / 3


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_values_by_hand(m):
    """r(y) = 1, −.5, r(ỹ) = .4, .25: margins .6, −.75. Linear at β = .3: −(.6 − .75)/2/.3 = .25. bt: (log(1 + e^−.6) + log(1 + e^.75))/2 =
    (.437488 + 1.136871)/2. Ridge .1: + .1·(1 + .16 + .25 + .0625)/2 = .073625."""
    demo, own = f64(1, -0.5), f64(0.4, 0.25)
    loss, stats = m.reward_alignment_loss(demo, own, beta=0.3)
    assert loss.item() == pytest.approx(0.25, abs=1e-12)
    assert stats["rewards/demo"].item() == pytest.approx(0.25) and stats["rewards/sample"].item() == pytest.approx(0.325)
    assert stats["rewards/margins"].item() == pytest.approx(-0.075) and stats["rewards/accuracies"].item() == 0.5
    assert m.reward_alignment_loss(demo, own, beta=0.3, loss="bt")[0].item() == pytest.approx(0.7871795, abs=1e-6)
    for loss, without in (("linear", 0.25), ("bt", 0.7871795)):
        value = m.reward_alignment_loss(demo, own, beta=0.3, loss=loss, ridge=0.1)[0].item()
        assert value == pytest.approx(without + 0.073625, abs=1e-6)
    equal = m.reward_alignment_loss(demo, demo, beta=0.3, loss="bt")
    assert equal[0].item() == pytest.approx(math.log(2)) and equal[1]["rewards/accuracies"].item() == 0.5


def test_gradients_by_hand(m):
    """One row, β = .3: −1/β = −3.3333 for the demonstration, +3.3333 for the own answer, whatever the rewards. bt at margin .6: ∓σ(−.6) =
    ∓.354344, without β. Ridge .1 at r = 1, .4 adds 2·.1·1 and 2·.1·.4. Four rows: a quarter of it each."""
    demo, own = f64(1).requires_grad_(), f64(0.4).requires_grad_()

    def gradient(**settings):
        return [g.item() for g in torch.autograd.grad(m.reward_alignment_loss(demo, own, beta=0.3, **settings)[0], (demo, own))]

    assert gradient() == pytest.approx([-1 / 0.3, 1 / 0.3], abs=1e-12)
    assert gradient(loss="bt") == pytest.approx([-0.354344, 0.354344], abs=1e-6)
    assert gradient(ridge=0.1) == pytest.approx([-1 / 0.3 + 0.2, 1 / 0.3 + 0.08], abs=1e-12)
    assert gradient(loss="bt", ridge=0.1) == pytest.approx([-0.154344, 0.434344], abs=1e-6)
    rows = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (of_four,) = torch.autograd.grad(m.reward_alignment_loss(rows, rows.detach(), beta=0.3)[0], rows)
    assert of_four.tolist() == pytest.approx([-1 / 1.2] * 4, abs=1e-12)


def test_gradient_by_finite_differences(m):
    generator = torch.Generator().manual_seed(0)
    rewards = [torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    for loss in ("linear", "bt"):
        assert gradcheck(lambda d, s, loss=loss: m.reward_alignment_loss(d, s, beta=0.3, loss=loss, ridge=0.2)[0], rewards)


def test_bt_is_torchs_own_op_and_blind_to_shifts(m):
    """−logsigmoid of the margin; adding 5 to both rewards changes nothing, in either loss, unless there is a ridge."""
    demo, own = torch.randn(2, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
    oracle = -torch.nn.functional.logsigmoid(demo - own).mean()
    assert torch.allclose(m.reward_alignment_loss(demo, own, beta=0.3, loss="bt")[0], oracle, atol=1e-14)
    for loss in ("linear", "bt"):
        before, after = (m.reward_alignment_loss(demo + c, own + c, beta=0.3, loss=loss)[0].item() for c in (0, 5))
        assert after == pytest.approx(before, abs=1e-12)
        assert m.reward_alignment_loss(demo + 5, own + 5, beta=0.3, loss=loss, ridge=0.1)[0].item() > before + 1


def test_unknown_loss_and_ranks(m):
    with pytest.raises(BadInput, match="loss='square' is unknown: use linear or bt"):
        m.reward_alignment_loss(f64(0), f64(0), beta=1, loss="square")
    for shapes in (((2, 3), (2, 3)), ((2,), (3,))):
        with pytest.raises(AssertionError):
            m.reward_alignment_loss(*map(torch.zeros, shapes), beta=1)


# ------------------------------------------------------------------------------------------------------ the likelihood it ascends

BETA, RHO = 0.3, (0.3, 0.7)  # not 1: a lost 1/β would change nothing there; two prompts of unequal weight


def rewards_of(net):
    """(N, C): score of every completion of every prompt of the language."""
    completions = [list(y) for y in LANGUAGE.completions]
    return torch.stack([score(net, collate([prompt] * len(completions), completions, pad_id=EOS)) for prompt in LANGUAGE.prompts])


def test_the_expected_gradient_is_that_of_the_likelihood(m):
    """Lemma 3.1 (and 5.1 of the later paper): with own answers from π_r ∝ ref·e^{r/β}, the expected loss has minus the gradient of
    ℓ(φ) = E_{x ~ ρ} E_{y ~ E} log π_r(y|x), in all weights of a GPT that adds a number for every token; over all 85² pairs. With own
    answers from ref instead it is another vector."""
    ref_logps = LANGUAGE.token_logps(tiny_gpt(seed=1)).sum(-1).detach()  # (N, C)
    expert = torch.stack([torch.tensor(closed_form.tilt(ref.exp(), r, 0.5)) for ref, r in zip(ref_logps, LANGUAGE.rewards, strict=True)])
    for bound in (0.0, 3.0):
        net = tiny_reward_model(seed=2, reward_read="sum", reward_bound=bound)
        rewards = rewards_of(net)
        logps = (ref_logps + rewards / BETA).log_softmax(-1)  # (N, C) of π_r
        likelihood = sum(rho * (e @ lp) for rho, e, lp in zip(RHO, expert, logps, strict=True))

        def gradient(scalar, net=net):
            grads = torch.autograd.grad(scalar, list(net.parameters()), retain_graph=True)
            return torch.cat([grad.flatten() for grad in grads])

        def loss(own_law, rewards=rewards):
            terms = [expected(lambda a, b, r=r: m.reward_alignment_loss(r[a], r[b], beta=BETA)[0], e, own)
                     for r, e, own in zip(rewards, expert, own_law, strict=True)]
            return sum(rho * term for rho, term in zip(RHO, terms, strict=True))

        assert relative(-gradient(loss(logps.detach().exp())), gradient(likelihood)) < 1e-10
        assert relative(-gradient(loss(ref_logps.exp())), gradient(likelihood)) > 0.1


ROWS = [[2, EOS], [0, 1, EOS], [3, 3, 1]]  # of unequal length, the last one without EOS


def test_step_is_the_difference_of_mean_gradients(m):
    """Demonstrations a b c c, own answers a a b c: the linear loss adds up, so the gradient is (1/β)·((2a + b + c) − (a + b + 2c))/4 with
    the gradients a b c of each completion's own sum of numbers, each row alone and unpadded, its prompt not counted. bt against
    the same numbers."""
    net, prompt = tiny_reward_model(seed=3, reward_read="sum"), [2, 0, 1]
    sums, gradients = [], []
    for row in ROWS:
        sums.append(net(torch.tensor([prompt + row]))[0, len(prompt) :].sum())
        grads = torch.autograd.grad(sums[-1], list(net.parameters()))
        gradients.append(torch.cat([g.flatten() for g in grads]))
    demos, own = [0, 1, 2, 2], [0, 0, 1, 2]
    batches = [collate([prompt] * 4, [ROWS[i] for i in picked], pad_id=EOS) for picked in (demos, own)]
    cfg = m.Config(beta=BETA)
    loss, _ = m.step(net, *batches, cfg)
    step_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    oracle = sum(gradients[i] for i in own) / 4 - sum(gradients[i] for i in demos) / 4
    assert relative(step_gradient, oracle / BETA) < 1e-12
    bt = m.step(net, *batches, m.Config(loss="bt", ridge=0.1))[0].item()
    r = [s.item() for s in sums]
    pairs = [(r[i], r[j]) for i, j in zip(demos, own, strict=True)]
    assert bt == pytest.approx(sum(math.log1p(math.exp(d - a)) + 0.1 * (a * a + d * d) for a, d in pairs) / 4, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- laws, exact policies


def tilted(ref, reward, beta):
    return (ref.log() + reward / beta).softmax(0)


def alternate(m, expert, ref, *, beta, lr, bound=None, steps=4000, **settings):
    """One exact reward step, one exact policy, until nothing moves: the policies on the way and the last reward."""
    reward, policies = torch.zeros_like(ref), [ref]
    for _ in range(steps):
        leaf = reward.clone().requires_grad_()
        loss = expected(lambda a, b, r=leaf: m.reward_alignment_loss(r[a], r[b], beta=beta, **settings)[0], expert, policies[-1])
        (grad,) = torch.autograd.grad(loss, leaf)
        moved = reward - lr * grad
        moved = moved if bound is None else moved.clamp(0, bound)
        still, reward = (moved - reward).abs().max() < 1e-14 * beta, moved
        policies.append(tilted(ref, reward, beta))
        if still:
            break
    return policies, reward


@pytest.mark.parametrize("beta", [0.7, 2.0])
def test_linear_goes_to_the_expert_and_never_back(m, beta):
    """The likelihood is concave in r/β with curvature at most ½: a step of ½β² is a descent step of KL(E‖π), so it falls every time."""
    policies, _ = alternate(m, E, REF, beta=beta, lr=0.5 * beta**2)
    distances = [closed_form.kl(E.numpy(), policy.numpy()) for policy in policies]
    assert distances[0] > 0.3 and distances[-1] < 1e-12
    assert all(after <= before + 1e-15 for before, after in zip(distances, distances[1:], strict=False))


@pytest.mark.parametrize(("expert", "ref", "x", "numbers"), [
    (f64(0.02, 0.28, 0.7), UNIFORM, 1.5, [0.131346, 0.28, 0.588654]),  # one free, two at a bound
    (f64(0, 0, 1), REF, 1.0, [0.372119, 0.223271, 0.404610]),
    (f64(0, 0, 1), UNIFORM, 1.0, [0.211942, 0.211942, 0.576117]),  # the papers' Table 1
    (E, UNIFORM, 3.0, [0.1, 0.2, 0.7]),  # E/ref spreads by a factor of 7 < e³: the expert
    (E, REF, 1.0, None),
])
def test_a_bound_holds_it_back(m, expert, ref, x, numbers):
    """Rewards within [0, R], R = xβ, by projection: ref·clip(Z·E/ref, 1, e^x)/Z."""
    beta = 0.7
    policies, reward = alternate(m, expert, ref, beta=beta, lr=beta**2, bound=x * beta)
    law = closed_form.demonstration_law(expert.numpy(), ref.numpy(), x)
    assert np.allclose(policies[-1].numpy(), law, atol=1e-9)
    assert 0 <= reward.min() and reward.max() <= x * beta
    if numbers:
        assert policies[-1].tolist() == pytest.approx(numbers, abs=1e-6)


@pytest.mark.parametrize(("beta", "ref", "numbers"), [
    (1.0, REF, [0.265339, 0.290664, 0.443997]), (2.0, UNIFORM, [0.2396, 0.3019, 0.4584]), (0.4, REF, None),
])
def test_bradley_terry_stops_at_the_geometric_mixture(m, beta, ref, numbers):
    """Small steps: E^{1/(1+β)}·ref^{β/(1+β)}, never E: a pair rests where E_a·π_b·σ(−Δ) = E_b·π_a·σ(Δ), so r = log E/π, π ∝ ref·e^{r/β}."""
    policies, _ = alternate(m, E, ref, beta=beta, lr=2 * beta / (1 + beta), loss="bt")
    mixture = closed_form.geometric_mixture(E.numpy(), ref.numpy(), beta)
    assert np.allclose(policies[-1].numpy(), mixture, atol=1e-9) and closed_form.kl(E.numpy(), mixture) > 0.01
    if numbers:
        assert policies[-1].tolist() == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_one_converged_bradley_terry_round(m, beta):
    """Own answers of ref throughout: r = log E/ref + const (the density-ratio lemma), so π ∝ ref·(E/ref)^{1/β}."""
    reward = minimise(lambda r: expected(lambda a, b: m.reward_alignment_loss(r[a], r[b], beta=beta, loss="bt")[0], E, REF), 0 * E)
    gap = reward - (E / REF).log()
    assert float(gap.max() - gap.min()) < 1e-8
    law = REF * (E / REF) ** (1 / beta)
    assert torch.allclose(tilted(REF, reward, beta), law / law.sum(), atol=1e-8)


def ridge_rest(expert, ref, beta, c):
    """r = (E − π)/(2cβ(E + π)) and π = ref·e^{r/β}/Z, by two bisections: r of each action for a given Z (the left side rises in r, the
    right one falls), and Z such that the probabilities sum to 1."""
    def solve(log_z):
        low, high = np.full(len(ref), -1 / (2 * c * beta)), np.full(len(ref), 1 / (2 * c * beta))
        for _ in range(80):
            r = (low + high) / 2
            p = ref * np.exp(r / beta - log_z)
            above = r > (expert - p) / (2 * c * beta * (expert + p))
            low, high = np.where(above, low, r), np.where(above, r, high)
        return r, p

    low, high = -50.0, 50.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if solve(middle)[1].sum() > 1 else (low, middle)
    return solve(low)


@pytest.mark.parametrize(("beta", "c"), [(0.7, 0.2), pytest.param(2.0, 0.02, marks=pytest.mark.slow), (0.7, 5.0)])
def test_ridge_rests_between_ref_and_the_expert(m, beta, c):
    """π held fixed, the expected loss is −(1/β)·Σ(E − π)·r + c·Σ(E + π)·r²: at rest r = (E − π)/(2cβ·(E + π))."""
    policies, reward = alternate(m, E, REF, beta=beta, lr=min(0.5 * beta**2, 0.2 / c), ridge=c)
    r, law = ridge_rest(E.numpy(), REF.numpy(), beta, c)
    assert np.allclose(reward.numpy(), r, atol=1e-9) and np.allclose(policies[-1].numpy(), law, atol=1e-9)
    assert np.allclose(closed_form.ridge_law(E.numpy(), REF.numpy(), beta, c), law, atol=1e-9)
    assert 0.001 < closed_form.kl(E.numpy(), law) < closed_form.kl(E.numpy(), REF.numpy())


# ------------------------------------------------------------------------------------------------------------------ the plan


def plan_of(m, **settings):
    plan, counts = m.plan_turns(m.Config(**settings))
    return "".join("pR"[of_reward] for _, of_reward, _ in plan), [t for t, *_ in plan], [i for *_, i in plan], counts


def test_turns_by_hand(m):
    """10 steps, 2 rounds, share .4: two of five. 7 steps, 3 rounds: 3 + 2 + 2, and .4 of 3 and of 2 is 1. Never fewer than one."""
    kinds, rounds, places, counts = plan_of(m, steps=10, rounds=2, reward_share=0.4)
    assert (kinds, rounds) == ("RRpppRRppp", [0] * 5 + [1] * 5)
    assert places == [0, 1, 0, 1, 2, 2, 3, 3, 4, 5] and counts == {True: 4, False: 6}
    assert plan_of(m, steps=7, rounds=3, reward_share=0.4)[:3] == ("RppRpRp", [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3])
    assert plan_of(m, steps=6, rounds=2, reward_share=1.0)[0] == "RRRRRR"
    assert plan_of(m, steps=8, rounds=2, reward_share=0.01)[0] == "RpppRppp"
    assert plan_of(m, steps=3, rounds=1, reward_share=0.6)[0] == "RRp"


def test_turns_add_up(m):
    """Whatever the division: every round has its turns, rewards first, as many as the share says to within a half; places count up."""
    for steps in (1, 5, 12, 29):
        for rounds in range(1, steps + 1):
            for share in (0.1, 0.4, 0.5, 0.9, 1.0):
                if share < 1 and 2 * rounds > steps:
                    continue  # refused: some round would have no step for the policy
                kinds, numbers, places, counts = plan_of(m, steps=steps, rounds=rounds, reward_share=share)
                assert sorted(set(numbers)) == list(range(rounds)) and numbers == sorted(numbers)
                assert counts == {True: kinds.count("R"), False: kinds.count("p")} and sum(counts.values()) == steps == len(kinds)
                for kind in "Rp":
                    assert [i for i, k in zip(places, kinds, strict=True) if k == kind] == list(range(kinds.count(kind)))
                for t in range(rounds):
                    own = "".join(k for k, number in zip(kinds, numbers, strict=True) if number == t)
                    assert len(own) in (steps // rounds, -(-steps // rounds))
                    n = own.count("R")
                    assert own == "R" * n + "p" * (len(own) - n) and n >= 1 and (n < len(own)) == (share < 1)
                    assert abs(n - share * len(own)) <= 0.5 or n in (1, len(own) - 1)


# ----------------------------------------------------------------------------------------------------------- policy alignment

PROMPTS = [[0], [1], [EOS], [2, 0, 1], [3], [0, 2], [1, 1], [2]]
GROUP = {"ppo": 1, "rebel": 2, "rloo": 4, "grpo": 4}


def pay(answers):
    """A reward of nothing but the completion: its length, and how often it says 0."""
    return torch.tensor([0.3 * len(y) + 0.5 * y.count(0) for y in answers.completions], dtype=torch.float64)


def models():
    return tiny_gpt(seed=0), tiny_reward_model(seed=4), tiny_gpt(seed=1).requires_grad_(False)


def aligned(m, name, micro_batch=0):
    """Weights of policy and critic after one rollout of policy_alignment() followed by plain SGD, its losses, metrics and stats."""
    policy, critic, ref = models()
    cfg = m.Config(policy_step=name, beta=0.3, tau=0.8, max_new=5, group_size=4, micro_batch=micro_batch)
    assert m.completions_per_prompt(cfg) == GROUP[name]
    prompts = PROMPTS[: 8 // GROUP[name]]
    metrics, epochs, update = m.policy_alignment(policy, critic, ref, prompts, pay, cfg, EOS, 7)
    stats, losses = Mean(), []
    for epoch in range(epochs):
        total = 0.0
        for loss, share in update(epoch, stats):
            (loss * share).backward()
            total += loss.item() * share
        losses.append(total)
        descend(policy, critic)
    return weights(policy, critic), losses, {name: float(value) for name, value in metrics.items()}, stats.result()


def descend(*trained):
    with torch.no_grad():
        for model in trained:
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
                    p.grad = None


def weights(*trained):
    return torch.cat([p.detach().flatten() for model in trained for p in model.parameters()])


def directly(name):
    """The same by calling the method's own functions, as its main does."""
    policy, critic, ref = models()
    method = {"ppo": ppo, "rloo": rloo, "grpo": grpo, "rebel": rebel}[name]
    settings = method.Config(beta=0.3, tau=0.8, max_new=5)
    if hasattr(settings, "group_size"):
        settings.group_size = 4
    prompts = PROMPTS[: 8 // GROUP[name]]
    if name == "ppo":
        answers = ppo.rollout_with_values(policy, critic, ref, prompts, settings, EOS, 7)
        token_rewards = ppo.shape_rewards(pay(answers), answers.old_logps, answers.ref_logps, answers.mask, beta=0.3)
        advantages, answers.returns = ppo.gae(token_rewards, answers.values, answers.mask, gamma=1.0, lam=0.95)
        answers.advantages = whiten(advantages, answers.mask)
    else:
        answers = sample.rollout(policy, ref, prompts, settings, n=GROUP[name], eos_id=EOS, seed=7)
        answers.rewards = pay(answers) - 0.3 * (answers.old_logps - answers.ref_logps).sum(1)
        if name != "rebel":
            answers.advantages = (rloo.leave_one_out(answers.rewards, group_size=4) if name == "rloo"
                                  else grpo.group_advantages(pay(answers), group_size=4))
    kl, losses = float((answers.old_logps - answers.ref_logps).sum(1).mean()), []
    for epoch in range(settings.epochs):
        if name == "ppo":
            policy_loss, critic_loss, _ = ppo.step(policy, critic, answers, settings, on_policy=epoch == 0)
            loss = policy_loss + critic_loss
        else:
            loss, _ = method.step(policy, answers, settings, on_policy=epoch == 0)
        loss.backward()
        losses.append(loss.item())
        descend(policy, critic)
    return weights(policy, critic), losses, {"reward": float(pay(answers).mean()), "kl": kl}


def test_align_makes_the_methods_own_updates(m):
    """Every update on one rollout, for each method that it can call: equal losses and equal weights; and something has moved."""
    start = weights(*models()[:2])
    for name in GROUP:
        moved, losses, metrics, _ = aligned(m, name)
        oracle, oracle_losses, oracle_metrics = directly(name)
        assert losses == pytest.approx(oracle_losses, abs=1e-12), name
        assert float((moved - oracle).abs().max()) < 1e-12 and float((moved - start).abs().max()) > 1e-3, name
        assert metrics["reward"] == pytest.approx(oracle_metrics["reward"]) and metrics["kl"] == pytest.approx(oracle_metrics["kl"])


def test_micro_batches_change_nothing_in_align(m):
    """8 = 4 + 4 = 6 + 2: one gradient, the same losses, the same stats."""
    for name in GROUP:
        whole = aligned(m, name)
        for micro_batch in (4, 6):
            cut = aligned(m, name, micro_batch)
            assert float((cut[0] - whole[0]).abs().max()) < 1e-12 and cut[1] == pytest.approx(whole[1], abs=1e-12), name
            for one, other in ((whole[2], cut[2]), (whole[3], cut[3])):
                assert one.keys() == other.keys() and list(one.values()) == pytest.approx(list(other.values()), abs=1e-12), name


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_rebel_keeps_its_pairs_together(m, micro_batch):
    """An odd micro-batch is rounded up to whole pairs, as rebel's own main does."""
    whole, cut = aligned(m, "rebel"), aligned(m, "rebel", micro_batch)
    assert float((cut[0] - whole[0]).abs().max()) < 1e-12 and cut[1] == pytest.approx(whole[1], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize(("plan", "changes"), [
    ("RRppp RRppp", {"policy_step": "rloo"}),
    ("RRp RRp", {"policy_step": "ppo", "bound": 2.0}),
    pytest.param("RRp RRp", {"policy_step": "ppo", "loss": "bt", "bound": 0.0, "ridge": 0.05, "read": "last"}, marks=pytest.mark.slow),
])
def test_main_is_its_account(small, monkeypatch, plan, changes):
    """Two rounds, written out again: the policy in final/, the reward in reward/, every logged loss, reward and learning rate."""
    shared = dict(rounds=2, beta=0.3, tau=0.8, group_size=4, held_out=0.0, schedule="linear", warmup=0.0, micro_batch=3,
                  reward_lr=2e-3)
    length = len(plan) - 1
    module, cfg = small("rft", steps=length, reward_share=plan.count("R") / length, **shared, **changes)
    account = Account("rft", cfg, plan, monkeypatch)
    folder = module.main(cfg)
    account.replay()
    assert account.error(folder) < 1e-10
    account.compare_metrics(folder)


@pytest.mark.parametrize(("bound", "first"), [(0.0, 0.0), (6.0, 3.0), (2.5, 1.25)])
def test_the_first_reward_is_constant_and_the_first_policy_is_ref(small, monkeypatch, bound, first):
    """A head of zeros: every completion scores exactly 0, or R·σ(0) = R/2. The first rollout has no KL, and the policy has not moved until
    the first policy step. After step 1 the reward is no constant any more, and only its head has moved."""
    scores, trunks, step = [], [], rft.step

    def watched(reward_model, demos, samples, cfg):
        with torch.no_grad():
            scores.append(torch.cat([score(reward_model, demos), score(reward_model, samples)]))
        trunks.append(reward_model.tok_embed.weight.detach().clone())
        return step(reward_model, demos, samples, cfg)

    monkeypatch.setattr(rft, "step", watched)
    module, cfg = small("rft", bound=bound, snapshots=True, eval_every=1, rounds=1, reward_share=0.5)
    folder = module.main(cfg)
    assert (scores[0] == first).all() and scores[1].std() > 1e-4
    start = load_pretrained(cfg.policy)
    assert torch.equal(trunks[0], start.tok_embed.weight) and torch.equal(trunks[1], trunks[0]) and not torch.equal(trunks[2], trunks[1])
    kls = [row["kl"] for row in read_rows(folder / "metrics.jsonl") if "kl" in row]
    assert len(kls) == 3 and abs(kls[0]) < 1e-12 < abs(kls[1])
    for number in (1, 2, 3):
        assert torch.equal(load_pretrained(folder / f"snapshots/{number:06d}").head_weight, start.head_weight)
    assert not torch.equal(load_pretrained(folder / "snapshots/000004").head_weight, start.head_weight)


@pytest.mark.parametrize(("read", "bound"), [("sum", 6.0), ("last", 0.0)])
def test_the_reward_folder_is_the_reward(small, monkeypatch, read, bound):
    """What the last policy step was paid by, loaded again, gives the same numbers bit for bit; and so it does under --reward."""
    seen, original = [], rft.score
    monkeypatch.setattr(rft, "score", lambda model, batch: seen.append((model, batch)) or original(model, batch))
    module, cfg = small("rft", read=read, bound=bound)
    folder = module.main(cfg)
    model, batch = seen[-1]
    again = load_pretrained(folder / "reward")
    assert (again.config.reward_read, again.config.reward_bound, again.config.head) == (read, bound, "scalar")
    with torch.no_grad():
        expected_scores = score(model, batch)
        assert torch.equal(score(again, batch), expected_scores) and expected_scores.std() > 0
    tokenizer, whole = load_tokenizer(folder / "reward"), answers_with_eos(batch, load_tokenizer(cfg.policy))
    paid = open_reward([str(folder / "reward")])([tokenizer.decode_prompt(x) for x, _ in whole], [tokenizer.decode(y) for _, y in whole])
    alone = torch.stack([original(model, collate([x], [y], pad_id=tokenizer.pad_id))[0] for x, y in whole]).detach()
    assert torch.allclose(torch.as_tensor(paid), alone, atol=1e-12)


def answers_with_eos(batch, tokenizer):
    """[(prompt, completion)] of a batch, each completion ended by EOS, as the text it decodes to would be."""
    rows = []
    for inputs, targets, mask in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), strict=True):
        completion = [token for token, scored in zip(targets, mask, strict=True) if scored and token != tokenizer.eos_id]
        rows.append((inputs[: mask.index(True) + 1], [*completion, tokenizer.eos_id]))
    return rows


def test_a_run_of_rewards_alone_leaves_the_policy(small):
    """reward_share=1: there is no policy step, and what is exported is ref."""
    module, cfg = small("rft", reward_share=1.0)
    folder = module.main(cfg)
    first, last = (dict(load_pretrained(path).named_parameters()) for path in (cfg.policy, folder / "final"))
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert load_pretrained(folder / "reward").head_weight.abs().max() > 0
    assert all("kl" not in row and "rewards/margins" in row for row in read_rows(folder / "metrics.jsonl"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": "square"}, "--loss square --policy_step rloo: expected linear or bt, and rloo, ppo, grpo or rebel"),
    ({"policy_step": "bon_dpo"}, "--loss linear --policy_step bon_dpo: expected"),
    ({"rounds": 4}, "--rounds 4: 6 steps are too few"),
    ({"group_size": 1}, "--batch_size 8: rloo needs a whole number of groups of at least 2 completions"),
    ({"group_size": 3}, "--batch_size 8: rloo needs a whole number of groups"),
    ({"read": "mean"}, "--read mean: must be sum or last"),
    ({"beta": 0.0}, "--beta 0.0: must be above 0"), ({"bound": -1.0}, "--bound -1.0: must be at least 0"),
    ({"ridge": -1.0}, "--ridge -1.0: must be at least 0"), ({"reward_lr": 0.0}, "--reward_lr 0.0: must be above 0"),
    ({"reward_share": 0.0}, "--reward_share 0.0: must be above 0"), ({"reward_share": 1.5}, "--reward_share 1.5: .* at most 1"),
    ({"max_new": 120}, "set --max_prompt 8"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("rft", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)


@pytest.mark.parametrize("method", ["rft", "irl"])
def test_a_critic_whose_gradient_is_not_finite_is_not_followed(small, monkeypatch, method):
    """A finite loss with a NaN in the critic's gradient alone, in the second policy step: that step is skipped, counted and said, and every
    weight of the checkpoint stays finite. (ppo's own main guards both norms.)"""
    original, calls = ppo.value_loss, []

    def poisoned(values, *args, **kwargs):
        loss, stats = original(values, *args, **kwargs)
        calls.append(1)
        return (loss + 0 * torch.sqrt(0 * values.sum()) if len(calls) == 5 else loss), stats  # four updates on each rollout

    monkeypatch.setattr(ppo, "value_loss", poisoned)
    module, cfg = small(method, policy_step="ppo", steps=5, rounds=1, reward_share=0.4)
    folder = module.main(cfg)
    assert len(calls) > 5
    for file in (folder / "checkpoints").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file.name
    assert read_rows(folder / "metrics.jsonl")[-1]["skipped"] == 1


def test_the_learned_reward_can_be_trained_further_on_pairs(small):
    """reward/ as the start of reward_model: its chosen training answers score 0 on average afterwards, as with any other start."""
    module, cfg = small("rft", bound=0.0)
    start = module.main(cfg) / "reward"
    module, cfg = small("reward_model", policy=str(start), held_out=0.0)
    model, tokenizer = load_pretrained(module.main(cfg) / "final"), load_tokenizer(start)
    rows = encode_pairs(tokenizer, read_preferences(cfg.pairs))
    with torch.no_grad():
        chosen = score(model, pair_batch(rows, range(len(rows)), pad_id=tokenizer.pad_id, max_len=64).chosen)
    assert model.config.reward_read == "sum" and abs(chosen.mean().item()) < 1e-6
