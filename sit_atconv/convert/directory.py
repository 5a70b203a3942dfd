"""Writes a converted model to a directory that `SiT.from_pretrained`, sample.py and evaluate_fid.py can open."""

import re
from pathlib import Path

from safetensors.torch import save_file

from sit_atconv.convert.checkpoint import Released
from sit_atconv.models import SiT
from sit_atconv.runtime.whole_files import whole_folder

PROJECTORS_NAME = "projectors.safetensors"


def save_converted(model: SiT, released: Released, out: Path) -> None:
    """Write config.json and the weights atomically, together with REPA's projectors if there are any.

    projectors.safetensors uses the names of `ModuleList([Projector, …])`, as in training. Its metadata hold the aligned
    "block", counted from 1, and the "teachers" under REPA's names, as far as the release states them.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as unfinished:
        model.save_pretrained(unfinished)
        _save_projectors(released, unfinished)


def _save_projectors(released: Released, folder: Path) -> None:
    if released.projectors:
        ours = {re.sub(r"^(\d+)\.(\d+)\.", r"\1.layers.\2.", key): value for key, value in released.projectors.items()}
        facts = {"block": released.aligned_block, "teachers": released.arguments.get("enc_type")}
        known = {key: str(value) for key, value in facts.items() if value is not None}
        save_file(ours, folder / PROJECTORS_NAME, metadata=known)
