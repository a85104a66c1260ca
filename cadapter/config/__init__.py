"""The config of a run: what its keys are, and how a TOML file becomes a checked :class:`Config`. No torch here."""

from __future__ import annotations

from cadapter.config.idle import idle_in_run, idle_keys
from cadapter.config.loading import load_config, located, locating
from cadapter.config.rules import check_layout, config_warnings
from cadapter.config.schema import ClassWeights, Config, DatasetConfig

__all__ = [
    "ClassWeights",
    "Config",
    "DatasetConfig",
    "check_layout",
    "config_warnings",
    "idle_in_run",
    "idle_keys",
    "load_config",
    "located",
    "locating",
]
