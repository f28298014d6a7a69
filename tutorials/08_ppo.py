# %% [markdown]
# # 08 · PPO: credit for each token, several updates from each rollout
#
# **You will build** the five functions of PPO. They train a policy to type a sentence and a GPT to ask politely. Then
# you take out the clip and the critic, to measure what each is for.
#
# **Time:** 30 minutes of reading, 30 seconds of computer.
#
# **You need:** [07 · Policy gradients](07_policy_gradient.ipynb), and the formula for π\* from
# [05 · Inverse RL](05_inverse_rl.ipynb).
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
import re
from types import SimpleNamespace

import torch

from minialign import task
from minialign.batch import collate, whiten
from minialign.logps import token_logps
from minialign.methods import ppo
from minialign.sample import sample
from toy.tiny_language import tiny_gpt
from tutorials.checks import always, equal, this_run
from tutorials.figures import ppo as figures
from tutorials.figures.loop import rlhf_loop

# %% [markdown]
# ## The question
#
# In tutorial 07 all tokens of a completion shared one [advantage](../GLOSSARY.md#advantage), made from one
# [reward](../GLOSSARY.md#reward). After one update the completions were thrown away. Two questions remain:
#
# 1. A completion has many tokens and one reward. Which tokens earned it?
# 2. Sampling is slow. Can one [rollout](../GLOSSARY.md#rollout) serve for several updates?
#
# PPO (proximal policy optimisation, Schulman et al. 2017) answers the first with a [critic](../GLOSSARY.md#critic),
# which predicts the reward from a prefix, and the second with a clip: a token whose probability has changed enough
# stops counting.

# %%
rlhf_loop(["completions", "reward", "reference", "update"], "08_loop.png",
          alt="The loop from prompts to policy, completions, reward and update; "
              "PPO changes what happens from reward to update.")

# %% [markdown]
# ## 1. The algorithm
#
# > **repeat**
# > 1. sample a rollout from the [policy](../GLOSSARY.md#policy); keep its log-probs as `old_logps`
# > 2. ask for the rewards and for the log-probs of the [reference](../GLOSSARY.md#reference)
# > 3. `my_shape_rewards`: put the KL penalty on every token, the reward on the last one
# > 4. let the critic predict a value for every prefix
# > 5. `my_gae`: advantages of the tokens, and the returns that the critic should have predicted
# > 6. `my_whiten`: bring the advantages to mean 0 and variance 1
# > 7. **several times:** one step of the policy on `my_policy_loss`, one step of the critic on `my_value_loss`
#
# ## 2. A task: type a sentence
#
# The policy types 32 characters, each chosen from 27. The reward is the share of right ones, paid once at the end.
# The policy is a table of logits, (32, 27), all 0 at first: it types at random. So does the reference.
#
# We maximise $\mathbb{E}_\pi[r] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})$: reward, minus β for each nat of
# [KL](../GLOSSARY.md#kl) from the reference. Tutorial 05 showed the [closed form](../GLOSSARY.md#closed-form):
# $\pi^* \propto \mathrm{ref}\,e^{r/\beta}$. A right letter adds 1/32 to the reward, so π\* takes it $e^{1/(32\beta)}$
# times as often as each wrong one.

# %%
TEXT, ALPHABET, BETA = "generalised advantage estimation", "abcdefghijklmnopqrstuvwxyz ", 0.005
goal = torch.tensor([ALPHABET.index(letter) for letter in TEXT])
PLACES, CHOICES = torch.arange(len(goal)), len(ALPHABET)

star = torch.ones(len(goal), CHOICES)
star[PLACES, goal] = math.exp(1 / (len(goal) * BETA))
star = star / star.sum(1, keepdim=True)  # watch: star (32, 27)
BEST = star[0, goal[0]].item()


def typed(ids):
    return "".join(ALPHABET[i] for i in ids)


def kl_to_star(logits):
    """KL(π ‖ π*) in nats, a sum over the places."""
    all_logps = logits.log_softmax(-1)
    return (all_logps.exp() * (all_logps - star.log())).sum().item()


torch.manual_seed(0)
print("reference:", typed(torch.randint(CHOICES, (len(goal),))))
print("π*:       ", typed(torch.multinomial(star, 1).squeeze(1)))
print(f"π* has the right letter with probability {BEST:.3f} at each place")
print(f"KL(ref ‖ π*) = {kl_to_star(torch.zeros(len(goal), CHOICES)):.1f} nats")

