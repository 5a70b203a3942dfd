"""What data meet outside the program: limits of the system, damaged files, pictures replaced and removed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_autoencoder import small_kl

from sit_atconv.data.shards.manifest import load_manifest

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
