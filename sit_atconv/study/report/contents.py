"""What a report says, before it is laid out as a page, Markdown, LaTeX or JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from sit_atconv.study.report.finding import finding
from sit_atconv.study.report.statistics import Summary
from sit_atconv.study.report.tables import EQUAL, HELDOUT, Entry, Table, diverged, goal_title, tables, unfinished
from sit_atconv.study.report.texts import shortened
from sit_atconv.study.results import Reached, Study
from sit_atconv.training.watch.goals import Goal

_DEFINITIONS = {
    "parameters": "all trained numbers of the model.",
    "flops": "of one forward pass of one latent or picture; a multiply-add counts as two.",
    "seconds": "seconds of the training loop; evaluations, previews and checkpoints are excluded.",
    "seconds_per_step": "seconds of training divided by steps.",
    "memory_gib": "the most that training used: of the GPU, or of the process where there is none.",
    HELDOUT: "flow-matching loss of the averaged weights on data that training does not see, after the last step: the "
    "mean over eight fixed times, with the same noise for every row.",
    "agreement": "share of samples that a classifier trained on real images recognises as the label asked for.",
    "scores": "of the samples, computed by evaluate_fid.py.",
}
_OF_IMAGES = {
    HELDOUT: "cross entropy of the averaged weights on pictures that training does not see, after the last step.",
    "scores": "accuracy on these pictures in percent, of the averaged weights; raw: of the weights in training.",
}
_ERROR_LENGTH = 300  # of an error where it stands in a line


@dataclass(frozen=True)
class Remark:
    """Something that is missing: in a few words, and in full where there is more to say."""

    short: str
    details: str = ""


@dataclass(frozen=True)
class Contents:
    """The parts of a report; `finding` and `remarks` are paragraphs, `goals` sentences about epochs to a value."""

    study: Study
    tables: list[Table]
    finding: list[str]
    remarks: list[Remark]
    table_note: str
    goals: list[str]
    definitions: list[tuple[str, str]]


def contents(study: Study) -> Contents:
    """Everything that a report says about a study."""
    compared = tables(study)
    note = (
        "Mean ± standard deviation over seeds. Below it, the difference to "
        f"{study.rows[0]} with its 95 % confidence interval, in bold if the interval excludes 0; of parameters and "
        "operations, in percent. The best mean of a column is bold."
    )
    remarks = [*_unfinished(study), *_diverged(study, compared)]
    definitions = _definitions(study, compared)
    return Contents(study, compared, _finding(study, compared), remarks, note, _goals(study), definitions)


def aggregates(told: Contents) -> dict[str, Any]:
    """All numbers for report.json: mean, sd and n, and difference, low, high and n; null where there is none."""
    return {
        "title": told.study.title,
        "finding": told.finding,
        "machine": told.study.machine,
        "command": told.study.command,
        "seeds": told.study.seeds,
        "budgets": {table.budget: _numbers(table) for table in told.tables},
        "unfinished": [
            dict(zip(("row", "budget", "seed", "state", "error"), cell, strict=True)) for cell in unfinished(told.study)
        ],
        "not_finite": [
            dict(zip(("row", "budget", "seed", "quantity"), cell, strict=True))
            for cell in diverged(told.study, told.tables)
        ],
    }


def _numbers(table: Table) -> dict[str, Any]:
    rows = {
        row.name: {"done": row.done, "quantities": {key: _entry(entry) for key, entry in row.entries.items()}}
        for row in table.rows
    }
    return {"size": table.size, "titles": {quantity.key: quantity.title for quantity in table.quantities}, "rows": rows}


def _entry(entry: Entry) -> dict[str, Any]:
    summary = entry.summary or Summary(None, None, 0)
    found = {**asdict(summary), "difference": asdict(entry.difference) if entry.difference else None}
    if entry.reached is not None:
        found |= {"n": entry.reached[0], "seeds": entry.reached[1]}
    return found


def _finding(study: Study, compared: list[Table]) -> list[str]:
    """A paragraph for each budget, after how much of the study is done where that is not all."""
    total = len(study.rows) * len(study.budgets) * len(study.seeds)
    done = sum(row.done for table in compared for row in table.rows)
    said = [f"{done} of {total} runs are done; the numbers are of these."] if done < total else []
    return [*said, *map(finding, compared)]


def _goals(study: Study) -> list[str]:
    """For each goal how it was looked for, by row where rows differ."""
    ways: dict[Goal, dict[str, list[str]]] = {}
    for cell in (each for each in study.cells if each.state == "done"):
        for reached in cell.goals:
            rows = ways.setdefault(Goal(reached.name, reached.value), {}).setdefault(_way(reached), [])
            rows += [cell.row] if cell.row not in rows else []
    said = []
    for goal, rows in ways.items():
        told = [way + (f" ({', '.join(names)})" if len(rows) > 1 else "") for way, names in rows.items()]
        title = goal_title(goal)
        meaning = "images seen over images to train on, at the first evaluation that reached it"
        said.append(f"{title[0].upper()}{title[1:]}: {meaning}, {'; '.join(told)}.")
    return said


def _way(reached: Reached) -> str:
    """How often a goal was looked for, and on what."""
    often = f"of one every {reached.every:,} steps"
    if reached.samples is None:
        return often
    scales = [f"scale {reached.guidance:g}"] if reached.guidance != 1 else []
    scales += [f"internal guidance {reached.internal_guidance:g}"] if reached.internal_guidance != 1 else []
    how = f"guided ({', '.join(scales)})" if scales else "unguided"
    return f"{often} on {reached.samples:,} {how} samples"


def _unfinished(study: Study) -> list[Remark]:
    found = []
    for row, budget, seed, state, error in unfinished(study):
        what = f"{row}, {EQUAL[budget]}, seed {seed}: {state}"
        found.append(Remark(f"{what}: {shortened(error, _ERROR_LENGTH)}" if error else what, error))
    return found


def _diverged(study: Study, compared: list[Table]) -> list[Remark]:
    return [
        Remark(f"{row}, {EQUAL[budget]}, seed {seed}: {title} is not finite; left out")
        for row, budget, seed, title in diverged(study, compared)
    ]


def _definitions(study: Study, compared: list[Table]) -> list[tuple[str, str]]:
    quantities = {quantity.key: quantity for table in compared for quantity in table.quantities}
    known = _DEFINITIONS | (_OF_IMAGES if study.network == "image" else {})
    found = [(q.title, known[q.key]) for q in quantities.values() if q.key in known]
    if scores := [q.title for q in quantities.values() if q.key.startswith("scores.")]:
        found.append((", ".join(scores), known["scores"]))
    return [
        *found,
        ("±", "standard deviation over seeds (divided by n − 1): how much one run differs from the next."),
        (
            "interval",
            f"of the mean difference to {study.rows[0]}, seed by seed, over the seeds that both rows have finished: "
            "Student's t, 95 %. Each stands for itself; of many, one in twenty excludes 0 by chance.",
        ),
    ]
