"""Adapters: against PEFT for every layout, both ways; merged, shared, trained; hostile folders refused."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from minialign.batch import collate
from minialign.engine.common import BadInput
from minialign.engine.look import peak_memory
from minialign.engine.opening import open_policy
from minialign.engine.run import Run
from minialign.logps import token_logps
from minialign.lora import ALL, adapters, frozen_copy, inject, load_adapter, merged, save_adapter
from minialign.model import GPT, GPTConfig
from minialign.weights import load_pretrained, save_pretrained
from tests.conftest import METHODS

NEOX = dict(norm="layer", activation="gelu", gated=False, parallel_residual=True, qkv_bias=True, out_bias=True, mlp_bias=True, rotary_dim=4)
GPT2 = dict(norm="layer", activation="gelu_tanh", gated=False, positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True)
FAMILIES = {
    "llama": dict(n_kv_head=2, tied=False),
    "qwen2": dict(n_kv_head=2, qkv_bias=True),
    "gpt_neox": dict(NEOX, tied=False),
    "gpt2": dict(GPT2, tied=True),
}


def policy(family="llama", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(30, n_embd=32, n_head=4, max_len=64, family=family, **FAMILIES[family])).to(dtype)


def adapted(family="llama", rank=3, alpha=8.0, targets=None, dtype=torch.float64):
    """A model whose adapters are not at their start: B random."""
    model = policy(family, dtype)
    inject(model, rank, alpha, *([targets] if targets else []))
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    return model


IDS = torch.arange(60).view(4, 15) * 7 % 30


def test_the_sum_by_hand():
    """W = 1, A = 2, B = 3, alpha / rank = 8 / 1: h = x + 8·3·2·x = 49 x; the frozen parts have no gradient."""
    model = policy()
    inject(model, 1, 8.0, r"attn\.q")
    name, adapter = next(iter(adapters(model).items()))
    for tensor, value in ((adapter.weight, 1.0), (adapter.lora_A, 2.0), (adapter.lora_B, 3.0)):
        torch.nn.init.constant_(tensor, value)
    x = torch.zeros(32, dtype=torch.float64)
    x[5] = 1.0
    assert name == "blocks.0.attn.q" and (adapter(x) == 49).all() and (adapter.merged_weight() == 49).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_starts_at_the_model_and_moves_adapters_alone(family):
    """B = 0: not a bit differs at first. After a step with decay nothing but A and B has moved, and the log-probs have."""
    model, plain = inject(policy(family), 4), policy(family)
    batch = collate([[1, 2]] * 2, [[3, 4, 5], [6, 7]], pad_id=0)
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(2):  # at the first A has no gradient, for B is 0
        optimizer.zero_grad()
        (-token_logps(model, batch).sum()).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{name}.lora_{side}" for name in adapters(model) for side in "AB"} and len(moved) == 2 * len(adapters(model)) > 10
    assert len(optimizer.state) == len(moved)  # no moments of what is frozen


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_the_same_function_and_saves_as_a_plain_folder(family, tmp_path):
    model = adapted(family)
    plain = merged(model)
    assert not adapters(plain) and adapters(model)
    with torch.no_grad():
        assert (model(IDS) - plain(IDS)).abs().max() < 1e-12 and (policy(family)(IDS) - plain(IDS)).abs().max() > 1e-2
        for name, adapter in adapters(model).items():
            expected = adapter.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
            assert torch.equal(plain.get_submodule(name).weight, expected)
    assert plain.tok_embed.weight is model.tok_embed.weight  # shared, not copied
    assert (plain.head.weight is plain.tok_embed.weight) == plain.config.tied
    save_pretrained(plain, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path)(IDS), plain(IDS))


def test_a_frozen_copy_shares_what_is_frozen():
    """Of a model with adapters the adapters are copied; of a model without, everything. Neither follows the other."""
    model = adapted()
    ref = frozen_copy(model)
    own = {name for (name, p), q in zip(model.named_parameters(), ref.parameters(), strict=True) if p is not q}
    assert own == {f"{name}.lora_{side}" for name in adapters(model) for side in "AB"}
    assert not any(p.requires_grad for p in ref.parameters()) and all(a.lora_A.requires_grad for a in adapters(model).values())
    before = ref(IDS)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_B.zero_()
        assert torch.equal(ref(IDS), before) and not torch.equal(model(IDS), before)
    plain = policy()
    assert all(p is not q for p, q in zip(plain.parameters(), frozen_copy(plain).parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [None, r"attn\.[qv]"])
def test_there_and_back(family, targets, tmp_path):
    """Saved and loaded here: the same function. The families that pack q, k, v come back with the rank of all together."""
    model = adapted(family, targets=targets)
    save_adapter(model, tmp_path)
    found = load_adapter(policy(family), tmp_path)
    with torch.no_grad():
        assert (found(IDS) - model(IDS)).abs().max() < 1e-12
    assert not found.tok_embed.weight.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_blocks_has_an_adapter(family):
    model = policy(family)
    matrices = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")}
    assert set(adapters(inject(model, 2))) == matrices


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_one_packed_matrix_keep_their_scales(family, tmp_path):
    """Queries at scale 16 / 2, values at 8 / 4, keys without: gpt2 and gpt_neox store one A and one B, and one alpha, for all three."""
    model = inject(inject(policy(family), 2, 16.0, r"attn\.q"), 4, 8.0, r"attn\.v")
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.2)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        assert (load_adapter(policy(family), tmp_path)(IDS) - model(IDS)).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours(family, tmp_path):
    """The base model as a Hugging Face folder, the adapter beside it: transformers with PEFT gives our logits to 1e-6 (float64, but
    transformers takes llama's norms in float32)."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = adapted(family)
    save_pretrained(policy(family), tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert (theirs(IDS).logits - model(IDS)).abs().max() < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_peft(family, tmp_path):
    """An adapter that PEFT made on every linear layer, its B random, with one module of another rank and alpha."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_pretrained(policy(family), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    last = {"llama": "down_proj", "qwen2": "down_proj", "gpt_neox": "dense_4h_to_h", "gpt2": "mlp.c_proj"}[family]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False,
                             rank_pattern={last: 2}, alpha_pattern={last: 9}, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    found = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        assert (theirs(IDS).logits - found(IDS)).abs().max() < 1e-6
    assert {adapter.scale for adapter in adapters(found).values()} == {5 / 3, 9 / 2}
    next(iter(adapters(found).values())).scale = 0.7  # one of the three that two families pack into one matrix
    save_adapter(found, tmp_path / "again")
    again = load_adapter(load_pretrained(tmp_path / "base"), tmp_path / "again")
    with torch.no_grad():
        assert (again(IDS) - found(IDS)).abs().max() < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_adapters_merge_in_one_rounding(family):
    model = adapted(family, dtype=torch.bfloat16)
    for name, adapter in adapters(model).items():
        exact = adapter.weight.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
        error = (merged(model).get_submodule(name).weight.double() - exact).abs()
        assert (error <= (2.0**-8 + 1e-5) * exact.abs() + 1e-7).all(), name  # half a unit of the last place


def test_adapters_of_a_bfloat16_model_are_float32_and_keep_moving(tmp_path):
    """400 AdamW steps of 1e-4 in one direction: B ends at .04. In bfloat16 it would stop at 2^-5, where half a spacing is above 1e-4.
    The output is bfloat16, and what is saved and loaded is float32. A float64 model keeps float64."""
    model = inject(policy(dtype=torch.bfloat16), 2, 2.0, r"attn\.q")
    adapter = next(iter(adapters(model).values()))
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([adapter.lora_B], lr=1e-4, weight_decay=0.0)
    for _ in range(400):
        optimizer.zero_grad()
        out = adapter(x)
        out.sum().backward()
        optimizer.step()
    assert out.dtype == torch.bfloat16 and (adapter.lora_B.abs() - 0.04).abs().max() < 1e-4
    save_adapter(model, tmp_path)
    again = next(iter(adapters(load_adapter(policy(dtype=torch.bfloat16), tmp_path)).values()))
    assert again.lora_B.dtype == torch.float32 and torch.equal(again.lora_B, adapter.lora_B) and torch.equal(again.lora_A, adapter.lora_A)
    assert {p.dtype for p in inject(policy(), 2).parameters()} == {torch.float64}


def spoil(folder, change):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(("change", "said"), [
    ({"peft_type": "IA3"}, "not LoRA"), ({"use_dora": True}, "use_dora"), ({"use_rslora": True}, "use_rslora"), ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["score"]}, "modules_to_save"), ({"r": 5}, "shapes"), ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "lora_ga"}, "init_lora_weights"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"a_field_of_tomorrow": {"on": True}}, "a_field_of_tomorrow")])
def test_what_would_be_another_sum_is_refused(change, said, tmp_path):
    save_adapter(adapted(), tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(BadInput, match=said):
        load_adapter(policy(), tmp_path)


def peft_folder(tmp_path, **options):
    """(a llama's folder, the folder that PEFT writes of random adapters on it, the logits when PEFT loads the two)."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_pretrained(policy(dtype=torch.float32), tmp_path / "base")
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"], **options}))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        return tmp_path / "base", tmp_path / "adapter", peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    *[{"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal", "mica", "eva")],
    {"lora_dropout": 0.5, "layers_to_transform": [1], "layers_pattern": "layers"},
    {"rank_pattern": {"up_proj|proj": 2}, "alpha_pattern": {"k_proj|q_proj": 3}, "exclude_modules": ["v_proj"]}], ids=str)
def test_options_of_peft_that_change_nothing_are_read(options, tmp_path):
    base, folder, logits = peft_folder(tmp_path, **options)
    with torch.no_grad():
        assert (load_adapter(load_pretrained(base), folder)(IDS) - logits).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"alora_invocation_tokens": [1, 2]}, {"use_dora": True},
    {"use_rslora": True}, {"lora_bias": True}, {"trainable_token_indices": [1]}], ids=str)
