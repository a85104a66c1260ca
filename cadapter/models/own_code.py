"""Python code that a model brings along: what of it is needed, whether it may run, and how it is imported.

A model directory names classes of its own in ``auto_map``, ``{"AutoConfig": "FILE.CLASS", …}``, of ``config.json`` and
``tokenizer_config.json``; transformers copies their files into a cache of modules and imports them from there. They run
only for those who ask for it (``trust_remote_code``), and the model's only where transformers has no class of its own
for the model's type: that is what the facts about families describe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cadapter.errors import UsageError
from cadapter.files import read_json, refuse_links_out
from cadapter.terminal import warn

MODEL_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
TOKENIZER_CONFIG = "tokenizer_config.json"

_REFERENCE = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")
_told: set[str] = set()


def needs_own_code(settings: Any) -> bool:
    """Whether a model with these settings (of its config.json) is of a type that its own code alone knows."""
    return "AutoConfig" in _named(settings) and not _known_type(settings)


def _known_type(settings: Mapping[str, Any]) -> bool:
    """Whether transformers has a config class for the model's type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return str(settings.get("model_type")) in CONFIG_MAPPING_NAMES


def is_own_class(instance: object) -> bool:
    """Whether the class of ``instance`` came out of a model's own code, which somebody has allowed."""
    return type(instance).__module__.startswith("transformers_modules.")


def auto_model(config: Any) -> Any:
    """transformers' ``AutoModelForCausalLM``, which makes of ``config`` the model that the code beside it describes.

    By itself it keeps to the first model that it saw with a config class, and directories of one name whose models
    differ may share their config's code.
    """
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    if is_own_class(config):
        reference = config.auto_map["AutoModelForCausalLM"]
        own = get_class_from_dynamic_module(reference, config.name_or_path, local_files_only=True)
        AutoModelForCausalLM.register(type(config), add_generation_mixin_to_remote_model(own), exist_ok=True)
    return AutoModelForCausalLM


def failures(config: Any, *usual: type[Exception]) -> tuple[type[Exception], ...]:
    """What building the model of ``config`` may raise: the ``usual``, but of a model's own code anything."""
    return (Exception,) if is_own_class(config) else usual


def tokenizer_classes(directory: Path) -> list[str]:
    """The tokenizer classes of its own, ``FILE.CLASS``, that the model in ``directory`` names."""
    try:
        named = _named(read_json(directory / TOKENIZER_CONFIG)).get("AutoTokenizer")
    except UsageError:  # not there, or damaged, which is told when it is loaded
        return []
    return [each for each in (named if isinstance(named, list) else [named]) if each is not None]


def _named(settings: Any) -> Mapping[str, Any]:
    """``auto_map``, of which an old form for tokenizers is a list."""
    named = settings.get("auto_map") if isinstance(settings, dict) else None
    return {"AutoTokenizer": named} if isinstance(named, list) else named if isinstance(named, dict) else {}


def code_files(directory: Path) -> list[Path]:
    """The files of the code that the model in ``directory`` needs, and those that they import from beside them.

    Raises:
        UsageError: one is not there, or lies elsewhere.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    refuse_links_out(directory, ("*.py",))
    settings = read_json(directory / "config.json")
    classes = (_model_classes(settings) if needs_own_code(settings) else []) + tokenizer_classes(directory)
    found: set[Path] = set()
    for reference in classes:
        file = _file_of(directory, reference)
        try:
            found |= {file, *map(Path, get_relative_import_files(file))}
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}, code of the model, cannot be read: {error}.") from error
    elsewhere = [file for file in found if file.parent != directory]
    if elsewhere:
        raise UsageError(f"{directory}: its code imports {elsewhere[0]}; only code directly beside the model is run.")
    return sorted(found)


def _model_classes(settings: Any) -> list[Any]:
    named = _named(settings)
    return [named[name] for name in MODEL_CLASSES if name in named]


def _file_of(directory: Path, reference: Any) -> Path:
    if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
        raise UsageError(
            f"{directory}: auto_map names {reference!r} as code of the model; only FILE.CLASS of a file in the model's "
            "own directory is run.\nCopy the code beside the model, and name it so."
        )
    file = directory / f"{reference.partition('.')[0]}.py"
    if not file.is_file():
        raise UsageError(f"{directory}: auto_map names {reference}, but {file.name} is not there.\nDownload it again.")
    return file


class OwnCodeNeeded(UsageError):
    """A model cannot be used without code of its own, which nobody has allowed."""


def refusal(directory: Path, file: str, classes: list[Any]) -> OwnCodeNeeded:
    """That ``classes`` of the model's own, named by its ``file``, are not run unasked, and what to do."""
    names = dict.fromkeys(f"{str(each).rpartition('--')[2].partition('.')[0]}.py" for each in classes)
    return OwnCodeNeeded(
        f"{directory / file} cannot be used: it needs code of the model's own ({', '.join(names)}), which is not run "
        "unasked.\n"
        "To run it, set trust_remote_code = true in the config, or give --trust-remote-code to a command without one.\n"
        f"This runs code from {directory}, which can do all that you can: read it first."
    )


def refuse_model(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise the :func:`refusal` of the code of a model with these settings."""
    raise refusal(directory, "config.json", _model_classes(settings))


@contextlib.contextmanager
def running(directory: Path) -> Iterator[None]:
    """Import code of ``directory`` within this: told once, and by one process at a time.

    Processes that begin together would otherwise read files of transformers' cache of modules that another is still
    writing; later ones find them there. A file system without locks lets all in.

    Raises:
        UsageError: the code is not all there, leads out of the directory, or has no place to be copied to.
    """
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    files = ", ".join(file.name for file in code_files(directory))
    _tell_once(f"Code of {directory} is run ({files}), because trust_remote_code is set.")
    try:
        Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
        lock = open(Path(HF_MODULES_CACHE) / ".cadapter-lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UsageError(
            f"{HF_MODULES_CACHE}, where transformers puts code of models, cannot be written: {error.strerror}.\n"
            "Name another directory in the variable HF_MODULES_CACHE."
        ) from error
    with lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load_config(directory: Path) -> Any:
    """The config of a model of whose type its own code alone knows, with that code; all of the model's is imported.

    Raises:
        UsageError: the code is not all there, leads out of the directory, or fails.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    with running(directory):
        reference = _named(read_json(directory / "config.json")).get("AutoModelForCausalLM")
        if reference is None:
            raise UsageError(f"{directory / 'config.json'} cannot be used: its auto_map has no AutoModelForCausalLM.")
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=True, local_files_only=True)
            get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
        except Exception as error:  # code that anybody wrote, for any version
            raise UsageError(
                f"{directory}: its own code fails ({type(error).__name__}: {error}).\n"
                f"It may need packages that are not installed, or another transformers than {transformers.__version__}."
            ) from error
    return config


def tell_unused(directory: Path, settings: Mapping[str, Any]) -> None:
    """Say, where the model of ``directory`` brings code that was allowed and is not needed, that it is not run."""
    if "AutoModelForCausalLM" in _named(settings) and _known_type(settings):
        _tell_once(
            f"The model code of {directory} is not run: transformers has its own for type {settings['model_type']!r}."
        )


def _tell_once(text: str) -> None:
    """Warn in one process of a run."""
    if text not in _told and os.environ.get("RANK", "0") == "0":
        warn(text)
    _told.add(text)
