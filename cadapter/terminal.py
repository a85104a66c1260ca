"""What every command prints through: results on standard output, warnings, errors and progress on standard error.

``rich`` is imported where it is needed and not before, so that ``cadapter --help`` stays fast.
"""

from __future__ import annotations

import codecs
import errno
import functools
import io
import os
import re
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from cadapter.errors import CannotWrite

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

_SHOW_AFTER_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 5.0
_UNLIMITED_WIDTH = 10_000

_SPELLINGS = str.maketrans({
    "‖": "||", "−": "-", "–": "-", "—": "-", "·": "*", "×": "x", "√": "sqrt ", "≥": ">=", "≤": "<=", "≲": "<~",
    "±": "+/-", "→": "->", "…": "...", "∞": "inf", "∥": "||", "α": "alpha", "β": "beta", "γ": "gamma", "ε": "eps",
    "λ": "lambda",
    "ρ": "rho", "σ": "sigma", "Σ": "Sum", "Δ": "Delta", "₀": "0", "₁": "1", "₂": "2", "²": "^2", "³": "^3", "½": "1/2",
    **dict.fromkeys("█▉▊▋▌", "#"), **dict.fromkeys("▍▎▏", "|"),
    "ᵀ": "^T", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u00a0": " ",
})  # fmt: skip
"""What is written for a character that a stream's encoding lacks; "?" for any other."""

_ENCODING_ERRORS = "cadapter-spelling"

Advance = Callable[..., None]
"""``advance(n=1)``: n more units of the work are done."""

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Whether notes and progress are left out; results, warnings and errors are always printed."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether ``--quiet`` is given."""
    return _quiet


@functools.cache
def console(stderr: bool = False, width: int | None = None) -> Console:
    """The console of standard output, or of standard error; texts are printed as they are, without markup."""
    from rich.console import Console

    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def can_redraw(screen: Console) -> bool:
    """Whether what was printed on ``screen`` can be drawn over: it is a terminal, and not a dumb one."""
    return screen.is_terminal and not screen.is_dumb_terminal


def spelt(text: str, encoding: str) -> str:
    """``text`` with words for what ``encoding`` lacks: "‖W‖₂" becomes "||W||2"."""
    return text.encode(encoding, _ENCODING_ERRORS).decode(encoding)


def without_controls(text: str) -> str:
    """``text`` with "�" for whatever could steer a terminal: a model may write anything. Line breaks and tabs stay."""
    return "".join("�" if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    words = (letter.translate(_SPELLINGS) for letter in missing)
    return "".join(word if word.isascii() else "?" for word in words), error.end


codecs.register_error(_ENCODING_ERRORS, _spell)


_GONE = (errno.EPIPE, errno.EIO)
"""What writing to a pipe that nobody reads, and to a terminal that was closed, fails with."""


class _Output(io.FileIO):
    """The file of standard output or standard error, which says in plain words why it takes no more.

    Attributes:
        goes_on: what cannot be written is lost, and nothing fails.
    """

    goes_on = False
    _told = False

    def write(self, data: Any, /) -> int:
        """Write ``data``.

        Raises:
            BrokenPipeError: nobody reads it any more.
            CannotWrite: the disk is full, for instance.
        """
        if not len(data):  # Typer tries streams in this way, and takes no notice of what is raised
            return 0
        try:
            return super().write(data)
        except OSError as fault:
            if fault.errno in _GONE:
                self._lead_nowhere()
                if not self.goes_on:
                    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from fault
            else:
                self._refused(fault)
            return len(data)

    def _lead_nowhere(self) -> None:
        """Let all that comes go to no place: Python writes what is left in a buffer again at its end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)

    def _refused(self, fault: OSError) -> None:
        words = f"The output cannot be written: {fault.strerror}."
        if not self.goes_on:
            self._lead_nowhere()
            raise CannotWrite(words) from fault
        if not self._told and self.fileno() != sys.stderr.fileno():
            self._told = True
            # Not by warn, which would write out what is being written just now.
            print(f"warning: {words} It is lost until there is room again.", file=sys.stderr, flush=True)


def own_streams() -> None:
    """Let standard output and standard error of this process fail in plain words (see :class:`_Output`).

    They write words for characters that their encoding lacks. One that was closed from the start leads nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays open)
            continue
        file = _Output(stream.fileno(), "wb", closefd=False)
        new = io.TextIOWrapper(
            file if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(file),
            encoding=stream.encoding,
            errors=_ENCODING_ERRORS,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        _outputs.append(file)
        setattr(sys, name, new)


_outputs: list[_Output] = []


def go_on_unread() -> None:
    """From now on nothing fails where nobody reads the output any more, or a disk does not take it."""
    for file in _outputs:
        file.goes_on = True


def note(text: str) -> None:
    """Print ``text`` on standard output, unless ``--quiet`` is given."""
    if not _quiet:
        print(text, flush=True)


def result(text: str) -> None:
    """Print ``text``, which is what the command was asked for, on standard output, also with ``--quiet``."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print "warning: ``text``" on standard error; further lines stand below the first."""
    _labelled("warning: ", text)


def error(text: str) -> None:
    """Print "error: ``text``" on standard error; further lines stand below the first."""
    _labelled("error: ", text)


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Characters that a terminal obeys; names in strangers' files may hold them, and messages show such names."""


def _labelled(label: str, text: str) -> None:
    sys.stdout.flush()  # where both streams go to one file, what was printed first stands first
    text = text.translate(_CONTROLS)
    print(label + text.replace("\n", "\n" + " " * len(label)), file=sys.stderr, flush=True)


def significant(value: float, digits: int = 4) -> str:
    """``value`` with so many significant digits, zeros at the end included: 1.0003 is 1.000, and only zero is 0."""
    return f"{value:#.{digits}g}".removesuffix(".") if value else "0"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "l", footer: str = ""
) -> None:
    """Print a table on standard output, each cell whole: folded on a terminal, on one line elsewhere.

    Where numbers would have to be folded, each row is a block of lines instead, with a name and a value on each.
    ``align`` has one letter for each column, l, r or c; columns without a letter are r. None is an empty cell.
    """
    from rich.text import Text

    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    screen = console() if console().is_terminal else console(width=_UNLIMITED_WIDTH)
    widths = _column_widths([columns, *cells], screen.width)
    if title:
        screen.print(Text(title))
    if widths is None:
        _print_blocks(screen, columns, cells)
    else:
        screen.print(_grid(columns, cells, widths, align))
    if footer:
        screen.print(Text(footer))


