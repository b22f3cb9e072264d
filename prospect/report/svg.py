"""Figures for a paper as SVG: a column's width, light colours, text as text; plots, and the pieces of a time line.

Each figure is drawn once, in Python: the page offers it for download, and `--svg` writes it into a folder. Units are
points; marks and line patterns tell apart what colours do, so that a figure can be printed grey.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 241  # points: 3.35 inches, a column of two
MOST_POINTS = 500  # of a curve: about two a point of width
INK, SOFT, FAINT = "#22252b", "#666c78", "#d9d6cf"
COLOURS = ("#1f6fb2", "#a86a00", "#8a4fb0", "#21845a", "#bd3b33", "#666c78")
DASHES = ("none", "5 2", "1.5 1.5", "6 2 1.5 2", "3 3", "8 3")


@dataclass
class Line:
    """A curve of a plot: points (x, y), a None interrupts it. dots: each is a point; else their mean is drawn, too."""

    name: str
    points: list[tuple[float, float] | None]
    dots: bool = False


# ---- pieces --------------------------------------------------------------------------------------


def figure(height: float, *parts: str) -> str:
    size = f'width="{WIDTH}pt" height="{height:g}pt" viewBox="0 0 {WIDTH} {height:g}"'
    style = 'font-family="Helvetica, Arial, sans-serif" font-size="7" fill="none" stroke-linejoin="round"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = INK, size: float = 7) -> str:
    shown = html.escape("".join(letter if letter.isprintable() else " " for letter in words))
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
    return f'<text {where} fill="{colour}">{shown}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = FAINT, dash: str = "none") -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="0.5" stroke-dasharray="{dash}"/>'


def path(points: Sequence[tuple[float, float] | None], colour: str, dash: str = "none", opacity: float = 1) -> str:
    found, down = "", False
    for point in points:
        if point is not None:
            found += f"{'L' if down else 'M'}{point[0]:.1f} {point[1]:.1f}"
        down = point is not None
    look = f'stroke="{colour}" stroke-width="0.9" stroke-dasharray="{dash}" stroke-opacity="{opacity:g}"'
    return f'<path d="{found}" {look}/>' if found else ""


def dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.4" fill="{colour}"/>'


def thinned(points: list[tuple[float, float] | None]) -> list[tuple[float, float] | None]:
    """At most MOST_POINTS: of each stretch of a longer curve its lowest and its highest point."""
    size = math.ceil(2 * len(points) / MOST_POINTS)
    if size < 3:
        return points
    found = []
    for begin in range(0, len(points), size):
        stretch = [point for point in points[begin : begin + size] if point is not None]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])} if stretch else {None}
        found += sorted(ends, key=lambda p: 0 if p is None else p[0])
    return found


def smoothed(points: list[tuple[float, float] | None]) -> list[tuple[float, float] | None]:
    """Each value as the mean of those around it, over a fiftieth of the curve, as on the page."""
    reach, found = len(points) // 100, []
    for i, point in enumerate(points):
        near = [other[1] for other in points[max(0, i - reach) : i + reach + 1] if other is not None]
        found.append(None if point is None else (point[0], sum(near) / len(near)))
    return found


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round values from low to high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def clock(seconds: float) -> str:
    """1047.5 -> 17:27.5, 7200 -> 2:00:00"""
    tenths = round(seconds * 10)
    rest = f"{tenths % 600 / 10:04.1f}".removesuffix(".0")
    minutes = tenths // 600
    return f"{minutes}:{rest}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest}"


# ---- plots ---------------------------------------------------------------------------------------


def scale_of(lines: Sequence[Line], last: float, falls: bool) -> tuple[float, float]:
    """The lowest and highest value that a plot shows. falls: as losses do, of whose first tenth none is the highest."""
    points = [point for one in lines for point in one.points if point is not None] or [(0.0, 0.0)]
    low = min(y for _, y in points)
    high = max([y for x, y in points if x > last / 10 or not falls] or [y for _, y in points])
    if 0 <= low < 0.6 * high:
        low = 0.0
    if low == high:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low, high


def plot(title: str, lines: Sequence[Line], below: str, last: float, scale: tuple[float, float]) -> str:
    """A plot of curves over 0..last, from scale[0] to scale[1]. below: what is along its foot."""
    low, high = scale
    left, right, top, bottom = 34.0, WIDTH - 8.0, 16.0, 116.0

    def at(point: tuple[float, float] | None) -> tuple[float, float] | None:
        """Where a point is; None above the scale."""
        if point is None or point[1] > high + 0.02 * (high - low):
            return None
        return left + point[0] / last * (right - left), bottom - (point[1] - low) / (high - low) * (bottom - top)

    parts = [text(left, 9, title)]
    for tick in ticks(low, high, 4):
        _, y = at((0, tick))
        parts += [line(left, y, right, y), text(left - 3, y + 2.4, f"{tick:g}", "end", SOFT)]
    for tick in ticks(0, last, 4):
        parts.append(text(left + tick / last * (right - left), bottom + 9, f"{tick:g}", "middle", SOFT))
    parts.append(text((left + right) / 2, bottom + 18, below, "middle", SOFT))
    for number, one in enumerate(lines):
        colour, dash = COLOURS[number % 6], DASHES[number % 6]
        points = [at(point) for point in thinned(one.points)]
        if one.dots:
            parts += [path(points, colour, dash), *(dot(*point, colour) for point in points if point is not None)]
        else:
            mean = [at(point) for point in thinned(smoothed(one.points))]
            parts += [path(points, colour, opacity=0.25), path(mean, colour, dash)]
        if len(lines) > 1:
            y = bottom + 28 + 9 * number
            parts += [path([(left, y - 2), (left + 16, y - 2)], colour, dash), text(left + 20, y, one.name)]
    return figure(bottom + 22 + (9 * len(lines) if len(lines) > 1 else 0), *parts)
