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


def ridge_law(expert, ref, beta, ridge):
    """Where RFT rests that pays for its rewards: linear loss plus c·(r(y)² + r(ỹ)²), small steps, π ∝ ref·e^{r/β}.

    The expected loss is −(1/β)·Σ(E − π)·r + c·Σ(E + π)·r², so at rest r = (E − π)/(2cβ·(E + π)), never beyond 1/(2cβ) either way. Then
    log π − k·(E − π)/(E + π) = log ref − log Z with k = 1/(2cβ²). The left side rises in π (by 1/π + 2kE/(E + π)²), so each Z gives one
    π by bisection, and Z comes from Σ π = 1, which falls in Z. c → 0 is the expert, c → ∞ is ref.
    """
    expert, ref, k = normalise(expert), normalise(ref), 1 / (2 * ridge * beta**2)

    def policy_of(log_z):
        low, high = np.log(ref) - log_z - k, np.log(ref) - log_z + k  # |(E − π)/(E + π)| ≤ 1
        for _ in range(100):
            middle = (low + high) / 2
            p = np.exp(middle)
            rising = middle - k * (expert - p) / (expert + p) > np.log(ref) - log_z
            low, high = np.where(rising, low, middle), np.where(rising, middle, high)
        return np.exp((low + high) / 2)

    low, high = -2 * k, 2 * k
    for _ in range(100):
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


def usable_rounds(law):
    """The first of these rounds in which no probability has fallen below 1e-9: beyond, float64 arithmetic says nothing. At least one."""
    usable = np.cumprod(law.min(axis=1) > 1e-9).astype(bool)
    usable[0] = True
    return law[usable]


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


# ------------------------------------------------------------------------------------------- online methods, token by token
#
# Completions are tuples of tokens, none of them the beginning of another: the leaves of a tree. A law is a vector over them.


def rebel_law(ref, reward, beta, eta, rollouts):
    """REBEL after so many rollouts, each solved exactly, with R = r − β·log π_t/ref: π_{t+1} ∝ π_t·e^{ηR}.

    With u = log π/ref up to a constant: u ← u + η(r − βu) = (1 − ηβ)·u + ηr, from u = 0. It rests at u = r/β, which is π* ∝ ref·e^{r/β};
    the distance to it is multiplied by 1 − ηβ at each rollout, so it is reached if 0 < ηβ < 2: u = (1 − (1 − ηβ)^t)·r/β.
    """
    kept = rollouts * eta if beta == 0 else (1 - (1 - eta * beta) ** rollouts) / beta
    return tilt(ref, kept * np.asarray(reward, dtype=np.float64), 1.0)


def sequence_k3_law(ref, reward, beta):
    """Where r − β·k3 of whole completions comes to rest: π = β·ref/(c − r), not ref·e^{r/β}.

    With y ~ π held fixed, ∇k3 = (1 − ref/π)·∇log π. The expected update Σ_y π(y)·[r − β(1 − ref/π)]·∇log π(y) vanishes for every
    softmax policy iff the bracket is the same for all y: r − β + β·ref/π = c − β. Solve for π; c > max r from Σ π = 1, which falls in c.
    (It is the maximiser of E_π[r] − β·KL(ref‖π): the forward divergence.)
    """
    return _k3_node(ref, reward, np.full(len(ref), beta))


def _k3_node(ref, gain, pull):
    """π_a = pull_a·ref_a / (c − gain_a) with Σ π = 1; ref and pull above 0; all inputs (children,).

    Bisection over d = c − max gain > 0, because c itself would lose the digits of a small pull beside large gains. At
    d = max over a of pull_a·ref_a − (max gain − gain_a) one term alone is 1; at d = Σ pull·ref no term exceeds its share.
    """
    weights, gap = np.asarray(pull, dtype=np.float64) * np.asarray(ref), np.max(gain) - np.asarray(gain, dtype=np.float64)
    low, high = (weights - gap).max(), weights.sum()
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):  # neighbours in float64
            break
        low, high = (middle, high) if (weights / (middle + gap)).sum() > 1 else (low, middle)
    return normalise(weights / ((low + high) / 2 + gap))


