"""Hugging Face data sets as image sources (optional dependency `datasets`)."""

import io
from pathlib import Path
from types import ModuleType

from PIL import Image

from sit_atconv.classes import read_labels
from sit_atconv.data.pictures.decode import FORMATS, LOSSY_FORMATS, UNDECODABLE, decode_image
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.errors import InputError, require_one_of


class HuggingFaceSource:
    """`NAME[:SPLIT]`: a hub id, a copy of its repository or a folder written by `save_to_disk`; by default the split
    "train".

    The first Image column holds the pictures, the first ClassLabel column (or one named "label") the classes.
    """

    kind = "hf"
    names = None

    def __init__(self, name: str, options: SourceOptions) -> None:
        datasets = _import_datasets()
        self._name, self._options = name, options
        table = _load(datasets, name)
        features = table.features
        columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise InputError(f"hf:{name} has no column of pictures; its columns are {', '.join(features)}.")
        if len(table) == 0:
            raise InputError(f"hf:{name} holds no pictures: its table is empty.")
        self._column = columns[0]
        # Left encoded, so that all pictures are decoded by the same code.
        self._table = table.cast_column(self._column, datasets.Image(decode=False))
        classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        label = (classes or [key for key in features if key == "label"] or [None])[0]
        self.labels = self.class_names = None
        if label is not None and not options.unconditional:
            names = features[label].names if classes else None
            self.labels, self.class_names = read_labels(table[label], f"hf:{name}", names)
        self.lossy = self._first_format() in LOSSY_FORMATS

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> SourceImage:
        name = f"hf:{self._name}[{index}]"
        label = None if self.labels is None else int(self.labels[index])
        return decode_image(self._bytes(index), name, self._options, label)

    def _first_format(self) -> str | None:
        """PIL's name of the first picture's format; None if it cannot be read, which raises when it is decoded."""
        try:
            with Image.open(io.BytesIO(self._bytes(0)), formats=FORMATS) as first:
                return first.format
        except UNDECODABLE:
            return None

    def _bytes(self, index: int) -> bytes:
        cell = self._table[index][self._column]
        if cell is None:
            raise InputError(f"hf:{self._name}[{index}] holds no picture.")
        try:
            return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read {cell['path']}, hf:{self._name}[{index}]: {error.strerror}.") from error


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise InputError("Hugging Face data sets need another package: pip install 'sit-atconv[hub]'.") from error
    return datasets


def _load(datasets: ModuleType, name: str) -> object:
    path, _, split = name.partition(":")
    split = split or "train"
    try:
        if not any((Path(path) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, split=split)
        table = datasets.load_from_disk(path)
    except (OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise InputError(f"Cannot load hf:{name}: {reason}. Check the name, the split and the connection.") from error
    if not hasattr(table, "keys"):
        return table
    require_one_of(split, table.keys(), f"split of hf:{path}")
    return table[split]
