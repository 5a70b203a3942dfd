"""What the two detectors share: pictures with objects, from COCO or drawn, training, and the measure."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from torchvision.transforms.functional import resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

from examples.common import DEVICE, train
from examples.measures import Objects, average_precision
from examples.shapes import CLASSES, HELD_OUT, Scenes
from sit_atconv.errors import InputError

COCO_CLASSES = 91  # its category numbers run to 90


def datasets(options: argparse.Namespace, keys: tuple[str, ...]) -> tuple[Dataset, Dataset, int]:
    """For training, for validation, and the number of classes with the background. `keys` are those of targets."""
    if options.data is None:
        return Scenes(10_000, options.size, seed=0), Scenes(HELD_OUT, options.size, seed=1), len(CLASSES)
    return _coco(options, "train2017", keys, flip=0.5), _coco(options, "val2017", keys, flip=0.0), COCO_CLASSES


def _coco(options: argparse.Namespace, part: str, keys: tuple[str, ...], flip: float) -> Dataset:
    """The pictures of a part of COCO that have objects."""
    steps = [v2.ToImage(), v2.RandomHorizontalFlip(flip), v2.SanitizeBoundingBoxes(), v2.ToDtype(torch.float32, True)]
    file = options.data / "annotations" / f"instances_{part}.json"
    try:
        data = CocoDetection(options.data / part, str(file), transforms=v2.Compose(steps))
    except ModuleNotFoundError as error:
        raise InputError("COCO's annotations are read by pycocotools: pip install pycocotools") from error
    for picture, objects in data.coco.imgToAnns.items():  # of crowds there are no boxes of single objects
        data.coco.imgToAnns[picture] = [each for each in objects if not each.get("iscrowd")]
    data.ids = [number for number in data.ids if data.coco.imgToAnns[number]]
    return wrap_dataset_for_transforms_v2(data, target_keys=keys)


def run(detector: nn.Module, data: tuple[Dataset, Dataset], options: argparse.Namespace, overlap: Callable) -> None:
    """Train one of torchvision's detectors and print its AP@0.5 before and after."""
    training, held_out = (
        DataLoader(part, options.batch_size, shuffle, num_workers=options.workers, collate_fn=_as_lists)
        for part, shuffle in zip(data, (True, False), strict=True)
    )

    @torch.inference_mode()
    def score() -> float:
        detector.eval()
        found = (zip(detector(each), targets, strict=True) for each, targets in map(_moved, held_out))
        return average_precision((pair for batch in found for pair in batch), overlap)

    print(f"AP@0.5 before training: {score():.3f}", flush=True)
    train(detector, training, lambda batch: sum(detector(*_moved(batch)).values()), options)
    print(f"AP@0.5 after training: {score():.3f}")
    if options.picture:
        drawn = [resize(_drawn(detector, data[1][n][0]), (256, 256)) for n in range(min(8, len(data[1])))]
        save_image(drawn, options.picture)


def _as_lists(samples: list[tuple[Tensor, Objects]]) -> tuple[list[Tensor], list[Objects]]:
    return [picture for picture, _ in samples], [target for _, target in samples]


def _moved(batch: tuple[list[Tensor], list[Objects]]) -> tuple[list[Tensor], list[Objects]]:
    pictures, targets = batch
    return [each.to(DEVICE) for each in pictures], [{k: v.to(DEVICE) for k, v in each.items()} for each in targets]


@torch.inference_mode()
def _drawn(detector: nn.Module, picture: Tensor) -> Tensor:
    (found,) = detector([picture.to(DEVICE)])
    sure = found["scores"] > 0.3
    if "masks" in found:
        picture = draw_segmentation_masks(picture, found["masks"][sure, 0].cpu() > 0.5, 0.5, "lime")
    labels = [str(each.item()) for each in found["labels"][sure]]
    return draw_bounding_boxes(picture, found["boxes"][sure], labels, colors="white") if labels else picture
