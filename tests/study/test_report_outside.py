"""Reports in the programs that people open them with: a browser and LaTeX, where they are installed."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from study_example import example_study
from test_report import hostile_study

from sit_atconv.study.report import write_report
from sit_atconv.study.results import Study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
LATEX = shutil.which("pdflatex")

# A page that shows the report in a frame of this width, and says how far it overhangs and how many pictures it has.
FRAME = """<iframe src="report.html" style="border: 0; width: {width}px; height: 2000px"></iframe><script>
onload = () => {{
  const root = frames[0].document.documentElement;
  console.log("measured " + JSON.stringify([root.scrollWidth - root.clientWidth, frames[0].document.images.length]));
}}
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("make", [example_study, hostile_study])
def test_a_browser_shows_the_report_without_errors_and_no_wider_than_its_window(
    make: Callable[[Path], Study], tmp_path: Path
) -> None:
    write_report(make(tmp_path), tmp_path)
    for width in (1400, 400):
        [said] = console(tmp_path, FRAME.format(width=width))
        assert json.loads(said) == [0, 10]


def console(folder: Path, page: str) -> list[str]:
    """What the measuring page logs; anything else in the console, of the report or an exception, fails the test."""
    (folder / "frame.html").write_text(page)
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom")
    ran = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder}/profile", "--enable-logging=stderr", str(folder / "frame.html")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line.partition("CONSOLE")[2] for line in ran.stderr.splitlines() if "CONSOLE" in line]
    unexpected = [line for line in lines if '"measured ' not in line]
    assert not unexpected
    return [line.partition('"measured ')[2].partition('", source')[0] for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(LATEX is None, reason="needs pdflatex")
@pytest.mark.parametrize("make", [example_study, hostile_study])
def test_latex_compiles_the_tables(make: Callable[[Path], Study], tmp_path: Path) -> None:
    write_report(make(tmp_path), tmp_path)
    (tmp_path / "main.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}\begin{document}\input{report.tex}\end{document}"
    )
    ran = subprocess.run(
        [LATEX, "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "main.pdf").is_file()
