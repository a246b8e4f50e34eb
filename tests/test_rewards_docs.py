"""The pages on rewards and prompts: their Python runs as it stands, their tables name what exists."""

import re
from pathlib import Path

import pytest

from es_trl.rewards import CATALOGUE, REWARD_NAMES


DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["rewards.md", "prompts.md"])
def test_code_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    code = compile("\n".join(blocks), page, "exec")
    exec(code, {"__name__": page})
    output = capsys.readouterr().out
    for promised in re.findall(r"^print\(.*\)  +# (\S+.*)$", text, flags=re.MULTILINE):
        first = re.split(r", float64|: | \.\.\.|$", promised)[0].strip()
        if first[0] in "[{(":
            assert first in output


def test_every_reward_has_a_row():
    text = (DOCS / "rewards.md").read_text(encoding="utf-8")
    for name in (*REWARD_NAMES, "tiny-pickscore", "tiny-clip-heldout"):
        assert f"| `{name}` |" in text
    for e in CATALOGUE:
        row = f"| `{e.name}` | {e.measures} | {e.range} | {e.checkpoint} | {e.licence} | {e.cost} |\n"
        assert row in text, f"docs/rewards.md and es_trl/rewards/catalogue.py differ on {e.name}"
