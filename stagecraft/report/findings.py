"""Numbers as people read them, and the findings that titles of figures state."""

from collections.abc import Callable, Sequence

from stagecraft.anatomy import statistics
from stagecraft.metrics import is_number
from stagecraft.report.compare import number

LEAST = 5  # logged values at a curve's end, for their mean to stand there


def show(value):
    """A number for people: three significant digits, thousands apart.

    >>> show(0.12345), show(12), show(3.1e7), show(1.0), show(2.1e-5)
    ('0.123', '12', '31,000,000', '1.00', '2.1e-05')
    """
    if not is_number(value):
        return str(value) if value else "–"
    if isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif value and abs(value) < 1e-3:
        text = f"{value:.2g}"
    elif abs(value) < 1:
        text = f"{value:.3f}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return "−" + text[1:] if text.startswith("-") else text


def in_digits(digits: int) -> Callable[[float], str]:
    """Returns what writes numbers with so many digits after the point."""
    return lambda value: number(value, digits)


def with_half(write: Callable, value: float, half: float | None) -> str:
    """Returns a number with half its interval: "0.50 ±0.01".

    >>> with_half(in_digits(2), 0.5, 0.01), with_half(show, 0.5, None)
    ('0.50 ±0.01', '0.500')
    """
    return write(value) if half is None else f"{write(value)} ±{write(half)}"


def most_and_least(
    write: Callable, rows: Sequence[tuple[str, float, float | None]]
) -> str:
    """Returns who has most of a figure and who least.

    Args:
        write: how a number is written.
        rows: (stage, value, half its interval or None).
    """
    order = sorted(rows, key=lambda row: -row[1])
    (most, *largest), (least, *smallest) = order[0], order[-1]
    if largest[0] == smallest[0]:
        own = with_half(write, *largest)
        return own if len(rows) == 1 else f"{own} in all"
    return (
        f"{with_half(write, *largest)} in {most}, the most; "
        f"{with_half(write, *smallest)} in {least}, the least"
    )


def end(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns where a curve ends, and half the 95% interval of that.

    It is the mean over the last tenth of its values, as if they were independent; the
    last value alone, without an interval, where that tenth has fewer than `LEAST`.
    """
    count = len(values) // 10
    if count < LEAST:
        return values[-1], None
    return statistics.interval(values[-count:])


def course(write: Callable, values: Sequence[float]) -> str:
    """Returns from where to where a curve went: "5.41 → 2.03 ±0.02"."""
    last = with_half(write, *end(values))
    return last if len(values) == 1 else f"{write(values[0])} → {last}"
