"""The evaluation protocol: every model draws the same prompts from the same noise, one image per key.

The generator of an image is a function of (seed, prompt index, image index) alone. Rows, batches and processes do not
enter, so two rows differ only by their weights and steps, and the table does not depend on how the work was split.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..rewards.clip_features import share_image_features
from ..samples import is_black, still_of, why_unscored
from .looks import LOOKS, looks_of
from .noise import Noise
from .result import Evaluation
from .rows import Draw, EvaluationRow
from .sharing import PromptShare


if TYPE_CHECKING:
    from ..pipelines import LoadedAdapters, PipelineAdapter
    from ..rewards import RewardSet
    from .journal import Journal
    from .judge import ClipJudge, DiversityJudge


logger = logging.getLogger(__name__)


def draw_images(
    adapter: "PipelineAdapter | LoadedAdapters",
    prompts: Sequence[str],
    row: EvaluationRow,
    keys: Sequence[tuple[int, int]],
    seed: int | Noise = 0,
    batch_size: int = 16,
    columns: Mapping[str, Sequence] | None = None,
) -> Iterator[tuple[list[tuple[int, int]], list[Image.Image]]]:
    """
    Draws images of one row, batch by batch. Any image of an evaluation can be drawn again from its key.

    Args:
        adapter ([`~es_trl.pipelines.PipelineAdapter`] or [`~es_trl.pipelines.LoadedAdapters`]): The model.
        prompts (`Sequence[str]`): All prompts of the evaluation, of length P.
        row ([`EvaluationRow`]): Which weights and steps.
        keys (`Sequence[tuple[int, int]]`): (prompt index in [0, P), image index) of each image.
        seed (`int` or [`Noise`], *optional*, defaults to 0): Seed of the evaluation.
        batch_size (`int`, *optional*, defaults to 16): Images per call of the pipeline.
        columns (`Mapping[str, Sequence]`, *optional*): The prompts' other columns; keywords of the call go into it.

    Yields:
        `tuple[list[tuple[int, int]], list[PIL.Image.Image]]`: The keys of a batch and their images, in order.
    """
    noise = Noise((seed,)) if isinstance(seed, int) else seed
    for start in range(0, len(keys), batch_size):
        batch = list(keys[start : start + batch_size])
        generators = [noise.generator(*key) for key in batch]
        with _weights_of(adapter, row):
            images = adapter.generate(
                [prompts[prompt] for prompt, _ in batch],
                generators,
                num_inference_steps=row.num_inference_steps,
                columns={name: [values[prompt] for prompt, _ in batch] for name, values in (columns or {}).items()},
            )
        yield batch, images


@contextlib.contextmanager
def _weights_of(adapter: "PipelineAdapter | LoadedAdapters", row: EvaluationRow):
    with contextlib.ExitStack() as stack:
        if not row.adapter:
            stack.enter_context(adapter.adapter_disabled())
        elif row.label is not None:
            stack.enter_context(adapter.chosen(row.label, row.adapter_scale))
        elif row.adapter_scale != 1.0:
            stack.enter_context(adapter.adapter_scale(row.adapter_scale))
        yield


KINDS = {"without a score": 1, "black": 2}


def kind_of(sample) -> int:
    """One of `KINDS`, or 0 for a picture with nothing odd about it."""
    return 1 if why_unscored(sample) is not None else 2 if is_black(sample) else 0


def _features(judge: "ClipJudge | DiversityJudge", images: list) -> np.ndarray:
    """(B, D), NaN for what has no score and for what is no single picture."""
    seen = [i for i, image in enumerate(images) if kind_of(image) != 1 and isinstance(image, Image.Image)]
    features = np.full((len(images), judge.dim), np.nan, np.float32)
    if seen:
        features[seen] = judge.image_features([images[i] for i in seen])
    return features


def measure(
    model: "PipelineAdapter | LoadedAdapters",
    rewards: "RewardSet",
    result: Evaluation,
    batch_size: int,
    judge: "ClipJudge | DiversityJudge | None",
    share: PromptShare,
    n_keep: int,
    journal: "Journal | None" = None,
    trainer_state: Any = None,
) -> None:
    """
    Draws and scores every row of `result` on every prompt and fills it; the loop behind [`evaluate`].

    Rows that are made of the same images share them: a best-of-4 of the base costs three more images per prompt than
    the base itself, and the images of a best-of-4 are among those of a best-of-8.
    """
    prompts, images_per_prompt = result.prompts, result.noise.images_per_prompt
    kept_share = PromptShare(min(n_keep, len(prompts)), share.process_index, share.num_processes, share.gather)
    rows_of: dict[Draw, list[EvaluationRow]] = {}
    for row in result.rows:
        rows_of.setdefault(row.draw, []).append(row)
    for draw, users in rows_of.items():
        images_of = images_per_prompt * max(row.best_of for row in users)
        result.details["images_drawn"] = result.details.get("images_drawn", 0) + len(prompts) * images_of
        arrays = journal.read(draw) if journal is not None else None
        kept: dict[tuple[int, int], Image.Image] = {}
        if arrays is None:
            arrays = _score_row(
                model, rewards, result, users[0], images_of, batch_size, judge, share, n_keep, kept, trainer_state
            )
            if journal is not None:
                journal.write(draw, arrays)
            logger.info("evaluated %s: %d images", ", ".join(row.name for row in users), len(share.mine) * images_of)
        else:
            keys = [(prompt, image) for prompt in kept_share.mine for image in range(images_of)]
            for batch, images in draw_images(model, prompts, users[0], keys, result.noise, batch_size, result.columns):
                kept |= dict(zip(batch, map(still_of, images), strict=True))
        for row in users:
            picked = result.add_row(row, arrays["scores"], arrays.get("features"), judge)
            result.looks[row.name] = np.take_along_axis(arrays["looks"], picked[:, :, None], axis=1)
            mine = {
                (prompt, j): kept[prompt, int(picked[prompt, j])]
                for prompt in kept_share.mine
                for j in range(images_per_prompt)
            }
            result.images[row.name] = kept_share.collect_images(mine, images_per_prompt)


def _score_row(
    model, rewards, result, row, images_of, batch_size, judge, share, n_keep, kept, trainer_state
) -> dict[str, np.ndarray]:
    """
    `scores` (P, M, K), `looks` (P, M, L) and with a judge `features` (P, M, D) of `images_of` images per prompt, all
    processes together; the pictures of the first `n_keep` prompts go into `kept`.
    """
    arrays = {"scores": share.empty((images_of, len(rewards.names))), "looks": share.empty((images_of, len(LOOKS)))}
    odd = share.empty((images_of,), 0.0)
    if judge is not None:
        arrays["features"] = share.empty((images_of, judge.dim), 0.0, np.float32)
    keys = [(prompt, image) for prompt in share.mine for image in range(images_of)]
    # A reward that compares pictures sees all of a prompt at once, whatever the batch size.
    scored_at_once = images_of * max(1, batch_size // images_of) if rewards.group_rewards else batch_size
    bar = tqdm(total=len(keys), desc=row.name, unit="img", leave=False, disable=share.process_index or None)
    for start in range(0, len(keys), scored_at_once):
        batch = keys[start : start + scored_at_once]
        drawn = draw_images(model, result.prompts, row, batch, result.noise, batch_size, result.columns)
        images = [image for _, pictures in drawn for image in pictures]
        indices = [prompt for prompt, _ in batch]
        slots = [share.slot(i) for i in indices], [image for _, image in batch]
        with share_image_features():
            arrays["scores"][slots] = rewards(
                [result.prompts[i] for i in indices],
                images,
                columns={name: [values[i] for i in indices] for name, values in result.columns.items()},
                trainer_state=trainer_state,
                where=f"evaluation of {row.name}, prompts {indices[0]} to {indices[-1]}",
                groups=indices,
                step_prompts=result.prompts,
            )
            if judge is not None:
                arrays["features"][slots] = _features(judge, images)
        arrays["looks"][slots] = [looks_of(still_of(image)) for image in images]
        odd[slots] = [kind_of(image) for image in images]
        bar.update(len(batch))
        kept |= {key: still_of(image) for key, image in zip(batch, images, strict=True) if key[0] < n_keep}
    bar.close()
    odd = share.collect(odd)
    counts = {kind: int((odd == number).sum()) for kind, number in KINDS.items() if (odd == number).any()}
    if counts:
        result.details.setdefault("odd_pictures", {})[row.name] = counts
    return {name: share.collect(value) for name, value in arrays.items()}
