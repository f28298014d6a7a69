"""ORPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import decimal
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.engine.common import BadInput
from minialign.methods import orpo
from tests.enumerable import EOS, tiny_gpt
from tests.preferring import (
    CHOSEN,
    LENGTHS,
    REJECTED,
    any_preferences,
    bradley_terry,
    check_main,
    f64,
    gradient,
    mean_log_prob,
    pairs_of,
    population,
    setting,
    winners,
)
from toy.closed_form import normalise
from toy.three_actions import minimise


@pytest.fixture
def m():
    return orpo


def one(m, chosen, rejected, weight):
    loss, stats = m.orpo_loss(f64(chosen), f64(rejected), weight=weight)
    return loss.item(), {name: value.item() for name, value in stats.items()}


def random_averages(seed=0, rows=20):
    """(2, B) averages below 0, from −.01 to −12."""
    return -torch.logspace(-2, 1.08, 2 * rows, dtype=torch.float64)[
        torch.randperm(2 * rows, generator=torch.Generator().manual_seed(seed))].view(2, rows)


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_worked_numbers(m):
    """Averages −.75 and −1: log odds −.75 − log(1 − e^−.75) = −.75 + .639353 = −.110647 and −1 + .458675 = −.541325, of which the ratio is
    .430678; log(1 + e^−.430678) = .500816; −log π̄ = .75: .75 + .1·.500816 = .800082. Of the sums, −1.5 and −3, it would be 1.701413."""
    loss, stats = one(m, -0.75, -1.0, weight=0.1)
    assert loss == pytest.approx(0.800082, abs=1e-6)
    assert stats["rewards/chosen"] == pytest.approx(-0.110647, abs=1e-6)
    assert stats["rewards/rejected"] == pytest.approx(-0.541325, abs=1e-6)
    assert stats["rewards/margins"] == pytest.approx(0.430678, abs=1e-6) and stats["rewards/accuracies"] == 1
    assert stats["logps/chosen"] == -0.75 and stats["logps/rejected"] == -1
    assert one(m, -1.5, -3.0, weight=0.1)[1]["rewards/margins"] == pytest.approx(1.701413, abs=1e-6)
    assert one(m, -0.75, -1.0, weight=0.0)[0] == 0.75
    loss, stats = one(m, -2.0, -2.0, weight=0.25)
    assert loss == pytest.approx(2 + 0.25 * math.log(2), abs=1e-12) and stats["rewards/accuracies"] == 0.5


def test_slopes_by_hand(m):
    """d log odds/da = 1/(1 − e^a): 1/.527633 = 1.895255 at −.75 and 1/.632121 = 1.581977 at −1. σ(−.430678) = .393964. λ = .1: in the
    chosen one's average −1 − .1·.393964·1.895255 = −1.074666, in the rejected one's +.1·.393964·1.581977 = .062324."""
    tensors = [f64(x).requires_grad_() for x in (-0.75, -1.0)]
    assert np.ravel(gradient(m.orpo_loss(*tensors, weight=0.1)[0], tensors)) == pytest.approx([-1.074666, 0.062324], abs=1e-6)
    assert np.ravel(gradient(m.log_odds(tensors[0]).sum(), tensors[:1])) == pytest.approx([1.895255], abs=1e-6)


def test_gradient_by_finite_differences(m):
    """Averages from −.05 to −6."""
    tensors = [f64(-0.3, -0.69, -0.7, -2.0).requires_grad_(), f64(-1.0, -0.71, -0.05, -6.0).requires_grad_()]
    assert gradcheck(lambda *x: m.orpo_loss(*x, weight=0.7)[0], tensors)


def test_against_numpy_and_probabilities(m):
    """−a_w + λ·log(1 + odds_l/odds_w), odds = P/(1 − P), P = e^a: as the paper writes it, with probabilities."""
    chosen, rejected = tensors = random_averages()
    P, Q = np.exp(chosen.numpy()), np.exp(rejected.numpy())
    for weight in (0.1, 2.0):
        loss = m.orpo_loss(*tensors, weight=weight)[0].item()
        assert loss == pytest.approx((-np.log(P) + weight * np.log(1 + Q / (1 - Q) / (P / (1 - P)))).mean(), rel=1e-12)
    odds = torch.logit(chosen.exp())
    assert torch.allclose(m.log_odds(chosen), odds, rtol=1e-12)


def exact(a):
    """(log odds, its slope) of P = e^a with 60 digits."""
    with decimal.localcontext(prec=60):
        a = decimal.Decimal(a)
        rest = 1 - a.exp()
        return float(a - rest.ln()), float(1 / rest)


def test_the_odds_are_exact_at_both_ends(m):
    """From a = −10⁻⁷, where 1 − e^a has lost all digits but one in float32, to −800, where e^a is 0: values and slopes to rounding."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for a in (-1.01e-7, -1e-6, -1e-4, -1e-2, -0.5, -0.6929, -0.693, -math.log(2), -0.6932, -0.7, -1.0, -3.0, -20.0, -100.0, -800.0):
            x = torch.tensor([a], dtype=dtype, requires_grad=True)
            odds = m.log_odds(x)
            value, slope = exact(x.item())
            assert odds.item() == pytest.approx(value, rel=tolerance, abs=tolerance) and odds.dtype == dtype
            assert gradient(odds.sum(), [x])[0][0] == pytest.approx(slope, rel=tolerance)


