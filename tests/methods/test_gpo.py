"""GPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.__main__ import main as front_door
from minialign.engine.common import BadInput
from minialign.methods import gpo
from minialign.methods.dpo import dpo_loss
from minialign.methods.ipo import ipo_loss
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
)
from toy import closed_form
from toy.three_actions import minimise

PLAIN = {  # f and f', each as a formula of numbers
    "logistic": (lambda x: math.log(1 + math.exp(-x)), lambda x: -1 / (1 + math.exp(x))),
    "hinge": (lambda x: max(0.0, 1 - x), lambda x: -float(x < 1)),
    "squared": (lambda x: (x - 1) ** 2, lambda x: 2 * (x - 1)),
    "exponential": (lambda x: math.exp(-x), lambda x: -math.exp(-x)),
    "truncated_quadratic": (lambda x: max(0.0, 1 - x) ** 2, lambda x: -2 * max(0.0, 1 - x)),
    "savage": (lambda x: (1 + math.exp(x)) ** -2, lambda x: -2 * math.exp(x) * (1 + math.exp(x)) ** -3),
}


@pytest.fixture
def m():
    return gpo


def of_margin(m, f, x, beta=1.0):
    """The loss of one pair with β·Δ = x, all of it in log π of the chosen answer."""
    return m.gpo_loss(f64(x / beta), f64(0), f64(0), f64(0), beta=beta, f=f)[0].item()


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_the_table_of_functions(m):
    """f(−1), f(0), f(.5), f(2). logistic: log(1 + e) = 1.313262; savage: (1 + e^−1)^−2 = (1/1.367879)² = .534447."""
    table = {
        "logistic": (1.313262, 0.693147, 0.474077, 0.126928), "hinge": (2, 1, 0.5, 0), "squared": (4, 1, 0.25, 1),
        "exponential": (2.718282, 1, 0.606531, 0.135335), "truncated_quadratic": (4, 1, 0.25, 0),
        "savage": (0.534447, 0.25, 0.142537, 0.014209),
    }
    assert table.keys() == m.FUNCTIONS.keys() == PLAIN.keys()
    for f, values in table.items():
        for beta in (0.1, 1.0, 3.0):
            assert [of_margin(m, f, x, beta) for x in (-1, 0, 0.5, 2)] == pytest.approx(values, abs=1e-6)


def test_worked_numbers(m):
    """log π = −1.5 and −3, log ref = −2 and −2.5: Δ = 1, β = .1: x = .1. hinge: .9; squared: .81; exponential: e^−.1 = .904837;
    truncated: .81; savage: σ(−.1)² = .475021² = .225645; logistic: .644397."""
    values = {"hinge": 0.9, "squared": 0.81, "exponential": 0.904837, "truncated_quadratic": 0.81, "savage": 0.225645, "logistic": 0.644397}
    for f, value in values.items():
        loss, stats = m.gpo_loss(f64(-1.5), f64(-3.0), f64(-2.0), f64(-2.5), beta=0.1, f=f)
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert stats["rewards/chosen"] == pytest.approx(0.05) and stats["rewards/rejected"] == pytest.approx(-0.05)
        assert stats["rewards/margins"] == pytest.approx(0.1) and stats["rewards/accuracies"] == 1
        assert stats["logps/chosen"] == -1.5 and stats["logps/rejected"] == -3
        assert m.gpo_loss(f64(-1.5), f64(-3.0), f64(-1.5), f64(-3.0), beta=0.7, f=f)[1]["rewards/accuracies"] == 0.5


def test_slopes_by_hand(m):
    """β·f'(x) in log π of the chosen answer and in ref's of the rejected one, −β·f'(x) in the others: x = .5, β = .2: hinge −.2, squared
    .2·(−1) = −.2, truncated −.2, exponential −.2·.606531, savage −.4·e^.5·(1 + e^.5)^−3, logistic −.2·.377541. Past 1 the hinge and the
    truncated quadratic are flat, the square pulls back: x = 2: +.4."""
    for x, slopes in ((0.5, (-0.075508, -0.2, -0.2, -0.121306, -0.2, -0.035489)), (2.0, (-0.023841, 0.0, 0.4, -0.027067, 0.0, -0.005006))):
        for f, slope in zip(PLAIN, slopes, strict=True):
            tensors = [f64(value).requires_grad_() for value in (-1.0 + x / 0.2, -2.0, -1.1, -2.1)]
            loss = m.gpo_loss(*tensors, beta=0.2, f=f)[0]
            assert np.ravel(gradient(loss, tensors)) == pytest.approx([slope, -slope, -slope, slope], abs=1e-6)
            assert slope == pytest.approx(0.2 * PLAIN[f][1](x), abs=1e-6)


def test_gradient_by_finite_differences(m):
    tensors = [row.requires_grad_() for row in random_pairs(0, 3)]
    for f in PLAIN:
        assert gradcheck(lambda *x, f=f: m.gpo_loss(*x, beta=0.1, f=f)[0], tensors)


def test_against_plain_numbers_and_its_siblings(m):
    """f(β·Δ), one pair at a time; logistic is dpo.py's loss, squared is β² times ipo.py's at half the β."""
    tensors = random_pairs()
    x = 0.2 * ((tensors[0] - tensors[2]) - (tensors[1] - tensors[3]))
    for f, (value, _) in PLAIN.items():
        assert m.gpo_loss(*tensors, beta=0.2, f=f)[0].item() == pytest.approx(np.mean([value(v) for v in x.tolist()]), rel=1e-11)
    assert torch.allclose(m.gpo_loss(*tensors, beta=0.2)[0], dpo_loss(*tensors, beta=0.2)[0], rtol=1e-13)
    assert torch.allclose(m.gpo_loss(*tensors, beta=0.2, f="squared")[0], 0.04 * ipo_loss(*tensors, beta=0.1)[0], rtol=1e-12)


def test_regularisation_is_the_table(m):
    """f(0), f'(0), f''(0) as the docstring's table has them, and |f''(0)/f'(0)| as its last column."""
    table = {"logistic": (math.log(2), -0.5, 0.25, 0.5), "hinge": (1, -1, 0, 0), "squared": (1, -2, 2, 1), "exponential": (1, -1, 1, 1),
             "truncated_quadratic": (1, -2, 2, 1), "savage": (0.25, -0.25, 0.125, 0.5)}
    for f, (value, slope, curvature, strength) in table.items():
        found = m.regularisation(f)
        assert found == pytest.approx((value, slope, curvature), abs=1e-12) and all(isinstance(number, float) for number in found)
        assert abs(found[2] / found[1]) == pytest.approx(strength, abs=1e-12)
        step = 1e-4  # f''(0) from f itself
        bent = (of_margin(m, f, step) - 2 * of_margin(m, f, 0) + of_margin(m, f, -step)) / step**2
        assert bent == pytest.approx(curvature, abs=1e-3)


