# %% [markdown]
# # 10b · Scale: does my model fit, and how do several processes compute one step?
#
# **You will build** a count of the memory that a training step needs, checked against the project's planner; gradient
# accumulation; and a step that two processes compute together, first with all weights in each, then with half of
# them.
#
# **Time:** 27 minutes of reading, about a minute of computer. No GPU is needed.
#
# **You need:** [01 · A GPT](01_gpt.ipynb) and [04 · SFT](04_sft.ipynb). This lesson teaches no alignment method. You
# can skip it until a model does not fit into your memory.
#
# Words in blue are explained in the [glossary](../GLOSSARY.md); [start here](00_start_here.ipynb) says how to step
# through with a debugger.

# %%
import sys
from pathlib import Path

# minialign runs from its checkout: put the folder that holds it on the path (`pip install -e .` makes this unnecessary).
here = Path(globals().get("__file__", "cell")).resolve()
sys.path[:0] = [str(folder) for folder in here.parents if (folder / "minialign").is_dir()][:1]

import dataclasses

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minialign.engine.look import layer_numbers
from minialign.methods import sft
from minialign.model import GPT
from minialign.recipes import MODELS, plan, print_plan, sft_tldr_pythia
from tutorials import two_processes
from tutorials.checks import always, equal, this_run
from tutorials.figures import kernels as figures
from tutorials.two_processes import all_rows, tiny_model, token_losses

torch.set_num_threads(1)

# %% [markdown]
# ## The question
#
# Mistral-7B has 7.24 billion weights. In float32, at 4 bytes each, they take 27 GiB (a GiB is $2^{30}$ bytes). An
# H100 card (a GPU) has 79.6 GiB. The weights fit. But training needs more than weights. **What must be in memory
# during a step, how long does a run take, and what do more cards change?**
#
# The project's function `plan` counts memory and hours by arithmetic. This is its count for one
# [SFT](../GLOSSARY.md#sft) step on one card. The next sections explain its four colours.

# %%
MISTRAL = MODELS["mistral-7b"]
RECIPE = dataclasses.replace(sft_tldr_pythia.RECIPE, model="mistral-7b")  # SFT on TL;DR summaries
SETTINGS = sft_tldr_pythia.Config()


def planned(cards, **changes):
    """The plan of the recipe on so many H100 cards, with changed settings."""
    recipe = dataclasses.replace(RECIPE, gpus=cards)
    return plan(recipe, dataclasses.replace(SETTINGS, **changes), "h100")


one_card = planned(cards=1)
figures.cards({"1 card": one_card}, 79.6, "10b_alone.png", "One card is not enough for a 7B model")

# %% [markdown]
# All numbers about cards are arithmetic: no recipe has been run on a GPU yet ([SCALE](../../docs/SCALE.md)).
#
# ## 1. What stays in memory?
#
# First the weights. Mistral has C = 4096 channels, L = 32 layers and a vocabulary of V = 32,000. One layer holds
#
# - four matrices of attention: C × C for query and output, C × C/4 for key and value (four query heads share one
#   key);
# - an MLP of three C × F matrices, F = 14,336;
# - two norms with C weights each. There are no biases.
#
# Besides the layers there are the embedding (V × C), one more norm and the head (V × C).


# %%
def my_parameters(config):
    """The number of weights of a model of Mistral's kind.

    C, F, L and V are config.n_embd, config.ffn_dim, config.n_layer and config.vocab_size. A key or
    a value has config.n_kv_head * config.head_dim numbers (C/4 in Mistral).
    """
    C, F, L, V = config.n_embd, config.ffn_dim, config.n_layer, config.vocab_size
    attention = 2 * C * C + 2 * C * config.n_kv_head * config.head_dim
    return 2 * V * C + C + L * (attention + 3 * C * F + 2 * C)


# %% [markdown]
# ### Checkpoint: the model itself, without memory
#
# On torch's "meta" device a tensor has a shape, but no numbers. So even the 7B model can be built here.

