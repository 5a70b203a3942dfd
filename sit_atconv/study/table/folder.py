"""The table's folder: the command it was begun with, and what a later command may add to it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit_atconv.config import config_differences
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import as_json, leftovers, remove_leftovers, write_json

BEGUN = "table-settings.json"
_DAMAGED = "It is damaged: remove it, and the same command goes on with the samples that are there."


@dataclass(frozen=True)
class Begun:
    """What determines the numbers of a table.

    checkpoints: the models by the name of their rows. drawing, scoring: options of both.
    """

    checkpoints: dict[str, str]
    drawing: dict[str, Any]
    scoring: dict[str, Any]


def require_same_table(folder: Path, begun: Begun) -> None:
    """Raise `InputError` unless `folder` is new, empty, or holds a table that this one continues or adds models to."""
    path = folder / BEGUN
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {folder / LOCK, *leftovers(folder)}):
            raise InputError(f"{folder} exists and holds no table: choose another --out.")
        return
    was, now = asdict(read_json(path, Begun, _DAMAGED)), as_json(asdict(begun))
    now["checkpoints"] = {name: now["checkpoints"].get(name) for name in was["checkpoints"]}
    if not (changed := config_differences(was, now)):
        return
    advice = (
        "Nothing was changed: choose another --out, or give the command that it was begun with (RUNs may be added)."
    )
    if all(line.startswith("scoring.") for line in changed):
        advice += f" To score the same samples anew in another way, remove {path} first."
    raise InputError(f"{folder} holds another table ({'; '.join(changed)}). {advice}")


def begin_table(folder: Path, begun: Begun) -> None:
    """Note in the `folder` what the table is begun with. Whoever calls it holds the folder's lock."""
    remove_leftovers(folder)
    write_json(folder / BEGUN, asdict(begun))
