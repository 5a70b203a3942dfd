"""Fine-tuning: a new run starts from a trained model's weights; its classes and resolution may differ."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import load_model
from sit_atconv.models.mixers.pattern import Entry, ParallelEntry, describe_pattern, expand_pattern

log = logging.getLogger(__name__)

_LABELS, _INTERNAL = "label_embed.weight", "internal."
# Settings that determine the weights' shapes and meaning. The position embedding is recomputed for the new grid.
_NETWORK = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "norm", "mlp")
_MEANING = ("interpolant", "prediction")


def begin_with(model: SiT, path: str) -> None:
    """Initialise `model` with the weights of the `model/` directory `path`.

    Rows of the label embedding go to the classes of the same name or, if names are missing and the number of classes is
    equal, of the same number; other classes start from the null class. Raises `InputError` when `path` is another
    network, or was trained on latents of another kind.
    """
    source = load_model(Path(path))
    differing = _differences(source, model)
    if differing:
        raise InputError(
            f"model.init_from: {path} is another network ({'; '.join(differing)}). Choose the model.name and the flow "
            "settings it was trained with, and data of the same autoencoder."
        )
    if source.config.latents and model.config.latents:
        theirs, ours = (LatentSpec.from_dict(each.config.latents) for each in (source, model))
        # The meaning of the latents is compared; which weights encoded them is not, as that is the user's choice.
        replace(theirs, weights_hash="").require_same(ours, path, "the data")
    state = {name: tensor for name, tensor in source.state_dict().items() if name != "position_table"}
    if source.config.internal_block != model.config.internal_block:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_INTERNAL)}
        if model.internal is not None:
            log.info("The head of Internal Guidance begins anew: there it is after another block, or not at all.")
    old = state.pop(_LABELS, None)
    if model.label_embed is not None and old is not None:
        state[_LABELS] = _resize_labels(old, source, model)
        _keep_learned(source, model)
    model.load_state_dict({**model.state_dict(), **state})
    log.info("Beginning with the weights of %s.", path)


def _differences(source: SiT, model: SiT) -> list[str]:
    """Phrases such as "depth: 12 there, 28 here"."""
    theirs, ours = source.config, model.config
    differing = [key for key in (*_NETWORK, *_MEANING) if theirs[key] != ours[key]]
    if [theirs.position, ours.position].count("none") == 1:
        differing.append("position")
    phrases = [f"{key}: {theirs[key]} there, {ours[key]} here" for key in differing]
    if None not in (theirs.meanflow_blocks, ours.meanflow_blocks) and theirs.meanflow_blocks != ours.meanflow_blocks:
        phrases.append(f"flow.meanflow.blocks: {theirs.meanflow_blocks} there, {ours.meanflow_blocks} here")
    if _mixers(source) != _mixers(model):
        patterns = [describe_pattern(config.mixer_pattern) for config in (theirs, ours)]
        phrases.append("mixer_pattern: {} there, {} here".format(*patterns))
    return phrases


def _mixers(model: SiT) -> list[Entry | ParallelEntry]:
    """The mixer of each block with all its options: equal for patterns that mean the same."""
    return [entry.resolve() for entry in expand_pattern(model.config.mixer_pattern, model.config.depth)]


def _resize_labels(old: Tensor, source: SiT, model: SiT) -> Tensor:
    """The rows (num_classes + 1, C) of `model`, the null class last, from those of `source`."""
    rows = _rows_of_source(source, model)
    known = len(rows) - rows.count(None)
    log.info("%d of %d classes are known to it; the others begin as its null class.", known, len(rows))
    null = source.num_classes
    return old[torch.tensor([*(null if row is None else row for row in rows), null])]


def _rows_of_source(source: SiT, model: SiT) -> list[int | None]:
    """For each class of `model`, its number in `source`: without names on both sides only for equally many classes."""
    named = model.classes.names and source.classes.names
    if not named and model.num_classes != source.num_classes:
        return [None] * model.num_classes
    return model.classes.numbers_in(source.classes)


def _keep_learned(source: SiT, model: SiT) -> None:
    """What `source` has learned of the classes and the null class, `model` knows from the start."""
    learned, rows = set(source.classes.learned), _rows_of_source(source, model)
    empty = [number for number in model.classes.empty if rows[number] not in learned]
    model.register_to_config(
        empty_classes=empty, label_dropout=max(model.config.label_dropout, source.config.label_dropout)
    )
