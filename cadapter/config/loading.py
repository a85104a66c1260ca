"""A TOML file and its overrides become a :class:`Config`, or one error that names everything wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cadapter.config.checking import check, contains, value_at
from cadapter.config.lines import KeyPath, index_lines, line_of
from cadapter.config.overrides import Override, apply_override, overridden_by
from cadapter.config.rules import Problem, WrongKey
from cadapter.config.schema import Config
from cadapter.config.toml import parse_toml, toml_text
from cadapter.errors import UsageError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the config at ``path``; each of ``overrides`` is a ``KEY=VALUE`` that goes before what the file says.

    Raises:
        UsageError: the file cannot be read, is not TOML, or holds anything that is wrong: every problem on its
            own line, ``FILE:LINE: key = value: what is wrong; what to do``, in the order of the file.
    """
    source = _read(path)
    data = _parse(path, source)
    lines = index_lines(source)
    applied, refused = _apply(overrides, data)
    config, problems = check(data)
    if config is None or refused:
        reports = sorted(_report(problem, data, path, lines, applied) for problem in problems)
        raise UsageError("\n".join([text for _, _, text in reports] + refused))
    return config


def located(problems: Sequence[Problem], path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Problems of the config at ``path`` as lines of a report, each with where its key was given."""
    source = _read(path)
    data = _parse(path, source)
    lines = index_lines(source)
    applied, _ = _apply(overrides, data)
    return [text for _, _, text in sorted(_report(problem, data, path, lines, applied) for problem in problems)]


@contextmanager
def locating(path: Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Within, an error that is about one key of the config at ``path`` says where that key was given."""
    try:
        yield
    except WrongKey as error:
        raise UsageError("\n".join(located([error.problem], path, overrides))) from error


def _apply(overrides: Sequence[str], data: dict[str, Any]) -> tuple[list[Override], list[str]]:
    """Apply ``overrides`` to ``data``: those that could be, and a message for each that could not."""
    applied, refused = [], []
    for text in overrides:
        outcome = apply_override(data, text)
        if isinstance(outcome, Override):
            applied.append(outcome)
        else:
            refused.append(f"--set {text}: {outcome}")
    return applied, refused


def _report(
    problem: Problem, data: Mapping[str, Any], path: Path, lines: Mapping[KeyPath, int], applied: Sequence[Override]
) -> tuple[int, int, str]:
    """``problem`` as a line of the report, after what orders it: lines of the file, what it lacks, overrides."""
    override = overridden_by(applied, problem.path, in_file=problem.path in lines)
    if override is not None:
        return 2, applied.index(override), f"--set {override.text}: {problem.text}"
    shown = problem.key
    if problem.shows_value and contains(data, problem.path):
        shown = f"{shown} = {toml_text(value_at(data, problem.path))}"
    line = line_of(lines, problem.path)
    if line is None:
        return 1, 0, f"{path}: {shown}: {problem.text}"
    return 0, line, f"{path}:{line}: {shown}: {problem.text}"


def _read(path: Path) -> str:
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; give the path of a config in TOML.") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: this is a directory; give the path of a config in TOML.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        return source.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 (byte 0x{source[error.start]:02x}); save the file as UTF-8."
        ) from None


def _parse(path: Path, source: str) -> dict[str, Any]:
    try:
        return parse_toml(source)
    except ValueError as error:
        what, _, where = str(error).partition(" (at ")
        place = re.match(r"line (\d+), column (\d+)", where)
        if place:
            position = f"{path}:{place[1]}:{place[2]}"
        else:
            position = f"{path}:{source.rstrip().count(chr(10)) + 1}" if where else str(path)
        quotes = ' (a string stands in quotes: key = "value")' if what == "Invalid value" else ""
        raise UsageError(f"{position}: not valid TOML: {what}{quotes}; correct it.") from None
