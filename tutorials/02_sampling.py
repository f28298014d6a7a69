# %% [markdown]
# # 02 · Sampling: how a model writes
#
# **You will build** temperature, top-k and top-p, and a sampler that writes the same tokens as `minialign`'s. You
# will count how many mistakes and how many rare answers truncation removes, and see which probabilities a sampler
# must record if its samples are to be used for training.
#
# **Time:** 26 minutes of reading, 30 seconds of computer.
#
# **You need:** [01 · A GPT, from text to a loss](01_gpt.ipynb) (logits, softmax, the causal mask).
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import torch
import torch.nn.functional as F

from minialign.batch import collate
from minialign.engine.common import derive_seed
from minialign.model import GPT, GPTConfig
from minialign.sample import draw_tokens, keep_top_k, keep_top_p, sample
from minialign.task import (
    POLITE_OPENINGS,
    RUDE,
    builtin_law,
    builtin_prompts,
    builtin_texts,
    builtin_tokenizer,
)
from tutorials.checks import always, equal, this_run
from tutorials.figures import sampling as figures

torch.manual_seed(0)
torch.set_printoptions(precision=4, sci_mode=False)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The question
#
# At each position a language model gives a probability to each of V tokens, but we can write only one. Always the
# likeliest? Then a prompt always gets the same answer. Draw at random? Then the answer sometimes contains mistakes. So
# programs draw at random from a changed [distribution](../GLOSSARY.md#distribution). These are the steps between the
# [logits](../GLOSSARY.md#logits) and the token:

# %%
tokens = ["milk", "tea", "ink", "bread", "rope"]
probs = torch.tensor([[2, 8, 1, 4, 1]], dtype=torch.float64) / 16  # (B, V) = (1, 5)
figures.path(tokens, probs[0].tolist())

# %% [markdown]
# Alignment adds a second question. Many of its methods train a model on texts that it wrote itself. The model that is
# being trained is called the [policy](../GLOSSARY.md#policy), written π. The text that it is given is the
# [prompt](../GLOSSARY.md#prompt) x, the text that it adds is the completion y. Which probability must the sampler record
# for each token that the policy writes?

# %% [markdown]
# ## 1. Temperature, on five tokens
#
# The probabilities in the picture are powers of one half, so you can check the numbers on paper. Their logarithms
# serve as logits.
#
# The *temperature* τ divides the logits z before the softmax, which raises the probabilities to the power 1/τ:
#
# $$\pi_\tau(v) = \frac{e^{z_v/\tau}}{\sum_w e^{z_w/\tau}} \;\propto\; \pi(v)^{1/\tau}$$
#
# Here v is a token, and the sum runs over all tokens w. With τ = ½ the probabilities are squared: 1/64, 1/4, 1/256,
# 1/16, 1/256. Their sum is 86/256, so tea goes from 1/2 to 64/86 = 0.744. Find this number in the second row:

# %%
logits = probs.log()  # watch: logits (B, V)


def show(name, probs):
    row = zip(tokens, probs[0].tolist(), strict=True)
    print(f"{name:14}" + "  ".join(f"{token} {prob:.3f}" for token, prob in row))


for tau in (0.01, 0.5, 1.0, 2.0, 100.0):
    show(f"tau {tau:g}", (logits / tau).softmax(-1))
squares = torch.tensor([[4, 64, 1, 16, 1]], dtype=torch.float64) / 86
equal((logits / 0.5).softmax(-1), squares, msg="tau 1/2 squares the probabilities.")

# %% [markdown]
# A very small τ always takes the likeliest token, which is called *greedy*. A very large one makes all tokens equally
# likely. τ = 1 changes nothing.

# %% [markdown]
# ## 2. Forbid tokens: top-k and top-p
#
# A model gives a little probability to thousands of wrong tokens. Each is unlikely, but together they are not. Two
# rules forbid such tokens by setting their logits to −∞. The softmax then shares the probability among those that are
# kept.
#
# - **top-k** (Fan et al. 2018): keep the k likeliest tokens.
# - **top-p**, also *nucleus sampling* (Holtzman et al. 2020): keep the smallest set of likeliest tokens whose
#   probabilities sum to at least p. We call this number `mass`, and the kept set the *nucleus*.
#
# Both together are called *truncation*. The output shows the five probabilities afterwards.


