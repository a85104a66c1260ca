"""``cadapter prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cadapter.data import DatasetReport, PreparedData

EXAMPLES = ("cadapter prepare config.toml", "cadapter prepare config.toml --show 3 --set sequence_len=1024")


def command(
    config: Annotated[Path, typer.Argument(help="The config, a TOML file.", metavar="CONFIG", show_default=False)],
    show: Annotated[
        int,
        typer.Option(
            "--show",
            metavar="N",
            min=0,
            show_default=False,
            help="Print N packed sequences, spread over all of them, with classes and untrained tokens made visible.",
        ),
    ] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a key of the config; can be given repeatedly.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build the cache anew.", rich_help_panel="Rarely needed")
    ] = False,
) -> None:
    """Read, tokenise, pack and cache every dataset of a config, and print what became of it.

    `cadapter train` does the same when it starts; prepared data is read from the cache at once, until a file, the
    tokenizer or an option that matters changes.
    """
    import shlex

    from cadapter.config import load_config
    from cadapter.data import prepare_data
    from cadapter.data.showing import show_sequences
    from cadapter.terminal import note

    settings = load_config(config, overrides or [])
    data = prepare_data(settings, force=force)
    _print_table(data, settings.mix_datasets)
    if show:
        show_sequences(data, show)
    for directory in dict.fromkeys(directory.parent for directory in data.directories):
        note(f"Cache: {directory}")
    options = [part for override in overrides or [] for part in ("--set", override)]
    note(f"Next: {shlex.join(['cadapter', 'train', str(config), *options])}")


def _print_table(data: PreparedData, mixed: bool) -> None:
    """Print a row for each dataset and one for the whole; sequences of a mixture belong to no dataset alone."""
    from cadapter.terminal import table

    columns = ("dataset", "class", "documents", "held out", "dropped", "tokens", "sequences", "padding", "cache")
    rows = [_row(report, mixed) for report in data.reports]
    evaluation = data.evaluation
    total = (
        "all",
        None,
        f"{sum(report.documents for report in data.reports):,}",
        f"{sum(report.eval_documents for report in data.reports):,}",
        _dropped(
            sum(report.empty_documents for report in data.reports),
            data.reports[0].dropped_tokens if mixed else sum(report.dropped_tokens for report in data.reports),
        ),
        _pair(sum(report.tokens for report in data.reports), sum(report.eval_tokens for report in data.reports)),
        _pair(len(data.train), len(evaluation) if evaluation else 0),
        _pair(data.train.padding, evaluation.padding if evaluation else 0),
        None,
    )
    trained = [f"Trained tokens: {_per_class(data.train.trained)}"]
    if evaluation:
        trained.append(f"evaluated: {_per_class(evaluation.trained)}")
    footer = "; ".join(trained) + ".\nWhere two numbers stand, the second is of what is held out for evaluation."
    table("Prepared data", columns, [*rows, total], align="lc", footer=footer)


def _row(report: DatasetReport, mixed: bool) -> tuple[object, ...]:
    return (
        report.name,
        f"{report.control_class:+d}" if report.control_class else "0",
        f"{report.documents:,}",
        f"{report.eval_documents:,}",
        _dropped(report.empty_documents, 0 if mixed else report.dropped_tokens),
        _pair(report.tokens, report.eval_tokens),
        "mixed" if mixed else _pair(report.sequences, report.eval_sequences),
        "mixed" if mixed else _pair(report.padding, report.eval_padding),
        "hit" if report.cache_hit else f"miss ({report.cache_reason})",
    )


def _pair(train: int, evaluation: int) -> str:
    return f"{train:,} + {evaluation:,}"


def _dropped(documents: int, tokens: int) -> str:
    parts = [f"{count:,} {what}" for count, what in ((documents, "empty documents"), (tokens, "tokens")) if count]
    return ", ".join(parts) or "0"


def _per_class(counts: tuple[int, int, int]) -> str:
    labels = ("class +1", "class −1", "class 0 (no cross-entropy)")
    return ", ".join(f"{count:,} of {label}" for count, label in zip(counts, labels, strict=True) if count) or "none"