def test_the_docstring_prints_that_table(m):
    """Each line of it, signs, fractions and all, against regularisation()."""
    numbers = {"½": 0.5, "¼": 0.25, "⅛": 0.125, "−½": -0.5, "−¼": -0.25}
    for f in PLAIN:
        words = next(line for line in m.__doc__.splitlines() if line.strip().startswith(f + " ")).split("  ")
        row = [numbers.get(word) or float(word.replace("−", "-")) for word in [w.strip() for w in words if w.strip()][2:6]]
        value, slope, curvature = m.regularisation(f)
        assert row == pytest.approx([value, slope, curvature, abs(curvature / slope)], abs=1e-3)


def test_savage_alone_is_not_convex(m):
    """f'' changes sign at −log 2: savage bends down left of it and up right of it. All others never bend down."""
    def bend(f, x, step=1e-3):
        return (of_margin(m, f, x + step) - 2 * of_margin(m, f, x) + of_margin(m, f, x - step)) / step**2

    assert bend("savage", -math.log(2) - 0.05) < -1e-3 and bend("savage", -math.log(2) + 0.05) > 1e-3
    assert abs(bend("savage", -math.log(2))) < 1e-4
    for f in PLAIN.keys() - {"savage"}:
        assert min(bend(f, x) for x in np.linspace(-3, 3, 25)) > -1e-6


