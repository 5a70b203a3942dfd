"""Class labels of the samples, which depend only on (seed, index)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sit_atconv.classes import Classes
from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream, keyed_generator

RULES = ("balanced", "random")


def choose_labels(rule: str | Sequence[int], indices: Iterable[int], classes: Classes, seed: int) -> Tensor | None:
    """Labels (n,) int64 for the samples numbered `indices`, or None for an unconditional model.

    Args:
        rule: "balanced": as many successive samples as there are classes contain each once, in a new random order each
            time (the inception score of class-sorted samples would be wrong); "random": independent and uniform; both
            leave out classes that training did not see. Or labels, which are assigned in turn: numbers, or a text as
            for `Classes.find_all`.

    Raises:
        InputError: for a label that the model does not have, or has not learned.
    """
    if classes.count == 0:
        if rule not in RULES:
            raise InputError(f"This model is unconditional: it cannot draw the labels '{rule}'.")
        return None
    if rule in RULES and rule in (classes.names or ()):
        raise InputError(f"'{rule}' is a rule and a class. Which is meant? Write name:{rule} for the class.")
    indices, learned = list(indices), classes.learned
    if rule in RULES and not learned:
        raise InputError("Training saw no picture of any class: there is nothing to draw.")
    if rule == "balanced":
        count = len(learned)
        rounds = {i // count for i in indices}
        orders = {r: keyed_generator(seed, Stream.LABEL, r).permutation(count) for r in rounds}
        labels = [learned[orders[i // count][i % count]] for i in indices]
    elif rule == "random":
        labels = [learned[keyed_generator(seed, Stream.LABEL, i).integers(len(learned))] for i in indices]
    else:
        listed = classes.find_all(rule) if isinstance(rule, str) else [classes.find(label) for label in rule]
        labels = [listed[i % len(listed)] for i in indices]
    return torch.tensor(labels, dtype=torch.int64)
