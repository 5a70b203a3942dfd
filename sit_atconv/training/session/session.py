"""Everything that a run needs, built and checked before the first step and before anything is written."""

import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import AdamW
from torch.utils.data import DataLoader

from sit_atconv.alignment import CachedTeacher, LatentTeacher, Teacher
from sit_atconv.config import Config, Settings
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.sampler import index_at, training_loader
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.runtime.cpu import keep_freed_memory
from sit_atconv.runtime.processes import WAIT_FOR_WORK
from sit_atconv.runtime.reading import read_json
from sit_atconv.training.averages.ema import WeightAverages, profiles
from sit_atconv.training.run.stop import follow_trainer
from sit_atconv.training.session.build import (
    build_model,
    build_teachers,
    require_groups,
    require_trackers,
    require_undamaged,
)
from sit_atconv.training.session.finetune import begin_with
from sit_atconv.training.session.heldout import require_measurable, require_measure, split_data
from sit_atconv.training.session.launcher import require_launcher_of
from sit_atconv.training.session.meanflow import require_mean_flow
from sit_atconv.training.session.objective import Objective, draw_fields
from sit_atconv.training.session.optimizer import Muon, build_optimizer
from sit_atconv.training.session.projectors import begin_projectors
from sit_atconv.training.session.trained import Trained
from sit_atconv.training.session.zero import asked_for_zero, begin_moments, configure_zero, uses_zero


@dataclass
class Session(Trained):
    """The training of a SiT: `dataset` is what is trained on, `heldout` what is held out, if anything."""

    weights_name = SAFETENSORS_WEIGHTS_NAME
    config: Config
    model: SiT
    bare: Objective
    adam: AdamW | Muon
    dataset: LatentDataset
    teachers: list[Teacher | CachedTeacher | LatentTeacher]
    heldout: LatentDataset | None = None

    def loader(self, start_step: int) -> DataLoader:
        loader = training_loader(
            self.dataset,
            batch_size=self.config.training.batch_size,
            micro_batches=self.config.training.accumulation,
            seed=self.config.training.seed,
            start_step=start_step,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=self.config.data.workers,
            flip=self.config.data.flip,
            images=any(isinstance(teacher, Teacher) for teacher in self.teachers),
            teachers=[teacher.number for teacher in self.teachers if isinstance(teacher, CachedTeacher)],
            taught_steps=self.config.alignment.stop_after if self.config.alignment else None,
            pin_memory=self.accelerator.device.type == "cuda",
            extras=partial(
                draw_fields,
                shape=self.dataset.latent_shape,
                config=self.config.flow,
                seed=self.config.training.seed,
            ),
        )
        loader.worker_init_fn = follow_trainer
        return loader

    @property
    def data(self) -> str:
        """Including cached tokens."""
        return self.dataset.fingerprint([t.number for t in self.teachers if isinstance(t, CachedTeacher)])

    def taught(self, batch: dict[str, Tensor]) -> bool:
        """Whether this micro-batch is aligned with teachers, who stop after `stop_after` steps."""
        if not self.teachers:
            return False
        last = self.config.alignment.stop_after
        return last is None or int(batch["position"][0]) < last * self.config.training.batch_size

    def epochs(self, step: int) -> float:
        """Mirrored images are the same, held-out ones no part."""
        return step * self.config.training.batch_size / len(self.dataset)

    def batch_indices(self, step: int) -> list[int]:
        settings = self.config.training
        positions = range((step - 1) * settings.batch_size, step * settings.batch_size)
        return [self.dataset.row(index_at(position, len(self.dataset), settings.seed)) for position in positions]

    def save_config(self, folder: Path) -> None:
        self.model.save_config(folder)

    def restore_config(self, folder: Path) -> None:
        learned = read_json(folder / "config.json", Learned)
        for model in (self.model, self.averages.twin):
            model.register_to_config(**{key: value for key, value in asdict(learned).items() if value is not None})


@dataclass(frozen=True)
class Learned:
    """What config.json says of classes and null class, which a fine-tuned model owes to the one it began with."""

    label_dropout: float | None = None
    empty_classes: list[int] | None = None


