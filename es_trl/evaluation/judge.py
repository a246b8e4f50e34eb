"""A judge that was never optimised: does the picture still show its caption, and does it still look like a real one?

A reward can be raised by pictures that only please it. These metrics see what such pictures lose: whose caption they
show (retrieval), who is which colour and where (hard negatives), how near they are to real pictures (Frechet
distance), and how different the pictures of one prompt are (diversity).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .. import assets
from .statistics import bootstrap_counts


if TYPE_CHECKING:
    from ..rewards import ClipScorer, RewardSet


logger = logging.getLogger(__name__)


class FrechetReference:
    """
    Frechet distance of image features to those of real pictures (Heusel et al. 2017, arXiv 1706.08500, Eq. 6):
    `100 (|m - m_r|^2 + tr(C + C_r - 2 (C_r^1/2 C C_r^1/2)^1/2))`. The factor 100 makes the small numbers that features
    of unit norm give readable.

    The distance falls with the number of pictures, so only sets of one size may be compared.

    Args:
        mean (`np.ndarray`): (D,) mean of the real features m_r.
        cov (`np.ndarray`): (D, D) covariance of the real features C_r.

    Raises:
        ValueError: Shapes that do not belong together, or values that are not finite.
    """

    def __init__(self, mean: np.ndarray, cov: np.ndarray):
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"real statistics need shapes (D,) and (D, D); got {mean.shape} and {cov.shape}.")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError("real statistics hold values that are not finite; compute them again.")
        values, vectors = np.linalg.eigh((cov + cov.T) / 2)
        self.mean, self.trace = mean, float(np.trace(cov))
        self.root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T  # C_r^1/2

    def distance(self, features: np.ndarray) -> float:
        """Distance of the pictures with `features` (..., D), at least two of them."""
        flat = self._flat(features)
        return float(next(self._distances(flat, np.ones((1, len(flat))))))

    def resample(self, features: np.ndarray, seed: int = 0, resamples: int = 200) -> np.ndarray:
        """(resamples,) distances of `features` (P, J, D) under resampling of prompts; one `seed` resamples jointly."""
        counts = np.concatenate(list(bootstrap_counts(len(features), resamples, seed)))
        return np.array(list(self._distances(self._flat(features), np.repeat(counts, features.shape[1], axis=1))))

    def _flat(self, features: np.ndarray) -> np.ndarray:
        flat = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
        if flat.shape[1] != len(self.mean):
            raise ValueError(f"features have {flat.shape[1]} dimensions, the real statistics {len(self.mean)}.")
        return flat

    def _distances(self, features: np.ndarray, counts: np.ndarray) -> Iterator[float]:
        """Distances of the pictures (n, D) taken as often as each row of `counts` (resamples, n) says."""
        turned, squares = features @ self.root, np.square(features).sum(axis=1)
        for count in counts:
            total = count.sum()
            if total < 2:
                yield math.nan
                continue
            mean, used = count @ features / total, count > 0
            trace = (count @ squares - total * (mean @ mean)) / (total - 1)
            # tr (C_r^1/2 C C_r^1/2)^1/2 is the sum of the singular values of (centred features) C_r^1/2: no root of a
            # matrix that rounding has made indefinite, and the smaller of the two Gram matrices does.
            product = (turned[used] - count @ turned / total) * np.sqrt(count[used] / (total - 1))[:, None]
            gram = product @ product.T if len(product) < product.shape[1] else product.T @ product
            cross = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0.0, None)).sum()
            yield 100 * (np.square(mean - self.mean).sum() + trace + self.trace - 2 * cross)


class DiversityJudge:
    """
    Measures diversity alone, in the features of a CLIP model that is there anyway: that of a reward.

    Args:
        scorer ([`~es_trl.rewards.clip_features.ClipScorer`]): The model.
    """

    real: FrechetReference | None = None

    def __init__(self, scorer: ClipScorer):
        self.scorer = scorer
        self.dim = _array(scorer.text_features(["a picture"])).shape[1]

    def image_features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unit-norm features (B, D) float32."""
        return _array(self.scorer.image_features(list(images)))

    def prompt_scores(self, prompts: Sequence[str], features: np.ndarray) -> dict[str, np.ndarray]:
        """`diversity` (P, 1), in [0, 2], when J > 1: mean cosine distance between two pictures of the prompt."""
        return {"diversity": diversity(features)[:, None]} if features.shape[1] > 1 else {}


