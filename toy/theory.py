"""Checks the lemmas and the theorem behind learning a reward from demonstrations, and the KL estimators, where all can be computed exactly.

Lemmas  A GPT with a scalar head is the reward r of all 85 completions of two prompts (of unequal weight ρ). Two more GPTs are ref and the
        expert E. So π_θ ∝ ref·e^{r/β} and ℓ(θ) = E_ρ E_E[log π_θ] are finite sums, in float64. β is not 1, so a missing 1/β shows.
          value      E_E[r]/β − E_π[r]/β + KL(π‖ref) = ℓ(θ) − E_E[log ref] + KL(π‖π_θ), because log ref + r/β = log π_θ + log Z and log Z
                     cancels. So π_θ is the minimiser, the minimum is ℓ(θ) − E_E[log ref], and any other π exceeds it by KL(π‖π_θ).
          gradient   ∇ log Z = E_{π_θ}[∇r]/β, hence ∇ℓ = (E_E[∇r] − E_{π_θ}[∇r])/β. With r = β·log π_θ/ref + β·log Z it becomes Lemma 3.2.
                     But E_π[∇ log π] = ∇ Σ π = 0 for every π, so its term of the own answers is 0 and SFT's gradient remains.
Theorem SGD with η = c/√(TK) on ĝ = ∇r(y) − ∇r(ỹ). ỹ is a sample of the policy at the start of the round of K steps; r is in units of β.
        The problems are random, with four actions: a reward per action, or a two-layer net a·sin(Wφ), bounded with all its derivatives,
        as assumed. The proof says ‖Σ_{i<k} ĝ_i‖² ≤ kG², but equal gradients make it k²G². With k² the same proof gives (bias
        b_k = π_k − π_0, ‖b_k‖ ≤ L̃·η·‖Σ_{i<k} ĝ_i‖; the mean of k² over a round is (K − 1)(2K − 1)/6)
          mean E‖∇ℓ‖² ≤ 2(ℓ* − ℓ_0)/(c√(TK)) + c·L·G²/√(TK) + c²·L̃²·G²·(K − 1)(2K − 1)/(6TK):  O(1/√(TK) + K/T), not 1/√(TK) + 1/T.
        For a reward per action L = L̃ = ½ (the largest variance of a one-hot vector along a direction), G² = 2, ℓ* − ℓ_0 = KL(E‖ref).
Data    L − L̂ is E_E of r/β + log ref minus its mean over D. These numbers have a range of at most C_r/β − C_p, C_p = min log ref, so
        Hoeffding's inequality applies to a θ that does not depend on D. It does not apply to the θ̂ that maximises L̂(·; D).
KL      Σ_y π(y)·k(y) and its gradient with π(y) held constant, which is the gradient of a loss over samples.

    python -m toy.theory                     # PASS or FAIL per identity, a verdict per sentence of the papers; a figure; exit 1 on a miss
    python -m toy.theory --full              # four times the seeds

The papers' numbers: 000 "Getting More Juice Out of the SFT Data" (RFT), 002 "From Demonstrations to Rewards", 004 the lecture. Slopes use
means over problems: on one problem a long round may hit the optimum by chance. Checked by tests/toy/test_theory.py.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch

from minialign.batch import collate
from minialign.engine.common import BadInput
from minialign.kl import exact_kl, k1, k2, k3
from minialign.methods.irft import irft_loss
from minialign.methods.rft import reward_alignment_loss
from minialign.methods.sft import sft_loss
from minialign.rewards import score
from minialign.settings import cli, exit_codes
from toy import closed_form
from toy.report import Report
from toy.tiny_language import Language, tiny_gpt


@dataclass
class Config:
    beta: float = 0.3               # β of the lemmas: the pull to ref, in units of reward
    bound: float = 1.5              # C_r: the rewards lie in [0, C_r]
    step_size: float = 1.0          # c of the theorem's η = c/√(TK)
    replicas: int = 100             # problems per seed, each with its own samples; the theorem's E‖∇ℓ‖² is their mean
    trials: int = 4000              # data sets for Lemma 4.1 (a twentieth of them for the fitted θ̂)
    seeds: int = 2                  # sets of GPTs for the lemmas and of problems for the theorem
    full: bool = False              # use four times as many seeds
    out: str = "runs/theory.png"    # path of the figure


# ------------------------------------------------------------------------------------------------- the lemmas, by enumeration


class World:
    """Two prompts, and one GPT each for reward, ref, expert and policy. The reward cannot express the expert as a tilt of ref."""

    def __init__(self, cfg, seed):
        language = self.language = Language(n_content=4, max_new=3, n_prompts=2)
        self.beta, self.rho = cfg.beta, torch.tensor([0.8, 0.2], dtype=torch.float64)  # unequal, so that a plain mean over prompts shows
        self.policy, ref, expert = (tiny_gpt(language.vocab_size, seed=3 * seed + i) for i in range(3))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reward_model = tiny_gpt(language.vocab_size, seed=1000 + seed).with_scalar_head(reward_bound=cfg.bound)
            torch.nn.init.normal_(self.reward_model.head.weight, std=0.5)  # so that the rewards fill [0, C_r]
        self.token_ref_logps = language.token_logps(ref).detach()  # (N, C, T)
        self.ref_logps = self.token_ref_logps.sum(-1)  # (N, C)
        self.expert = language.law_of(expert)  # (N, C)
        rows = [(x, list(y)) for x in language.prompts for y in language.completions]
        self.rows = collate(*zip(*rows, strict=True), pad_id=language.eos_id)

    def rewards(self):
        return score(self.reward_model, self.rows).view(self.expert.shape)  # (N, C)

    def logps(self, rewards):
        """log π_θ, Eq. 9 of the RFT paper, (N, C)."""
        return (self.ref_logps + rewards / self.beta).log_softmax(-1)

    def joint(self, law):
        return self.rho[:, None] * law  # (N, C), sums to 1

    def likelihood(self):
        return (self.joint(self.expert) * self.logps(self.rewards())).sum()  # ℓ(θ)


def gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def minimax(world, laws, rewards):
    """E_E[r]/β − E_π[r]/β + KL(π‖ref) for laws (N, C): Eq. 5 of the RFT paper, in numpy."""
    total = 0.0
    experts, refs = world.expert.numpy(), world.ref_logps.exp().numpy()
    for weight, law, expert, r, ref in zip(world.rho.tolist(), laws, experts, rewards, refs, strict=True):
        total += weight * ((expert - law) @ r / world.beta + closed_form.kl(law, ref))
    return total


def minimax_value(report, world, seed):
    rewards = world.rewards().detach().numpy()
    best = np.stack([closed_form.tilt(p, r, world.beta) for p, r in zip(world.ref_logps.exp().numpy(), rewards, strict=True)])
    value = minimax(world, best, rewards)
    expected = world.likelihood() - (world.joint(world.expert) * world.ref_logps).sum()
    report.check(f"Lemma 3.1, value, seed {seed}", value, expected.item(), 1e-12, "ℓ(θ) − E_E[log ref]")
    rng, excesses, distances = np.random.default_rng(seed), [], []
    for size in np.repeat([1e-3, 0.1, 1.0, 3.0], 12):
        law = np.stack([closed_form.normalise(p * np.exp(size * rng.normal(size=p.shape))) for p in best])
        excesses.append(minimax(world, law, rewards) - value)
        distances.append(world.rho.numpy() @ [closed_form.kl(p, q) for p, q in zip(law, best, strict=True)])
    report.check("  the excess of 48 other policies", excesses, distances, 1e-12, "KL(π‖π_θ)")
    report.gate("  none of them is smaller", min(excesses) > 0, f"smallest excess {min(excesses):.1e}")
    passed = all(check["passed"] for check in report.checks[-3:])
    report.claim("000 Lemma 3.1", "maximising ℓ is the max-min problem (5)", "value and minimiser by enumeration", holds=passed)


def expected_alignment(rewards, demo_weights, sample_weights, beta):
    """The expectation of RFT's own loss, −(E_demo[r] − E_sample[r])/β. It is linear in the rewards, so weighted rewards give it."""
    demo_rewards, sample_rewards = (weights.numel() * (weights * rewards).flatten() for weights in (demo_weights, sample_weights))
    return reward_alignment_loss(demo_rewards, sample_rewards, beta=beta)[0]


