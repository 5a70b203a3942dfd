"""Every kind of source gives the same pictures in the same order, and every unusable one says why."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sit_atconv.data.digits import load_digits
from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError


def picture(seed: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


CLASSES = {"b/2.png": png(picture(2)), "a/1.png": png(picture(1)), "b/10.PNG": png(picture(3))}
FLAT = {"2.png": png(picture(2)), "1.png": png(picture(1))}


@pytest.mark.parametrize("kind", ["folder", "zip", "wrapped folder", "wrapped zip"])
def test_class_folders(tmp_path, kind):
    files = {f"train/set/{name}" if "wrapped" in kind else name: data for name, data in CLASSES.items()}
    files |= {"README.txt": b"", "__MACOSX/a/._1.png": b"", ".DS_Store": b""}
    path = write_zip(tmp_path / "x.zip", files) if "zip" in kind else write_tree(tmp_path / "x", files)
    source = open_source(path)
    assert source.kind == kind.split()[-1] and not source.lossy
    assert source.class_names == ["a", "b"] and source.labels.tolist() == [0, 1, 1]
    assert [Path(source[i].name).name for i in range(3)] == ["1.png", "10.PNG", "2.png"]
    assert [source[i].label for i in range(3)] == [0, 1, 1]
    for index, seed in enumerate((1, 3, 2)):
        np.testing.assert_array_equal(source[index].image, picture(seed))
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[2].image, picture(2))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_flat_pictures_have_no_labels(tmp_path, kind):
    path = write_zip(tmp_path / "x.zip", FLAT) if kind == "zip" else write_tree(tmp_path / "x", FLAT)
    source = open_source(path)
    assert (len(source), source.labels, source.class_names, source[0].label) == (2, None, None, None)
    np.testing.assert_array_equal(source[0].image, picture(1))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b""}, "No pictures"),
        ({**CLASSES, "loose.png": png(picture(4))}, "mixes 1 pictures .loose.png"),
        ({"train/a/1.png": b"", "val/a/2.png": b""}, "holds splits .train, val."),
    ],
)
def test_unusable_layouts(tmp_path, files, message):
    for path in (write_zip(tmp_path / "x.zip", files), write_tree(tmp_path / "x", files)):
        with pytest.raises(InputError, match=message):
            open_source(path)


def test_empty_class_folder_is_refused(tmp_path):
    write_tree(tmp_path / "x", CLASSES)
    (tmp_path / "x" / "empty").mkdir()
    write_zip(tmp_path / "x.zip", CLASSES)
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("a/", b"")
        archive.writestr("empty/", b"")
    for path in (tmp_path / "x", tmp_path / "x.zip"):
        with pytest.raises(InputError, match="without a picture: empty"):
            open_source(path)


def test_a_zip_may_have_an_entry_for_each_of_many_folders(tmp_path):
    """Comparing each with all others took 13 s."""
    picture = CLASSES["a/1.png"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(10_000):
            archive.writestr(f"all/c{number:05d}/", b"")
            archive.writestr(f"all/c{number:05d}/deep/1.png", picture)
        archive.writestr("all/", b"")
    source = open_source(tmp_path / "x.zip")
    assert source.labels.tolist() == list(range(10_000)) and source.class_names[-1] == "c09999"


@pytest.mark.parametrize("name", ["/absolute/1.png", "../outside/1.png", "a/../../1.png", "a\\1.png"])
def test_zips_whose_folders_cannot_be_told(tmp_path, name):
    with pytest.raises(InputError, match=r"x\.zip holds .*1\.png, whose folders are not clear"):
        open_source(write_zip(tmp_path / "x.zip", {**CLASSES, name: b""}))


def test_links_are_followed_but_not_in_circles(tmp_path):
    root, elsewhere = write_tree(tmp_path / "x", {"a/1.png": FLAT["1.png"]}), write_tree(tmp_path / "y", FLAT)
    (root / "b").symlink_to(elsewhere)
    (root / "c").symlink_to(root / "a")
    (root / "a" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(root)
    assert source.class_names == ["a", "b", "c"] and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match=r"Cannot read .*dangling\.png: No such file"):
        source[1]
    (root / "a" / "back").symlink_to(root)
    with pytest.raises(InputError, match=r"The link .*a/back leads back"):
        open_source(root)


def test_folders_that_cannot_be_read_are_not_passed_over(tmp_path, monkeypatch):
    root, scan = write_tree(tmp_path, CLASSES), os.scandir

    def locked(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(InputError, match=r"Cannot read the folder .*/b: Permission denied"):
        open_source(root)


def test_what_is_left_out_is_mentioned(tmp_path, caplog):
    caplog.set_level("INFO")
    files = {**CLASSES, "a/x.svg": b"", "a/y.SVG": b"", "b/list": b"", "b/.hidden": b""}
    assert len(open_source(write_tree(tmp_path / "x", files))) == 3
    assert "3 files are not pictures by their names and are left out (2 .svg, 1 without suffix)" in caplog.text
    caplog.clear()
    open_source(write_tree(tmp_path / "y", CLASSES))
    assert not caplog.records


def test_broken_zips(tmp_path):
    whole = write_zip(tmp_path / "whole.zip", FLAT).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"Cannot open .*cut.zip"):
        open_source(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("1.png", FLAT["1.png"])
        archive.writestr("1.png", FLAT["2.png"])
    with pytest.raises(InputError, match=r"holds 1.png more than once"):
        open_source(tmp_path / "twice.zip")
    damaged = bytearray(whole)
    damaged[60:70] = b"\0" * 10
    (tmp_path / "damaged.zip").write_bytes(damaged)
    source = open_source(tmp_path / "damaged.zip")
    with pytest.raises(InputError, match=r"Cannot read 2.png in .*damaged.zip"):
        source[1]


def test_undecodable_picture_is_named(tmp_path):
    files = {"a.png": FLAT["1.png"][:60], "b.jpg": b"not a picture", "c.png": b""}
    source = open_source(write_tree(tmp_path, files))
    assert source.lossy
    # The words are kept with the data, which are to be the same in every run.
    for index, message in enumerate(
        ("a.png: image file is truncated", "b.jpg: it is not a picture in one of the formats", "c.png: it is empty")
    ):
        with pytest.raises(InputError, match=rf"Cannot decode .*{message}"):
            source[index]


def test_of_an_animation_the_first_frame_is_taken_and_orientation_is_left(tmp_path):
    frames, exif = [Image.fromarray(picture(seed)) for seed in (1, 2)], Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    frames[0].save(tmp_path / "animation.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "turned.png", exif=exif)
    source = open_source(tmp_path, convert=True)
    for index in range(2):
        np.testing.assert_array_equal(source[index].image, picture(1))


def test_other_modes_are_converted_only_on_request(tmp_path):
    grey = picture(1)[..., 0]
    deep = grey.astype(np.uint16) * 257
    files = {"grey.png": png(grey), "deep.png": png(deep), "alpha.png": png(np.dstack([picture(1), grey]))}
    palette = io.BytesIO()
    Image.fromarray(picture(1)).quantize(8).save(palette, "PNG")
    cmyk = io.BytesIO()
    Image.fromarray(picture(1)).convert("CMYK").save(cmyk, "JPEG")
    files |= {"palette.png": palette.getvalue(), "cmyk.jpg": cmyk.getvalue()}
    strict, lenient = open_source(write_tree(tmp_path, files)), open_source(tmp_path, convert=True)
    for index in range(5):
        with pytest.raises(InputError, match=r"\.(png|jpg) is not an RGB picture"):
            strict[index]
    converted = {lenient[index].name: lenient[index].image for index in range(5)}
    assert all(image.shape == (6, 5, 3) and image.dtype == np.uint8 for image in converted.values())
    np.testing.assert_array_equal(converted["alpha.png"], picture(1))
    for name in ("grey.png", "deep.png"):
        np.testing.assert_array_equal(converted[name], np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    images = np.stack([picture(i) for i in range(4)])
    save(tmp_path / "x.npz", images, np.array([3, 0, 1, 1]))
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "x.npz")))
    assert source.labels.tolist() == [3, 0, 1, 1] and source[0].label == 3 and source.kind == "npz"
    for index in range(4):
        np.testing.assert_array_equal(source[index].image, images[index])
    assert isinstance(source._open_images(), np.memmap) == (save is np.savez)


def test_npz_grey_is_repeated_on_request(tmp_path):
    np.savez(tmp_path / "x.npz", picture(1)[None, ..., :1])
    with pytest.raises(InputError, match="greyscale"):
        open_source(tmp_path / "x.npz")
    image = open_source(tmp_path / "x.npz", convert=True)[0].image
    np.testing.assert_array_equal(image, np.repeat(picture(1)[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 6, 5, 3), np.float32)}, "arr_0 is float32.*scale and round"),
        ({"arr_0": np.zeros((2, 3, 6, 5), np.uint8)}, "channels first.*transpose"),
        ({"arr_0": np.zeros((2, 6, 5, 4), np.uint8)}, "has shape"),
        ({"arr_0": np.ones((2, 6, 5, 3), np.uint8)}, "only 0 and 1"),
        ({"arr_0": np.zeros((0, 6, 5, 3), np.uint8)}, "empty"),
        ({"other": np.zeros(3)}, "no array 'arr_0'; it holds other"),
        ({"arr_0": np.array([{}], dtype=object)}, "pickled"),
        ({"arr_0": np.stack([picture(1)]), "arr_1": np.array([0.5])}, "row 0 is 0.5; labels are whole"),
        ({"arr_0": np.stack([picture(1)]), "arr_1": np.array([0, 1])}, "2 labels for 1 images"),
        ({"arr_0": np.stack([picture(1)]), "arr_1": np.array([-1])}, "label in row 0 is -1"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_unusable_npz(tmp_path, arrays, message, save):
    save(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "x.npz")


def test_damaged_npz(tmp_path):
    np.savez(tmp_path / "x.npz", np.stack([picture(i) for i in range(40)]))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[:1000])
    with pytest.raises(InputError, match="Cannot open"):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize("member", ["arr_0", "arr_1"])
def test_changed_bytes_of_an_npz(tmp_path, member):
    images, labels = np.stack([picture(i) for i in range(4)]), np.arange(4)
    np.savez(tmp_path / "x.npz", images, labels)
    whole, changed = (tmp_path / "x.npz").read_bytes(), (images if member == "arr_0" else labels).tobytes()
    open_source(tmp_path / "x.npz").verify()
    (tmp_path / "x.npz").write_bytes(whole.replace(changed, changed[:-1] + b"\x07"))
    with pytest.raises(InputError, match=rf"x\.npz is damaged: cannot read '{member}': Bad CRC-32"):
        open_source(tmp_path / "x.npz").verify()


def test_npz_declaring_more_than_there_is(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
    )
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
            archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
        with pytest.raises(InputError, match=r"declares .*damaged or truncated"):
            open_source(tmp_path / "x.npz")


def test_missing_and_unknown_paths(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_source(tmp_path / "nothing")
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(InputError, match="not a source of pictures"):
        open_source(tmp_path / "x.rar")


def test_digits_halves_are_disjoint_and_stratified():
    everything, train, heldout = (open_source(f"digits{part}") for part in ("", ":train", ":heldout@16"))
    assert len(everything) == 1797 == len(train) + len(heldout)
    counts = [np.bincount(source.labels, minlength=10) for source in (everything, train, heldout)]
    assert (counts[1] + counts[2] == counts[0]).all() and (np.abs(counts[1] - counts[2]) <= 1).all()
    rows = {split: {image.tobytes() for image in load_digits(split, 8)[0]} for split in ("all", "train", "heldout")}
    assert rows["train"] | rows["heldout"] == rows["all"] and not rows["train"] & rows["heldout"]


def test_digits_are_rgb_at_the_resolution():
    sample = open_source("digits:train@24")[0]
    assert sample.image.shape == (24, 24, 3) and sample.image.dtype == np.uint8
    assert (sample.image == sample.image[..., :1]).all() and sample.image.max() > 200 and sample.image.min() == 0


def test_digits_without_labels():
    source = open_source("digits:heldout", options=SourceOptions(unconditional=True))
    assert source.labels is None and source.class_names is None and source[0].label is None


@pytest.mark.parametrize("name", ["digits:tran", "digits@", "digits@4", "digits:train@x"])
def test_misspelt_digits(name):
    with pytest.raises(InputError, match=r"split of the digits|whole number"):
        open_source(name)


@pytest.mark.shared
def test_real_zips(shared):
    signs = open_source(shared / "data" / "sign-language-digits_10x206_100px.zip")
    assert len(signs) == 2059 and signs.class_names == [str(i) for i in range(10)] and signs.lossy
    assert signs[0].image.shape == (100, 100, 3)
    photos = open_source(shared / "data" / "tiny-imagenet_200x50_64px.zip")
    assert len(photos) == 10000 and np.bincount(photos.labels).tolist() == [50] * 200
    grey = photos.names.index("n01774750/n01774750_116.JPEG")
    with pytest.raises(InputError, match=r"n01774750_116\.JPEG is not an RGB"):
        photos[grey]
