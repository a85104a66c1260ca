"""Making one cached stream: read, tokenise, split, pack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cadapter.config import Config
from cadapter.data import cache
from cadapter.data.packing import Layout, Pieces, SequenceBlock, pack, trim
from cadapter.data.shuffling import shuffled
from cadapter.data.splitting import Portion, split_documents
from cadapter.data.store import Dataset, TokenStore, write_store
from cadapter.data.tokenising import Framing, Tokenizer, starts_with
from cadapter.errors import UsageError
from cadapter.terminal import progress


def layout_of(config: Config, framing: Framing) -> Layout:
    """Return how sequences of ``config`` look."""
    return Layout(config.sequence_len, framing.sequence_prefix, framing.pad_id, framing.masked)


def build_stream(
    config: Config, stream: list[Dataset], tokenizer: Tokenizer, hashes: dict[Path, str], directory: Path
) -> dict[str, Any]:
    """Write the Arrow files of the stream of the datasets ``stream`` into ``directory``; return what was counted.

    ``hashes`` are the files' SHA-256 that the cache's key was made from.

    Raises:
        UsageError: a file that cannot be used or that changed meanwhile, an empty dataset, nothing to train on.
    """
    framing = tokenizer.framing(config)
    layout = layout_of(config, framing)
    tokens_file = directory / "tokens.bin"
    name = stream[0].name if len(stream) == 1 else f"{len(stream)} datasets"
    with progress(f"Preparing {name}", unit="documents") as advance:
        store = write_store(tokens_file, stream, tokenizer, framing, config.seed, advance)
        check_vocabulary(tokenizer.directory, int(store.tokens.max()))
        portions = [_portions(config, dataset, number, store, layout) for number, dataset in enumerate(stream)]
        train, evaluation = (_pieces(store, [pair[half] for pair in portions]) for half in (0, 1))
        if config.mix_datasets:
            train = train.select(shuffled(len(train), "mix", config.seed))
        dropped = 0
        for file, pieces in ((cache.TRAIN, train), (cache.EVALUATION, evaluation)):
            dropped += _write_sequences(directory / file, config, stream, pieces, store.tokens, layout)
        cache.write_documents(directory / cache.DOCUMENTS, _alone_each(store, evaluation, layout))
    tokens_file.unlink()
    changed = [file for dataset in stream for file in dataset.files if cache.file_hash(file) != hashes[file]]
    if changed:
        raise UsageError(f"{changed[0]} changed while it was being read.\nRun the command again.")
    counted = [
        {
            "documents": len(train.documents),
            "eval_documents": len(held.documents),
            "empty_documents": store.empty[number],
            "tokens": train.tokens,
            "eval_tokens": held.tokens,
        }
        for number, (train, held) in enumerate(portions)
    ]
    return {"datasets": counted, "dropped_tokens": dropped}


def check_vocabulary(directory: Path, largest: int) -> None:
    """Check that the token id ``largest`` is one that the model in ``directory`` has an embedding for.

    Raises:
        UsageError: it has not, as its config.json says.
    """
    try:
        size = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return  # whether this is a model at all is not decided here
    if isinstance(size, int) and largest >= size:
        raise UsageError(
            f"The tokenizer in {directory} gives token id {largest}, but the model has {size} (vocab_size of its "
            "config.json).\nThe tokenizer and the model do not belong together."
        )


def _portions(
    config: Config, dataset: Dataset, number: int, store: TokenStore, layout: Layout
) -> tuple[Portion, Portion]:
    """Return (training, evaluation) of one dataset of the store, ``documents`` as numbers in the store."""
    own = np.flatnonzero(store.datasets == number)
    lengths = np.diff(store.offsets)[own]
    limits = [limit for limit in (dataset.max_tokens,) if limit is not None]
    if config.mix_datasets and dataset.max_sequences is not None:
        limits.append(dataset.max_sequences * layout.capacity)
    halves = split_documents(lengths, store.keys[own], config.eval_fraction, min(limits, default=None))
    train, evaluation = (Portion(own[half.documents], half.starts, half.stops) for half in halves)
    return train, evaluation


def _pieces(store: TokenStore, portions: list[Portion]) -> Pieces:
    documents = np.concatenate([portion.documents for portion in portions])
    begins = store.offsets[documents]
    return Pieces(
        starts=begins + np.concatenate([portion.starts for portion in portions]),
        stops=begins + np.concatenate([portion.stops for portion in portions]),
        classes=store.classes[documents],
        datasets=store.datasets[documents],
    )


def _write_sequences(
    file: Path, config: Config, stream: list[Dataset], pieces: Pieces, tokens: np.ndarray, layout: Layout
) -> int:
    """Pack ``pieces`` into ``file`` and return how many of their tokens were left out.

    Raises:
        UsageError: there would be nothing to train on.
    """
    drop_tails = np.array([dataset.drop_tails for dataset in stream])
    trimmed = trim(pieces, tokens, layout, drop_tails[pieces.datasets])
    drop_last = bool(drop_tails.all())
    blocks = pack(trimmed, tokens, layout, drop_last)
    if not config.mix_datasets and stream[0].max_sequences is not None:
        limit = stream[0].max_sequences
        if file.name == cache.EVALUATION:
            limit = max(1, round(config.eval_fraction * limit))
        blocks = _sample(blocks, layout.count(trimmed.tokens, drop_last), limit, config.seed)
    counted = _Counted(blocks)
    cache.write_sequences(file, counted, layout.sequence_len)
    if file.name == cache.TRAIN:
        _refuse_nothing(stream, counted, pieces.tokens, layout)
    replaced = int((trimmed.starts - pieces.starts).sum())
    return pieces.tokens - replaced - (counted.tokens - counted.sequences * len(layout.prefix))


class _Counted:
    """Iterates over blocks and counts what went by."""

    def __init__(self, blocks: Iterator[SequenceBlock]) -> None:
        self._blocks = blocks
        self.sequences = self.tokens = self.positions = 0

    def __iter__(self) -> Iterator[SequenceBlock]:
        for block in self._blocks:
            self.sequences += len(block)
            self.tokens += int(block.tokens.sum(dtype=np.int64))
            self.positions += int(block.counts.sum(dtype=np.int64))
            yield block


def _refuse_nothing(stream: list[Dataset], counted: _Counted, tokens: int, layout: Layout) -> None:
    names = ", ".join(dataset.path for dataset in stream)
    if not counted.sequences:
        raise UsageError(
            f"{names}: there is no training sequence: {tokens} tokens do not fill one of {layout.sequence_len}, and "
            "drop_tails leaves out what does not.\nSet drop_tails = false, or a smaller sequence_len."
        )
    if not counted.positions:
        raise UsageError(f"{names}: there is no token to train on.\nCheck mask_tokens and document_suffix.")


def _sample(blocks: Iterator[SequenceBlock], total: int, limit: int, seed: int) -> Iterator[SequenceBlock]:
    """Yield at most ``limit`` of the ``total`` sequences, chosen by the seed, in their order."""
    chosen = np.zeros(total, bool)
    chosen[shuffled(total, "max_sequences", seed)[:limit]] = True
    first = 0
    for block in blocks:
        mask = chosen[first : first + len(block)]
        first += len(block)
        if mask.any():
            yield block.select(mask)


def alone(ids: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return one document by itself: (ids int32, trained bool), each [n], n at most ``sequence_len``.

    It is the sequence prefix, which is not doubled where the document begins with it, and the document's ``ids``.
    """
    if starts_with(ids, layout.prefix):
        ids = ids[len(layout.prefix) :]
    ids = np.concatenate([np.array(layout.prefix, np.int32), ids])[: layout.sequence_len]
    trained = ~np.isin(ids, layout.masked)
    trained[: len(layout.prefix)] = False
    return ids, trained


def _alone_each(store: TokenStore, pieces: Pieces, layout: Layout) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    for start, stop, class_, dataset in zip(pieces.starts, pieces.stops, pieces.classes, pieces.datasets, strict=True):
        yield int(dataset), int(class_), *alone(store.tokens[start:stop], layout)
