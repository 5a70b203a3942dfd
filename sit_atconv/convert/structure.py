"""Reads the structure of a released network from its tensors: its time direction, and the arguments of our `SiT`.

Model names are not used: ATConv's REPA tree calls networks "-ATConv" that contain plain attention.
"""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.convert.checkpoint import Released
from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.embeddings import sincos_position
from sit_atconv.models.mixers.pattern import expand_pattern
from sit_atconv.models.registry import SIZES

log = logging.getLogger(__name__)

LAYOUTS = ("sit", "repa")
SAME_POSITION = 1e-5  # difference between the same table computed in fp32 and in fp64
LABELS = "y_embedder.embedding_table.weight"
# All releases work on latents of Stable Diffusion's autoencoder; "-ema" is the decoder of their samplers.
SD_LATENTS = LatentSpec("stabilityai/sd-vae-ft-ema", None, 4, 8, 0.18215, 0.0)

_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
# From SiT's and REPA's names to ours
_INTERPOLANTS = {"linear": "linear", "gvp": "cosine", "cosine": "cosine", "vp": "vp"}
_PREDICTIONS = {"velocity": "velocity", "v": "velocity", "noise": "noise", "score": "score"}


def detect_layout(released: Released) -> str:
    """The direction of time: "sit" (t = 1 is data) or "repa" (t = 1 is noise, as in this package).

    All SiT trees predict a variance and no REPA tree does. Only REPA trees have projectors. ATConv's projections are
    matrices in SiT trees and 1×1 convolutions in REPA trees. Raises `InputError` when this evidence is contradictory.
    """
    mixers = [tensor for key, tensor in released.state.items() if key.endswith(".attn.kernel_proj.weight")]
    evidence = {"repa" if mixer.ndim == 4 else "sit" for mixer in mixers}
    if predicts_variance(released.state):
        evidence.add("sit")
    if released.projectors:
        evidence.add("repa")
    if len(evidence) > 1:
        raise InputError(
            "The checkpoint looks both like SiT (a variance, or ATConv of matrices) and like REPA (projectors, or "
            "ATConv of 1×1 convolutions), whose times run in opposite directions. Choose one with layout (--layout): "
            "'sit' if t = 1 is data, 'repa' if t = 1 is noise."
        )
    if not evidence:
        log.warning(
            "No variance and no projectors: assuming a REPA network without its projectors, where t = 1 is noise "
            "(layout 'sit' means the opposite)."
        )
    return evidence.pop() if evidence else "repa"


def predicts_variance(state: Mapping[str, Tensor]) -> bool:
    """Whether the final layer has a second, unused half. Raises `InputError` when it has neither one nor two."""
    values, rows = state["x_embedder.proj.weight"][0].numel(), _rows(state, "final_layer.linear.weight")
    if rows not in (values, 2 * values):
        raise InputError(
            f"final_layer.linear.weight has {rows} rows: expected the {values} values of a patch, or twice as many "
            "with a variance."
        )
    return rows == 2 * values


