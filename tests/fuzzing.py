"""Not a test: what tests/test_fuzz.py is made of. Rounds in forked children with limits, random edits of bytes and of JSON, and one rule.

The rule: an input from outside is accepted, or it is refused in one sentence. A round that breaks the rule, hangs, dies or takes more
memory than allowed is a fault. A fault is reported with the family, the seed and the round, so that it can be repeated:

    python -m tests.fuzzing FAMILY SEED ROUND
"""

import contextlib
import copy
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  an optimizer imports it, seconds long: once here, not in every child

from minialign.engine.common import BadInput

SENTENCE = 600  # most characters in a refusal
SECONDS, BYTES = 20, 2**31  # the most that a round may take
FREE = 2**30  # of address space that libraries may reserve without using it


class Fault(Exception):
    """What no input may bring about."""


def sentence(text):
    """Raise Fault if this is not one sentence that a person can read."""
    text = str(text)
    if not text.strip() or "\n" in text or "Traceback" in text:
        raise Fault(f"not one line: {text[:300]!r}")
    if len(text) > SENTENCE:
        raise Fault(f"a sentence of {len(text)} characters: {text[:200]!r} … {text[-80:]!r}")
    return text


def refused_or(read):
    """(outcome, what read() returned). The outcome is 'accepted', or 'refused' if read() raises BadInput with one sentence."""
    try:
        return "accepted", read()
    except BadInput as error:
        said = sentence(error)
        if "MemoryError" in said or "not enough memory" in said:
            return "out of memory", None
        return "refused", None


# ------------------------------------------------------------------------------------------------------ rounds in children


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit_memory(size):
    """This process may take `size` more bytes. On Linux only."""
    if Path("/proc/self/statm").is_file():
        most = address_space() + size + FREE
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def in_children(one, rounds, *, batch=100, seconds=SECONDS, memory=BYTES):
    """{round: its outcome, text that begins with FAULT for a fault}. one(round) -> outcome runs in forks, `batch` rounds in each.

    A fork that says nothing for `seconds` is killed, and the round that it was at is a fault. So is the round in which a fork dies.
    """
    todo, found = [*rounds], {}
    while todo:
        part = todo[:batch]
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            alone(one, part, write, memory)
        os.close(write)
        said, ended = b"", ""
        while not ended:
            if not select.select([read], [], [], seconds)[0]:
                os.kill(pid, signal.SIGKILL)
                ended = f"FAULT: it hangs for more than {seconds} s"
            elif piece := os.read(read, 2**16):
                said += piece
            else:
                ended = "FAULT: the process died"
        os.close(read)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and "hangs" not in ended:
            ended += f" of signal {os.WTERMSIG(status)}"
        lines = [json.loads(line) for line in said.split(b"\n")[:-1]]
        found |= dict(zip(part, lines, strict=False))
        if len(lines) < len(part):
            found[part[len(lines)]] = ended
        todo = [number for number in todo if number not in found]
    return found


