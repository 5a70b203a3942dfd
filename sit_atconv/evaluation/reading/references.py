"""Reference statistics: ADM's npz files, other projects' mu/sigma files, or any source of images."""

import hashlib
import logging
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from sit_atconv.classes import Classes
from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.sources.npz import CLASS_NAMES
from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.cache import FeatureCache
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.metrics.distances import require_covariance
from sit_atconv.evaluation.reading.classes import Chosen, ClassPair, pair_classes
from sit_atconv.evaluation.reading.collect import Collected, Wanted, collect
from sit_atconv.evaluation.reading.loading import (
    load_batches,
    open_images,
    require_labels,
    require_two,
    require_two_of_each,
    share,
)
from sit_atconv.evaluation.reading.statistics import read_stored, remark_on_resizing, stored_names
from sit_atconv.randomness import Stream, keyed_generator
from sit_atconv.runtime.files import sha256_of_file
from sit_atconv.runtime.reading import Count, Sha256, understand
from sit_atconv.runtime.whole_files import make_folder_of, whole_file

log = logging.getLogger(__name__)

STORED = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclass
class Reference:
    """The reference that samples are compared with.

    gaussians: mean and covariance by kind of feature. points: pool features (n, d) for precision, recall and the
    kernel distance, or None. classes: those to compare class by class. by_class: their number among the references ->
    pool features. lacks: kind of feature or "points" -> why it is missing. facts: entries of the report.
    """

    gaussians: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    points: Tensor | None = None
    classes: list[ClassPair] = field(default_factory=list)
    by_class: dict[int, Tensor] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


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


_ORIGIN = tuple(Origin.__annotations__)


@dataclass(frozen=True)
class Reading:
    """How images are read: batch size, number of reader processes, cache of features, and whether without labels."""

    batch_size: int = 64
    workers: int = 0
    cache: str | Path | None = None
    unconditional: bool = False


def read_reference(
    path: str,
    features: Features,
    wanted: Wanted,
    reading: Reading | None = None,
    classes: Chosen = (),
    samples: Classes | None = None,
) -> Reference:
    """Read the reference at `path`, with those of the `wanted` statistics that it provides.

    Stored statistics (`mu` and `sigma`) are used as they are, since they come from more images than the file contains;
    the images of other sources are read on all processes. `classes` are to be compared with those of the `samples`,
    one by one (`pair_classes`).

    Raises:
        InputError: for a reference that cannot be used, or that lacks requested labels or classes.
    """
    reading = reading or Reading()
    members = stored_names(path)
    stored = "mu" in members and features.name == "inception"
    if is_statistics(path):
        if not stored:
            raise InputError(f"{path} holds statistics of Inception features only; {features.title} need its images.")
        if classes != ():
            raise InputError(f"{path} holds no images, so it cannot be compared class by class.")
        return _from_statistics(path, members, features)
    source = open_images(path, reading.unconditional)
    if not stored:
        reference = reference_of_images(source, path, features, wanted, reading, classes, samples)
        if "mu" in members:
            reference.facts["note"] = "stored statistics are Inception's: computed from the images in arr_0 instead"
        return reference
    pairs = _pairs(source, classes, samples)
    reference = _from_statistics(path, members, features)
    if reference.facts["height"] is None:
        reference.facts["height"], reference.facts["width"] = source[0].image.shape[:2]
    if wanted.kept or pairs:
        images = _from_images(source, path, features, Wanted(kept=frozenset({"pool"})), reading, pairs)
        reference.points, reference.classes, reference.by_class = images.points, pairs, images.by_class
        reference.facts["images_in_arr_0"] = images.facts
    return reference


def is_statistics(path: str) -> bool:
    """Whether the file at `path` holds statistics without images."""
    members = stored_names(path)
    return "mu" in members and "arr_0" not in members


def reference_of_images(
    source: ImageSource,
    path: str,
    features: Features,
    wanted: Wanted,
    reading: Reading,
    classes: Chosen = (),
    samples: Classes | None = None,
) -> Reference:
    """The reference of a source's images, as `read_reference`, without a look at statistics stored beside them."""
    require_two(len(source), "references")
    return _from_images(source, path, features, wanted, reading, _pairs(source, classes, samples))


def look_at(
    source: ImageSource,
    features: Features,
    wanted: Wanted,
    reading: Reading,
    what: str,
    rows: np.ndarray | None = None,
) -> Collected:
    """`collect` over a source; each process reads its share."""
    state = PartialState()
    mine = share(len(source), state.process_index, state.num_processes)
    batches = load_batches(source, mine, reading.batch_size, reading.workers)
    options = {"first": mine.start, "total": len(mine), "what": what, "rows": rows}
    if reading.cache is None:
        return collect(batches, features, wanted, **options)
    with FeatureCache(reading.cache, features, wanted.kinds) as cache:
        collected = collect(batches, features, wanted, cache=cache, **options)
    log.info("%s: features of %d images were in %s, %d are new.", what, cache.hits, reading.cache, cache.misses)
    return collected


def source_facts(source: ImageSource, path: str, collected: Collected) -> dict[str, Any]:
    """Entries of the report about images: their source, number and size, and a digest of all of them."""
    return {"path": path, "kind": source.kind, "lossy": bool(source.lossy), **image_facts(collected)}


def image_facts(collected: Collected) -> dict[str, Any]:
    """Count, size, and the SHA-256 of all image digests in order, which does not depend on the storage format."""
    height, width = collected.size
    digest = hashlib.sha256(collected.digests.tobytes()).hexdigest()
    return {"count": collected.count, "height": height, "width": width, "images_sha256": digest}


