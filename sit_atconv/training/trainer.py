"""The training loop. All randomness is keyed by (seed, position), so a resumed run equals an uninterrupted one."""

from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sit_atconv.alignment import LATENTS
from sit_atconv.autoencoder import sample_posterior
from sit_atconv.config import Config
from sit_atconv.errors import FULL_DISK
from sit_atconv.runtime.lock import Place, locked
from sit_atconv.runtime.whole_files import remove_leftovers
from sit_atconv.sampling.draw import Drawing
from sit_atconv.training.averages.ema import PowerFunction
from sit_atconv.training.averages.first_weights import first_weights_caption, first_weights_note
from sit_atconv.training.averages.power_ema import save_snapshot
from sit_atconv.training.averages.sharding import gather_whole, whole
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
from sit_atconv.training.run.measures import deciding_score
from sit_atconv.training.run.stop import TERMINATED, Termination, TrainingStopped, ended
from sit_atconv.training.schedule import learning_rate
from sit_atconv.training.session.objective import Draws
from sit_atconv.training.session.session import Session, build_session
from sit_atconv.training.session.zero import uses_zero
from sit_atconv.training.state import gather_state, restore_state
from sit_atconv.training.watch.drawing import sampler_settings
from sit_atconv.training.watch.evaluation import Evaluation
from sit_atconv.training.watch.goals import Goals
from sit_atconv.training.watch.heldout_loss import HeldOutLoss
from sit_atconv.training.watch.preview import Preview
from sit_atconv.training.watch.throughput import Interval
from sit_atconv.training.watch.trackers import begin_trackers, show_picture

logger = get_logger(__name__)  # logs on the main process only


def train(config: Config, run: Path, resume: str | None = None, ends_process: bool = False) -> None:
    """Train with `config` in the directory `run`, or continue the run there, until all steps are done.

    `resume` names an older checkpoint to go back to, by its step, name or path. `ends_process` says that the process
    ends with training: SIGTERM is then ignored after the last step.

    Raises:
        InputError: when configuration, data and run directory do not agree; nothing is written then.
        SystemExit: with code 143 after SIGTERM and a checkpoint of the last step; with code 1 when training cannot
            continue (`TrainingStopped`).
    """
    check_run_directory(run, config)
    session = build_session(config, run)
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
            trainer = Trainer(session, run, checkpoints, position)

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


