"""What the tests of the preference methods share: ragged pairs, a population of labelled pairs, and a run written out again.

In the second account every answer is alone, unpadded, in plain loops. Only the models, the sampler and AdamW are the project's (or
torch's) own.
"""

import copy

import numpy as np
import pytest
import torch

from minialign.batch import Pairs, collate
from minialign.data import encode_pairs, read_preferences
from minialign.engine.common import batch_rows, read_rows
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained
from tests.enumerable import EOS, expected

PROMPT, CHOSEN, REJECTED = [2, 0, 1], [[2, EOS], [0, 1, EOS], [3, 3, 1]], [[EOS], [2, 2, 2], [1, EOS]]  # of unequal lengths
LENGTHS = torch.tensor([1, 2, 2, 3, 5], dtype=torch.float64)  # of the five answers of a population


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(seed=0, rows=20, sides=4):
    """(B,) log-probs of chosen and rejected answers, then ref's of both: far apart, of either sign."""
    return torch.randn(sides, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5


def token_logps_alone(model, completion, prompt=PROMPT):
    """log π of each token of one completion, alone and unpadded."""
    logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    return torch.stack([logits[t, token] for t, token in enumerate(completion)])


def log_prob(model, completion):
    return token_logps_alone(model, completion).sum()


def mean_log_prob(model, completion):
    return log_prob(model, completion) / len(completion)


def pairs_of(chosen, rejected, pad_id=EOS):
    return Pairs(*(collate([PROMPT] * len(rows), rows, pad_id=pad_id) for rows in (chosen, rejected)))


def gradient(loss, tensors):
    """d loss / d each tensor, as numbers or lists."""
    return [g.tolist() for g in torch.autograd.grad(loss, tensors)]


# ----------------------------------------------------------------------------------------------- populations of labelled pairs


def setting(seed):
    """Of five answers: rewards, ref, and a law that pairs are drawn from; each with full support, none uniform."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    ref, mu = (torch.rand(5, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
    return reward, ref / ref.sum(), mu / mu.sum()


def bradley_terry(reward):
    """(C, C): P(a is preferred to b)."""
    return torch.sigmoid(reward[:, None] - reward)


def any_preferences(seed):
    """(C, C) preferences of no reward at all: cycles, and pairs on which everybody agrees."""
    p = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upper = torch.where(p > 0.8, 1.0, p).triu(1)
    return upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(5, dtype=torch.float64)


def population(loss_of, wins, mu, other=None):
    """E of a loss over a ~ mu, b ~ other, labelled: loss_of(winner, loser) takes two index tensors of one entry."""
    def labelled(a, b):
        return wins[a, b].squeeze() * loss_of(a, b) + wins[b, a].squeeze() * loss_of(b, a)

    return expected(labelled, mu, mu if other is None else other)


def winners(wins, mu):
    """(W, L): how often each answer wins and loses; two laws."""
    wins, mu = np.asarray(wins), np.asarray(mu)
    return 2 * mu * (wins @ mu), 2 * mu * (wins.T @ mu)


# --------------------------------------------------------------------------------------------------------- a run written out again


def replay(folder, cfg, rows, loss_of_batch):
    """Do the steps of a finished run again and hold every logged loss, and the exported weights, against it.

    loss_of_batch(k, picked, policy, ref, rows) -> the loss of the batch. The run: constant learning rate, no warm-up, nothing held out.
    """
    policy = load_pretrained(cfg.policy)
    ref = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0)
    logged = read_rows(folder / "metrics.jsonl")
    assert len(logged) == cfg.steps
    rounds = getattr(cfg, "rounds", 1)
    renewals = {-(-t * cfg.steps // rounds) for t in range(1, rounds)}  # the first step of every round but the first
    for k, row in enumerate(logged):
        if k in renewals:
            ref = copy.deepcopy(policy)
        loss = loss_of_batch(k, batch_rows(len(rows), cfg.batch_size, k, cfg.seed), policy, ref, rows)
        optimizer.zero_grad()
        loss.backward()
        norm = sum(float((p.grad**2).sum()) for p in policy.parameters()) ** 0.5
        for p in policy.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-9, rel=1e-9) and row["grad_norm"] == pytest.approx(norm, rel=1e-6)
    exported, first = (dict(load_pretrained(path).named_parameters()) for path in (folder / "final", cfg.policy))
    for name, parameter in policy.named_parameters():
        assert (parameter - exported[name]).abs().max() < 1e-9
    assert max(float((exported[name] - first[name]).detach().abs().max()) for name in first) > 1e-3


def pair_account(loss_of_pair):
    """A loss_of_batch for replay: the mean of loss_of_pair(w, l, ref_w, ref_l), each the (tokens,) log-probs of one answer."""
    def loss_of_batch(k, picked, policy, ref, rows):
        losses = []
        for i in picked:
            x, *answers = rows[i]
            with torch.no_grad():
                at_ref = [token_logps_alone(ref, y, x) for y in answers]
            losses.append(loss_of_pair(*(token_logps_alone(policy, y, x) for y in answers), *at_ref))
        return sum(losses) / len(losses)

    return loss_of_batch


def check_main(small, method, loss_of_pair, **settings):
    """Four steps of eight pairs of the method, in micro-batches of three, against pair_account's."""
    module, cfg = small(method, **{**dict(steps=4, held_out=0.0, schedule="constant", warmup=0.0, micro_batch=3), **settings})
    rows = encode_pairs(load_tokenizer(cfg.policy), read_preferences(cfg.pairs))
    replay(module.main(cfg), cfg, rows, pair_account(loss_of_pair))
