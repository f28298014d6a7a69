"""The laws: the exact policies that the methods must converge to, in numpy alone. This file imports none of the code that it tests.

A policy is a probability vector over the finitely many completions of one prompt. E is the expert, ref the reference, β > 0 the pull to
ref, r a reward vector. Each law is derived in its docstring. toy/three_actions.py and the tests compare the methods with the laws.

About half of the laws follow from the **pairwise density-ratio lemma**. For P and Q with full support,

    argmin_f  E_{y~P, y'~Q} log(1 + exp(−(f(y) − f(y'))))   =   log P/Q + const.

Proof. Collect the two terms of each unordered pair {a, b}. It occurs as (a first) with weight P_a Q_b and as (b first) with weight
P_b Q_a. So its part of the loss is the cross-entropy of a coin with P(a first) = P_a Q_b / (P_a Q_b + P_b Q_a) under the prediction
σ(f_a − f_b). That is smallest iff the two are equal, i.e. f_a − f_b = log(P_a/Q_a) − log(P_b/Q_b). f = log P/Q satisfies this for all
pairs at once, so it minimises the whole sum.
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

    E_π[r] − β·KL(π‖ref) = β·log Z − β·KL(π‖π*), with Z = Σ ref·exp(r/β). The first term is constant and the second is 0 at π = π*.
    """
    scaled = np.asarray(reward, dtype=np.float64) / beta
    return normalise(np.asarray(ref) * np.exp(scaled - scaled.max()))


def table_1(bound_over_beta, n_actions=3):
    """The papers' Example 1, corrected: uniform ref, the only demonstration is the last action, reward in [0, R]; x = R/β.

    The likelihood of the demonstration under π_r ∝ e^{r/β} rises with the reward of the demonstrated action and falls with every other
    reward. So the optimum is at the bounds: r = (0, ..., 0, R) and π = (1, ..., 1, e^x) / (n − 1 + e^x). The paper prints 2/(2 + e^x) for
    each unseen action; the row printed there sums to (4 + e^x)/(2 + e^x) > 1.
    """
    reward = np.zeros(n_actions)
    reward[-1] = bound_over_beta
    return tilt(np.full(n_actions, 1 / n_actions), reward, 1.0)


def demonstration_law(expert, ref, bound_over_beta):
    """The policy that maximum-likelihood inverse RL converges to: reward in [0, R], any expert, any ref with full support. x = R/β.

    Maximise E_E[log π] over π = ref·u/Z with u = e^{r/β} in [1, e^x]. The objective is concave in r, with gradient (E − π)/β. The KKT
    conditions are π = E where u is inside its bounds (so u = Z·E/ref there), E ≤ π where u = 1, and E ≥ π where u = e^x. Together,
    u = clip(Z·E/ref, 1, e^x). Z itself solves Σ ref·u = Z. The left side minus the right, divided by Z, is
    Σ ref·clip(E/ref, 1/Z, e^x/Z) − 1. This falls in Z, so bisection finds the root. Z is a mean of u, so log Z is in [0, x]. (If an
    interval of Z solves it, π is the same on all of it, and r differs by a constant.) If max E/ref ≤ e^x·min E/ref, π = E.
    """
    expert, ref = normalise(expert), normalise(ref)

    def policy_of(log_z):
        with np.errstate(over="ignore"):  # overflow to inf means no upper bound
            return ref * np.clip(expert / ref, np.exp(-log_z), np.exp(bound_over_beta - log_z))

    low, high = 0.0, float(bound_over_beta)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy_of(middle).sum() > 1 else (low, middle)
    return normalise(policy_of((low + high) / 2))


