"""Numbers as people read them, the same in the page, in Markdown and in LaTeX."""

import math
from dataclasses import dataclass

from sit_atconv.study.report.statistics import Difference, Summary
from sit_atconv.study.report.tables import Quantity, Row, Table

MISSING = "–"
_MOST_DECIMALS = 8
_LARGE = 1e9  # from here on with an exponent


@dataclass(frozen=True)
class EntryText:
    """An entry of the table.

    Args:
        value: mean ± standard deviation.
        difference: to the first row, with its interval; empty where there is none to show.
        best: whether no row has a better mean.
        apart: whether the interval of the difference excludes 0.
    """

    value: str
    difference: str
    best: bool
    apart: bool


def entry_text(table: Table, row: Row, quantity: Quantity) -> EntryText:
    """The text of a row's entry in a table."""
    summary, difference = row.entries[quantity.key].summary, row.entries[quantity.key].difference
    if summary is None:
        return EntryText(MISSING, "", False, False)
    if quantity.count:
        first = table.rows[0].entries[quantity.key].summary
        return EntryText(count_text(summary.mean), _percent(summary, first) if difference else "", False, False)
    means = [other.entries[quantity.key].summary.mean for other in table.rows if other.entries[quantity.key].summary]
    best = quantity.better is not None and summary.mean == (min if quantity.better == "lower" else max)(means)
    given = quantity.key == table.budget  # equal by design: a difference would say nothing
    return EntryText(
        value_text(summary) + (f" (n = {summary.n})" if summary.n < table.seeds else ""),
        difference_text(difference) if difference and not given else "",
        best and len(set(means)) > 1,
        bool(difference and difference.sign) and not given and quantity.better is not None,
    )


def value_text(summary: Summary) -> str:
    """Mean ± standard deviation, to two digits of the latter: "0.4123 ± 0.0031"."""
    if not summary.sd:
        return _plain(summary.mean) + (" ± 0" if summary.sd == 0 else "")
    decimals = _decimals(summary.sd)
    return f"{_fixed(summary.mean, decimals)} ± {_fixed(summary.sd, decimals)}"


def difference_text(difference: Difference) -> str:
    """The difference and its interval: "−0.012 [−0.016, −0.008]", or "−0.012 (one seed: no interval)"."""
    if difference.low is None or difference.high is None:
        return f"{_signed(_plain(difference.mean))} (one seed: no interval)"
    if difference.low == difference.high:
        return f"{_signed(_plain(difference.mean))} (in every seed)"
    decimals = _decimals(difference.high - difference.low)
    mean, low, high = (_fixed(value, decimals) for value in (difference.mean, difference.low, difference.high))
    return f"{_signed(mean)} [{_signed(low)}, {_signed(high)}]"


def count_text(number: float) -> str:
    """A number of parameters or operations: "32.9 M", "6.06 G"."""
    for size, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def _percent(summary: Summary, first: Summary | None) -> str:
    return "" if first is None or first.mean == 0 else f"{_signed(_fixed(100 * (summary.mean / first.mean - 1), 1))} %"


def _decimals(spread: float) -> int:
    """Decimals that show two digits of a spread above 0."""
    return max(0, min(_MOST_DECIMALS, 1 - math.floor(math.log10(spread))))


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.3g}" if abs(value) >= _LARGE else f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def _plain(value: float) -> str:
    """A number without a known spread: whole ones in full, others to four digits."""
    return _fixed(value, 0) if value == round(value) else f"{value:.4g}".replace("-", "−")


def _signed(text: str) -> str:
    """With a plus sign unless there is a sign or nothing but zeros."""
    return text if text.startswith("−") or not any(digit in text for digit in "123456789") else f"+{text}"
