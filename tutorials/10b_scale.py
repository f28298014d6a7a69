# %% [markdown]
# # 10b · Scale
#
# **You will build** a count of the memory that a training step needs, checked against the project's planner; gradient
# accumulation; mixed precision; and a training step that is shared by two processes, first with a copy of the weights
# in each and then with half of the weights in each.
#
# **Time:** 30 minutes of reading, 40 seconds of computer. No GPU is needed.
#
# **You need:** [01 · A GPT](01_gpt.ipynb), [04 · SFT](04_sft.ipynb). [10 · Kernels](10_kernels.ipynb) helps.
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import contextlib
import dataclasses
import inspect
import io
import os
import subprocess
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import minialign
from minialign.engine.look import layer_numbers
from minialign.methods import sft
from minialign.model import GPT, GPTConfig
from minialign.recipes import MODELS, plan, print_plan, sft_tldr_pythia
from minialign.task import THINGS
from minialign.weights import load_pretrained
from tutorials.checks import always, equal, this_run
from tutorials.figures import kernels as figures

torch.set_num_threads(1)

# %% [markdown]
# ## The question
#
# Mistral-7B has 7.24 billion weights. In float32 that is 27 GiB, and one H100 card has 79.6 GiB. The weights fit. But
# training needs more than weights. **What must be in memory during a step, and what can be done if it does not fit?**
# This is the project's plan of one [SFT](../GLOSSARY.md#sft) step on one card:

# %%
MISTRAL, PYTHIA = MODELS["mistral-7b"], MODELS["pythia-1b"]
RECIPE, SETTINGS = sft_tldr_pythia.RECIPE, sft_tldr_pythia.Config()
alone = plan(dataclasses.replace(RECIPE, gpus=1), SETTINGS, "h100", config=MISTRAL)
figures.cards({"1 card": alone}, 79.6, "10b_alone.png", "One card is not enough for a 7B model")

# %% [markdown]
# All numbers about cards (GPUs) are **arithmetic**. No recipe has been run on a GPU yet ([SCALE](../../docs/SCALE.md),
# [RESULTS](../../docs/RESULTS.md)). Measurements are made on this CPU.
#
# ## 1. Count the weights
#
# We count for Pythia-1B, because its layers (of the GPT-NeoX family) are simple. C is the number of channels, L of
# layers, V the size of the vocabulary. One layer holds
#
# - four C × C matrices of attention (query, key, value, output), each with a bias of C numbers,
# - an MLP with a C × 4C and a 4C × C matrix, with biases,
# - two LayerNorms, with a weight and a bias each.
#
# Around the layers stand the embedding (V × C), one more LayerNorm, and the head (V × C, without bias).


# %%
def my_parameters(config):
    """The number of weights of a NeoX model.

    C, L and V are config.n_embd, config.n_layer and config.vocab_size.
    """
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    attention = 4 * C * C + 4 * C
    mlp = 8 * C * C + 4 * C + C
    norms = 2 * 2 * C
    return 2 * V * C + 2 * C + L * (attention + mlp + norms)


# %% [markdown]
# ### Checkpoint: the model itself, without memory

# %%
for name in ("pythia-1b", "pythia-1.4b"):
    with torch.device("meta"):  # tensors with a shape, but without numbers
        model = GPT(MODELS[name])
    expected = sum(p.numel() for p in model.parameters())
    always(my_parameters(MODELS[name]) == expected, f"my_parameters counts {expected:,} weights.")
    print(f"{name}: {expected:,} weights")

# %% [markdown]
# ## 2. What stays in memory
#
# Per weight, a float32 training run with AdamW holds 16 bytes: the weight (4), its gradient (4), and two moments (4 +
# 4), the running averages of the gradient and of its square. If the weights are *sharded* over several cards (section
# 6), each card holds an equal part.


# %%
def my_resident(weights, cards):
    """What stays on each card in float32, if everything is sharded, in GiB (2**30 bytes).

    Returns two numbers: of the weights, and of gradients and moments together.
    """
    on_each = weights / cards / 2**30
    return 4 * on_each, 12 * on_each


# %% [markdown]
# ### Checkpoint: the planner
#
# `python -m minialign.recipes.sft_tldr_pythia --plan h100` prints the plan below, for two cards. It loads no weights.
# `mixed` is explained in section 5; its weights are stored in float32. Embeddings and heads are *gathered*: each card
# holds them whole during a step. The reserve is an estimate of what CUDA itself takes.

