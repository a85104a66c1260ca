"""What a run tells: metrics.jsonl, TensorBoard, and whoever watches: a panel on a terminal, else plain lines.

Rank 0 only.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from cadapter.adapters.guidelines import Guideline
from cadapter.files import write_text
from cadapter.terminal import can_redraw, console, is_quiet, without_controls
from cadapter.training.panel import Panel, View, classes_of, duration, short
from cadapter.training.samples import Sample

PLAIN_SECONDS = 10.0
"""Where the output is no terminal, a line comes at most this often."""
DRAWN_SECONDS = 0.1
"""The panel is drawn at most this often."""


def trim_metrics(path: Path, last_step: int) -> None:
    """Drop the lines of steps after ``last_step``: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line).get("step", 0)
        except (ValueError, AttributeError, RecursionError):
            break  # a line that a kill cut short; nothing valid follows it
        if isinstance(step, int) and step <= last_step:
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def _by_class(prefix: str, values: dict[str, float]) -> list[str]:
    """The losses of the classes in words, where there are several."""
    return [f"{label} {short(value)}" for label, value in classes_of(prefix, values)]


class Reporter:
    """Writes one line a step to metrics.jsonl and TensorBoard, and shows how far the run is.

    Args:
        directory: the run's.
        total_steps: of the run.
        first_step: the step that comes next (from 1).
        title: what is trained, for the panel.
        lowest: the lowest loss of an evaluation so far, and the step after which it was.
    """

    def __init__(
        self,
        directory: Path,
        total_steps: int,
        first_step: int,
        title: str = "cadapter",
        lowest: tuple[float, int] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        trim_metrics(directory / "metrics.jsonl", first_step - 1)
        self._metrics: IO[str] = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(directory / "logs"), purge_step=first_step)
        self._view = View(title, total_steps, first_step - 1, lowest=lowest)
        self._started_at_step = first_step - 1
        self._started = time.monotonic()
        self._last_plain = self._last_drawn = -math.inf
        self._console = console()
        self._live: Any = None
        self._told_by_threads = threading.excepthook

    def __enter__(self) -> Reporter:
        threading.excepthook = self._thread_failed
        if can_redraw(self._console) and not is_quiet():
            from rich.live import Live

            self._live = Live(
                Panel(self._view),
                console=self._console,
                transient=True,
                auto_refresh=False,
                # A stream that is piped elsewhere is not drawn into the terminal.
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.__enter__()
            self._draw(at_once=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None
        try:
            self._metrics.close()
            self._board.close()
        finally:
            threading.excepthook = self._told_by_threads

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread: what the disk refuses there is raised here by the next call, not twice."""
        if not isinstance(failure.exc_value, OSError):
            self._told_by_threads(failure)

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._live is not None and (at_once or now - self._last_drawn >= DRAWN_SECONDS):
            self._last_drawn = now
            self._live.refresh()

    def phase(self, text: str) -> None:
        """Show what begins now, unless it is one more step."""
        changed, self._view.phase = text != self._view.phase, text
        if changed:
            self._draw(at_once=True)

    def say(self, text: str) -> None:
        """Print a line that stays, unless ``--quiet`` is given."""
        if not is_quiet():
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _record(self, step: int, epoch: int, tokens: int, seconds: float, values: dict[str, Any]) -> None:
        record = {"step": step, "epoch": epoch, "tokens": tokens, "seconds": round(seconds, 3), **values}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()

    def _write(self, step: int, epoch: int, tokens: int, seconds: float, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._record(step, epoch, tokens, seconds, finite)
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)

    def training_step(
        self,
        step: int,
        epoch: int,
        tokens: int,
        seconds: float,
        values: dict[str, float],
        layer_norms: Tensor | None = None,
        guideline: Guideline | None = None,
        memory: str = "",
    ) -> None:
        """Record one optimiser step; ``tokens`` and ``seconds`` are totals of the run so far.

        ``layer_norms`` become a histogram; ``guideline`` and ``memory`` are shown only.
        """
        self._write(step, epoch, tokens, seconds, values)
        if layer_norms is not None and bool(layer_norms.isfinite().all()):
            self._board.add_histogram("train/layer_norms", layer_norms, step)
        view = self._view
        view.step, view.epoch, view.values, view.guideline, view.memory = step, epoch, values, guideline, memory
        done = step - self._started_at_step
        view.left = (time.monotonic() - self._started) / done * (view.total - step)
        self._draw()
        first_or_last = step in (self._started_at_step + 1, view.total)
        if self._live is None and (first_or_last or time.monotonic() - self._last_plain > PLAIN_SECONDS):
            self._last_plain = time.monotonic()
            self.say(self._line())

    def _line(self) -> str:
        view = self._view
        values = view.values
        parts = [f"step {view.step}/{view.total}", f"epoch {view.epoch}", f"loss {short(values.get('train/loss'))}"]
        parts.extend(_by_class("train", values))
        if "train/norm_max" in values:
            parts.append(f"‖W‖F max {short(values['train/norm_max'])}")
            parts.append(f"‖W‖₂ max {short(values.get('train/spectral_max'))}")
        if view.guideline is not None:
            parts.append(view.guideline.in_words())
        parts.append(f"{values.get('train/tokens_per_second', 0):,.0f} tokens/s")
        if view.memory:
            parts.append(view.memory)
        if values.get("train/skipped_steps"):
            parts.append(f"{values['train/skipped_steps']:.0f} skipped")
        parts.append(f"{duration(view.left or 0)} left")
        return "  ".join(parts)

    def evaluation(self, step: int, epoch: int, tokens: int, seconds: float, values: dict[str, float]) -> None:
        """Record an evaluation after ``step`` steps."""
        self._write(step, epoch, tokens, seconds, values)
        view, loss = self._view, values.get("eval/loss", math.nan)
        view.evaluation, view.evaluated = values, step
        if step and not math.isnan(loss) and (view.lowest is None or loss < view.lowest[0]):
            view.lowest = (loss, step)
        self._draw(at_once=True)
        self._print("  ".join([f"evaluation after step {step}: loss {short(loss)}", *_by_class("eval", values)]))

    def samples(self, step: int, epoch: int, tokens: int, seconds: float, samples: Sequence[Sample]) -> None:
        """Record what was written after ``step`` steps."""
        written = [{"prompt": each.prompt, "strength": each.strength, "text": each.text} for each in samples]
        self._record(step, epoch, tokens, seconds, {"samples": written})
        for number, prompt in enumerate(dict.fromkeys(each.prompt for each in samples)):
            own = [each for each in samples if each.prompt == prompt]
            self._board.add_text(f"samples/prompt_{number}", _as_markdown(prompt, own), step)
            width = self._console.width if self._console.is_terminal else None
            lines = (line for each in own for line in _as_lines(each, width))
            self.say("\n".join([f"samples after step {step}: {without_controls(prompt)}", *lines]))


def _name(strength: int) -> str:
    return {1: "+1", 0: " 0", -1: "−1"}[strength]


def _as_lines(sample: Sample, width: int | None) -> Iterator[str]:
    """A sample for whoever watches: its strength, then its lines, indented; broken only where ``width`` is given."""
    begin, text = f"  {_name(sample.strength)}  ", without_controls(sample.text).strip()
    for line in text.splitlines() or ["(nothing)"]:
        room = len(line) if width is None else width - len(begin)
        for part in textwrap.wrap(line, max(room, 20)) or [""]:
            yield begin + part
            begin = " " * len(begin)


def _as_markdown(prompt: str, samples: Sequence[Sample]) -> str:
    """Samples of one prompt as TensorBoard shows them; blocks of code, so that a text is shown as it is."""
    parts = [f"**{title}**\n\n" + _code(text) for title, text in
             [("prompt", prompt), *((_name(each.strength).strip(), each.text) for each in samples)]]  # fmt: skip
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines() or [""])
