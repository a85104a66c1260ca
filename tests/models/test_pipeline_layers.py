"""The pipeline's layers, called one after the other, against Hugging Face's whole models."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch

from cadapter.adapters.control import ControlledBlock, ControlSettings
from cadapter.algebra import core, strength_transform
from cadapter.errors import UsageError
from cadapter.models.families import LogitFacts
from cadapter.models.layers import Carrier, CarrierFormat, DecoderLayer, EmbeddingLayer, Frame, HeadInputs
from cadapter.models.loading import CausalLM
from cadapter.models.loss import weighted_cross_entropy
from cadapter.training.modes.control import adapters_of
from cadapter.training.stages import StageBuilder
from tests.reference import controlled_model
from tests.tiny_models import CONFIGS, LAYERS, VOCAB, WINDOW, save_model
from tests.tiny_pipeline import (
    CAPPED_ATTENTION,
    RANK,
    builder,
    hugging_faces,
    layers_of,
    no_classes,
    output_logits,
    random_classes,
    random_tokens,
    references,
    run_layers,
)

ROWS, TOKENS = 3, 24  # three windows


def shifted(ids: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] of ids [B, T]."""
    return torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)


def loss_of(outputs: HeadInputs, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss over all tokens that are predicted."""
    (weight,) = outputs.weights
    labels, ones = shifted(ids).flatten(), torch.ones(ids.numel())
    total, _ = weighted_cross_entropy(outputs.hidden.flatten(0, 1), weight, labels, ones, outputs.logits)
    return total / (ids.numel() - len(ids))


# ---- token embeddings ----------------------------------------------------------------------------------------------


def test_a_table_that_lies_elsewhere_is_no_part_of_the_layer_and_its_rows_are_sent():
    """The pipeline moves what its layers hold to the device; a table on the host must stay there."""
    table = torch.nn.Embedding(10, 4)
    inputs = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.int8), torch.arange(2)
    away = EmbeddingLayer(table, 2.0, CarrierFormat(), torch.device("meta"))
    assert list(away.parameters()) == []
    assert away.table is table
    hidden, codes = away(inputs)
    assert hidden.shape == (2, 3, 4)
    assert hidden.is_meta
    assert codes.is_meta
    here = EmbeddingLayer(table, 2.0, CarrierFormat(), torch.device("cpu"))
    assert list(here.parameters()) == [table.weight]
    assert torch.equal(here(inputs)[0], 2 * table.weight[:6].view(2, 3, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what is looked up ahead lies in memory pinned for a GPU")
def test_what_was_looked_up_ahead_serves_its_micro_batch_and_no_other():
    table, device = torch.nn.Embedding(10, 4).requires_grad_(False), torch.device("cuda")
    layer = EmbeddingLayer(table, 2.0, CarrierFormat(), device)
    ids, others, codes = torch.arange(6).view(2, 3), torch.arange(6).view(2, 3) + 4, torch.ones(2, 3, dtype=torch.int8)

    def hidden(which: torch.Tensor) -> torch.Tensor:
        return layer((which, codes, torch.arange(2)))[0].cpu()

    layer.look_ahead(ids)
    table.weight.neg_()  # so that it shows which rows are old
    assert torch.equal(hidden(ids), -2 * table.weight[ids])
    assert torch.equal(hidden(ids), 2 * table.weight[ids])
    layer.look_ahead(ids)
    assert torch.equal(hidden(others), 2 * table.weight[others])


# ---- what crosses a stage boundary --------------------------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "dropout", "positions"), list(itertools.product([False, True], repeat=3)))
def test_a_carrier_survives_the_boundary_and_floats_come_first(penalty, dropout, positions):
    carrier = Carrier(
        torch.randn(2, 3, 4),
        torch.ones(2, 3, dtype=torch.int8),
        torch.ones(1) if penalty else None,
        torch.arange(2) if dropout else None,
        torch.arange(3).repeat(2, 1) if positions else None,
    )
    carrier_format = CarrierFormat(penalty, dropout, positions)
    parts = carrier_format.pack(carrier)
    assert type(parts) is tuple
    assert all(isinstance(part, torch.Tensor) for part in parts)
    floats = [part.is_floating_point() for part in parts]
    assert floats == sorted(floats, reverse=True)
    for found, sent in zip(carrier_format.unpack(parts), carrier, strict=True):
        assert found is sent


# ---- against Hugging Face -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name, config in CONFIGS.items()
        for attention in ("sdpa", "eager")
        if attention == "eager" or config.model_type not in CAPPED_ATTENTION
    ],
)
def test_logits_and_loss_are_hugging_faces(tiny_model, name, attention):
    directory = tiny_model(name)
    ids = random_tokens(ROWS, TOKENS, VOCAB)
    theirs = hugging_faces(directory, attention=attention)
    layers = layers_of(builder(directory, adapted=(), attention=attention))
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=ids, use_cache=False)
        outputs = run_layers(layers, ids, no_classes(ids))
    assert TOKENS > 2 * WINDOW
    torch.testing.assert_close(output_logits(outputs), expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_of(outputs, ids), expected.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_the_one_that_the_family_needs_where_none_is_asked_for(tiny_model, name):
    model = CausalLM(tiny_model(name), torch.float32)
    chosen = model.skeleton_block(0).self_attn.config._attn_implementation
    assert chosen == ("eager" if CONFIGS[name].model_type in CAPPED_ATTENTION else "sdpa")


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.model_type in CAPPED_ATTENTION])
def test_an_attention_that_would_leave_the_cap_out_is_refused(tiny_model, name):
    with pytest.raises(UsageError, match=rf"config\.json: (.|\n)*{name}(.|\n)*sdpa(.|\n)*eager"):
        CausalLM(tiny_model(name), torch.float32, attention="sdpa")


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_logits_and_loss_are_hugging_faces(tiny_model, name):
    """The same operations in the same order."""
    directory = tiny_model(name, torch.bfloat16)
    ids = random_tokens(ROWS, TOKENS, VOCAB)
    theirs = hugging_faces(directory, torch.bfloat16).train()
    stages = builder(directory, adapted=(), dtype=torch.bfloat16)
    with torch.no_grad():
        expected = theirs(input_ids=ids, labels=ids, use_cache=False)
        outputs = run_layers(layers_of(stages), ids, no_classes(ids))
    logits, rounding = output_logits(outputs), 0.0
    if stages.model.logits != LogitFacts():  # what else is done to logits is done in float32 here, in bfloat16 there
        rounding = 2**-7
    torch.testing.assert_close(logits, expected.logits.float(), rtol=rounding, atol=rounding)
    torch.testing.assert_close(loss_of(outputs, ids), expected.loss.float(), rtol=max(1e-5, rounding / 10), atol=0)


def test_sequences_of_several_lengths_have_their_own_masks(tiny_model):
    directory = tiny_model("qwen3-windows")
    theirs = hugging_faces(directory)
    layers = layers_of(builder(directory, adapted=()))
    for length in (TOKENS, 5, WINDOW, 2 * TOKENS, TOKENS):
        ids = random_tokens(2, length, VOCAB, seed=length)
        with torch.no_grad():
            outputs = run_layers(layers, ids, no_classes(ids))
            expected = theirs(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(output_logits(outputs), expected, rtol=1e-5, atol=1e-5)


def test_the_window_matters(tiny_model, tmp_path):
    """So that equal logits above say something of the masks."""
    ids = random_tokens(1, TOKENS, VOCAB)
    save_model("mistral", tmp_path / "wide", sliding_window=None)
    logits = []
    for directory in (tiny_model("mistral"), tmp_path / "wide"):
        with torch.no_grad():
            outputs = run_layers(layers_of(builder(directory, adapted=())), ids, no_classes(ids))
        logits.append(output_logits(outputs)[0])
    assert torch.equal(logits[0][:WINDOW], logits[1][:WINDOW])
    assert (logits[0][WINDOW:] - logits[1][WINDOW:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "setting"), [("llama", "attention_dropout"), ("phi3", "resid_pdrop"), ("mixtral", "router_jitter_noise")]
)
def test_the_bases_own_noise_is_off(tiny_model, tmp_path, name, setting):
    """In training mode, in which the engine runs the layers: it would depend on the layout."""
    directory = save_model(name, tmp_path / "model", **{setting: 0.5})
    ids = random_tokens(2, TOKENS, VOCAB)
    layers = layers_of(builder(directory, adapted=()))
    assert all(layer.training for layer in layers)
    outputs = run_layers(layers, ids, no_classes(ids))
    expected = run_layers(layers_of(builder(tiny_model(name), adapted=())), ids, no_classes(ids))
    assert torch.equal(outputs.hidden, expected.hidden)


# ---- with adapters ------------------------------------------------------------------------------------------------


def gradients(stages: StageBuilder) -> list[torch.Tensor]:
    """Hidden states, penalty and the adapters' gradients of a loss that sees every position and the penalty."""
    layers = layers_of(stages)
    ids, classes = random_tokens(ROWS, TOKENS, VOCAB), random_classes(ROWS, TOKENS)
    outputs = run_layers(layers, ids, classes, torch.arange(ROWS) + 77)
    assert outputs.penalty is not None
    loss = outputs.hidden.square().sum() + outputs.penalty.sum()
    parameters = [p for adapter in adapters_of(layers) for p in adapter.parameters()]
    return [outputs.hidden, outputs.penalty, *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("site", ["block", "mlp", "writes"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3-tied"])
def test_recomputation_changes_nothing(tiny_model, name, site):
    """Bit-equal outputs and gradients with every, every other and no block recomputed; dropout and penalty are on."""
    settings = ControlSettings(RANK, 2.0, site, dropout=0.2)
    carrier = CarrierFormat(penalty=True, dropout=True)
    kept, full, some = (
        gradients(builder(tiny_model(name), settings, carrier=carrier, recompute_every=every)) for every in (0, 1, 2)
    )
    assert len(kept) == 2 + 2 * LAYERS
    for one, two, three in zip(kept, full, some, strict=True):
        assert one.norm() > 0
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_recomputation_keeps_less(tiny_model):
    """What autograd keeps of a recomputed pipeline is a fraction: recomputation really happens."""

    def kept_bytes(recompute_every: int) -> int:
        layers = layers_of(builder(tiny_model("llama"), recompute_every=recompute_every))
        ids, classes = random_tokens(ROWS, TOKENS, VOCAB), random_classes(ROWS, TOKENS)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):  # type: ignore[func-returns-value]
            run_layers(layers, ids, classes)
        return sum(sizes)

    assert kept_bytes(1) < 0.25 * kept_bytes(0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3-windows"])
def test_layers_without_an_adapter_stay_as_they_are(tiny_model, name):
    """Adapters on layer 1 alone: the gradient reaches it, and logits equal the reference's."""
    directory = tiny_model(name)
    layers = layers_of(builder(directory, adapted=(1,)))
    assert [isinstance(layer.block, ControlledBlock) for layer in layers if isinstance(layer, DecoderLayer)] == [
        False,
        True,
        False,
    ]
    ids, classes = random_tokens(ROWS, TOKENS, VOCAB), random_classes(ROWS, TOKENS)
    adapters = adapters_of(layers)
    outputs = run_layers(layers, ids, classes)
    model = hugging_faces(directory).double()
    controlled = references(adapters, classes)
    expected = controlled_model.run(model, controlled, ids, shifted(ids), torch.ones(ids.shape))
    logits = output_logits(outputs)
    # Three layers of float32 on numbers of order 1.
    torch.testing.assert_close(logits.double(), expected.logits, rtol=1e-5, atol=2e-5)
    trained = [name for layer in layers for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["block.adapter.control_A", "block.adapter.control_B"]


def test_other_transforms_for_evaluation(tiny_model):
    """One text under three strengths at once, a row each: 0, +1 and −2."""
    directory = tiny_model("llama")
    layers = layers_of(builder(directory))
    adapters = adapters_of(layers)
    for layer in layers:
        if isinstance(layer, DecoderLayer):
            assert isinstance(layer.block, ControlledBlock)
            adapter = layer.block.adapter
            middle = core(adapter.control_A, adapter.control_B, adapter.settings.scale).detach()
            layer.set_transforms([(1, None), (2, strength_transform(middle, -2).float())])
    ids = random_tokens(1, TOKENS, VOCAB)
    codes = torch.arange(3, dtype=torch.int8).unsqueeze(1).expand(3, TOKENS).contiguous()
    with torch.no_grad():
        outputs = run_layers(layers, ids.expand(3, -1), codes)
    logits = output_logits(outputs).double()
    # The inverse applied twice is (I + W)^-2: the reference's class −1 of the adapter whose I + W is its square.
    model = hugging_faces(directory).double()
    for row, code in ((0, 2), (1, 1), (2, -1)):
        controlled = references(adapters, torch.full((1, TOKENS), code, dtype=torch.int8))
        if row == 2:
            for each in controlled.values():
                W = each.scale * each.B @ each.A
                each.A, each.B, each.scale = torch.eye(len(W), dtype=W.dtype), 2 * W + W @ W, 1.0
        expected = controlled_model.run(model, controlled, ids, shifted(ids), torch.ones(ids.shape)).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)  # the inverse of a square


# ---- masks ---------------------------------------------------------------------------------------------------------


def test_the_masks_of_one_length_alone_are_kept(tiny_model):
    """An evaluation runs lengths in rising order; all their masks together are many times those of the longest."""
    model = CausalLM(tiny_model("gemma2"), torch.float32)
    frame, masks = Frame(model), []
    for length in (16, 24, 32):
        mask = frame.arguments(torch.zeros(1, length, model.hidden_size), 0)["attention_mask"]
        assert mask.shape[-1] == length
        assert frame.arguments(torch.zeros(2, length, model.hidden_size), 0)["attention_mask"] is mask
        masks.append(weakref.ref(mask))
        del mask
    assert [mask() is not None for mask in masks] == [False, False, True]
