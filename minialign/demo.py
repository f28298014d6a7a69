"""The demo: verify the three-action toy, then train a tiny GPT with every method that learns from demonstrations alone, and evaluate each
policy with a reward that no method saw.

The built-in task is a language of requests (task.py). The base model is trained on rude speakers. Of the 200 demonstrations, 30 % come
from rude speakers and the rest from a polite expert. Each number is exact or a mean with its standard deviation over seeds:

    gold reward      mean of the programmatic reward over 8 answers to each of the 24 prompts (the expert's is exact)
    wins over SFT    share of those answers with a higher reward than SFT's answers to the same prompt; a tie counts one half
    gap              mean of log π(better) − log π(worse) over 400 pairs of rude answers; better ~ Bradley-Terry on gold rewards
    implicit         share of the pairs with log π/base (better) > log π/base (worse)
    KL(expert‖π)     exact, by summing over all 36 answers of the expert. A policy whose gap or reward is above the expert's goes
                     too far, and this column shows what that costs.
    KL(π‖base)       mean of log π/base over the answers

Below the table the demo prints the papers' claims, each as a number that should be above 0: mostly a difference of two runs with the same
seed, with a 95 % interval (Student's t). The gold reward stands in for the leaderboards of both Tab. 3. Verdict: holds if the interval is
above 0, does not hold if below, else not separable.

    python -m minialign demo              # five seeds, under five minutes on two cores
"""

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from minialign import evaluate
from minialign.batch import collate
from minialign.data import encode_completion, encode_prompt
from minialign.engine.common import BadInput, write_atomic
from minialign.engine.opening import builtin_base
from minialign.logps import seq_logps
from minialign.methods import best_of_n, ift, irft, irl, rft, sft
from minialign.settings import check_config
from minialign.task import EXPERT, RUDE, THINGS, builtin_law, builtin_pairs, builtin_prompt, gold_reward
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained

ROOT = Path(__file__).parent.parent
SFT, IFT, SPIN, RFT, IRL, BEST = "SFT", "IFT", "SPIN (IRFT, T = 1)", "RFT", "IRL", "best of 4 by RFT's r"
ROUNDS = (1, 2, 5)  # T of IRFT
COLUMNS = ("gold reward", "wins over SFT", "gap", "implicit", "KL(expert‖π)", "KL(π‖base)")


@dataclass
class Config:
    seeds: int = 5                  # runs of each method, with different data orders and samples
    steps: int = 60                 # optimizer steps of each method (RFT a third more, IRL twice as many, best-of-n a third fewer)
    batch_size: int = 32            # rows per step
    lr: float = 3e-4                # peak learning rate
    workers: int = 0                # processes that run at the same time; 0 = one per core
    toy: bool = True                # verify the three-action toy first
    out: str = ""                   # folder for table.json and demo.png; default runs/demo-<time>


def irft_name(rounds):
    return SPIN if rounds == 1 else f"IRFT, T = {rounds}"


