"""GRPO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign import kl
from minialign.engine.common import BadInput
from minialign.methods import grpo, rloo
from tests.enumerable import BETA, CLIP, Enumerated, padded, random_rows, relative


@pytest.fixture
def m():
    return grpo


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_group_advantages_by_hand(m):
    """r = 1 0 0 3: mean 1, squares 0 1 1 4: sample std √2, population √1.5; eps 1e-4 added. A group of equal rewards: exactly 0."""
    rewards = f64(1, 0, 0, 3, 50, 70, 50, 70, 0.1, 0.1, 0.1, 0.1)
    sample = m.group_advantages(rewards, group_size=4)
    assert sample[:4].tolist() == pytest.approx([0, -0.707057, -0.707057, 1.414114], abs=1e-6)
    assert sample[4:8].tolist() == pytest.approx([-0.866, 0.866, -0.866, 0.866], abs=1e-4)  # another scale, a group of its own
    assert sample[8:].tolist() == [0, 0, 0, 0]
    population = m.group_advantages(rewards[:4], group_size=4, ddof=0)
    assert population.tolist() == pytest.approx([0, -0.816430, -0.816430, 1.632860], abs=1e-6)
    assert m.group_advantages(rewards[:4], group_size=4, normalize=False).tolist() == [0, -1, -1, 2]


def test_a_group_of_two_in_both_units(m):
    """±1/√2 with the sample standard deviation, ±1 with the population's."""
    for ddof, unit in ((1, 0.5**0.5), (0, 1.0)):
        advantages = m.group_advantages(f64(3, 5), group_size=2, ddof=ddof, std_eps=0.0)
        assert advantages.tolist() == pytest.approx([-unit, unit], abs=1e-12)


def test_equal_rewards_give_exactly_zero_whatever_they_are(m):
    """The mean of seven times 0.1 is not 0.1 in floating point, and its tiny spread would be divided by std_eps=0."""
    for value in (0.1, 1e-30, 1 / 3, 1e6 + 0.1):
        for settings in ({}, {"std_eps": 0.0}, {"normalize": False}, {"ddof": 0, "std_eps": 0.0}):
            assert m.group_advantages(torch.full((7,), value), group_size=7, **settings).tolist() == [0.0] * 7


def test_group_mean_is_the_shrunk_leave_one_out(m):
    """A with the sample in its own mean = (G − 1)/G × leave-one-out, for every G."""
    for group_size in (2, 3, 8):
        rewards = torch.randn(5 * group_size, generator=torch.Generator().manual_seed(group_size), dtype=torch.float64)
        shrunk = (group_size - 1) / group_size * rloo.leave_one_out(rewards, group_size=group_size)
        assert torch.allclose(m.group_advantages(rewards, group_size=group_size, normalize=False), shrunk, atol=1e-14)


def test_aggregates_by_hand(m):
    """Token losses 1 1 and 2 2 2 2, at most 4 tokens: (1 + 2)/2, 10/6, 10/(2·4). At ratio 1 a token's loss is −A."""
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    logps = torch.where(mask, -1.0, 0.0).double()
    for aggregate, expected in (("grpo", 1.5), ("dapo", 10 / 6), ("dr_grpo", 1.25)):
        loss, stats = m.grpo_loss(logps, logps, logps, f64(-1, -2), mask, eps=0.2, beta=0.3, aggregate=aggregate, max_len=4)
        assert loss.item() == pytest.approx(expected, abs=1e-12) and stats["ratio"] == 1 and stats["clip_ratio/region_mean"] == 0
    with pytest.raises(BadInput, match="grpo, dapo or dr_grpo"):
        m.grpo_loss(logps, logps, logps, f64(-1, -2), mask, eps=0.2, beta=0.3, aggregate="mean")


def test_clip_by_hand(m):
    """One token, ε = .2: CLIP's values and slopes in ρ."""
    for advantage, table in CLIP.items():
        for ratio, value, slope in table:
            logps = f64(ratio).log()[None].requires_grad_()
            zero = torch.zeros(1, 1, dtype=torch.float64)
            loss, stats = m.grpo_loss(logps, zero, zero, f64(advantage), torch.ones(1, 1).bool(), eps=0.2, beta=0.0)
            loss.backward()
            assert -loss.item() == pytest.approx(value) and -logps.grad.item() / ratio == pytest.approx(slope)
            assert stats["clip_ratio/region_mean"].item() == (slope == 0)


