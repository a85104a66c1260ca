"""Whether the documents that an evaluation calls held out were held out when the adapter was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cadapter.config import Config
from cadapter.data import fingerprint_of
from cadapter.data.preparing import overlength_of
from cadapter.errors import UsageError
from cadapter.training.resuming import EXCUSED_BY, flat_settings, settings_of

SPLIT_BY = EXCUSED_BY["training data"]
"""Keys of the config on which it may depend which documents are held out."""


def check_held_out(config: Config, subject: Path) -> str | None:
    """Return what the user must hear where the run that ``subject`` comes from is not known; None where all is well.

    The run is that in whose directory ``subject`` lies; its resolved.json says what it was trained on.

    Raises:
        UsageError: the run held out other documents, so that some that it trained on would be scored as unseen.
    """
    found = _run_of(subject)
    if found is None:
        return (
            f"{subject} does not lie in the directory of its run: whether it was trained on the documents that are "
            "held out here is not known.\nTo be sure, score texts that you know: --data FILE:CLASS."
        )
    run, resolved = found
    saved, then = resolved["config"], resolved["facts"]["training data"]
    if fingerprint_of(_with_harmless_keys_of(saved, config)) == then:
        return None
    old, new = dict(flat_settings(saved)), dict(flat_settings(settings_of(config)))
    differing = [
        f"{key}: {_in_words(old.get(key))} in the run, {_in_words(new.get(key))} now"
        for key in {**new, **old}
        if key.partition(".")[0] in SPLIT_BY and old.get(key) != new.get(key)
    ]
    lines = differing or ["its texts or the tokenizer have changed, or another version of cadapter prepared them"]
    raise UsageError(
        f"{run} held out other documents than would be held out now, and may have trained on these:\n"
        + "".join(f"  {line}\n" for line in lines)
        + "Set it back (what was given with --set has to be given again), or score texts that it was not trained on: "
        "--data FILE:CLASS."
    )


def _in_words(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _run_of(subject: Path) -> tuple[Path, dict[str, Any]] | None:
    """The directory of the run that ``subject`` (final/, checkpoints/step-N/ …) lies in, and its resolved.json."""
    place = subject.resolve()
    for directory in (place.parent, place.parent.parent):
        try:
            resolved = json.loads((directory / "resolved.json").read_text("utf-8"))
            if isinstance(resolved["config"], dict) and resolved["facts"]["training data"]:
                return directory, resolved
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def splits_documents(config: Config) -> bool:
    """Whether documents may be split, so that none changes sides with another length of sequences."""
    return not config.mix_datasets and all(overlength_of(config, each) == "split" for each in config.datasets)


def _with_harmless_keys_of(saved: dict[str, Any], config: Config) -> Config:
    """``config`` with those values of the run by which no document changes sides.

    Which tokens are masked and how sequences are packed moves none, and the length of sequences does not where
    documents may be split. With a smaller ``eval_fraction`` some of those that were held out still are, with 0 none.
    """
    values = {"mask_tokens": saved.get("mask_tokens"), "drop_tails": saved.get("drop_tails")}
    if config.eval_fraction < saved.get("eval_fraction", 0):
        values["eval_fraction"] = saved["eval_fraction"]
    if splits_documents(config):
        values["sequence_len"] = saved.get("sequence_len")
    tails = [each.get("drop_tails") for each in saved.get("datasets", ())]
    if len(tails) == len(config.datasets):
        values["datasets"] = [
            each.model_copy(update={"drop_tails": tail}) for each, tail in zip(config.datasets, tails, strict=True)
        ]
    return config.model_copy(update=values)
