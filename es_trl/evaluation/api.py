"""`evaluate`: the one way in, for training, the command line, the demo and your own code."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import __version__
from ..hub.adapters import frozen_files
from ..hub.escaping import redact
from ..hub.judged import adapter_digest
from ..pipelines import CallSettings, LoadedAdapters, PipelineAdapter, add_frozen, as_pipeline, load_pipeline
from ..pipelines.quantization import read_quantization
from ..rewards import RewardSet
from ..rewards.clip_features import as_torch_dtype
from .adapters import find_adapters
from .files import write_files
from .inputs import (
    check,
    check_counts,
    choose_trained,
    complete_settings,
    make_rows,
    read_prompts,
    run_value,
)
from .journal import Journal, settings_of
from .judge import ClipJudge, DiversityJudge, diversity_judge, load_judge
from .noise import Noise
from .pictures import choose_pairs, save_pairs, save_strengths
from .protocol import measure
from .result import Evaluation
from .rows import EvaluationRow
from .sharing import PromptShare, launched_processes
from .statistics import RESAMPLES


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def evaluate(
    model: PipelineAdapter | DiffusionPipeline | str,
    prompts: str | Sequence[str],
    rewards: RewardSet | str | Callable | Sequence[str | Callable],
    rows: Sequence[EvaluationRow] | None = None,
    images_per_prompt: int = 1,
    seed: int | Sequence[int] = 0,
    batch_size: int = 16,
    columns: dict[str, list] | None = None,
    judge: ClipJudge | DiversityJudge | str | None = None,
    *,
    adapters: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    steps: Sequence[int] | None = None,
    best_of: Sequence[int] = (),
    adapter_scales: Sequence[float] = (),
    trained_rewards: Sequence[str] | Mapping[str, float] | None = None,
    settings: CallSettings | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    max_prompts: int | None = None,
    output_dir: str | os.PathLike | None = None,
    resume: bool = False,
    allow_partial: bool = False,
    save_images: int = 24,
    command: str | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[np.ndarray], np.ndarray] | None = None,
    n_keep: int | None = None,
    resamples: int = RESAMPLES,
    trainer_state: Any = None,
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
        rows (`Sequence[EvaluationRow]`, *optional*): The table; by default made from `adapters`, `steps`, `best_of`
            and `adapter_scales`.
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
            Settings are compared field by field; what a name stands for and what a function does is not looked into.
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

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: Input that cannot work; before a model is loaded where that is possible.
    """
    started = time.perf_counter()
    in_training = isinstance(model, PipelineAdapter)
    sources = find_adapters(adapters)
    labels = [source.label for source in sources]
    if in_training and (sources or settings is not None or resume):
        raise ValueError(
            "a PipelineAdapter has an adapter and settings of its own, and no name to compare: adapters, settings and "
            "resume go with a model by name."
        )
    if resume and output_dir is None:
        raise ValueError("resume needs output_dir, the folder of the evaluation that was interrupted.")
    prompts, columns, prompts_source = read_prompts(prompts, columns, max_prompts)
    noise = Noise(tuple(seed) if isinstance(seed, Sequence) else (seed,), images_per_prompt)
    check(prompts, rows, noise, batch_size, columns, steps, best_of, adapter_scales, save_images, labels)
    check_counts(n_keep=(n_keep, 0), resamples=(resamples, 1))
    exact = torch.float64 if dtype is not None and as_torch_dtype(dtype) is torch.float64 else None
    if not isinstance(rewards, RewardSet):
        rewards = RewardSet(rewards, device=_device(device), dtype=exact)
    trained = choose_trained(trained_rewards, sources, rewards, best_of)
    launched = {} if in_training or num_processes > 1 else launched_processes(use_cpu=_device(device) == "cpu")
    given = {"process_index": process_index, "num_processes": num_processes, "gather": gather}
    share = PromptShare(len(prompts), **(given | launched))

    details: dict[str, Any] = {"prompts_source": prompts_source}
    if in_training:
        drawer = model
    else:
        settings = complete_settings(settings, sources)
        rewards.load()  # a scorer that cannot be had is said before the larger model is loaded
        dtype = as_torch_dtype(dtype or run_value(sources, "dtype"))
        quantised = read_quantization(run_value(sources, "quantization_config"))
        init = {"quantization_config": quantised} if quantised else {}
        pipe = load_pipeline(model, dtype, **init) if isinstance(model, str) else as_pipeline(model)
        if isinstance(model, str):  # the base that the adapters were trained on
            add_frozen(pipe, frozen_files(run_value(sources, "frozen_adapters")))
        files = {source.label: source.file for source in sources}
        drawer = LoadedAdapters(pipe, files, settings, allow_partial)
        details |= {"model": model if isinstance(model, str) else pipe.name_or_path, "dtype": _name(pipe.dtype)}
        details["judged"] = {source.label: adapter_digest(source.file) for source in sources}
    try:
        described = drawer.describe()
        first = drawer.steps
        if rows is None:
            rows = make_rows(None if in_training else labels, first, steps, best_of, adapter_scales)
        rows = [row if row.num_inference_steps else replace(row, num_inference_steps=first or 1) for row in rows]
        if isinstance(judge, str):
            judge = load_judge(judge, prompts, device=_device(device), dtype=exact)
        elif judge is None and noise.images_per_prompt > 1:
            judge = diversity_judge(rewards, list(trained or ()))
        details |= _describe_judge(judge, noise) | {
            "batch_size": batch_size,
            "num_processes": share.num_processes,
            "command": redact(command) if command else None,
            "es_trl": __version__,
        }
        result = Evaluation(
            rows=rows, reward_names=list(rewards.names), prompts=prompts, noise=noise, resamples=resamples,
            settings=described, trained=trained, columns=columns, adapters=sources, details=details,
            rising=rewards.rising,
        )  # fmt: skip
        journal = None
        if output_dir is not None:
            journal = Journal(output_dir, settings_of(result, rewards, drawer, batch_size), resume, share)
        if isinstance(model, str) or device is not None:
            drawer.to(_device(device))
        n_keep = (16 if output_dir is None else 0) if n_keep is None else n_keep
        measure(drawer, rewards, result, batch_size, judge, share, n_keep, journal, trainer_state)
        if output_dir is not None and share.process_index == 0:
            pairs = choose_pairs(result, save_images)
            result.pictures = save_pairs(drawer, result, pairs, output_dir, batch_size)
            result.strengths = save_strengths(drawer, result, pairs, output_dir, batch_size)
    finally:
        if isinstance(drawer, LoadedAdapters):
            drawer.unload()
    if output_dir is not None and share.process_index == 0:
        details["seconds"] = round(time.perf_counter() - started, 1)
        write_files(result, output_dir)
    share.barrier()
    return result


def _describe_judge(judge: ClipJudge | DiversityJudge | None, noise: Noise) -> dict[str, str | None]:
    checkpoint = judge.scorer.checkpoint if judge is not None else None
    return {
        "judge": checkpoint if isinstance(judge, ClipJudge) else None,
        "diversity_features": checkpoint if noise.images_per_prompt > 1 else None,
    }


def _device(device: str | torch.device | None) -> str:
    return str(device) if device is not None else "cuda" if torch.cuda.is_available() else "cpu"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
