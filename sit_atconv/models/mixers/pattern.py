"""`mixer_pattern`: which mixer each block has.

A pattern is the name of a mixer, "hybrid", or a list with an entry for each block; a shorter list is repeated. An entry
is a name, or a dictionary of a "name" and the mixer's options: ``["attention", {"name": "atconv", "pool": "raster"}]``.
An entry ``{"parallel": [entry, entry]}`` sums several mixers with learnt scales.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from sit_atconv.errors import InputError
from sit_atconv.models.mixers.parallel import Parallel
from sit_atconv.models.mixers.registry import check_options, create_mixer, list_mixers, mixer_options

Pattern = str | Sequence[str | Mapping[str, Any]]

HYBRID = ("attention", "atconv")  # blocks are counted from 1; the even ones are ATConv
QUERY_MIXERS = ("attention", "window")  # softmax attention without norms or rotations of its own
QUERY_OPTIONS = ("qk_norm", "rope")
_PARALLEL = "parallel"


class Entry(NamedTuple):
    """One block's mixer, and the options that the pattern gives it."""

    name: str
    options: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The registered mixers that it needs."""
        return (self.name,)

    def build(self, dim: int, num_heads: int, block_norm: str = "layer") -> nn.Module:
        """The mixer for tokens of width `dim`. Raises `InputError` for an unknown name, option or value."""
        return create_mixer(self.name, dim, num_heads, block_norm, **check_options(self.name, self.options))

    def resolve(self) -> "Entry":
        """The entry with all options, defaults included. Equal resolved entries mean the same mixer."""
        return Entry(self.name, {**mixer_options(self.name), **check_options(self.name, self.options)})

    def with_options(self, mixers: Sequence[str], options: Mapping[str, Any]) -> "Entry":
        """The entry with further options, if it is one of `mixers`; those that it has remain."""
        return Entry(self.name, {**options, **self.options}) if self.name in mixers else self

    def uses(self, mixers: Sequence[str], option: str) -> bool:
        """Whether it is one of `mixers` with this option on."""
        return self.name in mixers and bool(self.options.get(option))

    def as_written(self) -> str | dict[str, Any]:
        """The entry as a pattern holds it."""
        return {"name": self.name, **self.options} if self.options else self.name

    def __str__(self) -> str:
        listed = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.name} ({listed})" if listed else self.name


class ParallelEntry(NamedTuple):
    """Several mixers of one block whose results are summed; its methods are those of `Entry`."""

    entries: tuple["Entry | ParallelEntry", ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for entry in self.entries for name in entry.names)

    def build(self, dim: int, num_heads: int, block_norm: str = "layer") -> nn.Module:
        return Parallel(dim, [entry.build(dim, num_heads, block_norm) for entry in self.entries])

    def resolve(self) -> "ParallelEntry":
        return ParallelEntry(tuple(entry.resolve() for entry in self.entries))

    def with_options(self, mixers: Sequence[str], options: Mapping[str, Any]) -> "ParallelEntry":
        return ParallelEntry(tuple(entry.with_options(mixers, options) for entry in self.entries))

    def uses(self, mixers: Sequence[str], option: str) -> bool:
        return any(entry.uses(mixers, option) for entry in self.entries)

    def as_written(self) -> dict[str, Any]:
        return {_PARALLEL: [entry.as_written() for entry in self.entries]}

    def __str__(self) -> str:
        return f"{_PARALLEL} ({', '.join(map(str, self.entries))})"


def expand_pattern(pattern: Pattern, depth: int) -> list[Entry | ParallelEntry]:
    """The entries of `depth` blocks. Raises `InputError` for an invalid pattern or one with too many entries."""
    entries = _parse(pattern)
    hybrid = [entry.names for entry in entries] == [(name,) for name in HYBRID]  # a single block gets the first
    if not entries or (len(entries) > depth and not hybrid):
        raise InputError(
            f"mixer_pattern names {len(entries)} mixers for {depth} blocks: give one for each block, or fewer, which "
            "are then repeated."
        )
    return [entries[block % len(entries)] for block in range(depth)]


def parse_entry(entry: str | Mapping[str, Any]) -> Entry | ParallelEntry:
    """Parse an entry of a pattern. Raises `InputError` for one that has neither a name nor mixers in parallel."""
    if isinstance(entry, str):
        return Entry(entry, {})
    if isinstance(entry, Mapping) and _PARALLEL in entry:
        return _parse_parallel(entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise InputError(
            f"{entry!r} is not a valid entry of mixer_pattern: give the name of a mixer, {{name: …, option: …}}, or "
            "{parallel: [entry, entry]}."
        )
    return Entry(entry["name"], {key: value for key, value in entry.items() if key != "name"})


def with_atconv_options(pattern: Pattern, options: Mapping[str, Any]) -> Pattern:
    """Add options to every ATConv of a pattern, unless its entry sets them already.

    Options that equal ATConv's defaults leave the pattern unchanged, as do options for a pattern without ATConv. Raises
    `InputError` if that has a mixer with an option of the same name, which might have been meant.
    """
    chosen = {key: value for key, value in options.items() if value != mixer_options("atconv")[key]}
    if not chosen:
        return pattern
    entries = _parse(pattern)
    names = mixer_names(entries)
    if "atconv" not in names:
        for name in sorted(names & set(list_mixers())):
            for option in sorted(chosen.keys() & mixer_options(name).keys()):
                raise InputError(
                    f"{option} = {chosen[option]!r} is for ATConv, which this model does not have. For '{name}' give "
                    f"it in mixer_pattern: [{{name: {name}, {option}: {chosen[option]}}}]."
                )
        return pattern
    return [entry.with_options(("atconv",), chosen).as_written() for entry in entries]


def with_query_options(pattern: Pattern, options: Mapping[str, bool]) -> Pattern:
    """Turn `QUERY_OPTIONS` on for every mixer of `QUERY_MIXERS`, unless its entry sets them already.

    Options that are off leave the pattern unchanged. Raises `InputError` for one that would then be on nowhere.
    """
    chosen = {key: value for key, value in options.items() if value}
    if not chosen:
        return pattern
    entries = [entry.with_options(QUERY_MIXERS, chosen) for entry in _parse(pattern)]
    for option in chosen:
        if not any(entry.uses(QUERY_MIXERS, option) for entry in entries):
            names = mixer_names(entries)
            own = sorted(name for name in names & set(list_mixers()) if option in mixer_options(name))
            hint = f" For '{own[0]}' give it in mixer_pattern: [{{name: {own[0]}, {option}: true}}]." if own else ""
            raise InputError(
                f"{option} is for the queries and keys of {' and '.join(QUERY_MIXERS)}, and is on in no mixer of this "
                f"model ({', '.join(map(str, entries))}): leave it out, or choose a model with one of them.{hint}"
            )
    return [entry.as_written() for entry in entries]


def mixer_names(entries: Sequence[Entry | ParallelEntry]) -> set[str]:
    """The registered mixers that entries need."""
    return {name for entry in entries for name in entry.names}


def describe_pattern(pattern: Pattern) -> str:
    """A pattern in words, for log lines and model cards: "attention, atconv (pool raster)"."""
    return ", ".join(map(str, _parse(pattern)))


def _parse(pattern: Pattern) -> list[Entry | ParallelEntry]:
    if pattern == "hybrid":
        pattern = HYBRID
    return [parse_entry(entry) for entry in ([pattern] if isinstance(pattern, str | Mapping) else pattern)]


def _parse_parallel(entry: Mapping[str, Any]) -> ParallelEntry:
    parts = entry[_PARALLEL]
    if len(entry) > 1 or not isinstance(parts, Sequence) or isinstance(parts, str) or len(parts) < 2:
        raise InputError(
            f"{dict(entry)!r} is not a valid entry of mixer_pattern: mixers in parallel are a list of at least two "
            "entries, {parallel: [attention, {name: atconv, kernel_size: 5}]}, and nothing stands beside it."
        )
    return ParallelEntry(tuple(parse_entry(part) for part in parts))
