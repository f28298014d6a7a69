# %% [markdown]
# # 04 · Supervised fine-tuning
#
# **You will build** the loss and the training step of supervised fine-tuning (SFT). You will train a
# [policy](../GLOSSARY.md#policy) on demonstrations, read what it writes before and after, and measure overfitting
# against the exact truth.
#
# **Time:** 30 minutes of reading, 45 seconds of computer.
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
from minialign.batch import collate
from minialign.logps import seq_logps, token_logps
from minialign.methods import sft
from minialign.model import GPT, GPTConfig
from minialign.sample import sample
from toy.closed_form import sft_flow
from tutorials.checks import always, equal, this_run
from tutorials.figures import sft as figures

# %% [markdown]
# ## The question
#
# A base model continues text. We want it to answer in a certain way, and we have
# [demonstrations](../GLOSSARY.md#demonstration): prompts $x$ with answers $y$ that people wrote. Nobody says which
# answers are bad, and there is no score. What should the policy do with them?
#
# [SFT](../GLOSSARY.md#sft) gives the plainest answer: become the policy under which the demonstrations are likeliest.
# Nearly every assistant is trained this way first, and most other methods of this course begin where SFT ends.

# %%
figures.loop()

# %% [markdown]
# ## 1. What SFT minimises
#
# Let $E$ be the [distribution](../GLOSSARY.md#distribution) that the demonstrations are drawn from: $E(y|x)$ is the
# probability that the people answer $x$ with $y$. To say how far the policy is from $E$ we use the [KL
# divergence](../GLOSSARY.md#kl):
#
# $$\mathrm{KL}(p \,\|\, q) = \sum_y p(y) \, \big( \log p(y) - \log q(y) \big) .$$
#
# It is the average, over what $p$ writes, of how many nats likelier $p$ finds it than $q$. It is 0 if $p = q$,
# otherwise positive, and the two directions differ. Take three answers, $E = (\frac12, \frac12, 0)$ and $\pi =
# (\frac14, \frac14, \frac12)$.

# %%
E3 = torch.tensor([0.5, 0.5, 0.0])
pi3 = torch.tensor([0.25, 0.25, 0.5])
print("KL(E‖π) =", 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.25) + 0)
print("KL(π‖E) =", (pi3 * (pi3 / E3).log()).sum().item())

# %% [markdown]
# $\mathrm{KL}(E\|\pi)$ is $\log 2$. $\mathrm{KL}(\pi\|E)$ is infinite, because $\pi$ writes an answer that $E$ never
# writes.
#
# SFT lowers $\mathrm{KL}(E\|\pi)$. The reason is practical: this is an average over $E$, and demonstrations are samples
# of $E$. The other direction would need the value of $E$ for texts that the policy writes, and nobody knows it. Split
# the logarithm:
#
# $$\mathrm{KL}(E \,\|\, \pi) = -H(E) \; - \; \sum_y E(y|x) \log \pi(y|x) .$$
#
# The entropy $H(E) = -\sum_y E \log E$ does not depend on $\pi$. So raising the average log-prob of demonstrations *is*
# lowering $\mathrm{KL}(E\|\pi)$, and with unlimited demonstrations the best policy is $\pi = E$. The direction has a
# side effect: SFT must give probability to everything that was shown, and it is not told what to avoid.
#
# ## 2. Three answers, by hand
#
# One prompt, three answers of one token, and a policy that is three logits, all equal. Its loss is $\log 3$ whatever is
# shown, and by 03 the gradient of the loss in the logits is $\pi - E$.

# %%
def descend(target, steps, lr=0.1):
    """Gradient descent on KL(target‖π) from equal logits: the policies after each step."""
    logits, path = torch.zeros(3, dtype=torch.float64), []
    for _ in range(steps + 1):
        pi = logits.softmax(0)  # watch: pi (3,)
        path.append(pi)
        logits = logits - lr * (pi - target)  # the gradient, written out
    return torch.stack(path)


