"""A new reward and a new pipeline, made by touching only the files that CONTRIBUTING.md names for them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from tiny_runs import PROMPTS, redness, same, theta_of

from es_trl import ESConfig, ESTrainer
from es_trl.pipelines import verify_population_forward


ROOT = Path(__file__).parents[1]
REWARD = '''"""Blue minus red."""

import numpy as np


def blueness(images, **_):
    """One float per picture."""
    means = [np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1)) for image in images]
    return [mean[2] - mean[0] for mean in means]
'''
ENTRY = '    RewardEntry("blueness", "is blue", "-255 to 255", "none", "none", "no network"),\n)  # fmt: skip\n'
ROW = "| `blueness` | is blue | -255 to 255 | none | none | no network |\n"
USE = """
import json, sys
from PIL import Image
from es_trl.cli import main
from es_trl.rewards import CATALOGUE, REWARD_NAMES, RewardSet
rewards = RewardSet("blueness")
pictures = [Image.new("RGB", (8, 8), color) for color in ("blue", "red")]
print(json.dumps([rewards.names, rewards(["a", "b"], pictures).tolist(), "blueness" in REWARD_NAMES,
                  [e.name for e in CATALOGUE][-1]]))
main(["reward", "list"])
"""


def add_after(path: Path, found: str, added: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(found) == 1, f"{path} has another shape than this test, and CONTRIBUTING.md, know"
    path.write_text(text.replace(found, found + added), encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"
    }


def test_a_new_reward_is_a_file_and_three_lines(tmp_path):
    package, docs = tmp_path / "es_trl", tmp_path / "docs"
    shutil.copytree(ROOT / "es_trl", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("images"))
    shutil.copy(ROOT / "VERSION", tmp_path)
    before = files_of(tmp_path)

    (package / "rewards" / "blueness.py").write_text(REWARD)
    add_after(
        package / "rewards" / "registry.py", "_PLAIN_REWARDS = {\n", '    "blueness": ("blueness", "blueness"),\n'
    )
    catalogue = package / "rewards" / "catalogue.py"
    catalogue.write_text(catalogue.read_text().replace(")  # fmt: skip\n", ENTRY))
    rewards_page = docs / "rewards.md"
    last = next(line for line in reversed(rewards_page.read_text().splitlines()) if line.startswith("| `vlm_judge`"))
    add_after(rewards_page, last + "\n", ROW)

    after = files_of(tmp_path)
    touched = {name for name in after if after[name] != before.get(name)}
    named = "es_trl/rewards/{}.py"
    expected = {named.format(name) for name in ("blueness", "registry", "catalogue")} | {"docs/rewards.md"}
    assert touched == expected
    row = next(line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| reward |"))
    for name in ("es_trl/rewards/NAME.py", "registry.py", "catalogue.py", "docs/rewards.md"):
        assert name in row

    os.symlink(ROOT / "es_trl" / "assets", package / "assets")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *listed = done.stdout.splitlines()
    assert json.loads(first) == [["blueness"], [[255.0], [-255.0]], True, "blueness"]
    assert any(line.split()[:1] == ["blueness"] for line in listed)


class PaintPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """A pipeline that es_trl has never heard of: a Sana transformer whose latents are the pixels."""

    _lora_loadable_modules = ["transformer"]

    def __init__(self, transformer: SanaTransformer2DModel):
        super().__init__()
        self.register_modules(transformer=transformer)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=1, generator=None, output_type="pil"):
        from PIL import Image

        latents = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generator])
        words = torch.stack([_words(text) for text in prompt])
        for _ in range(num_inference_steps):
            time = torch.ones(len(latents))
            latents = latents - self.transformer(latents, encoder_hidden_states=words, timestep=time).sample
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        pixels = (torch.sigmoid(latents).permute(0, 2, 3, 1) * 255).byte().numpy()
        return ImagePipelineOutput(images=[Image.fromarray(array) for array in pixels])


def _words(text: str) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(sum(text.encode())))


def paint_pipeline() -> PaintPipeline:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=3, out_channels=3, num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        patch_size=1,
    )  # fmt: skip
    return PaintPipeline(transformer)


def test_a_new_pipeline_touches_nothing(tmp_path):
    """Fused members equal merged weights, a step moves theta, and the saved LoRA draws the trained picture."""
    row = next(line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("| pipeline |"))
    assert "nothing" in row
    assert verify_population_forward(paint_pipeline()).ok
    small = {"population_size": 4, "members_per_forward": 2, "prompts_per_step": 2, "prompts_per_member": None}
    quiet = {"sample_steps": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    config = ESConfig(output_dir=str(tmp_path), max_steps=2, sigma=0.1, lora_rank=2, **small, **quiet)
    trainer = ESTrainer(paint_pipeline(), redness, args=config, train_dataset=PROMPTS)
    before = theta_of(trainer)
    trainer.train()
    trainer.save_model()
    assert not same(before, theta_of(trainer))
    drawn = trainer.adapter.generate(["a red cat"], [torch.Generator().manual_seed(1)])[0]
    pipe = paint_pipeline()
    pipe.load_lora_weights(str(tmp_path), use_safetensors=True)
    (again,) = pipe(["a red cat"], generator=[torch.Generator().manual_seed(1)]).images
    assert abs(torch.tensor(list(again.getdata())) - torch.tensor(list(drawn.getdata()))).max() <= 1
