"""What a run tells: metrics.jsonl, TensorBoard, and a line for whoever watches. Rank 0 only."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from cadapter.files import write_text
from cadapter.terminal import console, is_quiet

PLAIN_SECONDS = 10.0
"""Where the output is no terminal, a line comes at most this often."""


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


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _short(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def _by_class(prefix: str, values: dict[str, float]) -> list[str]:
    """The losses of the classes in words, where there are several."""
    named = (("+1", f"{prefix}/loss_pos"), ("−1", f"{prefix}/loss_neg"), ("0", f"{prefix}/loss_neutral"))
    found = [(label, values[name]) for label, name in named if name in values and not math.isnan(values[name])]
    return [f"{label} {_short(value)}" for label, value in found] if len(found) > 1 else []


class Reporter:
    """Writes one line a step to metrics.jsonl and TensorBoard, and keeps a progress line.

    Args:
        directory: the run's.
        total_steps: of the run.
        first_step: the step that comes next (from 1).
    """

    def __init__(self, directory: Path, total_steps: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        trim_metrics(directory / "metrics.jsonl", first_step - 1)
        self._metrics: IO[str] = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._board = SummaryWriter(str(directory / "logs"), purge_step=first_step)
        self._total = total_steps
        self._started_at_step = first_step - 1
        self._started = time.monotonic()
        self._last_plain = -math.inf
        self._console = console()
        self._live: Any = None
        self._told_by_threads = threading.excepthook

    def __enter__(self) -> Reporter:
        threading.excepthook = self._thread_failed
        if self._console.is_terminal and not is_quiet():
            from rich.live import Live

            self._live = Live("", console=self._console, transient=True, auto_refresh=False)
            self._live.__enter__()
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

    def say(self, text: str) -> None:
        """Print a line that stays, unless ``--quiet`` is given."""
        if is_quiet():
            return
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _write(self, step: int, epoch: int, tokens: int, seconds: float, values: dict[str, float]) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        record = {"step": step, "epoch": epoch, "tokens": tokens, "seconds": round(seconds, 3), **finite}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
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
    ) -> None:
        """Record one optimiser step; ``tokens`` and ``seconds`` are totals of the run so far."""
        self._write(step, epoch, tokens, seconds, values)
        if layer_norms is not None and bool(layer_norms.isfinite().all()):
            self._board.add_histogram("train/layer_norms", layer_norms, step)
        line = self._line(step, epoch, values)
        if self._live is not None:
            self._live.update(line, refresh=True)
        elif step in (self._started_at_step + 1, self._total) or time.monotonic() - self._last_plain > PLAIN_SECONDS:
            self._last_plain = time.monotonic()
            self.say(line)

    def _line(self, step: int, epoch: int, values: dict[str, float]) -> str:
        done = step - self._started_at_step
        left = (time.monotonic() - self._started) / done * (self._total - step)
        parts = [f"step {step}/{self._total}", f"epoch {epoch}", f"loss {_short(values.get('train/loss'))}"]
        parts.extend(_by_class("train", values))
        if "train/norm_max" in values:
            parts.append(f"‖W‖F max {_short(values['train/norm_max'])}")
            parts.append(f"‖W‖₂ max {_short(values.get('train/spectral_max'))}")
        parts.append(f"{values.get('train/tokens_per_second', 0):,.0f} tokens/s")
        parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def evaluation(self, step: int, epoch: int, tokens: int, seconds: float, values: dict[str, float]) -> None:
        """Record an evaluation after ``step`` steps."""
        self._write(step, epoch, tokens, seconds, values)
        loss = f"evaluation after step {step}: loss {_short(values.get('eval/loss'))}"
        self.say("  ".join([loss, *_by_class("eval", values)]))
