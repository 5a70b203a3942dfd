"""Features of images: the published Inception features, raw pixels, or those of a timm network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.inception import InceptionFeatures, require_uint8_images
from sit_atconv.evaluation.features.networks import NetworkFeatures
from sit_atconv.evaluation.features.presets import find_preset

MAX_DIMENSIONS = 4096  # the largest practical covariance: an eigenproblem of 4096 x 4096


class Features(Protocol):
    """A function from images to features, with its entries in the report.

    name: as chosen by the user. title: as displayed. suffix: distinguishes these metrics from the published ones, ""
    for Inception. identity: changes whenever the numbers may change. neighbours: k of precision and recall.
    neighbour_limit: their maximum number of points per side. remarks: what a reader must know before comparing these
    numbers with others, a sentence or two each. Inception's `dimensions` are by kind of feature.
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
    remarks: tuple[str, ...]

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]: ...


def create_features(
    name: str = "inception",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    fast: bool = False,
) -> Features:
    """Features by name: "inception", "pixels", a preset ("dinov2", "cmmd", "fdr-mae", …) or "timm:MODEL".

    `weights`: a local file; without one, Inception's and timm's published weights are downloaded. `fast`: bfloat16.
    Raises `InputError` for an unknown name, or weights that cannot be loaded.
    """
    if name == "inception":
        return InceptionFeatures(weights, device, fast)
    if name == "pixels":
        if weights is not None or fast:
            raise InputError("Pixels have no network: --weights and --fast have no effect with --features pixels.")
        return PixelFeatures(device)
    return NetworkFeatures(name, find_preset(name), weights, device, fast)


class PixelFeatures:
    """The pixels themselves, divided by 255 and flattened: {"pool": (B, 3 H W)}. Their distance is called FD-pixels."""

    name, title, suffix, identity = "pixels", "raw pixels", "_pixels", "pixels"
    neighbours, neighbour_limit = 3, 50_000
    weights_path = weights_sha256 = None
    fast = False
    remarks = ()

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
