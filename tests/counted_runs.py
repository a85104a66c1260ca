"""Runs through the launcher in which every process notes what it sends: bytes of each message, by kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cadapter.planning.schedule import step_seconds
from tests.tiny_project import Project, metrics, run_well

SITE = """
import os
import sys

if os.environ.get("RANK") or os.environ.get("CADAPTER_ALONE"):
    import torch
    import torch.distributed as distributed

    folder, rank = os.environ["CADAPTER_COUNTS"], os.environ.get("RANK", "0")

    def note(kind, tensor):
        with open(os.path.join(folder, rank), "a") as file:
            file.write(f"{kind} {str(tensor.dtype)[6:]} {tensor.nbytes}\\n")

    send, all_reduce = distributed.send, distributed.all_reduce

    def by_the_pipeline():
        frame = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.endswith(os.path.join("pipe", "p2p.py")):
            frame = frame.f_back
        return frame is not None

    def noted_send(tensor, *args, **kwargs):
        if by_the_pipeline():  # and not what is written at the end
            note("send", tensor)
        return send(tensor, *args, **kwargs)

    def noted_all_reduce(tensor, *args, **kwargs):
        if kwargs.get("group") is not None:
            note("reduce", tensor)
        return all_reduce(tensor, *args, **kwargs)

    distributed.send, distributed.all_reduce = noted_send, noted_all_reduce

    pause = float(os.environ.get("CADAPTER_PAUSE", 0))
    if pause:
        import time

        from cadapter.models.layers import DecoderLayer

        class Pause(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden):
                time.sleep(pause)
                return hidden.view_as(hidden)

            @staticmethod
            def backward(ctx, gradient):
                time.sleep(2 * pause)
                return gradient

        forward = DecoderLayer.forward

        def slow_forward(self, parts):
            hidden, *rest = forward(self, parts)
            return (Pause.apply(hidden), *rest)

        DecoderLayer.forward = slow_forward
"""
"""Imported by Python itself in every process whose path has it."""

Counts = list[Counter[tuple[str, str, int]]]
"""For each rank how often it sent a message of a kind, a dtype and a number of bytes."""


def run_counted(
    project: Project, name: str, processes: int, pause: float = 0, **keys: Any
) -> tuple[Counts, list[dict[str, Any]]]:
    """Train on so many processes; what each sent, and the lines of metrics.

    With ``pause`` each block sleeps for so many seconds in its forward pass, and twice as long in its backward pass:
    how long a step takes is then the schedule's doing, however many cores there are and whoever else uses them.
    """
    folder = project.root / f"{name}-counts"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    config = project.write_config(name, **keys)
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parent.parent)])
    changes = {"PYTHONPATH": path, "CADAPTER_COUNTS": str(folder), "CADAPTER_PAUSE": str(pause)}
    if processes == 1:  # which no launcher tells its rank
        changes["CADAPTER_ALONE"] = "1"
    run_well("train", config, "--num-gpus", processes, **changes)
    return [_read(folder / str(rank)) for rank in range(processes)], metrics(project.root / name)


def _read(file: Path) -> Counter[tuple[str, str, int]]:
    found: Counter[tuple[str, str, int]] = Counter()
    for line in file.read_text().splitlines() if file.exists() else []:
        kind, dtype, size = line.split()
        found[kind, dtype, int(size)] += 1
    return found


def sent_bytes(counts: Counter[tuple[str, str, int]]) -> int:
    """Bytes sent to other stages, without what DeepSpeed sends once: shapes (int32), and a scalar to try the way."""
    sizes = ((kind, dtype, size, times) for (kind, dtype, size), times in counts.items())
    return sum(size * times for kind, dtype, size, times in sizes if kind == "send" and dtype != "int32" and size > 4)


def reduced_bytes(counts: Counter[tuple[str, str, int]]) -> int:
    """Bytes of gradients that were added up with other replicas, without DeepSpeed's own sums of one or two numbers."""
    return sum(size * times for (kind, _, size), times in counts.items() if kind == "reduce" and size > 16)


def paused_step(bounds: Sequence[int], pause: float, accumulation: int) -> float:
    """Seconds that a plan predicts for a step whose blocks sleep; nothing else takes time."""
    blocks = [sum(0 < layer < bounds[-1] - 1 for layer in range(first, stop)) for first, stop in pairwise(bounds)]
    forward = [pause * count for count in blocks]
    return step_seconds(forward, [2 * each for each in forward], [0.0] * (len(blocks) - 1), accumulation)


def step_lengths(lines: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step of a run."""
    tokens = [line["tokens"] for line in lines]
    each = [after - before for before, after in pairwise([0, *tokens])]
    return [count / line["train/tokens_per_second"] for count, line in zip(each, lines, strict=True)]
