"""YAML without what no configuration needs: duplicate keys, tags, deep nesting and aliases of aliases."""

from typing import Any

import yaml
from jsonargparse import get_loader

_MAX_DEPTH, _MAX_DIGITS = 30, 40
_MAX_VALUES = 100_000  # with every alias written out


class TooLarge(yaml.constructor.ConstructorError):
    """Nesting that is too deep, too many values through aliases, or a number that is too long."""


def load_strict_yaml(text: str) -> Any:
    """The value of YAML text, parsed as jsonargparse does; a whole number may be written as 1e5.

    Raises:
        yaml.YAMLError: for text that is not YAML, a duplicate key (whose first value would be lost silently), a section
            or list that contains itself through an alias, tags, nesting deeper than 30, aliases that stand for more
            than 100,000 values, and numbers that Python cannot parse.
    """
    _require_plain(text)
    _Checker().values(yaml.compose(text), [])
    try:
        return _whole_numbers(get_loader("yaml")(text))
    except ValueError as error:  # such as 0b_, a binary number without digits
        raise yaml.YAMLError(str(error)) from error
    except TypeError as error:  # of jsonargparse, for a single key that is a number and has no value
        raise yaml.YAMLError("a key is a word, not a number") from error


def _require_plain(text: str) -> None:
    """Refuse tags, whose conversions raise errors of many kinds, and deep nesting."""
    depth = 0
    for event in yaml.parse(text):
        if getattr(event, "tag", None) is not None:
            raise _error(f"the tag {event.tag} has no meaning here", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise TooLarge(None, None, f"sections and lists are nested more than {_MAX_DEPTH} deep", event.start_mark)


class _Checker:
    """Checks each section and list once, however many aliases refer to it."""

    def __init__(self) -> None:
        self._counted: dict[yaml.Node, int] = {}

    def values(self, node: yaml.Node | None, around: list[yaml.Node]) -> int:
        """The number of values of a node; `around` are the sections and lists that contain it."""
        if not isinstance(node, yaml.CollectionNode):
            if node is not None and node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
                raise TooLarge(None, None, f"this number has more than {_MAX_DIGITS} digits", node.start_mark)
            return 1
        if node in around:
            raise _error("this section or list contains itself", node.start_mark)
        if node not in self._counted:
            is_list = isinstance(node, yaml.SequenceNode)
            inside = node.value if is_list else [value for _, value in node.value]
            if not is_list:
                _require_single_keys(node)
            self._counted[node] = sum(self.values(value, [*around, node]) for value in inside)
            if self._counted[node] > _MAX_VALUES:
                raise TooLarge(None, None, f"aliases expand this to more than {_MAX_VALUES:,} values", node.start_mark)
        return self._counted[node]


def _require_single_keys(section: yaml.MappingNode) -> None:
    """Refuse a key that is given twice, also once in a section and once as section.key."""
    seen: list[str] = []
    for key, _ in section.value:
        name = f"{key.value}."
        for other in seen:
            if name.startswith(other) or other.startswith(name):
                raise _error(f"'{key.value}' is given twice, first as '{other[:-1]}'", key.start_mark)
        seen.append(name)


def _whole_numbers(value: Any) -> Any:
    """Convert floats such as 1e5 and 3.0 to integers, recursively; fields of type float accept integers as well."""
    if isinstance(value, dict):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _error(problem: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
