"""Full fine-tuning trains as a plain loop over Hugging Face's model does, and saves what ``transformers`` loads."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cadapter.data import prepare_data
from cadapter.errors import UsageError
from cadapter.models.layers import CarrierFormat
from cadapter.models.loading import CausalLM
from cadapter.models.loss import logits_of
from cadapter.models.saving import ModelWriter
from cadapter.training.modes import full
from cadapter.training.modes.full import FullMode
from cadapter.training.recompute import Recompute
from cadapter.training.stages import StageBuilder
from tests.forked_commands import Call, call, run_all_well
from tests.reference.plain_fine_tuning import PlainFineTuning, Settings, mean_loss, steps_of
from tests.steered_models import make_model as make_family
from tests.tiny_pipeline import run_layers
from tests.tiny_project import Project, make_model, make_project, metrics

pytestmark = pytest.mark.processes

STEPS, PER_STEP, LR, CLIPPING = 20, 4, 3e-3, 1.0
LOSS = 1e-5
"""Losses are means of float32 terms around 5; measured are differences of 1e-6 in 20 steps."""
WEIGHTS = 1e-4
"""Relative, per tensor: Adam divides by √v, which turns rounding of tiny gradients into rounding of whole steps."""
LOGITS = 1e-5

COMMON: dict[str, Any] = {
    "kinds": ("positive",), "use_control_adapters": False, "full_fine_tune": True, "lora_weight_decay": 0, "lr": LR,
    "gradient_accumulation_steps": PER_STEP, "max_steps": STEPS, "eval_fraction": 0.1, "evals_per_run": 2,
    "checkpoint_interval_steps": 10, "gradient_clipping": CLIPPING,
}  # fmt: skip
SHORT: dict[str, Any] = {"max_steps": 3, "checkpoint_interval_steps": None}
SMALL_LR = 1e-4
BFLOAT16: dict[str, Any] = {"lr": SMALL_LR, "lr_schedule": "constant", "checkpoint_interval_steps": None}
HALVES: dict[str, Any] = {"dtype": "bfloat16", "max_steps": 6, "checkpoint_interval_steps": 3}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(tmp_path_factory.mktemp("full"), documents=130)
    make_model(project.root / "tied", tied=True)
    make_model(project.root / "scratch", tied=True, width=0.02)
    make_family(project.root / "mixtral", "mixtral")
    return project


def train(project: Project, name: str, *options: str, model: str = "model", processes: int = 1, **keys: Any) -> Call:
    settings = {**COMMON, "model_dir": str(project.root / model), **keys}
    return call("train", project.write_config(name, **settings), *options, processes=processes)


@pytest.fixture(scope="module")
def printed(project: Project) -> dict[str, str]:
    """All runs of this module, each in the directory of its name; what each printed."""

    def resume(name: str, of: str, **keys: Any) -> Call:
        return train(project, name, "--resume-from-checkpoint", output_dir=str(project.root / of), **keys)

    tied = partial(train, project, model="tied")
    two = {"processes": 2, "pipeline_stages": 2}
    calls = {
        "untied": train(project, "untied"),
        "untied-2": train(project, "untied-2", **two),
        "half": train(project, "half", max_steps=10),
        "resumed": resume("resumed", "half"),
        "tied": tied("tied-1"),
        "tied-2": tied("tied-2", **two),
        "tied-3": tied("tied-3", processes=3, pipeline_stages=3),
        "tied-2x2": tied("tied-2x2", processes=4, pipeline_stages=2, gradient_accumulation_steps=PER_STEP // 2),
        "half-2": tied("half-2", max_steps=10, **two),
        "resumed-2": resume("resumed-2", "half-2", model="tied", **two),
        "tied-bfloat16": tied("tied-bfloat16", **HALVES, **two),
        "half-bfloat16": tied("half-bfloat16", **{**HALVES, "max_steps": 3}, **two),
        "resumed-bfloat16": resume("resumed-bfloat16", "half-bfloat16", model="tied", **HALVES, **two),
        "crossed": tied("crossed", max_steps=10, **two),
        "resumed-crossed": resume("resumed-crossed", "crossed", model="tied"),
        "float32": train(project, "float32", **BFLOAT16),
        "bfloat16": train(project, "bfloat16", **BFLOAT16, dtype="bfloat16"),
        "bfloat16-gradients": train(
            project, "bfloat16-gradients", **BFLOAT16, dtype="bfloat16", gradient_dtype="bfloat16"
        ),
        "layers": train(project, "layers", **SHORT, layers_to_transform="0,2:3"),
        "modules": train(project, "modules", **SHORT, target_modules=["o_proj", "mlp", "norm"]),
        "both": train(project, "both", **SHORT, layers_to_transform="1:1", target_modules=["self_attn.q_proj"]),
        "embedding": tied("embedding", **SHORT, **two, target_modules=["embed_tokens"]),
        "tied-layer": tied("tied-layer", **SHORT, **two, layers_to_transform="1:1"),
        "head": train(project, "head", **SHORT, **two, target_modules=["lm_head"]),
        "mixtral": train(project, "mixtral-run", model="mixtral", max_steps=6),
        "mixtral-2": train(project, "mixtral-2", model="mixtral", max_steps=6, **two),
        "scratch": train(project, "scratch-run", model="scratch"),
    }
    return dict(zip(calls, run_all_well(*calls.values()), strict=True))


def losses(project: Project, name: str, kind: str = "train") -> list[float]:
    return [line[f"{kind}/loss"] for line in metrics(project.root / name, kind)]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Hugging Face's model, of whose tensors none may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def assert_same_run(project: Project, one: str, other: str) -> None:
    """Same losses of every step and of the last evaluation, same weights."""
    assert losses(project, other) == pytest.approx(losses(project, one), abs=LOSS)
    assert losses(project, other, "eval")[-1] == pytest.approx(losses(project, one, "eval")[-1], abs=LOSS)
    first, second = (weights(project.root / name / "final") for name in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= WEIGHTS * tensor.norm(), name


def assert_equal_runs(project: Project, one: str, other: str) -> None:
    """Bit by bit; the run that was stopped was evaluated once more."""
    assert losses(project, one) == losses(project, other)
    assert [losses(project, one, "eval")[k] for k in (0, -1)] == [losses(project, other, "eval")[k] for k in (0, -1)]
    checkpoint = max((project.root / one / "checkpoints").iterdir()).name
    for part, pattern in (("final", "model*"), (f"checkpoints/{checkpoint}", "optimizer-*")):
        files = sorted(path.name for path in (project.root / one / part).glob(f"{pattern}.safetensors"))
        assert files
        for file in files:
            first, second = (load_file(project.root / run / part / file) for run in (one, other))
            assert first.keys() == second.keys()
            assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- the curve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "model", "count"), [("untied", "model", STEPS), ("tied-1", "tied", STEPS), ("mixtral-run", "mixtral", 6)]
)
def test_a_plain_loop_gives_the_same_curve(
    project: Project, printed: dict[str, str], run: str, model: str, count: int
) -> None:
    plain_model = loaded(project.root / model, torch.float64)
    plain_model.set_experts_implementation("eager")  # the grouped product of the default has no float64
    plain = PlainFineTuning(plain_model, list(plain_model.parameters()), Settings(lr=LR, clipping=CLIPPING))
    found = metrics(project.root / run)
    clipped = 0
    config = project.load(project.root / f"{run}.toml")
    for line, step in zip(found, steps_of(config, count, PER_STEP), strict=True):
        expected = plain.step(*step)
        clipped += expected["grad_norm"] > CLIPPING
        for name, value in expected.items():
            assert line[f"train/{name}"] == pytest.approx(value, rel=LOSS), (line["step"], name)
    assert clipped, "no step tests the clipping"
    assert found[0]["train/loss"] - found[-1]["train/loss"] > 1e4 * LOSS
    trained = loaded(project.root / run / "final").state_dict()
    for name, tensor in plain_model.state_dict().items():
        assert (trained[name] - tensor).norm() <= WEIGHTS * tensor.norm(), name


def test_a_random_model_learns_from_nothing(project: Project, printed: dict[str, str]) -> None:
    curve = losses(project, "scratch-run")
    assert curve[0] == pytest.approx(torch.log(torch.tensor(320.0)).item(), abs=0.1), "nothing is known: ln V"
    assert curve[-1] < curve[0] - 1
    assert "188,992 of 188,992" in printed["untied"]
    assert f"{188_992 - 320 * 64:,} of {188_992 - 320 * 64:,}" in printed["scratch"], "a tied head is no second one"


# ---- layouts, going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("untied", "untied-2"),
        ("tied-1", "tied-2"),
        ("tied-1", "tied-3"),
        ("tied-1", "tied-2x2"),
        ("tied-1", "crossed"),
        ("mixtral-run", "mixtral-2"),
    ],
)
def test_every_layout_trains_the_same(project: Project, printed: dict[str, str], one: str, other: str) -> None:
    """``crossed`` began on two stages and went on on one."""
    assert_same_run(project, one, other)


@pytest.mark.parametrize(
    ("one", "other"), [("untied", "half"), ("tied-2", "half-2"), ("tied-bfloat16", "half-bfloat16")]
)
def test_a_resumed_run_is_the_one_that_was_not_stopped_bit_for_bit(
    project: Project, printed: dict[str, str], one: str, other: str
) -> None:
    """On two stages the resumed run has both copies of the tied embedding from one tensor; the other never made them
    equal, so that they were equal all the time."""
    assert_equal_runs(project, one, other)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["bfloat16", "bfloat16-gradients"])
def test_steps_below_the_spacing_of_bfloat16_add_up(project: Project, printed: dict[str, str], run: str) -> None:
    """A weight of 1/8 or more would round each of these steps away."""
    before = {name: tensor.bfloat16() for name, tensor in weights(project.root / "model").items()}
    after, exact = (weights(project.root / name / "final") for name in (run, "float32"))
    assert after.keys() == before.keys()
    large = torch.cat([tensor.abs().flatten() >= 1 / 8 for tensor in before.values()])
    start, end, target = (
        torch.cat([each[name].double().flatten() for name in before])[large] for each in (before, after, exact)
    )
    assert ((start.bfloat16() + SMALL_LR).bfloat16() == start.bfloat16()).all()
    moved = target - start  # by float32 arithmetic; what is below half a spacing is rounded away at the end only
    far = moved.abs() >= 2**-10
    assert far.sum() > 1000
    assert (end != start)[far].double().mean() > 0.95
    assert torch.corrcoef(torch.stack([moved[far], (end - start)[far]]))[0, 1] > 0.9
    curve, reference = losses(project, run), losses(project, "float32")
    assert curve[0] - curve[-1] > 0.3
    assert curve == pytest.approx(reference, rel=1e-2)  # rounding of activations to 8 bits
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert json.loads((project.root / run / "final" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_dtype_in_which_gradients_add_up_matters(project: Project, printed: dict[str, str]) -> None:
    one, other = (weights(project.root / run / "final") for run in ("bfloat16", "bfloat16-gradients"))
    assert not all(torch.equal(one[name], other[name]) for name in one)


# ---- filters --------------------------------------------------------------------------------------------------------


def changed(project: Project, run: str, model: str = "model") -> set[str]:
    """Names of the tensors that differ from the base's in any bit."""
    before, after = weights(project.root / model), weights(project.root / run / "final")
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]


