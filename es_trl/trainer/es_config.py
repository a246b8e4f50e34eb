"""ESConfig: the settings of evolution strategies."""

from dataclasses import dataclass, field

from ..es.fitness import FITNESS_SHAPING
from ..es.members import Population
from ..names import checked
from ..pipelines.spaces import SPACES
from .config import DiffusionConfig


@checked
@dataclass
class ESConfig(DiffusionConfig):
    r"""
    Settings of [`ESTrainer`]: EGGROLL (arXiv 2511.16652) on the LoRA of a diffusers pipeline.

    Fields shared by all methods are documented in [`DiffusionConfig`].

    Args:
        population_size (`int`, *optional*, defaults to `64`):
            Members N per step; even if antithetic.
        antithetic (`bool`, *optional*, defaults to `False`):
            Members come in pairs `theta + sigma E` and `theta - sigma E`; otherwise each has a direction of its own,
            so that the same number of images tries twice as many directions.
        prompts_per_member (`int`, *optional*):
            Prompts that one member draws; by default all `prompts_per_step`. With fewer, the members are dealt out in
            `prompts_per_step / prompts_per_member` groups of equal size, each with prompts of its own, and are
            compared within their group. As many images then try more directions: a step draws
            `population_size x prompts_per_member x images_per_prompt`.
        sigma (`float`, *optional*, defaults to `0.1`):
            Standard deviation of the perturbation of each entry of theta, above 0.
        noise_rank (`int`, *optional*, defaults to `1`):
            Rank r of the perturbation `U V^T / sqrt(r)` of each matrix.
        noise_reuse (`int`, *optional*, defaults to `1`):
            Number of consecutive steps that share their perturbations.
        es_space (`str`, *optional*, defaults to `"lora_xs"`):
            What is moved: `"lora"` (both factors), `"lora_b"` (only B), `"lora_xs"` (a core between the frozen
            weight's top singular vectors) or `"weight"` (the frozen matrices, exported by truncated SVD).
        fitness_shaping (`str`, *optional*, defaults to `"z"`):
            `"z"`, `"centered_rank"`, `"sign"` or `"win_rate"`.
        members_per_forward (`int`, *optional*, defaults to `8`):
            Members drawn in one batch of `members_per_forward x prompts_per_member x images_per_prompt` images. It
            sets memory and speed; results for different values differ by float rounding only.
        anchor_decay (`float`, *optional*, defaults to `0.0`):
            After each step theta is pulled to its start by this share, in [0, 1).
        max_update_norm (`float`, *optional*):
            Largest Euclidean norm of one step of theta; longer ones are scaled down.
        max_adapter_norm (`float`, *optional*):
            Largest Euclidean distance of theta from its start; theta is scaled back onto that ball.
        learning_rate (`float`, *optional*, defaults to `0.1`):
            With `optim="sgd"` the RMS step per entry in units of sigma, whatever the population, the noise rank, the
            number of prompts and the reward's scale. With Adam variants the absolute step.
        optim (`str`, *optional*, defaults to `"sgd"`):
            As in TrainingArguments.
        optim_args (`str`, *optional*):
            As in TrainingArguments; for sgd `"momentum=0.9,dampening=0.9"` (averaging momentum) unless set.
        lr_scheduler_type (`str`, *optional*, defaults to `"linear"`):
            As in TrainingArguments. A constant step lets theta drift in the directions that carry no signal.
    """

    population_size: int = field(default=64, metadata={"help": "Members per step, at least 2; even if antithetic."})
    antithetic: bool = field(
        default=False, metadata={"help": "Members come in pairs theta + sigma E and theta - sigma E."}
    )
    prompts_per_member: int | None = field(
        default=None, metadata={"help": "Prompts that one member draws; all prompts_per_step by default."}
    )
    sigma: float = field(default=0.1, metadata={"help": "Standard deviation of the perturbation, above 0."})
    noise_rank: int = field(default=1, metadata={"help": "Rank of the perturbation of each matrix, at least 1."})
    noise_reuse: int = field(
        default=1, metadata={"help": "Steps in a row that share their perturbations, at least 1."}
    )
    es_space: str = field(default="lora_xs", metadata={"help": "What is moved: lora, lora_b, lora_xs or weight."})
    fitness_shaping: str = field(
        default="z", metadata={"help": "How rewards become fitness: z, centered_rank, sign or win_rate."}
    )
    members_per_forward: int = field(
        default=8, metadata={"help": "Members drawn in one batch, at least 1; sets memory and speed."}
    )
    anchor_decay: float = field(
        default=0.0, metadata={"help": "Share, in [0, 1), by which theta is pulled to its start after each step."}
    )
    max_update_norm: float | None = field(
        default=None,
        metadata={"help": "Largest Euclidean norm of one step of theta, above 0; longer ones are scaled."},
    )
    max_adapter_norm: float | None = field(
        default=None, metadata={"help": "Largest Euclidean distance of theta from its start, above 0."}
    )
    learning_rate: float = field(
        default=0.1, metadata={"help": "With sgd: RMS step per entry in units of sigma; with Adam: absolute step."}
    )
    optim: str = field(default="sgd", metadata={"help": "Optimizer, as in TrainingArguments."})
    optim_args: str | None = field(
        default=None, metadata={"help": "Optimizer arguments; sgd gets averaging momentum 0.9 unless set."}
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning rate schedule."})

    def __post_init__(self):
        for name in ("population_size", "noise_rank", "noise_reuse", "members_per_forward"):
            self.require_integer(name, minimum=1)
        if self.prompts_per_member is not None:
            self.require_integer("prompts_per_member", minimum=1)
        self.require_integer("prompts_per_step", minimum=1)
        if self.prompts_per_step % (self.prompts_per_member or 1):
            raise ValueError(
                f"prompts_per_member must divide prompts_per_step={self.prompts_per_step}, got "
                f"{self.prompts_per_member}."
            )
        self.population()
        self.require_number("sigma", above=0.0)
        self.require_number("anchor_decay", minimum=0.0, below=1.0)
        for name in ("max_update_norm", "max_adapter_norm"):
            if getattr(self, name) is not None:
                self.require_number(name, above=0.0)
        self.require_choice("es_space", tuple(SPACES))
        self.require_choice("fitness_shaping", FITNESS_SHAPING)
        if self.fitness_shaping == "sign" and not self.antithetic:
            raise ValueError('fitness_shaping="sign" compares the halves of a pair; set antithetic=True or use "z".')
        if self.optim == "sgd" and self.optim_args is None:
            self.optim_args = "momentum=0.9,dampening=0.9"
        super().__post_init__()

    def population(self) -> Population:
        """The members of a step: how many, with which signs, in which groups."""
        groups = 1 if self.prompts_per_member is None else self.prompts_per_step // self.prompts_per_member
        return Population(self.population_size, self.antithetic, groups)

    @property
    def images_per_member(self) -> int:
        """Images that one member draws in a step."""
        return (self.prompts_per_member or self.prompts_per_step) * self.images_per_prompt
