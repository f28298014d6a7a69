# %% [markdown]
# # 06b · Over-optimisation: when the reward is wrong
#
# **You will build** the KL divergence of a policy from its reference, the policy that has the most reward for its KL,
# and the curve of reward against KL. On it you see how training makes use of a flaw in the reward, first of a flaw
# that we wrote, then of one that a reward model learned.
#
# **Time:** 25 minutes of reading, 10 seconds of computer.
#
# **You need:** [06 · Rewards](06_reward.ipynb): Bradley-Terry, best-of-n and the toy language.
# [05 · Inverse RL](05_inverse_rl.ipynb): the tilt.
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

import numpy as np
import torch

from minialign.methods.best_of_n import kl_bound
from toy import closed_form, overoptimization
from toy.tiny_language import Language, tiny_gpt
from tutorials.checks import always, equal, this_run
from tutorials.figures import reward as figures

torch.set_default_dtype(torch.float64)


# %% [markdown]
# ## The question
#
# Nobody can write down what a good answer is. So we optimise a stand-in, a **proxy**: a reward model trained on
# comparisons, or a program that tests what is easy to test. The proxy agrees with what we want on ordinary answers.
# **Is that enough if a policy is trained to make the proxy as high as possible?**

# %%
figures.proxy_diagram()

# %% [markdown]
# In practice it is too expensive to ask people at every step. Stiennon et al. (2020) trained policies against a
# reward model for summaries, some a little and some a lot, and then asked people. Up to a point people preferred the
# policies that were trained more. After it they liked them less and less, while the learned reward still rose. Gao et
# al. (2023) measured the same with a large reward model in the place of people, which they call **gold**. We do what
# they did in a language that is so small that every policy is known exactly: its numbers below are sums over all
# completions.
#
# ## 1. How far has a policy moved?
#
# We measure how strongly a policy was optimised by its [KL divergence](../GLOSSARY.md#kl) from the
# [reference](../GLOSSARY.md#reference), the policy before training:
#
# $$\mathrm{KL}(\pi \,\|\, \mathrm{ref}) = \sum_y \pi(y) \log \frac{\pi(y)}{\mathrm{ref}(y)} .$$
#
# Its unit is the [nat](../GLOSSARY.md#nats). By hand, with ref = (.5, .3, .2) and the best of 4 from tutorial 06,
# (.0625, .3471, .5904):
#
# $$.0625 \log\frac{.0625}{.5} + .3471 \log\frac{.3471}{.3} + .5904 \log\frac{.5904}{.2}
#   = -.130 + .051 + .639 = .560 .$$


# %%
def my_kl_from_ref(policy, ref):
    """KL(policy‖ref) in nats. policy, ref (…, K), the last dimension sums to 1. Return (…).

    ref is positive everywhere. policy may be 0 somewhere; such a completion contributes 0, not NaN.
    """
    log_ratio = policy.clamp(min=1e-300).log() - ref.log()  # watch: log_ratio (…, K)
    return (policy * log_ratio).sum(-1)


# %% [markdown]
# ### Checkpoint
#
# The KL of three distributions, one with a zero, must equal the project's.

# %%
three = torch.tensor([0.5, 0.3, 0.2])
best_of_4 = torch.tensor(closed_form.best_of_n_law(three.numpy(), [0.0, 1.0, 2.0], 4))
for one in (best_of_4, torch.tensor([0.0, 0.4, 0.6]), three):
    theirs = closed_form.kl(one.numpy(), three.numpy())
    equal(my_kl_from_ref(one, three).item(), theirs, msg="my_kl_from_ref equals closed_form.kl.")
print("my_kl_from_ref: equal to minialign's")
print(f"KL of best of 4 from ref: {my_kl_from_ref(best_of_4, three):.3f}")

