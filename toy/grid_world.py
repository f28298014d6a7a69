"""The lecture's 2 × 2 world: V and Q, value iteration, policy iteration and REINFORCE, in numbers small enough to print.

    s0  s1          actions L, D, R, U: one cell left, down, right, up; a move into a wall leaves the state as it is
    s2  s3          s0 is the start, s3 the end: no more reward is earned there, so V(s3) = 0

The lecture ("Alignment and RL for LLMs", first part) shows its actions and rewards in pictures that are lost. So we chose the actions above
and the rewards: +1 for the move into s3 (goal) or −1 for every move (step).

    V(s) = Σ_a π(a|s)·Q(s, a)        Q(s, a) = r(s, a) + γ·V(s')        A(s, a) = Q(s, a) − V(s)

The Bellman equations are linear, so we solve them for V and Q in fractions and check the results with tolerance 0: V against a formula that
is derived by hand (`by_hand`), value and policy iteration against the best of all 64 deterministic policies. In float64 we
check the policy gradient theorem against autograd through the solved equations. With samples we check REINFORCE, which uses the project's
own loss: its gradient against the exact one, its policy against V*.

    python -m toy.grid_world                                       # γ = .9, +1 at the end; PASS or FAIL; a figure; exit 1 on a miss
    python -m toy.grid_world --reward step --gamma 0.5
    python -m toy.grid_world --full                                # ten seeds of REINFORCE instead of three

Checked by tests/toy/test_grid_world.py.
"""

import itertools
import random
import sys
from dataclasses import dataclass
from fractions import Fraction

import torch

from minialign.engine.common import BadInput
from minialign.methods.reinforce import Baseline, reinforce_loss
from minialign.settings import cli, exit_codes
from toy.report import Report


@dataclass
class Config:
    gamma: float = 0.9              # γ: the discount per move; below 1
    reward: str = "goal"            # goal: +1 for the move into s3; step: −1 for every move
    episodes: int = 10000           # episodes for the sampled gradient, in 100 batches
    steps: int = 200                # updates of REINFORCE
    batch_size: int = 32            # episodes per update
    lr: float = 0.1                 # learning rate of Adam
    horizon: int = 200              # moves after which an episode is cut off
    seeds: int = 3                  # runs of REINFORCE
    full: bool = False              # use ten seeds
    out: str = "runs/grid_world.png"  # path of the figure


STATES, END, ACTIONS, ARROWS = range(3), 3, "LDRU", "←↓→↑"
UNIFORM = [[Fraction(1, 4)] * 4 for _ in STATES]
UP = [[Fraction(a == 3) for a in range(4)] for _ in STATES]  # always up: never reaches the end


@dataclass
class World:
    gamma: Fraction
    reward: str

    def step(self, state, action):
        """(next state, reward) of one move. The two bits of a state are its row and its column."""
        row, column = divmod(state, 2)
        row += {"D": 1, "U": -1}.get(ACTIONS[action], 0)
        column += {"R": 1, "L": -1}.get(ACTIONS[action], 0)
        after = 2 * row + column if row in (0, 1) and column in (0, 1) else state
        return after, Fraction(-1) if self.reward == "step" else Fraction(after == END)


# ------------------------------------------------------------------------------------------------------- exact, in fractions


