"""Charts as inline SVG; every series differs in colour, dash and marker."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flexp.report.markup import Html, join, tag

COLOURS = 7  # classes c0 to c6 of the style sheet
DASHES = (None, "7 4", "2 3", "10 3 2 3", "14 5")
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5.5L5 4H-5z",
    "M0 -6L6 0L0 6L-6 0z",
    "M0 5.5L5 -4H-5z",
    "M-4 -4L4 4M-4 4L4 -4",
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 304, 72, 16, 30, 50
LABELLED = 12  # more names than this would hide the marks

Axis = Callable[[float], str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line; ``look`` chooses colour, dash and marker, and without one it is thin and grey."""

    label: str
    points: tuple[Point, ...]
    look: int | None = None


@dataclass(frozen=True)
class Mark:
    """A place in a scatter plot; the mean over clients is ``bold``."""

    label: str
    series: str
    x: float
    y: float
    look: int
    bold: bool = False


@dataclass(frozen=True)
class Plane:
    """Where values are on the picture; ``x`` and ``y`` are the ends of the axes."""

    x: Point
    y: Point
    height: int = HEIGHT
    right: int = RIGHT

    def at(self, x: float, y: float) -> Point:
        """A point in the units of the view box."""
        (x0, x1), (y0, y1) = self.x, self.y
        wide, high = WIDTH - LEFT - self.right, self.height - TOP - BOTTOM
        return LEFT + (x - x0) / (x1 - x0) * wide, TOP + (y1 - y) / (y1 - y0) * high


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers that enclose a range.

    >>> ticks(0.13, 0.9)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(1, 3, whole=True)
    [1.0, 2.0, 3.0]
    """
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / count))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * count >= spread * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [round(n * step, 10) for n in range(first, last + 1)]


def marker(look: int, x: float = 0.0, y: float = 0.0, *, bold: bool = False) -> Html:
    """The mark of a series at a place."""
    return tag(
        "path",
        d=MARKERS[look % len(MARKERS)],
        transform=f"translate({x:.1f} {y:.1f}) scale({1.5 if bold else 1})",
        class_=f"mark c{look % COLOURS}{' bold' if bold else ''}",
    )


def legend(labels: Sequence[str], *, joined: bool = True) -> Html:
    """Which look is which method; ``joined`` if it has a line."""
    items: list[Html] = []
    for look, label in enumerate(labels):
        parts = [_stroke(look, "M0 7H34")] if joined else []
        key = tag("svg", *parts, marker(look, 17, 7), width=34, height=14, aria_hidden="true")
        items.append(tag("li", key, label))
    return tag("ul", *items, class_="legend")


def drawable(series: Series) -> Series:
    """Without the points that have no place on a picture."""
    return replace(series, points=tuple(p for p in series.points if math.isfinite(p[1])))


def lines(series: Sequence[Series], names: tuple[str, str], alt: str) -> Html:
    """Lines over rounds, of which one at least has a point; few thin ones are named."""
    drawn = [drawable(s) for s in series]
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    thin = [s for s in drawn if s.look is None and s.points]
    named = thin if len(thin) <= LABELLED else []
    x_ticks, y_ticks = ticks(min(xs), max(xs), 8, whole=True), ticks(min(ys), max(ys))
    right = 96 if named else RIGHT
    plane = Plane((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), right=right)
    parts = [_frame(plane, x_ticks, y_ticks, names), *(_line(s, plane) for s in drawn)]
    return _picture([*parts, *_end_names(named, plane)], HEIGHT, alt)


def _line(series: Series, plane: Plane) -> Html:
    """A path that is broken where a round is missing."""
    path, before = "", -math.inf
    for x, y in series.points:
        px, py = plane.at(x, y)
        # A line of no length is drawn as a dot: a round between two missing ones is seen.
        path += f"L{px:.1f} {py:.1f}" if x - before == 1 else f"M{px:.1f} {py:.1f}h0"
        before = x
    if series.look is None:
        return tag("path", tag("title", series.label), d=path, class_="thin")
    every = max(1, len(series.points) // 12)
    marks: list[Html] = []
    for n, (x, y) in enumerate(series.points):
        if n % every == 0 or n == len(series.points) - 1:
            said = tag("title", f"{series.label}, {x:g}: {y:.3f}")
            marks.append(tag("g", said, marker(series.look, *plane.at(x, y))))
    return join([_stroke(series.look, path), *marks])


def _stroke(look: int, path: str) -> Html:
    dash = DASHES[look % len(DASHES)]
    return tag("path", d=path, class_=f"line c{look % COLOURS}", stroke_dasharray=dash)


def _end_names(series: Sequence[Series], plane: Plane) -> list[Html]:
    """Names at the ends of lines, pushed apart where the ends are close, up from the axis."""
    spots = sorted(((*plane.at(*s.points[-1]), s.label) for s in series), key=lambda p: -p[1])
    out: list[Html] = []
    last = plane.height - BOTTOM + 16.0
    for x, y, label in spots:
        last = min(y, last - 16)
        out.append(tag("path", d=f"M{x + 3:.1f} {y:.1f}L{x + 11:.1f} {last:.1f}", class_="lead"))
        out.append(tag("text", clip(label, 11), x=x + 13, y=last + 4))
    return out


def scatter(marks: Sequence[Mark], names: tuple[str, str], axis: Axis, alt: str) -> Html:
    """Marks on two axes of one scale, so that equal values lie on the drawn diagonal."""
    values = [v for m in marks for v in (m.x, m.y)]
    low, high = min(values), max(values)
    room = 0.07 * ((high - low) or abs(high) or 1.0)  # no mark lies on an axis
    ends = low - room, high + room
    found = [t for t in ticks(*ends) if ends[0] <= t <= ends[1]]
    plane = Plane(ends, ends, WIDTH - LEFT - RIGHT + TOP + BOTTOM)
    (x0, y0), (x1, y1) = plane.at(ends[0], ends[0]), plane.at(ends[1], ends[1])
    parts = [
        _frame(plane, found, found, names, axis),
        tag("path", d=f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}", class_="diagonal"),
    ]
    for m in sorted(marks, key=lambda m: m.bold):
        said = f"{m.label}, {m.series}: {names[0]} {axis(m.x)}, {names[1]} {axis(m.y)}"
        drawn = marker(m.look, *plane.at(m.x, m.y), bold=m.bold)
        parts.append(tag("g", tag("title", said), drawn))
    return _picture([*parts, *_names(marks, plane)], plane.height, alt)


def _names(marks: Sequence[Mark], plane: Plane) -> list[Html]:
    """Names beside marks; those at one place share a label, and none lies on another."""
    groups: dict[Point, dict[str, None]] = {}
    for m in marks:
        groups.setdefault(plane.at(m.x, m.y), {})[m.label] = None
    if len(groups) > LABELLED:
        return []
    out: list[Html] = []
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in groups]
    for (x, y), labels in groups.items():
        text = clip(", ".join(labels), 24)
        wide = 8.0 * len(text)
        flip = x + 11 + wide > WIDTH
        left = x - 11 - wide if flip else x + 11
        box = (left, y - 8, left + wide, y + 8)
        if left < LEFT or any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        side, place = ("end", x - 11) if flip else ("start", x + 11)
        out.append(tag("text", text, x=place, y=y + 4, text_anchor=side))
    return out


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _frame(
    plane: Plane,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    names: tuple[str, str],
    axis: Axis = "{:g}".format,
) -> Html:
    """Grid, numbers and names of both axes."""
    left, bottom = plane.at(plane.x[0], plane.y[0])
    right, _ = plane.at(plane.x[1], plane.y[1])
    heights = [plane.at(plane.x[0], y)[1] for y in y_ticks]
    grid = "".join(f"M{left:.1f} {height:.1f}H{right:.1f}" for height in (*heights, bottom))
    parts = [tag("path", d=grid, class_="grid")]
    for y, height in zip(y_ticks, heights, strict=True):
        parts.append(tag("text", axis(y), x=left - 7, y=height + 4, text_anchor="end"))
    for x in x_ticks:
        place = plane.at(x, plane.y[0])[0]
        parts.append(tag("text", axis(x), x=place, y=bottom + 18, text_anchor="middle"))
    middle = (left + right) / 2
    name = tag("text", names[0], x=middle, y=bottom + 42, class_="name", text_anchor="middle")
    parts += [name, tag("text", names[1], x=0, y=TOP - 16, class_="name")]
    return join(parts)


def _picture(parts: Sequence[str], height: int, alt: str) -> Html:
    """An SVG that is as wide as its place; ``alt`` says it to those who do not see it."""
    box = f"0 0 {WIDTH} {height}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=alt, class_="chart")


def bar(share: float, look: int) -> Html:
    """A horizontal bar; ``share`` is its part of the widest one."""
    rect = tag("rect", width=100 * share, height=10, class_=f"fill c{look % COLOURS}")
    return _strip([rect])


def blocks(front: int, server: int, back: int) -> Html:
    """A model as a strip of blocks: high at the device, low at the server."""
    size = 100 / max(1, front + server + back)
    gap = min(1.0, size / 5)
    parts: list[Html] = []
    first = 0
    for kind, count in (("front", front), ("server", server), ("back", back)):
        if count > 0:
            path = f"M{first * size:.2f} 5H{(first + count) * size:.2f}"
            dash = f"{size - gap:.3f} {gap:.3f}"
            parts.append(tag("path", d=path, class_=f"block {kind}", stroke_dasharray=dash))
        first += count
    return _strip(parts)


def _strip(parts: Sequence[str]) -> Html:
    box = {"viewBox": "0 0 100 10", "preserveAspectRatio": "none"}
    return tag("svg", *parts, **box, class_="strip", aria_hidden="true")


def clip(text: str, most: int) -> str:
    """A text that is cut where it would be too long."""
    return text if len(text) <= most else text[: most - 1] + "…"
