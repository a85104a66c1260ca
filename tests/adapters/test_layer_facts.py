"""Facts of a base's layers: found in its files, recorded in few words, and read again as they were."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cadapter.adapters.layer_facts import LayerFacts, describe_layers
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from tests.tiny_models import CONFIGS, make_model, save_model

OUT = ("self_attn.o_proj",)


def experts(count: int, first: int = 0) -> tuple[str, ...]:
    return tuple(f"mlp.experts.{number}.down_proj" for number in range(first, count))


def ending(names: list[str], part: str) -> set[str]:
    """Those of a layer's tensors that are this part of what is named like a writer, without it."""
    found = {name.removesuffix(part) for name in names if name.endswith(part)}
    return {name for name in found if name.endswith(("o_proj", "down_proj", ".w2"))}


def again(facts: LayerFacts) -> LayerFacts:
    """The facts after they were written and read."""
    return LayerFacts.from_json(json.loads(json.dumps(facts.to_json())))


@pytest.mark.parametrize(
    ("facts", "mlp", "biased"),
    [
        (LayerFacts(OUT, ("mlp.down_proj",), True, ("mlp.down_proj",)), ["mlp.down_proj"], ["mlp.down_proj"]),
        (
            LayerFacts(OUT, (*experts(12), "mlp.shared_expert.down_proj"), experts=12),
            ["mlp.experts.*.down_proj", "mlp.shared_expert.down_proj"],
            [],
        ),
        (
            LayerFacts(OUT, experts(2), biased=experts(2), experts=2),
            ["mlp.experts.*.down_proj"],
            ["mlp.experts.*.down_proj"],
        ),
        (LayerFacts(OUT, experts(3), biased=experts(2), experts=3), ["mlp.experts.*.down_proj"], list(experts(2))),
        (LayerFacts(OUT, experts(1), experts=1), ["mlp.experts.*.down_proj"], []),
        (LayerFacts(OUT, experts(4, first=1), experts=4), list(experts(4, first=1)), []),  # one was taken out
        (LayerFacts(OUT, ("mlp.experts.down_proj",), experts=8), ["mlp.experts.down_proj"], []),
        (LayerFacts(OUT, (), unknown=("mlp.experts.*.w2",)), [], []),
    ],
)
def test_what_is_recorded_is_read_again(facts, mlp, biased):
    entry = facts.to_json()
    assert (entry["mlp"], entry["biased"]) == (mlp, biased)
    assert again(facts) == facts


def test_many_experts_take_few_words():
    facts = LayerFacts(OUT, experts(128), experts=128)
    size = len(json.dumps({str(layer): facts.to_json() for layer in range(48)}, indent=2))
    assert size < 20_000  # 229 kB with each expert's name
    assert len(again(facts).mlp) == 128


def test_records_without_a_number_of_experts_are_read():
    entry = {"attention": list(OUT), "mlp": list(experts(2)), "post_norms": False, "biased": []}
    assert LayerFacts.from_json(entry) == LayerFacts(OUT, experts(2))


@pytest.mark.parametrize(
    "changes",
    [{"mlp": "mlp.down_proj"}, {"unknown": "w2"}, {"mlp": [1]}, {"mlp": ["mlp.experts.*.w2"]}, {"experts": "many"}],
)
def test_records_that_say_nothing_sensible_are_errors(changes):
    entry = {"attention": list(OUT), "mlp": list(experts(2)), "post_norms": False, "biased": [], "experts": 0}
    with pytest.raises((TypeError, ValueError)):
        LayerFacts.from_json({**entry, **changes})
    with pytest.raises(KeyError):
        LayerFacts.from_json({key: value for key, value in entry.items() if key != "mlp"})


@pytest.mark.parametrize("name", CONFIGS)
def test_all_writers_of_every_family_are_found(name, tmp_path):
    """A layer's writers are its tensors of these names, and no other tensor looks like one."""
    base = Checkpoint(save_model(name, tmp_path / "model"))
    family = FAMILIES[base.config.model_type]
    for layer, facts in describe_layers(base, family, range(3)).items():
        prefix = f"model.layers.{layer}."
        names = [name.removeprefix(prefix) for name in base.names() if name.startswith(prefix)]
        assert {*facts.attention, *facts.mlp} == ending(names, ".weight")
        assert facts.attention == OUT
        assert facts.experts == (4 if any("experts.3." in name for name in names) else 0)
        assert facts.post_norms == family.post_norms
        assert set(facts.biased) == ending(names, ".bias")
        assert facts.unknown == ()
        assert again(facts) == facts


def test_fused_experts_are_one_writer(tmp_path):
    make_model("qwen2_moe-dense").save_pretrained(tmp_path, save_original_format=False)
    facts = describe_layers(Checkpoint(tmp_path), FAMILIES["qwen2_moe"], range(3))
    assert [facts[layer].experts for layer in range(3)] == [4, 0, 4]
    assert facts[0].mlp == ("mlp.experts.down_proj", "mlp.shared_expert.down_proj")
    assert facts[1].mlp == ("mlp.down_proj",)


def test_experts_come_in_the_order_of_their_numbers(tmp_path):
    make_model("llama").config.save_pretrained(tmp_path)
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(1) for name in reversed(experts(11))}
    save_file(tensors, tmp_path / "model.safetensors")
    [facts] = describe_layers(Checkpoint(tmp_path), FAMILIES["qwen3_moe"], [0]).values()
    assert facts.mlp == experts(11)
    assert facts.experts == 11