@pytest.mark.parametrize(
    ("run", "layers", "parts", "others"),
    [
        ("layers", (0, 2, 3), [*ATTENTION, *MLP, *NORMS], []),
        ("modules", (0, 1, 2, 3), ["self_attn.o_proj.weight", *MLP], ["model.norm.weight"]),
        ("both", (1,), ["self_attn.q_proj.weight"], []),
        ("head", (), [], [HEAD]),
    ],
)
def test_exactly_what_is_named_is_trained(
    project: Project, printed: dict[str, str], run: str, layers: tuple[int, ...], parts: list[str], others: list[str]
) -> None:
    assert changed(project, run) == {f"model.layers.{layer}.{part}" for layer in layers for part in parts} | {*others}
    numbers = sum(weights(project.root / "model")[name].numel() for name in changed(project, run))
    assert f"Full fine-tuning: {numbers:,} of 188,992 parameters" in printed[run]


def test_a_tied_embedding_can_be_left_alone(project: Project, printed: dict[str, str]) -> None:
    """On two stages, one of which trains nothing."""
    expected = {f"model.layers.1.{part}" for part in [*ATTENTION, *MLP, *NORMS]}
    assert changed(project, "tied-layer", "tied") == expected


def test_a_tied_embedding_can_be_trained_alone(project: Project, printed: dict[str, str]) -> None:
    """On two stages, each of which holds it and nothing else that is trained."""
    assert changed(project, "embedding", "tied") == {EMBEDDING}
    model = loaded(project.root / "tied", torch.float64)
    plain = PlainFineTuning(model, [model.model.embed_tokens.weight], Settings(lr=LR, clipping=CLIPPING))
    config = project.load(project.root / "embedding.toml")
    expected = [plain.step(*step)["loss"] for step in steps_of(config, 3, PER_STEP)]
    assert losses(project, "embedding") == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize(
    ("model", "targets", "layers", "message"),
    [
        ("model", ["q_proj", "query"], None, r"\['q_proj', 'query'\].*called query.*\n.*q_proj"),
        ("model", ["embed_tokens"], [1], "embed_tokens"),
        ("mixtral", ["w2"], None, r"called w2.*\n.*mlp.experts.down_proj"),
    ],
)
def test_a_filter_that_names_nothing_is_repeated(
    project: Project, model: str, targets: list[str], layers: list[int] | None, message: str
) -> None:
    base = CausalLM(project.root / model, torch.float32)
    with pytest.raises(UsageError, match=message):
        FullMode(base, layers, targets, project.root / model, "float32")
    assert base.checkpoint.bytes_read == 0


