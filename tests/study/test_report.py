"""What a report says of a study whose numbers are known, whatever stands in it, and in every format."""

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from scipy import stats
from study_example import ERROR, example_study

from sit_atconv.study.report import write_report
from sit_atconv.study.report.__main__ import main
from sit_atconv.study.report.contents import contents
from sit_atconv.study.results import Cell, Study, write_results

NAMES = [
    "plain",
    "<script>alert(1)</script>",
    "a & b | c_d $\\frac 50% #1 {x} ~^",
    "😀 Ångström \"quoted\" 'x'",
    "x" * 200,
]


def study_of(losses: dict[str, list[float | None]], budgets: dict[str, float] | None = None) -> Study:
    """A study with these held-out losses by row and seed, and nothing else; None is a run that is still waiting."""
    budgets = budgets or {"steps": 100}
    seeds = list(range(len(next(iter(losses.values())))))
    cells = [_cell(row, budget, seed, losses[row][seed]) for row in losses for budget in budgets for seed in seeds]
    return Study("Title", list(losses), seeds, budgets, "machine", "command", cells)


def _cell(row: str, budget: str, seed: int, loss: float | None) -> Cell:
    state = "waiting" if loss is None else "done"
    return Cell(row, budget, seed, state, None, [], *[None] * 6, loss, {}, None, [], None)


def said(study: Study) -> str:
    return " ".join(contents(study).finding)


def test_a_row_that_beats_the_first_is_named_with_its_interval() -> None:
    text = said(study_of({"attention": [2.0, 2.1, 2.3], "new": [1.0, 1.2, 1.2], "worse": [3.0, 3.1, 3.4]}))
    assert "At equal steps (100 steps), new has the lowest held-out loss: 1.13 ± 0.12 over 3 seeds." in text
    # differences -1, -0.9, -1.1: t = 4.302653 with two degrees of freedom, times 0.1 / √3
    assert "new minus attention, is −1.00 [−1.25, −0.75] over 3 seeds: the 95 % confidence interval excludes 0" in text
    assert "Lower than attention with an interval that excludes 0: new." in text
    assert "Higher with an interval that excludes 0: worse." in text


def test_a_first_row_that_is_not_beaten_is_said_to_be_so() -> None:
    text = said(study_of({"attention": [1.0, 1.2, 1.4], "new": [2.0, 2.1, 2.6]}))
    assert "attention has the lowest held-out loss" in text
    assert "No row beats attention by a difference whose interval excludes 0." in text


def test_a_lower_mean_whose_interval_includes_0_does_not_beat_the_first_row() -> None:
    text = said(study_of({"attention": [1.0, 1.2, 1.4], "new": [0.5, 1.3, 1.3]}))
    assert "new has the lowest held-out loss" in text
    assert "confidence interval includes 0" in text
    assert "No row beats attention" in text
    assert "Not told apart from attention by these seeds: new." in text


def test_one_seed_has_no_interval_and_it_is_said() -> None:
    study = study_of({"attention": [2.0], "new": [1.0]})
    assert "is −1 (one seed: no interval): what another seed would give is not known." in said(study)
    assert "No row beats attention" in said(study)


def test_missing_results_are_said() -> None:
    assert "there is no held-out loss" in said(study_of({"attention": [None], "new": [None]}))
    assert "attention, which the others are to be compared with, has none" in said(
        study_of({"attention": [None, None], "new": [1.0, 2.0]})
    )
    assert "share no seed" in said(study_of({"attention": [2.0, None], "new": [None, 1.0]}))
    assert said(study_of({"alone": [1.0, 2.0]})).endswith(
        "alone has the lowest held-out loss: 1.50 ± 0.71 over 2 seeds."
    )


def test_a_loss_that_is_not_finite_is_left_out_and_named() -> None:
    told = contents(study_of({"attention": [1.0, 1.1, 1.3], "new": [0.5, math.nan, 0.9]}))
    assert told.tables[0].rows[1].entries["heldout_loss"].summary.n == 2
    assert [remark.short for remark in told.remarks] == [
        "new, equal steps, seed 1: held-out loss is not finite; left out"
    ]


