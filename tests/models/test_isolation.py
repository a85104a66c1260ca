"""Isolated documents: each is computed as if it were alone, in every family, through the pipeline, and else refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cadapter.errors import UsageError
from cadapter.models.isolation import check_block, check_isolation
from cadapter.models.layers import DecoderLayer
from cadapter.models.loading import CausalLM
from tests.isolated_documents import CARRIER, CUTS, documents, positions, rows, with_others_changed
from tests.joined_processes import run_processes_well
from tests.tiny_models import CONFIGS, FAMILY_NAMES, SHAPE, WINDOW, make_model
from tests.tiny_pipeline import CAPPED_ATTENTION, builder, hugging_faces, layers_of, output_logits

EXACT = 2e-5
"""Of logits of order 1 to 10 in float32, summed over other numbers of tokens."""

MakeModel = Callable[..., Path]


def run(layers: list[nn.Module], ids: Tensor, classes: Tensor, where: Tensor) -> Tensor:
    parts: Any = (ids, classes, torch.zeros(len(ids), dtype=torch.int64), where)
    for layer in layers:
        parts = layer(parts)
    return output_logits(parts)


def attentions(name: str) -> tuple[str, ...]:
    return ("eager",) if CONFIGS[name].model_type in CAPPED_ATTENTION else ("sdpa", "eager")


@pytest.mark.parametrize(("name", "attention"), [(name, kind) for name in CONFIGS for kind in attentions(name)])
def test_each_document_is_hugging_faces_alone(tiny_model: MakeModel, name: str, attention: str) -> None:
    """Without adapters, against the whole model on one document at a time."""
    directory = tiny_model(name)
    theirs = hugging_faces(directory, attention=attention)
    layers = layers_of(builder(directory, adapted=(), attention=attention, carrier=CARRIER))
    ids, classes = rows()
    with torch.no_grad():
        ours = run(layers, ids, torch.full_like(classes, 2), positions())
        assert ours.isfinite().all()  # padding too
        for row, begin, stop in documents():
            alone = theirs(input_ids=ids[row : row + 1, begin:stop], use_cache=False).logits[0]
            torch.testing.assert_close(ours[row, begin:stop], alone, rtol=EXACT, atol=EXACT)
    assert max(stop - begin for _, begin, stop in documents()) > 2 * WINDOW


@pytest.mark.parametrize(("name", "attention"), [(name, kind) for name in FAMILY_NAMES for kind in attentions(name)])
def test_a_document_never_changes_another(tiny_model: MakeModel, name: str, attention: str) -> None:
    """With adapters and classes mixed within a document; packed attention shows that the difference would be seen."""
    layers = layers_of(builder(tiny_model(name), attention=attention, carrier=CARRIER))
    whole = torch.arange(positions().shape[1]).expand(positions().shape).clone()
    with torch.no_grad():
        for kept in range(2):
            begins = [cuts[kept] for cuts in CUTS]
            own = [(row, begin, stop) for row, begin, stop in documents() if begin == begins[row]]
            for where, is_isolated in ((positions(), True), (whole, False)):
                before = run(layers, *rows(), where)
                after = run(layers, *with_others_changed(kept), where)
                changes = [(before[row, a:b] - after[row, a:b]).abs().max() for row, a, b in own]
                if is_isolated:
                    assert max(changes) <= EXACT
                elif kept:  # what comes first sees nothing of the others either way
                    assert min(changes) > 0.01


def together(folder: Path, stages: int, number: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for rank in range(stages):
        found |= load_file(folder / f"{stages}.{number}.{rank}.safetensors")
    return found


@pytest.mark.processes
@pytest.mark.slow
def test_through_pipelines_of_one_and_two_stages(tiny_model: MakeModel, tmp_path: Path) -> None:
    """Micro-batches of other documents follow one another, and blocks are computed again for the backward pass."""
    directories = [str(tiny_model(name)) for name in FAMILY_NAMES]
    for stages in (1, 2):
        body = f"from tests.isolated_documents import main; main(world, {directories!r}, {str(tmp_path)!r})"
        run_processes_well(body, stages)
    for number, name in enumerate(FAMILY_NAMES):
        one, two = (together(tmp_path, stages, number) for stages in (1, 2))
        layers = layers_of(builder(tiny_model(name), carrier=CARRIER))
        with torch.no_grad():
            batches = (rows(), with_others_changed(0), with_others_changed(1))
            expected = torch.cat([run(layers, *batch, positions()) for batch in batches])
        for seen in (one, two):
            torch.testing.assert_close(seen["evaluated.logits"], expected, rtol=EXACT, atol=EXACT)
            torch.testing.assert_close(seen["trained.logits"], expected, rtol=EXACT, atol=EXACT)
        assert one.keys() == two.keys()
        gradients = [key for key in one if key.startswith("gradient.")]
        assert len(gradients) == 2 * CONFIGS[name].num_hidden_layers
        for key in gradients:
            assert (one[key] - two[key]).norm() <= 1e-4 * one[key].norm(), (name, key)


@pytest.mark.parametrize("kept", [0, 1])
def test_gradients_come_from_the_own_document_alone(tiny_model: MakeModel, kept: int) -> None:
    """A loss on one document has no gradient in the embeddings of another, with and without recomputation."""
    for every in (0, 1):
        layers = layers_of(builder(tiny_model("llama"), carrier=CARRIER, recompute_every=every))
        ids, classes = rows()
        hidden, *rest = layers[0]((ids, classes, torch.zeros(len(ids), dtype=torch.int64), positions()))
        hidden = hidden.detach().requires_grad_()
        parts: Any = (hidden, *rest)
        for layer in layers[1:]:
            parts = layer(parts)
        begin, stop = CUTS[0][kept], CUTS[0][kept + 1]
        output_logits(parts)[0, begin:stop].square().sum().backward()
        assert hidden.grad is not None
        outside = torch.ones(hidden.shape[:2], dtype=torch.bool)
        outside[0, begin:stop] = False
        assert hidden.grad[0, begin:stop].abs().min() > 0
        assert not hidden.grad[outside].any()


def test_arguments_are_made_once_for_a_micro_batch_and_let_go(tiny_model: MakeModel) -> None:
    stages = builder(tiny_model("gemma3_text"), carrier=CARRIER, recompute_every=1)
    layers = layers_of(stages)
    made = []
    isolating = stages.model.isolating_arguments
    stages.model.isolating_arguments = lambda where: made.append(1) or isolating(where)  # type: ignore[method-assign]
    frames = {id(layer.frame): layer.frame for layer in layers if isinstance(layer, DecoderLayer)}
    (frame,) = frames.values()
    for number in range(1, 4):
        where = positions()
        run(layers, *rows(), where).sum().backward()
        assert len(made) == number
        assert len(frame._isolated) == 1
        del where
        assert len(frame._isolated) == 0


# ---- what is refused ----------------------------------------------------------------------------------------------

EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LAYER_TYPES: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
LEAKING = {
    "gpt_oss": {**EXPERTS, **LAYER_TYPES},
    "afmoe": {**EXPERTS, **LAYER_TYPES, "moe_intermediate_size": 24, "num_dense_layers": 1, "num_experts": 4},
}
"""Families that do not tell their mask functions of positions."""


@pytest.mark.parametrize("kind", LEAKING)
def test_families_that_leak_are_refused(tmp_path: Path, kind: str) -> None:
    config = AutoConfig.for_model(kind, **{**SHAPE, **LEAKING[kind], "num_hidden_layers": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"not possible with a model of type '{kind}': its block 0 is given no mask"):
        check_isolation(CausalLM(tmp_path, torch.float32))


class _LooksBack(nn.Module):
    """A block that also mixes each token with the one before, whatever the mask says."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self.block(hidden, **arguments) + 0.1 * hidden.roll(1, dims=1)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_block_is_tried_with_its_weights(tiny_model: MakeModel, name: str) -> None:
    model = CausalLM(tiny_model(name), torch.float32)
    for index in range(model.layer_count):
        block = model.block(index)
        check_block(model, block, index)
        with pytest.raises(UsageError, match=f"its block {index} mixes documents in other ways than attention"):
            check_block(model, _LooksBack(block), index)


