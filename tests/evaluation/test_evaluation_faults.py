"""What an evaluation meets outside itself: limits of the system, damaged files, what a killed one left."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import StandIn
from safetensors import safe_open
from safetensors.torch import save_file

from sit_atconv.errors import InputError
from sit_atconv.evaluation import Options, Reading, evaluate
from sit_atconv.evaluation.features.cache import FeatureCache

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


# --- the cache


@pytest.fixture
def scored(tmp_path, caplog) -> Callable[[], tuple[dict[str, float], StandIn, str]]:
    """Scores through a cache; returns metrics, what was computed, and what was said."""
    random = np.random.default_rng(0)
    for name in ("samples", "reference"):
        np.savez(tmp_path / f"{name}.npz", arr_0=random.integers(0, 255, (300, 8, 8, 3), np.uint8))

    def score() -> tuple[dict[str, float], StandIn, str]:
        caplog.clear()
        features, options = StandIn(), Options(reading=Reading(cache=tmp_path / "cache"))
        report = evaluate(str(tmp_path / "samples.npz"), str(tmp_path / "reference.npz"), features, options)
        return report.metrics, features, caplog.text

    return score


def change(file: Path, kind: str, values: Callable[[torch.Tensor], torch.Tensor], digest: bool = True) -> None:
    """Other values in a cached file, which keeps its digest or loses it."""
    with safe_open(file, "pt") as opened:
        noted, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors | {kind: values(tensors[kind]).contiguous()}, file, noted if digest else None)


def flip(file: Path, position: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[position] ^= 4
    file.write_bytes(damaged)


DAMAGE = {
    "zeros": lambda file: change(file, "pool", torch.zeros_like),
    "a few columns": lambda file: change(file, "pool", lambda pool: pool * (torch.arange(pool.shape[1]) > 1)),
    "too few rows": lambda file: change(file, "pool", lambda pool: pool[:3]),
    "doubles": lambda file: change(file, "pool", lambda pool: pool.double()),
    "other pictures": lambda file: change(file, "digests", lambda digests: digests.flip(0)),
    "digests of another size": lambda file: change(file, "digests", lambda digests: digests[:, :31]),
    "a flipped bit": lambda file: flip(file, -100),
    "a flipped bit in the header": lambda file: flip(file, 20),
    "an earlier version's": lambda file: change(file, "pool", lambda pool: pool, digest=False),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_the_cache_is_computed_again(damage, scored, tmp_path):
    metrics, *_ = scored()
    for file in (files := sorted((tmp_path / "cache").rglob("*.safetensors"))):
        DAMAGE[damage](file)
    again, features, said = scored()
    assert again == metrics and features.seen == 600
    assert said.count("is removed, and its features are computed again") == len(files)
    again, features, said = scored()
    assert again == metrics and features.seen == 0 and "damaged" not in said


def test_what_a_killed_evaluation_left_unfinished_is_removed(scored, tmp_path):
    scored()
    (folder,) = (tmp_path / "cache").iterdir()
    left = folder / ".0123.safetensors.partial"
    left.write_bytes(b"half of it")
    with FeatureCache(tmp_path / "cache", StandIn(), frozenset({"pool"})):
        assert not left.exists()
        left.write_bytes(b"written by this one just now")
        scored()
        assert left.exists()
    scored()
    assert not left.exists()


# --- statistics


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"count": np.array("many")}, "count: Expected `int`, got `str`"),
        ({"count": np.array([5, 6])}, "count: Expected `int`, got `array`"),
        ({"count": np.array(np.nan)}, "count: Expected `int`, got `float`"),
        ({"count": np.array(1)}, "number of references is 1"),
        ({"lossy": np.array("no")}, "lossy: Expected `bool"),
        ({"sigma": -np.eye(6)}, r"reference\.npz: sigma: A covariance has the negative eigenvalue -1"),
        ({"sigma": np.eye(6) + 2 * np.eye(6)[::-1]}, "sigma: A covariance has the negative eigenvalue -1"),
        ({"sigma": np.diag([1, 1, 1, 1, 1, -2e-6])}, "sigma: A covariance has the negative eigenvalue -2e-06"),
        ({"sigma_s": np.diag([1, 1, 1, 1, -1.0]), "mu_s": np.zeros(5)}, "sigma_s: A covariance has the negative"),
        ({"sigma": np.eye(6) + np.eye(6, k=1)}, "sigma: A covariance is not symmetric: two entries .* differ by 1 "),
    ],
)
def test_statistics_that_are_none(arrays, message, tmp_path):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "samples.npz", arr_0=random.integers(0, 255, (30, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "reference.npz", **{"mu": np.zeros(6), "sigma": np.eye(6), **arrays})
    with pytest.raises(InputError, match=message):
        evaluate(str(tmp_path / "samples.npz"), str(tmp_path / "reference.npz"), StandIn(), Options(metrics=("fid",)))