# %%
numbers = print_plan(RECIPE, SETTINGS, "h100")
for cards in (1, 2, 8):
    planned = plan(dataclasses.replace(RECIPE, gpus=cards), SETTINGS, "h100")["resident"]
    mine = torch.tensor(my_resident(my_parameters(PYTHIA), cards))
    theirs = torch.tensor([planned["weights"], planned["gradients and moments"]])
    message = f"my_resident must equal the plan on {cards} cards."
    equal(mine, theirs, atol=1e-5, rtol=0, msg=message)
print(f"7B, float32, one card: {sum(my_resident(7_241_732_096, 1)):.0f} GiB stay")

# %% [markdown]
# The hours are arithmetic too. A matrix product takes 2 flops (floating-point operations) for each weight and token,
# and the backward pass takes twice as many, so 6 together. The plan assumes half of 790 TFLOP/s on each card.

# %%
tokens = 910 * 128 * 576  # steps, rows of a step, positions of a row
hours = 6 * my_parameters(PYTHIA) * tokens / (2 * 0.5 * 790e12) / 3600
print(f"6 flops for each weight and token: {hours:.2f} hours")
planned = numbers["hours"]["training and scoring"]
always(abs(hours - planned) < 0.01, "6 flops for each weight and token give the plan's hours.")

# %% [markdown]
# ## 3. Activations
#
# The backward pass needs numbers from the forward pass, the *activations*. Autograd keeps them. For each position,
# one layer of Pythia keeps 15 C of them:
#
# | kept | numbers |
# | --- | --- |
# | input of the layer (both norms read it) | C |
# | outputs of the two norms | 2 C |
# | queries, keys, values | 3 C |
# | output of attention | C (on a CPU twice: it is copied once) |
# | MLP, before and after its activation function | 4 C + 4 C |
#
# The T × T attention weights of each head are not kept: torch's fused attention computes them in blocks, and again in
# the backward pass. Activations grow with rows × positions × layers. PyTorch calls a function in `saved_tensors_hooks`
# with each tensor that it keeps.


