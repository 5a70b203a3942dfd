"""The numbers as functions of features: closed forms, a second computation frozen in tests/fixtures, and properties."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sit_atconv.errors import InputError
from sit_atconv.evaluation.metrics import neighbours
from sit_atconv.evaluation.metrics.distances import (
    FrechetTarget,
    InceptionScoreSums,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from sit_atconv.evaluation.metrics.moments import Moments, moments_of
from sit_atconv.evaluation.metrics.neighbours import manifold_membership, neighbour_radii, precision_recall


@pytest.fixture(scope="module")
def values() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "fixtures" / "evaluation_values.npz") as file:
        return dict(file)


def gaussian(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    moments = moments_of(torch.from_numpy(features))
    return moments.mean(), moments.covariance()


# --- moments


def test_moments_equal_numpy_whatever_the_split(values):
    x = values["samples"]
    moments = Moments.zeros(x.shape[1])
    for part in np.split(x, [1, 7, 200]):
        moments.update(torch.from_numpy(part))
    np.testing.assert_allclose(moments.mean(), x.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-13)
    assert torch.equal(moments_of(torch.from_numpy(x), block=17).covariance(), moments.covariance())  # the same bits


def test_a_single_vector_has_no_covariance():
    moments = moments_of(torch.ones(1, 3))
    assert moments.covariance().isnan().all()
    with pytest.raises(InputError, match="at least two images"):
        frechet_distance(moments.mean(), moments.covariance(), torch.zeros(3), torch.eye(3))


# --- Fréchet distance


def test_frechet_distance_of_frozen_features(values):
    reference = gaussian(values["reference"])
    assert frechet_distance(*gaussian(values["samples"]), *reference) == pytest.approx(values["frechet"], rel=1e-9)
    few = frechet_distance(*gaussian(values["samples"][:20]), *reference)
    assert few == pytest.approx(values["frechet_few"], rel=1e-6)  # rank 19 of 32; scipy's square root is less exact


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 9), min_size=1, max_size=6), st.floats(-3, 3), st.integers(0, 2**31))
def test_frechet_distance_of_commuting_gaussians_is_known(variances, shift, seed):
    """Covariances with shared eigenvectors: |shift|^2 + sum of (sqrt a - sqrt b)^2, rank-deficient ones included."""
    d = len(variances)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
    a, b = np.array(variances), np.array(variances[::-1]) * 0.5
    expected = d * shift**2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    sigmas = [basis @ np.diag(v) @ basis.T for v in (a, b)]
    result = frechet_distance(np.zeros(d), sigmas[0], np.full(d, shift), sigmas[1])
    assert result == pytest.approx(expected, rel=1e-9, abs=1e-6)  # variances below 1e-14 are taken for rounding


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_frechet_distance_of_steep_spectra(power):
    """Variances i^-power and 1.1 i^-power: roots of the eigenvalues of a product would lose up to all digits."""
    variances = np.arange(1, 301.0) ** -power
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((300, 300)))
    sigma = basis @ np.diag(variances) @ basis.T
    expected = (1.1**0.5 - 1) ** 2 * variances.sum()
    assert frechet_distance(np.zeros(300), sigma, np.zeros(300), 1.1 * sigma) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_zero_on_itself_and_reusable(values):
    one, two = gaussian(values["reference"]), gaussian(values["samples"])
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-10)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-9)
    assert FrechetTarget(*one).distance(*two) == frechet_distance(*one, *two)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(4), np.eye(4), "3 and 4 dimensions"),
        (np.zeros(3), np.eye(4), r"covariance \(d, d\)"),
        (np.zeros((1, 3)), np.eye(3), r"mean \(d,\)"),
        (np.full(3, np.nan), np.eye(3), "not finite"),
        (np.zeros(0), np.zeros((0, 0)), r"mean \(d,\)"),
        (np.zeros(3), -np.eye(3), "negative eigenvalue -1"),
        (np.zeros(3), np.diag([1, 1, -2e-6]), "negative eigenvalue -2e-06"),
        (np.zeros(3), np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]), r"not symmetric: .* differ by 0\.5"),
    ],
)
def test_frechet_distance_refuses_what_does_not_fit(mu, sigma, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(np.zeros(3), np.eye(3), mu, sigma)


def test_what_rounding_may_do_to_a_covariance_is_accepted(values):
    mu, sigma = gaussian(values["samples"][:20])  # rank 19 of 32
    rounded = sigma.float() + 1e-7 * sigma.max() * torch.randn(32, 32)
    assert frechet_distance(mu, rounded, *gaussian(values["reference"])) == pytest.approx(
        frechet_distance(mu, sigma, *gaussian(values["reference"])), rel=1e-3
    )
    assert frechet_distance(mu, sigma.float(), mu, sigma) == pytest.approx(0, abs=1e-5)


def test_a_distance_negative_beyond_rounding_is_an_error():
    """Each eigenvalue may come from rounding, all of them together may not."""
    sigma = np.diag([1.0] + [-9e-7] * 100)
    with pytest.raises(InputError, match=r"distance comes out as -0\.00018"):
        frechet_distance(np.zeros(101), sigma, np.zeros(101), sigma)


# --- inception score


def test_inception_score_of_frozen_probabilities(values):
    p = values["probabilities"]
    assert inception_score(p) == pytest.approx(values["inception_score"], rel=1e-7)
    assert inception_score(torch.from_numpy(p), chunk=12) == pytest.approx(
        values["inception_score_chunks_of_12"], rel=1e-7
    )


def test_inception_score_closed_forms_and_its_dependence_on_order():
    one_hot = np.eye(10)[np.arange(40) % 10]
    assert inception_score(one_hot) == pytest.approx(10)
    assert inception_score(np.full((7, 10), 0.1)) == pytest.approx(1)
    assert inception_score(one_hot[np.argsort(np.arange(40) % 10)], chunk=4) == pytest.approx(1)  # sorted by class
    assert inception_score(one_hot, chunk=30) == pytest.approx(10)  # the last 10 rows are a chunk of their own


def test_inception_score_sums_accept_rows_in_any_split_and_order(values):
    p = torch.from_numpy(values["probabilities"])
    sums = InceptionScoreSums(p.shape[1], chunk=12)
    for first, last in ((30, 50), (0, 5), (5, 30)):
        sums.update(p[first:last], first)
    assert sums.score() == pytest.approx(inception_score(p, chunk=12), rel=1e-12)


def test_inception_score_refuses_logits_and_emptiness():
    with pytest.raises(InputError, match="sum to one"):
        inception_score(np.random.default_rng(0).standard_normal((5, 10)))
    with pytest.raises(InputError, match="no images"):
        inception_score(np.zeros((0, 10)))


# --- precision and recall


@pytest.mark.parametrize(("k", "key"), [(3, "precision_recall"), (5, "precision_recall_k5")])
def test_precision_recall_of_frozen_features(values, k, key):
    assert precision_recall(values["reference"], values["samples"], k) == tuple(values[key])


@pytest.mark.parametrize("block", [7, 64, 300])
def test_precision_recall_does_not_depend_on_the_blocks(values, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    shares = []
    inside = manifold_membership(values["reference"], values["samples"], progress=shares.append)
    assert tuple(float(i.double().mean()) for i in inside) == tuple(values["precision_recall"])
    assert sum(shares) == pytest.approx(1)


def test_radii_count_the_point_itself_as_nearest():
    radii = neighbour_radii(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), k=2)
    assert radii.tolist() == [9, 4, 9, 36]


def test_precision_recall_with_ties_and_duplicates():
    """Whole numbers, whose distances are exact: balls are closed, and the nearest of all is the point itself."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        r, s = (generator.integers(0, 4, (count, 5)) for count in (40, 50))
        rr, ss, rs = (((a[:, None] - b[None]) ** 2).sum(-1) for a, b in ((r, r), (s, s), (r, s)))
        radii_r, radii_s = np.sort(rr, 1)[:, 3], np.sort(ss, 1)[:, 3]
        expected = (rs <= radii_r[:, None]).any(0).mean(), (rs <= radii_s[None]).any(1).mean()
        assert precision_recall(r, s) == expected


