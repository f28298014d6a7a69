"""The figures of tutorials 04 (supervised fine-tuning) and 04b (intuitive fine-tuning)."""

import numpy as np

from tutorials.figures import style
from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED


def loop():
    """A diagram of one step of SFT."""
    figure, axes = style.canvas(30)
    y, height = 16, 9
    style.box(axes, 1, y, 13, height, "people\nwrite\n(E)", GREY)
    style.box(axes, 20, y, 14, height, "demonstration\nprompt x,\nanswer y", ORANGE, size=10.5)
    style.box(axes, 40, y, 11, height, "policy π", BLUE)
    style.box(axes, 57, y, 12, height, "log-probs\nof y", BLUE)
    middle = y + height / 2
    for start, end in ((14, 20), (34, 40), (51, 57)):
        style.arrow(axes, (start, middle), (end, middle))
    style.box(axes, 54, 2, 15, 7.5, "loss = −mean", RED)
    style.arrow(axes, (63, y), (63, 9.5))
    style.arrow(axes, (54, 5.7), (45.5, 16), color=RED, bend=-0.35)
    axes.text(35.5, 6.2, "the gradient step makes\nthe demonstration likelier", ha="center", va="center", size=10.5, color=RED)
    axes.text(27, 13.4, "a fixed file", ha="center", size=10, color="0.35")
    axes.set_title("SFT: the policy never writes, it is only asked how likely the demonstrations are", loc="left", fontsize=11.5)
    style.show(figure, "04_loop.png", alt="People write demonstrations, the policy gives their log-probs, the loss makes them likelier.")


def losses(steps, train, true, entropy, best):
    """The training loss and the expected loss over optimizer steps. best: an index into steps."""
    figure, axes = style.new(height=3.5)
    axes.fill_between(steps, entropy, true, color=PALE[RED], lw=0)
    axes.plot(steps, true, color=RED, lw=2.2)
    axes.plot(steps, train, color=BLUE, lw=2.2)
    axes.axhline(entropy, color="0.2", lw=1.1, ls=(0, (4, 3)))
    axes.plot(steps[best], true[best], "o", color=RED, ms=7, zorder=3)
    axes.annotate(f"best policy, step {steps[best]}", (steps[best], true[best]), (steps[best] + 0.02 * steps[-1], true[best] + 0.4),
                  arrowprops={"arrowstyle": "-", "color": "0.2", "lw": 0.8, "shrinkB": 4})
    axes.text(steps[-1], true[-1] + 0.15, "demonstrations that could have been drawn", color=RED, ha="right", va="bottom")
    axes.text(steps[-1], train[-1] - 0.12, "the 200 training demonstrations", color=BLUE, ha="right", va="top")
    axes.text(steps[-1] * 0.97, (entropy + true[-1]) / 2, "KL(E‖π)", color=RED, ha="right", va="center")
    axes.text(steps[-1] * 0.985, entropy + 0.04, "entropy H(E): no policy can be lower here", ha="right", va="bottom", size=10)
    axes.set(xlabel="optimizer steps", ylabel="loss, nats per answer", xlim=(0, steps[-1]),
             ylim=(min(train) - 0.55, max(true[1:] + train[:1]) + 0.7))
    axes.set_title("The training loss keeps falling, the loss on new demonstrations does not", loc="left")
    style.show(figure, "04_losses.png",
               alt="The training loss falls below the entropy; the loss on new demonstrations falls, then rises.")


def mass(steps, shown, unshown, share):
    """Where the probability is over optimizer steps. share: E's probability of the answers that were shown."""
    figure, axes = style.new(height=3.3)
    other = [1 - a - b for a, b in zip(shown, unshown, strict=True)]
    axes.stackplot(steps, shown, unshown, other, colors=[BLUE, PALE[BLUE], PALE[GREY]], edgecolor="white", linewidth=0.8)
    axes.axhline(share, color="0.1", lw=1.1, ls=(0, (4, 3)))
    axes.text(steps[-1] * 0.98, share - 0.02, f"probability of the shown answers under E: {share:.2f}", color="white", ha="right", va="top",
              size=10)
    axes.text(steps[-1] * 0.98, 0.08, "answers that were shown for this prompt", color="white", ha="right", weight="bold")
    axes.text(steps[-1] * 0.35, 0.62, "requests of the language\nthat were not shown", ha="center", va="center", weight="bold")
    axes.text(steps[-1] * 0.35, 0.955, "any other text", ha="center", va="center", size=10)
    axes.set(xlabel="optimizer steps", ylabel="probability", xlim=(0, steps[-1]), ylim=(0, 1))
    axes.set_title("Probability moves to the demonstrations, also from good answers", loc="left")
    style.show(figure, "04_mass.png", alt="The probability of the shown answers grows far beyond their share under E.")


