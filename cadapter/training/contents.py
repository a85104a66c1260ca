"""What cadapter writes into directories of weights, checkpoints and logs; what else lies there is somebody's own."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from cadapter.adapters.directory import CONFIG_NAME, WEIGHTS_NAME
from cadapter.errors import UsageError
from cadapter.files import is_leftover
from cadapter.models.checkpoint import INDEX_NAME
from cadapter.models.own_code import code_files
from cadapter.models.saving import COPIED
from cadapter.training.state import MANIFEST_FILE, OPTIMISER_STEM, STATE_FILE

_OF_WEIGHTS = (
    *COPIED, INDEX_NAME, "README.md", ".gitattributes", CONFIG_NAME, WEIGHTS_NAME, "model*.safetensors",
    STATE_FILE, MANIFEST_FILE, f"{OPTIMISER_STEM}-*.safetensors",
)  # fmt: skip
_OF_LOGS = "events.out.tfevents.*"
_CHECKPOINT = re.compile(r"step-\d+")


def foreign_to_weights(directory: Path) -> list[Path]:
    """Return what lies in ``directory`` and belongs to no adapter, model or checkpoint, whose own code included."""
    found = [path for path in directory.iterdir() if not _is_file(path, *_OF_WEIGHTS)]
    if any(path.suffix == ".py" for path in found):
        try:
            code = {file.name for file in code_files(directory)}
        except UsageError:
            code = set()
        found = [path for path in found if not (path.is_file() and path.name in code)]
    return sorted(found)


def foreign_to_checkpoints(directory: Path) -> list[Path]:
    """Return what lies in a run's checkpoints/ and is no checkpoint, or lies in one and does not belong to it."""
    foreign: list[Path] = []
    for path in sorted(directory.iterdir()):
        if _CHECKPOINT.fullmatch(path.name) and path.is_dir():
            foreign += foreign_to_weights(path)
        elif not is_leftover(path):
            foreign.append(path)
    return foreign


def foreign_to_logs(directory: Path) -> list[Path]:
    """Return what lies in a run's logs/ and was not written by TensorBoard."""
    return sorted(path for path in directory.iterdir() if not _is_file(path, _OF_LOGS))


def has_weights(directory: Path) -> bool:
    """Whether ``directory`` itself is that of an adapter or of a model."""
    if (directory / CONFIG_NAME).is_file():
        return (directory / WEIGHTS_NAME).is_file()
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def _is_file(path: Path, *patterns: str) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in patterns)
