"""The training loop. All randomness is keyed by (seed, position): a run continued is the run uninterrupted."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sit_atconv.autoencoder import sample_posterior
from sit_atconv.config import Config
from sit_atconv.training.checkpoint import Checkpoints
from sit_atconv.training.log import Averages, RunLog
from sit_atconv.training.objective import Draws, draw
from sit_atconv.training.preview import Preview
from sit_atconv.training.run_directory import begin_run_directory, check_run_directory
from sit_atconv.training.session import Session, build_session
from sit_atconv.training.throughput import peak_flops, peak_memory_gib, training_flops

logger = logging.getLogger(__name__)


def train(config: Config, run: Path) -> None:
    """Train as `config` says into the directory `run`, or continue what is there; returns when all steps are done.

    Raises `InputError` when configuration, data and run directory do not agree; nothing is written then.
    """
    # Check, build, and go back to where the run stands
    check_run_directory(run, config)
    session = build_session(config, run)
    accelerator, settings = session.accelerator, config.training
    checkpoints, averages = Checkpoints(run / "checkpoints", config.log.keep), Averages()
    step = _restore(session, checkpoints, averages)
    batches = iter(session.loader(step))
    if step >= settings.steps:
        logger.info("%s is complete: all %d steps are done.", run, step)
        return

    # Open the run directory for writing
    log = RunLog(run / "log.jsonl", accelerator)
    if accelerator.is_main_process:
        begin_run_directory(run, config)
        checkpoints.clean()
        log.rewind(step)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("sit-atconv", config=_flat(asdict(config)))
    preview = Preview(config.preview, session.dataset, run / "samples", settings.seed)
    interval = _Interval(session)
    silent = not accelerator.is_main_process
    progress = tqdm(initial=step, total=settings.steps, unit="step", desc="training", mininterval=1, disable=silent)

    while step < settings.steps:
        # One optimiser step, over all micro-batches
        for group in session.optimizer.param_groups:
            group["lr"] = learning_rate(config, step + 1)
        for _ in range(settings.accumulation):
            train_micro_batch(session, interval.fetch(batches), averages)
        session.ema.update(session.model)
        averages.step()
        step += 1
        progress.update()

        # What is due after it; the last step is always logged and kept
        last = step == settings.steps
        if last or step % config.log.every == 0:
            record = interval.record(step, averages)
            log.write(record)
            progress.set_postfix(loss=f"{record['loss']:.4f}", img_per_s=f"{record['images_per_second']:.0f}")
        if config.preview.every and (last or step % config.preview.every == 0) and accelerator.is_main_process:
            preview.save(session.ema.model, step)
        if last or step % config.log.checkpoint_every == 0:
            position = {"step": step, "images": step * settings.batch_size, "averages": averages.state()}
            checkpoints.save(accelerator, session.ema.model, position)
    progress.close()
    accelerator.end_training()


def train_micro_batch(session: Session, batch: dict[str, Tensor], averages: Averages) -> None:
    """Forward and backward pass of one micro-batch; the optimiser moves after the last one of a step."""
    accelerator = session.accelerator
    latents, labels, draws, targets = prepare_inputs(session, batch)
    with accelerator.accumulate(session.objective):
        losses = session.objective(latents, labels, draws, targets)
        accelerator.backward(losses["loss"])
        if accelerator.sync_gradients:
            limit = session.config.optimizer.clip_norm or float("inf")
            averages.add({"grad_norm": accelerator.clip_grad_norm_(session.objective.parameters(), limit)})
        session.optimizer.step()
        session.optimizer.zero_grad()
    averages.add(losses, 1 / session.config.training.accumulation)


def prepare_inputs(session: Session, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Draws, list[Tensor]]:
    """What the objective takes, on the device: normalised latents, labels, draws, and each teacher's tokens."""
    config, dataset, device = session.config, session.dataset, session.accelerator.device
    drawn = draw(batch["position"], dataset.latent_shape, config.flow, config.training.seed)
    draws = Draws(*(value.to(device, non_blocking=True) for value in vars(drawn).values()))
    moments = batch["moments"].to(device, non_blocking=True)
    latents = sample_posterior(moments, draws.posterior_noise, dataset.latents)
    labels = batch["label"].to(device, non_blocking=True)
    images = batch["image"].to(device, non_blocking=True) if session.teachers else None
    targets = [teacher.tokens(images, session.model.grid) for teacher in session.teachers]
    return latents, labels, draws, targets


def learning_rate(config: Config, step: int) -> float:
    """Rate of step 1, 2, …, N: a function of the step alone, so that nothing needs saving."""
    rates, steps = config.optimizer, config.training.steps
    warm = min(1.0, step / rates.warmup_steps) if rates.warmup_steps else 1.0
    remaining = (steps - step + 1) / steps if rates.schedule == "linear" else 1.0
    return rates.lr * min(warm, remaining)


class _Interval:
    """Time and data wait between two lines of the log."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.flops = training_flops(session.model, session.dataset.latent_shape)
        self._start()

    def _start(self) -> None:
        self.began, self.waited, self.fetches = time.perf_counter(), 0.0, 0

    def fetch(self, batches: Any) -> dict[str, Tensor]:
        """The next micro-batch, and a note of how long it took to come."""
        asked = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - asked
        self.fetches += 1
        return batch

    def record(self, step: int, averages: Averages) -> dict[str, Any]:
        """The line of `step`: means over the interval, speed, memory. All processes call it."""
        config, accelerator = self.session.config, self.session.accelerator
        means = averages.read(lambda values: accelerator.reduce(values, "mean"))  # waits for the device
        steps = self.fetches / config.training.accumulation
        seconds = (time.perf_counter() - self.began) / steps
        images_per_second = config.training.batch_size / seconds
        peak = peak_flops(accelerator.device, config.training.precision)
        mfu = images_per_second * self.flops / (peak * accelerator.num_processes) if peak else None
        images = step * config.training.batch_size
        record = {
            "step": step,
            "images": images,
            "epoch": images / len(self.session.dataset),
            **means,
            "lr": learning_rate(config, step),
            "images_per_second": images_per_second,
            "seconds_per_step": seconds,
            "data_wait": self.waited / steps,
            "mfu": mfu,
            "memory_gib": peak_memory_gib(accelerator.device),
        }
        self._start()
        return record


def _restore(session: Session, checkpoints: Checkpoints, averages: Averages) -> int:
    """Go back to the newest checkpoint, if there is one; returns the number of steps done."""
    latest = checkpoints.latest
    if latest is None:
        return 0
    position = checkpoints.restore(session.accelerator, session.ema.model, latest)
    averages.restore(position["averages"], session.accelerator.device)
    logger.info("Continuing %s from step %d.", checkpoints.directory.parent, position["step"])
    return position["step"]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys with values that every tracker takes."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