def alone(one, part, write, memory):
    """What a child does: never returns."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        limit_memory(memory)
        for number in part:
            try:
                outcome = str(one(number))
            except Fault as error:
                outcome = f"FAULT: {error}"
            except BaseException as error:  # a child must never return into the parent's loop
                where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
                outcome = f"FAULT: {type(error).__name__}: {str(error)[:200]!r} at {' < '.join(where[:-4:-1])}"
            os.write(write, json.dumps(outcome[:1500]).encode() + b"\n")
    finally:
        os._exit(0)


def fuzz(family, seed, rounds, one, **limits):
    """Counter of the outcomes of one(rng, round folder) for so many rounds. Raises AssertionError that names the seed and round of faults.

    rounds: a number, or the numbers of the rounds themselves.
    """
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{family}-") as folder:
        place = Path(folder) / "round"

        def each(number):
            release(place)
            place.mkdir()
            return one(random.Random(f"{family} {seed} {number}"), place)

        found = in_children(each, range(rounds) if isinstance(rounds, int) else rounds, **limits)
        release(place)
    faults = {number: text for number, text in found.items() if text.startswith("FAULT")}
    counts = Counter("fault" if number in faults else text for number, text in found.items())
    print(f"fuzz_{family}: seed {seed}, {len(found)} rounds: " + ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    listed = "\n".join(f"  seed {seed}, round {number}: {text}" for number, text in [*faults.items()][:SHOWN])
    assert not faults, f"fuzz_{family}: {len(faults)} of {len(found)} rounds are faults; the first:\n{listed}"
    return counts


SHOWN = int(os.environ.get("FUZZ_SHOWN", "5"))  # faults that a failing test lists


def release(place):
    """Delete a folder whatever its rights are."""
    if place.exists():
        for inside, folders, _ in os.walk(place):
            for name in folders:
                with contextlib.suppress(OSError):
                    os.chmod(os.path.join(inside, name), 0o700)
        shutil.rmtree(place, ignore_errors=True)


# -------------------------------------------------------------------------------------------------------------- random edits


def edited_bytes(rng, content):
    """One to four random edits of bytes: flip a bit, delete, insert, repeat, cut, exchange."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(content) + 1)
        j = min(len(content), i + rng.randint(1, 30))
        match rng.randrange(7):
            case 0 | 1 if i < len(content):
                content[i] ^= 1 << rng.randrange(8)
            case 2:
                del content[i:j]
            case 3:
                content[i:i] = rng.randbytes(rng.randint(1, 20))
            case 4:
                content[i:i] = content[i:j]
            case 5:
                content[i:j] = rng.choice([b"\0", b"\xff", b"\x80"]) * (j - i)
            case 6 if rng.random() < 0.5:
                del content[i:]
    return bytes(content)


ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1.5, 2.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), 2**31 - 1, 2**31,
       2**32, 2**40, 2**63, 2**64, -(2**63), 10**30, "", " ", "a", "1", "-1", "null", "nan", "é", "\ud800", "\0", "x" * 300, "x" * 10_000,
       "../..",
       "/", [], [None], [0], [1, 2], [-1], ["a"], [[]], [{}], {}, {"a": 1}, {"": None}, {"content": "a"}, {"type": "a"}, [1] * 5000]


def odd(rng):
    return copy.deepcopy(rng.choice(ODD))


def places(node, path=()):
    """The paths of all nodes of a JSON value, the root left out."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def edited_json(rng, whole, values=odd, most=2, among=lambda path: True):
    """(a copy of a JSON value with one to `most` nodes exchanged, removed, copied elsewhere or renamed; the top keys of these nodes)."""
    whole, touched = copy.deepcopy(whole), []
    for _ in range(rng.randint(1, most)):
        found = [path for path in places(whole) if among(path)]
        if not found:
            break
        depth = rng.choice(sorted({len(path) for path in found}))  # a long list of equal things must not take all the edits
        path = rng.choice([path for path in found if len(path) == depth])
        parent, key = at(whole, path[:-1]), path[-1]
        match rng.choice(["exchange"] * 5 + ["remove", "copy", "rename", "nudge"]):
            case "exchange":
                parent[key] = values(rng)
            case "remove":
                del parent[key]
            case "copy":
                parent[key] = copy.deepcopy(at(whole, rng.choice([*places(whole)])))
            case "rename" if isinstance(parent, dict):
                parent[str(values(rng))[:400]] = parent.pop(key)
            case "nudge" if isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
                old = parent[key]
                parent[key] = rng.choice([old + 1, old - 1, -old, old * 2, old / 2, str(old)])
        touched.append(path[0])
    return whole, touched


def write_json(path, value):
    """As JSON, with NaN and Infinity as Python writes and reads them."""
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    from tests import test_fuzz

    torch.set_num_threads(1)
    SHOWN = 10**6
    getattr(test_fuzz, f"fuzz_{sys.argv[1]}")(int(sys.argv[2]), [int(sys.argv[3])])
