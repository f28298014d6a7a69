"""The sampler against a language that is summed over: frequencies, invariance to the batch, what it reports, what it refuses."""

import copy
import gc
import inspect
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import minialign.sample as sample_module
from minialign.engine import look
from minialign.engine.common import BadInput
from minialign.kernels.decode import Decoder
from minialign.logps import token_logps
from minialign.model import GPT, GPTConfig, KVCache
from minialign.rewards import rollout_stats
from minialign.sample import Step, draw_tokens, keep_top_k, keep_top_p, rollout, sample, stepper
from tests.conftest import Allocations
from tests.enumerable import EOS, MAX_NEW, N_CONTENT, PROMPTS, all_completions, tiny_gpt

FAMILIES = {
    "gpt2": {},
    "gpt_neox": dict(positions="rotary", rotary_dim=4, parallel_residual=True),
    "llama": dict(n_head=4, n_kv_head=2, positions="rotary", norm="rms", gated=True, activation="silu", qkv_bias=False, out_bias=False,
                  mlp_bias=False),
    "windowed": dict(n_layer=2, n_head=4, n_kv_head=2, positions="rotary", norm="rms", gated=True, windows=(2, None)),
    "qwen3": dict(n_head=4, n_kv_head=1, head_dim=16, positions="rotary", norm="rms", gated=True, qk_norm=True,
                  rope_scaling={"rope_type": "linear", "factor": 2.0}),
}


def run(policy, prompts, **changes):
    return sample(policy, prompts, **{"max_new": MAX_NEW, "eos_id": EOS, "seed": 0, **changes})


# ------------------------------------------------------------------------------------------------------------ the law


def truncated(logits, tau, top_k, top_p):
    """The next-token law in numpy, written apart from the code: temperature, then the k likeliest, then the nucleus of what is left."""
    p = np.exp((logits - logits.max()) / tau)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: -p[token])
    keep = order[: top_k or len(p)]
    if top_p is not None:
        kept_mass, nucleus = p[keep].sum(), []
        for token in keep:
            nucleus.append(token)
            if p[nucleus].sum() / kept_mass >= top_p:
                break
        keep = nucleus
    law = np.zeros(len(p))
    law[keep] = p[keep] / p[keep].sum()
    return law


@torch.no_grad()
def exact_law(policy, prompt, *, tau=1.0, top_k=None, top_p=None):
    """{completion: probability}: the product of next-token laws, each from a full forward pass of its prefix, without any cache."""
    conditionals, law = {}, {}
    for completion in all_completions(N_CONTENT, EOS, MAX_NEW):
        probability = 1.0
        for t, token in enumerate(completion):
            prefix = (*prompt, *completion[:t])
            if prefix not in conditionals:
                conditionals[prefix] = truncated(policy(torch.tensor([prefix]))[0, -1].numpy(), tau, top_k, top_p)
            probability *= conditionals[prefix][token]
        law[tuple(completion)] = probability
    assert abs(sum(law.values()) - 1) < 1e-12
    return law


def surprise(counts, law):
    """Standard deviations by which chi-square exceeds its mean (Wilson-Hilferty); classes that expect fewer than 5 are merged."""
    n = sum(counts.values())
    if any(law[completion] == 0 for completion in counts):
        return np.inf
    rare = [completion for completion in law if n * law[completion] < 5]
    classes = [[completion] for completion in law if n * law[completion] >= 5] + ([rare] if sum(law[c] for c in rare) > 0 else [])
    expected = np.array([n * sum(law[c] for c in members) for members in classes])
    observed = np.array([sum(counts[c] for c in members) for members in classes])
    if len(classes) == 1:
        return 0.0
    k, chi2 = len(classes) - 1, ((observed - expected) ** 2 / expected).sum()
    return ((chi2 / k) ** (1 / 3) - (1 - 2 / (9 * k))) / np.sqrt(2 / (9 * k))


