"""The grid world by hand, its theorems by finite differences and simulation, and each check of the toy broken on purpose."""

import itertools
import json
from fractions import Fraction

import pytest
import torch

from minialign.engine.common import BadInput
from toy import grid_world as m

NINE, HALF = Fraction(9, 10), Fraction(1, 2)


def quick(tmp_path, **changes):
    return m.Config(**{"episodes": 2000, "steps": 60, "seeds": 1, "out": str(tmp_path / "grid.png"), **changes})


def test_moves_by_hand():
    """s0 top left, s1 right of it, s2 below it, s3 the end: L, D, R, U of each, walls throw back."""
    world = m.World(NINE, "goal")
    assert [[world.step(s, a)[0] for a in range(4)] for s in m.STATES] == [[0, 2, 1, 0], [0, 3, 1, 1], [2, 2, 3, 0]]
    assert [[int(world.step(s, a)[1]) for a in range(4)] for s in m.STATES] == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert {m.World(NINE, "step").step(s, a)[1] for s in m.STATES for a in range(4)} == {-1}


def test_uniform_values_by_hand():
    """γ = 1, −1 a move: V0 = −1 + (V0 + V1)/2 gives V0 = V1 − 2, V1 = −1 + (V0 + 2·V1)/4 gives 2·V1 = V0 − 4: −8 and −6, which are
    expected numbers of moves. γ = .5, +1 at the end: .75·V0 = .25·V1, so V1 = 3·V0, and .75·V1 = V0/8 + 1/4: (9/4 − 1/8)·V0 = 1/4, 2/17."""
    assert m.values(m.UNIFORM, m.World(Fraction(1), "step")) == [-8, -6, -6]
    assert m.values(m.UNIFORM, m.World(HALF, "goal")) == [Fraction(2, 17), Fraction(6, 17), Fraction(6, 17)]
    assert m.values(m.UNIFORM, m.World(NINE, "goal")) == [Fraction(90, 161), Fraction(110, 161), Fraction(110, 161)]
    Q = m.action_values(m.UNIFORM, m.World(NINE, "goal"))
    assert Q[0] == [Fraction(81, 161), Fraction(99, 161), Fraction(99, 161), Fraction(81, 161)]  # .9 of 90/161 and of 110/161
    assert Q[1] == [Fraction(81, 161), 1, Fraction(99, 161), Fraction(99, 161)]


def test_elimination_with_a_zero_pivot():
    """2y = 4, x + y = 5: x = 3, y = 2."""
    assert m.solve([[Fraction(0), Fraction(2)], [Fraction(1), Fraction(1)]], [Fraction(4), Fraction(5)]) == [3, 2]


def test_values_are_the_sum_of_the_series():
    """V = Σ_t (γP)^t·r and d = Σ_t (γPᵀ)^t·e_0, 400 terms in float64: .9^400 = 5e-19."""
    world = m.World(NINE, "step")
    for policy in m.random_policies(3, seed=7):
        P, r = (torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)
                for rows in (m.moves(policy, world)[0], [m.moves(policy, world)[1]]))
        V, d, term, visit = 0, 0, r[0], torch.eye(3, dtype=torch.float64)[0]
        for _ in range(400):
            V, d, term, visit = V + term, d + visit, 0.9 * P @ term, 0.9 * P.T @ visit
        assert torch.allclose(V, torch.tensor([float(v) for v in m.values(policy, world)], dtype=torch.float64), atol=1e-12)
        assert torch.allclose(d, torch.tensor([float(v) for v in m.visits(policy, world)], dtype=torch.float64), atol=1e-12)


def test_optimal_values_by_hand():
    """Two moves to the end, one from s1 and s2: γ and 1; −1 a move: −(1 + γ) and −1. Sweeps from 0: (0, 1, 1), then (γ, 1, 1)."""
    goal, every = m.World(NINE, "goal"), m.World(NINE, "step")
    assert m.best_by_enumeration(goal) == [NINE, 1, 1] and m.best_by_enumeration(every) == [-1 - NINE, -1, -1]
    assert m.value_iteration([Fraction(0)] * 3, goal)[1:3] == [[0, 1, 1], [NINE, 1, 1]]
    rounds = m.policy_iteration(m.UP, goal)
    assert [V for _, V in rounds] == [[0, 0, 0], [0, 1, 1], [NINE, 1, 1]]
    assert m.improve(rounds[-1][0], m.action_values(rounds[-1][0], goal)) == rounds[-1][0]


