"""SLiC-HF. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.batch import collate
from minialign.data import encode_demos, encode_pairs, read_demonstrations, read_preferences
from minialign.engine.common import BadInput, batch_rows, derive_seed
from minialign.methods import slic
from minialign.methods.gpo import gpo_loss
from minialign.tokenizer import load_tokenizer
from tests.enumerable import EOS, tiny_gpt
from tests.preferring import (
    CHOSEN,
    REJECTED,
    any_preferences,
    bradley_terry,
    check_main,
    f64,
    gradient,
    log_prob,
    pair_account,
    pairs_of,
    population,
    random_pairs,
    replay,
    setting,
    token_logps_alone,
    winners,
)
from toy.three_actions import minimise


@pytest.fixture
def m():
    return slic


def one(m, chosen, rejected, target, **settings):
    loss, stats = m.slic_loss(f64(chosen), f64(rejected), f64(target), **settings)
    return loss.item(), {name: value.item() for name, value in stats.items()}


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_worked_numbers(m):
    """Sums −1.5 and −3, δ = 1, λ = .1, y_ref the chosen one: the margin 1.5 is past δ, so max(0, 1 − 1.5) + .1·1.5 = .15. δ = 2:
    .5 + .15 = .65. With the answers exchanged: max(0, 1 + 1.5) + .1·3 = 2.8."""
    loss, stats = one(m, -1.5, -3.0, -1.5, delta=1.0, weight=0.1)
    assert loss == pytest.approx(0.15, abs=1e-12)
    assert stats["rewards/margins"] == 1.5 and stats["rewards/accuracies"] == 1
    assert stats["logps/chosen"] == -1.5 and stats["logps/rejected"] == -3
    assert one(m, -1.5, -3.0, -1.5, delta=2.0, weight=0.1)[0] == pytest.approx(0.65, abs=1e-12)
    assert one(m, -3.0, -1.5, -3.0, delta=1.0, weight=0.1)[0] == pytest.approx(2.8, abs=1e-12)
    loss, stats = one(m, -3.0, -3.0, -2.0, delta=1.0, weight=0.0)
    assert loss == 1 and stats["rewards/accuracies"] == 0.5


def test_slopes_by_hand(m):
    """Short of δ: −1 in the chosen one, +1 in the rejected one, −λ in the target; past it 0, 0, −λ. Over two pairs, half of each."""
    tensors = [f64(-1.5, -3.0).requires_grad_(), f64(-3.0, -1.5).requires_grad_(), f64(-1.0, -1.0).requires_grad_()]
    loss = m.slic_loss(*tensors, delta=1.0, weight=0.1)[0]
    assert np.allclose(gradient(loss, tensors), [[0, -0.5], [0, 0.5], [-0.05, -0.05]], atol=1e-12)


def test_gradient_by_finite_differences(m):
    tensors = [row.requires_grad_() for row in random_pairs(0, 4, sides=3)]
    assert gradcheck(lambda *x: m.slic_loss(*x, delta=2.0, weight=0.3)[0], tensors)


def test_against_numpy_and_gpo(m):
    """max(0, δ − w + l) − λ·t; without the likelihood, and for a ref that finds all answers alike, it is δ times GPO's hinge at β = 1/δ."""
    tensors = random_pairs(sides=3)
    w, l, t = tensors.numpy()
    for delta, weight in ((1.0, 0.1), (5.0, 2.0)):
        loss = m.slic_loss(*tensors, delta=delta, weight=weight)[0].item()
        assert loss == pytest.approx(np.mean(np.maximum(0, delta - w + l) - weight * t), abs=1e-12)
    zeros = torch.zeros(20, dtype=torch.float64)
    hinge = gpo_loss(tensors[0], tensors[1], zeros, zeros, beta=1 / 3, f="hinge")[0]
    assert torch.allclose(m.slic_loss(*tensors, delta=3.0, weight=0.0)[0], 3 * hinge, rtol=1e-12)


