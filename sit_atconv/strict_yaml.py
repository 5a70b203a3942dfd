"""YAML in which no key stands twice: of two values, the first would be lost without a word."""

from typing import Any

import yaml
from jsonargparse import get_loader


def load_strict_yaml(text: str) -> Any:
    """What YAML text says, read as jsonargparse reads it.

    Raises:
        yaml.YAMLError: for what is not YAML, and for a key that stands twice.
    """
    _require_single_keys(yaml.compose(text))
    return get_loader("yaml")(text)


def _require_single_keys(node: yaml.Node | None) -> None:
    """Neither twice, nor once in a section and once as section.key."""
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_single_keys(value)
    if isinstance(node, yaml.MappingNode):
        seen: list[str] = []
        for key, value in node.value:
            name = f"{key.value}."
            for other in seen:
                if name.startswith(other) or other.startswith(name):
                    problem = f"'{key.value}' stands twice, first as '{other[:-1]}'"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.append(name)
            _require_single_keys(value)
