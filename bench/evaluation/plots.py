"""The report's plots as SVG in the page's colours: the spread of a figure by row, and what one figure costs another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddengine.bench.evaluation.markup import Html, h

ROW, RIGHT = 30, 18
# Drawn for a wide and for a narrow page, whose letters would else be too small: width, room for labels.
FORMS = (("wide", 520, 124), ("narrow", 340, 112))


Axis = tuple[float, float, list[float]]  # from, to, ticks


@dataclass(frozen=True)
class Spread:
    """A row of a spread plot: every sample's value, the mean with its standard error, what the paper states."""

    name: str
    values: Sequence[float]
    mean: float | None
    error: float | None
    paper: float | None = None
    main: bool = False


def spreads(title: str, rows: Sequence[Spread], digits: int) -> Html:
    """Each row's samples as dots, the mean as a bar with twice its standard error, the paper's mean as a diamond."""
    known = sorted(value for row in rows for value in row.values)
    marks = [value for row in rows for value in (row.mean, row.paper) if value is not None]
    if not known:
        return Html("")
    # A few samples far out would press all others into a corner; they are drawn at the edge.
    low, high = known[int(0.03 * (len(known) - 1))], known[math.ceil(0.985 * (len(known) - 1))]
    axis = _axis(min([low, *marks]), max([high, *marks]))
    caption = "; ".join(
        f"{row.name}: {row.mean:.{digits}f}" + (f" (paper {row.paper:.{digits}f})" if row.paper is not None else "")
        for row in rows
        if row.mean is not None
    )
    drawings = [_svg(form, width, *_spreads(rows, axis, width, gutter)) for form, width, gutter in FORMS]
    return _figure(title, caption, drawings)