SETTINGS = [
    dict(),
    dict(tau=0.7),
    dict(tau=1.5),
    dict(top_k=2),
    dict(top_p=0.8),
    dict(tau=0.7, top_k=3, top_p=0.9),
    dict(tau=1.5, top_k=2, top_p=0.6),  # top-p before top-k would keep two tokens where the right order keeps one
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies_follow_the_law(setting):
    """3000 samples of each of four prompts, chi-square against the enumerated law: below 4 standard deviations."""
    policy = tiny_gpt()
    rollout = run(policy, PROMPTS, n=3000, **setting)
    for i, prompt in enumerate(PROMPTS):
        counts = Counter(map(tuple, rollout.completions[3000 * i : 3000 * (i + 1)]))
        assert surprise(counts, exact_law(policy, prompt, **setting)) < 4, (prompt, setting)


def test_chi_square_has_teeth():
    """The same test refuses the law of another temperature and that of another prompt."""
    policy = tiny_gpt()
    counts = Counter(map(tuple, run(policy, [PROMPTS[0]], n=3000, tau=0.7).completions))
    assert surprise(counts, exact_law(policy, PROMPTS[0], tau=0.7)) < 4
    assert surprise(counts, exact_law(policy, PROMPTS[0], tau=0.9)) > 6
    assert surprise(counts, exact_law(policy, PROMPTS[1], tau=0.7)) > 10


def test_samples_of_one_prompt_are_independent():
    """Consecutive samples of a prompt share their first token as often as two independent draws: within 4 standard deviations."""
    policy = tiny_gpt()
    first = [completion[0] for completion in run(policy, [PROMPTS[0]], n=4000).completions]
    with torch.no_grad():
        p = policy(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1).numpy()
    expected = (p**2).sum()
    agree = np.mean([a == b for a, b in zip(first[::2], first[1::2], strict=True)])
    assert abs(agree - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


def test_samples_of_different_prompts_are_independent():
    """A policy to which all 5 tokens are equally likely: the i-th samples of two prompts agree in 1 of 5 cases, within 4 s.d."""
    policy = tiny_gpt()
    torch.nn.init.zeros_(policy.head_weight)
    one, other = (run(policy, [prompt], n=2000, max_new=1).completions for prompt in ([0], [1]))
    agree = np.mean([a == b for a, b in zip(one, other, strict=True)])
    assert abs(agree - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 2000)


@torch.no_grad()
def test_greedy_is_the_argmax_of_full_forward_passes():
    for family, changes in FAMILIES.items():
        policy = tiny_gpt(**changes)
        rollout = run(policy, PROMPTS, max_new=8, greedy=True)
        for prompt, completion in zip(PROMPTS, rollout.completions, strict=True):
            expected = []
            while len(expected) < 8 and EOS not in expected:
                expected.append(int(policy(torch.tensor([prompt + expected]))[0, -1].argmax()))
            assert completion == expected, family


def test_the_rules_by_hand():
    """p = .5 .3 .15 .05: top-2 keeps two; the nucleus of .8 is two tokens, of .81 three, of .01 one, of 1 all."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    kept = lambda x: x.isfinite()[0].tolist()  # noqa: E731
    assert kept(keep_top_k(logits, 2)) == [True, True, False, False]
    assert kept(keep_top_k(logits, 9)) == [True] * 4
    for p, number in ((0.79, 2), (0.81, 3), (0.01, 1), (1.0, 4)):
        assert kept(keep_top_p(logits, p)) == [True] * number + [False] * (4 - number)
    quarters = torch.zeros(1, 4, dtype=torch.float64)  # sums of quarters are exact: two of them reach .5, a third is one too many
    for p, number in ((0.25, 1), (0.5, 2), (0.75, 3)):
        assert sum(kept(keep_top_p(quarters, p))) == number
    assert torch.equal(keep_top_p(logits.flip(1), 0.79), keep_top_p(logits, 0.79).flip(1))  # whatever the order of the vocabulary


def test_draw_inverts_the_cumulative_distribution():
    """p = .2 0 .8 0, or a multiple: below .2 lies token 0, from .2 on token 2; no point hits a forbidden token, not one rounded up to 1."""
    probs = torch.tensor([[0.2, 0.0, 0.8, 0.0]])
    for point, token in ((0.0, 0), (0.19, 0), (0.21, 2), (1 - 2**-24, 2), (1.0, 2)):
        assert draw_tokens(probs, torch.tensor([point])).item() == draw_tokens(3 * probs, torch.tensor([point])).item() == token
    assert draw_tokens(probs[:, [1, 0, 2, 3]], torch.tensor([0.0])).item() == 1


# ------------------------------------------------------------------------------------- the same seed, whatever the batch


def test_a_row_is_the_same_alone_and_in_any_batch():
    """60 random schedules: batches of random prompts (with repeats, shuffled) and n, each row as sample(prompt alone) has it."""
    policy = tiny_gpt(max_len=32)
    rng = random.Random(0)
    prompts = [[rng.randrange(N_CONTENT) for _ in range(rng.randint(1, 6))] for _ in range(10)]
    alone = {tuple(prompt): run(policy, [prompt], max_new=6, n=12).completions for prompt in prompts}
    for _ in range(60):
        n, chosen = rng.randint(1, 3), rng.choices(prompts, k=rng.randint(1, 4))
        completions, seen = run(policy, chosen, max_new=6, n=n).completions, Counter()
        for b, completion in enumerate(completions):
            prompt = tuple(chosen[b // n])  # the n of one prompt are adjacent
            assert completion == alone[prompt][seen[prompt]]
            seen[prompt] += 1


@pytest.mark.slow
def test_a_row_is_the_same_in_500_random_schedules(record_property):
    """As above for every family, other settings and longer rows; log-probs agree to 1e-10 as well."""
    rng = random.Random(1)
    for family, changes in FAMILIES.items():
        policy = tiny_gpt(max_len=64, **changes)
        prompts = [[rng.randrange(N_CONTENT) for _ in range(rng.randint(1, 20))] for _ in range(12)]
        alone = {}
        for _ in range(100):
            setting = rng.choice(SETTINGS)
            n, chosen = rng.randint(1, 3), rng.choices(prompts, k=rng.randint(1, 6))
            rollout, seen = run(policy, chosen, max_new=20, n=n, **setting), Counter()
            for b, completion in enumerate(rollout.completions):
                prompt = tuple(chosen[b // n])
                key = (prompt, str(setting))
                if key not in alone:
                    alone[key] = run(policy, [prompt], max_new=20, n=18, **setting)
                single = alone[key]
                assert completion == single.completions[seen[prompt]], (family, setting)
                logps = rollout.old_logps[b][rollout.mask[b]]
                assert torch.allclose(logps, single.old_logps[seen[prompt]][single.mask[seen[prompt]]], rtol=0, atol=1e-10)
                seen[prompt] += 1
    record_property("tried", 100 * len(FAMILIES))


def test_duplicates_continue_where_n_would():
    policy = tiny_gpt()
    assert run(policy, [[0], [0], [0]]).completions == run(policy, [[0]], n=3).completions
    assert len(set(map(tuple, run(policy, [[0]] * 40).completions))) > 5  # and they differ from each other


def test_the_n_of_one_prompt_are_adjacent():
    rollout = run(tiny_gpt(), PROMPTS, n=2)
    first = [prompt[0] for prompt in PROMPTS for _ in range(2)]
    assert rollout.inputs[:, 0].tolist() == first and len(rollout) == 2 * len(PROMPTS)


def test_another_seed_gives_other_samples():
    policy = tiny_gpt()
    draws = [run(policy, PROMPTS, n=10, seed=seed).completions for seed in (0, 0, 1, (3, "a"))]
    assert draws[0] == draws[1] and draws[0] != draws[2] != draws[3]


# -------------------------------------------------------------------------------------------------- what a rollout says


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_old_logps_equal_token_logps(family, dtype, bound):
    """Ragged cache against one full forward pass, prompts of 1 to 7 tokens; under truncation still the UNtruncated distribution."""
    policy = tiny_gpt(dtype=dtype, max_len=32, **FAMILIES[family])
    prompts = [*PROMPTS, [0, 1, 2, 3, 3, 2, 1]]
    for setting in SETTINGS:
        rollout = run(policy, prompts, n=5, max_new=16, **setting)
        with torch.no_grad():
            logps = token_logps(policy, rollout, tau=setting.get("tau", 1.0))
        assert rollout.old_logps.dtype == dtype and logps.shape == rollout.old_logps.shape
        assert (logps - rollout.old_logps).abs().max() <= bound, setting
        assert (rollout.old_logps[~rollout.mask] == 0).all()


@torch.no_grad()
def test_old_logps_of_a_bfloat16_policy_are_float32_statistics():
    """One token after one prompt: log_softmax in float64 of the policy's own bfloat16 hidden state and head, to 1e-5.

    Logits rounded to bfloat16 would put a ratio of 1 at 0.99 or 1.01.
    """
    policy = tiny_gpt(64, dtype=torch.bfloat16)
    rollout = sample(policy, [[1, 2, 3]], max_new=1, n=50, eos_id=None, seed=0)
    logits = policy.hidden(torch.tensor([[1, 2, 3]]))[0, -1].double() @ policy.head_weight.double().T
    expected = logits.log_softmax(-1)[rollout.targets[:, -1]]
    got = rollout.old_logps[:, -1]
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize(("name", "value"), [
    ("blocks.0.norm2.weight", torch.nan), ("head.weight", torch.inf), ("tok_embed.weight", torch.nan),
])
def test_a_tensor_that_is_not_finite_is_named(name, value, greedy):
    """Also an embedding that no prompt has, which shows only when its token is sampled."""
    policy = tiny_gpt(tied=False)
    with torch.no_grad():
        policy.get_parameter(name)[-1] = value
    with pytest.raises(BadInput, match=rf"its logits are not finite \({name} holds NaN or inf"):
        for seed in range(20):
            sample(policy, [[1]], max_new=9, eos_id=None, seed=seed, greedy=greedy)


def guarded(policy, monkeypatch, *, sampled_at=1.0):
    """What check_sampler does at --tau 1 with a policy and a sampler as they are now. sampled_at: the sampler's own temperature."""
    monkeypatch.setattr(look, "sample", lambda *args, tau, **more: sample(*args, tau=sampled_at, **more))
    run = SimpleNamespace(cfg=SimpleNamespace(max_new=24, tau=1.0, seed=0, dtype="its own"), dtype=policy.head_weight.dtype)
    prompts = [[(7 * i + n) % 40 for i in range(n)] for n in (5, 9, 14)]
    look.check_sampler(run, SimpleNamespace(eos_id=None), prompts, policy=policy, ref=policy)


@pytest.mark.parametrize("tokens", [slice(None), slice(1)])
@pytest.mark.parametrize("by", [5e-9, -5e-9])
def test_the_guard_looks_at_both_sides_and_at_every_token(monkeypatch, tokens, by):
    """In float64 a ratio may be off by 1e-9. Here all ratios are above or below 1 by 5e-9, or one of them is."""
    def off(*arguments, **settings):
        answers = sample(*arguments, **settings)
        places = answers.mask.nonzero()[tokens]
        answers.old_logps[places[:, 0], places[:, 1]] += by
        return answers

    monkeypatch.setattr(look, "sample", off)
    run = SimpleNamespace(cfg=SimpleNamespace(max_new=24, tau=1.0, seed=0, dtype="its own"), dtype=torch.float64)
    policy = tiny_gpt(40, max_len=64)
    with pytest.raises(BadInput, match="sampler and training pass differ by"):
        look.check_sampler(run, SimpleNamespace(eos_id=None), [[1, 2], [3]], policy=policy, ref=policy)


GUARDED = {**FAMILIES, "mistral": dict(FAMILIES["llama"], windows=(16, 16)), "qwen2": dict(FAMILIES["llama"], qkv_bias=True, n_kv_head=1)}


@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize("family", GUARDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_guard_passes_a_right_sampler_and_refuses_wrong_ones(monkeypatch, family, dtype, spread):
    """Wrong: another temperature; every sampled token one position too far, or too near; a mask that shows three keys only. With spread .1
    the distributions are nearly flat, so that in bfloat16 the errors are no larger than the rounding of a deep model."""
    policy = tiny_gpt(40, dtype=dtype, **{**GUARDED[family], "n_layer": 2, "max_len": 64})
    with torch.no_grad():
        policy.head_weight.mul_(spread)
    guarded(policy, monkeypatch)

    def refused(**settings):
        with pytest.raises(BadInput, match="sampler and training pass differ by"):
            guarded(policy, monkeypatch, **settings)
        monkeypatch.undo()

    for tau in (0.8, 1.3):
        refused(sampled_at=tau)
    for shift in (1, -1):
        def moved(policy, cache, shift=shift):
            cache.lengths += shift
            cache.longest += shift
            return stepper(policy, cache)

        monkeypatch.setattr("minialign.sample.stepper", moved)
        refused()
    whole = GPT.mask
    monkeypatch.setattr("minialign.sample.stepper", Step)
    monkeypatch.setattr(GPT, "mask", lambda self, positions, span, window, empty, dtype: whole(
        self, positions, span, window if empty else 3, empty, dtype))
    refused()


@pytest.mark.parametrize(("width", "std", "spread"), [(64, 0.12, 5.0)] + [
    pytest.param(256, std, spread, marks=pytest.mark.slow) for std in (0.017, 0.03, 0.045, 0.06) for spread in (1.0, 2.5, 5.0)])
def test_the_guard_passes_deep_bfloat16_policies(monkeypatch, capsys, width, std, spread):
    """24 layers with block weights of this standard deviation, and logits of about the standard deviation `spread`. What is off is rounding
    alone, but may be more than a wrong temperature puts on a flat policy; in float32 the first layer agrees to 1e-4. The mean and the
    largest are printed. A sampler at another temperature is refused all the same."""
    policy = tiny_gpt(10 * width, **{**FAMILIES["llama"], "n_layer": 24, "n_embd": width, "max_len": 64}, dtype=torch.float32)
    with torch.no_grad():
        for parameter in policy.blocks.parameters():
            parameter.mul_(std / parameter.std() if parameter.dim() == 2 else 1)
        policy.head_weight.mul_(spread)
    policy = policy.to(torch.bfloat16)
    guarded(policy, monkeypatch)
    printed = re.search(r"within (\S+) on average, (\S+) in all tokens \((\S+) in float32", capsys.readouterr().out).groups()
    mean, largest, exact = map(float, printed)
    # How large the mean is depends on how the CPU multiplies bfloat16: .039 and .06 have been seen.
    assert mean < largest and exact < 1e-4 and (mean > 0.02 or spread < 5 or std < 0.06)
    with pytest.raises(BadInput, match="sampler and training pass differ by"):
        guarded(policy, monkeypatch, sampled_at=1.3)


def test_the_guard_keeps_a_layer_of_each_window():
    """What it compares in float32: layers 0 and 2 of four, as float32 copies that share nothing with the policy."""
    policy = tiny_gpt(40, dtype=torch.bfloat16, **{**FAMILIES["llama"], "n_layer": 4, "windows": (None, None, 5, None)})
    copied = look.shallow(policy)
    assert copied.config.windows == (None, 5) and [block.attn.layer for block in copied.blocks] == [0, 1]
    assert {p.dtype for p in copied.parameters()} == {torch.float32}
    assert len(policy.blocks) == 4 and policy.head_weight.dtype == torch.bfloat16
    for ours, theirs in ((copied.blocks[1], policy.blocks[2]), (copied.tok_embed, policy.tok_embed)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q.float())


def test_fields_agree_with_each_other():
    """finished iff the completion ends in EOS, which occurs nowhere else; unfinished ones have max_new tokens; lengths count both."""
    rollout = run(tiny_gpt(), PROMPTS, n=50, max_new=4)
    assert rollout.finished.any() and not rollout.finished.all()
    for b, completion in enumerate(rollout.completions):
        assert rollout.finished[b] == (completion[-1] == EOS) and EOS not in completion[:-1]
        assert len(completion) == rollout.lengths[b] == rollout.mask[b].sum() and 1 <= len(completion) <= 4
        assert rollout.finished[b] or len(completion) == 4
        assert rollout.targets[b][rollout.mask[b]].tolist() == completion
        prompt = PROMPTS[b // 50]
        assert rollout.inputs[b, : len(prompt)].tolist() == prompt and int(rollout.mask[b].nonzero()[0]) == len(prompt) - 1


def test_eos_as_the_very_last_token_still_counts_as_finished():
    rollout = run(tiny_gpt(), [[0]], n=300, max_new=2)
    by_length = {(len(c), c[-1] == EOS) for c in rollout.completions}
    assert by_length == {(1, True), (2, True), (2, False)}
    assert [bool(f) for f in rollout.finished] == [c[-1] == EOS for c in rollout.completions]


def test_without_eos_nothing_stops():
    rollout = run(tiny_gpt(), PROMPTS, n=20, eos_id=None)
    assert not rollout.finished.any() and set(map(len, rollout.completions)) == {MAX_NEW}
    assert any(EOS in completion for completion in rollout.completions)


@pytest.mark.long
def test_ten_thousand_requests_of_any_length(record_property):
    """Prompts of 1 to 1,024 tokens, in any order, 400 at a call: each is answered once, and as if it were asked alone; the reported
    log-probs are those of one full forward pass; and nothing of a call stays in memory."""
    policy, rng = tiny_gpt(max_len=1040, n_layer=2, n_head=2, n_embd=8, ffn_dim=8, positions="rotary").float(), random.Random(0)
    prompts = [[rng.randrange(N_CONTENT) for _ in range(min(1024, int(2 ** rng.uniform(0, 10.01))))] for _ in range(10_000)]
    with Allocations() as counted:
        for start in range(0, len(prompts), 400):
            asked = prompts[start : start + 400]
            answers = run(policy, asked, max_new=12)
            assert len(answers.completions) == len(asked)
            for b in rng.sample(range(len(asked)), 20):
                assert answers.completions[b] == run(policy, [asked[b]], max_new=12).completions[0] or asked.count(asked[b]) > 1
                row = answers[b : b + 1].trimmed()
                with torch.no_grad():
                    assert torch.allclose(token_logps(policy, row), row.old_logps, rtol=0, atol=1e-5)
            del answers, row
            gc.collect()
            assert counted.now == 0, start
    record_property("tried", len(prompts))


@pytest.mark.parametrize("rows", [2000, pytest.param(20_000, marks=pytest.mark.long)])
def test_padding_rows_of_the_vocabulary_are_never_sampled(rows, record_property):
    """The last 3 of 8 ids pad the table; their logits are made the largest. 100,000 draws and greedy: none of them appears. Nor at a
    temperature at which all that is allowed has probability 0 in float32; its log-prob stays a number, that of the forward pass."""
    record_property("tried", 50 * rows)
    policy = tiny_gpt(8, n_tokens=5, max_len=64)
    with torch.no_grad():
        policy.norm.bias.fill_(0.5)
        policy.head_weight[5:] = 1.0
    with torch.no_grad():
        assert policy(torch.tensor([[0]]))[0, -1].argmax() >= 5
    rollout = sample(policy, [[0]], n=rows, max_new=50, eos_id=None, seed=0)
    counts = Counter(token for completion in rollout.completions for token in completion)
    assert sum(counts.values()) == 50 * rows and set(counts) == set(range(5))
    greedy = sample(policy, [[0]], max_new=50, eos_id=None, seed=0, greedy=True)
    assert max(greedy.completions[0]) < 5
    with torch.no_grad():
        assert (token_logps(policy, greedy) - greedy.old_logps).abs().max() < 1e-10  # still those of the whole softmax
        policy = policy.float()
        for how in ({}, {"top_k": 3}, {"greedy": True}):
            cold = sample(policy, [[0]], n=20, max_new=3, tau=0.002, eos_id=None, seed=0, **how)
            assert cold.old_logps[cold.mask].max() < -104 and max(map(max, cold.completions)) < 5
            assert torch.allclose(token_logps(policy, cold, tau=0.002), cold.old_logps, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------------------- thrift


def test_one_prefill_a_prompt_and_finished_rows_leave(monkeypatch):
    """What goes through the model: the distinct prompts once, then one token a row, step by step. Rows that have said EOS leave once they
    are a quarter of the batch, so at most a third more rows are fed than are alive, and none when all have ended."""
    policy, fed = tiny_gpt(), []
    hidden, decode = GPT.hidden, Decoder.__call__
    monkeypatch.setattr(GPT, "hidden", lambda self, inputs, **kw: fed.append(tuple(inputs.shape)) or hidden(self, inputs, **kw))
    monkeypatch.setattr(Decoder, "__call__", lambda self, tokens: fed.append((len(tokens), 1)) or decode(self, tokens))
    rollout = run(policy, [[0], [2, 0, 1], [0]], n=20, max_new=6)
    lengths = [len(completion) for completion in rollout.completions]
    finished = rollout.finished.tolist()
    alive = [sum(not (f and n <= t) for n, f in zip(lengths, finished, strict=True)) for t in range(1, 6)]
    expected, present = [], 60
    for rows in alive:
        present = rows if rows <= 3 / 4 * present else present
        expected += [(present, 1)] * (rows > 0)
    assert fed == [(2, 3)] + expected
    assert alive[0] > alive[-1] > 0 and any(rows != fed_rows for rows, (fed_rows, _) in zip(alive, expected, strict=True))  # not idle


def test_sampling_stops_when_all_rows_have(monkeypatch):
    """A policy that always says EOS costs one prefill, whatever max_new."""
    policy, fed = tiny_gpt(), []
    with torch.no_grad():
        policy.norm.bias.fill_(1.0)
        policy.head_weight[EOS] = 10.0
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, inputs, **kw: fed.append(tuple(inputs.shape)) or hidden(self, inputs, **kw))
    rollout = run(policy, PROMPTS, max_new=12)
    assert rollout.completions == [[EOS]] * 4 and rollout.finished.all() and len(fed) == 1


@pytest.mark.parametrize("training", [True, False])
def test_policy_and_global_state_are_left_alone(training):
    policy = tiny_gpt().train(training)
    policy.head_weight.grad = torch.ones_like(policy.head_weight)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    rollout = run(policy, PROMPTS, n=3)
    assert policy.training == training and torch.is_grad_enabled() and all(p.requires_grad for p in policy.parameters())
    assert (policy.head_weight.grad == 1).all() and policy.tok_embed.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert (np.random.get_state()[1] == numpy_state).all()
    assert not rollout.old_logps.requires_grad


def test_the_global_seed_does_not_matter():
    policy = tiny_gpt()
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        draws.append(run(policy, PROMPTS, n=20).completions)
    assert draws[0] == draws[1]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[0], []], {}, "at least one token in each"),
        ([[0]], dict(max_new=0), "max_new=0 and n=1 must be at least 1"),
        ([[0]], dict(n=0), "n=0 must be at least 1"),
        ([[0]], dict(tau=0.0), "tau=0.0 must be above 0; for the most likely token use greedy"),
        ([[0]], dict(tau=-1.0), "tau=-1.0 must be above 0"),
        ([[0]], dict(tau=float("nan")), "tau=nan must be above 0"),
        ([[0]], dict(top_k=0), "top_k=0 must be at least 1"),
        ([[0]], dict(top_p=0.0), r"top_p=0.0 must lie in \(0, 1\]"),
        ([[0]], dict(top_p=1.1), r"top_p=1.1 must lie in \(0, 1\]"),
        ([[0]], dict(max_new=17), "a prompt of 1 tokens and max_new=17 exceed the model's context of 16"),
        ([[0], [0] * 15], dict(max_new=3), "a prompt of 15 tokens and max_new=3 exceed"),
        ([[0, 5]], {}, "the id 5, but the model has 5 embedding rows"),
    ],
)
def test_arguments_out_of_range(prompts, changes, message):
    with pytest.raises(BadInput, match=message):
        run(tiny_gpt(), prompts, **changes)


