"""The three actions inside a model that writes English: ten methods align stories260K, and counting holds each to its closed form.

The reward (heroes.py) has three values: the hero of a story is a girl or nobody (0), a boy (1) or an animal (2). If a method's fixed
point is ref·f(r)/Z for some function f, two things hold, whatever the model is:

    the shares of the three classes of stories obey the closed form of three actions: P(r) ∝ P_ref(r)·f(r), from closed_form.py;
    within a class nothing changes: π(y | r) = ref(y | r). So the KL from ref is what these shares need (evaluate.needed_kl), no more.

ref's shares are counted once. An expert ∝ ref·e^{r/β} is sampled exactly (`generate --keep tilt:β`), and SFT, IRFT, RFT and IRL see
nothing but its demonstrations. Each method runs by its own command, as many at a time as there are cores. Of every policy you see the
shares, the KL from ref that was paid, what of it the rewards needed and what was wasted, and a story.

    python -m minialign stories260K                                # first: 1 MB from the hub, into runs/stories260K
    python -m toy.storyteller                                      # one seed of eight methods, a figure; exit 1 if one misses its law
    python -m toy.storyteller --methods ppo irl                    # only these
    python -m toy.storyteller --full                               # all ten, five seeds, the papers' claims, and RLOO with β → 0

A gate bounds the distance of any share from its law. It follows from the floors. A method's floor is its distance from the law after four
times the updates at half the learning rate, from four times the data (`--longer 4 --samples 16384 --seed 100`; docs/RESULTS.md). Errors of
sampling fall with the root of the data, so a run as printed may be twice as far. Counting 4,096 stories adds at most .015 (95 %). So the
gate is √((2 · largest floor)² + .015²), rounded up to .05. The largest floor, .021, serves all methods, because each was measured once and
is noisy itself. A law with β twice or half as large is outside the gate (tests).

IRL has no gate: single seeds end up to .1 away, on either side of its law. GRPO's KL acts token by token, so its law is of another kind;
needed and wasted are printed alone.

Checked by tests/toy/test_storyteller.py.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minialign.batch import collate
from minialign.data import encode_prompt
from minialign.engine.common import BadInput, find_folder
from minialign.evaluate import mean_interval, needed_kl, share_interval
from minialign.lora import load_model
from minialign.methods import rloo
from minialign.rewards import score
from minialign.sample import rollout, sample
from minialign.settings import cli, exit_codes
from toy import closed_form
from toy.heroes import CLASSES, hero
from toy.report import Report

PROMPT = "Once upon a time, there was a little"
REWARD = f"{Path(__file__).parent / 'heroes.py'}:hero"
LEVELS = np.arange(3.0)  # the rewards of the three classes


@dataclass
class Config:
    policy: str = "runs/stories260K"  # the model to align: the folder that `python -m minialign stories260K` writes
    methods: list[str] = field(default_factory=list)  # some of the methods; default: all but ppo and irl
    beta: float = 1.25              # β of the expert ∝ ref·e^{r/β} and of the methods that are given the reward
    max_new: int = 8                # tokens of a story that are trained on and judged: the hero and a few words more
    samples: int = 4096             # stories from which a policy's shares are counted; ref has 8 times as many, with --full 32 times
    seed: int = 0                   # the first seed
    longer: int = 1                 # this times the updates and the data, at a learning rate divided by its square root
    full: bool = False              # all methods, five seeds, verdicts on claims, and over-optimisation
    out: str = "runs/storyteller.png"  # path of the figure


@dataclass
class Row:
    name: str
    method: str
    flags: str           # of `python -m minialign METHOD`; {beta} is the toy's
    law: callable        # (ref's shares, the expert's shares, β) -> the shares it must converge to; None if its law is not of this kind
    reads: str           # prompts, demos or pairs
    learns: callable = None  # β -> the mean reward in each class that it must learn, up to a constant
    floor: float = 0.0   # how far from its law it is with --longer 4
    gate: float = 0.05   # what is allowed; 0 = none
    quick: bool = True   # False: only with --full or by name


def tilted(ref, expert, beta):
    return closed_form.tilt(ref, LEVELS, beta)


def of_expert(ref, expert, beta):
    return expert


ROWS = [
    Row("SFT", "sft", "--batch_size 64 --steps 220 --lr 4e-4", of_expert, "demos", floor=0.005),
    Row("IRFT", "irft", "--beta .8 --ref initial --rounds 80 --batch_size 128 --steps 80 --lr 2e-4",
        lambda ref, expert, beta: closed_form.geometric_mixture(expert, ref, 0.8), "demos", floor=0.020),
    Row("RFT", "rft", "--beta {beta} --loss bt --bound 0 --batch_size 128 --group_size 128 --reward_share .68 --reward_lr 2e-3 --steps 340 "
        "--lr 2e-4",
        lambda ref, expert, beta: closed_form.converged_round(expert, ref, ref, beta), "demos", lambda beta: LEVELS / beta,
        floor=0.008),
    Row("IRL", "irl", "--beta {beta} --mode accumulate --bound 0 --rounds 20 --batch_size 64 --group_size 64 --steps 240 --lr 2e-4",
        of_expert, "demos", lambda beta: LEVELS, gate=0, quick=False),  # single seeds end on either side of its law
    Row("DPO", "dpo", "--beta {beta} --batch_size 256 --steps 64 --lr 1e-4", tilted, "pairs", floor=0.021),
    Row("best of 4", "best_of_n", "--n 4 --batch_size 64 --steps 180 --lr 4e-4",
        lambda ref, expert, beta: closed_form.best_of_n_law(ref, LEVELS, 4), "prompts", floor=0.012),
    Row("RLOO", "rloo", "--beta {beta} --batch_size 128 --group_size 128 --steps 100 --lr 2e-4", tilted, "prompts", floor=0.009),
    Row("PPO", "ppo", "--beta {beta} --batch_size 128 --epochs 2 --steps 50 --lr 1.5e-4 --no-whiten --lam 1", tilted, "prompts",
        floor=0.012, quick=False),
    Row("REBEL", "rebel", "--beta {beta} --eta .4 --batch_size 256 --steps 25 --lr 1e-4", tilted, "prompts", floor=0.008),
    Row("GRPO", "grpo", "--beta {beta} --batch_size 128 --group_size 128 --steps 60 --lr 2e-4", None, "prompts"),
]
PUSHED = (1.25, 0.5, 0.2, 0.1, 0.0)  # β of RLOO's over-optimisation


# ------------------------------------------------------------------------------------------------- commands, as a reader types them


def minialign(*words):
    """Run `python -m minialign …` on one thread. Raises BadInput with its last line if it fails."""
    command = [sys.executable, "-m", "minialign", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BadInput(f"python {' '.join(command[1:])}: exit code {done.returncode}: {said[-1] if said else ''}")


def prepare(cfg, folder, seed):
    """Write the prompt files. Returns {what methods read: the command that writes it}: the expert's demonstrations, labelled pairs."""
    line = json.dumps({"prompt": PROMPT}) + "\n"
    for name, times in (("prompt", 1), ("prompts", 16384 * cfg.longer)):
        (folder / f"{name}.jsonl").write_text(line * times, encoding="utf-8")
    always = ["--policy", cfg.policy, "--reward", REWARD, "--max_new", cfg.max_new, "--seed", seed]
    return {
        "demos": ["generate", *always, "--prompts", folder / "prompt.jsonl", "--n", 32768 * cfg.longer, "--keep", f"tilt:{cfg.beta}",
                  "--reward_max", 2, "--out", folder / f"demos-{seed}.jsonl"],
        "pairs": ["generate", *always, "--prompts", folder / "prompts.jsonl", "--n", 2, "--batch_size", 1024, "--keep", "bradley_terry:1",
                  "--out", folder / f"pairs-{seed}.jsonl"],
    }


