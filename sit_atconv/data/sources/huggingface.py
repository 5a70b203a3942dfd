"""Hugging Face data sets and parquet files as image sources (optional dependency `datasets`)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from sit_atconv.classes import read_labels
from sit_atconv.data.pictures.decode import UNDECODABLE, decode_image
from sit_atconv.data.pictures.formats import FORMATS, LOSSY_FORMATS
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.data.sources.listed import LABEL_KEYS, label_column
from sit_atconv.errors import InputError, require_one_of


class HuggingFaceSource:
    """`NAME[:SPLIT]`: a hub id, a copy of its repository, a folder written by `save_to_disk` or of pictures with
    metadata, or a parquet file; by default the split "train".

    Pictures are the Image column or, in tables that name none, the column of bytes; labels are the ClassLabel column or
    one with a usual name. Only these two are read.
    """

    kind = "hf"
    names = None

    def __init__(self, name: str, options: SourceOptions) -> None:
        datasets = _import_datasets()
        self._name, self._options = name, options
        table = _load(datasets, name)
        if len(table) == 0:
            raise InputError(f"hf:{name} holds no pictures: its table is empty.")
        self._column = _picture_column(datasets, table.features, options.image_key, name)
        label = None if options.unconditional else _label_column(datasets, table.features, options.label_key, name)
        self.labels = self.class_names = None
        if label is not None:
            names = getattr(table.features[label], "names", None)
            values = table.select_columns([label])[:][label]
            self.labels, self.class_names = read_labels(values, f"hf:{name}, column {label}", names)
        self._table = table.select_columns([self._column])
        if isinstance(table.features[self._column], datasets.Image):
            # Left encoded, so that all pictures are decoded by the same code.
            self._table = self._table.cast_column(self._column, datasets.Image(decode=False))
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
        cell = {"bytes": cell} if isinstance(cell, bytes) else cell or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if cell.get("path") is None:
            raise InputError(f"hf:{self._name}[{index}] holds no picture.")
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read {cell['path']}, hf:{self._name}[{index}]: {error.strerror}.") from error


def _picture_column(datasets: ModuleType, features: Mapping[str, Any], wanted: str | None, name: str) -> str:
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = [key for key, feature in features.items() if _may_hold_files(feature)]
    if wanted is not None:
        if wanted not in images + encoded:
            raise InputError(
                f"hf:{name} has no column '{wanted}' of pictures; {_columns(images or encoded, features)}."
            )
        return wanted
    found = images or encoded
    if len(found) > 1:
        raise InputError(
            f"hf:{name} has several columns of pictures ({', '.join(found)}): choose one by --image-column."
        )
    if not found:
        raise InputError(f"hf:{name} has no column of pictures; {_columns(found, features)}.")
    return found[0]


def _may_hold_files(feature: Any) -> bool:
    """Whether a column without metadata is one of bytes, or of {bytes, path}."""
    return (isinstance(feature, Mapping) and "bytes" in feature) or "binary" in str(getattr(feature, "dtype", ""))


def _label_column(datasets: ModuleType, features: Mapping[str, Any], wanted: str | None, name: str) -> str | None:
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if wanted is not None or not classes:
        return label_column(list(features), wanted, f"hf:{name}")
    usual = [key for key in LABEL_KEYS if key in classes]
    if len(classes) > 1 and not usual:
        raise InputError(
            f"hf:{name} has several columns of classes ({', '.join(classes)}): choose one by --label-column."
        )
    return (usual or classes)[0]


def _columns(found: Sequence[str], features: Mapping[str, Any]) -> str:
    return f"it has {', '.join(found)}" if found else f"its columns are {', '.join(features)}"


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Hugging Face data sets and parquet files need another package: pip install 'sit-atconv[hub]'."
        ) from error
    return datasets


def _load(datasets: ModuleType, name: str) -> Any:
    path, _, split = name.partition(":")
    split = split or "train"
    try:
        if path.endswith(".parquet") and Path(path).is_file():
            return datasets.load_dataset("parquet", data_files={"train": path}, split=split)
        if not any((Path(path) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, split=split)
        table = datasets.load_from_disk(path)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).rstrip(".")
        raise InputError(f"Cannot load hf:{name}: {reason}. Check the name, the split and the connection.") from error
    if not hasattr(table, "keys"):
        return table
    require_one_of(split, table.keys(), f"split of hf:{path}")
    return table[split]