for name, target in (("always the third", [0.0, 0.0, 1.0]), ("a mixture", [0.1, 0.2, 0.7])):
    path = descend(torch.tensor(target, dtype=torch.float64), steps=1000)
    print(f"shown: {name}")
    for k in (0, 10, 100, 1000):
        print(f"  step {k:4}   π =", [round(p, 3) for p in path[k].tolist()])
always(max(abs(a - b) for a, b in zip(path[-1].tolist(), target, strict=True)) < 1e-3,
       "The fixed point of SFT is E.")

# %% [markdown]
# A mixture is copied as a mixture. A single answer, shown again and again, goes to probability 1, and the other two go
# to 0 although nobody called them bad: probabilities sum to one. Section 6 shows the same in a language model.
#
# ## 3. Build it yourself: loss, KL, and a training step
#
# For sequences, the loss is the negative log-prob of the scored tokens, divided by their number:
#
# $$\mathrm{loss} = -\frac{1}{\text{scored tokens}} \sum_{\text{rows}} \sum_t \log \pi(y_t \mid x, y_{<t}) .$$


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


def my_kl(p, q_logs):
    """KL(p‖q) of several pairs of distributions.

    p: (N, M) probabilities, all positive; each row sums to 1. q_logs: (N, M) log-probs under q.
    Returns (N,).
    """
    difference = p.log() - q_logs  # watch: difference (N, M)
    return (p * difference).sum(1)


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
# `my_sft_loss` is compared with the project's `sft_loss`, `my_kl` with torch, and two of your steps with two steps
# written out with the project's loss. Stop in `my_sft_step` at the first call: the loss is near $\log 29$, because a
# new model gives all 29 tokens about the same probability.

# %%
tokenizer = task.builtin_tokenizer()  # the language of requests from 02; one token per letter
EOS = tokenizer.eos_id


def encoded(demonstrations):
    """Demonstrations as pairs (ids of the prompt, ids of the answer and EOS)."""
    return [(data.encode_prompt(tokenizer, one.prompt),
             data.encode_completion(tokenizer, one.completion)) for one in demonstrations]


def batch_of(rows):
    return collate([row[0] for row in rows], [row[1] for row in rows], pad_id=EOS)


generator = torch.Generator().manual_seed(0)
mask = torch.rand(4, 6, generator=generator) < 0.6
logps = (-torch.rand(4, 6, generator=generator)).masked_fill(~mask, -torch.inf).requires_grad_()
for n_tokens in (None, 100):
    mine = my_sft_loss(logps, mask, n_tokens)
    theirs, _ = sft.sft_loss(logps, mask, n_tokens=n_tokens)
    gradients = [torch.autograd.grad(value, logps)[0] for value in (mine, theirs)]
    equal(mine, theirs, msg="my_sft_loss equals minialign's sft_loss.")
    equal(*gradients, msg="The gradient of my_sft_loss equals minialign's.")

p = torch.rand(5, 7, generator=generator).softmax(1)
q_logs = torch.rand(5, 7, generator=generator).log_softmax(1)
by_torch = F.kl_div(q_logs, p, reduction="none").sum(1)
equal(my_kl(p, q_logs), by_torch,
                           msg="my_kl equals torch's KL.")

torch.manual_seed(0)
mine = GPT(GPTConfig.tiny(tokenizer.vocab_size))
theirs = copy.deepcopy(mine)
few = encoded(task.builtin_demos(16))
my_optimizer, optimizer = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (mine, theirs)]
for batch in (batch_of(few[:8]), batch_of(few[8:])):
    loss = my_sft_step(mine, my_optimizer, batch)
    optimizer.zero_grad()
    their_loss, _ = sft.step(theirs, batch)
    their_loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    always(abs(loss - their_loss.item()) < 1e-5, "my_sft_step returns the batch's loss.")
V = tokenizer.vocab_size
print(f"loss of the second step {loss:.3f}, log {V} = {math.log(V):.3f}")
for my_weights, their_weights in zip(mine.parameters(), theirs.parameters(), strict=True):
    equal(my_weights, their_weights,
                               msg="my_sft_step changes the weights like minialign's step.")

