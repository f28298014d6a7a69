"""Iterative IRL. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.batch import collate
from minialign.engine.common import BadInput, Mean, read_rows
from minialign.methods import irl
from minialign.methods.reward_model import bradley_terry_loss
from minialign.methods.rft import reward_alignment_loss
from minialign.rewards import score
from minialign.sample import sample
from minialign.weights import load_pretrained
from tests.alternating import Account
from tests.enumerable import EOS, LANGUAGE, expected, relative, tiny_gpt, tiny_reward_model
from toy import closed_form
from toy.three_actions import minimise


@pytest.fixture
def m():
    return irl


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


E, REF = f64(0.1, 0.2, 0.7), f64(0.5, 0.3, 0.2)


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_values_by_hand(m):
    """r = 1.2, .5, base .3, .4: increases .9, .1, margin .8: log(1 + e^−.8) = .371101; a ridge of .05 adds .05·(.81 + .01) = .041. Base 0
    is Eq. 11 as printed: margin .7: .403186."""
    demo, own, base_demo, base_own = f64(1.2), f64(0.5), f64(0.3), f64(0.4)
    loss, stats = m.irl_loss(demo, own, base_demo, base_own)
    assert loss.item() == pytest.approx(0.371101, abs=1e-6)
    assert stats["rewards/demo"].item() == pytest.approx(1.2) and stats["rewards/sample"].item() == pytest.approx(0.5)
    assert stats["rewards/margins"].item() == pytest.approx(0.8) and stats["rewards/accuracies"].item() == 1
    assert m.irl_loss(demo, own, base_demo, base_own, ridge=0.05)[0].item() == pytest.approx(0.412101, abs=1e-6)
    assert m.irl_loss(demo, own, f64(0), f64(0))[0].item() == pytest.approx(0.403186, abs=1e-6)


def test_where_a_round_begins_the_loss_is_log_2(m):
    """r = base: no increase, so margin 0, half of the accuracy, and no ridge to pay, whatever the rewards are."""
    rewards = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    loss, stats = m.irl_loss(*rewards, *rewards, ridge=0.3)
    assert loss.item() == pytest.approx(math.log(2)) and stats["rewards/accuracies"].item() == 0.5


def test_it_is_bradley_terry_on_the_increase(m):
    """reward_model.py's loss with (r − base) in its place; adding a constant to a reward, or to base, changes nothing."""
    demo, own, base_demo, base_own = torch.randn(4, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    loss = m.irl_loss(demo, own, base_demo, base_own)[0]
    assert torch.allclose(loss, bradley_terry_loss(demo - base_demo, own - base_own)[0], atol=1e-14)
    assert torch.allclose(loss, -torch.nn.functional.logsigmoid(demo - base_demo - own + base_own).mean(), atol=1e-14)
    assert torch.allclose(m.irl_loss(demo + 4, own + 4, base_demo - 7, base_own - 7)[0], loss, atol=1e-12)


def test_gradients_by_hand_and_base_is_a_constant(m):
    """Margin .8: ∓σ(−.8) = ∓.310026, whatever β; the ridge adds 2·.05·.9 = .09 and 2·.05·.1 = .01. No gradient reaches base."""
    rewards = [f64(x).requires_grad_() for x in (1.2, 0.5, 0.3, 0.4)]

    def gradient(**settings):
        return torch.autograd.grad(m.irl_loss(*rewards, **settings)[0], rewards, allow_unused=True)

    assert [g.item() for g in gradient()[:2]] == pytest.approx([-0.310026, 0.310026], abs=1e-6)
    assert [g.item() for g in gradient(ridge=0.05)[:2]] == pytest.approx([-0.220026, 0.320026], abs=1e-6)
    assert gradient(ridge=0.05)[2:] == (None, None)


def test_gradient_by_finite_differences(m):
    demo, own, base_demo, base_own = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    free = [demo.requires_grad_(), own.requires_grad_()]
    assert gradcheck(lambda d, s: m.irl_loss(d, s, base_demo, base_own, ridge=0.2)[0], free)


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 4, ((2,), (3,), (2,), (2,)), ((2,), (2,), (2,), (3,))):
        with pytest.raises(AssertionError):
            m.irl_loss(*map(torch.zeros, shapes))


# ------------------------------------------------------------------------------------------------------------------- the step

ROWS = [[2, EOS], [0, 1, EOS], [3, 3, 1], [EOS]]


def batch_of(picked):
    return collate([[2, 0, 1]] * len(picked), [ROWS[i] for i in picked], pad_id=EOS)


