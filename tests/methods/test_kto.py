"""KTO. Every test that takes `m` alone is also run against wrong variants of the file (tests/test_wrong_variants.py)."""

import json
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from minialign.data import demo_batch, encode_feedback, read_feedback
from minialign.engine.common import BadInput, batch_rows, read_rows
from minialign.methods import kto
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained
from tests.enumerable import EOS, tiny_gpt
from tests.preferring import f64, gradient, random_pairs, replay, setting, token_logps_alone
from toy.three_actions import minimise


@pytest.fixture
def m():
    return kto


def one(m, logp, ref_logp, desirable, kl, **settings):
    loss, stats = m.kto_loss(f64(logp), f64(ref_logp), torch.tensor([desirable]), torch.tensor(kl), **settings)
    return loss.item(), {name: value.item() for name, value in stats.items()}


def random_answers(seed=0, rows=20):
    """log π, log ref (B,), and which are desirable."""
    logps, ref_logps = random_pairs(seed, rows, sides=2)
    return logps, ref_logps, torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.6


# ------------------------------------------------------------------------------------------------------------------- the loss


def test_worked_numbers(m):
    """β = .1, z₀ = .2. Desirable, ρ = −1.5 + 2 = .5: 1 − σ(.1·.3) = 1 − σ(.03) = .492501. Undesirable, ρ = −3 + 2.5 = −.5: 1 − σ(.1·.7)
    = 1 − σ(.07) = .482507. Weights 1.5 and .75: .738751 and .361881; together, as one batch, half of each."""
    loss, stats = one(m, -1.5, -2.0, True, 0.2, beta=0.1)
    assert loss == pytest.approx(0.492501, abs=1e-6)
    assert stats == pytest.approx({"rewards/chosen": 0.05, "logps/chosen": -1.5, "rewards/accuracies": 1})
    loss, stats = one(m, -3.0, -2.5, False, 0.2, beta=0.1)
    assert loss == pytest.approx(0.482507, abs=1e-6)
    assert stats == pytest.approx({"rewards/rejected": -0.05, "logps/rejected": -3, "rewards/accuracies": 1})
    weights = dict(desirable_weight=1.5, undesirable_weight=0.75)
    assert one(m, -1.5, -2.0, True, 0.2, beta=0.1, **weights)[0] == pytest.approx(0.738751, abs=1e-6)
    assert one(m, -3.0, -2.5, False, 0.2, beta=0.1, **weights)[0] == pytest.approx(0.361881, abs=1e-6)
    both = m.kto_loss(f64(-1.5, -3.0), f64(-2.0, -2.5), torch.tensor([True, False]), torch.tensor(0.2), beta=0.1, **weights)[0]
    assert both.item() == pytest.approx((0.738751 + 0.361881) / 2, abs=1e-6)


def test_where_an_answer_stands_at_the_reference_point(m):
    """ρ = z₀: λ/2, whatever the label, and neither right nor wrong. Below it a liked answer is wrong, though its log-ratio is positive."""
    for desirable in (True, False):
        loss, stats = one(m, -1.5, -2.0, desirable, 0.5, beta=0.7, desirable_weight=1.5, undesirable_weight=0.5)
        assert loss == pytest.approx(0.75 if desirable else 0.25, abs=1e-12) and stats["rewards/accuracies"] == 0.5
    assert one(m, -1.5, -2.0, True, 0.6, beta=0.7)[1]["rewards/accuracies"] == 0
    assert one(m, -1.5, -2.0, False, 0.6, beta=0.7)[1]["rewards/accuracies"] == 1


