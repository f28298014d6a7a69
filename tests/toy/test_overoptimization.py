"""Gold and features by hand, the fits against second implementations; each gate and verdict turns when what it rests on is broken."""

import copy
import math

import numpy as np
import pytest
import torch

from minialign.engine.common import BadInput
from toy import closed_form, overoptimization, tiny_language
from toy.overoptimization import GOLD, METHODS, PROXY, Config, D, Setting
from toy.report import Report

CFG = Config(seeds=2, neural_seeds=1, neural_steps=3, members=3)


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.fixture(scope="module")
def runs(setting):
    return [overoptimization.linear_run(setting, CFG, seed) for seed in range(2)]


def judged(tmp_path, runs, rloo=()):
    """({gate: passed}, {claim: verdict}) of judge."""
    report = Report(Config(out=str(tmp_path / "f.png")))
    overoptimization.judge(report, CFG, runs, rloo)
    return {check["name"]: check["passed"] for check in report.checks}, {claim["claim"]: claim["verdict"] for claim in report.claims}


# ------------------------------------------------------------------------------------------------------------------ parts


def test_gold_by_hand(setting):
    """Prompt 0 likes 0 and dislikes 3. 0 0 0 EOS has two repeats: 3·.5 − .7·4 + .3 = −1; 0 0 0 0 three: 4·.5 − .7·9 = −4.3."""
    language = setting.language
    for completion, expected in (((0, 0, 0, 6), -1.0), ((0, 0, 0, 0), -4.3), ((0, 3, 3, 6), 0.5 - 1 - 0.7 + 0.3), ((6,), 0.3)):
        assert language.rewards[0, language.index[completion]].item() == pytest.approx(expected)
    assert language.rewards[2, language.index[(2, 5, 2, 6)]].item() == pytest.approx(0.5 - 0.5 + 0.5 + 0.3)


def test_one_set_of_features_can_be_gold_and_the_other_cannot(setting):
    """Gold = .5·(as the prompt) − .5·(three further) + .3·EOS − .7·repeats². 0 0 1 and 0 1 0 are the same to who only counts."""
    weights = torch.tensor([0.5, 0, 0, -0.5, 0, 0, 0.3, -0.7], dtype=torch.float64)
    assert torch.allclose(setting.seeing @ weights, setting.language.rewards)
    same = [setting.language.index[y] for y in ((0, 0, 1, 6), (0, 1, 0, 6))]
    assert torch.equal(setting.blind[0, same[0]], setting.blind[0, same[1]]) and setting.gold[0, same[1]] - setting.gold[0, same[0]] > 0.6
    assert setting.blind[1, setting.language.index[(1, 2, 0, 6)]].tolist() == [1, 1, 0, 0, 0, 1, 1]  # counted from token 1: 1, 2, then 0


def test_comparisons_are_labelled_by_bradley_terry_on_gold(setting):
    """Over 6000 pairs the chosen one's mean lead is Σ |gap|·(2σ(|gap|) − 1), to four standard errors; all are drawn from ref."""
    prompt, chosen, rejected = setting.compare(6000, 0).T.numpy()
    lead = setting.gold[prompt, chosen] - setting.gold[prompt, rejected]
    expected = np.abs(lead) * np.tanh(np.abs(lead) / 2)
    assert abs(lead.mean() - expected.mean()) < 4 * (lead - expected).std() / math.sqrt(6000) < expected.mean() / 4
    both = np.concatenate([setting.gold[prompt, chosen], setting.gold[prompt, rejected]])
    assert abs(both.mean() - (setting.ref * setting.gold).sum(1).mean()) < 4 * both.std() / math.sqrt(12000)
    assert len(setting.compare(100, 0)) == 100 and np.bincount(prompt).tolist() == [2000] * 3


