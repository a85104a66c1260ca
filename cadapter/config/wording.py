"""The schema in words: what a key accepts, for messages, and the table of all keys, for the documentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from cadapter.config.schema import ClassWeights, Config, DatasetConfig, Expects, Table
from cadapter.config.toml import toml_text


def expected(field: FieldInfo) -> str:
    """What ``field`` accepts, in words that complete "give …": "an integer of at least 1"."""
    for entry in field.metadata:
        if isinstance(entry, Expects):
            return entry.text
    return _expected(field.annotation)


def _expected(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return next(entry.text for entry in annotation.__metadata__ if isinstance(entry, Expects))
    if get_origin(annotation) is Literal:
        *others, last = (toml_text(choice) for choice in get_args(annotation))
        return f"{', '.join(others)} or {last}"
    if annotation is bool:
        return "true or false"
    without_none = [choice for choice in get_args(annotation) if choice is not type(None)]
    return _expected(without_none[0])


def reference_table(model: type[Table] = Config) -> str:
    """The keys of ``model`` as a Markdown table: key, what it accepts, default, meaning."""
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", expected(field), _default(field), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, ClassWeights):
        return "all 1.0"
    return "" if field.default is None else f"`{toml_text(field.default)}`"


def field_at(path: tuple[str | int, ...]) -> FieldInfo:
    """The schema's field for ``path``, a path of the config; of a member of a list: the list's field."""
    if path[0] == "datasets" and len(path) > 2:
        return DatasetConfig.model_fields[str(path[2])]
    if path[0] == "class_weights" and len(path) > 1:
        return ClassWeights.model_fields[str(path[1])]
    return Config.model_fields[str(path[0])]
