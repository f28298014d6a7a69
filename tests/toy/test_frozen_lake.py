"""The lake against fractions, brute force, gymnasium itself and autograd; every gate and verdict against a method broken on purpose."""

import contextlib
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
import torch

from minialign.engine.common import BadInput
from minialign.evaluate import verdict
from toy import frozen_lake
from toy.frozen_lake import EIGHT, FOUR, TWO_WAYS, Config, Lake
from toy.grid_world import solve
from toy.report import Report


def exact_success(lake, policy):
    """Chance of the gift from the start: (1 − M)·v = chance of arriving at once, M among live states, in thirds and quarters."""
    live = [int(s) for s in lake.live]
    P = [[[Fraction(float(p)).limit_denominator(3) for p in row] for row in moves] for moves in lake.P]
    pi = [[Fraction(float(w)).limit_denominator(12) for w in row] for row in policy]
    chance = [[sum(w * P[s][a][t] for a, w in enumerate(pi[s])) for t in range(len(P))] for s in live]
    matrix = [[Fraction(i == j) - chance[i][t] for j, t in enumerate(live)] for i in range(len(live))]
    return solve(matrix, [sum(p for p, letter in zip(row, lake.letters, strict=True) if letter == "G") for row in chance])[0]


def test_success_in_fractions():
    """The best policy of the slippery lake never falls on purpose: 14 games in 17. The uniform one: about one in 72 where nothing slips."""
    lake = Lake(FOUR, slippery=True)
    greedy = np.eye(4)[[0, 3, 3, 3, 0, 0, 0, 0, 3, 1, 0, 0, 0, 2, 1, 0]]
    assert exact_success(lake, greedy) == Fraction(14, 17)
    assert frozen_lake.success(lake, greedy) == pytest.approx(14 / 17, abs=1e-12)
    _, _, best = frozen_lake.value_iteration(lake, lake.goal, 0.99)
    assert best[lake.live].argmax(1).tolist() == greedy[lake.live].argmax(1).tolist()
    dry, uniform = Lake(FOUR), np.full((16, 4), 0.25)
    assert frozen_lake.success(dry, uniform) == pytest.approx(float(exact_success(dry, uniform)), abs=1e-12)


def test_success_in_100_moves_against_gymnasium():
    """2000 games of gymnasium's own environment, its time limit included: within four standard errors."""
    lake, env = Lake(FOUR, slippery=True), gymnasium.make("FrozenLake-v1", is_slippery=True)
    _, _, best = frozen_lake.value_iteration(lake, lake.goal, 0.99)
    won = 0
    for game in range(2000):
        state, _ = env.reset(seed=game)
        over = False
        while not over:
            state, reward, terminated, truncated, _ = env.step(int(best[state].argmax()))
            won += reward
            over = terminated or truncated
    exact = frozen_lake.success(lake, best, 100)
    assert abs(won / 2000 - exact) < 4 * math.sqrt(exact * (1 - exact) / 2000) and exact < 14 / 17


@pytest.mark.parametrize("rows", [FOUR, EIGHT, TWO_WAYS])
@pytest.mark.parametrize("slippery", [False, True])
def test_value_iteration_against_policies_solved(rows, slippery):
    """V* is the value of the policy that it recommends, by linear equations, and no single change of a move does better."""
    lake = Lake(rows, slippery)
    V, Q, best = frozen_lake.value_iteration(lake, lake.goal, 0.95)
    chain = np.einsum("sa,sat->st", best, lake.P)
    solved = np.linalg.solve(np.eye(len(chain)) - 0.95 * chain, chain @ lake.goal)
    assert np.abs(V - solved).max() < 1e-12 and (Q <= solved[:, None] + 1e-12).all()


def test_the_two_ways_are_two():
    """RRRD in four moves, DDDRRRUU in eight; every other walk without a step back ends in a hole."""
    lake = Lake(TWO_WAYS)
    found = []
    for n in range(1, 9):
        for moves in itertools.product("LDRU", repeat=n):
            states, _ = lake.walk(moves)
            if len({*states}) == n + 1 and lake.goal[states[-1]] and not lake.over[states[:-1]].any():
                found.append("".join(moves))
    assert found == ["RRRD", "DDDRRRUU"]


