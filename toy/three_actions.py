"""One prompt, three completions: each method, trained with its own loss, must converge to the policy that its closed form predicts.

The setting is Example 1 of "Getting More Juice Out of the SFT Data" and of "From Demonstrations to Rewards", with any expert and any
reference. A policy is three logits in float64. Expectations over demonstrations and samples are exact sums, so nothing is noisy and the
tolerances are those of float64 (two rows are sampled, to show the noise). The losses are imported from minialign/methods. The laws (closed
forms) are those of toy/closed_form.py, which does not use the losses.

    python -m toy.three_actions                                        # a table with PASS or FAIL per row, a figure; exit 1 on a miss
    python -m toy.three_actions --beta 2 --R 3 --expert .2 .3 .5 --ref .6 .2 .2 --ref_update fixed --resampling stale

The defaults avoid beta = 1 and a uniform reference on purpose: with those, a missing 1/beta or a missing "− log ref" would go unnoticed.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from minialign.engine.common import BadInput, commit, figure_path, write_atomic
from minialign.methods.best_of_n import pick
from minialign.methods.dpo import dpo_loss
from minialign.methods.gpo import FUNCTIONS, gpo_loss, regularisation
from minialign.methods.ift import ift_loss
from minialign.methods.ipo import ipo_loss
from minialign.methods.irft import irft_loss
from minialign.methods.irl import irl_loss
from minialign.methods.kto import kto_loss, mismatched_kl
from minialign.methods.orpo import orpo_loss
from minialign.methods.ppo import policy_loss
from minialign.methods.rest import keep
from minialign.methods.reward_model import bradley_terry_loss
from minialign.methods.rft import reward_alignment_loss
from minialign.methods.sft import sft_loss
from minialign.methods.simpo import simpo_loss
from minialign.methods.slic import slic_loss
from minialign.settings import cli, exit_codes
from toy import closed_form


@dataclass
class Config:
    beta: float = 2.0               # strength of the pull to the reference
    R: float = 3.0                  # rewards of the explicit methods lie in [0, R]
    expert: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.7])  # E, the expert's probabilities
    ref: list[float] = field(default_factory=lambda: [0.5, 0.3, 0.2])     # the reference's probabilities; every method starts there
    ref_update: str = "both"        # reference of IRFT: refreshed each round (SPIN), fixed, or both
    resampling: str = "both"        # samples of IRFT: fresh at every step, stale (kept for a round), or both
    rounds: int = 6                 # number of rounds with stale samples
    seed: int = 0                   # seed of the two sampled rows
    full: bool = False              # also run eight other settings, from a distant reference to beta = 5
    out: str = "runs/three_actions.png"  # the figure


OTHERS = [
    dict(beta=0.4, R=1.0, ref=[0.2, 0.3, 0.5]), dict(beta=0.7, R=2.0, expert=[0.02, 0.28, 0.7], ref=[0.1, 0.1, 0.8]),
    dict(beta=5.0, R=20.0), dict(beta=1.0, R=1.0, ref=[1.0, 1.0, 1.0]), dict(beta=0.1), dict(beta=0.3), dict(R=3000.0),
    dict(expert=[0.01, 0.01, 0.98], ref=[0.98, 0.01, 0.01]),
]


# ---------------------------------------------------------------------------------------------------- losses as expectations


def expected_irft(logits, expert, sampler, ref, *, beta, h="logistic"):
    """Σ_{y, ỹ} E(y)·q(ỹ)·irft_loss(y, ỹ): the project's loss, averaged over all nine pairs instead of over a sample."""
    logps, ref_logps = logits.log_softmax(0), ref.log()
    demo, own = torch.meshgrid(torch.arange(len(logits)), torch.arange(len(logits)), indexing="ij")
    demo, own = demo.flatten(), own.flatten()
    pairs = [(logps[y, None], logps[o, None], ref_logps[y, None], ref_logps[o, None]) for y, o in zip(demo, own, strict=True)]
    losses = torch.stack([irft_loss(*pair, beta=beta, h=h)[0] for pair in pairs])  # (9,)
    return (losses * expert[demo] * sampler[own]).sum()


def expected_sft(logits, expert):
    """Σ_y E(y)·sft_loss(y)."""
    logps = logits.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.bool)
    return sum(weight * sft_loss(logps[y].view(1, 1), one)[0] for y, weight in enumerate(expert))


def expected_ift(logits, expert):
    """Σ_y E(y)·ift_loss(y). The completions have one token, so every weight is 1."""
    logps = logits.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.bool)
    return sum(weight * ift_loss(logps[y].view(1, 1), one, decay=0.95)[0] for y, weight in enumerate(expert))


def over_pairs(loss_of, first, second):
    """Σ_{a, b} first(a)·second(b)·loss_of([a], [b])."""
    pairs = product(range(len(first)), range(len(second)))
    return sum(first[a] * second[b] * loss_of([a], [b])[0] for a, b in pairs)


def expected_bradley_terry(rewards, chosen, rejected):
    return over_pairs(lambda a, b: bradley_terry_loss(rewards[a], rewards[b]), chosen, rejected)


def expected_alignment(rewards, expert, policy, *, beta, loss, ridge):
    return over_pairs(lambda a, b: reward_alignment_loss(rewards[a], rewards[b], beta=beta, loss=loss, ridge=ridge), expert, policy)


