"""The exact judge by enumeration, what the methods are given, and the gate of the toy over its ten seeds."""

import pytest
import torch

from minialign.engine.common import BadInput
from toy import closed_form, few_demos
from toy.tiny_language import Language, tiny_gpt


@pytest.fixture(scope="module")
def judged():
    """A language of 85 completions, a base model, its expert and the judge."""
    language = Language(n_content=4, max_new=3, n_prompts=2)
    base = tiny_gpt(language.vocab_size).requires_grad_(False)
    law = language.law_of(base)
    expert = torch.stack([torch.tensor(closed_form.tilt(p, r, 0.5)) for p, r in zip(law.numpy(), language.rewards.numpy(), strict=True)])
    return language, base, law, expert, few_demos.Judge(language, base, expert)


def test_the_judge_against_a_loop_over_all_pairs(judged):
    language, base, law, expert, judge = judged
    policy = tiny_gpt(language.vocab_size, seed=3)
    logps = language.token_logps(policy).detach().sum(-1)
    gaps, accuracies = [], []
    for n, rewards in enumerate(language.rewards):
        mass = gap = won = 0.0
        for a, better in enumerate(rewards.tolist()):
            for b, worse in enumerate(rewards.tolist()):
                if better > worse:
                    weight = float(law[n, a] * law[n, b])
                    margin = float(logps[n, a] - logps[n, b])
                    own = margin - float(law[n, a].log() - law[n, b].log())
                    mass, gap, won = mass + weight, gap + weight * margin, won + weight * (own > 0)
        gaps.append(gap / mass)
        accuracies.append(won / mass)
    numbers = judge(logps)
    assert numbers["gap"] == pytest.approx(sum(gaps) / 2, rel=1e-9) and numbers["implicit"] == pytest.approx(sum(accuracies) / 2, abs=1e-6)
    assert numbers["E[r]"] == pytest.approx(float((logps.exp() * language.rewards).sum(1).mean()), rel=1e-9)
    assert numbers["KL(E‖π)"] == pytest.approx(float((expert * (expert.log() - logps)).sum(1).mean()), rel=1e-9)
    assert judge(law.log())["implicit"] == pytest.approx(0.5, abs=1e-6)
    own = judge(expert.log())
    assert own["gap"] > judge(law.log())["gap"] and own["implicit"] == pytest.approx(1, abs=1e-6)
    assert own["KL(E‖π)"] == pytest.approx(0, abs=1e-12)


def test_base_is_the_tilt_it_should_be():
    language = Language(n_content=4, max_new=3, n_prompts=2)
    ref = language.law_of(tiny_gpt(language.vocab_size, dtype=torch.float32, mixing=0.3)).numpy()
    base = language.law_of(few_demos.base_model(language, 2.0, 0)).numpy()
    for n, rewards in enumerate(language.rewards.numpy()):
        target = closed_form.tilt(ref[n], -2.0 * rewards, 1.0)
        assert closed_form.kl(target, base[n]) < 0.05 < closed_form.kl(target, ref[n])


def test_demonstrations_are_contaminated_as_said(judged):
    """Of 4000 demonstrations a share of .3 comes from base: the mean reward is that of the mixture, to four standard errors."""
    language, _, law, expert, _ = judged
    cfg = few_demos.Config(demos=4000)
    rows = few_demos.demonstrations(language, law, expert, cfg, seed=0)
    rewards = torch.tensor([language.rewards[x[0], language.index[tuple(y)]] for x, y in rows])
    mixture = ((0.7 * expert + 0.3 * law) * language.rewards).sum(1).mean()
    assert abs(rewards.mean() - mixture) < 4 * rewards.std() / 4000**0.5
    assert [x for x, _ in rows[:4]] == [*language.prompts, *language.prompts]


def test_bad_arguments(tmp_path):
    for settings in (dict(contamination=1.5), dict(beta=0.0), dict(seeds=0)):
        with pytest.raises(BadInput):
            few_demos.main(few_demos.Config(**settings, out=str(tmp_path / "f.png")))


@pytest.mark.long
def test_ten_seeds(tmp_path, capsys):
    """The gate of the setting: SPIN's gap above 0 and above SFT's, its reward above SFT's, its distance to the expert larger, in 9 of 10
    seeds; SFT's gap below 0 in 8."""
    assert few_demos.main(few_demos.Config(full=True, out=str(tmp_path / "few.png")))
    out = capsys.readouterr().out
    assert out.count("PASS") == 5 and out.count("not gated") == 4 and (tmp_path / "few.png").stat().st_size > 10_000
