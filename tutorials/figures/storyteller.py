"""The figures of tutorial 11: what π* does to the three classes of stories, the shares during training, and what the training cost."""

import numpy as np

from tutorials.figures import style

COLORS = (style.GREY, style.BLUE, style.ORANGE)


def classes(names, ref_shares, target, factors):
    """Two stacked bars, ref's shares and the target's, with the factor e^(r/β) of each class between them."""
    figure, axes = style.canvas(34)
    for y, shares, title in ((20, ref_shares, "ref"), (4, target, "π*")):
        x = 6.0
        axes.text(4.5, y + 4, title, ha="right", va="center", size=13)
        for name, share, color in zip(names, shares, COLORS, strict=True):
            width = 62 * share
            first, last = f"{share:.0%}", "\n".join(name.split(" or ")) if width < 16 else name
            style.box(axes, x, y, width - 0.4, 8, f"{last}\n{first}", color=color, size=10.5)
            x += width
    above, below = 6.0, 6.0
    for factor, share, share_after, color in zip(factors, ref_shares, target, COLORS, strict=True):
        middles = (above + 31 * share, below + 31 * share_after)
        style.arrow(axes, (middles[0], 19.6), (middles[1], 12.4), color=color)
        axes.text((middles[0] + middles[1]) / 2 + 1, 16.2, f"× {factor:.2f}", ha="left", va="center", size=11, color=color)
        above, below = above + 62 * share, below + 62 * share_after
    axes.text(
        37, 31, "The boxes change their size. The stories inside a box stay as they are.", ha="center", va="center", size=12
    )
    axes.text(
        37,
        1.2,
        "the factors e^(r/β) of rewards 0, 1 and 2; then everything is scaled to sum to 1",
        ha="center",
        va="center",
        size=10,
    )
    style.show(
        figure,
        "11_classes.png",
        alt="Two bars cut into girl or nobody, boy and animal: from the reference to the target the animals' part grows "
        "threefold, and the girls' part shrinks.",
    )


def walk(names, ref_shares, path, target):
    """path (steps, 3): the shares of each update's stories; ref's before them, the target dashed."""
    shares = np.array([ref_shares, *path])
    reach = [min(k, 6) for k in range(len(shares))]  # no further to the right than to the left
    smooth = np.array([shares[k - h : k + h + 1].mean(0) for k, h in enumerate(reach)])
    figure, axes = style.new(3.8)
    for level, color in enumerate(COLORS):
        axes.plot(shares[:, level], ".", color=color, ms=4, alpha=0.45)
        axes.plot(smooth[:, level], color=color, lw=2.4, label=names[level])
        axes.axhline(target[level], color=color, ls="--", lw=1.3)
    heights, order = np.array(target), np.argsort(target)
    for lower, upper in zip(order, order[1:], strict=False):  # labels of near targets apart
        heights[upper] = max(heights[upper], heights[lower] + 0.055)
    for level, color in enumerate(COLORS):
        axes.text(len(shares) + 0.7, heights[level], f"target {target[level]:.2f}", color=color, va="center", size=10)
    axes.set(xlabel="update", ylabel="share of the stories", ylim=(0, 1), xlim=(-1, len(shares)))
    axes.set_title("The shares move towards their closed form (dashed)")
    axes.legend(loc="upper right", ncols=3)
    style.show(
        figure, "11_walk.png", alt="Three curves of shares start at those of the reference and end near their dashed targets."
    )


def cost(table):
    """table {name: (reward, kl, needed, wasted, errors)}: stacked bars."""
    figure, axes = style.new(1.2 + 0.55 * len(table))
    for y, (reward, _, needed, wasted, _) in enumerate(table.values()):
        axes.barh(y, needed, 0.6, color=style.BLUE, label="needed" if not y else None)
        axes.barh(y, max(wasted, 0), 0.6, left=needed, color=style.ORANGE, label="wasted" if not y else None)
        axes.text(needed + max(wasted, 0) + 0.005, y, f"reward {reward:.2f}", va="center", size=10)
    axes.set(yticks=range(len(table)), yticklabels=list(table), xlabel="KL from ref, nats")
    axes.set_xlim(0, 1.3 * max(kl for _, kl, _, _, _ in table.values()))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2)
    axes.set_title("How much of the KL was needed for the heroes", loc="left")
    style.show(
        figure,
        "11_cost.png",
        alt="Stacked bars of the needed and the wasted KL of the trained policies; most of each bar is needed.",
    )
