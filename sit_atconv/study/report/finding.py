"""What a comparison shows, in words: computed from the held-out loss and its intervals."""

from sit_atconv.study.report.statistics import Difference
from sit_atconv.study.report.tables import EQUAL, HELDOUT, UNITS, Row, Table
from sit_atconv.study.report.texts import difference_text, value_text


def finding(table: Table) -> str:
    """A paragraph: the row with the lowest held-out loss, and which rows differ from the first."""
    return " ".join(_sentences(table))


def _sentences(table: Table) -> list[str]:
    where = f"At {EQUAL[table.budget]} ({table.size:,.10g} {UNITS[table.budget]})"
    measured = [row for row in table.rows if HELDOUT in row.entries and row.entries[HELDOUT].summary]
    if not measured:
        return [f"{where} there is no held-out loss, so there is nothing to say about it."]
    first = table.rows[0]
    best = min(measured, key=lambda row: row.entries[HELDOUT].summary.mean)
    said = [f"{where}, {best.name} has the lowest held-out loss: {_mean(best)}."]
    if len(table.rows) == 1:
        return said
    if first not in measured:
        return [*said, f"{first.name}, which the others are to be compared with, has none."]
    if best is not first:
        said.append(f"{first.name} has {_mean(first)}.")
        said.append(_about(best, first))
    return [*said, *_verdicts(measured, first)]


def _about(best: Row, first: Row) -> str:
    """The difference between the best row and the first one."""
    difference = best.entries[HELDOUT].difference
    if difference is None:
        return f"{best.name} and {first.name} share no seed, so there is no paired difference."
    text = f"The difference, {best.name} minus {first.name}, is {difference_text(difference)}"
    if difference.low is None:
        return f"{text}: what another seed would give is not known."
    interval = "excludes" if difference.sign else "includes"
    return f"{text} over {_seeds(difference.n)}: the 95 % confidence interval {interval} 0."


def _verdicts(measured: list[Row], first: Row) -> list[str]:
    """Who is below the first row, who is above, and for whom the seeds do not tell."""
    differences = {row.name: row.entries[HELDOUT].difference for row in measured if row is not first}
    lower, undecided, higher = (
        [name for name, difference in differences.items() if _sign(difference) == sign] for sign in (-1, 0, 1)
    )
    said = [f"Lower than {first.name} with an interval that excludes 0: {_listed(lower)}." if lower else ""]
    said.append("" if lower else f"No row beats {first.name} by a difference whose interval excludes 0.")
    said.append(f"Higher with an interval that excludes 0: {_listed(higher)}." if higher else "")
    said.append(f"Not told apart from {first.name} by these seeds: {_listed(undecided)}." if undecided else "")
    return [sentence for sentence in said if sentence]


def _sign(difference: Difference | None) -> int:
    return difference.sign if difference else 0


def _mean(row: Row) -> str:
    summary = row.entries[HELDOUT].summary
    return f"{value_text(summary)} over {_seeds(summary.n)}"


def _seeds(n: int) -> str:
    return f"{n} seeds" if n > 1 else "one seed"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
