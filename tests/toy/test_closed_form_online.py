"""The laws of the online methods against something other than their own formula.

The expected update of each loss is written out here with autograd, for tabular logits of a language of 40 completions: enumerated, samples'
probabilities and advantages detached, KL terms differentiated or not as the method has it. It is followed until it rests, from several
starts; where it rests must be the law. REBEL's rollouts are least squares, solved; bisections are repeated with 60 digits.
"""

from decimal import Decimal, localcontext
from itertools import product

import numpy as np
import pytest
import torch

from toy import closed_form as law

EOS, WORDS, LONGEST = 3, 3, 3
COMPLETIONS = [(*words, EOS) for n in range(LONGEST) for words in product(range(WORDS), repeat=n)]
COMPLETIONS += list(product(range(WORDS), repeat=LONGEST))  # cut off
PREFIXES = sorted({y[:t] for y in COMPLETIONS for t in range(len(y))}, key=lambda s: (len(s), s))
SIZES = np.array([len(y) for y in COMPLETIONS])
MASK = torch.arange(LONGEST) < torch.tensor(SIZES)[:, None]  # (C, T)
TOKENS = torch.tensor([[*y, *[0] * (LONGEST - len(y))] for y in COMPLETIONS])
ROWS = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(LONGEST)] for y in COMPLETIONS])
ONE_TOKEN = [(0,), (1,), (2,), (3,), (4,)]


def logps(logits):
    """Flat logits, one per prefix and token -> (C, T) log-probs, 0 after the end."""
    return torch.where(MASK, logits.view(len(PREFIXES), WORDS + 1).log_softmax(-1)[ROWS, TOKENS], 0)


def policy(logits):
    return logps(logits).sum(1).exp().detach().numpy()


def logits_of(table):
    """Flat logits of a policy whose log-probs are table (C, T)."""
    logits = torch.zeros(len(PREFIXES), WORDS + 1, dtype=torch.float64)
    logits[ROWS[MASK], TOKENS[MASK]] = table[MASK]
    return logits.flatten()


def problem(seed):
    """Ref's log-probs (C, T), ref (C,), rewards (C,), a random start: nothing uniform, no two rewards alike."""
    generator = torch.Generator().manual_seed(seed)
    ref_logits, start = torch.randn(2, len(PREFIXES) * (WORDS + 1), generator=generator, dtype=torch.float64)
    rewards = torch.randn(len(COMPLETIONS), generator=generator, dtype=torch.float64) + seed
    return logps(ref_logits), policy(ref_logits), rewards, start


def update(objective, logits):
    """The expected update: the derivative of objective(log-probs, log-probs of the sampler), sampler held fixed, taken at the sampler."""
    current = logits * 1
    value = objective(logps(current), logps(logits))
    return torch.autograd.grad(value, current, create_graph=True)[0]


def settle(objective, start):
    """Follow the flow logits' = update by implicit Euler steps, ever longer, so that it ends in Newton's; returns the policy at rest.

    At the end the update is 0 and, but for one constant per prefix, the Jacobian of the flow pulls back in every direction.
    """
    logits, size, eye = start.clone(), 0.1, torch.eye(len(start), dtype=torch.float64)
    for _ in range(200):
        jacobian = torch.autograd.functional.jacobian(lambda z: update(objective, z), logits, vectorize=True)
        step = torch.linalg.solve(eye / size - jacobian, update(objective, logits.requires_grad_())).detach()
        step = (step.view(len(PREFIXES), -1) - step.view(len(PREFIXES), -1).mean(1, keepdim=True)).flatten()  # those constants do nothing
        if step.abs().max() > 1:  # too long to follow the flow
            size /= 3
            continue
        logits, size = (logits + step).detach(), min(size * 4, 1e10)
        if step.abs().max() < 1e-9 and size > 1e9:
            break
    assert update(objective, logits.requires_grad_()).abs().max() < 1e-12
    rates = torch.linalg.eigvals(jacobian).real.sort().values
    assert rates[-len(PREFIXES):].abs().max() < 1e-10 and rates[-len(PREFIXES) - 1] < 0
    return policy(logits)


def k3(current, ref):
    return (ref - current).exp() - 1 - (ref - current)


# What each method maximises, in expectation. `current` (C, T) is differentiated, `sampler` is not.


