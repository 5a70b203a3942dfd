"""The table's folder: the command it was begun with, and what a later command may add to it."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sit_atconv.config import config_differences
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.whole_files import as_json, leftovers, remove_leftovers, write_json

BEGUN = "table-settings.json"
_SET = re.compile(r"(un)?guided(-random|-balanced)?")
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
        if folder.exists() and (not folder.is_dir() or _foreign(folder, begun)):
            raise InputError(f"{folder} exists and holds no table, or one of other models: choose another --out.")
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


def _foreign(folder: Path, begun: Begun) -> list[Path]:
    """What is in `folder` but the table's own files and its sets of samples, which check themselves."""
    ours = {folder / name for name in (LOCK, "table.md", "table.tex", "table.json")} | set(leftovers(folder))
    rows = [folder / name for name in begun.checkpoints if (folder / name).is_dir()]
    within = [path for row in rows for path in row.iterdir() if not _SET.fullmatch(path.name)]
    return [*(set(folder.iterdir()) - ours - set(rows)), *within]


def begin_table(folder: Path, begun: Begun) -> None:
    """Note in the `folder` what the table is begun with. Whoever calls it holds the folder's lock."""
    remove_leftovers(folder)
    write_json(folder / BEGUN, asdict(begun))
