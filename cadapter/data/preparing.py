"""From a config to packed sequences: find the cached streams, or build them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cadapter.config import Config, DatasetConfig
from cadapter.data import cache
from cadapter.data.bad_records import BadRecords
from cadapter.data.building import build_stream, check_vocabulary
from cadapter.data.records import Fields
from cadapter.data.sequences import HeldOutDocument, PackedSequences, with_pairs
from cadapter.data.sources import COMPRESSIONS, resolve_files
from cadapter.data.store import Dataset
from cadapter.data.tokenising import Tokenizer
from cadapter.errors import UsageError
from cadapter.terminal import note, progress, warn

_SHARED_OPTIONS = (
    "sequence_len", "sequence_prefix", "document_prefix", "document_suffix", "mask_tokens", "seed", "eval_fraction",
    "mix_datasets", "document_attention",
)  # fmt: skip
_DATASET_OPTIONS = ("control_class", "overlength", "max_tokens", "max_sequences", "drop_tails")

_LISTED = 100
"""Of a dataset's bad records, how many are listed."""


@dataclass(frozen=True)
class DatasetReport:
    """What became of one dataset. With ``mix_datasets`` the numbers below ``cache_reason`` are those of the mixture.

    Attributes:
        control_class: None where the records say their class themselves.
        whole: whether each document stays within one sequence.
        documents: documents to train on; ``eval_documents``: held out (a part of a single document counts as one).
        empty_documents: documents without text, left out.
        overlength_documents: left out because they are longer than a sequence.
        truncated_documents, truncated_tokens: cut to the length of a sequence, and what that took away.
        over_limit: documents left out by ``max_tokens`` (in a mixture by ``max_sequences`` too).
        bad_records: what is wrong with each record that could not be used, see ``--skip-bad``.
        tokens, eval_tokens: tokens of the documents, their prefixes and suffixes included.
        lengths: how many documents have 2^(k-1) to 2^k - 1 tokens, for k = 0, 1, …
        cache_hit, cache_reason: whether the cache was used, or else why not.
        sequences, eval_sequences: packed sequences.
        padding, eval_padding: tokens of padding in them.
        dropped_tokens: tokens left out by ``drop_tails`` and ``max_sequences``.
        split_documents: documents that lie in more than one sequence.
        trained, eval_trained: trained positions of class +1 and of class −1, and neutral positions.
    """

    name: str
    path: str
    control_class: int | None
    whole: bool
    documents: int
    eval_documents: int
    empty_documents: int
    overlength_documents: int
    truncated_documents: int
    truncated_tokens: int
    over_limit: int
    bad_records: list[str]
    tokens: int
    eval_tokens: int
    lengths: list[int]
    cache_hit: bool
    cache_reason: str
    sequences: int
    eval_sequences: int
    padding: int
    eval_padding: int
    dropped_tokens: int
    split_documents: int
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
    directory = Path(config.model_dir)
    if not directory.is_dir():
        from cadapter.models.checkpoint import resolve_model  # needs torch, which a local directory does not

        directory = resolve_model(config.model_dir, trust_remote_code=config.trust_remote_code)
    return Tokenizer(directory, config.trust_remote_code)