def _from_images(
    source: ImageSource,
    path: str,
    features: Features,
    wanted: Wanted,
    reading: Reading,
    classes: list[ClassPair],
) -> Reference:
    """Compute a reference from its images; only the features that are needed are kept."""
    count = len(source)
    near = np.zeros(count, bool)  # the images used for precision and recall
    near[keyed_generator(0, Stream.ORDER, count).permutation(count)[: features.neighbour_limit]] = True
    chosen = [pair.theirs for pair in classes]
    rows = near | np.isin(source.labels, chosen) if len(chosen) else near
    collected = look_at(source, features, wanted, reading, "reference", None if rows.all() else rows)
    gaussians = {kind: (moments.mean(), moments.covariance()) for kind, moments in collected.moments.items()}
    reference = Reference(gaussians, classes=classes, facts=source_facts(source, path, collected))
    if "pool" in collected.kept:
        kept = collected.kept["pool"]
        reference.points = kept[torch.from_numpy(near[rows])]
        reference.by_class = {c: kept[torch.from_numpy(source.labels[rows] == c)] for c in chosen}
    return reference


def _pairs(source: ImageSource, classes: Chosen, samples: Classes | None) -> list[ClassPair]:
    if classes == ():
        return []
    require_labels(source.labels, "references")
    pairs = pair_classes(classes, samples, source)
    require_two_of_each(source.labels, {pair.theirs: pair.title for pair in pairs}, "references")
    return pairs


def _from_statistics(path: str, members: list[str], features: Features) -> Reference:
    noted = {name: np.asarray(read_stored(path, name)).tolist() for name in _ORIGIN if name in members}
    origin = {**dict.fromkeys(_ORIGIN), **understand(noted, Origin, path)}  # None where the file does not say
    if origin["count"] is not None:
        require_two(origin["count"], "references")
    facts = {"path": path, "kind": "statistics", **origin, "file_sha256": sha256_of_file(path)}
    if remark := remark_on_resizing(path, members):
        facts["remark"] = remark
    reference = Reference(facts=facts)
    for kind, (mu, sigma) in STORED.items():
        if mu in members and sigma in members:
            reference.gaussians[kind] = _stored(path, mu, sigma, features.dimensions[kind])
        else:
            reference.lacks[kind] = f"{path} has no {mu} and {sigma}"
    if "pool" in reference.lacks:
        raise InputError(f"{path} has mu but no sigma. Expected ADM's keys: arr_0, mu, sigma, mu_s, sigma_s.")
    if "arr_0" not in members:
        reference.lacks["points"] = f"{path} holds no images (arr_0)"
    return reference


def _stored(path: str, mu: str, sigma: str, dimension: int) -> tuple[Tensor, Tensor]:
    mean, covariance = (np.array(read_stored(path, name)) for name in (mu, sigma))
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(f"{path}: {mu} is {mean.dtype} and {sigma} is {covariance.dtype}; expected floats.")
    if mean.shape != (dimension,) or covariance.shape != (dimension, dimension):
        raise InputError(
            f"{path}: {mu} has shape {mean.shape} and {sigma} {covariance.shape}; expected ({dimension},) and "
            f"({dimension}, {dimension}), statistics of the FID Inception."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}: {mu} or {sigma} holds values that are not finite.")
    try:
        require_covariance(covariance)
    except InputError as error:
        raise InputError(f"{path}: {sigma}: {error}") from None
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))


def write_reference(
    path: str, out: str | Path, features: Features, images: int = 10_000, reading: Reading | None = None
) -> dict[str, Any]:
    """Write ADM's reference file for a source of images: mu, sigma, mu_s, sigma_s of all images, and some in arr_0.

    arr_0 contains `images` pictures, drawn in random order by a keyed generator, for precision and recall; arr_1 their
    labels, if any; `Origin` says how the file was made (ADM ignores it). Returns the facts.
    Raises `InputError` when `out` exists or is not an npz, there is nothing to write, or the features are not those of
    Inception.
    """
    if features.name != "inception" or features.fast:
        raise InputError("A reference file holds the published statistics: --features inception, without --fast.")
    if images < 1:
        raise InputError("Precision and recall need images in the reference: --images must be at least 1.")
    if Path(out).suffix != ".npz":
        raise InputError(f"A reference file is an npz: name it {out}.npz.")
    if Path(out).exists():
        raise InputError(f"{out} exists already. Remove it, or choose another name.")
    make_folder_of(out)
    reading = reading or Reading()
    source = open_images(path, reading.unconditional)
    wanted = Wanted(moments=frozenset(STORED))
    collected = look_at(source, features, wanted, reading, "reference")
    facts = source_facts(source, path, collected)
    noted = {**facts, "weights_sha256": features.weights_sha256}
    arrays = {name: np.array(noted[name]) for name in _ORIGIN}
    for kind, (mu, sigma) in STORED.items():
        moments = collected.moments[kind]
        arrays |= {mu: moments.mean().cpu().numpy(), sigma: moments.covariance().cpu().numpy()}
    if not np.isfinite(arrays["sigma"]).all():
        raise InputError(f"{path} holds one image: a reference needs at least two.")
    if PartialState().is_main_process:
        _write(source, Path(out), images, collected, arrays)
    return {**facts, "out": str(out), "images_in_arr_0": min(images, len(source))}


def _write(source: ImageSource, out: Path, images: int, collected: Collected, arrays: dict[str, np.ndarray]) -> None:
    chosen = keyed_generator(0, Stream.ORDER, len(source)).permutation(len(source))[:images]
    if collected.labels is not None:
        arrays = {**arrays, "arr_1": collected.labels.numpy()[chosen]}
        arrays |= {CLASS_NAMES: np.array(source.class_names)} if source.class_names else {}
    with whole_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *collected.size, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for index in tqdm(chosen, unit="img", desc=f"writing {out.name}"):
                member.write(source[int(index)].image.tobytes())
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