def test_the_context_is_used_to_its_last_position():
    """The last token sampled is never fed back: 14 tokens of prompt and 3 new fit 16 positions, and the rollout can be scored."""
    policy = tiny_gpt()
    rollout = run(policy, [[0, 1] * 7, [1]], max_new=3, eos_id=None)
    with torch.no_grad():
        assert (token_logps(policy, rollout) - rollout.old_logps).abs().max() < 1e-10
    assert rollout.inputs.shape == (2, 16)


def test_a_vocabulary_of_one_token():
    """Nothing to choose: that token at log-prob 0, until max_new, or once if it is EOS."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig.tiny(1, n_embd=8, n_head=2, ffn_dim=16))
    rollout = sample(policy, [[0]], max_new=3, eos_id=None, seed=0)
    assert rollout.completions == [[0, 0, 0]] and rollout.old_logps.abs().max() < 1e-6
    assert sample(policy, [[0]], max_new=3, eos_id=0, seed=0, top_k=5, top_p=0.5).completions == [[0]]


def asked_every(monkeypatch, tokens):
    """On a CPU, ask as seldom as on CUDA whether rows have ended: the source of `generate` with another number."""
    source = inspect.getsource(sample_module.generate)
    assert source.count('8 if device.type == "cuda" else 1') == 1
    namespace = dict(vars(sample_module))
    exec(source.replace('8 if device.type == "cuda" else 1', str(tokens)), namespace)
    monkeypatch.setattr(sample_module, "generate", namespace["generate"])


@pytest.mark.parametrize("family", FAMILIES)
def test_asking_every_8_tokens_changes_no_row(monkeypatch, family):
    """Rows that have ended sample on, unseen, and leave at other times: the same completions, the same log-probs to 1e-13 (products of
    fewer rows round differently), at most 7 more steps."""
    policy, fed = tiny_gpt(max_len=64, **FAMILIES[family]), []
    monkeypatch.setattr("minialign.sample.stepper", lambda policy, cache: fed.append(0) or Counting(policy, cache, fed))
    prompts = [*PROMPTS, [0, 1, 2, 3, 3, 2, 1]]
    for settings in (dict(n=1), dict(n=9), dict(n=4, top_k=3), dict(n=3, greedy=True), dict(n=3, max_new=1), dict(n=2, eos_id=None)):
        rollouts, steps = [], []
        for tokens in (1, 8):
            with monkeypatch.context() as patch:
                asked_every(patch, tokens)
                fed.clear()
                rollouts.append(run(policy, prompts, **{"max_new": 40, **settings}))
                steps.append(sum(fed))
        one, other = rollouts
        assert one.completions == other.completions and torch.equal(one.finished, other.finished)
        assert (one.old_logps - other.old_logps).abs().max() < 1e-13
        assert steps[0] <= steps[1] <= steps[0] + 7


class Counting(Step):
    """Step, with the number of calls in a list."""

    def __init__(self, policy, cache, fed):
        super().__init__(policy, cache)
        self.fed = fed

    def select(self, rows):
        return Counting(self.policy, self.cache.select(rows), self.fed)

    def __call__(self, token):
        self.fed.append(1)
        return super().__call__(token)


@pytest.mark.parametrize("greedy", [False, True])
def test_logits_that_are_not_finite_are_found_when_rows_are_asked(monkeypatch, greedy):
    """At the latest at the end of the completion; until then no index leaves the vocabulary, which on CUDA would end the process."""
    policy = tiny_gpt(tied=False)
    with torch.no_grad():
        policy.tok_embed.weight[-1] = torch.nan
    asked_every(monkeypatch, 8)
    with pytest.raises(BadInput, match=r"its logits are not finite \(tok_embed.weight holds NaN or inf"):
        for seed in range(20):
            sample(policy, [[1]], max_new=9, eos_id=None, seed=seed, greedy=greedy)


@pytest.mark.parametrize(("dtype", "same"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_kl_of_equal_models_is_0_in_bfloat16(dtype, same):
    """policy = ref: the sampler's log-probs would give a KL of rounding noise. In float32 they agree, so no pass is spent on it."""
    policy = tiny_gpt(64, dtype=dtype, n_layer=6, n_embd=64, max_len=64, mixing=3.0)
    for micro_batch in (0, 4):
        cfg = SimpleNamespace(max_new=24, tau=0.7, micro_batch=micro_batch)
        answers = rollout(policy, copy.deepcopy(policy), [[1, 2, 3], [4]], cfg, n=5, eos_id=0, seed=0)
        sampled = sample(policy, [[1, 2, 3], [4]], max_new=24, tau=0.7, n=5, eos_id=0, seed=0)
        assert answers.completions == sampled.completions and answers.old_logps.dtype == torch.float32
        assert not answers.old_logps.requires_grad and (answers.old_logps[~answers.mask] == 0).all()
        stats = rollout_stats(torch.zeros(10), answers)
        noise = (sampled.old_logps - answers.ref_logps).sum(1).abs().max()
        if same:
            assert stats["kl"] == 0 == stats["kl_k3"] and noise > 1e-2
        else:
            assert torch.equal(answers.old_logps, sampled.old_logps) and abs(stats["kl"]) < 1e-4