def _spreads(rows: Sequence[Spread], axis: Axis, width: int, gutter: int) -> tuple[float, list[Html]]:
    low, high, ticks = axis
    top = 8

    def x(value: float) -> float:
        return gutter + (width - gutter - RIGHT) * min(1.0, max(0.0, (value - low) / (high - low)))

    bottom = top + ROW * len(rows)
    parts: list[Html] = []
    for tick in ticks:
        parts += [_line("grid", (x(tick), top), (x(tick), bottom)), _text(_number(tick), x(tick), bottom + 16, "tick")]
    for number, row in enumerate(rows):
        y = top + ROW * (number + 0.5)
        kind = "main" if row.main else "other"
        words = [row.name] if len(row.name) < 13 else row.name.rsplit(" ", 1)
        for index, word in enumerate(words):
            place = y + 4 + 13 * (index - (len(words) - 1) / 2)
            parts.append(_text(word, gutter - 12, place, f"label {kind}", "end"))
        # Spread over the row's height evenly, and the same each time.
        spots = [(value, x(value), y + (((index * 0.618034) % 1) - 0.5) * 15) for index, value in enumerate(row.values)]
        parts.append(_dots([(a, b) for value, a, b in spots if low <= value <= high], f"dots {kind}"))
        parts += [
            h("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2, class_="edge")
            for value, a, b in spots
            if not low <= value <= high
        ]
        if row.mean is not None:
            spread, at = 2 * (row.error or 0), x(row.mean)
            parts.append(_line("span", (x(row.mean - spread), y), (x(row.mean + spread), y)))
            parts.append(
                h("rect", x=f"{at - 1.75:.1f}", y=f"{y - 9:.1f}", width=3.5, height=18, rx=1.75, class_=f"mean {kind}")
            )
        if row.paper is not None:
            parts.append(_diamond(x(row.paper), y))
    return bottom + 24, parts


def trade(
    title: str,
    points: Mapping[str, tuple[float, float]],
    papers: Mapping[str, tuple[float, float]],
    axes: tuple[str, str],
    main: str,
) -> Html:
    """Each row as a point of two figures, ours filled and the paper's hollow."""
    if len(points) < 2:
        return Html("")
    everything = list(zip(*points.values(), *papers.values(), strict=True))
    x_axis, y_axis = (_axis(*_padded(min(values), max(values))) for values in everything)
    caption = "; ".join(f"{name}: {a:g}, {b:g}" for name, (a, b) in points.items())
    drawings = []
    for form, width, gutter in FORMS:
        room = gutter - 8  # for the labels of the points furthest right
        drawings.append(_svg(form, width, *_trade(points, papers, (x_axis, y_axis), axes, main, width, room)))
    return _figure(title, caption, drawings)


def _trade(
    points: Mapping[str, tuple[float, float]],
    papers: Mapping[str, tuple[float, float]],
    ranges: tuple[Axis, Axis],
    axes: tuple[str, str],
    main: str,
    width: int,
    room: int,
) -> tuple[float, list[Html]]:
    (x0, x1, x_ticks), (y0, y1, y_ticks) = ranges
    left, top, bottom, right = 46, 26, 240, width - room

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (point[0] - x0) / (x1 - x0), (point[1] - y0) / (y1 - y0)
        return left + (right - left) * x, bottom - (bottom - top) * y

    parts: list[Html] = []
    for tick in x_ticks:
        x, _ = at((tick, y0))
        parts += [_line("grid", (x, top), (x, bottom)), _text(_number(tick), x, bottom + 16, "tick")]
    for tick in y_ticks:
        _, y = at((x0, tick))
        parts += [_line("grid", (left, y), (right, y)), _text(_number(tick), left - 8, y + 4, "tick", "end")]
    parts += [
        _text(axes[1], left - 38, top - 12, "axis", "start"),
        _text(axes[0], right, bottom + 34, "axis", "end"),
    ]
    for name, point in papers.items():
        if name in points:
            parts.append(_line("tie", at(points[name]), at(point)))
        parts.append(_diamond(*at(point)))
    places = {name: at(point) for name, point in points.items()}
    heights = _apart(places, top, bottom)
    for name, (x, y) in places.items():
        kind = "main" if name == main else "other"
        parts += [
            _line("tie", (x + 6, y), (x + 12, heights[name])),
            h("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=5, class_=f"point {kind}"),
            _text(name, x + 14, heights[name] + 4, f"label {kind}", "start"),
        ]
    return bottom + 44, parts


def _figure(title: str, caption: str, drawings: Sequence[Html]) -> Html:
    return h("figure", h("figcaption", title), h("p", caption, class_="unseen"), list(drawings), class_="plot")


def _svg(form: str, width: int, height: float, parts: Sequence[Html]) -> Html:
    return h("svg", list(parts), viewBox=f"0 0 {width} {height:g}", aria_hidden="true", class_=f"form-{form}")


def _line(kind: str, a: tuple[float, float], b: tuple[float, float]) -> Html:
    return h("line", x1=f"{a[0]:.1f}", y1=f"{a[1]:.1f}", x2=f"{b[0]:.1f}", y2=f"{b[1]:.1f}", class_=kind)


def _text(words: str, x: float, y: float, kind: str, anchor: str = "middle") -> Html:
    return h("text", words, x=f"{x:.1f}", y=f"{y:.1f}", class_=kind, text_anchor=anchor)


def _dots(places: Sequence[tuple[float, float]], kind: str) -> Html:
    """All as one path of points with round ends: a set has thousands of them."""
    return h("path", d="".join(f"M{x:.1f} {y:.1f}h0" for x, y in places) or "M0 0", class_=kind)


def _padded(low: float, high: float) -> tuple[float, float]:
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _diamond(x: float, y: float) -> Html:
    return h("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z", class_="paper")


def _apart(points: Mapping[str, tuple[float, float]], top: float, bottom: float) -> dict[str, float]:
    """Heights for labels to the right of points such that labels of near points do not cover each other."""
    placed: dict[str, float] = {}
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        near = [placed[other] for other in placed if abs(points[other][0] - x) < 110]
        placed[name] = max([y, *(height + 15 for height in near if height + 15 > y)])
    over = max(0.0, max(placed.values()) - bottom + 4)
    return {name: max(top, height - over) for name, height in placed.items()}


def _axis(low: float, high: float) -> Axis:
    """A range that ends at round numbers, and the ticks in it."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return first * step, last * step, [round(k * step, 10) for k in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\u2212")
