"""RetinaNet (arXiv 1708.02002) with a backbone of timm's, by default AttNet, on drawn shapes or COCO.

    python -m examples.retinanet --picture found.png
    python -m examples.retinanet --data COCO --model attnet_t2 --weights FILE --size 800 --width 256 --steps 90000

COCO is a folder with train2017/, val2017/ and annotations/instances_{train,val}2017.json.
"""

from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from examples.common import DEVICE, options_of
from examples.detection import datasets, run
from examples.pyramid import FeaturePyramid
from sit_atconv.errors import exit_on_input_error

SIDES = (32, 64, 128, 256, 512)  # of the anchors at strides 8 to 128: four times the stride
OCTAVES = (1, 2 ** (1 / 3), 2 ** (2 / 3))


def main(arguments: list[str] | None = None) -> None:
    """Train, and print AP@0.5 before and after."""
    defaults = {"width": 64, "steps": 120, "batch_size": 8, "size": 96, "learning_rate": 5e-4}
    options = options_of(__doc__, arguments, "COCO", **defaults)
    training, held_out, classes = datasets(options, ("boxes", "labels"))
    pyramid = FeaturePyramid(options, (1, 2, 3), LastLevelP6P7(options.width, options.width))
    sizes = tuple(tuple(int(side * octave) for octave in OCTAVES) for side in SIDES)
    detector = RetinaNet(
        pyramid,
        classes,
        min_size=options.size,
        max_size=options.size * 5 // 3,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(SIDES)),
    )
    run(detector.to(DEVICE), (training, held_out), options, lambda found, true: box_iou(found["boxes"], true["boxes"]))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
