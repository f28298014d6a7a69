"""IPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.engine.common import BadInput
from minialign.methods import ipo
from tests.enumerable import EOS, tiny_gpt
from tests.preferring import (
    CHOSEN,
    REJECTED,
    any_preferences,
    bradley_terry,
    check_main,
    f64,
    gradient,
    log_prob,
    pairs_of,
    population,
    random_pairs,
    setting,
    winners,
)
from toy import closed_form
from toy.three_actions import minimise


@pytest.fixture
def m():
    return ipo


def one(m, chosen, rejected, ref_chosen, ref_rejected, beta):
    loss, stats = m.ipo_loss(*(f64(x) for x in (chosen, rejected, ref_chosen, ref_rejected)), beta=beta)
    return loss.item(), {name: value.item() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_worked_numbers(m):
    """log π = −1.5 and −3, log ref = −2 and −2.5: Δ = 1, β = .1: (1 − 5)² = 16. Averages over 2 and 3 tokens, another method:
    −.75 + 1 − (−1 + .8333) = .416667, (.416667 − 5)² = 21.006944. Nothing is left at Δ = 1/(2β) = 5."""
    loss, stats = one(m, -1.5, -3.0, -2.0, -2.5, 0.1)
    assert loss == pytest.approx(16, abs=1e-12)
    assert stats["rewards/chosen"] == pytest.approx(0.05) and stats["rewards/rejected"] == pytest.approx(-0.05)
    assert stats["rewards/margins"] == pytest.approx(0.1) and stats["rewards/accuracies"] == 1
    assert stats["logps/chosen"] == -1.5 and stats["logps/rejected"] == -3
    assert one(m, -1.5 / 2, -3 / 3, -2 / 2, -2.5 / 3, 0.1)[0] == pytest.approx(21.006944, abs=1e-6)
    assert one(m, 2.5, -3.0, -2.0, -2.5, 0.1)[0] == pytest.approx(0, abs=1e-24)
    for beta in (0.1, 0.5, 3.0):  # where the policy is ref: 1/(4β²), and every pair is a tie
        loss, stats = one(m, -1.5, -3.0, -1.5, -3.0, beta)
        assert loss == pytest.approx(1 / (4 * beta**2), rel=1e-12) and stats["rewards/accuracies"] == 0.5


def test_slopes_by_hand(m):
    """2·(Δ − 1/(2β)): at Δ = .25, β = .5: 2·(.25 − 1) = −1.5 in log π of the chosen one, + that in the rejected one's, the other signs in
    ref's. Past the target, Δ = 3, β = .5: 2·(3 − 1) = +4, which pulls the pair back."""
    for start, slope in (((-1.0, -2.0, -1.1, -1.85), -1.5), ((-1.0, -4.0, -1.1, -1.1), 4.0)):
        tensors = [f64(x).requires_grad_() for x in start]
        assert np.allclose(np.ravel(gradient(m.ipo_loss(*tensors, beta=0.5)[0], tensors)), [slope, -slope, -slope, slope], atol=1e-12)


def test_gradient_by_finite_differences(m):
    tensors = [row.requires_grad_() for row in random_pairs(0, 3)]
    assert gradcheck(lambda *x: m.ipo_loss(*x, beta=0.7)[0], tensors)


def test_against_numpy_and_the_papers_own_form(m):
    """(Δ − 1/(2β))², in numpy; and Eq. 17's h, a logarithm of a ratio of probabilities."""
    tensors = random_pairs()
    chosen, rejected, ref_chosen, ref_rejected = tensors.numpy()
    for beta in (0.1, 0.3, 4.0):
        loss = m.ipo_loss(*tensors, beta=beta)[0].item()
        assert loss == pytest.approx(np.mean((chosen - ref_chosen - rejected + ref_rejected - 0.5 / beta) ** 2), rel=1e-12)
        h = np.log(np.exp(chosen) * np.exp(ref_rejected) / (np.exp(rejected) * np.exp(ref_chosen)))
        assert loss == pytest.approx(np.mean((h - 0.5 / beta) ** 2), rel=1e-10)


