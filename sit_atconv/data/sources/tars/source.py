"""Tars of pictures as a source: one, several (shards), or tars within a tar (ImageNet's training set)."""

import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sit_atconv.data.pictures.formats import IMAGE_SUFFIXES, suffix_of
from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources.files import (
    FileSource,
    empty_among,
    folder_classes,
    refuse_duplicates,
    refuse_foreign_paths,
    refuse_splits,
)
from sit_atconv.data.sources.listed import LISTS
from sit_atconv.data.sources.tars.index import Member, read_members, refuse_compressed
from sit_atconv.data.sources.tars.labels import CLASS, JSON, choose_pictures, sample_labels, split_key
from sit_atconv.errors import InputError

_NUMBERED = re.compile(r"(.*?)[-_.]*\d+")  # a shard: "train-000012"
_WORDNET = re.compile(r"n\d{8}")  # a class of ImageNet: "n01440764"


def list_tars(folder: str, part: str | None) -> list[str]:
    """The tars of a folder, sorted, if it holds nothing but tars and no pictures; else none.

    `part` chooses those that are called so, but for a number. Raises `InputError` if a choice is needed.
    """
    tars = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry)
            if path.name.startswith("."):
                continue
            if entry.is_dir() or suffix_of(path.name) in IMAGE_SUFFIXES:
                return []
            if path.suffix == ".tar":
                tars.append(path)
    tars.sort()
    series = sorted({_series(path.stem) for path in tars})
    if part is not None and tars:
        tars = [path for path in tars if part in (path.stem, _series(path.stem))]
        if not tars:
            raise InputError(f"{folder} has no tars called {part}; it has {', '.join(series[:8])}.")
    elif len(series) > 1:
        refuse_splits(folder, series, [(name,) for name in series])
        if _are_shards([path.stem for path in tars]):
            raise InputError(
                f"{folder} holds several series of shards ({', '.join(series[:8])}): choose one, as "
                f"{folder}:{series[0]}, or list the tars, as '{folder}/{series[0]}-{{000..012}}.tar'."
            )
    return [str(path) for path in tars]


