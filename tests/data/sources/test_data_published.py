"""Published data sets, in files written here byte by byte as their descriptions say."""

import gzip
import json
import os
import pickle
import struct

import numpy as np
import pytest
from scipy.io import savemat
from test_data_arrays import lines
from test_data_sources import picture

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError


def squares(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.stack([picture(seed + k, side, side) for k in range(count)])


def text_2(word: bytes) -> bytes:
    """A string of Python 2 in a pickle, which is not the type that Python 3 would write for bytes."""
    return b"T" + struct.pack("<I", len(word)) + word


def array_2(array: np.ndarray) -> bytes:
    """A byte array as numpy of Python 2 pickled it."""
    dtype = b"cnumpy\ndtype\n" + b"(" + text_2(b"u1") + b"K\x00K\x01tR(K\x03" + text_2(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", side) for side in array.shape) + b"t"
    begin = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text_2(b"b") + b"tR"
    return begin + b"(K\x01" + shape + dtype + b"\x89" + text_2(array.tobytes()) + b"tb"


def pickle_2(**values: np.ndarray | list) -> bytes:
    """A dictionary as Python 2 pickled it, in protocol 2."""
    body = b""
    for key, value in values.items():
        if isinstance(value, np.ndarray):
            item = array_2(value)
        else:
            item = b"](" + b"".join(text_2(v) if isinstance(v, bytes) else b"K" + bytes([v]) for v in value) + b"e"
        body += text_2(key.encode()) + item
    return b"\x80\x02}(" + body + b"u."


def write_cifar_10(folder, write=pickle_2):
    folder.mkdir()
    pictures = squares(12, 32)
    for number in range(5):
        rows = lines(pictures[2 * number : 2 * number + 2])
        (folder / f"data_batch_{number + 1}").write_bytes(write(data=rows, labels=[number, 0], filenames=[b"a.png"]))
    (folder / "test_batch").write_bytes(write(data=lines(pictures[10:]), labels=[9, 3]))
    names = [b"airplane", b"car", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]
    (folder / "batches.meta").write_bytes(write(label_names=names, num_vis=[1]))
    (folder / "readme.html").write_text("text")
    return pictures


def as_python_3(**values: np.ndarray | list) -> bytes:
    return pickle.dumps(values)


@pytest.mark.parametrize("write", [pickle_2, as_python_3])
def test_cifar_10(tmp_path, write):
    pictures = write_cifar_10(tmp_path / "cifar-10-batches-py", write)
    root = f"{tmp_path}/cifar-10-batches-py"
    with pytest.raises(InputError, match=r"holds splits \(train, test\): choose one, as .*batches-py:train"):
        open_source(root)
    source = pickle.loads(pickle.dumps(open_source(f"{root}:train")))
    assert source.labels.tolist() == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0] and source.class_names[9] == "truck"
    for index in range(10):
        np.testing.assert_array_equal(source[index].image, pictures[index])
    source = open_source(f"{root}/test_batch")
    assert source.labels.tolist() == [9, 3] and source[1].image.tobytes() == pictures[11].tobytes()
    os.remove(f"{root}/data_batch_4")
    with pytest.raises(InputError, match=r"lacks data_batch_4"):
        open_source(f"{root}:train")


def test_cifar_10_by_the_command(tmp_path):
    write_cifar_10(tmp_path / "cifar")
    prepare([f"{tmp_path}/cifar:test", str(tmp_path / "out"), "--resolution", "32", "--vae", "identity"])
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (manifest["count"], manifest["num_classes"], manifest["class_names"][9]) == (2, 10, "truck")


def test_cifar_100_has_fine_and_coarse_labels(tmp_path):
    rows = lines(squares(2, 32))
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle_2(data=rows, fine_labels=[99, 0], coarse_labels=[1, 0]))
    names = {"fine_label_names": [b"f%d" % n for n in range(100)], "coarse_label_names": [b"fish", b"people"]}
    (tmp_path / "meta").write_bytes(pickle_2(**names))
    source = open_source(f"{tmp_path}:train")
    assert source.labels.tolist() == [99, 0] and source.class_names[99] == "f99"
    source = open_source(f"{tmp_path}:test", options=SourceOptions(label_key="coarse_labels"))
    assert source.labels.tolist() == [1, 0] and source.class_names == ["fish", "people"]
    with pytest.raises(InputError, match="holds no other; it has data, fine_labels, coarse_labels"):
        open_source(f"{tmp_path}:test", options=SourceOptions(label_key="other"))


