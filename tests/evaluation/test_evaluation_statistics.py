"""Statistics as other projects store them: the same numbers, nothing run, and what deserves a warning."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import StandIn

import evaluate_fid
from sit_atconv.errors import InputError
from sit_atconv.evaluation import Options, create_features, evaluate

FEATURES = torch.from_numpy(np.random.default_rng(0).normal(1, 2, (40, 6)).astype(np.float32))
MU, SIGMA = FEATURES.double().numpy().mean(0), np.cov(FEATURES.double().numpy(), rowvar=False)


def pickled(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


def torch_fidelity(path: Path) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid")
    torch.save(metric.fid_features_to_statistics(FEATURES), path)


# Each writes a file as its project does.
WRITERS = {
    "cifar10-train-inception-v3-compat-stat-fid-2048.pt": torch_fidelity,
    "tensors.pth": lambda path: torch.save({"mu": torch.from_numpy(MU), "sigma": torch.from_numpy(SIGMA)}, path),
    "pytorch_fid.npz": lambda path: np.savez_compressed(path, mu=MU, sigma=SIGMA),
    "ffhq_clean_trainval70k_1024.npz": lambda path: np.savez_compressed(path, mu=MU, sigma=SIGMA),
    "cifar10_legacy_tensorflow_train_32.npz": lambda path: np.savez_compressed(path, mu=MU, sigma=SIGMA),
    "dictionary.npy": lambda path: np.save(path, {"mu": MU, "sigma": SIGMA}),
    "img512.pkl": lambda path: pickled(
        path, {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU[:3], "sigma": SIGMA[:3, :3]}, "num_images": 40}
    ),
}


@pytest.fixture
def samples(tmp_path) -> str:
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    return str(tmp_path / "samples.npz")


@pytest.fixture
def fid(tmp_path, samples) -> float:
    """The distance to the statistics as ADM's file holds them."""
    np.savez(tmp_path / "adm.npz", mu=MU, sigma=SIGMA, mu_s=np.zeros(5), sigma_s=np.eye(5))
    report = evaluate(samples, str(tmp_path / "adm.npz"), StandIn())
    assert not any("299 pixels" in warning for warning in report.warnings)
    return report.metrics["fid"]


@pytest.mark.parametrize("name", WRITERS)
def test_statistics_of_others_give_the_same_distance(tmp_path, samples, fid, name):
    WRITERS[name](tmp_path / name)
    report = evaluate(samples, str(tmp_path / name), StandIn())
    assert report.metrics["fid"] == pytest.approx(fid, rel=1e-5)
    assert set(report.metrics) == {"fid", "is"} and "holds no images" in report.unsupported["precision"]
    about_resizing = [warning for warning in report.warnings if "299 pixels" in warning]
    expected = {"ffhq_clean_trainval70k_1024.npz": "mode clean", "pytorch_fid.npz": "does not say who made it"}
    expected |= dict.fromkeys(("tensors.pth", "dictionary.npy"), "does not say who made it")
    assert len(about_resizing) == (name in expected) and expected.get(name, "") in "".join(about_resizing)
    assert report.reference.get("count") == (40 if name == "img512.pkl" else None)


@pytest.mark.parametrize("name", ["img512.pkl", "a.pt", "dictionary.npy"])
def test_other_features_are_not_taken_for_inceptions(tmp_path, samples, name):
    write = {".pkl": pickled, ".pt": lambda path, content: torch.save(content, path), ".npy": np.save}
    write[Path(name).suffix](tmp_path / name, {"mu": MU, "sigma": SIGMA})
    with pytest.raises(InputError, match="Inception features only"):
        evaluate(samples, str(tmp_path / name), create_features("pixels"))
    write[Path(name).suffix](tmp_path / name, {"mu": MU[:5], "sigma": SIGMA[:5, :5]})
    with pytest.raises(InputError, match=r"mu has shape \(5,\).*expected \(6,\)"):
        evaluate(samples, str(tmp_path / name), StandIn(), Options(metrics=("fid",)))


class Commands:
    """Makes a directory when it is unpickled by anything that runs what it reads."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pkl", {"mu": MU, "sigma": Commands()}, r"a\.pkl was pickled with \w+\.mkdir, .*could run code"),
        ("a.npy", {"mu": MU, "sigma": Commands()}, r"a\.npy was pickled with \w+\.mkdir, .*could run code"),
        ("a.pt", {"mu": MU, "sigma": Commands()}, r"a\.pt was pickled with \w+\.mkdir, .*could run code"),
        ("a.pt", FEATURES, "holds a Tensor: expected statistics"),
        ("a.pkl", {"mu": MU, "cov": SIGMA}, "holds mu, cov: expected statistics"),
        ("a.pkl", {"mu": MU, "sigma": [[1], [1, 2]]}, "expected statistics"),
        ("a.pkl", {"fd_dinov2": {"mu": MU, "sigma": SIGMA}}, "holds fd_dinov2: expected statistics"),
        ("a.pkl", {"mu": MU, "sigma": SIGMA, "num_images": 1}, "number of references is 1"),
        ("a.pkl", {"mu": MU, "sigma": SIGMA, "num_images": 1.5}, "count: Expected `int`, got `float`"),
        ("a.npy", {"mu": np.arange(6), "sigma": SIGMA}, "mu is int64"),
        ("a.npy", 5, "holds a int: expected statistics"),
    ],
)
def test_what_is_no_statistics_is_named_and_nothing_is_run(tmp_path, samples, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".npy"):
        np.save(name, np.array(content, dtype=object), allow_pickle=True)
    else:
        torch.save(content, name) if name.endswith(".pt") else pickled(Path(name), content)
    with pytest.raises(InputError, match=message):
        evaluate(samples, name, StandIn())
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["img512.pkl", "tensors.pth", "dictionary.npy"])
def test_damaged_statistics_end_with_code_2_or_a_number(tmp_path, samples, capsys, monkeypatch, name):
    random, path = np.random.default_rng(0), tmp_path / name
    WRITERS[name](path)
    whole = path.read_bytes()
    for number in range(40):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(min(len(whole), 400))] = random.integers(256)
        path.write_bytes(damaged.tobytes() if number else whole[: len(whole) // 2])
        try:
            evaluate(samples, str(path), StandIn(), Options(metrics=("fid",)))
        except InputError as error:
            assert name in str(error) or "covariance" in str(error)
    path.write_bytes(whole[: len(whole) // 2])
    words = ["--features", "pixels", "--device", "cpu", "--samples", samples, "--reference", str(path)]
    monkeypatch.setattr("sys.argv", ["evaluate_fid.py", *words])
    with pytest.raises(SystemExit) as caught:
        evaluate_fid.main()
    assert caught.value.code == 2 and name in capsys.readouterr().err
