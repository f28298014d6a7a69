"""The requests of tutorials 09 and 09c: four prompts, their 36 well-formed answers, and a small GPT that speaks like the rude speakers.

It is the language of tutorial 00 with four things and with words for tokens, which makes training fast. The well-formed answers are few,
so that their probabilities can be computed at every step.
"""

import re

import torch

from minialign.batch import collate
from minialign.logps import seq_logps
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import RUDE, builtin_law, builtin_prompt, gold_reward

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
