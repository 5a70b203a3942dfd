"""Results: what the programs of a cell have written becomes a cell of results.json."""

import json
from pathlib import Path

import pytest

from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.models.flops import forward_flops
from sit_atconv.study.collect import collect, curve
from sit_atconv.study.commands import cell_folder
from sit_atconv.study.plan import Budgets, CellName, Plan
from sit_atconv.study.results import Point, read_results, write_results

SCORES = [{"reference": "digits:train", "features": "pixels"}, {"reference": "digits:heldout", "features": "pixels"}]
PLAN = Plan("base.yaml", {"a": {}, "b": {}}, [0], Budgets(steps=20), "Two", {}, {"num-samples": 4}, SCORES, SCORES[0])
LINES = [
    {"step": 0, "note": "a note"},
    {"step": 10, "loss": 0.5, "seconds": 2.0, "seconds_per_step": 0.2, "memory_gib": 1.5},
    {"step": 15, "heldout_loss": 0.7, "heldout_loss_t0.0625": 0.9},
    {"step": 20, "loss": 0.25, "seconds": 3.0, "seconds_per_step": 0.1, "memory_gib": 1.25},
    {"step": 20, "heldout_loss": 0.625},
]


def write_cell(folder: Path, cell: CellName) -> None:
    """A finished cell, as its programs leave it."""
    at = cell_folder(folder, cell)
    checkpoint = at / "run" / "checkpoints" / "step-0000020"
    model = create_model("SiT-S/2", input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=2, num_heads=2)
    model.save_config(checkpoint / "model")
    (checkpoint / "position.json").write_text(json.dumps({"step": 20}))
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)
    (at / "run" / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES))
    (at / "samples").mkdir()
    for name in ("samples.npz", "grid.png"):
        (at / "samples" / name).touch()
    for number, value in enumerate((1.5, 2.5)):
        metrics = {"fd_pixels": value, **({"recall_pixels": 0.5} if number else {})}
        (at / f"scores-{number}.json").write_text(json.dumps({"metrics": metrics, "warnings": []}))
    (at / "agreement.json").write_text(json.dumps({"label_agreement": 0.75, "classifier_accuracy": 0.9}))
    (at / "machine.json").write_text('["a machine"]')


def test_what_the_programs_wrote_is_collected(tmp_path: Path) -> None:
    write_cell(tmp_path, CellName("a", "steps", 0))
    study = collect(PLAN, tmp_path, "the command")
    assert (study.title, study.rows, study.seeds, study.budgets) == ("Two", ["a", "b"], [0], {"steps": 20.0})
    assert (study.machine, study.command) == ("a machine", "the command")
    cell, other = study.cells
    model = create_model("SiT-S/2", input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=2, num_heads=2)
    assert cell.parameters == sum(p.numel() for p in model.parameters())
    assert cell.flops == forward_flops(model, (1, 8, 8))
    assert (cell.state, cell.error, cell.steps, cell.seconds, cell.seconds_per_step) == ("done", None, 20, 3.0, 0.15)
    assert (cell.memory_gib, cell.heldout_loss, cell.agreement) == (1.5, 0.625, 0.75)
    assert cell.scores == {"0-fd_pixels": 1.5, "1-fd_pixels": 2.5, "recall_pixels": 0.5}
    assert cell.grid == "cells/a/steps-0/samples/grid.png"
    assert len(cell.commands) == 5
    assert (other.state, other.steps, other.scores, other.curve, other.grid) == ("waiting", None, {}, [], None)

    write_results(study, tmp_path)
    assert read_results(tmp_path) == study


def test_a_failed_cell_says_why_until_it_is_done(tmp_path: Path) -> None:
    at = cell_folder(tmp_path, CellName("a", "steps", 0))
    at.mkdir(parents=True)
    (at / "error.txt").write_text("a/steps-0: training ended with exit code 1\n")
    cell = collect(PLAN, tmp_path, "").cells[0]
    assert (cell.state, cell.error) == ("failed", "a/steps-0: training ended with exit code 1")


def test_a_run_limited_by_time_is_complete_when_its_checkpoint_says_so(tmp_path: Path) -> None:
    cell, plan = CellName("a", "seconds", 0), Plan("base.yaml", {"a": {}}, [0], Budgets(seconds=3))
    write_cell(tmp_path, cell)
    assert collect(plan, tmp_path, "").cells[0].state == "waiting"
    position = cell_folder(tmp_path, cell) / "run" / "checkpoints" / "latest" / "position.json"
    position.write_text(json.dumps({"step": 20, "out_of_time": True}))
    assert collect(plan, tmp_path, "").cells[0].state == "done"


def test_the_time_of_a_held_out_loss_between_two_lines_is_interpolated() -> None:
    assert curve(LINES) == [Point(10, 2.0, None, 0.5), Point(15, 2.5, 0.7, None), Point(20, 3.0, 0.625, 0.25)]
    assert curve([]) == []


def test_a_result_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_cell(tmp_path, CellName("a", "steps", 0))
    path = cell_folder(tmp_path, CellName("a", "steps", 0)) / "scores-0.json"
    path.write_text('{"metrics": {"fd_pixels": "low"}}')
    with pytest.raises(InputError, match=r"scores-0.json: metrics"):
        collect(PLAN, tmp_path, "")
