"""Every tutorial runs from top to bottom as a script; its checkpoint cells assert that what it builds equals minialign's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minialign import stories260K
from tests.test_stories260K import PUBLISHED

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    if "stories260K" in path.read_text(encoding="utf-8"):
        if not PUBLISHED.is_dir():
            pytest.skip("the published files (../shared/data/stories260K) are not part of the project")
        files = [str(PUBLISHED / name) for name in ("stories260K.bin", "tok512.bin")]
        stories260K.main(stories260K.Config(*files, str(tmp_path / "runs" / "stories260K")))
    result = subprocess.run([sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert list(tmp_path.rglob("*.png")), "a tutorial draws its figure"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_form(path):
    """A promise, markdown cells, a checkpoint against minialign, something broken on purpose, lines to watch, exercises with solutions."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    for piece in ("minutes", "Checkpoint", "Break it", "# watch:", "Exercise", "Solution", "from minialign", "assert"):
        assert piece.lower() in text.lower(), piece


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_its_notebook_is_built_from_it(path):
    """tutorials/notebooks holds the executed notebook of the current source (`make notebooks` rebuilds it)."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat comes with jupytext (requirements-dev.txt)")
    notebook = nbformat.read(path.parent / "notebooks" / f"{path.stem}.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    script = path.read_text(encoding="utf-8")
    assert sources and all(source in script for source in sources), "rebuild it: make notebooks"
    assert any("image/png" in out.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs)
