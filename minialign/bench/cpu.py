"""Measure speed and memory as ratios within one run. In each round every implementation does the same work in turn; the first is the unit.

Seconds alone depend on the machine and its other load as much as on the code. So each ratio to the first implementation is taken within a
round, and the table gives its median over the rounds, with the least and the most. Each row also has the error against float64 and the
peak of memory, so that a fast but wrong result shows. The bare matrix products of the same work are the floor. torch uses one thread unless
--threads says otherwise: on a busy machine two threads can be ten times slower.

    python -m minialign.bench                                # CPU: log-probs, generation, steps of SFT, DPO and GRPO, start-up; ten minutes
    python -m minialign.bench --only log-probs --n 2048 --rounds 9
    python -m minialign.bench --gpu                          # one CUDA card: kernels, log-probs, decoding, training steps (gpu.py)

Peers are measured if they are installed (`pip install -r requirements-dev.txt`): torch's own F.linear_cross_entropy, TRL's chunked
log-probs and its trainers, transformers' generate. Memory is this process's peak above what it held before (Linux only). Its unit is the
size of the head's gradient, which every implementation must return.

Checked by tests/bench/test_cpu.py.
"""

import contextlib
import ctypes
import functools
import importlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from minialign.data import plain_text, read_preferences
from minialign.engine import common
from minialign.engine.common import BadInput, describe_device, environment, write_atomic
from minialign.kernels.linear_logprob import logits_of
from minialign.logps import linear_logps
from minialign.model import GPT, GPTConfig, KVCache
from minialign.sample import sample, stepper
from minialign.tokenizer import train_bpe
from minialign.weights import save_pretrained

TABLES = ("log-probs", "generation", "steps", "ragged", "start-up")
SHAPES = {"tiny": dict(n_embd=256, vocab_size=8192), "70m": dict(n_embd=512, vocab_size=50304)}  # GPT-NeoX, six layers each
STEPS = {"small": (16, dict(n_embd=128, vocab_size=2048, n_layer=4, n_head=4)), "70m": (8, SHAPES["70m"])}  # (rows of a step, shape)


@dataclass
class Config:
    n: int = 1024                   # N of the log-prob tables: scored tokens
    c: int = 512                    # C: channels
    v: int = 50304                  # V: vocabulary
    rounds: int = 5                 # rounds, each with one run of every implementation; one more goes first and is not counted
    threads: int = 1                # threads that torch uses
    only: list[str] = field(default_factory=lambda: list(TABLES))  # which tables to measure
    pairs: str = ""                 # a file of preferences for the ragged table; default: rows with log-normal lengths
    gpu: bool = False               # measure one CUDA card instead, with the tables of gpu.py
    out: str = "runs/bench.json"    # file for the numbers


# ------------------------------------------------------------------------------------------------------------- log-probs


def log_prob_bodies(entropy):
    """{name: function of hidden, weight, targets -> logps, entropy or None}. The others are divided by the first."""
    def ours(body):
        return lambda h, w, y: linear_logps(h, w, y, entropy=entropy, body=body)

    bodies = {"naive: log_softmax of all logits": ours("naive"), "minialign, chunked": ours("chunked")}
    if hasattr(F, "linear_cross_entropy") and not entropy:
        bodies["torch F.linear_cross_entropy"] = lambda h, w, y: (-F.linear_cross_entropy(h, w, y, reduction="none"), None)
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    except ImportError:
        return bodies
    outputs, chunk = (("entropy",) if entropy else ()), 32768  # its default width
    bodies["trl ChunkedLogProbFunction"] = lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, chunk, None, 1.0, outputs)[:2]
    return bodies


