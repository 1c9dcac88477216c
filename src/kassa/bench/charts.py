"""Charts as SVG text: no library, no script, no network. Colours come from the page's style, so they follow light and dark.

A drawing is as wide as a phone held upright and grows with its column, so that its words stay readable on both. What a shape
says exactly is in its `<title>`, and all of it in the page's tables.
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

WIDTH = 400
"""In units of the drawing; on a wide screen about as many pixels."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
LABEL_APART = 14


class Series(NamedTuple):
    """One broker's values at each category; None: not measured."""

    name: str
    color: str
    """The name of a class of the style: k-postgres …"""
    values: Sequence[float | None]
    is_dashed: bool = False


class Bar(NamedTuple):
    """One value with the words behind it."""

    name: str
    color: str
    value: float
    label: str
    about: str = ""


class Spread(NamedTuple):
    """Percentiles in ms; those that there were too few samples to tell are None."""

    name: str
    color: str
    p50: float
    p99: float | None
    p999: float | None
    longest: float
    about: str


class Curve(NamedTuple):
    """Rates over time, in seconds since the kill."""

    color: str
    points: Sequence[tuple[float, float, float]]
    """(seconds, confirmed/s, handled/s)."""
    started_s: float
    back_s: float | None
    load_per_s: float
    width_s: float


def _svg(height: float, about: str, inside: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(about)}">'
    return "".join((head, *inside, "</svg>"))


def _text(x: float, y: float, words: str, *, kind: str = "", anchor: str = "start") -> str:
    class_ = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{class_}>{escape(words)}</text>'


def short(value: float) -> str:
    """A number in at most five characters."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}" if value / unit < 100 else f"{value / unit:.0f}{letter}"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _decades(low: float, high: float) -> tuple[int, int]:
    first = math.floor(math.log10(low))
    return first, max(first + 1, math.ceil(math.log10(high)))


def _apart(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Places near the wanted ones, a label's height apart, between the bounds."""
    order = sorted(range(len(wanted)), key=lambda one: wanted[one])
    places = [0.0] * len(wanted)
    before = low - LABEL_APART
    for one in order:
        before = max(wanted[one], before + LABEL_APART)
        places[one] = before
    over = max(0.0, before - high)
    after = high + LABEL_APART
    for one in reversed(order):
        places[one] = min(places[one], after - LABEL_APART) if over else places[one]
        after = places[one]
    return places


def lines(categories: Sequence[str], series: Sequence[Series], about: str, *, below: str) -> str:
    """Values by category on a logarithmic scale, each line named at its end."""
    values = [value for one in series for value in one.values if value]
    if not values:
        return ""
    height, right = 264, 92
    first, last = _decades(min(values), max(values))
    bottom = height - BOTTOM - 10

    def x(place: int) -> float:
        return LEFT + 14 + place * (WIDTH - LEFT - 14 - right) / max(1, len(categories) - 1)

    def y(value: float) -> float:
        return bottom - (math.log10(value) - first) / (last - first) * (bottom - TOP)

    inside = []
    for power in range(first, last + 1):
        at = y(10.0**power)
        inside.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - right + 6}" y1="{at:.1f}" y2="{at:.1f}"/>')
        inside.append(_text(LEFT - 7, at + 4, short(10.0**power), kind="axis", anchor="end"))
    inside += [
        _text(x(place), bottom + 19, word, kind="axis", anchor="middle") for place, word in enumerate(categories)
    ]
    inside.append(_text((LEFT + WIDTH - right) / 2, height - 4, below, kind="axis", anchor="middle"))
    ends = [next((value for value in reversed(one.values) if value), None) for one in series]
    labels = iter(_apart([y(end) for end in ends if end], TOP, bottom))
    for one, end in zip(series, ends, strict=True):
        points = [(x(place), y(value), value) for place, value in enumerate(one.values) if value]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        dashed = ' stroke-dasharray="5 4"' if one.is_dashed else ""
        inside.append(f'<polyline class="line {one.color}" points="{path}"{dashed}/>')
        for (px, py, value), word in zip(
            points, (c for c, v in zip(categories, one.values, strict=True) if v), strict=True
        ):
            inside.append(
                f'<circle class="dot {one.color}" cx="{px:.1f}" cy="{py:.1f}" r="4.5">'
                f"<title>{escape(one.name)}, {escape(word)}: {value:,.0f} a second</title></circle>"
            )
        if end:
            at = next(labels)
            px, py, _ = points[-1]
            inside.append(f'<path class="lead" d="M{px + 6:.1f},{py:.1f} L{WIDTH - right + 12},{at:.1f}"/>')
            inside.append(_text(WIDTH - right + 15, at + 4, one.name, kind=f"name {one.color}"))
    return _svg(height, about, inside)


