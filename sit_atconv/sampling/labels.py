"""Class labels of the samples, which depend only on (seed, index)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream, keyed_generator

_MAX_DIGITS = 18  # of a label, which is an int64


def choose_labels(
    rule: str, indices: Iterable[int], num_classes: int, seed: int, class_names: Sequence[str] | None = None
) -> Tensor | None:
    """Labels (n,) int64 for the samples numbered `indices`, or None for an unconditional model.

    Args:
        rule: "balanced": every successive `num_classes` samples contain each class once, in a new random order each
            time (the inception score of class-sorted samples would be wrong); "random": independent and uniform; or
            labels separated by commas, numbers or class names, which are assigned in turn.

    Raises:
        InputError: for a label that the model does not have.
    """
    if num_classes == 0:
        if rule not in ("balanced", "random"):
            raise InputError(f"This model is unconditional: it cannot draw the labels '{rule}'.")
        return None
    indices = list(indices)
    if rule == "balanced":
        rounds = {i // num_classes for i in indices}
        orders = {r: keyed_generator(seed, Stream.LABEL, r).permutation(num_classes) for r in rounds}
        labels = [int(orders[i // num_classes][i % num_classes]) for i in indices]
    elif rule == "random":
        labels = [int(keyed_generator(seed, Stream.LABEL, i).integers(num_classes)) for i in indices]
    else:
        listed = [parse_label(word.strip(), num_classes, class_names or []) for word in rule.split(",")]
        labels = [listed[i % len(listed)] for i in indices]
    return torch.tensor(labels, dtype=torch.int64)


def parse_label(word: str, num_classes: int, class_names: Sequence[str]) -> int:
    """The label for a class name or a number. Raises `InputError` for one that the model does not have."""
    if word in class_names:
        return list(class_names).index(word)
    if not word.isdecimal() or len(word) > _MAX_DIGITS or int(word) >= num_classes:
        raise InputError(
            f"Unknown label '{word}': give balanced, random, or labels in [0, {num_classes}) separated by commas"
            + (", or class names." if class_names else ".")
        )
    return int(word)
