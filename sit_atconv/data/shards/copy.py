"""Prepared data at an address: a whole copy in the cache on this machine, which is read like any directory."""

from pathlib import Path
from typing import Any

from sit_atconv.data.remote.cache import Entry
from sit_atconv.data.remote.fetching import RemoteFile, fetch_files
from sit_atconv.data.remote.storage import Storage
from sit_atconv.data.shards.manifest import MANIFEST_NAME, Manifest
from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import parse_json
from sit_atconv.runtime.whole_files import whole_file


def read_remote_manifest(storage: Storage) -> tuple[bytes, Manifest] | None:
    """dataset.json at an address, and what it says; None if there is none."""
    if storage.info(MANIFEST_NAME) is None:
        return None
    text, path = storage.read(MANIFEST_NAME), f"{storage.address}/{MANIFEST_NAME}"
    return text, Manifest.from_dict(parse_json(text, dict[str, Any], path), path)


def copy_dataset(address: str) -> Entry:
    """The data set at `address` as a directory on this machine, the `path` of the entry; what is missing is fetched.

    All files are fetched before the first is read, because training reads rows of all of them in random order. Raises
    `InputError` when there is no complete data set, or it cannot be fetched.
    """
    storage = Storage(address)
    found = read_remote_manifest(storage)
    if found is None:
        raise InputError(
            f"{address} is not a prepared data set (no {MANIFEST_NAME} there). Prepare it first: python -m "
            f"sit_atconv.data.prepare SOURCE {address} --resolution 256 --vae stabilityai/sd-vae-ft-mse."
        )
    text, manifest = found
    if not manifest.complete:
        raise InputError(f"{address} is not complete: run its preparation again to finish it.")
    files = [RemoteFile(info.name, info.bytes, info.sha256) for infos, _ in manifest.series for info in infos]
    entry = fetch_files(storage, files, files)
    with entry.filling():
        _write_if_new(entry.path / MANIFEST_NAME, text)
    return entry


def _write_if_new(path: Path, text: bytes) -> None:
    if not path.is_file() or path.read_bytes() != text:
        with whole_file(path) as file:
            file.write(text)
