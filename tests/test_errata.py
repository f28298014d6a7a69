"""docs/ERRATA.md: the mistakes that no other test or toy proves, each by hand arithmetic, and what the project does instead.

A test is named after its erratum: juice = "Getting More Juice Out of the SFT Data", ift = "Intuitive Fine-Tuning", lecture = "Alignment and
RL for LLMs". The other rows of that page name their tests elsewhere; the last test here sees that each of them exists.
"""

import ast
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from minialign.batch import collate
from minialign.evaluate import verdict
from minialign.logps import seq_logps
from minialign.methods.gpo import gpo_loss
from minialign.methods.grpo import grpo_loss
from minialign.methods.ift import ift_loss
from minialign.methods.ipo import ipo_loss
from minialign.methods.irft import irft_loss
from minialign.methods.ppo import policy_loss
from tests.enumerable import EOS, tiny_gpt
from toy import closed_form

ROOT = Path(__file__).parent.parent


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# --------------------------------------------------------------------------------------- Getting More Juice Out of the SFT Data


def test_juice_lemma_b3_constant():
    """π(y1) = ½ + a·sin θ, π(y2) = ½ − a·sin θ with a = .01, the demonstration y1. ‖∇π‖ ≤ L0 = √2·a (at θ = 0), |∇²π| ≤ L1 = a,
    π within [.49, .51]. By Eq. 15 ∇ℓ = ∇log π(y1), as E_π[∇log π] = 0; around θ = π/2, where sin is flat, it changes by
    a/(½ + a) = .0196 per unit of θ. Printed L = L0·(3·L0 + L1)/π_min² = .01414·(.04243 + .01)/.2401 = .0031: too small, six times. What
    the proof arrives at, 2·(π_max·L1 + 2·L0²)/π_min² = 2·(.0051 + .0004)/.2401 = .0458, holds; its factor 1/β must go too, for β = 10
    makes it .0046, and ∇ℓ knows no β."""
    a, step = 0.01, 1e-3

    def slope(theta):
        p = 0.5 + a * math.sin(theta)
        return a * math.cos(theta) / p

    change = abs(slope(math.pi / 2 + step) - slope(math.pi / 2 - step)) / (2 * step)
    L0, L1, low, high = math.sqrt(2) * a, a, 0.5 - a, 0.5 + a
    printed, proved = L0 * (3 * L0 + L1) / low**2, 2 * (high * L1 + 2 * L0**2) / low**2
    assert change == pytest.approx(a / (0.5 + a), rel=1e-5)
    assert printed == pytest.approx(0.0031, abs=1e-4) and proved == pytest.approx(0.0458, abs=1e-4)
    assert change > 6 * printed and change < proved and change > proved / 10


def test_juice_assumption_b1_norm():
    """π = (1 − θ, θ) at θ = .01: the maximum norm is .99, well above π_min = ½, and L0 = ‖∇π‖ = √2. The lemma's G = 2·L0/π_min = 5.66
    should bound ∇log π(y2) − ∇log π(y1) = 1/θ + 1/(1 − θ) = 101.01. It does with the smallest probability for π_min: 2·√2/.01 = 283."""
    theta = f64(0.01).requires_grad_()
    policy = torch.cat([1 - theta, theta])
    estimate = torch.autograd.grad(policy[1].log() - policy[0].log(), theta)[0].item()
    assert estimate == pytest.approx(1 / 0.01 + 1 / 0.99) and policy.max() >= 0.5
    assert estimate > 2 * math.sqrt(2) / 0.5 and estimate < 2 * math.sqrt(2) / policy.min().item()


def test_juice_theorem_3_1_square_of_a_sum():
    """K = 10 equal gradients of length G = 1: ‖Σ_{i<k} g‖² = k², so Σ_k of it is 0 + 1 + 4 + … + 81 = 285. The proof takes
    k·G², the sum 45. Right is k²G², so the last term of the bound grows with K²: large K is not harmless."""
    G = torch.ones(10, 1, dtype=torch.float64)
    left = sum(G[:k].sum(0).norm() ** 2 for k in range(10)).item()
    assert left == 285 == 9 * 10 * 19 / 6 and sum(range(10)) == 45 == 10 * 9 / 2 < left


