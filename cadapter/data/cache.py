"""The cache on disk: one directory per packed stream, Arrow IPC files, memory-mapped, keyed by content.

```
<cache>/<key>-<random>/
  train.arrow  evaluation.arrow   packed sequences, FixedSizeList columns: ids, classes, flags, counts; and tokens
  documents.arrow                 held-out documents one by one
  texts.arrow                     of each document: key of its text, class, and whether it is held out
  manifest.json                   what it was made from, what it holds, and each file's size
```
The key is the SHA-256 of everything the contents depend on: the bytes of the datasets and of the tokenizer's files,
and the options. Paths are not part of it. An entry is built beside its place and renamed into it under a name of
its own, so that two builders at once end up with two equal entries and a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cadapter.data import arrow
from cadapter.data.sequences import HeldOutDocument, PackedSequences
from cadapter.errors import CadapterError, UsageError
from cadapter.files import new_directory, read_json, tidy, write_json

FORMAT = 2
"""Part of the key: raise it whenever what is computed into the files changes. Runs that were prepared with another one
are other runs."""
LAYOUT = 2
"""Of the files; not part of the key. Raise it whenever they hold the same in another way: entries are made anew."""
FOLDER = ".cadapter-cache"
MANIFEST = "manifest.json"
FILES = TRAIN, EVALUATION, DOCUMENTS, TEXTS = "train.arrow", "evaluation.arrow", "documents.arrow", "texts.arrow"
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}-[0-9a-f]{8}\.partial-")
"""How names of entries begin that are being built, and of nothing else in a directory that may be anybody's."""
_SECONDS_TO_LOCK = 5.0
"""Time enough between making an entry's directory and locking it."""
_SECONDS_OF_SILENCE = 86_400.0
"""So long nothing is written into an entry only where its builder is no more."""
_SETTLED_SECONDS = 2.0
"""A file that was written more recently may be written again without its times changing."""


@dataclass(frozen=True)
class FileState:
    """What a file held, and its ``status`` then: size, times of change in ns, inode; empty: not to be relied on.

    A file whose status is still the same has not changed, so that its bytes need not be read to know its SHA-256.
    """

    sha256: str
    status: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Read ``path``.

        Raises:
            OSError: it cannot be read.
        """
        before = status_of(path)
        digest = file_hash(path)
        settled = time.time() - max(before[1:3]) / 1e9 > _SETTLED_SECONDS
        return cls(digest, before if settled and status_of(path) == before else ())

    def is_that_of(self, path: Path) -> bool:
        """Whether ``path`` still holds the same."""
        return self.status == status_of(path) or file_hash(path) == self.sha256


def status_of(path: Path) -> tuple[int, ...]:
    """Return the status of a file, as :class:`FileState` keeps it."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@dataclass(frozen=True)
class Recipe:
    """What an entry is made from.

    Attributes:
        sources: the datasets' paths as absolute paths or globs; they find an older entry to compare with.
        files: the state of every file, by absolute path, in reading order, one mapping for each dataset.
        tokenizer: fingerprint of the tokenizer.
        options: every option that the contents depend on.
    """

    sources: list[str]
    files: list[dict[str, FileState]]
    tokenizer: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 (hex) over all but the paths."""
        digests = [[state.sha256 for state in files.values()] for files in self.files]
        contents = [FORMAT, digests, self.tokenizer, self.options]
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return the part of a manifest that tells what changed."""
        files = [{path: state.sha256 for path, state in each.items()} for each in self.files]
        states = {path: state.status for each in self.files for path, state in each.items() if state.status}
        return {
            "sources": self.sources, "files": files, "states": states, "tokenizer": self.tokenizer,
            "options": self.options,
        }  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A complete entry, opened: ``statistics`` is what its builder counted."""

    directory: Path
    train: PackedSequences
    evaluation: PackedSequences
    documents: list[HeldOutDocument]
    statistics: dict[str, Any]

    @property
    def largest_id(self) -> int:
        """The largest token id; where the builder, of an earlier version, did not note it, all are looked through."""
        noted = self.statistics.get("largest_id")
        if noted is not None:
            return int(noted)
        documents = (int(document.ids.max()) for document in self.documents)
        return max(self.train.largest_id, self.evaluation.largest_id, *documents)


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def user_cache() -> Path:
    """Return the user's own cache directory of this program."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "cadapter"


