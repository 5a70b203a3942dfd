"""Scores during training: those of sample.py and evaluate_fid.py bit for bit, chosen metrics, and epochs to a goal."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_fixtures import StandIn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import NO_PREVIEW, log_lines, number_lines, run_tiny

import evaluate_fid
import sample
from sit_atconv.data.digits import load_digits
from sit_atconv.errors import InputError
from sit_atconv.models.checkpoint import load_model
from sit_atconv.training import trainer
from sit_atconv.training.run.measures import HELDOUT, deciding_score, find_score
from sit_atconv.training.watch import evaluation as watched

DRAWN = "--evaluation.reference digits:heldout@8 --evaluation.features pixels --evaluation.steps 1"
LOSS = "--data.heldout digits:heldout@8 --evaluation.loss true"
IMAGES = 901  # of digits:train


def words(**options: object) -> str:
    """Keys of the evaluation for a command line: a value is JSON without spaces."""
    return " ".join(
        f"--evaluation.{key} {value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for key, value in options.items()
    )


def scored(run: Path) -> list[dict]:
    """The lines of evaluations."""
    return [line for line in number_lines(run) if "loss" not in line]


def notes(run: Path) -> str:
    return "\n".join(line["note"] for line in log_lines(run) if "note" in line)


def given_scores(monkeypatch: pytest.MonkeyPatch, *values: dict) -> None:
    """Let evaluations find these scores, one after the other, and draw nothing."""
    left = iter(values)
    monkeypatch.setattr(trainer.Evaluation, "scores", lambda self, model: dict(next(left)))


@pytest.mark.parametrize(
    ("metrics", "settings"),
    [
        (["fd_pixels"], {"batch_size": 64, "samples": 40, "guidance": 2.0, "interval": [0.2, 0.9]}),
        (["precision_pixels", "recall_pixels", "fd_pixels"], {"batch_size": 7, "samples": 40, "solver": "sde"}),
        (["mind", "fd_pixels", "kid"], {"batch_size": 32, "samples": 40}),
        pytest.param(["mind"], {"batch_size": 16, "samples": 12}, marks=pytest.mark.slow),
        pytest.param(["is", "precision"], {"batch_size": 16, "samples": 12, "loss": True}, marks=pytest.mark.slow),
        pytest.param(["sfid", "fid"], {"batch_size": 16, "samples": 12}, marks=pytest.mark.long),  # 2048 dimensions
    ],
    ids=["pixels", "other batches", "mind of pixels", "mind", "inception", "distances of inception"],
)
def test_a_score_is_that_of_the_commands_to_the_last_bit(
    metrics: list[str], settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Training evaluates averages in memory, beside autocast; the commands read weights and pictures from files."""
    features, weights = ("pixels", []) if "fd_pixels" in metrics else ("inception", _completed_weights(request))
    images, _ = load_digits("heldout", 8)
    np.savez(tmp_path / "reference.npz", np.repeat(images[:16, ..., None], 3, axis=3))
    given = {"reference": str(tmp_path / "reference.npz"), "features": features, "steps": 3, **settings}
    given |= {"weights": weights[1]} if weights else {}
    run_tiny(
        tmp_path / "run",
        f"{NO_PREVIEW} --training.steps 3 --training.precision bf16 --training.seed 5 --training.ema_decay 0.4 "
        "--data.heldout 0.01 " + words(metrics=metrics, **given),
    )
    (logged,) = scored(tmp_path / "run")
    logged = {name: value for name, value in logged.items() if not name.startswith(HELDOUT)}

    batches = ["--batch-size", str(given["batch_size"])]
    checkpoint, drawn = tmp_path / "run" / "checkpoints" / "step-0000003" / "model", tmp_path / "drawn"
    drawing = ["--num-samples", str(given["samples"]), "--steps", "3", "--solver", given.get("solver", "heun")]
    if "guidance" in given:
        drawing += ["--guidance", str(given["guidance"]), "--interval", *map(str, given["interval"])]
    sample.main(["--checkpoint", str(checkpoint), "--out", str(drawn), "--seed", "5", *drawing, *batches])
    command = ["evaluate_fid.py", "--samples", str(drawn / "samples.npz"), "--reference", given["reference"]]
    command += ["--json", str(tmp_path / "scores.json"), "--features", features, *weights, *batches]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu", "--workers", "0", "--metrics", *metrics])
    evaluate_fid.main()
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert logged == {"step": 3, **scores}  # floats are written with all digits
    assert {re.split("[_@]", name)[0] for name in scores} == {name.split("_")[0] for name in metrics}
    assert all(value > 0 for name, value in scores.items() if "d" in name)


def _completed_weights(request: pytest.FixtureRequest) -> list[str]:
    return ["--weights", str(request.getfixturevalue("shared") / "data" / "inception-2015-12-05_completed_fp16.pth")]


