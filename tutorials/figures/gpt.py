"""The figures of tutorial 01."""

import math

import matplotlib

from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, arrow, box, canvas, new, show


def blocks():
    """The path from token ids to logits: a stream of vectors to which attention and MLP add."""
    figure, axes = canvas(height=37)
    axes.add_patch(matplotlib.patches.FancyBboxPatch((20.5, 1.5), 32, 33.5, boxstyle="round,pad=0,rounding_size=1.2", lw=1.2, ls="--",
                                                     edgecolor=GREY, facecolor="none"))
    axes.text(36.5, 32.6, "one block, repeated L times", ha="center", size=11, color="0.35")
    box(axes, 0.5, 5, 7.2, 6, "token\nids", GREY)
    box(axes, 10.2, 5, 9, 6, "embed-\nding", BLUE)
    box(axes, 55.2, 3.5, 6, 9, "norm", ORANGE)
    box(axes, 63.6, 3.5, 6, 9, "logits", GREY)
    arrow(axes, (7.7, 8), (10.2, 8))
    axes.plot([19.2, 55], [8, 8], color=BLUE, lw=5, alpha=0.35, solid_capstyle="butt", zorder=0)
    axes.text(36.5, 3.4, "residual stream: C numbers per position", ha="center", size=10.5, color=BLUE)
    arrow(axes, (53, 8), (55.2, 8))
    arrow(axes, (61.2, 8), (63.6, 8))
    for left, name, what, color in ((22.2, "attention", "mixes positions", GREEN), (38, "MLP", "each position alone", PURPLE)):
        box(axes, left, 14, 7, 4, "norm", ORANGE)
        box(axes, left - 0.6, 21, 11.5, 5, name, color)
        axes.text(left + 5.4, 28.2, what, ha="center", size=10.5, color=color)
        arrow(axes, (left + 3.5, 8), (left + 3.5, 14))
        arrow(axes, (left + 3.5, 18), (left + 3.5, 21))
        plus = left + 9.2
        arrow(axes, (plus, 21), (plus, 9.3))
        axes.add_patch(matplotlib.patches.Circle((plus, 8), 1.3, facecolor="white", edgecolor="0.25", lw=1.4, zorder=3))
        axes.text(plus, 7.9, "+", ha="center", va="center", size=14, zorder=4)
    show(figure, "01_blocks.png", alt="Block diagram of a GPT: token ids become vectors, attention and MLP read a normalised copy of the "
                                      "stream and add their output to it, and a last norm and the embedding table turn it into logits.")


def by_hand(letters, shares, values, gathered):
    """The last letter gathers the values of all four, with the given shares."""
    figure, axes = canvas(height=29)
    total = sum(shares)
    for i, (letter, share, value) in enumerate(zip(letters, shares, values, strict=True)):
        x = 3 + 17 * i
        box(axes, x, 3, 12, 5.5, f"{letter}:  v = {value:g}", BLUE if i < len(letters) - 1 else ORANGE, size=12)
        end = (40.6 - 3 * (len(letters) - 1 - i) + 4.5, 20.5)
        axes.annotate("", xy=end, xytext=(x + 6, 8.7), arrowprops={"arrowstyle": "-|>", "color": GREEN, "lw": 1.6 * share,
                                                                   "shrinkA": 1, "shrinkB": 1, "mutation_scale": 12 + 3 * share})
        axes.text(0.5 * (x + 6 + end[0]) + (-3.6 if i < 2 else 3.6), 14.6, f"{share:g}/{total:g}", ha="center", size=12, color=GREEN)
    box(axes, 30, 21, 24, 5.5, f"d gathers  {gathered:g}", ORANGE, size=12)
    show(figure, "01_by_hand.png", alt="Four letters a, b, c, d send their values 8, 0, 4 and 2 to the last position, with "
                                       "arrows of weight 1, 1, 2 and 4 eighths, and the weighted sum is 3.")


def rotation(apart=1, places=(1, 3, 5)):
    """The vector (1, 0) as a query and as a key, `apart` positions apart, turned at three places."""
    figure, axes = new(height=2.9, columns=len(places))
    for panel, t in zip(axes, places, strict=True):
        panel.add_patch(matplotlib.patches.Circle((0, 0), 1, facecolor="none", edgecolor="0.85"))
        for angle, color in ((t, ORANGE), (t - apart, BLUE)):
            panel.annotate("", xy=(math.cos(angle), math.sin(angle)), xytext=(0, 0), arrowprops={
                "arrowstyle": "-|>", "color": color, "lw": 2.6, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 18})
        low, high = math.degrees(t - apart), math.degrees(t)
        panel.add_patch(matplotlib.patches.Arc((0, 0), 0.8, 0.8, theta1=low, theta2=high, color=GREEN, lw=2.5))
        middle = t - apart / 2
        panel.text(0.62 * math.cos(middle), 0.62 * math.sin(middle), f"{apart}", ha="center", va="center", size=12, color=GREEN)
        panel.text(0, -1.22, f"query at position {t}", ha="center", va="center", size=11, color=ORANGE)
        panel.text(0, -1.5, f"key at position {t - apart}", ha="center", va="center", size=11, color=BLUE)
        panel.set(xlim=(-1.3, 1.3), ylim=(-1.7, 1.08), aspect="equal")
        panel.axis("off")
    figure.suptitle("Moved together, query and key keep the angle between them (1 radian)", size=12)
    show(figure, "01_rotation.png", alt="Three circles with a query arrow and a key arrow one position apart: both turn as they move along "
                                        "the text, and the angle between them is 1 radian in all three.")


def learning(with_attention, without, uniform, bound):
    """Losses of the two runs, and the two bounds."""
    figure, axes = new(height=3.6)
    axes.semilogy(range(1, len(with_attention) + 1), with_attention, color=BLUE, lw=2.4)
    axes.semilogy(range(1, len(without) + 1), without, color=RED, lw=2.4)
    last = len(with_attention)
    axes.text(last * 1.01, with_attention[-1], "whole model", color=BLUE, va="center")
    axes.text(last * 1.01, without[-1] * 1.08, "without attention", color=RED, va="bottom")
    for level, label in ((uniform, "uniform guess, ln V"), (bound, "best from the last letter alone")):
        axes.axhline(level, color="0.45", lw=1.2, ls="--", zorder=0)
        above = level == uniform
        axes.text(last, level * (1.1 if above else 0.9), label, ha="right", va="bottom" if above else "top", size=11, color="0.35")
    axes.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, last * 1.28), ylim=(None, uniform * 1.9))
    axes.set_xticks(range(0, last + 1, 20))
    axes.set_title("Without attention, training stops at the bound")
    show(figure, "01_learning.png", alt="Loss against training step on a logarithmic axis: the whole model falls to almost zero, the model "
                                        "without attention levels off exactly at the bound for a model that sees one letter.")