def test_slopes_by_hand(m):
    """∓λ·β·σ'(x), σ'(x) = σ(x)·σ(−x), x = ±.1·.3: σ(.03)·σ(−.03) = .249944: −.0249944 for a liked answer, + that for a disliked one of
    the same ρ: its x is −.03, where σ' is the same. Twice the weight is twice the slope. ref's log-prob has the other sign."""
    for desirable, weights, slope in ((True, {}, -0.0249944), (False, {}, 0.0249944), (True, {"desirable_weight": 2.0}, -0.0499888),
                                      (False, {"undesirable_weight": 2.0}, 0.0499888)):
        tensors = [f64(-1.5).requires_grad_(), f64(-2.0).requires_grad_()]
        loss = m.kto_loss(*tensors, torch.tensor([desirable]), torch.tensor(0.2), beta=0.1, **weights)[0]
        assert np.ravel(gradient(loss, tensors)) == pytest.approx([slope, -slope], abs=1e-7)


def test_gradient_by_finite_differences(m):
    logps, ref_logps, desirable = random_answers(0, 4)
    tensors = [logps.requires_grad_(), ref_logps.requires_grad_()]
    kl = torch.tensor(0.3)
    assert gradcheck(lambda *x: m.kto_loss(*x, desirable, kl, beta=0.2, desirable_weight=1.5, undesirable_weight=0.75)[0], tensors)


def test_against_numpy_and_the_papers_own_form(m):
    """λ_y − v(x, y) as the paper has it: v = λ_D·σ(β(ρ − z₀)) for a liked answer, λ_U·σ(β(z₀ − ρ)) for a disliked one; and the form without
    labels inside: with s = ±1, λ·σ(−s·β·(ρ − z₀))."""
    logps, ref_logps, desirable = random_answers()
    loss = m.kto_loss(logps, ref_logps, desirable, f64(0.4)[0], beta=0.3, desirable_weight=1.5, undesirable_weight=0.75)[0]
    rho, s = (logps - ref_logps).numpy(), np.where(desirable, 1, -1)
    weight = np.where(desirable, 1.5, 0.75)
    value = weight / (1 + np.exp(-s * 0.3 * (rho - 0.4)))
    assert loss.item() == pytest.approx((weight - value).mean(), abs=1e-12)
    assert loss.item() == pytest.approx((weight / (1 + np.exp(s * 0.3 * (rho - 0.4)))).mean(), abs=1e-12)


def test_what_counts_and_what_does_not(m):
    """A constant on policy and ref, or on both and the reference point's difference, changes nothing; β and nats go together. The other
    label on every row, weights exchanged, is the loss mirrored: λ − loss, row by row. A constant on the policy alone does count: there is
    no rival in which it would cancel."""
    logps, ref_logps, desirable = random_answers(1)
    kl = torch.tensor(0.5)

    def loss(logps, ref_logps, kl, beta=0.3, labels=desirable, weights=(1.5, 0.75)):
        return m.kto_loss(logps, ref_logps, labels, kl, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])[0]

    base = loss(logps, ref_logps, kl)
    assert torch.allclose(loss(logps + 9, ref_logps + 9, kl), base, atol=1e-12)
    assert torch.allclose(loss(logps + 2, ref_logps, kl + 2), base, atol=1e-12)
    assert torch.allclose(loss(4 * logps, 4 * ref_logps, 4 * kl, beta=0.3 / 4), base, atol=1e-12)
    assert torch.allclose(loss(logps, ref_logps, kl, labels=~desirable, weights=(0.75, 1.5)),
                          torch.where(desirable, 1.5, 0.75).double().mean() - base, atol=1e-12)
    assert abs(loss(logps + 1, ref_logps, kl) - base) > 1e-2


def test_far_gains_and_losses_stay_finite(m):
    """float32, ±10⁴ nats: the loss is 0 or λ, the slope 0."""
    for sign in (1, -1):
        for desirable in (True, False):
            logps = torch.tensor([sign * 1e4], requires_grad=True)
            loss, stats = m.kto_loss(logps, torch.zeros(1), torch.tensor([desirable]), torch.tensor(0.0), beta=1.0, desirable_weight=1.5)
            assert loss.item() == (0 if (sign == 1) == desirable else (1.5 if desirable else 1)) and gradient(loss, [logps]) == [[0]]


