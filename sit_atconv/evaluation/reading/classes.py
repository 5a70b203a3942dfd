"""Which class of the samples is compared with which class of the references."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sit_atconv.classes import Classes
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.errors import InputError

Chosen = Sequence[int | str] | None  # labels; () for none, None for every class of the references


class ClassPair(NamedTuple):
    """A class: its name, or its number without one, and its numbers in the samples and in the references."""

    title: str
    ours: int
    theirs: int


def source_classes(source: ImageSource) -> Classes:
    """The classes of a labelled source."""
    names = source.class_names
    return Classes(len(names) if names else int(source.labels.max()) + 1, names)


def pair_classes(chosen: Chosen, samples: Classes | None, source: ImageSource) -> list[ClassPair]:
    """The classes to compare, of a labelled source of references: by name where both sides have names, else by number.

    `samples` is None where the classes of the samples are not known. Raises `InputError` for a label that is unknown,
    could mean two classes, or names a class that one side lacks.
    """
    theirs = source_classes(source)
    ours = samples or Classes(theirs.count)
    if chosen is not None:
        return [_pair(label, ours, theirs) for label in chosen]
    numbers = theirs.numbers_in(ours)
    pairs = []
    for number in np.unique(source.labels).tolist():
        if numbers[number] is None:
            raise InputError(f"The samples have no class '{theirs.title(number)}' of the references.")
        pairs.append(ClassPair(_title(number, ours, theirs), numbers[number], number))
    return pairs


def _title(number: int, ours: Classes, theirs: Classes) -> str:
    return (theirs if theirs.names else ours).title(number)


def _pair(label: int | str, ours: Classes, theirs: Classes) -> ClassPair:
    if not (ours.names and theirs.names):
        number = (ours if ours.names else theirs).find(label)
        return ClassPair(_title(number, ours, theirs), number, number)
    titles = []
    for side in (ours, theirs):
        try:
            titles.append(side.title(side.find(label)))
        except InputError as error:
            unknown = error
    if not titles:
        raise unknown
    if len(set(titles)) > 1:
        raise InputError(
            f"The class {label} is '{titles[0]}' in the samples and '{titles[1]}' in the references. Which is meant? "
            "Give its name."
        )
    for side, what in ((ours, "samples"), (theirs, "references")):
        if titles[0] not in side.names:
            raise InputError(
                f"The {what} have no class '{titles[0]}': they have {side.titles(range(len(side.names)))}."
            )
    return ClassPair(titles[0], *(list(side.names).index(titles[0]) for side in (ours, theirs)))
