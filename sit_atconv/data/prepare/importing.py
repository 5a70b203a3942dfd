"""Import latents that REPA or another project prepared, after comparing some of them with the autoencoder's."""

import logging
from dataclasses import replace

import torch

from sit_atconv.autoencoder import Autoencoder
from sit_atconv.data.foreign.open import open_foreign
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.repa import RepaDataset
from sit_atconv.errors import InputError
from sit_atconv.images import to_float

log = logging.getLogger(__name__)

ImportedLatents = RepaDataset | ForeignLatents

_COMPARED = 4
# Relative to the latents' norm. Another device or precision differs by about 0.01, another autoencoder by about 0.5.
_TOLERANCE = 0.1
# A picture in [0, 1] has no pixel below this, up to errors of the autoencoder; half of those in [-1, 1] are below 0.
_DARK, _DARK_SHARE = -0.1, 0.02


def open_for_import(options: PrepareOptions, autoencoder: Autoencoder) -> ImportedLatents:
    """The latents of `options.source`, as latents of `autoencoder`.

    Raises `InputError` when there are none of a known layout, when they lack what the options need, or when they are
    not those of the autoencoder, as far as that can be seen.
    """
    source = options.source
    dataset = open_foreign(source, autoencoder.spec, labelled=not options.reading.unconditional)
    if options.flip and not dataset.has_flip:
        raise InputError(f"{source} holds no mirrored latents: leave out --flip, or --import to encode its pictures.")
    if options.resolution not in (None, dataset.resolution):
        wanted, found = ("x".join(map(str, size)) for size in (options.resolution, dataset.resolution))
        raise InputError(f"{source} holds latents of {found} pixels, not {wanted}: leave out --resolution.")
    if (options.images or options.teachers) and not dataset.has_images:
        raise InputError(f"{source} holds no pictures, which --images and --teacher need.")
    if dataset.has_images:
        _require_its_latents(dataset, autoencoder, source)
    else:
        if dataset.latents.unit_range:
            _require_unit_range(dataset, autoencoder, source)
        log.warning("%s holds no pictures: that its latents are those of %s is taken on trust.", source, options.vae)
    if isinstance(dataset, ForeignLatents):
        log.info("%s: %d latents. %s", source, len(dataset), dataset.remark)
    return dataset


def _require_its_latents(dataset: ImportedLatents, autoencoder: Autoencoder, source: str) -> None:
    """Compare the means of the first pictures that can be read."""
    samples = _first_samples(dataset, images=True)
    if not samples:
        return
    theirs = torch.cat([sample["moments"].chunk(2, dim=1)[0] for sample in samples])
    ours = torch.cat([autoencoder.encode(to_float(sample["image"])).chunk(2, dim=1)[0].cpu() for sample in samples])
    error = float((ours - theirs).norm() / theirs.norm())
    if error > _TOLERANCE:
        raise InputError(
            f"The latents of {source} are not those of {autoencoder.spec.autoencoder}: its latents of the "
            f"first pictures differ by {100 * error:.0f} %. Give the autoencoder that encoded them as --vae (REPA's is "
            "stabilityai/sd-vae-ft-mse), or leave out --import to encode the pictures again."
        )


def _require_unit_range(dataset: ImportedLatents, autoencoder: Autoencoder, source: str) -> None:
    """Raise `InputError` if the first latents are decoded to pictures that are not in [0, 1]."""
    means = torch.cat([sample["moments"].chunk(2, dim=1)[0] for sample in _first_samples(dataset)])
    plain = replace(dataset.latents, unit_range=False)
    decoded = autoencoder.decode(plain.normalise(means))  # with the specification of the autoencoder, hence in [-1, 1]
    share = float((decoded < _DARK).float().mean())
    if share > _DARK_SHARE:
        raise InputError(
            f"{source} has EDM2's layout, but {100 * share:.0f} % of the pixels of its first latents are decoded to "
            f"less than {_DARK}: EDM2 encodes pictures in [0, 1]. Are they of another autoencoder? Give it as --vae. "
            "Or of pictures in [-1, 1], as REPA encodes them? Then put them, unpacked, into a folder vae-sd, and give "
            "the folder around it."
        )


def _first_samples(dataset: ImportedLatents, images: bool = False) -> list[dict[str, torch.Tensor]]:
    """Those of the first samples that can be read; others are counted and named when their batch is read."""
    samples = []
    for index in range(min(_COMPARED, len(dataset))):
        try:
            samples.append(dataset.read([index], [False], images=images))
        except InputError:
            continue
    return samples