_NUMBER = re.compile(r"\W*\d[\d.,]*(e[-+]?\d+)?\W*")
_FOLDED_FROM = 16
"""A word of more characters that is no number may be folded."""


def _column_widths(rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Characters for each column of ``rows`` on a terminal of ``width``; None: there are too few for the numbers.

    The widest columns are narrowed first, and none beyond its longest word.
    """
    columns = list(zip(*rows, strict=True))
    least = [max(map(_least_width, column)) for column in columns]
    widths = [max(_width(line) for cell in column for line in cell.split("\n")) for column in columns]
    available = width - 3 * len(columns) - 1  # a column's two spaces, and what is between columns and beside them
    if sum(least) > available:
        return None
    for _ in range(sum(widths) - available):
        widest = max((each for each in range(len(widths)) if widths[each] > least[each]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _least_width(cell: str) -> int:
    words = ((word, _width(word)) for word in cell.split())
    return max((size if _NUMBER.fullmatch(word) else min(size, _FOLDED_FROM) for word, size in words), default=0)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], align: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, header_style="bold")
    sides: dict[str, Any] = {"l": "left", "r": "right", "c": "center"}
    for name, width, side in zip(columns, widths, align.ljust(len(columns), "r"), strict=True):
        grid.add_column(Text(name), justify=sides[side], overflow="fold", width=width)
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def _print_blocks(screen: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as lines "name value"; a value that has no room beside its name stands below it."""
    from rich.text import Text

    indent = 2 + max(map(_width, columns))
    for row in rows:
        screen.print()
        for name, cell in zip(columns, row, strict=True):
            if not cell.strip():
                continue
            if indent + _least_width(cell) <= screen.width:
                lines = textwrap.wrap(cell, max(screen.width - indent, 1))
            else:
                lines = ["", *textwrap.wrap(cell, screen.width - 2, break_long_words=False)]
            first, *others = lines
            screen.print(Text(f"{name}{' ' * (indent - _width(name))}{first}".rstrip()), soft_wrap=True)
            for line in others:
                screen.print(Text(" " * (indent if first else 2) + line), soft_wrap=True)
    screen.print()


def progress(description: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Advance]:
    """Show how far work has come that takes over a second; the block gets ``advance(n=1)``, which counts it.

    A bar on a terminal, which disappears at the end; elsewhere a line every few seconds. ``total`` None: not known.
    """
    if _quiet:
        return _silent()
    for stderr in (False, True):
        if can_redraw(console(stderr)):
            return _bar(console(stderr), description, total, unit)
    return _lines(description, total, unit)


@contextmanager
def _silent() -> Iterator[Advance]:
    yield lambda n=1: None


@contextmanager
def _lines(description: str, total: float | None, unit: str) -> Iterator[Advance]:
    done: float = 0
    due = time.monotonic() + _SHOW_AFTER_SECONDS

    def advance(n: float = 1) -> None:
        nonlocal done, due
        done += n
        if time.monotonic() >= due:
            due = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{description}: {_amount(done, total, unit)}", file=sys.stderr, flush=True)

    yield advance


def _amount(done: float, total: float | None, unit: str) -> str:
    amount = f"{done:,}" if total is None else f"{done:,} of {total:,}"
    return f"{amount} {unit}".rstrip()


@contextmanager
def _bar(screen: Console, description: str, total: float | None, unit: str) -> Iterator[Advance]:
    bar = _new_bar(screen, unit)
    task = bar.add_task(description, total=total)
    starter = threading.Timer(_SHOW_AFTER_SECONDS, bar.start)
    starter.daemon = True
    starter.start()
    try:
        yield lambda n=1: bar.advance(task, n)
    finally:
        starter.cancel()
        starter.join()
        bar.stop()


def _new_bar(screen: Console, unit: str) -> Progress:
    from rich import progress as parts

    return parts.Progress(
        parts.TextColumn("{task.description}", markup=False),
        parts.BarColumn(),
        parts.TaskProgressColumn(),
        parts.MofNCompleteColumn(),
        parts.TextColumn(unit, markup=False),
        parts.TimeRemainingColumn(),
        console=screen,
        transient=True,
        # A stream that is piped elsewhere is not drawn into the terminal.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
