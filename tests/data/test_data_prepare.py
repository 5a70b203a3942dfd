"""Preparation: ADM's pixels, shards that do not depend on who writes them, restarts, and faults found again."""

import errno
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_autoencoder import small_kl

import sit_atconv.data.shards.files as shard_files
from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.pictures.crop import center_crop
from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.data.shards.manifest import load_manifest
from sit_atconv.data.shards.verify import verify_dataset
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError
from sit_atconv.images import to_float


def adm_center_crop(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The algorithm of ADM as published, literally."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC)
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


sizes = st.integers(5, 150)


@settings(deadline=None, max_examples=60)
@given(height=sizes, width=sizes, target=st.integers(4, 70))
def test_square_crops_are_adms(height, width, target):
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop(image, target, target), adm_center_crop(Image.fromarray(image), target))


@settings(deadline=None, max_examples=60)
@given(height=sizes, width=sizes, target=st.tuples(st.integers(4, 70), st.integers(4, 70)))
def test_rectangular_crops_have_their_size_and_keep_the_aspect(height, width, target):
    """A horizontal ramp over the picture stays one: its slope is that of the scale which just covers the target."""
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)
    cropped = center_crop(np.tile(ramp[None, :, None], (height, 1, 3)), *target)
    assert cropped.shape == (*target, 3)
    assert (np.diff(cropped[:, :, 0].astype(int), axis=1) >= -3).all()
    assert (cropped == cropped[:1]).all()


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    return str(small_kl(tmp_path_factory.mktemp("vae")))


@pytest.fixture
def photos(tmp_path):
    """Eleven pictures in two classes; the fifth in order (a/4.png) and the last (b/9.png) cannot be decoded."""
    for number in range(11):
        path = tmp_path / "photos" / ("a" if number < 5 else "b") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (20 + number, 30 - number, 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)).save(path)
        if number in (4, 10):
            path.write_bytes(path.read_bytes()[:50])
    return str(tmp_path / "photos")


def options(photos, out, vae, **changes) -> PrepareOptions:
    settings = {"flip": True, "images": True, "batch_size": 2, "shard_size": 4, "max_bad": 2, "workers": 0}
    return PrepareOptions(photos, str(out), (16, 12), vae, **{**settings, **changes})


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_latents_and_pictures_are_those_of_the_source(photos, vae, tmp_path):
    manifest = prepare(options(photos, tmp_path / "out", vae))
    assert (manifest.count, [s.count for s in manifest.shards], manifest.class_names) == (9, [4, 3, 2], ["a", "b"])
    assert [skip.index for skip in manifest.skipped] == [4, 10] and "a/04.png" in manifest.skipped[0].reason
    assert sorted(contents(tmp_path / "out")) == ["dataset.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    verify_dataset(str(tmp_path / "out"))

    dataset, source, autoencoder = (
        open_dataset(tmp_path / "out", images=True),
        open_source(photos),
        load_autoencoder(vae),
    )
    assert dataset.latents == autoencoder.spec and dataset.latent_shape == (4, 8, 6)
    for index in range(len(dataset)):
        sample = source[dataset.source_index(index)]
        crop = torch.from_numpy(center_crop(sample.image, 16, 12).copy()).permute(2, 0, 1)
        for flip in (False, True):
            batch = dataset.read([index], [flip], images=True)
            expected = crop.flip(-1) if flip else crop
            assert torch.equal(batch["image"][0], expected) and batch["label"].item() == sample.label
            moments = autoencoder.encode(to_float(expected[None]))
            torch.testing.assert_close(batch["moments"].float(), moments, rtol=1e-3, atol=1e-3)


def test_who_writes_makes_no_difference(photos, vae, tmp_path):
    prepare(options(photos, tmp_path / "one", vae))
    prepare(options(photos, tmp_path / "two", vae, workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shards_without_a_decodable_picture_stay_empty(photos, vae, tmp_path):
    manifest = prepare(options(photos, tmp_path / "out", vae, shard_size=1))
    assert [shard.count for shard in manifest.shards] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    verify_dataset(str(tmp_path / "out"))
    dataset = open_dataset(tmp_path / "out", images=True)
    assert [dataset.source_index(index) for index in range(9)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert dataset.read(range(9), [False] * 9)["label"].tolist() == dataset.labels().tolist() == [0] * 4 + [1] * 5


@pytest.mark.slow
def test_two_processes_write_what_one_writes(photos, vae, tmp_path):
    prepare(options(photos, tmp_path / "one", vae, teachers=(("test_vit", "random"),)))
    arguments = [photos, str(tmp_path / "two"), "--resolution", "16x12", "--vae", vae, "--flip", "--images"]
    arguments += ["--batch-size", "2", "--shard-size", "4", "--max-bad", "2", "--workers", "0"]
    arguments += ["--teacher", "test_vit", "--teacher-weights", "random"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launcher, "-m", "sit_atconv.data.prepare", *arguments], check=True, env=environment)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_restart_keeps_complete_shards(photos, vae, tmp_path, monkeypatch):
    prepare(options(photos, tmp_path / "whole", vae))
    written, write = [], shard_files.write_shard

    def interrupted(path, tensors):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, tensors)

    monkeypatch.setattr(shard_files, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(photos, tmp_path / "out", vae))
    with pytest.raises(InputError, match="not complete"):
        open_dataset(tmp_path / "out")
    monkeypatch.setattr(
        shard_files, "write_shard", lambda path, tensors: written.append(path.name) or write(path, tensors)
    )
    prepare(options(photos, tmp_path / "out", vae, workers=1, batch_size=4))
    assert written == ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "whole").keys()
    prepare(options(photos, tmp_path / "out", vae))
    assert len(written) == 3


def test_a_truncated_shard_is_redone(photos, vae, tmp_path):
    with pytest.raises(InputError, match=r"2 of 11 pictures could not be decoded.*--max-bad 2"):
        prepare(options(photos, tmp_path / "out", vae, max_bad=1))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-1])
    ages = [shard.stat().st_mtime_ns for shard in shards]
    prepare(options(photos, tmp_path / "out", vae))
    assert shards[1].read_bytes() == whole
    assert [shard.stat().st_mtime_ns == age for shard, age in zip(shards, ages, strict=True)] == [True, False, True]


