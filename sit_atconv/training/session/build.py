"""Build a run's model and teachers from a configuration; conflicts are reported before training starts."""

import importlib.util
import os
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sit_atconv.alignment import CachedTeacher, Teacher, find_tokens
from sit_atconv.config import Config, TeacherConfig
from sit_atconv.data.latents import LatentDataset, refuse_damaged
from sit_atconv.errors import InputError
from sit_atconv.models import SiT, create_model
from sit_atconv.models.mixers import import_plugins
from sit_atconv.training.session.meanflow import make_flow_map, require_trainable


def require_trackers(names: list[str]) -> None:
    """Raise `InputError` when a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log.trackers asks for {name}, which is not installed: pip install {name}.")


def build_model(config: Config, dataset: LatentDataset) -> SiT:
    """The model, with the data's latent size. Raises `InputError` when the data have more classes than the model."""
    options = {name: value for name, value in asdict(config.model).items() if value is not None}
    options.pop("init_from", None)  # used by begin_with
    import_plugins(options.pop("plugins"))
    name, wanted = options.pop("name"), options.pop("num_classes", None)
    if wanted and dataset.num_classes > wanted:
        raise InputError(
            f"{config.data.path} has {dataset.num_classes} classes, the model {wanted}: set model.num_classes to "
            f"{dataset.num_classes} or more, or to null to take it from the data."
        )
    num_classes = dataset.num_classes if wanted is None else wanted
    if num_classes and not dataset.num_classes:
        raise InputError(f"{config.data.path} has no labels: a model with {num_classes} classes cannot learn from it.")
    channels, height, width = dataset.latent_shape
    model = create_model(
        name,
        input_size=(height, width),
        in_channels=channels,
        num_classes=num_classes,
        interpolant=config.flow.interpolant,
        prediction=config.flow.prediction,
        latents=dataset.latents.to_dict(),
        class_names=dataset.class_names if num_classes else None,
        label_dropout=config.flow.label_dropout,
        empty_classes=[*dataset.empty_classes, *range(dataset.num_classes, num_classes)] if num_classes else None,
        **options,
    )
    if config.flow.objective == "meanflow":
        make_flow_map(model, config.flow.meanflow)
        require_trainable(model, config.flow)
    if config.alignment and config.alignment.block > len(model.blocks):
        raise InputError(
            f"alignment.block is {config.alignment.block}, but {name} has {len(model.blocks)} blocks: "
            "choose one of them, counted from 1."
        )
    return model


def require_undamaged(dataset: LatentDataset, accelerator: Accelerator) -> None:
    """Compare the data's files with their digests; the processes of a machine divide the files. All processes call it.

    Raises `InputError` on all processes when a file differs.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every machine checks all files: it may have its own copy
    faults = gather_object(dataset.damaged(accelerator.local_process_index % local, local))
    refuse_damaged(faults, " (--data.verify false would train on what is there)")


def build_teachers(config: Config, dataset: LatentDataset, device: torch.device) -> list[Teacher | CachedTeacher]:
    """The alignment's frozen teachers, or their tokens cached in the data; an empty list without alignment.

    Raises `InputError` when a teacher cannot be loaded, or the data do not hold its cached tokens.
    """

    def build(teacher: TeacherConfig) -> Teacher | CachedTeacher:
        if not teacher.cached:
            return Teacher(teacher.name, teacher.weights, device)
        number = find_tokens(teacher.name, teacher.weights, dataset.teachers, config.data.path)
        return CachedTeacher(dataset.teachers[number], number)

    return [build(teacher) for teacher in config.alignment.teachers] if config.alignment else []
