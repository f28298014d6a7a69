"""A run folder is written by one process, leads nowhere else, and runs no code of others; what the machine refuses is one sentence.

Each is tried as it happens: two processes, a downloaded run folder, a limit on the size of files, a closed pipe.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from minialign import lora
from minialign.__main__ import main as front_door
from minialign.engine import checkpoint, common, run, safety
from minialign.engine.common import BadInput
from tests.killing import result_of

ROOT = Path(__file__).parents[2]
CLAIM = "import sys, time, pathlib; from minialign.engine.safety import claim; lock = claim(pathlib.Path(sys.argv[1])); "
HOLD = CLAIM + "print('has it', flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The key of the marks lies in a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def again(module, folder, **settings):
    return module.main(module.Config(resume=str(folder), **settings))


# ------------------------------------------------------------------------------------------------------------ one process


def test_a_second_process_is_refused_with_the_first_ones_number(small, tmp_path):
    """While another process holds the folder, neither --resume nor --out takes it. After kill -9 it is free: nothing stale is left."""
    module, cfg = small("sft")
    folder = module.main(cfg)
    before = result_of(folder)
    (tmp_path / "new").mkdir()
    new = small("sft", out=str(tmp_path / "new"))[1]
    for place, start in ((folder, lambda: again(module, folder)), (tmp_path / "new", lambda: module.main(new))):
        run_of_this_process_is_gone(place)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        other = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True, env=environment)
        assert other.stdout.readline() == "has it\n"
        with pytest.raises(BadInput, match=rf"process {other.pid} on .* is writing this run; wait until it ends, or stop it"):
            start()
        other.send_signal(signal.SIGKILL)
        other.wait()
        start()
    assert result_of(folder) == before


def run_of_this_process_is_gone(folder):
    """A test runs in one process what users run in several: the lock of a Run that ended goes with it."""
    import gc

    gc.collect()
    with contextlib.suppress(BadInput):
        lock = safety.claim(folder)
        while lock.is_locked:
            lock.release()


def test_a_lock_is_kept_until_the_process_ends(small):
    module, cfg = small("sft", steps=1)
    folder = module.main(cfg)
    lock = safety.claim(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", CLAIM, str(folder)], capture_output=True, text=True, env=environment)
    assert other.returncode == 1 and f"process {os.getpid()} on " in other.stderr
    while lock.is_locked:
        lock.release()


# -------------------------------------------------------------------------------------------------- links, leftovers, records


@pytest.mark.parametrize("name", ["final", "checkpoints", "metrics.jsonl", "checkpoints/step_000077", ".pid", ".lock"])
def test_a_link_in_a_run_folder_is_refused(small, tmp_path, name):
    """As in a downloaded folder: resuming would overwrite or delete files elsewhere."""
    module, cfg = small("sft")
    folder = module.main(cfg)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("mine")
    if (folder / name).exists():
        (shutil.rmtree if (folder / name).is_dir() else os.unlink)(folder / name)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(BadInput, match=f"{name}: is a link"):
        again(module, folder)
    assert [path.name for path in elsewhere.iterdir()] == ["model.safetensors"] and (elsewhere / "model.safetensors").read_text() == "mine"


def test_a_run_folder_that_is_reached_by_a_link_is_fine(small, tmp_path):
    module, cfg = small("sft")
    folder = module.main(cfg)
    before = result_of(folder)
    (tmp_path / "newest").symlink_to(folder)
    assert result_of(again(module, tmp_path / "newest")) == before


def test_what_killed_processes_left_half_written_is_swept(small, tmp_path):
    """Killed while env.json was first written: --out takes the folder. Killed in an export: --resume sweeps it."""
    module, cfg = small("sft", steps=2, out=str(tmp_path / "o"))
    (tmp_path / "o").mkdir()
    (tmp_path / "o/env.json.tmp-1").touch()
    folder = module.main(cfg)
    (folder / "final/model.safetensors.tmp-7").touch()
    (folder / "config.json.tmp-7").touch()
    again(module, folder)
    assert not list(folder.rglob("*.tmp-*"))
    (tmp_path / "p").mkdir()
    (tmp_path / "p/mine.txt.tmp-1").touch()
    with pytest.raises(BadInput, match="exists and is not empty"):
        module.main(small("sft", out=str(tmp_path / "p"))[1])


def test_no_intact_checkpoint_is_an_error_and_deletes_nothing(small):
    module, cfg = small("sft", save_every=2)
    folder = module.main(cfg)
    for path in (folder / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    names, rows = sorted(path.name for path in folder.rglob("*")), (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(BadInput, match="checkpoints: no checkpoint is intact; restore one, or delete the folder"):
        again(module, folder)
    assert sorted(path.name for path in folder.rglob("*")) == names and (folder / "metrics.jsonl").read_bytes() == rows


def test_a_half_written_first_checkpoint_is_none(small, tmp_path):
    """Killed while it wrote its first checkpoint: the temporary folder's name ends with the process number. The run begins again."""
    module, cfg = small("sft", save_every=2)
    expected = result_of(module.main(cfg))
    module, cfg = small("sft", save_every=2)
    program = """if True:
        import json, os, sys
        from minialign.engine import checkpoint
        from minialign.methods import sft
        checkpoint._finish = lambda *_: os._exit(9)
        sft.main(sft.Config(**json.loads(sys.argv[1])))"""
    killed = subprocess.run([sys.executable, "-c", program, json.dumps(vars(cfg))], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert [path.name[:15] for path in (Path(cfg.out) / "checkpoints").iterdir()] == ["step_000002.tmp"]
    assert result_of(again(module, Path(cfg.out))) == expected


def test_a_log_that_was_cut_is_named(small, capsys):
    module, cfg = small("sft")
    folder = module.main(cfg)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[2:]))
    again(module, folder)
    assert "metrics.jsonl lacks 2 of 6 steps: it was cut or replaced" in capsys.readouterr().err


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.jsonl"])
def test_every_beginning_of_a_log_can_be_resumed(small, log):
    """A full disk cuts the file at any byte, also inside a character."""
    module, cfg = small("sft", steps=2, eval_every=2)
    folder = module.main(cfg)
    row = {"step": 2, "loss": None, "prompt": "café ⟦", "completion": "", "finished": True}
    whole = (folder / log).read_bytes() + (json.dumps(row, ensure_ascii=False) + "\n").encode()
    for end in range(len(whole)):
        (folder / log).write_bytes(whole[:end])
        assert all(isinstance(row["step"], int) for row in common.read_rows(folder / log, "step")), end
    (folder / log).write_bytes(whole[:-20])
    again(module, folder)


