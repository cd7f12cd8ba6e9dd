"""How the rooms lie: imports go one way and in no circle, private names stay in their module, functions are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runtime", "frontend", "passes", "tools")
"""Each imports of itself and of those before it."""
LINES, ARGUMENTS = 80, 12
PUBLIC = {"liar_opt.passes.prune_job.prune"}
"""Has an argument for each option."""


@cache
def modules() -> dict[str, ast.Module]:
    paths = [p for room in ROOMS for p in (ROOT / room).rglob("*.py") if "dev" not in p.relative_to(ROOT).parts]
    names = {".".join(("liar_opt", *p.relative_to(ROOT).with_suffix("").parts)): p for p in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in names.items()}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    return {inner for block in blocks for inner in ast.walk(block)}


def imports(name: str, tree: ast.Module) -> Iterator[tuple[str, str, bool]]:
    """Yields module, name and whether it is imported for types only."""
    types = for_types_only(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("liar_opt."):
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules() else node.module, alias.name, node in types


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module(name: str) -> None:
    tree = modules()[name]
    for module, what, _ in imports(name, tree):
        assert ROOMS.index(module.split(".")[1]) <= ROOMS.index(name.split(".")[1]), f"{name} imports {module}"
        assert not what.startswith("_"), f"{name} imports {what} of {module}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and f"{name}.{node.name}" not in PUBLIC:
            assert node.end_lineno is not None
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.end_lineno - node.lineno < LINES and len(taken) <= ARGUMENTS, f"{name}.{node.name} is long"


def test_no_circles() -> None:
    left = {name: {m for m, _, types in imports(name, tree) if not types} for name, tree in modules().items()}
    while left:
        free = {name for name, read in left.items() if not read & left.keys()}
        assert free, f"import each other, or what does: {', '.join(sorted(left))}"
        left = {name: read for name, read in left.items() if name not in free}
