"""A model directory on disk: its config, and single tensors out of its safetensors shards.

Nothing here reads more than it is asked for: names, shapes and dtypes come from the shards' headers, and a
tensor travels straight to its device. ``bytes_read`` counts what was read, so that a test can show that a
pipeline stage reads its own layers only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cadapter.config.hub_ids import may_be_hub_id
from cadapter.errors import UsageError
from cadapter.files import read_json, refuse_links_out
from cadapter.models import own_code
from cadapter.models.reading import Reader, Stretch
from cadapter.models.safetensors_format import DTYPES, header_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
"""What is downloaded of a model named by its hub id: never pickled weights, and code only where it is asked for."""

MOST_PARTS = 1 << 16
"""Layers, or experts of a layer; lists of that length are made before anything else shows that a config is wrong."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies (from which byte on) and what it is, as its shard's header says."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0

    @property
    def bytes(self) -> int:
        """Size on disk in bytes."""
        dtype = DTYPES.get(self.dtype)
        return math.prod(self.shape) * (4 if dtype is None else dtype.itemsize)


def resolve_model(model: str | Path, files: Sequence[str] = HUB_FILES, trust_remote_code: bool = False) -> Path:
    """Return the local directory of ``model``, a directory or a hub id (downloaded where the hub can be reached).

    Args:
        files: patterns of what is needed of a model on the hub.
        trust_remote_code: whether the code of a model on the hub is needed, too.

    Raises:
        UsageError: it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{path} is a file, not a model directory.")
    from_here = "" if path.is_absolute() else f"\nIt was looked up from {Path.cwd()}: correct the path, or start there."
    if not may_be_hub_id(str(model)):
        raise UsageError(
            f"{path} is not a directory.\nGive the directory of a Hugging Face model, or a hub id.{from_here}"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = [*files, "*.py"] if trust_remote_code else list(files)
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        text = (
            f"{model} is not a directory, and the hub is not asked, since HF_HUB_OFFLINE is set.\n"
            "Unset HF_HUB_OFFLINE if this is the name of a model on the hub, or give a local directory."
            if constants.HF_HUB_OFFLINE
            else f"{model} is not a directory, and the hub did not give a model of that name "
            f"({type(error).__name__}).\nCheck the spelling and the connection, or give a local directory."
        )
        raise UsageError(f"{text}{from_here}") from error


def load_model_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of the model in ``directory``.

    Args:
        trust_remote_code: run code of the model's own where transformers does not know its type.

    Raises:
        UsageError: there is none, transformers cannot read it, or it needs code of the model's own.
    """
    if not (directory / "config.json").is_file():
        raise UsageError(
            f"{directory} is not a model directory: it has no config.json.\n"
            "Give the directory of a Hugging Face model, or a hub id."
        )
    refuse_links_out(directory, HUB_FILES)
    settings = read_json(directory / "config.json")
    _check_settings(settings, directory / "config.json")
    own = own_code.needs_own_code(settings)
    if own and not trust_remote_code:
        own_code.refuse_model(directory, settings)
    if trust_remote_code:
        own_code.code_files(directory)  # all of it is there, before anything is done with the model
        own_code.tell_unused(directory, settings)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        if own:
            return own_code.load_config(directory)
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except UsageError:
        raise
    except StrictDataclassError as error:  # a value of a wrong type, or values that contradict one another
        raise UsageError(f"{directory / 'config.json'} cannot be used: {error.__cause__ or error}") from error
    except Exception as error:  # transformers trusts a config, and fails in any way where it is wrong
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{directory / 'config.json'} cannot be used: {first}") from error


def _check_settings(settings: Any, file: Path) -> None:
    """Make sure that transformers, which trusts a config, does not follow this one out of what is read here."""
    if not isinstance(settings, dict):
        raise UsageError(f"{file} cannot be used: it is no JSON object.")
    if settings.get("transformers_weights") is not None:
        raise UsageError(
            f"{file} names weights of its own (transformers_weights).\n"
            f"Only {SINGLE_NAME} and what {INDEX_NAME} names are read: remove the key if that is what it means."
        )
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(settings.get(key)):
            raise UsageError(f"{file} cannot be used: {key} = {settings[key]!r} is code on the hub; remove the key.")
    for key in ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(settings.get(key), int) and settings[key] > MOST_PARTS:
            raise UsageError(f"{file} cannot be used: {key} = {settings[key]}, more than any model has.")


