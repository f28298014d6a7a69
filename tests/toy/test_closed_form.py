"""The oracles against numbers worked elsewhere and against their own definitions (optimality by perturbation)."""

import ast
from pathlib import Path

import numpy as np
import pytest

from toy import closed_form as law

E, REF, UNIFORM = np.array([0.1, 0.2, 0.7]), np.array([0.5, 0.3, 0.2]), np.full(3, 1 / 3)


def test_imports_numpy_alone():
    tree = ast.parse(Path(law.__file__).read_text())
    modules = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
    assert modules == {"numpy"} and not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


@pytest.mark.parametrize(("R", "beta", "unseen", "seen", "erratum"), [
    (1, 1, 0.211942, 0.576117, 1.423883), (1, 0.5, 0.106507, 0.786986, 1.213014), (2, 0.5, 0.017668, 0.964663, 1.035337),
])
def test_table_1(R, beta, unseen, seen, erratum):
    """The corrected table; and what the printed one, 2/(2 + e^x) for each unseen action, would sum to."""
    policy = law.table_1(R / beta)
    assert policy == pytest.approx([unseen, unseen, seen], abs=1e-6) and policy.sum() == pytest.approx(1, abs=1e-15)
    x = np.exp(R / beta)
    assert 2 * 2 / (2 + x) + x / (2 + x) == pytest.approx(erratum, abs=1e-6)


@pytest.mark.parametrize(("expert", "ref", "x", "expected"), [
    (E, UNIFORM, 1, [0.2119, 0.2119, 0.5761]), (E, UNIFORM, 3, E), ([0.02, 0.28, 0.7], UNIFORM, 1.5, [0.131346, 0.28, 0.588654]),
    ([0, 0, 1], REF, 1, [0.372119, 0.223271, 0.404610]), ([0, 0, 1], UNIFORM, 2, [0.106507, 0.106507, 0.786986]),
])
def test_demonstration_law(expert, ref, x, expected):
    assert law.demonstration_law(expert, ref, x) == pytest.approx(expected, abs=6e-5)


def test_demonstration_law_is_optimal():
    """No reward in [0, x] gives the demonstrations a higher likelihood: 2000 random ones, and small steps around the best."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        expert, ref, x = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4)), rng.uniform(0.2, 4)
        policy = law.demonstration_law(expert, ref, x)
        best = (expert * np.log(policy)).sum()
        spread = np.log(policy / ref)
        assert spread.max() - spread.min() <= x + 1e-9  # it is reachable: some reward within the bounds gives it
        for reward in rng.uniform(0, x, size=(200, 4)):
            assert (expert * np.log(law.tilt(ref, reward, 1.0))).sum() <= best + 1e-12


def test_tilt_maximises_reward_minus_kl():
    rng = np.random.default_rng(0)
    reward, beta = np.array([1.0, 0, 2]), 0.7
    best = law.tilt(REF, reward, beta)
    value = best @ reward - beta * law.kl(best, REF)
    for _ in range(200):
        other = law.normalise(best * np.exp(rng.normal(size=3) * 0.1))
        assert other @ reward - beta * law.kl(other, REF) <= value


def test_geometric_mixture():
    assert law.geometric_mixture(E, REF, 1.0) == pytest.approx([0.265339, 0.290664, 0.443997], abs=1e-6)
    assert law.geometric_mixture(E, UNIFORM, 2.0) == pytest.approx([0.2396, 0.3019, 0.4584], abs=1e-4)


def test_rounds():
    """p(y3), E3 = .7, uniform ref: the swings, the divergence and the convergence that the multipliers −1/β and 1 − 1/β predict."""
    third = lambda beta, update, n=4: law.rounds_law(E, UNIFORM, beta, n, ref_update=update)[:, 2]  # noqa: E731
    assert third(1, False) == pytest.approx([0.7, 1 / 3, 0.7, 1 / 3], abs=1e-6)
    assert third(2, False) == pytest.approx([0.523, 0.426, 0.475, 0.450], abs=6e-4)
    assert third(0.5, False, 3) == pytest.approx([0.907, 0.016, 0.999], abs=6e-4)
    assert third(2, True) == pytest.approx([0.523, 0.616, 0.660, 0.680], abs=6e-4)
    assert third(1, True) == pytest.approx([0.7] * 4, abs=1e-9)
    assert third(0.5, True) == pytest.approx([0.907, 1 / 3, 0.907, 1 / 3], abs=6e-4)


def test_sft_flow():
    """Against numerical integration of d' = 3/(2 + e^d) with small steps."""
    d, dt = 0.0, 1e-4
    for _ in range(20000):
        half = d + dt / 2 * 3 / (2 + np.exp(d))
        d += dt * 3 / (2 + np.exp(half))
    assert law.sft_flow(2.0) == pytest.approx(np.exp(d) / (2 + np.exp(d)), abs=1e-8)
    assert law.sft_flow(0.0) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------- from preferences


