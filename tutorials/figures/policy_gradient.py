"""The figures of tutorials 07 and 07b: one-sample gradients as arrows, learning curves, noise; where the KL is put and ends."""

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
        for y, (right, up) in enumerate(plane.T):  # the directions in which one logit grows
            axes.plot([0, 1.5 * right], [0, 1.5 * up], ":", color=style.GREY, lw=1)
            place = (1.68 * right, 1.75 * up) if y < 2 else (-0.25, 0.8)
            axes.text(*place, f"logit {y}", color=style.GREY, size=9, ha="center", va="center")
        for y, ((right, up), color) in enumerate(zip(estimates, names, strict=True)):
            arrow = {"arrowstyle": "-|>", "color": color, "lw": 1 + 4 * pi[y], "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=(right, up), xytext=(0, 0), arrowprops=arrow)
            label = f"y = {y}" + (": zero" if not estimates[y].any() else "")
            if not estimates[y].any():
                place = (0.75, 0.5)
            elif np.hypot(right, up) < 0.2:
                place = (0.5, 0.2)
            else:
                place = (right - 0.4, up) if up < 0 else (right - (0.1 if right < 0 else 0), up + 0.2)
            axes.text(
                *place,
                label,
                color=color,
                ha="center",
                va="center",
            )
        axes.annotate(
            "", xy=mean, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 2.5, "shrinkA": 0, "shrinkB": 0}
        )
        axes.plot(*mean, "o", color="black", ms=4)
        axes.set(xlim=(-1.5, 1.5), ylim=(-1.25, 2.3), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"b = {b:g}" + (" (no baseline)" if b == 0 else " (the mean reward)"))
        axes.spines[["left", "bottom"]].set_visible(False)
    figure.suptitle("A baseline changes the single gradients, not their mean (black)", size=12)
    figure.supxlabel("dotted: where one logit grows. Each gradient sums to 0, so all lie in this plane.", size=10)
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
    axes.set(xlabel="turn of the loop", ylabel="marks for manners", ylim=(1.5, 5.4))
    axes.set_title("Same loop: the baseline decides how fast it learns")
    axes.legend(loc="lower right")
    style.show(
        figure,
        "07_curves.png",
        alt="Learning curves of four methods: no baseline rises slowest and stays lowest, the running mean is faster, leave"
        " one out and GRPO are fastest.",
    )


def noise(rows):
    """rows {(name, height): noise}: horizontal bars, a panel for prompts that differ by 2 and one for prompts with the same mean."""
    names = [name for name, height in rows if height == 0]
    figure, panels = style.new(3.4, columns=2, sharey=True)
    for axes, height, title in zip(panels, (2, 0), ("prompts differ by 2", "same mean reward"), strict=True):
        longest = max(rows[name, height] for name in names)
        for y, name in enumerate(names):
            color = next(COLORS[full] for full in COLORS if name.split(",")[0] in full)
            axes.barh(y, rows[name, height], 0.65, color=color)
            axes.text(rows[name, height] + 0.02 * longest, y, f"{rows[name, height]:.2f}", va="center", size=10)
        axes.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.2 * longest), title=title)
    panels[0].invert_yaxis()
    figure.supxlabel("squared noise / squared length of the mean gradient (each panel has its own scale)", size=11)
    style.show(
        figure,
        "07_noise.png",
        alt="Bars of the relative noise in two panels. If prompts differ by 2, no baseline is the noisiest, then the running mean, and"
        " groups are the least noisy. If prompts have the same mean, the running mean is the least noisy.",
    )


def places():
    """The two places of the KL: from a sample to the log-ratio d, and from there into the reward or into the loss."""
    figure, axes = style.canvas(23, width=72)
    axes.set_xlim(-0.5, 71.5)
    style.box(axes, 0, 8.5, 10, 6, "sample\ny ~ π", style.BLUE)
    style.box(axes, 15, 8.5, 17, 6, "log-ratio d =\nlog π(y) − log ref(y)", style.BLUE, size=10)
    style.box(axes, 41, 15, 30, 7, "in the reward, a number\nA from r − β d; loss: −A · log π(y)", style.GREEN)
    style.box(axes, 41, 1, 30, 7, "in the loss, differentiated\nA from r; loss: −A · log π(y) + β k(d)", style.ORANGE)
    style.arrow(axes, (10, 11.5), (15, 11.5))
    style.arrow(axes, (32, 12.5), (41, 18.5), "detach", offset=(-2.6, 1.2))
    style.arrow(axes, (32, 10.5), (41, 4.5), "with gradient", offset=(-5, -1.2))
    style.show(
        figure,
        "07b_places.png",
        alt="A sample gives a log-ratio d. One arrow leads to the reward, where d is a number; another leads to the loss, where d is"
        " differentiated.",
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
        "07b_ends.png",
        alt="Bars of three probabilities for four places of the KL: k1 in the reward and k2 in the loss reach π*, k3 in the"
        " loss ends elsewhere, and k1 in the loss puts everything on the best action.",
    )
