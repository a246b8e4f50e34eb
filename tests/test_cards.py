"""The recipes per model and card: each runs as it stands on a small model of its architecture; their page is true."""

import math
import re
from pathlib import Path

import pytest

from es_trl.cli import parse
from es_trl.cli.recipes import recipes
from es_trl.pipelines import known_shapes
from es_trl.pipelines.quantization import read_quantization
from recipes.benchmarks import cards, true_widths
from recipes.benchmarks.tiny_models import MODELS


RECIPES = {name: path for name, path in recipes().items() if not name.startswith(("tiny_", "sana_sprint/"))}
TINY = {model.name: model for model in reversed(MODELS) if model.kind == "text to image"}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Folders of small random models, by the class of the pipeline."""
    made: dict[str, Path] = {}

    def folder(pipeline: str) -> Path:
        if pipeline not in made:
            made[pipeline] = tmp_path_factory.mktemp(pipeline)
            pipe = TINY[pipeline].pipeline()
            pipe.save_pretrained(made[pipeline])
            true_widths.frozen_lora(pipe, made[pipeline] / "frozen.safetensors")
        return made[pipeline]

    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_stands_but_for_what_is_not_here(name, tmp_path, model_of):
    arguments, config = parse(args=["--config", name, "--use_cpu", "True"])
    pipeline = known_shapes()[arguments.model_name_or_path]["pipeline"]
    if config.quantization_config:
        read_quantization(config.quantization_config)  # bitsandbytes itself needs a GPU
    for adapter in config.frozen_adapters or ():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+\.safetensors", adapter)
    few = {"num_sample_prompts": 1, "max_eval_prompts": 1, "max_train_prompts": 2}
    trainer = true_widths.small_trainer(name, model_of(pipeline), tmp_path / "run", **few)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.adapter.pipe.text_encoder is None
    step = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    assert step["grad_norm"] > 0 and math.isfinite(step["grad_norm"] + step["reward"])
    assert math.isfinite(next(e["eval_reward"] for e in trainer.state.log_history if "eval_reward" in e))


def test_the_page_and_the_recipes_say_the_same():
    page = cards.PAGE.read_text(encoding="utf-8")
    for name, path in RECIPES.items():
        text = path.read_text(encoding="utf-8")
        first, memory = text.splitlines()[0].lstrip("# "), re.search(r"^# Memory: (.*)$", text, re.MULTILINE)[1]
        what, card = cards.CARD.match(first).groups()
        gb, when = re.fullmatch(
            r"(\d+\.\d) GB at most, (.*) \(es-trl dry-run\)\. NOT MEASURED ON A GPU\.", memory
        ).groups()
        assert float(gb) <= float(card), name
        row = next(row for row in page.splitlines() if f"`{name}`" in row)
        assert row.startswith(f"| {card} GB | {what.partition(' on ')[2]} | ") and row.endswith(f"| {gb} | {when} |")
        assert f"--config {name} --gpu {card}GB" in text and len(text.splitlines()) <= 50
    assert set(re.findall(r"^\| \d.*\| `(.*?)` \|", page, re.MULTILINE)) == {*RECIPES, "sana_sprint/es"}


@pytest.mark.parametrize("name", ["sd_turbo/es", "flux2_klein_4b/grpo", "sana_sprint_0_6b/es"])
def test_the_memory_of_a_recipe_is_what_its_shapes_give(name):
    """All of them: `python recipes/benchmarks/cards.py`."""
    text = RECIPES[name].read_text(encoding="utf-8")
    plan = cards.plan_memory(*parse(args=["--config", name, "--use_cpu", "True"]))
    memory = re.compile(r"^# Memory: (.*) GB (.*)$", re.MULTILINE)
    (said, moment), (found, again) = (memory.search(line).groups() for line in (text, cards.memory_line(plan)))
    assert float(found) == pytest.approx(float(said), abs=0.11) and again == moment  # other versions, other kernels