# %% [markdown]
# ### The KL of best-of-n
#
# Best-of-n has a KL that depends on little but $n$. Suppose that there are many completions, all rare, with different
# rewards. Rank them by reward and let $u$ be the share of ref's probability below a completion. For a sample of ref,
# $u$ is uniform on $[0, 1]$. The best of $n$ is below $u$ if all are, with probability $u^n$, so its density is $n
# u^{n-1}$. For a sample of ref, u is uniform: its density is 1. So the KL between the two, the mean logarithm of the
# second density, is
#
# $$\int_0^1 n u^{n-1} \big(\log n + (n-1) \log u\big)\, du = \log n - \frac{n-1}{n} ,$$
#
# because the integral of $n u^{n-1} \log u$ is $-1/n$. So 8 samples give 1.20 nats, and 32 give 2.50. With few
# completions, or equal rewards, the KL is smaller: then several values of $u$ count as one outcome, and grouping
# outcomes can only lower a KL. Section 3 compares the two.
#
# ## 2. A language, and what we really want
#
# The language is that of 06, a size larger: letters a to f, at most four tokens, three prompts, 1555 completions.
# Gold, what we really want, is $0.5$ for each letter that equals the prompt, $-0.5$ for each letter three further on,
# $0.3$ for a full stop, and $-0.7 \cdot (\text{repeats})^2$. A repeat is a letter that equals the one before it.
# `unpunished` is gold without the last part. Where do the two rewards differ?

# %%
language = Language(n_content=6, max_new=4, n_prompts=3)
ref = language.law_of(tiny_gpt(language.vocab_size, seed=0, mixing=0.3))  # watch: ref (3, 1555)
EOS = language.eos_id


def count(x, y):
    """How often y holds each letter, the prompt's first (6 numbers), and the full stop."""
    return [*(y.count((x + further) % 6) for further in range(6)), y.count(EOS)]


def count_repeats(y):
    return sum(a == b for a, b in zip(y, y[1:], strict=False))


counts = torch.tensor([[count(x, y) for y in language.completions] for (x,) in language.prompts])
counts = counts.double()  # watch: counts (3, 1555, 7)
repeats = torch.tensor([count_repeats(y) for y in language.completions]).double()
unpunished = 0.5 * counts[:, :, 0] - 0.5 * counts[:, :, 3] + 0.3 * counts[:, :, 6]
unpunished = unpunished.round(decimals=6)  # watch: unpunished (3, 1555)
gold = (unpunished - 0.7 * repeats**2).round(decimals=6)  # watch: gold (3, 1555)


def text(c):
    return "".join("abcdef."[token] for token in language.completions[c])


likely = ref[0].argsort(descending=True)[[0, 1, 6, 7, 40]].tolist()
chosen_by_us = [language.index[y] for y in ((0, 1, 0, EOS), (0, 0, 0, EOS), (0, 0, 0, 0))]
print("prompt a         probability   gold   without the penalty for repeats")
for c in likely + chosen_by_us:
    print(f"   {text(c):12} {ref[0, c]:11.1e} {gold[0, c]:7.2f} {unpunished[0, c]:8.2f}")
print(f"   {'mean of ref':24} {ref[0] @ gold[0]:7.2f} {ref[0] @ unpunished[0]:8.2f}")

# %% [markdown]
# They differ only where letters repeat. `aaaa` is the extreme case. Without the penalty it is the best of all
# answers; by gold it is far below ref's mean. And it is very rare in ref.
#
# ## 3. Build it yourself: the most reward for its KL
#
# Which policy has the most reward for its KL? [05](05_inverse_rl.ipynb) showed that
# $J(\pi) = \mathbb{E}_\pi[r] - \beta\, \mathrm{KL}(\pi\|\mathrm{ref})$ is largest for
#
# $$\pi^*(y) = \frac{1}{Z}\, \mathrm{ref}(y)\, e^{r(y)/\beta} ,$$
#
# where $Z$ makes the probabilities sum to 1. We call $\pi^*$ the [tilt](../GLOSSARY.md#tilt) of ref. A smaller
# $\beta$ tilts ref further towards high rewards.
#
# The tilt answers our question too. A policy with the same KL and more reward would have a higher $J$, and there is
# none. **So the tilt has the most reward among all policies with its KL.** It is also where exact RL with a KL
# penalty ends, as you will see in 07b. So the tilt shows what a perfect RL run would do.


# %%
def my_tilt(ref, rewards, beta):
    """The tilt ∝ ref·e^{r/β}. ref, rewards (…, K), beta above 0. Return (…, K), with sum 1 over K.

    Work with logarithms: e^{r/β} is infinite for r = 2 and β = 0.001. Softmax does what is needed.
    """
    return (ref.log() + rewards / beta).softmax(-1)