@pytest.mark.parametrize("target", ["mlp.experts.down_proj", "down_proj", "experts"])
def test_tensors_of_experts_can_be_named_as_for_lora(project: Project, target: str) -> None:
    base = CausalLM(project.root / "mixtral", torch.float32)
    mode = FullMode(base, [1], [target], project.root / "mixtral", "float32")
    block = base.skeleton_block(1).mlp.experts
    expected = block.down_proj.numel() + (block.gate_up_proj.numel() if target == "experts" else 0)
    assert mode.trainable() == [0, 0, expected, 0, 0]


# ---- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "dtype"),
    [("untied", torch.float32), ("tied-2", torch.float32), ("mixtral-run", torch.float32), ("head", torch.float32)],
)
def test_transformers_loads_the_model_that_was_trained(
    project: Project, printed: dict[str, str], run: str, dtype: torch.dtype
) -> None:
    """The evaluation after the last step was the trained pipeline's: the loaded model has to give its loss."""
    final = project.root / run / "final"
    model = loaded(final, dtype)
    packed = prepare_data(project.load(project.root / f"{run}.toml")).evaluation
    assert packed is not None
    ids, _, trained = (torch.from_numpy(each) for each in packed.rows(range(len(packed))))
    evaluations = losses(project, run, "eval")
    assert mean_loss(model, ids.long(), trained) == pytest.approx(evaluations[-1], abs=LOSS)
    assert evaluations[0] - evaluations[-1] > 100 * LOSS
    with torch.no_grad():
        expected = model(input_ids=ids[:2].long(), use_cache=False).logits
        layers = pipeline_layers(FullMode(CausalLM(final, dtype), None, None, final, "float32"))
        head = run_layers(layers, ids[:2].long(), torch.zeros_like(ids[:2], dtype=torch.int8))
        assert (logits_of(head.hidden, head.weights[0], head.logits) - expected).abs().max() <= LOGITS


