"""Figures of tutorials 08 (PPO) and 08b (Frozen Lake). Each function takes numbers, draws, and returns nothing."""

import numpy as np

from tutorials.figures import style
from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED

# ------------------------------------------------------------------------------------------------------------------- 08, PPO


def clip(ratios, objectives, slopes, eps):
    """ratios (R,); objectives and slopes {+1: (R,), −1: (R,)}. A curve per sign of A, its three regions coloured by their slope."""
    figure, axes = style.new(3.4, columns=2)
    for axis, sign in zip(axes, (1, -1), strict=True):
        low, high = (0.35, 1.95) if sign > 0 else (-1.95, -0.1)
        edges = (ratios[0], 1 - eps, 1 + eps, ratios[-1])
        for left, right in zip(edges, edges[1:], strict=False):
            middle = int(np.abs(np.asarray(ratios) - (left + right) / 2).argmin())
            moves = abs(slopes[sign][middle]) > 0
            axis.axvspan(left, right, color=PALE[GREEN] if moves else PALE[GREY], lw=0)
            axis.text((left + right) / 2, high - 0.06, "gradient" if moves else "none", ha="center", va="top", size=10,
                      color="0.15")
        axis.plot(ratios, objectives[sign], color=BLUE if sign > 0 else RED, lw=3)
        axis.plot(1, sign, "o", color="0.1", ms=8, zorder=3)
        axis.text(1 + 0.05 * sign, sign - 0.08, "first\nupdate", size=10, va="top", ha="left" if sign > 0 else "right")
        axis.set(xlim=(ratios[0], ratios[-1]), ylim=(low, high), xticks=(0.4, 0.8, 1.2, 1.6), xlabel="ratio ρ",
                 title=f"A = {'+1: better' if sign > 0 else '−1: worse'} than expected")
    axes[0].set_ylabel("objective of one token")
    style.show(figure, "08_clip.png", alt="The clipped objective against the ratio: flat above 1.2 for a positive advantage and below 0.8 "
               "for a negative one, sloped elsewhere.")


def chain(values, rewards, deltas):
    """values, rewards, deltas (3,): the prefixes of a completion with what the critic says, and the error δ of each step."""
    figure, axes = style.canvas(21)
    names = ("prompt", "prompt c", "prompt c a", "prompt c a t")
    for i, name in enumerate(names):
        value = f"v = {values[i]:.1f}" if i < 3 else "end: v = 0"
        style.box(axes, 0.5 + 18.2 * i, 12, 13.5, 7, f"{name}\n{value}", BLUE if i < 3 else GREY)
    for i in range(3):
        style.arrow(axes, (14 + 18.2 * i, 15.5), (18.7 + 18.2 * i, 15.5))
        style.box(axes, 9 + 18.2 * i, 2, 15, 7, f"token {'cat'[i]}: r = {rewards[i]:g}\nδ = {deltas[i]:+.1f}".replace("-", "−"), ORANGE)
        style.arrow(axes, (16.4 + 18.2 * i, 15), (16.4 + 18.2 * i, 9.2))
    style.show(figure, "08_chain.png", alt="Three tokens lead from prefix to prefix; the critic values the prefixes 0.5, 0.4, 0.3, and the "
               "tokens have errors −0.1, −0.1, +0.7.")


def credit(letters, kinds):
    """letters (T,) strings; kinds {name: (advantages (n, T), is the letter right? (n, T))}: mean and scatter at each place."""
    figure, axes = style.new(1.6 * len(kinds) + 0.6, rows=len(kinds), sharex=True, sharey=True)
    places = np.arange(len(letters))
    for axis, (name, (advantages, right)) in zip(axes, kinds.items(), strict=True):
        for rows, color, dash, label in ((right, GREEN, "-", "right letters"), (~right, RED, (0, (3, 1.2)), "wrong letters")):
            mean = np.array([advantages[rows[:, t], t].mean() for t in places])
            scatter = np.array([advantages[rows[:, t], t].std() for t in places])
            axis.fill_between(places, mean - scatter, mean + scatter, color=color, alpha=0.15, lw=0)
            axis.plot(places, mean, color=color, ls=dash, lw=2.2, label=label)
        axis.axhline(0, color="0.3", lw=0.8)
        axis.set_title(name, loc="left", size=11)
        axis.set_ylabel("A")
    axes[-1].set_xticks(places, ["␣" if letter == " " else letter for letter in letters])
    axes[-1].set_xlabel("place in the text")
    axes[0].legend(loc=(0.55, 0.2), ncols=2, fontsize=10)
    figure.suptitle("Advantages of right and wrong letters: mean, and ± one standard deviation", size=12)
    style.show(figure, "08_credit.png", alt="Mean advantages by place. Rewards to go lie far above 0 and rise from left to right, and the "
               "lines of right and wrong letters nearly coincide; with RLOO, or minus a mean, both lines are near 0 with wide bands; with "
               "a critic the bands are narrow and the line of right letters lies above that of wrong ones.")


