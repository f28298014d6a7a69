"""The tutorials: each runs as a script, keeps the form of a lesson, has the notebook and the exercise of its source; checkpoints grade."""

import ast
import contextlib
import io
import json
import linecache
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minialign import stories260K
from tests.test_stories260K import PUBLISHED
from tutorials.make_exercises import exercise, my_functions, with_blanks

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))
LESSONS = TUTORIALS[1:]  # 00 explains the course and teaches no method
every = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def source(path):
    return path.read_text(encoding="utf-8")


def cells_of(path):
    """[(first line, is it markdown?, text)] of a tutorial."""
    found, start = [], 1
    for part in re.split(r"(?m)^(?=# %%)", source(path)):
        if part:
            found.append((start, part.startswith("# %% [markdown]"), part))
        start += part.count("\n")
    return found


def with_stories(text, folder):
    """Put the published model where tutorial 11 looks for it, or skip."""
    if "stories260K" in text:
        if not PUBLISHED.is_dir():
            pytest.skip("the published files (../shared/data/stories260K) are not part of the project")
        files = [str(PUBLISHED / name) for name in ("stories260K.bin", "tok512.bin")]
        stories260K.main(stories260K.Config(*files, str(folder / "runs" / "stories260K")))


@every_lesson
def test_form(path):
    """The parts of a lesson, in order; half an hour of prose; code that a notebook page does not cut."""
    text = source(path)
    assert re.match(rf"# %% \[markdown\]\n# # {path.stem.split('_')[0]} · ", text)
    place = -1
    for piece in ("**You will build**", "**Time:**", "**You need:**", "## The question", "# ## What you now know", "# ## Exercises",
                  "# ## Answers"):
        assert text.find(piece) > place, f"{piece!r} is missing or out of order"
        place = text.find(piece)
    for piece in ("Checkpoint", "Break it", "# watch:", "## What is wrong here? (1)", "## What is wrong here? (2)", "from minialign",
                  "always(", "def my_"):
        assert piece in text, piece
    assert text.count("<details><summary>Puzzle ") == 2 and text.count("<details><summary>Exercise ") >= 3
    words = sum(len(re.sub(r"(?m)^# ?", "", part).split()) - 2 for _, markdown, part in cells_of(path) if markdown)
    assert words <= 2200, f"{words} words of prose are more than half an hour"
    minutes = int(re.search(r"\*\*Time:\*\* (\d+) minutes of reading", text)[1])  # at 110 words or 40 lines of code a minute
    code = sum(bool(line.strip()) and not line.startswith("#") for line in text.splitlines())
    assert minutes <= 30 and abs(minutes - words / 110 - code / 40) < 2, (words, code)
    for page in ("README.md", "tutorials/README.md"):
        row = re.search(rf"^\| .*notebooks/{path.stem}\.ipynb.*$", (ROOT / page).read_text(encoding="utf-8"), re.M)[0]
        assert f"| {minutes} |" in row, (page, row)
    assert "import matplotlib" not in text and "plt." not in text, "plot code belongs into tutorials/figures"
    assert text.count("figures.") + text.count("from tutorials.figures") >= 1


@every
def test_code_fits_the_page_and_checks_say_what_they_mean(path):
    for start, markdown, part in cells_of(path):
        if not markdown:
            for i, line in enumerate(part.splitlines()):
                assert len(line) <= 100 or line.startswith("# minialign runs from"), f"line {start + i} is cut off in a notebook"
    for node in ast.walk(ast.parse(source(path))):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"line {node.lineno}: an assertion without a sentence; use always or this_run"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("always", "this_run"):
            assert len(node.args) == 2, f"line {node.lineno}: a check needs a sentence that says what it means when it fails"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "equal":
            starred = any(isinstance(arg, ast.Starred) for arg in node.args)
            assert len(node.args) + starred == 3 or any(word.arg == "msg" for word in node.keywords), f"line {node.lineno}: no sentence"


@every_lesson
def test_a_watched_name_is_bound_on_its_line(path):
    tree, text = ast.parse(source(path)), source(path).splitlines()
    bound = {}  # {last line of a statement: names that it binds}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
            lines = range(node.lineno, (node.body[0].lineno if isinstance(node, ast.For) else node.end_lineno + 1))
            for line in lines:
                bound.setdefault(line, set()).update(names)
    for number, line in enumerate(text, 1):
        if found := re.search(r"# watch: ([\w, ]+?) ?[(:]", line):
            for name in found.group(1).split(","):
                assert name.strip() in bound.get(number, ()), f"line {number}: {name.strip()} does not exist after it"


@every
def test_links_lead_somewhere(path):
    """Links are relative to tutorials/notebooks, where they are read; words link to the glossary."""
    anchors = set(re.findall(r'<a id="([\w-]+)">', (ROOT / "tutorials/GLOSSARY.md").read_text(encoding="utf-8")))
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", source(path))):
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / "tutorials/notebooks" / file).exists(), target
        assert not (file.endswith("GLOSSARY.md") and anchor) or anchor in anchors, target