@pytest.mark.parametrize("entropy", [False, True])
def test_soft_value_iteration_against_all_trajectories(entropy):
    """Six moves on six fields, nothing discounted: e^{V/β} is the mean (with an entropy bonus the sum over what is played) of e^{R/β}."""
    lake, beta, horizon = Lake(["SFH", "FFG"]), 0.7, 6
    rewards = np.array([0.1, -0.3, 0.2, 0.05, 0.4, 1.0])
    total = np.zeros(4)  # by first move
    for moves in itertools.product(range(4), repeat=horizon):
        state, earned, played = 0, 0.0, 0
        for move in moves:
            if not lake.over[state]:
                state = int(lake.P[state, move].argmax())
                earned, played = earned + rewards[state], played + 1
        total[moves[0]] += math.exp(earned / beta) / 4**horizon * (4**played if entropy else 1)
    V, policy = frozen_lake.soft_value_iteration(lake, rewards, 1.0, beta, horizon=horizon, entropy=entropy)
    assert V[0] == pytest.approx(beta * math.log(total.sum()), abs=1e-10)
    assert policy[0] == pytest.approx(total / total.sum(), abs=1e-10)


@pytest.mark.parametrize(("slippery", "gamma", "beta"), [(False, 0.95, 0.1), (True, 0.99, 0.005), (True, 0.9, 1.0)])
def test_soft_policy_iteration_is_soft_value_iteration(slippery, gamma, beta):
    lake = Lake(FOUR, slippery)
    V, policy = frozen_lake.soft_value_iteration(lake, lake.goal, gamma, beta)
    fast, same = frozen_lake.soft_policy_iteration(lake, lake.goal, gamma, beta)
    assert np.abs(V - fast).max() < 1e-11 and np.abs(policy - same)[lake.live].max() < 1e-8
    rng = np.random.default_rng(0)  # and no other policy has a larger E[Σ γ^t·(r − β·KL)]
    for _ in range(20):
        other = rng.dirichlet(np.ones(4) * 3, size=16) * 0.05 + 0.95 * policy
        chain = np.einsum("sa,sat->st", other, lake.P)
        cost = beta * (other * np.log(4 * other)).sum(1)
        value = np.linalg.solve(np.eye(16) - gamma * chain, np.where(lake.over, 0, chain @ lake.goal - cost))
        assert value[0] < V[0]


def log_policy(lake, rewards, gamma, beta, sweeps=2000):
    """log π_r by unrolled soft value iteration in torch: autograd differentiates through every sweep."""
    P, over = torch.tensor(lake.P), torch.tensor(lake.over)
    V = torch.zeros(len(P), dtype=torch.float64)
    for _ in range(sweeps):
        Q = P @ (rewards + gamma * V)
        V = torch.where(over, 0, beta * (torch.logsumexp(Q / beta, 1) - math.log(4)))
    return (P @ (rewards + gamma * V) / beta).log_softmax(1)


@pytest.mark.parametrize("slippery", [False, True])
def test_inverse_rl_is_at_the_maximum_of_the_likelihood(slippery):
    """Of moves that were seen, with the ridge: the gradient of the penalised log-likelihood, by autograd through soft value iteration, is 0
    at the learned reward; at the true one it is not."""
    lake, gamma, beta, ridge = Lake(FOUR, slippery), 0.9, 0.2, 1e-2
    _, expert = frozen_lake.soft_value_iteration(lake, lake.goal, gamma, beta)
    rng, moves = np.random.default_rng(0), np.zeros((16, 4))
    for _ in range(4):
        states, made = lake.episode(expert, rng)
        np.add.at(moves, (states[:-1], made), gamma ** np.arange(len(made)))
    learned, policy = frozen_lake.learn_reward(lake, moves, gamma, beta, ridge=ridge)

    def slope(at):
        rewards = torch.tensor(at, requires_grad=True)
        likelihood = (torch.tensor(moves) * log_policy(lake, rewards, gamma, beta, 400)).sum() - ridge / beta * rewards.square().sum()
        return torch.autograd.grad(likelihood, rewards)[0].abs().max()

    assert slope(learned) < 1e-6 < 0.1 < slope(lake.goal)
    assert np.abs(policy - log_policy(lake, torch.tensor(learned), gamma, beta, 400).exp().numpy())[lake.live].max() < 1e-9