def expected_irft(logits, demos, own):
    """The gradient of identity IRFT, β = 1, over all pairs of a demonstration and an own answer with these probabilities."""
    z = logits.clone().requires_grad_()
    y, other = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    logps = z.log_softmax(0)
    weights, ref = demos[y] * own[other] * 9, torch.zeros(9, dtype=torch.float64)  # the loss is a mean over nine rows
    loss, _ = irft_loss(weights * logps[y], weights * logps[other], ref, ref, beta=1.0, h="identity")
    return torch.autograd.grad(loss, z)[0]


def test_juice_greedy_answers_are_not_samples():
    """The released scripts generate without sampling arguments: greedy. The law then is another: identity h, π = E = .5 .3 .2: with
    samples the expected gradient is −(E − π) = 0, with the likeliest answer instead −(.5 .3 .2 − 1 0 0) = .5 −.3 −.2."""
    E = f64(0.5, 0.3, 0.2)
    assert expected_irft(E.log(), E, E).tolist() == pytest.approx([0, 0, 0], abs=1e-15)
    assert expected_irft(E.log(), E, f64(1, 0, 0)).tolist() == pytest.approx([0.5, -0.3, -0.2], abs=1e-15)


def test_juice_scorer_reads_the_attention_mask():
    """The released scorer's labels are the attention mask: 1 wherever there is a token. Then the score of an answer is the log-prob of
    token 1 said over and over: two answers that differ in their last token alone, which no prediction has seen, get one score."""
    policy = tiny_gpt()
    batch = collate([[2, 0], [2, 0]], [[3, 1, EOS], [3, 1, 2]], pad_id=0)
    with torch.no_grad():
        right = seq_logps(policy, batch)
        batch.targets = torch.ones_like(batch.targets)
        wrong = seq_logps(policy, batch)
    assert wrong[0] == wrong[1] and abs(right[0] - right[1]) > 1e-3


def test_juice_irft_reads_four_times_what_sft_reads(small, monkeypatch):
    """"The memory of SFT" needs ref's log-probs beforehand: a step reads demonstrations and own answers, each by policy and by ref."""
    reads = []
    irft, _ = small("irft", steps=1)
    policy, ref = tiny_gpt(), tiny_gpt(seed=1)
    for model in (policy, ref):
        def hidden(inputs, *args, original=model.hidden, **kwargs):
            reads.extend([torch.is_grad_enabled()] * len(inputs))
            return original(inputs, *args, **kwargs)

        model.hidden = hidden
    demos, own = (collate([[0]], [y], pad_id=EOS) for y in ([1, 3, EOS], [2, EOS]))
    irft.step(policy, ref, demos, own, irft.Config())
    assert reads == [True, True, False, False]


def test_juice_table_3_average():
    """Table 3's T = 16: 56.34 + 31.54 + 58.41 + 1.59 + 54.54 + 25.69 = 228.11, a sixth is 38.018; 37.57 is printed. T = 10 comes second,
    and its average is right: 226.16 / 6 = 37.693."""
    scores = {16: (56.34, 31.54, 58.41, 1.59, 54.54, 25.69), 10: (53.75, 31.92, 57.85, 2.43, 54.77, 25.44)}
    means = {T: math.fsum(six) / 6 for T, six in scores.items()}
    assert means[16] == pytest.approx(38.0183, abs=1e-4) and means[10] == pytest.approx(37.69, abs=0.005) and means[16] > 37.57 + 0.4
    recipe = (ROOT / "minialign/recipes/irft_ultrachat_pythia.py").read_text(encoding="utf-8")
    assert "T16 37.57" in recipe and f"{means[16]:.2f}" in recipe


# ------------------------------------------------------------------------------------------------------ Intuitive Fine-Tuning


LOSSES = [1.0, 2.0, 0.5, 4.0]


def weights(losses, decay):
    """What the project weights the tokens by: 4 times the gradient of its loss in the token losses."""
    logps = (-f64(losses)).requires_grad_()
    loss, _ = ift_loss(logps, torch.ones(1, len(losses)).bool(), decay=decay)
    return (-4 * torch.autograd.grad(loss, logps)[0][0]).tolist(), loss.item()