# %%
for config in (MISTRAL, dataclasses.replace(MISTRAL, n_layer=2, n_kv_head=4, windows=())):
    with torch.device("meta"):
        expected = sum(p.numel() for p in GPT(config).parameters())
    always(my_parameters(config) == expected, f"my_parameters must count {expected:,} weights.")
    print(f"{config.n_layer} layers, {config.n_kv_head} key heads: {expected:,} weights")

# %% [markdown]
# For each weight, training with AdamW holds 16 bytes: the weight (4), its gradient (4), and two *moments* (4 + 4),
# the running averages of the gradient and of its square. If these are *sharded*, each card stores an equal part
# (section 6).


# %%
def my_resident(weights, cards):
    """What stays on each card in float32, if everything is sharded, in GiB (2**30 bytes).

    Returns two numbers: that of the weights, and that of gradients and moments together.
    """
    on_each = weights / cards / 2**30
    return 4 * on_each, 12 * on_each


# %% [markdown]
# ### Checkpoint: the planner

# %%
for cards in (1, 2, 8):
    stays = planned(cards)["resident"]
    mine = torch.tensor(my_resident(my_parameters(MISTRAL), cards))
    theirs = torch.tensor([stays["weights"], stays["gradients and moments"]])
    message = f"my_resident must equal the plan on {cards} cards."
    equal(mine, theirs, atol=1e-4, rtol=0, msg=message)
    print(f"{cards} card(s): {mine[0]:.1f} GiB of weights, {mine[1]:.1f} of gradients and moments")

# %% [markdown]
# So these alone take 108 GiB. The plan's precision is `mixed`: all of them are stored in float32, but each step
# computes with copies of the weights in bfloat16, 2 bytes a number. (Weights *stored* in bfloat16 would hardly learn:
# exercise 1.)
#
# ## 2. What comes and goes: activations
#
# The backward pass needs numbers from the forward pass, the **activations**. Autograd keeps them until they are used.
# One layer of Mistral keeps 24.5 C numbers of 2 bytes for each position of each row:
#
# | kept by one layer | numbers |
# | --- | --- |
# | two norms: input in float32 (counts twice), scaled input, output | 2 × 4 C |
# | queries, keys, values, and the output of attention | C + C/4 + C/4 + C |
# | MLP: the first two products, one of them activated, and what enters the last; F = 3.5 C | 4 × 3.5 C |
#
# (The T × T attention weights are not kept: torch's fused attention computes them again in the backward pass.)
#
# We measure it. PyTorch calls the first function in `saved_tensors_hooks` with each tensor that it keeps. Now the
# model must fit on this CPU: it has Mistral's proportions, but 6 layers of 128 channels.


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
    MISTRAL, n_layer=6, n_head=4, n_kv_head=1, n_embd=128, head_dim=32, ffn_dim=448, rotary_dim=32,
    vocab_size=512, windows=(),
)
torch.manual_seed(0)
model = GPT(small).bfloat16()
B, T, C, L = 4, 128, small.n_embd, small.n_layer
inputs = torch.randint(small.vocab_size, (B, T))
plain = kept_bytes(model, inputs) / (2 * B * T * C)
model.recompute = True  # what --activation_checkpointing sets; explained below
again = kept_bytes(model, inputs) / (2 * B * T * C)
print(f"kept for each position: {plain:.1f} C; by the table, 24.5 C L = {24.5 * L:.1f} C")
print(f"with activation checkpointing: {again:.1f} C")
always(layer_numbers(MISTRAL)[0] == 24.5 * MISTRAL.n_embd, "The planner counts 24.5 C for a layer.")
always(24.5 * L < plain < 26 * L + 5, "A layer keeps 24.5 to 26 C, and the ends at most 5 C.")
always(L < again < L + 5, "With checkpointing a layer keeps C, the ends at most 5 C.")

# %% [markdown]
# The measurement is a little larger: a CPU copies the output of attention once more (C for each layer), and the last
# norm keeps 4 C. Now Mistral again. The recipe passes 16 rows of 576 positions at a time:

# %%
positions = 16 * 576
activations = 2 * 24.5 * MISTRAL.n_embd * MISTRAL.n_layer * positions / 2**30
micro_batch = one_card["phases"]["a micro-batch in training"]
print(f"activations of {positions} positions: {activations:.1f} GiB")
print(f"planned for a micro-batch: {micro_batch:.1f} GiB")
always(0.9 < activations / micro_batch < 1, "Activations are nine tenths of a planned micro-batch.")

# %% [markdown]
# (The other tenth: slices of [logits](../GLOSSARY.md#logits), see [10](10_kernels.ipynb), gradients that are not
# summed yet, and bfloat16 copies of two layers.)
#
# Activations grow with rows × positions × layers. There are two ways to keep fewer. **Activation checkpointing**
# (Chen et al. 2016) keeps only the input of each layer, C numbers, and computes the layer again when the backward
# pass reaches it. That takes a third more time. **Gradient accumulation** passes fewer rows at a time.
#
# ## 3. Gradient accumulation
#
# How can a step over 8 rows be computed 2 rows at a time? Its loss is the sum of the losses of its tokens, divided by
# their number. So its gradient is a sum too, and `backward()` adds to `p.grad` by itself. It is enough to call
# `backward()` after each pass.
#
# From here to section 6 the model is a toy with two layers and 86,336 weights, in float64. It comes from
# [tutorials/two_processes.py](../two_processes.py), with eight rows of the toy language. The
# [mask](../GLOSSARY.md#mask) is 1 on the text and 0 on the padding. `token_losses(model, inputs, targets)` is −log π
# of each target, (B, T).

# %%
inputs, targets, mask = all_rows()
print(f"{len(inputs)} rows, scored tokens of each: {[int(n) for n in mask.sum(1)]}")