def random_inputs(cfg, seed=0):
    """hidden (N, C), weight (V, C) with logits of standard deviation 3, targets (N,), and upstream gradients of both outputs (N,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(cfg.n, cfg.c, generator=generator), torch.randn(cfg.v, cfg.c, generator=generator) * 3 / cfg.c**0.5
    upstream = torch.randn(2, cfg.n, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(cfg.v, (cfg.n,), generator=generator), upstream


def forward_backward(body, hidden, weight, targets, upstream):
    """Log-probs, entropies (or None) and both gradients."""
    logps, entropies = body(hidden, weight, targets)
    loss = (upstream[0].to(logps.dtype) * logps).sum()
    if entropies is not None:
        loss = loss + (upstream[1].to(logps.dtype) * entropies).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return logps.detach(), None if entropies is None else entropies.detach(), *grads


def peak_above(work):
    """(what work() returns, peak memory in bytes above what was held before, or None where the system does not report it).

    It first runs work() once, because libraries allocate things at their first call. Then it makes the C library return its freed memory
    to the system: otherwise the second run would reuse that memory and seem to need none.
    """
    try:
        work()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        result = work()
        return result, resident("VmHWM") - before
    except OSError:
        return work(), None


def resident(field):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def rounds_of(works, rounds):
    """{name: [seconds of each round]}. In a round the works run in turn. An extra round at the start is not counted."""
    seconds = {name: [] for name in works}
    for k in range(rounds + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if k:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratios(seconds):
    """{name: (median, least, most) over the rounds of the ratio to the first name in the same round}."""
    base = next(iter(seconds.values()))
    of = {name: [s / b for s, b in zip(values, base, strict=True)] for name, values in seconds.items()}
    return {name: (statistics.median(values), min(values), max(values)) for name, values in of.items()}


def table(seconds, prefix=""):
    """One row for each name: its ratio to the first name, and its median seconds."""
    return [{"name": prefix + name, "ratio": median, "least": least, "most": most, "seconds": statistics.median(seconds[name])}
            for name, (median, least, most) in ratios(seconds).items()]


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def log_probs(cfg, entropy):
    """Rows of the table: one dict for each implementation."""
    *tensors, upstream = random_inputs(cfg)
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]
    exact = forward_backward(log_prob_bodies(entropy)["naive: log_softmax of all logits"], *wide, upstream)
    bodies, rows = log_prob_bodies(entropy), []
    for name, body in bodies.items():
        found, peak = peak_above(lambda body=body: forward_backward(body, *tensors, upstream))
        rows.append({
            "name": name, "error": float((found[0] - exact[0]).abs().max()), "gradient error": max(map(relative, found[2:], exact[2:])),
            "entropy error": float((found[1] - exact[1]).abs().max()) if entropy else None,
            "memory": None if peak is None else peak / (4 * cfg.v * cfg.c),
        })
        del found
    seconds = rounds_of({name: lambda body=body: forward_backward(body, *tensors, upstream) for name, body in bodies.items()}, cfg.rounds)
    for row, (median, least, most) in zip(rows, ratios(seconds).values(), strict=True):
        row |= {"seconds": statistics.median(seconds[row["name"]]), "ratio": median, "least": least, "most": most}
    return rows


# ------------------------------------------------------------------------------------------------------------ generation


def products(policy, tokens, scored, *, backward=False):
    """The bare matrix products of a pass over `tokens` tokens, with the head on `scored` of them: the floor for the same computation."""
    for module in policy.modules():
        if isinstance(module, torch.nn.Linear):
            x = torch.zeros(scored if module is policy.head else tokens, module.in_features)
            y = x @ module.weight.T
            if backward:
                torch.mm(y, module.weight), torch.mm(y.T, x)


def neox(n_embd, vocab_size, n_layer=6, n_head=8):
    """A GPT-NeoX with random weights and rotary embeddings on a quarter of each head."""
    torch.manual_seed(0)
    size = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, rotary_dim=n_embd // n_head // 4, max_len=1024)
    kind = dict(norm="layer", activation="gelu", gated=False, parallel_residual=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    return GPT(GPTConfig(vocab_size, **size, **kind, tied=False, family="gpt_neox")).requires_grad_(False)


def generation(rounds, shapes=SHAPES, batch=16, prompt=32, new=128):
    """Rows of the table: transformers' generate, ours, and the bare products. All sample the same model without a stop token."""
    from transformers import AutoModelForCausalLM

    rows = []
    for shape, size in shapes.items():
        policy = neox(**size)
        prompts = torch.randint(size["vocab_size"], (batch, prompt), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder, quiet():
            save_pretrained(policy, folder)
            peer = AutoModelForCausalLM.from_pretrained(folder).eval()
        how = dict(do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None)

        def floor(policy=policy):
            products(policy, batch * prompt, batch)
            for _ in range(new - 1):
                products(policy, batch, batch)

        works = {"transformers generate": lambda peer=peer, prompts=prompts, how=how: peer.generate(
                     prompts, attention_mask=torch.ones_like(prompts), **how),
                 "minialign": lambda policy=policy, prompts=prompts: sample(policy, prompts.tolist(), max_new=new, eos_id=None, seed=0),
                 "bare products": floor}
        with quiet(), torch.no_grad():
            rows += table(rounds_of(works, rounds), f"{shape}: ")
    return rows


@torch.no_grad()
def decode_cost(rounds, batches=(1, 16), positions=(64, 512), count=16):
    """Rows of the table: the time of a token at the later position over one at the earlier, for the 70m shape."""
    policy, rows = neox(**SHAPES["70m"]), []
    for batch in batches:
        token = torch.zeros(batch, dtype=torch.long)

        def tokens(position, batch=batch, token=token):
            cache = KVCache(policy.config, batch, position + count)
            cache.lengths += position
            cache.longest = position
            step = stepper(policy, cache)
            begun = time.perf_counter()
            for _ in range(count):
                logits_of(step(token), policy.head_weight)
            return (time.perf_counter() - begun) / count

        seconds = {f"position {position}": [] for position in positions}
        for k in range(rounds + 1):
            for position in positions:
                spent = tokens(position)
                if k:
                    seconds[f"position {position}"].append(spent)
        rows += table(seconds, f"batch {batch}: ")
    return rows


# ------------------------------------------------------------------------------------------------ whole steps of a method


class Stopwatch:
    """Measures the seconds between optimizer steps in any training loop: torch calls its hook after each step."""

    def __enter__(self):
        self.marks = []
        self.hook = register_optimizer_step_post_hook(lambda *_: self.marks.append(time.perf_counter()))
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def median(self):
        return statistics.median(b - a for a, b in zip(self.marks, self.marks[1:], strict=False))


def own_sources(n_prompt, n_completion):
    """(tokenizer, [(prompt, completion)]) from this package's own source text, cut into pieces of n_prompt + n_completion tokens."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    tokenizer = train_bpe(texts, 2048)
    ids, size = [i for text in texts for i in tokenizer.encode(text)], n_prompt + n_completion
    pieces = [ids[start : start + size] for start in range(0, len(ids) - size, size)]
    return tokenizer, [(tokenizer.decode(piece[:n_prompt]), tokenizer.decode(piece[n_prompt:])) for piece in pieces]


def letters(completions, **_):
    return [float(text.count("e")) for text in completions]


NEVER = 10**9


def own_run(folder, name, settings):
    """A function that takes a number of steps with a method's main(), from the policy in folder/policy."""
    method = importlib.import_module(f"minialign.methods.{name}")

    def run(steps):
        method.main(method.Config(
            policy=str(folder / "policy"), device="cpu", held_out=0.0, warmup=0.0, schedule="constant", lr=1e-5, steps=steps,
            log_every=NEVER, eval_every=NEVER, save_every=NEVER, out=str(folder / f"{name}-{time.time_ns()}"), **settings))

    return run


def trl_run(folder, name, records, settings, reward=None):
    """A function that takes a number of steps with TRL's trainer of the same method."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(steps):
        args = getattr(trl, f"{name}Config")(
            output_dir=str(folder / "trl"), max_steps=steps, learning_rate=1e-5, lr_scheduler_type="constant", max_grad_norm=1.0,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], save_strategy="no", logging_steps=NEVER,
            disable_tqdm=True, **settings)
        getattr(trl, f"{name}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(folder / "policy"), args=args, train_dataset=datasets.Dataset.from_list(records),
            processing_class=AutoTokenizer.from_pretrained(folder / "policy"), **({"reward_funcs": reward} if reward else {})).train()

    return run


def trainers(folder, shape, rows, n_prompt, n_completion):
    """{method: {name: function that takes a number of steps}}: TRL's trainer, our main(), and the bare products, on the same texts."""
    tokenizer, pieces = own_sources(n_prompt, n_completion)
    policy = neox(**shape)
    save_pretrained(policy, folder / "policy", tokenizer)
    demos = [{"prompt": x, "completion": y} for x, y in pieces]
    pairs = [{"prompt": x, "chosen": y, "rejected": other} for (x, y), (_, other) in zip(pieces, pieces[1:], strict=False)]
    for name, records in (("demos", demos), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (folder / "e.py").write_text("def letters(prompts, completions):\n    return [float(text.count('e')) for text in completions]\n")
    longest = 2 * (n_prompt + n_completion)  # (a decoded text may have another number of tokens when encoded again)
    ours, theirs = functools.partial(own_run, folder), functools.partial(trl_run, folder)
    tokens, scored = rows * (n_prompt + n_completion), rows * n_completion

    def bare(reference, generated):
        """The products of a training pass, of a reference's pass if there is one, and of decoding `generated` tokens."""
        def once():
            products(policy, tokens, scored, backward=True)
            if reference:
                products(policy, tokens, scored)
            for _ in range(generated):
                products(policy, rows, rows)

        def run(steps):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            for _ in range(steps):
                with torch.no_grad():
                    once()
                optimizer.step()  # triggers the stopwatch

        return run

    demos_file, pairs_file, reward = (str(folder / name) for name in ("demos.jsonl", "pairs.jsonl", "e.py:letters"))
    batch, group, prompts = dict(batch_size=rows), dict(group_size=8, max_new=n_completion), [{"prompt": x} for x, _ in pieces]
    return {
        f"SFT, {rows} rows": {
            "trl": theirs("SFT", demos, dict(per_device_train_batch_size=rows, max_length=longest)),
            "minialign": ours("sft", dict(demos=demos_file, max_len=longest, **batch)), "bare products": bare(False, 0)},
        f"DPO, {rows // 2} pairs": {
            "trl": theirs("DPO", pairs, dict(per_device_train_batch_size=rows // 2, max_length=longest, beta=0.1)),
            "minialign": ours("dpo", dict(pairs=pairs_file, max_len=longest, batch_size=rows // 2)), "bare products": bare(True, 0)},
        f"GRPO, {rows} completions": {
            "trl": theirs("GRPO", prompts, dict(per_device_train_batch_size=rows, num_generations=8, beta=0.04,
                                                max_completion_length=n_completion), letters),
            "minialign": ours("grpo", dict(prompts=demos_file, beta=0.04, reward=[reward], **group, **batch)),
            "bare products": bare(True, n_completion)},
    }


def training_steps(rounds, count=4, shapes=STEPS, n_prompt=32, n_completion=64):
    """Rows of the table: seconds of an optimizer step (the median of `count` steps) over TRL's in the same round."""
    made = []
    for shape, (rows, size) in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            for name, loops in trainers(Path(folder), size, rows, n_prompt, n_completion).items():
                seconds = {who: [] for who in loops}
                for _ in range(rounds):
                    for who, run in loops.items():
                        with Stopwatch() as watch, quiet():
                            run(count)
                        seconds[who].append(watch.median())
                made += table(seconds, f"{shape}, {name}: ")
    return made


def ragged_rows(tokenizer, pairs):
    """16 · 8 preference rows with the lengths of those in a file, or with log-normal ones (median 100 tokens of a prompt and 50 of an
    answer, σ .9, at most 400 and 200), cut from this package's own source text."""
    lengths = torch.Generator().manual_seed(0)
    if pairs:
        rows = read_preferences(pairs)
        picked = torch.randperm(len(rows), generator=lengths)[:128].tolist()
        return [{"prompt": plain_text(rows[i].prompt), "chosen": plain_text(rows[i].chosen), "rejected": plain_text(rows[i].rejected)}
                for i in picked]
    ids = [i for path in sorted(Path(__file__).parents[1].rglob("*.py")) for i in tokenizer.encode(path.read_text(encoding="utf-8"))]
    normal, start, made = torch.randn(128, 3, generator=lengths), 0, []
    for row in (normal * 0.9).exp().tolist():
        pieces = []
        for name, factor, median, most in zip(("prompt", "chosen", "rejected"), row, (100, 50, 50), (400, 200, 200), strict=True):
            size = min(most, max(2, int(median * factor)))
            pieces.append((name, tokenizer.decode(ids[start : start + size])))
            start = (start + size) % (len(ids) - 1000)
        made.append(dict(pieces))
    return made


def ragged(rounds, pairs="", count=4, shape=STEPS["small"][1]):
    """Rows of the table: a DPO step of 16 ragged pairs in passes of 2 by TRL and by us, dealt by length and as they come. Beside the time:
    the tokens that went through the model for each real one, padding included, counted at its embedding."""
    tokenizer, _ = own_sources(32, 64)
    rows = ragged_rows(tokenizer, pairs)
    sides = [[tokenizer.encode(row["prompt"] + row[side]) for row in rows] for side in ("chosen", "rejected")]
    real = sum(min(512, len(ids)) for side in sides for ids in side) / len(rows)  # tokens of a pair
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        save_pretrained(neox(**shape), folder / "policy", tokenizer)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        own = own_run(folder, "dpo", dict(pairs=str(folder / "pairs.jsonl"), max_len=512, batch_size=16, micro_batch=2))

        def as_they_come(steps):
            dealt, common.passes = common.passes, lambda lengths, size: common.split_micro(range(len(lengths)), size)
            try:
                own(steps)
            finally:
                common.passes = dealt

        works = {"trl": trl_run(folder, "DPO", rows, dict(per_device_train_batch_size=2, gradient_accumulation_steps=8, max_length=512,
                                                          beta=0.1)),
                 "minialign, rows as they come": as_they_come, "minialign": own}
        seconds, padded = {who: [] for who in works}, {}
        for _ in range(rounds):
            for who, run in works.items():
                with Stopwatch() as watch, counted_tokens() as tokens, quiet():
                    run(count)
                seconds[who].append(watch.median())
                padded[who] = sum(tokens) / (2 * count * 16 * real)  # policy and reference read each pair
        return [row | {"padded": padded[row["name"]]} for row in table(seconds)]


@contextlib.contextmanager
def counted_tokens():
    """A list to which every embedding of tokens adds their number, in any model."""
    counted, embed = [], F.embedding

    def counting(*inputs):
        counted.append(inputs[0].numel())
        return embed(*inputs)

    torch.nn.functional.embedding = counting
    try:
        yield counted
    finally:
        torch.nn.functional.embedding = embed


@contextlib.contextmanager
def quiet():
    """Suppress what the loops print, so that only our tables are shown."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# -------------------------------------------------------------------------------------------------------- start-up, tables


def start_up(rounds):
    """Seconds that importing minialign adds to `import torch`, each in a fresh interpreter: medians over the rounds."""
    programs = {"import torch": "import torch", "import minialign": "import torch, minialign",
                "import minialign.logps, .sample, .model": "import torch, minialign.logps, minialign.sample, minialign.model"}
    works = {name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for name, code in programs.items()}
    seconds = rounds_of(works, rounds)
    base = seconds.pop("import torch")
    return [{"name": name, "seconds": statistics.median(s - b for s, b in zip(values, base, strict=True))}
            for name, values in seconds.items()]


def show(title, rows):
    """Print the rows of one table, without columns that no row fills."""
    columns = {"ratio": "7.2f", "least": "7.2f", "most": "7.2f", "seconds": "10.4f", "ms": "10.3f", "tokens/s": "12,.0f",
               "ps per N V": "12.3f", "padded": "9.2f", "share of the rate": "19.2f",
               "memory": "9.2f", "peak MiB": "11,.0f", "error": "10.1e",
               "entropy error": "15.1e", "gradient error": "16.1e"}
    columns = {name: form for name, form in columns.items() if any(row.get(name) is not None for row in rows)}
    width = max(len(title), *(len(row["name"]) + 2 for row in rows)) + 2
    print(f"\n{title:{width}}" + "".join(f"{name:>{width_of(form)}}" for name, form in columns.items()))
    for row in rows:
        cells = [" " * width_of(form) if row.get(name) is None else f"{row[name]:{form}}" for name, form in columns.items()]
        print(f"  {row['name']:{width - 2}}" + "".join(cells))


def width_of(form):
    return int(form.split(".")[0].rstrip(","))


def main(cfg):
    """Print the tables, write the numbers to a file, and return them. Raises BadInput for arguments out of range."""
    if min(cfg.n, cfg.c, cfg.v, cfg.rounds, cfg.threads) < 1:
        raise BadInput("--n, --c, --v, --rounds and --threads must be at least 1")
    if unknown := set(cfg.only) - set(TABLES):
        raise BadInput(f"--only {sorted(unknown)[0]}: unknown table; use {', '.join(TABLES)}")
    if cfg.gpu:
        from minialign.bench import gpu

        device = gpu.card()
        tables = gpu.tables(device)
    else:
        torch.set_num_threads(cfg.threads)
        device, tables = torch.device("cpu"), cpu_tables(cfg)
    print(f"{describe_device(device)}, torch {torch.__version__}, medians of the rounds' ratios to the first row of each group")
    numbers = {"config": asdict(cfg), "date": time.strftime("%Y-%m-%d"), **environment(device), "tables": {}}
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    for title, rows in tables:
        show(title, rows)
        numbers["tables"][title] = rows
        write_atomic(cfg.out, json.dumps(numbers, indent=1) + "\n")  # after each table, so that an interrupted run keeps its numbers
    print(f"\nmemory: peak above what was held before, in units of the head's gradient. error: against float64. Numbers: {cfg.out}")
    return numbers


def cpu_tables(cfg):
    """Yield (title, rows) of each table that --only names."""
    if "log-probs" in cfg.only:
        for entropy in (False, True):
            what = "log-prob and entropy" if entropy else "log-prob"
            yield f"{what}, forward and backward: N {cfg.n}, C {cfg.c}, V {cfg.v}", log_probs(cfg, entropy)
    with_peers = {"generation": ("16 rows of 32 + 128 tokens, six layers of GPT-NeoX", generation),
                  "steps": ("an optimizer step: rows of 32 + 64 tokens; small: four layers, C 128, V 2048", training_steps),
                  "ragged": ("a DPO step of 16 ragged pairs in passes of 2; padded: tokens computed for each real one",
                             functools.partial(ragged, pairs=cfg.pairs))}
    for name, (what, make) in with_peers.items():
        if name in cfg.only:
            try:
                yield what, make(cfg.rounds)
            except ImportError as error:
                print(f"\n{what}: left out, {error.name} is not installed (pip install -r requirements-dev.txt)")
    if "generation" in cfg.only:
        yield "a token late in a row over one early, the 70m shape", decode_cost(cfg.rounds)
    if "start-up" in cfg.only:
        yield "start-up, seconds beyond `import torch`", start_up(cfg.rounds)