def test_certain_and_impossible_answers_stay_finite(m):
    """Averages of 0 (P = 1, where the odds are infinite: they are taken at −10⁻⁷, log odds 16.118), just above 0 by rounding, and −800, in
    every combination: finite values and slopes, and the likelihood's slope of −1 is whole."""
    for dtype in (torch.float32, torch.float64):
        for chosen in (0.0, 1e-9, -1e-30, -1e-7, -1e-3, -800.0, -1e4):
            for rejected in (0.0, 1e-9, -1e-30, -1e-7, -1e-3, -800.0, -1e4):
                tensors = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
                loss, stats = m.orpo_loss(*tensors, weight=0.1)
                slopes = np.ravel(gradient(loss, tensors))
                assert loss.isfinite() and np.isfinite(slopes).all() and all(value.isfinite() for value in stats.values())
                assert slopes[0] <= -1 + 1e-6 and slopes[1] >= 0
        assert m.log_odds(torch.zeros(1, dtype=dtype)).item() == pytest.approx(16.118096, abs=1e-2 if dtype == torch.float32 else 1e-5)
    assert one(m, -800.0, -1e-3, 0.1)[0] == pytest.approx(800 + 0.1 * (800 - 1e-3 - math.log(-math.expm1(-1e-3))), rel=1e-12)


def test_what_counts_and_what_does_not(m):
    """No constant may be added: odds are no differences of log-probs. Likelier answers are further apart in odds than in log-probs. The
    term of the odds is a share of the loss that λ alone scales."""
    chosen, rejected = random_averages(1)
    loss = m.orpo_loss(chosen, rejected, weight=0.4)[0]
    assert abs(m.orpo_loss(chosen - 1, rejected - 1, weight=0.4)[0] - loss - 1) > 1e-3
    assert (m.log_odds(f64(-0.1)) - m.log_odds(f64(-0.2))).item() > 0.1 + 1e-3
    plain = -chosen.mean()
    assert torch.allclose(m.orpo_loss(chosen, rejected, weight=0.8)[0] - plain, 2 * (loss - plain), rtol=1e-12)
    there, back = (one(m, *pair, weight=1.0)[0] for pair in ((-0.75, -1.0), (-1.0, -0.75)))
    assert there - back == pytest.approx(-0.25 - 0.430678, abs=1e-6)  # softplus(−z) − softplus(z) = −z


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 2, ((2,), (3,))):
        with pytest.raises(AssertionError):
            m.orpo_loss(*map(torch.zeros, shapes), weight=1)


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_averages_the_completions_tokens(m):
    """Pairs of unequal length: the loss from each completion's own average; whatever the padding; ref is not asked. The prompt is not
    scored: of a completion that is one token, the average is that token's log-prob."""
    policy, cfg = tiny_gpt(seed=0), m.Config(weight=0.6)
    losses = []
    for w, l in zip(CHOSEN, REJECTED, strict=True):
        P, Q = mean_log_prob(policy, w).exp(), mean_log_prob(policy, l).exp()
        losses.append(-P.log() + 0.6 * (1 + Q / (1 - Q) / (P / (1 - P))).log())
    for pad_id in (EOS, 0, 3):
        loss, stats = m.step(policy, None, pairs_of(CHOSEN, REJECTED, pad_id), cfg)
        assert loss.item() == pytest.approx(sum(losses).item() / 3, abs=1e-12)
        assert stats["logps/rejected"].item() == pytest.approx(sum(mean_log_prob(policy, l).item() for l in REJECTED) / 3, abs=1e-12)
    loss.backward()
    assert policy.head_weight.grad.abs().sum() > 0
    alone = m.step(policy, None, pairs_of([[2]], [[2]]), cfg)[1]
    assert alone["logps/chosen"].item() == pytest.approx(mean_log_prob(policy, [2]).item(), abs=1e-12)


