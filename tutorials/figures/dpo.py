"""Figures of tutorials 09 (DPO), 09b and 09c (its siblings)."""

import numpy as np
import torch

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


def certain_labels(paths):
    """paths: {label: Δ (steps + 1,)}."""
    figure, axes = style.new(3.4)
    steps = np.unique(np.geomspace(1, len(next(iter(paths.values()))) - 1, 300).astype(int))
    for (label, path), color in zip(paths.items(), (PURPLE, RED, ORANGE), strict=True):
        axes.plot(steps, np.asarray(path)[steps], color=color, lw=2.2)
        axes.text(steps[-1] * 1.15, path[-1], label, color=color, va="center")
    axes.set(xscale="log", xlabel="steps of gradient descent", ylabel="margin Δ, nats", xlim=(1, steps[-1]))
    axes.set_title("A label that never changes: DPO's margin grows with log(steps)", loc="left")
    style.show(figure, "09b_certain_labels.png",
               "Over a logarithmic axis of steps DPO's margin becomes a straight line without end, steeper for a smaller beta.")


def both_fall(chosen, rejected, expected, every):
    """chosen, rejected: mean log π after 0, every, 2·every … steps; expected: the two changes at π*."""
    figure, axes = style.new(3.3)
    steps = np.arange(len(chosen)) * every
    chosen, rejected = np.asarray(chosen) - chosen[0], np.asarray(rejected) - rejected[0]
    axes.fill_between(steps, chosen, rejected, color=style.PALE[GREY])
    for name, path, change, color in (("chosen", chosen, expected[0], BLUE), ("rejected", rejected, expected[1], RED)):
        axes.plot(steps, path, color=color, lw=2.2)
        axes.text(steps[-1] * 1.01, path[-1], name, color=color, va="center")
        axes.axhline(change, color=color, lw=0.9, ls="--")
        axes.text(steps[-1] * 0.03, change + 0.02, f"{name}, at π*", color=color, va="bottom", size=10)
    axes.set(xlabel="steps of DPO", ylabel="change of mean log π", xlim=(0, steps[-1]))
    axes.set_title("Both fall; what grows is the distance Δ between them", loc="left")
    style.show(figure, "09_both_fall.png",
               "How much the mean log-prob of the chosen and of the rejected answers changes over the steps of DPO: both fall, the "
               "rejected one more, towards two dashed lines that theory predicts.")


def where_mass_goes(seen, unseen, every):
    """seen, unseen: probability of answers in some pair, and of the language's other answers, after 0, every, 2·every … steps."""
    figure, axes = style.new(2.9)
    rest, steps = 1 - seen - unseen, np.arange(len(seen)) * every
    axes.stackplot(steps, seen, unseen, rest, colors=[style.PALE[BLUE], style.PALE[GREEN], style.PALE[RED]])
    edges = [0, seen[-1], seen[-1] + unseen[-1], 1]
    names = (("answers in some pair", BLUE), ("other well-formed answers", GREEN), ("broken texts", RED))
    places = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    places = [places[0], max(places[1], places[0] + 0.12), max(places[2], max(places[1], places[0] + 0.12) + 0.12)]
    for place, (name, color) in zip(places, names, strict=True):
        axes.text(steps[-1] * 1.02, place, name, color=color, va="center")
    axes.set(xlabel="steps of DPO", ylabel="probability", xlim=(0, steps[-1]), ylim=(0, 1))
    axes.set_title("β = 0.1 and 100 pairs: where the probability went", loc="left")
    style.show(figure, "09_where_mass_goes.png",
               "Stacked probabilities over the steps of DPO: the share of broken texts grows after the first steps.")


def shapes(functions):
    """functions: {name: h, a function of a tensor}. Each is divided by |h'(0)| and moved to 0 at z = 0."""
    figure, axes = style.new(3.4)
    z = torch.linspace(-2, 3, 200)
    for (name, h), color in zip(functions.items(), (BLUE, RED, ORANGE, PURPLE), strict=True):
        zero = torch.zeros((), requires_grad=True)
        (slope,) = torch.autograd.grad(h(zero), zero)
        axes.plot(z, (h(z) - h(zero.detach())) / abs(slope), color=color, lw=2, label=name)
    axes.axvline(0, color="0.6", lw=0.9, ls=":")
    axes.set(xlabel="z = β·Δ", ylabel="(h(z) − h(0)) / |h'(0)|", ylim=(-1.6, 3), xlim=(-2, 3))
    axes.legend(loc="upper right", fontsize=10)
    axes.set_title("Four losses of one margin, with equal slopes at 0", loc="left")
    style.show(figure, "09b_shapes.png",
               "Four loss functions of the margin; all fall at 0 with the same slope. The exponential and the squared loss bend most.")


def ends(policies):
    """policies: {method: its shares of the three completions}."""
    figure, axes = style.new(3.2)
    for place, shares in enumerate(reversed(policies.values())):
        left = 0.0
        for share, color in zip(shares, (RED, ORANGE, GREEN), strict=True):
            axes.barh(place, share, left=left, color=style.PALE[color], edgecolor=color)
            axes.text(left + share / 2, place, f"{share:.2f}", ha="center", va="center", size=10)
            left += share
    axes.set_yticks(range(len(policies)), list(reversed(policies)))
    axes.set(xlabel='share of "tea!" (red), "tea, please" (orange), "could i have tea" (green)', xlim=(0, 1))
    axes.set_title("Where each loss ends, all at β = ½", loc="left")
    style.show(figure, "09b_ends.png",
               "The shares of the three completions in ref and at the end of six losses: logistic, Savage and REBEL reach the same "
               "policy, the exponential and the squared loss stay nearer to ref, IPO nearest.")


def changes(ends):
    """ends: {method: (change of log π chosen, of log π rejected)}."""
    figure, axes = style.new(3.2)
    for row, (up, down) in enumerate(reversed(ends.values())):
        axes.plot([down, up], [row, row], color="0.8", lw=3, zorder=1)
        axes.plot(down, row, "o", color=RED, ms=8)
        axes.plot(up, row, "o", color=BLUE, ms=8)
    axes.axvline(0, color="0.5", lw=0.9, ls="--")
    axes.set_yticks(range(len(ends)), list(reversed(ends)))
    axes.set(xlabel="change of mean log π, nats")
    axes.plot([], [], "o", color=BLUE, label="chosen")
    axes.plot([], [], "o", color=RED, label="rejected")
    axes.legend(loc="upper left", fontsize=10)
    axes.set_title("Where the pairs move in 50 steps, method by method", loc="left")
    style.show(figure, "09c_changes.png",
               "For each method a blue dot for the change of the chosen and a red dot for that of the rejected log-probs.")