# --------------------------------------------------------------------------------------------------- a recorded step (CUDA)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_at_more_positions_than_are_written_changes_nothing(monkeypatch, family):
    """A recorded step looks at 64, 128, 256, … positions, of which some hold nothing yet: the same completions and log-probs."""
    policy = tiny_gpt(dtype=torch.float64, max_len=32, **FAMILIES[family])
    prompts = [*PROMPTS, [0, 1, 2, 3, 3, 2, 1]]
    expected = run(policy, prompts, n=3, max_new=16)
    monkeypatch.setattr("minialign.sample.stepper", Step)  # the model as it is, which is what a recording records
    monkeypatch.setattr(KVCache, "span", lambda self, end: min(max(64, 2 ** (end - 1).bit_length()), self.keys.shape[3]))
    found = run(policy, prompts, n=3, max_new=16)
    assert found.completions == expected.completions and (found.old_logps - expected.old_logps).abs().max() < 1e-12


@pytest.mark.parametrize(("width", "dtype", "kind"), [
    (512, torch.float32, Decoder), (64, torch.float64, Decoder), (520, torch.float32, Step), (64, torch.bfloat16, Step)])
def test_who_takes_the_next_step(width, dtype, kind):
    """The decoder copies the weights: not for wide models, nor in bfloat16. Both write what the model would."""
    policy = GPT(GPTConfig(5, n_layer=1, n_embd=width, ffn_dim=8, max_len=32)).to(dtype)
    cache = KVCache(policy.config, 1, 9, dtype=dtype)
    assert type(stepper(policy, cache)) is kind
    rollout = sample(policy, [[1, 2]], max_new=5, eos_id=None, seed=0)
    with torch.no_grad():
        assert (token_logps(policy, rollout) - rollout.old_logps).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_a_cache_knows_its_longest_row_without_asking():
    """Ragged prefill of 2, 4 and 3 tokens, two steps, then without the longest row: 4, 6, 5."""
    policy = tiny_gpt(max_len=32)
    cache = KVCache(policy.config, 3, 12, dtype=torch.float64)
    with torch.no_grad():
        policy.hidden(torch.zeros(3, 4, dtype=torch.long), cache=cache, lengths=torch.tensor([2, 4, 3]))
        assert cache.longest == 4
        for _ in range(2):
            policy.hidden(torch.zeros(3, 1, dtype=torch.long), cache=cache)
    assert cache.longest == 6 and cache.lengths.tolist() == [4, 6, 5]
    assert cache.select(torch.tensor([0, 2])).longest == 5 and cache.longest == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_is_the_model(family):
    """Rows that end at different times, and rows that never end over two recordings (spans 64 and 128): the log-probs are those of one full
    forward pass; in bfloat16 they are to its rounding."""
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        policy = tiny_gpt(dtype=dtype, max_len=160, **FAMILIES[family]).to("cuda")
        for eos_id in (EOS, None):
            rollout = run(policy, [*PROMPTS, [0, 1, 2, 3, 3, 2, 1]], n=5, max_new=100, eos_id=eos_id)
            with torch.no_grad():
                logps = token_logps(policy, rollout)
            assert (logps - rollout.old_logps).abs().max() < bound
            assert rollout.lengths.max() == 100 or eos_id == EOS