def with_k3_on_completions(ref, rewards, beta):
    def objective(current, sampler):
        weights, total = sampler.sum(1).exp(), current.sum(1)
        return (weights * (rewards * total - beta * k3(total, ref.sum(1)))).sum()

    return objective


def with_k3_on_tokens(ref, advantages, pull):
    """advantages: a function of the sampler's (C,) probabilities; pull (C,): weight of every token of a completion."""

    def objective(current, sampler):
        weights = sampler.sum(1).exp()
        ratio = (current - sampler).exp()
        terms = advantages(weights)[:, None] * ratio - pull[:, None] * k3(current, ref)
        return (weights[:, None] * torch.where(MASK, terms, 0)).sum()

    return objective


def of_groups(ref, rewards, beta, group_size):
    """Every group, enumerated; the group's mean contains the sample itself."""

    def objective(current, sampler):
        weights = group = sampler.sum(1).exp()
        total = rewards
        for _ in range(group_size - 1):
            group, total = group[..., None] * weights, total[..., None] + rewards
        first = (slice(None), *[None] * (group_size - 1))  # by symmetry every member is like the first
        advantages = rewards[first] - total / group_size
        tokens = torch.where(MASK, k3(current, ref), 0).sum(1)
        return (group * (advantages * (current - sampler).exp().log().sum(1)[first] - beta * tokens[first])).sum()

    return objective


def with_kl_in_the_reward(ref, rewards, beta, *, normalise):
    def objective(current, sampler):
        weights, centred = sampler.sum(1).exp(), rewards - sampler.sum(1).exp() @ rewards
        scale = (weights @ centred**2).sqrt() if normalise else 1.0
        return (weights * (centred / scale - beta * (sampler - ref).sum(1)) * current.sum(1)).sum()

    return objective


def close(found, expected, tolerance=1e-9):
    assert expected.sum() == pytest.approx(1, abs=1e-12) and (expected > 0).all()
    assert np.abs(found - expected).max() < tolerance


# ------------------------------------------------------------------------------------------------ where expected updates rest


@pytest.mark.parametrize(("seed", "beta"), [(0, 0.3), (1, 0.7), (2, 3.0)])
def test_sequence_k3_rests_at_its_law(seed, beta):
    ref_logps, ref, rewards, start = problem(seed)
    found = settle(with_k3_on_completions(ref_logps, rewards, beta), start)
    close(found, law.sequence_k3_law(ref, rewards.numpy(), beta))
    assert law.kl(found, law.tilt(ref, rewards.numpy(), beta)) > 1e-4  # not π*


@pytest.mark.parametrize(("seed", "beta"), [(0, 0.2), (1, 0.7), (2, 3.0)])
def test_token_k3_rests_at_its_law(seed, beta):
    ref_logps, ref, rewards, start = problem(seed)
    pull = torch.full_like(rewards, beta)
    found = settle(with_k3_on_tokens(ref_logps, lambda w: rewards - w @ rewards, pull), start)
    close(found, law.token_k3_law(COMPLETIONS, ref, rewards.numpy(), pull.numpy()))
    assert law.kl(found, law.sequence_k3_law(ref, rewards.numpy(), beta)) > 1e-5  # nor this


@pytest.mark.parametrize("seed", [3])
def test_token_k3_with_a_pull_of_its_own_for_each_completion(seed):
    ref_logps, ref, rewards, start = problem(seed)
    pull = torch.rand(len(COMPLETIONS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.05
    found = settle(with_k3_on_tokens(ref_logps, lambda w: rewards, pull), start)
    close(found, law.token_k3_law(COMPLETIONS, ref, rewards.numpy(), pull.numpy()))


def test_token_k3_by_gradient_steps_alone():
    """Adam and nothing else, from ref's side and from far away: the law is where one arrives."""
    ref_logps, ref, rewards, start = problem(5)
    objective = with_k3_on_tokens(ref_logps, lambda w: rewards - w @ rewards, torch.full_like(rewards, 0.7))
    for scale in (0.0, 2.0):
        logits = (scale * start).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.99))
        for k in range(500):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - k / 500)
            current = logps(logits)
            optimizer.zero_grad()
            (-objective(current, current.detach())).backward()
            optimizer.step()
        close(policy(logits), law.token_k3_law(COMPLETIONS, ref, rewards.numpy(), np.full(len(ref), 0.7)), 1e-6)


