r"""What a plan predicts of layouts beside real runs of 1, 2 and 4 processes on the CPU, through the launcher.

    python -m tests.benchmarks.plan_layouts

For each layout: bytes between stages and between replicas, which must be equal, and the length of a step. A laptop has
too few cores for processes to compute side by side as GPUs do, so blocks sleep, twice as long backwards as forwards:
what is compared is the schedule, with its bubble and its uneven stages. Links are memory here and count as free.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from cadapter.planning.schedule import bubble
from cadapter.planning.traffic import gradient_bytes, stage_traffic
from cadapter.training.forecast import outlook_of
from tests.counted_runs import paused_step, reduced_bytes, run_counted, sent_bytes, step_lengths
from tests.tiny_project import make_project

LAYOUTS = [(1, 1, 8), (2, 1, 4), (2, 2, 8), (2, 2, 2), (4, 2, 4), (4, 4, 8)]
"""Processes, stages, accumulation."""


def main() -> None:
    """Run each layout and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.1, metavar="SECONDS", help="that a block sleeps forwards")
    options = parser.parse_args()
    print("predicted / measured")
    print("processes  stages  accumulation  bubble   bytes between stages   between replicas   s/step")
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder), 400)
        for processes, stages, accumulation in LAYOUTS:
            name = f"run-{processes}-{stages}-{accumulation}"
            keys = {"pipeline_stages": stages, "gradient_accumulation_steps": accumulation, "max_steps": options.steps}
            counts, lines = run_counted(project, name, processes, options.pause, **keys)
            outlook = outlook_of(project.load(project.root / f"{name}.toml"))
            bounds, replicas = outlook.bounds(stages), processes // stages
            expected = paused_step(bounds, options.pause, accumulation)
            seconds = statistics.median(step_lengths(lines)[1:])
            between = options.steps * replicas * (stages - 1) * stage_traffic(outlook.sizes)
            reduced = sum(gradient_bytes(outlook.sizes, bounds, stage) for stage in range(stages))
            reduced *= options.steps * replicas * (replicas > 1)
            found = sum(map(sent_bytes, counts)), sum(map(reduced_bytes, counts))
            print(
                f"{processes:9} {stages:7} {accumulation:13} {bubble(stages, accumulation):7.0%} "
                f"{between:>11,} / {found[0]:,} {reduced:>11,} / {found[1]:,}   "
                f"{expected:6.3f} / {seconds:.3f} = {expected / seconds:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
