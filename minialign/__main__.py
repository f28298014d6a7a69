"""The entry point: `python -m minialign` lists the commands, `python -m minialign <command> [--flags]` runs one."""

import importlib
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

try:
    from minialign.engine.common import BadInput, figure_path, pick_device, pick_dtype, read_rows
    from minialign.engine.tracking import TIMED
    from minialign.settings import cli, exit_codes
except KeyboardInterrupt:  # importing torch takes seconds
    sys.exit(130)

ROOT = Path(__file__).parent.parent


@dataclass
class SampleConfig:
    policy: str = "builtin"         # a folder, a hub name, or builtin (the base model of the built-in task)
    prompt: list[str] = field(default_factory=lambda: ["ask for tea: "])  # one or more prompts
    n: int = 1                      # completions of each prompt
    max_new: int = 64               # longest completion in tokens
    tau: float = 1.0                # sampling temperature
    top_k: int | None = None        # keep the k most likely tokens
    top_p: float | None = None      # keep the most likely tokens up to this total probability
    greedy: bool = False            # always take the most likely token
    chat: bool = False              # treat each prompt as a user's message and apply the chat template
    seed: int = 0                   # the same seed gives a prompt the same completion, whatever the other prompts are
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16 or float64


def sample_main(cfg):
    """Sample completions from a checkpoint."""
    from minialign.data import encode_answers
    from minialign.engine.opening import builtin_base
    from minialign.lora import load_model
    from minialign.sample import sample

    path = builtin_base() if cfg.policy == "builtin" else cfg.policy
    policy, tokenizer, _ = load_model(path, dtype=pick_dtype(cfg.dtype), device=pick_device(cfg.device))
    if policy.config.head != "lm":
        raise BadInput(f"{path}: is a reward model, which scores completions but cannot sample any; use evaluate --reward")
    prompts = [encode_answers(tokenizer, [{"role": "user", "content": text}] if cfg.chat else text)[0] for text in cfg.prompt]
    rollout = sample(
        policy, prompts, max_new=cfg.max_new, tau=cfg.tau, top_k=cfg.top_k, top_p=cfg.top_p, n=cfg.n, eos_id=tokenizer.eos_id,
        seed=cfg.seed, greedy=cfg.greedy,
    )
    for b, ids in enumerate(rollout.completions):
        logp, end = float(rollout.old_logps[b].sum()), "⏎" if rollout.finished[b] else " …"
        print(f"{cfg.prompt[b // cfg.n]}⟦{tokenizer.decode(ids)}{end}⟧  log π {logp:.2f}, {len(ids)} tokens")


@dataclass
class PlotConfig:
    runs: list[str] = field(default_factory=list)  # run folders, plotted in the same panels
    out: str = ""                   # the PNG; default figures/metrics.png in the first run folder


def plot_main(cfg):
    """Plot metrics.jsonl: a panel for each metric, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not cfg.runs:
        raise BadInput("name one or more run folders: python -m minialign plot RUN ...")
    out = Path(cfg.out or Path(cfg.runs[0]) / "figures" / "metrics.png")
    tables = {run: read_rows(Path(run) / "metrics.jsonl", "step") for run in cfg.runs}
    for run, rows in tables.items():
        for row in rows:
            for name, value in row.items():
                if value is not None and (type(value) not in (int, float) or not abs(value) < 1e300):
                    raise BadInput(f"{run}/metrics.jsonl: {name} of step {row['step']} is not a number that can be plotted")
    for run, rows in tables.items():
        if not rows:
            raise BadInput(f"{run}: has no metrics.jsonl with rows; is it a run folder?")
    figure_path("--out", out)
    names = dict.fromkeys(name for rows in tables.values() for row in rows for name in row)
    names = [name for name in names if name not in ("step", "skipped", *TIMED)]
    if not names:
        raise BadInput(f"{cfg.runs[0]}: all of its steps were skipped, so there is no metric to plot")
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.6 * lines), squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for name, axis in zip(names, axes.flat, strict=False):
        for run, rows in tables.items():
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=Path(run).name, marker="." if len(points) < 20 else None) if points else None
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    if len(tables) > 1:
        axes.flat[0].legend(fontsize=7)
    figure.savefig(out, dpi=130)
    plt.close(figure)
    print(f"figure: {out}   (what each metric means: docs/METRICS.md)")


@dataclass
class ShowConfig:
    runs: list[str] = field(default_factory=list)  # one run folder
    last: int = 0                   # print only this many rows, the last ones; 0 = all


def show_main(cfg):
    """Print samples.jsonl: the policy's answers during training."""
    if len(cfg.runs) != 1:
        raise BadInput("name one run folder: python -m minialign show RUN")
    if cfg.last < 0:
        raise BadInput(f"--last {cfg.last}: must be at least 0")
    rows = read_rows(Path(cfg.runs[0]) / "samples.jsonl", "step")
    if not rows:
        raise BadInput(f"{cfg.runs[0]}: has no samples.jsonl with rows; is it a run folder of a policy?")
    if any(not {"prompt", "completion", "finished"} <= row.keys() for row in rows):
        raise BadInput(f"{cfg.runs[0]}/samples.jsonl: a row lacks prompt, completion or finished, so a run did not write it")
    step = None
    for row in rows[-cfg.last :]:
        if row["step"] != step:
            step = row["step"]
            print(f"── step {step} " + "─" * 60)
        print(f"{row['prompt']}⟦{row['completion']}{'⏎' if row['finished'] else ' …'}⟧")