def test_ift_eq_22_weights():
    """Σ_{n=0}^{3} Σ_{i≥n} ℓ_i has ℓ_i once for each n ≤ i: 1 2 3 4 times, of mean 1: .4 .8 1.2 1.6, the last token heaviest. For equal
    losses the suffix sums of Algorithm 1 are 4 3 2 1: 1.6 1.2 .8 .4, the first one heaviest."""
    times = [sum(1 for n in range(4) for i in range(n, 4) if i == t) for t in range(4)]
    assert [t / 2.5 for t in times] == [0.4, 0.8, 1.2, 1.6]
    assert weights([1.0] * 4, 1.0)[0] == pytest.approx([1.6, 1.2, 0.8, 0.4], abs=1e-12)


def test_ift_algorithm_1_weights():
    """w_t = Σ_{i≥t} α^{N−t}·ℓ_i, α = .95: the power does not depend on i, so it is α^{N−t} times the suffix sums 7.5 6.5 4.5 4:
    6.4303 5.8663 4.275 4, of mean 1: 1.2505 1.1408 .8314 .7779. The code's α^{i−t} gives 1.2815 1.1500 .8126 .7559. And w·ℓ as it stands
    is of degree 2 in the losses (ℓ twice as large: four times the loss), the code's of degree 1. With log P in the place of ℓ, as line 12
    has it, those weights are negative and the sign comes out right; divided by their mean they are positive, and it does not."""
    literal = [0.95 ** (3 - t) * sum(LOSSES[t:]) for t in range(4)]
    assert literal == pytest.approx([6.4303, 5.8663, 4.275, 4.0], abs=1e-4)
    normalised = [4 * w / sum(literal) for w in literal]
    assert normalised == pytest.approx([1.2505, 1.1408, 0.8314, 0.7779], abs=1e-3)
    ours, loss = weights(LOSSES, 0.95)
    assert ours == pytest.approx([1.2815, 1.1500, 0.8126, 0.7559], abs=1e-4) and max(map(abs, np.subtract(ours, normalised))) > 0.02
    negative = [-w for w in literal]  # line 12 has log P where the loss is −log P: descent on w·log P raises it as long as w < 0
    assert max(negative) < 0 < min(4 * w / sum(negative) for w in negative)
    doubled = [2 * x for x in LOSSES]
    once, twice = (sum(0.95 ** (3 - t) * sum(x[t:]) * x[t] for t in range(4)) for x in (LOSSES, doubled))
    assert twice == pytest.approx(4 * once) and weights(doubled, 0.95)[1] == pytest.approx(2 * loss)


def test_ift_eq_20_sign():
    """Minimising log(T̂/T*) with T* = 1 is minimising log T̂: one descent step of size 1 from T̂ = σ(0) = .5 has slope 1 − .5 = .5 in the
    logit, so it goes to σ(−.5) = .378, away from 1; Eq. 22's −log T̂ goes to σ(.5) = .622."""
    for sign, after in ((1, 0.378), (-1, 0.622)):
        logit = f64(0.0).requires_grad_()
        (slope,) = torch.autograd.grad(sign * logit.sigmoid().log().sum(), logit)
        assert (logit - slope).sigmoid().item() == pytest.approx(after, abs=1e-3)


def test_ift_eq_26_product():
    """T = .5 .4 .8: exp(−Σℓ) is the product .5·.4·.8 = .16; printed, with a sum in the brackets, .5·(.4 + .8) = .6. The reward chosen
    there, r = (1 − γ)·V', makes r + γ·V' = V' whatever γ and V' are: it cannot say that anything satisfies Bellman's equation."""
    T = [0.5, 0.4, 0.8]
    assert math.exp(sum(math.log(t) for t in T)) == pytest.approx(0.16) and T[0] * sum(T[1:]) == pytest.approx(0.6)
    for gamma, V in itertools.product((0.0, 0.5, 0.95), (-3.0, 0.0, 7.0)):
        assert (1 - gamma) * V + gamma * V == pytest.approx(V)


# Two first words, A (.6) and B (.4); after A one of two with ½ each, after B always the same.
CHAIN = {"": {"A": 0.6, "B": 0.4}, "A": {"Ax": 0.5, "Ay": 0.5}, "B": {"Bz": 1.0}}


