"""Writing a converted model to a directory that `SiT.from_pretrained`, sample.py and evaluate_fid.py open."""

import re
import shutil
from pathlib import Path

from safetensors.torch import save_file

from sit_atconv.convert.checkpoint import Released
from sit_atconv.errors import InputError
from sit_atconv.models import SiT

PROJECTORS_NAME = "projectors.safetensors"


def require_free(out: Path) -> None:
    """Raise `InputError` when something is at `out` already."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists already: choose another directory, or remove it first.")


def save_converted(model: SiT, released: Released, out: Path) -> None:
    """Write config.json and weights, and REPA's projectors, where there are any, beside them; whole or not at all.

    projectors.safetensors goes by the names of `ModuleList([Projector, …])`, which is what training holds; its metadata
    tell the aligned "block", counted from 1, and the "teachers" in REPA's words, as far as the release does.
    """
    out = out.resolve()
    require_free(out)
    unfinished = out.with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    if released.projectors:
        ours = {re.sub(r"^(\d+)\.(\d+)\.", r"\1.layers.\2.", key): value for key, value in released.projectors.items()}
        facts = {"block": released.aligned_block, "teachers": released.arguments.get("enc_type")}
        known = {key: str(value) for key, value in facts.items() if value is not None}
        save_file(ours, unfinished / PROJECTORS_NAME, metadata=known)
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
