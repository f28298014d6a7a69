"""REINFORCE. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import pytest
import torch

from minialign.methods import reinforce
from tests.enumerable import BETA, Enumerated, padded, random_rows, relative


@pytest.fixture
def m():
    return reinforce


def test_exact_gradient_of_three_actions(m):
    """∇_z E_π[R] = π∘(R − E R): π = .5 .3 .2, R = 1 0 2, E R = .9: [.05, −.27, .22]; a baseline of 5 changes nothing."""
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for baseline in (0.0, 5.0):
        logits = probs.log().requires_grad_()
        advantages = (torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64) - baseline) * probs * 3
        loss, _ = m.reinforce_loss(logits.log_softmax(0)[:, None], advantages, torch.ones(3, 1, dtype=torch.bool))
        loss.backward()
        assert (-logits.grad).tolist() == pytest.approx([0.05, -0.27, 0.22], abs=1e-12)


def test_penalised_rewards_by_hand(m):
    """log π = −1 −2 −.5, log ref = −1.2 −1.5 −.7: k1 = .2 −.5 .2, sum −.1; r = 1, β = .05: R = 1.005."""
    logps = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([[-1.2, -1.5, -0.7]], dtype=torch.float64)
    rewards = m.kl_rewards(torch.ones(1, dtype=torch.float64), logps, ref_logps, beta=0.05)
    assert rewards.tolist() == pytest.approx([1.005], abs=1e-12)
    assert not rewards.requires_grad


def test_policy_gradient_identity(m):
    """E_y[(R − b)·∇log π(y)] = ∇J by summing over all 85 completions, for any constant b, on two prompts."""
    for prompt, baseline in ((0, 0.0), (1, 0.0), (1, -3.0)):
        e = Enumerated(prompt)
        rewards = m.kl_rewards(e.rewards, e.logps, e.ref_logps, beta=BETA)
        loss, _ = m.reinforce_loss(e.logps, (rewards - baseline) * e.weights, e.mask)
        assert relative(-e.gradient(loss), e.gradient(e.objective())) < 1e-12


def test_padding_and_order_do_not_matter(m):
    logps, _, ref_logps, mask = random_rows()
    advantages = torch.randn(len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = m.reinforce_loss(logps, advantages, mask)[0]
    assert torch.allclose(m.reinforce_loss(*padded(logps), advantages, *padded(mask))[0], loss, atol=1e-14)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(m.reinforce_loss(logps[order], advantages[order], mask[order])[0], loss, atol=1e-14)


def test_the_baseline_is_the_mean_of_past_batches(m):
    """decay .5, batches of mean 2, 4, 0: nothing, then 2, then (.5·2 + 4)/(1.5) = 10/3, then (.25·2 + .5·4 + 0)/1.75."""
    baseline, values = m.Baseline(0.5), []
    for mean in (2.0, 4.0, 0.0):
        values.append(baseline.value)
        baseline.update(torch.tensor([mean - 1, mean + 1]))
    assert [*values, baseline.value] == pytest.approx([0.0, 2.0, 10 / 3, 2.5 / 1.75])


def test_a_baseline_that_contains_the_sample_shrinks_the_gradient():
    """The pitfall of the docstring: with the batch's own mean of B rewards the expectation is (B − 1)/B of the gradient, not all of it.
    B = 2: all pairs enumerated."""
    e = Enumerated()
    R = reinforce.kl_rewards(e.rewards, e.logps, e.ref_logps, beta=BETA)
    own_mean = (R[:, None] + R[None, :]) / 2  # (C, C) of the pair (y, y')
    expected = ((R[:, None] - own_mean) * e.law[None, :]).sum(1)  # E over y' of the advantage of y
    loss, _ = reinforce.reinforce_loss(e.logps, expected * e.weights, e.mask)
    assert relative(-2 * e.gradient(loss), e.gradient(e.objective())) < 1e-12


def test_ranks_are_asserted():
    logps, _, _, mask = random_rows()
    with pytest.raises(AssertionError):
        reinforce.reinforce_loss(logps, torch.zeros(len(mask), 1), mask)


def test_the_baseline_survives_a_resume(small, monkeypatch):
    """test_resume.py tests bitwise resume; here: the baseline is among what is restored, and it is used before it learns."""
    from minialign.engine.common import read_rows

    module, cfg = small("reinforce", decay=0.8, beta=0.3)
    rows = read_rows(module.main(cfg) / "metrics.jsonl")
    assert rows[0]["baseline"] == 0
    assert rows[1]["baseline"] == pytest.approx(rows[0]["reward"] - 0.3 * rows[0]["kl"], abs=1e-6)
    assert len({row["baseline"] for row in rows}) == len(rows)