def test_other_settings_and_other_contents_are_refused(photos, vae, tmp_path):
    prepare(options(photos, tmp_path / "out", vae))
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=r"begun with other settings .has_flip: True there, False now"):
        prepare(options(photos, tmp_path / "out", vae, flip=False))
    assert contents(tmp_path / "out") == before
    with pytest.raises(InputError, match="holds no data set of ours"):
        prepare(options(photos, tmp_path / "photos", vae))


def test_full_disk_removes_the_partial_shard(photos, vae, tmp_path, monkeypatch):
    calls, sync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # dataset.json, a shard and its note, each with its folder, then the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*shard-00001\.safetensors"):
        prepare(options(photos, tmp_path / "out", vae))
    left = ["dataset.json", "shard-00000.json", "shard-00000.safetensors"]
    assert sorted(contents(tmp_path / "out")) == left
    prepare(options(photos, tmp_path / "out", vae))
    verify_dataset(str(tmp_path / "out"))


@pytest.mark.parametrize("leftover", [".dataset.json.partial", ".unfinished-dataset.json.partial"])
def test_what_a_kill_left_before_the_manifest_is_removed(photos, vae, tmp_path, leftover):
    """The first name is that of an earlier version."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / leftover).write_text("{")
    prepare(options(photos, tmp_path / "out", vae))
    assert leftover not in contents(tmp_path / "out")


def test_identity_needs_no_second_copy(photos, tmp_path):
    manifest = prepare(options(photos, tmp_path / "out", "identity", channels=3))
    assert not manifest.has_flip and not manifest.has_images
    dataset = open_dataset(tmp_path / "out", images=True)
    batch = dataset.read([0], [True], images=True)
    crop = center_crop(open_source(photos)[0].image, 16, 12)[:, ::-1]
    np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), crop)


def test_unlabelled_sources(photos, vae, tmp_path):
    manifest = prepare(options(photos, tmp_path / "out", vae, reading=SourceOptions(convert=True, unconditional=True)))
    assert manifest.num_classes == 0 and manifest.class_names is None
    assert open_dataset(tmp_path / "out").read([0, 8], [False, True])["label"].tolist() == [-1, -1]


def test_any_name_of_a_file_system_survives(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)  # pytest-xdist does not survive the third in what is logged
    names = ["a b", "it's #1", "latin\udce9", "new\nline", "ü猫"]
    for number, name in enumerate(names):
        (tmp_path / "photos" / name).mkdir(parents=True)
        pixels = np.full((8, 8, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{name}.png")
        (tmp_path / "photos" / name / f"{name} too.png").write_bytes(b"")
    prepare(PrepareOptions(str(tmp_path / "photos"), str(tmp_path / "out"), (8, 8), "identity", max_bad=5, workers=0))
    manifest = load_manifest(tmp_path / "out")
    assert manifest.class_names == names and len(manifest.skipped) == 5
    assert names[2] in manifest.skipped[2].reason
    assert open_dataset(tmp_path / "out").class_names == names


def test_latents_that_are_no_numbers_are_not_written(photos, tmp_path):
    broken = load_autoencoder(str(small_kl(tmp_path / "vae"))).module
    torch.nn.init.constant_(broken.quant_conv.bias, 1e6)  # above what fp16 holds
    broken.save_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="The moments of picture 0 of the source are NaN or too large for fp16"):
        prepare(options(photos, tmp_path / "out", str(tmp_path / "vae")))
    assert sorted(contents(tmp_path / "out")) == ["dataset.json"]


def test_sizes_the_autoencoder_cannot_take(photos, vae, tmp_path):
    with pytest.raises(InputError, match=r"multiples of 2 pixels, not 15x12: try"):
        prepare(PrepareOptions(photos, str(tmp_path / "out"), (15, 12), vae))
    assert not (tmp_path / "out").exists()


def spoil(path, name, row, value):
    """Change one row in place, as a disk would: nothing else of the file differs."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    begin, end = (start + offset for offset in entry["data_offsets"])
    array = np.frombuffer(data, {"F16": "<f2", "I64": "<i8"}[entry["dtype"]], int(np.prod(entry["shape"])), begin)
    array.reshape(entry["shape"])[row] = value
    assert array.nbytes == end - begin
    path.write_bytes(bytes(data))