def test_visits_by_summing_over_time():
    lake, policy = Lake(FOUR, slippery=True), np.random.default_rng(0).dirichlet(np.ones(4), size=16)
    chain, at, arrivals, time = np.einsum("sa,sat->st", policy, lake.P), np.eye(16)[0], np.zeros(16), np.zeros(16)
    for t in range(1500):
        time += 0.97**t * at
        at = at @ chain
        arrivals += 0.97**t * at
    assert np.abs(frozen_lake.visits(lake, policy, 0.97)[0] - arrivals).max() < 1e-12
    assert np.abs(frozen_lake.visits(lake, policy, 0.97)[1] - time).max() < 1e-12


def test_games_are_played_by_the_rules():
    """Moves by the policy, arrivals by the table, nothing scored after the end; as many arrive as the recursion says."""
    lake = Lake(FOUR, slippery=True)
    policy = np.random.default_rng(1).dirichlet(np.ones(4), size=(2, 16))
    states, moves, arrivals, mask = frozen_lake.play(lake, torch.tensor(policy).log(), 4000, torch.Generator().manual_seed(0))
    assert states.shape == (2, 4000, 30) and (states[..., 0] == 0).all() and mask[..., 0].all()
    assert (lake.P[states[mask], moves[mask], arrivals[mask]] > 0).all()
    going_on = mask[..., 1:]
    assert (states[..., 1:][going_on] == arrivals[..., :-1][going_on]).all()
    assert (going_on == (mask[..., :-1] & ~torch.tensor(lake.over)[arrivals[..., :-1]])).all()
    for seed in range(2):
        exact = frozen_lake.success(lake, policy[seed], 30)
        won = torch.where(mask[seed], torch.tensor(lake.goal)[arrivals[seed]], 0).sum(1)
        assert abs(won.mean().item() - exact) < 4 * math.sqrt(exact * (1 - exact) / 4000)


def test_lookahead_by_hand():
    """A net that always goes down, on the way right, right, down: from 0 it would be at 4, from 1 in the hole 5. The start is itself."""
    lake = Lake(FOUR)
    net = {"embedding": torch.zeros(16, 3).double(), "bias": torch.ones(3).double(), "head": torch.eye(3, 4).double() * 0,
           "head_bias": torch.tensor([0.0, 1.0, 0.0, 0.0]).double()}
    features = frozen_lake.lookahead(lake, net, torch.tensor([0, 1, 2]), 0.2)
    expected = torch.zeros(3, 16, dtype=torch.float64)
    expected[0, 0], expected[1, 1], expected[1, 4], expected[2, 2], expected[2, 5] = 1, 0.8, 0.2, 0.8, 0.2
    assert torch.allclose(features, expected)


def test_seeds_in_a_batch_are_seeds_alone():
    """Trained beside others or by itself, a net ends at the same weights."""
    lake, good = Lake(FOUR), frozen_lake.tensors(Lake(FOUR).walk("RRDDDR"))
    start = frozen_lake.first_weights(16, 8, 3)
    losses = frozen_lake.each(lambda net: frozen_lake.ift_of(net, good, lake=lake))
    together = frozen_lake.fit(start, losses, 20, torch.optim.RMSprop, 1e-2)
    alone = frozen_lake.fit({name: weight[1:2] for name, weight in start.items()}, losses, 20, torch.optim.RMSprop, 1e-2)
    assert all(torch.allclose(together[name][1:2], alone[name], atol=1e-12) for name in start)
    assert frozen_lake.parameter_error(together, start).shape == (3,)


def test_the_first_weights_are_torchs():
    """Uniform within ± 1/√inputs, as nn.Linear draws them."""
    nets = frozen_lake.first_weights(16, 500, 2)
    for name, inputs in (("embedding", 16), ("bias", 16), ("head", 500), ("head_bias", 500)):
        assert 0.9 < nets[name].abs().max() * math.sqrt(inputs) <= 1 or name == "head_bias"
    assert not torch.equal(nets["head"][0], nets["head"][1])


# ---------------------------------------------------------------------------------------- verdicts turn when something is broken


def missed(report):
    return {check["name"] for check in report.checks if not check["passed"]}