def test_options_of_peft_that_change_the_base_or_the_formula_are_refused_by_name(options, tmp_path):
    """For those whose tensors fit, the function would be another: read as plain adapters, the logits differ."""
    base, folder, logits = peft_folder(tmp_path, **options)
    name, value = next(iter(options.items()))
    with pytest.raises(BadInput, match=f"adapter_config.json: {name}={re.escape(repr(value))} changes"):
        load_adapter(load_pretrained(base), folder)
    if name in ("init_lora_weights", "use_rslora"):
        spoil(folder, {name: False})
        with torch.no_grad():
            assert (load_adapter(load_pretrained(base), folder)(IDS) - logits).abs().max() > 1e-3


def test_folders_that_do_not_fit_are_refused(tmp_path):
    save_adapter(adapted(), tmp_path)
    with pytest.raises(BadInput, match="an adapter, not a model"):
        load_pretrained(tmp_path)
    with pytest.raises(BadInput, match="already"):
        load_adapter(adapted(), tmp_path)
    with pytest.raises(BadInput, match="no place for"):
        load_adapter(policy("gpt2"), tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="no tensors"):
        load_adapter(policy(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="missing"):
        load_adapter(policy(), tmp_path)
    for rank, targets, said in ((0, r"attn\.q", "at least 1"), (4, "query", "match no matrix")):
        with pytest.raises(BadInput, match=said):
            inject(policy(), rank, 8.0, targets)


# ------------------------------------------------------------------------------------------------------------ through a run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_adapters_alone(small, method, policy_folder):
    """Two steps with --lora 4: final/ is a plain folder that differs from the base in the blocks' matrices only; what the run prints of
    adapter/ loads beside the base and is the same function."""
    module, cfg = small(method, steps=2, lora=4)
    folder = module.main(cfg)
    base, final = load_pretrained(policy_folder), load_pretrained(folder / "final")
    moved = {name for name, p in final.named_parameters() if name in dict(base.named_parameters())
             and not torch.equal(p, base.get_parameter(name).to(p.dtype))}
    assert moved and all(re.fullmatch(rf"blocks\.\d+\.({ALL})\.weight", name) for name in moved - {"head.weight"})
    assert method == "reward_model" or "head.weight" not in moved
    if method != "reward_model":
        found = load_adapter(base.double(), folder / "adapter")
        with torch.no_grad():
            ids = torch.arange(20).view(2, 10) % base.config.vocab_size
            assert (found(ids) - final(ids)).abs().max() < 1e-9


@pytest.mark.parametrize("method", ["sft", "irft", "grpo"])
def test_a_run_with_adapters_resumes_bit_for_bit(small, method):
    module, cfg = small(method, lora=4)
    whole = load_pretrained(module.main(cfg) / "final")
    _, again = small(method, lora=4)
    real = Run.steps

    def interrupted(self, steps):
        for k in real(self, steps):
            yield k
            if k == 3:  # after the checkpoint of step 4
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.main(again)
    resumed = load_pretrained(module.main(module.Config(resume=again.out)) / "final")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_adapters_need_weights_to_adapt(small):
    module, cfg = small("sft", policy="new", lora=4)
    with pytest.raises(BadInput, match="--lora 4"):
        module.main(cfg)


def test_an_export_with_adapters_is_refused(tmp_path):
    """Written as it is, it would be the base model under another name."""
    with pytest.raises(BadInput, match="merge adapters"):
        save_pretrained(adapted(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_the_memory_of_a_run_with_adapters(small):
    """What the first look says is below half of that without: gradients and moments are the adapters', ref shares the rest."""
    said = []
    for lora in (0, 2):
        module, cfg = small("dpo", steps=1, lora=lora, micro_batch=1)
        run = Run("dpo", cfg)
        model, _ = open_policy(run)
        said.append(peak_memory(run, {"policy": model, "ref": frozen_copy(model)}, 1))
    assert said[1] < 0.5 * said[0]


# ------------------------------------------------------------------------------------------------------ --policy ADAPTER_FOLDER


@pytest.fixture
def adapter_run(small):
    """A run with adapters: final/ holds them merged, adapter/ on their own."""
    module, cfg = small("sft", lora=4, held_out=0.0)
    return module.main(cfg)


def first_loss(small, policy, **changes):
    module, cfg = small("sft", policy=str(policy), steps=1, held_out=0.0, **changes)
    folder = module.main(cfg)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"], folder


def test_an_adapter_folder_is_a_policy(small, adapter_run, capsys):
    """It starts where final/ is, trains the adapters alone, and writes them for the same base; inputs.json has a hash of both."""
    base = json.loads((adapter_run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    merged_loss, _ = first_loss(small, adapter_run / "final")
    loss, folder = first_loss(small, adapter_run / "adapter")
    assert loss == pytest.approx(merged_loss, abs=1e-12)
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == base and written["r"] == 4
    assert {"policy", "base"} <= json.loads((folder / "inputs.json").read_text()).keys()
    plain, trained = load_pretrained(base), load_pretrained(folder / "final")
    assert torch.equal(plain.tok_embed.weight, trained.tok_embed.weight) and not torch.equal(
        plain.blocks[0].attn.q.weight, trained.blocks[0].attn.q.weight)
    assert f"a PEFT folder for {base}" in capsys.readouterr().out


def test_an_adapter_folder_that_peft_wrote_is_a_policy_too(small, policy_folder, tmp_path):
    """The loss of step 1 is that of PEFT's own merged model."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float64)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "theirs")
    merged_folder = tmp_path / "merged"
    theirs.merge_and_unload().save_pretrained(merged_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (merged_folder / name).write_bytes((policy_folder / name).read_bytes())
    loss, _ = first_loss(small, tmp_path / "theirs")
    assert loss == pytest.approx(first_loss(small, merged_folder)[0], abs=1e-9)


def test_sample_and_evaluate_take_an_adapter_folder(adapter_run, capsys):
    from minialign import evaluate
    from minialign.__main__ import main as front_door

    said = []
    for name in ("adapter", "final"):
        front_door(["sample", "--policy", str(adapter_run / name), "--max_new", "5", "--dtype", "float64"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
    settings = evaluate.Config(policies=[str(adapter_run / "final"), str(adapter_run / "adapter")], n=0, dtype="float64", max_len=64)
    one, other = evaluate.main(settings)
    assert one["nll"] == pytest.approx(other["nll"], abs=1e-9)


def test_an_adapter_folder_with_other_adapters_or_without_a_base_is_refused(small, adapter_run):
    with pytest.raises(BadInput, match="--lora 2: .* has adapters already"):
        first_loss(small, adapter_run / "adapter", lora=2)
    config = adapter_run / "adapter" / "adapter_config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps({**record, "base_model_name_or_path": ""}))
    with pytest.raises(BadInput, match="names no base_model_name_or_path"):
        first_loss(small, adapter_run / "adapter")
    config.write_text(json.dumps({**record, "base_model_name_or_path": "owner/name", "revision": "v2"}))
    with pytest.raises(BadInput, match="revision='v2' of owner/name is not fetched"):
        first_loss(small, adapter_run / "adapter")
    config.write_text(json.dumps({**record, "base_model_name_or_path": "nowhere.safetensors"}))
    with pytest.raises(BadInput, match="nowhere.safetensors: expected a folder"):
        first_loss(small, adapter_run / "adapter")
