"""Accelerate's trackers: a run that is continued is one run for them, too, and they are handed pictures."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sit_atconv.runtime.whole_files import whole_file

_ID = "wandb-id"  # in the run directory: what W&B calls this run


def begin_trackers(accelerator: Accelerator, run: Path, step: int, config: dict[str, Any]) -> None:
    """Start the trackers of a run that stands at `step`. All processes call it.

    TensorBoard hides what an earlier start wrote from after that step. W&B keeps its files in RUN/wandb and continues
    its run, whose identifier is kept in RUN: one drawn once, so that equal configurations are runs of their own.
    """
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}}
    if "wandb" in map(str, accelerator.log_with) and accelerator.is_main_process:  # which alone starts it
        options["wandb"] = {"dir": str(run), "id": _identifier(run / _ID), "resume": "allow"}
    accelerator.init_trackers("sit-atconv", config=_flat(config), init_kwargs=options)


def show_picture(accelerator: Accelerator, path: Path, step: int) -> None:
    """Hand a picture file, by the name of its folder, to the trackers."""
    for tracker in accelerator.trackers:
        pictures = {path.parent.name: np.asarray(Image.open(path).convert("RGB"))[None]}  # (1, H, W, 3) uint8
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images(pictures, step=step, **layout)


def _identifier(path: Path) -> str:
    if not path.exists():
        with whole_file(path) as file:
            file.write(secrets.token_hex(8).encode())
    return path.read_text().strip()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys with values that every tracker takes."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
