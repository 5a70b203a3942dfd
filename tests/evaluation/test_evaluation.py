"""evaluate(): any input as it comes, honest reports, options that stay options."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import StandIn, random_weights  # noqa: F401
from PIL import Image

from sit_atconv.data.prepare import __main__ as prepare
from sit_atconv.errors import InputError
from sit_atconv.evaluation import (
    InceptionFeatures,
    Options,
    Reading,
    SampleStream,
    create_features,
    evaluate,
    frechet_distance,
    inception_score,
    precision_recall,
)
from sit_atconv.evaluation.features.kinds import PixelFeatures
from sit_atconv.evaluation.metrics.moments import moments_of
from sit_atconv.evaluation.report import find_warnings
from sit_atconv.evaluation.scoring.per_class import feature_distance


def pictures(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    """Noise around a few patterns, uint8 (count, size, size, 3)."""
    generator = np.random.default_rng(seed)
    patterns = generator.integers(40, 200, (5, size, size, 3))
    noise = generator.normal(0, 20, (count, size, size, 3))
    return np.clip(patterns[np.arange(count) % 5] + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """The same 40 pictures as npz, folder of PNG and zip, and a reference of 50 others, both labelled in turn."""
    root = tmp_path_factory.mktemp("sets")
    samples, reference = pictures(40), pictures(50, seed=1)
    np.savez(root / "samples.npz", arr_0=samples, arr_1=np.arange(40) % 5)
    np.savez_compressed(root / "reference.npz", arr_0=reference, arr_1=np.arange(50) % 5)
    (root / "folder").mkdir()
    with zipfile.ZipFile(root / "samples.zip", "w") as archive:
        for i, image in enumerate(samples):
            file = root / "folder" / f"{i:03d}.png"
            Image.fromarray(image).save(file)
            archive.write(file, file.name)
    return {name: str(root / name) for name in ("samples.npz", "folder", "samples.zip", "reference.npz")}


def pixels(images: np.ndarray) -> torch.Tensor:
    return PixelFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]


def test_numbers_are_those_of_the_functions(sets):
    report = evaluate(sets["samples.npz"], sets["reference.npz"], create_features("pixels"))
    ours, theirs = pixels(pictures(40)), pixels(pictures(50, seed=1))
    assert report.metrics["fd_pixels"] == pytest.approx(feature_distance(ours, theirs), rel=1e-9)
    expected = precision_recall(theirs, ours)
    assert (report.metrics["precision_pixels"], report.metrics["recall_pixels"]) == expected
    assert set(report.metrics) == {"fd_pixels", "precision_pixels", "recall_pixels"}  # nothing called FID


def test_every_container_and_a_stream_give_the_same(sets):
    features = create_features("pixels")
    expected = evaluate(sets["samples.npz"], sets["reference.npz"], features)
    images = torch.from_numpy(pictures(40)).permute(0, 3, 1, 2)
    stream = SampleStream(iter(images.split(7)), facts={"path": "made up", "kind": "stream"})
    reading = Options(reading=Reading(batch_size=9, workers=1))
    for samples in (sets["folder"], sets["samples.zip"], stream, iter(images.split(13))):
        report = evaluate(samples, sets["reference.npz"], features, reading)
        assert report.metrics == pytest.approx(expected.metrics, rel=1e-12)
        assert report.samples["images_sha256"] == expected.samples["images_sha256"]
    shuffled = evaluate(iter(images.flip(0).split(13)), sets["reference.npz"], features)
    assert shuffled.samples["images_sha256"] != expected.samples["images_sha256"]  # their order matters to IS


def test_all_five_numbers(tmp_path, random_weights):  # noqa: F811
    features = InceptionFeatures(random_weights)
    ours, theirs = (torch.from_numpy(pictures(8, seed=seed)).permute(0, 3, 1, 2) for seed in (0, 1))
    np.savez(tmp_path / "reference.npz", arr_0=pictures(8, seed=1))
    report = evaluate(iter([ours]), str(tmp_path / "reference.npz"), features)
    assert list(report.metrics) == ["fid", "sfid", "is", "precision", "recall"]
    ours, theirs = features(ours), features(theirs)
    assert report.metrics["fid"] == pytest.approx(feature_distance(ours["pool"], theirs["pool"]), rel=1e-9)
    assert report.metrics["sfid"] == pytest.approx(feature_distance(ours["spatial"], theirs["spatial"]), rel=1e-9)
    assert report.metrics["is"] == pytest.approx(inception_score(ours["probabilities"]), rel=1e-12)
    assert (report.metrics["precision"], report.metrics["recall"]) == precision_recall(theirs["pool"], ours["pool"])
    text = report.table()
    assert all(name in text for name in ("FID", "sFID", "IS", "precision", "recall", "weights", "warning"))


def test_a_prepared_data_set_on_either_side(sets, tmp_path):
    prepare.main([sets["folder"], str(tmp_path / "set"), "--resolution", "8", "--vae", "identity", "--images"])
    features = create_features("pixels")
    expected = evaluate(sets["folder"], sets["reference.npz"], features)
    samples = evaluate(str(tmp_path / "set"), sets["reference.npz"], features)
    assert samples.metrics == pytest.approx(expected.metrics, rel=1e-12)
    assert samples.samples["images_sha256"] == expected.samples["images_sha256"]
    same = evaluate(sets["samples.zip"], str(tmp_path / "set"), features)
    assert same.warnings == ["Samples and reference are the same images."]


# --- reports


def test_json_has_what_is_needed_to_repeat_it(sets, tmp_path):
    report = evaluate(sets["samples.npz"], sets["reference.npz"], create_features("pixels"))
    report.write_json(tmp_path / "new" / "scores.json")
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert written["metrics"] == report.metrics
    assert (written["samples"]["count"], written["reference"]["count"]) == (40, 50)
    assert (written["samples"]["height"], written["samples"]["width"]) == (8, 8)
    assert len(written["samples"]["images_sha256"]) == len(written["reference"]["images_sha256"]) == 64
    assert written["versions"]["torch"] == torch.__version__.split("+")[0]
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "scores.json"]


def test_warnings_of_an_inception_run(tmp_path):
    features = StandIn()
    features.weights_sha256 = "f" * 64
    (tmp_path / "samples").mkdir()
    for name, image in zip("abcd", pictures(4), strict=True):
        (tmp_path / "samples" / name).mkdir()
        Image.fromarray(image).save(tmp_path / "samples" / name / "0.jpg")
    np.savez(tmp_path / "reference.npz", arr_0=pictures(6, size=9))
    report = evaluate(str(tmp_path / "samples"), str(tmp_path / "reference.npz"), features)
    text = "\n".join(report.warnings)
    for part in (
        "not the file that torch-fidelity publishes",
        "4 samples: published numbers use 50000",
        "use 6 reference images",
        "FID: 4 samples give a rank-deficient covariance",
        "sFID: 6 references give a rank-deficient covariance",
        "sorted by class",
        "Some samples are stored lossily",
        "Samples are 8x8, reference images 9x9",
    ):
        assert part in text


def test_bfloat16_is_labelled():
    fast = StandIn()
    fast.fast = True
    facts = {"kind": "npz", "count": 50_000, "lossy": False}
    assert find_warnings({}, facts, facts, fast, None) == [
        "Features were computed in bfloat16 (--fast): not for publication."
    ]


def test_no_warning_without_cause(sets):
    report = evaluate(sets["samples.npz"], sets["reference.npz"], create_features("pixels"))
    assert report.warnings == []
    same = evaluate(sets["samples.npz"], sets["folder"], create_features("pixels"))
    assert same.warnings == ["Samples and reference are the same images."]
    assert same.metrics["fd_pixels"] == pytest.approx(0, abs=1e-9)


def test_too_few_images_for_a_metric_is_said_not_hidden(sets):
    report = evaluate(
        iter([torch.zeros(3, 3, 8, 8, dtype=torch.uint8)]), sets["reference.npz"], create_features("pixels")
    )
    assert set(report.metrics) == {"fd_pixels"}
    assert report.unsupported["precision_pixels"] == "it needs at least 4 images on each side"
    assert "at least 4 images" in report.table()


def test_one_image_has_no_distance(sets, tmp_path):
    features = create_features("pixels")
    np.savez(tmp_path / "one.npz", arr_0=pictures(1))
    for samples in (str(tmp_path / "one.npz"), iter([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])):
        with pytest.raises(InputError, match="number of samples is 1: a distance needs at least two"):
            evaluate(samples, sets["reference.npz"], features)
    with pytest.raises(InputError, match="number of references is 1"):
        evaluate(sets["samples.npz"], str(tmp_path / "one.npz"), features)


# --- options


def test_metrics_can_be_chosen(sets):
    features = create_features("pixels")
    report = evaluate(sets["samples.npz"], sets["reference.npz"], features, Options(metrics=("recall_pixels",)))
    assert list(report.metrics) == ["recall_pixels"]
    with pytest.raises(InputError, match="fid is of the features inception"):
        evaluate(sets["samples.npz"], sets["reference.npz"], features, Options(metrics=("fid",)))


def test_extras_are_beside_the_defaults_and_never_change_them(sets):
    features = create_features("pixels")
    plain = evaluate(sets["samples.npz"], sets["reference.npz"], features)
    options = Options(kid=True, bootstrap=30, classes=(0, 3))
    report = evaluate(sets["samples.npz"], sets["reference.npz"], features, options)
    assert {name: report.metrics[name] for name in plain.metrics} == plain.metrics
    assert set(report.metrics) - set(plain.metrics) == {"kid_pixels", "kid_pixels_std"}
    assert set(report.intervals) == {"fd_pixels", "precision_pixels", "recall_pixels", "kid_pixels"}
    for name, interval in report.intervals.items():
        assert interval["low"] <= report.metrics[name] <= interval["high"]
    for name in ("fd_pixels", "kid_pixels"):  # precision and recall are 0 here, in every resampling
        assert report.intervals[name]["low"] < report.intervals[name]["high"] and report.intervals[name]["std"] > 0
    assert report.metrics["kid_pixels_std"] > 0
    assert not (plain.intervals or plain.per_class)


def test_per_class_distances(sets):
    options = Options(metrics=("fd_pixels",), classes=None)
    report = evaluate(sets["samples.npz"], sets["reference.npz"], create_features("pixels"), options)
    assert set(report.per_class) == {"0", "1", "2", "3", "4"}
    ours, theirs = pixels(pictures(40)[3::5]), pixels(pictures(50, seed=1)[3::5])
    assert report.per_class["3"] == {
        "samples": 8,
        "references": 10,
        "distance": pytest.approx(feature_distance(ours, theirs), rel=1e-9),
    }
    assert "class 3" in report.table()


def test_feature_distance_is_the_frechet_distance_for_few_and_many():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((5, 7), (5, 40), (40, 30)):
        x, y = torch.randn(n, 12, generator=generator), torch.randn(m, 12, generator=generator) + 0.5
        (one, other) = moments_of(x), moments_of(y)
        expected = frechet_distance(one.mean(), one.covariance(), other.mean(), other.covariance())
        assert feature_distance(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ("samples.npz", Options(classes=(0, 9)), "Unknown label .9.: expected labels in .0, 5."),
        ("folder", Options(classes=None), "samples have no labels"),
    ],
)
def test_options_that_cannot_be_met(sets, samples, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(sets[samples], sets["reference.npz"], create_features("pixels"), options)


def test_one_resample_is_no_bootstrap():
    with pytest.raises(InputError, match="at least two resamples"):
        Options(bootstrap=1)


def test_bootstrap_spread_is_that_of_fresh_samples(sets):
    """The standard deviation of FD over independent sets of samples, against one set's bootstrap."""
    features, options = create_features("pixels"), Options(metrics=("fd_pixels",), bootstrap=60)
    fresh = []
    for seed in range(30):
        noise = np.random.default_rng(seed).normal(128, 30, (200, 4, 4, 3))
        batch = torch.from_numpy(np.clip(noise, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
        fresh.append(batch)
    reference = np.clip(np.random.default_rng(99).normal(110, 30, (300, 4, 4, 3)), 0, 255).astype(np.uint8)
    path = Path(sets["folder"]).with_name("noise.npz")
    np.savez(path, arr_0=reference)
    distances = [evaluate(iter([b]), str(path), features, Options(metrics=("fd_pixels",))) for b in fresh]
    spread = np.std([report.metrics["fd_pixels"] for report in distances], ddof=1)
    estimate = evaluate(iter([fresh[0]]), str(path), features, options).intervals["fd_pixels"]["std"]
    assert 0.5 < estimate / spread < 2


# --- images that cannot be used


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pictures(9).astype(np.float32), "arr_0 is float32"),
        ((pictures(9) > 100).astype(np.uint8), "only 0 and 1"),
        (pictures(9).transpose(0, 3, 1, 2), "channels first"),
        (pictures(9)[..., 0], "greyscale"),
        (pictures(9)[..., :1], "greyscale"),
        (pictures(9)[:0], "empty"),
        (np.array([{"a": 1}], dtype=object), "pickled"),
    ],
    ids=["float", "unit range", "NCHW", "grey", "one channel", "empty", "pickled"],
)
def test_arrays_that_are_not_pictures(sets, tmp_path, array, message):
    np.savez(tmp_path / "bad.npz", arr_0=array)
    for samples, reference in (
        (str(tmp_path / "bad.npz"), sets["folder"]),
        (sets["folder"], str(tmp_path / "bad.npz")),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(samples, reference, create_features("pixels"))


def test_truncated_npz_and_a_bomb(sets, tmp_path):
    whole = Path(sets["samples.npz"]).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"Cannot open .*cut\.npz"):
        evaluate(str(tmp_path / "cut.npz"), sets["folder"], create_features("pixels"))

    declared = 10**9 * 256 * 256 * 3
    for said, message in ((0, r"declares uint8 \(1000000000, 256, 256, 3\)"), (declared, r"needs 183105\.5 GiB")):
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("arr_0.npy", "w") as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
                np.lib.format.write_array_header_1_0(member, header)
                member.write(bytes(10**6))
            archive.filelist[0].file_size += said and said - 10**6  # the archive's own list tells the same lie
        for samples, reference in ((tmp_path / "bomb.npz", sets["folder"]), (sets["folder"], tmp_path / "bomb.npz")):
            with pytest.raises(InputError, match=message):
                evaluate(str(samples), str(reference), create_features("pixels"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_found_on_either_side(sets, tmp_path, save):
    path = tmp_path / "changed.npz"
    save(path, arr_0=pictures(40))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for samples, reference in ((str(path), sets["folder"]), (sets["folder"], str(path))):
        with pytest.raises(InputError, match=r"changed\.npz is damaged: cannot read 'arr_0'.*Fetch or write it again"):
            evaluate(samples, reference, create_features("pixels"))


@pytest.mark.parametrize("workers", [0, 1])
def test_mixed_sizes_and_greyscale_files_are_named(tmp_path, sets, workers):
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    options = Options(reading=Reading(workers=workers))
    Image.fromarray(pictures(1, size=9)[0]).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"differ in size: 2\.png is 9x9, others are 8x8") as caught:
        evaluate(str(tmp_path), sets["folder"], create_features("pixels"), options)
    assert "Traceback" not in str(caught.value)
    Image.fromarray(pictures(1)[0, ..., 0]).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"2\.png is not an RGB picture"):
        evaluate(str(tmp_path), sets["folder"], create_features("pixels"), options)


