"""Line charts as SVG inside a page: axes with round numbers, error bars, and a shape as well as a colour a series.

Colours come from the page's style (``.s0``, ``.s1`` …), so that they follow its light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 480, 292
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 46
MOST_OWN, OWN_ROOM = 9, 36
"""A horizontal axis has numbers at so many values themselves, at least so many pixels apart."""
SERIES = 6
"""How many series can be told apart; further ones begin again."""


@dataclass(frozen=True)
class Point:
    """One value with its standard error (NaN: none); ``hollow`` ones are drawn as rings."""

    x: float
    y: float
    error: float = math.nan
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """A line through ``points``; ``look`` chooses colour and shape."""

    name: str
    points: Sequence[Point]
    look: int


@dataclass(frozen=True)
class SecondAxis:
    """Another scale for the same values, on the right: ``of`` says what a value is on it."""

    label: str
    of: Callable[[float], float]


@dataclass(frozen=True)
class Frame:
    """Where values lie in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    right: float

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - BOTTOM - TOP)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most ``most`` round numbers from ``low`` to ``high``, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [number * step for number in range(first, last + 1)]


def labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """The numbers of an axis, with as many decimals as tell them apart."""
    if percent:
        values = [100 * value for value in values]
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    sign = " %" if percent else ""
    return [f"{value + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}") + sign for value in values]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    percent: bool = False,
    limit: tuple[float, str] | None = None,
    second: SecondAxis | None = None,
    whole_x: bool = False,
) -> str:
    """Return an ``<svg>`` with one line a series.

    Args:
        title: what it shows, for those who cannot see it.
        from_zero: the vertical axis begins at 0.
        percent: values are shares.
        limit: a horizontal line at a value; not drawn where it lies far above everything.
        second: a scale on the right.
        whole_x: the horizontal axis counts, such as layers.
    """
    frame = _frame(series, from_zero, limit, second is not None)
    parts = [
        _grid(frame, x_label, y_label, percent, _x_values(frame, series, whole_x)),
        _second_axis(frame, second) if second else "",
        _limit(frame, limit[0]) if limit and is_drawn(limit, series) else "",
        *(_line(frame, each) for each in series),
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def is_drawn(limit: tuple[float, str], series: Sequence[Series]) -> bool:
    """Whether a horizontal line is near enough to what is drawn to be shown with it."""
    return limit[0] < 3 * max(
        (point.y for each in series for point in each.points if math.isfinite(point.y)), default=0
    )


def legend(series: Sequence[Series], limit: tuple[float, str] | None = None) -> str:
    """Names beside the shapes of the lines, as HTML; last that of a horizontal line, where it is drawn."""
    entries = [
        f'<li><svg viewBox="0 0 26 12" class="key s{each.look % SERIES}" aria-hidden="true">'
        f'<path class="line" d="M1 6H25"/>{_marker(each.look, 13, 6, False)}</svg>{escape(each.name)}</li>'
        for each in series
    ]
    if limit is not None and is_drawn(limit, series):
        key = '<svg viewBox="0 0 26 12" class="key" aria-hidden="true"><path class="limit" d="M1 6H25"/></svg>'
        entries.append(f"<li>{key}{escape(limit[1])}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _frame(series: Sequence[Series], from_zero: bool, limit: tuple[float, str] | None, two_axes: bool) -> Frame:
    points = [point for each in series for point in each.points if math.isfinite(point.y)]
    spread = [(p.y, 0.0 if math.isnan(p.error) else p.error) for p in points] or [(0.0, 0.0)]
    low, high = min(y - error for y, error in spread), max(y + error for y, error in spread)
    if limit is not None and is_drawn(limit, series):
        high = max(high, limit[0])
    if from_zero:
        low = min(low, 0.0)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    xs = [point.x for point in points] or [0.0]
    aside = 0.04 * (max(xs) - min(xs)) or 1.0
    bottom = low if from_zero and low == 0 else low - room
    return Frame(min(xs) - aside, max(xs) + aside, bottom, high + room, WIDTH - (58 if two_axes else RIGHT))


def _x_values(frame: Frame, series: Sequence[Series], whole_x: bool) -> list[tuple[float, str]]:
    """Where the horizontal axis has numbers: at the values themselves while there is room, else at round ones."""
    own = sorted({point.x for each in series for point in each.points})
    narrowest = min((b - a for a, b in pairwise(own)), default=math.inf)
    if len(own) <= MOST_OWN and frame.x(frame.x_low + narrowest) - LEFT > OWN_ROOM:
        return [(x, f"{x:g}".replace("-", "\N{MINUS SIGN}")) for x in own]
    values = ticks(frame.x_low, frame.x_high, MOST_OWN)
    if whole_x:
        values = sorted({float(round(value)) for value in values})
    return list(zip(values, labels(values), strict=True))


def _grid(frame: Frame, x_label: str, y_label: str, percent: bool, x_values: list[tuple[float, str]]) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    values = ticks(frame.y_low, frame.y_high)
    for value, text in zip(values, labels(values, percent), strict=True):
        y = frame.y(value)
        kind = "zero" if value == 0 else "rule"
        parts.append(f'<path class="{kind}" d="M{LEFT} {y:.1f}H{frame.right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_values:
        x = frame.x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{frame.right}"/>')
    middle = (LEFT + frame.right) / 2
    parts.append(f'<text class="label" x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="0" y="16">{escape(y_label)}</text>')
    return "".join(parts)


def _second_axis(frame: Frame, second: SecondAxis) -> str:
    """Round numbers of the other scale where they lie on this one."""
    parts = [f'<text class="label" x="{WIDTH}" y="16" text-anchor="end">{escape(second.label)}</text>']
    values = ticks(second.of(frame.y_low), second.of(frame.y_high))
    for value, text in zip(values, labels(values), strict=True):
        low, high = frame.y_low, frame.y_high
        for _ in range(50):  # the scale rises, and no inverse of it is given
            middle = (low + high) / 2
            low, high = (middle, high) if second.of(middle) < value else (low, middle)
        y = frame.y(low)
        parts.append(f'<path class="axis" d="M{frame.right} {y:.1f}h4"/>')
        parts.append(f'<text class="tick" x="{frame.right + 8}" y="{y + 4:.1f}">{text}</text>')
    return "".join(parts)


def _limit(frame: Frame, value: float) -> str:
    return f'<path class="limit" d="M{LEFT} {frame.y(value):.1f}H{frame.right}"/>'


def _line(frame: Frame, series: Series) -> str:
    shown = sorted((point for point in series.points if math.isfinite(point.y)), key=lambda point: point.x)
    if not shown:
        return ""
    places = [(frame.x(point.x), frame.y(point.y)) for point in shown]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line" d="{path}"/>']
    for point, (x, _) in zip(shown, places, strict=True):
        if point.error > 0:
            top, bottom = frame.y(point.y + point.error), frame.y(point.y - point.error)
            parts.append(f'<path class="error" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 3:.1f} {top:.1f}h6m-6 0'
                         f'M{x - 3:.1f} {bottom:.1f}h6"/>')  # fmt: skip
    for point, (x, y) in zip(shown, places, strict=True):
        error = f" ± {point.error:.4g}" if point.error > 0 else ""
        words = escape(f"{series.name} at {point.x:g}: {point.y:.5g}{error}")
        parts.append(f"<g><title>{words}</title>{_marker(series.look, x, y, point.hollow)}</g>")
    return f'<g class="series s{series.look % SERIES}" data-name="{escape(series.name)}">{"".join(parts)}</g>'


def _marker(look: int, x: float, y: float, hollow: bool) -> str:
    kind = "mark hollow" if hollow else "mark"
    shape = look % SERIES
    if shape == 0:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.8"/>'
    path = {
        1: f"M{x - 3.4:.1f} {y - 3.4:.1f}h6.8v6.8h-6.8z",
        2: f"M{x:.1f} {y - 4.6:.1f}l4.4 7.8h-8.8z",
        3: f"M{x:.1f} {y - 4.9:.1f}l4.9 4.9l-4.9 4.9l-4.9 -4.9z",
        4: f"M{x:.1f} {y + 4.6:.1f}l4.4 -7.8h-8.8z",
        5: f"M{x - 4.2:.1f} {y - 2.2:.1f}h8.4v4.4h-8.4z",
    }[shape]
    return f'<path class="{kind}" d="{path}"/>'
