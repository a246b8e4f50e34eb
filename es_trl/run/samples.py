"""The sample pictures of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

from ..es import make_generator
from ..evaluation.grids import contact_sheet, member_strip, tiles
from ..files import read_lines, write_lines
from ..pictures import save_jpeg
from ..samples import still_of
from .trackers import has_tracker, log_media


MAX_MEMBER_COLUMNS = 6  # pictures of one member in the strip


class SampleCallback(TrainerCallback):
    """
    Draws the sample prompts with fixed latents before the first step, every `sample_steps`, and at the end, into
    `samples/step-000120.jpg`; `samples/metadata.jsonl` holds the prompts. File names never contain a prompt. Methods
    with a population also leave its best, median and worst member there, `samples/members-000120.jpg`.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        args = trainer.args
        source = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        first = {prompt: i for i, prompt in reversed(list(enumerate(source["prompt"])))}
        places = sorted(first.values())[: args.num_sample_prompts]
        self.prompts: list[str] = [source["prompt"][i] for i in places]
        self.columns = {n: [source[n][i] for i in places] for n in source.column_names if n != "prompt"}
        self.drawn_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if args.sample_steps and state.global_step == 0:
            with self._together():
                self.draw()

    def on_step_end(self, args, state, control, **kwargs):
        if args.sample_steps and state.global_step % args.sample_steps == 0:
            with self._together():
                self.draw()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step + 1
        if args.sample_steps and step % args.sample_steps == 0:
            with self._together():
                self.draw_members(step)

    def on_train_end(self, args, state, control, **kwargs):
        if args.sample_steps and self.drawn_at != state.global_step:
            best = state.best_global_step if args.load_best_model_at_end else None  # whose adapter is loaded by now
            with self._together():
                self.draw(state.global_step if best is None else best)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """The first process draws; the others hear of it if that fails."""
        what = f"The samples of step {self.trainer.state.global_step}"
        with self.trainer.peers.together(what), self.trainer.folder.may_fail(what):
            yield

    def images(self) -> list:
        """The sample prompts drawn with the current adapter, always from the same latents."""
        generators = [make_generator(self.trainer.args.eval_seed, "samples", i) for i in range(len(self.prompts))]
        batch = self.trainer.args.per_device_eval_batch_size
        self.trainer.prompt_blocks.encode(self.prompts)
        images = []
        for part in (slice(i, i + batch) for i in range(0, len(self.prompts), batch)):
            columns = {name: values[part] for name, values in self.columns.items()}
            images += self.trainer.adapter.generate(self.prompts[part], generators[part], columns=columns)
        return [still_of(image) for image in images]

    def draw(self, adapter_step: int | None = None) -> None:
        """A sheet by the current adapter; at the end of a run that may be the one of an earlier step, and says so."""
        trainer, step = self.trainer, self.trainer.state.global_step
        self.drawn_at = step
        if not trainer.is_world_process_zero():
            return
        earlier = adapter_step not in (None, step)
        title = f"step {step}: the best adapter, of step {adapter_step}" if earlier else f"step {step}"
        sheet = sample_sheet(self.images(), self.prompts, title)
        entry = {"prompts": self.prompts} | ({"adapter_of_step": adapter_step} if earlier else {})
        self._save(sheet, f"step-{step:06d}.jpg", step, entry)
        if trainer.args.log_images and has_tracker(trainer):
            log_media(trainer, {"samples": (sheet, title)})

    def draw_members(self, step: int) -> None:
        """
        Best, median and worst member of one group of the population that step `step` (from 1) comes from: the weights
        that were scored, drawn again on the group's own prompts, ranked by fitness.
        """
        trainer = self.trainer
        last = trainer.last_step
        if last is None or not trainer.is_world_process_zero():
            return
        # Only members of one group drew the same prompts and are compared with each other.
        size, valid = trainer.population.group_size, last.fitness.valid
        first = int(valid.nonzero()[0]) // size * size
        group = [i for i in range(first, first + size) if valid[i]]
        order = sorted(group, key=lambda i: -float(last.fitness.values[i]))
        chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        own = trainer.population.columns(first, len(last.batch))
        columns = own[:MAX_MEMBER_COLUMNS]
        prompts = [last.batch.prompts[j] for j in columns]
        rows = []
        for label, i in chosen.items():
            drawn = trainer.rollout.draw([i], last.batch, last.factors, last.step, last.micro, columns)
            rows.append((label, float(last.fitness.rewards[i].nanmean()), [still_of(sample) for sample in drawn]))
        title = None if len(own) == len(columns) else f"rewards are means over all {len(own)} pictures of a member"
        strip = member_strip(rows, prompts, title)
        name = f"members-{step:06d}"
        members = [{"label": label, "reward": reward} for label, reward, _ in rows]
        entry = {"prompts": prompts, "members": members, "tiles": f"{name}-tiles.jpg"}
        self._save(strip, f"{name}.jpg", step, entry)
        save_jpeg(tiles([images for _, _, images in rows]), self._path(f"{name}-tiles.jpg"))
        if trainer.args.log_images and has_tracker(trainer):
            values = last.fitness.rewards[last.fitness.rewards.isfinite()].tolist()
            picture = {"members": (strip, "best, median and worst member")}
            log_media(trainer, picture, {"reward_histogram": values}, step)

    def _path(self, name: str) -> str:
        return os.path.join(self.trainer.args.output_dir, "samples", name)

    def _save(self, sheet, name: str, step: int, entry: dict) -> None:
        """Writes a sheet and its line of the metadata, in place of what a run that was resumed had drawn later."""
        metadata = self._path("metadata.jsonl")
        save_jpeg(sheet, self._path(name))
        entries = []
        if os.path.exists(metadata):
            entries = [old for old in read_lines(metadata) if old["step"] <= step and old["file_name"] != name]
        entries.append({"file_name": name, "step": step, **entry})
        write_lines(metadata, entries)


def sample_sheet(images: list, prompts: list[str], title: str, columns: int = 4):
    """A sheet of pictures with their prompts, `columns` to a row; a short last row is filled with white."""
    from PIL import Image

    blank = Image.new("RGB", images[0].size, "white")
    padding = -len(images) % columns
    images, prompts = [*images, *[blank] * padding], [*prompts, *[""] * padding]
    sheets = [
        contact_sheet([images[i : i + columns]], None, prompts[i : i + columns], title if i == 0 else None)
        for i in range(0, len(images), columns)
    ]
    page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page
