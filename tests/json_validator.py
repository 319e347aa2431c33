"""Whether a JSON value follows a schema, by a few lines that share nothing with llguidance. Knows what tests use."""

from __future__ import annotations

import re
from typing import Any

KINDS: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "number": int | float, "integer": int, "boolean": bool,
    "null": type(None),
}  # fmt: skip


def is_valid(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether `value` follows `schema`. root: the schema that `$ref` refers to, the whole one by default."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema

    def valid(value: Any, schema: Any) -> bool:
        return is_valid(value, schema, root)

    for key, wanted in schema.items():
        if key == "$ref":
            target = root
            for part in wanted.removeprefix("#/").split("/"):
                target = target[part]
            right = valid(value, target)
        elif key == "type":
            kinds = [wanted] if isinstance(wanted, str) else wanted
            right = any(isinstance(value, KINDS[kind]) for kind in kinds)
            right = right and (not isinstance(value, bool) or "boolean" in kinds)
        elif key == "enum":
            right = any(value == one and type(value) is type(one) for one in wanted)
        elif key == "const":
            right = value == wanted
        elif key == "anyOf":
            right = any(valid(value, one) for one in wanted)
        elif key == "properties":
            right = all(valid(value[name], one) for name, one in wanted.items() if name in value)
        elif key == "required":
            right = all(name in value for name in wanted)
        elif key == "additionalProperties":
            others = value.keys() - schema.get("properties", {}).keys()
            right = all(valid(value[name], wanted) for name in others)
        elif key == "prefixItems":
            right = all(valid(item, one) for item, one in zip(value, wanted, strict=False))
        elif key == "items":
            right = all(valid(item, wanted) for item in value[len(schema.get("prefixItems", [])) :])
        elif key in ("minItems", "minLength"):
            right = len(value) >= wanted
        elif key in ("maxItems", "maxLength"):
            right = len(value) <= wanted
        elif key == "minimum":
            right = value >= wanted
        elif key == "maximum":
            right = value <= wanted
        elif key == "pattern":
            right = re.search(wanted, value) is not None
        else:
            assert key in ("$defs", "title", "description", "default"), key
            right = True
        if not right:
            return False
    return True
