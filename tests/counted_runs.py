"""Runs through the launcher in which every process notes what it sends: bytes of each message, by kind."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from tests.tiny_project import Project, metrics, run_well

SITE = """
import os
import sys

if os.environ.get("RANK"):
    import torch
    import torch.distributed as distributed

    folder, rank = os.environ["CADAPTER_COUNTS"], os.environ["RANK"]

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
"""
"""Imported by Python itself in every process whose path has it."""

Counts = list[Counter[tuple[str, str, int]]]
"""For each rank how often it sent a message of a kind, a dtype and a number of bytes."""


def run_counted(project: Project, name: str, processes: int, **keys: Any) -> tuple[Counts, list[dict[str, Any]]]:
    """Train on so many processes; what each sent, and the lines of metrics."""
    folder = project.root / f"{name}-counts"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    config = project.write_config(name, **keys)
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parent.parent)])
    run_well("train", config, "--num-gpus", processes, PYTHONPATH=path, CADAPTER_COUNTS=str(folder))
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
