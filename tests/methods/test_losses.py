"""Every loss against its formula, written a second time in plain Python numbers and loops: values, and gradients by differences.

The formulas here are those of docs/METHODS.md and of the papers; no tensor and no function of minialign takes part in them. Inputs are
drawn at random: small and large log-probs, rows of every length, rows with nothing scored.
"""

import math
import random
from math import exp, log

import pytest
import torch

from minialign.methods import (
    best_of_n,
    dpo,
    gpo,
    grpo,
    ift,
    ipo,
    irft,
    irl,
    kto,
    orpo,
    ppo,
    rebel,
    reinforce,
    rest,
    reward_model,
    rft,
    rloo,
    sft,
    simpo,
    slic,
)

STEP = 1e-5  # of the differences


def softplus(x):
    return max(x, 0) + math.log1p(exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))


def mean(values):
    values = [*values]
    return math.fsum(values) / len(values)


def clip(x, low, high):
    return min(max(x, low), high)


def vectors(names):
    """Random log-probs or rewards of B rows for each name."""
    def draw(rng):
        B, size = rng.randint(1, 4), rng.choice([0.1, 1, 30])
        return {name: [rng.uniform(-size, size) - 3 * size * ("logps" in name) for _ in range(B)] for name in names.split()}

    return draw


def tables(names, constants=""):
    """(B, T) numbers for each of `names`, B numbers for each of `constants`, and a mask of adjacent tokens, which may be none."""
    def draw(rng):
        B, T, size = rng.randint(1, 3), rng.randint(1, 5), rng.choice([0.1, 1, 4])
        def row():
            return [rng.uniform(-size, 0) for _ in range(T)]
        ends = [sorted((rng.randint(0, T), rng.randint(0, T))) for _ in range(B)]
        given = {name: [row() for _ in range(B)] for name in names.split()}
        given |= {name: [rng.uniform(-2, 2) for _ in range(B)] for name in constants.split()}
        return given | {"mask": [[begin <= t < end for t in range(T)] for begin, end in ends]}

    return draw


def scored(mask):
    """(b, t) of every scored token."""
    return [(b, t) for b, row in enumerate(mask) for t, is_scored in enumerate(row) if is_scored]


def margins(chosen, rejected, ref_chosen, ref_rejected):
    return [(c - rc) - (r - rr) for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)]


def dpo_value(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, label_smoothing):
    return mean((1 - label_smoothing) * softplus(-beta * d) + label_smoothing * softplus(beta * d)
                for d in margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))


def ipo_value(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    return mean((d - 0.5 / beta) ** 2 for d in margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))


def gpo_value(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, f):
    table = {"logistic": lambda x: softplus(-x), "hinge": lambda x: max(0, 1 - x), "squared": lambda x: (1 - x) ** 2,
             "exponential": lambda x: exp(-x), "truncated_quadratic": lambda x: max(0, 1 - x) ** 2, "savage": lambda x: sigmoid(-x) ** 2}
    return mean(table[f](beta * d) for d in margins(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))


def irft_value(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps, beta, h):
    table = {"logistic": lambda x: softplus(-x), "hinge": lambda x: max(0, 1 - x), "identity": lambda x: -x}
    return mean(table[h](beta * d) for d in margins(demo_logps, sample_logps, ref_demo_logps, ref_sample_logps))


def slic_value(chosen_logps, rejected_logps, target_logps, delta, weight):
    return mean(max(0, delta - c + r) - weight * t for c, r, t in zip(chosen_logps, rejected_logps, target_logps, strict=True))


def simpo_value(chosen_logps, rejected_logps, scale, target_margin):
    return mean(softplus(-(scale * c - scale * r - target_margin)) for c, r in zip(chosen_logps, rejected_logps, strict=True))


def orpo_value(chosen_logps, rejected_logps, weight):
    def odds(a):
        return a - log(-math.expm1(a))

    return mean(-c + weight * softplus(odds(r) - odds(c)) for c, r in zip(chosen_logps, rejected_logps, strict=True))