def test_verify_names_every_fault(photos, vae, tmp_path, capsys):
    root = tmp_path / "out"
    prepare(options(photos, root, vae))
    shards = sorted(root.glob("*.safetensors"))
    spoil(shards[0], "moments_flip", 2, float("nan"))
    spoil(shards[0], "labels", 1, 7)
    flipped = bytearray(shards[1].read_bytes())
    flipped[-1] ^= 1
    shards[1].write_bytes(flipped)
    shards[2].unlink()
    with pytest.raises(SystemExit) as caught:
        main(["--verify", str(root)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    for expected in (
        "shard-00000.safetensors: the checksum differs",
        "shard-00000.safetensors row 1: label 7 is outside 0…1",
        "shard-00000.safetensors row 2: moments_flip holds NaN",
        "shard-00001.safetensors: the checksum differs",
        "shard-00002.safetensors: missing",
    ):
        assert expected in message
    shards[1].write_bytes(flipped[:-1])
    with pytest.raises(InputError, match=r"shard-00001\.safetensors: .* bytes instead of"):
        verify_dataset(str(root))


def test_command_line(photos, vae, tmp_path, capsys):
    out = str(tmp_path / "out")
    common = [photos, out, "--vae", vae, "--workers", "0"]
    main([*common, "--resolution", "16", "--max-bad", "2", "--verify"])
    assert load_manifest(out).resolution == (16, 16)
    assert ["a/04.png" in load_manifest(out).skipped[0].reason, len(load_manifest(out).skipped)] == [True, 2]
    for arguments in (
        [photos],
        [photos, out],
        [*common, "--resolution", "0"],
        [*common, "--resolution", "16:9"],
        [*common, "--resolution", "16", "--shard-size", "5000"],
        [*common, "--resolution", "16", "--batch-size", "0"],
        [*common, "--resolution", "16", "--workers", "-1"],
        [*common, "--resolution", "16"],
        [photos + "/none", out, "--vae", vae, "--resolution", "16"],
    ):
        capsys.readouterr()
        before = json.loads((tmp_path / "out" / "dataset.json").read_text())
        if arguments == [*common, "--resolution", "16"]:
            main(arguments)  # complete already: the pictures left out were accepted then
        else:
            with pytest.raises(SystemExit) as caught:
                main(arguments)
            assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err
        assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == before


def test_two_programs_do_not_prepare_one_data_set(photos, vae, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", hold, str(out / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"out is prepared by .*choose another OUT"):
            prepare(options(photos, out, vae))
        other.communicate(b"\n")
    assert prepare(options(photos, out, vae)).count == 9  # what the other left behind means nothing
    assert not (out / ".lock").exists()


def test_a_damaged_npz_is_not_encoded(tmp_path):
    path = tmp_path / "pictures.npz"
    np.savez(path, arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    damaged = bytearray(path.read_bytes())
    damaged[500] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"pictures.npz is damaged"):
        prepare(PrepareOptions(str(path), str(tmp_path / "out"), (8, 8), "identity"))
    assert list(tmp_path.iterdir()) == [path]