def test_only_the_difference_of_log_ratios_counts(m):
    """A constant on both answers of the policy, on both of ref, or on policy and ref of one answer; β on both sides or neither."""
    chosen, rejected, ref_chosen, ref_rejected = random_pairs(2)
    for f in PLAIN:
        loss = m.gpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, f=f)[0]
        for a, b, c, d in ((9, 9, 0, 0), (0, 0, 9, 9), (9, 0, 9, 0), (0, 9, 0, 9)):
            moved = m.gpo_loss(chosen + a, rejected + b, ref_chosen + c, ref_rejected + d, beta=0.3, f=f)[0]
            assert torch.allclose(moved, loss, rtol=1e-11)
        scaled = m.gpo_loss(3 * chosen, 3 * rejected, 3 * ref_chosen, 3 * ref_rejected, beta=0.1, f=f)[0]
        assert torch.allclose(scaled, loss, rtol=1e-11)
        assert abs(m.gpo_loss(chosen, rejected, ref_chosen + 1, ref_rejected, beta=0.3, f=f)[0] - loss) > 1e-3


def test_huge_margins(m):
    """float32, x = ±10⁴: finite values and slopes; the exponential alone overflows, past x = −88.7, and is whole at −88."""
    for f, (at_minus, at_plus) in {"logistic": (1e4, 0), "hinge": (10001, 0), "squared": (10001**2, 9999**2), "savage": (1, 0),
                                   "truncated_quadratic": (10001**2, 0)}.items():
        for x, value in ((-1e4, at_minus), (1e4, at_plus)):
            tensors = [torch.tensor([v], requires_grad=True) for v in (x / 2, -x / 2, 0.0, 0.0)]
            loss = m.gpo_loss(*tensors, beta=1.0, f=f)[0]
            assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-12)
            assert np.isfinite(np.ravel(gradient(loss, tensors))).all()
    zero = torch.zeros(1)
    for x, finite in ((-88.0, True), (-90.0, False), (1e4, True)):
        assert bool(m.gpo_loss(torch.tensor([x]), zero, zero, zero, beta=1.0, f="exponential")[0].isfinite()) is finite


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 4, ((2,), (3,), (2,), (2,)), ((2,), (2,), (2,), (3,))):
        with pytest.raises(AssertionError):
            m.gpo_loss(*map(torch.zeros, shapes), beta=1)


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_sums_the_completions_tokens(m):
    """Two GPTs, pairs of unequal length: the loss from each completion's own log-probs; whatever the padding; no gradient for ref."""
    policy, ref = tiny_gpt(seed=0), tiny_gpt(seed=1)
    x = [0.3 * ((log_prob(policy, w) - log_prob(ref, w)) - (log_prob(policy, l) - log_prob(ref, l))).item()
         for w, l in zip(CHOSEN, REJECTED, strict=True)]
    for f, (value, _) in PLAIN.items():
        cfg = m.Config(beta=0.3, f=f)
        for pad_id in (EOS, 0, 3):
            loss, stats = m.step(policy, ref, pairs_of(CHOSEN, REJECTED, pad_id), cfg)
            assert loss.item() == pytest.approx(sum(map(value, x)) / 3, abs=1e-12)
            assert stats["rewards/margins"].item() == pytest.approx(sum(x) / 3, abs=1e-12)
        loss.backward()
        assert m.step(policy, policy, pairs_of(CHOSEN, REJECTED), cfg)[0].item() == pytest.approx(value(0.0), abs=1e-13)
    assert all(p.grad is None for p in ref.parameters()) and policy.head_weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------------- the laws