def kto_value(logps, ref_logps, desirable, kl, beta, desirable_weight, undesirable_weight, value):
    lost = {"logistic": lambda x: 1 - sigmoid(x), "concave": lambda x: softplus(-x), "neutral": lambda x: -x,
            "prospect": lambda x: -(x**0.88) if x > 0 else 2.25 * (-x) ** 0.88}[value]  # (the differences keep away from 0)
    return mean(desirable_weight * lost(beta * (x - r - kl)) if good else undesirable_weight * lost(beta * (kl - x + r))
                for x, r, good in zip(logps, ref_logps, desirable, strict=True))


def bradley_terry_value(chosen_rewards, rejected_rewards, margin, centre):
    return mean(softplus(margin - c + r) + centre * (c + r) ** 2 for c, r in zip(chosen_rewards, rejected_rewards, strict=True))


def rft_value(demo_rewards, sample_rewards, beta, loss, ridge):
    return mean((softplus(s - d) if loss == "bt" else (s - d) / beta) + ridge * (d * d + s * s)
                for d, s in zip(demo_rewards, sample_rewards, strict=True))


def irl_value(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards, ridge):
    rows = zip(demo_rewards, sample_rewards, base_demo_rewards, base_sample_rewards, strict=True)
    return mean(softplus((s - bs) - (d - bd)) + ridge * ((d - bd) ** 2 + (s - bs) ** 2) for d, s, bd, bs in rows)


def rebel_value(logratio, other_logratio, rewards, other_rewards, eta):
    return mean(((x - y) / eta - (r - s)) ** 2 for x, y, r, s in zip(logratio, other_logratio, rewards, other_rewards, strict=True))


def sum_value(logps, mask):
    return mean(-math.fsum(x for x, is_scored in zip(*rows, strict=True) if is_scored) for rows in zip(logps, mask, strict=True))


def sft_value(logps, mask, n_tokens):
    return -math.fsum(logps[b][t] for b, t in scored(mask)) / (n_tokens or max(1, len(scored(mask))))


def ift_value(logps, mask, decay):
    """With the weights differentiated too: Σ_t w_t·ℓ_t / n, w_t ∝ Σ_{s ≥ t} γ^(s − t)·ℓ_s, mean 1."""
    values = []
    for row, kept in zip(logps, mask, strict=True):
        lost = [-x for x, is_scored in zip(row, kept, strict=True) if is_scored]
        weights = [sum(decay ** (s - t) * lost[s] for s in range(t, len(lost))) if decay else 1 for t in range(len(lost))]
        values.append(sum(w * x for w, x in zip(weights, lost, strict=True)) / sum(weights) if lost else 0.0)
    return mean(values)


def reinforce_value(logps, advantages, mask):
    return mean(-a * math.fsum(x for x, is_scored in zip(row, kept, strict=True) if is_scored)
                for row, a, kept in zip(logps, advantages, mask, strict=True))


def clipped_value(ratio, advantage, eps):
    return -min(ratio * advantage, clip(ratio, 1 - eps, 1 + eps) * advantage)


def rloo_value(logps, old_logps, advantages, mask, eps):
    ratios = [exp(math.fsum(x - o for x, o, is_scored in zip(*rows, strict=True) if is_scored))
              for rows in zip(logps, old_logps, mask, strict=True)]
    return mean(clipped_value(ratio, a, eps) for ratio, a in zip(ratios, advantages, strict=True))


def ppo_value(logps, old_logps, advantages, mask, eps, penalty):
    moved = [(logps[b][t] - old_logps[b][t], advantages[b][t]) for b, t in scored(mask)]
    return mean([clipped_value(exp(d), a, eps) + penalty * (exp(d) - 1 - d) for d, a in moved] or [0])


def critic_value(values, old_values, returns, mask, eps):
    errors = [max((values[b][t] - returns[b][t]) ** 2,
                  (old_values[b][t] + clip(values[b][t] - old_values[b][t], -eps, eps) - returns[b][t]) ** 2) for b, t in scored(mask)]
    return mean(errors or [0]) / 2


