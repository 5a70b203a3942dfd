"""Statistics of Inception features as ADM and other projects store them, under ADM's names: mu, sigma, mu_s, sigma_s.

Read are npz files (ADM, pytorch-fid, clean-fid, EDM); torch-fidelity's cached .pt; dictionaries that were pickled, in
.npy or .pkl, such as EDM2's {"fid": {"mu": …, "sigma": …}}. Nothing that a pickle names is run (`read_pickle`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sit_atconv.data.sources.npz import npz_members, read_npz_member
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import BAD_HEADER, read_npy_header
from sit_atconv.runtime.pickles import read_pickle
from sit_atconv.runtime.weights import read_weights

_TORCH, _PICKLED = (".pt", ".pth"), (".pkl", ".pickle")
_NAMES = {"num_images": "count"}  # EDM2's, and ours
_RESIZED = (
    "{} Inception sees pictures of 299 pixels, and FID depends on how they were resized: ADM, EDM2 and torch-fidelity "
    "do it as TensorFlow 1 did. Compare with their statistics, or give images as the reference."
)


def stored_names(path: str) -> list[str]:
    """The names of the arrays in the file of statistics at `path`; none if it is not one, as a folder or an array.

    Raises `InputError` for a damaged file, and for one in a format of statistics that holds none.
    """
    if not Path(path).is_file():
        return []
    return npz_members(path) if path.lower().endswith(".npz") else list(_read(path))


def read_stored(path: str, name: str) -> np.ndarray:
    """One of the arrays that `stored_names` lists. Raises `InputError` when it is damaged."""
    return read_npz_member(path, name) if path.lower().endswith(".npz") else _read(path)[name]


def remark_on_resizing(path: str, names: list[str]) -> str | None:
    """A warning, if the statistics are, or may be, of pictures that were resized in another way than by us.

    Their makers are known by sFID's statistics (ADM), the weights' digest (ours) or the file's name (clean-fid's says
    its mode, torch-fidelity's the network).
    """
    name = Path(path).name.lower()
    if "_clean_" in name:
        return _RESIZED.format("By its name, the reference is of clean-fid's mode clean, which resizes with a filter.")
    if "_legacy_pytorch_" in name:
        return _RESIZED.format("By its name, the reference is of clean-fid's mode legacy_pytorch.")
    known = "legacy_tensorflow" in name or "inception-v3-compat" in name or name.endswith(_PICKLED)
    if known or {"mu_s", "weights_sha256"} & set(names):
        return None
    return _RESIZED.format("The reference does not say who made it: pytorch-fid and clean-fid resize otherwise.")


def _read(path: str) -> dict[str, np.ndarray]:
    """The arrays in a file of statistics that is no npz; none for other files."""
    suffix = Path(path).suffix.lower()
    if suffix in _TORCH:
        content = read_weights(Path(path))
    elif suffix in _PICKLED:
        content = read_pickle(Path(path).read_bytes(), path)
    elif suffix == ".npy" and (pickled := _pickled_part(path)):
        content = read_pickle(pickled, path)
        content = content.item() if isinstance(content, np.ndarray) and content.ndim == 0 else content
    else:
        return {}
    if isinstance(content, Mapping) and isinstance(content.get("fid"), Mapping):
        content = {**content, **content["fid"]}
    found = content if isinstance(content, Mapping) else {}
    arrays = {_NAMES.get(name, name): array for name, value in found.items() if (array := _array(value)) is not None}
    if not {"mu", "sigma"} <= arrays.keys():
        what = ", ".join(map(str, content))[:80] if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(f"{path} holds {what}: expected statistics, a dictionary with the arrays mu and sigma.")
    return arrays


def _array(value: Any) -> np.ndarray | None:
    """An array, a tensor or a number as an array; None for anything else."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        return value.detach().to(torch.float64 if value.is_floating_point() else value.dtype).numpy()
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic | int | float) else None


def _pickled_part(path: str) -> bytes:
    """The pickle in an .npy of Python objects; nothing if it holds numbers."""
    with open(path, "rb") as file:
        try:
            _, _, dtype = read_npy_header(file)
        except BAD_HEADER as error:
            raise InputError(f"{path} is no file of numpy, or damaged: {error}. Fetch it again.") from error
        return file.read() if dtype.hasobject else b""
