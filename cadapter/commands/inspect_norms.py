"""``cadapter inspect-norms``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cadapter.commands.shared_options import AdapterArgument

if TYPE_CHECKING:
    from cadapter.adapters.directory import ControlAdapterFiles
    from cadapter.algebra import Health

EXAMPLES = (
    "cadapter inspect-norms run/final",
    "cadapter inspect-norms run/final --json norms.json --fail-above 1.0",
)

COLUMNS = ("layer", "‖W‖_F", "‖W‖₂", "ρ(W)", "σ_min(I+W)", "effective rank", "Neumann 1 lacks", "Neumann 2 lacks")


def command(
    adapter: AdapterArgument,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the numbers as JSON; - prints them instead of the table."),
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="X", help="Exit with 1 when a layer's spectral norm ‖W‖₂ exceeds X.")
    ] = None,
) -> None:
    """Show how strong a control adapter is in each layer, and whether its inverse is healthy.

    Everything is worked out at the adapter's rank, in float64.
    """
    import json

    from cadapter.adapters.directory import read_control_adapter
    from cadapter.convert.norms import measure, verdict
    from cadapter.errors import CheckFailed
    from cadapter.files import write_text
    from cadapter.terminal import progress

    control = read_control_adapter(adapter)
    with progress("measuring", total=len(control.layers), unit="layers") as advance:
        measured = measure(control, advance)
    sentences = verdict(control, measured)
    text = json.dumps(_as_json(control, measured, sentences), indent=2, ensure_ascii=False) + "\n"
    if str(json_file) == "-":
        print(text, end="")
    else:
        if json_file is not None:
            write_text(json_file, text)
        _print_table(control, measured, sentences)
    above = [layer for layer, found in measured.items() if fail_above is not None and found.spectral > fail_above]
    if above:
        worst = max(above, key=lambda layer: measured[layer].spectral)
        raise CheckFailed(
            f"‖W‖₂ exceeds {fail_above:g} in {len(above)} of {len(measured)} layers: {measured[worst].spectral:.4g} in "
            f"layer {worst}."
        )


def _numbers(found: Health) -> tuple[float, ...]:
    return (
        found.frobenius,
        found.spectral,
        found.radius,
        found.sigma_min,
        found.effective_rank,
        found.neumann_remainder_1,
        found.neumann_remainder_2,
    )


def _print_table(control: ControlAdapterFiles, measured: dict[int, Health], sentences: list[str]) -> None:
    from cadapter.terminal import table

    rows = [(layer, *(f"{value:.4g}" for value in _numbers(found))) for layer, found in measured.items()]
    columns = list(zip(*(_numbers(found) for found in measured.values()), strict=True))
    largest = ("largest", *(f"{max(values):.4g}" for values in columns))
    smallest = ("smallest", *(f"{min(values):.4g}" for values in columns))
    mean = ("mean", *(f"{sum(values) / len(values):.4g}" for values in columns))
    title = (
        f"{control.path}: rank {control.rank}, scale {control.scale:.4g}, site {control.site}, "
        f"{control.inverse} inverse, {len(measured)} layers"
    )
    table(title, COLUMNS, [*rows, largest, smallest, mean], align="r" * len(COLUMNS), footer="\n".join(sentences))


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: what is infinite becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _as_json(control: ControlAdapterFiles, measured: dict[int, Health], sentences: list[str]) -> dict[str, Any]:
    names = list(asdict(next(iter(measured.values()))))
    values = {name: [getattr(found, name) for found in measured.values()] for name in names}
    return {
        "adapter": str(control.path),
        "rank": control.rank,
        "alpha": control.alpha,
        "scale": control.scale,
        "form": control.form,
        "site": control.site,
        "inverse": control.inverse,
        "layers": [{"layer": layer, **_finite(asdict(found))} for layer, found in measured.items()],
        "max": _finite({name: max(column) for name, column in values.items()}),
        "min": _finite({name: min(column) for name, column in values.items()}),
        "mean": _finite({name: sum(column) / len(column) for name, column in values.items()}),
        "verdict": sentences,
    }