def my_curve(policies, ref, proxy, gold):
    """The points of a curve. policies: a list of tensors (N, K); ref, proxy, gold (N, K).

    Return a tensor with a row of three numbers for each policy: d, the square root of the KL from
    ref; the expected proxy; the expected gold. All three are means over the N prompts. Take the
    mean of the KL before its root.
    """
    rows = []
    for policy in policies:
        d = my_kl_from_ref(policy, ref).mean().clamp(min=0).sqrt()  # watch: d ()
        rows.append(torch.stack([d, (policy * proxy).sum(1).mean(), (policy * gold).sum(1).mean()]))
    return torch.stack(rows)


# %% [markdown]
# ### Checkpoint
#
# Both must equal the project's, from a weak tilt to a very strong one.

# %%
for beta in (10.0, 0.3, 0.001):
    mine = my_tilt(ref, gold, beta)
    for x in range(3):
        theirs = torch.tensor(closed_form.tilt(ref[x].numpy(), gold[x].numpy(), beta))
        equal(mine[x], theirs, msg=f"my_tilt equals closed_form.tilt at beta = {beta}.")
trial = [my_tilt(ref, unpunished, 0.5), my_tilt(ref, unpunished, 0.1), ref]
for mine, policy in zip(my_curve(trial, ref, unpunished, gold), trial, strict=True):
    numpys = [tensor.numpy() for tensor in (ref, policy, unpunished, gold)]
    theirs = torch.tensor(overoptimization.point(*numpys))
    equal(mine, theirs, atol=1e-7, rtol=0, msg="my_curve equals overoptimization.point.")
print("my_tilt, my_curve: equal to minialign's")

# %% [markdown]
# Best-of-n has one setting, $n$, and the tilt has $\beta$. As the setting changes, the policy moves along a curve,
# from ref towards the best completions. First with gold itself as the reward. The axis is $d = \sqrt{\mathrm{KL}}$,
# as in Gao et al.: for small $d$ the tilt's reward grows in proportion to it (exercise 2). Which curve is higher?

# %%
BETAS = torch.logspace(2, -1.5, 40).tolist()  # from 100 to 0.03
NS = [2**k for k in range(15)]  # from 1 to 16384


def best_of_n(reward, n):
    """The distribution of the best of n samples from ref, (3, 1555), as you wrote it in 06."""
    pairs = zip(ref.numpy(), reward.numpy(), strict=True)
    return torch.stack([torch.tensor(closed_form.best_of_n_law(p, r, n)) for p, r in pairs])


tilts = [my_tilt(ref, gold, beta) for beta in BETAS]
winners = [best_of_n(gold, n) for n in NS]
by_gold = {"tilt": my_curve(tilts, ref, gold, gold),  # (40, 3)
           "best of n": my_curve(winners, ref, gold, gold)}  # (15, 3)
figures.reward_per_kl(by_gold)

# %% [markdown]
# The tilt is nowhere below, and best-of-n stays close to it. The next cell checks the reason: for each $\beta$, no
# best-of-n policy has a higher $J$ than the tilt.

# %%
for beta, (d, _, value) in zip(BETAS, by_gold["tilt"].tolist(), strict=True):
    J_of_n = by_gold["best of n"][:, 2] - beta * by_gold["best of n"][:, 0] ** 2
    always((J_of_n <= value - beta * d**2 + 1e-9).all().item(), "J is highest for the tilt.")

# %% [markdown]
# And the KL of best-of-n: is it below $\log n - (n-1)/n$, and by how much?

# %%
print("    n       KL   log n − (n − 1)/n   mean gold")
for n in (2, 8, 32, 128, 512):
    policies = best_of_n(gold, n)
    kl = my_kl_from_ref(policies, ref).mean().item()
    print(f"{n:5} {kl:8.3f} {kl_bound(n):19.3f} {(policies * gold).sum(1).mean():11.3f}")
    always(kl <= kl_bound(n) + 1e-9, "The KL of best-of-n is at most log n − (n − 1)/n.")

# %% [markdown]
# ## 4. A reward with a known hole
#
# Now forget the penalty for repeats. The proxy is `unpunished`, and the policies are optimised for it. Follow the two
# columns "proxy" and "gold" from top to bottom, and look at the samples.

# %%
tilts = [my_tilt(ref, unpunished, beta) for beta in BETAS]
winners = [best_of_n(unpunished, n) for n in NS]
known = {"tilt": my_curve(tilts, ref, unpunished, gold),
         "best of n": my_curve(winners, ref, unpunished, gold)}
