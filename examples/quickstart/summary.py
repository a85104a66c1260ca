"""Print the table that `cadapter eval --json FILE` leaves behind: loss per dataset at the base, +1 and -1."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STRENGTHS = (0.0, 1.0, -1.0)
HEADINGS = ("base", "+1", "-1")


def losses_by_dataset(records: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Loss of each dataset at each strength (0 is the base), in nats per token."""
    table: dict[str, dict[float, float]] = {}
    for record in records:
        if "dataset" in record:
            table.setdefault(Path(record["dataset"]).stem, {})[float(record["strength"])] = record["loss"]
    return table


def main() -> None:
    """Read the file and print the table."""
    parser = argparse.ArgumentParser(description="Print eval's table of losses in short.")
    parser.add_argument("json_file", type=Path, help="written by `cadapter eval CONFIG --json FILE`")
    options = parser.parse_args()
    records = json.loads(options.json_file.read_text(encoding="utf-8"))
    table = losses_by_dataset(records)
    if not table:
        raise SystemExit(f"{options.json_file}: holds no dataset's loss")

    print(f"{'texts':<10}" + "".join(f"{heading:>9}" for heading in HEADINGS) + "   best at")
    for dataset, losses in table.items():
        best = min(STRENGTHS, key=losses.__getitem__)
        row = "".join(f"{losses[strength]:>9.3f}" for strength in STRENGTHS)
        print(f"{dataset:<10}{row}   {HEADINGS[STRENGTHS.index(best)]}")
    for record in records:
        if "contrast" in record:
            share = f"{100 * record['sign_share']:.0f} %"
            print(f"Contrast at ±1: {record['contrast']:.3f} ± {record['contrast_se']:.3f} nats per token.")
            print(
                f"{share} of the held-out stories get the lower loss at their own register's strength (chance: 50 %)."
            )


if __name__ == "__main__":
    main()
