"""layers_to_transform."""

from __future__ import annotations

import pytest

from cadapter.config.layers import parse_layers, parse_ranges
from cadapter.errors import UsageError


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, list(range(32))),
        ("16:31", list(range(16, 32))),
        ("0:0", [0]),
        ("7", [7]),
        ("0:10,20:25,30", [*range(11), *range(20, 26), 30]),
        (" 3 : 4 , 1 ", [1, 3, 4]),
        ("5:7,6:8,7", [5, 6, 7, 8]),
        ("20:21,1:2", [1, 2, 20, 21]),
    ],
)
def test_layers(spec: str | None, layers: list[int]) -> None:
    assert parse_layers(spec, 32) == layers


@pytest.mark.parametrize(
    "spec", ["", " ", ",", "1,", "1,,2", "a", "1:", ":1", "1:2:3", "-1", "1-3", "1.0", "0x1", "٣", "all"]
)
def test_syntax_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="is no range of layers"):
        parse_layers(spec, 32)


@pytest.mark.parametrize(
    ("spec", "part"), [("0:32", '"0:32"'), ("1:2, 40", '"40"'), ("32", '"32"'), ("0:999999999999", '"0:999999999999"')]
)
def test_past_the_last_layer_names_the_part_and_the_valid_range(spec: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers(spec, 32)
    assert part in str(caught.value)
    assert "0 to 31" in str(caught.value)


def test_reversed_range_names_the_part_and_the_remedy() -> None:
    with pytest.raises(UsageError, match=r'"31:16" ends before it starts; write "16:31"'):
        parse_ranges("0:3,31:16")