# ----------------------------------------------------------------------------------------------------------- inputs and code


@pytest.mark.parametrize("kind", ["template", "rounds", "config"])
def test_every_input_of_a_run_is_recorded(small, tmp_path, kind):
    """What was not hashed before: the policy's chat_template.jinja, a round's numbers, config.json before the first checkpoint."""
    policy = tmp_path / "policy"
    module, cfg = small("irft", steps=6, rounds=2, precompute_ref=True, save_every=2)
    shutil.copytree(cfg.policy, policy)
    (policy / "chat_template.jinja").write_text("{{ messages }}")
    cfg.policy = str(policy)
    folder = module.main(cfg)
    if kind == "config":
        shutil.rmtree(folder / "checkpoints")
        (folder / "config.json").write_text((folder / "config.json").read_text().replace('"lr": 0.003', '"lr": 0.3'))
    elif kind == "template":
        (policy / "chat_template.jinja").write_text("{{ messages }} ")
    else:
        shutil.rmtree(folder / "checkpoints/step_000006")
        file = folder / "rounds/000001/000004.json"
        file.write_text(file.read_text().replace("-", "-1", 1))
    with pytest.raises(BadInput, match="was edited since this run began" if kind == "config" else "has changed since this run"):
        again(module, folder)


@pytest.mark.parametrize(("method", "flag", "changes"), [("rebel", "mu", {}), ("slic", "demos", {}), ("ppo", "text", {"ptx": 0.1})])
def test_rows_of_a_second_data_folder_are_recorded(small, demos_file, tmp_path, method, flag, changes):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(demos_file, folder / "train.jsonl")
    module, cfg = small(method, steps=2, save_every=1, **{flag: str(folder)}, **changes)
    run_folder = module.main(cfg)
    shutil.rmtree(run_folder / "checkpoints/step_000002")
    rows = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(rows.replace("a", "e", 1) if "a" in rows else rows[1:])
    with pytest.raises(BadInput, match="data: has changed since this run began"):
        again(module, run_folder)


