"""Gymnasium's Frozen Lake: what each method learns from one demonstration, what inverse RL learns from many, and the IFT paper's Figure 3.

A lake is a few small tables: where each move leads (the environment's own `P`) and what it earns. So every reference value is exact: values
and best actions come from value iteration, the probability of reaching the gift (the goal) from a linear recursion. With a pull β to a
uniform ref, soft value iteration gives the policy π ∝ ref·e^{Q/β}. A language model has the same closed form, with tokens for moves.

    references    values, best actions and success of the lakes (14/17 on the slippery one); what an entropy bonus does
    Figure 3      A two-layer net learns from one game (SFT, IFT, IRFT, RFT), from a good and a bad one (ORPO, DPO) or by playing (PPO,
                  GRPO). All start at the same weights. Another net, θ*, was fitted from them to the best policy (in one setting to a soft
                  one). The paper ranks the methods by the mean squared error of their *parameters* against θ*. We also measure how far the
                  policy is from that of θ*, KL(π*‖π), and how often it reaches the gift.
    a control     The hidden units of θ* are permuted: other parameters, same policy. So an error of parameters says little about policies.
    inverse RL    A reward is learned from state visits alone (maximum entropy; RFT's gradient on a table), and a policy from the reward.
                  From 1, 5 or 20 games this policy is nearer to the expert than SFT's if the ice does not slip. If it slips, visits depend
                  mostly on the ice, and a reward fitted to visits is worse than SFT. A reward fitted to the moves is not.

    python -m toy.frozen_lake                                          # ten seeds; PASS or FAIL per reference; a figure; exit 1 on a miss
    python -m toy.frozen_lake --full                                   # thirty seeds

The paper gives no map, no width, no learning rate and no numbers. So we judge its ranking in five settings, without a gate. One of them
was found by a search for a case where the ranking holds. There θ* itself seldom arrives, and the nearest to θ* of four methods plays worst.

Checked by tests/toy/test_frozen_lake.py.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch
from torch.func import vmap

from minialign.engine.common import BadInput
from minialign.methods.dpo import dpo_loss
from minialign.methods.grpo import group_advantages, grpo_loss
from minialign.methods.ift import ift_loss
from minialign.methods.irft import irft_loss
from minialign.methods.orpo import orpo_loss
from minialign.methods.ppo import gae, policy_loss, value_loss
from minialign.methods.rft import reward_alignment_loss
from minialign.methods.rloo import leave_one_out, rloo_loss
from minialign.methods.sft import sft_loss
from minialign.settings import cli, exit_codes
from toy.report import Report

MOVES = {letter: move for move, letter in enumerate("LDRU")}


@dataclass
class Config:
    seeds: int = 10                 # number of seeds, for the initial weights of the nets and the draws of demonstrations
    full: bool = False              # use thirty seeds
    steps: int = 300                # updates of SFT, IFT, ORPO and DPO (always 60 in the setting "found by search")
    hidden: int = 32                # width of the nets
    out: str = "runs/frozen_lake.png"  # path of the figure


# ----------------------------------------------------------------------------------------------------------------- the lake


class Lake:
    """A map of FrozenLake-v1 as tables. S states, A = 4 moves.

    P: (S, A, S) probability of the next state, from gymnasium; all 0 in a hole and at the goal, where the game is over
    goal: (S,) 1 at the gift, 0 elsewhere: the reward for arriving there
    """

    def __init__(self, rows, slippery=False):
        env = gymnasium.make("FrozenLake-v1", desc=rows, is_slippery=slippery).unwrapped
        self.letters, self.columns = env.desc.astype(str).ravel(), env.desc.shape[1]
        self.P = np.zeros((len(self.letters), 4, len(self.letters)))
        for state, moves in env.P.items():
            for move, outcomes in moves.items():
                for chance, arrival, _, _ in outcomes:
                    self.P[state, move, arrival] += chance
        self.over = np.isin(self.letters, ("H", "G"))
        self.P[self.over] = 0
        self.goal = (self.letters == "G").astype(float)
        self.live = np.flatnonzero(~self.over)

    def walk(self, moves):
        """Follow a string of moves such as "RRDDDR" on ice that does not slip. Returns (states, moves), one more state than moves."""
        states = [0]
        for letter in moves:
            states.append(int(self.P[states[-1], MOVES[letter]].argmax()))
        return states, [MOVES[letter] for letter in moves]

    def episode(self, policy, rng):
        """Play one game to its end. Returns (states, moves) as walk does."""
        states, moves = [0], []
        while not self.over[states[-1]]:
            moves.append(int(rng.choice(4, p=policy[states[-1]])))
            states.append(int(rng.choice(len(self.P), p=self.P[states[-1], moves[-1]])))
        return states, moves


FOUR = ["SFFF", "FHFH", "FFFH", "HFFG"]
EIGHT = ["SFFFFFFF", "FFFFFFFF", "FFFHFFFF", "FFFFFHFF", "FFFHFFFF", "FHHFFFHF", "FHFFHFHF", "FFFHFFFG"]
TWO_WAYS = ["SFFF", "FHHG", "FHHF", "FFFF"]  # one best way, RRRD, and one other, DDDRRRUU: the smallest form of the paper's design


def converge(update, values):
    """Repeat values = update(values) until no entry changes by more than rounding. Raises FloatingPointError if it does not converge."""
    for _ in range(50_000):
        following = update(values)
        if np.abs(following - values).max() <= 1e-15 * max(1, np.abs(following).max()):
            return following
        values = following
    raise FloatingPointError("the sweeps do not converge: set gamma below 1, or make sure that every game ends")


def q_of(lake, rewards, V, gamma):
    """Q(s, a) = Σ_s' P(s'|s, a)·(r(s') + γ·V(s')): (S, A). rewards (S,) are earned on arrival."""
    return lake.P @ (rewards + gamma * V)


def value_iteration(lake, rewards, gamma):
    """V* (S,), Q* (S, A), and the uniform policy over the best moves (S, A)."""
    V = converge(lambda V: q_of(lake, rewards, V, gamma).max(1), np.zeros(len(lake.P)))
    Q = q_of(lake, rewards, V, gamma)
    best = (Q > Q.max(1, keepdims=True) - 1e-9).astype(float)
    return V, Q, best / best.sum(1, keepdims=True)


def soft_backup(lake, rewards, V, gamma, beta, bonus=0.0):
    """One sweep of V(s) = β·log Σ_a ref(a|s)·e^{Q(s,a)/β}, ref uniform: (V, π ∝ ref·e^{Q/β}). bonus is added to every move."""
    Q = q_of(lake, rewards, V, gamma) + bonus
    top = Q.max(1, keepdims=True)
    weights = np.exp((Q - top) / beta) / 4
    V = top[:, 0] + beta * np.log(weights.sum(1))
    return np.where(lake.over, 0, V), weights / weights.sum(1, keepdims=True)


def soft_value_iteration(lake, rewards, gamma, beta, *, horizon=None, entropy=False):
    """max_π E[Σ_t γ^t·(r(s_{t+1}) − β·KL(π‖uniform))]: V (S,), π (S, A). horizon: the game ends after that many moves, and π is for
    the first one. entropy: use β·H(π) instead of −β·KL, which adds β·log 4 to every move."""
    V, bonus = np.zeros(len(lake.P)), beta * math.log(4) if entropy else 0.0
    if horizon is None:
        V = converge(lambda V: soft_backup(lake, rewards, V, gamma, beta, bonus)[0], V)
    for _ in range((horizon or 1) - 1):
        V, _ = soft_backup(lake, rewards, V, gamma, beta, bonus)
    return soft_backup(lake, rewards, V, gamma, beta, bonus)


def soft_policy_iteration(lake, rewards, gamma, beta, policy=None):
    """V and π of soft_value_iteration, in a few steps instead of hundreds: solve linear equations for the value of the policy, set
    π ∝ e^{Q/β}, repeat. policy: where to start."""
    policy = np.full(lake.P.shape[:2], 0.25) if policy is None else policy
    for _ in range(200):
        kl = (policy * np.log(4 * np.maximum(policy, 1e-300))).sum(1)
        chain = np.einsum("sa,sat->st", policy, lake.P)
        V = np.linalg.solve(np.eye(len(chain)) - gamma * chain, np.where(lake.over, 0, chain @ rewards - beta * kl))
        V, following = soft_backup(lake, rewards, V, gamma, beta)
        moved, policy = np.abs(following - policy).max(), following
        if moved < 1e-11:  # (rounding in Q is divided by β)
            break
    return V, policy


def success(lake, policy, moves=None):
    """The probability of reaching the gift within `moves` moves (None: ever), computed by a recursion without sampling."""
    chain, reached = np.einsum("sa,sat->st", policy, lake.P), np.zeros(len(lake.P))
    if moves is None:
        return float(converge(lambda v: chain @ (lake.goal + v), reached)[0])
    for _ in range(moves):
        reached = chain @ (lake.goal + reached)
    return float(reached[0])


def visits(lake, policy, gamma):
    """Discounted arrivals D(s) = Σ_t γ^t·P(s_{t+1} = s), and the discounted time in s, which includes the start: (S,), (S,)."""
    chain = np.einsum("sa,sat->st", policy, lake.P)
    time = np.linalg.solve(np.eye(len(chain)) - gamma * chain.T, np.eye(len(chain))[0])
    return chain.T @ time, time


# --------------------------------------------------------------------------------------------------------------- inverse RL


def learn_reward(lake, shown, gamma, beta, *, ridge=0.0, precision=1e-9):
    """Maximum causal entropy inverse RL: the rewards (S,) whose π_r ∝ ref·e^{Q/β} makes an expert's moves most likely, and that policy.

    log π_r(a|s) = log ref + (Q − V)/β. The gradient of the discounted log-likelihood is RFT's: 1/β times the gradient of the
    demonstration's reward minus that of the policy's own answer. `shown` sets what these two are:
        (S,)    discounted arrivals of the expert. Along an episode γ^t·(Q − V) sums to the discounted rewards of its arrivals minus
                V(start), on average over the ice. V is convex in r, so the likelihood is concave. The policy's own answer is a whole game.
        (S, A)  discounted counts of the expert's moves. From each state shown, the demonstration is the expert's move and then the
                policy's moves; the own answer is the policy's moves from that state on. A few games on slippery ice do not sum to
                this simple form: then the likelihood is not concave and the result is a local optimum.
    So the loss is rft.reward_alignment_loss. The likelihood is only the value that the line search reads to choose its step size.
    """
    rewards = torch.zeros(len(lake.P), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, tolerance_grad=precision, tolerance_change=0, line_search_fn="strong_wolfe")
    policy, start = None, np.eye(len(lake.P))

    def closure():
        nonlocal policy
        optimizer.zero_grad()
        r = rewards.detach().numpy()
        V, policy = soft_policy_iteration(lake, r, gamma, beta, policy)
        chain = np.einsum("sa,sat->st", policy, lake.P)
        own = np.linalg.solve(start - gamma * chain, chain)  # (S, S) discounted arrivals of the current policy from each state
        if shown.ndim == 1:
            demo, own, less_likely = shown, own[0], V[0] - shown @ r
        else:
            less_likely = shown.sum(1) @ V - (shown * q_of(lake, r, V, gamma)).sum()
            demo, own = np.einsum("sa,sat->t", shown, lake.P @ (start + gamma * own)), shown.sum(1) @ own
        loss, _ = reward_alignment_loss((torch.tensor(demo) @ rewards)[None], (torch.tensor(own) @ rewards)[None], beta=beta)
        (loss + ridge * rewards.square().sum() / beta).backward()
        return torch.tensor((less_likely + ridge * (r**2).sum()) / beta)

    optimizer.step(closure)
    rewards = rewards.detach().numpy()
    return rewards, soft_policy_iteration(lake, rewards, gamma, beta, policy)[1]


def same_reward(lake, learned, rewards, gamma):
    """The learned rewards, shifted by the one constant c that no policy can reveal: adding (1 − γ)·c to the reward of every live state and
    c to that of every end adds c to V at all live states, and π stays the same. We choose c so that the end states have the right sum."""
    ends = lake.over & (lake.P.sum((0, 1)) > 0)
    c = float((rewards - learned)[ends].mean())
    return learned + c * np.where(lake.over, 1, 1 - gamma)


def distance(lake, expert, policy, gamma):
    """Total variation between the moves of two policies, averaged over states, weighted by the expert's discounted time there."""
    _, time = visits(lake, expert, gamma)
    time = np.where(lake.over, 0, time)
    return float(time / time.sum() @ np.abs(expert - policy).sum(1) / 2)


