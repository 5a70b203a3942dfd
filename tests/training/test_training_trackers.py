"""What trackers are handed: pictures, and on continuing the same run. W&B is a stand-in that notes what it is told."""

import json
from pathlib import Path

import accelerate.tracking
import numpy as np
import pytest
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import run_tiny

WANDB = '''"""A stand-in: every call is a line of calls.jsonl beside this file."""

import json
from pathlib import Path

import numpy as np


def note(**values):
    with Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\\n")


class Image:
    def __init__(self, pixels):
        self.told = [str(np.asarray(pixels).dtype), *np.asarray(pixels).shape]


class Run:
    def log(self, values, step=None):
        pictures = {key: [each.told for each in value] for key, value in values.items() if isinstance(value, list)}
        note(call="log", step=step, names=sorted(values), pictures=pictures)

    def finish(self):
        note(call="finish")


class config:
    @staticmethod
    def update(values, allow_val_change):
        note(call="config", steps=values["training.steps"])


def init(**options):
    note(call="init", **options)
    return Run()
'''


def test_tensorboard_is_handed_the_grids_and_a_run_that_goes_on_hides_what_it_does_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_tiny(run, '--preview.every 2 --log.checkpoint_every 4 --log.trackers ["tensorboard"]')
    run_tiny(run, '--preview.every 2 --log.checkpoint_every 4 --log.trackers ["tensorboard"]', resume="4")
    events = EventAccumulator(str(run / "sit-atconv"), {"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    last = events.Images("samples")[-1]
    grid = np.asarray(Image.open(run / "samples" / "step-0000006.png"))
    assert (last.height, last.width) == grid.shape[:2]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in for wandb writes what it is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    available = [*accelerate.tracking._available_trackers, LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", available)
    return tmp_path / "packages" / "calls.jsonl"


def test_wandb_keeps_its_files_in_the_run_and_goes_on_with_the_same_one(tmp_path: Path, calls: Path) -> None:
    run, words = tmp_path / "run", '--preview.every 3 --log.trackers ["wandb"]'
    run_tiny(run, words)
    run_tiny(run, f"{words} --training.steps 9")
    run_tiny(tmp_path / "other", words)
    told = [json.loads(line) for line in calls.read_text().splitlines()]
    first, again, other = (line for line in told if line["call"] == "init")
    assert first == again == {"call": "init", "project": "sit-atconv", "dir": str(run), "id": first["id"], **RESUME}
    assert len(first["id"]) == 16 and other["id"] != first["id"]
    assert [line["steps"] for line in told if line["call"] == "config"] == [6, 9, 6]
    pictures = {line["step"]: line["pictures"]["samples"] for line in told if line.get("pictures")}
    height, width = np.asarray(Image.open(run / "samples" / "step-0000009.png")).shape[:2]
    assert pictures == {step: [["uint8", height, width, 3]] for step in (3, 6, 9)}


RESUME = {"resume": "allow"}