@pytest.mark.parametrize(("seed", "group_size"), [(0, 2), (1, 4), (2, 32)])
def test_a_mean_with_the_sample_in_it(seed, group_size):
    """E[A | y] = (G − 1)/G·(r − E r), so the pull that acts is β·G/(G − 1); for G = 2 all pairs. Both ways to state the law agree."""
    beta, share = 0.6, (group_size - 1) / group_size
    ref_logps, ref, rewards, start = problem(seed)
    objective = of_groups(ref_logps, rewards, beta, 2) if group_size == 2 else with_k3_on_tokens(
        ref_logps, lambda w: share * (rewards - w @ rewards), torch.full_like(rewards, beta))
    expected = law.token_k3_law(COMPLETIONS, ref, rewards.numpy(), np.full(len(ref), beta / share))
    close(settle(objective, start), expected)
    close(law.token_k3_law(COMPLETIONS, ref, share * rewards.numpy(), np.full(len(ref), beta)), expected, 1e-13)
    assert law.kl(expected, law.token_k3_law(COMPLETIONS, ref, rewards.numpy(), np.full(len(ref), beta))) > 1e-5


@pytest.mark.parametrize("group_size", [2, 3])
def test_groups_one_by_one(group_size):
    """At any policy the update over all groups of 2 and of 3 is that of the expected advantage, (G − 1)/G·(r − E r)."""
    ref_logps, _, rewards, start = problem(6)
    share, start = (group_size - 1) / group_size, start.requires_grad_()
    expected = with_k3_on_tokens(ref_logps, lambda w: share * (rewards - w @ rewards), torch.full_like(rewards, 0.6))
    assert (update(of_groups(ref_logps, rewards, 0.6, group_size), start) - update(expected, start)).abs().max() < 1e-14


@pytest.mark.parametrize(("seed", "beta"), [(0, 0.1), (1, 0.5), (2, 2.0)])
def test_grpo_as_printed_rests_at_its_law(seed, beta):
    """A/|y| with the spread of the whole law, k3 with weight β/|y|."""
    ref_logps, ref, rewards, start = problem(seed)
    sizes = torch.tensor(SIZES, dtype=torch.float64)

    def advantages(weights):
        centred = rewards - weights @ rewards
        return centred / (weights @ centred**2).sqrt() / sizes

    found = settle(with_k3_on_tokens(ref_logps, advantages, beta / sizes), start)
    close(found, law.group_normalised_law(COMPLETIONS, ref, rewards.numpy(), beta))


@pytest.mark.parametrize(("seed", "excess"), [(0, 2.0), (1, 1.5)])
def test_rewards_over_their_spread_rest_at_their_law(seed, excess):
    """KL subtracted after the division: from ref, above the threshold, the flow settles at the warmest solution; undivided at π*."""
    ref_logps, ref, rewards, start = problem(seed)
    beta = excess * law.collapse_threshold(ref, rewards.numpy())[0]
    found = settle(with_kl_in_the_reward(ref_logps, rewards, beta, normalise=True), logits_of(ref_logps))
    close(found, law.std_normalised_law(ref, rewards.numpy(), beta))
    close(settle(with_kl_in_the_reward(ref_logps, rewards, 0.7, normalise=False), start), law.tilt(ref, rewards.numpy(), 0.7))


def test_rewards_over_their_spread_collapse_below_the_threshold():
    """The same update, a little below, rewards of four levels: followed until the spread is 1e-3 of what it was; the best are left."""
    ref_logps, ref, rewards, _ = problem(0)
    rewards = (2 * rewards).round().clamp(-2, 1)
    beta = 0.9 * law.collapse_threshold(ref, rewards.numpy())[0]
    objective = with_kl_in_the_reward(ref_logps, rewards, beta, normalise=True)
    logits = logits_of(ref_logps).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05, betas=(0.9, 0.99))
    for _ in range(2000):
        current = logps(logits)
        optimizer.zero_grad()
        (-objective(current, current.detach())).backward()
        optimizer.step()
        if spread(policy(logits), rewards.numpy()) < 1e-3 * spread(ref, rewards.numpy()):
            break
    assert policy(logits)[rewards == rewards.max()].sum() > 1 - 1e-5
    assert law.std_normalised_law(ref, rewards.numpy(), beta) is None


