"""The microscope: its numbers by finite differences of the method's own loss and by hand; its page in a browser."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from minialign import __main__ as front_door
from minialign import microscope
from minialign.engine import tracking
from minialign.engine.common import BadInput
from minialign.methods import dpo, sft
from minialign.tokenizer import CharTokenizer, load_tokenizer
from tests.conftest import LEARNING, METHODS, ONLINE, PREFERRING

# Not the online methods, whose ratio is 1 whatever log π is, and not IFT, whose weights are constants made from log π.
DIFFERENTIABLE = [method for method in METHODS if method not in (*ONLINE, "ift")]
ROOT = Path(__file__).parent.parent
QUICK = ("sft", "dpo", "kto", "reward_model")


class Nudged(microscope.Watcher):
    """Adds `size` to one number of the first call with a gradient."""

    def __init__(self, place, size):
        super().__init__()
        self.place, self.size, self.done = place, size, False

    def __call__(self, model, batch, values):
        if values.requires_grad and not self.done:
            nudge = torch.zeros_like(values)
            nudge[self.place] = self.size
            values, self.done = values + nudge, True
        return super().__call__(model, batch, values)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in DIFFERENTIABLE])
def test_a_push_is_the_slope_of_the_loss(small, method):
    """(L(+ε) − L(−ε)) / 2ε for three numbers that the method was given, in float64."""
    _, cfg = small(method, steps=2, **({"reward_share": 0.5} if method in LEARNING else {}))
    plain = microscope.Watcher()
    rows, loss = microscope.look(method, cfg, watcher=plain)
    assert rows and loss == pytest.approx(loss)
    _, batch, values = next(entry for entry in plain.seen if entry[2].grad is not None)
    grad, size = values.grad, 1e-5
    places = [(b,) for b in range(3)] if grad.dim() == 1 else batch.mask.nonzero()[[0, 3, -1]].tolist()
    for place in map(tuple, places):
        up, down = (microscope.look(method, cfg, watcher=Nudged(place, sign * size))[1] for sign in (1, -1))
        assert (up - down) / (2 * size) == pytest.approx(grad[place].item(), rel=1e-5, abs=1e-9), place
    first = {str(row["ids"]): row for row in rows}[str([batch.inputs[0, 0].item(), *batch.targets[0].tolist()][: len(rows[0]["ids"])])]
    scored = [t for t, counts in enumerate(first["mask"]) if counts]
    expected = -grad[0] if grad.dim() == 1 else -grad[0][scored[-1]]
    assert first["push"][scored[-1]] == pytest.approx(expected.item())


@pytest.mark.parametrize("method", ["rloo", pytest.param("reinforce", marks=pytest.mark.slow)])
def test_the_push_of_an_online_method_is_its_advantage(small, method):
    """−∂L/∂log π(token) = A / B for each token of a completion, on the first update of a rollout."""
    _, cfg = small(method, steps=2)
    rows, _ = microscope.look(method, cfg)
    assert len(rows) > 3 and any(row["advantage"] for row in rows)
    for row in rows:
        for push, counts in zip(row["push"], row["mask"], strict=True):
            assert push == pytest.approx(row["advantage"] / cfg.batch_size * counts, abs=1e-12)
        assert row["old"] == pytest.approx(row["logp"]) and row["ref"] == pytest.approx(row["logp"])


def of_row(row, name):
    """The sum over the scored tokens of a row."""
    return sum(value for value, counts in zip(row[name], row["mask"], strict=True) if counts)


def moved(row):
    """log π/ref of the completion, in nats."""
    return of_row(row, "logp") - of_row(row, "ref")


def length(row):
    return sum(row["mask"])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def of_pairs(weights):
    """weights(chosen, rejected, cfg) -> those of the two rows. In a batch the chosen rows come first, then the rejected ones."""
    def both(rows, cfg, seen):
        half = len(rows) // 2
        found = [weights(chosen, rejected, cfg) for chosen, rejected in zip(rows[:half], rows[half:], strict=True)]
        return [chosen for chosen, _ in found] + [rejected for _, rejected in found]
    return both


def opposite(weight):
    """Of pairs whose rejected answer gets the negative of what the chosen one gets: weight(chosen's Δ − rejected's, cfg)."""
    return of_pairs(lambda chosen, rejected, cfg: (w := weight(moved(chosen) - moved(rejected), cfg), -w))


def ift_weights(rows, cfg, seen):
    found = []
    for row in rows:
        scored = [t for t, counts in enumerate(row["mask"]) if counts]
        sums = {t: sum(-cfg.decay ** (later - t) * row["logp"][later] for later in scored if later >= t) for t in scored}
        found.append([sums.get(t, 0) / sum(sums.values()) for t in range(len(row["mask"]))])  # w_t / n: the w have mean 1
    return found


def slic_weights(chosen, rejected, cfg):
    short = of_row(chosen, "logp") - of_row(rejected, "logp") < cfg.delta
    return short + cfg.weight, -short


def simpo_weights(chosen, rejected, cfg):
    gap = of_row(chosen, "logp") / length(chosen) - of_row(rejected, "logp") / length(rejected)
    w = cfg.scale * sigmoid(cfg.target_margin - cfg.scale * gap)
    return w / length(chosen), -w / length(rejected)


def orpo_weights(chosen, rejected, cfg):
    likely, other = (math.exp(of_row(row, "logp") / length(row)) for row in (chosen, rejected))
    odds, other_odds = likely / (1 - likely), other / (1 - other)
    w = cfg.weight * other_odds / (odds + other_odds)  # α σ(−log odds ratio)
    return (1 + w / (1 - likely)) / length(chosen), -w / (1 - other) / length(rejected)


def kto_weights(rows, cfg, seen):
    (_, _, logps), (_, _, ref_logps) = seen[:2]  # of the answers to other prompts
    z = max(0, (logps - ref_logps).sum(1).mean().item())
    signs = [1 if tuple(row["ids"][1:-1]) in seen.liked else -1 for row in rows]
    return [sign * cfg.beta * sigmoid(cfg.beta * (moved(row) - z)) * sigmoid(cfg.beta * (z - moved(row)))
            for sign, row in zip(signs, rows, strict=True)]


# The last column of the second table in docs/METHODS.md, computed by hand from what the page shows: the weight of ∇ log π(token) for all
# scored tokens of a row or for each of them. Of reward_model, rft and irl (reward steps) it is the weight of ∇r.
COEFFICIENTS = {
    "sft": lambda rows, cfg, seen: [len(rows) / sum(map(length, rows))] * len(rows),
    "ift": ift_weights,
    "best_of_n": lambda rows, cfg, seen: [1] * len(rows),
    "rest": lambda rows, cfg, seen: [1] * len(rows),
    "irft": opposite(lambda gap, cfg: cfg.beta * sigmoid(-cfg.beta * gap)),
    "dpo": opposite(lambda gap, cfg: cfg.beta * sigmoid(-cfg.beta * gap)),
    "gpo": opposite(lambda gap, cfg: cfg.beta * sigmoid(-cfg.beta * gap)),
    "ipo": opposite(lambda gap, cfg: 1 / cfg.beta - 2 * gap),
    "slic": of_pairs(slic_weights),
    "simpo": of_pairs(simpo_weights),
    "orpo": of_pairs(orpo_weights),
    "kto": kto_weights,
    "reward_model": of_pairs(lambda chosen, rejected, cfg: (w := sigmoid(rejected["reward"] - chosen["reward"]), -w)),
    "rft": of_pairs(lambda demo, own, cfg: (1 / cfg.beta, -1 / cfg.beta)),
    "irl": of_pairs(lambda demo, own, cfg: (1 / cfg.beta, -1 / cfg.beta)),
    "reinforce": lambda rows, cfg, seen: [row["advantage"] for row in rows],
    "rloo": lambda rows, cfg, seen: [row["advantage"] for row in rows],
    "grpo": lambda rows, cfg, seen: [[(row["advantage"] + cfg.beta * math.expm1(ref - logp)) / length(row)
                                      for logp, ref in zip(row["logp"], row["ref"], strict=True)] for row in rows],
    "ppo": lambda rows, cfg, seen: [[a * len(rows) / sum(map(length, rows)) for a in row["advantage"]] for row in rows],
    "rebel": lambda rows, cfg, seen: [2 / cfg.eta * (own - seen.rewards[i ^ 1]) for i, own in enumerate(seen.rewards)],
}
PAIRED = (*PREFERRING, "irft", "reward_model", *LEARNING, "rebel")  # an example is two rows


class Seen(list):
    """What a watcher saw, with what the page does not show: the rewards of a rollout (REBEL's), the answers that somebody liked (KTO's)."""


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
def test_the_coefficients_are_those_of_the_table(small, method, pairs_file, tmp_path):
    """What a step multiplies ∇ log π(token) with, away from the reference, is what docs/METHODS.md says; and each method stands there."""
    changes = {"grpo": {"batch_size": 16}, "irl": {"mode": "linear"}}.get(method, {})
    changes |= {"reward_share": 0.5, "beta": 0.7, "reward_lr": 0.03} if method in LEARNING else {}
    if method == "kto":  # each answer stands there once, so that its label can be looked up
        pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()]
        both = {(pair["prompt"], pair[side]): side == "chosen" for pair in pairs for side in ("chosen", "rejected")}
        answers = [{"prompt": prompt, "completion": answer, "label": label} for (prompt, answer), label in both.items()]
        changes["feedback"] = str(tmp_path / "feedback.jsonl")
        Path(changes["feedback"]).write_text("".join(json.dumps(row) + "\n" for row in answers))
    module, cfg = small(method, steps=2, snapshots=True, eval_every=1, lr=0.03, seed=2, **changes)
    watcher = microscope.Watcher()
    rows, _ = microscope.look(method, cfg, module.main(cfg) / "snapshots/000002", watcher)
    trained = [(batch, values) for _, batch, values in watcher.seen if values.grad is not None]
    seen = Seen(watcher.seen)
    if method == "rebel":
        seen.rewards = trained[0][0].rewards.tolist()
    if method == "kto":
        tokenizer = load_tokenizer(cfg.policy)
        seen.liked = {(*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["completion"])) for row in answers if row["label"]}
    weights = COEFFICIENTS[method](rows, cfg, seen)
    examples = len(rows) / (2 if method in PAIRED else 1)
    for row, weight in zip(rows, weights, strict=True):
        each = weight if isinstance(weight, list) else [weight] * len(row["mask"])
        expected = [w * counts / examples for w, counts in zip(each, row["mask"], strict=True)]
        assert row["push"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert len(row["ids"]) == len(row["mask"]) + 1 == len(row["push"]) + 1
    assert any(push for row in rows for push in row["push"]) and tracking.watcher is None
    assert f"| [{method}](../minialign/methods/{method}.py) | " in (ROOT / "docs/METHODS.md").read_text().split("## What a step does")[1]


def test_micro_batches_and_remembered_references_change_nothing(small, tmp_path):
    """The same pushes in passes of 3 rows, and with --precompute_ref, for which the policy stands in for the reference before step 1."""
    _, cfg = small("dpo", steps=2, snapshots=True, eval_every=1, lr=0.1)
    snapshot = dpo.main(cfg) / "snapshots/000002"

    def pushes(**changes):
        rows, _ = microscope.look("dpo", dataclasses.replace(cfg, **changes), snapshot)
        assert len(rows) == 2 * cfg.batch_size  # also where one pair's chosen answer is another's rejected one
        return sorted((row["ids"], round(sum(row["push"]), 9), row["push"], row["ref"], row["logp"]) for row in rows)

    plain = pushes()
    assert any(abs(logp - ref) > 0.01 for row in plain for logp, ref in zip(row[4], row[3], strict=True))
    for changes in ({"micro_batch": 3}, {"precompute_ref": True}):
        for mine, theirs in zip(plain, pushes(**changes), strict=True):
            for part, other in zip(mine, theirs, strict=True):
                assert part == pytest.approx(other, rel=1e-9, abs=1e-12), changes


def test_texts_are_cut_at_tokens():
    tokenizer = CharTokenizer("abc")
    assert microscope.pieces(tokenizer, [0, 1, 2, 3, 0]) == ["", "a", "b", "c", "⏎"]


def test_what_cannot_be_looked_at_is_named(small, tmp_path):
    for argv, sentence in ((["nothing"], "nothing: is neither a method nor a run folder"), (["dpo", "--rows", "0"], "--rows 0: must be"),
                           (["dpo", "ipo", "--out", "x"], "--out: names one run folder"), (["dpo", "--page"], "--page: needs a value"),
                           (["dpo", "--lora", "4"], r"dpo: has adapters \(--lora\)"), (["dpo", "--resume", "x"], "--resume x: to look")):
        with pytest.raises(BadInput, match=sentence):
            microscope.main(argv)
    _, cfg = small("dpo", steps=2)
    run = dpo.main(cfg)
    with pytest.raises(BadInput, match="has no snapshots; make the run with --snapshots"):
        microscope.main([str(run)])


@pytest.fixture(scope="module")
def page(tmp_path_factory, policy_folder, pairs_file, demos_file):
    """A page of two methods on the same pairs, and one of a run folder."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        front_door.main(["microscope", "dpo", "ipo", "--pairs", str(pairs_file), "--policy", str(policy_folder), "--steps", "4",
                         "--batch_size", "4", "--dtype", "float64", "--max_len", "64", "--max_new", "8", "--page", "page.html",
                         "--rows", "6"])
        run = sft.main(sft.Config(policy=str(policy_folder), demos=str(demos_file), steps=2, batch_size=4, eval_every=1, snapshots=True,
                                  dtype="float64", max_len=64, max_new=8, out="run"))
        front_door.main(["microscope", str(run), "--page", "run.html"])
    return folder