def expected_irl(rewards, base, expert, policy):
    return over_pairs(lambda a, b: irl_loss(rewards[a], rewards[b], base[a], base[b]), expert, policy)


def expected_preference(loss_of, logits, ref, prefer, mu):
    """Σ 2·μ_a·μ_b·prefer[a, b]·loss_of(log π(a), log π(b), log ref(a), log ref(b)). The weights of all (chosen a, rejected b) sum to 1."""
    logps, ref_logps = logits.log_softmax(0), ref.log()
    a, b = torch.cartesian_prod(torch.arange(len(logits)), torch.arange(len(logits))).T  # (9,)
    one = torch.func.vmap(lambda *four: loss_of(*[x[None] for x in four])[0])  # a loss is a batch mean, so each batch holds one pair
    return (2 * mu[a] * mu[b] * prefer[a, b] * one(logps[a], logps[b], ref_logps[a], ref_logps[b])).sum()


def expected_kto(logps, *, ref, desirable, undesirable, kl, beta, weight, value):
    """Σ_y desirable(y)·kto_loss(y, good) + undesirable(y)·kto_loss(y, bad)."""
    return sum(
        share[y] * kto_loss(logps[[y]], ref.log()[[y]], torch.tensor([good]), kl, beta=beta, desirable_weight=weight, value=value)[0]
        for share, good in ((desirable, True), (undesirable, False)) for y in range(len(logps))
    )


def gradient(loss_of, logits):
    logits = logits.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss_of(logits), logits)
    return grad


def descend(loss_of, logits, lr, steps):
    """Plain gradient descent. loss_of is called again at every step, so it may use the current logits (fresh samples)."""
    for _ in range(steps):
        logits = logits - lr * gradient(loss_of, logits)
    return logits


def descend_to_rest(loss_of, logits, lr):
    """Gradient descent until the logits stop moving, which is at the fixed point of the expected update."""
    for _ in range(30_000):
        step = lr * gradient(loss_of, logits)
        if step.abs().max() < 1e-14:
            break
        logits = logits - step
    return logits


def minimise(loss_of, logits):
    """Newton's method to machine precision, for losses that are convex in the logits. The mean of the logits does not change.

    Each step is halved until the loss falls in proportion to its slope (Armijo), so a distant start does not make it diverge. Where the
    loss no longer changes in float64, the step is halved until the gradient shrinks.
    """
    for _ in range(200):
        grad, value = gradient(loss_of, logits), float(loss_of(logits))
        if grad.abs().max() < 1e-16:
            break
        hessian = torch.autograd.functional.hessian(loss_of, logits)
        step, _ = torch.linalg.solve_ex(hessian + torch.ones_like(hessian), grad)  # 11ᵀ: the gradient has no component along 1
        step = step / max(1.0, float(step.abs().max()) / 2)  # at most two nats: far from the optimum the curvature misleads
        size, slope = 1.0, float(grad @ step)

        def good(size, logits=logits, step=step, grad=grad, value=value, slope=slope):
            moved = float(loss_of(logits - size * step))
            flat = abs(moved - value) <= 1e-14 * abs(value) and bool(gradient(loss_of, logits - size * step).norm() < grad.norm())
            return flat or moved < value - 1e-4 * size * slope

        while size > 1e-6 and not good(size):
            size /= 2
        if size <= 1e-6:
            break
        logits = logits - size * step
    return logits


# ------------------------------------------------------------------------------------------------------ the explicit methods


def tilted(ref, reward, beta):
    """The policy step in closed form: ref·e^{r/β}."""
    return (ref.log() + reward / beta).softmax(0)


def alternate(expert, ref, *, beta, lr=None, bounds=(-torch.inf, torch.inf), loss="linear", ridge=0.0):
    """RFT with exact expectations and exact policies, one reward step per round, until the reward stops moving. Returns all policies.

    With `linear` each step is a step of maximum-likelihood inverse RL (Lemma 3.1: its gradient is (E − π)/β). That likelihood is concave
    in r/β with curvature at most 1/2, so steps of 2β² in r are safe.
    """
    reward, policies = torch.zeros_like(ref), [ref]
    for _ in range(20_000):
        policy = policies[-1]
        step = gradient(lambda r, q=policy: expected_alignment(r, expert, q, beta=beta, loss=loss, ridge=ridge), reward)
        moved = (reward - (lr or 2 * beta**2) * step).clamp(*bounds)
        policies.append(tilted(ref, moved, beta))
        if (moved - reward).abs().max() < 1e-15 * beta:
            break
        reward = moved
    return policies


def ml_irl(expert, ref, *, beta, R):
    """Exact maximum-likelihood inverse RL with rewards in [0, R]: the policy that it converges to."""
    return alternate(expert, ref, beta=beta, bounds=(0, R))[-1]


def iterative_irl(expert, ref, *, beta, n_rounds, mode, anchor="initial"):
    """IRL with exact steps, every reward an arg min. Returns the policy after each round. mode, anchor: as in minialign/methods/irl.py."""
    reward, policy, policies = torch.zeros_like(ref), ref, []
    for _ in range(n_rounds):
        base = reward if mode == "accumulate" else torch.zeros_like(ref)
        reward = minimise(lambda r, b=base, q=policy: expected_irl(r, b, expert, q), base)
        policy = tilted(policy, reward - base, beta) if anchor == "current" else tilted(ref, reward, beta)
        policies.append(policy)
    return torch.stack(policies)


