r"""What a plan predicts of layouts beside real runs of 1, 2 and 4 processes on the CPU, through the launcher.

    python -m tests.benchmarks.plan_layouts

For each layout: bytes between stages and between replicas, which must be equal, and the length of a step. How fast one
process computes is taken from the run of one process; what is predicted is how steps of other layouts compare with it:
the pipeline's bubble, uneven stages, what replicas share. On a machine with fewer cores than processes, processes take
turns, and the prediction is divided by what cores there are. Links are memory here and count as free.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from cadapter.planning.schedule import bubble, step_seconds
from cadapter.planning.speed import stage_operations
from cadapter.planning.traffic import gradient_bytes, stage_traffic
from cadapter.training.forecast import outlook_of
from tests.counted_runs import reduced_bytes, run_counted, sent_bytes
from tests.tiny_project import Project, make_model, texts, write_jsonl

LAYOUTS = [(1, 1, 8), (2, 1, 4), (2, 2, 8), (2, 2, 2), (4, 4, 8), (4, 2, 4)]
"""Processes, stages, accumulation."""
KEYS = {"sequence_len": 256, "compile": False, "activation_checkpointing": "none", "lora_rank": 8}


def make(root: Path) -> Project:
    """A model large enough for computing to take longer than everything around it."""
    make_model(root / "model", layers=8, hidden=512)
    for kind in ("positive", "negative"):
        write_jsonl(root / f"{kind}.jsonl", texts(kind, 4000))
    return Project(root)


def main() -> None:
    """Run each layout and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}; predicted / measured")
    print("processes  stages  accumulation  bubble   bytes between stages   between replicas   s/step")
    rate = 0.0
    with tempfile.TemporaryDirectory() as folder:
        project = make(Path(folder))
        for processes, stages, accumulation in LAYOUTS:
            name = f"run-{processes}-{stages}-{accumulation}"
            keys = {**KEYS, "pipeline_stages": stages, "gradient_accumulation_steps": accumulation}
            counts, lines = run_counted(project, name, processes, **keys, max_steps=options.steps)
            outlook = outlook_of(project.load(project.root / f"{name}.toml"))
            run, bounds, replicas = replace(outlook.sizes, compiled=False), outlook.bounds(stages), processes // stages
            operations = [stage_operations(run, bounds, stage, lambda _: "none") for stage in range(stages)]
            passes = [[each[way] * run.micro_batch for each in operations] for way in (0, 1)]
            tokens = run.micro_batch * accumulation * replicas
            seconds = statistics.median(tokens / line["train/tokens_per_second"] for line in lines[2:])
            work = step_seconds(*passes, [0.0] * (stages - 1), accumulation)
            rate = rate or work / seconds
            # Where there are too few cores, none idles: processes take turns at all the work there is.
            total = replicas * accumulation * sum(map(sum, zip(*passes, strict=True))) / cores
            expected = max(work, total) / rate
            between = options.steps * replicas * (stages - 1) * stage_traffic(run)
            reduced = options.steps * sum(gradient_bytes(run, bounds, stage) for stage in range(stages)) * replicas
            found = sum(map(sent_bytes, counts)), sum(map(reduced_bytes, counts))
            print(
                f"{processes:9} {stages:7} {accumulation:13} {bubble(stages, accumulation):7.0%} "
                f"{between:>11,} / {found[0]:,} {reduced if replicas > 1 else 0:>11,} / {found[1]:,}   "
                f"{expected:6.3f} / {seconds:.3f} = {expected / seconds:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
