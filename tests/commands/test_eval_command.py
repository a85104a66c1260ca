"""``cadapter eval`` against Hugging Face's model scoring document by document, and in every layout."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cadapter.adapters.directory import (
    ControlAdapterFiles,
    control_card,
    describe_layers,
    read_control_adapter,
    write_control_adapter,
)
from cadapter.adapters.factors import LowRank
from cadapter.commands import eval as eval_command
from cadapter.config import Config, DatasetConfig
from cadapter.data import HeldOutDocument, documents_from_file, load_tokenizer, prepare_data
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint
from cadapter.models.families import FAMILIES
from cadapter.training.run_directory import adapter_of_run
from tests.forked_commands import call, run_all, run_all_well
from tests.steered_models import make_model as make_family
from tests.tiny_project import HIDDEN, SEQUENCE, Project, listing, make_model, run, run_well, texts, write_jsonl

STRENGTHS = (1.0, -1.0, 0.5)
FLOAT32 = 1e-5
"""The pipeline computes in float32, the reference in float64."""


def write_adapter(directory: Path, model: Path, hidden: int = HIDDEN, layers: tuple[int, ...] = (0, 2, 3)) -> Path:
    """A random adapter of rank 4 whose W has a spectral norm of 0.5."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for layer in layers:
        A, B = torch.randn(4, hidden, generator=generator), torch.randn(hidden, 4, generator=generator)
        factors[layer] = LowRank(A, B * 0.5 / torch.linalg.matrix_norm(0.5 * B @ A, 2))
    adapter = ControlAdapterFiles(
        path=directory,
        rank=4,
        alpha=2.0,
        layers=factors,
        site="block",
        base_model_type="llama",
        base_model_name_or_path=str(model),
        facts=describe_layers(Checkpoint(model), FAMILIES["llama"], layers) if hidden == HIDDEN else {},
    )
    directory.mkdir(parents=True)
    write_control_adapter(directory, adapter, control_card(adapter))
    return directory


@pytest.fixture(scope="module")
def adapter(command_project: Project) -> Path:
    return write_adapter(command_project.root / "adapter", command_project.root / "model")


@pytest.fixture(scope="module")
def config(command_project: Project) -> Path:
    """Held out are 6 documents of each class; one is longer than a sequence."""
    root = command_project.root
    write_jsonl(root / "positive.jsonl", [*texts("positive", 12), " ".join(texts("positive", 9, seed=1))])
    return command_project.write_config("scored", eval_fraction=0.5)


class PlainScorer:
    """Hugging Face's model in float64, with (I + W)^t written out as a full matrix in a hook of each layer."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        self.strength = 0.0
        files = read_control_adapter(adapter)
        for layer, factors in files.layers.items():
            W = files.scale * factors.B.double() @ factors.A.double()
            self.model.model.layers[layer].register_forward_hook(self._hook(W))

    def _hook(self, W: torch.Tensor):
        values, vectors = torch.linalg.eig(torch.eye(len(W), dtype=W.dtype) + W)

        def change(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            power = (vectors @ torch.diag(values**self.strength) @ torch.linalg.inv(vectors)).real
            return inputs[0] + (output - inputs[0]) @ power.T

        return change

    @torch.no_grad()
    def log_probabilities(self, document: HeldOutDocument, strength: float) -> torch.Tensor:
        self.strength = strength
        ids = torch.from_numpy(document.ids.astype("int64")).unsqueeze(0)
        return torch.log_softmax(self.model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)

    def score(self, document: HeldOutDocument, strength: float) -> tuple[float, float, float, int]:
        """Mean loss, accuracy and KL(base ‖ adapted) over the document's scored tokens, and their number."""
        targets = torch.from_numpy(document.ids[1:].astype("int64"))
        scored = torch.from_numpy(document.trained[1:].copy())
        base, adapted = self.log_probabilities(document, 0.0), self.log_probabilities(document, strength)
        loss = -adapted.gather(1, targets.unsqueeze(1)).squeeze(1)
        kl = (base.exp() * (base - adapted)).sum(-1)
        correct = (adapted.argmax(-1) == targets).double()
        return (*(float(each[scored].mean()) for each in (loss, correct, kl)), int(scored.sum()))

    def agreement(self, document: HeldOutDocument, strength: float) -> float:
        """Share of the scored tokens where base and adapted find the same one most probable."""
        scored = torch.from_numpy(document.trained[1:].copy())
        tops = [self.log_probabilities(document, t).argmax(-1)[scored] for t in (0.0, strength)]
        return float((tops[0] == tops[1]).double().mean())


