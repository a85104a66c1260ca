"""Adam's step, clipping and state against the formula in float64 and against torch's own Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cadapter.errors import UsageError
from cadapter.training.optimiser import Optimiser, squared_gradient_norm

BETAS, EPS, LR = (0.9, 0.99), 1e-6, 3e-3
SHAPES = {"layers.0.control_A": (4, 30), "layers.0.control_B": (30, 4)}
CPU = torch.device("cpu")

# optimi advises its Triton kernels; foreach is what gives the same numbers on every device.
pytestmark = pytest.mark.filterwarnings("ignore:Parameter `foreach` is deprecated:DeprecationWarning")


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> list[Tensor]:
    """Gradients of very different sizes: small ones show eps, large ones the clipping."""
    generator = torch.Generator().manual_seed(100 + step)
    return [10.0 ** (k - 5) * torch.randn(s, generator=generator) for k, s in enumerate(SHAPES.values())]


def take_step(optimiser: Optimiser, step: int, lr: float = LR, clip: float = 1.0) -> None:
    for parameter, gradient in zip(optimiser.parameters.values(), gradients(step), strict=True):
        parameter.grad = gradient.clone()
    optimiser.step(lr, clip)
    optimiser.clear_gradients()


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
    optimiser.step(LR, 1.0)
    for name, parameter in optimiser.parameters.items():
        assert torch.equal(parameter, start[name])


@pytest.mark.parametrize(("factor", "used"), [(0.25, 0.25), (0.999, 0.999), (1.0, 1.0), (7.0, 1.0)])
def test_clipping_makes_gradients_smaller_and_never_larger(factor, used):
    optimiser, expected = Optimiser(parameters(), BETAS, EPS), Optimiser(parameters(), BETAS, EPS)
    take_step(optimiser, 1, clip=factor)
    for parameter, gradient in zip(expected.parameters.values(), gradients(1), strict=True):
        parameter.grad = used * gradient
    expected.step(LR, 1.0)
    for name, parameter in optimiser.parameters.items():
        assert torch.equal(parameter, expected.parameters[name])
        assert torch.equal(optimiser.state()[f"{name}.exp_avg"], expected.state()[f"{name}.exp_avg"])


def test_the_squared_norm_of_all_gradients():
    named = parameters()
    for parameter, gradient in zip(named.values(), gradients(1), strict=True):
        parameter.grad = gradient
    without = nn.Parameter(torch.ones(3))
    found = squared_gradient_norm([*named.values(), without], CPU)
    expected = sum(gradient.double().square().sum() for gradient in gradients(1))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-6, atol=0)  # float32 sums
    assert squared_gradient_norm([], CPU) == 0
    named["layers.0.control_A"].grad[0, 0] = math.inf  # type: ignore[index]
    assert not torch.isfinite(squared_gradient_norm(named.values(), CPU))


def test_a_saved_state_continues_bit_by_bit():
    straight = Optimiser(parameters(), BETAS, EPS)
    for step in range(1, 11):
        take_step(straight, step)

    first = Optimiser(parameters(), BETAS, EPS)
    for step in range(1, 6):
        take_step(first, step)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    assert set(saved) == {f"{name}.{moment}" for name in SHAPES for moment in ("exp_avg", "exp_avg_sq")} | {"steps"}
    assert saved["steps"] == 5
    kept = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.parameters.items()}
    take_step(first, 99)  # moves the state on, which must not reach what was saved before

    second = Optimiser(kept, BETAS, EPS)
    second.load_state({**saved, "layers.7.control_A.exp_avg": torch.ones(2)})  # another stage's
    for step in range(6, 11):
        take_step(second, step)
    for name, parameter in straight.parameters.items():
        assert torch.equal(second.parameters[name], parameter)
    for name, tensor in straight.state().items():
        assert torch.equal(second.state()[name], tensor)


def test_a_loaded_state_is_not_shared():
    first = Optimiser(parameters(), BETAS, EPS)
    take_step(first, 1)
    saved = first.state()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    second = Optimiser(parameters(), BETAS, EPS)
    second.load_state(saved)
    take_step(second, 2)
    for name, tensor in saved.items():
        assert torch.equal(tensor, before[name])


def test_bfloat16_parameters_keep_their_compensation():
    """Kahan summation: steps too small for bfloat16 add up; its state is saved and restored too."""
    steps, lr = 200, 1e-4

    def bfloat16_optimiser() -> Optimiser:
        return Optimiser({"weight": nn.Parameter(torch.ones(8, dtype=torch.bfloat16))}, BETAS, EPS)

    def take(optimiser: Optimiser, count: int) -> None:
        for _ in range(count):
            optimiser.parameters["weight"].grad = torch.ones(8, dtype=torch.bfloat16)
            optimiser.step(lr, 1.0)

    straight, first, second = bfloat16_optimiser(), bfloat16_optimiser(), bfloat16_optimiser()
    take(straight, steps)
    # 200 steps of 1e-4 below 1, where bfloat16's spacing is 4e-3: 0.98, within half a spacing.
    assert (straight.parameters["weight"].double() - (1 - steps * lr)).abs().max() < 2e-3
    take(first, steps // 2)
    second.parameters["weight"].data.copy_(first.parameters["weight"])
    assert "weight.kahan_comp" in first.state()
    second.load_state(first.state())
    take(second, steps // 2)
    assert torch.equal(second.parameters["weight"], straight.parameters["weight"])


@pytest.mark.parametrize("damage", ["missing", "shape", "no steps"])
def test_a_state_that_does_not_fit_is_refused(damage):
    first = Optimiser(parameters(), BETAS, EPS)
    take_step(first, 1)
    state = first.state()
    name = "layers.0.control_B.exp_avg_sq"
    if damage == "missing":
        del state[name]
    elif damage == "shape":
        state[name] = state[name][:-1]
    else:
        del state["steps"]
        name = "steps"
    with pytest.raises(UsageError, match=f"does not fit: {name}"):
        Optimiser(parameters(), BETAS, EPS).load_state(state)


def test_a_stage_that_trains_nothing():
    empty = Optimiser({}, BETAS, EPS)
    empty.step(LR, 0.5)
    empty.clear_gradients()
    assert empty.state() == {}
    empty.load_state({"layers.0.control_A.exp_avg": torch.ones(2), "steps": torch.tensor(3)})
    assert empty.state() == {}
    assert squared_gradient_norm(empty.parameters.values(), CPU) == 0


def test_before_the_first_step_there_is_no_state():
    optimiser = Optimiser(parameters(), BETAS, EPS)
    assert optimiser.state() == {}
    optimiser.load_state({})
    take_step(optimiser, 1)
    expected = Optimiser(parameters(), BETAS, EPS)
    take_step(expected, 1)
    for name, parameter in optimiser.parameters.items():
        assert torch.equal(parameter, expected.parameters[name])
