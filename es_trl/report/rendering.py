"""From data to one self-contained page: Jinja templates with escaping on, style and script inside."""

import functools
from pathlib import Path
from typing import Any

from . import wording


TEMPLATES = Path(__file__).parent / "templates"


@functools.lru_cache(maxsize=1)
def _environment():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("number", "percent", "interval", "whole", "duration", "p_value", "row_label")
    environment.filters |= {name: getattr(wording, name) for name in names}
    environment.globals |= {
        "interval": wording.interval,
        "as_percent": wording.percent,
        "signed": wording.signed,
    }
    return environment


def render(template: str, **context: Any) -> str:
    """Fills a template. Everything in `context` is text and is escaped, but for the SVG of charts."""
    files = {"style": "style.css", "script": "page.js", "live_script": "live.js"}
    texts = {name: (TEMPLATES / file).read_text(encoding="utf-8") for name, file in files.items()}
    return _environment().get_template(template).render(**texts, **context)