class TarSource(FileSource):
    """Pictures in plain tars by name ("n01440764/n01440764_18.JPEG"), read from their places in the tar.

    A tar among several, or within another one, is a folder called like it. Labels come from a list, from WebDataset's
    members beside the pictures, or from folders; tars that differ in a number only are shards, and no classes. Every
    process opens the tars itself, one at a time.
    """

    kind = "tar"

    def __init__(self, path: str, tars: Sequence[str], options: SourceOptions, part: str | None = None) -> None:
        self.path, self._tars, self._options, self._handle = str(path), list(tars), options, None
        self._stems = _stems(self._tars)
        self._texts: dict[str, bytes] = {}  # members that may hold a label
        self._rows: dict[str, int] = {}  # name -> row of _places
        places = array("q")  # tar, start and size of each
        folders: list[str] = []
        for name, number, member in self._members():
            if member.is_folder:
                folders.append(name)
                continue
            if name in self._rows:
                refuse_duplicates(self._tars[number], [name, name])
            self._rows[name] = len(self._rows)
            places.extend((number, member.start, member.size))
            self._keep_text(name, number, member)
        self._places = np.frombuffer(places, dtype=np.int64).reshape(-1, 3)
        super().__init__(path, self._choose(), empty_among(folders, self._rows), options, part)
        # Only pictures are read from now on, by every worker.
        self._places = self._places[[self._rows[name] for name in self.names]]
        self._rows, self._texts = {name: row for row, name in enumerate(self.names)}, {}

    def _members(self) -> Iterator[tuple[str, int, Member]]:
        """(name in this source, number of the tar, member) of each member of the tars, and of the tars in them."""
        for number, path in enumerate(self._tars):
            file = self._open(number)
            refuse_compressed(file, path)
            outer = f"{self._stems[number]}/" if len(self._tars) > 1 else ""
            for member in read_members(file, path):
                yield outer + _plain(member.name, path), number, member

    def _keep_text(self, name: str, number: int, member: Member) -> None:
        """Keep what may hold a label now, while the tar is read in order."""
        key, ending = split_key(name)
        if ending not in (CLASS, JSON, self._options.label_key) or name.rpartition("/")[2] in LISTS:
            return
        decided = ending == JSON and self._options.label_key is None and f"{key}.{CLASS}" in self._texts
        needed = not self._options.unconditional and not decided
        self._texts[name] = self._bytes(number, member.start, member.size, name) if needed else b""

    def _choose(self) -> list[str]:
        """The names of all members or, in samples of several members, of one picture for each."""
        pictures = [name for name in self._rows if suffix_of(name) in IMAGE_SUFFIXES]
        keys = {split_key(name)[0] for name in pictures}
        self._texts = {name: text for name, text in self._texts.items() if split_key(name)[0] in keys}
        left_out = set(self._texts)
        in_samples = sum(split_key(name)[0] in keys for name in self._rows) > len(pictures)
        if in_samples or self._options.image_key is not None:
            left_out.update(set(pictures) - set(choose_pictures(pictures, self._options.image_key, self.path)))
        return [name for name in self._rows if name not in left_out]

    def _labels(self, visible: Set[str], empty_folders: Iterable[str]) -> tuple[list[str] | None, np.ndarray | None]:
        if found := self._listed(visible):
            return found
        if self._texts:
            return sample_labels(self.names, self._texts, self._options, self.path)
        if not _are_shards(self._stems):
            return folder_classes(self.path, self.names, empty_folders)
        classes = folder_classes(self.path, [name.partition("/")[2] for name in self.names], ())
        if classes[1] is None:
            raise InputError(
                f"{self.path} holds numbered tars of pictures without labels. Are these shards? Then give "
                "--unconditional. Or is each tar a class? Then put them in one: tar cf all.tar *.tar, and give that."
            )
        return classes

    def _read(self, name: str) -> bytes:
        number, start, size = self._places[self._rows[name]].tolist()
        return self._bytes(number, start, size, name)

    def _bytes(self, number: int, start: int, size: int, name: str) -> bytes:
        try:
            file = self._open(number)
            file.seek(start)
            data = file.read(size)
        except OSError as error:
            raise InputError(f"Cannot read {name} in {self._tars[number]}: {error.strerror}.") from error
        if len(data) < size:
            raise InputError(f"Cannot read {name} in {self._tars[number]}: the tar has become shorter.")
        return data

    def _open(self, number: int) -> BinaryIO:
        # Keyed by process, because a handle shared across a fork would share its file position.
        if self._handle is None or self._handle[:2] != (os.getpid(), number):
            try:
                self._handle = (os.getpid(), number, open(self._tars[number], "rb"))  # noqa: SIM115
            except OSError as error:
                raise InputError(f"Cannot open {self._tars[number]}: {error.strerror}.") from error
        return self._handle[2]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handle": None}


def _stems(tars: Sequence[str]) -> list[str]:
    """What tars are called, with their folder if two have the same name."""
    stems = [Path(path).stem for path in tars]
    return stems if len(set(stems)) == len(tars) else [f"{Path(path).parent.name}-{Path(path).stem}" for path in tars]


def _series(stem: str) -> str:
    match = None if _WORDNET.fullmatch(stem) else _NUMBERED.fullmatch(stem)
    return match[1] if match else stem


def _are_shards(stems: Sequence[str]) -> bool:
    """Whether there are several tars and each has a number, so that no name tells of a class."""
    return len(stems) > 1 and all(_NUMBERED.fullmatch(s) and not _WORDNET.fullmatch(s) for s in stems)


def _plain(name: str, where: str) -> str:
    """A member's name without "./"; names that lead elsewhere are refused."""
    refuse_foreign_paths(where, [name])
    return "/".join(part for part in name.split("/") if part not in ("", "."))
