# %% [markdown]
# # 03 · The log-probability of a completion
#
# **You will build** the two functions under every method of this course: one cuts a row of tokens into inputs, targets
# and mask, the other reads the log-probs of the targets. You also get a test that finds an off-by-one error in any such
# code.
#
# **Time:** 25 minutes of reading, 20 seconds of computer.
#
# **You need:** [01 · A GPT, from text to a loss](01_gpt.ipynb) and [02 · Sampling](02_sampling.ipynb).
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import math
from itertools import product

import torch

from minialign import data, logps, task
from minialign.batch import collate
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from minialign.tokenizer import CharTokenizer
from tutorials.checks import always, equal, this_run
from tutorials.figures import logps as figures

# %% [markdown]
# ## The question
#
# In 02 the model wrote text. Now it writes nothing. We have a [prompt](../GLOSSARY.md#prompt) $x$ **and** a completion
# $y$, and ask: *how likely is the model to write exactly this?*
#
# The answer is one number, the [log-prob](../GLOSSARY.md#log-prob) $\log \pi(y|x)$. Here $\pi$ is the
# [policy](../GLOSSARY.md#policy): the language model that is being trained. Most methods in this course change the
# policy by raising this number for some completions and lowering it for others. A program that computes the number
# wrongly still runs and still trains, but towards something else.
#
# The picture shows the whole computation for the prompt `ab` and the completion `cd⏎`. The sign `⏎` is EOS, the token
# with which the model says that it is done.

# %%
figures.row_cut(list("ab"), list("cd⏎"))

# %% [markdown]
# There are four steps:
#
# 1. **shift**: each position predicts the *next* token, so the row is cut twice, into inputs and targets;
# 2. **gather**: of the $V$ log-probs at a position, take the one of the target;
# 3. **mask**: count only targets that belong to the completion. The [mask](../GLOSSARY.md#mask) says which;
# 4. **sum**.
#
# The formula says the same. The policy writes one token at a time, so the probability of a completion is a product, and
# its logarithm is a sum:
#
# $$\log \pi(y|x) = \sum_t \log \pi(y_t \mid x, y_{<t}), \qquad
#   \log \pi(v \mid \cdot) = \mathrm{logit}_v - \log \sum_{u} e^{\mathrm{logit}_u} .$$
#
# Here $y_t$ is token $t$ of the completion, $y_{<t}$ are the tokens before it, and $v$ and $u$ are tokens of the
# vocabulary. All log-probs are in [nats](../GLOSSARY.md#nats).

# %% [markdown]
# ## 1. One token, by hand
#
# Three tokens have the [logits](../GLOSSARY.md#logits) 1, 2 and 3. The token that was written is number 2, the last
# one. Compare the last two lines of the output:

# %%
logits = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
target = 2
logp = logits[target] - logits.logsumexp(0)  # watch: logp ()
logp.backward()
onehot, p = torch.eye(3)[target], logits.detach().softmax(0)  # watch: p (3,)

print("probabilities ", [round(number, 4) for number in p.tolist()])
print("log-prob      ", round(logp.item(), 4), "= 3 − log(e + e² + e³)")
print("gradient      ", [round(number, 4) for number in logits.grad.tolist()])
print("onehot − p    ", [round(number, 4) for number in (onehot - p).tolist()])
equal(logits.grad, onehot - p, msg="The gradient of a log-prob is onehot − p.")

# %% [markdown]
# The gradient of the log-prob in the logits is $\mathrm{onehot} - p$. The reason is in the formula above. The first
# term, the logit of the target, has the derivative 1 for the target and 0 for the others: *onehot*. The second term,
# $\log \sum_u e^{\mathrm{logit}_u}$, has the derivative $p$.
#
# So a step along this gradient raises the logit of the token that was written and lowers all others, the likeliest of
# them most. Nearly every loss on a policy in this course reaches the model through this expression.
#
# **Many tokens at once: `gather`.** It takes one entry from each row of a table. The index needs as many dimensions as
# the table, so `[:, None]` makes the list of targets a column.

# %%
table = torch.tensor([[0.25, 0.75], [0.875, 0.125]])  # two positions, two tokens
written = torch.tensor([1, 0])  # the first position was followed by token 1, the second by token 0
picked = table.gather(1, written[:, None]).squeeze(1)  # watch: picked (2,)
print("gather ", picked.tolist(), "   by hand", [table[0, 1].item(), table[1, 0].item()])

