"""``--verify``: what it measures is what Hugging Face's own models give, and what it says follows from that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cadapter.adapters.directory import read_control_adapter
from cadapter.adapters.lora_directory import lora_fields
from cadapter.cli import app
from cadapter.convert.fidelity import ChangedCheckpoint, Fidelity, verdict, verify
from cadapter.convert.lora_directory import LoraPair, write_lora
from cadapter.convert.merge import merge_model
from cadapter.convert.operators import Dial
from cadapter.convert.plan import make_recipe
from cadapter.convert.probe import probe_rows
from cadapter.data import Tokenizer
from cadapter.models.checkpoint import Checkpoint
from tests.convert.conftest import logits_of, steered_logits
from tests.steered_models import TOKENIZED
from tests.tiny_models import FAMILY_NAMES, save_model
from tests.tiny_tokenizer import make_tokenizer

PARALLEL = ("cohere", "cohere2")


@pytest.fixture(scope="session")
def with_tokenizer(tmp_path_factory):
    """A function that saves the tiny model ``name`` and a tokenizer once, and returns its directory."""
    root = tmp_path_factory.mktemp("with-tokenizer")

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{name}-{str(dtype).rpartition('.')[2]}"
        if not directory.exists():
            save_model(name, directory, dtype, **TOKENIZED)
            make_tokenizer(directory)
        return directory

    return make


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL a position of logits [T, V]."""
    p, q = (torch.log_softmax(each.double(), dim=-1) for each in (p, q))
    return (p.exp() * (p - q)).sum(-1)


def merged(base: Path, adapters: list[tuple[Path, float]], output: Path) -> tuple[Checkpoint, list]:
    """The base with adapters merged into it, and the adapters as ``verify`` takes them."""
    (first, strength), *others = adapters
    recipe = make_recipe(Checkpoint(base), first, Dial(strength=strength), others)
    merge_model(Checkpoint(base), recipe.plan, output, lambda summary: "card\n")
    return Checkpoint(output), recipe.adapters


def compared(base: Path, adapters, converted: Checkpoint, rows: list[Tensor]) -> Fidelity:
    return verify(Checkpoint(base), adapters, converted, rows, "cpu")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_figures_are_those_of_hugging_faces_models(name, with_tokenizer, make_adapter, tmp_path):
    base = with_tokenizer(name)
    adapter = make_adapter(base, site="block", spectral=0.3)
    converted, adapters = merged(base, [(adapter, -1.0)], tmp_path / "merged")
    rows = probe_rows(Checkpoint(base), None)[:2]
    found = compared(base, adapters, converted, rows)
    divergence, effect, agrees = [], [], []
    for row in rows:
        bare, native = (logits[0] for logits in steered_logits(base, adapter, row, [0.0, -1.0]))
        other = logits_of(tmp_path / "merged", row)[0]
        divergence.append(kl(native, other))
        effect.append(kl(bare, native))
        agrees.append(native.argmax(-1) == other.argmax(-1))
    assert found.tokens == sum(row.shape[1] for row in rows)
    # float32 logits of two programs: 1e-6 of them, and divergences are of second order in that
    assert found.effect_mean == pytest.approx(torch.cat(effect).mean().item(), rel=1e-4)
    assert found.effect_max == pytest.approx(torch.cat(effect).max().item(), rel=1e-3)
    assert found.kl_mean == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-3, abs=1e-10)
    assert found.top1_agreement == pytest.approx(torch.cat(agrees).double().mean().item(), abs=2 / found.tokens)
    assert found.within_rounding == (name in PARALLEL)
    assert found.effect_mean > 1e-4