# -------------------------------------------------------------------------------------------------------------------- the law


def learned(m, wins, mu, weight):
    """The minimum over all logits, for answers of 1, 2, 2, 3 and 5 tokens."""
    def loss(z):
        means = z.log_softmax(0) / LENGTHS
        return population(lambda w, l: m.orpo_loss(means[w], means[l], weight=weight)[0], wins, mu)

    return minimise(loss, torch.zeros(5, dtype=torch.float64)).softmax(0).numpy()


def test_without_its_odds_it_is_sft_on_winners_counted_by_length(m):
    """λ = 0: the minimum of −Σ W(y)·log π(y)/|y| is π ∝ W/|y|: W the law of the winner of a pair, for a reward's preferences and any."""
    for seed in (0, 1):
        reward, _, mu = setting(seed)
        for wins in (bradley_terry(reward), any_preferences(seed)):
            W, L = winners(wins, mu)
            assert W.sum() == pytest.approx(1) and L.sum() == pytest.approx(1)
            law = normalise(W / LENGTHS.numpy())
            assert np.allclose(learned(m, wins, mu, 0.0), law, atol=1e-8)
            assert np.abs(law - W).max() > 0.02  # the lengths are in it


def test_with_its_odds_every_flow_is_balanced(m):
    """λ > 0 has no closed form; at the minimum each answer's flow is g_y = κ·π_y with one κ: g_y = −W(y)/|y| + λ·Σ w·(−p·σ(−z) + (1 − p)·
    σ(z))/((1 − P_y)·|y|), P = π^{1/|y|}, z the difference of log odds, in numpy. The larger λ, the further from λ = 0."""
    reward, _, mu = setting(0)
    wins, away = bradley_terry(reward), []
    for weight in (0.1, 1.0):
        law = learned(m, wins, mu, weight)
        P, lengths, p = law ** (1 / LENGTHS.numpy()), LENGTHS.numpy(), wins.numpy()
        odds = np.log(P / (1 - P))
        z = odds[:, None] - odds
        pressure = 2 * np.outer(mu, mu) * (1 - np.eye(5)) * (-p / (1 + np.exp(z)) + (1 - p) / (1 + np.exp(-z)))
        flow = -winners(wins, mu)[0] / lengths + weight * pressure.sum(1) / (1 - P) / lengths
        assert np.abs(flow - flow.sum() * law).max() < 1e-9
        away.append(np.abs(law - normalise(winners(wins, mu)[0] / lengths)).max())
    assert away[1] > 2 * away[0] > 1e-3


# ---------------------------------------------------------------------------------------------------------------------- main


def test_main_is_its_account(small):
    def loss(w, l, *_):
        P, Q = w.mean().exp(), l.mean().exp()
        return -P.log() + 0.6 * (1 + Q / (1 - Q) / (P / (1 - P))).log()

    check_main(small, "orpo", loss, weight=0.6)


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight": -0.1}, "--weight -0.1: must be at least 0"), ({"weight": math.inf}, "--weight inf: must be a finite number"),
    ({"pairs": "absent.jsonl"}, "absent.jsonl: cannot be read"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("orpo", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
