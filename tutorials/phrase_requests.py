"""The requests of tutorial 07: a phrase is one token, a small GPT speaks like the rude speakers, and a program gives marks for manners.

It is the language of tutorial 00. Four tokens make a whole answer (opening, thing, ending, end), which makes sampling fast.
"""

import torch

from minialign.batch import collate
from minialign.logps import token_logps
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.task import POLITE_ENDINGS, POLITE_OPENINGS, RUDE_ENDINGS, RUDE_OPENINGS, THINGS, builtin_prompt, gold_reward

PHRASES = [*THINGS, *POLITE_OPENINGS, *RUDE_OPENINGS, *POLITE_ENDINGS, *RUDE_ENDINGS]
OPENING = len(THINGS)  # 24, the id of the first opening: 3 polite ones, then 3 rude ones
ENDING = OPENING + 6  # 30, the id of the first ending: 3 polite ones, then 3 rude ones
EOS = len(PHRASES)  # 36, the end token
MAX_NEW = 4  # opening, thing, ending, end


def text(ids):
    spaced = [PHRASES[i] if i >= ENDING else " " + PHRASES[i] for i in ids if i != EOS]
    return "".join(spaced).strip()


def rude_requests(n, generator):
    """Prompts and completions (two lists of ids) of speakers who choose each phrase politely with probability 1/4."""
    things = torch.randint(len(THINGS), (n,), generator=generator)
    kinds = 3 * (torch.rand(2, n, generator=generator) < 0.75)  # 0 is polite, 3 is rude
    opening, ending = kinds + torch.randint(3, (2, n), generator=generator)
    said = torch.stack([OPENING + opening, things, ENDING + ending, torch.full((n,), EOS)], dim=1)
    return things[:, None].tolist(), said.tolist()


def rude_gpt():
    """A small GPT after 200 steps of SFT (tutorial 04) on the rude speakers."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    base = GPT(GPTConfig(EOS + 1, n_layer=1, n_head=2, n_kv_head=2, n_embd=64, max_len=8))
    optimizer = torch.optim.Adam(base.parameters(), lr=1e-2)
    for k in range(200):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 200)
        batch = collate(*rude_requests(64, generator), pad_id=EOS)
        loss = -token_logps(base, batch).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base


def manners(prompts, completions):
    """Lists of ids -> marks (B,) from 0 to 5: the gold reward of the toy language plus 2."""
    asked = [builtin_prompt(PHRASES[x[0]]) for x in prompts]
    return torch.tensor(gold_reward(asked, [text(y) for y in completions])) + 2


def bonus(prompts):
    """Lists of ids -> (B,): 2 for a thing with "a", such as "a map", else 0. It depends on the prompt only."""
    return torch.tensor([2.0 * PHRASES[x[0]].startswith("a ") for x in prompts])


def show_answers(policy, shown=6, each=16):
    """Print an answer to each of a few prompts with its marks, and the share of whole requests among `each` answers to all 24."""
    prompts = [[i] for i in range(len(THINGS)) for _ in range(each)]
    answers = sample(policy, prompts[::each], max_new=MAX_NEW, n=each, eos_id=EOS, seed=0).completions
    marks = manners(prompts, answers)
    for i in range(0, shown * each, each):
        print(f"   {PHRASES[prompts[i][0]]:6} -> {text(answers[i]):52} marks {marks[i]:.0f}")
    whole = [
        len(y) == 4 and OPENING <= y[0] < ENDING <= y[2] < EOS and [y[1]] == x for x, y in zip(prompts, answers, strict=True)
    ]
    print(f"   whole requests: {sum(whole) / len(whole):.0%}")
