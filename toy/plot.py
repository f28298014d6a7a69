"""The figure at the top of the README: what every method learned against its closed form; the dots should lie on the diagonal.

Each dot is the probability of one action or completion. From three_actions come all rows whose name begins with that of the method.
From tiny_language come a GPT's probabilities of fifteen completions per prompt, from the most to the least likely. Grey dots show them
before training. Probabilities below 1e-6 are cut off. Losses without a closed form (KTO with β > 0, ORPO with λ > 0, GPO's hinge and
truncated quadratic) have no dots: for them the toys test that the expected update is 0, or small, at the end of training.

    python -m toy.plot --numbers docs --out docs/laws.png              # what `make figures` does with the numbers that it has written

Checked by tests/toy/test_scoreboard.py.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minialign.engine.common import BadInput
from minialign.settings import cli, exit_codes


@dataclass
class Config:
    numbers: str = "docs"           # folder with three_actions.json and tiny_language.json (from --full)
    out: str = "runs/laws.png"      # the figure


FAMILIES = {  # {what the methods learn from: {method: (start of its rows' names in three_actions, its name in tiny_language)}}
    "demonstrations": {"SFT": ("SFT", None), "IFT": (None, "ift"), "IRFT": ("IRFT", None), "SPIN": ("SPIN", None), "RFT": ("RFT", "rft"),
                       "ML-IRL, bounded": ("ML-IRL", None), "iterative IRL": ("IRL", "irl")},
    "preferences": {"DPO": ("DPO", "dpo"), "IPO": ("IPO", "ipo"), "GPO": ("GPO", "gpo"), "SLiC-HF": ("SLiC", "slic"),
                    "SimPO": ("SimPO", "simpo"), "ORPO, λ = 0": ("ORPO", "orpo"), "KTO, β → 0": ("KTO", None)},
    "a reward, by selection": {"best of n": ("best of", "best_of_n"), "ReST": ("ReST", "rest")},
    "a reward, online": {"REINFORCE": (None, "reinforce"), "RLOO": (None, "rloo"), "PPO": (None, "ppo"), "GRPO": (None, "grpo"),
                         "REBEL": (None, "rebel")},
}
MARKERS = "os^Dv<>"


def dots(three_actions, tiny_language):
    """{method: (3, n) law, learned, started}; started is NaN for three_actions."""
    found = {}
    for family in FAMILIES.values():
        for method, (begins, name) in family.items():
            rows = found[method] = []
            for row in (row for title, row in three_actions["laws"].items() if begins and title.startswith(begins)):
                rows += [(law, learned, np.nan) for law, learned in zip(np.ravel(row["law"]), np.ravel(row["learned"]), strict=True)]
            for row in (row for row in tiny_language["laws"].values() if row["method"] == name):
                rows += [(law, learned, ref) for ref, law, learned in row["dots"]]
    return {method: np.array(rows).T for method, rows in found.items()}


def draw_figure(found, out):
    """One panel per family, so that each needs few colours. All panels have the same axes."""
    import matplotlib

    matplotlib.use("Agg")  # set here, not at import: a notebook that imports this file keeps its own backend
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8.3, 8.6), sharex=True, sharey=True, constrained_layout=True)  # the width of the README
    for axis, (family, members) in zip(axes.flat, FAMILIES.items(), strict=True):
        axis.plot([1e-6, 1], [1e-6, 1], color="0.6", lw=1, zorder=1)
        for index, label in enumerate(members):
            law, learned, started = found[label]
            axis.plot(law, started, ".", color="0.82", ms=5, zorder=0)
            axis.plot(law, learned, MARKERS[index], color=f"C{index}", ms=6, alpha=0.7, mew=0, label=label, zorder=2)
        axis.set(xscale="log", yscale="log", xlim=(1e-6, 1.3), ylim=(1e-6, 1.3), aspect="equal")
        axis.set_title(f"from {family}", fontsize=13)
        axis.tick_params(labelsize=11)
        axis.legend(fontsize=10.5, loc="upper left", frameon=False, handletextpad=0.1, labelspacing=0.3)
    figure.supxlabel("the probability that the formula says", fontsize=13)
    figure.supylabel("the probability that training reached (grey: before training)", fontsize=13)
    figure.savefig(out, dpi=140)
    plt.close(figure)


def main(cfg):
    """Draw the figure. Returns the number of dots. Raises BadInput if numbers are missing."""
    try:
        three_actions, tiny_language = (json.loads((Path(cfg.numbers) / f"{name}.json").read_text(encoding="utf-8"))
                                        for name in ("three_actions", "tiny_language"))
    except OSError as error:
        raise BadInput(f"--numbers {cfg.numbers}: {error.filename} cannot be read ({error.strerror}); `make figures` writes it") from None
    found = dots(three_actions, tiny_language)
    if missing := [method for method, rows in found.items() if not len(rows)]:
        raise BadInput(f"--numbers {cfg.numbers}: no row of {', '.join(missing)}; `make figures` (tiny_language --full) writes them all")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    draw_figure(found, cfg.out)
    n = sum(rows.shape[1] for rows in found.values())
    print(f"{n} dots of {len(found)} methods: {cfg.out}")
    return n


if __name__ == "__main__":
    with exit_codes("plot"):
        main(cli(Config, sys.argv[1:], prog="python -m toy.plot", description=__doc__))
        sys.exit(0)
