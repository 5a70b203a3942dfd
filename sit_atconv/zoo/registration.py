"""How the networks are offered to timm: default configurations and construction."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

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
    filter_fn: Callable[[dict, nn.Module], dict] | None = None,
    stages: int = 4,
) -> Network:
    """The network of an entry point, as timm builds its own.

    Args:
        network: the class.
        variant: the entry point's name.
        pretrained: load the weights of the default configuration.
        defaults, options: arguments of the class; those of the caller, `options`, override the variant's.
        filter_fn: converts the names of released weights.
        stages: how many maps there are for `features_only`.
    """
    options = dict(options)
    device, dtype = options.pop("device", None), options.pop("dtype", None)
    with torch.device(device) if device else contextlib.nullcontext():
        model = build_model_with_cfg(
            network,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": tuple(range(stages)), "flatten_sequential": True},
            **{**defaults, **options},
        )
    return model.to(dtype) if dtype else model