def algorithm_1(ref, demo, *, beta, R, rounds=400, inner=10, seed=0):
    """Algorithm 1 of the RFT paper, with sampling. Each round takes K reward steps (1/β)(e_y − e_ỹ), each with a new sample ỹ ~ π_t and
    with r kept in [0, R]. Then it takes the policy step in closed form, π_{t+1} ∝ ref·e^{r/β}. The demonstration is always `demo`. r
    starts at 0; one inner step moves it by R/20."""
    generator = torch.Generator().manual_seed(seed)
    reward, policy, lr = torch.zeros_like(ref), ref, 0.05 * R * beta
    for _ in range(rounds):
        for sampled in torch.multinomial(policy, inner, replacement=True, generator=generator).tolist():
            step = gradient(lambda r, y=sampled: reward_alignment_loss(r[[demo]], r[[y]], beta=beta)[0], reward)
            reward = (reward - lr * step).clamp(0, R)
        policy = tilted(ref, reward, beta)
    return policy


# --------------------------------------------------------------------------------------------------------------- the checks


@dataclass
class Check:
    name: str
    learned: np.ndarray
    law: np.ndarray
    tolerance: float
    note: str = ""

    @property
    def error(self):
        return float(np.abs(np.asarray(self.learned) - np.asarray(self.law)).max())

    @property
    def passed(self):
        return self.error <= self.tolerance  # (a NaN fails)

    @property
    def is_policy(self):
        """Whether the check compares probabilities (others compare slopes, rewards or losses)."""
        return np.min(self.learned) >= 0 and np.allclose(np.atleast_2d(self.law).sum(1), 1)


def checks(cfg):
    """Yield every Check, family by family."""
    for family in (explicit_checks, irl_checks, likelihood_checks, irft_checks, preference_checks, online_checks):
        yield from family(cfg)


UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)
DELTA = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def setting(cfg):
    """expert and ref, first as tensors, then as arrays."""
    expert, ref = closed_form.normalise(cfg.expert), closed_form.normalise(cfg.ref)
    return torch.tensor(expert), torch.tensor(ref), expert, ref


def explicit_checks(cfg):
    """RFT and reward models."""
    expert, ref, E, reference = setting(cfg)
    beta, x, uniform, delta = cfg.beta, cfg.R / cfg.beta, UNIFORM, DELTA

    # The reward is learned explicitly and bounded by R. With one demonstration it takes about e^{R/β} steps to reach the bound, so those
    # rows use at most R = 6β.
    R, capped = min(cfg.R, 6 * beta), min(x, 6.0)
    learned = ml_irl(delta, uniform, beta=beta, R=R).numpy()
    note = "(1, 1, e^x)/(2 + e^x), not 2/(2 + e^x)"
    yield Check("ML-IRL, Table 1 (one demo, uniform ref)", learned, closed_form.table_1(capped), 1e-12, note)
    learned = algorithm_1(uniform, 2, beta=beta, R=R, seed=cfg.seed).numpy()
    yield Check("RFT, Algorithm 1, sampled (one demo)", learned, closed_form.table_1(capped), 1e-12, "the bound absorbs the noise")
    learned = ml_irl(delta, ref, beta=beta, R=R).numpy()
    yield Check("ML-IRL, one demo, this ref", learned, closed_form.demonstration_law(delta.numpy(), reference, capped), 1e-12)
    learned = ml_irl(expert, ref, beta=beta, R=cfg.R).numpy()
    yield Check("ML-IRL, this expert, this ref", learned, closed_form.demonstration_law(E, reference, x), 1e-12, "clip(Z·E/ref, 1, e^x)")
    learned = ml_irl(expert, ref, beta=beta, R=50 * beta).numpy()
    yield Check("ML-IRL without a bound", learned, E, 1e-12, "= the expert = SFT: the bound is the regulariser")
    policies = alternate(expert, ref, beta=beta, lr=0.5 * beta**2)
    distances = [closed_form.kl(E, policy.numpy()) for policy in policies]
    rises = max(after - before for before, after in zip(distances, distances[1:], strict=False))
    learned = [max(rises, 0), distances[-1]]
    yield Check("RFT linear, small steps: KL(E‖π) rises, ends", learned, [0, 0], 1e-12, "falls at every step, to the expert")
    learned = alternate(expert, ref, beta=beta, lr=4 * beta / (1 + beta), loss="bt")[-1].numpy()
    note = "E^{1/(1+β)}·ref^{β/(1+β)}, as IRFT with fresh samples"
    yield Check("RFT Bradley-Terry, small steps", learned, closed_form.geometric_mixture(E, reference, beta), 1e-10, note)
    ridge = 0.1 / beta**2
    learned = alternate(expert, ref, beta=beta, lr=beta**2, ridge=ridge)[-1].numpy()
    yield Check("RFT linear with a ridge", learned, closed_form.ridge_law(E, reference, beta, ridge), 1e-12, "r = (E − π)/(2cβ(E + π))")

    rewards = minimise(lambda r: expected_bradley_terry(r, expert, ref), torch.zeros_like(ref))
    learned = (ref.log() + rewards).softmax(0).numpy()
    yield Check("reward model on demo over ref's own answer", learned, E, 1e-12, "r = log E/ref + const, so ref·e^r = E")


