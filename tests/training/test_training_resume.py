"""Interruptions: a continued run is the uninterrupted one, wherever it was killed, and no kill leaves a mess."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from training_runs import (
    ALIGNED,
    NO_PREVIEW,
    assert_same_checkpoint,
    log_lines,
    losses,
    run_tiny,
    start_run,
)

from sit_atconv.errors import InputError
from sit_atconv.models import SiT
from sit_atconv.training.run.stop import TrainingStopped
from sit_atconv.training.trainer import Trainer

SIZED = "--training.steps 12 --log.checkpoint_every 4"


def compile_without_code(model: SiT) -> None:
    """torch.compile as training calls it, but for C++ and its minute of compiling."""
    for block in model.blocks:
        block.compile(backend="aot_eager")


def kill_in_step(number: int) -> None:
    """Let this process die by SIGKILL when it is about to take the step of this number."""
    SiT.compile_repeated_blocks = compile_without_code
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.position.step == number - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self)

    Trainer.step = step


def terminate_in_step(number: int) -> None:
    """As if a scheduler asked this process to stop while it takes this step."""
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.position.step == number - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    Trainer.step = step


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let training in this process fail at the step of this number."""
    original = Trainer.step

    def step(self: Trainer) -> None:
        if self.position.step == number - 1:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Trainer, "step", step)


def run_and_stop(monkeypatch: pytest.MonkeyPatch, run: Path, number: int, extra: str) -> None:
    with monkeypatch.context() as patched:
        stop_in_step(patched, number)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(run, extra)


def names_in(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "extra",
    [
        "--training.accumulation 2 --log.every 3 --training.more_ema_decays [0.9] --training.power_ema [0.1]",
        f"--training.precision bf16 --data.workers 1 {ALIGNED} --training.batch_size 4",
        f"--training.compile true {NO_PREVIEW}",
    ],
    ids=["accumulation-averages", "bf16-alignment-workers", "compile"],
)
def test_a_killed_run_continued_equals_the_uninterrupted_run(tmp_path: Path, monkeypatch, extra: str) -> None:
    extra = f"{SIZED} {extra}"
    monkeypatch.setattr(SiT, "compile_repeated_blocks", compile_without_code)
    run_tiny(tmp_path / "whole", extra)
    killed = start_run(tmp_path / "parts", extra, kill_in_step, 6)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "parts" / "checkpoints" / "latest").resolve().name == "step-0000004"
    run_tiny(tmp_path / "parts", extra)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert names_in(tmp_path / "parts") == names_in(tmp_path / "whole")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("parts", "whole")))
    grids = [p.read_bytes() for run in ("parts", "whole") for p in (tmp_path / run).glob("samples/step-0000012.png")]
    assert len(set(grids)) == ("null" not in extra)


@pytest.mark.parametrize("step", [4, 6])  # a step whose checkpoint is due anyway, and one between two of them
def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_code_143(tmp_path: Path, step: int) -> None:
    process = start_run(tmp_path / "run", f"{SIZED} {NO_PREVIEW} --data.workers 1", terminate_in_step, step)
    process.join()
    assert process.exitcode == 143
    assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step-{step:07d}"
    assert f"step-{step:07d}" in Path(f"{tmp_path / 'run'}.stderr").read_text()


