"""What a run says: means, operations counted, time and its parts, scores, the same numbers everywhere, curves."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from training_runs import ALIGNED, NO_PREVIEW, log_lines, losses, number_lines, run_tiny

import evaluate_fid
from sit_atconv.models import create_model
from sit_atconv.models.flops import forward_flops, training_flops
from sit_atconv.models.mixers import mixer_flops
from sit_atconv.training import loop, plot, trainer
from sit_atconv.training.trainer import Trainer
from sit_atconv.training.watch.throughput import Interval

SMALL = {"input_size": (16, 8), "depth": 4, "hidden_size": 64, "num_heads": 4, "in_channels": 3}


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-Hybrid-S/1", "SiT-ATConv-S/4"])
@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 5, "kernel_size": 5, "mlp_ratio": 2.5}])
def test_operations_counted_from_shapes_are_those_that_torch_sees(name: str, options: dict) -> None:
    with torch.device("meta"):
        model = create_model(name, **SMALL, **options)
        x, t = torch.empty(1, 3, 16, 8), torch.empty(1)
        y = torch.empty(1, dtype=torch.int64) if options["num_classes"] else None
        with FlopCounterMode(display=False) as counter:
            model(x, t, y)
    assert forward_flops(model, (3, 16, 8)) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["SiT-B/2", "SiT-ATConv-B/2"])
def test_a_training_step_takes_three_forward_passes(name: str) -> None:
    """But for the first layers' inputs, which need no gradient. Torch counts a depthwise backward pass as a dense."""
    with torch.device("meta"):
        model = create_model(name, num_classes=0, depth=12)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 32, 32), torch.empty(1)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    counts.pop(torch.ops.aten.convolution_backward, None)
    depthwise = 2 * counts.get(torch.ops.aten.convolution, 0)
    assert training_flops(model, (4, 32, 32)) == pytest.approx(sum(counts.values()) + depthwise, rel=1e-3)


def test_mixers_cost_what_the_papers_say() -> None:
    """Multiply-adds a token: attention 4C² + 2NC; ATConv, pooled first, 2C² + 9C and 9C² + 81C an image."""
    grid, N, C = (16, 16), 256, 1152
    blocks = {name: create_model(f"{name}-XL/2", input_size=4, depth=1).blocks[0] for name in ("SiT", "SiT-ATConv")}
    assert mixer_flops(blocks["SiT"].mixer, grid) == 2 * N * (4 * C**2 + 2 * N * C)
    assert mixer_flops(blocks["SiT-ATConv"].mixer, grid) == 2 * (N * (2 * C**2 + 9 * C) + 9 * C**2 + 81 * C)


def test_the_log_and_the_trackers_carry_the_same_numbers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_tiny(run, f'--log.every 2 --log.trackers ["tensorboard"] {NO_PREVIEW}')
    lines = number_lines(run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    accumulator = EventAccumulator(str(run / "sit-atconv"))
    accumulator.Reload()
    for name in ("loss", "grad_norm", "lr", "images_per_second", "data_seconds", "compute_seconds", "hours_left"):
        tracked = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert tracked == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


class Waits(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host: on a GPU each would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(keywords or {}))


def test_nothing_waits_for_the_device_between_lines_of_the_log(tmp_path: Path, monkeypatch) -> None:
    step, after, waits = Trainer.step, Trainer.after_step, Waits()

    def watched_step(self: Trainer) -> None:
        with waits if self.position.step else contextlib.nullcontext():  # the first starts the loader
            step(self)

    def watched_after(self: Trainer) -> dict[str, str]:
        with waits if self.position.step < 6 else contextlib.nullcontext():
            return after(self)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(Trainer, "after_step", watched_after)
    extra = f"--log.every 6 --log.checkpoint_every 6 --data.workers 1 --training.accumulation 2 {NO_PREVIEW} {ALIGNED}"
    run_tiny(tmp_path / "run", f"{extra} --training.power_ema [0.1]")
    assert waits.count == 0
    with waits:
        torch.ones(()).item()
    assert waits.count == 1


def test_the_parts_of_a_step_add_up_and_what_is_no_step_is_left_out(tmp_path: Path, monkeypatch) -> None:
    """Data come 20 ms late, checkpoints take 300 ms: the log must show the first and not the second."""
    fetch, save = Interval.fetch, loop.gather_state

    def slowly(batches):
        for batch in batches:
            time.sleep(0.02)
            yield batch

    monkeypatch.setattr(Interval, "fetch", lambda self, batches: fetch(self, slowly(batches)))
    monkeypatch.setattr(loop, "gather_state", lambda *arguments: (time.sleep(0.3), save(*arguments))[1])
    run_tiny(tmp_path / "run", f"--log.every 3 --log.checkpoint_every 2 {NO_PREVIEW}")
    for line in number_lines(tmp_path / "run"):
        assert line["data_seconds"] >= 0.02
        assert line["compute_seconds"] == pytest.approx(line["seconds_per_step"] - line["data_seconds"])
        assert line["images_per_second"] == pytest.approx(8 / line["seconds_per_step"])
        assert line["hours_left"] == pytest.approx(line["seconds_per_step"] * (6 - line["step"]) / 3600)
        assert line["epoch"] == 8 * line["step"] / 901
        assert line["mfu"] is None  # the peak of a CPU is not known
    total = sum(3 * line["seconds_per_step"] for line in number_lines(tmp_path / "run"))
    begun, ended = ((tmp_path / "run" / name).stat().st_mtime for name in ("config.yaml", "checkpoints/latest"))
    assert total < ended - begun - 2 * 0.3


def test_scores_are_logged_and_the_best_checkpoint_is_marked_and_kept(tmp_path: Path, monkeypatch) -> None:
    scores = iter([{"fd_pixels": value} for value in (3.0, 2.0, 2.5, 4.0)])
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Evaluation, "scores", lambda self, model: next(scores))
        run = tmp_path / "run"
        evaluation = '{"reference":"digits:heldout@8","every":2,"features":"pixels","samples":4,"steps":1}'
        extra = f"--log.checkpoint_every 3 --log.keep 1 {NO_PREVIEW} --evaluation {evaluation}"
        run_tiny(run, f"{extra} --training.steps 4")
        run_tiny(run, f"{extra} --training.steps 8")  # the best score is remembered
    assert [(line["step"], line["fd_pixels"]) for line in log_lines(run) if "fd_pixels" in line] == [
        (2, 3.0),
        (4, 2.0),
        (6, 2.5),
        (8, 4.0),
    ]
    assert (run / "checkpoints" / "best").resolve().name == "step-0000004"
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-0000004", "step-0000008"]