FEW = ("inverse RL, visits", "inverse RL, moves", "SFT, a table")


def from_few(lake, expert, n, gamma, beta, rng):
    """Learn from n episodes in each of the three ways in FEW. Returns their distances to the expert."""
    arrivals, moves, counts = np.zeros(len(lake.P)), np.zeros((len(lake.P), 4)), np.zeros((len(lake.P), 4))
    for _ in range(n):
        states, made = lake.episode(expert, rng)
        discount = gamma ** np.arange(len(made)) / n
        np.add.at(arrivals, states[1:], discount)
        np.add.at(moves, (states[:-1], made), discount)
        np.add.at(counts, (states[:-1], made), 1)
    learned = [learn_reward(lake, shown, gamma, beta, ridge=1e-3, precision=1e-4)[1] for shown in (arrivals, moves)]
    seen = counts.sum(1, keepdims=True)
    sft = np.where(seen > 0, counts / np.maximum(seen, 1), 0.25)  # maximum likelihood; uniform in states never seen
    return [distance(lake, expert, policy, gamma) for policy in (*learned, sft)]


# ------------------------------------------------------------------------------------------------- nets, all seeds in one batch


def first_weights(n_states, hidden, seeds):
    """Two layers; the first has a row per state, its embedding. Uniform in ± 1/√inputs, as in nn.Linear: {name: (seeds, …)}."""
    nets = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape, inputs, generator=generator):
            return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(inputs)

        nets.append({"embedding": uniform(n_states, hidden, inputs=n_states), "bias": uniform(hidden, inputs=n_states),
                     "head": uniform(hidden, 4, inputs=hidden), "head_bias": uniform(4, inputs=hidden)})
    return {name: torch.stack([net[name] for net in nets]) for name in nets[0]}


