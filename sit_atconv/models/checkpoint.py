"""Opens a saved model; errors say what is wrong with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file

from sit_atconv.errors import InputError
from sit_atconv.models.sit import SiT
from sit_atconv.runtime.reading import Count, read_json
from sit_atconv.runtime.weights import require_finite, require_floats
from sit_atconv.runtime.whole_files import followed

RAW = "raw"  # what the weights in training are called, beside the names of averages
NOTABLE_SHARE = 0.01  # of an average: more of the weights that training began with is pointed out

_ADVICE = "The checkpoint is damaged: copy it again."
_POSITION, _RAW_FILE, _RAW_PREFIX = "position.json", "weights.safetensors", "model."  # as training.state writes them

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
    label_dropout: Annotated[float, Meta(ge=0, le=1)] = 0.1
    empty_classes: list[Annotated[int, Meta(ge=0, le=MOST_CLASSES)]] | None = None
    norm: str = "layer"
    mlp: str = "gelu"
    internal_block: Annotated[int, Meta(ge=1, le=1_000)] | None = None
    meanflow_blocks: Annotated[int, Meta(ge=1, le=1_000)] | None = None


@dataclass(frozen=True)
class PositionFile:
    """The part of a checkpoint's position.json about its weights, which earlier versions lack.

    weights: the averages by name, the first of them in model/, and the share in each of the weights that training began
    with.
    """

    step: Count
    weights: dict[str, Annotated[float, Meta(ge=0, le=1)]] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Some of the weights of a checkpoint, or those of a model by itself.

    folder: a model's directory. file: weights to load instead of those in it. name: "raw" for the weights in training,
    an average's name, or None for a model by itself. step: of the checkpoint. first_share: the share in the average of
    the weights that training began with.
    """

    folder: Path
    file: Path | None = None
    name: str | None = None
    step: int | None = None
    first_share: float = 0.0

    @property
    def files(self) -> list[Path]:
        """The files that determine the model: its configuration and its weights."""
        weights = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("*.bin"))
        return [self.folder / "config.json", *([self.file] if self.file else weights)]

    def __str__(self) -> str:
        """Such as "the average 0.9999 of step 300, 97 % of which are the weights that training began with"."""
        if self.name is None:
            return "the weights of the model"
        what = "the weights in training" if self.name == RAW else f"the average {self.name}"
        begun = f", {percent(self.first_share)} of which are the weights that training began with"
        return f"{what} of step {self.step}" + (begun if self.first_share > NOTABLE_SHARE else "")


@dataclass(frozen=True)
class WeightIndex:
    """The index of weights that are split over several files: which file holds each tensor."""

    weight_map: dict[str, str]


def model_directory(path: Path) -> Path:
    """The model's directory: model/ in a checkpoint, transformer/ in a saved pipeline, or `path` itself."""
    path = followed(path)
    return next((path / name for name in ("model", "transformer") if (path / name / "config.json").exists()), path)


def percent(share: float) -> str:
    """A share to three digits: "36.8 %"."""
    return f"{100 * share:.3g} %"


def find_weights(path: str | Path, name: str | None = None) -> Weights:
    """The weights called `name`, "raw" or an average, of a checkpoint: `path` is its own or that of a model in it.

    None: the weights at `path`, which may be any model. Raises `InputError` for a name that a checkpoint does not hold.
    """
    path = Path(path)
    checkpoint = next((place for place in (path, path.resolve().parent) if (place / _POSITION).is_file()), None)
    if checkpoint is None:
        if name is None:
            return Weights(model_directory(path))
        raise InputError(
            f"{path} is a model by itself and not in a checkpoint, so there are no weights '{name}' beside it: give a "
            "checkpoint of a run (RUN/checkpoints/latest), or leave out which weights."
        )
    position = read_json(checkpoint / _POSITION, PositionFile, _ADVICE)
    folders = {average: f"model-{average}" if i else "model" for i, average in enumerate(position.weights)}
    # Earlier versions did not note the name of the average in model/
    folders = folders or {place.name.removeprefix("model-"): place.name for place in sorted(checkpoint.glob("model-*"))}
    held = {average: Weights(checkpoint / folder, name=average) for average, folder in folders.items()}
    if (checkpoint / _RAW_FILE).is_file():
        held[RAW] = Weights(checkpoint / "model", checkpoint / _RAW_FILE, RAW)
    if name is None:
        folder = model_directory(path)
        same = (each for each in held.values() if not each.file and each.folder.resolve() == folder.resolve())
        chosen = next(same, Weights(folder))
    elif name in held:
        chosen = held[name]
    else:
        raise InputError(f"{checkpoint} holds no weights '{name}'; it holds {', '.join(held) or 'none with a name'}.")
    return replace(chosen, step=position.step, first_share=position.weights.get(chosen.name, 0.0))


def load_model(path: str | Path, weights: str | None = None) -> SiT:
    """Open a `model/` directory (config.json and safetensors), a checkpoint or a saved pipeline, in eval mode.

    `weights` chooses among those of a checkpoint, see `find_weights`. Raises `InputError` when there is no model, when
    it is not a SiT, or when its weights are damaged or do not fit.
    """
    found = find_weights(path, weights)
    directory = found.folder
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
    if found.file is not None:
        return _load_raw(directory, found.file)
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
    _leave_the_file(model)
    return model.eval()


def _leave_the_file(model: SiT) -> None:
    """Copy the weights out of the mapped file, where they are not aligned: kernels may then sum in another order.

    A model from a file computes what it computed before it was saved, to the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):  # one by one, so that memory never holds two of all
        tensor.data = tensor.data.clone()


def _load_raw(directory: Path, file: Path) -> SiT:
    """The model of `directory` with the weights in training, which `file` holds beside those of projectors."""
    try:
        require_floats(file)
        tensors = {name: tensor for name, tensor in load_file(file).items() if name.startswith(_RAW_PREFIX)}
        model = SiT.from_config(SiT.load_config(directory))
        model.load_state_dict({name.removeprefix(_RAW_PREFIX): tensor for name, tensor in tensors.items()})
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"The weights in {file} cannot be loaded: {error}") from None
    require_finite(model.state_dict(), str(file))
    return model.eval()