# %% [markdown]
# ## 4. Divided by what?
#
# Two answers have the token losses [1, 1] and [2, 2, 2, 2]. Three programs give three numbers, and all are called "the
# SFT loss". Is the difference only a unit? Test it: a prompt has two answers, shown **equally often**, a short one of 2
# tokens and a long one of 6. The first token decides which, and the later ones are certain. So the policy is one logit,
# and it should end at one half.

# %%
def token_mean(losses, mask):
    return torch.where(mask, losses, 0).sum() / mask.sum()


def mean_of_row_means(losses, mask):
    return (torch.where(mask, losses, 0).sum(1) / mask.sum(1)).mean()


def mean_of_row_sums(losses, mask):
    return torch.where(mask, losses, 0).sum(1).mean()


def share_of_short(reduction, long=6):
    """π(short answer) after 1000 steps of gradient descent with this reduction."""
    mask = torch.tensor([[True] * 2 + [False] * (long - 2), [True] * long])
    z = torch.tensor(0.3, requires_grad=True)
    for _ in range(1000):
        first = -F.logsigmoid(torch.stack([z, -z]))  # (2,) the loss of each answer's first token
        rest = torch.zeros(2, long - 1)
        losses = torch.cat([first[:, None], rest], dim=1)  # watch: losses (2, 6)
        (gradient,) = torch.autograd.grad(reduction(losses, mask), z)
        z = (z - 0.5 * gradient).detach().requires_grad_()
    return z.sigmoid().item()


two_losses = torch.tensor([[1.0, 1, 0, 0], [2, 2, 2, 2]])
two_mask = two_losses > 0
for reduction in (token_mean, mean_of_row_means, mean_of_row_sums):
    loss = reduction(two_losses, two_mask)
    short = share_of_short(reduction)
    print(f"{reduction.__name__:18} loss {loss:.3f}   ends at π(short) = {short:.4f}")
    always(abs(short - (0.75 if reduction is mean_of_row_means else 0.5)) < 0.001,
           "Row means prefer the short answer 3 : 1, the other two do not.")
for n_rows in (1, 2, 32):  # each step draws its rows at random: k short ones, the others long
    chances = [math.comb(n_rows, k) / 2**n_rows for k in range(n_rows + 1)]
    per_token = [chance / (2 * k + 6 * (n_rows - k)) for k, chance in enumerate(chances)]
    short = sum(k * weight for k, weight in enumerate(per_token)) / (n_rows * sum(per_token))
    print(f"token mean, steps of {n_rows:2} random rows: ends at π(short) = {short:.3f}")

# %% [markdown]
# The mean of row means divides the first token's loss by 6 in the long answer and by 2 in the short one. So it teaches
# a preference for short answers, three to one, that no demonstration contains. The mean of row sums is maximum
# likelihood. So is the token mean if every step has the same number of tokens, as here. With random rows the number
# varies, and a token counts more in a step with few tokens. The last three lines show the effect: large with one row in
# a step, small with 32. This project divides by the tokens of the whole step.
#
# ## What is wrong here? (1)
#
# A batch of 8 rows does not fit into memory, so a program splits it and adds up the gradients of the pieces. However
# the batch is split, the gradient should be the same. The first five answers are short, the last three long.

# %%
small = copy.deepcopy(theirs).double()
answers = ["now", "tea", "i want", "rope", "me"] + 3 * [2 * "could i get tea if you can. "]
question = tokenizer.encode("ask for tea: ")
eight = [(question, data.encode_completion(tokenizer, answer)) for answer in answers]


def gradient_of(pieces):
    small.zero_grad()
    for piece in pieces:
        batch = batch_of(piece)
        loss = my_sft_loss(token_logps(small, batch), batch.mask) / len(pieces)  # a mean of pieces
        loss.backward()  # gradients add up in .grad
    return torch.cat([parameter.grad.flatten() for parameter in small.parameters()])


