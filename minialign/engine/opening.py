"""Load what a run starts from: policy, optimizer, demonstrations, prompts, reward, critic. Each is checked before step 1.

`run.same_input` records a hash of each input, so a resumed run refuses data or models that have changed since it began.

Checked by tests/engine/test_opening.py, tests/engine/test_run.py, tests/test_lora.py and tests/engine/test_resume.py.
"""

import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
from filelock import FileLock

from minialign import data
from minialign.data import demo_batch, encode_demos, encode_prompts, read_demonstrations, read_prompts, split_held_out, split_scorable
from minialign.engine import parallel
from minialign.engine.adamw8bit import adamw8bit
from minialign.engine.common import BadInput, batch_rows, derive_seed, find_folder, one_line
from minialign.lora import inject, load_model
from minialign.model import Block
from minialign.rewards import open_reward, reward_folders
from minialign.task import builtin_demos, builtin_prompts, builtin_texts
from minialign.tokenizer import load_tokenizer
from minialign.weights import load_pretrained

READS_ALL = ("reward_model", "rft", "irl")  # a reward model reads the last token of a row, which a policy only predicts


def open_policy(run):
    """(policy, tokenizer) that --policy names, on the run's device: a model's folder, an adapter's folder, a hub name, or builtin."""
    cfg = run.cfg
    path = find_folder(builtin_base() if cfg.policy == "builtin" else cfg.policy)
    run.same_input("policy", path)
    policy, tokenizer, base = load_model(path, **run.load)
    set_passes(policy, cfg)
    run.adapter_base = base or (str(path) if cfg.policy == "builtin" else cfg.policy)  # what the exported adapters belong to
    if base is not None:
        run.same_input("base", find_folder(base))
        if cfg.lora:
            raise BadInput(f"--lora {cfg.lora}: {path} has adapters already, which are trained further; drop --lora")
    if cfg.lora:
        inject(policy, cfg.lora, cfg.lora_alpha)
    if policy.config.head != "lm" and run.method != "reward_model":
        raise BadInput(f"{path}: is a reward model, which cannot write text; {run.method} needs a policy with a language-model head")
    max_len = getattr(cfg, "max_len", 2)  # methods without max_len call check_context instead
    positions = max_len - (run.method not in READS_ALL)
    if positions > policy.config.max_len:
        raise BadInput(f"--max_len {cfg.max_len}: the policy's context is {policy.config.max_len} tokens")
    tokenizer.save(run.folder)
    return policy, tokenizer


def check_compiler(cfg, device):
    """Compile one small function, if a flag needs that. Raises BadInput if torch.compile does not work on the device."""
    flag = "--compile" if cfg.compile else f"--optimizer {cfg.optimizer}"
    try:
        if cfg.compile or cfg.optimizer == "adamw8bit":
            torch.compile(lambda x: (x * x).sin())(torch.ones(8, device=device))
    except Exception as error:  # no C++ compiler, no Python headers, a device without support: torch's message says which
        raise BadInput(f"{flag}: torch.compile does not work here ({one_line(error)}); install a C++ compiler (g++), or drop the "
                       "flag") from None


def set_passes(model, cfg):
    """Apply --activation_checkpointing and --compile to a model, in place. Its deep copies (the reference, the critic, a learned reward)
    inherit both. Names of weights do not change."""
    model.recompute = cfg.activation_checkpointing
    for block in model.blocks if cfg.compile else ():
        block.forward = types.MethodType(block_forward, block)  # a bound method: copying the block binds the copy


def block_forward(block, x, rotary, mask, cache, positions, span):
    """Block.forward, compiled where there is no cache. With one, the sampler runs it token by token with changing sizes."""
    if cache is not None:
        return Block.forward(block, x, rotary, mask, cache, positions, span)
    return compiled_block()(block, x, rotary, mask, None, None, None)


@functools.cache
def compiled_block():
    """Block.forward, compiled once for all blocks that differ only in their weights and in the lengths of rows."""
    torch._dynamo.config.recompile_limit = 64  # with and without gradient, trained and frozen, one row: above 8 it would stop compiling
    return torch.compile(Block.forward, dynamic=True)


MOMENTS = {"adamw": 2, "rmsprop": 1, "adamw8bit": 1}  # numbers of a weight's size that an optimizer keeps for it (adamw8bit: at most)


