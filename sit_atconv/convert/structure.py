"""What a released checkpoint says about its network: the direction of its time, and the arguments of our `SiT`.

Tensors decide, not model names: ATConv's REPA tree calls networks "-ATConv" that hold plain attention.
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
SAME_POSITION = 1e-5  # what computing it in fp32 or fp64 makes of the same table
LABELS = "y_embedder.embedding_table.weight"
# All releases work on latents of Stable Diffusion's autoencoder; "-ema" is the decoder of their samplers.
SD_LATENTS = LatentSpec("stabilityai/sd-vae-ft-ema", None, 4, 8, 0.18215, 0.0)

_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
# SiT's and REPA's words for ours
_INTERPOLANTS = {"linear": "linear", "gvp": "cosine", "cosine": "cosine", "vp": "vp"}
_PREDICTIONS = {"velocity": "velocity", "v": "velocity", "noise": "noise", "score": "score"}


def detect_layout(released: Released) -> str:
    """Which way time runs: "sit" (t = 1 is data) or "repa" (t = 1 is noise, as ours), in either project's tree.

    All SiT trees predict a variance and no REPA tree does, only those hold projectors, and ATConv's projections are
    matrices in the one and 1×1 convolutions in the other. Raises `InputError` when this evidence contradicts itself.
    """
    mixers = [tensor for key, tensor in released.state.items() if key.endswith(".attn.kernel_proj.weight")]
    evidence = {"repa" if mixer.ndim == 4 else "sit" for mixer in mixers}
    if predicts_variance(released.state):
        evidence.add("sit")
    if released.projectors:
        evidence.add("repa")
    if len(evidence) > 1:
        raise InputError(
            "The checkpoint looks like SiT (a variance, or ATConv of matrices) and like REPA (projectors, or ATConv of "
            "1×1 convolutions) at once, and their times run in opposite directions. Say which with layout (--layout): "
            "'sit' if t = 1 is data, 'repa' if t = 1 is noise."
        )
    if not evidence:
        log.warning(
            "No variance and no projectors: taken for a REPA network without its projectors, t = 1 is noise (layout "
            "'sit' is the other way)."
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
    """All arguments of `SiT` that make the released network; `given` ones are taken as they are.

    Raises `InputError` for a network that ours cannot compute, and for what only the user can say.
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
    answers = {  # asked only where the user has not answered: each may fail
        "num_heads": partial(_num_heads, width, mixers),
        "num_classes": partial(_num_classes, _rows(state, LABELS), arguments),
        "position": partial(_position, state, mixers, patch),
        "input_size": partial(_input_size, state, patch, arguments),
        "interpolant": partial(_named, arguments, "path_type", _INTERPOLANTS),
        "prediction": partial(_named, arguments, "prediction", _PREDICTIONS),
    }
    return config | {key: answer() for key, answer in answers.items() if key not in given} | dict(given)


def _mixers(state: Mapping[str, Tensor]) -> list[str]:
    """The mixer of each block, by what the block holds."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    return ["atconv" if f"blocks.{i}.attn.kernel_gen.weight" in state else "attention" for i in range(depth)]


def _pattern(mixers: list[str]) -> str | list[str]:
    """The shortest mixer_pattern that means these mixers."""
    names = ("attention", "atconv", "hybrid")
    meanings = {name: [entry.name for entry in expand_pattern(name, len(mixers))] for name in names}
    return next((name for name in names if meanings[name] == mixers), mixers)


def _atconv_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of ATConv: both trees pool the flattened tokens; that of convolutions has SiLU, that of matrices tanh-GELU."""
    generator = next((key for key in state if key.endswith(".attn.kernel_gen.weight")), None)
    if generator is None:
        return {}
    convolutions = any(key.endswith(".attn.kernel_proj.weight") and state[key].ndim == 4 for key in state)
    activation = "silu" if convolutions else "gelu_tanh"
    return {"kernel_size": math.isqrt(_rows(state, generator)), "pool": "raster", "activation": activation}


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio of which int(width · ratio) is `hidden`, also where the quotient is rounded down."""
    ratio = hidden / width if hidden else 4.0  # without an MLP, its tensors are reported as missing
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _num_heads(width: int, mixers: list[str]) -> int:
    if width not in _HEADS and "attention" in mixers:
        raise InputError(
            f"The weights do not say how many attention heads there are, and their width {width} is none of "
            f"{', '.join(map(str, _HEADS))} (S, B, L, XL): give num_heads (--num-heads)."
        )
    return _HEADS.get(width, 1)  # ATConv alone has no heads


def _num_classes(rows: int, arguments: Mapping[str, Any]) -> int:
    """Rows of the label table less the null class, unless it was trained without one; a single row tells nothing."""
    return rows if rows > 1 and arguments.get("num_classes") == rows else max(rows - 1, 0)


def position_difference(table: Tensor, grid: tuple[int, int]) -> float:
    """By how much a table (1, N, C) differs from the sine-cosine embedding of this grid, at most."""
    expected = sincos_position(table.shape[-1], grid)
    return float((table[0] - expected).abs().max()) if expected.shape == table[0].shape else math.inf


def _position(state: Mapping[str, Tensor], mixers: list[str], patch: int) -> str:
    """Ours is computed; a table that is not the same, such as one that averaging has moved, is kept as it is."""
    if "pos_embed" in state:
        side = _input_size(state, patch, {}) // patch
        return "sincos" if position_difference(state["pos_embed"], (side, side)) <= SAME_POSITION else "table"
    if "attention" in mixers:
        raise InputError(
            "pos_embed is missing, which every released network with attention has: say with position (--position) "
            "whether this one has 'sincos' or 'none'."
        )
    return "none"


def _input_size(state: Mapping[str, Tensor], patch: int, arguments: Mapping[str, Any]) -> int:
    """Side of the latents trained on: from the position embedding, else the script's pixels, else 16×16 tokens."""
    if "pos_embed" in state:
        shape = tuple(state["pos_embed"].shape)
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        if not side or side**2 != shape[1]:
            raise InputError(f"pos_embed is of shape {shape}: expected (1, tokens of a square, width).")
        return side * patch
    pixels = arguments.get("image_size") or arguments.get("resolution")
    if isinstance(pixels, int):
        return pixels // SD_LATENTS.downscale
    log.warning("Nothing says how large the latents are: taken as %d×%d (input_size).", 16 * patch, 16 * patch)
    return 16 * patch


def _named(arguments: Mapping[str, Any], argument: str, names: Mapping[str, str]) -> str:
    """Our word for what an argument of the training scripts says; without it the first one, their default."""
    value = str(arguments.get(argument, next(iter(names)))).lower()
    require_one_of(value, names, f"{argument} in the checkpoint's arguments")
    return names[value]


def _rows(state: Mapping[str, Tensor], key: str) -> int:
    return state[key].shape[0] if key in state and state[key].ndim else 0
