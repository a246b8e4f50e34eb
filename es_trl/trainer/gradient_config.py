"""GradientConfig: what the methods that backpropagate through the denoiser share beyond DiffusionConfig."""

from dataclasses import dataclass

from ..names import checked
from ..run.facts import setting
from .config import DiffusionConfig


GRADIENT_SPACES = ("lora", "lora_b", "lora_xs")  # the export of "weight" is a truncated SVD, which has no gradient


@checked
@dataclass
class GradientConfig(DiffusionConfig):
    r"""
    Settings shared by policy gradients ([`PolicyGradientConfig`]) and DPO ([`DiffusionDPOConfig`]), beside those of
    [`DiffusionConfig`].

    A Trainer step draws `prompts_per_step x num_generations` images and makes all updates from them.

    Args:
        num_generations (`int`, *optional*, defaults to `8`):
            Images per prompt and step, at least 2: the group whose rewards are compared.
        num_iterations (`int`, *optional*, defaults to `1`):
            Passes over the images of a step, each with updates of its own.
        images_per_forward (`int`, *optional*, defaults to `16`):
            Images drawn at once, at least 1. Groups stay together on one process.
        images_per_backward (`int`, *optional*, defaults to `16`):
            Images whose graph is held at once, at least 1 (DPO: noisy latents, at least the 2 of a pair). It sets the
            memory of training; results change by float rounding only.
        checkpoint_activations (`bool`, *optional*, defaults to `False`):
            Recompute the denoiser's activations in the backward pass instead of keeping them: less memory, one more
            forward pass.
        es_space (`str`, *optional*, defaults to `"lora"`):
            What is moved: `"lora"` (both factors), `"lora_b"` (only B) or `"lora_xs"` (a core between the frozen
            weight's top singular vectors); the same word as in [`ESConfig`].
        images_per_prompt (`int`, *optional*, defaults to `1`):
            Must stay 1: `num_generations` says how many images a prompt gets.
        optim (`str`, *optional*, defaults to `"adamw_torch"`):
            As in TrainingArguments.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradient clipping; 0 is off.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant"`):
            As in TrainingArguments.
    """

    num_generations: int = setting(8, "Images per prompt and step, compared as a group.")
    num_iterations: int = setting(1, "Passes over the images of a step.")
    images_per_forward: int = setting(16, "Images drawn at once.")
    images_per_backward: int = setting(16, "Images whose graph is held at once.")
    checkpoint_activations: bool = setting(False, "Recompute the denoiser's activations in the backward pass.")
    es_space: str = setting("lora", "What is moved: lora, lora_b or lora_xs.")
    images_per_prompt: int = setting(1, "Must stay 1: num_generations sets the group.")
    optim: str = setting("adamw_torch", "Optimizer, as in TrainingArguments.")
    max_grad_norm: float = setting(1.0, "Gradient clipping; 0 is off.")
    lr_scheduler_type: str = setting("constant", "Learning rate schedule.")

    def __post_init__(self):
        self.require_integer("num_generations", minimum=2)
        self.require_integer("num_iterations", "images_per_forward", "images_per_backward", minimum=1)
        self.require_choice("es_space", GRADIENT_SPACES)
        if self.images_per_prompt != 1:
            raise ValueError(
                f"images_per_prompt={self.images_per_prompt} has no meaning here; set num_generations, the images "
                "that a prompt gets in a step."
            )
        super().__post_init__()

    def _reject(self) -> None:
        for name in ("gradient_checkpointing", "activation_checkpointing"):
            if getattr(self, name, None):
                # The Trainer would ask the adapter view, which has no layers.
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported: use checkpoint_activations=True, which asks "
                    "the pipeline's denoiser."
                )
        super()._reject()

    @property
    def groups_per_block(self) -> int:
        """Groups that are drawn together; what one process takes at a time."""
        return max(1, self.images_per_forward // self.num_generations)