def evaluate(config: Path, json_file: Path, *options: object) -> tuple[list[dict], list[dict], str]:
    """Run ``eval``: scores, contrasts, what was printed."""
    done = run_well("eval", config, "--json", json_file, *options)
    records = json.loads(json_file.read_text())
    return (
        [record for record in records if "dataset" in record],
        [record for record in records if "contrast" in record],
        done.stdout,
    )


def strength_options(strengths: tuple[float, ...] = STRENGTHS) -> list[object]:
    return [word for t in strengths for word in ("--strength", t)]


@pytest.fixture(scope="module")
def scored(config: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict], str]:
    file = tmp_path_factory.mktemp("json") / "scores.json"
    return evaluate(config, file, "--adapter", adapter, *strength_options())


@pytest.mark.processes
def test_scores_equal_a_plain_computation_per_document(
    command_project: Project, config: Path, adapter: Path, scored: tuple[list[dict], list[dict], str]
) -> None:
    documents = prepare_data(command_project.load(config)).documents
    assert max(len(document.ids) for document in documents) == SEQUENCE  # one is cut
    assert min(len(document.ids) for document in documents) < SEQUENCE  # and one is padded
    plain = PlainScorer(command_project.root / "model", adapter)
    scores, contrasts, printed = scored
    assert [(s["dataset"], s["strength"]) for s in scores] == [
        (name, t) for name in ("positive", "negative") for t in (0.0, *STRENGTHS)
    ]
    losses: dict[tuple[str, float], list[float]] = {}
    for score in scores:
        mine = [document for document in documents if document.dataset == score["dataset"]]
        results = [plain.score(document, score["strength"]) for document in mine]
        loss, correct, kl, tokens = zip(*results, strict=True)
        losses[score["dataset"], score["strength"]] = list(loss)
        expected = {
            "loss": statistics.mean(loss),
            "loss_se": statistics.stdev(loss) / math.sqrt(len(loss)),
            "perplexity": math.exp(statistics.mean(loss)),
            "top1_accuracy": statistics.mean(correct),
            "kl": statistics.mean(kl),
            "perplexity_se": math.exp(statistics.mean(loss)) * statistics.stdev(loss) / math.sqrt(len(loss)),
            "kl_se": statistics.stdev(kl) / math.sqrt(len(kl)),
            "top1_agreement": statistics.mean(plain.agreement(document, score["strength"]) for document in mine),
        }
        assert {name: score[name] for name in expected} == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)
        assert (score["documents"], score["tokens"]) == (len(mine), sum(tokens))
        assert score["cut_documents"] == sum(document.left_out > 0 for document in mine)
        assert score["left_out_tokens"] == sum(document.left_out for document in mine)
        assert score["control_class"] == (1 if score["dataset"] == "positive" else -1)
        assert (score["kl"] == 0) == (score["strength"] == 0)
    for t in STRENGTHS:
        assert scores[0]["loss"] != pytest.approx(statistics.mean(losses["positive", t]), abs=100 * FLOAT32)

    (pair,) = contrasts
    assert pair["strengths"] == [1.0, -1.0]
    on = {
        name: [plus - minus for plus, minus in zip(losses[name, 1.0], losses[name, -1.0], strict=True)]
        for name in ("positive", "negative")
    }
    expected = {
        "contrast": statistics.mean(on["negative"]) - statistics.mean(on["positive"]),
        "contrast_se": math.sqrt(sum(statistics.variance(each) / len(each) for each in on.values())),
        "sign_share": (sum(d > 0 for d in on["negative"]) + sum(d < 0 for d in on["positive"])) / len(documents),
    }
    assert {name: pair[name] for name in expected} == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)
    assert "Contrast at ±1" in printed
    cut, tokens = (
        sum(each[name] for each in scores if not each["strength"]) for name in ("cut_documents", "left_out_tokens")
    )
    assert cut > 0
    assert f"{cut} of {len(documents)} documents are longer than a sequence" in printed
    assert (
        f"{tokens:,} of {tokens + sum(len(document.ids) for document in documents):,} tokens are not scored" in printed
    )


