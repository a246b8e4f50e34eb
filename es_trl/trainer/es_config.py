"""ESConfig: the settings of evolution strategies."""

from dataclasses import dataclass

from ..es.fitness import FITNESS_SHAPING
from ..es.members import Population
from ..names import checked
from ..pipelines.spaces import SPACES
from ..run.facts import setting
from .config import DiffusionConfig


CHOICES = {
    "es_space": tuple(SPACES),
    "fitness_shaping": FITNESS_SHAPING,
    "update": ("mean", "optimizer"),
    "when_margin_turns": ("restart", "stop", "ignore"),
}
# what is left to its default with update="mean"
NOT_WITH_MEAN = {
    "learning_rate": None,
    "optim": "sgd",
    "optim_args": None,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "noise_reuse": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}


@checked
@dataclass
class ESConfig(DiffusionConfig):
    r"""
    Settings of [`ESTrainer`]: EGGROLL (arXiv 2511.16652) on the LoRA of a diffusers pipeline.

    Fields shared by all methods are documented in [`DiffusionConfig`].

    Args:
        population_size (`int`, *optional*, defaults to `512`):
            Members N per step; even if antithetic.
        antithetic (`bool`, *optional*, defaults to `False`):
            Members come in pairs `theta + sigma E` and `theta - sigma E`; otherwise each has a direction of its own,
            so that the same number of images tries twice as many directions.
        prompts_per_step (`int`, *optional*):
            Prompts of a step. By default one for every 16 members (for every quarter of less than 64 members), and no
            more than there are training prompts.
        prompts_per_member (`int`, *optional*, defaults to `1`):
            Prompts that one member draws. The members are dealt out in `prompts_per_step / prompts_per_member` groups
            of equal size, each with prompts of its own, and are compared within their group; with `None` every member
            draws all prompts, so that as many images try fewer directions. A step draws
            `population_size x prompts_per_member x images_per_prompt`.
        output_change (`float`, *optional*, defaults to `0.18`):
            Size of the perturbations: relative change of the denoiser's output that a member makes at the start. It
            sets sigma before the first step, from about 32 pictures.
        sigma (`float`, *optional*):
            Standard deviation of the perturbation of each entry of theta, above 0, instead of `output_change`.
        travel (`float`, *optional*, defaults to `0.7`):
            How far theta may walk in the whole run: the sum of the lengths of its steps, RMS per entry in units of
            sigma, which fall linearly to zero. Signal makes a step longer; while there is none, it is next to nothing.
        update (`str`, *optional*, defaults to `"mean"`):
            How estimates become steps: `"mean"` steps along the mean of all estimates so far, each member weighing
            alike; `"optimizer"` leaves the estimate of each step to `optim`, `learning_rate` and `lr_scheduler_type`.
        when_margin_turns (`str`, *optional*, defaults to `"restart"`):
            What to do when the margin of the trained rewards (their score under the picture's own prompt minus the
            mean under the step's other prompts) has surely begun to fall: go back to its maximum and `"restart"` with
            reward + margin as objective, `"stop"`, or `"ignore"` it. A second turn, and the turn of a guard, stop the
            run. Acts on rewards with a margin and on `guard_reward_funcs`.
        guard_reward_funcs (`list[str]`, *optional*):
            Scorers with a margin that is never maximised and must not fall; for rewards that do not read the prompt.
        slope_reward_funcs (`list[str]`, *optional*):
            Further rewards that are scored on the training images, for their slopes only.
        noise_rank (`int`, *optional*, defaults to `1`):
            Rank r of the perturbation `U V^T / sqrt(r)` of each matrix.
        noise_reuse (`int`, *optional*, defaults to `1`):
            Number of consecutive steps that share their perturbations; with `update="optimizer"` only.
        es_space (`str`, *optional*, defaults to `"lora_xs"`):
            What is moved: `"lora"` (both factors), `"lora_b"` (only B), `"lora_xs"` (a core between the frozen
            weight's top singular vectors) or `"weight"` (the frozen matrices, exported by truncated SVD).
        lora_rank (`int`, *optional*, defaults to `2`):
            Rank of the LoRA. With `lora_xs` theta has `lora_rank^2` numbers a layer, and few numbers learn most from
            few images.
        fitness_shaping (`str`, *optional*, defaults to `"z"`):
            `"z"`, `"centered_rank"`, `"sign"` or `"win_rate"`.
        members_per_forward (`int`, *optional*, defaults to `8`):
            Members drawn in one batch of `members_per_forward x prompts_per_member x images_per_prompt` images. It
            sets memory and speed; results for different values differ by float rounding only.
        learning_rate (`float`, *optional*):
            With `update="optimizer"` only, and needed there: with `optim="sgd"` the RMS step per entry in units of
            sigma; with Adam variants the absolute step.
        optim (`str`, *optional*, defaults to `"sgd"`):
            As in TrainingArguments; with `update="optimizer"` only.
        optim_args (`str`, *optional*):
            As in TrainingArguments; with `update="optimizer"` only. Momentum with dampening is refused: torch's SGD
            takes the first gradient undamped.
        lr_scheduler_type (`str`, *optional*, defaults to `"linear"`):
            As in TrainingArguments; another one with `update="optimizer"` only.
    """

    population_size: int = setting(512, "Members per step, at least 2; even if antithetic.")
    antithetic: bool = setting(False, "Members come in pairs theta + sigma E and theta - sigma E.")
    # By rule here, a number in every other method.
    prompts_per_step: int | None = setting(  # type: ignore[assignment]
        None, "Prompts per step, at least 1; by default one for every 16 members."
    )
    prompts_per_member: int | None = setting(1, "Prompts of one member, a divisor of prompts_per_step; null is all.")
    output_change: float = setting(0.18, "Relative change of the denoiser's output by a member, above 0; sets sigma.")
    sigma: float | None = setting(None, "Deviation of the perturbation of each entry, above 0; not output_change.")
    travel: float = setting(0.7, "Sum of the steps' lengths without signal, above 0, in units of sigma.")
    update: str = setting("mean", "How estimates become steps: mean (of all estimates) or optimizer.")
    when_margin_turns: str = setting("restart", "When the margin has surely begun to fall: restart, stop or ignore.")
    guard_reward_funcs: list[str] | None = setting(None, "Scorers whose margin must not fall and is never maximised.")
    slope_reward_funcs: list[str] | None = setting(None, "Rewards scored on training images for their slopes only.")
    noise_rank: int = setting(1, "Rank of the perturbation of each matrix, at least 1.")
    noise_reuse: int = setting(1, "Consecutive steps that share their perturbations, at least 1.")
    es_space: str = setting("lora_xs", "What is moved: lora, lora_b, lora_xs or weight.")
    lora_rank: int = setting(2, "LoRA rank, at least 1; lora_xs has its square as numbers a layer.")
    fitness_shaping: str = setting("z", "Rewards to fitness: z, centered_rank, sign or win_rate.")
    members_per_forward: int = setting(8, "Members drawn in one batch, at least 1; sets memory and speed.")
    learning_rate: float | None = setting(None, "With update=optimizer: sgd's RMS step in sigma, Adam's absolute one.")
    optim: str = setting("sgd", "With update=optimizer: as in TrainingArguments.")
    optim_args: str | None = setting(None, "With update=optimizer: its arguments.")
    lr_scheduler_type: str = setting("linear", "With update=optimizer: as in TrainingArguments.")

    def __post_init__(self):
        self.require_integer("population_size", "noise_rank", "noise_reuse", "members_per_forward", minimum=1)
        self.require_integer("prompts_per_member", minimum=1, or_none=True)
        self.prompts_by_rule = self.prompts_per_step is None
        if self.prompts_by_rule:
            self.fit_prompts(self.population_size)
        self.require_integer("prompts_per_step", minimum=1)
        if self._prompts % (self.prompts_per_member or 1):
            raise ValueError(
                f"prompts_per_member must divide prompts_per_step={self.prompts_per_step}, got "
                f"{self.prompts_per_member}."
            )
        self.population()
        self.require_number("output_change", "travel", above=0.0)
        self.require_number("sigma", above=0.0, or_none=True)
        for name, allowed in CHOICES.items():
            self.require_choice(name, allowed)
        if self.fitness_shaping == "sign" and not self.antithetic:
            raise ValueError('fitness_shaping="sign" compares the halves of a pair; set antithetic=True or use "z".')
        self._check_update()
        super().__post_init__()

    def _check_update(self) -> None:
        """Refuses settings that would not act."""
        if self.update == "mean":
            for name, default in NOT_WITH_MEAN.items():
                value = getattr(self, name)
                if getattr(value, "value", value) != default:
                    raise ValueError(
                        f'{name}={getattr(value, "value", value)!r} does not act with update="mean", whose steps '
                        'follow from travel: leave it out, or set update="optimizer".'
                    )
            if self.scale_rewards in ("none", False):
                raise ValueError(
                    'update="mean" needs fitness of known size: scale_rewards must be "group" or "batch".'
                )
            return
        if self.learning_rate is None:
            raise ValueError(
                'update="optimizer" needs a learning_rate: with optim="sgd" the RMS step in units of sigma.'
            )
        arguments = dict(
            part.split("=", 1) for part in (self.optim_args or "").replace(" ", "").split(",") if "=" in part
        )
        if float(arguments.get("dampening", 0)) != 0:
            raise ValueError(
                f"optim_args={self.optim_args!r}: torch's SGD takes the first gradient undamped, so that it weighs "
                '1 / (1 - dampening) times any other; leave dampening out, or use update="mean".'
            )

    def fit_prompts(self, available: int) -> None:
        """Sets `prompts_per_step` by the rule: one for every 16 members, at most `available`, in equal groups."""
        size = 16 if self.population_size >= 64 else max(2, self.population_size // 4)
        own, unit = self.prompts_per_member or 1, 2 if self.antithetic else 1
        most = max(1, min(self.population_size // size, available // own))
        groups = next((g for g in range(most, 0, -1) if self.population_size % (g * unit) == 0), 1)
        self.prompts_per_step = groups * own

    @property
    def _prompts(self) -> int:
        assert self.prompts_per_step is not None, "set by rule where it is not given"
        return self.prompts_per_step

    def population(self) -> Population:
        """The members of a step: how many, with which signs, in which groups."""
        groups = 1 if self.prompts_per_member is None else self._prompts // self.prompts_per_member
        return Population(self.population_size, self.antithetic, groups)

    @property
    def images_per_member(self) -> int:
        """Images that one member draws in a step."""
        return (self.prompts_per_member or self._prompts) * self.images_per_prompt