# %% [markdown]
# ## 3. Several updates: the ratio and the clip
#
# After the first update the completions come from an older policy, π_old: we are
# [off-policy](../GLOSSARY.md#on-policy). *Importance sampling* weights each of them by how much likelier it is now,
# the [ratio](../GLOSSARY.md#ratio) $\rho = \pi/\pi_\mathrm{old}$. The weights are only reliable while the two
# policies are close, so PPO ignores tokens whose ratio has moved by more than ε in the direction that the advantage
# asks for (up for A > 0, down for A < 0):
#
# $$L = -\,\mathrm{mean}_t\,\min\big(\rho_t A_t,\; \mathrm{clip}(\rho_t, 1 - \varepsilon, 1 + \varepsilon)\,A_t\big)$$
#
# $\rho_t$ is the ratio of token t, $A_t$ its advantage, and clip moves a number into the interval. ε is usually 0.2.


# %%
def my_policy_loss(logps, old_logps, advantages, mask, eps):
    """The clipped loss of PPO, a number: minus the mean of min(ρA, clip(ρ)A) where mask is True.

    logps, old_logps: (B, T) log-probs of the tokens now and when they were sampled. ρ is a ratio
    of probabilities, not of log-probs.
    advantages: (B, T). mask: (B, T) bool. eps: ρ is clipped to [1 − eps, 1 + eps].
    """
    ratio = (logps - old_logps).exp()  # watch: ratio (B, T)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    return -objective[mask].mean()


# %% [markdown]
# ### Checkpoint
#
# (Stop in `my_policy_loss` at this first call: `ratio` is (6, 9).)

# %%
generator = torch.Generator().manual_seed(0)
begins, ends = torch.tensor([0, 1, 2, 3, 0, 5]), torch.tensor([9, 4, 9, 4, 1, 8])
places = torch.arange(9)
mask = (places >= begins[:, None]) & (places < ends[:, None])  # watch: mask (B, T)
old, change, A, ref, v = torch.randn(5, 6, 9, generator=generator, dtype=torch.float64)
new = (old + 0.3 * change).requires_grad_()
mine = my_policy_loss(new, old, A, mask, 0.2)
theirs = ppo.policy_loss(new, old, A, mask, eps=0.2)[0]
equal(mine, theirs, msg="my_policy_loss equals the project's.")
slopes = [torch.autograd.grad(loss, new)[0] for loss in (mine, theirs)]
equal(*slopes, msg="my_policy_loss has the project's gradient.")
print("my_policy_loss equals minialign.methods.ppo.policy_loss")

# %% [markdown]
# The ratio is below, inside or above the interval, and A is positive or negative. Which of the six cases have a
# gradient?


# %%
def one_token(ratio, advantage, eps=0.2):
    """(objective, its slope in the ratio) of a single token."""
    ratio, one = torch.tensor([[ratio]], requires_grad=True), torch.ones(1, 1)
    objective = -my_policy_loss(ratio.log(), 0 * one, advantage * one, one.bool(), eps)
    objective.backward()
    return objective.item(), ratio.grad.item()


print("slope      ρ = 0.5   ρ = 1.1   ρ = 1.5")
for advantage, expected in ((1.0, [1, 1, 0]), (-1.0, [0, -1, -1])):
    found = [one_token(ratio, advantage)[1] + 0.0 for ratio in (0.5, 1.1, 1.5)]
    print(f"A = {advantage:+.0f}   " + "".join(f"{slope:9.0f} " for slope in found))
    always([round(slope, 5) for slope in found] == expected,
           "my_policy_loss clips only on the side where the token has moved enough.")

ratios = torch.linspace(0.4, 1.7, 131).tolist()
curves = {sign: [one_token(ratio, float(sign)) for ratio in ratios] for sign in (1, -1)}
figures.clip(ratios, {sign: [objective for objective, _ in rows] for sign, rows in curves.items()},
             {sign: [slope for _, slope in rows] for sign, rows in curves.items()}, eps=0.2)

# %% [markdown]
# - If an update moved a token in the wrong direction, the full gradient remains and brings it back.
# - If it moved in the right direction by more than ε, its gradient is 0.
# - The clip is no hard limit: other tokens share the weights and can carry a ratio past 1 ± ε.
#
# > **You should know: the loss says nothing about progress.** At the first update of a rollout the gradient is the
# > policy gradient of tutorial 07, and the loss is minus the mean advantage, which step 6 makes 0 for every policy.
# > Plot the reward instead.
#
# ## 4. One reward, many tokens: GAE
#
# Each token pays the KL penalty, $-\beta(\log\pi - \log\mathrm{ref})$, a number without gradient. The last one also
# gets the reward of the completion. By hand: β = 0.05, log-probs −1, −2, −0.5, reference −1.2, −1.5, −0.7, reward 1.
# The token rewards are −0.05·0.2 = −0.01, −0.05·(−0.5) = 0.025, and 1 − 0.05·0.2 = 0.99.


