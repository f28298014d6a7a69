"""The papers' experiments, one small file each: a method's Config with the published numbers, a model, a data set, a number of GPUs.

    python -m minialign recipes                                                     # the list of recipes
    python -m minialign.recipes.irft_ultrachat_zephyr --plan h100                   # steps, tokens, memory, hours; loads no weights
    python -m minialign.recipes.irft_ultrachat_zephyr --smoke                       # the same code path at toy size, on any CPU
    torchrun --nproc_per_node 8 -m minialign.recipes.irft_ultrachat_zephyr          # the run; takes every flag of the method
    python -m minialign.recipes.chain_tldr                                          # several recipes, each from what the one before made

--smoke writes a model of the same family with random weights, and rows with the data set's columns, to a temporary folder, both in the
hub's formats. Then it takes two steps with a small version of the recipe's Config, in two processes over gloo if the recipe is for more
than one GPU. With --out the folder stays, and beside it its inputs. --gpus N: smoke or plan for another number of processes.

--plan counts by arithmetic, from the architecture alone:

    memory     what stays on a card (weights, gradients, moments, frozen copies, gathered weights, a reserve), and the largest of what comes
               and goes: a micro-batch in training, one in evaluation, sampling, a whole copy for the export. A plan fits if a tenth is free
    hours      floating-point operations (per parameter and token: 2 forward, 6 with the backward pass, or 4 if adapters are trained, 2 more
               with activation checkpointing), bytes that sampling reads, bytes of weights gathered for a rollout, evaluations, and
               reward_model's last pass. Cards are assumed to run at the fractions in RATES of the speeds in CARDS
    rows       are assumed to be as long as the flags allow, rounded up to 64 positions as on CUDA. So hours are nearly an upper bound: rows
               of m tokens on average take PADDING · m / length of the time
    left out   FSDP2's communication in training, recording CUDA graphs, reading and tokenising, checkpoints, downloads

docs/SCALE.md has the plans of all recipes. No plan has been compared with a run on a GPU yet. `python -m minialign.bench.receipts` takes a
few real steps with the recipes' models on one GPU, with rows of up to 1,024 tokens, and evaluates once. It prints memory and time beside
the plan, and so does --plan if the file is docs/receipts.json. The project calls these measurements receipts.

Which --dtype: bytes a weight, with gradient and AdamW's moments, are 16 in float32, 16 + 2 in mixed and 8 in bfloat16, where weights hardly
move at the papers' learning rates. If mixed, which the recipes take, does not fit, use --lora 64 --dtype bfloat16: 2 bytes a frozen weight,
16 a number of the adapters, which stay float32.

Checked by tests/test_recipes.py: every recipe's --smoke and --plan.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minialign.engine import parallel
from minialign.engine.common import BadInput, pick_dtype
from minialign.engine.look import layer_numbers
from minialign.engine.opening import MOMENTS
from minialign.kernels.linear_logprob import SLICE_BYTES
from minialign.lora import inject
from minialign.model import GPT, GPTConfig
from minialign.sample import rows_that_fit
from minialign.settings import check_config, cli, exit_codes
from minialign.tokenizer import train_bpe
from minialign.weights import load_pretrained, save_pretrained

NEOX = dict(family="gpt_neox", norm="layer", norm_eps=1e-5, activation="gelu", gated=False, parallel_residual=True, qkv_bias=True,
            out_bias=True, mlp_bias=True, tied=False, vocab_size=50304, max_len=2048)
MODELS = {  # from the config.json of each model
    "pythia-1b": GPTConfig(**NEOX, n_layer=16, n_head=8, n_embd=2048, ffn_dim=8192, rotary_dim=64),
    "pythia-1.4b": GPTConfig(**NEOX, n_layer=24, n_head=16, n_embd=2048, ffn_dim=8192, rotary_dim=32),
    "mistral-7b": GPTConfig(family="mistral", vocab_size=32000, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, ffn_dim=14336,
                            max_len=32768, norm_eps=1e-5, tied=False, windows=(4096,) * 32),
    "qwen2.5-1.5b": GPTConfig(family="qwen2", vocab_size=151936, n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, ffn_dim=8960,
                              max_len=32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, tied=True),
}

# name: (number of training rows, an example row with the hub's columns)
ASKED, SAID, OTHER = ({"role": role, "content": text} for role, text in (("user", "ask for tea"), ("assistant", "tea, please."),
                                                                         ("assistant", "no tea.")))
DATA = {
    "HuggingFaceH4/ultrachat_200k": (207_865, {"prompt": "ask for tea", "prompt_id": "1", "messages": [ASKED, SAID, ASKED, SAID]}),
    "HuggingFaceH4/ultrafeedback_binarized": (61_135, {"prompt": "ask for tea", "prompt_id": "1", "chosen": [ASKED, SAID],
                                                       "rejected": [ASKED, OTHER], "messages": [ASKED, SAID]}),
    "trl-lib/tldr": (116_722, {"prompt": "SUBREDDIT: r/tea\n\nTL;DR:", "completion": " tea, please."}),
    "trl-lib/tldr-preference": (92_858, {"prompt": "SUBREDDIT: r/tea\n\nTL;DR:", "chosen": " tea, please.", "rejected": " no tea."}),
    "Anthropic/hh-rlhf": (160_800, {"chosen": "\n\nHuman: tea?\n\nAssistant: please.", "rejected": "\n\nHuman: tea?\n\nAssistant: no."}),
    "openai/gsm8k": (7_473, {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}),
}

# card: (GiB, flops/s of bfloat16 matrix products, bytes/s of a copy, bytes/s from other cards). GiB: what CUDA reports of "80 GB" and "141
# GB". The rest is arithmetic: .8 of the vendor's peaks for products and NVLink, .9 for a copy.
CARDS = {"a100": (79.6, 250e12, 1.8e12, 240e9), "h100": (79.6, 790e12, 3.0e12, 360e9), "h200": (139.8, 790e12, 4.3e12, 360e9)}
RATES = {"train": 0.5, "sample": 0.6}  # fractions of CARDS: of flops/s in training, of bytes/s in sampling
RESERVE = 6  # GiB on each card for the CUDA context, communication buffers and fragmentation: an estimate
FREE = 0.1  # the share of the card that a plan leaves free
PADDING = 1.4  # positions computed for each real token: 1.16 to 1.49 on rows of Anthropic HH, dealt to micro-batches by length
RECEIPTS = Path(__file__).parents[2] / "docs/receipts.json"


@dataclass
class Work:
    """The passes over a sequence that a step of a method makes for one row of its batch, and the models it keeps besides the policy."""

    trained: float  # passes forward and backward
    scored: float  # passes forward only
    sampled: float  # completions sampled
    copies: int = 0  # frozen copies of the policy: the reference, the old policy
    more: int = 0  # trained models of the policy's size: the critic, the learned reward
    judges: int = 0  # reward models named by --reward; every card holds them in full


def work(method, cfg):
    """The Work of a method with its Config. For rft and irl, cfg.policy_step names the method whose policy step is counted."""
    epochs, remembers = getattr(cfg, "epochs", 1), getattr(cfg, "precompute_ref", False)
    offline = {"sft": Work(1, 0, 0), "ift": Work(1, 1, 0), "orpo": Work(2, 0, 0), "reward_model": Work(2, 0, 0),
               "dpo": Work(2, 2, 0, copies=int(not remembers))}
    if method in offline:
        return offline[method]
    if method == "irft":
        return Work(2, 2, 1, copies=0 if remembers else 1 if cfg.ref == "round" else 2)
    judges = sum("/" in name and ".py:" not in name for name in getattr(cfg, "reward", []))
    if method in ("rloo", "grpo", "rebel", "reinforce"):
        return Work(epochs, 1 + judges, 1, copies=1, judges=judges)
    if method == "ppo":
        return Work(2 * epochs, 2 + judges, 1, copies=1, more=1, judges=judges)
    base = int(method == "irl")  # the reward model of the previous round
    if cfg.policy_step.startswith("bon"):
        policy = Work(2 / cfg.n, 1 + 2 / cfg.n, 1)
    else:
        # ppo: 4 epochs of policy and critic; rebel: 4 epochs
        policy = Work({"ppo": 8, "rebel": 4}.get(cfg.policy_step, 1), 3 if cfg.policy_step == "ppo" else 2, 1)
    share, reward = cfg.reward_share, Work(2, 2 * base, 1)
    trained, scored = (share * getattr(reward, f) + (1 - share) * getattr(policy, f) for f in ("trained", "scored"))
    return Work(trained, scored, 1, copies=1 + base, more=1 + (cfg.policy_step == "ppo"))


@dataclass
class Recipe:
    """method: a module. Config: its Config with the paper's numbers. model, data, card: keys of MODELS, DATA, CARDS. gpus: how many."""

    method: object
    Config: type
    model: str
    data: str
    gpus: int
    card: str = "h100"

    @property
    def name(self):
        return self.method.__name__.rpartition(".")[2]


