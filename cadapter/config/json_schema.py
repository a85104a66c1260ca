"""The JSON schema of the config, for editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from cadapter.config.schema import Config


class _TomlSchema(GenerateJsonSchema):
    """TOML has no null: a key that may be absent is simply not required."""

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def config_schema() -> dict[str, Any]:
    """The schema of :class:`Config` in JSON Schema's draft 2020-12, descriptions and bounds included."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **Config.model_json_schema(schema_generator=_TomlSchema),
        "title": "cadapter config",
    }
