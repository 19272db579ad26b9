"""The rules of the house that a test can hold."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

PACKAGE = ROOT / "tpaw_jax"
ORDER = [  # a folder or file imports only from those above it
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


def imports(path):
    """The modules of the package that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tpaw_jax":
            inside = node.module.split(".")[1:]
            for alias in node.names:
                full = [*inside, alias.name]
                is_module = PACKAGE.joinpath(*full).is_dir() or PACKAGE.joinpath(*full).with_suffix(".py").exists()
                yield ".".join(full if is_module else inside)


def modules():
    """Every file of the package by its dotted name; a folder's `__init__` has the folder's."""
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {path: ".".join(parts[:-1] if parts[-1] == "__init__" else parts) for path, parts in names.items()}


def test_folders_import_one_way():
    named = modules()
    assert {name.split(".")[0] for name in named.values() if name} == set(ORDER)
    for path, name in named.items():
        room = name.split(".")[0]
        above = ORDER[: ORDER.index(room)] if room in ORDER else []
        for imported in imports(path):
            other = imported.split(".")[0]
            assert other == room or other in above, f"{name} imports {imported}, which is not above it"


def test_no_import_is_circular():
    graph = {name: set(imports(path)) - {name} for path, name in modules().items()}
    assert graph["selfplay.loop"] >= {"selfplay.session", "storage.ring"}
    TopologicalSorter(graph).prepare()


def test_the_objective_imports_nothing_of_the_package():
    assert list(imports(PACKAGE / "objective.py")) == []


def test_no_file_is_longer_than_400_lines_and_no_function_than_60():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "validate":
                inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node]
                own = node.end_lineno - node.lineno - sum(n.end_lineno - n.lineno for n in inner)
                assert own <= 60, f"{path.name}: {node.name} is too long"


def test_every_public_function_and_class_has_a_docstring():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path.name
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_the_readmes_composition_example_runs():
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["gradient"].shape == (5, 5)
    assert abs(names["gradient"]).sum() > 0
