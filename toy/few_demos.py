"""Two hundred demonstrations, 30 % of them bad: the one toy to test the papers' ranking of methods exactly, and what a better rank costs.

It uses the larger language of tiny_language.py with four prompts. The base model prefers what the reward dislikes (ref·e^{−κr}). The
expert is E ∝ base·e^{r/β}. Most demonstrations come from E, and a share comes from the base model. SFT, SPIN (IRFT with one round), IRFT
with five rounds and IRFT with fresh samples at every step train on them for the same number of steps. Four numbers are then computed
exactly, by summing over all 1555 completions of each prompt:

    gap       E[log π(better) − log π(worse)] over pairs of base's answers, ordered by the reward
    E[r]      the true reward, which no method sees
    KL(E‖π)   the distance to the expert
    implicit  share of the pairs with log π/base (better) > log π/base (worse)

    python -m toy.few_demos                                        # five seeds; PASS or FAIL per ordering; a figure; exit 1 on a miss
    python -m toy.few_demos --full                                 # ten seeds
    python -m toy.few_demos --contamination 0                      # clean demonstrations: the orderings need not hold there

The gated orderings follow from the law of one round with samples from base, base·(E_mix/base)^{1/β}, E_mix the demonstrated mixture. With
β far below 1 the law extrapolates past E_mix: whatever is rarer in E_mix than in base goes to 0. That raises gap and reward, because base
is worse than the demonstrations, but it ends far from the expert. A gap or reward above the expert's own is overshoot. The comparisons with
five rounds and with fresh samples are printed but not gated: their results change with the number of steps.
"""

import copy
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch

from minialign.batch import collate
from minialign.engine.common import BadInput, batch_rows, figure_path
from minialign.methods import irft, sft
from minialign.settings import cli, exit_codes
from toy import closed_form
from toy.tiny_language import Language, tiny_gpt


@dataclass
class Config:
    kappa: float = 3.0              # how strongly base prefers what the reward dislikes
    beta: float = 0.5               # β of the expert E ∝ base·e^{r/β}
    pull: float = 0.1               # β of IRFT
    demos: int = 200                # demonstrations, over all prompts
    contamination: float = 0.3      # share of the demonstrations that comes from base
    steps: int = 60                 # updates of each method
    batch_size: int = 32            # demonstrations per update
    lr: float = 1e-3                # Adam's learning rate
    seeds: int = 5                  # runs; seeds 0 to 4 have one base model each, later seeds reuse these five
    full: bool = False              # twice as many seeds
    out: str = "runs/few_demos.png"  # the figure


METHODS = {"SFT": None, "IRFT, T = 1 (SPIN)": 1, "IRFT, T = 5": 5, "IRFT, fresh samples": math.inf}  # rounds


def base_model(language, kappa, seed, steps=300):
    """A GPT fitted to ref·e^{−κr} by the exact cross-entropy over all completions. ref is the same GPT at its random start."""
    policy = tiny_gpt(language.vocab_size, seed=seed, dtype=torch.float32, mixing=0.3)
    pairs = zip(language.law_of(policy).numpy(), language.rewards.numpy(), strict=True)
    law = torch.stack([torch.tensor(closed_form.tilt(ref, -kappa * r, 1.0)) for ref, r in pairs])
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3, betas=(0.9, 0.99))
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - k / steps)
        optimizer.zero_grad()
        (-(law * language.token_logps(policy).sum(-1)).sum(1).mean()).backward()
        optimizer.step()
    return policy.requires_grad_(False)