def expected_irft(logps, ref_logps, demo_weights, sample_weights, beta):
    """The expectation of IRFT's own loss with h = identity, computed in the same way."""
    demo, sample, ref_demo, ref_sample = (
        w.numel() * (w * x).flatten() for x in (logps, ref_logps) for w in (demo_weights, sample_weights)
    )
    return irft_loss(demo, sample, ref_demo, ref_sample, beta=beta, h="identity")[0]


def empirical_likelihood(world, demos):
    """L̂(θ; D), Eq. 6 of 002 as printed. π_θ and its KL are not detached. That this makes no difference is part of Lemma 5.1."""
    rewards = world.rewards()
    logps = world.logps(rewards)
    inner = rewards / world.beta - (logps - world.ref_logps)  # its mean under π_θ is E[r]/β − KL
    return (demos * (rewards / world.beta + world.ref_logps)).sum() - (world.joint(logps.exp()) * inner).sum()


def reward_gradients(report, world, seed):
    """Lemmas 3.1 and 5.1: the expected gradient of RFT's loss against autograd through the normaliser (for 5.1, through the policy)."""
    rewards = world.rewards()
    own = world.joint(world.logps(rewards).detach().exp())
    formula = -gradient(expected_alignment(rewards, world.joint(world.expert), own, world.beta), world.reward_model)
    error = relative(formula, gradient(world.likelihood(), world.reward_model))
    report.check(f"Lemma 3.1, gradient, seed {seed}, relative error", error, 0, 1e-10, "(E_E[∇r] − E_π[∇r])/β by autograd of ℓ")

    drawn = torch.multinomial(world.joint(world.expert).flatten(), 40, replacement=True, generator=torch.Generator().manual_seed(seed))
    demos = torch.bincount(drawn, minlength=own.numel()).view(own.shape) / 40  # relative frequencies of 40 demonstrations
    formula = -gradient(expected_alignment(world.rewards(), demos, own, world.beta), world.reward_model)
    error = relative(formula, gradient(empirical_likelihood(world, demos), world.reward_model))
    report.check("Lemma 5.1, the same for 40 demonstrations", error, 0, 1e-10, "D's prompts do not have the weights ρ")
    report.claim("002 Lemma 5.1", "∇L̂ = E_D[∇r] − E_π[∇r] (over β)", f"relative error {error:.0e}", holds=report.checks[-1]["passed"])


