"""What a toy says: a NaN passes nothing, one miss makes the toy fail, a claim never does, and the JSON holds what was printed."""

import json
import math
from dataclasses import dataclass

import pytest

from minialign.engine.common import BadInput
from toy.report import Report


@dataclass
class Config:
    out: str
    seeds: int = 3


def test_checks_are_gated_and_claims_are_not(tmp_path, capsys):
    report = Report(Config(str(tmp_path / "new" / "figure.png")))
    report.check("one third", [1 / 3, 2 / 3], [0.333333, 0.666667], 1e-6, "by hand")
    report.gate("seeds", 3 >= 2, "3/3")
    report.claim("a paper", "it rises", "rise", [1.0, 1.1, 0.9])
    report.claim("a paper", "it falls", "", [-1.0, -1.1, -0.9])
    report.claim("a paper", "it moves", "", [1.0, -1.1, 0.4])
    report.claim("a paper", "it is exact", "1 = 1", holds=True)
    report.claim("a paper", "it is not", "1 ≠ 2", holds=False)
    assert report.close({"curve": [1, 2]})
    content = json.loads((tmp_path / "new" / "figure.json").read_text())
    assert [claim["verdict"] for claim in content["claims"]] == ["holds", "does not hold", "not separable", "holds", "does not hold"]
    assert content["curve"] == [1, 2] and content["config"]["seeds"] == 3 and [c["passed"] for c in content["checks"]] == [True, True]
    out = capsys.readouterr().out
    assert out.count("PASS") == 2 and "FAIL" not in out and "2 of 2 checks passed" in out and "a paper: it rises" in out


@pytest.mark.parametrize("miss", [
    lambda report: report.check("off", 1.0, 1.1, 0.05), lambda report: report.check("NaN", [1.0, math.nan], 1.0, 0.5),
    lambda report: report.gate("seeds", 1 >= 2, "1/3"), lambda report: report.gate("NaN", math.nan > 0, "nan"),
])
def test_one_miss_fails_the_toy(tmp_path, capsys, miss):
    report = Report(Config(str(tmp_path / "figure.png")))
    report.check("on", 1.0, 1.0, 0.0)
    miss(report)
    assert not report.close({})
    assert "FAIL" in capsys.readouterr().out


def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        Report(Config(str(tmp_path / "file" / "figure.png")))
