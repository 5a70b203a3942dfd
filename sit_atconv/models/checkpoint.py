"""Opens a saved model; errors say what is wrong with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from msgspec import Meta
from safetensors import SafetensorError

from sit_atconv.errors import InputError
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.reading import read_json
from sit_atconv.runtime.weights import require_finite, require_floats
from sit_atconv.runtime.whole_files import followed

_ADVICE = "The checkpoint is damaged: copy it again."

MOST_SIDE, MOST_WIDTH, MOST_CLASSES = 4_096, 65_536, 1_000_000
Size = Annotated[int, Meta(ge=1, le=MOST_SIDE)]
Number = Annotated[int, Meta(ge=1, le=MOST_WIDTH)]


@dataclass(frozen=True)
class ClassName:
    """The model class that a config.json names."""

    _class_name: str | None = None


@dataclass(frozen=True)
class ModelFile(ClassName):
    """config.json of a model: the arguments of `SiT`, with its defaults for absent ones."""

    # A list, since msgspec 0.23 crashes on a union of a fixed-length tuple and a number with a range.
    input_size: Size | Annotated[list[Size], Meta(min_length=2, max_length=2)] = 32
    patch_size: Size = 2
    in_channels: Number = 4
    hidden_size: Number = 1152
    depth: Annotated[int, Meta(ge=1, le=1_000)] = 28
    num_heads: Number = 16
    mlp_ratio: Annotated[float, Meta(gt=0, le=64)] = 4.0
    num_classes: Annotated[int, Meta(ge=0, le=MOST_CLASSES)] = 1000
    mixer_pattern: str | list[str | Mapping[str, Any]] = "attention"
    kernel_size: Size = 3
    pool: str = "grid"
    activation: str = "gelu"
    position: str = "sincos"
    interpolant: str = "linear"
    prediction: str = "velocity"
    latents: dict[str, Any] | None = None
    class_names: list[str] | None = None


@dataclass(frozen=True)
class WeightIndex:
    """The index of weights that are split over several files: which file holds each tensor."""

    weight_map: dict[str, str]


def model_directory(path: Path) -> Path:
    """The model's directory: model/ in a checkpoint, transformer/ in a saved pipeline, or `path` itself."""
    path = followed(path)
    return next((path / name for name in ("model", "transformer") if (path / name / "config.json").exists()), path)


def load_model(path: str | Path) -> SiT:
    """Open a `model/` directory (config.json and safetensors), a checkpoint or a saved pipeline, in eval mode.

    Raises `InputError` when there is none, when it is not a SiT, or when its weights are damaged or do not fit.
    """
    path = Path(path)
    directory = model_directory(path)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise InputError(
            f"{path} is not a checkpoint: there is no config.json in it. Give a directory written by training "
            "(RUN/checkpoints/latest/model) or by SiT.save_pretrained."
        )
    class_name = read_json(config_path, ClassName, _ADVICE)._class_name
    if class_name != "SiT":
        raise InputError(f"{directory} holds a {class_name or 'model without a class name'}, not a SiT.")
    read_json(config_path, ModelFile, _ADVICE)
    weights = directory / SAFETENSORS_WEIGHTS_NAME
    index = directory / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
    if not weights.exists() and not index.exists():
        raise InputError(
            f"{directory} has no weights: {SAFETENSORS_WEIGHTS_NAME} is missing, the checkpoint is incomplete."
        )
    if index.exists():
        read_json(index, WeightIndex, _ADVICE)
    try:
        if "quantization_config" not in read_json(config_path, dict[str, Any], _ADVICE):  # which diffusers understands
            for file in sorted(directory.glob("*.safetensors")):
                require_floats(file)
        model, report = SiT.from_pretrained(directory, local_files_only=True, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"The model in {directory} cannot be loaded: {error}") from None
    missing = report["missing_keys"]
    if missing:
        raise InputError(f"The weights in {directory} lack {len(missing)} tensors, {sorted(missing)[0]} first.")
    require_finite(model.state_dict(), str(directory))
    return model.eval()
