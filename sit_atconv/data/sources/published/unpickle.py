"""Pickles of arrays, read without running anything that they name."""

import io
import pickle
from typing import Any

import numpy as np

from sit_atconv.errors import InputError

_PLAIN = frozenset(("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "b1"))


class _Dtype:
    """Stands for numpy's dtype: its name and byte order."""

    def __init__(self, name: str | bytes, *flags: Any) -> None:
        self.name, self.order = name.decode() if isinstance(name, bytes) else name, "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order

    def real(self) -> np.dtype:
        if self.name not in _PLAIN or self.order not in ("=", "<", ">", "|"):
            raise pickle.UnpicklingError(f"arrays of type {self.name!r}")
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    """Stands for numpy's ndarray: its state, from which `_plain` makes an array."""

    def __init__(self, *arguments: Any) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def real(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        real = dtype.real()
        values = np.frombuffer(data if isinstance(data, bytes) else data.encode("latin1"), real)
        return values.reshape(shape, order="F" if fortran else "C")


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def read_arrays(data: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3, whose values are arrays, numbers, text, and lists of these.

    Text of Python 2 may stay bytes. Raises `InputError` for anything else: nothing that a pickle names is imported or
    called, so it can do no harm.
    """
    try:
        found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return {_text(key): _plain(value) for key, value in found.items()}
    except Exception as error:  # damaged pickles fail in every way there is
        raise InputError(
            f"Cannot read {where}: not a pickle of arrays only ({error or type(error).__name__}). Fetch it again."
        ) from error


def _plain(value: Any) -> Any:
    return value.real() if isinstance(value, _Array) else value


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
