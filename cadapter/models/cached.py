"""Blocks that keep the keys and values of earlier tokens, so that a text's next token is all that goes through them.

Each stage keeps those of its own blocks, in transformers' own cache. What blocks are called with depends on how many
tokens went before; the model's own forward pass says it, given a cache of made-up keys and values of that many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cadapter.models.layers import Frame
from cadapter.models.loading import FLEX_ATTENTION, CausalLM

CACHE = "past_key_values"
"""The keyword argument by which blocks get the cache."""


class CachedFrame(Frame):
    """A :class:`cadapter.models.layers.Frame` of blocks with a cache, one for all blocks of a stage.

    Args:
        models: one; or one for each of the equal parts into which the blocks divide their rows
            (see :mod:`cadapter.training.paired`), each of which has a cache of its own.
    """

    def __init__(self, models: Sequence[CausalLM]) -> None:
        super().__init__(models[0])
        self._models = models
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.tokens = 0
        self._caches = [_new_cache(model) for model in self._models]
        self._counts = [_new_cache(model) for model in self._models]
        self._now: list[list[dict[str, Any]]] | None = None

    def arguments(self, hidden: Tensor, index: int, positions: Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments for decoder block ``index`` on hidden states [B, T, H] of the next tokens."""
        if self._now is None:
            self._now = [
                model.cached_arguments(hidden.shape[1], count)
                for model, count in zip(self._models, self._counts, strict=True)
            ]
        found = [{**each[index], CACHE: cache} for each, cache in zip(self._now, self._caches, strict=True)]
        return found[0] if len(found) == 1 else {"by_part": found}

    def passed(self, tokens: int) -> None:
        """Know that ``tokens`` tokens of each row have gone through all blocks."""
        self.tokens += tokens
        self._now = None
        for model, count in zip(self._models, self._counts, strict=True):
            _lengthen(count, model.layer_count, tokens)


def cached_frame(models: Sequence[CausalLM]) -> CachedFrame | None:
    """A frame with a cache; None where these models keep more of a text than keys and values, or hide where."""
    return CachedFrame(models) if all(map(_keeps_keys_and_values, models)) else None


def _keeps_keys_and_values(model: CausalLM) -> bool:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = _new_cache(model)
    kinds = {type(layer) for layer in cache.layers}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer} or len(cache.layers) != model.layer_count:
        return False
    if model.attention == FLEX_ATTENTION:  # compiled for each length
        return False
    return all(each.get(CACHE) is cache for each in model.cached_arguments(1, cache))


def _new_cache(model: CausalLM) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _lengthen(cache: Any, layers: int, tokens: int) -> None:
    """Add keys and values that take next to no memory, for the sake of their number."""
    nothing = torch.zeros(1, 1, tokens, 1)
    for layer in range(layers):
        cache.update(nothing, nothing, layer)
