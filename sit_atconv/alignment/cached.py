"""Teacher tokens that were computed when the data were prepared, so that training does not run the teacher."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta
from torch import Tensor

from sit_atconv.alignment.tokens import resample_tokens
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.reading import Text

_Size = Annotated[int, Meta(ge=1, le=65_536)]


@dataclass(frozen=True)
class TeacherSpec:
    """Describes cached tokens: a `grid` (h, w) of them per picture, in raster order, each of width `dim`.

    `flip` says whether tokens of the mirrored pictures are included. `weights` is "hub", "random" or a path, as given;
    `weights_hash` is the sha256 of a local file, else None.
    """

    name: Text
    weights: Text
    weights_hash: str | None
    dim: _Size
    grid: tuple[_Size, _Size]
    flip: bool

    def to_dict(self) -> dict:
        """A JSON-able dictionary."""
        return {**asdict(self), "grid": list(self.grid)}


def tokens_name(number: int) -> str:
    """The name in shards and batches of the data set's token set number `number`."""
    return f"tokens_{number}"


class CachedTeacher:
    """Takes the place of a `Teacher`: returns the data set's token set number `number`."""

    def __init__(self, spec: TeacherSpec, number: int) -> None:
        self.dim, self.number, self._grid = spec.dim, number, spec.grid
        self.key = tokens_name(number)

    def targets(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h·w, dim) fp32 on `grid` (h, w), from batch[key] (B, N, dim), on the batch's device."""
        return resample_tokens(batch[self.key].float(), self._grid, grid)


def find_tokens(name: str, weights: str, cached: Sequence[TeacherSpec], where: str) -> int:
    """The number of the token set of the data set `where` that belongs to this teacher.

    A weights file that exists is compared by its contents, otherwise by its path. Raises `InputError` when the data
    hold tokens of other teachers only, or of this teacher with other weights.
    """
    held = ", ".join(spec.name for spec in cached) or "none"
    matches = [position for position, spec in enumerate(cached) if spec.name == name]
    if not matches:
        raise InputError(
            f"{where} holds no tokens of the teacher {name} (of others: {held}): prepare it with --teacher {name}, or "
            "set cached: false to run the teacher in every step."
        )
    spec = cached[matches[0]]
    digest = sha256_of_file(Path(weights)) if Path(weights).is_file() else None
    same = digest == spec.weights_hash if digest and spec.weights_hash else weights == spec.weights
    if not same:
        raise InputError(
            f"{where} holds tokens of {name} with the weights {_described(spec.weights, spec.weights_hash)}, not "
            f"{_described(weights, digest)}. Give the weights that made them, or prepare the data anew."
        )
    return matches[0]


def _described(weights: str, digest: str | None) -> str:
    return f"'{weights}' (sha256 {digest})" if digest else f"'{weights}'"
