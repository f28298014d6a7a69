# %% [markdown]
# # 04 · Supervised fine-tuning
#
# **You will build** the KL divergence, and the loss and the training step of supervised fine-tuning (SFT). You will
# train a [policy](../GLOSSARY.md#policy) on demonstrations, watch it overfit, and read what it writes.
#
# **Time:** 24 minutes of reading, 45 seconds of computer.
#
# **You need:** [02 · Sampling](02_sampling.ipynb) and [03 · The log-probability of a completion](03_logps.ipynb).
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import copy
import math

import torch
import torch.nn.functional as F

from minialign import data, task
from minialign.logps import seq_logps, token_logps
from minialign.methods import sft
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from tutorials import letter_requests as requests
from tutorials.checks import always, equal, this_run
from tutorials.figures import sft as figures

# %% [markdown]
# ## The question
#
# A base model continues text. We want it to answer in a certain way, and we have
# [demonstrations](../GLOSSARY.md#demonstration): prompts $x$ with answers $y$ that people wrote. Nobody says which
# answers are bad, and there is no score. How can the policy learn from them?
#
# [SFT](../GLOSSARY.md#sft) is the simplest method: it raises the probability of the demonstrated answers. Most
# assistants are trained this way first, and most other methods of this course start from a model after SFT.

# %%
figures.loop()

# %% [markdown]
# ## 1. What does SFT minimise?
#
# Let $E$, the [expert](../GLOSSARY.md#expert), be the [distribution](../GLOSSARY.md#distribution) that the
# demonstrations are drawn from: $E(y|x)$ is the probability that the people answer $x$ with $y$. To say how far the
# policy is from $E$ we need a measure of distance. We use the [KL divergence](../GLOSSARY.md#kl) of two distributions:
#
# $$\mathrm{KL}(p \,\|\, q) = \sum_y p(y) \, \big( \log p(y) - \log q(y) \big) .$$
#
# It is the average of $\log p(y) - \log q(y)$ over answers $y$ that are drawn from $p$. It is 0 if $p = q$, and
# positive otherwise.


# %%
def my_kl(p, q_logs):
    """KL(p‖q) of several pairs of distributions.

    p: (N, K) probabilities; each row sums to 1. A term with p = 0 counts 0.
    q_logs: (N, K) log-probs under q; −∞ where q is 0.
    Returns (N,).
    """
    terms = p * (p.log() - q_logs)  # watch: terms (N, K)
    return torch.where(p > 0, terms, 0).sum(1)


# %% [markdown]
# ### Checkpoint
#
# Take three answers, $E = (\frac12, \frac12, 0)$ and $\pi = (\frac14, \frac14, \frac12)$. By hand,
# $\mathrm{KL}(E\|\pi) = \frac12 \log 2 + \frac12 \log 2 = \log 2$. Look at the other direction.

# %%
E3, pi3 = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
print(f"KL(E‖π) = {my_kl(E3, pi3.log()).item():.4f}   KL(π‖E) = {my_kl(pi3, E3.log()).item()}")
equal(my_kl(E3, pi3.log()), torch.tensor([math.log(2)]), msg="my_kl gives log 2 by hand.")
generator = torch.Generator().manual_seed(0)
p = torch.rand(5, 7, generator=generator).softmax(1)
q_logs = torch.rand(5, 7, generator=generator).log_softmax(1)
equal(my_kl(p, q_logs), F.kl_div(q_logs, p, reduction="none").sum(1), msg="my_kl is torch's KL.")

# %% [markdown]
# $\mathrm{KL}(\pi\|E)$ is infinite, because $\pi$ writes an answer that $E$ never writes. So the two directions differ.
# Which one can we lower? $\mathrm{KL}(E\|\pi)$ is an average over $E$, and demonstrations are samples of $E$. The other
# one needs the value of $E$ for texts that the policy writes, and nobody knows that value. So take the first, and
# split the logarithm:
#
# $$\mathrm{KL}(E \,\|\, \pi) = -H(E) \; - \; \sum_y E(y|x) \log \pi(y|x), \qquad H(E) = -\sum_y E \log E .$$
#
# The entropy $H(E)$ does not depend on $\pi$. The rest is minus the average log-prob of demonstrations. So **raising
# the average log-prob of demonstrations lowers $\mathrm{KL}(E\|\pi)$**, nat for nat. With unlimited demonstrations, and
# a policy that can represent $E$, the minimum is $\pi = E$.
#
# ## 2. Three answers, by hand
#
# The smallest example has one prompt, three answers of one token, and a policy of three logits. For one shown answer
# the gradient of $-\log\pi$ in the logits is $\pi - \mathrm{onehot}$ (03). Averaged over the shown answers, the onehots
# become $E$. So the gradient of the loss is $\pi - E$. We start from equal logits and follow it. Compare the last row
# of each table with what was shown.

