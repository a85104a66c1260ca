"""LoRA and Control Adapters on a base in 4 bits train as on transformers' own nf4 model, in every layout."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from cadapter.adapters.directory import read_control_adapter
from cadapter.data import prepare_data
from cadapter.errors import UsageError
from cadapter.models.layers import CarrierFormat
from cadapter.models.loading import CausalLM
from cadapter.models.loss import logits_of
from cadapter.training.modes import mode_of
from cadapter.training.recompute import Recompute
from cadapter.training.stages import StageBuilder
from tests.forked_commands import Call, call, run_all_well
from tests.reference.plain_fine_tuning import PlainFineTuning, Settings, mean_loss, steps_of, with_lora
from tests.steered_models import TOKENIZED
from tests.tiny_models import save_model
from tests.tiny_pipeline import run_layers
from tests.tiny_project import HIDDEN, LAYERS, Project, make_project, metrics
from tests.tiny_tokenizer import make_tokenizer

pytestmark = pytest.mark.processes

STEPS, RANK, PER_STEP, LR, DECAY = 12, 4, 4, 3e-2, 10.0
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOSS, LOGITS = 1e-5, 1e-5
"""Everything is computed in float32, with the same rounded weights."""
FACTORS = 1e-4
"""Relative, per tensor: Adam divides by √v, which turns rounding of tiny gradients into rounding of whole steps."""

COMMON: dict[str, Any] = {
    "kinds": ("positive",), "use_control_adapters": False, "load_in_4bit": True, "lora_rank": RANK,
    "lora_weight_decay": DECAY, "lr": LR, "gradient_accumulation_steps": PER_STEP, "max_steps": STEPS,
    "eval_fraction": 0.1, "evals_per_run": 2, "checkpoint_interval_steps": 6,
}  # fmt: skip
CONTROL: dict[str, Any] = {"use_control_adapters": True, "max_steps": 6}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("four-bit"), documents=130)
    # Rows of a length that bitsandbytes reads rightly on the CPU.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    save_model("mixtral", project.root / "mixtral", **TOKENIZED, **sizes)
    make_tokenizer(project.root / "mixtral")
    return project


def train(project: Project, name: str, *options: str, processes: int = 1, **keys: Any) -> Call:
    return call("train", project.write_config(name, **{**COMMON, **keys}), *options, processes=processes)


@pytest.fixture(scope="module")
def printed(project: Project) -> dict[str, str]:
    """All runs of this module, each in the directory of its name; what each printed."""
    two = {"processes": 2, "pipeline_stages": 2}
    experts = {"model_dir": str(project.root / "mixtral")}
    calls = {
        "lora": train(project, "lora"),
        "lora-2": train(project, "lora-2", **two),
        "half": train(project, "half", max_steps=6),
        "resumed": train(project, "resumed", "--resume-from-checkpoint", output_dir=str(project.root / "half")),
        "bfloat16": train(project, "bfloat16", dtype="bfloat16"),
        "control": train(project, "control", **CONTROL),
        "control-2": train(project, "control-2", **CONTROL, **two),
        "experts": train(project, "experts", **experts),
        "experts-control": train(project, "experts-control", **{**experts, **CONTROL}),
    }
    scores = project.root / "scores.json"
    calls["eval"] = call("eval", project.root / "lora.toml", "--json", scores)
    return dict(zip(calls, run_all_well(*calls.values()), strict=True))


def losses(project: Project, name: str, kind: str = "train") -> list[float]:
    return [line[f"{kind}/loss"] for line in metrics(project.root / name, kind)]


def final(project: Project, name: str) -> dict[str, torch.Tensor]:
    return load_file(project.root / name / "final" / "adapter_model.safetensors")


def transformers_own(project: Project, dtype: torch.dtype = torch.float32) -> Any:
    """The model as ``from_pretrained`` holds it in 4 bits with our settings, with the arithmetic of training.

    On CPUs with AVX512-BF16 bitsandbytes would otherwise repack weights for inference and compute something else.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        project.root / "model", dtype=dtype, quantization_config=settings, device_map="cpu"
    )
    count = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            count += 1
    assert count == LAYERS * len(MODULES)
    return model


