"""``cadapter plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cadapter.commands.shared_options import OverridesOption

EXAMPLES = (
    "cadapter plan config.toml --gpu-memory 24",
    "cadapter plan config.toml --gpus 16 --nodes 2 --link 100gbe",
)
_MACHINE = "The machine"


def command(
    config: Annotated[Path, typer.Argument(help="The config, a TOML file.", metavar="CONFIG", show_default=False)],
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB",
            help="Memory of each GPU in GiB: 24 for a card that is sold with 24 GB.",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Kind of GPU, for its speed and memory: h100, h200, a100, a100-40gb, l40s, a6000, rtx5090, rtx4090, "
            "rtx3090. Default: the speed of an h100.",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of all nodes together. Default: as many as pipeline_stages.",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that the GPUs are in.", rich_help_panel=_MACHINE)] = 1,
    link: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What connects GPUs: nvlink, nvlink3, pcie5, pcie, pcie3 within a node (default pcie); ib-ndr, "
            "ib-hdr, 100gbe, 25gbe, 10gbe, 1gbe between nodes (default 10gbe). One of each can be given.",
            show_default=False,
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Packed sequences to train on, where the data is not prepared here.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the numbers to FILE, too; - prints them instead.", show_default=False
        ),
    ] = None,
    overrides: OverridesOption = None,
) -> None:
    """Say what a run will be before any weight is there: layout, steps, memory by part, and what fits.

    Only the model's config.json is needed. Where the run does not fit the GPU, the settings that would make it fit are
    named; for several GPUs the possible layouts are compared. It is all by estimate: docs/planning.md has the formulas.
    """
    from cadapter.config import config_warnings, load_config, locating
    from cadapter.files import STANDARD_OUTPUT, check_report, write_json_report
    from cadapter.planning.machines import machine
    from cadapter.terminal import set_quiet, warn
    from cadapter.training.forecast import forecast
    from cadapter.training.forecast_report import as_json, show_forecast

    check_report(json_file)
    if json_file == STANDARD_OUTPUT:
        set_quiet(True)  # nothing else may stand beside the numbers
    settings = load_config(config, overrides or [])
    there = machine(gpus or settings.pipeline_stages, nodes, tuple(link or ()), gpu, gpu_memory)
    for text in config_warnings(settings):
        warn(text)
    with locating(config, overrides or []):
        found = forecast(settings, there, sequences)
    if json_file != STANDARD_OUTPUT:
        show_forecast(found, config, overrides or [])
    if json_file is not None:
        write_json_report(json_file, as_json(found))
