"""The built-in data set: scikit-learn's 1,797 handwritten digits (8×8, ten classes), scaled up to RGB pictures.

They need no download and no account. The name is `digits[:train|:heldout][@resolution]`; the two halves are disjoint,
stratified by class and the same on every machine.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sit_atconv.autoencoder import IDENTITY, LatentSpec
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.pictures.protocol import SourceImage
from sit_atconv.errors import InputError, require_one_of
from sit_atconv.images import to_float, to_uint8
from sit_atconv.randomness import Stream, keyed_generator

SPLITS = ("all", "train", "heldout")
DEFAULT_RESOLUTION = 16
_NAME = re.compile(r"digits(?::(?P<split>[^@]*))?(?:@(?P<resolution>.*))?")
_SPLIT_SEED = 0


def is_digits(name: str) -> bool:
    """Whether a data set's name refers to the built-in digits."""
    return _NAME.fullmatch(name) is not None


def parse_digits(name: str) -> tuple[str, int]:
    """`digits[:split][@resolution]` -> (split, resolution). Raises `InputError` for an unknown split or bad number."""
    match = _NAME.fullmatch(name)
    split, resolution = match["split"], match["resolution"]
    split = "all" if split is None else split
    require_one_of(split, SPLITS, "split of the digits")
    if resolution is None:
        return split, DEFAULT_RESOLUTION
    if not resolution.isdecimal() or not 8 <= int(resolution) <= 1024:
        raise InputError(f"'{name}': the resolution after @ must be a whole number from 8 to 1024.")
    return split, int(resolution)


def load_digits(split: str = "all", resolution: int = DEFAULT_RESOLUTION) -> tuple[np.ndarray, np.ndarray]:
    """Grey images uint8 (n, R, R), white ink on black, and labels int64 (n,)."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise InputError("The built-in digits need scikit-learn: pip install 'sit-atconv[eval]'.") from error
    bunch = sklearn_digits()
    chosen = _split_indices(bunch.target, split)
    small = np.round(bunch.images[chosen] * (255.0 / 16.0)).astype(np.uint8)
    size = (resolution, resolution)
    large = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in small]
    return np.stack(large), bunch.target[chosen].astype(np.int64)


def _split_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Sorted indices of a split: a fixed random half of every class is `train`, the rest `heldout`."""
    if split == "all":
        return np.arange(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[keyed_generator(_SPLIT_SEED, Stream.ORDER, label).permutation(len(members))]
        half = (len(members) + 1) // 2
        chosen.append(members[:half] if split == "train" else members[half:])
    return np.sort(np.concatenate(chosen))


class DigitsSource:
    """The digits as an `ImageSource`: RGB with three equal channels."""

    kind = "digits"
    lossy = False
    names = None

    def __init__(self, split: str = "all", resolution: int = DEFAULT_RESOLUTION, labelled: bool = True) -> None:
        self._images, labels = load_digits(split, resolution)
        self._split = split
        self.labels = labels if labelled else None
        self.class_names = [str(digit) for digit in range(10)] if labelled else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> SourceImage:
        image = np.repeat(self._images[index][..., None], 3, axis=2)
        label = None if self.labels is None else int(self.labels[index])
        return SourceImage(image, label, f"digits:{self._split}[{index}]")


class DigitsDataset(LatentDataset):
    """The built-in digits in memory: grey pixels of the identity autoencoder, so mirroring is exact."""

    has_flip = has_images = True
    num_classes = 10

    def __init__(self, name: str) -> None:
        split, resolution = parse_digits(name)
        images, labels = load_digits(split, resolution)
        self._name, self._targets = name, torch.from_numpy(labels)
        self._mean = to_float(torch.from_numpy(images)).unsqueeze(1)
        self.latents = LatentSpec(IDENTITY, None, 1, 1)
        self.latent_shape = (1, resolution, resolution)
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._targets)

    def fingerprint(self, teachers: Sequence[int] = ()) -> str:
        split, resolution = parse_digits(self._name)  # the pixels come from the libraries that are installed
        return hashlib.sha256(f"digits:{split}@{resolution}".encode()).hexdigest()

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"

    def _moments(self, indices: Sequence[int], flips: Sequence[bool]) -> Tensor:
        mean = self._mean[torch.as_tensor(indices, dtype=torch.int64)]
        mirror = torch.as_tensor(flips, dtype=torch.bool).view(-1, 1, 1, 1)
        mean = torch.where(mirror, mean.flip(-1), mean)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def _labels(self, indices: Sequence[int]) -> Tensor:
        return self._targets[torch.as_tensor(indices, dtype=torch.int64)]

    def _image(self, index: int) -> np.ndarray:
        return to_uint8(self._mean[index].expand(3, -1, -1)).permute(1, 2, 0).numpy()
