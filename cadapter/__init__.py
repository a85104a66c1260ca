"""cadapter: train, measure and convert Control Adapters for language models.

``load`` attaches adapters to a Hugging Face model; all else is done by the commands (``cadapter --help``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cadapter.errors import CadapterError, UsageError

if TYPE_CHECKING:
    from cadapter.api import SteeredLM, load

__version__ = "0.1.0"
__all__ = ["CadapterError", "SteeredLM", "UsageError", "__version__", "load"]

_OF_THE_API = ("SteeredLM", "load")


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for, so that commands answer at once."""
    if name in _OF_THE_API:
        from importlib import import_module

        return getattr(import_module("cadapter.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
