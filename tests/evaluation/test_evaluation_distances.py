"""MIND, CMMD and FDr: closed forms, literal transcriptions of the definitions, and properties."""

import numpy as np
import pytest
import torch
from evaluation_fixtures import StandIn
from hypothesis import given, settings
from hypothesis import strategies as st

from sit_atconv.errors import InputError
from sit_atconv.evaluation import (
    Options,
    Reading,
    SampleStream,
    cmmd,
    create_features,
    evaluate,
    frechet_distance,
    mind,
    write_reference,
)
from sit_atconv.evaluation.features.presets import FDR_DIVISORS
from sit_atconv.evaluation.metrics.cmmd import cmmd_replicates
from sit_atconv.evaluation.metrics.moments import moments_of
from sit_atconv.evaluation.metrics.sliced import Resampled, drawn_rows, sliced_distance, unit_directions


def normal(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 77]).standard_normal((count, dimension)))


def literal_mind(x: np.ndarray, y: np.ndarray, directions: np.ndarray) -> float:
    """3 d times the mean over directions of the mean squared difference of sorted projections, one after the other."""
    values = []
    for u in directions:
        u = u / np.sqrt((u**2).sum())
        values.append(((np.sort(x @ u) - np.sort(y @ u)) ** 2).mean())
    return 3 * x.shape[1] * float(np.mean(values))


def literal_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """The three means of the kernel, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([[np.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a])

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


# --- MIND


def test_mind_is_its_definition():
    x, y, directions = normal(40, 7), normal(40, 7, 1) * 1.5 + 0.2, normal(300, 7, 2)
    expected = literal_mind(x.numpy(), y.numpy(), directions.numpy())
    assert mind(x, y, directions) == pytest.approx(expected, rel=1e-12)
    assert mind(x.float().numpy(), y.float().numpy(), directions.numpy()) == pytest.approx(expected, rel=1e-5)


def test_mind_of_scaled_and_shifted_features_is_three_times_the_frechet_distance():
    """y = c x + b: sorted projections differ by (1 - c) x - b, and the mean over axes is exact."""
    x = normal(500, 6)
    x = (x - x.mean(0)) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
    y = 1.7 * x + torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 2.0])
    axes = torch.eye(6).double()  # exact for any directions whose squares average to the identity
    pair = [(m.mean(), m.covariance() * 499 / 500) for m in map(moments_of, (x, y))]
    assert mind(x, y, axes) == pytest.approx(3 * frechet_distance(*pair[0], *pair[1]), rel=1e-9)
    assert mind(x, y, 4000) == pytest.approx(mind(x, y, axes), rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.integers(0, 2**31))
def test_mind_is_a_symmetric_distance(n, m, d, seed):
    x, y = normal(n, d, seed), normal(m, d, seed + 1)
    assert mind(x, y, 16) == pytest.approx(mind(y, x, 16), rel=1e-12) and mind(x, y, 16) >= 0
    assert mind(x, x[torch.randperm(n)], 16) == pytest.approx(0, abs=1e-24)


def test_mind_falls_with_the_number_of_rows():
    """Two samples of one distribution, drawn with torch's generator and the seed of the directions."""
    torch.manual_seed(0)
    floors = [mind(torch.randn(n, 16), torch.randn(n, 16), seed=0) for n in (100, 400, 1600)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2] and floors[0] < 3 * 16 * 0.1


def test_mind_draws_rows_of_the_larger_side_only():
    x, y = normal(30, 4), normal(50, 4, 1)
    rows = drawn_rows(50)[:30]
    assert mind(x, y) == sliced_distance(x, y[rows], unit_directions(1000, 4))
    assert mind(x, y) != mind(x, y, seed=1)
    assert sorted(drawn_rows(50).tolist()) == list(range(50))


def test_resampled_mind_is_that_of_the_repeated_rows():
    x, y, directions = normal(30, 5), normal(30, 5, 1), unit_directions(64, 5)
    resampled = Resampled(x, y, directions)
    assert resampled.distance(np.ones(30, int)) == pytest.approx(sliced_distance(x, y, directions), rel=1e-12)
    counts = np.bincount(np.random.default_rng(0).integers(30, size=30), minlength=30)
    repeated = y.repeat_interleave(torch.from_numpy(counts), 0)
    assert resampled.distance(counts) == pytest.approx(sliced_distance(x, repeated, directions), rel=1e-12)


