"""Layouts that are compared: where links are shared, which is the best, and machines that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cadapter.errors import UsageError
from cadapter.planning.blocks import Block, BlockShape, Change
from cadapter.planning.layouts import Candidate, Place, Verdict, best, judge
from cadapter.planning.machines import LINKS, Machine, machine
from cadapter.planning.memory import GIB, RunSizes, TrainedBytes
from cadapter.planning.schedule import bubble
from cadapter.planning.speed import stage_operations, stage_seconds
from cadapter.planning.traffic import crossing, gradient_bytes
from cadapter.training.layout import Layout

LAYERS, HIDDEN, TOKENS, VOCABULARY = 8, 64, 128, 320
SHAPE = BlockShape(
    hidden=HIDDEN, queries=HIDDEN, keys=HIDDEN, heads=4, norms=2 * HIDDEN, inner=128, wide=256,
    weights=4 * HIDDEN**2 + 3 * HIDDEN * 128,
)  # fmt: skip
NUMBERS = 2 * 4 * HIDDEN
RUN = RunSizes(
    kind="control",
    layer_bytes=(0, *[2 * SHAPE.weights] * LAYERS, 2 * VOCABULARY * HIDDEN),
    trainable=(0, *[NUMBERS] * LAYERS, 0),
    per_number=TrainedBytes(4, 4, 8),
    blocks=(Block(SHAPE, Change(numbers=NUMBERS, after=True, deltas=HIDDEN, narrow=4)),) * LAYERS,
    hidden=HIDDEN,
    vocabulary=VOCABULARY,
    number_bytes=2,
    tokens=TOKENS,
    accumulation=8,
    compiled=True,
)


def candidate(gpus: int, stages: int, column_major: bool = False, run: RunSizes = RUN) -> Candidate:
    layouts = [Layout.of(gpus, stages, rank, column_major) for rank in range(gpus)]
    each = (LAYERS + 2) // stages
    bounds = (*range(0, each * stages, each), LAYERS + 2)
    places = tuple(Place(layout.stage, layout.replica) for layout in layouts)
    return Candidate(run, bounds, places, column_major, "none", lambda _: "none")


def test_operations_are_two_for_each_weight_forward_and_backward() -> None:
    forward, backward = stage_operations(RUN, [0, LAYERS + 2], 0, lambda _: "none")
    attention = 2 * 2 * HIDDEN * TOKENS / 2
    trained = NUMBERS
    assert forward == LAYERS * (2 * (SHAPE.weights + trained) + attention) + 4 * VOCABULARY * HIDDEN
    # Nothing flows back through the first block but to its adapter.
    assert backward == (LAYERS - 1) * (2 * SHAPE.weights + 2 * attention) + LAYERS * 4 * trained
    again = stage_operations(RUN, [0, LAYERS + 2], 0, lambda _: "full")[1]
    assert backward < again < backward + forward


def test_without_neighbours_a_step_is_its_micro_batches() -> None:
    alone = judge(candidate(1, 1), machine(), None)
    seconds = stage_seconds(RUN, [0, LAYERS + 2], 0, lambda _: "none", machine().gpu)
    assert alone.seconds == pytest.approx(RUN.accumulation * sum(seconds))
    assert alone.tokens_per_second == pytest.approx(RUN.accumulation * TOKENS / alone.seconds)
    assert (alone.bubble, alone.stage_bytes, alone.replica_bytes, alone.fits) == (0, 0, 0, None)


def test_which_messages_go_from_node_to_node() -> None:
    """16 GPUs on two nodes, 8 replicas of 2 stages: with row-major ranks a node holds one stage of all replicas."""
    there = machine(16, 2, ("nvlink", "10gbe"))
    row, column = (judge(candidate(16, 2, order), there, None) for order in (False, True))
    assert row.crosses == (True, False)
    assert column.crosses == (False, True)
    assert row.bubble == column.bubble == bubble(2, 8)
    assert row.stage_bytes == 8 * sum(crossing(RUN))
    counts = [gradient_bytes(RUN, (0, 5, 10), stage) for stage in (0, 1)]
    assert counts == [4 * 4 * NUMBERS] * 2
    assert row.replica_bytes == column.replica_bytes == 2 * 7 / 8 * counts[0]


def test_pipelines_that_leave_a_node_together_share_its_link() -> None:
    slow = replace(LINKS["1gbe"], microseconds=0.0)
    eight, four = (judge(candidate(gpus, 2), Machine(gpus, 2, network=slow), None) for gpus in (16, 8))
    # The network decides, and twice as many pipelines take twice as long.
    assert eight.seconds == pytest.approx(2 * four.seconds, rel=0.01)


def test_gradients_of_several_stages_share_it_too() -> None:
    slow = replace(LINKS["1gbe"], microseconds=0.0)
    one, four = (
        judge(candidate(8, stages, True), Machine(8, 2, network=slow), None).reduction_seconds for stages in (1, 4)
    )
    sent = 2 * 7 / 8 * gradient_bytes(RUN, (0, 10), 0)
    assert one == pytest.approx(slow.seconds(sent))
    largest = max(gradient_bytes(RUN, candidate(8, 4).bounds, stage) for stage in range(4))
    assert four == pytest.approx(slow.seconds(4 * 2 * 1 / 2 * largest))


def test_the_best_is_the_fastest_that_fits() -> None:
    there = machine(4)
    verdicts = [judge(candidate(4, stages), there, 10 * GIB) for stages in (1, 2, 4)]
    assert all(verdict.fits for verdict in verdicts)
    assert best(verdicts) is verdicts[0]  # no bubble and hardly any gradients
    too_large: list[Verdict] = [replace(verdicts[0], fits=False), *verdicts[1:]]
    assert best(too_large) is max(verdicts[1:], key=lambda each: each.tokens_per_second)
    assert best([replace(each, fits=False) for each in verdicts]) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"links": ("usb",)}, "--link usb: not known"),
        ({"links": ("nvlink", "pcie")}, "a link within a node was given before, nvlink"),
        ({"links": ("10gbe",)}, "--link 10gbe connects nodes, and there is one"),
        ({"gpus": 5, "nodes": 2}, "--gpus 5 does not divide over --nodes 2"),
        ({"gpu": "voodoo"}, "--gpu voodoo: not known"),
        ({"gib": 0.25}, "--gpu-memory 0.25: CUDA itself takes 0.5 GiB"),
    ],
)
def test_machines_that_cannot_be(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        machine(**arguments)  # type: ignore[arg-type]


def test_a_kind_of_gpu_says_its_memory_unless_it_is_given() -> None:
    assert machine(gpu="RTX4090").gib == 24
    assert machine(gpu="rtx4090", gib=48).gib == 48
    assert machine().free is None