def token_k3_law(completions, ref, gain, pull):
    """GRPO's law: advantages whose expectation is `gain` (C,) up to a constant per prompt, k3 at every token with weight `pull` (C,).

    At the prefix s the expected update of the policy's logits is Σ_a π(a|s)·[Q(s, a) − b(s, a)·(1 − ref(a|s)/π(a|s))]·∇log π(a|s), where
    Q = E_π[gain | s, a] and b = E_π[pull | s, a] average over what follows the token. k3 of later tokens is missing from Q: it is
    differentiated where it stands and credited to nobody else. It vanishes iff the bracket is the same c − … for all a:

        π(a|s) = b(s, a)·ref(a|s) / (c_s + b(s, a) − Q(s, a)),      c_s from Σ_a π(a|s) = 1.

    Q and b depend only on the policy after s, so the law is built from the last token backwards.
    For group means that contain the sample itself, E[A_i | y_i] = (G − 1)/G·(r − E r), so gain = (G − 1)/G·r, or, the same law,
    gain = r with pull = β·G/(G − 1).
    """
    law, gain, pull = np.zeros(len(ref)), np.asarray(gain, dtype=np.float64), np.asarray(pull, dtype=np.float64)

    def solve(leaves, depth):
        """Fill law[leaves] with probabilities given their common prefix of `depth` tokens; returns E[gain], E[pull] there."""
        if len(leaves) == 1 and len(completions[leaves[0]]) == depth:
            law[leaves] = 1.0
            return gain[leaves[0]], pull[leaves[0]]
        children = {}
        for leaf in leaves:
            children.setdefault(completions[leaf][depth], []).append(leaf)
        children = list(children.values())
        q, b = np.array([solve(child, depth + 1) for child in children]).T
        conditional = normalise([ref[child].sum() for child in children])
        conditional = _k3_node(conditional, q - b, b)
        for probability, child in zip(conditional, children, strict=True):
            law[child] *= probability
        return conditional @ q, conditional @ b

    ref = np.asarray(ref, dtype=np.float64)
    solve(list(range(len(ref))), 0)
    return law


def group_normalised_law(completions, ref, reward, beta):
    """GRPO as the paper prints it, for large groups: token_k3_law with gain A/|y| and pull β/|y|, A = (r − μ)/σ of the law itself.

    μ and σ are the mean and spread of r under the law, so it is found by iterating, half a step at a time. Unlike std_normalised_law
    it exists for every β: with k3 a worse completion falls only like βσ, not exponentially, and so the spread does not vanish before
    the pull does. Equal rewards: ref, because a group without spread has advantages of exactly 0.
    """
    reward, sizes = np.asarray(reward, dtype=np.float64), np.array([len(y) for y in completions])
    if np.ptp(reward) == 0:
        return normalise(ref)
    mean, spread = mean_and_spread(normalise(ref), reward)
    for _ in range(5000):
        law = token_k3_law(completions, ref, (reward - mean) / spread / sizes, beta / sizes)
        new_mean, new_spread = mean_and_spread(law, reward)
        if abs(new_mean - mean) + abs(new_spread - spread) < 1e-13 * np.abs(reward).max():
            return law
        mean, spread = (mean + new_mean) / 2, (spread + new_spread) / 2
    raise ArithmeticError("group_normalised_law did not settle in 5000 rounds")


def mean_and_spread(law, reward):
    """E[r] and the standard deviation of r under a law."""
    mean = law @ reward
    return mean, np.sqrt(law @ (reward - mean) ** 2)


def temperature_curve(ref, reward):
    """(temperatures, β): which β has the law ref·e^{r/s}, for many temperatures s, from cold to hot. See collapse_threshold.

    The grid reaches from where the last of the completions with the second-best level has died out to where everything is ref.
    """
    reward, levels = np.asarray(reward, dtype=np.float64), np.unique(reward)
    coldest = np.diff(levels).min() / (50 - 2 * np.log(normalise(ref).min()))
    temperatures = np.geomspace(coldest, 100 * np.ptp(reward), 2001)
    return temperatures, np.array([beta_of_temperature(ref, reward, s) for s in temperatures])


def beta_of_temperature(ref, reward, temperature):
    spread = mean_and_spread(tilt(ref, reward, temperature), np.asarray(reward, dtype=np.float64))[1]
    return temperature / max(spread, 1e-300)


