"""What became of the data, on the screen: tables, lengths, classes, and texts that occur more than once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cadapter.classes import CLASS_NAMES, NEGATIVE, POSITIVE
from cadapter.data.remarks import data_warnings, repeats_of, texts_occur
from cadapter.data.showing import COLOURS, LABELS
from cadapter.terminal import console, result, table, warn

if TYPE_CHECKING:
    from cadapter.config import Config
    from cadapter.data.preparing import DatasetReport, PreparedData

_BAR = 40
_IMBALANCE = 2.0
"""Times as many tokens in one class as in the other, from which on it is pointed out."""


def print_report(data: PreparedData, config: Config) -> None:
    """Print everything but sequences; in a mixture these hold documents of several datasets."""
    mixed = config.mix_datasets
    _print_datasets(data, mixed)
    console().print()
    _print_left_out(data, mixed)
    console().print()
    _print_lengths(data.reports)
    _print_classes(data)
    _print_repeats(data, config)


def _print_datasets(data: PreparedData, mixed: bool) -> None:
    """Print a row for each dataset and one for the whole; sequences of a mixture belong to no dataset alone."""
    rows = [
        (
            report.name,
            "own" if report.control_class is None else LABELS[report.control_class],
            f"{report.documents:,} + {report.eval_documents:,}",
            f"{report.tokens:,} + {report.eval_tokens:,}",
            "mixed" if mixed else f"{report.sequences:,} + {report.eval_sequences:,}",
            "hit" if report.cache_hit else f"miss ({report.cache_reason})",
        )
        for report in data.reports
    ]
    evaluation = len(data.evaluation) if data.evaluation else 0
    total = (
        "all",
        None,
        *(
            f"{sum(getattr(each, key) for each in data.reports):,} + "
            f"{sum(getattr(each, f'eval_{key}') for each in data.reports):,}"
            for key in ("documents", "tokens")
        ),
        f"{len(data.train):,} + {evaluation:,}",
        None,
    )
    footer = "Of two numbers, the second is of what is held out for evaluation. Tokens are those of documents;"
    footer += (
        f"\n{data.train.tokens.sum():,} tokens to train on, with the prefix of each sequence, as train counts them."
    )
    if any(report.control_class is None for report in data.reports):
        footer += "\nClass own: the records say it themselves."
    columns = ("dataset", "class", "documents", "tokens", "sequences", "cache")
    table("Prepared data", columns, [*rows, total], align="lcrrrl", footer=footer)


_LEFT_OUT = {
    "empty": "empty_documents",
    "too long": "overlength_documents",
    "over a limit": "over_limit",
    "bad records": "bad_records",
    "truncated": "truncated_documents",
    "tokens truncated": "truncated_tokens",
    "split": "split_documents",
    "tokens dropped": "dropped_tokens",
    "tokens of padding": "padding",
}
_OF_SEQUENCES = ("split_documents", "dropped_tokens", "padding")


def _print_left_out(data: PreparedData, mixed: bool) -> None:
    """Print what was left out, cut or filled: the columns of which there is something."""
    counts = [_left_out(report) for report in data.reports]
    sums = {
        key: each[0] if mixed and _LEFT_OUT[key] in _OF_SEQUENCES else sum(each)
        for key, each in ((key, [count[key] for count in counts]) for key in _LEFT_OUT)
    }
    columns = [key for key, total in sums.items() if total]
    if not columns:
        return result("Nothing was left out, cut or padded.")
    rows: list[Sequence[object]] = [
        (
            report.name,
            *("mixed" if mixed and _LEFT_OUT[key] in _OF_SEQUENCES else f"{count[key]:,}" for key in columns),
        )
        for report, count in zip(data.reports, counts, strict=True)
    ]
    total = ("all", *(f"{sums[key]:,}" for key in columns))
    split = "with nothing lost" if not sums["tokens dropped"] else "counted before tokens were dropped"
    footer = f"Documents, where nothing else is said. Split: in more than one sequence, {split}."
    return table("Left out, cut and padded", ("dataset", *columns), [*rows, total], footer=footer)


def _left_out(report: DatasetReport) -> dict[str, int]:
    found = {}
    for key, name in _LEFT_OUT.items():
        value = getattr(report, name)
        found[key] = len(value) if isinstance(value, list) else value
    found["tokens of padding"] += report.eval_padding
    return found


def _print_lengths(reports: Sequence[DatasetReport]) -> None:
    """Print how long documents are, a bar for each doubling."""
    longest = max(len(report.lengths) for report in reports)
    counts = [sum(report.lengths[k] for report in reports if k < len(report.lengths)) for k in range(longest)]
    bars = [
        (f"{1 << (k - 1):,} to {(1 << k) - 1:,}", count, "cyan", "") for k, count in enumerate(counts) if k and count
    ]
    _print_bars("Documents by their tokens", bars)


def _print_classes(data: PreparedData) -> None:
    """Print trained tokens of each class, and how far the two that are opposite are from balance."""
    trained = dict(zip((POSITIVE, NEGATIVE, 0), data.train.trained, strict=True))
    held = data.evaluation.trained if data.evaluation else (0, 0, 0)
    bars = [
        (f"{LABELS[class_]} {CLASS_NAMES[class_]}", count, COLOURS[class_], f" + {extra:,}")
        for (class_, count), extra in zip(trained.items(), held, strict=True)
        if count or extra
    ]
    _print_bars("Trained tokens by class (neutral: no cross-entropy)", bars)
    few, many = sorted((trained[POSITIVE], trained[NEGATIVE]))
    if few and many >= _IMBALANCE * few:
        fuller, other = ("+1", "−1") if trained[POSITIVE] == many else ("−1", "+1")
        result(
            f"Class {fuller} has {many / few:.1f} times the tokens of class {other}: class_weights, or max_tokens of a "
            "dataset, would balance them.\n"
        )


def _print_repeats(data: PreparedData, config: Config) -> None:
    """Print how many texts occur more than once, and warn of what is hardly meant."""
    repeats = repeats_of(data)
    if repeats.documents:
        result(f"{texts_occur(repeats.texts)} more than once; {repeats.documents:,} documents repeat an earlier one.")
    else:
        result("No text occurs twice.")
    for text in data_warnings(data, config, repeats, with_places=True):
        warn(text)


def _print_bars(title: str, bars: Sequence[tuple[str, int, str, str]]) -> None:
    """Print (label, number, colour, what follows the number) as horizontal bars."""
    from rich.text import Text

    screen = console()
    screen.print(Text(title))
    most, width = max((count for _, count, _, _ in bars), default=1), max((len(bar[0]) for bar in bars), default=0)
    for label, count, colour, more in bars:
        eighths = round(8 * _BAR * count / max(most, 1)) or int(count > 0)
        bar = "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]
        line = Text(f"  {label.rjust(width)} ")
        line.append(bar, colour)
        line.append(f" {count:,}{more}")
        screen.print(line, soft_wrap=True)
    screen.print()