@pytest.mark.parametrize(
    "x, y, directions, words",
    [
        (torch.ones(3), torch.ones(3, 2), 4, r"\(n, d\)"),
        (torch.ones(0, 2), torch.ones(3, 2), 4, "n >= 1"),
        (torch.ones(3, 2), torch.ones(3, 4), 4, "2 and 4 dimensions"),
        (torch.full((3, 2), float("nan")), torch.ones(3, 2), 4, "not finite"),
        (torch.ones(3, 2), torch.ones(3, 2), 0, "k >= 1"),
        (torch.ones(3, 2), torch.ones(3, 2), torch.zeros(4, 2), "not zero"),
        (torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 3), r"\(k, 2\)"),
    ],
)
def test_mind_refuses_what_is_no_features(x, y, directions, words):
    with pytest.raises(InputError, match=words):
        mind(x, y, directions)


# --- CMMD


def test_cmmd_is_its_definition():
    x, y = normal(25, 6).numpy(), normal(18, 6, 1).numpy() * 3 + 1
    assert cmmd(x, y) == pytest.approx(literal_cmmd(x, y), rel=1e-10)
    assert cmmd(torch.from_numpy(x).float(), torch.from_numpy(y).float()) == pytest.approx(literal_cmmd(x, y), rel=1e-5)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9) and cmmd(x, y) == pytest.approx(cmmd(y, x), rel=1e-12)


def test_cmmd_of_many_rows_is_computed_in_blocks():
    x, y = normal(2100, 2), normal(2300, 2, 1) + 0.5
    kernel = torch.cdist(torch.cat([x, y]), torch.cat([x, y])).square().mul(-1 / 200).exp()
    a, b, c = kernel[:2100, :2100].mean(), kernel[2100:, 2100:].mean(), kernel[:2100, 2100:].mean()
    assert cmmd(x, y) == pytest.approx(1000 * float(a + b - 2 * c), rel=1e-9)


def test_cmmd_on_the_unit_sphere_is_nearly_ten_times_the_distance_of_means():
    x, y = (torch.nn.functional.normalize(normal(300, 32, seed) + seed) for seed in (0, 1))
    expected = 10 * float((x.mean(0) - y.mean(0)).square().sum())
    assert cmmd(x, y) == pytest.approx(expected, rel=0.02)


