# SPDX-License-Identifier: Apache-2.0
"""Elements of a page; whatever text they are given stays text. Pure."""

from __future__ import annotations

from xml.etree.ElementTree import Element, tostring

from lazysnap.report.model import printable

Child = Element | str


def element(tag: str, *children: Child, **attributes: str | float) -> Element:
    """An element.

    Args:
        tag: its name.
        children: elements and texts, in order.
        attributes: by name, with `_` for `-`; a trailing `_` is left out, as of `class_`.
    """
    names = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    made = Element(tag, {key: _text(value) for key, value in names.items()})
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif last is None:
            made.text = (made.text or "") + printable(child)
        else:
            last.tail = (last.tail or "") + printable(child)
    return made


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return printable(value)
    return f"{value:.2f}".rstrip("0").rstrip(".")


def document(head: list[Element], style: str, body: list[Element]) -> str:
    """A page.

    Args:
        head: what is in its head, beside the style.
        style: CSS, trusted.
        body: what is in its body.
    """
    css = Element("style")
    css.text = style  # not escaped, as HTML does not read escapes there
    root = element("html", element("head", *head, css), element("body", *body), lang="en")
    return "<!DOCTYPE html>\n" + tostring(root, encoding="unicode", method="html") + "\n"
