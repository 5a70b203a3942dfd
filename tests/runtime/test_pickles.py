"""Pickles of arrays and plain containers are read, whoever wrote them; whatever names something else is refused."""

import collections
import datetime
import os
import pathlib
import pickle

import numpy as np
import pytest

from sit_atconv.errors import InputError
from sit_atconv.runtime.pickles import read_pickle

PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4)
# What Python 2 and numpy 1 write, as in CIFAR's batches: {"data": PIXELS, "labels": [7, 8]}.
PYTHON_2 = (
    b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01bq"
    b"\x05\x87q\x06Rq\x07(K\x01K\x03K\x04\x86q\x08cnumpy\ndtype\nq\tU\x02u1q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\rNNNJ\xff"
    b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89U\x0c\x00\x01\x02\x03\x04\x05\x06\x07\x08\t\n\x0bq\x0ftq\x10bU\x06labelsq\x11]q"
    b"\x12(K\x07K\x08eu."
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_come_back(protocol):
    names = np.array(["a", "bc"])
    value = {
        "mu": np.linspace(0, 1, 7),
        "turned": np.asfortranarray(PIXELS),
        "swapped": PIXELS.astype(">i4"),
        "names": names,
        "objects": np.array([{"a": 1}, None], dtype=object),
        "scalar": np.float64(2.5),
        "nothing": np.zeros((0, 3), np.float32),
        "plain": [1, -(10**20), 0.5, None, True, "text", b"", b"\xff", (1, (2,)), {3, 4}, frozenset([5]), 1j],
        "paths": [pathlib.Path("/data"), pathlib.PureWindowsPath("C:/data")],
        "missing": collections.defaultdict(list, a=[1]),
        "ordered": collections.OrderedDict(b=1, a=2),
    }
    found = read_pickle(pickle.dumps(value, protocol), "x.pkl")
    assert list(found) == list(value) and found["plain"] == value["plain"] and found["ordered"] == value["ordered"]
    assert found["missing"] == {"a": [1]} and found["paths"][0] == pathlib.PurePosixPath("/data")
    assert found["paths"][1] == value["paths"][1] and found["scalar"] == 2.5 and type(found["scalar"]) is np.float64
    for name in ("mu", "turned", "swapped", "names", "objects", "nothing"):
        assert found[name].dtype.kind == value[name].dtype.kind and np.array_equal(found[name], value[name]), name
    again = pickle.loads(pickle.dumps(found))  # data loading processes are sent it
    assert type(again["mu"]) is np.ndarray and np.array_equal(again["mu"], value["mu"])


def test_python_2_is_read_with_its_text_as_bytes():
    found = read_pickle(PYTHON_2, "data_batch_1")
    assert np.array_equal(found[b"data"], PIXELS) and found[b"labels"] == [7, 8]


class Commands:
    """Runs one when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Commands(os.mkdir, "ran"), r"(posix|nt)\.mkdir"),
        (Commands(eval, "1"), r"builtins\.eval"),
        (Commands(np.load, "x"), r"numpy\.load"),
        (datetime.date(2020, 1, 1), r"datetime\.date"),
        (collections.Counter("a"), r"collections\.Counter"),
        ([len], r"builtins\.len"),
    ],
)
def test_everything_else_is_refused_by_its_name(value, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^x\.pkl was pickled with {named}, .*could run code"):
        read_pickle(pickle.dumps({"first": PIXELS, "then": value}), "x.pkl")
    assert list(tmp_path.iterdir()) == []


def state(shape: object, content: object, kind: str = "u1", **change: object) -> bytes:
    """The pickle of an array with this state."""

    class Array:
        def __reduce__(self):
            reconstruct, arguments, (_, _, dtype, fortran, _) = np.zeros(1, kind).__reduce__()
            return reconstruct, arguments, (1, shape, dtype, fortran, content)

    return pickle.dumps(Array())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        PYTHON_2[:-1],
        PYTHON_2[:90],
        PYTHON_2.replace(b"q\x00", b"r\xff\xff\xff\x7f", 1),  # a memo entry that would take 32 GB
        state((2**40, 2**40), b"x"),
        state((-1, -1), b"x"),
        state((2,), b"x"),
        state((2,), [1, 2]),
        state((1,), b"12345678", "O"),
        state(3, b"xxx"),
        pickle.dumps(np.zeros(2, "f4,u1")),
        pickle.dumps(np.zeros(2, "M8[s]")),
    ],
)
def test_damage_is_an_error_of_one_paragraph(data):
    with pytest.raises(InputError, match=r"^x\.pkl is damaged, or no pickle \("):
        read_pickle(data, "x.pkl")


def test_no_flipped_byte_ends_in_another_error():
    random = np.random.default_rng(0)
    for data in (PYTHON_2, pickle.dumps({"mu": np.zeros(3), "names": ["a", "b"]})):
        for _ in range(1000):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[random.integers(len(data))] = random.integers(256)
            try:
                read_pickle(damaged.tobytes(), "x.pkl")
            except InputError as error:
                assert str(error).startswith("x.pkl ")
