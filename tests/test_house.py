"""The rules of the house that a test can check (docs/design.md)."""

import ast
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import import_graph

PACKAGE = ROOT / "tpaw_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "objective",
    "types",
    "config",
    "runtime",
    "storage",
    "observe",
    "data",
    "models",
    "generation",
    "training",
    "evaluation",
    "selfplay",
    "report",
    "planning",
    "cli",
]
"""A folder or file imports only from those before it."""

NO_PLUMBING = set(ORDER) - {"types", "config", "cli"}


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_folders_import_one_way():
    graph, _ = import_graph.folder_graph(PACKAGE)
    assert set(graph) == set(ORDER)
    assert graph["selfplay"] >= {"storage", "training"}
    for folder, imported in graph.items():
        assert imported <= set(ORDER[: ORDER.index(folder)]), f"{folder} imports from below it"


def test_the_objective_imports_nothing_of_the_package():
    assert import_graph.imports(PACKAGE / "objective.py") == []


def test_a_folder_has_few_files_and_says_what_it_is_for():
    assert len(NO_PLUMBING) <= 12
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        files = [path for path in [*folder.glob("*.py"), *folder.glob("*.cc")] if path.name != "__init__.py"]
        assert len(files) <= 9, folder
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    assert path.read_text().count("\n") <= 400
    for node in functions(path):
        assert node.end_lineno - node.lineno < 50, f"{node.name} is too long"
        positional = [a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
        assert len(positional) <= 6, f"{node.name} has too many positional parameters"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_and_classes_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_the_readme_is_short_and_its_example_runs():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 180
    names = {}
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
    assert names["gradient"].shape == (5, 5)
    assert abs(names["gradient"]).sum() > 0
