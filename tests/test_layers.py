"""The picture in docs/architecture.md is the truth about who may import whom, and MLX has one door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "metapeft"
HEAVY = ("mlflow", "great_expectations", "optuna", "dvc", "airflow", "transformers", "datasets", "pandas", "matplotlib")


def rows() -> dict[str, int]:
    """Module -> row of the first code block of docs/architecture.md, the bottom row being 0."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert block is not None, "docs/architecture.md has lost its picture"
    lines = [line.split() for line in block.group(1).splitlines() if line.strip(" |")]
    return {name: row for row, names in enumerate(reversed(lines)) for name in names}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that really are imported: what only a type checker sees does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_level_only)


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def inside(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "metapeft" and len(parts) > 1 else None


def test_every_module_is_in_the_picture() -> None:
    modules = {module_of(path) for path in sources()} - {"__init__", "__main__"}
    assert modules - set(rows()) == set(), "put them into a row of the picture in docs/architecture.md"


def test_arrows_point_down() -> None:
    height = rows()
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if module_of(path) in height
        for name in imports(parsed(path))
        if (used := inside(name)) in height and height[used] > height[module_of(path)]
    ]
    assert wrong == []


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources():
        used = {inside(name) for name in imports(parsed(path))} & set(rows())
        graph.setdefault(module_of(path), set()).update(name for name in used if name and name != module_of(path))
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_mlx_comes_through_runtime_only() -> None:
    """mlx.core, mlx.nn and mlx.optimizers nowhere else; what is built on them only after metapeft.runtime."""
    wrong = []
    for path in sources():
        names = list(imports(parsed(path)))
        if path == PACKAGE / "runtime.py":
            continue
        doors = [name for name in names if re.match(r"mlx(\.(core|nn|optimizers)\b|$)", name)]
        wrong += [f"{path.relative_to(ROOT)} imports {name}: use metapeft.runtime" for name in doors]
        if any(re.match(r"(mlx|mlx_lm)\b", name) for name in names) and not any(
            name.startswith("metapeft.runtime") for name in imports(parsed(path), top_level_only=True)
        ):
            wrong.append(f"{path.relative_to(ROOT)} uses mlx without importing metapeft.runtime at its top")
    assert wrong == []


def test_heavy_libraries_are_imported_inside_functions() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in imports(parsed(path), top_level_only=True)
        if name.split(".")[0] in HEAVY and not (module_of(path) == name.split(".")[0] == "airflow")
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["metapeft", "metapeft.cli", "metapeft.settings", "metapeft.blas", "metapeft.doctor"]
)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert set(loaded.split()) & {*HEAVY, "mlx", "mlx_lm", "numpy", "sklearn"} == set()