def my_accumulate(model, inputs, targets, mask, micro):
    """Add to every p.grad the gradient of the step's loss, by passes over `micro` rows each.

    inputs, targets, mask (B, T). The loss of the step is the sum of token_losses where mask is 1,
    divided by the number of such tokens *of the whole step*. Call backward once for each pass.
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
# ### Checkpoint: the whole batch at once, with the project's loss
#
# The gradient must stay the same, and the activations shrink with the rows of a pass.

# %%
model = tiny_model()
loss, _ = sft.sft_loss(-token_losses(model, inputs, targets), mask)
loss.backward()
expected = gradient_of(model)
for micro in (8, 3, 1):
    my_accumulate(model, inputs, targets, mask, micro)
    message = f"my_accumulate, {micro} rows a pass, must give the gradient of the whole batch."
    equal(gradient_of(model), expected, atol=1e-12, rtol=0, msg=message)
    kept = kept_bytes(model, inputs[:micro]) / 2**20
    print(f"{micro} rows a pass: the same gradient, {kept:.1f} MiB of activations")

# %% [markdown]
# ## What is wrong here? (1)
#
# Somebody adds up the losses of all passes and calls `backward()` once at the end. The gradient is right. What has
# this code not achieved?

# %%
total = 0
for start in range(0, 8, 2):
    rows = slice(start, start + 2)
    losses = token_losses(model, inputs[rows], targets[rows])
    total = total + (losses * mask[rows]).sum() / mask.sum()
total.backward()
print("the right gradient:", torch.allclose(gradient_of(model), expected))

# %% [markdown]
# ## 4. How long does a run take?
#
# Count flops (floating-point operations) for Mistral. A matrix product takes 2 for each weight and token: a
# multiplication and an addition. The backward pass has two products for each of the forward pass: one for the
# gradient of the weights, one for that of the input. So a step takes 6 flops for each weight and token (with
# activation checkpointing 8).
#
# This count has two errors. It treats the embedding as a product, but it is only looked up. And it leaves out
# attention's own products (queries with keys, weights with values): 4 T C flops for each token and layer in a forward
# pass, if all T × T pairs are computed.

# %%
tokens = 910 * 128 * 576  # steps of the run, rows of a step, positions of a row
speed = 0.5 * 790e12  # flops a second: half of 0.8 of the vendor's number, an assumption
weights, C, L, V = my_parameters(MISTRAL), MISTRAL.n_embd, MISTRAL.n_layer, MISTRAL.vocab_size
hours = 6 * weights * tokens / speed / 3600
print(f"one card: {hours:.2f} hours")
always(
    abs(hours - one_card["hours"]["training and scoring"]) < 1e-6,
    "6 flops for each weight and token must give the plan's hours.",
)
print(f"embedding counted as a product: {V * C / weights:.1%} too much")
print(f"attention's own products left out: {4 * 576 * C * L / (2 * weights):.1%} too little")

# %% [markdown]
# N cards take 1/N of the hours if communication takes no extra time, which the plan assumes.
#
# ## 5. Two processes, a copy in each
#
# A run on several cards has one **process** for each card. All run the same program. Each has a number, its *rank*;
# their count is the *world size*.
#
# In **data parallel** training each process has all weights and takes its share of the rows. The gradient is a sum
# over rows, as in section 3. So the processes sum their gradients, and each takes the same optimizer step. One call
# does it: `dist.all_reduce(x)` replaces x in every process by the sum of all processes' x.


# %%
def my_data_parallel_step(model, optimizer, inputs, targets, mask):
    """One step of a process with a full copy. inputs, targets, mask (B, T): *all* rows of the step.

    This process takes x.chunk(world size)[rank] of each of the three. Backward on these rows, with
    the loss divided by the scored tokens of the whole step. Then all_reduce every p.grad, step the
    optimizer, and set the gradients to zero.
    """
    scored, rank, world = mask.sum(), dist.get_rank(), dist.get_world_size()
    inputs, targets, mask = (x.chunk(world)[rank] for x in (inputs, targets, mask))
    losses = token_losses(model, inputs, targets)  # watch: losses (B / world, T)
    ((losses * mask).sum() / scored).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    optimizer.step()
    optimizer.zero_grad()


# %% [markdown]
# ### Checkpoint: five steps of two processes against five steps of one
#
# `train_copies` is what each process does. `two_processes.here` calls it in this process, as a group of one: there
# breakpoints work. `two_processes.run` starts it, with your function, in two processes, by PyTorch's `torchrun`. It
# returns what each of them returned.


# %%
def train_copies():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(5):
        my_data_parallel_step(model, optimizer, *all_rows())
    return parameters_to_vector(model.parameters()).detach()


model = tiny_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
for _ in range(5):  # without any group: the gradient of section 3
    my_accumulate(model, inputs, targets, mask, micro=8)
    optimizer.step()
    optimizer.zero_grad()
expected = parameters_to_vector(model.parameters()).detach()

message = "Five steps of my_data_parallel_step in a group of one must equal five steps alone."
equal(two_processes.here(train_copies), expected, atol=1e-10, rtol=0, msg=message)
copies = two_processes.run(train_copies, my_data_parallel_step)
for rank, weights in enumerate(copies):
    message = f"Five steps of two processes must equal five steps alone (process {rank})."
    equal(weights, expected, atol=1e-10, rtol=0, msg=message)
    gap = (weights - expected).abs().max()
    print(f"process {rank}: {len(weights):,} weights, largest difference {gap:.0e}")

# %% [markdown]
# Each process computed half of the rows, and both have the weights of one process that computed all of them.
#
# ## Break it: forget the sum
#
# Leave `all_reduce` out. Before you run the cell: will there be an error? (Without communication, the two processes
# can be imitated here, one after the other.)

# %%
apart = []
for rank in (0, 1):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    own_inputs, own_targets, own_mask = (x.chunk(2)[rank] for x in (inputs, targets, mask))
    for _ in range(5):
        losses = token_losses(model, own_inputs, own_targets)
        loss = (losses * own_mask).sum() / own_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    apart.append(parameters_to_vector(model.parameters()).detach())
    print(f"loss of process {rank}: {loss:.3f} (before training about 3.5)")
print(f"their weights differ by up to {(apart[0] - apart[1]).abs().max():.3f}")
always(not torch.equal(*apart), "Without the sum the copies become different models.")

# %% [markdown]
# No error is raised, and both losses fall. But there are now two models, each trained on half of the rows.
#
# ## 6. Two processes, half of the weights in each
#
# Data parallel training divides the time, but not the memory. In **sharded** training (ZeRO, Rajbhandari et al. 2020;
# PyTorch's FSDP, Zhao et al. 2023) each process *stores* only a part of the weights, gradients and moments.

# %%
figures.layouts()

# %% [markdown]
# A forward pass needs all weights. So before it, `dist.all_gather(parts, x)` fills the list `parts` with the x of
# each process. Afterwards the gradients are summed as before, and each process updates its own part of the weights.


# %%
def my_sharded_step(model, shard, optimizer, inputs, targets, mask):
    """The same step if this process stores only `shard` (n,), its part of the vector of weights.

    shard is the only parameter of `optimizer`. Gather all shards into a list of tensors as long as
    shard.detach(), concatenate them, and put the result into the model (vector_to_parameters).
    Backward as in my_data_parallel_step. Put every p.grad into one vector (parameters_to_vector),
    all_reduce it, and give this process's chunk of it to shard.grad. Step the optimizer, and set
    the model's gradients to zero.
    """
    scored, rank, world = mask.sum(), dist.get_rank(), dist.get_world_size()
    parts = [torch.empty_like(shard) for _ in range(world)]
    dist.all_gather(parts, shard.detach())
    vector_to_parameters(torch.cat(parts), model.parameters())
    inputs, targets, mask = (x.chunk(world)[rank] for x in (inputs, targets, mask))
    losses = token_losses(model, inputs, targets)
    ((losses * mask).sum() / scored).backward()
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    dist.all_reduce(gradient)
    shard.grad = gradient.chunk(world)[rank].clone()
    optimizer.step()
    model.zero_grad()


# %% [markdown]
# ### Checkpoint: the same five steps
#
# Each process returns the half that it stores. Together the halves must be the vector of section 5.


# %%
def train_shards():
    model = tiny_model()
    vector = parameters_to_vector(model.parameters()).detach()
    shard = vector.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    optimizer = torch.optim.AdamW([shard], lr=5e-3)
    for _ in range(5):
        my_sharded_step(model, shard, optimizer, *all_rows())
    return shard.detach()


message = "Five steps of my_sharded_step in a group of one must equal five steps alone."
equal(two_processes.here(train_shards), expected, atol=1e-10, rtol=0, msg=message)
halves = two_processes.run(train_shards, my_sharded_step)
message = "Five steps of my_sharded_step in two processes must equal five steps alone."
equal(torch.cat(halves), expected, atol=1e-10, rtol=0, msg=message)
for rank, half in enumerate(halves):
    print(f"process {rank} stores {len(half):,} of {len(expected):,} weights")
print(f"largest difference from one process: {(torch.cat(halves) - expected).abs().max():.0e}")

# %% [markdown]
# For a moment, our step holds all weights and the whole gradient. FSDP2, which the project uses, gathers one layer at
# a time, and its `reduce_scatter` gives each process only its own part of the sum. In the project, `--parallel ddp`
# copies the weights and `--parallel fsdp` (the default under torchrun) shards them.
#
# ## What is wrong here? (2)
#
# Each process draws two of the eight rows at random. Their gradients are summed, and divided by all scored tokens
# that were drawn. No error is raised.

# %%
model = tiny_model()
drawn = []
for _process in (0, 1):
    generator = torch.Generator().manual_seed(0)
    drawn.append(torch.randperm(8, generator=generator)[:2])
scored = sum(mask[rows].sum() for rows in drawn)
for rows in drawn:
    ((token_losses(model, inputs[rows], targets[rows]) * mask[rows]).sum() / scored).backward()
summed = gradient_of(model)  # watch: summed (weights,)
print(f"norm of the summed gradient: {summed.norm():.4f}")

# %% [markdown]
# ## 7. Read a plan
#
# Back to Mistral-7B. This is what `--plan h100` behind a recipe's command prints, for four cards and passes of 4
# rows:

# %%
four_cards = dataclasses.replace(RECIPE, gpus=4)
numbers = print_plan(four_cards, dataclasses.replace(SETTINGS, micro_batch=4), "h100")

# %% [markdown]
# | line | where it comes from |
# | --- | --- |
# | weights; gradients and moments | section 1, divided by 4 |
# | embeddings and heads, gathered | their bfloat16 copies, whole on each card during a step |
# | reserve | an estimate of what CUDA needs |
# | the largest of | training: section 2, with 4 rows. Only one of the three is in memory at a time |
# | host | memory of the computer around the cards |
# | training and scoring | section 4, divided by 4 |
# | the other hours | evaluation, with the copying that it needs |
# | shorter rows | rows of n tokens take 1.4 n / 576 of the hours |
#
# Other settings of the same step:

# %%
plans = {
    "1 card": planned(1),
    "2 cards": planned(2),
    "4 cards": planned(4),
    "4 cards,\nmicro-batch 4": planned(4, micro_batch=4),
    "4 cards,\ncheckpointing": planned(4, activation_checkpointing=True),
}
for name, numbers in plans.items():
    gib = sum(numbers["resident"].values()) + numbers["phases"]["a micro-batch in training"]
    hours = numbers["hours"]["training and scoring"]
    print(f"{name.replace(chr(10), ' '):24} {gib:4.0f} GiB on each, {hours:.2f} hours")
figures.cards(plans, 79.6, "10b_cards.png", "Sharding divides only what stays in memory")

# %% [markdown]
# With passes of 16 rows, four cards are too few: sharding divides weights, gradients and moments, but each card still
# holds the activations of its own pass. With passes of 4 rows the step fits (52 GiB), and with checkpointing too (43
# GiB, a third more time). The flags are `torchrun --nproc_per_node 4`, `--micro_batch 4` and
# `--activation_checkpointing`.
#
# ## What you now know
#
# - Float32 training with AdamW holds 16 bytes for each weight. Activations grow with rows × positions × layers.
# - A step takes about 6 flops for each weight and token.
# - The gradient of a step is a sum over its tokens. Cut it into passes or over processes, and divide by the tokens of
#   the *whole* step.
# - Sharding stores each number once. A step gathers the weights, sums the gradients, and updates its own part.
#
# Next: [11 · The storyteller](11_storyteller.ipynb). Further reading: [SCALE](../../docs/SCALE.md), with the plans of
# all recipes, and `minialign/engine/parallel.py`.
#
# ## Exercises
#
# **Exercise 1** (easy, 10 minutes; try this). A bfloat16 number has 8 significant bits. Store 0.02 in bfloat16 and
# add 3e-6, the recipe's learning rate, by which AdamW moves a weight in one step. What do you get? What share of the
# toy's weights changes if you add 3e-6, 3e-5 or 3e-4 to each?
#
# **Exercise 2** (medium, 10 minutes). LoRA (Hu et al. 2021) freezes the weights and trains small matrices beside
# them, the adapters. With rank 64 at every matrix, Mistral gets 168 million adapter weights. A frozen weight takes 2
# bytes, an adapter weight 16. How many GiB stay on one card? Are there fewer activations?
#
# **Exercise 3** (hard, 20 minutes). Most trainers clip the gradient: a norm above 1 is scaled down to 1. In sharded
# training no process has the whole gradient. Compute its norm with one `all_reduce` of a single number. What goes
# wrong if each process clips its own part?
#
# ## Answers

# %% [markdown]
# <details><summary>Puzzle 1</summary>
#
# It saves no memory. `total` depends on all four passes, so autograd keeps the activations of all eight rows. Call
# `backward()` in the loop: then the activations of a pass are freed before the next pass begins.
#
# </details>
#
# <details><summary>Puzzle 2</summary>
#
# Both processes use seed 0, so both draw the *same* two rows, and half of the computing time is wasted. Draw the rows
# of the whole step with one seed in each process, and let each process take its share of them.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
my_accumulate(model, inputs[drawn[0]], targets[drawn[0]], mask[drawn[0]], micro=2)
message = "Two processes with the same seed must compute what one process does with two rows."
equal(gradient_of(model), summed, atol=1e-12, rtol=0, msg=message)
print("the summed gradient is that of two rows, not of four")

# %% [markdown]
# <details><summary>Exercise 1</summary>
#
# You get the same number again: the next one is 0.00012 away, and a smaller step than half of this is rounded to
# nothing. At 3e-6 only weights near 0 change, where bfloat16 numbers lie closer together. No error is raised. In
# float32 small steps add up, so `mixed` stores the weights in float32. (In TRL, a model that was loaded in bfloat16
# and is trained in full has bfloat16 weights.)
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
weight = torch.tensor(0.02, dtype=torch.bfloat16)
above = torch.nextafter(weight, torch.tensor(1.0, dtype=torch.bfloat16))
print(f"0.02 is stored as {weight.item():.6f}; the next number is {above.item():.6f}")
always(bool(weight + 3e-6 == weight), "A step far below half the distance is rounded away.")
stored = parameters_to_vector(tiny_model().bfloat16().parameters()).detach()
for lr in (3e-6, 3e-5, 3e-4):
    share = (stored + torch.tensor(lr).bfloat16() != stored).float().mean().item()
    print(f"adding {lr:.0e} once changes {share:4.0%} of the weights")
this_run(share > 0.9, "A step of 3e-4 changes nearly all weights.")

# %% [markdown]
# <details><summary>Exercise 2</summary>
#
# 2 bytes × 7.24 billion are 13.5 GiB, and 16 bytes × 168 million are 2.5 GiB. There are hardly fewer activations: the
# gradient still passes through every layer, and an adapter needs the input of its matrix.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
C, F, V = MISTRAL.n_embd, MISTRAL.ffn_dim, MISTRAL.vocab_size
sides = 2 * (C + C) + 2 * (C + C // 4) + 3 * (C + F)  # in + out of the seven matrices of a layer
adapters = MISTRAL.n_layer * 64 * sides
gib = (2 * my_parameters(MISTRAL) + 16 * adapters) / 2**30
print(f"{adapters:,} adapter weights: {gib:.1f} GiB stay instead of 108")
always(abs(gib - 16.0) < 0.05, "Frozen weights and adapters take 16 GiB.")

# %% [markdown]
# <details><summary>Exercise 3</summary>
#
# Sum the squares of the own part, `all_reduce` this number, take the root. If each process clips its own part to a
# norm of 1, the whole has a norm of up to √2 on two cards and 8 on 64. The parts are also scaled by different
# factors, which changes the direction of the step.
#
# </details>

# %% tags=["solution"] jupyter={"source_hidden": true}
my_accumulate(model, inputs, targets, mask, micro=8)
gradient = gradient_of(model)
parts = gradient.chunk(2)  # one in each process
whole = torch.stack([part.square().sum() for part in parts]).sum().sqrt()  # all_reduce, root
message = "The norm from two parts must equal the norm of the whole gradient."
equal(whole, gradient.norm(), msg=message)
own = torch.cat([part / part.norm().clamp(min=1) for part in parts])
print(f"norm {gradient.norm():.2f}; of the parts", *(f"{part.norm():.2f}" for part in parts))
print(f"parts clipped alone: norm {own.norm():.2f} instead of 1")
always(own.norm() > 1.1, "Parts that are clipped alone have a norm above the limit together.")