@pytest.mark.parametrize("kind", ["pickle", "npz"])
def test_imagenet_32_in_batches(tmp_path, kind):
    pictures = squares(20, 32)
    for number in range(10):
        batch = {
            "data": lines(pictures[2 * number : 2 * number + 2]),
            "labels": np.array([1, 1000]),
            "mean": np.zeros(3),
        }
        path = tmp_path / f"train_data_batch_{number + 1}"
        if kind == "npz":
            np.savez(path, **batch)
        else:
            path.write_bytes(pickle.dumps(batch | {"labels": [1, 1000]}))
    source = open_source(tmp_path)
    assert source.labels.tolist() == [0, 999] * 10
    np.testing.assert_array_equal(source[19].image, pictures[19])  # 10 comes after 9


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"data": Harm(), "labels": [0]}), r"was pickled with posix\.system"),
        (pickle.dumps({"data": np.array([{}]), "labels": [0]}), r"has shape .1,."),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [0]}), "data is float64"),
        (pickle.dumps({"data": np.zeros((1, 100), np.uint8), "labels": [0]}), "expected rows of 3 x S x S"),
        (pickle.dumps({"labels": [0]}), "holds no data; it has labels"),
        (pickle.dumps({"data": [[0]], "labels": [0]}), "holds no data"),
        (pickle.dumps([1, 2]), "holds a list: expected a dictionary"),
        (pickle.dumps({"data": np.full((1, 3072), 9, np.uint8), "labels": [0]})[:-40], "is damaged, or no pickle"),
        (pickle.dumps({"data": np.full((1, 3072), 9, np.uint8), "labels": [0, 1]}), "holds 2 labels for 1 images"),
        (pickle.dumps({"data": np.full((1, 3072), 9, np.uint8), "labels": [None]}), "label in row 0 is missing"),
        (pickle.dumps({"data": np.full((1, 3072), 9, np.uint8), "labels": [-1]}), "label in row 0 is -1"),
    ],
)
def test_pickles_that_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "test_batch", convert=True)
    assert not (tmp_path / "harmed").exists()


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_mnist(tmp_path, ending, folder):
    pack = gzip.compress if ending else bytes
    grey, root = np.stack([picture(seed, 28, 28)[..., 0] for seed in range(4)]), tmp_path / folder
    root.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", slice(0, 3)), ("t10k", slice(3, 4))):
        (root / f"{split}-images-idx3-ubyte{ending}").write_bytes(pack(idx(grey[rows])))
        (root / f"{split}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(np.array([7, 0, 9, 1], np.uint8)[rows])))
    source = pickle.loads(pickle.dumps(open_source(f"{root.parent if folder else root}:train", convert=True)))
    assert source.labels.tolist() == [7, 0, 9]
    for index in range(3):
        np.testing.assert_array_equal(source[index].image, np.repeat(grey[index][..., None], 3, axis=2))
    source = open_source(root / f"t10k-images-idx3-ubyte{ending}", convert=True)
    assert source.labels.tolist() == [1] and source[0].image[..., 0].tobytes() == grey[3].tobytes()
    with pytest.raises(InputError, match=r"holds splits \(test, train\): choose one"):
        open_source(root)


def test_emnist_is_turned_upright_and_its_letters_begin_with_a(tmp_path):
    grey = np.stack([picture(seed, 28, 28)[..., 0] for seed in range(2)])
    (tmp_path / "emnist-letters-train-images-idx3-ubyte").write_bytes(idx(grey.transpose(0, 2, 1).copy()))
    (tmp_path / "emnist-letters-train-labels-idx1-ubyte").write_bytes(idx(np.array([26, 1], np.uint8)))
    source = open_source(f"{tmp_path}:letters-train", convert=True)
    assert source.labels.tolist() == [25, 0] and source.class_names is None
    np.testing.assert_array_equal(source[1].image[..., 2], grey[1])
    mapping = "".join(f"{n} {64 + n} {96 + n}\n" for n in range(1, 27))
    (tmp_path / "emnist-letters-mapping.txt").write_text(mapping)
    assert open_source(tmp_path, convert=True).class_names[:2] == ["Aa", "Bb"]
    (tmp_path / "emnist-letters-mapping.txt").write_text("A B")
    with pytest.raises(InputError, match="is no mapping of labels to characters"):
        open_source(tmp_path, convert=True)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", idx(np.zeros(1, np.uint8)), "is no idx file of bytes with 3 axes"),
        (idx(np.ones((1, 28, 28), np.uint8))[:-1], b"", r"declares \[1, 28, 28\], but 783 bytes follow"),
        (idx(np.full((1, 28, 28), 9, np.uint8)), idx(np.zeros(2, np.uint8)), "2 labels for 1 images"),
        (idx(np.full((1, 28, 28), 9, np.uint8)), idx(np.zeros((1, 1), np.uint8)), "with 1 axes"),
        (idx(np.full((1, 28, 28), 9, np.uint8)), None, "has no labels for train-images-idx3-ubyte"),
    ],
)
def test_idx_files_that_are_refused(tmp_path, images, labels, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    if labels is not None:
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path, convert=True)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.full((1, 28, 28), 9, np.uint8)))
    assert len(open_source(tmp_path, options=SourceOptions(convert=True, unconditional=True))) == 1


