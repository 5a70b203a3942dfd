"""Writes reference files: ADM's keys for Inception, statistics of other features, and some of the images."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from sit_atconv.data.pictures.protocol import ImageSource
from sit_atconv.data.sources.npz import CLASS_NAMES
from sit_atconv.errors import InputError
from sit_atconv.evaluation.features.kinds import Features
from sit_atconv.evaluation.features.spaces import Spaces
from sit_atconv.evaluation.reading.collect import Collected, Wanted
from sit_atconv.evaluation.reading.loading import open_images
from sit_atconv.evaluation.reading.references import Reading, look_at, source_facts
from sit_atconv.evaluation.reading.stored import ORIGIN, names_of
from sit_atconv.randomness import Stream, keyed_generator
from sit_atconv.runtime.whole_files import make_folder_of, whole_file


def write_reference(
    path: str,
    out: str | Path,
    features: Features | Sequence[Features],
    images: int = 10_000,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Write ADM's reference file for a source of images: mu, sigma, mu_s, sigma_s of all images, and some in arr_0.

    arr_0 contains `images` pictures, drawn in random order by a keyed generator, for precision and recall; arr_1 their
    labels, if any; `Origin` says how the file was made (ADM ignores it). Other features than Inception have
    "mu_NAME" and "sigma_NAME". Returns the facts.
    Raises `InputError` when `out` exists or is not an npz, there is nothing to write, or features are in bfloat16.
    """
    spaces = Spaces(features)
    if any(space.features.fast for space in spaces):
        raise InputError("A reference file holds statistics for publication: without --fast.")
    if images < 1:
        raise InputError("Precision and recall need images in the reference: --images must be at least 1.")
    if Path(out).suffix != ".npz":
        raise InputError(f"A reference file is an npz: name it {out}.npz.")
    if Path(out).exists():
        raise InputError(f"{out} exists already. Remove it, or choose another name.")
    make_folder_of(out)
    reading = reading or Reading()
    source = open_images(path, reading.unconditional)
    names = {prefix + kind: pair for each, prefix in spaces for kind, pair in names_of(each).items()}
    collected = look_at(source, spaces, Wanted(moments=frozenset(names)), reading, "reference")
    facts = source_facts(source, path, collected)
    inception = next((space.features.weights_sha256 for space in spaces if space.features.name == "inception"), None)
    noted = {**facts, "weights_sha256": inception}
    arrays = {name: np.array(noted[name]) for name in ORIGIN if noted[name] is not None}
    arrays |= {
        f"weights_sha256_{features.name}": np.array(features.weights_sha256)
        for features, _ in spaces
        if features.name != "inception" and features.weights_sha256
    }
    for kind, (mu, sigma) in names.items():
        moments = collected.moments[kind]
        arrays |= {mu: moments.mean().cpu().numpy(), sigma: moments.covariance().cpu().numpy()}
    if collected.count < 2:
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
