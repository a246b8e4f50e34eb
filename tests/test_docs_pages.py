"""The shorter pages: their Python runs as it stands, links lead somewhere, the notebook runs from top to bottom."""

import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny_trainer

from es_trl.cli import RunArguments
from es_trl.cli.commands import COMMANDS
from es_trl.trainer import METHODS, config_of


ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def python_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


# Pages whose Python runs here: as it stands, but for how much is drawn.
FEW = "max_steps=1, prompts_per_step=1, num_generations=2, num_sample_prompts=1, use_cpu=True"
SHORTER = dict.fromkeys(("ddpo", "grpo", "pref_grpo", "policy_gradient"), ("max_steps=20", FEW))
HERE = ("hub", "cli", "reproducibility", "from_trl", "evaluation", "report", "pipelines", *SHORTER)
ELSEWHERE = {
    "test_docs": ("README", "quickstart", "es_trainer", "dpo"),
    "test_rewards_docs": ("rewards", "prompts"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run folder, for pages that start from one."""
    folder = tmp_path_factory.mktemp("pages") / "demo"
    trainer = tiny_trainer(folder, max_steps=1, eval_reward_funcs=[])
    trainer.train()
    trainer.compare_with_base(["a red apple", "two blue cats"])
    trainer.save_model()
    return folder


@pytest.mark.parametrize("name", HERE)
def test_code_blocks_run(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    code = python_of(ROOT / "docs" / f"{name}.md")
    if name in SHORTER:
        assert SHORTER[name][0] in code
        code = code.replace(*SHORTER[name])
    for folder in {"outputs/demo", "outputs/a", "outputs/b"} & set(re.findall(r"outputs/\w+", code)):
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / folder)
    assert code
    exec(compile(code, name, "exec"), {"__name__": name})


def test_every_page_with_code_is_run_by_some_test():
    run = {*HERE, *(name for names in ELSEWHERE.values() for name in names)}
    pages = [*PAGES, ROOT / "README.md", *(ROOT / "recipes").rglob("*.md")]
    assert {page.stem for page in pages if "```python" in page.read_text(encoding="utf-8")} == run
    for test, names in ELSEWHERE.items():
        text = (ROOT / "tests" / f"{test}.py").read_text(encoding="utf-8")
        assert not [name for name in names if f"{name}.md" not in text]


def shell_lines() -> list[tuple[str, list[str]]]:
    """Page and words of every command of ours in the shell blocks."""
    found = []
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "recipes").rglob("*.md")]:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found += [(page.name, words) for words in [shlex.split(line, comments=True)] if words]
    return found


def test_commands_of_the_pages_exist_with_their_options():
    """Scripts, config files, commands and options that a shell block names; long commands are not run here."""
    settings = {field.name for method in METHODS for cls in (RunArguments, config_of(method)) for field in fields(cls)}
    checked = 0
    for page, words in shell_lines():
        scripts = [word for word in words if re.fullmatch(r"recipes/.*\.py", word)]
        if words[0] == "es-trl":
            assert words[1] in COMMANDS, f"{page}: {' '.join(words)}"
            source = ROOT / "es_trl" / "cli" / f"{COMMANDS[words[1]][0]}.py"
        elif scripts:
            source = ROOT / scripts[0]
        else:
            continue
        text = source.read_text(encoding="utf-8")
        takes_settings = "prepare(" in text
        start = words.index(scripts[0]) if scripts else 1
        for word in words[start:]:
            option = word.removeprefix("--").partition("=")[0].replace("-", "_")
            if word.startswith("--") and option != "config":
                known = (takes_settings and option in settings) or f"--{option}" in text or f"    {option}: " in text
                assert known, f"{page}: {word} of {' '.join(words)}"
                checked += 1
            elif word.startswith("recipes/"):
                assert (ROOT / word).exists(), f"{page}: {word}"
                checked += 1
    assert checked > 40


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


@pytest.mark.parametrize("page", ["faults.md", "LOG.md"])
def test_tests_that_a_page_names_exist(page):
    """By their whole name, or by the beginning of it where `...` follows."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    known = [name for file in files for name in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))]
    named = re.findall(r"`(test_\w+(?:\.\.\.|\.py)?)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    known += [file.name for file in files]
    gone = [name for name in named if not any(re.fullmatch(name.replace("...", r"\w+"), other) for other in known)]
    assert named and gone == []


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
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert any("image/jpeg" in output.get("data", {}) for output in shown), "committed with what it shows"
    assert "evaluation prompts the trained sum went from" in json.dumps(shown)
    scope = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        cell = cell.replace("STEPS = 4", "STEPS = 1").replace("max_steps=STEPS", "max_steps=STEPS, population_size=16")
        cell = cell.replace('eval_dataset="tiny-validation"', "eval_dataset=PROMPTS")
        exec(compile(cell, f"cell {number}", "exec"), scope)
    assert (tmp_path / "outputs/notebook/README.md").is_file() and scope["result"].rows
