"""IFT. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.batch import collate
from minialign.methods import ift
from tests.enumerable import EOS, LANGUAGE, padded, random_rows, tiny_gpt
from toy import closed_form


@pytest.fixture
def m():
    return ift


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


LOSSES, ALL = [1, 2, 0.5, 4], [1, 1, 1, 1]
HOLE, HOLE_MASK = [1, 2, 99, 0.5, 4], [1, 1, 0, 1, 1]


def run(m, losses, mask, **settings):
    logps = -f64(losses).requires_grad_()
    logps.retain_grad()
    loss, _ = m.ift_loss(logps, torch.tensor([mask]).bool(), **settings)
    loss.backward()
    return loss.item(), (-logps.grad[0]).tolist()  # d loss / d ℓ


def test_worked_numbers(m):
    """ℓ = 1 2 .5 4: with γ = .95 c_4 = 4, c_3 = .5 + .95·4 = 4.3, c_2 = 2 + .95·4.3 = 6.085, c_1 = 6.78075; their sum 21.16575;
    w = 4c/Σc; the gradient of the detached form is w/4. γ = 1 takes plain suffix sums 7.5 6.5 4.5 4; γ = 0 is the mean, 7.5/4."""
    loss, gradient = run(m, LOSSES, ALL, decay=0.95)
    assert loss == pytest.approx(1.752867, abs=1e-6) and gradient == pytest.approx([0.320364, 0.287493, 0.203158, 0.188985], abs=1e-6)
    loss, gradient = run(m, LOSSES, ALL, decay=1.0)
    assert loss == pytest.approx(1.722222, abs=1e-6) and gradient == pytest.approx([7.5 / 22.5, 6.5 / 22.5, 0.2, 4 / 22.5], abs=1e-12)
    loss, gradient = run(m, LOSSES, ALL, decay=0.0)
    assert loss == pytest.approx(1.875) and gradient == [0.25] * 4


def test_worked_numbers_of_the_released_code(m):
    """Weights differentiated: ((A + Aᵀ)ℓ − L·Aᵀ1)/(1ᵀAℓ) with A[t, i] = γ^{i−t} for i ≥ t; the loss is the same."""
    loss, gradient = run(m, LOSSES, ALL, decay=0.95, detach_weights=False)
    assert loss == pytest.approx(1.752867, abs=1e-6) and gradient == pytest.approx([0.284794, 0.265377, 0.122956, 0.218960], abs=1e-6)
    A = np.triu(0.95 ** (np.arange(4)[None] - np.arange(4)[:, None]))
    by_formula = ((A + A.T) @ LOSSES - loss * A.T @ np.ones(4)) / (A @ LOSSES).sum()
    assert gradient == pytest.approx(by_formula.tolist(), abs=1e-12)


def test_a_hole_advances_the_exponent(m):
    """A turn of the user in between: w = 1.268660 1.132685 0 .828219 .770436, loss 1.757471; what stands in the hole does not matter."""
    loss, gradient = run(m, HOLE, HOLE_MASK, decay=0.95)
    assert loss == pytest.approx(1.757471, abs=1e-6)
    assert [4 * g for g in gradient] == pytest.approx([1.268660, 1.132685, 0, 0.828219, 0.770436], abs=1e-6)


def test_some_tokens_are_pushed_down_by_the_released_code_and_none_by_ours():
    """Exponential losses of 8 tokens: about a tenth of the official gradients are negative in ℓ; detached, none."""
    losses = torch.empty(2000, 8, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    shares = {}
    for detach in (True, False):
        logps = (-losses).requires_grad_()
        ift.ift_loss(logps, torch.ones(2000, 8).bool(), decay=0.95, detach_weights=detach)[0].backward()
        shares[detach] = float((-logps.grad < 0).double().mean())
    assert shares[True] == 0 and 0.08 < shares[False] < 0.14


def test_finite_differences(m):
    """The attached form as it is; the detached one with its weights frozen at the point."""
    logps, _, _, mask = random_rows()
    assert gradcheck(lambda x: m.ift_loss(x, mask, decay=0.9, detach_weights=False)[0], logps.clone().requires_grad_())
    x = logps.clone().requires_grad_()
    m.ift_loss(x, mask, decay=0.9)[0].backward()
    losses = -logps
    suffix = torch.stack([sum(0.9 ** (i - t) * losses[:, i] for i in range(t, 5)) for t in range(5)], 1) * mask
    weights = suffix / suffix.sum(1, keepdim=True)  # of sum 1
    y = logps.clone().requires_grad_()
    assert gradcheck(lambda z: -(torch.where(mask, z, 0) * weights).sum(1).mean(), y)
    (expected,) = torch.autograd.grad(-(torch.where(mask, y, 0) * weights).sum(1).mean(), y)
    assert torch.allclose(x.grad, expected, atol=1e-12)


def test_scale_padding_and_order(m):
    """Homogeneous: loss(2ℓ) = 2·loss(ℓ). Rubbish behind a row and the order of rows change nothing."""
    logps, _, _, mask = random_rows()
    loss = m.ift_loss(logps, mask, decay=0.9)[0]
    assert m.ift_loss(2 * logps, mask, decay=0.9)[0].item() == pytest.approx(2 * loss.item(), abs=1e-12)
    assert torch.allclose(m.ift_loss(*padded(logps, mask), decay=0.9)[0], loss, atol=1e-14)
    assert torch.allclose(m.ift_loss(logps.flip(0), mask.flip(0), decay=0.9)[0], loss, atol=1e-14)
    nothing = m.ift_loss(logps, torch.zeros_like(mask), decay=0.9)[0]
    assert nothing.item() == 0


def demos():
    """Two prompts of one and three tokens with completions of three and two."""
    return collate([[0], [2, 0, 1]], [[1, 3, EOS], [0, EOS]], pad_id=EOS)


def test_the_guesses_are_the_policys_own(m):
    """Built token by token: the guess for a completion token is the likeliest next token after the demonstrated ones before it; prompt
    tokens keep their own embedding; λ mixes."""
    policy, batch = tiny_gpt(), demos()
    expected = policy.embed(batch.inputs).clone()
    rows = [([0], [1, 3, EOS]), ([2, 0, 1], [0, EOS])]
    for b, (prompt, completion) in enumerate(rows):
        for t in range(len(completion) - 1):  # the last token is never an input
            seen = torch.tensor([prompt + completion[:t]])
            guess = policy(seen)[0, -1].argmax()
            place = len(prompt) + t
            expected[b, place] = 0.7 * expected[b, place] + 0.3 * policy.embed(guess[None, None])[0, 0]
    read = batch.mask.flip(1).cumsum(1).flip(1) > 0  # (B, T) up to the last scored prediction; what comes after is read by nobody
    assert torch.allclose(m.lookahead_embeds(policy, batch, mix=0.3)[read], expected[read], atol=1e-12)
    assert torch.equal(m.lookahead_embeds(policy, batch, mix=0.0), policy.embed(batch.inputs))


def test_one_forward_without_gradient_and_one_with(m):
    """The cost that the paper promises. Gradients reach the embeddings, and no parameter is left out."""
    policy, calls = tiny_gpt(), []
    original = policy.hidden
    policy.hidden = lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or original(*args, **kwargs)
    loss, _ = m.step(policy, demos(), m.Config())
    loss.backward()
    assert calls == [False, True]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_no_mix_and_no_decay_is_sft_with_a_mean_per_completion(m):
    from minialign.logps import token_logps

    policy, batch = tiny_gpt(), demos()
    loss, stats = m.step(policy, batch, m.Config(mix=0.0, decay=0.0))
    logps = token_logps(policy, batch)
    assert loss.item() == pytest.approx(-(logps.sum(1) / batch.mask.sum(1)).mean().item(), abs=1e-12)
    assert stats["nll"].item() == pytest.approx(-logps.sum().item() / 5, abs=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padded_rows_of_the_vocabulary_are_never_guessed(family):
    """A model may have more embedding rows than there are tokens: those mean nothing."""
    shape = {} if family == "gpt2" else dict(norm="rms", positions="rotary", gated=True, activation="silu", family="llama")
    policy = tiny_gpt(9, n_tokens=5, **shape)
    with torch.no_grad():
        policy.head.weight[5:] = 100 * policy.head.weight[:1].sign()
    guessed = ift.lookahead_embeds(policy, demos(), mix=1.0)
    table = policy.embed(torch.arange(9)[None])[0]
    nearest = (guessed[:, :, None] - table).norm(dim=-1).argmin(-1)
    assert nearest.max() < 5


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
def test_the_law_by_following_the_expected_update(decay):
    """Gradient descent on Σ_y E(y)·ift_loss(y) over tabular logits, from uniform, comes to rest at closed_form.ift_law."""
    from toy.tiny_language import TabularPolicy

    expert = closed_form.normalise(np.exp(np.random.default_rng(0).normal(size=len(LANGUAGE.completions))))
    law = closed_form.ift_law(LANGUAGE.completions, expert, decay)
    assert law.sum() == pytest.approx(1, abs=1e-12) and closed_form.kl(law, expert) > 1e-3  # with decay 0 for 1/n alone
    policy, scale = TabularPolicy(LANGUAGE, np.full(len(expert), 1 / len(expert))), torch.tensor(expert * len(expert))[:, None]
    optimizer = torch.optim.Adam([policy.logits], lr=0.03)
    for k in range(1500):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - k / 1500)
        optimizer.zero_grad()
        ift.ift_loss(policy.token_logps() * scale, LANGUAGE.mask, decay=decay)[0].backward()
        optimizer.step()
    learned = policy.token_logps().sum(1).exp().detach().numpy()
    assert closed_form.kl(learned, law) < 1e-6


def test_the_law_of_one_token_is_the_expert():
    expert = np.array([0.1, 0.2, 0.7])
    assert closed_form.ift_law([(0,), (1,), (2,)], expert, 0.95).tolist() == pytest.approx(expert.tolist(), abs=1e-14)


def test_the_law_by_hand_and_where_a_continuation_is_certain():
    """Two first tokens of E = .5 each: the one that ends at once gains over the one that goes on to a coin flip; and a certain continuation
    (ℓ = 0) is no 0/0. With decay 0 the weights are 1/n: 2/3 and 1/3."""
    for completions in ([(0,), (1, 2), (1, 3)], [(0, 9), (1, 2), (1, 3)]):
        law = closed_form.ift_law(completions, [0.5, 0.25, 0.25], 0.95)
        assert law.sum() == pytest.approx(1) and law[0] > 0.55 and law[1] == pytest.approx(law[2])
    assert closed_form.ift_law([(0,), (1, 2), (1, 3)], [0.5, 0.25, 0.25], 0.0).tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])


def test_gamma_one_and_full_mix_are_allowed_and_more_is_not(small):
    from minialign.engine.common import BadInput

    module, cfg = small("ift", decay=1.0, mix=1.0, steps=1)
    module.main(cfg)
    for name, value in (("mix", 1.5), ("mix", -0.1), ("decay", 1.1)):
        with pytest.raises(BadInput, match=f"--{name} {value}: must be at least 0 and at most 1"):
            module.main(small("ift", **{name: value})[1])
