"""Figures of tutorials 09 (DPO) and 09b (its siblings)."""

import numpy as np

from tutorials.figures import style
from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED


def two_routes():
    """From pairs to a policy: through a reward model and PPO, or by DPO at once."""
    figure, axes = style.canvas(27)
    style.box(axes, 0.5, 10, 13.5, 7, "pairs: chosen\nand rejected", GREY)
    style.box(axes, 20, 18, 13, 7, "reward model\n(tutorial 06)", ORANGE)
    style.box(axes, 38, 18, 14, 7, "sample, score,\nPPO (07, 08)", ORANGE)
    style.box(axes, 29, 2, 14, 7, "DPO: one loss\n(this tutorial)", BLUE)
    style.box(axes, 57, 10, 12, 7, "policy π*", GREEN)
    style.arrow(axes, (14, 15.5), (20, 21), color=ORANGE)
    style.arrow(axes, (33, 21.5), (38, 21.5), color=ORANGE)
    style.arrow(axes, (52, 21), (57, 15.5), color=ORANGE)
    style.arrow(axes, (14, 11.5), (29, 5.5), color=BLUE)
    style.arrow(axes, (43, 5.5), (57, 11.5), color=BLUE)
    axes.text(35, 13.5, "two trainings, with sampling, a critic and a clip", ha="center", va="center", color=ORANGE, size=11)
    axes.text(35, 0.3, "one training, like SFT", ha="center", va="center", color=BLUE, size=11)
    style.show(figure, "09_two_routes.png",
               "Two routes from pairs to the same policy: a reward model and then PPO, or DPO in one training.")


def certain_labels(paths, stops):
    """paths: {label: Δ (steps + 1,)}; stops: {label: the Δ at which it stops}."""
    figure, axes = style.new(3.6)
    steps = np.unique(np.geomspace(1, len(next(iter(paths.values()))) - 1, 300).astype(int))
    colors = dict(zip(paths, (PURPLE, RED, ORANGE, BLUE), strict=False))
    for label, path in paths.items():
        axes.plot(steps, np.asarray(path)[steps], color=colors[label], lw=2.2)
        axes.text(steps[-1] * 1.15, path[-1], label, color=colors[label], va="center")
    for label, stop in stops.items():
        axes.axhline(stop, color=colors[label], lw=0.9, ls="--")
    axes.set(xscale="log", xlabel="steps of gradient descent", ylabel="margin Δ, nats", xlim=(1, steps[-1]))
    axes.set_title("A label that never changes: DPO's margin grows with log(steps)", loc="left")
    style.show(figure, "09_certain_labels.png",
               "Over a logarithmic axis of steps DPO's margin is a straight line without end, steeper for a "
               "smaller beta; with flipped labels it becomes flat.")


def both_fall(chosen, rejected):
    """chosen, rejected (steps + 1,): mean log π."""
    figure, axes = style.new(3.3)
    axes.fill_between(range(len(chosen)), chosen, rejected, color=style.PALE[GREY])
    axes.plot(chosen, color=BLUE, lw=2.2)
    axes.plot(rejected, color=RED, lw=2.2)
    axes.axhline(chosen[0], color=BLUE, lw=0.9, ls="--")
    last = len(chosen) - 1
    axes.text(last * 1.01, chosen[-1], "chosen", color=BLUE, va="center")
    axes.text(last * 1.01, rejected[-1], "rejected", color=RED, va="center")
    axes.text(last * 0.99, chosen[0] + 0.4, "chosen, before", color=BLUE, ha="right", va="bottom", size=10)
    axes.set(xlabel="steps of DPO", ylabel="mean log π of the 100 pairs", xlim=(0, last))
    axes.set_title("Both fall; what grows is the distance between them", loc="left")
    style.show(figure, "09_both_fall.png",
               "The mean log-prob of the chosen and of the rejected answers over the steps of DPO: both fall fast "
               "from step 10 to step 30; then the chosen one stays between −12 and −16, the rejected one falls on.")


def where_mass_goes(seen, unseen):
    """seen, unseen (steps + 1,): probability of answers in some pair, and of the language's other answers."""
    figure, axes = style.new(2.9)
    rest, steps = 1 - seen - unseen, range(len(seen))
    axes.stackplot(steps, seen, unseen, rest, colors=[style.PALE[BLUE], style.PALE[GREEN], style.PALE[RED]])
    last = len(seen) - 1
    edges = [0, seen[-1], seen[-1] + unseen[-1], 1]
    names = (("answers in some pair", BLUE), ("other well-formed answers", GREEN), ("not well-formed", RED))
    places = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    places = [places[0], max(places[1], places[0] + 0.12), max(places[2], max(places[1], places[0] + 0.12) + 0.12)]
    for place, (name, color) in zip(places, names, strict=True):
        axes.text(last * 1.02, place, name, color=color, va="center")
    axes.set(xlabel="steps of DPO", ylabel="probability", xlim=(0, last), ylim=(0, 1))
    axes.set_title("Where the probability went", loc="left")
    style.show(figure, "09_where_mass_goes.png",
               "Stacked probabilities over the steps of DPO: near step 30 nearly all belongs to malformed texts; "
               "then about half returns to well-formed answers, as much to those in no pair as to those in pairs.")


