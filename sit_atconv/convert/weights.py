"""Exact reparametrisations from a released state dict to ours. The model needs no flags for them."""

import torch
from torch import Tensor

from sit_atconv.convert.structure import LABELS
from sit_atconv.models.embeddings import time_features

FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")
_TIME_IN, _TIME_OUT_BIAS = "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias"

# From our names to those of the releases, applied in this order.
_RENAMES = (
    ("patch_embed.", "x_embedder.proj."),
    ("time_embed.", "t_embedder.mlp."),
    ("label_embed.", "y_embedder.embedding_table."),
    ("final.proj.", "final_layer.linear."),
    ("final.modulation.", "final_layer.adaLN_modulation.1."),
    (".modulation.", ".adaLN_modulation.1."),
    (".mixer.", ".attn."),
    (".value_proj.", ".x_proj."),
    (".out_proj.", ".proj."),
    (".inhibition", ".difference_control"),
    ("position_table", "pos_embed"),
)


def released_name(name: str) -> str:
    """The releases' name of our parameter `name`."""
    for ours, theirs in _RENAMES:
        name = name.replace(ours, theirs)
    return name


def as_matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reshape the p×p patch convolution and ATConv's 1×1 convolutions to the matrices of linear layers."""
    return {key: tensor.flatten(1) if tensor.ndim == 4 else tensor for key, tensor in state.items()}


def drop_variance(state: dict[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """Keep the first C of the final layer's 2·C channels for each pixel of a patch."""
    kept = {key: state[key].unflatten(0, (-1, 2 * in_channels))[:, :in_channels].flatten(0, 1) for key in FINAL}
    return state | kept


def reverse_time(state: dict[str, Tensor], prediction: str) -> dict[str, Tensor]:
    """From SiT's direction of time to ours: v_ours(x, t) = −v_SiT(x, 1 − t). Noise and score keep their sign.

    The sign goes into the final layer. The time MLP reads cos ω(1−t) = cos ω·cos ωt + sin ω·sin ωt and
    sin ω(1−t) = sin ω·cos ωt − cos ω·sin ωt, so its first weights (C, features) are rotated by ω, in fp64.
    """
    cosines, sines = state[_TIME_IN].double().chunk(2, dim=1)
    cos, sin = time_features(torch.ones(1, dtype=torch.float64), state[_TIME_IN].shape[1])[0].chunk(2)
    rotated = torch.cat([cosines * cos + sines * sin, cosines * sin - sines * cos], dim=1)
    sign = -1 if prediction == "velocity" else 1
    return state | {key: sign * state[key] for key in FINAL} | {_TIME_IN: rotated.float()}


def fold_single_label(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A label table with a single row always adds the same vector: move it into the bias of the time embedding."""
    bias = state[_TIME_OUT_BIAS].double() + state[LABELS][0].double()
    return {key: tensor for key, tensor in state.items() if key != LABELS} | {_TIME_OUT_BIAS: bias.float()}


def append_null_label(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Append a null row, the mean of all classes, to a table that was trained without label dropout."""
    return state | {LABELS: torch.cat([state[LABELS], state[LABELS].mean(dim=0, keepdim=True)])}
