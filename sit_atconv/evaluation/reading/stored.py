"""Gaussians that a file of statistics holds, for each space of features."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.metrics.distances import require_covariance
from sit_atconv.evaluation.reading.loading import require_two
from sit_atconv.evaluation.reading.statistics import read_stored, remark_on_resizing, stored_names
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.reading import Count, Sha256, understand

ADM = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names of Inception's statistics


class Origin(TypedDict, total=False):
    """What `write_reference` notes beside the statistics about the images they come from.

    With it, a comparison with the file gives the same warnings as one with the images.
    """

    count: Count
    height: Count
    width: Count
    lossy: bool
    images_sha256: Sha256
    weights_sha256: Sha256


ORIGIN = tuple(Origin.__annotations__)


@dataclass
class Stored:
    """What was found: Gaussians by kind, why others are missing, and entries of the report."""

    gaussians: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def names_of(features: Features) -> dict[str, tuple[str, str]]:
    """Kind of feature -> names of its mean and covariance: ADM's for Inception, "mu_dinov2" and so on for others."""
    return ADM if features.name == "inception" else {"pool": (f"mu_{features.name}", f"sigma_{features.name}")}


def holds_statistics(members: Iterable[str], spaces: Spaces) -> bool:
    """Whether a file with arrays of these names has statistics of any of the spaces."""
    return any(names_of(features)["pool"][0] in members for features, _ in spaces)


def is_statistics(path: str) -> bool:
    """Whether the file at `path` holds statistics without images."""
    members = stored_names(path)
    return "arr_0" not in members and any(name == "mu" or name.startswith("mu_") for name in members)


def read_statistics(path: str, spaces: Spaces) -> Stored:
    """The Gaussians of the spaces that the file at `path` holds, with what it says of their images.

    Raises `InputError` for statistics that are damaged, or not those of the FID Inception under its names.
    """
    members = stored_names(path)
    noted = {name: np.asarray(read_stored(path, name)).tolist() for name in ORIGIN if name in members}
    origin = {**dict.fromkeys(ORIGIN), **understand(noted, Origin, path)}  # None where the file does not say
    if origin["count"] is not None:
        require_two(origin["count"], "references")
    found = Stored(facts={"path": path, "kind": "statistics", **origin, "file_sha256": sha256_of_file(path)})
    if remark := remark_on_resizing(path, members):
        found.facts["remark"] = remark
    found.facts["weights_of"] = {}
    for features, prefix in spaces:
        if names_of(features)["pool"][0] not in members:
            continue
        own = f"weights_sha256_{features.name}"
        digest = origin["weights_sha256"] if features.name == "inception" else None
        if own in members:
            digest = understand(np.asarray(read_stored(path, own)).tolist(), Sha256, f"{path}: {own}")
        found.facts["weights_of"][features.name] = digest
        for kind, (mu, sigma) in names_of(features).items():
            if mu in members and sigma in members:
                dimensions = getattr(features, "dimensions", {}).get(kind)
                found.gaussians[prefix + kind] = _gaussian(path, mu, sigma, dimensions)
            elif kind == "pool":
                expected = "ADM's keys: arr_0, mu, sigma, mu_s, sigma_s" if features.name == "inception" else sigma
                raise InputError(f"{path} has {mu} but no {sigma}. Expected {expected}.")
            else:
                found.lacks[prefix + kind] = f"{path} has no {mu} and {sigma}"
    return found


def read_separate(files: Mapping[str, str], spaces: Spaces) -> Stored:
    """The Gaussians of the spaces that have a file of their own, which holds `mu` and `sigma` of these features.

    Raises `InputError` for a file without them, and for a name that is none of the spaces.
    """
    found = Stored()
    by_name = {features.name: (features, prefix) for features, prefix in spaces}
    for name, path in files.items():
        if name not in by_name:
            raise InputError(f"--statistics {name}={path}: the features are {', '.join(by_name)}.")
        features, prefix = by_name[name]
        members = stored_names(path)
        mu, sigma = next(
            (names for names in (ADM["pool"], names_of(features)["pool"]) if set(names) <= set(members)), (None, None)
        )
        if mu is None:
            raise InputError(f"{path} has no mu and sigma: expected statistics of {features.title}.")
        dimensions = getattr(features, "dimensions", {}).get("pool")
        found.gaussians[f"{prefix}pool"] = _gaussian(path, mu, sigma, dimensions)
        found.facts[name] = {"path": path, "file_sha256": sha256_of_file(path)}
    return found


def _gaussian(path: str, mu: str, sigma: str, dimension: int | None) -> tuple[Tensor, Tensor]:
    mean, covariance = (np.array(read_stored(path, name)) for name in (mu, sigma))
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(f"{path}: {mu} is {mean.dtype} and {sigma} is {covariance.dtype}; expected floats.")
    size = dimension or (len(mean) if mean.ndim == 1 else 0)
    if mean.shape != (size,) or covariance.shape != (size, size):
        of = ", statistics of the FID Inception" if dimension else ""
        raise InputError(
            f"{path}: {mu} has shape {mean.shape} and {sigma} {covariance.shape}; expected ({dimension or 'd'},) and "
            f"({dimension or 'd'}, {dimension or 'd'}){of}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: {mu} or {sigma} holds values that are not finite.")
    try:
        require_covariance(covariance)
    except InputError as error:
        raise InputError(f"{path}: {sigma}: {error}") from None
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))
