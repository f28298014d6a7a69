"""Rewards of completions. A reward is any callable `(prompts, completions) -> B numbers`, a list or a tensor of shape (B,).

    exact_match     1 if the number after `####` equals the demonstrated one (GSM8K)    --reward exact_match
    format_match    1 if the whole completion matches a pattern                         --reward format   or   format:PATTERN
    regex           1 if the pattern occurs in the completion                           --reward 'regex:\\d+'
    length          0 at the target length, −1 when empty or at least twice as long     --reward length:200
    lexicon         the sum of the words' weights over all their occurrences            --reward 'lexicon:please,thanks,-now'
    learned         a reward model trained by `python -m minialign reward_model`        --reward FOLDER_OR_HUB_NAME
    yours           a function in a file                                                --reward rewards.py:politeness
    ensemble        the mean or the minimum of several; `warm` averages the weights     --reward A B C --combine min
                    of reward models into one (Ramé et al. 2024, arXiv:2401.12187)

A reward gets prompts as they are in the data file (text, or a list of messages) and completions as text, special tokens and a space in
front included, without the EOS that ended them. It does not see whether a completion was cut off; --missing_eos handles that. A function
with TRL's parameters works too. Runs call rewards through `ask`, which rejects bad output and names the row.

Checked by tests/test_rewards.py.
"""

import copy
import importlib.util
import inspect
import os
import re
import sys
import time
from decimal import Decimal, InvalidOperation
from pathlib import Path

import torch

from minialign.batch import collate, masked_mean
from minialign.data import encode_answers, encode_whole, plain_text, read_demonstrations
from minialign.engine import parallel, tracking
from minialign.engine.common import BadInput, find_folder, one_line
from minialign.engine.safety import Overtime, Stopped, code_file, has_alarm, time_limit
from minialign.kl import k1, k3
from minialign.lora import load_model
from minialign.task import gold_reward

# ------------------------------------------------------------------------------------------------------------- programmatic