def test_sizes_that_change_between_batches(sets):
    stream = iter([torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 9, 8, dtype=torch.uint8)])
    with pytest.raises(InputError, match="image 4 is 8x9, others are 8x8"):
        evaluate(stream, sets["folder"], create_features("pixels"))
    with pytest.raises(InputError, match="no samples"):
        evaluate(iter([]), sets["folder"], create_features("pixels"))


# --- features


def test_pixels_of_large_images_and_unknown_features(sets):
    with pytest.raises(InputError, match="64x64 images have 12288 dimensions"):
        PixelFeatures()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(InputError, match="Unknown features 'clip'"):
        create_features("clip")
    with pytest.raises(InputError, match="Pixels have no network"):
        create_features("pixels", fast=True)
    with pytest.raises(InputError, match="timm has no model 'nonesuch'"):
        create_features("timm:nonesuch")
    with pytest.raises(InputError, match="no weights file"):
        create_features("timm:vit_tiny_patch16_224", "absent.safetensors")


@pytest.mark.slow
def test_a_published_dinov2_file_is_resampled_to_what_dgm_eval_shows_it(tmp_path):
    timm = pytest.importorskip("timm")
    published = timm.create_model("vit_small_patch14_dinov2", num_classes=0)  # 518 x 518: 37 x 37 positions
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    features = create_features("timm:vit_small_patch14_dinov2", tmp_path / "weights.pth")
    assert features(torch.from_numpy(pictures(1)).permute(0, 3, 1, 2))["pool"].shape == (1, 384)


def test_timm_features_from_a_local_file(sets, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"Cannot load resnet10t.*--weights"):
        create_features("timm:resnet10t", tmp_path / "weights.pth")  # a classifier of 10 is not the published model
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"another model's weights"):
        create_features("timm:resnet10t", tmp_path / "weights.pth")
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "weights.pth")
    features = create_features("timm:resnet10t", tmp_path / "weights.pth")
    images = torch.from_numpy(pictures(9)).permute(0, 3, 1, 2)
    assert features(images)["pool"].shape == (9, 512)
    torch.testing.assert_close(features(images[:2])["pool"], features(images)["pool"][:2], rtol=0, atol=0)
    report = evaluate(iter([images]), sets["reference.npz"], features)
    assert set(report.metrics) == {"fd_resnet10t", "precision_resnet10t", "recall_resnet10t"}
    assert report.features["neighbours"] == 5
