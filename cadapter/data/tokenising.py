"""Text to token ids, with the model's own fast tokenizer.

Nothing is inserted by the tokenizer itself (``add_special_tokens=False``), so that no BOS is doubled; what stands
before a sequence and around a document is this package's ``sequence_prefix``, ``document_prefix`` and
``document_suffix``. Special tokens that are spelled out in a text are read as such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cadapter.errors import UsageError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json",
)  # fmt: skip

TokenSpec = str | int | Sequence[int] | None


@dataclass(frozen=True)
class Framing:
    """Token ids around the text, and those that are not trained; every field as ids of the tokenizer."""

    sequence_prefix: tuple[int, ...]
    document_prefix: tuple[int, ...]
    document_suffix: tuple[int, ...]
    masked: tuple[int, ...]
    pad_id: int

    def document(self, ids: np.ndarray) -> np.ndarray:
        """Return ``document_prefix + ids + document_suffix`` [n] int32; what the text already has is not doubled."""
        head = () if starts_with(ids, self.document_prefix) else self.document_prefix
        tail = () if ends_with(ids, self.document_suffix) else self.document_suffix
        if not head and not tail:
            return ids
        return np.concatenate([np.array(head, np.int32), ids, np.array(tail, np.int32)])


def starts_with(ids: np.ndarray, prefix: tuple[int, ...]) -> bool:
    """Whether ``ids`` begins with ``prefix`` (an empty one counts)."""
    return ids[: len(prefix)].tolist() == list(prefix)


def ends_with(ids: np.ndarray, suffix: tuple[int, ...]) -> bool:
    """Whether ``ids`` ends with ``suffix`` (an empty one counts)."""
    return not suffix or ids[-len(suffix) :].tolist() == list(suffix)


class Tokenizer:
    """The fast tokenizer in a model's directory, loaded when it is first used.

    Raises:
        UsageError: the directory holds no tokenizer; when first used: it cannot be loaded, or is a slow one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
        if not self._files:
            raise UsageError(
                f"{directory} holds no tokenizer (tokenizer.json).\n"
                "Copy the tokenizer files of the model's publisher beside its config.json."
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the tokenizer's files; does not load it."""
        digest = hashlib.sha256()
        for file in self._files:
            data = file.read_bytes()
            digest.update(f"{file.name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    @cached_property
    def fast(self) -> Any:
        """The tokenizer as transformers gives it (a ``PreTrainedTokenizerFast``)."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.directory, use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # a damaged tokenizer file surfaces as any of a dozen types
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{self.directory}: its tokenizer cannot be loaded: {reason}") from error
        if not tokenizer.is_fast:
            raise UsageError(
                f"{self.directory}: only a slow tokenizer ({type(tokenizer).__name__}) is there.\n"
                "A fast one is needed: a tokenizer.json, which the model's publisher usually has."
            )
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens, those without a role of their own too."""
        added = self.fast.added_tokens_decoder
        return tuple(sorted({*self.fast.all_special_ids, *(id_ for id_, token in added.items() if token.special)}))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids [n] int32 of every text; nothing is inserted. Runs on all of tokenizers' threads."""
        encodings = self.fast.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of ``ids`` [n], special tokens spelled out."""
        return self.fast.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def framing(self, config: Any) -> Framing:
        """Return ``config``'s prefixes, suffix and masked tokens as ids.

        ``sequence_prefix`` defaults to BOS and ``document_suffix`` to EOS where the tokenizer has one,
        ``document_prefix`` to nothing.

        Raises:
            UsageError: an id outside the vocabulary, or a ``sequence_prefix`` that leaves a sequence no room.
        """
        fast = self.fast
        prefix = self._ids("sequence_prefix", config.sequence_prefix, fast.bos_token_id)
        if len(prefix) >= config.sequence_len:
            raise UsageError(
                f"sequence_prefix has {len(prefix)} tokens, which leaves no room in sequences of "
                f"{config.sequence_len} (sequence_len)."
            )
        pad_ids = [id_ for id_ in (fast.pad_token_id, fast.eos_token_id) if id_ is not None]
        return Framing(
            sequence_prefix=prefix,
            document_prefix=self._ids("document_prefix", config.document_prefix, None),
            document_suffix=self._ids("document_suffix", config.document_suffix, fast.eos_token_id),
            masked=self._masked(config.mask_tokens),
            pad_id=pad_ids[0] if pad_ids else 0,
        )

    def _ids(self, key: str, value: TokenSpec, default: int | None) -> tuple[int, ...]:
        if value is None:
            return () if default is None else (default,)
        if isinstance(value, str):
            return tuple(self.encode([value])[0].tolist())
        ids = (value,) if isinstance(value, int) else tuple(value)
        outside = [id_ for id_ in ids if not 0 <= id_ < len(self.fast)]
        if outside:
            raise UsageError(
                f"{key}: {', '.join(map(str, outside))} is outside the tokenizer's vocabulary of {len(self.fast)} "
                f"tokens ({self.directory})."
            )
        return ids

    def _masked(self, value: Any) -> tuple[int, ...]:
        if value is True:
            return self.special_ids
        return self._ids("mask_tokens", None if value is False else value, None)