def title(path):
    """The first line of a module's docstring, or the title of a tutorial."""
    line = path.read_text(encoding="utf-8").removeprefix("# %% [markdown]\n").removeprefix('"""').splitlines()[0]
    return line.removeprefix("# # ").removesuffix('"""')


def names_in(folder):
    return sorted(path.stem for path in (ROOT / folder).glob("[!_]*.py"))


COMMANDS = {
    "demo": "verify the toy and align a tiny GPT from demonstrations: one table and one figure",
    "stories260K": "fetch a published model of 260,032 weights that writes children's stories",
    "sample": "sample completions from a checkpoint",
    "generate": "write scored completions to a file: all, the best, demonstrations of a known expert, or preference pairs",
    "evaluate": "compare checkpoints on held-out preference pairs",
    "microscope": "show on a page what a loss does to each token",
    "plot": "plot a run's metrics.jsonl",
    "show": "print a run's samples.jsonl: the policy's answers during training",
}


def overview():
    print("minialign: every alignment loss in one readable file, each checked against its own fixed point\n")
    print("methods     python -m minialign <method> [--flags]; without flags: the built-in task, under a minute; --help lists the flags")
    for name in names_in("minialign/methods"):
        print(f"  {name:20} {title(ROOT / 'minialign/methods' / f'{name}.py').split('. ')[0].rstrip('.')}")
    print("\ncommands    python -m minialign <command> [--flags]")
    for name, line in COMMANDS.items():
        print(f"  {name:20} {line}")
    print("\nrecipes     python -m minialign recipes lists the papers' experiments at full size")
    print("\ntoys        python -m toy.<name>; each prints PASS or FAIL per fixed point; a FAIL gives exit code 1; python -m toy runs all")
    for name in names_in("toy"):
        if name != "plot" and '__name__ == "__main__"' in (ROOT / "toy" / f"{name}.py").read_text(encoding="utf-8"):
            print(f"  {name:20} {title(ROOT / 'toy' / f'{name}.py')}")
    print("\ntutorials   python tutorials/<name>.py, or open it as cells")
    for path in sorted((ROOT / "tutorials").glob("[0-9]*.py")):
        print(f"  {path.stem:20} {title(path)}")


def recipes():
    print("recipes     torchrun --nproc_per_node GPUS -m minialign.recipes.<name> [--flags]; try --plan CARD or --smoke first\n")
    chains = [name for name in names_in("minialign/recipes") if name.startswith("chain_")]
    for name in names_in("minialign/recipes"):
        if name not in chains:
            print(f"  {name:28} {title(ROOT / 'minialign/recipes' / f'{name}.py')}")
    print("\nchains      python -m minialign.recipes.<name> [--plan CARD | --smoke]; several recipes, each from what the one before made\n")
    for name in chains:
        print(f"  {name:28} {title(ROOT / 'minialign/recipes' / f'{name}.py')}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv  # None: from the installed command `minialign`
    if not argv or argv[0] in ("-h", "--help", "list"):
        overview()
        return
    if argv == ["recipes"]:
        recipes()
        return
    command, rest = argv[0], argv[1:]
    methods = names_in("minialign/methods")
    own = {"sample": (SampleConfig, sample_main), "plot": (PlotConfig, plot_main), "show": (ShowConfig, show_main)}
    with exit_codes(f"minialign {command}"):
        if command == "microscope":  # its flags are those of the methods that it looks at
            importlib.import_module("minialign.microscope").main(rest)
            return
        if command in own:
            config, action = own[command]
            description = action.__doc__
        elif command in methods or command in COMMANDS:
            module = importlib.import_module(f"minialign.methods.{command}" if command in methods else f"minialign.{command}")
            config, action, description = module.Config, module.main, module.__doc__
        else:
            near = get_close_matches(command, [*methods, *COMMANDS], n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise BadInput(f"unknown command {command}{hint} (`python -m minialign` lists them)")
        if command in ("plot", "show"):  # run folders may be given without --runs
            bare = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
            rest = (["--runs", *rest[:bare]] if bare else []) + rest[bare:]
        action(cli(config, rest, prog=f"python -m minialign {command}", description=description))


if __name__ == "__main__":
    main()
