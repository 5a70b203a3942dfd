"""A run and what it stands on: its directory, its data, the configuration it was begun with, and its launcher."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from training_runs import NO_PREVIEW, log_lines, losses, run_tiny, start_run, tiny_config

import sit_atconv.training
from sit_atconv.config import Config
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.errors import InputError
from sit_atconv.training import trainer
from sit_atconv.training.run.directory import write_configuration
from sit_atconv.training.run.integrity import read_position
from sit_atconv.training.run.stop import TrainingStopped
from sit_atconv.training.session import session as session_module
from sit_atconv.training.session.session import Session
from sit_atconv.training.trainer import Trainer

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier" / "run"


def prepare_digits(out: Path, split: str) -> str:
    prepare(PrepareOptions(source=f"digits:{split}@8", out=str(out), resolution=(8, 8), vae="identity", channels=1))
    return f"--data.path {out} {NO_PREVIEW}"


def test_another_program_that_begins_meanwhile_keeps_its_configuration(tmp_path: Path, monkeypatch) -> None:
    run, theirs = tmp_path / "run", tiny_config("--optimizer.lr 0.5")
    build = trainer.build_session

    def build_late(config: Config, run: Path) -> Session:
        session = build(config, run)
        run.mkdir()
        write_configuration(run, theirs)
        return session

    monkeypatch.setattr(trainer, "build_session", build_late)
    with pytest.raises(InputError, match=r"another configuration \(optimizer.lr: 0.5 -> "):
        run_tiny(run, NO_PREVIEW)
    assert (run / "config.yaml").read_text() == theirs.to_yaml()


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        f"{NO_PREVIEW} --log.every 100",
        f"{NO_PREVIEW} --log.every 1",
        "--preview.every 3 --log.every 100 --log.checkpoint_every 100",
        f"{NO_PREVIEW} --training.power_ema [0.1] --training.power_ema_every 3 --log.every 100",
    ],
    ids=["checkpoint", "log", "preview", "snapshot"],
)
def test_a_run_that_was_moved_is_not_made_anew(tmp_path: Path, monkeypatch, extra: str, replaced: bool) -> None:
    run, step = tmp_path / "run", Trainer.step

    def move(self: Trainer) -> None:
        step(self)
        if self.position.step == 3:
            run.rename(tmp_path / "moved")
            if replaced:
                run.mkdir()

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", move)
        with pytest.raises(TrainingStopped, match=r"run is gone: it was moved or removed.*its new place as --run"):
            run_tiny(run, extra)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["moved", "run"] if replaced else ["moved"])
    assert not replaced or list(run.iterdir()) == []
    run_tiny(tmp_path / "moved", extra)
    assert log_lines(tmp_path / "moved")[-1]["step"] == 6


def test_a_run_that_vanishes_between_look_and_write_is_named(tmp_path: Path, monkeypatch) -> None:
    run, save = tmp_path / "run", Trainer.save

    def move(self: Trainer) -> Path:
        run.rename(tmp_path / "moved")
        return save(self)

    monkeypatch.setattr(Trainer, "save", move)
    with pytest.raises(TrainingStopped, match="run is gone"):
        run_tiny(run, NO_PREVIEW)
    assert not run.exists()


def test_a_run_refuses_other_data_and_goes_on_with_the_same_elsewhere(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    words = prepare_digits(data, "train")
    run_tiny(run, f"{words} --training.steps 3")
    shutil.copytree(data, tmp_path / "copy")
    shutil.rmtree(data)
    prepare_digits(data, "heldout")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(InputError, match=r"step-0000003 was trained on other data.*--data.path"):
        run_tiny(run, words)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    run_tiny(run, f"--data.path {tmp_path / 'copy'} {NO_PREVIEW}")
    assert [line[0] for line in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert any(line.get("note", "").startswith("data.path:") for line in log_lines(run))


def test_a_run_of_an_earlier_version_gets_a_note_of_its_data(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(EARLIER, run)
    with pytest.raises(InputError, match=r"another configuration \(data.path: .*by a version that did not note"):
        run_tiny(run, f"--data.path digits:heldout@8 {NO_PREVIEW}")
    run_tiny(run, NO_PREVIEW)
    assert read_position(run / "checkpoints" / "latest")["data"] == open_dataset("digits:train@8").fingerprint()


def test_a_path_is_as_good_as_another_only_once_there_is_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_tiny(tmp_path / "run", NO_PREVIEW)
    with pytest.raises(InputError, match=r"another configuration \(data.path"):
        run_tiny(tmp_path / "run", f"--data.path digits:heldout@8 {NO_PREVIEW}")


def test_fingerprints_of_digits_say_which() -> None:
    same, other = ("digits", "digits:all", "digits:all@16"), ("digits:train", "digits@8")
    assert len({open_dataset(name).fingerprint() for name in same}) == 1
    assert len({open_dataset(name).fingerprint() for name in (*same, *other)}) == 3


def terminate_after_training() -> None:
    original = sit_atconv.training.train

    def train(*arguments: object, **options: object) -> None:
        original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)

    sit_atconv.training.train = train


def test_sigterm_after_the_last_step_is_ignored(tmp_path: Path) -> None:
    process = start_run(tmp_path / "run", NO_PREVIEW, terminate_after_training)
    process.join(60)
    assert process.exitcode == 0


def kill_the_worker() -> None:
    original = session_module.draw_fields

    def fields(positions: list[int], **settings: object) -> dict:
        if positions[0] >= 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(positions, **settings)

    session_module.draw_fields = fields


def test_a_data_worker_that_was_killed_says_that_memory_may_be_short(tmp_path: Path) -> None:
    process = start_run(tmp_path / "run", f"--data.workers 1 {NO_PREVIEW}", kill_the_worker)
    process.join(60)
    told = Path(f"{tmp_path / 'run'}.stderr").read_text()
    assert process.exitcode == 1
    assert "memory was short" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("variable", "value", "extra", "message"),
    [
        ("MIXED_PRECISION", "bf16", "", "--mixed_precision bf16 .* training.precision decides, which is no here"),
        ("MIXED_PRECISION", "no", "--training.precision bf16", None),
        ("MIXED_PRECISION", "bf16", "--training.precision bf16", None),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "", "training.accumulation decides, which is 1 here"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "--training.accumulation 2", None),
        ("GRADIENT_CLIPPING", "0.5", "", "optimizer.clip_norm decides, which is 1.0 here"),
        ("GRADIENT_CLIPPING", "1", "", None),
        ("DYNAMO_BACKEND", "NO", "", None),
        ("DYNAMO_BACKEND", "INDUCTOR", "", "training.compile decides"),
    ],
)
def test_what_launcher_and_configuration_say_differently(
    tmp_path: Path, monkeypatch, capsys, variable: str, value: str, extra: str, message: str | None
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    words = f"{NO_PREVIEW} --training.steps 1 {extra}"
    if message is None:
        run_tiny(tmp_path / "run", words)
        return
    with pytest.raises(InputError, match=message):
        run_tiny(tmp_path / "run", words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["s3://bucket/run", "s3:/bucket/run", "memory://run"])
def test_a_run_at_an_address_is_refused(tmp_path: Path, monkeypatch, address: str) -> None:
    """It would become a folder called s3: here."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--run \w+:/.* is an address, not a folder"):
        run_tiny(Path(address), NO_PREVIEW)
    assert list(tmp_path.iterdir()) == []
