"""What can go wrong in a way that users cause or must hear about, and the exit code each becomes.

Every expected error is a :class:`CadapterError`: a few plain lines that say what is wrong, where (file, line,
key) and what to do. ``cli.py`` prints them without a traceback; anything else is a bug in cadapter.
"""

from __future__ import annotations


class CadapterError(Exception):
    """The work failed for a reason that the message explains: exit code 1."""

    exit_code = 1


class UsageError(CadapterError):
    """Wrong usage, a wrong config or an input that cannot be used as it is: exit code 2, nothing written."""

    exit_code = 2


class CannotWrite(CadapterError):
    """The disk refused what had to be written, since it is full, for instance: exit code 1."""


class CheckFailed(CadapterError):
    """The work was done and a check that the user asked for did not hold: exit code 1."""


class Stopped(CadapterError):
    """A signal asked the program to stop, and it did so in good order: exit code 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
