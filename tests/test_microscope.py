"""The microscope: its numbers by finite differences of the method's own loss and by hand; its page in a browser."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import torch

from minialign import __main__ as front_door
from minialign import microscope
from minialign.engine import tracking
from minialign.engine.common import BadInput
from minialign.methods import dpo, sft
from minialign.tokenizer import CharTokenizer
from tests.conftest import LEARNING, METHODS, ONLINE

# Not the online methods, whose ratio is 1 whatever log π is, and not IFT, whose weights are constants made from log π.
DIFFERENTIABLE = [method for method in METHODS if method not in (*ONLINE, "ift")]
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


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_looked_at(small, method):
    changes = {"reward_share": 0.5} if method in LEARNING else {}
    if method == "grpo":  # two groups of eight, whose rewards are not all equal with this seed
        changes = {"batch_size": 16, "seed": 2}
    _, cfg = small(method, steps=2, **changes)
    rows, loss = microscope.look(method, cfg)
    assert loss is not None and any(push for row in rows for push in row["push"])
    assert all(len(row["ids"]) == len(row["mask"]) + 1 == len(row["push"]) + 1 for row in rows)
    assert tracking.watcher is None


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
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


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
