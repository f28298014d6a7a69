"""What a toy says: PASS or FAIL of every number that is known exactly, a verdict on every claim that is not, and the JSON behind both.

A check is gated: a toy that misses one exits with 1. A claim never is: a paper's sentence is measured, and holds or does not.

Checked by tests/toy/test_report.py.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from minialign.engine.common import BadInput, commit, write_atomic
from minialign.evaluate import verdict


def make_folder(out):
    """The folder of a figure. Raises BadInput where there can be none."""
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from None


class Report:
    """Of one run of a toy. cfg: its Config, with the figure's path in `out`; the JSON lies beside the figure."""

    def __init__(self, cfg):
        self.cfg, self.started, self.checks, self.claims = cfg, time.monotonic(), [], []
        make_folder(cfg.out)

    def check(self, name, measured, expected, tolerance, note=""):
        """Print PASS if no entry of `measured` is farther than `tolerance` from `expected` (numbers or arrays; a NaN passes nothing)."""
        error = float(np.abs(np.asarray(measured, dtype=float) - np.asarray(expected, dtype=float)).max())
        shown = " ".join(f"{value:.6g}" for value in np.ravel(measured)[:4]) + (" …" if np.size(measured) > 4 else "")
        self._gated(name, bool(error <= tolerance), f"{shown:36} off by {error:.1e} (≤ {tolerance:g})", note)

    def gate(self, name, passed, measured, note=""):
        """The same where what is known is an inequality. measured: the numbers, in words."""
        self._gated(name, bool(passed), measured, note)

    def _gated(self, name, passed, measured, note):
        self.checks.append({"name": name, "passed": passed, "measured": measured})
        print(f"{'PASS' if passed else 'FAIL'}  {name:52} {measured:66} {note}".rstrip(), flush=True)

    def claim(self, source, claim, measured, differences=None, *, holds=None):
        """Print a claim, what was measured (in words) and the verdict: of `differences`, one per seed and above 0 in favour, or, of
        something that is exact, `holds`."""
        assert (differences is None) != (holds is None), "one of the two says what is true"
        if differences is not None:
            mean, half, favour, word = verdict(differences)
            measured = f"{measured}: {mean:+.3g} ± {half:.2g}, {favour}/{len(differences)} seeds" if measured else (
                f"{mean:+.3g} ± {half:.2g}, {favour}/{len(differences)} seeds")
        else:
            word = "holds" if holds else "does not hold"
        self.claims.append({"source": source, "claim": claim, "measured": measured, "verdict": word})
        print(f"      {source}: {claim}\n        {measured}  →  {word}", flush=True)

    def close(self, numbers):
        """Write the JSON, print the last line; returns True if nothing that is gated was missed. numbers: {name: what the figure shows}."""
        passed, path = sum(check["passed"] for check in self.checks), Path(self.cfg.out).with_suffix(".json")
        content = {"config": dataclasses.asdict(self.cfg), "commit": commit(), "checks": self.checks, "claims": self.claims} | numbers
        write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        seconds = time.monotonic() - self.started
        print(f"{passed} of {len(self.checks)} checks passed in {seconds:.0f} s; figure: {self.cfg.out}, numbers: {path}")
        return passed == len(self.checks)
