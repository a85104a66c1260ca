"""The Python interface: a Hugging Face model with adapters attached natively, each at a strength that can be set.

``cadapter.load`` gives the model itself: its class is derived from the model's own, so that ``generate``, pipelines and
whatever else takes a Hugging Face model work with it. Nothing is merged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from cadapter.adapters.directory import (
    control_card,
    kind_of,
    read_adapter_config,
    read_control_adapter,
    write_control_adapter,
)
from cadapter.convert.lora_directory import LoraFiles, read_lora, write_lora
from cadapter.errors import UsageError
from cadapter.files import new_directory
from cadapter.models.attach import SteeredModel, Strength, check_fit, load_causal_lm, rows_of
from cadapter.models.attach_lora import SteeredLora
from cadapter.models.checkpoint import Checkpoint, open_model
from cadapter.models.device import usable_device
from cadapter.written import refuse_foreign_directory

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class _Model(PreTrainedModel, GenerationMixin):
        """What type checkers know of the models that adapters are attached to."""

else:
    _Model = object

DEFAULT = "default"
"""The name of an adapter that is given without one."""

PathLike = str | Path
AdapterPaths = PathLike | Mapping[str, PathLike]
OneStrength = Strength | torch.Tensor
Strengths = OneStrength | Mapping[str, OneStrength]


class _Attached:
    """An adapter that is attached to a model: what was read from its directory, and the dial of it."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path).expanduser()
        self.kind = kind_of(self.path)
        self.dial: SteeredModel | SteeredLora
        if self.kind == "control":
            self.control = read_control_adapter(self.path)
        else:
            self.config = read_adapter_config(self.path)
            self.lora: LoraFiles = read_lora(self.path, "cadapter.load")

    def check(self, checkpoint: Checkpoint) -> None:
        """Make sure that it fits a model, before any weight of it is read."""
        if self.kind == "control":
            check_fit(self.control, checkpoint)

    def attach(self, model: Any, strength: Strength) -> None:
        """Put it into ``model``."""
        if self.kind == "control":
            self.dial = SteeredModel(model, self.control, strength)
        else:
            self.dial = SteeredLora(model, self.path, self.lora.pairs, self.kind == "multiplicative", strength)

    def write(self, directory: Path) -> None:
        """Write it into an existing directory as it was read."""
        if self.kind == "control":
            write_control_adapter(directory, self.control, control_card(self.control))
        else:
            card = f"# LoRA\n\nThis {self.kind} LoRA was read from `{self.path}` and saved as it was.\n"
            write_lora(directory, self.config, self.lora.pairs, card)


class SteeredLM(_Model):
    """A Hugging Face causal language model with adapters attached; :func:`load` makes it.

    It is an instance of the model's own class too (``LlamaForCausalLM``, for instance).
    """

    _attached: dict[str, _Attached]

    @property
    def strengths(self) -> dict[str, Strength]:
        """The strengths that are set, by the adapters' names."""
        return {name: attached.dial.strength for name, attached in self._attached.items()}

    def set_strength(self, strength: Strengths) -> None:
        """Set how far adapters are turned, from the next call on.

        Args:
            strength: a number for all adapters: 1 as trained, −1 the inverse, 0 the base bit for bit, 0.5 half-way; a
                sequence of numbers, or a tensor: one for each row of a batch; or one of these for each adapter to be
                set, by name.

        Raises:
            UsageError: an adapter has no such strength or there is no adapter of a name; all stays as it was.
        """
        wanted = _by_name(strength, self._attached)
        for each in wanted.values():
            rows_of(each)  # all are numbers before the first is set
        before = self.strengths
        try:
            for name, each in wanted.items():
                self._attached[name].dial.set_strength(each)
        except UsageError:
            for name in wanted:
                self._attached[name].dial.set_strength(before[name])
            raise

    @contextmanager
    def at_strength(self, strength: Strengths) -> Iterator[SteeredLM]:
        """Work at a strength (see :meth:`set_strength`) within a ``with`` block; afterwards all is as before."""
        before = self.strengths
        self.set_strength(strength)
        try:
            yield self
        finally:
            self.set_strength(before)

    def save_adapter(self, directory: PathLike, name: str | None = None, force: bool = False) -> None:
        """Write an adapter, as it was loaded and whatever its strength, to a directory that every command reads.

        Args:
            directory: to be written, whole or not at all.
            name: of the adapter; needed where there are several.
            force: replace an adapter that is there.

        Raises:
            UsageError: the directory exists, or holds what cadapter did not write, or it is not clear which adapter is
                meant.
        """
        if name is None and len(self._attached) > 1:
            raise UsageError(f"The model has several adapters.\nGive the name of one: {', '.join(self._attached)}.")
        [chosen] = _by_name({name: 0} if name else 0, self._attached)
        target = Path(directory).expanduser()
        with _in_words_of_python():
            if force:
                refuse_foreign_directory(target)
            with new_directory(target, force) as temporary:
                self._attached[chosen].write(temporary)

    def detach(self) -> Any:
        """Take all adapters away and return the model, which is then what it was before them."""
        for attached in reversed(self._attached.values()):
            attached.dial.remove()
        del self._attached
        self.__class__ = type(self).__bases__[1]
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a directory of the model as it is would be none that transformers can load.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "A model with adapters attached is not saved: what was written would be no model that loads again.\n"
            "Save the adapter with save_adapter(DIR), or the base with detach().save_pretrained(DIR). A model with the "
            "adapter in its weights is made by `cadapter merge BASE ADAPTER DIR`."
        )

    push_to_hub = save_pretrained