class Cache:
    """The entries in ``directory``, or, where that cannot be written, in the user's cache directory.

    ``note`` is told when the second happens.
    """

    def __init__(self, directory: Path, note: Callable[[str], None]) -> None:
        self.directory = directory
        self._note = note

    def tidy_up(self) -> None:
        """Remove entries that processes were building when they were killed."""
        for root in (self.directory, user_cache()):
            with contextlib.suppress(OSError):  # another process does the same, or only others may
                for remark in tidy(root, _is_left):
                    self._note(remark)

    def known_files(self) -> dict[tuple[str, tuple[int, ...]], FileState]:
        """Return the states of the files that entries were made from, by absolute path and status."""
        known = {}
        for root in (self.directory, user_cache()):
            for entry in _children(root, "*-*"):
                manifest = _read_manifest(entry) or {}
                digests = _merged(manifest.get("files", ()))
                for path, status in manifest.get("states", {}).items():
                    if path in digests:
                        known[path, tuple(status)] = FileState(digests[path], tuple(status))
        return known

    def find(self, recipe: Recipe) -> tuple[Path | None, str]:
        """Return (directory of a complete entry of ``recipe``, "") or (None, why there is none)."""
        damage = ""
        for root in (self.directory, user_cache()):
            for entry in sorted(_children(root, f"{recipe.key[:32]}-*")):
                damage = _damage(entry, recipe.key)
                if not damage:
                    return entry, ""
        return None, f"damaged: {damage}" if damage else self._what_changed(recipe)

    def _what_changed(self, recipe: Recipe) -> str:
        """Compare ``recipe`` with the newest entry made from the same paths."""
        manifests = [
            manifest
            for root in (self.directory, user_cache())
            for entry in _children(root, "*-*")
            if (manifest := _read_manifest(entry)) and manifest.get("sources") == recipe.sources
        ]
        if not manifests:
            return "new"
        return describe_change(max(manifests, key=lambda manifest: manifest["created"]), recipe.as_json())

    def build(self, recipe: Recipe, fill: Callable[[Path], dict[str, Any]], replace: bool = False) -> Path:
        """Make a new entry of ``recipe``; ``fill`` writes its Arrow files and returns its statistics.

        When it is complete, damaged entries of the same recipe are removed, and with ``replace`` all that stood
        there at the start: never one that another process has just finished and is about to open.

        Raises:
            CadapterError: neither directory can be written, or the disk is full.
        """
        root, created = self._writable()
        same = _children(root, f"{recipe.key[:32]}-*")
        older = [entry for entry in same if replace or _damage(entry, recipe.key)]
        target = root / f"{recipe.key[:32]}-{uuid.uuid4().hex[:8]}"
        try:
            # The lock is held until the entry is on the disk and has its name.
            with contextlib.ExitStack() as held, new_directory(target) as temporary:
                held.enter_context(_in_use(temporary))
                statistics = fill(temporary)
                sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                described = {"format": FORMAT, "layout": LAYOUT, "key": recipe.key, "created": time.time()}
                described |= recipe.as_json()
                write_json(temporary / MANIFEST, {**described, "sizes": sizes, "statistics": statistics})
        except OSError as error:
            raise CadapterError(f"The cache in {root} cannot be written: {error.strerror or error}.") from error
        except BaseException:
            if created:
                _remove_if_empty(root)
            raise
        for entry in older:
            shutil.rmtree(entry, ignore_errors=True)
        return target

    def discard(self, entries: Iterable[Path]) -> None:
        """Remove entries that were made in vain, and a directory that then holds nothing."""
        for entry in entries:
            shutil.rmtree(entry, ignore_errors=True)
            _remove_if_empty(entry.parent)

    def _writable(self) -> tuple[Path, bool]:
        """Return the directory to write to, and whether it was made here."""
        reasons = []
        for root in (self.directory, user_cache()):
            created = not root.exists()
            try:
                root.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=root):
                    pass
            except OSError as error:
                reasons.append(f"{root}: {error.strerror}")
                continue
            if reasons:
                self._note(f"The cache goes to {root}, since {reasons[0]}.")
            return root, created
        raise CadapterError("No place for the cache can be written:\n" + "\n".join(reasons) + "\nSet cache_dir.")


