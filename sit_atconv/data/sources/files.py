"""Sources of encoded picture files: folders and zips, flat or with one folder per class."""

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from sit_atconv.data.pictures.decode import IMAGE_SUFFIXES, LOSSY_SUFFIXES, decode_image
from sit_atconv.data.pictures.protocol import SourceImage
from sit_atconv.errors import InputError

log = logging.getLogger(__name__)

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})


class FileSource:
    """Pictures by relative name ("n01443537/img_0.JPEG"), sorted. Subclasses implement reading bytes.

    The first folder of a name is its class, after leading folders that all pictures share; sorted class folders are
    classes 0, 1, … Pictures without folders make an unlabelled source.
    """

    kind: str

    def __init__(self, path: str, names: Iterable[str], empty_folders: Iterable[str], convert: bool) -> None:
        self.path, self._convert = str(path), convert
        visible = [name for name in names if not _hidden(name)]
        wanted = (name for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        self.names = sorted(wanted, key=lambda name: name.split("/"))
        if not self.names:
            raise InputError(
                f"No pictures in {path}. Expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}, either directly "
                "or in one folder a class."
            )
        _mention_others(self.path, visible)
        self.class_names, self.labels = _classes(self.path, self.names, empty_folders)
        self.lossy = any(Path(name).suffix.lower() in LOSSY_SUFFIXES for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        name = self.names[index]
        label = None if self.labels is None else int(self.labels[index])
        return SourceImage(decode_image(self._read(name), f"{self.path}/{name}", self._convert), label, name)

    def _read(self, name: str) -> bytes:
        raise NotImplementedError


class FolderSource(FileSource):
    """A folder of pictures or of class folders; links are followed."""

    kind = "folder"

    def __init__(self, path: str, convert: bool = False) -> None:
        names, empty = [], []
        for folder, subfolders, files in os.walk(path, followlinks=True, onerror=_refuse_unreadable):
            _refuse_loops(folder, subfolders)
            subfolders.sort()
            prefix = Path(folder).relative_to(path).as_posix()
            names += files if prefix == "." else [f"{prefix}/{file}" for file in files]
            if not subfolders and all(_hidden(file) for file in files):
                empty.append(prefix)
        super().__init__(path, names, empty, convert)

    def _read(self, name: str) -> bytes:
        try:
            return Path(self.path, name).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read {self.path}/{name}: {error.strerror}.") from error


class ZipSource(FileSource):
    """A zip of pictures or of class folders. Every process opens its own handle."""

    kind = "zip"

    def __init__(self, path: str, convert: bool = False) -> None:
        self.path, self._handle = str(path), None
        infos = self._archive().infolist()
        locked = next((info.filename for info in infos if info.flag_bits & 1), None)
        if locked is not None:
            raise InputError(f"{path} is encrypted ({locked}). Unpack it, or write it again without a password.")
        names = [info.filename for info in infos if not info.is_dir()]
        _refuse_duplicates(self.path, names)
        _refuse_foreign_paths(self.path, names)
        filled = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in names}}
        filled |= {parent for folder in filled for parent in folder.parents}
        folders = (info.filename.rstrip("/") for info in infos if info.is_dir())
        empty = [folder for folder in folders if PurePosixPath(folder) not in filled]
        super().__init__(path, names, empty, convert)

    def _archive(self) -> zipfile.ZipFile:
        # Keyed by process, because a handle shared across a fork would share its file position.
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
                raise InputError(f"Cannot open {self.path} as a zip: {error}. Was its download complete?") from error
        return self._handle[1]

    def _read(self, name: str) -> bytes:
        try:
            return self._archive().read(name)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zipfile.zlib.error) as error:
            raise InputError(f"Cannot read {name} in {self.path}: {error}.") from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}


def _classes(path: str, names: list[str], empty: Iterable[str]) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and labels of sorted relative names; (None, None) when no folders distinguish them."""
    parts = [name.split("/")[:-1] for name in names]
    folders = [p.split("/") for p in empty if p != "." and not _hidden(p)]
    depth = _common_depth(parts + folders)
    loose = [name for name, part in zip(names, parts, strict=True) if len(part) == depth]
    if len(loose) == len(names):
        return None, None
    if loose:
        raise InputError(
            f"{path} mixes {len(loose)} pictures ({loose[0]}, …) with folders of pictures. Expected either pictures "
            "alone (no labels) or one folder a class and nothing beside them: move the loose ones."
        )
    classes = sorted({part[depth] for part in parts})
    missing = sorted({folder[depth] for folder in folders if len(folder) > depth} - set(classes))
    if missing:
        raise InputError(
            f"{path} has class folders without a picture: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. "
            "They would take a class number each: fill or remove them."
        )
    if set(map(str.lower, classes)) <= _SPLIT_NAMES:
        raise InputError(f"{path} holds splits ({', '.join(classes)}), not classes: give one, as {path}/{classes[0]}.")
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[part[depth]] for part in parts], dtype=np.int64)


def _common_depth(paths: list[list[str]]) -> int:
    """The number of leading folders that all paths share."""
    first, last = min(paths), max(paths)
    shared = [a == b for a, b in zip(first, last, strict=False)]
    return shared.index(False) if False in shared else len(shared)


def _refuse_duplicates(path: str, names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{path} holds {name} more than once, so its pixels are ambiguous. Write the zip again.")
        seen.add(name)


def _refuse_foreign_paths(path: str, names: list[str]) -> None:
    foreign = next((name for name in names if name.startswith("/") or "\\" in name or ".." in name.split("/")), None)
    if foreign is not None:
        raise InputError(
            f"{path} holds {foreign}, whose folders are not clear: expected names such as class/picture.png. Unpack "
            "it with the program that made it, and give the folder."
        )


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(f"Cannot read the folder {error.filename}: {error.strerror}.") from error


def _refuse_loops(folder: str, subfolders: list[str]) -> None:
    for link in (Path(folder, name) for name in subfolders):
        if link.is_symlink() and Path(folder).resolve().is_relative_to(link.resolve()):
            raise InputError(f"The link {link} leads back to a folder that it lies in: remove it.")


def _mention_others(path: str, names: list[str]) -> None:
    """Log how many files of other kinds are left out, since nobody would notice otherwise."""
    suffixes = (Path(name).suffix.lower() or "without suffix" for name in names)
    others = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        log.info("%s: %d files are not pictures by their names and are left out (%s).", path, others.total(), kinds)


def _hidden(name: str) -> bool:
    """Whether a name is or lies in something that operating systems leave behind: .DS_Store, ._img.png, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