def pipeline_layers(mode: FullMode) -> list[Any]:
    return [build() for build in StageBuilder(mode.model, mode, CarrierFormat(), Recompute(0)).builders()]


@pytest.mark.parametrize("part", ["final", "checkpoints/step-000010", "checkpoints/step-000020"])
def test_every_directory_is_a_complete_model(project: Project, printed: dict[str, str], part: str) -> None:
    base, directory = project.root / "tied", project.root / "tied-2" / part
    model = loaded(directory)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (
        AutoTokenizer.from_pretrained(directory)("It was")["input_ids"]
        == (AutoTokenizer.from_pretrained(base)("It was")["input_ids"])
    )
    assert GenerationConfig.from_pretrained(directory) == GenerationConfig.from_pretrained(base)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert HEAD not in file.keys()  # noqa: SIM118 (a safetensors handle is no dict)
    same = all(torch.equal(tensor, weights(project.root / "tied-2" / "final")[name]) for name, tensor in
               weights(directory).items())  # fmt: skip
    assert same == (part != "checkpoints/step-000010")


def test_experts_are_saved_one_by_one_under_their_names_on_disk(project: Project, printed: dict[str, str]) -> None:
    before, after = weights(project.root / "mixtral"), weights(project.root / "mixtral-run" / "final")
    assert before.keys() == after.keys()
    experts = [name for name in before if "block_sparse_moe.experts.3.w2" in name]
    assert len(experts) == 3
    assert all(not torch.equal(before[name], after[name]) for name in experts)


def test_large_models_are_sharded(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "ModelWriter", partial(ModelWriter, shard_bytes=100_000))
    base = project.root / "model"
    mode = FullMode(CausalLM(base, torch.float32), None, None, base, "float32")
    writer = mode.writer(tmp_path)
    for part in mode.parts(pipeline_layers(mode)):
        writer.add(part)
    writer.finish()
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 5
    assert set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()) == {*shards}
    original, again = weights(base), weights(tmp_path)
    assert original.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in original.items())
    loaded(tmp_path)


def test_there_are_no_norms_of_adapters_to_report(project: Project, printed: dict[str, str]) -> None:
    assert not any(
        name.startswith(("train/norm", "train/weight_decay")) for name in metrics(project.root / "untied")[0]
    )
    assert "‖W‖" not in printed["untied"]
    assert f"The model is in {project.root / 'untied' / 'final'}." in printed["untied"]
