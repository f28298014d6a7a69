"""The figures of tutorial 07: one-sample gradients as arrows, learning curves, noise of four gradients, where each KL term ends."""

import numpy as np

from tutorials.figures import style

NAMES = ("no baseline", "running mean", "leave one out (RLOO)", "group (GRPO)")
COLORS = dict(zip(NAMES, (style.GREY, style.ORANGE, style.BLUE, style.RED), strict=True))


def arrows(pi, rewards, grad_logp, baselines):
    """One panel for each baseline: the gradient that each of three draws gives (3, 3), and their mean. They lie in a plane."""
    plane = np.array([[-1, 1, 0], [-1, -1, 2]]) / np.sqrt([[2], [6]])  # an orthonormal basis of the vectors that sum to 0
    figure, panels = style.new(3.5, columns=len(baselines), sharex=True, sharey=True)
    for axes, b in zip(panels, baselines, strict=True):
        estimates = (rewards - b)[:, None] * grad_logp @ plane.T  # (3, 2)
        mean = pi @ estimates
        names = (style.BLUE, style.ORANGE, style.GREEN)
        for y, ((right, up), color) in enumerate(zip(estimates, names, strict=True)):
            arrow = {"arrowstyle": "-|>", "color": color, "lw": 1 + 4 * pi[y], "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=(right, up), xytext=(0, 0), arrowprops=arrow)
            label = f"y = {y}" + (": no step" if not estimates[y].any() else "")
            right, up = (0.75, -0.75) if not estimates[y].any() else (right, up) if np.hypot(right, up) > 0.2 else (0.35, -0.3)
            axes.text(
                right - (0.1 if right < 0 and up < 1 else 0),
                up + (0.2 if up > 0 else -0.2),
                label,
                color=color,
                ha="center",
                va="center",
            )
        axes.annotate(
            "", xy=mean, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 2.5, "shrinkA": 0, "shrinkB": 0}
        )
        axes.plot(*mean, "o", color="black", ms=4)
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.2, 2.3), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"b = {b:g}" + (" (no baseline)" if b == 0 else " (the mean reward)"))
        axes.spines[["left", "bottom"]].set_visible(False)
    panels[0].text(-1.45, -1.1, "black: the mean,\nthe same in both", ha="left", va="bottom", size=10)
    figure.suptitle("A baseline changes the single steps, not their mean", size=12)
    style.show(
        figure,
        "07_arrows.png",
        alt="Arrows of three one-sample gradients without and with a baseline; the black mean arrow is the same, and with "
        "the baseline the frequent draws are short.",
    )


def curves(curves):
    """curves {name: (seeds, steps)}: marks during training, a running average over nine steps, one line for the mean of the seeds."""
    figure, axes = style.new(3.6)
    for name, seeds in curves.items():
        smooth = np.array([[row[max(0, k - 4) : k + 5].mean() for k in range(len(row))] for row in np.asarray(seeds)])
        axes.fill_between(range(smooth.shape[1]), smooth.min(0), smooth.max(0), color=COLORS[name], alpha=0.15, lw=0)
        axes.plot(smooth.mean(0), color=COLORS[name], lw=2.2, label=name)
    axes.axhline(5, color="0.6", ls=":", lw=1)
    axes.text(0, 5.04, "all polite", color="0.4", size=10, va="bottom")
    axes.set(xlabel="update", ylabel="marks for manners", ylim=(1.5, 5.4))
    axes.set_title("Same loop: the baseline decides how fast it learns")
    axes.legend(loc="lower right")
    style.show(
        figure,
        "07_curves.png",
        alt="Learning curves of four methods: no baseline rises slowest and stays lowest, the running mean is faster, leave"
        " one out and GRPO are fastest.",
    )


def noise(fixed, grouped):
    """fixed {name: noise}, grouped {name: {G: noise}}: horizontal bars."""
    rows = [(name, value, COLORS[name]) for name, value in fixed.items()]
    rows += [
        (f"{name.split(' (')[1][:-1]}, G = {size}", value, COLORS[name])
        for name, row in grouped.items()
        for size, value in row.items()
    ]
    figure, axes = style.new(3.6)
    for y, (_, value, color) in enumerate(rows):
        axes.barh(y, value, 0.65, color=color)
        axes.text(value + 0.05, y, f"{value:.2f}", va="center", size=10)
    axes.set(
        yticks=range(len(rows)),
        yticklabels=[name for name, _, _ in rows],
        xlabel="squared noise / squared length of the mean gradient",
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(value for _, value, _ in rows))
    axes.set_title("Noise: compare with answers to the same prompt")
    style.show(
        figure,
        "07_noise.png",
        alt="Bars of the relative noise: by far the longest is no baseline, then the running mean, and the groups are short.",
    )


def ends(star, ends):
    """star (3,) and ends {name: (3,)}: for each place of the KL a group of three bars, with π* as ticks."""
    figure, axes = style.new(3.4)
    colors = (style.BLUE, style.ORANGE, style.GREEN)
    for i, (_, end) in enumerate(ends.items()):
        for y in range(3):
            place = i + 0.26 * (y - 1)
            axes.bar(place, end[y], 0.22, color=colors[y], label=f"y = {y}, reward {(1, 0, 2)[y]}" if not i else None)
            axes.plot([place - 0.13, place + 0.13], [star[y]] * 2, color="black", lw=2.2)
    axes.plot([], [], color="black", lw=2.2, label="π*")
    axes.set(
        xticks=range(len(ends)),
        xticklabels=[name.replace(" in ", "\nin ") for name in ends],
        ylabel="probability",
        ylim=(0, 1.08),
    )
    axes.legend(loc="upper left", ncols=2, fontsize=10)
    axes.set_title("Where training ends depends on where the KL is put")
    style.show(
        figure,
        "07_ends.png",
        alt="Bars of three probabilities for four places of the KL: k1 in the reward and k2 in the loss reach π*, k3 in the"
        " loss ends elsewhere, and k1 in the loss puts everything on the best action.",
    )