def log_policy(net, features=None):
    """log π(a | features): features (…, S) are weights over the states, by default one-hot for each state -> (…, 4)."""
    hidden = net["embedding"] if features is None else features @ net["embedding"]
    return (torch.tanh(hidden + net["bias"]) @ net["head"] + net["head_bias"]).log_softmax(-1)


def policies_of(nets):
    """The policies of all nets as a numpy array, (seeds, S, 4)."""
    return vmap(log_policy)(nets).exp().detach().numpy()


def fit(nets, losses, steps, optimizer_class, lr):
    """Train all seeds side by side. losses(nets, k) -> (seeds,); the gradient of their sum is each net's own. Returns the trained nets."""
    nets = {name: weight.clone().requires_grad_(True) for name, weight in nets.items()}
    optimizer = optimizer_class(nets.values(), lr=lr)
    for k in range(steps):
        optimizer.zero_grad()
        losses(nets, k).sum().backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in nets.items()}


def each(loss_of):
    """Turn the loss of one net into `losses` of all nets, as fit expects it."""
    return lambda nets, k: vmap(loss_of)(nets)


def parameter_error(nets, others):
    """Mean squared difference of all parameters: (seeds,)."""
    size = sum(weight[0].numel() for weight in nets.values())
    return sum((nets[name] - others[name]).square().flatten(1).sum(1) for name in nets).numpy() / size


# --------------------------------------------------------------------- the methods: the project's losses on a trajectory (states, moves)


def along(net, states, moves):
    """log π(a_t|s_t): (T,)."""
    return log_policy(net)[states, moves]


def sft_of(net, good):
    logps = along(net, *good)[None]  # (1, T)
    return sft_loss(logps, torch.ones_like(logps, dtype=torch.bool))[0]


def lookahead(lake, net, states, mix):
    """ŝ_t = (1 − λ)·φ(s_t) + λ·φ(the state that the net's own guess at t − 1 leads to), φ one-hot: (T, S). On slippery ice the second
    term is a mean over the guess's outcomes. The first state is not mixed."""
    onehot = torch.eye(len(lake.P), dtype=torch.float64)[states]
    guesses = log_policy(net).detach()[states[:-1]].argmax(-1)
    led = torch.tensor(lake.P)[states[:-1], guesses]
    return torch.cat([onehot[:1], (1 - mix) * onehot[1:] + mix * led])