def told(file):
    return json.loads(re.search(r"const views = (.*);\n", file.read_text(encoding="utf-8"))[1])


def test_the_page_holds_everything(page):
    views = told(page / "page.html")
    assert [view["method"] for view in views] == ["dpo", "ipo"] and [look["step"] for look in views[0]["looks"]] == [0, 1, 2, 3, 4]
    for first, second in zip(views[0]["looks"], views[1]["looks"], strict=True):
        assert [row["ids"] for row in first["rows"]] == [row["ids"] for row in second["rows"]] and len(first["rows"]) == 6
    before, after = views[0]["looks"][0]["rows"], views[0]["looks"][-1]["rows"]
    assert all(max(map(abs, row["push"])) == pytest.approx(0.1 * 0.5 / 4) for row in before)  # β/2 of each pair, a mean over four
    assert all(row["ref"] == pytest.approx(row["logp"]) for row in before)
    assert not all(row["ref"] == pytest.approx(row["logp"]) for row in after)
    text = (page / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=|https?://|@import|url\(", text), "the page needs no network"
    [view] = told(page / "run.html")
    assert [look["step"] for look in view["looks"]] == [0, 1, 2] and view["looks"][0]["loss"] > view["looks"][2]["loss"]


def rendered(file, hash=""):
    """The page's DOM after its script ran in a headless browser."""
    browser = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    if browser is None:
        pytest.skip("no chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom", f"file://{file}{hash}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600).stdout


@pytest.mark.slow
def test_a_browser_draws_it(page):
    """Rows, colours and the slider; what it draws is what the page holds."""
    views = told(page / "page.html")
    for at, step in ((0, "before training"), (3, "after step 3")):
        dom = rendered(page / "page.html", f"#{at}")
        assert f">{step}</output>" in dom
        tokens = re.findall(r'<span class="token" tabindex="0" aria-label="[^"]*push ([^"]*)" style="background: rgba\(var\(--(\w+)\)', dom)
        pushes = [push for view in views for row in view["looks"][at]["rows"] for push, counts in zip(row["push"], row["mask"], strict=True)
                  if counts]
        assert len(tokens) == len(pushes)
        assert sorted(way for _, way in tokens) == sorted("up" if push > 0 else "down" for push in pushes)
        assert dom.count("<section>") == len({"".join(row["text"][: row["mask"].index(True) + 1]) for row in views[0]["looks"][at]["rows"]})
        assert dom.count("<b>dpo</b>") == dom.count("<b>ipo</b>") == 6
