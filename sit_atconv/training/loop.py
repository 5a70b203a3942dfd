"""The loop that every run shares, whatever it trains; the kinds of runs say what a step sees and what is measured.

All randomness is keyed by (seed, position), so a resumed run equals an uninterrupted one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sit_atconv.config import Settings
from sit_atconv.errors import FULL_DISK
from sit_atconv.runtime.lock import Place, locked
from sit_atconv.runtime.whole_files import remove_leftovers
from sit_atconv.training.averages.first_weights import first_weights_note
from sit_atconv.training.averages.sharding import whole
from sit_atconv.training.position import Position
from sit_atconv.training.run.checkpoint import Checkpoints
from sit_atconv.training.run.directory import (
    check_run_directory,
    forget_after,
    require_known_data,
    write_configuration,
)
from sit_atconv.training.run.guard import poisoned, step_unless_bad
from sit_atconv.training.run.log import RunLog
from sit_atconv.training.run.stop import TERMINATED, Termination, TrainingStopped, ended
from sit_atconv.training.session.trained import Trained
from sit_atconv.training.session.zero import uses_zero
from sit_atconv.training.state import gather_state, restore_state
from sit_atconv.training.watch.throughput import Interval
from sit_atconv.training.watch.trackers import begin_trackers

logger = get_logger(__name__)  # logs on the main process only


def train_run(
    loop: "type[Loop]",
    build: Callable[[Any, Path], Trained],
    config: Settings,
    run: Path,
    resume: str | None,
    ends_process: bool,
) -> None:
    """Train in the directory `run`, or continue the run there, until all steps are done; see `training.train`.

    `build(config, run)` makes the session that a `loop` trains.
    """
    check_run_directory(run, config)
    session = build(config, run)
    accelerator = session.accelerator
    checkpoints, position = Checkpoints(run / "checkpoints", config.log, accelerator), Position(session, run)
    trainer = None
    try:
        with locked(run, accelerator, "trained into", "--run"):
            notes = check_run_directory(run, config)  # again: another program may have begun the run meanwhile
            # Restore the newest checkpoint, or the one that `resume` names
            checkpoint = checkpoints.find(resume)
            if checkpoint is not None:
                state = restore_state(session, checkpoint)
                require_known_data(notes, state, run)
                notes += position.restore(state)
                logger.info("Continuing %s from step %d.", run, position.step)
            if position.complete:
                if accelerator.is_main_process:
                    remove_leftovers(run)  # of a kill while old checkpoints were removed at the end
                logger.info("%s is complete: %s.", run, position.ending)
                return
            trainer = loop(session, run, checkpoints, position)

            with Termination(accelerator.num_processes, ends_process) as termination:
                terminated = trainer.run(notes, termination)
                accelerator.wait_for_everyone()  # no process exits while others still communicate with it
                accelerator.end_training()
    except (OSError, SafetensorError) as error:
        if trainer is not None and trainer.place is not None and not trainer.place.is_there:
            raise TrainingStopped(trainer.place.gone) from error
        if error.errno not in FULL_DISK if isinstance(error, OSError) else trainer is None:
            raise
        raise TrainingStopped(checkpoints.advice(f"{error} in step {position.step}")) from error
    if terminated:
        raise SystemExit(TERMINATED)


class Loop(ABC):
    """The loop, and the work due between its steps."""

    raw: ClassVar[str]  # a sentence that says where the weights in training are to be had, which are no average
    # What of a line of the log the progress bar shows
    shown: ClassVar[Sequence[str]] = ("loss", "grad_norm", "images_per_second", "data_seconds", "mfu", "skipped")

    def __init__(self, session: Trained, run: Path, checkpoints: Checkpoints, position: Position) -> None:
        self.session, self.directory, self.checkpoints, self.position = session, run, checkpoints, position
        self.batches = iter(session.loader(position.step))
        self.log = RunLog(run / "log.jsonl", session.accelerator)
        self.place = Place(run, "training", "--run") if session.accelerator.is_main_process else None
        self.newest: tuple[int, Path] | None = None  # step and place of the last checkpoint written here

    @abstractmethod
    def train_step(self) -> dict[str, Tensor]:
        """Take the step that `position` counts; returns what `take_step` does."""

    @abstractmethod
    def learning_rate(self) -> float:
        """The learning rate of this step."""

    @property
    @abstractmethod
    def looks(self) -> Sequence[int | None]:
        """How many steps there are between the looks that this kind of run takes at its weights."""

    @abstractmethod
    def look(self, due: Callable[[int | None], bool]) -> bool:
        """Draw and measure what is `due`; returns whether this step's weights are the best so far."""

    def flops(self) -> int | None:
        """FLOPs of a training step for each image; None where they are not known."""
        return None

    def run(self, notes: list[str], termination: Termination) -> bool:
        """Train until the last step, or that of SIGTERM; returns whether it was SIGTERM. `notes` go to the log."""
        self.open(notes)
        steps, silent = self.session.config.training.steps, not self.session.accelerator.is_main_process
        self.interval = Interval(self.session, self.flops(), self.position.seconds)
        bar = tqdm(initial=self.position.step, total=steps, unit="step", desc="training", disable=silent)
        with bar as progress, ended(self.batches), logging_redirect_tqdm():  # messages go above the bar
            while not self.position.complete:
                self.step()
                progress.update()
                if shown := self.after_step():
                    progress.set_postfix(shown, refresh=False)
                if termination.requested(0.0 if silent else self.interval.seconds):
                    logger.info("Stopping as asked: %s is written, the same command goes on from it.", self.save())
                    return True
                self.position.seconds = max(self.position.seconds, termination.seconds)
        if self.position.out_of_time:
            logger.info("%s is complete: %s.", self.directory, self.position.ending)
        termination.settle()
        return False

    def open(self, notes: list[str]) -> None:
        """Prepare the run directory for writing, and log the `notes` on what changed since it was begun."""
        config, accelerator, step = self.session.config, self.session.accelerator, self.position.step
        accelerator.wait_for_everyone()  # write nothing before all processes have passed their checks
        if accelerator.is_main_process:
            remove_leftovers(self.directory)
            write_configuration(self.directory, config)
            forget_after(step, self.directory)
            self.checkpoints.begin_after(step, self.position.best)
            self.log.rewind(step)
        for note in notes:
            self.note(note)
        accelerator.wait_for_everyone()
        begin_trackers(accelerator, self.directory, step, asdict(config))

    def note(self, text: str) -> None:
        """Say something about what happened at this step, and write it into the log."""
        logger.info("%s", text)
        self.log.note(self.position.step, text)

    def step(self) -> None:
        """One optimizer step over all micro-batches; skipped on the device when loss or gradient are not finite."""
        session, position = self.session, self.position
        position.begin_step()
        for group in session.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        terms = self.train_step()
        finite = terms["grad_norm"].isfinite()
        session.averages.update(position.step, finite)
        position.averages.add(terms, finite)
        position.guard.note(position.step, finite, terms)
        self.interval.step()

    def after_step(self) -> dict[str, str]:
        """Do what is due after a step; returns what the progress bar shows. Always logs and saves the last step."""
        config, step = self.session.config, self.position.step
        if self.place is not None and not self.place.is_there:
            raise TrainingStopped(self.place.gone)
        last = self.position.complete

        def due(every: int | None) -> bool:
            return bool(every) and (last or step % every == 0)

        if last or step == min(filter(None, (*self.looks, config.log.checkpoint_every))):
            self.note_first_weights()
        shown = self.write_line() if due(config.log.every) else {}
        best = self.look(due)
        if best or due(config.log.checkpoint_every):
            checkpoint = self.save()
            if best:
                self.checkpoints.mark_best(checkpoint)
        return shown

    def write_line(self) -> dict[str, str]:
        """Write this step's line of the log, and return a part of it for the progress bar. Waits for the device."""
        session, position = self.session, self.position
        record = {
            "step": position.step,
            "images": position.step * session.config.training.batch_size,
            "epoch": session.epochs(position.step),
            **position.averages.read(),
            "lr": self.learning_rate(),
            "skipped": position.guard.check(),
            **self.interval.read(position.step),
        }
        self.log.write(record)
        return {name: f"{record[name]:.4g}" for name in self.shown if record[name] is not None}

    def note_first_weights(self) -> None:
        """Say how much of the averages are the weights that the run began with, if it is notable."""
        steps = self.position.step if self.position.complete else self.session.config.training.steps
        note = self.of_first_weights(partial(first_weights_note, steps=steps, raw=self.raw))
        if note is not None:
            logger.warning("%s", note)
            self.log.note(self.position.step, note)

    def of_first_weights(self, text: Callable[..., str | None]) -> str | None:
        """A note or caption about the weights that the run began with. Waits for the device."""
        skipped = self.position.guard.state()["skipped"]
        return text(self.session.averages, self.position.step, skipped, self.session.config)

    def save(self) -> Path:
        """Write this step's checkpoint unless it exists: SIGTERM may come in a step that is saved anyway."""
        step = self.position.step
        if self.newest is None or self.newest[0] != step:
            with self.interval.paused():
                self.position.guard.check()
                write = gather_state(self.session, self.position.state(self.interval.seconds))
                self.newest = step, self.checkpoints.save(step, write)
        return self.newest[1]