def pair_loss(scores, f, mu, prefer):
    """Σ μ_a·μ_b·prefer[a, b]·f(s_a − s_b), in loops."""
    return sum(mu[a] * mu[b] * prefer[a, b] * f(scores[a] - scores[b]) for a in range(len(mu)) for b in range(len(mu)))


def random_pairs(seed, n=4):
    rng = np.random.default_rng(seed)
    return rng, rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(n)), rng.normal(size=n)


def test_bradley_terry_and_winners_by_hand():
    """r = (0, log 3): the second is preferred with probability 3/4. μ = (½, ½): of the four draws the second one wins ⅛ + ¼·¾·2 = ½ of
    the ¼s: W = (3/8, 5/8), L the other way round."""
    prefer = law.bradley_terry([0, np.log(3)])
    assert prefer == pytest.approx(np.array([[0.5, 0.25], [0.75, 0.5]]))
    won, lost = law.winners([0.5, 0.5], prefer)
    assert won == pytest.approx([3 / 8, 5 / 8]) and lost == pytest.approx([5 / 8, 3 / 8])
    assert law.bradley_terry([0, 1000.0])[0, 1] == 0 and law.bradley_terry([0, 1000.0])[1, 0] == 1  # no overflow


@pytest.mark.parametrize("seed", range(5))
def test_the_laws_of_preferences_are_minima(seed):
    """No perturbed policy has a smaller expected loss: DPO, Savage, exponential, IPO, GPO's square, SimPO, ORPO without odds, SLiC."""
    rng, mu, ref, reward = random_pairs(seed)
    prefer, beta, lengths = law.bradley_terry(reward), 0.7, np.array([1, 2, 3, 2])
    won, lost = law.winners(mu, prefer)
    weight = 3 + 2 * max(0, ((lost - won) / won).max())

    def log_ratio(f):
        return lambda policy: pair_loss(beta * np.log(policy / ref), f, mu, prefer)

    cases = [
        (law.tilt(ref, reward, beta), log_ratio(lambda x: np.log1p(np.exp(-x)))),
        (law.tilt(ref, reward, beta), log_ratio(lambda x: 1 / (1 + np.exp(x)) ** 2)),
        (law.tilt(ref, reward, 2 * beta), log_ratio(lambda x: np.exp(-x))),
        (law.ipo_law(ref, prefer, beta, mu), log_ratio(lambda x: (x / beta - 1 / (2 * beta)) ** 2)),
        (law.ipo_law(ref, prefer, beta / 2, mu), log_ratio(lambda x: (x - 1) ** 2)),
        (law.simpo_law(lengths, reward, beta), lambda p: pair_loss(beta * np.log(p) / lengths, lambda x: np.log1p(np.exp(-x)), mu, prefer)),
        (law.winners_law(mu, prefer, lengths), lambda p: -(won * np.log(p) / lengths).sum()),
        (law.slic_law(mu, prefer, weight),
         lambda p: 2 * pair_loss(np.log(p), lambda x: np.maximum(0, 50 - x), mu, prefer) - weight * (won * np.log(p)).sum()),
    ]
    for policy, loss in cases:
        assert policy.sum() == pytest.approx(1, abs=1e-12) and policy.min() > 0
        best = loss(policy)
        for _ in range(60):
            assert loss(law.normalise(policy * np.exp(rng.normal(size=4) * rng.choice([0.01, 0.1])))) > best - 1e-13


def test_ipo_needs_no_bradley_terry():
    """Labels that never contradict each other, three completions in a row: g = (μ₁/2, μ₁ + μ₂/2, …), finite log-ratios; and the online law
    is the fixed law of its own μ."""
    prefer = np.array([[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]])
    policy = law.ipo_law(REF, prefer, 0.5, UNIFORM)
    assert np.log(policy[1:] / REF[1:]) - np.log(policy[:-1] / REF[:-1]) == pytest.approx([2 / 3, 2 / 3])
    online = law.ipo_online_law(REF, prefer, 0.5)
    assert law.ipo_law(REF, prefer, 0.5, online) == pytest.approx(online, abs=1e-14)
    assert np.abs(online - law.ipo_law(REF, prefer, 0.5, REF)).max() > 1e-3


