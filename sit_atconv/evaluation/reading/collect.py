"""One pass over a set of images: accumulates what the metrics need, batch by batch, and merges it across processes."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, pad_across_processes, reduce
from torch import Tensor
from tqdm import tqdm

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.cache import FeatureCache
from sit_atconv.evaluation.features.inception import require_uint8_images
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.metrics.distances import InceptionScoreSums
from sit_atconv.evaluation.metrics.moments import Moments
from sit_atconv.evaluation.reading.loading import Batch, image_digests, mixed_sizes, require_labels


@dataclass(frozen=True)
class Wanted:
    """What to accumulate: moments and features by kind ("pool", "spatial", "probabilities"), and score sums.

    labels: whether images must have labels.
    """

    moments: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    scores: bool = False
    labels: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds of feature that are needed."""
        return self.moments | self.kept | ({"probabilities"} if self.scores else set())


@dataclass
class Collected:
    """What was accumulated over a set of images, or over one process's contiguous share of it.

    kept: features by kind, (n, d) float32 in file order, of all images or of the requested rows.
    digests: (n, 32), of every image, in file order.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    scores: InceptionScoreSums | None = None
    labels: Tensor | None = None
    digests: np.ndarray = field(default_factory=lambda: np.empty((0, 32), np.uint8))
    size: tuple[int, int] | None = None  # (height, width)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.digests)


def collect(
    batches: Iterable[Batch | Tensor],
    features: Features,
    wanted: Wanted,
    *,
    first: int = 0,
    total: int | None = None,
    what: str = "images",
    rows: np.ndarray | None = None,
    cache: FeatureCache | None = None,
) -> Collected:
    """Process this process's share of the images once, and merge it with the other processes' shares.

    Every process must call it, and every process gets the result for the whole set.

    Args:
        batches: uint8 tensors (b, 3, H, W), or anything with such `images`, `labels` and, optionally, `digests`.
        first: number of the share's first image in the whole set (the inception score uses numbered chunks).
        total: number of images of the share, for the progress bar, which is named `what`.
        rows: mask (n,) of the images of the whole set whose features are kept; None keeps all.
        cache: of features, for the next evaluation.

    Raises:
        InputError: when there are no images, or they are not uint8 RGB, differ in size, or lack required labels.
    """
    state = PartialState()
    share = Collected()
    kept: dict[str, list[Tensor]] = {kind: [] for kind in wanted.kept}
    labels, digests, seen = [], [], 0
    with tqdm(total=total, unit="img", desc=what, disable=not state.is_main_process, smoothing=0.05) as progress:
        for batch in batches:
            # Copy what is kept: each tensor that a worker process sent holds an open file until it is freed.
            images = batch if isinstance(batch, Tensor) else batch.images
            _require_same_size(share, images, f"image {first + seen}")
            digests.append(batch.digests.copy() if isinstance(batch, Batch) else image_digests(images))
            labels.append(None if isinstance(batch, Tensor) or batch.labels is None else batch.labels.clone())
            if wanted.labels:
                require_labels(labels[-1], what)
            found = cache.features(images, digests[-1]) if cache else features(images)
            _accumulate(share, found, wanted, first + seen)
            chosen = slice(None) if rows is None else torch.from_numpy(rows[first + seen :][: len(images)])
            for kind, parts in kept.items():
                parts.append(found[kind].cpu()[chosen])
            seen += len(images)
            progress.update(len(images))
    share.kept = {kind: torch.cat(parts) for kind, parts in kept.items() if parts}
    share.digests = np.concatenate(digests) if digests else share.digests
    share.labels = torch.cat(labels) if labels and all(part is not None for part in labels) else None
    merged = _merge(share, wanted, features.device) if state.num_processes > 1 else share
    if merged.count == 0:
        raise InputError(f"There are no {what} to evaluate.")
    return merged


def _require_same_size(share: Collected, images: Tensor, name: str) -> None:
    require_uint8_images(images)
    size = (images.shape[2], images.shape[3])
    share.size = share.size or size
    if size != share.size:
        raise mixed_sizes(share.size, size, name)


def _accumulate(share: Collected, found: dict[str, Tensor], wanted: Wanted, first: int) -> None:
    for kind in wanted.moments:
        if kind not in share.moments:
            share.moments[kind] = Moments.zeros(found[kind].shape[1], found[kind].device)
        share.moments[kind].update(found[kind])
    if wanted.scores:
        share.scores = share.scores or InceptionScoreSums(found["probabilities"].shape[1])
        share.scores.update(found["probabilities"], first)


def _merge(share: Collected, wanted: Wanted, device: torch.device) -> Collected:
    """Merge contiguous shares, in the order of the processes."""
    small = {
        "size": share.size,
        "digests": share.digests,
        "labels": share.labels,
        "scores": None if share.scores is None else {k: v.cpu() for k, v in share.scores.sums.items()},
        "dimensions": {kind: len(moments.total) for kind, moments in share.moments.items()},
        "kept": {kind: tuple(features.shape) for kind, features in share.kept.items()},
    }
    parts = gather_object([small])
    seen = [part for part in parts if len(part["digests"])]
    for part in seen:
        if part["size"] != seen[0]["size"]:
            raise mixed_sizes(seen[0]["size"], part["size"], "an image of another process")
    if not seen:
        return share
    merged = Collected(size=seen[0]["size"], digests=np.concatenate([part["digests"] for part in seen]))
    if all(part["labels"] is not None for part in seen):
        merged.labels = torch.cat([part["labels"] for part in seen])
    if wanted.scores:
        merged.scores = _merge_scores([part["scores"] for part in seen])
    for kind in sorted(wanted.moments):
        merged.moments[kind] = _merge_moments(
            share.moments.get(kind), seen[0]["dimensions"][kind], merged.count, device
        )
    for kind in sorted(wanted.kept):
        counts = [part["kept"].get(kind, (0,))[0] for part in parts]
        nothing = torch.empty(0, seen[0]["kept"][kind][1])
        merged.kept[kind] = _merge_features(share.kept.get(kind, nothing), counts, device)
    return merged


def _merge_scores(parts: list[dict[int, Tensor]]) -> InceptionScoreSums:
    merged = InceptionScoreSums(len(next(iter(parts[0].values()))) - 2)
    for part in parts:
        for number, sums in part.items():
            merged.sums[number] = merged.sums[number] + sums if number in merged.sums else sums
    return merged


def _merge_moments(share: Moments | None, dimension: int, count: int, device: torch.device) -> Moments:
    share = share or Moments.zeros(dimension, device)
    total, products = (reduce(sums.to(device), "sum") for sums in (share.total, share.products))
    return Moments(count, total, products)


def _merge_features(share: Tensor, counts: list[int], device: torch.device) -> Tensor:
    padded = gather(pad_across_processes(share.to(device)))
    longest = len(padded) // len(counts)
    return torch.cat([padded[i * longest : i * longest + n] for i, n in enumerate(counts)]).cpu()
