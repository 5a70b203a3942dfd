"""Converts a released checkpoint to a `SiT` that computes the same function."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from sit_atconv.convert.checkpoint import Released, read_released
from sit_atconv.convert.structure import (
    LABELS,
    LAYOUTS,
    SAME_POSITION,
    detect_layout,
    position_difference,
    predicts_variance,
    read_config,
)
from sit_atconv.convert.weights import (
    FINAL,
    append_null_label,
    as_matrices,
    drop_variance,
    fold_single_label,
    released_name,
    reverse_time,
)
from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.interpolants import INTERPOLANTS, PREDICTIONS
from sit_atconv.models import SiT, create_model

log = logging.getLogger(__name__)

# Up to this difference a table may be replaced on request. Long averaging in fp32 (the scripts average it too) moves it
# by up to 2e-4, storing it in bf16 by up to 2e-3; an unrelated table differs by about 1.
_POSITION_TOLERANCE = 5e-3


def load_released(
    source: str | Path | Mapping[str, Any],
    num_heads: int | None = None,
    *,
    weights: str | None = None,
    layout: str | None = None,
    **config: Any,
) -> SiT:
    """Convert a released checkpoint of SiT, REPA or ATConv (both trees) to a `SiT` in eval mode, fp32, on the CPU.

    It computes the same as the released code, with our time direction (t = 0 is data). REPA's projectors are left out.
    A network with a single label, as for FFHQ, becomes unconditional. A checkpoint of DiT has the same tensors, but
    predicts noise at 1000 discrete times: it is refused where its arguments or its file's name tell, unless `layout` is
    given.

    Args:
        source: a .pt or .safetensors file, a state dict, or a dict that holds one as "ema", "model" or "state_dict".
        num_heads: attention heads; None takes those of S, B, L or XL, according to the width.
        weights: "ema" or "model" in a checkpoint with both; None prefers the averaged ones.
        layout: "sit" (t = 1 is data) or "repa" (t = 1 is noise), if it cannot be read from the tensors.
        config: arguments of `SiT` that the tensors do not determine: num_classes (the number of rows of the label table
            if it has no null class), pool and activation of ATConv, position, input_size, interpolant, prediction,
            latents, class_names. The checkpoint's training arguments set some of them.

    Raises:
        InputError: for a file that is not such a checkpoint, is damaged or incomplete, contradicts `config`, or holds a
            network that `SiT` cannot represent.
    """
    return convert(read_released(source, weights), num_heads, layout, **config)


def convert(released: Released, num_heads: int | None = None, layout: str | None = None, **config: Any) -> SiT:
    """Convert what `read_released` returned; the other arguments are those of `load_released`."""
    require_one_of(layout or "sit", LAYOUTS, "layout")
    if released.dit and layout is None:
        raise InputError(
            f"This is a checkpoint of DiT ({released.dit}). It has the tensors of a SiT, but predicts noise at 1000 "
            "discrete times, not velocities: a model made of it would draw noise. Convert a release of SiT, REPA or "
            "ATConv. If it is one of those after all, say so by its direction of time: --layout sit or --layout repa."
        )
    given = config if num_heads is None else {**config, "num_heads": num_heads}
    read = read_config(released, given)
    require_one_of(read["prediction"], PREDICTIONS, "prediction")
    require_one_of(read["interpolant"], INTERPOLANTS, "interpolant")
    with init_empty_weights(include_buffers=False):
        model = create_model("SiT-XL/2", **read)  # all arguments are given: the name has no effect

    # Check that all tensors are present and fit
    state = as_matrices(released.state)
    variance = predicts_variance(released.state)
    _require_label_rows(state, model.num_classes)
    _require_tensors(state, _expected_shapes(state, model, variance))
    _require_position(state, model)

    # Convert to our parameters; the function stays the same
    if variance:
        state = drop_variance(state, model.in_channels)
    if (layout or detect_layout(released)) == "sit":
        state = reverse_time(state, model.config.prediction)
    if LABELS in state and not model.num_classes:
        state = fold_single_label(state)
    elif LABELS in state and len(state[LABELS]) == model.num_classes:
        log.warning("The label table has no null class: the mean of its rows replaces it, and cannot guide.")
        state = append_null_label(state)
        model.register_to_config(label_dropout=0.0)
    model.load_state_dict({key: state[released_name(key)] for key in model.state_dict()}, assign=True)
    return model.eval()


def _expected_shapes(state: Mapping[str, Tensor], model: SiT, variance: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the checkpoint must contain, with ATConv and patch projections as matrices."""
    shapes = {released_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if variance:
        shapes |= {key: (2 * shapes[key][0], *shapes[key][1:]) for key in FINAL}
    if LABELS in state:  # checked already: with or without a null row, or a single one
        shapes[LABELS] = (*state[LABELS].shape[:1], model.config.hidden_size)
    if "pos_embed" in state:
        shapes["pos_embed"] = (1, model.grid[0] * model.grid[1], model.config.hidden_size)
    return shapes


def _require_tensors(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `InputError` unless `state` has exactly these tensors in these shapes."""
    faults = {
        "lacks": [key for key in shapes if key not in state],
        "has what no such network has:": [key for key in state if key not in shapes],
        "has other shapes than expected in": [
            f"{key} {tuple(state[key].shape)}, expected {shape}"
            for key, shape in shapes.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    sentences = [f"It {fault} {_first(names)}." for fault, names in faults.items() if names]
    if sentences:
        raise InputError(f"The checkpoint is not the network that it seems to be. {' '.join(sentences)}")


def _require_label_rows(state: Mapping[str, Tensor], num_classes: int) -> None:
    rows = state[LABELS].shape[0] if LABELS in state and state[LABELS].ndim else None
    if rows is not None and rows not in (num_classes, num_classes + 1):
        raise InputError(
            f"The label table has {rows} rows, which does not fit num_classes = {num_classes}: give {rows - 1} if one "
            f"row is the null class, else {rows}."
        )


def _require_position(state: dict[str, Tensor], model: SiT) -> None:
    """Keep the checkpoint's table if the model has one; else check that it is close to the table the model computes."""
    if "pos_embed" not in state:
        return
    if model.position_table is None:
        raise InputError("position is 'none', but the checkpoint has a position embedding (pos_embed).")
    if model.config.position == "table":
        state["pos_embed"] = state["pos_embed"][0]
        return
    difference = position_difference(state.pop("pos_embed"), model.grid)
    if difference > _POSITION_TOLERANCE:
        raise InputError(
            f"pos_embed is not the sine-cosine embedding of SiT, REPA and ATConv (it differs by up to "
            f"{difference:.2g}): without the option position, the table is kept as it is."
        )
    if difference > SAME_POSITION:
        log.info("pos_embed differs by up to %.1e; the sine-cosine embedding takes its place.", difference)


def _first(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
