"""Autoencoders between pictures and latents: diffusers' KL, tiny and deep-compression ones, and the identity.

A `LatentSpec` describes which autoencoder made latents and how they are normalised. It is saved with the data and with
every checkpoint, so that latents of one autoencoder are never decoded by another.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from msgspec import Meta
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.reading import Finite, Text, read_json, require_known_keys, understand
from sit_atconv.runtime.weights import require_finite, require_floats

IDENTITY = "identity"
WEIGHT_FILES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
Channels = Annotated[int, Meta(ge=1, le=65_536)]
_Blocks = Annotated[list[Channels], Meta(min_length=1, max_length=32)]
_Layers = Annotated[int, Meta(ge=0, le=256)]
Scale = Annotated[float, Meta(gt=0, le=1e300)]
# Luma of ITU-R BT.601, as in PIL's conversion to grey.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class LatentSpec:
    """Describes latents. Normalised latents are (z - shift) · scale; both may be given per channel.

    `autoencoder` is "identity" (pixels), a hub id or a path. `weights_hash` is the sha256 of its weights file, None for
    the identity or if unknown. `downscale` is the number of pixels per latent along each side. `statistics` says that
    scale and shift are those of data and not the autoencoder's own; `unit_range`, that the autoencoder was given
    pictures in [0, 1] instead of [-1, 1], and decodes to them.
    """

    autoencoder: Text
    weights_hash: str | None
    channels: Channels
    downscale: Annotated[int, Meta(ge=1, le=1_024)]
    scale: Scale | tuple[Scale, ...] = 1.0
    shift: Finite | tuple[Finite, ...] = 0.0
    statistics: bool = False
    unit_range: bool = False

    def normalise(self, z: Tensor) -> Tensor:
        """(z - shift) · scale for z of shape (..., C, H, W)."""
        return (z - _per_channel(self.shift, z)) * _per_channel(self.scale, z)

    def denormalise(self, z: Tensor) -> Tensor:
        """z / scale + shift: from the model's normalised latents to the decoder's input."""
        return z / _per_channel(self.scale, z) + _per_channel(self.shift, z)

    def given(self, images: Tensor) -> Tensor:
        """What the autoencoder is given for pictures in [-1, 1]."""
        return images / 2 + 0.5 if self.unit_range else images

    def pictures(self, decoded: Tensor) -> Tensor:
        """The pictures in [-1, 1] that the autoencoder's output means."""
        return decoded * 2 - 1 if self.unit_range else decoded

    def of(self, autoencoder: "LatentSpec") -> "LatentSpec":
        """These latents as an autoencoder makes them: its specification, with what is not the autoencoder's own."""
        own = {"scale": self.scale, "shift": self.shift, "statistics": True} if self.statistics else {}
        return replace(autoencoder, unit_range=self.unit_range, **own)

    def to_dict(self) -> dict:
        """A JSON-serialisable dictionary without the flags that are not set; `from_dict` is the inverse."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value is not False}

    @classmethod
    def from_dict(cls, values: Mapping, what: str = "The description of latents", advice: str = "") -> "LatentSpec":
        """The inverse of `to_dict`. Raises `InputError` for missing or unknown keys and invalid values."""
        spec = understand(values, cls, what, advice)
        require_known_keys(values, cls, what)
        for name, value in (("scale", spec.scale), ("shift", spec.shift)):
            if isinstance(value, tuple) and len(value) != spec.channels:
                found = f"{len(value)} numbers for {spec.channels} channels"
                raise InputError(f"{what}: {name}: {found}. {advice}".rstrip())
        return spec

    def require_same(self, other: "LatentSpec", mine: str, theirs: str) -> None:
        """Raise `InputError` unless both describe the same latents; `mine`, `theirs` name them ("the data", …).

        Different paths to the same weights are allowed. Unknown weights (data prepared elsewhere) are trusted if
        channels and normalisation agree.
        """
        a, b = self.to_dict(), other.to_dict()
        keys = ["channels", "downscale", "scale", "shift", "unit_range"]
        if self.weights_hash and other.weights_hash:
            keys.append("weights_hash")
        elif self.weights_hash == other.weights_hash or IDENTITY in (self.autoencoder, other.autoencoder):
            keys.append("autoencoder")
        differing = [f"{key}: {a.get(key)} against {b.get(key)}" for key in keys if a.get(key) != b.get(key)]
        if differing:
            raise InputError(
                f"The latents of {mine} (autoencoder {self.autoencoder}) and of {theirs} (autoencoder "
                f"{other.autoencoder}) differ in {'; '.join(differing)}. Use the autoencoder that made the data."
            )


def sample_posterior(moments: Tensor, noise: Tensor, spec: LatentSpec) -> Tensor:
    """Normalised latents (mean + std · noise - shift) · scale in fp32, on the device of `moments`.

    moments: (B, 2C, H, W), mean and standard deviation; noise: (B, C, H, W) standard normal.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return spec.normalise(torch.addcmul(mean, std, noise.to(mean)))


