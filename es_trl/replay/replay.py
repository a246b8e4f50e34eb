"""Replaying a run from its journal: the same optimizer, schedule and estimates, and no picture drawn."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..pipelines import LORA_WEIGHTS_NAME, tensor_digest
from ..rewards import RewardSet
from ..run.checkpoint import CheckpointCorrupt, load_adapter_state
from ..run.journal import decode_scores
from ..trainer.es import ESTrainer
from ..trainer.es_config import ESConfig
from ..trainer.rollout import PopulationRollout, PromptBatch, RolloutTimes
from ..trainer.watch import Scored
from .sessions import ReplayError, Session, read_journal


Found = tuple[dict[str, bool], dict[int, str]]  # which saved adapters matched, and digests by step
Model = str | Callable[[], Any] | None  # a name, or what makes the pipeline; None is what was recorded


class EndOfReplay(Exception):
    """Ends a replayed training where its journal, or what was asked for, ends."""


@dataclass
class Verification:
    """
    Steps replayed, sha256 of the replayed LoRA (see [`tensor_digest`]), and for each saved adapter of the run whether
    the replay arrived at the same bits.
    """

    steps: int
    digest: str
    matches: dict[str, bool]

    @property
    def proven(self) -> bool:
        return bool(self.matches) and all(self.matches.values())


def verify_run(run: str | os.PathLike[str], model: Model = None) -> Verification:
    """
    Replays all steps of a run from its journal and compares the adapter with every saved one, bit by bit.

    Args:
        run (`str`): The `output_dir` of an ES run.
        model (`str` or `Callable`, *optional*): The base model, or a function that makes its pipeline, if the recorded
            name does not load.

    Raises:
        `ReplayError`: if the journal cannot be replayed, or at the first step whose adapter is not the recorded one.
    """
    trainer = _replay(run, None, model)
    digest = tensor_digest(trainer.adapter.lora_state_dict())
    trainer.digests[trainer.state.global_step] = digest
    saved = _lora_digest(Path(run), trainer.adapter.denoiser_name)
    if saved is not None:
        trainer.matches[LORA_WEIGHTS_NAME] = saved in trainer.digests.values()
    return Verification(trainer.state.global_step, digest, trainer.matches)


def redraw_member(
    run: str | os.PathLike[str], step: int, member: int, micro: int = 0, model: Model = None
) -> tuple[list[Image.Image], list[str], torch.Tensor]:
    """
    Draws again what one member of a population drew, bit by bit: in the batch that it was drawn in.

    Args:
        run (`str`), model (`str` or `Callable`, *optional*): As in [`verify_run`].
        step, member, micro (`int`): Which, from 0; `micro` is the prompt batch, under gradient accumulation.

    Returns:
        The member's images, their prompts, and the recorded scores `(images, K)`.

    Raises:
        `ReplayError`: if the journal does not reach the step, or there is no such member.
    """
    trainer = _replay(run, step, model)
    line = trainer.rollout.line(step, micro)
    if not 0 <= member < trainer.population.size:
        raise ReplayError(f"member {member} does not exist: step {step} had 0 to {trainer.population.size - 1}.")
    batch = PromptBatch(line["prompts"], {}, trainer.args.images_per_prompt)
    chunk = next(c for c in trainer.population.chunks(trainer.args.members_per_forward) if member in c)
    factors = trainer.noise.of_step(step, trainer.population.num_directions, micro)
    images = trainer.rollout.draw(chunk, batch, factors, step, micro)
    columns = trainer.population.columns(member, len(batch))
    first = chunk.index(member) * len(columns)
    prompts = [batch.prompts[j] for j in columns]
    return images[first : first + len(columns)], prompts, decode_scores(line["shape"], line["scores"])[member]


def _replay(run: str | os.PathLike[str], step: int | None, model: Model) -> "ReplayTrainer":
    """The trainer as it stood before `step`, or at the journal's end."""
    sessions, folder = read_journal(run), None
    found: Found = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, session in enumerate(sessions):
            following = sessions[number + 1].start if number + 1 < len(sessions) else None
            end = step if step is not None and (following is None or step < following) else following
            trainer = ReplayTrainer(session, end, os.path.join(scratch, str(number)), model, Path(run), found)
            try:
                trainer.train(resume_from_checkpoint=folder)
            except EndOfReplay:
                pass
            if following is None or end != following:
                break
            folder = trainer.save_scratch()
    if step is not None and trainer.state.global_step != step:
        raise ReplayError(f"the journal of {os.fspath(run)!r} ends with step {trainer.state.global_step - 1}.")
    return trainer


