"""YAML in which no key stands twice: of two values, the first would be lost without a word."""

from typing import Any

import yaml
from jsonargparse import get_loader


def load_strict_yaml(text: str) -> Any:
    """What YAML text says, read as jsonargparse reads it.

    Raises:
        yaml.YAMLError: for what is not YAML, for a key that stands twice, and for a section or list that an alias (*)
            repeats: it may hold itself.
    """
    _require_single_keys(yaml.compose(text), set())
    return get_loader("yaml")(text)


def _require_single_keys(node: yaml.Node | None, met: set[yaml.Node]) -> None:
    """Neither twice, nor once in a section and once as section.key; `met` are the sections and lists met so far."""
    if not isinstance(node, yaml.CollectionNode):
        return
    if node in met:
        raise _error("an alias (*) repeats this section or list: write it out", node.start_mark)
    met.add(node)
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_single_keys(value, met)
        return
    seen: list[str] = []
    for key, value in node.value:
        name = f"{key.value}."
        for other in seen:
            if name.startswith(other) or other.startswith(name):
                raise _error(f"'{key.value}' stands twice, first as '{other[:-1]}'", key.start_mark)
        seen.append(name)
        _require_single_keys(value, met)


def _error(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
