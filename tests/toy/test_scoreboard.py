"""`python -m toy` counts what its toys say; the picture of the front page shows every method's dots where its numbers put them."""

import json
from pathlib import Path

import numpy as np
import pytest

from minialign.engine.common import BadInput
from toy import __main__ as scoreboard
from toy import plot, tiny_language

ROOT = Path(__file__).parent.parent.parent


def test_every_toy_is_on_the_scoreboard():
    runnable = {path.stem for path in (ROOT / "toy").glob("[!_]*.py") if "return report.close(" in path.read_text(encoding="utf-8")
                or "on their law in" in path.read_text(encoding="utf-8") or "orderings in" in path.read_text(encoding="utf-8")}
    assert runnable - {"report"} == {*scoreboard.TOYS}


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize(("code", "word"), [(0, "PASS"), (1, "FAIL"), (2, "FAIL")])
def test_one_toy_that_fails_fails_the_board(monkeypatch, tmp_path, capsys, code, word, fetched):
    """Without the storyteller's model its toy is skipped, which is said and fails nothing."""
    monkeypatch.chdir(tmp_path)
    if fetched:
        (tmp_path / "runs" / "stories260K").mkdir(parents=True)
    codes = {name: 0 for name in scoreboard.TOYS} | {"theory": code}
    monkeypatch.setattr(scoreboard, "run", lambda name, cfg: (codes[name], "3 of 4 checks passed in 5 s; figure: x", 5.0))
    assert scoreboard.main(scoreboard.Config()) is (code == 0)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if "  theory" in line).startswith(word)
    assert lines[-1].startswith(f"{6 + fetched + (code == 0)} of {7 + fetched}")
    assert any("skipped: `python -m minialign stories260K`" in line for line in lines) is not fetched


@pytest.mark.slow
def test_a_toy_is_run_and_its_last_line_kept(tmp_path, capfd):
    code, last, _ = scoreboard.run("grid_world", scoreboard.Config(out=str(tmp_path)))
    assert code == 0 and last.startswith("15 of 15 checks passed") and (tmp_path / "grid_world.json").exists()
    assert "policy iteration" in capfd.readouterr().out


def numbers():
    return [json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8")) for name in ("three_actions", "tiny_language")]


def test_the_picture_has_dots_of_every_method(tmp_path, capsys):
    """From the committed numbers: every method that has a law is there, and lies on the diagonal; before training it did not."""
    n = plot.main(plot.Config(numbers=str(ROOT / "docs"), out=str(tmp_path / "laws.png")))
    assert (tmp_path / "laws.png").stat().st_size > 30_000 and f"{n} dots of 21 methods" in capsys.readouterr().out
    for method, (law, learned, started) in plot.dots(*numbers()).items():
        trained = np.isfinite(started)
        assert np.abs(law - learned)[~trained].max(initial=0) < 0.02, method  # (two of its rows are sampled, the others are exact)
        if trained.any():
            assert np.abs(law - learned)[trained].mean() < 0.3 * np.abs(law - started)[trained].mean(), method


def test_numbers_become_dots():
    three = {"laws": {"DPO": {"law": [[0.25, 0.75]], "learned": [[0.3, 0.7]]}, "the same": {"law": [[1.0]], "learned": [[0.0]]}}}
    tiny = {"laws": {"DPO, online": {"method": "dpo", "dots": [[0.5, 0.1, 0.2]]}}}
    found = plot.dots(three, tiny)
    assert found["DPO"].tolist()[:2] == [[0.25, 0.75, 0.1], [0.3, 0.7, 0.2]] and found["DPO"][2, 2] == 0.5
    assert [method for method, rows in found.items() if len(rows)] == ["DPO"]


def test_a_missing_method_or_file_is_one_sentence(tmp_path):
    with pytest.raises(BadInput, match="make figures"):
        plot.main(plot.Config(numbers=str(tmp_path), out=str(tmp_path / "laws.png")))
    (tmp_path / "three_actions.json").write_text((ROOT / "docs/three_actions.json").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "tiny_language.json").write_text(json.dumps({"laws": {}}))
    with pytest.raises(BadInput, match="no row of IFT, REINFORCE"):
        plot.main(plot.Config(numbers=str(tmp_path), out=str(tmp_path / "laws.png")))


def test_dots_of_a_law_by_hand():
    """Five completions, one of them impossible: of ranks 1 to 4 three that are even in their log, 1, 2 and 4."""
    law = np.array([[0.1, 0.4, 0.0, 0.2, 0.3]])
    assert tiny_language.dots(law + 1, law, law + 2, n=3) == [[1.4, 0.4, 2.4], [1.3, 0.3, 2.3], [1.1, 0.1, 2.1]]