def test_the_fit_is_the_ridge_optimum_of_newtons_method(setting):
    compared = setting.compare(500, 1)
    prompt, chosen, rejected = compared.T
    gap = (setting.seeing[prompt, chosen] - setting.seeing[prompt, rejected]).numpy()
    weights = np.zeros(8)
    for _ in range(30):  # Σ log(1 + e^{−gap·w}) + ½·ridge·|w|²
        wrong = 1 / (1 + np.exp(gap @ weights))
        hessian = gap.T @ (gap * (wrong * (1 - wrong))[:, None]) + 2.0 * np.eye(8)
        weights -= np.linalg.solve(hessian, -gap.T @ wrong + 2.0 * weights)
    model = overoptimization.fit(setting.seeing, compared, 2.0)
    assert model.weight[0].detach().numpy() == pytest.approx(weights, abs=1e-7) and np.abs(weights).max() > 0.1


def test_a_point_by_loops(setting):
    laws = overoptimization.tilted(setting.ref, setting.gold, 0.7)
    divergence = gold = 0.0
    for law, ref, rewards in zip(laws, setting.ref, setting.gold, strict=True):
        for p, q, r in zip(law.tolist(), ref.tolist(), rewards.tolist(), strict=True):
            divergence, gold = divergence + p * math.log(p / q) / 3, gold + p * r / 3
    found = overoptimization.point(setting.ref, laws, setting.gold, setting.gold)
    assert found == pytest.approx((math.sqrt(divergence), gold, gold), rel=1e-9)


def test_the_same_divergence_and_the_same_proxy_are_found(setting, runs):
    for name, column in (("same KL", D), ("same proxy", PROXY)):
        for run in runs:
            assert run[name][:, column] == pytest.approx(run["blind"]["best-of-n"][1:, column], abs=1e-6)


def gaussian_curves():
    """Proxy x ~ N(0, 1) on a fine grid, gold a·x − b·x²: (curve of the tilt, a, b)."""
    x, a, b = np.linspace(-12, 12, 4801), 0.8, 0.3
    ref, gold = closed_form.normalise(np.exp(-(x**2) / 2))[None], (a * x - b * x**2)[None]
    laws = [overoptimization.tilted(ref, x[None], beta) for beta in (1e6, *1 / np.linspace(0.01, 4, 200))]
    return np.array([overoptimization.point(ref, law, x[None], gold) for law in laws]), a, b


def test_a_gaussian_proxy_makes_rls_curve_a_parabola():
    """e^{x/β} moves N(0, 1) by s = 1/β at KL = s²/2, so s = √2·d and E[gold] − gold(ref) = a·s − b·s² = d(√2·a − 2b·d)."""
    curve, a, b = gaussian_curves()
    (coefficients, r2), (_, other) = (overoptimization.gao(curve, form) for form in METHODS)
    assert coefficients == pytest.approx((math.sqrt(2) * a, 2 * b), rel=2e-3) and r2 > 0.99999 > 0.999 > other


def test_an_ensemble_of_scores_that_are_there():
    columns = [np.array([[1.0, 5.0], [2.0, 0.0]]), np.array([[3.0, 1.0], [2.0, -1.0]])]
    assert overoptimization.combine(columns, "mean").tolist() == [[2, 3], [2, -0.5]]
    assert overoptimization.combine(columns, "min").tolist() == [[1, 1], [2, -1]]


def test_neural_reward_models_learn_are_scored_row_by_row_and_their_weights_averaged(setting):
    nets = overoptimization.Nets(setting.language, setting.policy, Config(neural_steps=40))
    compared, start = setting.compare(600, 0), nets.start(0)
    trained = nets.train(start, compared, 0)
    found = nets.scores(trained)
    prompt, chosen, rejected = compared.T.numpy()
    leads = [scored[prompt, chosen] - scored[prompt, rejected] for scored in (nets.scores(start), found)]
    before, after = (np.logaddexp(0, -lead).mean() for lead in leads)
    assert after < min(before, math.log(2)) - 0.01
    for n, y in ((0, (0, 3, 6)), (2, (1, 1, 2, 5))):
        alone = trained(torch.tensor([[*setting.language.prompts[n], *y]]))[0, -1].item()
        assert found[n, setting.language.index[y]] == pytest.approx(alone, abs=1e-5)
    other = nets.scores(nets.train(start, compared, 1))
    average = nets.scores(overoptimization.weight_average([trained, nets.train(start, compared, 1)]))
    assert 1e-4 < np.abs(average - (found + other) / 2).max() < 0.2  # near the mean ensemble, and not it


