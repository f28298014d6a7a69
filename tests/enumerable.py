"""A language small enough to enumerate, and a GPT over it: what a test of probabilities sums over instead of trusting a sample.

N_CONTENT content tokens and EOS; a completion has at most MAX_NEW tokens. One that ends before has said EOS, one that fills them may
not have (it was cut off), so there are 1 + V + V² + … + V^MAX_NEW of them and, whatever the policy, their probabilities sum to 1.
"""

from itertools import product

import torch

from minialign.model import GPT, GPTConfig

N_CONTENT, EOS, MAX_NEW = 4, 4, 3  # 85 completions
PROMPTS = [[0], [1], [EOS], [2, 0, 1]]  # the last one is longer: scoring a prompt by mistake shows only there


def all_completions(n_content, eos_id, max_new):
    """Every completion that a sampler can return, as lists of ids, shortest first. Content ids are 0 … n_content without eos_id."""
    content = [token for token in range(n_content + 1) if token != eos_id]
    ended = [[*words, eos_id] for length in range(max_new) for words in product(content, repeat=length)]
    return ended + [list(words) for words in product(content, repeat=max_new)]


def tiny_gpt(vocab_size=N_CONTENT + 1, *, seed=0, dtype=torch.float64, **changes):
    """A one-layer GPT-2 of 32 channels whose distribution is not flat and depends on the whole prefix; the global seed is left alone.

    Embeddings have std 0.3, every matrix 1/sqrt(its inputs): with GPT-2's 0.02 all tokens would be about equally likely.
    """
    shape = dict(n_layer=1, n_head=2, n_embd=32, max_len=16, norm="layer", activation="gelu_tanh", gated=False, positions="learned",
                 qkv_bias=True, out_bias=True, mlp_bias=True, tied=False, family="gpt2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = GPT(GPTConfig(vocab_size, **{**shape, **changes})).to(dtype)
        for name, parameter in policy.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else parameter.shape[1] ** -0.5)
    return policy