def test_precision_recall_of_separated_and_of_equal_sets():
    x = np.random.default_rng(0).standard_normal((30, 4))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    collapsed = x[:1] + 1e-3 * np.random.default_rng(1).standard_normal((30, 4))
    precision, recall = precision_recall(x, collapsed)
    assert precision == 1 and recall < 0.1


@pytest.mark.parametrize(
    ("reference", "samples", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), "more than 3 reference"),
        (np.zeros((9, 2)), np.zeros((9, 3)), "2 and 3 dimensions"),
        (np.zeros((9, 2)), np.full((9, 2), np.inf), "sample features hold values that are not finite"),
        (np.zeros(9), np.zeros((9, 2)), "reference features"),
    ],
)
def test_precision_recall_refuses_what_does_not_fit(reference, samples, message):
    with pytest.raises(InputError, match=message):
        precision_recall(reference, samples)


# --- kernel distance


def test_kernel_distance_over_all_pairs_and_over_subsets(values):
    x, y = values["reference"], values["samples"]
    mean, std = kernel_distance(x[:60], y[:60], subsets=3, size=60)
    assert mean == pytest.approx(values["squared_mmd"], rel=1e-9) and std == pytest.approx(0, abs=1e-12)
    mean, std = kernel_distance(x, y, subsets=50, size=100)
    assert std > 0 and abs(mean - values["squared_mmd"]) < 4 * std
    assert kernel_distance(x, y, subsets=5, size=100) == kernel_distance(x, y, subsets=5, size=100)
