"""Preparation into object storage: in a folder of the cache on this machine, which is then uploaded."""

import hashlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.data.remote.cache import cache_directory
from sit_atconv.data.remote.storage import Storage
from sit_atconv.data.shards.copy import read_remote_manifest
from sit_atconv.data.shards.manifest import MANIFEST_NAME, Manifest
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import locked
from sit_atconv.runtime.processes import process_state
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import whole_file, write_json

log = logging.getLogger(__name__)

_UPLOADED = "uploaded.json"  # digests of the files that are in the storage, in the folder on this machine


def prepare_remotely(options: PrepareOptions) -> Manifest:
    """`prepare` into the address `options.out`: the shards are uploaded when all are written, dataset.json last.

    After an interruption the same call continues: shards are neither encoded nor uploaded twice. Raises `InputError` as
    `prepare` does, and when the address holds something else or cannot be written to, before anything is encoded.
    """
    state, storage = process_state(), Storage(options.out)
    folder = cache_directory() / "prepare" / hashlib.sha256(storage.address.encode()).hexdigest()[:32]
    complete = state.is_main_process and _begin(storage, folder)
    (complete,) = broadcast_object_list([complete])
    try:
        manifest = prepare(replace(options, out=str(folder)))
    except InputError as error:
        raise InputError(str(error).replace(str(folder), storage.address)) from error
    with locked(folder, state, "uploaded", "OUT"):
        if state.is_main_process and not complete:
            _upload(folder, manifest, storage)
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _begin(storage: Storage, folder: Path) -> bool:
    """Whether the address holds a complete data set, whose dataset.json is then put into `folder` to be compared."""
    found = read_remote_manifest(storage)
    if found is None and not folder.exists() and storage.names():
        raise InputError(f"{storage.address} exists and holds no data set of ours: choose a new or empty place.")
    if found is not None and found[1].complete:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / MANIFEST_NAME) as file:
            file.write(found[0])
        return True
    storage.require_writable()
    return False


def _upload(folder: Path, manifest: Manifest, storage: Storage) -> None:
    noted = folder / _UPLOADED
    there = read_json(noted, list[str], f"Remove {noted}.") if noted.exists() else []
    files = [info for infos, _ in manifest.series for info in infos]
    bar = tqdm(
        total=sum(info.bytes for info in files), unit="B", unit_scale=True, desc=f"uploading to {storage.address}"
    )
    with bar:
        for info in files:
            if info.sha256 not in there or (storage.info(info.name) or {}).get("size") != info.bytes:
                storage.put(folder / info.name, info.name)
                there.append(info.sha256)
                write_json(noted, there)
            bar.update(info.bytes)
    storage.put(folder / MANIFEST_NAME, MANIFEST_NAME)
    log.info("%s: %d shards uploaded.", storage.address, len(files))
