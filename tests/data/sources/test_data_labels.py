"""Labels, splits and odd pictures, as preparation's command reads or refuses them."""

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError

LABELS = [2, 0, 1] * 4
NAMES = [f"{i // 4:05d}/img{i:08d}.png" for i in range(len(LABELS))]  # EDM's: counters, four to a folder


def picture(value: int = 100, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((8, 8, 3), value, np.uint8) if mode == "RGB" else np.full((8, 8), value, np.uint16)
    Image.fromarray(pixels).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def write(path: Path, files: dict[str, bytes | str]) -> Path:
    """A folder, or a zip where the name ends so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def edm(labels: object, names: list[str] = NAMES, folder: str = "") -> dict[str, bytes | str]:
    pictures = {folder + name: picture(10 * i) for i, name in enumerate(names)}
    return pictures | {f"{folder}dataset.json": json.dumps({"labels": labels})}


def prepare(source: object, out: Path, *words: str) -> None:
    main([str(source), str(out), "--resolution", "8", "--vae", "identity", "--workers", "0", *words])


def refusal(source: object, out: Path, capsys, *words: str) -> str:
    """What the command says when it refuses; nothing is written."""
    with pytest.raises(SystemExit) as ended:
        prepare(source, out, *words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said and not out.exists()
    return said


@pytest.mark.parametrize("kind", ["x.zip", "x"])
@pytest.mark.parametrize("folder", ["", "wrapped/"])
def test_dataset_json_decides_the_labels(tmp_path, kind, folder) -> None:
    listed = [[name.replace("/", "\\"), label] for name, label in zip(NAMES, LABELS, strict=True)]
    prepare(write(tmp_path / kind, edm(listed[::-1], folder=folder)), tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.labels().tolist() == LABELS and dataset.class_names is None


def test_dataset_json_may_say_that_there_are_no_labels_or_give_names(tmp_path) -> None:
    source = open_source(write(tmp_path / "none.zip", edm(None)))
    assert (source.labels, source.class_names) == (None, None)
    words = [[name, ("ant", "bee", "cat")[label]] for name, label in zip(NAMES, LABELS, strict=True)]
    source = open_source(write(tmp_path / "words.zip", edm(words)))
    assert (source.labels.tolist(), source.class_names) == (LABELS, ["ant", "bee", "cat"])
    other = {"a/1.png": picture(), "b/1.png": picture(), "dataset.json": '{"info": 1}'}
    assert open_source(write(tmp_path / "other.zip", other)).class_names == ["a", "b"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[name, 0] for name in NAMES[:-1]], f"does not list 1 of 12 pictures, {NAMES[-1]} first"),
        ([[name, 0] for name in [*NAMES, NAMES[0]]], "lists 1 names more than once"),
        ([[name, 1.7 if name == NAMES[3] else 0] for name in NAMES], "row 3 is 1.7"),
        ([[name, None] for name in NAMES], "row 0 is missing"),
        ([[name, [0, 1]] for name in NAMES], r"row 0 is [0, 1]"),
        ([[name] for name in NAMES], "labels[0]"),
        ({"a": 1}, "labels"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, capsys, labels, message) -> None:
    path = write(tmp_path / "x.zip", edm(labels))
    assert message in refusal(path, tmp_path / "out", capsys)
    prepare(path, tmp_path / "out", "--unconditional")  # the way out
    assert open_dataset(tmp_path / "out").num_classes == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "1.png", "label": "cat"}\n{"file_name": "2.png", "label": "ant"}\n', []),
        ("metadata.csv", "file_name,cls\n1.png,1\n2.png,0\n", []),
        ("metadata.csv", "file_name,kind,x\n1.png,cat,\n2.png,ant,\n", ["--label-column", "kind"]),
    ],
)
def test_metadata_of_an_image_folder(tmp_path, name, text, words) -> None:
    prepare(write(tmp_path / "x", {"1.png": picture(), "2.png": picture(), name: text}), tmp_path / "out", *words)
    assert open_dataset(tmp_path / "out").labels().tolist() == [1, 0]


def test_metadata_that_cannot_be_used(tmp_path, capsys) -> None:
    pictures = {"1.png": picture(), "2.png": picture()}
    lacking = write(tmp_path / "a", {**pictures, "metadata.csv": "file_name,cls\n1.png,1\n"})
    assert "does not list 1 of 2 pictures" in refusal(lacking, tmp_path / "out", capsys)
    column = write(tmp_path / "b", {**pictures, "metadata.csv": "file_name,x\n1.png,1\n2.png,1\n"})
    assert "has no column 'y'; it has file_name, x" in refusal(column, tmp_path / "out", capsys, "--label-column", "y")
    for number, text in enumerate((b"\xff\xfe", b"{", b"[1]")):
        broken = write(tmp_path / f"c{number}", {**pictures, "metadata.jsonl": text})
        assert "metadata.jsonl" in refusal(broken, tmp_path / "out", capsys)


@pytest.mark.parametrize("kind", ["x.zip", "x"])
@pytest.mark.parametrize(
    "folders",
    [
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("train", "dev"),
        ("train2017", "val2017"),
        ("part_a", "part_b"),  # the same folder names stand under each
    ],
)
def test_splits_are_no_classes_and_can_be_chosen(tmp_path, capsys, kind, folders) -> None:
    files = {f"{split}/{name}/0.png": picture() for split in folders for name in ("cat", "dog")}
    path = write(tmp_path / kind, files)
    said = refusal(path, tmp_path / "out", capsys)
    assert "holds splits" in said and f"{path}:{folders[0]}" in " ".join(said.split())
    prepare(f"{path}:{folders[1]}", tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.class_names == ["cat", "dog"] and len(dataset) == 2


def test_splits_beside_something_else_and_unknown_ones(tmp_path, capsys) -> None:
    names = ("train/cat/0.png", "train/dog/0.png", "test/0.png", "meta/x/0.png")
    path = write(tmp_path / "x.zip", {name: picture() for name in names})
    assert "holds splits" in refusal(path, tmp_path / "out", capsys)
    assert "no folder 'trian' of pictures; it has meta, test, train" in refusal(
        f"{path}:trian", tmp_path / "out", capsys
    )
    assert open_source(f"{path}:test").labels is None


def test_folders_of_the_same_kind_in_every_class_are_no_splits(tmp_path) -> None:
    """Tiny-ImageNet's layout: one folder called images in each class."""
    files = {f"{name}/images/0.png": picture() for name in ("n01", "n02")}
    assert open_source(write(tmp_path / "x", files)).class_names == ["n01", "n02"]
    files = {f"{name}/0.png": picture() for name in ("train", "truck")}  # as in CIFAR-100
    assert open_source(write(tmp_path / "y", files)).class_names == ["train", "truck"]


def test_labels_that_change_before_preparation_is_complete_are_encoded_again(tmp_path, capsys) -> None:
    names = NAMES[:2]
    files = edm([[names[0], 0], [names[1], 1]], names) | {names[1]: b"no picture"}
    with pytest.raises(SystemExit):
        prepare(write(tmp_path / "x", files), tmp_path / "out")
    write(tmp_path / "x", edm([[names[0], 1], [names[1], 0]], names))
    prepare(tmp_path / "x", tmp_path / "out")
    assert open_dataset(tmp_path / "out").labels().tolist() == [1, 0]


def test_classes_without_a_picture_are_known(tmp_path, caplog) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.arange(3 * 192, dtype=np.uint8).reshape(3, 8, 8, 3), arr_1=[0, 3, 3])
    prepare(tmp_path / "x.npz", tmp_path / "out")
    assert open_dataset(tmp_path / "out").empty_classes == [1, 2]
    assert "2 classes have no picture: 1, 2" in caplog.text


