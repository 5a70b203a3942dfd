"""`open_source`: one name or path -> pictures in a fixed order, from any kind of source."""

from pathlib import Path

from sit_atconv.data.digits import DigitsSource, is_digits, parse_digits
from sit_atconv.data.pictures.protocol import ImageSource, SourceOptions
from sit_atconv.data.repa import RepaSource, is_repa
from sit_atconv.data.shards.manifest import MANIFEST_NAME
from sit_atconv.data.sources.files import FolderSource, ZipSource
from sit_atconv.data.sources.npz import NpzSource
from sit_atconv.data.sources.prepared import PreparedSource
from sit_atconv.errors import InputError

_KINDS = (
    "a folder or zip of pictures (flat, or one folder a class), an npz with arr_0, a data set prepared with --images, "
    "a directory prepared for REPA, hf:NAME[:SPLIT], or digits[:train|:heldout][@resolution]"
)


def open_source(path: str, convert: bool = False, options: SourceOptions | None = None) -> ImageSource:
    """Open pictures by path or name; only the list of names and the labels are read.

    `convert=True` is short for the options of preparation, `SourceOptions(convert=True)`; by default pictures are read
    for evaluation. `PATH:FOLDER` is one of the first folders of a folder or an archive, such as a split. Raises
    `InputError` for a source that is missing or unusable.
    """
    path, options = str(path), options or SourceOptions(convert=convert)
    if is_digits(path):
        return DigitsSource(*parse_digits(path))
    if path.startswith("hf:"):
        from sit_atconv.data.sources.huggingface import HuggingFaceSource

        return HuggingFaceSource(path.removeprefix("hf:"), options)
    part = None
    if not Path(path).exists():
        path, colon, part = path.rpartition(":")
        if not colon or not Path(path).exists():
            raise InputError(f"'{path}{colon}{part}' does not exist. A source is {_KINDS}.")
    if Path(path).is_dir():
        return _open_directory(path, options, part)
    if path.lower().endswith(".zip"):
        return ZipSource(path, options, part)
    if part is not None:
        raise InputError(f"{path} has no folders: leave out ':{part}'.")
    if path.lower().endswith(".npz"):
        return NpzSource(path, options)
    raise InputError(f"'{path}' is not a source of pictures. A source is {_KINDS}.")


def require_undamaged(source: ImageSource) -> None:
    """Compare an npz or prepared data with their checksums, which reads them; in other sources, decoding finds damage.

    Raises `InputError` for a damaged file.
    """
    if isinstance(source, NpzSource | PreparedSource):
        source.verify()


def _open_directory(path: str, options: SourceOptions, part: str | None) -> ImageSource:
    if part is None and (Path(path) / MANIFEST_NAME).is_file() and any(Path(path).glob("*.safetensors")):
        return PreparedSource(path, options)
    if part is None and is_repa(path):
        return RepaSource(path, options)
    return FolderSource(path, options, part)
