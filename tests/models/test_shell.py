"""Families that are in no table: cut right by their structure, or refused before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from cadapter.adapters.control import SITES, ControlSettings
from cadapter.errors import UsageError
from cadapter.models.families import FAMILIES, FUSED, PER_EXPERT, LogitFacts
from cadapter.models.loading import CausalLM, facts_of
from cadapter.training.modes.control import adapters_of
from cadapter.training.run import inferred_note
from tests.models.test_cached import check_pieces
from tests.reference import controlled_model
from tests.tiny_models import CONFIGS, FULL, HIDDEN, LAYERS, SHAPE, SLIDING, SPECIAL, TIED, VOCAB, WINDOW, save_model
from tests.tiny_pipeline import (
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

ROWS, TOKENS = 2, 3 * WINDOW

# ---- families that structure alone carries ------------------------------------------------------------------------

WINDOWS: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GLM_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
MULTIPLIERS: dict[str, Any] = {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 0.7}

INFERRED: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {"mlp_bias": True},
    "beam": {**WINDOWS, "final_logit_softcapping": 2.0},
    "cohere2_moe": {**WINDOWS, **EXPERTS, "logit_scale": 0.6},
    "ernie4_5": TIED,
    "exaone4": WINDOWS,
    "flex_olmo": EXPERTS,
    "gemma": TIED,
    "glm": {"attention_bias": True},
    "glm4_moe": GLM_EXPERTS,
    "gpt_oss": {**WINDOWS, **LOCAL_EXPERTS},
    "granite_swa": {**WINDOWS, **MULTIPLIERS},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "hyperclovax": {},
    "internlm3": {},
    "jais2": {},
    "minimax": {**LOCAL_EXPERTS, "layer_types": [FULL, "linear_attention", FULL]},
    "minimax_m2": LOCAL_EXPERTS,
    "ministral": WINDOWS,
    "ministral3": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 1.0},
    "olmo3": WINDOWS,
    "olmoe": EXPERTS,
    "seed_oss": {"attention_bias": True},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {**WINDOWS, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
}
"""Settings of the tiny model of each type."""


def tiny_config(kind: str, **settings: Any) -> Any:
    """The config of a tiny model; the test is skipped where the installed transformers does not know the type."""
    try:
        return AutoConfig.for_model(kind, **{**SHAPE, **SPECIAL, **settings})
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        pytest.skip(f"the installed transformers knows no models of type {kind!r}")


@pytest.fixture
def inferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A function that saves the tiny model of a type that is in no table, and returns its directory."""

    def save(kind: str) -> Path:
        assert kind not in FAMILIES
        monkeypatch.setitem(CONFIGS, kind, tiny_config(kind, **INFERRED[kind]))
        return save_model(kind, tmp_path / kind)

    return save


@pytest.mark.parametrize("kind", INFERRED)
def test_logits_are_hugging_faces(inferred, kind):
    directory = inferred(kind)
    theirs, stages = hugging_faces(directory), builder(directory, adapted=())
    ids = random_tokens(ROWS, TOKENS, VOCAB)
    with torch.no_grad():
        expected = theirs(input_ids=ids, use_cache=False).logits
        outputs = run_layers(layers_of(stages), ids, no_classes(ids))  # in training mode, as in a run
    assert expected.std() > 0.1
    # The same operations on the same numbers; experts may be added up in another order in training.
    torch.testing.assert_close(output_logits(outputs), expected, rtol=1e-5, atol=1e-5)
    assert stages.model.family.inferred
    assert stages.model.family.added is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in INFERRED if kind != "minimax"])
def test_keys_and_values_can_be_kept(inferred, kind):
    """MiniMax keeps states of linear attention as well."""
    check_pieces(inferred(kind))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", ["glm4_moe", "gpt_oss", "granite_swa", "olmo3"])
def test_adapters_act_as_in_the_reference(inferred, kind, site):
    """At "block" on what the block adds in all, since nothing says what its parts are."""
    directory = inferred(kind)
    layers = layers_of(builder(directory, ControlSettings(RANK, 2.0, site)))
    ids, classes = random_tokens(ROWS, TOKENS, VOCAB), random_classes(ROWS, TOKENS)
    with torch.no_grad():
        outputs = run_layers(layers, ids, classes)
        controlled, ones = references(adapters_of(layers), classes), torch.ones(ids.shape)
        expected = controlled_model.run(hugging_faces(directory).double(), controlled, ids, ids, ones).logits
        base = hugging_faces(directory)(input_ids=ids, use_cache=False).logits
    # Three layers of float32 on numbers of order 1.
    torch.testing.assert_close(output_logits(outputs).double(), expected, rtol=1e-5, atol=2e-5)
    assert (expected - base).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        ("starcoder2", ["self_attn.o_proj"], ["mlp.c_proj"]),
        # A dense block first, then experts and one that all tokens share.
        ("glm4_moe", ["self_attn.o_proj"], ["mlp.down_proj", "mlp.shared_experts.down_proj"]),
        ("olmoe", ["self_attn.o_proj"], []),
        ("minimax", ["self_attn.o_proj", "self_attn.out_proj"], []),
    ],
)
def test_writers_of_all_blocks_are_found(inferred, kind, attention, mlp):
    model = CausalLM(inferred(kind), torch.float32)
    assert sorted(model.family.attention_writers) == attention
    assert sorted(model.family.mlp_writers) == sorted([*mlp, PER_EXPERT, FUSED])


