"""`python -m minialign`: what a stranger types first, and what happens when it is mistyped."""

import dataclasses
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minialign import __main__ as front_door
from minialign.engine.opening import train_builtin_base
from minialign.settings import field_comments
from tests.conftest import LOOPS, METHODS

ROOT = Path(__file__).parent.parent


def call(*argv, capsys):
    """(exit code, stdout, stderr) of the front door, in this process."""
    try:
        front_door.main(list(argv))
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_lists_everything(capsys):
    code, out, _ = call(capsys=capsys)
    assert code == 0
    names = [path.stem for folder in ("minialign/methods", "toy") for path in (ROOT / folder).glob("[!_]*.py")]
    names += [path.stem for path in (ROOT / "tutorials").glob("[0-9]*.py")]
    for name in {*names, *front_door.COMMANDS} - {"closed_form", "heroes", "report"}:
        assert f"  {name} " in out, name


@pytest.mark.parametrize("command", [*METHODS, "sample", "evaluate", "plot", "show", "demo"])
def test_help_shows_every_field_with_its_comment_and_default(command, capsys):
    own = {"sample": front_door.SampleConfig, "plot": front_door.PlotConfig, "show": front_door.ShowConfig}
    config = own.get(command)
    if config is None:
        config = importlib.import_module(f"minialign.methods.{command}" if command in METHODS else f"minialign.{command}").Config
    code, out, _ = call(command, "--help", capsys=capsys)
    text = " ".join(out.split())
    comments = field_comments(config)
    for field in dataclasses.fields(config):
        assert f"--{field.name}" in text and comments[field.name], field.name
        assert " ".join(comments[field.name].split()) in text, field.name
        if field.default is not dataclasses.MISSING:
            assert f"(default: {field.default!r})" in text
    assert code == 0


def test_ctrl_c_while_torch_is_imported_is_no_traceback():
    program = """if True:
        import importlib.abc, runpy, sys
        class Interrupting(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        runpy.run_module("minialign", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_mistyped_flag_and_command(capsys):
    code, _, err = call("irft", "--bta", "0.1", capsys=capsys)
    assert code == 2 and "did you mean --beta?" in err and err.count("\n") == 1
    code, _, err = call("irtf", capsys=capsys)
    assert code == 2 and "unknown command irtf: did you mean irft?" in err


def test_bad_input_is_one_sentence_and_code_2_in_a_real_process(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"question": "c"}\n')
    command = [sys.executable, "-m", "minialign", "sft", "--policy", "new", "--demos", str(bad), "--out", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{bad}:2: found the keys ['question'], expected prompt + completion" in result.stderr


def test_sample(policy_folder, capsys):
    argv = ["sample", "--policy", str(policy_folder), "--prompt", "ask for tea: ", "ask for soap: ", "--n", "2", "--max_new", "5"]
    argv += ["--dtype", "float64"]
    code, out, _ = call(*argv, capsys=capsys)
    assert code == 0 and out.count("ask for tea: ⟦") == 2 and out.count("ask for soap: ⟦") == 2 and "log π -" in out
    assert call(*argv, capsys=capsys)[1] == out  # the same seed says the same
    code, _, err = call("sample", "--policy", str(policy_folder), "--prompt", "TEA", capsys=capsys)
    assert code == 2 and "the vocabulary lacks ['A', 'E', 'T']" in err


def test_plot_and_show(small, capsys):
    module, cfg = small("irft")
    folder = str(module.main(cfg))
    capsys.readouterr()
    code, out, _ = call("plot", folder, capsys=capsys)
    assert code == 0 and (Path(folder) / "figures" / "metrics.png").stat().st_size > 10_000
    code, out, _ = call("show", folder, "--last", "2", capsys=capsys)
    assert code == 0 and out.count("⟦") == 2 and "── step 6" in out
    for command in ("plot", "show"):
        code, _, err = call(command, str(Path(folder) / "final"), capsys=capsys)
        assert code == 2 and "is it a run folder" in err


def test_a_run_without_metrics_is_not_plotted(tmp_path, capsys):
    """Every step was skipped because the reward failed: rows of step, skipped and seconds alone. Speed and memory are not drawn either."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "skipped": 1, "seconds": 0.1}\n{"step": 2, "skipped": 2, "seconds": 0.2, '
                                            '"tokens_per_second": 9.0, "mfu": 0.4, "memory": 0.5}\n')
    code, _, err = call("plot", str(tmp_path), capsys=capsys)
    assert code == 2 and "all of its steps were skipped, so there is no metric to plot" in err and err.count("\n") == 1


def test_a_reward_model_writes_nothing(small, capsys):
    module, cfg = small("reward_model")
    folder = module.main(cfg)
    capsys.readouterr()
    code, _, err = call("sample", "--policy", str(folder / "final"), capsys=capsys)
    assert code == 2 and "is a reward model" in err


@pytest.fixture(scope="session")
def builtin_base(tmp_path_factory):
    """runs/builtin-base, trained as the first run of a stranger does it."""
    folder = tmp_path_factory.mktemp("base") / "runs" / "builtin-base"
    train_builtin_base(folder)
    return folder


@pytest.mark.parametrize("method", [pytest.param(method, marks=pytest.mark.slow if method in LOOPS else pytest.mark.long)
                                    for method in METHODS])
def test_every_method_runs_with_no_flags(method, builtin_base, tmp_path):
    """On the built-in task, from the front door, in a folder that has the base model: run, export. SFT trains the base model first. Methods
    whose loop another one has take four steps only."""
    if method != "sft":
        shutil.copytree(builtin_base, tmp_path / "runs" / "builtin-base")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}  # cores are shared with other tests
    command = [sys.executable, "-m", "minialign", method, *([] if method in LOOPS else ["--steps", "4"])]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "done in" in result.stdout and len(list((tmp_path / "runs").glob(f"{method}-*/final/model.safetensors"))) == 1