def test_an_input_that_is_not_there_is_said_so(small, tmp_path, monkeypatch):
    module, cfg = small("sft")
    shutil.copy(cfg.demos, tmp_path / "d.jsonl")
    monkeypatch.chdir(tmp_path)
    cfg.demos = "d.jsonl"
    folder = Path(module.main(cfg)).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=f"d.jsonl: is not there any more; .* from the folder {tmp_path / 'elsewhere'}"):
        again(module, folder)


EVIL = """import pathlib
pathlib.Path({trace!r}).touch()


def f(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.mark.parametrize("where", ["in the folder", "elsewhere"])
def test_a_resume_runs_no_code_that_a_folder_from_elsewhere_names(small, tmp_path, monkeypatch, where):
    """The run is begun by somebody else (another key), and arrives with its code. Named again on the command line, it is trusted."""
    trace, module = tmp_path / "ran", None
    module, cfg = small("rloo", steps=2, save_every=1, group_size=4)
    code = (Path(cfg.out) if where == "in the folder" else tmp_path) / "evil.py"
    (tmp_path / "evil.py").write_text(EVIL.format(trace=str(trace)))
    cfg.reward = [f"{tmp_path / 'evil.py'}:f"]
    folder = module.main(cfg)
    if where == "in the folder":  # config.json edited to name a file that came with the folder, hashes and all
        shutil.copy(tmp_path / "evil.py", code)
        text = (folder / "config.json").read_text().replace(str(tmp_path / "evil.py"), str(code))
        (folder / "config.json").write_text(text)
        env = json.loads((folder / "env.json").read_text())
        env["config"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / "env.json").write_text(json.dumps(env))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other user"))
    trace.unlink()
    said = f"its reward is code, {code.resolve()}, and it cannot be shown that you began this run with it"
    with pytest.raises(BadInput, match=re.escape(said)):
        again(module, folder)
    assert not trace.exists()
    if where == "elsewhere":
        again(module, folder, reward=cfg.reward)
        assert trace.exists()


def test_ones_own_code_is_resumed_without_a_word(small, tmp_path, monkeypatch):
    """The same user, the same file. A changed file has to be named again; without a place for a key any code has to."""
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    module, cfg = small("rloo", steps=2, group_size=4, reward=[f"{tmp_path / 'mine.py'}:f"])
    folder = module.main(cfg)
    again(module, folder)
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [0.0 for c in completions]\n")
    with pytest.raises(BadInput, match="name it again: --reward"):
        again(module, folder)
    again(module, folder, reward=cfg.reward)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert safety.own_key() is None
    module, cfg = small("rloo", steps=2, group_size=4, reward=cfg.reward)
    folder = module.main(cfg)
    for claimed in (None, ""):  # what a folder from elsewhere may say
        env = json.loads((folder / "env.json").read_text()) | {"mark": claimed}
        (folder / "env.json").write_text(json.dumps(env))
        with pytest.raises(BadInput, match="name it again: --reward"):
            again(module, folder)


def test_the_key_is_made_once_and_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = safety.own_key()
    assert len(key) == 32 and safety.own_key() == key
    assert [(path.name, path.stat().st_mode & 0o777) for path in (tmp_path / "minialign").iterdir()] == [("key", 0o600)]


def test_code_of_this_package_needs_no_mark():
    assert safety.code_files([f"{ROOT}/toy/heroes.py:hero", "length:9", "builtin", "runs/rm/final"]) == []
    assert safety.code_files([f"{ROOT}/runs/downloaded/evil.py:f"]) == [ROOT.resolve() / "runs/downloaded/evil.py"]
    assert safety.code_files(["/x/evil.py:f", "regex:a.py:b"]) == [Path("/x/evil.py").resolve()]


def test_the_check_and_the_reward_read_a_name_alike(tmp_path, monkeypatch):
    """What is checked is what is run: names that look like a folder, or like a file of this package."""
    from minialign.rewards import open_reward

    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL.format(trace=str(tmp_path / "ran")).replace("def f", "def f_"))
    (tmp_path / "evil.py:f_").mkdir()
    for spec in ("evil.py:f_", f"{tmp_path}/evil.py:g/../../../toy/heroes.py", "./evil.py:f_"):
        assert safety.code_files([spec]) == [(tmp_path / "evil.py").resolve()], spec
    open_reward(["evil.py:f_"])
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------- what the machine refuses


def in_a_fork(words, before=lambda: None):
    """(exit code, stderr) of the front door in a fork, after before()."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 0
        with open(os.devnull, "w") as null, os.fdopen(write, "w") as err, contextlib.redirect_stdout(null), contextlib.redirect_stderr(err):
            try:
                before()
                front_door(words)
            except SystemExit as error:
                code = error.code or 0
            except BaseException as error:
                print(f"Traceback: {error!r}", file=err)
                code = 99
            sys.stdout.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said


