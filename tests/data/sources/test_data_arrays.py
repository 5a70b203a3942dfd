"""Arrays of pictures under the names that people give them, in npz and npy files."""

import json
import pickle

import numpy as np
import pytest
from test_data_sources import picture

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError

IMAGES = np.stack([picture(seed) for seed in range(4)])
LABELS = np.array([2, 0, 1, 1])


def lines(*arrays: np.ndarray) -> np.ndarray:
    """Pictures as rows, channel after channel."""
    return np.concatenate([images.transpose(0, 3, 1, 2).reshape(len(images), -1) for images in arrays])


def write_npz(folder, **arrays: np.ndarray) -> str:
    np.savez(folder / "x.npz", **arrays)
    return str(folder / "x.npz")


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("x", "y"), ("X", "targets"), ("imgs", "label"), ("image", "cls")]
)
@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "one-hot", "names"])
def test_usual_names_and_shapes_of_labels(tmp_path, names, shape):
    words = np.array(["ant", "bee", "cat"])[LABELS]
    labels = {"(N,)": LABELS, "(N, 1)": LABELS[:, None], "one-hot": np.eye(3)[LABELS], "names": words.astype("S")}[
        shape
    ]
    source = pickle.loads(pickle.dumps(open_source(write_npz(tmp_path, **{names[0]: IMAGES, names[1]: labels}))))
    assert source.labels.tolist() == LABELS.tolist()
    assert source.class_names == (["ant", "bee", "cat"] if shape == "names" else None)
    assert source[1].name == f"x.npz:{names[0]}[1]" and source[1].label == 0
    np.testing.assert_array_equal(source[3].image, picture(3))
    source.verify()