whole_gradient = gradient_of([eight])  # watch: whole_gradient (number of weights,)
for size in (8, 4, 1):
    pieces = [eight[i : i + size] for i in range(0, 8, size)]
    error = ((gradient_of(pieces) - whole_gradient).norm() / whole_gradient.norm()).item()
    print(f"{len(pieces)} pieces of {size}: relative error of the gradient {error:.2f}")

# %% [markdown]
# Why does it differ, and what must the program divide by?
#
# ## 5. The experiment: demonstrations from a known E
#
# In the language of requests each prompt has 36 answers: 6 openings times 6 endings. Three openings are polite and
# three endings are, so 9 answers are polite in both. A speaker chooses opening and ending separately. Speakers differ
# only in how often they are polite, so all probabilities are known.
#
# - The **base model** has read 2000 texts of rude speakers, polite with probability 0.25.
# - The **demonstrations** are written by two people: 70 % by a polite speaker (polite with probability 0.9), 30 % by a
#   rude one. Real data is mixed as well. This mixture is our $E$.
#
# Because $E$ is known, $\mathrm{KL}(E\|\pi)$ is a sum over 36 answers. We average it over the 24 prompts.

# %%
PROMPTS = task.builtin_prompts()
POLITE = [task.builtin_law(prompt, 0.9) for prompt in PROMPTS]  # 24 times {answer: probability}
RUDE = [task.builtin_law(prompt, 0.25) for prompt in PROMPTS]
ANSWERS = [list(answers) for answers in POLITE]  # 24 lists of 36 answers
polite, rude = (torch.tensor([list(row.values()) for row in table]) for table in (POLITE, RUDE))
E = 0.7 * polite + 0.3 * rude  # watch: E (24, 36)
ENTROPY = -(E * E.log()).sum(1).mean().item()
TABLES = [batch_of(encoded([data.Demo(prompt, answer) for answer in answers]))
          for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)]  # 24 batches of 36 rows


@torch.no_grad()
def all_logps(policy):
    """The log-prob of each of the 36 answers to each prompt: (24, 36)."""
    return torch.stack([seq_logps(policy, table) for table in TABLES])


print("some of the 36 answers to", PROMPTS[0])
for i in (0, 3, 18, 35):
    print(f"   E {E[0, i]:.4f}   {ANSWERS[0][i]}")
print(f"entropy of E: {ENTROPY:.3f} nats per answer")

# %% [markdown]
# The training loop calls your step. `look` is a function that is called now and then to measure. The base model is a
# GPT of two layers, trained from random weights on plain text: the same loss, with every token scored.


