"""The directory of a run: what it holds, when it may be written to, and which checkpoint a resume starts from."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from cadapter.errors import UsageError
from cadapter.files import remove_directory, tidy
from cadapter.training.contents import foreign_to_checkpoints, foreign_to_logs, foreign_to_weights, has_weights
from cadapter.training.error_file import ERROR_FILE
from cadapter.training.state import Moved, newest_checkpoint

RECORD = "resolved.json"
"""Every run writes it at its start: a directory without it holds no run."""
FILES = ("config.toml", RECORD, "metrics.jsonl", ERROR_FILE)
DIRECTORIES = ("logs", "checkpoints", "final", "best")
_EPOCH = re.compile(r"epoch[1-9]\d*")


class RunDirectory:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.best = path / "best"
        self.logs = path / "logs"
        self._claim: int | None = None

    def claim(self) -> None:
        """Keep other runs out until :meth:`close`, or until this process ends, however that happens.

        A file system without locks (some network ones) lets everyone in. Nothing is written.

        Raises:
            UsageError: another process is training there.
        """
        if self._claim is not None or not self.path.is_dir():
            return
        self._claim = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UsageError(
                f"Another process is training in {self.path}.\nStop it, or choose another output_dir."
            ) from None
        except OSError:
            self.close()

    def close(self) -> None:
        """Let others in."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def epoch(self, number: int) -> Path:
        """Where the adapter after epoch ``number`` (from 1) is written."""
        return self.path / f"epoch{number}"

    def _epochs(self) -> list[Path]:
        return sorted(path for path in self.path.glob("epoch*") if _EPOCH.fullmatch(path.name))

    def parts(self) -> list[Path]:
        """What is there of a run."""
        known = [self.path / name for name in (*FILES, *DIRECTORIES)]
        return [path for path in [*known, *self._epochs()] if path.exists()]

    def foreign(self) -> list[Path]:
        """What is there under the names of a run's parts, and was not written by one."""
        return [path for part in self.parts() for path in self._foreign_in(part)]

    def _foreign_in(self, part: Path) -> list[Path]:
        if part.name in FILES:
            return [] if part.is_file() else [part]
        if not part.is_dir():
            return [part]
        known = {self.logs: foreign_to_logs, self.checkpoints: foreign_to_checkpoints}
        return known.get(part, foreign_to_weights)(part)

    def tidy_up(self) -> list[str]:
        """Claim the directory and clean up what a killed run left there; return a remark for each.

        Raises:
            UsageError: another process is training there.
        """
        self.claim()
        return [*tidy(self.path), *tidy(self.checkpoints)]

    @property
    def holds_run(self) -> bool:
        """Whether a run has been here; others have a config.toml, checkpoints/ and logs/ too."""
        return (self.path / RECORD).exists()

    def refuse_foreign(self, config_text: str) -> None:
        """Make sure that a run that starts here removes or replaces nothing that no run wrote.

        Args:
            config_text: of the run's config, which may lie here already.

        Raises:
            UsageError: it would.
        """
        if has_weights(self.path):
            raise UsageError(
                f"output_dir = {self.path} is itself the directory of a model or an adapter, into which a run's files "
                "would be mixed.\nChoose another output_dir."
            )
        foreign, hint = self.foreign(), ""
        if not self.holds_run:
            hint = f" (there is no {RECORD})"
            config = self.path / "config.toml"
            mine = {self.logs, self.checkpoints, self.path / ERROR_FILE}
            if config.is_file() and config.read_bytes() == config_text.encode("utf-8"):
                mine.add(config)
            foreign = [path for path in self.parts() if path not in mine] or foreign
        if foreign:
            raise UsageError(
                f"output_dir = {self.path} holds {foreign[0].relative_to(self.path)}, which no run of cadapter wrote"
                f"{hint}, and which this run would replace.\nMove it elsewhere, or choose another output_dir."
            )

    def checkpoint_to_resume(
        self, resume: bool, force: bool, moved: Moved = lambda: None
    ) -> tuple[Path | None, list[str]]:
        """Return the newest valid checkpoint if this is a resume, with remarks about damaged ones.

        ``moved`` is called while checkpoints are read.

        Raises:
            UsageError: the directory holds a run and neither ``resume`` nor ``force`` is given, or all of its
                checkpoints are damaged and ``force`` is not given, or it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output_dir = {self.path} is a file.\nChoose another output_dir.")
        if resume:
            checkpoint, remarks = newest_checkpoint(self.checkpoints, moved)
            if checkpoint is None and not force:
                self._refuse_to_lose(remarks)
            return checkpoint, remarks
        if self.holds_run and not force:
            raise UsageError(
                f"{self.path} holds a run already.\n"
                "Continue it with --resume-from-checkpoint, replace it with --force, or choose another output_dir."
            )
        return None, []

    def _refuse_to_lose(self, remarks: list[str]) -> None:
        """Make sure that a resume without a checkpoint, which starts afresh, replaces nothing that took long to make.

        Raises:
            UsageError: there are checkpoints, all of them damaged, or results of a run.
        """
        if remarks:
            raise UsageError(
                "No checkpoint can be resumed from:\n" + "\n".join(f"  {remark}" for remark in remarks) + "\n"
                "Start the run again with --force, which replaces it."
            )
        results = [path.name for path in (self.final, *self._epochs()) if path.exists()]
        if self.holds_run and results:
            raise UsageError(
                f"{self.path} has no checkpoint to resume from, and starting afresh would replace its "
                f"{', '.join(results)}.\nGo on from one of them in another output_dir (init_from, or model_dir after "
                "full fine-tuning), or replace them with --force."
            )

    def start(self, fresh: bool, keep_best: bool = False) -> None:
        """Make the directory; for a ``fresh`` run remove what an earlier one left there.

        The record stays until the run writes its own: without it nobody would know whose the rest is, if this process
        ended in between.

        Args:
            keep_best: leave best/, which the run's first evaluation replaces.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output_dir = {self.path} cannot be written: {error.strerror}.") from error
        self.claim()
        (self.path / ERROR_FILE).unlink(missing_ok=True)
        if fresh:
            stay = {self.path / RECORD, *([self.best] if keep_best else [])}
            held_run = self.holds_run
            self.tidy_up()
            for part in self.parts() if held_run else []:
                if part not in stay:
                    remove_directory(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def adapter_of_run(path: Path) -> Path:
    """Return the adapter that a run directory offers: final/, else the newest epochN/, else the newest checkpoint.

    Raises:
        UsageError: it has none.
    """
    if (path / "final").is_dir():
        return path / "final"
    epochs = [part for part in path.glob("epoch*") if _EPOCH.fullmatch(part.name) and part.is_dir()]
    if epochs:
        return max(epochs, key=lambda part: int(part.name.removeprefix("epoch")))
    checkpoint, _ = newest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise UsageError(f"{path} holds no trained adapter yet.\nTrain one first, or name one with --adapter DIR.")
    return checkpoint
