"""How the networks are offered to timm: default configurations, construction, and which weights they take."""

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from sit_atconv.errors import InputError

Network = TypeVar("Network", bound=nn.Module)


def image_cfg(first_conv: str, classifier: str = "head.fc", **changes: Any) -> dict[str, Any]:
    """timm's default configuration of a network of 224 px images with 1000 classes; `changes` override it."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        **changes,
    }


def build(
    network: type[Network],
    variant: str,
    pretrained: bool,
    defaults: Mapping[str, Any],
    options: Mapping[str, Any],
    stages: int = 4,
) -> Network:
    """The network of an entry point, as timm builds its own.

    Args:
        network: the class.
        variant: the entry point's name.
        pretrained: load the weights of the default configuration.
        defaults, options: arguments of the class; those of the caller, `options`, override the variant's.
        stages: how many maps there are for `features_only`.

    Raises:
        InputError: for weights of another network or number of classes.
    """
    options = dict(options)
    device, dtype = options.pop("device", None), options.pop("dtype", None)
    with torch.device(device) if device else contextlib.nullcontext():
        model = build_model_with_cfg(
            network,
            variant,
            pretrained,
            pretrained_filter_fn=partial(_for_timm, backbone=bool(options.get("features_only"))),
            feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True},
            **{**defaults, **options},
        )
    return model.to(dtype) if dtype else model


def weights_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by name in a checkpoint, which may hold them as "model", "state_dict" or "model_ema".

    Raises:
        InputError: for a checkpoint that holds something else.
    """
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    others = [name for name, value in checkpoint.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"What the checkpoint holds as {_some(others)} is no tensor. Expected weights by name, directly or as "
            "'model', 'state_dict' or 'model_ema': give the part with the weights."
        )
    return dict(checkpoint)


def require_fitting(
    model: nn.Module, weights: Mapping[str, Tensor], except_for: Iterable[str] = (), name: str = "These weights"
) -> None:
    """Raise `InputError`, a sentence instead of torch's list of all names, unless weights are for `model`.

    Args:
        model: the network.
        weights: tensors by name, as `model.state_dict()` has them.
        except_for: names that may be missing or have other shapes.
        name: how the weights are called.
    """
    ours, free = model.state_dict(), set(except_for)
    missing = [name for name in ours if name not in weights and name not in free]
    unknown = [name for name in weights if name not in ours and name not in free]
    reshaped = [
        f"{name}: {tuple(weights[name].shape)}, not {tuple(ours[name].shape)}"
        for name in ours
        if name in weights and weights[name].shape != ours[name].shape and name not in free
    ]
    found = [
        (missing, f"{len(missing)} of the network's {len(ours)} tensors are missing"),
        (unknown, f"{len(unknown)} tensors are not the network's"),
        (reshaped, f"{len(reshaped)} have another shape"),
    ]
    if any(names for names, _ in found):
        facts = "; ".join(f"{what} ({_some(names)})" for names, what in found if names)
        raise InputError(
            f"{name} are not for this {type(model).__name__}: {facts}. Build the network that they were trained with: "
            "the same name, num_classes, in_chans and other options."
        )


def _some(names: list[str], count: int = 2) -> str:
    """The first few of the names."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _for_timm(checkpoint: Mapping[str, Any], model: nn.Module, backbone: bool) -> dict[str, Tensor]:
    """The weights in a checkpoint that timm is about to load, converted and checked.

    timm replaces the first convolution and the last layer when the number of channels or classes is another, and then
    does not mind what else is missing. It compares the classes with the configuration, not with the weights.
    """
    weights, cfg = model.convert(checkpoint), model.pretrained_cfg
    head = [f"{cfg['classifier']}.weight", f"{cfg['classifier']}.bias"]
    require_fitting(model, weights, [f"{cfg['first_conv']}.weight", *head])
    said, there = cfg["num_classes"], len(weights.get(head[0], ())) or None
    if there not in (None, said) and not backbone and model.num_classes in (said, there):
        raise InputError(
            f"These weights are for {there} classes, and the configuration says {said}. Add num_classes={there} to the "
            f"arguments and 'num_classes': {there} to pretrained_cfg_overlay."
        )
    return weights
