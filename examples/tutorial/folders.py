"""Two folders of text files to follow the tutorial with: the stories that the quickstart has made.

python folders.py CORPUS    (the quickstart's work/corpus) writes good/ and bad/ into the current directory
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def write_folder(folder: Path, stories: Path) -> int:
    """Write each story of a JSONL file as a text file of its own; return how many there are."""
    folder.mkdir()
    texts = [json.loads(line)["text"] for line in stories.read_text(encoding="utf-8").splitlines()]
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return len(texts)


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    for name, source in (("good", "ornate.jsonl"), ("bad", "plain.jsonl")):
        print(f"{name}/: {write_folder(Path(name), corpus / source)} texts")