def prepare_data(config: Config, *, force: bool = False, skip_bad: int | None = None) -> PreparedData:
    """Return the packed sequences of ``config``, from the cache where it has them; ``force`` builds them anew.

    ``skip_bad``: how many records that cannot be used are left out, in all; with one more, the first is an error. None:
    none, but what the cache holds may have been made with some left out.

    Every dataset is a stream of its own; with ``mix_datasets`` there is one stream of all documents, in an order
    shuffled by the seed. Any number of processes may call this at once; only the first needs to.

    Raises:
        UsageError: a file or tokenizer that cannot be used, an empty dataset, nothing to train on.
        CadapterError: the cache cannot be written.
    """
    tokenizer = load_tokenizer(config)
    store, files, streams = _sources(config)
    store.tidy_up()
    bad = BadRecords(skip_bad or 0)

    entries, reports, keys, done = [], [], [], set()
    built: list[Path] = []
    for stream in streams:
        recipe = _recipe(config, stream, tokenizer, files)
        found, reason = (None, "forced") if force and recipe.key not in done else store.find(recipe)
        if found and skip_bad is not None and bad.count + _skipped(found) > skip_bad:
            found, reason = None, "it leaves out more bad records than --skip-bad allows"
        build = partial(build_stream, config, stream, tokenizer, files, bad)
        try:
            directory = found or store.build(recipe, build, replace=reason == "forced")
        except UsageError:
            store.discard(built)  # a config that cannot be used leaves nothing behind
            raise
        if not found and reason != "forced":  # what was rebuilt by force may stand for an entry that was there
            built.append(directory)
        done.add(recipe.key)
        entry = cache.open_entry(directory, config.sequence_len, [dataset.name for dataset in stream])
        if found:
            check_vocabulary(tokenizer.directory, entry.largest_id)  # the model may be another one than then
            bad.count += _skipped(directory)
        entries.append(entry)
        keys.append(recipe.key)
        reports += _reports(stream, entry, found is not None, reason)

    train, evaluation = (
        PackedSequences.joined([getattr(entry, part) for entry in entries]) for part in ("train", "evaluation")
    )
    of_pairs = {dataset.name for stream in streams for dataset in stream if dataset.fields.chosen}
    _warn_without_evaluation(config, reports)
    _list_bad(reports)
    return PreparedData(
        train=train,
        evaluation=evaluation if len(evaluation) else None,
        documents=with_pairs([document for entry in entries for document in entry.documents], of_pairs),
        reports=reports,
        fingerprint=_fingerprint(keys),
        tokenizer=tokenizer,
        directories=[entry.directory for entry in entries],
    )


@dataclass(frozen=True)
class KnownCounts:
    """What the cache knows of a config's data: packed sequences, those held out, and tokens to train on."""

    sequences: int
    eval_sequences: int
    tokens: int


def known_counts(config: Config) -> KnownCounts | None:
    """Look into the cache for the data of ``config`` without building or writing anything; None: it is not there.

    Raises:
        UsageError: a file or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(config)
    store, files, streams = _sources(config)
    sequences = held_out = tokens = 0
    for stream in streams:
        found, _ = store.find(_recipe(config, stream, tokenizer, files))
        if found is None:
            return None
        entry = cache.open_entry(found, config.sequence_len, [dataset.name for dataset in stream])
        sequences, held_out = sequences + len(entry.train), held_out + len(entry.evaluation)
        tokens += int(entry.train.tokens.sum())
    return KnownCounts(sequences, held_out, tokens)


def fingerprint_of(config: Config) -> str:
    """Return what :attr:`PreparedData.fingerprint` would be, without building anything.

    Raises:
        UsageError: a file or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(config)
    _, files, streams = _sources(config)
    return _fingerprint([_recipe(config, stream, tokenizer, files).key for stream in streams])