@pytest.mark.processes
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--set", "pipeline_stages=2", "--num-gpus", 2], id="2-stages"),
        pytest.param(["--num-gpus", 2], id="2-replicas", marks=pytest.mark.slow),
    ],
)
def test_every_layout_scores_the_same(
    config: Path, adapter: Path, tmp_path: Path, scored: tuple[list[dict], list[dict], str], options: list[object]
) -> None:
    scores, contrasts, printed = evaluate(
        config, tmp_path / "scores.json", "--adapter", adapter, *strength_options(), *options
    )
    for found, expected in zip([*scores, *contrasts], [*scored[0], *scored[1]], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == (pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value)
    assert printed.count("Loss by dataset and strength") == 1


@pytest.mark.processes
def test_other_texts_and_the_default_adapter(
    command_project: Project, config: Path, adapter: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "other.jsonl", texts("negative", 4, seed=9))
    run_directory = tmp_path / "run"
    write_adapter(run_directory / "epoch2", command_project.root / "model")
    options = ["--set", f"output_dir={run_directory}", "--data", f"{file}:-1", "--data", f"{file}:0"]
    scores, contrasts, printed = evaluate(config, tmp_path / "scores.json", *options)
    assert f"Adapter: {run_directory / 'epoch2'}" in printed
    assert [(s["dataset"], s["control_class"], s["strength"]) for s in scores] == [
        ("other", c, t) for c in (-1, 0) for t in (0.0, 1.0, -1.0)
    ]
    assert contrasts == []
    settings = command_project.load(config)
    documents = documents_from_file(str(file), -1, settings, load_tokenizer(settings))
    plain = PlainScorer(command_project.root / "model", adapter)
    for score in scores:
        expected = statistics.mean(plain.score(document, score["strength"])[0] for document in documents)
        assert score["loss"] == pytest.approx(expected, rel=FLOAT32)


def test_the_adapter_that_a_run_offers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trained adapter"):
        adapter_of_run(tmp_path)
    (tmp_path / "epoch2").mkdir()
    (tmp_path / "epoch10").mkdir()
    (tmp_path / "epochs").mkdir()
    assert adapter_of_run(tmp_path) == tmp_path / "epoch10"
    (tmp_path / "final").mkdir()
    assert adapter_of_run(tmp_path) == tmp_path / "final"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "{wide}"], ("hidden size", "32", "64")),
        (["--adapter", "{root}/model"], ("base itself", "adapter")),
        (["--adapter", "{root}/nothing"], ("nothing",)),
        ([], ("no trained adapter", "--adapter")),
        (["--adapter", "{adapter}", "--data", "{root}/positive.jsonl"], ("FILE:CLASS",)),
        (["--adapter", "{adapter}", "--data", "{root}/none.jsonl:1"], ("none.jsonl",)),
        (["--adapter", "{adapter}", "--json", "{root}/model"], ("model is a directory",)),
        (["--adapter", "{adapter}", "--html", "{root}/positive.jsonl/x.html"], ("positive.jsonl is a file",)),
        (["--adapter", "{adapter}", "--strength", "1:2"], ("--strength 1:2", "FROM:TO:STEP")),
        (["--adapter", "{adapter}", "--kl-budget", "0"], ("--kl-budget 0", "above 0")),
        (["--adapter", "{adapter}", "--sample-temperature", "nan"], ("--sample-temperature nan", "give 0 (the most")),
        (["--adapter", "{adapter}", "--neutral", "{root}/none.jsonl"], ("none.jsonl",)),
        (["--adapter", "{adapter}", "--set", "eval_fraction=0"], ("eval_fraction", "--data")),
    ],
    ids=["another-hidden-size", "no-adapter", "missing-adapter", "no-run", "no-class", "missing-texts", "no-file",
         "no-folder", "no-range", "no-budget", "no-temperature", "no-neutral-texts", "nothing-held-out"],
)  # fmt: skip
def test_mistakes(
    command_project: Project, config: Path, adapter: Path, tmp_path: Path, options: list[str], words: tuple[str, ...]
) -> None:
    root = command_project.root
    wide = write_adapter(tmp_path / "wide", root / "model", hidden=32)
    before = listing(root)
    filled = [word.format(root=root, adapter=adapter, wide=wide) for word in options]
    done = run("eval", config, *filled)
    assert done.returncode == 2, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    if "eval_fraction=0" not in options:  # which prepares other data
        assert listing(root) == before