# %% [markdown]
# ## 2. Build it yourself: cut the row
#
# Write the function that cuts one row into inputs, targets and mask. A prompt of $n$ tokens gives $n - 1$ positions
# whose target is still in the prompt. From the next position on, the targets are completion tokens.


# %%
def my_cut(prompt, completion):
    """Cut one row into what the model sees, what it has to predict, and which predictions count.

    prompt, completion: lists of token ids. The completion includes its EOS.
    Returns three lists, each of length T = len(prompt) + len(completion) − 1:
        inputs   the row (prompt, then completion) without its last token
        targets  the row without its first token: targets[t] is the token that follows inputs[t]
        mask     bools: True where the target is a token of the completion
    """
    row = prompt + completion
    inputs, targets = row[:-1], row[1:]  # watch: targets (T,)
    mask = [t >= len(prompt) - 1 for t in range(len(targets))]  # watch: mask (T,)
    return inputs, targets, mask


# %% [markdown]
# ### Checkpoint
#
# The project does this once, in `collate` (`minialign/batch.py`), for a batch of rows that it pads to the same length.
# After `collate`, position $t$ means the same prediction in `inputs`, `targets` and `mask`, and nobody shifts again.
# Stop in `my_cut` at the first call: `targets` is the row `b c d ⏎` as ids, `mask` is `[False, True, True, True]`.

# %%
letters = CharTokenizer("abcd")  # one token per letter; id 0 is EOS and also the padding
EOS = letters.eos_id


def shown(tokenizer, ids):
    """Token ids as text, with ⏎ for EOS and ␣ for a space."""
    return "".join(tokenizer.decode([i]).replace(" ", "␣") or "⏎" for i in ids)


prompts = [letters.encode("ab"), letters.encode("d")]
completions = [[*letters.encode("cd"), EOS], [*letters.encode("a"), EOS]]
picture = collate(prompts, completions, pad_id=letters.pad_id)  # watch: picture.mask (2, 4)

for b in range(2):
    inputs, targets, mask = my_cut(prompts[b], completions[b])
    whole = picture.inputs[b], picture.targets[b], picture.mask[b]
    theirs = [part[: len(inputs)].tolist() for part in whole]  # without the padding
    always([inputs, targets, mask] == theirs,
           "my_cut gives the inputs, targets and mask of collate.")
    print("inputs ", *shown(letters, picture.inputs[b].tolist()))
    print("targets", *shown(letters, picture.targets[b].tolist()))
    print("mask   ", *picture.mask[b].int().tolist(), "\n")

# %% [markdown]
# In the second row three targets are `⏎`. The first of them is the EOS that ends the answer, and it is scored: to stop
# is a choice of the policy too. The others are padding. Their ids are equal, so only the *lengths* of the rows can tell
# them apart.
#
# ## 3. Build it yourself: the log-probs of the targets
#
# One more detail. At a masked position the log-prob may be $-\infty$: some programs forbid certain tokens, and a prompt
# may contain one of them. Multiplying by the mask gives $-\infty \cdot 0$, which is NaN, and with one NaN the whole sum
# is NaN. So select with `torch.where`.


# %%
def my_token_logps(policy, batch):
    """The log-prob of each scored target.

    policy: a function from token ids (B, T) to logits (B, T, V).
    batch:  has inputs (B, T) and targets (B, T), token ids, and mask (B, T), bool.
    Returns (B, T): log π of targets[b, t] where mask[b, t] is True, and 0 elsewhere, even if the
    log-prob there is −∞.
    """
    all_logps = policy(batch.inputs).log_softmax(-1)  # watch: all_logps (B, T, V)
    picked = all_logps.gather(-1, batch.targets[..., None]).squeeze(-1)  # watch: picked (B, T)
    return torch.where(batch.mask, picked, 0)


def seq_logps(policy, batch):
    """log π(y|x) of each row: (B,)."""
    return my_token_logps(policy, batch).sum(1)


# %% [markdown]
# ### Checkpoint
#
# We need a policy whose probabilities differ, so we give a small GPT larger random weights than usual. It uses float64,
# so "equal" can mean twelve digits. Its vocabulary is `a`, `b` and EOS. The last completion below has no EOS: it was
# cut off before it could stop. Stop in `my_token_logps` at the first call: `all_logps` is 3 × 4 × 3. The last two lines
# of the output compare a multiplication by the mask with your `torch.where`.

