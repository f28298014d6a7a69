"""Runs every toy, one after the other, and prints a scoreboard. The exit code is 1 if any toy fails.

    python -m toy               # ten minutes, five without the storyteller, whose model `python -m minialign stories260K` fetches
    python -m toy --full        # more seeds, more settings, the larger language

Checked by tests/toy/test_scoreboard.py.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minialign.settings import cli, exit_codes
from toy import storyteller

TOYS = ("three_actions", "tiny_language", "few_demos", "grid_world", "frozen_lake", "overoptimization", "theory", "storyteller")


@dataclass
class Config:
    full: bool = False              # more seeds, more settings, the larger language: an hour
    out: str = "runs/toy"           # folder of the figures and the numbers behind them


def run(name, cfg):
    """Run one toy and print its lines as they come. Returns (exit code, last line, seconds)."""
    command = [sys.executable, "-u", "-m", f"toy.{name}", "--out", f"{cfg.out}/{name}.png", *(["--full"] if cfg.full else [])]
    print(f"\n── {name} " + "─" * (118 - len(name)), flush=True)
    begun, last = time.monotonic(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last, time.monotonic() - begun


def main(cfg):
    """Returns True if every toy passed."""
    absent = [] if Path(storyteller.Config.policy).is_dir() else ["storyteller"]
    results = {name: run(name, cfg) for name in TOYS if name not in absent}
    print("\n── scoreboard " + "─" * 108)
    for name, (code, last, seconds) in results.items():
        said = last.split(" in ")[0] if " in " in last and code in (0, 1) else f"exit code {code}"
        print(f"{'FAIL' if code else 'PASS'}  {name:18} {said:44} {seconds:5.0f} s")
    if absent:
        print("      storyteller        skipped: `python -m minialign stories260K` fetches its model (1 MB)")
    passed = sum(code == 0 for code, *_ in results.values())
    print(f"{passed} of {len(results)} toys passed; figures and numbers: {cfg.out}")
    return passed == len(results)


if __name__ == "__main__":
    with exit_codes("toy"):
        sys.exit(0 if main(cli(Config, sys.argv[1:], prog="python -m toy", description=__doc__)) else 1)
