"""``cadapter doctor``: whether this machine can do what the other commands need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cadapter.doctor.findings import Finding

EXAMPLES = ("cadapter doctor", "cadapter doctor config.toml --json doctor.json")


def command(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="Look at the places that this config names, too.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the findings as JSON; - prints them instead of the report.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Look at packages, GPUs, kernels, disks and limits of this machine, and say what to do where something is wrong.

    Everything is tried, not only looked up: packages are imported, GPUs compute and send one another numbers, a tensor
    is put into 4 bits, two processes add up. It takes some ten seconds, and nothing is left behind.

    Exits with 1 if something is broken. Warnings are about what works and could be better.
    """
    import shlex
    from dataclasses import asdict

    from cadapter.doctor.places import check_config, check_disks, check_hub, check_limits
    from cadapter.doctor.probing import check_compute, check_packages
    from cadapter.errors import CheckFailed
    from cadapter.files import STANDARD_OUTPUT, check_report, write_json_report
    from cadapter.terminal import progress

    check_report(json_file)
    with progress("looking"):
        found = check_packages()
        found += check_compute(found)
        found += [*check_disks(), *check_hub(), *check_limits()]
        found += check_config(config) if config else []
    broken = sum(each.status == "broken" for each in found)
    warnings = sum(each.status == "warning" for each in found)
    if json_file != STANDARD_OUTPUT:
        _print(found)
    if json_file is not None:
        findings = [asdict(each) for each in found]
        write_json_report(json_file, {"broken": broken, "warnings": warnings, "findings": findings})
    if broken:
        raise CheckFailed(f"{broken} of {len(found)} things are broken.\nDo what stands behind -> above.")
    if json_file != STANDARD_OUTPUT:
        following = shlex.join(["cadapter", "prepare", str(config or "config.toml")])
        print(f"\nNothing is broken; warnings: {warnings}.\nNext: {following}")


def _print(found: list[Finding]) -> None:
    """Print findings in their sections, each with what to do below it."""
    width = max(len(each.name) for each in found)
    indent = " " * (12 + width)
    for part in dict.fromkeys(each.part for each in found):
        print(f"\n{part}")
        for each in found:
            if each.part == part:
                lines = each.text.splitlines() + ([f"-> {each.remedy}"] if each.remedy else [])
                print(f"  {each.status:<8} {each.name:<{width}} " + f"\n{indent}".join(lines))
