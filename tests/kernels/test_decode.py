"""The decoding path of a CPU against the model it stands for."""

import pytest
import torch

from minialign.kernels.decode import Decoder
from minialign.lora import adapters, inject
from minialign.model import KVCache
from tests.enumerable import tiny_gpt
from tests.test_sample import FAMILIES


@torch.no_grad()
def both(policy, lengths, steps=6):
    """Hidden states of `steps` tokens after prompts of these lengths, by GPT.hidden and by the Decoder, with the caches they leave."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, (len(lengths), max(lengths)), generator=generator)
    tokens = torch.randint(5, (steps, len(lengths)), generator=generator)
    found = []
    for decoding in (False, True):
        cache = KVCache(policy.config, len(lengths), max(lengths) + steps, dtype=policy.head_weight.dtype)
        policy.hidden(prompts, cache=cache, lengths=torch.tensor(lengths))
        step = Decoder(policy, cache) if decoding else lambda token, cache=cache: policy.hidden(token[:, None], cache=cache)[:, -1]
        found.append((torch.stack([step(token) for token in tokens]), cache))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[3, 3, 3], [1, 4, 2], [5]])
def test_it_is_the_model(family, lengths):
    """Equal and ragged rows, in float64 to 1e-12: hidden states, the keys and values written, and what the cache says of itself."""
    (model, cache), (decoded, other) = both(tiny_gpt(dtype=torch.float64, max_len=32, **FAMILIES[family]), lengths)
    assert (model - decoded).abs().max() < 1e-12
    assert other.longest == cache.longest == max(lengths) + 6 and torch.equal(other.lengths, cache.lengths)
    for b, length in enumerate(cache.lengths.tolist()):
        for name in ("keys", "values"):
            assert (getattr(cache, name)[:, b, :, :length] - getattr(other, name)[:, b, :, :length]).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_leave(family):
    """The last two of three rows go on as they would have beside the first; with no rotary channel too, where the family has any."""
    policy = tiny_gpt(dtype=torch.float64, max_len=32, **{**FAMILIES[family], "rotary_dim": 0})
    ends = []
    for rows in ([0, 1, 2], [1, 2]):
        cache = KVCache(policy.config, 3, 9, dtype=torch.float64)
        policy.hidden(torch.tensor([[1, 2, 3, 4], [2, 2, 0, 0], [3, 1, 0, 0]]), cache=cache, lengths=torch.tensor([4, 2, 2]))
        step = Decoder(policy, cache)
        step(torch.tensor([1, 0, 2]))
        step = step.select(torch.tensor(rows)) if len(rows) < 3 else step
        ends.append(torch.stack([step(torch.tensor([4, 3, 1])[rows]) for _ in range(4)])[:, -2:])
    assert (ends[0] - ends[1]).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_merged(family):
    policy = inject(tiny_gpt(dtype=torch.float64, max_len=32, **FAMILIES[family]), 2, 4.0)
    for adapter in adapters(policy).values():
        torch.nn.init.normal_(adapter.lora_B)
    (model, _), (decoded, _) = both(policy, [2, 4])
    assert (model - decoded).abs().max() < 1e-11
