"""The report of a toy: PASS or FAIL for every number that is known exactly, a verdict for every claim that is not, and a JSON of both.

A check is gated: a toy that misses one exits with code 1. A claim (mostly of a paper) is measured and gets a verdict, without a gate.

Checked by tests/toy/test_report.py.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from minialign.engine.common import commit, figure_path, write_atomic
from minialign.evaluate import verdict


class Report:
    """The report of one run of a toy. cfg: its Config; cfg.out is the path of the figure, and the JSON is written next to it."""

    def __init__(self, cfg):
        self.cfg, self.started, self.checks, self.claims = cfg, time.monotonic(), [], []
        figure_path("--out", cfg.out)

    def check(self, name, measured, expected, tolerance, note=""):
        """Print PASS if no entry of `measured` is farther than `tolerance` from `expected` (numbers or arrays). A NaN fails."""
        error = float(np.abs(np.asarray(measured, dtype=float) - np.asarray(expected, dtype=float)).max())
        shown = " ".join(f"{value:.6g}" for value in np.ravel(measured)[:4]) + (" …" if np.size(measured) > 4 else "")
        self._gated(name, bool(error <= tolerance), f"{shown:36} off by {error:.1e} (≤ {tolerance:g})", note)

    def gate(self, name, passed, measured, note=""):
        """Print PASS or FAIL for a condition that was tested already, such as an inequality. measured: the numbers, as text."""
        self._gated(name, bool(passed), measured, note)

    def _gated(self, name, passed, measured, note):
        self.checks.append({"name": name, "passed": passed, "measured": measured})
        print(f"{'PASS' if passed else 'FAIL'}  {name:52} {measured:66} {note}".rstrip(), flush=True)

    def claim(self, source, claim, measured, differences=None, *, holds=None):
        """Print a claim, what was measured (as text) and the verdict. The verdict comes from `differences` (one per seed, above 0 in
        favour of the claim) or, for something exact, from `holds`."""
        assert (differences is None) != (holds is None), "give either differences or holds"
        if differences is not None:
            mean, half, favour, word = verdict(differences)
            measured = f"{measured}: {mean:+.3g} ± {half:.2g}, {favour}/{len(differences)} seeds" if measured else (
                f"{mean:+.3g} ± {half:.2g}, {favour}/{len(differences)} seeds")
        else:
            word = "holds" if holds else "does not hold"
        self.claims.append({"source": source, "claim": claim, "measured": measured, "verdict": word})
        print(f"      {source}: {claim}\n        {measured}  →  {word}", flush=True)

    def close(self, numbers):
        """Write the JSON and print the last line. Returns True if every check passed. numbers: {name: what the figure shows}."""
        passed, path = sum(check["passed"] for check in self.checks), Path(self.cfg.out).with_suffix(".json")
        content = {"config": dataclasses.asdict(self.cfg), "commit": commit(), "checks": self.checks, "claims": self.claims} | numbers
        write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        seconds = time.monotonic() - self.started
        print(f"{passed} of {len(self.checks)} checks passed in {seconds:.0f} s; figure: {self.cfg.out}, numbers: {path}")
        return passed == len(self.checks)
