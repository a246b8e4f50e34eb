"""What a run says about itself: the evaluation against the base, the before/after picture, the model card."""

import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from ..evaluation import (
    Evaluation,
    EvaluationRow,
    contact_sheet,
    evaluate,
    first_look,
    load_judge,
    paired_difference,
    save_pictures,
    write_files,
)
from ..files import write_text
from ..formatting import interval, number, percent
from ..hub import drawn_with, model_card, stamp
from ..pictures import save_jpeg
from .settings import run_config
from .trackers import tracker_urls


logger = logging.getLogger(__name__)

NUM_PAIRS = 18  # prompts by reward whose pictures stay beside eval.json: best, typical, worst


class Results:
    """
    What a run finds out about its adapter, and writes of it.

    Attributes:
        comparison (`dict`): `eval.json` of the comparison with the base; empty before it.
        last (`Evaluation` or `None`): The last evaluation during training, made at `last_step`.
        gallery (`list[tuple[str, str]]`): Prompts and files of the card's pictures.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.comparison: dict[str, Any] = {}
        self.last: Evaluation | None = None
        self.last_step: int | None = None
        self._base: Evaluation | None = None
        self._silent: set[str] = set()  # rewards of which it was said that they scored nothing
        self.gallery: list[tuple[str, str]] = []

    def evaluate(self, row: EvaluationRow, prompts: Sequence[str], columns: dict[str, list]) -> Evaluation:
        """One model on the evaluation's prompts and noise, with every reward, optimised or held out."""
        args = self.trainer.args
        return self._evaluate(
            [row], prompts, columns, images_per_prompt=args.eval_images_per_prompt, seed=args.eval_seed, n_keep=0
        )

    def base(self, prompts: Sequence[str], columns: dict[str, list]) -> Evaluation:
        """The base on these prompts, as `evaluate`; drawn once, for as long as they stay the same."""
        if self._base is None or list(self._base.prompts) != list(prompts):
            self._base = self.evaluate(EvaluationRow("base", adapter=False), prompts, columns)
        return self._base

    @property
    def base_means(self) -> dict[str, float]:
        """What the base had under every metric of an evaluation, as far as it has been drawn."""
        base = self._base
        if base is None or self.last is None or base.prompts != self.last.prompts:
            return {}
        means = {f"eval_rewards/{name}/mean": base.mean("base", name) for name in base.reward_names}
        return means | {"eval_reward": base.mean_total("base")}

    def evaluate_adapter(self, dataset: Dataset) -> dict[str, float]:
        """What [`DiffusionTrainer.evaluate`] returns, without the prefix."""
        trainer, started = self.trainer, time.perf_counter()
        with trainer.peers.together(f"the evaluation at step {trainer.state.global_step}"):
            columns = columns_of(dataset)
            self.last = self.evaluate(EvaluationRow("adapter"), dataset["prompt"], columns)
            self.last_step = trainer.state.global_step
            if trainer.args.early_warning != "off":
                self.base(dataset["prompt"], columns)
        scores = self.last.scores["adapter"]
        metrics = {f"rewards/{name}/mean": self.last.mean("adapter", name) for name in trainer.eval_rewards.names}
        for name in trainer.eval_rewards.names:
            spoke = int(np.isfinite(self.last.of("adapter", name)).any(axis=1).sum())
            if spoke < len(self.last.prompts):  # it failed, or does not apply to the others
                metrics[f"rewards/{name}/prompts"] = float(spoke)
            if not spoke and name not in self._silent:
                self._silent.add(name)
                logger.warning("%s scored no prompt of the evaluation: %s.", name, self._why_silent(name))
        metrics["reward"] = self.last.mean_total("adapter")
        if "diversity" in self.last.judge_scores.get("adapter", {}):
            metrics["diversity"] = float(self.last.judge_scores["adapter"]["diversity"].mean())
        metrics["images_per_second"] = scores[..., 0].size / (time.perf_counter() - started)
        return metrics

    def _why_silent(self, name: str) -> str:
        rewards = self.trainer.eval_rewards
        k = rewards.names.index(name)
        if k not in rewards.asking_nobody:
            return "people are asked in training only, where two members stand side by side"
        if k in rewards.group_rewards and self.trainer.args.eval_images_per_prompt == 1:
            return "it compares pictures of a prompt, and eval_images_per_prompt=1 draws one; set it to 2 or more"
        return "it failed, or applies to none of them"

    def compare(
        self, dataset: Dataset, rows: list[EvaluationRow], images_per_prompt: int, judge: str | None, seed: int | None,
        num_pictures: int,
    ) -> Evaluation:  # fmt: skip
        """As [`DiffusionTrainer.compare_with_base`]; writes what it finds."""
        trainer, args, prompts = self.trainer, self.trainer.args, dataset["prompt"]
        started = time.perf_counter()
        with trainer.peers.together("the comparison with the base"):
            result = self._evaluate(
                rows,
                prompts,
                columns_of(dataset),
                images_per_prompt=images_per_prompt,
                seed=args.eval_seed + 1 if seed is None else seed,
                judge=load_judge(judge, prompts, **args.scorer_place) if judge else None,
                n_keep=num_pictures,
            )
        digest = trainer.adapter.lora_digest()
        result.details |= {"model": trainer.base_model, "dtype": args.dtype, "judged": {"adapter": digest}}
        result.details["seconds"] = round(time.perf_counter() - started, 1)
        self.comparison = result.to_dict()
        if trainer.is_world_process_zero():
            save_pictures(trainer.adapter, result, NUM_PAIRS, args.output_dir, args.per_device_eval_batch_size)
            self.comparison |= {"pictures": result.pictures, "strengths": result.strengths}
            write_files(result, args.output_dir, self.comparison)
            self._save_pictures(result, num_pictures, stamp(digest))
            self._log(result, time.perf_counter() - started)
        return result

    def _evaluate(self, rows: list[EvaluationRow], prompts, columns, **options) -> Evaluation:
        """Its work is split over the processes of the run."""
        trainer, args = self.trainer, self.trainer.args
        trainer.prompt_blocks.plan(prompts, columns)
        trainer.prompt_blocks.encode(prompts)
        return evaluate(
            trainer.adapter,
            prompts,
            trainer.eval_rewards,
            rows=rows,
            batch_size=args.per_device_eval_batch_size,
            columns=columns,
            trained_rewards=dict(zip(trainer.rewards.names, trainer.rewards.weights.tolist(), strict=True)),
            trainer_state=trainer.state,
            process_index=args.process_index,
            num_processes=args.world_size,
            gather=lambda array: trainer.peers.share(torch.from_numpy(array), "an evaluation").numpy(),
            **options,
        )

    def _save_pictures(self, result: Evaluation, count: int, comment: bytes) -> None:
        """The before/after sheet, chosen by rule, and the adapter's pictures in it alone, for the card's gallery."""
        output_dir = self.trainer.args.output_dir
        folder = os.path.join(output_dir, "samples")
        rows, shown = result.rows[:3], first_look(result.pictures, count)
        if shown:  # nothing where no reward gave a score
            files = [[os.path.join(output_dir, pair["files"][row.name]) for row in rows] for pair in shown]
            captions = [f"{pair['prompt']} ({number(pair['change'], sign=True)})" for pair in shown]
            models = [("adapter" if row.adapter else "base", row.num_inference_steps) for row in rows]
            labels = [f"{model}, {n or 'own'} step{'' if n == 1 else 's'}" for model, n in models]
            ends = f"The two ends and the middle of {len(result.prompts)} prompts"
            note = f"{ends}, sorted by the change of {shown[0]['reward']}."
            images = [[Image.open(path) for path in paths] for paths in files]
            sheet = contact_sheet(images, captions, labels, None, note, bold="columns")
            save_jpeg(sheet, os.path.join(folder, "before_after.jpg"), comment)
        self.gallery = []
        for i, pair in enumerate(shown):
            image = Image.open(os.path.join(output_dir, pair["files"][rows[1].name]))
            scale = max(1, 256 // max(image.size))
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
            save_jpeg(image, os.path.join(folder, f"adapter-{i:03d}.jpg"), comment)
            self.gallery.append((pair["prompt"], f"samples/adapter-{i:03d}.jpg"))

    def _log(self, result: Evaluation, seconds: float) -> None:
        """One line per reward on the log, since this is what the run was for."""
        for entry in self.comparison["paired"]:
            if (entry["against"], entry["row"]) == (result.rows[0].name, result.rows[1].name):
                closure = self.comparison["gap_closure"].get(entry["reward"])
                high = (self.comparison["gap_closure_ci"].get(entry["reward"]) or (None, None))[1]
                if high is None or high <= 0:
                    closure = None  # of too few prompts nothing is claimed, and a loss closes no gap
                text = f"{entry['reward']}: {entry['row']} {number(entry['delta'], sign=True)}"
                text += interval(entry["ci_low"], entry["ci_high"]) or ", on too few prompts for an interval,"
                text += f" against {entry['against']}"
                logger.info("%s%s", text, "" if closure is None else f", gap closure {closure:.2f}")
        logger.info("evaluated %d prompts in %.0f s", len(result.prompts), seconds)

    def write_card(
        self,
        output_dir: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """
        As [`DiffusionTrainer.create_model_card`]. The adapter is saved by then, so a card that cannot be made of what
        others wrote is a warning and no more.
        """
        trainer, args = self.trainer, self.trainer.args
        if not trainer.is_world_process_zero():
            return
        output_dir = output_dir or args.output_dir
        picture = "samples/before_after.jpg"
        found = self.comparison or os.path.exists(os.path.join(output_dir, picture))
        digest = trainer.adapter.lora_digest() if found else None
        try:
            card = model_card(
                adapter_info=trainer.adapter.describe(),
                config=run_config(trainer),
                evaluation=self.comparison or None,
                digest=digest,  # training may have gone on since the comparison
                env=trainer.environment,
                samples=self.gallery,
                picture=picture if drawn_with(os.path.join(output_dir, picture), digest) else None,
                sheets=sample_sheets(output_dir),
                repo_id=trainer.hub.repo_id or (args.hub_model_id if args.push_to_hub else None),
                revision=args.hub_revision,
                base_model=finetuned_from or trainer.base_model,
                dataset_name=dataset_name or trainer.dataset_name,
                duration_seconds=trainer.clock.seconds,
                num_images=trainer.images_drawn,
                license=license,
                tags=[*([tags] if isinstance(tags, str) else tags or ()), *getattr(trainer.model, "model_tags", ())],
                tracker_urls=tracker_urls(trainer),
            )
        except (ValueError, TypeError, LookupError, OSError) as error:
            logger.warning(
                "The model card could not be made (%s: %s); the adapter is saved.", type(error).__name__, error
            )
            return
        write_text(os.path.join(output_dir, "README.md"), str(card))


def closing_lines(trainer) -> list[str]:
    """Two lines; every process takes part, since the evaluation prompts are drawn once more where that is needed."""
    folder = trainer.args.output_dir
    where = f"All of it is in {folder}; save_model() writes the adapter and its card, es-trl report {folder} the page."
    if trainer.test_dataset is not None:  # the comparison on the test prompts follows
        return [f"All of it is in {folder}."]
    if trainer.eval_dataset is None:
        return ["Nothing was compared with the base: give eval_dataset, or call compare_with_base(prompts).", where]
    return [gain_line(trainer), where]


def gain_line(trainer) -> str:
    """The trained reward on the evaluation prompts, the adapter against the base from the same noise."""
    dataset = trainer.eval_dataset
    columns = columns_of(dataset)
    with trainer.peers.together("the last look at the evaluation prompts"):
        now = trainer.results.last
        fresh = trainer.results.last_step == trainer.state.global_step and not trainer.args.load_best_model_at_end
        if not fresh or list(now.prompts) != list(dataset["prompt"]):
            now = trainer.results.evaluate(EvaluationRow("adapter"), dataset["prompt"], columns)
        base = trainer.results.base(dataset["prompt"], columns)
    after, before = now.total(now.scores["adapter"]), base.total(base.scores["base"])
    found = paired_difference(after, before)
    name = trainer.rewards.names[0] if len(trainer.rewards) == 1 else "the trained sum"
    text = f"On {found.prompts} evaluation prompts {name} went from {number(base.mean_total('base'))} to "
    text += f"{number(now.mean_total('adapter'))}: {number(found.delta, sign=True)}"
    if math.isnan(found.low):
        return f"{text}, on too few prompts for an interval."
    return f"{text}{interval(found.low, found.high)}, better on {percent(found.win_rate, 0)} of them."


def columns_of(dataset: Dataset) -> dict[str, list]:
    """What rewards get beside the prompts."""
    return {name: dataset[name] for name in dataset.column_names if name != "prompt"}


def sample_sheets(folder: str) -> list[tuple[str, str]]:
    """The first and the last sheet of the sample prompts below `folder`, with captions."""
    names = [path.name for path in Path(folder, "samples").glob("step-*.jpg") if not path.is_symlink()]
    steps = sorted((int(name[5:-4]), f"samples/{name}") for name in names if name[5:-4].isdigit())
    ends = [*steps[:1], *steps[1:][-1:]]
    return [("Before training" if step == 0 else f"At step {step}", path) for step, path in ends]