@dataclass
class FullScale:
    """The fields that all recipes set. A recipe's Config inherits them, and they win over the method's."""

    dtype: str = "mixed"
    held_out: float = 0.01


@dataclass
class TLDR(FullScale):
    """The fields that ppo, rloo and rebel share on TL;DR summaries."""

    policy: str = "runs/sft_tldr_pythia/final"                  # made by sft_tldr_pythia --out runs/sft_tldr_pythia
    prompts: str = "trl-lib/tldr"
    reward: list[str] = field(default_factory=lambda: ["runs/reward_model_tldr_pythia/final"])
    missing_eos: float = 1.0                                    # subtracted from the reward; the reference code sets the reward to −1
    steps: int = 1_954                                          # 1,000,000 completions
    batch_size: int = 512
    max_prompt: int = 512
    max_new: int = 53
    tau: float = 0.7
    eval_every: int = 100
    save_every: int = 100


# ---------------------------------------------------------------------------------------------------------------------- plan


def plan(recipe, cfg, card, config=None, prompt=512, rows=None):
    """{'resident', 'phases': {part: GiB on each card}, 'GiB' at the peak, 'hours': {part: h}, …} of a run on `recipe.gpus` cards.

    config: an architecture to use instead of the recipe's. prompt: tokens of the longest prompt, if --max_prompt is not set. rows: how many
    rows the data has, if not as many as the recipe's.
    """
    memory_size, products, copied, link = CARDS[card]
    config, gpus, does = config or MODELS[recipe.model], recipe.gpus, work(recipe.name, cfg)
    rows = DATA[recipe.data][0] if rows is None else rows
    with torch.device("meta"):
        model = GPT(config)
        model = inject(model, cfg.lora, cfg.lora_alpha) if cfg.lora else model
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    weight, wide = (4, 2) if cfg.dtype == "mixed" else (pick_dtype(cfg.dtype).itemsize,) * 2  # bytes of a number: stored, in computation
    held = max(weight, 4) if cfg.lora else weight  # adapters are at least float32
    launched = gpus > 1 or cfg.dtype == "mixed"  # FSDP2 gathers the weights
    slices = gpus if cfg.parallel == "fsdp" else 1
    models = 1 + does.copies + does.more
    remembers = getattr(cfg, "precompute_ref", False)

    max_new = getattr(cfg, "max_new", 0)
    sampled = (getattr(cfg, "max_prompt", None) or prompt) + max_new  # tokens of a sampled row
    longest = -(-(max(getattr(cfg, "max_len", 0), sampled * bool(does.sampled)) - 1) // 64) * 64  # positions, in whole 64s
    length = longest
    if does.sampled and recipe.name != "irft" and hasattr(cfg, "max_len"):  # half the rows are demonstrations, half are sampled. (irft
        length = (longest + -(-(sampled - 1) // 64) * 64) / 2  # stacks both, so both are as long as the longer.)
    share = -(-cfg.batch_size // gpus)  # rows of a step on one card
    micro = min(cfg.micro_batch or share, share)
    evaluated = getattr(cfg, "eval_batch", 0) or micro
    # Sequences of a row, or passes over one, whose activations are kept at the same time for the backward pass.
    at_once = 2 if recipe.name in ("dpo", "orpo", "irft", "reward_model", "ppo", "rft", "irl") else 1
    layer, passing = layer_numbers(config)
    stored, again = (config.n_layer * config.n_embd, layer) if cfg.activation_checkpointing else (config.n_layer * layer, 0)
    ends = 8 * config.n_embd  # embeddings, final norm, and what enters the log-probs
    root = everything - config.n_layer * block  # embeddings and head: they stay gathered until the backward pass ends
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * wide
    scores = 2 * SLICE_BYTES["cuda"] * (recipe.name != "reward_model")  # of log-probs: they come before the first layer's backward pass

    def drawing(n):  # n rows together; when a quarter of them is finished, the others' cache is copied
        inside = n * (1.75 * cache * sampled + (sampled - max_new) * passing * wide + 16 * config.vocab_size)
        return (everything * wide * launched + inside) / 2**30

    resident = {
        "weights": everything * weight * (1 + does.more) / slices,
        "gradients and moments": (1 + MOMENTS[cfg.optimizer]) * trained * held * (1 + does.more) / slices,
        "frozen copies": (trained * held if cfg.lora and not launched else everything * weight) * does.copies / slices,
        "reward models of --reward": everything * wide * does.judges,
        "embeddings and heads, gathered": root * models * wide * launched,
        "reserve": RESERVE * 2**30,
    }
    resident = {part: size / 2**30 for part, size in resident.items() if size}
    gathered = 2 * block * wide * launched
    unsummed = ((root if not cfg.lora else 0) + trained / config.n_layer) * (wide + 4) * launched  # gradients before they are summed
    asked = share if does.sampled else -(-4 // gpus) if max_new else 0  # (an evaluation samples at least four answers)
    if recipe.name == "irft":  # the policy that answers does not change within a round
        asked = share * (cfg.steps // cfg.rounds)
    drawn = min(asked, rows_that_fit(config, sampled, wide, memory_size * 2**30))
    trains, passed = at_once * micro * longest, (1 + (recipe.name in ("dpo", "orpo"))) * evaluated * longest  # positions
    training = max(scores + 16 * config.n_embd * trains, (again + passing) * wide * trains) + (stored + ends) * wide * trains
    phases = {
        "a micro-batch in training": (gathered + unsummed + training) / 2**30,
        "a micro-batch in evaluation": (gathered + max(scores, passing * wide * passed) + ends * wide * passed) / 2**30,
        "sampling" if max_new else "a whole copy to export": drawing(drawn),
    }

    sequences, evaluations = cfg.steps * cfg.batch_size, -(-cfg.steps // cfg.eval_every)
    held_out = int(rows * cfg.held_out)
    used = min(sequences, rows - held_out) + held_out if recipe.name == "dpo" and remembers else sequences  # scored once, not at each epoch
    backward = 2 if cfg.lora else 4  # adapters: frozen weights get no gradient, but gradients pass through them
    passes = (2 + backward + 2 * cfg.activation_checkpointing) * does.trained * sequences + 2 * does.scored * used
    rollouts = does.sampled * cfg.steps * (share / drawn if recipe.name == "irft" else 1)
    alone = 1 if recipe.name == "irft" else -(-share // max(1, drawn))  # passes of a rollout
    online = recipe.name in ("rloo", "grpo", "rebel", "reinforce", "ppo")  # these evaluate by sampling
    sides = 2 * (1 + does.copies) if recipe.name in ("dpo", "orpo", "reward_model") else 1
    reads = cache * (sampled - max_new / 2)  # of a row, for a token
    drawn_bytes = max_new * (rollouts * (2 * everything * alone + reads * (drawn if recipe.name == "irft" else share))
                             + evaluations * (2 * everything * (alone if online else 1) + reads * (share if online else 4 / gpus)))
    rate = gpus * products * RATES["train"] * 3600
    gathers = (rollouts + evaluations + 1) * wide * everything * (1 - 1 / gpus) * launched
    hours = {
        "training and scoring": passes * everything * length / rate,
        "sampling": drawn_bytes / (copied * RATES["sample"]) / 3600,
        "whole copies, gathered": gathers / link / 3600,
        "evaluation": 0 if online else 2 * evaluations * sides * held_out * everything * longest / rate,
        "reward_model's last pass": 2 * (rows - held_out) * everything * longest / rate * (recipe.name == "reward_model"),
    }
    stored = {"irl": does.copies, "irft": min(does.copies, 1)}.get(recipe.name, 0)  # frozen copies that change at every round
    checkpoint = everything * weight * (1 + does.more + stored) + MOMENTS[cfg.optimizer] * trained * held * (1 + does.more)
    return {"resident": resident, "phases": phases, "GiB": sum(resident.values()) + max(phases.values()), "card": memory_size,
            "steps": cfg.steps, "length": longest, "tokens": length * (sequences * does.trained + used * does.scored),
            "host": {"loading": gpus * everything * 2 * launched / 2**30, "saving": checkpoint * launched / 2**30},
            "parameters": everything, "trained": trained, "drawn": drawn, "hours": {part: h for part, h in hours.items() if h}}


def fits(numbers):
    """Whether a plan leaves the share FREE of the card."""
    return numbers["GiB"] <= (1 - FREE) * numbers["card"]


def what_fits(recipe, cfg, card):
    """The flags of the first change with which a plan fits; None if none does."""
    for gpus in (recipe.gpus, 2 * recipe.gpus, 4 * recipe.gpus):
        for change in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": True, "micro_batch": 1}):
            changed = dataclasses.replace(cfg, **change)
            if cfg.batch_size % gpus == 0 and fits(plan(dataclasses.replace(recipe, gpus=gpus), changed, card)):
                flags = [f"--nproc_per_node {gpus}"] * (gpus != recipe.gpus)
                flags += [f"--{name}" + f" {value}" * (value is not True) for name, value in change.items() if getattr(cfg, name) != value]
                return " ".join(flags)
    return None


def prompts_in(recipe, cfg):
    """How many rows of the data set a run uses."""
    groups = {"rebel": 2, "ppo": 1, "bon_sft": getattr(cfg, "n", 1), "bon_dpo": getattr(cfg, "n", 1)}
    if recipe.name in ("rft", "irl"):
        of_a_prompt = groups.get(cfg.policy_step, cfg.group_size)
        return cfg.steps * cfg.batch_size * (cfg.reward_share + (1 - cfg.reward_share) / of_a_prompt)
    return cfg.steps * cfg.batch_size / groups.get(recipe.name, getattr(cfg, "group_size", 1))


def print_plan(recipe, cfg, card):
    numbers = plan(recipe, cfg, card)
    rows = DATA[recipe.data][0]
    layout = f"{recipe.gpus} × {card.upper()}, {cfg.parallel}, {cfg.dtype}" if recipe.gpus > 1 else f"one {card.upper()}, {cfg.dtype}"
    print(f"{recipe.name} of {recipe.model} on {recipe.data} ({rows:,} rows): {layout}")
    print(f"  {numbers['parameters']:,} parameters, {numbers['trained']:,} trained")
    passes = prompts_in(recipe, cfg) / rows
    print(f"  {numbers['steps']:,} steps of {cfg.batch_size} rows, {passes:.2f} passes over the data; "
          f"at most {numbers['tokens']:.3g} tokens pass through a model")
    for part, size in numbers["resident"].items():
        print(f"  {part:32} {size:8.2f} GiB on each")
    print("  and the largest of")
    for part, size in numbers["phases"].items():
        print(f"    {part:30} {size:8.2f} GiB")
    print(f"  {'together':32} {numbers['GiB']:8.2f} GiB of {numbers['card']}, "
          + ("of which a tenth stays free" if fits(numbers) else "and a tenth should stay free: DOES NOT FIT; "
             + (f"it does with {flags}" if (flags := what_fits(recipe, cfg, card)) else "use --lora 64")))
    if any(numbers["host"].values()):
        loading, saving = numbers["host"].values()
        print(f"  {'host, for all processes, at most':32} {loading:8.1f} GiB while loading, {saving:.1f} while saving a checkpoint")
    for part, hours in numbers["hours"].items():
        print(f"  {part:32} {hours:8.2f} hours")
    print(f"  {'together':32} {sum(numbers['hours'].values()):8.2f} hours, at {RATES['train']:.0%} of the card's matrix-product rate and "
          f"{RATES['sample']:.0%} of its bandwidth")
    print(f"  every row is taken to have {numbers['length']:,} positions; shorter rows take {PADDING:g} positions for each of their tokens")
    if numbers["drawn"]:
        print(f"  a card samples {numbers['drawn']} rows together")
    print_receipts(recipe)
    return numbers


def print_receipts(recipe, file=None):
    """What was measured of the recipe's model and method on a GPU, if docs/receipts.json is there."""
    file = file or RECEIPTS
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    for row in record["rows"]:
        if (row["model"], row["method"]) == (recipe.model, recipe.name):
            print(f"  receipt of {record['device']}, {record['date']}, batch {record['batch_size']}, micro-batch {record['micro_batch']}: "
                  + receipt_line(row))


def receipt_line(row):
    """A row of the receipts as text: measured memory and time, with the planned ones."""
    memory = {name: "" if row[name] is None else f"{row[name]:.1f} GiB (planned {row[f'planned {name}']:.1f}), "
              for name in ("GiB", "evaluation GiB")}
    return (f"{memory['GiB']}{row['seconds']:.2f} s a step (planned {row['planned seconds']:.2f}), {row['tokens/s']:,.0f} tokens/s; an "
            f"evaluation {memory['evaluation GiB']}{row['evaluation seconds']:.2f} s (planned {row['planned evaluation seconds']:.2f})")


# --------------------------------------------------------------------------------------------------------------------- smoke

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def small(config, vocab_size):
    """The same architecture with two layers of 32 channels."""
    grouped = config.n_kv_head < config.n_head
    return dataclasses.replace(config, vocab_size=vocab_size, n_layer=2, n_head=4, n_kv_head=2 if grouped else 4, n_embd=32, head_dim=8,
                               ffn_dim=64, max_len=256, rotary_dim=max(2, 8 * config.rotary_dim // config.head_dim // 2 * 2),
                               windows=tuple(w and 64 for w in config.windows[:2]))


def write_smoke_inputs(recipe, cfg, folder, given=()):
    """Write a model and data in the hub's formats. Returns the recipe's Config with their paths and with small sizes.

    given: fields that keep their value.
    """
    row = DATA[recipe.data][1]
    rows = [json.loads(json.dumps(row).replace("tea", "tea, please, now"[: 3 + 4 * (i % 4)])) for i in range(12)]  # of different lengths
    tokenizer = train_bpe([json.dumps(rows)], 300)
    if "messages" in row and not recipe.model.startswith("pythia"):
        tokenizer.settings["chat_template"] = TEMPLATE
    torch.manual_seed(0)
    model = GPT(small(MODELS[recipe.model], tokenizer.vocab_size))
    save_pretrained(model, folder / "policy", tokenizer)
    save_pretrained(model.with_scalar_head(), folder / "reward", tokenizer)
    source = next(name for name in ("demos", "pairs", "prompts") if hasattr(cfg, name))
    _, _, split = getattr(cfg, source).partition(":")
    try:
        from datasets import Dataset

        (folder / "hub" / "data").mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / "hub" / "data" / f"{split or 'train'}-00000-of-00001.parquet")
        data = f"{folder / 'hub'}:{split or 'train'}"
    except ImportError:  # the same columns, one JSON object a line
        data = str(folder / "rows.jsonl")
        Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sizes = {"batch_size": 8, "micro_batch": 2, "steps": 2, "max_len": 128, "max_prompt": 64, "max_new": 4, "group_size": 4,
             "n": 4, "lora": 2 if cfg.lora else 0, "epochs": min(2, getattr(cfg, "epochs", 1)), "device": "cpu", "eval_every": 2,
             "out": str(folder / "run"), "held_out": 0.25, "policy": str(folder / "policy"), source: data, "save_every": 1}
    sizes["rounds"] = 1 if hasattr(cfg, "reward_share") else min(2, getattr(cfg, "rounds", 1))  # a round of rft or irl needs two steps
    if any("/" in name for name in getattr(cfg, "reward", [])):
        sizes["reward"] = [str(folder / "reward")]
    if "/" in getattr(cfg, "value", ""):
        sizes["value"] = str(folder / "reward")
    if recipe.gpus == 1 and cfg.dtype == "bfloat16":
        sizes["dtype"] = "float32"  # bfloat16 on a CPU is not like bfloat16 on a GPU
    fields = {field.name for field in dataclasses.fields(cfg)}
    return dataclasses.replace(cfg, **{name: value for name, value in sizes.items() if name in fields and name not in given})


def smoke(recipe, cfg, words):
    """Take two steps, export, and load the export: in this process, or in two over gloo if the recipe is for several GPUs.

    --out, --policy, --reward and --value keep what words give them; --resume continues such a run.
    """
    if recipe.gpus > 1 and not parallel.launched():
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", own_name(), "--smoke", *words]
        raise SystemExit(wait_for(subprocess.Popen([sys.executable, *command])))
    parallel.start()
    given = {word[2:].partition("=")[0] for word in words} & {"out", "policy", "reward", "value"}
    kept = cfg.resume or cfg.out
    with contextlib.nullcontext(f"{kept}-inputs") if kept else tempfile.TemporaryDirectory() as folder:
        folder = Path(parallel.on_main(lambda: folder))
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        done = recipe.method.main(cfg if cfg.resume else parallel.on_main(write_smoke_inputs, recipe, cfg, folder, given))
        load_pretrained(done / "final")
        parallel.gather(None)  # wait for all processes: the first one removes the folder
    print(f"smoke: {own_name()} ran in {parallel.world()} process{'es' * (parallel.world() > 1)}")


def own_name():
    return sys.modules["__main__"].__spec__.name


FLAGS = """
Besides these: --plan CARD (a100, h100, h200), --smoke, and with one of the two --gpus N.
"""


def main(recipe):
    """The command line of a recipe file: the method's flags, --smoke, --plan CARD, and with one of these --gpus N."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--plan", nargs="?", const=recipe.card)
    parser.add_argument("--gpus", type=int, default=0)
    asked, words = parser.parse_known_args()
    with exit_codes(own_name()):
        cfg = cli(recipe.Config, words, prog=f"python -m {own_name()}", description=sys.modules["__main__"].__doc__ + FLAGS)
        check_config(cfg)
        if asked.gpus and not (asked.plan or asked.smoke):
            raise BadInput(f"--gpus {asked.gpus}: is for --plan and --smoke; a run has as many processes as torchrun --nproc_per_node says")
        recipe = on_gpus(recipe, asked.gpus)
        if asked.plan:
            print_plan(recipe, cfg, known_card(asked.plan))
        elif asked.smoke:
            smoke(recipe, cfg, words)
        else:
            recipe.method.main(cfg)


def on_gpus(recipe, gpus):
    """The recipe with another number of GPUs; 0 leaves it as it is."""
    if gpus < 0 or gpus and recipe.Config().batch_size % gpus:
        raise BadInput(f"--gpus {gpus}: must be above 0 and divide the batch size {recipe.Config().batch_size} of {recipe.name}")
    return dataclasses.replace(recipe, gpus=gpus or recipe.gpus)


def known_card(name):
    if name not in CARDS:
        raise BadInput(f"--plan {name}: unknown card; use one of {', '.join(CARDS)}")
    return name


# -------------------------------------------------------------------------------------------------------------------- chains


@dataclass
class Stage:
    """One recipe of a chain. policy, reward, value: which folder of an earlier stage it takes, like sft_tldr_pythia/final."""

    recipe: str
    policy: str = ""
    reward: str = ""
    value: str = ""

    def open(self):
        return importlib.import_module(f"minialign.recipes.{self.recipe}").RECIPE


@dataclass
class ChainConfig:
    smoke: bool = False             # run all stages at toy size, on any CPU, in a temporary folder unless --out names one
    plan: str = ""                  # a100, h100 or h200: print what each stage needs, and the hours of all; loads no weights
    gpus: int = 0                   # processes of each stage; 0 = as many as its recipe says
    out: str = ""                   # the folder in which each stage has its run folder; default: runs


def chain(stages):
    """The command line of a chain file: run its stages in order, each in a process of its own (torchrun, if it is for several GPUs).

    Called again, it skips the stages that have their final/, and continues with --resume the one that was stopped.
    """
    with exit_codes(own_name()):
        cfg = cli(ChainConfig, sys.argv[1:], prog=f"python -m {own_name()}", description=sys.modules["__main__"].__doc__)
        for stage in stages:
            on_gpus(stage.open(), cfg.gpus)
        if cfg.plan:
            plan_chain(stages, cfg)
        elif cfg.smoke and not cfg.out:
            with tempfile.TemporaryDirectory() as folder:
                run_chain(stages, dataclasses.replace(cfg, out=folder))
        else:
            run_chain(stages, dataclasses.replace(cfg, out=cfg.out or "runs"))


def plan_chain(stages, cfg):
    """Print the plan of each stage, the hours of all, and whether all fit. Returns the hours."""
    hours, card_hours = 0.0, 0.0
    for stage in stages:
        recipe = on_gpus(stage.open(), cfg.gpus)
        numbers = print_plan(recipe, recipe.Config(), known_card(cfg.plan))
        hours += sum(numbers["hours"].values())
        card_hours += sum(numbers["hours"].values()) * recipe.gpus
        print()
    print(f"{own_name()}: {hours:.2f} hours for {len(stages)} stages, {card_hours:.2f} hours of a card")
    return hours


def command_of(stage, cfg):
    """The command of a stage: a list of words. It resumes a run that has begun."""
    folder, recipe = Path(cfg.out) / stage.recipe, on_gpus(stage.open(), cfg.gpus)
    words = ["--resume", str(folder)] if (folder / "config.json").is_file() else ["--out", str(folder)]
    if words[0] == "--out":
        taken = {"policy": stage.policy, "reward": stage.reward, "value": stage.value}
        words += [word for flag, path in taken.items() if path for word in (f"--{flag}", str(Path(cfg.out) / path))]
    if cfg.smoke:  # (starts its processes itself)
        launcher, words = [], ["--smoke", *(["--gpus", str(cfg.gpus)] if cfg.gpus else []), *words]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(recipe.gpus), "-m"] * (recipe.gpus > 1)
    return [sys.executable, "-m", *launcher, f"minialign.recipes.{stage.recipe}", *words]


def run_chain(stages, cfg):
    """Run the stages that are not finished. Raises SystemExit with the exit code of a stage that fails, or 1 if it was stopped."""
    for number, stage in enumerate(stages, start=1):
        final = Path(cfg.out) / stage.recipe / "final"
        if (final / "config.json").is_file():  # (written last)
            print(f"stage {number}/{len(stages)}: {stage.recipe} is finished ({final})", flush=True)
            continue
        command = command_of(stage, cfg)
        print(f"stage {number}/{len(stages)}: {' '.join(command[1:])}", flush=True)
        code = wait_for(subprocess.Popen(command))
        if code or not (final / "config.json").is_file():
            how = f"failed with exit code {code}, for the reason above" if code > 0 else "was stopped"
            how = f"was ended by signal {-code}" if code < 0 else how
            print(f"{own_name()}: {stage.recipe} {how}; the same command again continues there", file=sys.stderr)
            raise SystemExit(code if code > 0 else 128 - code if code else 1)
    print(f"all {len(stages)} stages are finished: {final}")


def wait_for(process):
    """The exit code of a stage. A SIGTERM is passed on to it, and Ctrl-C reaches it by itself; then it saves before it ends."""
    earlier = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()
    finally:
        signal.signal(signal.SIGTERM, earlier)