def irl_checks(cfg):
    """Iterative IRL where every reward is an arg min: with β = 1, as in its paper, and with the β of cfg."""
    expert, ref, E, reference = setting(cfg)
    beta = cfg.beta
    swing = iterative_irl(expert, ref, beta=1.0, n_rounds=6, mode="literal").numpy()
    yield Check("IRL literal, β = 1, 6 rounds", swing, np.stack([E, reference] * 3), 1e-9, "oscillates between E and ref forever")
    n_rounds = int(np.ceil(9 / np.log(beta))) if beta > 1.2 else 6  # the distance shrinks by 1/β per round: run until e^{−9}
    usable = closed_form.usable_rounds(closed_form.rounds_law(E, reference, beta, n_rounds, ref_update=False))
    learned = iterative_irl(expert, ref, beta=beta, n_rounds=len(usable), mode="literal").numpy()
    yield Check(f"IRL literal, {len(usable)} rounds", learned, usable, 1e-7, "ref·(E/π)^{1/β}: converges to the mixture iff β > 1")
    if beta > 1.2:
        yield Check("  its last round", learned[-1], closed_form.geometric_mixture(E, reference, beta), 1e-3, "not the expert")
    usable = closed_form.usable_rounds(closed_form.rounds_law(E, reference, beta, 8, ref_update=True))
    for name, settings in (("accumulated", {"mode": "accumulate"}), ("literal, anchor current", {"mode": "literal", "anchor": "current"})):
        learned = iterative_irl(expert, ref, beta=beta, n_rounds=len(usable), **settings).numpy()
        yield Check(f"IRL {name}, {len(usable)} rounds", learned, usable, 1e-7, "π·(E/π)^{1/β}: converges to E iff β > ½")


def likelihood_checks(cfg):
    """SFT, IFT, and SFT on selected samples."""
    expert, ref, E, reference = setting(cfg)
    start, delta = ref.log(), DELTA
    zeros = torch.zeros(3, dtype=torch.float64)
    flow, halves = [closed_form.sft_flow(t) for t in (1.0, 5.0)], []
    for lr in (0.02, 0.01):  # descent with step lr has an error of O(lr): extrapolate to lr = 0 from two step sizes
        logits, values, done = zeros, [], 0
        for t in (1.0, 5.0):
            n = round(t / lr)
            logits, done = descend(lambda z: expected_sft(z, delta), logits, lr, n - done), n
            values.append(float(logits.softmax(0)[2]))
        halves.append(np.array(values))
    yield Check("SFT's path, one demo, lr·steps = 1 and 5", 2 * halves[1] - halves[0], np.array(flow), 1e-4, "2d + e^d = 1 + 3·lr·steps")
    learned = minimise(lambda z: expected_sft(z, expert), start).softmax(0).numpy()
    yield Check("SFT", learned, E, 1e-12, "the expert, for every ref")

    learned = gradient(lambda z: expected_ift(z, expert), start).numpy()
    yield Check("IFT's gradient", learned, reference - E, 1e-12, "equals SFT's, for completions of one token")

    # Selection by the reward r = (0, 1, 1), which has a tie at the top.
    reward, n = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), 4
    draws = torch.tensor(list(product(range(3), repeat=n)))  # (3^n, n) every way to draw n
    winners = draws.gather(1, pick(reward[draws])[:, None]).squeeze(1)
    learned = torch.zeros(3, dtype=torch.float64).scatter_add(0, winners, ref[draws].prod(1)).numpy()
    yield Check("best of 4", learned, closed_form.best_of_n_law(reference, reward.numpy(), n), 1e-12, "F^n − F₋^n, ref's shares in a tie")
    kept = ref * keep(reward, 0.5)
    learned = minimise(lambda z: expected_sft(z, kept[1:] / kept.sum()), start[1:]).softmax(0).numpy()
    yield Check("ReST, r > ½, then SFT", [0, *learned], closed_form.rest_law(reference, reward.numpy(), 0.5), 1e-12, "ref where r > τ")


