"""The evaluation protocol: every model draws the same prompts from the same noise, one image per key.

The generator of an image is a function of (seed, prompt index, image index) alone. Rows, batches and processes do not
enter, so two rows differ only by their weights and steps, and the table does not depend on how the work was split.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..pipelines import LoadedAdapters
from ..rewards.clip_features import share_image_features
from ..samples import is_black, still_of, why_unscored
from .looks import LOOKS, looks_of
from .noise import Noise
from .result import Evaluation
from .rows import Draw, EvaluationRow
from .sharing import PromptShare


if TYPE_CHECKING:
    from ..pipelines import PipelineAdapter
    from ..rewards import RewardSet
    from .journal import Journal
    from .judge import DiversityJudge


logger = logging.getLogger(__name__)

Keys = list[tuple[int, int]]  # prompt and image index
Pictures = dict[tuple[int, int], Image.Image]  # by them


def draw_images(
    adapter: PipelineAdapter | LoadedAdapters,
    prompts: Sequence[str],
    row: EvaluationRow,
    keys: Sequence[tuple[int, int]],
    seed: int | Noise = 0,
    batch_size: int = 16,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[tuple[Keys, list[Image.Image]]]:
    """
    Draws images of one row, batch by batch. Any image of an evaluation can be drawn again from its key.

    Args:
        adapter, row: The model, and which weights and steps.
        prompts (`Sequence[str]`): All prompts of the evaluation, of length P.
        keys (`Sequence[tuple[int, int]]`): (prompt index in [0, P), image index) of each image.
        seed (`int` or [`Noise`], *optional*, defaults to 0): Seed of the evaluation.
        batch_size (`int`, *optional*, defaults to 16): Images per call of the pipeline.
        columns (`Mapping[str, Sequence]`, *optional*): The prompts' other columns; keywords of the call go into it.

    Yields:
        The keys of a batch and their images, in order.
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


def _weights_of(adapter: PipelineAdapter | LoadedAdapters, row: EvaluationRow) -> AbstractContextManager[Any]:
    if not row.adapter:
        return adapter.adapter_disabled()
    if isinstance(adapter, LoadedAdapters):
        return nullcontext() if row.label is None else adapter.chosen(row.label, row.adapter_scale)
    return nullcontext() if row.adapter_scale == 1.0 else adapter.adapter_scale(row.adapter_scale)


KINDS = {"without a score": 1, "black": 2}


def kind_of(sample: Any) -> int:
    """One of `KINDS`, or 0 for a picture with nothing odd about it."""
    return 1 if why_unscored(sample) is not None else 2 if is_black(sample) else 0


def _features(judge: DiversityJudge, images: list[Any]) -> np.ndarray:
    """(B, D), NaN for what has no score and for what is no single picture."""
    seen = [i for i, image in enumerate(images) if kind_of(image) != 1 and isinstance(image, Image.Image)]
    features = np.full((len(images), judge.dim), np.nan, np.float32)
    if seen:
        features[seen] = judge.image_features([images[i] for i in seen])
    return features


