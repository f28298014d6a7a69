"""What every run does around its method: folder, steps, checkpoints, guards, log, export.

A method's main() shows the algorithm (zero_grad, backward, clip, step); everything else a run does is in this folder, engine/.
The run folder:

    runs/<method>-<time>/  config.json  env.json  inputs.json  tokenizer.json  metrics.jsonl  samples.jsonl  (.lock  .pid)
                           checkpoints/step_000100/  final/ (a Hugging Face folder)  snapshots/000020/ (with --snapshots)
                           reward/ (rft, irl)  adapter/ (if the policy has adapters)

Checked by tests/engine/test_run.py and, with kill -9, by tests/engine/test_resume.py.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import torch
from tqdm import tqdm

from minialign import __version__
from minialign.engine import checkpoint, common, parallel, tracking
from minialign.engine.common import BadInput, append_row, environment, note, pick_device, pick_dtype, read_json, read_rows, write_atomic
from minialign.engine.opening import MOMENTS, check_compiler
from minialign.engine.safety import LOCK_FILES, Stopped, claim, code_files, mark, refuse_links, sweep
from minialign.lora import adapters, merged, save_adapter
from minialign.model import GPT
from minialign.rewards import BadReward, ask
from minialign.sample import sample
from minialign.settings import WITH_RESUME, check_config, how_to_go_on
from minialign.weights import save_pretrained

SHOWN = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "reward", "reward/best", "reward/kept", "kl",
         "frac_reward_zero_std")  # on the terminal
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
NEEDS = {("log", "tensorboard"): "tensorboard", ("log", "wandb"): "wandb", ("optimizer", "adamw8bit"): "torchao"}  # optional packages
MOST_FILES = 100_000  # of a folder of data, all of which are hashed
ABORT_AFTER = 3  # steps in a row with a non-finite loss or gradient, or without rewards


class Run:
    """One training run. `cfg` is the given Config, or with --resume the one stored in that folder."""

    def __init__(self, method, cfg):
        parallel.start()
        self.method = method
        self.resuming = bool(cfg.resume)
        if self.resuming:
            self.folder = Path(cfg.resume)
            self._check_folder()
            cfg = self._stored(cfg)
            parallel.on_main(self._take_over)
        else:
            self.folder = Path(cfg.out) if cfg.out else parallel.on_main(new_folder, method)
        check_config(cfg)
        for (flag, value), package in NEEDS.items():
            if getattr(cfg, flag) == value and importlib.util.find_spec(package) is None:
                raise BadInput(f"--{flag} {value}: needs the package {package}; install it with: pip install {package}")
        self.cfg, self.device, mixed = cfg, pick_device(cfg.device, deterministic=cfg.deterministic), cfg.dtype == "mixed"
        self.weights_dtype = torch.float32 if mixed else pick_dtype(cfg.dtype)
        self.dtype = torch.bfloat16 if mixed else self.weights_dtype  # of the forward and backward pass
        if mixed and self.device.type == "mps":
            raise BadInput("--dtype mixed: is for cpu and cuda, not for Apple's mps device; use --dtype float32, or --device cpu")
        check_compiler(cfg, self.device)
        parallel.start(alone=mixed)
        self._check_parallel()
        self.load = dict(dtype=self.weights_dtype, device=self.device, place=parallel.slicing(cfg.parallel, self.device))
        if not self.resuming:
            parallel.on_main(self._create)
            self._check_folder()
        if self.device.type == "mps":
            print("note: Apple's mps device has computed wrong losses in some releases of torch; compare a short run with --device cpu")
        torch.manual_seed(cfg.seed)
        self.modules, self.optimizers, self.adapter_base, self.long_files = {}, {}, None, []
        self.first_step, self.skipped, self.skipped_in_a_row, self.failing, self.stop = 0, 0, 0, None, None
        self.unlogged = None  # (step, metrics) of a step whose evaluation is still to come
        self.at, self.saved, self.untouched, self.given_up = 0, 0, False, False  # steps done, steps saved; see begin and give_up
        self.started, self.bar, self.writer = time.monotonic(), None, None

    def _check_parallel(self):
        cfg, kind = self.cfg, getattr(self.cfg, "policy_step", self.method)
        unit = parallel.world() * (2 if kind == "rebel" else getattr(cfg, "n", 1) if kind.startswith("bon_") else 1)  # groups stay whole
        if parallel.world() > 1 and ":" in cfg.device:
            raise BadInput(f"--device {cfg.device}: each of the {parallel.world()} processes needs a GPU of its own; say cuda, or auto")
        if cfg.optimizer == "adamw8bit" and parallel.started():
            raise BadInput("--optimizer adamw8bit: does not work with sliced weights; under torchrun and with --dtype mixed use adamw")
        if cfg.parallel not in ("fsdp", "ddp"):
            raise BadInput(f"--parallel {cfg.parallel}: must be fsdp or ddp")
        if parallel.world() > 1 and cfg.batch_size % unit:
            raise BadInput(f"--batch_size {cfg.batch_size}: must be a multiple of {unit}, so that each of the {parallel.world()} processes "
                           "gets an equal part")

    def _stored(self, cfg):
        """The Config of the run to resume. Flags that are neither default nor as stored are refused: they would change the run."""
        if not (self.folder / "config.json").is_file():
            raise BadInput(f"{self.folder}: has no config.json, so there is no run to resume")
        stored = read_json(self.folder / "config.json")
        if stored.pop("method", None) != self.method:
            raise BadInput(f"{self.folder}: was not made by {self.method}; resume it with the method that made it")
        default, unknown = type(cfg)(), sorted(stored.keys() - {f.name for f in dataclasses.fields(cfg)})
        if unknown:
            raise BadInput(f"{self.folder}/config.json: has other fields ({unknown[:3]}): another version made it")
        env, text = read_json(self.folder / "env.json"), (self.folder / "config.json").read_text(encoding="utf-8")
        if env.get("config", text_hash := hashlib.sha256(text.encode()).hexdigest()) != text_hash:
            raise BadInput(f"{self.folder}/config.json: was edited since this run began; restore it to resume")
        stored = {**dataclasses.asdict(default), **stored}  # fields that the version which began the run did not have
        changed = [f.name for f in dataclasses.fields(cfg) if f.name != "resume" and getattr(cfg, f.name) != getattr(default, f.name)]
        free = {name: getattr(cfg, name) for name in changed if name in WITH_RESUME}
        changed = [name for name in changed if name not in free and getattr(cfg, name) != stored[name]]
        if changed:
            raise BadInput(f"--resume continues a run with the flags it began with: drop --{changed[0]} (to change flags, start a new run "
                           f"with --policy {self.folder}/final)")
        named_again = getattr(cfg, "reward", None) != getattr(default, "reward", None)
        if (code := code_files(stored.get("reward", []))) and not named_again:
            own = parallel.on_main(mark, text, code)
            if own is None or env.get("mark") != own:
                raise BadInput(f"{self.folder}: its reward is code, {code[0]}, and it cannot be shown that you began this run with it; if "
                               f"you trust it, name it again: --reward {' '.join(stored['reward'])}")
        torch.set_num_threads(env.get("threads", 1))  # with another thread count, sums round differently
        if (made := env.get("minialign")) != __version__ or env.get("commit") != common.commit():
            note(f"note: this run was begun with minialign {made}, commit {env.get('commit')}, and this is another one: numbers may differ")
        return type(cfg)(**{**stored, **free, "resume": cfg.resume})

    def _take_over(self):
        """What a resumed run does first with its folder."""
        refuse_links(self.folder)
        self.lock = claim(self.folder)
        sweep(self.folder)

    def _create(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A run that was refused before step 1 leaves these files, a killed one also half of them. They may be overwritten. Anything
            # else is somebody's work.
            known = {"config.json", "env.json", "inputs.json", *TOKENIZER_FILES, *LOCK_FILES}
            if {path.name.partition(".tmp-")[0] for path in self.folder.iterdir()} - known:
                raise BadInput(f"{self.folder}: exists and is not empty; name another --out, or continue it with --resume {self.folder}")
            self.lock = claim(self.folder)
            sweep(self.folder)
            for name in ("inputs.json", *TOKENIZER_FILES):
                (self.folder / name).unlink(missing_ok=True)
            text = json.dumps({"method": self.method, **dataclasses.asdict(self.cfg)}, indent=1) + "\n"
            code = code_files(getattr(self.cfg, "reward", []))
            started = {"argv": sys.argv[1:], "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                       "config": hashlib.sha256(text.encode()).hexdigest(), "mark": mark(text, code) if code else None}
            write_atomic(self.folder / "env.json", json.dumps({**environment(self.device), **started}, indent=1) + "\n")
            write_atomic(self.folder / "config.json", text)  # last: a folder that has it can be resumed
        except OSError as error:
            raise BadInput(f"{self.folder}: cannot be written ({error.strerror}); name another --out") from None

    def _check_folder(self):
        """Raise BadInput in all processes if the machines do not share the run folder."""
        if parallel.world() > 1 and parallel.on_main(self.folder.is_dir) and (blind := parallel.blind(self.folder)):
            error = BadInput(f"{self.folder}: process {blind[0]} does not see what process 0 has written there; all machines need one "
                             "shared folder: name it with --out (to resume, with --resume)")
            error.in_all = True
            raise error

    def same_input(self, kind, path):
        """Record the sha256 of a file, or of the files in a folder, when a run starts. A resumed run refuses a changed input."""
        digest = digest_of(path, everything=kind in ("data", "mu", "demos", "text"))
        record = self.folder / "inputs.json"
        known = read_json(record) if record.is_file() else {}
        if self.resuming and known.get(kind, digest) != digest:
            if digest == digest_of(os.devnull):
                raise BadInput(f"{path}: is not there any more; a resumed run needs it, and looks for it from the folder {os.getcwd()}")
            raise BadInput(f"{path}: has changed since this run began, so the run cannot be continued as it was; restore the file")
        write_atomic(record, json.dumps({**known, kind: digest}, indent=1) + "\n")

    # --------------------------------------------------------------------------------------------------- steps and checkpoints

    def register(self, **parts):
        """Name the modules and optimizers that checkpoints contain. A resumed run loads the newest checkpoint into them here."""
        self.modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        self.optimizers = {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}
        needed, free = 3 * checkpoint.size_of(self.modules, MOMENTS[self.cfg.optimizer]), shutil.disk_usage(self.folder).free
        if free < needed:  # two checkpoints are kept while a third is written: better refused now than at step 1000
            raise BadInput(f"{self.folder}: checkpoints need about {needed:,} bytes and the disk has {free:,} free; make room or name "
                           "another --out")
        if share := unmoved(self.optimizers.values()):
            note(f"note: --dtype bfloat16 rounds so coarsely that a step of the size of the learning rate leaves {share:.1%} of the "
                 "trained weights unchanged; --dtype mixed avoids this")
        for module in self.modules.values():
            self.shard(module, self.optimizers.values())
        common.running = weakref.ref(self)  # (weak: a run that failed must not keep its models)
        if not self.resuming:
            return
        newest = checkpoint.newest_checkpoint(self.folder)
        if newest is None and checkpoint.numbered(self.folder / "checkpoints"):
            raise BadInput(f"{self.folder}/checkpoints: no checkpoint is intact; restore one, or delete the folder to begin at step 0")
        if newest is not None:  # None: killed before the first checkpoint. Starting again gives the same run.
            state = checkpoint.load_checkpoint(newest, self.modules, self.optimizers)
            if state["config"] != checkpoint.sha256(self.folder / "config.json"):
                raise BadInput(f"{self.folder}/config.json: was edited since {newest.name} was written; restore it to resume")
            self.first_step = self.saved = state["step"]
            self.skipped, self.skipped_in_a_row, self.failing = state["skipped"], state["skipped_in_a_row"], state["failing"]
            logged = {row["step"] for row in parallel.on_main(read_rows, self.folder / "metrics.jsonl", "step")}
            self.unlogged = None if self.first_step in logged else state.get("unlogged")  # killed while it evaluated
            if missing := self.first_step - bool(self.unlogged) - len({step for step in logged if step <= self.first_step}):
                note(f"note: {self.folder}/metrics.jsonl lacks {missing} of {self.first_step} steps: it was cut or replaced")
            if state["torch"] != torch.__version__:
                note(f"note: the checkpoint is of torch {state['torch']}, this is {torch.__version__}: numbers may differ by rounding")
        if not parallel.is_main():
            return
        for name in ("metrics.jsonl", "samples.jsonl"):  # the run repeats the steps after the checkpoint and logs them again
            rows = [row for row in read_rows(self.folder / name, "step") if row["step"] <= self.first_step - bool(self.unlogged)]
            write_atomic(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def shard(self, module, optimizers=()):
        """Under torchrun: split a GPT's weights over the processes."""
        if isinstance(module, GPT):
            parallel.shard(module, self.cfg.parallel, self.device.type, self.dtype, optimizers)

    def save(self, step):
        state = {name: getattr(self, name) for name in ("skipped", "skipped_in_a_row", "failing", "unlogged")}
        state["config"] = checkpoint.sha256(self.folder / "config.json")
        checkpoint.save_checkpoint(self.folder, step, self.modules, self.optimizers, state)
        self.saved = step

    def steps(self, total):
        """Yield the remaining steps, counted from 0. Save checkpoints when due. On SIGTERM or Ctrl-C save, print how to resume, exit.

        A step that has changed nothing yet is given up at once, and so is an evaluation: the resumed run does them again. Any other step is
        finished first; under torchrun all are, because the processes must stop together.
        """
        handlers, process = {}, os.getpid()

        def remember(number, frame):
            if os.getpid() != process:  # a process that a reward has forked ends as it would without us
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
                return
            if self.stop is not None and not parallel.launched():  # (torchrun and a cluster may each send one)
                raise KeyboardInterrupt  # a second signal ends the run at once, without saving
            self.stop = number
            self.give_up()

        try:
            handlers = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where signals cannot be caught
            handlers = {}
        shown = sys.stderr.isatty() and parallel.is_main()
        self.bar = tqdm(total=total, initial=self.first_step, unit="step", disable=not shown, dynamic_ncols=True)
        if self.cfg.log:
            parallel.on_main(self._open_writer)
        self.started = time.monotonic()
        try:
            self.finish_evaluation()
            for step in range(self.first_step, total):
                tracking.start()
                self.begin(step)
                for long in self.long_files if parallel.is_main() else ():
                    long.check()
                yield step
                self.finished()
                self.bar.update()
                done = step + 1
                stop = self.stopped()
                first = self.unlogged and done <= self.cfg.eval_every  # an evaluation may need more memory than the steps before it did
                save = done == total or stop or (self.skipped_in_a_row == 0 and (first or done % self.cfg.save_every == 0))
                if save:
                    self.save(done)
                    stop = self.stopped()
                if self.unlogged and not (stop and done < total):  # a stopped run evaluates when it is resumed
                    self.finish_evaluation()
                    stop = self.stopped()
                    if stop and not save:
                        self.save(done)
                if stop and done < total:
                    self.leave(done)
            for long in self.long_files if parallel.is_main() else ():
                if long.checked < len(long.numbers):
                    long.report()
        finally:
            tracking.stop()
            self.bar.close()
            if self.writer:
                self.writer.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _open_writer(self):
        settings = {"method": self.method, **dataclasses.asdict(self.cfg)}
        self.writer = tracking.Writer(self.cfg.log, self.folder, settings, self.first_step)

    def begin(self, at):
        """From here to `finished`, may_update or _skip, nothing changes what a checkpoint after `at` steps holds."""
        self.at, self.generator, self.untouched = at, torch.get_rng_state(), True
        if self.stop is not None:
            self.give_up()

    def give_up(self):
        """After a signal: leave at once if nothing has changed since `begin`, with a checkpoint. Samples, rewards or an evaluation, perhaps
        of minutes, are given up. Not where processes must stop together, nor while a GPU's work is recorded."""
        if not self.untouched or parallel.started() or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        self.untouched, self.given_up = False, True
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)  # a reward's time limit
        torch.set_rng_state(self.generator)
        if self.at > self.saved:
            self.save(self.at)
        self.leave(self.at)

    def finished(self):
        if self.given_up:  # a reward's own `except:` has caught Stopped
            raise Stopped(0)
        self.untouched = False

    def leave(self, done):
        """End the process after a signal, with exit code 0."""
        print(f"\nstopped after step {done}{how_to_go_on()}")
        parallel.leave()
        raise Stopped(0)

    def stopped(self):
        """Whether a signal to any of the processes asks to stop."""
        return any(stop is not None for stop in parallel.gather(self.stop))

    def sum(self, losses):
        """The sum of a list of scalar tensors over all processes: each process computes the losses of its own micro-batches only."""
        return parallel.sum_over_processes(sum(common.floats(losses)))

    def may_update(self, step, model, rows, loss, grad_norm, *, of="policy"):
        """True if loss and gradient of `model` are finite. If not, rows and gradient are reported and the caller skips the update.

        Three such steps in a row raise FloatingPointError and write debug.json. of: which model this step trains. With two models, a good
        reward step must not reset the count of failed policy steps.
        """
        self.finished()
        loss, grad_norm = float(loss), parallel.as_float(grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            if self.failing in (None, of):
                self.skipped_in_a_row, self.failing = 0, None
            return True
        self._skip()
        self.failing = of
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not parallel.as_float(p.grad.isfinite().all())]
        note(f"step {step + 1} skipped: loss {loss:g}, grad norm {grad_norm:g}, first non-finite gradient: {bad[0] if bad else 'none'}, "
             f"rows {rows[:8]}")
        if self.skipped_in_a_row == ABORT_AFTER:
            dump = {"step": step + 1, "rows": list(rows), "loss": repr(loss), "grad_norm": repr(grad_norm)}
            write_atomic(self.folder / "debug.json", json.dumps({**dump, "non_finite_gradients": bad}, indent=1) + "\n")
            raise FloatingPointError(
                f"{ABORT_AFTER} steps in a row were not finite, last step {step + 1}, rows {rows[:8]}; the weights are those of the last "
                f"good step, and so are those of the checkpoints; details in {self.folder}/debug.json; try a smaller --lr"
            )
        return False

    def ask(self, step, reward_fn, tokenizer, prompts, answers):
        """The rewards of a rollout, (B,), minus missing_eos for each unfinished completion. answers: B = N·n completions of the N prompts.

        Returns None if the reward function failed: the step is then skipped, reported and logged. Three failures in a row raise BadInput.
        """
        prompts = [prompt for prompt in prompts for _ in range(len(answers) // len(prompts))]
        try:
            rewards = ask(reward_fn, prompts, [tokenizer.decode(ids) for ids in answers.completions], limit=self.cfg.reward_limit)
            rewards = rewards.to(self.device, torch.promote_types(self.dtype, torch.float32))
            return rewards - getattr(self.cfg, "missing_eos", 0.0) * ~answers.finished
        except BadReward as error:
            if self.skipped_in_a_row == 0 and step > self.first_step:  # so that nothing is lost if it fails twice more
                self.save(step)
            self._skip()
            note(f"step {step + 1} skipped: {error}")
            self.log(step)
            if self.skipped_in_a_row == ABORT_AFTER:
                raise BadInput(
                    f"{ABORT_AFTER} steps in a row had no rewards, the last step {step + 1}: {error}; "
                    f"fix the reward and repeat these steps with --resume {self.folder} --reward {' '.join(self.cfg.reward)}"
                ) from None
            return None

    def less_memory(self):
        """What to change if a run needs more memory than there is, as text."""
        unit = 2 if "rebel" in (self.method, getattr(self.cfg, "policy_step", "")) else 1  # pairs stay together
        rows = common.rows_at_once(self.cfg)
        if rows <= unit:
            return "start the run again with --activation_checkpointing, or with shorter rows (--max_len, --max_new)"
        return f"passes of half as many rows need less{how_to_go_on()} --micro_batch {max(unit, rows // 2 // unit * unit)}"

    def _skip(self):
        self.finished()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1

    def compute_or_read(self, file, began, compute):
        """The JSON value stored in `file` of the run folder. If it is not there, compute() makes it and it is stored.

        began: the step up to which the policy is the reference. Raises BadInput if the file is missing and the run is past that step.
        """
        file = self.folder / file
        if not parallel.on_main(file.is_file):
            if self.first_step > began:
                raise BadInput(f"{file}: is missing, and the policy of step {self.first_step} is not the reference; begin a new run")
            value = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps({"value": value, "sha256": hash_of(value)}))
            parallel.gather(None)  # a barrier: no process reads the file before it is there
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            stored = {"value": None}
        if not isinstance(stored, dict) or "value" not in stored:  # older versions stored the value alone
            return stored
        if stored.get("sha256") != hash_of(stored["value"]):
            raise BadInput(f"{file}: has changed since this run wrote it; restore it, or begin a new run")
        return stored["value"]

    # ---------------------------------------------------------------------------------------------------------------- log

    def at_evaluation(self, policy, tokenizer, rows, measure, *, tau=1.0, reward_model=None):
        """Say what is done every eval_every steps and after the last step: measure, log samples, and with --snapshots export.

        measure() -> metrics on the held-out rows. rows: encoded rows; samples.jsonl gets the policy's answers to the first four prompts,
        sampled at temperature tau. reward_model: exported too with --snapshots.
        """
        def evaluate(step):
            metrics = measure()
            self.log_samples(step, policy, tokenizer, [row[0] for row in rows[:4]], tau)
            if self.cfg.snapshots:
                self.export(policy, tokenizer, f"snapshots/{step + 1:06d}")
                if reward_model is not None:
                    self.export(reward_model, tokenizer, f"reward_snapshots/{step + 1:06d}")
            return metrics

        self.evaluate = evaluate

    def end_of_step(self, step, metrics):
        """Log a step's metrics and speed; if an evaluation is due, later: steps() first writes the step's checkpoint, then evaluates."""
        metrics |= tracking.speed(self.device)
        if (step + 1) % self.cfg.eval_every == 0 or step + 1 == self.cfg.steps:
            self.unlogged = step, {name: parallel.as_float(value) for name, value in metrics.items() if value is not None}
        else:
            self.log(step, **metrics)

    def finish_evaluation(self):
        """Evaluate and log the step that waits for it, if one does. A resumed run begins with the one that its checkpoint is of."""
        if self.unlogged:
            step, metrics = self.unlogged
            self.begin(step + 1)
            measured = self.evaluate(step)
            self.finished()
            self.log(step, **metrics, **measured)
            self.unlogged = None

    def log(self, step, **metrics):
        """Append one row to metrics.jsonl (its steps count from 1), give it to --log, and print a line every log_every steps."""
        done = step + 1
        seconds = time.monotonic() - self.started
        values = {name: parallel.as_float(value) for name, value in metrics.items() if value is not None}
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        timed = {"seconds": round(seconds, 3)} | {name: values.pop(name) for name in tracking.TIMED if name in values}  # last in the row
        row = {"step": done, **values, "skipped": self.skipped, **timed}
        append_row(self.folder / "metrics.jsonl", row)
        if self.writer:
            self.writer.write(row)
        shown = "  ".join(f"{name} {math.nan if value is None else value:.4g}" for name, value in row.items()
                          if name in SHOWN or name.startswith("eval/"))
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(shown[:100] + tracking.describe(row))
        elif done == self.first_step + 1 or done % self.cfg.log_every == 0 or done == self.cfg.steps:
            left = seconds / max(1, done - self.first_step) * (self.cfg.steps - done)
            print(f"step {done}/{self.cfg.steps}  {shown}  ({seconds:.0f} s, {left:.0f} s left{tracking.describe(row)})", flush=True)

    def log_samples(self, step, policy, tokenizer, prompts_ids, tau):
        """Write the policy's answers to a few prompts to samples.jsonl. Sampling uses its own random generators, not the run's."""
        context = policy.config.max_len
        prompts_ids = [prompt for prompt in prompts_ids if len(prompt) < context]
        if not prompts_ids:
            return
        max_new = min(self.cfg.max_new, context - max(map(len, prompts_ids)))
        rollout = sample(policy, prompts_ids, max_new=max_new, tau=tau, eos_id=tokenizer.eos_id, seed=self.cfg.seed)
        for prompt, ids, finished in zip(prompts_ids, rollout.completions, rollout.finished.tolist(), strict=True):
            row = {"step": step + 1, "prompt": tokenizer.decode_prompt(prompt), "completion": tokenizer.decode(ids), "finished": finished}
            append_row(self.folder / "samples.jsonl", row)

    def export(self, model, tokenizer, name):
        """Write the model to the run folder as a Hugging Face folder `name`, with adapters merged; in bfloat16 with --dtype mixed."""
        plain = merged(parallel.full_copy(model))
        parallel.on_main(save_pretrained, plain, self.folder / name, tokenizer)

    def close(self, model, tokenizer):
        """Export the trained model to final/, its adapters also to adapter/ (a PEFT folder), and print where they are.

        Returns the run folder.
        """
        self.export(model, tokenizer, "final")
        common.running = common.no_run
        if adapters(model) and model.config.head == "lm":
            parallel.on_main(save_adapter, parallel.full_copy(model), self.folder / "adapter", self.adapter_base)
        parallel.gather(None)  # wait for the first process, so that nobody reads the folder before it is complete
        print(f"done in {time.monotonic() - self.started:.0f} s: {self.folder}")
        print(f"  curves    python -m minialign plot {self.folder}")
        if model.config.head == "lm":
            print(f"  samples   python -m minialign show {self.folder}")
            print(f'  talk      python -m minialign sample --policy {self.folder}/final --prompt "…"')
        if (self.folder / "reward").is_dir():
            print(f"  reward    {self.folder}/reward, for --reward of evaluate, best_of_n and the online methods")
        if (self.folder / "adapter").is_dir():
            print(f"  adapter   {self.folder}/adapter (a PEFT folder for {self.adapter_base}; --policy takes it too)")
        print(f"  weights   {self.folder}/final (transformers loads it as it is)", flush=True)
        return self.folder


def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def digest_of(path, everything=False):
    """The sha256 of a file, or of the files in a folder; under torchrun each process reads a part of them. FOLDER:SPLIT is the folder."""
    path = Path(path if os.path.exists(path) else str(path).partition(":")[0])
    hashes = parallel.share_out(read_hash, parallel.on_main(files_of, path, everything))
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def files_of(path, everything=False):
    """The files of an input: those of a folder in a fixed order, or the file itself. 'builtin' and hub names have none.

    everything: all files of a folder, as for data; otherwise those of a model.
    """
    if path.is_dir() and everything:
        files = list(itertools.islice((file for file in path.rglob("*") if file.is_file()), MOST_FILES + 1))
        if len(files) > MOST_FILES:
            raise BadInput(f"{path}: holds more than {MOST_FILES:,} files; name the folder of the data alone")
        return sorted(files)
    if path.is_dir():
        return sorted(file for pattern in ("*.safetensors", "*.json", "*.jinja", "*/*.jinja") for file in path.glob(pattern))
    return [path] if path.is_file() else []


def read_hash(path):
    try:
        return checkpoint.sha256(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); under torchrun every machine needs it in the same place") from None


def unmoved(optimizers):
    """The share of the trained weights that are bfloat16 and for which w − lr rounds to w. Of a large tensor an even sample of at
    most 65,536 is measured. An optimizer that rounds at random (adamw8bit) leaves none unchanged on average."""
    stuck = total = 0
    for one, group in [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]:
        coarse = not getattr(one, "bf16_stochastic_round", False)
        for p in [p for p in group["params"] if p.requires_grad]:
            w, n = parallel.local(p).detach().flatten(), parallel.numel(p)
            w, total = w[:: n // 2**16 + 1], total + n
            lost = ((w.double() - group["lr"]).to(p.dtype) == w).double().sum() / max(1, len(w))
            stuck += coarse * n * float(lost) * (p.dtype == torch.bfloat16)
    return parallel.sum_over_processes(stuck) / parallel.sum_over_processes(total)


def new_folder(method):
    """runs/<method>-<time>, newly made. A second run in the same second gets ~2, ~3, …"""
    stem = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        for number in itertools.count(1):
            folder = Path(stem if number == 1 else f"{stem}~{number}")
            folder.parent.mkdir(exist_ok=True)
            try:
                folder.mkdir()  # fails if it exists, so two runs never share a folder
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise BadInput(f"{stem}: cannot be written ({error.strerror}); name another --out") from None
