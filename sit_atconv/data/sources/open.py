"""`open_source`: one name or path -> pictures in a fixed order, from any kind of source."""

from pathlib import Path

from sit_atconv.data.digits import DigitsSource, is_digits, parse_digits
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.remote.fetching import fetch_file
from sit_atconv.data.remote.storage import Storage, is_remote
from sit_atconv.data.repa import RepaSource, is_repa
from sit_atconv.data.shards.manifest import MANIFEST_NAME
from sit_atconv.data.sources.files import FolderSource, ZipSource
from sit_atconv.data.sources.npz import NpzSource
from sit_atconv.data.sources.prepared import PreparedSource
from sit_atconv.data.sources.remote import RemoteFolderSource
from sit_atconv.errors import InputError

_KINDS = (
    "a folder or zip of pictures (flat, or one folder a class), an npz with arr_0, a data set prepared with --images, "
    "a directory prepared for REPA, hf:NAME[:SPLIT], or digits[:train|:heldout][@resolution]"
)


def open_source(path: str, convert: bool = False) -> ImageSource:
    """Open pictures by path or name; only the list of names is read.

    `convert=True` (preparation) turns greyscale, palette, CMYK, alpha and 16-bit pictures into RGB when they are read;
    `convert=False` (evaluation) refuses them. Raises `InputError` for a source that is missing or unusable.
    """
    path = str(path)
    if is_digits(path):
        return DigitsSource(*parse_digits(path))
    if is_remote(path):
        return _open_remote(path, convert)
    if path.startswith("hf:"):
        from sit_atconv.data.sources.huggingface import HuggingFaceSource

        return HuggingFaceSource(path.removeprefix("hf:"), convert)
    if not Path(path).exists():
        raise InputError(f"'{path}' does not exist. A source is {_KINDS}.")
    if Path(path).is_dir():
        return _open_directory(path, convert)
    if path.lower().endswith(".npz"):
        return NpzSource(path, convert)
    if path.lower().endswith(".zip"):
        return ZipSource(path, convert)
    raise InputError(f"'{path}' is not a source of pictures. A source is {_KINDS}.")


def require_undamaged(source: ImageSource) -> None:
    """Compare an npz or prepared data with their checksums, which reads them; in other sources, decoding finds damage.

    Raises `InputError` for a damaged file.
    """
    if isinstance(source, NpzSource | PreparedSource):
        source.verify()


def _open_remote(address: str, convert: bool) -> ImageSource:
    storage = Storage(address)
    info = storage.info()
    if info is None:
        raise InputError(f"{address} does not exist. A source is {_KINDS}; all but the last three also at an address.")
    if info["type"] == "file":
        entry = fetch_file(storage, info)
        source = open_source(str(entry.path / storage.address.rpartition("/")[2]), convert)
        source.copy = entry  # stays in the cache while the source is used
        return source
    return PreparedSource(address) if storage.info(MANIFEST_NAME) else RemoteFolderSource(storage, convert)


def _open_directory(path: str, convert: bool) -> ImageSource:
    if (Path(path) / MANIFEST_NAME).is_file() and any(Path(path).glob("*.safetensors")):
        return PreparedSource(path)
    if is_repa(path):
        return RepaSource(path, convert)
    return FolderSource(path, convert)
