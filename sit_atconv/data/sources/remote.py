"""A folder of pictures at an address, read file by file."""

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.remote.storage import Storage
from sit_atconv.data.repa import LATENTS
from sit_atconv.data.sources.files import FileSource
from sit_atconv.errors import InputError


class RemoteFolderSource(FileSource):
    """A folder of pictures or of class folders in a storage, whose empty folders are not seen."""

    kind = "folder"

    def __init__(self, storage: Storage, options: SourceOptions, part: str | None = None) -> None:
        self._storage, names = storage, storage.names()
        if any(name.startswith(f"{LATENTS}/") for name in names):
            raise InputError(f"{storage.address} was prepared for REPA: copy it to this machine, and give its path.")
        super().__init__(storage.address, names, (), options, part)

    def _read(self, name: str) -> bytes:
        return self._storage.read(name)