def test_a_batch_that_lacks_a_kind(m):
    """Its stats are left out rather than NaN; the loss is a mean over all rows, whatever they are."""
    logps, ref_logps, _ = random_answers(2, 4)
    for desirable, kind in ((torch.ones(4).bool(), "chosen"), (torch.zeros(4).bool(), "rejected")):
        loss, stats = m.kto_loss(logps, ref_logps, desirable, torch.tensor(0.0), beta=0.3)
        assert loss.isfinite() and set(stats) == {f"rewards/{kind}", f"logps/{kind}", "rewards/accuracies"}
        assert stats[f"rewards/{kind}"].item() == pytest.approx(0.3 * (logps - ref_logps).mean().item())


def test_weights_are_exact_in_float64():
    loss = kto.kto_loss(f64(0.0), f64(0.0), torch.tensor([True]), f64(0.0)[0], beta=1.0, desirable_weight=1.1)[0]
    assert loss.item() == pytest.approx(0.55, abs=1e-15)


def test_ranks_are_asserted(m):
    labels = torch.ones(2).bool()
    for shapes in (((2, 3), (2, 3)), ((2,), (3,))):
        with pytest.raises(AssertionError):
            m.kto_loss(*map(torch.zeros, shapes), labels, torch.tensor(0.0), beta=1)
        with pytest.raises(AssertionError):
            m.mismatched_kl(*map(torch.zeros, shapes))
    with pytest.raises(AssertionError):
        m.kto_loss(torch.zeros(2), torch.zeros(2), labels[:1], torch.tensor(0.0), beta=1)


def test_values_by_hand(m):
    """x = β·(ρ − z₀) = 2·(.9 − .4) = 1 for a liked answer, −1 for a disliked one. Concave: −log σ(±1) = .313262, 1.313262. Neutral: ∓1.
    Prospect at x = ±1: −1 and 2.25; at x = 8·(.9 − .4) = 4: 4^.88 = 3.386981. Slopes at x = 1: σ(−1) = .268941 and 1, .88; at −1 the loss's
    slope is .731059, 1 and 2.25·.88 = 1.98; each times β."""
    for value, liked, disliked, up, down in (("concave", 0.313262, 1.313262, 0.268941, 0.731059), ("neutral", -1, 1, 1, 1),
                                             ("prospect", -1, 2.25, 0.88, 1.98), ("logistic", 0.268941, 0.731059, 0.196612, 0.196612)):
        for desirable, lost, slope in ((True, liked, -up), (False, disliked, down)):
            logp = f64(-1.1).requires_grad_()
            loss = m.kto_loss(logp, f64(-2.0), torch.tensor([desirable]), torch.tensor(0.4), beta=2.0, value=value)[0]
            assert loss.item() == pytest.approx(lost, abs=1e-6)
            assert gradient(loss, [logp])[0] == pytest.approx([2 * slope], abs=1e-5)
    assert one(m, -1.1, -2.0, True, 0.4, beta=8.0, value="prospect")[0] == pytest.approx(-3.386981, abs=1e-6)
    assert one(m, -1.1, -2.0, False, 0.4, beta=8.0, value="prospect")[0] == pytest.approx(2.25 * 3.386981, abs=1e-5)


def test_the_prospect_value_has_a_slope_where_a_run_begins(m):
    """At ρ = z₀ the power's slope is infinite. The chord's is .001^−.12 = 2.290868; it meets the power at ±.001, whose value there is
    .001^.88 = .00229087."""
    logp = f64(-2.0).requires_grad_()
    loss = m.kto_loss(logp, f64(-2.0), torch.tensor([True]), torch.tensor(0.0), beta=1.0, value="prospect")[0]
    assert loss.item() == 0 and gradient(loss, [logp])[0] == pytest.approx([-2.290868], abs=1e-6)
    for gain, lost in ((0.0005, -0.00114543), (0.001, -0.00229087), (-0.0005, 2.25 * 0.00114543), (-0.001, 2.25 * 0.00229087)):
        assert one(m, -2 + gain, -2.0, True, 0.0, beta=1.0, value="prospect")[0] == pytest.approx(lost, abs=1e-8)


# -------------------------------------------------------------------------------------------------------- the reference point


