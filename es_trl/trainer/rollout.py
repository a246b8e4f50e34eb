"""Rollouts: the images of every member for the prompts of a step, and their scores."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from PIL import Image

from ..es import Fitness, Perturbations, Population, PopulationShapeError, StepNoise, make_generator
from ..pipelines import PipelineAdapter, check_members, numbers_of, rounding_dtype, rows_of, watching_layers
from ..rewards import PendingScores, RewardSet
from ..run.memory import MembersInMemory
from .prompt_batches import columns_of


logger = logging.getLogger(__name__)

MAX_UNDER_WAY = 4  # micro-batches whose scores are waited for; more would only hold images in memory


@dataclass
class PromptBatch:
    """
    The `J` rollout columns of a step: every prompt `images_per_prompt` times in a row, each with latents of its own,
    and the data set's other columns, `J` values each.
    """

    prompts: list[str]
    columns: dict[str, list] = field(default_factory=dict)
    images_per_prompt: int = 1

    @classmethod
    def from_rows(cls, rows: list[dict], images_per_prompt: int) -> "PromptBatch":
        """From the rows of a data set with the column "prompt" and any others."""
        repeated = [row for row in rows for _ in range(images_per_prompt)]
        return cls([row["prompt"] for row in repeated], columns_of(repeated), images_per_prompt)

    def __len__(self) -> int:
        return len(self.prompts)

    def generator(self, column: int, seed: int, step: int, micro: int) -> torch.Generator:
        """Of a column's latents, the same for every member that draws it (common random numbers)."""
        k = self.images_per_prompt
        return make_generator(seed, "latents", step, micro, column // k, column % k)


@dataclass
class RolloutTimes:
    """Seconds spent by this process in one rollout."""

    generate: float = 0.0
    reward: float = 0.0


@dataclass
class PopulationStep:
    """
    What one population on one prompt batch was and gave: scores `(N, J / groups, K)` fp64 of all processes, and what
    became of them. Callbacks read the last one (`trainer.last_step`).
    """

    step: int
    micro: int
    batch: PromptBatch
    factors: StepNoise
    scores: torch.Tensor
    fitness: Fitness


_Task = tuple[PromptBatch, StepNoise | Perturbations, int, int]  # what members draw: with the step and the batch in it


@dataclass
class _Scored:
    """A micro-batch whose scores are on their way: `rewards` are the columns that it fills."""

    members: list[int]
    rewards: list[int]
    pending: PendingScores
    metrics: list[tuple[str, float]]
    log_metric: Callable[[str, float], None] | None


class PopulationRollout:
    """
    Draws and scores the members of this process.

    While `async` rewards wait for their servers, the next micro-batches are drawn; scores, metrics and errors come in
    the order of drawing, so nothing but the time changes. Rewards that compare images (`groupwise`) are called once,
    with all members, when everything is drawn.

    Micro-batches are fixed by `members_per_forward`; micro-batch `c` belongs to process `c % num_processes`, so that
    any number of processes computes the same images in the same batches. `sigma` is `None` until it is calibrated,
    before the first step. `check_stop` is called before each micro-batch and may raise to end the run there.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        rewards: RewardSet,
        population: Population,
        sigma: float | None,
        members_per_forward: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        check_stop: Callable[[], None] | None = None,
    ):
        self.adapter, self.rewards, self.population = adapter, rewards, population
        self.sigma, self.members_per_forward, self.seed = sigma, members_per_forward, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.check_stop = check_stop
        self.memory = MembersInMemory()
        self._checked, self._one_by_one = False, False
        if num_processes > 1 and rewards.group_rewards:
            names = ", ".join(rewards.names[k] for k in rewards.group_rewards)
            raise ValueError(
                f"{names} in reward_funcs compares the images of all members, but {num_processes} processes draw a "
                "part each: run one process, or score single images and set fitness_shaping='win_rate'."
            )

    def owner(self, member: int) -> int:
        """The process that draws `member`."""
        return (member // self.members_per_forward) % self.num_processes

    def scores(
        self, batch: PromptBatch, factors: StepNoise | Perturbations, step: int, micro: int = 0, **reward_context
    ) -> tuple[torch.Tensor, RolloutTimes]:
        """
        `(N, J / groups, K)` fp64 scores, 0 for members of other processes; and the seconds spent.

        Args:
            batch (`PromptBatch`), factors (`StepNoise`): `J` rollout columns, and all directions of the step.
            step, micro (`int`): Part of the latents' keys.
            **reward_context: Passed on to the reward functions (`trainer_state`, `log_metric`); `log_extra_of`
                gives the `log_extra` of the images that are named by (member, column).

        Raises:
            `RuntimeError`, `ValueError`: a reward failed; names the step and the members.
        """
        if not self._checked:
            self._check_members((batch, factors, step, micro))
        own_columns = len(batch) // self.population.groups
        scores = torch.zeros(self.population.size, own_columns, len(self.rewards.names), dtype=torch.float64)
        times = RolloutTimes()
        compared = self.rewards.group_rewards
        single = [k for k in range(len(self.rewards)) if k not in compared]
        drawn: list[Image.Image] = []
        under_way: deque[_Scored] = deque()
        try:
            for chunk in self.population.chunks(self.members_per_forward):
                if self.owner(chunk[0]) != self.process_index:
                    continue
                if self.check_stop is not None:
                    self.check_stop()
                started = time.perf_counter()
                images = self.draw(chunk, batch, factors, step, micro)
                times.generate += time.perf_counter() - started
                if single:
                    under_way.append(self._submit(chunk, images, batch, step, single, reward_context, times))
                drawn += images if compared else []
                while under_way and (under_way[0].pending.done() or len(under_way) > MAX_UNDER_WAY):
                    self._collect(under_way.popleft(), scores, times)
            while under_way:
                self._collect(under_way.popleft(), scores, times)
            if compared:
                members = list(range(self.population.size))
                whole = self._submit(members, drawn, batch, step, compared, reward_context, times)
                under_way.append(whole)
                self._collect(under_way.popleft(), scores, times)
        except BaseException:
            for scored in under_way:
                scored.pending.cancel()
            raise
        return scores, times

    def _submit(
        self,
        members: list[int],
        images: list[Image.Image],
        batch: PromptBatch,
        step: int,
        rewards: list[int],
        reward_context: dict,
        times: "RolloutTimes",
    ) -> "_Scored":
        """Starts the scoring of `members`; rewards that wait for a server go on while the next members are drawn."""
        started = time.perf_counter()
        metrics: list[tuple[str, float]] = []
        context = dict(reward_context)
        log_metric, log_extra_of = context.pop("log_metric", None), context.pop("log_extra_of", None)
        drawn = self._columns(members, batch)
        own = len(batch) // self.population.groups
        keys = [(member, column) for member in members for column in range(own)]
        pending = self.rewards.submit(
            [batch.prompts[j] for j in drawn],
            images,
            rows_of(batch.columns, drawn),
            where=f"step {step}, members {members[0]}-{members[-1]}",
            groups=drawn,
            step_prompts=batch.prompts,
            only=rewards,
            log_metric=lambda name, value: metrics.append((name, value)),
            log_extra=log_extra_of(keys) if log_extra_of else None,
            **context,
        )
        times.reward += time.perf_counter() - started
        return _Scored(members, rewards, pending, metrics, log_metric)

    def _collect(self, scored: "_Scored", scores: torch.Tensor, times: "RolloutTimes") -> None:
        """Waits for a micro-batch, in the order of drawing, and only then passes its metrics on."""
        started = time.perf_counter()
        values = torch.from_numpy(scored.pending.result()).view(len(scored.members), scores.shape[1], -1)
        rows, columns = torch.tensor(scored.members)[:, None], torch.tensor(scored.rewards)[None]
        scores.transpose(1, 2)[rows, columns] = values.transpose(1, 2)[:, scored.rewards]
        if scored.log_metric is not None:
            for name, value in scored.metrics:
                scored.log_metric(name, value)
        times.reward += time.perf_counter() - started

    def draw(
        self,
        members: list[int],
        batch: PromptBatch,
        factors: StepNoise | Perturbations,
        step: int,
        micro: int = 0,
        columns: range | None = None,
    ) -> list[Image.Image]:
        """
        The images of `members`, member by member: each draws `columns`, by default those of its group. One member at a
        time where a batch cannot be shared, fewer at a time where memory runs out.
        """
        pieces = self.memory.pieces(members)
        if len(pieces) > 1:
            return [image for piece in pieces for image in self.draw(piece, batch, factors, step, micro, columns)]
        try:
            return self._draw_together(members, (batch, factors, step, micro), columns)
        except torch.OutOfMemoryError:
            self.memory.halve(len(members), len(columns or self.population.columns(0, len(batch))))
        except PopulationShapeError as error:
            self._go_one_by_one(str(error))
        # Outside `except`, which holds on to the tensors.
        return self.draw(members, batch, factors, step, micro, columns)

    def _draw_together(
        self, members: list[int], task: _Task, columns: range | None, keep_numbers: bool = False
    ) -> list[Image.Image]:
        if self._one_by_one and len(members) > 1:
            alone = (self._draw_together([member], task, columns, keep_numbers) for member in members)
            return [image for images in alone for image in images]
        batch, factors, step, micro = task
        shared = columns or self.population.columns(members[0], len(batch))
        if self.adapter.drawer.by_prompt and len(shared) > 1 and len(members) > 1:
            if columns is None and any(self.population.columns(i, len(batch)) != shared for i in members):
                raise PopulationShapeError(self.adapter.drawer.by_prompt)
            return self._draw_prompt_by_prompt(members, task, shared, keep_numbers)
        directions = torch.tensor(self.population.directions(members))
        selected = factors.select(directions, next(iter(self.adapter.theta.values())).device)
        drawn = self._columns(members, batch, columns)
        generators = [batch.generator(j, self.seed, step, micro) for j in drawn]
        rows = len(drawn) // len(members)
        assert self.sigma is not None
        with self.adapter.members(selected, self.population.signs(members), self.sigma, rows):
            prompts, own = [batch.prompts[j] for j in drawn], rows_of(batch.columns, drawn)
            return self.adapter.generate(prompts, generators, columns=own, keep_numbers=keep_numbers)

    def _draw_prompt_by_prompt(
        self, members: list[int], task: _Task, columns: range, keep_numbers: bool
    ) -> list[Image.Image]:
        """Members share calls, prompts do not."""
        drawn, numbers = [], []
        for j in columns:
            drawn.append(self._draw_together(members, task, range(j, j + 1), keep_numbers))
            numbers.append(self.adapter.drawer.last_watch.numbers)
        in_order = [(k, i) for i in range(len(members)) for k in range(len(columns))]
        kept = all(len(part) == len(members) for part in numbers)
        self.adapter.drawer.last_watch.numbers = [numbers[k][i] for k, i in in_order] if kept else []
        return [drawn[k][i] for k, i in in_order]

    def _check_members(self, task: _Task) -> None:
        """Once: two members of a batch draw what each draws alone, and every layer with LoRA is used."""
        self._checked = True
        batch, own_factors, step, micro = task
        chunks = self.population.chunks(self.members_per_forward)
        chunk = next((chunk for chunk in chunks if self.owner(chunk[0]) == self.process_index), [0])
        first = self.population.columns(chunk[0], len(batch))
        members = [i for i in chunk if self.population.columns(i, len(batch)) == first][:2]
        counted = self.adapter.drawer.pictures.copy()

        def draw(members: list[int], factors: StepNoise | Perturbations) -> torch.Tensor:
            drawn = self._draw_together(members, (batch, factors, step, micro), None, True)
            kept = self.adapter.drawer.last_watch.numbers
            return numbers_of(drawn, kept, len(drawn)).view(len(members), -1)

        try:
            with watching_layers(self.adapter, "they are perturbed without effect"):
                # Two pictures of one member: whether a picture depends on what it is drawn with shows here, too.
                self._draw_together(members[:1], task, range(min(2, len(batch))))
            dtype = rounding_dtype(self.adapter.denoiser)
            wrong = check_members(draw, members, own_factors, dtype) if len(members) > 1 else ""
        except torch.OutOfMemoryError:
            return  # members that do not fit two by two are drawn alone
        except PopulationShapeError as error:
            wrong = str(error)
        self.adapter.drawer.pictures = counted
        if wrong:
            self._go_one_by_one(wrong)

    def _go_one_by_one(self, reason: str) -> None:
        logger.warning(
            "Members run one after the other from here on (same result, slower), because this pipeline's batch "
            f"cannot be shared by several: {reason}"
        )
        self._one_by_one = True

    def _columns(self, members: list[int], batch: PromptBatch, columns: range | None = None) -> list[int]:
        """The column of every image of `members`."""
        return [j for member in members for j in columns or self.population.columns(member, len(batch))]
