"""The table of how far pipelines are from Hugging Face's models, filled by tests and printed after them."""

from __future__ import annotations

LOGITS, LOSS, ADAPTERS, WEIGHTS = "|Δlogits|", "Δloss", "adapters' gradients", "weights' gradients"
COLUMNS = (LOGITS, LOSS, ADAPTERS, WEIGHTS)


class ParityTable:
    """The largest difference that was seen, by model, number of stages and column."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], dict[str, float]] = {}

    def note(self, model: str, stages: int, column: str, difference: float) -> float:
        """Take ``difference`` into the table, and return it."""
        row = self._rows.setdefault((model, stages), {})
        row[column] = max(difference, row.get(column, 0.0))
        return difference

    def lines(self) -> list[str]:
        """The table as plain text; no lines where nothing was noted."""
        if not self._rows:
            return []
        cells = [("model", "stages", *COLUMNS)]
        models = list(dict.fromkeys(model for model, _ in self._rows))
        for model, stages in sorted(self._rows, key=lambda key: (models.index(key[0]), key[1])):
            row = self._rows[model, stages]
            cells.append((model, str(stages), *(f"{row[name]:.1e}" if name in row else "-" for name in COLUMNS)))
        first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        return [
            "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(rest, widths, strict=True))])
            for name, *rest in cells
        ]