def test_swapping_the_answers(m):
    """(Δ − t)² − (Δ + t)² = −4·Δ·t = −2Δ/β: with Δ = 1, β = .1: 16 − 36 = −20."""
    there, back = one(m, -1.5, -3.0, -2.0, -2.5, 0.1)[0], one(m, -3.0, -1.5, -2.5, -2.0, 0.1)[0]
    assert there - back == pytest.approx(-20, abs=1e-10)


def test_only_the_difference_of_log_ratios_counts(m):
    """A constant on both answers of the policy, on both of ref, or on policy and ref of one answer. Not so β: unlike DPO's loss, log-probs
    three times as large under a third of the β are nine times the loss, not the same one."""
    chosen, rejected, ref_chosen, ref_rejected = random_pairs(2)
    loss = m.ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)[0]
    for a, b, c, d in ((9, 9, 0, 0), (0, 0, 9, 9), (9, 0, 9, 0), (0, 9, 0, 9)):
        assert torch.allclose(m.ipo_loss(chosen + a, rejected + b, ref_chosen + c, ref_rejected + d, beta=0.3)[0], loss, rtol=1e-12)
    assert torch.allclose(m.ipo_loss(3 * chosen, 3 * rejected, 3 * ref_chosen, 3 * ref_rejected, beta=0.1)[0], 9 * loss, rtol=1e-12)
    assert abs(m.ipo_loss(chosen, rejected, ref_chosen + 1, ref_rejected, beta=0.3)[0] - loss) > 1e-2


def test_huge_margins_stay_finite(m):
    """A pair 2·10⁴ nats off: 4·10⁸ in float32, slope ±4·10⁴."""
    for sign in (1, -1):
        tensors = [torch.tensor([x], requires_grad=True) for x in (sign * 1e4, -sign * 1e4, 0.0, 0.0)]
        loss = m.ipo_loss(*tensors, beta=0.5)[0]
        assert loss.item() == pytest.approx((sign * 2e4 - 1) ** 2, rel=1e-6)
        assert gradient(loss, tensors)[0][0] == pytest.approx(2 * (sign * 2e4 - 1), rel=1e-6)


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 4, ((2,), (3,), (2,), (2,)), ((2,), (2,), (2,), (3,))):
        with pytest.raises(AssertionError):
            m.ipo_loss(*map(torch.zeros, shapes), beta=1)


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_sums_the_completions_tokens(m):
    """Two GPTs, pairs of unequal length: the loss from each completion's own log-probs; whatever the padding; no gradient for ref."""
    policy, ref = tiny_gpt(seed=0), tiny_gpt(seed=1)
    cfg = m.Config(beta=0.3)
    delta = torch.stack([(log_prob(policy, w) - log_prob(ref, w)) - (log_prob(policy, l) - log_prob(ref, l))
                         for w, l in zip(CHOSEN, REJECTED, strict=True)]).detach()
    for pad_id in (EOS, 0, 3):
        loss, stats = m.step(policy, ref, pairs_of(CHOSEN, REJECTED, pad_id), cfg)
        assert loss.item() == pytest.approx(((delta - 1 / 0.6) ** 2).mean().item(), abs=1e-12)
        assert stats["rewards/margins"].item() == pytest.approx(0.3 * delta.mean().item(), abs=1e-12)
    loss.backward()
    assert all(p.grad is None for p in ref.parameters()) and policy.head_weight.grad.abs().sum() > 0
    assert m.step(policy, policy, pairs_of(CHOSEN, REJECTED), cfg)[0].item() == pytest.approx(1 / 0.36, abs=1e-12)


# -------------------------------------------------------------------------------------------------------------------- the law


def learned(m, wins, mu, ref, beta):
    """The minimum over all logits of the expected loss, found from logits of 0: five probabilities."""
    def loss(z):
        logps, ref_logps = z.log_softmax(0), ref.log()
        return population(lambda w, l: m.ipo_loss(logps[w], logps[l], ref_logps[w], ref_logps[l], beta=beta)[0], wins, mu)

    return minimise(loss, torch.zeros(5, dtype=torch.float64)).softmax(0).numpy()


