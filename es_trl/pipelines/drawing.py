"""Calling a pipeline for rows of pictures: what goes in per row, what comes out, and which of it may be scored."""

import inspect
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from ..es import PopulationShapeError
from ..samples import is_black, mark_unscored, pictures_of
from .base_layers import rounding_dtype
from .call_settings import CallSettings
from .prompt_encoding import PromptEncoder
from .replaced import replaced
from .self_check import numbers_of, rms, tolerance
from .watching import CallWatch, device_of, dtype_of


logger = logging.getLogger(__name__)

ODD = ("not_finite", "flagged", "black")  # pictures that are counted
FLAGGED = "the pipeline's safety checker flagged and blackened it; pass safety_checker=None to draw without"
FLAGS = ("nsfw_content_detected", "nsfw_detected")  # where it says which of them a safety checker blackened

Kwargs: TypeAlias = dict[str, Any]


@dataclass
class _Order:
    """Pictures that are wanted, one entry each in `prompts`, `generators` and the columns of the call; and how."""

    prompts: list[str]
    generators: list[torch.Generator]
    columns: dict[str, list[Any]]
    output_type: str
    keep_numbers: bool
    overrides: Kwargs

    @property
    def prompts_differ(self) -> bool:
        return len(set(self.prompts)) > 1

    def rows(self, rows: Sequence[int]) -> "_Order":
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        prompts, generators = [self.prompts[i] for i in rows], [self.generators[i] for i in rows]
        return replace(self, prompts=prompts, generators=generators, columns=columns)


