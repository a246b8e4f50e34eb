"""Reads the Hugging Face docstring manner for mkdocs: "(`int`, *optional*, defaults to `64`)" and [`ESConfig`]."""

import re


def on_page_content(html: str, **_) -> str:
    """Leave the bare type in a parameter's type column, and link a name in brackets to its place on the page."""

    def link(match: re.Match) -> str:
        name = match.group(1)
        code = f"<code>{name}</code>"
        return f'<a href="#es_trl.{name}">{code}</a>' if f'id="es_trl.{name}"' in html else code

    html = re.sub(r"<code>`([^`<]+)`(?:, \*optional\*(?:, defaults to [^<]*)?)?</code>", r"<code>\1</code>", html)
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", link, html)