def test_what_each_mode_does_with_base(m):
    """linear: rft's loss, base is not asked. accumulate and literal: Eq. 11 on the increase over base, from each row's numbers added alone
    and unpadded. Under a base that is the same for all (where literal begins) that is Eq. 11 as printed."""
    net, base = tiny_reward_model(seed=1, reward_read="sum"), tiny_reward_model(seed=2, reward_read="sum")
    flat = tiny_reward_model(seed=3, reward_read="sum", reward_bound=6.0)
    torch.nn.init.zeros_(flat.head_weight)
    demos, own = [0, 1, 3], [2, 2, 1]

    def alone(model, picked):
        return torch.stack([model(torch.tensor([[2, 0, 1, *ROWS[i]]]))[0, 3:].sum() for i in picked]).detach()

    r, s, r0, s0 = alone(net, demos), alone(net, own), alone(base, demos), alone(base, own)
    for mode in ("accumulate", "literal"):
        cfg = m.Config(mode=mode, beta=0.3, ridge=0.1)
        loss = m.step(net, base, batch_of(demos), batch_of(own), cfg)[0]
        oracle = torch.log1p((-(r - r0) + (s - s0)).exp()) + 0.1 * ((r - r0) ** 2 + (s - s0) ** 2)
        assert loss.item() == pytest.approx(oracle.mean().item(), abs=1e-12)
        printed = m.step(net, flat, batch_of(demos), batch_of(own), m.Config(mode=mode))[0]
        assert printed.item() == pytest.approx(torch.log1p((s - r).exp()).mean().item(), abs=1e-12)
    losses = [m.step(net, other, batch_of(demos), batch_of(own), m.Config(mode="linear", beta=0.3, ridge=0.1))[0].item()
              for other in (base, flat)]
    linear = (s - r) / 0.3 + 0.1 * (r**2 + s**2)
    assert losses == pytest.approx([linear.mean().item()] * 2, abs=1e-12)


def test_base_stands_still(m):
    """No gradient for base in any mode, although its weights would take one; the reward gets one in all of them."""
    for mode in ("linear", "accumulate", "literal"):
        net, base = tiny_reward_model(seed=1, reward_read="sum"), tiny_reward_model(seed=2, reward_read="sum")
        m.step(net, base, batch_of([0, 1]), batch_of([2, 3]), m.Config(mode=mode))[0].backward()
        assert all(p.grad is None for p in base.parameters()) and net.head_weight.grad.abs().sum() > 0


def rewards_of(net):
    """(N, C): score of every completion of every prompt of the language."""
    completions = [list(y) for y in LANGUAGE.completions]
    return torch.stack([score(net, collate([prompt] * len(completions), completions, pad_id=EOS)) for prompt in LANGUAGE.prompts])


def test_the_expected_gradient_by_enumeration(m):
    """All 85² pairs of the language: Σ E(a)·π(b)·σ(−Δ_ab)·(∇r(b) − ∇r(a)), Δ the difference of increases, in all weights of a GPT. It is 0
    where the increase is log E/π (the lemma): there E(a)·π(b)·σ(−Δ) is symmetric in a and b."""
    net, base = tiny_reward_model(seed=1, reward_read="sum"), tiny_reward_model(seed=2, reward_read="sum")
    own = LANGUAGE.law_of(tiny_gpt(seed=3))[1]
    expert = torch.tensor(closed_form.tilt(own, LANGUAGE.rewards[1], 0.5))
    r, r0 = rewards_of(net)[1], rewards_of(base)[1].detach()
    loss = expected(lambda a, b: m.irl_loss(r[a], r[b], r0[a], r0[b])[0], expert, own)
    increase = (r - r0).detach()
    push = expert[:, None] * own * torch.sigmoid(-(increase[:, None] - increase))  # (C, C) from b to a
    coefficient = push.sum(0) - push.sum(1)  # (C,) of ∇r(y)

    def gradient(scalar):
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, list(net.parameters()), retain_graph=True)])

    assert relative(gradient(loss), gradient((coefficient * r).sum())) < 1e-12
    free = ((expert / own).log() + r0).requires_grad_()
    at_rest = expected(lambda a, b: m.irl_loss(free[a], free[b], r0[a], r0[b])[0], expert, own)
    assert torch.autograd.grad(at_rest, free)[0].abs().max() < 1e-15


# ------------------------------------------------------------------------------------------------- the regimes, exact policies


