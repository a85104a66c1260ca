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
    "cadapter inspect-norms run/final --plot norms.png",
    "cadapter inspect-norms run/final --json norms.json --fail-above 1.0",
)

COLUMNS = {
    "‖W‖_F": "frobenius",
    "‖W‖₂": "spectral",
    "ρ(W)": "radius",
    "σ_min(I+W)": "sigma_min",
    "effective rank": "effective_rank",
    "Neumann 1 lacks": "neumann_remainder_1",
    "Neumann 2 lacks": "neumann_remainder_2",
}


def command(
    adapter: AdapterArgument,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the numbers as JSON, over an older file; - prints them instead of the table.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw norms by layer and the singular values of W, over an older file.",
            show_default=False,
        ),
    ] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="X", help="Exit with 1 when a layer's spectral norm ‖W‖₂ exceeds X.")
    ] = None,
) -> None:
    """Show how strong a control adapter is in each layer, and whether its inverse is healthy.

    Everything is worked out at the adapter's rank, in float64. The symmetric form has one more column: how far its
    directions are from orthonormal.
    """
    import shlex

    from cadapter.adapters.directory import read_control_adapter
    from cadapter.convert.norms import measure, orthogonality, verdict
    from cadapter.convert.norms_plot import norms_picture
    from cadapter.errors import CheckFailed, UsageError
    from cadapter.files import STANDARD_OUTPUT, check_report, write_json_report, write_report
    from cadapter.terminal import note, progress, set_quiet, significant

    if fail_above is not None and not (math.isfinite(fail_above) and fail_above >= 0):
        raise UsageError(f"--fail-above {fail_above:g}: give a number of at least 0.")
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: the picture is a PNG; give a name that ends in .png.")
    for file in (json_file, plot):
        check_report(file)
    if json_file == STANDARD_OUTPUT:
        set_quiet(True)  # nothing else may stand beside the numbers
    control = read_control_adapter(adapter)
    with progress("measuring", total=len(control.layers), unit="layers") as advance:
        measured = measure(control, advance)
    sentences = verdict(control, measured)
    errors = orthogonality(control)
    if json_file != STANDARD_OUTPUT:
        _print_table(control, measured, errors, sentences)
    if json_file is not None:
        write_json_report(json_file, _as_json(control, measured, errors, sentences))
    if plot is not None:
        write_report(plot, norms_picture(_title(control), measured))
    model = control.base_model_name_or_path or "BASE"
    words = ["cadapter", "generate", model, "Once upon a time", "--adapter", str(adapter), "--compare"]
    note(f"Next: {shlex.join(words)}")
    above = [layer for layer, found in measured.items() if fail_above is not None and found.spectral > fail_above]
    if above:
        worst = max(above, key=lambda layer: measured[layer].spectral)
        raise CheckFailed(
            f"‖W‖₂ exceeds {fail_above:g} in {len(above)} of {len(measured)} layers: "
            f"{significant(measured[worst].spectral)} in layer {worst}."
        )


def _title(control: ControlAdapterFiles) -> str:
    form = "symmetric" if control.form == "symmetric" else f"scale {control.scale:.4g}"
    return (
        f"{control.path}: rank {control.rank}, {form}, site {control.site}, {control.inverse} inverse, "
        f"{len(control.layers)} layers"
    )


def _print_table(
    control: ControlAdapterFiles, measured: dict[int, Health], errors: dict[int, float], sentences: list[str]
) -> None:
    from cadapter.terminal import significant, table

    columns = {label: [getattr(found, name) for found in measured.values()] for label, name in COLUMNS.items()}
    if errors:
        columns["‖QᵀQ-I‖₂"] = list(errors.values())
    rows = [(layer, *values) for layer, *values in zip(measured, *columns.values(), strict=True)]
    for name, summarise in (("largest", max), ("smallest", min), ("mean", _mean)):
        rows.append((name, *(summarise(values) for values in columns.values())))
    shown = [(name, *map(significant, values)) for name, *values in rows]
    labels = ("layer", *columns)
    table(_title(control), labels, shown, align="r" * len(labels), footer="\n".join(sentences))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: what is infinite becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _as_json(
    control: ControlAdapterFiles, measured: dict[int, Health], errors: dict[int, float], sentences: list[str]
) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    for layer, found in measured.items():
        numbers = {**asdict(found), **({"orthogonality_error": errors[layer]} if errors else {})}
        spectrum = numbers.pop("singular_values")
        layers.append({"layer": layer, **_finite(numbers), "singular_values": spectrum})
    names = [name for name in layers[0] if name not in ("layer", "singular_values")]
    columns = {name: [math.inf if each[name] is None else each[name] for each in layers] for name in names}
    return {
        "adapter": str(control.path),
        "rank": control.rank,
        "alpha": control.alpha,
        "scale": control.scale,
        "form": control.form,
        "site": control.site,
        "inverse": control.inverse,
        "layers": layers,
        "max": _finite({name: max(column) for name, column in columns.items()}),
        "min": _finite({name: min(column) for name, column in columns.items()}),
        "mean": _finite({name: _mean(column) for name, column in columns.items()}),
        "verdict": sentences,
    }