# %%
def kept_bytes(model, inputs):
    """Bytes that autograd keeps after a forward pass of inputs (B, T), weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()  # a storage that is shared counts once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        hidden = model.hidden(inputs)  # watch: hidden (B, T, C)
    del hidden
    return sum(kept.values())


small = dataclasses.replace(
    PYTHIA, n_layer=6, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, ffn_dim=512, rotary_dim=16,
    vocab_size=512, windows=(),
)
torch.manual_seed(0)
model = GPT(small)
B, T, C, L = 4, 128, small.n_embd, small.n_layer
inputs = torch.randint(small.vocab_size, (B, T))
plain = kept_bytes(model, inputs) / (4 * B * T)  # float32 numbers for each position
always(layer_numbers(small)[0] == 15 * C, "The planner's layer_numbers counts 15 C for a layer.")
always(15 * C * L <= plain <= 16 * C * L + 8 * C, "A layer keeps 15 or 16 C, the ends at most 8 C.")
print(f"kept for each position: {plain:.0f} ; 15 C L = {15 * C * L}, 16 C L = {16 * C * L}")

positions = 16 * 576  # rows of the recipe's micro-batch, positions of a row; bfloat16 has 2 bytes
gib = 2 * positions * 15 * PYTHIA.n_embd * PYTHIA.n_layer / 2**30
planned = numbers["phases"]["a micro-batch in training"]
print(f"Pythia-1B, {positions} positions: {gib:.1f} GiB; planned for a micro-batch: {planned:.1f}")

# %% [markdown]
# The rest of the planned micro-batch is mostly logits (tutorial 10) and gradients that are not summed yet.
#
# **Activation checkpointing** (Chen et al. 2016) keeps only the input of each layer: C numbers instead of 15 C. When
# the backward pass reaches a layer, its forward pass is computed again. That takes 8 flops for each weight and token
# instead of 6.

# %%
model.recompute = True  # what --activation_checkpointing sets
again = kept_bytes(model, inputs) / (4 * B * T)
always(C * L <= again <= C * L + 8 * C, "A layer keeps C, the ends at most 8 C.")
gradients, seconds = {}, {False: [], True: []}
for _ in range(5):  # in turn, so that both meet the same load of this machine
    for recompute in (False, True):
        model.recompute = recompute
        start = time.perf_counter()
        loss = model.hidden(inputs).square().mean()
        loss.backward()
        gradients[recompute] = model.blocks[0].attn.q.weight.grad
        model.zero_grad()
        seconds[recompute].append(time.perf_counter() - start)
message = "With and without checkpointing the gradients must be the same."
equal(gradients[True], gradients[False], msg=message)
ratio = (torch.tensor(seconds[True]) / torch.tensor(seconds[False])).median()
print(f"kept for each position: {again:.0f} numbers instead of {plain:.0f}")
print(f"time: {ratio:.2f} of that without (arithmetic: {8 / 6:.2f})")

# %% [markdown]
# ## 4. Gradient accumulation
#
# The second way to keep fewer activations is to pass fewer rows at a time. The loss of a step is a sum over its
# tokens, divided by their number. So its gradient is a sum over *micro-batches*, and `backward()` adds to `p.grad` by
# itself. Here is a small model and eight rows of the polite language. The [mask](../GLOSSARY.md#mask) is 1 on the
# text and 0 on the padding.

# %%
SHORT = [f"ask for {thing}: please." for thing in THINGS[4:8]]
TEXTS = SHORT + [f"ask for {thing}: may i have {thing}, please." for thing in THINGS[:4]]
LETTERS = " " + "".join(sorted(set("".join(TEXTS)) - {" "}))
LONGEST = max(map(len, TEXTS))
ids = torch.tensor([[LETTERS.index(letter) for letter in text.ljust(LONGEST)] for text in TEXTS])
inputs, targets = ids[:, :-1], ids[:, 1:]
mask = torch.tensor([[float(t < len(text)) for t in range(1, LONGEST)] for text in TEXTS]).double()
print(f"{len(TEXTS)} rows, scored tokens of each: {[int(n) for n in mask.sum(1)]}")


def tiny_model():
    """Two layers, 64 channels, float64. The same random weights whenever it is called."""
    torch.manual_seed(0)
    return GPT(GPTConfig.tiny(32, tied=False)).double()


def token_losses(model, inputs, targets):
    """-log π of each target, (B, T), for inputs and targets (B, T)."""
    return F.cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none")


def my_accumulate(model, inputs, targets, mask, micro):
    """Add to every p.grad the gradient of the step's loss, by passes over `micro` rows each.

    inputs, targets, mask (B, T). The loss of the step is the sum of token_losses where mask is 1,
    divided by the number of such tokens *of the whole step*.
    """
    scored = mask.sum()
    for start in range(0, len(inputs), micro):
        rows = slice(start, start + micro)
        losses = token_losses(model, inputs[rows], targets[rows])  # watch: losses (micro, T)
        ((losses * mask[rows]).sum() / scored).backward()


def gradient_of(model):
    """All gradients as one vector; afterwards they are 0."""
    vector = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return vector


# %% [markdown]
# Stop in `my_accumulate` at its first call, with `micro=1`: `losses` has one row, and its last numbers are padding.
#
# ### Checkpoint: the whole batch at once, and the project's loss

# %%
model = tiny_model()
loss, _ = sft.sft_loss(-token_losses(model, inputs, targets), mask)
loss.backward()
expected = gradient_of(model)
for micro in (1, 3, 8):
    my_accumulate(model, inputs, targets, mask, micro)
    message = f"my_accumulate, {micro} rows a pass, must give the gradient of the whole batch."
    equal(gradient_of(model), expected, atol=1e-12, rtol=0, msg=message)
    kept = kept_bytes(model, inputs[:micro]) / 2**20
    print(f"{micro} rows at a time: the same gradient, {kept:.1f} MiB kept")

# %% [markdown]
# ## What is wrong here? (1)
#
# The usual code averages within each micro-batch and then over the micro-batches. No error is raised.

# %%
for start in range(0, 8, 2):
    losses = token_losses(model, inputs[start : start + 2], targets[start : start + 2])
    part = mask[start : start + 2]
    ((losses * part).sum() / part.sum() / 4).backward()  # the mean of 4 means
means = gradient_of(model)  # watch: means (weights,)
print(f"gradient off by {100 * ((means - expected).norm() / expected.norm()).item():.1f} %")

# %% [markdown]
# ## 5. Mixed precision
#
# A bfloat16 number takes 2 bytes instead of 4, and cards have special units for products of such numbers. But it has
# only 8 significant bits. What does a step of AdamW, which moves each weight by about the learning rate, do to a
# weight of 0.02? The recipe above uses the learning rate 3e-6:

# %%
weight = torch.tensor(0.02, dtype=torch.bfloat16)
above = torch.nextafter(weight, torch.tensor(1.0, dtype=torch.bfloat16))
print(f"0.02 is stored as {weight.item():.6f}; the next number is {above.item():.6f}")
print("0.02 + 3e-6 == 0.02 in bfloat16:", bool(weight + 3e-6 == weight))
always(bool(weight + 3e-6 == weight), "The step is far below half the distance of two numbers.")

# %% [markdown]
# **Mixed precision** keeps the weights, gradients and moments in float32, and computes with bfloat16 copies of the
# weights. Small steps add up in float32. (Micikevicius et al. 2018 used float16. It rounds small gradients to 0, so
# they multiplied the loss by a factor and divided the gradients by it afterwards. bfloat16 has the range of float32
# and needs no factor.)
# `torch.func.functional_call(model, weights, (inputs,))` runs a model with other weights, given as {name: tensor}.


# %%
def my_mixed_backward(model, inputs, targets):
    """The mean loss of all tokens, by way of bfloat16 weights. Adds float32 gradients to p.grad.

    Copy every weight of the model (float32) to bfloat16 with p.bfloat16(), which autograd follows.
    Run the model with the copies. Compute the cross-entropy from float32 logits. Returns the loss,
    detached.
    """
    copies = {name: p.bfloat16() for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model, copies, (inputs,))  # watch: logits (B, T, V)
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


# %% [markdown]
# ### Checkpoint: a model that is bfloat16 throughout
#
# The gradients must be those of a bfloat16 model, but stored in float32.

# %%
model = tiny_model().float()
half = tiny_model().float().bfloat16()
loss = F.cross_entropy(half(inputs).float().flatten(0, 1), targets.flatten())
loss.backward()
mine = my_mixed_backward(model, inputs, targets)
always(bool(mine == loss), "my_mixed_backward returns the loss of the bfloat16 model.")
for p, q in zip(model.parameters(), half.parameters(), strict=True):
    always(p.grad.dtype == torch.float32, "Gradients of float32 weights are float32.")
    message = "my_mixed_backward must give the gradients of the bfloat16 model."
    equal(p.grad, q.grad.float(), msg=message)
print("mixed: the bfloat16 model's gradients, in float32")

# %% [markdown]
# ## Break it: bfloat16 weights
#
# Train three times with the recipe's learning rate: in float32, mixed, and with weights in bfloat16.

# %%
def train(kind, lr, steps=60):
    """The losses of training with AdamW, and the share of the weights that it moved."""
    model = tiny_model().float()
    model = model.bfloat16() if kind == "bfloat16" else model
    before = parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        if kind == "mixed":
            loss = my_mixed_backward(model, inputs[:2], targets[:2])
        else:
            logits = model(inputs[:2]).float().flatten(0, 1)
            loss = F.cross_entropy(logits, targets[:2].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = parameters_to_vector(model.parameters()).detach()  # watch: after (weights,)
    share = (after != before).float().mean().item()
    print(f"{kind:8} loss {losses[0]:.4f} -> {losses[-1]:.4f}; {share:4.0%} of the weights moved")
    return losses, share


LR, curves, moved = SETTINGS.lr, {}, {}
for kind in ("float32", "mixed", "bfloat16"):
    curves[kind], moved[kind] = train(kind, LR)
this_run(moved["bfloat16"] < 0.3 < 0.9 < moved["mixed"], "In bfloat16 most weights do not move.")
this_run(abs(curves["mixed"][-1] - curves["float32"][-1]) < 2e-3, "Mixed learns as float32 does.")
figures.precision(curves, LR)

# %% [markdown]
# No error is raised, and no number becomes NaN. In bfloat16 most weights stay exactly where they were, because each
# step is rounded away. Only weights near 0 move, where bfloat16 numbers lie closer together. bfloat16 throughout takes
# 8 bytes a weight, mixed precision 16 and 2 for the copies; but here the model with 8 bytes learns almost nothing.
#
# ## 6. Several processes
#
# A run on several cards has one **process** for each. All run the same program. `rank` is the number of a process,
# `world` their count. `torchrun` starts them. Every process must call the *collective* operations:
#
# - `all_reduce(x)`: x becomes the sum of all processes' x, everywhere.
# - `all_gather_into_tensor(out, x)`: `out` becomes all x one behind the other, everywhere.
# - `reduce_scatter_tensor(out, x)`: x is summed over the processes, and each receives only its part of the sum.
#
# In **data parallel** training each process has a full copy and takes a share of the rows; the gradients are summed.
# (PyTorch's DistributedDataParallel, DDP, averages them; then each loss must be multiplied by `world`.) Each process
# computes less, but needs as much memory for weights as one process alone. In **sharded** training (ZeRO, Rajbhandari
# et al. 2020; PyTorch's FSDP, Zhao et al. 2023) each process also *stores* only a part of the weights, gradients and
# moments. Whole weights are gathered for the computation, and dropped again.

# %%
figures.layouts()


# %% [markdown]
# Both steps below compute the same sum as section 4, cut into processes and not into passes. Both use `my_rows`.


# %%
def my_rows(batch_size):
    """The slice of a step's rows that this process takes: equal parts, in the order of ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def my_data_parallel_step(model, optimizer, inputs, targets, mask):
    """One step of a full copy. inputs, targets, mask (B, T): *all* rows of the step.

    Backward on my_rows, with the loss divided by the scored tokens of the whole step. Then sum each
    p.grad over the processes, step the optimizer, and set the gradients to zero.
    """
    rows = my_rows(len(inputs))
    losses = token_losses(model, inputs[rows], targets[rows])
    ((losses * mask[rows]).sum() / mask.sum()).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    optimizer.step()
    optimizer.zero_grad()