def words_of(method, cfg, **changes):
    settings = {**vars(cfg), **changes}
    keep = ("policy", "demos", "steps", "batch_size", "dtype", "device", "eval_every", "save_every", "lr", "out", "max_len", "max_new")
    return [method, *[word for name in keep if name in settings for word in (f"--{name}", str(settings[name]))]]


@pytest.mark.parametrize("size", [0, 100, 600, 3000, 20_000, 70_000,
                                  *[pytest.param(size, marks=pytest.mark.long) for size in range(1000, 90_000, 2000)]])
def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(small, monkeypatch, size):
    """No file may be longer than so many bytes: every write beyond it fails, of records, logs, checkpoints and exports alike. With room
    again the run ends as one that had it throughout."""
    monkeypatch.setattr(common, "RETRY_SECONDS", ())
    module, cfg = small("sft", save_every=1)
    whole = result_of(module.main(cfg))
    _, cfg = small("sft", save_every=1)
    code, said = in_a_fork(words_of("sft", cfg), lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    last = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said and last.startswith("minialign sft: "), said
    folder = Path(cfg.out)
    if (folder / "config.json").is_file():
        assert result_of(again(module, folder)) == whole
    else:
        assert result_of(module.main(cfg)) == whole


WRITES = (common.os, "fsync"), (common.os, "replace"), (common, "open"), (checkpoint, "save_file"), (checkpoint, "flush_to_disk"), (
    lora, "save_file"), (huggingface_hub, "save_torch_state_dict")  # what a run writes with


@pytest.mark.parametrize("every", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)])
def test_one_failing_write_does_not_end_a_run(small, monkeypatch, capsys, record_property, every):
    """The k-th call of all that writes fails once (EIO, as a network disk may answer), after it has written or before. One warning, and the
    run is the unbroken one. Every ninth k, or each."""
    calls, at = 0, None

    def stumbling(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            if function is not open or not set("wax").isdisjoint(args[1] if len(args) > 1 else "r"):
                calls += 1
                if calls == at:
                    if calls % 2 and function is not os.replace:  # (a rename has happened or not)
                        function(*args, **kwargs)
                    raise OSError(errno.EIO, "Input/output error")
            return function(*args, **kwargs)

        return wrapper

    module, cfg = small("sft", lora=2)
    whole = result_of(module.main(cfg))
    monkeypatch.setattr(common, "RETRY_SECONDS", (0, 0, 0))
    for where, name in WRITES:
        monkeypatch.setattr(where, name, stumbling(getattr(where, name, open)), raising=False)
    _, cfg = small("sft", lora=2)
    module.main(cfg)
    total = calls
    assert total > 40
    tried = [*range(max(1, every // 2), total + 1, every)]
    for at in tried:
        calls = 0
        _, cfg = small("sft", lora=2)
        capsys.readouterr()
        assert result_of(module.main(cfg)) == whole, at
        assert capsys.readouterr().err.count("Input/output error); try 2 in 0 s") == 1, at
    record_property("tried", len(tried))


def test_a_failing_write_of_each_kind_says_how_to_go_on(small, monkeypatch):
    """OSError out of every function that writes, once training has begun."""
    for name in ("append_row", "save_pretrained", "write_atomic"):
        _, cfg = small("sft", steps=3)

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device", "/disk/file")

        def before(name=name, full=full):
            begin = run.Run.steps

            def steps(self, total):
                setattr(run, name, full)
                return begin(self, total)

            run.Run.steps = steps
            if name == "write_atomic":
                run.Run.log = lambda self, step, **metrics: run.write_atomic("x", "y")

        code, said = in_a_fork(words_of("sft", cfg), before)
        assert code == 2 and said.endswith(f"minialign sft: /disk/file: No space left on device; continue with: python -m minialign sft "
                                           f"--resume {cfg.out}\n"), said


@pytest.mark.parametrize(("at", "rows"), [(2, 8), *[pytest.param(at, rows, marks=pytest.mark.long) for at in (1, 3, 4)
                                                   for rows in (4, 16, 32)]])
def test_too_little_memory_names_the_flag_that_helps(small, at, rows):
    """The allocator's error in a step. The run goes on with half the micro-batch; its numbers are those of the whole one to rounding."""
    module, cfg = small("sft", save_every=1, batch_size=rows)
    whole = [row["loss"] for row in common.read_rows(module.main(cfg) / "metrics.jsonl")]
    _, cfg = small("sft", save_every=1, batch_size=rows)

    def before():
        def full(self, step, metrics):
            if step == at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            original(self, step, metrics)

        original, run.Run.end_of_step = run.Run.end_of_step, full

    code, said = in_a_fork(words_of("sft", cfg), before)
    assert code == 2 and said.endswith(
        "there is not enough memory (CUDA out of memory. Tried to allocate 20.00 GiB); passes of half as many rows need less; "
        f"continue with: python -m minialign sft --resume {cfg.out} --micro_batch {rows // 2}\n"), said
    code, said = in_a_fork(["sft", "--resume", cfg.out, "--micro_batch", str(rows // 2)])
    assert code == 0, said
    assert [row["loss"] for row in common.read_rows(Path(cfg.out) / "metrics.jsonl")] == pytest.approx(whole, abs=1e-10)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_closed_pipe_is_not_reported_as_success(small):
    """`minialign sft … | head -2`: the run stops, says so, and goes on when resumed."""
    module, cfg = small("sft", log_every=1)
    whole = result_of(module.main(cfg))
    _, cfg = small("sft", log_every=1)
    command = " ".join(map(str, [sys.executable, "-m", "minialign", *words_of("sft", cfg), "--log_every 1"]))
    done = subprocess.run(["bash", "-c", f"{command} | head -2; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "nobody reads the output any more, so the run stops; continue with: " in done.stderr, done.stderr
    assert result_of(again(module, cfg.out)) == whole


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding_of_the_output_will_do(small, tmp_path, encoding):
    """As on Windows, or with LC_ALL=C, into a file: the run ends, and what the encoding lacks is written as a number."""
    _, cfg = small("sft", steps=2, out=str(tmp_path / os.fsdecode(b"caf\xe9")))  # a name that is not UTF-8

    def before():
        sys.stdout = open(tmp_path / "log.txt", "w", encoding=encoding)

    code, said = in_a_fork(words_of("sft", cfg), before)
    printed = (tmp_path / "log.txt").read_bytes()
    assert code == 0 and b"step 2/2" in printed, said
    assert (b"\\u27e6" if encoding != "utf-8" else "⟦".encode()) in printed and b"\\udce9" in printed


def test_an_empty_name_after_resume_is_refused(capsys):
    for words in (["--resume", ""], ["--resume="]):
        with pytest.raises(SystemExit) as stop:
            front_door(["sft", *words])
        assert stop.value.code == 2 and "--resume: expected the folder of a run" in capsys.readouterr().err


def test_a_device_or_a_link_is_written_to_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    common.write_atomic(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    common.write_atomic("/dev/null", "text")
    assert not Path("/dev/null").is_file()
    with pytest.raises(BadInput, match="is a folder, expected the name of a file"):
        common.write_atomic(tmp_path, "text")


# ------------------------------------------------------------------------------------------------------- bounds on others' code

EITHER = "(longer than|MemoryError)"
BOMBS = {  # a template, and what its error names
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than"),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "longer than"),
    "doubling by ~": ("{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", EITHER),
    "doubling by +": ("{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}", EITHER),
    "a wide format": ("{{ '%2000000000d' % 1 }}", "MemoryError"),
    "ljust": ("{{ 'a'.ljust(3000000000) }}", "MemoryError"),
    "join": ("{{ range(99999) | map('string') | list | join('x' * 100000) }}", EITHER),
}


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the bound on memory is for Linux")
@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_all_time_or_memory_is_refused(policy_folder, monkeypatch, name):
    """In seconds, with the process as it was: its own limits are back, and the next conversation renders."""
    from minialign import tokenizer as module
    from minialign.tokenizer import load_tokenizer, render_chat

    template, said = BOMBS[name]
    monkeypatch.setattr(module, "TEMPLATE_SECONDS", 1)
    tokenizer = load_tokenizer(policy_folder)
    messages, before = [{"role": "user", "content": "tea"}], resource.getrlimit(resource.RLIMIT_AS)
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=f"the chat template failed.*{said}"):
        render_chat(tokenizer, messages)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render_chat(tokenizer, messages) == "tea" and resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.ones(2**20).sum() == 2**20


def test_a_gzip_bomb_is_refused_and_text_is_not(tmp_path):
    import gzip

    from minialign.data import read_demonstrations

    rows = b"".join(b'{"prompt": "p%d", "completion": "c"}\n' % i for i in range(20_000))
    (tmp_path / "good.jsonl.gz").write_bytes(gzip.compress(rows))
    assert len(read_demonstrations(tmp_path / "good.jsonl.gz")) == 20_000
    for content in (b"\0" * 2**26, b"\n" * 2**26, b"{}\n" * 2**25):
        (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(content, 1))
        with pytest.raises(BadInput, match="bomb.jsonl.gz: the gzip archive holds more than 100 times its own size"):
            read_demonstrations(tmp_path / "bomb.jsonl.gz", skip_bad=True)


@pytest.mark.parametrize("layers", [0, -1, 10_000, 10**6, 2**31])
def test_a_number_of_layers_that_no_model_has_is_refused_at_once(policy_folder, tmp_path, layers):
    from minialign.weights import load_pretrained

    shutil.copytree(policy_folder, tmp_path / "policy")
    config = json.loads((tmp_path / "policy/config.json").read_text())
    (tmp_path / "policy/config.json").write_text(json.dumps(config | {"n_layer": layers, "num_hidden_layers": layers}))
    with pytest.raises(BadInput, match=f"config.json: {layers} layers: expected 1 to 1000"):
        load_pretrained(tmp_path / "policy")


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63) - 1, 10**30])
def test_a_seed_that_no_generator_takes_is_refused(small, seed):
    module, cfg = small("sft", seed=seed)
    with pytest.raises(BadInput, match=f"--seed {seed}: must be a whole number of at most 63 bits"):
        module.main(cfg)


def test_exports_and_checkpoints_can_be_read_by_others(small):
    """The rights of the files are those of a file that this process makes itself."""
    module, cfg = small("dpo", lora=2)
    before = os.umask(0o022)
    try:
        folder = module.main(cfg)
    finally:
        os.umask(before)
    rights = {path.relative_to(folder): oct(path.stat().st_mode & 0o777) for path in folder.rglob("*.safetensors")}
    assert set(rights.values()) == {"0o644"} and {path.parts[0] for path in rights} == {"final", "adapter", "checkpoints"}, rights


PANICS = {  # pieces of a tokenizer.json with which `tokenizers` panics: by pyo3 that is a BaseException
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "pre_tokenizer": {"type": "FixedLength", "length": 0},
    "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                       "single": [{"SpecialToken": {"id": "no", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
}


@pytest.mark.parametrize("part", PANICS)
def test_a_tokenizer_that_panics_is_one_sentence(policy_folder, tmp_path, part):
    from minialign.tokenizer import load_tokenizer

    shutil.copytree(policy_folder, tmp_path / "policy")
    file = tmp_path / "policy/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: PANICS[part]}))
    with pytest.raises(BadInput, match="tokenizer"):
        load_tokenizer(tmp_path / "policy").encode("ask for tea: ")