class Autoencoder(ABC):
    """Encodes pictures in [-1, 1], always RGB (B, 3, H, W), to moments of latents, and decodes latents."""

    def __init__(self, spec: LatentSpec) -> None:
        self.spec = spec

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Moments (B, 2C, H/downscale, W/downscale) fp32: posterior mean and standard deviation (0: deterministic)."""
        self.require_divisible(*images.shape[-2:])
        return self._encode(self.spec.given(images)).float()

    def require_divisible(self, height: int, width: int) -> None:
        """Raise `InputError` unless height and width are multiples of `downscale`."""
        factor = self.spec.downscale
        if height % factor or width % factor:
            raise InputError(
                f"Autoencoder {self.spec.autoencoder} works on multiples of {factor} pixels, not {height}x{width}: try "
                f"{max(1, round(height / factor)) * factor}x{max(1, round(width / factor)) * factor}."
            )

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Decode normalised latents (B, C, h, w) to pictures (B, 3, H, W) fp32 in [-1, 1], in batches of `chunk`."""
        if latents.ndim != 4 or latents.shape[1] != self.spec.channels:
            raise InputError(
                f"Autoencoder {self.spec.autoencoder} decodes latents of {self.spec.channels} channels (B, C, H, W), "
                f"not of shape {tuple(latents.shape)}: was the model trained on latents of another autoencoder?"
            )
        parts = latents.split(chunk) if chunk else (latents,)
        decoded = (self._decode(self.spec.denormalise(part.float())).float() for part in parts)
        return torch.cat([self.spec.pictures(part).clamp(-1, 1) for part in decoded])

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the computation; inputs may be on any device."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class IdentityAutoencoder(Autoencoder):
    """The latents are the pixels: 3 channels, or 1 (grey, repeated to RGB when decoded)."""

    def __init__(self, channels: int = 3, device: str | torch.device = "cpu") -> None:
        if channels not in (1, 3):
            raise InputError(f"The identity autoencoder has 3 channels (RGB) or 1 (grey), not {channels}.")
        super().__init__(LatentSpec(IDENTITY, None, channels, 1))
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device

    def _encode(self, images: Tensor) -> Tensor:
        images = images.to(self._device).float()
        if self.spec.channels == 1:
            images = torch.einsum("bchw,c->bhw", images, images.new_tensor(_LUMA)).unsqueeze(1)
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return latents.to(self._device).expand(-1, 3, -1, -1)


class DiffusersAutoencoder(Autoencoder):
    """A frozen diffusers `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, in `module`."""

    def __init__(self, spec: LatentSpec, module: torch.nn.Module) -> None:
        super().__init__(spec)
        # Channels last: a quarter faster for TAESD on a CPU, and the preferred layout of convolutions on GPUs.
        self.module = module.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.module.device

    def _encode(self, images: Tensor) -> Tensor:
        encoded = self.module.encode(images.to(self.module.device, self.module.dtype))
        if hasattr(encoded, "latent_dist"):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)
        mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents.to(self.module.device, self.module.dtype)).sample


@dataclass(frozen=True)
class AutoencoderFile:
    """The keys of an autoencoder's config.json about its size and latents; no class has all of them."""

    _class_name: str | None = None
    scaling_factor: Scale | None = None
    shift_factor: Finite | None = None
    latents_mean: list[Finite] | None = None
    latents_std: list[Scale] | None = None
    latent_channels: Channels | None = None
    in_channels: Channels | None = None
    out_channels: Channels | None = None
    block_out_channels: _Blocks | None = None
    encoder_block_out_channels: _Blocks | None = None
    decoder_block_out_channels: _Blocks | None = None
    layers_per_block: _Layers | None = None
    encoder_layers_per_block: list[_Layers] | None = None
    decoder_layers_per_block: list[_Layers] | None = None
    num_encoder_blocks: list[_Layers] | None = None
    num_decoder_blocks: list[_Layers] | None = None


