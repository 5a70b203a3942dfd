"""`open_foreign`: a path -> latents that another project prepared, by their layout."""

from pathlib import Path

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.data.foreign.edm2 import Edm2Latents, is_edm2
from sit_atconv.data.foreign.fast_dit import FastDitLatents, is_fast_dit
from sit_atconv.data.foreign.lightning_dit import LightningDitLatents, is_lightning_dit
from sit_atconv.data.foreign.mar import MarLatents, is_mar
from sit_atconv.data.foreign_latents import ForeignLatents
from sit_atconv.data.repa import RepaDataset, is_repa
from sit_atconv.errors import InputError

_KINDS = (
    (is_edm2, Edm2Latents),
    (is_lightning_dit, LightningDitLatents),
    (is_fast_dit, FastDitLatents),
    (is_mar, MarLatents),
)


def open_foreign(path: str, spec: LatentSpec, labelled: bool = True) -> ForeignLatents | RepaDataset:
    """Open the latents at `path`, of the autoencoder that `spec` describes, with or without labels.

    Raises `InputError` when there are none of a known layout, or they are not such latents.
    """
    if not Path(path).exists():
        raise InputError(f"'{path}' does not exist.")
    if is_repa(path):
        return RepaDataset(path, spec, labelled)
    for is_kind, kind in _KINDS:
        if is_kind(Path(path)):
            return kind(path, spec, labelled)
    raise InputError(
        f"{path} holds no latents of a layout that --import knows: REPA's (vae-sd/dataset.json in it), EDM2's (a zip "
        "or folder of img-mean-std-….npy with dataset.json), LightningDiT's (safetensors with latents), fast-DiT's "
        "(features/ and labels/) or MAR's (class folders of npz). Leave out --import to encode pictures."
    )
