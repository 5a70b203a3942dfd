"""Recognise a published data set by the names of its files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.arrays import ArraySource, choose_split
from sit_atconv.data.sources.published import batches, idx, stl, svhn

_READERS: Mapping[Callable, Callable] = MappingProxyType(
    {batches.find: batches.open_batches, idx.find: idx.open_idx, svhn.find: svhn.open_svhn, stl.find: stl.open_stl}
)
_WITHIN = ("", "raw")  # torchvision keeps MNIST's files in MNIST/raw


def open_published(path: str, options: SourceOptions, part: str | None) -> ArraySource | None:
    """The split `part` of the data set in the folder `path`, or the single file `path` of one; None for other data.

    Raises `InputError` if a split must be chosen, or if files cannot be read.
    """
    given = Path(path)
    folders = [given / name for name in _WITHIN] if given.is_dir() else [given.parent]
    for find, opened in _READERS.items():
        for folder in folders:
            splits = find(folder) if folder.is_dir() else {}
            if given.is_file():
                splits = {split: [given] for split, files in splits.items() if given in files}
            if splits:
                return opened(path, splits[choose_split(path, list(splits), part)], options)
    return None
