"""Options that commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DIAL_PANEL = "How far to turn the adapter"


class WritersChoice(str, Enum):
    """Which residual writers a conversion changes."""

    mlp = "mlp"
    all = "all"


class Dtype(str, Enum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


AdapterArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of a control adapter.")]
BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="Directory or hub id of the base model.")]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to write; it must not exist.")]
InverseOption = Annotated[
    bool,
    typer.Option("--inverse", help="The exact inverse (the same as --strength -1).", rich_help_panel=DIAL_PANEL),
]
StrengthOption = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        help="(I + W)^T: 1 as trained, -1 the inverse, 0.5 half-way, 2 twice as far.",
        rich_help_panel=DIAL_PANEL,
    ),
]
WritersOption = Annotated[
    WritersChoice | None,
    typer.Option(
        help="Change the MLP's residual writers only, or the attention's too. Default: those of the adapter's site.",
        show_default=False,
        rich_help_panel="More",
    ),
]
OverridesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the config; can be given repeatedly.",
        show_default=False,
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace OUTPUT, if cadapter wrote it.", rich_help_panel="More")
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that the model's directory brings, where it is needed. It can do all that you can.",
        rich_help_panel="More",
    ),
]


def trust_words(trust_remote_code: bool) -> list[str]:
    """The words of :data:`TrustOption` for the next command, where this one had them."""
    return ["--trust-remote-code"] if trust_remote_code else []


def check_output(output: Path, force: bool, *inputs: str | Path, gguf: bool = False) -> None:
    """Refuse an output that exists; with ``force`` one that is or holds an input, or that cadapter did not write.

    Args:
        gguf: the output is a GGUF file, and no directory.

    Raises:
        UsageError: as said.
    """
    from cadapter.errors import UsageError
    from cadapter.files import at_home, refuse_existing

    refuse_existing(output, force)
    target = output.resolve()
    for given in inputs:
        source = at_home(Path(given)).resolve()
        if source.exists() and (source == target or target in source.parents):
            raise UsageError(
                f"{output} is or holds the input {given}, which --force would remove: choose another output."
            )
        if target.exists() and source in target.parents:
            raise UsageError(f"{output} is part of the input {given}: choose another output.")
    if force and output.exists():
        from cadapter.written import refuse_foreign_directory, refuse_foreign_gguf

        (refuse_foreign_gguf if gguf else refuse_foreign_directory)(output)
