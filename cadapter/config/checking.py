"""All that is wrong with a config's data, at once, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError

from cadapter.config.lines import KeyPath
from cadapter.config.rules import Problem, conflicts
from cadapter.config.schema import WRONG, ClassWeights, Config, DatasetConfig, Table
from cadapter.config.toml import toml_type
from cadapter.config.wording import expected, field_at

_PATHS = frozenset({"model_dir", "output_dir", "init_from", "cache_dir", "dataset_path"})


def check(data: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The config that ``data`` describes, or None and every problem that it has, one for each path."""
    config, problems = _validate(data)
    wrong = {problem.path for problem in problems}
    view = _view(Config, data, (), wrong)
    view.datasets = [
        _view(DatasetConfig, table, ("datasets", index), wrong) for index, table in _tables(data.get("datasets"))
    ]
    for problem in [*conflicts(view), *_names_of_nothing(data, ())]:
        if problem.path not in wrong:
            wrong.add(problem.path)
            problems.append(problem)
    return (None if problems else config), problems


def _names_of_nothing(value: Any, path: KeyPath) -> Iterator[Problem]:
    """Paths with a NUL character, which no file has, and which functions of the system do not take."""
    if isinstance(value, str):
        if "\0" in value and path[-1] in _PATHS:
            yield Problem(path, "holds a NUL character, which no path has; leave it out")
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _names_of_nothing(part, (*path, key))


def value_at(data: Any, path: KeyPath) -> Any:
    """The value at ``path``, which exists."""
    for part in path:
        data = data[part]
    return data


def contains(data: Any, path: KeyPath) -> bool:
    """Whether ``data`` has something at ``path``."""
    try:
        value_at(data, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _validate(data: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    try:
        return Config.model_validate(data), []
    except ValidationError as error:
        errors: dict[KeyPath, list[Any]] = {}
        for entry in error.errors():
            if entry["loc"]:  # what has no location are the conflicts, which `check` finds by itself
                errors.setdefault(_path(entry["loc"]), []).append(entry)
    return None, [_problem(path, entries, data) for path, entries in errors.items()]


def _path(location: Sequence[str | int]) -> KeyPath:
    """pydantic's ``location`` without what is not in the data: the members of unions, and list elements."""
    length = {"datasets": 3, "class_weights": 2}.get(str(location[0]), 1)
    return tuple(location[:length])


def _problem(path: KeyPath, entries: Sequence[Any], data: Mapping[str, Any]) -> Problem:
    kinds = {entry["type"] for entry in entries}
    if "extra_forbidden" in kinds:
        return Problem(path, _unknown_key(path), shows_value=False)
    if path[0] == "datasets" and len(path) == 2:
        return Problem(path, "a dataset is a table; write [[datasets]] and its keys below")
    wanted = expected(field_at(path))
    if "missing" in kinds:
        return Problem(path, f"missing; give {wanted}", shows_value=False)
    if kinds == {WRONG}:
        return Problem(path, entries[0]["msg"])
    value = value_at(data, path)
    if "literal_error" in kinds and isinstance(value, str):
        return Problem(path, f"no such choice; give {wanted}")
    if all(kind.endswith("_type") or kind == "literal_error" for kind in kinds):
        return Problem(path, f"{toml_type(value)} is not accepted here; give {wanted}")
    return Problem(path, f"not allowed; give {wanted}")


_LEVELS: tuple[tuple[type[Table], str], ...] = (
    (Config, "of the whole config: it stands above the first [table]"),
    (DatasetConfig, "of a dataset: it stands under [[datasets]]"),
    (ClassWeights, "of class_weights"),
)


def _unknown_key(path: KeyPath) -> str:
    key = str(path[-1])
    own = Config if len(path) == 1 else DatasetConfig if path[0] == "datasets" else ClassWeights
    for model, place in _LEVELS:
        if model is not own and key in model.model_fields:
            return f"no key of this table; it is one {place}"
    nearest = difflib.get_close_matches(key, own.model_fields, n=1)
    if nearest:
        return f'unknown key; did you mean "{nearest[0]}"?'
    return "unknown key; remove it (cadapter schema lists them all)"


def _view(model: type[Table], table: Mapping[str, Any], at: KeyPath, wrong: Iterable[KeyPath]) -> SimpleNamespace:
    """The keys of ``table`` as attributes, defaults filled in, None where the value is wrong or missing."""
    values = {}
    for name, field in model.model_fields.items():
        default = None if field.is_required() else field.default
        values[name] = None if (*at, name) in wrong else table.get(name, default)
    return SimpleNamespace(**values)


def _tables(datasets: Any) -> list[tuple[int, Mapping[str, Any]]]:
    members = datasets if isinstance(datasets, list) else []
    return [(index, table) for index, table in enumerate(members) if isinstance(table, dict)]
