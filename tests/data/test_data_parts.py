"""Long texts in parts give the tokens of the whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cadapter.data import parts
from cadapter.data.tokenising import Tokenizer as OurTokenizer
from tests.tiny_tokenizer import SENTENCES, make_tokenizer


def long_text(seed: int, words: int = 3000) -> str:
    draw = random.Random(seed)
    vocabulary = [*" ".join(SENTENCES).split(), "ü🦊", "don't", "x" * 50, "1234567", "<|user|>"]
    return "".join(
        draw.choice(vocabulary) + draw.choice([" ", " ", " ", "  ", "\n", "\n\n ", ", "]) for _ in range(words)
    )


def sentencepiece_like(directory: Path, prepend: str) -> None:
    """Save a BPE on words that begin with ▁: put there by a normaliser, or by the splitting into words."""
    bpe = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    if prepend == "normaliser":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]))
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def llama_3_like(directory: Path) -> None:
    """Save a byte-level BPE that splits into words much as Llama 3 does, digits by threes."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), as_bytes])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(directory)


KINDS = {
    "byte-level": (lambda directory: make_tokenizer(directory), True),
    "Llama 3": (llama_3_like, True),
    "Metaspace": (lambda directory: sentencepiece_like(directory, "words"), True),
    "Llama 2": (lambda directory: sentencepiece_like(directory, "normaliser"), False),
}
"""How to make each kind of tokenizer, and whether texts can be cut for it."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_the_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, can_be_cut = KINDS[kind]
    make(tmp_path)
    tokenizer = OurTokenizer(tmp_path)
    texts = [long_text(seed) for seed in range(5)]
    whole = [tokenizer._encode_one(text) for text in texts]
    monkeypatch.setattr(parts, "LONG", 500)
    pieces = [parts.parts_of(text, tokenizer._encode_one) for text in texts]
    assert ["".join(each) for each in pieces] == texts
    assert all((len(each) > 10) == can_be_cut for each in pieces)
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == whole


@pytest.mark.parametrize("text", ["x" * 5000, "a b " * 5 + "x" * 5000, " " * 5000, "字" * 5000, ""])
def test_texts_without_a_place_to_cut(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path)
    tokenizer = OurTokenizer(tmp_path)
    whole = tokenizer._encode_one(text)
    monkeypatch.setattr(parts, "LONG", 500)
    assert tokenizer.encode([text])[0].tolist() == whole


def test_groups() -> None:
    groups = list(parts.grouped([3, 1, 5, 1, 1, 9, 2], lambda item: item, 4, most=3))
    assert groups == [[3, 1], [5], [1, 1, 9], [2]]
    assert list(parts.grouped([0] * 7, lambda item: item, 4, most=3)) == [[0] * 3, [0] * 3, [0]]