def test_rloo_ends_on_the_tilt_and_not_without_its_pull(setting, runs, monkeypatch):
    language, ref, proxy = setting.language, setting.ref[:1], runs[0]["proxy"][:1]
    tilt = overoptimization.tilted(ref, proxy, 0.5)[0]
    assert closed_form.kl(overoptimization.rloo_laws(language, ref, proxy, 0.5, steps=150)[0], tilt) < 1e-4
    monkeypatch.setattr(overoptimization, "expected_rloo", lambda *args: tiny_language.expected_rloo(*args[:-1], args[-1] / 2))
    assert closed_form.kl(overoptimization.rloo_laws(language, ref, proxy, 0.5, steps=150)[0], tilt) > 0.05


# ----------------------------------------------------------------------------------------------------- gates and verdicts

FALLS = [f"{method}, blind proxy: gold rises, then falls by ≥ 1" for method in METHODS]
NONE = [f"{method}, proxy that sees repeats: no fall above .1" for method in METHODS]
BOUND, MOST = "KL(best of n‖ref) ≤ log n − (n − 1)/n", "the tilt has more proxy for the KL of any best-of-n"
SLOPE, WARM = "slope of RL's curve at ref", "linear: averaged weights are the mean ensemble"


def test_all_gates_pass(tmp_path, runs):
    gates, _ = judged(tmp_path, runs, [(0.5, 1e-4, 0.1, 0.11)])
    assert list(gates) == [FALLS[0], NONE[0], FALLS[1], NONE[1], BOUND, MOST, SLOPE, WARM, "RLOO at β = 0.5 ends on the tilt"]
    assert all(gates.values())


def missed(tmp_path, runs, rloo=()):
    return {name for name, passed in judged(tmp_path, runs, rloo)[0].items() if not passed}


def test_the_gates_of_the_fall_are_about_what_the_proxy_sees(tmp_path, runs, setting):
    """Proxy and control exchanged: all four fail. Every label turned round: the proxy is against gold, which then does not rise."""
    assert missed(tmp_path, [{**run, "blind": run["control"], "control": run["blind"]} for run in runs]) >= {*FALLS, *NONE}
    compared = setting.compare(1000, 0)[:, [0, 2, 1]]
    proxy = overoptimization.scores(overoptimization.fit(setting.blind, compared, 1.0), setting.blind)
    assert missed(tmp_path, [{**runs[0], "blind": setting.curves(proxy, CFG)}]) >= {*FALLS}


def test_a_wrong_law_of_best_of_n_is_too_expensive(tmp_path, runs, setting, monkeypatch):
    """Twice n draws cost more than n may."""
    law = closed_form.best_of_n_law
    monkeypatch.setattr(closed_form, "best_of_n_law", lambda ref, reward, n: law(ref, reward, 2 * n))
    assert BOUND in missed(tmp_path, [{**runs[0], "blind": setting.curves(runs[0]["proxy"], CFG)}])


def test_a_tilt_by_shuffled_rewards_has_less_proxy_and_another_slope(tmp_path, runs, setting, monkeypatch):
    tilt, shuffled = closed_form.tilt, np.random.default_rng(0).permutation(1555)
    monkeypatch.setattr(closed_form, "tilt", lambda ref, reward, beta: tilt(ref, np.asarray(reward)[shuffled], beta))
    assert missed(tmp_path, [overoptimization.linear_run(setting, CFG, 0)]) >= {MOST, SLOPE}


