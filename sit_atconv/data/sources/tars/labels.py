"""Labels of a WebDataset: a picture `000123.jpg` has its class in the member `000123.cls` or `000123.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sit_atconv.classes import read_labels
from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.listed import label_column
from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import parse_json

CLASS, JSON = "cls", "json"


def split_key(name: str) -> tuple[str, str]:
    """What the members of a sample share, and the ending: "a/000123.seg.png" -> ("a/000123", "seg.png")."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending


def choose_pictures(names: Sequence[str], image_key: str | None, where: str) -> list[str]:
    """One picture a sample: the one that ends in `image_key` or, without it, the only one.

    Raises `InputError` if samples have several pictures and none is chosen.
    """
    keys = [split_key(name) for name in names]
    if image_key is not None:
        chosen = [name for name, (_, ending) in zip(names, keys, strict=True) if ending == image_key]
        if names and not chosen:
            raise InputError(f"{where} has no pictures .{image_key}; it has {_endings(keys)}.")
        return chosen
    if len({key for key, _ in keys}) < len(keys):
        raise InputError(
            f"{where} has several pictures of the same sample, {_endings(keys)}: choose one by --image-key, as "
            f"--image-key {keys[0][1]}."
        )
    return list(names)


def sample_labels(
    names: Sequence[str], texts: Mapping[str, bytes], options: SourceOptions, where: str
) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and labels of the pictures `names` from the members `texts` beside them; None if there are none.

    A .cls, or the member whose ending is `options.label_key`, holds the class itself; a .json holds it under
    `options.label_key` or a usual name. Raises `InputError` for a picture without label.
    """
    keys = [split_key(name)[0] for name in names]
    endings = [options.label_key] if options.label_key else [CLASS]
    ending = next((ending for ending in endings if any(f"{key}.{ending}" in texts for key in keys)), JSON)
    values, column = [], None
    for key in keys:
        text = texts.get(f"{key}.{ending}")
        if text is None:
            raise InputError(
                f"{where} has no {key}.{ending}, so this picture has no label, though others have one. Add it, or "
                "leave all labels out with --unconditional."
            )
        if ending != JSON:
            values.append(_class(text, f"{where}/{key}.{ending}"))
            continue
        row = parse_json(text, dict[str, Any], f"{where}/{key}.{JSON}")
        column = column or label_column(list(row), options.label_key, f"{where}/{key}.{JSON}")
        if column is None:
            return None, None
        values.append(row.get(column))
    labels, class_names = read_labels(values, where)
    return class_names, labels


def _class(text: bytes, where: str) -> int | float | str:
    """A number or a name."""
    try:
        word = text.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise InputError(f"{where} is no text: expected the number or the name of a class.") from None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def _endings(keys: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f".{ending}" for ending in sorted({ending for _, ending in keys})[:8])
