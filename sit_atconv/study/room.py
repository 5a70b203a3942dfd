"""The room that a study needs on the disk, estimated before it runs."""

import shutil
from pathlib import Path

from sit_atconv.config import Config, LogConfig
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.study.plan import Budget, Plan

FEATURE_BYTES = 20_000  # of a picture, of the Inception network
Needed = dict[tuple[str, Budget], int]  # bytes of a cell, by row and budget


def bytes_of_cell(config: Config, model: SiT, steps: int, samples: int) -> int:
    """Bytes of a finished cell: its checkpoints, snapshots of averages, and `samples` bytes of pictures and features.

    A checkpoint has weights, Adam's two moments and averages in fp32; projectors are not counted. `steps` is 0 for a
    run that is limited by time: only the checkpoint that it writes in any case is counted.
    """
    weights, training, keep = 4 * sum(p.numel() for p in model.parameters()), config.training, config.log
    averages = 1 + len(training.more_ema_decays) + len(training.power_ema)
    kept = kept_checkpoints(keep, steps)
    kept += config.evaluation is not None  # the best one
    snapshots = steps // training.power_ema_every * len(training.power_ema)
    return (kept * (3 + averages) + snapshots) * weights + samples


def kept_checkpoints(settings: LogConfig, steps: int) -> int:
    """How many checkpoints a run of so many steps leaves, without the best one."""
    written = 1 + steps // settings.checkpoint_every
    kept = written if settings.keep is None else min(settings.keep, written)
    return kept + (steps // settings.keep_every if settings.keep_every else 0)


def require_room(plan: Plan, folder: Path, needed: Needed) -> None:
    """Raise `InputError` when the disk has too little room for what the study has not written yet."""
    there = sum(
        path.stat().st_size for path in (folder / "cells").rglob("*") if path.is_file() and not path.is_symlink()
    )
    total = sum(needed[cell.row, cell.budget] for cell in plan.cells())
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if total - there > free:
        raise InputError(
            f"The study needs about {_gib(total - there)} in {folder}, and {_gib(free)} are free: make room, choose "
            "another --out, or keep fewer checkpoints (set: {log.keep: 1})."
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
