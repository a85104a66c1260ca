"""cadapter: train, measure and convert Control Adapters for language models."""

from __future__ import annotations

__version__ = "0.1.0"
