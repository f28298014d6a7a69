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
