"""Reference files, read and written, and features kept on disk between runs."""

import errno
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import StandIn, random_weights  # noqa: F401
from PIL import Image

from sit_atconv.errors import InputError
from sit_atconv.evaluation import (
    InceptionFeatures,
    Options,
    Reading,
    create_features,
    evaluate,
    read_reference,
    write_reference,
)
from sit_atconv.evaluation.features.cache import FeatureCache
from sit_atconv.evaluation.reading.collect import Wanted
from sit_atconv.evaluation.reading.loading import image_digests
from sit_atconv.evaluation.scoring.choice import choose_metrics, wanted_for


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def save_folder(path: Path, images: np.ndarray) -> str:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return str(path)


@pytest.fixture
def folder(tmp_path) -> str:
    return save_folder(tmp_path / "folder", pictures(30))


# --- reading and writing


def test_a_written_reference_gives_the_numbers_of_its_images(tmp_path, folder):
    out = tmp_path / "reference.npz"
    facts = write_reference(folder, out, StandIn(), images=30)
    assert (facts["count"], facts["images_in_arr_0"]) == (30, 30)
    samples = save_folder(tmp_path / "samples", pictures(20, seed=1))
    stored, direct = evaluate(samples, str(out), StandIn()), evaluate(samples, folder, StandIn())
    assert stored.metrics == pytest.approx(direct.metrics, rel=1e-12)
    assert stored.reference["file_sha256"] and stored.reference["images_in_arr_0"]["count"] == 30


def test_what_is_written_is_adms_file(tmp_path, folder):
    out = tmp_path / "reference.npz"
    write_reference(folder, out, StandIn(), images=12)
    with np.load(out, allow_pickle=False) as file:  # what the ADM script reads
        assert {"arr_0", "mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        assert file["arr_0"].shape == (12, 8, 8, 3) and file["arr_0"].dtype == np.uint8
        pool = StandIn()(torch.from_numpy(pictures(30)).permute(0, 3, 1, 2))["pool"].double().numpy()
        np.testing.assert_allclose(file["mu"], pool.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(pool, rowvar=False), rtol=1e-9, atol=1e-12)
        assert file["mu_s"].shape == (5,) and file["sigma_s"].shape == (5, 5)
        drawn = {image.tobytes() for image in file["arr_0"]}
    assert len(drawn) == 12 and drawn <= {image.tobytes() for image in pictures(30)}
    with zipfile.ZipFile(out) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)  # ADM streams version 1.0 only
    assert not list(tmp_path.glob(".*"))


def test_stored_statistics_win_over_the_images_beside_them(tmp_path, folder):
    samples = save_folder(tmp_path / "samples", pictures(20, seed=1))
    mu, sigma = np.full(6, 3.0, np.float32), np.eye(6)
    np.savez(tmp_path / "adm.npz", arr_0=pictures(9), mu=mu, sigma=sigma, mu_s=np.zeros(5), sigma_s=np.eye(5))
    far = evaluate(samples, str(tmp_path / "adm.npz"), StandIn())
    near = evaluate(samples, folder, StandIn())
    assert far.metrics["fid"] > 2 * near.metrics["fid"]
    assert set(far.metrics) == {"fid", "sfid", "is", "precision", "recall"}


def test_statistics_of_other_projects_give_fid_and_is_alone_and_say_why(tmp_path):
    samples = save_folder(tmp_path / "samples", pictures(20, seed=1))
    np.savez(tmp_path / "fid_stats.npz", mu=np.zeros(6), sigma=np.eye(6))
    report = evaluate(samples, str(tmp_path / "fid_stats.npz"), StandIn())
    assert set(report.metrics) == {"fid", "is"}
    assert "has no mu_s and sigma_s" in report.unsupported["sfid"]
    assert "holds no images" in report.unsupported["precision"] == report.unsupported["recall"]
    assert "has no mu_s" in report.table()
    assert any("does not name the network" in warning for warning in report.warnings)


