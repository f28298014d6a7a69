"""Three completions whose best policy is known: the toy of tutorials 09, 09b and 09c.

A prompt has only three answers: "tea!", "tea, please" and "could i have tea". All pairs of answers can be listed. So the expected loss
of a method is a sum over nine pairs, and `land` finds where it is smallest.
"""

from dataclasses import dataclass

import torch

ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)  # how often the reference says each
r = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).log()  # rewards: each beats the one before with odds 2 : 1
prefer = (r[:, None] - r).sigmoid()  # (3, 3): [a, b] is how often the judge chooses a over b
lengths = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)  # words

WON, LOST = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T  # (9,) each: all nine pairs


@dataclass
class PairLogps:
    """What a loss may use of B pairs, (B,) each. Log-probs are sums over the tokens of an answer."""

    chosen: torch.Tensor  # log π of the chosen answers
    rejected: torch.Tensor
    ref_chosen: torch.Tensor  # log ref of the chosen answers
    ref_rejected: torch.Tensor
    n_chosen: torch.Tensor  # their numbers of tokens
    n_rejected: torch.Tensor
    z0: torch.Tensor | float = 0.0  # KTO's reference point, a number


def land(loss_of, mu=ref, prefer=prefer, ref=ref, start=None):
    """The policy (3,) with the smallest expected loss.

    loss_of: a function of a PairLogps that returns the loss of each pair (B,).
    mu (3,): how often whoever wrote the pairs writes each answer. prefer (3, 3): how often the first is chosen over the second.

    The pair (a, b) has the weight mu[a]·mu[b]·prefer[a, b]. The optimiser is LBFGS, which estimates the curvature of the loss from past
    gradients. It finds the minimum to many digits in a few hundred steps, where gradient descent would take very many.
    """
    logits = (ref if start is None else start).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")
    weights = mu[WON] * mu[LOST] * prefer[WON, LOST]

    def expected_loss():
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        pairs = PairLogps(logps[WON], logps[LOST], ref.log()[WON], ref.log()[LOST], lengths[WON], lengths[LOST])
        loss = (weights / weights.sum()) @ loss_of(pairs)
        loss.backward()
        return loss

    optimizer.step(expected_loss)
    return logits.detach().softmax(0)


def row(numbers, digits=3):
    """The numbers of a list or a tensor (N,) as text, [0.600 0.300 0.100]."""
    return "[" + " ".join(f"{number:.{digits}f}" for number in torch.as_tensor(numbers).tolist()) + "]"