@pytest.mark.parametrize("words", [[], ["--exif"]])
def test_exif_orientation_is_counted_and_said(tmp_path, caplog, words) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # the first row is white: turned, the last column
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    prepare(write(tmp_path / "x", {"1.png": buffer.getvalue(), "2.png": picture()}), tmp_path / "out", *words)
    image = open_dataset(tmp_path / "out").read([0], [False], images=True)["image"][0, 0].numpy()
    assert (image == (np.rot90(pixels, -1) if words else pixels)[..., 0]).all()
    assert "1 pictures have an EXIF orientation and are " + ("turned" if words else "read as stored") in caplog.text


def test_16_bit_pictures_that_use_12_bits(tmp_path, caplog, capsys) -> None:
    path = write(tmp_path / "x", {"1.png": picture(4095, "I;16"), "2.png": picture(2048, "I;16")})
    prepare(path, tmp_path / "dark")
    assert "none of its 2 16-bit pictures uses more than 12 bits" in caplog.text and "--bits 12" in caplog.text
    prepare(path, tmp_path / "light", "--bits", "12")
    read = [open_dataset(tmp_path / out).read([0, 1], [False] * 2, images=True)["image"] for out in ("dark", "light")]
    assert [images[:, 0, 0, 0].tolist() for images in read] == [[16, 8], [255, 128]]
    with pytest.raises(SystemExit):
        prepare(path, tmp_path / "dark", "--bits", "12")
    assert "begun with other settings (bits: None there, 12 now)" in " ".join(capsys.readouterr().err.split())
    write(path, {"3.png": picture(65535, "I;16")})
    with pytest.raises(InputError, match="more than 12 bits"):
        main_options = open_source(path, convert=True)._options
        open_source(path, options=type(main_options)(convert=True, bits=12))[2]


def test_pictures_with_much_metadata_are_read_and_bombs_refused(tmp_path, capsys, monkeypatch) -> None:
    text = PngInfo()
    text.add_itxt("workflow", "x" * 2_000_000)
    text.add_text("again", "y" * 2_000_000, zip=True)
    large = picture(77, pnginfo=text)
    prepare(write(tmp_path / "x", {"1.png": large}), tmp_path / "out")
    image = open_dataset(tmp_path / "out").read([0], [False], images=True)["image"]
    assert (image == 77).all()
    bomb = bytearray(picture())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(SystemExit):
        prepare(write(tmp_path / "y", {"1.png": bytes(bomb)}), tmp_path / "bomb")
    assert "could not be decoded" in capsys.readouterr().err
