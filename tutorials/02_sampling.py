# %% [markdown]
# # 02 · Sampling: how a model writes
#
# **You will build** temperature, top-k and top-p, and a sampler that writes the same tokens as `minialign`'s. You
# will count how many mistakes and how many rare answers truncation removes, and see which probabilities a sampler
# must record if its samples are to be used for training.
#
# **Time:** 30 minutes of reading, 30 seconds of computer.
#
# **You need:** [01](01_gpt.ipynb) A GPT, from text to a loss (logits, softmax, the causal mask, the KV cache).
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

import torch
import torch.nn.functional as F

from minialign.batch import collate
from minialign.engine.common import derive_seed
from minialign.model import GPT, GPTConfig, KVCache
from minialign.sample import draw_tokens, keep_top_k, keep_top_p, sample
from minialign.task import (
    POLITE_ENDINGS,
    POLITE_OPENINGS,
    RUDE_ENDINGS,
    RUDE_OPENINGS,
    THINGS,
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
# being trained is called the [policy](../GLOSSARY.md#policy), written π, whatever it is trained on. The text that it
# is given is the [prompt](../GLOSSARY.md#prompt) x, the text that it adds is the completion y. Which probability must
# we record for each token that the policy writes?

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
# 1/16, 1/256. Their sum is 86/256, so tea goes from 1/2 to 64/86 = 0.744.

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
# likely.
#
# **Entropy** measures in one number how open the choice is: the average of −log π(v). Its unit is the
# [nat](../GLOSSARY.md#nats), because the logarithm is natural. A choice among n equally likely tokens has entropy ln
# n. So $e^{entropy}$ reads as "about so many choices".


# %%
def my_entropy(logits):
    """logits (..., V) -> the entropy of their softmax in nats, (...,): -(sum of p * log p).

    A logit may be -inf. Then p is 0 and the token adds 0 (but 0 * -inf is NaN: avoid that product).
    """
    logps = logits.log_softmax(-1)  # watch: logps (..., V)
    return -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)


for tau in (0.5, 1.0, 2.0):
    entropy = my_entropy(logits / tau).item()
    print(f"tau {tau:g}: {entropy:.3f} nats, about {math.exp(entropy):.2f} choices of 5")

# %% [markdown]
# ### Checkpoint: entropy

# %%
many = (2 * torch.randn(50, 30, generator=generator, dtype=torch.float64)).requires_grad_()
mine, theirs = my_entropy(many), torch.distributions.Categorical(logits=many).entropy()
meaning = "my_entropy equals the entropy of torch.distributions"
equal(mine, theirs, msg=f"{meaning}.")
grads = [torch.autograd.grad(h.sum(), many)[0] for h in (mine, theirs)]
equal(*grads, msg=f"{meaning}, also in its gradient.")
many = many.detach()
coin = torch.tensor([0.0, 0.0, -torch.inf])  # two equal tokens and a forbidden one
equal(my_entropy(coin).item(), math.log(2), msg="my_entropy of this coin is ln 2.")

# %% [markdown]
# ## 2. Forbid tokens: top-k and top-p
#
# A model gives a little probability to thousands of wrong tokens. Each is unlikely, but together they are not. Two
# rules forbid such tokens by setting their logits to −∞. The softmax then shares the probability among those that are
# kept.
#
# - **top-k** (Fan et al. 2018): keep the k likeliest tokens.
# - **top-p**, also *nucleus sampling* (Holtzman et al. 2020): keep the smallest set of likeliest tokens whose
#   probabilities sum to at least p. We call this number `mass`.


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
# The order is: temperature, then top-k, then top-p. A higher temperature moves probability from likely tokens to
# unlikely ones, so top-p 0.7 keeps more tokens.
#
# ### Checkpoint: truncation

# %%
for case, some in (("five tokens", logits), ("random logits", many)):
    for k in (1, 2, 3, 4, 5, 1000):  # of the five tokens, two tie for the fourth place
        mine, theirs = my_top_k(some, k), keep_top_k(some, k)
        equal(mine, theirs, msg=f"my_top_k equals keep_top_k ({case}, k = {k}).")
    for mass in (0.1, 0.7, 0.8, 0.95):
        mine, theirs = my_top_p(some, mass), keep_top_p(some, mass)
        equal(mine, theirs, msg=f"my_top_p equals keep_top_p ({case}, mass {mass}).")
