"""What a plan says, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cadapter.planning.fitting import Remedy, Settings
from cadapter.planning.layouts import Verdict
from cadapter.planning.memory import GIB, RunSizes, StageMemory
from cadapter.terminal import table

MIB = 2**20
PARTS = {
    "weights": "weights", "adapter": "adapter", "gradients": "gradients", "optimiser": "Adam",
    "activations": "activations", "backward": "backward", "logits": "logits", "buffers": "buffers",
}  # fmt: skip
"""The parts of a stage's memory and what their columns are called."""


def memory_table(title: str, run: RunSizes, bounds: Sequence[int], stages: Sequence[StageMemory]) -> None:
    """Print what each stage holds, a column each: layers, trained parameters, memory by part."""
    numbers = [sum(run.trainable[first:stop]) for first, stop in pairwise(bounds)]
    sizes = [_sizes(memory) for memory in stages]
    rows = [
        ["layers", *(layers_of(bounds, stage) for stage in range(len(stages)))],
        ["trained parameters", *(f"{number:,}" for number in numbers)],
        *([name, *(each[part] for each in sizes)] for part, name in PARTS.items()),
        ["peak, GiB", *(f"{memory.total / GIB:.2f}" for memory in stages)],
    ]
    table(
        title,
        ["stage", *map(str, range(len(stages)))],
        rows,
        align="l",
        footer="Memory in GiB (2^30 bytes), by estimate. Of backward and logits, which take turns, the larger counts.",
    )


def _sizes(memory: StageMemory) -> dict[str, str]:
    smaller = "backward" if memory.backward < memory.logits else "logits"
    cells = {part: f"{size / GIB:.2f}" for part, size in memory.parts().items()}
    return {**cells, smaller: f"({cells[smaller]})"}


def layers_of(bounds: Sequence[int], stage: int) -> str:
    """The pipeline layers of a stage, in words."""
    first, last = (_layer_name(index, bounds[-1]) for index in (bounds[stage], bounds[stage + 1] - 1))
    return first if first == last else f"{first} … {last}"


def _layer_name(index: int, count: int) -> str:
    if index == 0:
        return "embedding"
    return "head" if index == count - 1 else f"block {index - 1}"


def remedy_table(remedies: Sequence[Remedy]) -> None:
    """Print what single changes would bring."""
    rows = [
        [
            in_toml(remedy.settings),
            "" if remedy.memory is None else f"{remedy.memory / GIB:.2f}",
            remedy.remark,
        ]
        for remedy in remedies
    ]
    table("What one change brings", ["setting", "peak, GiB", ""], rows, align="lrl")


def layout_table(verdicts: Sequence[Verdict], chosen: Verdict | None) -> None:
    """Print layouts side by side; the first is the config's own."""
    rows: list[list[Any]] = []
    for number, verdict in enumerate(verdicts):
        candidate = verdict.candidate
        marks = [*(["config"] if number == 0 else []), *(["best"] if verdict is chosen else [])]
        rows.append(
            [
                f"{candidate.stages} × {candidate.replicas}",
                "column" if candidate.column_major else "row",
                candidate.run.accumulation,
                candidate.keep,
                f"{verdict.memory / GIB:.1f}" + ("" if verdict.fits is not False else " too much"),
                f"{verdict.bubble:.0%}",
                _traffic(verdict.stage_bytes, verdict.crosses[0]),
                _traffic(verdict.replica_bytes, verdict.crosses[1]),
                f"{verdict.seconds:,.2f}",
                f"{verdict.tokens_per_second:,.0f}",
                ", ".join(marks),
            ]
        )
    table(
        "Layouts with the same batch",
        [
            "stages × replicas", "ranks", "accumulation", "kept", "peak, GiB", "bubble", "between stages, MiB",
            "between replicas, MiB", "s/step", "tokens/s", "",
        ],
        rows,
        align="lcrlrrrrrrl",
        footer="MiB a step: at each cut of a pipeline, both ways; and sent by a process to add up gradients. "
        "*: from node to node.",
    )  # fmt: skip


def _traffic(count: float, crosses: bool) -> str:
    return f"{count / MIB:,.1f}{'*' if crosses else ''}" if count else "-"


def in_toml(settings: Settings) -> str:
    """Settings as they stand in a config, one after the other."""
    return ", ".join(f"{key} = {_value(value)}" for key, value in settings.items())


def set_options(settings: Settings) -> list[str]:
    """Settings as options of a command."""
    return [part for key, value in settings.items() for part in ("--set", f"{key}={_value(value)}")]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
