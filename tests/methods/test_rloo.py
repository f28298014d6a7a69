"""RLOO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import pytest
import torch
from torch.autograd import gradcheck

from minialign.methods import rloo
from tests.enumerable import BETA, CLIP, Enumerated, padded, random_rows, relative


@pytest.fixture
def m():
    return rloo


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_leave_one_out_by_hand(m):
    """R = 1 0 0 3: 1 − 3/3, 0 − 4/3, 0 − 4/3, 3 − 1/3. A second group of another scale does not leak into it."""
    advantages = m.leave_one_out(f64(1, 0, 0, 3, 100, 200, 300, 400), group_size=4)
    assert advantages[:4].tolist() == pytest.approx([0, -4 / 3, -4 / 3, 8 / 3], abs=1e-12)
    assert advantages[4:].tolist() == pytest.approx([-200, -200 / 3, 200 / 3, 200], abs=1e-10)
    assert advantages[:4].sum().item() == pytest.approx(0, abs=1e-12)


def test_equal_rewards_give_exactly_zero_whatever_they_are(m):
    """The mean of five of six times 0.1 is not 0.1 in floating point. Adam would make a full step of that rounding error."""
    for value in (0.1, 0.7, 1e-30, 1 / 3, 1e6 + 0.1):
        for group_size in (2, 6, 7, 8):
            assert m.leave_one_out(torch.full((2 * group_size,), value), group_size=group_size).tolist() == [0.0] * 2 * group_size


def test_penalised_rewards_by_hand(m):
    """log π = −1 −2 −.5, log ref = −1.2 −1.5 −.7: k1 = .2 −.5 .2, sum −.1; r = 1, β = .05: R = 1.005."""
    logps = f64(-1, -2, -0.5)[None].requires_grad_()
    rewards = m.kl_rewards(f64(1), logps, f64(-1.2, -1.5, -0.7)[None], beta=0.05)
    assert rewards.tolist() == pytest.approx([1.005], abs=1e-12)
    assert not rewards.requires_grad


def test_the_gradient_over_all_pairs(m):
    """G = 2: Σ_{y, y'} π(y) π(y') ∇rloo_loss(y, y') = −∇J, all 85² pairs, each through leave_one_out and the loss."""
    e = Enumerated(prompt=1)
    rewards = m.kl_rewards(e.rewards, e.logps, e.ref_logps, beta=BETA)
    C = len(rewards)
    y, other = torch.cartesian_prod(torch.arange(C), torch.arange(C)).T
    both = torch.stack([y, other], 1).flatten()  # the two of a pair adjacent
    weight = (e.law[y] * e.law[other]).repeat_interleave(2) * len(both) / 2  # an expectation, from the mean over rows
    advantages = m.leave_one_out(rewards[both], group_size=2) * weight
    loss, _ = m.rloo_loss(e.logps[both], e.logps[both].detach(), advantages, e.mask[both], eps=0.2)
    assert relative(-e.gradient(loss), e.gradient(e.objective())) < 1e-12


def test_clip_by_hand(m):
    """One token, ε = .2: CLIP's values and slopes in ρ."""
    for advantage, table in CLIP.items():
        for ratio, value, slope in table:
            logps = f64(ratio).log()[None].requires_grad_()
            loss, stats = m.rloo_loss(logps, torch.zeros(1, 1, dtype=torch.float64), f64(advantage), torch.ones(1, 1).bool(), eps=0.2)
            loss.backward()
            assert -loss.item() == pytest.approx(value) and -logps.grad.item() / ratio == pytest.approx(slope)  # d/dρ = d/d log ρ / ρ
            assert stats["clip_ratio/region_mean"].item() == (slope == 0) and stats["ratio"].item() == pytest.approx(ratio)


def test_the_ratio_is_of_the_sequence(m):
    """Two tokens with log-ratios +.15 and −.1: ρ = e^.05, inside the clip although the first token alone is not."""
    logps, old = f64(-1.0, -2.0)[None], f64(-1.3, -1.7)[None]
    loss, stats = m.rloo_loss(logps, old, f64(1.0), torch.ones(1, 2).bool(), eps=0.2)
    assert stats["ratio"].item() == pytest.approx(1.0) and loss.item() == pytest.approx(-1.0)


def test_gradient_by_finite_differences(m):
    logps, old_logps, _, mask = random_rows()
    advantages = torch.randn(len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logps = logps.requires_grad_()
    assert gradcheck(lambda x: m.rloo_loss(x, old_logps, advantages, mask, eps=0.2)[0], logps)


def test_padding_and_order_do_not_matter(m):
    logps, old_logps, _, mask = random_rows()
    advantages = torch.randn(len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = m.rloo_loss(logps, old_logps, advantages, mask, eps=0.2)[0]
    wide = padded(logps, old_logps, mask)
    wide[1] *= -1  # rubbish that differs between the two
    wide[1][:, : logps.shape[1]] *= -1
    assert torch.allclose(m.rloo_loss(wide[0], wide[1], advantages, wide[2], eps=0.2)[0], loss, atol=1e-14)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(2))
    permuted = m.rloo_loss(logps[order], old_logps[order], advantages[order], mask[order], eps=0.2)[0]
    assert torch.allclose(permuted, loss, atol=1e-14)


def test_a_group_of_one_is_refused(small):
    from minialign.engine.common import BadInput

    module, cfg = small("rloo", group_size=1)
    with pytest.raises(BadInput, match="--group_size 1.*at least 2"):
        module.main(cfg)
    with pytest.raises(AssertionError):
        rloo.leave_one_out(torch.zeros(4), group_size=1)
    module, cfg = small("rloo", group_size=3)
    with pytest.raises(BadInput, match="--batch_size 8: must be a multiple of --group_size 3"):
        module.main(cfg)