@pytest.mark.parametrize("share", [0.2, 0.8, 2.0])
def test_the_kl_subtracted_before_the_division_never_collapses(share):
    """R = r − β·log π/ref over its own spread, followed by steps of falling size on five actions: π*, above and far below the threshold."""
    rng = np.random.default_rng(3)
    ref, rewards = rng.dirichlet(np.ones(5)), rng.normal(size=5)
    beta = share * law.collapse_threshold(ref, rewards)[0]
    logits = np.log(ref)
    for k in range(20000):
        pi = law.normalise(np.exp(logits - logits.max()))
        R = rewards - beta * np.log(pi / ref)
        logits = logits + 20 / (20 + k) * pi * (R - pi @ R) / max(spread(pi, R), 1e-12)
    close(pi, law.tilt(ref, rewards, beta), 2e-3)


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 10.0])
def test_the_spread_sharpens_only_while_it_is_below_one(scale):
    """The spread at rest decides whether dividing by it ends farther from ref than not dividing, at one β and for rewards in any unit."""
    _, ref, rewards, _ = problem(1)
    divided = law.group_normalised_law(COMPLETIONS, ref, scale * rewards.numpy(), 0.5)
    plain = law.token_k3_law(COMPLETIONS, ref, scale * rewards.numpy() / SIZES, 0.5 / SIZES)
    assert (law.kl(divided, ref) > law.kl(plain, ref)) == (spread(divided, scale * rewards.numpy()) < 1)
    assert (spread(divided, scale * rewards.numpy()) < 1) == (scale < 2)


def averaged_reinforce(ref, rewards, beta, lift):
    """REINFORCE with log-probs averaged over the tokens. The baseline is E[R] + lift, as if shared with prompts of other rewards."""

    def objective(current, sampler):
        weights, R = sampler.sum(1).exp(), rewards - beta * (sampler - ref).sum(1)
        return (weights * (R - weights @ R - lift) * current.sum(1) / torch.tensor(SIZES)).sum()

    return objective


def test_reinforce_averaged_over_tokens_needs_each_prompts_own_baseline():
    """With its own mean reward as the baseline a prompt rests at π*; with a baseline that is off by half a unit it rests elsewhere."""
    ref_logps, ref, rewards, start = problem(0)
    best = law.tilt(ref, rewards.numpy(), 0.7)
    close(settle(averaged_reinforce(ref_logps, rewards, 0.7, 0.0), start), best)
    assert np.abs(settle(averaged_reinforce(ref_logps, rewards, 0.7, 0.5), logits_of(ref_logps)) - best).max() > 0.004


# -------------------------------------------------------------------------------------------------------------------- REBEL


def regression_step(current, targets):
    """π' of the exact minimum of Σ π(y)π(y')·(f_y − f_y' − (t_y − t_y'))² over all f, π' ∝ π·e^f."""
    y, other = np.triu_indices(len(current), 1)
    design = np.zeros((len(y), len(current)))
    root = np.sqrt(current[y] * current[other])
    design[np.arange(len(y)), y], design[np.arange(len(y)), other] = root, -root
    f = np.linalg.lstsq(design, root * (targets[y] - targets[other]), rcond=1e-14)[0]
    return law.normalise(current * np.exp(f - f.max()))


@pytest.mark.parametrize(("eta", "beta"), [(0.4, 0.0), (1.0, 0.3), (2.0, 0.5), (0.8, 1.25), (1.5, 1.0), (1.9, 1.0), (2.2, 1.0)])
def test_rebel_against_regressions_solved(eta, beta):
    """β = 0, ηβ below 1, = 1 (one rollout is enough), between 1 and 2 (to and fro), above 2 (apart)."""
    rng = np.random.default_rng(int(100 * eta))
    ref, rewards = rng.dirichlet(np.full(7, 2.0)), rng.normal(size=7)
    current = ref
    for t in range(1, 7):
        current = regression_step(current, eta * (rewards - beta * np.log(current / ref)))
        close(current, law.rebel_law(ref, rewards, beta, eta, t))
        if eta * beta == 1:
            close(current, law.tilt(ref, rewards, beta))