def test_the_ratio_is_of_tokens(m):
    """Log-ratios +.3 and −.3 of two tokens with A = 1: min(e^.3, 1.2) and e^−.3, not the sequence's 1."""
    logps, old = f64(-1.0, -2.0)[None], f64(-1.3, -1.7)[None]
    loss, _ = m.grpo_loss(logps, old, logps, f64(1.0), torch.ones(1, 2).bool(), eps=0.2, beta=0.5)
    assert loss.item() == pytest.approx(-(1.2 + np.exp(-0.3)) / 2, abs=1e-12)


def test_k3_by_hand(m):
    """π = .5, ref = .2: k3 = .4 − 1 + log 2.5 = .316291; with A = 0 the loss is β times that."""
    logps, ref_logps = f64(0.5).log()[None], f64(0.2).log()[None]
    loss, _ = m.grpo_loss(logps, logps, ref_logps, f64(0.0), torch.ones(1, 1).bool(), eps=0.2, beta=0.7)
    assert loss.item() == pytest.approx(0.7 * 0.316291, abs=1e-6)


def test_expected_gradient_is_that_of_reward_and_token_k3(m):
    """Σ_y π(y)·∇loss(y) over all completions = −(G − 1)/G·∇E[r] + β·(expected gradient of Σ_t k3), written out from the definition."""
    e, group_size = Enumerated(prompt=1), 4
    advantages = (group_size - 1) / group_size * (e.rewards - e.law @ e.rewards)
    loss, _ = m.grpo_loss(e.logps, e.logps.detach(), e.ref_logps, advantages * e.weights, e.mask, eps=0.2,
                          beta=BETA * e.weights[:, None], aggregate="dr_grpo", max_len=1)
    expected_reward = (e.logps.sum(1).exp() * e.rewards).sum()
    logratio = e.ref_logps - e.logps
    k3 = (e.law * torch.where(e.mask, logratio.exp() - 1 - logratio, 0).sum(1)).sum()
    by_definition = -(group_size - 1) / group_size * e.gradient(expected_reward) + BETA * e.gradient(k3)
    assert relative(e.gradient(loss), by_definition) < 1e-12


def test_the_trap_of_k3():
    """On whole completions, as values: E k1 = E k3 = KL(π‖ref), E k2 is not. As losses: E[∇k1] = 0, E[∇k2] = ∇KL(π‖ref), and
    E[∇k3] = ∇KL(ref‖π), far from the divergence that k3 estimates."""
    e = Enumerated()
    logps, ref_logps = e.logps.sum(1), e.ref_logps.sum(1)
    reverse, forward = (logps.exp() * (logps - ref_logps)).sum(), -(ref_logps.exp() * logps).sum()
    means = {k.__name__: (e.law * k(logps, ref_logps)).sum() for k in (kl.k1, kl.k2, kl.k3)}
    assert means["k1"].item() == pytest.approx(reverse.item(), abs=1e-12) == means["k3"].item()
    assert abs(means["k2"].item() - reverse.item()) > 0.01  # .660 against .681 here
    assert e.gradient(means["k1"]).norm() < 1e-12
    assert relative(e.gradient(means["k2"]), e.gradient(reverse)) < 1e-12
    assert relative(e.gradient(means["k3"]), e.gradient(forward)) < 1e-12
    assert relative(e.gradient(means["k3"]), e.gradient(reverse)) > 0.3


def test_k2_per_token_misses_the_kl_of_later_tokens():
    """E[Σ_t k2_t] in the loss is not ∇KL(π‖ref), but that less E[Σ_t ∇log π_t·Σ_{s>t} log π_s/ref_s], written out over all completions."""
    e = Enumerated()
    logratio = (e.logps - e.ref_logps).detach()  # (C, T)
    later = torch.stack([logratio[:, t + 1:].sum(1) for t in range(logratio.shape[1])], dim=1)  # (C, T)
    reverse = e.gradient((e.logps.sum(1).exp() * (e.logps - e.ref_logps).sum(1)).sum())
    per_token = e.gradient((e.law * kl.k2(e.logps, e.ref_logps).sum(1)).sum())
    missed = e.gradient((e.law[:, None] * e.logps * later).sum())
    assert relative(per_token + missed, reverse) < 1e-12 and relative(per_token, reverse) > 0.2


