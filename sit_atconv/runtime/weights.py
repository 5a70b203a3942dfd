"""Whether the numbers in a file are weights."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sit_atconv.errors import InputError

_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names


def require_floats(path: Path) -> None:
    """Raise `InputError` naming the first tensor of a safetensors file that holds integers or other foreign numbers.

    They would be converted to fp32 without a word. Reads the header alone; what is no such file is a SafetensorError.
    """
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            kind = file.get_slice(name).get_dtype()
            if kind not in _FLOATS:
                raise InputError(
                    f"{name} in {path} holds {kind} numbers: expected floating point ({', '.join(_FLOATS)}). "
                    "Quantised or foreign weights cannot be used as they are: save the model in fp32 again."
                )


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `InputError` naming the first tensor in which there are NaN or infinite values."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise InputError(
                f"{name} in {where} has {count} values that are NaN or infinite: these weights are of no use."
            )