def final_number(text):
    """The number after the first `####` as a Decimal, so that 72 = 72.0, or None. GSM8K's own rule: commas separate thousands."""
    found = re.search(r"#### *(-?)\$?(-?[\d.,]+)", text)
    try:
        return Decimal("".join(found.groups()).replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


def exact_match(demos):
    """1 where the completion's final number equals that of a demonstration of the same prompt, else 0. demos: list[Demo]."""
    answers = {}
    for number, demo in enumerate(demos, start=1):
        answer = final_number(plain_text(demo.completion))
        if answer is None:
            raise BadInput(f"exact_match: demonstration {number} has no final `#### number`: {plain_text(demo.completion)[-60:]!r}")
        answers.setdefault(plain_text(demo.prompt), set()).add(answer)

    def reward(prompts, completions):
        for prompt in prompts:
            if plain_text(prompt) not in answers:
                raise ValueError(f"no demonstrated answer for the prompt {plain_text(prompt)[:60]!r}")
        return [float(final_number(c) in answers[plain_text(p)]) for p, c in zip(prompts, completions, strict=True)]

    return reward


GSM8K_FORMAT = r"( |.*\n)?#### -?[\d,]*\.?\d+"  # any text (or the space in front of an answer), then a last line `#### number`


def format_match(pattern=GSM8K_FORMAT):
    """1 where the pattern matches the whole completion (a dot matches line ends too), else 0."""
    compiled = _compile(pattern, re.DOTALL)
    return lambda prompts, completions: [float(compiled.fullmatch(text) is not None) for text in completions]


def regex(pattern):
    """1 where the pattern occurs in the completion, else 0."""
    compiled = _compile(pattern, 0)
    return lambda prompts, completions: [float(compiled.search(text) is not None) for text in completions]


def _compile(pattern, flags):
    try:
        return re.compile(pattern, flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadInput(f"the regular expression {pattern!r} is not valid: {error}") from None


def length(target):
    """−|characters − target| / target, but never below −1."""
    if target < 1:
        raise BadInput(f"length:{target}: the target must be at least 1 character")
    return lambda prompts, completions: [max(-1.0, -abs(len(text) - target) / target) for text in completions]


def lexicon(weights):
    """Σ weight × occurrences over the words or phrases in {word: weight}. It counts whole words and ignores case."""
    words = [(re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE), weight) for word, weight in weights.items()]
    return lambda prompts, completions: [sum(weight * len(word.findall(text)) for word, weight in words) for text in completions]


# ------------------------------------------------------------------------------------------------------------------ learned


def score(reward_model, batch):
    """The reward model's reward for each row, (B,). batch: Batch with inputs, targets, mask (B, T).

    The reward is the scalar head at the last completion token (EOS, unless the row was cut). With config.reward_read "sum" it is the sum
    over the completion tokens. With config.reward_bound R, R·σ(·) maps it into [0, R]. config.reward_offset is subtracted last. Padding
    may hold any token, as positions come from the mask. Without scored tokens it is the head at the first token, or the sum 0.
    """
    tracking.count(reward_model, tracking.tokens_read(batch) + len(batch))  # and the last of each row
    config = reward_model.config
    tokens = torch.cat([batch.inputs[:, :1], batch.targets], dim=1)  # (B, T + 1) the whole row, with the last target as an input
    numbers = reward_model(tokens)  # (B, T + 1)
    numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))  # bfloat16 would round a difference near 2 to 1/64
    numbers = numbers + config.reward_offset  # the head subtracted it at each token; here it is subtracted once per row
    if config.reward_read == "sum":
        rewards = torch.where(batch.mask, numbers[:, 1:], 0).sum(1)  # (B,) target t is token t + 1
    else:
        places = torch.arange(1, tokens.shape[1], device=tokens.device)
        last = torch.where(batch.mask, places, 0).amax(dim=1)  # (B,)
        if config.reward_pad is not None:  # a classifier that was not written here: transformers reads it so, in the prompt too
            real = (batch.targets != config.reward_pad) & (places <= last[:, None])  # (B, T)
            last = torch.where(real, places, 0).amax(dim=1)  # (B,)
        rewards = numbers[torch.arange(len(tokens), device=tokens.device), last]
    rewards = config.reward_bound * torch.sigmoid(rewards) if config.reward_bound else rewards
    return tracking.watched(reward_model, batch, rewards - config.reward_offset)


def values_of(value_model, batch):
    """The scalar head at each token that is read, (B, T): a critic's value of each prefix."""
    tracking.count(value_model, tracking.tokens_read(batch), of_step=False)  # the policy reads the same tokens
    return value_model(batch.inputs)


def learned(reward_model, tokenizer, *, batch_size=32):
    """A reward function made from a reward model. It encodes text with its own tokenizer, so the policy may have another, and appends EOS.

    It scores a completion that max_new cut off as if it had ended there; use missing_eos to penalise it.
    If a row is longer than the context, the prompt loses its beginning. If that is not enough, the completion loses its end.
    A classifier that was not trained here reads a conversation as its chat template writes it, to the end, as it does in TRL.
    """
    context = reward_model.config.max_len
    encode = encode_whole if reward_model.config.reward_read == "conversation" else encode_answers

    @torch.no_grad()
    def reward(prompts, completions):
        rewards = []
        for start in range(0, len(prompts), batch_size):
            pairs = zip(prompts[start : start + batch_size], completions[start : start + batch_size], strict=True)
            rows = [encode(tokenizer, prompt, text) for prompt, text in pairs]
            answers = [answer[: context - 1] for _, answer in rows]
            asked = [prompt[-(context - len(answer)) :] for (prompt, _), answer in zip(rows, answers, strict=True)]
            batch = collate(asked, answers, pad_id=tokenizer.pad_id).to(reward_model.head_weight.device)
            rewards.append(score(reward_model, batch))
        return torch.cat(rewards)

    return reward