# %%
tiny = CharTokenizer("ab")
torch.manual_seed(4)
policy = GPT(GPTConfig.tiny(tiny.vocab_size, n_layer=1, n_embd=32, tied=False)).double()
for parameter in policy.parameters():
    if parameter.dim() == 2:
        torch.nn.init.normal_(parameter, std=0.3)

batch = collate(
    [tiny.encode("a"), tiny.encode("ab"), tiny.encode("bba")],
    [[*tiny.encode("bab"), EOS], [EOS], tiny.encode("ab")],
    pad_id=EOS,
)
print(my_token_logps(policy, batch).detach().numpy().round(3))
print("log π(y|x) =", [round(number, 4) for number in seq_logps(policy, batch).tolist()])

pairs = {"my_token_logps": (my_token_logps, logps.token_logps),
         "Your seq_logps": (seq_logps, logps.seq_logps)}
for name, (mine, theirs) in pairs.items():
    values = mine(policy, batch), theirs(policy, batch)
    gradients = [torch.autograd.grad(value.sum(), policy.head_weight)[0] for value in values]
    equal(*values, atol=1e-12, rtol=0, msg=f"{name} equals minialign's.")
    equal(*gradients, atol=1e-12, rtol=0,
          msg=f"{name} equals minialign's, also in its gradient.")


def without_a(inputs):
    """The policy, but the token `a` is forbidden: its logits are −∞."""
    return policy(inputs).index_fill(-1, torch.tensor(tiny.encode("a")), -torch.inf)


# `a` occurs in the prompt only
asked = collate([tiny.encode("ba")], [[*tiny.encode("b"), EOS]], pad_id=EOS)
all_logps = without_a(asked.inputs).log_softmax(-1)
times_mask = all_logps.gather(-1, asked.targets[..., None]).squeeze(-1) * asked.mask
print("\ntimes mask ", times_mask.tolist())
print("torch.where", my_token_logps(without_a, asked).tolist())
always(my_token_logps(without_a, asked).isfinite().all(),
       "my_token_logps is finite, although there is a −∞ at a position that is not scored.")

# %% [markdown]
# ## 4. The test: all completions together
#
# Agreement with another program is good evidence, unless both have the same bug. An identity is better. For a given
# prompt, $\pi$ is a [distribution](../GLOSSARY.md#distribution) over completions, so
#
# $$\sum_y e^{\log \pi(y|x)} = 1 .$$
#
# With two letters, EOS, and at most three tokens, we can list every $y$: those that stopped, and those that were cut
# off after three tokens. The cell prints the probability of each, and the totals for four prompts:

# %%
MAX_NEW = 3
PROMPTS = ["a", "b", "ab", "bba"]
content = tiny.encode("ab")
ended = [[*words, EOS] for length in range(MAX_NEW) for words in product(content, repeat=length)]
cut_off = [list(words) for words in product(content, repeat=MAX_NEW)]
language = ended + cut_off
always(len(language) == 2 ** (MAX_NEW + 1) - 1, "Every completion is listed once.")


def every_completion(prompt):
    """A batch with one row for each completion of the language."""
    return collate([tiny.encode(prompt)] * len(language), language, pad_id=EOS)


@torch.no_grad()
def totals(program):
    """The summed probability of all completions, for each prompt. program: computes log π(y|x)."""
    return [program(policy, every_completion(prompt)).exp().sum().item() for prompt in PROMPTS]


probs = seq_logps(policy, every_completion("ab")).exp().detach()  # watch: probs (15,)
for completion, p in zip(language, probs.tolist(), strict=True):
    print("  ab →", shown(tiny, completion).ljust(MAX_NEW), f"{p:.4f}", "█" * round(60 * p))
print("totals", [f"{number:.12f}" for number in totals(seq_logps)])
always(all(abs(number - 1) < 1e-9 for number in totals(seq_logps)),
       "The probabilities of all completions sum to 1.")

# %% [markdown]
# ## 5. Break it: two errors that raise no exception
#
# - **Prompt scored**: the prompt's own tokens are added to the sum, although the policy did not write them.
# - **Never shifted**: each prediction is compared with the token that was just *read*, not with the next one.
#
# In the table, a right program has 1 in every column. Which prompts give each error away?


# %%
def summed(policy, inputs, targets, mask):
    """The log-probs of the targets, summed where the mask is True: (B,)."""
    picked = policy(inputs).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return torch.where(mask, picked, 0).sum(1)


def prompt_scored(policy, batch):
    up_to_the_end = batch.mask.flip(1).cumsum(1).flip(1) > 0  # True up to the last scored position
    return summed(policy, batch.inputs, batch.targets, up_to_the_end)


