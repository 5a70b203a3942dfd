"""What data meet outside the program: limits of the system, damaged files, pictures replaced and removed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_autoencoder import small_kl
from training_runs import NO_PREVIEW, command_words, fresh_accelerate, run_tiny

import train
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.shards.manifest import load_manifest
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