def grpo_value(logps, old_logps, ref_logps, advantages, mask, eps, beta, aggregate, max_len):
    def token(b, t):
        d = ref_logps[b][t] - logps[b][t]
        return clipped_value(exp(logps[b][t] - old_logps[b][t]), advantages[b], eps) + beta * (exp(d) - d - 1)

    rows = [[token(b, t) for t, is_scored in enumerate(kept) if is_scored] for b, kept in enumerate(mask)]
    if aggregate == "grpo":
        return mean(mean(row) if row else 0 for row in rows)
    return math.fsum(map(math.fsum, rows)) / (max(1, sum(map(len, rows))) if aggregate == "dapo" else len(rows) * max_len)


PAIRS = vectors("chosen_logps rejected_logps ref_chosen_logps ref_rejected_logps")


def and_labels(rng):
    given = vectors("logps ref_logps")(rng)
    return given | {"desirable": [rng.random() < 0.5 for _ in given["logps"]], "kl": rng.uniform(0, 2)}


# the loss, its formula, its inputs, its settings, and the inputs that are differentiated
LOSSES = {
    "sft": (sft.sft_loss, sft_value, tables("logps"), lambda rng: {"n_tokens": rng.choice([None, 7])}, "logps"),
    "ift": (ift.ift_loss, ift_value, tables("logps"), lambda rng: {"decay": rng.choice([0, 0.5, 0.95, 1])}, "logps"),
    "irft": (irft.irft_loss, irft_value, vectors("demo_logps sample_logps ref_demo_logps ref_sample_logps"),
             lambda rng: {"beta": rng.uniform(0.01, 2), "h": rng.choice(["logistic", "hinge", "identity"])}, "demo_logps sample_logps"),
    "rft": (rft.reward_alignment_loss, rft_value, vectors("demo_rewards sample_rewards"),
            lambda rng: {"beta": rng.uniform(0.1, 2), "loss": rng.choice(["linear", "bt"]), "ridge": rng.choice([0, 0.3])},
            "demo_rewards sample_rewards"),
    "irl": (irl.irl_loss, irl_value, vectors("demo_rewards sample_rewards base_demo_rewards base_sample_rewards"),
            lambda rng: {"ridge": rng.choice([0, 0.3])}, "demo_rewards sample_rewards"),
    "reward_model": (reward_model.bradley_terry_loss, bradley_terry_value, vectors("chosen_rewards rejected_rewards"),
                     lambda rng: {"margin": rng.choice([0, 1.5]), "centre": rng.choice([0, 0.01])}, "chosen_rewards rejected_rewards"),
    "dpo": (dpo.dpo_loss, dpo_value, PAIRS, lambda rng: {"beta": rng.uniform(0.01, 2), "label_smoothing": rng.choice([0, 0.2])},
            "chosen_logps rejected_logps"),
    "ipo": (ipo.ipo_loss, ipo_value, PAIRS, lambda rng: {"beta": rng.uniform(0.05, 2)}, "chosen_logps rejected_logps"),
    "gpo": (gpo.gpo_loss, gpo_value, PAIRS, lambda rng: {"beta": rng.uniform(0.01, 0.2), "f": rng.choice([*gpo.FUNCTIONS])},
            "chosen_logps rejected_logps"),
    "slic": (slic.slic_loss, slic_value, vectors("chosen_logps rejected_logps target_logps"),
             lambda rng: {"delta": rng.uniform(0, 3), "weight": rng.uniform(0, 1)}, "chosen_logps rejected_logps target_logps"),
    "simpo": (simpo.simpo_loss, simpo_value, vectors("chosen_logps rejected_logps"),
              lambda rng: {"scale": rng.uniform(0.5, 10), "target_margin": rng.uniform(0, 2)}, "chosen_logps rejected_logps"),
    "orpo": (orpo.orpo_loss, orpo_value, vectors("chosen_logps rejected_logps"), lambda rng: {"weight": rng.uniform(0, 1)},
             "chosen_logps rejected_logps"),
    "kto": (kto.kto_loss, kto_value, and_labels, lambda rng: {"beta": rng.uniform(0.01, 1), "desirable_weight": rng.uniform(0.5, 2),
                                                            "undesirable_weight": rng.uniform(0.5, 2),
                                                            "value": rng.choice([*kto.VALUES])}, "logps"),
    "reinforce": (reinforce.reinforce_loss, reinforce_value, tables("logps", "advantages"), lambda rng: {}, "logps"),
    "rloo": (rloo.rloo_loss, rloo_value, tables("logps old_logps", "advantages"), lambda rng: {"eps": rng.uniform(0.1, 0.9)}, "logps"),
    "grpo": (grpo.grpo_loss, grpo_value, tables("logps old_logps ref_logps", "advantages"),
             lambda rng: {"eps": rng.uniform(0.1, 0.9), "beta": rng.uniform(0, 1), "aggregate": rng.choice(["grpo", "dapo", "dr_grpo"]),
                          "max_len": 9}, "logps"),
    "ppo": (ppo.policy_loss, ppo_value, tables("logps old_logps advantages"),
            lambda rng: {"eps": rng.uniform(0.1, 0.9), "penalty": rng.choice([0.0, rng.uniform(0.1, 2)])}, "logps"),
    "ppo's critic": (ppo.value_loss, critic_value, tables("values old_values returns"), lambda rng: {"eps": rng.uniform(0.1, 0.9)},
                     "values"),
    "rebel": (rebel.rebel_loss, rebel_value, vectors("logratio other_logratio rewards other_rewards"),
              lambda rng: {"eta": rng.uniform(0.1, 3)}, "logratio other_logratio"),
    "best_of_n": (best_of_n.best_of_n_loss, sum_value, tables("logps"), lambda rng: {}, "logps"),
    "rest": (rest.rest_loss, sum_value, tables("logps"), lambda rng: {}, "logps"),
}


