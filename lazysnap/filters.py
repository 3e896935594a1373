# SPDX-License-Identifier: Apache-2.0
"""containerd's filter language (containerd pkg/filters): `kind==active,labels."a/b"~=^x`.

Follows containerd's scanner rune by rune, oddities included, so that a filter means the same here
and there. Knows nothing of what it filters: a value is looked up by its field path. Does no I/O.
Patterns are RE2's, as in Go, and run in linear time whatever the pattern.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import re2

from lazysnap.errors import InvalidArgument

FieldPath = tuple[str, ...]
Adaptor = Callable[[FieldPath], str | None]
"""Looks up the value at a field path; None when the field is absent."""

_EOF = ""
_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | frozenset(
    map(chr, range(0x2000, 0x200B))
)
_FIELD: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_OPERATOR = frozenset("=!~")
_QUOTES = frozenset('/|"')
_SEPARATORS = frozenset(",.")
_ESCAPES = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\\": "\\",
}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_HEX = frozenset("0123456789abcdefABCDEF")
_OCTAL = frozenset("01234567")
_MAX_RUNE = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Filter:
    """A compiled set of filters; call it with an adaptor.

    Args:
        alternatives: it matches when all selectors of any alternative match.
        required: values that an object must have at some field paths to match at all, for a store
            that can look them up; empty when nothing can be said.
    """

    alternatives: tuple[tuple[Callable[[Adaptor], bool], ...], ...]
    required: Mapping[FieldPath, str] = field(default_factory=dict)

    def __call__(self, adaptor: Adaptor) -> bool:
        """Whether the object behind the adaptor matches."""
        return any(all(selector(adaptor) for selector in each) for each in self.alternatives)


EVERYTHING = Filter(((),))
"""Matches every object."""


def compile(filters: Sequence[str]) -> Filter:
    """Compile filters of which at least one must match.

    Args:
        filters: each a comma separated list of selectors that must all match. An empty list, or an
            empty filter in it, matches everything.

    Raises:
        InvalidArgument: a filter is not in the language.
    """
    parsed = [_Parser(text).selectors() for text in filters]
    if not parsed or not all(parsed):
        return EVERYTHING
    required: dict[FieldPath, str] = {}
    if len(parsed) == 1:
        required = {s.path: s.value for s in parsed[0] if s.operator == "=="}
    return Filter(tuple(tuple(s.predicate() for s in each) for each in parsed), required)


@dataclass(frozen=True, slots=True)
class _Selector:
    """One comparison; the operator is empty for a test of presence."""

    path: FieldPath
    operator: str
    value: str

    def predicate(self) -> Callable[[Adaptor], bool]:
        path, value = self.path, self.value
        if self.operator == "==":
            return lambda adaptor: adaptor(path) == value
        if self.operator == "!=":
            return lambda adaptor: (adaptor(path) or "") != value
        if self.operator == "~=":
            pattern = _pattern(value)
            if pattern is None:
                return lambda _adaptor: False
            return lambda adaptor: pattern.search(adaptor(path) or "") is not None
        return lambda adaptor: adaptor(path) is not None


def _pattern(text: str) -> Any | None:
    """The compiled pattern, or None where it is not one, which containerd takes as "no match"."""
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except (re2.error, UnicodeEncodeError):
        return None


class _Parser:
    """A recursive descent parser over one filter; one rune of lookahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        # set after an operator: the next token may be a bare value
        self.expects_value = False

    def selectors(self) -> list[_Selector]:
        """All selectors; none for the empty filter."""
        if not self.text:
            return []
        found = [self._selector()]
        while (rune := self._peek()) != _EOF:
            if rune != ",":
                raise self._error(f"unexpected {rune!r}")
            self._next()
            self.expects_value = False
            found.append(self._selector())
        return found

    def _selector(self) -> _Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._next()
            self.expects_value = False
            path.append(self._field())
        if self._peek() in (_EOF, ","):
            return _Selector(tuple(path), "", "")
        kind, operator = self._scan()
        if kind != "operator":
            raise self._error("expected one of the operators ==, != and ~=")
        if operator not in ("==", "!=", "~="):
            raise self._error(f"unsupported operator {operator!r}")
        kind, value = self._scan()
        if kind == "quoted":
            value = self._unquote(value, any_quote=operator == "~=")
        elif kind not in ("value", "field"):
            raise self._error("expected a value")
        return _Selector(tuple(path), operator, value)

    def _field(self) -> str:
        kind, text = self._scan()
        if kind == "field":
            return text
        if kind == "quoted":
            return self._unquote(text, any_quote=False)
        raise self._error("expected a field or a quoted string")

    def _scan(self) -> tuple[str, str]:
        """The next token: its kind and its text, after any blanks."""
        rune = self._next()
        while rune in _SPACE:
            rune = self._next()
        start = self.position - len(rune)
        if rune == _EOF:
            return "end", ""
        if rune in _QUOTES:
            self._skip_quoted(rune)
            return "quoted", self.text[start : self.position]
        if rune in _SEPARATORS:
            self.expects_value = False
            return "separator", rune
        if rune in _OPERATOR:
            self._skip_while(_OPERATOR.__contains__)
            self.expects_value = True
            return "operator", self.text[start : self.position]
        if self.expects_value:
            self._skip_while(_is_value)
            self.expects_value = False
            return "value", self.text[start : self.position]
        if rune in _FIELD:
            self._skip_while(_FIELD.__contains__)
            return "field", self.text[start : self.position]
        return "illegal", rune

    def _next(self) -> str:
        rune = self._peek()
        self.position += len(rune)
        return rune

    def _peek(self) -> str:
        rune = self.text[self.position : self.position + 1]
        # Go decodes bytes that are not UTF-8 to U+FFFD, and so cannot tell that rune from them
        if rune in ("\0", "\ufffd") or "\ud800" <= rune <= "\udfff":
            raise self._error(f"character {rune!r} is not allowed")
        return rune

    def _skip_while(self, accept: Callable[[str], bool]) -> None:
        while (rune := self._peek()) and accept(rune):
            self.position += 1

    def _skip_quoted(self, quote: str) -> None:
        while (rune := self._next()) != quote:
            if rune in (_EOF, "\n"):
                raise self._error("a quoted string is not terminated")
            if rune == "\\":
                self._skip_escape(quote)

    def _skip_escape(self, quote: str) -> None:
        rune = self._next()
        if rune and (rune in _ESCAPES or rune == quote):
            return
        if rune and rune in _OCTAL:
            count, digits = 2, _OCTAL
        elif rune in _HEX_ESCAPES:
            count, digits = _HEX_ESCAPES[rune], _HEX
        else:
            raise self._error("illegal escape sequence")
        for _ in range(count):
            if self._next() not in digits:
                raise self._error("illegal numeric escape sequence")

    def _unquote(self, token: str, *, any_quote: bool) -> str:
        """The content of a quoted token, whose escapes the scanner has found well-formed."""
        if token[0] != '"' and not any_quote:
            raise self._error(f"only patterns may be quoted with {token[0]}")
        body = token[1:-1]
        if "\\" not in body:
            return body
        result = bytearray()
        position = 0
        while (escape := body.find("\\", position)) >= 0:
            result += body[position:escape].encode()
            rune = body[escape + 1]
            position = escape + 2
            if rune in _OCTAL:
                position += 2
                code = int(body[escape + 1 : position], 8)
                if code > 255:
                    raise self._error("an octal escape is above 255")
                result.append(code)
            elif rune in _HEX_ESCAPES:
                position += _HEX_ESCAPES[rune]
                code = int(body[escape + 2 : position], 16)
                if rune == "x":
                    result.append(code)
                else:
                    result += self._encode(code)
            else:
                result += _ESCAPES.get(rune, rune).encode()
        result += body[position:].encode()
        # bytes that are not UTF-8 are legal and equal nothing that protobuf can carry
        return result.decode(errors="surrogateescape")

    def _encode(self, code: int) -> bytes:
        if code > _MAX_RUNE:
            raise self._error("an escape is above U+10FFFF")
        if 0xD800 <= code <= 0xDFFF:
            return "\ufffd".encode()
        return chr(code).encode()

    def _error(self, message: str) -> InvalidArgument:
        shown = self.text if len(self.text) <= 256 else self.text[:256] + "..."
        return InvalidArgument(f"filter {shown!r}, near character {self.position}: {message}")


def _is_value(rune: str) -> bool:
    """Whether a bare value goes on with this rune: Go's unicode.IsGraphic, without blanks."""
    return rune != "," and rune not in _SPACE and unicodedata.category(rune)[0] in "LMNPS"
