"""Faults around the steps: two trainings in one place, storage that does not answer, kills between two writes."""

import errno
import os
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training_runs import NO_PREVIEW, command_words, losses, run_tiny, start_run

import train as train_command
from sit_atconv.autoencoder import LatentSpec
from sit_atconv.errors import InputError
from sit_atconv.training.run.checkpoint import Checkpoints
from sit_atconv.training.run.stop import TrainingStopped
from sit_atconv.training.session import session as session_module
from sit_atconv.training.trainer import Trainer
from sit_atconv.training.watch import preview as preview_module
from sit_atconv.training.watch.evaluation import Evaluation

SCORED = '--evaluation {"reference":"digits:heldout@8","features":"pixels","every":2,"samples":4,"steps":1}'


def wait_in_step(number: int) -> None:
    """Let this process stay in the step of this number for as long as it lives."""
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.position.step == number - 1:
            time.sleep(600)
        original(self)

    Trainer.step = step


def wait_for_samples_after_step(number: int) -> None:
    """Storage that does not answer: whoever loads the samples after this step waits for them."""
    original = session_module.draw_fields

    def fields(positions: list[int], **settings: object) -> dict:
        if positions[0] >= 8 * number:
            time.sleep(600)
        return original(positions, **settings)

    session_module.draw_fields = fields


def terminate_in_step(number: int) -> None:
    original = Trainer.step

    def step(self: Trainer) -> None:
        original(self)
        if self.position.step == number:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.step = step


def started(run: Path, extra: str, step: int) -> BaseProcess:
    """A training that has written a checkpoint and stays in a later step."""
    process = start_run(run, extra, wait_in_step, step + 1)
    latest = run / "checkpoints" / "latest"  # the last that is written of a checkpoint
    while process.is_alive() and latest.resolve().name != f"step-{step:07d}":
        time.sleep(0.01)
    return process


def test_a_second_training_in_the_same_place_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run, extra = tmp_path / "run", f"--log.checkpoint_every 2 --data.workers 1 {NO_PREVIEW}"
    first = started(run, extra, 2)
    try:
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with pytest.raises(InputError, match=rf"trained into by process {first.pid} on .*choose another --run"):
            run_tiny(run, extra)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    finally:
        first.kill()  # its data worker lives on for a while
        first.join()
    run_tiny(run, extra)
    assert [line[0] for line in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "log.jsonl"]


def test_a_refusal_leaves_no_directory_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not divide"):
        run_tiny(tmp_path / "some" / "run", "--training.batch_size 7 --training.accumulation 2")
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_that_cannot_be_had_is_missed_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    def nowhere(spec: LatentSpec, device: torch.device) -> None:
        raise InputError("No autoencoder.")

    monkeypatch.setattr(preview_module, "load_autoencoder", nowhere)
    with pytest.raises(InputError, match="No autoencoder"):
        run_tiny(tmp_path / "run", "--preview.every 100")
    assert not (tmp_path / "run").exists()
    run_tiny(tmp_path / "run", f"--training.steps 1 {NO_PREVIEW}")


@pytest.mark.parametrize("call", ["write", "fsync"], ids=["lock", "configuration"])
def test_a_disk_that_is_full_at_the_start_is_named(tmp_path: Path, monkeypatch, call: str) -> None:
    run_tiny(tmp_path / "run", f"--training.steps 1 {NO_PREVIEW}")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(TrainingStopped, match=r"No space left.*step-0000001 is complete: make room"):
            run_tiny(tmp_path / "run", f"--training.steps 2 {NO_PREVIEW}")
    run_tiny(tmp_path / "run", f"--training.steps 2 {NO_PREVIEW}")
    assert [line[0] for line in losses(tmp_path / "run")] == [1, 2]


