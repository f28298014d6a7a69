"""The figures of tutorials 06 (reward models and selection) and 06b (over-optimisation)."""

from tutorials.figures import style

# ------------------------------------------------------------------------------------------------------------------- 06


def read_position():
    """Diagram: three rows of tokens; the reward is read at each row's last token, not at the batch's last position."""
    figure, axes = style.canvas(27)
    rows = [("c a .", 3), ("c .", 2), (".", 1)]
    for i, (letters, last) in enumerate(rows):
        y = 16 - 7.5 * i
        for t, letter in enumerate(["a", *letters.split(), *["pad"] * (3 - last)]):
            color = style.GREY if letter == "pad" else style.GREEN if t else style.PURPLE
            size = 18 if letter == "." else 12
            style.box(axes, 1 + 10 * t, y, 8, 6, letter, style.BLUE if t == last else color, size, lit=letter != "pad")
        axes.text(44, y + 3, f"last token: read at position {last}", color=style.BLUE, va="center")
    axes.add_patch(style.plt.Rectangle((30, 0.2), 10, 22.6, fill=False, edgecolor=style.RED, linestyle="--", linewidth=1.8))
    axes.text(35, 24.7, "last position of the batch", color=style.RED, ha="center", va="center")
    axes.text(5, 24.7, "prompt", color=style.PURPLE, ha="center", va="center")
    style.show(figure, "06_read_position.png", alt="Three rows of tokens of different lengths: the last token of a row is at "
               "position 3, 2 or 1, while the last position of the batch holds padding in the two shorter rows.")


def selection(rewards, panels):
    """Bars: the probability of each range of rewards. rewards (N, K); panels: [(title, closed form (N, K), trained or None)]."""
    figure, axes = style.new(3.1, columns=len(panels), sharey=True)
    edges = [-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25]
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]

    def mass(policy):
        inside = [(rewards > low) & (rewards <= high) for low, high in zip(edges, edges[1:], strict=False)]
        return [(policy * these).sum(1).mean().item() for these in inside]

    for axis, (title, exact, trained) in zip(axes, panels, strict=True):
        axis.bar(middles, mass(exact), 0.42, color=style.PALE[style.BLUE], edgecolor=style.BLUE, label="closed form")
        if trained is not None:
            axis.plot(middles, mass(trained), "o", color=style.ORANGE, label="trained GPT")
        axis.set(title=title, xlabel="reward")
    axes[0].set_ylabel("probability")
    axes[0].set_ylim(0, 1.22 * max(max(mass(exact)) for _, exact, _ in panels))  # room for the legend
    axes[0].legend(*axes[-1].get_legend_handles_labels(), loc="upper left")
    figure.suptitle("Selection moves probability to high rewards")
    style.show(figure, "06_selection.png", alt="Two bar charts of probability over reward: the reference is spread out, best of n "
               "puts nearly everything above a reward of 0.25, and the trained GPT lies close to its bars.")


# ------------------------------------------------------------------------------------------------------------------ 06b


def proxy_diagram():
    """Diagram: what we want is asked once, through comparisons; the policy is optimised for the proxy alone."""
    figure, axes = style.canvas(25)
    style.box(axes, 0.5, 16, 17, 7.5, "gold:\nwhat we want", style.ORANGE)
    style.box(axes, 27, 16, 17, 7.5, "comparisons of\nref's answers", style.GREEN)
    style.box(axes, 53.5, 16, 16, 7.5, "proxy:\nlearned reward", style.BLUE)
    style.box(axes, 53.5, 1, 16, 7.5, "policy", style.PURPLE)
    style.box(axes, 0.5, 1, 17, 7.5, "how good are its\nanswers really?", style.ORANGE)
    style.arrow(axes, (17.5, 19.7), (27, 19.7), "judges", offset=(0, 1.6))
    style.arrow(axes, (44, 19.7), (53.5, 19.7), "fit", offset=(0, 1.6))
    style.arrow(axes, (59, 16), (59, 8.5), "reward", offset=(-4.2, 0))
    style.arrow(axes, (64, 8.5), (64, 16), "answers", offset=(4.4, 0))
    style.arrow(axes, (53.5, 4.7), (17.5, 4.7), "nobody looks during training", offset=(0, 1.6), color=style.RED)
    style.arrow(axes, (9, 16), (9, 8.5))
    style.show(figure, "06b_proxy.png", alt="Gold is used once, to judge comparisons of the reference's answers; a proxy is "
               "fitted to them; the policy is trained in a loop with the proxy only, and nobody compares its answers with gold.")


def reward_per_kl(curves):
    """Lines: mean gold over d = √KL for the two methods. curves: {name: (points, 3) of d, reward, gold}."""
    figure, axes = style.new(3.6)
    looks = {"tilt": (style.BLUE, "-", "tilt: the most that is possible"), "best of n": (style.ORANGE, "o-", "best of n = 1, 2, 4, …")}
    for name, curve in curves.items():
        color, line, label = looks[name]
        axes.plot(curve[:, 0], curve[:, 2], line, color=color, ms=4, label=label)
    axes.set(xlabel="d = √KL from the reference", ylabel="mean reward", title="The tilt is the highest curve, and best-of-n is close")
    axes.legend(loc="lower right")
    style.show(figure, "06b_reward_per_kl.png", alt="Reward against the square root of the KL: the tilt is the highest curve, and "
               "best-of-n lies slightly below it.")


def proxy_and_gold(curves):
    """Lines: proxy and gold gained over the reference, against d, for the tilt and best-of-n."""
    figure, axes = style.new(3.8)
    for (name, curve), color in zip(curves.items(), (style.BLUE, style.ORANGE), strict=True):
        axes.plot(curve[:, 0], curve[:, 1] - curve[0, 1], "--", color=color, label=f"proxy, {name}")
        axes.plot(curve[:, 0], curve[:, 2] - curve[0, 2], "-", color=color, lw=2.4, label=f"gold, {name}")
    axes.axhline(0, color=style.GREY, lw=0.8)
    axes.set(xlabel="d = √KL from the reference", ylabel="gained over the reference", title="The proxy rises all the way, gold falls")
    axes.legend(loc="lower left")
    style.show(figure, "06b_proxy_and_gold.png", alt="Against the square root of the KL both proxy curves rise steadily, while gold rises "
               "a little and then falls far below the reference, for the tilt earlier than for best-of-n.")


def repairs(curves):
    """Lines: gold of the tilt against d, one line for each proxy."""
    figure, axes = style.new(3.8)
    looks = {"one blind model": (style.RED, "-"), "10 × the comparisons": (style.GREY, "-"), "mean of five": (style.BLUE, "--"),
             "asked again": (style.ORANGE, "-"), "one that sees repeats": (style.GREEN, "-")}
    for name, (color, line) in looks.items():
        axes.plot(curves[name][:, 0], curves[name][:, 2], line, color=color, lw=2, label=name)
    axes.set(xlabel="d = √KL from the reference", ylabel="mean gold", title="Only the missing feature repairs the reward")
    axes.legend(loc="lower left")
    style.show(figure, "06b_repairs.png", alt="Gold of the tilt against the square root of the KL for five proxies: four fall far below "
               "the start, three of them on nearly one line, and only the proxy that sees repeats keeps rising.")
