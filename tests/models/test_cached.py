"""Blocks that keep keys and values, against Hugging Face's whole models that see the whole text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cadapter.models.cached import CachedFrame, cached_frame
from cadapter.models.layers import DecoderLayer
from tests.tiny_models import CONFIGS, VOCAB, WINDOW
from tests.tiny_pipeline import full_builder, hugging_faces, no_classes, output_logits, random_tokens, run_layers

ROWS, PIECES = 3, (WINDOW + 3, 1, 1, 4, *[1] * WINDOW)
"""A beginning longer than a window, then one token or several at a time, further than the window reaches back."""


def check_pieces(directory: Path) -> None:
    """Make sure that a text in pieces gives the logits of Hugging Face's model on the whole of it."""
    stages = full_builder(directory)
    layers = [build() for build in stages.builders()]
    frame = cached_frame([stages.model])
    assert isinstance(frame, CachedFrame)
    for layer in layers:
        if isinstance(layer, DecoderLayer):
            layer.frame = frame
        layer.eval()
    ids = random_tokens(ROWS, sum(PIECES), VOCAB)
    whole = hugging_faces(directory)(ids, use_cache=False).logits
    for _ in range(2):  # the second time nothing is left of the first
        found = []
        for piece in ids.split(PIECES, dim=1):
            with torch.no_grad():
                found.append(output_logits(run_layers(layers, piece, no_classes(piece))))
            frame.passed(piece.shape[1])
        assert frame.tokens == ids.shape[1]
        # float32; other shapes of products round otherwise
        torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=2e-5, rtol=2e-5)
        frame.clear()


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_of_a_text_one_after_the_other_are_the_text(name: str, tiny_model: Callable[..., Path]) -> None:
    check_pieces(tiny_model(name))
