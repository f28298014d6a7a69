"""KL estimators by hand and by enumeration over three actions; float32 extremes; the exact divergence with forbidden tokens."""

import math

import numpy as np
import pytest
import torch

from minialign.kl import exact_kl, k1, k2, k3, kl_rewards, moved

PI, REF = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
LOG_PI, LOG_REF = torch.tensor(np.log(PI)), torch.tensor(np.log(REF))


def test_values_by_hand():
    """π = .5 .3 .2, ref = .2 .3 .5: k1 = log 2.5, 0, −log 2.5; k3 = .4 − 1 + log 2.5, 0, 2.5 − 1 − log 2.5."""
    log = math.log(2.5)
    assert k1(LOG_PI, LOG_REF).tolist() == pytest.approx([0.916291, 0, -0.916291], abs=1e-6)
    assert k2(LOG_PI, LOG_REF).tolist() == pytest.approx([log**2 / 2, 0, log**2 / 2], abs=1e-12)
    assert k3(LOG_PI, LOG_REF).tolist() == pytest.approx([0.316291, 0, 0.583709], abs=1e-6)


@pytest.mark.parametrize(("estimator", "expected"), [(k1, 0.274887), (k2, 0.293856), (k3, 0.274887)])
def test_expected_values(estimator, expected):
    """KL(π‖ref) = .5 log 2.5 − .2 log 2.5 = .274887: the mean of k1 and of k3 under π, not that of k2."""
    assert (torch.tensor(PI) * estimator(LOG_PI, LOG_REF)).sum().item() == pytest.approx(expected, abs=1e-6)
    assert exact_kl(LOG_PI, LOG_REF).item() == pytest.approx(0.274887, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (k1, [0, 0, 0]),
        (k2, [0.320702, -0.082466, -0.238236]),  # ∇KL(π‖ref) = π (log π/ref − KL)
        (k3, [0.3, 0, -0.3]),  # ∇KL(ref‖π) = π − ref
    ],
)
def test_expected_gradients_as_a_loss(estimator, expected):
    """The trap of the docstring: sum over y of π(y) ∇k(y) in softmax logits, π(y) held fixed; the two divergences by hand in numpy."""
    kl = (PI * np.log(PI / REF)).sum()
    by_hand = {k1: np.zeros(3), k2: PI * (np.log(PI / REF) - kl), k3: PI - REF}[estimator]
    logits = LOG_PI.clone().requires_grad_()
    (torch.tensor(PI) * estimator(logits.log_softmax(-1), LOG_REF)).sum().backward()
    assert logits.grad.tolist() == pytest.approx(by_hand.tolist(), abs=1e-12)
    assert logits.grad.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_extreme_log_ratios_stay_finite(estimator):
    """Log-ratios up to ±100 in float32, where e^100 is inf: value and gradient are finite, on both sides."""
    logps = torch.linspace(-100, 100, 401).requires_grad_()
    ref_logps = torch.zeros(401, requires_grad=True)
    value = estimator(logps, ref_logps)
    value.sum().backward()
    assert value.isfinite().all() and logps.grad.isfinite().all() and ref_logps.grad.isfinite().all()


@pytest.mark.parametrize("estimator", [k2, k3])
def test_a_loss_never_pushes_away_from_ref(estimator):
    """k2 and k3 have their only minimum where π = ref: their slope in log π has the sign of log π − log ref, or is 0, everywhere."""
    logps = torch.linspace(-100, 100, 401).requires_grad_()
    estimator(logps, torch.zeros(401)).sum().backward()
    wrong = logps.detach()[logps.grad * logps.detach() < 0]
    assert not len(wrong), f"the sign is wrong for {len(wrong)} log-ratios from {wrong.min()} to {wrong.max()}"


def test_k3_keeps_its_digits_near_zero():
    """d²/2 − d³/6 + … for |d| <= 1e-2 in float32 against float64; `exp(−d) − 1 + d` would be off by 1e-7 whatever d is."""
    d = torch.logspace(-6, -2, 200, dtype=torch.float32)
    d = torch.cat([-d, d])
    exact = torch.expm1(-d.double()) + d.double()
    error = (k3(d, torch.zeros_like(d)).double() - exact).abs()
    assert (error <= 2e-7 * d.abs()).all()
    careless = ((-d).exp() - 1 + d).double() - exact
    assert (careless.abs() > 2e-7 * d.abs()).any()  # the bound has teeth


def test_k3_is_not_negative():
    d = torch.cat([torch.linspace(-30, 30, 2001), torch.logspace(-8, 0, 500), -torch.logspace(-8, 0, 500)])
    assert (k3(d.double(), torch.zeros(3001, dtype=torch.float64)) >= 0).all()
    assert (k3(d, torch.zeros(3001)) >= -1e-7).all()


def test_the_penalty_by_hand():
    """Two tokens with log-ratios .5 and −.2 at β = 2 cost .6; where nothing is scored, nothing is paid. The result has no gradient."""
    logps = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = kl_rewards(rewards, logps, torch.tensor([[-1.5, -1.8], [-0.5, 0.0]], dtype=torch.float64), beta=2.0)
    assert found.tolist() == pytest.approx([0.4, 3.0], abs=1e-12) and not found.requires_grad


@pytest.mark.parametrize("towards", [0.0, -math.inf])
def test_the_least_change_of_one_log_prob_is_a_move(towards):
    """Up or down by the last bit of a float32, one of 41. Equal ones have not moved; NaN counts as equal."""
    old = torch.full((41,), -1.1)
    logps = old.clone()
    logps[7] = logps[7].nextafter(torch.tensor(towards))
    assert moved(logps, old) and moved(old, logps) and not moved(old, old.clone())
    assert not moved(torch.full((41,), math.nan), old)


def test_exact_kl_against_numpy():
    rng = np.random.default_rng(0)
    logits, ref_logits = rng.normal(size=(2, 4, 3, 7)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, ref_logits))
    got = exact_kl(torch.tensor(logits), torch.tensor(ref_logits))
    assert got.shape == (4, 3)
    assert np.allclose(got, (p * np.log(p / q)).sum(-1), atol=1e-12)


def test_exact_kl_of_forbidden_tokens():
    """0 log 0 = 0: a token forbidden to π, whether or not to ref, adds nothing; one that only ref forbids makes the divergence inf."""
    inf = math.inf
    half = torch.tensor([0.0, 0.0, -inf])
    third = torch.zeros(3)
    assert exact_kl(half, third).item() == pytest.approx(math.log(1.5))
    assert exact_kl(half, half).item() == 0
    assert exact_kl(third, half).item() == inf


def test_exact_kl_of_forbidden_tokens_has_a_gradient():
    """∇KL(π‖ref) in π's logits is π (log π/ref − KL) on the two tokens that are allowed, ref = 1/3, and 0 on the forbidden one."""
    logits = torch.tensor([1.0, 0.0, -math.inf], requires_grad=True)
    exact_kl(logits, torch.zeros(3)).backward()
    p = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    gap = np.log(p * 3)
    assert logits.grad.tolist() == pytest.approx([*(p * (gap - (p * gap).sum())), 0], abs=1e-6)