def collapse_threshold(ref, reward):
    """(β*, its temperature): the smallest β at which rewards divided by their own spread, with the KL in the reward, still have a law.

    At rest π ∝ ref·e^{r/(βσ)} with σ = std_π(r). Name the temperature s = βσ: then β(s) = s / std of ref·e^{r/s}. As s → ∞ that spread
    tends to ref's and β → ∞; as s → 0 it vanishes exponentially and β → ∞ again. So β(s) has a smallest value β*. Below it there is no
    law but σ = 0: a smaller spread makes the pull weaker, which sharpens π, which makes the spread smaller, until one completion (or a
    tie of several) is left. (That is so for the KL in the reward. GRPO's k3 in the loss has no threshold: group_normalised_law.)
    """
    temperatures, betas = temperature_curve(ref, reward)
    best = betas.argmin()
    low, high = np.log(temperatures[best - 1]), np.log(temperatures[best + 1])
    for _ in range(60):  # golden section, in log s
        left, right = low + 0.382 * (high - low), high - 0.382 * (high - low)
        values = [beta_of_temperature(ref, reward, np.exp(x)) for x in (left, right)]
        low, high = (low, right) if values[0] < values[1] else (left, high)
    temperature = float(np.exp((low + high) / 2))
    return float(beta_of_temperature(ref, reward, temperature)), temperature


def std_normalised_law(ref, reward, beta):
    """π ∝ ref·e^{r/(βσ)}, σ = std_π(r): the warmest solution, which is where one arrives from ref. None below the collapse threshold.

    Solutions come in pairs (a cluster of rewards that are close together adds one); of each pair the warmer attracts.
    """
    if np.ptp(reward) == 0:
        return normalise(ref)
    temperatures, betas = temperature_curve(ref, reward)
    below = np.flatnonzero(betas <= beta)
    if len(below):
        low = temperatures[below[-1]]  # above it β(s) exceeds beta at every point of the grid
    else:
        threshold, low = collapse_threshold(ref, reward)  # perhaps between two points of the grid
        if beta < threshold:
            return None
    high = 2 * low
    while beta_of_temperature(ref, reward, high) < beta:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_of_temperature(ref, reward, middle) < beta else (low, middle)
    return tilt(ref, reward, (low + high) / 2)


# ------------------------------------------------------------------------------------------- demonstrations, token by token


def ift_law(completions, expert, decay):
    """Where IFT with λ = 0 and constant weights comes to rest: π(a|s) ∝ E(a|s)·E[w_t/n | s, a], not the expert.

    The expected update of the logits at the prefix s is Σ_a E(a|s)·W(s, a)·∇log π(a|s), W = E_E[w_t/n | s, a], the weight w_t = n·c_t/Σc
    being a function of the whole completion and of π. It vanishes iff E(a|s)·W(s, a) is proportional to π(a|s). W depends on π
    through ℓ = −log π, so the law is found by iterating from the expert. With completions of one token w = 1 and the law is E.
    """
    expert = np.asarray(expert, dtype=np.float64)
    prefixes = {}
    places = np.array([[prefixes.setdefault(y[:t], len(prefixes)) if t < len(y) else -1 for t in range(max(map(len, completions)))]
                       for y in completions])  # (C, T) the state of each token, −1 after the end
    branches = {}
    tokens = np.array([[branches.setdefault(y[: t + 1], len(branches)) if t < len(y) else -1 for t in range(places.shape[1])]
                       for y in completions])  # (C, T) the state and its token
    real = places >= 0
    state_of = np.zeros(len(branches), dtype=int)
    state_of[tokens[real]] = places[real]

    def conditional_of(mass):  # (branches,) -> the share of each token in its state
        total = np.bincount(state_of, mass, len(prefixes))[state_of]
        return np.divide(mass, total, out=np.ones_like(mass), where=total > 0)  # nothing to choose there: certain

    def mass_of(weights):  # (C, T) -> Σ over completions through each token of E·weight
        return np.bincount(tokens[real], (expert[:, None] * weights)[real], len(branches))

    policy = conditional_of(mass_of(np.ones(places.shape)))
    for _ in range(1000):
        losses = np.where(real, -np.log(policy[tokens]), 0)  # (C, T)
        suffix, sums = np.zeros(len(expert)), np.zeros(places.shape)
        for t in reversed(range(places.shape[1])):
            suffix = losses[:, t] + decay * suffix
            sums[:, t] = np.where(real[:, t], suffix, 0)
        of_all = sums.sum(1, keepdims=True)
        weights = np.divide(sums, of_all, out=np.zeros_like(sums), where=of_all > 0) if decay > 0 else real / real.sum(1, keepdims=True)
        moved = conditional_of(mass_of(weights))
        if np.abs(moved - policy).max() < 1e-15:
            break
        policy = moved
    return np.where(real, policy[tokens], 1).prod(1)