# %%
def descend(target, steps, lr=0.1):
    """Gradient descent on KL(target‖π) from equal logits: the policies after each step."""
    logits, path = torch.zeros(3, dtype=torch.float64), []
    for _ in range(steps + 1):
        pi = logits.softmax(0)  # watch: pi (3,)
        path.append(pi)
        logits = logits - lr * (pi - target)  # the gradient, written out
    return path


for name, target in (("always the third", [0.0, 0.0, 1.0]), ("a mixture", [0.1, 0.2, 0.7])):
    target = torch.tensor(target, dtype=torch.float64)
    path = descend(target, steps=1000)
    print(f"shown: {name}")
    for k in (0, 10, 100, 1000):
        print(f"  step {k:4}   π =", [round(p, 3) for p in path[k].tolist()])
equal(path[-1], target, msg="SFT ends at the shown mixture.", atol=1e-3, rtol=0)

# %% [markdown]
# A mixture is copied as a mixture. A single answer, shown again and again, goes to probability 1. The other two go to
# 0, although nobody called them bad: probabilities sum to one. Section 5 shows the same in a language model.
#
# ## 3. Build it yourself: the loss and a training step
#
# Now for texts. A row is a prompt with one demonstrated answer, and the answer's tokens and its EOS are scored. The
# loss is the negative log-prob of the scored tokens, divided by their number:
#
# $$\mathrm{loss} = -\frac{1}{\text{scored tokens}} \sum_{\text{rows}} \sum_t \log \pi(y_t \mid x, y_{<t}) .$$
#
# The function can also divide by another number, `n_tokens`. The first puzzle shows what that is for.


# %%
def my_sft_loss(logps, mask, n_tokens=None):
    """The mean negative log-prob of the scored tokens.

    logps: (B, T) log-probs of the targets; may hold anything, also −∞, where mask is False.
    mask:  (B, T) bool, True where a token is scored.
    n_tokens: the number to divide by; None means the number of scored tokens in this batch.
    Returns a scalar tensor, in nats per token.
    """
    scored = torch.where(mask, logps, 0).sum()  # watch: scored ()
    return -scored / (mask.sum() if n_tokens is None else n_tokens)


def my_sft_step(policy, optimizer, batch):
    """One step of SFT: set the gradients to zero, compute the loss of the batch, call backward,
    clip the norm of all gradients to 1 (torch.nn.utils.clip_grad_norm_), let the optimizer step.

    batch: has inputs, targets, mask (B, T); token_logps(policy, batch) gives the log-probs (B, T).
    Returns the loss as a float.
    """
    optimizer.zero_grad()
    loss = my_sft_loss(token_logps(policy, batch), batch.mask)  # watch: loss ()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return loss.item()


# %% [markdown]
# ### Checkpoint
#
# Your loss is compared with the project's `sft_loss`, and two of your steps with two steps of the project. The printed
# loss is near $\log 29$: a new model gives all 29 tokens about the same probability.

# %%
mask = torch.rand(4, 6, generator=generator) < 0.6
logps = (-torch.rand(4, 6, generator=generator)).masked_fill(~mask, -torch.inf).requires_grad_()
for n_tokens in (None, 100):
    mine = my_sft_loss(logps, mask, n_tokens)
    theirs, _ = sft.sft_loss(logps, mask, n_tokens=n_tokens)
    gradients = [torch.autograd.grad(value, logps)[0] for value in (mine, theirs)]
    equal(mine, theirs, msg="my_sft_loss equals minialign's sft_loss.")
    equal(*gradients, msg="The gradient of my_sft_loss equals minialign's.")

