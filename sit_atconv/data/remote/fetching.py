"""Fetch files into the cache: all that are missing, several at a time, each compared with its digest."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sit_atconv.data.remote.cache import Entry, use_entry
from sit_atconv.data.remote.storage import Storage
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.whole_files import remove_leftovers, whole_file

_AT_A_TIME = 8
# What storage tells of a file that changes when its contents do
_VERSIONS = ("ETag", "etag", "generation", "oid", "LastModified", "last_modified", "updated", "mtime", "created")


class RemoteFile(NamedTuple):
    """A file of a storage: its name there, its size in bytes and, if known, its SHA-256."""

    name: str
    bytes: int
    sha256: str | None


def fetch_files(storage: Storage, files: Sequence[RemoteFile], key: object) -> Entry:
    """The files in an entry of the cache of their own; `key` is what determines their contents, as JSON-able values.

    A file that is there was compared with its digest when it was fetched. After an interruption the next call fetches
    the rest. Raises `InputError` when the cache has no room, the storage cannot be read, or a file is not the one that
    was expected.
    """
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    entry = use_entry(name, sum(file.bytes for file in files), storage.address)
    with entry.filling():
        missing = [file for file in files if _size(entry, file) != file.bytes]
        if missing:
            remove_leftovers(entry.path)
            _fetch_all(storage, missing, entry)
    return entry


def fetch_file(storage: Storage, info: dict) -> Entry:
    """The file at the storage's address in an entry of the cache, under its own name; `info` is `storage.info()`."""
    if info["size"] is None:
        raise InputError(f"{storage.address} does not tell its size: fetch it yourself, and give its path.")
    folder, _, name = storage.address.rpartition("/")
    version = [str(info[key]) for key in _VERSIONS if key in info]
    file = RemoteFile(name, int(info["size"]), None)
    return fetch_files(Storage(folder), [file], [storage.address, file.bytes, version])


def _size(entry: Entry, file: RemoteFile) -> int | None:
    path = entry.path / file.name
    return path.stat().st_size if path.is_file() else None


def _fetch_all(storage: Storage, files: Sequence[RemoteFile], entry: Entry) -> None:
    total = sum(file.bytes for file in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {storage.address}")
    with bar, ThreadPoolExecutor(_AT_A_TIME) as pool:
        futures = [pool.submit(_fetch, storage, file, entry) for file in files]
        try:
            for file, future in zip(files, futures, strict=True):
                future.result()
                bar.update(file.bytes)
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _fetch(storage: Storage, file: RemoteFile, entry: Entry) -> None:
    with whole_file(entry.path / file.name) as unfinished:
        path = Path(unfinished.name)
        storage.fetch(file.name, path)
        size = path.stat().st_size
        if size != file.bytes or file.sha256 not in (None, sha256_of_file(path)):
            how = f"has {size:,} bytes instead of {file.bytes:,}" if size != file.bytes else "does not match its digest"
            raise InputError(
                f"{storage.address}/{file.name} {how}: it was changed or damaged after it was written. Upload it again."
            )