def command(row, cfg, folder, seed):
    """(the words of the method's command, its run folder)."""
    files = {"prompts": ["--prompts", folder / "prompt.jsonl", "--reward", REWARD],
             "demos": ["--demos", folder / f"demos-{seed}.jsonl"], "pairs": ["--pairs", folder / f"pairs-{seed}.jsonl"]}
    run, flags = folder / f"{row.name.replace(' ', '_')}-{seed}", row.flags.format(beta=cfg.beta).split()
    for i, flag in enumerate(flags):
        if flag in ("--steps", "--rounds"):
            flags[i + 1] = str(int(flags[i + 1]) * cfg.longer)
        elif flag in ("--lr", "--reward_lr"):
            flags[i + 1] = str(float(flags[i + 1]) / cfg.longer**0.5)
    always = ["--policy", cfg.policy, "--max_new", cfg.max_new, "--held_out", 0, "--eval_every", 10**6, "--save_every", 10**6]
    return [row.method, *files[row.reads], *flags, *always, "--seed", seed, "--out", run], run


# ------------------------------------------------------------------------------------------------------------------------ counting


class Judge:
    """Counts the classes of a policy's stories and splits the KL that it paid."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.ref, self.tokenizer, _ = load_model(find_folder(cfg.policy))
        self.ref.requires_grad_(False)
        self.prompt = encode_prompt(self.tokenizer, PROMPT)
        n = (32 if cfg.full else 8) * cfg.samples
        self.stories = sample(self.ref, [self.prompt], max_new=cfg.max_new, n=n, eos_id=self.tokenizer.eos_id, seed=("ref", cfg.seed))
        self.rewards = self.classes(self.stories)
        self.counts = torch.bincount(self.rewards, minlength=3).double()
        self.shares = (self.counts / self.counts.sum()).numpy()

    def classes(self, stories):
        return torch.tensor(hero(None, [self.tokenizer.decode(ids) for ids in stories.completions])).long()

    @torch.no_grad()
    def __call__(self, folder, seed):
        """The measures of the policy in `folder`: counts, shares, and (value, half-width of the 95 % interval) of paid, needed, wasted."""
        policy, _, _ = load_model(folder)
        settings = rloo.Config(max_new=self.cfg.max_new, micro_batch=1024)
        stories = rollout(policy, self.ref, [self.prompt], settings, n=self.cfg.samples, eos_id=self.tokenizer.eos_id, seed=("judge", seed))
        counts = torch.bincount(self.classes(stories), minlength=3).double()
        paid = mean_interval((stories.old_logps - stories.ref_logps).sum(1))
        needed = needed_kl(counts, self.counts)
        half = np.hypot(paid[1], needed[1])  # the two are not independent; this is at most a little wide
        return {"counts": counts.tolist(), "shares": (counts / counts.sum()).tolist(), "paid": paid, "needed": needed,
                "wasted": (paid[0] - needed[0], half), "stories": self.tell(policy)}

    def tell(self, policy):
        """Two stories. The seed is the same for all policies, so they have the same luck."""
        told = sample(policy, [self.prompt], max_new=32, n=2, eos_id=self.tokenizer.eos_id, seed=("story", 3))
        return [" ".join((PROMPT + self.tokenizer.decode(ids)).split()) for ids in told.completions]

    @torch.no_grad()
    def learned_reward(self, folder):
        """The mean reward of a reward model on ref's stories of each class, less that of the first class."""
        model, tokenizer, _ = load_model(folder)
        few = range(2048)
        rows = collate([self.prompt] * len(few), [self.stories.completions[i] for i in few], pad_id=tokenizer.pad_id)
        rewards, classes = score(model, rows), self.rewards[: len(few)]
        means = [float(rewards[classes == level].mean()) for level in range(3)]
        return [mean - means[0] for mean in means]


