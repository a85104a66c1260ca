"""The scripts of the tutorial: what they write is what they were given. test_readme.py follows the page itself."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.tiny_project import make_model, texts, write_jsonl

SCRIPTS = Path(__file__).parent.parent / "examples" / "tutorial"
ROUNDING = 2e-5
"""Of the largest logit: llama.cpp adds up in another order; 7e-7 is found."""
SENTENCE = "It was the best of films; 22 of them, it's said!\n\tThe  worst, too: naïve … <|eos|> done."


def test_folders_hold_the_stories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stories = texts("positive", 12)
    write_jsonl(tmp_path / "ornate.jsonl", stories)
    monkeypatch.chdir(tmp_path)
    count = runpy.run_path(str(SCRIPTS / "folders.py"))["write_folder"](Path("good"), Path("ornate.jsonl"))
    assert count == 12
    assert [file.read_text("utf-8") for file in sorted(Path("good").glob("*.txt"))] == stories


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_the_base_in_llama_cpp_is_the_base(tmp_path: Path, tied: bool) -> None:
    """The same tokens of a text, special ones included, and the same logits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install -e '.[llama]'")
    from tests.convert.gguf_models import run_llama_cpp

    base, file = make_model(tmp_path / "base", layers=2, tied=tied), tmp_path / "base.gguf"
    runpy.run_path(str(SCRIPTS / "base_gguf.py"))["write"](base, file)

    ids = AutoTokenizer.from_pretrained(base)(SENTENCE)["input_ids"]
    program = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    assert program.tokenize(SENTENCE.encode(), add_bos=False, special=True) == ids

    tokens = torch.tensor([ids[:48]])
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=tokens).logits
    found = run_llama_cpp(file, tokens)
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()