class RecordedRollout(PopulationRollout):
    """A rollout whose scores are those of the journal; it can still draw."""

    def __init__(self, session: Session, end: int | None, trainer: ESTrainer):
        size, seed = trainer.args.members_per_forward, trainer.args.seed
        super().__init__(trainer.adapter, trainer.scored.rewards, trainer.population, trainer.sigma, size, seed)
        self.session, self.end, self.trainer = session, end, trainer

    def line(self, step: int, micro: int) -> dict[str, Any]:
        line = self.session.lines.get(step, {}).get(micro)
        if line is None:
            raise ReplayError(f"the journal has no line of step {step}, prompt batch {micro}.")
        return line

    def scores(
        self, batch: PromptBatch, factors: Any, step: int, micro: int = 0, **_: Any
    ) -> tuple[torch.Tensor, RolloutTimes]:
        if step == self.end or (micro == 0 and not any(later >= step for later in self.session.lines)):
            raise EndOfReplay
        line = self.line(step, micro)
        theta = tensor_digest(self.adapter.theta)
        if line.get("theta") != theta:
            raise ReplayError(
                f"the adapter before step {step} is {theta[:12]}... here and {str(line.get('theta'))[:12]}... in the "
                "journal: a line was changed, or this machine rounds differently from the one that trained."
            )
        expected = [self.population.size, len(batch) // self.population.groups, len(self.rewards)]
        try:
            scores = decode_scores(line["shape"], line["scores"])
        except (KeyError, ValueError) as error:
            raise ReplayError(f"the journal's line of step {step} holds no scores: {error}.") from error
        if list(scores.shape) != expected:
            raise ReplayError(f"the scores of step {step} have shape {list(scores.shape)}, not {expected}.")
        return scores, RolloutTimes()


class ReplayTrainer(ESTrainer):
    """An [`ESTrainer`] that takes its scores from a journal and writes nothing."""

    keeps_journal = False
    rollout: RecordedRollout

    def __init__(self, session: Session, end: int | None, scratch: str, model: Model, run: Path, found: Found):
        record = session.run
        if record.get("own_optimizer"):
            raise ReplayError("the run was given an optimizer object of its own, which a journal does not hold.")
        try:
            model = record["base_model"] if model is None else model() if callable(model) else model
            names, weights, lora = record["reward_funcs"], record["reward_weights"], _lora_config(record["lora"])
            self.recorded = record["scored"]
            config = _config(record["config"], scratch, keep_init=isinstance(model, str))
            config.sigma = record["sigma"]
            prompts = [f"prompt {i}" for i in range(record["train_prompts"])]
        except (KeyError, TypeError, ValueError) as error:
            raise ReplayError(
                f"the journal's settings do not make a config: {type(error).__name__}: {error}"
            ) from error
        config.reward_weights = weights
        super().__init__(model, [_stand_in(n) for n in names], args=config, train_dataset=prompts, peft_config=lora)
        if session.start == 0 and tensor_digest(self.adapter.state_dict()) != record.get("adapter"):
            raise ReplayError(
                "the adapter that the run began with is not the one that its settings give here: another base model, "
                "or a machine that rounds differently."
            )
        self.rollout = RecordedRollout(session, end, self)
        self.matches, self.digests = found
        self.remove_callback(PrinterCallback)
        self.add_callback(CompareCallback(self, run))

    def _scored(self) -> Scored:
        """As the run's, with functions that score nothing."""
        names = self.recorded["names"]
        weights = [*self.rewards.weights, *[0.0] * (len(names) - len(self.rewards))]
        rewards = RewardSet([_stand_in(name) for name in names], weights)
        return Scored(rewards, len(self.rewards), dict(self.recorded["margins"]), self.recorded["guards"])

    def prepare_prompts(self, prompts: Sequence[str], columns: Any = None) -> None:
        """Nothing is drawn, so nothing needs encoding."""

    def save_scratch(self) -> str:
        """A checkpoint for the session that follows."""
        self.checkpoints.write()
        return self.checkpoints.folder


class CompareCallback(TrainerCallback):
    """Compares the replayed adapter with the run's checkpoint of the same step."""

    def __init__(self, trainer: ReplayTrainer, run: Path):
        self.trainer, self.run = trainer, run

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        folder = self.run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not folder.is_dir():
            return
        adapter = self.trainer.adapter
        digest = tensor_digest(adapter.lora_state_dict())
        self.trainer.digests[state.global_step] = digest
        try:
            same = tensor_digest(load_adapter_state(folder)) == tensor_digest(adapter.state_dict())
        except (OSError, CheckpointCorrupt):
            same = False
        self.trainer.matches[folder.name] = same and _lora_digest(folder, adapter.denoiser_name) == digest


def _lora_digest(folder: Path, denoiser_name: str) -> str | None:
    try:
        tensors = load_file(folder / LORA_WEIGHTS_NAME)
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        raise ReplayError(f"{folder / LORA_WEIGHTS_NAME} is not a safetensors file: {error}.") from error
    return tensor_digest({name.removeprefix(f"{denoiser_name}."): value for name, value in tensors.items()})


def _config(recorded: dict[str, Any], scratch: str, keep_init: bool) -> ESConfig:
    quiet: dict[str, Any] = {"output_dir": scratch, "sample_steps": 0, "report_to": "none", "disable_tqdm": True,
                             "logging_strategy": "no", "save_strategy": "no"}  # fmt: skip
    default = ESConfig(**quiet)
    changes = ESConfig.changes()
    known = {f.name for f in dataclasses.fields(ESConfig) if f.init and changes[f.name] == "numbers"}
    known -= {"compile_denoiser"}  # nothing is drawn
    known -= set() if keep_init else {"model_init_kwargs"}
    changed = {k: v for k, v in recorded.items() if k in known and v != default.to_dict().get(k)}
    return ESConfig(**quiet, **changed)


def _lora_config(recorded: dict[str, Any]) -> LoraConfig:
    known = {f.name for f in dataclasses.fields(LoraConfig) if f.init}
    return LoraConfig(**{k: v for k, v in recorded.items() if k in known and v is not None})


def _stand_in(name: str) -> Callable[..., list[float]]:
    def reward(images: list[Any], **_: Any) -> list[float]:
        raise ReplayError("a replay scores nothing.")

    reward.__name__ = name
    return reward
