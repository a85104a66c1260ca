"""A controlled block against Hugging Face's own layer in float64 with W as an [H, H] matrix and plain autograd."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cadapter.adapters.control import ControlledBlock, ControlSettings, GeneralAdapter, initial_factor
from cadapter.adapters.dropout import keep_mask
from cadapter.algebra import core, strength_transform
from cadapter.errors import CadapterError
from cadapter.models.families import FAMILIES, MODULES, Family
from tests.reference import naive
from tests.reference.controlled_model import Controlled, Float64
from tests.tiny_models import FAMILY_NAMES, HIDDEN, VOCAB, make_model

RANK, ROWS, TOKENS, LAYER = 4, 2, 14, 1
TOLERANCE = 1e-5
"""Relative, of whole tensors: float32 has 6e-8 an operation; a block, a solve and sums over tokens stay below 1e-6."""

SITES = ("block", "mlp", "writes")
INVERSES = (("exact", 2), ("neumann", 1), ("neumann", 2), ("neumann", 3))
MIXED = (1, -1, 0, 2)
CLASS_SETS = {"positive": (1,), "negative": (-1,), "neutral": (0,), "none": (2,), "mixed": MIXED}


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def random_classes(choices: tuple[int, ...], seed: int = 1) -> Tensor:
    """Codes [B, T] int8 drawn from ``choices``, all of which occur."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor(choices, dtype=torch.int8)
    return codes[torch.randint(len(choices), (ROWS, TOKENS), generator=generator)]


def block_and_arguments(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """The middle layer of a tiny model and what the model calls it with."""
    model = make_model(name, dtype)
    model.set_attn_implementation("eager")  # as gemma2, whose attention scores are capped, needs it
    calls: list[dict[str, Any]] = []
    hook = model.model.layers[LAYER].register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=torch.arange(TOKENS).unsqueeze(0) % VOCAB, use_cache=False)
    hook.remove()
    return model.model.layers[LAYER], calls[0]


def residual_scale(name: str) -> float:
    """What a model of this name multiplies by what its blocks add: granite alone does."""
    return getattr(make_model(name).config, "residual_multiplier", 1.0)


def random_adapter(settings: ControlSettings, spectral: float = 0.5) -> GeneralAdapter:
    """An adapter with ‖W‖₂ = ``spectral``."""
    adapter = GeneralAdapter(HIDDEN, LAYER, settings, seed=0)
    generator = torch.Generator().manual_seed(7)
    B = torch.randn(HIDDEN, settings.rank, generator=generator)
    size = torch.linalg.matrix_norm(settings.scale * B @ adapter.control_A.detach().float(), 2)
    adapter.control_B.data.copy_(spectral / size * B)
    return adapter


