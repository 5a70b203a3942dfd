"""The report of an evaluation: a table, JSON, and warnings about numbers that would mislead."""

import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sit_atconv import __version__
from sit_atconv.evaluation.features.inception import PUBLISHED_WEIGHTS_PREFIX
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.metrics.distances import IS_CHUNK
from sit_atconv.runtime.whole_files import make_folder_of, write_json

PUBLISHED_COUNT = 50_000
ENOUGH_NEIGHBOURS = 10_000
_PUBLISHED_MIND = 5000  # images per side

_TITLES = {
    **{"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID", "fd": "FD", "mind": "MIND", "cmmd": "CMMD"},
    **{"precision": "precision", "recall": "recall"},
    **{"rfid": "rFID", "rsfid": "rsFID", "ris": "rIS", "rkid": "rKID", "rfd": "rFD", "psnr": "PSNR"},  # reconstructions
    **{"rmind": "rMIND", "rcmmd": "rCMMD", "fdr6": "FDr6"},
}
_SUFFIXES = {"pixels": "pixels", "dinov2": "DINOv2"}
_WHOLE = {"fd_dinov2": "FDD", "kid_dinov2": "KDD", "fdr_own": "FDr (own)"}
_NAMED = ("sit-atconv", "torch", "torch-fidelity", "timm")  # versions that the table shows; the JSON has more


@dataclass
class Report:
    """The result of an evaluation.

    metrics: name -> number. unsupported: name -> why it is missing. intervals: name -> std, low, high of a bootstrap.
    floors: MIND's names -> its value between two parts of the reference, and their size. ratios: features -> distance,
    divisor and ratio of FDr. per_class: class -> counts and distance. samples, reference, features and, if there are
    several, other_features, settings, versions: everything needed to repeat it. seconds: wall time.
    """

    metrics: dict[str, float]
    unsupported: dict[str, str]
    warnings: list[str]
    samples: dict[str, Any]
    reference: dict[str, Any]
    features: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    intervals: dict[str, dict[str, float]] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    other_features: list[dict[str, Any]] = field(default_factory=list)
    per_class: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write_json(self, path: str | Path) -> None:
        """Write everything as JSON, atomically."""
        make_folder_of(path)
        write_json(path, asdict(self))

    def table(self) -> str:
        """The numbers and what was compared, as a table for the terminal."""
        lines = [
            f"samples    {_described(self.samples)}",
            f"reference  {_described(self.reference)}",
            *(f"features   {_seen_by(features)}" for features in (self.features, *self.other_features)),
            f"with       {', '.join(f'{name} {self.versions[name]}' for name in _NAMED)}",
            "",
        ]
        width = max(len(title(name)) for name in (*self.metrics, *self.unsupported))
        for name, value in self.metrics.items():
            digits = 6 if name.startswith(("kid", "rkid")) else 4
            lines.append(f"{title(name):<{width}}  {value:10.{digits}f}{self._beside(name, digits)}")
        lines += [f"{title(name):<{width}}  {'—':>10}   {reason}" for name, reason in self.unsupported.items()]
        for name, part in self.ratios.items():
            lines.append(f"  {name}: {part['distance']:.4f} / {part['divisor']:.4f} = {part['ratio']:.4f}")
        for number, row in self.per_class.items():
            distance = "—" if row["distance"] is None else f"{row['distance']:.4f}"
            lines.append(f"class {number:<6} {distance:>10}   {row['samples']} samples, {row['references']} references")
        lines += ["", *(f"warning: {warning}" for warning in self.warnings)]
        return "\n".join(lines).rstrip() + "\n"

    def _beside(self, name: str, digits: int) -> str:
        """What stands beside a number: its interval, and the floor of MIND."""
        interval, floor = self.intervals.get(name), self.floors.get(name)
        words = f"   95 % in [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]" if interval else ""
        if floor:
            words += f"   {floor['value']:.{digits}f} between {floor['count']:.0f} references and as many others"
        return words


def title(name: str) -> str:
    """A metric's name as displayed: "fd_pixels" -> "FD-pixels", "precision_dinov2" -> "precision (DINOv2)"."""
    if name.removesuffix("_std") in _WHOLE:
        return _WHOLE[name.removesuffix("_std")] + (" std" if name.endswith("_std") else "")
    root, _, rest = name.partition("_")
    root, at, count = root.partition("@")
    shown = _TITLES.get(root, root) + at + count
    if rest in ("", "std"):
        return shown + (" std" if rest else "")
    std = " std" if rest.endswith("_std") else ""
    suffix = rest.removesuffix("_std")
    suffix = _SUFFIXES.get(suffix, suffix)
    joined = root in ("fd", "kid", "rfd", "rkid")
    return (f"{shown}-{suffix}" if joined else f"{shown} ({suffix})") + std


