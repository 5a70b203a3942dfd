"""Mask R-CNN (arXiv 1703.06870) with a backbone of timm's, by default AttNet, on drawn shapes or COCO.

    python -m examples.mask_rcnn --picture found.png
    python -m examples.mask_rcnn --data COCO --model attnet_t2 --weights FILE --size 800 --width 256 --steps 90000

COCO is a folder with train2017/, val2017/ and annotations/instances_{train,val}2017.json. AP is that of masks.
"""

from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from examples.common import DEVICE, options_of
from examples.detection import datasets, run
from examples.measures import Objects
from examples.pyramid import FeaturePyramid
from sit_atconv.errors import exit_on_input_error

SIDES = (32, 64, 128, 256, 512)  # of the anchors at strides 4 to 64
FEW = {  # numbers for pictures of one to three shapes
    "rpn_post_nms_top_n_train": 100,
    "rpn_post_nms_top_n_test": 50,
    "box_batch_size_per_image": 64,
    "box_detections_per_img": 10,
}
LEVELS = ["0", "1", "2", "3"]  # that regions are read from


def mask_iou(found: Objects, true: Objects) -> Tensor:
    """Intersection over union of probabilities (n, 1, H, W) above a half and masks (m, H, W): (n, m)."""
    ours, theirs = (found["masks"].flatten(1) > 0.5).float(), true["masks"].flatten(1).float()
    both = ours @ theirs.mT
    return both / (ours.sum(1)[:, None] + theirs.sum(1) - both).clamp(min=1)


def main(arguments: list[str] | None = None) -> None:
    """Train, and print the masks' AP@0.5 before and after."""
    defaults = {"width": 64, "steps": 80, "batch_size": 4, "size": 96, "learning_rate": 7e-4}
    options = options_of(__doc__, arguments, "COCO", **defaults)
    training, held_out, classes = datasets(options, ("boxes", "labels", "masks"))
    detector = MaskRCNN(
        FeaturePyramid(options, (0, 1, 2, 3), LastLevelMaxPool()),
        classes,
        min_size=options.size,
        max_size=options.size * 5 // 3,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in SIDES), ((0.5, 1.0, 2.0),) * len(SIDES)),
        box_roi_pool=MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2),
        mask_roi_pool=MultiScaleRoIAlign(LEVELS, output_size=14, sampling_ratio=2),
        **({} if options.data else FEW),
    )
    detector.roi_heads.mask_head = MaskRCNNHeads(options.width, [options.width] * 4, dilation=1)  # it would have 256
    detector.roi_heads.mask_predictor = MaskRCNNPredictor(options.width, options.width, classes)
    run(detector.to(DEVICE), (training, held_out), options, mask_iou)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
