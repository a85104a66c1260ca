"""The error that ended a run, in the run's directory, and whether a process of this job has told of it already."""

from __future__ import annotations

import contextlib
from pathlib import Path

ERROR_FILE = "error.txt"


class ErrorFile:
    """``error.txt`` of a run's directory; None is a job without a directory, which writes nothing."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / ERROR_FILE
        self._before = self._stamp()

    def _stamp(self) -> int | None:
        with contextlib.suppress(OSError):
            return None if self._path is None else self._path.stat().st_mtime_ns
        return None

    @property
    def is_kept(self) -> bool:
        """Whether there is a directory that keeps it."""
        return self._path is not None and self._path.parent.is_dir()

    def is_new(self) -> bool:
        """Whether a process has written it since this object was made."""
        return self._stamp() not in (None, self._before)

    def write(self, text: str) -> None:
        """Write ``text`` if there is a directory and it can be written: an error that cannot be kept hides no other."""
        if self._path is not None and self.is_kept:
            with contextlib.suppress(OSError):
                self._path.write_text(text.rstrip() + "\n", "utf-8")