def solve(matrix, right):
    """Solve matrix·x = right by elimination, exactly, in fractions. Returns x."""
    rows = [[*row, b] for row, b in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(k for k in range(i, len(rows)) if rows[k][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(len(rows)):
            if k != i:
                rows[k] = [x - rows[k][i] * y for x, y in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]


def moves(policy, world):
    """Transition probabilities P (3, 3) between the live states and expected rewards r (3,) of one move under a policy."""
    P, r = [[Fraction(0)] * 3 for _ in STATES], [Fraction(0)] * 3
    for s, a in itertools.product(STATES, range(4)):
        after, reward = world.step(s, a)
        r[s] += policy[s][a] * reward
        if after != END:
            P[s][after] += policy[s][a]
    return P, r


def values(policy, world):
    """V of s0, s1, s2: the solution of (1 − γP)·V = r."""
    P, r = moves(policy, world)
    return solve([[(s == t) - world.gamma * P[s][t] for t in STATES] for s in STATES], r)


def action_values(policy, world):
    """Q (3, 4) from its own twelve equations, Q(s, a) = r + γ·Σ_b π(b|s')·Q(s', b). V is not used here, so Q can check V."""
    pairs = list(itertools.product(STATES, range(4)))
    matrix, right = [], []
    for s, a in pairs:
        after, reward = world.step(s, a)
        matrix.append([((s, a) == (t, b)) - world.gamma * (policy[t][b] if t == after else 0) for t, b in pairs])
        right.append(reward)
    Q = solve(matrix, right)
    return [Q[4 * s : 4 * s + 4] for s in STATES]


def look_ahead(V, world):
    """r(s, a) + γ·V(s') of all moves, (3, 4). If V is the value of a policy, this is the policy's Q."""
    V = [*V, Fraction(0)]
    return [[reward + world.gamma * V[after] for after, reward in (world.step(s, a) for a in range(4))] for s in STATES]


def expected(policy, numbers):
    """Σ_a π(a|s)·numbers(s, a), (3,)."""
    return [sum(p * x for p, x in zip(*rows, strict=True)) for rows in zip(policy, numbers, strict=True)]


def visits(policy, world):
    """d(s) = Σ_t γ^t·P(s_t = s) from s0: the solution of (1 − γPᵀ)·d = e_0."""
    P, _ = moves(policy, world)
    return solve([[(s == t) - world.gamma * P[t][s] for t in STATES] for s in STATES], [Fraction(s == 0) for s in STATES])


def by_hand(gamma, reward):
    """V(s0), V(s1) of the uniform policy. By symmetry V(s2) = V(s1). Of the four moves in s0 two stay there and two go on; of those in s1
    one goes back, two stay and one ends the episode:

        V0 = c0 + γ·(V0 + V1)/2,    V1 = c1 + γ·(V0 + 2·V1)/4,    c = 0 and 1/4 (goal), −1 and −1 (step).

    The solution, with D = 8 − 8γ + γ², is γ/D and (2 − γ)/D for goal, −8/D and −(8 − 2γ)/D for step."""
    D = 8 - 8 * gamma + gamma**2
    return (gamma / D, (2 - gamma) / D) if reward == "goal" else (-8 / D, -(8 - 2 * gamma) / D)


def best_by_enumeration(world):
    """V* (3,): in each state the largest V of all 4³ deterministic policies."""
    all_values = [values([[Fraction(a == b) for b in range(4)] for a in chosen], world) for chosen in itertools.product(range(4), repeat=3)]
    return [max(V[s] for V in all_values) for s in STATES]


def backup(V, world):
    """One sweep of value iteration: V(s) ← max_a r + γ·V(s')."""
    return [max(row) for row in look_ahead(V, world)]


def value_iteration(V, world):
    """V and all its sweeps until nothing changes. In this world that takes finitely many sweeps, because the best path ends."""
    sweeps = [V]
    while len(sweeps) < 2 or sweeps[-1] != sweeps[-2]:
        sweeps.append(backup(sweeps[-1], world))
        if len(sweeps) > 5000:
            raise BadInput(f"--gamma {float(world.gamma):g}: value iteration needs more than 5000 sweeps; choose a smaller --gamma")
    return sweeps


def improve(policy, Q):
    """Each state's best action. Among equally good ones the policy's own comes first, so that a stable policy does not change."""
    chosen = [max(range(4), key=lambda a: (Q[s][a], policy[s][a], -a)) for s in STATES]
    return [[Fraction(a == b) for b in range(4)] for a in chosen]


def policy_iteration(policy, world):
    """[(policy, its V)] until the policy is stable."""
    rounds = []
    while not rounds or policy != rounds[-1][0]:
        rounds.append((policy, values(policy, world)))
        policy = improve(policy, action_values(policy, world))
    return rounds


def distance(V, W):
    """‖V − W‖ in the maximum norm. In this norm a sweep of value iteration is a contraction."""
    return max(abs(v - w) for v, w in zip(V, W, strict=True))


def random_policies(n, seed=0):
    """n random policies in fractions, with all probabilities above 0."""
    draw, policies = random.Random(seed), []
    for _ in range(n):
        weights = [[draw.randint(1, 9) for _ in range(4)] for _ in STATES]
        policies.append([[Fraction(w, sum(row)) for w in row] for row in weights])
    return policies


def advantages(policy, world):
    """A = Q − V, (3, 4)."""
    return [[q - v for q in row] for row, v in zip(action_values(policy, world), values(policy, world), strict=True)]


def performance_difference(new, old, world):
    """(V_new(s0) − V_old(s0), Σ_s d_new(s)·Σ_a new(a|s)·A_old(s, a)): the lemma says that they are equal."""
    gains = zip(visits(new, world), expected(new, advantages(old, world)), strict=True)
    return values(new, world)[0] - values(old, world)[0], sum(d * a for d, a in gains)


# ------------------------------------------------------------------------------------------------------- gradients, in float64


def value_of_logits(logits, world):
    """V(s0) of the softmax policy, differentiable, since torch solves the Bellman equations. logits: (3, 4)."""
    policy = logits.softmax(1)
    to, r = torch.zeros(3, 4, 3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    for s, a in itertools.product(STATES, range(4)):
        after, reward = world.step(s, a)
        r[s, a] = float(reward)
        if after != END:
            to[s, a, after] = 1
    P = torch.einsum("sa,sat->st", policy, to)
    return torch.linalg.solve(torch.eye(3, dtype=torch.float64) - float(world.gamma) * P, (policy * r).sum(1))[0]


def policy_gradient(policy, world):
    """The theorem, ∇V(s0) = Σ_s d(s)·Σ_a ∇π(a|s)·Q(s, a), for softmax logits: d(s)·π(a|s)·(Q(s, a) − V(s)). In fractions, (3, 4)."""
    d, A = visits(policy, world), advantages(policy, world)
    return [[d[s] * policy[s][a] * A[s][a] for a in range(4)] for s in STATES]


# ----------------------------------------------------------------------------------------------------------------- REINFORCE


def sample_episodes(logits, world, n, horizon, generator):
    """n episodes from s0: states (n, T), actions (n, T), mask (n, T) of the moves before the end, discounted returns (n,)."""
    policy = logits.detach().softmax(1)
    table = [[world.step(s, a) for a in range(4)] for s in STATES]
    after = torch.tensor([[to for to, _ in row] for row in table] + [[END] * 4])
    earned = torch.tensor([[float(r) for _, r in row] for row in table] + [[0.0] * 4], dtype=torch.float64)
    state, returns, rows = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.float64), []
    for t in range(horizon):
        if (state == END).all():
            break
        action = torch.multinomial(policy[state.clamp(max=2)], 1, generator=generator)[:, 0]
        rows.append((state, action))
        returns = returns + float(world.gamma) ** t * earned[state, action]
        state = after[state, action]
    states, actions = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    return states, actions, states != END, returns


def step(logits, states, actions, mask, advantages):
    """The project's loss on one batch of episodes. An episode takes the place of a completion, and its moves are the tokens."""
    logps = logits.log_softmax(1)[states.clamp(max=2), actions]  # (B, T)
    return reinforce_loss(torch.where(mask, logps, 0), advantages, mask)[0]


def sampled_gradient(logits, world, cfg, seed=0, batches=100):
    """(mean, standard error) of ∇V(s0) by REINFORCE, (3, 4) each, from the means of 100 batches. The baseline is the exact V(s0)."""
    generator = torch.Generator().manual_seed(seed)
    *sampled, returns = sample_episodes(logits, world, cfg.episodes // batches * batches, cfg.horizon, generator)
    advantages = returns - value_of_logits(logits, world)
    logits, gradients = logits.clone().requires_grad_(True), []
    for rows in zip(*(x.chunk(batches) for x in (*sampled, advantages)), strict=True):
        gradients.append(-torch.autograd.grad(step(logits, *rows), logits)[0])
    gradients = torch.stack(gradients)
    return gradients.mean(0), gradients.std(0) / batches**0.5


def train(world, cfg, seed):
    """Train by REINFORCE from the uniform policy. Returns the exact V(s0) before each update and after the last, and the learned logits."""
    generator, logits = torch.Generator().manual_seed(seed), torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    optimizer, baseline, curve = torch.optim.Adam([logits], lr=cfg.lr), Baseline(0.9), []
    for _ in range(cfg.steps):
        curve.append(value_of_logits(logits.detach(), world).item())
        states, actions, mask, returns = sample_episodes(logits, world, cfg.batch_size, cfg.horizon, generator)
        optimizer.zero_grad()
        step(logits, states, actions, mask, returns - baseline.value).backward()
        optimizer.step()
        baseline.update(returns)  # only after this batch has used it
    return [*curve, value_of_logits(logits.detach(), world).item()], logits.detach()


# -------------------------------------------------------------------------------------------------------------- what is shown


def arrows(row):
    """The likely moves of a state as arrow characters: all with at least half the largest probability."""
    return "".join(arrow if p >= max(row) / 2 else " " for arrow, p in zip(ARROWS, row, strict=True))


def show(name, policy, world):
    """Print the grid with V and arrows, and Q below it."""
    V, Q = values(policy, world), action_values(policy, world)
    cells = [f"s{s} {V[s]!s:>9} {arrows(policy[s])}" for s in STATES] + [f"s3 {'end':>9}     "]
    print(f"\n{name}\n    {cells[0]}   {cells[1]}\n    {cells[2]}   {cells[3]}")
    for s in STATES:
        print(f"    Q(s{s}, ·)  " + "   ".join(f"{a} {q!s:>9} = {float(q):+.4f}" for a, q in zip(ACTIONS, Q[s], strict=True)))


def draw_figure(policies, curves, best, world, out):
    """Draw a grid per policy: values as colour and number, longer arrows for likelier moves. Then the learning curves against V*."""
    import matplotlib

    matplotlib.use("Agg")  # not at the top of the file, so that a notebook that imports it keeps its own backend
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(policies) + 1, figsize=(4 * len(policies) + 5, 4.2), constrained_layout=True)
    tables = {name: [float(v) for v in values(policy, world)] for name, policy in policies.items()}
    low, high = min(map(min, tables.values())), max(map(max, tables.values()))
    for axis, (name, policy) in zip(axes[:-1], policies.items(), strict=True):
        V = tables[name]
        axis.imshow([[V[0], V[1]], [V[2], float("nan")]], cmap="viridis", vmin=low - 0.3 * (high - low), vmax=high + 0.6 * (high - low))
        for s in STATES:
            row, column = divmod(s, 2)
            axis.text(column - 0.45, row - 0.36, f"s{s}", color="w", fontsize=11)
            axis.text(column + 0.46, row + 0.42, f"{V[s]:.4f}", ha="right", color="w", fontsize=12)
            for (dx, dy), p in zip(((-1, 0), (0, 1), (1, 0), (0, -1)), policy[s], strict=True):
                if p > 0.02:
                    tip = (column + 0.4 * float(p) ** 0.5 * dx, row + 0.4 * float(p) ** 0.5 * dy)
                    axis.annotate("", tip, (column, row), arrowprops=dict(arrowstyle="-|>", color="w", lw=2, mutation_scale=16))
        axis.text(1, 1, "s3\nend", ha="center", va="center", fontsize=12)
        axis.axhline(0.5, color="w")
        axis.axvline(0.5, color="w")
        axis.set(title=name, xticks=[], yticks=[])
    for seed, curve in enumerate(curves):
        axes[-1].plot(curve, lw=1, label=None if seed else f"REINFORCE, {len(curves)} seeds")
    axes[-1].axhline(best, color="k", ls=":", label="V*(s0)")
    axes[-1].set(xlabel="updates", ylabel="V(s0), exact", title="What REINFORCE learns")
    axes[-1].legend(fontsize=8, loc="lower right")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def exact_checks(report, world):
    """All checks without samples. Returns the optimal policy, which splits ties evenly, and V*."""
    gammas = [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)]
    off = []
    for reward, gamma in [*itertools.product(("goal", "step"), gammas), ("step", Fraction(1)), (world.reward, world.gamma)]:
        V, (V0, V1) = values(UNIFORM, World(gamma, reward)), by_hand(gamma, reward)
        off += [V[0] - V0, V[1] - V1, V[2] - V1]
    report.check("uniform policy: V − its formula, 8 settings", list(map(float, off)), 0, 0)

    policies = [UNIFORM, *random_policies(3)]
    means, bellman, actions = [], [], []
    for policy in policies:
        V, Q = values(policy, world), action_values(policy, world)
        means += [v - mean for v, mean in zip(V, expected(policy, Q), strict=True)]
        ahead = look_ahead(V, world)
        bellman += [v - mean for v, mean in zip(V, expected(policy, ahead), strict=True)]
        actions += [q - x for row in zip(Q, ahead, strict=True) for q, x in zip(*row, strict=True)]
    for name, residuals, note in (("V − Σ_a π(a|s)·Q(s, a), 4 policies", means, "V solves three equations, Q its own twelve"),
                                  ("V − Σ_a π(a|s)·(r + γ·V(s'))", bellman, ""), ("Q − (r + γ·V(s'))", actions, "")):
        report.check(name, list(map(float, residuals)), 0, 0, note)

    best = best_by_enumeration(world)
    for start in (Fraction(0), Fraction(2)):
        sweeps = value_iteration([start] * 3, world)
        changes = [distance(V, W) for V, W in itertools.pairwise(sweeps)]
        print(f"\nvalue iteration from V = {start}: {len(sweeps) - 2} sweeps until nothing changes")
        for k in [k for k in range(1, len(changes)) if k <= 3 or k == len(changes) - 1]:
            factor = f", {float(changes[k - 1] / changes[k - 2]):.4f} times the change before" if k > 1 else ""
            shown = " ".join(f"{float(v):8.5f}" for v in sweeps[k])
            print(f"    sweep {k:3}: V = {shown}   changed by {float(changes[k - 1]):.5f}{factor}")
        report.check(f"value iteration from {start}: V − best of 64", [float(v - b) for v, b in zip(sweeps[-1], best, strict=True)], 0, 0)
        largest = max((after / before for before, after in itertools.pairwise(changes[:-1])), default=Fraction(0))
        report.gate("  each sweep changes at most γ times as much", largest <= world.gamma, f"largest factor {float(largest):.6g}")
    draws = random.Random(0)
    tables = [[Fraction(draws.randint(-99, 99), 9) for _ in STATES] for _ in range(600)]
    largest = max(distance(backup(V, world), backup(W, world)) / distance(V, W) for V, W in itertools.pairwise(tables))
    report.gate("  and brings any two tables together by γ", largest <= world.gamma, f"largest factor {float(largest):.6g}", "599 pairs")

    rounds = policy_iteration(UP, world)
    print(f"\npolicy iteration from always up: {len(rounds) - 1} improvements until stable")
    for k, (policy, V) in enumerate(rounds):
        print(f"    round {k}: " + "   ".join(f"s{s} {arrows(policy[s]).strip()} V {V[s]!s:>6}" for s in STATES))
    report.check("policy iteration: V − best of 64", [float(v - b) for v, b in zip(rounds[-1][1], best, strict=True)], 0, 0)
    rises = [w - v for (_, V), (_, W) in itertools.pairwise(rounds) for v, w in zip(V, W, strict=True)]
    least = min(rises, default=Fraction(-1))  # a single round improves nothing: the gate fails
    report.gate("  V falls in no state and no round", least >= 0, f"smallest change {float(least):g}")

    pairs = [performance_difference(new, old, world) for new, old in itertools.permutations([*policies, rounds[-1][0]], 2)]
    report.check("performance-difference lemma, 20 pairs", [float(left - right) for left, right in pairs], 0, 0)
    surrogate = [expected(p, advantages(p, world))[0] for p in policies]
    returns = [values(p, world)[0] for p in policies]
    report.claim("lecture, surrogate objective", "E[V^π] is a constant, so J is maximised by maximising E_{a~π}[Q^π − V^π]",
                 f"it is {' '.join(str(x) for x in surrogate)} for four policies with J = {' '.join(f'{float(J):.4f}' for J in returns)}",
                 holds=sorted(range(4), key=lambda i: surrogate[i]) == sorted(range(4), key=lambda i: returns[i])
                 and len(set(surrogate)) == len(set(returns)))

    logits = torch.tensor([[float(p) for p in row] for row in policies[1]], dtype=torch.float64).log().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value_of_logits(logits, world), logits)
    theorem = [[float(x) for x in row] for row in policy_gradient(policies[1], world)]
    report.check("policy gradient theorem against autograd", gradient.numpy(), theorem, 1e-12, "Σ_s d(s) Σ_a ∇π(a|s)·Q(s, a)")
    stable = action_values(rounds[-1][0], world)
    return [[Fraction(q == max(row), row.count(max(row))) for q in row] for row in stable], best


def main(cfg):
    """Print tables and checks, write figure and JSON; True if every gate passes. Raises BadInput for arguments out of range."""
    if not 0 < cfg.gamma < 1:
        raise BadInput(f"--gamma {cfg.gamma:g}: must be above 0 and below 1, so that a policy that never arrives has a value too")
    if cfg.reward not in ("goal", "step"):
        raise BadInput(f"--reward {cfg.reward}: must be goal (+1 for the move into s3) or step (−1 for every move)")
    if min(cfg.steps, cfg.batch_size, cfg.horizon, cfg.seeds) < 1 or cfg.episodes < 200 or not cfg.lr > 0:
        raise BadInput("--steps, --batch_size, --horizon and --seeds must be at least 1, --episodes at least 200, --lr above 0")
    report, world = Report(cfg), World(Fraction(str(cfg.gamma)), cfg.reward)
    print(f"2 × 2 world, γ = {world.gamma}, reward: {'+1 into s3' if cfg.reward == 'goal' else '−1 per move'}; L D R U, walls bounce")
    show("uniform policy: V, arrows; Q", UNIFORM, world)
    print()
    optimal, best = exact_checks(report, world)
    show("optimal policy", optimal, world)

    print()
    policy = random_policies(1, seed=1)[0]  # not the uniform policy: its symmetry would hide mistakes
    logits = torch.tensor([[float(p) for p in row] for row in policy], dtype=torch.float64).log()
    mean, error = sampled_gradient(logits, world, cfg)
    exact = torch.tensor([[float(x) for x in row] for row in policy_gradient(policy, world)], dtype=torch.float64)
    off, away = (((mean - other) / error).abs().max().item() for other in (exact, torch.zeros_like(exact)))
    report.gate("REINFORCE: sampled gradient is the exact one", off <= 4 and away >= 8,
                f"at most {off:.2f} standard errors off (≤ 4), {away:.0f} from 0 (≥ 8)", f"{cfg.episodes} episodes")

    start, goal = float(values(UNIFORM, world)[0]), float(best[0])
    runs = [train(world, cfg, seed) for seed in range(10 if cfg.full else cfg.seeds)]
    left = [(goal - curve[-1]) / (goal - start) for curve, _ in runs]
    report.gate("REINFORCE: all but 5 % of the way to V*(s0)", max(left) <= 0.05,
                f"V(s0) {min(c[-1] for c, _ in runs):.4f} at least, V* {goal:.4f}; {max(left):.1%} left", f"{len(runs)} seeds")
    learned = [[Fraction(p) for p in row] for row in runs[0][1].softmax(1).tolist()]
    curves = [curve for curve, _ in runs]
    draw_figure({"uniform policy": UNIFORM, "optimal policy": optimal, "learned policy, seed 0": learned}, curves, goal, world, cfg.out)
    return report.close({"curves": curves})


if __name__ == "__main__":
    with exit_codes("grid_world"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.grid_world", description=__doc__)) else 1)
