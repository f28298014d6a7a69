"""What all methods that learn from pairs share: the pairs of a step, and the reference.

The pairs come from the file of --pairs, or, with --online, from the policy itself.

Online (Guo et al. 2024, arXiv:2402.04792): of a pair only the prompt is used. The policy of the day draws two answers to it, and a reward
labels them: the first is the chosen one with the Bradley-Terry probability σ(r₁ − r₂). Autograd sees nothing of that: the answers are data.

Checked by tests/test_pairs.py and tests/test_preference_runs.py.
"""

import torch

from minialign.common import BadInput, derive_seed
from minialign.data import builtin_pairs, encode_pairs, encode_prompts, read_preferences, split_scorable
from minialign.lora import frozen_copy
from minialign.sample import sample


def open_pairs(run, policy, tokenizer):
    """([(prompt ids, chosen ids, rejected ids)] to train on, the same held out, draw) of the run's Config.

    draw(k, picked) -> (the pairs of step k, metrics). Online both are None if the reward failed: the step is then to be skipped.
    """
    cfg = run.cfg
    run.same_input("data", cfg.pairs)
    pairs = builtin_pairs() if cfg.pairs == "builtin" else read_preferences(cfg.pairs, skip_bad=cfg.skip_bad)
    rows, held_out = split_scorable(encode_pairs(tokenizer, pairs, max_prompt=cfg.max_prompt), cfg.held_out, cfg.max_len)
    if cfg.online and getattr(cfg, "precompute_ref", False):
        raise BadInput("--precompute_ref: --online draws new answers at every step; drop one of the two")
    if not cfg.online:
        return rows, held_out, lambda k, picked: ([rows[i] for i in picked], {})

    reward_fn = run.open_reward()
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in pairs], max_prompt=cfg.max_prompt)
    prompts, _ = split_scorable(prompts, cfg.held_out, cfg.max_len)  # row for row those of `rows`
    run.check_context(policy, prompts, max_len=cfg.max_len)

    def draw(k, picked):
        prompts_ids, asked = zip(*[prompts[i] for i in picked], strict=True)
        seed = derive_seed(run.method, cfg.seed, k)
        answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, n=2, eos_id=tokenizer.eos_id, seed=seed)
        said = [tokenizer.decode(ids) for ids in answers.completions]
        rewards = run.ask(k, reward_fn, [prompt for prompt in asked for _ in range(2)], said)  # (2·B,)
        return (None, None) if rewards is None else (label(prompts_ids, answers.completions, rewards, seed), {"reward": rewards.mean()})

    return rows, held_out, draw


def reference(policy, cfg):
    """ref: what the policy is held to, itself before training; None, and no second model in memory, where the loss has no β to pull it,
    and where what it says of all pairs will be remembered (--precompute_ref)."""
    return frozen_copy(policy) if hasattr(cfg, "beta") and not getattr(cfg, "precompute_ref", False) else None


def label(prompts_ids, completions, rewards, seed):
    """[(prompt ids, chosen ids, rejected ids)] of B prompts and the 2·B answers to them, those of one prompt adjacent; rewards: (2·B,)."""
    first = torch.sigmoid(rewards[::2] - rewards[1::2]).cpu()  # (B,) how often it is the chosen one
    chosen = torch.rand(len(first), generator=torch.Generator().manual_seed(seed)) >= first  # (B,) 0: the first, 1: the second
    both = zip(completions[::2], completions[1::2], strict=True)
    return [(x, pair[c], pair[1 - c]) for x, pair, c in zip(prompts_ids, both, chosen.int().tolist(), strict=True)]
