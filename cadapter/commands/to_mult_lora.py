"""``cadapter to-mult-lora``."""

from __future__ import annotations

from typing import Annotated

import typer

from cadapter.commands.shared_options import (
    AdapterArgument,
    ForceOption,
    InverseOption,
    OutputArgument,
    StrengthOption,
    WritersOption,
    check_output,
)

EXAMPLES = (
    "cadapter to-mult-lora run/final mult-lora",
    "cadapter to-mult-lora run/final mult-lora-inverse --inverse --base base",
)


def command(
    adapter: AdapterArgument,
    output: OutputArgument,
    inverse: InverseOption = False,
    strength: StrengthOption = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, where the adapter does not record its family."),
    ] = None,
    writers: WritersOption = None,
    force: ForceOption = False,
) -> None:
    """Turn a control adapter into a multiplicative LoRA.

    Each residual writer's weight becomes (I + s·B·A)·W. The result is for `cadapter merge` and for programs that know
    multiplicative LoRAs; peft does not load it (see to-add-lora).
    """
    from cadapter.adapters.directory import read_control_adapter
    from cadapter.convert.mult_lora import to_mult_lora
    from cadapter.convert.operators import Dial
    from cadapter.models.checkpoint import Checkpoint, resolve_model
    from cadapter.terminal import note, warn

    check_output(output, force, adapter, *([base] if base else []))
    dial = Dial.from_options(strength=strength, inverse=inverse)
    summary = to_mult_lora(
        read_control_adapter(adapter),
        output,
        dial,
        base=Checkpoint(resolve_model(base)) if base else None,
        writers=writers.value if writers else None,
        force=force,
    )
    for line in summary.notes:
        warn(line)
    note(
        f"{output}: multiplicative LoRA at {dial}, {summary.pairs} modules of {summary.layers} layers, "
        f"rank {summary.rank}."
    )