class Case:
    """One block under one adapter, ours in float32 and the reference in float64, on the same random inputs."""

    def __init__(
        self,
        name: str,
        settings: ControlSettings,
        classes: Tensor,
        spectral: float = 0.5,
        family: Family | None = None,
    ) -> None:
        self.settings, self.classes = settings, classes
        block, self.arguments = block_and_arguments(name, torch.float32)
        self.adapter = random_adapter(settings, spectral)
        self.family = family or FAMILIES[name.partition("-")[0]]
        self.block = ControlledBlock(block, self.adapter, self.family, residual_scale(name))
        self.true_block, self.true_arguments = block_and_arguments(name, torch.float64)
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(ROWS, TOKENS, HIDDEN, generator=generator)
        self.direction = torch.randn(ROWS, TOKENS, HIDDEN, generator=generator)
        """The loss is ⟨direction, output⟩ + penalty: its gradient with respect to the output is known and generic."""

    def ours(self, penalise: bool = True, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Output, penalty and gradients of the controlled block."""
        hidden = self.hidden.clone().requires_grad_()
        output, penalty = self.block.controlled(
            hidden,
            self.classes,
            self.adapter.class_transforms(),
            dropout_rows=rows,
            penalise_neutral=penalise,
            kwargs=self.arguments,
        )
        loss = (self.direction * output).sum() + penalty
        grads = torch.autograd.grad(loss, [hidden, self.adapter.control_A, self.adapter.control_B])
        return dict(zip(("output", "penalty", "hidden", "A", "B"), (output, penalty, *grads), strict=True))

    def reference(self, penalise: bool = True, keep: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
        """The same from the reference."""
        hidden = self.hidden.double().requires_grad_()
        A, B = (f.detach().double().requires_grad_() for f in (self.adapter.control_A, self.adapter.control_B))
        settings = self.settings
        controlled = Controlled(
            A, B, settings.scale, settings.site, self.classes, settings.inverse, settings.neumann_order, list(keep)
        )
        hooks = controlled.attach(self.true_block)
        with Float64():
            output = self.true_block(hidden, **self.true_arguments)
        for hook in hooks:
            hook.remove()
        penalty = torch.as_tensor(controlled.penalty, dtype=torch.float64) * penalise
        loss = (self.direction.double() * output).sum() + penalty
        grads = torch.autograd.grad(loss, [hidden, A, B], allow_unused=True, materialize_grads=True)
        return dict(zip(("output", "penalty", "hidden", "A", "B"), (output, penalty, *grads), strict=True))


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Every part equals the reference's, relative to its size; a part that is zero there is exactly zero here."""
    for name, value in expected.items():
        if value.norm() == 0:
            assert found[name].norm() == 0, name
        else:
            assert relative(found[name], value) < tolerance, (name, relative(found[name], value))


@pytest.mark.parametrize("classes", CLASS_SETS)
@pytest.mark.parametrize(("inverse", "order"), INVERSES)
@pytest.mark.parametrize("site", SITES)
def test_forward_and_gradients_of_every_class_and_site(site, inverse, order, classes):
    settings = ControlSettings(RANK, math.sqrt(RANK), site, inverse, order)
    case = Case("llama", settings, random_classes(CLASS_SETS[classes]))
    expected = case.reference()
    trains = classes in ("positive", "negative", "neutral", "mixed")
    assert (expected["A"].norm() > 0) == (expected["B"].norm() > 0) == trains
    assert (expected["penalty"] > 0) == (classes in ("neutral", "mixed"))
    assert_agree(case.ours(), expected)


@pytest.mark.parametrize("name", [*FAMILY_NAMES[1:], "qwen2-windows", "llama-biased", "qwen3_moe-dense"])
@pytest.mark.parametrize("site", SITES)
def test_forward_and_gradients_in_every_family(name, site):
    case = Case(name, ControlSettings(RANK, math.sqrt(RANK), site), random_classes(MIXED))
    assert_agree(case.ours(), case.reference())


def test_these_families_differ_in_what_they_add():
    """Their own modules, norms behind these, or either times a number: the cases above have each."""
    added = {name: FAMILIES[name].added for name in FAMILY_NAMES}
    norms = {name for name, modules in added.items() if modules != MODULES}
    assert norms == {"gemma2", "gemma3_text", "olmo2", "glm4"}
    assert {name for name in FAMILY_NAMES if residual_scale(name) != 1} == {"granite"}


@pytest.mark.parametrize("site", SITES)
def test_a_large_adapter(site):
    # ‖W‖₂ = 2: the series diverges, the exact inverse does not care; its condition number costs a digit.
    case = Case("llama", ControlSettings(RANK, math.sqrt(RANK), site), random_classes(MIXED), spectral=2.0)
    assert_agree(case.ours(), case.reference(), tolerance=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("site", SITES)
def test_a_family_of_which_it_is_not_known_what_its_blocks_add(name, site):
    """Δh is then output − input, whatever stands behind the modules and whatever they are multiplied by."""
    unknown = replace(FAMILIES[name], added=None)
    case = Case(name, ControlSettings(RANK, math.sqrt(RANK), site), random_classes(MIXED), family=unknown)
    assert_agree(case.ours(), case.reference())


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "glm4", "granite"])
def test_what_is_added_is_known_more_exactly_than_the_residual_stream(name):
    """In bfloat16 and with a large residual stream: output − input carries the stream's rounding, a sum does not."""
    settings = ControlSettings(RANK, math.sqrt(RANK))
    errors = {}
    for added in ("known", "unknown"):
        family = FAMILIES[name] if added == "known" else replace(FAMILIES[name], added=None)
        case = Case(name, settings, random_classes((1,)), family=family)
        block, arguments = block_and_arguments(name, torch.bfloat16)
        case.block = ControlledBlock(block, case.adapter, family, residual_scale(name))
        seen: list[Tensor] = []
        case.adapter.register_forward_pre_hook(lambda _module, args, to=seen: to.append(args[0]))
        large = (100 * case.hidden).bfloat16()
        with torch.no_grad():
            case.block.controlled(large, case.classes, case.adapter.class_transforms(), kwargs=arguments)
            with Float64():
                true_block = copy.deepcopy(block).double()
                true = true_block(large.double(), **case.true_arguments) - large.double()
        errors[added] = relative(seen[0], true)
    # Numbers around 100 are 0.5 apart, and what is added is of order 1; what branches write has 8 bits.
    assert errors["known"] < 0.01
    assert errors["unknown"] > 0.1


