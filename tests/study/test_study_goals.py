"""Epochs to a value: collected from the logs of runs, and told in every format of the report without flattery."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from study_example import example_study
from test_report import study_of
from test_study_checks import FILE, check
from test_study_collect import LINES, PLAN, write_cell

from sit_atconv.errors import InputError
from sit_atconv.study.collect import collect
from sit_atconv.study.commands import cell_folder
from sit_atconv.study.plan import CellName
from sit_atconv.study.report import write_report
from sit_atconv.study.report.contents import aggregates, contents
from sit_atconv.study.report.texts import entry_text
from sit_atconv.study.results import Reached, Study, read_results, write_results

FID = "epochs_to_fid_2"
GOALS = {"fid": 2.0, "heldout_loss": 0.65, "is": 9.0}


def with_epochs(study: Study, epochs: dict[str, list[float | None]], guidance: float = 1.0) -> Study:
    """The study with a goal of FID 2 and these epochs to it, by row and seed."""
    found = {
        row: [Reached("fid", 2.0, number, 500, 1000, guidance) for number in numbers] for row, numbers in epochs.items()
    }
    cells = [replace(c, goals=[found[c.row][c.seed]]) if c.row in found else c for c in study.cells]
    return replace(study, cells=cells)


def texts(study: Study) -> list[tuple[str, str]]:
    """What the column of the goal says of each row: value and difference."""
    (table,) = contents(study).tables
    (column,) = [quantity for quantity in table.columns if quantity.key == FID]
    assert column.heading == "epochs to FID ≤ 2 ↓"
    return [(text.value, text.full_difference) for text in (entry_text(table, row, column) for row in table.rows)]


def test_goals_and_epochs_are_collected_from_the_run(tmp_path: Path) -> None:
    write_cell(tmp_path, CellName("a", "steps", 0))
    run = cell_folder(tmp_path, CellName("a", "steps", 0)) / "run"
    evaluation = {"reference": "r", "loss": True, "every": 5, "samples": 70, "guidance": 1.5, "goals": GOALS}
    (run / "config.yaml").write_text(yaml.safe_dump({"evaluation": evaluation, "data": {"path": "d"}}))
    lines = [*LINES, {"step": 15, "fid": 1.9, FID: 3.5}, {"step": 20, "is": 8.9, "epochs_to_heldout_loss_0.65": 4}]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    cell, other = collect(PLAN, tmp_path, "").cells
    assert cell.goals == [
        Reached("fid", 2.0, 3.5, 5, 70, 1.5),
        Reached("heldout_loss", 0.65, 4.0, 5, None, 1.5),
        Reached("is", 9.0, None, 5, 70, 1.5),
    ]
    assert other.goals == []
    write_results(collect(PLAN, tmp_path, ""), tmp_path)
    assert read_results(tmp_path).cells[0].goals == cell.goals
    (run / "config.yaml").write_text("evaluation: {goals: {fid: low}}")
    with pytest.raises(InputError, match=r"config.yaml: evaluation.goals.*Expected `float`"):
        collect(PLAN, tmp_path, "")
    (run / "config.yaml").write_text("evaluation: [")
    with pytest.raises(InputError, match=r"config.yaml is not a configuration"):
        collect(PLAN, tmp_path, "")


def test_results_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    values = asdict(example_study())
    for cell in values["cells"]:
        del cell["goals"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    assert read_results(tmp_path) == example_study()
    assert contents(read_results(tmp_path)).goals == []


def test_a_mean_is_that_of_all_seeds_or_none() -> None:
    losses = {name: [1.0, 1.1, 1.2] for name in ("all", "some", "never", "none")}
    epochs = {"all": [10.0, 11.0, 12.0], "some": [5.0, None, 6.0], "never": [None] * 3}
    study = with_epochs(study_of(losses), epochs)
    assert texts(study) == [
        ("11.0 ± 1.0", ""),
        ("not reached (2 of 3 seeds did)", ""),
        ("not reached (0 of 3 seeds did)", ""),
        ("–", ""),  # it has no such goal
    ]
    assert contents(study).remarks == []
    rows = aggregates(contents(study))["budgets"]["steps"]["rows"]
    entry = rows["some"]["quantities"][FID]
    assert (entry["mean"], entry["sd"], entry["n"], entry["seeds"], entry["difference"]) == (None, None, 2, 3, None)
    assert "seeds" not in rows["none"]["quantities"][FID]
    assert json.dumps(rows, allow_nan=False)


def test_differences_need_both_rows_to_have_reached_it() -> None:
    losses = {"first": [1.0, 1.1], "other": [1.0, 1.1]}
    both = with_epochs(study_of(losses), {"first": [10.0, 12.0], "other": [8.0, 10.0]})
    assert texts(both)[1] == ("9.0 ± 1.4", "−2 (in every seed)")
    one = with_epochs(study_of(losses), {"first": [10.0, None], "other": [8.0, 10.0]})
    assert texts(one) == [("not reached (1 of 2 seeds did)", ""), ("9.0 ± 1.4", "")]


def test_every_format_says_it_and_how_it_was_measured(tmp_path: Path) -> None:
    study = example_study(tmp_path)
    epochs = {row: [3.0, 4.0, None, 5.0, 6.0] for row in study.rows[:2]}
    study = with_epochs(with_epochs(study, {study.rows[0]: epochs[study.rows[0]]}), {study.rows[1]: [7.5] * 5}, 1.8)
    write_report(study, tmp_path)
    told = (
        "images seen over images to train on, at the first evaluation that reached it, of one every 500 steps on 1,000 "
        "unguided samples (attention); of one every 500 steps on 1,000 guided (scale 1.8) samples (hybrid)."
    )
    assert contents(study).goals == [f"Epochs to FID ≤ 2: {told}"]
    page, markdown, tex = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md", "tex"))
    for text, column in ((page, "epochs to FID ≤ 2 ↓"), (markdown, "epochs to FID ≤ 2 ↓"), (tex, r"FID $\leq$ 2")):
        assert column in text and "not reached (4 of 5 seeds did)" in text and "7.5" in text
        assert " ".join(told.split()) in " ".join(text.split())
    assert tex.count("images seen over") == 2  # under the results of each budget, not under the costs


@pytest.mark.parametrize(
    ("goals", "said"),
    [
        ("{fid: 2}", "The row attention: evaluation.goals names fid, which is not measured"),
        ("{heldout_loss: 2}", "The row attention: evaluation.goals names heldout_loss, which is not measured"),
    ],
)
def test_goals_of_what_is_not_measured_are_refused_before_anything_runs(tmp_path: Path, goals: str, said: str) -> None:
    keys = f"model.depth: 2, evaluation: {{reference: 'digits:heldout@16', features: pixels, goals: {goals}}}"
    with pytest.raises(InputError, match=said):
        check(tmp_path, FILE.replace("model.depth: 2", keys))
