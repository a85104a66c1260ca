"""LoRA in the blocks of a model against PEFT's own models, and against the formula in float64."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_masks_for_generate

from cadapter.adapters.dropout import keep_mask
from cadapter.adapters.lora import PLACES_PER_BLOCK, LoraBlock, LoraSettings
from cadapter.adapters.lora_targets import Targets, count_parameters, match_model, match_targets
from cadapter.errors import CadapterError, UsageError
from tests.adapters.lora_cases import (
    CONFIGS,
    RANK,
    TOKENS,
    base_model,
    factors_of,
    peft_model,
    put_lora,
    randomise,
    write,
)
from tests.tiny_models import HIDDEN

LORA = LoraSettings(RANK, math.sqrt(RANK))
ODD = LoraSettings(RANK, 2.8284)
"""A scale that no rounding to whole numbers keeps."""

CASES = [
    ("llama", None),
    ("llama", ("q_proj", "mlp.down_proj")),
    ("qwen2", None),
    ("phi3", None),
    ("mixtral", None),
    ("mixtral", ("experts.down_proj",)),
    ("mixtral", ("gate_up_proj", "down_proj")),
    ("mixtral", ("v_proj", "gate_up_proj")),
    ("qwen2_moe", None),
    ("qwen2_moe", ("down_proj", "shared_expert_gate")),
    ("qwen3_moe", None),
    ("qwen3_moe", ("down_proj", "o_proj")),
]


def settings_with(targets: tuple[str, ...] | None, **changes: Any) -> LoraSettings:
    return LoraSettings(**{"rank": RANK, "alpha": 2.8284, "targets": targets, **changes})


# ---- against PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_a_model_with_lora_is_the_one_that_peft_loads(name, targets, tmp_path):
    model = base_model(name)
    with torch.no_grad():
        plain = model(TOKENS).logits
        blocks, found = put_lora(model, settings_with(targets))
        assert torch.equal(model(TOKENS).logits, plain)  # B is zero
        randomise(blocks)
        ours = model(TOKENS).logits
        theirs = peft_model(name, write(tmp_path, blocks, found, name))(TOKENS).logits
    assert (ours - plain).abs().max() > 0.1
    # float32 through three blocks: PEFT multiplies by s last, and to a shared expert's weight it adds s·B·A.
    assert (ours - theirs).abs().max() <= 3e-6 * max(1.0, ours.abs().max().item())


@pytest.mark.parametrize(("name", "targets"), [CASES[0], CASES[2], CASES[6], CASES[9], CASES[10]])
def test_gradients_are_those_of_peft(name, targets, tmp_path):
    direction = torch.randn(*TOKENS.shape, CONFIGS[name].vocab_size, generator=torch.Generator().manual_seed(2))
    model = base_model(name)
    blocks, found = put_lora(model, settings_with(targets))
    randomise(blocks)
    (model(TOKENS).logits * direction).sum().backward()
    theirs = peft_model(name, write(tmp_path, blocks, found, name), trainable=True)
    (theirs(TOKENS).logits * direction).sum().backward()
    expected = {key: parameter for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    compared = 0
    for block in blocks:
        for target, pair in block.pairs().items():
            for factor, parameter in (("A", pair.A), ("B", pair.B)):
                key = f"base_model.model.model.layers.{block.layer}.{block.paths[target]}.lora_{factor}.default.weight"
                gradient = expected[key].grad
                assert gradient.norm() > 0
                # float32, the same sums in another order
                assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), key
                compared += 1
    assert compared == len(expected) == 2 * len(found.pair_names())


def test_only_the_layers_asked_for_are_adapted(tmp_path):
    model = base_model("llama")
    blocks, found = put_lora(model, ODD, layers=[0, 2])
    assert [block.layer for block in blocks] == [0, 2]
    randomise(blocks)
    with torch.no_grad():
        theirs = peft_model("llama", write(tmp_path, blocks, found))(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits, theirs, rtol=0, atol=1e-5)  # float32 through two blocks


def test_a_name_that_stands_for_other_modules_too_is_spelled_in_full(tmp_path):
    """PEFT would adapt the dense layer's ``mlp.o_proj`` as well if it were told ``o_proj`` alone."""
    blocks = [nn.ModuleDict({"a": nn.ModuleDict({"o_proj": nn.Linear(2, 2)}), "o_proj": nn.Identity()})]
    assert match_model(blocks, [0], ("a.o_proj",)).target_modules == ("a.o_proj",)
    del blocks[0]["o_proj"]
    assert match_model(blocks, [0], ("a.o_proj",)).target_modules == ("o_proj",)


