"""Records that cannot be used: how many may be left out, and one error that tells of all that are too many."""

from __future__ import annotations

from cadapter.errors import UsageError

SHOWN = 10
"""Of the records that cannot be used, how many an error tells of; reading ends at so many too many."""


class BadRecords:
    """Takes note of records that cannot be used, up to ``limit`` of them.

    Args:
        limit: how many may be left out.
        skippable: whether the user can choose to leave some out.

    Attributes:
        count: so far; what the cache has left out may be added.
    """

    def __init__(self, limit: int, skippable: bool = True) -> None:
        self.limit = limit
        self._skippable = skippable
        self.count = 0
        self._first: list[UsageError] = []

    def __call__(self, error: UsageError) -> None:
        """Count one.

        Raises:
            UsageError: there are so many too many that it is enough.
        """
        self.count += 1
        if len(self._first) < SHOWN:
            self._first.append(error)
        if self.count >= self.limit + SHOWN:
            self._refuse(at_end=False)

    def settle(self) -> None:
        """Say, when all records are read, whether too many cannot be used.

        Raises:
            UsageError: they are.
        """
        if self.count > self.limit:
            self._refuse(at_end=True)

    def _refuse(self, at_end: bool) -> None:
        if self.count == 1:
            leave_out = "\nTo leave it out: cadapter prepare CONFIG --skip-bad 1" if self._skippable else ""
            raise UsageError(f"{self._first[0]}{leave_out}")
        heading = f"{self.count:,} records cannot be used"
        if self.limit:
            heading += f", and --skip-bad allows {self.limit:,}"
        if not at_end:
            heading += "; there may be more behind them" if self.limit else ", and there may be more behind them"
        if self.count > len(self._first):
            heading += f"{';' if at_end else '.'} {'the' if at_end else 'The'} first {len(self._first)}"
        lines = [str(error).splitlines()[0] for error in self._first]
        leave_out = f", or leave them out: cadapter prepare CONFIG --skip-bad {self.count}" if self._skippable else "."
        remedy = f"Correct them{leave_out}"
        raise UsageError("\n".join([f"{heading}:", *lines, remedy]))