def family():
    """DPO in the middle; round it what goes wrong, and the sibling that repairs it."""
    figure, axes = style.canvas(46)
    style.box(axes, 27, 19.5, 16, 7, "DPO\n$h(\\beta\\Delta)$", BLUE, size=13)
    around = (
        (1, 38, "IPO", "certain labels:\nno finite end", RED), (27, 38, "GPO", "only one shape\nof loss", PURPLE),
        (53, 38, "SLiC-HF", "easy pairs still\npull; needs ref", ORANGE), (53, 19.5, "SimPO", "depends\non length", ORANGE),
        (53, 1, "ORPO", "needs SFT first,\nthen ref", ORANGE), (27, 1, "KTO", "needs pairs", GREEN),
        (1, 1, "REBEL", "ignores by how\nmuch one is better", RED),
    )
    for x, y, name, problem, color in around:
        style.box(axes, x, y, 16, 7, f"{name}", color, size=13)
        start = (35 + 8 * np.sign(x - 27), 23 + 3.5 * np.sign(y - 19.5)) if y != 19.5 else (43, 23)
        end = (x + 8 - 8 * np.sign(x - 27), y + 3.5 - 3.5 * np.sign(y - 19.5)) if y != 19.5 else (x, 23)
        style.arrow(axes, start, end, color=color)
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        axes.text(*middle, problem, ha="center", va="center", size=10, color=color,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
    style.show(figure, "09b_family.png",
               "DPO in the middle with an arrow to each of seven siblings; on each arrow what goes wrong with DPO.")


def shapes(functions):
    """functions: {name: h over the grid of x}, with the grid under the key 'x'."""
    figure, axes = style.new(3.4)
    x = functions.pop("x")
    for (name, values), color in zip(functions.items(), (BLUE, RED, GREEN, ORANGE, PURPLE, GREY), strict=False):
        axes.plot(x, values, color=color, lw=2, label=name)
    axes.axvline(0, color="0.6", lw=0.9, ls=":")
    axes.set(xlabel="z = β·Δ", ylabel="h(z) / |h'(0)|", ylim=(0, 4), xlim=(x[0], x[-1]))
    axes.legend(loc="upper right", fontsize=10)
    axes.set_title("Six losses of one margin, with equal slopes at 0", loc="left")
    style.show(figure, "09b_shapes.png",
               "Six loss functions of the margin; all fall at 0 with the same slope and bend differently.")


def changes(ends):
    """ends: {method: (change of log π chosen, of log π rejected)}."""
    figure, axes = style.new(3.6)
    for row, (up, down) in enumerate(reversed(ends.values())):
        axes.plot([down, up], [row, row], color="0.8", lw=3, zorder=1)
        axes.plot(down, row, "o", color=RED, ms=8)
        axes.plot(up, row, "o", color=BLUE, ms=8)
    axes.axvline(0, color="0.5", lw=0.9, ls="--")
    axes.set_yticks(range(len(ends)), list(reversed(ends)))
    axes.set(xlabel="change of mean log π, nats")
    axes.plot([], [], "o", color=BLUE, label="chosen")
    axes.plot([], [], "o", color=RED, label="rejected")
    axes.legend(loc=(0.6, 0.04), fontsize=10)
    axes.set_title("Where one hundred pairs move, method by method", loc="left")
    style.show(figure, "09b_changes.png",
               "For each method a blue dot for the change of the chosen and a red dot for that of the rejected log-probs.")


def margins(paths, target, every):
    """paths: {method: Δ after 0, every, 2·every … steps}; target: IPO's."""
    figure, axes = style.new(3.4)
    colors = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY, "black")
    height, top = -np.inf, max(path[-1] for path in paths.values())
    steps = np.arange(len(next(iter(paths.values())))) * every
    for name, color in sorted(zip(paths, colors, strict=False), key=lambda item: paths[item[0]][-1]):
        axes.plot(steps, paths[name], color=color, lw=2)
        height = max(float(paths[name][-1]), height + top * 0.075)
        axes.text(steps[-1] * 1.02, height, name, color=color, va="center", size=10)
    axes.axhline(target, color="0.5", lw=0.9, ls="--")
    axes.text(1, target, "IPO's target 1/(2β)", va="bottom", size=10, color="0.4")
    axes.set(xlabel="steps", ylabel="mean margin Δ, nats", xlim=(0, steps[-1]))
    axes.set_title("Some margins stop, others grow", loc="left")
    style.show(figure, "09b_margins.png",
               "The mean margin over the steps for each method: DPO and KTO grow most, then SimPO and IPO; "
               "SLiC-HF and ORPO stay small.")