# ---- LoRA and fine-tuned models -------------------------------------------------------------------------------------


class PairScorer(PlainScorer):
    """A base and what became of it, both Hugging Face's in float64; every strength but 0 is the latter."""

    def __init__(self, base: Path, other: Any) -> None:
        self.models = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), other)

    @torch.no_grad()
    def log_probabilities(self, document: HeldOutDocument, strength: float) -> torch.Tensor:
        model = self.models[strength != 0].eval()
        model.set_experts_implementation("eager")  # the grouped product of the default has no float64
        ids = torch.from_numpy(document.ids.astype("int64")).unsqueeze(0)
        return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)


def write_lora(directory: Path, model: Path) -> Path:
    """A random LoRA on some modules of two layers, as PEFT writes it."""
    torch.manual_seed(5)
    settings = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2],
        init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(directory)
    return directory


def write_other_model(directory: Path, model: Path) -> Path:
    """The model with every weight moved a little."""
    other = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    other.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bases(command_project: Project) -> Project:
    """Bases beside the project's own: one with a tied embedding, one with experts."""
    root = command_project.root
    make_model(root / "tied", tied=True)
    make_family(root / "mixtral", "mixtral")
    return command_project


def plain_config(project: Project, base: str, **keys: Any) -> Path:
    settings = {"kinds": ("positive",), "use_control_adapters": False, "lora_weight_decay": 0, "eval_fraction": 0.5}
    return project.write_config(f"plain-{base}", model_dir=str(project.root / base), **settings, **keys)


def write_other_angles(directory: Path, model: Path) -> Path:
    """The same, and its positions turn at another rate."""
    file = write_other_model(directory, model) / "config.json"
    settings = json.loads(file.read_text())
    settings["rope_parameters"]["rope_theta"] = 100.0
    file.write_text(json.dumps(settings))
    return directory


