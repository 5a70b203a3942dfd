"""Label agreement: exact on classes that cannot be mistaken, matched by name, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sit_atconv.errors import InputError
from sit_atconv.evaluation import Reading, create_features
from sit_atconv.evaluation.agreement import main, score_agreement

COLOURS = {"red": 200, "grey": 120, "blue": 40}


def write(path: Path, colours: list[str], labels: list[int] | None, named: bool = True, size: int = 4) -> str:
    """A noisy picture of each of the `colours`, in this order; class i is named as the i-th of COLOURS by sorting."""
    levels = np.array([COLOURS[colour] for colour in colours])[:, None, None, None]
    noise = np.random.default_rng(len(colours)).normal(0, 4, (len(colours), size, size, 3))
    arrays = {"arr_0": (levels + noise).astype(np.uint8)}
    if labels is not None:
        arrays["arr_1"] = np.array(labels)
        arrays |= {"class_names": np.array(sorted(COLOURS))} if named else {}  # blue, grey, red
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def real(tmp_path: Path) -> str:
    return write(tmp_path / "real.npz", ["blue", "grey", "red"] * 6, [0, 1, 2] * 6)


def agreement(samples: str, reference: str) -> float:
    return score_agreement(samples, reference, create_features("pixels"), Reading()).label_agreement


def test_agreement_is_the_share_that_shows_what_was_asked_for(tmp_path: Path, real: str) -> None:
    """Eight of ten blue and red pictures are of the class that was requested; no grey one needs to be there."""
    samples = write(tmp_path / "drawn.npz", ["blue"] * 5 + ["red"] * 5, [0, 0, 0, 0, 2, 2, 2, 2, 2, 1])
    report = score_agreement(samples, real, create_features("pixels"), Reading(batch_size=3))
    assert (report.label_agreement, report.classifier_accuracy) == (0.8, 1.0)
    assert (report.count, report.classes, report.reference["count"]) == (10, 3, 18)


def test_classes_are_matched_by_name_and_else_by_number(tmp_path: Path, real: str) -> None:
    images = write(tmp_path / "bare.npz", ["red", "grey", "blue"], [0, 1, 2], named=False)
    assert agreement(images, real) == pytest.approx(1 / 3)  # by number, red is asked to be blue
    with np.load(images) as file:
        np.savez(tmp_path / "named.npz", arr_0=file["arr_0"], arr_1=file["arr_1"], class_names=["red", "grey", "blue"])
    assert agreement(str(tmp_path / "named.npz"), real) == 1


def test_two_pictures_of_each_class_are_enough(tmp_path: Path) -> None:
    real = write(tmp_path / "two.npz", ["blue", "red"] * 2, [0, 2] * 2)
    assert agreement(real, real) == 1


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        ((["red"] * 2, None), (["red", "blue"] * 2, [2, 0] * 2), r"drawn.npz has no labels. .*arr_1"),
        ((["red"] * 2, [2, 2]), (["red", "blue"], None), r"real.npz has no labels"),
        ((["red"] * 2, [2, 2]), (["red", "red"], [2, 2]), r"pictures of 1 class: a classifier needs at least two"),
        ((["red"], [2]), (["red", "red", "blue"], [2, 2, 0]), r"one picture of class blue: .* needs two of each class"),
        ((["grey"], [1]), (["red", "blue"] * 2, [2, 0] * 2), r"has no pictures of class grey, .*: it has 2 classes"),
        ((["grey"], [3], False), (["red", "blue"] * 2, [1, 0] * 2), r"has no pictures of class 3"),
    ],
)
def test_what_cannot_be_compared(tmp_path: Path, samples: tuple, reference: tuple, message: str) -> None:
    files = write(tmp_path / "drawn.npz", *samples), write(tmp_path / "real.npz", *reference)
    with pytest.raises(InputError, match=message):
        agreement(*files)


def test_pixels_of_other_sizes_and_statistics_are_refused(tmp_path: Path, real: str) -> None:
    with pytest.raises(InputError, match="samples are 6x6 and the reference is 4x4"):
        agreement(write(tmp_path / "large.npz", ["red"], [2], size=6), real)
    np.savez(tmp_path / "stored.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(InputError, match="holds statistics"):
        agreement(real, str(tmp_path / "stored.npz"))


def test_the_command_prints_and_writes(tmp_path: Path, real: str, monkeypatch, capsys) -> None:
    out, cache = tmp_path / "new" / "agreement.json", tmp_path / "cache"
    words = [real, "--reference", real, "--features", "pixels", "--device", "cpu", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["agreement", *words, "--json", str(out), "--cache", str(cache)])
    main()
    found = json.loads(out.read_text())
    assert (found["label_agreement"], found["classifier_accuracy"], found["count"]) == (1, 1, 18)
    assert found["samples"]["images_sha256"] == found["reference"]["images_sha256"]
    assert "label agreement      100.00%   of 18 samples" in capsys.readouterr().out
    assert list(cache.rglob("*.safetensors"))


def test_a_mistake_is_one_paragraph(tmp_path: Path, real: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["agreement", real, "--reference", str(tmp_path / "none"), "--features", "pixels"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "none' does not exist" in error and "Traceback" not in error
