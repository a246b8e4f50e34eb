"""One training run from its arguments: train, save, evaluate, push. Recipes and `es-trl train` are both this."""

import contextlib
import logging
import os
from collections.abc import Iterator

from datasets import Dataset
from transformers.trainer_callback import TrainerCallback

from ..data import load_prompts
from ..report import LivePage, write_report
from ..run import running
from ..trainer import DiffusionConfig, DiffusionTrainer
from .arguments import RunArguments
from .messages import show_messages
from .rerun import write_rerun


logger = logging.getLogger(__name__)


def prepare(
    trainer_class: type[DiffusionTrainer],
    arguments: RunArguments,
    config: DiffusionConfig,
    callbacks: list[TrainerCallback] | None = None,
) -> DiffusionTrainer:
    """
    Loads prompts, model and rewards; what cannot work fails here.

    Args:
        trainer_class (`type`): The method.
        arguments ([`RunArguments`]), config ([`DiffusionConfig`]): What [`parse`] returns.
        callbacks (`list[TrainerCallback]`, *optional*): Beside those every trainer carries.

    Raises:
        `ValueError`: for prompts, rewards, a model or settings that cannot work.
    """
    show_messages(config.process_index == 0)
    train, evaluation, test = prompts_of(arguments)
    trainer = trainer_class(
        model=arguments.model_name_or_path, reward_funcs=arguments.reward_funcs, args=config,
        train_dataset=train, eval_dataset=evaluation, callbacks=callbacks,
    )  # fmt: skip
    trainer.name_data(arguments.dataset_name, test)
    return trainer


def prompts_of(arguments: RunArguments) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Prompts for training, for evaluations and for the comparison; None where the arguments name none."""
    train = load_prompts(
        arguments.dataset_name, arguments.dataset_train_split, arguments.dataset_prompt_column,
        arguments.max_train_prompts, arguments.dataset_config, arguments.dataset_revision,
    )  # fmt: skip
    others = [
        (arguments.eval_dataset_name, arguments.eval_dataset_prompt_column, arguments.max_eval_prompts),
        (arguments.test_dataset_name, arguments.test_dataset_prompt_column, arguments.max_test_prompts),
    ]
    found = [load_prompts(name, column=column, max_prompts=most) if name else None for name, column, most in others]
    return train, *found


@contextlib.contextmanager
def _live_page(trainer: DiffusionTrainer, arguments: RunArguments) -> Iterator[None]:
    """With `live`, the page of the run is served until its results are on it; its address is in the log."""
    if not arguments.live or not trainer.is_world_process_zero():
        yield
        return
    page = LivePage(trainer.args.output_dir, arguments.live_port, running).start()
    logger.info("The page of this run, on this machine only: %s", page.url)
    try:
        yield
    finally:
        page.close()


def run(trainer: DiffusionTrainer, arguments: RunArguments) -> None:
    """
    Trains, saves, evaluates, reports and pushes, with what [`prepare`] and [`parse`] return. `output_dir` is then a
    complete run folder: the LoRA, the card, samples, (with `test_dataset_name`) `eval.json` with intervals,
    `rerun.yaml`, and the page `report/index.html`.
    """
    with trainer.folder.lock if trainer.args.should_save else contextlib.nullcontext():
        _run(trainer, arguments)


def _run(trainer: DiffusionTrainer, arguments: RunArguments) -> None:
    config, test = trainer.args, trainer.test_dataset
    if trainer.is_world_process_zero():
        if not config.resume_from_checkpoint:
            trainer.folder.set_earlier_aside()
        write_rerun(arguments, config)
    if test is not None:
        trainer.prepare_prompts(test["prompt"])
    with _live_page(trainer, arguments):
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.save_state()
        if test is not None:
            trainer.compare_with_base(test, images_per_prompt=arguments.test_images_per_prompt, judge=arguments.judge)
        trainer.save_model(_internal_call=True)  # pushed once, below
        page = write_report(config.output_dir) if trainer.is_world_process_zero() else None
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    logger.info(
        "The adapter, its card (README.md) and the samples are in %s. Look at %s first.",
        config.output_dir,
        page or os.path.join(config.output_dir, "samples", "before_after.jpg" if test is not None else ""),
    )
    if config.push_to_hub and trainer.hub.failed:
        raise SystemExit(1)  # everything is on disk, and the log says how to push it
