# %% [markdown]
# # 09b · IPO, GPO and REBEL: what β and the shape of the loss mean
#
# **You will build** the losses of IPO, GPO and REBEL, compute exactly where each ends, and find out why the same β does
# not mean the same pull in two methods.
#
# **Time:** 22 minutes of reading, 10 seconds of computer.
#
# **You need:** [09, DPO](09_dpo.ipynb): the margin Δ, the three completions and `land`.
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
from torch.nn.functional import softplus

from minialign.methods import gpo, ipo, rebel
from toy import closed_form
from tutorials.checks import always, equal, this_run
from tutorials.figures import dpo as figures
from tutorials.three_completions import LOST, WON, land, prefer, r, ref, row

torch.set_default_dtype(torch.float64)  # so that "equal" can mean ten digits


# %% [markdown]
# ## The question
#
# In DPO, β is the price of moving away from the [reference](../GLOSSARY.md#reference), and the loss is
# $\log(1 + e^{-\beta\Delta})$. Within a year of DPO, several papers took another function of the margin Δ. What does β
# mean then, and where does such a loss end?
#
# | the question to DPO | the answer | method |
# | --- | --- | --- |
# | if labels are certain, Δ grows without end | give Δ a target | IPO (Azar et al. 2023) |
# | why just this function of Δ? | any convex function $h$ that falls at 0 | GPO (Tang et al. 2024) |
# | a label says who won, not by how much | fit Δ to a difference of rewards | REBEL (Gao et al. 2024) |
#
# We need the toy of 09: "tea!", "tea, please" and "could i have tea", which ref says with .6, .3, .1. The judge follows
# [Bradley-Terry](../GLOSSARY.md#bradley-terry) with $e^r = 1, 2, 4$. With β = ½ the [tilt](../GLOSSARY.md#tilt) is
# $\pi^* = (3, 6, 8)/17$. As before, $y^+$ is the chosen answer and $y^-$ the rejected one, and
# $\Delta = \log\frac{\pi(y^+)}{\mathrm{ref}(y^+)} - \log\frac{\pi(y^-)}{\mathrm{ref}(y^-)}$.

# %%
BETA = 0.5
best = (ref.log() + r / BETA).softmax(0)  # watch: best (3,): π*
generator = torch.Generator().manual_seed(0)
four = -4 * torch.rand(4, 16, generator=generator)  # log-probs: chosen, rejected, and both of ref
four.requires_grad_()


def margin(pairs):
    """Δ of the nine pairs that `land` gives to a loss."""
    return (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)


def same(mine, theirs, name, logps=four):
    """Compare your loss (B,) and its gradient with what minialign returns, (mean loss, metrics)."""
    equal(mine.mean(), theirs[0], f"Your loss equals minialign's {name}.")
    slopes = torch.autograd.grad(mine.mean(), logps), torch.autograd.grad(theirs[0], logps)
    equal(*slopes, f"The gradient of your loss equals that of minialign's {name}.")
    print(f"equal to minialign's {name}, value and gradient")


# %% [markdown]
# ## 1 · What β means if a label never changes
#
# Take one pair, the third answer chosen over the first, again and again. DPO does gradient descent on the three logits.
# The gradient of Δ is +1 for the logit of $y^+$, −1 for that of $y^-$, and 0 for the other; the normaliser of the
# softmax cancels. So a step of size lr changes Δ by $-2\,\mathrm{lr}\cdot\frac{dL}{d\Delta}$. How far does Δ get?

# %%
def my_delta_path(beta, steps, lr=0.1):
    """Δ before each step and after the last: a list of steps + 1 floats that begins with 0.0.

    Each step adds −2·lr·dL/dΔ. The loss is DPO's, so dL/dΔ = −β·σ(−βΔ) = −β / (1 + e^(βΔ)).
    Use math.exp; no tensors are needed.
    """
    path = [0.0]
    for _ in range(steps):
        path.append(path[-1] + 2 * lr * beta / (1 + math.exp(beta * path[-1])))
    return path


# %% [markdown]
# ### Checkpoint
#
# The same descent with autograd. Then three values of β, for 100 000 steps. Look at how the columns grow.

