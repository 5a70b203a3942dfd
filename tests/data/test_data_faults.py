"""What data meet outside the program: limits of the system, damaged files, pictures replaced and removed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