def test_pairs_of_a_group_enumerated(m):
    """G = 2, no spread: Σ over all 85² pairs through group_advantages and the loss = half the gradient of E[r] (β = 0)."""
    e = Enumerated(prompt=1)
    C = len(e.rewards)
    y, other = torch.cartesian_prod(torch.arange(C), torch.arange(C)).T
    both = torch.stack([y, other], 1).flatten()
    weight = (e.law[y] * e.law[other]).repeat_interleave(2) * len(both) / 2
    advantages = m.group_advantages(e.rewards[both], group_size=2, normalize=False) * weight
    loss, _ = m.grpo_loss(e.logps[both], e.logps[both].detach(), e.ref_logps[both], advantages, e.mask[both], eps=0.2, beta=0.0,
                          aggregate="dr_grpo", max_len=1)
    assert relative(-2 * e.gradient(loss), e.gradient((e.logps.sum(1).exp() * e.rewards).sum())) < 1e-12


def test_gradient_by_finite_differences(m):
    logps, old_logps, ref_logps, mask = random_rows()
    advantages = torch.randn(len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for aggregate in ("grpo", "dapo", "dr_grpo"):
        settings = dict(eps=0.2, beta=0.3, aggregate=aggregate, max_len=5)
        x = logps.clone().requires_grad_()
        assert gradcheck(lambda x, s=settings: m.grpo_loss(x, old_logps, ref_logps, advantages, mask, **s)[0], x)


def test_padding_and_order_do_not_matter(m):
    logps, old_logps, ref_logps, mask = random_rows()
    advantages = torch.randn(len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(2))
    for aggregate in ("grpo", "dapo", "dr_grpo"):
        settings = dict(eps=0.2, beta=0.3, aggregate=aggregate, max_len=5)
        loss = m.grpo_loss(logps, old_logps, ref_logps, advantages, mask, **settings)[0]
        wide = padded(logps, old_logps, ref_logps, mask)
        wide[2][:, logps.shape[1] :] = -torch.inf  # whatever stands there
        assert torch.allclose(m.grpo_loss(*wide[:3], advantages, wide[3], **settings)[0], loss, atol=1e-14)
        permuted = m.grpo_loss(logps[order], old_logps[order], ref_logps[order], advantages[order], mask[order], **settings)[0]
        assert torch.allclose(permuted, loss, atol=1e-14)


def test_padding_leaves_no_nan_in_the_gradient(m):
    """Masked entries may be −inf: they must not reach an exp whose gradient is 0·inf."""
    logps, old_logps, ref_logps, mask = padded(*random_rows(), value=-torch.inf)
    logps = logps.requires_grad_()
    m.grpo_loss(logps, old_logps, ref_logps, torch.ones(len(mask)).double(), mask, eps=0.2, beta=0.3)[0].backward()
    assert logps.grad.isfinite().all()


def test_longer_answers_weigh_less_per_token_only_with_the_papers_aggregate():
    """Two completions of 1 and 4 tokens, A = 1 and −1: the slope of each token is 1 and −1/4 with "grpo", equal sizes with the others."""
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    for aggregate, ratio in (("grpo", 0.25), ("dapo", 1.0), ("dr_grpo", 1.0)):
        logps = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        settings = dict(eps=0.2, beta=0.0, aggregate=aggregate, max_len=4)
        grpo.grpo_loss(logps, logps.detach(), logps.detach(), f64(1, -1), mask, **settings)[0].backward()
        assert (-logps.grad[1, 0] / logps.grad[0, 0]).item() == pytest.approx(ratio)


def test_refusals(small):
    for changes, message in (({"group_size": 1}, "--group_size 1"), ({"aggregate": "mean"}, "--aggregate mean"), ({"ddof": 2}, "--ddof 2"),
                             ({"beta": -1.0}, "--beta -1.0: must be at least 0")):
        module, cfg = small("grpo", **changes)
        with pytest.raises(BadInput, match=message):
            module.main(cfg)


@pytest.mark.parametrize("aggregate", ["dapo", "dr_grpo"])
def test_accumulation_is_invariant_for_the_other_aggregates(small, aggregate):
    """tests/engine/test_resume.py does it for the default."""
    from safetensors.torch import load_file

    weights = []
    for micro_batch in (0, 3):
        module, cfg = small("grpo", aggregate=aggregate, micro_batch=micro_batch, epochs=2, group_size=4)
        weights.append(load_file(module.main(cfg) / "final" / "model.safetensors"))
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-10


def test_without_beta_nothing_pulls_to_ref(m):
    logps, old_logps, ref_logps, mask = random_rows()
    advantages = torch.ones(len(mask)).double()
    losses = [m.grpo_loss(logps, old_logps, ref, advantages, mask, eps=0.2, beta=0.0)[0].item() for ref in (ref_logps, logps)]
    assert losses[0] == losses[1]