@dataclass
class Measurement:
    """
    Draws and scores every row of `result` on the prompts of `share`, `batch_size` images at once, and keeps the images
    of the first `n_keep` prompts; the loop behind [`evaluate`]. The rewards get `trainer_state`.
    """

    model: PipelineAdapter | LoadedAdapters
    rewards: RewardSet
    judge: DiversityJudge | None
    result: Evaluation
    share: PromptShare
    batch_size: int
    n_keep: int
    trainer_state: Any = None

    def fill(self, journal: Journal | None = None) -> None:
        """
        Takes from `journal` the rows that it has, and draws the others.

        Rows that are made of the same images share them: a best-of-4 of the base costs three more images per prompt
        than the base itself, and the images of a best-of-4 are among those of a best-of-8.
        """
        result, share = self.result, self.share
        per_prompt = result.noise.images_per_prompt
        n_keep = min(self.n_keep, len(result.prompts))
        keeping = PromptShare(n_keep, share.process_index, share.num_processes, share.gather)
        rows_of: dict[Draw, list[EvaluationRow]] = {}
        for row in result.rows:
            rows_of.setdefault(row.draw, []).append(row)
        for draw, users in rows_of.items():
            images_of = per_prompt * max(row.best_of for row in users)
            result.details["images_drawn"] = result.details.get("images_drawn", 0) + len(result.prompts) * images_of
            arrays = journal.read(draw) if journal is not None else None
            kept: Pictures = {}
            if arrays is None:
                arrays = self._score(users[0], images_of, kept)
                if journal is not None:
                    journal.write(draw, arrays)
                number = len(share.mine) * images_of
                logger.info("evaluated %s: %d images", ", ".join(row.name for row in users), number)
            else:
                self._refuse_other_scores(users[0], images_of, arrays["scores"])
                keys = [(prompt, image) for prompt in keeping.mine for image in range(images_of)]
                for batch, images in self._draw(users[0], keys):
                    kept |= dict(zip(batch, map(still_of, images), strict=True))
            for row in users:
                picked = result.add_row(row, arrays["scores"], arrays.get("features"), self.judge)
                result.looks[row.name] = np.take_along_axis(arrays["looks"], picked[:, :, None], axis=1)
                places = [(prompt, j) for prompt in keeping.mine for j in range(per_prompt)]
                mine = {(prompt, j): kept[prompt, int(picked[prompt, j])] for prompt, j in places}
                result.images[row.name] = keeping.collect_images(mine, per_prompt)

    def _draw(self, row: EvaluationRow, keys: Keys) -> Iterator[tuple[Keys, list[Any]]]:
        result = self.result
        return draw_images(self.model, result.prompts, row, keys, result.noise, self.batch_size, result.columns)

    def _score(self, row: EvaluationRow, images_of: int, kept: Pictures) -> dict[str, np.ndarray]:
        """
        `scores` (P, M, K), `looks` (P, M, L) and with a judge `features` (P, M, D) of `images_of` images per prompt,
        all processes together; the pictures of the first `n_keep` prompts go into `kept`.
        """
        share, judge = self.share, self.judge
        arrays = {"scores": share.empty((images_of, len(self.rewards.names))),
                  "looks": share.empty((images_of, len(LOOKS))), "odd": share.empty((images_of,), 0.0)}  # fmt: skip
        if judge is not None:
            arrays["features"] = share.empty((images_of, judge.dim), 0.0, np.float32)
        keys = [(prompt, image) for prompt in share.mine for image in range(images_of)]
        # A reward that compares pictures sees all of a prompt at once, whatever the batch size.
        whole = images_of * max(1, self.batch_size // images_of)
        at_once = whole if self.rewards.group_rewards else self.batch_size
        bar = tqdm(total=len(keys), desc=row.name, unit="img", leave=False, disable=share.process_index or None)
        for start in range(0, len(keys), at_once):
            batch = keys[start : start + at_once]
            images = [image for _, pictures in self._draw(row, batch) for image in pictures]
            slots = [share.slot(prompt) for prompt, _ in batch], [image for _, image in batch]
            with share_image_features():
                arrays["scores"][slots] = self._rewards_of(row, [prompt for prompt, _ in batch], images)
                if judge is not None:
                    arrays["features"][slots] = _features(judge, images)
            arrays["looks"][slots] = [looks_of(still_of(image)) for image in images]
            arrays["odd"][slots] = [kind_of(image) for image in images]
            bar.update(len(batch))
            kept |= {key: still_of(image) for key, image in zip(batch, images, strict=True) if key[0] < self.n_keep}
        bar.close()
        found = {name: share.collect(value) for name, value in arrays.items()}
        odd = found.pop("odd")
        counts = {kind: int((odd == number).sum()) for kind, number in KINDS.items() if (odd == number).any()}
        if counts:
            self.result.details.setdefault("odd_pictures", {})[row.name] = counts
        return found

    def _refuse_other_scores(self, row: EvaluationRow, images_of: int, finished: np.ndarray) -> None:
        """Draws and scores one prompt of a finished row again: no name says whether weights or functions changed."""
        for prompt in self.share.mine[:1]:
            keys = [(prompt, image) for image in range(images_of)]
            images = [image for _, pictures in self._draw(row, keys) for image in pictures]
            again = self._rewards_of(row, [prompt] * images_of, images)
            spread = np.nanstd(finished.reshape(-1, finished.shape[-1]), axis=0)
            same = np.isclose(again, finished[prompt], rtol=1e-4, atol=0.05 * np.nan_to_num(spread), equal_nan=True)
            for image, k in np.argwhere(~same)[:1]:
                raise ValueError(
                    f"resume: for prompt {self.result.prompts[prompt][:80]!r} reward {self.rewards.names[k]!r} now "
                    f"gives {again[image, k]:.5g}, where the finished row {row.name} has "
                    f"{finished[prompt, image, k]:.5g}: the model, the reward or its server has changed, or the "
                    "reward gives another score every time. Leave resume out to start afresh."
                )

    def _rewards_of(self, row: EvaluationRow, indices: list[int], images: list[Any]) -> np.ndarray:
        """(B, K): the scores of pictures of the prompts `indices`."""
        result = self.result
        return self.rewards(
            [result.prompts[i] for i in indices],
            images,
            columns={name: [values[i] for i in indices] for name, values in result.columns.items()},
            trainer_state=self.trainer_state,
            where=f"evaluation of {row.name}, prompts {indices[0]} to {indices[-1]}",
            groups=indices,
            step_prompts=result.prompts,
            only=self.rewards.asking_nobody,
        )