def test_the_reference_point_by_hand(m):
    """Log-ratios .4, −1, .2: mean −.1333, so z₀ = 0. With .4, −.1, .3: .2. The mean is clamped, not its terms: (.4 + 0 + .2)/3 = .2 would
    be another number. No gradient comes through it."""
    zeros = f64(0, 0, 0)
    assert m.mismatched_kl(f64(0.4, -1.0, 0.2), zeros).item() == 0
    assert m.mismatched_kl(f64(0.4, -0.1, 0.3), zeros).item() == pytest.approx(0.2, abs=1e-12)
    assert m.mismatched_kl(f64(-2.6, -3.1, -2.7), f64(-3.0, -3.0, -3.0)).item() == pytest.approx(0.2, abs=1e-12)
    logps = f64(0.4, -0.1, 0.3).requires_grad_()
    kl = m.mismatched_kl(logps, zeros)
    assert kl.dim() == 0 and not kl.requires_grad
    slopes = [gradient(m.kto_loss(logps, zeros, torch.tensor([True, True, False]), z0, beta=0.1)[0], [logps]) for z0 in (kl, kl.item())]
    assert slopes[0] == slopes[1]


def test_without_a_reference_z0_is_a_mean_below_zero(m):
    kl = m.mismatched_kl(f64(-4.0, -1.0, -2.5).requires_grad_(), None)
    assert kl.item() == pytest.approx(-2.5, abs=1e-12) and not kl.requires_grad


ROWS = [([2, 0, 1], [2, EOS], True), ([0], [0, 1, 3, EOS], False), ([3, 3], [EOS], True), ([1, 2, 2, 0], [3, 1, EOS], True)]


def batch_of(rows, picked):
    return demo_batch(rows, picked, pad_id=EOS, max_len=16)


def z0_alone(policy, ref, rows):
    """max(0, mean of log π/ref of the answer of the row before, unpadded and one at a time); row 0 takes the last one's."""
    ratios = []
    for i, (prompt, *_) in enumerate(rows):
        answer = rows[(i - 1) % len(rows)][1]
        ratios.append((token_logps_alone(policy, answer, prompt) - token_logps_alone(ref, answer, prompt)).sum().item())
    return max(0.0, sum(ratios) / len(ratios))


def test_the_reference_point_takes_the_answer_of_the_row_before(m):
    """Four prompts and answers of unequal lengths, each prompt with the answer before it, row 0 with the last one; the same whatever the
    micro-batch; 0 with the two models exchanged; no gradient to either. The rows' own answers would give another number."""
    policy, ref = tiny_gpt(seed=0), tiny_gpt(seed=1)
    if z0_alone(policy, ref, ROWS) == 0:
        policy, ref = ref, policy
    expected = z0_alone(policy, ref, ROWS)
    assert expected > 0.05
    for size in (0, 1, 2, 3, 4, 9):
        kl = m.reference_point(policy, ref, ROWS, batch_of, size)
        assert kl.item() == pytest.approx(expected, abs=1e-12) and not kl.requires_grad
    assert m.reference_point(ref, policy, ROWS, batch_of, 0).item() == 0
    assert m.reference_point(policy, policy, ROWS, batch_of, 0).item() == 0
    zero = [math.fsum(token_logps_alone(policy, ROWS[i - 1][1], x).sum().item() for i, (x, *_) in enumerate(ROWS)) / 4]
    assert m.reference_point(policy, None, ROWS, batch_of, 3).item() == pytest.approx(zero[0], abs=1e-12)
    back = ROWS[::-1]
    assert m.reference_point(policy, ref, back, batch_of, 0).item() == pytest.approx(z0_alone(policy, ref, back), abs=1e-12) != expected


# ------------------------------------------------------------------------------------------------------------------- the step


