"""Sensitivity of the metrics to details of the evaluation: resize, quantisation, JPEG, order, count.

    python -m benchmarks.evaluation_sensitivity --weights FILE --source SOURCE [--count 250] [--json FILE]

The first `count` images of a shuffled source are the reference, the next `count` the samples. The samples are then
changed in one way at a time, and all metrics are computed again. The source must have labels and at least 2 x count RGB
pictures.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from benchmarks.output import write_json
from sit_atconv.data.sources import open_source
from sit_atconv.evaluation import InceptionFeatures, inception_score, precision_recall
from sit_atconv.evaluation.scoring.per_class import feature_distance
from sit_atconv.images import to_float, to_uint8


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Encode images (n, 3, H, W) as JPEG and decode them again."""
    decoded = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


def resized(images: Tensor) -> Tensor:
    """Resize images to 299 with half-pixel centres and antialiasing, as in PIL and torchvision."""
    x = interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False, antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def truncated(images: Tensor) -> Tensor:
    """Quantise values that would round to these images with floor(127.5 x + 127.5): half a grey level darker."""
    generator = torch.Generator().manual_seed(0)
    values = images.float() + torch.rand(images.shape, generator=generator) - 0.5
    return to_uint8(to_float(values), rounding="truncate")


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda x: x,
    "floor instead of round": truncated,
    "JPEG, quality 95": lambda x: jpeg(x, 95),
    "JPEG, quality 75": lambda x: jpeg(x, 75),
    "half-pixel resize": resized,
    "half as many": lambda x: x[: len(x) // 2],
}


def measure(features: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """The five metrics."""
    precision, recall = precision_recall(reference["pool"], features["pool"])
    return {
        "FID": feature_distance(features["pool"], reference["pool"]),
        "sFID": feature_distance(features["spatial"], reference["spatial"]),
        "IS": inception_score(features["probabilities"]),
        "precision": precision,
        "recall": recall,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--json", type=Path, default=Path("evaluation_sensitivity.json"))
    options = parser.parse_args()
    network, source, n = InceptionFeatures(options.weights), open_source(options.source), options.count
    order = np.random.default_rng(0).permutation(len(source))[: 2 * n]
    images = torch.from_numpy(np.stack([source[int(i)].image for i in order])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(source.labels[order[n:]])
    reference, rows = network(images[:n]), {}
    for name, change in tqdm(CHANGES.items()):
        features = network(change(images[n:]))
        rows[name] = measure(features, reference)
        if name == "as they are":
            p = features["probabilities"]
            by_class = p[labels.argsort(stable=True)]
            rows["in chunks of a tenth"] = {"IS": inception_score(p, chunk=-(-n // 10))}
            rows["in chunks of a tenth, sorted by class"] = {"IS": inception_score(by_class, chunk=-(-n // 10))}
    print(f"{'samples':<24}" + "".join(f"{metric:>11}" for metric in ("FID", "sFID", "IS", "precision", "recall")))
    for name, row in rows.items():
        cells = (f"{row[m]:11.4f}" if m in row else f"{'':>11}" for m in ("FID", "sFID", "IS", "precision", "recall"))
        print(f"{name:<24}" + "".join(cells))
    named = [{"samples": name, **row} for name, row in rows.items()]
    write_json(options.json, torch.device("cpu"), named)


if __name__ == "__main__":
    main()
