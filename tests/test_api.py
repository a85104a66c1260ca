"""``cadapter.load``: against Hugging Face's own models with the adapter in their weights, and against peft."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import cadapter
from cadapter.adapters.directory import read_control_adapter
from cadapter.adapters.factors import Symmetric
from cadapter.adapters.layer_facts import describe_layers
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from tests.convert.lora_models import save_lora
from tests.reference import naive
from tests.steered_models import RANK, make_adapter, make_model
from tests.tiny_models import HIDDEN, LAYERS
from tests.tiny_project import run_well

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
PLAIN = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("api") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """A control adapter of the site that merges exactly."""
    facts = describe_layers(Checkpoint(base), FAMILIES["llama"], range(LAYERS))
    return make_adapter(base.parent / "adapter", "writes", facts=facts).path


@pytest.fixture(scope="module")
def additive(base: Path) -> Path:
    """A LoRA that peft wrote, on several kinds of linear layers, with biases of lora_B."""
    targets = ["q_proj", "o_proj", "down_proj", "lm_head"]
    return save_lora(base, base.parent / "additive", 0.1, target_modules=targets, use_rslora=True, lora_bias=False)


@pytest.fixture(scope="module")
def multiplicative(base: Path, adapter: Path) -> Path:
    run_well("to-mult-lora", adapter, base.parent / "multiplicative")
    return base.parent / "multiplicative"


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(4, 320, (3, 12), generator=torch.Generator().manual_seed(7))


def logits_of(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def plain(base: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def power(W: torch.Tensor, t: float) -> torch.Tensor:
    """``(I + W)^t`` [H, H] in float64 through the eigenvectors of W."""
    values, vectors = torch.linalg.eig(W.double())
    return (vectors @ torch.diag((1 + values) ** t) @ torch.linalg.inv(vectors)).real


def merged(model, adapter: Path, t: float):
    """The model with ``(I + W)^t`` multiplied into the weights that write to the residual stream."""
    files = read_control_adapter(adapter)
    for layer, factors in files.layers.items():
        P = power(naive.full_matrix(factors.A, factors.B, files.scale), t)
        for writer in WRITERS:
            weight = model.model.layers[layer].get_submodule(writer).weight
            weight.data = (P @ weight.data.double()).to(weight.dtype)
    return model


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# What float32 keeps after three blocks: 1e-6 is seen, 7e-7 of it the base's own against its float64 self.
ROUNDING = 5e-6


@pytest.mark.parametrize("t", [1.0, -1.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_hugging_faces_model_with_merged_weights(base, adapter, tokens, t, dtype) -> None:
    model = cadapter.load(base, adapter, strength=t)
    found = logits_of(model, tokens)
    assert error(found, logits_of(plain(base), tokens)) > 0.01
    assert error(found, logits_of(merged(plain(base, dtype), adapter, t), tokens)) < ROUNDING


def test_it_is_the_models_own_class_and_generates_with_and_without_its_cache(base, adapter, tokens) -> None:
    model = cadapter.load(str(base), str(adapter))
    assert isinstance(model, (LlamaForCausalLM, cadapter.SteeredLM))
    assert type(model).__name__ == "LlamaForCausalLM"
    mask = torch.ones_like(tokens)
    cached = model.generate(tokens, attention_mask=mask, **PLAIN)
    assert torch.equal(cached, model.generate(tokens, attention_mask=mask, use_cache=False, **PLAIN))
    assert torch.equal(cached, merged(plain(base), adapter, 1).generate(tokens, attention_mask=mask, **PLAIN))
    assert not torch.equal(cached, plain(base).generate(tokens, attention_mask=mask, **PLAIN))


def test_it_works_in_a_pipeline_of_transformers(base, adapter) -> None:
    model = cadapter.load(base, adapter)
    writer = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(base))
    assert writer("best film", **PLAIN)[0]["generated_text"].startswith("best film")


def test_strength_is_set_at_any_time_and_0_is_the_base_bit_for_bit(base, adapter, tokens) -> None:
    bare = logits_of(plain(base), tokens)
    model = cadapter.load(base, adapter)
    full = logits_of(model, tokens)
    model.set_strength(0)
    assert torch.equal(logits_of(model, tokens), bare)
    with model.at_strength(1):
        assert model.strengths == {"default": 1}
        assert torch.equal(logits_of(model, tokens), full)
    assert model.strengths == {"default": 0}
    model.set_strength(-1)
    assert not torch.equal(logits_of(model, tokens), bare)


@pytest.mark.parametrize("site", ["block", "mlp", "writes"])
@pytest.mark.parametrize("form", ["general", "symmetric"])
def test_a_strength_for_each_row_of_a_batch(base, tokens, tmp_path, site, form) -> None:
    files = make_adapter(tmp_path / "adapter", site)
    if form == "symmetric":
        rewrite_symmetric(files.path, files)
    model = cadapter.load(base, files.path, strength=[0.5, -1, 0])
    together = logits_of(model, tokens)
    for row, t in enumerate((0.5, -1, 0)):
        with model.at_strength(t):
            assert error(together[row], logits_of(model, tokens[row : row + 1])[0]) < ROUNDING
    assert model.strengths == {"default": [0.5, -1, 0]}
    with pytest.raises(cadapter.UsageError, match="The batch has 2 rows, and strengths were set for 3"):
        logits_of(model, tokens[:2])


def rewrite_symmetric(directory: Path, files) -> None:
    from cadapter.adapters.directory import control_card, write_control_adapter

    files.layers = {
        layer: Symmetric(torch.linalg.qr(factors.B).Q, torch.linspace(-0.4, 0.4, RANK))
        for layer, factors in files.layers.items()
    }
    files.alpha = RANK
    write_control_adapter(directory, files, control_card(files))


def test_rows_keep_their_strengths_when_generate_multiplies_them(base, adapter, tokens) -> None:
    model = cadapter.load(base, adapter, strength=[1, -1, 0])
    mask = torch.ones_like(tokens)
    found = model.generate(tokens, attention_mask=mask, **PLAIN, num_beams=2, num_return_sequences=2)
    assert len(found) == 6
    for row, t in enumerate((1, -1, 0)):
        with model.at_strength(t):
            alone = model.generate(
                tokens[row : row + 1], attention_mask=mask[:1], **PLAIN, num_beams=2, num_return_sequences=2
            )
        assert torch.equal(found[2 * row : 2 * row + 2], alone)


def test_several_adapters_act_in_order_as_merging_one_after_the_other(base, adapter, tokens, tmp_path) -> None:
    other = make_adapter(tmp_path / "other", "writes", spectral=0.4, layers=(0, 2)).path
    generator = torch.Generator().manual_seed(9)
    tensors = load_file(other / "adapter_model.safetensors")
    shuffled = {name: each[torch.randperm(len(each), generator=generator)] for name, each in tensors.items()}
    save_file(shuffled, other / "adapter_model.safetensors")
    strengths = {"first": 1.5, "second": -0.5}
    model = cadapter.load(base, {"first": adapter, "second": other}, strength=strengths)
    assert model.strengths == strengths
    expected = merged(merged(plain(base, torch.float64), adapter, 1.5), other, -0.5)
    swapped = merged(merged(plain(base, torch.float64), other, -0.5), adapter, 1.5)
    assert error(logits_of(model, tokens), logits_of(expected, tokens)) < ROUNDING
    assert error(logits_of(model, tokens), logits_of(swapped, tokens)) > 10 * ROUNDING
    model.set_strength({"second": 0})
    assert error(logits_of(model, tokens), logits_of(merged(plain(base), adapter, 1.5), tokens)) < ROUNDING


def test_an_additive_lora_is_what_peft_computes(base, additive, tokens) -> None:
    model = cadapter.load(base, additive)
    theirs = PeftModel.from_pretrained(plain(base), additive)
    assert error(logits_of(model, tokens), logits_of(theirs, tokens)) < ROUNDING
    model.set_strength([-1, 0.5, 0])
    together = logits_of(model, tokens)
    names = [name for name, each in theirs.named_modules() if isinstance(each, LoraLayer)]
    whole = {name: dict(theirs.get_submodule(name).scaling) for name in names}
    for row, t in enumerate((-1, 0.5, 0)):
        for name in names:
            theirs.get_submodule(name).scaling = {key: t * value for key, value in whole[name].items()}
        assert error(together[row], logits_of(theirs, tokens)[row]) < ROUNDING
    model.set_strength(0)
    assert torch.equal(logits_of(model, tokens), logits_of(plain(base), tokens))


def test_an_additive_lora_with_biases_is_what_peft_computes(tokens, tmp_path) -> None:
    base = make_model(tmp_path / "biased", "llama-biased")
    lora = save_lora(base, tmp_path / "lora", 0.1, target_modules=["o_proj", "down_proj"], lora_bias=True)
    theirs = logits_of(PeftModel.from_pretrained(plain(base), lora), tokens)
    assert error(logits_of(cadapter.load(base, lora), tokens), theirs) < ROUNDING


@pytest.mark.parametrize("t", [1.0, -1.0, 0.5])
def test_a_multiplicative_lora_is_the_adapter_that_it_came_from(base, adapter, multiplicative, tokens, t) -> None:
    found = logits_of(cadapter.load(base, multiplicative, t), tokens)
    assert error(found, logits_of(merged(plain(base, torch.float64), adapter, t), tokens)) < ROUNDING
    rows = cadapter.load(base, multiplicative, [0, t, 1])
    assert error(logits_of(rows, tokens)[1], found[1]) < ROUNDING


def test_loras_act_inside_of_control_adapters_whatever_their_order(base, adapter, additive, tokens) -> None:
    expected = merged(PeftModel.from_pretrained(plain(base, torch.float64), additive).merge_and_unload(), adapter, 0.5)
    for names in (("lora", "control"), ("control", "lora")):
        paths = {name: {"lora": additive, "control": adapter}[name] for name in names}
        model = cadapter.load(base, paths, {"control": 0.5})
        assert error(logits_of(model, tokens), logits_of(expected, tokens)) < ROUNDING
        assert torch.equal(logits_of(model.detach(), tokens), logits_of(plain(base), tokens))


def test_a_loaded_model_is_changed_in_place_and_comes_back_as_it_was(base, adapter, additive, tokens) -> None:
    model = plain(base)
    names = [name for name, _ in model.named_modules()]
    bare = logits_of(model, tokens)
    steered = cadapter.load(model, {"a": adapter, "b": additive, "c": adapter})
    assert steered is model
    assert not torch.equal(logits_of(model, tokens), bare)
    assert steered.detach() is model
    assert type(model) is LlamaForCausalLM
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits_of(model, tokens), bare)
    cadapter.load(model, adapter)  # and once more


@pytest.mark.parametrize("kind", ["adapter", "additive", "multiplicative"])
def test_a_saved_adapter_is_the_adapter_for_every_command(request, base, tokens, tmp_path, kind) -> None:
    source = request.getfixturevalue(kind)
    model = cadapter.load(base, source, strength=-1)
    expected = logits_of(model, tokens)
    model.save_adapter(tmp_path / "saved")
    again = cadapter.load(base, tmp_path / "saved", strength=-1)
    assert torch.equal(logits_of(again, tokens), expected)
    run_well("merge", base, tmp_path / "saved", tmp_path / "merged", "--inverse")
    assert error(logits_of(plain(tmp_path / "merged"), tokens), expected) < ROUNDING
    before, after = (json.loads((each / "adapter_config.json").read_text()) for each in (source, tmp_path / "saved"))
    assert {key: after[key] for key in before} == before
    with pytest.raises(cadapter.UsageError, match=r"already exists(.|\n)*, or give force=True to replace it"):
        model.save_adapter(tmp_path / "saved")
    model.save_adapter(tmp_path / "saved", force=True)


def test_one_of_several_adapters_is_saved_by_its_name(base, adapter, additive, tmp_path) -> None:
    model = cadapter.load(base, {"style": adapter, "facts": additive})
    with pytest.raises(cadapter.UsageError, match=r"several adapters.\nGive the name of one: style, facts"):
        model.save_adapter(tmp_path / "saved")
    model.save_adapter(tmp_path / "saved", "facts")
    assert PeftModel.from_pretrained(plain(base), tmp_path / "saved")
    with pytest.raises(cadapter.UsageError, match="no adapter named 'facst'"):
        model.save_adapter(tmp_path / "other", "facst")


def test_a_model_with_adapters_is_never_saved_and_the_base_is_after_detaching(base, adapter, tmp_path) -> None:
    model = cadapter.load(base, adapter)
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(cadapter.UsageError, match=r"not saved.*\n.*save_adapter\(DIR\).*cadapter merge"):
            save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    model.detach().save_pretrained(tmp_path / "saved")
    before, after = plain(base).state_dict(), plain(tmp_path / "saved").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_has_a_dial_of_its_own(base, adapter, tokens) -> None:
    model = cadapter.load(base, adapter)
    twin = copy.deepcopy(model)
    twin.set_strength(0)
    assert model.strengths != twin.strengths
    assert torch.equal(logits_of(twin, tokens), logits_of(plain(base), tokens))
    assert not torch.equal(logits_of(model, tokens), logits_of(twin, tokens))


def test_what_cannot_be_is_refused_and_leaves_the_model_alone(base, adapter, additive, tokens, tmp_path) -> None:
    model = plain(base)
    names = [name for name, _ in model.named_modules()]
    narrow = make_adapter(tmp_path / "narrow", hidden=16).path
    cases = [
        ({"a": additive, "b": adapter, "c": narrow}, 1.0, "another hidden size: 16"),
        (adapter, math.nan, "not a finite number"),
        (adapter, "0.5", "not a finite number"),
        (adapter, [], "There is no strength"),
        (adapter, {"style": 1}, "no adapter named 'style'"),
        ({}, 1.0, "There is no adapter"),
        (tmp_path / "nothing", 1.0, "is not a directory"),
        (base, 1.0, "it has no adapter_config.json"),
    ]
    for paths, strength, message in cases:
        with pytest.raises(cadapter.UsageError, match=message):
            cadapter.load(model, paths, strength)
        assert [name for name, _ in model.named_modules()] == names
        assert type(model) is LlamaForCausalLM
    for options in ({"dtype": "int8"}, {"dtype": "no_such"}, {"device": "nowhere"}):
        with pytest.raises(cadapter.UsageError, match=r"^(dtype|device) "):
            cadapter.load(base, adapter, **options)
    with pytest.raises(cadapter.UsageError, match=r"Move yours with model.to"):
        cadapter.load(model, adapter, device="cpu")
    with pytest.raises(cadapter.UsageError, match=r"no blocks at model.model.layers"):
        cadapter.load(torch.nn.Linear(2, 2), adapter)
    steered = cadapter.load(model, adapter)
    with pytest.raises(cadapter.UsageError, match="has adapters attached"):
        cadapter.load(steered, adapter)


@pytest.mark.parametrize("wrong", [None, math.nan, [], [[1.0]], "1", 1j, torch.ones(1, 2), {"second": None}])
def test_what_is_no_strength_changes_none(base, adapter, wrong) -> None:
    model = cadapter.load(base, {"first": adapter, "second": adapter}, 0.5)
    for strength in (wrong, {"first": 1.0, "second": wrong} if not isinstance(wrong, dict) else wrong):
        with pytest.raises(cadapter.UsageError, match=r"finite number|no strength"):
            model.set_strength(strength)
        assert model.strengths == {"first": 0.5, "second": 0.5}


def test_a_tensor_is_a_strength_for_each_row(base, adapter) -> None:
    model = cadapter.load(base, adapter, torch.tensor([1.0, -1.0]))
    assert model.strengths == {"default": [1.0, -1.0]}
    model.set_strength({"default": torch.tensor(0.5)})
    assert model.strengths == {"default": 0.5}


def test_a_strength_that_one_adapter_does_not_have_changes_none(base, adapter, tokens, tmp_path) -> None:
    files = make_adapter(tmp_path / "projection", "writes")
    u = torch.nn.functional.normalize(torch.ones(HIDDEN), dim=0)
    tensors = load_file(files.path / "adapter_model.safetensors")
    for name, each in tensors.items():
        each.zero_()
        if name.endswith("control_A.weight"):
            each[0] = u
        else:
            each[:, 0] = -u / files.scale  # I + W = I − u·uᵀ
    save_file(tensors, files.path / "adapter_model.safetensors")
    model = cadapter.load(base, {"good": adapter, "flat": files.path})
    before = logits_of(model, tokens)
    with pytest.raises(cadapter.UsageError, match="singular"):
        model.set_strength(-1)
    assert model.strengths == {"good": 1.0, "flat": 1.0}
    assert torch.equal(logits_of(model, tokens), before)


def test_a_lora_on_experts_is_refused_with_the_way_out(tmp_path) -> None:
    base = make_model(tmp_path / "mixtral", "mixtral")
    lora = save_lora(base, tmp_path / "lora", target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(cadapter.UsageError, match=r"experts.down_proj.*\n.*cadapter merge"):
        cadapter.load(base, lora)


def test_importing_cadapter_is_light() -> None:
    program = (
        "import sys, cadapter; assert 'load' in dir(cadapter); print('torch' in sys.modules)\n"
        "cadapter.load; print('torch' in sys.modules, 'deepspeed' in sys.modules)\n"
        "try: cadapter.no_such\nexcept AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "True False", "module 'cadapter' has no attribute 'no_such'"]


def test_type_checkers_see_the_interface(tmp_path: Path) -> None:
    assert (Path(cadapter.__file__).parent / "py.typed").is_file()
    good = tmp_path / "good.py"
    good.write_text(
        "import cadapter\n"
        "model: cadapter.SteeredLM = cadapter.load('base', {'style': 'a'}, {'style': [0.5, 1]})\n"
        "model.set_strength({'style': 1})\nwith model.at_strength(0) as same: same.save_adapter('x')\n"
    )
    bad = tmp_path / "bad.py"
    bad.write_text("import cadapter\ncadapter.load('base', 3)\ncadapter.load('base', 'a', strength={'a': 'b'})\n")
    program = [sys.executable, "-m", "mypy", "--config-file", str(Path(__file__).parents[1] / "pyproject.toml")]
    done = subprocess.run([*program, str(good)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*program, str(bad)], capture_output=True, text=True)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if "error" in line and "bad.py" in line] == [
        "2",
        "3",
    ]
