"""Agreement with the ADM evaluator's own values: of given features always, of images if ../shared has the weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import GOLDEN, REAL_WEIGHTS, needs_shared

from sit_atconv.evaluation.features.inception import InceptionFeatures
from sit_atconv.evaluation.metrics.distances import frechet_distance, inception_score
from sit_atconv.evaluation.metrics.moments import moments_of
from sit_atconv.evaluation.metrics.neighbours import neighbour_radii, precision_recall


@pytest.fixture(scope="module")
def adm() -> dict[str, np.ndarray]:
    """What ADM gave, see tests/fixtures/make_adm_values.py."""
    with np.load(Path(__file__).parents[1] / "fixtures" / "adm_values.npz") as file:
        return dict(file)


# --- numbers of given features


def gaussian(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    moments = moments_of(torch.from_numpy(features))
    return moments.mean(), moments.covariance()


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ("sample_features", "frechet_sample_to_reference"),
        ("few_features", "frechet_rank_deficient_few_to_reference"),
    ],
)
def test_frechet_distances(adm, samples, expected):
    distance = frechet_distance(*gaussian(adm[samples]), *gaussian(adm["reference_features"]))
    assert distance == pytest.approx(float(adm[expected]), rel=1e-6)


def test_precision_and_recall_equal_the_fp32_path_and_are_near_the_fp16_path(adm):
    result = precision_recall(adm["reference_features"] * 400, adm["sample_features"] * 400)
    assert result == tuple(adm["precision_recall_fp32_path_scaled_by_400"])
    assert precision_recall(adm["reference_features"], adm["sample_features"]) == result
    assert result == pytest.approx(tuple(adm["precision_recall_fp16_path"]), abs=0.005)


def test_radii(adm):
    radii = neighbour_radii(torch.from_numpy(adm["reference_features"][:50] * 400), k=3)
    expected = adm["radii_squared_first50_scaled_by_400"][:, 0]  # third neighbours among the first 50
    np.testing.assert_allclose(radii, expected, rtol=1e-6)


def inception_scores(probabilities: np.ndarray | torch.Tensor) -> tuple[float, float]:
    """As one chunk and in chunks of 12."""
    return inception_score(probabilities), inception_score(probabilities, chunk=12)


def expected_inception_scores(adm: dict[str, np.ndarray]) -> object:
    names = "inception_score_all_images_one_chunk", "inception_score_chunks_of_12"
    return pytest.approx(tuple(float(adm[name]) for name in names), rel=1e-6)


def test_inception_scores(adm):
    assert inception_scores(adm["probabilities"]) == expected_inception_scores(adm)


# --- images


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def features(golden) -> dict[str, dict[str, torch.Tensor]]:
    network = InceptionFeatures(REAL_WEIGHTS)
    return {size: network(torch.from_numpy(golden[f"images_{size}"]).permute(0, 3, 1, 2)) for size in ("64", "256")}


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize("size", ["64", "256"])
@pytest.mark.parametrize(("ours", "theirs"), [("pool", "pool"), ("spatial", "spatial"), ("probabilities", "softmax")])
def test_features_of_the_golden_images(golden, features, size, ours, theirs):
    expected = golden[f"{theirs}_{size}"].astype(float)
    difference = np.abs(features[size][ours].numpy() - expected)
    assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(expected)
    assert difference.max() < 1e-5 * np.abs(expected).max()


@pytest.mark.shared
@needs_shared
def test_inception_scores_of_the_golden_images(adm, features):
    probabilities = torch.cat([features["64"]["probabilities"], features["256"]["probabilities"]])
    assert inception_scores(probabilities) == expected_inception_scores(adm)
