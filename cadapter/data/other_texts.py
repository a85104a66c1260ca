"""Texts that no run was prepared with, as documents to be scored one by one."""

from __future__ import annotations

import os
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from cadapter.config import Config
from cadapter.data.bad_records import BadRecords
from cadapter.data.building import alone, check_vocabulary, layout_of
from cadapter.data.preparing import fields_of, stem
from cadapter.data.records import Fields
from cadapter.data.sequences import HeldOutDocument
from cadapter.data.sources import format_of, read_records, resolve_files
from cadapter.data.store import Dataset, write_store
from cadapter.data.tokenising import Tokenizer
from cadapter.errors import UsageError
from cadapter.terminal import progress


def documents_from_file(path: str, control_class: int, config: Config, tokenizer: Tokenizer) -> list[HeldOutDocument]:
    """Return the documents of ``path`` (a file or a glob), read, framed and cut like a run's own held-out ones.

    Where its records hold what is as a dataset of the config says: that of the same path, else of the same class, else
    the first one whose fields the file's first record has. All documents get ``control_class``, but for
    preference pairs, of which those of this class are taken.

    Raises:
        UsageError: the files cannot be used or hold no documents.
    """
    files = resolve_files(path)
    fields = _fields(path, files[0], control_class, config)
    if fields.chosen and control_class == 0:
        raise UsageError(f"{path} holds pairs, whose documents have class 1 and -1: give {path}:1 or {path}:-1.")
    dataset = Dataset(stem(path), path, tuple(files), fields, control_class, "split", None, None, False)
    framing = tokenizer.framing(config)
    layout = layout_of(config, framing)
    bad = BadRecords(0, skippable=False)
    with (
        tempfile.TemporaryDirectory(prefix="cadapter-") as folder,
        progress(f"Tokenising {dataset.name}", unit="records") as advance,
        closing(
            write_store(Path(folder), [dataset], tokenizer, framing, config.seed, config.sequence_len, bad, advance)
        ) as store,
    ):
        wanted = np.flatnonzero(store.classes == control_class)
        documents = [
            HeldOutDocument(
                dataset.name,
                control_class,
                *alone(*store.read(store.offsets[d : d + 1], store.offsets[d + 1 : d + 2]), layout),
                pair=(path, number) if fields.chosen else None,  # both sides of every record are there
            )
            for number, d in enumerate(wanted)
        ]
    check_vocabulary(tokenizer.directory, max(int(each.ids.max()) for each in documents))
    return documents


def _fields(path: str, first: Path, control_class: int, config: Config) -> Fields:
    """Where the records of ``path`` hold what, with no class but the one given."""
    place = os.path.abspath(os.path.expanduser(path))
    datasets = sorted(
        config.datasets,
        key=lambda each: (
            os.path.abspath(each.dataset_path) != place,
            each.control_class != control_class,
        ),
    )
    known = [replace(fields_of(dataset), class_=None) for dataset in datasets]
    return next((fields for fields in [*known, Fields()] if _fits(first, fields)), known[0])


def _fits(file: Path, fields: Fields) -> bool:
    """Whether the first record of ``file`` has what ``fields`` ask for."""
    if format_of(file) == ".txt":
        return fields.is_plain_text
    try:
        record = next(read_records([file], fields.needed, fields.optional), None)
    except UsageError:
        return False
    return record is not None and all(name in record.fields for name in fields.needed)