# %%
def my_shape_rewards(rewards, logps, ref_logps, mask, beta):
    """The reward of every token, (B, T), without gradient: −beta·(logps − ref_logps), plus the
    completion's reward at its last token.

    rewards: (B,) one for each completion. logps, ref_logps: (B, T). mask: (B, T) bool, True at the
    completion's tokens, which are adjacent but may end before T. The result is 0 where it is False.
    """
    token_rewards = torch.where(mask, -beta * (logps - ref_logps), 0)  # watch: token_rewards (B, T)
    for b in range(len(rewards)):
        last = mask[b].nonzero().max()
        token_rewards[b, last] += rewards[b]
    return token_rewards.detach()


three = torch.ones(1, 3, dtype=torch.bool)
by_hand = my_shape_rewards(torch.tensor([1.0]), torch.tensor([[-1, -2, -0.5]]),
                           torch.tensor([[-1.2, -1.5, -0.7]]), three, 0.05)
print("token rewards", by_hand.numpy().round(4))

# %% [markdown]
# ### Checkpoint

# %%
equal(by_hand, torch.tensor([[-0.01, 0.025, 0.99]]),
             msg="my_shape_rewards gives the rewards by hand.")
six_rewards = torch.randn(6, generator=generator, dtype=torch.float64)
token_rewards = my_shape_rewards(six_rewards, old, ref, mask, 0.3)
equal(token_rewards, ppo.shape_rewards(six_rewards, old, ref, mask, beta=0.3),
             msg="my_shape_rewards equals the project's, also in rows that end early.")
print("my_shape_rewards equals minialign.methods.ppo.shape_rewards")

# %% [markdown]
# The critic gives each prefix a *value* v, the reward that it expects from here on. A token is judged by what it
# changed:
#
# $$\delta_t = r_t + \gamma\,v_{t+1} - v_t$$
#
# $r_t$ is the token's own reward, $v_t$ the value of the prefix before it, $v_{t+1}$ of the prefix with it (0 after
# the last token). γ is the *discount*: a reward that comes k tokens later counts γ^k. Language models use γ = 1,
# games 0.99.

# %%
values, rewards = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[0.0, 0.0, 1.0]])
figures.chain(values[0].tolist(), rewards[0].tolist(), [-0.1, -0.1, 0.7])

# %% [markdown]
# Here the critic lowers its prediction twice, and then a reward of 1 arrives. Were the first two tokens bad, or was
# the critic wrong? *Generalised advantage estimation* (GAE, Schulman et al. 2016) weighs the two with λ:
#
# $$A_t = \delta_t + \gamma\lambda\,\delta_{t+1} + (\gamma\lambda)^2\,\delta_{t+2} + \dots$$
#
# - **λ = 0:** $A_t = \delta_t$, the token's own step. There is little noise, but a wrong critic misleads (bias).
# - **λ = 1:** the values in between cancel, and $A_t$ is all the reward still to come, minus $v_t$. The critic is
#   only a [baseline](../GLOSSARY.md#baseline) and cannot mislead, but the luck of all later tokens is in $A_t$
#   (noise).
# - **In between**, usually 0.95, an error l tokens later counts $\lambda^l$.
#
# By hand, with γ = 1, λ = 0.5: $A = (-0.1 - 0.05 + 0.175,\; -0.1 + 0.35,\; 0.7) = (0.025, 0.25, 0.7)$. The critic's
# target, the *return*, is $A_t + v_t$.


# %%
def my_gae(token_rewards, values, mask, gamma, lam):
    """(advantages, returns), both (B, T) and 0 where mask is False. returns = advantages + values.

    token_rewards, values: (B, T); values[b, t] is v of the prefix before token t. mask: (B, T)
    bool; the True ones of a row are adjacent. The value after the last of them is 0, whatever
    stands in the padding. δ_t = token_rewards[t] + gamma·v_{t+1} − v_t. Going backwards,
    A_t = δ_t + gamma·lam·A_{t+1}.
    """
    advantages = torch.zeros_like(values)
    for b in range(len(values)):
        next_value = next_advantage = 0.0
        for t in reversed(mask[b].nonzero().squeeze(1).tolist()):
            delta = token_rewards[b, t] + gamma * next_value - values[b, t]  # watch: delta ()
            next_advantage = delta + gamma * lam * next_advantage
            next_value, advantages[b, t] = values[b, t], next_advantage
    return advantages, torch.where(mask, advantages + values, 0)


print("λ      advantages              returns")
for lam in (0, 0.5, 1):
    advantages, returns = my_gae(rewards, values, three, 1.0, lam)
    print(f"{lam:<5}  {str(advantages[0].numpy().round(3)):23} {returns[0].numpy().round(3)}")

# %% [markdown]
# ### Checkpoint
#
# (Stop in `my_gae` at the call above: the first `delta` is 0.7.)

# %%
equal(my_gae(rewards, values, three, 1.0, 0.5)[0], torch.tensor([[0.025, 0.25, 0.7]]),
             msg="my_gae gives the advantages by hand.")