def shifted(values, place, by):
    """The nested list with one number changed."""
    if len(place) == 1:
        return [value + by * (i == place[0]) for i, value in enumerate(values)]
    return [shifted(row, place[1:], by) if i == place[0] else row for i, row in enumerate(values)]


def places(values):
    if isinstance(values[0], list):
        return [(i, j) for i, row in enumerate(values) for j in range(len(row))]
    return [(i,) for i in range(len(values))]


def compare(name, seeds):
    loss, formula, draw, settings_of, moving = LOSSES[name]
    moving = moving.split()
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        given, settings = draw(rng), settings_of(rng)
        tensors = {key: torch.tensor(value, dtype=torch.bool if key in ("mask", "desirable") else torch.float64,
                                     requires_grad=key in moving) for key, value in given.items()}
        more = {"detach_weights": False} if name == "ift" else {}
        value, stats = loss(**tensors, **settings, **more)
        expected = formula(**given, **settings)
        scale = max(1, abs(expected))
        assert abs(float(value.detach()) - expected) <= 1e-8 * scale, (name, seed, given, settings)
        assert not any(number.requires_grad for number in stats.values())
        value.backward()
        for key in moving:
            for place in places(given[key]):
                up, down = (formula(**{**given, key: shifted(given[key], place, by)}, **settings) for by in (STEP, -STEP))
                slope = pytest.approx((up - down) / (2 * STEP), abs=1e-5 * scale)
                assert float(tensors[key].grad[place]) == slope, (name, seed, key, place)
        for key in tensors.keys() - {*moving}:
            assert tensors[key].grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_the_formula(name, record_property):
    compare(name, range(100))
    record_property("tried", 100)


@pytest.mark.long
@pytest.mark.parametrize("name", LOSSES)
def test_a_thousand_more_of_each(name, record_property):
    compare(name, range(100, 1100))
    record_property("tried", 1000)


def test_a_wrong_formula_is_noticed():
    """Each formula with its sign turned or its mean made a sum fails on the first examples."""
    for name, (loss, formula, *rest_of_row) in [*LOSSES.items()]:
        for wrong in (lambda *args, formula=formula, **kwargs: -formula(*args, **kwargs),
                      lambda *args, formula=formula, **kwargs: 1.001 * formula(*args, **kwargs)):
            LOSSES[name] = (loss, wrong, *rest_of_row)
            with pytest.raises(AssertionError):
                compare(name, range(20))
        LOSSES[name] = (loss, formula, *rest_of_row)
