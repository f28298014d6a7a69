"""The house rules, held by tests: the tree, the rooms of a method file, one-way imports, documents that say what is there."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import LEARNING, METHODS, ONLINE, PREFERRING

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
    forbidden = ("transformers", "trl", "accelerate", "peft", "datasets", "hypothesis", "jupytext", "ruff",
                 "tensorboard", "wandb", "torchao")
    jobs = [(method, {k: v for k, v in vars(small(method, steps=1)[1]).items()}) for method in METHODS]
    program = (
        "import importlib, json, sys\n"
        "for method, settings in json.loads(sys.argv[1]):\n"
        "    module = importlib.import_module('minialign.methods.' + method); module.main(module.Config(**settings))\n"
        f"print('FOUND', sorted(set({forbidden!r}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program, json.dumps(jobs)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert "FOUND []" in result.stdout, result.stdout[-500:] + result.stderr[-2000:]


ROOMS = {  # what stands where: the lesson in front, the machine room in engine/
    "": {"__init__", "__main__", "settings", "model", "weights", "hf_config", "tokenizer", "batch", "data", "task", "sample", "logps", "kl",
         "rewards", "lora", "evaluate", "pairs", "demo", "stories260K", "generate", "microscope"},
    "engine": {"__init__", "run", "opening", "look", "checkpoint", "parallel", "common", "tracking", "adamw8bit",
               "safety"},
    "bench": {"__init__", "__main__", "cpu", "gpu", "receipts"},
    "kernels": {"__init__", "logprob", "logprob_triton", "linear_logprob", "linear_logprob_triton", "decode"},
}


def test_the_rooms():
    for folder, names in ROOMS.items():
        assert {path.stem for path in (ROOT / "minialign" / folder).glob("*.py")} == names, folder
    folders = {path.name for path in (ROOT / "minialign").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "methods", "recipes"} - {""}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"} == {
        "engine", "bench", "kernels", "methods", "toy", "pretended_cuda"}


def graph():
    """{module: the modules of ours that it imports}, with imports inside functions."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for folder in ("minialign", "toy") for path in (ROOT / folder).rglob("*.py")}
    return {name: {other for other in imports(path) if other in names and other not in ("minialign", name)} for name, path in names.items()}


def test_no_import_circle():
    """Every module can be put after those that it imports, wherever in the file it imports them."""
    left = graph()
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_imports_run_one_way():
    """What each room may import. A method file stands on all of them, and nothing but a recipe, the demo and the toys stands on it."""
    may = {"parallel": set(), "common": {"parallel"}, "checkpoint": {"common", "parallel"}, "tracking": {"common", "parallel"},
           "settings": {"common", "parallel"},
           "hf_config": {"common"}, "model": {"common", "hf_config"}, "batch": {"common"}, "kl": set(),
           "tokenizer": {"common", "safety"}, "safety": {"common"},
           "data": {"batch", "common", "tokenizer"}, "task": {"common", "data", "tokenizer"},
           "weights": {"common", "hf_config", "model", "tokenizer"}, "lora": {"common", "tokenizer", "weights"},
           "logprob": {"logprob_triton"}, "logprob_triton": set(), "linear_logprob": {"logprob", "linear_logprob_triton"},
           "linear_logprob_triton": {"logprob", "logprob_triton"}, "decode": {"model"}, "logps": {"batch", "linear_logprob", "tracking"},
           "sample": {"batch", "common", "decode", "linear_logprob", "logps", "model", "parallel", "tracking"},
           "rewards": {"batch", "common", "data", "kl", "lora", "parallel", "safety", "task",
                       "tracking"}, "adamw8bit": set()}
    found = {name.rpartition(".")[2]: {other.rpartition(".")[2] for other in needs} - {"kernels", "engine"}
             for name, needs in graph().items() if name.startswith("minialign.") and ".methods" not in name and ".recipes" not in name}
    for name, allowed in may.items():
        assert found[name] <= allowed, (name, found[name] - allowed)
    for name, needs in graph().items():
        if name.startswith("minialign"):
            assert not any(other.split(".")[0] == "toy" for other in needs), name
        if name.startswith("minialign.engine"):
            assert not any(other.startswith(("minialign.methods", "minialign.recipes", "minialign.bench", "minialign.pairs",
                                             "minialign.evaluate", "minialign.demo")) for other in needs), name
        methods = {other for other in needs if other.startswith("minialign.methods.")}
        if name.startswith("minialign.methods."):  # rft and irl are compositions in their papers too
            assert not methods or name.rpartition(".")[2] in ("rft", "irl"), (name, methods)