def take_step(session: Trained, fetch_inputs: Callable[[], tuple]) -> dict[str, Tensor]:
    """Forward and backward passes of all micro-batches, and an optimizer step unless loss or gradient are not finite.

    `fetch_inputs` returns the objective's arguments for the next micro-batch. Returns this process's loss terms,
    averaged over its micro-batches, and "grad_norm", all scalars on the device.
    """
    accelerator, micro_batches, terms = session.accelerator, session.config.training.accumulation, {}
    statistics = [(buffer, buffer.clone()) for buffer in session.statistics]
    for _ in range(micro_batches):
        inputs = fetch_inputs()
        with accelerator.accumulate(session.objective):
            losses = session.objective(*inputs)
            recomputes = session.config.training.gradient_checkpointing not in (False, "none")
            counted = [(buffer, buffer.clone()) for buffer in session.statistics if recomputes]
            accelerator.backward(poisoned(losses["loss"]))
            for buffer, value in counted:
                buffer.copy_(value)  # blocks that were recomputed have seen the batch twice
            if accelerator.sync_gradients:
                limit = session.config.optimizer.clip_norm or float("inf")
                norm = accelerator.clip_grad_norm_(session.objective.parameters(), limit)
                norm = whole(torch.as_tensor(norm, device=accelerator.device))  # DeepSpeed returns a number
                if accelerator.scaler is None and not uses_zero(accelerator):  # both skip such steps themselves
                    step_unless_bad(session.adam, norm.isfinite())
            session.optimizer.step()
            session.optimizer.zero_grad()
        for name, value in losses.items():
            terms[name] = terms.get(name, 0) + value.detach().float() / micro_batches
    _settle(accelerator, statistics, norm.isfinite())
    return {**terms, "grad_norm": norm}


def _settle(accelerator: Accelerator, statistics: list[tuple[Tensor, Tensor]], finite: Tensor) -> None:
    """Give all processes the mean of their statistics, or after a skipped step those from before it."""
    numbers = [buffer for buffer, _ in statistics if buffer.is_floating_point()]
    if numbers and accelerator.num_processes > 1:
        means = accelerator.reduce(torch.cat([buffer.flatten() for buffer in numbers]), "mean")
        for buffer, mean in zip(numbers, means.split([buffer.numel() for buffer in numbers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
    for buffer, before in statistics:
        buffer.copy_(torch.where(finite, buffer, before))