def self_generation(report, world, seed):
    """Lemma 3.2, first for the π_θ of a reward, then for a net that is itself the policy, as IRFT trains it."""
    logps, demos = world.logps(world.rewards()), world.joint(world.expert)
    loss = expected_irft(logps, world.ref_logps, demos, world.joint(logps.detach().exp()), world.beta)
    error = relative(-gradient(loss, world.reward_model) / world.beta, gradient(world.likelihood(), world.reward_model))
    report.check(f"Lemma 3.2, seed {seed}, relative error", error, 0, 1e-10, "E_E[∇ log π/ref] − E_π[∇ log π/ref] by autograd of ℓ")
    report.claim("000 Lemma 3.2", "∇ℓ = E_E[∇ log π/ref] − E_π[∇ log π/ref]", f"relative error {error:.0e}", holds=error <= 1e-10)

    token_logps = world.language.token_logps(world.policy)  # (N, C, T)
    logps = token_logps.sum(-1)
    fresh, stale = world.joint(logps.detach().exp()), world.joint(world.ref_logps.exp())  # answers of the policy, answers of ref
    weighted = (demos[..., None] * token_logps).flatten(0, 1)
    sft = gradient(sft_loss(weighted, world.language.mask.repeat(2, 1), n_tokens=1)[0], world.policy)
    shares = [relative(gradient(expected_irft(logps, world.ref_logps, demos, own, world.beta), world.policy), world.beta * sft)
              for own in (fresh, stale)]
    report.check("  the net as policy: IRFT's gradient − β·SFT's", shares[0], 0, 1e-10, f"relative; with answers of ref {shares[1]:.2f}")
    report.claim("000 Lemma 3.2", "fresh own answers set the expected gradient of IRFT (h = identity) apart from SFT's",
                 f"by {shares[0]:.0e} of its length (answers of another policy: by {shares[1]:.2f})", holds=shares[0] > 1e-10)


def two_actions(p, eps):
    """What Lemma B.3 bounds, and its bounds, for π_θ(y₁) = p + ε·sin θ on a grid of θ. y₁ is the only demonstration.

    Any positive π is a π_θ of Eq. 9, with r = β·log π/ref. ∇π(·|x) = ε·cos θ·(1, −1), so L0 = √2·ε; π'' = −ε·sin θ, so L1 = ε.
    The estimator is ∇ log π(y₁) − ∇ log π(ỹ), largest at ỹ = y₂; ℓ'' = π''/π − (π'/π)². G = 2·L0/π_min and L are the paper's, without
    the 1/β at the start of the proof, which is not in Eq. 15.
    """
    theta = np.linspace(-np.pi, np.pi, 100_001)
    pi, slope, curvature = p + eps * np.sin(theta), eps * np.cos(theta), -eps * np.sin(theta)
    L0, L1, lowest, highest = math.sqrt(2) * eps, eps, min(p - eps, 1 - p - eps), max(p + eps, 1 - p + eps)
    return {
        "curvature": np.abs(curvature / pi - (slope / pi) ** 2).max(), "estimator": np.abs(slope / pi + slope / (1 - pi)).max(),
        "L printed": L0 * (3 * L0 + L1) / lowest**2, "L proved": 2 * (highest * L1 + 2 * L0**2) / lowest**2,
        "G printed": 2 * L0 / np.maximum(pi, 1 - pi).min(), "G pointwise": 2 * L0 / lowest,
    }


