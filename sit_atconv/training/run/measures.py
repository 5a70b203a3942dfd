"""The names of scores: what the log calls "fd_pixels" or "mind@5000" a configuration may call "fd" or "mind"."""

import re
from collections.abc import Iterable

HELDOUT = "heldout_loss"
_HIGHER_IS_BETTER = {"is", "precision", "recall", "ris", "psnr", "top1", "top5"}  # all others are distances and losses


def lower_is_better(score: str) -> bool:
    """Whether the lower value of this score is the better one."""
    return _metric(score) not in _HIGHER_IS_BETTER


def find_score(name: str, scores: Iterable[str]) -> str | None:
    """The one of `scores` that is called `name`, or whose metric is; None if there is none.

    A report has a score before what belongs to it, such as its deviation or its floor.
    """
    scores = list(scores)
    return name if name in scores else next((score for score in scores if _metric(score) == name), None)


def deciding_score(metrics: Iterable[str] | None, scores: Iterable[str]) -> str | None:
    """The one of `scores` by which checkpoints are compared: the first of the metrics for which lower is better.

    Without `metrics`, or such a one among them, the first of the scores for which lower is better; None without any.
    """
    scores = list(scores)
    asked = [find_score(name, scores) for name in metrics or ()]
    return next((score for score in (*asked, *scores) if score is not None and lower_is_better(score)), None)


def _metric(score: str) -> str:
    """A score without its features and counts: "fd_pixels" -> "fd", "mind@5000" -> "mind"."""
    return re.split("[_@]", score, maxsplit=1)[0]
