"""The text on which a conversion is compared with its adapter, as rows of token ids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cadapter.data import Tokenizer
from cadapter.errors import UsageError
from cadapter.models.checkpoint import Checkpoint

ROW_TOKENS = 256
MOST_ROWS = 8
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

    Rows have at most 256 tokens; of a longer text the first 8 are taken.

    Raises:
        UsageError: the base has no tokenizer, or the text cannot be read or is too short.
    """
    tokenizer = Tokenizer(base.directory)
    [ids], bos = tokenizer.encode([_text(file)]), tokenizer.fast.bos_token_id
    start = [] if bos is None else [bos]
    if len(ids) < FEWEST_TOKENS:
        raise UsageError(f"--text {file}: the text has {len(ids)} tokens, too few to compare models on.")
    longest = min(ROW_TOKENS, getattr(base.config, "max_position_embeddings", None) or ROW_TOKENS)
    step = longest - len(start)
    rows = [[*start, *ids[at : at + step].tolist()] for at in range(0, min(len(ids), MOST_ROWS * step), step)]
    if len(rows) > 1 and len(rows[-1]) < len(start) + FEWEST_TOKENS:
        rows.pop()
    return [torch.tensor([row]) for row in rows]


def _text(file: Path | None) -> str:
    if file is None:
        return TEXT
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {file} cannot be read as text: {error}.") from error
