"""`open_dataset`: one path or name -> latents for training, prepared by us or for REPA."""

from pathlib import Path

from sit_atconv.data.digits import DigitsDataset, is_digits
from sit_atconv.data.latents import LatentDataset
from sit_atconv.data.remote.storage import is_remote
from sit_atconv.data.repa import RepaDataset, is_repa
from sit_atconv.data.shards.dataset import ShardDataset
from sit_atconv.data.shards.manifest import MANIFEST_NAME
from sit_atconv.errors import InputError

__all__ = ["LatentDataset", "open_dataset"]


def open_dataset(path: str, images: bool = False) -> LatentDataset:
    """Open latents: a directory prepared by us or for REPA, the address of one by us, or `digits[:split][@resolution]`.

    With `images=True` the data set must also hold pictures (for a teacher). Raises `InputError` when it is missing or
    incomplete, or lacks pictures that are required.
    """
    path = str(path)
    dataset = _open(path)
    if images and not dataset.has_images:
        raise InputError(f"{path} holds no pictures, which a teacher needs: prepare it with --images.")
    return dataset


def _open(path: str) -> LatentDataset:
    if is_digits(path):
        return DigitsDataset(path)
    if is_remote(path) or (Path(path) / MANIFEST_NAME).is_file():
        return ShardDataset(path)
    if is_repa(path):
        return RepaDataset(path)
    raise InputError(
        f"'{path}' is not a prepared data set (no {MANIFEST_NAME} in it). Prepare it first: python -m "
        "sit_atconv.data.prepare SOURCE OUT --resolution 256 --vae stabilityai/sd-vae-ft-mse; or use 'digits'."
    )