def ridge_law(expert, ref, beta, ridge):
    """The fixed point of RFT with a ridge: linear loss plus c·(r(y)² + r(ỹ)²), small steps, π ∝ ref·e^{r/β}.

    The expected loss is −(1/β)·Σ(E − π)·r + c·Σ(E + π)·r². So at rest r = (E − π)/(2cβ·(E + π)), and |r| ≤ 1/(2cβ). Then
    log π − k·(E − π)/(E + π) = log ref − log Z with k = 1/(2cβ²). The left side rises in π (by 1/π + 2kE/(E + π)²), so bisection finds π
    for each Z. Σ π falls in Z, so Σ π = 1 fixes Z. c → 0 gives the expert, c → ∞ gives ref.
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
    """π ∝ E^{1/(1+β)}·ref^{β/(1+β)}: the fixed point of logistic IRFT with fresh samples and a fixed reference.

    Let f = log π/ref and Δ_ab = f_a − f_b. The expected gradient weights the ordered pair (a demonstrated, b sampled) by
    E_a·π_b·σ(−β·Δ_ab) and moves probability from b to a. At rest each pair is in balance: E_a π_b σ(−βΔ_ab) = π_a E_b σ(βΔ_ab), i.e.
    e^{βΔ_ab} = (E_a/π_a)/(E_b/π_b), so β·log π/ref = log E/π + const. Solve for π.
    """
    return normalise(np.asarray(expert) ** (1 / (1 + beta)) * np.asarray(ref) ** (beta / (1 + beta)))


def converged_round(expert, sampler, ref, beta):
    """π ∝ ref·(E/π_t)^{1/β}: the result of one converged round of logistic IRFT with samples from π_t (a SPIN iteration: ref = π_t).

    This is the lemma with P = E, Q = π_t and f = β·log π/ref.
    """
    expert, sampler, ref = (np.log(np.maximum(p, 1e-300)) for p in (expert, sampler, ref))  # in logs, because the ratio may overflow
    law = ref + (expert - sampler) / beta
    return normalise(np.exp(law - law.max()))


def rounds_law(expert, ref, beta, n_rounds, *, ref_update):
    """The policies after 1..n_rounds converged rounds, (n_rounds, n_actions). Each round samples from the policy of the round before.

    Let e_t = log(π_t/E) up to a constant. With a refreshed reference (SPIN) e_{t+1} = (1 − 1/β)·e_t, which converges to E iff β > 1/2.
    With a fixed reference e_{t+1} = e_0 − e_t/β, which converges (to the geometric mixture) iff β > 1, and oscillates between E and ref
    forever at β = 1.
    """
    policy, law = normalise(ref), []
    for _ in range(n_rounds):
        policy = converged_round(expert, policy, policy if ref_update else ref, beta)
        law.append(policy)
    return np.array(law)


def usable_rounds(law):
    """The rounds before any probability falls to 1e-9 (at least one round). Beyond them float64 arithmetic is not exact enough."""
    usable = np.cumprod(law.min(axis=1) > 1e-9).astype(bool)
    usable[0] = True
    return law[usable]


def sft_flow(time, n_others=2):
    """Probability of the demonstrated action after gradient flow on its log-likelihood for `time` = lr·steps, from equal logits.

    Let d be its logit minus that of each of the n other (equal) actions. With p = e^d/(n + e^d) the flow is d' = (1 − p) + (1 − p)/n
    = (n + 1)/(n + e^d), so n·d + e^d = 1 + (n + 1)·time. This is convex and rises in d: Newton's method solves it from the right.
    """
    target = 1 + (n_others + 1) * time
    d = np.log(target)
    for _ in range(60):
        d -= (n_others * d + np.exp(d) - target) / (n_others + np.exp(d))
    return float(np.exp(d) / (n_others + np.exp(d)))


def identity_round(expert, ref, pull):
    """One round of IRFT with h = identity and samples from ref: softmax(log ref + pull·(E − ref)), pull = β·lr·steps.

    In the logits, the expected gradient of −β·(log π(y) − log π(ỹ)) is −β·(E − q) for every π, where q is the sampler: the −p of the two
    softmaxes cancel. So all inner steps are equal, and K of them equal one step of K times the size. T rounds of K steps of size lr are T
    steps of SFT of size β·K·lr.
    """
    return tilt(ref, np.asarray(expert) - np.asarray(ref), 1 / pull)


# ------------------------------------------------------------------------------------------- online methods, token by token
#
# Completions are tuples of tokens. None is a prefix of another, so they are the leaves of a tree. A law is a vector over the leaves.


def rebel_law(ref, reward, beta, eta, rollouts):
    """REBEL after this many rollouts, each solved exactly: π_{t+1} ∝ π_t·e^{ηR} with R = r − β·log π_t/ref.

    Let u = log π/ref up to a constant. Then u ← u + η(r − βu) = (1 − ηβ)·u + ηr, from u = 0. The fixed point is u = r/β, which is
    π* ∝ ref·e^{r/β}. Each rollout multiplies the distance to it by 1 − ηβ, so u = (1 − (1 − ηβ)^t)·r/β. It converges if 0 < ηβ < 2.
    """
    kept = rollouts * eta if beta == 0 else (1 - (1 - eta * beta) ** rollouts) / beta
    return tilt(ref, kept * np.asarray(reward, dtype=np.float64), 1.0)


def kl_penalty_step(old, advantages, penalty):
    """One rollout of PPO with κ·KL(old‖π) in the place of the clip, solved exactly: π = κ·old/(c − A), Σ π = 1.

    The maximiser of Σ π·A − κ·Σ old·log(old/π) has A + κ·old/π = c. It is old if all advantages are equal, as they are at π*.
    """
    return _k3_node(old, advantages, np.full(len(old), penalty))


def ptx_law(ref, reward, beta, weight, target):
    """PPO-ptx: the maximiser of E_π[r] − β·KL(π‖ref) + w·Σ D·log π. It satisfies r − β·log π/ref + w·D/π = c.

    β·log π − w·D/π rises in π, so bisection finds π for each c. Σ π falls in c, so Σ π = 1 fixes c. w → ∞ gives the target D.
    """
    ref, reward, target = normalise(ref), np.asarray(reward, dtype=np.float64), np.asarray(target)

    def policy_of(c):
        low, high = np.full(len(ref), -700.0), np.full(len(ref), 50.0)  # log π
        for _ in range(100):
            middle = (low + high) / 2
            over = beta * middle - weight * target * np.exp(-middle) > reward + beta * np.log(ref) - c
            low, high = np.where(over, low, middle), np.where(over, middle, high)
        return np.exp((low + high) / 2)

    low, high = reward.min() - 50 * beta, reward.max() + 50 * beta + weight
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy_of(middle).sum() > 1 else (low, middle)
    return normalise(policy_of((low + high) / 2))


def sequence_k3_law(ref, reward, beta):
    """The fixed point of training on r − β·k3, with k3 of whole completions: π = β·ref/(c − r), not ref·e^{r/β}.

    With y ~ π held fixed, ∇k3 = (1 − ref/π)·∇log π. The expected update Σ_y π(y)·[r − β(1 − ref/π)]·∇log π(y) vanishes for every softmax
    policy iff the bracket is the same for all y: r − β + β·ref/π = c − β. Solve for π. Σ π falls in c, so Σ π = 1 fixes c > max r. (This π
    maximises E_π[r] − β·KL(ref‖π), with the forward divergence.)
    """
    return _k3_node(ref, reward, np.full(len(ref), beta))


def _k3_node(ref, gain, pull):
    """π_a = pull_a·ref_a / (c − gain_a) with Σ π = 1; ref and pull above 0; all inputs (children,).

    Bisection over d = c − max gain > 0, because c itself would lose the digits of a small pull next to large gains. At d = max over a of
    pull_a·ref_a − (max gain − gain_a), one term alone is 1. At d = Σ pull·ref, the sum is at most 1.
    """
    weights, gap = np.asarray(pull, dtype=np.float64) * np.asarray(ref), np.max(gain) - np.asarray(gain, dtype=np.float64)
    low, high = (weights - gap).max(), weights.sum()
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):  # adjacent float64 numbers
            break
        low, high = (middle, high) if (weights / (middle + gap)).sum() > 1 else (low, middle)
    return normalise(weights / ((low + high) / 2 + gap))


def token_k3_law(completions, ref, gain, pull):
    """GRPO's law, for advantages with expectation `gain` (C,) up to a constant per prompt, and k3 at every token with weight `pull` (C,).

    At the prefix s the expected update of the policy's logits is Σ_a π(a|s)·[Q(s, a) − b(s, a)·(1 − ref(a|s)/π(a|s))]·∇log π(a|s). Here
    Q = E_π[gain | s, a] and b = E_π[pull | s, a] are means over what follows the token. Q does not contain the k3 of later tokens, because
    each k3 is differentiated at its own token only. The update vanishes iff the bracket is the same c_s for all a:

        π(a|s) = b(s, a)·ref(a|s) / (c_s + b(s, a) − Q(s, a)),      c_s from Σ_a π(a|s) = 1.

    Q and b depend only on the policy after s, so the law is computed from the last token backwards.
    If the group mean contains the sample itself, E[A_i | y_i] = (G − 1)/G·(r − E r), so gain = (G − 1)/G·r. Equivalently, gain = r with
    pull = β·G/(G − 1).
    """
    law, gain, pull = np.zeros(len(ref)), np.asarray(gain, dtype=np.float64), np.asarray(pull, dtype=np.float64)

    def solve(leaves, depth):
        """Fill law[leaves] with probabilities given their common prefix of `depth` tokens. Returns E[gain] and E[pull] there."""
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
    """GRPO as the paper prints it, for large groups: token_k3_law with gain A/|y| and pull β/|y|, A = (r − μ)/σ under the law itself.

    μ and σ are the mean and standard deviation of r under the law, so the law is found by iteration with half steps. Unlike
    std_normalised_law it exists for every β: with k3 a worse completion's probability falls only like βσ, not exponentially, so σ does not
    vanish before the pull does. For equal rewards it is ref, because then all advantages are exactly 0.
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
    raise ArithmeticError("group_normalised_law did not converge in 5000 iterations")


