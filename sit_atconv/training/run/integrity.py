"""position.json: where a run stands, and the size and SHA-256 of every file beside it, so that damage has a name."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.whole_files import write_json

_NAME = "position.json"


def write_position(folder: Path, position: dict[str, Any]) -> None:
    """Write the position and the digests of everything in `folder`; the last file of a checkpoint."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {**position, "files": files}
    write_json(folder / _NAME, {**content, "sha256": _digest(content)})


def read_position(checkpoint: Path) -> dict[str, Any]:
    """The position of a checkpoint whose files are all as they were written.

    Raises `InputError` naming the first file that is missing, truncated or changed.
    """
    try:
        content = json.loads((checkpoint / _NAME).read_bytes())
        expected = content.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(checkpoint, _NAME, "cannot be read") from None
    if _digest(content) != expected:
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
