"""Which directories and files are cadapter's own to replace: runs, adapters and models as it writes them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from cadapter.adapters.directory import CONFIG_NAME, WEIGHTS_NAME
from cadapter.errors import UsageError
from cadapter.models.checkpoint import INDEX_NAME
from cadapter.models.saving import COPIED
from cadapter.training.run_directory import RECORD, RunDirectory
from cadapter.training.state import MANIFEST_FILE, OPTIMISER_STEM, STATE_FILE

_BESIDE_WEIGHTS = (*COPIED, INDEX_NAME, "README.md", ".gitattributes")
_IN_CHECKPOINTS = (STATE_FILE, MANIFEST_FILE, f"{OPTIMISER_STEM}-*.safetensors")
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
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    run = {path.name for path in RunDirectory(output).parts()}
    if RECORD in run:
        foreign = names - run
    else:
        foreign = {path.name for path in output.iterdir() if not _belongs_to_weights(path)}
        if not _has_weights(output):
            foreign = foreign or names
    if foreign:
        shown = sorted(foreign)
        more = ", …" if len(shown) > _SHOWN else ""
        raise UsageError(
            f"{output} was not written by cadapter, or not by it alone: it holds {', '.join(shown[:_SHOWN])}{more}, "
            f"which --force would remove.\n{_REMEDY}"
        )


_REMEDY = "Choose another output, or remove it yourself."


def _has_weights(directory: Path) -> bool:
    if (directory / CONFIG_NAME).is_file():
        return (directory / WEIGHTS_NAME).is_file()
    return (directory / "config.json").is_file() and any(directory.glob("model*.safetensors"))


def _belongs_to_weights(path: Path) -> bool:
    known = (*_BESIDE_WEIGHTS, *_IN_CHECKPOINTS, CONFIG_NAME, WEIGHTS_NAME, "model*.safetensors")
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in known)


def refuse_foreign_gguf(output: Path) -> None:
    """Make sure that ``output`` is not there, or a GGUF file, which another may replace.

    Raises:
        UsageError: it is something else.
    """
    if not output.exists():
        return
    if output.is_dir() or output.open("rb").read(4) != b"GGUF":
        raise UsageError(f"{output} is no GGUF file, and --force replaces nothing else.\n{_REMEDY}")