def reach(state):
    """Probability of getting to a state from the start: the product over the actions before it."""
    return 1.0 if state == "" else reach(state[:-1]) * CHAIN[state[:-1]][state]


def test_ift_eq_10_off_by_one():
    """The product to i = n includes the action taken *in* s_n: T(s_0|s_0) would be .6 or .4, and is 1; over the states one action on it is
    .6 and .4, of sum 1, where the printed one sums over .6·.5 + .4·1 = .7 if each state goes on as it likes best."""
    assert reach("") == 1 and reach("A") + reach("B") == 1 == reach("Ax") + reach("Ay") + reach("Bz")
    assert sum(reach(s) * max(CHAIN[s].values()) for s in ("A", "B")) == pytest.approx(0.7)


def test_ift_independent_events():
    """Three coins are independent, P(heads) = ½ each: the sum is 1.5, not 1. What sums to 1 excludes one another and leaves nothing out."""
    coins = list(itertools.product((0, 1), repeat=3))
    heads = [[c for c in coins if c[i]] for i in range(3)]
    assert sum(len(h) / 8 for h in heads) == 1.5
    assert all(len(set(a) & set(b)) / 8 == len(a) / 8 * len(b) / 8 for a, b in itertools.combinations(heads, 2))


def test_ift_eq_12_greedy():
    """Eq. 12: no answer is likelier than the greedy one. Greedy takes A (.6), then either: .6·.5 = .30; B, z has .4·1 = .40."""
    greedy = max(CHAIN[max(CHAIN[""], key=CHAIN[""].get)], key=CHAIN["A"].get)
    assert greedy[0] == "A" and reach(greedy) == pytest.approx(0.30)
    assert max(reach(s) for s in ("Ax", "Ay", "Bz")) == reach("Bz") == pytest.approx(0.40)


def test_ift_frozen_lake_learning_rate():
    """RMSprop (decay .99), learning rate 5e-7, a gradient of 1: v = .01 .0199 .029701, steps of lr/√v = 10 7.0888 5.8025 times lr, together
    5.0e-6, 8.54e-6, 1.14e-5: "three epochs at the hyper-parameters of NLP" on one trajectory move a weight by a hundred-thousandth."""
    weight, moved = torch.zeros(1, dtype=torch.float64, requires_grad=True), []
    optimizer = torch.optim.RMSprop([weight], lr=5e-7)
    for _ in range(3):
        weight.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        moved.append(-weight.item())
    assert moved == pytest.approx([5.0e-6, 8.5444e-6, 1.14457e-5], rel=1e-4)


def test_ift_embeddings_are_trained(small):
    """The released code reads its inputs from a frozen copy of the first embeddings; here they learn like all else."""
    module, cfg = small("ift", steps=2)
    policy = tiny_gpt()
    loss, _ = module.step(policy, collate([[0]], [[1, 3, EOS]], pad_id=EOS), module.Config())
    loss.backward()
    assert policy.tok_embed.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ Alignment and RL for LLMs


def test_lecture_clip_bounds():
    """Clip(δ, 1 + ε, 1 − ε) with ε = .2: the lower bound 1.2 lies above the upper, and every ratio becomes .8; right: .8 1 1.2."""
    ratios = f64(0.5, 1.0, 1.5)
    assert ratios.clamp(1.2, 0.8).tolist() == [0.8] * 3 == np.clip(ratios.numpy(), 1.2, 0.8).tolist()
    slopes = []
    for ratio, objective in ((0.5, 0.5), (1.0, 1.0), (1.5, 1.2)):  # A = 1: min(ρ, clip ρ)
        logps = f64(ratio).log()[None].requires_grad_()
        loss, _ = policy_loss(logps, torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.ones(1, 1).bool(), eps=0.2)
        slopes.append(torch.autograd.grad(loss, logps)[0].item())
        assert -loss.item() == pytest.approx(objective)
    assert slopes == pytest.approx([-0.5, -1.0, 0.0])