def library_versions() -> dict[str, str]:
    """Versions of the libraries that influence the numbers."""
    versions = {"python": platform.python_version(), "sit-atconv": __version__}
    for package in ("torch", "torchvision", "torch-fidelity", "timm", "numpy", "pillow", "accelerate"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def features_facts(features: Features) -> dict[str, Any]:
    """Entries of the report about the features."""
    device = features.device
    return {
        "name": features.name,
        "title": features.title,
        "weights": features.weights_path,
        "weights_sha256": features.weights_sha256,
        "precision": "bf16" if features.fast else "fp32",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "neighbours": features.neighbours,
    }


def find_warnings(
    metrics: dict[str, float],
    samples: dict[str, Any],
    reference: dict[str, Any],
    features: Features | Spaces,
    labels: Tensor | None,
) -> list[str]:
    """Warnings that a reader needs before comparing these numbers with others."""
    spaces = Spaces(features)
    warnings = [warning for space in spaces for warning in _about_features(space.features, reference)]
    warnings += _about_reference(reference)
    if any(space.features.name != "pixels" for space in spaces):
        warnings += _about_counts(metrics, samples, reference)
    warnings += _about_minds(metrics, spaces)
    dimensions = {"fid": 2048, "sfid": 2023}
    for name, dimension in dimensions.items():
        for what, facts in (("samples", samples), ("references", reference)):
            if name in metrics and (facts["count"] or dimension + 1) <= dimension:
                warnings.append(
                    f"{title(name)}: {facts['count']} {what} give a rank-deficient covariance ({dimension} dimensions)."
                )
    if "is" in metrics and labels is not None and len(labels.unique()) > 1 and bool((labels.diff() >= 0).all()):
        harm = "its chunks lack classes, IS is too low" if samples["count"] > IS_CHUNK else "harmless in a single chunk"
        warnings.append(f"The samples are sorted by class. The inception score uses chunks of {IS_CHUNK}: {harm}.")
    for what, facts in (("samples", samples), ("reference images", reference)):
        if facts["lossy"]:
            warnings.append(f"Some {what} are stored lossily (JPEG or WebP), which changes every number.")
    ours, theirs = ((facts.get("height"), facts.get("width")) for facts in (samples, reference))
    if None not in (*ours, *theirs) and ours != theirs:
        warnings.append(
            f"Samples are {ours[1]}x{ours[0]}, reference images {theirs[1]}x{theirs[0]}: the numbers include resizing."
        )
    digests = [facts.get("images_sha256") for facts in (reference, reference.get("images_in_arr_0", {}))]
    if samples.get("images_sha256") and samples["images_sha256"] in digests:
        warnings.append("Samples and reference are the same images.")
    return warnings


def _about_features(features: Features, reference: dict[str, Any]) -> list[str]:
    warnings = []
    if features.name == "inception" and not features.weights_sha256.startswith(PUBLISHED_WEIGHTS_PREFIX):
        warnings.append(
            f"The weights ({features.weights_sha256[:8]}) are not the file that torch-fidelity publishes "
            f"({PUBLISHED_WEIGHTS_PREFIX}): do not compare these numbers with published ones."
        )
    if features.fast:
        warnings.append("Features were computed in bfloat16 (--fast): not for publication.")
    made_with = reference.get("weights_of", {}).get(features.name)
    if made_with and made_with != features.weights_sha256:
        warnings.append(f"The reference was made with other weights ({made_with[:8]}): the distances mean nothing.")
    return [*warnings, *features.remarks]


def _about_reference(reference: dict[str, Any]) -> list[str]:
    warnings = []
    made_with = reference.get("weights_of", {})
    if any(digest is None and name != "pixels" for name, digest in made_with.items()):  # pixels have no network
        warnings.append("The reference does not name the network of its statistics; it must be the same network.")
    files = reference.get("statistics", {})
    if files:
        warnings.append(
            f"The statistics of {', '.join(files)} come from files of their own, which do not say of which images and "
            "of which network: they must be the reference's, and the same network."
        )
    return warnings + ([reference["remark"]] if "remark" in reference else [])


def _about_minds(metrics: dict[str, float], spaces: Spaces) -> list[str]:
    """What MIND and FDr are not comparable with."""
    warnings = []
    for name in metrics:
        root, _, rest = name.partition("@")
        if root == "mind" and rest != str(_PUBLISHED_MIND):
            warnings.append(
                f"{title(name)}: published values compare {_PUBLISHED_MIND} Inception features per side, and MIND "
                "falls with their number: compare it with the same number and features only."
            )
    if "fdr_own" in metrics:
        warnings.append(
            "FDr (own) has the divisors of this reference: compare it only where features and reference are the same, "
            "not with FDr6."
        )
    if "fdr6" in metrics:
        warnings.append("FDr6: published values have an Inception input of x / 127.5 - 1, not ADM's (x - 128) / 128.")
    return warnings


def _about_counts(metrics: dict[str, float], samples: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    warnings = []
    if samples["count"] < PUBLISHED_COUNT:
        warnings.append(
            f"{samples['count']} samples: published numbers use {PUBLISHED_COUNT}; fewer give larger distances."
        )
    if reference["count"] is None:
        warnings.append(
            "The reference does not say how many images its statistics come from; fewer give larger distances."
        )
    points = reference.get("images_in_arr_0", reference)["count"] or 0
    if any(name.startswith(("precision", "recall")) for name in metrics) and points < ENOUGH_NEIGHBOURS:
        warnings.append(f"Precision and recall use {points} reference images: published ones use {ENOUGH_NEIGHBOURS}.")
    return warnings


def _seen_by(facts: dict[str, Any]) -> str:
    weights = f", weights {facts['weights_sha256'][:8]}" if facts["weights_sha256"] else ""
    return f"{facts['title']}{weights}, {facts['precision']} on {facts['device']}"


def _described(facts: dict[str, Any]) -> str:
    count = "an unknown number of" if facts["count"] is None else facts["count"]
    size = f" of {facts['width']}x{facts['height']}" if facts["width"] else ""
    stored = "statistics of " if facts["kind"] == "statistics" else ""
    digest = facts.get("file_sha256") or facts["images_sha256"]
    return f"{facts['path']}: {stored}{count} images{size}, sha256 {digest[:8]}"