def test_the_hinge_corner_is_the_best_of_a_grid():
    for seed in range(3):
        _, mu, ref, reward = random_pairs(seed, 3)
        prefer, beta = law.bradley_terry(2 * reward), 0.7
        best = beta * np.log(law.hinge_corner(ref, prefer, beta, mu) / ref)
        smallest = pair_loss(best, lambda x: max(0, 1 - x), mu, prefer)
        grid = np.linspace(-3, 3, 61)  # it holds every corner, up to rounding
        others = min(pair_loss(np.array([0, a, b]), lambda x: max(0, 1 - x), mu, prefer) for a in grid for b in grid)
        assert smallest == pytest.approx(others, abs=1e-12)


def test_rollouts_of_ppo_with_a_penalty():
    """One is the maximum of Σ π·A − κ·KL(old‖π): lower at every policy near it. Many, with R = r − β·log π/ref, tend to the tilt."""
    rng, (_, _, ref, reward) = np.random.default_rng(0), random_pairs(3)
    advantages = reward - ref @ reward
    policy = law.kl_penalty_step(ref, advantages, 1.5)
    value = policy @ advantages - 1.5 * law.kl(ref, policy)
    for _ in range(100):
        near = law.normalise(policy * np.exp(0.01 * rng.standard_normal(4)))
        assert near @ advantages - 1.5 * law.kl(ref, near) < value
    policy, beta = ref, 0.7
    for _ in range(300):
        returns = reward - beta * np.log(policy / ref)
        policy = law.kl_penalty_step(policy, returns - policy @ returns, 4.0)
    assert policy == pytest.approx(law.tilt(ref, reward, beta), abs=1e-9)


def test_ptx_law():
    """The maximum of E[r] − β·KL + w·Σ D·log π: lower nearby; without w the tilt; a huge w gives D."""
    rng, (_, target, ref, reward) = np.random.default_rng(0), random_pairs(3)

    def value(policy, weight):
        return policy @ reward - 0.7 * law.kl(policy, ref) + weight * target @ np.log(policy)

    for weight in (0.1, 1.0, 10.0):
        policy = law.ptx_law(ref, reward, 0.7, weight, target)
        assert all(value(law.normalise(policy * np.exp(0.01 * rng.standard_normal(4))), weight) < value(policy, weight) for _ in range(100))
    assert law.ptx_law(ref, reward, 0.7, 0.0, target) == pytest.approx(law.tilt(ref, reward, 0.7), abs=1e-9)
    assert law.ptx_law(ref, reward, 0.7, 1e5, target) == pytest.approx(target, abs=1e-4)


def test_the_slopes_are_derivatives():
    """pair_slope, orpo_slope, kto_slope against central differences of the losses in loops."""
    _, mu, ref, reward = random_pairs(7)
    prefer, beta, logits, step = law.bradley_terry(reward), 0.7, np.log(ref) + np.array([0.3, -0.2, 0.5, 0]), 1e-6
    won, lost = law.winners(mu, prefer)

    def difference(loss):
        return np.array([(loss(logits + step * e) - loss(logits - step * e)) / (2 * step) for e in np.eye(4)])

    def policy_of(z):
        return law.normalise(np.exp(z))

    def orpo(z):
        p = policy_of(z)
        odds = pair_loss(np.log(p / (1 - p)), lambda x: np.log1p(np.exp(-x)), mu, prefer)
        return -(won * np.log(p)).sum() + 0.3 * 2 * odds

    z0 = max(0.0, mu @ np.log(policy_of(logits) / ref))

    values = {"logistic": lambda x: 1 / (1 + np.exp(-x)), "concave": lambda x: -np.log1p(np.exp(-x)), "neutral": lambda x: x,
              "prospect": lambda x: np.where(x < 0, -2.25, 1) * np.abs(x) ** 0.88}

    def kto(value):
        def loss(z):
            x = beta * (np.log(policy_of(z) / ref) - z0)
            return -(2 * won * values[value](x) + lost * values[value](-x)).sum()

        return difference(loss)

    quadratic = difference(lambda z: pair_loss(beta * z, lambda x: np.maximum(0, 1 - x) ** 2, mu, prefer))
    assert beta * law.pair_slope(lambda x: -2 * np.maximum(0, 1 - x), beta * logits, prefer, mu) == pytest.approx(quadratic, abs=1e-8)
    assert law.orpo_slope(policy_of(logits), prefer, mu, 0.3) == pytest.approx(difference(orpo), abs=1e-8)
    for value in values:
        assert law.kto_slope(policy_of(logits), ref, 2 * won, lost, beta, z0, value) == pytest.approx(kto(value), abs=1e-8)