def build_session(config: Config, run: Path) -> Session:
    """Open data and teachers, build the model, hand it to Accelerate; raises `InputError` where they do not agree."""
    require_trackers(config.log.trackers)
    require_measure(config)
    accelerator = build_accelerator(config, run)
    require_groups(config, accelerator.num_processes)
    require_mean_flow(config, accelerator)
    device = accelerator.device
    live = config.alignment is not None and any(teacher.live for teacher in config.alignment.teachers)
    dataset, heldout = split_data(config, open_dataset(config.data.path, images=live))

    # Initial weights are drawn on the CPU, so they are the same on every process and device.
    torch.manual_seed(config.training.seed)
    model = build_model(config, dataset)
    if heldout is not None:
        require_measurable(model, heldout, f"data.heldout {config.data.heldout}", dataset.num_classes)
    begun = any((run / "checkpoints").glob("step-*"))  # then a checkpoint has the weights, and init_from need not exist
    if config.model.init_from is not None and not begun:
        begin_with(model, config.model.init_from)
    teachers = build_teachers(config, dataset, model, device)
    if config.data.verify:
        for each in (dataset, heldout) if isinstance(config.data.heldout, str) else (dataset,):
            require_undamaged(each, accelerator)
    bare = Objective(model, config.flow, config.alignment, tuple(teacher.dim for teacher in teachers)).to(device)
    if config.model.init_from is not None and config.alignment and not begun:
        begin_projectors(bare.projectors, config.alignment, config.model.init_from)
    twin = copy.deepcopy(model)  # for sampling from the averaged weights: never compiled, wrapped or sharded
    model.recompute(config.training.gradient_checkpointing)
    if config.training.compile:
        model.compile_repeated_blocks()

    adam = build_optimizer(config.optimizer, bare)
    if uses_zero(accelerator) and config.training.precision == "bf16":  # without DeepSpeed, Accelerate does this
        bare.forward = torch.autocast(device.type, torch.bfloat16)(bare.forward)
    objective, optimizer = accelerator.prepare(bare, adam)
    if uses_zero(accelerator):
        begin_moments(adam, bare.parameters())
    averages = WeightAverages(model, twin, profiles(config.training))
    return Session(config, accelerator, model, bare, objective, adam, optimizer, averages, dataset, teachers, heldout)


def build_accelerator(config: Settings, run: Path) -> Accelerator:
    """The Accelerator, with processes from the launcher and precision from the configuration.

    Raises `InputError` for a precision that the device or the kind of sharding does not support.
    """
    require_launcher_of(config)
    cpu = not torch.accelerator.is_available()
    if config.training.precision == "fp16" and cpu:
        raise InputError("training.precision fp16 needs a GPU: take bf16 or no on a CPU.")
    if cpu:
        keep_freed_memory()
    zero = asked_for_zero()
    # Every step uses the same parameters in the same order. (A static graph and accumulation exclude each other.)
    handlers = [DistributedDataParallelKwargs(static_graph=config.training.accumulation == 1)]
    group = {"backend": "gloo"} if zero and cpu else {}
    handlers.append(InitProcessGroupKwargs(timeout=WAIT_FOR_WORK, **group))
    accelerator = Accelerator(
        cpu=cpu and not zero,  # needed for several CPU processes to find one another, but it would disable DeepSpeed
        mixed_precision="no" if zero else config.training.precision,  # DeepSpeed would round the weights as well
        # A launcher for DeepSpeed passes its own number of micro-batches, which overrides a plain number here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.training.accumulation),
        log_with=list(config.log.trackers) or None,
        project_dir=run,
        kwargs_handlers=handlers,
    )
    if uses_zero(accelerator):
        configure_zero(accelerator, config)
    if accelerator.distributed_type == DistributedType.FSDP:
        if config.training.precision == "fp16":
            raise InputError("fp16 with weights split among processes is not supported: take training.precision bf16.")
        # Weights are communicated in fp32 and autocast sets the precision of each operation, as without sharding.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator
