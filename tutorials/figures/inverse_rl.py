"""The figures of tutorials 05 (inverse RL) and 05b (IRFT, SPIN and iterative IRL). They draw the numbers that they are given."""

import numpy as np
from matplotlib.ticker import NullLocator

from tutorials.figures import style
from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED

HEIGHT = 3**0.5 / 2
CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, HEIGHT]])


# ----------------------------------------------------------------------------------------------------------- tutorial 05


def reward_loop():
    """Forward: a reward makes a policy. Inverse: demonstrations and own answers make a reward."""
    figure, axes = style.canvas(32)
    style.box(axes, 1, 18, 17, 8, "reward model\n$r(x, y)$", ORANGE)
    style.box(axes, 34, 18, 15, 8, "policy\n$\\pi$", BLUE)
    style.box(axes, 55, 18, 14, 8, "reference\n(frozen)", GREY)
    style.box(axes, 1, 2, 17, 8, "demonstrations\nfrom the expert $E$", GREEN)
    style.box(axes, 34, 2, 15, 8, "own answers\nof the policy", BLUE)
    style.arrow(axes, (18, 22), (34, 22), "get much of $r$", offset=(0, 1.6))
    style.arrow(axes, (55, 22), (49, 22))
    axes.text(52, 28.2, "stay near the reference", ha="center", va="center", size=10)
    axes.plot([52, 52], [26.9, 22.6], color="0.6", lw=0.8)
    style.arrow(axes, (41.5, 18), (41.5, 10), "sample", offset=(4.2, 0))
    style.arrow(axes, (9.5, 10), (9.5, 18), "raise $r$", offset=(5, 0), color=GREEN)
    style.arrow(axes, (34, 9), (17, 18), "lower $r$", offset=(4.5, 1.2), color=RED)
    axes.set_title("Take turns: train the policy on the reward, then correct the reward")
    style.show(figure, "05_loop.png", alt="A loop: the reward model steers the policy, which stays near a frozen reference and writes own "
               "answers; demonstrations raise the reward and own answers lower it.")


def with_and_without(texts, ref, held, free, beta):
    """Bars: the probability of each text in the reference, with the pull to the reference, and without."""
    figure, axes = style.new(3.6)
    y = np.arange(len(texts))[::-1]
    for shift, values, color, label in ((0.27, ref, GREY, "reference"), (0, held, BLUE, f"trained, held to it (β = {beta:g})"),
                                        (-0.27, free, RED, "trained on the reward alone")):
        axes.barh(y + shift, values, 0.25, color=color, label=label)
        for place, value in zip(y + shift, values, strict=True):
            axes.text(value + 0.01, place, f"{value:.3f}", va="center", size=9.5, color=color)
    axes.set_yticks(y, texts)
    axes.set(xlim=(0, 1.12), xlabel="probability")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.3))
    axes.set_title("Without the reference, training ends on the largest reward", loc="left", x=-0.35)
    style.show(figure, "05_reference.png", alt="Bars of four answers: trained on the reward alone, all probability is on 'please please "
               "please please'; held to the reference, sensible answers keep most of it.")


def triangle(axes, labels):
    """A triangle whose points are the policies over three answers."""
    axes.plot(*np.vstack([CORNERS, CORNERS[:1]]).T, color="0.3", lw=1)
    for (x, y), text, ha, va, dy in zip(CORNERS, labels, ("left", "right", "center"), ("top", "top", "bottom"), (-0.03, -0.03, 0.02),
                                        strict=True):
        axes.text(x - 0.03 if ha == "left" else x + 0.03 if ha == "right" else x, y + dy, text, ha=ha, va=va, size=10)
    axes.set(xlim=(-0.28, 1.28), ylim=(-0.11, HEIGHT + 0.1), aspect="equal")
    axes.axis("off")


def dot(axes, policy, text, color, at, marker="o"):
    """A dot at a policy, and its name at the place `at`, joined by a thin line."""
    x, y = np.asarray(policy) @ CORNERS
    axes.plot([x, at[0]], [y, at[1]], color=color, lw=0.8, zorder=2)
    axes.plot(x, y, marker, color=color, ms=9, markeredgecolor="white", zorder=5)
    side = "left" if at[0] > x else "right"
    axes.text(at[0] + (0.015 if side == "left" else -0.015), at[1], text, color=color, ha=side, va="center", weight="bold")


def same_path(labels, ref, expert, rft, sft):
    """The path of RFT (line) and the points of SFT after every fifth step on it."""
    figure, axes = style.new(4.6)
    triangle(axes, labels)
    axes.plot(*(rft @ CORNERS).T, color=BLUE, lw=2.5, zorder=3)
    axes.plot(*(sft[5::5] @ CORNERS).T, "o", color="white", ms=6, markeredgecolor=ORANGE, markeredgewidth=1.6, zorder=4)
    dot(axes, ref, "reference", GREY, (0.13, 0.36))
    dot(axes, expert, "expert", GREEN, (0.86, 0.72))
    axes.text(0.9, 0.50, "blue line: RFT\n(a reward, then a policy)", color=BLUE, ha="left", va="center")
    axes.text(0.9, 0.34, "orange rings: SFT,\nevery fifth step", color=ORANGE, ha="left", va="center")
    axes.set_title("RFT without a bound takes the path of SFT")
    style.show(figure, "05_same_path.png", alt="A triangle of policies: the path of RFT from the reference to the expert runs exactly "
               "through the points of SFT.")


def log_axes(axes, xlim, ylim):
    """Steps against the probability of the two answers that were not shown, both logarithmic, with plain numbers."""
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="probability of the\ntwo unshown answers", xlim=xlim, ylim=ylim)
    for axis, ticks in ((axes.xaxis, [1, 10, 100, 1000]), (axes.yaxis, [1, 0.1, 0.01, 0.001, 0.0001])):
        ticks = [tick for tick in ticks if tick >= (ylim[0] if axis is axes.yaxis else 1)]
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(NullLocator())


def one_demonstration(steps, curves):
    """curves: {label: π of the demonstrated answer, step by step}; the first is SFT."""
    figure, axes = style.new(3.3)
    for (label, values), color in zip(curves.items(), (ORANGE, PURPLE, GREEN, BLUE), strict=False):
        axes.plot(steps, 1 - np.asarray(values), color=color, lw=2)
        axes.text(steps[-1] * 1.15, 1 - values[-1], label, color=color, va="center", weight="bold")
    log_axes(axes, (1, steps[-1] * 30), (0.004, 1))
    axes.set_title("One demonstration: a bound keeps the other answers", loc="left", x=-0.12)
    style.show(figure, "05_bound.png", alt="With one demonstration the probability of the other answers keeps falling under SFT; with a "
               "bounded reward it stops at a level that the bound sets.")


# ---------------------------------------------------------------------------------------------------------- tutorial 05b


def pair():
    """How IRFT scores a pair: log-ratios of a demonstration and of another answer, their difference, the loss."""
    figure, axes = style.canvas(30)
    style.box(axes, 0.5, 19, 17, 7, "demonstration $y$\nfrom the expert", GREEN)
    style.box(axes, 0.5, 4, 17, 7, "other answer $ỹ$\nfrom the model", RED)
    style.box(axes, 23, 19, 19, 7, "$\\log\\pi(y) - \\log\\mathrm{ref}(y)$", BLUE, size=10.5)
    style.box(axes, 23, 4, 19, 7, "$\\log\\pi(ỹ) - \\log\\mathrm{ref}(ỹ)$", BLUE, size=10.5)
    style.box(axes, 47, 11.5, 9, 7, "scaled\nmargin $β\\Delta$", PURPLE, size=10)
    style.box(axes, 60.5, 11.5, 9, 7, "loss", ORANGE)
    style.arrow(axes, (17.5, 22.5), (23, 22.5))
    style.arrow(axes, (17.5, 7.5), (23, 7.5))
    style.arrow(axes, (42, 22.5), (49, 18.5), "plus", offset=(2.8, 1.2))
    style.arrow(axes, (42, 7.5), (49, 11.5), "minus", offset=(3.2, -1.2))
    style.arrow(axes, (56, 15), (60.5, 15))
    axes.set_title("The policy compares a demonstration with another answer")
    style.show(figure, "05b_pair.png", alt="A demonstration and another answer each get a log-ratio of policy to reference; the "
               "difference is the margin, and the loss is computed from beta times the margin.")


def ends(labels, line, points):
    """The line ref·(E/ref)^s and where the methods end on it. points: {text: (policy, color, place of the text)}."""
    figure, axes = style.new(4.6)
    triangle(axes, labels)
    axes.plot(*(line @ CORNERS).T, color="0.6", lw=2, zorder=1)
    for text, (policy, color, at) in points.items():
        dot(axes, policy, text, color, at)
    axes.set_title("Where each method ends: all on one line")
    style.show(figure, "05b_ends.png", alt="A curve in the triangle of policies from the reference through the end of IRFT and the expert "
               "to that of SPIN, which is beyond the expert.")


def swing(paths):
    """paths: {label: (s round by round, colour, height of the label)}."""
    figure, axes = style.new(3.5)
    for height, text in ((0, "reference"), (1, "expert")):
        axes.axhline(height, color="0.7", lw=1, ls=(0, (4, 3)), zorder=0, xmax=8 / 12.6)
        axes.text(-0.25, height, text, ha="right", va="center", size=10)
    for label, (places, color, height) in paths.items():
        axes.plot(range(len(places)), places, "o-", color=color, lw=2, ms=5)
        axes.text(8.3, height, label, color=color, va="center", weight="bold", size=10)
    axes.set(xlabel="round", xlim=(0, 12.6), ylim=(-0.4, 1.9), xticks=range(9), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 8)
    axes.xaxis.set_label_coords(4 / 12.6, -0.13)
    axes.set_title("Replacing the reward oscillates, adding to it converges", loc="left", x=-0.12)
    style.show(figure, "05b_rounds.png", alt="Position between reference and expert, round by round: the printed loop of iterative "
               "IRL jumps between them without end; adding up the rewards converges to the expert.")