tokenizer, EOS, V = requests.tokenizer, requests.EOS, requests.tokenizer.vocab_size
torch.manual_seed(0)
mine = GPT(GPTConfig.tiny(V))
theirs = copy.deepcopy(mine)
my_optimizer, optimizer = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (mine, theirs)]
rows = requests.encoded(task.builtin_demos(16))  # pairs (ids of the prompt, ids of the answer)
for batch in (requests.batch_of(rows[:8]), requests.batch_of(rows[8:])):
    loss = my_sft_step(mine, my_optimizer, batch)
    optimizer.zero_grad()
    their_loss, _ = sft.step(theirs, batch)
    their_loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    always(abs(loss - their_loss.item()) < 1e-5, "my_sft_step returns the batch's loss.")
print(f"loss of the second step {loss:.3f}, log {V} = {math.log(V):.3f}")
for my_weights, their_weights in zip(mine.parameters(), theirs.parameters(), strict=True):
    equal(my_weights, their_weights, msg="my_sft_step changes the weights like minialign's step.")

# %% [markdown]
# ## What is wrong here? (1)
#
# A batch does not fit into memory. So a program splits it into pieces of one row, computes the loss of each piece, and
# averages these losses. It should get the loss of the whole batch.

# %%
three_logps = -torch.tensor([[1.0, 1, 0, 0], [2, 2, 2, 2], [1, 0, 0, 0]])  # three rows
three_mask = three_logps < 0  # of 2, 4 and 1 scored tokens
pieces = [my_sft_loss(three_logps[i : i + 1], three_mask[i : i + 1]) for i in range(3)]
print("whole batch ", round(my_sft_loss(three_logps, three_mask).item(), 3))
print("three pieces", round(sum(pieces).item() / 3, 3))

# %% [markdown]
# Why do the two numbers differ, and what should each piece be divided by?
#
# ## 4. Demonstrations from a known E
#
# For real data nobody knows $E$. So we use the language of requests, in which all probabilities are known (it is in
# `tutorials/letter_requests.py`). Each of 24 prompts has 36 answers: 6 openings times 6 endings, half of each polite.
# A speaker chooses opening and ending separately. Speakers differ only in how often they are polite.
#
# - The **base model** is a GPT of two layers. It was trained on 2000 texts of rude speakers, who are polite with
#   probability 0.25.
# - The **demonstrations** come from two people: 70 % from a polite speaker (polite with probability 0.9), 30 % from a
#   rude one. Real data is mixed as well. This mixture is our $E$.
#
# $\mathrm{KL}(E\|\pi)$ is then a sum over 36 answers. We average it over the 24 prompts. At the start the base model
# should be near the rude speakers and far from $E$.

# %%
E = requests.E  # watch: E (24, 36)
base = requests.base_model()
base_logps = requests.all_logps(base)  # watch: base_logps (24, 36)
print("some of the 36 answers to", requests.prompts[0])
for i in (0, 3, 18, 35):
    print(f"   E {E[0, i]:.4f}   base {base_logps[0, i].exp():.4f}   {requests.answers[0][i]}")
print(f"KL(rude‖base) {my_kl(requests.rude, base_logps).mean():.3f}")
print(f"KL(E‖base)    {my_kl(E, base_logps).mean():.3f}")
this_run(my_kl(requests.rude, base_logps).mean() < 0.5, "The base model speaks like the rude ones.")

# %% [markdown]
# The training loop draws 32 rows at random and calls your step. It keeps copies of the policy, so that we can measure
# them afterwards.


