"""What a trainer is made of: rewards loaded once, prompts encoded when drawn, one clock, facts on settings."""

import io
import json
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import PROMPTS, brightness, tiny_trainer

from es_trl import assets, evaluate
from es_trl.formatting import duration
from es_trl.report.groups import group
from es_trl.rewards import registry
from es_trl.run.facts import INHERITED
from es_trl.trainer import METHODS, config_of
from es_trl.trainer.prompt_batches import PromptBlocks


def test_every_reward_model_is_built_once(tmp_path, monkeypatch):
    built, attribute = [], registry._attribute
    monkeypatch.setattr(registry, "_attribute", lambda *of: built.append(of[-1]) or attribute(*of))
    trainer = tiny_trainer(tmp_path, "tiny-pickscore", eval_reward_funcs=["jpeg_compressibility", brightness])
    assert len(built) == len(set(built)) == 2
    assert trainer.eval_rewards.functions()[0] is trainer.rewards.functions()[0]
    assert trainer.eval_rewards.names == ["tiny-pickscore", "jpeg_compressibility", "brightness"]


def test_a_path_is_a_folder_as_its_name_is(tmp_path):
    folder = Path(assets.resolve("tiny-sana-sprint"))
    assert tiny_trainer(tmp_path, model=folder).base_model == str(folder)
    assert evaluate(folder, PROMPTS[:1], brightness, steps=[1], images_per_prompt=1).details["model"] == str(folder)


def test_prompts_are_encoded_when_they_are_first_drawn(tmp_path):
    """In the blocks of 16 that the data set makes, whatever the order of the steps, and none that is not needed."""
    prompts = [f"{number} red apples" for number in range(64)]
    trainer = tiny_trainer(tmp_path, train_dataset=prompts, max_steps=1, prompts_per_step=2)
    encoded, encode = [], trainer.adapter.prompts.encode
    trainer.adapter.prompts.encode = lambda texts, columns: encoded.append(tuple(texts)) or encode(texts, columns)
    trainer.train()
    blocks = [tuple(prompts[i : i + 16]) for i in range(0, 64, 16)]
    drawn = {text for text in encoded if len(text) == 16}
    assert drawn <= set(blocks) and 1 <= len(drawn) <= 2


def test_all_prompts_are_encoded_ahead_when_the_text_encoder_goes(tmp_path):
    prompts = [f"{number} red apples" for number in range(40)]
    trainer = tiny_trainer(tmp_path, train_dataset=prompts, max_steps=1, prompts_per_step=2, release_text_encoder=True)
    trainer.train()
    trainer.evaluate(prompts[-4:])
    assert trainer.adapter.pipe.text_encoder is None


def test_blocks_do_not_depend_on_what_is_asked_for():
    class Encoder:
        batch_size = 2

        def __init__(self):
            self.calls = []

        def encode(self, prompts, columns=None):
            self.calls.append(prompts)

    calls = []
    for asked in (["a", "d"], ["d", "b"]):
        encoder = Encoder()
        blocks = PromptBlocks(encoder)
        blocks.plan(["a", "b", "a", "c", "d", "e"])
        blocks.encode(asked)
        blocks.encode(asked)
        calls.append(sorted(encoder.calls))
    assert calls == [[("a", "b"), ("c", "d")]] * 2


@pytest.mark.parametrize("show, terminal, seen", [(True, True, True), (True, False, False), (False, True, False)])
def test_encoding_that_takes_a_while_has_a_bar_on_a_terminal(monkeypatch, show, terminal, seen):
    class Slow:
        batch_size = 1

        def encode(self, prompts, columns=None):
            time.sleep(0.3)

    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    blocks = PromptBlocks(Slow(), show)
    blocks.plan(list("abcd"))
    blocks.encode_rows([{"prompt": prompt} for prompt in "abcd"])
    assert ("Encoding prompts" in screen.getvalue()) is seen


def test_one_clock_counts_the_steps_before_a_resume(tmp_path):
    """State, logs, page and card: all the seconds of all the images, and the same number."""
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    first = tiny_trainer(tmp_path, max_steps=2, **options)
    first.train()
    first.clock.seconds = 1000.0
    first.checkpoints.write()
    second = tiny_trainer(tmp_path, max_steps=4, **options)
    second.train(resume_from_checkpoint=True)
    assert 1000 < second.clock.seconds < 1100
    assert second.state.log_history[-1]["train_time"] == second.clock.seconds
    second.save_model()
    card = (tmp_path / "README.md").read_text()
    assert second.images_drawn == 32 and "32 images" in card and duration(second.clock.seconds) in card


