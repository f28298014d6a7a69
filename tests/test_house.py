"""The house rules, held by tests: the tree, the rooms of a method file, one-way imports, documents that say what is there."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import METHODS, PREFERRING

ROOT = Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split()
MODULES = sorted(p for p in (ROOT / "minialign").rglob("*.py") if p.name != "__main__.py") + sorted((ROOT / "toy").glob("*.py"))


def imports(path):
    """Dotted names of what a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_top_level():
    expected = {"minialign", "toy", "tutorials", "tests", "docs", "requirements.txt", "requirements-dev.txt", "constraints.txt",
                "README.md", "LICENSE", "Makefile", "pyproject.toml", "CHANGELOG.md", ".gitignore", ".ci"}
    assert {path.split("/")[0] for path in TRACKED} == expected


def test_the_list_of_methods_is_the_folder():
    assert sorted(METHODS) == sorted(path.stem for path in (ROOT / "minialign/methods").glob("[!_]*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_module_imports(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def test_nothing_heavy_or_foreign_is_imported_by_a_run(small):
    """A whole run of each method in a fresh interpreter: transformers, trl, datasets and their like stay out."""
    forbidden = ("transformers", "trl", "accelerate", "peft", "datasets", "hypothesis", "jupytext", "ruff")
    jobs = [(method, {k: v for k, v in vars(small(method, steps=1)[1]).items()}) for method in METHODS]
    program = (
        "import importlib, json, sys\n"
        "for method, settings in json.loads(sys.argv[1]):\n"
        "    module = importlib.import_module('minialign.methods.' + method); module.main(module.Config(**settings))\n"
        f"print('FOUND', sorted(set({forbidden!r}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program, json.dumps(jobs)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "FOUND []" in result.stdout, result.stdout[-500:] + result.stderr[-2000:]


def test_imports_run_one_way():
    leaves = {"parallel": set(), "common": {"parallel"}, "batch": {"common"}, "kl": set(), "model": {"common"}, "tokenizer": {"common"},
              "checkpoint": {"common", "parallel"},
              "logps": {"batch", "kernels"}, "kernels/linear_logprob": {"kernels"}, "kernels/logprob": {"kernels"},
              "kernels/logprob_triton": set(),
              "kernels/linear_logprob_triton": {"kernels"}, "kernels/decode": {"model"},
              "data": {"batch", "common", "tokenizer"},
              "rewards": {"batch", "common", "data", "kl", "parallel", "tokenizer", "weights"},
              "sample": {"batch", "common", "kernels", "model", "parallel"},
              "weights": {"common", "model", "tokenizer"}, "lora": {"common", "weights"}}
    for name, allowed in leaves.items():
        ours = {parts[1] for n in imports(ROOT / f"minialign/{name}.py") if (parts := n.split("."))[0] == "minialign" and len(parts) > 1}
        assert ours <= allowed, (name, ours - allowed)
    for path in MODULES:
        if "toy" not in path.parts:
            assert not any(name.split(".")[0] in ("toy", "tests", "tutorials") for name in imports(path)), path


def test_methods_never_import_each_other():
    compositions = {"rft", "irl", "rest"}  # in their papers too
    for method in set(METHODS) - compositions:
        others = [name for name in imports(ROOT / f"minialign/methods/{method}.py") if name.startswith("minialign.methods")]
        assert not others, (method, others)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_file_has_its_rooms_in_order(method):
    """Docstring with its paragraphs, Config, loss, (rollout,) step, main; the loss asserts ranks first; the four verbs are in main."""
    source = (ROOT / f"minialign/methods/{method}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    doc = ast.get_docstring(tree)
    rooms = ("\n\n    L", "Symbols", "Idea", "Differs", "Details", "Law", "Checked", f"python -m minialign {method}")
    places = [doc.find(room) for room in rooms]
    assert -1 not in places and places == sorted(places), places
    rooms = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    loss = next(name for name in rooms if name.endswith("_loss"))
    order = [rooms.index(name) for name in ("Config", loss, *(["rollout"] if "rollout" in rooms else []), "step", "main")]
    assert order == sorted(order), rooms
    body = next(node for node in tree.body if getattr(node, "name", "") == loss).body
    assert isinstance(body[1], ast.Assert), "the first line of a loss asserts its ranks"
    main = ast.get_source_segment(source, next(node for node in tree.body if getattr(node, "name", "") == "main"))
    verbs = [main.find(verb) for verb in ("optimizer.zero_grad()", ".backward()", "clip_grad_norm_(", "optimizer.step()")]
    assert -1 not in verbs and verbs == sorted(verbs)


SIBLINGS = ("dpo", "ipo", "gpo", "simpo", "orpo")
# Lines of step that a sibling may have otherwise: what it takes to its loss.
NAMED = ("chosen_logps, rejected_logps = ", "with torch.no_grad():", "ref_chosen_logps, ref_rejected_logps = ")


def lesson(method):
    """What is left of a sibling without its lesson: docstring, imports, Config, loss (and what only the loss uses), the named lines of
    step and its call of the loss. Its own name is replaced by METHOD."""
    source = (ROOT / f"minialign/methods/{method}.py").read_text(encoding="utf-8")
    tree, dropped = ast.parse(source), set()
    allowed = {f"{method}_loss", "Config", "regularisation", "log_odds", "FUNCTIONS"}
    for node in tree.body:
        name = getattr(node, "name", "") or (node.targets[0].id if isinstance(node, ast.Assign) else "")
        if name in allowed or isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom)):
            dropped |= set(range(node.lineno - len(getattr(node, "decorator_list", [])), node.end_lineno + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value).startswith(f"{method}_loss("):
            dropped |= set(range(node.lineno, node.end_lineno + 1))
    lines = [line for number, line in enumerate(source.splitlines(), 1) if number not in dropped]
    lines = [line for line in lines if line.strip() and not line.strip().startswith(NAMED)]
    return [re.sub(rf"\b{method}\b", "METHOD", line) for line in lines]


@pytest.mark.parametrize("method", SIBLINGS[1:])
def test_the_diff_of_two_siblings_is_their_lesson(method):
    """`diff dpo.py ipo.py` touches docstring, the imports of these, Config, the loss and the named lines of step."""
    assert len(lesson("dpo")) > 38 and lesson(method) == lesson("dpo")


def test_siblings_share_their_config_but_for_what_names_their_lesson():
    """A sibling's own fields, three at most, come first; from `policy` on all have the same ones, with the same types and defaults."""
    import dataclasses

    shared = []
    for method in SIBLINGS:
        fields = dataclasses.fields(importlib.import_module(f"minialign.methods.{method}").Config)
        own = [field.name for field in fields].index("policy")
        shared.append([(f.name, f.type, f.default) for f in fields[own:]])
        assert own <= 3 and shared[-1] == shared[0], method


@pytest.mark.parametrize("method", METHODS)
def test_config_fields_all_have_a_comment(method):
    from minialign.settings import field_comments

    module = importlib.import_module(f"minialign.methods.{method}")
    assert set(field_comments(module.Config)) == set(module.Config.__dataclass_fields__)


def test_metrics_page_is_complete_in_both_directions(small):
    """Every metric that a run logs has a row in docs/METRICS.md for its method, and every row there is logged."""
    from minialign.engine.common import read_rows

    page = (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")
    documented = {(method, name) for name, methods in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", page, re.M)
                  for method in (METHODS if methods.strip() == "all" else [m.strip() for m in methods.split(",")])}
    logged = set()
    online = dict(online=True, reward=["length:9"])
    for method, changes in [*((method, {}) for method in METHODS), *((method, online) for method in PREFERRING)]:
        module, cfg = small(method, held_out=0.2, **changes)
        logged |= {(method, name) for row in read_rows(module.main(cfg) / "metrics.jsonl") for name in row}
    assert documented == logged, (documented - logged, logged - documented)


def test_readme_table_and_commands():
    """Each method stands in the table with files that exist; each command of a code block is one that exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[?`?(\w+)`?\]?\(minialign/methods/(\w+)\.py\)", readme, re.M)
    assert sorted(name for _, name in rows) == sorted(METHODS)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z][\w-]+)", readme)) <= targets
    commands = set(re.findall(r"python -m minialign (\w+)", readme))
    assert commands <= {*METHODS, "demo", "sample", "evaluate", "plot", "show", "recipes"}
    for toy in re.findall(r"python -m toy\.(\w+)", readme):
        assert (ROOT / f"toy/{toy}.py").exists()


def test_documents_link_to_what_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_named_tests_and_documents_exist():
    """A docstring that says `tests/...py` or `docs/...md` names a file that is there."""
    for path in [*MODULES, ROOT / "minialign/__main__.py"]:
        for name in re.findall(r"\b(?:tests|docs|toy|minialign|tutorials)/[\w/]+\.(?:py|md)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), (path.name, name)


def test_requirements_say_why_and_constraints_pin():
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                package, reason = re.match(r"([\w-]+)[^#]*(?:#\s*(.*))?", line).groups()
                assert reason and package in pins, line
    assert 'triton >= 3.6; sys_platform == "linux"' in (ROOT / "requirements.txt").read_text()


def test_no_absolute_path_in_the_tree():
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".txt", ".toml", ".json", "") and path.is_file() and path.name != "test_house.py":
            found = re.findall(r"(?:/root|/home/\w+|/work|/Users/\w+|/tmp/\w+)/", path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, (name, found)


def test_no_framework_habits():
    """No base trainer, no registry, no **kwargs in minialign's functions (a typo must fail), no torch.load, no trust_remote_code."""
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg:
                assert (path.stem, node.name) in {("model", "tiny"), ("run", "log"), ("run", "track"), ("run", "first_look"),
                                                  ("tokenizer", "weight_and_bias"), ("tiny_language", "tiny_gpt"),
                                                  ("bench", "letters")}, (path.name, node.name)
        source = path.read_text(encoding="utf-8")
        assert "torch.load(" not in source and "trust_remote_code" not in source and "pickle.load" not in source, path


def test_result_tables_are_the_json_behind_them():
    """docs/RESULTS.md prints docs/demo.json and docs/results_hh*.json: every mean of their tables, rounded as printed, is in the text."""
    import statistics

    page = (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8").replace("−", "-").replace("**", "")
    demo = json.loads((ROOT / "docs/demo.json").read_text(encoding="utf-8"))
    for name, columns in demo["table"].items():
        shown = " | ".join(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in columns.values())
        shown = shown.replace("-0.000 ±", "0.000 ±")  # a zero has no sign in print
        assert f"| {name} | {shown} |" in page, (name, shown)
    files = ("results_hh.json", "results_hh_preferences.json")
    for row in [row for file in files for row in json.loads((ROOT / "docs" / file).read_text(encoding="utf-8"))]:
        if "policy" in row:
            nll, gap, per_token = row["nll"], row["gap"], row["gap_per_token"]
            shown = f"| {nll[0]:.3f} ± {nll[1]:.3f} | +{gap[0]:.1f} ± {gap[1]:.1f} | +{per_token[0]:.3f} ±"
        else:
            shown = "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * share for share in row["accuracy"]))
        assert shown in page, shown
