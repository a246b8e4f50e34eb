"""EvaluationOptions: what `evaluate` may be told beside the model, the prompts and the rewards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..data import check_prompts, unstorable
from ..names import checked
from .noise import Noise
from .statistics import RESAMPLES


if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..pipelines import CallSettings
    from .judge import DiversityJudge
    from .rows import EvaluationRow


@checked
@dataclass(kw_only=True)
class EvaluationOptions:
    """
    The keywords of [`evaluate`].

    Args:
        images_per_prompt (`int`, *optional*, defaults to 1): Per seed; more than one image also measures diversity.
        seed (`int` or `list[int]`, *optional*, defaults to 0): Seeds of the initial noise; the first one also of the
            bootstrap. Each seed gives `images_per_prompt` images.
        batch_size (`int`, *optional*, defaults to 16): Images drawn and scored at once; changes the result by float
            rounding only (see `dtype`).
        columns (`dict[str, list]`, *optional*): Further columns of the prompts, each of length P, for the rewards;
            "category" and "challenge" also make exploratory tables. By default those of the data set.
        judge ([`ClipJudge`] or `str`, *optional*): Measures retrieval, hard negatives, Frechet distance, diversity.
            A string is a CLIP checkpoint. Without one, diversity is measured with a reward's CLIP model.
        adapters (`str`, `list` or `dict`, *optional*): Run folders, LoRA files or folders, Hub ids; `"name=source"` or
            `{name: sources}` name methods, several sources of one name being its training runs.
        steps (`list[int]`, *optional*): Sampling steps, the first being what the adapters were trained for; by default
            that and twice as many.
        best_of (`list[int]`, *optional*): Numbers of tries N for rows "best of N of the base by the trained reward".
        adapter_scales (`list[float]`, *optional*): LoRA scales of the first adapter, from 0 (the base) on.
        trained_rewards (`list[str]` or `dict[str, float]`, *optional*): Which rewards were optimised (with weights);
            by default what the run folders say.
        settings ([`~es_trl.pipelines.CallSettings`], *optional*): How the pipeline is called; what is `None` is taken
            from the run folders, then from the pipeline.
        dtype (`torch.dtype` or `str`, *optional*): Of a model given by name; by default what the run folders say, then
            fp32. `"float64"` also holds for rewards given by name: then pictures and tables are the same for any
            batch size, which float rounding forbids in fp32 (there about one pixel in 50,000 differs, by 1/255).
        device (`str`, *optional*): Of a model given by name; a GPU by default where there is one.
        max_prompts (`int`, *optional*): Only the first so many prompts.
        output_dir (`str`, *optional*): Writes eval.json, eval.md, scores.parquet, prompts.jsonl and images there, and
            a journal of finished rows. An earlier evaluation there is moved into `earlier-<n>`.
        resume (`bool`, *optional*, defaults to `False`): Take the finished rows of this very call from `output_dir`.
            Settings are compared field by field, and one prompt of every finished row is drawn and scored again: other
            scores are an error.
        allow_partial (`bool`, *optional*, defaults to `False`): Go on, with a warning, when the model takes only a
            part of an adapter, for example without its text encoder's matrices.
        save_images (`int`, *optional*, defaults to 24): Prompts whose images are written, drawn again from their keys:
            those with the best, typical and worst change.
        command (`str`, *optional*): The command line that asks for this, for the files.
        process_index, num_processes (`int`, *optional*): Which of how many processes this is.
        gather (`Callable`, *optional*): Given an array of one shape on all processes, returns those of all
            processes in order, stacked or concatenated along the first axis. Needed when `num_processes > 1`.
        n_keep (`int`, *optional*): The images of the first `n_keep` prompts are kept in the result; by default 16, and
            none with `output_dir`.
        resamples (`int`, *optional*, defaults to 10000): Bootstrap resamples of the prompts.
        trainer_state (*optional*): Passed on to the rewards, as in training.
    """

    images_per_prompt: int = 1
    seed: int | Sequence[int] = 0
    batch_size: int = 16
    columns: Mapping[str, Sequence[Any]] | None = None
    judge: DiversityJudge | str | None = None
    adapters: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None
    steps: Sequence[int] | None = None
    best_of: Sequence[int] = ()
    adapter_scales: Sequence[float] = ()
    trained_rewards: Sequence[str] | Mapping[str, float] | None = None
    settings: CallSettings | None = None
    dtype: torch.dtype | str | None = None
    device: str | torch.device | None = None
    max_prompts: int | None = None
    output_dir: str | os.PathLike[str] | None = None
    resume: bool = False
    allow_partial: bool = False
    save_images: int = 24
    command: str | None = None
    process_index: int = 0
    num_processes: int = 1
    gather: Callable[[np.ndarray], np.ndarray] | None = None
    n_keep: int | None = None
    resamples: int = RESAMPLES
    trainer_state: Any = None

    @property
    def noise(self) -> Noise:
        """Which noise each prompt is drawn from."""
        return Noise(tuple(self.seed) if isinstance(self.seed, Sequence) else (self.seed,), self.images_per_prompt)

    def check(
        self,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        rows: Sequence[EvaluationRow] | None,
        labels: Sequence[str],
        in_training: bool,
    ) -> None:
        """Raises `ValueError` for what cannot work, naming the field; `labels` are those of the adapters."""
        if in_training and (labels or self.settings is not None or self.resume):
            raise ValueError(
                "a PipelineAdapter has an adapter and settings of its own, and no name to compare: adapters, settings "
                "and resume go with a model by name."
            )
        if self.resume and self.output_dir is None:
            raise ValueError("resume needs output_dir, the folder of the evaluation that was interrupted.")
        if not prompts:
            raise ValueError("there are no prompts to evaluate on; give at least one.")
        check_prompts(prompts, "the evaluation")
        _check_columns(columns, len(prompts))
        least = {"images_per_prompt": 1, "batch_size": 1, "save_images": 0, "n_keep": 0, "resamples": 1}
        for name, smallest in least.items():
            _check_count(name, getattr(self, name), smallest)
        for name in ("steps", "best_of"):
            for value in getattr(self, name) or ():
                _check_count(name, value, 1)
        if self.steps is not None and not self.steps:
            raise ValueError("steps is empty; give one number of steps or more, or leave it out.")
        seeds = self.noise.seeds
        if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, Integral) for seed in seeds):
            raise ValueError(f"seed is {list(seeds)}; give at least one integer, and each once.")
        for scale in self.adapter_scales:
            if not 0 <= scale <= 4:
                raise ValueError(
                    f"adapter_scales holds {scale}; give scales in [0, 4], 1 being the adapter as trained."
                )
        if rows is not None:
            self._check_rows(rows, labels, in_training)

    def _check_rows(self, rows: Sequence[EvaluationRow], labels: Sequence[str], in_training: bool) -> None:
        if self.steps or self.best_of or self.adapter_scales:
            raise ValueError("give either rows, or steps, best_of and adapter_scales to make them from.")
        names = [row.name for row in rows]
        if not rows or len(set(names)) < len(names):
            raise ValueError(f"rows are named {names}; give at least one row, and each its own name.")
        unknown = [row.label for row in rows if row.label is not None and row.label not in labels]
        if unknown:
            raise ValueError(f"rows ask for the adapters {unknown}; loaded are {list(labels)}.")
        nameless = [row.name for row in rows if row.adapter and row.label is None and not in_training]
        if nameless:  # the base would be drawn in its place
            raise ValueError(
                f"row {nameless[0]!r} names no adapter: give it a label, one of {list(labels)}, or adapter=False."
            )


def _check_columns(columns: Mapping[str, Sequence[Any]], prompts: int) -> None:
    for name, values in columns.items():
        if len(values) != prompts:
            raise ValueError(f"column {name!r} has {len(values)} values for {prompts} prompts; give one each.")
        for i, value in enumerate(values):
            reason = None if isinstance(value, int) else unstorable(value)
            if reason:
                raise ValueError(f"column {name!r}, row {i}, holds {reason}.")


def _check_count(name: str, value: int | None, least: int) -> None:
    """`None` is a default."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} is {value!r}; give {least} or more.")
