"""Print the package's folders with their lines, and which folders each one imports; fail on a cycle.

make imports
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tpaw_jax"


def main() -> None:
    graph, sizes = folder_graph(PACKAGE)
    for folder in TopologicalSorter(graph).static_order():  # raises CycleError
        files = ", ".join(f"{name} {lines}" for name, lines in sizes[folder].items())
        print(f"{folder} ({sum(sizes[folder].values())} lines): {files}")
        print(f"    imports {', '.join(sorted(graph[folder])) or 'nothing of the package'}")
    print(f"{sum(sum(files.values()) for files in sizes.values())} lines in {len(sizes)} folders and files, no cycle.")


def folder_graph(package: Path) -> tuple[dict[str, set[str]], dict[str, dict[str, int]]]:
    """What each folder or top-level file imports of the others, and the lines of its files."""
    graph: dict[str, set[str]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.cc")]):
        inside = path.relative_to(package)
        folder = inside.parts[0].removesuffix(".py")
        if folder == "__init__":
            continue
        sizes.setdefault(folder, {})["/".join(inside.parts[1:]) or inside.name] = path.read_text().count("\n")
        imported = set(imports(path)) if path.suffix == ".py" else set()
        graph.setdefault(folder, set()).update(imported - {folder})
    return graph, sizes


def imports(path: Path) -> list[str]:
    """The folders and top-level files of the package that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tpaw_jax":
            inside = node.module.split(".")[1:]
            found += [inside[0]] if inside else [alias.name for alias in node.names]
    return found


if __name__ == "__main__":
    main()
