# %% [markdown]
# # 04b · Intuitive fine-tuning
#
# **You will build** the two parts of intuitive fine-tuning (IFT): inputs with some of the policy's own guesses, and
# weights for the tokens. You will compute where IFT ends, and compare it with SFT.
#
# **Time:** 19 minutes of reading, 25 seconds of computer.
#
# **You need:** [03 · The log-probability of a completion](03_logps.ipynb) and [04 · Supervised
# fine-tuning](04_sft.ipynb). This is a side road: nothing later needs it.
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

from minialign import data, task
from minialign.logps import token_logps
from minialign.methods import ift, sft
from minialign.sample import sample
from toy.closed_form import ift_law
from tutorials import letter_requests as requests
from tutorials.checks import always, equal, this_run
from tutorials.figures import sft as figures

# %% [markdown]
# ## The question
#
# In [SFT](../GLOSSARY.md#sft) the [policy](../GLOSSARY.md#policy) reads the demonstrator's words and predicts the next
# token. Later it writes by itself and reads its *own* words, mistakes included. SFT never trains it on such inputs.
# This gap is called *exposure bias* (Ranzato et al. 2016). An early remedy, *scheduled sampling* (Bengio et al. 2015),
# replaces some of the inputs by tokens that the model samples. Can we train the policy on its own
# words without sampling, which is slow?
#
# Hua et al. (2024, "Intuitive Fine-Tuning") propose two changes to SFT. (The name has nothing to do with *instruction*
# fine-tuning.)
#
# - **Mixed inputs**: each input embedding gets a share of the embedding of what the policy would have written there.
# - **Weights**: each token gets the sum of the losses from itself on. The sums of a row are then scaled to a mean of 1.
#   So a token counts more than the others of its row if much of the row's loss still lies ahead of it.
#
# The picture shows the first change. The demonstration goes on with `milk if`. After `milk` the policy might write a
# comma, and after the space an `o`, for `or else!`.

# %%
figures.mixed_inputs(list("milk␣if"), list("milk,of"))

# %% [markdown]
# ## 1. A base model to make guesses
#
# Base model and demonstrations are those of 04 (`tutorials/letter_requests.py`). The base model was trained on texts of
# rude speakers. The demonstrations come from a mixture $E$ of a polite speaker (70 %) and a rude one (30 %). The loop is
# that of 04 too, but the loss is an argument, so that we can exchange it.

# %%
tokenizer, EOS = requests.tokenizer, requests.EOS
base = requests.base_model()
rows = requests.encoded(task.builtin_demos(1000))  # pairs (ids of the prompt, ids of the answer)