def test_rebel_limits():
    """ηβ < 2: π*; the distance to it in log-probs is multiplied by 1 − ηβ each time. β → 0 is β = 0. No rollout: ref."""
    rng = np.random.default_rng(0)
    ref, rewards = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    for eta, beta in ((0.3, 1.0), (1.0, 1.7), (5.0, 0.1)):
        best = law.tilt(ref, rewards, beta)
        close(law.rebel_law(ref, rewards, beta, eta, 200), best, 1e-12)
        away = [np.log(law.rebel_law(ref, rewards, beta, eta, t) / best) for t in (1, 2, 3)]
        away = [a - a[0] for a in away]
        assert away[1] == pytest.approx((1 - eta * beta) * away[0], abs=1e-12)
        assert away[2] == pytest.approx((1 - eta * beta) * away[1], abs=1e-12)
    close(law.rebel_law(ref, rewards, 1e-7, 0.5, 4), law.rebel_law(ref, rewards, 0, 0.5, 4), 1e-6)
    close(law.rebel_law(ref, rewards, 0, 0.5, 4), law.tilt(ref, rewards, 0.5), 1e-12)  # ηt = 1/β


@pytest.mark.parametrize(("beta", "eta", "rollouts"), [(0.5, 1.0, 0), (0.0, 1.0, 0), (2.0, 1.0, 2), (1.0, 2.0, 4), (0.5, 0.0, 3)])
def test_rebel_where_nothing_is_kept(beta, eta, rollouts):
    """Before the first rollout, and at ηβ = 2 after every second one, the policy is ref."""
    ref, rewards = np.array([0.5, 0.3, 0.2]), np.array([1.0, 0, 2])
    close(law.rebel_law(ref, rewards, beta, eta, rollouts), ref, 1e-14)


# ---------------------------------------------------------------------------------------------------------------- collapse


def spread(policy, rewards):
    return np.sqrt(policy @ (rewards - policy @ rewards) ** 2)


def iterate(ref, rewards, beta, sigma, damping=0.5, rounds=4000):
    """σ ← std of r under ref·e^{r/(βσ)}, a share of the way each time; stops near 0."""
    scale = np.ptp(rewards)
    for _ in range(rounds):
        logits = np.log(ref) + rewards / (beta * sigma)
        new = spread(law.normalise(np.exp(logits - logits.max())), rewards)
        if new < 1e-6 * scale:
            return 0.0
        sigma = sigma ** (1 - damping) * new**damping
    return sigma


@pytest.mark.parametrize("seed", range(4))
def test_both_sides_of_the_threshold(seed):
    """From a huge σ: above it σ settles where std_normalised_law is, below it falls to 0. From a tiny σ it always falls. With ties."""
    rng = np.random.default_rng(seed)
    ref, rewards = rng.dirichlet(np.ones(12)), rng.choice([0.0, 1, 1.7, 3], size=12)
    threshold, temperature = law.collapse_threshold(ref, rewards)
    assert threshold == pytest.approx(temperature / spread(law.tilt(ref, rewards, temperature), rewards), rel=1e-12)
    for beta in (1.02 * threshold, 1.5 * threshold, 10 * threshold):
        sigma, settled = iterate(ref, rewards, beta, 1e3), law.std_normalised_law(ref, rewards, beta)
        assert sigma == pytest.approx(spread(settled, rewards), rel=1e-9) and sigma > 0
        close(law.tilt(ref, rewards, beta * sigma), settled, 1e-9)
        assert iterate(ref, rewards, beta, 1e-2 * temperature / beta) == 0
    for beta in (0.98 * threshold, 0.5 * threshold):
        assert iterate(ref, rewards, beta, 1e3) == 0 and law.std_normalised_law(ref, rewards, beta) is None


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_ignores_units(seed):
    """π ∝ ref·e^{r/(βσ)}: scaling r scales σ, shifting r shifts nothing."""
    rng = np.random.default_rng(seed)
    ref, rewards = rng.dirichlet(np.ones(8)), rng.normal(size=8)
    threshold, temperature = law.collapse_threshold(ref, rewards)
    for scale, shift in ((1e-3, 0.0), (40.0, -7.0), (1.0, 5.0)):
        other, warmer = law.collapse_threshold(ref, scale * rewards + shift)
        assert other == pytest.approx(threshold, rel=1e-9) and warmer == pytest.approx(scale * temperature, rel=1e-6)
        close(law.std_normalised_law(ref, scale * rewards + shift, 2 * threshold), law.std_normalised_law(ref, rewards, 2 * threshold))