# ---- blocks on their own ------------------------------------------------------------------------------------------


def run_blocks(model: Any, hidden: Tensor, recompute: bool = False, **kwargs: Any) -> Tensor:
    """Call one block after the other, as a pipeline does."""
    positions = torch.arange(hidden.shape[1]).unsqueeze(0)
    masks = create_masks_for_generate(model.config, hidden, None, None)
    embeddings = model.model.rotary_emb(hidden, positions)
    for index, block in enumerate(model.model.layers):
        mask = masks[model.config.layer_types[index]] if isinstance(masks, dict) else masks
        call = partial(block, attention_mask=mask, position_embeddings=embeddings, use_cache=False)
        if isinstance(block, LoraBlock):
            call = partial(call, **kwargs)
        hidden = checkpoint(call, hidden, use_reentrant=False) if recompute else call(hidden)
    return hidden


ROWS = torch.tensor([123456789, 4000000000])
STATES = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(3))
DIRECTION = torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(4))


def outcome(model: Any, blocks: list[LoraBlock], **kwargs: Any) -> dict[str, Tensor]:
    """Output and gradients of the blocks of a model: of the states that go in, and of all factors."""
    states = STATES.clone().requires_grad_()
    output = run_blocks(model, states, **kwargs)
    factors = {
        f"{block.layer}.{name}.{kind}": getattr(pair, kind)
        for block in blocks
        for name, pair in block.pairs().items()
        for kind in "AB"
    }
    gradients = torch.autograd.grad((output * DIRECTION).sum(), [states, *factors.values()])
    return dict(zip(["output", "states", *factors], [output.detach(), *gradients], strict=True))


def reference(name: str, blocks: list[LoraBlock], rate: float) -> dict[str, Tensor]:
    """The same in float64: y = W·x + s·B·A·(m ∘ x) on the base's own linear layers, by forward hooks."""
    model = base_model(name, torch.float64)
    model.config._experts_implementation = "eager"  # the others know no float64
    factors: dict[str, Tensor] = {}
    for block in blocks:
        original = model.model.layers[block.layer]
        places = [path for path, _ in original.named_modules()]
        for path, pair in block.pairs().items():
            A, B = (factor.detach().double().requires_grad_() for factor in (pair.A, pair.B))
            factors[f"{block.layer}.{path}.A"], factors[f"{block.layer}.{path}.B"] = A, B
            place = PLACES_PER_BLOCK * block.layer + places.index(path)

            def lora(module: nn.Linear, args: Any, output: Tensor, A=A, B=B, place=place) -> Tensor:
                kept = keep_mask(ROWS, place, (2, 7, module.in_features), rate).double().view_as(args[0])
                return output + ODD.scale * (args[0] * kept) @ A.T @ B.T

            original.get_submodule(path).register_forward_hook(lora)
    states = STATES.double().requires_grad_()
    output = run_blocks(model, states)
    gradients = torch.autograd.grad((output * DIRECTION.double()).sum(), [states, *factors.values()])
    return dict(zip(["output", "states", *factors], [output.detach(), *gradients], strict=True))


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].double() - value).norm() <= tolerance * value.norm(), key


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2_moe"])
def test_dropout_is_on_what_a_layer_reads_and_a_function_of_rows(name):
    rate = 0.3
    model = base_model(name)
    blocks, _ = put_lora(model, settings_with(None, dropout=rate))
    randomise(blocks)
    found = outcome(model, blocks, dropout_rows=ROWS)
    assert_agree(found, reference(name, blocks, rate), 1e-5)  # float32 through three blocks
    without = outcome(model, blocks)
    assert (found["output"] - without["output"]).norm() > 0.01 * without["output"].norm()
    assert_agree(without, reference(name, blocks, 0.0), 1e-5)
    model.eval()
    assert torch.equal(outcome(model, blocks, dropout_rows=ROWS)["output"], without["output"])


