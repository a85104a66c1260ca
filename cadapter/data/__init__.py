"""Documents in, batches out: reading, tokenising, packing, the cache, and which sequences make up a step."""

from __future__ import annotations

from cadapter.data.other_texts import documents_from_file
from cadapter.data.preparing import (
    DatasetReport,
    KnownCounts,
    PreparedData,
    fingerprint_of,
    known_counts,
    load_tokenizer,
    prepare_data,
)
from cadapter.data.sequences import HeldOutDocument, PackedSequences
from cadapter.data.tokenising import Tokenizer

__all__ = [
    "DatasetReport",
    "HeldOutDocument",
    "KnownCounts",
    "PackedSequences",
    "PreparedData",
    "Tokenizer",
    "documents_from_file",
    "fingerprint_of",
    "known_counts",
    "load_tokenizer",
    "prepare_data",
]
