# %% [markdown]
# # 08b · Frozen Lake: PPO plays a game, and a reward comes back from games
#
# **You will build** value iteration with and without a pull to a reference, the visits of a policy, and inverse RL from
# visits. PPO from tutorial 08 plays the same game, and you compare it with the exact answer.
#
# **Time:** 24 minutes of reading, 40 seconds of computer.
#
# **You need:** [08 · PPO](08_ppo.ipynb); for the second half the idea of [05 · Inverse RL](05_inverse_rl.ipynb).
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import numpy as np
import torch

from minialign.methods import ppo
from toy import frozen_lake
from toy.frozen_lake import FOUR, Lake
from tutorials.checks import always, this_run
from tutorials.figures import ppo as figures

# %% [markdown]
# ## The question
#
# PPO was first tested on simulated robots and on Atari games. In a small game the best [policy](../GLOSSARY.md#policy)
# can be computed exactly, so we can see whether PPO finds it (sections 1 to 4). Then we ask the opposite question.
# Somebody else plays, and we see only the games: what was the player's [reward](../GLOSSARY.md#reward) (sections 5 to
# 7)?
#
# ## 1. The lake
#
# Frozen Lake (from gymnasium) has 16 fields. You start in a corner and move left, down, right or up. A game ends in a
# hole, with reward 0, or at the gift, with reward 1. Fields are numbered row by row from 0, the start, to 15, the gift.
# On *dry* ice a move does what it says. On *slippery* ice it does so one time in three; else you slide to one side.

# %%
GAMMA, BETA = 0.99, 0.1
dry, slippery = Lake(FOUR), Lake(FOUR, slippery=True)
print(f"P {dry.P.shape}: P[s, a, s'] is the chance that move a leads from field s to s'")
chances = slippery.P[0, 2]
print("slippery, at the start, move right: leads to fields", np.flatnonzero(chances),
      "with", chances[chances > 0].round(3))
figures.slide()

# %% [markdown]
# A field is like a prefix and a move is like a token. One thing is new: on slippery ice the next state is random.
#
# In the code `lake.P` holds these chances, `lake.goal` (16,) is 1 at the gift, `lake.over` marks holes and gift, and
# `lake.live` lists the other fields.
#
# ## 2. The best values: value iteration
#
# To a perfect player a field is worth as much as its best move. A move is worth the reward of the next field, plus the
# discount γ = 0.99 times what that field is worth, on average over where the ice takes you:
#
# $$Q(s, a) = \sum_{s'} P(s'|s, a)\,\big(r(s') + \gamma\,v(s')\big), \qquad v(s) = \max_a Q(s, a)$$
#
# v(s) is the [value](../GLOSSARY.md#critic) of field s, Q(s, a) that of move a there, r(s') the reward for arriving
# at s'. Start with v = 0, compute Q, then v, and repeat until nothing changes. By hand: after one sweep only the
# field beside the gift has v = 1; after two its neighbours have 0.99; the value spreads backwards.


# %%
def my_value_iteration(lake, gamma, sweeps=1000):
    """Repeat the two equations, `sweeps` times, from v = 0. Returns v (16,) and Q (16, 4).

    lake.P: (16, 4, 16) chances of the next field; its rows are 0 in holes and at the gift, so the
    value there stays 0. lake.goal: (16,) the reward r. `lake.P @ x`, for x (16,), is the average
    of x over the next field, (16, 4).
    """
    v = np.zeros(len(lake.goal))
    for _ in range(sweeps):
        Q = lake.P @ (lake.goal + gamma * v)  # watch: Q (16, 4)
        v = Q.max(1)
    return v, Q


# %% [markdown]
# ### Checkpoint
#
# (Stop in `my_value_iteration` at the first call, first sweep: `Q` has a single 1, at field 14, move right.)

# %%
for name, ice in (("dry", dry), ("slippery", slippery)):
    v, Q = my_value_iteration(ice, GAMMA)
    their_v, their_Q, best = frozen_lake.value_iteration(ice, ice.goal, GAMMA)
    np.testing.assert_allclose(v, their_v, atol=1e-9,
                               err_msg="v of my_value_iteration equals the project's.")
    np.testing.assert_allclose(Q, their_Q, atol=1e-9,
                               err_msg="Q of my_value_iteration equals the project's.")
    arrive = frozen_lake.success(ice, best)  # the exact chance of the gift, no sampling
    print(f"{name:9} v(start) = {v[0]:.4f}   the best moves reach the gift in {arrive:.4f}")
