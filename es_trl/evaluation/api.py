"""`evaluate`: the one way in, for training, the command line, the demo and your own code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..hub.adapters import frozen_files
from ..hub.escaping import redact
from ..hub.judged import adapter_digest
from ..lock import FolderLock
from ..pipelines import LoadedAdapters, PipelineAdapter, add_frozen, as_pipeline, load_pipeline
from ..pipelines.quantization import read_quantization
from ..rewards import RewardSet
from ..rewards.clip_features import as_torch_dtype
from .adapters import AdapterSource, find_adapters
from .files import write_files
from .inputs import choose_trained, complete_settings, make_rows, read_prompts, run_value
from .journal import Journal, settings_of
from .judge import ClipJudge, DiversityJudge, diversity_judge, load_judge
from .options import EvaluationOptions
from .pictures import save_pictures
from .protocol import Measurement
from .result import Evaluation
from .rows import EvaluationRow
from .sharing import PromptShare, launched_processes


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def evaluate(
    model: PipelineAdapter | DiffusionPipeline | str,
    prompts: str | Sequence[str],
    rewards: RewardSet | str | Callable[..., Any] | Sequence[str | Callable[..., Any]],
    rows: Sequence[EvaluationRow] | None = None,
    **options: Any,
) -> Evaluation:
    """
    Draws and scores models on the same prompts from the same noise.

    Several processes share the prompts (process p takes prompts p, p + W, ...) and all return the whole result. Under
    `torchrun` or `accelerate launch` a model given by name is shared without further arguments.

    Args:
        model (`str`, `DiffusionPipeline` or [`~es_trl.pipelines.PipelineAdapter`]): The base model (a shipped name, a
            folder, a Hub id, a pipeline), or a model in training with its adapter.
        prompts (`list[str]` or whatever [`load_prompts`] takes): The P prompts; the unit of all statistics.
        rewards ([`~es_trl.rewards.RewardSet`], or what it takes): The K rewards, optimised and held out alike.
        rows (`Sequence[EvaluationRow]`, *optional*): The table; by default made from the options `adapters`, `steps`,
            `best_of` and `adapter_scales`.
        **options: Any of [`~es_trl.evaluation.EvaluationOptions`].

    Returns:
        [`Evaluation`]

    Raises:
        TypeError: There is no such option; the nearest one is named.
        FolderInUse: Another evaluation writes into `output_dir`.
        ValueError: Input that cannot work; before a model is loaded where that is possible.
    """
    started, asked = time.perf_counter(), EvaluationOptions(**options)
    sources = find_adapters(asked.adapters)
    prompts, columns, prompts_source = read_prompts(prompts, asked.columns, asked.max_prompts)
    in_training = isinstance(model, PipelineAdapter)
    asked.check(prompts, columns, rows, [source.label for source in sources], in_training)
    if not isinstance(rewards, RewardSet):
        rewards = RewardSet(rewards, device=_device(asked.device), dtype=_exact(asked))
    trained = choose_trained(asked.trained_rewards, sources, rewards, asked.best_of)
    share = _share(asked, len(prompts), in_training)
    with _alone_in(asked, share):
        drawer, details = _drawer(model, asked, sources, rewards)
        try:
            judge = _judge(asked, prompts, rewards, trained)
            details = {"prompts_source": prompts_source, **details, **_described(asked, judge, share)}
            result = Evaluation(
                rows=_rows(rows, drawer, asked, None if in_training else sources), reward_names=list(rewards.names),
                prompts=prompts, noise=asked.noise, resamples=asked.resamples, settings=drawer.describe(),
                trained=trained, columns=columns, adapters=sources, details=details, rising=rewards.rising,
            )  # fmt: skip
            if isinstance(model, str) or asked.device is not None:
                drawer.to(_device(asked.device))
            _measure(result, drawer, rewards, judge, share, asked)
        finally:
            if isinstance(drawer, LoadedAdapters):
                drawer.unload()
        if asked.output_dir is not None and share.process_index == 0:
            details["seconds"] = round(time.perf_counter() - started, 1)
            write_files(result, asked.output_dir)
    share.barrier()
    return result


def _alone_in(asked: EvaluationOptions, share: PromptShare) -> AbstractContextManager[Any]:
    """Two evaluations that write into one folder would move each other's rows away."""
    writes = asked.output_dir is not None and share.process_index == 0
    return FolderLock(str(asked.output_dir), "eval.lock") if writes else nullcontext()


