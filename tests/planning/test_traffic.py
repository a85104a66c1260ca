"""The bytes that a plan reckons with, against those that real processes send, and what is made of them."""

from __future__ import annotations

import pytest

from cadapter.planning.machines import LINKS
from cadapter.planning.traffic import gradient_bytes, ring_bytes, stage_traffic
from cadapter.training.forecast import outlook_of
from tests.counted_runs import paused_step, reduced_bytes, run_counted, sent_bytes, step_lengths
from tests.tiny_project import Project

STEPS, ACCUMULATION = 3, 4


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "stages", "keys"),
    [
        (1, 1, {}),
        (2, 2, {}),
        (2, 1, {}),
        pytest.param(4, 2, {}, id="4-2"),
        pytest.param(4, 4, {"micro_batch_size": 2}, id="4-4"),
        pytest.param(2, 2, {"lora_dropout": 0.1}, id="dropout"),
        pytest.param(2, 2, {"document_attention": "isolated"}, id="isolated"),
    ],
)
def test_processes_send_what_the_plan_says(
    project: Project, processes: int, stages: int, keys: dict[str, object]
) -> None:
    name = f"counted-{processes}-{stages}-{'-'.join(keys)}"
    keys = {**keys, "pipeline_stages": stages, "gradient_accumulation_steps": ACCUMULATION, "max_steps": STEPS}
    counts, lines = run_counted(project, name, processes, **keys)
    assert len(lines) == STEPS

    outlook = outlook_of(project.load(project.root / f"{name}.toml"))
    bounds, replicas = outlook.bounds(stages), processes // stages
    between = sum(sent_bytes(each) for each in counts)
    assert between == STEPS * replicas * (stages - 1) * stage_traffic(outlook.sizes)
    for rank, each in enumerate(counts):
        stage = rank // replicas
        expected = STEPS * gradient_bytes(outlook.sizes, bounds, stage) if replicas > 1 else 0
        assert reduced_bytes(each) == expected


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "stages", "accumulation"), [(1, 1, 4), (2, 2, 4), (2, 2, 1), (4, 2, 3), (4, 4, 4)]
)
def test_a_step_takes_as_long_as_the_schedule_says(
    project: Project, processes: int, stages: int, accumulation: int
) -> None:
    """Blocks sleep instead of computing; within 15 %, for all that a step does besides."""
    pause, name = 0.1, f"timed-{processes}-{stages}-{accumulation}"
    keys = {"pipeline_stages": stages, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    _, lines = run_counted(project, name, processes, pause, **keys)
    outlook = outlook_of(project.load(project.root / f"{name}.toml"))
    expected = paused_step(outlook.bounds(stages), pause, accumulation)
    found = min(step_lengths(lines)[1:])
    print(f"{processes} processes, {stages} stages, {accumulation} micro-batches: {expected:.2f} / {found:.2f} s")
    assert found == pytest.approx(expected, rel=0.15)


def test_a_ring_sends_nearly_everything_twice() -> None:
    assert ring_bytes(100, 1) == 0
    assert ring_bytes(100, 2) == 100
    assert ring_bytes(1000, 100) == pytest.approx(1980)


def test_links() -> None:
    assert LINKS["10gbe"].seconds(1.125e9) == pytest.approx(1, rel=1e-3)
    assert LINKS["nvlink"].seconds(0, messages=3) == pytest.approx(3e-5)
    assert all(link.gigabytes > 0 and 0 < link.share <= 1 and name == link.name for name, link in LINKS.items())
