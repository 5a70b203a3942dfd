"""The loop that fits new mixers. All randomness is keyed by (seed, position): a resumed fit equals an unbroken one."""

import contextlib
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm

from sit_atconv.autoencoder import sample_posterior
from sit_atconv.config import FlowConfig
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.sampler import training_loader
from sit_atconv.flow import create_interpolant, drop_labels
from sit_atconv.graft.directory import GraftDirectory
from sit_atconv.graft.network import Graft, relative_error
from sit_atconv.graft.settings import GraftSettings
from sit_atconv.models import SiT
from sit_atconv.runtime.lock import Place
from sit_atconv.sampling.encoded import labels_for
from sit_atconv.training.run.log import RunLog
from sit_atconv.training.run.stop import TrainingStopped, ended, follow_trainer
from sit_atconv.training.session.objective import draw_fields

_LINES = 100  # of the log, each with the state written
_CLIP_NORM = 10.0  # of the gradient of one block's mixer


class Fitting:
    """A fit in the directory OUT.

    Args:
        graft: the old network and the new mixers, whose modules stand in `model`, too.
        model: the new network.
        dataset: latents of the model's kind and size.
        settings: of the fit.
        accelerator: the processes, which divide each batch.
        out: where the state is kept.
        workers: loader processes for each process.

    Raises:
        InputError: when the processes do not divide the batch.
    """

    def __init__(
        self,
        graft: Graft,
        model: SiT,
        dataset: LatentDataset,
        settings: GraftSettings,
        accelerator: Accelerator,
        out: GraftDirectory,
        workers: int,
    ) -> None:
        self.model, self.dataset, self.settings, self.accelerator, self.out = model, dataset, settings, accelerator, out
        self.mixers, self._workers = graft.mixers, workers
        self.interpolant = create_interpolant(model.config.interpolant)
        self.adam = AdamW(graft.mixers.parameters(), settings.lr, weight_decay=0.0, fused=True)
        self.graft, self.optimizer = accelerator.prepare(graft, self.adam)
        self._loader(0)  # raises before anything is written

    def run(self) -> tuple[list[float], float]:
        """Fit, from where the directory's state is.

        Returns the relative error of each new mixer and that of the new network's velocity, on a new batch.
        """
        settings, main = self.settings, self.accelerator.is_main_process
        step = self.out.restore(self.mixers, self.adam)
        log = RunLog(self.out.log, self.accelerator)
        log.rewind(step)
        place = Place(self.out.path, "grafting", "OUT") if main else None
        every = -(-settings.steps // _LINES)
        batches = iter(self._loader(step))
        bar = tqdm(initial=step, total=settings.steps, unit="step", desc="grafting", disable=not main)
        with bar as progress, ended(batches):
            losses, squares = 0, 0
            while step < settings.steps:
                step += 1
                found = self.step(step, next(batches))
                losses, squares = losses + found[0], squares + found[1]
                progress.update()
                if step % every == 0 or step == settings.steps:
                    if place is not None and not place.is_there:
                        raise TrainingStopped(place.gone)
                    count = (step - 1) % every + 1
                    errors = self.write_line(log, step, losses / count, squares)
                    progress.set_postfix(largest_error=f"{max(errors):.3g}", refresh=False)
                    losses, squares = 0, 0
            return self.measure(next(batches))

    def step(self, step: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the losses (K,) and squares (K, 2) of this process, before it."""
        for group in self.adam.param_groups:
            group["lr"] = self.settings.learning_rate(step)
        losses, squares = self.graft(*self.noised(batch))
        self.accelerator.backward(losses.sum())  # each block has the gradient of its own loss
        for mixer in self.mixers.values():
            clip_grad_norm_(mixer.parameters(), _CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach(), squares

    def noised(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """x_t (b, C, h, w), t (b,) and labels (b,) or None, which are dropped as in training."""
        config, device = self.model.config, self.accelerator.device
        moments, posterior, noise, t, dropout = (
            batch[name].to(device, non_blocking=True)
            for name in ("moments", "posterior_noise", "noise", "times", "dropout")
        )
        latents = sample_posterior(moments, posterior, self.dataset.latents)
        y = labels_for(self.model, self.dataset, batch["label"], batch["index"].tolist())
        if y is not None:
            y = drop_labels(y.to(device), dropout, config.label_dropout, config.num_classes)
        return self.interpolant.interpolate(latents, noise, t), t, y

    def write_line(self, log: RunLog, step: int, losses: Tensor, squares: Tensor) -> list[float]:
        """Write a line of the log and the state, and return the relative errors since the last line.

        Raises `TrainingStopped` when a loss was not finite: the state is from before that.
        """
        means, squares = self.accelerator.reduce(losses, "mean"), self.accelerator.reduce(squares, "sum")
        if not means.isfinite().all():
            text = (
                f"A loss was not finite between the last line of {self.out.log} and step {step}. Grafting stopped; the "
                "state is from before that. Give another OUT and a lower --lr, or --precision no."
            )
            raise TrainingStopped(text if self.accelerator.is_main_process else 1)
        errors = relative_error(squares).tolist()
        record = {"step": step, "images": step * self.settings.batch_size, "lr": self.settings.learning_rate(step)}
        for block, loss, error in zip(self.mixers, means.tolist(), errors, strict=True):
            record |= {f"loss_block_{block}": loss, f"error_block_{block}": error}
        log.write(record)
        if self.accelerator.is_main_process:
            self.out.save(step, self.mixers, self.adam)
        return errors

    @torch.no_grad()
    def measure(self, batch: dict[str, Tensor]) -> tuple[list[float], float]:
        """The relative error of each new mixer, and of the new network's velocity, on a batch."""
        x, t, y = self.noised(batch)
        teacher, model = self.accelerator.unwrap_model(self.graft).teacher, self.model.to(self.accelerator.device)
        with self._autocast():
            squares = self.graft(x, t, y)[1]
            wanted, found = (network(x, t, y).float() for network in (teacher, model))
        velocity = torch.stack([(found - wanted).square().sum(), wanted.square().sum()])
        *errors, error = relative_error(self.accelerator.reduce(torch.vstack([squares, velocity]), "sum")).tolist()
        return errors, error

    def _autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast() if self.settings.precision == "bf16" else contextlib.nullcontext()

    def _loader(self, start_step: int) -> DataLoader:
        """Batches of this process from `start_step` on, with the draws of training."""
        config = self.model.config
        flow = FlowConfig(interpolant=config.interpolant, prediction=config.prediction)
        loader = training_loader(
            self.dataset,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            start_step=start_step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=self._workers,
            pin_memory=self.accelerator.device.type == "cuda",
            extras=partial(draw_fields, shape=self.dataset.latent_shape, config=flow, seed=self.settings.seed),
        )
        loader.worker_init_fn = follow_trainer
        return loader