def round_to_4_bits(model: Any, pattern: str) -> int:
    """Replace the weights whose names match by what they stand for in 4 bits; how many there are."""
    weights = [weight for name, weight in model.named_parameters() if re.search(pattern, name)]
    for weight in weights:
        packed = bitsandbytes.functional.quantize_4bit(weight.data, compress_statistics=True, quant_type="nf4")
        weight.data = bitsandbytes.functional.dequantize_4bit(*packed)
    return len(weights)


def rounded_experts(project: Project) -> Any:
    """The Mixtral in float32 with, for each weight in 4 bits, what it stands for."""
    model = AutoModelForCausalLM.from_pretrained(project.root / "mixtral", dtype=torch.float32)
    count = round_to_4_bits(model, r"[qkvo]_proj\.weight$|experts\.(gate_up|down)_proj$")
    assert count == 6 * model.config.num_hidden_layers
    return model


def held_out(project: Project, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    packed = prepare_data(project.load(project.root / f"{name}.toml")).evaluation
    assert packed is not None
    ids, _, trained = (torch.from_numpy(each) for each in packed.rows(range(len(packed))))
    return ids.long(), trained


def steered(model: Any, adapter: Path) -> Any:
    """Hugging Face's model with W·Δh added after each block, as for class +1."""
    files = read_control_adapter(adapter)
    for layer, factors in files.layers.items():
        W = files.scale * factors.B @ factors.A

        def change(_module: Any, inputs: Any, output: torch.Tensor, W: torch.Tensor = W) -> torch.Tensor:
            return output + (output - inputs[0]) @ W.T

        model.model.layers[layer].register_forward_hook(change)
    return model


# ---- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lora", "control"])
def test_the_base_gives_the_logits_of_transformers(project: Project, mode: str) -> None:
    """Before the first step adapters change nothing."""
    config = project.load(project.write_config("base", **{**COMMON, "use_control_adapters": mode == "control"}))
    model = CausalLM(project.root / "model", torch.float32, four_bit=True)
    stages = StageBuilder(model, mode_of(config, model), CarrierFormat(), Recompute(0))
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = run_layers([build() for build in stages.builders()], ids, torch.ones_like(ids, dtype=torch.int8))
        found = logits_of(head.hidden, head.weights[0], head.logits)
        expected = transformers_own(project)(input_ids=ids, use_cache=False).logits
        exact = AutoModelForCausalLM.from_pretrained(project.root / "model")(input_ids=ids, use_cache=False).logits
    assert (found - expected).abs().max() <= LOGITS
    assert (found - exact).abs().max() > 1e4 * LOGITS, "4 bits have to show"


def test_in_bfloat16_the_base_computes_as_that_of_transformers(project: Project, printed: dict[str, str]) -> None:
    """That is the default."""
    expected = mean_loss(transformers_own(project, torch.bfloat16), *held_out(project, "bfloat16"))
    found = losses(project, "bfloat16", "eval")
    assert found[0] == pytest.approx(expected, abs=LOSS)
    assert found[0] - found[-1] > 1e3 * LOSS


@pytest.mark.parametrize("run", ["lora", "lora-2", "control", "control-2"])
def test_the_bytes_of_all_stages_are_printed_by_dtype(project: Project, printed: dict[str, str], run: str) -> None:
    numbers = LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * HIDDEN // 2 + 3 * 2 * HIDDEN**2)
    assert f"Decoder blocks in memory: 4-bit {numbers // 2:,} bytes (" in printed[run]
    norms = 4 * LAYERS * 2 * HIDDEN
    assert f"float32 {norms:,} bytes" in printed[run]


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_plain_loop_with_peft_over_transformers_model_gives_the_same_curve(
    project: Project, printed: dict[str, str]
) -> None:
    config = project.load(project.root / "lora.toml")
    model, pairs = with_lora(transformers_own(project), RANK, config.seed, MODULES)
    settings = Settings(lr=LR, clipping=config.gradient_clipping, decay=DECAY, scale=RANK**-0.5)
    plain = PlainFineTuning(model, [factor for pair in pairs.values() for factor in pair], settings, pairs)
    found = metrics(project.root / "lora")
    for line, step in zip(found, steps_of(config, STEPS, PER_STEP), strict=True):
        for name, value in plain.step(*step).items():
            assert line[f"train/{name}"] == pytest.approx(value, rel=LOSS), (line["step"], name)
    assert found[0]["train/loss"] - found[-1]["train/loss"] > 1e4 * LOSS


def test_peft_loads_the_result_on_transformers_model(project: Project, printed: dict[str, str]) -> None:
    """The evaluation after the last step was the trained pipeline's; PEFT's model has to give its loss."""
    model = PeftModel.from_pretrained(transformers_own(project), project.root / "lora" / "final")
    evaluations = losses(project, "lora", "eval")
    assert mean_loss(model, *held_out(project, "lora")) == pytest.approx(evaluations[-1], abs=LOSS)
    assert evaluations[0] - evaluations[-1] > 1e3 * LOSS


def test_an_evaluation_compares_with_the_base_in_4_bits(project: Project, printed: dict[str, str]) -> None:
    model = PeftModel.from_pretrained(transformers_own(project), project.root / "lora" / "final")
    documents = prepare_data(project.load(project.root / "lora.toml")).documents
    base, adapted = [], []
    for document in documents:
        ids, trained = torch.from_numpy(document.ids.astype("int64")), torch.from_numpy(document.trained.copy())
        adapted.append(mean_loss(model, ids[None], trained[None]))
        with model.disable_adapter():
            base.append(mean_loss(model, ids[None], trained[None]))
    found = [score["loss"] for score in json.loads((project.root / "scores.json").read_text())]
    assert found == pytest.approx([statistics.mean(base), statistics.mean(adapted)], abs=LOSS)


def test_control_adapters_steer_transformers_model_alike(project: Project, printed: dict[str, str]) -> None:
    model = steered(transformers_own(project), project.root / "control" / "final")
    evaluations = losses(project, "control", "eval")
    assert mean_loss(model, *held_out(project, "control")) == pytest.approx(evaluations[-1], abs=LOSS)
    assert evaluations[0] - evaluations[-1] > 1e3 * LOSS


@pytest.mark.parametrize(("one", "other"), [("lora", "lora-2"), ("control", "control-2")])
def test_two_stages_train_the_same(project: Project, printed: dict[str, str], one: str, other: str) -> None:
    for kind in ("train", "eval"):
        assert losses(project, other, kind) == pytest.approx(losses(project, one, kind), abs=LOSS)
    first, second = final(project, one), final(project, other)
    assert first.keys() == second.keys()
    assert all((tensor - second[name]).norm() <= FACTORS * tensor.norm() for name, tensor in first.items())


def test_a_resumed_run_is_the_one_that_was_not_stopped_bit_for_bit(project: Project, printed: dict[str, str]) -> None:
    assert losses(project, "lora") == losses(project, "half")
    first, second = final(project, "lora"), final(project, "half")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["experts", "experts-control"])
def test_a_mixture_whose_experts_are_in_4_bits_trains(project: Project, printed: dict[str, str], run: str) -> None:
    share = re.search(r"Decoder blocks in memory: 4-bit [\d,]+ bytes \(([\d.]+)%\)", printed[run])
    assert share is not None
    assert float(share[1]) > 80
    model, adapter = rounded_experts(project), project.root / run / "final"
    before = mean_loss(model, *held_out(project, run))
    model = steered(model, adapter) if run == "experts-control" else PeftModel.from_pretrained(model, adapter)
    after = mean_loss(model, *held_out(project, run))
    assert losses(project, run, "eval") == pytest.approx([before, after], abs=LOSS)
    assert before - after > 1e3 * LOSS, "it learns"


def test_lora_on_experts_in_4_bits_is_refused_before_weights_are_read(project: Project) -> None:
    keys = {"model_dir": str(project.root / "mixtral"), "target_modules": ["q_proj", "mlp.experts.down_proj"]}
    config = project.load(project.write_config("refused", **{**COMMON, **keys}))
    model = CausalLM(project.root / "mixtral", torch.float32, four_bit=True)
    with pytest.raises(UsageError, match="load_in_4bit") as raised:
        mode_of(config, model)
    assert "mlp.experts.down_proj" in str(raised.value)
    assert model.checkpoint.bytes_read == 0
