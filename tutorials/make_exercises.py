"""Write tutorials/exercises: each tutorial with blanks instead of the functions that you are to write.

    make exercises                              # or: python tutorials/make_exercises.py
    python tutorials/exercises/05_inverse_rl.py # stops at the first blank; the notebook beside it begins the same. Work in one of them.

The body of every function `my_…` becomes its docstring and `raise NotImplementedError`. The checkpoints of the tutorial grade what you
write. What stood in the blanks, and the code of the solutions, is folded at the end of the file. Files that are there already are kept:
`--force` writes them again.
"""

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
FENCE = "# <details><summary>{title}</summary>\n#\n# ```python\n{code}\n# ```\n# </details>\n"


def my_functions(text):
    """{name: (first line of the body after the docstring, last line, indentation)}, lines from 0, of the functions that a reader writes."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("my_"):
            if ast.get_docstring(node) is None or len(node.body) < 2:
                raise SystemExit(f"line {node.lineno}: {node.name} needs a docstring, which is what stays in the exercise")
            found[node.name] = (node.body[0].end_lineno, node.end_lineno, node.col_offset + 4)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def with_blanks(text, names=None):
    """The text with the bodies of its my_ functions (or of `names` only) blanked, and {name: the body that stood there}."""
    lines, bodies = text.splitlines(), {}
    for name, (start, end, indent) in reversed(my_functions(text).items()):
        if names is None or name in names:
            bodies[name] = "\n".join(line[indent:] for line in lines[start:end])
            lines[start:end] = [" " * indent + f'raise NotImplementedError("write {name}, then run the checkpoint below")']
    return "\n".join(lines) + "\n", dict(reversed(bodies.items()))


def folded(title, code):
    """A markdown cell that shows code when its title is clicked."""
    return "# %% [markdown]\n" + FENCE.format(title=title, code="\n".join(f"# {line}".rstrip() for line in code.splitlines()))


def exercise(text):
    """The exercise that belongs to a tutorial: blanks, solutions folded, bodies at the end."""
    text, bodies = with_blanks(text)
    cells = re.split(r"(?m)^(?=# %%)", text)
    for i, cell in enumerate(cells):
        if cell.startswith('# %% tags=["solution"]'):
            cells[i] = folded("Solution in code", cell.split("\n", 1)[1].strip()) + "\n"
    cells.append("\n# %% [markdown]\n# ## What stood in the blanks\n\n")
    cells += [folded(name, body) + "\n" for name, body in bodies.items()]
    return "".join(cells)


def main(out=HERE / "exercises", force=False):
    """Write a script and a notebook for each tutorial. Files that exist, which may hold a reader's work, are kept unless `force`."""
    import jupytext

    Path(out).mkdir(exist_ok=True)
    for path in sorted(HERE.glob("[0-9]*.py")):
        text = exercise(path.read_text(encoding="utf-8"))
        script, notebook = Path(out) / path.name, Path(out) / f"{path.stem}.ipynb"
        if (script.exists() or notebook.exists()) and not force:
            print(f"{path.name}: kept, it exists (python tutorials/make_exercises.py --force writes it again)")
            continue
        script.write_text(text, encoding="utf-8")
        jupytext.write(jupytext.reads(text, fmt="py:percent"), notebook)
        print(f"{path.name}: {len(my_functions(text))} functions to write")


if __name__ == "__main__":
    sys.exit(main(force="--force" in sys.argv))
