"""Everything that the training of an image network needs, built and checked before anything is written."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sit_atconv.config import ImageConfig, ImageOptimizerConfig, NetworkConfig
from sit_atconv.data.sampler import PositionSampler, position_loader
from sit_atconv.errors import InputError
from sit_atconv.models.mixers import import_plugins
from sit_atconv.training.averages.ema import ConstantDecay, WeightAverages
from sit_atconv.training.run.stop import follow_trainer
from sit_atconv.training.session.build import require_trackers
from sit_atconv.training.session.session import build_accelerator
from sit_atconv.training.session.trained import Trained
from sit_atconv.zoo.train.augmentation import Augmented, Mixing, require_even, training_transform
from sit_atconv.zoo.validate.loading import (
    WEIGHTS,
    Description,
    create_network,
    describe,
    load_weights,
    read_state,
    require_size,
)
from sit_atconv.zoo.validate.pictures import Pictures, open_pictures
from sit_atconv.zoo.validate.scoring import View, view_of


class Classification(nn.Module):
    """Images (b, 3, H, W) and probabilities (b, classes) -> {"loss": soft-target cross entropy}, in fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self._loss = model, SoftTargetCrossEntropy()

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": self._loss(self.model(images).float(), targets)}


@dataclass
class ImageSession(Trained):
    """The training of an image network on `pictures`; `heldout` is what it is measured on, if anything."""

    weights_name = WEIGHTS
    config: ImageConfig
    pictures: Pictures
    heldout: Pictures | None
    view: View
    mixing: Mixing
    schedule: CosineLRScheduler | None

    def loader(self, start_step: int) -> DataLoader:
        config, accelerator = self.config, self.accelerator
        training = config.training
        rank, processes = accelerator.process_index, accelerator.num_processes
        sampler = PositionSampler(start_step, training.batch_size, training.accumulation, rank, processes)
        require_even(config.augmentation, training.batch_size // (training.accumulation * processes))
        loader = position_loader(self.augmented, sampler, config.data.workers, accelerator.device.type == "cuda")
        loader.worker_init_fn = follow_trainer
        return loader

    @property
    def augmented(self) -> Augmented:
        """The pictures as training sees them."""
        settings = self.config.augmentation
        transform = training_transform(settings, self.view)
        return Augmented(self.pictures, transform, self.config.training.seed, settings.repeats)

    @property
    def data(self) -> str:
        return self.pictures.fingerprint

    def epochs(self, step: int) -> float:
        """An image that is repeated counts each time, as in the papers."""
        return step * self.config.training.batch_size / len(self.pictures)

    def batch_indices(self, step: int) -> list[int]:
        size, augmented = self.config.training.batch_size, self.augmented
        return [int(self.pictures.rows[augmented.index(p)]) for p in range((step - 1) * size, step * size)]

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 1, 2, …; the schedule counts the steps before it."""
        rates = self.config.optimizer
        if self.schedule is not None:
            self.schedule.step_update(step - 1)
            return self.adam.param_groups[0]["lr"]
        warm = min((step - 1) / rates.warmup_steps, 1.0) if rates.warmup_steps else 1.0
        return rates.warmup_lr + warm * (rates.lr - rates.warmup_lr)

    def save_config(self, folder: Path) -> None:
        view, model = self.view, self.config.model
        size = (3, view.image_size, view.image_size)
        shown = {key: getattr(view, key) for key in ("interpolation", "crop_pct", "mean", "std")}
        cfg = {**self.model.pretrained_cfg, "input_size": size, "num_classes": self.pictures.num_classes, **shown}
        kept = {key: value for key, value in cfg.items() if isinstance(value, str | int | float | tuple | list)}
        names = self.pictures.class_names
        describe(folder, Description(model.name, self.pictures.num_classes, options_of(model), kept, names))


def build_session(config: ImageConfig, run: Path) -> ImageSession:
    """Open the pictures, build the network, hand it to Accelerate; raises `InputError` where they do not agree."""
    require_trackers(config.log.trackers)
    accelerator = build_accelerator(config, run)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            "Image networks fit onto one GPU and are not split among several: launch without FSDP and DeepSpeed, as "
            "with configs/accelerate/ddp.yaml."
        )
    pictures, heldout = open_data(config)
    torch.manual_seed(config.training.seed % 2**63)  # weights are drawn on the CPU, the same on all devices
    model = _network(config, pictures, begun=any((run / "checkpoints").glob("step-*")))
    view = _view(model, config)
    bare = Classification(model).to(accelerator.device)
    twin = copy.deepcopy(model)
    if config.training.gradient_checkpointing:
        _recompute(model, config.model.name)
    if config.training.compile:
        model.compile()
    adam = _optimizer(config.optimizer, model)
    objective, optimizer = accelerator.prepare(bare, adam)
    if accelerator.num_processes > 1:
        objective.broadcast_buffers = False  # all have the same (`take_step`), and a process that leaves may hang in it
    averages = WeightAverages(model, twin, [ConstantDecay(config.training.ema_decay)])
    trained = (config, accelerator, model, bare, objective, adam, optimizer, averages)
    mixing = Mixing(config.augmentation, pictures.num_classes, config.training.seed)
    return ImageSession(*trained, pictures, heldout, view, mixing, _cosine(config, adam))


def options_of(settings: NetworkConfig) -> dict[str, Any]:
    """The arguments of a network, but for the number of classes."""
    drop_path = {} if settings.drop_path_rate is None else {"drop_path_rate": settings.drop_path_rate}
    return {**settings.options, **drop_path}


def open_data(config: ImageConfig) -> tuple[Pictures, Pictures | None]:
    """The pictures to train on, and those to measure on. Raises `InputError` where their classes differ."""
    pictures, heldout = open_pictures(config.data.path), config.data.heldout
    if isinstance(heldout, float):
        pictures, measured = pictures.split(heldout)
    else:
        measured = None if heldout is None else open_pictures(heldout)
    if measured is not None and (measured.num_classes, measured.class_names) != (
        pictures.num_classes,
        pictures.class_names,
    ):
        raise InputError(
            f"{config.data.path} has {pictures.num_classes} classes, {heldout} has {measured.num_classes}"
            f"{'' if measured.num_classes != pictures.num_classes else ' with other names'}: validation needs "
            "data.heldout with the classes that are trained on, under the same names."
        )
    if config.training.batch_size > len(pictures):
        raise InputError(
            f"A batch of {config.training.batch_size} is more than the {len(pictures)} pictures to train on: set "
            "training.batch_size to fewer."
        )
    return pictures, measured


def _network(config: ImageConfig, pictures: Pictures, begun: bool) -> nn.Module:
    """The network; a run that has `begun` has its weights in its checkpoints, and init_from need not exist."""
    import_plugins(config.model.plugins)
    if given := {"num_classes", "pretrained", "checkpoint_path"} & config.model.options.keys():
        raise InputError(
            f"model.options has {min(given)}: leave it out. Classes are those of the data, and weights to begin with "
            "are given as a file, by model.init_from."
        )
    model = create_network(config.model.name, pictures.num_classes, options_of(config.model))
    if config.model.init_from is not None and not begun:
        path = Path(config.model.init_from)
        load_weights(model, read_state(model, path), path, classifier_may_differ=True)
    require_size(model.eval(), config.data.image_size, config.model.name)
    return model.train()


def _recompute(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError):  # as timm's networks say that they cannot
        raise InputError(f"{name} cannot recompute blocks: set training.gradient_checkpointing to false.") from None


def _view(model: nn.Module, config: ImageConfig) -> View:
    data = config.data
    keys = ("image_size", "interpolation", "crop_pct", "mean", "std")
    return view_of(model, **{key: getattr(data, key) for key in keys})


def _optimizer(settings: ImageOptimizerConfig, model: nn.Module) -> Optimizer:
    """timm's groups with and without decay; fused, since only such optimizers can skip a step on the device."""
    if settings.name == "adamw":
        own, options = "adamw", {"betas": tuple(settings.betas), "eps": settings.eps}
    else:
        own, options = "momentum", {"momentum": settings.momentum}  # timm's "sgd" is Nesterov's
    optimizer = create_optimizer_v2(
        model, own, lr=settings.lr, weight_decay=settings.weight_decay, fused=True, **options
    )
    if settings.name == "sgd":
        # What torch begins with is the same, but if it skips its first step it leaves them undefined
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _cosine(config: ImageConfig, optimizer: Optimizer) -> CosineLRScheduler | None:
    rates = config.optimizer
    if rates.schedule == "constant":
        return None
    return CosineLRScheduler(
        optimizer,
        t_initial=config.training.steps,
        lr_min=rates.min_lr,
        warmup_t=rates.warmup_steps,
        warmup_lr_init=rates.warmup_lr,
        t_in_epochs=False,
    )