@pytest.mark.parametrize(
    "keys", [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")]
)
def test_splits_are_chosen(tmp_path, keys):
    path = write_npz(tmp_path, **dict(zip(keys, (IMAGES[:3], LABELS[:3], IMAGES[3:], LABELS[3:]), strict=True)))
    with pytest.raises(InputError, match=r"holds splits \(train, test\): choose one, as .*x\.npz:train"):
        open_source(path)
    assert open_source(f"{path}:train").labels.tolist() == [2, 0, 1]
    source = open_source(f"{path}:test")
    assert source.labels.tolist() == [1] and source[0].image.tobytes() == IMAGES[3].tobytes()
    with pytest.raises(InputError, match="no split 'val'; it has train, test"):
        open_source(f"{path}:val")


def test_medmnist_by_the_command(tmp_path):
    grey = IMAGES[..., 0]
    arrays = {f"{split}_images": grey for split in ("train", "val", "test")}
    path = write_npz(
        tmp_path, **arrays, **{key.replace("images", "labels"): LABELS[:, None].astype(np.uint8) for key in arrays}
    )
    prepare([f"{path}:val", str(tmp_path / "out"), "--resolution", "8", "--vae", "identity"])
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (manifest["count"], manifest["num_classes"]) == (4, 3)


def test_names_that_are_given(tmp_path):
    path = write_npz(tmp_path, arr_0=IMAGES, pixels=IMAGES[::-1], arr_1=LABELS, fine=LABELS + 3, labels=LABELS + 1)
    assert open_source(path).labels.tolist() == LABELS.tolist()  # arr_0 and arr_1 come first
    source = open_source(path, options=SourceOptions(image_key="pixels", label_key="fine"))
    assert source.labels.tolist() == [5, 3, 4, 4] and source[0].image.tobytes() == IMAGES[3].tobytes()
    assert open_source(path, options=SourceOptions(label_key="fine")).labels.tolist() == [5, 3, 4, 4]
    for options in (SourceOptions(image_key="nothing"), SourceOptions(label_key="nothing")):
        with pytest.raises(InputError, match=r"has no array 'nothing' for --.*-key; it holds arr_0"):
            open_source(path, options=options)
    for options in (SourceOptions(), SourceOptions(image_key="pixels")):
        with pytest.raises(InputError, match="has no splits to choose from: leave out ':train'"):
            open_source(f"{path}:train", options=options)


def test_imagenet_32(tmp_path, caplog):
    """Flat rows, channel after channel, and classes from 1 to 1000."""
    caplog.set_level("INFO")
    square = np.stack([picture(seed, 32, 32) for seed in range(3)])
    path = write_npz(tmp_path, data=lines(square), labels=np.array([1, 1000, 7]), mean=np.zeros(3072))
    source = open_source(path)
    assert source.labels.tolist() == [0, 999, 6] and "1 … 1000 are numbered from 0 here" in caplog.text
    np.testing.assert_array_equal(source[2].image, square[2])
    path = write_npz(tmp_path, data=lines(square), labels=np.array([1, 0, 7]))
    assert open_source(path).labels.tolist() == [1, 0, 7]


def test_labels_without_a_zero_are_kept_and_said(tmp_path, caplog):
    assert open_source(write_npz(tmp_path, images=IMAGES, labels=LABELS + 1), convert=True).labels.tolist() == [
        3,
        1,
        2,
        2,
    ]
    assert "no label is 0" in caplog.text


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": IMAGES, "x": IMAGES},
            r"several arrays that may hold pictures \(images, x\): choose by --image-key",
        ),
        ({"images": IMAGES, "y": LABELS, "labels": LABELS}, r"may hold labels \(y, labels\): choose by --label-key"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels: the label in row 1 is -1"),
        ({"images": IMAGES, "labels": np.ones((4, 14))}, "row 0 is no one-hot label"),
        ({"images": IMAGES, "labels": LABELS[:2]}, "labels holds 2 labels for 4 images"),
        ({"images": IMAGES, "labels": np.array([None] * 4)}, "'labels' holds pickled Python objects"),
        ({"images": IMAGES.astype(np.float32)}, "images is float32"),
        ({"images": IMAGES[0]}, "greyscale|has shape"),
        ({"data": np.zeros((4, 100), np.uint8)}, r"expected rows of 3 x S x S numbers"),
        ({"features": IMAGES}, r"has no array 'arr_0'; it holds features\. Name the pictures by --image-key"),
    ],
)
def test_npz_that_are_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        open_source(write_npz(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"), ("X", "y")]
)
def test_npy_with_labels_beside_it(tmp_path, images, labels):
    np.save(tmp_path / f"{images}.npy", IMAGES)
    assert open_source(tmp_path / f"{images}.npy").labels is None
    np.save(tmp_path / f"{labels}.npy", LABELS)
    source = pickle.loads(pickle.dumps(open_source(tmp_path / f"{images}.npy")))
    assert source.labels.tolist() == LABELS.tolist() and source.kind == "npy"
    np.testing.assert_array_equal(source[2].image, picture(2))
    assert open_source(tmp_path / f"{images}.npy", options=SourceOptions(unconditional=True)).labels is None


def test_npy_that_are_refused(tmp_path):
    path = tmp_path / "images.npy"
    for content, message in (
        (b"", "Cannot read"),
        (b"junk" * 99, "Cannot read .*Expected an array of numpy.save"),
        (pickle.dumps([1]), "Cannot read"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            open_source(path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(InputError, match=r"Cannot read .*images\.npy"):
        open_source(path)
    np.save(path, IMAGES)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"Cannot read .*images\.npy"):
        open_source(path)
    np.save(path, LABELS)
    with pytest.raises(InputError, match="images is int64"):
        open_source(path)
    np.save(tmp_path / "labels.npy", LABELS[:2])
    np.save(path, IMAGES)
    with pytest.raises(InputError, match=r"labels\.npy holds 2 labels for 4 images"):
        open_source(path)
    np.save(tmp_path / "data.npy", IMAGES)
    np.save(tmp_path / "targets.npy", LABELS)
    with pytest.raises(InputError, match=r"labels\.npy and .*targets\.npy may both hold its labels"):
        open_source(tmp_path / "data.npy")