def half_width(share, n):
    """Half the width of Wilson's 95 % interval of a share of n stories."""
    _, low, high = share_interval(share * n, n)
    return (high - low) / 2


def shown(shares):
    return " ".join(f"{share:.3f}" for share in shares)


# -------------------------------------------------------------------------------------------------------------------------- the report


def run_all(jobs, then):
    """Run the commands, as many at a time as there are cores, and call then(key, seconds) in the order of jobs: [(key, words)]."""
    def timed(words):
        begun = time.monotonic()
        minialign(*words)
        return time.monotonic() - begun

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            for (key, _), seconds in zip(jobs, pool.map(timed, [words for _, words in jobs]), strict=True):
                then(key, seconds)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(cfg):
    """Print the table, write figure and numbers. Returns True if every method is within its gate. Raises BadInput."""
    if unknown := [name for name in cfg.methods if name not in {row.method for row in ROWS}]:
        raise BadInput(f"--methods {unknown[0]}: no such method; choose some of {', '.join(row.method for row in ROWS)}")
    if not cfg.beta > 0 or cfg.max_new < 4 or cfg.samples < 100 or cfg.longer < 1:
        raise BadInput("--beta must be above 0, --max_new at least 4, --samples at least 100, --longer at least 1")
    if not Path(cfg.policy).is_dir():
        raise BadInput(f"--policy {cfg.policy}: no such folder; `python -m minialign stories260K` makes it (1 MB from the hub)")
    report, rows = Report(cfg), [row for row in ROWS if (row.method in cfg.methods if cfg.methods else row.quick or cfg.full)]
    seeds = range(cfg.seed, cfg.seed + (5 if cfg.full else 1))
    folder = Path("runs", f"storyteller-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.mkdir(parents=True)
    reads = {row.reads for row in rows}

    def written(seed):  # what the methods read
        run_all([(None, words) for kind, words in prepare(cfg, folder, seed).items() if kind in reads], lambda *_: None)

    with ThreadPoolExecutor(max_workers=1) as beside:  # counting ref's stories takes as long as writing the expert's
        first = beside.submit(written, cfg.seed)
        judge = Judge(cfg)
        first.result()
    expert = closed_form.tilt(judge.shares, LEVELS, cfg.beta)
    print(f"hero of {sum(judge.counts):,.0f} stories of ref: " + ", ".join(
        f"{what} {share:.3f} ± {half_width(share, int(sum(judge.counts))):.3f}" for what, share in zip(CLASSES, judge.shares, strict=True)))
    print(f"the expert ref·e^(r/β), β = {cfg.beta:g}: {shown(expert)}; its KL from ref is {closed_form.kl(expert, judge.shares):.3f} nats")
    print("ref", *judge.tell(judge.ref), sep="\n      ", flush=True)

    table = {row.name: [] for row in rows}

    def judged(key, seconds):
        row, seed, run = key
        found = judge(run / "final", seed) | {"seconds": seconds}
        table[row.name].append(found)
        name = row.name if len(seeds) == 1 else f"{row.name}, seed {seed}"
        half = max(half_width(share, cfg.samples) for share in found["shares"])
        words = f"{name:17} {shown(found['shares'])} ± {half:.3f}, " + ("no law of this kind" if not row.law else "law ")
        if row.law:
            found["law"] = list(map(float, row.law(judge.shares, expert, cfg.beta)))
            off = float(np.abs(np.array(found["law"]) - found["shares"]).max())
            words += shown(found["law"])
        if row.law and row.gate:
            report.gate(words, off <= row.gate, f"off {off:.3f} (gate {row.gate:g}, floor {row.floor:g})")
        else:
            print(f"      {words:52} " + (f"off {off:.3f} (no gate)" if row.law else ""))
        print(f"      paid {found['paid'][0]:.3f} ± {found['paid'][1]:.3f} = needed {found['needed'][0]:.3f} + wasted "
              f"{found['wasted'][0]:.3f} nats; {seconds:.0f} s")
        if (run / "reward").is_dir():
            found["learned"] = judge.learned_reward(run / "reward")
            boy, animal = row.learns(cfg.beta)[1:]
            print(f"      its reward, less that of a girl: boy {found['learned'][1]:.2f} (law {boy:.2f}), animal {found['learned'][2]:.2f} "
                  f"(law {animal:.2f})")
        print("     ", "\n      ".join(found["stories"]), flush=True)

    for seed in seeds:
        if seed != cfg.seed:
            written(seed)
        commands = [(row, *command(row, cfg, folder, seed)) for row in rows]
        run_all([((row, seed, run), words) for row, words, run in commands], judged)
    if cfg.full:
        claims(report, table)
    numbers = {"pushed": push(cfg, folder, judge)} if cfg.full else {}
    draw_figure(table, rows, judge, cfg.out)
    print(f"hear more: python -m minialign sample --policy {command(rows[0], cfg, folder, cfg.seed)[1]}/final --prompt '{PROMPT}'")
    return report.close({"ref": judge.shares.tolist(), "expert": expert.tolist(), "methods": table} | numbers)


def claims(report, table):
    """Does a reward learned from demonstrations beat SFT, and at what waste? Differences of the same seed."""
    def numbers(name, what):
        return np.array([found[what][0] if what != "reward" else found["shares"] @ LEVELS for found in table[name]])

    for name, source in (("IRFT", "RFT/IRFT"), ("RFT", "RFT/IRFT"), ("IRL", "IRL")):
        if table.get(name) and table.get("SFT"):
            for what, claim in (("reward", "'s true reward is above SFT's"), ("wasted", " wastes fewer nats than SFT")):
                sign = 1 if what == "reward" else -1
                report.claim(source, name + claim, "", list(sign * (numbers(name, what) - numbers("SFT", what))))


def push(cfg, folder, judge):
    """RLOO with β → 0 on the same reward: what it gains, what it pays, and what becomes of the text."""
    print("\nover-optimisation: RLOO at five times its learning rate, with less and less pull to ref")
    found = []

    def judged(beta, seconds):
        measures = judge(folder / f"pushed-{beta:g}" / "final", cfg.seed)
        reward = float(np.array(measures["shares"]) @ LEVELS)
        found.append({"beta": beta, "reward": reward, **measures})
        print(f"      β = {beta:<5g} reward {reward:.3f}  paid {measures['paid'][0]:6.3f} = needed {measures['needed'][0]:.3f} + wasted "
              f"{measures['wasted'][0]:6.3f}", *measures["stories"], sep="\n      ", flush=True)

    row = next(row for row in ROWS if row.method == "rloo")
    jobs = []
    for beta in PUSHED:
        words, run = command(row, cfg, folder, cfg.seed)
        for flag, value in (("--beta", beta), ("--steps", 120), ("--lr", 1e-3)):
            words[words.index(flag) + 1] = value
        words[words.index(run)] = folder / f"pushed-{beta:g}"
        jobs.append((beta, words))
    run_all(jobs, judged)
    return found


def draw_figure(table, rows, judge, out):
    """Left: the three shares of each policy (bars) on its law (ticks). Right: the KL that the rewards needed, and what was wasted."""
    import matplotlib

    matplotlib.use("Agg")  # set here, not at import: a notebook that imports this file keeps its own backend
    import matplotlib.pyplot as plt

    colors, names = ("0.65", "C0", "C1"), ["ref", *[row.name for row in rows]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.62 * len(names) + 1.6), sharey=True, width_ratios=(1.5, 1),
                                         constrained_layout=True)
    for i, name in enumerate(names):
        results = table.get(name) or [{"shares": judge.shares.tolist(), "needed": (0, 0), "wasted": (0, 0)}]
        shares = np.mean([found["shares"] for found in results], axis=0)
        for level in range(3):
            y = i + 0.26 * (level - 1)
            left.barh(y, shares[level], 0.24, color=colors[level], label=CLASSES[level] if not i else None)
            if "law" in results[0]:
                left.plot([results[0]["law"][level]] * 2, [y - 0.13, y + 0.13], color="k", lw=2)
        needed, wasted = (np.mean([found[part][0] for found in results]) for part in ("needed", "wasted"))
        right.barh(i, needed, 0.55, color="#3f5368", label="needed" if not i else None)
        right.barh(i, max(0, wasted), 0.55, left=needed, color="#e8b23a", label="wasted" if not i else None)
    left.plot([], [], color="k", lw=2, label="closed form")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="share of the stories", xlim=(0, None))
    left.invert_yaxis()
    left.tick_params(labelsize=11)
    right.set(xlabel="KL from ref, nats")
    left.legend(fontsize=10, frameon=False, loc="lower right")
    right.legend(fontsize=10, frameon=False, loc="upper right")
    left.set_title("who the stories are about", fontsize=12)
    right.set_title("how far they are from the model", fontsize=12)
    figure.savefig(out, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    with exit_codes("storyteller"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy.storyteller", description=__doc__)) else 1)
