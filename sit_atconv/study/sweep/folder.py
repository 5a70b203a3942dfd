"""The sweep's folder: what it was begun with, so that a later command cannot mix other samples or scores into it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit_atconv.config import config_differences
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import as_json, leftovers, remove_leftovers, write_json

BEGUN = "sweep-settings.json"
_DAMAGED = "It is damaged: remove it, and the same command goes on with the samples that are there."


@dataclass(frozen=True)
class Begun:
    """What all points share. `keys` are those that are swept; their values may differ from command to command."""

    checkpoint: str
    keys: list[str]
    drawing: dict[str, Any]
    scoring: dict[str, Any]


def require_same_sweep(folder: Path, begun: Begun) -> None:
    """Raise `InputError` unless `folder` is new, empty, or holds a sweep that this one continues or adds values to."""
    path = folder / BEGUN
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {folder / LOCK, *leftovers(folder)}):
            raise InputError(f"{folder} exists and holds no sweep: choose another --out.")
        return
    changed = config_differences(asdict(read_json(path, Begun, _DAMAGED)), as_json(asdict(begun)))
    if changed:
        raise InputError(
            f"{folder} holds another sweep ({'; '.join(changed)}). Nothing was changed: choose another --out, or give "
            "the command that it was begun with, whose keys may have other values."
        )


def begin_sweep(folder: Path, begun: Begun) -> None:
    """Note in the `folder` what the sweep is begun with. Whoever calls it holds the folder's lock."""
    remove_leftovers(folder)
    write_json(folder / BEGUN, asdict(begun))
