"""Texts that ``eval`` writes at each strength: those of plain generation, in every layout and also in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from cadapter.adapters.directory import read_control_adapter
from cadapter.data import HeldOutDocument
from cadapter.models.attach import SteeredModel
from cadapter.models.cached import cached_frame
from cadapter.models.loading import CausalLM
from cadapter.training import evaluation
from cadapter.training.continuations import PROMPT_TOKENS, Continuations, prompts_of
from cadapter.training.evaluation import EvalOptions, evaluate
from cadapter.training.writing import Drawing
from tests.forked_commands import call, run_all_well
from tests.models.test_shell import INFERRED, tiny_config
from tests.steered_models import make_adapter, make_model
from tests.tiny_models import CONFIGS
from tests.tiny_project import HIDDEN, LAYERS, Project, make_project
from tests.training.test_four_bit_training import round_to_4_bits

pytestmark = pytest.mark.processes

COUNT, TOKENS = 5, 24
GREEDY = Drawing(TOKENS, temperature=0, seed=0)
STRENGTHS = (0.0, -1.0, 0.5, 2.0)
LAYOUTS = {"2 stages": (2, 2), "4 stages": (4, 4), "2 replicas": (1, 2), "2 stages of 2 replicas": (2, 4)}
"""Pipeline stages and processes."""


def document(name: str, length: int, class_: int = 1) -> HeldOutDocument:
    ids = np.arange(length, dtype=np.int32) + 10 * (class_ + 1)
    return HeldOutDocument(name, class_, ids, np.ones(length, bool))


def test_prompts_come_from_all_datasets_in_turn() -> None:
    documents = [*(document("a", 60) for _ in range(5)), document("b", 60, -1), document("c", 5, 0)]
    prompts = prompts_of(documents, 4)
    assert [prompt.dataset for prompt in prompts] == ["a", "b", "a", "a"]
    for prompt in prompts:
        assert len(prompt.ids) == PROMPT_TOKENS
        assert prompt.following[0] == prompt.ids[-1] + 1
    assert [len(each.ids) for each in prompts_of([document("a", 9), document("b", 6)], 8)] == [4, 4]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("continuations"), documents=12)


@pytest.fixture(scope="module")
def adapter(project: Project) -> Path:
    return make_adapter(project.root / "adapter", hidden=HIDDEN, layers=(0, 1, 3)).path


@pytest.fixture
def one_process() -> Iterator[None]:
    """This process is the whole job, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield


def config_of(project: Project, name: str, **keys: Any) -> Path:
    return project.write_config(name, eval_fraction=0.5, **keys)


def plain_config(project: Project, name: str, **keys: Any) -> Path:
    """Of a LoRA or a fine-tuned model."""
    settings = {"use_control_adapters": False, "lora_weight_decay": 0, **keys}
    return config_of(project, name, kinds=("positive",), **settings)


def continued(
    config: Path, project: Project, subject: Path, strengths: tuple[float, ...] | None = None, drawing: Drawing = GREEDY
) -> Continuations:
    found = evaluate(project.load(config), EvalOptions(subject, strengths, samples=COUNT, drawing=drawing))
    assert found is not None
    assert found.continuations is not None
    return found.continuations


def generated(model: Any, found: Continuations, use_cache: bool = True) -> list[list[int]]:
    """What Hugging Face's ``generate`` writes after the prompts, each alone and with its own cache."""
    texts = []
    for prompt in found.prompts:
        ids = torch.from_numpy(prompt.ids.astype(np.int64)).unsqueeze(0)
        settings = GenerationConfig(
            max_new_tokens=TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0, use_cache=use_cache
        )
        texts.append(model.generate(ids, generation_config=settings)[0, ids.shape[1] :].tolist())
    return texts


def ids_of(found: Continuations, strength: float) -> list[list[int]]:
    return [text.written for text in found.written[strength]]


