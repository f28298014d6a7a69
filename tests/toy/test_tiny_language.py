"""The enumerable language: its enumeration, each method at rest on its law and on no other, and (slow) five trained seeds."""

import numpy as np
import pytest
import torch

from minialign.engine.common import BadInput
from minialign.sample import sample
from tests.enumerable import LANGUAGE, tiny_gpt
from toy import closed_form
from toy.tiny_language import ROWS, Config, Language, TabularPolicy, gradient_at, kl_to, main, tilted

REF = LANGUAGE.law_of(tiny_gpt()).numpy()


def test_there_are_1555_completions_and_their_rewards_are_as_said():
    """Prompt 0 likes token 0 and dislikes 3: 0 0 3 EOS has 2·.5 − .5 − .4 (0 0) + .3; cut off at four tokens there is no .3."""
    language = Language()
    assert len(language.completions) == 1 + 6 + 36 + 216 + 1296 and language.completions[0] == (6,)
    assert language.rewards[0, language.index[(0, 0, 3, 6)]].item() == pytest.approx(0.4)
    assert language.rewards[0, language.index[(0, 0, 3, 1)]].item() == pytest.approx(0.1)
    assert language.rewards[1, language.index[(4, 4, 4, 1)]].item() == pytest.approx(-1.5 - 0.8 + 0.5)


def test_sampled_completions_are_all_in_the_language():
    answers = sample(tiny_gpt(), LANGUAGE.prompts, max_new=LANGUAGE.max_new, n=200, eos_id=LANGUAGE.eos_id, seed=0)
    prompts_ids = [x for x in LANGUAGE.prompts for _ in range(200)]
    scores = LANGUAGE.scores(prompts_ids, answers)
    for n in range(2):  # the mean of 200 within four standard errors of the exact one
        law, rewards = REF[n], LANGUAGE.rewards[n].numpy()
        exact = law @ rewards
        assert abs(scores[200 * n : 200 * (n + 1)].mean().item() - exact) < 4 * np.sqrt(law @ (rewards - exact) ** 2 / 200)


def test_a_tabular_policy_is_the_law_it_was_made_of():
    for law in REF:
        logps = TabularPolicy(LANGUAGE, law).token_logps().detach()
        assert torch.allclose(logps.sum(1).exp(), torch.tensor(law), atol=1e-14)
        assert torch.allclose(logps, LANGUAGE.conditionals(law), atol=1e-12)


def test_exact_values_by_hand():
    """Uniform law, reward 1 at the EOS of the completion (0, EOS): 1/85 at the root, 1/|those that begin with 0| after the 0."""
    uniform = np.full(85, 1 / 85)
    token_rewards = torch.zeros(85, 3, dtype=torch.float64)
    c = LANGUAGE.index[(0, 4)]
    token_rewards[c, 1] = 1.0
    values = LANGUAGE.exact_values(uniform, token_rewards)
    begins_with_0 = sum(y[0] == 0 for y in LANGUAGE.completions)
    assert values[c, 0].item() == pytest.approx(1 / 85) and values[c, 1].item() == pytest.approx(1 / begins_with_0)
    assert values[LANGUAGE.index[(0, 1, 4)], 2].item() == 0


LAWFUL = [row for row in ROWS if row.law]


@pytest.mark.parametrize("row", LAWFUL, ids=[row.name for row in LAWFUL])
@pytest.mark.parametrize("beta", [0.6, 1.3])
def test_each_method_rests_on_its_law(row, beta):
    """The expected update over all completions is 0 there, and not on a neighbour of it, nor with another beta."""
    law = row.law(LANGUAGE, REF, beta)
    assert law.sum(1) == pytest.approx(np.ones(2), abs=1e-12) and (law.min() > 0 or row.forward)
    assert gradient_at(row, LANGUAGE, REF, law, beta) < 1e-12
    neighbour = np.stack([closed_form.normalise(p * np.exp(0.05 * np.sin(np.arange(85)))) for p in law])
    assert gradient_at(row, LANGUAGE, REF, neighbour, beta) > 1e-5
    if row.method not in ("best_of_n", "rest", "orpo", "slic"):  # they know no beta
        assert gradient_at(row, LANGUAGE, REF, row.law(LANGUAGE, REF, 1.1 * beta), beta) > 1e-5


def test_who_rests_on_the_tilt():
    """π* is the law of those with the KL in the reward, of inverse RL that is shown it, of DPO and of GPO with Savage's loss; of no row of
    GRPO, nor of selection, IFT, RFT by Bradley-Terry and DPO's other siblings."""
    names = {row.name for row in ROWS if row.law is tilted and row.method not in ("reinforce", "rloo", "ppo", "rebel", "irl")}
    assert names == {"RFT, linear, demonstrations of π*", "DPO", "DPO, online", "GPO, savage"}
    best = tilted(LANGUAGE, REF, 0.6)
    at_rest = {row.name: gradient_at(row, LANGUAGE, REF, best, 0.6) for row in ROWS}
    for row in ROWS:
        assert (at_rest[row.name] > 1e-4) == (row.law is not tilted), at_rest