def _curves(axis, paths, styles):
    for (name, path), (color, dash) in zip(paths.items(), styles, strict=True):
        axis.plot(range(len(path)), path, color=color, ls=dash, lw=2.4, label=name)


def race(paths, ceiling, name, title, alt):
    """paths {label: (rollouts + 1,)}: probability of the right letter; ceiling: that of π*. Four of them."""
    figure, axis = style.new(3.6)
    axis.axhline(ceiling, color=GREY, ls=(0, (4, 3)))
    axis.text(0.3, ceiling + 0.01, "π*, computed", color="0.35", va="bottom")
    _curves(axis, paths, ((BLUE, "-"), (GREEN, (0, (5, 1.2))), (ORANGE, "-"), (PURPLE, (0, (2, 1.2)))))
    axis.set(xlabel="rollouts of 64 texts", ylabel="probability of the right letter", ylim=(0, 1.1), xlim=(0, None), title=title)
    axis.legend(loc="lower right", fontsize=10)
    style.show(figure, name, alt=alt)


# ---------------------------------------------------------------------------------------------------------- 08b, Frozen Lake

STEPS = ((-1, 0), (0, 1), (1, 0), (0, -1))  # left, down, right, up in the coordinates of an image


def lakes(letters, panels, name, alt, digits=2):
    """letters (16,) of S F H G; panels {title: (policy (16, 4) or None, numbers (16,) or None)}, two of them. Drawn from above."""
    figure, axes = style.new(3.6, columns=2)
    for axis, (title, (policy, numbers)) in zip(axes, panels.items(), strict=True):
        lake(axis, letters, policy, numbers, digits)
        axis.set_title(title, size=12)
    style.show(figure, name, alt=alt)


def lake(axis, letters, policy=None, numbers=None, digits=2):
    """One lake: an arrow is as long as its move is likely; numbers in the lower right corners."""
    colors = {"S": PALE[BLUE], "F": "white", "H": PALE[GREY], "G": PALE[GREEN]}
    for state, letter in enumerate(letters):
        y, x = divmod(state, 4)
        axis.add_patch(style.plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colors[letter], edgecolor="0.6"))
        word = {"H": "hole", "G": "gift", "S": "start" if policy is None and numbers is None else ""}.get(letter, "")
        axis.text(x, y - (0.15 if letter in "HG" and numbers is not None else 0), word, ha="center", va="center", size=11,
                  color="0.35" if letter == "H" else "black")
        if policy is not None and letter not in "HG":
            for chance, (dx, dy) in zip(policy[state], STEPS, strict=True):
                if chance > 0.06:
                    axis.arrow(x, y, 0.42 * chance * dx, 0.42 * chance * dy, width=0.02, head_width=0.05 + 0.12 * chance, color=BLUE,
                               length_includes_head=True, lw=0)
        if numbers is not None and not np.isnan(numbers[state]):
            low = policy is not None
            number = f"{round(numbers[state], digits) + 0.0:.{digits}f}".replace("-", "−")
            axis.text(x + (0.46 if low else 0), y + (0.44 if low else 0.15), number,
                      ha="right" if low else "center", va="bottom" if low else "center", size=10, color="0.2")
    axis.set(xlim=(-0.5, 3.5), ylim=(3.5, -0.5), xticks=[], yticks=[], aspect="equal")
    axis.spines[:].set_visible(False)


def slide(name="08b_slide.png"):
    """What one move does on dry and on slippery ice."""
    figure, axes = style.canvas(23)
    for x, title, chances in ((14, "dry ice: the move succeeds", {"right": 1.0}),
                              (50, "slippery ice: it may slide to a side", {"right": 1 / 3, "up": 1 / 3, "down": 1 / 3})):
        style.box(axes, x - 3, 8, 6, 6, "you", BLUE)
        axes.text(x + 2, 21.3, title, ha="center", size=11)
        ends = {"right": ((x + 3.2, 11), (x + 12, 11), (0, 1.6)), "up": ((x, 14.2), (x, 19), (3, 0)), "down": ((x, 7.8), (x, 3), (3, 0))}
        for way, chance in chances.items():
            start, end, offset = ends[way]
            style.arrow(axes, start, end, "1" if chance == 1 else "1/3", color=BLUE, size=11, offset=offset)
    axes.text(32, 0.8, "the policy chose “right” in both", ha="center", size=11, color="0.35")
    style.show(figure, name, alt="On dry ice the move right leads right; on slippery ice it leads right, up or down, each with chance "
               "one third.")
