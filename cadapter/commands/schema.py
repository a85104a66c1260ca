"""``cadapter schema``."""

from __future__ import annotations

EXAMPLES = ("cadapter schema", "cadapter schema > cadapter.schema.json")


def command() -> None:
    """Print the JSON schema of the config.

    Editors complete and explain the keys of a config with it: save it beside the config, and begin the config with
    the line `#:schema ./cadapter.schema.json`.
    """
    import json

    from cadapter.config.json_schema import config_schema

    print(json.dumps(config_schema(), indent=2, ensure_ascii=False))