def check_control(found: Continuations, adapter: Path, base: Callable[[], Any]) -> None:
    """The texts are those of ``base()`` with the adapter attached, token for token."""
    assert list(found.written) == sorted(STRENGTHS)
    model = base()
    plain = generated(model, found)
    assert ids_of(found, 0.0) == plain
    steered = SteeredModel(model, read_control_adapter(adapter))
    seen = []
    for strength in STRENGTHS:
        steered.set_strength(strength)
        expected = generated(steered.model, found)
        assert ids_of(found, strength) == expected, strength
        seen += [expected] if expected not in seen else []
    assert len(seen) == len(STRENGTHS), "the strengths have to show"


@pytest.mark.usefixtures("one_process")
def test_greedy_texts_are_those_of_generate(project: Project, adapter: Path) -> None:
    found = continued(config_of(project, "plain"), project, adapter, STRENGTHS)
    assert {prompt.dataset for prompt in found.prompts} == {"positive", "negative"}
    check_control(found, adapter, lambda: AutoModelForCausalLM.from_pretrained(project.root / "model").eval())
    assert all(text.ended == (text.written[-1] == 2) for texts in found.written.values() for text in texts)


@pytest.mark.usefixtures("one_process")
def test_a_base_in_4_bits_writes_what_its_rounded_weights_do(project: Project, adapter: Path) -> None:
    def rounded() -> Any:
        model = AutoModelForCausalLM.from_pretrained(project.root / "model").eval()
        assert round_to_4_bits(model, r"layers\..*_proj\.weight$") == 7 * LAYERS
        return model

    config = config_of(project, "four-bit", load_in_4bit=True)
    found = continued(config, project, adapter, STRENGTHS)
    check_control(found, adapter, rounded)
    assert found.written != continued(config_of(project, "exact"), project, adapter, STRENGTHS).written


@pytest.fixture(scope="module")
def lora(project: Project) -> Path:
    torch.manual_seed(5)
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], init_lora_weights=False
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(project.root / "model"), settings)
    model.save_pretrained(project.root / "lora")
    return project.root / "lora"


@pytest.fixture(scope="module")
def tuned(project: Project, lora: Path) -> Path:
    """The base with the LoRA merged, which ends its texts by other tokens too."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.root / "model"), lora)
    merged = model.merge_and_unload()
    merged.save_pretrained(project.root / "tuned")
    return project.root / "tuned"


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("keeps", [True, False], ids=["cached", "whole texts"])
def test_loras_and_fine_tuned_models_write_beside_their_base(
    project: Project, lora: Path, tuned: Path, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as where a model keeps more than keys and values, so that whole texts go through."""
    if not keeps:
        monkeypatch.setattr(evaluation, "cached_frame", lambda models: None)
    config = plain_config(project, "beside")
    base = AutoModelForCausalLM.from_pretrained(project.root / "model")
    for subject in (lora, tuned):
        found = continued(config, project, subject)
        assert list(found.written) == [0.0, 1.0]
        assert ids_of(found, 0.0) == generated(base, found)
        other = AutoModelForCausalLM.from_pretrained(tuned)
        assert ids_of(found, 1.0) == generated(other, found)
        assert found.written[0.0] != found.written[1.0]


@pytest.mark.usefixtures("one_process")
def test_each_of_two_models_ends_by_its_own_tokens(project: Project, tuned: Path, tmp_path: Path) -> None:
    found = continued(plain_config(project, "ends"), project, tuned)
    token = found.written[1.0][0].written[3]
    model = AutoModelForCausalLM.from_pretrained(tuned)
    model.generation_config.eos_token_id = [2, token]
    model.save_pretrained(tmp_path / "other")
    other = continued(plain_config(project, "ends"), project, tmp_path / "other")
    assert ids_of(other, 0.0) == ids_of(found, 0.0)
    for text, longer in zip(other.written[1.0], found.written[1.0], strict=True):
        ids = longer.written
        assert text.written == (ids[: ids.index(token) + 1] if token in ids else ids)
        assert text.ended == (token in ids or longer.ended)