for gamma, lam in ((1.0, 0.95), (0.9, 0.8), (1.0, 0.0)):
    found = my_gae(token_rewards, v, mask, gamma, lam)
    expected = ppo.gae(token_rewards, v, mask, gamma=gamma, lam=lam)
    equal(found, expected, msg=f"my_gae equals the project's for γ = {gamma}, λ = {lam}.")
A, returns = ppo.gae(token_rewards, v, mask, gamma=1.0, lam=0.95)
print("my_gae equals minialign.methods.ppo.gae")

# %% [markdown]
# ## 5. Whitening and the critic's loss
#
# *Whitening* brings the advantages of a rollout to mean 0 and variance 1, so that all rollouts count alike.
#
# The critic learns by squared distance to the returns, with a clip of its own: moving a value by more than ε from the
# old one does not lower its loss any further. By hand: v was 0.5, is 1, should be 2, and ε = 0.2. The clipped value
# is 0.7, and the loss is $\tfrac12 \max(1^2, 1.3^2) = 0.845$.


# %%
def my_whiten(x, mask):
    """x (B, T) minus its mean, over √(variance + 1e-8). 0 where mask (B, T) is False.

    Mean and variance are over the entries where mask is True. The variance is the mean of squared
    differences (not divided by n − 1).
    """
    real = x[mask]
    variance = (real - real.mean()).square().mean()
    return torch.where(mask, (x - real.mean()) / (variance + 1e-8).sqrt(), 0)


def my_value_loss(values, old_values, returns, mask, eps):
    """½·mean of max((values − returns)², (clipped − returns)²) over mask, where `clipped` are the
    values moved into the interval old_values ± eps.

    values, old_values, returns, mask: (B, T). Returns a number.
    """
    clipped = old_values + (values - old_values).clamp(-eps, eps)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * worse[mask].mean()


# %% [markdown]
# ### Checkpoint

# %%
equal(my_whiten(A, mask), whiten(A, mask),
             msg="my_whiten equals the project's whiten.")
one = torch.ones(1, 1)
by_hand = my_value_loss(one, 0.5 * one, 2 * one, one.bool(), 0.2).item()
always(abs(by_hand - 0.845) < 1e-5, "my_value_loss gives 0.845 in the example by hand.")
new_v = (v + 0.3 * change).requires_grad_()
mine = my_value_loss(new_v, v, returns, mask, 0.2)
theirs = ppo.value_loss(new_v, v, returns, mask, eps=0.2)[0]
equal(mine, theirs, msg="my_value_loss equals the project's.")
slopes = [torch.autograd.grad(loss, new_v)[0] for loss in (mine, theirs)]
equal(*slopes, msg="my_value_loss has the project's gradient.")
print("my_whiten and my_value_loss equal minialign's")

# %% [markdown]
# ## 6. Put together
#
# The critic of a language model is a copy of its network with one output instead of V logits. Here two learned
# numbers per place are enough: value = offset + slope · (share that is right so far), both 0 at first. `train` calls
# the project's `shape_rewards` and `gae`: your loops give the same and are slow.


