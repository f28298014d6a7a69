"""The microscope: what a loss does to each token, as one HTML page that needs no server and no network.

    python -m minialign microscope dpo                                 # trains on the built-in pairs, looks at the policies on the way
    python -m minialign microscope dpo ipo orpo --pairs pairs.jsonl    # several losses on the same rows; flags go to every method
    python -m minialign microscope runs/dpo-…                          # a run that was made with --snapshots

Every token is coloured by −∂L/∂log π(token): blue means that a step on the loss makes the token likelier, orange less likely. A reward
model has no log π; its rows are coloured by −∂L/∂r. The slider goes from the policy before training through the run's snapshots. Each
of them is looked at on the rows of the run's first step (methods that sample draw their own), with the reference of the run.

How it works: one step of the method's own main() runs with the method's own flags. token_logps and score hand what they return to a
watcher, and after the backward pass the gradient of the loss stands on it. So the page shows what the method does, whatever the method.

Checked by tests/test_microscope.py: by finite differences of the loss, and in a browser.
"""

import contextlib
import dataclasses
import html
import importlib
import io
import json
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

from minialign.engine import tracking
from minialign.engine.common import BadInput, read_json, write_atomic
from minialign.engine.run import Run
from minialign.lora import load_model
from minialign.settings import cli
from minialign.tokenizer import load_tokenizer

TEMPLATE = Path(__file__).with_name("microscope.html")
PAGE, LOOKS, STEPS = "runs/microscope.html", 4, 40  # default page; snapshots of a run that is made here, and its steps


class Looked(Exception):
    """Ends a run after its first step: everything has been seen."""


class Watcher:
    """Keeps what token_logps and score return in one step. Calling .rows() afterwards gives the gradient at each token."""

    def __init__(self):
        self.seen, self.loss = [], None  # (model, batch, values) of each call; the loss of the step

    def __call__(self, model, batch, values):
        if values.requires_grad:
            values.retain_grad()
        self.seen.append((model, batch, values))
        return values

    def rows(self):
        """One dict for each row that was trained on: ids (T + 1), and for each of its T predictions mask, logp, push = −∂L/∂log π; the
        reference's and the old policy's log-probs, the advantage, or the reward of the row and its push, where there are such."""
        trained = [(model, batch, values) for model, batch, values in self.seen if values.grad is not None]
        others = {}  # {row: log-probs of another model}: what the loss compares with
        for model, batch, values in self.seen:
            if values.dim() == 2 and not values.requires_grad and all(model is not one for one, _, _ in trained):
                others |= zip(map(str, zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)), values.tolist(), strict=True)
        found, known = [], set()
        for _, batch, values in trained:
            if id(batch) in known:
                continue  # a later epoch on the same rollout
            known.add(id(batch))
            for b in range(len(batch.inputs)):
                inputs, targets, mask = (part[b].tolist() for part in (batch.inputs, batch.targets, batch.mask))
                row = {"ids": [inputs[0], *targets], "mask": mask, "push": (-values.grad[b] * batch.mask[b]).tolist()}
                if values.dim() == 1:
                    row["reward"] = values[b].item()
                else:
                    row["logp"] = values[b].tolist()
                    row["ref"] = batch.ref_logps[b].tolist() if hasattr(batch, "ref_logps") else others.get(str((inputs, targets)))
                    row["old"] = batch.old_logps[b].tolist() if hasattr(batch, "old_logps") else None
                    if getattr(batch, "advantages", None) is not None:
                        row["advantage"] = batch.advantages[b].tolist()
                end = max((t + 1 for t, scored in enumerate(mask) if scored), default=len(mask))  # without the padding
                found.append({key: value[: end + (key == "ids")] if isinstance(value, list) else value for key, value in row.items()})
        return found


def look(method, cfg, snapshot=None, watcher=None):
    """Run the first step of a method with the policy of `snapshot` (a folder; None: as the run began). Returns (rows, loss)."""
    watcher, register = watcher or Watcher(), Run.register

    def with_snapshot(run, **parts):
        register(run, **parts)
        if snapshot is not None:
            model = run.modules["policy" if "policy" in run.modules else "reward_model"]
            model.load_state_dict(load_model(snapshot, dtype=run.weights_dtype, device=run.device)[0].state_dict())

    def end(run, step, metrics):
        watcher.loss = float(metrics["loss"])
        raise Looked

    module = importlib.import_module(f"minialign.methods.{method}")
    # With --precompute_ref the policy computes the reference's log-probs, which it must not do with a snapshot's weights.
    remembered = {"precompute_ref": False} if hasattr(cfg, "precompute_ref") else {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tracking, "watcher", watcher), \
            mock.patch.object(Run, "register", with_snapshot), mock.patch.object(Run, "end_of_step", end):
        with contextlib.suppress(Looked), contextlib.redirect_stdout(io.StringIO()):
            module.main(dataclasses.replace(cfg, snapshots=False, resume="", log="", out=str(Path(folder) / "run"), **remembered))
    return watcher.rows(), watcher.loss


