"""Which arrays of a file hold pictures, and which one their labels, by their names."""

import re
from collections.abc import Sequence

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import choose_split
from sit_atconv.errors import InputError

ROWS = "data"  # may hold pictures as rows of numbers, as ImageNet-32 does
_ADM = ("arr_0", "arr_1")
_IMAGES = ("images", "image", "imgs", "img", "x", ROWS)
_LABELS = ("labels", "label", "y", "targets", "target", "cls", "class")
_SPLITS = ("train", "test", "val", "valid", "validation", "extra")
_ONLY = "all"


def find_keys(where: str, names: Sequence[str], options: SourceOptions, part: str | None) -> tuple[str, str | None]:
    """The names of the pictures and of their labels, or None, among the `names` of arrays.

    Those that the options name; else arr_0 and arr_1; else what is called like pictures and labels, with a split before
    or after ("x_train", "train_images"), of which `part` chooses one. Raises `InputError` if there are none, or if
    names leave a choice.
    """
    for key, option in ((options.image_key, "--image-key"), (options.label_key, "--label-key")):
        if key is not None and key not in names:
            raise InputError(f"{where} has no array '{key}' for {option}; it holds {_some(names)}.")
    if part is None and _ADM[0] in names and options.image_key in (None, _ADM[0]):
        return _ADM[0], options.label_key or (_ADM[1] if _ADM[1] in names else None)
    images, labels = _by_split(names, _IMAGES), _by_split(names, _LABELS)
    if part is not None and (options.image_key is not None or set(images) <= {_ONLY}):
        raise InputError(f"{where} has no splits to choose from: leave out ':{part}'. It holds {_some(names)}.")
    if options.image_key is not None:
        split = next((split for split, found in images.items() if options.image_key in found), _ONLY)
        image_key = options.image_key
    elif images:
        split = choose_split(where, sorted(images, key=(_ONLY, *_SPLITS).index), part)
        image_key = _only(where, images[split], "pictures", "--image-key")
    else:
        raise InputError(
            f"{where} has no array '{_ADM[0]}'; it holds {_some(names)}. Name the pictures by --image-key."
        )
    if options.label_key is not None or split not in labels:
        return image_key, options.label_key
    return image_key, _only(where, labels[split], "labels", "--label-key")


def _by_split(names: Sequence[str], words: Sequence[str]) -> dict[str, list[str]]:
    """split -> the names that consist of one of the words and that split, in either order."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = re.split(r"[_\-.]", name.lower())
        rest = [part for part in parts if part not in words]
        if len(parts) <= 2 and len(parts) - len(rest) == 1 and (not rest or rest[0] in _SPLITS):
            found.setdefault(rest[0] if rest else _ONLY, []).append(name)
    return found


def _only(where: str, names: Sequence[str], what: str, option: str) -> str:
    if len(names) > 1:
        raise InputError(f"{where} has several arrays that may hold {what} ({', '.join(names)}): choose by {option}.")
    return names[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) or "nothing"
