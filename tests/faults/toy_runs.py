"""Runs of a second on the toy pipeline."""

import dataclasses

from es_trl import ESConfig, ESTrainer
from recipes.benchmarks.toy_pipeline import redness, toy_pipeline


PROMPTS = ["a red apple", "two blue cats", "a green frog", "a pink dog", "three yellow stars", "a brown chair"]
RUN = {
    "max_steps": 6, "population_size": 6, "members_per_forward": 2, "prompts_per_step": 2, "lora_rank": 2,
    "lora_target_modules": ["to_q", "to_out"], "sample_steps": 0, "report_to": "none", "disable_tqdm": True,
    "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "sigma": 0.1, "prompts_per_member": None,
    "travel": 2.0, "use_cpu": True,
}  # fmt: skip


def toy_trainer(output_dir, reward_funcs=redness, **options) -> ESTrainer:
    """Keywords that are not the trainer's go to the config."""
    fields = {field.name for field in dataclasses.fields(ESConfig)}
    config = RUN | {name: options.pop(name) for name in list(options) if name in fields}
    options = {"train_dataset": PROMPTS} | options
    return ESTrainer(toy_pipeline(), reward_funcs, args=ESConfig(output_dir=str(output_dir), **config), **options)


def train(output_dir, resume=None, **options) -> ESTrainer:
    trainer = toy_trainer(output_dir, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CLOCK = ("time", "runtime", "per_second", "overhead", "train_loss", "comm_bytes", "memory")


def history(trainer):
    """All that was logged, without what a clock measured."""
    entries = [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in trainer.state.log_history]
    return [entry for entry in entries if "loss" in entry or "eval_reward" in entry]