def ensemble(reward_fns, how="mean"):
    """A reward function that returns the mean or the minimum of several rewards for each row."""
    if how not in ("mean", "min"):
        raise BadInput(f"combine {how!r} is unknown: use mean, min or warm")

    def reward(prompts, completions):
        columns = []
        for fn in reward_fns:
            columns.append(torch.as_tensor(as_list(fn(prompts, completions)), dtype=torch.float32))
            if columns[-1].shape != columns[0].shape:
                raise ValueError(f"reward {len(columns)} gave the shape {tuple(columns[-1].shape)}, not {tuple(columns[0].shape)}")
        stacked = torch.stack(columns)  # (K, B)
        return stacked.mean(0) if how == "mean" else stacked.amin(0)

    return reward


def weight_average(models):
    """WARM: one reward model whose weights are the mean of several models fine-tuned from the same start. It runs at the cost of one.

    Raises BadInput if their configurations differ.
    """
    average = copy.deepcopy(models[0])
    for field, value in vars(average.config).items():
        if field not in ("reward_offset", "n_tokens") and any(getattr(model.config, field) != value for model in models):
            raise BadInput(f"warm: the reward models differ in {field}: only models of one architecture can be averaged")
    tensors = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, parameter in average.named_parameters():
            parameter.copy_(torch.stack([other[name] for other in tensors]).mean(0))
    average.config.reward_offset = sum(model.config.reward_offset for model in models) / len(models)
    return average


# --------------------------------------------------------------------------------------------------- from the command line


def open_reward(specs, *, combine="mean", prompts="builtin", device="cpu", dtype=None, skip_bad=False):
    """The reward named by --reward and --combine. prompts: the prompt file; exact_match reads the demonstrated answers from it."""
    if combine not in ("mean", "min", "warm"):
        raise BadInput(f"--combine {combine}: must be mean, min or warm")
    if combine == "warm":
        for spec in specs:
            if not os.path.isdir(spec) and "/" not in spec:
                raise BadInput(f"--reward {spec}: --combine warm averages reward models; expected a folder")
        folders = [find_folder(spec) for spec in specs]
        opened = [_reward_model(folder, device, dtype) for folder in folders]
        return learned(weight_average([model for model, _ in opened]), opened[0][1])
    opened = [_open_one(spec, prompts, device, dtype, skip_bad) for spec in specs]
    return opened[0] if len(opened) == 1 else ensemble(opened, combine)


def reward_folders(specs):
    """The reward models among the specs: folders that must not change during a run. (Code may, so that a failing reward can be fixed.)"""
    return [Path(spec).expanduser() for spec in specs if os.path.isdir(os.path.expanduser(spec))]


def _open_one(spec, prompts, device, dtype, skip_bad):
    name, _, argument = spec.partition(":")
    if spec == "builtin":
        if prompts != "builtin":
            raise BadInput(f"--reward builtin scores the built-in task, not {prompts}: name a reward (--help), or FILE.py:FUNCTION")
        return gold_reward
    if spec == "exact_match":
        if prompts == "builtin":
            raise BadInput("--reward exact_match needs --prompts FILE with answers that end in `#### number`")
        return exact_match(read_demonstrations(prompts, skip_bad=skip_bad))
    if name == "format":
        return format_match(argument) if argument else format_match()
    if name == "regex":
        if not argument:
            raise BadInput(f"--reward {spec}: expected a pattern, like 'regex:[0-9]+'")
        return regex(argument)
    if name == "length":
        if not re.fullmatch("[0-9]{1,9}", argument):
            raise BadInput(f"--reward {spec}: expected a number of characters, like length:200")
        return length(int(argument))
    if name == "lexicon":
        words = [word.strip() for word in argument.split(",") if word.strip()]
        if not words or not all(word.strip("- ") for word in words):
            raise BadInput(f"--reward {spec}: expected words, like lexicon:please,thanks,-now (a leading - makes the weight -1)")
        return lexicon({word.lstrip("- "): -1.0 if word.startswith("-") else 1.0 for word in words})
    if (path := code_file(spec)) is not None:
        return _function_of_file(spec, path)
    if not spec or (not os.path.isdir(os.path.expanduser(spec)) and "/" not in spec):
        raise BadInput(f"--reward {spec}: expected builtin, exact_match, format, regex:PATTERN, length:N, lexicon:WORDS, "
                       "FILE.py:FUNCTION, or a reward model's folder")
    folder = find_folder(spec)
    return learned(*_reward_model(folder, device, dtype))