def my_sharded_step(model, shard, optimizer, inputs, targets, mask):
    """The same step if this process stores only `shard` (n,), its part of the vector of weights.

    shard is the only parameter of `optimizer`. Gather all shards into one vector, and put that into
    the model (vector_to_parameters). Backward as above. Put every p.grad into one vector
    (parameters_to_vector), and let each process receive the sum of its own part as shard.grad. Step
    the optimizer, and set the model's gradients to zero.
    """
    full = torch.empty(dist.get_world_size() * len(shard), dtype=shard.dtype)
    dist.all_gather_into_tensor(full, shard.detach())
    vector_to_parameters(full, model.parameters())
    rows = my_rows(len(inputs))
    losses = token_losses(model, inputs[rows], targets[rows])
    ((losses * mask[rows]).sum() / mask.sum()).backward()
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    shard.grad = torch.empty_like(shard)
    dist.reduce_scatter_tensor(shard.grad, gradient)
    optimizer.step()
    model.zero_grad()


# %% [markdown]
# FSDP2 does this block by block, so that no card ever holds all weights at once.
#
# ### Checkpoint: two processes against one
#
# The next cell writes a program into a temporary folder: your functions, and the lines of `PROGRAM`. `torchrun` starts
# it in two processes, which talk over *gloo*, a library for collectives on CPUs. (Breakpoints here do not reach them.)

