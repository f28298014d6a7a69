"""The two kinds of checks in the tutorials. Both say what it means when they fail.

    always(…)     holds for any setting: a formula, an equality with the project. If it fails, something is wrong.
    this_run(…)   holds for the printed settings: a loss that got below some number. If you changed a setting, a failure is a result
                  to think about. `TINKER=1 python tutorials/…`, or `checks.TINKER = True` in a notebook, prints it and goes on.
"""

import os

TINKER = bool(os.environ.get("TINKER"))


def always(holds, meaning):
    """Raise AssertionError with `meaning` unless `holds`."""
    if not holds:
        raise AssertionError(f"This should hold, and does not: {meaning}")


def this_run(holds, meaning):
    """Like `always`, but only print `meaning` when you are changing things (TINKER)."""
    if not holds and TINKER:
        print("this does not hold:", meaning)
    elif not holds:
        raise AssertionError(f"This should hold, and does not: {meaning} (It holds for the printed settings. If you changed one, set "
                             "TINKER=1 and go on.)")
