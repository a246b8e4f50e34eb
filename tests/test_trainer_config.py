"""Settings that cannot work: one sentence with the field, its value and what to do, before any model loads (F27)."""

import functools
import json
import math

import pytest
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from tiny_pipelines import stable_diffusion
from tiny_runs import PROMPTS, redness, tiny_config, tiny_trainer
from trl import TrlParser

from es_trl import ESConfig, ESTrainer


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if anything is loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("es_trl.trainer.inputs.load_pipeline", loaded)
    monkeypatch.setattr("es_trl.pipelines.loading.DiffusionPipeline.from_pretrained", loaded)


FAULTS = [
    # es_trl's own fields
    (
        {"population_size": 5, "antithetic": True},
        "population_size must be even.*got 5; use 6, or set antithetic=False",
    ),
    ({"population_size": 12.5}, "population_size must be a whole number of at least 1, got 12.5"),
    ({"population_size": True}, "population_size must be a whole number.*got True"),
    ({"population_size": 1}, "population_size must be at least 2, got 1"),
    ({"sigma": 0}, "sigma must be above 0, got 0"),
    ({"sigma": -0.1}, "sigma must be above 0, got -0.1"),
    ({"sigma": math.inf}, "sigma must be a finite number, got inf"),
    ({"noise_rank": 0}, "noise_rank must be a whole number of at least 1, got 0"),
    ({"noise_reuse": 0}, "noise_reuse must be a whole number of at least 1, got 0"),
    ({"members_per_forward": 0}, "members_per_forward must be a whole number of at least 1, got 0"),
    ({"es_space": "lora_a"}, "es_space must be one of lora, lora_b, lora_xs, weight; got 'lora_a'"),
    ({"fitness_shaping": "ranks"}, "fitness_shaping must be one of .*centered_rank.*; got 'ranks'"),
    ({"fitness_shaping": "sign"}, 'fitness_shaping="sign".*antithetic=True'),
    ({"output_change": 0}, "output_change must be above 0, got 0"),
    ({"travel": -1.0}, "travel must be above 0, got -1.0"),
    ({"update": "sgd"}, "update must be one of mean, optimizer; got 'sgd'"),
    ({"when_margin_turns": "halt"}, "when_margin_turns must be one of restart, stop, ignore; got 'halt'"),
    ({"learning_rate": 0.1}, 'learning_rate=0.1 does not act with update="mean".*set update="optimizer"'),
    ({"optim": "adamw_torch"}, "optim='adamw_torch' does not act"),
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine' does not act"),
    ({"noise_reuse": 2}, "noise_reuse=2 does not act"),
    ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 does not act"),
    ({"scale_rewards": "none"}, 'scale_rewards must be "group" or "batch"'),
    ({"update": "optimizer"}, 'update="optimizer" needs a learning_rate'),
    (
        {"update": "optimizer", "learning_rate": 0.1, "optim_args": "momentum=0.9, dampening=0.9"},
        "torch's SGD takes the first gradient undamped",
    ),
    ({"update": "optimizer", "learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
    ({"update": "optimizer", "learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
    ({"max_steps": -5}, "max_steps must be.*got -5"),
    ({"max_steps": 0}, "max_steps must be.*got 0"),
    ({"max_steps": 2.5}, "max_steps must be.*got 2.5"),
    ({"logging_steps": -1}, "logging_steps must be.*got -1"),
    ({"save_steps": -1, "save_strategy": "steps"}, "save_steps must be.*got -1"),
    ({"eval_steps": -2}, "eval_steps must be.*got -2"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be.*got 0"),
    (
        {"update": "optimizer", "learning_rate": 0.1, "max_grad_norm": -1.0},
        "max_grad_norm must be at least 0, got -1.0",
    ),
    ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
    ({"prompts_per_step": 2.0}, "prompts_per_step must be a whole number.*got 2.0"),
    ({"images_per_prompt": "two"}, "images_per_prompt must be a whole number.*got 'two'"),
    ({"height": -64}, "height must be a whole number of at least 1, got -64"),
    ({"guidance_scale": -1.0}, "guidance_scale must be at least 0, got -1.0"),
    ({"lora_rank": 0}, "lora_rank must be a whole number of at least 1, got 0"),
    ({"lora_alpha": 0}, "lora_alpha must be above 0, got 0"),
    ({"sample_steps": -1}, "sample_steps must be a whole number of at least 0, got -1"),
    ({"reward_weights": [1.0, math.nan]}, "reward_weights must be finite, got"),
    ({"reward_retries": 0.5}, "reward_retries must be a whole number"),
    ({"reward_timeout": 0}, "reward_timeout must be above 0, got 0"),
    ({"reward_failure": "skip"}, "reward_failure must be one of raise, invalid; got 'skip'"),
    ({"save_failure": True}, "save_failure must be one of raise, warn; got True"),
    ({"max_invalid_fraction": 1.0}, "max_invalid_fraction must be at least 0 and below 1, got 1.0"),
    ({"dtype": "fp8"}, "dtype must be one of float32, bfloat16, float16; got 'fp8'"),
    ({"scale_rewards": 1}, "scale_rewards must be one of group, batch, none; got 1"),
    ({"multi_objective_aggregation": "mean"}, "multi_objective_aggregation must be one of .*got 'mean'"),
    ({"pipeline_kwargs": "{"}, "pipeline_kwargs must be a JSON object, got '{'"),
    ({"model_init_kwargs": "[1]"}, r"model_init_kwargs must be a mapping, got \[1\]"),
    # fields of TrainingArguments that mean nothing, or something else, here
    ({"bf16": True}, 'bf16=True is not supported: .*use dtype="bfloat16"'),
    ({"fp16": True}, 'fp16=True is not supported: .*use dtype="float16"'),
    ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=4 has no meaning.*set prompts_per_step"),
    ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ({"fsdp": True}, "fsdp=True is not supported.*torchrun"),
    ({"fsdp": "full_shard"}, "fsdp='full_shard' is not supported.*torchrun"),
    ({"deepspeed": "zero2.json"}, "deepspeed='zero2.json' is not supported.*torchrun"),
    ({"gradient_checkpointing": True}, "gradient_checkpointing=True is not supported: nothing is kept"),
    ({"torch_compile": True}, "torch_compile=True is not supported: .*compile_denoiser=True"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
    ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True is not supported: SIGTERM stops and saves anyway"),
    ({"save_total_limit": 1}, "save_total_limit must be at least 2, got 1"),
]


@pytest.mark.parametrize(("fields", "message"), FAULTS, ids=[str(fields) for fields, _ in FAULTS])
def test_a_wrong_setting_is_one_clear_sentence(tmp_path, no_model, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(tmp_path, **fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_token_in_the_config_is_refused_without_repeating_it(tmp_path):
    with pytest.raises(ValueError, match="hub_token is not supported.*hf auth login") as error:
        tiny_config(tmp_path, hub_token="hf_abcdefghijklmnopqrstuvwx")
    assert "hf_abc" not in str(error.value)


TRAINER_FAULTS = [
    ({"train_dataset": None}, ValueError, "train_dataset is missing"),
    ({"train_dataset": PROMPTS[:1]}, ValueError, "1 prompts, fewer than prompts_per_step=2; lower prompts_per_step"),
    ({"train_dataset": Dataset.from_dict({"text": PROMPTS})}, ValueError, "prompt"),
    ({"train_dataset": "no-such-file.txt"}, ValueError, "no-such-file.txt"),
    ({"eval_strategy": "steps"}, ValueError, "eval_strategy='steps' needs an eval_dataset"),
    ({"reward_funcs": "pickscor"}, ValueError, "pickscor.*pickscore"),
    ({"reward_funcs": []}, ValueError, "reward_funcs must be"),
    ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 values.*1 reward_funcs"),
    ({"eval_reward_funcs": ["clip_txt"]}, ValueError, "clip_txt.*clip_text"),
    ({"peft_config": LoraConfig(lora_dropout=0.1)}, ValueError, "lora_dropout must be 0.*got 0.1"),
    (
        {"peft_config": PromptTuningConfig(num_virtual_tokens=1, task_type="CAUSAL_LM")},
        TypeError,
        "peft_config must be",
    ),
    ({"model": 3}, TypeError, "model must be a string, a DiffusionPipeline, or an object with .*; got int"),
]


@pytest.mark.parametrize(("options", "kind", "message"), TRAINER_FAULTS, ids=[f[2][:30] for f in TRAINER_FAULTS])
def test_wrong_input_is_found_before_a_model_loads(tmp_path, no_model, options, kind, message):
    with pytest.raises(kind, match=message):
        tiny_trainer(tmp_path, **options)


def test_a_config_of_another_kind_is_refused(no_model):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args must be a ESConfig, got TrainingArguments"):
        ESTrainer("tiny-sana-sprint", redness, args=TrainingArguments(), train_dataset=PROMPTS)


def test_a_loaded_pipeline_takes_no_init_kwargs(tmp_path, no_model):
    with pytest.raises(ValueError, match="model_init_kwargs need model as a string"):
        tiny_trainer(tmp_path, model=stable_diffusion(), model_init_kwargs={"revision": "main"})


def test_an_output_dir_that_is_a_file_is_found_before_a_model_loads(tmp_path, no_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output_dir=.* cannot be written: .*file is a file"):
        tiny_trainer(tmp_path / "file")


def test_settings_of_the_pipeline_are_checked_against_its_call(tmp_path):
    with pytest.raises(ValueError, match="SanaSprintPipeline takes no eta_2; remove it"):
        tiny_trainer(tmp_path, pipeline_kwargs={"eta_2": 1})
    with pytest.raises(ValueError, match="LoRA could not be put on the transformer"):
        tiny_trainer(tmp_path, lora_target_modules=["to_x"])
    with pytest.raises(ValueError, match="lora_rank 9999 exceeds the smaller side"):
        tiny_trainer(tmp_path, lora_rank=9999)


# --- what is accepted ---


def test_scale_rewards_may_be_a_bool_as_in_trl(tmp_path):
    options = {"update": "optimizer", "learning_rate": 0.1}
    found = [tiny_config(tmp_path, scale_rewards=value, **options).scale_rewards for value in (True, False)]
    assert found == ["group", "none"]


def test_defaults_that_differ_from_the_trainer_s():
    config = ESConfig()
    assert config.max_grad_norm == 0.0 and config.remove_unused_columns is False
    assert config.update == "mean" and config.sigma is None and config.learning_rate is None
    assert (config.population_size, config.prompts_per_step, config.prompts_per_member) == (512, 32, 1)
    assert config.report_to == [] and not config.bf16 and not config.gradient_checkpointing


@pytest.mark.parametrize(
    ("population", "antithetic", "available", "prompts"),
    [(512, False, 512, 32), (512, False, 10, 8), (64, False, 512, 4), (16, False, 99, 4), (8, False, 99, 4),
     (4, False, 99, 2), (2, False, 99, 1), (64, True, 99, 4), (6, True, 99, 3), (100, False, 99, 5)],
)  # fmt: skip
def test_prompts_of_a_step_follow_from_population_and_prompts(population, antithetic, available, prompts):
    """One for every 16 members, in equal groups, and never more than there are."""
    config = ESConfig(population_size=population, antithetic=antithetic)
    config.fit_prompts(available)
    assert config.prompts_per_step == prompts
    assert config.population().group_size * prompts == population


def test_yaml_and_command_line(tmp_path):
    """As `es-trl train --config` reads them: the command line wins, whole numbers stay whole."""
    (tmp_path / "config.yaml").write_text(
        f"output_dir: {tmp_path}\npopulation_size: 8\nsigma: 0.05\ntravel: 1e-1\n"
        "lora_target_modules: [to_q, to_k]\n"
        "pipeline_kwargs: {clean_caption: false}\nmodel_init_kwargs: {revision: main}\n"
    )
    arguments = ["--config", str(tmp_path / "config.yaml"), "--sigma", "0.02", "--pipeline_kwargs", '{"eta": 0.5}']
    (config,) = TrlParser(ESConfig).parse_args_and_config(arguments)
    assert config.population_size == 8 and config.sigma == 0.02 and config.travel == 0.1
    assert config.lora_target_modules == ["to_q", "to_k"]
    assert config.pipeline_kwargs == {"eta": 0.5} and config.model_init_kwargs == {"revision": "main"}
    (tmp_path / "config.yaml").write_text("population_size: 12.5\n")
    with pytest.raises(ValueError, match="population_size must be a whole number.*got 12.5"):
        TrlParser(ESConfig).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])


class Judge:
    def __call__(self, images, **_):
        return [0.0] * len(images)


def test_a_config_with_functions_is_still_plain_data(tmp_path):
    held_out = [redness, functools.partial(redness, scale=1), Judge(), "jpeg_compressibility"]
    config = tiny_config(tmp_path, eval_reward_funcs=held_out)
    assert json.loads(config.to_json_string())["eval_reward_funcs"] == [
        "redness",
        "redness",
        "Judge",
        "jpeg_compressibility",
    ]
    assert tiny_config(tmp_path, eval_reward_funcs="clip_text").eval_reward_funcs == ["clip_text"]
    assert tiny_config(tmp_path, eval_reward_funcs=redness).eval_reward_funcs == [redness]


def test_optimizer_arguments_that_the_trainer_would_drop_are_refused(tmp_path, no_model):
    with pytest.raises(ValueError, match="optim_args='momentun=0.9'.*does not pass 'momentun' to optim='sgd'"):
        tiny_trainer(tmp_path, update="optimizer", learning_rate=0.1, optim="sgd", optim_args="momentun=0.9")