# %%
PROGRAM = '''
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]
batch = torch.load(folder + "/batch.pt")

model = tiny_model()                                            # 1. a copy in each
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(60):
    my_data_parallel_step(model, optimizer, *batch)
if rank == 0:
    torch.save(model.state_dict(), folder + "/copies.pt")

model = tiny_model()                                            # 2. half of the weights in each
vector = parameters_to_vector(model.parameters()).detach()
shard = vector.chunk(2)[rank].clone().requires_grad_()
optimizer = torch.optim.AdamW([shard], lr=5e-3)
for step in range(5):
    my_sharded_step(model, shard, optimizer, *batch)
print(f"process {rank} stores {len(shard):,} of {len(vector):,} weights\\n", end="", flush=True)
torch.save(shard.detach(), f"{folder}/shard{rank}.pt")

model = tiny_model()                                            # 3. broken: nothing is summed
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
inputs, targets, mask = batch
rows = slice(4 * rank, 4 * rank + 4)
for step in range(5):
    losses = token_losses(model, inputs[rows], targets[rows])
    loss = (losses * mask[rows]).sum() / mask[rows].sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.save((loss.item(), model.state_dict()), f"{folder}/alone{rank}.pt")

for layout in ("ddp", "fsdp"):                                  # 4. the project
    sft.main(sft.Config(**SFT, parallel=layout, out=f"{folder}/{layout}"))
parallel.leave()
'''
IMPORTS = '''import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from minialign.engine import parallel
from minialign.methods import sft
from minialign.model import GPT, GPTConfig
'''
FUNCTIONS = (tiny_model, token_losses, my_rows, my_data_parallel_step, my_sharded_step)
SFT = dict(policy="new", steps=3, batch_size=8, micro_batch=3, dtype="float64", eval_every=3)

