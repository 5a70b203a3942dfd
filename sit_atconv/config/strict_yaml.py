"""YAML in which no key stands twice: of two values, the first would be lost without a word."""

from typing import Any

import yaml
from jsonargparse import get_loader


def load_strict_yaml(text: str) -> Any:
    """What YAML text says, read as jsonargparse reads it.

    Raises:
        yaml.YAMLError: for what is not YAML, for a key that stands twice, and for a section or list that holds
            itself by an alias.
    """
    _require_single_keys(yaml.compose(text), [])
    return get_loader("yaml")(text)


def _require_single_keys(node: yaml.Node | None, around: list[yaml.Node]) -> None:
    """Neither twice, nor once in a section and once as section.key; `around` are the sections and lists it is in."""
    if not isinstance(node, yaml.CollectionNode):
        return
    if node in around:
        raise _error("this section or list holds itself", node.start_mark)
    inside = [*around, node]
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_single_keys(value, inside)
        return
    seen: list[str] = []
    for key, value in node.value:
        name = f"{key.value}."
        for other in seen:
            if name.startswith(other) or other.startswith(name):
                raise _error(f"'{key.value}' stands twice, first as '{other[:-1]}'", key.start_mark)
        seen.append(name)
        _require_single_keys(value, inside)


def _error(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
