"""Frozen vision encoders from timm with whose patch tokens a diffusion model is aligned (REPA)."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sit_atconv.alignment.cached import TeacherSpec
from sit_atconv.alignment.tokens import resample_tokens
from sit_atconv.alignment.weights import load_into_timm
from sit_atconv.errors import InputError, nearest
from sit_atconv.runtime.files import sha256_of_file

# Teachers get one patch for every 16 pixels: with patch 14 a picture of 256 px is resized to 224, with 16 it is kept.
_PIXELS_PER_TOKEN = 16
_RANDOM_SEED = 0


class Teacher:
    """A frozen timm vision transformer that computes patch tokens of pictures in every training step.

    `weights` is "hub" (downloaded by timm), "random" (the same on every machine; for trials) or a local file
    (.safetensors, or a torch checkpoint that holds only tensors). Runs in bf16 on CUDA. `dim` is the tokens' width.
    Raises `InputError` for an unknown name, a model without patch tokens, or weights that do not fit.
    """

    key = "image"  # the entry of a batch that it needs

    def __init__(self, name: str, weights: str, device: str | torch.device = "cpu") -> None:
        self.name, self.weights, self.device = name, weights, torch.device(device)
        self._model = _create(name, weights).eval().requires_grad_(False).to(self.device)
        self._patch: int = self._model.patch_embed.patch_size[0]
        self.dim: int = self._model.embed_dim
        config = self._model.pretrained_cfg
        self._mean = torch.tensor(config["mean"], device=self.device).view(-1, 1, 1)
        self._std = torch.tensor(config["std"], device=self.device).view(-1, 1, 1)

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which pictures are resized for the teacher: one patch per 16 pixels, 256 -> 224 for patch 14."""
        return tuple(self._patch * max(1, round(side / _PIXELS_PER_TOKEN)) for side in (height, width))

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> the teacher's input: scaled to [0, 1], then normalised, then resized."""
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        size = self.input_size(*images.shape[-2:])
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bicubic")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the teacher's own tokens for pictures of this size."""
        rows, columns = self.input_size(height, width)
        return rows // self._patch, columns // self._patch

    def spec(self, height: int, width: int, flip: bool) -> TeacherSpec:
        """The description saved with tokens of pictures of this size; with `flip`, of mirrored pictures as well."""
        is_file = self.weights not in ("hub", "random")
        digest = sha256_of_file(Path(self.weights)) if is_file else None
        return TeacherSpec(self.name, self.weights, digest, self.dim, self.grid(height, width), flip)

    @torch.no_grad()
    def own_tokens(self, images: Tensor) -> Tensor:
        """Patch tokens after the final norm, on the teacher's own grid; class and register tokens are dropped.

        uint8 pictures (B, 3, H, W) -> (B, N, dim) fp32.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"A teacher sees uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}.")
        x = self.preprocess(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            tokens = self._model.forward_features(x)[:, self._model.num_prefix_tokens :]
            # Models that pool before the last norm (timm's fc_norm) leave their tokens unnormalised.
            if isinstance(self._model.norm, nn.Identity):
                tokens = self._model.fc_norm(tokens)
        return tokens.float()

    def tokens(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """`own_tokens`, resampled bilinearly to `grid` (h, w): (B, h·w, dim) fp32."""
        return resample_tokens(self.own_tokens(images), self.grid(*images.shape[-2:]), grid)

    def targets(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h·w, dim) fp32 on `grid` (h, w), from pictures batch[key] (B, 3, H, W) uint8."""
        return self.tokens(batch[self.key], grid)


def _create(name: str, weights: str) -> nn.Module:
    """A timm ViT for pictures of any size, with its weights."""
    if ":" not in name and not timm.is_model(name):
        family = timm.list_models(f"{name.split('_')[0]}*") or timm.list_models("vit_*")
        raise InputError(f"timm {timm.__version__} has no model '{name}': {nearest(name.split('.')[0], family[:400])}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_RANDOM_SEED)
            model = timm.create_model(name, pretrained=weights == "hub", num_classes=0, dynamic_img_size=True)
    except TypeError as error:
        raise InputError(f"Teacher '{name}' is not a vision transformer that takes pictures of any size.") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"Teacher '{name}' cannot be loaded from the hub ({reason}). Download its weights elsewhere and give the "
            "file as the teacher's weights."
        ) from error
    if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
        raise InputError(f"Teacher '{name}' has no patch tokens: give a vision transformer, such as those of DINOv2.")
    if weights not in ("hub", "random"):
        if not Path(weights).is_file():
            raise InputError(f"Teacher weights '{weights}' are not a file. Give a file, 'hub' or 'random'.")
        load_into_timm(model, Path(weights))
    return model