@pytest.mark.parametrize("prefix", ["eval", "val", "test"])
def test_an_evaluation_leaves_the_metrics_of_the_steps_alone(tmp_path, prefix):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.add_metric("mine", 2.0)
    logged = trainer.evaluate(PROMPTS[:1], metric_key_prefix=prefix)
    assert f"{prefix}_reward" in logged and "mine" not in trainer.state.log_history[-1]
    assert trainer.metrics.take() == {"mine": 2.0}


def test_evaluating_at_the_start_needs_prompts_to_evaluate(tmp_path):
    with pytest.raises(ValueError, match="eval_on_start=True needs an eval_dataset"):
        tiny_trainer(tmp_path, model="no/such-model", eval_on_start=True)


# ---- what a setting changes ----

# Every setting of ours and of the Trainer, reviewed: a new one fails here until someone has decided what it changes.
# What is not named changes the numbers; `INHERITED` is the list for the Trainer's own.
REVIEWED = {
    "measures": {
        "early_warning",
        "eval_images_per_prompt",
        "eval_num_inference_steps",
        "eval_reward_funcs",
        "eval_seed",
    },
    "output": {"log_images", "num_sample_prompts", "sample_steps"},
    "run": {
        "max_invalid_fraction",
        "release_text_encoder",
        "reward_retries",
        "reward_timeout",
        "save_failure",
        "text_encoder_device",
    },
    "numbers": set(
        """
        adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices data_seed dataloader_drop_last
        full_determinism gradient_accumulation_steps label_names label_smoothing_factor learning_rate
        length_column_name lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps neftune_noise_alpha
        num_train_epochs optim optim_args optim_target_modules per_device_train_batch_size
        remove_unused_columns seed tf32 train_sampling_strategy use_cpu warmup_ratio warmup_steps weight_decay

        advantage_clip antithetic beta checkpoint_activations chosen_column compile_denoiser
        complex_human_instruction draw_with dtype epsilon epsilon_high es_space
        fitness_shaping frozen_adapters guard_reward_funcs guidance_scale height images_per_backward images_per_forward
        images_per_prompt init_adapter init_same_noise intermediate_times logit_mean logit_std lora_alpha lora_rank
        lora_target_modules loss_type max_noise_level max_sequence_length
        members_per_forward min_noise_level model_init_kwargs multi_objective_aggregation noise_draws
        noise_level noise_level_sampling noise_rank noise_reuse num_generations num_inference_steps
        num_iterations online output_change output_noise pairwise_judge per_prompt_stat_tracking
        per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count pipeline_kwargs
        population_size prompts_per_member prompts_per_step quantization_config rejected_column reward_device
        reward_dtype reward_failure reward_weights sample_num_steps scale_rewards sde_window_interval sde_window_size
        sigma slope_reward_funcs
        scheduler_config steps_per_generation travel update vae_slicing vae_tiling when_margin_turns width
        win_rate_temperature
        """.split()
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_says_what_it_changes(method):
    config_class = config_of(method)
    reviewed = {name: kind for kind, names in REVIEWED.items() for name in names}
    reviewed |= {name: kind for kind, names in INHERITED.items() for name in names.split()}
    for name, kind in config_class.changes().items():
        assert reviewed.get(name) == kind, f"{name} changes {kind}: is that so? Then write it into REVIEWED"


def run_folder(path, **settings):
    path.mkdir()
    trainer = tiny_trainer(path, max_steps=1, **settings)
    trainer.train()
    trainer.save_model()
    return path


def test_seeds_that_differ_only_in_what_is_written_are_one_method(tmp_path):
    from es_trl.report.folder import read_folder

    folders = [
        run_folder(tmp_path / "a", seed=1, logging_steps=1),
        run_folder(tmp_path / "b", seed=2, logging_steps=7, save_total_limit=3, sample_steps=0),
        run_folder(tmp_path / "c", seed=3, sigma=0.2),
    ]
    groups = group([read_folder(folder) for folder in folders])
    assert [len(method.runs) for method in groups] == [2, 1]
    assert json.loads((folders[0] / "es_config.json").read_text())["changes"]["logging_steps"] == "output"
