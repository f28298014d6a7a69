"""The requests of tutorials 09 and 09c: four prompts, their 36 well-formed answers, and a small GPT that speaks like the rude speakers.

It is the language of tutorial 00 with four things and with words for tokens, which makes training fast. The well-formed answers are few,
so that their probabilities can be computed at every step.
"""

import copy
import re

import torch

from minialign.batch import collate
from minialign.logps import seq_logps
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import RUDE, builtin_law, builtin_prompt, gold_reward
from tutorials.three_completions import PairLogps

THINGS = ("tea", "bread", "soap", "honey")
prompts = [builtin_prompt(thing) for thing in THINGS]
texts = [list(builtin_law(prompt, RUDE)) for prompt in prompts]  # 36 answers for each prompt
speaker = torch.tensor([list(builtin_law(prompt, RUDE).values()) for prompt in prompts], dtype=torch.float64)  # (4, 36) their probabilities
rewards = torch.tensor([gold_reward([x] * 36, ys) for x, ys in zip(prompts, texts, strict=True)], dtype=torch.float64)  # (4, 36)


def split(text):
    return re.findall(r"\w+|[^\w\s]", text)  # words and punctuation marks


words = ["<end>", *sorted({word for x, ys in zip(prompts, texts, strict=True) for text in (x, *ys) for word in split(text)})]
ids = {word: i for i, word in enumerate(words)}
prompts_ids = [[ids[word] for word in split(prompt)] for prompt in prompts]
answers_ids = [[[*(ids[word] for word in split(y)), 0] for y in ys] for ys in texts]
answers = collate([x for x in prompts_ids for _ in range(36)], [y for ys in answers_ids for y in ys], pad_id=0)  # row 36·n + c


def rows_of(n, c):
    """The Batch of answers c (B,) to prompts n (B,)."""
    return answers[(36 * n + c).tolist()]


def all_logps(policy):
    """log π of every well-formed answer, (4, 36)."""
    with torch.no_grad():
        return seq_logps(policy, answers).view(4, 36).double()


def show_samples(policy, n=2):
    """Print n samples for each prompt."""
    drawn = sample(policy, prompts_ids, max_new=16, n=n, eos_id=0, seed=1)
    for i in range(0, len(drawn.completions), n):
        said = [" ".join(words[token] for token in y if token) for y in drawn.completions[i : i + n]]
        print(f"    {prompts[i // n]}" + "   |   ".join(re.sub(r" (\W)", r"\1", text) for text in said))


def judged_pairs(n_pairs, generator):
    """(3, n_pairs) indices of prompt, chosen and rejected answer: two different answers of the speakers, labelled by the judge (09)."""
    n = torch.arange(n_pairs) % len(prompts)
    first, second = torch.multinomial(speaker[n], 2, generator=generator).T  # without repetition
    first_wins = torch.rand(n_pairs, generator=generator) < (rewards[n, first] - rewards[n, second]).sigmoid()
    return torch.stack([n, torch.where(first_wins, first, second), torch.where(first_wins, second, first)])


def rude_gpt(generator):
    """A small GPT after 300 steps of SFT (tutorial 04) on answers of the rude speakers, drawn with `generator`. Frozen."""
    torch.manual_seed(0)
    base = GPT(GPTConfig.tiny(len(words), max_len=32)).float()
    optimizer = torch.optim.Adam(base.parameters(), lr=5e-3)
    for k in range(300):
        n = torch.randint(4, (32,), generator=generator)
        c = torch.multinomial(speaker[n], 1, generator=generator)[:, 0]
        loss = -seq_logps(base, rows_of(n, c)).mean()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - k / 300)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base.requires_grad_(False)


def reference_point(policy, base, n, c):
    """KTO's z0 for answers c (B,) to prompts n (B,): the mean log-ratio of row i − 1's answer after row i's prompt, at least 0."""
    n, c = n.tolist(), c.tolist()
    unrelated = [answers_ids[n[i - 1]][c[i - 1]] for i in range(len(n))]
    batch = collate([prompts_ids[x] for x in n], unrelated, pad_id=0)
    with torch.no_grad():
        return (seq_logps(policy, batch) - seq_logps(base, batch)).mean().clamp(min=0)


def train_on_pairs(base, pairs, loss_of, steps=50, lr=3e-4):
    """A copy of base, trained with Adam on 32 pairs a step. pairs: (3, N), see judged_pairs. loss_of: a function PairLogps -> (B,)."""
    policy, ref_logps = copy.deepcopy(base).requires_grad_(True), all_logps(base)
    shuffle = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, betas=(0.9, 0.99))
    for _ in range(steps):
        n, yes, no = pairs[:, torch.randperm(pairs.shape[1], generator=shuffle)[:32]]
        chosen, rejected = rows_of(n, yes), rows_of(n, no)
        logps = seq_logps(policy, chosen, rejected)  # two of (32,)
        z0 = reference_point(policy, base, n.repeat(2), torch.cat([yes, no]))  # only KTO's loss uses it
        sizes = chosen.mask.sum(1), rejected.mask.sum(1)
        loss = loss_of(PairLogps(*logps, ref_logps[n, yes], ref_logps[n, no], *sizes, z0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def changes_of(policy, base, pairs):
    """(change of the mean log π of the chosen answers, of the rejected ones, mean reward of the well-formed answers, their share)."""
    logps = all_logps(policy)
    n, yes, no = pairs
    moved, formed = logps - all_logps(base), logps.exp().sum(1)
    reward = ((logps.exp() * rewards).sum(1) / formed).mean()
    return moved[n, yes].mean().item(), moved[n, no].mean().item(), reward.item(), formed.mean().item()