always(abs(my_value_iteration(dry, GAMMA)[0][0] - GAMMA**5) < 1e-9,
       "my_value_iteration gives v(start) = γ⁵ on dry ice: six moves lead to the gift.")
this_run(abs(arrive - 14 / 17) < 1e-9, "On slippery ice the best player wins 14 games in 17.")

# %% [markdown]
# On dry ice six moves lead to the gift. The first five are discounted, so v(start) = γ⁵. On slippery ice the best
# player falls into a hole in 3 games of 17.
#
# ## 3. With a pull to a reference
#
# Now subtract $\beta \log(\pi/\mathrm{ref})$ from the reward of each move, as for each token in 08. The
# [reference](../GLOSSARY.md#reference) moves at random, ¼ for each move. What is the best policy now?
#
# In one field we look for the π that maximises $\mathbb{E}_\pi[Q] - \beta\,\mathrm{KL}(\pi\|\mathrm{ref})$. That is the
# problem of tutorial 05 with Q for the reward. Its answer was π\* ∝ ref·e^{Q/β}, the [tilt](../GLOSSARY.md#tilt), and
# the value of that answer was β log Z:
#
# $$\pi^*(a|s) = \tfrac14\,e^{Q(s, a)/\beta} / Z(s), \qquad v(s) = \beta \log Z(s)
# = \beta \log \textstyle\sum_a \tfrac14\,e^{Q(s, a)/\beta}$$
#
# This replaces the maximum in value iteration. For β → 0 it becomes the maximum.


# %%
def my_soft_value_iteration(lake, gamma, beta, sweeps=2000):
    """Value iteration with β log Z in place of the maximum. Returns v (16,), 0 where lake.over, and
    π* (16, 4), each row a distribution.

    Q is as in my_value_iteration. In holes and at the gift Q is 0, so the formula gives 0 there.
    """
    v = np.zeros(len(lake.goal))
    for _ in range(sweeps):
        Q = lake.P @ (lake.goal + gamma * v)
        v = beta * np.log(np.exp(Q / beta).mean(1))  # the mean has the factor 1/4
    weights = np.exp(Q / beta)  # watch: weights (16, 4)
    return v, weights / weights.sum(1, keepdims=True)


# %% [markdown]
# ### Checkpoint

# %%
soft_v, star = my_soft_value_iteration(dry, GAMMA, BETA)
their_v, their_star = frozen_lake.soft_value_iteration(dry, dry.goal, GAMMA, BETA)
np.testing.assert_allclose(soft_v, their_v, atol=1e-7,
                           err_msg="v of my_soft_value_iteration equals the project's.")
np.testing.assert_allclose(star[dry.live], their_star[dry.live], atol=1e-7,
                           err_msg="π* of my_soft_value_iteration equals the project's.")
arrive_star = frozen_lake.success(dry, star)
random_moves = np.full((16, 4), 0.25)
print(f"chance of the gift: random moves {frozen_lake.success(dry, random_moves):.4f}, "
      f"π* {arrive_star:.4f}")
soft_shown = np.where(dry.over, np.nan, soft_v)
figures.lakes(dry.letters, {"the lake": (None, None), "π*, and the values v": (star, soft_shown)},
              "08b_lake.png", "The lake with its holes and its gift, and the best policy with its "
              "values, which grow towards the gift.")

# %% [markdown]
# Arrows are as long as the move is likely. Random moves reach the gift in 1 game of 72, π\* nearly always.
#
# ## 4. PPO plays
#
# Does PPO find π\* without seeing `P`? A table of logits is the policy, a table of values the
# [critic](../GLOSSARY.md#critic). Both start at 0. `train` is the loop of 08, with a field for a prefix and a move for
# a token. The learning rate falls to 0, so that the last steps are small. In training a game stops after 30 moves. The
# printed chances of the gift are exact, for PPO within 100 moves, for π\* within any number.


# %%
def play(lake, policy, n, generator, limit=30):
    """n games of a policy (16, 4). Returns fields, moves, arrivals and mask (the game is still on),
    each (n, limit)."""
    P = torch.tensor(lake.P)
    P[lake.over, :, 0] = 1  # a game that is over goes anywhere: the mask hides it
    field, rows = torch.zeros(n, dtype=torch.long), []
    for _ in range(limit):
        move = torch.multinomial(policy[field], 1, generator=generator).squeeze(1)
        arrival = torch.multinomial(P[field, move], 1, generator=generator).squeeze(1)
        on = ~torch.tensor(lake.over)[field]
        rows.append((field, move, arrival, on))
        field = torch.where(on, arrival, field)
    return [torch.stack(column, 1) for column in zip(*rows, strict=True)]


