"""SimPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.engine.common import BadInput
from minialign.methods import simpo
from minialign.methods.dpo import dpo_loss
from tests.enumerable import EOS, tiny_gpt
from tests.preferring import (
    CHOSEN,
    LENGTHS,
    REJECTED,
    bradley_terry,
    check_main,
    f64,
    gradient,
    mean_log_prob,
    pairs_of,
    population,
    random_pairs,
    setting,
)
from toy.three_actions import minimise


@pytest.fixture
def m():
    return simpo


def one(m, chosen, rejected, **settings):
    loss, stats = m.simpo_loss(f64(chosen), f64(rejected), **settings)
    return loss.item(), {name: value.item() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_worked_numbers(m):
    """Averages −1.5/2 = −.75 and −3/3 = −1, scale 2, γ = 1 (γ/scale = .5): z = 2·.25 − 1 = −.5: log(1 + e^.5) = .974077. Without γ:
    log(1 + e^−.5) = .474077. With sums in the place of averages it would be log(1 + e^{1 − 3}) = .126928. Nothing moves at z = 0: log 2."""
    loss, stats = one(m, -0.75, -1.0, scale=2.0, target_margin=1.0)
    assert loss == pytest.approx(0.974077, abs=1e-6)
    assert stats["rewards/chosen"] == -1.5 and stats["rewards/rejected"] == -2 and stats["rewards/margins"] == 0.5
    assert stats["rewards/accuracies"] == 1 and stats["logps/chosen"] == -0.75 and stats["logps/rejected"] == -1  # γ is no part of these
    assert one(m, -0.75, -1.0, scale=2.0, target_margin=0.0)[0] == pytest.approx(0.474077, abs=1e-6)
    assert one(m, -1.5, -3.0, scale=2.0, target_margin=1.0)[0] == pytest.approx(0.126928, abs=1e-6)
    loss, stats = one(m, -1.0, -1.0, scale=2.0, target_margin=0.0)
    assert loss == pytest.approx(math.log(2), abs=1e-12) and stats["rewards/accuracies"] == 0.5
    assert one(m, -1.0, -1.25, scale=2.0, target_margin=0.5)[0] == pytest.approx(math.log(2), abs=1e-12)  # a margin of exactly γ


def test_slopes_by_hand(m):
    """−scale·σ(−z), z = −.5: −2·σ(.5) = −2·.622459 = −1.244919 in the chosen one's average, + that in the rejected one's."""
    tensors = [f64(x).requires_grad_() for x in (-0.75, -1.0)]
    loss = m.simpo_loss(*tensors, scale=2.0, target_margin=1.0)[0]
    assert np.ravel(gradient(loss, tensors)) == pytest.approx([-1.244919, 1.244919], abs=1e-6)


def test_gradient_by_finite_differences(m):
    tensors = [row.requires_grad_() for row in random_pairs(0, 3, sides=2)]
    assert gradcheck(lambda *x: m.simpo_loss(*x, scale=0.7, target_margin=0.4)[0], tensors)


def test_against_numpy_torch_and_dpo(m):
    """−log σ(scale·(a − b) − γ); at γ = 0 it is dpo.py's loss where ref finds all answers alike."""
    chosen, rejected = tensors = random_pairs(sides=2)
    for gamma in (0.0, 0.8):
        z = 0.3 * (chosen - rejected) - gamma
        loss = m.simpo_loss(*tensors, scale=0.3, target_margin=gamma)[0]
        assert torch.allclose(loss, -torch.nn.functional.logsigmoid(z).mean(), atol=1e-13)
        assert loss.item() == pytest.approx(np.log1p(np.exp(-z.numpy())).mean(), abs=1e-12)
    zeros = torch.zeros_like(chosen)
    same = dpo_loss(chosen, rejected, zeros, zeros, beta=0.3)[0]
    assert torch.allclose(m.simpo_loss(*tensors, scale=0.3, target_margin=0.0)[0], same, atol=1e-14)


