"""rewards.score reads the scalar head at the last real token, whatever surrounds it."""

import torch

from minialign.batch import collate
from minialign.model import GPT, GPTConfig
from minialign.rewards import score

PROMPTS, COMPLETIONS = [[1, 2], [3], [4, 5, 6]], [[7, 0], [8, 9, 1, 2, 0], [0]]


def reward_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig.tiny(11, n_embd=16, n_head=2, ffn_dim=32, **changes)).double().with_scalar_head()


def at_the_end(model, row):
    """The oracle: the row alone, unpadded, and the number at its last position."""
    return model(torch.tensor([row]))[0, -1].item()


@torch.no_grad()
def test_reads_the_last_token_of_each_row_eos_included():
    for changes in ({}, {"positions": "learned", "norm": "layer"}, {"windows": (2, None)}):
        model = reward_model(**changes)
        scores = score(model, collate(PROMPTS, COMPLETIONS, pad_id=0))
        expected = [at_the_end(model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        assert torch.allclose(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
        without_eos = at_the_end(model, PROMPTS[0] + COMPLETIONS[0][:-1])
        assert abs(scores[0].item() - without_eos) > 1e-3  # reading one token early would show


@torch.no_grad()
def test_a_batch_of_one_equals_a_batch_of_many():
    model = reward_model()
    together = score(model, collate(PROMPTS, COMPLETIONS, pad_id=0))
    alone = [score(model, collate([p], [c], pad_id=0))[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-12)


@torch.no_grad()
def test_padding_may_be_anything():
    model = reward_model()
    scores = [score(model, collate(PROMPTS, COMPLETIONS, pad_id=pad)) for pad in range(11)]
    assert all(torch.equal(s, scores[0]) for s in scores)


@torch.no_grad()
def test_a_cut_row_is_read_where_it_was_cut():
    model = reward_model()
    scores = score(model, collate(PROMPTS, COMPLETIONS, pad_id=0, max_len=4))
    assert abs(scores[1].item() - at_the_end(model, [3, 8, 9, 1])) < 1e-12


@torch.no_grad()
def test_an_empty_row_is_read_at_its_first_token():
    model = reward_model()
    scores = score(model, collate([[3, 4], [1]], [[], [2, 0]], pad_id=0))
    assert abs(scores[0].item() - at_the_end(model, [3])) < 1e-12 and scores.isfinite().all()


def test_the_gradient_reaches_head_and_trunk():
    """d score / d head is the trunk's output at the place that is read."""
    model = reward_model()
    batch = collate(PROMPTS[:1], COMPLETIONS[:1], pad_id=0)
    score(model, batch).sum().backward()
    hidden = model.hidden(torch.tensor([PROMPTS[0] + COMPLETIONS[0]]))[0, -1]
    assert torch.allclose(model.head_weight.grad[0], hidden, atol=1e-12)
    assert model.tok_embed.weight.grad[0].abs().sum() > 0  # id 0, the EOS, was seen


def test_the_offset_is_subtracted():
    model = reward_model()
    batch = collate(PROMPTS, COMPLETIONS, pad_id=0)
    before = score(model, batch)
    model.config.reward_offset = 0.75
    assert torch.allclose(score(model, batch), before - 0.75, atol=1e-12)