def irft_checks(cfg):
    """IRFT and SPIN; `ref_update` and `resampling` select the rows."""
    expert, ref, E, reference = setting(cfg)
    beta, start = cfg.beta, ref.log()

    # IRFT with h = identity is SFT.
    lr, inner = 0.1, 7
    logits = start
    for _ in range(3):
        sampler = logits.softmax(0)
        logits = descend(lambda z, q=sampler: expected_irft(z, expert, q, ref, beta=beta, h="identity"), logits, lr, inner)
    learned, sft = logits.softmax(0).numpy(), descend(lambda z: expected_sft(z, expert), start, beta * inner * lr, 3).softmax(0).numpy()
    yield Check("IRFT identity, 3 rounds of 7 steps", learned, sft, 1e-12, "= SFT, 3 steps of 7·β times the size")
    learned = descend(lambda z: expected_irft(z, expert, ref, ref, beta=beta, h="identity"), start, lr, 25).softmax(0).numpy()
    yield Check("IRFT identity, one round of 25 steps", learned, closed_form.identity_round(E, reference, beta * lr * 25), 1e-12)
    gradients = [
        gradient(lambda z, h=h: expected_irft(z, expert, ref, ref, beta=beta, h=h), start).numpy() for h in ("identity", "logistic")
    ]
    sft_gradient = gradient(lambda z: expected_sft(z, expert), start).numpy()
    law = np.stack([beta * sft_gradient, beta / 2 * sft_gradient])
    yield Check("gradients at ref = policy", np.stack(gradients), law, 1e-12, "β and β/2 times SFT's")

    # IRFT with h = logistic.
    if cfg.resampling in ("both", "fresh"):
        if cfg.ref_update in ("both", "fixed"):
            mixture = closed_form.geometric_mixture(E, reference, beta)

            def fresh(z):
                return expected_irft(z, expert, z.detach().softmax(0), ref, beta=beta)

            learned = descend_to_rest(fresh, start, 4 / beta / (1 + beta)).softmax(0).numpy()
            yield Check("IRFT logistic, fresh samples, ref fixed", learned, mixture, 1e-10, "E^{1/(1+β)}·ref^{β/(1+β)}, never E")
            learned = sampled_irft(expert, ref, beta=beta, seed=cfg.seed).numpy()
            yield Check("  the same, from sampled batches of 64", learned, mixture, 0.02, "noise of 4000 SGD steps")
        if cfg.ref_update in ("both", "refreshed"):

            def fresh_spin(z):
                policy = z.detach().softmax(0)
                return expected_irft(z, expert, policy, policy, beta=beta)

            learned = descend_to_rest(fresh_spin, start, 4 / beta).softmax(0).numpy()
            yield Check("IRFT logistic, fresh samples, ref refreshed", learned, E, 1e-10, "each step is β/2 of an SFT step")
    if cfg.resampling in ("both", "stale"):
        for kind in ("fixed", "refreshed"):
            if cfg.ref_update in ("both", kind):
                learned, law = converged_rounds(expert, ref, beta, cfg.rounds, kind == "refreshed")
                name = "SPIN" if kind == "refreshed" else "IRFT, ref fixed"
                note = "π·(E/π)^{1/β}" if kind == "refreshed" else "ref·(E/π)^{1/β}"
                yield Check(f"{name}, round 1, converged", learned[0], law[0], 1e-9, note)
                yield Check(f"{name}, rounds 1 to {cfg.rounds}", learned, law, 1e-7, "every round equals its law")