def test_weights_from_a_file_are_aligned_as_those_in_training(tmp_path: Path) -> None:
    """Where they are not, as in a mapped file, kernels may sum in another order."""
    run_tiny(tmp_path / "run", f"{NO_PREVIEW} --training.steps 1")
    model = load_model(tmp_path / "run" / "checkpoints" / "latest")
    assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}


def test_a_score_is_found_by_its_metric() -> None:
    scores = ["fd_pixels", "precision_pixels", "mind@40", "mind_floor@20", "kid_pixels", "kid_pixels_std"]
    names = ["fd", "fd_pixels", "mind", "mind@40", "kid", "precision", "fd_pixel", "fid", "heldout_loss"]
    found = [find_score(name, scores) for name in names]
    assert found == ["fd_pixels", "fd_pixels", "mind@40", "mind@40", "kid_pixels", "precision_pixels", None, None, None]


@pytest.mark.parametrize(
    ("metrics", "scores", "decides"),
    [
        (None, ["fid", "sfid", "is", "heldout_loss"], "fid"),
        (["precision", "mind", "fid"], ["fid", "precision", "mind@9", "mind_floor@9"], "mind@9"),
        (["precision"], ["precision", "heldout_loss"], "heldout_loss"),
        (["kid"], ["precision"], None),
    ],
)
def test_the_first_metric_for_which_lower_is_better_decides(metrics, scores, decides) -> None:
    assert deciding_score(metrics, scores) == decides


