"""What a stranger copies first runs as it stands: the README's Python, the quickstart, the trainer's page."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/es_trainer.md", "docs/dpo.md"])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    scope = {"__name__": page}
    exec(compile("\n".join(blocks), page, "exec"), scope)
    # Every page trains an adapter and leaves a run folder that a stranger can look into.
    folder = Path(scope["trainer"].args.output_dir)
    for name in ("pytorch_lora_weights.safetensors", "README.md", "es_config.json", "samples/step-000000.jpg"):
        assert (folder / name).is_file(), name