def test_a_reference_made_with_other_weights_is_pointed_out(tmp_path, folder):
    other = StandIn()
    other.weights_sha256 = "f" * 64
    write_reference(folder, tmp_path / "reference.npz", other)
    report = evaluate(folder, str(tmp_path / "reference.npz"), StandIn(), Options(metrics=("fid",)))
    assert any("made with other weights (ffffffff)" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(6)}, "mu but no sigma"),
        ({"mu": np.zeros(7), "sigma": np.eye(7)}, r"shape \(7,\).*expected \(6,\)"),
        ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.nan)}, "not finite"),
        ({"mu": np.zeros(6, int), "sigma": np.eye(6)}, "expected floats"),
        ({"mu": np.array([{}] * 6), "sigma": np.eye(6)}, "pickled"),
        ({"other": np.zeros(6)}, "no array 'arr_0'"),
    ],
)
def test_statistics_that_cannot_be_used(tmp_path, folder, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=message):
        evaluate(folder, str(tmp_path / "bad.npz"), StandIn())


def test_a_changed_byte_in_statistics_is_found(tmp_path, folder):
    path = tmp_path / "fid_stats.npz"
    np.savez(path, mu=np.full(6, 3.0), sigma=np.eye(6))
    path.write_bytes(path.read_bytes().replace(np.full(6, 3.0).tobytes(), np.full(6, 3.5).tobytes()))
    with pytest.raises(InputError, match=r"fid_stats\.npz is damaged: cannot read 'mu'"):
        evaluate(folder, str(path), StandIn())


def test_statistics_of_one_image_are_refused(tmp_path, folder):
    np.savez(tmp_path / "one.npz", mu=np.zeros(6), sigma=np.eye(6), count=1)
    with pytest.raises(InputError, match="number of references is 1"):
        evaluate(folder, str(tmp_path / "one.npz"), StandIn())