class Drawer:
    """
    Calls a pipeline with one row per picture; where its batches do not work, with one call per picture.

    Attributes:
        one_by_one (`str`): Why every picture has a call of its own; empty where pictures share calls.
        by_prompt (`str`): Why a call has pictures of one prompt only; empty where prompts share calls.
        members (`int`): Members of a population that share a call now.
        pictures (`Counter`): Pictures drawn so far: "drawn", "not_finite", "flagged" and "black".
    """

    def __init__(self, pipe: Any, denoiser: torch.nn.Module, settings: CallSettings, prompts: PromptEncoder) -> None:
        self.pipe, self.denoiser, self.settings, self.prompts = pipe, denoiser, settings, prompts
        self.name = getattr(pipe, "class_name", type(pipe).__name__)
        self.one_by_one, self.by_prompt, self.members = "", "", 1
        self.pictures: Counter[str] = Counter()
        self.last_watch = CallWatch(pipe, denoiser, 1, False)  # of the last call
        self._batches_work, self._takes_text = False, False
        self._said: set[tuple[str, str]] = set()
        self._last_cause = ""
        self._reported: Counter[str] = Counter()

    def draw(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        columns: Mapping[str, Sequence[Any]] | None = None,
        output_type: str = "pil",
        keep_numbers: bool = False,
        **overrides: Any,
    ) -> list[Any] | torch.Tensor | np.ndarray:
        """
        One picture, video or sound per prompt: a list, or an array where `output_type` gives one. The arguments are
        those of [`FrozenPipeline.generate`].
        """
        columns = self.settings.row_columns(self.pipe, columns or {})
        return self._draw(_Order(list(prompts), list(generators), columns, output_type, keep_numbers, overrides))

    def _draw(self, order: _Order) -> Any:
        if self.by_prompt and order.prompts_differ:
            return self._prompt_by_prompt(order)
        if not self.one_by_one and (len(order.prompts) > 1 or self.members > 1):
            states = [generator.get_state() for generator in order.generators]
            drawn = self._together(order, states)
            if not self.one_by_one and not (self.by_prompt and order.prompts_differ):
                return drawn
            what = "Every picture has a call of its own" if self.one_by_one else "Every prompt has calls of its own"
            logger.warning("%s from here on (slower): %s", what, self.one_by_one or self.by_prompt)
            for generator, state in zip(order.generators, states, strict=True):
                generator.set_state(state)
            return self._draw(order)
        if self.members > 1:
            raise PopulationShapeError(self.one_by_one)
        singles: list[Any] = []
        numbers: list[torch.Tensor] = []
        for i in range(len(order.prompts)):
            singles.append(self._single(order.rows([i])))
            numbers += self.last_watch.numbers
        self.last_watch.numbers = numbers
        if all(isinstance(single, torch.Tensor) for single in singles):
            return torch.cat(singles)
        if all(isinstance(single, np.ndarray) for single in singles):
            return np.concatenate(singles)
        return [single[0] if len(single) == 1 else single for single in singles]

    def _prompt_by_prompt(self, order: _Order) -> Any:
        if self.members > 1:
            raise PopulationShapeError(self.by_prompt)
        found: dict[int, Any] = {}
        numbers: dict[int, torch.Tensor] = {}
        for prompt in dict.fromkeys(order.prompts):
            own = [i for i, other in enumerate(order.prompts) if other == prompt]
            found |= zip(own, self._draw(order.rows(own)), strict=True)
            kept = self.last_watch.numbers
            numbers |= zip(own, kept, strict=True) if len(kept) == len(own) else ()
        self.last_watch.numbers = [numbers[i] for i in sorted(numbers)] if len(numbers) == len(found) else []
        pictures = [found[i] for i in sorted(found)]
        return torch.stack(pictures) if all(isinstance(picture, torch.Tensor) for picture in pictures) else pictures

    def _together(self, order: _Order, states: list[torch.Tensor]) -> Any:
        """
        All pictures in one call; sets `one_by_one` or `by_prompt` where that cannot be. The first time, the last
        picture and that of the shortest prompt, which others may lengthen, are drawn alone beforehand, which also
        shows what is wrong with the call itself.
        """
        prompts, last = order.prompts, len(order.prompts) - 1
        new = self.members == 1 and last > 0 and not self._batches_work
        checked = {last, min(range(len(prompts)), key=lambda i: len(prompts[i]))} if new else ()
        alone = {i: self._alone(order, states, i) for i in sorted(checked)}
        try:
            kwargs = self._batch(order)
            drawn = self.call(kwargs, order.generators, prompts, order.output_type, order.keep_numbers or new)
            if not isinstance(drawn, torch.Tensor | np.ndarray) and len(drawn) != len(prompts):
                raise ValueError(f"one call gave {len(drawn)} pictures for {len(prompts)} prompts")
        except (PopulationShapeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if len(prompts) == 1:
                raise
            self.one_by_one = f"{self.name} does not take {len(prompts)} prompts at once ({error})."
            return None
        # Later on other threads, of rewards that wait for servers, may use torch's generator while members are drawn.
        if self.last_watch.used_global_noise and (self.members == 1 or not self._batches_work):
            self.one_by_one = (
                f"{self._with_scheduler()} takes noise "
                "from torch's global generator, so that pictures of one call would not be repeatable."
            )
        elif self.prompts.mixed:
            self.by_prompt = (
                f"{self.name} encodes prompts of different lengths otherwise together than alone, so "
                "that a picture would depend on what it is drawn with."
            )
        elif new:
            self._compare(numbers_of(drawn, self.last_watch.numbers, len(prompts)), alone, order.prompts_differ)
            if self.one_by_one:
                self._refuse_unrepeatable(alone[last], self._alone(order, states, last))
        return drawn

    def _refuse_unrepeatable(self, first: torch.Tensor, again: torch.Tensor) -> None:
        """Noise of numpy, of Python or of a clock: neither common to members nor to be had again."""
        limit = tolerance(first, rms(first - first.mean()), rounding_dtype(self.denoiser))
        if first.shape == again.shape and not rms(first - again) > limit:  # what is not a number is counted elsewhere
            return
        raise ValueError(
            f"{self._with_scheduler()} draws another "
            "picture every time from the same prompt and generator: members could not be compared, nor anything be "
            "repeated. Let it take its noise from `generator`, or from torch's own."
        )

    def _alone(self, order: _Order, states: list[torch.Tensor], i: int) -> torch.Tensor:
        counted, generator = self.pictures.copy(), torch.Generator()
        generator.set_state(states[i])
        single = self._single(replace(order.rows([i]), generators=[generator], keep_numbers=True))
        self.pictures = counted
        return numbers_of(single, self.last_watch.numbers, 1)[0]

    def _compare(self, together: torch.Tensor, alone: dict[int, torch.Tensor], prompts_differ: bool) -> None:
        last = alone[len(together) - 1]
        if last.shape != together[-1].shape:
            worst, self._batches_work = math.inf, True
        else:
            # Of equal prompts with one generator for all, only the one alone is what it should be.
            spread = max(rms(together[-1] - together[0]), rms(last - together[0]))
            self._batches_work = spread > 0  # equal pictures say nothing: the next batch may
            limit = tolerance(together, spread, rounding_dtype(self.denoiser))
            off = {i: rms(together[i] - picture) for i, picture in alone.items()}
            off_last, off_most = off[len(together) - 1], max(off.values())
            # The last picture may be right only because its prompt is the longest.
            if off_last <= limit < off_most and prompts_differ:
                self.by_prompt = (
                    f"a picture of {self.name} depends on how long the prompts are that it is drawn "
                    f"with (by {off_most / spread:.2g} of the difference between two pictures)."
                )
            worst = off_last / spread if off_last > limit else 0.0
        if worst:
            self.one_by_one = (
                f"a picture of {self.name} depends on what it is drawn with (by {worst:.2g} of the "
                "difference between two pictures), as where one generator serves a whole batch."
            )

    def _single(self, order: _Order) -> Any:
        """One picture in a call of its own: a batch of one, or where that is refused, a text and its generator."""
        (generator,) = order.generators
        state = generator.get_state()
        if not self._takes_text:
            kwargs = self._batch(order)
            try:
                return self._seeded(order, kwargs, [generator])
            except (PopulationShapeError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if self._batches_work:
                    raise
                first = error
        generator.set_state(state)
        kwargs = self.settings.call_kwargs(self.pipe, **order.overrides)
        kwargs |= {name: values[0] for name, values in order.columns.items()} | self.prompts.rows(order.prompts[0])
        try:
            drawn = self._seeded(order, kwargs, generator)
        except Exception:
            if self._takes_text:
                raise
            raise first from None
        self._takes_text = True
        return drawn

    def _batch(self, order: _Order) -> Kwargs:
        kwargs = self.settings.call_kwargs(self.pipe, **order.overrides, rows=len(order.prompts))
        return kwargs | order.columns | self.prompts.rows(order.prompts)

    def _seeded(self, order: _Order, kwargs: Kwargs, generators: list[torch.Generator] | torch.Generator) -> Any:
        """Noise that the pipeline takes from torch's global generator comes from the picture's own all the same."""
        copy = torch.Generator()
        copy.set_state(order.generators[0].get_state())
        device = device_of(self.denoiser)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(torch.randint(2**31, (), generator=copy).item())
            return self.call(kwargs, generators, order.prompts, order.output_type, order.keep_numbers)

    def call(
        self,
        kwargs: dict[str, Any],
        generators: torch.Generator | Sequence[torch.Generator],
        prompts: Sequence[str],
        output_type: str = "pil",
        keep_numbers: bool = False,
        with_graph: bool = False,
    ) -> Any:
        """One call of the pipeline with all of its keywords but the generators, looked at: its pictures."""
        parameters = self.settings.parameters(self.pipe)
        if "output_type" in parameters:
            sees = any(hasattr(self.pipe, name) for name in ("image_processor", "video_processor"))
            default = parameters["output_type"].default
            kwargs["output_type"] = output_type if output_type != "pil" or sees else default
        watch = self.last_watch = CallWatch(self.pipe, self.denoiser, len(prompts), keep_numbers)
        generators = generators if isinstance(generators, torch.Generator) else list(generators)
        # diffusers decorates `__call__` with no_grad; beneath it is the same code.
        function = inspect.unwrap(type(self.pipe).__call__) if with_graph else type(self.pipe).__call__
        with watch.watching(), self._step_noise(generators), self.prompts.serving():
            output = function(self.pipe, **kwargs, generator=generators)
        drawn = pictures_of(output)
        if isinstance(drawn, torch.Tensor | np.ndarray) and output_type == "pil":
            drawn = list(drawn)
        if isinstance(drawn, list):
            self._judge(drawn, prompts, watch, flags_of(output))
        return drawn

    def _with_scheduler(self) -> str:
        scheduler = getattr(self.pipe, "scheduler", None)
        return self.name if scheduler is None else f"{self.name} with {type(scheduler).__name__}"

    def _step_noise(self, generators: torch.Generator | list[torch.Generator]) -> AbstractContextManager[None]:
        """Inside, noise that the scheduler draws at a step comes from the pictures' generators, not torch's own."""
        scheduler: Any = getattr(self.pipe, "scheduler", None)
        step = getattr(scheduler, "step", None)
        own = getattr(step, "draws_its_own_noise", False)
        if step is None or own or "generator" not in inspect.signature(step).parameters:
            return nullcontext()

        def step_with_noise(
            model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            if len(sample) == (len(generators) if isinstance(generators, list) else 1) and not args:
                kwargs.setdefault("generator", generators)
            return step(model_output, timestep, sample, *args, **kwargs)

        return replaced(scheduler, step=step_with_noise)

    # ---- what may be scored ----

    def _judge(self, drawn: list[Any], prompts: Sequence[str], watch: CallWatch, flagged: list[bool]) -> None:
        """Marks what is no picture of the model's, and counts it."""
        self.pictures["drawn"] += len(prompts)
        bad, whole = watch.not_finite(), len(drawn) != len(prompts)
        for i, prompt in enumerate(prompts):
            sample = drawn if whole else drawn[i]
            if i in bad:
                sample = mark_unscored(sample, self._note("not_finite", prompt, self._cause(bad[i])))
            elif i < len(flagged) and flagged[i]:
                sample = mark_unscored(sample, self._note("flagged", prompt, FLAGGED))
            elif is_black(sample):
                self._note("black", prompt, "it is black all over, and scored as it is")
            if not whole:
                drawn[i] = sample

    def new_pictures(self) -> list[int]:
        """How many pictures since the last call were not made of numbers, flagged, and black."""
        new = [self.pictures[kind] - self._reported[kind] for kind in ODD]
        self._reported = self.pictures.copy()
        return new

    def complaint(self) -> str:
        """One sentence on pictures without a score; empty if there were none."""
        missing = self.pictures["not_finite"] + self.pictures["flagged"]
        if not missing:
            return ""
        drawn, last = self.pictures["drawn"], self._last_cause
        return f"{missing} of {drawn} pictures so far have no score, the last because {last}"

    def _note(self, kind: str, prompt: str, cause: str) -> str:
        self.pictures[kind] += 1
        self._last_cause = cause if kind != "black" else self._last_cause
        if (kind, cause) not in self._said:
            self._said.add((kind, cause))
            logger.warning("The picture of prompt %r: %s. Said once, counted in every step.", prompt[:80], cause)
        return cause

    def _cause(self, part: str) -> str:
        dtype = dtype_of(self.denoiser)
        name = str(dtype).removeprefix("torch.")
        adapters = [p for n, p in self.denoiser.named_parameters() if "lora_" in n]
        if any(not torch.isfinite(p).all() for p in adapters):
            where, hint = "the adapter's weights", "the adapter is damaged, or training diverged"
        else:
            where = f"the {part}" if part == "decoder" else f"the {type(self.denoiser).__name__}"
            hint = "look for weights or prompt embeddings that are not finite, or lower sigma and learning_rate"
            if dtype == torch.float16:
                hint = "float16 overflows in some models: use bfloat16 or float32"
        return f"it is not made of numbers, first in {where} ({name}), and has no score: {hint}"


def flags_of(output: Any) -> list[bool]:
    """Which pictures a safety checker flagged, whether it says so in a list, an array or a tensor."""
    found = next((value for name in FLAGS if (value := getattr(output, name, None)) is not None), ())
    return [bool(flag) for flag in (found.tolist() if hasattr(found, "tolist") else found)]
