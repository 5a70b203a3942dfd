"""dataset.json: everything about a prepared data set that must be known before a shard is opened."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from msgspec import Meta

from sit_atconv.alignment.cached import TeacherSpec, tokens_name
from sit_atconv.autoencoder import LatentSpec
from sit_atconv.errors import InputError
from sit_atconv.runtime.reading import Count, Sha256, read_json, require_known_keys, understand
from sit_atconv.runtime.whole_files import write_json

MANIFEST_NAME = "dataset.json"
VERSION = 1
MAX_SHARD_SIZE = 4096
_ADVICE = "Copy the data set again, or prepare it again."

Side = Annotated[int, Meta(ge=1, le=65_536)]
ShardSize = Annotated[int, Meta(ge=1, le=MAX_SHARD_SIZE)]


@dataclass(frozen=True)
class ShardInfo:
    """One shard file: its name, number of samples, size in bytes and sha256."""

    name: Annotated[str, Meta(pattern=r"^shard-[\w.]+$")]
    count: Annotated[int, Meta(ge=0, le=MAX_SHARD_SIZE)]
    bytes: Count
    sha256: Sha256


class Row(NamedTuple):
    """Type and shape of the row that a file holds for every sample under one name."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SkippedImage:
    """A picture of the source that could not be decoded: its position, and the reason, which includes its name."""

    index: Count
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Contents of dataset.json. `resolution` is (height, width) in pixels; `num_classes` 0 means unlabelled.

    `moments_dtype` is float16, or float32 for latents that were imported bit for bit. `teachers` lists the teachers
    whose tokens are kept; `token_files` has, by `tokens_name`, one file per shard for each teacher that was added to
    complete data. `exif` and `bits` are those of `SourceOptions`; `empty_classes` lists classes without a picture.
    `complete` is False while preparation runs; `shards` and `skipped` are filled in when it ends.
    """

    source: str
    resolution: tuple[Side, Side]
    latents: LatentSpec
    class_names: list[str] | None
    num_classes: Annotated[int, Meta(ge=0, le=1_000_000)]
    has_flip: bool
    has_images: bool
    shard_size: ShardSize
    source_count: Count
    count: Count = 0
    complete: bool = False
    shards: list[ShardInfo] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)
    teachers: list[TeacherSpec] = field(default_factory=list)
    moments_dtype: Literal["float16", "float32"] = "float16"
    token_files: dict[str, list[ShardInfo]] = field(default_factory=dict)
    exif: bool = False
    bits: Annotated[int, Meta(ge=9, le=16)] | None = None
    empty_classes: list[Count] = field(default_factory=list)
    version: int = VERSION

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        height, width = self.resolution
        return self.latents.channels, height // self.latents.downscale, width // self.latents.downscale

    @property
    def shard_rows(self) -> dict[str, Row]:
        """The rows of a shard by the tensors' names, without labels, positions and pictures."""
        channels, height, width = self.latent_shape
        moments = Row(getattr(torch, self.moments_dtype), (2 * channels, height, width))
        rows = dict.fromkeys(versions("moments", self.has_flip), moments)
        for number in range(len(self.teachers)):
            rows |= {} if tokens_name(number) in self.token_files else self.token_rows(number)
        return rows

    def token_rows(self, number: int) -> dict[str, Row]:
        """The rows that hold the tokens of one teacher."""
        spec = self.teachers[number]
        tokens = Row(torch.float16, (spec.grid[0] * spec.grid[1], spec.dim))
        return dict.fromkeys(versions(tokens_name(number), spec.flip), tokens)

    @property
    def series(self) -> list[tuple[list[ShardInfo], dict[str, Row]]]:
        """All files and their rows: first the shards, then one file per shard for each teacher added later."""
        names = {tokens_name(number): number for number in range(len(self.teachers))}
        added = [(files, self.token_rows(names[name])) for name, files in self.token_files.items()]
        return [(self.shards, self.shard_rows), *added]

    def settings(self) -> dict:
        """The settings of preparation: two runs with equal settings write equal shards."""
        outcome = ("count", "complete", "shards", "skipped", "token_files", "empty_classes")
        settings = {key: value for key, value in self.to_dict().items() if key not in outcome}
        first = [spec for k, spec in enumerate(settings["teachers"]) if tokens_name(k) not in self.token_files]
        return settings | {"teachers": first}

    def to_dict(self) -> dict:
        """A JSON-able dictionary; `from_dict` undoes it."""
        return {
            **asdict(self),
            "latents": self.latents.to_dict(),
            "resolution": list(self.resolution),
            "teachers": [teacher.to_dict() for teacher in self.teachers],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: str | Path) -> "Manifest":
        """Undo `to_dict`. Raises `InputError` naming `path` when `values` is not a manifest of this version."""
        if values.get("version") != VERSION:
            found = values.get("version")
            raise InputError(f"{path} is not a data set of version {VERSION} (found {found}): prepare it again.")
        manifest = understand(values, cls, str(path), _ADVICE)
        LatentSpec.from_dict(values["latents"], f"{path}: latents", _ADVICE)
        for number, teacher in enumerate(values.get("teachers", [])):
            require_known_keys(teacher, TeacherSpec, f"{path}: teachers[{number}]")
        names = [tokens_name(number) for number in range(len(manifest.teachers))]
        for name, files in manifest.token_files.items():
            if name not in names or len(files) != len(manifest.shards):
                raise InputError(f"{path}: token_files.{name} does not belong to its teachers and shards. {_ADVICE}")
        if manifest.class_names and len(manifest.class_names) != manifest.num_classes:
            count = len(manifest.class_names)
            raise InputError(f"{path}: {count} class_names for {manifest.num_classes} classes. {_ADVICE}")
        return manifest


def versions(name: str, flip: bool) -> list[str]:
    """Names of a tensor and, if `flip`, of the same tensor for the mirrored pictures."""
    return [name, f"{name}_flip"] if flip else [name]


def load_manifest(directory: str | Path) -> Manifest:
    """Read dataset.json of a prepared directory. Raises `InputError` when there is none or it cannot be used."""
    path = Path(directory) / MANIFEST_NAME
    return Manifest.from_dict(read_json(path, dict[str, Any], _ADVICE), path)


def save_manifest(manifest: Manifest, directory: str | Path) -> None:
    """Write dataset.json, whole or not at all."""
    write_json(Path(directory) / MANIFEST_NAME, manifest.to_dict())