def mean_and_spread(law, reward):
    """E[r] and the standard deviation of r under a distribution."""
    mean = law @ reward
    return mean, np.sqrt(law @ (reward - mean) ** 2)


def temperature_curve(ref, reward):
    """(temperatures s, β(s)), from cold to hot: β(s) is the β whose law is ref·e^{r/s}. See collapse_threshold.

    The grid starts where all completions below the best reward have almost no probability and ends where the law is almost ref.
    """
    reward, levels = np.asarray(reward, dtype=np.float64), np.unique(reward)
    coldest = np.diff(levels).min() / (50 - 2 * np.log(normalise(ref).min()))
    temperatures = np.geomspace(coldest, 100 * np.ptp(reward), 2001)
    return temperatures, np.array([beta_of_temperature(ref, reward, s) for s in temperatures])


def beta_of_temperature(ref, reward, temperature):
    spread = mean_and_spread(tilt(ref, reward, temperature), np.asarray(reward, dtype=np.float64))[1]
    return temperature / max(spread, 1e-300)


def collapse_threshold(ref, reward):
    """(β*, its temperature): the smallest β that has a law when r is divided by its own std and β·k1 is subtracted after the division.

    At rest π ∝ ref·e^{r/(βσ)} with σ = std_π(r). Let s = βσ be the temperature. Then β(s) = s / (std of r under ref·e^{r/s}). As s → ∞
    that std tends to ref's, so β → ∞. As s → 0 it vanishes exponentially, so again β → ∞. Hence β(s) has a smallest value β*. Below it
    σ = 0 is the only fixed point: a smaller σ weakens the pull, which sharpens π, which makes σ smaller, until one completion (or a tie
    of several) is left. Two other orders have no threshold. If the KL is subtracted first, R = r − β·k1 is constant only at π*, so R over
    its own std rests there for every β. GRPO's k3 in the loss has the law of group_normalised_law.
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
    """π ∝ ref·e^{r/(βσ)}, σ = std_π(r): the solution of highest temperature, which training from ref reaches. None below β*.

    Solutions come in pairs (a cluster of similar rewards adds a pair). In each pair the one of higher temperature is stable.
    """
    if np.ptp(reward) == 0:
        return normalise(ref)
    temperatures, betas = temperature_curve(ref, reward)
    below = np.flatnonzero(betas <= beta)
    if len(below):
        low = temperatures[below[-1]]  # at higher temperatures β(s) > beta on the whole grid
    else:
        threshold, low = collapse_threshold(ref, reward)  # (the minimum may lie between two points of the grid)
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
    """The fixed point of IFT with λ = 0 and weights held constant: π(a|s) ∝ E(a|s)·E[w_t/n | s, a], not the expert.

    The expected update of the logits at the prefix s is Σ_a E(a|s)·W(s, a)·∇log π(a|s), W = E_E[w_t/n | s, a]. It vanishes iff
    E(a|s)·W(s, a) is proportional to π(a|s). The weight w_t = n·c_t/Σc, c_t = Σ_{i≥t} decay^{i−t}·ℓ_i, depends on the whole completion and,
    through ℓ = −log π, on π. So the law is found by iteration from the expert. With completions of one token w = 1 and the law is E.
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
        return np.divide(mass, total, out=np.ones_like(mass), where=total > 0)  # no choice there: probability 1

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
    """The distribution of the best of n samples from ref; ties go to the first sample. Within a level of equal rewards it is proportional
    to ref; between levels P(level) = F^n − F_−^n.

    The best is at or below a level iff all n samples are: probability F^n, where F is ref's mass at or below the level. P(level) is the
    difference to the level below. Given the level, the winner is the first sample in it, which is a sample of ref within the level.
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
    """ref restricted to rewards strictly above the threshold: the maximum-likelihood fit to the samples kept, if there are many.

    KL(law‖ref) = −log P(r > threshold), because law/ref is constant where the law is not 0.
    """
    return normalise(np.where(np.asarray(reward) > threshold, ref, 0))


# ------------------------------------------------------------------------------------------------------- from preferences
#
# A pair is two independent samples from μ. prefer[a, b] is the probability that a is chosen over b, and equals 1 − prefer[b, a]. So
# (chosen a, rejected b) has weight μ_a·μ_b·prefer[a, b]. ρ = log π/ref.


def bradley_terry(reward):
    """prefer[a, b] = σ(r_a − r_b), (C, C)."""
    reward = np.asarray(reward, dtype=np.float64)
    return np.exp(-np.logaddexp(0, reward[None, :] - reward[:, None]))


def winners(mu, prefer):
    """(W, L), each (C,) and summing to 1: how often a completion is the chosen one, and how often the rejected one."""
    weight = np.outer(mu, mu) * prefer
    return normalise(weight.sum(1)), normalise(weight.sum(0))


# DPO by the lemma. Σ weight·log(1 + e^{−β(ρ_a − ρ_b)}) has two terms per unordered pair, with weights in the ratio p : 1 − p for every μ.
# Here p = prefer[a, b], so β(ρ_a − ρ_b) = log p/(1 − p) = r_a − r_b for Bradley-Terry. ρ = r/β satisfies this for all pairs, so the law is
# tilt(ref, r, β) for every μ, also for μ = π. Any f whose pair optimum is log p/(1 − p) has this law. For Savage's σ(−x)² a pair's slope
# is −2·p·σ(−x)²·σ(x) + 2·(1 − p)·σ(x)²·σ(−x) = 2·σ(x)·σ(−x)·(σ(x) − p), 0 at σ(x) = p. For e^−x it is −p·e^−x + (1 − p)·e^x, 0 at half the
# logit: tilt(ref, r, 2β).


def ipo_law(ref, prefer, beta, mu):
    """IPO: ref·e^{g/β}, g(y) = E_{y'~μ} prefer[y, y'].

    The part of each pair is p·(Δ − c)² + (1 − p)·(Δ + c)² with c = 1/(2β), which is (Δ − c·(2p − 1))² plus a constant. No ρ meets all
    pair optima, so this is least squares: Σ_b μ_b·(ρ_a − ρ_b − c·(2p_ab − 1)) = 0 for every a, i.e. ρ_a − E_μ ρ = c·(2g_a − 1), ρ = g/β
    up to a constant. GPO's (β·Δ − 1)² = β²·(Δ − 1/β)² has c = 1/β: half the β here.
    """
    return tilt(ref, prefer @ normalise(mu), beta)


def ipo_online_law(ref, prefer, beta):
    """IPO on pairs of its own samples: the μ of ipo_law is the law itself. Found by iteration with half steps in the logs."""
    law = normalise(ref)
    for _ in range(10_000):
        moved = normalise(np.sqrt(law * ipo_law(ref, prefer, beta, law)))
        if np.abs(moved - law).max() < 1e-16:
            break
        law = moved
    return law


def simpo_law(lengths, reward, scale):
    """SimPO without a target margin: π = e^{|y|(r − c)/scale} with Σ = 1, for Bradley-Terry labels and any μ. ref does not matter.

    The lemma applies as for DPO. The score scale·log π/|y| equals r − c, with one unknown c for all completions. Σ e^{|y|(r − c)/scale}
    falls in c, so bisection finds it.
    """
    lengths, reward = np.asarray(lengths), np.asarray(reward, dtype=np.float64)

    def policy_of(c):
        return np.exp(np.minimum(lengths * (reward - c) / scale, 700))

    high = reward.max() + scale * np.log(len(reward) + 1)  # here every term is below 1/(C + 1)
    low = reward.max()  # here the best completion's term is 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy_of(middle).sum() > 1 else (low, middle)
    return normalise(policy_of((low + high) / 2))


def winners_law(mu, prefer, lengths):
    """ORPO without its odds term: the mean of log π/|y| over the chosen answers gives π ∝ W/|y| (Σ W/|y|·log π is a cross-entropy)."""
    return normalise(winners(mu, prefer)[0] / np.asarray(lengths))


def slic_law(mu, prefer, weight, target=None):
    """SLiC-HF while no pair has reached its margin: π = D + (W − L)/λ. If an entry is negative, there is no such fixed point.

    Before the margin the hinge is δ − log π_w + log π_l. So the loss is const − Σ (W − L)·log π − λ·Σ D·log π, the cross-entropy of
    q = D + (W − L)/λ, which sums to 1. target: D, the distribution of y_ref; W by default.
    """
    W, L = winners(mu, prefer)
    return (W if target is None else target) + (W - L) / weight


def hinge_corner(ref, prefer, beta, mu):
    """The policy with the smallest expected hinge loss of GPO, for three completions. It has no formula; the optimum is at a corner.

    The loss is convex, and linear between the lines β·(ρ_a − ρ_b) = ±1. Two lines determine the policy; the minimum is at such a crossing,
    so all crossings are tried. A single pair goes to β·Δ = 1 for every prefer > ½, however strong the preference is.
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