# %%
def train(*, seed=0, rollouts=40, n=64, lr=0.1, epochs=4, eps=0.2, lam=0.95, beta=BETA,
          use_critic=True, sees_share=True, whitened=True, loss_of=my_policy_loss,
          shape=ppo.shape_rewards):
    """PPO on the sentence. Returns P(right letter), KL(π ‖ π*) and a text of each rollout; also the
    last rollout and the critic's slopes. Without sees_share the critic knows only the place."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(n, len(goal), dtype=torch.bool)
    logits = torch.zeros(len(goal), CHOICES, requires_grad=True)  # the policy
    offset = torch.zeros(len(goal), requires_grad=True)  # the critic: offset + slope · share
    slope = torch.zeros(len(goal), requires_grad=True)
    optimizer = torch.optim.Adam([logits, offset, slope], lr=lr)
    right, kl, texts = [], [], []
    for k in range(rollouts):
        with torch.no_grad():
            all_logps = logits.log_softmax(-1)
            right.append(all_logps.exp()[PLACES, goal].mean().item())
            kl.append(kl_to_star(logits))
            y = torch.multinomial(all_logps.exp(), n, replacement=True, generator=generator).T
            old_logps = all_logps[PLACES, y]  # watch: old_logps (B, T)
            ref_logps = torch.full((n, len(goal)), -math.log(CHOICES))
            texts.append(typed(y[0]))
            hits = (y == goal).float()
            so_far = (hits.cumsum(1) - hits) / len(goal)  # share that was right before token t
            so_far = so_far * sees_share
            old_values = (offset + slope * so_far) * use_critic  # watch: old_values (B, T)
        token_rewards = shape(hits.mean(1), old_logps, ref_logps, mask, beta=beta)
        advantages, returns = ppo.gae(token_rewards, old_values, mask, gamma=1.0,
                                      lam=lam if use_critic else 1.0)
        advantages = my_whiten(advantages, mask) if whitened else advantages
        optimizer.param_groups[0]["lr"] = lr * (1 - k / rollouts)  # falls to 0
        for _ in range(epochs):
            loss = loss_of(logits.log_softmax(-1)[PLACES, y], old_logps, advantages, mask, eps)
            if use_critic:
                values = offset + slope * so_far
                loss = loss + my_value_loss(values, old_values, returns, mask, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    last = SimpleNamespace(y=y, hits=hits, old_logps=old_logps, ref_logps=ref_logps,
                           token_rewards=token_rewards, values=old_values)
    return SimpleNamespace(right=right, kl=kl, texts=texts, last=last, slopes=slope.detach())


whole = train()
for k in (0, 6, 12, 18, 24, 39):
    print(f"rollout {k:2}:  P(right letter) {whole.right[k]:.3f}   KL(π ‖ π*) {whole.kl[k]:5.2f}   "
          f"{whole.texts[k]}")
print(f"π*, computed: P(right letter) {BEST:.3f}")
slope = whole.slopes[len(goal) // 2].item()
print(f"the critic's slope, middle of the sentence: {slope:.2f} (a perfect critic: 1)")
this_run(abs(whole.right[-1] - BEST) < 0.05 and whole.kl[-1] < 6, "PPO ends near π*.")

# %% [markdown]
# The policy ends near π\*. (Stop in `train` at its first call: `old_values` are all 0.)
#
# ## 7. What the critic is for
#
# Without a critic (v = 0, λ = 1) there are two ways to credit the letters:
#
# - **Rewards to go:** a letter gets what is paid from it on, the reward minus the KL of the letters still to come.
# - **RLOO** (tutorial 07): every letter gets R, the reward minus the KL of the whole completion. (Here whitening
#   subtracts the mean, and the ratio stays one per letter.)
#
# Advantages in the middle of training:

# %%
def pay_at_the_end(rewards, logps, ref_logps, mask, *, beta):
    """All of R at the last letter: with v = 0 and λ = 1 every letter gets R."""
    token_rewards = ppo.shape_rewards(rewards, logps, ref_logps, mask, beta=beta)
    paid_last = torch.zeros_like(token_rewards)
    paid_last[:, -1] = token_rewards.sum(1)
    return paid_last


middle = train(rollouts=16).last
every = torch.ones_like(middle.y, dtype=torch.bool)
hit = middle.hits.bool()
share = middle.hits.mean(1)  # the rewards
paid_last = pay_at_the_end(share, middle.old_logps, middle.ref_logps, every, beta=BETA)
no_values = torch.zeros_like(middle.values)
kinds = (("rewards to go, no critic", middle.token_rewards, no_values, 1.0),
         ("RLOO: all letters share R", paid_last, no_values, 1.0),
         ("critic, λ = 0.95: what PPO uses", middle.token_rewards, middle.values, 0.95),
         ("critic, λ = 0: δ alone", middle.token_rewards, middle.values, 0.0))
advantages = {}
print("advantages (whitened)            right minus wrong   first 8 letters   last 8")
for name, token_rewards, values, lam in kinds:
    A, _ = ppo.gae(token_rewards, values, every, gamma=1.0, lam=lam)
    advantages[name] = A = my_whiten(A, every)
    means = (A[hit].mean() - A[~hit].mean(), A[:, :8].mean(), A[:, -8:].mean())
    print("{:33}{:17.2f}{:18.2f}{:9.2f}".format(name, *(round(x.item(), 2) + 0.0 for x in means)))
shown = int((share - share.mean()).abs().argmin())  # a completion of about average quality
figures.credit(list(typed(middle.y[shown])), hit[shown].tolist(),
               {name: A[shown].tolist() for name, A in advantages.items()})

# %% [markdown]
# - **Rewards to go** are low for early letters, which have more KL ahead of them. This slope is larger than the
#   difference between right and wrong. On average over samples it changes nothing, like any baseline; in 64
#   completions it is noise.
# - **RLOO** has no slope. Each letter shares the luck of 31 others.
# - **A critic's** value rises at a right letter and falls at a wrong one; δ is that change. λ = 0.95 adds the changes
#   that follow, so a single bar may have the wrong sign.

# %%
to_go = train(use_critic=False)
shared = train(use_critic=False, shape=pay_at_the_end)
once = train(epochs=1)
race = {"PPO": whole, "RLOO: all letters share R": shared, "rewards to go, no critic": to_go,
        "PPO, one update per rollout": once}
figures.race({name: run.right for name, run in race.items()}, BEST)
for name, run in race.items():
    passed = sum(right <= 0.9 for right in run.right)
    print(f"{name:28} P(right letter) after 40 rollouts: {run.right[-1]:.3f}   "
          + (f"above 0.9 from rollout {passed}" if passed < 40 else "never above 0.9"))
this_run(min(whole.right[-1], shared.right[-1]) > 0.9 > to_go.right[-1] + 0.05,
         "PPO and RLOO end near π*, and rewards to go without a critic do not.")
this_run(once.right[-1] < 0.5, "One update per rollout is far slower.")

# %% [markdown]
# Here the critic is a little faster than RLOO, and it costs memory. Without a critic, do not use rewards to go with
# their KL.
#
# ## 8. Break it: remove the clip
#
# With 4 small updates per rollout you can remove the clip and see little. Try 20, at twice the learning rate.

# %%
clipped = {"4 epochs, clip": whole, "4 epochs, no clip": train(eps=torch.inf),
           "20 epochs, lr × 2, clip": train(epochs=20, lr=0.2),
           "20 epochs, lr × 2, no clip": train(epochs=20, lr=0.2, eps=torch.inf)}
figures.without_clip({name: run.right for name, run in clipped.items()}, BEST)
for name, run in clipped.items():
    print(f"{name:27} P(right letter) {run.right[-1]:.3f}   KL(π ‖ π*) {run.kl[-1]:6.2f}   "
          f"{run.texts[-1]}")
hasty, hasty_clipped = clipped["20 epochs, lr × 2, no clip"], clipped["20 epochs, lr × 2, clip"]
this_run(hasty.right[-1] < 0.7 < hasty_clipped.right[-1],
         "Without the clip 20 epochs spoil the policy.")

# %% [markdown]
# Without the clip the policy fits the luck of 64 completions until it is sure of wrong letters. The right ones are
# never sampled again.
#
# ## 9. Each detail, measured
#
# The same run with one detail changed, two seeds each.

# %%
def row(name, **change):
    runs = [train(seed=seed, **change) for seed in (0, 1)]
    right = " ".join(f"{run.right[-1]:6.2f}" for run in runs)
    kl = " ".join(f"{run.kl[-1]:6.2f}" for run in runs)
    print(f"{name:26}| {right} | {kl} | {runs[0].texts[-1]}")
    return runs


print("detail                    | P(right)      | KL(π ‖ π*)    | last text, seed 0")
row("all of PPO")
row("RLOO: all share R", use_critic=False, shape=pay_at_the_end)
row("rewards to go, no critic", use_critic=False)
row("critic of places, λ 1", sees_share=False, lam=1.0)
row("critic of places, λ 0.95", sees_share=False)
row("one epoch", epochs=1)
row("no clip, 4 epochs", eps=torch.inf)
row("no whitening", whitened=False)
row("λ = 1", lam=1.0)
trusting = row("λ = 0", lam=0.0)
row("no KL penalty (β = 0)", beta=0.0)
this_run(max(run.right[-1] for run in trusting) < 0.3,
         "λ = 0 fails with a critic that starts from nothing.")

# %% [markdown]
# - **λ = 0** trusts a critic that knows nothing yet. Each rollout carries the news of the reward only one place
#   further back.
# - **λ = 1** does as well as 0.95 here: the critic is still a good baseline.
# - **A critic of places** does not see how much is right so far. With λ = 1 it only takes the slope out of the
#   rewards to go, which closes most of their gap to RLOO. The rest is the KL already paid: near π\* it cancels, in R,
#   the luck in r. With λ = 0.95 the reward hardly reaches early letters.
# - **Whitening** keeps the steps large, also at the optimum, where true advantages are 0 and it enlarges noise.
# - **β = 0** goes past π\*: nothing pulls it back to the reference. With a learned reward that is
#   [over-optimisation](../GLOSSARY.md#overoptimization) (tutorial 06b).
#
# ## 10. The same functions train a GPT
#
# The built-in language asks for things: "ask for tea: may i have tea, please." The reward is +1 for naming the thing,
# and for opening and ending +1 each if polite, −1 if rude. Words are tokens. A GPT with one layer first learns from
# rude speakers. Then comes PPO, β = 0.1, with and without a critic.

# %%
PROMPTS = task.builtin_prompts()


def split(text):
    return re.findall(r" ?[a-z]+|[^a-z]", text)


corpus = [*PROMPTS, *(answer for prompt in PROMPTS for answer in task.builtin_law(prompt, 0.5))]
WORDS = ["<end>", *sorted({word for text in corpus for word in split(text)})]


def encode(text):
    return [WORDS.index(word) for word in split(text)]


def decode(ids):
    return "".join(WORDS[i] for i in ids if i)


torch.manual_seed(0)
base = tiny_gpt(len(WORDS), max_len=24, dtype=torch.float32)
pairs = [text.split(": ") for text in task.builtin_texts(1000)]
demos = [(encode(prompt + ": "), [*encode(answer), 0]) for prompt, answer in pairs]
optimizer = torch.optim.Adam(base.parameters(), lr=1e-2, betas=(0.9, 0.99))
for k in range(240):
    picked = [demos[i] for i in torch.randint(len(demos), (32,)).tolist()]
    batch = collate(*zip(*picked, strict=True), pad_id=0)
    loss = -token_logps(base, batch)[batch.mask].mean()
    optimizer.param_groups[0]["lr"] = 1e-2 * (1 - k / 240)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

asked, asked_ids = PROMPTS * 2, [encode(prompt) for prompt in PROMPTS * 2]


def make_polite(use_critic):
    """PPO on the GPT. Returns the policy and the mean reward of each rollout of 48 completions."""
    policy, critic = copy.deepcopy(base), base.with_scalar_head()  # a copy with one output number
    optimizers = [torch.optim.Adam(policy.parameters(), lr=1e-3),
                  torch.optim.Adam(critic.parameters(), lr=3e-3)]
    means = []
    for k in range(24):
        answers = sample(policy, asked_ids, max_new=12, eos_id=0, seed=k)
        texts = [decode(ids) for ids in answers.completions]
        rewards = torch.tensor(task.gold_reward(asked, texts))  # watch: rewards (B,)
        means.append(rewards.mean().item())
        with torch.no_grad():
            old_logps, ref_logps = token_logps(policy, answers), token_logps(base, answers)
            old_values = critic(answers.inputs) * use_critic  # watch: old_values (B, T)
        token_rewards = my_shape_rewards(rewards, old_logps, ref_logps, answers.mask, 0.1)
        lam = 0.95 if use_critic else 1.0
        advantages, returns = my_gae(token_rewards, old_values, answers.mask, 1.0, lam)
        advantages = my_whiten(advantages, answers.mask)  # watch: advantages (B, T)
        for _ in range(4):
            logps = token_logps(policy, answers)
            loss = my_policy_loss(logps, old_logps, advantages, answers.mask, 0.2)
            if use_critic:
                values = critic(answers.inputs)
                loss = loss + my_value_loss(values, old_values, returns, answers.mask, 0.2)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return policy, means


policy, means = make_polite(use_critic=True)
_, others = make_polite(use_critic=False)
for name, path in (("critic", means), ("no critic", others)):
    print(f"{name:9} mean reward of rollouts 0, 4, 8, …:", *(f"{mean:.2f}" for mean in path[::4]))
before, after = (sample(model, asked_ids[:5], max_new=12, eos_id=0, seed=7).completions
                 for model in (base, policy))
for prompt, first, then in zip(PROMPTS, before, after, strict=False):
    print(f"{prompt:16} before: {decode(first):28} after: {decode(then)}")
this_run(means[-1] > means[0] + 1.5, "PPO makes the GPT polite.")

# %% [markdown]
# Ouyang et al. (2022) trained InstructGPT in this way, with a learned reward model. Without a critic it goes as well
# here, even with rewards to go: the answers are short.
#
# ## What is wrong here? (1)
#
# Somebody takes the ratio of the *log*-probs. What happens, and which check finds it?


# %%
def shortcut(logps, old_logps, advantages, mask, eps):
    ratio = logps / old_logps
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    return -objective[mask].mean()


run = train(loss_of=shortcut)
print(f"P(right letter) {run.right[0]:.4f} → {run.right[-1]:.4f}   last text: {run.texts[-1]}")
this_run(run.right[-1] < run.right[0], "The shortcut makes right letters rarer.")

# %% [markdown]
# ## What is wrong here? (2)
#
# GAE without the loop over rows. The first completion has two tokens, the second three. Which advantages are wrong,
# and what would a policy learn from them?


# %%
def fast_gae(token_rewards, values, mask, gamma, lam):
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = token_rewards + gamma * next_values - values
    advantages, following = torch.zeros_like(values), 0.0
    for t in reversed(range(values.shape[1])):
        following = torch.where(mask[:, t], delta[:, t] + gamma * lam * following, 0)
        advantages[:, t] = following
    return advantages


two_rows = torch.tensor([[True, True, False], [True, True, True]])
paid = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
said = torch.full((2, 3), 0.5)  # the critic says 0.5 everywhere, also about the padding
print(fast_gae(paid, said, two_rows, 1.0, 1.0).numpy(), "what it computes", sep="   ")

# %% [markdown]
# ## What you now know
#
# - The ratio π/π_old lets one rollout serve for several updates. The clip stops a token when its ratio has moved by ε
#   in the right direction. It matters when updates are many or large.
# - A critic credits each token with the change in value that it caused. Here that is a little faster than RLOO.
#   Rewards to go without a critic are noisy: they contain the KL still to come.
# - GAE's λ trades the critic's bias (0) against noise (1).
# - PPO ends at π\* ∝ ref·e^{r/β}, like REINFORCE and RLOO.
#
# Next: [08b · Frozen Lake](08b_frozen_lake.ipynb), where the same functions play a game, or [09 · DPO](09_dpo.ipynb),
# without rollouts. What to watch in a real run: docs/METRICS.md.
#
# **Sources:** Schulman et al. 2017 (PPO, arXiv:1707.06347), Schulman et al. 2016 (GAE, arXiv:1506.02438), Ouyang et
# al. 2022 (arXiv:2203.02155), Huang et al. 2024 (details, arXiv:2403.17031). The code is `minialign/methods/ppo.py`.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes, try this). Run `train(epochs=20, eps=0.02)`. Before you do: a letter starts at 1/27
# = 0.037. How far can the clip let it rise in one rollout with ε = 0.02, and with ε = 0.2? And a letter that has 0.9?
#
# **Exercise 2** (medium, 15 minutes). Pay the reward one slot late, at `last + 1`, and run `train(shape=…)`. Hint:
# add a column of zeros first and remove it at the end. Which gradient is left?
#
# **Exercise 3** (hard, 20 minutes). At π\*, show that $v(s) = \beta \log \mathbb{E}_\mathrm{ref}[e^{r/\beta}\,|\,s]$
# for every prefix s, and that each δ is 0. Check it on samples from π\*.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# The gradient is ∇ log π divided by log π_old, which is negative: every token is pushed in the wrong direction. A
# check of values at ρ = 1 passes; one of gradients fails.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# Both tokens of the first row should have A = 1 − 0.5 = 0.5 but get 1: the critic's number for the padding is added
# as if it were a next state, and λ = 1 hands it on to the first token. This is a bonus of 0.5 for stopping early.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
right_ones = my_gae(paid, said, two_rows, 1.0, 1.0)[0]
always((fast_gae(paid, said, two_rows, 1.0, 1.0) - right_ones)[0].tolist() == [0.5, 0.5, 0.0],
       "The critic's word about the padding is added to both tokens of the short row.")
print(right_ones.numpy())

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# Its own clip lets a letter rise to 1.02/27 = 0.0378 with ε = 0.02, to 1.2/27 = 0.0444 with 0.2. But the other 26
# fall too: if all fall by 2 %, the right one has 1 − 0.98·26/27 = 0.056. The run reached 0.047. So ε bounds a ratio
# only loosely. From 0.9, ε = 0.02 allows 0.918; ε = 0.2 is no limit.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
slow = train(epochs=20, eps=0.02)
print(f"ε = 0.02: P(right letter) {slow.right[1]:.4f} after one rollout, "
      f"{slow.right[-1]:.3f} at the end")
this_run(slow.right[-1] < 0.85, "A narrow clip is slow.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# The reward is cut off with the extra column. Only the gradient of the KL penalty is left, so the policy stays at the
# reference.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
def one_late(rewards, logps, ref_logps, mask, *, beta):
    token_rewards = torch.where(mask, -beta * (logps - ref_logps), 0)
    padded = torch.cat([token_rewards, torch.zeros(len(rewards), 1)], 1)  # (B, T + 1)
    for b in range(len(rewards)):
        padded[b, mask[b].nonzero().max() + 1] += rewards[b]
    return torch.where(mask, padded[:, :-1], 0)


late = train(shape=one_late)
print(f"one slot late: P(right letter) {late.right[-1]:.4f}, as at the start ({1 / CHOICES:.4f})")
this_run(abs(late.right[-1] - 1 / CHOICES) < 1e-3,
         "No reward arrives, so the policy stays at the reference.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Given s, π\*(y|s) = ref(y|s) e^{r/β}/Z(s) with Z(s) = 𝔼_ref[e^{r/β}|s]. What is still to come is r − β log
# π\*(y|s)/ref(y|s) = β log Z(s), the same for every y; so this is v(s), and no token changes it: δ = 0. For the
# sentence, v = (share right so far) + (places left) · β log((e^{1/(32β)} + 26)/27).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
y = torch.multinomial(star, 8, replacement=True).T
hits, every = (y == goal).double(), torch.ones(8, len(goal), dtype=torch.bool)
star_logps = star.double().log()[PLACES, y]
ref_logps = torch.full_like(star_logps, -math.log(CHOICES))
star_rewards = ppo.shape_rewards(hits.mean(1), star_logps, ref_logps, every, beta=BETA)
step = BETA * math.log((math.exp(1 / (len(goal) * BETA)) + CHOICES - 1) / CHOICES)
star_values = (hits.cumsum(1) - hits) / len(goal) + (len(goal) - PLACES) * step
delta, _ = ppo.gae(star_rewards, star_values, every, gamma=1.0, lam=0.0)  # λ = 0: A is δ
print(f"largest |δ| at π*: {delta.abs().max():.0e}")
always(delta.abs().max() < 1e-6, "At π* no token changes the value.")
