"""`mixer_pattern`: which mixer each block has.

A pattern is the name of a mixer, "hybrid", or a list with an entry for each block; a shorter list is repeated. An entry
is a name, or a dictionary of a "name" and the mixer's options: ``["attention", {"name": "atconv", "pool": "raster"}]``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.registry import check_options, mixer_options

Pattern = str | Sequence[str | Mapping[str, Any]]

HYBRID = ("attention", "atconv")  # blocks are counted from 1; the even ones are ATConv


class Entry(NamedTuple):
    """One block's mixer, and the options that the pattern gives it."""

    name: str
    options: dict[str, Any]

    def resolve(self) -> "Entry":
        """The entry with all options, defaults included. Equal resolved entries mean the same mixer."""
        return Entry(self.name, {**mixer_options(self.name), **check_options(self.name, self.options)})


def expand_pattern(pattern: Pattern, depth: int) -> list[Entry]:
    """The entries of `depth` blocks. Raises `InputError` for an invalid pattern or one with too many entries."""
    entries = [parse_entry(entry) for entry in _as_list(pattern)]
    hybrid = [entry.name for entry in entries] == list(HYBRID)  # allowed for a single block, which gets the first
    if not entries or (len(entries) > depth and not hybrid):
        raise InputError(
            f"mixer_pattern names {len(entries)} mixers for {depth} blocks: give one for each block, or fewer, which "
            "are then repeated."
        )
    return [entries[block % len(entries)] for block in range(depth)]


def parse_entry(entry: str | Mapping[str, Any]) -> Entry:
    """Parse an entry of a pattern. Raises `InputError` for one that has no name."""
    if isinstance(entry, str):
        return Entry(entry, {})
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise InputError(
            f"{entry!r} is not a valid entry of mixer_pattern: give the name of a mixer, or {{name: …, option: …}}."
        )
    return Entry(entry["name"], {key: value for key, value in entry.items() if key != "name"})


def with_atconv_options(pattern: Pattern, options: Mapping[str, Any]) -> Pattern:
    """Add options to every ATConv of a pattern, unless its entry sets them already.

    Options that equal ATConv's defaults leave the pattern unchanged.
    """
    chosen = {key: value for key, value in options.items() if value != mixer_options("atconv")[key]}
    if not chosen:
        return pattern
    entries = [parse_entry(entry) for entry in _as_list(pattern)]
    if all(entry.name != "atconv" for entry in entries):
        return pattern
    return [
        {"name": name, **chosen, **given} if name == "atconv" else {"name": name, **given} if given else name
        for name, given in entries
    ]


def describe_pattern(pattern: Pattern) -> str:
    """A pattern in words, for log lines and model cards: "attention, atconv (pool raster)"."""
    words = []
    for name, options in map(parse_entry, _as_list(pattern)):
        listed = ", ".join(f"{key} {value}" for key, value in options.items())
        words.append(f"{name} ({listed})" if listed else name)
    return ", ".join(words)


def _as_list(pattern: Pattern) -> list[str | Mapping[str, Any]]:
    if pattern == "hybrid":
        return list(HYBRID)
    return [pattern] if isinstance(pattern, str | Mapping) else list(pattern)