class ClipJudge(DiversityJudge):
    """
    Metrics in the feature space of a CLIP model.

    Args:
        scorer ([`~es_trl.rewards.clip_features.ClipScorer`]): The model, best one that no reward is built on.
        hard_negatives (`Sequence[Sequence[str]]`, *optional*): Per prompt of the evaluation its wrong captions
            (swapped colours, another count, ...); an empty list where there are none.
        real_mean (`np.ndarray`, *optional*): (D,) mean of the unit-norm features of real pictures.
        real_cov (`np.ndarray`, *optional*): (D, D) their covariance. Without the two, no Frechet distance.
    """

    def __init__(
        self,
        scorer: ClipScorer,
        hard_negatives: Sequence[Sequence[str]] | None = None,
        real_mean: np.ndarray | None = None,
        real_cov: np.ndarray | None = None,
    ):
        if (real_mean is None) != (real_cov is None):
            raise ValueError("give real_mean and real_cov together, or neither.")
        super().__init__(scorer)
        self.hard_negatives = None if hard_negatives is None else [list(texts) for texts in hard_negatives]
        self.real = None if real_mean is None or real_cov is None else FrechetReference(real_mean, real_cov)
        if self.real is not None and len(self.real.mean) != self.dim:
            raise ValueError(f"real statistics have {len(self.real.mean)} dimensions, the scorer {self.dim}.")

    def prompt_scores(self, prompts: Sequence[str], features: np.ndarray) -> dict[str, np.ndarray]:
        """
        The metrics that have a value per prompt, from the unit-norm features (P, J, D) of the prompts' J pictures:

        - `retrieval_accuracy` (P, J), 0 or 1: the picture is nearer to its caption than to any other prompt.
        - `hard_negative_accuracy` (P, J), 0 or 1, NaN without hard negatives: it beats all of them.
        - `diversity`, as [`DiversityJudge`] has it.
        """
        if self.hard_negatives is not None and len(self.hard_negatives) != len(prompts):
            raise ValueError(
                f"the judge holds hard negatives for {len(self.hard_negatives)} prompts, the evaluation has"
                f" {len(prompts)}; load the judge with the prompts of the evaluation."
            )
        texts = list(dict.fromkeys(prompts))  # a prompt given twice is one caption
        captions = _array(self.scorer.text_features(texts))
        place = {text: i for i, text in enumerate(texts)}
        own = np.array([place[prompt] for prompt in prompts])
        nearest = (features @ captions.T).argmax(axis=-1)
        scores = {"retrieval_accuracy": (nearest == own[:, None]).astype(np.float64)}
        if self.hard_negatives is not None:
            scores["hard_negative_accuracy"] = _beats(features, captions[own], self.hard_negatives, self.scorer)
        return scores | super().prompt_scores(prompts, features)


def _beats(
    features: np.ndarray, captions: np.ndarray, hard_negatives: Sequence[Sequence[str]], scorer: ClipScorer
) -> np.ndarray:
    """(P, J), 1 where a picture is nearer to its caption than to all wrong ones, NaN where there are none."""
    beats = np.full(features.shape[:2], np.nan)
    wrong, end = _array(scorer.text_features([text for negatives in hard_negatives for text in negatives])), 0
    for prompt, negatives in enumerate(hard_negatives):
        start, end = end, end + len(negatives)
        if negatives:
            right = features[prompt] @ captions[prompt]
            beats[prompt] = right > (features[prompt] @ wrong[start:end].T).max(axis=-1)
    return beats


def diversity_judge(rewards: RewardSet, trained: Sequence[str] = ()) -> DiversityJudge | None:
    """
    A judge of diversity from the rewards' own models, at no cost: a held-out one's where there is one (`trained` names
    the optimised ones); `None` when no reward is built on a CLIP model.
    """
    scorers = rewards.scorers()
    held_out_first = sorted(scorers, key=lambda name: name in trained)
    return DiversityJudge(scorers[held_out_first[0]]) if scorers else None


def diversity(features: np.ndarray) -> np.ndarray:
    """Mean cosine distance between two different pictures of a prompt: (P, J, D) unit-norm, J > 1, to (P,)."""
    images = features.shape[1]
    together = np.square(features.sum(axis=1, dtype=np.float64)).sum(axis=-1)  # = J + sum over pairs of the cosine
    alone = np.square(features, dtype=np.float64).sum(axis=(1, 2))
    return 1.0 - (together - alone) / (images * (images - 1))


def load_judge(
    name: str,
    prompts: Sequence[str],
    hard_negatives: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> ClipJudge:
    """
    Loads a judge: a CLIP checkpoint, its statistics of real pictures, and the hard negatives of the prompts.

    Args:
        name (`str`): A shipped scorer ("tiny-clip-heldout"), a local folder or a Hub id of a CLIP model. A file
            `real_statistics.safetensors` with `mean` and `cov` in a local folder turns the Frechet distance on.
        prompts (`Sequence[str]`): The prompts of the evaluation, in order.
        hard_negatives (`str`, *optional*): A .jsonl file with lines `{"prompt": ..., "hard_negatives": [...]}`.
            Defaults to the shipped ones, which know the shipped test and validation prompts.
        device, dtype (*optional*): Where and in what precision the model runs.

    Returns:
        [`ClipJudge`]: without hard negatives when the file knows none of the prompts.
    """
    from ..rewards.clip_features import get_scorer

    folder = Path(assets.resolve(name))
    statistics = folder / "real_statistics.safetensors"
    mean = cov = None
    if statistics.is_file():
        from safetensors.numpy import load_file

        real = load_file(statistics)
        mean, cov = real["mean"], real["cov"]
    known: dict[str, list[str]] = {}
    shipped = [assets.path("prompts", f"{split}_hard_negatives.jsonl") for split in ("test", "validation")]
    for file in [hard_negatives] if hard_negatives is not None else filter(os.path.isfile, shipped):
        known |= read_hard_negatives(file)
    found = [known.get(prompt, []) for prompt in prompts]
    with_negatives = sum(map(bool, found))
    logger.info(
        "judge %s: %s, hard negatives for %d of %d prompts",
        name, "no statistics of real pictures" if mean is None else "Frechet distance", with_negatives, len(prompts),
    )  # fmt: skip
    return ClipJudge(get_scorer(name, device, dtype), found if with_negatives else None, mean, cov)


def read_hard_negatives(path: str | Path) -> dict[str, list[str]]:
    """Reads lines `{"prompt": str, "hard_negatives": [str, ...]}`; `ValueError` has the number of another one."""
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, negatives = entry["prompt"], list(entry["hard_negatives"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'line {number} of {path} is not {{"prompt": ..., "hard_negatives": [...]}}: {error}'
            ) from error
        found[prompt] = negatives
    return found


def _array(features: Any) -> np.ndarray:
    return torch.as_tensor(features).detach().float().cpu().numpy()