# %%
def train(policy, rows, steps, lr, keep_every):
    """SFT on random batches of 32 rows. Returns {step: a copy of the policy after it}."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    kept = {0: copy.deepcopy(policy)}
    for k in range(1, steps + 1):
        picked = torch.randperm(len(rows), generator=generator)[:32].tolist()  # watch: picked (32,)
        my_sft_step(policy, optimizer, requests.batch_of([rows[i] for i in picked]))
        if k % keep_every == 0:
            kept[k] = copy.deepcopy(policy)
    return kept


# %% [markdown]
# ## 5. What happens with too many steps?
#
# We train on 200 demonstrations, longer than is good. The learning rate is 3e-4, because the weights of the base model
# are already good and large steps would damage them. For each kept policy we print
#
# - `train`: the loss on the 200 demonstrations, in nats per answer;
# - `expected`: the expected loss on new demonstrations, $-\sum_y E(y) \log \pi(y) = H(E) + \mathrm{KL}(E\|\pi)$;
# - `shown` and `unshown`: how much probability is on requests that were shown for their prompt, and on the rest of the
#   36.
#
# Look for the row in which the KL is lowest.

# %%
LR, STEPS = 3e-4, 120
demos = task.builtin_demos(200)
rows = requests.encoded(demos)
counts = requests.counts_of(demos)  # how often each answer was shown
shown = counts > 0  # watch: shown (24, 36)
ENTROPY = -(E * E.log()).sum(1).mean().item()
print(f"H(E) = {ENTROPY:.3f}   loss of E on the 200: {-(counts * E.log()).sum() / len(demos):.3f}")


@torch.no_grad()
def loss_on(rows, policy):
    """The mean negative log-prob of the rows' answers, in nats per answer."""
    return -seq_logps(policy, requests.batch_of(rows)).mean().item()


def kl_to_E(policy):
    return my_kl(E, requests.all_logps(policy)).mean().item()


kept, history = train(copy.deepcopy(base), rows, STEPS, LR, keep_every=20), []
print("step      train   expected    KL(E‖π)      shown    unshown")
for k, policy in kept.items():
    logps = requests.all_logps(policy)  # watch: logps (24, 36)
    expected, kl = -(E * logps).sum(1).mean().item(), my_kl(E, logps).mean().item()
    mass = [(logps.exp() * some).sum(1).mean().item() for some in (shown, ~shown)]
    history.append((loss_on(rows, policy), expected, kl, *mass))
    print(f"{k:4}", *(f"{number:10.3f}" for number in history[-1]))
    always(abs(expected - ENTROPY - kl) < 1e-3, "The expected loss is H(E) + KL(E‖π).")
