"""What every run does around its method: open the policy, first look, progress, log, guards, checkpoints, export.

A method's main() keeps the algorithm in sight (zero_grad, backward, clip, step); this file keeps the rest out of it. The folder:

    runs/<method>-<time>/  config.json  env.json  inputs.json  tokenizer.json  metrics.jsonl  samples.jsonl
                           checkpoints/step_000100/  final/ (a Hugging Face folder)  snapshots/000020/ (if asked for)  reward/ (rft, irl)

Checked by tests/test_run.py and, with kill -9, tests/test_resume.py.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minialign import __version__, checkpoint, parallel
from minialign.batch import Batch
from minialign.common import BadInput, append_row, check_config, find_folder, pick_device, pick_dtype, read_json, read_rows, write_atomic
from minialign.data import builtin_prompts, counts, encode_prompts, read_prompts, split_held_out
from minialign.kernels.linear_logprob import SLICE_BYTES
from minialign.kl import k1
from minialign.logps import best_body, token_logps
from minialign.lora import adapters, inject, merged, save_adapter
from minialign.model import GPT
from minialign.rewards import BadReward, ask, open_reward, reward_folders
from minialign.sample import sample
from minialign.tokenizer import load_tokenizer
from minialign.weights import fit_vocabulary, load_pretrained, save_pretrained

SHOWN = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "reward", "reward/best", "reward/kept", "kl",
         "frac_reward_zero_std")  # on the terminal
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
READS_ALL = ("reward_model", "rft", "irl")  # a policy never sees the last token of a row, a reward model reads it
ABORT_AFTER = 3  # steps in a row with a non-finite loss or gradient, or without rewards
RATIO_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2}  # sampler against training forward, per token


class Run:
    """One training run. `cfg` is the run's own Config: the given one, or with cfg.resume the one stored in that folder."""

    def __init__(self, method, cfg):
        parallel.start()
        self.method = method
        self.resuming = bool(cfg.resume)
        if self.resuming:
            self.folder = Path(cfg.resume)
            cfg = self._stored(cfg)
        else:
            self.folder = Path(cfg.out) if cfg.out else parallel.on_main(new_folder, method)
        check_config(cfg)
        self.cfg, self.device, mixed = cfg, pick_device(cfg.device), cfg.dtype == "mixed"
        self.weights_dtype = torch.float32 if mixed else pick_dtype(cfg.dtype)
        self.dtype = torch.bfloat16 if mixed else self.weights_dtype  # of the forward and backward pass
        self.load_device = torch.device("cpu") if parallel.started() else self.device  # then a GPU never holds more than its slices
        self._check_parallel()
        if not self.resuming:
            parallel.on_main(self._create)
        if self.device.type == "mps":
            print("note: Apple's mps device has computed wrong losses in some releases of torch; compare a short run with --device cpu")
        torch.manual_seed(cfg.seed)
        self.modules, self.optimizers = {}, {}
        self.first_step, self.skipped, self.skipped_in_a_row, self.failing, self.stop = 0, 0, 0, None, None
        self.started, self.bar = time.monotonic(), None

    def _check_parallel(self):
        cfg, unit = self.cfg, parallel.world() * (2 if "rebel" in (self.method, getattr(self.cfg, "policy_step", "")) else 1)
        if parallel.world() > 1 and ":" in cfg.device:
            raise BadInput(f"--device {cfg.device}: each of {parallel.world()} processes takes a GPU of its own; say cuda, or auto")
        if cfg.parallel not in ("fsdp", "ddp"):
            raise BadInput(f"--parallel {cfg.parallel}: must be fsdp or ddp")
        if self.weights_dtype != self.dtype and not parallel.started():
            raise BadInput(f"--dtype mixed: is FSDP2's; start the run by `torchrun --nproc_per_node 1 -m minialign {self.method} …`")
        if parallel.world() > 1 and cfg.batch_size % unit:
            raise BadInput(f"--batch_size {cfg.batch_size}: must be a multiple of {unit}, so that each of {parallel.world()} processes has "
                           "an equal part")

    def _stored(self, cfg):
        """The Config of the run that is resumed. Other flags beside --resume would break the promise of an equal continuation."""
        if not (self.folder / "config.json").is_file():
            raise BadInput(f"{self.folder}: holds no config.json, so no run that could be resumed")
        stored = read_json(self.folder / "config.json")
        if stored.pop("method", None) != self.method:
            raise BadInput(f"{self.folder}: was not made by {self.method}; resume it with the method that made it")
        fields = {f.name for f in dataclasses.fields(cfg)}
        if stored.keys() != fields:
            raise BadInput(f"{self.folder}/config.json: has other fields ({sorted(stored.keys() ^ fields)[:3]}): another version made it")
        default = type(cfg)()
        changed = [f.name for f in dataclasses.fields(cfg) if f.name != "resume" and getattr(cfg, f.name) != getattr(default, f.name)]
        changed = [name for name in changed if getattr(cfg, name) != stored.get(name)]
        if changed:
            otherwise = f"to go on otherwise: --policy {self.folder}/final"
            raise BadInput(f"--resume continues a run as it was configured; drop --{changed[0]} ({otherwise})")
        torch.set_num_threads(read_json(self.folder / "env.json")["threads"])  # another thread count sums in another order
        return type(cfg)(**{**stored, "resume": cfg.resume})

    def _create(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What a run leaves that was refused before step 1 may be written over; anything else is somebody's work.
            if {path.name for path in self.folder.iterdir()} - {"config.json", "env.json", "inputs.json", *TOKENIZER_FILES}:
                raise BadInput(f"{self.folder}: exists and is not empty; name another --out, or continue it with --resume {self.folder}")
            for name in ("inputs.json", *TOKENIZER_FILES):
                (self.folder / name).unlink(missing_ok=True)
            environment = {
                "minialign": __version__, "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
                "platform": platform.platform(), "device": describe_device(self.device), "threads": torch.get_num_threads(),
                "argv": sys.argv[1:], "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            write_atomic(self.folder / "env.json", json.dumps(environment, indent=1) + "\n")
            record = {"method": self.method, **dataclasses.asdict(self.cfg)}
            write_atomic(self.folder / "config.json", json.dumps(record, indent=1) + "\n")  # last: with it the run can be resumed
        except OSError as error:
            raise BadInput(f"{self.folder}: cannot be written ({error.strerror}); name another --out") from None

    # ------------------------------------------------------------------------------------------------------------- inputs

    def open_policy(self, name):
        """(policy, tokenizer) from `builtin`, a folder or a hub name, on the run's device."""
        path = find_folder(builtin_base() if name == "builtin" else name)
        self.same_input("policy", path)
        policy = load_pretrained(path, dtype=self.weights_dtype, device=self.load_device)
        policy.recompute = self.cfg.activation_checkpointing
        tokenizer = load_tokenizer(path)
        fit_vocabulary(policy, tokenizer, path)
        if self.cfg.lora:
            inject(policy, self.cfg.lora, self.cfg.lora_alpha)
        if policy.config.head != "lm" and self.method != "reward_model":
            raise BadInput(f"{path}: is a reward model, which writes nothing; {self.method} needs a policy with a language-model head")
        max_len = getattr(self.cfg, "max_len", 2)  # online methods have none: check_context does it for them
        positions = max_len - (self.method not in READS_ALL)
        if positions > policy.config.max_len:
            raise BadInput(f"--max_len {self.cfg.max_len}: the policy's context is {policy.config.max_len} tokens")
        tokenizer.save(self.folder)
        return policy, tokenizer

    def open_prompts(self, policy, tokenizer):
        """Online methods: ([(prompt ids, prompt as the file has it)] to train on, the same held out), checked against the context."""
        cfg = self.cfg
        self.same_input("data", cfg.prompts)
        prompts = builtin_prompts() if cfg.prompts == "builtin" else read_prompts(cfg.prompts, skip_bad=cfg.skip_bad)
        rows, held_out = split_held_out(encode_prompts(tokenizer, prompts, max_prompt=cfg.max_prompt), cfg.held_out)
        self.check_context(policy, rows + held_out)
        return rows, held_out

    def open_reward(self):
        """The function that --reward and --combine name; changed reward models are refused when resuming."""
        cfg = self.cfg
        prompts = cfg.prompts if hasattr(cfg, "prompts") else cfg.pairs
        for number, path in enumerate(reward_folders(cfg.reward)):
            self.same_input(f"reward {number}", path)
        where = dict(device=self.device, dtype=self.dtype)
        return open_reward(cfg.reward, combine=cfg.combine, prompts=prompts, skip_bad=cfg.skip_bad, **where)

    def open_value_model(self, name, policy, tokenizer):
        """PPO's critic: the policy's trunk under a new scalar head, or a reward model of the same vocabulary."""
        if name == "policy":
            return policy.with_scalar_head()
        path = find_folder(name)
        self.same_input("value", path)
        value_model = load_pretrained(path, dtype=self.weights_dtype, device=self.load_device)
        value_model.recompute = self.cfg.activation_checkpointing
        if value_model.config.head != "scalar" or load_tokenizer(path).inner.get_vocab() != tokenizer.inner.get_vocab():
            raise BadInput(f"--value {name}: expected a reward model over the policy's own tokens (python -m minialign reward_model)")
        if value_model.config.max_len < policy.config.max_len:
            raise BadInput(f"--value {name}: its context of {value_model.config.max_len} tokens is shorter than the policy's")
        return value_model

    def same_input(self, kind, path):
        """On the first start record the sha256 of a file (or of a model folder's weights); when resuming, refuse changed ones."""
        path = Path(path if os.path.exists(path) else str(path).partition(":")[0])  # FOLDER:SPLIT
        if path.is_dir():
            files = sorted([*path.glob("*.safetensors"), *path.glob("*.json"), *path.rglob("*.parquet")])
        else:
            files = [path] if path.is_file() else []  # 'builtin' and names of the hub have no file
        digest = hashlib.sha256("".join(checkpoint.sha256(file) for file in files).encode()).hexdigest()
        record = self.folder / "inputs.json"
        known = read_json(record) if record.is_file() else {}
        if self.resuming and known.get(kind, digest) != digest:
            raise BadInput(f"{path}: has changed since this run began, so the run cannot be continued as it was; restore the file")
        write_atomic(record, json.dumps({**known, kind: digest}, indent=1) + "\n")

    def first_look(self, tokenizer, rows, batch, **models):
        """What to look at before step 1: device, sizes, three decoded rows with the scored tokens in ⟦ ⟧, counts, memory.

        models: those that take memory, by name; None where a method has no such model.
        """
        models = {name: model for name, model in models.items() if model is not None}
        numbers = counts(rows, self.cfg.max_len)
        sides = [batch] if isinstance(batch, Batch) else [batch.chosen, batch.rejected]
        needed = self._sizes(models, sum(side.inputs.shape[1] for side in sides))
        empty = sum(len(completion) == 1 for _, *completions in rows for completion in completions)  # nothing but EOS
        print(f"data: {numbers['rows']:,} rows, {numbers['scored_tokens']:,} scored tokens, {numbers['truncated']:,} truncated, "
              f"{empty:,} empty; about {needed:,.0f} MB at the peak")
        for side in sides:
            for b in range(min(3, len(side))):
                print("  " + show_row(tokenizer, side, b))
        self._say_folder()

    @torch.no_grad()
    def first_rollout(self, tokenizer, rows, reward_fn, *, policy, ref, value_model=None):
        """The same for online methods, on completions of the first three prompts: check_sampler, and their rewards."""
        cfg = self.cfg
        prompts_ids, prompts = zip(*rows[:3], strict=True)
        lengths = [len(ids) for ids, _ in rows]
        models = {"policy": policy, "ref": ref} | ({"value_model": value_model} if value_model else {})
        drawn = getattr(cfg, "grow_prompts", cfg.batch_size) * getattr(cfg, "n", 1)  # rows that are sampled together
        needed = self._sizes(models, max(lengths) + cfg.max_new, drawn)
        cut = sum(length == cfg.max_prompt for length in lengths)
        print(f"prompts: {len(rows):,}, the longest of {max(lengths):,} tokens, {cut:,} at --max_prompt; up to {cfg.max_new:,} new tokens "
              f"each; about {needed:,.0f} MB at the peak")
        answers = self.check_sampler(tokenizer, prompts_ids, policy=policy, ref=ref)
        texts = [tokenizer.decode(ids) for ids in answers.completions]
        try:
            rewards = ask(reward_fn, prompts, texts, limit=cfg.reward_limit)
        except BadReward as error:
            raise BadInput(f"{error}; a reward is called as reward(prompts, completions), two lists of B, and returns B numbers") from None
        for b, reward in enumerate(rewards.tolist()):
            print(f"  {show_row(tokenizer, answers, b)}  reward {reward:g}")
        if hasattr(cfg, "beta"):
            print("watch reward and kl: the loss is no progress signal here")
        self._say_folder()

    @torch.no_grad()
    def check_sampler(self, tokenizer, prompts_ids, *, policy, ref):
        """A rollout of a few prompts, on which the two numbers that must be 1 and 0 are printed.

        The ratio compares the sampler's log-probs with those of the forward pass that trains. Raises BadInput where they are not of
        one distribution: sampling at another temperature, with truncation, or a wrong position would train on a ratio that is not 1.
        """
        cfg = self.cfg
        answers = sample(policy, prompts_ids, max_new=cfg.max_new, tau=cfg.tau, eos_id=tokenizer.eos_id, seed=cfg.seed)
        logps, ref_logps = token_logps(policy, answers, tau=cfg.tau), token_logps(ref, answers, tau=cfg.tau)  # (B, T)
        off, kl = float(((logps - answers.old_logps).exp() - 1).abs().max()), float(k1(logps, ref_logps).sum(1).mean())
        print(f"ratio of training to sampling: 1 to within {off:.1e}; KL to ref: {kl:.3g} nats per completion (0 at the start)")
        if off > RATIO_TOLERANCE[self.dtype]:
            raise BadInput(f"sampler and training forward pass differ by {off:.2g} in ratio at --dtype {cfg.dtype}; try --dtype float32")
        return answers

    def _sizes(self, models, positions, sampled=0):
        """Print device, dtype and parameters; returns the peak memory in MB, with a word if that is more than there is."""
        for model in models.values():  # those that no checkpoint holds
            self._shard(model)
        needed = peak_memory(self, models, positions, sampled)
        sizes = ", ".join(f"{name} {sum(p.numel() for p in model.parameters()):,}" for name, model in models.items())
        head = next(iter(models.values())).config
        body = f", log-probs {best_body(rows_at_once(self.cfg) * positions, head.vocab_size, self.device)}" if head.head == "lm" else ""
        print(f"{self.method}: {describe_device(self.device)}, {self.cfg.dtype}, parameters: {sizes}{body}")
        if self.device.type == "cuda" and needed * 2**20 > torch.cuda.mem_get_info(self.device)[0]:
            note("note: the peak is above what the GPU has free; a smaller --micro_batch or shorter rows need less")
        return needed

    def _say_folder(self):
        print(f"folder: {self.folder}" + (f", resuming after step {self.first_step}" if self.resuming else ""), flush=True)

    def check_context(self, policy, rows, max_len=math.inf):
        """Refuse at second 0 prompts that leave no room for max_new sampled tokens, rather than at the step that meets the longest.

        max_len: of the rows, if answers that a reward judged whole would be cut to it.
        """
        longest, context = max(len(row[0]) for row in rows), policy.config.max_len
        if longest + self.cfg.max_new > max_len:
            raise BadInput(f"the longest prompt has {longest} tokens: with --max_new {self.cfg.max_new} it exceeds --max_len {max_len}, so "
                           f"answers would be cut after the reward has seen them; set --max_len {longest + self.cfg.max_new}")
        if longest + self.cfg.max_new - (self.method not in READS_ALL) > context:
            shorter = f"set --max_prompt {context - self.cfg.max_new}, or a smaller --max_new" if context > self.cfg.max_new else "lower it"
            raise BadInput(
                f"the longest prompt has {longest} tokens: with --max_new {self.cfg.max_new} it exceeds the policy's context of {context}; "
                f"{shorter}"
            )

    # --------------------------------------------------------------------------------------------------------- checkpoints

    def track(self, **parts):
        """Name the modules and optimizers that a checkpoint holds; when resuming, restore the newest one into them."""
        self.modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        self.optimizers = {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}
        needed = 2 * sum(3 * p.numel() * p.element_size() for module in self.modules.values() for p in module.parameters())
        free = shutil.disk_usage(self.folder).free
        if free < needed:  # two checkpoints, each with weights and two moments: better refused now than at step 1000
            raise BadInput(
                f"{self.folder}: checkpoints need about {needed:,} bytes and the disk has {free:,} free; make room or name another --out"
            )
        for module in self.modules.values():
            self._shard(module, self.optimizers.values())
        if not self.resuming:
            return
        newest = parallel.on_main(checkpoint.newest_checkpoint, self.folder)
        if newest is not None:  # killed before the first one: begin again, it is the same run
            state = checkpoint.load_checkpoint(newest, self.modules, self.optimizers)
            if state["config"] != self._config_hash():
                raise BadInput(f"{self.folder}/config.json: was edited since {newest.name} was written; restore it to resume")
            self.first_step, self.skipped = state["step"], state["skipped"]
            self.skipped_in_a_row, self.failing = state["skipped_in_a_row"], state["failing"]
            if state["torch"] != torch.__version__:
                note(f"note: written by torch {state['torch']}, continued by {torch.__version__}: equal only to rounding")
        if not parallel.is_main():
            return
        for name in ("metrics.jsonl", "samples.jsonl"):  # what came after the checkpoint will be done, and logged, again
            rows = [row for row in read_rows(self.folder / name) if row["step"] <= self.first_step]
            write_atomic(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _shard(self, module, optimizers=()):
        if isinstance(module, GPT):
            parallel.shard(module, self.cfg.parallel, self.device.type, self.dtype, optimizers)

    def save(self, step):
        state = {"config": self._config_hash(), "skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "failing": self.failing}
        checkpoint.save_checkpoint(self.folder, step, self.modules, self.optimizers, state)

    def _config_hash(self):
        return checkpoint.sha256(self.folder / "config.json")

    def steps(self, total):
        """Yield the steps still to do, from 0; after each one save when it is due. SIGTERM or Ctrl-C: save, say how to resume, exit."""
        handlers = {}

        def remember(number, frame):
            if self.stop is not None and not parallel.started():  # (torchrun and a cluster may both pass one on)
                raise KeyboardInterrupt  # the second signal does not wait
            self.stop = number

        try:
            handlers = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are somebody else's
            handlers = {}
        shown = sys.stderr.isatty() and parallel.is_main()
        self.bar = tqdm(total=total, initial=self.first_step, unit="step", disable=not shown, dynamic_ncols=True)
        self.started = time.monotonic()
        try:
            for step in range(self.first_step, total):
                yield step
                self.bar.update()
                done = step + 1
                stop = any(stop is not None for stop in parallel.gather(self.stop))  # one was told: all stop
                if done == total or stop or (self.skipped_in_a_row == 0 and done % self.cfg.save_every == 0):
                    self.save(done)
                if stop and done < total:
                    print(f"\nstopped after step {done}; go on with: python -m minialign {self.method} --resume {self.folder}")
                    parallel.end()
                    raise SystemExit(0)
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def sum(self, number):
        """Of all processes' numbers, where there are several: each has its micro-batches' part of a step's loss."""
        return parallel.total(number)

    def finite(self, step, policy, rows, loss, grad_norm, *, of="policy"):
        """True if this step may update the weights. False skips it, says which rows and which gradient; three in a row end the run.

        of: whose step it is, where two models take turns: a good one of the reward does not make up for those of a diverged policy.
        """
        loss, grad_norm = float(loss), parallel.number(grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if self.failing in (None, of):
                self.skipped_in_a_row, self.failing = 0, None
            return True
        self._skip()
        self.failing = of
        bad = [n for n, p in policy.named_parameters() if p.grad is not None and not parallel.number(p.grad.isfinite().all())]
        note(f"step {step + 1} skipped: loss {loss:g}, grad norm {grad_norm:g}, first non-finite gradient: {bad[0] if bad else 'none'}, "
             f"rows {rows[:8]}")
        if self.skipped_in_a_row == ABORT_AFTER:
            dump = {"step": step + 1, "rows": list(rows), "loss": repr(loss), "grad_norm": repr(grad_norm)}
            write_atomic(self.folder / "debug.json", json.dumps({**dump, "non_finite_gradients": bad}, indent=1) + "\n")
            raise FloatingPointError(
                f"{ABORT_AFTER} steps in a row were not finite, last step {step + 1}, rows {rows[:8]}; the weights are those of the last "
                f"good step, and the newest checkpoint in {self.folder}/checkpoints is finite; details in debug.json; try a smaller --lr"
            )
        return False

    def ask(self, step, reward_fn, prompts, completions):
        """The rewards of a rollout, (B,), or None if the reward failed: the step is then skipped, said, counted and logged as such.

        Three failures in a row end the run with BadInput.
        """
        try:
            rewards = ask(reward_fn, prompts, completions, limit=self.cfg.reward_limit)
            return rewards.to(self.device, torch.promote_types(self.dtype, torch.float32))
        except BadReward as error:
            if self.skipped_in_a_row == 0 and step > self.first_step:  # so that nothing is lost if it fails twice more
                self.save(step)
            self._skip()
            note(f"step {step + 1} skipped: {error}")
            self.log(step)
            if self.skipped_in_a_row == ABORT_AFTER:
                raise BadInput(
                    f"{ABORT_AFTER} steps in a row had no rewards, the last step {step + 1}: {error}; "
                    f"mend the reward and do them again with --resume {self.folder}"
                ) from None
            return None

    def _skip(self):
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    # ---------------------------------------------------------------------------------------------------------------- log

    def log(self, step, **metrics):
        """One row of metrics.jsonl for step `step` (rows count from 1), and a line on the terminal every log_every steps."""
        done = step + 1
        seconds = time.monotonic() - self.started
        values = {name: parallel.number(value) for name, value in metrics.items() if value is not None}
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON knows no NaN
        row = {"step": done, **values, "skipped": self.skipped, "seconds": round(seconds, 3)}
        append_row(self.folder / "metrics.jsonl", row)
        shown = "  ".join(f"{name} {math.nan if value is None else value:.4g}" for name, value in row.items()
                          if name in SHOWN or name.startswith("eval/"))
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(shown[:100])
        elif done == self.first_step + 1 or done % self.cfg.log_every == 0 or done == self.cfg.steps:
            left = seconds / (done - self.first_step) * (self.cfg.steps - done)
            print(f"step {done}/{self.cfg.steps}  {shown}  ({seconds:.0f} s, {left:.0f} s left)", flush=True)

    def log_samples(self, step, policy, tokenizer, prompts_ids, *, tau=1.0):
        """Write what the policy now answers to a few prompts to samples.jsonl. Has its own generators: training cannot notice."""
        context = policy.config.max_len
        prompts_ids = [prompt for prompt in prompts_ids if len(prompt) < context]
        if not prompts_ids:
            return
        max_new = min(self.cfg.max_new, context - max(map(len, prompts_ids)))
        rollout = sample(policy, prompts_ids, max_new=max_new, tau=tau, eos_id=tokenizer.eos_id, seed=self.cfg.seed)
        for prompt, ids, finished in zip(prompts_ids, rollout.completions, rollout.finished.tolist(), strict=True):
            row = {"step": step + 1, "prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(ids), "finished": finished}
            append_row(self.folder / "samples.jsonl", row)

    def snapshot(self, step, model, tokenizer, name="snapshots"):
        """With --snapshots, at an evaluation: export the model as it is after step `step`, to snapshots/000020/."""
        if self.cfg.snapshots:
            self.export(model, tokenizer, f"{name}/{step + 1:06d}")

    def export(self, model, tokenizer, name):
        """Write the model to the run folder as a Hugging Face folder `name`, its adapters merged; with --dtype mixed in bfloat16."""
        plain = merged(parallel.whole(model))
        parallel.on_main(save_pretrained, plain, self.folder / name, tokenizer)

    def due(self, step):
        """Whether to evaluate after step `step`: every eval_every steps and at the end."""
        return (step + 1) % self.cfg.eval_every == 0 or step + 1 == self.cfg.steps

    def close(self, model, tokenizer):
        """Export the trained model to final/ and say where things are. Returns the run folder.

        Adapters are merged into final/; those of a policy stand on their own in adapter/ too, a PEFT folder.
        """
        self.export(model, tokenizer, "final")
        if adapters(model) and model.config.head == "lm":
            parallel.on_main(save_adapter, parallel.whole(model), self.folder / "adapter", self.cfg.policy)
        parallel.gather(None)  # nobody goes on, and perhaps reads the folder, before it is whole
        print(f"done in {time.monotonic() - self.started:.0f} s: {self.folder}")
        print(f"  curves    python -m minialign plot {self.folder}")
        if model.config.head == "lm":
            print(f"  samples   python -m minialign show {self.folder}")
            print(f'  talk      python -m minialign sample --policy {self.folder}/final --prompt "…"')
        if (self.folder / "reward").is_dir():
            print(f"  reward    {self.folder}/reward, for --reward of evaluate, best_of_n and the online methods")
        if (self.folder / "adapter").is_dir():
            print(f"  adapter   {self.folder}/adapter (loads in PEFT beside {self.cfg.policy})")
        print(f"  weights   {self.folder}/final (loads in transformers as it is)", flush=True)
        return self.folder


# ------------------------------------------------------------------------------------------------------------------- helpers


def note(text):
    """Say it on the terminal, beside the output: by the first of several processes."""
    if parallel.is_main():
        print(text, file=sys.stderr)


def new_folder(method):
    folder, number = Path(f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}"), 1
    while folder.exists():  # two runs within one second
        number += 1
        folder = folder.with_name(f"{folder.name.split('~')[0]}~{number}")
    return folder


def builtin_base():
    """The folder of the base model of the built-in task: trained by the first run that needs it (about 15 s), then kept in runs/."""
    folder = Path("runs/builtin-base")
    if not (folder / "final" / "config.json").is_file():
        # A base model is what `sft --text` makes; imported here because methods import this file.
        from minialign.methods import sft

        started = parallel.on_main((folder / "config.json").is_file)
        print("the built-in task needs its base model once: training it into runs/builtin-base")
        sft.main(sft.Config(resume=str(folder)) if started else sft.builtin_base_config(str(folder)))
    return folder / "final"


def commit():
    """The checkout's git commit, or None outside a checkout."""
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def describe_device(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({torch.get_num_threads()} threads)"


def rows_at_once(cfg):
    """Rows of a forward pass: a micro-batch."""
    return min(cfg.micro_batch or cfg.batch_size, cfg.batch_size)


def peak_memory(run, models, positions, sampled=0):
    """MB, roughly: trained weights with gradients and two AdamW moments, frozen ones once, the activations of one micro-batch of rows of
    `positions` tokens, their logits or what logps.py's chunked body holds of them, and the key-value cache of `sampled` such rows, which
    are drawn together whatever the micro-batch."""
    size = torch.tensor([], dtype=run.dtype).element_size()
    parameters = {id(p): p for model in models.values() for p in model.parameters()}.values()  # copies share what adapters leave frozen
    total = sum(parallel.numel(p) * p.element_size() * (4 if p.requires_grad else 1) for p in parameters)
    config = next(iter(models.values())).config
    rows = rows_at_once(run.cfg)
    per_position = config.n_layer * (8 * config.n_embd + 3 * config.ffn_dim) * size
    if config.head == "lm" and best_body(rows * positions, config.vocab_size, run.device) == "naive":
        total += 12 * config.vocab_size * rows * positions
    elif config.head == "lm":
        total += 4 * SLICE_BYTES.get(run.device.type, 2**26)
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * size + 16  # and what is known of each drawn token
    return (total + positions * (rows * per_position + sampled * cache)) / 2**20


def show_row(tokenizer, batch, b, width=160):
    """Row b as text, what is scored in ⟦ ⟧ and EOS as ⏎; a long prompt or completion loses its middle."""

    def shorten(text):
        text = text.replace("\n", "\\n")
        return text if len(text) <= width else f"{text[: width // 2]} … {text[-width // 2 :]}"

    mask = batch.mask[b]
    scored = batch.targets[b][mask].tolist()
    n_scored = len(scored)
    first = int(mask.int().argmax()) if n_scored else len(mask)
    prompt = batch.inputs[b][: first + 1].tolist()
    end = "⏎" if scored[-1:] == [tokenizer.eos_id] else ""
    return f"{shorten(tokenizer.decode(prompt))}⟦{shorten(tokenizer.decode(scored))}{end}⟧  ({n_scored} scored)"