def functions(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_file_has_its_rooms_in_order(method):
    """Docstring with its paragraphs, Config, loss, step, main; the loss asserts ranks first; the four verbs are in the method's loop,
    which is main's own, or pairs.train for the six that learn from pairs, or rft.alternate for the two that alternate."""
    source = (ROOT / f"minialign/methods/{method}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    doc = ast.get_docstring(tree)
    rooms = ("\n\n    L", "Symbols", "Idea", "Differs", "Details", "Law", "Checked", f"python -m minialign {method}")
    places = [doc.find(room) for room in rooms]
    assert -1 not in places and places == sorted(places), places
    rooms = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    loss = next(name for name in rooms if name.endswith("_loss"))
    order = [rooms.index(name) for name in ("Config", loss, "step", "main")]
    assert order == sorted(order), rooms
    body = next(node for node in tree.body if getattr(node, "name", "") == loss).body
    assert isinstance(body[1], ast.Assert), "the first line of a loss asserts its ranks"
    assert "__main__" not in source and "sys.argv" not in source, "the front door starts every method"
    main = functions(f"minialign/methods/{method}.py")["main"]
    if method in PREFERRING:
        assert f'train("{method}", cfg, step)' in main
        main = functions("minialign/pairs.py")["train"]
    if method in LEARNING:
        assert "alternate(" in main
        main = functions("minialign/methods/rft.py")["alternate"]
    verbs = [main.find(verb) for verb in ("optimizer.zero_grad()", ".backward()", "clip_grad_norm_(", "optimizer.step()")]
    assert -1 not in verbs and verbs == sorted(verbs)


@pytest.mark.parametrize("method", ONLINE)
def test_an_online_method_opens_with_what_it_deletes(method):
    """A numbered list right after the title, each entry with its reason."""
    doc = ast.get_docstring(ast.parse((ROOT / f"minialign/methods/{method}.py").read_text(encoding="utf-8")))
    opening = doc.split("\n\n")[1]
    assert opening.startswith("What this deletes from") and opening.splitlines()[0].endswith("and why:")
    numbers = re.findall(r"^    (\d)\. ", opening, re.M)
    assert numbers == [str(n + 1) for n in range(len(numbers))] and len(numbers) >= 3


def test_minimal_is_a_promise():
    """Lines, docstrings included: bounds that a method file, the folder of methods and the package keep."""
    def lines(path):
        return len(path.read_text(encoding="utf-8").splitlines())

    bounds = {**dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "slic"), 85), "gpo": 125, "sft": 150, "grpo": 190, "ppo": 210}
    for method, bound in bounds.items():
        assert lines(ROOT / f"minialign/methods/{method}.py") <= bound, method
    assert sum(map(lines, (ROOT / "minialign/methods").glob("*.py"))) <= 2900
    assert sum(lines(path) for path in (ROOT / "minialign").rglob("*.py") if "bench" not in path.parts) <= 13290


@pytest.mark.parametrize("method", METHODS)
def test_config_fields_all_have_a_comment(method):
    from minialign.settings import field_comments

    module = importlib.import_module(f"minialign.methods.{method}")
    assert set(field_comments(module.Config)) == set(module.Config.__dataclass_fields__)


def test_metrics_page_is_complete_in_both_directions(small, monkeypatch):
    """Every metric that a run logs has a row in docs/METRICS.md for its method, and every row there is logged (mfu: on a known card)."""
    from minialign.engine import tracking
    from minialign.engine.common import read_rows

    monkeypatch.setattr(tracking, "describe_device", lambda device: "NVIDIA H200")
    page = (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")
    documented = {(method, name) for name, methods in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", page, re.M)
                  for method in (METHODS if methods.strip() == "all" else [m.strip() for m in methods.split(",")])}
    logged = set()
    online = dict(online=True, reward=["length:9"])
    for method, changes in [*((method, {}) for method in METHODS), *((method, online) for method in PREFERRING),
                            ("ppo", dict(penalty=1.0, target_kl=0.01))]:
        module, cfg = small(method, held_out=0.2, **changes)
        logged |= {(method, name) for row in read_rows(module.main(cfg) / "metrics.jsonl") for name in row}
    assert documented == logged, (documented - logged, logged - documented)


def test_every_method_is_in_readme_and_in_the_table_of_losses():
    for page, folder in (("README.md", ""), ("docs/METHODS.md", "../")):
        text = (ROOT / page).read_text(encoding="utf-8")
        for method in METHODS:
            assert f"[{method}]({folder}minialign/methods/{method}.py)" in text, (page, method)
    rows = re.findall(r"^\| \[(\w+)\]", text, re.M)
    assert sorted(rows) == sorted(METHODS * 2)  # where it ends, and what a step does


def test_the_coverage_page_names_what_exists():
    """Its tests are defined in the files that it names, and the rows that it quotes stand in the toy before them. It counts its rows."""
    page = (ROOT / "docs/COVERAGE.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (?!what \||---)", line)]
    counts = [len(rows), *(sum(f"**{word}**" in row for row in rows) for word in ("absent", "partial"))]
    said = re.search(r"(\d+) rows, of which (\d+) are complete, (\d+) partial and (\d+)\s+absent", page).groups()
    assert [*map(int, said)] == [counts[0], counts[0] - counts[1] - counts[2], counts[2], counts[1]]
    tests = quoted = 0
    for row in rows:
        file = None
        for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", row):
            file = path or file
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), (file, name)
            tests += 1
        for toy, names in re.findall(r"\[\w+\]\(\.\./(toy/\w+\.py)\)((?:,? '[^']+')+)", row):
            source = (ROOT / toy).read_text(encoding="utf-8")
            for name in re.findall(r"'([^']+)'", names):
                assert name.replace("\\|", "|").split(",")[0][:9] in source, (toy, name)
                quoted += 1
    assert tests > 150 and quoted > 30