trains, expecteds, kls, on_shown, on_unshown = zip(*history, strict=True)
best = min(kept, key=lambda k: kls[k // 20])  # the step with the lowest KL
this_run(min(kls) < 0.5 * kls[0] and kls[-1] > 1.5 * min(kls), "Near E, then overfitting.")
this_run(trains[-1] < ENTROPY, "In the end the training loss is below the entropy.")
figures.losses(list(kept), trains, expecteds, ENTROPY, best // 20)
figures.mass(list(kept), on_shown, on_unshown, (E * shown).sum(1).mean().item())

# %% [markdown]
# First figure: the training loss falls all the time, and SFT computes nothing else. The loss on new demonstrations is
# lowest at step 20, hardly higher at step 40, and then rises. On these 200 demonstrations $E$ itself has the loss
# 3.361. From step 40 on the policy is below that: it gives the shown answers more probability than $E$ does. It learns
# them by heart.
#
# Second figure: this probability comes from requests that were not shown, although many of them are as polite as the
# shown ones. It is section 2 again: what is not shown goes down.
#
# ## Break it: score the prompt
#
# Suppose the mask is forgotten, so that the prompt's letters are scored too. We compare the loss of one policy with and
# without the mask. Then we train on the unmasked rows for 40 steps.

# %%
unmasked = [(prompt[:1], prompt[1:] + answer) for prompt, answer in rows]  # all but BOS is scored
for name, some in (("masked", rows), ("prompt scored", unmasked)):
    batch = requests.batch_of(some)
    with torch.no_grad():
        loss = my_sft_loss(token_logps(kept[best], batch), batch.mask)
    print(f"{name:13} {batch.mask.sum()} tokens, loss of the best policy {loss:.3f} nats per token")
forgotten = train(copy.deepcopy(base), unmasked, 40, LR, keep_every=40)[40]
print(f"KL(E‖π) after 40 steps: masked {kls[2]:.3f}, prompt scored {kl_to_E(forgotten):.3f}")

# %% [markdown]
# The same policy has a larger loss per token, mostly because nobody can predict which of 24 things a prompt names. So
# losses with different masks cannot be compared. The trained policy is not worse in this run, so its answers do not show
# the mistake. Only a look at the mask does.
#
# ## 6. What can SFT not do?
#
# We read answers of three policies: base, best and last. The shares are over 8 answers to each of the 24 prompts.


# %%
def write(policy, n):
    """n answers to each of the 24 prompts: 24·n texts, and whether each of them stopped."""
    asked = [data.encode_prompt(tokenizer, prompt) for prompt in requests.prompts]
    drawn = sample(policy, asked, n=n, max_new=60, eos_id=EOS, seed=0)
    return [tokenizer.decode(ids) for ids in drawn.completions], drawn.finished


politely = []
for name, policy in (("base", base), (f"best, step {best}", kept[best]), ("last", kept[STEPS])):
    texts, _ = write(policy, 8)
    correct = sum(text in requests.answers[i // 8] for i, text in enumerate(texts)) / len(texts)
    politely.append(sum(text.startswith(task.POLITE_OPENINGS) for text in texts) / len(texts))
    print(f"\n{name}: {100 * correct:.0f} % ask for the thing,",
          f"{100 * politely[-1]:.0f} % open politely")
    for i in (0, 8, 16, 24):
        print(f"   {requests.prompts[i // 8]}{texts[i]}")
print("\nopen politely: E 70 %, the polite speaker 90 %")
this_run(politely[1] > politely[0] + 0.2, "SFT makes the policy politer.")

# %% [markdown]
# The base model opens rudely about three times in four. With training the polite openings become more frequent, but
# only up to about the 70 % of $E$. The last policy has 67 %, far from the 90 % of the polite speaker. **SFT copies
# everybody who wrote demonstrations, the rude people included.** It has no way to tell which demonstrations are better.
#
# Compare the last policy with the best one. Its KL is almost three times as large, yet a few samples hardly show it. So
# do not judge overfitting by reading samples. Measure the loss on demonstrations that were held out (exercise 2).
#
# ## What is wrong here? (2)
#
# A new program prepares the demonstrations and fine-tunes the base model. The answers look right, and they stop. Below
# them are two rows of the training data: the targets, and under each one whether it is scored.

# %%
careless = [(data.encode_prompt(tokenizer, one.prompt), tokenizer.encode(one.completion))
            for one in demos]
texts, stopped = write(train(copy.deepcopy(base), careless, 40, LR, keep_every=40)[40], 4)
print(f"{100 * stopped.float().mean():.0f} % stop, for example: {texts[0]}\n")
some = requests.batch_of(careless[:2])
for targets, mask in zip(some.targets.tolist(), some.mask.int().tolist(), strict=True):
    print("".join(tokenizer.decode([i]) or "⏎" for i in targets))
    print("".join(str(scored) for scored in mask))

# %% [markdown]
# What is missing in the masks, and with which base model would the answers show it?
#
# ## What you now know
#
# - SFT maximises the average log-prob of demonstrations. This minimises $\mathrm{KL}(E\|\pi)$. With unlimited
#   demonstrations, and a policy that can represent $E$, it ends at $\pi = E$.
# - With finitely many demonstrations it passes near $E$ and then learns them by heart. The training loss does not show
#   it.
# - It copies all who wrote demonstrations. It cannot tell good ones from bad ones, and it takes probability from good
#   answers that nobody happened to show. For both you need a [reward](../GLOSSARY.md#reward).
# - Look at the mask: EOS is scored, the prompt is not. Divide by the scored tokens of the whole step.
#
# Next: [05 · Inverse RL](05_inverse_rl.ipynb), which learns a reward from demonstrations. A short side road, [04b ·
# Intuitive fine-tuning](04b_ift.ipynb), changes SFT's loss.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes; try this). Repeat section 5 with 50 and with 1000 demonstrations. What do you expect
# for the lowest KL, and for the step at which it comes?
#
# **Exercise 2** (medium, 10 minutes). We chose the best step by a KL that nobody knows for real data. Choose it
# honestly: use the loss on 200 *other* demonstrations, `task.builtin_demos(200, seed=1)`. How much KL does that cost?
#
# **Exercise 3** (hard, 15 minutes). Some programs take the mean over the tokens of each row, then the mean over rows. A
# prompt has two answers, shown equally often, of 2 and of 6 tokens. The first token decides which; the other tokens are
# certain. Where does the probability $p$ of the short answer end? Where does it end with our loss (tokens of the whole
# step), if each step holds both answers, and if it holds $n$ random rows?
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# Each piece is divided by its *own* number of tokens, and then the pieces count equally. So a token in a short row
# counts more than a token in a long one. Divide each piece by the scored tokens of the *whole* step, and add the
# pieces. That is what `n_tokens` is for.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
n_tokens = three_mask.sum()
pieces = [my_sft_loss(three_logps[i : i + 1], three_mask[i : i + 1], n_tokens)
          for i in range(3)]
equal(sum(pieces), my_sft_loss(three_logps, three_mask), msg="Pieces add up to the whole batch.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# EOS is missing. `tokenizer.encode` does not append it (`data.encode_completion` does), so no row has a scored `⏎`. In
# training nothing changes the prediction after the last letter. The base model knows how to stop and keeps that habit.
# A base model that does not know your EOS would not stop: the cell trains such a model from random weights. So look at
# the mask: each row that was not cut off must score one EOS.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(0)
endless = train(GPT(GPTConfig.tiny(V)), careless, 60, 5e-3, keep_every=60)[60]
texts, stopped = write(endless, 4)
print(f"{100 * stopped.float().mean():.0f} % stop, for example: {texts[0]}")
this_run(stopped.float().mean() < 0.3, "Without EOS in its data it does not stop.")
whole = requests.batch_of(rows)
always((whole.mask & (whole.targets == EOS)).sum(1).eq(1).all(), "Our own rows score one EOS each.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# With more demonstrations the policy comes nearer to $E$, and it overfits later. Of 50 demonstrations a step uses 32,
# so the policy reads each of them in about two of three steps and soon knows them by heart.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
curves = {200: (list(kept), kls)}
for n, steps, every in ((50, 30, 10), (1000, 80, 40)):
    students = train(copy.deepcopy(base), requests.encoded(task.builtin_demos(n)), steps, LR, every)
    curves[n] = list(students), [kl_to_E(student) for student in students.values()]
curves = dict(sorted(curves.items()))
for n, (steps, kl) in curves.items():
    print(f"{n:5} demonstrations: lowest KL(E‖π) {min(kl):.3f} at step {steps[kl.index(min(kl))]}")
lowest = [min(kl) for _, kl in curves.values()]
this_run(lowest == sorted(lowest, reverse=True), "More demonstrations bring π nearer to E.")
figures.how_many(curves)

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The held-out loss estimates $H(E) + \mathrm{KL}(E\|\pi)$. All steps are judged by the same 200 demonstrations, so most
# of the sampling noise is common to all steps and does not change their order. Here the choice costs nothing: the
# held-out loss is lowest at step 20, as the KL is.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
held_out = requests.encoded(task.builtin_demos(200, seed=1))
losses = {k: loss_on(held_out, policy) for k, policy in kept.items()}
chosen = min(losses, key=losses.get)
print(f"held-out loss is lowest at step {chosen}: {losses[chosen]:.3f}")
print(f"KL(E‖π) there {kls[chosen // 20]:.3f}, the lowest was {min(kls):.3f}")
this_run(kls[chosen // 20] < min(kls) + 0.2, "The honest choice costs little.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Mean of row means: the loss is $-\frac12 \cdot \frac12 \log p - \frac12 \cdot \frac16 \log(1 - p)$. Its derivative is
# 0 where $p : (1 - p) = \frac12 : \frac16 = 3 : 1$. So $p$ ends at 0.75, a preference for short answers that no
# demonstration contains. With our loss and both answers in each step, $-\frac18(\log p + \log(1 - p))$ ends at ½.
#
# With $n$ random rows, $k$ of them short, a step has $2k + 6(n - k)$ scored tokens. So a token counts more in a step
# with many short rows. The average loss is $-a \log p - b \log(1 - p)$, where $a$ is the mean of $k/(2k + 6(n - k))$
# and $b$ the mean of $(n - k)/(2k + 6(n - k))$. It ends at $p = a/(a + b)$. The cell prints it: the effect is large
# with one row in a step and small with 32.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for n in (1, 2, 32):
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    a = sum(chance * k / (2 * k + 6 * (n - k)) for k, chance in enumerate(chances))
    b = sum(chance * (n - k) / (2 * k + 6 * (n - k)) for k, chance in enumerate(chances))
    print(f"steps of {n:2} random rows: the short answer ends at {a / (a + b):.3f}")
always(abs(a / (a + b) - 0.5) < 0.01, "With 32 rows in a step the preference is small.")
