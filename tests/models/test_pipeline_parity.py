"""Real pipelines of 1, 2 and 3 processes against Hugging Face's models and the float64 reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cadapter.adapters.control import SITES, GeneralAdapter
from tests.models.parity_table import ADAPTERS, LOGITS, LOSS, WEIGHTS, ParityTable
from tests.models.parity_worker import (
    MICRO_BATCHES,
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    ROWS,
    TOKENS,
    Case,
    global_batch,
)
from tests.reference import controlled_model
from tests.tiny_models import CONFIGS, HIDDEN, VOCAB, WINDOW, make_model
from tests.tiny_pipeline import hugging_faces, randomise, references

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

BFLOAT16 = [Case(name, dtype="bfloat16") for name in ("llama", "qwen2-tied")]
FAMILIES = [Case(name, site) for name in CONFIGS for site in (*SITES, "full")]
# One stage without adapters first, last, or on both sides.
SOME_LAYERS = [Case("llama", adapted=(2,)), Case("qwen3-tied", adapted=(0,)), Case("mistral", adapted=(1,))]
# Tied weights, experts, scales, caps, masks and rotary embeddings by layer.
THREE_STAGES = [
    Case(name, site)
    for name in ("llama-tied", "qwen2_moe-dense", "cohere2", "gemma2", "gemma3_text", "granite", "smollm3")
    for site in ("block", "full")
]
CASES: dict[int, list[Case]] = {
    1: [*FAMILIES, *BFLOAT16],
    2: [*FAMILIES, *BFLOAT16],
    3: [*THREE_STAGES, *SOME_LAYERS, BFLOAT16[0]],
}
"""By number of stages."""

EXACT = 1e-5
"""Of logits and losses of order 1 in float32."""

GRADIENT = 1e-4
"""Of gradients in float32, relative."""

Seen = dict[str, Tensor]
Results = dict[tuple[int, Case], Seen]


def chosen(keep: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Parametrise a test by ``stages`` and ``case``."""
    pairs = [(stages, case) for stages, cases in CASES.items() for case in cases if keep(case)]
    return pytest.mark.parametrize(("stages", "case"), pairs, ids=[f"{case}-{stages}" for stages, case in pairs])


def is_base(case: Case) -> bool:
    """One case of each model shows what the base gives."""
    return case == Case(case.model)


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What the processes of the pipelines saw: one launch for all cases, since importing takes longer than they do."""
    output = tmp_path_factory.mktemp("parity")

    def fields(case: Case) -> dict[str, object]:
        return {**asdict(case), "directory": str(tiny_model(case.model, DTYPES[case.dtype]))}

    runs = [{"stages": stages, "cases": [fields(case) for case in cases]} for stages, cases in CASES.items()]
    job = output / "job.json"
    job.write_text(json.dumps({"output": str(output), "runs": runs}))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.parity_worker", str(job)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(done.stderr[-2000:], pytrace=False)  # all tests say this: no more of it than needed
    return {
        (stages, case): together(
            [load_file(output / f"{stages}.{number}.{rank}.safetensors") for rank in range(stages)]
        )
        for stages, cases in CASES.items()
        for number, case in enumerate(cases)
    }


def together(parts: list[Seen]) -> Seen:
    """What all processes of a pipeline saw; what two of them have, such as a tied embedding's gradient, is equal."""
    found: Seen = {"bytes_read": torch.stack([part.pop("bytes_read") for part in parts])}
    for stage, part in enumerate(parts):
        for name, tensor in part.items():
            differs = name in found and not torch.equal(tensor, found[name])
            found[f"{name} of stage {stage}" if differs else name] = tensor
    return found


def gradients_of(seen: Seen, variant: str) -> Seen:
    prefix = f"{variant}.gradient."
    return {name.removeprefix(prefix): tensor for name, tensor in seen.items() if name.startswith(prefix)}


def token_weights(labels: Tensor, classes: Tensor) -> Tensor:
    """What each token counts in the loss, [N, T] float64."""
    return torch.where(classes == 1, POSITIVE, NEGATIVE).double() * (labels >= 0)


def mean_loss(logits: Tensor) -> Tensor:
    """The mean over the trained tokens of the step, each with its class's weight."""
    _, labels, classes = global_batch()
    weights = token_weights(labels, classes).to(logits.dtype)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (weights.flatten() * nll).sum() / weights.sum()


