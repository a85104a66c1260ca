"""The tiny models of ``tests/tiny_models.py``."""

from __future__ import annotations

from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]