# %%
logits = ref.log()
for _ in range(200):
    logits.requires_grad_()
    log_ratio = logits.log_softmax(0) - ref.log()
    loss = softplus(-BETA * (log_ratio[2] - log_ratio[0]))
    logits = (logits - 0.1 * torch.autograd.grad(loss, logits)[0]).detach()
moved = logits - ref.log()
always(
    abs((moved[2] - moved[0]).item() - my_delta_path(BETA, 200)[-1]) < 1e-9,
    "my_delta_path follows the Δ of autograd's descent.",
)

paths = {f"β = {beta}": my_delta_path(beta, 100_000) for beta in (0.25, 0.5, 1.0)}
print("Δ after steps" + "".join(f"{10**k:9}" for k in range(6)))
for name, path in paths.items():
    print(f"{name:13}" + "".join(f"{path[10**k]:9.2f}" for k in range(6)))
for beta in (0.25, 0.5, 1.0):
    path = paths[f"β = {beta}"]
    print(
        f"β = {beta}: the last factor of 10 in steps added {path[-1] - path[10_000]:.2f} nats; "
        f"log(10)/β = {math.log(10) / beta:.2f}"
    )
    this_run(
        abs(path[-1] - path[10_000] - math.log(10) / beta) < 0.1 / beta,
        "DPO's margin grows by log(10)/β for ten times the steps.",
    )
figures.certain_labels(paths)

# %% [markdown]
# Δ grows like $\frac1\beta \log(\text{steps})$, without end. In the first steps a smaller β moves *less*, because the
# gradient has the factor β. After enough steps, a smaller β is *further* from ref. No β stops the growth: β pulls
# towards ref only where labels contradict each other. Here nothing does.
#
# ## 2 · IPO: a target
#
# IPO has a finite target for the margin. A margin beyond the target is made smaller (the log-probs are sums over
# tokens, as in the paper; TRL averages them, which is another method):
#
# $$L_\mathrm{IPO} = \mathbb{E}\Big(\Delta - \frac{1}{2\beta}\Big)^2 .$$