# ---------------------------------------------------------------------------------------------------------- by selection


def best_of_n_law(ref, reward, n):
    """The law of the best of n draws from ref, ties going to the first drawn: within a level of equal rewards as ref shares it,
    between levels P(level) = F^n − F_−^n.

    The best is not above a level iff all n draws are not above it: F^n, F = ref's mass at or below it. So it is in the level with the
    difference to the level below. Given that, the winner is the first drawn of the level, a draw of ref within it.
    """
    ref, reward = normalise(ref), np.asarray(reward, dtype=np.float64)
    law, below = np.zeros(len(ref)), 0.0
    for level in np.unique(reward):
        inside = reward == level
        upto = below + ref[inside].sum()
        law[inside] = ref[inside] / ref[inside].sum() * (upto**n - below**n)
        below = upto
    return normalise(law)


def rest_law(ref, reward, threshold):
    """ref restricted to rewards strictly above the threshold: maximum likelihood on what was kept of many draws.

    KL(law‖ref) = −log P(r > threshold), because law/ref is constant where the law is not 0.
    """
    return normalise(np.where(np.asarray(reward) > threshold, ref, 0))


# ------------------------------------------------------------------------------------------------------- from preferences
#
# Pairs: two completions drawn from μ independently; prefer[a, b] is the probability that a is chosen over b, 1 − prefer[b, a].
# So (chosen a, rejected b) occurs with weight μ_a·μ_b·prefer[a, b]. ρ = log π/ref.


def bradley_terry(reward):
    """prefer[a, b] = σ(r_a − r_b), (C, C)."""
    reward = np.asarray(reward, dtype=np.float64)
    return np.exp(-np.logaddexp(0, reward[None, :] - reward[:, None]))


def winners(mu, prefer):
    """(W, L), each (C,) and summing to 1: how often a completion is the chosen one, and how often the rejected one."""
    weight = np.outer(mu, mu) * prefer
    return normalise(weight.sum(1)), normalise(weight.sum(0))


# DPO and the lemma. Σ weight·log(1 + e^{−β(ρ_a − ρ_b)}) has two terms for each unordered pair, of which the first has the share
# prefer[a, b], whatever μ_a·μ_b is: β(ρ_a − ρ_b) = log prefer[a, b]/prefer[b, a] = r_a − r_b for Bradley-Terry. All pairs agree: ρ = r/β,
# the law is tilt(ref, r, β), whatever μ is, so also for μ = π. Any f whose pair optimum is the logit does the same: for Savage's σ(−x)²
# the slope of a pair is −2·p·σ(−x)²·σ(x) + 2·(1 − p)·σ(x)²·σ(−x) = 2·σ(x)·σ(−x)·(σ(x) − p), 0 at σ(x) = p. For e^−x it is
# −p·e^−x + (1 − p)·e^x, 0 at half the logit: tilt(ref, r, 2β).


def ipo_law(ref, prefer, beta, mu):
    """IPO: ref·e^{g/β}, g(y) = E_{y'~μ} prefer[y, y'].

    Each pair's part p·(Δ − c)² + (1 − p)·(Δ + c)², c = 1/(2β), is (Δ − c·(2p − 1))² plus a constant. The pair optima do not agree, so this
    is least squares: Σ_b μ_b·(ρ_a − ρ_b − c·(2p_ab − 1)) = 0 for every a, i.e. ρ_a − E_μ ρ = c·(2g_a − 1), ρ = g/β up to a constant.
    GPO's (β·Δ − 1)² = β²·(Δ − 1/β)² has c = 1/β: half the β here.
    """
    return tilt(ref, prefer @ normalise(mu), beta)


def ipo_online_law(ref, prefer, beta):
    """IPO on pairs of its own samples: the μ of ipo_law is the law itself. Found by going half of the way, in logs, until it stays."""
    law = normalise(ref)
    for _ in range(10_000):
        moved = normalise(np.sqrt(law * ipo_law(ref, prefer, beta, law)))
        if np.abs(moved - law).max() < 1e-16:
            break
        law = moved
    return law


