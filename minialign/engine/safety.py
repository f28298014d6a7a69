"""What makes a run folder safe to write and to resume: one process at a time, no links out of it, no leftovers, no code but one's own.
And bounds, in time and memory, on the code of others that a run does call: rewards and chat templates.

Checked by tests/engine/test_safety.py.
"""

import contextlib
import hashlib
import hmac
import os
import platform
import secrets
import signal
import threading
import time
from pathlib import Path

from filelock import FileLock, Timeout

from minialign.engine.common import BadInput, note

LOCK_FILES = (".lock", ".pid")


def claim(folder):
    """Lock a run folder for this process and return the lock. Raises BadInput if another process has it.

    The operating system takes the lock away when the process ends, however it ends, so a killed run leaves none. .pid only says who has it.
    """
    lock, owner = FileLock(folder / ".lock", timeout=0, is_singleton=True), folder / ".pid"
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise BadInput(f"{folder}: process {who} is writing this run; wait until it ends, or stop it") from None
    except NotImplementedError:
        note(f"note: {folder} lies on a file system without locks: see to it that no second process writes this run")
    owner.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
    return lock


def refuse_links(folder):
    """Raise BadInput if anything in the folder is a symbolic link: a resumed run writes and deletes there, and would do it elsewhere."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if os.path.islink(os.path.join(place, name)):
                raise BadInput(f"{os.path.join(place, name)}: is a link, and a resumed run would write where it leads; put a copy there")


def sweep(folder):
    """Delete the temporary files that killed processes left. (Those in checkpoints/ go when the next checkpoint is written.)"""
    for path in Path(folder).rglob("*.tmp-*"):
        if path.is_file():
            path.unlink(missing_ok=True)


PROGRAMMED = ("builtin", "exact_match", "format", "regex", "length", "lexicon")  # rewards that are part of rewards.py


def code_file(spec):
    """The path in --reward FILE.py:FUNCTION, as text; None for another reward. rewards.py runs what this says, and nothing else."""
    is_code = spec.partition(":")[0] not in PROGRAMMED and (".py:" in spec or spec.endswith(".py"))
    return spec.rpartition(":")[0] if is_code else None


def code_files(rewards):
    """The files that the rewards run, but for those of this package."""
    files = [Path(path).resolve() for path in map(code_file, rewards) if path is not None]
    root = Path(__file__).resolve().parents[2]
    return [file for file in files if not {root / "minialign", root / "toy"} & {*file.parents}]


def mark(settings, files):
    """A keyed hash of a run's settings (text) and of the code that they name. None if this user has no place for a key.

    The key lies in the user's cache, so nobody else can make the mark: no run folder from elsewhere can name code that a resume runs.
    """
    key = own_key()
    if key is None:
        return None
    parts = [settings.encode(), *(file.read_bytes() if file.is_file() else b"" for file in files)]
    return hmac.new(key, b"".join(hashlib.sha256(part).digest() for part in parts), "sha256").hexdigest()


def own_key():
    """This user's random key, made at its first use. None if it can neither be read nor written."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minialign" / "key"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_name(f"key.tmp-{os.getpid()}")
            with open(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            with contextlib.suppress(FileExistsError):  # another process made one at the same time: that one stays
                os.link(whole, path)
            whole.unlink()
        return path.read_bytes() or None
    except (OSError, RuntimeError):  # (RuntimeError: no home folder)
        return None


# ------------------------------------------------------------------------------------------------- bounds on the code of others


class Stopped(SystemExit):
    """Raised where a signal ends a run that has saved its state."""


class Overtime(BaseException):  # not an Exception: the called code's own `except Exception` must not catch it
    pass


def has_alarm():
    return hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def time_limit(seconds):
    """Raise Overtime in the block after this many seconds, and again after each further interval until the block ends."""
    if not has_alarm():
        yield
        return
    armed, began = [True], time.monotonic()

    def ring(number, frame):
        if armed:
            raise Overtime

    before = signal.signal(signal.SIGALRM, ring)
    others, every = signal.getitimer(signal.ITIMER_REAL)  # an alarm set by other code: it is set again at the end
    try:
        try:
            seconds = min(seconds, 1e6)
            signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, 0.1))
            yield
        finally:
            armed.clear()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, others - (time.monotonic() - began)), every)


@contextlib.contextmanager
def memory_limit(size):
    """In the block the process may take `size` more bytes; an allocation beyond that raises MemoryError. On Linux only."""
    if not Path("/proc/self/statm").is_file():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = min((bound for bound in before if bound != resource.RLIM_INFINITY), default=now + size)
    resource.setrlimit(resource.RLIMIT_AS, (min(now + size, most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
