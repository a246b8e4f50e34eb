"""The evaluation protocol: every model draws the same prompts from the same noise, one image per key.

The generator of an image is a function of (seed, prompt index, image index) alone. Rows, batches and processes do not
enter, so two rows differ only by their weights and steps, and the table does not depend on how the work was split.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..es.keys import make_generator
from .result import Evaluation
from .sharing import PromptShare
from .statistics import RESAMPLES


if TYPE_CHECKING:
    from ..pipelines import PipelineAdapter
    from ..rewards import RewardSet
    from .judge import ClipJudge


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationRow:
    """
    One model of the table.

    Args:
        name (`str`): Its name, unique in the table.
        adapter (`bool`, *optional*, defaults to `True`): Whether the adapter is on; off is the frozen base.
        num_inference_steps (`int`, *optional*): Sampling steps; `None` is the adapter's setting.
        adapter_scale (`float`, *optional*, defaults to 1.0): Factor on the adapter's update of the weights.
    """

    name: str
    adapter: bool = True
    num_inference_steps: int | None = None
    adapter_scale: float = 1.0

    def __post_init__(self):
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"row {self.name!r} has num_inference_steps {self.num_inference_steps}; give 1 or more.")


def default_rows(num_inference_steps: int) -> list[EvaluationRow]:
    """
    The three rows of the gap closure: the base, the adapter, and the base with twice the steps.

    Args:
        num_inference_steps (`int`): Steps the adapter was trained for.
    """
    n = num_inference_steps
    return [
        EvaluationRow(f"base@{n}", adapter=False, num_inference_steps=n),
        EvaluationRow(f"adapter@{n}", adapter=True, num_inference_steps=n),
        EvaluationRow(f"base@{2 * n}", adapter=False, num_inference_steps=2 * n),
    ]


def draw_images(
    adapter: "PipelineAdapter",
    prompts: Sequence[str],
    row: EvaluationRow,
    keys: Sequence[tuple[int, int]],
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[tuple[list[tuple[int, int]], list[Image.Image]]]:
    """
    Draws images of one row, batch by batch. Any image of an evaluation can be drawn again from its key.

    Args:
        adapter ([`~es_trl.pipelines.PipelineAdapter`]): The model.
        prompts (`Sequence[str]`): All prompts of the evaluation, of length P.
        row ([`EvaluationRow`]): Which weights and steps.
        keys (`Sequence[tuple[int, int]]`): (prompt index in [0, P), image index) of each image.
        seed (`int`, *optional*, defaults to 0): Seed of the evaluation.
        batch_size (`int`, *optional*, defaults to 16): Images per call of the pipeline.

    Yields:
        `tuple[list[tuple[int, int]], list[PIL.Image.Image]]`: The keys of a batch and their images, in order.
    """
    for start in range(0, len(keys), batch_size):
        batch = list(keys[start : start + batch_size])
        generators = [make_generator(seed, "evaluation", prompt, image) for prompt, image in batch]
        with _weights_of(adapter, row):
            images = adapter.generate(
                [prompts[prompt] for prompt, _ in batch], generators, num_inference_steps=row.num_inference_steps
            )
        yield batch, images


@contextlib.contextmanager
def _weights_of(adapter: "PipelineAdapter", row: EvaluationRow):
    with contextlib.ExitStack() as stack:
        if not row.adapter:
            stack.enter_context(adapter.adapter_disabled())
        elif row.adapter_scale != 1.0:
            stack.enter_context(adapter.adapter_scale(row.adapter_scale))
        yield


def evaluate(
    adapter: "PipelineAdapter",
    prompts: Sequence[str],
    rewards: "RewardSet",
    rows: Sequence[EvaluationRow] | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    batch_size: int = 16,
    columns: dict[str, list] | None = None,
    judge: "ClipJudge | None" = None,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[np.ndarray], np.ndarray] | None = None,
    n_keep: int = 16,
    resamples: int = RESAMPLES,
) -> Evaluation:
    """
    Draws and scores every row on every prompt.

    Several processes share the prompts (process p takes prompts p, p + W, ...) and all return the whole result.

    Args:
        adapter ([`~es_trl.pipelines.PipelineAdapter`]): The model, with or without an adapter in use.
        prompts (`Sequence[str]`): The P prompts; the unit of all statistics.
        rewards ([`~es_trl.rewards.RewardSet`]): The K rewards, optimised and held out alike.
        rows (`Sequence[EvaluationRow]`, *optional*): Defaults to [`default_rows`] at the adapter's own steps.
        images_per_prompt (`int`, *optional*, defaults to 1): J; more than one also measures diversity.
        seed (`int`, *optional*, defaults to 0): Seed of the initial noise and of the bootstrap.
        batch_size (`int`, *optional*, defaults to 16): Images drawn and scored at once; does not change the result.
        columns (`dict[str, list]`, *optional*): Further columns of the prompts for the rewards, each of length P.
        judge ([`ClipJudge`], *optional*): Measures retrieval, hard negatives, Frechet distance and diversity.
        process_index, num_processes (`int`, *optional*): Which of how many processes this is.
        gather (`Callable`, *optional*): Given an array of one shape on all processes, returns those of all
            processes in order, stacked or concatenated along the first axis. Needed when `num_processes > 1`.
        n_keep (`int`, *optional*, defaults to 16): The images of the first `n_keep` prompts are kept.
        resamples (`int`, *optional*, defaults to 10000): Bootstrap resamples of the prompts.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: No prompts, an empty batch, two rows of one name, a column of another length, or several processes
            without `gather`.
    """
    prompts = list(prompts)
    settings = adapter.describe()
    steps = settings.get("num_inference_steps") or _pipeline_steps(adapter)
    rows = default_rows(steps) if rows is None else list(rows)
    rows = [row if row.num_inference_steps else replace(row, num_inference_steps=steps) for row in rows]
    columns = columns or {}
    _check(prompts, rows, images_per_prompt, batch_size, columns)

    share = PromptShare(len(prompts), process_index, num_processes, gather)
    keys = [(prompt, image) for prompt in share.mine for image in range(images_per_prompt)]
    kept_share = PromptShare(min(n_keep, len(prompts)), process_index, num_processes, gather)
    result = Evaluation(
        rows=rows, reward_names=list(rewards.names), prompts=prompts, seed=seed, resamples=resamples, settings=settings
    )
    for row in rows:
        scores = share.empty((images_per_prompt, len(rewards.names)))
        features = share.empty((images_per_prompt, judge.dim), 0.0, np.float32) if judge is not None else None
        kept = {}
        for batch, images in draw_images(adapter, prompts, row, keys, seed, batch_size):
            indices = [prompt for prompt, _ in batch]
            batch_scores = rewards(
                [prompts[i] for i in indices],
                images,
                columns={name: [values[i] for i in indices] for name, values in columns.items()},
                where=f"evaluation of {row.name}, prompts {indices[0]} to {indices[-1]}",
            )
            slots = [share.slot(i) for i in indices], [image for _, image in batch]
            scores[slots] = batch_scores
            if judge is not None:
                features[slots] = judge.image_features(images)
            kept |= {key: image for key, image in zip(batch, images, strict=True) if key[0] < n_keep}
        logger.info("evaluated %s: %d images on process %d", row.name, len(keys), process_index)
        result.scores[row.name] = share.collect(scores)
        result.images[row.name] = kept_share.collect_images(kept, images_per_prompt)
        if judge is not None:
            result.judge_row(row.name, share.collect(features), judge)
    return result


def _pipeline_steps(adapter: "PipelineAdapter") -> int:
    return inspect.signature(type(adapter.pipe).__call__).parameters["num_inference_steps"].default


def _check(prompts, rows, images_per_prompt, batch_size, columns):
    if not prompts:
        raise ValueError("there are no prompts to evaluate on; give at least one.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {i} is a {type(prompt).__name__}; prompts are strings.")
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ValueError(f"rows are named {names}; give at least one row, and each its own name.")
    for field, value in {"images_per_prompt": images_per_prompt, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{field} is {value}; give 1 or more.")
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise ValueError(f"column {name!r} has {len(values)} values for {len(prompts)} prompts; give one each.")