def tilted(ref, reward, beta):
    return (ref.log() + reward / beta).softmax(0)


def rounds(m, expert, ref, *, beta, n_rounds, mode, anchor="initial"):
    """Every reward the arg min of its round, every policy the exact one: (n_rounds, actions)."""
    reward, policy, policies = torch.zeros_like(ref), ref, []
    for _ in range(n_rounds):
        base = reward if mode == "accumulate" else torch.zeros_like(ref)
        reward = minimise(lambda r, b0=base, q=policy: expected(
            lambda a, b: m.irl_loss(r[a], r[b], b0[a], b0[b])[0], expert, q), base)
        policy = tilted(policy, reward - base, beta) if anchor == "current" else tilted(ref, reward, beta)
        policies.append(policy)
    return torch.stack(policies)


def test_as_printed_it_swings(m):
    """literal, β = 1: the arg min is log E/π, followed from ref: E, ref, E, ref. So KL(E‖π) after round 2 is what it was at the start."""
    policies = rounds(m, E, REF, beta=1.0, n_rounds=4, mode="literal")
    assert torch.allclose(policies, torch.stack([E, REF, E, REF]), atol=1e-9)
    distances = [closed_form.kl(E.numpy(), policy.numpy()) for policy in policies]
    assert distances[1] > 2 * distances[0] and distances[1] == pytest.approx(closed_form.kl(E.numpy(), REF.numpy()))


@pytest.mark.parametrize(("ref", "numbers"), [(REF, None), (f64(1, 1, 1) / 3, [0.2396, 0.3019, 0.4584])])
def test_as_printed_a_strong_pull_settles_short_of_the_expert(m, ref, numbers):
    """literal, β = 2: the distance to E^{1/3}·ref^{2/3} halves every round. Each round is on its law, ref·(E/π)^{1/β}."""
    policies = rounds(m, E, ref, beta=2.0, n_rounds=13, mode="literal").numpy()
    law = closed_form.rounds_law(E.numpy(), ref.numpy(), 2.0, 13, ref_update=False)
    mixture = closed_form.geometric_mixture(E.numpy(), ref.numpy(), 2.0)
    assert np.allclose(policies, law, atol=1e-8) and np.allclose(policies[-1], mixture, atol=1e-3)
    assert closed_form.kl(E.numpy(), policies[-1]) > 0.05
    if numbers:
        assert policies[-1].tolist() == pytest.approx(numbers, abs=2e-4)


@pytest.mark.parametrize("beta", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("mode", "anchor"), [("accumulate", "initial"), ("literal", "current"), ("accumulate", "current")])
def test_remembered_or_anchored_to_the_present_it_arrives(m, mode, anchor, beta):
    """π ∝ π_k·(E/π_k)^{1/β}: log π/E shrinks by 1 − 1/β a round; at once for β = 1. Both at once are the same law: the increase is paid."""
    policies = rounds(m, E, REF, beta=beta, n_rounds=10, mode=mode, anchor=anchor).numpy()
    assert np.allclose(policies, closed_form.rounds_law(E.numpy(), REF.numpy(), beta, 10, ref_update=True), atol=1e-8)
    assert np.allclose(policies[-1], E.numpy(), atol=1e-3) and (beta != 1 or np.allclose(policies[0], E.numpy(), atol=1e-9))


def test_a_weak_pull_throws_it_out(m):
    """β = .4 < ½: even accumulated, each round overshoots by 1.5 times what was missing."""
    policies = rounds(m, E, REF, beta=0.4, n_rounds=3, mode="accumulate").numpy()
    assert np.allclose(policies, closed_form.rounds_law(E.numpy(), REF.numpy(), 0.4, 3, ref_update=True), atol=1e-7)
    missing = [np.ptp(np.log(policy / E.numpy())) for policy in (REF.numpy(), *policies)]
    assert [after / before for before, after in zip(missing, missing[1:], strict=False)] == pytest.approx([1.5] * 3, abs=1e-6)