@pytest.mark.parametrize("most", [1, 3, 7])
def test_passes_of_any_size_draw_the_same(monkeypatch, most):
    """Rows in passes of 1, 3 or 7, sorted by length, on a GPU by its memory: completions and, to rounding, their log-probs."""
    policy = tiny_gpt(dtype=torch.float64)
    whole = run(policy, PROMPTS, n=4)
    monkeypatch.setattr(sample_module, "most_rows", lambda *_: most)
    cut = run(policy, PROMPTS, n=4)
    assert cut.completions == whole.completions and torch.equal(cut.finished, whole.finished) and torch.equal(cut.lengths, whole.lengths)
    assert (cut.old_logps - whole.old_logps).abs().max() < 1e-12


def test_a_pass_without_memory_is_halved(monkeypatch, capsys):
    """A GPU that holds 3 rows at once: 8 are tried, then 4, then 2, which is said. One row that does not fit is an error."""
    policy, original, asked = tiny_gpt(dtype=torch.float64), sample_module.generate, []

    def limited(policy, rows, uniforms, **how):
        asked.append(len(rows))
        if len(rows) > held:
            raise torch.cuda.OutOfMemoryError
        return original(policy, rows, uniforms, **how)

    held, whole = 3, run(policy, PROMPTS[:2], n=4)
    monkeypatch.setattr(sample_module, "generate", limited)
    assert run(policy, PROMPTS[:2], n=4).completions == whole.completions
    assert asked == [8, 4, 2, 2, 2, 2] and capsys.readouterr().err.count("no memory to sample") == 2
    held = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(policy, PROMPTS[:1])