for tau in (0.5, 1.0, 2.0):
    kept = my_top_p(logits / tau, 0.7).isfinite().sum().item()
    print(f"tau {tau:g}: top-p 0.7 keeps {kept} of 5")

# %% [markdown]
# ## 3. Draw a token
#
# Lay the probabilities side by side on the interval from 0 to 1, as in the picture. Draw a uniform random number. The
# token whose piece it falls into is the one to write.


# %%
def my_draw(logits, uniform):
    """logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    In each row, the first token whose cumulative probability is above `uniform`. The cumulative
    probability is the softmax, summed in the order of the vocabulary.
    """
    cumulative = logits.softmax(-1).cumsum(-1)  # watch: cumulative (B, V)
    return (cumulative <= uniform[:, None]).sum(-1)


points = (torch.arange(16, dtype=torch.float64) + 0.5) / 16  # the middles of sixteen equal pieces
drawn = my_draw(logits.expand(16, -1), points)
print([tokens[v] for v in drawn])

# %% [markdown]
# ### Checkpoint: drawing

# %%
counts = drawn.bincount(minlength=5)
always(counts.tolist() == [2, 8, 1, 4, 1],
       "From sixteen even points, my_draw draws the tokens 2, 8, 1, 4 and 1 times.")
uniform = torch.rand(50, generator=generator, dtype=torch.float64)
theirs = draw_tokens(many.softmax(-1), uniform)
always(torch.equal(my_draw(many, uniform), theirs), "my_draw draws what draw_tokens draws.")

# %% [markdown]
# ## 4. A language, and a policy that writes it
#
# From here on we need a policy. It learns a small artificial language, which most tutorials use. A prompt names one
# of 24 things, and the completion asks for it, politely or rudely:

# %%
texts = builtin_texts()
print(*texts[:5], sep="\n")
print("openings:", *POLITE_OPENINGS, "|", *RUDE_OPENINGS, sep="  ")
print("endings: ", *POLITE_ENDINGS, "|", *RUDE_ENDINGS, sep="  ")

# %% [markdown]
# There are three polite and three rude openings, and the same for endings. In these texts an opening is polite with
# probability ¼; then each of the three polite ones is equally likely. The ending is chosen in the same way,
# independently. So every prompt has 6 · 6 = 36 valid answers, and we know the probability of each.
#
# Training is that of tutorial 01, with batches of 32 texts. `collate` makes rows of equal length by *padding* the
# shorter ones with id 0 on the right; `mask` is True where a target belongs to the text.

# %%
tokenizer = builtin_tokenizer()
eos, V = tokenizer.eos_id, tokenizer.vocab_size  # id 0 begins and ends each text
rows = [tokenizer.encode(text) + [eos] for text in texts]
torch.manual_seed(0)
policy = GPT(GPTConfig.tiny(V))
things = ("tea", "honey", "a lamp", "rope")
prompts = [[eos] + tokenizer.encode(f"ask for {thing}: ") for thing in things]


def print_samples(**how):
    """Print three completions of each of three prompts."""
    rollout = sample(policy, prompts[:3], n=3, max_new=40, eos_id=eos, seed=3, **how)
    for b, thing in enumerate(things[:3]):
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
# Greedy sampling always writes the same sentence for a given prompt. τ = ½ gives correct sentences with some variety.
# τ = 1 is the distribution that was trained. It has more variety, and some mistakes: the policy is tiny and was trained
# briefly, so it may misspell a word or ask for another thing than the prompt names. At τ = 2 hardly a word is right.

# %% [markdown]
# ## 5. Truncation removes mistakes, and rare answers
#
# We know the language, so we can count. For each setting we sample 16 answers to each of the 24 prompts, and ask
# three things. How many are valid answers to their prompt? How many begin politely (¼ in the language)? How many of
# the 36 combinations of opening and ending occur?

# %%
all_prompts = [[eos] + tokenizer.encode(f"ask for {thing}: ") for thing in THINGS]
openings, endings = POLITE_OPENINGS + RUDE_OPENINGS, POLITE_ENDINGS + RUDE_ENDINGS
pairs = [(opening, ending) for opening in openings for ending in endings]  # 36