def train(lake, seed, *, beta=BETA, n=64, limit=30, rollouts=60):
    """PPO on a lake. Returns π (16, 4), the critic's v (16,), and the exact chances of the gift
    within 100 moves after each rollout of n games."""
    generator, path = torch.Generator().manual_seed(seed), []
    logits = torch.zeros(16, 4, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(16, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    for k in range(rollouts):
        old = logits.detach().log_softmax(-1)
        fields, moves, arrivals, mask = play(lake, old.exp(), n, generator, limit)
        old_logps, old_values = old[fields, moves], values.detach()[fields]
        won = torch.tensor(lake.goal)[arrivals]
        rewards = torch.where(mask, won - beta * (old_logps - np.log(1 / 4)), 0)
        advantages, returns = ppo.gae(rewards, old_values, mask, gamma=GAMMA, lam=0.95)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - k / rollouts)
        for _ in range(4):
            logps = logits.log_softmax(-1)[fields, moves]  # watch: logps (B, T)
            loss, _ = ppo.policy_loss(logps, old_logps, advantages, mask, eps=0.2)
            loss = loss + 0.5 * (values[fields] - returns)[mask].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = logits.detach().softmax(-1).numpy()
        path.append(frozen_lake.success(lake, now, 100))
    return now, values.detach().numpy(), path


def as_text(lake, policy, seed, limit=30):
    generator = torch.Generator().manual_seed(seed)
    games = play(lake, torch.tensor(policy), 1, generator, limit)
    fields, moves, arrivals, mask = (x[0] for x in games)
    end = {"G": "gift", "H": "hole"}.get(lake.letters[int(arrivals[mask][-1])], "not over")
    return "".join("LDRU"[move] for move in moves[mask].tolist()) + f" ({end})"


runs = [train(dry, seed) for seed in (0, 1, 2)]
print("moves: L left, D down, R right, U up")
print("games before:", *(as_text(dry, random_moves, seed) for seed in range(3)), sep="  ")
print("games after: ", *(as_text(dry, runs[0][0], seed) for seed in range(3)), sep="  ")
print(f"π*, computed: chance of the gift {arrive_star:.3f}, v(start) {soft_v[0]:.3f}")
for seed, (learned, critic, path) in enumerate(runs):
    off = frozen_lake.distance(dry, star, learned, GAMMA)
    chances = " ".join(f"{path[k]:.3f}" for k in (4, 9, 19, -1))
    print(f"seed {seed}: gift after 5, 10, 20, 60 rollouts {chances}; "
          f"v(start) {critic[0]:.3f}; distance to π* {off:.3f}")
    this_run(abs(path[-1] - arrive_star) < 0.02 and off < 0.05, "PPO ends at π*.")

# %% [markdown]
# `frozen_lake.distance` is the share of moves that two policies choose differently, averaged over the fields where
# the first one spends its time. PPO comes close to π\*, and its critic comes close to the exact value.
#
# ## 5. The visits of an expert
#
# Now the opposite question: from games back to a reward.
#
# Let an [expert](../GLOSSARY.md#expert) play π\* of section 3, and keep only how often each field is reached. These
# *visits* are discounted:
#
# $$d(s) = \sum_{t \ge 0} \gamma^t\,P(\text{the field after move } t + 1 \text{ is } s)$$
#
# They can be computed: begin with all probability at the start. Repeat: move the probability by policy and ice, and add
# γ^t times the result. By hand: a player on dry ice who moves right twice and then down visits field 1 with weight 1,
# field 2 with γ, and field 6 with γ².


# %%
def my_visits(lake, policy, gamma, moves=1000):
    """d (16,): discounted arrivals. policy: (16, 4). The game starts in field 0, and arrivals after
    the first move count γ^0 = 1. Rows of lake.P are 0 in holes and at the gift: nothing leaves."""
    step = np.einsum("sa,sat->st", policy, lake.P)  # watch: step (16, 16)
    where, d = np.eye(len(policy))[0], np.zeros(len(policy))
    for t in range(moves):
        where = where @ step  # probability over fields after move t + 1
        d += gamma**t * where
    return d


# %% [markdown]
# ### Checkpoint

# %%
expert_visits = my_visits(dry, star, GAMMA)
for ice, policy in ((dry, star), (slippery, random_moves)):
    np.testing.assert_allclose(my_visits(ice, policy, GAMMA),
                               frozen_lake.visits(ice, policy, GAMMA)[0], atol=1e-6,
                               err_msg="my_visits equals the project's visits.")
print("visits of the expert:", expert_visits.reshape(4, 4).round(2), sep="\n")

# %% [markdown]
# ## 6. A reward from visits
#
# [Inverse RL](../GLOSSARY.md#inverse-rl) looks for the reward r under which the expert's moves are most likely, with γ,
# β and the lake known. (This is maximum entropy inverse RL, Ziebart et al. 2008; for random worlds maximum causal
# entropy, Ziebart et al. 2010.) Only arrivals have rewards, one number for each field.
#
# Under r the best policy has $\log \pi_r(a|s) = \log\tfrac14 + (Q - v)/\beta$. On dry ice $Q = r(s') + \gamma\,v(s')$.
# Weight move t with $\gamma^t$, as the game weights its rewards; then nearly everything cancels. So add up $\gamma^t (Q
# - v)$ along a game. The term of move t is $\gamma^t r(s_{t+1}) + \gamma^{t+1} v(s_{t+1}) - \gamma^t v(s_t)$. Its
# second part cancels the last part of the next term, so the sum is $\sum_t \gamma^t r(s_{t+1}) - v(\mathrm{start})$.
# The discounted log-likelihood of the expert's moves is therefore
#
# $$\ell(r) = \frac1\beta \Big(\sum_s d_E(s)\,r(s) - v_r(\mathrm{start})\Big) + \mathrm{const}, \qquad
# \frac{\partial \ell}{\partial r(s)} = \frac1\beta \big(d_E(s) - d_{\pi_r}(s)\big)$$
#
# $d_E$ are the expert's discounted visits, $d_{\pi_r}$ those of the best policy for r. For the gradient we need the slope
# of v(start) in r(s). Raise r(s) a little. If the policy stays as it is, v(start) rises by this much times its visits of
# s. The policy changes too, but it is the best one, so a small change of it does not change v(start) to first order.
# (In 05, β log Z has the slope π for the same reason.) So: raise the reward where the expert goes, lower it where you
# go. On slippery ice the same holds on average over the ice, that is, if the visits
# are exact.


# %%
def my_learn_reward(lake, expert_visits, gamma, beta, steps=600, size=0.02):
    """Rewards r (16,) for arriving at each field, learned from visits (16,): start at 0, and
    `steps` times add size · (expert's visits − visits of the best policy for the present r).
    Returns r and that policy (16, 4).

    frozen_lake.soft_policy_iteration(lake, r, gamma, beta) returns (v, π*) for any reward r.
    """
    r = np.zeros(len(expert_visits))
    for _ in range(steps):
        _, own = frozen_lake.soft_policy_iteration(lake, r, gamma, beta)
        gradient = expert_visits - my_visits(lake, own, gamma, moves=100)  # watch: gradient (16,)
        r += size * gradient
    return r, own


# %% [markdown]
# ### Checkpoint
#
# The project climbs to the maximum with a line search. 600 plain steps come close. Look for the gift in the corner.

# %%
learned, own = my_learn_reward(dry, expert_visits, GAMMA, BETA)
top, taught = frozen_lake.learn_reward(dry, expert_visits, GAMMA, BETA)
gap = frozen_lake.distance(dry, taught, own, GAMMA)
print(f"distance of the learned policy to the expert: "
      f"mine {frozen_lake.distance(dry, star, own, GAMMA):.4f}, "
      f"the project's {frozen_lake.distance(dry, star, taught, GAMMA):.4f}")
this_run(gap < 0.05, "my_learn_reward ends near the policy of the project's.")
_, asked = frozen_lake.soft_policy_iteration(dry, learned, GAMMA, BETA)
this_run(frozen_lake.distance(dry, star, asked, GAMMA) < 0.05,
         "For the reward of my_learn_reward the expert's policy is nearly the best.")
print("learned rewards:", learned.reshape(4, 4).round(2) + 0.0, sep="\n")
shifted = frozen_lake.same_reward(dry, top, dry.goal, GAMMA)
panels = {"learned from visits": (None, top), "the same, shifted": (None, shifted)}
figures.lakes(dry.letters, panels, "08b_reward.png",
              "Left the learned reward: positive at the gift, negative at holes. "
              "Right the same reward shifted: 1 at the gift, 0 elsewhere.", digits=3)
this_run(np.abs(shifted - dry.goal).max() < 1e-2,
         "The learned reward is the true one up to a constant per game.")

# %% [markdown]
# The picture shows the project's reward, at the maximum. In yours, rarely visited fields have not moved as far yet. The
# gift has about 0.8, a hole −0.2, and all else a little less than 0. That looks different from the truth, but it is the
# true reward minus a constant per game. Subtract c at every hole and at the gift, and (1 − γ)c at every other arrival.
# A game of T moves that ends then loses
#
# $$(1 - \gamma)\,c\,(1 + \gamma + \dots + \gamma^{T-2}) + \gamma^{T-1} c = c,$$
#
# the same for every game, so the best policy stays. With c = 0.2 added back, the gift has 1 and all else 0. So from
# exact visits, and with β and γ known, inverse RL finds the reward of this lake, up to a constant per game.
#
# ## 7. Break it: only five games
#
# Exact visits need infinitely many games. Take five. `frozen_lake.from_few` draws them and returns the distance to the
# expert for three ways to learn:
#
# - **from visits:** as above, with the visits of these games
# - **from moves:** the same, but only the moves that were seen count, field by field; where the ice then took the
#   player is not used
# - **imitation**, the [SFT](../GLOSSARY.md#sft) of a table: in each field the shares of the moves that were seen, and ¼
#   where nothing was seen
#
# Compare the first two columns, on dry and on slippery ice.

# %%
few = {}
for name, ice, beta in (("dry ice", dry, BETA), ("slippery ice", slippery, 0.005)):
    expert = frozen_lake.soft_value_iteration(ice, ice.goal, GAMMA, beta)[1]
    rows = [frozen_lake.from_few(ice, expert, 5, GAMMA, beta, np.random.default_rng(seed))
            for seed in range(3)]
    visits, moves, imitation = np.mean(rows, 0)
    few[name] = (visits, moves, imitation)
    print(f"{name:13} distance to the expert: from visits {visits:.3f}, from moves {moves:.3f}, "
          f"imitation {imitation:.3f}")
this_run(few["dry ice"][0] < few["dry ice"][2], "On dry ice the reward is nearer than imitation.")
this_run(few["slippery ice"][0] > 2 * few["slippery ice"][1],
         "On slippery ice visits mislead.")

# %% [markdown]
# These are means of three draws. On dry ice visits and moves hold the same information. A reward comes nearer to the
# expert than imitation: one number for the gift also says what to do in fields that nobody showed. On slippery ice the
# visits of five games depend mostly on where the ice led. A reward fitted to them is far worse than imitation. Fitted
# to the moves it is about as good.
#
# docs/RESULTS.md ("Frozen Lake") has more on this lake, and a comparison of methods on it from the IFT paper.
#
# ## What is wrong here? (1)
#
# Somebody wants the player to stay curious. Instead of subtracting β times the KL from random moves, the reward adds β
# times the entropy of each move. The entropy is log 4 − KL(π‖random), so the only difference is β log 4 per move. What
# happened?

# %%
trap_v, trapped = frozen_lake.soft_value_iteration(dry, dry.goal, GAMMA, BETA, entropy=True)
print(f"v(start) {trap_v[0]:.2f}; "
      f"reaches the gift within 100 moves: {frozen_lake.success(dry, trapped, 100):.0e}")
print("a game:", as_text(dry, trapped, seed=0))
this_run(frozen_lake.success(dry, trapped, 100) < 1e-6,
         "With the entropy bonus the player stays away from the gift.")

# %% [markdown]
# ## What is wrong here? (2)
#
# A player without a pull and without a discount: γ = 1. Value iteration converges, each move taken is a best one, and
# nobody ever falls into a hole. Why is there no gift?

# %%
patient_v, patient_Q = my_value_iteration(dry, 1.0)
first_best = np.eye(4)[patient_Q.argmax(1)]  # the first best move; left, down, right, up
print("values of the live fields:", np.unique(patient_v[dry.live]),
      "  chance of the gift:", frozen_lake.success(dry, first_best, 1000))
print("a game:", as_text(dry, first_best, seed=0))

# %% [markdown]
# ## What you now know
#
# - PPO needs states, actions and rewards, not tokens. On the lake it ends near the π\* that soft value iteration
#   computes.
# - Soft value iteration is value iteration with v = β log Z in place of the maximum.
# - Inverse RL raises the reward where the expert goes and lowers it where you go. From exact visits, with β and γ
#   known, it finds this lake's reward up to a constant per game.
# - If the world is random and games are few, fit the reward to the moves. Where they led depends on luck.
#
# Next: [09 · DPO](09_dpo.ipynb), which learns from preferences without rollouts.
#
# **Sources:** Schulman et al. 2017 (PPO, arXiv:1707.06347), Ziebart et al. 2008 (maximum entropy inverse RL), Ziebart
# et al. 2010 (maximum causal entropy). The code is `toy/frozen_lake.py`.
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes, try this). What becomes of π\* and of its chance of the gift on dry ice for a large
# β and for a small one? Say it first, then call `my_soft_value_iteration` with β = 10, 1, 0.3, 0.1, 0.03.
#
# **Exercise 2** (medium, 15 minutes). Let γ = 1 and β = 0.1 on dry ice. Show that a game is like one completion: π\*
# reaches the gift with probability $p\,e^{1/\beta}/(1 - p + p\,e^{1/\beta})$, where p is the chance of random moves.
# Check it.
#
# **Exercise 3** (hard, 20 minutes). Let PPO play the slippery lake with β = 0.1. It hardly ever reaches the gift. Is
# it broken? Compute how much the KL would subtract from the reward of the best player of section 2. Then try β = 0.005,
# with `n=256, limit=100`.
#
# ## Answers
#
# <details><summary>Puzzle 1</summary>
#
# The gift is worth 1 once, and it ends the game. A bonus of up to β log 4 per move adds up to at most β log 4/(1 − γ) =
# 13.9 for somebody who never stops. So the best policy avoids the gift. In the same way a bonus per *token* makes a
# language model write on.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# Without a discount a late gift is worth as much as an early one: each live field is worth 1, and every move that
# does not end in a hole is a best one. The first of them is "left", and at the border it does not move. With a
# discount earlier is better. With the pull, moves stay random, and the player arrives.
#
# </details>
#
# <details><summary>Exercise 1</summary>
#
# With a large β the gift is worth less than the KL of going there, so the chance stays near 1 in 72. With a small β
# only the best moves remain, and all games arrive. The change comes where e^{1/β} is about 72, at β = 0.23 (exercise
# 2).
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
for beta in (10, 1, 0.3, 0.1, 0.03):
    chance = frozen_lake.success(dry, my_soft_value_iteration(dry, GAMMA, beta)[1])
    print(f"β = {beta:4}: reaches the gift with {chance:.4f}")