print("tilt:  beta       d    proxy    gold    six samples for prompt a")
generator = torch.Generator().manual_seed(0)
for k in range(0, 40, 3):
    if BETAS[k] < 3:
        drawn = torch.multinomial(tilts[k][0], 6, replacement=True, generator=generator)
        d, proxy_value, gold_value = known["tilt"][k].tolist()
        print(f"     {BETAS[k]:6.3f}  {d:6.2f}  {proxy_value:6.2f}  {gold_value:6.2f}    "
              f"{' '.join(f'{text(c):5}' for c in drawn.tolist())}")

# %% [markdown]
# The same as a figure, with best-of-n. It shows what was gained over ref.

# %%
figures.proxy_and_gold(known)
for name, curve in known.items():
    peak = curve[curve[:, 2].argmax()]
    print(f"{name:10} gold {curve[0, 2]:.2f} at the start, {peak[2]:.2f} at d = {peak[0]:.2f}, "
          f"{curve[-1, 2]:.2f} at the end")
    always(bool((curve[1:, 1] >= curve[:-1, 1] - 1e-9).all()), "The proxy never falls.")
    this_run((peak[2] > curve[0, 2] + 0.3).item(), "Gold rises at first.")
    this_run((curve[-1, 2] < curve[0, 2] - 1).item(), "Gold ends far below its start.")
d, proxy_value, gold_value = known["tilt"].T.numpy()
for at, proxy_of_n, gold_of_n in known["best of n"][3:].tolist():  # from n = 8 on, at the same d
    more = np.interp(at, d, proxy_value) > proxy_of_n - 0.02  # (between two points of the curve)
    this_run(more, "At the same KL the tilt has more proxy.")
    this_run(np.interp(at, d, gold_value) < gold_of_n, "At the same KL the tilt has less gold.")

# %% [markdown]
# At first both rise: letters like the prompt's are good by both rewards. Then the proxy goes on rising and gold falls
# far below ref, until the policy writes `aaaa`. In a run you see only the proxy, and it looks like success. This is
# [over-optimisation](../GLOSSARY.md#overoptimization).
#
# At the same $d$ the tilt has more proxy than best-of-n, and less gold once gold has begun to fall. It reaches the
# hole earlier. `aaaa` is rare in ref, so it rarely is among $n$ samples, but the tilt multiplies its probability by
# $e^{r/\beta}$ however rare it is.
#
# ## 5. Build it yourself: a reward model that learns the hole
#
# We wrote this hole on purpose. Could a reward model that was trained on *correct* comparisons have one? Yes, if it
# cannot see what matters. Ours sees only the seven counts of an answer: how often it holds each letter, and the full
# stop. So `aba.` and `aab.` get the same reward from it, although gold differs by 0.7.
#
# Its reward is `counts @ weights`. It learns from pairs of ref's own completions, chosen by Bradley-Terry on gold.
# Stop in `my_linear_fit` at its first step: all weights and gaps are 0, so every comparison counts with a half.