def constants(report):
    """Lemma B.3 and Assumption B.1 of the RFT paper, each on two actions for which the printed and the proved form differ."""
    even, rare = two_actions(0.5, 0.02), two_actions(0.06, 0.05)
    report.check("Lemma B.3: sup |ℓ''|, π = ½ + .02·sin θ", even["curvature"], 0.02 / 0.48, 1e-9, "ε/(½ − ε), where sin θ = −1")
    report.gate("  at most 2(π_max·L1 + 2·L0²)/π_min²", even["curvature"] <= even["L proved"],
                f"{even['curvature']:.4f} ≤ {even['L proved']:.4f}", "as in its proof")
    report.claim("000 Lemma B.3", "ℓ is smooth with L = L0(3L0 + L1)/π_min²",
                 f"|ℓ''| reaches {even['curvature']:.4f}, L = {even['L printed']:.4f}", holds=even["curvature"] <= even["L printed"])
    report.gate("B.1 pointwise: |ĝ| ≤ 2·L0/π_min, π = .06 + .05·sin θ", rare["estimator"] <= rare["G pointwise"],
                f"{rare['estimator']:.3f} ≤ {rare['G pointwise']:.3f}", "π_min ≤ π(y|x) for every y")
    report.claim("000 Assumption B.1", "π_min ≤ ‖π(·|x)‖_∞ is enough for G = 2·L0/π_min",
                 f"|ĝ| reaches {rare['estimator']:.3f}, G = {rare['G printed']:.3f}", holds=rare["estimator"] <= rare["G printed"])


# ---------------------------------------------------------------------------------------------------------------- the theorem

SIZES = (100, 400, 1600, 6400)  # N = TK
SCHEDULES = {  # name: T(N), K = N/T
    "K = 1": lambda n: n, "K = T": lambda n: round(n**0.5), "K = T²": lambda n: round(n ** (1 / 3)), "T = 10": lambda n: 10,
}


class Problems:
    """Random problems with four actions, one per replica. θ is a reward per action or the first layer of a·sin(Wφ)."""

    def __init__(self, replicas, rng, *, net, hidden=8, inputs=4):
        self.expert, self.ref = rng.dirichlet(np.full(4, 2.0), size=(2, replicas))  # (R, 4) each
        self.start, self.net = np.zeros((replicas, 4)), net
        if net:
            features = rng.normal(size=(replicas, 4, inputs))
            self.features = features / np.linalg.norm(features, axis=2, keepdims=True) * inputs**0.5
            self.output = rng.choice([-1.0, 1.0], size=(replicas, hidden)) / hidden**0.5
            self.start = rng.normal(size=(replicas, hidden, inputs)) / inputs**0.5

    def rewards(self, theta):
        """The rewards (R, 4), and a function that maps weights v (R, 4) to Σ_y v(y)·∇r(y), which has the shape of theta."""
        if not self.net:
            return theta, lambda v: v
        angles = theta @ self.features.transpose(0, 2, 1)  # (R, H, 4)
        slopes = self.output[:, :, None] * np.cos(angles)
        return (self.output[:, None] @ np.sin(angles))[:, 0], lambda v: (slopes * v[:, None]) @ self.features


def resampled(k):
    """Whether Algorithm 1 refreshes the sampling policy at step k of a round: only at the first."""
    return k == 0


def descend(problems, T, K, c, rng):
    """Run Algorithm 1. Returns E‖∇ℓ(θ)‖², the mean over the replicas, before each of its TK steps."""
    theta, eta, actions, norms = problems.start, c / math.sqrt(T * K), np.eye(4), []
    expert_edges = problems.expert.cumsum(1)[:, :-1]
    for _ in range(T):
        for k in range(K):
            rewards, combine = problems.rewards(theta)
            law = problems.ref * np.exp(rewards)
            law /= law.sum(1, keepdims=True)
            if resampled(k):
                own_edges = law.cumsum(1)[:, :-1]
            norms.append((combine(problems.expert - law) ** 2).sum() / len(law))
            u = rng.random((2, len(law), 1))
            demo, own = actions[(u[0] > expert_edges).sum(1)], actions[(u[1] > own_edges).sum(1)]
            theta = theta + eta * combine(demo - own)
    return np.array(norms)


def drift(k, square=True):
    """Σ_{j<k} of the bound on ‖Σ_{i<j} ĝ_i‖²/G². The bound is j² for equal gradients; the proof has j."""
    return sum(j**2 if square else j for j in range(k))


def bound(T, K, c, gap, *, square):
    """The proof's bound on the mean of E‖∇ℓ‖² over all steps, for a reward per action (see the top). square=False: as printed."""
    L = bias = 0.5
    G2, n = 2.0, T * K
    return 2 * gap / (c * math.sqrt(n)) + c * L * G2 / math.sqrt(n) + c**2 * bias**2 * G2 * drift(K, square) / K / n