def ift_of(net, good, *, lake, mix=0.2, decay=0.95):
    states, moves = good
    logps = log_policy(net, lookahead(lake, net, states, mix)).gather(1, moves[:, None]).T  # (1, T)
    return ift_loss(logps, torch.ones_like(logps, dtype=torch.bool), decay=decay)[0]


def orpo_of(net, good, bad):
    return orpo_loss(along(net, *good).mean()[None], along(net, *bad).mean()[None], weight=0.25)[0]


def dpo_losses(start, good, bad, beta):
    def both(net):
        return along(net, *good).sum()[None], along(net, *bad).sum()[None]  # (1,), (1,)

    ref = vmap(both)(start)
    return lambda nets, k: vmap(lambda net, ref: dpo_loss(*both(net), *ref, beta=beta)[0])(nets, ref)


def play(lake, logps, n, generator, limit=30):
    """Sample n episodes from each policy in logps (seeds, S, 4). Returns states, moves, arrivals and mask, each (seeds, n, T)."""
    P, over = torch.tensor(lake.P).cumsum(-1), torch.tensor(lake.over)
    state = torch.zeros(len(logps), n, dtype=torch.long)
    seed, steps = torch.arange(len(logps))[:, None], []
    chances = logps.exp().cumsum(-1)
    for _ in range(limit):
        u, v = torch.rand(2, *state.shape, 1, generator=generator, dtype=torch.float64)
        move = (u > chances[seed, state][..., :-1]).sum(-1)
        arrival = (v > P[state, move][..., :-1]).sum(-1)
        steps.append((state, move, arrival, ~over[state]))
        state = torch.where(over[state], state, arrival)
    return [torch.stack(column, -1) for column in zip(*steps, strict=True)]


def games(lake, nets, ref, generator, n=64):
    """Games that `play` samples from the nets, with log-probs under the nets and ref (seeds, S, 4), 0 after the end: (seeds, n, T) each."""
    old = vmap(log_policy)(nets).detach()
    states, moves, arrivals, mask = play(lake, old, n, generator)
    rows = torch.arange(len(ref))[:, None, None]
    old_logps, ref_logps = (torch.where(mask, logps[rows, states, moves], 0) for logps in (old, ref))
    won = torch.where(mask, torch.tensor(lake.goal)[arrivals], 0)
    return SimpleNamespace(states=states, moves=moves, arrivals=arrivals, mask=mask, old_logps=old_logps, ref_logps=ref_logps, won=won)


def by_seed(loss_of, nets, *tensors):
    """Evaluate loss_of(net, log-probs of its games, mask, …) for every seed. The first three tensors are states, moves and mask."""
    def of_one(net, states, moves, mask, *others):
        return loss_of(net, torch.where(mask, log_policy(net)[states, moves], 0), mask, *others)

    return vmap(of_one)(nets, *tensors)


def irft_losses(start, lake, good, generator):
    """Every update samples fresh games and compares each of them with the demonstration."""
    ref = vmap(log_policy)(start)
    ref_demo = vmap(lambda net: along(net, *good).sum())(start)

    def loss_of(net, logps, mask, ref_logps, ref_demo):
        demo = along(net, *good).sum()
        return irft_loss(demo.expand(len(logps)), logps.sum(1), ref_demo.expand(len(logps)), ref_logps.sum(1), beta=0.1)[0]

    def losses(nets, k):
        own = games(lake, nets, ref, generator)
        return by_seed(loss_of, nets, own.states, own.moves, own.mask, own.ref_logps, ref_demo)

    return losses


def rft_losses(start, lake, good, generator, beta=0.1):
    """Raise the reward (in [0, 1]) where the demonstration arrives and lower it where the games arrive. RLOO maximises it minus a KL."""
    ref, rewards = vmap(log_policy)(start), torch.zeros(len(start["bias"]), len(lake.P), dtype=torch.float64)
    shown = lake.P[good[0], good[1]].argmax(-1)

    def earned(table, arrivals, mask):
        return torch.where(mask, table[arrivals], 0).sum(-1)  # (n,)

    def alignment(table, arrivals, mask):
        return reward_alignment_loss(table[shown].sum().expand(len(mask)), earned(table, arrivals, mask), beta=beta)[0]

    def losses(nets, k):
        own = games(lake, nets, ref, generator)
        slope = vmap(torch.func.grad(alignment))(rewards, own.arrivals, own.mask)
        rewards.copy_((rewards - 0.05 * beta * slope).clamp(0, 1))
        scores = vmap(earned)(rewards, own.arrivals, own.mask) - beta * (own.old_logps - own.ref_logps).sum(2)  # (seeds, n)
        advantages = torch.stack([leave_one_out(row, group_size=len(row)) for row in scores])

        def loss_of(net, logps, mask, old_logps, advantages):
            return rloo_loss(logps, old_logps, advantages, mask, eps=0.2)[0]

        return by_seed(loss_of, nets, own.states, own.moves, own.mask, own.old_logps, advantages)

    return losses


def grpo_losses(start, lake, generator):
    """The reward is 1 for the gift. All games of an update form one group."""
    ref = vmap(log_policy)(start)

    def loss_of(net, logps, mask, old_logps, ref_logps, advantages):
        return grpo_loss(logps, old_logps, ref_logps, advantages, mask, eps=0.2, beta=0.001)[0]

    def losses(nets, k):
        own = games(lake, nets, ref, generator)
        advantages = torch.stack([group_advantages(row, group_size=len(row)) for row in own.won.sum(2)])
        return by_seed(loss_of, nets, own.states, own.moves, own.mask, own.old_logps, own.ref_logps, advantages)

    return losses


