"""The held-out loss: its value, the same bits however it is computed, what it decides, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training_processes import launch
from test_training_resume import run_and_stop
from training_runs import NO_PREVIEW, assert_same_checkpoint, log_lines, losses, run_tiny

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.part import hold_out
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.randomness import Stream, keyed_normal
from sit_atconv.training import heldout
from sit_atconv.training.watch import heldout_loss
from sit_atconv.training.watch.heldout_loss import TIMES, HeldOutLoss

SCORED = f"{NO_PREVIEW} --evaluation.loss true --evaluation.every 2"
ALONE = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


def small_model(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = create_model("SiT-Hybrid-S/2", **(sizes | options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def scored_lines(run: Path) -> list[dict]:
    return [line for line in log_lines(run) if "heldout_loss" in line]


def measured(checkpoint: Path, *words: str) -> dict:
    """What the command says of a checkpoint."""
    heldout.main([str(checkpoint), "--json", str(checkpoint.parent / "heldout.json"), *words])
    return json.loads((checkpoint.parent / "heldout.json").read_text())


@pytest.mark.parametrize(("prediction", "low", "high"), [("velocity", 0, 1), ("noise", 1e-3, 1 - 1e-3)])
def test_the_loss_is_that_of_the_networks_prediction(prediction: str, low: float, high: float) -> None:
    _, data = hold_out(open_dataset("digits:heldout@8"), 0.01)  # 9 pictures of 896
    model = small_model(prediction=prediction)
    scores = HeldOutLoss(data, 4, ALONE).scores(model)
    assert list(scores) == ["heldout_loss", *(f"heldout_loss_t{time}" for time in TIMES)]
    batch, rows = data.read(range(9), [False] * 9), [data.row(index) for index in range(9)]
    x, expected = batch["moments"][:, :1], []  # digits have no posterior deviation
    for k, time in enumerate(TIMES):
        noise, t = keyed_normal(0, Stream.HELD_OUT_NOISE, rows, (1, 8, 8), k), low + (high - low) * time
        with torch.no_grad():
            found = model((1 - t) * x + t * noise, torch.full((9,), t), batch["label"])
        expected.append((found - (noise - x if prediction == "velocity" else noise)).square().mean().item())
    assert list(scores.values()) == pytest.approx([sum(expected) / 8, *expected], rel=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the first of nine processes, which has no picture
def test_the_bits_do_not_depend_on_batch_size_threads_or_processes(monkeypatch) -> None:
    _, data = hold_out(open_dataset("digits:heldout@8"), 0.03)  # 27 pictures: the last group is not full
    model, threads = small_model(), torch.get_num_threads()
    expected = HeldOutLoss(data, 64, ALONE).scores(model)
    for batch_size, count in ((1, 1), (10, 2), (27, 3)):
        torch.set_num_threads(count)
        try:
            assert HeldOutLoss(data, batch_size, ALONE).scores(model) == expected
        finally:
            torch.set_num_threads(threads)
    for processes in (2, 3, 9):
        parts = []

        def gather(mine: list, parts: list = parts) -> list:
            parts.extend(mine)
            return parts

        monkeypatch.setattr(heldout_loss, "gather_object", gather)
        for rank in range(processes):
            state = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
            scores = HeldOutLoss(data, 8, state).scores(model)
        assert scores == expected  # of the last process, which has them all


def test_a_continued_run_and_the_command_give_the_same_bits(tmp_path: Path, monkeypatch) -> None:
    """Autocast, dropped labels and an auxiliary average do not enter; a share is the same for every seed."""
    extra = f"{SCORED} --data.heldout 0.04 --training.precision bf16 --flow.label_dropout 0.5 --training.seed 3"
    extra += " --training.more_ema_decays [0.5]"
    run_tiny(tmp_path / "whole", extra)
    run_and_stop(monkeypatch, tmp_path / "parts", 6, extra)
    run_tiny(tmp_path / "parts", extra)
    assert scored_lines(tmp_path / "parts") == scored_lines(tmp_path / "whole")
    assert [line["step"] for line in scored_lines(tmp_path / "whole")] == [2, 4, 6]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    checkpoints = [tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")]
    assert_same_checkpoint(*checkpoints)

    last = scored_lines(tmp_path / "whole")[-1]
    words = ["--data", "digits:train@8", "--share", "0.04"]
    for batch_size in ("3", "64"):
        found = measured(checkpoints[0], *words, "--batch-size", batch_size)
        assert found["heldout_loss"] == last["heldout_loss"]
        assert found["times"] == {str(time): last[f"heldout_loss_t{time}"] for time in TIMES}
    assert (found["images"], found["step"], found["weights"]) == (36, 6, "0.98")
    other = measured(checkpoints[0], *words, "--weights", "0.5")
    assert other["weights"] == "0.5" and other["heldout_loss"] != last["heldout_loss"]


def test_what_is_held_out_is_not_trained_on(tmp_path: Path, monkeypatch) -> None:
    seen = set()

    def spy(self, indices, flips, *arguments):
        seen.update(self.row(index) for index in indices)
        return read(self, indices, flips, *arguments)

    whole = open_dataset("digits:train@8")
    _, held = hold_out(whole, 0.9)
    read = type(held).read
    monkeypatch.setattr(type(held), "read", spy)
    run_tiny(tmp_path / "run", f"{NO_PREVIEW} --training.steps 12 --data.heldout 0.9")  # 90 pictures are left
    assert len(seen) == 90 and not seen & {held.row(index) for index in range(len(held))}


def test_several_processes_log_what_one_measures(tmp_path: Path) -> None:
    extra = f"{SCORED} --data.heldout digits:heldout@8 --training.steps 2 --log.checkpoint_every 2"
    assert launch(tmp_path / "run", 3, extra, "shard_the_model") == [0, 0, 0]
    (line,) = scored_lines(tmp_path / "run")
    found = measured(tmp_path / "run" / "checkpoints" / "step-0000002", "--data", "digits:heldout@8")
    assert found["heldout_loss"] == line["heldout_loss"] and found["images"] == 896


def test_without_a_reference_the_loss_decides_which_checkpoint_is_best(tmp_path: Path, monkeypatch) -> None:
    values = iter([3.0, 2.0, None, 2.5])
    monkeypatch.setattr(HeldOutLoss, "scores", lambda self, model: {"heldout_loss": next(values)})
    extra = f"{SCORED} --data.heldout digits:heldout@8 --log.checkpoint_every 8 --log.keep 1"
    run_tiny(tmp_path / "run", f"{extra} --training.steps 8")
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-0000004"
    # With a reference its distance decides, however large it is beside the losses so far
    drawn = "--evaluation.reference digits:heldout@8 --evaluation.features pixels --evaluation.samples 4"
    values = iter([1.0])
    run_tiny(tmp_path / "run", f"{extra} --training.steps 10 {drawn} --evaluation.steps 1")
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-0000010"
    line = scored_lines(tmp_path / "run")[-1]
    assert line["fd_pixels"] > 3 and line["heldout_loss"] == 1.0


def test_held_out_data_may_move_but_a_share_stays(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", f"{NO_PREVIEW} --training.steps 1")
    run_tiny(tmp_path / "run", f"{SCORED} --training.steps 2 --data.heldout digits:heldout@8")
    assert len(scored_lines(tmp_path / "run")) == 1
    with pytest.raises(InputError, match=r"data\.heldout: digits:heldout@8 -> 0\.1"):
        run_tiny(tmp_path / "run", f"{SCORED} --training.steps 3 --data.heldout 0.1")


def prepared(folder: Path, source: str) -> str:
    prepare([source, str(folder), "--resolution", "8", "--vae", "identity", "--workers", "0"])
    return str(folder)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--evaluation.loss true", "there are none: set data.heldout to a share"),
        ("--evaluation.every 3", "evaluation measures nothing"),
        ("--data.heldout 0.9999", "takes 901 of 901 pictures and leaves none"),
        ("--data.heldout nowhere", "'nowhere' is not a prepared data set"),
        ("--data.heldout digits:train@8", "are the data of data.path, which are trained on"),
        ("--data.heldout digits:heldout@16", "has latents of 16x16, the model is trained on 8x8"),
        ("--data.heldout {rgb}", r"of the model .* differ in channels: 1 against 3"),
        ("--data.path {rgb} --data.heldout {unlabelled}", "has 0 classes, the model 10"),
        ("--data.heldout 1.5", "data.heldout: Expected `float` < 1"),
    ],
)
def test_what_cannot_be_held_out_is_refused_before_anything_is_written(tmp_path: Path, extra, message) -> None:
    if "{" in extra:
        np.savez(tmp_path / "pictures.npz", np.full((4, 8, 8, 3), 200, np.uint8))
        unlabelled = prepared(tmp_path / "unlabelled", str(tmp_path / "pictures.npz"))
        extra = extra.format(rgb=prepared(tmp_path / "rgb", "digits:heldout@8"), unlabelled=unlabelled)
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", f"{NO_PREVIEW} {extra}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "'nowhere' is not a prepared data set"),
        (["--data", "digits@8", "--share", "1"], "'1' is not a share between 0 and 1"),
        (["--data", "digits@16"], "the model is trained on 8x8"),
        (["--data", "digits@8", "--batch-size", "0"], "'0' is not a whole number"),
        (["--data", "digits@8", "--weights", "0.5"], "is a model by itself"),
        ([], "--data"),
    ],
)
def test_mistakes_on_the_commands_line_are_one_paragraph(tmp_path: Path, capsys, words, message) -> None:
    small_model().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        heldout.main([str(tmp_path / "model"), *words])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and "Traceback" not in error
