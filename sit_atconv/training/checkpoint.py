"""Checkpoints: written beside, synced and renamed, so that each is whole or not there at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import load_model


class Checkpoints:
    """RUN/checkpoints/step-0050000/ and the link `latest` that names the newest complete one.

    Each holds Accelerate's state (weights, optimiser), `model/` (the averaged weights, for `from_pretrained`) and
    position.json (what the trainer needs to go on from there).
    """

    def __init__(self, directory: Path, keep: int | None) -> None:
        self.directory, self.keep = directory, keep

    @property
    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        complete = self._complete()
        return complete[-1] if complete else None

    def save(self, accelerator: Accelerator, ema: SiT, position: dict[str, Any]) -> Path:
        """Write the checkpoint of `position["step"]`; all processes call it. Returns where it stands."""
        final = self.directory / f"step-{position['step']:07d}"
        unfinished = self.directory / f".unfinished-{final.name}"
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            ema.save_pretrained(unfinished / "model")
            (unfinished / "position.json").write_text(json.dumps(position, indent=2))
            _sync(unfinished)
            shutil.rmtree(final, ignore_errors=True)  # of an earlier life of this run, overtaken by a resume
            unfinished.rename(final)
            self._point_latest_at(final)
            self._rotate()
        accelerator.wait_for_everyone()
        return final

    def restore(self, accelerator: Accelerator, ema: SiT, checkpoint: Path) -> dict[str, Any]:
        """Load a checkpoint into the prepared objects and the averaged model; returns its position.

        Raises `InputError` naming the checkpoint when it is damaged.
        """
        try:
            position = json.loads((checkpoint / "position.json").read_text())
            accelerator.load_state(str(checkpoint))
        except InputError:
            raise
        except Exception as error:  # torch, safetensors, zip and pickle each have their own
            raise InputError(
                f"{checkpoint} is damaged and cannot be continued from ({type(error).__name__}: {error}). "
                "Remove it to go on from the one before."
            ) from error
        ema.load_state_dict(load_model(checkpoint / "model").state_dict())
        return position

    def clean(self) -> None:
        """Remove what an interrupted save left behind, and make `latest` name the newest complete checkpoint."""
        for unfinished in self.directory.glob(".unfinished-*"):
            shutil.rmtree(unfinished)
        if self.latest is not None:
            self._point_latest_at(self.latest)

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if (p / "position.json").exists())

    def _point_latest_at(self, checkpoint: Path) -> None:
        link = self.directory / ".latest"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.replace(self.directory / "latest")
        _sync_directory(self.directory)

    def _rotate(self) -> None:
        if self.keep is None:
            return
        for old in self._complete()[: -self.keep]:
            doomed = old.with_name(f".unfinished-{old.name}")  # no longer complete before it is partly gone
            old.rename(doomed)
            shutil.rmtree(doomed)


def _sync(directory: Path) -> None:
    """Force a tree's files and directories to disk, so that the rename that follows cannot overtake them."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