def _share(asked: EvaluationOptions, prompts: int, in_training: bool) -> PromptShare:
    """What this process draws; a launcher's processes count where none are named."""
    alone = in_training or asked.num_processes > 1
    launched = {} if alone else launched_processes(use_cpu=_device(asked.device) == "cpu")
    given = {name: getattr(asked, name) for name in ("process_index", "num_processes", "gather")}
    return PromptShare(prompts, **(given | launched))


def _drawer(
    model: PipelineAdapter | DiffusionPipeline | str,
    asked: EvaluationOptions,
    sources: Sequence[AdapterSource],
    rewards: RewardSet,
) -> tuple[PipelineAdapter | LoadedAdapters, dict[str, Any]]:
    """What draws: the model as its adapters' runs had it, with the adapters; and what the files say of it."""
    if isinstance(model, PipelineAdapter):
        return model, {}
    settings = complete_settings(asked.settings, sources)
    rewards.load()  # a scorer that cannot be had is said before the larger model is loaded
    if not rewards.asking_nobody:
        raise ValueError(
            f"rewards: {', '.join(rewards.names)} asks people, who would compare the pictures of one model with each "
            "other, which says nothing about the model. Give a reward that scores single pictures."
        )
    dtype = as_torch_dtype(asked.dtype or run_value(sources, "dtype"))
    quantised = read_quantization(run_value(sources, "quantization_config"))
    init = {"quantization_config": quantised} if quantised else {}
    model = as_pipeline(model)
    pipe = load_pipeline(model, dtype, **init) if isinstance(model, str) else model
    if isinstance(model, str):  # the base that the adapters were trained on
        add_frozen(pipe, frozen_files(run_value(sources, "frozen_adapters")))
    files = {source.label: source.file for source in sources}
    return LoadedAdapters(pipe, files, settings, asked.allow_partial), {
        "model": model if isinstance(model, str) else pipe.name_or_path,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "judged": {source.label: adapter_digest(source.file) for source in sources},
    }


def _rows(
    rows: Sequence[EvaluationRow] | None,
    drawer: PipelineAdapter | LoadedAdapters,
    asked: EvaluationOptions,
    sources: Sequence[AdapterSource] | None,
) -> list[EvaluationRow]:
    """The table, every row with its number of steps; `sources` is `None` for a model in training."""
    if rows is None:
        labels = None if sources is None else [source.label for source in sources]
        rows = make_rows(labels, drawer.steps, asked.steps, asked.best_of, asked.adapter_scales)
    return [row if row.num_inference_steps else replace(row, num_inference_steps=drawer.steps or 1) for row in rows]


def _judge(
    asked: EvaluationOptions, prompts: list[str], rewards: RewardSet, trained: dict[str, float] | None
) -> DiversityJudge | None:
    if isinstance(asked.judge, str):
        return load_judge(asked.judge, prompts, device=_device(asked.device), dtype=_exact(asked))
    if asked.judge is None and asked.noise.images_per_prompt > 1:
        return diversity_judge(rewards, list(trained or ()))
    return asked.judge


def _described(asked: EvaluationOptions, judge: DiversityJudge | None, share: PromptShare) -> dict[str, Any]:
    checkpoint = judge.scorer.checkpoint if judge is not None else None
    return {
        "judge": checkpoint if isinstance(judge, ClipJudge) else None,
        "diversity_features": checkpoint if asked.noise.images_per_prompt > 1 else None,
        "batch_size": asked.batch_size,
        "num_processes": share.num_processes,
        "command": redact(asked.command) if asked.command else None,
        "es_trl": __version__,
    }


def _measure(
    result: Evaluation,
    drawer: PipelineAdapter | LoadedAdapters,
    rewards: RewardSet,
    judge: DiversityJudge | None,
    share: PromptShare,
    asked: EvaluationOptions,
) -> None:
    """Fills `result`; with `output_dir` by way of its journal, and with pictures."""
    folder, journal = asked.output_dir, None
    if folder is not None:
        journal = Journal(folder, settings_of(result, rewards, drawer, asked.batch_size), asked.resume, share)
    n_keep = (16 if folder is None else 0) if asked.n_keep is None else asked.n_keep
    Measurement(drawer, rewards, judge, result, share, asked.batch_size, n_keep, asked.trainer_state).fill(journal)
    if folder is not None and share.process_index == 0:
        save_pictures(drawer, result, asked.save_images, folder, asked.batch_size)


def _exact(asked: EvaluationOptions) -> torch.dtype | None:
    """The dtype of judges and rewards given by name, where the user asks for one that rounds nothing away."""
    return torch.float64 if asked.dtype is not None and as_torch_dtype(asked.dtype) is torch.float64 else None


def _device(device: str | torch.device | None) -> str:
    return str(device) if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