def open_optimizer(cfg, *models, lr=None):
    """The optimizer of the models' parameters: AdamW, or what --optimizer names. A model may be None. lr: by default cfg.lr.

    rmsprop is PyTorch's with its defaults, as in the released code of DPO and SPIN. adamw8bit is torchao's AdamW: it keeps the moments
    of each matrix in one byte a number, and rounds bfloat16 weights at random, so that small steps count on average.
    """
    parameters = [p for model in models if model is not None for p in model.parameters()]
    shared = dict(lr=cfg.lr if lr is None else lr, weight_decay=cfg.weight_decay)
    if cfg.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, **shared)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(parameters, betas=(0.9, 0.95), fused=True, **shared)
    return adamw8bit(parameters, betas=(0.9, 0.95), **shared)


def builtin_base():
    """The folder of the built-in task's base model. The first run that needs it trains it (about 15 s); it is then kept in runs/.

    A separate process trains it, so that the random numbers of the run that needs it do not change.
    """
    folder = Path("runs/builtin-base")
    parallel.on_main(train_builtin_base, folder)
    return folder / "final"


BASE = "sft --policy new --text builtin --steps 500 --lr 3e-3 --max_len 96 --device cpu"


def train_builtin_base(folder):
    """Train the base model into a temporary folder, then rename that. The lock makes other processes wait for the first one."""
    if (folder / "final" / "config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "final" / "config.json").is_file():  # another process made it meanwhile
            return
        print("the built-in task needs its base model once: training it into runs/builtin-base (about 15 s)", flush=True)
        for leftover in [folder, *folder.parent.glob(f"{folder.name}.tmp-*")]:  # left by a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        # One thread, so that the weights do not depend on the number of cores. Without torchrun's variables this is a run of one process.
        elastic = ("TORCHELASTIC", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(elastic)} | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "minialign", *BASE.split(), "--out", str(temporary)]
        result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode:
            raise BadInput(f"{folder}: the base model of the built-in task could not be trained ({one_line(result.stderr)})")
        os.replace(temporary, folder)


def open_value_model(run, policy, tokenizer):
    """PPO's critic from --value: the policy's trunk under a new scalar head, or a reward model with the policy's vocabulary."""
    name = run.cfg.value
    if name == "policy":
        return policy.with_scalar_head()
    path = find_folder(name)
    run.same_input("value", path)
    value_model = load_pretrained(path, **run.load)
    set_passes(value_model, run.cfg)
    if run.cfg.lora:
        inject(value_model, run.cfg.lora, run.cfg.lora_alpha)
    if value_model.config.head != "scalar" or load_tokenizer(path).inner.get_vocab() != tokenizer.inner.get_vocab():
        raise BadInput(f"--value {name}: expected a reward model with the policy's own tokens (python -m minialign reward_model)")
    if value_model.config.max_len < policy.config.max_len:
        raise BadInput(f"--value {name}: its context of {value_model.config.max_len} tokens is shorter than the policy's")
    return value_model


def open_demos(run, tokenizer):
    """(rows to train on, held-out rows, batch_of) of --demos. A row is (prompt ids, completion ids).

    batch_of(rows, picked) -> Batch of the picked rows, on the run's device.
    """
    cfg = run.cfg
    run.same_input("data", cfg.demos)

    def encode():
        demos = builtin_demos() if cfg.demos == "builtin" else read_demonstrations(cfg.demos, skip_bad=cfg.skip_bad)
        return encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad)

    rows, held_out = split_scorable(long_or_encoded(run, data.long_demos, cfg.demos, tokenizer, encode), cfg.held_out, cfg.max_len)
    return rows, held_out, batches_of(run, tokenizer)


def long_or_encoded(run, open_long, path, tokenizer, encode, parts=2):
    """The rows of a LongFile, which the run goes on checking at each step, or those of encoded_once."""
    rows = open_long(path, tokenizer, max_prompt=run.cfg.max_prompt, skip_bad=run.cfg.skip_bad)
    if rows is None:
        return encoded_once(encode, parts)
    run.long_files.append(rows.long)
    return rows


def encoded_once(encode, parts=2):
    """The rows that encode() returns: tuples whose first `parts` members are lists of token ids.

    Under torchrun one process of each machine calls encode() and writes the rows to a temporary folder. All of its processes map them into
    memory, so a token takes 4 bytes on a machine. An error is raised in all processes.
    """
    if parallel.world() == 1:
        return encode()
    beside = []

    def write():
        folder = Path(tempfile.mkdtemp(prefix="minialign-rows-"))
        try:
            rows = encode()
            data.write_rows(rows, parts, folder)
            beside.extend(row[parts:] for row in rows)
            return folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    folders = parallel.share_out(lambda process: None if parallel.local_rank() else write(), range(parallel.world()))
    folder = folders[parallel.rank() - parallel.local_rank()]
    rows = data.read_rows(folder, parallel.on_main(lambda: beside))
    parallel.gather(None)  # a barrier: the folder can go once all have opened it
    if parallel.local_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def batches_of(run, tokenizer, make=demo_batch):
    """batch_of(rows, picked) -> Batch (or Pairs, by make=pair_batch) of encoded rows, with the run's padding id, max_len and device."""
    return lambda rows, picked: make(rows, picked, pad_id=tokenizer.pad_id, max_len=run.cfg.max_len).to(run.device)