# %%
def compare(policy, how_many, seed):
    """Comparisons of the policy's answers, (how_many, 3): numbers of prompt, chosen, rejected."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.arange(3).repeat_interleave(how_many // 3)
    each = 2 * (how_many // 3)
    drawn = torch.multinomial(policy, each, replacement=True, generator=generator).view(-1, 2)
    first, second = gold[x, drawn[:, 0]], gold[x, drawn[:, 1]]
    first_wins = torch.rand(len(x), generator=generator) < (first - second).sigmoid()
    chosen = torch.where(first_wins, drawn[:, 0], drawn[:, 1])
    return torch.stack([x, chosen, drawn.sum(1) - chosen], 1)


def my_linear_fit(features, compared, ridge=1.0, steps=1000, lr=1.0):
    """The weights (F,) of a linear reward model, by gradient descent from 0.

    features (N, K, F); compared (B, 3) holds prompt, chosen, rejected. The loss is the mean of
    −log σ(gap), where gap (B,) is the reward of chosen minus that of rejected, plus
    ridge/(2B)·|weights|². (The ridge keeps the weights finite.) The gradient of −log σ(gap) is
    −(1 − σ(gap))·(features of chosen − features of rejected).
    """
    x, chosen, rejected = compared.T
    difference = features[x, chosen] - features[x, rejected]  # watch: difference (B, F)
    weights = torch.zeros(features.shape[-1])
    for _ in range(steps):
        gap = difference @ weights  # watch: gap (B,)
        gradient = -(difference * (-gap).sigmoid()[:, None]).mean(0)
        weights = weights - lr * (gradient + ridge / len(compared) * weights)
    return weights


# %% [markdown]
# ### Checkpoint
#
# The weights must equal those of the project's optimiser. Compare them with gold's, which stand below.

# %%
compared, fresh = compare(ref, 999, seed=0), compare(ref, 9999, seed=1)  # watch: compared (999, 3)
squares = (repeats**2)[:, None].expand(3, -1, 1)  # one more feature
seeing = torch.cat([counts, squares], dim=2)  # watch: seeing (3, 1555, 8)
weights = {"blind": my_linear_fit(counts, compared), "seeing": my_linear_fit(seeing, compared)}
print("weights of the letters 0 to 5 after the prompt's, of the full stop (and of repeats²):")
for name, features in (("blind", counts), ("seeing", seeing)):
    theirs = overoptimization.fit(features, compared, 1.0).weight[0].detach()
    equal(weights[name], theirs, atol=1e-3, rtol=0, msg="my_linear_fit equals the project's fit.")
    print(f"   {name:7} {'  '.join(f'{weight:5.2f}' for weight in weights[name].tolist())}")

# %% [markdown]
# The true weights are 0.5, 0, 0, −0.5, 0, 0, 0.3 and −0.7. Of the first seven the blind model finds the right signs
# where they are not 0, and roughly the right order. Does a test on 9999 fresh comparisons warn us?


# %%
def accuracy(reward, compared):
    """How often the chosen answer has the higher reward. Equal rewards count half."""
    x, chosen, rejected = compared.T
    gap = reward[x, chosen] - reward[x, rejected]
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean().item()


proxies = {"one blind model": (counts @ weights["blind"]).round(decimals=6),
           "one that sees repeats": (seeing @ weights["seeing"]).round(decimals=6)}
for name, reward in {**proxies, "gold itself": gold}.items():
    print(f"{name:22} orders {100 * accuracy(reward, fresh):.1f} % of fresh comparisons correctly")
missed = accuracy(gold, fresh) - accuracy(proxies["one blind model"], fresh)
this_run(missed < 0.06, "The test hardly warns.")

# %% [markdown]
# Hardly. Even gold predicts only two of three choices, because the judges choose at random in part. The blind model
# is only 3 points below gold. (A difference of less than 0.5 points may be chance.) The test uses pairs from ref,
# where two and more repeats are rare. Optimisation will make them common.
#
# ## 6. Break it: try to repair the reward
#
# Four ideas, each as a proxy for the tilt:
#
# - ten times the comparisons,
# - the mean of five models, each fitted to its own comparisons,
# - asking again: blind, but with comparisons of what the *optimised policy* writes,
# - the missing feature: a model that sees repeats.
#
# Look at the last column. Which idea keeps gold from falling?

# %%
fits = [my_linear_fit(counts, compare(ref, 999, seed=10 + k)) for k in range(5)]
five = torch.stack([counts @ one for one in fits])  # watch: five (5, 3, 1555)
optimised = my_tilt(ref, proxies["one blind model"], 0.3)
asked_again = torch.cat([compared, compare(optimised, 2997, seed=3)])
proxies |= {"10 × the comparisons": counts @ my_linear_fit(counts, compare(ref, 9990, seed=2)),
            "mean of five": five.mean(0),
            "asked again": counts @ my_linear_fit(counts, asked_again)}
repaired = {}
print("proxy                   gold at its peak   at d =    gold at the end")
for name, proxy in proxies.items():
    tilts = [my_tilt(ref, proxy, beta) for beta in BETAS]
    repaired[name] = curve = my_curve(tilts, ref, proxy, gold)
    peak = curve[curve[:, 2].argmax()]
    print(f"{name:22} {peak[2]:12.2f} {peak[0]:12.2f} {curve[-1, 2]:14.2f}")
figures.repairs(repaired)
for name, curve in repaired.items():
    fall = (curve[:, 2].max() - curve[-1, 2]).item()
    as_printed = fall < 0.2 if name == "one that sees repeats" else fall > 1
    this_run(as_printed, f"Gold falls by more than 1, unless the proxy sees repeats: {name}.")

# %% [markdown]
# - **More comparisons and averages** remove *noise*, which differs from model to model. But all five models are blind
#   to the same thing, so they are wrong together. (On ensembles see Coste et al. 2023 and Eisenstein et al. 2023.)
# - **Asking again** helps more. Repeats are now common in the comparisons, and the model lowers the weights of the
#   letters for them. It still cannot tell `aba.` from `aab.`. (It has four times as many comparisons, but their
#   number is not the reason: see the row with ten times as many.)
# - **The missing feature** removes the fall.
#
# In practice nobody knows the missing feature. So three habits remain: hold the policy near ref with a KL penalty,
# stop early, and ask people again about what the policy *now* writes. (`toy/overoptimization.py` repeats this lesson
# with ten draws of the comparisons and with neural reward models.)
#
# ## What is wrong here? (1)
#
# A careful colleague stops where the reward is highest on held-out prompts. (Suppose that our three prompts are
# such.)

# %%
curve = repaired["one blind model"]
stop = int(curve[:, 1].argmax())  # where the learned reward is highest
print(f"stopped at d = {curve[stop, 0]:.2f}, reward {curve[stop, 1]:.2f}")

# %% [markdown]
# ## What is wrong here? (2)
#
# Another colleague takes the *lowest* number that five neural reward models give an answer. They were trained as in 06,
# so each has a constant of its own. Their rewards of an answer differ by a constant for each model, here 2, −1, 0, 3
# and 1.

# %%
neural = five + torch.tensor([2.0, -1, 0, 3, 1])[:, None, None]  # (5, 3, 1555)
careful = neural.amin(0)
shares = (neural == careful).double().mean((1, 2))
print("how often each model is the minimum:", shares.tolist())

# %% [markdown]
# ## What you now know
#
# - KL measures how far a policy has moved. The tilt has the most reward of all policies with its KL, and best-of-n
#   comes close here.
# - If the reward is far too high for some rare answers, more optimisation may first help and then hurt. Along the
#   tilt and best-of-n the proxy never falls, so it does not show where to stop.
# - Accuracy on the reference's pairs hardly warns, because the reference seldom writes the answers that are wrong.
# - Ensembles help against noise, not against what no member can see.
#
# Next: [07](07_policy_gradient.ipynb) trains a policy with a reward, and [07b](07b_kl.ipynb) adds the KL penalty. With it
# the training ends near the tilt.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). Try this: set `seed=5` in the reference's `tiny_gpt` (with TINKER, see [start
# here](00_start_here.ipynb)). Look at the tilt of "one blind model" in section 6. Its gold ends at the gold of one
# completion for each prompt. Which one, and what decides it?
#
# **Exercise 2** (medium, 15 minutes). Show that close to ref the tilt gains reward in proportion to $d$: the gain is
# about $\sqrt2\, \sigma d$, where $\sigma$ is the standard deviation of the reward under ref. Hint: for small
# $1/\beta$, the tilt is about $\mathrm{ref} \cdot (1 + (r - \mathbb{E}_{\mathrm{ref}}[r])/\beta)$.
#
# **Exercise 3** (hard, 20 minutes). Let the reward be $u$, uniform on $[0, 1]$. Compare best-of-n with a threshold
# $t$, as in ReST: the mean reward at equal KL, and at an equal number of samples for each kept one. Which is better
# at what?
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# Held-out *prompts* do not help: the reward on them is the same wrong reward. It rises all the way, so the colleague
# stops at the very end, where gold is lowest. Stop by something that the policy was not optimised for: fresh human
# comparisons, or a KL budget.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# Comparisons leave a constant open, so the minimum compares constants. The second model has the lowest one and nearly
# always is the minimum: an ensemble of one. First subtract from each model, for each prompt, its mean reward on the
# same answers.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
always(bool(stop == len(BETAS) - 1), "The proxy is highest at the very end.")
this_run((curve[stop, 2] < curve[0, 2]).item(), "Gold is below its start there.")
centred = neural - (ref * neural).sum(2, keepdim=True)  # (5, 3, 1555), by model and prompt
shares = (centred == centred.amin(0)).double().mean((1, 2))
print("after centring, how often each is the minimum:", shares.round(decimals=2).tolist())
this_run((neural[1] == careful).double().mean().item() > 0.8, "One model decides nearly always.")
this_run(shares.max().item() < 0.7, "After centring no single model decides.")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The tilt ends on the proxy's favourite, `proxy.argmax(1)`, however rare it is in ref. Whether this is `aaaa` or
# `aaa.` depends on two weights: that of the prompt's letter and that of the full stop. With seed 0 the letter is
# worth more (.33 against .23), with seed 5 the full stop (.57 against .29). Then there is one repeat less, and gold
# ends at −1 instead of −4.3. So how deep gold falls depends on which comparisons were drawn.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
ref_5 = language.law_of(tiny_gpt(language.vocab_size, seed=5, mixing=0.3))
weights_5 = my_linear_fit(counts, compare(ref_5, 999, seed=0))
print(f"seed 5: prompt's letter has weight {weights_5[0]:.2f}, full stop {weights_5[6]:.2f}")
trials = {name: (ref, proxies[name]) for name in ("one blind model", "asked again")}
trials["one blind model, seed 5"] = (ref_5, (counts @ weights_5).round(decimals=6))
for name, (start, proxy) in trials.items():
    favourites = proxy.argmax(1)
    end = my_curve([my_tilt(start, proxy, 1e-3)], start, proxy, gold)[0, 2].item()
    print(f"{name}: favourites {[text(c) for c in favourites.tolist()]}, gold at the end {end:.2f}")
    of_favourites = gold[range(3), favourites].mean().item()
    this_run(abs(end - of_favourites) < 1e-2, "The tilt ends on the favourite.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# Put the hint into the expected reward: the gain is $\sigma^2/\beta$. Close to ref the KL is half the mean square of
# $\pi/\mathrm{ref} - 1$, that is $\sigma^2/2\beta^2$. So $d = \sigma/(\sqrt2 \beta)$, and the gain is $\sqrt2\,
# \sigma d$.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
mean = ref[0] @ gold[0]
sigma = (ref[0] @ (gold[0] - mean) ** 2).sqrt()
for beta in (0.3, 3.0, 100.0):
    near = my_tilt(ref[0], gold[0], beta)
    d, gain = my_kl_from_ref(near, ref[0]).sqrt(), near @ gold[0] - mean
    print(f"β = {beta:5}: d = {d:.3f}, gain {gain:.4f}, √2·σ·d {math.sqrt(2) * sigma * d:.4f}")
always(abs(gain / (math.sqrt(2) * sigma * d) - 1) < 0.02, "Close to ref the gain is √2·σ·d.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Best-of-n: mean $n/(n+1)$, KL $\log n - (n-1)/n$, $n$ samples for each kept one. Threshold: mean $(1+t)/2$, KL
# $-\log(1-t)$, $1/(1-t)$ samples. At equal KL, $1/(1-t) = n e^{-(n-1)/n}$: the threshold has less reward, but needs
# only $e^{-(n-1)/n}$ of the samples, .47 for $n = 4$ and close to $1/e = .37$ for large $n$. At equal samples,
# $1/(1-t) = n$: its mean $1 - \frac{1}{2n}$ is higher, and its KL too, $\log n$. The threshold saves samples,
# best-of-n saves KL.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
u, even = (torch.arange(3000.0) + 0.5) / 3000, torch.full((3000,), 1 / 3000)
for n in (4, 16):
    best = torch.tensor(closed_form.best_of_n_law(even.numpy(), u.numpy(), n))
    print(f"best of {n}: {n} samples, KL {my_kl_from_ref(best, even):.3f}, mean {best @ u:.3f}")
    always(abs((best @ u).item() - n / (n + 1)) < 1e-3, "The mean of best-of-n is n/(n + 1).")
    for what, samples in (("equal KL", n * math.exp(-(n - 1) / n)), ("equal samples", float(n))):
        kept = even * (u > 1 - 1 / samples)
        kept = kept / kept.sum()
        print(f"   threshold, {what}: {samples:.1f} samples, KL {my_kl_from_ref(kept, even):.3f}, "
              f"mean {kept @ u:.3f}")
        always(abs((kept @ u).item() - 1 + 1 / (2 * samples)) < 1e-3, "The mean above a threshold.")