# %%
def my_ipo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Four log-probs of whole answers, each (B,) -> the loss of each pair (B,).

    Stop in it at the first call: delta has 16 entries, and 1/(2β) is 1.
    """
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)  # watch: delta (B,)
    return (delta - 1 / (2 * beta)) ** 2


# %% [markdown]
# ### Checkpoint
#
# Where does it end? We try Bradley-Terry labels, and certain labels, which always prefer the higher reward. Compare
# each end with how often each answer wins.

# %%
same(my_ipo(*four, BETA), ipo.ipo_loss(*four, beta=BETA), "ipo_loss")


def ipo_of(pairs):
    return my_ipo(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, BETA)


certain = (r[:, None] > r).double() + 0.5 * torch.eye(3)
for name, labels in (("Bradley-Terry", prefer), ("certain", certain)):
    end = land(ipo_of, prefer=labels)
    wins = labels @ ref  # watch: wins (3,): how often each is chosen over an answer of ref
    print(f"labels {name:14} IPO ends at {row(end)}   how often each wins: {row(wins)}")
    law = (ref.log() + wins / BETA).softmax(0)
    equal(end, law, "my_ipo ends at the distribution ∝ ref·e^(wins/β).", atol=1e-5, rtol=0)

# %% [markdown]
# IPO ends at a finite policy for any labels: $\pi \propto \mathrm{ref}\cdot e^{g/\beta}$. Here $g(y)$ is how often $y$
# wins against a random answer of the data, which is at most 1. (This holds if one writer draws both answers of each
# pair independently, and draws every answer now and then.) So this is a tilt again, with the *win rate* in the place
# of the reward. Two things follow. IPO does not end at π\*, even with Bradley-Terry labels. And its end depends on who
# wrote the pairs, because $g$ does.
#
# ## 3 · GPO: other shapes
#
# "Is this pair in order?" is a question for a classifier, and there are many losses for that. GPO puts one of them,
# $h$, on $z = \beta\Delta$: $L_\mathrm{GPO} = \mathbb{E}\,h(\beta\Delta)$. We take four:
#
# | $h(z)$ | name | what it is |
# | --- | --- | --- |
# | $\log(1 + e^{-z})$ | logistic | logistic regression's loss. It is DPO |
# | $(z - 1)^2$ | squared | least squares to the target 1. It is IPO with another target |
# | $e^{-z}$ | exponential | AdaBoost's loss. Pairs in wrong order count exponentially |
# | $(1 - \sigma(z))^2$ | Savage | squared error of the predicted probability $\sigma(z)$ |
#
# The paper asks for convex $h$. (Savage's is in its table, but is not convex.) In the picture each curve is divided
# by its own |h′(0)|, so that all four fall with slope −1 at 0. They differ in how they bend.

# %%
H = {
    "logistic": lambda z: softplus(-z),
    "squared": lambda z: (z - 1) ** 2,
    "exponential": lambda z: (-z).exp(),
    "savage": lambda z: (1 - z.sigmoid()) ** 2,
}
for name, h in H.items():
    delta = (four[0] - four[2]) - (four[1] - four[3])  # watch: delta (16,)
    same(h(BETA * delta), gpo.gpo_loss(*four, beta=BETA, f=name), f"gpo_loss, {name}")
figures.shapes(H)

# %% [markdown]
# ## 4 · The bend decides how far
#
# Take one pair whose rewards differ by a small $d$. It is labelled this way round with probability
# $p = \sigma(d) \approx \frac12 + \frac d4$. So the expected loss is $p\,h(z) + (1-p)\,h(-z)$. It is smallest where
#
# $$p\,h'(z) = (1-p)\,h'(-z) .$$
#
# For small $z$ put $h'(\pm z) \approx h'(0) \pm z\,h''(0)$. What remains is $(2p - 1)\,h'(0) + z\,h''(0) = 0$. Since
# $2p - 1 \approx \frac d2$, $h'(0) < 0$ and $h''(0) > 0$,
#
# $$\beta\Delta = z = t\,d, \qquad t = \frac{1}{2\,|h''(0)/h'(0)|} .$$
#
# The factor $t$ is the same for every pair, so one policy fits them all: $\pi \propto \mathrm{ref}\cdot e^{t\,r/\beta}$.
# The slope $h'(0)$ pushes the margin up, the curvature $h''(0)$ pulls it back. This is exact in the limit of small
# rewards.

# %%
def my_tilt_factor(h):
    """h: a function of a tensor z -> t = 1 / (2·|h''(0)/h'(0)|), a float.

    Differentiate twice with torch.autograd.grad; create_graph=True keeps the first derivative
    differentiable.
    """
    z = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(h(z), z, create_graph=True)  # watch: slope ()
    (curvature,) = torch.autograd.grad(slope, z)
    return 1 / (2 * abs(curvature / slope).item())


# %% [markdown]
# ### Checkpoint
#
# Predict $t$, then measure it: make all rewards a thousand times smaller and see how far the policy moves. IPO takes
# part as $h(z) = (z - \frac12)^2$, which is its loss times β².

# %%
slight = (0.001 * (r[:, None] - r)).sigmoid()
factor = {}
for name, h in {**H, "IPO": lambda z: (z - 0.5) ** 2}.items():
    end = land(lambda pairs, h=h: 1000 * h(BETA * margin(pairs)), prefer=slight)
    tilt = BETA * (end / ref).log()
    measured = ((tilt[2] - tilt[0]) / (0.001 * (r[2] - r[0]))).item()
    factor[name] = my_tilt_factor(h)
    print(f"{name:12} predicted t = {factor[name]:.2f}, measured {measured:.3f}")
    always(abs(measured - factor[name]) < 0.01, "my_tilt_factor is the measured t.")

# %% [markdown]
# DPO's $t$ is 1 and IPO's is ¼. So **the same β is not the same pull**: for small rewards, IPO at β ends where DPO
# ends at 4β. If you compare two methods, compare them at the same KL from ref, not at the same β.
#
# ## 5 · REBEL: by how much
#
# A label says who won. A reward also says by how much. REBEL needs a reward $r$, as PPO does. The present policy, called
# $\pi_\mathrm{old}$ from now on, writes two answers $y, y'$ to a prompt. Let Δ be the margin as measured from
# $\pi_\mathrm{old}$, and let $R = r - \beta\log\frac{\pi_\mathrm{old}}{\mathrm{ref}}$ be the reward minus the KL penalty
# (07b), a constant in this step. REBEL fits Δ to the difference of $R$ by least squares, with a step size η:
#
# $$L_\mathrm{REBEL} = \mathbb{E}\Big(\frac1\eta\,\Delta - \big(R(y) - R(y')\big)\Big)^2, \qquad
#   \Delta = \log\frac{\pi(y)}{\pi_\mathrm{old}(y)} - \log\frac{\pi(y')}{\pi_\mathrm{old}(y')} .$$

# %%
def my_rebel(log_ratio, other_log_ratio, reward, other_reward, eta):
    """All (B,): log π/π_old of the two answers, then R of the two answers -> the loss (B,)."""
    target = reward - other_reward  # watch: target (B,)
    return ((log_ratio - other_log_ratio) / eta - target) ** 2


# %% [markdown]
# ### Checkpoint
#
# The second comparison shows the kinship: REBEL with rewards $\frac{1}{2\beta}$ for the winner and 0 for the loser is
# IPO.

# %%
two = -4 * torch.rand(2, 16, generator=generator)
two.requires_grad_()
R, other_R = torch.rand(2, 16, generator=generator)
rebel_theirs = rebel.rebel_loss(*two, R, other_R, eta=0.7)
same(my_rebel(*two, R, other_R, 0.7), rebel_theirs, "rebel_loss", two)
won = torch.full((16,), 1 / (2 * BETA))
as_rebel = my_rebel(four[0] - four[2], four[1] - four[3], won, 0 * won, 1.0)
same(as_rebel, ipo.ipo_loss(*four, beta=BETA), "ipo_loss, as REBEL on who won")

# %% [markdown]
# Where does REBEL end? On the three completions it can fit all differences, so one round ends at
# $\pi_\mathrm{new} \propto \pi_\mathrm{old}\, e^{\eta R}$. Put $R$ in and take logarithms. With a constant $c$,
#
# $$\log\frac{\pi_\mathrm{new}}{\mathrm{ref}} =
#   (1 - \eta\beta)\log\frac{\pi_\mathrm{old}}{\mathrm{ref}} + \eta\,r + c .$$
#
# A policy that this leaves unchanged has $\log\frac{\pi}{\mathrm{ref}} = \frac r\beta + c$: it is π\*. Each round
# multiplies the distance $\log\frac{\pi}{\pi^*}$ by $1 - \eta\beta$. So the rounds converge to π\* if
# $|1 - \eta\beta| < 1$, that is, if $0 < \eta\beta < 2$.
#
# ### Break it: a step size that is too large
#
# Six rounds each, with ηβ = ½, 1 and 2.2. Look at the distance from π\*.

# %%
def rebel_rounds(eta, beta, rounds):
    """The policies (3,) after 0, 1, … rounds of REBEL, each trained to its end."""
    found = [ref]
    for _ in range(rounds):
        old = found[-1]
        R = r - beta * (old / ref).log()  # watch: R (3,)

        def rebel_of(pairs, R=R):
            up, down = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
            return my_rebel(up, down, R[WON], R[LOST], eta)

        found.append(land(rebel_of, mu=torch.ones(3) / 3, ref=old))  # here old is the reference
    return found


for step in (0.5, 1.0, 2.2):
    rounds = rebel_rounds(step / BETA, BETA, 6)
    gaps = [(policy / best).log() for policy in rounds]
    gaps = [(gap[2] - gap[0]).item() for gap in gaps]  # log π/π*, third answer minus first
    print(f"ηβ = {step}: " + "  ".join(f"{gap:7.3f}" for gap in gaps) + f"   {row(rounds[-1])}")
    for before, after in zip(gaps, gaps[1:], strict=False):
        always(abs(after - (1 - step) * before) < 1e-3, "A round multiplies it by 1 − ηβ.")

# %% [markdown]
# With ηβ = 1 one round is enough. With ηβ = ½ the distance is halved in each round. With ηβ = 2.2 it changes its sign
# and grows by a fifth: the policy swings past π\*, further each time.
#
# ## 6 · Where each ends
#
# One picture for all, at β = ½. Each end is computed with `land`, and must equal its
# [closed form](../GLOSSARY.md#closed-form). "Squared" at β is IPO at β/2 (puzzle 1). The exponential loss ends at DPO's
# end for 2β.

# %%
ref_np, prefer_np, r_np = (x.numpy() for x in (ref, prefer, r))
ends = {name: land(lambda pairs, h=h: h(BETA * margin(pairs))) for name, h in H.items()}
ends["IPO"] = land(ipo_of)
ends["REBEL, ηβ = 1"] = rebel_rounds(1 / BETA, BETA, 1)[-1]
laws = {
    "logistic": best,
    "savage": best,
    "REBEL, ηβ = 1": best,
    "exponential": closed_form.tilt(ref_np, r_np, 2 * BETA),
    "squared": closed_form.ipo_law(ref_np, prefer_np, BETA / 2, ref_np),
    "IPO": closed_form.ipo_law(ref_np, prefer_np, BETA, ref_np),
}
for name, law in laws.items():
    to_ref = closed_form.kl(ends[name].numpy(), ref_np)
    print(f"{name:14} ends at {row(ends[name])}   KL to ref {to_ref:.3f}")
    equal(ends[name], torch.as_tensor(law), f"{name}: its closed form.", atol=1e-4, rtol=0)
names = {"ref": ref, **{name: ends[name] for name in laws}}
figures.ends({name: end.tolist() for name, end in names.items()})

# %% [markdown]
# Three end at π\*. DPO's and Savage's losses are smallest where $\sigma(z)$ is the true probability of the label
# (exercise 3), and REBEL is told the reward. The others stay nearer to ref. With the same β,
# DPO ends 0.570 nats of KL from ref and IPO 0.025.
#
# ## What is wrong here? (1)

# %%
def quick_ipo(pairs):
    return (BETA * margin(pairs) - 1) ** 2


print("GPO's squared loss is (β·Δ − 1)², so this is IPO:", row(land(quick_ipo)))
print("closed form of IPO at this β:                    ", row(laws["IPO"]))

# %% [markdown]
# Both are squared distances. Why do they not end at the same policy?
#
# ## What is wrong here? (2)

# %%
policy = ref
rewards_seen = []
for _ in range(8):

    def rebel_of(pairs):
        up, down = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        return my_rebel(up, down, r[WON], r[LOST], eta=1.0)

    policy = land(rebel_of, mu=torch.ones(3) / 3, ref=policy)
    rewards_seen.append((policy @ r).item())
print("reward after each round:", row(rewards_seen), "  policy:", row(policy))

# %% [markdown]
# The reward rises in every round. Yet the rounds pass π\* of β = ½, and stop at that of no β. What is missing?
#
# ## What you now know
#
# - DPO's β pulls towards ref only where labels contradict each other. With certain labels, Δ grows like
#   $\frac1\beta\log(\text{steps})$.
# - IPO gives Δ a target. It ends at $\mathrm{ref}\cdot e^{g/\beta}$, a tilt by the win rate.
# - For small rewards, a loss $h(\beta\Delta)$ ends at $\mathrm{ref}\cdot e^{t\,r/\beta}$ with
#   $t = 1/(2|h''(0)/h'(0)|)$. So compare methods at equal KL, not at equal β.
# - REBEL fits Δ to differences of rewards. Exact rounds converge to π\* if $0 < \eta\beta < 2$.
#
# Next: [09c](09c_no_reference.ipynb), losses without a reference or without pairs.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes). Suppose a share ε of all labels is wrong. cDPO takes this into the loss:
# $(1-\varepsilon)\log(1 + e^{-\beta\Delta}) + \varepsilon\log(1 + e^{\beta\Delta})$. One pair, and its label never
# changes. Where does Δ stop? For which ε does it stop at IPO's target? Does this ε depend on β?
#
# **Exercise 2** (medium, try this, 10 minutes). Let the pairs come from a writer who mostly writes the third answer,
# `mu = (0.05, 0.05, 0.9)`. Predict for DPO and for IPO whether the end moves, and for IPO which answer loses most.
#
# **Exercise 3** (hard, 15 minutes). One pair is labelled this way round with probability $p$. Show that Savage's loss
# and DPO's are both smallest at $\sigma(z) = p$, and that this makes π\* the end for Bradley-Terry labels.
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# $(\beta\Delta - 1)^2 = \beta^2\,(\Delta - \frac1\beta)^2$: its target is $\frac1\beta$, IPO's is $\frac{1}{2\beta}$.
# It is IPO at half the β.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
at_half = torch.tensor(closed_form.ipo_law(ref_np, prefer_np, BETA / 2, ref_np))
equal(land(quick_ipo), at_half, "The squared GPO loss is IPO at half the β.", atol=1e-5, rtol=0)

# %% [markdown]
# <details><summary>Puzzle 2</summary>
#
# The KL penalty is missing: the cell takes $r$ instead of $R = r - \beta\log\frac{\pi_\mathrm{old}}{\mathrm{ref}}$.
# Then each round multiplies the policy by $e^{\eta r}$ again. After $k$ rounds it is $\mathrm{ref}\cdot e^{k\eta r}$,
# and in the end only the best answer is left.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
equal(policy, (ref.log() + 8 * r).softmax(0), "Eight rounds: ref·e^(8ηr).", atol=1e-4, rtol=0)

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# The slope is 0 where $(1-\varepsilon)\,\sigma(-\beta\Delta) = \varepsilon\,\sigma(\beta\Delta)$, that is at
# $\Delta = \frac1\beta\log\frac{1-\varepsilon}{\varepsilon}$. This equals IPO's $\frac{1}{2\beta}$ for
# $\varepsilon = \frac{1}{1+\sqrt e} = 0.378$, for every β. On certain labels, IPO is as careful as if more than a third
# of them were wrong.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
epsilon = 1 / (1 + math.sqrt(math.e))
for beta in (0.3, 0.6, 1.2):
    delta = torch.tensor(1 / (2 * beta), requires_grad=True)
    loss = (1 - epsilon) * softplus(-beta * delta) + epsilon * softplus(beta * delta)
    always(abs(torch.autograd.grad(loss, delta)[0]) < 1e-12, "The slope at IPO's target is 0.")
print(f"ε = {epsilon:.4f}")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# DPO stays at π\*. IPO moves: now all win rates are measured mostly against the third answer. All three fall, since
# the opponent is better. The first falls from 0.42 to 0.22, the second from 0.58 to 0.36, the third from 0.73 to 0.52.
# The second falls most, so it loses most in the tilt: from 0.346 to 0.335. A tilt depends on differences of the win
# rates only, and these change little.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
mu = torch.tensor([0.05, 0.05, 0.9])
print("win rates against ref    ", row(prefer @ ref), " against mu", row(prefer @ mu))
print("IPO, pairs written by ref", row(ends["IPO"]), " by mu     ", row(land(ipo_of, mu)))
dpo_end = land(lambda pairs: H["logistic"](BETA * margin(pairs)), mu)
equal(dpo_end, best, "DPO's end does not depend on the writer.", atol=1e-5, rtol=0)
always((prefer @ mu < prefer @ ref).all(), "Against a better opponent every win rate falls.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Write $q = \sigma(z)$, so $\sigma(-z) = 1 - q$. Savage's expected loss is $p(1-q)^2 + (1-p)q^2$. Its derivative in $q$
# is $-2p(1-q) + 2(1-p)q = 2(q - p)$, which is 0 only at $q = p$. DPO's is $-p\log q - (1-p)\log(1-q)$, with the
# derivative $\frac{q-p}{q(1-q)}$. With Bradley-Terry labels $p = \sigma(d)$, where $d$ is the difference of the two
# rewards. So $z = \beta\Delta = d$ is best for each pair, and π\* has this margin in every pair.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for p in (0.6, 0.9):
    z = torch.tensor(math.log(p / (1 - p)), requires_grad=True)
    for name in ("savage", "logistic"):
        h = H[name]
        (slope,) = torch.autograd.grad(p * h(z) + (1 - p) * h(-z), z)
        always(abs(slope) < 1e-12, f"The slope of {name} is 0 at σ(z) = p.")
