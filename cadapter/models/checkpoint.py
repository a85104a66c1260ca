"""A model directory on disk: its config, and single tensors out of its safetensors shards.

Nothing here reads more than it is asked for: names, shapes and dtypes come from the shards' headers, and a
tensor travels straight to its device. ``bytes_read`` counts what was read, so that a test can show that a
pipeline stage reads its own layers only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cadapter.errors import UsageError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
"""What is downloaded of a model named by its hub id: never pickled weights, never code."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, as its shard's header says."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size on disk in bytes."""
        return math.prod(self.shape) * _BYTES.get(self.dtype, 4)


def resolve_model(model: str | Path, files: Sequence[str] = HUB_FILES) -> Path:
    """Return the local directory of ``model``, a directory or a hub id (downloaded where the hub can be reached).

    Args:
        files: patterns of what is needed of a model on the hub.

    Raises:
        UsageError: it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path} is a file, not a model directory.")
    parts = str(model).split("/")
    if len(parts) != 2 or str(model).startswith((".", "~")) or not all(parts):
        raise UsageError(f"{path} is not a directory.\nGive the directory of a Hugging Face model, or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UsageError(
            f"{model} is no directory here, and the hub did not give a model of that name ({type(error).__name__}).\n"
            "Check the spelling and the connection, or give a local directory."
        ) from error


def load_model_config(directory: Path) -> Any:
    """Return the transformers config of the model in ``directory``; code of the model's own is never run.

    Raises:
        UsageError: there is none, or transformers cannot read it.
    """
    if not (directory / "config.json").is_file():
        raise UsageError(f"{directory} is not a model directory: it has no config.json.")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except StrictDataclassError as error:  # a value of a wrong type, or values that contradict one another
        raise UsageError(f"{directory / 'config.json'} cannot be used: {error.__cause__ or error}") from error
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{directory / 'config.json'} cannot be used: {first}") from error


class Checkpoint:
    """The safetensors weights of a model directory.

    Raises:
        UsageError: no config.json, no safetensors weights (pickled ``.bin`` weights are refused), an index that
            names missing or outside files, or a damaged shard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = load_model_config(directory)
        self.bytes_read = 0
        self._info: dict[str, TensorInfo] = {}
        for file in self._shards():
            self._read_header(file)
        if not self._info:
            raise UsageError(f"{directory}: its safetensors files hold no tensors.")

    def _shards(self) -> list[str]:
        index = self.directory / INDEX_NAME
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UsageError(f"{index} is damaged: it has no readable weight_map.") from error
            for file in files:
                if not isinstance(file, str) or Path(file).name != file:
                    raise UsageError(f"{index}: the file name {file!r} leaves the model's directory.")
                if not (self.directory / file).is_file():
                    raise UsageError(f"{index} names {file}, which is missing.\nDownload the model again.")
            return files
        if (self.directory / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt*")):
            raise UsageError(
                f"{self.directory} holds pickled weights only, and unpickling a file can run any code.\n"
                "Convert them to safetensors first: load the model with transformers and call save_pretrained."
            )
        raise UsageError(f"{self.directory} is not a model directory: it has no {SINGLE_NAME} and no {INDEX_NAME}.")

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.directory / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    part = shard.get_slice(name)
                    self._info[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{self.directory / file} is damaged: {error}.\nDownload it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._info

    def names(self) -> list[str]:
        """Names of all tensors, as on disk."""
        return list(self._info)

    def info(self, name: str) -> TensorInfo:
        """Where ``name`` lies, its shape and dtype.

        Raises:
            UsageError: the model has no such tensor.
        """
        if name not in self._info:
            raise UsageError(f"{self.directory} has no tensor {name}: the files do not fit its config.json.")
        return self._info[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``."""
        return self.info(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of ``name`` in safetensors' spelling, such as "BF16"."""
        return self.info(name).dtype

    def file_of(self, name: str) -> str:
        """The shard (a file name in the directory) that holds ``name``."""
        return self.info(name).file

    def files(self) -> list[str]:
        """All shards, in the order of their names."""
        return sorted({info.file for info in self._info.values()})

    def tensor(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read one tensor straight to ``device``, in the dtype it has on disk."""
        return self.tensors([name], device)[name]

    def tensors(self, names: Iterable[str], device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Read several tensors straight to ``device``, opening each shard once.

        Raises:
            UsageError: a name is missing or a shard is damaged.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of(name), []).append(name)
        found = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(self.directory / file, framework="pt", device=str(device)) as shard:
                    for name in wanted:
                        found[name] = shard.get_tensor(name)
                        self.bytes_read += self._info[name].bytes
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{self.directory / file} is damaged: {error}.\nDownload it again.") from error
        return found
