"""Gradients add up as by hand in float64: over micro-batches, replicas and the two uses of a tied embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cadapter.training.distributed import GradientGroups, World, new_group
from cadapter.training.gradients import Gradients
from tests.joined_processes import run_processes_well

CPU = torch.device("cpu")
NONE: frozenset[str] = frozenset()
HERE = "from tests.training.test_gradients import"
SUM = 1e-6
"""Relative, of a whole tensor: float32 rounds each of some hundred additions by at most 6e-8, in both directions."""


def add_to(parameter: nn.Parameter, gradient: Tensor) -> None:
    """One micro-batch's backward pass, which adds exactly ``gradient``."""
    (parameter * gradient).sum().backward()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- micro-batches --------------------------------------------------------------------------------------------------


def micro_batches(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients [30] that are exact in ``dtype``: a large one first, beside which bfloat16 does not see the others."""
    generator = torch.Generator().manual_seed(4)
    small = [(torch.rand(30, generator=generator) + 0.5).to(dtype) for _ in range(count - 1)]
    return [torch.full((30,), 500.0, dtype=dtype), *small]


def accumulated(parameter_dtype: torch.dtype, gradient_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What 300 micro-batches add up to, and their sum in float64."""
    parameter = nn.Parameter(torch.ones(30, dtype=parameter_dtype))
    gradients = Gradients({"weight": parameter}, NONE, gradient_dtype)
    steps = micro_batches(300, parameter_dtype)
    for gradient in steps:
        add_to(parameter, gradient)
    found = gradients.of("weight")
    assert found is not None
    return found, torch.stack(steps).double().sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_micro_batches_add_up_in_float32(dtype):
    found, expected = accumulated(dtype, torch.float32)
    assert found.dtype == torch.float32
    assert relative(found, expected) < SUM


def test_in_bfloat16_they_would_not():
    """What ``gradient_dtype = "bfloat16"`` costs, so that the bound above means something."""
    found, expected = accumulated(torch.bfloat16, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) > 0.1 > SUM


def test_nothing_is_left_of_the_step_before():
    parameters = {"half": nn.Parameter(torch.ones(4, dtype=torch.bfloat16)), "single": nn.Parameter(torch.ones(4))}
    gradients = Gradients(parameters, NONE, torch.float32)
    for size in (1.0, 3.0):
        for parameter in parameters.values():
            add_to(parameter, torch.full((4,), size, dtype=parameter.dtype))
        for name in parameters:
            assert gradients.of(name).tolist() == [size] * 4
        gradients.clear()
        assert all(gradients.of(name) is None and parameters[name].grad is None for name in parameters)
    assert gradients.squared_norm(CPU) == 0


# ---- norm and clipping ----------------------------------------------------------------------------------------------

SHAPES = {"layers.0.weight": (6, 5), "layers.0.bias": (5,), "layers.1.weight": (5, 5), "model.tied": (7, 3)}


def with_gradients(
    dtypes: Sequence[torch.dtype], copies: frozenset[str] = NONE
) -> tuple[Gradients, dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters of ``dtypes`` in turn, and what each but the second got in a backward pass, of different sizes."""
    generator = torch.Generator().manual_seed(6)
    parameters, found = {}, {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        dtype = dtypes[number % len(dtypes)]
        parameters[name] = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        if number != 1:
            found[name] = (10.0 ** (number - 2) * torch.randn(shape, generator=generator)).to(dtype)
    gradients = Gradients(parameters, copies, torch.float32)
    for name, gradient in found.items():
        add_to(parameters[name], gradient)
    return gradients, parameters, found


MIXED = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), MIXED], ids=["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("copies", [NONE, frozenset({"model.tied"})], ids=["own", "copies"])
def test_the_squared_norm_is_of_all_gradients_but_those_of_copies(dtypes, copies):
    gradients, _, found = with_gradients(dtypes, copies)
    total = gradients.squared_norm(CPU)
    expected = sum(gradient.double().square().sum() for name, gradient in found.items() if name not in copies)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, torch.as_tensor(expected), rtol=1e-6, atol=0)  # float32 sums


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(value):
    gradients, parameters, _ = with_gradients(MIXED)
    add_to(parameters["model.tied"], torch.full((7, 3), value, dtype=torch.bfloat16))
    assert not torch.isfinite(gradients.squared_norm(CPU))


@pytest.mark.parametrize(("factor", "used"), [(0.3, 0.3), (0.999, 0.999), (1.0, 1.0), (1.5, 1.0)])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,)], ids=["float32", "bfloat16"])
def test_what_the_optimiser_gets_is_clipped_and_rounded_once(dtypes, factor, used):
    """The sum over micro-batches is made smaller before it takes the parameter's dtype."""
    gradients, parameters, found = with_gradients(dtypes)
    for name, gradient in found.items():  # a second micro-batch: the sum is no longer a bfloat16 number
        add_to(parameters[name], gradient / 256 + gradient.flip(0) / 128)
    sums = {name: gradients.of(name).clone() for name in found}
    gradients.hand_over(list(SHAPES)[:2], factor)
    gradients.hand_over(list(SHAPES)[2:], factor)
    for name, total in sums.items():
        handed = parameters[name].grad
        assert handed.dtype == dtypes[0]
        assert torch.equal(handed, (total * used).to(dtypes[0]))
        assert dtypes[0] == torch.float32 or not torch.equal(total, total.bfloat16().float())


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,)], ids=["float32", "bfloat16"])
def test_a_parameter_that_had_no_part_in_the_step_has_a_gradient_of_zero(dtypes):
    """As it has where there are replicas, so that Adam does the same in every layout."""
    gradients, parameters, _ = with_gradients(dtypes)
    assert gradients.of("layers.0.bias") is None
    gradients.hand_over(list(SHAPES), 0.5)
    assert torch.equal(parameters["layers.0.bias"].grad, torch.zeros(5, dtype=dtypes[0]))


