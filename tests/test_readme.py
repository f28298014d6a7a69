"""README: no line of code is wider than its page, and every command in it runs, in a short form, with files that stand for its own."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minialign import __main__ as front_door
from minialign.model import GPT, GPTConfig
from minialign.task import builtin_demos, builtin_pairs, builtin_texts
from minialign.tokenizer import train_bpe
from minialign.weights import save_pretrained
from tests.conftest import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.S)
SHELL = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
COMMANDS = [shlex.split(line)[3:] for line in SHELL if line.startswith("python -m minialign ")]
SHORT = ["--steps", "2", "--batch_size", "8", "--max_new", "8", "--eval_every", "1000", "--save_every", "1000"]  # behind its own flags
NOT_SHORT = ("sample", "stories260K", "demo", "evaluate", "recipes", "generate")


def test_no_line_scrolls_sideways():
    """830 px hold 97 characters of GitHub's code font."""
    for _, text in BLOCKS:
        for line in text.splitlines():
            assert len(line) <= 94, line


def test_other_commands_exist():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z][\w-]+)|`make ([a-z][\w-]+)`", README, re.M)) and all(
        name in targets for pair in re.findall(r"^make ([a-z][\w-]+)|`make ([a-z][\w-]+)`", README, re.M) for name in pair if name)
    for toy in re.findall(r"python -m toy\.(\w+)", README):
        assert (ROOT / f"toy/{toy}.py").exists()
    for script in re.findall(r"python (tutorials/\w+\.py)", README):
        assert (ROOT / script).exists()
    assert len(COMMANDS) >= 9 and {words[0] for words in COMMANDS} <= {*METHODS, *front_door.COMMANDS, "recipes"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random model that reads any text and long rows, as a downloaded one does."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), train_bpe(builtin_texts(50), 300)
    torch.manual_seed(0)
    save_pretrained(GPT(GPTConfig.tiny(tokenizer.vocab_size, n_embd=64, n_head=2, max_len=1024)), folder, tokenizer)
    return folder


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with the files that README's commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(vars(demo)) + "\n" for demo in builtin_demos(8)))
    for name in ("pairs.jsonl", "p.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(vars(pair)) + "\n" for pair in builtin_pairs(40)))
    sums = [{"question": f"what is {i} + {i}", "answer": f"it is #### {2 * i}"} for i in range(8)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (tmp_path / "once.jsonl").write_text(json.dumps({"prompt": "ask for tea: "}) + "\n")
    (tmp_path / "mine.py").write_text("def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] not in ("demo", "stories260K")], ids=" ".join)
def test_every_command_runs(words, somewhere, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(front_door, "ROOT", ROOT)
    words = [str(model_folder) if re.search(r"/final$|pythia-70m$|^runs/stories260K$", word) else word for word in words]
    words = [str(ROOT / word) if word.startswith("toy/") else word for word in words]
    if "--resume" in words:  # a run to resume
        from minialign.methods import dpo

        cfg = dpo.Config(policy=str(model_folder), pairs="pairs.jsonl", steps=3, batch_size=4, eval_every=1, save_every=1,
                         max_len=64, max_new=8, out="stopped")
        dpo.main(cfg)
        words[words.index("--resume") + 1] = "stopped"
    elif words[0] == "microscope":
        words += [*SHORT, "--policy", str(model_folder), "--max_len", "64"]
    elif words[0] == "evaluate":
        words += ["--max_len", "64"]
    elif words[0] not in NOT_SHORT:
        grouped = ["--group_size", "8"] if "--group_size" in words else []
        words += [*SHORT, *grouped, "--device", "cpu", "--held_out", "0"]
    elif words[0] == "sample":
        words += ["--max_new", "8"]
    front_door.main(words)
    assert capsys.readouterr().out


def test_the_python_example_runs(somewhere, model_folder, capsys):
    """As printed, but for the base model, which is trained on first use: a small random one stands for it."""
    [program] = [text for kind, text in BLOCKS if kind == "python"]
    program = program.replace("builtin_base()", repr(str(model_folder))).replace("max_new=40", "max_new=4")
    names = {}
    exec(program, names)
    assert names["loss"].item() == names["loss"].item() and names["answers"].old_logps.shape[0] == 64


@pytest.mark.slow
def test_it_can_be_installed(tmp_path):
    """`pip install -e .`: another folder imports it, and the command `minialign` is there."""
    import shutil

    copy, home = tmp_path / "checkout", tmp_path / "venv"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in files:
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    [site] = home.glob("lib/*/site-packages")
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    command = [home / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "-e", str(copy)]
    install = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution" in install.stderr or "Could not find a version" in install.stderr:
        pytest.skip("pip finds no setuptools: no package index can be reached")
    assert install.returncode == 0, install.stderr
    listed = subprocess.run([home / "bin/minialign"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0 and "irft" in listed.stdout and "01_gpt" in listed.stdout, listed.stderr
    code = "import minialign.methods.dpo, toy.closed_form, tutorials.checks; print(minialign.__file__)"
    found = subprocess.run([home / "bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.strip() == str(copy / "minialign/__init__.py"), found.stderr
