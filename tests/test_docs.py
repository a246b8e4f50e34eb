"""What a stranger copies first runs as it stands, but for how much is drawn: README, quickstart, trainers' pages."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


# Numbers of each page, and those that take their place here.
FEWER = {
    "README.md": {"max_steps=8": "max_steps=2", "population_size=256": "population_size=16",
                  '"tiny-validation"': '["a red apple", "two blue cats"]'},
    "docs/quickstart.md": {"max_steps=4": "max_steps=2", "population_size=64": "population_size=16",
                           'eval_dataset="tiny-validation"': 'eval_dataset=["a red apple", "two blue cats"]'},
    "docs/es_trainer.md": {"max_steps=4": "max_steps=2", "population_size=16": "population_size=8"},
    "docs/dpo.md": {"max_steps=2": "max_steps=1"},
}  # fmt: skip


@pytest.mark.parametrize("page", FEWER)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    for number, fewer in FEWER[page].items():
        assert number in code
        code = code.replace(number, fewer)
    scope = {"__name__": page}
    exec(compile(code, page, "exec"), scope)
    # Every page trains an adapter and leaves a run folder that a stranger can look into.
    folder = Path(scope["trainer"].args.output_dir)
    for name in ("pytorch_lora_weights.safetensors", "README.md", "es_config.json", "samples/step-000000.jpg"):
        assert (folder / name).is_file(), name