@pytest.mark.parametrize("site", SITES)
def test_dropout_acts_before_a_and_never_on_the_penalty(site):
    rate = 0.3
    settings = ControlSettings(RANK, math.sqrt(RANK), site, dropout=rate)
    case = Case("llama", settings, random_classes(MIXED))
    rows = torch.tensor([123456789, 4000000000])
    shape = (ROWS, TOKENS, HIDDEN)
    attention, mlp = (keep_mask(rows, 2 * LAYER + place, shape, rate) for place in (0, 1))
    keep = {"block": (attention,), "mlp": (mlp,), "writes": (attention, mlp)}[site]
    expected = case.reference(keep=keep)
    found = case.ours(rows=rows)
    assert_agree(found, expected)
    without = case.ours()
    assert relative(without["output"], expected["output"]) > 0.01
    assert case.settings.site == "writes" or torch.equal(found["penalty"], without["penalty"])
    case.block.eval()
    assert torch.equal(case.ours(rows=rows)["output"], without["output"])


@pytest.mark.parametrize("site", SITES)
def test_the_penalty_is_left_out_unless_asked_for(site):
    case = Case("llama", ControlSettings(RANK, math.sqrt(RANK), site), random_classes(MIXED))
    found = case.ours(penalise=False)
    assert found["penalty"] == 0
    assert_agree(found, case.reference(penalise=False))


