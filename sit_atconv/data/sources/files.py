"""Sources of encoded picture files: folders and zips, flat or with one folder per class."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path, PurePosixPath

import numpy as np

from sit_atconv.data.pictures.decode import decode_image
from sit_atconv.data.pictures.formats import IMAGE_SUFFIXES, LOSSY_SUFFIXES, UNREADABLE, suffix_of
from sit_atconv.data.pictures.protocol import SourceImage, SourceOptions
from sit_atconv.data.sources.archive import Archive
from sit_atconv.data.sources.listed import LISTS, listed_labels
from sit_atconv.errors import InputError

log = logging.getLogger(__name__)

_SPLIT_NAMES = frozenset(
    ("train", "training", "trn", "val", "valid", "validation", "dev", "test", "testing", "eval", "heldout")
)
_SPLIT_ENDINGS = re.compile(r"[\W_]*(set|images?|data|split|\d+)?$")  # of "training_set", "val2017"


class FileSource:
    """Pictures by relative name ("n01443537/img_0.JPEG"), sorted. Subclasses implement reading bytes.

    A list beside the pictures (`listed`) gives the labels. Without one, the first folder of a name is its class, after
    leading folders that all pictures share; sorted class folders are classes 0, 1, … Pictures without folders make an
    unlabelled source. `part` chooses one of the first folders, such as a split.
    """

    kind: str

    def __init__(
        self,
        path: str,
        names: Iterable[str],
        empty_folders: Iterable[str],
        options: SourceOptions,
        part: str | None = None,
    ) -> None:
        self.path, self._options = str(path), options
        visible = [name for name in names if not _hidden(name)]
        wanted = (name for name in visible if suffix_of(name) in IMAGE_SUFFIXES)
        self.names = sorted(wanted, key=lambda name: name.split("/"))
        if part is not None:
            self.names, empty_folders = _only(self.path, part, self.names, empty_folders)
        others = _others(visible)
        if not self.names:
            if any(name.endswith(".parquet") for name in visible):
                raise InputError(f"No pictures in {path}, but parquet files: give hf:{path}.")
            raise InputError(
                f"No pictures in {path}. {others}Expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}, either "
                "directly or in one folder a class."
            )
        self.class_names = self.labels = None
        if not options.unconditional:
            self.class_names, self.labels = self._labels(set(visible), empty_folders)
        if others:
            log.info("%s: %s", self.path, others.rstrip())
        self.lossy = any(suffix_of(name) in LOSSY_SUFFIXES for name in self.names)

    def _labels(self, visible: Set[str], empty_folders: Iterable[str]) -> tuple[list[str] | None, np.ndarray | None]:
        """Class names and labels of all pictures, from a list or from their folders; None where there are none."""
        return self._listed(visible) or folder_classes(self.path, self.names, empty_folders)

    def _listed(self, visible: Set[str]) -> tuple[list[str] | None, np.ndarray | None] | None:
        """Class names and labels from the list in the folder that holds all pictures, or the nearest one above it."""
        parts = [name.split("/")[:-1] for name in self.names]
        above = parts[0][: _common_depth(parts)]
        for depth in range(len(above), -1, -1):
            folder = "".join(f"{part}/" for part in above[:depth])
            for name in LISTS:
                if folder + name not in visible:
                    continue
                text = self._read(folder + name)
                if found := listed_labels(self.path, folder, name, text, self.names, self._options):
                    return found
        return None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> SourceImage:
        name = self.names[index]
        label = None if self.labels is None else int(self.labels[index])
        return decode_image(self._read(name), f"{self.path}/{name}", self._options, label, name)

    def _read(self, name: str) -> bytes:
        raise NotImplementedError


class FolderSource(FileSource):
    """A folder of pictures or of class folders; links are followed."""

    kind = "folder"

    def __init__(self, path: str, options: SourceOptions, part: str | None = None) -> None:
        names, empty = [], []
        for folder, subfolders, files in os.walk(path, followlinks=True, onerror=_refuse_unreadable):
            _refuse_loops(folder, subfolders)
            subfolders.sort()
            prefix = Path(folder).relative_to(path).as_posix()
            names += files if prefix == "." else [f"{prefix}/{file}" for file in files]
            if not subfolders and all(_hidden(file) for file in files):
                empty.append(prefix)
        super().__init__(path, names, empty, options, part)

    def _read(self, name: str) -> bytes:
        try:
            return Path(self.path, name).read_bytes()
        except OSError as error:
            raise InputError(f"Cannot read {self.path}/{name}: {error.strerror}.") from error


class ZipSource(FileSource):
    """A zip of pictures or of class folders."""

    kind = "zip"

    def __init__(self, path: str, options: SourceOptions, part: str | None = None) -> None:
        self.path, self._archive = str(path), Archive(str(path))
        infos = self._archive.entries()
        names = [info.filename for info in infos if not info.is_dir()]
        refuse_duplicates(self.path, names)
        refuse_foreign_paths(self.path, names)
        folders = (info.filename.rstrip("/") for info in infos if info.is_dir())
        super().__init__(path, names, empty_among(folders, names), options, part)

    def _read(self, name: str) -> bytes:
        return self._archive.read(name)


def folder_classes(path: str, names: list[str], empty: Iterable[str]) -> tuple[list[str] | None, np.ndarray | None]:
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
            f"{path} has class folders without a picture: {_some(missing)}. "
            "They would take a class number each: fill or remove them."
        )
    refuse_splits(path, classes, [part[depth:] for part in parts])
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[part[depth]] for part in parts], dtype=np.int64)


def refuse_splits(path: str, folders: list[str], parts: Iterable[Sequence[str]]) -> None:
    """Raise `InputError` if the first folders are not classes but splits, each with the same classes."""
    within: dict[str, set[str]] = {folder: set() for folder in folders}
    for first, *rest in parts:
        within[first].update(rest[:1])
    inner = within[folders[0]]
    same = len(folders) > 1 and len(inner) > 1 and all(each == inner for each in within.values())
    named = [folder for folder in folders if _SPLIT_ENDINGS.sub("", folder.lower()) in _SPLIT_NAMES]
    if same or len(named) > 1 or named == folders:
        example = next((folder for folder in named if folder.lower().startswith("tr")), (named or folders)[0])
        raise InputError(
            f"{path} holds splits ({_some(folders)}), not classes: choose one, as {path}:{example}."
            + (f" (Each holds the same folders, {_some(sorted(inner))}: those are the classes.)" if same else "")
            + " Labels of another kind can be listed in a dataset.json beside them."
        )


def _only(path: str, part: str, names: list[str], folders: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names and the folders that lie in `part`, one of the first folders."""
    depth = _common_depth([name.split("/")[:-1] for name in names]) if names else 0
    chosen = [name for name in names if name.split("/")[depth:-1][:1] == [part]]
    if not chosen:
        there = sorted({name.split("/")[depth] for name in names if name.count("/") > depth})
        raise InputError(f"{path} has no folder '{part}' of pictures; it has {_some(there) or 'none'}.")
    return chosen, [folder for folder in folders if folder.split("/")[depth : depth + 1] == [part]]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _common_depth(paths: list[list[str]]) -> int:
    """The number of leading folders that all paths share."""
    first, last = min(paths), max(paths)
    shared = [a == b for a, b in zip(first, last, strict=False)]
    return shared.index(False) if False in shared else len(shared)


