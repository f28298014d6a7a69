"""The figure of tutorial 00: the pipeline of alignment, with the numbers of the tutorials."""

from tutorials.figures import style
from tutorials.figures.style import BLUE, GREEN, ORANGE, PURPLE, arrow, box


def pipeline(name, alt):
    figure, axes = style.canvas(37.6)
    box(axes, 1, 15, 13, 7, "base model\n(reference)", BLUE)
    box(axes, 28, 15, 13, 7, "policy", BLUE, size=13)
    box(axes, 1, 28, 17, 6.5, "demonstrations\nfrom an expert", GREEN)
    box(axes, 27, 28, 15, 6.5, "preferences\na is better than b", ORANGE)
    box(axes, 55, 15, 14, 7, "reward", PURPLE, size=13)
    box(axes, 27, 1.5, 15, 6.5, "completions\nof the policy", BLUE)
    arrow(axes, (14, 20), (28, 20), "start", offset=(0, 1.3))
    arrow(axes, (12, 28), (28.5, 21.5), "imitate\n04, 04b", offset=(-5.5, -0.8))
    arrow(axes, (18, 32.8), (56.5, 22.3), "learn a reward from\ndemonstrations: 05, 05b", bend=-0.42, offset=(20, 5.6))
    arrow(axes, (34.5, 28), (34.5, 22), "09 to 09c", offset=(4, 0))
    arrow(axes, (42, 29.5), (58, 22.2), "06", offset=(-1, -1.4))
    arrow(axes, (31.5, 15), (31.5, 8), "sample\n02, 03", offset=(-5, 0))
    arrow(axes, (42, 4.5), (60, 14.8), "score", bend=0.25, offset=(6, -1.5))
    arrow(axes, (55, 18.5), (41, 18.5), "train on it:\n06, 07, 08", offset=(0, 2.2))
    arrow(axes, (14, 17), (28, 17), "stay near\n(KL): 05", offset=(0, -2.3))
    style.show(figure, name, alt)