def test_a_position_where_nothing_is_added_has_no_penalty_and_finite_gradients():
    settings = ControlSettings(RANK, 1.0)
    adapter = random_adapter(settings)
    delta = torch.zeros(1, 2, HIDDEN)
    delta[0, 1] = 1e-5  # ‖Δh‖² = 3.2e-9 lies below the bound of 1e-6
    delta.requires_grad_()
    classes = torch.zeros(1, 2, dtype=torch.int8)
    penalty = adapter.neutral_penalty(delta, classes)
    penalty.backward()
    W = naive.full_matrix(adapter.control_A.detach(), adapter.control_B.detach(), settings.scale)
    expected = (delta.detach()[0].double() @ W.T).square().sum() / 1e-6
    assert expected > 0
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=0)  # float32
    for gradient in (delta.grad, adapter.control_A.grad, adapter.control_B.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("site", SITES)
def test_a_new_adapter_changes_nothing(site):
    """B = 0: the block's output is bit-equal to the block's own, and B's gradient is there to leave zero."""
    block, arguments = block_and_arguments("llama", torch.float32)
    hidden = torch.randn(ROWS, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(block)(hidden, **arguments)
    adapter = GeneralAdapter(HIDDEN, LAYER, ControlSettings(RANK, 2.0, site), seed=0)
    controlled = ControlledBlock(block, adapter, FAMILIES["llama"])
    output, _ = controlled.controlled(hidden, random_classes(MIXED), adapter.class_transforms(), kwargs=arguments)
    assert torch.equal(output, plain)
    output.sum().backward()
    assert adapter.control_A.grad is not None
    assert adapter.control_B.grad is not None
    assert adapter.control_A.grad.norm() == 0
    assert adapter.control_B.grad.norm() > 0


@pytest.mark.parametrize("site", SITES)
def test_in_bfloat16_the_adapter_is_as_exact_as_the_block_allows(site):
    """What the adapter adds differs from the reference's by the rounding of the block's own bfloat16 outputs."""
    settings = ControlSettings(RANK, math.sqrt(RANK), site)
    case = Case("llama", settings, random_classes(MIXED))
    block, arguments = block_and_arguments("llama", torch.bfloat16)
    hidden = case.hidden.bfloat16()
    case.block, case.hidden, case.arguments = ControlledBlock(block, case.adapter, case.family), hidden, arguments
    # The true block with the bfloat16 weights, and the same inputs: what is left is rounding on the way.
    case.true_block = copy.deepcopy(block).double()
    case.direction = case.direction.bfloat16()
    found, expected = case.ours(), case.reference()
    assert found["output"].dtype == torch.bfloat16
    assert found["A"].dtype == torch.float32
    # 2^-9 for each rounding of a bfloat16 number, some ten of them in a row in a block.
    assert_agree(found, expected, tolerance=2e-2)


@pytest.mark.parametrize("inverse", ["exact", "neumann"])
@pytest.mark.parametrize("site", SITES)
def test_bfloat16_factors_are_worked_with_in_float32(site, inverse):
    """Bit by bit what a float32 adapter with the same rounded factors does."""
    settings = ControlSettings(RANK, math.sqrt(RANK), site, inverse, dtype=torch.bfloat16)
    case = Case("llama", settings, random_classes(MIXED))
    other = Case("llama", replace(settings, dtype=torch.float32), random_classes(MIXED))
    for one, same in zip(case.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert one.dtype == torch.bfloat16
        assert not torch.equal(one.float(), same)
        same.data.copy_(one)
    found, expected = case.ours(), other.ours()
    for name in ("output", "penalty", "hidden"):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name]), name
    for name in "AB":
        assert found[name].dtype == torch.bfloat16
        # 2^-9 for each of the three ways on which a gradient reaches a factor.
        assert relative(found[name], expected[name]) < 3 * 2**-9
    assert_agree(found, case.reference(), tolerance=3 * 2**-9)


def test_bfloat16_factors_start_at_the_float32_ones_rounded():
    adapter = GeneralAdapter(HIDDEN, 2, ControlSettings(RANK, 2.0, dtype=torch.bfloat16), seed=5)
    assert torch.equal(adapter.control_A, initial_factor(5, 2, "control_A", RANK, HIDDEN).bfloat16())
    assert torch.equal(adapter.control_B, torch.zeros(HIDDEN, RANK, dtype=torch.bfloat16))


@pytest.mark.parametrize("strength", [1.0, -1.0, 0.5, -2.0])
@pytest.mark.parametrize("site", SITES)
def test_fixed_strengths_stand_in_for_the_block(site, strength):
    """Called like the block itself, as generation does; ``(I + W)^t`` from an eigendecomposition in float64."""
    case = Case("llama", ControlSettings(RANK, math.sqrt(RANK), site), random_classes((1,)))
    adapter = case.adapter
    with pytest.raises(CadapterError, match="layer 1"):
        case.block(case.hidden, **case.arguments)
    middle = core(adapter.control_A.detach().double(), adapter.control_B.detach().double(), case.settings.scale)
    case.block.fix([(1, strength_transform(middle, strength).float())])
    found = case.block(case.hidden, **case.arguments)

    W = naive.full_matrix(adapter.control_A.detach(), adapter.control_B.detach(), case.settings.scale)
    values, vectors = torch.linalg.eig(naive.identity(W) + W)
    power = (vectors * values**strength @ torch.linalg.inv(vectors)).real - naive.identity(W)
    # The reference's class +1 applies s·B·A: give it (I + W)^t − I in that place.
    controlled = Controlled(torch.eye(HIDDEN, dtype=torch.float64), power, 1.0, site, case.classes)
    controlled.attach(case.true_block)
    expected = case.true_block(case.hidden.double(), **case.true_arguments)
    assert relative(found, expected) < TOLERANCE


def test_codes_choose_rows():
    """One row for each strength: row 0 the base, row 1 class +1, row 2 the inverse."""
    case = Case("llama", ControlSettings(RANK, 2.0), random_classes((1,)))
    block, arguments = block_and_arguments("llama", torch.float32)
    middle = core(case.adapter.control_A, case.adapter.control_B, case.settings.scale).detach()
    transforms = [(1, None), (2, strength_transform(middle, -1).float())]
    hidden = case.hidden[:1].expand(3, -1, -1)
    codes = torch.arange(3, dtype=torch.int8).unsqueeze(1).expand(3, TOKENS)
    with torch.no_grad():
        output, _ = case.block.controlled(hidden, codes, transforms, kwargs=case.arguments)
        plain = block(case.hidden[:1], **arguments)[0]
    W = naive.full_matrix(case.adapter.control_A.detach(), case.adapter.control_B.detach(), case.settings.scale)
    delta = (plain - case.hidden[0]).double()
    assert torch.equal(output[0], plain)
    assert relative(output[1], plain.double() + delta @ W.T) < TOLERANCE
    assert relative(output[2], plain.double() + delta @ naive.inverse_minus_identity(W).T) < TOLERANCE


# ---- initial values -----------------------------------------------------------------------------------------------


def test_initial_values_are_kaiming_uniform():
    rank, hidden = 64, 300
    first = initial_factor(5, 2, "control_A", rank, hidden)
    weight = torch.empty(rank, hidden)
    torch.manual_seed(0)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    bound = 1 / math.sqrt(hidden)
    for values in (first, weight):  # of 19200 uniform numbers the largest lies within 0.1 % of the bound
        assert 0.999 * bound < values.abs().max() <= bound
    # Kolmogorov–Smirnov: 1.95/√n is exceeded by one uniform sample in a thousand, and these are fixed.
    sample = ((first.flatten() / bound + 1) / 2).sort().values
    uniform = (torch.arange(sample.numel()) + 0.5) / sample.numel()
    assert (sample - uniform).abs().max() < 1.95 / math.sqrt(sample.numel())


def test_initial_values_are_a_function_of_seed_layer_and_name():
    base = initial_factor(5, 2, "control_A", RANK, HIDDEN)
    torch.manual_seed(99)
    assert torch.equal(base, initial_factor(5, 2, "control_A", RANK, HIDDEN))
    for seed, layer, name in [(6, 2, "control_A"), (5, 3, "control_A"), (5, 2, "control_Q")]:
        assert not torch.isclose(base, initial_factor(seed, layer, name, RANK, HIDDEN)).any()
    # Numbers are not run together: seed 1 with layer 23 is not seed 12 with layer 3.
    assert not torch.equal(*(initial_factor(*case, "control_A", RANK, HIDDEN) for case in ((1, 23), (12, 3))))
    adapter = GeneralAdapter(HIDDEN, 2, ControlSettings(RANK, 2.0), seed=5)
    assert torch.equal(adapter.control_A, base)
    assert adapter.control_A.dtype == adapter.control_B.dtype == torch.float32
    assert adapter.control_B.count_nonzero() == 0
