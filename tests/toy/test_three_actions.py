import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minialign.engine.common import BadInput
from toy import closed_form, three_actions


def test_every_row_meets_its_law(tmp_path, capsys):
    assert three_actions.main(three_actions.Config(out=str(tmp_path / "figure.png")))
    out = capsys.readouterr().out
    assert "FAIL" not in out and out.count("PASS") >= 44
    assert (tmp_path / "figure.png").stat().st_size > 20_000


@pytest.mark.parametrize("settings", [pytest.param(settings, marks=pytest.mark.slow if "expert" not in settings else pytest.mark.long)
                                      for settings in three_actions.OTHERS])  # with an expert: 20 and 30 s
def test_other_settings(settings, tmp_path):
    assert three_actions.main(three_actions.Config(**settings, out=str(tmp_path / "figure.png")))


@pytest.mark.long
def test_ten_seeds_of_what_is_sampled(record_property):
    """IRFT on sampled batches, within .02 in total variation of its law; Algorithm 1 of one demonstration, to rounding."""
    expert, ref = (torch.tensor(p, dtype=torch.float64) for p in ([0.1, 0.2, 0.7], [0.5, 0.3, 0.2]))
    for seed in range(10):
        learned = three_actions.sampled_irft(expert, ref, beta=2.0, seed=seed).numpy()
        law = closed_form.geometric_mixture(expert.numpy(), ref.numpy(), 2.0)
        assert abs(learned - law).sum() / 2 <= 0.02, (seed, learned, law)
        learned = three_actions.algorithm_1(torch.full((3,), 1 / 3, dtype=torch.float64), 2, beta=2.0, R=3.0, seed=seed).numpy()
        assert abs(learned - closed_form.table_1(1.5)).max() <= 1e-12, (seed, learned)
    record_property("tried", 20)


def failures(monkeypatch, wrong, loss="irft_loss"):
    monkeypatch.setattr(three_actions, loss, wrong)
    families = {"irft_loss": three_actions.irft_checks, "irl_loss": three_actions.irl_checks,
                "reward_alignment_loss": three_actions.explicit_checks, "policy_loss": three_actions.online_checks}
    family = families.get(loss, three_actions.preference_checks)
    return (check.name for check in family(three_actions.Config(rounds=2)) if not check.passed)  # as they come


WRONG = {
    "no reference": lambda d, s, rd, rs, *, beta, h="logistic": three_actions_loss(beta * (d - s), h),
    "beta lost": lambda d, s, rd, rs, *, beta, h="logistic": three_actions_loss((d - rd) - (s - rs), h),
    "sign flipped": lambda d, s, rd, rs, *, beta, h="logistic": three_actions_loss(-beta * ((d - rd) - (s - rs)), h),
    "reference of the sample lost": lambda d, s, rd, rs, *, beta, h="logistic": three_actions_loss(beta * ((d - rd) - s), h),
    "own answer detached": lambda d, s, rd, rs, *, beta, h="logistic": three_actions_loss(beta * ((d - rd) - (s.detach() - rs)), h),
    "log log, as printed": lambda d, s, rd, rs, *, beta, h="logistic": (F.softplus(-beta * ((d - rd) - (s - rs))).log().mean(), {}),
}


def three_actions_loss(z, h):
    return (F.softplus(-z).mean() if h == "logistic" else (-z).mean()), {}


def test_the_replacement_itself_is_harmless(monkeypatch):
    right = lambda d, s, rd, rs, *, beta, h="logistic": three_actions_loss(beta * ((d - rd) - (s - rs)), h)  # noqa: E731
    assert list(failures(monkeypatch, right)) == []


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variants_miss_a_law(monkeypatch, name):
    """The check has teeth: each wrong loss, put in the place of the right one, fails at least one row."""
    assert next(failures(monkeypatch, WRONG[name]), None)


def alignment(d, s, *, beta, loss="linear", ridge=0.0, at=lambda margin, beta: -margin / beta, second=1):
    value = at(d - s, beta) if loss == "linear" else F.softplus(-(d - s))
    return (value + ridge * (d**2 + second * s**2)).mean(), {}


