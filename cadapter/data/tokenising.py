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

from cadapter.data.chat import Chat, ChatTemplate, Span
from cadapter.data.parts import grouped, parts_of
from cadapter.errors import UsageError
from cadapter.files import refuse_links_out
from cadapter.models import own_code

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json", "chat_template.jinja",
)  # fmt: skip

CHARACTERS_AT_ONCE = 1 << 20
"""The tokenizer's own form of a token takes some hundred bytes: 100 MB for so many characters."""

TokenSpec = str | int | Sequence[int] | None


@dataclass(frozen=True)
class Framing:
    """Token ids around the text, and those that are not trained; every field as ids of the tokenizer.

    ``chat_suffix`` is what ends a chat: a ``document_suffix`` of the config, but not the default, since a chat template
    writes itself what ends a turn. ``bos_id`` is None where the tokenizer has no BOS.
    """

    sequence_prefix: tuple[int, ...]
    document_prefix: tuple[int, ...]
    document_suffix: tuple[int, ...]
    chat_suffix: tuple[int, ...]
    masked: tuple[int, ...]
    pad_id: int
    bos_id: int | None

    def document(self, ids: np.ndarray) -> np.ndarray:
        """Return ``document_prefix + ids + document_suffix`` [n] int32; what the text already has is not doubled."""
        return self._framed(ids, self.document_suffix)[0]

    def chat(self, ids: np.ndarray, trained: np.ndarray, answered: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a chat's ids and which of them are trained, both framed: what is added is not trained.

        But for the suffix where the chat is ``answered``: there it ends the assistant's last turn.

        Raises:
            UsageError: it begins with BOS twice.
        """
        framed, head, tail = self._framed(ids, self.chat_suffix)
        if self.bos_id is not None and framed[: head + 2].tolist().count(self.bos_id) > 1:
            raise UsageError(
                f"{where}: the chat begins with BOS twice: its ids begin with {framed[: head + 8].tolist()}.\n"
                "The chat template writes BOS itself; leave it out of document_prefix and of the messages."
            )
        return framed, np.concatenate([np.zeros(head, bool), trained, np.full(tail, answered)])

    def _framed(self, ids: np.ndarray, suffix: tuple[int, ...]) -> tuple[np.ndarray, int, int]:
        """Return the framed ids, and how many tokens were put in front and behind."""
        head = () if starts_with(ids, self.document_prefix) else self.document_prefix
        tail = () if ends_with(ids, suffix) else suffix
        if not head and not tail:
            return ids, 0, 0
        return np.concatenate([np.array(head, np.int32), ids, np.array(tail, np.int32)]), len(head), len(tail)


def starts_with(ids: np.ndarray, prefix: tuple[int, ...]) -> bool:
    """Whether ``ids`` begins with ``prefix`` (an empty one counts)."""
    return ids[: len(prefix)].tolist() == list(prefix)


def ends_with(ids: np.ndarray, suffix: tuple[int, ...]) -> bool:
    """Whether ``ids`` ends with ``suffix`` (an empty one counts)."""
    return not suffix or ids[-len(suffix) :].tolist() == list(suffix)


def _token_at(encoding: Any, character: int, length: int) -> int:
    """Return the first token that has ``character`` of the text, else that has a later one, else their count."""
    for position in range(character, length):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return len(encoding)


class Tokenizer:
    """The fast tokenizer in a model's directory, loaded when it is first used.

    Args:
        directory: the model's.
        trust_remote_code: run the tokenizer's own code, where it has some.

    Raises:
        UsageError: the directory holds no tokenizer; when first used: it cannot be loaded, or is a slow one.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self._trusted = trust_remote_code
        self._files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
        if not self._files:
            raise UsageError(
                f"{directory} holds no tokenizer (tokenizer.json).\n"
                "Copy the tokenizer files of the model's publisher beside its config.json."
            )
        refuse_links_out(directory, ("*.json", "*.model", "*.txt", "*.jinja"))

    @cached_property
    def _own(self) -> list[str]:
        return own_code.tokenizer_classes(self.directory)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the tokenizer's files, and of code that is run; does not load it."""
        digest = hashlib.sha256()
        code = own_code.code_files(self.directory) if self._trusted and self._own else []
        for file in [*self._files, *code]:
            data = file.read_bytes()
            digest.update(f"{file.name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    @cached_property
    def fast(self) -> Any:
        """The tokenizer as transformers gives it (a ``PreTrainedTokenizerFast``)."""
        try:
            tokenizer = self._load()
        except UsageError:
            raise
        except BaseException as error:  # a damaged tokenizer file surfaces as any of a dozen types
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is tokenizers'
                raise
            if isinstance(error, ValueError) and not self._trusted and self._own:
                raise own_code.refusal(self.directory, own_code.TOKENIZER_CONFIG, self._own) from error
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

    def _load(self) -> Any:
        from transformers import AutoTokenizer

        if not (self._trusted and self._own):
            return AutoTokenizer.from_pretrained(
                self.directory, use_fast=True, trust_remote_code=False, local_files_only=True
            )
        from cadapter.models.checkpoint import load_model_config

        # Given, or transformers would load it itself, and with it code of the model's that nobody needs.
        config = load_model_config(self.directory, trust_remote_code=True)
        with own_code.running(self.directory):
            return AutoTokenizer.from_pretrained(
                self.directory, config=config, use_fast=True, trust_remote_code=True, local_files_only=True
            )

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The ids of all special tokens, those without a role of their own too."""
        added = self.fast.added_tokens_decoder
        return tuple(sorted({*self.fast.all_special_ids, *(id_ for id_, token in added.items() if token.special)}))

    @property
    def _encoder(self) -> Any:
        return self.fast.backend_tokenizer

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.special_ids)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.fast, str(self.directory))

    def render_chat(self, messages: Any, tools: Any, where: str) -> Chat:
        """Return a chat as text, see :meth:`ChatTemplate.render`.

        Raises:
            UsageError: there is no chat template, or it cannot render this.
        """
        return self._chat_template.render(messages, tools, where)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids [n] int32 of every text; nothing is inserted. Runs on all of tokenizers' threads.

        Long texts are taken in parts, so that memory stays bounded and all threads have work.
        """
        parts = [(index, part) for index, text in enumerate(texts) for part in parts_of(text, self._encode_one)]
        found: list[list[np.ndarray]] = [[] for _ in texts]
        for group in grouped(parts, lambda part: len(part[1]), CHARACTERS_AT_ONCE):
            encodings = self._encoder.encode_batch_fast([text for _, text in group], add_special_tokens=False)
            for (index, _), encoding in zip(group, encodings, strict=True):
                found[index].append(np.array(encoding.ids, dtype=np.int32))
        return [arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in found]

    def _encode_one(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_spans(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return, for every text, its ids [n] int32 and, [n] bool, which of them lie within its ``spans``.

        A token that begins before a span or ends behind it is outside. So is white space that a span has behind a
        special token at its end: ChatML's line break after the end of a turn, which no model has to write.
        """
        encodings = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        result = []
        for text, encoding, own in zip(texts, encodings, spans, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            trained = np.zeros(len(ids), bool)
            for start, stop in own:
                first, last = _token_at(encoding, start, len(text)), _token_at(encoding, stop, len(text))
                while first < last and encoding.token_to_chars(first)[0] < start:
                    first += 1
                stop = encoding.token_to_chars(last - 1)[1] if first < last else stop
                end = _token_at(encoding, start + len(text[start:stop].rstrip()), len(text))
                if first < end < last and ids[end - 1] in self._special:
                    last = end
                trained[first:last] = True
            result.append((ids, trained))
        return result

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of ``ids`` [n], special tokens spelled out."""
        return self.fast.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def decode_pieces(self, ids: np.ndarray, begins: np.ndarray) -> list[str]:
        """Return the text of ``ids`` [n] in pieces, each from one of ``begins`` to the next.

        A piece that ends within a character leaves all of it to the next.
        """
        pieces, begin = [], 0
        for end in [*begins[1:], len(ids)]:
            text = self.decode(ids[begin:end])
            if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
                pieces.append("")
            else:
                pieces.append(text)
                begin = end
        return pieces

    def framing(self, config: Any) -> Framing:
        """Return ``config``'s prefixes, suffix and masked tokens as ids.

        ``sequence_prefix`` defaults to BOS and ``document_suffix`` to EOS where the tokenizer has one,
        ``document_prefix`` to nothing, or, where documents are isolated, to ``sequence_prefix``: each stands alone.

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
        alone = config.document_attention == "isolated" and config.document_prefix is None
        suffix = self._ids("document_suffix", config.document_suffix, fast.eos_token_id)
        pad_ids = [id_ for id_ in (fast.pad_token_id, fast.eos_token_id) if id_ is not None]
        return Framing(
            sequence_prefix=prefix,
            document_prefix=prefix if alone else self._ids("document_prefix", config.document_prefix, None),
            document_suffix=suffix,
            chat_suffix=() if config.document_suffix is None else suffix,
            masked=self._masked(config.mask_tokens),
            pad_id=pad_ids[0] if pad_ids else 0,
            bos_id=fast.bos_token_id,
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
