"""training.max_seconds: a run ends as complete when its time is over, and the time is that of training alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_training_processes import launch
from test_training_resume import stop_in_step
from training_runs import NO_PREVIEW, log_lines, losses, number_lines, run_tiny

from sit_atconv.config import Config, OptimizerConfig, TrainingConfig
from sit_atconv.errors import InputError
from sit_atconv.training.run.integrity import read_position
from sit_atconv.training.schedule import learning_rate
from sit_atconv.training.trainer import Trainer
from sit_atconv.training.watch import throughput
from sit_atconv.training.watch.preview import Preview


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock on which a step takes a second, a preview and a checkpoint take a hundred, and nothing else any time."""
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def takes(owner: type, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def slow(*arguments: object) -> object:
            clock.now += seconds
            return original(*arguments)

        monkeypatch.setattr(owner, name, slow)

    takes(Trainer, "step", 1)
    takes(Preview, "save", 100)
    takes(Trainer, "save_power_averages", 100)
    return clock


def test_the_run_ends_with_the_step_that_begins_after_its_time_is_over(tmp_path: Path, clock, caplog) -> None:
    caplog.set_level("INFO")
    run = tmp_path / "run"
    extra = "--training.max_seconds 3.5 --training.steps 1000 --log.every 2 --log.checkpoint_every 400"
    extra += " --preview.every 2 --training.power_ema [0.1] --training.power_ema_every 3"
    run_tiny(run, extra)
    lines = number_lines(run)
    assert [(line["step"], line["seconds"]) for line in lines] == [(2, 2.0), (4, 4.0), (5, 5.0)]
    assert [3600 * line["hours_left"] for line in lines] == pytest.approx([1.5, 0, 0])
    assert [path.name for path in sorted((run / "samples").iterdir())] == [f"step-000000{n}.png" for n in (2, 4, 5)]
    assert "its time (training.max_seconds) is over after 5 steps" in caplog.text
    assert any("within 5 steps" in line.get("note", "") for line in log_lines(run))
    position = read_position(run / "checkpoints" / "step-0000005")
    assert (position["seconds"], position["out_of_time"]) == (5.0, True)

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    run_tiny(run, extra)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert caplog.text.count("is over after 5 steps") == 2

    run_tiny(run, extra.replace("3.5", "6.5"))  # more time: the seconds so far count
    assert [(line["step"], line["seconds"]) for line in number_lines(run)[3:]] == [(6, 6.0), (8, 8.0)]
    assert "training.max_seconds: 3.5 -> 6.5" in [line.get("note") for line in log_lines(run)]
    run_tiny(run, extra.replace("--training.max_seconds 3.5", "").replace("1000", "9"))  # no limit any more
    assert number_lines(run)[-1]["step"] == 9


def test_time_goes_on_where_it_was_after_a_kill(tmp_path: Path, clock, monkeypatch) -> None:
    extra = f"--training.max_seconds 4.5 --training.steps 1000 --log.checkpoint_every 2 {NO_PREVIEW}"
    with monkeypatch.context() as patched:
        stop_in_step(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path / "run", extra)
    clock.now += 50
    run_tiny(tmp_path / "run", extra)
    run_tiny(tmp_path / "whole", extra)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [line["seconds"] for line in number_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_kill_before_the_last_step_is_made_good(tmp_path: Path, clock, monkeypatch) -> None:
    """There is a checkpoint of after the limit, but not of the last step, with its line and its grid."""
    extra = "--training.max_seconds 2 --training.steps 1000 --log.checkpoint_every 1"
    extra += " --preview.every 500 --log.every 500"
    with monkeypatch.context() as patched:
        stop_in_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path / "run", extra)
    assert read_position(tmp_path / "run" / "checkpoints" / "latest")["seconds"] == 2
    run_tiny(tmp_path / "run", extra)
    assert [line["step"] for line in number_lines(tmp_path / "run")] == [3]
    assert (tmp_path / "run" / "samples" / "step-0000003.png").exists()


def test_a_linear_schedule_ends_with_the_steps_or_the_time() -> None:
    rates = OptimizerConfig(lr=0.4, schedule="linear")
    config = Config(optimizer=rates, training=TrainingConfig(steps=10, max_seconds=100))
    found = [learning_rate(config, step, seconds) for step, seconds in ((1, 0), (3, 50), (6, 50), (9, 50), (9, 101))]
    assert found == pytest.approx([0.4, 0.2, 0.2, 0.08, 0])
    assert learning_rate(Config(optimizer=rates, training=TrainingConfig(steps=10)), 3, 50) == 0.4 * 0.8


def test_a_linear_schedule_is_not_lengthened_by_more_time(tmp_path: Path, clock) -> None:
    extra = f"--training.max_seconds 2 --training.steps 1000 --optimizer.schedule linear {NO_PREVIEW}"
    run_tiny(tmp_path / "run", extra)
    assert [line["lr"] for line in number_lines(tmp_path / "run")][-1] == 0
    with pytest.raises(InputError, match=r"max_seconds: 2\.0 -> 3\.0.*only a constant one can be lengthened"):
        run_tiny(tmp_path / "run", extra.replace("max_seconds 2", "max_seconds 3"))


def test_all_processes_stop_at_the_same_step(tmp_path: Path) -> None:
    extra = f"--training.max_seconds 0.05 --training.steps 100000 --optimizer.schedule linear {NO_PREVIEW}"
    assert launch(tmp_path / "run", 2, extra) == [0, 0]
    records = [json.loads((tmp_path / "run" / f"rank-2-{rank}.json").read_text()) for rank in range(2)]
    step = read_position(tmp_path / "run" / "checkpoints" / "latest")["step"]
    assert [len(record["positions"]) for record in records] == [step, step] and step < 100
    assert records[0]["ema"] == records[1]["ema"]