def test_a_seed_for_each_prompt():
    """A list of seeds: each prompt gets what it gets alone with its seed; equal prompts with equal seeds get further samples."""
    policy = tiny_gpt(dtype=torch.float64)
    prompts, seeds = [*PROMPTS[:2], PROMPTS[0], PROMPTS[0]], [5, 5, 6, 5]
    both = run(policy, prompts, n=2, seed=seeds).completions
    assert both[:2] + both[6:] == run(policy, PROMPTS[:1], n=4, seed=5).completions
    assert both[2:4] == run(policy, PROMPTS[1:2], n=2, seed=5).completions
    assert both[4:6] == run(policy, PROMPTS[:1], n=2, seed=6).completions


def test_rows_that_fit_by_hand():
    """Mistral-7B in bfloat16: 2·32·8·128·2 = 131,072 bytes a position, 1.75 times, 2,000 positions, and 16 bytes a logit: 459 MB a row, of
    which a quarter of 80 GB holds 43."""
    config = SimpleNamespace(n_layer=32, n_kv_head=8, head_dim=128, vocab_size=32000)
    assert sample_module.rows_that_fit(config, 2000, 2, 80e9) == int(20e9 / (1.75 * 131_072 * 2000 + 512_000)) == 43
    assert sample_module.rows_that_fit(config, 2000, 2, 1e6) == 1 and sample_module.most_rows(tiny_gpt(), 100) is None