def test_every_module_drops_something_else():
    model = base_model("llama")
    blocks, _ = put_lora(model, settings_with(None, dropout=0.5))
    masks = {}
    for block in blocks:
        block._call.rows = ROWS
        for name in block.pairs():
            kept = block.block.get_submodule(name).dropout(torch.ones(2, 7, HIDDEN))
            masks[block.layer, name] = tuple(kept.flatten().tolist())
            assert set(masks[block.layer, name]) == {0.0, 2.0}
    assert len(set(masks.values())) == len(masks) == 21


@pytest.mark.parametrize(
    ("name", "targets", "rate"), [("llama", None, 0.3), ("mixtral", ("gate_up_proj", "down_proj", "q_proj"), 0.0)]
)
def test_recomputation_gives_the_same_gradients(name, targets, rate):
    model = base_model(name)
    blocks, _ = put_lora(model, settings_with(targets, dropout=rate))
    randomise(blocks)
    expected = outcome(model, blocks, dropout_rows=ROWS)
    found = outcome(model, blocks, dropout_rows=ROWS, recompute=True)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert all(block._call.rows is None for block in blocks)


def test_other_rows_of_a_batch_do_not_matter():
    """What a row's mask is depends on its own number: micro-batches of one give what a micro-batch of two gives."""
    model = base_model("qwen2_moe")
    blocks, _ = put_lora(model, settings_with(None, dropout=0.3))
    randomise(blocks)
    with torch.no_grad():
        both = run_blocks(model, STATES, dropout_rows=ROWS)
        second = run_blocks(model, STATES[1:], dropout_rows=ROWS[1:])
    torch.testing.assert_close(both[1:], second, rtol=1e-5, atol=1e-5)  # products of other sizes round otherwise


