"""Classes: what a label may be, which class a word names, and which class of one side is which of another.

A class has a number and, where there is one, a name. Labels of data are whole numbers from 0, or names, whose sorted
order then numbers them. All who read, choose or compare labels ask here.
"""

import csv
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sit_atconv.errors import InputError, nearest

MAX_LABEL = 10**6
_BY_NAME, _BY_NUMBER = "name:", "number:"
_SHOWN = 40  # characters of a label in an error


@dataclass(frozen=True)
class Classes:
    """The classes 0 … count − 1 of a model or of data.

    `names` are those of the first classes, or None; a model may have room for more. `empty` are classes of which
    training saw no picture.
    """

    count: int
    names: Sequence[str] | None = None
    empty: Sequence[int] = ()

    @property
    def learned(self) -> list[int]:
        """The classes that training saw."""
        empty = set(self.empty)
        return [number for number in range(self.count) if number not in empty]

    def title(self, number: int) -> str:
        """The name of a class or, without one, its number."""
        return self.names[number] if self.names and number < len(self.names) else str(number)

    def titles(self, numbers: Sequence[int], most: int = 8) -> str:
        """The titles of some classes, for a message; of many, the first."""
        more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
        return ", ".join(self.title(number) for number in numbers[:most]) + more

    def find(self, label: int | str) -> int:
        """The number of the class that a number (of Python, numpy or torch) or a word names.

        A word is a name, or a number in digits; "name:7" and "number:7" say which of the two is meant.

        Raises:
            InputError: for an unknown class, one without a picture in training, or a word that could mean two classes.
        """
        number = self._find(label)
        if number in self.empty:
            raise InputError(
                f"Class {self.title(number)} had no picture in training, so the model has not learned it. Learned are "
                f"{self.titles(self.learned)}."
            )
        return number

    def _find(self, label: int | str) -> int:
        if not isinstance(label, str):
            number = _whole(label)
            if number is None or not 0 <= number < self.count:
                raise InputError(f"Unknown label '{_short(str(label))}': expected {self._expected()}.")
            return number
        names = list(self.names or ())
        word = label.removeprefix(_BY_NAME).removeprefix(_BY_NUMBER) if label not in names else label
        kind = label.removesuffix(word)
        by_name = names.index(word) if word in names and kind != _BY_NUMBER else None
        by_number = int(word) if word.isascii() and word.isdecimal() and len(word) < 19 and kind != _BY_NAME else None
        if by_number is not None and by_number >= self.count:
            by_number = None
        if by_name is None and by_number is None:
            hint = f" {nearest(word, names)}" if 0 < len(names) <= 1000 else ""
            raise InputError(f"Unknown label '{_short(label)}': expected {self._expected()}.{hint}")
        if None not in (by_name, by_number) and by_name != by_number:
            raise InputError(
                f"The label {word} is the name of class number {by_name}, and the number of the class named "
                f"'{self.title(by_number)}'. Which is meant? Write {_BY_NAME}{word} or {_BY_NUMBER}{word}."
            )
        return by_number if by_name is None else by_name

    def find_all(self, words: str) -> list[int]:
        """The numbers of classes that are listed in a text, separated by commas: "3,7", "dog, cat".

        A name with a comma stands in double quotes, as in CSV. Raises `InputError` as `find`.
        """
        parts = split_labels(words)
        if self.names and "," in words and words in self.names:
            if all(part in self.names for part in parts):
                raise InputError(
                    f"{words} is a class and a list of classes. Which is meant? Quote a class: '\"{words}\"'."
                )
            parts = [words]
        return [self.find(part) for part in parts]

    def numbers_in(self, other: "Classes") -> list[int | None]:
        """For each class, the number that the same class has in `other`, or None.

        By name where both have names, and otherwise by number.
        """
        if self.names and other.names:
            numbers = {name: number for number, name in enumerate(other.names)}
            return [numbers.get(name) for name in self.names] + [None] * (self.count - len(self.names))
        return [number if number < other.count else None for number in range(self.count)]

    def _expected(self) -> str:
        names = ", or class names (a name with a comma in double quotes)" if self.names else ""
        return f"labels in [0, {self.count}){names}"


