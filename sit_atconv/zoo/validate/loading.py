"""Networks of timm by name or from a run's folder, and weights into them, each with a paragraph where it fails."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import sit_atconv.zoo  # noqa: F401, registers the networks
from sit_atconv.errors import InputError, nearest
from sit_atconv.runtime.reading import Count, read_json
from sit_atconv.runtime.weights import read_weights, require_finite
from sit_atconv.runtime.whole_files import followed, write_json
from sit_atconv.zoo.registration import require_fitting

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # timm's names in a folder, as on the hub
_RAW, _WRAPPED = "raw", ("model", "state_dict", "model_ema")  # keys of the release's files, the first one by default
_RUN_WEIGHTS, _RUN_PREFIX = "weights.safetensors", "model."


@dataclass(frozen=True)
class Description:
    """config.json of timm's folders: which network its weights are for."""

    architecture: str
    num_classes: Count
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None


def create_network(
    name: str, num_classes: int, options: Mapping[str, Any], cfg: Mapping[str, Any] | None = None
) -> nn.Module:
    """A network of timm with random weights; `cfg` overrides keys of its pretrained_cfg.

    Raises `InputError` for an unknown network, and for options that it does not take.
    """
    if not timm.is_model(name):
        raise InputError(f"There is no network '{name}': {_nearest_network(name)} docs/zoo.md lists ours.")
    try:
        return timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=dict(cfg or {}), **options)
    except InputError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:  # of any network's constructor
        raise InputError(f"{name} cannot be built with {dict(options)}: {error}") from None


def describe(folder: Path, description: Description) -> None:
    """Write the config.json of a folder, from which `timm.create_model("local-dir:FOLDER")` builds the network."""
    write_json(folder / CONFIG, vars(description))


def load_network(source: str, checkpoint: Path | None, weights: str | None, num_classes: int) -> nn.Module:
    """A network in eval mode, with weights.

    Args:
        source: a name of timm or ours, or the folder of a network as a run's checkpoint has it (model/).
        checkpoint: a file of weights for a network given by name; torch's or of safetensors.
        weights: "raw" for the weights in training beside a run's folder model/; otherwise the key of a file that holds
            several ("model_ema"), by default the first of model, state_dict and model_ema.
        num_classes: those of the data. A network given by name is built with as many.

    Raises `InputError` when network, weights and classes do not agree.
    """
    folder = followed(Path(source))
    if folder.is_dir():
        if checkpoint is not None:
            raise InputError(f"{source} is a folder with weights of its own: leave out --checkpoint.")
        return _load_folder(folder, weights, num_classes)
    if checkpoint is None:
        raise InputError(
            f"'{source}' is no folder of a network, and by name it has no weights: give them by --checkpoint FILE."
        )
    model = create_network(source, num_classes, {})
    load_weights(model, read_state(model, checkpoint, weights), checkpoint)
    return model.eval()


def read_state(model: nn.Module, path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file under the names of `model`. Raises `InputError` for a file that holds none."""
    if not path.is_file():
        raise InputError(f"{path} does not exist, or is no file of weights.")
    state = read_weights(path)
    held = {name: inner for name, inner in state.items() if isinstance(inner, dict)} if isinstance(state, dict) else {}
    if key is not None and key not in held:
        there = ", ".join(name for name in _WRAPPED if name in held) or "one set of weights only"
        raise InputError(f"{path} has no weights '{key}': it has {there}.")
    state = next((held[name] for name in (key, *_WRAPPED) if name in held), state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no weights by name: expected a state dict, alone or as {', '.join(_WRAPPED)}.")
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # where timm has them, too
    try:
        return translate(state, model) if translate else state
    except (RuntimeError, KeyError, ValueError, AssertionError, AttributeError) as error:  # weights of another network
        raise InputError(f"{path} has weights of another network than {type(model).__name__}: {error}.") from None


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, classifier_may_differ: bool = False
) -> None:
    """Load weights into a network. Raises `InputError` that says whether network or number of classes differ.

    With `classifier_may_differ` a classifier of other classes keeps its present weights.
    """
    state, own = dict(state), model.state_dict()
    classifier = model.pretrained_cfg["classifier"]
    heads = [f"{each}.{kind}" for each in _as_tuple(classifier) for kind in ("weight", "bias")]
    others = [head for head in heads if head in state and head in own and state[head].shape != own[head].shape]
    counts = [key for key in state.keys() | own.keys() if key.endswith("num_batches_tracked")]  # older files lack them
    require_fitting(model, state, [*others, *counts], f"The weights in {path}")
    if others and not classifier_may_differ:
        raise InputError(
            f"{path} is for {len(state[others[0]])} classes, but there are {len(own[others[0]])} in the data: give "
            "data with the classes that the network was trained on, in the same order."
        )
    for head in others:
        state.pop(head)
    require_finite(state, str(path))
    model.load_state_dict(state, strict=False)


def require_size(model: nn.Module, size: int, name: str) -> None:
    """Raise `InputError` unless the network, in eval mode, takes pictures of size×size."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:  # what a network says of a size is its own matter
        said = str(error).rstrip(".")
        raise InputError(f"{name} does not take pictures of {size}×{size}: {said}. Choose another size.") from None


def _load_folder(folder: Path, weights: str | None, num_classes: int) -> nn.Module:
    if not (folder / CONFIG).is_file():
        raise InputError(
            f"{folder} is no folder of a network: it has no {CONFIG}. A run's is checkpoints/latest/model."
        )
    known = read_json(folder / CONFIG, Description)
    if known.num_classes != num_classes:
        raise InputError(
            f"{folder} is for {known.num_classes} classes, but there are {num_classes} in the data: give data with the "
            "classes that the network was trained on, in the same order."
        )
    model = create_network(known.architecture, num_classes, known.model_args, known.pretrained_cfg)
    path = folder / WEIGHTS if weights is None else folder.parent / _RUN_WEIGHTS
    if weights not in (None, _RAW):
        raise InputError(
            f"--weights {weights}: the folder of a run has its average, and as '{_RAW}' those in training."
        )
    state = read_state(model, path)
    if weights == _RAW:
        state = {key.removeprefix(_RUN_PREFIX): tensor for key, tensor in state.items()}
    load_weights(model, state, path)
    return model.eval()


def _nearest_network(name: str) -> str:
    hint = nearest(name, timm.list_models())
    return hint.capitalize() if hint.startswith("did") else "timm.list_models() lists them."


def _as_tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