def test_linear_arrives_too():
    """The likelihood's own gradient, the reward going on from round to round, six steps to each policy: E to 1e-3."""
    beta, reward, policy = 0.7, torch.zeros_like(REF), REF
    for _ in range(60):
        for _ in range(6):
            leaf = reward.clone().requires_grad_()
            loss = expected(lambda a, b, r=leaf: reward_alignment_loss(r[a], r[b], beta=beta)[0], E, policy)
            reward = reward - 0.1 * beta**2 * torch.autograd.grad(loss, leaf)[0]
        policy = tilted(REF, reward, beta)
    assert torch.allclose(policy, E, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_gpt_as_reward_swings_as_well(m, seed):
    """Not exact: a GPT that adds a number for every token, fitted in every round by 150 steps of Adam on batches of 256, the policy its
    exact tilt, β = 1. As printed KL(E‖π) after round 2 is more than twice that after round 1; accumulated it is not."""
    ref = LANGUAGE.law_of(tiny_gpt(seed=10 + seed))
    expert = torch.stack([torch.tensor(closed_form.tilt(p, r, 0.5)) for p, r in zip(ref, LANGUAGE.rewards, strict=True)])
    generator, swing = torch.Generator().manual_seed(seed), {}

    def draw(laws):
        return [torch.multinomial(law, 128, replacement=True, generator=generator) for law in laws]

    for mode in ("literal", "accumulate"):
        net = tiny_reward_model(seed=seed, reward_read="sum")
        torch.nn.init.zeros_(net.head_weight)
        start, base, policy, distances = {k: v.clone() for k, v in net.state_dict().items()}, torch.zeros_like(ref), ref, []
        for _ in range(2):
            if mode == "literal":
                net.load_state_dict(start)
            else:
                base = rewards_of(net).detach()
            optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
            for _ in range(150):
                r, demo, own = rewards_of(net), draw(expert), draw(policy)
                picked = [torch.cat([values[n][rows[n]] for n in range(len(ref))])
                          for values, rows in ((r, demo), (r, own), (base, demo), (base, own))]
                optimizer.zero_grad()
                m.irl_loss(*picked)[0].backward()
                optimizer.step()
            policy = (ref.log() + rewards_of(net).detach()).softmax(-1)
            distances.append(float((expert * (expert / policy).log()).sum(1).mean()))
        swing[mode] = distances
    assert swing["literal"][1] > 2 * swing["literal"][0], swing
    assert swing["accumulate"][1] < 1.2 * swing["accumulate"][0], swing


# ------------------------------------------------------------------------------------------------- policy step by selection

PROMPTS = [[0], [2, 0, 1], [EOS]]
WORDS = SimpleNamespace(eos_id=EOS, pad_id=EOS)


def selected(m, rewards, **settings):
    """What select() trains on under hand-made rewards (3·4,): the total loss and gradient, the metrics, the twelve completions."""
    policy, anchor = tiny_gpt(seed=0), tiny_gpt(seed=1).requires_grad_(False)
    cfg = m.Config(**{**dict(n=4, beta=0.3, tau=0.8, max_new=4), **settings})
    metrics, epochs, update = m.select_best(policy, anchor, PROMPTS, lambda answers: rewards, cfg, WORDS, 5)
    assert epochs == 1
    stats, total = Mean(), 0.0
    for loss, share in update(0, stats):
        (loss * share).backward()
        total += loss.item() * share
    answers = sample(policy, PROMPTS, max_new=cfg.max_new, tau=cfg.tau, n=cfg.n, eos_id=EOS, seed=5)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return total, gradient, metrics, answers.completions, stats.result()


@torch.no_grad()
def sums(model, picked, completions):
    """log π of the picked completions, each alone: three floats."""
    rows = [(PROMPTS[i], completions[4 * i + place]) for i, place in enumerate(picked)]
    logits = [model(torch.tensor([x + y]))[0, len(x) - 1 : -1].log_softmax(-1) for x, y in rows]
    return [sum(float(table[t, token]) for t, token in enumerate(y)) for table, (_, y) in zip(logits, rows, strict=True)]


BY_HAND = f64(0.1, 0.9, 0.9, -1, 3, 2, 1, 0, 5, 5, 5, 5)  # best: 1 (the first of two), 0, 0; worst: 3, 3, 0 (all alike)


def test_select_imitates_the_best_or_prefers_it_to_the_worst(m):
    """The rows are found again by their log-probs: −mean log π(best), or log(1 + e^{−β(Δ best − Δ worst)}); the prompt whose four pay alike
    gives log 2. At temperature 1, whatever tau the answers were drawn at."""
    policy, anchor = tiny_gpt(seed=0), tiny_gpt(seed=1)
    loss, _, metrics, completions, _ = selected(m, BY_HAND, policy_step="bon_sft")
    best, worst = (sums(policy, places, completions) for places in ([1, 0, 0], [3, 3, 0]))
    assert loss == pytest.approx(-sum(best) / 3, abs=1e-12)
    assert metrics["reward/best"].item() == pytest.approx((0.9 + 3 + 5) / 3) and metrics["reward"].item() == pytest.approx(BY_HAND.mean())
    assert metrics["frac_reward_zero_std"].item() == pytest.approx(1 / 3)
    loss, _, _, again, stats = selected(m, BY_HAND, policy_step="bon_dpo")
    assert again == completions
    ref_best, ref_worst = (sums(anchor, places, completions) for places in ([1, 0, 0], [3, 3, 0]))
    margins = [0.3 * ((b - rb) - (w - rw)) for b, w, rb, rw in zip(best, worst, ref_best, ref_worst, strict=True)]
    assert loss == pytest.approx(sum(math.log1p(math.exp(-z)) for z in margins) / 3, abs=1e-12)
    assert margins[2] == 0 and stats["implicit/margins"] == pytest.approx(sum(margins) / 3, abs=1e-12)


def test_equal_rewards_give_dpo_no_gradient(m):
    """All alike: best and worst are one completion, the loss is log 2 and its gradient exactly 0. With one pair that differs it is not."""
    loss, gradient, *_ = selected(m, torch.full((12,), 0.7).double(), policy_step="bon_dpo")
    assert loss == pytest.approx(math.log(2), abs=1e-14) and gradient.abs().max() == 0
    assert selected(m, BY_HAND, policy_step="bon_dpo")[1].abs().max() > 1e-3


def test_micro_batches_change_nothing_in_select(m):
    for policy_step in ("bon_sft", "bon_dpo"):
        whole, cut = (selected(m, BY_HAND, policy_step=policy_step, micro_batch=size) for size in (0, 2))
        assert cut[0] == pytest.approx(whole[0], abs=1e-12) and relative(cut[1], whole[1]) < 1e-12
        both = [stats for *_, stats in (whole, cut)]
        for stats in both:
            stats.pop("implicit/accuracies", None)  # of two equal answers rounding decides which one is better
        assert both[1] == pytest.approx(both[0], abs=1e-12) and len(both[0]) >= 1


# ---------------------------------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize(("plan", "changes"), [
    ("RRpp RRpp", {"mode": "accumulate", "anchor": "current", "policy_step": "bon_dpo", "n": 4, "ridge": 0.02}),
    ("RRp RRp RRp", {"mode": "literal", "anchor": "initial", "policy_step": "rloo"}),
    *[pytest.param("RRp RRp", changes, marks=pytest.mark.slow) for changes in [
        {"mode": "accumulate", "anchor": "initial", "policy_step": "bon_sft", "n": 4, "bound": 0.0},
        {"mode": "linear", "anchor": "current", "policy_step": "ppo", "bound": 0.0, "ridge": 0.02, "read": "last"},
    ]],
])
def test_main_is_its_account(small, monkeypatch, plan, changes):
    """The run written out again: what a round begins with, what is paid, whom the policy is pulled to. Policy, reward, logged numbers."""
    kinds = plan.replace(" ", "")
    settings = dict(rounds=plan.count(" ") + 1, beta=0.3, tau=0.8, group_size=4, held_out=0.0, schedule="linear", warmup=0.0, micro_batch=3,
                  reward_lr=2e-3)
    module, cfg = small("irl", steps=len(kinds), reward_share=kinds.count("R") / len(kinds), **settings, **changes)
    account = Account("irl", cfg, plan, monkeypatch)
    folder = module.main(cfg)
    account.replay()
    assert account.error(folder) < 1e-10
    account.compare_metrics(folder)


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("mode", "anchor"), [
    ("linear", "initial"), ("accumulate", "current"), ("literal", "initial"),
    *[pytest.param(*other, marks=pytest.mark.slow) for other in [("linear", "current"), ("accumulate", "initial"), ("literal", "current")]],
])
def test_what_a_round_begins_with(small, monkeypatch, mode, anchor):
    """Nine steps, RRp three times: reward and base as each reward step finds them, anchor and pay of each policy step."""
    seen, paid, step, aligned = [], [], irl.step, irl.policy_alignment

    def watched_step(reward_model, base, *args):
        seen.append((weights_of(reward_model), weights_of(base)))
        return step(reward_model, base, *args)

    def watched_align(policy, value_model, ref, prompts_ids, reward_of, *args):
        def reward_and_note(answers):
            paid.append((weights_of(ref), weights_of(policy), reward_of(answers)))
            return paid[-1][2]

        return aligned(policy, value_model, ref, prompts_ids, reward_and_note, *args)

    monkeypatch.setattr(irl, "step", watched_step)
    monkeypatch.setattr(irl, "policy_alignment", watched_align)
    module, cfg = small("irl", mode=mode, anchor=anchor, steps=9, rounds=3, reward_share=0.6, bound=6.0)
    folder = module.main(cfg)
    assert len(seen) == 6 and len(paid) == 3
    start = seen[0][0]
    assert torch.equal(seen[0][1], start)  # base is r_0
    for k in (2, 4):  # a round begins
        (reward, base), (_, base_before) = seen[k], seen[k - 1]
        if mode == "literal":
            assert torch.equal(reward, start) and torch.equal(base, start) and torch.equal(base_before, start)
        else:
            assert torch.equal(base, reward) and not torch.equal(reward, start) and not torch.equal(base, base_before)
        assert torch.equal(seen[k + 1][1], base)  # base stands still within the round
    anchors, policies = [ref for ref, *_ in paid], [policy for _, policy, _ in paid]
    first = weights_of(load_pretrained(cfg.policy))
    assert torch.equal(policies[0], first) and not torch.equal(policies[1], first)
    for t in range(3):
        assert torch.equal(anchors[t], policies[t] if anchor == "current" else first)  # one policy step a round: it has not moved yet
        assert paid[t][2].abs().max() < 1 if anchor == "current" else paid[t][2].min() > 2  # an increase, or a reward that began at 3
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["round"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    kls = [row["kl"] for row in rows if "kl" in row]
    assert abs(kls[0]) < 1e-12 and all(abs(kl) < 1e-12 if anchor == "current" else abs(kl) > 1e-9 for kl in kls[1:])
    log_2 = [row["loss"] for row in rows if "rewards/margins" in row][::2]  # the first loss of each round
    assert mode == "linear" or log_2 == pytest.approx([math.log(2)] * 3, abs=1e-12)


def test_snapshots_show_the_reward_of_every_evaluation(small):
    """literal, one reward step a round: each snapshot of the reward is one step of AdamW from the same start, so all heads have one size;
    accumulated, they grow. reward/ is the last of them."""
    sizes = {}
    for mode in ("literal", "accumulate"):
        module, cfg = small("irl", mode=mode, anchor="initial", steps=6, rounds=3, snapshots=True, eval_every=2, schedule="constant")
        folder = module.main(cfg)
        shots = [load_pretrained(folder / f"reward_snapshots/{step:06d}") for step in (2, 4, 6)]
        sizes[mode] = [shot.head_weight.abs().max().item() for shot in shots]
        assert torch.equal(weights_of(shots[-1]), weights_of(load_pretrained(folder / "reward")))
        assert (folder / "snapshots/000006").is_dir() and shots[0].config.reward_read == "sum" and shots[0].config.reward_bound == 6.0
    assert sizes["literal"] == pytest.approx([3e-3] * 3, abs=1e-6)  # AdamW's first step has the size of the learning rate
    assert sizes["accumulate"][0] == pytest.approx(3e-3, abs=1e-6) and sizes["accumulate"][2] > 1.3 * sizes["accumulate"][0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"mode": "warm"}, "--mode warm --anchor current: expected linear, accumulate or literal, and initial or current"),
    ({"anchor": "ref"}, "--mode accumulate --anchor ref: expected linear"),
    ({"policy_step": "dpo"}, "--policy_step dpo: must be ppo, rloo, grpo, rebel, bon_sft or bon_dpo"),
    ({"rounds": 4}, "--rounds 4: 6 steps are too few"),
    ({"policy_step": "bon_dpo", "n": 3}, "--batch_size 8: bon_dpo needs a whole number of groups of at least 2 completions"),
    ({"policy_step": "bon_sft", "n": 1}, "--batch_size 8: bon_sft needs a whole number of groups of at least 2 completions"),
    ({"group_size": 1}, "--batch_size 8: rloo needs a whole number of groups of at least 2 completions"),
    ({"policy_step": "rebel", "batch_size": 7, "group_size": 1}, "--batch_size 7: rebel needs a whole number of groups"),
    ({"read": "mean"}, "--read mean: must be sum or last"),
    ({"beta": -0.1}, "--beta -0.1: must be above 0"), ({"bound": -1.0}, "--bound -1.0: must be at least 0"),
    ({"n": 0}, "--n 0: must be at least 1"), ({"reward_share": 0.0}, "--reward_share 0.0: must be above 0"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("irl", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
