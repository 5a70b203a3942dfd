"""Features of images: the published Inception features, raw pixels, or those of any timm model."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_data_config
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

from sit_atconv.alignment.weights import load_into_timm
from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.grouping import Grouped
from sit_atconv.evaluation.features.inception import InceptionFeatures, last_line, require_uint8_images
from sit_atconv.runtime.files import sha256_of_file

_DAMAGED = (pickle.UnpicklingError, SafetensorError, EOFError)  # reading a damaged download raises these
MAX_DIMENSIONS = 4096  # the largest practical covariance: an eigenproblem of 4096 x 4096


class Features(Protocol):
    """A function from images to features, with its entries in the report.

    name: as chosen by the user. title: as displayed. suffix: distinguishes these metrics from the published ones, ""
    for Inception. identity: changes whenever the numbers may change. neighbours: k of precision and recall.
    neighbour_limit: their maximum number of points per side. Inception's `dimensions` are by kind of feature.
    """

    name: str
    title: str
    suffix: str
    identity: str
    neighbours: int
    neighbour_limit: int
    device: torch.device
    weights_path: str | None
    weights_sha256: str | None
    fast: bool

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]: ...


def create_features(
    name: str = "inception",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    fast: bool = False,
) -> Features:
    """Features by name: "inception", "pixels" or "timm:MODEL".

    `weights`: a local file; without one, Inception's and timm's published weights are downloaded. `fast`: bfloat16.
    Raises `InputError` for an unknown name, or weights that cannot be loaded.
    """
    if name == "inception":
        return InceptionFeatures(weights, device, fast)
    if name == "pixels":
        if weights is not None or fast:
            raise InputError("Pixels have no network: --weights and --fast have no effect with --features pixels.")
        return PixelFeatures(device)
    if name.startswith("timm:"):
        return TimmFeatures(name.removeprefix("timm:"), weights, device, fast)
    raise InputError(f"Unknown features '{name}'. Expected inception, pixels, or timm:MODEL.")


class PixelFeatures:
    """The pixels themselves, divided by 255 and flattened: {"pool": (B, 3 H W)}. Their distance is called FD-pixels."""

    name, title, suffix, identity = "pixels", "raw pixels", "_pixels", "pixels"
    neighbours, neighbour_limit = 3, 50_000
    weights_path = weights_sha256 = None
    fast = False

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Pixels of uint8 images (B, 3, H, W), H W <= 1365."""
        require_uint8_images(images)
        if images[0].numel() > MAX_DIMENSIONS:
            raise InputError(
                f"Raw pixels of {images.shape[3]}x{images.shape[2]} images have {images[0].numel()} dimensions, "
                f"too many for a covariance (at most {MAX_DIMENSIONS}, as 36x36). Use --features inception."
            )
        return {"pool": images.to(self.device).flatten(1).float() / 255}


class TimmFeatures:
    """Pooled features of a timm model: {"pool": (B, d)}.

    Images are resized without cropping (bicubic, antialiased, on bytes, like PIL) to the model's input size and
    normalised as in its training. DINOv2 models get 224 x 224 and give their class token, as in dgm-eval (Stein et al.
    2023), whose k = 5 and 10,000 points per side are used for precision and recall.
    """

    neighbours, neighbour_limit = 5, 10_000

    def __init__(self, model: str, weights: str | Path | None, device: str | torch.device, fast: bool = False) -> None:
        self.name, self.title = f"timm:{model}", f"timm {model}"
        self.suffix = "_dinov2" if "dinov2" in model else f"_{model}"
        self.device, self.fast = torch.device(device), fast
        self._model = _create_timm(model, weights, 224 if "dinov2" in model else None).to(self.device)
        config = resolve_data_config({}, model=self._model)
        self._size = (224, 224) if "dinov2" in model else config["input_size"][1:]
        self._mean, self._std = list(config["mean"]), list(config["std"])
        self.weights_path = None if weights is None else str(weights)
        self.weights_sha256 = None if weights is None else sha256_of_file(weights)
        self._grouped = Grouped(self._forward, self.device, 8 if self.device.type == "cpu" else 64)
        source = self.weights_sha256 or self._model.pretrained_cfg.get("tag")
        self.identity = f"{self.name} {source} {self._size} {'bf16' if fast else 'fp32'}"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of uint8 images (B, 3, H, W)."""
        require_uint8_images(images)
        return self._grouped(images)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        small = resize(images, list(self._size), InterpolationMode.BICUBIC, antialias=True)
        x = normalize(small.float() / 255, self._mean, self._std)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
            pool = self._model.forward_head(self._model.forward_features(x), pre_logits=True)
        return {"pool": pool.float()}


def _create_timm(name: str, weights: str | Path | None, size: int | None) -> torch.nn.Module:
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "see timm.list_models()"
        raise InputError(f"timm has no model '{name}' ({near}).")
    if weights is not None and not Path(weights).is_file():
        raise InputError(f"There is no weights file {weights}.")
    options = {"num_classes": 0, **({"img_size": size} if size else {})}
    try:
        model = timm.create_model(name, pretrained=weights is None, **options)
    except (OSError, RuntimeError, ValueError, LookupError, *_DAMAGED) as error:
        raise InputError(
            f"Cannot load {name} from the model hub ({type(error).__name__}: {last_line(error)}). "
            "Name a local file of its weights with --weights."
        ) from error
    if weights is not None:
        _fill(model, name, Path(weights))
    return model.eval().requires_grad_(False)


def _fill(model: torch.nn.Module, name: str, path: Path) -> None:
    """Load a local file of exactly this model: the file of a deeper one holds all of its tensors, too."""
    unexpected = load_into_timm(model, path)
    if unexpected:
        raise InputError(
            f"Cannot load {name} from {path}: the model does not have {len(unexpected)} of its tensors "
            f"({', '.join(unexpected[:3])}). Name a file of this model without a head (num_classes=0) with --weights."
        )
