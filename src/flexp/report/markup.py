"""HTML from nested calls; whatever is not markup already is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Text that is markup and stays as it is."""

    __slots__ = ()


def join(parts: Iterable[str]) -> Html:
    """Parts one after the other, escaped where they are plain text.

    >>> join(["a < b", Html("<hr>")])
    'a &lt; b<hr>'
    """
    return Html("".join(p if isinstance(p, Html) else html.escape(p) for p in parts))


def tag(name: str, *children: str, **attributes: str | float | None) -> Html:
    """An element; ``class_`` is class, ``_`` is a hyphen, an attribute that is None is left out.

    >>> tag("p", "<script>", class_="x", aria_label='say "a"')
    '<p class="x" aria-label="say &quot;a&quot;">&lt;script&gt;</p>'
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def _number(value: str | float) -> str:
    """A tenth of a pixel is enough."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)