def test_samples_that_never_come_do_not_keep_a_finished_training_from_leaving(tmp_path: Path) -> None:
    process = start_run(
        tmp_path / "run", f"--training.steps 2 --data.workers 1 {NO_PREVIEW}", wait_for_samples_after_step, 2
    )
    process.join(60)
    code = process.exitcode
    process.kill()
    assert code == 0
    assert [line[0] for line in losses(tmp_path / "run")] == [1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_trainer_takes_its_data_workers_along(tmp_path: Path) -> None:
    """Even those that wait for storage: other processes would wait for the connections that they hold."""
    extra = f"--training.steps 4 --log.checkpoint_every 2 --data.workers 1 {NO_PREVIEW}"
    process = start_run(tmp_path / "run", extra, wait_for_samples_after_step, 3)
    while process.is_alive() and not (tmp_path / "run" / "checkpoints" / "latest").exists():
        time.sleep(0.01)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert runs(worker)
    process.kill()
    process.join()
    for _ in range(600):
        if not runs(worker):
            break
        time.sleep(0.1)
    assert not runs(worker)


def runs(process: str) -> bool:
    """Whether a process is there, and more than a name that nobody has read the exit code of."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sigterm_ends_trackers_and_process_groups_as_the_last_step_does(tmp_path: Path, monkeypatch) -> None:
    ends = []
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ends.append(self))
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", Trainer.step)  # to be put back
        terminate_in_step(2)
        with pytest.raises(SystemExit) as end:
            run_tiny(tmp_path / "run", NO_PREVIEW)
    assert (end.value.code, len(ends)) == (143, 1)
    run_tiny(tmp_path / "run", NO_PREVIEW)
    assert len(ends) == 2


def test_a_kill_between_the_best_checkpoint_and_its_link_is_made_good(tmp_path: Path, monkeypatch) -> None:
    run, extra = tmp_path / "run", f"--training.steps 8 --log.checkpoint_every 4 --log.keep 1 {SCORED} {NO_PREVIEW}"
    scores = iter([5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(Evaluation, "scores", lambda self, model: {"fd": next(scores)})
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "mark_best", lambda self, checkpoint: None)
        step = Trainer.step
        patched.setattr(Trainer, "step", lambda self: step(self) if self.position.step < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_tiny(run, extra)
    run_tiny(run, extra)
    assert os.readlink(run / "checkpoints" / "best") == "step-0000004"
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*")) == ["step-0000004", "step-0000008"]


def test_going_back_forgets_grids_and_snapshots_of_the_future_given_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    extra = "--log.keep null --training.power_ema [0.1] --training.power_ema_every 2 --preview.every 2"
    run_tiny(run, f"{extra} --training.steps 6")
    run_tiny(run, f"{extra} --training.steps 4", resume="3")
    kept = ["step-0000002", "step-0000004"]
    assert sorted(path.stem for path in (run / "samples").iterdir()) == kept
    assert sorted(path.name for path in (run / "ema").iterdir()) == kept


def test_a_checkpoint_that_lost_its_position_is_refused_by_name(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", f"--training.steps 2 {NO_PREVIEW}")
    (tmp_path / "run" / "checkpoints" / "step-0000002" / "position.json").unlink()
    with pytest.raises(InputError, match=r"step-0000002 is damaged: position\.json"):
        run_tiny(tmp_path / "run", f"--training.steps 3 {NO_PREVIEW}")
    assert [line[0] for line in losses(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("content", [b"model: {name: [", b"model:\n  nme: SiT-S/2\n", b"\xff\xfe\x00", b"", b"12"])
def test_a_damaged_configuration_of_a_run_is_refused_by_name(tmp_path: Path, capsys, content: bytes) -> None:
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(SystemExit) as refused:
        train_command.main([*command_words(), "--run", str(path.parent)])
    assert refused.value.code == 2
    assert f"error: {path}: " in capsys.readouterr().err


def test_an_old_checkpoint_that_somebody_reads_does_not_stop_the_rotation(tmp_path: Path, monkeypatch) -> None:
    """Network storage keeps what is open somewhere: the folder cannot go yet."""
    rmdir = os.rmdir

    def busy(path: str, **where: int) -> None:
        if "step-0000001" in str(path):
            raise OSError(39, "Directory not empty")
        rmdir(path, **where)

    extra = f"--training.steps 4 --log.checkpoint_every 1 --log.keep 1 {NO_PREVIEW}"
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        run_tiny(tmp_path / "run", extra)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [".unfinished-step-0000001", "latest", "step-0000004"]
    run_tiny(tmp_path / "run", f"{extra} --training.steps 5")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-0000005"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--model.num_classes 0 --preview.guidance 2", "needs a model with classes"),
        (f"{NO_PREVIEW} --evaluation.reference digits:heldout@8 --evaluation.samples 1", "at least 2"),
        (
            f"{NO_PREVIEW} --evaluation.reference digits:heldout@16 --evaluation.features pixels",
            "Features of 8x8 samples have 192 dimensions, those of evaluation.reference 768",
        ),
        (
            f"{NO_PREVIEW} --evaluation.reference digits:heldout@64 --evaluation.features pixels",
            "too many for a covariance",
        ),
        (
            f"{NO_PREVIEW} --model.num_classes 0 --evaluation.reference digits:heldout@8 --evaluation.guidance 2 "
            "--evaluation.features pixels",
            "needs a model with classes",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_first_step(extra: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", extra)
    assert list(tmp_path.iterdir()) == []