def _reward_model(folder, device, dtype):
    model, tokenizer, _ = load_model(folder, dtype=dtype, device=device)
    if model.config.head != "scalar":
        raise BadInput(f"{folder}: is a language model, which gives no reward; train one with `python -m minialign reward_model`")
    return model.requires_grad_(False), tokenizer


def _function_of_file(spec, path):
    name = spec[len(path) + 1 :]
    if not path:
        raise BadInput(f"--reward {spec}: expected FILE.py:FUNCTION")
    if not os.path.isfile(path):
        raise BadInput(f"--reward {spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"reward_file_{len(sys.modules)}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles look up their module there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"--reward {spec}: {path} cannot be imported ({type(error).__name__}: {one_line(error)})") from None
    if not callable(getattr(module, name, None)):
        raise BadInput(f"--reward {spec}: {path} defines no function {name}; it needs `def {name}(prompts, completions)` -> B numbers")
    return by_keywords(getattr(module, name))


def by_keywords(function):
    """A reward function of two parameters, prompts and completions, as it is. One with TRL's parameters is wrapped into such a function.

    TRL calls a reward as reward(prompts=…, completions=…, answer=…, …) with a list for each other column of the prompts' file. If a prompt
    is a list of messages, its completion is one too: [{"role": "assistant", "content": text}].
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some callables made in C do not say
        return function
    catches = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not catches and (list(parameters) == ["prompts", "completions"] or "completions" not in named):
        return function
    needed = {name for name in named if parameters[name].default is inspect.Parameter.empty} - {"prompts", "completions"}

    def reward(prompts, completions):
        rows = [getattr(prompt, "columns", {}) for prompt in prompts]
        if not catches and not (needed or named & {name for row in rows for name in row} - {"prompts", "completions"}):
            given = {"prompts": prompts, "completions": completions}  # its other parameters are options, not columns
            return function(**{name: value for name, value in given.items() if name in named})
        columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
        if missing := sorted(needed - columns.keys()):
            raise ValueError(f"needs {missing[0]!r}, which is no column of the file; its columns are {', '.join(columns) or 'none'}")
        answers = [[{"role": "assistant", "content": c}] if isinstance(p, list) else c for p, c in zip(prompts, completions, strict=True)]
        given = {**columns, "prompts": prompts, "completions": answers}
        given = {name: value for name, value in given.items() if name in named or catches and name not in ("prompt", "completion")}
        return function(**given)

    return reward


# ----------------------------------------------------------------------------------------------------------- asking safely


class BadReward(Exception):
    """A reward failed on a batch or returned something invalid. The message says what went wrong and names the row."""


def ask(reward_fn, prompts, completions, *, limit=60.0):
    """reward_fn's rewards for a batch, (B,) float32 on the CPU. Raises BadReward. limit: seconds it may take, see ask_here.
    Under torchrun each process computes the rewards of its rows. Then all processes get all rewards, or all raise the same error."""
    prompts, completions, own = parallel.local_rows(prompts), parallel.local_rows(completions), None
    try:
        own = ask_here(reward_fn, prompts, completions, limit) if len(prompts) else torch.zeros(0)
    except BadReward as error:
        own = error
    parts = parallel.gather(own)
    for part in parts:
        if isinstance(part, BadReward):
            raise part
    return torch.cat(parts)


def ask_here(reward_fn, prompts, completions, limit):
    """reward_fn's rewards for a batch, (B,) float32 on the CPU. reward_fn gets copies of both lists. limit: seconds it may take.

    Raises BadReward if reward_fn raises, takes longer, or returns anything but B finite numbers. To name the bad row it may call reward_fn
    row by row (for at most twice the limit). The limit is an alarm signal: it stops Python code, sleeps, input and output, and regular
    expressions, but not C code that never checks for signals. On Windows and outside the main thread there is no alarm, so no limit.
    """
    rewards, fault, row = _try(reward_fn, prompts, completions, limit)
    if fault is None:
        return rewards
    deadline, alone = time.monotonic() + 2 * limit, row is not None
    for b in range(len(prompts)) if row is None else []:
        left = deadline - time.monotonic()
        if left < 0.01 * limit:
            break
        _, fault_alone, _ = _try(reward_fn, prompts[b : b + 1], completions[b : b + 1], min(limit, left))
        if fault_alone is not None and not (left < limit and "longer than" in fault_alone):  # (cut off by our own deadline)
            row, alone = b, True
            break
    else:
        alone = True
    if row is not None:
        fault += f" (row {row}, prompt {_short(plain_text(prompts[row]))}, completion {_short(completions[row])})"
    elif alone:
        fault += " (no single row does it alone)"
    raise BadReward(f"the reward {fault}")


def as_list(rewards):
    """What a reward returned, as a list. Raises TypeError for what cannot hold one number per completion: text, a dict, a set, a number."""
    if torch.is_tensor(rewards):
        rewards = rewards.detach().cpu().tolist()
    if isinstance(rewards, (str, bytes, dict, set)) or not hasattr(rewards, "__iter__"):
        raise TypeError(f"returned {type(rewards).__name__}, not one number per completion")
    return list(rewards)


def _try(reward_fn, prompts, completions, limit):
    """(rewards, None, None), or (None, what is wrong, the row or None if unknown)."""
    prompts = [copy.deepcopy(prompt) for prompt in prompts]  # a reward may append to the messages it gets
    began = time.monotonic()
    try:
        with time_limit(limit):
            answer = reward_fn(prompts, list(completions))
            try:
                numbers = as_list(answer)
            except TypeError as error:
                return None, one_line(error), None
    except Overtime:
        return None, f"took longer than {limit:.3g} s", None
    except Stopped:  # the run's own
        raise
    except (Exception, SystemExit) as error:
        return None, f"raised {type(error).__name__}: {one_line(error)}", None
    if time.monotonic() - began > limit and has_alarm():  # reward_fn caught the alarm and went on
        return None, f"took longer than {limit:.3g} s", None
    if len(numbers) != len(completions):
        return None, f"returned {len(numbers)} rewards for {len(completions)} completions", None
    for row, number in enumerate(numbers):
        try:
            numbers[row] = float("text" if isinstance(number, (str, bytes)) else number)
        except Exception:
            return None, f"returned {repr(number)[:80].splitlines()[0]}, which is not a number", row
    rewards = torch.tensor(numbers, dtype=torch.float32)
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).int().argmax())
        return None, f"returned {numbers[row]:g}", row
    return rewards, None, None


def _short(text):
    text = text.replace("\n", "\\n")
    return f"'{text}'" if len(text) <= 80 else f"'{text[:40]} … {text[-35:]}'"


def explained_variance(values, returns, mask):
    """1 − E[(G − V)²] / Var(G) over the mask's tokens: 1 for a perfect critic, 0 for the constant mean. None if returns are equal."""
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - masked_mean((returns - values) ** 2, mask) / spread if spread > 1e-8 else None


def rollout_stats(rewards, answers, *, group_size=1):
    """The metrics of one rollout. rewards: (B,) without KL penalty. answers: a Rollout; if it has ref_logps, the KL to ref is included."""
    stats = {
        "reward": rewards.mean(), "reward_std": rewards.std(correction=0),
        "completions/mean_length": answers.lengths.float().mean(), "completions/finished": answers.finished.float().mean(),
    }
    if answers.ref_logps is not None:
        stats["kl"] = k1(answers.old_logps, answers.ref_logps).sum(1).mean()
        stats["kl_k3"] = k3(answers.old_logps, answers.ref_logps).sum(1).mean()
    if group_size > 1:
        groups = rewards.view(-1, group_size)  # (N, G)
        stats["frac_reward_zero_std"] = (groups == groups[:, :1]).all(1).float().mean()
    return stats
