"""Adam's step, clipping and state against the formula in float64 and against torch's own Adam."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cadapter.errors import UsageError
from cadapter.training import optimiser as module
from cadapter.training.gradients import Gradients
from cadapter.training.optimiser import STEPS, Optimiser

BETAS, EPS, LR = (0.9, 0.99), 1e-6, 3e-3
SHAPES = {"layers.0.control_A": (4, 30), "layers.0.control_B": (30, 4)}

# optimi advises its Triton kernels; foreach is what gives the same numbers on every device.
pytestmark = pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> list[Tensor]:
    """Gradients of very different sizes: small ones show eps, large ones the clipping."""
    generator = torch.Generator().manual_seed(100 + step)
    return [10.0 ** (k - 5) * torch.randn(s, generator=generator) for k, s in enumerate(SHAPES.values())]


def gradients_of(optimiser: Optimiser) -> Gradients:
    """The gradients that stand at the optimiser's parameters."""
    return Gradients(optimiser.parameters, frozenset(), torch.float32)


def take_step(optimiser: Optimiser, step: int, lr: float = LR, clip: float = 1.0) -> None:
    for parameter, gradient in zip(optimiser.parameters.values(), gradients(step), strict=True):
        parameter.grad = gradient.clone()
    optimiser.step(lr, clip, gradients_of(optimiser))
    assert all(parameter.grad is None for parameter in optimiser.parameters.values())


def whole_state(optimiser: Optimiser) -> dict[str, Tensor]:
    """Copies of all parts of the state as one."""
    return {name: tensor.clone() for part in optimiser.state(optimiser.parameters) for name, tensor in part.items()}


def reader(state: dict[str, Tensor]) -> Callable[[list[str]], dict[str, Tensor]]:
    """What reads of a saved state those of the named tensors that there are."""
    return lambda names: {name: state[name] for name in names if name in state}


class NaiveAdam:
    """Adam (Kingma and Ba) in float64, ε added to √v̂, and v̂ corrected for its start at zero."""

    def __init__(self, start: list[Tensor]) -> None:
        self.values = [value.detach().double().clone() for value in start]
        self.m = [torch.zeros_like(value) for value in self.values]
        self.v = [torch.zeros_like(value) for value in self.values]
        self.t = 0

    def step(self, gradients: list[Tensor], lr: float) -> None:
        self.t += 1
        for value, m, v, gradient in zip(self.values, self.m, self.v, gradients, strict=True):
            g = gradient.double()
            m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
            v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
            corrected_m, corrected_v = m / (1 - BETAS[0] ** self.t), v / (1 - BETAS[1] ** self.t)
            value -= lr * corrected_m / (corrected_v.sqrt() + EPS)


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_steps_equal_adams_formula(steps):
    optimiser = Optimiser(parameters(), BETAS, EPS)
    naive = NaiveAdam(list(parameters().values()))
    for step in range(1, steps + 1):
        lr = LR * step / 10  # a schedule
        take_step(optimiser, step, lr)
        naive.step(gradients(step), lr)
    start = parameters()
    for (name, parameter), expected in zip(optimiser.parameters.items(), naive.values, strict=True):
        moved = expected - start[name].double()
        assert moved.norm() > 1e-4 * steps
        # What it moved, to a thousandth: each step rounds the parameter (of size 1) to 6e-8, of a move of 3e-4.
        assert (parameter.double() - expected).norm() < 1e-3 * moved.norm()
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=5e-7 * math.sqrt(steps))


def test_the_first_step_is_known_in_closed_form():
    """m̂ = g and v̂ = g²: every component moves by lr·g/(|g| + ε)."""
    optimiser, start = Optimiser(parameters(), BETAS, EPS), parameters()
    take_step(optimiser, 1)
    for parameter, old, g in zip(optimiser.parameters.values(), start.values(), gradients(1), strict=True):
        expected = old.double() - LR * g.double() / (g.double().abs() + EPS)
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=3e-7)


