"""Compare rows of configurations over seeds: `python -m sit_atconv.study STUDY.yaml --out DIR`.

Trains, samples and scores every cell (row, budget, seed) with the programs of this checkout, and writes
DIR/report.html. The same command continues a study that was interrupted. `python -m sit_atconv.study costs` measures
what mixers cost.
"""

from sit_atconv.runtime.terminal import begin_command

if __name__ == "__main__":
    begin_command()  # Ctrl-C while the rest is imported

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sit_atconv.errors import InputError, exit_on_input_error, require_one_of
from sit_atconv.evaluation.output import show
from sit_atconv.runtime.arguments import Parser, whole_number
from sit_atconv.runtime.lock import lock_folder
from sit_atconv.study.checks import check_plan, load_base
from sit_atconv.study.collect import collect
from sit_atconv.study.commands import ROOT, cell_commands
from sit_atconv.study.folder import STUDY, begin_folder, require_same_study
from sit_atconv.study.plan import CellName, Plan, read_plan
from sit_atconv.study.results import Study, write_results
from sit_atconv.study.room import require_room
from sit_atconv.study.running import Outcome, Runner

log = logging.getLogger(__name__)

_MOST_AT_ONCE = 1_024


def _parser() -> Parser:
    summary, details = __doc__.split("\n\n")
    parser = Parser(prog="python -m sit_atconv.study", description=summary, epilog=details)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="what to compare: docs/study.md describes the file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the study, made or continued")
    add(
        "--parallel", type=whole_number(1, _MOST_AT_ONCE), default=1, metavar="N", help="cells at once (1 unless given)"
    )
    only = parser.add_mutually_exclusive_group()
    jobs = "run nothing, and print a command line for each cell that is not done"
    only.add_argument("--print-jobs", action="store_true", help=jobs)
    only.add_argument("--cell", metavar="ROW/BUDGET-SEED", help="run this cell only, and write no report")
    only.add_argument("--report", action="store_true", help="write results and report anew from what is there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["costs"]:
        from sit_atconv.study.costs import main as costs

        costs(words[1:])
        return
    options = _parser().parse_args(words)
    command = shlex.join(["python", "-m", "sit_atconv.study", *words])
    with exit_on_input_error():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("A study starts the programs itself: start it with python, without a launcher.")
        plan, folder = read_plan(options.study), options.out.resolve()
        cells = list(plan.cells())
        if options.cell is not None:
            cells = [_find(options.cell, cells)]
        base = load_base(plan)
        require_same_study(plan, base, folder)
        if options.report:
            if not (folder / STUDY).exists():
                raise InputError(f"{folder} holds no study yet: leave out --report to run it.")
            report(plan, folder, command)
            return
        require_room(plan, folder, check_plan(plan))
        begin_folder(plan, base, folder)
        if options.print_jobs:
            show("".join(f"{line}\n" for line in jobs(plan, folder)))
            return
        alone = options.cell is not None  # then others may run the other cells, and who collects reports on all
        runner = Runner(plan, folder, options.parallel, lambda: None if alone else collected(plan, folder, command))
        outcome = runner.run(cells)
        if not alone and outcome.stopped is None:
            report(plan, folder, command)
        _leave(outcome, len(cells))


def _find(name: str, cells: Sequence[CellName]) -> CellName:
    names = {str(cell): cell for cell in cells}
    require_one_of(name, names, "cell")
    return names[name]


def collected(plan: Plan, folder: Path, command: str) -> Study:
    """Collect the results of the study as it stands, and write results.json."""
    study = collect(plan, folder, command)
    with lock_folder(folder, "written", "--out", wait=True):
        write_results(study, folder)
    return study


def report(plan: Plan, folder: Path, command: str) -> None:
    """Collect the results, and write them and the report."""
    from sit_atconv.study.report import write_report

    study = collected(plan, folder, command)
    with lock_folder(folder, "written", "--out", wait=True):
        write_report(study, folder)
    if "; " in study.machine:
        log.warning("The cells ran in different places, so compare their times with care: %s.", study.machine)
    done = sum(cell.state == "done" for cell in study.cells)
    log.info("%d of %d cells are done. The report: %s", done, len(study.cells), folder / "report.html")


def _leave(outcome: Outcome, cells: int) -> None:
    """Say what is left to do, and end the command with the code for it."""
    if outcome.elsewhere:
        names = ", ".join(map(str, outcome.elsewhere))
        log.info("Other processes run %s: run the same command again when they are done.", names)
    if outcome.stopped is not None:
        log.info("Stopped: %d of %d cells are done. To go on, run the same command again.", len(outcome.done), cells)
        sys.exit(128 + outcome.stopped)
    if outcome.failed:
        names = ", ".join(map(str, outcome.failed))
        log.error("%d of %d cells failed: %s. The same command tries them again.", len(outcome.failed), cells, names)
        sys.exit(1)


def jobs(plan: Plan, folder: Path) -> list[str]:
    """A command line for every cell that is not done, to be run in any order, at once, and on any machine."""
    module = shlex.join([sys.executable, "-m", "sit_atconv.study", str(folder / STUDY), "--out", str(folder)])
    waiting = (cell for cell in plan.cells() if not all(each.complete for each in cell_commands(plan, folder, cell)))
    return [f"cd {shlex.quote(str(ROOT))} && {module} --cell {cell}" for cell in waiting]


if __name__ == "__main__":
    main()
