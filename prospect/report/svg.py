"""Figures for a paper: a time line and every plot as SVG of a column's width, in light colours, text as text.

Each is drawn once, here: the page offers it for download, and `--svg` writes it into a folder. Units are points; marks
and line patterns tell apart what colours do, so that a figure can be printed grey.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prospect.mistakes import MARKS

if TYPE_CHECKING:
    from prospect.report.timeline import HeadLane, StepLane, Timeline

WIDTH = 241  # points: 3.35 inches, a column of two
LEFT = 66  # of a time line's tracks
MOST_POINTS = 500  # of a curve: about two a point of width
INK, SOFT, FAINT = "#22252b", "#666c78", "#d9d6cf"
COLOURS = ("#1f6fb2", "#a86a00", "#8a4fb0", "#21845a", "#bd3b33", "#666c78")
DASHES = ("none", "5 2", "1.5 1.5", "6 2 1.5 2", "3 3", "8 3")
STATE_FILLS = ("none", "#e0a83a", "#1d6b4d")
NICE_SECONDS = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400)


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


# ---- time lines ----------------------------------------------------------------------------------


def timeline_svg(shown: "Timeline") -> str:
    """The lanes of a streamed clip, and below them those of the checkpoints beside it."""
    rows, right = len(shown.tokens), WIDTH - 4.0

    def x(row: float) -> float:
        return LEFT + (row + 0.5) / rows * (right - LEFT)

    parts, y = [text(2, 9, shown.goal or shown.id)], 14.0
    for take in (shown, *shown.beside):
        if shown.beside:
            parts.append(text(2, y + 7, take.made_by, colour=SOFT))
            y += 10
        replies = [event.row for event in take.events if event.lane == "wanted"]
        parts += head(take.speaking, "Speak now?", replies, take.evidence, COLOURS[0], x, y)
        parts += marks(take, "wanted", "due", x, y + 34) + marks(take, "said", "said", x, y + 42)
        y += 52
        if take.update is not None:
            updates = [event.row for event in take.events if event.lane == "update_wanted"]
            parts += head(take.update, "Update now?", updates, take.evidence, COLOURS[2], x, y)
            parts += marks(take, "update_wanted", "due", x, y + 34) + marks(take, "update", "written", x, y + 42)
            y += 52
        for step in take.steps:
            parts += states(step, x, y)
            y += 9
        y += 4
    seconds = rows / shown.fps
    step = next((s for s in NICE_SECONDS if seconds / s <= 5), NICE_SECONDS[-1])
    first = math.ceil(shown.seconds / step)
    for k in range(first, math.floor((shown.seconds + seconds) / step) + 1):
        at = x((k * step - shown.seconds) * shown.fps)
        if at <= right:
            parts += [
                line(at, y - 2, at, y + 1, SOFT),
                text(min(at, right - 8), y + 8, clock(k * step), "middle", SOFT),
            ]
    used = {event.status for take in (shown, *shown.beside) for event in take.events if event.status}
    meaning = [f"{mark} {name.replace('_', ' ')}" for name, mark in MARKS.items() if name in used]
    parts.append(text(2, y + 19, ", ".join(meaning), colour=SOFT, size=6))
    return figure(y + 24, *parts)


def head(
    lane: "HeadLane", name: str, due: list[int], evidence: tuple[float, float], colour: str, x, y: float
) -> list[str]:
    """A head's score, the evidence it has to reach, where it fired (dots) and where the reference acts (ticks)."""

    def at(value: float) -> float:
        return y + 28 - 24 * value

    points = [None if value is None else (x(row), at(value)) for row, value in enumerate(lane.score)]
    parts = [text(2, y + 18, name), line(x(-0.5), at(0), x(len(points) - 0.5), at(0))]
    parts += [line(x(-0.5), at(value), x(len(points) - 0.5), at(value), SOFT, "2 1.5") for value in sorted({*evidence})]
    parts += [line(x(row), at(0), x(row), at(0) + 3, INK) for row in due]
    fired = [dot(x(row), at(lane.score[row]), colour) for row in lane.fired if lane.score[row] is not None]
    return [*parts, path(thinned(points), colour), *fired]


def marks(take: "Timeline", lane: str, name: str, x, y: float) -> list[str]:
    """What became of each text of a lane, as a mark; a bar where nothing is judged."""
    events = [event for event in take.events if event.lane == lane]
    return [text(8, y + 6, name, colour=SOFT)] * bool(events) + [
        text(x(event.row), y + 6, MARKS.get(event.status, "|"), "middle") for event in events
    ]


def states(step: "StepLane", x, y: float) -> list[str]:
    """A step's state: predicted above, as it should be below. Darker is further."""
    parts = [text(2, y + 5.5, f"{step.id} {step.name}"[:19], size=6)]
    for runs, top in ((step.predicted, y), (step.reference or [], y + 3.5)):
        for first, last, state in runs:
            place = f'x="{x(first - 0.5):.1f}" y="{top:.1f}" width="{x(last + 0.5) - x(first - 0.5):.1f}" height="3"'
            parts.append(f'<rect {place} fill="{STATE_FILLS[state]}"/>' if state else "")
    return [*filter(None, parts), line(x(-0.5), y + 8, x(step.predicted[-1][1] + 0.5), y + 8)]
