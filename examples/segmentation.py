"""Semantic FPN (arXiv 1901.02446) with a backbone of timm's, by default AttNet, on drawn shapes or ADE20K.

    python -m examples.segmentation --picture found.png
    python -m examples.segmentation --data ADEChallengeData2016 --model attnet_t2 --weights FILE --size 512 --width 256

ADE20K is a folder with images/ and annotations/, each with training/ and validation/. It has 150 classes.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.common import DEVICE, NORMALISE, options_of, train
from examples.measures import mean_iou
from examples.pyramid import FeaturePyramid
from examples.semantic import IGNORED, datasets, save_picture
from sit_atconv.errors import exit_on_input_error


class SemanticFPN(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, classes, H, W).

    Each map of the pyramid is convolved, normed and doubled in size until it has stride 4; the sum is classified.
    """

    def __init__(self, pyramid: FeaturePyramid, classes: int, width: int) -> None:
        super().__init__()
        self.pyramid, self.branches, self.classify = pyramid, nn.ModuleList(), nn.Conv2d(width, classes, 1)
        for convolutions in (1, 1, 2, 3):  # at strides 4, 8, 16, 32
            widths = pairwise([pyramid.out_channels, *[width] * convolutions])
            self.branches.append(nn.Sequential(*(self._layer(before, after) for before, after in widths)))

    def _layer(self, before: int, after: int) -> nn.Module:
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(after // 4, after), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        maps, y = list(self.pyramid(NORMALISE(x)).values()), 0
        for image, branch in zip(maps, self.branches, strict=True):
            for layer in branch:
                image = layer(image)
                if image.shape[-2:] != maps[0].shape[-2:]:
                    image = F.interpolate(image, scale_factor=2.0, mode="bilinear")
            y = y + F.interpolate(image, maps[0].shape[-2:], mode="bilinear")  # odd sides are not doubled exactly
        return F.interpolate(self.classify(y), x.shape[-2:], mode="bilinear")


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the mean IoU before and after."""
    defaults = {"width": 64, "steps": 100, "batch_size": 8, "size": 64, "learning_rate": 1e-3}
    options = options_of(__doc__, arguments, "ADE20K", **defaults)
    training, held_out, classes = datasets(options)
    model = SemanticFPN(FeaturePyramid(options, (0, 1, 2, 3)), classes, options.width).to(DEVICE)

    def loss_of(batch: list[Tensor]) -> Tensor:
        images, truth = (each.to(DEVICE) for each in batch)
        return F.cross_entropy(model(images), truth, ignore_index=IGNORED)

    @torch.inference_mode()
    def score() -> float:
        confusion = torch.zeros(classes * classes, dtype=torch.int64)
        for image, truth in DataLoader(held_out, num_workers=options.workers):  # one by one: sizes differ
            guess, known = model.eval()(image.to(DEVICE)).argmax(1).cpu(), truth != IGNORED
            confusion += torch.bincount(truth[known] * classes + guess[known], minlength=classes**2)
        return mean_iou(confusion.view(classes, classes))

    batches = DataLoader(training, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True)
    print(f"mean IoU before training: {score():.3f}", flush=True)
    train(model, batches, loss_of, options)
    print(f"mean IoU after training: {score():.3f}")
    if options.picture:
        save_picture(model, held_out, classes, options.picture)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
