"""Figures of matplotlib as inline SVG that takes its colours and its font from the page, and as PNG."""

import html
import io
import re

from .theme import LIGHT, NAMES, SENTINELS


RC = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's own font
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "path.simplify": True,
}


def inline_svg(draw, name: str, label: str) -> str:
    """
    A chart as an `<svg>` element for the inside of a page; the same input gives the same text.

    Args:
        draw (`Callable`): Takes a [`~es_trl.report.theme.Palette`] and returns a `matplotlib.figure.Figure`.
        name (`str`): Unique in the page; keeps the ids of several charts apart.
        label (`str`): What the chart shows, for those who cannot see it.
    """
    import matplotlib

    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        buffer = io.StringIO()
        draw(SENTINELS).savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*<style type=\"text/css\">.*?</style>\s*</defs>", "", text, count=1, flags=re.S)
    for colour, variable in NAMES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"(font: )?([\d.]+px) 'DejaVu Sans'(, [^;\"]*)?", r"\1\2 var(--font)", text)
    text = re.sub(r"\bid=\"([^\"]+)\"", rf'id="{name}-\1"', text)
    text = re.sub(r"(xlink:)?href=\"#([^\"]+)\"", rf'href="#{name}-\2"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    viewbox = re.search(r"viewBox=\"[^\"]+\"", text)
    opening = f'<svg class="chart" {viewbox[0] if viewbox else ""} role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()


def save_png(draw, path, dpi: int = 160) -> None:
    """The same chart as a PNG on white, for READMEs and papers."""
    import matplotlib

    with matplotlib.rc_context(RC):
        draw(LIGHT).savefig(path, dpi=dpi, facecolor=LIGHT.paper, metadata={"Software": None})
