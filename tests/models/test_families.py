"""Every fact of the table of families, found again on Hugging Face's own models in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cadapter.models.families import FAMILIES, Family, LogitFacts, config_number, logit_facts
from tests.reference.controlled_model import Float64
from tests.tiny_models import CONFIGS, FAMILY_NAMES, HIDDEN, LAYERS, VOCAB, WINDOW, make_model

ROWS, TOKENS = 2, 40
EXACT = 1e-12
"""Relative: a few roundings of float64, of 1e-16 each."""

EXPERT_MODELS = [name for name in CONFIGS if "_moe" in name or name == "mixtral"]


def facts_of(name: str) -> Family:
    return FAMILIES[CONFIGS[name].model_type]


def tokens() -> Tensor:
    """Token ids [ROWS, TOKENS], five windows long."""
    assert TOKENS >= 5 * WINDOW
    return torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits [ROWS, TOKENS, VOCAB]; of a float64 model in float64 all the way."""
    ids = tokens()
    if model.dtype != torch.float64:
        return model(input_ids=ids, use_cache=False).logits
    with Float64():
        return model(input_ids=ids, use_cache=False).logits


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class Seen:
    """What the submodules of some modules received and gave in one pass of the whole model."""

    def __init__(self, model: Any, modules: dict[str, nn.Module]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        hooks = [module.register_forward_hook(self._note(name), with_kwargs=True) for name, module in modules.items()]
        self.logits = logits_of(model)
        for hook in hooks:
            hook.remove()

    def _note(self, name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inputs[name], self.outputs[name] = hidden_input(args, kwargs), first(output)

        return hook


def block_pass(model: Any, layer: int) -> Seen:
    """A pass in which block ``layer`` ("") and its direct submodules are watched."""
    block = model.model.layers[layer]
    return Seen(model, {"": block, **dict(block.named_children())})


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- the tiny models ----------------------------------------------------------------------------------------------


def test_every_family_of_the_table_has_a_model():
    assert set(FAMILY_NAMES) == set(FAMILIES)
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_of_order_1_and_every_block_counts(name):
    model = make_model(name)
    seen = Seen(model, {str(layer): block for layer, block in enumerate(model.model.layers)})
    assert seen.logits.isfinite().all()
    assert 0.5 < seen.logits.std() < 2.5
    for layer in range(LAYERS):
        before, after = seen.inputs[str(layer)], seen.outputs[str(layer)]
        assert (after - before).norm() > 0.5 * before.norm()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": None}),
        ("qwen2_moe", {"layer_types": ["full_attention"] * LAYERS}),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": None}),
        ("cohere", {"logit_scale": 1.0}),
        ("cohere2", {"logit_scale": 1.0}),
        ("cohere2", {"layer_types": ["full_attention"] * LAYERS}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention"] * LAYERS}),
        ("gemma3_text", {"final_logit_softcapping": None}),
        ("gemma3_text", {"layer_types": ["full_attention"] * LAYERS}),
        ("phi3", {"sliding_window": None}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"attention_multiplier": 1.0}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("smollm3", {"layer_types": ["full_attention"] * LAYERS}),
    ],
)
def test_leaving_a_setting_out_shows(name, changes):
    """So that equal logits say something of it. Eager attention: sdpa knows no cap of attention scores."""
    eager = {"attn_implementation": "eager"}
    model, other = (make_model(name, **each) for each in ({}, changes))
    model.set_attn_implementation(**eager)
    other.set_attn_implementation(**eager)
    other.load_state_dict(model.state_dict())
    assert (logits_of(model) - logits_of(other)).abs().max() > 0.05


@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_half_of_each_head_is_rotated(name):
    model = make_model(name)
    assert model.model.rotary_emb.inv_freq.numel() == CONFIGS[name].head_dim // 4  # pairs of half the components


# ---- what a block adds --------------------------------------------------------------------------------------------

SCALES = {family.residual_scale for family in FAMILIES.values()}
ADDED = {family.added for family in FAMILIES.values() if family.added is not None}


def misfit(seen: Seen, added: tuple[str, str], scale: float) -> float:
    """How far ``scale`` times the sum of these two submodules' outputs is from what the block adds, relative."""
    if not set(added) <= seen.outputs.keys():
        return float("inf")
    return relative(scale * (seen.outputs[added[0]] + seen.outputs[added[1]]), seen.outputs[""] - seen.inputs[""])


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_adds_what_its_two_modules_give(name, layer):
    """And only the facts of its own family fit: those of the other families are far off."""
    model, family = make_model(name, torch.float64), facts_of(name)
    seen = block_pass(model, layer)
    scale = config_number(model.config, family.residual_scale)
    assert family.added is not None
    assert misfit(seen, family.added, scale) < EXACT
    others = {(added, config_number(model.config, key)) for added in ADDED for key in SCALES} - {(family.added, scale)}
    assert len(others) >= len(ADDED) - 1
    for added, other_scale in others:
        assert misfit(seen, added, other_scale) > 0.1, (added, other_scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_and_mlp_read_the_same_input_in_parallel_blocks_only(name):
    model, family = make_model(name, torch.float64), facts_of(name)
    for layer in range(LAYERS):
        seen = block_pass(model, layer)
        difference = relative(seen.inputs["mlp"], seen.inputs["self_attn"])
        assert difference == 0 if family.parallel else difference > 0.1


# ---- what happens to embeddings and logits ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_embedding_scale(name):
    model, family = make_model(name, torch.float64), facts_of(name)
    seen = Seen(model, {"block": model.model.layers[0]})
    embedded = model.model.embed_tokens(tokens())
    scale = config_number(model.config, family.embedding_scale)
    assert relative(embedded * scale, seen.inputs["block"]) < EXACT
    assert (scale == 1) == (name != "granite")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_normed_hidden_states_and_head_weight(name):
    model, family = make_model(name, torch.float64), facts_of(name)
    seen = Seen(model, {"norm": model.model.norm})
    products = seen.outputs["norm"] @ model.lm_head.weight.T
    facts = logit_facts(family, model.config)
    assert relative(facts.apply(products), seen.logits) < EXACT
    if facts != LogitFacts():
        assert relative(products, seen.logits) > 0.1


# ---- residual writers, by their names on disk ---------------------------------------------------------------------

STRENGTH = 0.5
"""‖W‖₂: its effect on logits is of order 1."""


def random_matrices(generator: torch.Generator) -> list[Tensor]:
    """I + W [H, H] of every layer."""
    matrices = []
    for _ in range(LAYERS):
        W = torch.randn(HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
        matrices.append(torch.eye(HIDDEN, dtype=torch.float64) + STRENGTH / torch.linalg.matrix_norm(W, 2) * W)
    return matrices


@contextmanager
def hooked(model: Any, matrices: list[Tensor], modules: tuple[str, ...]) -> Iterator[None]:
    """Multiply what these modules of every block write by the layer's matrix."""

    def multiply(matrix: Tensor) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            return (output[0] @ matrix.T, *output[1:]) if isinstance(output, tuple) else output @ matrix.T

        return hook

    hooks = [
        getattr(block, module).register_forward_hook(multiply(matrix))
        for block, matrix in zip(model.model.layers, matrices, strict=True)
        for module in modules
    ]
    yield
    for hook in hooks:
        hook.remove()


def multiply_writers(tensors: dict[str, Tensor], matrices: list[Tensor], writers: list[list[str]]) -> int:
    """Multiply these writers' weights, [H, in] or [experts, H, in], and their biases; return how many weights."""
    count = 0
    for layer, names in enumerate(writers):
        for name in names:
            stem = f"model.layers.{layer}.{name}"
            weight = stem if stem in tensors else f"{stem}.weight"
            assert tensors[weight].dim() == (3 if weight == stem else 2)
            tensors[weight] = matrices[layer] @ tensors[weight]
            if f"{stem}.bias" in tensors:
                tensors[f"{stem}.bias"] = matrices[layer] @ tensors[f"{stem}.bias"]
            count += 1
    return count


class OnDisk:
    """The tensors of a saved model, in float64 and by their names on disk."""

    def __init__(self, name: str, directory: Path, per_expert: bool = True) -> None:
        make_model(name, torch.float64).save_pretrained(directory, save_original_format=per_expert)
        (self.file,) = directory.glob("*.safetensors")
        self.directory, self.tensors = directory, load_file(self.file)
        self.model = self.load()

    def load(self) -> Any:
        """Hugging Face's model; the default's product of experts has no float64."""
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float64, experts_implementation="eager")

    def writers(self, family: Family) -> tuple[list[list[str]], list[list[str]]]:
        """The attention's and the MLP's writers of every layer."""
        attention, mlp = [], []
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            names = [key.removeprefix(prefix).removesuffix(".weight") for key in self.tensors if key.startswith(prefix)]
            found = family.writers_among(names)
            attention.append(list(found[0]))
            mlp.append(list(found[1]))
        return attention, mlp

    def merged_logits(self, matrices: list[Tensor], writers: list[list[str]]) -> Tensor:
        """Logits of the model loaded from files in which ``writers`` were multiplied."""
        tensors = dict(self.tensors)
        assert multiply_writers(tensors, matrices, writers) > 0
        save_file(tensors, self.file, metadata={"format": "pt"})
        return logits_of(self.load())


def check_writers(disk: OnDisk, family: Family) -> None:
    matrices = random_matrices(torch.Generator().manual_seed(9))
    attention, mlp = disk.writers(family)
    both = [one + other for one, other in zip(attention, mlp, strict=True)]
    for modules, writers in ((("self_attn",), attention), (("mlp",), mlp), (("self_attn", "mlp"), both)):
        with hooked(disk.model, matrices, modules):
            expected = logits_of(disk.model)
        assert (expected - logits_of(disk.model)).abs().max() > 0.1
        # Sums over 48 numbers in another order, through three layers.
        assert (disk.merged_logits(matrices, writers) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_multiplying_the_writers_on_disk_is_multiplying_what_the_modules_write(name, tmp_path):
    """One writer more or less would show: every weight of a block takes part."""
    check_writers(OnDisk(name, tmp_path), facts_of(name))


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_the_same_with_experts_fused_on_disk(name, tmp_path):
    disk = OnDisk(name, tmp_path, per_expert=False)
    assert disk.tensors["model.layers.0.mlp.experts.down_proj"].shape[:2] == (4, HIDDEN)
    check_writers(disk, facts_of(name))


@pytest.mark.parametrize("name", EXPERT_MODELS)
def test_on_disk_each_expert_is_a_writer(name, tmp_path):
    disk, family = OnDisk(name, tmp_path), facts_of(name)
    dense = getattr(CONFIGS[name], "mlp_only_layers", None) or []
    for layer, names in enumerate(disk.writers(family)[1]):
        experts = [each for each in names if ".experts." in each]
        assert len(experts) == (0 if layer in dense else 4)
        assert len(names) - len(experts) == (layer in dense or CONFIGS[name].model_type == "qwen2_moe")
    assert family.experts


@pytest.mark.parametrize("name", CONFIGS)
def test_only_families_with_experts_say_so(name):
    model = make_model(name)
    fused = [key for key, parameter in model.named_parameters() if ".experts." in key and parameter.dim() == 3]
    assert facts_of(name).experts == bool(fused)


def test_a_name_must_fit_as_a_whole():
    names = ["self_attn.o_proj_norm", "xself_attn.o_proj", "mlp.experts.1.down_proj.base", "mlp.experts.x.down_proj"]
    assert FAMILIES["qwen3_moe"].writers_among(names) == ((), ())
