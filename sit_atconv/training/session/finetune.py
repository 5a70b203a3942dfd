"""Fine-tuning: a new run that begins with a trained model's weights, whatever its classes and resolution were."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import load_model

log = logging.getLogger(__name__)

_LABELS = "label_embed.weight"
# What decides the weights' shapes and meaning. Position is computed anew for the new grid.
_NETWORK = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "mixer_pattern")
_MEANING = ("kernel_size", "pool", "activation", "interpolant", "prediction")


def begin_with(model: SiT, path: str) -> None:
    """Give `model` the weights of the `model/` directory `path`.

    Rows of the label table go to the classes of the same name or, where names are missing and there are as many of
    them, of the same number; other classes begin as the null class. Raises `InputError` when it is another network, or
    was trained on latents of another kind.
    """
    source = load_model(Path(path))
    differing = [f"{key}: {source.config[key]} there, {model.config[key]} here" for key in _differing(source, model)]
    if differing:
        raise InputError(
            f"model.init_from: {path} is another network ({'; '.join(differing)}). Choose the model.name and the flow "
            "settings it was trained with, and data of the same autoencoder."
        )
    if source.config.latents and model.config.latents:
        theirs, ours = (LatentSpec.from_dict(each.config.latents) for each in (source, model))
        # Which weights encoded them is the user's choice and not compared; what the numbers mean is not.
        replace(theirs, weights_hash="").require_same(ours, path, "the data")
    state = {name: tensor for name, tensor in source.state_dict().items() if name != "position_table"}
    old = state.pop(_LABELS, None)
    if model.label_embed is not None and old is not None:
        state[_LABELS] = _resize_labels(old, source, model)
    model.load_state_dict({**model.state_dict(), **state})
    log.info("Beginning with the weights of %s.", path)


def _differing(source: SiT, model: SiT) -> list[str]:
    differing = [key for key in (*_NETWORK, *_MEANING) if source.config[key] != model.config[key]]
    # "hybrid" and the list it stands for are the same mixers.
    same_mixers = [type(b.mixer) for b in source.blocks] == [type(b.mixer) for b in model.blocks]
    differing = [key for key in differing if not (key == "mixer_pattern" and same_mixers)]
    positions = [each.config.position for each in (source, model)]
    return [*differing, "position"] if positions.count("none") == 1 else differing


def _resize_labels(old: Tensor, source: SiT, model: SiT) -> Tensor:
    """The rows (num_classes + 1, C) of `model`, the null class last, from those of `source`."""
    ours, theirs = model.config.class_names, source.config.class_names
    count, null = model.num_classes, source.num_classes
    if ours and theirs:
        number = {name: row for row, name in enumerate(theirs)}
        rows = [number.get(name, null) for name in ours]
    else:
        rows = list(range(count)) if count == null else [null] * count
    known = count - rows.count(null)
    log.info("%d of %d classes are known to it; the others begin as its null class.", known, count)
    return old[torch.tensor([*rows, null])]
