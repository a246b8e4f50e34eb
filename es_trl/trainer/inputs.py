"""What a trainer is given, checked before a model loads, and made into an adapter on a pipeline."""

import torch
import transformers
from datasets import Dataset
from diffusers import PipelineQuantizationConfig
from peft import LoraConfig, PeftConfig
from torch import nn
from transformers import Trainer

from ..data import load_prompts
from ..hub import find_adapter
from ..hub.adapters import frozen_files
from ..lock import FolderLock
from ..pipelines import (
    CallSettings,
    PipelineAdapter,
    add_frozen,
    check_lora_config,
    check_pipeline,
    load_pipeline,
    read_start,
    set_up,
)
from ..pipelines.quantization import read_quantization
from ..run.folder import check_writable
from ..run.trackers import check_trackers
from .config import DiffusionConfig


def checked_args(trainer, args: DiffusionConfig | None, model) -> DiffusionConfig:
    """The settings, by default a method's own; what cannot work with `model`, here or on this machine, is an error."""
    if args is None:
        name = model.rstrip("/").split("/")[-1] if isinstance(model, str) else type(model).__name__
        args = trainer.config_class(output_dir=f"{name}-{trainer.method_name.upper()}")
    if not isinstance(args, trainer.config_class):
        raise TypeError(f"args must be a {trainer.config_class.__name__}, got {type(args).__name__}.")
    check_writable(args.output_dir)
    FolderLock(args.output_dir).check()
    check_trackers(args.report_to)
    check_optimizer_arguments(args)
    if not isinstance(model, str):
        check_pipeline(model)
        if args.model_init_kwargs:
            raise ValueError("model_init_kwargs need model as a string; a loaded pipeline was given instead.")
    return args


def check_optimizer_arguments(args: DiffusionConfig) -> None:
    """Of `optim_args`, the Trainer hands on to torch's optimizers what it knows and drops the rest: an error here."""
    kind, taken = Trainer.get_optimizer_cls_and_kwargs(args) if args.optim_args else (object, {})
    names = [part.partition("=")[0].strip() for part in (args.optim_args or "").split(",")]
    dropped = [name for name in names if name not in taken]
    if kind.__module__.startswith("torch.optim") and dropped:
        raise ValueError(
            f"optim_args={args.optim_args!r}: transformers {transformers.__version__} does not pass {dropped[0]!r} to "
            f"optim={args.optim.value!r}. Leave it out, or give the trainer the optimizer itself (optimizers=...)."
        )


def checked_datasets(train_dataset, eval_dataset, args: DiffusionConfig) -> tuple[Dataset, Dataset | None]:
    """The prompts of training and of evaluations, read; what does not fit the settings is an error."""
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
    elif args.eval_strategy != "no" or args.eval_on_start:
        setting = "eval_on_start=True" if args.eval_on_start else f"eval_strategy={args.eval_strategy.value!r}"
        raise ValueError(f"{setting} needs an eval_dataset; give one, or switch it off.")
    return train_dataset, eval_dataset


def lora_config_of(peft_config: PeftConfig | None, args: DiffusionConfig) -> LoraConfig:
    """The LoRA that is trained: `peft_config`, or what the settings say."""
    if peft_config is None:
        peft_config = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha if args.lora_alpha is not None else args.lora_rank,
            target_modules=args.lora_target_modules,  # None is all attention projections
        )
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config must be a LoraConfig, got {type(peft_config).__name__}.")
    check_lora_config(peft_config)
    return peft_config


def load_adapter(
    model,
    lora_config: LoraConfig,
    args: DiffusionConfig,
    quantization_config: PipelineQuantizationConfig | dict | None = None,
) -> PipelineAdapter:
    """The pipeline, loaded if `model` is a name, with the LoRA on it, and those that stay beside it."""
    quantization = read_quantization(quantization_config or args.quantization_config)
    if quantization is not None and not isinstance(model, str):
        raise ValueError("quantization_config needs model as a string; a loaded pipeline was given instead.")
    frozen = frozen_files(args.frozen_adapters)
    start = find_adapter(args.init_adapter) if args.init_adapter else None
    if isinstance(model, str):
        init = {"quantization_config": quantization} if quantization else {}
        model = load_pipeline(model, getattr(torch, args.dtype), **init, **args.mapping("model_init_kwargs"))
    set_up(model, args.mapping("scheduler_config"), args.vae_slicing, args.vae_tiling)
    add_frozen(model, frozen)
    factors = read_start(model, start) if start else None
    settings = CallSettings.of(args, extra=args.mapping("pipeline_kwargs"))
    return PipelineAdapter(model, lora_config, args.es_space, settings, args.seed, factors)


class AdapterView(nn.Module):
    """
    Registers the adapter's parameters (the very objects, not copies), so that Accelerate, the optimizer and the
    gradient norm touch only what is trained and never the frozen pipeline.
    """

    accepts_loss_kwargs = False

    def __init__(self, theta: dict[str, nn.Parameter]):
        super().__init__()
        for name, parameter in theta.items():
            self.register_parameter(name.replace(".", "/"), parameter)  # dots are not allowed in parameter names

    def forward(self):
        """There is no forward pass here: the pipeline draws."""
        raise RuntimeError("AdapterView only holds the adapter's parameters; images are drawn by the pipeline.")
