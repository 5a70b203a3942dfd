"""Class by class, samples and references are compared by name where both have names, and else by number."""

from pathlib import Path

import numpy as np
import pytest

from sit_atconv.classes import Classes
from sit_atconv.errors import InputError
from sit_atconv.evaluation import create_features, evaluate
from sit_atconv.evaluation.command import parse, run
from sit_atconv.evaluation.evaluate import Options, SampleStream
from sit_atconv.evaluation.reading.loading import load_batches, open_images

COLOURS = {"red": 200, "grey": 100, "blue": 50}


def write(path: Path, names: list[str], named: bool = True, seed: int = 0) -> str:
    """Four noisy pictures of each colour; class number i is names[i]."""
    rng, labels = np.random.default_rng(seed), np.repeat(np.arange(len(names)), 4)
    levels = np.array([COLOURS[name] for name in names])[labels]
    images = rng.normal(levels[:, None, None, None], 5, (len(labels), 4, 4, 3)).clip(0, 255).astype(np.uint8)
    np.savez(path, arr_0=images, arr_1=labels, **({"class_names": names} if named else {}))
    return str(path)


def distances(samples: str | SampleStream, reference: str, *classes: str) -> dict[str, float]:
    options = Options(metrics=("fd_pixels",), classes=classes or None)
    report = evaluate(samples, reference, create_features("pixels"), options)
    return {title: entry["distance"] for title, entry in report.per_class.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {
        "drawn": write(tmp_path / "drawn.npz", ["red", "grey", "blue"]),
        "real": write(tmp_path / "real.npz", ["blue", "grey", "red"], seed=1),
        "bare": write(tmp_path / "bare.npz", ["red", "grey", "blue"], named=False, seed=1),
        "few": write(tmp_path / "few.npz", ["blue", "red"], seed=1),
    }


def test_classes_are_matched_by_name(files) -> None:
    found = distances(files["drawn"], files["real"])
    assert set(found) == {"red", "grey", "blue"}
    crossed = distances(files["bare"], files["real"])  # by number, so that red meets blue
    assert 100 * max(found.values()) < crossed["red"]
    assert distances(files["drawn"], files["real"], "blue", "name:red") == {"blue": found["blue"], "red": found["red"]}


def test_without_names_on_one_side_numbers_decide(files) -> None:
    found = distances(files["drawn"], files["bare"])
    assert set(found) == {"red", "grey", "blue"} and max(found.values()) < 0.5
    assert distances(files["bare"], files["drawn"], "2", "grey").keys() == {"blue", "grey"}


@pytest.mark.parametrize(
    ("samples", "reference", "label", "message"),
    [
        ("drawn", "real", "0", "class 0 is 'red' in the samples and 'blue' in the references. Which is meant"),
        ("drawn", "real", "green", "Unknown label 'green'"),
        ("drawn", "few", "grey", "references have no class 'grey': they have blue, red"),
        ("few", "drawn", None, "samples have no class 'grey' of the references"),
        ("bare", "few", "2", "Unknown label '2'"),
    ],
)
def test_classes_that_one_side_lacks_or_that_are_unclear(files, samples, reference, label, message) -> None:
    with pytest.raises(InputError, match=message):
        distances(files[samples], files[reference], *([label] if label else []))


def test_a_stream_has_the_classes_of_its_model(files) -> None:
    source = open_images(files["drawn"])
    stream = SampleStream(load_batches(source, range(len(source)), 5), classes=Classes(3, source.class_names))
    assert distances(stream, files["real"]) == pytest.approx(distances(files["drawn"], files["real"]))


def test_labels_that_cannot_be_used_can_be_left_out(tmp_path: Path, capsys) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=[0, 1, -1, 0, 1, 1])
    words = ["--samples", str(tmp_path / "x.npz"), "--reference", str(tmp_path / "x.npz"), "--features", "pixels"]

    def evaluate_fid(*more: str) -> None:
        run(parse([*words, "--device", "cpu", "--workers", "0", *more], lambda _: []), lambda *_: None)

    with pytest.raises(InputError, match=r"the label in row 2 is -1.*--unconditional"):
        evaluate_fid()
    evaluate_fid("--unconditional")
    assert "FD-pixels" in capsys.readouterr().out
    with pytest.raises(InputError, match="samples have no labels"):
        evaluate_fid("--unconditional", "--classes", "0")