class Trainer:
    """The loop, and the work due between its steps.

    Raises `InputError` when data, preview, evaluation and the number of processes do not agree.
    """

    def __init__(self, session: Session, run: Path, checkpoints: Checkpoints, position: Position) -> None:
        config, accelerator = session.config, session.accelerator
        self.session, self.directory, self.checkpoints, self.position = session, run, checkpoints, position
        self.batches = iter(session.loader(position.step))
        self.log = RunLog(run / "log.jsonl", accelerator)
        self.place = Place(run, "training", "--run") if accelerator.is_main_process else None
        self.newest: tuple[int, Path] | None = None  # step and place of the last checkpoint written here
        self.preview, self.evaluations, seed = None, [], config.training.seed
        preview, evaluation = config.preview, config.evaluation
        drawn = [preview] if preview.every else []
        drawn += [evaluation] if evaluation is not None and evaluation.reference is not None else []
        for drawing in drawn:  # refuse impossible settings now, not at the first grid
            Drawing(accelerator.unwrap_model(session.model), sampler_settings(drawing))
        if preview in drawn and accelerator.is_main_process:
            self.preview = Preview(preview, session.dataset, run / "samples", seed, accelerator.device)
        if evaluation in drawn:
            self.evaluations.append(Evaluation(evaluation, session.dataset, seed, accelerator))
        if evaluation is not None and evaluation.loss:
            self.evaluations.append(HeldOutLoss(session.heldout, evaluation.batch_size, accelerator))
        self.goals = Goals(evaluation, session.epochs)

    def run(self, notes: list[str], termination: Termination) -> bool:
        """Train until the last step, or that of SIGTERM; returns whether it was SIGTERM. `notes` go to the log."""
        self.open(notes)
        steps, silent = self.session.config.training.steps, not self.session.accelerator.is_main_process
        self.interval = Interval(self.session, self.position.seconds)
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
        for goal, reached in self.goals.recall(self.log.lines()):
            self.log.write({"step": step, **self.goals.numbers([goal], reached)})
            self.note(self.goals.sentence(goal, reached))

    def note(self, text: str) -> None:
        """Say something about what happened at this step, and write it into the log."""
        logger.info("%s", text)
        self.log.note(self.position.step, text)

    def step(self) -> None:
        """One optimizer step over all micro-batches; skipped on the device when loss or gradient are not finite."""
        session, position = self.session, self.position
        position.begin_step()
        for group in session.optimizer.param_groups:
            group["lr"] = learning_rate(session.config, position.step, position.seconds)
        terms = train_step(session, lambda: self.interval.fetch(self.batches))
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

        seen = (config.preview.every, config.log.checkpoint_every, config.evaluation and config.evaluation.every)
        if last or step == min(filter(None, seen)):
            self.note_first_weights()
        shown = self.write_line() if due(config.log.every) else {}
        if due(config.preview.every):
            with self.interval.paused():
                self.draw_preview()
        if config.training.power_ema and due(config.training.power_ema_every):
            with self.interval.paused():
                self.save_power_averages()
        best = config.evaluation is not None and due(config.evaluation.every) and self.evaluate()
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
            "lr": learning_rate(session.config, position.step, position.seconds),
            "skipped": position.guard.check(),
            **self.interval.read(position.step),
        }
        self.log.write(record)
        shown = ("loss", "grad_norm", "images_per_second", "data_seconds", "mfu", "skipped")
        return {name: f"{record[name]:.4g}" for name in shown if record[name] is not None}

    def note_first_weights(self) -> None:
        """Say how much of the averages are the weights that the run began with, if it is notable."""
        steps = self.position.step if self.position.complete else self.session.config.training.steps
        note = self.of_first_weights(partial(first_weights_note, steps=steps))
        if note is not None:
            logger.warning("%s", note)
            self.log.note(self.position.step, note)

    def of_first_weights(self, text: Callable[..., str | None]) -> str | None:
        """A note or caption about the weights that the run began with. Waits for the device."""
        skipped = self.position.guard.state()["skipped"]
        return text(self.session.averages, self.position.step, skipped, self.session.config)

    def draw_preview(self) -> None:
        """Draw the grid of this step from the averaged weights."""
        model = self.session.averages.model()
        if self.preview is not None:
            caption = self.of_first_weights(first_weights_caption)
            path = self.preview.save(model, self.position.step, caption)
            show_picture(self.session.accelerator, path, self.position.step)

    def evaluate(self) -> bool:
        """Score the averaged weights, log the scores and goals reached, and say whether they are the best so far."""
        step, metrics, scores = self.position.step, self.session.config.evaluation.metrics, {}
        with self.interval.paused():
            model = self.session.averages.model()
            for evaluation in self.evaluations:
                scores |= evaluation.scores(model)
        reached = self.goals.reach(scores)
        self.log.write({"step": step, **scores, **self.goals.numbers(reached, step)})
        for goal in reached:
            self.note(self.goals.sentence(goal, step))
        measure = deciding_score(metrics, scores)
        return measure is not None and self.position.note_score(measure, scores[measure])

    def save_power_averages(self) -> None:
        """Write a snapshot of the power-function averages; called before the checkpoint of the same step."""
        averages, main = self.session.averages, self.session.accelerator.is_main_process
        names = [name for name, profile in averages.profiles.items() if isinstance(profile, PowerFunction)]
        tensors = {name: gather_whole(averages.tensors(name), main) for name in names}
        if main:
            save_snapshot(self.directory / "ema", self.position.step, tensors, self.session.model.save_config)

    def save(self) -> Path:
        """Write this step's checkpoint unless it exists: SIGTERM may come in a step that is saved anyway."""
        step = self.position.step
        if self.newest is None or self.newest[0] != step:
            with self.interval.paused():
                self.position.guard.check()
                write = gather_state(self.session, self.position.state(self.interval.seconds))
                self.newest = step, self.checkpoints.save(step, write)
        return self.newest[1]


def train_step(session: Session, fetch: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Forward and backward passes of all micro-batches, and an optimizer step unless loss or gradient are not finite.

    Returns this process's loss terms, averaged over its micro-batches, and "grad_norm", all scalars on the device.
    """
    accelerator, micro_batches, terms = session.accelerator, session.config.training.accumulation, {}
    for _ in range(micro_batches):
        latents, labels, draws, targets = prepare_inputs(session, fetch())
        with accelerator.accumulate(session.objective):
            losses = session.objective(latents, labels, draws, targets)
            accelerator.backward(poisoned(losses["loss"]))
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
    return {**terms, "grad_norm": norm}


def prepare_inputs(session: Session, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Draws, list[Tensor] | None]:
    """The objective's inputs, on the device: normalised latents, labels, draws, and each teacher's tokens.

    The tokens are None when the alignment has stopped.
    """
    dataset, device = session.dataset, session.accelerator.device
    drawn = [field.name for field in fields(Draws) if field.name in batch]
    draws = Draws(**{name: batch[name].to(device, non_blocking=True) for name in drawn})
    moments = batch["moments"].to(device, non_blocking=True)
    latents = sample_posterior(moments, draws.posterior_noise, dataset.latents)
    labels = batch["label"].to(device, non_blocking=True)
    if session.teachers and not session.taught(batch):  # then the loader brings nothing for teachers
        return latents, labels, draws, None
    keys = {teacher.key for teacher in session.teachers} - {LATENTS}
    shown = {LATENTS: latents, **{key: batch[key].to(device, non_blocking=True) for key in keys}}
    targets = [teacher.targets(shown, session.model.grid) for teacher in session.teachers]
    return latents, labels, draws, targets
