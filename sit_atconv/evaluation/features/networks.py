"""Features of a timm network: what it is shown, and which of its numbers they are."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

from sit_atconv.alignment.weights import load_into_timm
from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.grouping import Grouped
from sit_atconv.evaluation.features.inception import last_line, require_uint8_images
from sit_atconv.runtime.files import sha256_of_file

_DAMAGED = (pickle.UnpicklingError, SafetensorError, EOFError)  # reading a damaged download raises these


@dataclass(frozen=True)
class Preset:
    """A network with its preprocessing.

    model: timm's name, with the tag of its weights. suffix: of the metrics' names. remarks: what a reader must know
    before comparing these numbers with others.
    size: side of the input in pixels, for which the network is built; None takes the model's own.
    crop: to the square in the centre, before resizing.
    resize: antialiased bicubic, on "bytes" like PIL, or on "floats" in [0, 1], neither clamped nor rounded.
    padded: the network is built for its own size, resamples its position embeddings for `size`, and pads the input with
    zeros, right and below, to whole patches.
    features: "pooled" as the model's classifier gets them, (B, d); "mean" over H and W of the last feature map, without
    the head's norm; "projection", the output of the model's head, divided by its Euclidean norm.
    neighbours, neighbour_limit: k of precision and recall, and their maximum number of points per side.
    """

    model: str
    suffix: str
    size: int | None = None
    crop: bool = False
    resize: Literal["bytes", "floats"] = "bytes"
    padded: bool = False
    features: Literal["pooled", "mean", "projection"] = "pooled"
    neighbours: int = 5
    neighbour_limit: int = 10_000
    remarks: tuple[str, ...] = ()

    def deviations(self) -> str:
        """How this differs from pooled features of whole images, resized on bytes: a part of the cache's key."""
        named = {"crop": self.crop, "floats": self.resize == "floats", "padded": self.padded}
        words = [word for word, holds in named.items() if holds]
        return " ".join([*words, *({self.features} - {"pooled"})])


class NetworkFeatures:
    """Features of a timm model as a preset describes them: {"pool": (B, d)}, float32.

    Args:
        name: as the user chose it.
        preset: the model, and what it is shown.
        weights: a local file of the model's weights; None downloads what timm publishes.
        device: to run on. Of bytes resized from squares, 0.5 % differ from PIL's by 1 or 2 on a CPU. A GPU rounds once,
            not twice: about a fifth of the bytes differ, by 0.2 on average over all.
        fast: bfloat16 autocast.

    Raises:
        InputError: when timm has no such model, or the weights are missing, damaged, or another model's.
    """

    def __init__(
        self, name: str, preset: Preset, weights: str | Path | None, device: str | torch.device, fast: bool = False
    ) -> None:
        model = preset.model
        self.name, self.title = name, f"timm {model}" if name.startswith("timm:") else f"{name} (timm {model})"
        self.suffix, self.neighbours, self.neighbour_limit = preset.suffix, preset.neighbours, preset.neighbour_limit
        self.device, self.fast, self._preset = torch.device(device), fast, preset
        self._model = _create(preset, weights).to(self.device)
        config = resolve_data_config({}, model=self._model)
        self._size = (preset.size, preset.size) if preset.size else config["input_size"][1:]
        self._mean, self._std = list(config["mean"]), list(config["std"])
        self.weights_path = None if weights is None else str(weights)
        self.weights_sha256 = None if weights is None else sha256_of_file(weights)
        self._grouped = Grouped(self._forward, self.device, 8 if self.device.type == "cpu" else 64)
        source = self.weights_sha256 or self._model.pretrained_cfg.get("tag")
        precision = "bf16" if fast else "fp32"
        self.identity = f"timm:{model} {source} {self._size} {precision} {preset.deviations()}".rstrip()
        self.remarks = preset.remarks + _about_license(self._model, model)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, 3, H, W)."""
        require_uint8_images(images)
        return self._grouped(images)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self._input(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            x = self._model.forward_features(x)
            if self._preset.features == "mean":
                pool = x.mean((2, 3))
            else:
                pool = self._model.forward_head(x, pre_logits=self._preset.features == "pooled")
        pool = pool.float()
        return {"pool": nn.functional.normalize(pool) if self._preset.features == "projection" else pool}

    def _input(self, images: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) -> input of the network, (B, 3, size, size)."""
        if self._preset.crop:
            images = centre_square(images)
        if self._preset.resize == "floats":
            x = interpolate(images.float() / 255, self._size, mode="bicubic", align_corners=False, antialias=True)
        else:
            x = resize(images, list(self._size), InterpolationMode.BICUBIC, antialias=True).float() / 255
        return normalize(x, self._mean, self._std)


def centre_square(images: Tensor) -> Tensor:
    """Images (B, C, H, W) -> (B, C, S, S), S = min(H, W). An odd remainder is cut at the right or below."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def _about_license(model: nn.Module, name: str) -> tuple[str, ...]:
    terms = str(model.pretrained_cfg.get("license"))
    return (f"The weights of {name} are for non-commercial use only ({terms}).",) if "-nc" in terms else ()


def require_model(name: str) -> None:
    """Raise `InputError` unless timm has a model of this name."""
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "see timm.list_models()"
        raise InputError(f"timm has no model '{name}' ({near}).")


def _create(preset: Preset, weights: str | Path | None) -> nn.Module:
    """The preset's model with its weights, in evaluation mode."""
    require_model(preset.model)
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"There is no weights file {weights}.")
    try:
        model = timm.create_model(preset.model, pretrained=weights is None, **model_options(preset))
    except (OSError, RuntimeError, ValueError, LookupError, *_DAMAGED) as error:
        raise InputError(
            f"Cannot load {preset.model} from the model hub ({type(error).__name__}: {last_line(error)}). "
            "Name a local file of its weights with --weights."
        ) from error
    if weights is not None:
        _fill(model, preset, Path(weights))
    return model.eval().requires_grad_(False)


def model_options(preset: Preset) -> dict[str, int | bool]:
    """Options of `timm.create_model` for a preset."""
    options = {} if preset.features == "projection" else {"num_classes": 0}
    if preset.padded:
        return {**options, "dynamic_img_size": True, "dynamic_img_pad": True}
    return {**options, "img_size": preset.size} if preset.size else options


def _fill(model: nn.Module, preset: Preset, path: Path) -> None:
    """Load a local file of exactly this model: the file of a deeper one holds all of its tensors, too.

    The head that timm publishes with the model may be there, since published files have it.
    """
    head = " with its head, the projection," if preset.features == "projection" else ""
    advice = f"Name a file of this model{head} with --weights."
    try:
        unexpected = load_into_timm(model, path)
    except InputError as error:
        raise InputError(f"Cannot load {preset.model}: {error} {advice}") from error
    published = model.pretrained_cfg
    head, classes = f"{published.get('classifier')}.", published.get("num_classes")
    if unexpected := [n for n, shape in unexpected.items() if not (n.startswith(head) and shape[:1] == (classes,))]:
        raise InputError(
            f"Cannot load {preset.model} from {path}: the model does not have {len(unexpected)} of its tensors "
            f"({', '.join(unexpected[:3])}). {advice}"
        )