def empty_among(folders: Iterable[str], names: Iterable[str]) -> list[str]:
    """The folders of an archive in which none of its files `names` lies."""
    filled = {PurePosixPath(folder) for folder in {name.rpartition("/")[0] for name in names}}
    filled |= {parent for folder in filled for parent in folder.parents}
    return [folder for folder in folders if PurePosixPath(folder) not in filled]


def refuse_duplicates(path: str, names: list[str]) -> None:
    """Raise `InputError` for a name that an archive holds twice."""
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{path} holds {name} more than once: its pixels are ambiguous. Write the archive again.")
        seen.add(name)


def refuse_foreign_paths(path: str, names: list[str]) -> None:
    """Raise `InputError` for a name that leads out of an archive, or whose folders cannot be told."""
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


def _others(names: Sequence[str]) -> str:
    """How many files of other kinds are left out, since nobody would notice otherwise; empty if there are none."""
    suffixes = (suffix_of(name) or "without suffix" for name in names)
    others = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    if not others:
        return ""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    needed = "".join(f"; {suffix} needs {UNREADABLE[suffix]}" for suffix in others if suffix in UNREADABLE)
    return f"{others.total()} files are not pictures by their names and are left out ({kinds}{needed}). "


def _hidden(name: str) -> bool:
    """Whether a name is or lies in something that operating systems leave behind: .DS_Store, ._img.png, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
