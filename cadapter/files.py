"""Writing whole or not at all: everything is written beside its target, flushed, and renamed into place.

And reading what strangers wrote: JSON of any shape, and directories whose links may lead anywhere.

What a command makes (a directory, a GGUF file) replaces nothing without ``--force``. A report on something
(``--json``, ``--plot``, ``--html``) is replaced, as other programs replace the file behind ``-o``, so that a command
can be given again: :func:`check_report` before the work, :func:`write_report` after it.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from cadapter.errors import CannotWrite, UsageError
from cadapter.terminal import note

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<purpose>partial|replaced|removed)-[0-9a-f]{8}")
"""The names that :func:`_sibling` gives."""
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""How a disk says that it takes no more; what reads never meets these."""
_ATTEMPTS = 20
"""How often a directory is replaced again where others replace it at the same time."""
_IN_WORDS = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust (safetensors) tell of the system's errors."""

LARGEST_JSON = 1 << 28
"""Bytes; the index of a model of 100,000 tensors has some 10 MB."""


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say in plain words where the disk refuses what the block writes at ``target``.

    Raises:
        CannotWrite: it is full, over a quota or read-only.
    """
    try:
        yield
    except Exception as error:
        match = _IN_WORDS.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if number not in _REFUSALS:
            raise
        raise CannotWrite(f"{target} cannot be written: {os.strerror(number)}.") from error


def at_home(path: Path) -> Path:
    """Return ``path`` with the user's home directory for ~."""
    return Path(os.path.expanduser(path))


def _already_there(output: Path) -> UsageError:
    return UsageError(f"{output} already exists.\nChoose another output, or give --force to replace it.")


def refuse_existing(output: Path, force: bool) -> None:
    """Raise :class:`UsageError` if ``output`` exists and ``force`` does not allow replacing it."""
    if os.path.lexists(output) and not force:
        raise _already_there(output)


def _sibling(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}-{uuid.uuid4().hex[:8]}")


def flush_to_disk(path: Path) -> None:
    """fsync ``path`` (a file or a directory), so that a rename that follows cannot outrun its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _usual_mode(directory: Path) -> int:
    """The permissions of files that are made in ``directory``, as the umask says, or the directory's own defaults."""
    trial = _sibling(directory / "mode", "partial")
    trial.touch()
    mode = stat.S_IMODE(trial.stat().st_mode)
    trial.unlink()
    return mode