@pytest.mark.parametrize("site", ["mlp", "writes"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2_moe", "granite"])
def test_several_adapters_act_in_order(name, site, with_tokenizer, make_adapter, tmp_path):
    base = with_tokenizer(name)
    first = make_adapter(base, "first", site, spectral=0.4, seed=1)
    second = make_adapter(base, "second", site, spectral=0.4, seed=2, rank=3, layers=(0, 2), form="symmetric")
    converted, adapters = merged(base, [(first, 0.5), (second, -1.0)], tmp_path / "merged")
    rows = probe_rows(Checkpoint(base), None)[:1]
    assert compared(base, adapters, converted, rows).within_rounding
    turned = compared(base, adapters[::-1], converted, rows)
    assert turned.kl_mean > 1e-6  # operators do not commute


def test_adapters_of_the_whole_block_compose_too(with_tokenizer, make_adapter, tmp_path):
    """Where a block is parallel, merging two of them is exact."""
    base = with_tokenizer("cohere")
    adapters = [(make_adapter(base, f"adapter{seed}", "block", 0.4, seed=seed), 1.0) for seed in (1, 2)]
    converted, native = merged(base, adapters, tmp_path / "merged")
    assert compared(base, native, converted, probe_rows(Checkpoint(base), None)[:1]).within_rounding


def test_a_conversion_that_leaves_something_out_does_not_pass(with_tokenizer, make_adapter, tmp_path):
    base = with_tokenizer("llama")
    adapter = read_control_adapter(make_adapter(base))
    plan = make_recipe(Checkpoint(base), adapter.path, Dial()).plan
    rows = probe_rows(Checkpoint(base), None)
    whole = compared(base, [(adapter, Dial())], ChangedCheckpoint(Checkpoint(base), plan), rows)
    assert verdict(whole, exact=True) == (True, "The conversion is the adapter, to float32 rounding.")
    for missing in plan:
        partly = {name: changes for name, changes in plan.items() if name != missing}
        found = compared(base, [(adapter, Dial())], ChangedCheckpoint(Checkpoint(base), partly), rows)
        good, words = verdict(found, exact=True)
        assert not good
        assert "should be exact" in words
    nothing = compared(base, [(adapter, Dial())], Checkpoint(base), rows)
    assert nothing.share == pytest.approx(1, rel=0.2)  # KL(a ‖ b) against KL(b ‖ a)


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("merge", (), "is the adapter, to float32 rounding"),
        ("merge", ("--dtype", "bfloat16"), "rounding its weights to bfloat16 costs 0."),
        ("merge", ("--scale", "-0.7"), "is the adapter, to float32 rounding"),
        ("merge", ("--writers", "mlp"), "Without --writers it follows the adapter's site"),
        ("to-add-lora", ("--strength", "-0.5"), "is the adapter, to float32 rounding"),
        ("to-add-lora", ("--rank", "2"), "Truncation loses"),
        ("to-mult-lora", ("--inverse",), "is the adapter, to float32 rounding"),
    ],
)
def test_the_commands_say_how_close_they_come(command, options, words, with_tokenizer, make_adapter, tmp_path):
    base = with_tokenizer("llama")
    models = () if command == "to-mult-lora" else (base,)  # it finds the recorded base
    result = run(command, *models, make_adapter(base), tmp_path / "out", *options, "--verify")
    assert result.exit_code == 0, result.stderr
    assert words in result.stdout
    assert "result from the adapter" in result.stdout


def test_a_lora_is_compared_with_its_own_change(with_tokenizer, make_adapter, tmp_path):
    base = with_tokenizer("llama-biased")
    assert run("to-add-lora", base, make_adapter(base), tmp_path / "lora").exit_code == 0
    result = run("merge", base, tmp_path / "lora", tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.stderr
    assert "is the adapter, to float32 rounding" in result.stdout


def test_rounding_is_that_of_all_weights(with_tokenizer, make_adapter, tmp_path):
    """With --dtype the embeddings and the head are rounded as well, before and behind the blocks."""
    base, adapter = with_tokenizer("llama"), make_adapter(with_tokenizer("llama"))
    recipe, output = make_recipe(Checkpoint(base), adapter, Dial()), tmp_path / "merged"
    merge_model(Checkpoint(base), recipe.plan, output, lambda summary: "card\n", dtype="bfloat16")
    rows = probe_rows(Checkpoint(base), None)[:2]
    found = compared(base, recipe.adapters, Checkpoint(output), rows)
    divergence = [kl(steered_logits(base, adapter, row, [1.0])[0][0], logits_of(output, row)[0]) for row in rows]
    assert found.kl_mean == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-3)  # float32 in two programs
    assert not found.within_rounding


