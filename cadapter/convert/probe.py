"""The text on which a conversion is compared with its adapter, as rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadapter.classes import POSITIVE
from cadapter.data import Tokenizer
from cadapter.data.chat import Chat
from cadapter.data.records import Fields, documents_of
from cadapter.data.sources import COMPRESSIONS, read_records
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint

ROW_TOKENS = 256
MOST_ROWS = 8
RECORDS = (".jsonl", ".json", ".parquet")
"""Endings of files that hold records, and not one text."""
FEWEST_TOKENS = 8
"""A text of fewer tokens says nothing of a model."""

TEXT = """\
The ferry was late again, and nobody on the quay seemed to mind. An old man sold roasted almonds from a tin drum; two
children argued about the name of a star that had already gone down behind the customs house. "It was Vega," said the
girl. "It was a lamp," said her brother, who was older and had never been wrong about lamps. When the boat came at
last, its engine coughed twice and fell silent, so that it drifted the last ten metres on nothing but its own weight.

To plant a hedge that survives its first winter, dig the trench in October, when the ground is still warm. Three things
matter: depth (40 cm at least), distance (five plants to every two metres), and water in the first three weeks. Do not
feed the roots before spring. If a plant fails, replace it in March; if all of them fail, look at the drainage first.

The committee met on the 14th of May 1987 and approved 312,500 for repairs to the north roof, 48,200 for the bells, and
nothing for the organ. Of its nine members, six voted in favour, two against, and one had left to catch a train.

def running_mean(values):
    total, means = 0.0, []
    for count, value in enumerate(values, start=1):
        total += value
        means.append(total / count)
    return means

Dear Ms Okafor, thank you for your letter about the parcel that arrived open. We have sent you a new one today and would
be glad if you kept the first. Should anything be missing, please call us between eight and five, except on Wednesdays.

Why does ice float? Water is densest at about four degrees. Below that its molecules arrange themselves in an open
lattice, which takes more room; the solid weighs less than the liquid that it pushes aside, and so it stays on top. A
lake therefore freezes from above, and whatever lives at the bottom spends the winter in water that is cold, not hard.

I did not like the film. The first hour promises a mystery and the second forgets about it; the music tells us what to
feel, twice, in case we were looking away. But the last scene, a kitchen at night, a kettle, two people who have nothing
left to say and say it kindly, is as good as anything I have seen this year, and I would sit through the rest for it.

Il pleuvait depuis trois jours quand le facteur frappa enfin à la porte. Am nächsten Morgen war der Hof voller Blätter,
und niemand wusste, woher sie kamen. El perro, que lo sabía, no dijo nada.

Scene: a small office. Enter ROSA with a stack of folders. TOM: Are those all for me? ROSA: Only the blue ones. The red
ones are for whoever sits here after you. TOM: You might have told me that before I bought the plant.
"""


def probe_rows(base: Checkpoint, file: Path | None) -> list[Tensor]:
    """Rows of token ids [1, T] of ``file`` (None: a text of our own), beginning with BOS where the tokenizer has one.

    Rows have at most 256 tokens; a text begins a row, and of a longer one, or of many, the first 8 · 256 tokens are
    taken.

    Args:
        file: a plain text, or records with the field ``text`` (.jsonl, .json, .parquet).

    Raises:
        UsageError: the base has no tokenizer, or the text cannot be read or is too short.
    """
    tokenizer = Tokenizer(base.directory, base.trust_remote_code)
    bos = tokenizer.fast.bos_token_id
    start = [] if bos is None else [bos]
    longest = min(ROW_TOKENS, getattr(base.config, "max_position_embeddings", None) or ROW_TOKENS)
    step = longest - len(start)
    rows: list[list[int]] = []
    found, left = 0, MOST_ROWS * step
    for text in _texts(file):
        [ids] = tokenizer.encode([text])
        found += len(ids)
        parts = [ids[at : at + step].tolist() for at in range(0, min(len(ids), left), step)]
        rows += [[*start, *part] for part in parts if len(part) >= FEWEST_TOKENS]
        left -= sum(map(len, parts))
        if left < FEWEST_TOKENS:
            break
    if not rows:
        raise UsageError(
            f"--text {file}: the text has {found} tokens, too few to compare models on.\n"
            f"Give at least {FEWEST_TOKENS}, or leave --text out."
        )
    return [torch.tensor([row]) for row in rows]


def _texts(file: Path | None) -> Iterator[str]:
    """The texts of a file of records, or all of a plain one."""
    if file is None:
        yield TEXT
    elif Path(file.stem if file.suffix.lower() in COMPRESSIONS else file.name).suffix.lower() in RECORDS:
        for record in read_records([file], ("text",)):
            for document in documents_of(record, Fields(), POSITIVE, _no_chat):
                yield document.text
    else:
        try:
            yield file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UsageError(
                f"--text {file} cannot be read as text: {reason}.\nGive a plain text, or .jsonl with the field text."
            ) from error


def _no_chat(messages: Any, tools: Any, where: str) -> Chat:
    raise UsageError(f"{where}: --text takes texts, no chats.\nGive records with the field text.")