def test_what_counts_and_what_does_not(m):
    """A constant on both averages changes nothing; scale and averages go together, and γ stays. The paper's other form has the ratio
    γ/scale inside: log(1 + e^{−scale·(a − b − γ/scale)}). A larger γ is a larger loss."""
    chosen, rejected = random_pairs(2, sides=2)
    loss = m.simpo_loss(chosen, rejected, scale=0.3, target_margin=0.8)[0]
    assert torch.allclose(m.simpo_loss(chosen + 9, rejected + 9, scale=0.3, target_margin=0.8)[0], loss, atol=1e-12)
    assert torch.allclose(m.simpo_loss(3 * chosen, 3 * rejected, scale=0.1, target_margin=0.8)[0], loss, atol=1e-12)
    assert torch.allclose(m.simpo_loss(chosen - 0.8 / 0.3, rejected, scale=0.3, target_margin=0.0)[0], loss, atol=1e-12)
    assert m.simpo_loss(chosen, rejected, scale=0.3, target_margin=1.2)[0] > loss + 1e-2
    assert abs(m.simpo_loss(chosen + 1, rejected, scale=0.3, target_margin=0.8)[0] - loss) > 1e-2


def test_swapping_the_answers(m):
    """softplus(γ − d) − softplus(γ + d) is −d only at γ = 0: d = .5, scale 2 of −.75 and −1."""
    there, back = (one(m, *pair, scale=2.0, target_margin=0.0)[0] for pair in ((-0.75, -1.0), (-1.0, -0.75)))
    assert there - back == pytest.approx(-0.5, abs=1e-12)
    there, back = (one(m, *pair, scale=2.0, target_margin=1.0)[0] for pair in ((-0.75, -1.0), (-1.0, -0.75)))
    assert there - back == pytest.approx(math.log(1 + math.exp(0.5)) - math.log(1 + math.exp(1.5)), abs=1e-12)


def test_huge_margins_stay_finite(m):
    """float32, ±10⁴ nats a token at scale 10: 2·10⁵ or 0, slope −10 or 0."""
    for sign, value, slope in ((1, 0.0, 0.0), (-1, 2e5, -10.0)):
        tensors = [torch.tensor([x], requires_grad=True) for x in (sign * 1e4, -sign * 1e4)]
        loss = m.simpo_loss(*tensors, scale=10.0, target_margin=1.0)[0]
        assert loss.item() == pytest.approx(value, rel=1e-4)
        assert gradient(loss, tensors) == [[slope], [-slope]]


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 2, ((2,), (3,))):
        with pytest.raises(AssertionError):
            m.simpo_loss(*map(torch.zeros, shapes), scale=1, target_margin=0)


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_averages_the_completions_tokens(m):
    """Pairs of unequal length: the loss from each completion's own average; whatever the padding; ref is not asked."""
    policy, cfg = tiny_gpt(seed=0), m.Config(scale=1.7, target_margin=0.6)
    z = torch.stack([1.7 * (mean_log_prob(policy, w) - mean_log_prob(policy, l)) - 0.6 for w, l in zip(CHOSEN, REJECTED, strict=True)])
    for pad_id in (EOS, 0, 3):
        loss, stats = m.step(policy, None, pairs_of(CHOSEN, REJECTED, pad_id), cfg)
        assert loss.item() == pytest.approx(torch.log1p((-z).exp()).mean().item(), abs=1e-12)
        assert stats["logps/chosen"].item() == pytest.approx(sum(mean_log_prob(policy, w).item() for w in CHOSEN) / 3, abs=1e-12)
    loss.backward()
    assert policy.head_weight.grad.abs().sum() > 0