def test_steps_equal_torchs_adam():
    optimiser, theirs = Optimiser(parameters(), BETAS, EPS), parameters()
    adam = torch.optim.Adam(theirs.values(), lr=LR, betas=BETAS, eps=EPS)
    for step in range(1, 11):
        take_step(optimiser, step)
        for parameter, gradient in zip(theirs.values(), gradients(step), strict=True):
            parameter.grad = gradient.clone()
        adam.step()
    for ours, other in zip(optimiser.parameters.values(), theirs.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=2e-6)  # ten float32 steps


def test_there_is_no_decay_in_adam():
    """The composite decay is a step of its own: a gradient of zero moves nothing."""
    optimiser, start = Optimiser(parameters(), BETAS, EPS), parameters()
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(LR, 1.0, gradients_of(optimiser))
    for name, parameter in optimiser.parameters.items():
        assert torch.equal(parameter, start[name])


@pytest.mark.parametrize(("factor", "used"), [(0.25, 0.25), (0.999, 0.999), (1.0, 1.0), (7.0, 1.0)])
def test_clipping_makes_gradients_smaller_and_never_larger(factor, used):
    optimiser, expected = Optimiser(parameters(), BETAS, EPS), Optimiser(parameters(), BETAS, EPS)
    take_step(optimiser, 1, clip=factor)
    for parameter, gradient in zip(expected.parameters.values(), gradients(1), strict=True):
        parameter.grad = used * gradient
    expected.step(LR, 1.0, gradients_of(expected))
    assert_equal(optimiser, expected)


def assert_equal(one: Optimiser, other: Optimiser) -> None:
    """Parameters and state, bit by bit."""
    assert one.parameters.keys() == other.parameters.keys()
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name]), name
    states = whole_state(one), whole_state(other)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_saved_state_continues_bit_by_bit():
    straight = Optimiser(parameters(), BETAS, EPS)
    for step in range(1, 11):
        take_step(straight, step)

    first = Optimiser(parameters(), BETAS, EPS)
    for step in range(1, 6):
        take_step(first, step)
    saved = whole_state(first)
    assert set(saved) == {f"{name}.{moment}" for name in SHAPES for moment in ("exp_avg", "exp_avg_sq")} | {"steps"}
    assert saved["steps"] == 5
    kept = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.parameters.items()}

    second = Optimiser(kept, BETAS, EPS)
    second.load_state(reader({**saved, "layers.7.control_A.exp_avg": torch.ones(2)}))  # another stage's
    for step in range(6, 11):
        take_step(second, step)
    assert_equal(second, straight)


def test_a_loaded_state_is_not_shared():
    first = Optimiser(parameters(), BETAS, EPS)
    take_step(first, 1)
    saved = whole_state(first)
    before = {name: tensor.clone() for name, tensor in saved.items()}
    second = Optimiser(parameters(), BETAS, EPS)
    second.load_state(reader(saved))
    take_step(second, 2)
    for name, tensor in saved.items():
        assert torch.equal(tensor, before[name])


def test_the_count_of_steps_that_was_given_out_stays():
    """Parts are written one after the other, each with the count that belongs to its moments."""
    optimiser = Optimiser(parameters(), BETAS, EPS)
    take_step(optimiser, 1)
    (part,) = optimiser.state(SHAPES)
    take_step(optimiser, 2)
    assert (part["steps"], whole_state(optimiser)["steps"]) == (1, 2)


