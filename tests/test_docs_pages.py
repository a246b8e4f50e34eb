"""The shorter pages: their Python runs as it stands, links lead somewhere, the notebook runs from top to bottom."""

import json
import re
from pathlib import Path

import pytest
import yaml

from es_trl.cli.commands import COMMANDS


ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def python_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("name", ["hub", "reproducibility", "from_trl"])
def test_code_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_of(ROOT / "docs" / f"{name}.md")
    assert code
    exec(compile(code, name, "exec"), {"__name__": name})


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors_of(other), f"{page.name}: {target}"


def test_every_page_is_in_the_menu_once():
    text = re.sub(r"!!?\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    found = re.findall(r"[\w]+\.md", json.dumps(yaml.safe_load(text)["nav"]))
    assert sorted(found) == sorted(page.name for page in PAGES)


def test_commands_are_documented():
    """Each command has a row on the page of the command line, or a page that shows how it is called."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "SECURITY.md"])
    for command in COMMANDS:
        assert f"| `{command}` |" in text or f"es-trl {command}" in text, command


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "recipes/notebooks/first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "committed without outputs"
    scope = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        cell = cell.replace("STEPS = 3", "STEPS = 1")
        exec(compile(cell, f"cell {number}", "exec"), scope)
    assert (tmp_path / "outputs/notebook/README.md").is_file() and scope["result"].rows
