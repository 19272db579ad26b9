"""The rules of the house that a test can hold."""

import ast

from conftest import ROOT

PACKAGE = ROOT / "tpaw_jax"
ORDER = [  # a file imports only from files above it
    "types",
    "config",
    "config_file",
    "pod",
    "preemption",
    "durable",
    "journal",
    "host",
    "objective",
    "tpu",
    "hlo",
    "roofline",
    "sharding",
    "models.attention",
    "models.tile_attention",
    "models.splash_attention",
    "models.cpu_kernels",
    "models.cache",
    "models.parallel",
    "models.transformer",
    "models.decoding",
    "models.config_json",
    "models.gguf",
    "models.hub",
    "models.__init__",
    "logprobs",
    "dataset",
    "draws",
    "decoder",
    "slots",
    "pages",
    "sampling",
    "generation_file",
    "evaluation",
    "packing",
    "cost",
    "triplets",
    "scoring",
    "train_step",
    "memory",
    "lowering",
    "ring",
    "recovery",
    "monitoring",
    "health",
    "session",
    "training",
    "answering",
    "harness",
    "reporting",
    "sft",
    "self_play",
    "figures",
    "page",
    "report",
    "export_policy",
    "workload",
    "planning",
    "cli",
]


def imports(path):
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tpaw_jax"):
            inside = node.module.removeprefix("tpaw_jax").lstrip(".")
            for alias in node.names:
                name = f"{inside}.{alias.name}".lstrip(".")
                if name in ORDER:
                    yield name
                elif f"{name}.__init__" in ORDER:
                    yield f"{name}.__init__"
                else:
                    yield inside if inside in ORDER else f"{inside}.__init__"


def test_imports_go_one_way():
    files = {p: ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    assert set(files.values()) - {"__init__"} == set(ORDER)
    for path, name in files.items():
        above = ORDER[: ORDER.index(name)] if name in ORDER else []
        for imported in imports(path):
            assert imported in above, f"{name} imports {imported}, which is not above it"


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