def open_prompts(run, policy, tokenizer):
    """(rows to train on, held-out rows) of --prompts, which must fit the policy's context. A row is (prompt ids, prompt as in the file)."""
    cfg = run.cfg
    run.same_input("data", cfg.prompts)

    def encode():
        prompts = builtin_prompts() if cfg.prompts == "builtin" else read_prompts(cfg.prompts, skip_bad=cfg.skip_bad)
        return encode_prompts(tokenizer, prompts, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad)

    rows = long_or_encoded(run, data.long_prompts, cfg.prompts, tokenizer, encode, parts=1)
    check_context(run, policy, rows)
    return split_held_out(rows, cfg.held_out)


def open_second_demos(run, tokenizer, flag):
    """The encoded rows, (prompt ids, completion ids), of demonstrations that a method has besides its own data: those of --<flag>."""
    cfg, path = run.cfg, getattr(run.cfg, flag)
    run.same_input(flag, path)

    def encode():
        demos = builtin_demos() if path == "builtin" else read_demonstrations(path, skip_bad=cfg.skip_bad)
        return encode_demos(tokenizer, demos, max_prompt=cfg.max_prompt, skip_bad=cfg.skip_bad)

    return encoded_once(encode)


def open_texts(run, policy, tokenizer):
    """The function k -> Batch of the batch_size rows of --text that belong to step k, for a term −log π of plain text beside a loss."""
    cfg, max_len = run.cfg, min(256, policy.config.max_len)
    run.same_input("text", cfg.text)

    def encode():
        texts = builtin_texts() if cfg.text == "builtin" else data.read_texts(cfg.text, skip_bad=cfg.skip_bad)
        return data.encode_texts(tokenizer, texts, max_len=max_len)

    rows, batch_of = encoded_once(encode), functools.partial(demo_batch, pad_id=tokenizer.pad_id, max_len=max_len)
    return lambda k: batch_of(rows, batch_rows(len(rows), cfg.batch_size, k, derive_seed("texts", cfg.seed))).to(run.device)


def open_online(run):
    """(reward function, policy, tokenizer, prompt rows to train on, held-out rows) for a method that learns from --reward."""
    reward_fn = open_rewards(run)
    policy, tokenizer = open_policy(run)
    return reward_fn, policy, tokenizer, *open_prompts(run, policy, tokenizer)


def check_context(run, policy, rows, max_len=math.inf):
    """Raise BadInput before step 1, not at a later step, if the longest prompt leaves no room for max_new sampled tokens.

    max_len: longest row in tokens, for a method that cuts answers to it after the reward has judged the whole answers.
    """
    cfg, context = run.cfg, policy.config.max_len
    if long := getattr(rows, "long", None):  # its other rows are checked when they are read
        long.guards.append(lambda row: check_context(run, policy, [row], max_len))
    longest = max(len(row[0]) for row in data.known(rows))
    if longest + cfg.max_new > max_len:
        raise BadInput(f"the longest prompt has {longest} tokens: with --max_new {cfg.max_new} it exceeds --max_len {max_len}, so "
                       f"answers would be cut after the reward has judged them; set --max_len {longest + cfg.max_new}")
    if longest + cfg.max_new - (run.method not in READS_ALL) > context:
        shorter = f"set --max_prompt {context - cfg.max_new}, or a smaller --max_new" if context > cfg.max_new else "lower --max_new"
        raise BadInput(f"the longest prompt has {longest} tokens: with --max_new {cfg.max_new} it exceeds the policy's context of "
                       f"{context}; {shorter}")


def open_rewards(run):
    """The reward function of --reward and --combine. A resumed run refuses reward models that have changed."""
    cfg = run.cfg
    prompts = cfg.prompts if hasattr(cfg, "prompts") else cfg.pairs
    for number, path in enumerate(reward_folders(cfg.reward)):
        run.same_input(f"reward {number}", path)
    where = dict(device=run.device, dtype=run.dtype)
    return open_reward(cfg.reward, combine=cfg.combine, prompts=prompts, skip_bad=cfg.skip_bad, **where)
