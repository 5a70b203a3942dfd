"""A run's directory: the configuration it was begun with, the keys that may change, and going back to an older step."""

import shutil
from pathlib import Path
from typing import Any

from sit_atconv.config import ImageConfig, Settings, config_differences, load_config
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import LOCK
from sit_atconv.runtime.whole_files import leftovers, whole_file

# Sections and keys that do not affect the steps already taken, and change later weights at most by rounding.
_FREE = (
    "log.",
    "preview.",
    "evaluation",
    "model.plugins",
    "data.workers",
    "data.verify",
    "training.max_bad_steps",
    "training.compile",
    "training.gradient_checkpointing",
    "training.accumulation",
    "training.power_ema_every",
)
# Of image networks also the number of micro-batches counts: BatchNorm and mixup see one of them.
_FREE_OF_IMAGES = ("log.", "validation.", "model.plugins", "data.workers", "training.max_bad_steps", "training.compile")
_ENDS = ("training.steps:", "training.max_seconds:")


def check_run_directory(run: Path, config: Settings) -> list[str]:
    """The allowed changes since the run was begun, as lines "key: old -> new". Writes nothing.

    Raises `InputError` unless `run` is new, empty, or was begun with a configuration that this one continues.
    """
    path = run / "config.yaml"
    if path.exists():
        begun = load_config(path, kind=type(config))
        changed = config_differences(begun.to_dict(), config.to_dict())
        known = _FREE_OF_IMAGES if isinstance(config, ImageConfig) else _FREE
        free = (*known, *_ENDS) if begun.optimizer.schedule == "constant" else known
        free = (*free, "data.path") if any((run / "checkpoints").glob("step-*")) else free  # it knows its data
        if not any(isinstance(each.data.heldout, float) for each in (begun, config)):
            free = (*free, "data.heldout")  # other data, which training does not see
        refused = [line for line in changed if not line.startswith(free)]
        if refused:
            ends = any(line.startswith(_ENDS) for line in refused)
            why = " A schedule's steps depend on where it ends: only a constant one can be lengthened." if ends else ""
            raise InputError(
                f"{run} was begun with another configuration ({'; '.join(refused)}).{why} Nothing was changed: "
                "give the configuration it was begun with to continue it, or choose another --run."
            )
        return changed
    if run.exists() and (not run.is_dir() or set(run.iterdir()) - {run / LOCK, *leftovers(run)}):
        raise InputError(f"{run} exists and is not a training run: choose another --run.")
    return []


def require_known_data(changed: list[str], state: dict[str, Any], run: Path) -> None:
    """Raise `InputError` when data.path is among `changed` and the checkpoint's `state` has no data fingerprint."""
    for line in changed:
        if line.startswith("data.path:") and "data" not in state:
            raise InputError(
                f"{run} was begun with another configuration ({line}), by a version that did not note which data those "
                "are. Nothing was changed: give the path it was begun with once, or choose another --run."
            )


def write_configuration(run: Path, config: Settings) -> None:
    """Write or renew config.yaml, whole or not at all."""
    with whole_file(run / "config.yaml") as file:
        file.write(config.to_yaml().encode())


def forget_after(step: int, run: Path) -> None:
    """Remove grids and snapshots of steps after `step`, which a run that goes back writes again."""
    for path in [*run.glob("samples/step-*.png"), *run.glob("ema/step-*")]:
        number = path.stem.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
