"""Augmentation by timm, whose random numbers are drawn from Python's, numpy's and torch's global generators.

These are seeded for each picture and each micro-batch, and put back afterwards. So what happens to a picture depends on
(seed, position) alone, whichever process or worker reads it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from sit_atconv.config import AugmentationConfig
from sit_atconv.data.sampler import index_at
from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream, keyed_generator
from sit_atconv.zoo.validate.pictures import Pictures
from sit_atconv.zoo.validate.scoring import View


@contextmanager
def keyed_globals(seed: int, stream: Stream, index: int) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) generators, seeded by this key within the context and as before after it."""
    numbers = keyed_generator(seed, stream, index)
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(int(numbers.integers(2**63)))
        np.random.seed(numbers.integers(2**32, size=4, dtype=np.uint32))
        torch.default_generator.manual_seed(int(numbers.integers(2**63)))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def training_transform(settings: AugmentationConfig, view: View) -> Callable[[Image.Image], Tensor]:
    """A PIL image -> (3, image_size, image_size), cropped, changed at random and normalised.

    Raises `InputError` for a description of RandAugment or AutoAugment that timm does not understand.
    """
    try:
        transform = create_transform(
            (3, view.image_size, view.image_size),
            is_training=True,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.flip,
            color_jitter=settings.color_jitter or 0.0,
            auto_augment=settings.auto,
            interpolation=view.interpolation,
            mean=view.mean,
            std=view.std,
            re_prob=settings.erasing,
            re_mode="pixel",  # DeiT's: noise instead of a colour
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"augmentation.auto '{settings.auto}' is not understood{f' ({error})' if str(error) else ''}: expected "
            "timm's words, such as rand-m9-mstd0.5-inc1, original or augmix-m5-w4-d2."
        ) from None
    for operation in _operations(transform):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _operations(transform: Compose) -> Iterator[auto_augment.AugmentOp]:
    """The operations of RandAugment, AugMix or AutoAugment within a transform."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        for policy in getattr(step, "policy", ()):
            yield from policy


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """timm's, which asks for 0 bits at full strength: which Pillow 13 refuses and earlier ones take for black."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


class Augmented(Dataset):
    """Lists of positions -> {"position", "index", "image", "label"} of a micro-batch, as training sees it.

    Position p is picture permutation(p // repeats) with the augmentation of the key (seed, p).
    """

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor], seed: int, repeats: int) -> None:
        self._pictures, self._transform, self._seed, self._repeats = pictures, transform, seed, repeats

    def index(self, position: int) -> int:
        """The picture at a position (0, 1, …) of training."""
        return index_at(position // self._repeats, len(self._pictures), self._seed)

    def __getitem__(self, positions: Sequence[int]) -> "dict[str, Tensor] | InputError":
        indices, images = [self.index(position) for position in positions], []
        for position, index in zip(positions, indices, strict=True):
            try:
                picture = self._pictures.picture(index)
            except InputError as error:
                return error  # see CheckedLoader
            with keyed_globals(self._seed, Stream.AUGMENTATION, position):
                images.append(self._transform(picture))
        return {
            "position": torch.tensor(positions),
            "index": torch.tensor(indices),
            "image": torch.stack(images),
            "label": torch.from_numpy(self._pictures.labels[indices]),
        }


class Mixing:
    """timm's mixup and cutmix of a micro-batch, by the key (seed, its first position), and soft labels."""

    def __init__(self, settings: AugmentationConfig, num_classes: int, seed: int) -> None:
        self._seed, self._num_classes, self._smoothing = seed, num_classes, settings.smoothing
        self._mixup = None
        if settings.mixup or settings.cutmix:
            self._mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes
            )

    def __call__(self, images: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Images (b, 3, H, W), changed in place, and labels (b,) -> images and probabilities (b, classes)."""
        if self._mixup is None:
            return images, mixup_target(labels, self._num_classes, smoothing=self._smoothing)
        with keyed_globals(self._seed, Stream.MIXING, position):
            return self._mixup(images, labels)


def require_even(settings: AugmentationConfig, micro_batch: int) -> None:
    """Raise `InputError` where a micro-batch cannot be mixed with itself in reverse."""
    if (settings.mixup or settings.cutmix) and micro_batch % 2:
        raise InputError(
            f"A micro-batch of {micro_batch} pictures cannot be mixed in pairs (augmentation.mixup and cutmix): choose "
            "a training.batch_size that is even for every process and micro-batch, or set both to 0."
        )
