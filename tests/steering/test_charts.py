"""Numbers on axes, and where lines run: against positions worked out by hand."""

from __future__ import annotations

import math
import re

import pytest

from cadapter.steering.charts import HEIGHT, Point, SecondAxis, Series, chart, labels, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-2.08, 2.08, ["−2", "−1", "0", "1", "2"]),
        (3.196, 3.231, ["3.20", "3.21", "3.22", "3.23"]),
        (0, 0.00031, ["0.0000", "0.0001", "0.0002", "0.0003"]),
        (17, 26, ["18", "20", "22", "24", "26"]),
        (0, 12345, ["0", "5000", "10000"]),
        (5, 5, ["5"]),
    ],
)
def test_axes_have_few_round_numbers(low: float, high: float, expected: list[str]) -> None:
    assert labels(ticks(low, high)) == expected


@pytest.mark.parametrize("scale", [1e-6, 0.03, 1.0, 70.0, 1e9])
@pytest.mark.parametrize("start", [-3.3, 0.0, 0.7])
def test_ticks_lie_within_and_are_never_too_few(scale: float, start: float) -> None:
    low, high = start * scale, (start + 1) * scale
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low - 1e-9 * scale <= found[0]
    assert found[-1] <= high + 1e-9 * scale
    assert len(set(labels(found))) == len(found)


def test_shares_are_percentages() -> None:
    assert labels([0.0, 0.005, 0.01], percent=True) == ["0.0 %", "0.5 %", "1.0 %"]


def positions(svg: str) -> dict[str, float]:
    """The vertical position of each number of the left axis."""
    found = re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)</text>', svg)
    return {text: float(y) - 4 for y, text in found}


def test_points_lie_where_the_axis_says() -> None:
    points = [Point(-1, 0.0), Point(0, 2.0, 0.5), Point(1, 4.0)]
    svg = chart("t", [Series("a", points, 0)], x_label="x", y_label="y")
    axis = positions(svg)
    marks = [float(y) for y in re.findall(r'<circle class="mark" cx="[\d.]+" cy="([\d.]+)"', svg)]
    assert marks == pytest.approx([axis["0"], axis["2"], axis["4"]], abs=0.11)  # written with one decimal
    (top, bottom) = re.search(r'class="error" d="M[\d.]+ ([\d.]+)V([\d.]+)', svg).groups()
    assert float(bottom) - float(top) == pytest.approx((axis["1"] - axis["2"]), abs=0.21)
    assert axis["4"] < axis["0"] < HEIGHT


def test_the_second_axis_is_another_scale_of_the_same() -> None:
    points = [Point(0, 2.0), Point(1, 3.0)]
    svg = chart("t", [Series("a", points, 0)], x_label="x", y_label="y", second=SecondAxis("e^y", math.exp))
    axis = positions(svg)
    right = {
        text: float(y) - 4 for y, text in re.findall(r'<text class="tick" x="43\d" y="([\d.]+)">([\d]+)</text>', svg)
    }
    assert len(right) >= 3
    for text, y in right.items():
        between = (y - axis["2.0"]) / (axis["3.0"] - axis["2.0"])
        assert 2 + between == pytest.approx(math.log(float(text)), abs=0.002)


def test_what_cannot_be_drawn_is_left_out() -> None:
    points = [Point(0, math.nan), Point(1, 1.0)]
    svg = chart("<&>", [Series('"x"', points, 0), Series("none", [], 1)], x_label="x", y_label="y", limit=(99.0, "far"))
    assert svg.count('class="mark"') == 1
    assert "nan" not in svg
    assert 'class="limit"' not in svg
    assert 'aria-label="&lt;&amp;&gt;"' in svg
