"""Pictures drawn for the examples: circles, squares and triangles on noise. Picture i depends on (seed, i) alone."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("background", "circle", "square", "triangle")
HELD_OUT = 64  # pictures for the measures
_SIDES = {2: 4, 3: 3}  # of the regular polygons, by class


def area(kind: int, centre: tuple[float, float], radius: float, angle: float, size: int) -> np.ndarray:
    """Where a shape is, as bool (size, size)."""
    canvas = Image.new("1", (size, size))
    pen, (x, y) = ImageDraw.Draw(canvas), centre
    if kind in _SIDES:
        pen.regular_polygon((x, y, radius), _SIDES[kind], angle, fill=1)
    else:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return np.array(canvas)


class Scenes(Dataset):
    """Pictures (3, S, S) in [0, 1] of one to three shapes, with torchvision's targets: boxes, labels, masks."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        random, size = np.random.default_rng([self.seed, index]), self.size
        picture = random.uniform(0, 0.4, (size, size, 3))
        owner, kinds = np.zeros((size, size), int), random.integers(1, len(CLASSES), random.integers(1, 4))
        for number, kind in enumerate(kinds, 1):
            radius = random.uniform(0.12, 0.22) * size
            x, y = random.uniform(radius, size - radius, 2)
            inside = area(kind, (x, y), radius, random.uniform(0, 360), size)
            picture[inside] = random.uniform(0.4, 1, 3) + random.normal(0, 0.05, (inside.sum(), 3))
            owner[inside] = number  # later shapes hide earlier ones
        masks = [owner == number for number in range(1, len(kinds) + 1)]
        seen = [n for n, mask in enumerate(masks) if mask.any(0).sum() > 3 and mask.any(1).sum() > 3]
        masks = np.stack([masks[n] for n in seen])
        return torch.tensor(picture.clip(0, 1), dtype=torch.float32).permute(2, 0, 1), {
            "boxes": torch.tensor([_box(mask) for mask in masks], dtype=torch.float32),
            "labels": torch.tensor(kinds[seen]),
            "masks": torch.tensor(masks, dtype=torch.uint8),
        }


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


class Things(Dataset):
    """Pictures (3, S, S) in [0, 1] of things, and the number of each: a thing is a disc with a coloured figure on it.

    Views of a thing differ in place, size, angle, light and noise. There are `views` of each in turn.
    """

    def __init__(self, numbers: range, views: int, size: int, seed: int) -> None:
        self.numbers, self.views, self.size, self.seed = numbers, views, size, seed

    def __len__(self) -> int:
        return len(self.numbers) * self.views

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number, size = self.numbers[index // self.views], self.size
        thing, view = np.random.default_rng([number]), np.random.default_rng([self.seed, index])
        kind, colours = thing.integers(1, len(CLASSES)), thing.uniform(0.2, 1, (2, 3))
        radius, centre = view.uniform(0.25, 0.4) * size, size / 2 + view.uniform(-0.1, 0.1, 2) * size
        picture = view.uniform(0, 0.4, (size, size, 3))
        for what, share, colour in ((1, 1, colours[0]), (kind, thing.uniform(0.4, 0.8), colours[1])):
            picture[area(what, tuple(centre), share * radius, view.uniform(0, 360), size)] = colour
        picture = picture * view.uniform(0.7, 1.1) + view.normal(0, 0.08, picture.shape)
        return torch.tensor(picture.clip(0, 1), dtype=torch.float32).permute(2, 0, 1), number
