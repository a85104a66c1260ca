"""Which decoder layers ``layers_to_transform`` names: "16:31", "0:10,20:25,30"; inclusive, the first layer is 0."""

from __future__ import annotations

import re

from cadapter.config.rules import Problem, WrongKey
from cadapter.errors import UsageError

_PART = re.compile(r"\s*([0-9]+)\s*(?::\s*([0-9]+)\s*)?", re.ASCII)


def parse_ranges(spec: str) -> list[tuple[int, int]]:
    """Read ``spec`` as inclusive (first, last) pairs, in the order given; a single number is a range of one.

    Raises:
        UsageError: a part is empty, is no range, or ends before it starts.
    """
    ranges = []
    for part in spec.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise UsageError(f'"{part}" is no range of layers; write "FIRST:LAST" or "LAYER", separated by commas')
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise UsageError(f'"{part.strip()}" ends before it starts; write "{last}:{first}"')
        ranges.append((first, last))
    return ranges


def parse_layers(spec: str | None, count: int) -> list[int]:
    """The layers that ``spec`` names in a model of ``count`` layers, sorted, each once; all of them for ``None``.

    Raises:
        UsageError: ``spec`` cannot be read.
        WrongKey: it names a layer that the model does not have.
    """
    if spec is None:
        return list(range(count))
    layers: set[int] = set()
    for first, last in parse_ranges(spec):
        if last >= count:
            part = str(first) if first == last else f"{first}:{last}"
            remedy = f'write "{first}:{count - 1}"' if first < count else "leave it out"
            text = f'"{part}" goes past the last layer: the model has {count} layers, 0 to {count - 1}; {remedy}'
            raise WrongKey(Problem(("layers_to_transform",), text), spec)
        layers.update(range(first, last + 1))
    return sorted(layers)
