"""The programs in examples/: each runs for two steps, and their measures have known values."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples import detection, mask_rcnn, retinanet, retrieval, segmentation, semantic
from examples.measures import average_precision, mean_iou, retrieval_scores
from examples.shapes import Scenes, Things
from sit_atconv.errors import InputError

PROGRAMS = {"retinanet": retinanet, "mask_rcnn": mask_rcnn, "segmentation": segmentation, "retrieval": retrieval}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (detection, semantic):
        monkeypatch.setattr(module, "HELD_OUT", 3)


def short(name: str) -> list[str]:
    width = [] if name == "retrieval" else ["--width", "16"]
    return ["--steps", "2", "--batch-size", "2", "--size", "64", *width]


def numbers(output: str) -> list[float]:
    """The measures that a program printed, before and after."""
    lines = [line for line in output.splitlines() if "before" in line or "after" in line]
    assert len(lines) == 2
    return [float(line.split()[-1]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_measures_before_and_after(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    PROGRAMS[name].main([*short(name), "--picture", str(tmp_path / "found.png")])
    assert all(0 <= number <= 1 for number in numbers(capsys.readouterr().out))
    assert Image.open(tmp_path / "found.png").size[0] > 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_a_folder_of_coco(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pycocotools")
    (tmp_path / "annotations").mkdir()
    square = {"bbox": [10, 10, 30, 30], "area": 900, "segmentation": [[10, 10, 40, 10, 40, 40, 10, 40]]}
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        objects = [{"id": n, "image_id": n, "category_id": 90, "iscrowd": int(n == 2), **square} for n in range(3)]
        images = [{"id": n, "file_name": f"{n}.jpg", "height": 48, "width": 64} for n in range(4)]
        content = {"images": images, "annotations": objects, "categories": [{"id": 90, "name": "toothbrush"}]}
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        for image in images:
            Image.new("RGB", (64, 48)).save(tmp_path / part / image["file_name"])
    options = retinanet.options_of("", ["--data", str(tmp_path)], "")
    training, _, classes = detection.datasets(options, ("boxes", "labels", "masks"))
    assert (len(training), classes) == (2, 91)  # neither the crowd nor the picture without objects
    picture, target = training[0]
    assert picture.shape == (3, 48, 64) and picture.dtype == torch.float32
    assert target["labels"].tolist() == [90] and target["masks"].sum() == pytest.approx(900, rel=0.1)
    PROGRAMS[name].main([*short(name), "--data", str(tmp_path)])
    assert all(0 <= number <= 1 for number in numbers(capsys.readouterr().out))


@pytest.mark.slow
def test_a_folder_of_ade20k(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (90, 70 + number)).save(tmp_path / "images" / part / f"{number}.jpg")
            classes = Image.new("L", (90, 70 + number), 150)
            classes.paste(0, (0, 0, 90, 35))
            classes.save(tmp_path / "annotations" / part / f"{number}.png")
    picture, classes = semantic.ADE(tmp_path, "validation", 70)[0]
    assert picture.shape == (3, 70, 90) and classes.unique(return_counts=True)[1].tolist() == [90 * 35] * 2
    assert classes.unique().tolist() == [149, semantic.IGNORED]
    segmentation.main([*short("segmentation"), "--data", str(tmp_path), "--picture", str(tmp_path / "found.png")])
    assert all(0 <= number <= 1 for number in numbers(capsys.readouterr().out))
    assert (tmp_path / "found.png").exists()


@pytest.mark.slow
def test_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (20, 30), (80 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    retrieval.main([*short("retrieval"), "--data", str(tmp_path)])
    assert all(0 < number <= 1 for number in numbers(capsys.readouterr().out))
    training, held_out, classes = retrieval.datasets(retrieval.options_of("", ["--data", str(tmp_path)], "", size=32))
    assert classes == 4 and {label for _, label in training} == {0, 2} and {label for _, label in held_out} == {1, 3}


def test_mistakes_are_one_paragraph(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):  # which commands report in one line
        retinanet.main(["--data", "nowhere"])
    with pytest.raises(InputError, match="no network 'attnet_xss': did you mean 'attnet_xs'"):
        retrieval.main(["--model", "attnet_xss"])
    with pytest.raises(InputError, match="a folder of pictures for each class"):
        retrieval.main(["--data", str(tmp_path)])
    with pytest.raises(InputError, match=r"no \*\.jpg in"):
        segmentation.main(["--data", str(tmp_path)])


def test_examples_are_short() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "examples").glob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 80} == {}


def test_ranks_by_hand() -> None:
    """Places of the matches: 1, 3, 6 of the first query, 2 of the second; the third has none and does not count."""
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1.0] * 6])
    gallery = torch.tensor([1, 2, 1, 3, 3, 1])
    none = torch.zeros(3, 6, dtype=torch.bool)
    scores = retrieval_scores(similarity, torch.tensor([1, 2, 4]), gallery, none, ranks=(1, 2, 5))
    assert scores["rank-1"] == 0.5 and scores["rank-2"] == scores["rank-5"] == 1
    assert scores["mAP"] == pytest.approx(((1 + 2 / 3 + 3 / 6) / 3 + 1 / 2) / 2)
    assert scores["mINP"] == pytest.approx((3 / 6 + 1 / 2) / 2)


def test_pairs_that_are_left_out_have_no_place() -> None:
    """Without the first picture, a match, those of the query are at 2 and 5."""
    left_out = torch.tensor([[True] + [False] * 5])
    similarity, gallery = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]]), torch.tensor([1, 2, 1, 3, 3, 1])
    scores = retrieval_scores(similarity, torch.tensor([1]), gallery, left_out, ranks=(1,))
    assert scores == pytest.approx({"rank-1": 0, "mAP": (1 / 2 + 2 / 5) / 2, "mINP": 2 / 5})


def test_a_perfect_ranking() -> None:
    labels = torch.arange(4).repeat_interleave(3)
    vectors = torch.eye(4)[labels]
    scores = retrieval_scores(vectors @ vectors.mT, labels, labels, torch.eye(12, dtype=torch.bool))
    assert scores == pytest.approx({"rank-1": 1, "rank-5": 1, "rank-20": 1, "mAP": 1, "mINP": 1})


def found(overlaps: list[list[float]], scores: list[float], label: int = 1) -> tuple[dict, dict]:
    """Objects that were found, whose overlaps with the true ones are given."""
    ours = {"scores": torch.tensor(scores), "rows": torch.tensor(overlaps), "labels": torch.full((len(scores),), label)}
    return ours, {"labels": torch.full((len(overlaps[0]),), label)}


def overlap(ours: dict, theirs: dict) -> torch.Tensor:
    return ours["rows"][:, : len(theirs["labels"])]


def test_average_precision_by_hand() -> None:
    """Hit, miss (found twice), hit, miss; of three objects: precision 1 and 2/3 at two of three recalls."""
    picture = found([[0.9, 0, 0], [0.8, 0.1, 0], [0, 0.6, 0], [0, 0, 0.4]], [0.9, 0.8, 0.7, 0.6])
    assert average_precision([picture], overlap) == pytest.approx((1 + 2 / 3) / 3)
    # Precision at a recall is the highest beyond it: miss, hit, hit gives 2/3 twice
    picture = found([[0.0, 0], [0.9, 0], [0, 0.9]], [0.9, 0.8, 0.7])
    assert average_precision([picture], overlap) == pytest.approx(2 / 3)


def test_average_precision_is_a_mean_over_classes_and_ranks_over_pictures() -> None:
    first, second = found([[0.9]], [0.6]), found([[0.1]], [0.9])  # a miss elsewhere is ranked before the hit
    other = found([[0.7]], [0.3], label=2)
    assert average_precision([first, second], overlap) == pytest.approx(1 / 2 / 2)
    assert average_precision([first, second, other], overlap) == pytest.approx((1 / 4 + 1) / 2)


def test_mean_iou_by_hand() -> None:
    confusion = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])  # the last class is absent
    assert mean_iou(confusion) == pytest.approx((3 / 6 + 4 / 7) / 2)


def test_drawn_pictures() -> None:
    picture, target = Scenes(4, 48, seed=0)[2]
    again, _ = Scenes(4, 48, seed=0)[2]
    assert torch.equal(picture, again) and picture.shape == (3, 48, 48)
    for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
    assert target["masks"].sum(0).max() == 1
    things = Things(range(5, 7), 3, 32, seed=0)
    assert [label for _, label in (things[number] for number in range(6))] == [5, 5, 5, 6, 6, 6]
    assert not torch.equal(things[0][0], things[1][0])