def test_step_sums_the_completions_tokens(m):
    """Two GPTs, answers of unequal length: the loss from each answer's own log-prob; whatever the padding; no gradient for ref."""
    policy, ref, cfg = tiny_gpt(seed=0), tiny_gpt(seed=1), m.Config(beta=0.3, desirable_weight=1.5, undesirable_weight=0.75)
    labels, kl, oracle = torch.tensor([label for *_, label in ROWS]), 0.25, 0.0
    for prompt, answer, label in ROWS:
        rho = (token_logps_alone(policy, answer, prompt) - token_logps_alone(ref, answer, prompt)).sum().item()
        oracle += (1.5 / (1 + math.exp(0.3 * (rho - kl))) if label else 0.75 / (1 + math.exp(0.3 * (kl - rho)))) / 4
    for pad_id in (EOS, 0, 3):
        batch = demo_batch(ROWS, range(4), pad_id=pad_id, max_len=16)
        loss, _ = m.step(policy, ref, batch, labels, torch.tensor(kl), cfg)
        assert loss.item() == pytest.approx(oracle, abs=1e-12)
    loss.backward()
    assert all(p.grad is None for p in ref.parameters()) and policy.head_weight.grad.abs().sum() > 0


def test_step_without_a_reference(m):
    """ρ = log π: ref is not asked."""
    policy, labels, oracle = tiny_gpt(seed=0), torch.tensor([label for *_, label in ROWS]), 0.0
    cfg = m.Config(beta=0.3, reference=False, value="concave", undesirable_weight=0.5)
    for prompt, answer, label in ROWS:
        x = 0.3 * (token_logps_alone(policy, answer, prompt).sum().item() + 2.0)
        oracle += (math.log1p(math.exp(-x)) if label else 0.5 * math.log1p(math.exp(x))) / 4
    batch = demo_batch(ROWS, range(4), pad_id=EOS, max_len=16)
    assert m.step(policy, None, batch, labels, torch.tensor(-2.0), cfg)[0].item() == pytest.approx(oracle, abs=1e-12)


# -------------------------------------------------------------------------------------------------------------------- the law


def expected_loss(m, liked, mu, ref, kl, beta, weights):
    """Of five logits: answers drawn from mu, each liked with its own probability."""
    settings = dict(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])

    def loss(z):
        logps, ref_logps, total = z.log_softmax(0), ref.log(), 0.0
        for y in range(5):
            for label, share in ((True, liked[y]), (False, 1 - liked[y])):
                one = m.kto_loss(logps[[y]], ref_logps[[y]], torch.tensor([label]), torch.tensor(kl), **settings)[0]
                total = total + mu[y] * share * one
        return total

    return loss


def test_answers_that_are_liked_share_so_that_every_flow_is_balanced(m):
    """All five liked more than disliked, by weight: at the minimum (a − b)·σ'(β·(ρ − z₀))/π is one number, a = μ·p·λ_D, b = μ·(1 − p)·λ_U,
    in numpy; a minimum, since the loss rises wherever one goes from it. Another z₀ is another law."""
    _, ref, mu = setting(0)
    liked, weights, beta = f64(0.6, 0.9, 0.75, 0.65, 0.95), (1.5, 0.75), 0.5
    laws = []
    for kl in (0.0, 1.0):
        loss = expected_loss(m, liked, mu, ref, kl, beta, weights)
        z = minimise(loss, ref.log())
        law = z.softmax(0).numpy()
        s = 1 / (1 + np.exp(-beta * (np.log(law / ref.numpy()) - kl)))
        even = mu.numpy() * (1.5 * liked.numpy() - 0.75 * (1 - liked.numpy())) * s * (1 - s) / law
        assert np.ptp(even) < 1e-8 * even.mean() and law.min() > 0.01
        for direction in torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
            assert loss(z + 0.1 * direction) > loss(z)
        laws.append(law)
    assert np.abs(laws[0] - laws[1]).max() > 1e-3


