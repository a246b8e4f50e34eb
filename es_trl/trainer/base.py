"""DiffusionTrainer: a `transformers.Trainer` whose model is the adapter of a frozen diffusers pipeline."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather as gather_tensors
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftConfig
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..data import load_prompts
from ..evaluation import EvaluationRow
from ..hub.environment import environment
from ..names import checked
from ..pipelines import (
    DEFAULT_TARGETS,
    CallSettings,
    PipelineAdapter,
    check_lora_config,
    check_pipeline,
    load_pipeline,
)
from ..rewards import RewardSet
from ..run.early_warning import EarlyWarningCallback
from ..run.journaling import JournalCallback
from ..run.live import LiveCallback, ended
from ..run.processes import Peers, warn_if_fewer_processes
from ..run.progress import StepClock, StepProgressCallback
from ..run.pushing import PushingMixin
from ..run.reporting import ReportingMixin
from ..run.samples import SampleCallback
from ..run.saving import SavingMixin, check_writable
from ..run.stopping import RunCallback, StopSignals
from ..run.trackers import check_trackers
from .adapter_view import AdapterView
from .config import DiffusionConfig
from .prompt_batches import prompt_dataloader


logger = logging.getLogger(__name__)

RewardFunc = str | Callable[..., Sequence[float | None]]


class DiffusionTrainer(SavingMixin, ReportingMixin, PushingMixin, Trainer):
    """
    What every method shares: pipeline, rewards, prompts, evaluation, samples, logging, saving and resuming.

    A method subclasses this and writes `training_step`, which leaves its update direction in `.grad` of the adapter's
    parameters; the Trainer does the rest.

    Args:
        model (`str` or `DiffusionPipeline`):
            A shipped name (`"tiny-sana-sprint"`), a folder, a Hub id, or a loaded pipeline.
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
        peft_config (`LoraConfig`, *optional*):
            Overrides `lora_rank`, `lora_alpha` and `lora_target_modules` of the config.

    Raises:
        `ValueError`, `TypeError`: for input that cannot work; before a model loads where that is possible.
    """

    config_class: type[DiffusionConfig] = DiffusionConfig
    method_name = "diffusion"
    keeps_journal = False  # whether a run can be replayed from the scores of its `last_step`s
    es_space = "lora"

    @checked
    def __init__(
        self,
        model: str | DiffusionPipeline,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: DiffusionConfig | None = None,
        train_dataset: Dataset | list[str] | str | None = None,
        eval_dataset: Dataset | list[str] | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = self._check_args(args, model)
        calls = {"retries": args.reward_retries, "timeout": args.reward_timeout, "failure": args.reward_failure}
        self.rewards = RewardSet(reward_funcs, args.reward_weights, device=args.device, **calls)
        all_funcs = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        self.eval_rewards = RewardSet([*all_funcs, *(args.eval_reward_funcs or [])], device=args.device, **calls)
        train_dataset, eval_dataset = self._check_datasets(train_dataset, eval_dataset, args)
        lora_config = self._lora_config(peft_config, args)

        self.adapter = self._load_adapter(model, lora_config, args)
        self.base_model = model if isinstance(model, str) else model.name_or_path or type(model).__name__
        self._metrics: dict[str, tuple[float, int]] = {}
        self._micro_step, self._micro = -1, -1
        self.training_seconds = 0.0
        self.environment = environment()  # of the code that is loaded now, whatever is checked out by the next save
        super().__init__(
            model=AdapterView(self.adapter.theta),
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        warn_if_fewer_processes(args.world_size)
        self.peers = Peers(args.process_index, args.world_size, args.ddp_timeout)
        self.stop_signals, self.theta_is_whole = StopSignals(), True
        self._refused: set[str] = set()
        self._set_up_pipeline()
        self._replace_progress_callback()
        self.clock = StepClock()
        self.add_callback(self.clock)
        self.sample_callback = SampleCallback(self)
        self.add_callback(self.sample_callback)
        self.journal = JournalCallback(self) if self.keeps_journal else None
        if self.journal is not None:
            self.add_callback(self.journal)
        self.add_callback(EarlyWarningCallback(self))
        self.add_callback(LiveCallback(self))
        self.add_callback(RunCallback(self))

    # ---- input ----

    def _check_args(self, args: DiffusionConfig | None, model) -> DiffusionConfig:
        if not isinstance(model, str | DiffusionPipeline):
            raise TypeError(f"model must be a string or a DiffusionPipeline, got {type(model).__name__}.")
        if args is None:
            name = model.rstrip("/").split("/")[-1] if isinstance(model, str) else type(model).__name__
            args = self.config_class(output_dir=f"{name}-{self.method_name.upper()}")
        if not isinstance(args, self.config_class):
            raise TypeError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}.")
        check_writable(args.output_dir)
        check_trackers(args.report_to)
        if isinstance(model, DiffusionPipeline):
            check_pipeline(model)
            if args.model_init_kwargs:
                raise ValueError("model_init_kwargs need model as a string; a loaded pipeline was given instead.")
        return args

    def _check_datasets(self, train_dataset, eval_dataset, args: DiffusionConfig) -> tuple[Dataset, Dataset | None]:
        if train_dataset is None:
            raise ValueError("train_dataset is missing: give a list of prompts, a file, a Dataset or a Hub id.")
        train_dataset = load_prompts(train_dataset)
        if len(train_dataset) < args.prompts_per_step:
            raise ValueError(
                f"train_dataset has {len(train_dataset)} prompts, fewer than prompts_per_step="
                f"{args.prompts_per_step}; lower prompts_per_step or give more prompts."
            )
        if eval_dataset is not None:
            eval_dataset = load_prompts(eval_dataset)
        elif args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset; give one or set 'no'."
            )
        return train_dataset, eval_dataset

    @staticmethod
    def _lora_config(peft_config: PeftConfig | None, args: DiffusionConfig) -> LoraConfig:
        if peft_config is None:
            peft_config = LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha if args.lora_alpha is not None else args.lora_rank,
                target_modules=args.lora_target_modules or DEFAULT_TARGETS,
            )
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config must be a LoraConfig, got {type(peft_config).__name__}.")
        check_lora_config(peft_config)
        return peft_config

    def _load_adapter(self, model, lora_config: LoraConfig, args: DiffusionConfig) -> PipelineAdapter:
        if isinstance(model, str):
            model = load_pipeline(model, getattr(torch, args.dtype), **(args.model_init_kwargs or {}))
        settings = CallSettings(
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            height=args.height,
            width=args.width,
            max_sequence_length=args.max_sequence_length,
            complex_human_instruction=args.complex_human_instruction,
            extra=args.pipeline_kwargs or {},
        )
        return PipelineAdapter(model, lora_config, self._space(args), settings, seed=args.seed)

    def _space(self, args: DiffusionConfig) -> str:
        return self.es_space

    def _set_up_pipeline(self) -> None:
        self.adapter.to(self.args.device)
        self._broadcast_adapter()
        with self.peers.together("loading the rewards"):
            self.eval_rewards.load()  # a scorer that cannot be had ends the run now, not at the first evaluation
            self.rewards.load()
        if self.args.compile_denoiser:
            self.adapter.denoiser.compile(fullgraph=True)

    def prepare_prompts(self, prompts: Sequence[str]) -> None:
        """Encodes prompts ahead of time; needed for any beyond the data sets when the text encoder is released."""
        self.adapter.prompts.encode(prompts)

    def train(self, *args, **kwargs):
        self._micro_step = -1  # a step that a stopped run has begun is begun anew
        self.prepare_prompts(self.train_dataset["prompt"])
        if self.eval_dataset is not None:
            self.prepare_prompts(self.eval_dataset["prompt"])
        if self.args.release_text_encoder and not self.adapter.prompts.released:
            self.adapter.prompts.release()
        started = time.perf_counter()
        try:
            return super().train(*args, **kwargs)
        finally:
            self.training_seconds += time.perf_counter() - started
            if self.is_world_process_zero():
                ended(self.args.output_dir)

    def _broadcast_adapter(self) -> None:
        """Every process starts from the numbers of the first one, even where devices round differently."""
        if self.args.world_size > 1:
            for tensor in self.adapter.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    def _replace_progress_callback(self) -> None:
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(StepProgressCallback(self))
        elif not any(isinstance(c, PrinterCallback) for c in self.callback_handler.callbacks):
            self.add_callback(PrinterCallback())

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

    # ---- training ----

    def get_train_dataloader(self):
        """Prompt batches, the same on every process."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return prompt_dataloader(self.train_dataset, self.args.prompts_per_step, seed)

    def get_total_train_batch_size(self, args) -> int:
        return args.prompts_per_step * args.gradient_accumulation_steps

    def next_micro(self) -> int:
        """Index of this call of `training_step` within its step (0 without gradient accumulation)."""
        self._micro = self._micro + 1 if self._micro_step == self.state.global_step else 0
        self._micro_step = self.state.global_step
        return self._micro

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(W, *tensor.shape)`: the tensor of every process, in order."""
        if self.args.world_size == 1:
            return tensor[None]
        stacked = gather_tensors(tensor.contiguous().to(self.args.device)[None])
        return stacked.to(tensor.device)

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
        started = time.perf_counter()
        columns = {name: dataset[name] for name in dataset.column_names if name != "prompt"}
        with self.peers.together(f"the evaluation at step {self.state.global_step}"):
            result = self.last_evaluation = self.evaluate_row(EvaluationRow("adapter"), dataset["prompt"], columns)
            self.evaluated_at = self.state.global_step
            if self.args.early_warning != "off":
                self.base_evaluation(dataset["prompt"], columns)
        scores = result.scores["adapter"]
        metrics = {f"rewards/{name}/mean": result.mean("adapter", name) for name in self.eval_rewards.names}
        for name in self.eval_rewards.names:
            spoke = int(np.isfinite(result.of("adapter", name)).any(axis=1).sum())
            if spoke < len(result.prompts):  # it failed, or does not apply to the others
                metrics[f"rewards/{name}/prompts"] = float(spoke)
        metrics["reward"] = result.mean_total("adapter")
        if "diversity" in result.judge_scores.get("adapter", {}):
            metrics["diversity"] = float(result.judge_scores["adapter"]["diversity"].mean())
        metrics["images_per_second"] = scores[..., 0].size / (time.perf_counter() - started)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_share(self) -> dict[str, Any]:
        """The keywords of [`~es_trl.evaluation.evaluate`] that split its work over this run's processes."""
        return {
            "process_index": self.args.process_index,
            "num_processes": self.args.world_size,
            "gather": lambda array: self.peers.share(torch.from_numpy(array), "an evaluation").numpy(),
        }

    # ---- logging ----

    def add_metric(self, name: str, value: float) -> None:
        """Collects a number of this step; its mean over the steps since the last log is logged."""
        total, count = self._metrics.get(name, (0.0, 0))
        self._metrics[name] = (total + float(value), count + 1) if math.isfinite(value) else (total, count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        As in the Trainer, plus the collected metrics and the budget so far (images and seconds of steps); a metric
        without any finite value is logged as None.
        """
        if not any(key.startswith(("eval_", "test_")) for key in logs):
            logs |= {name: total / count if count else None for name, (total, count) in self._metrics.items()}
            self._metrics.clear()
        logs |= {"num_images": self.images_drawn, "train_time": self.clock.seconds}
        super().log(logs, start_time)