def test_policy_gradient_by_finite_differences():
    """(V(θ + h) − V(θ − h))/2h with h = 1e-5, all twelve logits of a policy that is not symmetric."""
    world, policy, h = m.World(NINE, "goal"), m.random_policies(1, seed=3)[0], 1e-5
    logits = torch.tensor([[float(p) for p in row] for row in policy], dtype=torch.float64).log()
    theorem = m.policy_gradient(policy, world)
    for s, a in itertools.product(m.STATES, range(4)):
        up, down = logits.clone(), logits.clone()
        up[s, a] += h
        down[s, a] -= h
        slope = (m.value_of_logits(up, world) - m.value_of_logits(down, world)).item() / (2 * h)
        assert slope == pytest.approx(float(theorem[s][a]), abs=1e-9)


def test_the_advantage_of_a_policy_over_itself_is_zero():
    """The lecture's E_{a~π}[Q^π − V^π] is 0 for every π: V^π is not a constant beside it but all there is. With the old policy's
    advantages and the new one's visits it is the difference of two values: of always down, then right, against uniform: .9 − 90/161."""
    world = m.World(NINE, "goal")
    for policy in m.random_policies(20):
        assert m.expected(policy, m.advantages(policy, world)) == [0, 0, 0]
        assert m.performance_difference(policy, policy, world) == (0, 0)
    left, right = m.performance_difference(m.policy_iteration(m.UP, world)[-1][0], m.UNIFORM, world)
    assert left == right == NINE - Fraction(90, 161)


def test_sampled_episodes_earn_what_they_should():
    """20000 episodes of a policy that is not symmetric: mean return V(s0) within 4 standard errors; s0 first; ends stay ended."""
    world, policy = m.World(NINE, "goal"), m.random_policies(1, seed=5)[0]
    logits = torch.tensor([[float(p) for p in row] for row in policy], dtype=torch.float64).log()
    states, actions, mask, returns = m.sample_episodes(logits, world, 20000, 200, torch.Generator().manual_seed(0))
    assert abs(returns.mean() - float(m.values(policy, world)[0])) < 4 * returns.std() / 20000**0.5
    assert (states[:, 0] == 0).all() and (mask[:, 1:] <= mask[:, :-1]).all() and states.shape == actions.shape == mask.shape
    assert torch.allclose(returns, 0.9 ** (mask.sum(1) - 1).double())  # +1 for the last move
    cut = m.sample_episodes(logits, world, 50, 2, torch.Generator().manual_seed(0))
    assert cut[0].shape[1] <= 2


# ------------------------------------------------------------------------------------------------------ the toy, and broken


def test_a_quick_run_prints_and_draws(tmp_path, capsys):
    assert m.main(quick(tmp_path))
    out = capsys.readouterr().out
    assert out.count("PASS") == 15 and "FAIL" not in out and "90/161" in out and "110/161" in out and "does not hold" in out
    content = json.loads((tmp_path / "grid.json").read_text())
    assert len(content["curves"]) == 1 and (tmp_path / "grid.png").stat().st_size > 10_000


def failed(report):
    return {check["name"].strip() for check in report.checks if not check["passed"]}


def exact(tmp_path, monkeypatch, **broken):
    for name, function in broken.items():
        monkeypatch.setattr(m, name, function)
    report = m.Report(quick(tmp_path))
    m.exact_checks(report, m.World(NINE, "goal"))
    return report


RIGHT = {name: getattr(m, name) for name in ("values", "action_values", "visits", "look_ahead", "improve", "by_hand", "expected")}
UNIFORM_CHECK, MEAN, BELLMAN, QS = ("uniform policy: V − its formula, 8 settings", "V − Σ_a π(a|s)·Q(s, a), 4 policies",
                                    "V − Σ_a π(a|s)·(r + γ·V(s'))", "Q − (r + γ·V(s'))")
SWEEPS, SHRINKS, TOGETHER = "value iteration from 0: V − best of 64", "each sweep changes at most γ times as much", \
    "and brings any two tables together by γ"