def never_shifted(policy, batch):
    return summed(policy, batch.inputs, batch.inputs, batch.mask)


def print_totals(name, program):
    print(name.ljust(14), *(f"{number:9.4f}" for number in totals(program)))


print("prompt".ljust(14), *(prompt.rjust(9) for prompt in PROMPTS))
print_totals("right", seq_logps)
print_totals("prompt scored", prompt_scored)
print_totals("never shifted", never_shifted)
with torch.no_grad():
    rest_of_bba = collate([tiny.encode("b")], [tiny.encode("ba")], pad_id=EOS)
    own = seq_logps(policy, rest_of_bba).exp().item()
print(f"π(ba | b) = {own:.4f}")
always(abs(totals(prompt_scored)[3] - own) < 1e-9,
       "Scoring the prompt multiplies the total by the prompt's own probability.")
this_run(all(abs(number - 1) > 0.01 for number in totals(never_shifted)),
         "Without the shift the sum is not 1.")

# %% [markdown]
# *Prompt scored* multiplies every probability by that of the prompt's own tokens. For `bba` this is $\pi(ba|b)$,
# printed below the table. You do not see the error with the prompts `a` and `b`: a prompt of one token contains no
# prediction. So test with short prompts and with long ones.
#
# *Never shifted* multiplies probabilities of tokens that were read, not written. These products are not the probabilities
# of a distribution, so the total can be anything.
#
# Now you search. Each of the next two programs has one mistake. Read it, look at its totals, and say what it is.
#
# ## What is wrong here? (1)


# %%
def mystery_1(policy, batch):
    picked = policy(batch.inputs).log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    scored = batch.mask & (batch.targets != tiny.pad_id)  # be careful: never score padding
    return torch.where(scored, picked, 0).sum(1)


print("prompt".ljust(14), *(prompt.rjust(9) for prompt in PROMPTS))
print_totals("mystery 1", mystery_1)

# %% [markdown]
# The totals are *above* 1 for every prompt. Which part of $\log\pi(y|x)$ is missing?
#
# ## What is wrong here? (2)


# %%
def mystery_2(policy, batch):
    logits = policy(batch.inputs)[:, :-1]  # the logits at a position predict the next token,
    # so drop the last logit and the first label
    labels, mask = batch.targets[:, 1:], batch.mask[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    return torch.where(mask, picked, 0).sum(1)


print("prompt".ljust(14), *(prompt.rjust(9) for prompt in PROMPTS))
print_totals("mystery 2", mystery_2)

# %% [markdown]
# Two prompts pass. Two give 3.0000, and it is exactly 3. Why 3, and why do the others pass?
#
# ## 6. A second test: ask the sampler
#
# The sum alone misses an error for some prompts. A second test needs no list of completions. The sampler of 02 records
# the log-prob of each token when it draws the token, in `old_logps`. Your program must give the same number. Here the
# prompt is `bba`, for which mystery 2 passed the first test:

# %%
rollout = sample(policy, [tiny.encode("bba")] * 200, max_new=MAX_NEW, eos_id=EOS, seed=0)
sampled_logps = rollout.old_logps.sum(1)  # watch: sampled_logps (200,)
programs = {"right": seq_logps, "prompt scored": prompt_scored, "never shifted": never_shifted,
            "mystery 1": mystery_1, "mystery 2": mystery_2}
for name, program in programs.items():
    with torch.no_grad():
        gap = (program(policy, rollout) - sampled_logps).abs().max().item()
    print(f"{name:14} differs from the sampler's log π(y|x) by up to {gap:.4f}")
    if name == "right":
        always(gap < 1e-9, "The right program agrees with the sampler.")
    else:
        this_run(gap > 1e-3, "With this prompt, each wrong program disagrees with the sampler.")

# %% [markdown]
# ## 7. Read the log-probs of answers: sum and mean
#
# In the language of requests (02), a rude speaker answers `ask for tea: ` with one of six openings, the thing, and one
# of six endings. The opening is rude with probability 0.75, one of three, and the ending likewise. So `give me tea
# now!` has probability $0.75/3 \cdot 0.75/3 = 1/16$.
#
# We train a small GPT on 2000 such requests. The loss is your log-prob per token, with a minus sign. Here it scores the
# whole text, prompt and answer: the model must first learn the language. From 04 on, only answers are scored. The
# learning rate rises for 30 steps and then falls to 0, and long gradients are shortened to length 1. With a constant
# rate, as in 02, the model came less close to the language in 300 steps.

# %%
tokenizer = task.builtin_tokenizer()
# pairs ([BOS], ids of the text and EOS)
rows = data.encode_texts(tokenizer, task.builtin_texts(), max_len=96)
torch.manual_seed(0)
base = GPT(GPTConfig.tiny(tokenizer.vocab_size))
STEPS = 300
optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS, pct_start=0.1)
for k in range(STEPS):
    picked = [rows[i] for i in torch.randperm(len(rows))[:32]]
    text_batch = collate([row[0] for row in picked], [row[1] for row in picked], pad_id=EOS)
    loss = -my_token_logps(base, text_batch).sum() / text_batch.mask.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if k in (0, 99, STEPS - 1):
        print(f"after {k + 1:3} steps: {loss.item():.3f} nats per token")