def load_autoencoder(
    spec_or_name: LatentSpec | str,
    *,
    channels: int | None = None,
    location: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Autoencoder:
    """Open an autoencoder by name ("identity", hub id, hub id/subfolder, or a local folder) or by specification.

    `channels` chooses grey or RGB for the identity. `location` is the place of the weights if a specification's own
    path belongs to another machine. Raises `InputError` when the weights are missing, of an unsupported kind, or not
    those of the specification.
    """
    wanted = spec_or_name if isinstance(spec_or_name, LatentSpec) else None
    name = location or (wanted.autoencoder if wanted else str(spec_or_name))
    if name == IDENTITY:
        loaded: Autoencoder = IdentityAutoencoder(channels or (wanted.channels if wanted else 3), device)
    else:
        loaded = _load_diffusers(name, device, dtype)
        if channels not in (None, loaded.spec.channels):
            raise InputError(f"Autoencoder {name} has {loaded.spec.channels} latent channels, not {channels}.")
    if wanted is not None:
        wanted.require_same(wanted.of(loaded.spec), "the data or checkpoint", name)
        loaded.spec = wanted
    return loaded


def _load_diffusers(name: str, device: str | torch.device, dtype: torch.dtype) -> DiffusersAutoencoder:
    import diffusers

    folder, weights = _locate(name)
    path = folder / "config.json"
    kind = read_json(path, AutoencoderFile, "Fetch the autoencoder again.")._class_name
    if kind not in ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"):
        raise InputError(
            f"{name} is a {kind or 'model without a _class_name'}, not one of the supported image autoencoders of "
            "diffusers: AutoencoderKL, AutoencoderTiny, AutoencoderDC."
        )
    # diffusers warns about config keys that it wrote itself (AutoencoderTiny's block_out_channels).
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        if _is_safe(weights) and "quantization_config" not in read_json(path, dict[str, Any]):  # diffusers' own affair
            require_floats(weights)
        module = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=dtype, use_safetensors=_is_safe(weights))
        require_finite(module.state_dict(), name)
    except InputError:
        raise
    except Exception as error:  # damaged values of its config.json lead diffusers into nearly any of them
        raise InputError(f"Cannot load autoencoder {name} ({type(error).__name__}: {error}).") from error
    finally:
        diffusers.logging.set_verbosity(verbosity)
    return DiffusersAutoencoder(_spec_from_config(name, sha256_of_file(weights), module.config), module.to(device))


def _spec_from_config(name: str, weights_hash: str, config: Mapping) -> LatentSpec:
    """The specification from a diffusers config: (z - shift_factor) · scaling_factor, or normalised per channel.

    With `latents_mean` and `latents_std` it is (z - mean) · scaling_factor / std (playground-v2.5 and later).
    """
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    scale, shift = float(config["scaling_factor"] or 1.0), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        scale, shift = tuple(scale / float(s) for s in std), tuple(float(m) for m in mean)
    return LatentSpec(name, weights_hash, int(config["latent_channels"]), 2 ** (len(stages) - 1), scale, shift)


def _locate(name: str) -> tuple[Path, Path]:
    """The folder with config.json and the weights file in it, downloaded from the hub unless `name` is a folder."""
    folder = Path(name)
    if not folder.exists():
        return _download(name)
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None or not (folder / "config.json").is_file():
        raise InputError(f"{name} is not a diffusers autoencoder: expected config.json and {WEIGHT_FILES[0]} in it.")
    return folder, weights


def _download(name: str) -> tuple[Path, Path]:
    """Download config and weights of `owner/model[/subfolder]` to the hub's cache, preferably as safetensors."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner_model, subfolder = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None
    try:
        config = hf_hub_download(owner_model, "config.json", subfolder=subfolder)
        try:
            weights = hf_hub_download(owner_model, WEIGHT_FILES[0], subfolder=subfolder)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            weights = hf_hub_download(owner_model, WEIGHT_FILES[1], subfolder=subfolder)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"Autoencoder '{name}' is neither a folder here nor available from the Hugging Face hub ({reason}). "
            "Give 'identity', a hub id such as stabilityai/sd-vae-ft-mse, or a folder holding config.json and "
            f"{WEIGHT_FILES[0]}."
        ) from error
    return Path(config).parent, Path(weights)


def _is_safe(weights: Path) -> bool:
    return weights.suffix == ".safetensors"


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> Tensor | float:
    return value if isinstance(value, float | int) else like.new_tensor(value).view(-1, 1, 1)