def test_one_member_is_no_average(tmp_path, setting, monkeypatch):
    monkeypatch.setattr(overoptimization, "weight_average", lambda models: models[0])
    assert WARM in missed(tmp_path, [overoptimization.linear_run(setting, CFG, 0)])


@pytest.mark.parametrize("end", [(0.5, 0.02, 0.1, 0.1), (0.5, 1e-4, 0.1, 0.13), (0.5, math.nan, 0.1, 0.1)])
def test_rloo_elsewhere_misses_its_gate(tmp_path, runs, end):
    assert missed(tmp_path, runs, [end]) == {"RLOO at β = 0.5 ends on the tilt"}


def of_form(form, d):
    return np.stack([d, d, overoptimization.FORMS[form](d) @ (1.0, 0.5)], 1)


def test_the_verdicts_on_gaos_forms_turn_with_the_curves(tmp_path, runs):
    """Each method with a curve of its own form, then of the other's; nearly, since two equal curves would have no spread."""
    d = np.linspace(1e-9, 3, 200)
    for shift, expected in ((0, "holds"), (1, "does not hold")):
        shown = [{**run, "fine": {method: of_form(METHODS[(i + shift) % 2], d * (1 + 0.01 * k)) for i, method in enumerate(METHODS)}}
                 for k, run in enumerate(runs)]
        _, claims = judged(tmp_path, shown)
        for method, other in zip(METHODS, METHODS[::-1], strict=True):
            assert claims[f"the gold of {method} has its own form rather than that of {other}"] == expected


def many(runs, change):
    """Ten runs made of the first by change(run, k), k differing a little: verdicts need a spread."""
    made = []
    for k in range(10):
        run = copy.deepcopy(runs[0])
        change(run, k)
        made.append(run)
    return made


def shifted(both, by):
    """The same curves, their end higher by so much."""
    both = copy.deepcopy(both)
    for curve in both.values():
        curve[-1, GOLD] += by
    return both


def test_the_verdicts_between_the_methods_turn_when_they_are_exchanged(tmp_path, runs):
    slower, more = "for the same KL, RL optimises the proxy less than best-of-n", "for the same KL, best-of-n has more gold than RL"
    alike = "for the same proxy, both have about the same gold"

    def as_is(run, k):
        run["same KL"] += 1e-4 * k

    def exchanged(run, k):
        best = run["blind"]["best-of-n"][1:]
        run["same KL"], best[:] = best + 1e-4 * k, run["same KL"].copy()
        run["same proxy"] = best + 0.01 * (1 + k / 10)

    first, second = judged(tmp_path, many(runs, as_is))[1], judged(tmp_path, many(runs, exchanged))[1]
    assert (first[slower], first[more], first[alike]) == ("does not hold", "holds", "does not hold")
    assert (second[slower], second[more], second[alike]) == ("holds", "does not hold", "holds")


def test_the_verdicts_on_ensembles_turn_with_what_is_left(tmp_path, runs):
    for name in ("mean", "min"):
        removes, smaller = f"the {name} of 3 blind proxies removes the fall", f"the {name} of 3 blind proxies makes the fall smaller"
        noise = f"seeing proxies of 100 comparisons: the {name} of 3 ends on more gold than a single one"

        def helped(run, k, name=name):
            run[name] = shifted(run["control"], 1e-3 * k)
            run["few"][name] = run["few"]["single"] + 0.1 + 1e-3 * k

        def harmed(run, k, name=name):
            run[name] = shifted(run["blind"], -0.2 - 1e-3 * k)
            run["few"][name] = run["few"]["single"] - 0.1 - 1e-3 * k

        claims = judged(tmp_path, many(runs, helped))[1]
        assert (claims[removes], claims[smaller], claims[noise]) == ("holds",) * 3
        claims = judged(tmp_path, many(runs, harmed))[1]
        assert (claims[removes], claims[smaller], claims[noise]) == ("does not hold",) * 3


