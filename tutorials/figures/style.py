"""How the figures of the tutorials look, and how they are shown: in a notebook below the cell, from a script as a file."""

import io
import sys
from pathlib import Path

import matplotlib

IN_NOTEBOOK = "ipykernel" in sys.modules
if not IN_NOTEBOOK:
    matplotlib.use("Agg")  # a script draws into a file: no window, no screen

import matplotlib.pyplot as plt

WIDTH = 7.0  # inches: 700 px at 100 dpi, the width of a notebook's page
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6fb0", "#d9822b", "#3a8f5c", "#c0392b", "#7d5ba6", "#8a8f98"
PALE = {BLUE: "#dbe8f5", ORANGE: "#fbe7d0", GREEN: "#d9eee1", RED: "#f6dcd8", PURPLE: "#e8e0f1", GREY: "#ebedf0"}

plt.rcParams.update({
    "font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.dpi": 100, "savefig.dpi": 130, "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, GREY]),
})


def new(height=3.2, columns=1, rows=1, **settings):
    """(figure, axes) as wide as a page."""
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **settings)


def show(figure, name, alt):
    """Show the figure. alt: one sentence that says what is to be seen, for readers who cannot see it."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plt.close(figure)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(data.getvalue(), alt=alt))
        return
    folder = Path("runs/tutorials")  # below the folder it runs in
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data.getvalue())
    print(f"figure: {folder / name}")


def canvas(height, width=70.0):
    """(figure, axes) for a diagram: x from 0 to `width`, y from 0 upwards in the same unit, nothing drawn yet."""
    figure, axes = plt.subplots(figsize=(WIDTH, WIDTH * height / width), layout="constrained")
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, color=BLUE, size=11, lit=True):
    """A rounded box with text, its lower left corner at (x, y). lit=False draws it grey."""
    color = color if lit else GREY
    axes.add_patch(matplotlib.patches.FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", lw=1.4,
                                                      edgecolor=color, facecolor=PALE[color] if lit else "white"))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color="black" if lit else GREY)


def arrow(axes, start, end, text="", color="0.25", size=10, bend=0.0, offset=(0, 0)):
    """An arrow from (x, y) to (x, y), with text beside its middle."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 2, "shrinkB": 2,
                                                         "connectionstyle": f"arc3,rad={bend}"})
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        axes.text(x, y, text, ha="center", va="center", size=size, color=color)