@pytest.mark.parametrize(("scale", "shift"), [(1e-8, 0.0), (1e-3, 0.0), (40.0, -7.0), (1.0, 5.0)])
def test_grpo_as_printed_ignores_units(scale, shift):
    rng = np.random.default_rng(0)
    ref, rewards = rng.dirichlet(np.ones(5)), rng.normal(size=5)
    found = law.group_normalised_law(ONE_TOKEN, ref, scale * rewards + shift, 0.4)
    close(found, law.group_normalised_law(ONE_TOKEN, ref, rewards, 0.4))


@pytest.mark.parametrize("share", [1e-8, 0.01, 0.3, 0.5, 0.9])
def test_the_threshold_of_two_rewards(share):
    """Two values of the reward, `share` of ref on the better: ties do not matter, and with t = range/s the spread is √(q(1 − q)),
    logit q = logit(share) + t. 1/β = t·√(q(1 − q)) is largest where t·tanh((t + logit share)/2) = 2. At share ½, 1/β* is the Laplace
    limit, max x/cosh x = 0.66274…
    """
    logit = np.log(share / (1 - share))
    low, high = max(-logit, 0.0), 100.0  # tanh is positive above the first, and t·tanh rises there
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if t * np.tanh((t + logit) / 2) < 2 else (low, t)
    expected = 2 * np.cosh((t + logit) / 2) / t
    for ref, rewards in (([1 - share, share], [0.0, 1]), (np.repeat([1 - share, share], 3) / 3, np.repeat([-4.0, 5], 3))):
        threshold, temperature = law.collapse_threshold(ref, rewards)
        assert threshold == pytest.approx(expected, rel=1e-6) and temperature == pytest.approx(np.ptp(rewards) / t, rel=5e-3)
    if share == 0.5:
        assert expected == pytest.approx(1 / 0.6627434193491815, rel=1e-12)


def test_ties_survive_a_collapse():
    """Two best completions: what is left of the others goes to 0, but the two keep their shares of ref."""
    ref, rewards = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1, 2, 2])
    beta = 0.8 * law.collapse_threshold(ref, rewards)[0]
    assert iterate(ref, rewards, beta, 1e3) == 0 and law.std_normalised_law(ref, rewards, beta) is None
    sigma = 1e3
    for _ in range(30):  # by hand until nothing is left to divide by
        policy = law.tilt(ref, rewards, beta * sigma)
        sigma = max(spread(policy, rewards), 1e-12)
    assert policy == pytest.approx([0, 0, 2 / 3, 1 / 3], abs=1e-12)


def test_rewards_of_two_scales_have_two_cold_slopes():
    """r = (0, 30, 31): between the temperatures that tell 0 from 30 and 30 from 31 no spread is left, so β(s) has two minima and there are
    up to four solutions. The flow from ref meets the warmest first: that is the law (with t = 1/temperature, t' ∝ 1/σ − β·t).
    """
    ref, rewards = np.array([0.5, 0.3, 0.2]), np.array([0.0, 30, 31])
    beta, t = 2.0, 0.0
    for _ in range(20000):
        change = 1e-3 * (1 / spread(law.normalise(ref * np.exp(t * (rewards - 31))), rewards) - beta * t)
        t += change
        if abs(change) < 1e-16:
            break
    sigma = spread(law.normalise(ref * np.exp(t * (rewards - 31))), rewards)
    assert 1 / (t * sigma) == pytest.approx(beta, rel=1e-9)  # a solution
    assert sigma == pytest.approx(iterate(ref, rewards, beta, 1e3), rel=1e-9)  # which the iteration meets as well
    close(law.std_normalised_law(ref, rewards, beta), law.tilt(ref, rewards, 1 / t))