@pytest.mark.parametrize(("loss", "wrong", "caught_by"), [
    ("reward_alignment_loss", lambda *a, **k: alignment(*a, at=lambda margin, beta: -margin, **k), "ridge"),  # 1/β lost
    ("reward_alignment_loss", lambda *a, **k: alignment(*a, second=0, **k), "ridge"),
    ("reward_alignment_loss", lambda *a, **k: alignment(*a, at=lambda margin, beta: margin / beta, **k), "ML-IRL"),
    ("irl_loss", lambda d, s, bd, bs: (F.softplus(-(d - s)).mean(), {}), "accumulated"),  # the rounds before forgotten
    ("irl_loss", lambda d, s, bd, bs: (F.softplus(d - bd - s + bs).mean(), {}), "literal"),
])
def test_wrong_reward_losses_miss_a_law(monkeypatch, loss, wrong, caught_by):
    assert any(caught_by in name for name in failures(monkeypatch, wrong, loss))


def test_the_right_reward_losses_in_other_words_miss_none(monkeypatch):
    assert list(failures(monkeypatch, alignment, "reward_alignment_loss")) == []


@pytest.mark.parametrize(("loss", "wrong", "caught_by"), [
    ("dpo_loss", lambda w, l, rw, rl, *, beta: (F.softplus(-(w - l - rw + rl)).mean(), {}), "DPO"),  # β lost
    ("dpo_loss", lambda w, l, rw, rl, *, beta: (F.softplus(-beta * (w - l)).mean(), {}), "DPO"),  # ref lost
    ("ipo_loss", lambda w, l, rw, rl, *, beta: ((w - l - rw + rl - 1 / beta) ** 2, {}), "IPO"),  # the table's target
    ("gpo_loss", lambda w, l, rw, rl, *, beta, f: (F.softplus(-beta * (w - l - rw + rl)).mean(), {}), "GPO, exponential"),  # all f alike
    ("simpo_loss", lambda w, l, *, scale, target_margin: (F.softplus(-(w - l)).mean(), {}), "SimPO"),  # the scale lost
    ("orpo_loss", lambda w, l, *, weight: ((-w + weight * F.softplus(l - w)).mean(), {}), "ORPO, λ = ¼"),  # log-probs for odds
    ("slic_loss", lambda w, l, t, *, delta, weight: ((F.relu(delta - w + l) - weight * l).mean(), {}), "SLiC"),  # NLL of the loser
    ("kto_loss", lambda y, r, good, kl, *, beta, desirable_weight, value: (
        (desirable_weight * good + ~good) * (1 - (beta * (y - r) * (2 * good.double() - 1)).sigmoid()).mean(), {}), "KTO, β = "),  # z₀ lost
    ("kto_loss", lambda y, r, good, kl, *, beta, desirable_weight, value: (
        (desirable_weight * good + ~good) * F.softplus(-beta * (y - r - kl) * (2 * good.double() - 1)).mean(), {}), "KTO, prospect"),
    ("policy_loss", lambda y, old, A, mask, *, eps, penalty: ((y - old).exp().mul(penalty * (y - old) - A).mean(), {}), "from ref"),
    ("policy_loss", lambda y, old, A, mask, *, eps, penalty: ((y - old).exp().mul(A).mean(), {}), "PPO-ptx"),  # the sign
])
def test_wrong_preference_losses_miss_a_law(monkeypatch, loss, wrong, caught_by):
    assert any(caught_by in name for name in failures(monkeypatch, wrong, loss))


def test_rft_without_the_bound_misses(monkeypatch):
    """The regulariser of Table 1 is the bound on the reward: without it Algorithm 1 goes on to the demonstration."""
    unbounded = three_actions.algorithm_1(three_actions.torch.full((3,), 1 / 3).double(), 2, beta=2.0, R=1e6, rounds=20)
    assert unbounded[2] > 0.999


@pytest.mark.slow
def test_a_missed_law_ends_with_code_1(tmp_path):
    program = (
        "import sys, toy.three_actions as t; t.closed_form.table_1 = lambda x: [2 / (2 + 2.7), 2 / (2 + 2.7), 2.7 / 4.7];"
        "t.checks = t.explicit_checks;"
        f"sys.argv = ['three_actions']; cfg = t.Config(out={str(tmp_path / 'f.png')!r}); sys.exit(0 if t.main(cfg) else 1)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert result.returncode == 1 and "FAIL  ML-IRL, Table 1" in result.stdout


@pytest.mark.parametrize("settings", [dict(expert=[0.5, 0.5]), dict(ref=[0.0, 0.5, 0.5]), dict(beta=0.0), dict(resampling="often")])
def test_bad_arguments(settings, tmp_path):
    with pytest.raises(BadInput):
        three_actions.main(three_actions.Config(**settings, out=str(tmp_path / "f.png")))