def test_only_what_is_named_is_handed_over():
    gradients, parameters, found = with_gradients((torch.bfloat16,))
    gradients.hand_over(["layers.1.weight"], 0.5)
    assert torch.equal(parameters["layers.1.weight"].grad, found["layers.1.weight"] / 2)
    for name in ("layers.0.weight", "model.tied"):
        assert parameters[name].grad is None
        assert torch.equal(gradients.of(name), found[name].float())


# ---- other processes ------------------------------------------------------------------------------------------------

TIED = "model.tied"
GRIDS = {"stages and replicas": (2, 2), "stages": (3, 1), "replicas": (1, 3)}
"""Stages × replicas; ranks are laid out stage by stage."""
LARGEST = 4
MICRO_BATCHES = 5


def stage_of(rank: int, grid: tuple[int, int]) -> int:
    return rank // grid[1]


def ranks_of(stage: int, grid: tuple[int, int]) -> list[int]:
    return list(range(stage * grid[1], (stage + 1) * grid[1]))


def holders_of_tied(grid: tuple[int, int]) -> list[int]:
    return sorted({rank for stage in (0, grid[0] - 1) for rank in ranks_of(stage, grid)})


def names_of(stage: int, stages: int) -> list[str]:
    """A stage's parameters in order: the tied one is the first of the first stage and the last of the last."""
    own = [f"layers.{stage}.{name}" for name in ("single", "half", "sometimes", "sometimes_half", "never")]
    first, last = [TIED] * (stage == 0), [TIED] * (stage == stages - 1 > 0)
    return [*first, *own, *last]


def dtype_of(name: str, tied: torch.dtype) -> torch.dtype:
    return tied if name == TIED else torch.bfloat16 if name.endswith("half") else torch.float32


def contributions(name: str, rank: int, dtype: torch.dtype) -> list[Tensor]:
    """The gradients [4, 6] that this process's micro-batches give a parameter; none of some parameters."""
    if name.endswith("never") or ("sometimes" in name and rank % 2):
        return []
    generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * rank)
    return [torch.randn(4, 6, generator=generator).to(dtype) for _ in range(MICRO_BATCHES)]


