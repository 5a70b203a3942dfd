"""Weights of a released ACmix module, of its ResNets or Swin transformers, under our names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sit_atconv.errors import InputError

_TABLES = ("relative_position_index",)  # computed anew
_PROJECTIONS = ("conv1", "conv2", "conv3")  # of q, k and v in the ResNets; Swin has one for all
_NAMES = {
    "qkv.weight": "attention.qkv.weight",
    "qkv.bias": "attention.qkv.bias",
    "proj.weight": "attention.out_proj.weight",
    "proj.bias": "attention.out_proj.bias",
    "relative_position_bias_table": "attention.bias.table",
    "conv_p.weight": "attention.position.weight",
    "conv_p.bias": "attention.position.bias",
    "fc.weight": "convolution.fc.weight",
    "fc.bias": "convolution.fc.bias",
    "dep_conv.weight": "convolution.shift.weight",
    "rate1": "alpha",
    "rate2": "beta",
}


def convert_acmix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of our `ACmix` from that of one released module, without the prefix of its network.

    The released ResNets' module (`conv1`, `conv2`, `conv3`, `conv_p`, …) is an ``ACmix(dim, 4, neighbourhood=7)``, the
    Swin transformers' attention (`qkv`, `proj`, …) an ``ACmix(dim, num_heads, window=7, shift=0 or 3)``.

    Raises `InputError` for a weight that no released module has.
    """
    state = {name: weight for name, weight in state.items() if name not in _TABLES}
    if set(_PROJECTIONS) <= {name.partition(".")[0] for name in state}:
        for part in ("weight", "bias"):
            state[f"qkv.{part}"] = torch.cat([state.pop(f"{projection}.{part}") for projection in _PROJECTIONS])
    if unknown := sorted(set(state) - set(_NAMES)):
        raise InputError(
            f"{', '.join(unknown)} is not a weight of a released ACmix module: expected conv1, conv2, conv3 and conv_p "
            "(ResNet) or qkv, proj and relative_position_bias_table (Swin), and fc, dep_conv, rate1 and rate2."
        )
    return {_NAMES[name]: _without_sides(name, weight) for name, weight in state.items()}


def _without_sides(name: str, weight: Tensor) -> Tensor:
    """Weights of 1×1 convolutions, (out, in, 1, 1), as those of linear layers."""
    return weight.flatten(1) if weight.ndim == 4 and name != "dep_conv.weight" else weight