def test_while_gains_are_small_the_shares_are_those_of_the_likes(m):
    """β → 0: σ' is ¼ everywhere, so π ∝ a − b, whatever ref and z₀ are: the values of a and b do matter. At β = 1 ref is back."""
    _, ref, mu = setting(0)
    liked = f64(0.55, 0.95, 0.7, 0.6, 0.8)
    law = (mu * (2 * liked - 1) / (mu * (2 * liked - 1)).sum()).numpy()
    near, far = (minimise(expected_loss(m, liked, mu, ref, 0.5, beta, (1.0, 1.0)), ref.log()).softmax(0).numpy() for beta in (0.01, 1.0))
    assert np.abs(near - law).max() < 1e-4 and np.abs(far - law).max() > 0.02


def test_an_answer_that_is_disliked_is_driven_out(m):
    """One answer disliked more often than liked: wherever the policy stands, its logit is pushed down; ever more weakly as it falls."""
    _, ref, mu = setting(1)
    loss = expected_loss(m, f64(0.4, 0.9, 0.75, 0.65, 0.95), mu, ref, 0.3, 0.5, (1.0, 1.0))

    def push(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(loss(z), z)[0][0].item()

    assert all(push(3 * z) > 0 for z in torch.randn(30, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    pushes = [push(ref.log() - depth * f64(1, 0, 0, 0, 0)) for depth in (5, 10, 20, 40)]
    assert pushes[0] > 2 * pushes[1] > 4 * pushes[2] > 8 * pushes[3] > 0


@pytest.mark.parametrize(("beta", "comes_back"), [(0.5, True), (0.9, True), (1.1, False), (2.0, False)])
def test_a_liked_answer_that_is_rare_comes_back_only_below_beta_one(m, beta, comes_back):
    """For small π of a liked answer its flow is (a − b)·β·σ' ≈ c·π^β, against −π times the flow of all. Below β = 1 the first is larger."""
    _, ref, mu = setting(1)
    z = (ref.log() - 60 * f64(1, 0, 0, 0, 0)).requires_grad_()
    (slope,) = torch.autograd.grad(expected_loss(m, f64(0.9, 0.9, 0.75, 0.65, 0.95), mu, ref, 0.3, beta, (1.0, 1.0))(z), z)
    assert (slope[0] < 0) == comes_back and slope[0] != 0


def expected_slope(m, value, liked, policy, ref, kl, beta, weights):
    """(5,) the expected pull on each answer's log-prob. Each answer is drawn equally often and liked with its own probability."""
    slopes = []
    for y in range(5):
        logp = policy[[y]].log().requires_grad_()
        for label, share in ((True, liked[y]), (False, 1 - liked[y])):
            loss = m.kto_loss(logp, ref[[y]].log(), torch.tensor([label]), torch.tensor(kl), beta=beta, desirable_weight=weights[0],
                              undesirable_weight=weights[1], value=value)[0]
            slopes.append(-share * torch.autograd.grad(loss, logp)[0])
    return torch.stack(slopes).view(5, 2).sum(1) / 5


def test_what_the_values_do_to_an_answer_that_is_seldom_liked(m):
    """One answer of five is liked by 30 %. As its probability falls, the logistic pushes ever more weakly and neutral as before. Concave
    pushes up below σ(β·(ρ − z₀)) = .3, so that some probability stays. Prospect pushes up below the reference point and down above it if
    likes and dislikes differ by less than 2.25 times, as .4 and .6 do, but not .3 and .7."""
    ref, liked = torch.full((5,), 0.2).double(), f64(0.3, 0.9, 0.9, 0.9, 0.9)

    def push(value, rho, share=0.3):
        policy = ref * f64(rho, 0, 0, 0, 0).exp()
        return expected_slope(m, value, torch.cat([f64(share), liked[1:]]), policy, ref, 0.0, 0.5, (1.0, 1.0))[0].item()

    assert push("logistic", -20) > 1e-3 * push("logistic", -2) and push("logistic", -2) < push("logistic", -20) < 0
    assert push("neutral", -20) == push("neutral", -2) == pytest.approx(0.5 * (0.3 - 0.7) / 5)
    rest = math.log(0.3 / 0.7) / 0.5
    assert push("concave", rest) == pytest.approx(0, abs=1e-12) and push("concave", rest - 1) > 0 > push("concave", rest + 1)
    assert push("prospect", -0.1, 0.4) > 0 > push("prospect", 0.1, 0.4)
    assert push("prospect", -0.1, 0.3) < 0 > push("prospect", 0.1, 0.3) and push("prospect", -0.1, 0.7) > 0 < push("prospect", 0.1, 0.7)


def test_the_loss_of_a_population_is_its_formula(m):
    """const − Σ (a − b)·σ(β·(ρ − z₀)), const = Σ a: at any policy."""
    _, ref, mu = setting(2)
    liked, (D, U) = f64(0.1, 0.9, 0.5, 0.3, 0.7), (1.5, 0.75)
    loss = expected_loss(m, liked, mu, ref, 0.5, 0.3, (D, U))
    for seed in range(3):
        z = setting(seed + 3)[0]
        a, b = mu * liked * D, mu * (1 - liked) * U
        formula = a.sum() - ((a - b) * torch.sigmoid(0.3 * (z.log_softmax(0) - ref.log() - 0.5))).sum()
        assert loss(z).item() == pytest.approx(formula.item(), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------- main


@pytest.fixture
def account(small):
    """account(**settings): four steps of a run and the same steps written out again, weights, losses and z₀."""

    def check(**settings):
        fixed = dict(steps=4, held_out=0.0, schedule="constant", warmup=0.0, micro_batch=3, beta=0.3, desirable_weight=1.5,
                     undesirable_weight=0.75, lr=1e-2)
        module, cfg = small("kto", **{**fixed, **settings})
        folder, z0 = module.main(cfg), []
        rows = encode_feedback(load_tokenizer(cfg.policy), read_feedback(cfg.feedback))

        def loss_of_batch(k, picked, policy, ref, rows):
            with torch.no_grad():
                z0.append(z0_alone(policy, ref, [rows[i] for i in picked]))
            losses = []
            for i in picked:
                x, y, label = rows[i]
                with torch.no_grad():
                    at_ref = token_logps_alone(ref, y, x).sum()
                gain = token_logps_alone(policy, y, x).sum() - at_ref - z0[-1]
                losses.append(1.5 / (1 + (0.3 * gain).exp()) if label else 0.75 / (1 + (-0.3 * gain).exp()))
            return sum(losses) / len(losses)

        replay(folder, cfg, rows, loss_of_batch)
        logged = read_rows(folder / "metrics.jsonl")
        assert [row["z0"] for row in logged] == pytest.approx(z0, abs=1e-9)
        return logged, rows, cfg

    return check


def test_main_is_its_account(account):
    """The reference point is not 0 throughout, or the test would say nothing about it."""
    logged, rows, _ = account()
    assert len(rows) == 40 and sum(label for *_, label in rows) == 20  # a pair is two answers
    assert any(row["z0"] > 1e-3 for row in logged) and logged[0]["z0"] == 0


def test_a_run_without_reference_point_or_reference(small):
    """--no-z0: z₀ is 0 at every step. --no-reference: it is below 0, and the loss at step 1 is ½ with no help from a second model. Both
    train, and both differ from KTO."""
    losses = {}
    for name, settings in (("kto", {}), ("no z0", {"z0": False}), ("alone", {"reference": False}), ("prospect", {"value": "prospect"})):
        module, cfg = small("kto", steps=4, beta=0.3, lr=1e-2, held_out=0.2, batch_size=8, **settings)
        rows = read_rows(module.main(cfg) / "metrics.jsonl")
        losses[name] = [row["loss"] for row in rows]
        assert all((row["z0"] == 0) if name == "no z0" else (row["z0"] < -1) if name == "alone" else row["z0"] >= 0 for row in rows)
        assert math.isfinite(rows[-1]["eval/loss"])
    assert len({row[-1] for row in losses.values()}) == 4 and losses["kto"][0] == losses["no z0"][0] == 0.5
    module, cfg = small("kto", steps=1, z0=False, batch_size=1)
    assert module.main(cfg)


def test_a_file_of_thumbs_with_one_kind_only(account, tmp_path, capsys):
    """Nothing is disliked: the run says so, trains, and leaves out what it has no numbers for."""
    path = tmp_path / "as_feedback.jsonl"
    rows = [{"prompt": f"ask for {thing}: ", "completion": f"{thing}, please.", "label": True} for thing in ("tea", "salt", "rope", "ink")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    logged, _, _ = account(feedback=str(path))
    assert "4 of 4 answers are desirable; none undesirable (the paper advises 1 to 4/3)" in capsys.readouterr().out
    assert all("rewards/chosen" in row and "rewards/rejected" not in row for row in logged)


def test_a_run_says_how_its_weights_stand(small, capsys):
    """20 answers of each kind, .9·20 / (.75·20) = 1.20."""
    module, cfg = small("kto", steps=1, held_out=0.0, desirable_weight=0.9, undesirable_weight=0.75)
    module.main(cfg)
    assert "20 of 40 answers are desirable; λ_D·n_D / (λ_U·n_U) = 1.20 (the paper" in capsys.readouterr().out


def test_held_out_answers_are_those_never_trained_on(small):
    """The last ten of forty answers, all under the reference point of the ten, in an order in which neighbours have other prompts, whatever
    the batches; nothing of it changes the training."""
    logged = {}
    for batch_size in (8, 4):
        module, cfg = small("kto", held_out=0.25, batch_size=batch_size, beta=0.3, steps=4)
        folder = module.main(cfg)
        policy, ref, tokenizer = load_pretrained(folder / "final"), load_pretrained(cfg.policy), load_tokenizer(cfg.policy)
        rows = encode_feedback(tokenizer, read_feedback(cfg.feedback))[30:]
        kl, loss, right = z0_alone(policy, ref, [rows[i] for i in batch_rows(10, 10, 0, 0)]), 0.0, 0.0
        for x, y, label in rows:
            with torch.no_grad():
                gain = (token_logps_alone(policy, y, x) - token_logps_alone(ref, y, x)).sum().item() - kl
            gain = gain if label else -gain
            loss, right = loss + (1 - 1 / (1 + math.exp(-0.3 * gain))) / 10, right + (gain > 0) / 10
        logged[batch_size] = read_rows(folder / "metrics.jsonl")[-1]
        assert logged[batch_size]["eval/loss"] == pytest.approx(loss, abs=1e-9)
        assert logged[batch_size]["eval/accuracy"] == pytest.approx(right, abs=1e-6)
        assert {i for k in range(4) for i in batch_rows(30, batch_size, k, 0)} <= set(range(30))


def test_one_answer_has_no_reference_point(small, tmp_path, capsys):
    """It would be compared with itself. One of 40 held out: no eval/ metric, and a note; one answer in all: refused."""
    module, cfg = small("kto", steps=1, held_out=0.025)
    metrics = read_rows(module.main(cfg) / "metrics.jsonl")[-1]
    assert not any(name.startswith("eval/") for name in metrics) and "note: no eval/loss" in capsys.readouterr().err
    (tmp_path / "one.jsonl").write_text('{"prompt": "ask for tea: ", "completion": "tea", "label": true}\n')
    module, cfg = small("kto", feedback=str(tmp_path / "one.jsonl"))
    with pytest.raises(BadInput, match="one.jsonl: one answer to train on"):
        module.main(cfg)


@pytest.mark.parametrize(("changes", "message"), [
    ({"value": "convex"}, "--value convex: must be one of logistic, prospect, concave, neutral"),
    ({"batch_size": 1}, "--batch_size 1: the reference point needs an answer to another prompt; use at least 2"),
    ({"beta": 0.0}, "--beta 0.0: must be above 0"), ({"desirable_weight": -1.0}, "--desirable_weight -1.0: must be at least 0"),
    ({"undesirable_weight": -1.0}, "--undesirable_weight -1.0: must be"), ({"feedback": "absent.jsonl"}, "absent.jsonl: cannot be read"),
])
def test_bad_settings(small, changes, message):
    with pytest.raises(BadInput, match=message):
        module, cfg = small("kto", **changes)
        module.main(cfg)
