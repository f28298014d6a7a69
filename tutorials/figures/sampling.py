"""The figures of tutorial 02."""

import matplotlib

from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, arrow, box, canvas, new, show

MONO = "DejaVu Sans Mono"


def path(tokens, probs, uniform=0.47):
    """From logits to a token: divide, forbid, softmax, and where a random number falls."""
    figure, axes = canvas(height=30)
    steps = (("logits", GREY), ("divide by τ", BLUE), ("forbid tokens\n(top-k, top-p)", ORANGE), ("softmax", PURPLE))
    for i, (text, color) in enumerate(steps):
        box(axes, 1 + 17.6 * i, 21, 14, 6.5, text, color)
        if i:
            arrow(axes, (17.6 * i - 2.6, 24.2), (17.6 * i + 1, 24.2))
    arrow(axes, (61, 21), (61, 14.5))
    left, colors = 2.0, (BLUE, ORANGE, GREEN, PURPLE, GREY)
    for i, (token, prob) in enumerate(zip(tokens, probs, strict=True)):
        width = 66 * prob
        axes.add_patch(matplotlib.patches.Rectangle((left, 9), width, 5, facecolor=PALE[colors[i]], edgecolor=colors[i], lw=1.4))
        axes.text(left + width / 2, 11.5, token, ha="center", va="center", size=11)
        axes.text(left, 7, f"{16 * (left - 2) / 66:.0f}", ha="center", va="center", size=10.5, color="0.35")
        left += width
    axes.text(68, 7, "16", ha="center", va="center", size=10.5, color="0.35")
    axes.text(2, 4.2, "(sixteenths)", ha="left", va="center", size=10.5, color="0.35")
    at = 2 + 66 * uniform
    arrow(axes, (at, 3.2), (at, 9), color=RED)
    axes.text(at, 1.6, f"u = {uniform} falls into “tea”", ha="center", va="center", size=11, color=RED)
    show(figure, "02_path.png", alt="Diagram: logits are divided by the temperature, some tokens are forbidden, softmax gives "
                                    "probabilities, which lie side by side from 0 to 1; a uniform random number picks a piece.")


def shares(rows, polite_in_language):
    """rows: (setting, share of valid sentences, share of polite openings)."""
    figure, axes = new(height=4.6)
    for i, (_, valid, polite) in enumerate(rows):
        axes.barh(i - 0.2, valid, height=0.36, color=BLUE)
        axes.barh(i + 0.2, polite, height=0.36, color=ORANGE)
        axes.text(valid + 0.01, i - 0.2, f"{valid:.0%}", va="center", size=10, color=BLUE)
        axes.text(polite + 0.01, i + 0.2, f"{polite:.0%}", va="center", size=10, color=ORANGE,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(polite_in_language, color=ORANGE, ls="--", lw=1.2, zorder=0)
    axes.text(polite_in_language + 0.01, -0.75, "polite in the language", color=ORANGE, size=10.5, va="center")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set(xlim=(0, 1.1), ylim=(len(rows) - 0.4, -1.1), xlabel="share of the samples")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_title("Truncation removes mistakes, and what is rare")
    axes.legend(handles=[matplotlib.patches.Patch(color=BLUE, label="valid sentence"),
                         matplotlib.patches.Patch(color=ORANGE, label="polite opening")], loc="upper center", ncols=2,
                bbox_to_anchor=(0.45, -0.14))
    show(figure, "02_shares.png", alt="Bars for eight sampling settings: the share of valid sentences rises as more tokens are "
                                      "forbidden, and the share of polite openings falls.")


def choices(written, ranked, kept, k):
    """written: the tokens of a completion; ranked: for each, the best (token, probability) in order; kept: how many top-p keeps."""
    figure, axes = new(height=3.9)
    ranks = len(ranked[0])
    grid = [[ranked[t][rank][1] ** 0.5 for t in range(len(written))] for rank in range(ranks)]
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for t, best in enumerate(ranked):
        for rank, (token, prob) in enumerate(best):
            if prob >= 0.01:
                axes.text(t, rank, token, ha="center", va="center", size=10.5, color="white" if prob > 0.5 else "0.15", family=MONO)
            if token == written[t]:
                axes.add_patch(matplotlib.patches.Rectangle((t - 0.44, rank - 0.42), 0.88, 0.84, fill=False, edgecolor=ORANGE, lw=2.2))
    edges = [t - 0.5 for t in range(len(written) + 1)]
    axes.stairs([n - 0.5 for n in kept], edges, baseline=-0.5, color=RED, lw=2.2, label="kept by top-p 0.9 (above the line)")
    axes.axhline(k - 0.5, color=GREEN, ls="--", lw=2, label=f"kept by top-k {k}")
    axes.set_xticks(range(len(written)), written, family=MONO, size=10.5)
    axes.set_yticks(range(ranks), range(1, ranks + 1))
    axes.tick_params(length=0)
    axes.set(xlabel="the completion that was written, token by token (orange box)", ylabel="rank", ylim=(ranks - 0.5, -0.56))
    axes.set_title(f"top-k keeps {k} tokens where only one is plausible; top-p adapts")
    axes.legend(loc="lower right", fontsize=10)
    show(figure, "02_choices.png", alt="For each token of a sentence, the likeliest tokens by rank: several at the first letter and "
                                       "the ending, one elsewhere; top-p keeps few or many accordingly, top-k always four.")
