"""Tokens, prefixes and suffixes, against the tokenizer's own encoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cadapter.data.tokenising import Tokenizer
from cadapter.errors import UsageError
from tests.tiny_tokenizer import BOS, EOS, PAD, SENTENCES, make_tokenizer


def options(**keys: Any) -> SimpleNamespace:
    """The part of a Config that :meth:`Tokenizer.framing` reads."""
    none = dict.fromkeys(("sequence_prefix", "document_prefix", "document_suffix", "mask_tokens"))
    return SimpleNamespace(**{**none, "document_attention": "packed", "sequence_len": 64, **keys})


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer(model_dir)


def test_encode_is_what_transformers_gives(tokenizer: Tokenizer) -> None:
    texts = [*SENTENCES, "", f"{BOS}ü{EOS} 🦊"]
    expected = PreTrainedTokenizerFast.from_pretrained(tokenizer.directory)(texts, add_special_tokens=False)[
        "input_ids"
    ]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == expected
    assert expected[-1][0] == 1  # special tokens that a text spells out are read as such


def test_nothing_is_cut_or_padded_whatever_the_file_says(tmp_path: Path) -> None:
    saved = make_tokenizer(tmp_path)
    saved.backend_tokenizer.enable_truncation(3)
    saved.backend_tokenizer.enable_padding(length=50)
    saved.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer(tmp_path).encode(["a fox", SENTENCES[0]])
    assert len(ids[0]) < 5
    assert len(ids[1]) > 5


@pytest.mark.parametrize(
    ("names", "prefix", "suffix", "pad"),
    [
        ({}, (1,), (2,), 0),
        ({"bos": None}, (), (2,), 0),
        ({"eos": None}, (1,), (), 0),
        ({"pad": EOS}, (1,), (2,), 2),
        ({"pad": None}, (1,), (2,), 2),
        ({"bos": None, "eos": None, "pad": None}, (), (), 0),
    ],
)
def test_defaults(tmp_path: Path, names: dict[str, str | None], prefix: tuple, suffix: tuple, pad: int) -> None:
    make_tokenizer(tmp_path, **names)
    framing = Tokenizer(tmp_path).framing(options())
    assert (framing.sequence_prefix, framing.document_prefix, framing.document_suffix) == (prefix, (), suffix)
    assert (framing.masked, framing.pad_id) == ((), pad)


def test_values_are_strings_ids_or_lists(tokenizer: Tokenizer) -> None:
    framing = tokenizer.framing(options(sequence_prefix="", document_prefix=f"{BOS}A fox", document_suffix=3))
    assert framing.sequence_prefix == ()
    assert framing.document_prefix == (1, *tokenizer.encode(["A fox"])[0].tolist())
    assert framing.document_suffix == (3,)
    assert tokenizer.framing(options(document_suffix=[2, 3])).document_suffix == (2, 3)
    assert tokenizer.framing(options(sequence_prefix=[])).sequence_prefix == ()


@pytest.mark.parametrize(
    ("value", "masked"), [(True, (0, 1, 2, 3)), (False, ()), (None, ()), (2, (2,)), ([2, 9], (2, 9))]
)
def test_mask_tokens(tokenizer: Tokenizer, value: Any, masked: tuple[int, ...]) -> None:
    assert tokenizer.framing(options(mask_tokens=value)).masked == masked


@pytest.mark.parametrize("key", ["sequence_prefix", "document_prefix", "document_suffix", "mask_tokens"])
def test_ids_outside_the_vocabulary(tokenizer: Tokenizer, key: str) -> None:
    size = len(tokenizer.fast)
    with pytest.raises(UsageError, match=f"{key}: {size}, {size + 7} is outside the tokenizer's vocabulary of {size}"):
        tokenizer.framing(options(**{key: [5, size, size + 7]}))


def test_a_prefix_as_long_as_a_sequence(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="sequence_prefix has 64 tokens, which leaves no room"):
        tokenizer.framing(options(sequence_prefix=[1] * 64))


@pytest.mark.parametrize(
    ("prefix", "suffix", "text", "expected"),
    [
        (BOS, EOS, "a", f"{BOS}a{EOS}"),
        (BOS, EOS, f"{BOS}a", f"{BOS}a{EOS}"),
        (BOS, EOS, f"a{EOS}", f"{BOS}a{EOS}"),
        (BOS, EOS, f"{BOS}a{EOS}", f"{BOS}a{EOS}"),
        ("", "", "a", "a"),
        (BOS + PAD, "", f"{BOS}a", f"{BOS}{PAD}{BOS}a"),  # only the whole prefix counts as there
        (BOS + PAD, PAD + EOS, f"{BOS}{PAD}a{PAD}{EOS}", f"{BOS}{PAD}a{PAD}{EOS}"),
    ],
)
def test_what_the_text_already_has_is_not_doubled(
    tokenizer: Tokenizer, prefix: str, suffix: str, text: str, expected: str
) -> None:
    framing = tokenizer.framing(options(document_prefix=prefix, document_suffix=suffix))
    assert framing.document(tokenizer.encode([text])[0]).tolist() == tokenizer.encode([expected])[0].tolist()


def test_the_fingerprint_follows_the_files(tmp_path: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    before = Tokenizer(tmp_path).fingerprint
    assert before == Tokenizer(model_dir).fingerprint
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer(tmp_path).fingerprint == before
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": BOS}))
    assert Tokenizer(tmp_path).fingerprint != before


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no tokenizer \(tokenizer\.json\)"):
        Tokenizer(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="its tokenizer cannot be loaded"):
        Tokenizer(tmp_path).fast  # noqa: B018 (loads)


def test_a_slow_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(UsageError, match=r"only a slow tokenizer \(ByT5Tokenizer\)"):
        Tokenizer(tmp_path).fast  # noqa: B018 (loads)
