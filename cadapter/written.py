"""Which directories and files are cadapter's own to replace: runs, adapters and models as it writes them."""

from __future__ import annotations

from pathlib import Path

from cadapter.errors import UsageError
from cadapter.files import is_leftover
from cadapter.training.contents import foreign_to_weights, has_weights
from cadapter.training.run_directory import RunDirectory

_SHOWN = 3


def refuse_foreign_directory(output: Path) -> None:
    """Make sure that ``output`` may be replaced: it is not there, is empty, or holds nothing but what cadapter wrote.

    Raises:
        UsageError: it is or holds something else.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output} is a file, and --force replaces directories that cadapter wrote.\n{_REMEDY}")
    run, there = RunDirectory(output), sorted(output.iterdir())
    if run.holds_run:
        parts = run.parts()
        foreign = [path for path in there if path not in parts and not is_leftover(path)] + run.foreign()
    else:
        foreign = foreign_to_weights(output)
        if not has_weights(output):
            foreign = foreign or there
    if foreign:
        shown = ", ".join(str(path.relative_to(output)) for path in foreign[:_SHOWN])
        more = ", …" if len(foreign) > _SHOWN else ""
        raise UsageError(
            f"{output} was not written by cadapter, or not by it alone: it holds {shown}{more}, "
            f"which --force would remove.\n{_REMEDY}"
        )


_REMEDY = "Choose another output, or remove it yourself."


def refuse_foreign_gguf(output: Path) -> None:
    """Make sure that ``output`` is not there, or a GGUF file, which another may replace.

    Raises:
        UsageError: it is something else.
    """
    if not output.exists():
        return
    if output.is_dir() or output.open("rb").read(4) != b"GGUF":
        raise UsageError(f"{output} is no GGUF file, and --force replaces nothing else.\n{_REMEDY}")
