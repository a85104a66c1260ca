"""``cadapter prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadapter.commands.shared_options import OverridesOption

EXAMPLES = (
    "cadapter prepare config.toml --show 3",
    "cadapter prepare config.toml --skip-bad 10 --set sequence_len=1024",
)


def command(
    config: Annotated[Path, typer.Argument(help="The config, a TOML file.", metavar="CONFIG", show_default=False)],
    show: Annotated[
        int,
        typer.Option(
            "--show",
            metavar="N",
            min=0,
            show_default=False,
            help="Print N packed sequences, spread over all; colours tell classes, and trained tokens from others.",
        ),
    ] = 0,
    skip_bad: Annotated[
        int,
        typer.Option(
            "--skip-bad",
            metavar="N",
            min=0,
            show_default=False,
            help="Leave out up to N records that cannot be used, and list them; without it they are an error.",
        ),
    ] = 0,
    overrides: OverridesOption = None,
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
    from cadapter.data.reporting import print_report
    from cadapter.data.showing import show_sequences
    from cadapter.terminal import note

    settings = load_config(config, overrides or [])
    data = prepare_data(settings, force=force, skip_bad=skip_bad)
    print_report(data, settings)
    if show:
        show_sequences(data, show)
    for directory in dict.fromkeys(directory.parent for directory in data.directories):
        note(f"Cache: {directory}")
    options = [part for override in overrides or [] for part in ("--set", override)]
    note(f"Next: {shlex.join(['cadapter', 'train', str(config), *options])}")