def loss_over(m, f, wins, mu, ref, beta, other=None):
    """The expected loss of five logits."""
    def loss(z):
        logps, ref_logps = z.log_softmax(0), ref.log()
        return population(
            lambda w, l: m.gpo_loss(logps[w], logps[l], ref_logps[w], ref_logps[l], beta=beta, f=f)[0], wins, mu, other)

    return loss


def learned(m, f, wins, mu, ref, beta, other=None):
    """The minimum over all logits, found from ref: five probabilities."""
    return minimise(loss_over(m, f, wins, mu, ref, beta, other), ref.log()).softmax(0).numpy()


def test_preferences_from_a_reward_lead_to_the_laws(m):
    """Bradley-Terry labels on r. logistic, savage: ref·e^{r/β}, whatever two laws the pairs are drawn from; exponential: ref·e^{r/2β},
    likewise; squared: ref·e^{2g/β}, g(y) = E_{y' ~ μ} σ(r − r'), which takes both from one μ."""
    for seed, beta in ((0, 0.7), (1, 2.0)):
        reward, ref, mu = setting(seed)
        wins, other = bradley_terry(reward), setting(seed + 5)[2]
        for f, law in (("logistic", reward / beta), ("savage", reward / beta), ("exponential", reward / (2 * beta))):
            law = closed_form.tilt(ref.numpy(), law.numpy(), 1.0)
            assert np.allclose(learned(m, f, wins, mu, ref, beta, other), law, atol=1e-7), f
            assert np.abs(law - ref.numpy()).max() > 0.02
        law = closed_form.tilt(ref.numpy(), 2 * (wins @ mu).numpy(), beta)
        assert np.allclose(learned(m, "squared", wins, mu, ref, beta), law, atol=1e-8)


def test_preferences_of_no_reward_lead_the_square_to_its_law_too(m):
    _, ref, mu = setting(2)
    wins = any_preferences(4)
    assert np.allclose(learned(m, "squared", wins, mu, ref, 0.9), closed_form.tilt(ref.numpy(), 2 * (wins @ mu).numpy(), 0.9), atol=1e-8)


def test_savages_law_is_a_minimum_though_it_is_not_convex(m):
    """The slope at ref·e^{r/β} is 0, and the loss is larger wherever one goes from there."""
    reward, ref, mu = setting(0)
    loss = loss_over(m, "savage", bradley_terry(3 * reward), mu, ref, 0.7)
    z = (ref.log() + 3 * reward / 0.7).requires_grad_()
    assert torch.autograd.grad(loss(z), z)[0].abs().max() < 1e-15
    for direction in torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        assert all(loss(z + size * direction) > loss(z) for size in (0.1, 1.0, 10.0))


def test_truncated_quadratic_rests_where_its_flow_does(m):
    """No closed form, but every answer's flow is 0: Σ_b μ_a μ_b·[p(a ≻ b)·f'(x_ab) − p(b ≻ a)·f'(−x_ab)] = 0, x_ab = β(u_a − u_b), in
    numpy with f'(x) = −2·max(0, 1 − x). Some pairs are past 1, so the law is not the square's."""
    reward, ref, mu = setting(0)
    wins, beta = bradley_terry(3 * reward), 0.7
    law = learned(m, "truncated_quadratic", wins, mu, ref, beta)
    u = np.log(law / ref.numpy())
    x, p, weight = beta * (u[:, None] - u), wins.numpy(), np.outer(mu, mu)
    flow = (weight * (p * -2 * np.maximum(0, 1 - x) + p.T * 2 * np.maximum(0, 1 + x))).sum(1)
    assert np.abs(flow).max() < 1e-9 and x.max() > 1.05
    assert np.abs(law - closed_form.tilt(ref.numpy(), 2 * (wins @ mu).numpy(), beta)).max() > 1e-3


