"""Pictures as SVG that stands inside a page: no script, no font of its own, and the page's colours, in light and in dark.

Each function returns markup in which every word is escaped. Sizes are in the units of a picture `WIDTH` wide.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 440
LEFT, RIGHT, BELOW = 52, 12, 34
LEVELS = 8
"""Shades of use in the map of experts."""


@dataclass(frozen=True)
class Point:
    """A point of a plane; `label` is what its tooltip says."""

    x: float
    y: float
    label: str = ""
    kind: str = "dot"
    """Its class: dot, mark or here."""


@dataclass(frozen=True)
class Range:
    """A row of a chart of ranges: a value with its interval, and what it is to be compared with."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    original: float | None = None
    original_interval: tuple[float, float] | None = None
    chance: float | None = None
    words: str = ""


def number(value: float) -> str:
    """A number of an axis or a label, short."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        power = min(4, int(math.log10(abs(value)) // 3))
        return f"{value / 1000**power:.3g}{' kMGT'[power]}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two numbers, about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def experts(rows: Sequence[tuple[int, int, frozenset[int] | None, Sequence[float]]]) -> Markup:
    """The map of experts: a row for each layer, (number, experts, those that stay or None for all, the use of each or empty).

    A cell has the stronger colour, the more tokens its expert computes; what went is crossed out.
    """
    columns = max((count for _, count, _, _ in rows), default=0)
    if not columns:
        return Markup("")
    cell = max(5, min(28, 640 // columns))
    gap = 1 if cell > 7 else 0
    most = max((max(use, default=0.0) for *_, use in rows), default=0.0)
    paths: dict[tuple[bool, int], list[str]] = {}
    crosses, labels = [], []
    every = max(1, math.ceil(14 / cell))
    for at, (number_, count, kept, use) in enumerate(rows):
        y = at * cell + 18
        if at % every == 0 or (at == len(rows) - 1 and (len(rows) - 1) % every > every / 2):
            labels.append(f'<text x="34" y="{y + cell / 2 + 4:g}" text-anchor="end">{number_}</text>')
        for e in range(count):
            x, size = 40 + e * cell, cell - gap
            stays = kept is None or e in kept
            level = math.ceil(LEVELS * math.sqrt(use[e] / most)) if most and e < len(use) else -1
            paths.setdefault((stays, level), []).append(f"M{x} {y}h{size}v{size}h-{size}z")
            if not stays:
                crosses.append(f"M{x + 1} {y + 1}l{size - 2} {size - 2}m0 -{size - 2}l-{size - 2} {size - 2}")
    top = "".join(
        f'<text x="{40 + e * cell + cell / 2:g}" y="12" text-anchor="middle">{e}</text>'
        for e in range(0, columns, max(1, math.ceil(26 / cell)))
    )
    drawn = "".join(
        f'<path class="{"kept" if stays else "gone"} u{"x" if level < 0 else level}" d="{"".join(d)}"/>'
        for (stays, level), d in sorted(paths.items())
    )
    width, height = 40 + columns * cell + 4, len(rows) * cell + 22
    return Markup(
        f'<svg class="map" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="experts by layer">{top}{"".join(labels)}{drawn}<path class="cross" d="{"".join(crosses)}"/></svg>'
    )


def bars(values: Sequence[tuple[str, float]], *, axis: str, log: bool = False) -> Markup:
    """A bar for each layer: label and value, none of them negative."""
    height = 150
    top = max((v for _, v in values), default=0.0) or 1.0
    least = min((v for _, v in values if v > 0), default=top)
    log = log and top / least > 100
    low = 10 ** math.floor(math.log10(least)) if log else 0.0
    rise = _scale(low, top, height - BELOW, 12, log=log)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    wide = max(1.0, min(26.0, step * 0.7))
    parts = [_grid_y(low, top, rise, log=log)]
    every = max(1, math.ceil(22 / step))
    for at, (label, value) in enumerate(values):
        x = LEFT + (at + 0.5) * step
        y = rise(max(value, low)) if value > 0 else height - BELOW
        parts.append(
            f'<rect class="bar" x="{x - wide / 2:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{height - BELOW - y:.1f}" rx="1.5">'
            f"<title>{escape(label)}: {number(value)}</title></rect>"
        )
        if at % every == 0:
            parts.append(f'<text x="{x:.1f}" y="{height - BELOW + 14}" text-anchor="middle">{escape(label)}</text>')
    return _svg(height, parts, axis, below="layer")


def plane(points: Iterable[Point], *, x: str, y: str, line: bool = True, x_unit: float = 1.0) -> Markup:
    """Points over two axes, the upright one logarithmic; those of kind "dot" are joined from left to right."""
    every = [*points]
    shown = [p for p in every if p.y > 0]
    if not shown:
        return Markup("")
    height = 230
    least, most = min(p.y for p in shown), max(p.y for p in shown)
    low, high = 10 ** math.floor(math.log10(max(least, most * 1e-8))), most * 1.3
    left, right = min(p.x for p in every) / x_unit, max(p.x for p in every) / x_unit
    pad = (right - left) * 0.04 or 1.0
    across, rise = _scale(left - pad, right + pad, LEFT, WIDTH - RIGHT), _scale(low, high, height - BELOW, 12, log=True)
    at = [(across(p.x / x_unit), rise(max(p.y, low)), p) for p in every]
    parts = [_grid_y(low, high, rise, log=True), _grid_x(left - pad, right + pad, across, height)]
    joined = sorted((px, py) for px, py, p in at if p.kind == "dot")
    if line and len(joined) > 1:
        parts.append(f'<polyline class="line" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in joined)}"/>')
    for px, py, p in sorted(at, key=lambda one: one[2].kind == "here"):
        title = f"<title>{escape(p.label)}</title>"
        parts.append(
            f'<circle class="{p.kind}" cx="{px:.1f}" cy="{py:.1f}" r="{ {"dot": 3, "mark": 4}.get(p.kind, 6) }">{title}</circle>'
        )
    return _svg(height, parts, y, below=x)


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> Markup:
    """Lines over two axes, by their names; the second and further ones have points, too."""
    every = [p for points in lines.values() for p in points]
    if not every:
        return Markup("")
    height = 200
    low, high = min(v for _, v in every), max(v for _, v in every)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    right = max(n for n, _ in every)
    across, rise = _scale(0, right or 1, LEFT, WIDTH - RIGHT), _scale(low - pad, high + pad, height - BELOW, 12)
    parts = [_grid_y(low - pad, high + pad, rise), _grid_x(0, right or 1, across, height)]
    for at, (name, points) in enumerate(lines.items()):
        line = " ".join(f"{across(n):.1f},{rise(v):.1f}" for n, v in thinned(points))
        parts.append(f'<polyline class="line c{min(at, 3)}" points="{line}"><title>{escape(name)}</title></polyline>')
        if at:
            parts += [f'<circle class="dot c{min(at, 3)}" cx="{across(n):.1f}" cy="{rise(v):.1f}" r="2.5"/>' for n, v in points]
    return _svg(height, parts, y, below=x)


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most so many of the points, evenly, with the last."""
    every = math.ceil(len(points) / most) or 1
    return [*points[::every], *([points[-1]] if points and (len(points) - 1) % every else [])]