ROUNDS, RISES, LEMMA, THEOREM = ("policy iteration: V − best of 64", "V falls in no state and no round",
                                 "performance-difference lemma, 20 pairs", "policy gradient theorem against autograd")


# what is broken -> what must fail
BROKEN = {
    "V of another γ": ({"values": lambda p, w: RIGHT["values"](p, m.World(w.gamma * HALF, w.reward))}, {UNIFORM_CHECK, MEAN, BELLMAN}),
    "Q of another γ": ({"action_values": lambda p, w: RIGHT["action_values"](p, m.World(HALF, w.reward))}, {MEAN, QS, LEMMA, THEOREM}),
    "γ lost in the look ahead": ({"look_ahead": lambda V, w: RIGHT["look_ahead"](V, m.World(Fraction(1), w.reward))},
                                 {BELLMAN, QS, SHRINKS, TOGETHER}),
    "mean instead of max": ({"backup": lambda V, w: [sum(row) / 4 for row in m.look_ahead(V, w)], "value_iteration": lambda V, w: [
        V, m.backup(V, w), *[RIGHT["values"](m.UNIFORM, w)] * 2]}, {SWEEPS}),
    "worst instead of best action": ({"improve": lambda p, Q: RIGHT["improve"](p, [[-q for q in row] for row in Q])}, {ROUNDS}),
    "rounds in reverse": ({"policy_iteration": lambda p, w, right=m.policy_iteration: right(p, w)[::-1]}, {ROUNDS, RISES}),
    "visits not discounted": ({"visits": lambda p, w: RIGHT["visits"](p, m.World(Fraction(99, 100), w.reward))}, {LEMMA, THEOREM}),
    "actions shuffled": ({"expected": lambda p, x: RIGHT["expected"]([row[::-1] for row in p], x)}, {MEAN, BELLMAN, LEMMA}),
    "rewards of s0 and s1 exchanged by hand": ({"by_hand": lambda g, r: RIGHT["by_hand"](g, r)[::-1]}, {UNIFORM_CHECK}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_on_purpose(name, tmp_path, monkeypatch, capsys):
    broken, must_fail = BROKEN[name]
    missing = must_fail - failed(exact(tmp_path, monkeypatch, **broken))
    assert not missing


def test_the_claim_would_hold_of_a_surrogate_that_orders_policies_as_j_does(tmp_path, monkeypatch, capsys):
    """Without "− V^π" what is averaged is V itself, the order is J's, and the verdict turns."""
    assert exact(tmp_path, monkeypatch).claims[0]["verdict"] == "does not hold"
    monkeypatch.setattr(m, "advantages", m.action_values)
    assert exact(tmp_path, monkeypatch).claims[0]["verdict"] == "holds"


@pytest.mark.parametrize("wrong", [
    lambda logps, advantages, mask: m.reinforce_right(logps, advantages.flip(0), mask),  # returns of other episodes
    lambda logps, advantages, mask: tuple(-x if torch.is_tensor(x) else x for x in m.reinforce_right(logps, advantages, mask)),
])
def test_broken_reinforce_fails_both_gates(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(m, "reinforce_right", m.reinforce_loss, raising=False)
    monkeypatch.setattr(m, "reinforce_loss", wrong)
    assert not m.main(quick(tmp_path))
    checks = json.loads((tmp_path / "grid.json").read_text())["checks"]
    assert [check["passed"] for check in checks] == [True] * 13 + [False] * 2


def test_too_few_episodes_prove_nothing(tmp_path, capsys):
    """A gradient that is not told from 0 passes no gate, however wide its standard errors are."""
    assert not m.main(quick(tmp_path, episodes=200))


@pytest.mark.parametrize("settings", [
    dict(gamma=1.0), dict(gamma=0.0), dict(reward="gold"), dict(seeds=0), dict(episodes=10), dict(lr=0.0),
])
def test_bad_arguments(settings, tmp_path):
    with pytest.raises(BadInput):
        m.main(quick(tmp_path, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(reward="step"), dict(gamma=0.5), dict(gamma=0.99, reward="step"), dict(full=True)])
def test_other_settings(settings, tmp_path, capsys):
    assert m.main(m.Config(**settings, out=str(tmp_path / "grid.png")))