def test_the_hinge_asks_only_who_wins_more_often(m):
    """Two answers, the first preferred with p: p·max(0, 1 − x) + (1 − p)·max(0, 1 + x) has its minimum at x = 1 whatever p > ½, so
    Δ = 1/β, and at −1 where p < ½; at p = ½ all of [−1, 1] is as good."""
    xs = np.linspace(-3, 3, 241)
    for p, best in ((0.55, 1.0), (0.95, 1.0), (0.4, -1.0)):
        losses = [p * of_margin(m, "hinge", x, 0.3) + (1 - p) * of_margin(m, "hinge", -x, 0.3) for x in xs]
        assert xs[np.argmin(losses)] == pytest.approx(best)
    assert of_margin(m, "hinge", 0.7) + of_margin(m, "hinge", -0.7) == pytest.approx(2, abs=1e-12)


def test_the_hinge_rests_on_a_corner(m):
    """Three answers: of all corners (two pairs at x = ±1, where the loss bends) the best is a minimum: by numpy's subgradient the loss
    rises in every direction v, E[w·p·(−v_ab where x < 1, max(0, −v_ab) where x = 1)] > 0; so it does as computed, a small step on."""
    wins, mu, ref, beta = bradley_terry(f64(0.0, 0.8, 2.0)), f64(0.5, 0.2, 0.3), f64(0.2, 0.5, 0.3), 0.6
    loss = loss_over(m, "hinge", wins, mu, ref, beta)
    signs = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)] + [(1, 2), (2, 1), (-1, -2), (-2, -1), (-1, 1), (1, -1)]
    corners = [f64(0, a, b) / beta for a, b in signs]  # u = log π/ref up to a constant; x_ab = β(u_a − u_b)
    best = min(corners, key=lambda u: float(loss(ref.log() + u)))
    x = (beta * (best[:, None] - best)).numpy()
    for v in np.random.default_rng(0).normal(size=(200, 3)):
        v_ab = beta * (v[:, None] - v)
        slope = np.where(x < 1 - 1e-9, -v_ab, np.where(x < 1 + 1e-9, np.maximum(0, -v_ab), 0))
        slope = 2 * (np.outer(mu, mu) * wins.numpy() * slope).sum()
        step = float(loss(ref.log() + best + 1e-4 * torch.tensor(v)) - loss(ref.log() + best)) / 1e-4
        assert slope == pytest.approx(step, abs=1e-6) and slope > 0
    assert best[2] > best[0]  # the one that wins more often has risen


def test_small_rewards_are_tilted_by_the_strength_in_the_table(m):
    """r of 1/500: log π/ref is r/(2β·|f''(0)/f'(0)|) for all but the hinge, which has no such number."""
    reward, ref, mu = setting(1)
    reward, beta = reward / 500, 0.8
    for f in PLAIN.keys() - {"hinge"}:
        _, slope, curvature = m.regularisation(f)
        tilt = np.log(learned(m, f, bradley_terry(reward), mu, ref, beta) / ref.numpy())
        tilt, law = tilt - tilt.mean(), (reward - reward.mean()).numpy() / (2 * beta * abs(curvature / slope))
        assert np.abs(tilt - law).max() < 1e-3 * np.abs(law).max(), f


# ---------------------------------------------------------------------------------------------------------------------- main


@pytest.mark.parametrize("f", ["savage", "squared"])
def test_main_is_its_account(small, f):
    formula = {"savage": lambda x: (1 + x.exp()) ** -2, "squared": lambda x: (x - 1) ** 2}[f]
    check_main(small, "gpo", lambda w, l, ref_w, ref_l: formula(0.3 * (w.sum() - ref_w.sum() - l.sum() + ref_l.sum())), beta=0.3, f=f)


def test_an_unknown_function_is_refused(capsys):
    with pytest.raises(BadInput, match="--f bad: must be one of logistic, hinge, squared, exponential, truncated_quadratic, savage"):
        gpo.Config(f="bad")
    with pytest.raises(SystemExit) as stop:
        front_door(["gpo", "--f", "bad"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("minialign gpo: --f bad: must be one of logistic")


@pytest.mark.parametrize(("changes", "message"), [
    ({"beta": 0.0}, "--beta 0.0: must be above 0"), ({"pairs": "absent.jsonl"}, "absent.jsonl: cannot be read"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("gpo", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
