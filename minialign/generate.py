"""Sample n completions of each prompt, score them, and write a file that a method can train on.

    --keep all               every completion, with its reward
    --keep best              the best of the n: demonstrations for best-of-n, RAFT on a fixed set, a stronger model's answers
    --keep above:τ           every completion with a reward of at least τ
    --keep tilt:β            demonstrations of the expert π* ∝ π·e^{r/β}, exactly, by rejection: a completion is kept with probability
                             e^{(r − reward_max)/β}, so its reward must never exceed --reward_max
    --keep best_worst        pairs of the best and the worst of the n: SLiC-HF's sample-rank, iterative DPO
    --keep bradley_terry:β   pairs of the first two, of which the first is chosen with probability σ((r₁ − r₂)/β)

The first four write demonstrations (prompt, completion), the last two preference pairs (prompt, chosen, rejected). --write says which the
file must be; it is there to be read in a command. Each row has its rewards, where it comes from, and whether the completion was finished:
no method puts EOS behind one that --max_new cut off. A prompt whose n rewards are all equal
gives no pair of best and worst, and this is counted. Everything is drawn from the seed, the prompt's number and the sample's, so a file
does not depend on batches.

After every batch of prompts the file is flushed to the disk, and OUT.progress.json says how far it is. The same command goes on there after
a kill -9: nothing is lost and nothing is written twice.

    python -m minialign generate --policy runs/stories260K --prompts p.jsonl --reward animals.py:animals --n 64 --keep best --out best.jsonl

Checked by tests/test_generate.py: the law of the tilt by a chi-square, kills, and every rule by hand.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from minialign.data import encode_prompts, read_prompts
from minialign.engine.common import BadInput, derive_seed, find_folder, pick_device, pick_dtype, read_json, write_atomic
from minialign.engine.opening import builtin_base
from minialign.engine.run import digest_of
from minialign.lora import load_model
from minialign.rewards import BadReward, ask, open_reward, reward_folders
from minialign.sample import sample
from minialign.task import builtin_prompts

DEMONSTRATIONS, PAIRS = ("all", "best", "above", "tilt"), ("best_worst", "bradley_terry")


@dataclass
class Config:
    policy: str = "builtin"         # a folder (of a model or of a PEFT adapter), a hub name, or builtin
    prompts: str = "builtin"        # prompts: builtin, or a JSONL/JSON(.gz) file
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # exact_match, FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # how several rewards become one: mean, min, or warm (one reward model with averaged weights)
    reward_limit: float = 60.0      # seconds that the reward may take for one batch
    keep: str = "all"               # all, best, above:τ, tilt:β, best_worst or bradley_terry:β
    write: str = ""                 # demonstrations or pairs: refuse to write the other kind
    reward_max: float | None = None  # with tilt: the highest reward there can be
    n: int = 4                      # completions of each prompt
    max_new: int = 64               # longest completion in tokens
    max_prompt: int | None = None   # longest prompt in tokens; a longer one loses its beginning
    tau: float = 1.0                # sampling temperature
    greedy: bool = False            # always take the most likely token (with --n 1)
    batch_size: int = 32            # prompts between two writes to the disk
    seed: int = 0                   # the same seed gives the same file
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16 or float64
    skip_bad: bool = False          # count and skip bad rows of a file instead of stopping at the first
    out: str = ""                   # the JSONL file to write


def rule_of(cfg):
    """(name, number) of --keep. Raises BadInput for another name, a missing or superfluous number, or flags that do not fit."""
    name, colon, number = cfg.keep.partition(":")
    if name not in (*DEMONSTRATIONS, *PAIRS):
        raise BadInput(f"--keep {cfg.keep}: must be {', '.join(DEMONSTRATIONS + PAIRS)}; above takes :τ, tilt and bradley_terry :β")
    try:
        value = float(number) if colon else None
    except ValueError:
        value = math.nan
    if (name in ("above", "tilt", "bradley_terry")) != bool(colon) or value is not None and not math.isfinite(value):
        raise BadInput(f"--keep {cfg.keep}: expected {name}{':NUMBER' if name in ('above', 'tilt', 'bradley_terry') else ''}")
    if name in ("tilt", "bradley_terry") and value <= 0:
        raise BadInput(f"--keep {cfg.keep}: β must be above 0")
    if (name == "tilt") != (cfg.reward_max is not None):
        raise BadInput("--keep tilt:β needs --reward_max, the highest reward there can be" if name == "tilt" else
                       f"--reward_max {cfg.reward_max}: is used only with --keep tilt:β")
    if name in PAIRS and cfg.n < 2:
        raise BadInput(f"--n {cfg.n}: a pair needs at least 2 completions of a prompt")
    kind = "pairs" if name in PAIRS else "demonstrations"
    if cfg.write not in ("", kind):
        raise BadInput(f"--write {cfg.write}: --keep {cfg.keep} writes {kind}")
    return name, value


def selected(name, value, rewards, coins, reward_max=None):
    """What is written of one prompt's n completions: a list of (i,) for demonstrations or (chosen, rejected) for a pair, indices.

    rewards: n floats; coins: n numbers in [0, 1), one for each completion. Raises BadInput if a tilt meets a reward above reward_max.
    """
    places = range(len(rewards))
    best, worst = max(places, key=lambda i: (rewards[i], -i)), min(places, key=lambda i: (rewards[i], i))  # the first of equal ones
    if name == "tilt" and max(rewards) > reward_max:
        raise BadInput(f"a completion has the reward {max(rewards):g}, above --reward_max {reward_max:g}: the kept ones would not follow "
                       "the tilt; raise it")
    if name == "best_worst":
        return [(best, worst)] if rewards[best] > rewards[worst] else []
    if name == "bradley_terry":
        first = coins[0] < 1 / (1 + math.exp(min(700.0, -(rewards[0] - rewards[1]) / value)))
        return [(0, 1) if first else (1, 0)]
    kept = {"all": lambda i: True, "best": lambda i: i == best, "above": lambda i: rewards[i] >= value,
            "tilt": lambda i: coins[i] < math.exp((rewards[i] - reward_max) / value)}[name]
    return [(i,) for i in places if kept(i)]


def main(cfg):
    """Write the file and return its path."""
    name, value = rule_of(cfg)
    if not cfg.out:
        raise BadInput("--out: name the JSONL file to write")
    for flag in ("n", "max_new", "batch_size"):
        if getattr(cfg, flag) < 1:
            raise BadInput(f"--{flag} {getattr(cfg, flag)}: must be at least 1")
    out, progress = Path(cfg.out), Path(f"{cfg.out}.progress.json")
    device = pick_device(cfg.device)
    path = find_folder(builtin_base() if cfg.policy == "builtin" else cfg.policy)
    policy, tokenizer, _ = load_model(path, dtype=pick_dtype(cfg.dtype), device=device)
    policy.requires_grad_(False)
    if policy.config.head != "lm":
        raise BadInput(f"{path}: is a reward model, which cannot write text: name it with --reward")
    reward_fn = open_reward(cfg.reward, combine=cfg.combine, prompts=cfg.prompts, device=device, dtype=pick_dtype(cfg.dtype),
                            skip_bad=cfg.skip_bad)
    prompts = builtin_prompts() if cfg.prompts == "builtin" else read_prompts(cfg.prompts, skip_bad=cfg.skip_bad)
    room = policy.config.max_len - cfg.max_new
    if room < 1:
        raise BadInput(f"--max_new {cfg.max_new}: the policy's context is {policy.config.max_len} tokens")
    rows = encode_prompts(tokenizer, prompts, max_prompt=min(cfg.max_prompt or room, room), skip_bad=cfg.skip_bad)

    inputs = {"policy": path, "prompts": cfg.prompts} | {f"reward {i}": folder for i, folder in enumerate(reward_folders(cfg.reward))}
    asked = dataclasses.asdict(cfg) | {f"content of {kind}": digest_of(source) for kind, source in inputs.items()}
    state = begin(out, progress, asked)
    with open(out, "r+b") as file, tqdm(total=len(rows), initial=state["done"], unit="prompt", disable=None) as bar:
        file.truncate(state["bytes"])  # what a killed call wrote after its last batch is drawn again
        file.seek(state["bytes"])
        for start in range(state["done"], len(rows), cfg.batch_size):
            batch = rows[start : start + cfg.batch_size]
            lines, rewards = of_batch(policy, tokenizer, reward_fn, start, batch, cfg, name, value)
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
            counted = None if state["counted"] is None else Counter(state["counted"]) + Counter(f"{reward:.6g}" for reward in rewards)
            state |= {"done": start + len(batch), "bytes": file.tell(), "written": state["written"] + len(lines),
                      "drawn": state["drawn"] + len(rewards), "sum": state["sum"] + sum(rewards),
                      "counted": counted if counted and len(counted) <= 12 else None}
            write_atomic(progress, json.dumps(state) + "\n")
            bar.update(len(batch))
    finish(out, state, name)
    return out


def begin(out, progress, asked):
    """How far an earlier call of the same command came. Raises BadInput if the file is there and was made by another command."""
    if not progress.is_file():
        if out.exists():
            raise BadInput(f"{out}: exists; name another --out, or remove it")
        out.parent.mkdir(parents=True, exist_ok=True)
        state = {"asked": asked, "done": 0, "bytes": 0, "written": 0, "drawn": 0, "sum": 0.0, "counted": {}}
        write_atomic(progress, json.dumps(state) + "\n")
        out.touch()
        return state
    state = read_json(progress)
    before = state.get("asked", {})
    if changed := [name for name in asked if before.get(name) != asked[name]]:
        what = changed[0] if " " in changed[0] else f"--{changed[0]} ({before.get(changed[0])!r})"
        raise BadInput(f"{out}: was begun with another {what}; name another --out")
    out.touch()
    if out.stat().st_size < state["bytes"]:
        raise BadInput(f"{out}: is shorter than {progress.name} says; remove both and begin again")
    return state


def of_batch(policy, tokenizer, reward_fn, start, batch, cfg, name, value):
    """(lines to write, rewards of everything drawn) of prompts start, start + 1, …"""
    seeds = [derive_seed("generate", cfg.seed, start + i) for i in range(len(batch))]
    answers = sample(policy, [ids for ids, _ in batch], max_new=cfg.max_new, tau=cfg.tau, n=cfg.n, eos_id=tokenizer.eos_id, seed=seeds,
                     greedy=cfg.greedy)
    texts = [tokenizer.decode(ids) for ids in answers.completions]
    prompts = [prompt for _, prompt in batch]
    try:
        rewards = ask(reward_fn, [prompt for prompt in prompts for _ in range(cfg.n)], texts, limit=cfg.reward_limit).tolist()
    except BadReward as error:
        raise BadInput(f"{error}; the prompts before are written, and the same command goes on here") from None
    lines, finished = [], answers.finished.tolist()
    for i, prompt in enumerate(prompts):
        own = slice(i * cfg.n, (i + 1) * cfg.n)
        coins = torch.rand(cfg.n, dtype=torch.float64, generator=torch.Generator().manual_seed(derive_seed("keep", seeds[i]))).tolist()
        written = [text.strip() if isinstance(prompt, list) else text for text in texts[own]]  # a chat template puts its own spaces
        given = {"prompt": prompt, **{key: prompt.columns[key] for key in ("tools", "documents", "chat_template_kwargs")
                                      if getattr(prompt, "columns", {}).get(key) and isinstance(prompt, list)}}
        source = {"policy": cfg.policy, "seed": cfg.seed, "prompt_number": start + i}
        for picked in selected(name, value, rewards[own], coins, cfg.reward_max):
            if len(picked) == 1:
                [j] = picked
                lines.append({**given, "completion": written[j], "reward": rewards[own][j], "finished": finished[own][j], **source,
                              "sample": j})
            else:
                c, r = picked
                lines.append({**given, "chosen": written[c], "rejected": written[r], "chosen_reward": rewards[own][c],
                              "rejected_reward": rewards[own][r], "chosen_finished": finished[own][c],
                              "rejected_finished": finished[own][r], **source})
    return lines, rewards


def finish(out, state, name):
    """Print what was written."""
    kind, equal = "pairs" if name in PAIRS else "rows", state["done"] - state["written"]
    mean = state["sum"] / max(1, state["drawn"])
    print(f"{out}: {state['written']:,} {kind} from {state['drawn']:,} completions of {state['done']:,} prompts; mean reward {mean:.4g}"
          + (f"; no pair for {equal:,} prompts with equal rewards" if kind == "pairs" else ""))
    if state["counted"]:
        shares = sorted((float(reward), count / state["drawn"]) for reward, count in state["counted"].items())
        print("shares of the rewards: " + ", ".join(f"{reward:g}: {share:.3f}" for reward, share in shares))
