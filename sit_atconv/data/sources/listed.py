"""Labels from a list beside the pictures: dataset.json (StyleGAN, EDM, REPA), metadata.jsonl or metadata.csv (hub)."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from sit_atconv.classes import read_labels
from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import parse_json

log = logging.getLogger(__name__)

LABEL_KEYS = ("label", "labels", "cls", "class")  # of columns and arrays, in this order
LISTS = ("dataset.json", "metadata.jsonl", "metadata.csv")
_FILE_KEY = "file_name"
_EXPECTED = 'Expected {"labels": [[name, class], …]}, or null for labels.'

Pair = Annotated[list[Any], Meta(min_length=2, max_length=2)]


@dataclass(frozen=True)
class Listed:
    """The key of dataset.json that counts."""

    labels: list[Pair] | None = None


def listed_labels(
    where: str, folder: str, list_name: str, text: bytes, names: Sequence[str], options: SourceOptions
) -> tuple[list[str] | None, np.ndarray | None] | None:
    """Class names and labels of the pictures `names` from the list `folder/list_name`, whose contents are `text`.

    Both are None if the list says that there are no labels. The result is None for a list of something else. Raises
    `InputError` for a list that cannot be read, an unlisted picture, or a label that is none.
    """
    what = f"{where}/{folder}{list_name}"
    pairs = _pairs_of_json(text, what) if list_name.endswith(".json") else _pairs_of_table(text, what, options)
    if pairs is None:
        return None
    if not pairs:
        return None, None
    known = {folder + str(name).replace("\\", "/"): row for row, (name, _) in enumerate(pairs)}
    if len(known) < len(pairs):
        raise InputError(f"{what} lists {len(pairs) - len(known)} names more than once: their labels are ambiguous.")
    unlisted = [name for name in names if name not in known]
    if unlisted:
        raise InputError(
            f"{what} does not list {len(unlisted)} of {len(names)} pictures, {unlisted[0]} first: they have no label. "
            "Add them, remove them, or leave all labels out with --unconditional."
        )
    if missing := len(known) - len(names):
        log.warning("%s lists %d pictures that are not there.", what, missing)
    labels, class_names = read_labels([label for _, label in pairs], what)
    return class_names, labels[[known[name] for name in names]]


def _pairs_of_json(text: bytes, what: str) -> list[Pair] | None:
    if "labels" not in parse_json(text, dict[str, Any], what, _EXPECTED):
        return None
    return parse_json(text, Listed, what, _EXPECTED).labels or []


def _pairs_of_table(text: bytes, what: str, options: SourceOptions) -> list[Pair] | None:
    """(file name, label) of each row; an empty list if no column is a label."""
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8 ({error}).") from None
    if what.endswith(".csv"):
        rows = [_with_numbers(row) for row in csv.DictReader(io.StringIO(decoded))]
    else:
        lines = [line for line in decoded.splitlines() if line.strip()]
        rows = [parse_json(line, dict[str, Any], f"{what}, line {n}") for n, line in enumerate(lines, 1)]
    if not rows or _FILE_KEY not in rows[0]:
        return None
    key = label_column(list(rows[0]), options.label_key, what)
    if key is None:
        return []
    incomplete = next((n for n, row in enumerate(rows) if _FILE_KEY not in row), None)
    if incomplete is not None:
        raise InputError(f"{what}: row {incomplete} has no {_FILE_KEY}.")
    return [[row[_FILE_KEY], row.get(key)] for row in rows]


def label_column(columns: Sequence[str], wanted: str | None, what: str) -> str | None:
    """The column that holds the labels: the `wanted` one, or the first of the usual names; None if there is none."""
    if wanted is not None:
        if wanted not in columns:
            raise InputError(f"{what} has no column '{wanted}'; it has {', '.join(columns)}.")
        return wanted
    found = next((key for key in LABEL_KEYS if key in columns), None)
    if found is None:
        log.info("%s has no column of labels among %s; --label-column names one.", what, ", ".join(columns))
    return found


def _with_numbers(row: dict[str, str]) -> dict[str, Any]:
    """A row of a CSV, which has no types: digits are numbers."""
    return {key: int(value) if value and value.isascii() and value.isdecimal() else value for key, value in row.items()}
