"""The page of a steering report, looked at in a real browser: what is drawn, that it stays by itself, and is safe."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cadapter.steering.page import page
from tests.browser import CHROMIUM, Browser, browser
from tests.steering.reports import DATASETS, HOSTILE, STRENGTHS, report

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no browser: apt-get install chromium")

OVERLAPPING = """
[...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], k) => boxes.slice(k + 1).filter(([b, q]) =>
    p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2
  ).map(([b]) => svg.getAttribute("aria-label") + ": " + a + " / " + b));
})
"""
OUTSIDE = """
[...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("*")].filter(e => { const b = e.getBoundingClientRect();
    return b.width + b.height > 0 && (b.left < frame.left - 2 || b.right > frame.right + 2
      || b.top < frame.top - 2 || b.bottom > frame.bottom + 2); }
  ).map(e => svg.getAttribute("aria-label") + ": " + e.outerHTML);
})
"""
SERIES = """
[...document.querySelectorAll("svg.chart g.series")].map(g => [g.dataset.name, g.querySelectorAll(".mark").length])
"""


class _Elements(HTMLParser):
    """The names of elements, and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


def pixels(picture: bytes) -> np.ndarray:
    """[height, width, 4] in 0 to 1."""
    from matplotlib.image import imread

    return imread(io.BytesIO(picture), format="png")


def brightness(colour: str) -> float:
    """Of "rgb(1, 2, 3)", 0 to 1."""
    return sum(float(part) for part in colour.strip("rgba()").split(",")[:3]) / 765


def contrast_ratio(first: str, second: str) -> float:
    """WCAG's ratio of two colours "rgb(…)", 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour.strip("rgba()").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
@pytest.mark.processes
@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_in_a_browser(chromium: Browser, tmp_path: Path, hostile: bool) -> None:
    file = tmp_path / "report.html"
    file.write_text(page(report(hostile)), encoding="utf-8")
    chromium.requests.clear()
    chromium.look(1240)
    chromium.open(file)
    assert chromium.requests == [file.as_uri()]
    assert chromium.complaints == []
    text = HOSTILE if hostile else ""
    assert chromium.ask("document.title") == f"Steering report: {text}run/final"
    drawn = [tuple(each) for each in chromium.ask(SERIES)]
    names = [f"{text}{name} ({class_})" for (name, _, _), class_ in zip(DATASETS, ("+1", "−1", "0"), strict=True)]
    for name in names:  # change of loss, loss and perplexity, agreement
        assert drawn.count((name, len(STRENGTHS))) == 3
    for name, points in [("lean", 9), ("KL", 9), ("contrast", 4), ("4-grams repeated", 9), ("texts ended", 9)]:
        assert (name, points) in drawn
    for name in ("‖W‖_F", "‖W‖₂", "ρ(W)", "σ_min(I + W)"):
        assert (name, 8) in drawn
    assert chromium.ask(OVERLAPPING) == []
    assert chromium.ask(OUTSIDE) == []
    assert chromium.ask('document.querySelectorAll("script, img, link, iframe").length') == 0

    picture = pixels(chromium.screenshot())
    assert picture.shape[1] == 1240
    assert picture.shape[0] > 2000
    # Neither blank nor nearly so: the colours of the first three series cover some of it each.
    for colour in ("#0072b2", "#d55e00", "#00866a"):
        wanted = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        assert (np.abs(picture[..., :3] - wanted).max(axis=2) < 0.02).sum() > 500


@needs_browser
@pytest.mark.processes
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_wide_and_narrow(chromium: Browser, tmp_path: Path, dark: bool) -> None:
    """Texts stand out from what is behind them, and nothing makes the page wider than its window."""
    file = tmp_path / "report.html"
    file.write_text(page(report()), encoding="utf-8")
    chromium.look(1240, dark)
    chromium.open(file)
    paper = chromium.ask("getComputedStyle(document.body).backgroundColor")
    assert (brightness(paper) < 0.2) == dark
    assert (pixels(chromium.screenshot(600))[..., :3].mean() < 0.3) == dark
    for selector in ("h1", ".facts", ".caption", ".text", ".after", "td", "summary", "dd"):
        colour = chromium.ask(f'getComputedStyle(document.querySelector("{selector}")).color')
        assert contrast_ratio(colour, paper) >= 4.5, selector  # WCAG AA
    for series in range(6):
        colour = chromium.ask(f'getComputedStyle(document.documentElement).getPropertyValue("--c{series}")')
        card = chromium.ask('getComputedStyle(document.querySelector(".card")).backgroundColor')
        rgb = f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"
        assert contrast_ratio(rgb, card) >= 3  # WCAG's least for what is drawn
    for width in (1240, 768, 360):
        chromium.look(width, dark)
        assert chromium.ask("document.documentElement.scrollWidth") <= width


def test_names_and_texts_are_escaped() -> None:
    """Also without a browser: the hostile page has the elements and attributes of the plain one and no others."""
    plain, hostile = (_Elements(page(report(hostile))) for hostile in (False, True))
    assert hostile.names == plain.names
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    assert not {"src", "href", "onload", "onerror"} & {name for name, _ in hostile.attributes}
    assert "script" not in plain.names
    assert "//" not in page(report())


def test_what_is_not_there_is_left_out() -> None:
    full = report()
    bare = page(replace(full, choice=None, sampled=None, adapter=None, norms={}, verdict=()))
    assert "Samples side by side" not in bare
    assert "by layer" not in bare
    assert 'class="verdict"' not in bare
    one_class = page(report(kinds=(1,)))
    assert "lean towards" not in one_class
    assert "budget 0.1" not in one_class
    without_neutral = page(report(kinds=(1, -1)))
    assert "There is no neutral text" in without_neutral
    assert "Cost: KL on all texts" in without_neutral
