"""Runs of seconds for the policy-gradient methods: the shipped model, small groups, rewards that cost nothing."""

import dataclasses
from pathlib import Path

from tiny_runs import PROMPTS, SMALL, redness

from es_trl.trainer import PolicyGradientTrainer, config_of, trainer_of


def tiny_policy(
    output_dir: Path | str, method: str = "grpo", reward_funcs=redness, **options
) -> PolicyGradientTrainer:
    """Two prompts, groups of three, three steps; keywords that are not the trainer's go to the config."""
    config_class, trainer_class = config_of(method), trainer_of(method)
    fields = {field.name for field in dataclasses.fields(config_class)}
    config = {name: options.pop(name) for name in list(options) if name in fields}
    quiet = {"sample_steps": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    small = {"max_steps": 3, "num_generations": 3, "prompts_per_step": 2, "lora_rank": 2, "learning_rate": 1e-2}
    small |= {"images_per_forward": 3, "guidance_scale": 2.0, "max_sequence_length": 16, "use_cpu": True}
    options = {"model": "tiny-sana-sprint", "train_dataset": PROMPTS} | options
    small |= SMALL if options["model"] == "tiny-sana-sprint" else {}
    args = config_class(output_dir=str(output_dir), **(small | quiet | config))
    return trainer_class(reward_funcs=reward_funcs, args=args, **options)