def two_arms(loss_of):
    """The descent direction at equal logits, each of two arms drawn once, rewards 1 and 0. loss_of(ratios (2,), rewards (2,))."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(0)
    return (-torch.autograd.grad(loss_of((logps - logps.detach()).exp(), f64(1, 0)), logits)[0]).tolist()


def test_lecture_minimises_the_negative_of_a_loss():
    """Its ℓ̂ = −r is a loss; it then minimises −min(δ·ℓ̂, ·) = r·δ. Per answer, arms drawn once each at π = ½ ½: the descent direction is
    −(1·(½, −½) + 0)/2 = (−¼, ¼), away from the rewarded arm. Ours, with A = r − ½: (½·(½, −½) − ½·(−½, ½))/2 = (¼, −¼)."""
    def printed(ratios, rewards):
        return -torch.minimum(ratios * -rewards, ratios.clamp(0.8, 1.2) * -rewards).mean()

    def ours(ratios, rewards):
        column = ratios.log()[:, None]
        return policy_loss(column, torch.zeros_like(column), (rewards - 0.5)[:, None], torch.ones(2, 1).bool(), eps=0.2)[0]

    assert two_arms(printed) == pytest.approx([-0.25, 0.25]) and two_arms(ours) == pytest.approx([0.25, -0.25])


def test_lecture_averages_the_ratios_first():
    """δ = (ratio of arm 1 + ratio of arm 2)/2 has the gradient ((½, −½) + (−½, ½))/2 = 0: one number times one number learns nothing of
    which arm was paid."""
    def printed(ratios, rewards):
        loss = -rewards.mean()
        return -torch.minimum(ratios.mean() * loss, ratios.mean().clamp(0.8, 1.2) * loss)

    assert two_arms(printed) == pytest.approx([0, 0], abs=1e-15)


def test_lecture_ipo_h():
    """π = .6 .4, ref = .5 .5: the first line, log(.6/.4) − .5/.5 = .405465 − 1 = −.594535; with the log on both, .405465 − 0. IPO's loss at
    β = 1 is (.405465 − ½)² = .008937, not (−.594535 − ½)² = 1.198."""
    h = math.log(0.6 / 0.4) - math.log(0.5 / 0.5)
    assert math.log(0.6 / 0.4) - 0.5 / 0.5 == pytest.approx(-0.594535, abs=1e-6) and h == pytest.approx(0.405465, abs=1e-6)
    loss, _ = ipo_loss(f64(0.6).log(), f64(0.4).log(), f64(0.5).log(), f64(0.5).log(), beta=1.0)
    assert loss.item() == pytest.approx((h - 0.5) ** 2, abs=1e-15) == pytest.approx(0.008937, abs=1e-6)


def test_lecture_ipo_objective_without_beta():
    """E_π[g] − KL(π‖ref), as printed, has its maximum at ref·e^g; the next slide's ref·e^{g/β} is that of E_π[g] − β·KL. ref = .5 .3 .2,
    g = .2 .5 .9, β = .3: slopes in the logits at each."""
    ref, g, beta = f64(0.5, 0.3, 0.2), f64(0.2, 0.5, 0.9), 0.3

    def slope(pull, at):
        logits = torch.tensor(closed_form.tilt(ref.numpy(), g.numpy(), at)).log().requires_grad_()
        law = logits.softmax(0)
        return torch.autograd.grad((law * (g - pull * (law / ref).log())).sum(), logits)[0].abs().max().item()

    assert slope(1.0, 1.0) < 1e-12 and slope(beta, beta) < 1e-12 and slope(1.0, beta) > 0.1


def test_lecture_hinge_of_a_pair_and_of_a_cycle():
    """.7·(1 − x) + .3·(1 + x) = 1 − .4·x for |x| < 1, x = β·Δ: a pair alone goes to x = 1. Three in a cycle, each preferred to the next
    in .7 of the cases: 3 − .4·(x_ab + x_bc + x_ca) = 3, as the x sum to 0: no slope anywhere within the margins."""
    def hinge(x):  # x = β·Δ of the preferred answer over the other one
        losses = [gpo_loss(f64(way * x), f64(0.0), f64(0.0), f64(0.0), beta=1.0, f="hinge")[0].item() for way in (1, -1)]
        return 0.7 * losses[0] + 0.3 * losses[1]

    assert hinge(0.5) == pytest.approx(0.8) and hinge(1.0) == pytest.approx(0.6) and hinge(1.5) > 0.7
    for a, b, c in ((0.0, 0.0, 0.0), (0.4, -0.1, -0.3), (-0.2, 0.6, 0.1)):
        assert hinge(a - b) + hinge(b - c) + hinge(c - a) == pytest.approx(3.0)


def test_lecture_grpo_single_update():
    """Rewards +1 −1, one token each, π/ref = 2: at ratio 1 the objective's value is mean A = 0 less β·k3 = β·(½ − 1 + log 2) = .1931β; its
    "simplified" form has the value mean A·log π, which is not it, and no KL. The slopes in log π: A/2 against A/2 − β·(1 − ½)/2."""
    logps, ref_logps, A, mask = f64(-0.3, -1.2)[:, None], f64(-0.3, -1.2)[:, None] - math.log(2), f64(1, -1), torch.ones(2, 1).bool()
    slopes = {}
    for beta in (0.0, 0.4):
        x = logps.clone().requires_grad_()
        loss, _ = grpo_loss(x, logps, ref_logps, A, mask, eps=0.2, beta=beta)
        slopes[beta] = -torch.autograd.grad(loss, x)[0][:, 0]
        assert -loss.item() == pytest.approx(-beta * (math.log(2) - 0.5), abs=1e-12)
    x = logps.clone().requires_grad_()
    simple = (A[:, None] * x).mean()
    (slope,) = torch.autograd.grad(simple, x)
    assert simple.item() == pytest.approx((-0.3 + 1.2) / 2) and slopes[0.0].tolist() == pytest.approx(slope[:, 0].tolist())
    assert (slopes[0.4] - slope[:, 0]).tolist() == pytest.approx([-0.1, -0.1], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------- the page itself


def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_page_names_a_proof_that_exists():
    """Each row links to or names a test file, a toy or a variant; each `test_…` is a function of a test file."""
    page = (ROOT / "docs/ERRATA.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if re.match(r"^\| [ABC] \|", row)]
    known = set().union(*(functions(path) for path in (ROOT / "tests").rglob("test_*.py")))
    files = {path.stem for folder in ("tests", "toy") for path in (ROOT / folder).rglob("*.py")}
    variants = set(re.findall(r'\("(\w+)", "([^"]+)"', (ROOT / "tests/test_wrong_variants.py").read_text(encoding="utf-8")))
    assert len(rows) > 40 and all(row.count("|") - row.count("\\|") == 6 for row in rows)
    for row in rows:
        proof = row.split(" | ")[-1]
        assert set(re.findall(r"\b\w+\b", proof)) & files, row
        for name in re.findall(r"`(test_\w+)", proof):
            assert name in known, (name, row)
        for method, wrong in re.findall(r"`(\w+): ([^`]+)`", proof):
            assert (method, wrong) in variants or wrong in "".join(w for _, w in variants), (method, wrong)


def test_the_page_of_claims_says_what_the_demo_found():
    """docs/CLAIMS.md prints docs/demo.json: each of its claims, as mean ± half-width and seeds, stands in a row with its verdict."""
    page = (ROOT / "docs/CLAIMS.md").read_text(encoding="utf-8").replace("−", "-")
    for claim in json.loads((ROOT / "docs/demo.json").read_text(encoding="utf-8"))["claims"]:
        mean, half, favour, word = verdict(claim["differences"])
        assert word == claim["verdict"]
        rows = [row for row in page.splitlines() if f"{mean:+.3f} ± {half:.3f}" in row and f"{favour}/{len(claim['differences'])}" in row]
        assert rows, claim
        if claim["source"] != "their price":  # what it cost stands beside a claim, and is none
            assert any(f"**{word}**" in row for row in rows), (word, rows)


def test_every_erratum_proved_here_is_on_the_page():
    page = (ROOT / "docs/ERRATA.md").read_text(encoding="utf-8")
    own = [name for name in functions(Path(__file__)) if re.match(r"test_(juice|ift|lecture)_", name)]
    assert len(own) >= 20 and [name for name in own if f"`{name}`" not in page] == []