# Methods without a law: the expected slope in the logits, written out. It must be 0 at rest.


def pair_slope(slope, scores, prefer, mu):
    """(C,) derivative of Σ weight·f(s_a − s_b) in the scores s, with slope = f'. It is 0 at rest if the scores are free (GPO: s = βρ)."""
    weight = np.outer(mu, mu) * prefer
    pulls = weight * slope(scores[:, None] - scores[None, :])
    return pulls.sum(1) - pulls.sum(0)


def orpo_slope(policy, prefer, mu, weight):
    """(C,) ORPO's expected slope in the logits, for completions of one token. The scores log π/(1 − π) have slope 1/(1 − π) in log π."""
    odds = np.log(policy) - np.log1p(-policy)
    pulls = 2 * pair_slope(lambda x: -1 / (1 + np.exp(x)), odds, prefer, mu)  # ×2: pair_slope's weights sum to ½
    in_logs = -winners(mu, prefer)[0] + weight * pulls / (1 - policy)
    return in_logs - policy * in_logs.sum()


KTO_SLOPES = {  # v'(x) of the values of a gain x
    "logistic": lambda x: 1 / (2 + np.exp(x) + np.exp(-x)),
    "prospect": lambda x: 0.88 * np.abs(x) ** -0.12 * np.where(x < 0, 2.25, 1.0),
    "concave": lambda x: 1 / (1 + np.exp(x)),
    "neutral": np.ones_like,
}


def kto_slope(policy, ref, desirable, undesirable, beta, z0, value="logistic"):
    """(C,) KTO's expected slope in the logits. desirable, undesirable (C,): shares of the rows, times λ_D and λ_U. z0 is a constant."""
    x, slope = beta * (np.log(policy) - np.log(ref) - z0), KTO_SLOPES[value]
    in_logs = -beta * (desirable * slope(x) - undesirable * slope(-x))
    return in_logs - policy * in_logs.sum()


def kto_neutral_law(desirable, undesirable):
    """KTO with v(x) = x: the loss is const − β·Σ (a − b)·log π, a cross-entropy, so π ∝ a − b if that is positive everywhere."""
    return normalise(np.asarray(desirable) - np.asarray(undesirable))