def measure(**how):
    """Shares of valid answers and of polite openings, number of combinations, invalid texts."""
    rollout = sample(policy, all_prompts, n=16, max_new=40, eos_id=eos, seed=0, **how)
    used, polite, invalid = [], 0, []
    for b, ids in enumerate(rollout.completions):
        thing, text = THINGS[b // 16], tokenizer.decode(ids)
        valid = {f"{opening} {thing}{ending}": (opening, ending) for opening, ending in pairs}
        polite += text.startswith(POLITE_OPENINGS)
        if text in valid:
            used.append(valid[text])
        else:
            invalid.append(f"{thing}: {text}")
    n = len(rollout.completions)
    return len(used) / n, polite / n, len(set(used)), invalid


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
for name, (valid, polite, combinations, _) in table.items():
    print(f"{name:10}  valid {valid:4.0%}   polite {polite:4.0%}   combinations {combinations:2}")
print("\ninvalid at tau 1, for example:", *table["tau 1"][3][:40:8], sep="\n  ")
figures.shares([(name, valid, polite) for name, (valid, polite, *_) in table.items()], 0.25)
this_run(table["top-p 0.9"][0] > table["tau 1"][0] + 0.03, "top-p 0.9 makes more answers valid.")
this_run(table["top-p 0.7"][1] < 0.6 * table["tau 1"][1], "top-p 0.7 leaves few polite openings.")

# %% [markdown]
# This is why programs truncate when they *show* text: most mistakes disappear, as Holtzman et al. found for large
# models. But rare answers disappear too. With top-p 0.7 far fewer answers begin politely, although the policy knows
# how. A temperature of ½ has the same effect, and greedy sampling has one answer for each prompt. Section 6 shows why
# top-k 4 removes fewer mistakes, and that some openings can no longer be written at all. A method that learns from a
# [reward](../GLOSSARY.md#reward) for such openings would never see one. So: **truncate for display, not for
# training.**

# %% [markdown]
# ## 6. Where does the policy have a choice?
#
# At some positions it has a real choice, at others none. The picture shows the sentence `i want honey, thank you.`.
# Each column lists the likeliest tokens of one position, from the top down. The orange box is the token that was
# written, which need not be the likeliest.

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

first = {letter: round(prob, 3) for letter, prob in ranked[0][:5]}
twelfths = torch.tensor([4.0, 3.0, 3.0, 1.0, 1.0])  # i, h, g, m, c in the language
in_language = my_entropy(twelfths.log()).item()
print("first letter:", first)
print(f"its entropy: {my_entropy(seen[0]).item():.2f} nats, in the language {in_language:.2f}")
nucleus = my_top_p(seen[:1], 0.7)[0].isfinite().nonzero().flatten().tolist()
print("top-p 0.7 keeps there:", *[labels[v] for v in nucleus])
this_run(abs(my_entropy(seen[0]).item() - in_language) < 0.3, "The two entropies are close.")

# %% [markdown]
# The red line follows the choice: top-p 0.9 keeps one token where only one is plausible, and up to four elsewhere.
# Top-k 4 always keeps four. Where only one letter is right, it also keeps three wrong ones. At the first letter five
# are right, and here both rules forbid the fifth, `m`.
#
# There are three polite openings (1/12 each) and three rude ones (1/4 each). One polite and one rude opening begin
# with `i`, so P(i) = 1/12 + 1/4. The other polite ones begin with `m` and `c`. Top-p 0.7 forbids both letters here,
# so `may i have` and `could i get` cannot be written.
#
# Why is τ = 2 so bad? A high temperature gives probability to every token, also where only one letter is right. In a
# sentence of some twenty letters, some then go wrong:

# %%
after, inside = completion.index(","), completion.index("ney")
places = {"first letter": 0, "after “honey”": after, "inside “honey”": inside}
taus = torch.logspace(-1, 1, 60, dtype=torch.float64)
curves = {name: [my_entropy(seen[t] / tau).item() for tau in taus] for name, t in places.items()}
figures.entropies(taus.tolist(), curves, math.log(V))

# %% [markdown]
# ## 7. The probabilities that a sampler must record
#
# Methods that train on their own samples often use each sample for several updates, because sampling is slow. After
# the first update the policy is no longer the one that wrote the sample. To correct for that, they multiply what each
# token adds to the loss by the token's [probability ratio](../GLOSSARY.md#ratio):
#
# $$\rho_t = \frac{\pi(y_t \mid x, y_{<t})}{\pi_{\text{old}}(y_t \mid x, y_{<t})}
# = e^{\,\texttt{logps}_t - \texttt{old\_logps}_t}$$
#
# $\pi_{\text{old}}$ is the policy at the time of sampling. So the sampler records `old_logps`, the log-probability of
# each token that it writes. Here is the test of it: **before the first update both policies are the same, so every
# ratio must be 1.** `sample` records the log-probs after the temperature and *before* truncation.


# %%
def logps_of(policy, batch, tau):
    """The log-probs of the targets, (B, T)."""
    logps = (policy(batch.inputs) / tau).log_softmax(-1)
    return logps.gather(-1, batch.targets[..., None]).squeeze(-1)


how = dict(tau=0.8, top_p=0.8, max_new=40, eos_id=eos, seed=0)
rollout = sample(policy, prompts, n=16, **how)  # B = 64: inputs, targets, mask, old_logps (B, T)
mask = rollout.mask  # True for tokens of the completion
with torch.no_grad():
    logps = logps_of(policy, rollout, tau=0.8)  # watch: logps (B, T)
    forgot_tau = logps_of(policy, rollout, tau=1.0)
ratio = (logps - rollout.old_logps).exp()[mask]  # watch: ratio (completion tokens,)
forgotten = (forgot_tau - rollout.old_logps).exp()[mask]
print(f"ratios between {ratio.min():.4f} and {ratio.max():.4f}")
print(f"with tau forgotten: between {forgotten.min():.3f} and {forgotten.max():.3f}")
always((ratio - 1).abs().max() < 1e-3, "The ratio of an unchanged policy is 1.")
always((forgotten - 1).abs().max() > 0.01, "Another temperature gives other ratios.")

# %% [markdown]
# ## 8. Break it: record the truncated probabilities
#
# The tokens were drawn from the truncated distribution. What happens if the sampler records *its* probabilities?
# Truncation divides each kept probability by the sum S of all kept ones. So the ratio of an unchanged policy becomes
# π / (π / S) = S, which is below 1.

# %%
with torch.no_grad():
    tempered = policy(rollout.inputs).double()[mask] / 0.8  # (completion tokens, V)
truncated = keep_top_p(tempered, 0.8)
targets = rollout.targets[mask][:, None]
inside = truncated.isfinite()
kept_sum = (tempered.softmax(-1) * inside).sum(-1)  # watch: kept_sum (completion tokens,)
all_ratios = (tempered.log_softmax(-1) - truncated.log_softmax(-1)).exp()
to_truncated = all_ratios.gather(1, targets).squeeze(1)
equal(to_truncated, kept_sum, msg="The ratio to the truncated probability is the kept sum.")
ones = torch.ones(mask.shape, dtype=torch.float64)
per_completion = ones.masked_scatter(mask, to_truncated).prod(1)
print(f"ratio of a token: mean {to_truncated.mean():.3f}, smallest {to_truncated.min():.3f}")
print(f"product over a completion: {per_completion.mean():.3f} on average")
this_run(per_completion.mean() < 0.8, "The mean product over a completion is below 0.8.")

# %% [markdown]
# Per token the ratio is near 1, over a completion it is not. The product is the **correct** importance weight: the
# completion's probability under the full policy, divided by that under the sampler. Its mean estimates how likely the
# full policy, at τ = 0.8, is to write only kept tokens.
#
# But methods read a ratio below 1 as a policy that has moved since it wrote the sample, and this one has not. With log
# π as the record the ratio is 1, and the method does not notice the truncation. Neither record brings back the
# forbidden texts. So do not truncate when you sample for training: then both records agree.

# %% [markdown]
# ## 9. Many prompts at once
#
# **Random numbers.** If the rows of a batch share one generator, a sample depends on what else is in the batch, and
# an experiment changes with its batch size. So each row gets its own generator, seeded by the seed, the prompt, and
# the number of the sample. (`derive_seed` turns any values into a seed.)


# %%
def uniforms_of(seed, prompt, number, max_new):
    """The random numbers of one completion, (max_new,)."""
    own = torch.Generator().manual_seed(derive_seed(seed, tuple(prompt), number))
    return torch.rand(max_new, generator=own, dtype=torch.float64)


how = dict(top_p=0.9, max_new=40, eos_id=eos, seed=5)
alone, together = sample(policy, prompts[2:3], **how), sample(policy, prompts, n=2, **how)
print(tokenizer.decode(alone.completions[0]), "|", tokenizer.decode(together.completions[4]))
always(alone.completions[0] == together.completions[4], "A sample does not depend on the batch.")

# %% [markdown]
# **Lengths.** The rows of a tensor are equally long, and prompts are not. Padding on the *right* changes nothing: the
# causal mask hides what comes later. Padding on the *left* puts foreign tokens before the prompt, and every token sees
# them (unless they are masked as well, as many libraries do):

# %%
lengths = torch.tensor([len(prompt) for prompt in prompts])
longest = int(lengths.max())
padding = [[0] * (longest - len(prompt)) for prompt in prompts]
right = torch.tensor([prompt + pad for prompt, pad in zip(prompts, padding, strict=True)])
left = torch.tensor([pad + prompt for prompt, pad in zip(prompts, padding, strict=True)])
with torch.no_grad():
    singles = [policy(torch.tensor([prompt]))[:, -1] for prompt in prompts]  # (1, V) each
    one_by_one = torch.cat(singles)  # (B, V)
    gap_right = (policy(right)[torch.arange(4), lengths - 1] - one_by_one).abs().amax(1)
    gap_left = (policy(left)[:, -1] - one_by_one).abs().amax(1)
for b, thing in enumerate(things):
    gaps = f"{gap_right[b]:.4f} (right), {gap_left[b]:.4f} (left)"
    print(f"{thing:7} {len(padding[b])} of padding   logits differ by {gaps}")
always(gap_right.max() < 1e-3, "Padding on the right changes no logit.")
always(gap_left.max() > 1e-2, "Padding on the left changes logits.")

# %% [markdown]
# When the rows grow, each writes its next token at its **own** position, over its padding. The KV cache stores the
# length of each row. Below, the likeliest token is appended twelve times:

# %%
cache = KVCache(policy.config, len(prompts), longest + 12)
columns = []
with torch.no_grad():
    last = policy(right, cache=cache, lengths=lengths)[torch.arange(4), lengths - 1]
    for step in range(12):
        if step < 3:
            print(f"step {step}: lengths {cache.lengths.tolist()}")
        columns.append(last.argmax(-1))
        last = policy(columns[-1][:, None], cache=cache)[:, -1]
print([tokenizer.decode(ids) for ids in torch.stack(columns, dim=1).tolist()])

# %% [markdown]
# ## 10. The whole sampler
#
# Everything together, one row at a time and without a cache: slow, and short enough to be checked by reading.


# %%
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
# ### Checkpoint: the same tokens as minialign's batched sampler

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
# - A sampler records log-probs after the temperature and before truncation. Then the ratio of an unchanged policy is
#   exactly 1. The record does not show whether the sampler truncated.
# - A sample should depend on its seed and prompt only, not on the batch.
#
# Next: [03](03_logps.ipynb), the log-probability of a completion.
#
# ## Exercises
#
# 1. **Try this** (easy, 5 minutes). Add `top-p 0.99` and `top-p 0.5` to `settings` in section 5. Write down first
#    what you expect for the three columns.
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
# 0.99 keeps nearly everything: it removes many of the mistakes and almost no polite openings. 0.5 makes nearly every
# answer valid and leaves a few rude combinations.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for mass in (0.99, 0.5):
    valid, polite, combinations, _ = measure(top_p=mass)
    print(f"top-p {mass}  valid {valid:.0%}  polite {polite:.0%}  combinations {combinations}")
this_run(combinations < table["tau 1"][2], "top-p 0.5 leaves fewer combinations than tau 1.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# $e_v = -\ln u_v$ is an exponential random number. The largest $z_v - \ln e_v$ belongs to the smallest $e_v\,e^{-z_v}$,
# which has rate $e^{z_v}$, and the smallest of several exponentials is number v with a probability proportional to its
# rate: the softmax. With 100,000 draws a frequency is off by about 0.0016 (one standard deviation).
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