def test_replicates_of_cmmd_are_those_of_repeated_rows():
    x, y = normal(20, 3), normal(15, 3, 1) * 4
    counts = np.stack([np.bincount(np.random.default_rng(i).integers(15, size=15), minlength=15) for i in range(3)], 1)
    expected = [cmmd(x, y.repeat_interleave(torch.from_numpy(column), 0)) for column in counts.T]
    np.testing.assert_allclose(cmmd_replicates(x, y, torch.from_numpy(counts)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "x, y, sigma, words",
    [
        (torch.ones(3), torch.ones(3, 2), 10, r"\(n, d\)"),
        (torch.ones(3, 2), torch.ones(3, 4), 10, "2 and 4 dimensions"),
        (torch.ones(3, 2), torch.full((3, 2), float("inf")), 10, "not finite"),
        (torch.ones(3, 2), torch.ones(3, 2), 0, "positive"),
    ],
)
def test_cmmd_refuses_what_is_no_features(x, y, sigma, words):
    with pytest.raises(InputError, match=words):
        cmmd(x, y, sigma)


# --- several spaces in one evaluation


class Linear(StandIn):
    """Features of a network of their own: {"pool": (B, 4)}."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        super().__init__()
        self.name, self.title, self.suffix, self.identity = name, f"linear {name}", f"_{name}", f"{name} {scale}"
        self.dimensions, self._scale = {"pool": 4}, scale

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen += len(images)
        flat = images.flatten(1).double() / 255
        maps = torch.cos(torch.arange(flat.shape[1] * 4) * 0.7).view(-1, 4).double()
        return {"pool": (flat @ maps * self._scale).float()}


@pytest.fixture
def pictures() -> dict[str, list[torch.Tensor]]:
    """Uint8 pictures of two distributions, in batches."""
    generator = np.random.default_rng(3)
    return {
        "samples": [torch.from_numpy(generator.integers(0, 256, (16, 3, 8, 8), dtype=np.uint8)) for _ in range(5)],
        "reference": [torch.from_numpy(generator.integers(0, 128, (16, 3, 8, 8), dtype=np.uint8)) for _ in range(7)],
    }


@pytest.fixture
def stored(pictures, tmp_path) -> dict[str, str]:
    for name, batches in pictures.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=torch.cat(batches).permute(0, 2, 3, 1).numpy())
    return {name: str(tmp_path / f"{name}.npz") for name in pictures}


ALL = ("fid", "sfid", "is", "precision", "recall", "kid", "mind", "fd")


def test_several_spaces_give_the_numbers_of_each(stored, tmp_path):
    """One pass over the pictures, streamed or stored, with a cache or without: the same bits as space by space."""
    alone = {}
    for features in (StandIn(), Linear("one"), Linear("two", 3.0)):
        names = tuple(n for n in ALL if n != "fd") if features.name == "inception" else ("fd", *ALL[3:7])
        alone |= evaluate(stored["samples"], stored["reference"], features, Options(metrics=names)).metrics
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        spaces = [StandIn(), Linear("one"), Linear("two", 3.0)]
        together = evaluate(stored["samples"], stored["reference"], spaces, Options(ALL, reading=Reading(cache=cache)))
        assert together.metrics == alone
        assert {each["name"] for each in together.other_features} == {"one", "two"}
    assert [space.seen for space in spaces] == [0, 0, 0]  # the last time everything was in the cache
    assert {"fid", "mind@80", "mind@80_one", "fd_two", "kid_two_std", "precision_one"} <= together.metrics.keys()


def test_every_picture_is_seen_once_by_every_space(pictures, stored):
    spaces = [StandIn(), Linear("one")]
    evaluate(pictures["samples"], stored["reference"], spaces, Options(("fid", "fd", "mind")))
    assert [space.seen for space in spaces] == [80 + 112] * 2


@pytest.mark.parametrize("total", [None, 80, 50, 100])
def test_a_stream_may_say_a_wrong_total(pictures, stored, total):
    stream = SampleStream(pictures["samples"], total=total)
    report = evaluate(stream, stored["reference"], StandIn(), Options(("precision", "mind")))
    expected = evaluate(stored["samples"], stored["reference"], StandIn(), Options(("precision", "mind")))
    assert report.metrics == expected.metrics


def test_mind_says_its_count_and_its_floor(stored):
    report = evaluate(stored["samples"], stored["reference"], StandIn(), Options(("mind",), mind_count=50))
    assert list(report.metrics) == ["mind@50"] and report.floors["mind@50"]["count"] == 50
    assert 0 < report.floors["mind@50"]["value"] < report.metrics["mind@50"]
    assert "MIND@50 " in report.table() and "between 50 references and as many others" in report.table()
    assert any("published values compare 5000" in warning for warning in report.warnings)


def test_mind_equals_the_function_of_the_kept_features(pictures, stored):
    report = evaluate(stored["samples"], stored["reference"], StandIn(), Options(("mind",)))
    features = {name: StandIn()(torch.cat(batches))["pool"] for name, batches in pictures.items()}
    rows = {name: drawn_rows(len(values))[:80] for name, values in features.items()}
    expected = sliced_distance(
        *(features[name][rows[name]] for name in ("reference", "samples")), unit_directions(1000, 6)
    )
    assert report.metrics["mind@80"] == pytest.approx(expected, rel=1e-12)


def test_fdr_divides_by_the_distance_of_two_halves_of_the_reference(pictures, stored):
    spaces = [Linear("one"), Linear("two", 5.0)]
    report = evaluate(stored["samples"], stored["reference"], spaces, Options(("fdr",), divisors="own"))
    one, two = report.ratios["one"], report.ratios["two"]
    assert one["ratio"] == pytest.approx(two["ratio"], rel=1e-5)  # a scale falls out
    assert two["divisor"] == pytest.approx(25 * one["divisor"], rel=1e-5)
    assert report.metrics["fdr_own"] == pytest.approx((one["ratio"] + two["ratio"]) / 2)
    assert one["ratio"] == pytest.approx(one["distance"] / one["divisor"]) and one["ratio"] > 1
    same = evaluate(stored["reference"], stored["reference"], spaces, Options(("fdr",), divisors="own"))
    assert same.metrics["fdr_own"] < 1  # real pictures, half of which are the half they are compared with
    assert "FDr (own)" in report.table() and "one: " in report.table()


def test_given_divisors_divide_the_distance_itself(stored):
    spaces, divisors = [StandIn(), Linear("one")], {"inception": 2.0, "one": 0.5}
    report = evaluate(stored["samples"], stored["reference"], spaces, Options(("fid", "fd", "fdr"), divisors=divisors))
    expected = (report.metrics["fid"] / 2 + report.metrics["fd_one"] / 0.5) / 2
    assert report.metrics["fdr_own"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "metrics, divisors, words",
    [
        (("fdr6",), None, "fdr-convnext, .* are not there"),
        (("fdr6",), "own", "published divisors"),
        (("fdr",), None, "--fdr-divisors own"),
        (("fdr",), {"inception": 1.0}, "one is not given"),
        (("fid",), "own", "only with --metrics fdr"),
        (("fid", "fdd"), None, "fdd is of the features dinov2"),
        (("fid", "minds"), None, "mind"),
    ],
)
def test_metrics_that_cannot_be_are_refused_before_any_work(stored, metrics, divisors, words):
    spaces = [StandIn(), Linear("one")]
    with pytest.raises(InputError, match=words):
        evaluate(stored["samples"], stored["reference"], spaces, Options(metrics, divisors=divisors))
    assert [space.seen for space in spaces] == [0, 0]


def test_fdr6_needs_imagenet(stored):
    spaces = [StandIn(), *(Linear(f"fdr-{name}") for name in ("convnext", "dinov2", "mae", "siglip2", "clip"))]
    with pytest.raises(InputError, match=r"1,281,167 training images.* for inception the reference has 112 images"):
        evaluate(stored["samples"], stored["reference"], spaces, Options(("fdr6",)))
    assert {space.seen for space in spaces} == {0}


def test_fdr6_of_statistics_in_files_of_their_own(stored, pictures, tmp_path):
    """The authors' files: mu and sigma for each space. Its value is the mean of distance / divisor."""
    spaces = [StandIn() if name == "inception" else Linear(name) for name in FDR_DIVISORS]
    files, expected = {}, []
    for space in spaces:
        reference, samples = (moments_of(space(torch.cat(pictures[side]))["pool"]) for side in ("reference", "samples"))
        files[space.name] = str(tmp_path / f"{space.name}.npz")
        np.savez(files[space.name], mu=reference.mean(), sigma=reference.covariance())
        distance = frechet_distance(reference.mean(), reference.covariance(), samples.mean(), samples.covariance())
        expected.append(distance / FDR_DIVISORS[space.name])
    options = Options(("fdr6",), statistics=files, bootstrap=4)
    report = evaluate(stored["samples"], stored["reference"], spaces, options)
    assert report.metrics["fdr6"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert report.intervals["fdr6"]["low"] < report.metrics["fdr6"] < report.intervals["fdr6"]["high"]
    assert report.ratios["fdr-mae"]["divisor"] == FDR_DIVISORS["fdr-mae"]


def test_a_reference_file_holds_the_statistics_of_all_spaces(stored, tmp_path):
    out, spaces = tmp_path / "reference_file.npz", [StandIn(), Linear("one")]
    write_reference(stored["reference"], out, spaces, images=60)
    with np.load(out) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "mu_one", "sigma_one", "arr_0", "weights_sha256_one"} <= set(file)
    options = Options(("fid", "sfid", "fd", "mind"))
    direct = evaluate(stored["samples"], stored["reference"], spaces, options)
    before = [space.seen for space in spaces]
    through = evaluate(stored["samples"], str(out), spaces, options)
    for name in ("fid", "sfid", "fd_one"):
        assert through.metrics[name] == pytest.approx(direct.metrics[name], rel=1e-9)
    assert [space.seen - seen for space, seen in zip(spaces, before, strict=True)] == [80 + 60] * 2
    assert "mind@60" in through.metrics
    only = evaluate(stored["samples"], str(out), Linear("one"), Options(("fd",)))
    assert only.metrics["fd_one"] == through.metrics["fd_one"]


def test_intervals_surround_mind_and_cmmd(stored):
    space = Linear("cmmd")
    space.suffix = "_cmmd"
    report = evaluate(stored["samples"], stored["reference"], space, Options(("mind", "cmmd"), bootstrap=20))
    for name in ("mind@80_cmmd", "cmmd"):
        interval = report.intervals[name]
        assert interval["low"] < report.metrics[name] < interval["high"] and interval["std"] > 0


def test_statistics_that_are_not_there_or_of_no_space(stored, tmp_path):
    nothing = tmp_path / "nothing.npz"
    np.savez(nothing, other=np.ones(3))
    with pytest.raises(InputError, match="no mu and sigma"):
        evaluate(stored["samples"], stored["reference"], Linear("one"), Options(statistics={"one": str(nothing)}))
    with pytest.raises(InputError, match="the features are one"):
        evaluate(stored["samples"], stored["reference"], Linear("one"), Options(statistics={"two": str(nothing)}))


def test_classes_are_compared_in_one_space(stored):
    with pytest.raises(InputError, match="in one space"):
        evaluate(stored["samples"], stored["reference"], [StandIn(), Linear("one")], Options(classes=None))


def test_two_spaces_of_one_name_are_refused(stored):
    with pytest.raises(InputError, match="numbers of the same name"):
        evaluate(stored["samples"], stored["reference"], [create_features("pixels"), create_features("pixels")])