temporary = tempfile.TemporaryDirectory()  # deleted when Python ends
FOLDER = Path(temporary.name)
parts = [IMPORTS, f"SFT = {SFT}", *map(inspect.getsource, FUNCTIONS), PROGRAM]
(FOLDER / "two.py").write_text("\n".join(parts), encoding="utf-8")
torch.save((inputs, targets, mask), FOLDER / "batch.pt")
project = str(Path(minialign.__file__).parents[1])
command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
done = subprocess.run(
    [*command, str(FOLDER / "two.py"), str(FOLDER)], capture_output=True, text=True, timeout=600,
    env={**os.environ, "PYTHONPATH": project, "OMP_NUM_THREADS": "1"},
)
problems = [x for x in done.stderr.splitlines() if x.startswith("[rank")] or [done.stderr]
always(done.returncode == 0, "Both processes end without an error.\n" + "\n".join(problems))
print("torchrun --standalone --nproc_per_node 2 two.py")
print("\n".join(sorted(x for x in done.stdout.splitlines() if x.startswith("process"))))

# %% [markdown]
# Now the same steps in this one process.

# %%
model = tiny_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for step in range(60):
    if step == 5:
        after_five = parameters_to_vector(model.parameters()).detach().clone()
    my_accumulate(model, inputs, targets, mask, micro=8)
    optimizer.step()
    optimizer.zero_grad()

copies = torch.load(FOLDER / "copies.pt")
for name, p in model.state_dict().items():
    message = "60 steps of my_data_parallel_step must equal 60 steps of one process."
    equal(copies[name], p, atol=1e-8, rtol=0, msg=message)
shards = [torch.load(FOLDER / f"shard{rank}.pt") for rank in (0, 1)]
vector = torch.cat(shards)  # watch: vector (weights,)
message = "5 steps of my_sharded_step must equal 5 steps of one process."
equal(vector, after_five, atol=1e-10, rtol=0, msg=message)
print(f"sharded against one process: largest difference {(vector - after_five).abs().max():.0e}")


@torch.no_grad()
def say(model, text, letters=30):
    """The text, continued with the most probable letter each time, up to a full stop."""
    for _ in range(letters):
        if text.endswith("."):
            break
        ids = torch.tensor([[LETTERS.index(letter) for letter in text]])
        text += LETTERS[model(ids)[0, -1, : len(LETTERS)].argmax()]
    return text


trained = tiny_model()
trained.load_state_dict(copies)
for name, policy in {"before": tiny_model(), "trained by two processes": trained}.items():
    print(f"{name:25} {say(policy, 'ask for tea: ')}")

# %% [markdown]
# The project does the same. `--parallel ddp` copies the weights, `--parallel fsdp` (the default under torchrun)
# shards them with PyTorch's FSDP2. `PROGRAM` has run three SFT steps with both. Here is one process:

# %%
with contextlib.redirect_stdout(io.StringIO()):
    sft.main(sft.Config(**SFT, out=str(FOLDER / "one")))
found = {}
for layout in ("one", "ddp", "fsdp"):
    policy = load_pretrained(FOLDER / layout / "final")
    found[layout] = parameters_to_vector(policy.parameters()).detach()
for layout in ("ddp", "fsdp"):
    gap = (found[layout] - found["one"]).abs().max().item()
    always(gap < 1e-10, f"sft --parallel {layout} on two processes equals one process.")
    print(f"sft on two processes, --parallel {layout:4}: {gap:.0e} from one process")

# %% [markdown]
# ## Break it: forget the sum
#
# The third part of `PROGRAM` left `all_reduce` out. Each process follows its own rows.