def simpo_law(lengths, reward, scale):
    """SimPO without a target margin: π ∝ e^{|y|(r − c)/scale} with Σ = 1, Bradley-Terry labels, any μ; no ref in it.

    The lemma as for DPO, the score being scale·log π/|y|: it equals r − c. What is left is c, one number for all: Σ e^{|y|(r − c)/scale}
    falls in c, so bisection finds it.
    """
    lengths, reward = np.asarray(lengths), np.asarray(reward, dtype=np.float64)

    def policy_of(c):
        return np.exp(np.minimum(lengths * (reward - c) / scale, 700))

    high = reward.max() + scale * np.log(len(reward) + 1)  # every term below 1/(C + 1)
    low = reward.max()  # the best one's term is 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy_of(middle).sum() > 1 else (low, middle)
    return normalise(policy_of((low + high) / 2))


def winners_law(mu, prefer, lengths):
    """ORPO without its odds, the mean of log π/|y| over the chosen answers: π ∝ W/|y| (Σ W/|y|·log π is a cross-entropy)."""
    return normalise(winners(mu, prefer)[0] / np.asarray(lengths))


def slic_law(mu, prefer, weight):
    """SLiC-HF while no pair has reached its margin: π = W + (W − L)/λ. Negative entries: no such rest.

    There the hinge is δ − log π_w + log π_l, so the loss is const − Σ (W − L)·log π − λ·Σ W·log π: the cross-entropy of
    q = W + (W − L)/λ, which sums to 1.
    """
    W, L = winners(mu, prefer)
    return W + (W - L) / weight


def hinge_corner(ref, prefer, beta, mu):
    """GPO's hinge has no formula, but for three completions a corner: the policy with the smallest expected loss.

    The loss is convex and linear between the lines β·(ρ_a − ρ_b) = ±1, of which two fix the policy; its minimum is at such a crossing.
    All crossings are tried. A pair alone goes to β·Δ = 1 as soon as prefer > ½, however little: no pull from the preference's strength.
    """
    ref, mu, best = normalise(ref), np.asarray(mu), (np.inf, None)
    weight = np.outer(mu, mu) * prefer
    for (a, b), (c, d) in (((0, 1), (0, 2)), ((0, 1), (1, 2)), ((0, 2), (1, 2))):
        for x in (-1, 1):
            for y in (-1, 1):
                equations = np.zeros((3, 3))
                equations[0, [a, b]] = equations[1, [c, d]] = 1, -1
                equations[2] = 1  # the constant does not matter
                rho = np.linalg.solve(equations, [x / beta, y / beta, 0])
                loss = (weight * np.maximum(0, 1 - beta * (rho[:, None] - rho[None, :]))).sum()
                best = min(best, (loss, tuple(rho)))
    return tilt(ref, best[1], 1.0)


# Where a law is missing, what must hold at rest: the expected slope, in logits, written out.


def pair_slope(slope, scores, prefer, mu):
    """(C,) derivative of Σ weight·f(s_a − s_b) in the scores s; slope = f'. 0 at rest where the scores are free (GPO: s = βρ)."""
    weight = np.outer(mu, mu) * prefer
    pulls = weight * slope(scores[:, None] - scores[None, :])
    return pulls.sum(1) - pulls.sum(0)


def orpo_slope(policy, prefer, mu, weight):
    """(C,) ORPO's expected slope in the logits, completions of one token: scores log π/(1 − π), whose slope in log π is 1/(1 − π)."""
    odds = np.log(policy) - np.log1p(-policy)
    pulls = 2 * pair_slope(lambda x: -1 / (1 + np.exp(x)), odds, prefer, mu)  # there the weights sum to ½
    in_logs = -winners(mu, prefer)[0] + weight * pulls / (1 - policy)
    return in_logs - policy * in_logs.sum()


def kto_slope(policy, ref, desirable, undesirable, beta, seen):
    """(C,) KTO's expected slope in the logits. desirable, undesirable: (C,) shares of the rows, times λ_D and λ_U; seen (C,): how often
    each completion stands in a mismatched row, so z₀ = max(0, Σ seen·ρ), a constant."""
    rho = np.log(policy) - np.log(ref)
    gain = 1 / (1 + np.exp(-beta * (rho - max(0.0, seen @ rho))))
    in_logs = -beta * (desirable - undesirable) * gain * (1 - gain)
    return in_logs - policy * in_logs.sum()
