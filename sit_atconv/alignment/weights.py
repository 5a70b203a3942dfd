"""Loads a local weights file into a timm encoder: a teacher, or one whose features are compared."""

import sys
from pathlib import Path

from timm.models import clean_state_dict
from torch import Tensor, nn

from sit_atconv.errors import InputError
from sit_atconv.runtime.weights import read_weights, require_finite

# The keys under which checkpoints keep an encoder's weights, best first: averaged ones, as timm chooses.
_WEIGHTS = ("teacher", "state_dict_ema", "model_ema", "model", "state_dict")


def load_into_timm(model: nn.Module, path: Path) -> dict[str, tuple[int, ...]]:
    """Load a file with timm's names, or with a release's names that timm can translate, into a timm model.

    Returns the shapes of the tensors in the file that the model does not have, such as those of a head. Raises
    `InputError` when the file cannot be read, holds another model's weights, or lacks some of this model's.
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
    require_finite(model.state_dict(), str(path))
    return {name: tuple(getattr(state[name], "shape", ())) for name in unexpected}


def _state(path: Path) -> dict[str, Tensor]:
    state = read_weights(path)
    for key in _WEIGHTS:
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} holds no weights: expected a dictionary of tensors.")
    return clean_state_dict(state)