@pytest.mark.parametrize(
    ("kind", "embedding", "logits", "words"),
    [
        ("granite_swa", 3.0, LogitFacts(scale=1 / 0.7), "embeddings times 3, logits times 1.42857, soft cap none"),
        ("cohere2_moe", 1.0, LogitFacts(scale=0.6), "embeddings times 1, logits times 0.6, soft cap none"),
        ("vaultgemma", 1.0, LogitFacts(softcap=2.0), "embeddings times 1, logits times 1, soft cap 2"),
        ("olmo3", 1.0, LogitFacts(), "its residual writers are self_attn.o_proj, mlp.down_proj"),
    ],
)
def test_what_was_inferred_is_said(inferred, kind, embedding, logits, words):
    model = CausalLM(inferred(kind), torch.float32)
    assert model.embedding_scale == embedding
    assert model.logits == logits
    note = inferred_note(model)
    assert f"Models of type '{kind}' are in no table of families" in note
    assert "what a block adds is its output minus its input" in note
    assert words in note


# ---- families that cannot be cut ----------------------------------------------------------------------------------

HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", FULL, FULL]}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({}, "it has no model"),
    "gpt_neox": ({}, "it has no model"),
    "mamba": ({}, "it has no model"),
    "phi": ({}, "it has no norm"),
    "jamba": ({}, "it has no norm"),
    "lfm2": ({}, "it has no norm"),
    "falcon_h1": ({}, "it has no norm"),
    "granitemoe": (LOCAL_EXPERTS, "its block 0 has no mlp"),
    "qwen3_next": ({**EXPERTS, **HYBRID}, "its block 0 has no self_attn"),
    "phimoe": (LOCAL_EXPERTS, "its routers choose experts at random in training"),
    "nanochat": ({}, "it changes its token embeddings in a way that is not known"),
    "afmoe": ({**EXPERTS, "mup_enabled": True}, "it changes its token embeddings in a way that is not known"),
    "gemma4_text": (
        {"hidden_size_per_layer_input": 0, "global_head_dim": 8},
        "it calls its blocks with more than hidden states by position",
    ),
}
"""Settings of the tiny model of each type, and the reason."""


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason_before_any_weight_is_read(tmp_path, kind):
    """There are no weights that could be read."""
    settings, reason = REFUSED[kind]
    tiny_config(kind, **settings).save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as error:
        CausalLM(tmp_path, torch.float32)
    assert str(error.value) == f"{tmp_path}: a model of type '{kind}' cannot be cut into pipeline layers: {reason}."


# ---- every check can fail -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of the right build."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
        return hidden + self.mlp(self.self_attn(hidden))


