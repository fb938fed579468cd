"""HTML whose every text and attribute is escaped where it is made: what comes from data cannot become markup."""

from __future__ import annotations

import html
import re
from typing import Any

VOID = frozenset({"meta", "link", "img", "input", "br", "line", "circle", "rect", "path"})

# What no document may hold as text: controls, lone surrogates, and marks that turn the direction of what follows.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Any value as text that is safe in an element and in a quoted attribute."""
    return value if isinstance(value, Html) else Html(html.escape(_UNFIT.sub("\ufffd", str(value)), quote=True))


def h(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. Children: Html as it is, other values as text, lists of both, None left out.

    Attributes: `class_` is class, `data_x` data-x; True is a bare attribute, None and False none at all.
    """
    names = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        names.append(f" {name}" if value is True else f' {name}="{text(str(value))}"')
    inner = "".join(_flat(children))
    if tag in VOID:
        return Html(
            f"<{tag}{''.join(names)}/>" if tag not in ("meta", "img", "input", "br") else f"<{tag}{''.join(names)}>"
        )
    return Html(f"<{tag}{''.join(names)}>{inner}</{tag}>")


def _flat(children: Any) -> list[str]:
    found: list[str] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            found += _flat(child)
        elif child is not None:
            found.append(text(child))
    return found
