"""`python -m minialign.bench --gpu`: kernels, log-probs, decoding and a training step on one CUDA card, compared with their floors.

The floors are measured in the same run: a copy for memory-bound work, bare matrix products for work bound by products. Each ratio is taken
within a round, to the first row of its group. All is in bfloat16, with logits of standard deviation 3 and a random upstream gradient of
log-prob and entropy for every token. Errors are against float64 on the same bfloat16 inputs.

    kernels      logprob.py's two passes, against the bytes they must move (2 N V and 4 N V) at the bandwidth of a copy
    log-probs    linear_logps from hidden states, forward and backward, kept and recomputed, against its three bare products; scoring
                 without a gradient against one bare product; the installed peers (TRL, Liger, cut-cross-entropy, torch)
    scorer       scoring by the Triton kernel beside slices, by C: what decides linear_logprob.FUSED_UP_TO
    scaling      the same for several N and V: time per N·V, memory
    decoding     a recorded step of Pythia-1.4B and Mistral-7B shapes, against reading weights and cache once; transformers' generate
    training     an SFT step of both shapes: tokens/s, and share of the measured product rate (6 flops per parameter and token)

Checked by tests/bench/test_cpu.py, at small sizes on a CPU.
"""

import statistics
import tempfile
import time

import torch
import torch.nn.functional as F

from minialign.batch import Batch
from minialign.engine.common import BadInput
from minialign.kernels import linear_logprob, logprob
from minialign.logps import linear_logps, token_logps
from minialign.methods.sft import sft_loss
from minialign.model import GPT, GPTConfig, KVCache
from minialign.sample import Step, sample
from minialign.weights import save_pretrained

HEADS = {"Pythia-1.4B": (2048, 50304), "Mistral-7B": (4096, 32000), "Llama-3-8B": (4096, 128256)}  # C, V
PYTHIA = dict(vocab_size=50304, n_layer=24, n_head=16, n_embd=2048, norm="layer", activation="gelu", gated=False, rotary_dim=32,
              parallel_residual=True, qkv_bias=True, out_bias=True, mlp_bias=True, tied=False, max_len=2048, family="gpt_neox")
MISTRAL = dict(vocab_size=32000, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, ffn_dim=14336, tied=False, max_len=4096, family="mistral")


def card():
    """The CUDA device. Raises BadInput if there is none."""
    if not torch.cuda.is_available():
        raise BadInput("--gpu: this torch finds no CUDA card; leave the flag out to measure the CPU")
    return torch.device("cuda")


def tables(device):
    """Yield (title, rows) of each table."""
    for name, (c, v) in HEADS.items():
        for n in (8192, 16384):
            yield f"kernels, {name}: N {n}, V {v}", kernels(n, v, device)
            yield f"log-probs, {name}: N {n}, C {c}, V {v}", log_probs(n, c, v, device)
            yield f"scoring, {name}: N {n}, C {c}, V {v}", scoring(n, c, v, device)
    yield f"scorer by C (now fused up to {linear_logprob.FUSED_UP_TO}): N 8192, V 65536", scorer(device)
    yield "scaling of the recomputing log-probs: C 2048", scaling(device)
    for name, size, batch in (("Pythia-1.4B", PYTHIA, 64), ("Mistral-7B", MISTRAL, 64)):
        yield f"decoding, {name}: {batch} rows at position 512", decoding(size, batch, 512, device, peer=name == "Pythia-1.4B")
    for name, size, rows in (("Pythia-1.4B", PYTHIA, 16), ("Mistral-7B", MISTRAL, 4)):
        yield f"training, {name}: {rows} rows of 512 tokens", training(size, rows, 512, device)


# --------------------------------------------------------------------------------------------------------------- measuring