@contextlib.contextmanager
def new_directory(output: Path, force: bool = False, moved: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty temporary sibling of ``output`` that becomes ``output`` when the block succeeds.

    When the block raises, the sibling is removed and ``output`` is as it was. With ``force`` an existing
    directory is replaced only after the new one is complete. All files get the permissions that the umask leaves:
    safetensors gives its own to their owner alone. ``moved`` is called after each file that has reached the disk.

    Raises:
        UsageError: ``output`` exists and ``force`` is not given, or its parent cannot be written.
        CannotWrite: the disk is full.
    """
    output = Path(os.path.abspath(output))
    refuse_existing(output, force)
    temporary = _sibling(output, "partial")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"Cannot write in {output.parent}: {error.strerror}.") from error
    try:
        with writing(output):
            yield temporary
            mode = _usual_mode(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    if stat.S_IMODE(file.stat().st_mode) != mode:
                        file.chmod(mode)
                    flush_to_disk(file)
                    moved()
            if force:
                replace_directory(temporary, output)
            else:
                _put(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put(new: Path, target: Path) -> None:
    """Rename directory ``new`` to ``target``, where nothing may have appeared in the meantime.

    Raises:
        UsageError: another process wrote there first.
    """
    try:
        new.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _already_there(target) from error
        raise
    flush_to_disk(target.parent)


def replace_directory(new: Path, target: Path) -> None:
    """Rename directory ``new`` to ``target``; what stood at ``target`` is removed only afterwards.

    Raises:
        UsageError: others keep writing there.
    """
    for attempt in range(_ATTEMPTS):
        old = _sibling(target, "replaced")
        with contextlib.suppress(FileNotFoundError):  # nothing stood there, or another process has just moved it away
            target.rename(old)
        try:
            _put(new, target)
        except UsageError:  # another process has put its own there in between
            _remove(old)
            if attempt == _ATTEMPTS - 1:
                raise
        except BaseException:  # the disk has refused it, or a signal came
            with contextlib.suppress(FileNotFoundError, UsageError):  # nothing stood there, or something does by now
                _put(old, target)
            raise
        else:
            _remove(old)
            break


def _remove(old: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """Remove ``directory``: its name at once, so that half of it is taken for the whole by nobody, then its files.

    Raises:
        OSError: it cannot be removed.
    """
    old = _sibling(directory, "removed")
    try:
        directory.rename(old)
    except OSError:  # of a lower layer of an overlay, for instance
        shutil.rmtree(directory)
    else:
        _remove(old)


def is_leftover(path: Path) -> bool:
    """Whether ``path`` has the name of something that a process is writing, or was when it was killed."""
    return _LEFTOVER.fullmatch(path.name) is not None


def tidy(directory: Path, concerns: Callable[[Path], bool] = lambda _: True) -> list[str]:
    """Clean up in ``directory`` what a killed process left there of what it wrote or removed by this module.

    What was half written or half removed is removed. Where the old version had been moved away and the new one was not
    there yet, the old one takes its place again. Nobody else may be writing in the directory, or else ``concerns`` says
    for each path whether it is left over.

    Returns:
        What was done, a line for each.
    """
    done = []
    for path in sorted(directory.glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not concerns(path):
            continue
        target = directory / match["name"]
        if match["purpose"] == "replaced" and not target.exists():
            path.rename(target)
            done.append(f"{target} is put back: a process was killed while it was being replaced.")
            continue
        doing = "removed it" if match["purpose"] == "removed" else "wrote there"
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:  # on NFS, while another machine has a file of it open
            done.append(f"{path}: a process was killed while it {doing}, and it cannot be removed: {error.strerror}.")
        else:
            done.append(f"{path} is removed: a process was killed while it {doing}.")
    return done


@contextlib.contextmanager
def new_file(output: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling that becomes ``output`` when the block succeeds.

    When the block raises, the sibling is removed and ``output`` is as it was.

    Raises:
        UsageError: ``output`` exists and ``force`` is not given, is a directory, or its parent cannot be written.
        CannotWrite: the disk is full.
    """
    output = Path(os.path.abspath(output))
    if output.is_dir():
        raise UsageError(f"{output} is a directory.\nGive the name of a file.")
    refuse_existing(output, force)
    temporary = _sibling(output, "partial")
    with writing(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        except OSError as error:
            if error.errno in _REFUSALS:
                raise
            raise UsageError(f"Cannot write in {output.parent}: {error.strerror}.") from error
        try:
            yield temporary
            flush_to_disk(temporary)
            if force:
                temporary.replace(output)
            else:
                _link(temporary, output)
            flush_to_disk(output.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, output: Path) -> None:
    """Give a file its name, where nothing may have appeared in the meantime.

    Raises:
        UsageError: another process wrote there first.
    """
    try:
        os.link(temporary, output)
    except FileExistsError as error:
        raise _already_there(output) from error
    except OSError:  # a file system without hard links
        refuse_existing(output, force=False)
        temporary.replace(output)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all; an older file is replaced."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; an older file is replaced."""
    with new_file(path, force=True) as file:
        file.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


STANDARD_OUTPUT = Path("-")
"""Instead of the file of a JSON report: it is printed."""


def check_report(output: Path | None) -> None:
    """Make sure, before the work, that a report can be written to ``output``; None: none is asked for.

    Raises:
        UsageError: it is a directory, or its folder is not there and cannot be made.
    """
    if output is None or output == STANDARD_OUTPUT:
        return
    target = Path(os.path.realpath(output))
    if output.is_dir():
        raise UsageError(f"{output} is a directory.\nGive the name of a file.")
    if _is_written_through(output):
        if not os.access(output, os.W_OK):
            raise UsageError(f"{output} cannot be written: {os.strerror(errno.EACCES)}.")
        return
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(f"{output} cannot be written: {folder} is a file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{output} cannot be written: {os.strerror(errno.EACCES)} in {folder}.")


def _is_written_through(output: Path) -> bool:
    """Whether ``output`` is, or is a link to, a device, a pipe or what this process prints to: nothing to replace."""
    return output.exists() and (not output.is_file() or _stream_of(output) is not None)


def _stream_of(output: Path) -> TextIO | None:
    """Standard output or standard error, if that is what ``output`` stands for."""
    there = output.stat()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream that is no file
            if os.path.samestat(there, os.fstat(stream.fileno())):
                return stream
    return None


def write_report(output: Path, content: str | bytes) -> None:
    """Write a report to ``output`` and say so.

    A file is written whole or not at all, also that which a link leads to; its folder is made, an older one replaced.
    A pipe or a device is written to; where it is what this process prints to, nothing else is said there.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not _is_written_through(output):
        write_bytes(Path(os.path.realpath(output)), data)
    elif stream := _stream_of(output):
        stream.flush()
        stream.buffer.write(data)
        stream.flush()
        return
    else:
        with writing(output):
            output.write_bytes(data)
    note(f"Written: {output}")


def write_json_report(output: Path, value: Any) -> None:
    """:func:`write_report` of ``value`` as indented JSON; "-" prints it."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if output == STANDARD_OUTPUT:
        print(text, end="")
    else:
        write_report(output, text)


# ---- reading ----------------------------------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    """Return the JSON value that ``file`` holds.

    Raises:
        UsageError: it cannot be read, is too large, or is no JSON (with the line).
    """
    try:
        if file.stat().st_size > LARGEST_JSON:
            raise UsageError(f"{file} is larger than {LARGEST_JSON >> 20} MiB, which no such file is.")
        return json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}, line {error.lineno}: broken JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} cannot be read: it is not UTF-8.") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested too deeply
        raise UsageError(f"{file}: JSON that cannot be read: {error}.") from error


def refuse_links_out(directory: Path, patterns: Sequence[str]) -> None:
    """Make sure that no file of ``directory`` whose name fits a pattern is a link to something elsewhere.

    A link may lead to another file of the directory, and in the hub's cache, ``models--NAME/snapshots/REVISION/``, to
    the blobs of its repository or to those that repositories share.

    Raises:
        UsageError: one does.
    """
    home = Path(os.path.realpath(directory))
    allowed = [home]
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        allowed += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    for file in sorted(directory.iterdir()):
        if file.is_symlink() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns):
            target = Path(os.path.realpath(file))
            if not any(root in target.parents for root in allowed):
                raise UsageError(
                    f"{file} is a link that leads out of its directory, to {target}.\n"
                    "If that file belongs there, copy it."
                )
