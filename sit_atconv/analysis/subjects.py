"""What is analysed: a network of the zoo on pictures, or a SiT on noised latents at several times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sit_atconv.analysis.layers import operators
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError, nearest
from sit_atconv.flow import create_interpolant
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import load_model
from sit_atconv.randomness import Stream, keyed_normal
from sit_atconv.runtime.weights import read_weights
from sit_atconv.sampling.encoded import encoded_batches, first_rows, require_same_data
from sit_atconv.zoo import attnet, pvt, resnet


@dataclass(frozen=True)
class Subject:
    """A model and one pass of it.

    Args:
        title: of the pass, such as "t = 0.5"; "" if there is only one.
        model: in evaluation mode.
        run: calls the model.
        pictures: what it is shown, for figures: floats in [0, 1], (B, H, W) or (B, H, W, 3).
    """

    title: str
    model: nn.Module
    run: Callable[[], Any]
    pictures: Tensor


def open_subjects(
    model: str, images: str, count: int, times: Sequence[float], weights: Path | None, seed: int
) -> list[Subject]:
    """The passes to analyse of a checkpoint of a SiT (a path) or of a network of the zoo (a name).

    Args:
        images: pictures for a network (`open_source`), latents for a SiT (`open_dataset`).
        count: how many.
        times: of a SiT: one pass for each, on x_t.
        weights: a file of the network's weights; random ones without it.
        seed: of the noise of x_t, and of random weights.

    Raises:
        InputError: for a model, weights or pictures that cannot be used.
    """
    opened = open_model(model, weights, seed)
    if isinstance(opened, SiT):
        return _of_sit(opened, images, count, times, seed)
    return [_of_network(opened, images, count)]


def open_model(model: str, weights: Path | None, seed: int) -> nn.Module:
    """A checkpoint of a SiT by its path, or a network by its name. Raises `InputError` as `open_subjects` does."""
    if Path(model).exists():
        if weights is not None:
            raise InputError("--weights are those of a network of the zoo; a checkpoint of a SiT has its own.")
        return load_model(Path(model)).eval()
    if not timm.is_model(model):
        raise InputError(f"There is no checkpoint {model}, and no network: {nearest(model, timm.list_models())}")
    torch.manual_seed(seed)
    network = timm.create_model(model).eval()
    operators(network)  # raises for those of others
    if weights is not None:
        _load(network, weights)
    return network


def _of_sit(model: SiT, data: str, count: int, times: Sequence[float], seed: int) -> list[Subject]:
    dataset = open_dataset(data)
    require_same_data(model, dataset, data)
    batch = next(encoded_batches(model, dataset, first_rows(dataset, count), seed, count))
    noise = keyed_normal(seed, Stream.NOISE, batch.rows, tuple(batch.latents.shape[1:]))
    path = create_interpolant(model.config.interpolant)

    def subject(t: float) -> Subject:
        x_t = path.interpolate(batch.latents, noise, torch.full((count,), t))
        low, high = x_t.amin(), x_t.amax()
        shown = ((x_t[:, 0] - low) / (high - low)).clamp(0, 1)  # the first channel
        return Subject(f"t = {t:g}", model, lambda: model(x_t, torch.full((count,), t), batch.labels), shown)

    return [subject(t) for t in times]


def _of_network(model: nn.Module, images: str, count: int) -> Subject:
    pictures = _pictures(open_source(images), count)
    cfg = model.default_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (pictures - mean) / std
    return Subject("", model, lambda: model(x), pictures.permute(0, 2, 3, 1))


def _load(model: nn.Module, path: Path) -> None:
    """Weights of a file, ours or released; their classes need not be the model's, since the head is not looked at."""
    state = read_weights(path)
    converter = next((m.checkpoint_filter_fn for m in (attnet, pvt, resnet) if isinstance(model, _CLASSES[m])), dict)
    converted = converter(state) if converter is dict else converter(state, model)
    head = model.default_cfg["classifier"]
    missing, unexpected = model.load_state_dict(
        {key: value for key, value in converted.items() if not key.startswith(head)}, strict=False
    )
    missing = [key for key in missing if not key.startswith(head)]
    if missing or unexpected:
        raise InputError(
            f"{path} does not hold the weights of {type(model).__name__}: {(missing + list(unexpected))[0]} is "
            f"{'missing' if missing else 'unknown'}."
        )


_CLASSES = {attnet: attnet.AttNet, pvt: pvt.PVT, resnet: resnet.ACmixResNet}


def _pictures(source: ImageSource, count: int) -> Tensor:
    """The first pictures of a source, in [0, 1]: (B, 3, H, W). Raises `InputError` for too few, or different sizes."""
    if len(source) < count:
        raise InputError(f"{count} images were asked for; there are {len(source)}.")
    found = [torch.from_numpy(source[i].image).permute(2, 0, 1) / 255 for i in range(count)]
    if len({each.shape for each in found}) > 1:
        raise InputError("The pictures differ in size: give some that are alike, or --count 1.")
    return torch.stack(found)