# %%
def my_top_k(logits, k):
    """logits (B, V) -> the same with -inf for all but the k largest of a row (all if k >= V).

    If several tokens tie for the k-th place, all of them are kept.
    """
    k = min(k, logits.shape[-1])
    kth = logits.sort(dim=-1, descending=True).values[:, k - 1 : k]  # watch: kth (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def my_top_p(logits, mass):
    """logits (B, V) -> the same with -inf outside the nucleus, row by row.

    Walk from the likeliest token down and keep each one; stop when the kept sum reaches `mass`.
    At least one token is kept.
    """
    kept = torch.full_like(logits, -torch.inf)
    for b, row in enumerate(logits):
        collected = 0.0
        for v in row.argsort(descending=True):
            kept[b, v] = row[v]
            collected += row.softmax(-1)[v]  # watch: collected ()
            if collected >= mass:
                break
    return kept


show("top-k 2", my_top_k(logits, 2).softmax(-1))
show("top-p 0.7", my_top_p(logits, 0.7).softmax(-1))
show("top-p 0.8", my_top_p(logits, 0.8).softmax(-1))

# %% [markdown]
# Stop in `my_top_p` at its first call (mass 0.7): `collected` is 0.5 after tea and 0.75 after bread, and there it
# stops.
#
# ### Checkpoint: truncation

# %%
many = 2 * torch.randn(50, 30, generator=generator, dtype=torch.float64)
for case, some in (("five tokens", logits), ("random logits", many)):
    for k in (1, 2, 3, 4, 5, 1000):  # of the five tokens, two tie for the fourth place
        mine, theirs = my_top_k(some, k), keep_top_k(some, k)
        equal(mine, theirs, msg=f"my_top_k equals keep_top_k ({case}, k = {k}).")
    for mass in (0.1, 0.7, 0.8, 0.95):
        mine, theirs = my_top_p(some, mass), keep_top_p(some, mass)
        equal(mine, theirs, msg=f"my_top_p equals keep_top_p ({case}, mass {mass}).")
print("my_top_k and my_top_p equal the project's")

# %% [markdown]
# ## 3. Draw a token
#
# Lay the probabilities side by side on the interval from 0 to 1, as in the picture. Draw a uniform random number. The
# token whose piece it falls into is the one to write. We try sixteen numbers that are spread evenly. Each token should
# come up as often as its probability says.


