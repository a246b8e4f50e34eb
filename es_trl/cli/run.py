"""One training run from its arguments: train, save, evaluate, push. Recipes and `es-trl train` are both this."""

import logging

from transformers.trainer_callback import TrainerCallback

from ..data import load_prompts
from ..trainer import DiffusionConfig, DiffusionTrainer
from .arguments import RunArguments


logger = logging.getLogger(__name__)


def run(
    trainer_class: type[DiffusionTrainer],
    arguments: RunArguments,
    config: DiffusionConfig,
    callbacks: list[TrainerCallback] | None = None,
) -> DiffusionTrainer:
    """
    Trains an adapter and leaves a complete run folder in `config.output_dir`: the LoRA, the card, samples, and (with
    `test_dataset_name`) `eval.json` with intervals.

    Args:
        trainer_class (`type`): The method.
        arguments ([`RunArguments`]), config ([`DiffusionConfig`]): What [`parse`] returns.

    Returns:
        The trainer, after training.
    """
    train = load_prompts(
        arguments.dataset_name,
        arguments.dataset_train_split,
        arguments.dataset_prompt_column,
        arguments.max_train_prompts,
    )
    evaluation = _prompts(arguments.eval_dataset_name, arguments.max_eval_prompts)
    test = _prompts(arguments.test_dataset_name, arguments.max_test_prompts)
    trainer = trainer_class(
        model=arguments.model_name_or_path,
        reward_funcs=arguments.reward_funcs,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=callbacks,
    )
    trainer.dataset_name = arguments.dataset_name
    if test is not None:
        trainer.prepare_prompts(test["prompt"])
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    if test is not None:
        trainer.compare_with_base(test, images_per_prompt=arguments.test_images_per_prompt, judge=arguments.judge)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return trainer


def _prompts(name: str | None, max_prompts: int | None):
    return load_prompts(name, max_prompts=max_prompts) if name else None
