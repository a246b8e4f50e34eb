"""What a run says about itself: the evaluation against the base, the before/after picture, the model card."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..data import load_prompts
from ..evaluation import (
    Evaluation,
    EvaluationRow,
    choose_pairs,
    contact_sheet,
    default_rows,
    evaluate,
    first_look,
    load_judge,
    save_pairs,
    save_strengths,
    write_files,
)
from ..formatting import interval, number
from ..hub import drawn_with, judged, model_card, stamp
from ..pictures import rgb
from .trackers import tracker_urls


logger = logging.getLogger(__name__)

NUM_PAIRS = 18  # prompts by reward whose pictures stay beside eval.json: best, typical, worst


class ReportingMixin:
    """The reporting half of [`DiffusionTrainer`]."""

    evaluation: dict[str, Any] | None = None
    last_evaluation: Evaluation | None = None
    evaluated_at: int | None = None  # the step of `last_evaluation`
    _base_row: Evaluation | None = None
    dataset_name: str | None = None
    test_dataset: Any = None
    gallery: Sequence[tuple[str, str]] = ()

    def evaluate_row(self, row: EvaluationRow, prompts: Sequence[str], columns: dict[str, list]) -> Evaluation:
        """One model on the evaluation's prompts and noise, with every reward, optimised or held out."""
        return evaluate(
            self.adapter,
            prompts,
            self.eval_rewards,
            rows=[row],
            images_per_prompt=self.args.eval_images_per_prompt,
            seed=self.args.eval_seed,
            batch_size=self.args.per_device_eval_batch_size,
            columns=columns,
            trained_rewards=self.trained_rewards,
            n_keep=0,
            trainer_state=self.state,
            **self.evaluation_share(),
        )

    def base_evaluation(self, prompts: Sequence[str], columns: dict[str, list]) -> Evaluation:
        """The base on these prompts, as [`evaluate_row`]; drawn once, for as long as they stay the same."""
        if self._base_row is None or list(self._base_row.prompts) != list(prompts):
            self._base_row = self.evaluate_row(EvaluationRow("base", adapter=False), prompts, columns)
        return self._base_row

    @property
    def base_means(self) -> dict[str, float]:
        """What the base had under every metric of an evaluation, as far as it has been drawn."""
        base = self._base_row
        if base is None or self.last_evaluation is None or base.prompts != self.last_evaluation.prompts:
            return {}
        means = {f"eval_rewards/{name}/mean": base.mean("base", name) for name in base.reward_names}
        return means | {"eval_reward": base.mean_total("base")}

    @property
    def trained_rewards(self) -> dict[str, float]:
        """The optimised rewards with their weights."""
        return dict(zip(self.rewards.names, self.rewards.weights.tolist(), strict=True))

    def evaluation_rows(self) -> list[EvaluationRow]:
        """The rows of the comparison: base, adapter, base with twice the steps, and what a method adds to them."""
        return default_rows(self.args.num_inference_steps)

    def compare_with_base(
        self,
        test_dataset,
        images_per_prompt: int = 1,
        judge: str | None = None,
        seed: int | None = None,
        num_pictures: int = 6,
    ) -> Evaluation:
        """
        Draws test prompts with the base, the adapter, and the base with twice the steps, from the same latents, scores
        all of them with every reward function, and writes `eval.json`, `eval.md`, `scores.parquet`, `prompts.jsonl`,
        the pictures of the largest, the typical and the smallest changes (`images/`), and `samples/before_after.jpg`.

        Args:
            test_dataset: Prompts that training never saw, in any form [`load_prompts`] takes.
            images_per_prompt (`int`, *optional*, defaults to 1): Images, with latents of their own, per prompt.
            judge (`str`, *optional*): CLIP checkpoint for retrieval, hard negatives and Frechet distance.
            seed (`int`, *optional*): Seed of the latents; by default not that of training or its evaluations.
            num_pictures (`int`, *optional*, defaults to 6): Prompts in the before/after picture.

        Returns:
            [`~es_trl.evaluation.Evaluation`]
        """
        started = time.perf_counter()
        dataset = load_prompts(test_dataset)
        prompts = dataset["prompt"]
        with self.peers.together("the comparison with the base"):
            result = evaluate(
                self.adapter,
                prompts,
                self.eval_rewards,
                rows=self.evaluation_rows(),
                images_per_prompt=images_per_prompt,
                seed=self.args.eval_seed + 1 if seed is None else seed,
                batch_size=self.args.per_device_eval_batch_size,
                columns={name: dataset[name] for name in dataset.column_names if name != "prompt"},
                judge=load_judge(judge, prompts, device=self.args.device) if judge else None,
                trained_rewards=self.trained_rewards,
                n_keep=num_pictures,
                trainer_state=self.state,
                **self.evaluation_share(),
            )
        digest = self.adapter.lora_digest()
        result.details |= {"model": self.base_model, "dtype": self.args.dtype, "judged": {"adapter": digest}}
        result.details["seconds"] = round(time.perf_counter() - started, 1)
        self.evaluation = result.to_dict()
        if self.is_world_process_zero():
            pairs, batch_size = choose_pairs(result, NUM_PAIRS), self.args.per_device_eval_batch_size
            result.pictures = save_pairs(self.adapter, result, pairs, self.args.output_dir, batch_size)
            result.strengths = save_strengths(self.adapter, result, pairs, self.args.output_dir, batch_size)
            self.evaluation |= {"pictures": result.pictures, "strengths": result.strengths}
            write_files(result, self.args.output_dir, self.evaluation)
            self._save_pictures(result, num_pictures, stamp(digest))
            self._report(result, time.perf_counter() - started)
        return result

    def _save_pictures(self, result: Evaluation, count: int, comment: bytes) -> None:
        """The before/after sheet, chosen by rule, and the adapter's own pictures for the card's gallery."""
        folder = os.path.join(self.args.output_dir, "samples")
        os.makedirs(folder, exist_ok=True)
        rows, shown = result.rows[:3], first_look(result.pictures, count)
        if shown:  # nothing where no reward gave a score
            files = [[os.path.join(self.args.output_dir, pair["files"][row.name]) for row in rows] for pair in shown]
            captions = [f"{pair['prompt']} ({number(pair['change'], sign=True)})" for pair in shown]
            steps = [(row, row.num_inference_steps) for row in rows]
            labels = [f"{'adapter' if row.adapter else 'base'}, {n} step{'s' if n > 1 else ''}" for row, n in steps]
            note = (
                f"The largest, middle and smallest changes of {shown[0]['reward']} over {len(result.prompts)} prompts."
            )
            images = [[Image.open(path) for path in paths] for paths in files]
            sheet = contact_sheet(images, captions, labels, None, note, bold="columns")
            sheet.save(os.path.join(folder, "before_after.jpg"), quality=92, subsampling=0, comment=comment)
        self.gallery = []
        for i, (prompt, (image, *_)) in enumerate(zip(result.prompts, result.images[rows[1].name], strict=False)):
            scale = max(1, 256 // max(image.size))
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
            name = os.path.join(folder, f"adapter-{i:03d}.jpg")
            rgb(image).save(name, quality=92, comment=comment)
            self.gallery.append((prompt, f"samples/adapter-{i:03d}.jpg"))

    def _report(self, result: Evaluation, seconds: float) -> None:
        """One line per reward on the log, since this is what the run was for."""
        for entry in self.evaluation["paired"]:
            if entry["against"] == result.rows[0].name and entry["row"] == result.rows[1].name:
                closure = self.evaluation["gap_closure"].get(entry["reward"])
                text = f"{entry['reward']}: {entry['row']} {number(entry['delta'], sign=True)}"
                text += interval(entry["ci_low"], entry["ci_high"]) or ", on too few prompts for an interval,"
                text += f" against {entry['against']}"
                logger.info("%s%s", text, "" if closure is None else f", gap closure {closure:.2f}")
        logger.info("evaluated %d prompts in %.0f s", len(result.prompts), seconds)

    def create_model_card(
        self,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset_name: str | None = None,
        output_dir: str | None = None,
    ) -> None:
        """
        Writes the model card `README.md` (library diffusers, not transformers).

        Args:
            license (`str`, *optional*): By default that of the base model's card.
            tags (`str` or `list[str]`, *optional*): Beside those every card has.
            finetuned_from, dataset_name (`str`, *optional*): By default what the trainer was given.
            output_dir (`str`, *optional*): The run folder by default.
        """
        if not self.is_world_process_zero():
            return
        output_dir = output_dir or self.args.output_dir
        picture = "samples/before_after.jpg"
        found = self.evaluation or os.path.exists(os.path.join(output_dir, picture))
        digest = self.adapter.lora_digest() if found else None
        mine = judged(self.evaluation, digest)  # training may have gone on since
        card = model_card(
            adapter_info=self.adapter.describe(),
            config=self.run_config(),
            evaluation=self.evaluation if mine else None,
            env=self.environment,
            samples=self.gallery if mine else (),
            picture=picture if drawn_with(os.path.join(output_dir, picture), digest) else None,
            sheets=sample_sheets(output_dir),
            repo_id=self.hub_model_id or (self.args.hub_model_id if self.args.push_to_hub else None),
            revision=self.args.hub_revision,
            base_model=finetuned_from or self.base_model,
            dataset_name=dataset_name or self.dataset_name,
            duration_seconds=self.training_seconds,
            num_images=self.images_drawn,
            license=license,
            tags=[*([tags] if isinstance(tags, str) else tags or ()), *getattr(self.model, "model_tags", ())],
            tracker_urls=tracker_urls(self),
        )
        card.save(os.path.join(output_dir, "README.md"))


def sample_sheets(folder: str) -> list[tuple[str, str]]:
    """The first and the last sheet of the sample prompts below `folder`, with captions."""
    names = [path.name for path in Path(folder, "samples").glob("step-*.jpg") if not path.is_symlink()]
    steps = sorted((int(name[5:-4]), f"samples/{name}") for name in names if name[5:-4].isdigit())
    ends = [*steps[:1], *steps[1:][-1:]]
    return [("Before training" if step == 0 else f"At step {step}", path) for step, path in ends]
