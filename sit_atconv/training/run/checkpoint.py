"""The checkpoints of a run: finding, saving and removing them; each is either complete or not there."""

import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sit_atconv.config import LogConfig
from sit_atconv.errors import InputError
from sit_atconv.runtime.lock import gone
from sit_atconv.runtime.whole_files import UNFINISHED, followed, point_link, pointed, whole_folder
from sit_atconv.training.run.stop import TrainingStopped

_SET_ASIDE = "set-aside-"


class Checkpoints:
    """RUN/checkpoints/step-0050000/, the link `latest` to the newest complete one, and `best` to the best scored one.

    Where there are no links, files take their place (`point_link`). Only the main process changes the directory.
    """

    def __init__(self, directory: Path, settings: LogConfig, accelerator: Accelerator) -> None:
        self.directory, self._settings, self._accelerator = directory, settings, accelerator

    def complete(self) -> list[Path]:
        """All complete checkpoints, oldest first. A checkpoint gets its final name when it is complete."""
        return sorted((p for p in self.directory.glob("step-*") if p.name[5:].isdecimal()), key=step_of)

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to continue from: the newest, or the one that `wanted` names by step, name or path.

        Raises `InputError` when this run has no such checkpoint.
        """
        complete = self.complete()
        if wanted is None:
            return complete[-1] if complete else None
        for checkpoint in complete:
            names = (checkpoint.name, str(step_of(checkpoint)))
            if wanted in names or Path(wanted).resolve() == checkpoint.resolve():
                return checkpoint
        there = ", ".join(p.name for p in complete) or "none"
        raise InputError(f"--resume {wanted}: {self.directory} has no such complete checkpoint. There are: {there}.")

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let the main process `write` the checkpoint of `step` into a folder; all processes call it.

        Raises `TrainingStopped` on all processes when it cannot be written, as on a full disk. Older checkpoints stay.
        """
        final = self.directory / f"step-{step:07d}"
        failure = self._write(final, write) if self._accelerator.is_main_process else None
        (failure,) = broadcast_object_list([failure])
        if failure is not None:
            message = self.advice(f"The checkpoint of step {step} could not be written: {failure}")
            if not self.directory.parent.is_dir():
                message = gone(self.directory.parent, "training", "--run")
            raise TrainingStopped(message if self._accelerator.is_main_process else 1)
        return final

    def advice(self, failure: str) -> str:
        """The message when a `failure` to write stops training."""
        newest = self.find(None)
        there = f"{newest} is complete" if newest else "There is no complete checkpoint"
        cure = "raise the limit on the size of files (ulimit -f)" if "File too large" in failure else "make room"
        return f"{failure}. Training stopped. {there}: {cure}, and run the same command again to go on from there."

    def mark_best(self, checkpoint: Path) -> None:
        """Point the link `best` to a checkpoint, which is then kept."""
        if self._accelerator.is_main_process:
            self._point("best", checkpoint)

    def begin_after(self, step: int, best: tuple[int, float] | None) -> None:
        """Set aside checkpoints after `step`, and correct the links `latest` and `best`.

        `best` is step and score of the best checkpoint: a kill may have come before the link was written.
        """
        for checkpoint in reversed(self.complete()):  # newest first, so that a kill leaves no gap
            if step_of(checkpoint) > step:  # only after --resume, which discards the steps after it
                aside = checkpoint.with_name(_SET_ASIDE + checkpoint.name)
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)
            elif best is not None and step_of(checkpoint) == best[0]:
                self._point("best", checkpoint)
        newest = self.find(None)
        if newest is not None:
            self._point("latest", newest)
        link = self.directory / "best"
        name = pointed(link)
        if name is not None and not (self.directory / name).is_dir():
            link.unlink()

    def _write(self, final: Path, write: Callable[[Path], None]) -> str | None:
        """Write a checkpoint whole or not at all; returns the reason if that fails."""
        try:
            self.directory.mkdir(exist_ok=True)  # not its parent: the directory of a moved run is not created again
            with whole_folder(final) as unfinished:
                write(unfinished)
            self._point("latest", final)
        except OSError as error:
            return str(error)
        self._rotate()
        return None

    def _point(self, name: str, checkpoint: Path) -> None:
        link = self.directory / name
        if pointed(link) != checkpoint.name:
            point_link(link, checkpoint.name)

    def _rotate(self) -> None:
        keep, every = self._settings.keep, self._settings.keep_every
        if keep is None:
            return
        best = followed(self.directory / "best").resolve()
        for old in self.complete()[:-keep]:
            if old.resolve() == best or (every and step_of(old) % every == 0):
                continue
            doomed = old.with_name(UNFINISHED + old.name)  # renamed first: a half-removed one must not look complete
            old.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # a file that is being read may stay until the next start


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))