def ppo_losses(start, lake, generator, epochs=4):
    """The reward is 1 for the gift, discounted. The critic is a table, trained with the net. `epochs` updates use the same games."""
    ref, drawn = vmap(log_policy)(start), {}

    def loss_of(net, logps, mask, old_logps, advantages, states, old_values, returns):
        critic, _ = value_loss(net["values"][states], old_values, returns, mask, eps=0.2)
        return policy_loss(logps, old_logps, advantages, mask, eps=0.2)[0] + critic

    def losses(nets, k):
        if k % epochs == 0:
            own = games(lake, nets, ref, generator)
            values = torch.stack([table[states] for table, states in zip(nets["values"].detach(), own.states, strict=True)])
            flat = (x.flatten(0, 1) for x in (own.won, values, own.mask))  # gae takes rows, without an axis of seeds
            advantages, returns = (x.view(own.mask.shape) for x in gae(*flat, gamma=0.99, lam=0.95))
            drawn["games"] = (own.states, own.moves, own.mask, own.old_logps, advantages, own.states, values, returns)
        return by_seed(loss_of, nets, *drawn["games"])

    return losses


# --------------------------------------------------------------------------------------------------------------- Figure 3


@dataclass
class Setting:
    """One version of the paper's experiment. good and bad: one trajectory each, (states, moves)."""
    name: str
    lake: Lake
    good: tuple
    bad: tuple
    target: np.ndarray  # (S, 4): what θ* is fitted to
    fitted: np.ndarray  # the states that it is fitted on
    optimizer: type = torch.optim.RMSprop
    lr: float = 1e-3
    steps: int = 300
    dpo_beta: float = 0.1
    pretrained: bool = False  # first train the nets to imitate the bad trajectory (weight .8) and the good one (.2)


def settings(steps):
    """The five versions of the experiment."""
    result = []
    for name, rows, good, bad in (("4x4", FOUR, "RRDDDR", "RRDDLDRR"), ("one other way", TWO_WAYS, "RRRD", "DDDRRRUU"),
                                  ("8x8", EIGHT, "RRRRRRRDDDDDDD", "RRRRRRRDDLDDRDDD")):
        lake = Lake(rows)
        _, _, best = value_iteration(lake, lake.goal, 0.99)
        result.append(Setting(name, lake, lake.walk(good), lake.walk(bad), best, lake.live, steps=steps))

    lake, rng = Lake(FOUR, slippery=True), np.random.default_rng(0)
    _, _, best = value_iteration(lake, lake.goal, 0.99)  # good: best's first game that reaches the gift; bad: its first that does not
    games = [lake.episode(best, rng) for _ in range(100)]
    good = next(game for game in games if lake.goal[game[0][-1]])
    bad = next(game for game in games if not lake.goal[game[0][-1]])
    result.append(Setting("4x4, slippery", lake, good, bad, best, lake.live, steps=steps))

    lake = Lake(FOUR)
    _, Q, _ = value_iteration(lake, lake.goal, 0.9)
    soft = np.exp(Q / 0.15)
    good, bad = lake.walk("DDRDRR"), lake.walk("DR")
    result.append(Setting("found by search", lake, good, bad, soft / soft.sum(1, keepdims=True), np.union1d(good[0][:-1], bad[0][:-1]),
                          optimizer=torch.optim.SGD, lr=0.1, steps=60, dpo_beta=1.0, pretrained=True))
    return result


def tensors(trajectory):
    """A trajectory as tensors: (states without the last one, moves)."""
    states, moves = trajectory
    return torch.tensor(states[: len(moves)]), torch.tensor(moves)


def compare(setting, cfg, *, further=False):
    """{method: nets}, including "start" and "θ*". further: also train the methods that play games."""
    lake, good, bad = setting.lake, tensors(setting.good), tensors(setting.bad)
    start = first_weights(len(lake.P), cfg.hidden, cfg.seeds)
    if setting.pretrained:
        start = fit(start, each(lambda net: -0.8 * along(net, *bad).mean() - 0.2 * along(net, *good).mean()), 200, torch.optim.SGD, 0.1)
    target, fitted = torch.tensor(setting.target), torch.tensor(setting.fitted)
    best = fit(start, each(lambda net: -(target * log_policy(net))[fitted].sum(1).mean()), 600, torch.optim.Adam, 1e-2)

    def train(losses):
        return fit(start, losses, setting.steps, setting.optimizer, setting.lr)

    nets = {
        "start": start, "SFT": train(each(partial(sft_of, good=good))), "IFT": train(each(partial(ift_of, good=good, lake=lake))),
        "IFT, λ = 0": train(each(partial(ift_of, good=good, lake=lake, mix=0.0))),
        "ORPO": train(each(partial(orpo_of, good=good, bad=bad))), "DPO": train(dpo_losses(start, good, bad, setting.dpo_beta)),
    }
    if further:
        generator = torch.Generator().manual_seed(0)
        critic = {"values": torch.zeros(cfg.seeds, len(lake.P), dtype=torch.float64)}
        nets["IRFT"] = fit(start, irft_losses(start, lake, good, generator), 150, torch.optim.Adam, 1e-2)
        nets["RFT"] = fit(start, rft_losses(start, lake, good, generator), 150, torch.optim.Adam, 1e-2)
        nets["GRPO"] = fit(start, grpo_losses(start, lake, generator), 150, torch.optim.Adam, 1e-2)
        nets["PPO"] = fit({**start, **critic}, ppo_losses(start, lake, generator), 400, torch.optim.Adam, 1e-2)
        nets["PPO"].pop("values")
    return nets | {"θ*": best}


