# SPDX-License-Identifier: Apache-2.0
"""Each reason in the code is explained in docs/usage.md, and the README explains none that is not there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_TOP = Path(__file__).parent.parent
_ROW = re.compile(r"^\| ((?:`[a-z0-9-]+`(?:, )?)+) \|", re.MULTILINE)


def _documented(page: str, heading: str) -> list[str]:
    """The codes in the first column of a section's tables."""
    text = (_TOP / page).read_text()
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return [code for row in _ROW.findall(section) for code in re.findall(r"`([a-z0-9-]+)`", row)]


def _texts(node: ast.expr, constants: dict[str, str]) -> Iterator[str]:
    """The strings that an expression may be, as far as that can be told without running it."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _texts(body, constants)
            yield from _texts(orelse, constants)
        case ast.Name(id=name) if name in constants:
            yield constants[name]


def _reasons(sources: list[str]) -> set[str]:
    """The values of `reason=`, `default_reason` and `Refused(...)`, and the last of `error=(...)`."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    constants = {
        target.id: node.value.value
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
    }
    found = set()
    for node in nodes:
        match node:
            case ast.Call(func=ast.Name(id="Refused"), args=[reason]):
                found |= {*_texts(reason, constants)}
            case ast.keyword(arg="reason", value=reason):
                found |= {*_texts(reason, constants)}
            case ast.keyword(arg="error", value=ast.Tuple(elts=[*_, reason])):
                found |= {*_texts(reason, constants)}
            case ast.Assign(targets=[ast.Name(id="default_reason")], value=reason):
                found |= {*_texts(reason, constants)}
            case ast.AnnAssign(
                target=ast.Name(id="default_reason"), value=ast.Constant() as reason
            ):
                found |= {*_texts(reason, constants)}
    return found


def _of_the_code() -> set[str]:
    return _reasons([path.read_text() for path in (_TOP / "lazysnap").rglob("*.py")])


def test_each_reason_of_the_code_is_explained_once() -> None:
    documented = _documented("docs/usage.md", "Reasons")
    assert sorted(documented) == sorted(_of_the_code())


def test_the_readme_explains_reasons_that_there_are() -> None:
    usual = _documented("README.md", "Why is my image not lazy?")
    assert len(usual) > 5
    assert set(usual) <= _of_the_code()


def test_reasons_are_found_in_code() -> None:
    source = """
TAKEN = "taken"
class Away(Exception):
    default_reason: ClassVar[str] = "away"
class Gone(Away):
    default_reason = "gone"
raise NotLazy("text", reason="too-late" if late else None, hint="no reason")
return Refused(TAKEN) or Refused("refused") or Refused(error.reason)
yield Answer(error=("FormatError", message, None, "answered"))
"""
    assert _reasons([source]) == {"taken", "away", "gone", "too-late", "refused", "answered"}
