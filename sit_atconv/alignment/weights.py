"""Filling a timm encoder, a teacher or one that scores pictures, from a local file."""

import sys
from pathlib import Path

from timm.models import clean_state_dict
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.runtime.weights import read_weights

# Where checkpoints keep the weights of an encoder, best first: the averaged ones, as timm chooses.
_WEIGHTS = ("teacher", "state_dict_ema", "model_ema", "model", "state_dict")


def load_into_timm(model: nn.Module, path: Path) -> list[str]:
    """Fill a timm model from a file in timm's names, or in a release's that timm can translate.

    Returns the names in the file that the model has no place for, such as those of a head. Raises `InputError` where
    the file cannot be read, holds another model's weights or lacks some of this model's.
    """
    state = _state(path)
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = translate(state, model) if translate else state
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, ValueError, AssertionError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or ["shapes differ"])[-1].strip()
        raise InputError(f"{path} holds another model's weights: {reason}") from error
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])}, …): is it the file of "
            "another model?"
        )
    return unexpected


def _state(path: Path) -> dict[str, Tensor]:
    state = read_weights(path)
    for key in _WEIGHTS:
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no weights: expected a dictionary of tensors.")
    return clean_state_dict(state)
