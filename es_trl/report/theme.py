"""Colours of the charts: as they are for PNG, as stand-ins that become CSS variables for the page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Palette:
    """
    Colours of a chart.

    Args:
        ink, muted, line, paper (`str`): Text, secondary text, grid, background.
        held_out, trained, base (`str`): What a sceptic looks at, what was optimised, where it started.
        series (`tuple[str, ...]`): One colour per run or method; safe for colour-blind readers (after Okabe and Ito).
    """

    ink: str
    muted: str
    line: str
    paper: str
    held_out: str
    trained: str
    base: str
    series: tuple[str, ...]


LIGHT = Palette(
    ink="#1b1c1e",
    muted="#63666b",
    line="#e4e4e1",
    paper="#ffffff",
    held_out="#0b6bb0",
    trained="#c2561a",
    base="#63666b",
    series=("#0b6bb0", "#c2561a", "#0f8a66", "#a1478b", "#8a6d00", "#3d9cc9", "#7a4fd0", "#63666b"),
)
# Colours that nothing else in a chart has, each replaced by the variable of its role.
SENTINELS = Palette(
    ink="#010a01",
    muted="#010a02",
    line="#010a03",
    paper="#010a04",
    held_out="#010a05",
    trained="#010a06",
    base="#010a07",
    series=tuple(f"#010a{16 + i:02x}" for i in range(8)),
)
NAMES = {
    SENTINELS.ink: "ink",
    SENTINELS.muted: "muted",
    SENTINELS.line: "line",
    SENTINELS.paper: "paper",
    SENTINELS.held_out: "held-out",
    SENTINELS.trained: "trained",
    SENTINELS.base: "muted",
    **{colour: f"series-{i}" for i, colour in enumerate(SENTINELS.series)},
}