# %%
(loss0, zero), (loss1, one) = (torch.load(FOLDER / f"alone{rank}.pt") for rank in (0, 1))
apart = max((zero[name] - one[name]).abs().max().item() for name in zero)
print(f"loss of process 0: {loss0:.3f}, of process 1: {loss1:.3f}")
print(f"their weights differ by up to {apart:.4f}")
always(apart > 1e-4, "Without the sum the copies become different models.")

# %% [markdown]
# Both losses have fallen (a new model begins near log 32 = 3.5), and no error is raised. But there are now two
# models, each trained on half of the rows, and a trainer saves only that of rank 0.
#
# ## What is wrong here? (2)
#
# Every process draws its own rows, with a generator. Two processes, with two rows each, are imitated one after the
# other. Nothing fails.

# %%
model, summed = tiny_model(), 0
for _process in (0, 1):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(8, generator=generator)[:2]
    losses = token_losses(model, inputs[rows], targets[rows])
    ((losses * mask[rows]).sum() / mask[rows].sum() / 2).backward()
    summed = summed + gradient_of(model)
print(f"norm of the summed gradient: {summed.norm():.4f}")

# %% [markdown]
# ## 7. Put it together
#
# Now the 7B model again, with a bar for each plan of the same step.

# %%
steps = {
    "1 card": (1, {}),
    "2 cards": (2, {}),
    "4 cards": (4, {}),
    "4 cards,\nmicro-batch 4": (4, {"micro_batch": 4}),
    "4 cards,\ncheckpointing": (4, {"activation_checkpointing": True}),
}
plans = {}
for name, (cards, flags) in steps.items():
    recipe = dataclasses.replace(RECIPE, gpus=cards)
    numbers = plan(recipe, dataclasses.replace(SETTINGS, **flags), "h100", config=MISTRAL)
    gib = sum(numbers["resident"].values()) + numbers["phases"]["a micro-batch in training"]
    hours = numbers["hours"]["training and scoring"]
    plans[name] = numbers
    print(f"{cards} card(s) {flags or ''}: {gib:.0f} GiB on each, {hours:.2f} hours")
figures.cards(plans, 79.6, "10b_cards.png", "Sharding divides only what stays in memory")

