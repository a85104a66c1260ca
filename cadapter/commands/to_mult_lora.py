"""``cadapter to-mult-lora``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cadapter.commands.shared_options import (
    AdapterArgument,
    ForceOption,
    InverseOption,
    OutputArgument,
    StrengthOption,
    TrustOption,
    WritersOption,
    check_output,
    trust_words,
)
from cadapter.commands.verifying import TextOption, VerifyOption, rows_for, show_fidelity

EXAMPLES = (
    "cadapter to-mult-lora run/final mult-lora",
    "cadapter to-mult-lora run/final mult-lora-inverse --inverse --base base --verify",
)


def command(
    adapter: AdapterArgument,
    output: OutputArgument,
    inverse: InverseOption = False,
    strength: StrengthOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The base model, for --verify or where the adapter does not record its family."
        ),
    ] = None,
    writers: WritersOption = None,
    verify: VerifyOption = False,
    text: TextOption = None,
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
) -> None:
    """Turn a control adapter into a multiplicative LoRA.

    Each residual writer's weight becomes (I + s·B·A)·W. The result is for `cadapter merge` and for programs that know
    multiplicative LoRAs; peft does not load it (see to-add-lora). Only --verify reads the base's weights.
    """
    import shlex
    from functools import partial

    from cadapter.adapters.directory import read_control_adapter
    from cadapter.convert.fidelity import ChangedCheckpoint, verdict
    from cadapter.convert.mult_lora import to_mult_lora
    from cadapter.convert.operators import Dial
    from cadapter.convert.plan import make_recipe
    from cadapter.models.checkpoint import open_model
    from cadapter.terminal import note, warn

    check_output(output, force, adapter, *([base] if base else []))
    dial = Dial.from_options(strength=strength, inverse=inverse)
    control = read_control_adapter(adapter)
    model = open_model(base, trust_remote_code) if base else None
    recorded = control.base_model_name_or_path
    recorded = recorded if recorded and os.path.isdir(recorded) else None
    tested = open_model(recorded, trust_remote_code) if verify and model is None and recorded else model
    rows = rows_for(tested, verify, text)
    summary = to_mult_lora(
        control,
        output,
        dial,
        base=model,
        writers=writers.value if writers else None,
        force=force,
    )
    for line in summary.notes:
        warn(line)
    note(
        f"{output}: multiplicative LoRA at {dial}, {summary.pairs} modules of {summary.layers} layers, "
        f"rank {summary.rank}."
    )
    if tested is not None and rows:
        converted = ChangedCheckpoint(tested, make_recipe(tested, output, Dial()).plan)
        judge = partial(verdict, exact=summary.exact, writers=writers.value if writers else None)
        show_fidelity(tested, [(control, dial)], converted, rows, judge)
    words = ["cadapter", "merge", base or recorded or "BASE", str(output), f"{output}-merged"]
    note(f"Next: {shlex.join([*words, *trust_words(trust_remote_code)])}")
