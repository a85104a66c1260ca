"""Making one cached stream: read, tokenise, split, pack."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cadapter.config import Config
from cadapter.data import arrow, cache
from cadapter.data.bad_records import BadRecords
from cadapter.data.fitting import each_in_one
from cadapter.data.packing import Layout, Pieces, SequenceBlock, in_a_row, pack
from cadapter.data.shuffling import shuffled
from cadapter.data.splitting import Portion, split_documents
from cadapter.data.statistics import histogram
from cadapter.data.store import Dataset, TokenStore, write_store
from cadapter.data.tokenising import Framing, Tokenizer, starts_with
from cadapter.errors import UsageError
from cadapter.terminal import progress


def layout_of(config: Config, framing: Framing) -> Layout:
    """Return how sequences of ``config`` look."""
    return Layout(config.sequence_len, framing.sequence_prefix, framing.pad_id, config.document_attention == "isolated")


def build_stream(
    config: Config,
    stream: list[Dataset],
    tokenizer: Tokenizer,
    hashes: dict[Path, cache.FileState],
    bad: BadRecords,
    directory: Path,
) -> dict[str, Any]:
    """Write the Arrow files of the stream of the datasets ``stream`` into ``directory``; return what was counted.

    ``hashes`` are the files' states that the cache's key was made from; ``bad`` is told of unusable records.

    Raises:
        UsageError: a file that cannot be used or that changed meanwhile, an empty dataset, nothing to train on.
    """
    framing = tokenizer.framing(config)
    layout = layout_of(config, framing)
    name = stream[0].name if len(stream) == 1 else f"{len(stream)} datasets"
    with tempfile.TemporaryDirectory(dir=directory, prefix="tokens-") as folder:
        with progress(f"Tokenising {name}", unit="records") as advance:
            store = write_store(
                Path(folder), stream, tokenizer, framing, config.seed, config.sequence_len, bad, advance
            )
        with closing(store):
            for file in (file for dataset in stream for file in dataset.files):
                if not hashes[file].is_that_of(file):
                    raise UsageError(f"{file} changed while it was being read.\nRun the command again.")
            portions = [_portions(config, dataset, number, store, layout) for number, dataset in enumerate(stream)]
            counted = [_counted(store, number, *pair) for number, pair in enumerate(portions)]
            arrow.write_fingerprints(directory / cache.TEXTS, *_fingerprints(store, portions))
            train, evaluation = (_pieces(store, [pair[half] for pair in portions]) for half in (0, 1))
            del portions  # with millions of documents, what is known of each is what takes memory
            if config.mix_datasets:
                train = train.select(shuffled(len(train), "mix", config.seed))
            packed = [
                _write_sequences(directory / file, config, stream, pieces, store, layout)
                for file, pieces in ((cache.TRAIN, train), (cache.EVALUATION, evaluation))
            ]
            largest = [each.largest for each in packed]
            arrow.write_documents(directory / cache.DOCUMENTS, _alone_each(store, evaluation, layout, largest))
            check_vocabulary(tokenizer.directory, max(largest))
    return {
        "datasets": counted,
        "dropped_tokens": sum(each.dropped for each in packed),
        "split_documents": sum(each.split for each in packed),
        "largest_id": max(largest),
    }


def _counted(store: TokenStore, number: int, train: Portion, held: Portion) -> dict[str, Any]:
    """Return what became of the documents of dataset ``number``."""
    low, high = store.documents_of(number)
    # A single document that is split lies in both portions.
    both = int(len(train.documents) == len(held.documents) == 1 and bool((train.documents == held.documents).all()))
    return {
        "documents": len(train.documents),
        "eval_documents": len(held.documents),
        "tokens": train.tokens,
        "eval_tokens": held.tokens,
        "over_limit": high - low - len(train.documents) - len(held.documents) + both,
        "lengths": histogram(np.diff(store.offsets[low : high + 1])),
        **asdict(store.counts[number]),
    }


def _fingerprints(store: TokenStore, portions: list[tuple[Portion, Portion]]) -> tuple[np.ndarray, ...]:
    """Return, for each document used: the key of its text, its class, and whether it is held out."""
    documents = np.concatenate([pair[half].documents for half in (0, 1) for pair in portions])
    held_out = np.ones(len(documents), bool)
    held_out[: sum(len(train.documents) for train, _ in portions)] = False
    return store.texts[documents], store.classes[documents], held_out


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
    low, high = store.documents_of(number)
    limits = [limit for limit in (dataset.max_tokens,) if limit is not None]
    if config.mix_datasets and dataset.max_sequences is not None:
        limits.append(dataset.max_sequences * layout.capacity)
    lengths, keys = np.diff(store.offsets[low : high + 1]), store.keys[low:high]
    halves = split_documents(lengths, keys, config.eval_fraction, min(limits, default=None), dataset.whole)
    train, evaluation = (Portion(half.documents + low, half.starts, half.stops) for half in halves)
    return train, evaluation


def _pieces(store: TokenStore, portions: list[Portion]) -> Pieces:
    documents = np.concatenate([portion.documents for portion in portions])
    starts, stops = store.offsets[documents], store.offsets[documents]
    starts += np.concatenate([portion.starts for portion in portions])
    stops += np.concatenate([portion.stops for portion in portions])
    return Pieces(
        starts=starts,
        stops=stops,
        classes=store.classes[documents],
        datasets=store.datasets[documents],
        repeats=store.repeats[documents] & (starts == store.offsets[documents]),
    )


class _Packed(NamedTuple):
    """What was packed into one file: tokens left out, documents in several sequences, and the largest token id."""

    dropped: int
    split: int
    largest: int


def _write_sequences(
    file: Path, config: Config, stream: list[Dataset], pieces: Pieces, store: TokenStore, layout: Layout
) -> _Packed:
    """Pack ``pieces`` into ``file``: those that may be cut, then those that stay whole.

    Raises:
        UsageError: there would be nothing to train on.
    """
    drop_tails, whole = (
        np.array([getattr(each, key) for each in stream])[pieces.datasets] for key in ("drop_tails", "whole")
    )
    # With nothing but such documents, a last sequence that would need padding is a tail as well.
    drop_last = bool(len(pieces) and drop_tails.all())
    cut, kept = (pieces if mask.all() else pieces.select(mask) for mask in (~whole, whole))
    placed = [in_a_row(cut, layout, drop_tails[~whole]), each_in_one(kept, layout)]
    blocks: Iterator[SequenceBlock] = chain(
        pack(placed[0], store.read, layout, drop_last),
        pack(placed[1], store.read, layout),
    )
    if not config.mix_datasets and stream[0].max_sequences is not None:
        limit = stream[0].max_sequences
        if file.name == cache.EVALUATION:
            limit = max(1, round(config.eval_fraction * limit))
        total = placed[0].sequences(layout, drop_last) + placed[1].sequences(layout)
        blocks = _sample(blocks, total, limit, config.seed)
    counted = _Counted(blocks)
    with progress("Packing", total=pieces.tokens, unit="tokens") as advance:
        arrow.write_sequences(file, counted, layout.sequence_len, advance)
    if file.name == cache.TRAIN:
        _refuse_nothing(stream, counted, pieces.tokens, layout)
    replaced = int(sum((each.pieces.starts.sum() for each in placed), start=-pieces.starts.sum()))
    return _Packed(
        dropped=pieces.tokens - replaced - (counted.tokens - counted.sequences * len(layout.prefix)),
        split=placed[0].split(layout),
        largest=counted.largest,
    )


class _Counted:
    """Iterates over blocks and counts what went by."""

    def __init__(self, blocks: Iterator[SequenceBlock]) -> None:
        self._blocks = blocks
        self.sequences = self.tokens = self.positions = self.largest = 0

    def __iter__(self) -> Iterator[SequenceBlock]:
        for block in self._blocks:
            self.sequences += len(block)
            self.tokens += int(block.tokens.sum(dtype=np.int64))
            self.positions += int(block.counts.sum(dtype=np.int64))
            self.largest = max(self.largest, int(block.ids.max()))
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


def alone(ids: np.ndarray, trained: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, int]:
    """Return one document by itself: (ids int32, trained bool), each [n], n at most ``sequence_len``, and what was cut.

    It is the sequence prefix, which is not doubled where the document begins with it, and the document's ``ids``.
    """
    if starts_with(ids, layout.prefix):
        ids, trained = ids[len(layout.prefix) :], trained[len(layout.prefix) :]
    ids = np.concatenate([np.array(layout.prefix, np.int32), ids])
    trained = np.concatenate([np.zeros(len(layout.prefix), bool), trained])
    length = layout.sequence_len
    return ids[:length], trained[:length], max(0, len(ids) - length)


def _alone_each(
    store: TokenStore, pieces: Pieces, layout: Layout, largest: list[int]
) -> Iterator[arrow.NumberedDocument]:
    """Yield the documents ``pieces`` by themselves; the largest token id of each goes to ``largest``."""
    for number in range(len(pieces)):
        own = pieces.select(np.array([number]))
        ids, trained, cut = alone(*store.read(own.starts, own.stops), layout)
        largest.append(int(ids.max()))
        yield int(own.datasets[0]), int(own.classes[0]), ids, trained, cut
