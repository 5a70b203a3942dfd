"""A run's directory: the configuration it was begun with, which of its keys may change, and files that are whole.

What was not written to its end, or belongs after the step that a run goes back to, is removed.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sit_atconv.config import Config, config_differences, load_config
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK

UNFINISHED = ".unfinished-"  # how the names of files and folders begin that are not whole yet
# Sections and keys that decide nothing about the steps taken so far, nor about the weights to come but for rounding.
_FREE = (
    "log.",
    "preview.",
    "evaluation",
    "data.workers",
    "data.verify",
    "training.max_bad_steps",
    "training.compile",
    "training.gradient_checkpointing",
    "training.accumulation",
    "training.power_ema_every",
)


def check_run_directory(run: Path, config: Config) -> list[str]:
    """What changed since the run was begun, as lines "key: old -> new", all of it allowed. Reads only.

    Raises `InputError` unless `run` is new, empty, or was begun with a configuration that this one continues.
    """
    path = run / "config.yaml"
    if path.exists():
        begun = load_config(path)
        changed = config_differences(_plain(begun), _plain(config))
        free = (*_FREE, "training.steps") if begun.optimizer.schedule == "constant" else _FREE
        refused = [line for line in changed if not line.startswith(free)]
        if refused:
            ends = any(line.startswith("training.steps:") for line in refused)
            why = (
                " A linear schedule's steps depend on where it ends: only a constant one can be lengthened."
                if ends
                else ""
            )
            raise InputError(
                f"{run} was begun with another configuration ({'; '.join(refused)}).{why} Nothing was changed: "
                "give the configuration it was begun with to continue it, or choose another --run."
            )
        return changed
    if run.exists() and (not run.is_dir() or any(not p.name.startswith((UNFINISHED, LOCK)) for p in run.iterdir())):
        raise InputError(f"{run} exists and is not a training run: choose another --run.")
    return []


def write_configuration(run: Path, config: Config) -> None:
    """Make the directory and its config.yaml, or renew it, whole or not at all."""
    run.mkdir(parents=True, exist_ok=True)
    with whole_file(run / "config.yaml") as unfinished:
        unfinished.write_text(config.to_yaml())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` at the end of the context: the file is there whole or not at all."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    yield unfinished
    unfinished.replace(path)


def forget_after(step: int, run: Path) -> None:
    """Remove grids and snapshots from after `step`: a run that goes back there makes them anew, or others."""
    for path in [*run.glob("samples/step-*.png"), *run.glob("ema/step-*")]:
        number = path.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_leftovers(run: Path) -> None:
    """Remove what an interrupted run did not finish writing."""
    for leftover in [*run.glob(f"{UNFINISHED}*"), *run.glob(f"*/{UNFINISHED}*")]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def sync_tree(folder: Path) -> None:
    """Force a tree's files and directories to disk, so that a rename that follows cannot overtake them."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Force a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(config: Config) -> dict[str, Any]:
    return yaml.safe_load(config.to_yaml())