this_run(chance > 0.999, "With a small β all games arrive.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# On dry ice only the policy is random, and without a discount a game's objective is r − β log(π(game)/ref(game)),
# exactly that of a completion. So π\* ∝ ref·e^{r/β} over whole games: all that reach the gift become e^{1/β} times as
# likely as before, relative to the others.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
p = frozen_lake.success(dry, random_moves)
expected = p * np.exp(1 / BETA) / (1 - p + p * np.exp(1 / BETA))
found = frozen_lake.success(dry, my_soft_value_iteration(dry, 1.0, BETA)[1])
print(f"formula {expected:.6f}, soft value iteration {found:.6f}")
always(abs(expected - found) < 1e-6,
       "my_soft_value_iteration with γ = 1 gives the formula for one long completion.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# PPO is not broken. A certain move costs β log 4. On slippery ice games are long, so this adds up to far more than the
# gift is worth, and π\* stays near random moves. With β = 0.005 it is little, and π\* arrives in three games of four.
# Now noise is the problem: among 64 random games about one finds the gift. With 256 games in a rollout PPO gets most of
# the way.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
_, _, best = frozen_lake.value_iteration(slippery, slippery.goal, GAMMA)
_, time = frozen_lake.visits(slippery, best, GAMMA)  # discounted time in each field
kl = (best * np.log(4 * np.maximum(best, 1e-9))).sum(1)
for beta, n, limit in ((0.1, 64, 30), (0.005, 256, 100)):
    target = frozen_lake.success(slippery, my_soft_value_iteration(slippery, GAMMA, beta)[1])
    reached = train(slippery, 0, beta=beta, n=n, limit=limit)[2][-1]
    print(f"β = {beta}: β KL of the best player {beta * (time * kl)[slippery.live].sum():.2f}; "
          f"chance of the gift: π* {target:.3f}, PPO {reached:.3f}")
this_run(reached > target - 0.3, "With many games PPO gets most of the way to π*.")
