"""A smaller language than the toy's, for tests: four content tokens and EOS, at most three tokens, so 85 completions of a prompt.

Whatever the policy, their probabilities sum to 1: what a test of probabilities sums over instead of trusting a sample.
"""

import torch

from toy import tiny_language
from toy.tiny_language import all_completions  # noqa: F401  tests take both from here

N_CONTENT, EOS, MAX_NEW = 4, 4, 3
PROMPTS = [[0], [1], [EOS], [2, 0, 1]]  # the last one is longer: scoring a prompt by mistake shows only there


def tiny_gpt(vocab_size=N_CONTENT + 1, **changes):
    return tiny_language.tiny_gpt(vocab_size, **changes)


LANGUAGE = tiny_language.Language(n_content=N_CONTENT, max_new=MAX_NEW, n_prompts=2)
CLIP = {  # {A: [(ρ, min(ρA, clip(ρ)A), its slope in ρ)]} for ε = .2
    1.0: [(0.5, 0.5, 1), (1.1, 1.1, 1), (1.5, 1.2, 0)],
    -1.0: [(0.5, -0.8, 0), (0.9, -0.9, -1), (1.5, -1.5, -1)],
}
BETA = 0.7  # not 1: a lost β would change nothing there


class Enumerated:
    """One prompt of LANGUAGE with a policy, another ref, and exact expectations: what the estimators of a method must average to.

    logps, ref_logps, mask: (C, T) over all C = 85 completions. Rewards are programmatic, of different scale per prompt.
    """

    def __init__(self, prompt=0, seed=0, ref_seed=1):
        self.policy, ref = tiny_gpt(seed=seed), tiny_gpt(seed=ref_seed)
        self.logps = LANGUAGE.token_logps(self.policy)[prompt]
        self.ref_logps = LANGUAGE.token_logps(ref)[prompt].detach()
        self.mask, self.completions = LANGUAGE.mask, LANGUAGE.completions
        self.rewards = (1 + 2 * prompt) * LANGUAGE.rewards[prompt]  # (C,)
        self.law = self.logps.detach().sum(1).exp()  # (C,) exact probabilities
        self.weights = self.law * len(self.law)  # turns a mean over the C rows into an expectation

    def gradient(self, loss):
        """d loss / d all parameters, one vector."""
        grads = torch.autograd.grad(loss, list(self.policy.parameters()), retain_graph=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    def objective(self, beta=BETA):
        """J = E_π[r] − β·KL(π‖ref), differentiable: the sum over all completions."""
        seq_logps = self.logps.sum(1)
        return (seq_logps.exp() * (self.rewards - beta * (seq_logps - self.ref_logps.sum(1)))).sum()


def relative(a, b):
    return float((a - b).norm() / b.norm())


def random_rows(seed=0, rows=6, columns=5):
    """Random log-probs, others near them, ref's, and masks of unequal length: (B, T) float64."""
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = -torch.rand(2, rows, columns, generator=generator, dtype=torch.float64) * 3
    old_logps = logps + 0.3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, columns + 1, (rows,), generator=generator)
    mask = torch.arange(columns) < lengths[:, None]
    return [torch.where(mask, x, 0) for x in (logps, old_logps, ref_logps)] + [mask]


def padded(*tensors, columns=3, value=7.0):
    """Extra columns on the right, full of rubbish; masks get False."""
    def pad(x):
        extra = torch.full((x.shape[0], columns), False if x.dtype == torch.bool else value, dtype=x.dtype)
        return torch.cat([x, extra], dim=1)

    return [pad(x) for x in tensors]


def expected(loss_of, first, second):
    """Σ_{a, b} first(a)·second(b)·loss_of([a], [b]): the exact expectation of a loss of pairs, a drawn from one law and b from another.

    loss_of takes two index tensors of one entry and returns a scalar. Autograd flows, twice if need be.
    """
    a, b = torch.cartesian_prod(torch.arange(len(first)), torch.arange(len(second))).T
    losses = torch.vmap(lambda i, j: loss_of(i[None], j[None]))(a, b)
    return (first[a] * second[b] * losses).sum()


def tiny_reward_model(seed=0, **settings):
    """tiny_gpt's trunk under a random scalar head; the global seed is left alone. settings: reward_read, reward_bound."""
    trunk = tiny_gpt(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return trunk.with_scalar_head(**settings)
