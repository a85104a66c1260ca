"""A model with an adapter attached, against the plain reference: hooks with full matrices, all of it in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cadapter.adapters.control import SITES
from cadapter.adapters.layer_facts import describe_layers
from cadapter.convert.merge import merge_model
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.errors import CadapterError, UsageError
from cadapter.models.attach import SteeredModel, check_fit, load_causal_lm
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from tests.reference import naive
from tests.reference.controlled_model import Controlled, run
from tests.steered_models import TOKENIZED, make_adapter, make_model, rewrite_weights
from tests.tiny_models import CONFIGS, HIDDEN, LAYERS, SHAPE

ADAPTED = (0, 2)
UNLISTED = ("olmo", "olmo3", "glm", "starcoder2", "nemotron")
"""Types in no table of families."""

PLACES = [
    *((name, "block") for name in (*CONFIGS, *UNLISTED)),
    # and with what follows a module in its block: nothing, a norm, a factor, the sum of both
    *((name, site) for name in ("llama-biased", "qwen2_moe-dense", "glm4", "granite", "cohere2") for site in SITES[1:]),
]
GENERATING = ("llama", "qwen2-windows", "olmo2", "mixtral", "cohere2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of models by name, each made when it is asked for."""
    root = tmp_path_factory.mktemp("models")

    class Directories(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            if name in UNLISTED:
                self[name] = make_unlisted(root / name, name)
            else:
                self[name] = make_model(root / name, name)
            return self[name]

    return Directories()


def make_unlisted(directory: Path, kind: str) -> Path:
    assert kind not in FAMILIES
    torch.manual_seed(sum(kind.encode()))
    config = AutoConfig.for_model(kind, **{**SHAPE, **TOKENIZED})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(4, 320, (2, 12), generator=torch.Generator().manual_seed(11))


def load(directory: Path, dtype: torch.dtype | None = None):
    return load_causal_lm(Checkpoint(directory), dtype, "cpu")


def logits_of(model, tokens: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


def power_minus_identity(W: torch.Tensor, t: float) -> torch.Tensor:
    """``(I + W)^t − I`` [H, H] through the eigenvectors of W, which is not defective here."""
    values, vectors = torch.linalg.eig(W)
    power = vectors @ torch.diag((1 + values) ** t) @ torch.linalg.inv(vectors)
    return power.real - naive.identity(W)


def reference_logits(directory: Path, files, t: float, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float64 of Hugging Face's own model with hooks that multiply by full matrices."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    adapters = {}
    for layer, factors in files.layers.items():
        P = power_minus_identity(naive.full_matrix(factors.A, factors.B, files.scale), t)
        adapters[layer] = Controlled(naive.identity(P), P, 1.0, files.site, torch.ones_like(tokens))  # B·A = P
    with torch.no_grad():
        return run(model, adapters, tokens, tokens, torch.zeros(())).logits


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to what float32 keeps after three blocks: 1e-6 of the largest logit is found, 7e-7 of it the base's own."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 5e-6


@pytest.mark.parametrize(("name", "site"), PLACES)
def test_logits_at_every_strength_are_those_of_full_matrices(models, tokens, tmp_path, name, site):
    files = make_adapter(tmp_path / "adapter", site, layers=ADAPTED)
    base = logits_of(load(models[name]), tokens)
    steered = SteeredModel(load(models[name]), files)
    assert list(steered.blocks) == list(ADAPTED)
    for t in (1.0, -1.0, 0.5, 1.0):  # the last as the first: nothing remains of the strengths between
        steered.set_strength(t)
        found = logits_of(steered.model, tokens)
        assert (found - base).abs().max() > 0.1
        assert_close(found, reference_logits(models[name], files, t, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", ["block", "mlp", "writes"])
def test_strength_0_is_the_base_bit_for_bit(models, tokens, tmp_path, site, dtype):
    files = make_adapter(tmp_path / "adapter", site)
    base = logits_of(load(models["llama"], dtype), tokens)
    steered = SteeredModel(load(models["llama"], dtype), files)
    assert not torch.equal(logits_of(steered.model, tokens), base)
    steered.set_strength(0)
    assert torch.equal(logits_of(steered.model, tokens), base)


def test_site_writes_is_the_merged_model(models, tokens, tmp_path):
    base = Checkpoint(models["llama"])
    make_adapter(tmp_path / "adapter", "writes", facts=describe_layers(base, FAMILIES["llama"], range(LAYERS)))
    plan = make_recipe(base, tmp_path / "adapter", Dial(strength=-0.5)).plan
    merge_model(base, plan, tmp_path / "merged", lambda summary: "card\n")
    files = make_adapter(tmp_path / "same", "writes")
    steered = SteeredModel(load(models["llama"]), files, -0.5)
    assert_close(logits_of(steered.model, tokens), logits_of(load(tmp_path / "merged"), tokens).double())


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("site", ["block", "writes"])
def test_generating_with_and_without_the_cache_gives_the_same_tokens(models, tokens, tmp_path, name, site):
    model = SteeredModel(load(models[name]), make_adapter(tmp_path / "adapter", site)).model
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    cached = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    base = load(models[name]).generate(tokens, attention_mask=mask, **options)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 36)
    assert not torch.equal(cached, base)


def test_a_wrapped_block_answers_for_the_block(models, tmp_path):
    model = load(models["qwen3"])
    block = model.model.layers[0]
    block.attention_type = "full_attention"
    SteeredModel(model, make_adapter(tmp_path / "adapter"))
    wrapped = model.model.layers[0]
    assert wrapped is not block
    assert wrapped.attention_type == "full_attention"
    assert wrapped.self_attn.layer_idx == 0
    assert not hasattr(wrapped, "no_such_attribute")


def test_nothing_of_it_trains(models, tmp_path):
    steered = SteeredModel(load(models["llama"]), make_adapter(tmp_path / "adapter"))
    assert not any(
        parameter.requires_grad for block in steered.blocks.values() for parameter in block.adapter.parameters()
    )
    assert not any(module.training for module in steered.model.modules())


def test_a_strength_that_does_not_exist_changes_nothing(models, tokens, tmp_path):
    files = make_adapter(tmp_path / "adapter")
    u = torch.nn.functional.normalize(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)), dim=0)
    last = files.layers[2]
    last.A.zero_()[0], last.B.zero_()[:, 0] = u, -u / files.scale  # I + W = I − u·uᵀ, a projection
    steered = SteeredModel(load(models["llama"]), files, 0.0)
    steered.set_strength(1)
    before = logits_of(steered.model, tokens)
    with pytest.raises(UsageError, match="layer 2: I \\+ W is singular"):
        steered.set_strength(-1)
    assert steered.strength == 1
    assert torch.equal(logits_of(steered.model, tokens), before)


def test_the_model_keeps_its_blocks_when_the_adapter_is_refused(models, tmp_path):
    model = load(models["llama"])
    blocks = list(model.model.layers)
    with pytest.raises(UsageError, match="another hidden size: 16"):
        SteeredModel(model, make_adapter(tmp_path / "narrow", hidden=16))
    with pytest.raises(UsageError, match="factors for layer 3"):
        SteeredModel(model, make_adapter(tmp_path / "deep", layers=(1, 3)))
    with pytest.raises(UsageError, match="not a finite number"):
        SteeredModel(model, make_adapter(tmp_path / "fits"), float("nan"))
    assert all(now is then for now, then in zip(model.model.layers, blocks, strict=True))


def test_fit_is_checked_without_weights(models, tmp_path):
    checkpoint = Checkpoint(models["llama"])
    check_fit(make_adapter(tmp_path / "fits"), checkpoint)
    with pytest.raises(UsageError, match="another hidden size: 16"):
        check_fit(make_adapter(tmp_path / "narrow", hidden=16), checkpoint)
    checkpoint.config = AutoConfig.for_model("gpt2", n_embd=HIDDEN, n_layer=LAYERS, n_head=4)
    with pytest.raises(UsageError, match="'gpt2' cannot be cut into pipeline layers"):
        check_fit(make_adapter(tmp_path / "other"), checkpoint)
    assert checkpoint.bytes_read == 0


def test_loading_follows_the_dtype_asked_for(tmp_path):
    directory = make_model(tmp_path / "model", dtype=torch.bfloat16)
    assert load(directory).dtype == torch.bfloat16
    assert load(directory, torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"),
            r"lacks tensors of its llama model \(1, such as model.layers.1.mlp",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(5)}), "cannot load this model"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, change, message):
    directory = make_model(tmp_path / "model")
    rewrite_weights(directory, change)
    with pytest.raises(UsageError, match=message):
        load(directory)


def test_a_block_whose_strength_was_never_set_says_so(models, tokens, tmp_path):
    steered = SteeredModel(load(models["llama"]), make_adapter(tmp_path / "adapter"))
    steered.blocks[1].fixed = None
    with pytest.raises(CadapterError, match="layer 1 was called before its strength was set"):
        logits_of(steered.model, tokens)