def stale_round(report, trials, rng):
    """Σ_k E‖Σ_{i<k} ĝ_i‖² of one round of K = 10, sampled and exact. For a sum of k independent draws the expectation is
    k·(trace of the covariance) + k²·‖mean‖². Here the mean is E − π_0 and the trace is 2 − ‖E‖² − ‖π_0‖²."""
    expert, law, K = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.1, 0.1, 0.1, 0.7]), 10
    actions = np.eye(4)
    steps = actions[rng.choice(4, p=expert, size=(trials, K))] - actions[rng.choice(4, p=law, size=(trials, K))]
    sums = (steps.cumsum(1)[:, :-1] ** 2).sum(2).sum(1)  # (trials,) over k = 1 … K − 1
    trace, square = 2 - expert @ expert - law @ law, (expert - law) @ (expert - law)
    exact = trace * drift(K, False) + square * drift(K)
    error = 4 * float(sums.std()) / trials**0.5
    report.check("A stale round of ten: Σ_k E‖Σ_{i<k} ĝ_i‖²", sums.mean(), exact, error, "Σ_k k·trace + k²·‖E − π_0‖²")
    report.gate("  at most k²·G² each, as for equal gradients", sums.mean() <= 2 * drift(K), f"{sums.mean():.0f} ≤ 2·{drift(K)}")
    equal = (np.ones((K, 2)).cumsum(0)[:-1] ** 2).sum(1)  # ‖Σ_{i<k} ĝ_i‖² of equal gradients, G² = 2
    report.check("  the bound of equal gradients is attained", equal.sum(), 2 * drift(K), 1e-12, "(K − 1)K(2K − 1)/6 = 285, times G²")
    report.claim("000 Theorem 3.1, proof", "‖Σ_{i<k} ĝ_i‖² ≤ kG², added up over k < 10",
                 f"equal gradients {equal.sum():.0f}, Algorithm 1 {sums.mean():.0f}, the bound {2 * drift(K, False)}",
                 holds=max(equal.sum(), sums.mean()) <= 2 * drift(K, False))


def without_noise(c, rounds=2000):
    """‖∇ℓ‖² for K = T → ∞, (rounds, 50). The noise averages out: a round has length ηK = c and the direction E − π of its start."""
    expert, ref, theta, rows = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.2, 0.3, 0.4]), np.zeros(4), []
    for _ in range(rounds):
        step = c * (expert - closed_form.tilt(ref, theta, 1.0))
        laws = ref * np.exp(theta + np.linspace(0, 1, 50, endpoint=False)[:, None] * step)
        rows.append(((expert - laws / laws.sum(1, keepdims=True)) ** 2).sum(1))
        theta = theta + step
    return np.array(rows)


def any_step_size(report):
    """K = T is gradient ascent with step size c. It converges if c < 2/L, L the largest eigenvalue of diag E − EEᵀ (here 2/L = 5.2)."""
    small, large = without_noise(3.0), without_noise(8.0)
    report.check("K = T without noise, c = 3: E‖∇ℓ‖² at the end", small[-1].max(), 0, 1e-12, "c < 2/L = 5.2")
    report.claim("000 Theorem 3.1", "K = T: min E‖∇ℓ‖² → 0 for every c in η = c/√(TK)", "without noise, c = 8, 2000 rounds: "
                 f"min {large.min():.1e}, in the last 500 {large[-500:].min():.1e}, mean there {large[-500:].mean():.2f}",
                 holds=large.min() < 1e-9)


def slope(values):
    """The slope of log values in log N."""
    return float(np.polyfit(np.log(SIZES), np.log(values), 1)[0])