# %%
def train(policy, rows, steps, lr, every=None, look=None, warm_up=False):
    """Train on random batches of 32 rows.

    look(k) is called before step k if `every` divides k, and at the end. warm_up: the rate rises to
    lr in the first tenth of the steps and then falls to 0; otherwise it is constant."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    if warm_up:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        if look and k % every == 0:
            look(k)
        picked = torch.randperm(len(rows), generator=generator)[:32].tolist()  # watch: picked (32,)
        my_sft_step(policy, optimizer, batch_of([rows[i] for i in picked]))
        if warm_up:
            schedule.step()
    if look:
        look(steps)


torch.manual_seed(0)
base = GPT(GPTConfig.tiny(tokenizer.vocab_size))
# pairs ([BOS], ids of the text and EOS)
texts = data.encode_texts(tokenizer, task.builtin_texts(), max_len=96)
train(base, texts, steps=300, lr=1e-2, warm_up=True)
base_logps = all_logps(base)
print(f"KL(rude‖base) {my_kl(rude, base_logps).mean():.3f}")
print(f"KL(E‖base)    {my_kl(E, base_logps).mean():.3f}")
this_run(my_kl(rude, base_logps).mean() < 0.5, "The base model speaks like the rude speakers.")

# %% [markdown]
# ## 6. Too many steps
#
# Now SFT on 200 demonstrations, longer than is good. We measure, in nats per answer, the loss on these 200 and the
# expected loss on new demonstrations, $-\sum_y E(y) \log \pi(y) = H(E) + \mathrm{KL}(E\|\pi)$; and how much probability
# is on answers that were shown for their prompt.
#
# A word on the learning rate: the base model was trained at 1e-2, SFT uses 3e-4. The weights are already good, and
# large steps destroy more than they teach (exercise 1).

# %%
LR, STEPS = 3e-4, 120
demos = task.builtin_demos(200)
rows = encoded(demos)
pairs = [(demo.prompt, demo.completion) for demo in demos]
counts = torch.tensor([[pairs.count((prompt, answer)) for answer in answers]
                       for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)])
shown = counts > 0  # watch: shown (24, 36)
E_loss = -(counts * E.log()).sum().item() / len(demos)
copied = counts / counts.sum(1, keepdim=True)  # how often each answer to a prompt was shown
copied_loss = -torch.xlogy(counts, copied).sum().item() / len(demos)
print(f"loss on the 200: of E {E_loss:.3f}, of a policy that copies them {copied_loss:.3f}")
whole = batch_of(rows)
policy, history, best = copy.deepcopy(base), [], {"kl": math.inf}


def look(k):
    logps = all_logps(policy)
    probs = logps.exp()
    with torch.no_grad():
        train_loss = -seq_logps(policy, whole).mean().item()
    row = {"step": k, "train": train_loss,
           "expected": -(E * logps).sum(1).mean().item(), "kl": my_kl(E, logps).mean().item(),
           "shown": (probs * shown).sum(1).mean().item(),
           "unshown": (probs * ~shown).sum(1).mean().item()}
    always(abs(row["expected"] - ENTROPY - row["kl"]) < 1e-3,
           "The expected loss is H(E) + KL(E‖π).")
    history.append(row)
    if row["kl"] < best["kl"]:
        best.update(row, policy=copy.deepcopy(policy))
    print(f"{k:4}", *(f"{row[name]:10.3f}" for name in ("train", "expected", "kl", "shown")))


print("step      train   expected    KL(E‖π)   P(shown)")
train(policy, rows, STEPS, LR, every=20, look=look)
first, last = history[0], history[-1]
this_run(best["kl"] < 0.5 * first["kl"] and last["kl"] > 1.5 * best["kl"],
         "The policy comes close to E, then overfits.")
this_run(last["train"] < ENTROPY < best["expected"],
         "In the end the training loss is below the entropy.")

# %%
column = {name: [row[name] for row in history] for name in history[0]}
best_row = column["kl"].index(best["kl"])
figures.losses(column["step"], column["train"], column["expected"], ENTROPY, best_row)
figures.mass(column["step"], column["shown"], column["unshown"], (E * shown).sum(1).mean().item())

# %% [markdown]
# First figure: the training loss is all that SFT sees, and it always improves. On these 200 demonstrations $E$ itself
# has the loss 3.361 (printed above), a little more than its entropy. From step 40 on the policy gives them more
# probability than $E$ does: it begins to learn them by heart. It stays far from 1.970, the loss of a policy that only
# copies them. Second figure: what that means. Probability leaves requests that were not shown, although many of them
# are as polite as the shown ones. It is the toy of section 2 again, 24 times.
#
# ## 7. Read what it writes

# %%
def report(name, policy):
    """Print four answers, and shares over 8 answers to each of the 24 prompts."""
    asked = [data.encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    # the 8 answers to a prompt stand together
    drawn = sample(policy, asked, n=8, max_new=40, eos_id=EOS, seed=0)
    texts = [tokenizer.decode(ids) for ids in drawn.completions]
    correct = sum(text in ANSWERS[i // 8] for i, text in enumerate(texts)) / len(texts)
    kind = sum(text.startswith(task.POLITE_OPENINGS) for text in texts) / len(texts)
    print(f"\n{name}: {100 * correct:.0f} % ask for the thing, {100 * kind:.0f} % open politely")
    for i in (0, 8, 16, 24):
        print(f"   {PROMPTS[i // 8]}{texts[i]}")
    return kind


base_polite = report("base", base)
best_polite = report(f"best, step {best['step']}", best["policy"])
report(f"last, step {STEPS}", policy)
opens = [[answer.startswith(task.POLITE_OPENINGS) for answer in answers] for answers in ANSWERS]
opens = torch.tensor(opens)
print(f"\npolite openings: E {100 * (E * opens).sum(1).mean():.0f} %,",
      f"the polite speaker {100 * (polite * opens).sum(1).mean():.0f} %")
this_run(best_polite > base_polite + 0.2, "SFT makes the policy politer.")

# %% [markdown]
# The base model opens rudely three times in four, as its texts did. The best SFT policy opens politely nearly as often
# as $E$ (63 % against 70 %), not as often as the polite speaker: **SFT copies the demonstrators, the rude ones
# included**. Each speaker chooses opening and ending separately, so $E$ too would write `may i have tea or else!`.
#
# Compare the last policy with the best one. In a few samples the difference hardly shows: it is as polite, and somewhat
# more of its texts are misspelt or name the wrong thing. Its KL is several times as large. So do not judge overfitting
# by reading samples. Measure the loss on demonstrations that were held out (exercise 2).
#
# ## 8. How many demonstrations?
#
# The same training with 50, 1000 and 4000 demonstrations.

# %%
curves = {200: ([row["step"] for row in history], [row["kl"] for row in history])}


def train_and_measure(rows, steps, every, lr=LR):
    """Train a copy of `base`; returns (steps at which we looked, KL(E‖π) there)."""
    student, steps_seen, kl = copy.deepcopy(base), [], []

    def look(k):
        steps_seen.append(k)
        kl.append(my_kl(E, all_logps(student) if k else base_logps).mean().item())

    train(student, rows, steps, lr, every=every, look=look)
    return steps_seen, kl


for n, steps, every in ((50, 40, 10), (1000, STEPS, 40), (4000, STEPS, 40)):
    curves[n] = train_and_measure(encoded(task.builtin_demos(n)), steps, every)
curves = dict(sorted(curves.items()))
for n, (steps_seen, kl) in curves.items():
    i = kl.index(min(kl))
    print(f"{n:5} demonstrations: lowest KL(E‖π) {kl[i]:.3f} at step {steps_seen[i]},",
          f"{kl[-1]:.3f} at step {steps_seen[-1]}")
best_kls = [min(kl) for _, kl in curves.values()]
this_run(best_kls[0] > best_kls[1] > best_kls[2], "More demonstrations bring π nearer to E.")
figures.how_many(curves)

# %% [markdown]
# Each step costs the same in all four runs. Of 50 demonstrations a step uses 32, so the policy sees each of them in
# about two of three steps. It starts to learn them by heart almost at once. With 1000 it comes close to $E$ and loses
# little afterwards (0.140, then 0.164). With 4000 it is nearest at the last step.
#
# ## 9. Break it: score the prompt
#
# Suppose the mask is forgotten, and the prompt's letters are scored too. The policy never has to write a prompt, and
# which of 24 things it names cannot be predicted. That adds about $\log 24 = 3.18$ nats to each row.

# %%
unmasked = [(prompt[:1], prompt[1:] + answer) for prompt, answer in rows]  # all but BOS is scored
n_answer = sum(len(answer) for _, answer in rows)
prompt_share = 1 - n_answer / sum(len(answer) for _, answer in unmasked)
for name, some in (("masked", rows), ("prompt scored", unmasked)):
    some = batch_of(some)
    with torch.no_grad():
        loss = my_sft_loss(token_logps(best["policy"], some), some.mask)
    print(f"{name:14} loss of the best policy: {loss:.3f} nats per token")

print(f"{100 * prompt_share:.0f} % of the scored tokens are now prompt")
print("KL(E‖π) at step       40     80")
larger = LR / (1 - prompt_share)
kls = {"masked": column["kl"][::2],
       "prompt scored": train_and_measure(unmasked, 80, 40)[1],
       "same, larger rate": train_and_measure(unmasked, 80, 40, lr=larger)[1]}
for name, kl in kls.items():
    print(f"{name:17}", *(f"{number:6.3f}" for number in kl[1:3]))
this_run(kls["prompt scored"][1] < 1.5 * best["kl"],
         "Scoring the prompt costs the best policy little here.")

# %% [markdown]
# The number on the screen is misleading: the same policy shows a larger loss per token, and two runs with different
# prompts can no longer be compared. The policy itself is **not** harmed here. It comes as near to $E$ as with the mask,
# and it even overfits a little later. That is no advantage of scoring prompts. AdamW divides the step of each weight by
# the usual size of that weight's gradient, and a part of this gradient now comes from prompts. So the answers get
# smaller steps. With a larger learning rate (last row) the run overfits like the masked one again. So mask the prompt,
# and do not expect samples to tell you that somebody forgot to.
#
# ## What is wrong here? (2)
#
# A new program prepares the demonstrations and fine-tunes the base model. All samples look right, and nearly all of
# them stop.

# %%
careless = [(data.encode_prompt(tokenizer, one.prompt), tokenizer.encode(one.completion))
            for one in demos]
tuned = copy.deepcopy(base)
train(tuned, careless, 40, LR)


def stopping(name, policy):
    """Print three answers, and the share of 96 answers that stop within 60 tokens."""
    asked = [row[0] for row in rows[:24]]
    drawn = sample(policy, asked, n=4, max_new=60, eos_id=EOS, seed=0)
    stopped = drawn.finished.float().mean().item()
    print(f"{name}: {100 * stopped:.0f} % stop")
    for i in (0, 4, 8):
        print(f"   {demos[i // 4].prompt}{tokenizer.decode(drawn.completions[i])}")
    return stopped


this_run(stopping("fine-tuned", tuned) > 0.9, "The samples stop.")
some = batch_of(careless[:2])
for targets, mask in zip(some.targets.tolist(), some.mask.int().tolist(), strict=True):
    print("".join(tokenizer.decode([i]) or "⏎" for i in targets))
    print("".join(str(scored) for scored in mask))

# %% [markdown]
# Look at the masks. What is missing, and with which base model would the samples show it?
#
# ## What you now know
#
# - SFT maximises the log-prob of demonstrations. That is minimising $\mathrm{KL}(E\|\pi)$. With unlimited
#   demonstrations it ends at $\pi = E$.
# - With finitely many demonstrations it passes near $E$ and learns them by heart. The training loss does not show it.
# - It copies all who wrote demonstrations. It cannot tell good ones from bad ones, and it takes probability from good
#   answers that nobody happened to show. For both you need a [reward](../GLOSSARY.md#reward).
# - Divide by the tokens of the whole step. Score EOS, do not score the prompt, and look at the mask.
#
# Next: [05 · Inverse RL](05_inverse_rl.ipynb), which learns a reward from demonstrations. A short side road, [04b ·
# Intuitive fine-tuning](04b_ift.ipynb), changes SFT's loss.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes; try this). Set `LR = 1e-3` in section 6, and then `1e-4`, with TINKER on ([start
# here](00_start_here.ipynb)). Which best KL do you expect, and at which step? Then start from random weights in place
# of `base`.
#
# **Exercise 2** (medium, 10 minutes). We chose the best step by a KL that nobody knows for real data. Choose it
# honestly: train again from `base`, watch the loss on 200 *other* demonstrations, `task.builtin_demos(200, seed=1)`,
# and stop where it is lowest. How much KL does that cost?
#
# **Exercise 3** (hard, 15 minutes). In section 2 the shown answer's probability rises ever more slowly. Let $d$ be its
# logit minus that of another answer. Show that for very small steps $2d + e^d = 1 + 3 \cdot \mathrm{lr} \cdot
# \mathrm{steps}$, and predict $\pi$ after 100 steps.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# Each piece is divided by its *own* number of tokens, and the pieces then count equally. So a token in a piece with
# short answers weighs more than a token in a piece with long ones. With pieces of one row it is the mean of row means.
# Divide each piece by the scored tokens of the *whole* step: that is what `n_tokens` is for.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
small.zero_grad()
for piece in [eight[i : i + 1] for i in range(8)]:
    batch = batch_of(piece)
    tokens_of_the_step = sum(len(answer) for _, answer in eight)
    my_sft_loss(token_logps(small, batch), batch.mask, tokens_of_the_step).backward()
again = torch.cat([parameter.grad.flatten() for parameter in small.parameters()])
error = (again - whole_gradient).norm() / whole_gradient.norm()
print(f"relative error with the count of the whole step: {error:.1e}")
always(error < 1e-9, "With the count of the whole step the pieces add up.")

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# EOS. `tokenizer.encode` does not append it (`data.encode_completion` does), so no row has a scored `⏎`. In training,
# nothing touches the prediction after the last letter. The base model knows how to stop and keeps that habit, so the
# samples look right. With a base model that does not know your EOS the policy never stops, as the code shows. Do not
# trust samples here, look at the mask: each row must score one EOS.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
torch.manual_seed(0)
endless = GPT(GPTConfig.tiny(tokenizer.vocab_size))
train(endless, [(prompt, answer[:-1]) for prompt, answer in rows], steps=60, lr=1e-2, warm_up=True)
this_run(stopping("from random weights, without EOS", endless) < 0.3,
         "Without EOS in its data it does not stop.")
always((whole.mask & (whole.targets == EOS)).sum(1).eq(1).all(), "Our own rows score one EOS each.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The cell runs 1e-3: its best KL comes after fewer steps and is worse. Large steps damage what the base model knows. We
# did not run the other two. A small rate should need more steps for about the same best KL. From random weights the
# policy has to learn to spell too. The samples of puzzle 2 show what 60 steps at 1e-2 on these demonstrations do for
# that.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
steps_seen, kl = train_and_measure(rows, 40, 20, lr=1e-3)
print(f"rate 1e-3: KL(E‖π) at steps {steps_seen}:", [round(number, 3) for number in kl])
this_run(min(kl) > best["kl"], "The best KL is worse than that of section 6.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The held-out loss estimates $H(E) + \mathrm{KL}(E\|\pi)$. All steps are judged by the same 200 demonstrations, so
# their noise is common to all steps and the lowest one is found well. Here it costs nothing: the held-out loss is
# lowest at step 40, as the KL is.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
held_out = batch_of(encoded(task.builtin_demos(200, seed=1)))
student, seen = copy.deepcopy(base), []


def look_honestly(k):
    with torch.no_grad():
        seen.append((-seq_logps(student, held_out).mean().item(), k, copy.deepcopy(student)))


train(student, rows, 60, LR, every=20, look=look_honestly)
loss, step, chosen = min(seen, key=lambda entry: entry[0])
chosen_kl = my_kl(E, all_logps(chosen)).mean().item()
print(f"held-out loss is lowest at step {step}: {loss:.3f}")
print(f"KL(E‖π) there {chosen_kl:.3f}, the best was {best['kl']:.3f}")
this_run(chosen_kl < best["kl"] + 0.2, "The honest choice costs little.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Let $p = e^d/(2 + e^d)$ be the shown answer's probability. Per unit of $\mathrm{lr} \cdot \mathrm{steps}$ its logit
# rises by $1 - p$, and each other logit falls by $(1 - p)/2$. So $d' = \frac32(1 - p) = 3/(2 + e^d)$, that is $(2 +
# e^d)\,d' = 3$. Integrate from $d = 0$. For 100 steps of 0.1 solve $2d + e^d = 31$ for $d$.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
d = 3.0
for _ in range(50):
    d -= (2 * d + math.exp(d) - 31) / (2 + math.exp(d))  # Newton's method
predicted = math.exp(d) / (2 + math.exp(d))
measured = descend(torch.tensor([0.0, 0, 1], dtype=torch.float64), 100)[-1, 2].item()
print(f"predicted {predicted:.4f}, measured {measured:.4f}")
always(abs(predicted - sft_flow(0.1 * 100)) < 1e-9, "The solution equals the project's sft_flow.")
always(abs(predicted - measured) < 0.005, "Steps of 0.1 are nearly very small steps.")
