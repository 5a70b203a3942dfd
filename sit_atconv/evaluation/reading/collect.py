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
from sit_atconv.evaluation.features.cache import FeatureCaches
from sit_atconv.evaluation.features.inception import require_uint8_images
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.metrics.distances import InceptionScoreSums
from sit_atconv.evaluation.metrics.moments import Moments
from sit_atconv.evaluation.reading.loading import Batch, image_digests, mixed_sizes, require_labels

_MOMENTS = ("moments", "halves")  # of `Wanted` and `Collected`


@dataclass(frozen=True)
class Wanted:
    """What to accumulate: moments, features and sums of scores, each by kind ("pool", "spatial", "probabilities").

    With several spaces a kind has the name of its space in front, as in "dinov2/pool" (`Spaces`). halves: kinds whose
    moments are accumulated for a random half of the references as well. labels: whether images must have labels.
    """

    moments: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    scores: frozenset[str] = frozenset()
    halves: frozenset[str] = frozenset()
    labels: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds of feature that are needed."""
        return self.moments | self.kept | self.scores | self.halves


@dataclass
class Collected:
    """What was accumulated over a set of images, or over one process's contiguous share of it.

    kept: features by kind, (n, d) float32 in file order, of all images or of the requested rows.
    halves: moments by kind of the images of one half. scores: sums by kind of probabilities.
    digests: (n, 32), of every image, in file order.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    halves: dict[str, Moments] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, InceptionScoreSums] = field(default_factory=dict)
    labels: Tensor | None = None
    digests: np.ndarray = field(default_factory=lambda: np.empty((0, 32), np.uint8))
    size: tuple[int, int] | None = None  # (height, width)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.digests)


def collect(
    batches: Iterable[Batch | Tensor],
    features: Features | Spaces,
    wanted: Wanted,
    *,
    first: int = 0,
    total: int | None = None,
    what: str = "images",
    rows: np.ndarray | None = None,
    half: np.ndarray | None = None,
    cache: FeatureCaches | None = None,
) -> Collected:
    """Process this process's share of the images once, and merge it with the other processes' shares.

    Every process must call it, and every process gets the result for the whole set.

    Args:
        batches: uint8 tensors (b, 3, H, W), or anything with such `images`, `labels` and, optionally, `digests`.
        first: number of the share's first image in the whole set (the inception score uses numbered chunks).
        total: number of images of the share, for the progress bar, which is named `what`.
        rows: mask (n,) of the images of the whole set whose features are kept; None keeps all.
        half: mask (n,) of the images of the half.
        cache: of features, for the next evaluation.

    Raises:
        InputError: when there are no images, or they are not uint8 RGB, differ in size, or lack required labels.
    """
    state = PartialState()
    share = Collected()
    room = None if total is None else total if rows is None else int(rows[first : first + total].sum())
    kept = {kind: _Rows(room) for kind in wanted.kept}
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
            chosen, of_half = (_part(mask, first + seen, len(images)) for mask in (rows, half))
            for kind in wanted.halves:
                _add(share.halves, kind, found[kind][of_half])
            for kind, of_kind in kept.items():
                of_kind.add(found[kind].cpu()[chosen])
            seen += len(images)
            progress.update(len(images))
    for moments in (*share.moments.values(), *share.halves.values()):
        moments.settle()
    share.kept = {kind: kept.pop(kind).tensor() for kind in list(kept) if seen}
    share.digests = np.concatenate(digests) if digests else share.digests
    share.labels = torch.cat(labels) if labels and all(part is not None for part in labels) else None
    merged = _merge(share, wanted, features.device) if state.num_processes > 1 else share
    if merged.count == 0:
        raise InputError(f"There are no {what} to evaluate.")
    return merged


class _Rows:
    """Rows (n, d) that arrive in parts; where n is known they are never there twice, as parts and as a whole."""

    def __init__(self, count: int | None) -> None:
        self._count, self._rows, self._filled = count, None, 0
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        if self._count is None or self._filled + len(part) > self._count:
            self._count = None  # there are more than was said
            self._parts.append(part)
            return
        if self._rows is None:
            self._rows = part.new_empty(self._count, *part.shape[1:])
        self._rows[self._filled : self._filled + len(part)] = part
        self._filled += len(part)

    def tensor(self) -> Tensor:
        rows = [] if self._rows is None else [self._rows[: self._filled]]
        return torch.cat([*rows, *self._parts]) if self._parts else rows[0]


def _require_same_size(share: Collected, images: Tensor, name: str) -> None:
    require_uint8_images(images)
    size = (images.shape[2], images.shape[3])
    share.size = share.size or size
    if size != share.size:
        raise mixed_sizes(share.size, size, name)


def _accumulate(share: Collected, found: dict[str, Tensor], wanted: Wanted, first: int) -> None:
    for kind in wanted.moments:
        _add(share.moments, kind, found[kind])
    for kind in wanted.scores:
        share.scores.setdefault(kind, InceptionScoreSums(found[kind].shape[1])).update(found[kind], first)


def _add(moments: dict[str, Moments], kind: str, vectors: Tensor) -> None:
    if kind not in moments:
        moments[kind] = Moments.zeros(vectors.shape[1], vectors.device)
    moments[kind].update(vectors)


def _part(mask: np.ndarray | None, first: int, count: int) -> Tensor | slice:
    """The entries of a mask of all images for `count` images from `first` on; all of them without a mask."""
    return slice(None) if mask is None else torch.from_numpy(mask[first : first + count])


def _merge(share: Collected, wanted: Wanted, device: torch.device) -> Collected:
    """Merge contiguous shares, in the order of the processes."""
    small = {
        "size": share.size,
        "digests": share.digests,
        "labels": share.labels,
        "scores": {kind: {k: v.cpu() for k, v in sums.sums.items()} for kind, sums in share.scores.items()},
        "counts": {(name, kind): m.count for name in _MOMENTS for kind, m in getattr(share, name).items()},
        "dimensions": {kind: len(m.total) for name in _MOMENTS for kind, m in getattr(share, name).items()},
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
    for kind in wanted.scores:
        merged.scores[kind] = _merge_scores([part["scores"][kind] for part in seen])
    for name in _MOMENTS:
        for kind in sorted(getattr(wanted, name)):
            count = sum(part["counts"].get((name, kind), 0) for part in parts)
            own = getattr(share, name).get(kind)
            getattr(merged, name)[kind] = _merge_moments(own, seen[0]["dimensions"][kind], count, device)
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