def methods(cfg, seed, out):
    """{name: (module, Config)}. All methods start from the same base and see the same demonstrations, nothing else."""
    table = {
        RFT: (rft, dict(steps=-(-4 * cfg.steps // 3))), IRL: (irl, dict(steps=2 * cfg.steps, rounds=min(12, cfg.steps))),
        SFT: (sft, {}), IFT: (ift, {}), **{irft_name(T): (irft, dict(rounds=T)) for T in ROUNDS},
        BEST: (best_of_n, dict(steps=-(-2 * cfg.steps // 3), n=4)),
    }
    jobs = {}
    for name, (module, own) in table.items():
        steps = own.get("steps", cfg.steps)
        folder = f"{out}/{name.split(' (')[0].replace(', T = ', '-')}-{seed}"
        looks = 4 if module is irl else 3
        shared = dict(steps=steps, eval_every=-(-steps // looks), save_every=steps, log_every=cfg.steps, batch_size=cfg.batch_size,
                      lr=cfg.lr, seed=seed, held_out=0.0, max_new=48, snapshots=True, out=folder)
        shared |= {} if module is best_of_n else {"max_len": 96}
        jobs[name] = module, module.Config(**{**shared, **own})
    jobs[BEST][1].out = f"{out}/best_of_4-{seed}"
    jobs[BEST][1].reward = [f"{jobs[RFT][1].out}/reward"]  # learned from the demonstrations, so best-of-n sees nothing else either
    return jobs


# ------------------------------------------------------------------------------------------------------------------ measure


def speak(policy, base, tokenizer, seed, n=8):
    """evaluate.sample_measures of n answers to each of the 24 prompts."""
    prompts = [builtin_prompt(thing) for thing in THINGS]
    settings = evaluate.Config(n=n, max_new=48, seed=seed)
    return evaluate.sample_measures(policy, tokenizer, base, prompts, gold_reward, settings)


@torch.no_grad()
def kl_from_expert(policy, tokenizer):
    """Exact KL(expert‖π), averaged over the prompts."""
    kls = []
    for thing in THINGS:
        law = builtin_law(builtin_prompt(thing), EXPERT)
        ids = encode_prompt(tokenizer, builtin_prompt(thing))
        rows = collate([ids] * len(law), [encode_completion(tokenizer, text) for text in law], pad_id=tokenizer.pad_id)
        kls.append(sum(p * (math.log(p) - float(logp)) for p, logp in zip(law.values(), seq_logps(policy, rows), strict=True)))
    return statistics.mean(kls)


def measure_policy(policy, base, tokenizer, seed):
    """({column: number} for all columns except the wins, gold rewards (24, 8) as lists, one answer to each prompt)."""
    said, settings = speak(policy, base, tokenizer, seed), evaluate.Config(max_len=96)
    own, start = (evaluate.pair_measures(model, tokenizer, builtin_pairs(seed=1), settings) for model in (policy, base))
    wins = evaluate.wins(own["chosen"] - start["chosen"], own["rejected"] - start["rejected"])
    numbers = {"gold reward": float(said["rewards"].mean()), "gap": float((own["chosen"] - own["rejected"]).mean()),
               "implicit": wins / len(own["chosen"]), "KL(expert‖π)": kl_from_expert(policy, tokenizer),
               "KL(π‖base)": float(said["kl"].mean())}
    return numbers, said["rewards"].tolist(), said["texts"][::8]


def on_the_way(folder, base, tokenizer, seed):
    """Two lists: {step, gap, rewards (24, 4)} of a run's snapshots, and {step, accuracy} of its learned reward, if any, on the pairs."""
    pairs, settings, path = builtin_pairs(seed=1), evaluate.Config(max_len=96), []
    for snapshot in sorted((folder / "snapshots").iterdir()):
        policy = load_pretrained(snapshot)
        own = evaluate.pair_measures(policy, tokenizer, pairs, settings)
        point = {"step": int(snapshot.name), "gap": float((own["chosen"] - own["rejected"]).mean())}
        path.append(point | {"rewards": speak(policy, base, tokenizer, seed, n=4)["rewards"].tolist()})
    accuracy = []
    for snapshot in sorted((folder / "reward_snapshots").iterdir()) if (folder / "reward_snapshots").is_dir() else []:
        scores = evaluate.pair_measures(load_pretrained(snapshot), tokenizer, pairs, settings)
        share = evaluate.wins(scores["chosen"], scores["rejected"]) / len(scores["chosen"])
        accuracy.append({"step": int(snapshot.name), "accuracy": share})
    return path, accuracy


def run_one(cfg, seed, name, out, base_folder):
    """Train one method with one seed in this process, with a log file for its output, and measure it. Returns a picklable dict."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # the demo was killed, so nothing waits for this run
    torch.set_num_threads(1)  # the models are too small for a second thread to help
    began = time.monotonic()
    base, tokenizer = load_pretrained(base_folder), load_tokenizer(base_folder)
    if name == "base":
        numbers, rewards, answers = measure_policy(base, base, tokenizer, seed)
        return {"name": name, "seed": seed, "numbers": numbers, "rewards": rewards, "answers": answers, "path": [], "accuracy": []}
    module, settings = methods(cfg, seed, out)[name]
    folder = Path(settings.out)
    with open(f"{folder}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        module.main(settings)
    numbers, rewards, answers = measure_policy(load_pretrained(folder / "final"), base, tokenizer, seed)
    path, accuracy = on_the_way(folder, base, tokenizer, seed)
    return {"name": name, "seed": seed, "numbers": numbers, "rewards": rewards, "answers": answers, "path": path, "accuracy": accuracy,
            "seconds": time.monotonic() - began}


def exact_rows():
    """The same numbers for the rude speakers and the expert, by enumeration. In KL(expert‖π) no policy is below the expert's 0."""
    rows, pairs = {}, builtin_pairs(seed=1)
    prompt = builtin_prompt("tea")  # the distribution is the same for every thing
    expert, rude = builtin_law(prompt, EXPERT), builtin_law(prompt, RUDE)
    for name, law, politeness in (("rude speakers (exact)", rude, RUDE), ("expert (exact)", expert, EXPERT)):
        rewards = gold_reward([prompt] * len(law), list(law))
        laws = [(builtin_law(pair.prompt, politeness), builtin_law(pair.prompt, RUDE), pair) for pair in pairs]
        ratios = [math.log(own[p.chosen] / start[p.chosen]) - math.log(own[p.rejected] / start[p.rejected]) for own, start, p in laws]
        rows[name] = {
            "gold reward": sum(p * r for p, r in zip(law.values(), rewards, strict=True)),
            "gap": statistics.mean(math.log(own[pair.chosen]) - math.log(own[pair.rejected]) for own, _, pair in laws),
            "implicit": statistics.mean((ratio > 1e-12) + 0.5 * (abs(ratio) <= 1e-12) for ratio in ratios),
            "KL(expert‖π)": sum(p * math.log(p / law[text]) for text, p in expert.items()),
            "KL(π‖base)": sum(p * math.log(p / rude[text]) for text, p in law.items()),
        }
    return rows


# ------------------------------------------------------------------------------------------------------------------- report


def table_of(results):
    """{policy: {column: [value per seed]}} from run_one's dicts. Wins over SFT compare with the SFT run of the same seed."""
    table = {}
    for result in sorted(results, key=lambda result: result["seed"]):
        sft_rewards = next(r["rewards"] for r in results if r["name"] == SFT and r["seed"] == result["seed"])
        shares = evaluate.win_shares(torch.tensor(result["rewards"]), torch.tensor(sft_rewards))
        numbers = {**result["numbers"], "wins over SFT": float(shares.mean())}
        for column in COLUMNS:
            table.setdefault(result["name"], {}).setdefault(column, []).append(numbers[column])
    return table


def claims(table, accuracy):
    """[(source, claim, [difference per seed])]: the papers' claims, as numbers that should be above 0. accuracy: one list per seed, the
    accuracy of IRL's reward at each evaluation."""

    def more(a, b, column):
        return [x - y for x, y in zip(table[a][column], table[b][column], strict=True)]

    def than(a, column, level):
        return [x - level for x in table[a][column]]

    T5 = irft_name(5)
    return [
        ("RFT/IRFT, Fig. 1", "SFT's gap is below 0", [-gap for gap in table[SFT]["gap"]]),
        ("RFT/IRFT, Fig. 1", "SPIN's gap is above 0", table[SPIN]["gap"]),
        ("RFT/IRFT, Fig. 1", "RFT's gap is above 0", table[RFT]["gap"]),
        ("RFT/IRFT, Fig. 1", "SPIN's gap is above SFT's", more(SPIN, SFT, "gap")),
        ("RFT/IRFT, Fig. 1", "RFT's gap is above SFT's", more(RFT, SFT, "gap")),
        ("RFT/IRFT, Fig. 2", "RFT's reward is above SFT's", more(RFT, SFT, "gold reward")),
        ("RFT/IRFT, Fig. 2", "RFT wins against SFT", than(RFT, "wins over SFT", 0.5)),
        ("RFT/IRFT, Tab. 3", "SPIN's reward is above SFT's", more(SPIN, SFT, "gold reward")),
        ("RFT/IRFT, Tab. 3", "IRFT's reward, T = 5, is above SPIN's", more(T5, SPIN, "gold reward")),
        ("RFT/IRFT, Tab. 8", "implicit accuracy: SPIN above SFT", more(SPIN, SFT, "implicit")),
        ("RFT/IRFT, Tab. 8", "implicit accuracy: T = 5 above SPIN", more(T5, SPIN, "implicit")),
        ("IRL, Fig. 2a", "the reward's accuracy rises over rounds", [path[-1] - path[0] for path in accuracy]),
        ("IRL, Fig. 2b", "IRL's reward is above SFT's", more(IRL, SFT, "gold reward")),
        ("IRL, Fig. 2c", "IRL wins against SFT (paper: demonstrations)", than(IRL, "wins over SFT", 0.5)),
        ("IRL, Tab. 1", "its reward is more accurate than SPIN's",
         [path[-1] - implicit for path, implicit in zip(accuracy, table[SPIN]["implicit"], strict=True)]),
        ("IFT, Tab. 3", "IFT's reward is above SFT's", more(IFT, SFT, "gold reward")),
        ("their price", "SPIN is farther from the expert than SFT", more(SPIN, SFT, "KL(expert‖π)")),
        ("their price", "RFT is farther from the expert than SFT", more(RFT, SFT, "KL(expert‖π)")),
        ("their price", "IRL is farther from the expert than SFT", more(IRL, SFT, "KL(expert‖π)")),
        ("best-of-n", "a learned reward lifts it above base", more(BEST, "base", "gold reward")),
        ("best-of-n", "a learned reward lifts it above SFT", more(BEST, SFT, "gold reward")),
    ]


def spread(values):
    return f"{statistics.mean(values):7.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:7.3f}        "


def report(table, answers, exact, judged, cfg):
    """Print the table, answers of every policy to the same prompts, and the claims."""
    print(f"\n── 3. the result: mean ± standard deviation over {cfg.seeds} seeds " + "─" * 62)
    print(f"{'policy':24}" + "".join(f"{column:>18}" for column in COLUMNS))
    for name, values in table.items():
        print(f"{name:24}" + "".join(f"{spread(values[column]):>18}" for column in COLUMNS))
    for name, values in exact.items():
        print(f"{name:24}" + "".join((f"{values[column]:7.3f}        " if column in values else "").rjust(18) for column in COLUMNS))
    print("\nanswers of each policy to the same prompts (first seed):")
    for name, samples in answers.items():
        print(f"  {name:24} " + "   ".join(f"{builtin_prompt(thing)}⟦{text}⟧" for thing, text in zip(THINGS[:2], samples, strict=False)))
    print("\nthe papers' claims in these runs (difference ± 95 % interval; seeds in favour):")
    for source, claim, differences in judged:
        mean, half, favour, word = evaluate.verdict(differences)
        print(f"  {source:18} {claim:44} {mean:+7.3f} ± {half:5.3f}   {favour}/{len(differences)}   {word}")


def draw_figure(table, exact, paths, accuracy, path):
    """Four panels: gap over steps; reward over steps; effect of T; accuracy of IRL's reward over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 8.6), constrained_layout=True)  # readable at the width of the README
    axes = axes.flat
    colors = dict(zip((SFT, IFT, SPIN, irft_name(5), RFT, IRL, BEST), ("0.5", "C5", "C3", "C1", "C0", "C2", "C4"), strict=True))

    def band(axis, x, rows, color, label):
        """Mean and standard deviation over seeds; rows: a list of values per seed."""
        values = torch.tensor(rows, dtype=torch.float64)  # (seeds, points)
        mean, deviation = values.mean(0), values.std(0, correction=0)
        axis.plot(x, mean, marker=".", color=color, label=label)
        axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0)

    gold = {name: values["gold reward"] for name, values in table.items()}
    for name in (SFT, IFT, SPIN, irft_name(5), RFT, IRL):
        x, start = [0, *(point["step"] for point in paths[name][0])], statistics.mean(table["base"]["gap"])
        band(axes[0], x, [[start, *(point["gap"] for point in run)] for run in paths[name]], color=colors[name], label=name)
    axes[0].set(xlabel="steps", ylabel="log π(better) − log π(worse), nats", title="Log-prob gap, held-out pairs (log scale above 1)")
    axes[0].set_yscale("symlog", linthresh=1)
    axes[0].set_yticks([-0.5, 0, 0.5, 1, 2, 5], ["−0.5", "0", "0.5", "1", "2", "5"])
    axes[0].minorticks_off()
    axes[0].axhline(exact["expert (exact)"]["gap"], color="k", ls="--", lw=1, label="expert")
    axes[0].axhline(0, color="k", lw=0.6)

    for name in (RFT, IRL, BEST):
        x = [0, *(point["step"] for point in paths[name][0])]
        start = statistics.mean(gold["base"])
        band(axes[1], x, [[start, *(point["gold reward"] for point in run)] for run in paths[name]], color=colors[name], label=name)
    axes[1].axhline(statistics.mean(gold[SFT]), color=colors[SFT], label="SFT")
    axes[1].axhline(exact["expert (exact)"]["gold reward"], color="k", ls="--", lw=1, label="expert")
    axes[1].set(xlabel="steps", ylabel="gold reward", title="Gold reward, with a learned reward")

    values = axes[2].twinx()
    band(axes[2], ROUNDS, list(zip(*[gold[irft_name(T)] for T in ROUNDS], strict=True)), color="C1", label="gold reward")
    band(values, ROUNDS, list(zip(*[table[irft_name(T)]["KL(expert‖π)"] for T in ROUNDS], strict=True)), color="C3", label="KL(expert‖π)")
    axes[2].axhline(statistics.mean(gold[SFT]), color=colors[SFT], lw=1, label="SFT's reward")
    axes[2].set(xlabel="T, rounds of fresh samples", ylabel="gold reward", xscale="log", title="IRFT: more rounds, nearer to the expert")
    axes[2].set_xticks(ROUNDS, [str(T) for T in ROUNDS])
    axes[2].minorticks_off()
    values.set(ylabel="KL(expert‖π), nats", ylim=(0, None))
    handles = [handle for axis in (axes[2], values) for handle in axis.get_legend_handles_labels()[0]]
    axes[2].legend(handles=handles, fontsize=9, frameon=False)

    band(axes[3], [point["step"] for point in accuracy[0]], [[point["accuracy"] for point in run] for run in accuracy], color="C2",
         label="IRL's reward")
    for name in (SFT, SPIN, RFT):
        axes[3].axhline(statistics.mean(table[name]["implicit"]), color=colors[name], lw=1, label=f"implicit, {name}")
    axes[3].axhline(exact["expert (exact)"]["implicit"], color="k", ls="--", lw=1, label="log expert/rude")
    axes[3].axhline(0.5, color="k", lw=0.6)
    axes[3].set(xlabel="steps", ylabel="share of pairs", title="Pairs in the order of the gold reward")
    axes[3].set_ylim(0.48, 0.8)
    for axis in (axes[0], axes[1], axes[3]):
        axis.legend(fontsize=9, edgecolor="none", framealpha=1)  # it hides the lines behind it
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(cfg):
    """Run the demo and return the folder with table.json and demo.png. Exits with code 1 if a method of the toy misses its law."""
    if cfg.seeds < 1 or cfg.steps < max(ROUNDS) or cfg.workers < 0:
        raise BadInput(f"--seeds must be at least 1, --steps at least {max(ROUNDS)} (one for each round), --workers at least 0")
    started = time.monotonic()
    out = Path(cfg.out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    if out.is_file() or out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: exists and is not empty; name another --out")
    for _, settings in methods(cfg, 0, out).values():
        check_config(settings)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.toy:
        print("── 1. three actions: every method against its closed form " + "─" * 64, flush=True)
        toy = subprocess.run([sys.executable, "-m", "toy.three_actions", "--out", str(out.resolve() / "three_actions.png")], cwd=ROOT)
        if toy.returncode:
            print("a method of the toy missed its law: see FAIL above", file=sys.stderr)
            raise SystemExit(1)
    print("── 2. a tiny GPT aligned from demonstrations " + "─" * 77, flush=True)
    base_folder = builtin_base()
    results, names = [], ["base", *methods(cfg, 0, out)]
    print(f"{len(names) * cfg.seeds} runs; each writes its output to {out}/<run>.log", flush=True)
    first, after = [name for name in names if name != BEST], {RFT: BEST}  # best-of-n waits for the reward that RFT learns
    processes = multiprocessing.get_context("spawn")  # forking a process in which torch has run may hang
    with ProcessPoolExecutor(cfg.workers or os.cpu_count(), mp_context=processes) as pool:
        waiting = {pool.submit(run_one, cfg, seed, name, str(out), str(base_folder)) for name in first for seed in range(cfg.seeds)}
        try:
            while waiting:
                done = next(as_completed(waiting))
                waiting.remove(done)
                result = done.result()
                results.append(result)
                if follower := after.get(result["name"]):
                    waiting.add(pool.submit(run_one, cfg, result["seed"], follower, str(out), str(base_folder)))
                numbers = "  ".join(f"{column} {value:.3g}" for column, value in result["numbers"].items())
                took = f"({result.get('seconds', 0):.0f} s)"
                print(f"{len(results):3} {result['name']:24} seed {result['seed']}  {numbers}  {took}", flush=True)
        except BaseException:  # Ctrl-C, or a run that failed: do not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    of = {(result["name"], result["seed"]): result for result in results}
    results = [of[name, seed] for name in names for seed in range(cfg.seeds)]  # in a fixed order: runs finish in any order
    order = ["base", SFT, IFT, *(irft_name(T) for T in ROUNDS), RFT, IRL, BEST]
    table = table_of(results)
    table = {name: table[name] for name in order}
    paths = {name: [of[name, seed]["path"] for seed in range(cfg.seeds)] for name in order[1:]}
    for runs in paths.values():
        for seed, run in enumerate(runs):
            sft_rewards = torch.tensor(of[SFT, seed]["rewards"])
            for point in run:
                point["wins"] = float(evaluate.win_shares(torch.tensor(point["rewards"]), sft_rewards).mean())
    accuracy = [of[IRL, seed]["accuracy"] for seed in range(cfg.seeds)]
    judged = claims(table, [[point["accuracy"] for point in run] for run in accuracy])
    exact = exact_rows()
    report(table, {name: of[name, 0]["answers"] for name in order}, exact, judged, cfg)
    verdicts = [{"source": source, "claim": claim, "differences": differences, "verdict": evaluate.verdict(differences)[3]}
                for source, claim, differences in judged]
    for runs in paths.values():
        for point in (point for run in runs for point in run):
            point["gold reward"] = statistics.mean(map(statistics.mean, point.pop("rewards")))
    content = {"config": vars(cfg), "table": table, "exact": exact, "claims": verdicts, "paths": paths, "accuracy": accuracy}
    write_atomic(out / "table.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    draw_figure(table, exact, paths, accuracy, out / "demo.png")
    figures = f"{out}/demo.png" + (f", {out}/three_actions.png" if cfg.toy else "")
    print(f"\nfigures: {figures}   ({time.monotonic() - started:.0f} s in all)")
    return out
