"""Damage to JSON and YAML, drawn from a seed: wrong types, values out of range, keys that are missing, broken text."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

WRONG: list[Any] = [
    None, True, -1, 0, 1, 3, 10**9, 10**30, -0.5, 1e-300, 1e308, float("nan"), float("inf"), "", "x", "\x00", "../..",
    [], [1], [[]], ["x", None], {}, {"x": 1}, [3, 3], [[1, "x"]],
]  # fmt: skip
DEEP = b"[" * 100_000 + b"]" * 100_000
TEXTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"\xff\xfe{}",
    b'{"a": NaN}',
    b"9" * 5_000,
    DEEP,
    b'{"a":' + DEEP + b"}",
]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values within nested sections and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def damaged(value: Any, random: np.random.Generator) -> Any:
    """A copy in which one value is wrong or missing."""
    copy = json.loads(json.dumps(value))
    found = list(places(copy))
    *path, key = found[random.integers(len(found))]
    inner = copy
    for step in path:
        inner = inner[step]
    if random.random() < 0.15 and isinstance(inner, dict):
        del inner[key]
    else:
        inner[key] = WRONG[random.integers(len(WRONG))]
    return copy


def damaged_text(value: Any, random: np.random.Generator) -> bytes:
    """JSON in which one value is wrong or missing or, one time in four, what is no such JSON at all."""
    if random.random() < 0.25:
        return TEXTS[random.integers(len(TEXTS))]
    return json.dumps(damaged(value, random)).encode()
