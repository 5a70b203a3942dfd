"""Directories prepared for REPA: read as they are, verified without checksums, and imported without encoding again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_autoencoder import small_kl
from training_runs import losses, run_tiny

from sit_atconv.alignment import CachedTeacher, Teacher
from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.shards.manifest import load_manifest
from sit_atconv.data.shards.verify import verify_dataset
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError
from sit_atconv.images import to_float

COUNT = 11


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """Scaled as Stable Diffusion's, which these directories are taken for."""
    return str(small_kl(tmp_path_factory.mktemp("vae"), stages=4, scaling_factor=0.18215))


@pytest.fixture
def repa(tmp_path, vae) -> Path:
    """Eleven pictures of 32 × 48 in three classes, in the layout that REPA's two scripts write."""
    root, autoencoder = tmp_path / "repa", load_autoencoder(vae)
    labels: dict[str, list] = {"images": [], "vae-sd": []}
    for number in range(COUNT):
        picture = np.random.default_rng(number).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        moments = autoencoder.encode(to_float(torch.from_numpy(picture).permute(2, 0, 1)[None]))[0]
        paths = {"images": f"00000/img{number:08d}.png", "vae-sd": f"00000/img-mean-std-{number:08d}.npy"}
        for folder, name in paths.items():
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            labels[folder].append([name, number % 3])
        Image.fromarray(picture).save(root / "images" / paths["images"], compress_level=0)
        np.save(root / "vae-sd" / paths["vae-sd"], moments.numpy())
    for folder, pairs in labels.items():
        (root / folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return root


def importing(repa: Path, out: Path, vae: str, *words: str) -> Path:
    main([str(repa), str(out), "--import", "--vae", vae, "--workers", "0", "--shard-size", "4", *words])
    return out


def latent(root: Path, number: int) -> Path:
    return root / f"vae-sd/00000/img-mean-std-{number:08d}.npy"


def picture(root: Path, number: int) -> Path:
    return root / f"images/00000/img{number:08d}.png"


def test_imported_data_are_the_same_bit_for_bit(repa, vae, tmp_path):
    out = importing(repa, tmp_path / "out", vae, "--images", "--verify")
    theirs, ours = open_dataset(str(repa), images=True), open_dataset(str(out), images=True)
    rows, unmirrored = range(COUNT), [False] * COUNT
    expected, found = (dataset.read(rows, unmirrored, images=True) for dataset in (theirs, ours))
    assert expected.keys() == found.keys() and found["moments"].dtype == torch.float32
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(found["moments"][7], torch.from_numpy(np.load(latent(repa, 7))))
    assert found["label"].tolist() == [number % 3 for number in rows]
    assert ours.latents == load_autoencoder(vae).spec and ours.num_classes == 3
    assert [shard.count for shard in load_manifest(out).shards] == [4, 4, 3]

    importing(repa, tmp_path / "again", vae, "--images", "--workers", "2", "--batch-size", "3")
    for shard in out.glob("*.safetensors"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_training_is_the_same_as_it_is_and_imported(repa, vae, tmp_path):
    out = importing(repa, tmp_path / "out", vae)
    for name, path in (("as-is", repa), ("imported", out)):
        run_tiny(tmp_path / name, f"--data.path {path} --preview.every null")
    assert len(losses(tmp_path / "as-is")) == 6 and losses(tmp_path / "as-is") == losses(tmp_path / "imported")


def test_a_teachers_tokens_are_cached_while_importing(repa, vae, tmp_path):
    out = importing(repa, tmp_path / "out", vae, "--teacher", "test_vit", "--teacher-weights", "random", "--verify")
    batch = open_dataset(str(out)).read(range(COUNT), [False] * COUNT, teachers=[0])
    pictures = open_dataset(str(repa)).read(range(COUNT), [False] * COUNT, images=True)
    expected = Teacher("test_vit", "random").targets(pictures, (2, 3))
    (spec,) = load_manifest(out).teachers
    found = CachedTeacher(spec, 0).targets(batch, (2, 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 2**-11)
    assert not open_dataset(str(out)).has_images


def test_bad_samples_are_counted_and_named(repa, vae, tmp_path, capsys, caplog):
    picture(repa, 2).write_bytes(picture(repa, 2).read_bytes()[:90])
    np.save(latent(repa, 5), np.full((8, 4, 6), np.nan, np.float32))
    latent(repa, 9).unlink()
    with pytest.raises(SystemExit) as caught:
        importing(repa, tmp_path / "out", vae, "--images")
    assert caught.value.code == 2 and "3 of 11 pictures" in capsys.readouterr().err
    importing(repa, tmp_path / "out", vae, "--images", "--max-bad", "3", "--verify")
    assert [skip.index for skip in load_manifest(tmp_path / "out").skipped] == [2, 5, 9]
    for named in (picture(repa, 2), latent(repa, 5), latent(repa, 9)):
        assert str(named) in caplog.text


def test_verify_names_every_fault(repa, capsys):
    verify_dataset(str(repa))
    picture(repa, 0).unlink()
    picture(repa, 1).write_bytes(picture(repa, 1).read_bytes()[:-2000])
    Image.fromarray(np.zeros((16, 48, 3), np.uint8)).save(picture(repa, 2))
    latent(repa, 3).write_bytes(latent(repa, 3).read_bytes()[:-1])
    latent(repa, 4).write_bytes(b"")
    np.save(latent(repa, 5), np.full((8, 4, 6), np.inf, np.float32))
    np.save(latent(repa, 6), np.zeros((8, 4, 4), np.float32))
    np.save(latent(repa, 7), np.zeros((8, 4, 6), np.float16))
    latent(repa, 8).unlink()
    np.save(latent(repa, COUNT), np.zeros((8, 4, 6), np.float32))
    faults = {
        picture(repa, 0): "Cannot read",
        picture(repa, 1): "Cannot decode",
        latent(repa, 2): "the picture is (16, 48, 3), not (32, 48, 3)",
        latent(repa, 3): "Cannot read latent",
        latent(repa, 4): "Cannot read latent",
        latent(repa, 5): "NaN or infinity",
        latent(repa, 6): "shape (8, 4, 4)",
        latent(repa, 7): "float16",
        latent(repa, 8): "Cannot read latent",
        latent(repa, COUNT): "not listed",
    }
    for workers in ("0", "2"):
        with pytest.raises(SystemExit) as caught:
            main([str(repa), "--verify", "--workers", workers])
        lines = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and any("10 fault(s)" in line for line in lines)
        for path, message in faults.items():
            assert any(str(path) in line and message in line for line in lines), path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "Expected `object`, got `array`.*labels"),
        (
            {"labels": [["00000/img-mean-std-00000000.npy", [1]]]},
            r"the label in row 0 is \[1\]",
        ),
        (
            {"labels": [["00000/img-mean-std-00000000.npy", -2]]},
            r"the label in row 0 is -2",
        ),
        (
            {"labels": [["00000/img-mean-std-00000000.npy", 10**30]]},
            r"the label in row 0 is 10+",
        ),
        ({"labels": []}, "lists no samples"),
        ({"labels": [["00000/nothing.npy", 0]]}, "Cannot read latent .*nothing.npy"),
    ],
)
def test_unusable_lists_of_labels(repa, content, message):
    (repa / "vae-sd" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        verify_dataset(str(repa))


def test_what_cannot_be_imported(repa, vae, tmp_path, capsys):
    other = str(small_kl(tmp_path / "other", stages=4, scaling_factor=0.5))
    kl16 = str(small_kl(tmp_path / "kl16", stages=4, latent_channels=16))
    for words, message in (
        (["--flip"], "holds no mirrored latents"),
        (["--resolution", "32"], "latents of 32x48 pixels, not 32x32"),
        (["--vae", kl16], r"expected float32 (32, h, w)"),
    ):
        with pytest.raises(SystemExit) as caught:
            importing(repa, tmp_path / "out", vae, *words)
        assert caught.value.code == 2 and message in capsys.readouterr().err
    torch.manual_seed(5)
    noisy = load_autoencoder(other).module
    for parameter in noisy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noisy.save_pretrained(other)
    with pytest.raises(SystemExit):
        importing(repa, tmp_path / "out", other)
    assert "are not those of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        importing(repa / "images", tmp_path / "out", vae)
    assert "no latents of a layout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(repa), "--teacher", "test_vit", "--teacher-weights", "random"])
    assert "while it is imported (--import)" in capsys.readouterr().err
    (repa / "images").rename(repa / "gone")
    with pytest.raises(SystemExit):
        importing(repa, tmp_path / "out", vae, "--images")
    assert "holds no pictures" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    importing(repa, tmp_path / "out", vae)  # latents need no pictures
    with pytest.raises(InputError, match="has no images/: there are no pictures"):
        open_source(str(repa))