def test_documents_link_to_what_exists():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "tutorials").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_every_picture_is_shown():
    """Each figure in docs/ stands in README or on a page of docs/."""
    pages = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for picture in (ROOT / "docs").glob("*.png"):
        assert re.search(rf'[("/]{picture.name}', pages), picture.name


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
                assert (path.stem, node.name) in {("model", "tiny"), ("run", "log"), ("run", "register"), ("weights", "add"),
                                                  ("tiny_language", "tiny_gpt"), ("cpu", "letters"),
                                                  ("microscope", "with_snapshot")}, (path.name, node.name)
        source = path.read_text(encoding="utf-8")
        assert "torch.load(" not in source and "trust_remote_code" not in source and "pickle.load" not in source, path


def test_result_tables_are_the_json_behind_them():
    """docs/RESULTS.md prints docs/demo.json and docs/results_hh*.json: every mean of their tables, rounded as printed, is in it. So is
    docs/storyteller.json, with the floors of the toy."""
    import statistics

    from toy import storyteller

    page = (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8").replace("−", "-").replace("**", "")
    demo = json.loads((ROOT / "docs/demo.json").read_text(encoding="utf-8"))
    for name, columns in demo["table"].items():
        shown = " | ".join(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in columns.values())
        shown = shown.replace("-0.000 ±", "0.000 ±")  # a zero has no sign in print
        assert f"| {name} | {shown} |" in page, (name, shown)
    files = ("results_hh.json", "results_hh_preferences.json")
    for row in [row for file in files for row in json.loads((ROOT / "docs" / file).read_text(encoding="utf-8"))]:
        if "mean_length" in row and "win_rate" in row:
            answers = rf"(?:{100 * row['distinct']:.1f} % \| )?{row['mean_length']:.0f} \| {100 * row['finished']:.0f} % \|"
            shown = rf"\| {row['reward'][0]:.2f} ± {row['reward'][1]:.2f} \|[^|]*\|[^|]*\| {answers}"
            assert re.search(shown, page), shown
        if "policy" in row:
            nll, gap, per_token = row["nll"], row["gap"], row["gap_per_token"]
            shown = f"| {nll[0]:.3f} ± {nll[1]:.3f} | +{gap[0]:.1f} ± {gap[1]:.1f} | +{per_token[0]:.3f} ±"
        else:
            shown = "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * share for share in row["accuracy"]))
        assert shown in page, shown
    told = json.loads((ROOT / "docs/storyteller.json").read_text(encoding="utf-8"))["methods"]
    floors = {row.name: row.floor for row in storyteller.ROWS}
    for name, runs in told.items():
        means = [statistics.mean(shares) for shares in zip(*(run["shares"] for run in runs), strict=True)]
        costs = [[run[part][0] for run in runs] for part in ("paid", "needed", "wasted")]
        shown = " | ".join(f"{statistics.mean(cost):.3f} ± {statistics.stdev(cost):.3f}" for cost in costs)
        assert re.search(rf"\| {name} \| [^|]* \| {' '.join(f'{mean:.3f}' for mean in means)} \| [^\n]*{shown} \|", page), name
        assert not floors[name] or re.search(rf"\| {name} \|[^\n]* \| {floors[name]:.3f} \| ", page), name