this_run(loss.item() < 0.3, "The base model has learned the language.")

# %% [markdown]
# Now ask it for five answers. The table has the sum of the log-probs, the log of the true probability, and the mean per
# token. In the figure a dark letter has a low log-prob.

# %%
PROMPT = "ask for tea: "
ANSWERS = ["give me tea now!", "hand over tea, quick!", "may i have tea, please.",
           "give me tea if you can.", "give me ink now!"]
answers = collate([data.encode_prompt(tokenizer, PROMPT)] * len(ANSWERS),
                  [data.encode_completion(tokenizer, answer) for answer in ANSWERS], pad_id=EOS)
with torch.no_grad():
    answer_logps = my_token_logps(base, answers)  # watch: answer_logps (B, T)
sums, lengths = answer_logps.sum(1), answers.mask.sum(1)
truth = task.builtin_law(PROMPT, task.RUDE)  # {completion: its probability}, for a rude speaker

print("    sum    true   tokens    mean")
for b, answer in enumerate(ANSWERS):
    true = math.log(truth[answer]) if answer in truth else -math.inf
    mean = sums[b] / lengths[b]
    print(f"{sums[b]:7.2f} {true:7.2f} {lengths[b]:6}  {mean:9.3f}   {answer}")
    this_run(true == -math.inf or abs(sums[b] - true) < 1.5,
             "The log-prob comes close to that of the language.")
this_run(answer_logps[4].min() < sums[:4].min(), "The i of ink is unlikelier than a whole answer.")

texts = [shown(tokenizer, row) for row in answers.targets.tolist()]
figures.choices(texts, answer_logps, answers.mask,
                "Probability is lost where the speaker has a choice")
means = totals(lambda policy, batch: seq_logps(policy, batch) / batch.mask.sum(1))
print("sum of exp(mean), completions of section 4:", *(f"{number:.2f}" for number in means))

# %% [markdown]
# In the first four rows the dark letters are the choices: which opening, which ending. The letters between them are
# nearly certain. Once `give m` is written, `e` must follow. The last row asks for ink although the prompt says tea. The
# base model has learned to copy the thing from the prompt, so the `i` of `ink` alone has a lower log-prob than any whole
# answer above.
#
# **The mean is another quantity.** The first two answers have the same true probability, 1/16, so both have the true
# log-prob −2.77. Divide it by their 17 and 22 tokens: −0.163 and −0.126. The longer answer has the higher mean,
# although both are equally likely. (The model's own means are closer together.) And the exponentials of the means do
# not sum to 1, so they are not probabilities (last line of the output).
#
# Some methods (SimPO and ORPO, [09c](09c_no_reference.ipynb)) use the mean on purpose, so that the length of an answer
# counts less. In this course, $\log\pi(y|x)$ and `seq_logps` always mean the sum.