def read_config(released: Released, given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `SiT` for the released network; those in `given` take precedence.

    Raises `InputError` for a network that `SiT` cannot represent, and when an argument is needed from the user.
    """
    state, arguments = released.state, released.arguments
    mixers = _mixers(state)
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    config = {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(mixers),
        "mlp_ratio": mlp_ratio(_rows(state, "blocks.0.mlp.fc1.weight"), width),
        "mixer_pattern": _pattern(mixers),
        "latents": SD_LATENTS.to_dict() if channels == SD_LATENTS.channels else None,
        **_atconv_options(state),
    }
    answers = {  # called only for arguments that are not given, since each may fail
        "num_heads": partial(_num_heads, width, mixers),
        "num_classes": partial(_num_classes, _rows(state, LABELS), arguments),
        "position": partial(_position, state, mixers, patch),
        "input_size": partial(_input_size, state, patch, arguments),
        "interpolant": partial(_named, arguments, "path_type", _INTERPOLANTS),
        "prediction": partial(_named, arguments, "prediction", _PREDICTIONS),
    }
    return config | {key: answer() for key, answer in answers.items() if key not in given} | dict(given)


def _mixers(state: Mapping[str, Tensor]) -> list[str]:
    """The mixer of each block, from the block's tensors."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return ["atconv" if f"blocks.{i}.attn.kernel_gen.weight" in state else "attention" for i in range(depth)]


def _pattern(mixers: list[str]) -> str | list[str]:
    """The shortest mixer_pattern that means these mixers."""
    names = ("attention", "atconv", "hybrid")
    meanings = {name: [entry.name for entry in expand_pattern(name, len(mixers))] for name in names}
    return next((name for name in names if meanings[name] == mixers), mixers)


def _atconv_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of ATConv: both trees pool flattened tokens; the one with convolutions uses SiLU, the other tanh-GELU."""
    generator = next((key for key in state if key.endswith(".attn.kernel_gen.weight")), None)
    if generator is None:
        return {}
    convolutions = any(key.endswith(".attn.kernel_proj.weight") and state[key].ndim == 4 for key in state)
    activation = "silu" if convolutions else "gelu_tanh"
    return {"kernel_size": math.isqrt(_rows(state, generator)), "pool": "raster", "activation": activation}


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio for which int(width · ratio) is `hidden`, even if the quotient is rounded down."""
    ratio = hidden / width if hidden else 4.0  # without an MLP, its tensors are reported as missing
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _num_heads(width: int, mixers: list[str]) -> int:
    if width not in _HEADS and "attention" in mixers:
        raise InputError(
            f"The number of attention heads cannot be read from the weights, and their width {width} is none of "
            f"{', '.join(map(str, _HEADS))} (S, B, L, XL): give num_heads (--num-heads)."
        )
    return _HEADS.get(width, 1)  # ATConv alone has no heads


def _num_classes(rows: int, arguments: Mapping[str, Any]) -> int:
    """Rows of the label table without the null class, unless it was trained without one; 0 for a single row."""
    return rows if rows > 1 and arguments.get("num_classes") == rows else max(rows - 1, 0)


def position_difference(table: Tensor, grid: tuple[int, int]) -> float:
    """The largest difference between a table (1, N, C) and the sine-cosine embedding of this grid."""
    expected = sincos_position(table.shape[-1], grid)
    return float((table[0] - expected).abs().max()) if expected.shape == table[0].shape else math.inf


def _position(state: Mapping[str, Tensor], mixers: list[str], patch: int) -> str:
    """Either "sincos" if the table equals the computed one, or "table", which keeps one that averaging has moved."""
    if "pos_embed" in state:
        side = _input_size(state, patch, {}) // patch
        return "sincos" if position_difference(state["pos_embed"], (side, side)) <= SAME_POSITION else "table"
    if "attention" in mixers:
        raise InputError(
            "pos_embed is missing, which every released network with attention has: give position (--position), "
            "either 'sincos' or 'none'."
        )
    return "none"


def _input_size(state: Mapping[str, Tensor], patch: int, arguments: Mapping[str, Any]) -> int:
    """Side of the training latents: from the position embedding, else the script's image size, else 16×16 tokens."""
    if "pos_embed" in state:
        shape = tuple(state["pos_embed"].shape)
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        if not side or side**2 != shape[1]:
            raise InputError(f"pos_embed has the shape {shape}: expected (1, a square number of tokens, width).")
        return side * patch
    pixels = arguments.get("image_size") or arguments.get("resolution")
    if isinstance(pixels, int):
        return pixels // SD_LATENTS.downscale
    log.warning("The size of the latents is unknown: assuming %d×%d (input_size).", 16 * patch, 16 * patch)
    return 16 * patch


def _named(arguments: Mapping[str, Any], argument: str, names: Mapping[str, str]) -> str:
    """Our name for the value of a training script's argument; without that argument, the script's default."""
    value = str(arguments.get(argument, next(iter(names)))).lower()
    require_one_of(value, names, f"{argument} in the checkpoint's arguments")
    return names[value]


def _rows(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].shape[0] if key in state and state[key].ndim else 0
