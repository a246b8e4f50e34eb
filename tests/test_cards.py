"""The recipes per model and card: each runs as it stands on a small model of its architecture; their page is true."""

import json
import math
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from es_trl.cli import parse, prepare
from es_trl.cli.recipes import recipes
from es_trl.pipelines import known_shapes
from es_trl.pipelines.quantization import read_quantization
from es_trl.trainer import method_classes
from recipes.benchmarks import cards
from recipes.benchmarks.tiny_models import MODELS


RECIPES = {name: path for name, path in recipes().items() if not name.startswith(("tiny_", "sana_sprint/"))}
TINY = {model.name: model for model in reversed(MODELS) if model.kind == "text to image"}

# What cannot be had here: the model, prompts and rewards of the Hub, a GPU; and a run of a minute instead of hours.
SMALL = {
    "dataset_name": "tiny-train", "max_train_prompts": 4, "eval_dataset_name": "tiny-validation",
    "max_eval_prompts": 2, "reward_funcs": "tiny-pickscore", "eval_reward_funcs": "tiny-clip-heldout",
    "use_cpu": True, "height": 32, "width": 32, "max_steps": 1, "eval_steps": 1, "save_strategy": "no",
    "load_best_model_at_end": False, "num_sample_prompts": 2, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
SMALL_OF = {
    "es": {"population_size": 4, "prompts_per_step": 1, "sigma": 0.05},
    "grpo": {"num_generations": 2, "prompts_per_step": 1},
    "dpo": {"num_generations": 2, "prompts_per_step": 1, "noise_draws": 1},
}
TOKENS = {"max_sequence_length": 16}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """Folders of small random models, by the class of the pipeline."""
    made: dict[str, Path] = {}

    def folder(pipeline: str) -> Path:
        if pipeline not in made:
            made[pipeline] = tmp_path_factory.mktemp(pipeline)
            TINY[pipeline].pipeline().save_pretrained(made[pipeline])
        return made[pipeline]

    return folder


def frozen_lora(pipeline: str, path: Path) -> Path:
    """A LoRA as Lightning is one: on every attention layer, made elsewhere."""
    pipe = TINY[pipeline].pipeline()
    name = next(name for name in pipe._lora_loadable_modules if hasattr(pipe, name) and name != "text_encoder")
    denoiser = getattr(pipe, name)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    tensors = {f"{name}.{key}": value.contiguous() for key, value in get_peft_model_state_dict(denoiser).items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_stands_but_for_what_is_not_here(name, tmp_path, model_of):
    arguments, config = parse(args=["--config", name, "--use_cpu", "True"])
    pipeline = known_shapes()[arguments.model_name_or_path]["pipeline"]
    changes = SMALL | SMALL_OF[arguments.method] | {"output_dir": tmp_path / "run"}
    changes["model_name_or_path"] = model_of(pipeline)
    if config.quantization_config:
        read_quantization(config.quantization_config)  # bitsandbytes itself needs a GPU: here torchao's int8
        int8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}
        changes["quantization_config"] = json.dumps(int8)
    if config.frozen_adapters:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+/[\w.-]+\.safetensors", config.frozen_adapters[0])
        changes["frozen_adapters"] = frozen_lora(pipeline, tmp_path / "lightning.safetensors")
    if pipeline == "Flux2KleinPipeline":
        changes["pipeline_kwargs"] = json.dumps({"text_encoder_out_layers": [1, 2, 3]})  # of three layers
    if "max_sequence_length" in TINY[pipeline].call:
        changes |= TOKENS
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    arguments, config = parse(args=["--config", name, *words])
    trainer = prepare(method_classes(arguments.method)[1], arguments, config)
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
    assert cards.memory_line(plan) in text.splitlines()