# %%
def my_draw(logits, uniform):
    """logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    In each row, the first token whose cumulative probability is above `uniform`. The cumulative
    probability is the softmax, summed in the order of the vocabulary. Rounding may end this sum a
    little below 1. If no token is above `uniform` for this reason, take the last one, V - 1.
    """
    cumulative = logits.softmax(-1).cumsum(-1)  # watch: cumulative (B, V)
    return (cumulative <= uniform[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)


points = (torch.arange(16, dtype=torch.float64) + 0.5) / 16  # the middles of sixteen equal pieces
drawn = my_draw(logits.expand(16, -1), points)
print([tokens[v] for v in drawn])

# %% [markdown]
# ### Checkpoint: drawing

# %%
counts = drawn.bincount(minlength=5)
always(counts.tolist() == [2, 8, 1, 4, 1],
       "From sixteen even points, my_draw draws the tokens 2, 8, 1, 4 and 1 times.")
always(my_draw(logits, torch.ones(1)).tolist() == [4], "my_draw never gives a token above V - 1.")
uniform = torch.rand(50, generator=generator, dtype=torch.float64)
theirs = draw_tokens(many.softmax(-1), uniform)
always(torch.equal(my_draw(many, uniform), theirs), "my_draw draws what draw_tokens draws.")

# %% [markdown]
# ## 4. A policy that writes
#
# From here on we need a policy. It learns the language of requests from [start here](00_start_here.ipynb). A prompt
# names one of 24 things, and the completion asks for it, for example `ask for tea: give me tea now!`. In these texts an
# opening is polite with probability ¼, and so is an ending. There are six openings and six endings, so every prompt has
# 36 *valid* answers.
#
# Training is that of tutorial 01, with batches of 32 texts. `collate` makes rows of equal length: it fills up (*pads*)
# the shorter ones with id 0 on the right. `mask` is True where a target belongs to the text. Compare the samples before
# and after training, and from one temperature to the next:

# %%
tokenizer = builtin_tokenizer()
eos, V = tokenizer.eos_id, tokenizer.vocab_size  # id 0 begins and ends each text
rows = [tokenizer.encode(text) + [eos] for text in builtin_texts()]
torch.manual_seed(0)
policy = GPT(GPTConfig.tiny(V))
all_prompts = [[eos] + tokenizer.encode(prompt) for prompt in builtin_prompts()]  # 24
prompts = [[eos] + tokenizer.encode(f"ask for {thing}: ") for thing in ("tea", "honey", "rope")]


def print_samples(**how):
    """Print three completions of each of two prompts."""
    rollout = sample(policy, prompts[:2], n=3, max_new=40, eos_id=eos, seed=3, **how)
    for b, thing in enumerate(("tea", "honey")):
        said = [tokenizer.decode(ids) for ids in rollout.completions[3 * b : 3 * b + 3]]
        print(f"   {thing:7}", "  |  ".join(said))


print("before training")
print_samples()
STEPS = 300
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
for _ in range(STEPS):
    picked = torch.randint(len(rows), (32,), generator=generator).tolist()
    batch = collate([[eos]] * 32, [rows[i] for i in picked], pad_id=eos)
    predicted = policy(batch.inputs)[batch.mask]  # (tokens that are not padding, V)
    loss = F.cross_entropy(predicted, batch.targets[batch.mask])  # watch: loss ()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"after training, loss {loss.item():.3f}")
print("greedy")
print_samples(greedy=True)
for tau in (0.5, 1.0, 2.0):
    print(f"tau {tau:g}")
    print_samples(tau=tau)
this_run(loss.item() < 0.3, "The policy has learned most of the language.")

# %% [markdown]
# Greedy sampling always writes the same sentence for a given prompt. τ = ½ gives mostly correct sentences with some
# variety. τ = 1 is the distribution that was trained. It has more variety, and some mistakes: the policy is tiny and was
# trained briefly. At τ = 2 nearly every answer contains mistakes.

# %% [markdown]
# ## 5. Truncation removes mistakes, and rare answers
#
# We know the language, so we can count. For each setting we sample 16 answers to each of the 24 prompts, and ask two
# questions. How many are valid answers to their prompt? How many begin politely (¼ in the language)?


# %%
def measure(**how):
    """Shares of valid answers and of polite openings among 16 answers to each prompt."""
    rollout = sample(policy, all_prompts, n=16, max_new=40, eos_id=eos, seed=0, **how)
    said = [tokenizer.decode(ids) for ids in rollout.completions]
    asked = [prompt for prompt in builtin_prompts() for _ in range(16)]
    valid = sum(text in builtin_law(x, RUDE) for x, text in zip(asked, said, strict=True))
    polite = sum(text.startswith(POLITE_OPENINGS) for text in said)
    return {"valid": valid / len(said), "polite": polite / len(said)}


settings = {
    "tau 2": dict(tau=2.0),
    "tau 1": dict(),
    "top-k 4": dict(top_k=4),
    "top-p 0.95": dict(top_p=0.95),
    "top-p 0.9": dict(top_p=0.9),
    "top-p 0.7": dict(top_p=0.7),
    "tau 0.5": dict(tau=0.5),
    "greedy": dict(greedy=True),
}
table = {name: measure(**how) for name, how in settings.items()}
for name, row in table.items():
    print(f"{name:10}  valid {row['valid']:4.0%}   polite {row['polite']:4.0%}")
figures.shares([(name, row["valid"], row["polite"]) for name, row in table.items()], 0.25)
plain = table["tau 1"]
this_run(table["top-p 0.9"]["valid"] > plain["valid"] + 0.03, "top-p 0.9 makes more answers valid.")
this_run(table["top-p 0.7"]["polite"] < 0.75 * plain["polite"], "top-p 0.7 leaves fewer of them.")

# %% [markdown]
# This is why programs truncate when they *show* text: most mistakes disappear, as Holtzman et al. found for large
# models. But rare answers disappear too. Compare the polite openings of "tau 1" and "top-p 0.7". A temperature of ½ makes
# rare answers rarer too, but forbids none.
#
# **Which openings are forbidden?** The picture shows the sentence `i want honey, thank you.`. Each column lists the
# likeliest tokens of one position, from the top down. The orange box is the token that was written, which need not be the
# likeliest. Look at the first column: how many letters are above the red line, and how many above the green one?

# %%
completion = "i want honey, thank you."
ids = prompts[1] + tokenizer.encode(completion) + [eos]
with torch.no_grad():
    every = policy(torch.tensor([ids[:-1]]))[0].double()
seen = every[len(prompts[1]) - 1 :]  # watch: seen (T, V), a row for each token of the completion
best = seen.softmax(-1).topk(6)
labels = ["⏎" if v == eos else tokenizer.decode([v]).replace(" ", "␣") for v in range(V)]
ranked = [
    [(labels[v], prob) for v, prob in zip(vs, ps, strict=True)]
    for vs, ps in zip(best.indices.tolist(), best.values.tolist(), strict=True)
]
kept = my_top_p(seen, 0.9).isfinite().sum(-1)  # how many tokens it keeps, (T,)
figures.choices([*completion.replace(" ", "␣"), "⏎"], ranked, kept.tolist(), k=4)
print("first letter:", {letter: round(prob, 3) for letter, prob in ranked[0][:5]})
nucleus = my_top_p(seen[:1], 0.7)[0].isfinite().nonzero().flatten().tolist()
print("top-p 0.7 keeps there:", *[labels[v] for v in nucleus])
this_run(len(nucleus) < 5, "Five first letters are right, and top-p 0.7 keeps fewer.")

# %% [markdown]
# Top-p 0.9 keeps one token where only one is plausible, and up to four elsewhere. Top-k 4 always keeps four, also where
# three of them are wrong.
#
# At the first letter five are right. The three rude openings (¼ each) and the three polite ones (1/12 each) begin with
# `i` (one of each kind), `g`, `h`, `m` and `c`. Top-p 0.7 forbids `m` and `c` here, so `may i have` and `could i get`
# cannot be written. If a [reward](../GLOSSARY.md#reward) is given for these openings, training on such samples never
# finds it. So: **truncate for display, not for training.**

# %% [markdown]
# ## 6. The whole sampler
#
# Now all parts together. The sampler also records the log-prob of each token that it writes, after the temperature and
# *before* truncation. Section 7 says what for.
#
# One detail is new. If all rows of a batch share one random generator, a sample depends on what else is in the batch.
# So each completion gets a generator of its own. `derive_seed` makes its seed from the seed of the run, the prompt, and
# the number of the sample.


# %%
def uniforms_of(seed, prompt, number, max_new):
    """The random numbers of one completion, (max_new,)."""
    own = torch.Generator().manual_seed(derive_seed(seed, tuple(prompt), number))
    return torch.rand(max_new, generator=own, dtype=torch.float64)


def my_sample(policy, prompts, *, max_new, tau, top_k, top_p, seed):
    """-> (completions, all_logps): for each prompt (a list of ids) a list of ids, and of floats.

    Row by row and token by token: run the policy on prompt + completion so far, divide the last
    logits by tau, then my_top_k, my_top_p, and my_draw with the next of the max_new numbers
    uniforms_of(seed, prompt, 0, max_new). Record the log-prob after tau and before truncation.
    Stop after `eos` (which is kept) or max_new tokens.
    """
    completions, all_logps = [], []
    for prompt in prompts:
        uniforms, completion, logps = uniforms_of(seed, prompt, 0, max_new), [], []
        for t in range(max_new):
            inputs = torch.tensor([prompt + completion])  # watch: inputs (1, T)
            logits = policy(inputs)[:, -1] / tau
            token = my_draw(my_top_p(my_top_k(logits, top_k), top_p), uniforms[t : t + 1])
            completion.append(int(token))
            logps.append(logits.log_softmax(-1)[0, token].item())
            if completion[-1] == eos:
                break
        completions.append(completion)
        all_logps.append(logps)
    return completions, all_logps


# %% [markdown]
# ### Checkpoint: the same tokens as minialign's sampler
#
# Yours is slow and short enough to be checked by reading. `minialign`'s writes all rows at once. It also keeps the keys
# and values of earlier positions (the *KV cache*): with the causal mask they do not change when a token is appended.

# %%
how = dict(max_new=40, tau=1.3, top_k=8, top_p=0.95, seed=3)
with torch.no_grad():
    completions, all_logps = my_sample(policy, prompts, **how)
rollout = sample(policy, prompts, eos_id=eos, **how)
for mine, theirs in zip(completions, rollout.completions, strict=True):
    print(tokenizer.decode(mine), "|", tokenizer.decode(theirs))
always(completions == rollout.completions, "my_sample writes the same tokens as sample.")
flat = torch.tensor([logp for logps in all_logps for logp in logps])
recorded = rollout.old_logps[rollout.mask]
equal(flat, recorded, atol=1e-3, rtol=0, msg="my_sample records sample's log-probs.")

# %% [markdown]
# ## 7. What the recorded log-probs are for
#
# Sampling is slow, so methods use each sample for several updates. After the first update the policy π is no longer the
# policy $\pi_{\text{old}}$ that wrote the sample. There is an exact correction. For any function f,
#
# $$\sum_y \pi(y|x)\, f(y) = \sum_y \pi_{\text{old}}(y|x)\, \frac{\pi(y|x)}{\pi_{\text{old}}(y|x)}\, f(y)$$
#
# if $\pi_{\text{old}}(y|x) > 0$ wherever $\pi(y|x) > 0$. On the left is the average of f over π. On the right is an
# average over $\pi_{\text{old}}$, which samples of $\pi_{\text{old}}$ can estimate: each one is multiplied by
# $\pi/\pi_{\text{old}}$, its *importance weight*. A completion is written token by token, so its weight is the product
# of the [probability ratios](../GLOSSARY.md#ratio) of all its tokens,
#
# $$\rho_t = \frac{\pi(y_t \mid x, y_{<t})}{\pi_{\text{old}}(y_t \mid x, y_{<t})}
# = e^{\,\texttt{logps}_t - \texttt{old\_logps}_t}.$$
#
# PPO (08) gives each token its own ratio instead of the product. This is an approximation, which is good while
# their product over the completion is near 1 too.
#
# So the sampler must record `old_logps`, the log-probability of each token that it writes. There is a simple test for
# such a record. **Before the first update both policies are the same, so every ratio must be 1.** The second line of the
# output shows a program that forgot to divide by τ:


# %%
def logps_of(policy, batch, tau):
    """The log-probs of the targets, (B, T)."""
    logps = (policy(batch.inputs) / tau).log_softmax(-1)
    return logps.gather(-1, batch.targets[..., None]).squeeze(-1)


rollout = sample(policy, prompts, n=20, tau=0.8, top_p=0.8, max_new=40, eos_id=eos, seed=0)
mask = rollout.mask  # (B, T), True for tokens of the completion
with torch.no_grad():
    logps = logps_of(policy, rollout, tau=0.8)  # watch: logps (B, T)
    forgot_tau = logps_of(policy, rollout, tau=1.0)
ratio = (logps - rollout.old_logps).exp()[mask]  # watch: ratio (completion tokens,)
forgotten = (forgot_tau - rollout.old_logps).exp()[mask]
print(f"right:         ratios between {ratio.min():.4f} and {ratio.max():.4f}")
print(f"tau forgotten: ratios between {forgotten.min():.4f} and {forgotten.max():.4f}")
always((ratio - 1).abs().max() < 1e-3, "The ratio of an unchanged policy is 1.")
always((forgotten - 1).abs().max() > 0.01, "Another temperature gives other ratios.")

# %% [markdown]
# ## Break it: record the truncated probabilities
#
# The tokens above were drawn with top-p 0.8. What happens if the sampler records the probabilities *after* truncation?
# Truncation divides each kept probability by the sum S of all kept ones. So the ratio of an unchanged policy becomes
# π / (π / S) = S, which is at most 1. The output shows S for the tokens, and its product over a completion.

# %%
with torch.no_grad():
    tempered = policy(rollout.inputs).double() / 0.8  # (B, T, V)
truncated = keep_top_p(tempered.flatten(0, 1), 0.8).view_as(tempered)
kept_sum = (tempered.softmax(-1) * truncated.isfinite()).sum(-1)  # watch: kept_sum (B, T)
recorded = truncated.log_softmax(-1).gather(-1, rollout.targets[..., None]).squeeze(-1)
with_truncated = (logps.double() - recorded).exp()[mask]  # the ratio, (completion tokens,)
equal(with_truncated, kept_sum[mask], atol=1e-3, rtol=0, msg="The ratio is the kept sum S.")
per_completion = kept_sum.masked_fill(~mask, 1.0).prod(1)  # (B,)
print(f"ratio of a token: mean {with_truncated.mean():.3f}, smallest {with_truncated.min():.3f}")
print(f"product over a completion: {per_completion.mean():.3f} on average")
this_run(per_completion.mean() < 0.9, "The mean product over a completion is below 0.9.")

# %% [markdown]
# A method such as PPO takes a ratio below 1 as a sign that the policy has changed since sampling. Here it has not
# changed. If the sampler records log π instead, the ratio is 1, and the truncation goes unnoticed. In both cases the
# forbidden texts are never sampled, so no weight can correct for them: the condition of section 7 does not hold. So do
# not truncate when you sample for training. Then the two records are the same.

# %% [markdown]
# ## What is wrong here? (1)
#
# A shorter top-p: sort, add up, keep what is within the mass. Compare its output with section 2.


# %%
def short_top_p(logits, mass):
    ordered, order = logits.sort(dim=-1, descending=True)
    inside = ordered.softmax(-1).cumsum(-1) <= mass
    return logits.masked_fill(~inside.scatter(1, order, inside), -torch.inf)


show("top-p 0.7", short_top_p(logits, 0.7).softmax(-1))
show("top-p 0.4", short_top_p(logits, 0.4).softmax(-1))

# %% [markdown]
# ## What is wrong here? (2)
#
# Two tokens are drawn one after the other, both from the five-token distribution. Independent draws would agree with
# probability 1/64 + 1/4 + 1/256 + 1/16 + 1/256 = 0.336. The seeds differ, and the first tokens have the right
# frequencies, up to noise. What is wrong?


# %%
def two_tokens(seed):
    written = []
    for _ in range(2):
        own = torch.Generator().manual_seed(seed)
        written.append(int(my_draw(logits, torch.rand(1, generator=own, dtype=torch.float64))))
    return written


draws = torch.tensor([two_tokens(seed) for seed in range(4000)])
show("first token", draws[:, 0].bincount(minlength=5)[None] / len(draws))
print(f"second equals first: {(draws[:, 0] == draws[:, 1]).float().mean():.3f}")

# %% [markdown]
# ## What you now know
#
# - Temperature raises probabilities to the power 1/τ; top-k and top-p forbid unlikely tokens; a uniform number picks
#   one of the others.
# - Truncation removes mistakes and everything rare. Use it to show text, not to sample for training.
# - A sampler records log-probs after the temperature and before truncation. Then the ratio of an unchanged policy is 1.
#   The record does not show whether the sampler truncated.
# - The product of a completion's ratios is its importance weight, which turns an average over old samples into one over
#   the present policy.
# - A sample should depend on its seed and prompt only, not on the batch.
#
# Next: [03](03_logps.ipynb), the log-probability of a completion.
#
# ## Exercises
#
# 1. **Try this** (easy, 5 minutes). Add `top-p 0.99` and `top-p 0.5` to `settings` in section 5. Write down first
#    what you expect for the two columns.
# 2. **Gumbel-max** (medium, 10 minutes). Add $-\ln(-\ln u_v)$ to each logit, with one uniform number $u_v$ per token,
#    and take the largest. Show by counting that this draws from the softmax (Gumbel 1954; Maddison et al. 2014).
# 3. **Cooling each token is not cooling the whole text** (hard, 15 minutes). *Cooling* means a τ below 1. A language has
#    three texts. The first token is A (0.6) or B (0.4). After A comes 1 or 2, with ½ each; after B nothing. Compute the
#    distribution of texts when each *token* is drawn at τ = ½, and the distribution proportional to (probability of the
#    text)^(1/τ). Which text does greedy write, and which is likeliest?

# %% [markdown]
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# It drops the token that crosses the mass. Tea has 0.5 and bread makes it 0.75, so with mass 0.7 bread is thrown away
# and only tea stays. At mass 0.4 even tea is thrown away: everything is forbidden and the softmax gives NaN. Keep a
# token if the sum *before* it is below the mass: `cumsum - prob < mass`.
#
# </details>

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The generator is made again for every token, so every token of a text gets the same random number. Single tokens
# look right, texts do not. Make the generator once per completion.
#
# </details>

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# 0.99 keeps nearly everything: it removes some of the mistakes and almost no polite openings. 0.5 makes nearly every
# answer valid, and few answers begin politely.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for mass in (0.99, 0.5):
    row = measure(top_p=mass)
    print(f"top-p {mass}  valid {row['valid']:.0%}  polite {row['polite']:.0%}")
this_run(row["polite"] < plain["polite"], "top-p 0.5 leaves fewer polite openings than tau 1.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# $e_v = -\ln u_v$ is an exponential random number: $P(e_v > t) = e^{-t}$. The largest $z_v - \ln e_v$ belongs to the
# smallest $t_v = e_v\,e^{-z_v}$. With $w_v = e^{z_v}$, $P(t_v > t) = e^{-w_v t}$. So $t_v$ is the smallest with
# probability $\int_0^\infty w_v e^{-w_v t} \prod_{j \ne v} e^{-w_j t}\,dt = w_v / \sum_j w_j$. This is the softmax.
# With 100,000 draws a frequency is off by about 0.0016 (one standard deviation).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
u = torch.rand(100_000, 5, generator=generator, dtype=torch.float64).clamp(min=1e-12)
frequency = (logits - (-u.log()).log()).argmax(-1).bincount(minlength=5) / 100_000
show("softmax", probs)
show("gumbel-max", frequency[None])
always((frequency - probs[0]).abs().max() < 0.01, "Gumbel-max draws from the softmax.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Token by token, A gets 0.36 / (0.36 + 0.16) = 9/13, and its two texts share that: 9/26, 9/26, and 8/26 for B.
# Squaring whole texts gives 0.09 : 0.09 : 0.16, that is 9/34, 9/34, 16/34. Greedy writes a text that begins with A,
# but the likeliest text is B. Cooling tokens favours openings with many ways to go on.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
whole = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)  # A1, A2, B
start = torch.tensor([0.6, 0.4], dtype=torch.float64) ** 2
start = start / start.sum()
by_token = torch.stack([start[0] / 2, start[0] / 2, start[1]])
by_text = whole**2 / (whole**2).sum()
print("each token cooled:", by_token, " whole text cooled:", by_text)
expected = torch.tensor([[9, 9, 8], [9, 9, 16]], dtype=torch.float64)
equal(by_token, expected[0] / 26, msg="Cooling each token gives 9, 9, 8 of 26.")
equal(by_text, expected[1] / 34, msg="Cooling the whole text gives 9, 9, 16 of 34.")
