"""Pictures with a class for each pixel, from ADE20K or drawn, and a picture of those found."""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_segmentation_masks, save_image

from examples.common import DEVICE
from examples.shapes import CLASSES, HELD_OUT, Scenes
from sit_atconv.errors import InputError

IGNORED = 255  # pixels that do not count
ADE_CLASSES = 150


def datasets(options: argparse.Namespace) -> tuple[Dataset, Dataset, int]:
    """For training, for validation, and the number of classes."""
    if options.data is None:
        return (
            SemanticScenes(10_000, options.size, seed=0),
            SemanticScenes(HELD_OUT, options.size, seed=1),
            len(CLASSES),
        )
    return ADE(options.data, "training", options.size), ADE(options.data, "validation", options.size), ADE_CLASSES


class SemanticScenes(Scenes):
    """Drawn pictures (3, S, S), and the class of each pixel (S, S)."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, target = super().__getitem__(index)
        classes = target["masks"] * target["labels"][:, None, None]  # shapes do not overlap: each hides those below
        return picture, classes.amax(0)


class ADE(Dataset):
    """A part of ADE20K's scene parsing: pictures (3, H, W) in [0, 1] and classes (H, W) from 0; 255 for the unlabelled.

    The short side is `size`. For training, it is at random halved to doubled, and a square of that side is cut out.
    """

    def __init__(self, folder: Path, part: str, size: int) -> None:
        self.pictures = sorted((folder / "images" / part).glob("*.jpg"))
        self.annotations = folder / "annotations" / part
        if not self.pictures:
            raise InputError(f"There are no *.jpg in {folder / 'images' / part}: --data is ADE20K's folder.")
        steps = [v2.Resize(size)]
        if part == "training":
            crop = v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: 0})
            steps = [v2.RandomShortestSize(list(range(size // 2, 2 * size + 1, max(size // 8, 1)))), crop]
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.pictures[index]
        picture = tv_tensors.Image(Image.open(path).convert("RGB"))
        classes = tv_tensors.Mask(np.array(Image.open(self.annotations / f"{path.stem}.png"))[None])
        picture, classes = self.transform(picture, classes)
        return picture.as_subclass(Tensor) / 255, (classes[0].as_subclass(Tensor) - 1).long()  # 0 - 1 = 255: unlabelled


@torch.inference_mode()
def save_picture(model: nn.Module, data: Dataset, classes: int, path: Path) -> None:
    """Write the first pictures with the classes that a model finds there; the first class is not drawn."""
    drawn, size = [], data[0][0].shape[-2:]
    for picture, _ in (data[number] for number in range(min(8, len(data)))):
        masks = F.one_hot(model(picture[None].to(DEVICE))[0].argmax(0).cpu(), classes).permute(2, 0, 1).bool()
        drawn.append(F.interpolate(draw_segmentation_masks(picture, masks[1:], alpha=0.6)[None], size)[0])
    save_image(drawn, path)
