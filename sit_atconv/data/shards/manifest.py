"""dataset.json: everything that is to be known about a prepared data set before a shard is opened."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from sit_atconv.alignment.cached import TeacherSpec, tokens_name
from sit_atconv.autoencoder import LatentSpec
from sit_atconv.errors import InputError
from sit_atconv.runtime.whole_files import read_json, write_json

MANIFEST_NAME = "dataset.json"
VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One shard file: its name, number of samples, size in bytes and sha256."""

    name: str
    count: int
    bytes: int
    sha256: str


class Row(NamedTuple):
    """What a file holds of every sample under one name."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SkippedImage:
    """A picture of the source that could not be decoded: its position, and the reason, which names it."""

    index: int
    reason: str


@dataclass(frozen=True)
class Manifest:
    """Contents of dataset.json. `resolution` is (height, width) in pixels; `num_classes` 0 means unlabelled.

    `moments_dtype` is float16, or float32 for latents that were taken over from other preparation bit for bit.
    `teachers` says whose tokens are kept beside the latents; `token_files` holds a file a shard for each teacher that
    was added to complete data, by `tokens_name`. `complete` is False while preparation runs; `shards` and `skipped` are
    filled in when it ends.
    """

    source: str
    resolution: tuple[int, int]
    latents: LatentSpec
    class_names: list[str] | None
    num_classes: int
    has_flip: bool
    has_images: bool
    shard_size: int
    source_count: int
    count: int = 0
    complete: bool = False
    shards: list[ShardInfo] = field(default_factory=list)
    skipped: list[SkippedImage] = field(default_factory=list)
    teachers: list[TeacherSpec] = field(default_factory=list)
    moments_dtype: str = "float16"
    token_files: dict[str, list[ShardInfo]] = field(default_factory=dict)
    version: int = VERSION

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        height, width = self.resolution
        return self.latents.channels, height // self.latents.downscale, width // self.latents.downscale

    @property
    def shard_rows(self) -> dict[str, Row]:
        """What a shard holds of every sample besides label, position and picture, by the tensors' names."""
        channels, height, width = self.latent_shape
        moments = Row(getattr(torch, self.moments_dtype), (2 * channels, height, width))
        rows = dict.fromkeys(versions("moments", self.has_flip), moments)
        for number in range(len(self.teachers)):
            rows |= {} if tokens_name(number) in self.token_files else self.token_rows(number)
        return rows

    def token_rows(self, number: int) -> dict[str, Row]:
        """The tokens of one of the teachers."""
        spec = self.teachers[number]
        tokens = Row(torch.float16, (spec.grid[0] * spec.grid[1], spec.dim))
        return dict.fromkeys(versions(tokens_name(number), spec.flip), tokens)

    @property
    def series(self) -> list[tuple[list[ShardInfo], dict[str, Row]]]:
        """All files with what they hold: the shards, then as many files for each teacher that was added later."""
        names = {tokens_name(number): number for number in range(len(self.teachers))}
        added = [(files, self.token_rows(names[name])) for name, files in self.token_files.items()]
        return [(self.shards, self.shard_rows), *added]

    def settings(self) -> dict:
        """What preparation was asked for: two runs with equal settings write equal shards."""
        outcome = ("count", "complete", "shards", "skipped", "token_files")
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
    def from_dict(cls, values: dict, path: str | Path) -> "Manifest":
        """Undo `to_dict`. Raises `InputError` naming `path` when `values` is not a manifest of this version."""
        if not isinstance(values, dict) or values.get("version") != VERSION:
            found = values.get("version") if isinstance(values, dict) else None
            raise InputError(f"{path} is not a data set of version {VERSION} (found {found}): prepare it again.")
        known = {f.name for f in fields(cls)}
        try:
            return cls(
                **{
                    **{key: value for key, value in values.items() if key in known},
                    "resolution": tuple(values["resolution"]),
                    "latents": LatentSpec.from_dict(values["latents"]),
                    "shards": [ShardInfo(**shard) for shard in values["shards"]],
                    "skipped": [SkippedImage(**skipped) for skipped in values["skipped"]],
                    "teachers": [TeacherSpec.from_dict(teacher) for teacher in values.get("teachers", [])],
                    "token_files": {
                        name: [ShardInfo(**file) for file in files]
                        for name, files in values.get("token_files", {}).items()
                    },
                }
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): prepare the data set again.") from error


def versions(name: str, flip: bool) -> list[str]:
    """Names of a tensor of the pictures and, if `flip`, of the one of their mirror images."""
    return [name, f"{name}_flip"] if flip else [name]


def load_manifest(directory: str | Path) -> Manifest:
    """Read dataset.json of a prepared directory. Raises `InputError` when there is none or it cannot be used."""
    path = Path(directory) / MANIFEST_NAME
    return Manifest.from_dict(read_json(path), path)


def save_manifest(manifest: Manifest, directory: str | Path) -> None:
    """Write dataset.json, whole or not at all."""
    write_json(Path(directory) / MANIFEST_NAME, manifest.to_dict())