def test_bfloat16_parameters_keep_their_compensation():
    """Kahan summation: steps too small for bfloat16 add up; its state is saved and restored too."""
    steps, lr = 200, 1e-4

    def bfloat16_optimiser() -> Optimiser:
        return Optimiser({"weight": nn.Parameter(torch.ones(8, dtype=torch.bfloat16))}, BETAS, EPS)

    def take(optimiser: Optimiser, count: int) -> None:
        for _ in range(count):
            optimiser.parameters["weight"].grad = torch.ones(8, dtype=torch.bfloat16)
            optimiser.step(lr, 1.0, gradients_of(optimiser))

    straight, first, second = bfloat16_optimiser(), bfloat16_optimiser(), bfloat16_optimiser()
    take(straight, steps)
    # 200 steps of 1e-4 below 1, where bfloat16's spacing is 4e-3: 0.98, within half a spacing.
    assert (straight.parameters["weight"].double() - (1 - steps * lr)).abs().max() < 2e-3
    take(first, steps // 2)
    second.parameters["weight"].data.copy_(first.parameters["weight"])
    assert "weight.kahan_comp" in whole_state(first)
    second.load_state(reader(whole_state(first)))
    take(second, steps // 2)
    assert torch.equal(second.parameters["weight"], straight.parameters["weight"])


@pytest.mark.parametrize("damage", ["missing", "shape", "no steps"])
def test_a_state_that_does_not_fit_is_refused(damage):
    first = Optimiser(parameters(), BETAS, EPS)
    take_step(first, 1)
    state = whole_state(first)
    name = says = "layers.0.control_B.exp_avg_sq"
    if damage == "missing":
        del state[name]
    elif damage == "shape":
        state[name] = state[name][:-1]
    else:
        del state["steps"]
        says = "it has no count of steps"
    with pytest.raises(UsageError, match=f"does not fit: {says}"):
        Optimiser(parameters(), BETAS, EPS).load_state(reader(state))


def test_a_stage_that_trains_nothing():
    empty = Optimiser({}, BETAS, EPS)
    empty.step(LR, 0.5, gradients_of(empty))
    assert whole_state(empty) == {}
    empty.load_state(reader({"layers.0.control_A.exp_avg": torch.ones(2), "steps": torch.tensor(3)}))
    assert whole_state(empty) == {}


def test_before_the_first_step_there_is_no_state():
    optimiser = Optimiser(parameters(), BETAS, EPS)
    assert list(optimiser.state(SHAPES)) == []
    optimiser.load_state(reader({}))
    take_step(optimiser, 1)
    expected = Optimiser(parameters(), BETAS, EPS)
    take_step(expected, 1)
    assert_equal(optimiser, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_no_gradient_reaches_stays_and_is_resumed(dtype):
    """A weight that only chooses among experts, say; the run it belongs to can still be continued."""

    def optimiser() -> Optimiser:
        used, unused = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
        return Optimiser({"used": used, "unused": unused}, BETAS, EPS)

    first, second = optimiser(), optimiser()
    gradients = gradients_of(first)
    first.parameters["used"].sum().backward()
    first.step(LR, 1.0, gradients)
    assert torch.equal(first.parameters["unused"], torch.ones(3, dtype=dtype))
    assert not torch.equal(first.parameters["used"], torch.ones(3, dtype=dtype))
    second.load_state(reader(whole_state(first)))
    assert whole_state(second).keys() == whole_state(first).keys()


# ---- groups ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32)
WHOLE = module.GROUP_BYTES
GROUPINGS = {1: [1] * 6, 100: [1, 2, 2, 1], WHOLE: [1, 2, 3]}
"""By the bytes of a group, how many of the parameters of :func:`mixed_parameters` stand in each."""


def mixed_parameters() -> dict[str, nn.Parameter]:
    """Six parameters [3, 5] of two dtypes: 60 bytes each in float32."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(3, 5, generator=generator).to(dtype) for dtype in DTYPES]
    return {f"layers.{number}.weight": nn.Parameter(each) for number, each in enumerate(drawn)}


def train(optimiser: Optimiser, first: int, last: int) -> None:
    """Steps of a schedule with some clipping; gradients add up in float32."""
    gradients = gradients_of(optimiser)
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(step)
        for _ in range(2):
            loss = torch.zeros(())
            for parameter in optimiser.parameters.values():
                loss = loss + (parameter * torch.randn(3, 5, generator=generator)).sum()
            loss.backward()
        optimiser.step(LR * step, 0.6 if step % 2 else 1.0, gradients)
        gradients.clear()


def in_groups(size: int, monkeypatch: pytest.MonkeyPatch, values: dict[str, nn.Parameter] | None = None) -> Optimiser:
    """An optimiser of groups of so many bytes over copies of ``values``."""
    monkeypatch.setattr(module, "GROUP_BYTES", size)
    values = mixed_parameters() if values is None else values
    return Optimiser({name: nn.Parameter(each.detach().clone()) for name, each in values.items()}, BETAS, EPS)


@pytest.mark.parametrize(("size", "lengths"), GROUPINGS.items())
def test_groups_hold_parameters_of_one_dtype_in_order(monkeypatch, size, lengths):
    optimiser = in_groups(size, monkeypatch)
    train(optimiser, 1, 1)
    parts = list(optimiser.state(optimiser.parameters))
    names = [[name.removesuffix(".exp_avg") for name in part if name.endswith(".exp_avg")] for part in parts]
    assert [len(each) for each in names] == lengths
    assert list(itertools.chain.from_iterable(names)) == list(optimiser.parameters)
    for each in names:
        assert len({optimiser.parameters[name].dtype for name in each}) == 1


@pytest.mark.parametrize("size", [1, 100])
def test_several_groups_step_as_one(monkeypatch, size):
    one, several = in_groups(WHOLE, monkeypatch), in_groups(size, monkeypatch)
    for optimiser in (one, several):
        train(optimiser, 1, 10)
    assert_equal(one, several)
    for name, start in mixed_parameters().items():
        assert not torch.equal(one.parameters[name], start)
    kahan = {name for name in whole_state(one) if name.endswith(".kahan_comp")}
    assert kahan == {"layers.1.weight.kahan_comp", "layers.2.weight.kahan_comp"}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(GROUPINGS, repeat=2)))
def test_a_state_goes_over_to_other_groups(monkeypatch, before, after):
    straight = in_groups(before, monkeypatch)
    train(straight, 1, 10)
    first = in_groups(before, monkeypatch)
    train(first, 1, 5)
    second = in_groups(after, monkeypatch, first.parameters)
    second.load_state(reader(whole_state(first)))
    train(second, 6, 10)
    assert_equal(second, straight)


def test_only_what_is_asked_for_is_given_out_and_read(monkeypatch):
    """What an earlier stage saves is left out by name; what other stages saved is not asked for."""
    optimiser = in_groups(1, monkeypatch)
    train(optimiser, 1, 3)
    wanted = {"layers.1.weight", "layers.4.weight"}
    parts = list(optimiser.state(wanted))
    assert [sorted(part) for part in parts] == [
        ["layers.1.weight.exp_avg", "layers.1.weight.exp_avg_sq", "layers.1.weight.kahan_comp", "steps"],
        ["layers.4.weight.exp_avg", "layers.4.weight.exp_avg_sq", "steps"],
    ]
    assert all(part["steps"] == 3 for part in parts)
    asked: list[str] = []
    values = {name: optimiser.parameters[name] for name in sorted(wanted)}
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    other = in_groups(WHOLE, monkeypatch, values)
    other.load_state(lambda names: asked.extend(names) or reader(merged)(names))
    assert {name.rpartition(".")[0] for name in asked} == wanted | {""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_that_a_first_step_adds_are_known_before(dtype: torch.dtype) -> None:
    """With bfloat16 weights there is Kahan's compensation, too."""
    optimiser = Optimiser({name: nn.Parameter(p.to(dtype)) for name, p in parameters().items()}, BETAS, EPS)
    expected = optimiser.missing_bytes()
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(LR, 1.0, gradients_of(optimiser))
    state = whole_state(optimiser)
    assert sum(tensor.nbytes for name, tensor in state.items() if name != STEPS) == expected > 0
    assert optimiser.missing_bytes() == 0
    resumed = Optimiser({name: nn.Parameter(p.to(dtype)) for name, p in parameters().items()}, BETAS, EPS)
    resumed.load_state(reader(state))
    assert resumed.missing_bytes() == 0