def milliseconds(work, device):
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # the GPU waits about 1 ms while Python launches the work, so launch time does not count
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_in_turns(works, device, rounds=20, warm=2):
    """Rows {name, ratio, least, most, ms, peak MiB} of works run in turn. If one fails (out of memory), its row says why."""
    spent, peaks, failed = {name: [] for name in works}, {}, {}
    for k in range(warm + rounds):
        for name, work in works.items():
            if name in failed:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                ms = milliseconds(work, device)
            except Exception as error:  # any failure of ours or of a peer: its row says so, and the table goes on
                failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
                continue
            if device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if k >= warm:
                spent[name].append(ms)
    base, rows = next((values for name, values in spent.items() if name not in failed), None), []
    for name, values in spent.items():
        if name in failed:
            rows.append({"name": f"{name}: {failed[name]}"})
            continue
        of = [a / b for a, b in zip(values, base, strict=True)]
        rows.append({"name": name, "ratio": statistics.median(of), "least": min(of), "most": max(of), "ms": statistics.median(values),
                     "peak MiB": peaks.get(name)})
    return rows


def random_inputs(n, c, v, device, dtype=torch.bfloat16):
    """hidden (N, C), weight (V, C), targets (N,), upstream gradients (2, N)."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, c, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, c, generator=generator, device=device) * 3 / c**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator, device=device), torch.randn(2, n, generator=generator, device=device)


def exact(hidden, weight, targets, rows=256):
    """Log-probs and entropies of the first rows, in float64."""
    log_p = (hidden[:rows].detach().double() @ weight.detach().double().T).log_softmax(1)
    return log_p.gather(1, targets[:rows, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def worst(found, expected):
    return float((found[: len(expected)].detach().double() - expected).abs().max())


# ----------------------------------------------------------------------------------------------------------------- tables


def kernels(n, v, device, rounds=20):
    """Two groups: the fold, and the gradient, each divided by a copy that moves the same number of bytes."""
    generator = torch.Generator(device).manual_seed(0)
    logits = (3 * torch.randn(n, v, generator=generator, device=device)).to(torch.bfloat16)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    g, e = torch.randn(2, n, generator=generator, device=device)
    spare, half = torch.empty_like(logits), n // 2

    def fold():
        statistics = logprob.Statistics.empty(n, torch.float32, device)
        logprob.update_statistics(logits, targets, statistics)
        return statistics

    found = fold()
    lse, entropies = found.lse(), found.entropy()
    expected = logits[:256].double().log_softmax(1)
    error = worst(found.target - lse, expected.gather(1, targets[:256, None])[:, 0])
    rows = time_in_turns({
        "copy of half the logits: 2 N V bytes": lambda: spare[:half].copy_(logits[:half]),
        "fold": fold,
        "log_softmax, gather, entropy": lambda: _two_helpers(logits, targets),
        **_trl_logprob(logits, targets),
    }, device, rounds)
    rows[1]["error"] = error
    return rows + time_in_turns({
        "copy of the logits: 4 N V bytes": lambda: spare.copy_(logits),
        "to_gradient, in place": lambda: logprob.to_gradient(spare, targets, lse, entropies, g, e),
    }, device, rounds)


def _two_helpers(logits, targets):
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, targets[:, None]), -(log_p.exp() * log_p).sum(-1)


def _trl_logprob(logits, targets):
    try:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
    except ImportError:
        return {}
    return {"trl selective_log_softmax_and_entropy": lambda: selective_log_softmax_and_entropy(logits, targets)}


def log_probs(n, c, v, device, rounds=10):
    """Log-prob and entropy, forward and backward, divided by the three bare products; errors of both."""
    hidden, weight, targets, (g, e) = random_inputs(n, c, v, device)
    logps, entropies = exact(hidden, weight, targets)

    def both(body):
        def work():
            out, entropy = body()
            loss = (g * out).sum() if entropy is None else (g * out).sum() + (e * entropy).sum()
            torch.autograd.grad(loss, (hidden, weight))

        return work

    def bare():
        with torch.no_grad():
            z = hidden @ weight.T
            torch.mm(z, weight), torch.mm(z.T, hidden)

    ours = {"minialign": lambda: linear_logps(hidden, weight, targets, body="chunked")}
    peers = {"eager in float32: log_softmax of all logits": lambda: linear_logps(hidden, weight, targets, body="naive"),
             **_peers(hidden, weight, targets)}
    rows = time_in_turns({"three bare products": bare, **{name: both(body) for name, body in {**ours, **peers}.items()}}, device, rounds)
    for row in rows:
        body = {**ours, **peers}.get(row["name"])
        if body is not None:
            out, entropy = body()  # (with gradients enabled: without them another kernel would run)
            row["error"] = worst(out, logps)
            row["entropy error"] = None if entropy is None else worst(entropy, entropies)
            del out, entropy
    return rows


def _peers(hidden, weight, targets):
    """{name: body} of the installed peers. A peer that computes no entropy returns None for it."""
    peers = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()  # (without them it would compute all logits)
        peers["torch F.linear_cross_entropy"] = lambda: (
            -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options), None)
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        peers["trl ChunkedLogProbFunction"] = lambda: ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("entropy",))[:2]
    except ImportError:
        pass  # a peer that is not installed is left out
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        peers["liger fused linear cross entropy"] = lambda: (
            -Liger.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")[0], None)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        peers["cut-cross-entropy, exact"] = lambda: (
            -linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce", filter_eps=None), None)
    except ImportError:
        pass
    return peers


def scoring_bodies(hidden, weight, targets):
    """{name: body} of what scores without a gradient, whatever the width: slices, and the Triton kernel where there is Triton."""
    given = hidden, weight, targets, 1.0, True
    bodies = {"slices": lambda: linear_logprob.LinearLogps.apply(*given)}
    kernel = linear_logprob.kernel()
    return {**bodies, "fused": lambda: linear_logprob.fused_logps(kernel, *given)} if kernel else bodies


def scoring(n, c, v, device, rounds=20):
    """Without gradients: log-prob and entropy, divided by one bare product, which writes all logits to memory."""
    hidden, weight, targets, _ = random_inputs(n, c, v, device)
    hidden, weight = hidden.detach(), weight.detach()
    logps, entropies = exact(hidden, weight, targets)
    bodies = scoring_bodies(hidden, weight, targets)
    rows = time_in_turns({"one bare product": lambda: hidden @ weight.T, **bodies}, device, rounds)
    for row in rows[1:]:
        if row["name"] in bodies:  # this one did not fail
            out, entropy = bodies[row["name"]]()
            row["error"], row["entropy error"] = worst(out, logps), worst(entropy, entropies)
    return rows


def scorer(device, n=8192, v=65536, cs=(1024, 1536, 2048, 2560, 3072, 4096, 8192), rounds=10):
    """Without gradients, by C: slices and the Triton kernel, tokens per second, and which of the two is faster."""
    table = []
    for c in cs:
        hidden, weight, targets, _ = random_inputs(n, c, v, device)
        rows = time_in_turns(scoring_bodies(hidden.detach(), weight.detach(), targets), device, rounds)
        fastest = min((row for row in rows if "ms" in row), key=lambda row: row["ms"], default=None)
        for row in rows:
            row |= {"name": f"C {c}, {row['name']}{', the faster' if row is fastest and len(rows) > 1 else ''}"}
            row |= {"tokens/s": 1e3 * n / row["ms"]} if "ms" in row else {}
        table += rows
        del hidden, weight, targets
    return table


def scaling(device, c=2048, ns=(4096, 16384, 65536), vs=(32000, 128256, 256000), rounds=3):
    """Forward and backward, recomputed: ps per token and vocabulary entry, over the first row; memory above inputs and their gradients."""
    rows = []
    for n, v in [(n, vs[0]) for n in ns] + [(ns[0], v) for v in vs[1:]] + [(ns[-1], vs[1])]:
        hidden, weight, targets, (g, e) = random_inputs(n, c, v, device)

        def work(hidden=hidden, weight=weight, targets=targets, g=g, e=e):
            out, entropy = linear_logps(hidden, weight, targets, body="chunked")
            torch.autograd.grad((g * out).sum() + (e * entropy).sum(), (hidden, weight))

        (row,) = time_in_turns({f"N {n}, V {v}": work}, device, rounds)
        if "ms" in row:
            row["ps per N V"] = 1e9 * row["ms"] / (n * v)
            row["ratio"] = row["ps per N V"] / next(r["ps per N V"] for r in [*rows, row] if "ps per N V" in r)
            row["least"] = row["most"] = None
            if row["peak MiB"] is not None:
                row["peak MiB"] -= (hidden.nbytes + weight.nbytes) / 2**20
        rows.append(row)
        del hidden, weight, targets, g, e, work
    return rows


def bandwidth(device):
    """Bytes per second of a copy, counting bytes read and bytes written."""
    size = 2**30 if device.type == "cuda" else 2**20
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-3 * time_in_turns({"copy": lambda: target.copy_(source)}, device, rounds=10)[0]["ms"])


def rate(device):
    """Flops per second of a bfloat16 matrix product."""
    size = 8192 if device.type == "cuda" else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / (1e-3 * time_in_turns({"product": lambda: a @ a}, device, rounds=10)[0]["ms"])


def random_policy(size, device):
    torch.manual_seed(0)
    with torch.device(device):
        return GPT(GPTConfig(**size)).to(torch.bfloat16)


def decoding(size, batch, position, device, rounds=20, new=64, peer=True):
    """A step of all rows at one position. The floor reads the cache and all weights but the embeddings once, at the bandwidth of a copy."""
    policy = random_policy(size, device).requires_grad_(False)
    config = policy.config
    cache = KVCache(config, batch, position + 2 * rounds + 8, device=device, dtype=torch.bfloat16)
    cache.lengths += position
    cache.longest = position
    step, token = Step(policy, cache), torch.zeros(batch, dtype=torch.long, device=device)
    head = policy.head_weight

    def once():
        linear_logprob.logits_of(step(token), head).argmax(-1)

    weights = sum(p.nbytes for name, p in policy.named_parameters() if not name.startswith(("tok_embed", "pos_embed")))
    cached = 2 * config.n_layer * batch * position * config.n_kv_head * config.head_dim * 2
    floor = 1e3 * (weights + cached) / bandwidth(device)
    (row,) = time_in_turns({"minialign, a recorded step and its logits": once}, device, rounds)
    if "ms" in row:
        row |= {"ratio": row["ms"] / floor, "least": None, "most": None, "tokens/s": 1e3 * batch / row["ms"]}
    rows = [{"name": f"reading {weights / 2**30:.1f} GiB of weights, {cached / 2**30:.1f} of cache", "ratio": 1.0, "ms": floor,
             "tokens/s": 1e3 * batch / floor}, row]
    prompts = torch.randint(config.vocab_size, (batch, 64), generator=torch.Generator().manual_seed(0))
    ours = {"minialign, sample()": lambda: sample(policy, prompts.tolist(), max_new=new, eos_id=None, seed=0)}
    theirs = _generate(policy, prompts, new, device) if peer else {}  # (it loads its weights from disk: minutes for 7B)
    whole = time_in_turns({**ours, **theirs}, device, rounds=3, warm=1)
    for row in whole:
        if "ms" in row:
            row |= {"tokens/s": 1e3 * batch * new / row["ms"]}
    return rows + whole


def _generate(policy, prompts, new, device):
    """transformers' generate on the same weights, if transformers is installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(policy, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    given = prompts.to(device)
    return {"transformers generate": lambda: peer.generate(
        given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0,
        eos_token_id=None)}


def training(size, rows, length, device, rounds=5):
    """An SFT step with every token scored: forward, backward, clipping, fused AdamW. The floor is 6 flops per parameter and token."""
    policy = random_policy(size, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(policy.config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, length, dtype=torch.bool, device=device))

    def step():
        optimizer.zero_grad()
        loss, _ = sft_loss(token_logps(policy, batch), batch.mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    in_products = sum(m.weight.numel() for m in policy.modules() if isinstance(m, torch.nn.Linear))
    floor = 1e3 * 6 * in_products * rows * length / rate(device)
    (row,) = time_in_turns({"minialign, sft": step}, device, rounds)
    if "ms" not in row:
        return [row]
    row |= {"ratio": row["ms"] / floor, "least": None, "most": None, "tokens/s": 1e3 * rows * length / row["ms"],
            "share of the rate": floor / row["ms"]}
    return [{"name": "6 flops a parameter and token", "ratio": 1.0, "ms": floor, "tokens/s": 1e3 * rows * length / floor}, row]
