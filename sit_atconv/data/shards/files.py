"""Files written one per shard, each with a note beside it once the file is complete."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sit_atconv.data.shards.format import shard_name, write_shard
from sit_atconv.data.shards.manifest import Row, ShardInfo, SkippedImage
from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import write_json


@dataclass(frozen=True)
class ShardNote:
    """Contents of a note: see `ShardFiles`."""

    shard: ShardInfo
    skipped: list[SkippedImage]
    basis: dict[str, Any] | None = None


@dataclass(frozen=True)
class ShardFiles:
    """The shards of `directory`, or the files called `part` beside them.

    `rows` describes the tensors that a file holds for every sample. `basis` maps a file's number to everything else
    that determines its contents, as JSON-able values; a note counts only if its basis is the same.
    """

    directory: Path
    rows: dict[str, Row]
    part: str = ""
    basis: Callable[[int], dict] = lambda number: {}

    def write(
        self, number: int, index: Sequence[int], tensors: dict[str, Tensor], skipped: Sequence[SkippedImage]
    ) -> None:
        """Write a file, then its note. Raises `InputError` naming a picture with values that are not finite."""
        for name in self.rows:
            finite = torch.isfinite(tensors[name]).flatten(1).all(1)
            if not finite.all():
                row = int((~finite).int().argmax())
                raise InputError(f"The {name} of picture {index[row]} of the source are NaN or too large for fp16.")
        self._note(number).unlink(missing_ok=True)  # an old note of another basis, whose file may have the same size
        info = write_shard(self.directory / shard_name(number, self.part), tensors)
        note = {"basis": self.basis(number), "shard": asdict(info), "skipped": [asdict(skip) for skip in skipped]}
        write_json(self._note(number), note)

    def read_note(self, number: int) -> tuple[ShardInfo, list[SkippedImage]] | None:
        """The contents of a complete file's note; None when the file is still to be written."""
        if not self._note(number).is_file():
            return None
        note = read_json(self._note(number), ShardNote, "Remove this note: its shard is then written again.")
        path = self.directory / note.shard.name
        if note.basis != self.basis(number) or not path.is_file() or path.stat().st_size != note.shard.bytes:
            return None
        return note.shard, note.skipped

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """The numbers whose files are still to be written."""
        return [number for number in numbers if self.read_note(number) is None]

    def remove_from(self, first: int) -> None:
        """Remove files with numbers from `first` on, left over from a longer source."""
        for path in self.directory.glob("shard-[0-9]*"):
            if int(path.name.removeprefix("shard-").split(".")[0]) >= first:
                path.unlink()

    def remove_notes(self, numbers: Iterable[int]) -> None:
        """Remove the notes, once their contents are in dataset.json."""
        for number in numbers:
            self._note(number).unlink(missing_ok=True)

    def _note(self, number: int) -> Path:
        return (self.directory / shard_name(number, self.part)).with_suffix(".json")