@every
def test_its_notebook_is_built_from_it(path):
    """tutorials/notebooks holds the executed notebook of the current source (`make notebooks` rebuilds it)."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with jupytext (requirements-dev.txt)")
    file = path.parent / "notebooks" / f"{path.stem}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert sources == [part.split("\n", 1)[1].strip("\n") for _, markdown, part in cells_of(path) if not markdown], "make notebooks"
    assert file.stat().st_size < 1_000_000
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert pictures and all(out.metadata.get("image/png", {}).get("alt") for out in pictures), "a figure without an alt text"


# ----------------------------------------------------------------------------------------------------------------- exercises


@every_lesson
def test_the_exercise_has_blanks_and_keeps_the_rest(path):
    text = source(path)
    names, blank = my_functions(text), exercise(text)
    blanked, bodies = with_blanks(text)
    ast.parse(blank)
    assert names and blank.count("raise NotImplementedError(") == len(names) == len(bodies)
    assert 'tags=["solution"]' not in blank and "What stood in the blanks" in blank
    for name, (_, _, indent) in names.items():  # put what stood there back: the tutorial
        body = "\n".join((" " * indent + line).rstrip() for line in bodies[name].splitlines())
        hole = " " * indent + f'raise NotImplementedError("write {name}, then run the checkpoint below")'
        assert blanked.count(hole) == 1
        blanked = blanked.replace(hole, body)
    assert blanked.rstrip() == text.rstrip()


def wrong(value):
    """Something like `value` that is not it."""
    import numpy as np
    import torch

    if isinstance(value, (tuple, list)):
        changed = [wrong(part) for part in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    if isinstance(value, dict):
        return {key: wrong(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return wrong(torch.from_numpy(value)).numpy()
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bool:
            return ~value
        return value * 0.5 + 0.3 if value.dtype.is_floating_point else (value + 1) % (int(value.max()) + 1)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value[::-1] + "?"
    return value * 0.5 + 0.3 if isinstance(value, float) else value + 1 if isinstance(value, int) else value


def in_a_fork(work):
    """The exception with which work() ends in a process of its own, as "name: text", or ''."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        ending = ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                work()
        except BaseException as error:
            ending = f"{type(error).__name__}: {error}"
        os.write(write, ending.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        ending = pipe.read()
    os.waitpid(pid, 0)
    return ending


def other_bodies(node, part, names):
    """(a blank, a wrong one) of a my_ function, as source or as a function; of a Triton kernel the wrong one stores other numbers."""
    name, right = node.name, names[node.name]
    cell = part.split("\n", 1)[1]
    blank = with_blanks(cell, [name])[0]
    if node.decorator_list:
        wanted = ast.get_source_segment(cell, node)
        return blank, cell.replace(wanted, re.sub(r"tl\.store\(([^,]+), ", r"tl.store(\1, 1 + ", wanted))
    returns = any(isinstance(part, ast.Return) and part.value for part in ast.walk(node))
    return blank, (lambda *args, **settings: wrong(right(*args, **settings))) if returns else (lambda *args, **settings: None)


def grade(path):
    """Run the cells of a tutorial in order. Returns {my_ function: (what a blank ends with, what a wrong answer ends with)}: after each
    definition a fork runs the next four cells with another function in its place, up to the first that complains."""
    code = [(part, compile("\n" * (start - 1) + part, str(path), "exec")) for start, markdown, part in cells_of(path) if not markdown]
    names, grades = sys.modules["__main__"].__dict__, {}
    names["__file__"] = str(path)
    for i, (part, program) in enumerate(code):
        exec(program, names)
        for node in ast.parse(part.split("\n", 1)[1]).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("my_"):
                continue

            def following(other, name=node.name, i=i):
                if isinstance(other, str):
                    file = f"{name}.py"
                    linecache.cache[file] = (len(other), None, other.splitlines(True), file)  # Triton reads the source of its kernels
                    exec(compile(other, file, "exec"), names)
                else:
                    names[name] = other
                for _, later in code[i + 1: i + 5]:
                    exec(later, names)

            grades[node.name] = [in_a_fork(lambda other=other: following(other)) for other in other_bodies(node, part, names)]
    return grades


@pytest.mark.slow
@every
def test_it_runs_and_its_checkpoints_grade(path, tmp_path):
    """From top to bottom without a word on stderr, drawing its figures; a blank or a wrong function is refused by the cells behind it."""
    with_stories(source(path), tmp_path)
    environment = {**os.environ, "MPLBACKEND": "Agg", "TINKER": "", "PYTHONPATH": str(ROOT)}
    program = ("import json, pathlib, sys; from tests.test_tutorials import grade; "
               "print('GRADES', json.dumps(grade(pathlib.Path(sys.argv[1]))))")
    result = subprocess.run([sys.executable, "-c", program, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True,
                            timeout=3000)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not result.stderr, result.stderr[-3000:]
    assert list(tmp_path.rglob("*.png")), "a tutorial draws its figures"
    grades = json.loads(result.stdout.split("GRADES ")[1])
    assert set(grades) == set(my_functions(source(path)))
    for name, (blank, changed) in grades.items():
        # A blank says so itself, inside a Triton kernel (InterpreterError), or in the text of a checkpoint on torchrun's processes.
        assert "NotImplementedError" in blank or blank.startswith("InterpreterError"), (name, blank)
        assert changed.split(":")[0] in ("AssertionError", "AttributeError"), (name, changed)  # the second: of one that leaves no gradients