@contextmanager
def _in_words_of_python() -> Iterator[None]:
    """Errors within speak of arguments where commands have options."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("--force", "force=True")) from error


@functools.cache
def _steered_class(model_class: type) -> type:
    """The class of a model of ``model_class`` with adapters; of the same name, which transformers looks at."""
    return type(model_class.__name__, (SteeredLM, model_class), {"__module__": model_class.__module__})


def _by_name(strengths: Strengths, names: Mapping[str, Any]) -> dict[str, Strength]:
    """Strengths by name, where one may stand for all.

    Raises:
        UsageError: a name that there is not.
    """
    if not isinstance(strengths, Mapping):
        return dict.fromkeys(names, _plain(strengths))
    unknown = [name for name in strengths if name not in names]
    if unknown:
        raise UsageError(f"There is no adapter named {unknown[0]!r}.\nThere is: {', '.join(names)}.")
    return {name: _plain(each) for name, each in strengths.items()}


def _plain(strength: Any) -> Strength:
    """A strength as numbers of Python, where it is a tensor or an array."""
    if isinstance(strength, (list, tuple)):
        return [_plain(each) for each in strength]  # type: ignore[misc]  # rows_of refuses lists of lists
    plain: Strength = strength.tolist() if hasattr(strength, "tolist") else strength
    return plain


def load(
    model: PathLike | PreTrainedModel,
    adapter: AdapterPaths,
    strength: Strengths = 1.0,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> SteeredLM:
    """Return a Hugging Face model with one or more adapters attached, which act at every position.

    Control adapters act around blocks, in the order in which they are given; LoRAs, additive and multiplicative, beside
    the linear layers within.

    Args:
        model: a directory, a hub id, or a model that is loaded already, which is changed in place. Its blocks must be
            ``model.model.layers``, as those of nearly all decoder models are.
        adapter: the directory of an adapter, or several by names of your choice.
        strength: to start with, as :meth:`SteeredLM.set_strength` takes it; adapters that it does not name start at 1.
        dtype: of the weights, "bfloat16" for instance. Default: the model's own.
        device: where to load the model. Default: "cuda" where there is a GPU, else "cpu".
        trust_remote_code: run Python code that the model's directory brings, where transformers does not know its type.

    Raises:
        UsageError: a directory is not what it should be, an adapter does not fit the model or has no such strength.
        CadapterError: the device has too little memory.
    """
    paths = adapter if isinstance(adapter, Mapping) else {DEFAULT: adapter}
    if not paths:
        raise UsageError("There is no adapter.\nGive the directory of one, or several by name.")
    found = {name: _Attached(path) for name, path in paths.items()}
    wanted = {**dict.fromkeys(found, 1.0), **_by_name(strength, found)}
    causal_lm: Any = model
    if isinstance(model, (str, Path)):
        checkpoint = open_model(model, trust_remote_code)
        for each in found.values():
            each.check(checkpoint)
        causal_lm = load_causal_lm(checkpoint, _dtype(dtype), _device(device))
    elif dtype is not None or device is not None:
        raise UsageError("dtype and device are for a model that is loaded here.\nMove yours with model.to(...).")
    _check_loaded(causal_lm)
    return _attach_all(causal_lm, found, wanted)


def _attach_all(model: Any, found: dict[str, _Attached], strengths: Mapping[str, Strength]) -> SteeredLM:
    """Attach all or none."""
    done: list[_Attached] = []
    try:
        for name, each in found.items():
            each.attach(model, strengths[name])
            done.append(each)
    except UsageError:
        for each in reversed(done):
            each.dial.remove()
        raise
    kind: Any = type(model)
    model.__class__ = _steered_class(kind)
    model._attached = found
    return model


def _check_loaded(model: Any) -> None:
    """Make sure that adapters can be attached to a loaded model.

    Raises:
        UsageError: they cannot.
    """
    if isinstance(model, SteeredLM):
        raise UsageError(
            "This model has adapters attached.\nTake them away with detach() and give all adapters at once."
        )
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not hasattr(model, "config"):
        raise UsageError(
            f"Adapters cannot be attached to this {type(model).__name__}: it has no blocks at model.model.layers.\n"
            "Give what transformers' AutoModelForCausalLM.from_pretrained gives for a decoder model."
        )
    if any(parameter.is_meta for parameter in layers.parameters()):
        raise UsageError(
            "Some weights of this model are not in memory (offloaded by device_map).\n"
            "Load it to devices that hold all of it."
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype {dtype!r} is no floating-point type of torch.\nGive float32, bfloat16 or float16.")
    return found


def _device(device: torch.device | str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return usable_device(str(device), called="device")
