"""The measures of the examples."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Objects = dict[str, Tensor]


def average_precision(
    pictures: Iterable[tuple[Objects, Objects]], overlap: Callable[[Objects, Objects], Tensor], threshold: float = 0.5
) -> float:
    """AP at an overlap: the mean over classes of the area under precision against recall (arXiv 1405.0312).

    In the order of their scores, objects that were found are each matched to the true one of their class and picture
    that they overlap most and that is still free, if by `threshold` or more. Precision at a recall is the highest at
    this recall or beyond, at all recalls that occur (COCO's own program interpolates at 101).

    Args:
        pictures: for each, what was found (with "labels" and "scores") and what is there (with "labels").
        overlap: intersection over union of n found and m true objects: (n, m).
    """
    results, counts = defaultdict(list), defaultdict(int)
    for found, true in pictures:
        for label in {*found["labels"].tolist(), *true["labels"].tolist()}:
            ours = {key: value[found["labels"] == label] for key, value in found.items()}
            theirs = {key: value[true["labels"] == label] for key, value in true.items()}
            overlaps, scores = overlap(ours, theirs).clone(), ours["scores"]
            counts[label] += overlaps.shape[1]
            for number in scores.argsort(descending=True).tolist():
                row = overlaps[number]
                hit = len(row) > 0 and row.max().item() >= threshold
                results[label].append((scores[number].item(), hit))
                if hit:
                    overlaps[:, row.argmax()] = -1  # no longer free
    areas = []
    for label, count in counts.items():
        if count:
            hits = torch.tensor([hit for _, hit in sorted(results[label], reverse=True)], dtype=torch.float64)
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            highest = precision.flip(0).cummax(0).values.flip(0) if len(hits) else hits
            areas.append((hits * highest).sum().item() / count)
    return sum(areas) / max(len(areas), 1)


def mean_iou(confusion: Tensor) -> float:
    """Mean over classes of intersection over union, of numbers of pixels by true and predicted class.

    Classes that are neither there nor predicted are left out.
    """
    both, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    return (both[union > 0] / union[union > 0]).mean().item()


def retrieval_scores(
    similarity: Tensor, query: Tensor, gallery: Tensor, left_out: Tensor, ranks: tuple[int, ...] = (1, 5, 20)
) -> dict[str, float]:
    """Rank-k, mAP and mINP (Ye et al. 2020, arXiv 2001.04193), means over the queries that have a match.

    The gallery is ranked by falling similarity to a query; its matches are the pictures of the same class. With M
    matches at the places r_1 < … < r_M: rank-k is 1 if r_1 <= k, else 0; AP is the mean over i of i / r_i; and INP,
    the inverse negative penalty, is M / r_M, the share of matches down to the hardest one.

    Args:
        similarity: (Q, G).
        query, gallery: classes (Q,) and (G,).
        left_out: bool (Q, G), pairs that are not ranked: a query itself, or, in benchmarks of re-identification, views
            of the same person by the same camera.
        ranks: the values of k.
    """
    order = similarity.masked_fill(left_out, -torch.inf).argsort(dim=1, descending=True, stable=True)
    matches = ((query[:, None] == gallery) & ~left_out).gather(1, order)
    matches = matches[matches.any(1)].double()
    place, count = torch.arange(1, matches.shape[1] + 1), matches.sum(1)
    scores = {f"rank-{k}": matches[:, :k].amax(1).mean().item() for k in ranks}
    scores["mAP"] = ((matches * matches.cumsum(1) / place).sum(1) / count).mean().item()
    return scores | {"mINP": (count / (matches * place).amax(1)).mean().item()}