def split_labels(words: str) -> list[str]:
    """The labels in a text, separated by commas as in CSV. Raises `InputError` for an unclosed quote."""
    try:
        return [part.strip() for part in next(csv.reader([words], skipinitialspace=True, strict=True)) or [""]]
    except csv.Error as error:
        raise InputError(f"'{_short(words)}' is no list of labels ({error}).") from None


def read_labels(
    values: Sequence[Any] | np.ndarray, where: str, names: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Labels of data: their numbers (n,) int64, and the classes' names or None.

    Args:
        values: whole numbers from 0, or names; as an array also (n, 1), or one-hot (n, classes).
        where: names the values in errors.
        names: the names of the classes in order, where the data list them.

    Raises:
        InputError: for anything else, with its row: missing or negative labels, fractions, lists, a mixture.
    """
    values = _one_axis(values, where) if isinstance(values, np.ndarray) else values
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        numbers = values
        if numbers.size and (numbers.min() < 0 or numbers.max() > MAX_LABEL):
            row = int(np.flatnonzero((numbers < 0) | (numbers > MAX_LABEL))[0])
            _refuse(where, row, int(numbers[row]))
    else:
        values = values.tolist() if isinstance(values, np.ndarray) else list(values)
        missing = next((row for row, value in enumerate(values) if value is None), None)
        if missing is not None:  # among names, it alone is at fault
            _refuse(where, missing, None)
        if values and all(isinstance(value, str) for value in values):
            return _numbers_of(values, where, names)
        numbers = [_whole(value) for value in values]
        for row, number in enumerate(numbers):
            if number is None or not 0 <= number <= MAX_LABEL:
                _refuse(where, row, values[row])
    numbers = np.array(numbers, dtype=np.int64)
    if names is not None and numbers.size and numbers.max() >= len(names):
        row = int(numbers.argmax())
        raise InputError(f"{where}: the label in row {row} is {numbers[row]}, but only {len(names)} classes are named.")
    return numbers, None if names is None else list(names)


def _numbers_of(words: Sequence[str], where: str, names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    classes = sorted(set(words)) if names is None else list(names)
    if "" in words:
        _refuse(where, words.index(""), "")
    number = {name: i for i, name in enumerate(classes)}
    for row, word in enumerate(words):
        if word not in number:
            raise InputError(f"{where}: the label in row {row} is '{_short(word)}', which is no class of the data.")
    return np.array([number[word] for word in words], dtype=np.int64), classes


def _one_axis(values: np.ndarray, where: str) -> np.ndarray:
    """(n,) from (n,), (n, 1) or one-hot (n, classes); bytes become text."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2 and values.dtype.kind in "biuf" and values.shape[1] > 1:
        one_hot = np.isin(values, (0, 1)).all(axis=1) & (values.sum(axis=1) == 1)
        if not one_hot.all():
            row = int(np.flatnonzero(~one_hot)[0])
            raise InputError(f"{where}: row {row} is no one-hot label: one 1, and 0 elsewhere. {_REMEDY}")
        return values.argmax(axis=1)
    if values.ndim != 1:
        raise InputError(f"{where} has shape {values.shape}: expected one label a picture. {_REMEDY}")
    return np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values


def _whole(value: Any) -> int | None:
    """A whole number of Python, numpy or torch, also one that is stored as a float; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, float | np.floating):
        return int(value) if value == value and abs(value) < 2**53 and value == int(value) else None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return None


_REMEDY = "Correct it, or leave all labels out with --unconditional."


def _refuse(where: str, row: int, value: Any) -> None:
    raise InputError(
        f"{where}: the label in row {row} is {_show(value)}; labels are whole numbers from 0 to {MAX_LABEL:,}, or "
        f"names. {_REMEDY}"
    )


def _show(value: Any) -> str:
    return "missing" if value is None else _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