class Checkpoint:
    """The safetensors weights of a model directory.

    Args:
        directory: the model's.
        trust_remote_code: run code of the model's own where it is needed.

    Raises:
        UsageError: no config.json, no safetensors weights (pickled ``.bin`` weights are refused), an index that
            names missing or outside files, or a damaged shard.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        self.directory = directory
        self.trust_remote_code = trust_remote_code
        self.config = load_model_config(directory, trust_remote_code)
        self.bytes_read = 0
        self.seconds_reading = 0.0
        self._reader: Reader | None = None
        self._info: dict[str, TensorInfo] = {}
        self._there = {path.name for path in directory.iterdir() if path.is_file()}
        for file in self._shards():
            self._read_header(file)
        if not self._info:
            raise UsageError(f"{directory}: its safetensors files hold no tensors.")

    def _shards(self) -> list[str]:
        index = self.directory / INDEX_NAME
        if index.is_file():
            try:
                files = sorted(set(read_json(index)["weight_map"].values()))
            except (KeyError, AttributeError, TypeError) as error:
                raise UsageError(f"{index} is damaged: it has no readable weight_map.") from error
            for file in files:
                self._check_name(file, index)
            return files
        if (self.directory / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        if any(self.directory.glob("*.bin")) or any(self.directory.glob("*.pt*")):
            raise UsageError(
                f"{self.directory} holds pickled weights only, and unpickling a file can run any code.\n"
                "Convert them to safetensors first: load the model with transformers and call save_pretrained."
            )
        raise UsageError(f"{self.directory} is not a model directory: it has no {SINGLE_NAME} and no {INDEX_NAME}.")

    def _check_name(self, file: Any, index: Path) -> None:
        """Make sure that ``index`` may name this shard."""
        if not isinstance(file, str) or Path(file).name != file:
            raise UsageError(f"{index}: the file name {file!r} leaves the model's directory.")
        if not file.endswith(".safetensors"):
            raise UsageError(
                f"{index}: {file!r} is no safetensors file, and others are not read: unpickling can run any code.\n"
                "Convert the model: load it with transformers and call save_pretrained."
            )
        if file not in self._there:
            raise UsageError(f"{index} names {file}, which is missing.\nDownload the model again.")

    def _read_header(self, file: str) -> None:
        try:
            header, start = header_of(self.directory / file)
            with safe_open(self.directory / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    part = shard.get_slice(name)
                    offset = start + header[name]["data_offsets"][0]
                    self._info[name] = TensorInfo(file, tuple(part.get_shape()), part.get_dtype(), offset)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
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
        """Read several tensors straight to ``device``; to a GPU in several threads.

        Raises:
            UsageError: a name is missing or a shard is damaged.
        """
        started = time.monotonic()
        try:
            return self._read(list(names), torch.device(device))
        finally:
            self.seconds_reading += time.monotonic() - started

    def _read(self, wanted: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        if device.type == "cuda" and all(self.dtype(name) in DTYPES for name in wanted):
            return self.tensors_at_once(wanted, device)
        by_file: dict[str, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.file_of(name), []).append(name)
        found = {}
        for file, own in by_file.items():
            try:
                with safe_open(self.directory / file, framework="pt", device=str(device)) as shard:
                    for name in own:
                        found[name] = shard.get_tensor(name)
                        self.bytes_read += self._info[name].bytes
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{self.directory / file} is damaged: {error}.\nDownload it again.") from error
        return found

    def tensors_at_once(self, names: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Read several tensors to ``device`` in several threads, past safetensors, whose own reading is a single one's.

        Raises:
            UsageError: a name is missing or a shard is damaged.
        """
        known = {name: self.info(name) for name in names}
        found = {name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device=device) for name, info in known.items()}
        if self._reader is None:
            self._reader = Reader(device)
        try:
            self._reader.read(
                Stretch(self.directory / info.file, info.offset, found[name]) for name, info in known.items()
            )
        except OSError as error:
            raise UsageError(f"{self.directory}: a shard is damaged: {error}.\nDownload it again.") from error
        self.bytes_read += sum(info.bytes for info in known.values())
        return found


def open_model(model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open ``model``, a directory or a hub id, as :func:`resolve_model` and :class:`Checkpoint` do.

    Raises:
        UsageError: it is no usable model, or needs code of its own that is not allowed to run.
    """
    return Checkpoint(resolve_model(model, trust_remote_code=trust_remote_code), trust_remote_code)
