"""What data meet outside the program: limits of the system, damaged files, pictures replaced and removed."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from test_autoencoder import small_kl
from training_runs import NO_PREVIEW, command_words, fresh_accelerate, run_tiny

import train
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.shards.format import ShardReader, pack_images, write_shard
from sit_atconv.data.shards.manifest import load_manifest
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError
from sit_atconv.evaluation.reading.loading import open_images

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return str(small_kl(tmp_path_factory.mktemp("vae")))


@pytest.mark.slow
def test_preparation_with_pictures_needs_few_descriptors(vae, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (400, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", arr_0=images)
    arguments = [str(tmp_path / "pictures.npz"), str(tmp_path / "out"), "--resolution", "8", "--vae", vae, "--images"]
    command = [sys.executable, "-m", "sit_atconv.data.prepare", *arguments, "--batch-size", "2"]
    result = subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$0" "$@"', *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert load_manifest(tmp_path / "out").count == 400


# --- digests


@pytest.fixture
def prepared(tmp_path) -> Path:
    """The digits as four shards of pixels."""
    main(["digits:train@8", str(tmp_path / "data"), "--resolution", "8", "--vae", "identity", "--shard-size", "250"])
    return tmp_path / "data"


def flip(path: Path, position: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 4
    path.write_bytes(damaged)


def test_a_flipped_bit_is_found_before_training(prepared, tmp_path, capsys):
    shards = sorted(prepared.glob("*.safetensors"))
    flip(shards[2], -1000)
    words = command_words(f"--data.path {prepared} --training.steps 1 --model.num_classes null {NO_PREVIEW}")
    with pytest.raises(SystemExit) as exit_:
        fresh_accelerate()
        train.main([*words, "--run", str(tmp_path / "run")])
    assert exit_.value.code == 2
    assert f"{shards[2]}: the checksum differs, so bytes have changed since it was written." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    run_tiny(tmp_path / "run", f"--data.path {prepared} --training.steps 1 --data.verify false {NO_PREVIEW}")


def test_processes_share_the_files_they_compare(prepared):
    for shard in prepared.glob("*.safetensors"):
        flip(shard, -1)
    dataset = open_dataset(str(prepared))
    shares = [dataset.damaged(process, 3) for process in range(3)]
    assert [len(share) for share in shares] == [2, 1, 1]
    assert sorted(fault for share in shares for fault in share) == sorted(dataset.damaged())


def test_prepared_pictures_are_not_scored_with_a_flipped_bit(prepared):
    flip(prepared / "shard-00001.safetensors", -1000)
    with pytest.raises(InputError, match=r"shard-00001\.safetensors: the checksum differs.*Copy 1 such file"):
        open_images(str(prepared))


# --- pictures that cannot be decoded


@pytest.fixture
def photos(tmp_path) -> Path:
    """Eleven pictures of two classes, the fifth (a/04.png) cannot be decoded."""
    for number in range(11):
        path = tmp_path / "photos" / ("a" if number < 6 else "b") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "04.png").write_bytes(path.read_bytes()[:50])
    return tmp_path / "photos"


def zipped(photos: Path) -> Path:
    return Path(shutil.make_archive(str(photos), "zip", photos))


def prepare(source: Path, out: Path, *words: str) -> None:
    main(
        [str(source), str(out), "--resolution", "8", "--vae", "identity", "--shard-size", "3", "--workers", "0", *words]
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def replace(photos: Path) -> None:
    shutil.copy(photos / "b" / "10.png", photos / "a" / "04.png")


def remove(photos: Path) -> None:
    (photos / "a" / "04.png").unlink()


def remove_many(photos: Path) -> None:
    """So many that shards are left over."""
    for number in (4, 7, 8, 9):
        (photos / ("a" if number < 6 else "b") / f"{number:02d}.png").unlink()


def add(photos: Path) -> None:
    remove(photos)
    for name in ("a/00b.png", "b/11.png", "b/12.png"):
        shutil.copy(photos / "b" / "10.png", photos / name)


@pytest.mark.parametrize("kept", [lambda photos: photos, zipped], ids=["folder", "zip"])
@pytest.mark.parametrize("mend", [replace, remove, remove_many, add])
def test_a_bad_picture_is_replaced_or_removed_and_preparation_goes_on(mend, kept, photos, tmp_path, capsys):
    for _ in range(2):
        with pytest.raises(SystemExit) as exit_:
            prepare(kept(photos), tmp_path / "out")
        assert exit_.value.code == 2
    assert "Replace or remove them and run the same command again" in capsys.readouterr().err
    first = (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns
    mend(photos)
    prepare(kept(photos), tmp_path / "out")
    prepare(kept(photos), tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    if mend is not add:  # pictures before the bad one are not encoded again
        assert (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns == first


def test_what_is_complete_is_not_changed_by_its_source(photos, tmp_path, capsys):
    prepare(photos, tmp_path / "out", "--max-bad", "1")
    before = contents(tmp_path / "out")
    replace(photos)
    prepare(photos, tmp_path / "out")
    remove(photos)
    with pytest.raises(SystemExit):
        prepare(photos, tmp_path / "out")
    assert "begun with other settings (source_count: 11 there, 10 now)" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


# --- pictures and arrays made to hurt


def png(width: int = 8, height: int = 8, extra: bytes = b"") -> bytes:
    """A black PNG, or one that says that it is much larger."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header, pixels = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(bytes(25 * 8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def text(name: bytes, before: bytes) -> bytes:
    """A chunk of 200 MB of compressed text."""
    data = before + zlib.compress(bytes(200_000_000), 1)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def plain_text(size: int) -> bytes:
    data = b"Comment\0" + b"x" * size
    return struct.pack(">I", len(data)) + b"tEXt" + data + struct.pack(">I", zlib.crc32(b"tEXt" + data))


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind)
    return file.getvalue()


