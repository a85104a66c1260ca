"""Real pipelines of 1, 2 and 3 processes against Hugging Face's models and the float64 reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cadapter.adapters.control import ControlAdapter
from tests.models.parity_worker import MICRO_BATCHES, ROWS, WEIGHTS, global_batch
from tests.reference import controlled_model
from tests.tiny_models import CONFIGS, HIDDEN, LAYERS
from tests.tiny_pipeline import SETTINGS, randomise, references

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent.parent
ALL = list(range(LAYERS))
CASES: dict[str, tuple[str, list[int], str]] = {
    **{name: (name, ALL, "float32") for name in CONFIGS},
    # With 3 stages: one without adapters first, last, or on both sides.
    "llama, last layer only": ("llama", [LAYERS - 1], "float32"),
    "qwen3-tied, first layer only": ("qwen3-tied", [0], "float32"),
    "mistral, middle layer only": ("mistral", [1], "float32"),
    "llama in bfloat16": ("llama", ALL, "bfloat16"),
    "qwen2-tied in bfloat16": ("qwen2-tied", ALL, "bfloat16"),
}

Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda stages: f"{stages} stages")
def pipeline(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """What the processes of a pipeline of so many stages saw, by case: one launch for all cases."""
    stages, output = request.param, tmp_path_factory.mktemp("parity")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    cases = [
        {"model": str(tiny_model(name, dtypes[dtype])), "adapted": adapted, "dtype": dtype}
        for name, adapted, dtype in CASES.values()
    ]
    job = output / "job.json"
    job.write_text(json.dumps({"output": str(output), "cases": cases}))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stages}"]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*launch, "-m", "tests.models.parity_worker", str(job)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results: Results = {}
    for number, case in enumerate(CASES):
        results[case] = {}
        for rank in range(stages):
            found = load_file(output / f"{number}.{rank}.safetensors")
            results[case][f"bytes_read.{rank}"] = found.pop("bytes_read")
            assert not found.keys() & results[case].keys()
            results[case] |= found
    return results


def expected_base(name: str, tiny_model: Callable[..., Path], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hugging Face's logits in ``dtype``, and the weighted mean loss from them in float64."""
    ids, labels, classes = global_batch()
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name, dtype), dtype=dtype)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    weights = torch.where(classes == 1, WEIGHTS["positive"], WEIGHTS["negative"]).flatten() * (labels.flatten() >= 0)
    return logits, (weights * nll).sum() / weights.sum()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_loss_of_the_base(pipeline, tiny_model, name):
    logits, loss = expected_base(name, tiny_model, torch.float32)
    assert pipeline[name]["base.logits"].shape == (ROWS * MICRO_BATCHES, *logits.shape[1:])
    torch.testing.assert_close(pipeline[name]["base.logits"], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipeline[name]["base.loss"].double(), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_logits_and_loss_of_the_base_in_bfloat16(pipeline, tiny_model, name):
    found = pipeline[f"{name} in bfloat16"]
    logits, loss = expected_base(name, tiny_model, torch.bfloat16)
    assert torch.equal(found["base.logits"], logits.float())  # the same operations in the same order
    torch.testing.assert_close(found["base.loss"].double(), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2] == "float32"])
def test_loss_logits_and_gradients_with_adapters(pipeline, tiny_model, case):
    name, adapted, _ = CASES[case]
    ids, labels, classes = global_batch()
    adapters = [ControlAdapter(HIDDEN, layer, SETTINGS, seed=0) for layer in adapted]
    randomise(adapters)
    controlled = references(adapters, classes)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name)).double().requires_grad_(False)
    weights = torch.where(classes == 1, WEIGHTS["positive"], WEIGHTS["negative"]).double() * (labels >= 0)
    result = controlled_model.run(model, controlled, ids, labels, weights)
    neutral = int((classes == 0).sum())
    loss = result.total / weights.sum() + WEIGHTS["neutral"] * result.penalty / (len(adapted) * neutral)
    found = pipeline[case]
    for variant in ("kept", "recomputed"):
        # Three layers of float32 on numbers of order 1.
        torch.testing.assert_close(found[f"{variant}.logits"].double(), result.logits, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found[f"{variant}.loss"].double(), loss.detach(), rtol=1e-5, atol=0)
        for layer, each in controlled.items():
            gradients = torch.autograd.grad(loss, [each.A, each.B], retain_graph=True)
            for letter, gradient in zip("AB", gradients, strict=True):
                assert relative(found[f"{variant}.{layer}.{letter}"], gradient) < 2e-5
    assert {key.split(".")[1] for key in found if key.endswith(".A")} == {str(layer) for layer in adapted}


@pytest.mark.parametrize("case", CASES)
def test_recomputation_gives_the_same_bits(pipeline, case):
    found = pipeline[case]
    kept = [key for key in found if key.startswith("kept.")]
    assert len(kept) == 2 + 2 * len(CASES[case][1])
    for key in kept:
        assert torch.equal(found[key], found[key.replace("kept", "recomputed")]), key


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_every_process_reads_its_own_tensors_only(pipeline, tiny_model, name):
    """Together every tensor once; a tied embedding twice where first and last stage are two processes."""
    read = [int(value) for key, value in pipeline[name].items() if key.startswith("bytes_read")]
    tensors = {key: t for path in tiny_model(name).glob("*.safetensors") for key, t in load_file(path).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    again = tensors["model.embed_tokens.weight"].nbytes if name == "llama-tied" and len(read) > 1 else 0
    assert sum(read) == total + again
    assert min(read) > 0
    assert len(read) == 1 or max(read) < total