def _fingerprint(keys: list[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _sources(config: Config) -> tuple[cache.Cache, dict[Path, cache.FileState], list[list[Dataset]]]:
    """Return the cache, the state of every file, and the datasets of each stream."""
    datasets = datasets_of(config)
    store = cache.Cache(_cache_directory(config, datasets), note)
    streams = [datasets] if config.mix_datasets else [[dataset] for dataset in datasets]
    return store, _file_states(datasets, store), streams


def datasets_of(config: Config) -> list[Dataset]:
    """Return the datasets of ``config`` with their files; equal names are told apart by their paths or numbers."""
    stems = Counter(stem(dataset.dataset_path) for dataset in config.datasets)
    paths = Counter(dataset.dataset_path for dataset in config.datasets)
    result = []
    for number, dataset in enumerate(config.datasets, 1):
        path = dataset.dataset_path
        fields = fields_of(dataset)
        name = stem(path) if stems[stem(path)] == 1 else path if paths[path] == 1 else f"{path} ({number})"
        result.append(
            Dataset(
                name=name,
                path=path,
                files=tuple(resolve_files(path)),
                fields=fields,
                control_class=dataset.control_class,
                overlength=overlength_of(config, dataset),
                max_tokens=dataset.max_tokens,
                max_sequences=config.max_sequences if dataset.max_sequences is None else dataset.max_sequences,
                drop_tails=config.drop_tails if dataset.drop_tails is None else dataset.drop_tails,
            )
        )
    return result


def overlength_of(config: Config, dataset: DatasetConfig) -> str:
    """What becomes of a record that is longer than a sequence: texts are split unless told otherwise."""
    return dataset.overlength or config.overlength or ("split" if fields_of(dataset).is_plain_text else "drop")


def fields_of(dataset: DatasetConfig) -> Fields:
    """Where the records of a dataset hold what, as the config says."""
    return Fields(
        dataset.text_field,
        dataset.messages_field,
        dataset.class_field,
        dataset.chosen_field,
        dataset.rejected_field,
    )


def stem(path: str) -> str:
    """Return the file's name without its endings; a glob is its own name."""
    if any(sign in path for sign in "*?["):
        return path
    file = Path(path)
    return Path(file.stem).stem if file.suffix.lower() in COMPRESSIONS else file.stem


def _cache_directory(config: Config, datasets: list[Dataset]) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return datasets[0].files[0].parent / cache.FOLDER


def _file_states(datasets: list[Dataset], store: cache.Cache) -> dict[Path, cache.FileState]:
    """Return the state of every file, read once, or not at all where the cache knows it."""
    files = dict.fromkeys(file for dataset in datasets for file in dataset.files)
    known = store.known_files()
    states = {}
    with progress("Comparing files with the cache", total=len(files), unit="files") as advance:
        for file in files:
            try:
                seen = known.get((str(file.absolute()), cache.status_of(file)))
                states[file] = seen or cache.FileState.of(file)
            except OSError as error:
                raise UsageError(f"{file} cannot be read: {error.strerror}.") from error
            advance()
    return states


def _skipped(entry: Path) -> int:
    return sum(len(dataset["bad_records"]) for dataset in cache.statistics_of(entry)["datasets"])


def _recipe(
    config: Config, stream: list[Dataset], tokenizer: Tokenizer, files: dict[Path, cache.FileState]
) -> cache.Recipe:
    options = {key: getattr(config, key) for key in _SHARED_OPTIONS}
    each = [
        {**{key: getattr(dataset, key) for key in _DATASET_OPTIONS}, **_named(dataset.fields)} for dataset in stream
    ]
    return cache.Recipe(
        sources=[os.path.abspath(dataset.path) for dataset in stream],
        files=[{str(file.absolute()): files[file] for file in dataset.files} for dataset in stream],
        tokenizer=tokenizer.fingerprint,
        options={**options, "datasets": each},
    )


def _named(fields: Fields) -> dict[str, str | None]:
    """Return ``fields`` with the names that they have in a config."""
    return {f"{name.rstrip('_')}_field": field for name, field in asdict(fields).items()}


def _reports(stream: list[Dataset], entry: cache.Entry, hit: bool, reason: str) -> list[DatasetReport]:
    train, evaluation = entry.train, entry.evaluation
    return [
        DatasetReport(
            name=dataset.name,
            path=dataset.path,
            control_class=dataset.control_class if not dataset.fields.give_class else None,
            whole=dataset.whole,
            **statistics,
            cache_hit=hit,
            cache_reason=reason,
            sequences=len(train),
            eval_sequences=len(evaluation),
            padding=train.padding,
            eval_padding=evaluation.padding,
            dropped_tokens=entry.statistics["dropped_tokens"],
            split_documents=entry.statistics["split_documents"],
            trained=train.trained,
            eval_trained=evaluation.trained,
        )
        for dataset, statistics in zip(stream, entry.statistics["datasets"], strict=True)
    ]


def _list_bad(reports: list[DatasetReport]) -> None:
    for report in reports:
        if report.bad_records:
            listed = report.bad_records[:_LISTED]
            more = len(report.bad_records) - len(listed)
            rest = [f"… and {more:,} more"] if more else []
            count = len(report.bad_records)
            what = "1 record that cannot be used is" if count == 1 else f"{count:,} records that cannot be used are"
            warn("\n".join([f"{report.path}: {what} left out (--skip-bad):", *listed, *rest]))


def _warn_without_evaluation(config: Config, reports: list[DatasetReport]) -> None:
    for report in reports:
        if config.eval_fraction and not report.eval_sequences:
            why = "its held-out documents do not fill one" if report.eval_documents else "it has too little text"
            warn(f"{report.path} gives no sequence for evaluation: {why}.")