def test_damaged_gzip(tmp_path):
    for content in (b"junk", gzip.compress(idx(np.ones((1, 28, 28), np.uint8)))[:-20]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"Cannot read .*train-images-idx3-ubyte\.gz"):
            open_source(tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn(tmp_path, compressed):
    pictures = squares(3, 32)
    for split, order in (("train", [0, 1, 2]), ("extra", [2])):
        arrays = {"X": pictures[order].transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]], np.uint8)[order]}
        savemat(tmp_path / f"{split}_32x32.mat", arrays, do_compression=compressed)
    source = pickle.loads(pickle.dumps(open_source(f"{tmp_path}:train")))
    assert source.labels.tolist() == [0, 1, 9]  # the digit 0 is labelled 10
    for index in range(3):
        np.testing.assert_array_equal(source[index].image, pictures[index])
    assert open_source(tmp_path / "extra_32x32.mat").labels.tolist() == [9]
    whole = (tmp_path / "extra_32x32.mat").read_bytes()
    for content, message in (
        (whole[:400], "Cannot read|not one of SVHN"),
        (b"", "Cannot read"),
        (b"x" * 999, "Cannot read"),
    ):
        (tmp_path / "extra_32x32.mat").write_bytes(content)
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / "extra_32x32.mat")
    savemat(tmp_path / "extra_32x32.mat", {"y": np.zeros(3)})
    with pytest.raises(InputError, match="not one of SVHN"):
        open_source(f"{tmp_path}:extra")


def test_stl_10(tmp_path):
    pictures = squares(3, 96)
    columns = pictures.transpose(0, 3, 2, 1).copy()  # column after column, channel after channel
    (tmp_path / "train_X.bin").write_bytes(columns[:2].tobytes())
    (tmp_path / "train_y.bin").write_bytes(bytes((10, 1)))
    (tmp_path / "unlabeled_X.bin").write_bytes(columns[2:].tobytes())
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (tmp_path / "class_names.txt").write_text("\n".join(names))
    source = pickle.loads(pickle.dumps(open_source(f"{tmp_path}:train")))
    assert source.labels.tolist() == [9, 0] and source.class_names == names
    np.testing.assert_array_equal(source[1].image, pictures[1])
    source = open_source(f"{tmp_path}:unlabeled")
    assert source.labels is None and source[0].image.tobytes() == pictures[2].tobytes()
    (tmp_path / "train_y.bin").write_bytes(bytes((10, 0)))
    with pytest.raises(InputError, match="label in row 1 is 0; STL-10 counts classes from 1"):
        open_source(f"{tmp_path}:train")
    (tmp_path / "train_y.bin").write_bytes(bytes((11, 1)))
    with pytest.raises(InputError, match="label in row 0 is 10, but only 10 classes are named"):
        open_source(f"{tmp_path}:train")
    (tmp_path / "train_X.bin").write_bytes(columns.tobytes()[:-1])
    with pytest.raises(InputError, match=r"no multiple of 27,648"):
        open_source(f"{tmp_path}:train")