def demonstrations(language, base, expert, cfg, seed):
    """[(prompt ids, completion ids)]: the prompts in turn, each with a sample from E, or with probability `contamination` from base."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(cfg.demos):
        n = i % len(language.prompts)
        bad = float(torch.rand((), generator=generator)) < cfg.contamination
        drawn = int(torch.multinomial((base if bad else expert)[n], 1, generator=generator))
        rows.append((language.prompts[n], list(language.completions[drawn])))
    return rows


def train(rounds, base, language, rows, cfg, seed):
    """The policy after cfg.steps updates with the method's own step. rounds: the rounds of IRFT, or None for SFT."""
    policy = copy.deepcopy(base).requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=cfg.lr)
    settings = irft.Config(beta=cfg.pull, max_new=language.max_new)
    old = copy.deepcopy(base)  # the sampler and the reference of a round
    for k in range(cfg.steps):
        picked = [rows[i] for i in batch_rows(len(rows), cfg.batch_size, k, seed)]
        prompts_ids, shown = zip(*picked, strict=True)
        demos = collate(prompts_ids, shown, pad_id=language.eos_id)
        if rounds is None:
            loss, _ = sft.step(policy, demos)
        else:
            rounds = min(rounds, cfg.steps)
            if k and k * rounds // cfg.steps != (k - 1) * rounds // cfg.steps:  # a new round begins
                old.load_state_dict(policy.state_dict())
            loss, _ = irft.step(policy, old, demos, irft.rollout(old, prompts_ids, settings, language.eos_id, (seed, k)), settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


class Judge:
    """Computes the four exact numbers of a policy, for one base model."""

    def __init__(self, language, base, expert):
        self.language, self.expert = language, expert
        self.base_logps = language.law_of(base).log()  # (N, C)
        law, r = self.base_logps.exp(), language.rewards
        self.pairs = law[:, :, None] * law[:, None, :] * (r[:, :, None] > r[:, None, :])  # (N, C, C) probability of (better, worse)

    def __call__(self, logps):
        """logps: log π of all completions of all prompts, (N, C)."""
        share = self.pairs.sum((1, 2))  # (N,)
        gap = ((self.pairs.sum(2) - self.pairs.sum(1)) * logps).sum(1) / share
        implicit = logps - self.base_logps
        won = (implicit[:, :, None] > implicit[:, None, :]).double() + 0.5 * (implicit[:, :, None] == implicit[:, None, :]).double()
        laws = zip(self.expert.numpy(), logps.exp().numpy(), strict=True)
        return {"gap": float(gap.mean()), "E[r]": float((logps.exp() * self.language.rewards).sum(1).mean()),
                "KL(E‖π)": statistics.mean(closed_form.kl(e, p) for e, p in laws),
                "implicit": float(((self.pairs * won).sum((1, 2)) / share).mean())}


def orderings(table):
    """[(ordering, one value per seed that should be above 0, the share of seeds for which it must be)]."""
    sft_row, spin = table["SFT"], table["IRFT, T = 1 (SPIN)"]

    def more(column):
        return [a - b for a, b in zip(spin[column], sft_row[column], strict=True)]

    return [
        ("SPIN's gap is above 0", spin["gap"], 0.9), ("SFT's gap is below 0", [-gap for gap in sft_row["gap"]], 0.8),
        ("SPIN's gap is above SFT's", more("gap"), 0.9), ("SPIN's reward is above SFT's", more("E[r]"), 0.9),
        ("SPIN is farther from the expert", more("KL(E‖π)"), 0.9),
    ]


def draw_figure(table, out):
    """One panel per column, one bar per policy, one dot per seed."""
    import matplotlib

    matplotlib.use("Agg")  # set here, not at import: a notebook that imports this file keeps its own backend
    import matplotlib.pyplot as plt

    columns = list(next(iter(table.values())))
    figure, axes = plt.subplots(1, len(columns), figsize=(4 * len(columns), 3.8), constrained_layout=True)
    for axis, column in zip(axes, columns, strict=True):
        for index, (name, values) in enumerate(table.items()):
            axis.bar(index, statistics.mean(values[column]), color=f"C{index}" if name not in ("base", "expert") else "0.6", width=0.7)
            axis.plot([index] * len(values[column]), values[column], "k.", ms=4)
        axis.axhline(0, color="k", lw=0.6)
        axis.set_xticks(range(len(table)), [name.replace(", ", "\n").replace(" (", "\n(") for name in table], fontsize=7)
        axis.set_title(column)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(cfg):
    """Print table and orderings, write the figure. Returns True if all gated orderings hold. Raises BadInput for bad arguments."""
    if not (cfg.kappa >= 0 and cfg.beta > 0 and cfg.pull > 0 and cfg.lr > 0 and 0 <= cfg.contamination <= 1):
        raise BadInput("--beta, --pull and --lr must be above 0, --kappa at least 0, --contamination between 0 and 1")
    if min(cfg.demos, cfg.steps, cfg.batch_size, cfg.seeds) < 1:
        raise BadInput("--demos, --steps, --batch_size and --seeds must be at least 1")
    cfg = replace(cfg, seeds=2 * cfg.seeds) if cfg.full else cfg
    figure_path("--out", cfg.out)
    language, started, judges, table = Language(n_prompts=4), time.monotonic(), {}, {}
    for seed in range(cfg.seeds):
        if seed % 5 not in judges:
            base = base_model(language, cfg.kappa, seed % 5)
            law = language.law_of(base)
            expert = [closed_form.tilt(p, r, cfg.beta) for p, r in zip(law.numpy(), language.rewards.numpy(), strict=True)]
            judges[seed % 5] = base, law, Judge(language, base, torch.stack([torch.tensor(e) for e in expert]))
        base, law, judge = judges[seed % 5]
        rows = demonstrations(language, law, judge.expert, cfg, seed)
        results = {"base": judge(law.log())}
        for name, rounds in METHODS.items():
            results[name] = judge(language.law_of(train(rounds, base, language, rows, cfg, seed)).log())
        results["expert"] = judge(judge.expert.log())
        for name, numbers in results.items():
            for column, value in numbers.items():
                table.setdefault(name, {}).setdefault(column, []).append(value)
        print(f"seed {seed}: gap " + ", ".join(f"{name} {numbers['gap']:+.2f}" for name, numbers in results.items()), flush=True)

    print(f"\n{cfg.demos} demonstrations, {cfg.contamination:.0%} from base; mean ± standard deviation over {cfg.seeds} seeds")
    columns = list(table["base"])
    print(f"{'':22}" + "".join(f"{column:>18}" for column in columns))
    for name, values in table.items():
        cells = [f"{statistics.mean(values[c]):7.3f} ± {statistics.pstdev(values[c]):.3f}" for c in columns]
        print(f"{name:22}" + "".join(f"{cell:>18}" for cell in cells))
    missed = 0
    print()
    for what, values, needed in orderings(table):
        wins, least = sum(value > 0 for value in values), math.ceil(needed * len(values))
        missed += wins < least
        print(f"{'PASS' if wins >= least else 'FAIL'}  {what:34} {wins}/{len(values)} seeds (needs {least})")
    for what, a, b, column in (("T = 5 has a larger gap than T = 1", "IRFT, T = 5", "IRFT, T = 1 (SPIN)", "gap"),
                               ("T = 5 is more accurate than T = 1", "IRFT, T = 5", "IRFT, T = 1 (SPIN)", "implicit"),
                               ("T = 1 is more accurate than SFT", "IRFT, T = 1 (SPIN)", "SFT", "implicit"),
                               ("fresh samples: larger gap than SFT", "IRFT, fresh samples", "SFT", "gap")):
        wins = sum(x > y for x, y in zip(table[a][column], table[b][column], strict=True))
        print(f"      {what:34} {wins}/{cfg.seeds} seeds (not gated)")
    draw_figure(table, cfg.out)
    print(f"{5 - missed} of 5 orderings in {time.monotonic() - started:.0f} s; figure: {cfg.out}")
    return not missed


if __name__ == "__main__":
    with exit_codes("few_demos"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.few_demos", description=__doc__)) else 1)
