"""Figures of tutorials 10 and 10b, a meter of memory, and a stand-in for Triton where it is not installed."""

import types

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tutorials.figures import style
from tutorials.figures.style import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED

# ------------------------------------------------------------------------------------------------------ tools of tutorial 10


class Meter(TorchDispatchMode):
    """Sees every torch operation. `peak`: the most bytes alive at once of the tensors made under it, without those `given`."""

    def __init__(self, given):
        super().__init__()
        self.given, self.alive, self.peak = {x.untyped_storage().data_ptr() for x in given}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)):
            if storage.data_ptr() not in self.given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak_bytes(run, *given):
    """The most bytes of tensors alive at once while run(*given) works, without the `given` ones."""
    with Meter(given) as meter:
        run(*given)
    return meter.peak


class Pointer:
    """An address as the stand-in knows it: the numbers of a tensor's memory, and a place in it or a block of places."""

    def __init__(self, memory, place):
        self.memory, self.place = memory, place

    def __add__(self, more):
        return Pointer(self.memory, self.place + more)


def stand_in():
    """(triton, tl) with what the kernels of tutorial 10 use, in plain torch: programs run one after the other."""
    running = []

    def jit(body):
        def launcher(grid):
            def run(*inputs, **constants):
                flat = [Pointer(x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0), x.storage_offset())
                        if torch.is_tensor(x) else x for x in inputs]
                for program in range(grid[0]):
                    running[:] = [torch.tensor(program)]
                    body(*flat, **constants)

            return run

        return type("Kernel", (), {"__getitem__": lambda self, grid: launcher(grid)})()

    def load(at, mask=None, other=0.0):
        if mask is None:
            return at.memory[at.place]
        return torch.where(mask, at.memory[torch.where(mask, at.place, 0)], other)

    def store(at, value, mask=None):
        value = torch.as_tensor(value, dtype=at.memory.dtype)
        if mask is None:
            at.memory[at.place] = value
        else:
            at.memory[at.place[mask]] = value[mask]

    def maximum(a, b):
        return torch.maximum(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32))

    tl = types.SimpleNamespace(
        constexpr=int, int64=torch.int64, float32=torch.float32, program_id=lambda axis: running[0], arange=torch.arange, load=load,
        store=store, maximum=maximum, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp=torch.exp, log=torch.log,
        where=torch.where)
    return types.SimpleNamespace(jit=jit, cdiv=lambda a, b: -(-a // b)), tl


# ---------------------------------------------------------------------------------------------------- figures of tutorial 10


def gpu():
    figure, axes = style.canvas(34)
    axes.add_patch(style.matplotlib.patches.FancyBboxPatch((1, 16), 68, 16.5, boxstyle="round,pad=0,rounding_size=0.8", lw=1.4,
                                                           edgecolor=GREY, facecolor="white"))
    axes.text(35, 30.3, "the chip: programs compute at the same time", ha="center", va="center")
    for x, name in ((3.5, "program 0"), (19.5, "program 1"), (35.5, "program 2")):
        style.box(axes, x, 18, 13.5, 10, f"{name}\nregisters,\non-chip SRAM:\nunder 1 MB", BLUE, 10)
    axes.text(51.8, 23, "…", ha="center", va="center", size=18)
    style.box(axes, 54, 18, 13.5, 10, "program n\nregisters,\non-chip SRAM:\nunder 1 MB", BLUE, 10)
    style.box(axes, 1, 1, 68, 6, "GPU memory (HBM), 80 to 141 GB: weights, hidden states, logits", ORANGE)
    for x in (8, 24, 40, 58.5):
        style.arrow(axes, (x, 7.2), (x, 17.8))
        style.arrow(axes, (x + 4, 17.8), (x + 4, 7.2))
    axes.text(18.1, 11.5, "load", ha="center", va="center")
    axes.text(34.1, 11.5, "store", ha="center", va="center")
    axes.text(51.5, 11.5, "a few TB/s", ha="center", va="center", color=RED)
    style.show(figure, "10_gpu.png", alt="A GPU: a large memory below, a chip with many small programs above; every number that a program "
               "uses is loaded from the memory, and results are stored there.")


def blocks():
    figure, axes = style.canvas(15.5)
    size, left = 4.6, 1.5
    for k in range(14):
        row, color = (0, BLUE) if k < 7 else (1, GREEN)
        axes.add_patch(style.plt.Rectangle((left + k * size, 6), size, size, facecolor=PALE[color], edgecolor="white", lw=2))
        axes.text(left + (k + 0.5) * size, 6 + size / 2, f"{row},{k % 7}", ha="center", va="center", size=11)
    for first, last, name, color in ((0, 4, "block 0", "0.25"), (4, 8, "block 1: its last lane is in row 1", RED)):
        axes.plot([left + first * size + 0.3, left + last * size - 0.3], [11.6, 11.6], color=color, lw=2)
        axes.text(left + first * size + 0.3, 13.2, name, va="center", size=11, color=color)
    axes.text(left + 3.5 * size, 4.4, "row 0 (width 7)", ha="center", color=BLUE)
    axes.text(left + 10.5 * size, 4.4, "row 1", ha="center", color=GREEN)
    axes.text(35, 1.4, "The mask (column < width) turns that lane off.", ha="center", va="center")
    style.show(figure, "10_blocks.png", alt="Two rows of seven numbers side by side in memory; the second block of four lanes begins in "
               "row 0, and its last lane is already in row 1.")


def fold(states):
    """states: (top, total, weighted) at the three stages."""
    figure, axes = style.canvas(25)
    for x, color, title, values in ((1, BLUE, "slice 1", "1     3"), (27, GREY, "top rises by 1", "rescale"), (53, GREEN, "slice 2",
                                                                                                           "4     2")):
        style.box(axes, x, 16, 16, 6, values, color, 13)
        axes.text(x + 8, 23.4, title, ha="center", va="center")
    for x, state in zip((1, 27, 53), states, strict=True):
        style.box(axes, x, 1, 16, 10, "top {:g}\ntotal {:.3f}\nweighted {:.3f}".format(*state), PURPLE)
        style.arrow(axes, (x + 8, 15.8), (x + 8, 11.2))
    style.arrow(axes, (17.2, 6), (26.8, 6))
    style.arrow(axes, (43.2, 6), (52.8, 6))
    style.show(figure, "10_fold.png", alt="Three numbers of the first slice are rescaled when the maximum rises, then the second slice "
               "is added to them.")


def memory(vocabularies, measured, counted):
    """measured, counted: {name: MiB for each vocabulary}."""
    figure, axes = style.new(3.6)
    for (name, dots), color in zip(measured.items(), (RED, BLUE), strict=True):
        axes.plot(vocabularies, counted[name], color=color)
        axes.plot(vocabularies, dots, "o", color=color)
        axes.annotate(name, (vocabularies[3], counted[name][3]), xytext=(-8, 8), textcoords="offset points", ha="right", color=color)
    axes.set(xscale="log", yscale="log", xlabel="vocabulary V", ylabel="MiB alive at the peak")
    axes.set_xticks(vocabularies, vocabularies)
    axes.set_yticks([4, 10, 40, 100], [4, 10, 40, 100])
    axes.minorticks_off()
    axes.set_title("Slices keep the memory low (dots measured, lines counted)", loc="left")
    style.show(figure, "10_memory.png", alt="Peak memory against the vocabulary: with all logits it grows in proportion, with slices "
               "it stays low; measured dots lie on the counted lines.")


# --------------------------------------------------------------------------------------------------- figures of tutorial 10b


def cards(plans, memory, name, title):
    """plans: {name: what minialign.recipes.plan returns}; memory: GiB of a card. Stacked bars."""
    labels = ("weights", "gradients, moments", "reserve, embeddings", "activations, logits")
    colors, heights = (BLUE, ORANGE, GREY, GREEN), []
    for numbers in plans.values():
        stays = numbers["resident"]
        reserve = stays["reserve"] + stays["embeddings and heads, gathered"]
        heights.append([stays["weights"], stays["gradients and moments"], reserve, numbers["phases"]["a micro-batch in training"]])
    if len(plans) == 1:
        figure, axes = style.new(2.1)
        left = 0
        for height, label, color in zip(heights[0], labels, colors, strict=True):
            axes.barh([0], [height], left=left, color=color, height=0.5, label=f"{label}: {height:.0f} GiB")
            left += height
        axes.axvline(memory, color=RED)
        axes.text(memory + 1.5, 0.36, "one card", color=RED)
        axes.set(ylim=(-0.3, 0.6), xlabel="GiB")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, fontsize=11)
    else:
        figure, axes = style.new(4.2)
        for x, bars in enumerate(heights):
            bottom = 0
            for height, label, color in zip(bars, labels, colors, strict=True):
                axes.bar([x], [height], bottom=bottom, color=color, width=0.6, label=label if x == 0 else None)
                bottom += height
            axes.text(x, bottom + 2, f"{bottom:.0f}", ha="center")
        axes.axhline(memory, color=RED)
        axes.text(len(plans) - 0.55, memory + 2, "one card", color=RED, ha="right")
        axes.set_xticks(range(len(plans)), plans, fontsize=10)
        axes.set_ylabel("GiB on each card, by plan")
        axes.legend(loc="upper right", fontsize=11)
    axes.set_title(title, loc="left")
    totals = ", ".join(f"{key.replace(chr(10), '')}: {sum(bars):.0f}" for key, bars in zip(plans, heights, strict=True))
    style.show(figure, name, alt=f"GiB on each card by plan, against the {memory} GiB of an H100: {totals}.")


def layouts():
    figure, axes = style.canvas(37)
    for left, title, parts in ((0, "data parallel: a copy in each", 2), (36, "sharded: a part in each", 1)):
        axes.text(left + 17, 35.5, title, ha="center", va="center", weight="bold")
        for rank in (0, 1):
            x = left + 17.5 * rank
            axes.text(x + 8.2, 32.3, f"process {rank}", ha="center", va="center")
            for k, (what, color) in enumerate((("weights", BLUE), ("gradients", ORANGE), ("moments", PURPLE))):
                y = 26 - 5 * k
                style.box(axes, x + 0.6, y, 15.2, 4, what if parts == 2 else "", color, lit=parts == 2)
                if parts == 1:
                    style.box(axes, x + 0.6 + 7.6 * rank, y, 7.6, 4, f"half {rank + 1}", color, 10)
            style.box(axes, x + 0.6, 6.5, 15.2, 4, f"rows {4 * rank} … {4 * rank + 3}", GREEN)
            style.arrow(axes, (x + 8.2, 10.7), (x + 8.2, 15.8), "backward", offset=(4.6, 0))
    axes.text(17, 2.5, "all_reduce the gradients", ha="center", va="center", color=ORANGE)
    axes.text(53, 2.5, "all_gather the weights,\nall_reduce the gradients", ha="center", va="center", color=BLUE)
    style.show(figure, "10b_layouts.png", alt="Data parallel: each of two processes holds all weights, gradients and moments. Sharded: "
               "each holds half of each. In both, each takes half of the rows.")