def measure(setting, nets):
    """Compare all nets with θ*: {method: {column: one number per seed}}."""
    lake, best, moves = setting.lake, policies_of(nets["θ*"]), 25 * setting.lake.columns
    states = sorted({*setting.good[0][: len(setting.good[1])]})
    table = {}
    for name, own in nets.items():
        policies = policies_of(own)
        errors = ((policies - best) ** 2).sum(2)  # (seeds, S)
        kls = (best * np.log(best / policies)).sum(2)  # (seeds, S)
        greedy = np.eye(4)[policies.argmax(2)]
        table[name] = {
            "parameter error": parameter_error(own, nets["θ*"]), "policy error": errors[:, lake.live].mean(1),
            "KL(π*‖π), visited": kls[:, states].mean(1), "KL(π*‖π), all": kls[:, lake.live].mean(1),
            "success": np.array([success(lake, policy, moves) for policy in policies]),
            "greedy": np.array([success(lake, policy, moves) for policy in greedy]),
        }
    return table


def lead(table, column="parameter error"):
    """The paper's order is DPO < IFT, IFT < ORPO and IFT < SFT. Returns the smallest of the three margins for each seed."""
    error = {name: table[name][column] for name in ("DPO", "IFT", "ORPO", "SFT")}
    return np.minimum.reduce([error["IFT"] - error["DPO"], error["ORPO"] - error["IFT"], error["SFT"] - error["IFT"]])


def shuffled_units(nets, generator):
    """The same policies from other parameters: hidden units are permuted and, with probability ½ each, change sign on both sides."""
    hidden = nets["bias"].shape[1]
    order, signs = torch.randperm(hidden, generator=generator), torch.randint(0, 2, (hidden,), generator=generator) * 2.0 - 1
    return {"embedding": (nets["embedding"] * signs)[..., order], "bias": (nets["bias"] * signs)[:, order],
            "head": (nets["head"] * signs[:, None])[:, order], "head_bias": nets["head_bias"]}


# ------------------------------------------------------------------------------------------------------------------- figure


def arrows(axis, lake, policy, title, values=None):
    """Draw a lake from above. The length of an arrow is the probability of the move, the colour of a field its value."""
    rows = len(lake.letters) // lake.columns
    colours = np.where(lake.over, np.nan, 0 if values is None else values).reshape(rows, lake.columns)
    axis.imshow(colours, cmap="Greens", vmin=0, vmax=2.5)
    for state, letter in enumerate(lake.letters):
        y, x = divmod(state, lake.columns)
        if letter in "HG":
            name, colour = ("hole", "0.5") if letter == "H" else ("gift", "C3")
            axis.text(x, y, name, ha="center", va="center", fontsize=10, color=colour)
            continue
        for chance, (dx, dy) in zip(policy[state], ((-1, 0), (0, 1), (1, 0), (0, -1)), strict=True):
            if chance > 0.05:
                axis.arrow(x, y, 0.42 * chance * dx, 0.42 * chance * dy, width=0.012, head_width=0.03 + 0.09 * chance, color="0.15",
                           length_includes_head=True, linewidth=0)
        if values is not None:
            axis.text(x + 0.48, y + 0.47, f"{values[state]:.2f}", ha="right", va="bottom", fontsize=8, color="0.35")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=12)


PAPER = ("DPO", "IFT", "ORPO", "SFT")  # in the paper's order