def made(word, argv):
    """(method, Config, run folder) of a run folder that is there, or of a run of the method `word`, made now with snapshots."""
    folder = Path(word) if (Path(word) / "config.json").is_file() else None
    if folder:
        stored = read_json(folder / "config.json")
        method = stored.pop("method")
        cfg = importlib.import_module(f"minialign.methods.{method}").Config(**stored)
    else:
        method = word
        try:
            module = importlib.import_module(f"minialign.methods.{method}")
        except ModuleNotFoundError:
            raise BadInput(f"{word}: is neither a method nor a run folder (`python -m minialign` lists the methods)") from None
        cfg = cli(module.Config, argv, prog=f"python -m minialign microscope {method}", description=module.__doc__)
        if cfg.resume:
            raise BadInput(f"--resume {cfg.resume}: to look at a run, name its folder in the place of the method")
    if cfg.lora:
        raise BadInput(f"{word}: has adapters (--lora), which the microscope cannot exchange; look at a run without")
    if folder:
        return method, cfg, folder
    steps = cfg.steps if any(flag.startswith("--steps") for flag in argv) else STEPS
    out = cfg.out or f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    cfg = dataclasses.replace(cfg, steps=steps, eval_every=-(-steps // LOOKS), snapshots=True, out=out)
    return method, cfg, Path(module.main(cfg))


def pieces(tokenizer, ids):
    """The text of each id, such that together they are the text of all; EOS is ⏎."""
    found, real, before = [], [], ""
    for token in ids:
        if token == tokenizer.eos_id:
            found.append("⏎" if found else "")  # (in the first place it is BOS)
            continue
        real.append(token)
        text = tokenizer.decode(real)
        found.append(text[len(before):] if text.startswith(before) else tokenizer.decode([token]))
        before = text
    return found


def by_prompt(rows):
    """The rows with those of one prompt next to each other, so that a chosen answer stands above the rejected one."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row["ids"][: row["mask"].index(True) + 1] if True in row["mask"] else row["ids"]), []).append(row)
    return [row for group in groups.values() for row in group]


def view(method, folder, cfg, limit):
    """What the page shows of one run: {"method", "looks": [{"step", "loss", "rows"}]}."""
    snapshots = sorted((folder / "snapshots").glob("[0-9]*"))
    if not snapshots:
        raise BadInput(f"{folder}: has no snapshots; make the run with --snapshots, or name its method instead of the folder")
    tokenizer, looks = load_tokenizer(snapshots[0]), []
    for snapshot in [None, *snapshots]:
        rows, loss = look(method, cfg, snapshot)
        shown = by_prompt(rows)[:limit]
        for row in shown:
            row["text"] = pieces(tokenizer, row["ids"])
        looks.append({"step": int(snapshot.name) if snapshot else 0, "loss": loss, "rows": shown})
    return {"method": method, "run": str(folder), "looks": looks}


def write_page(views, page):
    """Write the HTML page, with everything that it shows inside."""
    data = json.dumps(views, ensure_ascii=False).replace("<", "\\u003c")  # so that no text can end the script
    title = html.escape("minialign microscope: " + ", ".join(one["method"] for one in views))
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(page), TEMPLATE.read_text(encoding="utf-8").replace("TITLE", title).replace("DATA", data))


def main(argv):
    """Look at the methods or runs that argv begins with. --page FILE and --rows N are the microscope's, the other flags the methods'."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, flags, own = argv[:first], list(argv[first:]), {"--page": PAGE, "--rows": "8"}
    if not words or "--help" in flags:
        print(__doc__)
        print(f"flags: --page FILE (default {PAGE}), --rows N (rows shown of each method, default 8); all others are the methods'")
        return
    for flag in own:
        if flag in flags:
            i = flags.index(flag)
            if i + 1 == len(flags):
                raise BadInput(f"{flag}: needs a value")
            own[flag] = flags[i + 1]
            del flags[i : i + 2]
    if not re.fullmatch("0*[1-9][0-9]{0,8}", own["--rows"]):
        raise BadInput(f"--rows {own['--rows']}: must be a whole number above 0")
    if len(words) > 1 and "--out" in flags:
        raise BadInput("--out: names one run folder, but several methods are to be looked at; leave it out")
    views = []
    for word in words:
        method, cfg, folder = made(word, flags)
        print(f"looking at {folder} …", flush=True)
        views.append(view(method, folder, cfg, int(own["--rows"])))
    write_page(views, own["--page"])
    print(f"page: {own['--page']}   (open it in a browser)")
