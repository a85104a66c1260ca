"""From a config to packed sequences: find the cached streams, or build them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cadapter.config import Config
from cadapter.data import cache
from cadapter.data.building import alone, build_stream, check_vocabulary, layout_of
from cadapter.data.sequences import HeldOutDocument, PackedSequences
from cadapter.data.sources import COMPRESSIONS, read_documents, resolve_files
from cadapter.data.store import Dataset
from cadapter.data.tokenising import Tokenizer
from cadapter.errors import UsageError
from cadapter.terminal import note, progress, warn

_SHARED_OPTIONS = (
    "sequence_len", "sequence_prefix", "document_prefix", "document_suffix", "mask_tokens", "seed", "eval_fraction",
    "mix_datasets",
)  # fmt: skip
_DATASET_OPTIONS = ("control_class", "text_field", "max_tokens", "max_sequences", "drop_tails")


@dataclass(frozen=True)
class DatasetReport:
    """What became of one dataset. With ``mix_datasets`` the numbers below ``cache_reason`` are those of the mixture.

    Attributes:
        documents: documents to train on; ``eval_documents``: held out (a part of a single document counts as one).
        empty_documents: documents without text, left out.
        tokens, eval_tokens: tokens of those documents, their prefixes and suffixes included.
        cache_hit, cache_reason: whether the cache was used, or else why not.
        sequences, eval_sequences: packed sequences.
        padding, eval_padding: tokens of padding in them.
        dropped_tokens: tokens left out by ``drop_tails`` and ``max_sequences``.
        trained, eval_trained: trained positions of class +1 and of class −1, and neutral positions.
    """

    name: str
    path: str
    control_class: int
    documents: int
    eval_documents: int
    empty_documents: int
    tokens: int
    eval_tokens: int
    cache_hit: bool
    cache_reason: str
    sequences: int
    eval_sequences: int
    padding: int
    eval_padding: int
    dropped_tokens: int
    trained: tuple[int, int, int]
    eval_trained: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class PreparedData:
    """The data of a run.

    Attributes:
        train: packed sequences to train on.
        evaluation: packed sequences of the held-out documents; None where nothing is held out.
        documents: the held-out documents one by one.
        reports: one for each dataset of the config, in its order.
        fingerprint: SHA-256 (hex) of everything the sequences depend on; equal fingerprints mean equal sequences.
        tokenizer: the model's tokenizer, loaded when it is first used.
        directories: the cache's directories.
    """

    train: PackedSequences
    evaluation: PackedSequences | None
    documents: list[HeldOutDocument]
    reports: list[DatasetReport]
    fingerprint: str
    tokenizer: Tokenizer
    directories: list[Path]


def load_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer of ``config.model_dir``, a directory or a hub id.

    Raises:
        UsageError: there is no such model, or it has no tokenizer.
    """
    directory = Path(os.path.expanduser(config.model_dir))
    if not directory.is_dir():
        from cadapter.models.checkpoint import resolve_model  # needs torch, which a local directory does not

        directory = resolve_model(config.model_dir)
    return Tokenizer(directory)


def prepare_data(config: Config, *, force: bool = False) -> PreparedData:
    """Return the packed sequences of ``config``, from the cache where it has them; ``force`` builds them anew.

    Every dataset is a stream of its own; with ``mix_datasets`` there is one stream of all documents, in an order
    shuffled by the seed. Any number of processes may call this at once; only the first needs to.

    Raises:
        UsageError: a file or tokenizer that cannot be used, an empty dataset, nothing to train on.
        CadapterError: the cache cannot be written.
    """
    tokenizer = load_tokenizer(config)
    datasets = _datasets(config)
    hashes = _file_hashes(datasets)
    streams = [datasets] if config.mix_datasets else [[dataset] for dataset in datasets]
    store = cache.Cache(_cache_directory(config, datasets), note)

    entries, reports, keys, done = [], [], [], set()
    built: list[Path] = []
    for stream in streams:
        recipe = _recipe(config, stream, tokenizer, hashes)
        found, reason = (None, "forced") if force and recipe.key not in done else store.find(recipe)
        build = partial(build_stream, config, stream, tokenizer, hashes)
        try:
            directory = found or store.build(recipe, build, replace=reason == "forced")
        except UsageError:
            store.discard(built)  # a config that cannot be used leaves nothing behind
            raise
        if not found and reason != "forced":  # what was rebuilt by force may stand for an entry that was there
            built.append(directory)
        done.add(recipe.key)
        entry = cache.open_entry(directory, config.sequence_len, [dataset.name for dataset in stream])
        entries.append(entry)
        keys.append(recipe.key)
        reports += _reports(stream, entry, found is not None, reason)

    train, evaluation = (
        PackedSequences.joined([getattr(entry, part) for entry in entries]) for part in ("train", "evaluation")
    )
    _warn_without_evaluation(config, reports)
    return PreparedData(
        train=train,
        evaluation=evaluation if len(evaluation) else None,
        documents=[document for entry in entries for document in entry.documents],
        reports=reports,
        fingerprint=hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        tokenizer=tokenizer,
        directories=[entry.directory for entry in entries],
    )