def draw_figure(shown, tables, learned, few, cfg):
    """Top: policies of the first seed. Bottom: the paper's measure and how the nets play, in every setting; inverse RL.

    shown: {title: (lake, policy, values)}, tables: {setting: {method: {column: per seed}}}, learned: (lake, rewards), few: see inverse.
    """
    import matplotlib

    matplotlib.use("Agg")  # not at the top of the file, so that a notebook that imports it keeps its own backend
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 13.5), constrained_layout=True)  # readable at the width of a page
    above, middle, below = figure.subfigures(3, 1, height_ratios=[1.15, 1, 0.9])
    for axis, (title, (lake, policy, values)) in zip(above.subplots(2, 3).flat, shown.items(), strict=True):
        arrows(axis, lake, policy, title, values)
    axes = [*middle.subplots(2, 1, sharex=True), *below.subplots(1, 2, width_ratios=[1, 1.3])]
    labels = ("error, start = 1", "chance of the gift")
    for axis, column, label in zip(axes, ("parameter error", "success"), labels, strict=False):
        for index, method in enumerate(PAPER):
            for place, table in enumerate(tables.values()):
                values = table[method][column] / (table["start"][column] if column == "parameter error" else 1)
                axis.bar(place + 0.2 * index - 0.3, values.mean(), 0.19, color=f"C{index}", label=method if not place else None)
                axis.plot([place + 0.2 * index - 0.3] * len(values), values, "k.", ms=2)
        axis.set_xticks(range(len(tables)), [name.replace(" ", "\n", 1) for name in tables], fontsize=11)
        axis.set_ylabel(label, fontsize=11)
    axes[0].set_title("Error of the parameters (the paper: DPO < IFT < ORPO, SFT)", fontsize=12)
    axes[1].set_title("How the same nets play", fontsize=12)
    axes[0].set_ylim(0, 1.6)
    axes[0].legend(fontsize=10, ncols=4, loc="upper center", frameon=False)
    lake, rewards = learned
    side = lake.columns
    axes[2].imshow(rewards.reshape(-1, side), cmap="RdYlGn", vmin=-1, vmax=1)
    for state, reward in enumerate(rewards):
        axes[2].text(state % side, state // side, f"{reward.round(2) + 0.0:.2f}", ha="center", va="center", fontsize=11)
    axes[2].set(xticks=[], yticks=[])
    axes[2].set_title("Reward learned from visits", fontsize=12)
    for index, (name, by_n) in enumerate(few.items()):
        for column, (method, style) in enumerate(zip(FEW, ("-o", "-.^", "--s"), strict=True)):
            if index or column != 1:  # without slipping, moves give the same as visits
                means, spread = zip(*((rows[:, column].mean(), rows[:, column].std()) for rows in by_n.values()), strict=True)
                axes[3].errorbar(range(len(by_n)), means, spread, fmt=style, ms=4, capsize=2, color=f"C{index}", label=f"{method}; {name}")
    axes[3].set_xticks(range(len(by_n)), list(by_n))
    axes[3].set(xlabel="demonstrations", ylabel="total variation to the expert", ylim=(0, None))
    axes[3].set_title("From few demonstrations", fontsize=12)
    axes[3].legend(fontsize=9, frameon=False)
    figure.savefig(cfg.out, dpi=130)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------------- main


def references(report):
    """Check what is known exactly about the lakes."""
    print("\nReferences")
    lake, slippery = Lake(FOUR), Lake(FOUR, slippery=True)
    V, Q, best = value_iteration(lake, lake.goal, 0.99)
    report.check("4x4: V*(start), six moves to the gift", V[0], 0.99**5, 1e-12, "γ⁵: the reward comes with the sixth move")
    moves = ["".join("LDRU"[a] for a in np.flatnonzero(row)) for row in best]
    report.gate("4x4: all best moves", [moves[s] for s in lake.live] == ["DR", "R", "D", "L", "D", "D", "R", "DR", "D", "R", "R"],
                " ".join(moves[s] for s in lake.live), "by hand, state by state")
    V, _, best = value_iteration(slippery, slippery.goal, 0.99)
    residual = np.abs(q_of(slippery, slippery.goal, V, 0.99).max(1) - V).max()
    report.check("4x4, slippery: Bellman's equation", residual, 0, 1e-14)
    report.check("4x4, slippery: success of the best policy", success(slippery, best), 14 / 17, 1e-12, "solved in fractions by the test")
    limited = success(slippery, best, 100)
    report.gate("the same within gymnasium's 100 moves", limited < 14 / 17, f"{limited:.6f}, V*(start) {V[0]:.6f}", "below 14/17")
    for name, rows in (("4x4", FOUR), ("8x8", EIGHT)):
        for slips in (False, True):
            lake = Lake(rows, slips)
            _, soft = soft_policy_iteration(lake, lake.goal, 0.99, 1e-4)
            _, _, best = value_iteration(lake, lake.goal, 0.99)
            report.check(f"{name}{', slippery' if slips else ''}: β → 0 plays like value iteration", success(lake, soft),
                         success(lake, best), 1e-6)
    lake = Lake(FOUR)
    _, kl = soft_value_iteration(lake, lake.goal, 0.99, 0.1)
    _, entropy = soft_value_iteration(lake, lake.goal, 0.99, 0.1, entropy=True)
    report.gate("the trap: an entropy bonus never arrives", success(lake, entropy, 100) < 1e-9 < 0.9 < success(lake, kl, 100),
                f"success {success(lake, entropy, 100):.0e}; with the KL to uniform {success(lake, kl, 100):.3f}",
                "β log 4/(1 − γ) = 13.9 for playing on, 1 for the gift")


def imitate(report, cfg):
    """Run Figure 3 in five settings. Returns {setting: table}, {title: what to draw}."""
    first, *others = settings(cfg.steps)
    nets, table = imitate_one(report, first, cfg, further=True)
    V, _, best = value_iteration(first.lake, first.lake.goal, 0.99)
    shown = {"best moves, V*": (first.lake, best, V)}
    for name in ("SFT", "IFT", "ORPO", "DPO", "PPO"):
        shown[f"{name}: {table[name]['success'][0]:.2f} arrive"] = (first.lake, policies_of(nets[name])[0], None)
    tables = {first.name: table, **{setting.name: imitate_one(report, setting, cfg)[1] for setting in others}}
    found = tables["found by search"]
    best = np.maximum.reduce([found[name]["success"] for name in ("IFT", "ORPO", "SFT")])
    report.claim("IFT, § 5.3", "found by search: the nearest in parameters plays best", "success of DPO − best other",
                 (found["DPO"]["success"] - best).tolist())
    return tables, shown


def imitate_one(report, setting, cfg, *, further=False):
    """Train, print and judge one setting. Returns nets, table."""
    nets = compare(setting, cfg, further=further)
    table = measure(setting, nets)
    columns = list(table["start"])
    print(f"\n{setting.name}: good game {len(setting.good[1])} moves, bad game {len(setting.bad[1])}; means over {cfg.seeds} seeds")
    print(f"{'':12}" + "".join(f"{column:>20}" for column in columns))
    for name, row in table.items():
        print(f"{name:12}" + "".join(f"{f'{row[c].mean():.4f} ± {row[c].std():.4f}':>20}" for c in columns))
    report.claim("IFT, Fig. 3", f"{setting.name}: parameters' error of DPO < IFT < ORPO and SFT", "smallest lead", lead(table).tolist())
    if further:
        judge_first(report, setting, nets, table)
    return nets, table


def judge_first(report, setting, nets, table):
    """On the plain 4x4 lake: gates for methods that must learn the way, the control of the metric, and claims."""
    for name in ("SFT", "IFT", "ORPO"):
        arrived, greedy = table[name]["success"], table[name]["greedy"]
        report.gate(f"{name} learns the way", arrived.mean() >= 0.9 and greedy.min() == 1,
                    f"success {arrived.mean():.3f}, greedy {greedy.min():g}")
    for name in ("IRFT", "RFT", "GRPO", "PPO"):
        arrived = table[name]["success"]
        report.gate(f"{name} learns the way", arrived.mean() >= 0.9, f"success {arrived.mean():.3f}", "from its own games")
    good = tensors(setting.good)
    both = [vmap(loss)(nets["start"]).numpy() for loss in (partial(sft_of, good=good),
                                                           partial(ift_of, good=good, lake=setting.lake, mix=0.0, decay=0.0))]
    report.check("IFT with λ = γ = 0 is SFT", both[1], both[0], 1e-12)
    other = shuffled_units(nets["θ*"], torch.Generator().manual_seed(0))
    error, own, best = parameter_error(other, nets["θ*"]), policies_of(other), policies_of(nets["θ*"])
    kl = np.abs((best * np.log(best / own)).sum(2)).max()
    report.gate("control: θ* with its units shuffled", error.min() > 0.15 and kl < 1e-9,
                f"parameters' error {error.mean():.3f} (start {table['start']['parameter error'].mean():.3f}), KL {kl:.0e}",
                "an error of parameters is not a distance between policies")
    report.claim("IFT, § 5.3", "4x4: IFT plays better than SFT", "success", (table["IFT"]["success"] - table["SFT"]["success"]).tolist())
    report.claim("IFT, § 5.3", "4x4: mixing (λ = .2) brings the parameters nearer than λ = 0", "lead",
                 (table["IFT, λ = 0"]["parameter error"] - table["IFT"]["parameter error"]).tolist())
    report.claim("IFT, § 5.3", "4x4: DPO plays better than SFT", "success", (table["DPO"]["success"] - table["SFT"]["success"]).tolist())


def inverse(report, cfg):
    """Learn a reward from exact visits, then from few games. Returns (lake, learned rewards), {lake: {n: (seeds, 3)}}."""
    print("\nInverse RL")
    few, drawn = {}, None
    for name, slippery, gamma, beta in (("4x4", False, 0.95, 0.1), ("4x4, slippery", True, 0.99, 0.005)):
        lake = Lake(FOUR, slippery)
        _, expert = soft_value_iteration(lake, lake.goal, gamma, beta)
        arrivals, _ = visits(lake, expert, gamma)
        rewards, policy = learn_reward(lake, arrivals, gamma, beta)
        report.check(f"{name}: learned policy, total variation to the expert", distance(lake, expert, policy, gamma), 0, 1e-5)
        report.check(f"{name}: state visits", visits(lake, policy, gamma)[0], arrivals, 1e-5)
        report.check(f"{name}: success", success(lake, policy), success(lake, expert), 1e-4)
        if not slippery:
            seen = arrivals > 1e-3
            found = same_reward(lake, rewards, lake.goal, gamma)
            report.check(f"{name}: the reward itself, up to what no policy shows", found[seen], lake.goal[seen], 0.01)
            drawn = lake, found
        few[name] = {}
        for n in (1, 5, 20):
            rows = np.array([from_few(lake, expert, n, gamma, beta, np.random.default_rng(seed)) for seed in range(cfg.seeds)])
            few[name][n] = rows
            for index in (0, 1) if slippery else (0,):  # without slipping, index 1 gives the same
                report.claim("inverse RL", f"{name}, {n} demonstration{'s'[: n > 1]}: {FEW[index]}, is nearer to the expert than SFT",
                             f"distance {rows[:, index].mean():.3f}, SFT {rows[:, 2].mean():.3f}, lead",
                             (rows[:, 2] - rows[:, index]).tolist())
    lake = Lake(FOUR, slippery=True)  # with a stronger pull every move occurs, so the reward can be recovered on ice too
    _, expert = soft_value_iteration(lake, lake.goal, 0.99, 0.02)
    rewards, _ = learn_reward(lake, visits(lake, expert, 0.99)[0], 0.99, 0.02)
    report.check("4x4, slippery, β = .02: the reward itself", same_reward(lake, rewards, lake.goal, 0.99), lake.goal, 1e-3)
    report.check("4x4: visits and moves say the same", few["4x4"][5][:, 1], few["4x4"][5][:, 0], 1e-3, "where nothing slips")
    return drawn, few


def main(cfg):
    """Print references, tables and verdicts, write figure and numbers; returns True if every gate passes. Raises BadInput."""
    if cfg.seeds < 1 or cfg.steps < 1 or cfg.hidden < 2:
        raise BadInput(f"--seeds {cfg.seeds} and --steps {cfg.steps} must be at least 1, --hidden {cfg.hidden} at least 2")
    cfg = replace(cfg, seeds=30) if cfg.full else cfg
    report = Report(cfg)
    references(report)
    tables, shown = imitate(report, cfg)
    learned, few = inverse(report, cfg)
    draw_figure(shown, tables, learned, few, cfg)
    rounded = {name: {method: {column: values.round(6).tolist() for column, values in row.items()} for method, row in table.items()}
               for name, table in tables.items()}
    return report.close({"tables": rounded})


if __name__ == "__main__":
    with exit_codes("frozen_lake"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.frozen_lake", description=__doc__)) else 1)
