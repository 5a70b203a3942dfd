"""The report of a study from its results: `python -m sit_atconv.study.report DIR [--figure OUT.png]`."""

import logging
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.errors import InputError, exit_on_input_error
from sit_atconv.runtime.arguments import Parser
from sit_atconv.runtime.whole_files import make_folder_of
from sit_atconv.study.report import write_report
from sit_atconv.study.report.charts import draw_figure
from sit_atconv.study.results import read_results

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m sit_atconv.study.report", description="The report of a study, from its results.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the study's folder, which holds results.json")
    parser.add_argument("--figure", type=Path, metavar="OUT", help="draw only the curves, into a .png or .svg file")
    options = parser.parse_args(argv)
    with exit_on_input_error():
        study = read_results(options.folder)
        if options.figure is None:
            write_report(study, options.folder)
            log.info("%s", options.folder / "report.html")
        else:
            if options.figure.suffix.lower() not in (".png", ".svg"):
                raise InputError(
                    f"{options.figure} is neither a .png nor a .svg file: name such a file for the figure."
                )
            make_folder_of(options.figure)
            draw_figure(study, options.figure)
            log.info("%s", options.figure)


if __name__ == "__main__":
    main()