def test_other_features_need_the_images(tmp_path, folder):
    np.savez(tmp_path / "fid_stats.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(InputError, match="Inception features only; raw pixels need its images"):
        evaluate(folder, str(tmp_path / "fid_stats.npz"), create_features("pixels"))
    with pytest.raises(InputError, match="cannot be compared class by class"):
        evaluate("digits@8", str(tmp_path / "fid_stats.npz"), StandIn(), Options(classes=None))
    np.savez(tmp_path / "adm.npz", arr_0=pictures(9), mu=np.zeros(6), sigma=np.eye(6))
    report = evaluate(folder, str(tmp_path / "adm.npz"), create_features("pixels"))
    assert "arr_0" in report.reference["note"] and report.reference["count"] == 9


def test_writing_never_overwrites_and_refuses_what_is_not_for_publication(tmp_path, folder):
    out = tmp_path / "reference.npz"
    out.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists already"):
        write_reference(folder, out, StandIn())
    assert out.read_bytes() == b"precious"
    fast = StandIn()
    fast.fast = True
    with pytest.raises(InputError, match="without --fast"):
        write_reference(folder, tmp_path / "new.npz", fast)
    with pytest.raises(InputError, match="--images must be at least 1"):
        write_reference(folder, tmp_path / "new.npz", StandIn(), images=0)
    one = save_folder(tmp_path / "one", pictures(1))
    with pytest.raises(InputError, match="at least two"):
        write_reference(one, tmp_path / "new.npz", StandIn())
    assert not (tmp_path / "new.npz").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path, folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*new\.npz"):
        write_reference(folder, tmp_path / "out" / "new.npz", StandIn())
    with pytest.raises(OSError, match="No space left"):
        evaluate(folder, folder, StandIn(), Options(reading=Reading(cache=tmp_path / "cache")))
    assert not [path for name in ("out", "cache") for path in (tmp_path / name).rglob("*") if path.is_file()]


def test_large_references_keep_a_drawn_share_of_features(folder):
    features = StandIn()
    features.neighbour_limit = 10
    reference = read_reference(folder, features, wanted_for(choose_metrics(features, ["fid", "precision"])))
    assert reference.points["pool"].shape == (10, 6) and reference.facts["count"] == 30
    every = StandIn()(torch.from_numpy(pictures(30)).permute(0, 3, 1, 2))["pool"]
    rows = [(every == point).all(1).nonzero().item() for point in reference.points["pool"]]
    assert sorted(set(rows)) == rows and rows != list(range(10))


# --- cache


def test_the_second_run_computes_nothing_and_gives_the_same(tmp_path, folder):
    options = Options(kid=True, reading=Reading(batch_size=7, cache=tmp_path / "cache"))
    samples = save_folder(tmp_path / "samples", pictures(20, seed=1))
    first, second, plain = StandIn(), StandIn(), StandIn()
    reports = [evaluate(samples, folder, features, options) for features in (first, second)]
    reports.append(evaluate(samples, folder, plain, Options(kid=True)))
    assert (first.seen, second.seen, plain.seen) == (50, 0, 50)
    assert reports[0].metrics == reports[1].metrics == reports[2].metrics


def test_the_cache_knows_images_whatever_they_are_kept_in(tmp_path, folder):
    options = Options(reading=Reading(cache=tmp_path / "cache"))
    evaluate(folder, folder, StandIn(), options)
    shuffled = pictures(30)[np.random.default_rng(0).permutation(30)]
    np.savez(tmp_path / "same.npz", arr_0=np.concatenate([shuffled, pictures(3, seed=9)]))
    features = StandIn()
    evaluate(str(tmp_path / "same.npz"), folder, features, options)
    assert features.seen == 3


def test_the_cache_is_keyed_by_what_looked_and_survives_damage(tmp_path):
    images = torch.from_numpy(pictures(10)).permute(0, 3, 1, 2)
    digests, kinds = image_digests(images), frozenset({"pool", "spatial"})
    first = StandIn()
    with FeatureCache(tmp_path, first, kinds) as cache:
        expected = cache.features(images, digests)
    torch.testing.assert_close(expected["pool"], StandIn()(images)["pool"])
    assert set(expected) == kinds

    other = StandIn()
    other.identity = "stand-in 2"
    with FeatureCache(tmp_path, other, kinds) as cache:
        cache.features(images, digests)
    assert other.seen == 10

    again = StandIn()
    with FeatureCache(tmp_path, again, kinds) as cache:
        mixed = cache.features(
            torch.cat([images[3:5], images[:1] // 2, images[9:]]),
            np.concatenate([digests[3:5], image_digests(images[:1] // 2), digests[9:]]),
        )
    assert again.seen == 1
    torch.testing.assert_close(mixed["spatial"][[0, 1, 3]], expected["spatial"][[3, 4, 9]], rtol=0, atol=0)

    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    damaged = StandIn()
    with FeatureCache(tmp_path, damaged, kinds) as cache:
        cache.features(images, digests)
    assert damaged.seen == 10


def test_a_file_in_place_of_the_cache(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        evaluate(folder, folder, StandIn(), Options(reading=Reading(cache=tmp_path / "file")))


_KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from evaluation_fixtures import StandIn
from sit_atconv.evaluation import Options, Reading, evaluate
class Slow(StandIn):
    def __call__(self, images):
        time.sleep(0.05)
        return super().__call__(images)
evaluate({samples!r}, {samples!r}, Slow(), Options(reading=Reading(batch_size=64, cache={cache!r})))
"""


def test_a_killed_evaluation_goes_on(tmp_path):
    np.savez(tmp_path / "many.npz", arr_0=pictures(3000))
    cache = tmp_path / "cache"
    code = _KILLED.format(tests=str(Path(__file__).parents[1]), samples=str(tmp_path / "many.npz"), cache=str(cache))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(cache.rglob("*.safetensors"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    files = list(cache.rglob("*.safetensors"))
    features = StandIn()
    options = Options(metrics=("fid",), reading=Reading(cache=cache))
    resumed = evaluate(str(tmp_path / "many.npz"), str(tmp_path / "many.npz"), features, options)
    assert len(files) >= 2 and features.seen <= 3000 - 256 * len(files)
    whole = evaluate(str(tmp_path / "many.npz"), str(tmp_path / "many.npz"), StandIn(), Options(metrics=("fid",)))
    assert resumed.metrics == whole.metrics


def test_cached_inception_features_are_the_same_bits(tmp_path, random_weights):  # noqa: F811
    features = InceptionFeatures(random_weights)
    images = torch.from_numpy(pictures(3)).permute(0, 3, 1, 2)
    kinds = Wanted(frozenset({"pool"}), frozenset(), frozenset({"probabilities"})).kinds
    for _ in range(2):
        with FeatureCache(tmp_path, features, kinds) as cache:
            found = cache.features(images, image_digests(images))
    assert (cache.hits, cache.misses) == (3, 0)
    expected = features(images)
    assert set(found) == {"pool", "probabilities"}
    for kind, values in found.items():
        torch.testing.assert_close(values, expected[kind], rtol=0, atol=0)
