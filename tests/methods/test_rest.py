"""ReST. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import numpy as np
import pytest
import torch

from minialign.engine.common import BadInput, read_rows
from minialign.methods import rest
from tests.enumerable import padded, random_rows
from toy import closed_form


@pytest.fixture
def m():
    return rest


def test_keep_by_hand(m):
    """.2 .5 .9 .7, mean .575: the last two. Strictly above; and of nothing above, the largest."""
    rewards = torch.tensor([0.2, 0.5, 0.9, 0.7])
    assert m.keep(rewards, rewards.mean()).tolist() == [False, False, True, True]
    assert m.keep(rewards, 0.7).tolist() == [False, False, True, False]
    assert m.keep(rewards, 0.9).tolist() == [False, False, True, False]
    assert m.keep(torch.tensor([1.0, 0.0, 1.0]), torch.tensor(1.0)).tolist() == [True, False, True]
    assert m.keep(torch.zeros(3), 0.0).all()


def test_the_law():
    """π restricted to r > τ: .3 and .2 of .5 .3 .2 become .6 and .4; KL = −log .5, the acceptance rate."""
    ref = np.array([0.5, 0.3, 0.2])
    law = closed_form.rest_law(ref, [0.0, 1.0, 2.0], 0.0)
    assert law.tolist() == pytest.approx([0, 0.6, 0.4]) and closed_form.kl(law, ref) == pytest.approx(np.log(2))


def test_maximum_likelihood_on_what_was_kept_is_the_law(m):
    """Σ_y π(y)·1[r > τ]·loss(y) over tabular logits rests at the law: softmax gradient law − π = 0 there, and not elsewhere."""
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    kept = m.keep(torch.tensor([0.0, 1.0, 2.0, 1.0]), 0.5)
    law = torch.tensor(closed_form.rest_law(ref.numpy(), [0.0, 1.0, 2.0, 1.0], 0.5))
    for policy, rests in ((law + 1e-300, True), (ref, False)):
        logits = policy.log().requires_grad_()
        logps = logits.log_softmax(0)[:, None]
        share = (ref * kept / (ref * kept).sum())[:, None]
        loss, _ = m.rest_loss(torch.where(share > 0, logps, 0) * share * 4, torch.ones(4, 1))
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad.abs().max() < 1e-12) == rests


def test_the_loss_by_hand_and_its_padding(m):
    logps = torch.tensor([[-1.0, -2.0], [-0.5, 99.0]], dtype=torch.float64)
    loss, stats = m.rest_loss(logps, torch.tensor([[1, 1], [1, 0]]))
    assert loss.item() == pytest.approx(1.75) and stats["nll"].item() == pytest.approx(3.5 / 3)
    logps, _, _, mask = random_rows()
    assert torch.allclose(m.rest_loss(*padded(logps, mask))[0], m.rest_loss(logps, mask)[0], atol=1e-14)


def test_a_run_grows_once_and_improves_with_rising_thresholds(small, monkeypatch):
    """Two Grow steps of three Improve steps in 12 steps: two rollouts; within one the data set and its rewards stay, the thresholds do
    not fall, what is kept is above them; the second is drawn by the policy that the first made."""
    calls = []
    original = rest.sample

    def counted(old, *args, **how):
        calls.append(old.tok_embed.weight.sum().item())
        return original(old, *args, **how)

    monkeypatch.setattr(rest, "sample", counted)
    module, cfg = small("rest", steps=12, grows=2, n=4, grow_prompts=6, quantiles=[0.2, 0.5, 0.8])
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert len(calls) == 2 and calls[0] != calls[1]
    assert [row["grow"] for row in rows] == [0] * 6 + [1] * 6 and [row["improve"] for row in rows] == [0, 0, 1, 1, 2, 2] * 2
    for grow in (rows[:6], rows[6:]):
        assert len({row["reward"] for row in grow}) == 1
        thresholds = [row["threshold"] for row in grow]
        assert thresholds == sorted(thresholds) and all(row["reward/kept"] > row["threshold"] for row in grow)
        assert [row["kept"] for row in grow] == sorted((row["kept"] for row in grow), reverse=True)


def test_equal_rewards_keep_everything(small, tmp_path):
    path = tmp_path / "constant.py"
    path.write_text("def reward(prompts, completions):\n    return [1.0] * len(completions)\n")
    module, cfg = small("rest", reward=[f"{path}:reward"])
    assert {row["kept"] for row in read_rows(module.main(cfg) / "metrics.jsonl")} == {1.0}


def test_a_failed_grow_step_is_tried_again(small, tmp_path):
    """The reward fails once: that step is skipped and the next one draws the same data set again."""
    path = tmp_path / "late.py"
    path.write_text("calls = 0\ndef reward(prompts, completions):\n    global calls\n    calls += len(completions) > 8\n"
                    "    if calls == 1 and len(completions) > 8:\n        raise RuntimeError('not yet')\n"
                    "    return [len(c) for c in completions]\n")
    module, cfg = small("rest", reward=[f"{path}:reward"])
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1] * 6 and "reward" not in rows[0] and "reward" in rows[1]


@pytest.mark.parametrize(("changes", "message"), [
    ({"quantiles": [0.9, 0.5]}, "--quantiles .*must increase"), ({"quantiles": []}, "--quantiles .*must increase"),
    ({"quantiles": [0.5, 1.0]}, "must increase, from at least 0 to below 1"),
    ({"grows": 7}, "--steps 6: 7 Grow steps with 1 Improve steps each need at least 7"), ({"grows": 0}, "--grows 0: must be at least 1"),
])
def test_refusals(small, changes, message):
    module, cfg = small("rest", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)


def test_what_main_trains_on_is_above_the_threshold_and_under_its_own_prompt(small, monkeypatch):
    """Every row given to step, decoded: one of the pairs that were drawn, with a reward above the step's threshold."""
    from minialign.rewards import open_reward
    from minialign.tokenizer import load_tokenizer

    module, cfg = small("rest", n=4, quantiles=[0.3, 0.6])
    drawn, given = set(), []
    sample, step = rest.sample, rest.step

    def recorded(old, prompts_ids, **how):
        answers = sample(old, prompts_ids, **how)
        drawn.update((tuple(prompts_ids[b // 4]), tuple(ids)) for b, ids in enumerate(answers.completions))
        return answers

    monkeypatch.setattr(rest, "sample", recorded)
    monkeypatch.setattr(rest, "step", lambda policy, batch, cfg: given.append(batch) or step(policy, batch, cfg))
    rows, tokenizer = read_rows(module.main(cfg) / "metrics.jsonl"), load_tokenizer(cfg.policy)
    reward = open_reward(cfg.reward, prompts=cfg.prompts)
    for row, batch in zip(rows, given, strict=True):
        texts = []
        for inputs, targets, mask in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), strict=True):
            first = mask.index(True)
            completion = [token for token, scored in zip(targets, mask, strict=True) if scored]
            assert (tuple(inputs[: first + 1]), tuple(completion)) in drawn
            texts.append(tokenizer.decode(completion))
        assert float(reward([""] * len(texts), texts).min()) > row["threshold"]