def test_cells_that_the_results_lack_are_waiting() -> None:
    study = study_of({"attention": [1.0, 2.0], "new": [1.0, 2.0]})
    told = contents(replace(study, cells=study.cells[:-1]))
    assert [remark.short for remark in told.remarks] == ["new, equal steps, seed 1: waiting"]
    assert told.finding[0] == "3 of 4 runs are done; the numbers are of these."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example study with its report."""
    folder = tmp_path_factory.mktemp("study")
    study = example_study(folder)
    write_results(study, folder)
    write_report(study, folder)
    return folder


def test_report_json_has_every_number(folder: Path) -> None:
    study = example_study()
    found = json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    loss = {row: [c.heldout_loss for c in study.cells if (c.row, c.budget) == (row, "steps")] for row in study.rows}
    row = found["budgets"]["steps"]["rows"]["hybrid"]["quantities"]["heldout_loss"]
    interval = stats.ttest_rel(loss["hybrid"], loss["attention"]).confidence_interval()
    assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx((interval.low, interval.high))
    assert (row["mean"], row["n"]) == (pytest.approx(sum(loss["hybrid"]) / 5), 5)
    [failed] = found["unfinished"]
    assert failed == {"row": "atconv-raster", "budget": "seconds", "seed": 3, "state": "failed", "error": ERROR}
    assert found["budgets"]["seconds"]["rows"]["atconv-raster"]["done"] == 4
    assert {"scores.fd_pixels", "scores.fid", "agreement", "flops"} <= found["budgets"]["steps"]["titles"].keys()


def test_every_format_names_the_numbers_and_the_failure(folder: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        for part in ("3.30 M", "103 M", "FD-pixels ↓", "label agreement ↑", "atconv-raster (4 of 5 seeds)"):
            assert part in text, (name, part)
        assert "not enough memory" in text
    tex = (folder / "report.tex").read_text()
    assert tex.count(r"\begin{tabular}{lrrrr}") == 2  # results
    assert tex.count(r"\begin{tabular}{lrrrrr}") == 2  # costs
    assert r"atconv-raster (4 of 5 seeds) & 0.16" in tex


def test_the_example_page_loads_nothing_and_shows_all_samples(folder: Path) -> None:
    page = read_page(folder)
    assert not page.outside
    assert page.text.count("Samples, equal") == 2
    assert page.tags.count("img") == 10
    assert len(page.ids) == len(set(page.ids))


class Page(HTMLParser):
    """What is in a page: its tags, ids, text, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.ids, self.outside, self.text = [], [], [], ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "action") and not value.startswith(
                ("#", "data:image/png")
            ):
                self.outside.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(folder: Path) -> Page:
    page = Page()
    page.feed((folder / "report.html").read_text())
    return page


def hostile_study(folder: Path) -> Study:
    """The example study in which names, title and errors hold what must be escaped."""
    study = example_study(folder)
    names = dict(zip(study.rows, NAMES, strict=True))
    cells = [
        replace(c, row=names[c.row], error=c.error and "".join(NAMES), commands=[*c.commands, "</pre>```<b>"])
        for c in study.cells
    ]
    strange = [replace(c, scores={**c.scores, "odd<b>&_$": 1.0}) for c in cells]
    return replace(study, title=" ".join(NAMES), rows=NAMES, machine="<i>&", command="a\n```\n</pre>", cells=strange)


def test_names_of_any_kind_stand_in_the_page_as_they_are(tmp_path: Path) -> None:
    write_report(hostile_study(tmp_path), tmp_path)
    page = read_page(tmp_path)
    assert "script" not in page.tags
    assert not {"b", "i"} & set(page.tags)
    for name in NAMES:
        assert name in page.text
    assert not page.outside


def test_names_of_any_kind_in_markdown(tmp_path: Path) -> None:
    write_report(hostile_study(tmp_path), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "\\<script\\>alert(1)\\</script\\>" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {line.replace("\\|", "").count("|") for line in rows}
    assert len(columns) == 1  # a name with "|" adds no column
    assert "    a\n    ```\n    </pre>" in text


def test_results_that_are_empty_or_have_no_pictures_give_a_report(tmp_path: Path) -> None:
    study = example_study(tmp_path)
    broken = replace(study.cells[0], grid="cells/attention/steps-0/samples/broken.png")
    (tmp_path / broken.grid).write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    absent = replace(study.cells[1], grid="nowhere.png")
    write_report(replace(study, cells=[broken, absent, *study.cells[2:]]), tmp_path)
    text = read_page(tmp_path).text
    assert "broken.png cannot be read" in text
    assert "nowhere.png cannot be read" in text
    write_report(replace(study, cells=[]), tmp_path)
    assert "0 of 50 runs are done" in read_page(tmp_path).text


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    study = example_study(tmp_path)
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / study.cells[0].grid)
    write_report(study, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_without_matplotlib_the_report_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(example_study(tmp_path), tmp_path)
    assert "Curves need matplotlib: pip install 'sit-atconv[plot]'." in read_page(tmp_path).text


def test_the_command_writes_the_report_and_the_figure(folder: Path, tmp_path: Path) -> None:
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    main([str(folder)])
    assert (folder / "report.html").read_bytes() == before
    main([str(folder), "--figure", str(tmp_path / "new" / "curves.png")])
    with Image.open(tmp_path / "new" / "curves.png") as figure:
        assert figure.width > 1000
    main([str(folder), "--figure", str(tmp_path / "curves.svg")])
    assert "atconv-raster" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("of", ["empty folder", "other file", "ending", "no curves"])
def test_what_the_command_cannot_use_is_said_in_a_paragraph(
    of: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if of == "other file":
        (tmp_path / "results.json").write_text('{"title": 3}')
    if of == "no curves":
        write_results(replace(example_study(), cells=[]), tmp_path)
    words = {
        "empty folder": ([str(tmp_path)], "results.json: No such file"),
        "other file": ([str(tmp_path)], "results.json: title: Expected `str`, got `int`"),
        "ending": ([str(folder), "--figure", "curves.txt"], "curves.txt is neither a .png nor a .svg file"),
        "no curves": ([str(tmp_path), "--figure", str(tmp_path / "a.png")], "no run is done that has a curve"),
    }
    arguments, message = words[of]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
