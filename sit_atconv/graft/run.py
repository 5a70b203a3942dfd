"""The work of `python -m sit_atconv.graft`: new mixers for a checkpoint, fitted to the old ones, in a directory."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env

from sit_atconv.config import load_config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.latents import LatentDataset
from sit_atconv.errors import InputError
from sit_atconv.graft.directory import GraftDirectory
from sit_atconv.graft.fitting import Fitting
from sit_atconv.graft.network import Graft, changed_blocks, with_new_mixers
from sit_atconv.graft.settings import GraftSettings
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import find_weights, load_model, model_directory
from sit_atconv.models.mixers.pattern import QUERY_OPTIONS, Pattern, expand_pattern
from sit_atconv.runtime.cpu import keep_freed_memory
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.launcher import Setting, require_same_from_launcher
from sit_atconv.runtime.lock import locked
from sit_atconv.runtime.processes import WAIT_FOR_WORK
from sit_atconv.runtime.whole_files import followed
from sit_atconv.sampling.draw import latent_shape
from sit_atconv.training.session.build import require_undamaged
from sit_atconv.training.session.heldout import require_measurable

log = logging.getLogger(__name__)


def graft_to_directory(
    checkpoint: Path,
    out: Path,
    data: str,
    pattern: Pattern | None,
    settings: GraftSettings,
    *,
    weights: str | None = None,
    workers: int = 0,
) -> None:
    """Fit new mixers for the model at `checkpoint` into the directory `out`; the same call continues.

    Blocks whose mixer is the same in `pattern` keep their weights. `pattern` None fits a new mixer of the same kind in
    each block, from new weights. `weights` are those of `find_weights`.

    Raises `InputError` for a checkpoint, pattern, data or directory that cannot be used, before anything is written.
    """
    accelerator = _accelerator(settings)
    checkpoint = followed(checkpoint).resolve()  # a training run moves its link "latest"
    chosen, teacher = find_weights(checkpoint, weights), load_model(checkpoint, weights).float()
    old = teacher.config.mixer_pattern
    blocks = range(1, len(teacher.blocks) + 1) if pattern is None else changed_blocks(teacher, pattern)
    model = with_new_mixers(teacher, old if pattern is None else pattern, blocks, settings.seed, fresh=pattern is None)
    dataset = open_dataset(data)
    _require_data_of(teacher, dataset, data)
    digests = {path.name: sha256_of_file(path) for path in chosen.files}
    described = {"mixer_pattern": model.config.mixer_pattern, "self": pattern is None, **asdict(settings)}
    basis = {"sha256": digests, "data": dataset.fingerprint(), **described}
    directory = GraftDirectory(out)
    directory.check(basis)
    require_undamaged(dataset, accelerator)

    graft = Graft(teacher, {block: model.blocks[block - 1].mixer for block in blocks}, settings.loss)
    fitting = Fitting(graft, model, dataset, settings, accelerator, directory, workers)
    with locked(out, accelerator, "grafted into", "OUT"):
        directory.check(basis)  # again: another program may have begun meanwhile
        accelerator.wait_for_everyone()
        if directory.complete:
            log.info("%s is complete already.", out)
            return
        if accelerator.is_main_process:
            directory.begin(basis)
        accelerator.wait_for_everyone()
        errors, velocity = fitting.run()
        if accelerator.is_main_process:
            directory.finish(model.cpu(), checkpoint)
            _report(teacher, model, dict(zip(blocks, errors, strict=True)), velocity)
            log.info("%s", next_command(checkpoint, out, data, model.config.mixer_pattern))


def _require_data_of(model: SiT, dataset: LatentDataset, data: str) -> None:
    """Raise `InputError` unless the data have the latents, the size and the classes that the model was trained with."""
    ours, theirs = latent_shape(model)[1:], dataset.latent_shape[1:]
    if ours != theirs:
        raise InputError(
            f"{data} has latents of {theirs[0]}x{theirs[1]}, the network was trained on {ours[0]}x{ours[1]}: prepare "
            "the data at its resolution, since mixers are fitted at that size."
        )
    require_measurable(model, dataset, data)


def _accelerator(settings: GraftSettings) -> Accelerator:
    """The processes. Raises `InputError` for a launcher that splits the network, or asks for another precision."""
    require_same_from_launcher(Setting("mixed_precision", "no", "precision", settings.precision))
    if parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "The launcher asks for FSDP or DeepSpeed, and grafting needs the whole network in every process: launch "
            "with --multi_gpu, or run plain python. (Training with init_from afterwards may use both.)"
        )
    cpu = not torch.accelerator.is_available()
    if cpu:
        keep_freed_memory()
    handlers = [DistributedDataParallelKwargs(static_graph=True), InitProcessGroupKwargs(timeout=WAIT_FOR_WORK)]
    return Accelerator(
        cpu=cpu,
        mixed_precision=settings.precision,
        dynamo_backend="no",
        kwargs_handlers=handlers,
    )


def _report(teacher: SiT, model: SiT, errors: dict[int, float], velocity: float) -> None:
    """Log a table of the fitted blocks, and how far the velocity of the whole network is from the old one."""
    depth = len(model.blocks)
    old, new = (expand_pattern(each.config.mixer_pattern, depth) for each in (teacher, model))
    rows = [("block", "old mixer", "new mixer", "relative error")]
    rows += [(str(b), str(old[b - 1]), str(new[b - 1]), f"{error:.4g}") for b, error in errors.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        log.info("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    log.info("All together: the relative error of the network's output is %.4g.", velocity)


def next_command(checkpoint: Path, out: Path, data: str, pattern: Any) -> str:
    """What to do next, with the configuration of the run that the checkpoint is from, if it is from one."""
    config = model_directory(checkpoint).parent.parent.parent / "config.yaml"
    known, off = "CONFIG", ""
    if config.is_file():
        known, model = str(config), load_config(config).model
        # The pattern holds them in its entries; the keys would be refused where no new mixer has them.
        off = "".join(f" --model.{key} false" for key in QUERY_OPTIONS if getattr(model, key))
    word = pattern if isinstance(pattern, str) else json.dumps(list(pattern))
    return (
        f"Train it on: python train.py --config {known} --run RUN --data.path {data} --model.mixer_pattern '{word}'"
        f"{off} --model.init_from {out}"
    )