@cache
def base(directory: Path, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Hugging Face's logits of the whole step, and the loss that follows from them in float64."""
    with torch.no_grad():
        logits = hugging_faces(directory, dtype)(input_ids=global_batch()[0], use_cache=False).logits
    return logits, mean_loss(logits.double()).item()


@cache
def controlled(case: Case) -> tuple[Tensor, float, Seen]:
    """The reference's logits, loss and gradients with random adapters, in float64."""
    ids, labels, classes = global_batch()
    adapters = [GeneralAdapter(HIDDEN, layer, case.settings, seed=0) for layer in case.adapted]
    randomise(adapters)
    by_layer = references(adapters, classes)
    weights = token_weights(labels, classes)
    model = make_model(case.model).double()
    result = controlled_model.run(model, by_layer, ids, labels, weights)
    neutral = int((classes == 0).sum())
    loss = result.total / weights.sum() + NEUTRAL * result.penalty / (case.applications * neutral)
    factors = {
        f"layers.{layer}.control_{letter}": getattr(each, letter) for layer, each in by_layer.items() for letter in "AB"
    }
    gradients = torch.autograd.grad(loss, list(factors.values()))
    return result.logits.detach(), loss.item(), dict(zip(factors, gradients, strict=True))


@cache
def fine_tuned(directory: Path) -> Seen:
    """The gradients of all of Hugging Face's weights by autograd, in float32; a tied weight is one."""
    model = hugging_faces(directory).requires_grad_(True)
    loss = mean_loss(model(input_ids=global_batch()[0], use_cache=False).logits)
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def gradient_error(found: Seen, expected: Seen) -> float:
    """The largest relative difference among parameters.

    Some gradients are zero by theory and all rounding (that of a bias of keys, where nothing is rotated), so that none
    counts as smaller than a thousandth of all together.
    """
    assert found.keys() == expected.keys()
    smallest = 1e-3 * torch.stack([each.double().norm() for each in expected.values()]).norm().item()
    return max(
        (found[name].double() - each.double()).norm().item() / max(each.norm().item(), smallest)
        for name, each in expected.items()
    )


@chosen(is_base)
def test_logits_and_loss_of_the_base(results, tiny_model, parity_table: ParityTable, stages, case):
    assert TOKENS > 2 * WINDOW
    logits, loss = base(tiny_model(case.model), torch.float32)
    seen = results[stages, case]
    assert seen["base.logits"].shape == logits.shape == (ROWS * MICRO_BATCHES, TOKENS, VOCAB)
    assert parity_table.note(case.model, stages, LOGITS, largest(seen["base.logits"] - logits)) <= EXACT
    assert parity_table.note(case.model, stages, LOSS, abs(seen["base.loss"].item() - loss)) <= EXACT


@chosen(lambda case: case.site in SITES and case.dtype == "float32")
def test_logits_loss_and_gradients_with_adapters(results, parity_table: ParityTable, stages, case):
    logits, loss, gradients = controlled(case)
    seen = results[stages, case]
    error = gradient_error(gradients_of(seen, "kept"), gradients)
    assert parity_table.note(case.model, stages, ADAPTERS, error) <= GRADIENT
    # Three layers of float32, and an inverse, on numbers of order 1.
    torch.testing.assert_close(seen["kept.logits"].double(), logits, rtol=EXACT, atol=2 * EXACT)
    assert abs(seen["kept.loss"].item() - loss) <= EXACT


@chosen(lambda case: case.site == "full")
def test_gradients_of_the_models_own_weights(results, tiny_model, parity_table: ParityTable, stages, case):
    expected = fine_tuned(tiny_model(case.model))
    found = gradients_of(results[stages, case], "kept")
    assert parity_table.note(case.model, stages, WEIGHTS, gradient_error(found, expected)) <= GRADIENT


@chosen(lambda case: case.dtype == "bfloat16")
def test_logits_and_loss_of_the_base_in_bfloat16(results, tiny_model, stages, case):
    logits, loss = base(tiny_model(case.model, torch.bfloat16), torch.bfloat16)
    seen = results[stages, case]
    assert torch.equal(seen["base.logits"], logits.float())  # the same operations in the same order
    assert abs(seen["base.loss"].item() - loss) <= EXACT


@chosen(lambda case: True)
def test_recomputation_gives_the_same_bits(results, stages, case):
    seen = results[stages, case]
    kept = [name for name in seen if name.startswith("kept.")]
    assert len(kept) > (2 if case.site == "full" else 2 * len(case.adapted))
    for name in kept:
        assert torch.equal(seen[name], seen[name.replace("kept", "recomputed", 1)]), name


@chosen(is_base)
def test_every_process_reads_its_own_tensors_only(results, tiny_model, stages, case):
    """Together every tensor once; a tied embedding twice where first and last stage are two processes."""
    read = results[stages, case]["bytes_read"].tolist()
    files = tiny_model(case.model).glob("*.safetensors")
    sizes = {name: tensor.nbytes for path in files for name, tensor in load_file(path).items()}
    tied_apart = CONFIGS[case.model].tie_word_embeddings and stages > 1
    assert sum(read) == sum(sizes.values()) + (sizes["model.embed_tokens.weight"] if tied_apart else 0)
    assert len(read) == stages
    assert min(read) > 0
