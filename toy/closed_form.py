"""The oracles: exact policies that the methods must reach, in numpy alone. Imports nothing of ours, so that it can judge what is ours.

Policies are probability vectors over the finitely many completions of one prompt. E is the expert, ref the reference, β > 0 the
pull to ref, r a reward vector. Every law is derived in its docstring; toy/three_actions.py and the tests hold the methods to them.

The lemma behind half of them, the **pairwise density-ratio lemma**: for full-support P and Q,

    argmin_f  E_{y~P, y'~Q} log(1 + exp(−(f(y) − f(y'))))   =   log P/Q + const.

Proof. Collect the two terms of each unordered pair {a, b}: it occurs as (a first) with weight P_a Q_b and as (b first) with weight
P_b Q_a, so its part of the loss is the cross-entropy of a coin with P(a first) = P_a Q_b / (P_a Q_b + P_b Q_a) under the prediction
σ(f_a − f_b). It is smallest iff the two agree, i.e. f_a − f_b = log(P_a/Q_a) − log(P_b/Q_b). These pair optima are consistent
with each other (f = log P/Q gives all of them), so all are reached together, and nothing smaller exists.
"""

import numpy as np


def normalise(weights):
    weights = np.asarray(weights, dtype=np.float64)
    return weights / weights.sum()


def kl(p, q):
    """KL(p‖q) in nats; 0·log 0 = 0."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    seen = p > 0
    return float((p[seen] * (np.log(p[seen]) - np.log(q[seen]))).sum())


def tilt(ref, reward, beta):
    """π* ∝ ref·exp(r/β): the maximiser of E_π[r] − β·KL(π‖ref).

    E_π[r] − β·KL(π‖ref) = β·log Z − β·KL(π‖π*), with Z = Σ ref·exp(r/β); the first term is constant, the second is 0 at π = π*.
    """
    scaled = np.asarray(reward, dtype=np.float64) / beta
    return normalise(np.asarray(ref) * np.exp(scaled - scaled.max()))


def table_1(bound_over_beta, n_actions=3):
    """The papers' Example 1: uniform ref, the only demonstration is the last action, reward in [0, R]; x = R/β. Corrected.

    The likelihood of the demonstration under π_r ∝ e^{r/β} rises with r of the demonstrated action and falls with every other, so the
    bounds decide: r = (0, ..., 0, R), and π = (1, ..., 1, e^x) / (n − 1 + e^x). The paper prints 2/(2 + e^x) for each unseen action,
    which sums to (4 + e^x)/(2 + e^x) > 1.
    """
    reward = np.zeros(n_actions)
    reward[-1] = bound_over_beta
    return tilt(np.full(n_actions, 1 / n_actions), reward, 1.0)


def demonstration_law(expert, ref, bound_over_beta):
    """Maximum-likelihood inverse RL with a reward in [0, R], any expert, any ref with full support: the policy it ends at. x = R/β.

    Maximise E_E[log π] over π = ref·u/Z with u = e^{r/β} in [1, e^x]. In r it is concave, with gradient (E − π)/β. The KKT
    conditions: π = E where u is inside its bounds (so u = Z·E/ref there), E ≤ π where u = 1, E ≥ π where u = e^x; together
    u = clip(Z·E/ref, 1, e^x). What remains is Z itself, from Σ ref·u = Z. The left side minus the right, divided by Z, is
    Σ ref·clip(E/ref, 1/Z, e^x/Z) − 1: it falls in Z, so bisection finds the root; Z is an average of u, so log Z lies in [0, x].
    (The root may be an interval, along which π is the same: a reward shifted by a constant.) If the spread of E/ref fits into e^x, π = E.
    """
    expert, ref = normalise(expert), normalise(ref)

    def policy_of(log_z):
        with np.errstate(over="ignore"):  # an infinite upper bound is no bound
            return ref * np.clip(expert / ref, np.exp(-log_z), np.exp(bound_over_beta - log_z))

    low, high = 0.0, float(bound_over_beta)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy_of(middle).sum() > 1 else (low, middle)
    return normalise(policy_of((low + high) / 2))


def geometric_mixture(expert, ref, beta):
    """π ∝ E^{1/(1+β)}·ref^{β/(1+β)}: the fixed point of logistic IRFT with fresh samples and a reference that stays.

    The expected gradient weighs the ordered pair (a demonstrated, b sampled) by E_a·π_b·σ(−β·Δ_ab), Δ_ab = f_a − f_b, f = log π/ref,
    and moves probability from b to a. At rest each pair is in balance: E_a π_b σ(−βΔ_ab) = π_a E_b σ(βΔ_ab), i.e.
    e^{βΔ_ab} = (E_a/π_a)/(E_b/π_b), so β·log π/ref = log E/π + const. Solve for π.
    """
    return normalise(np.asarray(expert) ** (1 / (1 + beta)) * np.asarray(ref) ** (beta / (1 + beta)))


def converged_round(expert, sampler, ref, beta):
    """π ∝ ref·(E/π_t)^{1/β}: where one round of logistic IRFT ends whose samples stay those of π_t (one SPIN iteration: ref = π_t).

    The lemma with P = E, Q = π_t and f = β·log π/ref.
    """
    expert, sampler, ref = (np.log(np.maximum(p, 1e-300)) for p in (expert, sampler, ref))  # in logs: the ratio may overflow
    law = ref + (expert - sampler) / beta
    return normalise(np.exp(law - law.max()))


def rounds_law(expert, ref, beta, n_rounds, *, ref_update):
    """The policies after 1..n_rounds converged rounds, (n_rounds, n_actions), each sampling from the policy before it.

    With e_t = log(π_t/E) up to a constant: refreshed reference (SPIN) e_{t+1} = (1 − 1/β)·e_t, which settles at E iff β > 1/2;
    fixed reference e_{t+1} = e_0 − e_t/β, which settles iff β > 1 (then at the geometric mixture), and at β = 1 swings between E
    and ref for ever.
    """
    policy, law = normalise(ref), []
    for _ in range(n_rounds):
        policy = converged_round(expert, policy, policy if ref_update else ref, beta)
        law.append(policy)
    return np.array(law)


def sft_flow(time, n_others=2):
    """Probability of the demonstrated action after gradient flow of its log-likelihood for `time` = lr·steps, from equal logits.

    Let d be its logit minus that of each of the n other (equal) actions: p = e^d/(n + e^d), the flow is d' = (1 − p) + (1 − p)/n
    = (n + 1)/(n + e^d), so n·d + e^d = 1 + (n + 1)·time. Newton's method on this convex increasing function, from the right.
    """
    target = 1 + (n_others + 1) * time
    d = np.log(target)
    for _ in range(60):
        d -= (n_others * d + np.exp(d) - target) / (n_others + np.exp(d))
    return float(np.exp(d) / (n_others + np.exp(d)))


def identity_round(expert, ref, pull):
    """Identity-h IRFT for one round whose samples stay those of ref: softmax(log ref + pull·(E − ref)), pull = β·lr·steps.

    The expected gradient of −β·(log π(y) − log π(ỹ)) in the logits is −β·(E − q) with q the sampler, whatever π is: the −p of both
    softmaxes cancels. So the inner steps are constant, and K of them equal one of K times the size: T rounds of K steps of size lr
    are T steps of SFT of size β·K·lr.
    """
    return tilt(ref, np.asarray(expert) - np.asarray(ref), 1 / pull)
