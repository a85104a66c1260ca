"""Which process is which stage and replica, and where the layers are cut."""

from __future__ import annotations

import itertools
import random

import pytest

from cadapter.errors import UsageError
from cadapter.training.layout import LAYER_KINDS, Layout, partition, stage_bounds


def all_cuts(count: int, parts: int) -> list[list[int]]:
    """Every way to cut ``count`` layers into ``parts`` parts that are not empty, as bounds."""
    return [[0, *inner, count] for inner in itertools.combinations(range(1, count), parts - 1)]


def heaviest(weights: list[float], bounds: list[int]) -> float:
    return max(sum(weights[start:stop]) for start, stop in itertools.pairwise(bounds))


@pytest.mark.parametrize("count", range(1, 8))
def test_no_cut_has_a_lighter_heaviest_part(count):
    draw = random.Random(count)
    for parts in range(1, count + 1):
        for _ in range(15):
            weights = [float(draw.choice([0, 0, 1, 2, 3, 10])) for _ in range(count)]
            bounds = partition(weights, parts)
            cuts = all_cuts(count, parts)
            assert bounds in cuts  # so none is empty
            assert heaviest(weights, bounds) == min(heaviest(weights, cut) for cut in cuts)


def test_known_cuts():
    assert partition([1, 1, 1, 1], 2) == [0, 2, 4]
    assert partition([9, 1, 1, 1, 1, 5], 3) == [0, 1, 2, 6]  # of equal cuts the earliest
    assert partition([0, 0, 0, 0], 4) == [0, 1, 2, 3, 4]
    assert partition([5], 1) == [0, 1]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
def test_every_method_cuts_all_layers_into_stages(stages):
    sizes, trained = [800, 100, 100, 100, 100, 800], [0, 5, 5, 0, 5, 0]
    weights: dict[str, list[float]] = {
        "estimated_size": [float(size) for size in sizes],
        "uniform": [1.0] * 6,
        "parameters": [float(number) for number in trained],
        "type:decoder": [0, 1, 1, 1, 1, 0],
        "type:Embedding|Head": [1, 0, 0, 0, 0, 1],
    }
    for method, weight in weights.items():
        bounds = stage_bounds(method, stages, sizes, trained)
        assert bounds in all_cuts(6, stages)
        assert heaviest(weight, bounds) == min(heaviest(weight, cut) for cut in all_cuts(6, stages))


def test_kinds_are_the_names_of_the_layers():
    from cadapter.models import layers

    assert all(hasattr(layers, kind) for kind in LAYER_KINDS)


def test_more_stages_than_layers():
    with pytest.raises(UsageError, match=r"pipeline_stages = 6, but the model has only 5 pipeline layers"):
        stage_bounds("uniform", 6, [1] * 5, [0] * 5)
    assert stage_bounds("uniform", 5, [1] * 5, [0] * 5) == [0, 1, 2, 3, 4, 5]


def test_a_type_that_matches_nothing():
    with pytest.raises(UsageError, match=r"'type:attention' matches no layer.\nLayers are of the types Embedding"):
        stage_bounds("type:attention", 2, [1] * 5, [0] * 5)


def test_an_invalid_expression_is_a_users_mistake():
    with pytest.raises(UsageError, match=r"'type:\(' holds no regular expression"):
        stage_bounds("type:(", 2, [1] * 5, [0] * 5)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("processes", "stages"), [(1, 1), (2, 1), (2, 2), (6, 2), (6, 3), (8, 4)])
def test_every_stage_of_every_replica_is_one_process(processes, stages, column_major):
    layouts = [Layout.of(processes, stages, rank, column_major) for rank in range(processes)]
    replicas = processes // stages
    places = [(layout.stage, layout.replica) for layout in layouts]
    assert sorted(places) == list(itertools.product(range(stages), range(replicas)))
    assert [layout.first_stage for layout in layouts] == [stage == 0 for stage, _ in places]
    leaders = layouts[0].stage_leaders()
    assert [places[rank] for rank in leaders] == [(stage, 0) for stage in range(stages)]
    if processes > 1:
        # Neighbouring ranks: the next stage of one pipeline, or the next replica of one stage.
        neighbour = (1, 0) if column_major else (0, 1)
        if (column_major and stages > 1) or (not column_major and replicas > 1):
            assert places[1] == neighbour


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("processes", "stages"), [(2, 2), (6, 2), (6, 3)])
def test_ranks_stand_where_deepspeed_puts_them(processes, stages, column_major):
    from deepspeed.runtime.pipe.topology import ProcessTopology

    axes = ["data", "pipe"] if column_major else ["pipe", "data"]
    sizes = {"pipe": stages, "data": processes // stages}
    topology = ProcessTopology(axes=axes, dims=[sizes[axis] for axis in axes])
    for rank in range(processes):
        layout = Layout.of(processes, stages, rank, column_major)
        coordinate = topology.get_coord(rank)
        assert (layout.stage, layout.replica) == (coordinate.pipe, coordinate.data)


def test_stages_that_do_not_divide_the_processes():
    with pytest.raises(UsageError, match=r"pipeline_stages = 2 does not divide the 3 processes"):
        Layout.of(3, 2)