def test_switching_off_leaves_the_base_bit_for_bit_and_nothing_else():
    model = base_model("mixtral")
    with torch.no_grad():
        plain = model(TOKENS).logits
        blocks, _ = put_lora(model, settings_with(("q_proj", "gate_up_proj", "down_proj")))
        randomise(blocks)
        adapted = model(TOKENS).logits
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for block in blocks:
            block.switch(False)
        assert torch.equal(model(TOKENS).logits, plain)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
        for block in blocks:
            block.switch(True)
        assert torch.equal(model(TOKENS).logits, adapted)
    assert not torch.equal(adapted, plain)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_switching_keeps_frozen_factors_frozen():
    model = base_model("llama")
    blocks, _ = put_lora(model, LORA)
    model.requires_grad_(False)
    for block in blocks:
        block.switch(False)
        block.switch(True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_block_stands_in_for_its_original():
    model = base_model("llama")
    model.model.layers[0].attention_type = "of the block"
    put_lora(model, LORA)
    assert model.model.layers[0].attention_type == "of the block"
    with pytest.raises(AttributeError):
        _ = model.model.layers[0].nothing_of_this_name
    assert copy.deepcopy(model.model.layers[0]).layer == 0


# ---- what is trained, and where it starts -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_all_that_is_trained_and_have_their_own_dtype(dtype):
    model = base_model("qwen2_moe", torch.bfloat16)
    blocks, found = put_lora(model, settings_with(("down_proj", "q_proj"), dtype=dtype))
    randomise(blocks)
    factors = {id(factor) for block in blocks for pair in block.pairs().values() for factor in pair[:2]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == factors
    assert {parameter.dtype for parameter in trained} == {dtype}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    assert len(factors) == 2 * len(found.pair_names())
    logits = model(TOKENS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(parameter.grad.norm() > 0 for parameter in trained)


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_the_number_of_trained_numbers_is_known_before(name, targets):
    original = base_model(name)
    layers = list(original.model.layers)
    expected = {
        layer: count_parameters(layers[layer], each, RANK)
        for layer, each in match_model(layers, range(3), targets).by_layer.items()
    }
    blocks, _ = put_lora(original, settings_with(targets))
    assert expected == {
        block.layer: sum(factor.numel() for pair in block.pairs().values() for factor in pair[:2]) for block in blocks
    }


def test_initial_values_are_a_function_of_seed_layer_and_name():
    together = factors_of(put_lora(base_model("llama"), LORA, seed=5)[0])
    torch.manual_seed(99)  # the global generator has no part in it
    alone = factors_of(put_lora(base_model("llama"), settings_with(("v_proj",)), layers=[1], seed=5)[0])
    assert alone.keys() == {"layers.1.self_attn.v_proj.lora_A", "layers.1.self_attn.v_proj.lora_B"}
    for name, factor in alone.items():
        assert torch.equal(factor, together[name])
    first = {name: factor for name, factor in together.items() if name.endswith("lora_A")}
    assert len({tuple(factor.flatten()[:8].tolist()) for factor in first.values()}) == len(first)
    other = factors_of(put_lora(base_model("llama"), LORA, seed=6)[0])
    assert not any(torch.equal(factor, other[name]) for name, factor in first.items())


@pytest.mark.parametrize(("name", "targets"), [("llama", None), ("mixtral", ("gate_up_proj", "down_proj"))])
def test_initial_values_are_as_peft_s_own_are_distributed(name, targets):
    factors = factors_of(put_lora(base_model(name), settings_with(targets, rank=32))[0])
    for key, factor in factors.items():
        if key.endswith("lora_B"):
            assert factor.count_nonzero() == 0
            continue
        bound = 1 / math.sqrt(factor.shape[1])
        assert 0.99 * bound < factor.abs().max() <= bound  # of a thousand uniform numbers and more
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert abs(factor.mean().item()) < 0.1 * bound


# ---- what LoRA goes to --------------------------------------------------------------------------------------------

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.mark.parametrize(
    ("name", "layer", "targets", "expected"),
    [
        ("llama", 0, None, Targets((*ATTENTION, *DENSE))),
        ("llama", 0, ("mlp.up_proj", "q_proj"), Targets(("self_attn.q_proj", "mlp.up_proj"))),
        ("llama", 0, ("self_attn",), Targets()),
        ("llama", 0, ("proj",), Targets()),
        ("phi3", 0, ("gate_up_proj",), Targets(("mlp.gate_up_proj",))),
        ("mixtral", 0, None, Targets(ATTENTION)),
        ("mixtral", 0, ("experts.down_proj",), Targets((), FUSED[1:])),
        ("mixtral", 0, ("down_proj", "gate_up_proj"), Targets((), FUSED)),
        ("qwen2_moe", 0, None, Targets((*ATTENTION, *(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))))),
        ("qwen2_moe", 1, None, Targets((*ATTENTION, *DENSE))),
        ("qwen2_moe", 0, ("shared_expert_gate",), Targets(("mlp.shared_expert_gate",))),
        ("qwen2_moe", 0, ("down_proj",), Targets(("mlp.shared_expert.down_proj",), FUSED[1:])),
    ],
)
def test_targets_are_matched_by_name_without_any_memory(name, layer, targets, expected):
    with torch.device("meta"):
        block = base_model_on_meta(name).model.layers[layer]
    found = match_targets(block, targets)
    assert found.experts == expected.experts
    assert sorted(found.linears) == sorted(expected.linears)


def base_model_on_meta(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(CONFIGS[name])


def test_routers_that_are_linear_layers_are_left_out_unless_named():
    router = nn.ModuleDict({"layer": nn.Linear(4, 8), "kernel": nn.Conv1d(4, 4, 2)})
    mlp = nn.ModuleDict({"gate": nn.Linear(4, 8), "up": nn.Linear(4, 8)})
    block = nn.ModuleDict({"mlp": mlp, "router": router})
    assert match_targets(block, None) == Targets(("mlp.up",))
    assert match_targets(block, ("gate", "layer")) == Targets(("mlp.gate", "router.layer"))


@pytest.mark.parametrize(
    ("name", "targets", "layers", "messages"),
    [
        ("llama", ("q_prj", "v_proj"), range(3), ['["q_prj", "v_proj"]', '"q_prj" is in no layer', "self_attn.q_proj"]),
        ("llama", (), range(3), ["nothing", "mlp.down_proj"]),
        ("mixtral", ("w2",), range(3), ['"w2"', "self_attn.o_proj", "mlp.experts.down_proj"]),
        ("qwen2_moe", ("mlp.up_proj",), [0, 2], ['"mlp.up_proj"', "mlp.shared_expert.up_proj"]),
    ],
)
def test_a_target_that_is_nowhere_is_an_error_that_repeats_it(name, targets, layers, messages):
    with pytest.raises(UsageError) as caught:
        match_model(list(base_model(name).model.layers), layers, targets)
    for message in messages:
        assert message in str(caught.value)
    if targets:
        assert '"v_proj" is in no' not in str(caught.value)


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(UsageError, match="no linear layer"):
        match_model([nn.ModuleDict({"norm": nn.LayerNorm(4)})], [0], None)


@pytest.mark.parametrize("extra", [{"dropout": 0.1}, {"four_bit": True}])
def test_experts_can_have_neither_dropout_nor_4_bits(extra):
    layers = list(base_model("mixtral").model.layers)
    with pytest.raises(UsageError, match=r"mlp.experts.down_proj.*\n.*target_modules"):
        match_model(layers, range(3), ("q_proj", "experts.down_proj"), **extra)
    assert match_model(layers, range(3), ("q_proj",), **extra).pair_names()[0] == "layers.0.self_attn.q_proj"


def test_numbered_experts_cannot_have_dropout():
    """Their linear layers read the tokens that were routed to them, which no row's mask fits."""
    experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(2))
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    assert len(match_model([block], [0], ("w1",)).pair_names()) == 2
    with pytest.raises(UsageError, match=r"mlp.experts.0.w1"):
        match_model([block], [0], ("w1",), dropout=0.1)


def test_a_target_that_is_no_linear_layer_is_named():
    block = base_model("llama").model.layers[0]
    with pytest.raises(CadapterError, match=r"layer 0: .*RMSNorm"):
        LoraBlock(block, 0, Targets(("input_layernorm",)), LORA, 0)


# ---- on a base in 4 bits ------------------------------------------------------------------------------------------


def test_on_a_4_bit_base_lora_is_added_to_what_the_4_bit_layers_give():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    config = type(CONFIGS["llama"]).from_dict({**CONFIGS["llama"].to_dict(), **wide})
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    block = AutoModelForCausalLM.from_config(config).model.layers[1].requires_grad_(False)
    dense = copy.deepcopy(block)
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            quantised = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            quantised.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            quantised.support_avx512bf16_for_cpu = False  # it repacks weights in place
            parent, _, last = name.rpartition(".")
            setattr(block.get_submodule(parent), last, quantised.to("cpu"))
            weight = block.get_submodule(name).weight
            dense.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(
                weight.data, weight.quant_state
            )
    targets = match_targets(dense, None)
    adapted = [LoraBlock(each, 1, targets, ODD, 0) for each in (block, dense)]
    states = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(3))
    cos_sin = torch.rand(2, 1, 7, 16, generator=torch.Generator().manual_seed(4)).unbind()
    results = []
    for each in adapted:
        randomise([each])
        output = each(states, position_embeddings=cos_sin, attention_mask=None)
        factors = [factor for pair in each.pairs().values() for factor in pair[:2]]
        assert {factor.dtype for factor in factors} == {torch.float32}
        results.append([output, *torch.autograd.grad(output.square().sum(), factors)])
    assert block.self_attn.q_proj.base_layer.weight.dtype == torch.uint8
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()  # float32
