"""The requests of tutorials 04 and 04b, letter by letter: 24 prompts, their 36 well-formed answers, the expert, and a small base model.

It is the language of tutorial 00. The well-formed answers to a prompt can be listed, and so the KL to the expert is a sum over them.
"""

import torch

from minialign import data, task
from minialign.batch import collate
from minialign.logps import seq_logps
from minialign.methods import sft
from minialign.model import GPT, GPTConfig

tokenizer = task.builtin_tokenizer()  # one token per letter
EOS = tokenizer.eos_id
prompts = task.builtin_prompts()  # 24 texts
answers = [list(task.builtin_law(prompt, task.EXPERT)) for prompt in prompts]  # 24 lists of 36 texts


def speaker(politeness):
    """(24, 36): the probability of each answer, if the speaker is polite with this probability."""
    return torch.tensor([list(task.builtin_law(prompt, politeness).values()) for prompt in prompts])


polite, rude = speaker(task.EXPERT), speaker(task.RUDE)  # 0.9 and 0.25
E = 0.7 * polite + 0.3 * rude  # (24, 36) the expert: seven of ten demonstrations come from a polite speaker


def encoded(demos):
    """Demonstrations as pairs (ids of the prompt, ids of the answer and EOS)."""
    return list(data.encode_demos(tokenizer, demos))


def batch_of(rows):
    """Such pairs as one Batch: inputs, targets, mask (B, T)."""
    return collate([row[0] for row in rows], [row[1] for row in rows], pad_id=EOS)


def counts_of(demos):
    """(24, 36): how often each answer to each prompt occurs in demos."""
    pairs = [(demo.prompt, demo.completion) for demo in demos]
    return torch.tensor([[pairs.count((x, y)) for y in ys] for x, ys in zip(prompts, answers, strict=True)])


tables = [batch_of(encoded([data.Demo(x, y) for y in ys])) for x, ys in zip(prompts, answers, strict=True)]  # 24 batches of 36 rows


@torch.no_grad()
def all_logps(policy):
    """The log-prob of each of the 36 answers to each prompt: (24, 36)."""
    return torch.stack([seq_logps(policy, table) for table in tables])


def base_model():
    """A GPT of two layers after 300 steps on 2000 texts of rude speakers: the loss of SFT, with every token scored."""
    torch.manual_seed(0)
    base = GPT(GPTConfig.tiny(tokenizer.vocab_size))
    rows = data.encode_texts(tokenizer, task.builtin_texts(), max_len=96)  # pairs ([BOS], ids of the text and EOS)
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 300, pct_start=0.1)  # the rate rises for 30 steps, then falls to 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        picked = torch.randperm(len(rows), generator=generator)[:32].tolist()
        loss, _ = sft.step(base, batch_of([rows[i] for i in picked]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return base