def documents_from_file(
    path: str, control_class: int, config: Config, tokenizer: Tokenizer, text_field: str = "text"
) -> list[HeldOutDocument]:
    """Return the documents of ``path`` (a file or a glob), framed and cut like a run's own held-out ones.

    Raises:
        UsageError: the files cannot be used or hold no documents.
    """
    framing = tokenizer.framing(config)
    layout = layout_of(config, framing)
    texts = [document.text for document in read_documents(resolve_files(path), text_field) if document.text.strip()]
    ids = [framing.document(ids) for ids in tokenizer.encode(texts) if len(ids)]
    if not ids:
        raise UsageError(f"{path} has no documents.")
    check_vocabulary(tokenizer.directory, max(int(each.max()) for each in ids))
    return [HeldOutDocument(_stem(path), control_class, *alone(each, layout)) for each in ids]


def _datasets(config: Config) -> list[Dataset]:
    """Return the datasets of ``config`` with their files; equal names are told apart by their paths or numbers."""
    stems = Counter(_stem(dataset.dataset_path) for dataset in config.datasets)
    paths = Counter(dataset.dataset_path for dataset in config.datasets)
    result = []
    for number, dataset in enumerate(config.datasets, 1):
        path = dataset.dataset_path
        name = _stem(path) if stems[_stem(path)] == 1 else path if paths[path] == 1 else f"{path} ({number})"
        result.append(
            Dataset(
                name=name,
                path=path,
                files=tuple(resolve_files(path)),
                text_field=dataset.text_field,
                control_class=dataset.control_class,
                max_tokens=dataset.max_tokens,
                max_sequences=config.max_sequences if dataset.max_sequences is None else dataset.max_sequences,
                drop_tails=config.drop_tails if dataset.drop_tails is None else dataset.drop_tails,
            )
        )
    return result


def _stem(path: str) -> str:
    """Return the file's name without its endings; a glob is its own name."""
    if any(sign in path for sign in "*?["):
        return path
    file = Path(path)
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSIONS else file.stem


def _cache_directory(config: Config, datasets: list[Dataset]) -> Path:
    if config.cache_dir is not None:
        return Path(os.path.expanduser(config.cache_dir))
    return datasets[0].files[0].parent / cache.FOLDER


def _file_hashes(datasets: list[Dataset]) -> dict[Path, str]:
    """Return the SHA-256 of every file, each read once."""
    files = dict.fromkeys(file for dataset in datasets for file in dataset.files)
    hashes = {}
    with progress("Comparing files with the cache", total=len(files), unit="files") as advance:
        for file in files:
            try:
                hashes[file] = cache.file_hash(file)
            except OSError as error:
                raise UsageError(f"{file} cannot be read: {error.strerror}.") from error
            advance()
    return hashes


def _recipe(config: Config, stream: list[Dataset], tokenizer: Tokenizer, hashes: dict[Path, str]) -> cache.Recipe:
    options = {key: getattr(config, key) for key in _SHARED_OPTIONS}
    each = [{key: getattr(dataset, key) for key in _DATASET_OPTIONS} for dataset in stream]
    return cache.Recipe(
        sources=[os.path.abspath(os.path.expanduser(dataset.path)) for dataset in stream],
        files=[{str(file.absolute()): hashes[file] for file in dataset.files} for dataset in stream],
        tokenizer=tokenizer.fingerprint,
        options={**options, "datasets": each},
    )


def _reports(stream: list[Dataset], entry: cache.Entry, hit: bool, reason: str) -> list[DatasetReport]:
    train, evaluation = entry.train, entry.evaluation
    return [
        DatasetReport(
            name=dataset.name,
            path=dataset.path,
            control_class=dataset.control_class,
            **statistics,
            cache_hit=hit,
            cache_reason=reason,
            sequences=len(train),
            eval_sequences=len(evaluation),
            padding=train.padding,
            eval_padding=evaluation.padding,
            dropped_tokens=entry.statistics["dropped_tokens"],
            trained=train.trained,
            eval_trained=evaluation.trained,
        )
        for dataset, statistics in zip(stream, entry.statistics["datasets"], strict=True)
    ]


def _warn_without_evaluation(config: Config, reports: list[DatasetReport]) -> None:
    for report in reports:
        if config.eval_fraction and not report.eval_sequences:
            why = "its held-out documents do not fill one" if report.eval_documents else "it has too little text"
            warn(f"{report.path} gives no sequence for evaluation: {why}.")