WRITERS = {"lora": write_lora, "fine-tuned": write_other_model, "other-angles": write_other_angles}
LAYOUTS: list[tuple[int, list[str]]] = [(1, []), (2, ["--set", "pipeline_stages=2"]), (2, [])]
"""Processes and options."""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("lora", "model"),
        ("lora", "mixtral"),
        ("fine-tuned", "model"),
        ("fine-tuned", "tied"),
        ("fine-tuned", "mixtral"),
        ("other-angles", "model"),
    ],
)
def test_base_and_adapted_scores_equal_a_plain_computation_in_every_layout(
    bases: Project, tmp_path: Path, kind: str, base: str
) -> None:
    model = bases.root / base
    subject = WRITERS[kind](tmp_path / "subject", model)
    config = plain_config(bases, base)
    files = [tmp_path / f"scores-{number}.json" for number in range(len(LAYOUTS))]
    printed = run_all_well(
        *(
            call("eval", config, "--adapter", subject, "--json", file, *options, processes=processes)
            for file, (processes, options) in zip(files, LAYOUTS, strict=True)
        )
    )
    other = AutoModelForCausalLM.from_pretrained(model if kind == "lora" else subject, dtype=torch.float64)
    if kind == "lora":
        other = PeftModel.from_pretrained(other, subject).double()
    plain, documents = PairScorer(model, other), prepare_data(bases.load(config)).documents
    for file in files:
        scores = json.loads(file.read_text())
        assert [(score["dataset"], score["strength"]) for score in scores] == [("positive", 0.0), ("positive", 1.0)]
        for score in scores:
            loss, correct, kl, tokens = zip(*(plain.score(each, score["strength"]) for each in documents), strict=True)
            expected = {
                "loss": statistics.mean(loss),
                "loss_se": statistics.stdev(loss) / math.sqrt(len(loss)),
                "top1_accuracy": statistics.mean(correct),
                "kl": statistics.mean(kl),
            }
            assert {name: score[name] for name in expected} == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)
            assert (score["documents"], score["tokens"]) == (len(documents), sum(tokens))
        assert scores[1]["kl"] > 1000 * FLOAT32
    assert all(text.count("Loss by dataset and strength") == 1 for text in printed)


@pytest.mark.processes
def test_what_has_no_strengths_is_evaluated_without(bases: Project, tmp_path: Path) -> None:
    config = plain_config(bases, "model")
    names = {"lora": "a LoRA", "fine-tuned": "a fine-tuned model"}
    subjects = {name: WRITERS[kind](tmp_path / kind, bases.root / "model") for kind, name in names.items()}
    refused = run_all(*(call("eval", config, "--adapter", path, "--strength", 0.5) for path in subjects.values()))
    for (name, path), done in zip(subjects.items(), refused, strict=True):
        assert done.returncode == 2
        assert done.stderr == f"error: {path} is {name}, which has no strengths: leave --strength out.\n"
    run_all_well(*(call("eval", config, "--adapter", path, "--strength", 1) for path in subjects.values()))


def rename_tensors(directory: Path, old: str, new: str) -> None:
    file = directory / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("lora", {"rename": ("q_proj", "qkv_proj")}, ("qkv_proj", "llama")),
        ("lora", {"rename": ("layers.2.", "layers.9.")}, ("layer 9", "4 layers")),
        ("lora", {"base": {"hidden": 32}}, ("shape",)),
        ("fine-tuned", {"base": {"hidden": 32}}, ("hidden_size = 32", "64")),
        ("fine-tuned", {"base": {"layers": 3}}, ("num_hidden_layers = 3", "4")),
    ],
)
def test_what_does_not_fit_its_base_is_refused(
    bases: Project, tmp_path: Path, kind: str, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    base = make_model(tmp_path / "base", **change["base"]) if "base" in change else bases.root / "model"
    subject = WRITERS[kind](tmp_path / "subject", base)
    if "rename" in change:
        rename_tensors(subject, *change["rename"])
        settings = json.loads((subject / "adapter_config.json").read_text())
        (subject / "adapter_config.json").write_text(json.dumps({**settings, "layers_to_transform": None}))
    (done,) = run_all(call("eval", plain_config(bases, "model"), "--adapter", subject))
    assert done.returncode == 2, done.stdout + done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize(("keys", "chat"), [({}, False), ({"messages_field": "messages"}, True)])
def test_what_comes_next_knows_chats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, str], chat: bool
) -> None:
    """A full model needs no adapter; its prompts are turns where its texts were."""
    dataset = DatasetConfig(dataset_path="d.jsonl", **keys)
    config = Config(model_dir="m", output_dir="o", lr=1.0, sequence_len=64, full_fine_tune=True, datasets=(dataset,))
    eval_command._note_next(config, tmp_path)
    assert capsys.readouterr().out.split() == f"Next: cadapter generate {tmp_path} PROMPT{' --chat' * chat}".split()