def test_evaluation_scores_what_evaluate_fid_would_score(tmp_path: Path, monkeypatch) -> None:
    evaluation = '{"reference":"digits:heldout@8","every":3,"features":"pixels","samples":40,"steps":2,"guidance":2.0}'
    run_tiny(tmp_path / "run", f"--training.steps 3 {NO_PREVIEW} --evaluation {evaluation}")
    (logged,) = [line for line in number_lines(tmp_path / "run") if "loss" not in line]
    words = "--num-samples 40 --steps 2 --guidance 2 --reference digits:heldout@8 --features pixels --device cpu"
    checkpoint = tmp_path / "run" / "checkpoints" / "best" / "model"
    command = ["evaluate_fid.py", "--checkpoint", str(checkpoint), "--json", str(tmp_path / "scores.json")]
    monkeypatch.setattr("sys.argv", [*command, *words.split()])
    evaluate_fid.main()
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert logged.pop("step") == 3
    assert logged == pytest.approx(scores, rel=1e-9)


def test_the_reference_of_all_evaluations_is_read_once_and_its_warnings_are_given_once(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 9)).save(pictures / f"{number}.jpg")
    settings = {"reference": str(pictures), "every": 1, "features": "pixels", "samples": 4, "steps": 1}
    score = trainer.Evaluation.scores

    def without_the_pictures(*arguments: object) -> dict[str, float]:
        for path in pictures.iterdir():
            path.unlink()
        return score(*arguments)

    monkeypatch.setattr(trainer.Evaluation, "scores", without_the_pictures)
    run_tiny(
        tmp_path / "run", f"--training.steps 2 {NO_PREVIEW} --evaluation {json.dumps(settings, separators=(',', ':'))}"
    )
    assert sum("fd_pixels" in line for line in log_lines(tmp_path / "run")) == 2
    assert caplog.text.count("Scores during training: Some reference images are stored lossily") == 1


def test_curves_of_several_runs_are_drawn(tmp_path: Path, capsys) -> None:
    run_tiny(tmp_path / "one", f"--training.steps 3 {NO_PREVIEW}")
    run_tiny(tmp_path / "two", f"--training.steps 2 {NO_PREVIEW}")
    whole = [line[1] for line in losses(tmp_path / "two")]
    with (tmp_path / "two" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a kill cut it short
    steps, values = plot.curves(tmp_path / "two")["loss"]
    assert (steps, values) == ([1, 2], whole)
    plot.main([str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "curves.png")])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 3 * image.height
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path), "--out", str(tmp_path / "none.png")])
    assert exit_.value.code == 2
    assert "is not a training run" in capsys.readouterr().err