# %% [markdown]
# Even four cards are too few: they divide the weights, gradients and moments, but each still holds the activations of
# its own micro-batch of 16 rows. With passes of 4 rows the step fits on four cards (52 GiB, by arithmetic in the same
# time), and with checkpointing too (43 GiB, a third more time).
#
# | what does not fit | flag | what it costs | where |
# | --- | --- | --- | --- |
# | weights, gradients, moments | `torchrun --nproc_per_node N`, `--parallel fsdp` | communication | `engine/parallel.py` |
# | activations of many rows | `--micro_batch` | smaller matrix products | `engine/common.py` |
# | activations of many layers | `--activation_checkpointing` | a third more flops | `model.py` |
# | logits | none: large ones always come in slices | they are computed twice | tutorial 10 |
# | a second model, the [reference](../GLOSSARY.md#reference) | `--precompute_ref` (DPO, IRFT) | one pass beforehand | `logps.py` |
# | moments and gradients | `--lora 64 --dtype bfloat16` | only adapters are trained (exercise 2) | `lora.py` |
# | moments on one card | `--optimizer adamw8bit --dtype bfloat16` | random rounding: small steps count on average | `engine/adamw8bit.py` |
#
# In the project a step is the same step on any number of processes that divides `--batch_size`. Read on in
# [SCALE](../../docs/SCALE.md), with the plans of all recipes, and in `minialign/engine/parallel.py`.
#
# ## What you now know
#
# - Float32 training with AdamW holds 16 bytes a weight. Activations grow with rows, positions and layers.
# - A step's gradient is a sum over tokens. Cut it over time (micro-batches) or over processes; divide by the tokens
#   of the *whole* step.
# - Sharding stores each number once. A step gathers the weights, sums the gradients, and updates its own part.
# - Keep weights in float32 for small learning rates, and compute in bfloat16.
# - Plan by arithmetic before you rent cards, then compare the plan with a measurement.
#
# Next: [11 · The storyteller](11_storyteller.ipynb).
#
# ## Exercises
#
# **Exercise 1** (easy, 5 minutes; try this). In the break of section 5, set `LR = 3e-4` (and TINKER: a check will
# fail). What share of the bfloat16 weights do you expect to move, and will they learn as float32 does?
#
# **Exercise 2** (medium, 10 minutes). LoRA (Hu et al. 2021) freezes the weights and trains small matrices beside
# them, the adapters. Take Pythia-1B with 2 bytes for each frozen weight, and 16 for each of a million adapter
# numbers. How many GiB stay on one card? Which part of section 3 does LoRA *not* make smaller?
#
# **Exercise 3** (hard, 20 minutes). Most trainers clip the gradient: if its norm is above 1, it is scaled down to 1.
# In sharded training no process sees the whole gradient. Write the norm of the whole gradient from the parts, with
# one collective of a single number. What goes wrong if each process clips its own part?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# The micro-batches have different numbers of scored tokens. A mean of means gives a token in a short row more weight
# than one in a long row. Divide by the tokens of the whole step, as `my_accumulate` does. (Several trainers had this
# bug until 2024.)
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# There are two bugs. Both processes use the seed 0, so both draw the *same* two rows, and half of the computing time is
# wasted. And each process divides by its own scored tokens, as in puzzle 1; with different rows the gradient would be
# wrong. So draw the rows of the whole step in every process with one seed, let each take its share (`batch_rows` and
# `passes` in `engine/common.py`), and divide by the tokens of the step.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
rows = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:2]
my_accumulate(model, inputs[rows], targets[rows], mask[rows], micro=2)
message = "Two processes with the same seed must compute what one process does with two rows."
equal(gradient_of(model), summed, atol=1e-12, rtol=0, msg=message)
print("the summed gradient is that of two rows, not of four")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# Near 0.02 two neighbours are 0.00012 apart. A step of 3e-4 is larger, so nearly all weights move. The loss falls
# nearly as far as in float32, but each step is still rounded. Recipes for large models use 1e-6 to 1e-5.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
weights = parameters_to_vector(tiny_model().float().bfloat16().parameters()).detach()
for lr in (3e-6, 3e-5, 3e-4):
    share = (weights + torch.tensor(lr).bfloat16() != weights).float().mean().item()
    print(f"adding {lr:.0e} once changes {share:4.0%} of the weights")
this_run(share > 0.9, "A step of 3e-4 changes nearly all weights.")
(wide, _), (narrow, _) = train("float32", 3e-4), train("bfloat16", 3e-4)
this_run(wide[-1] < narrow[-1] < wide[-1] + 0.2, "At 3e-4 bfloat16 learns nearly as float32 does.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# 2 bytes × 1.01 billion = 1.88 GiB, and 16 bytes × 1 million = 0.015 GiB. Activations are hardly smaller: the gradient
# passes through every layer, so attention, norms and activation functions keep what they need. A frozen matrix alone
# needs only its weight, but an adapter needs the matrix's input. With adapters at every matrix, all inputs are kept.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
gib = (2 * my_parameters(PYTHIA) + 16 * 1_000_000) / 2**30
print(f"{gib:.2f} GiB stay, instead of {sum(my_resident(my_parameters(PYTHIA), 1)):.1f}")
always(abs(gib - 1.90) < 0.01, "Frozen weights and a million adapter numbers take 1.90 GiB.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Sum the squares of the own part, `all_reduce` this one number, take the root. If each process clips its own part by
# its own norm, each part has a norm of up to 1, and the whole one of up to the root of the number of cards: √2 on two,
# 8 on 64. The parts are also scaled by different factors, which changes the direction, here only a little.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
parts = [part.clone() for part in expected.chunk(2)]
squares = [part.square().sum() for part in parts]  # one number in each process
whole = torch.stack(squares).sum().sqrt()  # what all_reduce and the root give
message = "The norm from two parts must equal the norm of the whole gradient."
equal(whole, expected.norm(), msg=message)
own = torch.cat([part / part.norm().clamp(min=1) for part in parts])
cosine = (own @ expected / own.norm() / expected.norm()).item()
print("norms of the parts:", [round(part.norm().item(), 2) for part in parts])
print(f"parts clipped alone: norm {own.norm():.3f}, cosine to the right direction {cosine:.3f}")
always(own.norm() > 1.1, "Parts that are clipped alone have a norm above the limit together.")
always(cosine < 0.9999, "Each part clipped by its own norm changes the direction.")
