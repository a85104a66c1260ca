"""``cadapter to-add-lora``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cadapter.commands.shared_options import (
    AdapterArgument,
    BaseArgument,
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

if TYPE_CHECKING:
    from cadapter.convert.add_lora import AdditiveSummary

EXAMPLES = (
    "cadapter to-add-lora base run/final lora --verify",
    "cadapter to-add-lora base run/final lora-softly --strength 0.5 --rank 8",
)


def command(
    base: BaseArgument,
    adapter: AdapterArgument,
    output: OutputArgument,
    inverse: InverseOption = False,
    strength: StrengthOption = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="K", help="Truncate to rank K and say what that keeps. Default: the adapter's own rank."),
    ] = None,
    writers: WritersOption = None,
    verify: VerifyOption = False,
    text: TextOption = None,
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
) -> None:
    """Turn a control adapter into an additive LoRA that peft loads.

    At the adapter's own rank the LoRA is (I + s·B·A)·W − W of each residual writer, to rounding: nothing is
    approximated by a decomposition.
    """
    import shlex
    from functools import partial

    from cadapter.adapters.directory import read_control_adapter
    from cadapter.convert.add_lora import to_add_lora
    from cadapter.convert.fidelity import ChangedCheckpoint, verdict
    from cadapter.convert.operators import Dial
    from cadapter.convert.plan import make_recipe
    from cadapter.models.checkpoint import open_model
    from cadapter.models.own_code import is_own_class
    from cadapter.terminal import note, progress, warn

    check_output(output, force, base, adapter)
    dial = Dial.from_options(strength=strength, inverse=inverse)
    control, model = read_control_adapter(adapter), open_model(base, trust_remote_code)
    rows = rows_for(model, verify, text)
    with progress("converting", unit="residual writers") as advance:
        summary = to_add_lora(
            model,
            base,
            control,
            output,
            dial,
            rank=rank,
            writers=writers.value if writers else None,
            force=force,
            advance=advance,
        )
    for line in summary.notes:
        warn(line)
    _print_kept(summary)
    biases = f", {summary.biases} with a bias" if summary.biases else ""
    note(f"{output}: LoRA at {dial}, {summary.pairs} modules{biases} of {summary.layers} layers, rank {summary.rank}.")
    if rows:
        converted = ChangedCheckpoint(model, make_recipe(model, output, Dial()).plan)
        chosen = writers.value if writers else None
        judge = partial(verdict, exact=summary.exact, truncated=summary.rank < control.rank, writers=chosen)
        show_fidelity(model, [(control, dial)], converted, rows, judge)
    words = ["cadapter", "to-gguf", str(output), f"{output}.gguf", "--base", base]
    if is_own_class(model.config):  # of which llama.cpp has no architecture
        words = ["cadapter", "merge", base, str(output), f"{output}-merged", *trust_words(trust_remote_code)]
    note(f"Next: {shlex.join(words)}")


def _print_kept(summary: AdditiveSummary) -> None:
    """With --rank: the share of ‖ΔW‖² that truncation kept."""
    from cadapter.terminal import table

    if summary.kept:
        rows = [(layer, f"{share:.4%}") for layer, share in summary.kept.items()]
        table(
            f"Truncated to rank {summary.rank}: what is kept of ‖ΔW‖²",
            ("layer", "kept"),
            [*rows, ("all", f"{summary.kept_overall:.4%}")],
            align="r",
        )