@pytest.mark.usefixtures("one_process")
def test_a_model_that_keeps_more_than_keys_and_values_writes_too(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as MiniMax with its linear attention: whole texts go through."""
    monkeypatch.setitem(CONFIGS, "minimax", tiny_config("minimax", **INFERRED["minimax"]))
    base = make_model(tmp_path / "base", "minimax")
    assert cached_frame([CausalLM(base, torch.float32)]) is None
    adapter = make_adapter(tmp_path / "adapter", "writes")
    found = continued(config_of(project, "minimax", model_dir=str(base)), project, adapter.path, (0.0, 2.0))
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    assert ids_of(found, 0.0) == generated(model, found, use_cache=False)
    assert ids_of(found, 2.0) == generated(SteeredModel(model, adapter, 2.0).model, found, use_cache=False)
    assert found.written[0.0] != found.written[2.0]


@pytest.mark.usefixtures("one_process")
def test_groups_and_micro_batches_make_no_difference(
    project: Project, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few texts at a time, and whole texts instead of keys and values; drawn, not greedy."""
    config, drawing = config_of(project, "groups"), Drawing(TOKENS, 0.9, 3)
    at_once = continued(config, project, adapter, STRENGTHS, drawing).written
    monkeypatch.setattr("cadapter.training.writing.CACHED_TOKENS", 7 * (PROMPT_TOKENS + TOKENS))
    assert continued(config, project, adapter, STRENGTHS, drawing).written == at_once
    monkeypatch.setattr(evaluation, "cached_frame", lambda models: None)
    assert continued(config, project, adapter, STRENGTHS, drawing).written == at_once


@pytest.mark.usefixtures("one_process")
def test_every_strength_draws_from_the_same_numbers(project: Project, tmp_path: Path) -> None:
    """So that texts differ by the strength alone: where the adapter does nothing, they are those of the base."""
    nothing = make_adapter(tmp_path / "adapter", hidden=HIDDEN, spectral=0.0).path
    config = config_of(project, "same")
    found = [continued(config, project, nothing, STRENGTHS, Drawing(TOKENS, 0.8, seed)) for seed in (3, 4)]
    for each in found:
        assert len({json.dumps(ids_of(each, strength)) for strength in STRENGTHS}) == 1
    assert ids_of(found[0], 0.0) != ids_of(found[1], 0.0)
    texts = ids_of(found[0], 0.0)
    assert len({tuple(text) for text in texts}) == len(texts)  # each prompt has numbers of its own


def test_every_layout_writes_the_same(project: Project, adapter: Path, lora: Path, tuned: Path, tmp_path: Path) -> None:
    """Five prompts at four strengths on two replicas; drawn, with the cache of each stage its own."""
    words = [word for t in STRENGTHS for word in ("--strength", t)]
    subjects: dict[str, tuple[Path, Path, list[object]]] = {
        "control": (config_of(project, "layouts"), adapter, words),
        "4 bits": (config_of(project, "layouts-4-bits", load_in_4bit=True), adapter, words),
        "lora": (plain_config(project, "layouts-lora"), lora, []),
        "tuned": (plain_config(project, "layouts-tuned"), tuned, []),
    }
    for name, (config, subject, words) in subjects.items():
        shared = ["eval", config, "--adapter", subject, *words, "--samples", COUNT, "--sample-tokens", 12]
        layouts = {"one": (1, 1), **(LAYOUTS if name == "control" else {"2 stages": (2, 2)})}
        calls = [
            call(*shared, "--set", f"pipeline_stages={stages}", "--json", tmp_path / f"{name}-{layout}.json",
                 processes=processes)
            for layout, (stages, processes) in layouts.items()
        ]  # fmt: skip
        run_all_well(*calls)
        written = {layout: samples(tmp_path / f"{name}-{layout}.json") for layout in layouts}
        assert len(written["one"]) == (len(STRENGTHS) if subject == adapter else 2)
        assert all(each == written["one"] for each in written.values()), name


def samples(file: Path) -> dict[float, list[dict[str, Any]]]:
    records = json.loads(file.read_text())
    return {each["steering_at"]: each["samples"] for each in records if "steering_at" in each}
