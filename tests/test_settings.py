"""The command line from a Config, its help, and the exit codes around a main()."""

import dataclasses
import importlib
import re
from dataclasses import dataclass, field

import pytest

from minialign import settings
from minialign.engine.common import BadInput
from tests.conftest import METHODS


@dataclass
class Config:
    beta: float = 0.1               # β: pull to ref
    steps: int = 5                  # how many
    max_prompt: int | None = None   # most tokens
    greedy: bool = False            # likeliest token
    names: list[str] = field(default_factory=lambda: ["a"])  # some names


def parse(*argv):
    return settings.cli(Config, list(argv), prog="prog", description="What it does.")


def test_cli_defaults_and_types():
    assert parse() == Config()
    cfg = parse("--beta", "2", "--max-prompt", "7", "--greedy", "--names", "b", "c", "--steps=9")
    assert cfg == Config(beta=2.0, steps=9, max_prompt=7, greedy=True, names=["b", "c"])
    assert parse("--no-greedy").greedy is False


@pytest.mark.parametrize(("argv", "message"), [
    (["--bta", "0.1"], "unknown flag --bta: did you mean --beta? (`prog --help` lists them)"),
    (["--bet", "0.1"], "did you mean --beta?"),  # no silent abbreviations
    (["--max-promt", "3"], "did you mean --max_prompt?"),
    (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["--beta"], "expected one argument"),
    (["stray"], "unknown argument stray"),
])
def test_cli_errors_are_one_sentence_and_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@dataclass
class Resumable:
    lr: float = 1e-3                # learning rate
    resume: str = ""                # run folder


def test_flags_beside_resume_are_refused_even_at_their_default(capsys):
    assert settings.cli(Resumable, ["--resume", "runs/a"], prog="prog").resume == "runs/a"
    assert settings.cli(Resumable, ["--resume", "runs/a", "--resume=runs/b"], prog="prog").resume == "runs/b"
    with pytest.raises(SystemExit) as stop:
        settings.cli(Resumable, ["--lr", "1e-3", "--resume=runs/a"], prog="prog")
    assert stop.value.code == 2 and "drop --lr (to change flags, start a new run with --policy runs/a/final)" in capsys.readouterr().err


def test_help_shows_every_field_with_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "What it does." in text
    expected = (("--beta", "β: pull to ref", "0.1"), ("--steps", "how many", "5"), ("--greedy", "likeliest token", "False"),
                ("--max_prompt", "most tokens", "None"), ("--names", "some names", "a"))
    for flag, comment, default in expected:
        assert flag in text and f"{comment} (default: {default})" in text


def test_exit_codes(capsys):
    for error, code in ((BadInput("no such thing"), 2), (FloatingPointError("diverged"), 1), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop, settings.exit_codes("prog"):
            raise error
        assert stop.value.code == code
    assert "prog: no such thing\n" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), settings.exit_codes("prog"):  # a bug keeps its traceback
        1 / 0  # noqa: B018


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_a_methods_own_flags_before_the_shared_ones(method, capsys):
    """Own: what the method's file annotates. Shared: everything that it takes unchanged from settings.py."""
    config = importlib.import_module(f"minialign.methods.{method}").Config
    with pytest.raises(SystemExit):
        settings.cli(config, ["--help"], prog="prog")
    own, shared = capsys.readouterr().out.split("flags that other methods have too")
    names = {f.name for f in dataclasses.fields(config)}
    assert set(re.findall(r"^  --(\w+)", own, re.M)) == set(vars(config)["__annotations__"])
    assert set(re.findall(r"^  --(\w+)", shared, re.M)) == names - set(vars(config)["__annotations__"])


def test_a_subclass_keeps_the_comment_that_it_does_not_write_again():
    """schedule has another default in OnPrompts and no comment of its own there; held_out has both."""
    comments = settings.field_comments(settings.OnPrompts)
    assert comments["schedule"] == settings.field_comments(settings.Training)["schedule"]
    assert comments["held_out"] != settings.field_comments(settings.Training)["held_out"]
    assert set(comments) == {f.name for f in dataclasses.fields(settings.OnPrompts)}
