"""Build a run's model and teachers from a configuration; conflicts are reported before training starts."""

import importlib.util
import os
from dataclasses import asdict, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sit_atconv.alignment import LATENTS, CachedTeacher, LatentTeacher, Teacher, find_tokens
from sit_atconv.config import AlignmentConfig, Config, FlowConfig, TeacherConfig
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
    _require_latents_alone(config)
    _require_regularisers(config, len(model.blocks))
    return model


def _require_latents_alone(config: Config) -> None:
    """Raise `InputError` for options of other teachers beside the latents, for which they would do nothing."""
    alignment = config.alignment
    taught = [teacher for teacher in alignment.teachers if teacher.name == LATENTS] if alignment else []
    usual = TeacherConfig()
    if any(teacher != replace(usual, name=LATENTS) for teacher in taught):
        raise InputError(
            "weights and cached would do nothing for the teacher latents, which is no network: leave them out."
        )
    if len(taught) > 1:
        raise InputError("alignment.teachers names latents twice: once is enough.")
    if taught and len(alignment.teachers) == 1:
        usual = AlignmentConfig()
        given = [key for key in ("variant", "projector_width") if getattr(alignment, key) != getattr(usual, key)]
        if given:
            raise InputError(
                f"alignment.{given[0]} would do nothing: the teacher latents has a projector of its own, five layers "
                "as wide as the model. Leave it out."
            )


def _require_regularisers(config: Config, depth: int) -> None:
    """Raise `InputError` for options of Internal Guidance and of the dispersive loss that would do nothing."""
    flow, usual = config.flow, FlowConfig()
    if config.model.internal_block is None and flow.internal_weight != usual.internal_weight:
        raise InputError(
            "flow.internal_weight would do nothing: there is no second head. Set model.internal_block to the block "
            "after which it predicts, or leave the weight out."
        )
    if flow.dispersion is None:
        keys = ("dispersion_block", "dispersion_tau", "dispersion_group")
        if given := [key for key in keys if getattr(flow, key) != getattr(usual, key)]:
            raise InputError(f"flow.{given[0]} would do nothing: set flow.dispersion, the weight of the loss, as well.")
    elif (flow.dispersion_block or 1) > depth:
        raise InputError(
            f"flow.dispersion_block is {flow.dispersion_block}, but the model has {depth} blocks: choose one of them, "
            "counted from 1."
        )


def require_groups(config: Config, processes: int) -> None:
    """Raise `InputError` unless every process's micro-batch divides into groups for the dispersive loss."""
    group, settings = config.flow.dispersion_group, config.training
    micro_batch = settings.batch_size // (settings.accumulation * processes)
    if config.flow.dispersion is not None and (group < 2 or micro_batch % group):
        raise InputError(
            f"flow.dispersion compares groups of {group} samples, into which the {micro_batch} of a micro-batch "
            f"(training.batch_size {settings.batch_size}, accumulation {settings.accumulation}, processes {processes}) "
            "do not divide: set flow.dispersion_group to a divisor of it, 2 at least, and the same in runs to compare."
        )


def require_undamaged(dataset: LatentDataset, accelerator: Accelerator) -> None:
    """Compare the data's files with their digests; the processes of a machine divide the files. All processes call it.

    Raises `InputError` on all processes when a file differs.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every machine checks all files: it may have its own copy
    faults = gather_object(dataset.damaged(accelerator.local_process_index % local, local))
    refuse_damaged(faults, " (--data.verify false would train on what is there)")


def build_teachers(
    config: Config, dataset: LatentDataset, model: SiT, device: torch.device
) -> list[Teacher | CachedTeacher | LatentTeacher]:
    """The alignment's frozen teachers, or their tokens cached in the data; an empty list without alignment.

    Raises `InputError` when a teacher cannot be loaded, or the data do not hold its cached tokens.
    """

    def build(teacher: TeacherConfig) -> Teacher | CachedTeacher | LatentTeacher:
        if teacher.name == LATENTS:
            return LatentTeacher(model.patch_size, model.in_channels)
        if not teacher.cached:
            return Teacher(teacher.name, teacher.weights, device)
        number = find_tokens(teacher.name, teacher.weights, dataset.teachers, config.data.path)
        return CachedTeacher(dataset.teachers[number], number)

    return [build(teacher) for teacher in config.alignment.teachers] if config.alignment else []