def preference_checks(cfg):
    """DPO and its relatives, on pairs that ref samples and that Bradley-Terry labels with r = log E/ref, so at β = 1 the expert is π*. (In
    the online rows the policy samples the pairs. In the KTO rows the expert samples the answers.)"""
    expert, ref, E, reference = setting(cfg)
    beta, start, reward = cfg.beta, ref.log(), np.log(E / reference)
    prefer = torch.tensor(closed_form.bradley_terry(reward))
    p, mu = prefer.numpy(), reference

    def learned(loss_of, prefer=prefer):
        """The logits with the smallest expected loss. loss_of takes the four log-probs."""
        return minimise(lambda z: expected_preference(loss_of, z, ref, prefer, ref), start)

    def rests(loss_of, curvature):
        """The fixed point of the expected update on the policy's own pairs. curvature: the largest curvature of loss_of in log π."""

        def expected(z):
            return expected_preference(loss_of, z, ref, prefer, z.detach().softmax(0))

        return descend_to_rest(expected, start, 1 / curvature).softmax(0).numpy()

    pull = max(beta, 0.7)  # with two of the three probabilities near 0 the policy samples few useful pairs, and training takes forever
    best = closed_form.tilt(reference, reward, beta)
    yield Check("DPO", learned(partial(dpo_loss, beta=beta)).softmax(0).numpy(), best, 1e-8, "π* = ref·e^{r/β}, for pairs from any policy")
    rounds, at = [], ref
    for _ in range(3):
        logits = minimise(lambda z, at=at: expected_preference(partial(dpo_loss, beta=4 * beta), z, at, prefer, ref), at.log())
        at = logits.softmax(0)
        rounds.append(at.numpy())
    law = np.stack([closed_form.tilt(reference, t * reward, 4 * beta) for t in (1, 2, 3)])
    yield Check(f"DPO, 3 rounds, β = {4 * beta:g}", np.stack(rounds), law, 1e-8, "ref·e^{T·r/β} after T rounds")
    policy = rests(partial(dpo_loss, beta=pull), pull**2 / 4)
    yield Check(f"DPO online, β = {pull:g}", policy, closed_form.tilt(reference, reward, pull), 1e-8, "also π*")
    law = closed_form.ipo_law(reference, p, beta, mu)
    yield Check("IPO", learned(partial(ipo_loss, beta=beta)).softmax(0).numpy(), law, 1e-8, "ref·e^{g/β}, g = E_μ p(y ≻ y')")
    policy = rests(partial(ipo_loss, beta=pull), 2)
    yield Check(f"IPO online, β = {pull:g}", policy, closed_form.ipo_online_law(reference, p, pull), 1e-8, "the same with μ = π")
    for f, law, note in (
        ("savage", best, "π*"), ("exponential", closed_form.tilt(reference, reward, 2 * beta), "ref·e^{r/2β}: half the tilt"),
        ("squared", closed_form.ipo_law(reference, p, beta / 2, mu), "IPO at half the β"),
    ):
        yield Check(f"GPO, {f}", learned(partial(gpo_loss, beta=beta, f=f)).softmax(0).numpy(), law, 1e-8, note)

    policy = learned(partial(gpo_loss, beta=beta, f="truncated_quadratic")).softmax(0).numpy()
    slope = closed_form.pair_slope(lambda x: -2 * np.maximum(0, 1 - x), beta * np.log(policy / reference), p, mu)
    yield Check("GPO, truncated quadratic: slope at rest", slope, np.zeros(3), 1e-8, "IPO's law at β/2 if no two g differ by more than ½")
    corner = torch.tensor(closed_form.hinge_corner(reference, p, beta, mu))
    directions = [torch.stack([a.cos(), a.sin(), -a.cos() - a.sin()]) for a in torch.linspace(0, 2 * np.pi, 361, dtype=torch.float64)]

    def hinge(z):
        return float(expected_preference(partial(gpo_loss, beta=beta, f="hinge"), z, ref, prefer, ref))

    rise = min(hinge(corner.log() + 1e-4 * direction) for direction in directions) - hinge(corner.log())
    yield Check("GPO, hinge: the loss rises all around a corner", [min(rise, 0)], [0], 1e-12, "at β·Δ = ±1, no closed form")

    tilts, laws = [], []
    small = torch.tensor(closed_form.bradley_terry(1e-3 * reward))
    for f in FUNCTIONS:
        _, slope, curvature = regularisation(f)
        if curvature:  # (the hinge has none)
            policy = learned(partial(gpo_loss, beta=beta, f=f), prefer=small)
            tilts.append(beta * np.ptp((policy - start).numpy()) / np.ptp(1e-3 * reward))
            laws.append(1 / (2 * abs(curvature / slope)))
    yield Check("GPO, tilt per small reward, five of the f", tilts, laws, 1e-3, "1/(2·|f''(0)/f'(0)|): 1, ½, ½, ½, 1")

    policy = learned(lambda w, l, *_: simpo_loss(w, l, scale=beta, target_margin=0.0)).softmax(0).numpy()
    yield Check("SimPO, γ = 0", policy, closed_form.simpo_law(np.ones(3), reward, beta), 1e-8, "e^{|y|(r − c)/scale}; independent of ref")
    policy = learned(lambda w, l, *_: orpo_loss(w, l, weight=0.0)).softmax(0).numpy()
    yield Check("ORPO, λ = 0", policy, closed_form.winners_law(mu, p, np.ones(3)), 1e-8, "SFT on the winners")
    policy = learned(lambda w, l, *_: orpo_loss(w, l, weight=0.25)).softmax(0).numpy()
    yield Check("ORPO, λ = ¼: slope at rest", closed_form.orpo_slope(policy, p, mu, 0.25), np.zeros(3), 1e-8, "no closed form")
    W, L = closed_form.winners(mu, p)
    weight = 0.5 + 2 * max(0, ((L - W) / W).max())
    law = closed_form.slic_law(mu, p, weight)
    delta = 1 + np.ptp(np.log(law))
    policy = learned(lambda w, l, *_: slic_loss(w, l, w, delta=delta, weight=weight)).softmax(0).numpy()
    yield Check("SLiC-HF, δ beyond every margin", policy, law, 1e-8, "W + (W − L)/λ")
    weight = 0.5 + 2 * max(0, ((L - W) / E).max())
    law = closed_form.slic_law(mu, p, weight, E)
    delta = 1 + np.ptp(np.log(law))

    def with_targets(z):  # y_ref, a demonstration, is independent of the pair, and the loss is linear in its log-prob
        target = (expert * z.log_softmax(0)).sum()[None]
        return expected_preference(lambda w, l, *_: slic_loss(w, l, target, delta=delta, weight=weight), z, ref, prefer, ref)

    yield Check("SLiC-HF, y_ref from the expert", minimise(with_targets, start).softmax(0).numpy(), law, 1e-8, "E + (W − L)/λ")

    W, L = closed_form.winners(E, p)  # the expert samples the answers: ref would rarely sample them, so z₀ > 0
    weight = 0.5 + 2 * float((L / W).max())  # large enough that no probability goes to 0
    law = closed_form.kto_neutral_law(weight * W, L)
    yield Check("KTO, neutral", kto_rest(ref, W, L, beta, weight, value="neutral")[0], law, 1e-8, "λ_D·W − L: W for likes, L for dislikes")
    yield Check("KTO, β → 0", kto_rest(ref, W, L, 1e-6, weight)[0], law, 1e-5, "the same")
    for name, settings in (("", {}), (", prospect", {"value": "prospect"}), (", concave", {"value": "concave"}), (", no z₀", {"z0": False}),
                           (", no reference", {"reference": False})):
        likes, own = (30 * weight, 1.0) if name == ", prospect" else (weight, beta / 10)  # with fewer likes an answer may stay at ρ = z₀
        policy, z0, at = kto_rest(ref, W, L, own, likes, **settings)
        slope = closed_form.kto_slope(policy, at, likes * W / 2, L / 2, own, z0, settings.get("value", "logistic"))
        yield Check(f"KTO{name}, β = {own:g}: slope at rest", slope, np.zeros(3), 1e-8, f"no closed form; z₀ = {z0:.3f}")


def kto_rest(ref, W, L, beta, weight, *, z0=True, reference=True, value="logistic"):
    """(policy, z₀, ref) where KTO's expected updates rest. W, L (3,): how often an answer is liked and disliked."""
    good, bad, at = torch.tensor(W) / 2, torch.tensor(L) / 2, ref if reference else torch.ones_like(ref)

    def reference_point(logps):
        sums = [((good + bad) * x).sum()[None] for x in (logps, ref.log())]
        return mismatched_kl(sums[0], sums[1] if reference else None) if z0 else torch.zeros(())

    def pull_of(logps):
        settings = dict(kl=reference_point(logps), beta=beta, weight=weight, value=value)
        return -gradient(partial(expected_kto, ref=at, desirable=good, undesirable=bad, **settings), logps)

    logps = rest(pull_of, ref.log(), 0.5)
    return logps.exp().numpy(), float(reference_point(logps)), at.numpy()


def online_checks(cfg):
    """PPO with the reward β·log E/ref, so that π* is the expert: with a penalty on the KL to the old policy in the place of the clip, and
    with a text term."""
    expert, ref, E, reference = setting(cfg)
    beta, reward = cfg.beta, cfg.beta * (expert / ref).log()
    penalty = 2 * float(reward.max() - reward.min())

    def advantages(old):
        returns = reward - beta * (old / ref).log()
        return returns - (old * returns).sum()

    def loss_of(logps, old, penalty):
        rows = [policy_loss(logps[y].view(1, 1), old[y].log().view(1, 1), advantages(old)[y].view(1, 1), torch.ones(1, 1).bool(), eps=1e9,
                            penalty=penalty)[0] for y in range(3)]
        return (old * torch.stack(rows)).sum()

    for name, old in (("from ref", ref), ("from π*", expert)):
        learned = minimise(lambda z, old=old: loss_of(z.log_softmax(0), old, penalty), old.log()).softmax(0).numpy()
        law = closed_form.kl_penalty_step(old.numpy(), advantages(old).numpy(), penalty)
        yield Check(f"PPO, penalty κ, one rollout {name}", learned, law, 1e-8, "κ·π_old/(c − A)" if old is ref else "which is π* itself")
    weight, target = beta / 2, UNIFORM

    def pull_of(logps):
        return -gradient(lambda x: loss_of(x, logps.exp(), 0.0) - weight * (target * x).sum(), logps)

    law = closed_form.ptx_law(reference, reward.numpy(), beta, weight, target.numpy())
    yield Check("PPO-ptx, w = β/2", rest(pull_of, ref.log(), 0.1).exp().numpy(), law, 1e-10, "r − β·log π/ref + w·D/π = c")


def rest(pull_of, logits, rate):
    """log π where expected updates rest: there the pull on each log π(y), pull_of(log π), is in proportion to π(y). The steps are those of
    natural gradient descent, at most `rate` long."""
    for _ in range(2000):
        logps = logits.log_softmax(0)
        pull = pull_of(logps)
        step = rate * (pull / pull.sum() / logps.exp() - 1).clamp(-1, 1)
        logits = logits + step
        if step.abs().max() < 1e-15:
            break
    return logps


def converged_rounds(expert, ref, beta, n_rounds, ref_update):
    """(learned, law): policies after each round, with every inner loop run to its minimum. Stops where float64 cannot hold the law."""
    law = closed_form.usable_rounds(closed_form.rounds_law(expert.numpy(), ref.numpy(), beta, n_rounds, ref_update=ref_update))
    policy, learned = ref, []
    for _ in law:
        anchor = policy if ref_update else ref
        logits = minimise(lambda z, q=policy, a=anchor: expected_irft(z, expert, q, a, beta=beta), anchor.log())
        policy = logits.softmax(0)
        learned.append(policy.numpy())
    return np.array(learned), law


def sampled_irft(expert, ref, *, beta, seed, steps=4000, batch_size=64):
    """The fixed point of IRFT with fresh samples, by SGD on sampled demonstrations and own answers, with a step size that falls to 0."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logps = ref.log().requires_grad_(True), ref.log()
    for k in range(steps):
        demo = torch.multinomial(expert, batch_size, replacement=True, generator=generator)
        own = torch.multinomial(logits.detach().softmax(0), batch_size, replacement=True, generator=generator)
        logps = logits.log_softmax(0)
        loss, _ = irft_loss(logps[demo], logps[own], ref_logps[demo], ref_logps[own], beta=beta)
        (grad,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2 / beta * (1 - k / steps) * grad).detach().requires_grad_(True)
    return logits.detach().softmax(0)


# ------------------------------------------------------------------------------------------------------------------- figure


def draw_figure(results, cfg):
    """Top: learned probabilities against the law's, one dot each. Middle: rounds of SPIN and IRL, with refreshed and with fixed
    reference. Bottom: probability of an unseen action over SFT and IRFT steps, and the value at which a bounded reward keeps it."""
    import matplotlib

    matplotlib.use("Agg")  # set here, not at import: a notebook that imports this file keeps its own backend
    import matplotlib.pyplot as plt

    expert, ref = closed_form.normalise(cfg.expert), closed_form.normalise(cfg.ref)
    figure, axes = plt.subplots(3, 1, figsize=(8, 13), constrained_layout=True)  # readable at the width of the README
    axes[0].plot([0, 1], [0, 1], color="0.8", zorder=0)
    policies = [check for check in results if check.is_policy]
    for index, check in enumerate(policies):
        axes[0].plot(np.ravel(check.law), np.ravel(check.learned), "os^vDP*X"[index % 8], ms=8, alpha=0.6)
    axes[0].set(xlabel="probability, closed form", ylabel="probability, learned", title=f"{len(policies)} runs, each on its closed form")

    for beta, color in ((0.45, "C3"), (1.0, "C1"), (cfg.beta, "C0")):
        for update, style in ((True, "-"), (False, "--")):
            law = closed_form.rounds_law(expert, ref, beta, 8, ref_update=update)[:, 2]
            label = f"β = {beta:g}, {'SPIN, IRL accumulated' if update else 'ref fixed: IRFT, IRL literal'}"
            axes[1].plot(range(9), [ref[2], *law], style, color=color, marker="o", ms=3, label=label)
    axes[1].axhline(expert[2], color="0.6", lw=1)
    axes[1].text(8, expert[2], "expert", ha="right", va="bottom", fontsize=11, color="0.4")
    axes[1].set(xlabel="converged rounds", ylabel="π(y₃)", title="Rounds settle only if β > ½ or, ref fixed, β > 1", ylim=(0, 1.02))
    axes[1].legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)

    zeros, delta = torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    steps, lr = 600, 0.1

    def path(loss_of):
        logits, values = zeros, []
        for _ in range(steps):
            values.append(float(logits.softmax(0)[0]))
            logits = logits - lr * gradient(loss_of, logits)
        return values

    axes[2].loglog(range(1, steps + 1), path(lambda z: expected_sft(z, delta)), label="SFT")
    axes[2].loglog(range(1, steps + 1), path(lambda z: expected_irft(z, delta, z.detach().softmax(0), uniform, beta=1.0)),
                   label="IRFT, fresh samples, β = 1")
    axes[2].loglog(range(1, steps + 1), path(lambda z: expected_irft(z, delta, uniform, uniform, beta=1.0)), label="SPIN, one round, β = 1")
    axes[2].axhline(closed_form.table_1(1.0)[0], color="k", ls=":", label="bounded reward, R/β = 1: stays")
    axes[2].set(xlabel=f"steps (lr {lr:g})", ylabel="π(y₁), never demonstrated", title="Only a bounded reward keeps an unseen action")
    axes[2].legend(fontsize=10, frameon=False)
    for axis in axes:
        axis.title.set_fontsize(14)
        axis.xaxis.label.set_fontsize(12)
        axis.yaxis.label.set_fontsize(12)
        axis.tick_params(labelsize=11)
    figure.savefig(cfg.out, dpi=110)
    plt.close(figure)


def main(cfg):
    """Print the table and write the figure. Returns True if every row passed. Raises BadInput for arguments out of range."""
    for name in ("expert", "ref"):
        values = getattr(cfg, name)
        if len(values) != 3 or min(values) <= 0:
            raise BadInput(f"--{name} {values}: give three probabilities above 0 (they are normalised)")
    if cfg.beta <= 0 or cfg.R <= 0 or cfg.rounds < 1:
        raise BadInput("--beta and --R must be above 0, --rounds at least 1")
    if cfg.ref_update not in ("both", "fixed", "refreshed") or cfg.resampling not in ("both", "fresh", "stale"):
        raise BadInput("--ref_update is fixed, refreshed or both; --resampling is fresh, stale or both")
    figure_path("--out", cfg.out)
    started, results = time.monotonic(), []
    print(f"three actions: beta {cfg.beta:g}, R {cfg.R:g}, expert {cfg.expert}, ref {cfg.ref}")
    for check in checks(cfg):
        results.append(check)
        last = np.atleast_2d(check.learned)[-1]
        shown = " ".join(f"{value:8.6f}" for value in last)
        verdict = "PASS" if check.passed else "FAIL"
        print(f"{verdict}  {check.name:45} {shown:28} off by {check.error:7.1e} (≤ {check.tolerance:.0e})  {check.note}", flush=True)
    draw_figure(results, cfg)
    laws = {check.name.strip(): {"law": np.atleast_2d(check.law).tolist(), "learned": np.atleast_2d(check.learned).tolist()}
            for check in results if check.is_policy}
    content = {"config": asdict(cfg), "commit": commit(), "laws": laws}
    write_atomic(Path(cfg.out).with_suffix(".json"), json.dumps(content, ensure_ascii=False) + "\n")
    for settings in OTHERS if cfg.full else ():
        print(f"with {settings}")
        for check in checks(replace(Config(), **settings)):
            results.append(check)
            if not check.passed:
                print(f"FAIL  {check.name:45} off by {check.error:7.1e} (≤ {check.tolerance:.0e})", flush=True)
    missed = sum(not check.passed for check in results)
    print(f"{len(results) - missed} of {len(results)} on their law in {time.monotonic() - started:.0f} s; figure: {cfg.out}")
    return not missed


if __name__ == "__main__":
    with exit_codes("three_actions"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.three_actions", description=__doc__)) else 1)
