"""DiffusionConfig: what every method of this package shares; checked before any model loads."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ..es.fitness import AGGREGATIONS, SCALE_REWARDS
from ..hub.escaping import redact_all
from ..hub.methods import SETTINGS
from ..names import checked
from ..rewards.calling import function_name
from ..run.checked_arguments import CheckedArguments
from ..run.facts import changes_of, setting, with_facts


DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
    "dtype": DTYPES,
    "reward_dtype": DTYPES,
    "early_warning": ("off", "warn", "stop"),
    "reward_failure": ("raise", "invalid"),
    "save_failure": ("raise", "warn"),
    "scale_rewards": SCALE_REWARDS,
    "multi_objective_aggregation": AGGREGATIONS,
}
MAPPINGS = ("model_init_kwargs", "pipeline_kwargs", "quantization_config", "scheduler_config")


@checked
@with_facts
@dataclass
class DiffusionConfig(CheckedArguments):
    r"""
    Settings shared by all trainers of es_trl, on top of [`~transformers.TrainingArguments`].

    Args:
        model_init_kwargs (`dict`, *optional*):
            Keywords of `from_pretrained` when `model` is a string (`revision`, `variant`, ...).
        quantization_config (`dict`, *optional*):
            How a model given by name is quantised: `quant_backend`, `quant_kwargs`, `components_to_quantize`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the frozen pipeline: `"float32"`, `"bfloat16"` or `"float16"`. The adapter is always fp32.
        compile_denoiser (`bool`, *optional*, defaults to `False`):
            Compile the denoiser in place with `torch.compile`.
        release_text_encoder (`bool`, *optional*, defaults to `False`):
            Free the text encoder once all prompts are encoded, before anything else is moved to the GPU.
        text_encoder_device (`str`, *optional*):
            Where it encodes them: `"cpu"` if it does not fit on the GPU even alone. With `release_text_encoder` only.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Decode one picture at a time.
        vae_tiling (`bool`, *optional*, defaults to `False`):
            Decode a picture in overlapping tiles; it may show where they meet.
        scheduler_config (`dict`, *optional*):
            What the scheduler has otherwise than the model's own (`timestep_spacing: trailing`); `_class_name` is
            another class of diffusers.
        num_inference_steps (`int`, *optional*, defaults to `1`):
            Denoising steps per image, at least 1; `None` (YAML: null) is the pipeline's own number.
        guidance_scale (`float`, *optional*):
            Guidance of the pipeline call; `None` keeps the pipeline's default.
        height (`int`, *optional*):
            Image height in pixels; `None` is the size the model was trained for.
        width (`int`, *optional*):
            Image width in pixels; `None` is the size the model was trained for.
        max_sequence_length (`int`, *optional*):
            Text tokens per prompt; `None` keeps the pipeline's default.
        complex_human_instruction (`list[str]`, *optional*):
            Sana's instruction before each prompt; `None` keeps the pipeline's, an empty list switches it off.
        pipeline_kwargs (`dict`, *optional*):
            Any other keyword of the pipeline call.
        lora_rank (`int`, *optional*, defaults to `8`):
            LoRA rank, at least 1.
        lora_alpha (`float`, *optional*):
            LoRA alpha; `None` means `lora_rank`, a scale of 1.
        lora_target_modules (`list[str]`, *optional*):
            Layers that get LoRA: names, `"attention"`, `"feed_forward"`; `None` is all attention projections.
        init_adapter (`str`, *optional*):
            A LoRA of any program to start from; it decides rank and targets. `lora_xs` goes on from its own only.
        frozen_adapters (`list[str]`, *optional*):
            LoRAs that stay on the model as they are (Lightning, a style); `path=0.8` is at that scale.
        prompts_per_step (`int`, *optional*, defaults to `8`):
            Prompts per step, the same for every member or group.
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Images, with latents of their own, per prompt and member.
        reward_weights (`list[float]`, *optional*):
            One weight per reward function; ones by default.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`, `"batch"` or `"none"`: how rewards are centred and scaled. As in TRL, `True` means `"group"` and
            `False` `"none"`.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"` or `"normalize_then_sum"`, for several reward functions.
        reward_dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the rewards' own models: as `dtype`.
        reward_device (`str`, *optional*):
            Where they run, such as `"cpu"` or `"cuda:1"`; by default where the pipeline does.
        reward_retries (`int`, *optional*, defaults to `0`):
            How often a reward function that raises, or takes too long, is called again.
        reward_timeout (`float`, *optional*):
            Seconds, above 0, after which one call of a reward function is ended; `None` waits for as long as it takes.
            Code that never returns to Python cannot be ended.
        reward_failure (`str`, *optional*, defaults to `"raise"`):
            When a reward function has failed for good: `"raise"` (end the run) or `"invalid"` (its images have no
            score, and are counted by `max_invalid_fraction`).
        max_invalid_fraction (`float`, *optional*, defaults to `0.5`):
            Largest share of members, in [0, 1), whose reward may be missing in a step before the run stops.
        eval_reward_funcs (`list[str]`, *optional*):
            Reward functions that are measured in evaluations and never optimised.
        eval_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images per evaluation prompt.
        eval_seed (`int`, *optional*, defaults to `1234`):
            Seed of the evaluation's latents; independent of `seed`, so that runs are compared on the same pictures.
        early_warning (`str`, *optional*, defaults to `"warn"`):
            When evaluations see the trained reward rise and a held-out reward or the diversity fall: `"off"`, `"warn"`
            (log, and the metric `eval_early_warning`) or `"stop"` (and end the training).
        sample_steps (`int`, *optional*, defaults to `50`):
            Every how many steps the fixed sample prompts are drawn, from before the first step; 0 switches it off.
        num_sample_prompts (`int`, *optional*, defaults to `8`):
            Number of sample prompts, taken from the evaluation prompts (or the training prompts without any).
        log_images (`bool`, *optional*, defaults to `True`):
            Send samples, the best, median and worst member, and the reward histogram to the trackers.
        per_device_train_batch_size (`int`, *optional*, defaults to `1`):
            Not used: `prompts_per_step` and `images_per_prompt` set the batch. Leave it at 1.
        per_device_eval_batch_size (`int`, *optional*, defaults to `16`):
            Images per forward in evaluations.
        max_grad_norm (`float`, *optional*, defaults to `0.0`):
            Gradient clipping; 0 is off, since the Trainer's 1.0 would clip every step.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must stay False: reward functions read the data set's columns.
        logging_steps (`float`, *optional*, defaults to `0.1`):
            Log every that many steps; below 1, a share of `max_steps`, so that the default gives ten logs.
        save_total_limit (`int`, *optional*, defaults to `2`):
            Checkpoints kept, at least 2 so that one is whole while another is written; the best one is kept too.
        save_failure (`str`, *optional*, defaults to `"raise"`):
            When the disk refuses what a run writes on its way (checkpoints, journal, samples): `"raise"` (end the run)
            or `"warn"` (go on without; the adapter at the end is an error either way).
        dataloader_pin_memory (`bool`, *optional*, defaults to `False`):
            Prompts are text: nothing to pin.
    """

    es_space = "lora"  # a setting of the methods that can move something else
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *MAPPINGS]

    model_init_kwargs: dict[str, Any] | str | None = setting(None, "Keywords of from_pretrained if model is a string.")
    quantization_config: dict[str, Any] | str | None = setting(None, "How diffusers quantises a model given by name.")
    dtype: str = setting("float32", "Dtype of the frozen pipeline: float32, bfloat16 or float16; the adapter is fp32.")
    compile_denoiser: bool = setting(False, "Compile the denoiser in place.")
    release_text_encoder: bool = setting(False, "Free the text encoder once all prompts are encoded.", "run")
    text_encoder_device: str | None = setting(None, "Where the released text encoder encodes, such as cpu.", "run")
    vae_slicing: bool = setting(False, "Decode one picture at a time.")
    vae_tiling: bool = setting(False, "Decode a picture in overlapping tiles.")
    scheduler_config: dict[str, Any] | str | None = setting(None, "What the scheduler has unlike the model's own.")
    num_inference_steps: int | None = setting(1, "Denoising steps per image, at least 1; null is the pipeline's own.")
    guidance_scale: float | None = setting(None, "Guidance of the pipeline call, at least 0; None is its default.")
    height: int | None = setting(None, "Image height in pixels; None is the model's own.")
    width: int | None = setting(None, "Image width in pixels; None is the model's own.")
    max_sequence_length: int | None = setting(None, "Text tokens per prompt, at least 1; None is the pipeline's own.")
    complex_human_instruction: list[str] | None = setting(
        None, "Sana's instruction before each prompt; None keeps the pipeline's, [] switches it off."
    )
    pipeline_kwargs: dict[str, Any] | str | None = setting(None, "Any other keyword of the pipeline call.")
    lora_rank: int = setting(8, "LoRA rank, at least 1.")
    lora_alpha: float | None = setting(None, "LoRA alpha, above 0; None means lora_rank, a scale of 1.")
    lora_target_modules: list[str] | None = setting(
        None, "Layers that get LoRA: names, attention, feed_forward; None is attention."
    )
    init_adapter: str | None = setting(None, "A LoRA to start from, with its rank and targets.")
    frozen_adapters: list[str] | None = setting(None, "LoRAs that stay on the model as they are; path=0.8 scales one.")
    prompts_per_step: int = setting(8, "Prompts per step, at least 1.")
    images_per_prompt: int = setting(1, "Images per prompt and member, at least 1.")
    reward_weights: list[float] | None = setting(None, "One weight per reward function; ones by default.")
    scale_rewards: str = setting("group", "How rewards are centred and scaled: group, batch or none.")
    multi_objective_aggregation: str = setting(
        "sum_then_normalize", "Several reward functions: sum_then_normalize or normalize_then_sum."
    )
    reward_dtype: str = setting("float32", "Dtype of the rewards' own models: as dtype.")
    reward_device: str | None = setting(None, "Where they run, such as cpu; by default where the pipeline does.")
    reward_retries: int = setting(0, "How often a reward function that fails is called again, at least 0.", "run")
    reward_timeout: float | None = setting(None, "Seconds, above 0, per call of a reward; None is forever.", "run")
    reward_failure: str = setting("raise", "When a reward fails for good: raise, or invalid (images without score).")
    max_invalid_fraction: float = setting(0.5, "Share of members, in [0, 1), that may lack a reward in a step.", "run")
    eval_reward_funcs: list[str] | None = setting(None, "Reward functions measured in evaluations only.", "measures")
    eval_images_per_prompt: int = setting(1, "Images per evaluation prompt, at least 1.", "measures")
    eval_seed: int = setting(1234, "Seed of the evaluation's latents.", "measures")
    early_warning: str = setting(
        "warn", "When the trained reward rises and held-out ones or diversity fall: off, warn or stop.", "measures"
    )
    sample_steps: int = setting(50, "Steps between two sheets of sample prompts, from step 0; 0 is never.", "output")
    num_sample_prompts: int = setting(8, "Number of sample prompts, at least 1.", "output")
    log_images: bool = setting(True, "Send images and reward histograms to the trackers.", "output")

    # ---- defaults of TrainingArguments that would be wrong here ----
    per_device_train_batch_size: int = setting(
        1, "Leave it at 1: prompts_per_step and images_per_prompt set the batch."
    )
    per_device_eval_batch_size: int = setting(16, "Images per forward in evaluations, at least 1.", "measures")
    max_grad_norm: float = setting(0.0, "Largest norm of the gradient, at least 0; 0 is off.")
    remove_unused_columns: bool = setting(False, "Must stay False: reward functions read the data set's columns.")
    logging_steps: float = setting(0.1, "Steps between two logs; below 1, a share of max_steps.", "output")
    save_total_limit: int | None = setting(2, "Checkpoints kept, at least 2; the best one is kept too.", "run")
    save_failure: str = setting("raise", "When the disk refuses a checkpoint, journal or sample: raise, warn.", "run")
    dataloader_pin_memory: bool = setting(False, "Prompts are text: nothing to pin.", "run")

    def __post_init__(self):
        self._reject()
        self._read_json_fields()
        self._check_values()
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model: str | None = "eval_reward"
            self.greater_is_better: bool | None = True
        super().__post_init__()

    def mapping(self, name: str) -> dict[str, Any]:
        """One of `MAPPINGS`, which may be given as JSON; empty where it is not set."""
        return getattr(self, name) or {}

    def _read_json_fields(self) -> None:
        for name in MAPPINGS:
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} must be a JSON object, got {value!r} ({error}).") from error
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} must be a mapping, got {value!r}.")
            setattr(self, name, value)

    def _check_values(self) -> None:
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_reward_funcs")):
            if isinstance(getattr(self, name), str) or callable(getattr(self, name)):
                setattr(self, name, [getattr(self, name)])
        self.require_integer(
            "lora_rank", "prompts_per_step", "images_per_prompt", "eval_images_per_prompt", "num_sample_prompts",
            "per_device_eval_batch_size", "gradient_accumulation_steps", minimum=1,
        )  # fmt: skip
        self.require_integer("num_inference_steps", "height", "width", "max_sequence_length", minimum=1, or_none=True)
        if self.max_steps != -1:  # -1 is the Trainer's word for "by num_train_epochs"
            self.require_integer("max_steps", minimum=1)
        self.require_integer("reward_retries", "sample_steps", minimum=0)
        self.require_number("logging_steps", "save_steps", above=0.0)
        self.require_number("learning_rate", "lora_alpha", "reward_timeout", above=0.0, or_none=True)
        self.require_number("max_grad_norm", minimum=0.0)
        self.require_number("eval_steps", "guidance_scale", minimum=0.0, or_none=True)
        self.require_number("max_invalid_fraction", minimum=0.0, below=1.0)
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit must be at least 2, got {self.save_total_limit}: while one checkpoint is written "
                "another one has to be whole."
            )
        if self.reward_weights is not None:
            self.reward_weights = [float(weight) for weight in self.reward_weights]
            if not all(math.isfinite(weight) for weight in self.reward_weights):
                raise ValueError(f"reward_weights must be finite, got {self.reward_weights}.")
        self._check_devices()
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for name, allowed in CHOICES.items():
            self.require_choice(name, allowed)

    def _check_devices(self) -> None:
        for name in ("text_encoder_device", "reward_device"):
            if getattr(self, name) is not None:
                try:
                    torch.device(getattr(self, name))
                except RuntimeError as error:
                    raise ValueError(
                        f"{name} must name a device such as cpu or cuda:1, got {getattr(self, name)!r}."
                    ) from error
        if self.text_encoder_device is not None and not self.release_text_encoder:
            raise ValueError(
                f"text_encoder_device={self.text_encoder_device!r} acts with release_text_encoder=True only: without "
                "it the text encoder stays with the pipeline."
            )

    @property
    def scorer_place(self) -> dict[str, Any]:
        """Where the rewards' own models run, and in which dtype."""
        return {"device": self.reward_device or self.device, "dtype": self.reward_dtype}

    @property
    def reward_calls(self) -> dict[str, Any]:
        """What becomes of a call of a reward that fails or takes too long."""
        return {name: getattr(self, f"reward_{name}") for name in ("retries", "timeout", "failure")}

    @classmethod
    def changes(cls) -> dict[str, str]:
        """
        What each setting changes: `"numbers"` (the adapter), `"measures"` (evaluations), `"run"` (how it lives),
        `"output"` (what is written and shown) or `"process"` (nothing of the run).
        """
        return {f.name: changes_of(f) for f in dataclasses.fields(cls)}

    @classmethod
    def own_settings(cls) -> list[str]:
        """The settings that a method has beside those of all methods and that change its numbers, for its card."""
        bases = [base for base in reversed(cls.__mro__) if issubclass(base, DiffusionConfig)][1:]
        shared = {*SETTINGS, "es_space"}  # the space is in what the adapter says of itself
        names = dict.fromkeys(name for base in bases for name in base.__annotations__ if name not in shared)
        return [name for name in names if cls.changes()[name] == "numbers"]

    def to_dict(self) -> dict[str, Any]:
        """
        As in TrainingArguments, for trackers and files: reward functions given as callables are written by name, and
        tokens and passwords not at all.
        """
        data = super().to_dict()
        for name, value in data.items():
            if isinstance(value, list):
                data[name] = [function_name(item) if callable(item) else item for item in value]
            elif callable(value):
                data[name] = function_name(value)
        return redact_all(data)