def test_only_the_chosen_metrics_are_measured_and_the_first_distance_decides(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    run_tiny(run, f"{NO_PREVIEW} {DRAWN} {words(samples=6, every=3, metrics=['precision_pixels', 'fd_pixels'])}")
    assert [set(line) for line in scored(run)] == [{"step", "fd_pixels", "precision_pixels"}] * 2
    # Another metric than before is not compared with it, although its number is larger
    given_scores(monkeypatch, {"precision_pixels": 0.9})
    only = f"{DRAWN} {LOSS} {words(samples=6, every=1, metrics=['precision_pixels'])}"
    monkeypatch.setattr(trainer.HeldOutLoss, "scores", lambda self, model: {"heldout_loss": 1e5})
    run_tiny(run, f"{NO_PREVIEW} {only} --training.steps 7")
    assert (run / "checkpoints" / "best").resolve().name == "step-0000007"


GOALS = words(samples=4, every=2, goals={"fd": 20.5, "heldout_loss": 0.25, "precision": 0.5})
HIGH, LOW = {"fd_pixels": 30.0, "precision_pixels": 0.5}, {"fd_pixels": 20.5, "precision_pixels": 0.1}


def lose(monkeypatch: pytest.MonkeyPatch, *values: float | None) -> None:
    """Let the held-out loss have these values, one after the other."""
    left = iter(values)
    monkeypatch.setattr(trainer.HeldOutLoss, "scores", lambda self, model: {"heldout_loss": next(left)})


def epochs(run: Path) -> dict[str, tuple[int, float]]:
    """Step and epochs of every goal in the log, which names each once."""
    found = [(name, line["step"], line[name]) for line in log_lines(run) for name in line if "epochs_to" in name]
    assert len({name for name, _, _ in found}) == len(found)
    return {name: (step, value) for name, step, value in found}


def test_the_first_evaluation_that_reaches_a_goal_says_after_how_many_epochs(tmp_path: Path, monkeypatch) -> None:
    run, extra = tmp_path / "run", f"{NO_PREVIEW} {DRAWN} {LOSS} {GOALS} --log.checkpoint_every 2"
    given_scores(monkeypatch, HIGH, LOW, LOW)
    lose(monkeypatch, None, 0.3, 0.3)
    run_tiny(run, f'{extra} --log.trackers ["tensorboard"]')
    reached = {"epochs_to_precision_0.5": (2, 16 / IMAGES), "epochs_to_fd_20.5": (4, 32 / IMAGES)}
    assert epochs(run) == reached
    assert "fd ≤ 20.5 is reached after 0.03552 epochs, at step 4, by the first evaluation of those" in notes(run)
    assert notes(run).count("is reached") == 2 and "of unguided samples" in notes(run)
    tracked = EventAccumulator(str(run / "sit-atconv")).Reload().Scalars("epochs_to_fd_20.5")
    assert [(event.step, event.value) for event in tracked] == [(4, pytest.approx(32 / IMAGES))]
    # The same command, lengthened: what was reached stays, and the loss comes down at last
    given_scores(monkeypatch, LOW)
    lose(monkeypatch, 0.25)
    run_tiny(run, f"{extra} --training.steps 8")
    assert epochs(run) == {**reached, "epochs_to_heldout_loss_0.25": (8, 64 / IMAGES)}


def test_a_run_that_goes_back_reaches_its_goals_anew(tmp_path: Path, monkeypatch) -> None:
    run, extra = (
        tmp_path / "run",
        f"{NO_PREVIEW} {DRAWN} {words(samples=4, every=2, goals={'fd': 20.5})} --log.keep null",
    )
    given_scores(monkeypatch, HIGH, LOW, LOW)
    run_tiny(run, f"{extra} --log.checkpoint_every 2")
    assert epochs(run) == {"epochs_to_fd_20.5": (4, 32 / IMAGES)}
    given_scores(monkeypatch, HIGH, LOW)
    run_tiny(run, f"{extra} --log.checkpoint_every 2", resume="2")
    assert epochs(run) == {"epochs_to_fd_20.5": (6, 48 / IMAGES)}


def test_a_goal_that_is_set_late_counts_from_the_evaluation_that_reached_it(tmp_path: Path, monkeypatch) -> None:
    run, extra = tmp_path / "run", f"{NO_PREVIEW} {DRAWN} {words(samples=4, every=2)}"
    given_scores(monkeypatch, HIGH, LOW, HIGH)
    run_tiny(run, extra)
    given_scores(monkeypatch, HIGH)
    run_tiny(run, f"{extra} --training.steps 8 {words(goals={'fd': 21})}")
    assert epochs(run) == {"epochs_to_fd_21": (6, 32 / IMAGES)}
    assert "fd ≤ 21 is reached after 0.03552 epochs, at step 4" in notes(run)


def test_scores_of_something_else_do_not_reach_a_goal(tmp_path: Path, monkeypatch) -> None:
    """Guided samples had reached it; unguided ones do later, and that is what counts for them."""
    run, extra = tmp_path / "run", f"{NO_PREVIEW} {DRAWN} {words(samples=4, every=2)}"
    given_scores(monkeypatch, LOW, LOW, LOW)
    run_tiny(run, f"{extra} {words(guidance=2.0)}")
    given_scores(monkeypatch, HIGH, LOW)
    run_tiny(run, f"{extra} --training.steps 10 {words(goals={'fd': 21})}")
    assert epochs(run) == {"epochs_to_fd_21": (10, 80 / IMAGES)}


def test_guided_samples_are_said_to_be_guided_and_what_is_held_out_is_no_part_of_an_epoch(
    tmp_path: Path, monkeypatch
) -> None:
    run, goals = tmp_path / "run", words(samples=4, every=2, goals={"fd": 21}, guidance=1.5)
    given_scores(monkeypatch, LOW)
    run_tiny(run, f"{NO_PREVIEW} {DRAWN} {goals} --training.steps 2 --data.heldout 0.5 --training.accumulation 2")
    assert epochs(run) == {"epochs_to_fd_21": (2, 16 / 451)}  # round(0.5 · 901) = 450 are held out
    assert "of samples with guidance 1.5 (published epochs to a FID are those of unguided ones)" in notes(run)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (f"{DRAWN} {words(metrics=['fd_pixel'])}", "no metric 'fd_pixel': did you mean 'fd_pixels'"),
        (f"{DRAWN} {words(metrics=['recall_pixels'])}", "metrics holds only recall_pixels, for which higher is better"),
        (f"{DRAWN} {words(goals={'fid': 2})}", "goals names fid, which is not measured: allowed: fd_pixels,"),
        (f"{DRAWN} {words(metrics=['fd_pixels'], goals={'recall': 1})}", "goals names recall, which is not measured"),
        (f"{DRAWN} {words(goals={'heldout_loss': 2})}", "heldout_loss, which is not measured: set evaluation.loss"),
        (f"{LOSS} {words(goals={'fid': 2})}", "fid is measured of samples, and none are drawn"),
        (f"{LOSS} {words(metrics=['fid'])}", "fid is measured of samples, and none are drawn"),
        (f"{DRAWN} {words(goals={'fd': 0})}", "evaluation.goals.*Expected `float` > 0"),
        (f"{DRAWN} {words(metrics=[])}", "evaluation.metrics: Expected `array` of length >= 1"),
        ("--evaluation.goals {3:2}", "Expected a <class 'dict'>"),
    ],
)
def test_metrics_and_goals_that_are_not_measured_are_refused_before_training(tmp_path: Path, extra, said) -> None:
    with pytest.raises(InputError, match=said) as raised:
        run_tiny(tmp_path / "run", f"{NO_PREVIEW} {extra}")
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_a_metric_that_the_reference_does_not_allow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "create_features", lambda *arguments: StandIn())
    mean = np.zeros(6)
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=np.eye(6))
    extra = f"{NO_PREVIEW} --training.steps 1 {words(reference=str(tmp_path / 'statistics.npz'), samples=8, steps=1)}"
    with pytest.raises(InputError, match=r"precision cannot be computed with .*: .* holds no images"):
        run_tiny(tmp_path / "run", f"{extra} {words(metrics=['fid', 'precision'])}")
    with pytest.raises(InputError, match=r"sfid cannot be computed with .*: .* has no mu_s"):
        run_tiny(tmp_path / "run", f"{extra} {words(goals={'sfid': 2})}")
    run_tiny(tmp_path / "run", extra)  # what is measured by default is what can be
    assert [set(line) for line in scored(tmp_path / "run")] == [{"step", "fid", "is"}]
