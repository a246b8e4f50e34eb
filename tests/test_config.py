"""Configs explain themselves, and a file that cannot work is refused in one sentence that names the fix."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from es_trl.cli import RunArguments, load_config
from es_trl.trainer import METHODS, DiffusionConfig, ESConfig, config_of


ROOT = Path(__file__).resolve().parent.parent


def own_fields(config: type) -> list[dataclasses.Field]:
    """The fields that this class itself adds or gives another default."""
    return [f for f in dataclasses.fields(config) if f.name in vars(config).get("__annotations__", {})]


CONFIGS = [RunArguments, DiffusionConfig, *(config_of(method) for method in METHODS)]
OWN = [(config, field) for config in CONFIGS for field in own_fields(config)]
IDS = [f"{config.__name__}.{field.name}" for config, field in OWN]


def documented_default(config: type, name: str):
    """The default that the class docstring states: MISSING without *optional*, None for a bare *optional*."""
    entry = re.search(rf"^    *{name} \((.*)\):$", inspect.getdoc(config), flags=re.M)
    assert entry, f"{config.__name__}'s docstring has no entry `{name} (...):`"
    if "*optional*" not in entry.group(1):
        return dataclasses.MISSING
    stated = re.search(r"defaults to `(.*)`", entry.group(1))
    return ast.literal_eval(stated.group(1)) if stated else None


@pytest.mark.parametrize(("config", "field"), OWN, ids=IDS)
def test_field_explains_itself(config, field):
    assert field.metadata.get("help", "").strip().endswith("."), "help is a sentence"
    stated = documented_default(config, field.name)
    required = stated is dataclasses.MISSING  # some are checked by __post_init__, for a better message than argparse's
    assert stated == field.default or (required and not field.default)


def test_help_can_be_printed():
    """argparse formats help with `%`: a bare percent sign would break `--help` for every user."""
    for config in CONFIGS[2:]:
        text = HfArgumentParser([RunArguments, config]).format_help()
        for field in [*own_fields(RunArguments), *own_fields(DiffusionConfig), *own_fields(config)]:
            assert f"--{field.name}" in text


def test_every_field_is_exercised():
    """Some test sets each field: an option that nothing ever turned on is an option that does not work."""
    used = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path == Path(__file__).resolve():
            continue  # here fields are only refused
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword):
                used.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # a dict key, `--field` of a command line, or `field: value` in a YAML text; not a word of a sentence
                used.update(re.findall(r"^(?:--)?(\w+)$", node.value))
                used.update(re.findall(r"^(\w+):", node.value, flags=re.M))
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for _, field in OWN} - used - inherited == set()


# ---- reading a file ----

MINIMAL = """
model_name_or_path: tiny-sana-sprint
reward_funcs: [tiny-pickscore]
dataset_name: tiny-train
output_dir: outputs/never-written
"""


def load(tmp_path: Path, lines: str = "", overrides: tuple[str, ...] = ()):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL + lines)
    return load_config(path, overrides=overrides)


def test_command_line_over_file_over_default(tmp_path):
    arguments, config = load(tmp_path, "sigma: 0.2\npopulation_size: 8\n", ("--population_size", "6"))
    assert arguments.reward_funcs == ["tiny-pickscore"]
    assert (config.population_size, config.sigma, config.noise_rank) == (6, 0.2, ESConfig.noise_rank)


@pytest.mark.parametrize(
    ("lines", "meant"),
    [
        ("popluation_size: 8", "population_size"),
        ("learning-rate: 0.1", "learning_rate"),
        ("reward_func: [pickscore]", "reward_funcs"),
        ("sigmas: 0.1", "sigma"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_key_that_was_meant(tmp_path, lines, meant):
    with pytest.raises(ValueError, match=f"(?s){lines.split(':')[0]}.*Did you mean '{meant}'"):
        load(tmp_path, lines)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("population_size: 7\nantithetic: true", ["population_size", "7", "even"]),
        ("population_size: 12.5", ["population_size", "12.5", "whole"]),
        ("population_size: 0", ["population_size", "0"]),
        ("noise_rank: 0", ["noise_rank", "0"]),
        ("sigma: 0", ["sigma", "0", "above"]),
        ("sigma: -0.1", ["sigma", "-0.1"]),
        ("sigma: .nan", ["sigma", "nan"]),
        ("learning_rate: 0", ["learning_rate"]),
        ("learning_rate: .nan", ["learning_rate", "nan"]),
        ("es_space: lora_c", ["es_space", "lora_c", "lora_xs"]),
        ("fitness_shaping: rank", ["fitness_shaping", "rank", "centered_rank"]),
        ("fitness_shaping: sign", ["fitness_shaping", "antithetic"]),
        ("scale_rewards: prompt", ["scale_rewards", "prompt", "group"]),
        ("multi_objective_aggregation: mean", ["multi_objective_aggregation", "mean", "sum_then_normalize"]),
        ("max_invalid_fraction: 1", ["max_invalid_fraction", "1", "below"]),
        ("travel: 0", ["travel", "above"]),
        ("output_change: -1", ["output_change", "above"]),
        ("guidance_scale: -1", ["guidance_scale", "-1"]),
        ("lora_alpha: 0", ["lora_alpha", "0"]),
        ("reward_weights: [1, .inf]", ["reward_weights", "finite"]),
        ("reward_retries: -1", ["reward_retries", "-1"]),
        ("num_sample_prompts: 0", ["num_sample_prompts", "0"]),
        ("dtype: fp8", ["dtype", "fp8", "bfloat16"]),
        ("bf16: true", ["bf16", 'dtype="bfloat16"']),
        ("fp16: true", ["fp16", 'dtype="float16"']),
        ("gradient_checkpointing: true", ["gradient_checkpointing"]),
        ("torch_compile: true", ["torch_compile", "compile_denoiser"]),
        ("auto_find_batch_size: true", ["auto_find_batch_size"]),
        ("remove_unused_columns: true", ["remove_unused_columns", "False"]),
        ("per_device_train_batch_size: 4", ["per_device_train_batch_size", "prompts_per_step"]),
        ("save_total_limit: 1", ["save_total_limit", "at least 2"]),
        ("hub_token: abc", ["hub_token", "HF_TOKEN"]),
        ("model_init_kwargs: '{'", ["model_init_kwargs", "JSON"]),
        ("pipeline_kwargs: 3", ["pipeline_kwargs", "mapping"]),
        ("reward_funcs: []", ["reward_funcs"]),
        ("sigma: [", ["not valid YAML"]),
    ],
)
def test_a_file_that_cannot_work_is_refused_with_field_value_and_fix(tmp_path, lines, words):
    with pytest.raises(ValueError) as error:
        load(tmp_path, lines)
    message = str(error.value)
    assert [word for word in words if word not in message] == []
    assert "abc" not in message, "a token is never repeated"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no config file.*missing.yaml"):
        load_config(tmp_path / "missing.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_recipes_load(path):
    """Every recipe of ours holds known keys and values that can work."""
    arguments, config = load_config(path)
    assert arguments.reward_funcs and isinstance(config, DiffusionConfig)
