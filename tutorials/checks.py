"""The checks of the tutorials. Each says what should hold, and a reader sees the sentence if it does not.

    always(…)     holds for any setting: a formula, an equality with the project. If it fails, something is wrong.
    equal(…)      the same for numbers and tensors. Torch adds where they differ, and by how much.
    this_run(…)   holds for the printed settings: a loss that got below some number. If you changed a setting, a failure is a result
                  to think about. `TINKER=1 python tutorials/…`, or `checks.TINKER = True` in a notebook, prints it and goes on.
"""

import os

TINKER = bool(os.environ.get("TINKER"))


def always(holds, meaning):
    """Raise AssertionError with `meaning` unless `holds`."""
    if not holds:
        raise AssertionError(f"This should hold, and does not: {meaning}")


def equal(values, right, msg, **tolerances):
    """Raise AssertionError with `msg` and torch's report unless `values` equals `right`, to torch's tolerances or those given."""
    import torch

    torch.testing.assert_close(values, right, **tolerances, msg=lambda report: f"This should hold, and does not: {msg}\n{report}")


def this_run(holds, meaning):
    """Like `always`, but only print `meaning` when you are changing things (TINKER)."""
    if not holds and TINKER:
        print("this does not hold:", meaning)
    elif not holds:
        raise AssertionError(f"This should hold, and does not: {meaning} (It holds for the printed settings. If you changed one, set "
                             "TINKER=1 and go on.)")