def test_an_answer_twice_as_long_at_the_same_average_is_no_worse(m):
    """The reward is −1 for two tokens of −1 nat and for six: only DPO's sum minds the length."""
    assert one(m, -2 / 2, -6 / 6, scale=2.0, target_margin=0.0)[0] == pytest.approx(math.log(2))
    policy = tiny_gpt(seed=0)
    pairs = pairs_of([[2, 2, 2]], [[2]])
    expected = mean_log_prob(policy, [2, 2, 2]) - mean_log_prob(policy, [2])
    margin = m.step(policy, None, pairs, m.Config(scale=1.0))[1]["rewards/margins"]
    assert margin.item() == pytest.approx(expected.item(), abs=1e-12)


# -------------------------------------------------------------------------------------------------------------------- the law


def length_law(reward, scale):
    """π ∝ e^{|y|(r − c)/scale}: the c that makes it sum to 1, by bisection; the sum falls in c."""
    reward, lengths, low, high = reward.numpy(), LENGTHS.numpy(), -100.0, 100.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.exp(lengths * (reward - c) / scale).sum() > 1 else (low, c)
    return np.exp(lengths * (reward - c) / scale)


def loss_over(m, wins, mu, scale, target_margin=0.0):
    def loss(z):
        means = z.log_softmax(0) / LENGTHS
        return population(lambda w, l: m.simpo_loss(means[w], means[l], scale=scale, target_margin=target_margin)[0], wins, mu)

    return loss


def test_preferences_from_a_reward_lead_to_the_law_of_lengths(m):
    """Five answers of 1, 2, 2, 3 and 5 tokens, Bradley-Terry on r, γ = 0: π ∝ e^{|y|(r − c)/scale}, wherever it began and whatever law the
    pairs are drawn from. A longer answer of the same reward has another probability; no ref is in it."""
    for seed, scale in ((0, 2.0), (1, 0.7)):
        reward, start, mu = setting(seed)
        law = length_law(reward, scale)
        assert law.sum() == pytest.approx(1, abs=1e-12)
        for begin in (torch.zeros(5, dtype=torch.float64), start.log()):
            learned = minimise(loss_over(m, bradley_terry(reward), mu, scale), begin).softmax(0).numpy()
            assert np.allclose(learned, law, atol=1e-8)
        assert np.abs(law - (reward / scale).softmax(0).numpy()).max() > 0.05


def test_a_target_margin_moves_the_law(m):
    """γ > 0 has no closed form; at its minimum each answer's flow is g_y = κ·π_y, g_y = Σ w·(−p·σ(γ − d) + (1 − p)·σ(γ + d))·scale/|y|,
    with d the margin and one κ for all, in numpy. It is not the law of γ = 0."""
    reward, start, mu = setting(0)
    wins, scale, gamma = bradley_terry(reward), 2.0, 1.5
    law = minimise(loss_over(m, wins, mu, scale, gamma), start.log()).softmax(0).numpy()
    means = np.log(law) / LENGTHS.numpy()
    d, p, w = scale * (means[:, None] - means), wins.numpy(), 2 * np.outer(mu, mu)
    w = w * (1 - np.eye(5))  # a pair of equals has the flow 0: what it gives the one it takes from the other, which is the same

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    flow = (w * (-p * sigmoid(gamma - d) + (1 - p) * sigmoid(gamma + d))).sum(1) * scale / LENGTHS.numpy()
    assert np.abs(flow - flow.sum() * law).max() < 1e-9
    assert np.abs(law - length_law(reward, scale)).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------- main


def test_main_is_its_account(small):
    check_main(small, "simpo", lambda w, l, *_: (1 + (0.6 - 1.7 * (w.mean() - l.mean())).exp()).log(), scale=1.7, target_margin=0.6)


@pytest.mark.parametrize(("changes", "message"), [
    ({"scale": 0.0}, "--scale 0.0: must be above 0"), ({"scale": math.inf}, "--scale inf: must be a finite number"),
    ({"target_margin": math.nan}, "--target_margin nan: must be a finite number"), ({"pairs": "absent.jsonl"}, "absent.jsonl: cannot be"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("simpo", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
