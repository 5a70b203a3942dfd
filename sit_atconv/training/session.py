"""Everything a run works with, built whole and checked before the first step and before anything is written."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sit_atconv.alignment.teacher import Teacher
from sit_atconv.config import Config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.sampler import training_loader
from sit_atconv.models import SiT
from sit_atconv.training.build import build_model, build_teachers, require_trackers
from sit_atconv.training.ema import Ema
from sit_atconv.training.objective import Objective


@dataclass
class Session:
    """`model` is the bare network inside `objective`, which Accelerate has prepared, as it has the optimiser."""

    config: Config
    accelerator: Accelerator
    dataset: LatentDataset
    model: SiT
    objective: nn.Module
    optimizer: Optimizer
    ema: Ema
    teachers: list[Teacher]

    def loader(self, start_step: int) -> DataLoader:
        """Micro-batches of this process from `start_step` on. Raises `InputError` when the batch does not divide."""
        return training_loader(
            self.dataset,
            batch_size=self.config.training.batch_size,
            micro_batches=self.config.training.accumulation,
            seed=self.config.training.seed,
            start_step=start_step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=self.config.data.workers,
            flip=self.config.data.flip,
            images=bool(self.teachers),
            pin_memory=self.accelerator.device.type == "cuda",
        )


def build_session(config: Config, run: Path) -> Session:
    """Open data and teachers, build the model, hand it to Accelerate; raises `InputError` where they do not agree."""
    require_trackers(config.log.trackers)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # without it, several CPU processes would not know of one another
        mixed_precision=config.training.precision,
        gradient_accumulation_steps=config.training.accumulation,
        log_with=list(config.log.trackers) or None,
        project_dir=run,
    )
    device = accelerator.device
    dataset = open_dataset(config.data.path, images=config.alignment is not None)

    # Initial weights are drawn on the CPU: the same ones on every process and device.
    torch.manual_seed(config.training.seed)
    model = build_model(config, dataset)
    teachers = build_teachers(config, device)
    objective = Objective(model, config.flow, config.alignment, tuple(teacher.dim for teacher in teachers)).to(device)
    ema = Ema(model, config.training.ema_decay)
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.training.compile:
        model.compile_repeated_blocks()

    adam = config.optimizer
    optimizer = torch.optim.AdamW(
        objective.parameters(), adam.lr, tuple(adam.betas), adam.eps, adam.weight_decay, fused=True
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    return Session(config, accelerator, dataset, model, objective, optimizer, ema, teachers)
