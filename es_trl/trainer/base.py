"""DiffusionTrainer: a `transformers.Trainer` whose model is the adapter of a frozen diffusers pipeline."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import PeftConfig
from transformers import Trainer, TrainerCallback, TrainerControl

from ..data import load_prompts
from ..evaluation import Evaluation, EvaluationRow, default_rows
from ..hub.environment import environment
from ..hub.methods import Method
from ..names import checked
from ..pipelines import Generator, as_pipeline
from ..rewards import RewardSet
from ..rewards.results import refuse_missing
from ..run.checkpoints import Checkpoints
from ..run.early_warning import EarlyWarningCallback
from ..run.folder import RunFolder
from ..run.hub_pusher import HubPusher
from ..run.image_table import ImageTable
from ..run.journaling import JournalCallback
from ..run.live import LiveCallback, ended
from ..run.metrics import Metrics
from ..run.processes import Peers, same_numbers, warn_if_fewer_processes
from ..run.progress import StepClock, show_progress
from ..run.results import Results, columns_of
from ..run.samples import SampleCallback
from ..run.settings import save_run_files
from ..run.stopping import Stopping, StopRequested
from .config import DiffusionConfig
from .inputs import AdapterView, checked_args, checked_datasets, load_adapter, lora_config_of
from .prompt_batches import PromptBlocks, TellEpoch, prompt_dataloader


logger = logging.getLogger(__name__)

RewardFunc = str | Callable[..., Sequence[float | None]]


class DiffusionTrainer(Trainer):
    """
    What every method shares: pipeline, rewards, prompts, evaluation, samples, logging, saving and resuming.

    A method subclasses this and writes `training_step`, which leaves its update direction in `.grad` of the adapter's
    parameters; the Trainer does the rest. What it calls by name is overridden here, a line each; the work is done by
    `checkpoints`, `stopping`, `results`, `hub`, `samples`, `metrics`, `clock` and `journal`.

    Args:
        model (`str`, `PathLike`, `DiffusionPipeline` or [`~es_trl.pipelines.Generator`]):
            A shipped name (`"tiny-sana-sprint"`), a folder, a Hub id, a pipeline, or an object that draws.
        reward_funcs (`str`, `Callable`, or a list of them):
            What is maximised. Called with keywords `prompts`, `images`, `trainer_state`, `log_extra`, `log_metric` and
            the data set's columns; returns one float or None per image.
        args ([`DiffusionConfig`], *optional*):
            Settings.
        train_dataset (`Dataset`, `list[str]` or `str`):
            Prompts, in any form that [`load_prompts`] takes; needs a column `"prompt"`.
        eval_dataset (`Dataset`, `list[str]` or `str`, *optional*):
            Prompts for evaluations during training.
        callbacks (`list[TrainerCallback]`, *optional*), optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].
        quantization_config (`PipelineQuantizationConfig` or `dict`, *optional*): Overrides that of the config.
        peft_config (`LoraConfig`, *optional*):
            Overrides `lora_rank`, `lora_alpha` and `lora_target_modules` of the config.

    Raises:
        `ValueError`, `TypeError`: for input that cannot work; before a model loads where that is possible.
    """

    config_class: type[DiffusionConfig] = DiffusionConfig
    method_name = "diffusion"
    about = Method("diffusion")
    keeps_journal = False  # whether a run can be replayed from the scores of its `last_step`s
    last_step: Any = None

    @checked
    def __init__(
        self,
        model: str | os.PathLike[str] | DiffusionPipeline | Generator,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DiffusionConfig | None = None,
        train_dataset: Dataset | list[str] | str | None = None,
        eval_dataset: Dataset | list[str] | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: PipelineQuantizationConfig | dict | None = None,
    ):
        model = as_pipeline(model)
        args = checked_args(self, args, model)
        self.rewards = RewardSet(reward_funcs, args.reward_weights, **args.scorer_place, **args.reward_calls)
        self.eval_rewards = self.rewards.with_more(args.eval_reward_funcs or [])
        train_dataset, eval_dataset = self._check_datasets(train_dataset, eval_dataset, args)
        self.adapter = load_adapter(model, lora_config_of(peft_config, args), args, quantization_config)
        self.prompt_blocks = PromptBlocks(self.adapter.prompts, show=args.process_index == 0 and not args.disable_tqdm)
        self.base_model = model if isinstance(model, str) else self.adapter.base_name
        self.name_data()
        self._micro_step, self._micro, self._warned_constant = -1, -1, False
        self.environment = environment()  # of the code that is loaded now, whatever is checked out by the next save
        self.folder = RunFolder(args.output_dir, args.save_failure)
        self.metrics, self.checkpoints, self.results = Metrics(), Checkpoints(self), Results(self)
        self.hub = HubPusher(args, self.results.write_card)
        data = {"data_collator": list, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(AdapterView(self.adapter.theta), args, callbacks=callbacks, optimizers=optimizers, **data)
        warn_if_fewer_processes(args.world_size)
        self.peers = Peers(args.process_index, args.world_size, args.ddp_timeout)
        self._set_up_pipeline()
        show_progress(self)
        self.clock, self.samples, self.stopping = StepClock(), SampleCallback(self), Stopping(self.peers)
        self.journal = JournalCallback(self) if self.keeps_journal else None
        self.image_table, warning = ImageTable(self.rewards.names, self), EarlyWarningCallback(self)
        watchers = [self.image_table, warning, LiveCallback(self), self.stopping, self.checkpoints]
        for callback in filter(None, [TellEpoch(), self.clock, self.samples, self.journal, *watchers]):
            self.add_callback(callback)

    # ---- input ----

    def _check_datasets(self, train_dataset, eval_dataset, args: DiffusionConfig) -> tuple[Dataset, Dataset | None]:
        return checked_datasets(train_dataset, eval_dataset, args)

    def _set_up_pipeline(self) -> None:
        encoders = torch.device(self.args.text_encoder_device or self.args.device)
        self.adapter.to(self.args.device, encoders_first=encoders if self.args.release_text_encoder else None)
        same_numbers(self.adapter.state_dict().values(), self.args.world_size)
        with self.peers.together("loading the rewards"):
            self.eval_rewards.load()  # a scorer that cannot be had ends the run now, not at the first evaluation
        if self.args.compile_denoiser:
            self.adapter.denoiser.compile(fullgraph=True)

    def prepare_prompts(self, prompts: Sequence[str], columns: Mapping[str, Sequence] | None = None) -> None:
        """
        Says which prompts will be drawn. When the text encoder will be released they are encoded now, with a bar, and
        this is needed for any beyond the data sets; otherwise when a step first draws one of them.
        """
        self.prompt_blocks.plan(prompts, columns)
        if self.args.release_text_encoder:
            self.prompt_blocks.encode(prompts)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As in the Trainer. `resume_from_checkpoint` may be True or `"latest"` (the newest whole checkpoint of
        `output_dir`) or a folder; a missing or damaged one is an error, never a silent fresh start.

        Raises:
            `TrainingStopped`: once the checkpoint of a run that was asked to stop is on disk.
        """
        for dataset in (self.train_dataset, self.eval_dataset):
            if dataset is not None:
                self.prepare_prompts(dataset["prompt"], columns_of(dataset))
        if self.args.release_text_encoder and not self.adapter.prompts.released:
            self.adapter.release_text_encoders()
        self._micro_step = -1  # a step that a stopped run has begun is begun anew
        self.stopping.begin_update()  # until the loop has loaded what it continues from
        with self.stopping.signals, ExitStack() as stack:
            with self.peers.together("taking the run folder"):
                if self.args.should_save:
                    stack.enter_context(self.folder.lock)
                checkpoint = self.checkpoints.begin(resume_from_checkpoint)
            try:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                self.stopping.check(self.state.global_step)
                return output
            except StopRequested as stop:
                self.is_in_train = False
                raise self.checkpoints.after_stop() from stop
            except Exception as error:
                self.peers.tell(error, f"step {self.state.global_step}")
                self.checkpoints.after_error()
                raise
            finally:
                if self.args.should_save:
                    ended(self.args.output_dir)

    @property
    def images_drawn(self) -> int:
        """Images drawn for training so far, counting the steps before a resume."""
        # The last step of an epoch accumulates what prompt batches are left.
        accumulated = self.args.gradient_accumulation_steps
        batches = len(self.train_dataset) // self.args.prompts_per_step
        epochs, steps = divmod(self.state.global_step, math.ceil(batches / accumulated))
        return (epochs * batches + min(steps * accumulated, batches)) * self.images_per_batch

    @property
    def images_per_batch(self) -> int:
        """Images of one training step on one prompt batch, over all processes."""
        return self.args.prompts_per_step * self.args.images_per_prompt

    @property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline with the adapter on it, up to date with training: `trainer.pipe(prompt=...)` draws."""
        self.adapter.write_back()
        return self.adapter.pipe

    def name_data(self, dataset_name: str | None = None, test_dataset: Dataset | None = None) -> None:
        """Says what the card calls the training prompts, and which prompts the comparison at the end draws."""
        self.dataset_name, self.test_dataset = dataset_name, test_dataset

    # ---- training ----

    def get_train_dataloader(self):
        """Prompt batches, the same on every process."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return prompt_dataloader(self.train_dataset, self.args.prompts_per_step, seed, self.prompt_blocks.encode_rows)

    def get_total_train_batch_size(self, args) -> int:
        return args.prompts_per_step * args.gradient_accumulation_steps

    def next_micro(self) -> int:
        """Index of this call of `training_step` within its step (0 without gradient accumulation)."""
        self._micro = self._micro + 1 if self._micro_step == self.state.global_step else 0
        self._micro_step = self.state.global_step
        return self._micro

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Draws the evaluation prompts with the current adapter, unperturbed, and scores them with all reward functions.

        Args:
            eval_dataset (*optional*): Prompts; the constructor's by default.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the metrics.

        Returns:
            `dict[str, float]`: `eval_reward` (the weighted sum that is trained), `eval_rewards/<name>/mean` for every
            function, optimised or held out, `eval_images_per_second`; with several images per prompt
            `eval_diversity`.
        """
        dataset = self.eval_dataset if eval_dataset is None else load_prompts(eval_dataset)
        if dataset is None:
            raise ValueError("evaluate() needs an eval_dataset: give one here or to the constructor.")
        found = self.results.evaluate_adapter(dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_rows(self) -> list[EvaluationRow]:
        """The rows of the comparison: base, adapter, base with twice the steps, and what a method adds to them."""
        return default_rows(self.adapter.steps)

    def compare_with_base(
        self,
        test_dataset,
        images_per_prompt: int = 1,
        judge: str | None = None,
        seed: int | None = None,
        num_pictures: int = 6,
    ) -> Evaluation:
        """
        Draws test prompts with the base, the adapter, and the base with twice the steps, from the same latents, scores
        all of them with every reward function, and writes `eval.json`, `eval.md`, `scores.parquet`, `prompts.jsonl`,
        the pictures of both ends and the middle (`images/`), and `samples/before_after.jpg`.

        Args:
            test_dataset: Prompts that training never saw, in any form [`load_prompts`] takes.
            images_per_prompt (`int`, *optional*, defaults to 1): Images, with latents of their own, per prompt.
            judge (`str`, *optional*): CLIP checkpoint for retrieval, hard negatives and Frechet distance.
            seed (`int`, *optional*): Seed of the latents; by default not that of training or its evaluations.
            num_pictures (`int`, *optional*, defaults to 6): Prompts in the before/after picture.

        Returns:
            [`~es_trl.evaluation.Evaluation`]
        """
        dataset = load_prompts(test_dataset)
        return self.results.compare(dataset, self.evaluation_rows(), images_per_prompt, judge, seed, num_pictures)

    # ---- logging ----

    def add_metric(self, name: str, value: float) -> None:
        """Collects a number of this step; its mean over the steps since the last log is logged."""
        self.metrics.add(name, value)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """
        As in the Trainer, plus the budget so far (images and seconds of steps), and in the logs of training the
        metrics collected since the last one; a metric without any finite value is logged as None.
        """
        if "loss" in logs or "train_loss" in logs:
            logs |= self.metrics.take()
        logs |= {"num_images": self.images_drawn, "train_time": self.clock.seconds}
        super().log(logs, start_time)

    def warn_once(self, message: str) -> None:
        """Says once in a run that a step teaches nothing."""
        if not self._warned_constant:
            self._warned_constant = True
            logger.warning("Step %d: %s", self.state.global_step, message)

    def refuse_missing(self, missing: float, what: str, scores, names: Sequence[str], prompt: str) -> None:
        """Raises `RuntimeError` if more than `max_invalid_fraction` of the step has no finite reward."""
        step, limit, complaint = (
            self.state.global_step,
            self.args.max_invalid_fraction,
            self.adapter.drawer.complaint(),
        )
        refuse_missing(missing, what, scores, names, step, prompt, limit, complaint)

    def resume_logs(self, logged: dict[str, Any] | None) -> None:
        """Goes on with what a run had collected since its last log, once the training loop has reset its sums."""
        if logged is not None:
            self._tr_loss.fill_(logged["loss"])
            self._globalstep_last_logged = logged["logged_at"]
        self.metrics.restore(logged["sums"] if logged is not None else {})

    def run_record(self) -> dict[str, Any]:
        """What a method has to say of its run beside the settings; its replay may need it."""
        return {}

    # ---- what the Trainer calls by name ----

    def _save_checkpoint(self, model, trial) -> None:
        if self.checkpoints.save() and self.args.push_to_hub:
            self._push_from_checkpoint(self.checkpoints.folder)

    def _determine_best_metric(self, metrics, trial) -> bool:
        self.checkpoints.remember_best()
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        self.checkpoints.load_best()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.checkpoints.load_adapter(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.checkpoints.load_optimizer(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every random number is a function of the seed, the step and its purpose."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no gradient scaler, and a `scaler.pt` that someone put there is not opened."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter (`pytorch_lora_weights.safetensors`), what ran, and the model card."""
        if self.args.should_save:
            save_run_files(self, output_dir or self.args.output_dir)
            self.create_model_card(output_dir=output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, output_dir: str | None = None, **kwargs) -> None:
        """
        Writes the model card `README.md` (library diffusers, not transformers) into `output_dir`, by default the run
        folder. `license` is by default that of the base model's card, `tags` come beside those that every card has,
        and `finetuned_from` and `dataset_name` are what the trainer was given.
        """
        self.results.write_card(output_dir, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the Trainer; a Hub that cannot be reached is a warning, and the next push tries again."""
        if self.is_world_process_zero():
            self.hub.open(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Uploads adapter, card, samples and settings in one commit, as [`~transformers.Trainer.push_to_hub`]. A failed
        upload is logged with the command that repeats it, and None is returned; the files are safe in `output_dir`.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        card = {name: value for name, value in kwargs.items() if name in ("dataset_name", "tags", "license")}
        return self.hub.push(commit_message or "End of training", blocking, token, revision, private, **card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.hub.push_checkpoint(checkpoint_folder, self.state.global_step)

    def _finish_current_push(self) -> None:
        self.hub.finish()
