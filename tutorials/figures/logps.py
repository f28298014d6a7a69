"""The figures of tutorial 03."""

import numpy as np

from tutorials.figures import style


def row_cut(prompt, completion):
    """A diagram: one row of tokens, cut into inputs and targets, the mask below, and what is summed. prompt, completion: lists of text."""
    row = prompt + completion
    figure, axes = style.canvas(48)
    size, left, gap = 6.4, 17, 1.1
    places = [left + i * (size + gap) for i in range(len(row))]

    def cell(x, y, text, color, lit=True):
        style.box(axes, x, y, size, size, text, color=color, size=13, lit=lit)

    def label(y, name):
        axes.text(1, y + size / 2, name, ha="left", va="center", size=11.5, weight="bold", color="0.2")

    colors = [style.BLUE] * len(prompt) + [style.ORANGE] * len(completion)
    rows = {"row": 38, "inputs": 27, "targets": 17, "mask": 8}
    for name, y in rows.items():
        label(y, name)
    for i, token in enumerate(row):
        cell(places[i], rows["row"], token, colors[i])
    for t in range(len(row) - 1):
        scored = t >= len(prompt) - 1
        cell(places[t], rows["inputs"], row[t], colors[t])
        cell(places[t], rows["targets"], row[t + 1], colors[t + 1])
        middle = places[t] + size / 2
        style.arrow(axes, (middle, rows["inputs"]), (middle, rows["targets"] + size), color="0.25" if scored else "0.7")
        axes.text(middle, rows["mask"] + size / 2, "1" if scored else "0", ha="center", va="center", size=13,
                  color="black" if scored else "0.6", weight="bold" if scored else "normal")
        if scored:
            style.arrow(axes, (middle, rows["mask"] + 0.6), (middle, 4.6), color=style.ORANGE)
    scored_from = places[len(prompt) - 1]
    right = places[-2] + size
    axes.plot([scored_from, right], [4.2, 4.2], color=style.ORANGE, lw=1.6)
    axes.text((scored_from + right) / 2, 1.8, "sum of these log-probs = log π(y|x)", ha="center", va="center", size=11.5)
    x = right + 2
    axes.text(places[-1] + size + 1.2, rows["row"] + size / 2, "prompt blue,\ncompletion orange", ha="left", va="center", size=9.5)
    axes.text(x, rows["inputs"] + size / 2, "row without its last token", ha="left", va="center", size=9.5)
    axes.text(x, rows["targets"] + size / 2, "row without its first token", ha="left", va="center", size=9.5)
    axes.text(x, rows["mask"] + size / 2, "is the target in the completion?", ha="left", va="center", size=9.5)
    axes.set_title("One row is cut twice; the mask keeps the completion", loc="left")
    style.show(figure, "03_row_cut.png",
               alt="The row a b c d EOS is cut into inputs a b c d and targets b c d EOS; log-probs where the mask is 1 are summed.")


def choices(texts, logps, masks, title):
    """Log-probs of answers, letter by letter. texts: B strings of T characters (the targets); logps, masks: (B, T)."""
    logps, masks = np.asarray(logps), np.asarray(masks, dtype=bool)
    B, T = masks.shape
    figure, axes = style.new(height=2.9)
    heat = axes.imshow(np.where(masks, logps, np.nan), cmap="YlGnBu_r", vmin=-5, vmax=0, aspect="auto")
    for b in range(B):
        first, last = np.flatnonzero(masks[b])[[0, -1]]
        axes.axhspan(b + 0.42, b + 0.58, color="white")
        for t in range(T):
            color = "0.75" if not masks[b, t] else ("white" if logps[b, t] < -2 else "black")
            axes.text(t, b, texts[b][t], ha="center", va="center", family="DejaVu Sans Mono", color=color, size=11)
        axes.add_patch(style.plt.Rectangle((first - 0.5, b - 0.42), last - first + 1, 0.84, fill=False, edgecolor=style.ORANGE, lw=1.3))
        axes.text(T - 0.2, b, f"{logps[b][masks[b]].sum():.1f}".replace("-", "−"), ha="left", va="center", weight="bold")
    start = np.flatnonzero(masks[0])[0]
    for x, text, color, where in ((start / 2 - 0.8, "prompt: not scored", style.GREY, "center"),
                                  (start - 0.5, "completion with its ⏎: scored", style.ORANGE, "left"),
                                  (T - 0.2, "sum", "black", "left")):
        axes.text(x, -0.85, text, ha=where, va="center", color=color, size=10)
    axes.set(xlim=(-0.7, T + 3.2), ylim=(B - 0.4, -1.3), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left")
    bar = figure.colorbar(heat, ax=axes, pad=0.01, fraction=0.025, ticks=[0, -2.5, -5])
    bar.set_label("log-prob of the letter", size=10)
    bar.outline.set_visible(False)
    style.show(figure, "03_choices.png",
               alt="Five answers to the prompt ask for tea, coloured by the log-prob of each letter: few letters of each answer are dark.")
