"""Brace lists, the usual way to name the shards of a WebDataset: `x-{000000..000012}.tar`, `{a,b}.tar`."""

import itertools
import re

from sit_atconv.errors import InputError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 10**6


def expand_braces(pattern: str) -> list[str]:
    """All names that a brace list stands for, in order; a pattern without braces is one name.

    Numbers of a range have at least as many digits as its first one. Raises `InputError` for braces that are no list.
    """
    pieces = _BRACES.split(pattern)  # text, inner, text, inner, …, text
    choices = [[piece] if place % 2 == 0 else _inner(piece, pattern) for place, piece in enumerate(pieces)]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _inner(inner: str, pattern: str) -> list[str]:
    if match := _RANGE.fullmatch(inner):
        first, last = int(match[1]), int(match[2])
        if first <= last < first + _MOST:
            return [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    elif "," in inner:
        return inner.split(",")
    raise InputError(f"'{pattern}': {{{inner}}} is no list. Expected {{000..012}} or {{one,another}}.")
