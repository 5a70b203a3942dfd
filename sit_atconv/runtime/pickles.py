"""Reads pickles of numpy arrays, paths and plain containers, without running anything that a pickle names.

A pickle is a program: it names functions and their arguments. Here every name must be in a short table, and most names
in it stand for functions of this file, which check what they are given.
"""

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from sit_atconv.errors import InputError

_KINDS = "biufcSUO"  # of arrays: booleans, numbers, text, and objects, which are read by the same rules


def read_pickle(data: bytes, what: str) -> Any:
    """The object in a pickle of numbers, text, paths, numpy arrays, lists, tuples, dictionaries and sets.

    Strings that Python 2 wrote, also keys, come back as bytes; arrays of numpy 1 and 2 are both read. `what` names the
    file in errors. Raises `InputError` for a damaged pickle, and for one that names anything else.
    """
    try:
        _require_memo_within(data)
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except InputError as error:
        raise InputError(f"{what} {error}") from None
    except Exception as error:  # damaged bytes may raise almost any exception in the unpickler
        reason = f"{type(error).__name__}: {str(error)[:160]}".rstrip(": ")
        raise InputError(f"{what} is damaged, or no pickle ({reason}): fetch it again.") from None


def _require_memo_within(data: bytes) -> None:
    """A damaged number of a memo entry would make the unpickler reserve gigabytes."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise ValueError(f"memo entry {argument} in {len(data)} bytes")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return PLAIN[f"{module.replace('__builtin__', 'builtins')}.{name}"]  # the first is Python 2's
        except KeyError:
            raise InputError(
                f"was pickled with {module}.{name}, and reading that could run code: only numpy arrays, paths "
                "and plain containers are read. If you trust the file, save its arrays alone again, with numpy.savez."
            ) from None


class _Dtype:
    """Stands for numpy.dtype, whose own state can describe memory that an array does not have."""

    def __init__(self, name: str | bytes, *flags: Any) -> None:
        self.dtype = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
        if self.dtype.kind not in _KINDS or self.dtype.names or self.dtype.subdtype:
            raise ValueError(f"arrays of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        _, order, *structure = state[:5]
        if any(part is not None for part in structure):
            raise ValueError("arrays of structures")
        self.dtype = self.dtype.newbyteorder(order.decode("ascii") if isinstance(order, bytes) else order)


class _Array(np.ndarray):
    """An array that is empty until it takes its state from a pickle, if that is whole."""

    def __new__(cls, *_: Any) -> "_Array":
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        size = math.prod(shape) * (1 if dtype.dtype.hasobject else dtype.dtype.itemsize)
        if min(shape, default=0) < 0 or len(content) != size or dtype.dtype.hasobject != isinstance(content, list):
            raise ValueError(f"{len(content)} of the contents of an array {shape}")
        super().__setstate__((1, shape, dtype.dtype, bool(fortran), content))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return np.asarray(self).__reduce_ex__(protocol)


def _buffer_array(buffer: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: _Dtype, content: bytes) -> np.generic:
    return np.frombuffer(content, dtype.dtype, 1)[0]


def _no_bytes() -> bytes:
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding}")
    return text.encode("latin1")


def _dictionary(_: Any = None) -> dict:
    """A defaultdict without its function for missing keys."""
    return {}


# What may be named in a pickle, by its full name, and what is called for it.
PLAIN: dict[str, Any] = {
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    "_codecs.encode": _encode,  # bytes, in Python 3's pickles for Python 2
    "builtins.bytes": _no_bytes,
    "builtins.complex": complex,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": _dictionary,
    **{f"builtins.{kind.__name__}": kind for kind in (list, dict, int, float)},  # of missing keys
}
for _numpy in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    PLAIN |= {
        f"{_numpy}.multiarray._reconstruct": _Array,
        f"{_numpy}.multiarray.scalar": _scalar,
        f"{_numpy}.numeric._frombuffer": _buffer_array,
    }
for _pathlib in ("pathlib", "pathlib._local"):  # the second since Python 3.13
    for _kind in (PurePosixPath, PureWindowsPath):
        PLAIN |= {f"{_pathlib}.{_kind.__name__}": _kind, f"{_pathlib}.{_kind.__name__.removeprefix('Pure')}": _kind}
