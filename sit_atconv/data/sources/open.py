"""`open_source`: one name or path -> pictures in a fixed order, from any kind of source."""

from pathlib import Path

from sit_atconv.data.digits import DigitsSource, is_digits, parse_digits
from sit_atconv.data.pictures.protocol import ImageSource, SourceOptions
from sit_atconv.data.remote.fetching import fetch_file
from sit_atconv.data.remote.storage import Storage, is_remote
from sit_atconv.data.repa import RepaSource, is_repa
from sit_atconv.data.shards.manifest import MANIFEST_NAME
from sit_atconv.data.sources.files import FolderSource, ZipSource
from sit_atconv.data.sources.npy import open_npy
from sit_atconv.data.sources.npz import NpzSource
from sit_atconv.data.sources.prepared import PreparedSource
from sit_atconv.data.sources.published.open import open_published
from sit_atconv.data.sources.remote import RemoteFolderSource
from sit_atconv.data.sources.tars.braces import expand_braces
from sit_atconv.data.sources.tars.source import TarSource, list_tars
from sit_atconv.errors import InputError

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")  # compressed ones get advice
_KINDS = (
    "a folder, zip or tar of pictures (flat, or one folder a class), shards of a WebDataset, an npz or npy, a data set "
    "prepared with --images or for REPA, files of CIFAR, MNIST, SVHN or STL-10, a parquet file, hf:NAME[:SPLIT], or "
    "digits[:train|:heldout][@resolution]; docs/own_data.md lists them"
)


def open_source(path: str, convert: bool = False, options: SourceOptions | None = None) -> ImageSource:
    """Open pictures by path or name; only the list of names and the labels are read.

    `convert=True` is short for the options of preparation, `SourceOptions(convert=True)`; by default pictures are read
    for evaluation. `PATH:FOLDER` is one of the first folders of a folder or an archive, or a split. Raises `InputError`
    for a source that is missing or unusable.
    """
    path, options = str(path), options or SourceOptions(convert=convert)
    if is_digits(path):
        return DigitsSource(*parse_digits(path), labelled=not options.unconditional)
    if is_remote(path):
        return _open_remote(path, options)
    if path.startswith("hf:"):
        return _open_table(path.removeprefix("hf:"), options)
    part = None
    if not Path(path).exists():
        if "{" in path and path.endswith(".tar"):
            return TarSource(path, expand_braces(path), options)
        path, colon, part = path.rpartition(":")
        if not colon or not Path(path).exists():
            raise InputError(f"'{path}{colon}{part}' does not exist. A source is {_KINDS}.")
    if Path(path).is_dir():
        return _open_directory(path, options, part)
    return _open_file(path, options, part)


def _open_file(path: str, options: SourceOptions, part: str | None) -> ImageSource:
    lower = path.lower()
    if lower.endswith(".zip"):
        return ZipSource(path, options, part)
    if lower.endswith(_TARS):
        return TarSource(path, [path], options, part)
    if lower.endswith(".npz"):
        return NpzSource(path, options, part)
    if part is None and lower.endswith(".parquet"):
        return _open_table(path, options)
    if source := open_published(path, options, part):
        return source
    if part is not None:
        raise InputError(f"{path} has no folders or splits: leave out ':{part}'.")
    if lower.endswith(".npy"):
        return open_npy(path, options)
    raise InputError(f"'{path}' is not a source of pictures. A source is {_KINDS}.")


def _open_table(name: str, options: SourceOptions) -> ImageSource:
    from sit_atconv.data.sources.huggingface import HuggingFaceSource

    return HuggingFaceSource(name, options)


def require_undamaged(source: ImageSource) -> None:
    """Compare an npz or prepared data with their checksums, which reads them; in other sources, decoding finds damage.

    Raises `InputError` for a damaged file.
    """
    if isinstance(source, NpzSource | PreparedSource):
        source.verify()


def _open_remote(address: str, options: SourceOptions) -> ImageSource:
    storage, place, part = Storage(address), address, ""
    info = storage.info()
    if info is None and "/" not in address.rpartition(":")[2]:
        place, _, part = address.rpartition(":")
        storage = Storage(place)
        info = storage.info()
    if info is None:
        raise InputError(f"{address} does not exist. A source is {_KINDS}; all but the last three also at an address.")
    if info["type"] == "file":
        entry = fetch_file(storage, info)
        path = entry.path / storage.address.rpartition("/")[2]
        source = open_source(f"{path}:{part}" if part else str(path), options=options)
        source.copy = entry  # stays in the cache while the source is used
        return source
    if not part and storage.info(MANIFEST_NAME):
        return PreparedSource(place, options)
    return RemoteFolderSource(storage, options, part or None)


def _open_directory(path: str, options: SourceOptions, part: str | None) -> ImageSource:
    if part is None and (Path(path) / MANIFEST_NAME).is_file() and any(Path(path).glob("*.safetensors")):
        return PreparedSource(path, options)
    if part is None and is_repa(path):
        return RepaSource(path, options)
    if source := open_published(path, options, part):
        return source
    if tars := list_tars(path, part):
        return TarSource(path, tars, options)
    return FolderSource(path, options, part)