def test_what_counts_and_what_does_not(m):
    """A constant on chosen and rejected answer leaves the hinge alone; one on the target costs λ times as much. Log-probs and δ go
    together: both three times as large is three times the loss."""
    chosen, rejected, target = random_pairs(1, sides=3)
    loss = m.slic_loss(chosen, rejected, target, delta=1.0, weight=0.1)[0]
    assert torch.allclose(m.slic_loss(chosen + 9, rejected + 9, target, delta=1.0, weight=0.1)[0], loss, atol=1e-12)
    assert torch.allclose(m.slic_loss(chosen, rejected, target + 9, delta=1.0, weight=0.1)[0], loss - 0.9, atol=1e-12)
    assert torch.allclose(m.slic_loss(3 * chosen, 3 * rejected, 3 * target, delta=3.0, weight=0.1)[0], 3 * loss, atol=1e-12)
    assert abs(m.slic_loss(chosen, rejected + 1, target, delta=1.0, weight=0.1)[0] - loss) > 1e-2


def test_a_pair_past_delta_says_no_more(m):
    """Its pressure does not fade as DPO's does, it stops: margins of 1.01, 5 and 500 have one loss and no slope."""
    for margin in (1.01, 5.0, 500.0):
        x = f64(margin).requires_grad_()
        loss = m.slic_loss(x, f64(0.0), f64(0.0), delta=1.0, weight=0.1)[0]
        assert loss.item() == 0 and gradient(loss, [x]) == [[0]]
    x = f64(-500.0).requires_grad_()
    loss = m.slic_loss(x, f64(0.0), f64(0.0), delta=1.0, weight=0.1)[0]
    assert loss.item() == 501 and gradient(loss, [x]) == [[-1]]


def test_ranks_are_asserted(m):
    for shapes in (((2, 3),) * 3, ((2,), (3,), (2,)), ((2,), (2,), (2, 3)), ((2,), (2,), (1,))):
        with pytest.raises(AssertionError):
            m.slic_loss(*map(torch.zeros, shapes), delta=1, weight=1)


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_sums_the_completions_tokens(m):
    """Pairs of unequal length, some short of δ and some past it: the loss from each completion's own sum, the target the chosen one;
    whatever the padding; ref is not asked."""
    policy, cfg = tiny_gpt(seed=0), m.Config(delta=2.0, weight=0.3)
    w, l = (torch.stack([log_prob(policy, y) for y in side]).detach() for side in (REJECTED, CHOSEN))
    assert 0 < int((w - l > 2).sum()) < 3
    for pad_id in (EOS, 0, 3):
        loss, stats = m.step(policy, None, pairs_of(REJECTED, CHOSEN, pad_id), cfg)
        assert loss.item() == pytest.approx((torch.relu(2 - w + l) - 0.3 * w).mean().item(), abs=1e-12)
        assert stats["rewards/margins"].item() == pytest.approx((w - l).mean().item(), abs=1e-12)
    loss.backward()
    assert policy.head_weight.grad.abs().sum() > 0


def test_step_with_targets_of_their_own(m):
    """y_ref is another answer, here to another prompt: its log-prob alone is in the second term."""
    policy, cfg = tiny_gpt(seed=0), m.Config(delta=2.0, weight=0.3)
    w, l = (torch.stack([log_prob(policy, y) for y in side]).detach() for side in (REJECTED, CHOSEN))
    prompts, answers = [[0], [1, 2, 3], [2]], [[3, EOS], [0], [1, 1, 2]]
    targets = torch.stack([token_logps_alone(policy, y, x).sum() for x, y in zip(prompts, answers, strict=True)]).detach()
    pairs = pairs_of(REJECTED, CHOSEN, EOS)
    pairs.target = collate(prompts, answers, pad_id=EOS)
    loss, _ = m.step(policy, None, pairs, cfg)
    assert loss.item() == pytest.approx((torch.relu(2 - w + l) - 0.3 * targets).mean().item(), abs=1e-12)


# -------------------------------------------------------------------------------------------------------------------- the law


def learned(m, wins, mu, delta, weight):
    def loss(z):
        logps = z.log_softmax(0)
        return population(lambda w, l: m.slic_loss(logps[w], logps[l], logps[w], delta=delta, weight=weight)[0], wins, mu)

    return minimise(loss, mu.log()).softmax(0).numpy()