def test_a_lora_on_the_head_is_compared_with_its_head(with_tokenizer, tmp_path):
    base, width = with_tokenizer("llama"), Checkpoint(with_tokenizer("llama")).config.hidden_size
    pair = LoraPair(torch.randn(2, width), 0.1 * torch.randn(TOKENIZED["vocab_size"], 2), 1.0)
    (tmp_path / "lora").mkdir()
    config = lora_fields("LORA", 2, 2, ["lm_head"], [], str(base))
    write_lora(tmp_path / "lora", config, {"lm_head": pair}, "card\n")
    result = run("merge", base, tmp_path / "lora", tmp_path / "out", "--verify")
    assert result.exit_code == 0, result.stderr
    assert "is the adapter, to float32 rounding" in result.stdout


def test_the_text_can_be_chosen(with_tokenizer, make_adapter, tmp_path):
    base, adapter = with_tokenizer("llama"), make_adapter(with_tokenizer("llama"))
    (tmp_path / "text.txt").write_text("One sentence that is not the built-in text.")
    result = run("merge", base, adapter, tmp_path / "out", "--verify", "--text", tmp_path / "text.txt")
    assert result.exit_code == 0, result.stderr
    [row] = probe_rows(Checkpoint(base), tmp_path / "text.txt")
    assert f"over {row.shape[1]} tokens" in result.stdout
    assert row[0, 0] == TOKENIZED["bos_token_id"]


def test_the_text_can_be_records(with_tokenizer, make_adapter, tmp_path):
    base, file = with_tokenizer("llama"), tmp_path / "texts.jsonl"
    texts = ["The first of the texts, which is long enough.", "x", "The second of them, which is as long."]
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    rows = probe_rows(Checkpoint(base), file)
    fast = Tokenizer(base).fast
    assert [fast.decode(row[0, 1:]) for row in rows] == [texts[0], texts[2]]
    assert all(row[0, 0] == TOKENIZED["bos_token_id"] for row in rows)
    file.write_text("".join(json.dumps({"text": texts[0]}) + "\n" for _ in range(10_000)))
    assert 8 * 40 < sum(row.shape[1] for row in probe_rows(Checkpoint(base), file)) < 3 * 2048
    file.write_text('{"content": "x"}\n')
    result = run("merge", base, make_adapter(base), tmp_path / "out", "--verify", "--text", file)
    assert (result.exit_code, "line 1: there is no 'text' (fields: content)" in result.stderr) == (2, True)


def test_what_a_comparison_of_loras_proves_is_said(with_tokenizer, make_adapter, tmp_path):
    base, adapter = with_tokenizer("llama"), make_adapter(with_tokenizer("llama"))
    assert run("to-add-lora", base, adapter, tmp_path / "lora").exit_code == 0
    said = run("merge", base, tmp_path / "lora", tmp_path / "one", "--verify").stdout
    assert "not that peft applies the LoRA in the same way" in said
    assert "peft" not in run("merge", base, adapter, tmp_path / "two", "--verify").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "TEXT"), "--text is the text for --verify"),
        (("--verify", "--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--verify", "--text", "EMPTY"), "0 tokens, too few"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(options, message, with_tokenizer, make_adapter, tmp_path):
    base = with_tokenizer("llama")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    names = {"TEXT": tmp_path / "text.txt", "EMPTY": tmp_path / "empty.txt"}
    options = [names.get(option, option) for option in options]
    adapter = make_adapter(base)
    for command in (("merge", base), ("to-add-lora", base), ("to-mult-lora",)):
        result = run(*command, adapter, tmp_path / "out", *options)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
        assert not (tmp_path / "out").exists()


def test_a_base_without_a_tokenizer_cannot_be_verified(model_directory, make_adapter, tmp_path):
    base = model_directory("llama")
    result = run("merge", base, make_adapter(base), tmp_path / "out", "--verify")
    assert result.exit_code == 2
    assert "tokenizer" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_known_cannot_be_verified(with_tokenizer, make_adapter, tmp_path):
    adapter = make_adapter(with_tokenizer("llama"), base_model_name_or_path=None)
    result = run("to-mult-lora", adapter, tmp_path / "out", "--verify")
    assert result.exit_code == 2
    assert "--base" in result.stderr
