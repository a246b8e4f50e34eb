"""How numbers, shares, intervals, durations and metrics are written: cards, pages, tables and the terminal alike."""

from collections.abc import Callable


DASH, MINUS, NBSP = "\u2013", "\u2212", "\u00a0"
METRICS = {
    "retrieval_accuracy": "retrieval accuracy",
    "hard_negative_accuracy": "hard-negative accuracy",
    "frechet_distance": "Frechet distance to real pictures x 100 (lower is better)",
    "diversity": "diversity (distance between pictures of one prompt)",
}


def number(value: float | None, sign: bool = False) -> str:
    """`value` with about four meaningful digits; a dash where there is none."""
    if value is None or value != value:
        return "-"
    size = abs(value)
    decimals = 4 if size < 1 else 3 if size < 10 else 2 if size < 1000 else 0
    return f"{value:{'+' if sign else ''},.{decimals}f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] in per cent."""
    return "-" if value is None or value != value else f"{100 * value:.{decimals}f} %"


def interval(low: float | None, high: float | None, show: Callable[[float], str] = number) -> str:
    """Two ends in brackets, after a space; nothing when one of them does not exist."""
    return "" if low is None or high is None else f" [{show(low)}, {show(high)}]"


def whole(value: float | None) -> str:
    """A count with separators."""
    return "-" if value is None else f"{round(value):,}"


def duration(seconds: float | None) -> str:
    """Seconds in the unit one would say."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def p_value(value: float | None) -> str:
    """A p value; small ones as a bound."""
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def typeset(text: str) -> str:
    """A formatted number for print: a true minus, a dash where nothing is, and spaces that do not break."""
    return DASH if text == "-" else text.replace("-", MINUS).replace(" ", NBSP)
