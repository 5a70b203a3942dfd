"""What an evaluation meets outside itself: limits of the system, damaged files, what a killed one left."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PIXELS = ["--features", "pixels", "--device", "cpu", "--metrics", "fd_pixels"]


def with_few_descriptors(*arguments: str) -> subprocess.CompletedProcess:
    """Python in a process that may open 256 files."""
    return subprocess.run(
        ["bash", "-c", 'ulimit -n 256; exec "$0" "$@"', sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )


# --- limits


@pytest.mark.slow
def test_fifty_thousand_labelled_samples_need_few_descriptors(tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 255, (50_000, 8, 8, 3), np.uint8), random.integers(0, 10, 50_000)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    arguments = ["--samples", str(tmp_path / "samples.npz"), "--reference", "digits:heldout@8", *PIXELS]
    result = with_few_descriptors("evaluate_fid.py", *arguments, "--cache", str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert "50000 images of 8x8" in result.stdout


_REFERENCE = """
import sys
sys.path.insert(0, "tests")
from evaluation_fixtures import StandIn
from sit_atconv.evaluation import Reading, write_reference
write_reference(sys.argv[1], sys.argv[2], StandIn(), 10, Reading(batch_size=2, workers=2))
"""


@pytest.mark.slow
def test_a_reference_of_labelled_pictures_needs_few_descriptors(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (600, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", arr_0=images, arr_1=np.arange(600) % 10)
    result = with_few_descriptors("-c", _REFERENCE, str(tmp_path / "pictures.npz"), str(tmp_path / "reference.npz"))
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "reference.npz")["count"] == 600