def rates(report, cfg, seeds):
    """Theorem 3.1: slopes of min and mean E‖∇ℓ‖² in N = TK, and the two bounds. Returns the curves to draw."""
    curves = {}
    for net in (False, True):
        for name, T_of in SCHEDULES.items():
            for seed in range(seeds):
                for n in SIZES:
                    rng = np.random.default_rng((seed, net))  # the same problems for every schedule and N
                    problems, T = Problems(cfg.replicas, rng, net=net), T_of(n)
                    norms = descend(problems, T, n // T, cfg.step_size, rng)
                    gap = np.mean([closed_form.kl(e, p) for e, p in zip(problems.expert, problems.ref, strict=True)])
                    bounds = [bound(T, n // T, cfg.step_size, gap, square=square) for square in (False, True)]
                    curves.setdefault((net, name), []).append((seed, n, norms.min(), norms.mean(), *bounds))

    def slopes(net, name, column=2):
        rows = curves[net, name]
        return [slope([row[column] for row in rows if row[0] == seed]) for seed in range(seeds)]

    def worded(values):
        return " ".join(f"{value:+.2f}" for value in values)

    for net in (False, True):
        for name in SCHEDULES:
            least, mean = slopes(net, name), slopes(net, name, 3)
            words = f"slope of the min {worded(least)}, of the mean {worded(mean)}"
            if not net or name == "K = T²":
                print(f"      {'two layers' if net else 'tabular'}, {name:41} {words}", flush=True)
            elif name == "T = 10":
                report.gate(f"two layers, {name}: stalls", min(least) > -0.25, words, "min above −.25")
            else:
                report.gate(f"two layers, {name}: falls like 1/√N", all(-0.8 <= x <= -0.4 for x in least), words, "min in [−.8, −.4]")
    single, square = slopes(True, "K = 1"), slopes(True, "K = T")
    report.claim("000 Theorem 3.1", "min E‖∇ℓ‖² falls as 1/√(TK), K = 1 and K = T (slope −½)", f"{worded(single)} and {worded(square)}",
                 holds=max(single + square) <= -0.4)
    long = slopes(True, "K = T²")
    report.claim("000 Theorem 3.1", "a larger K does no harm beyond 1/T: K = T² falls as N^(−1/3)", worded(long), holds=max(long) <= -0.25)

    tabular = [row for (net, _), rows in curves.items() if not net for row in rows]
    report.gate("tabular: mean E‖∇ℓ‖² below the bound with k²", all(row[3] <= row[5] for row in tabular),
                f"at most {max(row[3] / row[5] for row in tabular):.2f} of it, {len(tabular)} runs", "O(1/√(TK) + K/T)")
    over = max(row[3] / row[4] for row in tabular)
    report.claim("000 Theorem 3.1, proof", "mean E‖∇ℓ‖² stays below the bound with k (tabular)", f"it reaches {over:.2f} of the bound",
                 holds=over <= 1)
    return curves


# ------------------------------------------------------------------------------------------------------ how far L̂ is from L


def hoeffding(spread, n, delta):
    """The right side of Lemma 4.1, with spread = C_r/β − C_p."""
    return spread * math.sqrt(math.log(2 / delta) / (2 * n))


def gaps(law, values, n, trials, rng):
    """|L − L̂| of a fixed θ, (trials,). values: r/β + log ref of each outcome. A data set has n outcomes."""
    return np.abs(rng.multinomial(n, law, size=trials) @ values / n - law @ values)


def fitted_gaps(law, ref, n, trials, scaled_bound, rng):
    """|L − L̂| at the θ̂ that maximises L̂, (trials,). The policy is closed_form's, for the frequencies in D and a reward per outcome
    in [0, C_r]. L is the mean of log π_θ̂ under E, L̂ its mean under D."""
    drawn = rng.multinomial(n, law, size=trials) / n
    return np.array([abs((law - seen) @ np.log(closed_form.demonstration_law(seen, ref, scaled_bound))) for seen in drawn])


def inner_likelihood(n, allowed):
    """P(|X/n − ½| ≤ allowed) for X heads of n fair coins: the exact coverage with two outcomes."""
    return sum(math.comb(n, k) for k in range(n + 1) if abs(k / n - 0.5) <= allowed + 1e-12) / 2**n


def coverages(report, cfg, worlds):
    """Lemma 4.1, θ fixed and fitted. Returns |L − L̂| divided by its bound, for the figure."""
    rng, ratios, covered = np.random.default_rng(0), {}, []
    for seed, world in enumerate(worlds):
        values = (world.rewards() / cfg.beta + world.ref_logps).detach().flatten().numpy()
        law, spread = world.joint(world.expert).flatten().numpy(), cfg.bound / cfg.beta - float(world.ref_logps.min())
        for n in (20, 50):
            ratio = gaps(law, values, n, cfg.trials, rng) / hoeffding(spread, n, 0.1)
            share = float((ratio <= 1).mean())
            covered.append(share >= 0.9)
            report.gate(f"Lemma 4.1, θ fixed, seed {seed}, |D| = {n}", covered[-1],
                        f"covered {share:.4f} ≥ .9, mean gap {ratio.mean():.2f} of the bound")
            ratios[f"θ fixed, |D| = {n}"] = ratio
    # Two outcomes, each with probability ½ under E: r = C_r and ref ≈ 1, or r = 0 and ref = 1e-6. Values at both ends of their range.
    ref, law = np.array([1 - 1e-6, 1e-6]), np.array([0.5, 0.5])
    values, spread = np.array([cfg.bound / cfg.beta, 0.0]) + np.log(ref), cfg.bound / cfg.beta - math.log(1e-6)
    for n, delta in ((10, 0.3), (100, 0.1), (1000, 0.05)):
        share = float((gaps(law, values, n, cfg.trials, rng) <= hoeffding(spread, n, delta)).mean())
        exact = inner_likelihood(n, hoeffding(spread, n, delta) / (values[0] - values[1]))
        report.check(f"  two outcomes at the ends, |D| = {n}, δ = {delta:g}", share, exact, 4 * math.sqrt(exact * (1 - exact) / cfg.trials),
                     f"the binomial; at least {1 - delta:g}")
        covered.append(exact >= 1 - delta)
    report.gate("  the lemma keeps its word in all of these", all(covered), f"{sum(covered)} of {len(covered)}")
    report.claim("002 Lemma 4.1", "|L − L̂| ≤ (C_r/β − C_p)·√(ln(2/δ)/2|D|) with probability 1 − δ, θ fixed",
                 f"in {sum(covered)} of {len(covered)} cases", holds=all(covered))

    language = Language(n_content=5, max_new=3, n_prompts=1)  # 156 outcomes
    ref, expert = (language.law_of(tiny_gpt(language.vocab_size, seed=seed)).numpy()[0] for seed in (0, 1))
    shares = []
    flat = np.full(1000, 1e-3)
    for name, law, prior, n in (("156 completions", expert, ref, 50), ("1000 equal outcomes", flat, flat, 20)):
        spread = cfg.bound / cfg.beta - math.log(prior.min())
        ratio = fitted_gaps(law, prior, n, max(cfg.trials // 20, 20), cfg.bound / cfg.beta, rng) / hoeffding(spread, n, 0.1)
        shares.append(float((ratio <= 1).mean()))
        print(f"      {name}, |D| = {n}, θ̂ fitted: covered {shares[-1]:.2f}, mean gap {ratio.mean():.2f} of the bound", flush=True)
        ratios[f"θ̂ fitted, {name}"] = ratio
    report.claim("002 Lemma 4.1", "the same at the θ̂ that is fitted to D, which is the θ that is used", "covered "
                 + " and ".join(f"{share:.2f}" for share in shares) + ", promised .90", holds=min(shares) >= 0.9)
    return ratios


# ----------------------------------------------------------------------------------------------------------- KL estimators


def estimators(report, world, seed):
    """Values and gradients of k1, k2, k3 for the world's policy against ref. Returns the relative distances to draw."""
    token_logps, token_ref_logps = world.language.token_logps(world.policy), world.token_ref_logps  # (N, C, T)
    logps, ref_logps = token_logps.sum(-1), world.ref_logps
    law = world.joint(logps.detach().exp())
    backward = (world.rho * exact_kl(logps, ref_logps)).sum()  # KL(π‖ref)
    forward = (world.rho * exact_kl(ref_logps, logps)).sum()
    values = {k.__name__: (law * k(logps, ref_logps)).sum().item() for k in (k1, k2, k3)}
    kl = backward.item()
    report.check(f"KL, seed {seed}: E[k1], E[k3]", [values["k1"], values["k3"]], kl, 1e-12, "KL(π‖ref), all completions")
    report.gate("  E[k2] is another number", abs(values["k2"] - kl) > 1e-3, f"{values['k2']:.3f}, the KL {kl:.3f}")
    per_token = (law * k3(token_logps, token_ref_logps).sum(-1)).sum().item()
    report.check("  k3 summed per token", per_token, kl, 1e-12, "the same value as for whole completions")

    aim, other = gradient(backward, world.policy), gradient(forward, world.policy)
    grads = {k.__name__: gradient((law * k(logps, ref_logps)).sum(), world.policy) for k in (k1, k2, k3)}
    report.check("  as a loss k1 has no gradient", float(grads["k1"].norm() / aim.norm()), 0, 1e-10, "E_π[∇ log π] = 0")
    report.check("  k2 has that of KL(π‖ref)", relative(grads["k2"], aim), 0, 1e-10, "E_π[log π/ref·∇ log π]")
    report.check("  k3 has that of KL(ref‖π)", relative(grads["k3"], other), 0, 1e-10, "E_π[(1 − ref/π)·∇ log π] = −E_ref[∇ log π]")
    off = relative(grads["k3"], aim)
    report.claim("004 GRPO", "k3 is unbiased, in the loss too (its gradient)", f"off by {off:.2f} of ∇KL(π‖ref)", holds=off <= 1e-10)

    # Per token, as in a loss over (B, T). k2: a token's gradient misses the KL of the tokens after it. k3: the prefixes come from π, but
    # KL(ref‖π) needs them from ref. With these corrections both equal the gradients of whole completions.
    for k in (k2, k3):
        grads[f"{k.__name__} per token"] = gradient((law * k(token_logps, token_ref_logps).sum(-1)).sum(), world.policy)
    logratio = (token_logps - token_ref_logps).detach()
    to_come = logratio.flip(-1).cumsum(-1).flip(-1) - logratio
    future = gradient((law[..., None] * token_logps * to_come).sum(), world.policy)
    weights = (logratio - logratio.cumsum(-1)).exp()  # ref/π of the tokens before
    moved = gradient((law * (weights * k3(token_logps, token_ref_logps)).sum(-1)).sum(), world.policy)
    whole = grads["k2 per token"] + future
    report.check("  k2 per token lacks the future KL", relative(whole, aim), 0, 1e-10, "+ E[Σ_t ∇ log π_t·Σ_{s>t} k1_s]")
    report.check("  k3 per token lacks ref's prefixes", relative(moved, other), 0, 1e-10, "× ref/π of the tokens before")
    apart = [relative(grads[f"{name} per token"], grads[name]) for name in ("k2", "k3")]
    report.claim("004 GRPO", "a KL loss summed per token has the gradient of the whole completion's (k2, k3)",
                 f"off by {apart[0]:.2f} and {apart[1]:.2f}", holds=max(apart) <= 1e-10)
    return {name: (relative(grad, aim), relative(grad, other)) for name, grad in grads.items()}


# ------------------------------------------------------------------------------------------------------------------- figure


def draw_figure(curves, ratios, distances, out):
    """Draw the theorem's slopes, its proof's bound and the corrected one, |L − L̂| over its bound, and gradients of the KL estimators."""
    import matplotlib

    matplotlib.use("Agg")  # not at the top of the file, so that a notebook that imports it keeps its own backend
    import matplotlib.pyplot as plt

    figure, ((rate, bounds), (data, kl)) = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    sizes = np.array(SIZES)

    def mean_of(key, column):
        return [np.mean([row[column] for row in curves[key] if row[1] == n]) for n in SIZES]

    for index, name in enumerate(SCHEDULES):
        rate.loglog(sizes, mean_of((True, name), 2), f"C{index}o-", label=name)
    first = mean_of((True, "K = 1"), 2)[0]
    rate.loglog(sizes, first * (sizes / sizes[0]) ** -0.5, "k:", label="slope −½")
    rate.loglog(sizes, first * (sizes / sizes[0]) ** (-1 / 3), "k--", lw=0.8, label="slope −⅓, promised for K = T²")
    rate.set(xlabel="N = TK", ylabel="min E‖∇ℓ‖²", title="Theorem 3.1, two layers: a large K does harm")
    bounds.loglog(sizes, mean_of((False, "T = 10"), 3), "C3o-", label="measured")
    bounds.loglog(sizes, mean_of((False, "T = 10"), 4), "k--", label="the proof's bound, with kG²")
    bounds.loglog(sizes, mean_of((False, "T = 10"), 5), "k-", label="corrected, with k²G²")
    bounds.set(xlabel="N = TK, T = 10", ylabel="mean E‖∇ℓ‖²", title="A reward per action: measured above the proof's bound")
    for index, (name, ratio) in enumerate(ratios.items()):
        data.plot(np.sort(ratio), np.linspace(0, 1, len(ratio)), f"C{index}", ls="-" if index else "--", lw=1.5 if index else 3, label=name)
    data.axvline(1, color="k", ls=":")
    data.axhline(0.9, color="k", ls=":")
    data.text(1.02, 0.91, "promised: .9 of the data sets\nleft of 1", fontsize=8)
    data.set(xlabel="|L − L̂| / bound of Lemma 4.1", ylabel="share of the data sets", title="Lemma 4.1 holds for a θ that has not seen D")
    places = np.arange(len(distances))
    for shift, column, label in ((-0.2, 0, "∇KL(π‖ref)"), (0.2, 1, "∇KL(ref‖π)")):
        kl.bar(places + shift, [pair[column] for pair in distances.values()], 0.4, label=f"distance to {label}")
    kl.set_xticks(places, list(distances))
    kl.set(ylabel="relative distance", xlabel="estimator, as a loss", title="Which divergence an estimator descends")
    for axis, place in ((rate, "best"), (bounds, "best"), (data, "center right"), (kl, "best")):
        axis.legend(fontsize=8, loc=place, bbox_to_anchor=(0.95, 0.4) if axis is data else None)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(cfg):
    """Print every identity and every claim, write the figure; returns True if every gate passes. Raises BadInput."""
    if not (cfg.beta > 0 and cfg.bound > 0 and cfg.step_size > 0):
        raise BadInput(f"--beta {cfg.beta} --bound {cfg.bound} --step_size {cfg.step_size}: each must be above 0")
    if min(cfg.replicas, cfg.trials, cfg.seeds) < 1:
        raise BadInput(f"--replicas {cfg.replicas} --trials {cfg.trials} --seeds {cfg.seeds}: each must be at least 1")
    report, seeds = Report(cfg), cfg.seeds * (4 if cfg.full else 1)
    worlds = [World(cfg, seed) for seed in range(seeds)]
    for seed, world in enumerate(worlds):
        minimax_value(report, world, seed)
        reward_gradients(report, world, seed)
        self_generation(report, world, seed)
        distances = estimators(report, world, seed)
    constants(report)
    stale_round(report, cfg.trials, np.random.default_rng(0))
    any_step_size(report)
    ratios = coverages(report, cfg, worlds)
    curves = rates(report, cfg, seeds)
    draw_figure(curves, ratios, distances, cfg.out)
    return report.close({"curves": {f"{'two layers' if net else 'tabular'}, {name}": rows for (net, name), rows in curves.items()}})


if __name__ == "__main__":
    with exit_codes("theory"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.theory", description=__doc__)) else 1)
