"""Estimators of KL(π‖ref) from the log-probs of sampled tokens, and the exact divergence that they estimate. Schulman 2020.

With y ~ π and log-ratio d = log π(y) − log ref(y):

    k1 = d                  unbiased, signed, high variance
    k2 = d² / 2             biased, low variance, never negative
    k3 = e^{−d} − 1 + d     unbiased, never negative

The trap: as a *value*, k1 and k3 both have the mean KL(π‖ref). As a *loss term*, differentiated through log π with y fixed, on average
    k1 gives 0,   k2 gives ∇KL(π‖ref),   k3 gives ∇KL(ref‖π), the other divergence.
This holds for log-probs of whole completions. Summed per token, k2 ignores that a token changes the KL of later tokens, and k3 takes the
prefixes from π instead of ref (toy/theory.py). So the KL belongs in the detached reward as k1, or in the loss as k2 of whole completions.
GRPO puts k3 per token in the loss; grpo.py says what that costs.

Each estimator takes log-probs of any one shape and returns that shape. Checked by tests/test_kl.py: values and gradients by enumeration.
"""

import math

import torch

# Beyond e^20 = 5e8 the exponential continues as its tangent line: value and gradient are never inf, and the gradient keeps its sign.
# (A clip after exp gives 0·inf = NaN in the backward pass. A clip before exp leaves only the slope +1 of d, which pushes π away from ref.)
MAX_EXPONENT = 20.0


def k1(logps, ref_logps):
    return logps - ref_logps


def k2(logps, ref_logps):
    return (logps - ref_logps) ** 2 / 2


def k3(logps, ref_logps):
    ref_logratio = ref_logps - logps
    tangent = math.exp(MAX_EXPONENT) * torch.relu(ref_logratio - MAX_EXPONENT)  # 0 up to MAX_EXPONENT
    return torch.expm1(ref_logratio.clamp(max=MAX_EXPONENT)) + tangent - ref_logratio  # expm1: near 0, e^x − 1 loses all digits


def kl_rewards(rewards, logps, ref_logps, *, beta):
    """r − β·Σ_t k1_t, detached: the reward minus the KL penalty. rewards (B,), log-probs (B, T), 0 where nothing is scored -> (B,)."""
    return (rewards - beta * k1(logps, ref_logps).sum(1)).detach()


def shape_rewards(rewards, logps, ref_logps, mask, *, beta):
    """r_t = −β·k1_t, plus the reward of the completion at its last token: rewards (B,), log-probs and mask (B, T) -> (B, T), detached."""
    token_rewards = -beta * torch.where(mask, k1(logps, ref_logps), 0)
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = torch.where(mask, places, 0).argmax(1)  # (B,) from the mask: padding may look like anything
    return token_rewards.scatter_add(1, last[:, None], rewards.to(token_rewards)[:, None]).detach()


def adapted(penalty, moved_by, target):
    """κ of PPO's penalty for the next rollout: doubled if the KL was above 1.5 times its target, halved if below 1/1.5 of it (Schulman et
    al. 2017, section 4)."""
    return penalty * (2.0 if moved_by > 1.5 * target else 0.5 if moved_by < target / 1.5 else 1.0)


def moved(logps, old_logps):
    """True if a log-prob differs from the old one, judged by the largest |log-ratio|. NaN counts as equal (run.may_update reports it).

    The mean ratio would not do: a GPU multiplies a sum by 1/n, so the mean of 41 ones is not 1. Only a CPU looks; a GPU would have to wait.
    """
    return logps.device.type == "cpu" and bool((logps - old_logps).abs().max() > 0)


def exact_kl(logits, ref_logits):
    """KL(π‖ref) of full distributions: logits, ref_logits (..., V) -> (...), in nats."""
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    logratio = torch.where(logps.isneginf(), 0, logps - ref_logps)  # 0·log 0 counts as 0, in the gradient too
    return (logps.exp() * logratio).sum(-1)
