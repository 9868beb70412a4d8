"""HTML that cannot forget to escape: what is no `Html` is text, and text is escaped where it enters a tag."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Union

VOID = ("br", "img", "meta", "wbr")  # have no end tag


class Html(str):
    """Characters that are HTML already."""


Inner = Union[str, Iterable["Inner"]]


def join(*inner: Inner) -> Html:
    """Pieces one after another, lists of pieces among them; text is escaped."""
    return Html("".join(_piece(piece) for piece in inner))


def tag(element: str, /, *inner: Inner, **attributes: str | None) -> Html:
    """<element attributes>inner</element>.

    Args:
        element: Its name.
        inner: Pieces as in `join`.
        attributes: Without those that are None. A trailing underscore is dropped (class_), others become hyphens.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    if element in VOID:
        return Html(f"<{element}{written}>")
    return Html(f"<{element}{written}>{join(*inner)}</{element}>")


def _piece(piece: Inner) -> str:
    if isinstance(piece, Html):
        return piece
    if isinstance(piece, str):
        return html.escape(piece)
    return join(*piece)
