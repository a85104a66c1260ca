"""``cadapter to-gguf``."""

from __future__ import annotations

import re
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cadapter.commands.shared_options import ForceOption, check_output

if TYPE_CHECKING:
    from cadapter.convert.gguf import GgufSummary

EXAMPLES = (
    "cadapter to-gguf lora lora.gguf",
    "cadapter to-gguf lora lora-q8.gguf --outtype q8_0 --base base",
)


class OutType(str, Enum):
    """Types of numbers in a GGUF file."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


def command(
    lora: Annotated[Path, typer.Argument(metavar="LORA", help="Directory of an additive LoRA.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="GGUF file to write; it must not exist.")],
    outtype: Annotated[
        OutType, typer.Option(help="Type of all tensors that it can hold; the others stay f16, or f32.")
    ] = OutType.f32,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Directory or hub id of the base model; only its config is read. Default: what LORA names.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn an additive LoRA into a GGUF file that llama.cpp loads.

    Names, and the order of rows where llama.cpp has another than the model, are those of llama.cpp's own converters.
    A control adapter becomes a LoRA with to-add-lora first.
    """
    import shlex

    from cadapter.convert.gguf import lay_out, write_gguf
    from cadapter.terminal import note, progress, warn

    check_output(output, force, lora, *([base] if base else []), gguf=True)
    found = lay_out(lora, base)
    with progress("converting", total=len(found.pairs), unit="modules") as advance:
        summary = write_gguf(found, output, outtype.value, force, advance)
    for line in _kept(summary):
        warn(line)
    written = ", ".join(f"{count} {kind}" for kind, count in summary.tensors.items())
    reordered = sum(pair.reordered for pair in found.pairs)
    modules = f"{len(found.pairs)} modules" + (f", {reordered} of them with rows in another order" if reordered else "")
    rounding = f"; rounding changes a tensor by at most {summary.rounding:.2g} of its norm" if summary.rounding else ""
    note(
        f"{output}: LoRA for architecture {found.architecture}, alpha {found.alpha:g}, {modules}.\n"
        f"{summary.tensors.total()} tensors ({written}), {summary.bytes.total() / 1e6:.3f} MB{rounding}.\n"
        f"Next: {shlex.join(['llama-cli', '-m', 'base.gguf', '--lora', str(output)])}"
    )


def _kept(summary: GgufSummary) -> list[str]:
    """A line for each kind of tensor, layers taken together, that has another type than asked for."""
    kinds = Counter((re.sub(r"\d+", "*", name, count=1), to, why) for name, (to, why) in summary.kept.items())
    return [f"{name} stays {to} ({count} tensors): {why}." for (name, to, why), count in kinds.items()]