def ranges(rows: Sequence[Range], *, zero: bool) -> Markup:
    """A row for each value: a dot with its interval, the original's ring above it, and a tick where guessing would be."""
    if not rows:
        return Markup("")
    ends = [
        v for r in rows for v in (r.value, *(r.interval or ()), r.original, *(r.original_interval or ()), r.chance) if v is not None
    ]
    low, high = min([*ends, *([0.0] * zero)]), max(ends)
    pad = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    across = _scale(0.0 if zero and low == 0 else low - pad, high + pad, 12, WIDTH - RIGHT)
    height = 42 * len(rows) + BELOW - 4
    parts = [_grid_x(low - (0 if zero and low == 0 else pad), high + pad, across, height)]
    for at, r in enumerate(rows):
        y = 42 * at + 28
        parts.append(f'<text class="name" x="12" y="{y - 13}">{escape(r.label)}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 13}" text-anchor="end">{escape(r.words)}</text>')
        if r.chance is not None:
            parts.append(
                f'<path class="chance" d="M{across(r.chance):.1f} {y - 8}v16"><title>guessing: {number(r.chance)}</title></path>'
            )
        if r.original is not None:
            parts.append(_whisker(across, r.original_interval, y - 4, "before"))
            parts.append(f'<circle class="before" cx="{across(r.original):.1f}" cy="{y - 4}" r="4"/>')
        parts.append(_whisker(across, r.interval, y + 4, "after"))
        parts.append(f'<circle class="after" cx="{across(r.value):.1f}" cy="{y + 4}" r="4"/>')
    return _svg(height, parts, "", below="")


class _scale:
    """From values between two ends to places between two others."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, log: bool = False) -> None:
        self.f = math.log10 if log else float
        self.low, self.high, self.start, self.stop = self.f(low), self.f(high), start, stop

    def __call__(self, value: float) -> float:
        part = (self.f(value) - self.low) / ((self.high - self.low) or 1.0)
        return self.start + part * (self.stop - self.start)


def _whisker(across: "_scale", interval: tuple[float, float] | None, y: float, kind: str) -> str:
    if interval is None:
        return ""
    a, b = (across(v) for v in interval)
    return f'<path class="{kind}" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 3}v6M{b:.1f} {y - 3}v6"/>'


def _grid_y(low: float, high: float, rise: "_scale", *, log: bool = False) -> str:
    if log:
        powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        every = max(1, math.ceil(len(powers) / 5))
        at = [10.0**n for n in powers][::every]
    else:
        at = ticks(low, high)
    lines = (f'<path class="grid" d="M{LEFT} {rise(v):.1f}H{WIDTH - RIGHT}"/>' for v in at)
    words = (f'<text x="{LEFT - 6}" y="{rise(v) + 4:.1f}" text-anchor="end">{number(v)}</text>' for v in at)
    return "".join([*lines, *words])


def _grid_x(low: float, high: float, across: "_scale", height: float) -> str:
    at = ticks(low, high)
    lines = (f'<path class="grid" d="M{across(v):.1f} 8V{height - BELOW}"/>' for v in at)
    words = (f'<text x="{across(v):.1f}" y="{height - BELOW + 14}" text-anchor="middle">{number(v)}</text>' for v in at)
    return "".join([*lines, *words])


def _svg(height: float, parts: Iterable[str], axis: str, *, below: str) -> Markup:
    names = f'<text class="axis" x="2" y="9">{escape(axis)}</text>' if axis else ""
    if below:
        names += f'<text class="axis" x="{WIDTH - RIGHT}" y="{height - 6}" text-anchor="end">{escape(below)}</text>'
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(axis or "chart")}">'
        f"{''.join(parts)}{names}</svg>"
    )
