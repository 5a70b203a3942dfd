"""Import the latents of a directory prepared for REPA, after comparing some of them with the autoencoder's."""

import logging

import torch

from sit_atconv.autoencoder import Autoencoder
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.repa import RepaDataset, is_repa
from sit_atconv.errors import InputError
from sit_atconv.images import to_float

log = logging.getLogger(__name__)

_COMPARED = 4
# Relative to the latents' norm. Another device or precision differs by about 0.01, another autoencoder by about 0.5.
_TOLERANCE = 0.1


def open_for_import(options: PrepareOptions, autoencoder: Autoencoder) -> RepaDataset:
    """The latents of `options.source`, as latents of `autoencoder`.

    Raises `InputError` when the source was not prepared for REPA or lacks what the options need, or when the
    autoencoder encodes its first pictures to other latents.
    """
    source = options.source
    if not is_repa(source):
        raise InputError(f"{source} was not prepared for REPA (no vae-sd/dataset.json in it): leave out --import.")
    if options.flip:
        raise InputError(f"{source} holds no mirrored latents: leave out --flip, or --import to encode its pictures.")
    dataset = RepaDataset(source, autoencoder.spec, labelled=not options.reading.unconditional)
    if options.resolution not in (None, dataset.resolution):
        wanted, found = ("x".join(map(str, size)) for size in (options.resolution, dataset.resolution))
        raise InputError(f"{source} holds latents of {found} pixels, not {wanted}: leave out --resolution.")
    if (options.images or options.teachers) and not dataset.has_images:
        raise InputError(f"{source} holds no pictures (images/), which --images and --teacher need.")
    if dataset.has_images:
        _require_its_latents(dataset, autoencoder, source)
    else:
        log.warning("%s holds no pictures: that its latents are those of %s is taken on trust.", source, options.vae)
    return dataset


def _require_its_latents(dataset: RepaDataset, autoencoder: Autoencoder, source: str) -> None:
    """Compare the means of the first pictures that can be read."""
    stored, encoded = [], []
    for index in range(min(_COMPARED, len(dataset))):
        try:
            sample = dataset.read([index], [False], images=True)
        except InputError:
            continue  # counted and named when its batch is read
        stored.append(sample["moments"].chunk(2, dim=1)[0])
        encoded.append(autoencoder.encode(to_float(sample["image"])).chunk(2, dim=1)[0].cpu())
    if not stored:
        return
    theirs, ours = torch.cat(stored), torch.cat(encoded)
    error = float((ours - theirs).norm() / theirs.norm())
    if error > _TOLERANCE:
        raise InputError(
            f"The latents of {source} are not those of {autoencoder.spec.autoencoder}: its latents of the "
            f"first pictures differ by {100 * error:.0f} %. Give the autoencoder that encoded them as --vae (REPA's is "
            "stabilityai/sd-vae-ft-mse), or leave out --import to encode the pictures again."
        )
