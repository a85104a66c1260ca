"""Disks and limits: where is written, how much room there is, and what the system allows."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from cadapter.doctor.findings import GIB, Finding, size

DISKS, LIMITS, CONFIG, HUB = "Disks", "Limits", "Config", "Hub"
LITTLE_ROOM = 10 * GIB
LITTLE_SHARED_MEMORY = GIB
FEW_FILES = 4096
_ON = ("1", "ON", "YES", "TRUE")


def check_place(name: str, path: Path, part: str = DISKS) -> Finding:
    """Whether a directory that is or will be there can be written, and how much room it has."""
    there = path.expanduser().absolute()
    while not there.is_dir():
        if there.exists() or there.parent == there:
            return Finding(part, name, "broken", f"{path}: {there} is no directory.", "Choose another place.")
        there = there.parent
    trial = there / f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        trial.write_bytes(b"trial")
        trial.unlink()
        free = shutil.disk_usage(there).free
    except OSError as error:
        with contextlib.suppress(OSError):
            trial.unlink()
        return Finding(part, name, "broken", f"{path} cannot be written: {error.strerror}.", "Choose another place.")
    if free < LITTLE_ROOM:
        return Finding(
            part, name, "warning", f"{path}: only {size(free)} are free.", "Make room, or choose another place."
        )
    return Finding(part, name, "ok", f"{path}, {size(free)} free")


def check_disks() -> Iterator[Finding]:
    """Where models of the hub and temporary files go."""
    yield check_place("temporary files", Path(tempfile.gettempdir()))
    hub = check_place("hub cache", _hub_cache())
    if hub.status == "broken":
        hub = Finding(hub.part, hub.name, "warning", hub.text, "Set HF_HOME to a place that can be written.")
    yield hub


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models, by its rules, whether or not it is installed."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def check_hub() -> Iterator[Finding]:
    """Whether models can be fetched by their hub id."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _ON:
            yield Finding(
                HUB, "offline", "ok", f"{name} is set: only directories and what is in the hub cache are used"
            )
            return
    yield Finding(HUB, "offline", "ok", "models are fetched by hub id where the network allows it")


def check_config(path: Path) -> Iterator[Finding]:
    """The places that a config names, if the config is right."""
    from cadapter.config import load_config
    from cadapter.config.hub_ids import may_be_hub_id
    from cadapter.errors import UsageError

    try:
        config = load_config(path)
    except UsageError as error:
        yield Finding(CONFIG, str(path), "broken", "\n".join(str(error).splitlines()), "Correct the config.")
        return
    yield Finding(CONFIG, str(path), "ok", "every key is right")
    yield check_place("output_dir", Path(config.output_dir), CONFIG)
    first = Path(config.datasets[0].dataset_path)
    yield check_place("cache_dir", Path(config.cache_dir) if config.cache_dir else first.parent, CONFIG)
    model = Path(config.model_dir)
    if model.is_dir() and not (model / "config.json").is_file():
        yield Finding(CONFIG, "model_dir", "broken", f"{model} has no config.json.", "Give a Hugging Face model.")
    elif model.is_dir():
        yield Finding(CONFIG, "model_dir", "ok", str(model))
        yield from _own_code(model, config.trust_remote_code)
    elif may_be_hub_id(config.model_dir):
        yield Finding(CONFIG, "model_dir", "ok", f"{config.model_dir} is no directory here: it is taken for a hub id")
    else:
        yield Finding(CONFIG, "model_dir", "broken", f"{model} is not there.", "Give a directory or a hub id.")


def _own_code(model: Path, trusted: bool) -> Iterator[Finding]:
    """Whether a model needs Python code of its own; nothing where transformers, which knows, is not installed."""
    from cadapter.errors import UsageError

    try:
        from cadapter.files import read_json
        from cadapter.models.own_code import needs_own_code, refuse_model

        settings = read_json(model / "config.json")
        if needs_own_code(settings) and not trusted:
            refuse_model(model, settings)
    except (ImportError, RuntimeError):  # a broken transformers, which is told elsewhere
        return
    except UsageError as error:
        said, *rest = str(error).splitlines()
        yield Finding(CONFIG, "model", "broken", said, " ".join(rest))
        return
    if trusted:
        yield Finding(CONFIG, "trust_remote_code", "warning", f"Code of {model} is run where it is needed.", "Read it.")


def check_limits() -> Iterator[Finding]:
    """Shared memory and what the shell allows a process."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        if total < LITTLE_SHARED_MEMORY:
            remedy = "In a container, start it with --shm-size=8g or --ipc=host."
            words = f"{shared} has {size(total)}; NCCL and several processes need more."
            yield Finding(LIMITS, "shared memory", "warning", words, remedy)
        else:
            yield Finding(LIMITS, "shared memory", "ok", f"{size(total)} at {shared}")
    else:
        yield Finding(LIMITS, "shared memory", "warning", f"There is no {shared}.", "NCCL may need NCCL_SHM_DISABLE=1.")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < FEW_FILES:
        yield Finding(LIMITS, "open files", "warning", f"a process may open {files:,}.", f"ulimit -n {FEW_FILES}")
    else:
        yield Finding(LIMITS, "open files", "ok", "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}")
    yield from _limit("file size", resource.RLIMIT_FSIZE, "ulimit -f unlimited")
    yield from _limit("address space", resource.RLIMIT_AS, "ulimit -v unlimited")


def _limit(name: str, kind: int, remedy: str) -> Iterator[Finding]:
    """A limit that should not be there; nothing is said where it is not."""
    value, _ = resource.getrlimit(kind)
    if value != resource.RLIM_INFINITY:
        yield Finding(LIMITS, name, "warning", f"is limited to {size(value)} a process.", remedy)