@pytest.mark.parametrize("files_fit", [0, 1, 6])
def test_a_full_disk_leaves_the_previous_checkpoint_and_a_clear_error(tmp_path: Path, monkeypatch, files_fit) -> None:
    original, synced = os.fsync, -4  # the run's start writes config.yaml and log.jsonl: two files and their folder

    def fsync(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced > files_fit:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    extra = f"--log.checkpoint_every 2 {NO_PREVIEW}"
    run_tiny(tmp_path / "run", f"{extra} --training.steps 2")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(TrainingStopped, match=r"step 4 could not be written.*No space left.*step-0000002"):
            run_tiny(tmp_path / "run", extra)
    assert names_in(tmp_path / "run") == ["latest", "step-0000002"]
    run_tiny(tmp_path / "run", extra)
    run_tiny(tmp_path / "whole", extra)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_rotation_keeps_the_newest_and_every_mth_and_removes_leftovers(tmp_path: Path, monkeypatch) -> None:
    extra = f"--training.steps 10 --log.checkpoint_every 1 --log.keep 2 --log.keep_every 3 {NO_PREVIEW}"
    run_and_stop(monkeypatch, tmp_path / "run", 8, extra)
    folder = tmp_path / "run" / "checkpoints"
    assert names_in(tmp_path / "run") == ["latest", *(f"step-000000{step}" for step in (3, 6, 7))]
    (folder / ".unfinished-step-0000008").mkdir()
    (folder / ".unfinished-latest").symlink_to("step-0000007")
    (folder / "latest").unlink()  # as if killed between the two renames
    run_tiny(tmp_path / "run", extra)
    assert names_in(tmp_path / "run") == ["latest", *(f"step-{step:07d}" for step in (3, 6, 9, 10))]


def test_going_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    extra = f"{SIZED} --log.keep null {NO_PREVIEW}"
    run_tiny(run, extra)
    whole = losses(run)
    for wanted in ("step-0000004", "4", str(run / "checkpoints" / "step-0000004")):
        run_tiny(run, extra, resume=wanted)
        assert losses(run) == whole
        assert names_in(run) == [
            "latest",
            *(f"set-aside-step-{step:07d}" for step in (8, 12)),
            *(f"step-{step:07d}" for step in (4, 8, 12)),
        ]
        assert_same_checkpoint(run / "checkpoints" / "step-0000012", run / "checkpoints" / "set-aside-step-0000012")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    with pytest.raises(InputError, match=r"no such complete checkpoint\. There are: step-0000004, step-0000008"):
        run_tiny(run, extra, resume="5")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path, monkeypatch) -> None:
    run_and_stop(monkeypatch, tmp_path / "run", 6, NO_PREVIEW)
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    run_tiny(tmp_path / "run", NO_PREVIEW)
    assert [line[0] for line in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_is_lengthened_and_says_so(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", f"--training.steps 4 --log.checkpoint_every 2 {NO_PREVIEW}")
    longer = f"--training.steps 6 --log.keep 1 --training.ema_decay 0.98 {NO_PREVIEW}"
    run_tiny(tmp_path / "run", longer)
    run_tiny(tmp_path / "whole", longer)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "latest" for run in ("run", "whole")))
    notes = [line["note"] for line in log_lines(tmp_path / "run") if "note" in line]
    assert "training.steps: 4 -> 6" in notes
    assert "log.keep: 2 -> 1" in notes
    assert (tmp_path / "run" / "config.yaml").read_text() == (tmp_path / "whole" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--optimizer.lr 0.1", r"optimizer\.lr: 0\.0025 -> 0\.1"),
        ("--training.ema_decay 0.5", r"training\.ema_decay: 0\.98 -> 0\.5"),
        ("--optimizer.schedule linear --training.steps 9", r"optimizer\.schedule: constant -> linear"),
    ],
)
def test_what_would_be_another_run_is_refused(tmp_path: Path, extra: str, message: str) -> None:
    run_tiny(tmp_path / "run", f"--training.steps 1 {NO_PREVIEW}")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", f"--training.steps 1 {NO_PREVIEW} {extra}")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_a_linear_schedule_cannot_be_lengthened(tmp_path: Path) -> None:
    run_tiny(tmp_path / "run", f"--training.steps 1 {NO_PREVIEW} --optimizer.schedule linear")
    with pytest.raises(InputError, match=r"training\.steps: 1 -> 2"):
        run_tiny(tmp_path / "run", f"--training.steps 2 {NO_PREVIEW} --optimizer.schedule linear")


def test_a_checkpoint_is_opened_without_unpickling(tmp_path: Path, monkeypatch) -> None:
    run_tiny(tmp_path / "run", f"--training.steps 3 {NO_PREVIEW}")
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    monkeypatch.setattr(torch, "load", None)
    run_tiny(tmp_path / "run", f"--training.steps 4 {NO_PREVIEW}")
    folder = tmp_path / "run" / "checkpoints" / "step-0000004" / "model"
    loaded, stored = SiT.from_pretrained(folder).state_dict(), load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    suffixes = {p.suffix for p in (tmp_path / "run" / "checkpoints").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors", ".py"}  # the last opens the model in diffusers, and is not run by us


def test_damaged_lines_of_the_log_are_set_aside_and_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    run_tiny(run, f"{NO_PREVIEW} --training.steps 3")
    damaged = [b'{"step": 2, "note": "\xff"}', b'{"step": "x"}', b"[1]"]
    with (run / "log.jsonl").open("ab") as file:
        file.write(b"\n".join(damaged) + b'\n{"step": 3, "cut')
    run_tiny(run, NO_PREVIEW)
    assert [line["step"] for line in log_lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (run / "log.damaged.jsonl").read_bytes().splitlines() == damaged
    assert any("3 damaged lines" in line.get("note", "") for line in log_lines(run))