def by_hand(name: str, grid: tuple[int, int], tied: torch.dtype) -> Tensor:
    """The mean over replicas of the sums over micro-batches; both ends of a tied parameter add to it."""
    ranks = holders_of_tied(grid) if name == TIED else ranks_of(int(name.split(".")[1]), grid)
    total = torch.zeros(4, 6, dtype=torch.float64)
    for rank in ranks:
        for gradient in contributions(name, rank, dtype_of(name, tied)):
            total += gradient.double()
    return total / grid[1]


def reduce_in(world: World, directory: str) -> None:
    """Reduce the gradients of every grid; write what this process has afterwards."""
    for number, grid in enumerate(GRIDS.values()):
        for tied in (torch.float32, torch.bfloat16):
            groups = [new_group(ranks_of(stage, grid)) for stage in range(grid[0])]
            ends = new_group(holders_of_tied(grid))
            if stage_of(world.rank, grid) >= grid[0]:
                continue
            stage = stage_of(world.rank, grid)
            shared = (TIED, ends) if grid[0] > 1 else ("", None)
            found = reduced(world.rank, names_of(stage, grid[0]), GradientGroups(grid[1], groups[stage], *shared), tied)
            save_file(found, Path(directory) / f"{number}.{str(tied)[6:]}.{world.rank}.safetensors")


def reduced(rank: int, names: list[str], groups: GradientGroups, tied: torch.dtype) -> dict[str, Tensor]:
    """This process's reduced gradients, what the optimiser gets of them, and their squared norm."""
    parameters = {name: nn.Parameter(torch.ones(4, 6, dtype=dtype_of(name, tied))) for name in names}
    is_copy = TIED in names[1:]
    gradients = Gradients(parameters, frozenset({TIED} if is_copy else ()), torch.float32)
    for name, parameter in parameters.items():
        for gradient in contributions(name, rank, parameter.dtype):
            add_to(parameter, gradient)
    gradients.reduce(groups)
    found = {name: gradients.of(name).clone() for name in names}
    found["squares"] = gradients.squared_norm(CPU)
    gradients.hand_over(names, 0.7)
    return {**found, **{f"{name}.handed": parameters[name].grad for name in names}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the processes of all grids had: one launch for all."""
    directory = tmp_path_factory.mktemp("gradients")
    run_processes_well(f"{HERE} reduce_in; reduce_in(world, {str(directory)!r})", LARGEST)
    return directory


@pytest.mark.processes
@pytest.mark.parametrize("tied", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", GRIDS)
def test_reduced_gradients_are_the_sums_by_hand_and_equal_where_they_are_shared(directory, name, tied):
    number, grid = list(GRIDS).index(name), GRIDS[name]
    ranks = range(grid[0] * grid[1])
    found = [load_file(directory / f"{number}.{str(tied)[6:]}.{rank}.safetensors") for rank in ranks]
    squares: dict[str, float] = {}
    for rank in ranks:
        names = names_of(stage_of(rank, grid), grid[0])
        for parameter in names:
            expected = by_hand(parameter, grid, tied)
            assert found[rank][parameter].dtype == torch.float32
            if expected.count_nonzero():
                assert relative(found[rank][parameter], expected) < SUM, parameter
            else:
                assert found[rank][parameter].count_nonzero() == 0
            squares[parameter] = expected.square().sum().item()
        shared = ranks_of(stage_of(rank, grid), grid)
        for parameter in names:
            for other in holders_of_tied(grid) if parameter == TIED else shared:
                for key in (parameter, f"{parameter}.handed"):
                    assert torch.equal(found[rank][key], found[other][key]), key
            assert found[rank][f"{parameter}.handed"].dtype == dtype_of(parameter, tied)
    total = sum(float(found[stage * grid[1]]["squares"]) for stage in range(grid[0]))
    assert total == pytest.approx(sum(squares.values()), rel=1e-5)  # float32 gradients


def test_alone_there_is_nothing_to_reduce():
    gradients, _, found = with_gradients(MIXED)
    gradients.reduce(GradientGroups(1, None))
    assert all(torch.equal(gradients.of(name), gradient.float()) for name, gradient in found.items())
    assert gradients.of("layers.0.bias") is None