def test_a_delta_that_no_pair_reaches(m):
    """While all hinges are open the loss is δ − Σ (W − L)·log π − λ·Σ W·log π: π = W + (W − L)/λ, where that is positive. W is how often
    an answer wins, L how often it loses."""
    for seed, weight in ((0, 4.0), (1, 2.0)):
        reward, _, mu = setting(seed)
        for wins in (bradley_terry(reward / 2), any_preferences(seed)):
            W, L = winners(wins, mu)
            law = W + (W - L) / weight
            assert law.min() > 0.04 and law.sum() == pytest.approx(1)
            assert np.allclose(learned(m, wins, mu, 10.0, weight), law, atol=1e-8)
            assert np.abs(law - W).max() > 0.01


def test_the_law_with_other_targets(m):
    """π = D + (W − L)/λ, D the distribution of y_ref, which comes from elsewhere and may hold answers that never win."""
    _, _, mu = setting(0)
    wins, weight, target = any_preferences(0), 4.0, f64(0.4, 0.1, 0.2, 0.1, 0.2)
    W, L = winners(wins, mu)

    def loss(z):
        logps = z.log_softmax(0)
        mean = (target * logps).sum()
        return population(lambda w, l: m.slic_loss(logps[w], logps[l], mean.expand(len(w)), delta=10.0, weight=weight)[0], wins, mu)

    law = target.numpy() + (W - L) / weight
    assert law.min() > 0.01 and np.allclose(minimise(loss, mu.log()).softmax(0).numpy(), law, atol=1e-8)


def test_once_some_have_reached_it(m):
    """No closed form: in numpy, the flow of an answer over the open hinges, −Σ w·p·1[open] + Σ w·(1 − p)·1[open back] − λ·W, is κ·π with
    one κ for all: −λ. Some pairs are past δ, some are not, none is at it."""
    wins, mu = bradley_terry(f64(0.0, 0.2, 3.0, 3.1, 3.3)), f64(0.1, 0.1, 0.25, 0.3, 0.25)
    weight, delta = 1.0, 0.5
    law = learned(m, wins, mu, delta, weight)
    margin, p = np.log(law)[:, None] - np.log(law), wins.numpy()
    assert (margin > delta + 1e-3).any() and np.abs(margin - delta).min() > 1e-3
    w = 2 * np.outer(mu, mu) * (1 - np.eye(5))
    flow = (w * (-p * (margin < delta) + (1 - p) * (-margin < delta))).sum(1) - weight * winners(wins, mu)[0]
    assert np.abs(flow - flow.sum() * law).max() < 1e-9 and flow.sum() == pytest.approx(-weight)
    W, L = winners(wins, mu)
    assert np.abs(law - (W + (W - L) / weight)).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------- main


def test_main_is_its_account(small):
    check_main(small, "slic", lambda w, l, *_: torch.relu(0.5 - w.sum() + l.sum()) - 0.3 * w.sum(), delta=0.5, weight=0.3)


def test_a_run_takes_its_targets_from_the_demonstrations(small, demos_file):
    """Four steps written out again: in step k the targets are the rows of --demos that its own seed picks, in micro-batches of three."""
    module, cfg = small("slic", steps=4, held_out=0.0, schedule="constant", warmup=0.0, micro_batch=3, delta=0.5, weight=0.3,
                        demos=str(demos_file))
    tokenizer = load_tokenizer(cfg.policy)
    rows, demos = encode_pairs(tokenizer, read_preferences(cfg.pairs)), encode_demos(tokenizer, read_demonstrations(demos_file))
    pairs_alone = pair_account(lambda w, l, *_: torch.relu(0.5 - w.sum() + l.sum()))

    def loss_of_batch(k, picked, policy, ref, rows):
        targets = [demos[i] for i in batch_rows(len(demos), cfg.batch_size, k, derive_seed("targets", cfg.seed))]
        nll = sum(-token_logps_alone(policy, y, x).sum() for x, y in targets) / len(targets)
        return pairs_alone(k, picked, policy, ref, rows) + 0.3 * nll

    replay(module.main(cfg), cfg, rows, loss_of_batch)


@pytest.mark.parametrize(("changes", "message"), [
    ({"demos": "absent.jsonl"}, "absent.jsonl: cannot be read"),
    ({"weight": -0.1}, "--weight -0.1: must be at least 0"), ({"delta": math.nan}, "--delta nan: must be a finite number"),
    ({"pairs": "absent.jsonl"}, "absent.jsonl: cannot be read"),
])
def test_bad_settings(small, changes, message):
    module, cfg = small("slic", **changes)
    with pytest.raises(BadInput, match=message):
        module.main(cfg)