@pytest.mark.parametrize("case", ["two scales", "rare", "near tie", "random"])
def test_the_threshold_is_the_smallest(case):
    """No temperature gives a smaller β, however far below the range of the rewards it is. "random": 40 independent normal rewards, whose
    best two happen to be 0.009 apart: at β = .55 there is a law, of σ = .0045, which the iteration meets.
    """
    _, random_ref, random_rewards, _ = problem(0)
    ref, rewards = {"two scales": ([0.5, 0.3, 0.2], [0.0, 1000, 1001]), "rare": ([1 - 1e-60, 1e-60], [0.0, 1]),
                    "near tie": ([0.4, 0.3, 0.3], [0.0, 1, 1.001]), "random": (random_ref, random_rewards.numpy())}[case]
    betas = [s / max(spread(law.tilt(ref, rewards, s), rewards), 1e-300) for s in np.geomspace(1e-5, 1e2, 4001) * np.ptp(rewards)]
    if case == "random":
        sigma = iterate(ref, rewards, 0.55, 1e3, rounds=400)
        assert sigma == pytest.approx(spread(law.tilt(ref, rewards, 0.55 * sigma), rewards), rel=1e-9) and 0.004 < sigma < 0.005
    assert law.collapse_threshold(ref, rewards)[0] == pytest.approx(min(betas), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_k3_does_not_collapse(seed):
    """Only a KL subtracted after the division has a threshold. With k3 in the loss every β has one law, from every start: there π(y) of a
    worse completion falls like β·σ, not exponentially, so σ² ≈ βσ·Σ ref·(r_max − r) for small σ, and σ → β·Σ ref·(r_max − r) > 0 as
    β → 0. On whole completions the spread's elasticity to the pull is below ½, so there is exactly one.
    """
    rng = np.random.default_rng(seed)
    ref, rewards = rng.dirichlet(np.ones(5)), rng.normal(size=5)
    threshold, _ = law.collapse_threshold(ref, rewards)
    gap = ref @ (rewards.max() - rewards)
    for beta in (1e-4, 0.01 * threshold, 0.5 * threshold, 2 * threshold):
        expected = law.group_normalised_law(ONE_TOKEN, ref, rewards, beta)
        for sigma in (1e3, 1e-9):
            for _ in range(60):
                sigma = spread(law.sequence_k3_law(ref, rewards, beta * sigma), rewards)
            close(law.sequence_k3_law(ref, rewards, beta * sigma), expected, 1e-9)
        assert spread(expected, rewards) > 0
        if beta == 1e-4:
            assert spread(expected, rewards) == pytest.approx(beta * gap, rel=5e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_leave_ref(value):
    _, ref, _, _ = problem(0)
    rewards = np.full(len(ref), value)
    close(law.sequence_k3_law(ref, rewards, 0.5), ref, 1e-12)
    close(law.token_k3_law(COMPLETIONS, ref, rewards, np.full(len(ref), 0.5)), ref, 1e-12)
    close(law.rebel_law(ref, rewards, 0.5, 1.0, 3), ref, 1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_over_their_spread_leave_ref(value):
    """A group of equal rewards has advantages of exactly 0, not 0/0; and the mean of equal numbers may be off by a rounding error."""
    _, ref, _, _ = problem(0)
    rewards = np.full(len(ref), value)
    close(law.group_normalised_law(COMPLETIONS, ref, rewards, 0.5), ref, 1e-12)
    close(law.std_normalised_law(ref, rewards, 0.5), ref, 1e-12)


# ------------------------------------------------------------------------------------------------------------------- sanity


def laws(ref, rewards, beta, completions=COMPLETIONS):
    pull = np.full(len(ref), beta)
    return {"rebel": law.rebel_law(ref, rewards, beta, 0.5 / beta, 60), "sequence_k3": law.sequence_k3_law(ref, rewards, beta),
            "token_k3": law.token_k3_law(completions, ref, rewards, pull),
            "group_normalised": law.group_normalised_law(completions, ref, rewards, beta),
            "std_normalised": law.std_normalised_law(ref, rewards, beta)}


@pytest.mark.parametrize("seed", range(2))
def test_laws_are_distributions_and_reduce_to_ref(seed):
    _, ref, rewards, _ = problem(seed)
    for name, found in laws(ref, rewards.numpy(), 2.0).items():
        close(found, found)
        assert found @ rewards.numpy() > ref @ rewards.numpy(), name
    for name, found in laws(ref, rewards.numpy(), 1e4).items():
        assert np.abs(found / ref - 1).max() < 1e-3, name


@pytest.mark.parametrize("seed", range(3))
def test_one_token_is_one_action(seed):
    rng = np.random.default_rng(seed)
    ref, rewards = rng.dirichlet(np.ones(5)), rng.normal(size=5)
    for beta in (0.1, 1.0, 7.0):
        close(law.token_k3_law(ONE_TOKEN, ref, rewards, np.full(5, beta)), law.sequence_k3_law(ref, rewards, beta), 1e-13)
    forked = [(9, 9, *y) for y in ONE_TOKEN]  # tokens without a choice change nothing
    close(law.token_k3_law(forked, ref, rewards, np.full(5, 0.7)), law.sequence_k3_law(ref, rewards, 0.7), 1e-13)


def test_the_names_and_the_order_of_completions_do_not_matter():
    _, ref, rewards, _ = problem(0)
    rewards, rng = rewards.numpy(), np.random.default_rng(0)
    order, names = rng.permutation(len(ref)), rng.permutation(WORDS + 1)
    renamed = [tuple(names[token] for token in COMPLETIONS[c]) for c in order]
    before, after = laws(ref, rewards, 2.0), laws(ref[order], rewards[order], 2.0, renamed)
    for name in before:
        close(after[name], before[name][order], 1e-11)


def test_sequence_k3_maximises_reward_minus_the_forward_kl():
    rng = np.random.default_rng(0)
    for beta in (0.05, 0.7, 5.0):
        ref, rewards = rng.dirichlet(np.ones(6)), rng.normal(size=6)
        best = law.sequence_k3_law(ref, rewards, beta)
        value = best @ rewards - beta * law.kl(ref, best)
        for size in (1e-3, 0.1, 1.0):
            for _ in range(100):
                other = law.normalise(best * np.exp(rng.normal(size=6) * size))
                assert other @ rewards - beta * law.kl(ref, other) <= value + 1e-14


def exact_k3(ref, rewards, pull):
    """β·ref/(c − r) with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        ref, rewards, pull = [Decimal(float(x)) for x in ref], [Decimal(float(x)) for x in rewards], Decimal(float(pull))
        low, high = Decimal(0), pull * sum(ref)  # of c − max r
        for _ in range(150):
            middle = (low + high) / 2
            total = sum(pull * p / (middle + max(rewards) - r) for p, r in zip(ref, rewards, strict=True))
            low, high = (middle, high) if total > 1 else (low, middle)
        weights = [pull * p / (high + max(rewards) - r) for p, r in zip(ref, rewards, strict=True)]
        return np.array([float(weight / sum(weights)) for weight in weights])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("pull", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_the_bisection_against_60_digits(scale, pull):
    """Relative errors: a KL looks at log-probs. Ties, also at the top; small probabilities in ref."""
    rng = np.random.default_rng(0)
    for ref, rewards in (([0.2, 0.5, 0.3], [1.0, 1, 0]), ([0.2, 0.5, 0.3], [0.0, 1, 1 - 2**-20]), ([1 - 2e-6, 1e-6, 1e-6], [0.0, 1, -1]),
                         (rng.dirichlet(np.ones(5)), rng.normal(size=5))):
        found, expected = law.sequence_k3_law(ref, scale * np.array(rewards), pull), exact_k3(ref, scale * np.array(rewards), pull)
        close(found, expected, 1e-9)
        assert np.abs(found / expected - 1).max() < 1e-6


def test_a_weak_pull_leaves_the_best_and_shares_a_tie_like_ref():
    ref, rewards = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 1, 2, 2])
    found = law.sequence_k3_law(ref, rewards, 1e-5)
    assert found[2:] == pytest.approx([2 / 3, 1 / 3], abs=1e-5)
    assert found[:2] == pytest.approx([1e-5 * 0.4 / 2, 1e-5 * 0.3], rel=1e-4)


def test_a_completion_that_ref_never_says_and_that_pays_little_is_not_said():
    found = law.sequence_k3_law([0.0, 0.5, 0.5], [0.0, 1, 2], 0.5)
    assert found[0] == 0
    close(found[1:], law.sequence_k3_law([0.5, 0.5], [1, 2], 0.5), 1e-14)


@pytest.mark.parametrize("completions", [[(0,), (0, 1)], [(0, 1), (0,)], [(0, 1), (0, 1)]])
def test_a_completion_that_begins_another_is_refused(completions):
    with pytest.raises(IndexError):
        law.token_k3_law(completions, [0.5, 0.5], [0.0, 1], [1.0, 1])