def test_the_law_is_a_tilt_by_the_chance_to_win(m):
    """ref·e^{g/β}, g(y) = E_{y' ~ μ} p(y ≻ y'): for preferences from a reward, for cycles, and where everybody agrees."""
    for seed in (0, 1):
        reward, ref, mu = setting(seed)
        for wins in (bradley_terry(reward), any_preferences(seed), (reward[:, None] > reward).double() + 0.5 * torch.eye(5).double()):
            for beta in (0.2, 1.0):
                law = closed_form.tilt(ref.numpy(), (wins @ mu).numpy(), beta)
                assert np.allclose(learned(m, wins, mu, ref, beta), law, atol=1e-8)
        assert np.abs(law - closed_form.tilt(ref.numpy(), (wins @ ref).numpy(), beta)).max() > 1e-3  # it depends on μ


def test_the_target_is_half_of_one_over_beta(m):
    """Two answers, the first preferred with p: Δ rests at (2p − 1)/(2β), half of it one way and half the other: at p = .8, β = .5: .6."""
    wins = f64([0.5, 0.8], [0.2, 0.5])
    policy, ref = learned_of_two(m, wins), f64(0.3, 0.7)
    assert np.log(policy / ref.numpy()) @ [1, -1] == pytest.approx(0.6, abs=1e-9)
    policy = learned_of_two(m, f64([0.5, 1.0], [0.0, 0.5]))  # DPO's Δ has no end here
    assert np.log(policy / ref.numpy()) @ [1, -1] == pytest.approx(1.0, abs=1e-9)


def learned_of_two(m, wins):
    """The same for two answers of ref .3 and .7, the pair always the one with the other."""
    def loss(z):
        logps, ref_logps = z.log_softmax(0), f64(0.3, 0.7).log()
        there, back = (m.ipo_loss(logps[[a]], logps[[b]], ref_logps[[a]], ref_logps[[b]], beta=0.5)[0] for a, b in ((0, 1), (1, 0)))
        return wins[0, 1] * there + wins[1, 0] * back

    return minimise(loss, f64(0, 0)).softmax(0).numpy()


def test_online_the_law_is_its_own_opponent(m):
    """Pairs drawn from the policy itself: π = ref·e^{g/β} with g = E_{y' ~ π} p(y ≻ y'), found by iterating. There the expected gradient,
    of pairs as data, is 0; it is not at ref·e^{g/β} with ref's opponents."""
    reward, ref, _ = setting(3)
    wins, beta = bradley_terry(2 * reward), 0.4
    law = ref
    for _ in range(500):
        law = 0.5 * law + 0.5 * torch.tensor(closed_form.tilt(ref.numpy(), (wins @ law).numpy(), beta))
    assert np.allclose(law, closed_form.tilt(ref.numpy(), (wins @ law).numpy(), beta), atol=1e-14)

    def slope(policy):
        z = policy.log().requires_grad_()
        logps, ref_logps = z.log_softmax(0), ref.log()
        loss = population(lambda w, l: m.ipo_loss(logps[w], logps[l], ref_logps[w], ref_logps[l], beta=beta)[0], wins, policy)
        return torch.autograd.grad(loss, z)[0].abs().max()

    assert slope(law) < 1e-12 < 1e-3 < slope(torch.tensor(closed_form.tilt(ref.numpy(), (wins @ ref).numpy(), beta)))
    assert np.abs(winners(wins, law)[0] - winners(wins, ref)[0]).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------- main


def test_main_is_its_account(small):
    check_main(small, "ipo", lambda w, l, ref_w, ref_l: (w.sum() - ref_w.sum() - l.sum() + ref_l.sum() - 1 / (2 * 0.3)) ** 2, beta=0.3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"beta": 0.0}, "--beta 0.0: must be above 0"), ({"beta": -0.1}, "--beta -0.1: must be above 0"),
    ({"pairs": "absent.jsonl"}, "absent.jsonl: cannot be read"), ({"tau": 0.0, "online": True}, "--tau 0.0: must be above 0"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("ipo", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