def bars(rows: Sequence[tuple[str, Sequence[Bar]]], about: str) -> str:
    """Groups of horizontal bars from zero; each says its value behind it."""
    top = max((bar.value for _, group in rows for bar in group), default=0.0)
    if top <= 0:
        return ""
    inside: list[str] = []
    at = 0.0
    for title, group in rows:
        inside.append(_text(0, at + 13, title, kind="name"))
        at += 20
        for bar in group:
            width = max(2.0, bar.value / top * (WIDTH - 165))
            inside.append(
                f'<rect class="bar {bar.color}" x="0" y="{at:.1f}" width="{width:.1f}" height="14" rx="3">'
                f"<title>{escape(title)}, {escape(bar.about or bar.name)}: {escape(bar.label)}</title></rect>"
            )
            inside.append(_text(width + 7, at + 11.5, bar.label, kind="value"))
            if bar.name:
                inside.append(_text(width + 17 + 7.6 * len(bar.label), at + 11.5, bar.name, kind="axis"))
            at += 19
        at += 9
    return _svg(at, about, inside)


def spreads(rows: Sequence[Spread], about: str, *, needed_ms: float, low: float, high: float) -> str:
    """From the median to the rarest on a logarithmic scale; what is needed is a line. low, high: common to several charts."""
    first, last = _decades(low, high)
    left, row = 86, 34
    bottom = TOP + row * len(rows) + 4

    def x(value: float) -> float:
        place = (math.log10(max(value, 10.0**first)) - first) / (last - first)
        return left + min(1.0, place) * (WIDTH - left - RIGHT - 10)

    inside = []
    for power in range(first, last + 1):
        at = x(10.0**power)
        inside.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{bottom:.1f}"/>')
        inside.append(_text(at, bottom + 16, _ms(10.0**power), kind="axis", anchor="middle"))
    if 10.0**first <= needed_ms <= 10.0**last:
        at = x(needed_ms)
        inside.append(
            f'<line class="need" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{bottom:.1f}">'
            f"<title>needed: 99 of 100 within {needed_ms:,.0f} ms</title></line>"
        )
    for place, one in enumerate(rows):
        y = TOP + row * place + row / 2
        end = one.p999 or one.p99 or one.longest
        inside.append(_text(0, y + 4, one.name, kind=f"name {one.color}"))
        inside.append(
            f'<g><title>{escape(one.about)}</title><line class="span {one.color}" x1="{x(one.p50):.1f}" x2="{x(end):.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/><circle class="dot {one.color}" cx="{x(one.p50):.1f}" cy="{y:.1f}" r="5"/>'
        )
        if one.p99 is not None:
            inside.append(f'<circle class="ring {one.color}" cx="{x(one.p99):.1f}" cy="{y:.1f}" r="5.5"/>')
        if one.p999 is not None or one.p99 is None:
            at = x(end)
            inside.append(
                f'<line class="tick {one.color}" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 7:.1f}" y2="{y + 7:.1f}"/>'
            )
        inside.append("</g>")
    return _svg(bottom + 24, about, inside)


def timeline(curve: Curve, about: str) -> str:
    """What was handled, as an area, and what was confirmed, as a line, around the kill. What is caught up is cut off at the top
    with a mark: how high it goes says how much had waited, which the outage itself says."""
    top = curve.load_per_s * 3
    height = 150
    bottom = height - 26
    begin = min((at for at, _, _ in curve.points), default=0.0)

    def x(at: float) -> float:
        return LEFT + (at - begin) / (curve.width_s - begin) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return bottom - min(value, top) / top * (bottom - TOP)

    shown = [point for point in curve.points if point[0] <= curve.width_s]
    inside = []
    if curve.back_s is not None:
        inside.append(
            f'<rect class="outage" x="{x(0):.1f}" y="{TOP}" width="{max(1.0, x(min(curve.back_s, curve.width_s)) - x(0)):.1f}" '
            f'height="{bottom - TOP}"><title>until all was normal: {curve.back_s:.1f} s</title></rect>'
        )
    for value in (0.0, top / 3):
        inside.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        inside.append(_text(LEFT - 7, y(value) + 4, short(value) if value else "0", kind="axis", anchor="end"))
    inside.append(f'<path class="area {curve.color}" d="{_area(shown, lambda one: one[2], x, y, bottom)}"/>')
    inside.append(f'<path class="thin" d="{_steps(shown, lambda one: one[1], x, y)}"/>')
    for at, words, kind in ((0.0, "kill -9", "need"), (curve.started_s, "started", "lead")):
        if at <= curve.width_s:
            inside.append(f'<line class="{kind}" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{bottom}"/>')
            inside.append(_text(x(at) + 4, TOP + (9 if kind == "need" else 22), words, kind="axis over"))
    step = next(one for one in (1, 2, 5, 10, 20, 50, 100) if (curve.width_s - begin) / one <= 9)
    for second in range(math.ceil(begin / step) * step, int(curve.width_s) + 1, step):
        inside.append(_text(x(second), bottom + 17, f"{second} s", kind="axis", anchor="middle"))
    return _svg(height, about, inside)


_Point = tuple[float, float, float]


def _steps(
    points: Sequence[_Point], of: Callable[[_Point], float], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    """A line through the middle of each step."""
    return " ".join(f"{'M' if not place else 'L'}{x(one[0]):.1f},{y(of(one)):.1f}" for place, one in enumerate(points))


def _area(
    points: Sequence[_Point], of: Callable[[_Point], float], x: Callable[[float], float], y: Callable[[float], float],
    bottom: float,
) -> str:  # fmt: skip
    if not points:
        return ""
    return f"{_steps(points, of, x, y)} L{x(points[-1][0]):.1f},{bottom} L{x(points[0][0]):.1f},{bottom} Z"


def _ms(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"
