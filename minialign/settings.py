"""Settings: the fields that methods share, the command line made from them, and the checks before a run starts.

Each method's Config adds its own fields to one of the classes below. A field is also a flag with the same name, type and default; the
comment beside it is the flag's help. To change a default, or to make a comment more exact, a Config repeats the field.

    Training                 what every method has
    OnDemonstrations         + prompts with one good answer (--demos)
    OnPairs                  + prompts with a chosen and a rejected answer (--pairs), or two new answers at every step (--online)
    OnPrompts                + prompts alone (--prompts), and a reward for what the policy answers (--reward)

Checked by tests/test_settings.py and tests/test_front_door.py.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import time
import types
import typing
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError

from minialign.engine import common, parallel
from minialign.engine.common import BadInput, in_one_line, one_line

WITH_RESUME = ("micro_batch", "eval_batch")  # flags that a resumed run may change: they cut the same rows into passes that need less memory


@dataclass
class Training:
    policy: str = "builtin"         # the model to start from: builtin, a folder (of a model or of a PEFT adapter), or a hub name
    steps: int = 100                # optimizer steps
    batch_size: int = 32            # rows per step
    micro_batch: int = 0            # rows per forward pass; 0 = the whole batch at once. Fewer rows save memory and change nothing else
    eval_batch: int = 0             # rows per forward pass in evaluations; 0 = as in training. It changes no result: --resume takes it too
    optimizer: str = "adamw"        # adamw, rmsprop (as in DPO's and SPIN's released code), or adamw8bit (one byte for each moment)
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 5e-7)
    schedule: str = "cosine"        # how the learning rate falls after the warm-up: cosine, linear or constant (it stays)
    warmup: float = 0.1             # share of the steps in which the learning rate rises
    weight_decay: float = 0.0       # weight decay: decoupled in AdamW, added to the gradient in RMSprop
    max_grad_norm: float = 1.0      # a gradient with a larger norm is scaled down to this norm
    max_prompt: int | None = None   # longest prompt in tokens; a longer one loses its beginning
    held_out: float = 0.1           # share of the file, taken from its end, that is never trained on
    seed: int = 0                   # seed of the data order, of sampling and of new weights
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32 (16 bytes a weight), mixed (18; bfloat16 arithmetic), bfloat16 (8; loses small steps), float64
    deterministic: bool = False     # on a GPU: the same bits in every run and resume on the same card and versions; slower
    parallel: str = "fsdp"          # under torchrun: fsdp (each process holds a part of the weights) or ddp (each holds all of them)
    activation_checkpointing: bool = False  # compute activations again in the backward pass: less memory, about a third more time
    compile: bool = False           # torch.compile the blocks (a minute or more at first; --resume is then exact to rounding)
    lora: int = 0                   # rank of the LoRA adapters to train instead of the weights; 0 trains the weights
    lora_alpha: float = 16.0        # the output of an adapter is multiplied by lora_alpha / lora
    log: str = ""                   # where metrics go besides metrics.jsonl: tensorboard (into the run folder) or wandb
    log_every: int = 25             # steps between lines on the terminal
    eval_every: int = 50            # steps between evaluations on the held-out rows
    save_every: int = 100           # steps between checkpoints
    snapshots: bool = False         # also export the model at every evaluation, to snapshots/<step>/
    out: str = ""                   # run folder; default: runs/<method>-<time>
    resume: str = ""                # continue the run in this folder: the same results, bit for bit on a CPU or with --deterministic
    skip_bad: bool = False          # count and skip bad rows of a file instead of stopping at the first


@dataclass
class OnDemonstrations(Training):
    demos: str = "builtin"          # demonstrations: builtin, or a JSONL/JSON(.gz) file
    max_len: int = 256              # longest row in tokens, prompt and completion together; a longer one loses its end
    max_new: int = 64               # longest sampled answer in tokens


@dataclass
class OnPairs(Training):
    pairs: str = "builtin"          # preferences: builtin, or a JSONL/JSON(.gz) file
    rounds: int = 1                 # dpo, ipo, gpo: the steps are divided into rounds; each takes the policy so far as its reference
    online: bool = False            # sample both answers from the policy and let --reward choose; only the prompts of the pairs are used
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # with --online: FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # with --online and several rewards: mean, min, or warm (one reward model with averaged weights)
    reward_limit: float = 60.0      # with --online: seconds that the reward may take for one batch
    tau: float = 1.0                # with --online: sampling temperature
    max_len: int = 256              # longest row in tokens, prompt and completion together; a longer one loses its end
    max_new: int = 64               # longest sampled answer in tokens


@dataclass
class OnPrompts(Training):
    prompts: str = "builtin"        # prompts: builtin, or a JSONL/JSON(.gz) file
    reward: list[str] = field(default_factory=lambda: ["builtin"])  # exact_match, FILE.py:FUNCTION, a reward model, …: docs/DATA.md
    combine: str = "mean"           # how several rewards become one: mean, min, or warm (one reward model with averaged weights)
    reward_limit: float = 60.0      # seconds that the reward may take for one batch
    missing_eos: float = 0.0        # subtracted from the reward of a completion that max_new cut off
    max_new: int = 64               # longest completion in tokens
    tau: float = 1.0                # temperature of sampling and of every log-prob in the training
    batch_size: int = 64            # completions per step
    lr: float = 3e-4                # peak learning rate (for models with billions of weights: 1e-6)
    schedule: str = "linear"
    warmup: float = 0.0
    held_out: float = 0.25          # share of the prompts, taken from the end of the file, that is never trained on
    log_every: int = 10
    eval_every: int = 25
    save_every: int = 50


# ----------------------------------------------------------------------------------------------------------- the command line


def field_comments(config_class):
    """{field: the comment beside it in the source}, which is the help text of its flag. A subclass's comment wins over its base's."""
    comments = {}
    for kind in reversed(config_class.__mro__[:-1]):
        for line in inspect.getsource(kind).splitlines():
            match = re.match(r"\s*(\w+)\s*:[^#]*#\s*(.*)", line)
            if match:
                comments[match.group(1)] = match.group(2).strip()
    return comments


def shared_fields(config_class):
    """Names of the fields that a Config takes unchanged from the classes above."""
    shared = set()
    for kind in reversed(config_class.__mro__):
        names = set(inspect.get_annotations(kind))
        shared = shared | names if kind.__module__ == __name__ else shared - names
    return shared


def cli(config_class, argv, *, prog, description=""):
    """Parse `--field value` flags into a config_class. `--batch-size` means `--batch_size`.

    --help prints first the flags of this method, then those that other methods have too. For an unknown flag or a value of the wrong type
    it prints one sentence on stderr and exits with code 2.
    """
    hints, comments, shared = typing.get_type_hints(config_class), field_comments(config_class), shared_fields(config_class)
    argv = [re.sub(r"^--(no-)?([\w-]+)", lambda m: f"--{m[1] or ''}{m[2].replace('-', '_')}", word) for word in argv]
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False, formatter_class=layout)
    own_group = parser.add_argument_group("flags of this method") if shared else parser
    shared_group = parser.add_argument_group("flags that other methods have too")
    flags = []
    for f in dataclasses.fields(config_class):
        flags.append(f"--{f.name}")
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else repr(default)
        options = dict(dest=f.name, default=default, help=f"{comments.get(f.name, '')} (default: {shown})".replace("%", "%%"))
        kind = hints[f.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # `int | None`: the flag takes the int
            kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        if kind is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif typing.get_origin(kind) is list:
            options |= dict(nargs="+", type=typing.get_args(kind)[0], metavar=f.name.upper())
        else:
            options |= dict(type=kind, metavar=kind.__name__)
        (shared_group if f.name in shared else own_group).add_argument(flags[-1], **options)

    def refuse(message):
        print(f"{prog}: {in_one_line(message)}", file=sys.stderr)
        raise SystemExit(2)

    parser.error = refuse
    if empty := [word for word in argv if word.startswith("--") and word.endswith("=--")]:
        refuse(f"{empty[0]}: expected a value after =")
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]}?" if near else ""
        refuse(f"unknown {'flag' if flag.startswith('-') else 'argument'} {flag}{hint} (`{prog} --help` lists them)")
    if "resume" in vars(known) and not known.resume and any(word.split("=")[0] == "--resume" for word in argv):
        refuse("--resume: expected the folder of a run, found an empty name")
    allowed = ["--resume", "--reward", *(f"--{name}" for name in WITH_RESUME)]  # (a reward that is code may have to be named again)
    others = [flag for word in argv if word.startswith("--") and (flag := word.split("=")[0]) not in allowed]
    if getattr(known, "resume", "") and others:
        refuse(f"--resume continues a run with the flags it began with: drop {others[0]} (to change flags, start a new run with "
               f"--policy {known.resume}/final)")
    return config_class(**vars(known))


def check_config(cfg):
    """Before anything is loaded, refuse values that cannot work. Each rule belongs to a field name, so a Config need not repeat it."""
    at_least = {"steps": 1, "batch_size": 1, "micro_batch": 0, "eval_batch": 0, "max_len": 2, "max_new": 1, "log_every": 1, "eval_every": 1,
                "save_every": 1, "rounds": 1, "max_prompt": 1, "lr": 0, "weight_decay": 0, "warmup": 0, "held_out": 0,
                "layers": 1, "heads": 1, "width": 1, "group_size": 1, "epochs": 1, "n": 1, "grows": 1, "grow_prompts": 1,
                "gamma": 0, "lam": 0, "decay": 0, "mix": 0, "std_eps": 0, "bound": 0, "ridge": 0, "reward_share": 0, "weight": 0,
                "desirable_weight": 0, "undesirable_weight": 0, "delta": 0, "target_margin": 0, "lora": 0,
                "missing_eos": 0, "vocab": 1, "penalty": 0, "target_kl": 0, "ptx": 0}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"--{f.name} {value}: must be a finite number")
        if isinstance(value, float) and abs(value) > 1e38:
            raise BadInput(f"--{f.name} {value}: must be at most 1e38, the largest size of a float32 number")
        if isinstance(value, int) and f.name != "seed" and abs(value) >= 2**31:
            raise BadInput(f"--{f.name} {value}: must be below 2**31")
    if not -(2**63) <= getattr(cfg, "seed", 0) < 2**63:
        raise BadInput(f"--seed {cfg.seed}: must be a whole number of at most 63 bits")
    at_most = {"batch_size": 2**20, "n": 2**20, "group_size": 2**20, "grow_prompts": 2**20, "layers": 1000, "width": 2**16, "lora": 2**16,
               "vocab": 2**20, "warmup": 1, "held_out": 0.9, "gamma": 1, "lam": 1, "decay": 1, "mix": 1, "reward_share": 1}
    for name, low in at_least.items():
        value = getattr(cfg, name, low)
        value = low if value is None else value
        high = at_most.get(name, math.inf)
        if not low <= value <= high:
            raise BadInput(f"--{name} {value}: must be at least {low}" + (f" and at most {high}" if name in at_most else ""))
    online = hasattr(cfg, "prompts")  # with a given reward, a method also works without the pull to ref (beta 0)
    for name in ("max_grad_norm", "beta", "tau", "eps", "eps_value", "eta", "value_lr", "reward_limit", "reward_lr", "reward_share",
                 "scale", "lora_alpha"):
        value = getattr(cfg, name, 1)
        if not (value > 0 or (online and name == "beta" and value == 0)):
            raise BadInput(f"--{name} {value}: must be {'at least' if online and name == 'beta' else 'above'} 0")
    if online and cfg.batch_size % getattr(cfg, "group_size", 1):
        raise BadInput(f"--batch_size {cfg.batch_size}: must be a multiple of --group_size {cfg.group_size} (completions of one prompt)")
    if not getattr(cfg, "online", True) and cfg.reward != ["builtin"]:
        raise BadInput(f"--reward {cfg.reward[0]}: is used only with --online; without it the file says which answer is chosen")
    if getattr(cfg, "lora", 0) and cfg.policy == "new":
        raise BadInput(f"--lora {cfg.lora}: adapters need trained weights beside them, but those of --policy new are random")
    if not 0 <= getattr(cfg, "label_smoothing", 0) < 0.5:
        raise BadInput(f"--label_smoothing {cfg.label_smoothing}: must be at least 0 and below 0.5, where labels carry no information")
    if getattr(cfg, "schedule", "cosine") not in ("cosine", "linear", "constant"):
        raise BadInput(f"--schedule {cfg.schedule}: must be cosine, linear or constant")
    if getattr(cfg, "optimizer", "adamw") not in ("adamw", "rmsprop", "adamw8bit"):
        raise BadInput(f"--optimizer {cfg.optimizer}: must be adamw, rmsprop or adamw8bit")
    if getattr(cfg, "combine", "mean") not in ("mean", "min", "warm"):
        raise BadInput(f"--combine {cfg.combine}: must be mean, min or warm")
    if getattr(cfg, "log", "") not in ("", "tensorboard", "wandb"):
        raise BadInput(f"--log {cfg.log}: must be tensorboard or wandb")


@contextlib.contextmanager
def exit_codes(prog):
    """A context for calling main(): it turns an exception into one line on stderr and an exit code.

    The code is 2 for BadInput and for what the machine refuses (a full disk, too little memory), 1 for a diverged run, a lost process under
    torchrun or a closed pipe in training, 130 for Ctrl-C. If a run can go on, the line says how. Any other exception is a bug and keeps its
    traceback.
    """
    common.running, prog = common.no_run, in_one_line(prog, 60)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal or the file cannot hold is written as its number
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        parallel.leave()
    except BadInput as error:
        if parallel.local_rank() == 0 or not getattr(error, "in_all", False):
            print(f"{prog}: {error}", file=sys.stderr)
        end(2)
    except FloatingPointError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        end(1)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{how_to_go_on()}", file=sys.stderr)
        end(130)
    except BrokenPipeError:  # `python -m minialign … | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if common.running():  # (for a command that only prints this is no error)
            print(f"{prog}: nobody reads the output any more, so the run stops{how_to_go_on()}", file=sys.stderr)
        end(1 if common.running() else 0)
    except (OSError, SafetensorError) as error:
        where = f"{in_one_line(error.filename)}: " if getattr(error, "filename", None) else ""
        print(f"{prog}: {where}{getattr(error, 'strerror', None) or one_line(error)}{how_to_go_on()}", file=sys.stderr)
        end(2)
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        print(f"{prog}: a name cannot hold a null character", file=sys.stderr)
        end(2)
    except (MemoryError, RuntimeError) as error:
        if parallel.peer_lost(error):
            print(f"{prog}: process {parallel.rank()} stops because another process is gone ({one_line(error)}); "
                  "the lost process's error message is above, and --resume continues from the newest checkpoint", file=sys.stderr)
            end(1)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        smaller = f"; {common.running().less_memory()}" if common.running() else ""
        print(f"{prog}: there is not enough memory ({one_line(error)}){smaller}", file=sys.stderr)
        end(2)


def end(code):
    """Exit with this code. Under torchrun at once: in the interpreter's shutdown a gloo thread sometimes aborts the process, code 6."""
    if parallel.launched():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.5 * (parallel.local_rank() > 0))  # torchrun stops all when one ends, and the first may still have to say why
        os._exit(code)
    raise SystemExit(code)


def how_to_go_on():
    """'; continue with …' if a run is interrupted that can be resumed."""
    run = common.running()
    return f"; continue with: python -m minialign {run.method} --resume {run.folder}" if run else ""

