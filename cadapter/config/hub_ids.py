"""What may be the id of a model on the Hugging Face hub: "gpt2", "allenai/OLMo-2-0425-1B"."""

from __future__ import annotations

import re

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HUB_ID = re.compile(f"(?:{_PART}/)?{_PART}")


def may_be_hub_id(model: str) -> bool:
    """Whether ``model``, which is no directory here, can be looked up on the hub; paths with more to them cannot."""
    return _HUB_ID.fullmatch(model) is not None