def train(policy, rows, loss_of, steps, lr):
    """Train on random batches of 32 rows. loss_of(policy, batch) is the loss."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randperm(len(rows), generator=generator)[:32].tolist()
        loss = loss_of(policy, requests.batch_of([rows[i] for i in picked]))  # watch: loss ()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    return policy


# %% [markdown]
# ## 2. Build it yourself: the mixed inputs
#
# With $\mathrm{emb}(y_t)$ the embedding of the demonstrated token and $\tilde y_t$ the policy's likeliest token in its
# place, the input is
#
# $$\hat e_t = (1 - \mathrm{mix}) \; \mathrm{emb}(y_t) + \mathrm{mix} \; \mathrm{emb}(\tilde y_t), \qquad
#   \tilde y_t = \arg\max_v \pi(v \mid x, y_{<t}) .$$
#
# The guess is made from *demonstrated* tokens, so one forward pass without gradient finds all guesses of a batch.
# Prompt tokens stay as they are. Take care with the positions: the target at $t - 1$ is the input at $t$.


# %%
def my_lookahead_embeds(policy, batch, mix):
    """The embeddings of the inputs, mixed with those of the policy's guesses.

    policy(inputs) gives logits (B, T, V), policy.embed(ids) gives embeddings (B, T, C).
    batch: inputs, targets (B, T) ids; mask (B, T), True where the target is a completion token.
    Returns (B, T, C). Make a guess for each target that is a completion token, without gradient;
    other targets stay. Shift these tokens by one place to make them inputs; the first input stays.
    """
    with torch.no_grad():
        guesses = policy(batch.inputs).argmax(-1)
    targets = torch.where(batch.mask, guesses, batch.targets)  # watch: targets (B, T)
    guessed = torch.cat([batch.inputs[:, :1], targets[:, :-1]], dim=1)  # watch: guessed (B, T)
    return (1 - mix) * policy.embed(batch.inputs) + mix * policy.embed(guessed)


# %% [markdown]
# ### Checkpoint
#
# Stop in `my_lookahead_embeds` at the first call: `guessed` and `batch.inputs` are equal in the prompt and differ in a
# few letters of the answer.

# %%
some = requests.batch_of(rows[:4])
for mix in (0.2, 1.0):
    mine, theirs = my_lookahead_embeds(base, some, mix), ift.lookahead_embeds(base, some, mix=mix)
    equal(mine, theirs, msg="my_lookahead_embeds equals minialign's.")
guesses = base(some.inputs).argmax(-1)
for b in range(3):
    print("demonstrated:", tokenizer.decode(some.targets[b][some.mask[b]].tolist()))
    print("guessed:     ", tokenizer.decode(guesses[b][some.mask[b]].tolist()), "\n")

# %% [markdown]
# After each guessed letter the policy reads the demonstrated one again. So the guess differs only where the
# demonstrator made another choice.
#
# ## 3. Break it: read only your own guesses
#
# What does a large mix do to the base model's loss on the demonstrations? Look at the last line.

# %%
whole = requests.batch_of(rows[:200])
with torch.no_grad():
    for mix in (0.0, 0.2, 0.5, 1.0):
        embeds = my_lookahead_embeds(base, whole, mix)  # watch: embeds (B, T, C)
        logps = token_logps(base, whole, embeds=embeds)
        print(f"mix {mix:.1f}   loss {-logps.sum() / whole.mask.sum():.3f} nats per token")
this_run(-logps.sum() / whole.mask.sum() > 0.2, "With mix 1 the demonstration is hard to follow.")

# %% [markdown]
# At mix 1 the policy reads its own guess wherever the demonstrator chose otherwise. So the demonstrator's choice is not
# in the input. The second row above demonstrates `give me milk`, and the first guess is `i`. The policy reads `i` and
# must go on with `ive`, as if it had read `g`. With a small mix most of the input is still the demonstrator's choice.
# minialign's default is 0.2.
#
# ## 4. Build it yourself: the weights
#
# Let $\ell_t = -\log\pi(y_t|\cdot)$ be the token losses of a completion with $n$ tokens. Each token gets the discounted
# sum of the losses from itself on, with a discount $\gamma$ between 0 and 1, and the weights are these sums scaled to a
# mean of 1:
#
# $$c_t = \sum_{i \ge t} \gamma^{\,i-t} \, \ell_i, \qquad w_t = \frac{n\, c_t}{\sum_s c_s}, \qquad
#   \mathrm{loss} = \frac1n \sum_t w_t \, \ell_t .$$
#
# By hand for $\ell = 1, 2, 0.5, 4$ and $\gamma = 0.95$, from the end: $c_4 = 4$, $c_3 = 0.5 + 0.95 \cdot 4 = 4.3$, $c_2
# = 6.085$, $c_1 = 6.781$. The weights are constants: no gradient passes through them.


# %%
def my_ift_weights(losses, mask, discount):
    """The weights of IFT.

    losses: (B, T), 0 where mask is False. mask: (B, T) bool. discount: γ.
    Returns (B, T): w_t = n·c_t / Σ_s c_s where mask is True, 0 elsewhere. n and the sum over s
    count scored tokens of the row. Tokens that are not scored add no loss, but count as a step
    in i − t.
    """
    places = torch.arange(losses.shape[1])
    steps = (places - places[:, None]).clamp(min=0)  # (T, T) i − t
    reach = torch.triu(discount ** steps.to(losses))  # watch: reach (T, T)
    c = torch.where(mask, losses @ reach.T, 0)  # watch: c (B, T)
    return mask.sum(1, keepdim=True) * c / c.sum(1, keepdim=True)


def my_ift_loss(logps, mask, discount):
    """The mean over rows of (1/n) Σ_t w_t·ℓ_t, with the weights detached.

    logps: (B, T) log-probs of the targets, mask: (B, T) bool. Returns a scalar.
    """
    losses = -torch.where(mask, logps, 0)
    weights = my_ift_weights(losses, mask, discount).detach()  # watch: weights (B, T)
    return ((weights * losses).sum(1) / mask.sum(1)).mean()


# %% [markdown]
# ### Checkpoint
#
# First the worked numbers, then random ones with holes in the mask. In the figure, compare the last two bars: the last
# token has the largest loss and the smallest weight.

# %%
ell = torch.tensor([[1, 2, 0.5, 4]])
four = torch.ones(1, 4, dtype=torch.bool)
worked = my_ift_weights(ell, four, 0.95)
print("weights", worked[0].numpy().round(3))
print("loss   ", round(my_ift_loss(-ell, four, 0.95).item(), 4), "  plain mean", ell.mean().item())
by_hand = 4 * torch.tensor([[6.78075, 6.085, 4.3, 4.0]]) / 21.16575
equal(worked, by_hand, msg="my_ift_weights gives the worked numbers.")

generator = torch.Generator().manual_seed(0)
holes = torch.rand(5, 8, generator=generator) < 0.7
holes[:, 0] = True
logps = (-torch.rand(5, 8, generator=generator)).requires_grad_()
for discount in (0.5, 0.95, 1.0):
    mine = my_ift_loss(logps, holes, discount)
    theirs, _ = ift.ift_loss(logps, holes, decay=discount)
    gradients = [torch.autograd.grad(loss, logps)[0] for loss in (mine, theirs)]
    equal(mine, theirs, msg="my_ift_loss equals minialign's ift_loss.")
    equal(*gradients, msg="The gradient of my_ift_loss equals minialign's.")
figures.weights(ell[0].tolist(), worked[0].tolist())

# %% [markdown]
# ## What is wrong here? (1)
#
# A program computes $c$ for $\gamma = 1$ with `cumsum`.

# %%
c = ell.cumsum(1)
print("weights", (4 * c / c.sum(1, keepdim=True))[0].numpy().round(3))

# %% [markdown]
# Compare with the idea of the method. Which tokens count most here?
#
# ## What is wrong here? (2)
#
# This is `my_ift_loss` with one call left out, for another completion. Every number should be positive: a step lowers
# the loss of each demonstrated token.

# %%
ell_2 = torch.tensor([[0.5, 4, 0.5, 0.5]], requires_grad=True)
wrong_loss = (my_ift_weights(ell_2, four, 0.95) * ell_2).sum() / 4
print("gradient in the losses", torch.autograd.grad(wrong_loss, ell_2)[0][0].numpy().round(3))

# %% [markdown]
# The last number is negative: this step would make a demonstrated token *less* likely. Which call is missing, and how
# can a token lower the loss by getting worse?
#
# ## 5. Where does IFT end?
#
# The [fixed point](../GLOSSARY.md#closed-form) of SFT is $E$. With several tokens, that of IFT is in general another
# one. The smallest example is an $E$ that writes `A` half of the time and stops, or `B` and then `C` or `D`, a quarter
# each. The policy has one choice between A and B and one between C and D. We follow the gradient of IFT until nothing
# changes, without mixed inputs. (They move the end too, but we have no formula for that.) SFT ends at $\pi(A) = 0.5$.
# Does IFT?

# %%
# A, A, BC, BD: four equally likely rows
two_tokens = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]]).bool()


def settle(loss_of, steps=600, lr=1.0):
    """π(A) where gradient descent on loss_of(logps (4, 2), mask (4, 2)) ends."""
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)  # logits of A, B and of C, D
    for _ in range(steps):
        first, second = z[:2].log_softmax(0), z[2:].log_softmax(0)
        logps = torch.stack([first[[0, 0, 1, 1]], torch.cat([second.new_zeros(2), second])], dim=1)
        (gradient,) = torch.autograd.grad(loss_of(logps, two_tokens), z)
        z = (z - lr * gradient).detach().requires_grad_()
    return z[:2].softmax(0)[0].item()


print(f"SFT                        π(A) = {settle(lambda logps, mask: -logps[mask].mean()):.4f}")
discounts, ends = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 0.95, 1.0), []
for discount in discounts:
    ends.append(settle(lambda logps, mask, discount=discount: my_ift_loss(logps, mask, discount)))
    if discount > 0:
        closed_form = ift_law([(0,), (1, 2), (1, 3)], [0.5, 0.25, 0.25], discount)[0]
        always(abs(ends[-1] - closed_form) < 1e-3, "IFT ends at the project's closed form.")
    print(f"IFT, γ = {discount:4}              π(A) = {ends[-1]:.4f}")
no_weights = settle(lambda logps, mask: ift.ift_loss(logps, mask, decay=0.0)[0])
print(f"the released code's γ = 0  π(A) = {no_weights:.4f}")
this_run(abs(ends[0] - 0.6294) < 1e-3, "The formula at γ = 0 ends at 0.6294.")
always(abs(no_weights - 2 / 3) < 1e-3, "Without weights, π(A) ends at 2/3.")
figures.ends(discounts, ends, no_weights, 0.5)

# %% [markdown]
# `A` ends above one half for every discount. Every row has the total weight $\frac1n \sum_t w_t = 1$, and its first
# token has the share $c_1/\sum_t c_t$ of it. In the row `A` the first token is the only one, so the choice `A` has all
# the weight. In the rows `BC` and `BD` the choice `B` has only a part. So the choice `A` counts more. This is what the
# objective says, not a bug in the program.
#
# The red square is the released code's $\gamma = 0$, and minialign's: there it means "no weights", all $w_t = 1$. Then
# the choice `A` counts 1 and `B` counts ½. It is the mean of row means, with its preference for short answers (04,
# exercise 3). In the formula, $\gamma = 0$ gives $c_t = \ell_t$ and another end, 0.6294 (exercise 3).
#
# ## 6. IFT beside SFT on the requests
#
# Now both methods train the base model: 80 steps each on 1000 demonstrations, IFT with mix 0.2 and $\gamma = 0.95$.
# Compare their KL from $E$.


# %%
def sft_loss(policy, batch):
    return sft.step(policy, batch)[0]


def ift_loss(policy, batch):
    logps = token_logps(policy, batch, embeds=my_lookahead_embeds(policy, batch, 0.2))
    return my_ift_loss(logps, batch.mask, 0.95)


def kl_to_expert(policy):
    return (requests.E * (requests.E.log() - requests.all_logps(policy))).sum(1).mean().item()


policies = {"base": base}
for name, loss_of in (("SFT", sft_loss), ("IFT", ift_loss)):
    policies[name] = train(copy.deepcopy(base), rows, loss_of, steps=80, lr=3e-4)
questions = [data.encode_prompt(tokenizer, prompt) for prompt in requests.prompts]
measured = {}
for name, policy in policies.items():
    measured[name] = kl_to_expert(policy)
    drawn = sample(policy, questions, n=4, max_new=40, eos_id=EOS, seed=0)
    answers = [tokenizer.decode(ids) for ids in drawn.completions]
    correct = sum(y in requests.answers[i // 4] for i, y in enumerate(answers)) / len(answers)
    print(f"{name:4}   KL(E‖π) {measured[name]:.3f}   {100 * correct:.0f} % ask for the thing")
    for i in (0, 4, 8):
        print(f"   {requests.prompts[i // 4]}{answers[i]}")
this_run(max(measured["SFT"], measured["IFT"]) < 0.5 * measured["base"], "Both come close to E.")

# %% [markdown]
# Both move the policy most of the way from the base model to $E$, and their texts look alike. In this run IFT stays a
# little farther from $E$. We see no gain, neither on E's prefixes (KL) nor in the policies' own texts (the
# percentages). On other tasks that may differ (`docs/CLAIMS.md`).
#
# ## What you now know
#
# - IFT mixes the policy's one-step guesses into its inputs: a cheap approximation to its own words.
# - It weights a token by the losses from it on. At $\gamma = 1$, early tokens of a row count most. The weights must be
#   constants.
# - For answers of several tokens its fixed point is seldom $E$. Each row has the same total weight, so what a choice
#   counts depends on the rest of its row. Above, that favours the short answer.
#
# Next: [05 · Inverse RL](05_inverse_rl.ipynb), where demonstrations teach a reward.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes; try this). In section 6, replace the mix 0.2 by 0.5. What do you expect for the KL
# of IFT?
#
# **Exercise 2** (easy, 5 minutes). With all weights 1, show by hand that `A` ends at ⅔. Hint: write the loss of the
# first choice with $a = \pi(A)$, and set its derivative to zero.
#
# **Exercise 3** (hard, 15 minutes). For the formula at $\gamma = 0$, show that $a = \pi(A)$ solves $a/(1-a) = (\ell +
# \log 2)/\ell$ with $\ell = -\log(1 - a)$, and find 0.6294 from it.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# The last tokens count most. `cumsum` adds the losses *before* each token; the sum must start at the end. (The paper
# has both directions. In its Eq. 22 later tokens count more: token i is counted i + 1 times. In its code a token counts
# by the losses from it on.)
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# `detach`. Now the gradient also passes through the weights. With losses (0.5, 4, 0.5, 0.5) the weights are (1.789,
# 1.701, 0.337, 0.173) and the loss is 1.989. If the last loss grows to 0.6, the weights are (1.762, 1.679, 0.358,
# 0.201) and the loss is 1.974. It has fallen, because the second token, with loss 4, has lost weight. The released code
# does this too.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
c = ell.flip(1).cumsum(1).flip(1)
equal(4 * c / c.sum(1, keepdim=True), my_ift_weights(ell, four, 1.0),
                           msg="my_ift_weights at γ = 1 sums from the end.")
(slopes,) = torch.autograd.grad(my_ift_loss(-ell_2, four, 0.95), ell_2)
print("gradient with detached weights", slopes[0].numpy().round(3))
for last in (0.5, 0.6):
    losses = torch.tensor([[0.5, 4, 0.5, last]])
    weights = my_ift_weights(losses, four, 0.95)
    print("weights", weights[0].numpy().round(3), f"  loss {(weights * losses).sum() / 4:.3f}")
always((slopes > 0).all(), "With constant weights every demonstrated token becomes likelier.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The KL is larger. One reason: training reads strongly mixed inputs, the measurement unmixed ones.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def mixed_loss(policy, batch):
    logps = token_logps(policy, batch, embeds=my_lookahead_embeds(policy, batch, 0.5))
    return my_ift_loss(logps, batch.mask, 0.95)


mixed = kl_to_expert(train(copy.deepcopy(base), rows, mixed_loss, steps=80, lr=3e-4))
print(f"mix 0.5   KL(E‖π) {mixed:.3f}")
this_run(mixed > measured["IFT"], "With a large mix the KL is larger.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The row `A` has the loss $-\log a$. In the rows `BC` and `BD` the choice `B` has half the weight: $-\frac12 \log(1 -
# a)$ and a part without $a$. Both kinds are shown equally often, so minimise $-\log a - \frac12 \log(1 - a)$. The
# derivative is 0 where $(1 - a) = a/2$, at $a = 2/3$.
#
# </details>
#
# <details><summary>Exercise 3</summary>
#
# `A` has all the weight of its row. In `BC` and `BD` the losses are $\ell$ and $\log 2$, so the choice `B` has the
# share $s = \ell/(\ell + \log 2)$. For constant shares the minimum of $-\log a - s \log(1 - a)$ is at $a/(1 - a) =
# 1/s$. The share moves with $a$; where nothing changes any more, both equations hold.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
a = 0.5
for _ in range(100):
    loss_b = -math.log(1 - a)
    odds = (loss_b + math.log(2)) / loss_b
    a = odds / (1 + odds)
print(f"formula at γ = 0: a = {a:.4f}")
always(abs(a - ends[0]) < 1e-3, "The equation gives the end of the training.")
