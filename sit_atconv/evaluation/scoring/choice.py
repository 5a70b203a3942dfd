"""The metrics: their names, the features that each is of, and what each one needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sit_atconv.errors import InputError, nearest
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Space, Spaces
from sit_atconv.evaluation.reading.collect import Wanted

# By space: what is computed unless metrics are named, and what may be named. Others than these are FD's.
_DEFAULTS = {"inception": ("fid", "sfid", "is", "precision", "recall"), "cmmd": ("cmmd",)}
_ONLY_DISTANCE = "fdr-"  # begins the names of features that FDr6 is made of
_ANY = ("precision", "recall", "kid", "mind")
# Metrics that are named after their features, and those of `FDR`
_NAMED = {"fid": "inception", "sfid": "inception", "is": "inception", "cmmd": "cmmd", "fdd": "dinov2", "kdd": "dinov2"}
_ALIASES = {"fdd": "fd", "kdd": "kid"}
FDR = ("fdr6", "fdr")  # means over spaces
POINTS = ("precision", "recall", "kid", "mind", "cmmd")  # computed from features, not from their moments


@dataclass(frozen=True)
class Metric:
    """A number to compute: what it is ("fd"), and the space it is of; none for those of several spaces."""

    root: str
    space: Space | None = None

    @property
    def name(self) -> str:
        """Its name in reports: "fd_dinov2"."""
        return self.root + (self.space.features.suffix if self.space and self.root != "cmmd" else "")

    @property
    def kind(self) -> str:
        """The kind of feature that it compares."""
        return f"{self.space.prefix}spatial" if self.root == "sfid" else self.space.pool


def needed_features(names: Iterable[str] | None) -> list[str]:
    """The names of the features that these metrics are of, where the user names none; None are the default metrics."""
    found = ["inception"] if names is None else []
    for name in names or ():
        found.append("fdr6" if name == "fdr6" else _NAMED.get(name, "inception"))
    return [name for name in dict.fromkeys(found) if name != "inception" or "fdr6" not in found]


def choose_metrics(
    features: Features | Sequence[Features] | Spaces, chosen: Iterable[str] | None, kid: bool = False
) -> tuple[Metric, ...]:
    """The metrics to compute; `chosen` None means all default ones. Raises `InputError` for unknown names.

    A name is that of a report ("fd_dinov2"), or one without the features' suffix, which then means all features that
    have it.
    """
    spaces = Spaces(features)
    everything = [Metric(root, space) for space in spaces for root in _possible(space.features)]
    everything += [Metric(root) for root in FDR]
    known = {name for metric in everything for name in _called(metric)}
    for name in chosen or ():
        if name not in known:
            if name in _NAMED:
                raise InputError(f"{name} is of the features {_NAMED[name]}: add them to --features.")
            titles = " and ".join(space.features.title for space in spaces)
            raise InputError(f"{titles} have no metric '{name}': {nearest(name, sorted(known))}")
    if chosen is None:
        wanted = {metric.name for metric in everything if metric.space and metric.root in _defaults(metric.space[0])}
    else:
        wanted = {metric.name for metric in everything if _called(metric) & set(chosen)}
    wanted |= {metric.name for metric in everything if kid and metric.root == "kid"}
    return tuple(metric for metric in everything if metric.name in wanted)


def wanted_for(metrics: Iterable[Metric], per_class: bool = False, bootstrap: bool = False) -> Wanted:
    """What to collect for these metrics, for distances per class of the one space, and for a bootstrap."""
    metrics = list(metrics)
    moments = {metric.kind for metric in metrics if metric.root in ("fid", "fd", "sfid")}
    scores = {f"{metric.space.prefix}probabilities" for metric in metrics if metric.root == "is"}
    kept = {metric.kind for metric in metrics if metric.root in POINTS} | ({"pool"} if per_class else set())
    if bootstrap:
        kept |= moments | scores
    return Wanted(frozenset(moments), frozenset(kept), frozenset(scores), labels=per_class)


def _defaults(features: Features) -> tuple[str, ...]:
    if features.name.startswith(_ONLY_DISTANCE):
        return ("fd",)
    return _DEFAULTS.get(features.name, ("fd", "precision", "recall"))


def _possible(features: Features) -> tuple[str, ...]:
    own = _DEFAULTS.get(features.name, ())
    return tuple(dict.fromkeys((*own, *(() if features.name == "inception" else ("fd",)), *_ANY)))


def _called(metric: Metric) -> set[str]:
    """What a user may call a metric."""
    aliases = {name for name, root in _ALIASES.items() if root == metric.root and metric.space}
    return {metric.name, metric.root} | {name for name in aliases if metric.space[0].name == _NAMED[name]}