def worded(report):
    return {claim["claim"]: claim["verdict"] for claim in report.claims}


def few_seeds(tmp_path, **changes):
    return Config(seeds=3, out=str(tmp_path / "figure.png"), **changes)


def only(monkeypatch, names):
    """frozen_lake.settings, but only those of these names."""
    chosen = [s for s in frozen_lake.settings(300) if s.name in names]
    monkeypatch.setattr(frozen_lake, "settings", lambda steps: [replace(s, steps=min(s.steps, steps)) for s in chosen])


def test_the_found_setting_and_its_labels_permuted(monkeypatch, tmp_path):
    """Six seeds: the paper's order holds and the nearest plays worst. With the labels of DPO and SFT exchanged both verdicts turn."""
    setting = next(s for s in frozen_lake.settings(300) if s.name == "found by search")
    table = frozen_lake.measure(setting, frozen_lake.compare(setting, replace(few_seeds(tmp_path), seeds=6)))
    assert verdict(frozen_lake.lead(table).tolist())[3] == "holds"
    assert all(table["DPO"]["success"] < np.minimum(table["SFT"]["success"], table["IFT"]["success"]))
    turned = {**table, "DPO": table["SFT"], "SFT": table["DPO"]}
    assert verdict(frozen_lake.lead(turned).tolist())[3] == "does not hold"


def test_lead_by_hand():
    """IFT − DPO = .1, ORPO − IFT = .2, SFT − IFT = −.05: the order fails by .05."""
    table = {name: {"parameter error": np.array([value])} for name, value in (("DPO", 0.2), ("IFT", 0.3), ("ORPO", 0.5), ("SFT", 0.25))}
    assert frozen_lake.lead(table) == pytest.approx([-0.05])


LOSSES = ("sft_loss", "ift_loss", "orpo_loss", "irft_loss", "rloo_loss", "grpo_loss", "policy_loss")


def test_losses_with_their_sign_turned_learn_nothing(monkeypatch, tmp_path):
    """Every "learns the way" fails. So does the control with units that are shuffled on one side only, and the reduction of IFT to SFT."""
    only(monkeypatch, ["4x4"])
    for name in LOSSES:
        right = getattr(frozen_lake, name)
        monkeypatch.setattr(frozen_lake, name, lambda *a, right=right, **k: (-right(*a, **k)[0], {}))
    monkeypatch.setattr(frozen_lake, "sft_loss", lambda logps, mask: (logps.mean() * 0.9, {}))
    monkeypatch.setattr(frozen_lake, "shuffled_units", lambda nets, generator: nets | {"head": nets["head"].flip(1)})
    report = Report(few_seeds(tmp_path, steps=40))
    with np.errstate(all="ignore"):
        frozen_lake.imitate_one(report, frozen_lake.settings(40)[0], report.cfg, further=True)
    assert missed(report) == {f"{name} learns the way" for name in ("SFT", "IFT", "ORPO", "IRFT", "RFT", "GRPO", "PPO")} | {
        "IFT with λ = γ = 0 is SFT", "control: θ* with its units shuffled"}


@pytest.mark.slow
def test_the_verdicts_of_the_plain_lake_with_labels_exchanged(monkeypatch, tmp_path):
    """The claims on success and mixing are of differences: with the two policies exchanged, or one of them ruined, they turn."""
    setting, cfg = frozen_lake.settings(300)[0], few_seeds(tmp_path)
    nets = frozen_lake.compare(setting, cfg, further=True)
    table, report = frozen_lake.measure(setting, nets), Report(cfg)
    frozen_lake.judge_first(report, setting, nets, table)
    assert not missed(report) and worded(report)["4x4: DPO plays better than SFT"] == "does not hold"
    ruined = {**table, "SFT": table["DPO"], "DPO": table["SFT"], "IFT, λ = 0": table["DPO"]}
    report = Report(cfg)
    frozen_lake.judge_first(report, setting, nets, ruined)
    assert missed(report) == {"SFT learns the way"}
    assert worded(report) == {"4x4: DPO plays better than SFT": "holds", "4x4: IFT plays better than SFT": "holds",
                              "4x4: mixing (λ = .2) brings the parameters nearer than λ = 0": "holds"}


