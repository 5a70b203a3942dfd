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
        difference: to the first row; empty where there is none.
        interval: of the difference, or why there is none.
        best: whether no row has a better mean.
        apart: whether the interval of the difference excludes 0.
    """

    value: str
    difference: str
    interval: str
    best: bool
    apart: bool

    @property
    def full_difference(self) -> str:
        return f"{self.difference} {self.interval}".rstrip()


def row_text(table: Table, row: Row) -> str:
    """The row's name, with the number of its seeds if it is not that of the study."""
    return row.name if row.done == table.seeds else f"{row.name} ({row.done} of {table.seeds} seeds)"


def entry_text(table: Table, row: Row, quantity: Quantity) -> EntryText:
    """The text of a row's entry in a table."""
    entry = row.entries[quantity.key]
    summary, difference = entry.summary, entry.difference
    if summary is None:
        return EntryText(MISSING if entry.reached is None else not_reached(*entry.reached), "", "", False, False)
    if quantity.count:
        first = table.rows[0].entries[quantity.key].summary
        return EntryText(count_text(summary.mean), _percent(summary, first) if difference else "", "", False, False)
    means = [other.entries[quantity.key].summary.mean for other in table.rows if other.entries[quantity.key].summary]
    best = quantity.better is not None and summary.mean == (min if quantity.better == "lower" else max)(means)
    return EntryText(
        value_text(summary) + (f" (n = {summary.n})" if summary.n < row.done else ""),
        *(_difference_and_interval(difference) if difference else ("", "")),
        best and len(set(means)) > 1,
        bool(difference and difference.sign) and quantity.better is not None,
    )


def value_text(summary: Summary) -> str:
    """Mean ± standard deviation, to two digits of the latter: "0.4123 ± 0.0031"; without it for equal numbers."""
    if not summary.sd:
        return _plain(summary.mean)
    decimals = _decimals(summary.sd)
    return f"{fixed(summary.mean, decimals)} ± {fixed(summary.sd, decimals)}"


def not_reached(reached: int, seeds: int) -> str:
    """That not all of the seeds have reached a goal."""
    return f"not reached ({reached} of {seeds} seeds did)"


def difference_text(difference: Difference) -> str:
    """The difference and its interval: "−0.012 [−0.016, −0.008]", or "−0.012 (one seed: no interval)"."""
    return " ".join(_difference_and_interval(difference))


def _difference_and_interval(difference: Difference) -> tuple[str, str]:
    if difference.low is None or difference.high is None:
        return _signed(_plain(difference.mean)), "(one seed: no interval)"
    if difference.low == difference.high:
        return _signed(_plain(difference.mean)), "(in every seed)"
    decimals = _decimals(difference.high - difference.low)
    if difference.sign:  # a bound that is not 0 must not be rounded to it
        nearest = min(abs(difference.low), abs(difference.high))
        decimals = max(decimals, min(_MOST_DECIMALS, -math.floor(math.log10(nearest))))
    mean, low, high = (_signed(fixed(x, decimals)) for x in (difference.mean, difference.low, difference.high))
    return mean, f"[{low}, {high}]"


def shortened(text: str, length: int) -> str:
    """Text in one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def count_text(number: float) -> str:
    """A number of parameters or operations: "32.9 M", "6.06 G"."""
    for size, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def _percent(summary: Summary, first: Summary | None) -> str:
    return "" if first is None or first.mean == 0 else f"{_signed(fixed(100 * (summary.mean / first.mean - 1), 1))} %"


def _decimals(spread: float) -> int:
    """Decimals that show two digits of a spread above 0."""
    return max(0, min(_MOST_DECIMALS, 1 - math.floor(math.log10(spread))))


def fixed(value: float, decimals: int) -> str:
    """A number with that many decimals; a very large one with an exponent."""
    text = f"{value:.3g}" if abs(value) >= _LARGE else f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def _plain(value: float) -> str:
    """A number without a known spread: whole ones in full, others to four digits."""
    return fixed(value, 0) if value == round(value) else f"{value:.4g}".replace("-", "−")


def _signed(text: str) -> str:
    """With a plus sign unless there is a sign or nothing but zeros."""
    return text if text.startswith("−") or not any(digit in text for digit in "123456789") else f"+{text}"