@contextlib.contextmanager
def _in_use(directory: Path) -> Iterator[None]:
    """Hold a lock on ``directory`` until the block or this process ends, where the file system has locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # whoever tidies up holds it for a moment only
        yield
    finally:
        os.close(descriptor)


def _is_left(path: Path) -> bool:
    """Whether an entry that was being built is left over: whoever built it, on whichever machine, holds no lock on it.

    Where there are no locks, an entry counts as one that is being built for as long as any of its files changes.
    """
    if not _UNFINISHED.match(path.name) or not path.is_dir():
        return False
    try:
        changed = max(each.stat().st_mtime for each in (path, *path.iterdir()))
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # it was finished, or removed, just now
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        patience = _SECONDS_TO_LOCK
    except BlockingIOError:
        return False
    except OSError:
        patience = _SECONDS_OF_SILENCE
    finally:
        os.close(descriptor)
    return time.time() - changed > patience


def describe_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in which way two manifests differ: files first, then the tokenizer, then the options."""
    if old["format"] != FORMAT:
        return "made by another version"
    before, after = _merged(old["files"]), _merged(new["files"])
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            verb = "changed" if path in before and path in after else "added" if path in after else "removed"
            return f"file {verb}: {Path(path).name}"
    if old["tokenizer"] != new["tokenizer"]:
        return "tokenizer changed"
    before, after = _flat(old["options"]), _flat(new["options"])
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return f"option changed: {', '.join(dict.fromkeys(key.rpartition('.')[2] for key in changed))}"


def _merged(files: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {path: digest for dataset in files for path, digest in dataset.items()}


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with each dataset's as ``0.key``, ``1.key``, …"""
    flat = {key: value for key, value in options.items() if key != "datasets"}
    for number, dataset in enumerate(options["datasets"]):
        flat |= {f"{number}.{key}": value for key, value in dataset.items()}
    return flat


def _children(root: Path, pattern: str) -> Iterable[Path]:
    return root.glob(pattern) if root.is_dir() else ()


def _remove_if_empty(root: Path) -> None:
    try:
        root.rmdir()
    except OSError:
        return  # not empty: it holds entries


def _read_manifest(entry: Path) -> dict[str, Any] | None:
    try:
        manifest = read_json(entry / MANIFEST)
    except UsageError:
        return None
    return manifest if isinstance(manifest, dict) and _is_complete(manifest) else None


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest holds what :meth:`Cache.build` writes: a cache may lie among a stranger's files."""
    kinds = {
        "format": int, "key": str, "created": float, "sources": list, "files": list, "states": dict, "tokenizer": str,
        "options": dict, "sizes": dict, "statistics": dict,
    }  # fmt: skip
    if not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        return False
    datasets = manifest["options"].get("datasets")
    return (
        all(isinstance(each, dict) for each in manifest["files"])
        and all(isinstance(status, list) and _are_numbers(status) for status in manifest["states"].values())
        and isinstance(datasets, list)
        and all(isinstance(each, dict) for each in datasets)
    )


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) is int for value in values)


def _damage(entry: Path, key: str) -> str:
    """Return why ``entry`` cannot be used; an empty string when it is complete."""
    manifest = _read_manifest(entry)
    if manifest is None or manifest["key"] != key:
        return f"no usable {MANIFEST}"
    if manifest.get("layout") != LAYOUT:
        return "its files are those of another version"
    for name in FILES:
        file, size = entry / name, manifest["sizes"].get(name)
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        try:
            arrow.record_batches(file)
        except (OSError, pa.ArrowException):
            return f"{name} is no Arrow file"
    return ""


def statistics_of(entry: Path) -> dict[str, Any]:
    """Return what the builder of a complete entry counted."""
    return read_json(entry / MANIFEST)["statistics"]


def open_entry(entry: Path, sequence_len: int, names: list[str]) -> Entry:
    """Open a complete entry without reading its contents; ``names`` are the datasets' names in their order."""
    statistics = statistics_of(entry)
    return Entry(
        directory=entry,
        train=PackedSequences(arrow.read_sequences(entry / TRAIN), sequence_len),
        evaluation=PackedSequences(arrow.read_sequences(entry / EVALUATION), sequence_len),
        documents=arrow.read_documents(entry / DOCUMENTS, names),
        statistics=statistics,
    )
