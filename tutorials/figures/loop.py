"""The loop of reinforcement learning from a reward, with some of its boxes lit. Tutorials 06 to 08 open with it."""

from tutorials.figures import style

BOXES = {  # name: (x, y, width, text, colour)
    "prompts": (0, 23, 11, "prompts\nx", style.GREEN),
    "policy": (18.5, 23, 12, "policy\nπ(y|x)", style.BLUE),
    "completions": (39, 23, 14, "completions\ny", style.GREEN),
    "reward": (59, 23, 11, "reward\nr(x, y)", style.ORANGE),
    "reference": (39, 11.5, 14, "reference\nref(y|x)", style.GREY),
    "update": (18.5, 0.5, 51.5, "update: make completions likelier if {} is high", style.PURPLE),
}
HEIGHT = {"update": 5}  # the other boxes are 6.5 high


def rlhf_loop(lit, name, alt):
    """Draw the loop prompts → policy → completions → reward, reference → update → policy. lit: the names of the boxes to colour."""
    unknown = set(lit) - set(BOXES)
    if unknown:
        raise ValueError(f"no such box: {sorted(unknown)}; the boxes are {list(BOXES)}")
    figure, axes = style.canvas(30.5, width=71)  # half a unit of room on each side
    axes.set_xlim(-0.5, 70.5)
    for box, (x, y, width, text, color) in BOXES.items():
        color = style.BLUE if color == style.GREY else color
        text = text.format("r − β log(π/ref)" if "reference" in lit else "r")
        style.box(axes, x, y, width, HEIGHT.get(box, 6.5), text, color, lit=box in lit)
    style.arrow(axes, (11, 26.2), (18.5, 26.2))
    style.arrow(axes, (30.5, 26.2), (39, 26.2), "sample", offset=(0, 1.4))
    style.arrow(axes, (53, 26.2), (59, 26.2))
    style.arrow(axes, (46, 23), (46, 18))
    style.arrow(axes, (46, 11.5), (46, 5.5), "log(π/ref)", offset=(5.2, 0))
    style.arrow(axes, (64.5, 23), (64.5, 5.5), "r", offset=(1.4, -5.75))
    style.arrow(axes, (24.5, 5.5), (24.5, 23), "new\nweights", offset=(-4.2, 0))
    style.show(figure, name, alt)