WRONG = {
    "the discount lost": ("q_of", lambda lake, rewards, V, gamma: lake.P @ (rewards + V)),
    "the reward lost": ("q_of", lambda lake, rewards, V, gamma: lake.P @ (gamma * V)),
    "moves turned": ("q_of", lambda lake, rewards, V, gamma: (lake.P @ (rewards + gamma * V))[:, ::-1]),
    "no pull": ("soft_backup", lambda lake, r, V, gamma, beta, bonus=0.0: (V, np.full(lake.P.shape[:2], 0.25))),
    "the bonus lost": ("soft_value_iteration",
                       lambda lake, r, gamma, beta, entropy=False: frozen_lake.soft_policy_iteration(lake, r, gamma, beta)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_planning_misses_a_reference(monkeypatch, tmp_path, name):
    report = Report(few_seeds(tmp_path))
    frozen_lake.references(report)
    assert not missed(report)
    monkeypatch.setattr(frozen_lake, *WRONG[name])
    report = Report(few_seeds(tmp_path))
    with contextlib.suppress(FloatingPointError):  # without a discount an entropy bonus grows for ever
        frozen_lake.references(report)
    assert missed(report)


def test_inverse_rl_of_shuffled_visits_and_of_a_broken_loss_misses(monkeypatch, tmp_path):
    """Visits that belong to other states are no demonstrations of this expert; a loss that forgets the own games has no optimum there."""
    lake = Lake(FOUR)
    _, expert = frozen_lake.soft_value_iteration(lake, lake.goal, 0.95, 0.1)
    arrivals, _ = frozen_lake.visits(lake, expert, 0.95)
    _, right = frozen_lake.learn_reward(lake, arrivals, 0.95, 0.1)
    assert frozen_lake.distance(lake, expert, right, 0.95) < 1e-5
    shuffled = np.zeros(16)
    shuffled[lake.live] = arrivals[lake.live][::-1]
    _, other = frozen_lake.learn_reward(lake, shuffled, 0.95, 0.1, ridge=1e-3)
    assert frozen_lake.distance(lake, expert, other, 0.95) > 0.05
    monkeypatch.setattr(frozen_lake, "reward_alignment_loss", lambda demo, own, *, beta: (-demo.mean() / beta, {}))
    _, broken = frozen_lake.learn_reward(lake, arrivals, 0.95, 0.1, ridge=1e-3)
    assert frozen_lake.distance(lake, expert, broken, 0.95) > 0.01


@pytest.mark.slow
def test_inverse_rl_verdicts_with_experts_exchanged(monkeypatch, tmp_path):
    """Ten seeds: what is claimed of few demonstrations. With the demonstrations of a policy that plays at random, nothing is gained."""
    cfg = replace(few_seeds(tmp_path), seeds=10)
    report = Report(cfg)
    frozen_lake.inverse(report, cfg)
    words = worded(report)
    assert not missed(report)
    for n in ("1 demonstration", "5 demonstrations", "20 demonstrations"):
        assert words[f"4x4, {n}: inverse RL, visits, is nearer to the expert than SFT"] == "holds"
        assert words[f"4x4, slippery, {n}: inverse RL, visits, is nearer to the expert than SFT"] == "does not hold"
    play = Lake.episode
    monkeypatch.setattr(Lake, "episode", lambda self, policy, rng: play(self, np.roll(policy, 1, axis=1), rng))
    report = Report(cfg)
    frozen_lake.inverse(report, cfg)
    assert worded(report)["4x4, 20 demonstrations: inverse RL, visits, is nearer to the expert than SFT"] != "holds"


@pytest.mark.parametrize("changes", [{"seeds": 0}, {"steps": 0}, {"hidden": 1}])
def test_bad_arguments_are_one_sentence(changes, tmp_path):
    with pytest.raises(BadInput, match="--"):
        frozen_lake.main(Config(**changes, out=str(tmp_path / "figure.png")))


@pytest.mark.slow
def test_the_whole_toy(tmp_path, capsys):
    assert frozen_lake.main(Config(out=str(tmp_path / "lake.png")))
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("PASS") == 28 and (tmp_path / "lake.png").stat().st_size > 50_000
    assert "found by search: parameters' error of DPO < IFT < ORPO and SFT" in out and (tmp_path / "lake.json").exists()
