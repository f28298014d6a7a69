"""The scorecard names tests that exist, its arithmetic is right, and the pages show what its file says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import scorecard
from tests.scorecard import LINES, Elsewhere, Line, belongs, judge

ROOT = Path(__file__).parent.parent


def test_all_lines_are_there():
    names = [line.name for line in LINES]
    assert names == [f"{kind}{n + 1}" for kind, count in (("C", 11), ("F", 17), ("R", 5), ("L", 8)) for n in range(count)]
    assert all(line.why for line in LINES if isinstance(line, Elsewhere))


@pytest.mark.parametrize("line", [line for line in LINES if isinstance(line, Line)], ids=lambda line: line.name)
def test_every_test_it_names_exists(line):
    for test in [*line.tests.split(), line.quick or line.tests.split()[0]]:
        file, _, function = re.sub(r"\[.*", "", test).partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not function or f"\ndef {function}(" in source, test
        assert "[" not in test or f'"{test.partition("[")[2][:-1]}": (' in source, test


def test_a_line_by_hand():
    line = Line("X", "", 12, "a.py::t b.py", at_most={"seconds": 5})
    found = {"a.py::t[1]": (True, {"tried": 10.0, "seconds": 4.0}), "a.py::t2": (False, {}), "b.py::u": (True, {})}
    assert belongs("a.py::t[1]", "a.py::t") and not belongs("a.py::t2", "a.py::t") and belongs("b.py::u", "b.py")
    assert judge(line, found) == {"passed": True, "tried": 11, "seconds": 4.0}
    assert not judge(line, found | {"b.py::v": (False, {})})["passed"]  # one that failed or was skipped
    assert not judge(line, {"a.py::t": (True, {})})["passed"]  # one that did not run at all
    assert not judge(line, found | {"b.py::w": (True, {"seconds": 6.0})})["passed"]
    assert not judge(line, {"a.py::t": (True, {}), "b.py::u": (True, {})})["passed"]  # the seconds were not recorded
    assert not judge(line, {})["passed"]


def test_the_pages_show_the_file():
    import json

    results = json.loads(scorecard.RESULTS.read_text(encoding="utf-8"))
    page = scorecard.PAGE.read_text(encoding="utf-8")
    assert scorecard.table(results) in page
    assert f"{scorecard.score(results)}." in scorecard.README.read_text(encoding="utf-8")
    assert f"{scorecard.score(results).replace(f' of the [scorecard]({scorecard.LINK})', '')} (" in page


def test_one_quick_test_of_each_line():
    done = subprocess.run([sys.executable, "-m", "tests.scorecard", "--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{sum(isinstance(line, Line) for line in LINES)} lines, one quick test each" in done.stdout


def test_a_line_that_is_not_there_is_named():
    done = subprocess.run([sys.executable, "-m", "tests.scorecard", "--only", "F99"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "F99: no such line" in done.stderr