# %% [markdown]
# ## What you now know
#
# - $\log\pi(y|x)$ is computed in four steps: shift, gather, mask, sum.
# - Its gradient in the logits is onehot − p at each scored position.
# - The mask comes from lengths. EOS belongs to the completion; the prompt and the padding do not.
# - Two tests find wrong programs: all completions sum to 1, and the sampler's own log-probs agree.
# - The sum is the log of a probability, the mean is not.
# - `all_logps` holds $B \cdot T \cdot V$ numbers, and only one in $V$ is kept. In a real model it is often the largest
#   tensor of a training step. [10](10_kernels.ipynb) avoids it.
#
# Next: [04 · Supervised fine-tuning](04_sft.ipynb), the first method made of this number.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes; try this). Set `MAX_NEW = 5` in section 4 and run from there to section 6. Before you
# look: how many completions are there, and which of the printed totals change?
#
# **Exercise 2** (medium, 10 minutes). Temperature $\tau$ divides the logits. Write `tempered_seq_logps(policy, batch,
# tau)`. Do all completions still sum to 1 at $\tau = 0.5$ and at $\tau = 2$? Then sample at $\tau = 0.7$ and compare
# with `old_logps`: what is the [ratio](../GLOSSARY.md#ratio) $\pi/\pi_\text{old}$ if you forget the temperature?
#
# **Exercise 3** (hard, 15 minutes; solve puzzle 1 first). Prove that the total of mystery 1 is the *expected number of
# tokens* of a completion (EOS counts) plus the probability of being cut off. Check it on all four prompts.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# EOS is not scored. The padding has the id of EOS, so a mask made from ids also removes the EOS that ends the answer. The
# probability of stopping is left out of the product, so the totals are too large. A policy that is trained with this mask
# never learns to stop. Make masks from lengths, as `my_cut` does.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# It shifts twice: `collate` has shifted already. Each completion token is now predicted from one token too few. With a
# prompt of two or more tokens this still *is* a distribution over completions, of a policy that never reads the newest
# token. So the sum is 1. With a prompt of one token, nothing stands before the first completion token, so the token falls
# out of the sum. Each of the three possible first tokens (`a`, `b`, `⏎`) then counts as probability 1, so the total is 3.
# The sampler's test finds the error with every prompt.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for number in totals(mystery_2)[:2]:
    always(abs(number - 3) < 1e-9,
           "With a prompt of one token the first token is free: the total is V.")
for number in totals(mystery_2)[2:]:
    always(abs(number - 1) < 1e-9, "With longer prompts it is a distribution, of another policy.")
print("puzzle 2:", [round(number, 9) for number in totals(mystery_2)])

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# There are $2^6 - 1 = 63$ completions. *Right* and *prompt scored* keep their totals, and so does mystery 2 (still 1
# and exactly 3): they do not depend on where completions are cut off. Mystery 1 and *never shifted* change. Mystery 1
# grows, because completions get longer (exercise 3).
#
# </details>
#
# <details><summary>Exercise 2</summary>
#
# Every temperature gives a distribution, so the sums are 1. If the score forgets the temperature, the ratio is not 1
# before any training: in 200 samples it lies between 0.65 and 2.06.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def tempered_seq_logps(policy, batch, tau):
    return my_token_logps(lambda inputs: policy(inputs) / tau, batch).sum(1)


for tau in (0.5, 2.0):
    for number in totals(lambda policy, batch, tau=tau: tempered_seq_logps(policy, batch, tau)):
        always(abs(number - 1) < 1e-9, "Every temperature gives a distribution.")

cooled = sample(policy, [tiny.encode("ab")] * 200, max_new=MAX_NEW, tau=0.7, eos_id=EOS, seed=1)
with torch.no_grad():
    right = (tempered_seq_logps(policy, cooled, 0.7) - cooled.old_logps.sum(1)).exp()
    wrong = (seq_logps(policy, cooled) - cooled.old_logps.sum(1)).exp()
print(f"ratio with tau    {right.min():.6f} to {right.max():.6f}")
print(f"ratio without tau {wrong.min():.3f} to {wrong.max():.3f}")
always((right - 1).abs().max() < 1e-9, "With the temperature the ratio is 1.")
this_run((wrong - 1).abs().max() > 0.1, "Without it the ratio is not.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Take a completion of $n$ letters and EOS. Without the EOS, what is left of its probability is the probability that the
# policy writes these $n$ letters first. Summed over all choices of the $n$ letters, this is the probability that the
# policy writes at least $n + 1$ tokens. Sum over $n = 0, 1, \dots$: the probabilities of at least 1, 2, … tokens add up
# to the expected number of tokens. Completions that were cut off had no EOS to lose. They add the probability of being
# cut off.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
lengths = torch.tensor([len(completion) for completion in language])
for prompt, number in zip(PROMPTS, totals(mystery_1), strict=True):
    with torch.no_grad():
        each = seq_logps(policy, every_completion(prompt)).exp()
    predicted = ((each * lengths).sum() + each[len(ended) :].sum()).item()
    print(f"{prompt:4} total {number:.6f}   expected length + P(cut off) = {predicted:.6f}")
    always(abs(number - predicted) < 1e-9,
           "The total without EOS is the expected length plus the probability of being cut off.")
