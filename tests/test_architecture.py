# SPDX-License-Identifier: Apache-2.0
"""Limits that keep the code readable, and contracts that leave no package out.

Ruff and import-linter check what they can; here stands what they cannot.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "lazysnap"
GENERATED = PACKAGE / "containerd/_pb"
MOST_LINES_OF_A_PACKAGE = 3500
MOST_LINES_OF_A_FILE = 420
MOST_LINES_OF_A_FUNCTION = 60
MOST_POSITIONAL_ARGUMENTS = 5
"""Of a call; more can only be told apart by counting."""
ORDERED_BY_OTHERS = {"pack", "_syscall"}
"""Calls whose order is that of a format on disk or of a system call, and which know no keywords."""
MEANINGLESS = {"utils", "util", "common", "helpers", "helper", "misc"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(GENERATED))
FOLDERS = sorted({path.parent for path in FILES} - {PACKAGE})
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _name(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def _nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, _Definition | ast.Call):
                yield f"{_name(path)}:{node.lineno}", node


def _called(call: ast.Call) -> str:
    """The last word of what is called."""
    return ast.unparse(call.func).rpartition(".")[2]


@pytest.fixture(scope="module")
def nodes() -> list[tuple[str, ast.AST]]:
    return list(_nodes())


def test_no_package_is_too_large() -> None:
    sizes = {
        _name(folder): sum(_lines(path) for path in FILES if path.parent == folder)
        for folder in FOLDERS
    }
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_PACKAGE} == {}


def test_no_file_is_too_large() -> None:
    sizes = {_name(path): _lines(path) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE} == {}


def test_no_function_is_too_long(nodes: list[tuple[str, ast.AST]]) -> None:
    sizes = {
        f"{place} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for place, node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > MOST_LINES_OF_A_FUNCTION} == {}


def test_no_call_has_too_many_positional_arguments(nodes: list[tuple[str, ast.AST]]) -> None:
    counts = {
        f"{place} {ast.unparse(node.func)}": len(node.args)
        for place, node in nodes
        if isinstance(node, ast.Call) and _called(node) not in ORDERED_BY_OTHERS
    }
    assert {name: n for name, n in counts.items() if n > MOST_POSITIONAL_ARGUMENTS} == {}


def test_every_module_has_a_name_that_says_something() -> None:
    assert [_name(path) for path in FILES if path.stem in MEANINGLESS] == []
    assert [_name(folder) for folder in FOLDERS if folder.name in MEANINGLESS] == []


def test_every_package_stands_in_the_layers_of_imports() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    named = {module.strip() for layer in layers for module in layer.split("|")}
    top = {path.stem for path in FILES if path.parent == PACKAGE} - {"__init__"}
    top |= {folder.name for folder in FOLDERS if folder.parent == PACKAGE}
    assert named == {f"lazysnap.{name}" for name in top}
