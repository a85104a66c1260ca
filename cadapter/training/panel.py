"""What whoever watches a run sees on a terminal: a panel that is drawn again after each step, and nothing else moves.

It fits any width from some 30 characters on: what stands in one row is a list of short pieces that are broken into
lines between them, never within them. On a stream whose encoding lacks a character the same is said without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cadapter.adapters.guidelines import Guideline
from cadapter.terminal import spelt

WIDEST = 92
"""A line is read with ease up to about so many characters."""
NARROW = 56
"""On a terminal of fewer characters there is no frame, and labels are cut to ``SHORT_LABEL``."""
SHORT_LABEL = 5
GAP = "   "

Piece = tuple[str, str]
"""A text and its style."""


@dataclass
class View:
    """What is known of the run just now.

    Attributes:
        title: what is trained, and where to.
        total, step, epoch: steps of the run, those done, the epoch.
        phase: what is being done.
        left: seconds that are left, by estimate.
        values: of the last step, by the names of metrics.jsonl.
        evaluation: of the last evaluation, likewise.
        evaluated: the step after which that was.
        lowest: the lowest loss of an evaluation so far, and the step after which it was.
        guideline: what the adapters' norms should keep.
        memory: in words.
    """

    title: str
    total: int
    step: int = 0
    epoch: int = 1
    phase: str = "starting"
    left: float | None = None
    values: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0
    lowest: tuple[float, int] | None = None
    guideline: Guideline | None = None
    memory: str = ""


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def short(value: float | None) -> str:
    """A loss or a norm as it is shown."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def classes_of(prefix: str, values: dict[str, float]) -> list[tuple[str, float]]:
    """The losses of the classes with their names, where there are several."""
    named = (("+1", f"{prefix}/loss_pos"), ("−1", f"{prefix}/loss_neg"), ("0", f"{prefix}/loss_neutral"))
    found = [(label, values[name]) for label, name in named if name in values and not math.isnan(values[name])]
    return found if len(found) > 1 else []


COLOURS = {"+1": "green", "−1": "magenta", "0": "cyan"}


def _losses(prefix: str, values: dict[str, float]) -> list[Piece]:
    by_class = [(f"{label} {short(value)}", COLOURS[label]) for label, value in classes_of(prefix, values)]
    return [(short(values.get(f"{prefix}/loss")), "bold"), *by_class]


def rows_of(view: View) -> list[tuple[str, list[Piece]]]:
    """The panel's rows below the bar: label and pieces; those of which nothing is known yet are left out."""
    values, rows = view.values, []
    if values:
        rows.append(("loss", _losses("train", values)))
    if view.evaluation:
        pieces = [*_losses("eval", view.evaluation), (f"after step {view.evaluated:,}", "dim")]
        if view.lowest is not None and view.lowest[1] != view.evaluated:
            pieces.append((f"lowest {short(view.lowest[0])} after step {view.lowest[1]:,}", "dim"))
        rows.append(("eval", pieces))
    if "train/norm_max" in values:
        norms = [(f"‖W‖F max {values['train/norm_max']:.3g}", "")]
        if "train/spectral_max" in values:
            norms.append((f"‖W‖₂ max {values['train/spectral_max']:.3g}", ""))
        if view.guideline is not None:
            norms.append((view.guideline.in_words(), "green" if view.guideline.holds else "bold red"))
        rows.append(("norms", norms))
    speed: list[Piece] = []
    if "train/tokens_per_second" in values:
        speed.append((f"{values['train/tokens_per_second']:,.0f} tokens/s", ""))
    if view.memory:
        speed.append((view.memory, ""))
    if "train/lr" in values:
        speed.append((f"lr {values['train/lr']:.2e}", "dim"))
    if "train/grad_norm" in values:
        speed.append((f"gradient {values['train/grad_norm']:.3g}", "dim"))
    if speed:
        rows.append(("speed", speed))
    skipped = int(values.get("train/skipped_steps", 0))
    now: list[Piece] = [(view.phase, "")]
    if skipped:
        now.append((f"{skipped} {'step' if skipped == 1 else 'steps'} skipped", "bold yellow"))
    return [*rows, ("now", now)]


def in_lines(pieces: Sequence[Piece], width: int) -> Text:
    """The pieces side by side, in as many lines as a width asks for."""
    text, used = Text(), 0
    for words, style in pieces:
        if used and used + len(GAP) + len(words) > width:
            text.append("\n")
            used = 0
        if used:
            text.append(GAP)
            used += len(GAP)
        text.append(words, style)
        used += len(words)
    return text


class Panel:
    """A :class:`View` as rich draws it."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view, width = self.view, min(options.max_width, WIDEST)
        framed = width >= NARROW
        inner = width - 4 if framed else width

        def say(pieces: Sequence[Piece]) -> list[Piece]:
            return [(spelt(words, console.encoding), style) for words, style in pieces]

        rows = [(label if framed else label[:SHORT_LABEL], say(pieces)) for label, pieces in rows_of(view)]
        labels = max(len(label) for label, _ in rows) + 2
        grid = Table.grid(padding=0)
        grid.add_column(width=labels, style="dim")
        grid.add_column(width=inner - labels, overflow="fold")
        for label, pieces in rows:
            grid.add_row(label, in_lines(pieces, inner - labels))
        done = [(f"step {view.step:,} of {view.total:,}", "bold"), (f"epoch {view.epoch}", "")]
        if view.left is not None:
            done.append((f"{duration(view.left)} left", ""))
        bar = ProgressBar(view.total, view.step, inner, style="dim", complete_style="cyan", finished_style="cyan")
        # A bar ends no line by itself; padded by nothing it does.
        body: RenderableType = Group(in_lines(say(done), inner), Padding(bar, 0), grid)
        if framed:
            title = Text(spelt(view.title, console.encoding), style="dim")
            title.truncate(inner - 2, overflow="ellipsis" if "utf" in console.encoding else "crop")
            body = Frame(body, title=title, title_align="left", box=box.ROUNDED, border_style="dim", width=width)
        yield body
