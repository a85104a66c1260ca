"""``cadapter merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadapter.commands.shared_options import (
    DIAL_PANEL,
    BaseArgument,
    Dtype,
    ForceOption,
    OutputArgument,
    StrengthOption,
    TrustOption,
    WritersOption,
    check_output,
    trust_words,
)
from cadapter.commands.verifying import TextOption, VerifyOption, rows_for, show_fidelity

EXAMPLES = (
    "cadapter merge base run/final merged --strength -0.5 --verify",
    "cadapter merge base run/final merged-both --also style/final=1.5 --dtype bfloat16",
)


def command(
    base: BaseArgument,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A control adapter, a multiplicative LoRA or an additive LoRA.")
    ],
    output: OutputArgument,
    inverse: Annotated[
        bool,
        typer.Option(
            "--inverse",
            help="The exact inverse (the same as --strength -1); an additive LoRA is subtracted.",
            rich_help_panel=DIAL_PANEL,
        ),
    ] = False,
    strength: StrengthOption = None,
    scale: Annotated[
        float | None,
        typer.Option(metavar="X", help="I + X·W: linear, and no inverse at X = -1.", rich_help_panel=DIAL_PANEL),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR=T",
            help="Then merge this control adapter too, at strength T (repeatable, in order).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Store all weights in this dtype. Default: as they are.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 …")] = "cpu",
    writers: WritersOption = None,
    multiplicative: Annotated[
        bool,
        typer.Option(
            "--multiplicative",
            help="Take ADAPTER for a multiplicative LoRA, whatever its config says.",
            rich_help_panel="More",
        ),
    ] = False,
    verify: VerifyOption = False,
    text: TextOption = None,
    trust_remote_code: TrustOption = False,
    force: ForceOption = False,
) -> None:
    """Merge an adapter into its base model.

    The model is read and written shard by shard. What an adapter changes is worked out in float32 and rounded once;
    everything else is copied byte for byte. --inverse, --strength and --scale exclude one another.
    """
    import shlex
    from functools import partial

    from cadapter.convert.fidelity import verdict
    from cadapter.convert.merge import merge_card, merge_model
    from cadapter.convert.operators import Dial
    from cadapter.convert.plan import make_recipe
    from cadapter.models.checkpoint import Checkpoint, open_model
    from cadapter.models.device import usable_device
    from cadapter.terminal import note, progress, warn

    dial = Dial.from_options(strength, scale, inverse)
    further = [_directory_and_strength(text) for text in also or []]
    check_output(output, force, base, adapter, *(directory for directory, _ in further))
    place, stored = usable_device(device), dtype.value if dtype else None
    model = open_model(base, trust_remote_code)
    recipe = make_recipe(model, adapter, dial, further, writers.value if writers else None, multiplicative)
    for line in recipe.notes:
        warn(line)
    rows = rows_for(model, verify, text)
    with progress("merging", total=len(model.names()), unit="tensors") as advance:
        summary = merge_model(
            model,
            recipe.plan,
            output,
            lambda done: merge_card(base, recipe.steps, recipe.notes, stored, done),
            place,
            stored,
            force,
            advance,
        )
    rate = summary.bytes / 1e9 / max(summary.seconds, 1e-9)
    note(
        f"{output}: {summary.changed} tensors changed, {summary.copied} copied; largest change "
        f"{summary.largest_change:.3%} of a tensor's norm ({summary.largest_name}).\n"
        f"{summary.bytes / 1e9:.3f} GB in {summary.seconds:.1f} s ({rate:.2f} GB/s)."
    )
    if rows:
        source = recipe.adapters if len(recipe.adapters) == len(recipe.steps) else recipe.plan
        chosen = writers.value if writers else None
        judge = partial(verdict, exact=recipe.exact, rounded_to=_less_than_float32(summary.dtypes), writers=chosen)
        show_fidelity(model, source, Checkpoint(output, trust_remote_code), rows, judge, device)
    trusting = "".join(f" {word}" for word in trust_words(trust_remote_code))
    note(f'Next: cadapter generate {shlex.quote(str(output))} "Once upon a time"{trusting}')


def _less_than_float32(dtypes: set[str]) -> str | None:
    """The lower precisions among the dtypes of changed weights, in words."""
    return " and ".join(sorted(dtypes - {"float32", "float64"})) or None


def _directory_and_strength(text: str) -> tuple[Path, float]:
    """Take "DIR=T" apart at its last "="."""
    from cadapter.errors import UsageError
    from cadapter.files import at_home

    directory, _, number = text.rpartition("=")
    try:
        strength = float(number)
    except ValueError:
        strength = None
    if not directory or strength is None:
        raise UsageError(f"--also {text}: write it as DIR=T, a directory and a number.")
    return at_home(Path(directory)), strength