def test_the_verdicts_on_nets_and_references_turn(tmp_path, runs, capsys):
    report = Report(Config(out=str(tmp_path / "f.png")))
    for better in (True, False):
        made = [{"single": shifted(runs[0]["blind"], 0.01 * k),
                 **{name: shifted(runs[0]["blind"], 1.0 if better else -1.0) for name in ("mean", "min", "WARM")}} for k in range(5)]
        overoptimization.judge_nets(report, made)
    overoptimization.judge_references(report, [runs[0]["blind"], runs[1]["blind"]])
    overoptimization.judge_references(report, [runs[0]["blind"], runs[0]["control"]])
    assert [claim["verdict"] for claim in report.claims] == [*["holds"] * 3, *["does not hold"] * 3, "holds", "does not hold"]
    assert not report.checks and "5/5 by RL (not gated)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------- whole


def test_a_small_run_prints_draws_and_fails_when_the_proxy_is_not_blind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overoptimization, "rloo_run", lambda *args: [])  # has its own test, and the slow one
    cfg = Config(seeds=1, neural_seeds=1, neural_steps=2, neural_members=2, members=2, out=str(tmp_path / "over.png"))
    assert overoptimization.main(cfg)
    out = capsys.readouterr().out
    assert out.count("PASS") == 8 and "FAIL" not in out and (tmp_path / "over.png").stat().st_size > 10_000
    seeing = overoptimization.features
    monkeypatch.setattr(overoptimization, "features", lambda language, sees: seeing(language, True))
    assert not overoptimization.main(Config(seeds=1, neural_seeds=0, members=2, largest_n=256, out=str(tmp_path / "over.png")))
    assert capsys.readouterr().out.count("FAIL") == 2


@pytest.mark.parametrize("settings", [dict(comparisons=0), dict(ridge=0.0), dict(seeds=0), dict(largest_n=2), dict(neural_seeds=-1)])
def test_bad_arguments(tmp_path, settings):
    with pytest.raises(BadInput):
        overoptimization.main(Config(**settings, out=str(tmp_path / "f.png")))


@pytest.mark.slow
def test_the_default_run(tmp_path, capsys):
    """All gates in ten of ten seeds, and the verdicts that do not depend on luck."""
    assert overoptimization.main(Config(out=str(tmp_path / "over.png")))
    out = capsys.readouterr().out
    assert out.count("PASS") == 10 and "10 of 10 checks passed" in out


@pytest.mark.slow
def test_a_sampled_gpt_ends_on_the_curve_too(setting):
    """RLOO as its main does it, 600 updates of the tiny GPT that wrote ref, rewarded by the proxy: within tiny_language's gate of the tilt,
    with the tilt's gold and d."""
    proxy = overoptimization.linear_run(setting, CFG, 0)["proxy"]
    language = copy.copy(setting.language)
    language.rewards = torch.tensor(proxy)  # what the policy is paid for; gold is not asked
    policy = copy.deepcopy(setting.policy).float().requires_grad_(True)
    ref = language.law_of(policy).numpy()
    law = overoptimization.tilted(ref, proxy, 0.5)
    row = next(row for row in tiny_language.ROWS if row.method == "rloo")
    tiny_language.train(row, policy, language, tiny_language.Config(beta=0.5, steps=600), 0, lambda policy: 0.0)
    assert tiny_language.kl_to(language, policy, law) < row.gate
    learned = overoptimization.point(ref, language.law_of(policy).numpy(), proxy, setting.gold)
    expected = overoptimization.point(ref, law, proxy, setting.gold)
    assert learned[D] == pytest.approx(expected[D], abs=0.03) and learned[GOLD] == pytest.approx(expected[GOLD], abs=0.03)
