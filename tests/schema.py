"""As much of JSON Schema as a manifest of Kubernetes needs: type, enum, const, required, properties, items, pattern, minimum."""

import re
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "number": (int, float)}


def wrong(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """What of `value` is not as the schema says, a line each. A property that the schema does not have is wrong, too, unless
    it describes none."""
    kind = schema.get("type")
    if kind and not (isinstance(value, TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")):
        return [f"{path}: {value!r} is no {kind}"]
    found = []
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        found.append(f"{path}: {value!r} is not one of {schema.get('enum', schema.get('const'))}")
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        found.append(f"{path}: {value!r} does not match {schema['pattern']}")
    if isinstance(value, int) and value < schema.get("minimum", value):
        found.append(f"{path}: {value} is less than {schema['minimum']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += wrong(item, schema.get("items", {}), f"{path}[{i}]")
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{path}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if name in known or isinstance(others, dict):
                found += wrong(item, known.get(name, others), f"{path}.{name}")
            elif known:
                found.append(f"{path}: there is no {name}")
    return found