def test_the_group_size_is_part_of_grpos_law():
    """With the sample in its own mean the pull is β·G/(G − 1): the law of plain β does not rest at G = 4."""
    row = next(row for row in ROWS if row.name.endswith("G = 4"))
    plain = np.stack([
        closed_form.token_k3_law(LANGUAGE.completions, REF[n], r, np.full(85, 0.6)) for n, r in enumerate(LANGUAGE.rewards.numpy())
    ])
    assert gradient_at(row, LANGUAGE, REF, plain, 0.6) > 1e-3


def test_kl_is_zero_only_to_itself():
    policy = tiny_gpt()
    assert abs(kl_to(LANGUAGE, policy, REF)) < 1e-14 and kl_to(LANGUAGE, policy, tilted(LANGUAGE, REF, 0.6)) > 0.01


def test_a_short_run_prints_and_draws_and_an_untrained_policy_fails(tmp_path, capsys):
    """Twenty updates are not enough for any gate: FAIL is printed, main returns False, the figure is written all the same."""
    assert main(Config(methods=["rloo"], steps=20, samples=4, out=str(tmp_path / "figure.png"))) is False
    out = capsys.readouterr().out
    assert "FAIL  RLOO" in out and "0 of 1 rows on their law" in out and (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("changes", [{"methods": ["dqn"]}, {"beta": 0.0}, {"lr": -1.0}, {"seeds": 0}, {"samples": 6}, {"steps": 15}])
def test_bad_arguments_are_one_sentence(changes, tmp_path):
    with pytest.raises(BadInput, match="--"):
        main(Config(**changes, out=str(tmp_path / "figure.png")))


@pytest.mark.parametrize(("methods", "seeds"), [  # five seeds: docs/RESULTS.md
    *[pytest.param(methods, 1, marks=pytest.mark.slow) for methods in (
        ["reinforce", "rloo", "rebel", "grpo"], ["ppo", "best_of_n", "rest", "ift"], ["rft", "irl"], ["dpo", "ipo", "simpo"],
        ["orpo", "slic", "kto"])],
    *[pytest.param(methods, 2, marks=pytest.mark.long) for methods in (
        ["reinforce", "rloo", "rebel", "grpo"], ["ppo", "best_of_n", "rest", "ift"], ["dpo", "ipo", "simpo"])],
    pytest.param(["gpo"], 1, marks=pytest.mark.long),  # six functions
])
def test_seeds_of_every_method_land_on_their_law(methods, seeds, tmp_path, capsys):
    """The acceptance of every method: each seed, and each is another ref, within the gate of its row."""
    assert {*methods} <= {row.method for row in ROWS}
    passed = main(Config(methods=methods, seeds=seeds, full=True, out=str(tmp_path / "figure.png")))
    print(capsys.readouterr().out)
    assert passed


def test_the_methods_without_a_law_are_nowhere_at_rest_that_has_a_name():
    """Hinge, truncated quadratic, ORPO and KTO: not at ref, not at π*, not at the laws of their siblings."""
    rows = [row for row in ROWS if not row.law]
    assert {row.name for row in rows} == {"GPO, truncated quadratic", "GPO, hinge", "ORPO, λ = ¼", "KTO"}
    for row in rows:
        for law in (REF, *(other.law(LANGUAGE, REF, 0.6) for other in LAWFUL if other.method in ("dpo", "ipo", "gpo", "orpo", "simpo"))):
            assert gradient_at(row, LANGUAGE, REF, law, 0.6) > 1e-5


ADVANTAGES = [row for row in ROWS if row.law is tilted and row.method not in ("dpo", "gpo")]  # (a pair's update has no advantages)


@pytest.mark.parametrize("row", ADVANTAGES, ids=lambda row: row.name)
def test_the_expected_update_at_ref_is_the_gradient_of_the_objective(row):
    """At π* the advantages vanish and so would a wrong sign. Away from it the expected update must point along ∇J, J by enumeration:
    E_π[r] − β·KL(π‖ref), or, of those that see only demonstrations of π*, their likelihood (Lemma 3.1 of the RFT paper)."""
    law, other = REF[1], LANGUAGE.law_of(tiny_gpt(seed=3)).numpy()[1]  # the policy, and another reference
    policy, ref_logps, rewards = TabularPolicy(LANGUAGE, law), LANGUAGE.conditionals(other), LANGUAGE.rewards[1]
    loss = row.expected(policy.token_logps(), ref_logps, rewards, torch.tensor(law), LANGUAGE, 0.6)
    (update,) = torch.autograd.grad(-loss, policy.logits)
    logps = policy.token_logps().sum(1)
    objective = (logps.exp() * (rewards - 0.6 * (logps - ref_logps.sum(1)))).sum()
    if row.method in ("rft", "irl"):
        objective = (torch.tensor(closed_form.tilt(other, rewards.numpy(), 0.6)) * logps).sum()
    (gradient,) = torch.autograd.grad(objective, policy.logits)
    cosine = (update * gradient).sum() / update.norm() / gradient.norm()
    assert cosine.item() == pytest.approx(1, abs=1e-10)
