"""Curves over seeds: means and bands whose values are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from study_example import example_study

from sit_atconv.study.report.curves import curve, panels
from sit_atconv.study.results import Cell, Point


def cell(points: list[tuple[float, float | None]]) -> Cell:
    some = example_study().cells[0]
    return replace(some, curve=[Point(int(x), 2.0 * x, y, None) for x, y in points])


def test_the_mean_of_straight_lines_is_exact_wherever_they_were_measured() -> None:
    one = cell([(x, 2.0 * x) for x in (0, 10, 30, 60)])
    other = cell([(x, 4.0 * x + 6) for x in (6, 20, 45)])
    found = curve([one, other], "step", "heldout_loss")
    assert found.x.tolist() == [6, 10, 20, 30, 45]  # the places of both, where both have values
    assert found.mean == pytest.approx(3 * found.x + 3)
    assert found.low == pytest.approx(2 * found.x)
    assert found.high == pytest.approx(4 * found.x + 6)
    over_time = curve([one, other], "seconds", "heldout_loss")
    assert over_time.x.tolist() == [12, 20, 40, 60, 90]
    assert over_time.mean == pytest.approx(found.mean)


def test_missing_and_infinite_values_are_passed_over() -> None:
    found = curve([cell([(0, 1.0), (1, None), (2, math.nan), (3, math.inf), (4, 5.0)])], "step", "heldout_loss")
    assert found.x.tolist() == [0, 4]
    assert found.mean.tolist() == found.low.tolist() == found.high.tolist() == [1, 5]
    assert curve([cell([(0, math.nan)])], "step", "heldout_loss") is None
    assert curve([], "step", "heldout_loss") is None


def test_runs_that_share_no_stretch_have_no_curve() -> None:
    assert curve([cell([(0, 1.0), (1, 1.0)]), cell([(5, 1.0), (6, 1.0)])], "step", "heldout_loss") is None


def test_a_long_log_is_thinned() -> None:
    found = curve([cell([(x, 3.0 * x) for x in range(5000)])], "step", "heldout_loss")
    assert len(found.x) == 400
    assert np.allclose(found.mean, 3 * found.x)


def test_steps_are_of_runs_with_equal_steps_and_seconds_of_those_with_equal_time() -> None:
    study = example_study()
    assert [(panel.axis, panel.budget) for panel in panels(study)] == [("step", "steps"), ("seconds", "seconds")]
    only = replace(study, budgets={"seconds": 240})
    assert [(panel.axis, panel.budget) for panel in panels(only)] == [("step", "seconds"), ("seconds", "seconds")]
    assert list(panels(study)[0].curves) == study.rows


def test_the_training_loss_stands_in_where_nothing_is_held_out() -> None:
    study = example_study()
    without = [replace(c, curve=[replace(p, heldout_loss=None) for p in c.curve]) for c in study.cells]
    assert {panel.quantity for panel in panels(study)} == {"heldout_loss"}
    assert {panel.quantity for panel in panels(replace(study, cells=without))} == {"loss"}
    assert panels(replace(study, cells=[])) == []