def how_many(curves):
    """{number of demonstrations: (steps, KL)}."""
    figure, axes = style.new(height=3.2)
    for (n, (steps, kl)), color in zip(curves.items(), (RED, ORANGE, GREEN, BLUE), strict=False):
        axes.plot(steps, kl, "o-", color=color, lw=2, ms=4)
        axes.text(steps[-1] * 1.015, kl[-1], f"{n}", color=color, va="center", weight="bold")
    last = max(steps[-1] for steps, _ in curves.values())
    axes.set(xlabel="optimizer steps", ylabel="KL(E‖π), nats", xlim=(0, last * 1.1), yscale="log")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], labels=["0.1", "0.2", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.set_title("With more demonstrations the policy comes nearer to E and overfits later", loc="left")
    style.show(figure, "04_how_many.png", alt="KL against steps: with few demonstrations it soon rises, with many it stays low.")


def mixed_inputs(shown, guesses):
    """A diagram of IFT's inputs. shown, guesses: equally many letters, as text."""
    figure, axes = style.canvas(33)
    size, gap, left = 5, 0.9, 20
    for y, name, color in ((24, "demonstration", ORANGE), (14, "policy's guess", BLUE)):
        axes.text(1, y + size / 2, name, ha="left", va="center", weight="bold", color="0.2")
        for i, token in enumerate(shown if y == 24 else guesses):
            lit = y == 24 or guesses[i] != shown[i]
            style.box(axes, left + i * (size + gap), y, size, size, token, color, size=12, lit=lit)
    axes.text(1, 3 + size / 2, "input embedding", ha="left", va="center", weight="bold", color="0.2")
    for i in range(len(shown)):
        x = left + i * (size + gap)
        low = 0.25 if guesses[i] != shown[i] else 0
        style.box(axes, x, 3, size, size, "", PURPLE)
        inner = size - 0.7
        axes.add_patch(style.plt.Rectangle((x + 0.35, 3.35), inner, inner * low, color=BLUE, lw=0))
        axes.add_patch(style.plt.Rectangle((x + 0.35, 3.35 + inner * low), inner, inner * (1 - low), color=PALE[ORANGE], lw=0))
        style.arrow(axes, (x + size / 2, 14), (x + size / 2, 3 + size), color="0.4")
    axes.text(left, 0.9, "orange: share 1 − mix of the shown letter;  blue: share mix of the guess", ha="left", va="center", size=10)
    axes.set_title("IFT reads the demonstration with some of its own guesses mixed in", loc="left")
    style.show(figure, "04b_inputs.png", alt="Each input embedding of IFT is mostly the shown letter, with a share of the guessed one.")


def weights(loss, weight):
    """Bars: the losses of a few tokens, and the weights that IFT gives them."""
    figure, (left, right) = style.new(height=2.6, columns=2)
    places = np.arange(1, len(loss) + 1)
    for axes, numbers, color, title in ((left, loss, GREY, "loss of each token"), (right, weight, PURPLE, "weight of each token in IFT")):
        bars = axes.bar(places, numbers, color=color, width=0.6)
        axes.bar_label(bars, [f"{number:.2f}" for number in numbers], padding=2, size=10)
        axes.set(xticks=places, xlabel="token of the completion", ylim=(0, max(numbers) * 1.2))
        axes.set_title(title, loc="left")
    right.axhline(1, color="0.2", lw=1, ls=(0, (4, 3)))
    style.show(figure, "04b_weights.png", alt="Token losses 1, 2, 0.5 and 4, and IFT's weights, which fall from first to last.")


def ends(discounts, formula, special, expert):
    """π(A) at the end of IFT against the discount. special: π(A) with all weights 1, which the released code uses at discount 0."""
    figure, axes = style.new(height=3.1)
    axes.plot(discounts, formula, color=PURPLE, lw=2.4)
    axes.plot(0, formula[0], "o", color=PURPLE, ms=7, clip_on=False, zorder=3)
    axes.plot(0, special, "s", color=RED, ms=8, clip_on=False, zorder=3)
    axes.axhline(expert, color=ORANGE, lw=2, ls=(0, (4, 3)))
    axes.text(0.03, special, f"{special:.4f}: no weights at all (the code's γ = 0)", color=RED, va="center")
    axes.text(0.05, formula[0] + 0.009, f"{formula[0]:.4f}: the formula at γ = 0", color=PURPLE, va="center")
    axes.text(0.98, formula[-1] + 0.008, "IFT", color=PURPLE, ha="right", va="bottom", weight="bold")
    axes.text(0.98, expert + 0.005, "E, and SFT", color=ORANGE, ha="right", va="bottom", weight="bold")
    axes.set(xlabel="discount γ", ylabel="π(A) after training", xlim=(0, 1), ylim=(expert - 0.02, special + 0.02))
    axes.set_title("IFT ends above the expert's 0.5 for every discount", loc="left")
    style.show(figure, "04b_ends.png", alt="The probability of A after IFT lies above the expert's one half for every discount.")
