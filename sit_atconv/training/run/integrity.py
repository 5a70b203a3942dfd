"""position.json: a run's position, and the size and SHA-256 of every file beside it, so that damage is found."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.reading import Count, Sha256, read_json, understand
from sit_atconv.runtime.whole_files import write_json

_NAME = "position.json"


class FileFacts(TypedDict):
    """A file of a checkpoint."""

    bytes: Count
    sha256: Sha256


class AverageSums(TypedDict):
    """Sums of the logged quantities, one row per process, whose last entry is the number of steps."""

    names: list[str]
    rows: Annotated[list[list[float]], Meta(min_length=1)]


class SkippedSteps(TypedDict):
    """The number of steps skipped so far, and the length of the current row of skipped steps."""

    skipped: Count
    row: Count


class PositionFile(TypedDict):
    """position.json; see `sit_atconv.training.position.Position.state`."""

    step: Count
    processes: Count
    averages: AverageSums
    guard: SkippedSteps
    best: tuple[Count, float] | None
    measure: NotRequired[str | None]  # earlier versions did not write these three
    seconds: NotRequired[float]
    out_of_time: NotRequired[bool]
    files: dict[str, FileFacts]
    sha256: Sha256


def write_position(folder: Path, position: dict[str, Any]) -> None:
    """Write the position and the digests of all files in `folder`; must be the last file of a checkpoint."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {**position, "files": files}
    write_json(folder / _NAME, {**content, "sha256": _digest(content)})


def read_position(checkpoint: Path) -> dict[str, Any]:
    """The position of a checkpoint, after checking that no file has changed since it was written.

    Raises `InputError` naming the first file that is missing, truncated or changed.
    """
    try:
        content = read_json(checkpoint / _NAME, dict[str, Any])
        understand(content, PositionFile, _NAME)
    except InputError as error:
        raise _damaged(checkpoint, _NAME, f"cannot be read ({error})") from None
    if content.pop("sha256") != _digest(content):
        raise _damaged(checkpoint, _NAME, "was changed")
    for name, facts in content.pop("files").items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(checkpoint, name, "is missing")
        if path.stat().st_size != facts["bytes"]:
            raise _damaged(checkpoint, name, f"has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}")
        if sha256_of_file(path) != facts["sha256"]:
            raise _damaged(checkpoint, name, "was changed (its SHA-256 differs)")
    return content


def _damaged(checkpoint: Path, name: str, how: str) -> InputError:
    return InputError(
        f"{checkpoint} is damaged: {name} {how}. Restore it from a copy, or remove the whole folder to go on from the "
        "checkpoint before."
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
