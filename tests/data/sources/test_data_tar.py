"""Tars are read where they lie, labels and all; those that could be read wrong are refused."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_data_sources import picture, png

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.data.sources import open_source
from sit_atconv.data.sources.tars.braces import expand_braces
from sit_atconv.errors import InputError

PICTURES = [png(picture(seed)) for seed in range(6)]
CLASSES = {"cat/1.png": PICTURES[0], "dog/2.png": PICTURES[1], "cat/3.png": PICTURES[2]}


def write_tar(path: Path, files: dict[str, bytes], layout: int = tarfile.PAX_FORMAT, mtime: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, **more: bytes) -> dict[str, bytes]:
    """A picture of a WebDataset with members beside it."""
    return {f"{number:06d}.jpg": PICTURES[number]} | {f"{number:06d}.{ending}": data for ending, data in more.items()}


def contents(source) -> list[tuple[int | None, bytes]]:
    return [(source[index].label, source[index].image.tobytes()) for index in range(len(source))]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "set/train/"])
def test_class_folders_in_a_tar(tmp_path, layout, prefix):
    files = {f"{prefix}{name}": data for name, data in CLASSES.items()} | {"README": b"text", f"{prefix}._x.png": b"x"}
    source = open_source(write_tar(tmp_path / "x.tar", files, layout, mtime=1.5 if layout == tarfile.PAX_FORMAT else 1))
    assert source.kind == "tar" and source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1]
    copy = pickle.loads(pickle.dumps(source))
    for index, seed in enumerate((0, 2, 1)):
        np.testing.assert_array_equal(copy[index].image, picture(seed))


def test_webdataset_by_the_command(tmp_path):
    shards = [
        {**sample(0, cls=b"2"), **sample(1, cls=b"0", json=b"{}")},
        {**sample(2, cls=b" 1\n"), **sample(3, cls=b"2", txt=b"a caption")},
    ]
    for number, files in enumerate(shards):
        write_tar(tmp_path / "wds" / f"train-{number:06d}.tar", files)
    for name in (tmp_path / "wds", tmp_path / "wds" / "train-{000000..000001}.tar", f"{tmp_path / 'wds'}:train"):
        source = open_source(name)
        assert source.labels.tolist() == [2, 0, 1, 2] and source.class_names is None and source.lossy
        np.testing.assert_array_equal(source[3].image, picture(3))
    prepare([str(tmp_path / "wds"), str(tmp_path / "out"), "--resolution", "8", "--vae", "identity"])
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (manifest["count"], manifest["num_classes"]) == (4, 3)


def test_labels_in_json_by_number_or_name(tmp_path):
    files = {**sample(0, json=b'{"label": "dog", "id": 5}'), **sample(1, json=b'{"label": "cat", "id": 6}')}
    path = write_tar(tmp_path / "x.tar", files)
    source = open_source(path)
    assert source.labels.tolist() == [1, 0] and source.class_names == ["cat", "dog"]
    assert open_source(path, options=SourceOptions(label_key="id")).labels.tolist() == [5, 6]
    with pytest.raises(InputError, match=r"no column 'kind'; it has label, id"):
        open_source(path, options=SourceOptions(label_key="kind"))
    path = write_tar(tmp_path / "y.tar", {**sample(0, species=b"dog"), **sample(1, species=b"cat")})
    assert open_source(path).labels is None
    assert open_source(path, options=SourceOptions(label_key="species")).class_names == ["cat", "dog"]


def test_one_picture_of_a_sample_is_chosen(tmp_path):
    files = {"1.jpg": PICTURES[1], "1.seg.png": PICTURES[2], "1.cls": b"0"}
    path = write_tar(tmp_path / "x.tar", files)
    for options in (SourceOptions(), SourceOptions(unconditional=True)):
        with pytest.raises(InputError, match=r"several pictures of the same sample, \.jpg, \.seg\.png: choose one by"):
            open_source(path, options=options)
    source = open_source(path, options=SourceOptions(image_key="seg.png"))
    assert contents(source) == [(0, picture(2).tobytes())]
    with pytest.raises(InputError, match=r"has no pictures \.depth"):
        open_source(path, options=SourceOptions(image_key="depth"))


def test_imagenets_tar_of_tars(tmp_path):
    inner = {
        f"n0{number}440764.tar": {f"n0{number}440764_{k}.JPEG": PICTURES[number + 2 * k] for k in range(2)}
        for number in (1, 2)
    }
    tars = {
        name: write_tar(tmp_path / "n" / name, files, tarfile.GNU_FORMAT).read_bytes() for name, files in inner.items()
    }
    path = write_tar(tmp_path / "ILSVRC2012_img_train.tar", tars, tarfile.GNU_FORMAT)
    for name in (path, tmp_path / "n"):  # a folder of these tars is the same
        source = open_source(name)
        assert source.class_names == ["n01440764", "n02440764"] and source.labels.tolist() == [0, 0, 1, 1]
        assert source.names[2] == "n02440764/n02440764_0.JPEG"
        assert [source[k].image.tobytes() for k in range(4)] == [picture(seed).tobytes() for seed in (1, 3, 2, 4)]
    cut = {name: data[:1200] for name, data in tars.items()}
    with pytest.raises(InputError, match=r"cut\.tar/n01440764\.tar is truncated"):
        open_source(write_tar(tmp_path / "cut.tar", cut))


def test_which_tars_are_classes_shards_or_splits(tmp_path):
    flat = {"1.png": PICTURES[0], "2.png": PICTURES[1]}
    for name in ("cat", "dog"):
        write_tar(tmp_path / "classes" / f"{name}.tar", flat)
        write_tar(tmp_path / "series" / f"{name}-00.tar", flat)
    for name in ("0", "1"):
        write_tar(tmp_path / "numbered" / f"{name}.tar", flat)
        write_tar(
            tmp_path / "folders" / f"{name}.tar", {f"cat/{name}.png": PICTURES[0], f"dog/{name}.png": PICTURES[1]}
        )
    for name in ("train", "val"):
        write_tar(tmp_path / "splits" / f"{name}.tar", CLASSES)
    source = open_source(tmp_path / "classes")
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1, 1]
    source = open_source(tmp_path / "folders")
    assert source.class_names == ["cat", "dog"] and source.labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(InputError, match=r"numbered tars of pictures without labels\. Are these shards"):
        open_source(tmp_path / "numbered")
    assert open_source(tmp_path / "numbered", options=SourceOptions(unconditional=True)).labels is None
    both = {f"{name}.tar": (tmp_path / "numbered" / f"{name}.tar").read_bytes() for name in ("0", "1")}
    source = open_source(write_tar(tmp_path / "all.tar", both))
    assert source.class_names == ["0", "1"] and source.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"several series of shards \(cat, dog\): choose one, as .*series:cat"):
        open_source(tmp_path / "series")
    with pytest.raises(InputError, match=r"holds splits \(train, val\), not classes: choose one, as .*splits:train"):
        open_source(tmp_path / "splits")
    assert open_source(f"{tmp_path}/splits:val").labels.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match=r"no tars called test; it has train, val"):
        open_source(f"{tmp_path}/splits:test")


def link(kind: bytes) -> bytes:
    info = tarfile.TarInfo("cat/link.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info.tobuf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: tar[:700], r"x\.tar is no tar, truncated or damaged"),
        (lambda tar: tar[:1536], r"x\.tar is truncated: it lacks its end"),
        (lambda tar: b"", r"x\.tar is no tar, truncated"),
        (lambda tar: tar.replace(b"cat/1.png", b"cat/9.png"), r"x\.tar is no tar, truncated or damaged"),
        (lambda tar: tar.replace(b"dog/2.png", b"dog/9.png"), r"x\.tar is damaged: byte 1,536 begins no member"),
        (lambda tar: b"junk" * 500, r"x\.tar is no tar"),
        (lambda tar: tar + tar, r"goes on after its end: several tars were joined"),
        (lambda tar: link(tarfile.SYMTYPE) + tar, r"cat/link\.png is a link"),
        (lambda tar: link(tarfile.LNKTYPE) + tar, r"cat/link\.png is a link"),
        (lambda tar: link(tarfile.FIFOTYPE) + tar, r"cat/link\.png is a link or"),
        (lambda tar: link(tarfile.GNUTYPE_SPARSE) + tar, r"cat/link\.png is a link or"),
        (lambda tar: tar[: tar.index(bytes(1024))] + tar, r"holds cat/1\.png more than once"),
        (gzip.compress, r"x\.tar is compressed.*gunzip -k"),
    ],
)
def test_tars_that_are_refused(tmp_path, change, message):
    path = write_tar(tmp_path / "x.tar", {"cat/1.png": b"x" * 600, "dog/2.png": b"y" * 512}, tarfile.USTAR_FORMAT)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        open_source(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../1.png": b""}, r"\.\./1\.png, whose folders are not clear"),
        ({"/etc/1.png": b""}, r"/etc/1\.png, whose folders are not clear"),
        ({"a/1.txt": b""}, r"No pictures in .*1 files are not pictures by their names.*1 \.txt"),
        ({**CLASSES, "empty/": b""}, "without a picture: empty"),
        ({**sample(0, cls=b"1"), **sample(1)}, r"no 000001\.cls, so this picture has no label"),
        ({**sample(0, cls=b"1"), **sample(1, cls=b"-1")}, "label in row 1 is -1"),
        ({**sample(0, cls=b"0.5")}, r"label in row 0 is 0\.5"),
        ({**sample(0, cls=b"\xff")}, r"000000\.cls is no text"),
        ({**sample(0, json=b"{]")}, r"000000\.json is not valid JSON"),
        ({**sample(0, json=b"[1]")}, r"000000\.json: Expected `object`"),
        ({**sample(0, json=b'{"label": 1}'), **sample(1, json=b"{}")}, "label in row 1 is missing"),
    ],
)
def test_members_that_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        open_source(write_tar(tmp_path / "x.tar", files))


def test_a_tar_may_vanish_or_shrink_later(tmp_path):
    path = write_tar(tmp_path / "x.tar", CLASSES)
    source = pickle.loads(pickle.dumps(open_source(path)))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"Cannot read dog/2\.png in .*x\.tar: the tar has become shorter"):
        source[2]
    path.unlink()
    with pytest.raises(InputError, match=r"Cannot open .*x\.tar: No such file"):
        pickle.loads(pickle.dumps(source))[0]


def test_compressed_tars_get_advice(tmp_path, capsys):
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(write_tar(tmp_path / "x.tar", CLASSES).read_bytes()))
    with pytest.raises(SystemExit) as end:
        prepare([str(path), str(tmp_path / "out"), "--resolution", "8", "--vae", "identity"])
    assert end.value.code == 2 and "gunzip -k" in capsys.readouterr().err


def test_brace_lists():
    assert expand_braces("a-{08..11}.tar") == [f"a-{n:02d}.tar" for n in range(8, 12)]
    assert expand_braces("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    for wrong in ("{}.tar", "{2..1}.tar", "{a..b}.tar", "{0..99999999}.tar"):
        with pytest.raises(InputError, match="is no list"):
            expand_braces(wrong)


def test_shards_of_one_name_in_several_folders(tmp_path):
    for number, folder in enumerate("ab"):
        write_tar(tmp_path / folder / "s-0.tar", sample(0, cls=b"%d" % number))
    source = open_source(tmp_path / "{a,b}" / "s-0.tar")
    assert source.labels.tolist() == [0, 1] and source.names == ["a-s-0/000000.jpg", "b-s-0/000000.jpg"]


def test_a_missing_shard_is_named(tmp_path):
    write_tar(tmp_path / "s-0.tar", sample(0, cls=b"0"))
    with pytest.raises(InputError, match=r"Cannot open .*s-1\.tar: No such file"):
        open_source(tmp_path / "s-{0..1}.tar")
