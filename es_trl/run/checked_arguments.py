"""The Trainer's arguments, with what cannot work here refused, and checks that name field, value and bounds."""

import math

from transformers import TrainingArguments


# TrainingArguments that would act on a model the pipeline never calls, or on gradients that do not exist here.
REJECTED = {
    "bf16": 'it wraps the adapter in autocast, not the pipeline; use dtype="bfloat16"',
    "fp16": 'it adds a gradient scaler; use dtype="float16"',
    "bf16_full_eval": 'use dtype="bfloat16"',
    "fp16_full_eval": 'use dtype="float16"',
    "gradient_checkpointing": "nothing is kept for a backward pass, so there is nothing to save",
    "activation_checkpointing": "nothing is kept for a backward pass, so there is nothing to save",
    "torch_compile": "it compiles a copy that the pipeline never calls; use compile_denoiser=True",
    "auto_find_batch_size": "halving batches would break prompt groups; lower the images drawn per forward instead",
    "fsdp": "the adapter is small and the frozen model is replicated; launch with torchrun or accelerate",
    "deepspeed": "the adapter is small and the frozen model is replicated; launch with torchrun or accelerate",
    "enable_jit_checkpoint": "SIGTERM stops and saves anyway, between two micro-batches",
    "neftune_noise_alpha": "there is no embedding to add noise to",
    "use_liger_kernel": "Liger kernels are for language models",
    "hub_token": "tokens do not belong into configs; run `hf auth login` or set HF_TOKEN",
}


class CheckedArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] whose settings are checked."""

    def _reject(self) -> None:
        for name, reason in REJECTED.items():
            if getattr(self, name, None):
                shown = name if name == "hub_token" else f"{name}={getattr(self, name)!r}"
                raise ValueError(f"{shown} is not supported: {reason}.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: reward functions read the data set's columns.")
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} has no meaning here; set "
                "prompts_per_step and images_per_prompt instead."
            )

    def require_integer(self, *names: str, minimum: int, or_none: bool = False) -> None:
        """Raises `ValueError` unless these fields are whole numbers of at least `minimum`."""
        for name in names:
            value = getattr(self, name)
            if value is None and or_none:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")

    def require_number(
        self,
        *names: str,
        minimum: float = -math.inf,
        above: float = -math.inf,
        below: float = math.inf,
        or_none: bool = False,
    ) -> None:
        """Raises `ValueError` unless these fields are finite numbers within the bounds."""
        for name in names:
            value = getattr(self, name)
            if value is None and or_none:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}.")
            if value < minimum or value <= above or value >= below:
                bounds = [f"at least {minimum:g}"] * (minimum > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
                bounds += [f"below {below:g}"] * (below < math.inf)
                raise ValueError(f"{name} must be {' and '.join(bounds)}, got {value!r}.")

    def require_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raises `ValueError` unless the field `name` is one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