def test_block_masks_are_seen_to_keep_documents_apart(tiny_model: MakeModel) -> None:
    """FlexAttention's masks, as transformers makes them, against positions that do and that do not begin again."""
    model = CausalLM(tiny_model("llama"), torch.float32)
    model.attend_by_block_masks()
    check_isolation(model)
    model.isolating_arguments = lambda where: model.block_arguments(where.shape[1])  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="no mask that keeps documents apart"):
        check_isolation(model)


def with_flex_attention(directory: Path, device: str) -> list[list[nn.Module]]:
    """The layers of a model twice: with dense masks and with FlexAttention's."""
    both = []
    for by_blocks in (False, True):
        stages = builder(directory, carrier=CARRIER, device=device)
        if not stages.model.takes_block_masks or stages.model.attention != "sdpa":
            pytest.skip("the family has no FlexAttention")
        both.append(layers_of(stages))
        if by_blocks:
            stages.model.attend_by_block_masks()
    return both


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_block_masks_give_what_dense_masks_give(tiny_model: MakeModel, name: str) -> None:
    """Every family's, its windows too. On the CPU FlexAttention has no backward pass, and is not compiled here."""
    dense, blocks = with_flex_attention(tiny_model(name), "cpu")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected, found = (run(layers, *rows(), positions()) for layers in (dense, blocks))
    for row, begin, stop in documents():
        torch.testing.assert_close(found[row, begin:stop], expected[row, begin:stop], rtol=EXACT, atol=EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on GPUs only")
def test_gradients_with_block_masks_are_those_with_dense_masks(tmp_path: Path) -> None:
    make_model("llama", head_dim=16).save_pretrained(tmp_path)  # the kernel wants 16
    dense, blocks = with_flex_attention(tmp_path, "cuda")
    for layers in (dense, blocks):
        logits = run(layers, *rows(), positions())
        torch.cat([logits[row, begin:stop] for row, begin, stop in documents()]).square().mean().backward()
    trained = [[p for layer in layers for p in layer.parameters() if p.requires_grad] for layers in (dense, blocks)]
    assert trained[0]
    for one, other in zip(*trained, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        # The compiled kernel takes sums in another order, of float32 products.
        assert (one.grad - other.grad).norm() <= 1e-3 * one.grad.norm()