def damaged_avif() -> bytes:
    return saved("AVIF" if "avif" in features.get_supported() else "ICNS")[:-30] + bytes(30)


HURTFUL = {
    "a bomb": lambda: png(30_000, 30_000),
    "a format not listed": lambda: saved("SGI"),
    "damaged AVIF": damaged_avif,
}


@pytest.mark.parametrize("kind", HURTFUL)
def test_pictures_that_would_hurt_are_refused_wherever_they_lie(kind, photos, tmp_path):
    (photos / "a" / "04.png").write_bytes(HURTFUL[kind]())
    with pytest.raises(InputError, match=r"Cannot decode .*a/04\.png"):
        open_source(str(photos))[4]

    packed = pack_images([HURTFUL[kind]()])
    one = {"labels": torch.zeros(1, dtype=torch.int64), "index": torch.zeros(1, dtype=torch.int64)}
    write_shard(tmp_path / "shard.safetensors", {**packed, **one})
    with pytest.raises(InputError, match=r"shard\.safetensors row 0: the picture is damaged"):
        ShardReader(tmp_path / "shard.safetensors", 1, {}, images=True).image(0)


PICTURES = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)


def encrypted(data: bytearray) -> None:
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1


def of_version_21(data: bytearray) -> None:
    data[data.index(b"PK\x01\x02") + 6] = 210


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("change", "message"), [(encrypted, "encrypted"), (of_version_21, r"zip file version 21\.0")])
def test_archives_that_cannot_be_read(save, change, message, photos, tmp_path):
    save(tmp_path / "x.npz", arr_0=PICTURES)
    zipped(photos)
    for path in (tmp_path / "x.npz", tmp_path / "photos.zip"):
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            open_images(str(path))[0]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("descr", ["<U0", "|V0", "|S0"])
def test_arrays_of_nothing(compression, descr, tmp_path):
    header, pictures = io.BytesIO(), io.BytesIO()
    np.save(pictures, PICTURES)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (4,)})
    for arrays in ({"arr_0": header}, {"arr_0": pictures, "arr_1": header}):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
            for name, array in arrays.items():
                archive.writestr(f"{name}.npy", array.getvalue())
        with pytest.raises(InputError, match=r"x\.npz: 'arr_[01]' is .*, which is not a possible array"):
            open_images(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("label", [10**7, 2**63 - 1, 2**64 - 1, 10**30])
def test_labels_that_number_no_classes(label, tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=PICTURES, arr_1=np.array([label] * 4))
    with pytest.raises(InputError, match=r"the label in row 0 is|holds pickled Python objects"):
        open_source(str(tmp_path / "x.npz"))
    (tmp_path / "repa" / "vae-sd").mkdir(parents=True)
    (tmp_path / "repa" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": [["a.npy", label]]}))
    with pytest.raises(InputError, match=r"dataset\.json: the label in row 0 is [19]"):
        open_dataset(str(tmp_path / "repa"))


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_a_picture_with_any_amount_of_text_is_read(kind: str, tmp_path: Path) -> None:
    """200 MB of compressed text, which Pillow refuses, or 65 MB as they are; the pixels need neither."""
    before = {"zTXt": b"k\0\0", "iTXt": b"k\0\1\0\0\0"}
    extra = plain_text(65 << 20) if kind == "tEXt" else text(kind.encode(), before[kind])
    (tmp_path / "a.png").write_bytes(png(extra=extra))
    assert not open_source(str(tmp_path))[0].image.any()


def test_a_zip_with_an_entry_without_a_name_is_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("b.png", b"")
    content = (tmp_path / "x.zip").read_bytes()
    at = content.rindex(b"b.png")
    (tmp_path / "x.zip").write_bytes(content[:at] + b"\0.png" + content[at + 5 :])  # zipfile takes names up to a zero
    with pytest.raises(InputError, match="an entry without a name"):
        open_source(str(tmp_path / "x.zip"))


@pytest.mark.parametrize(
    ("old", "new"), [(b"(1, 3, 2)", b"(1, 3, 2]"), (b"(1, 3, 2)", b"(1, 3 2( "), (b"'<f4'", b"'<f4\n")]
)
def test_a_damaged_header_of_an_array_is_named(tmp_path: Path, old: bytes, new: bytes) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((1, 3, 2), np.float32))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", file.getvalue().replace(old, new))
    with pytest.raises(InputError, match="'arr_0' is not a numpy array"):
        open_source(str(tmp_path / "x.npz"))
    (tmp_path / "vae-sd").mkdir()
    (tmp_path / "vae-sd" / "a.npy").write_bytes(file.getvalue().replace(old, new))
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": [["a.npy", 0]]}')
    with pytest.raises(InputError, match="Cannot read latent"):
        open_dataset(str(tmp_path))