class Inner(nn.Module):
    """What can be cut: embedding, a chain of blocks, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask=mask)
        return hidden

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None
    ) -> Any:
        assert (input_ids is None) != (inputs_embeds is None)
        hidden = self.embedded(input_ids, inputs_embeds)
        hidden = self.blocks(hidden, torch.ones(hidden.shape[1], hidden.shape[1]).tril())
        return SimpleNamespace(last_hidden_state=self.norm(hidden))


class Skeleton(nn.Module):
    """A causal LM of the right build."""

    base_model_prefix = "model"

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="handmade", hidden_size=HIDDEN)
        self.model = inner or Inner()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids=input_ids).last_hidden_state))


class NormedEmbeddings(Inner):
    def embedded(self, *inputs: Any) -> Tensor:
        return self.norm(super().embedded(*inputs))


class PositionsAdded(Inner):
    def embedded(self, *inputs: Any) -> Tensor:
        hidden = super().embedded(*inputs)
        return hidden + torch.arange(hidden.shape[1]).view(1, -1, 1)


class TokensScaledWhereLookedUp(Inner):
    """As in Falcon H1: embeddings that are given are taken as they are."""

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        hidden = super().embedded(input_ids, inputs_embeds)
        return 2 * hidden if inputs_embeds is None else hidden


class ScaledBetween(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(0.5 * hidden, mask=mask)
        return hidden


class ShiftedBetween(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden.roll(1, dims=1), mask=mask)
        return hidden


class HiddenStatesOnly(Inner):
    """This can be cut too."""

    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class FirstInputAgain(Inner):
    """A skip connection around all blocks."""

    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden + super().blocks(hidden, mask)


class NormedTwice(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.norm(super().blocks(hidden, mask))


class Backwards(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            hidden = layer(hidden, mask=mask)
        return hidden


class OneLeftOut(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = layer(hidden, mask=mask)
        return hidden


class Looped(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return super().blocks(super().blocks(hidden, mask), mask)


class SomethingPerToken(Inner):
    """Each block also gets the embeddings, as keys and values say."""

    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        values = hidden.tanh()
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, values=(values, None))
        return hidden


class TokenIds(Inner):
    """Each block also gets the tokens themselves."""

    def forward(self, input_ids: Tensor | None = None, **more: Any) -> Any:
        self.ids = input_ids
        return super().forward(input_ids=input_ids, **more)

    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, ids=self.ids)
        return hidden


class SharedBetweenBlocks(Inner):
    """One block may leave values for those after it."""

    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        shared: dict[int, Tensor] = {}
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, shared=shared)
        return hidden


class ByPosition(Inner):
    def blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


class Failing(Inner):
    def embedded(self, *inputs: Any) -> Tensor:
        raise LookupError("no such table")


def with_head(change: Callable[[Tensor], Tensor]) -> Skeleton:
    """A causal LM that changes its logits."""

    class Changed(Skeleton):
        def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
            return SimpleNamespace(logits=change(super().forward(input_ids).logits))

    return Changed()


def without(part: str, of: str = "") -> Skeleton:
    """A causal LM that lacks a module."""
    skeleton = Skeleton()
    delattr(skeleton.get_submodule(of), part)
    return skeleton


def test_a_model_of_the_right_build_is_cut():
    assert facts_of(Skeleton()).inferred
    assert facts_of(Skeleton(HiddenStatesOnly())).inferred
    assert facts_of(with_head(lambda logits: 1.0 * logits)).inferred


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (NormedEmbeddings, "it changes its token embeddings in a way that is not known"),
        (PositionsAdded, "it changes its token embeddings in a way that is not known"),
        (TokensScaledWhereLookedUp, "it changes its token embeddings in a way that is not known"),
        (ScaledBetween, "it changes hidden states between its blocks"),
        (ShiftedBetween, "it changes hidden states between its blocks"),
        (Backwards, "it does not call each of its blocks once, in their order"),
        (OneLeftOut, "it does not call each of its blocks once, in their order"),
        (Looped, "it does not call each of its blocks once, in their order"),
        (FirstInputAgain, "it changes hidden states after its blocks"),
        (NormedTwice, "it changes hidden states after its blocks"),
        (SomethingPerToken, "it hands its blocks more than hidden states, masks and positions"),
        (TokenIds, "it hands its blocks more than hidden states, masks and positions"),
        (SharedBetweenBlocks, "it hands its blocks more than hidden states, masks and positions"),
        (ByPosition, "it calls its blocks with more than hidden states by position"),
        (Failing, r"its forward pass cannot be followed \(LookupError: no such table\)"),
    ],
)
def test_a_forward_pass_that_is_not_embedding_blocks_and_norm_is_refused(inner, reason):
    with pytest.raises(UsageError, match=f"^{reason}$"):
        facts_of(Skeleton(inner()))


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x + 1, torch.tanh, lambda x: x.softmax(-1)])
def test_logits_that_are_changed_in_an_unknown_way_are_refused(change):
    with pytest.raises(UsageError, match=r"^it changes its logits in a way that is not known$"):
        facts_of(with_head(change))


@pytest.mark.parametrize(
    ("skeleton", "reason"),
    [
        (without("model"), "it has no model"),
        (without("lm_head"), "it has no linear lm_head"),
        (without("norm", "model"), "it has no norm"),
        (without("embed_tokens", "model"), "it has no embed_tokens"),
        (without("mlp", "model.layers.1"), "its block 1 has no mlp"),
        (without("self_attn", "model.layers.2"), "its block 2 has no self_attn"),
    ],
)
def test_a_model_without_its_parts_is_refused(skeleton, reason):
    with pytest.raises(UsageError, match=f"^{reason}$"):
        facts_of(skeleton)


def test_a_head_with_a_bias_is_refused():
    skeleton = Skeleton()
    skeleton.lm_head = nn.Linear(HIDDEN, VOCAB)
    with pytest.raises(UsageError, match=r"^its lm_head has a bias$"):
        facts_of(skeleton)


def test_the_model_is_as_before_after_the_checks():
    """Its parts are exchanged while it is looked at, also where that fails."""
    for skeleton in (Skeleton(), Skeleton(ScaledBetween()), with_head(torch.tanh)):
        before = dict(skeleton.named_modules())
        if type(skeleton) is Skeleton and type(skeleton.model) is Inner:
            facts_of(skeleton)
        else:
            with pytest.raises(UsageError):
                facts_of(skeleton)
        assert dict(skeleton.named_modules()) == before
