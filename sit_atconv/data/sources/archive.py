"""The files of a zip, by name."""

import os
import zipfile

from sit_atconv.errors import InputError

# What zipfile raises while it reads a file: RuntimeError for a password, KeyError for a name that is not there.
_DAMAGE = (
    zipfile.BadZipFile, zipfile.zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, KeyError,
)  # fmt: skip


class Archive:
    """A zip that is read. Picklable; every process opens its own handle."""

    def __init__(self, path: str) -> None:
        self.path, self._handle = path, None

    def entries(self) -> list[zipfile.ZipInfo]:
        """Files and folders. Raises `InputError` for a zip that is damaged or encrypted."""
        infos = self._archive().infolist()
        locked = next((info.filename for info in infos if info.flag_bits & 1), None)
        if locked is not None:
            raise InputError(f"{self.path} is encrypted ({locked}). Unpack it, or write it again without a password.")
        if any(not info.filename for info in infos):
            raise InputError(
                f"{self.path} holds an entry without a name: the archive is damaged. Fetch or write it again."
            )
        return infos

    def read(self, name: str) -> bytes:
        """The contents of a file. Raises `InputError` when it is damaged or not there."""
        try:
            return self._archive().read(name)
        except _DAMAGE as error:
            raise InputError(f"Cannot read {name} in {self.path}: {error}.") from error

    def _archive(self) -> zipfile.ZipFile:
        # Keyed by process, because a handle shared across a fork would share its file position.
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
                raise InputError(f"Cannot open {self.path} as a zip: {error}. Was its download complete?") from error
        return self._handle[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}
