"""`es-trl dry-run`: does this config work, does it fit, and how long would it take? Before the real run."""

import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers.trainer_callback import PrinterCallback

from ..es import make_generator
from ..formatting import duration
from ..run import peak_memory_gb
from ..samples import still_of
from ..trainer import DiffusionConfig, DiffusionTrainer, ESConfig, trainer_of
from .arguments import RunArguments, parse
from .fitting import answer, row, split_gpu
from .messages import refuse
from .training import prepare, prompts_of


# One pair on one prompt, twice, the first to warm up; nothing is written but below a temporary folder.
SMALL = {
    "max_steps": "2", "prompts_per_step": "1", "images_per_prompt": "1", "logging_strategy": "steps",
    "logging_steps": "1", "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "sample_steps": "0",
    "push_to_hub": "False", "load_best_model_at_end": "False", "disable_tqdm": "True", "log_level": "error",
    "num_sample_prompts": "1", "eval_on_start": "False", "gradient_accumulation_steps": "1",
}  # fmt: skip

HELP = """\
usage: es-trl dry-run --config FILE [--gpu 12GB] [any option of es-trl train]

With --gpu, says in seconds and before anything is downloaded what the config would take of such a card's memory, and
which settings to change if it does not fit. Counted from the model's shapes; docs/scale.md has how near that is.

Without it,
Runs one pair of members on one prompt with the real model and the real rewards, saves the LoRA and loads it again,
draws one full batch, and prints what the whole config would take: memory in GB, seconds per step, images, hours.
Nothing is written to output_dir, no tracker is told, and the Hub is asked for the model, rewards and prompts only.
Exit code: 0 if all of that worked (it fits), 1 if something failed (it does not), 2 if the config cannot work.
"""


@dataclass
class Workload:
    """
    How many images a config draws, by purpose.

    Attributes:
        steps, batches (`int`): Training steps, and the batches of prompts they take.
        training, evaluations, samples, comparison (`int`): Images. Those of the base in twice the steps count twice.
    """

    steps: int
    batches: int
    training: int
    evaluations: int
    samples: int
    comparison: int

    @classmethod
    def of(cls, config: DiffusionConfig, per_batch: int, prompts: int, eval_prompts: int, test_images: int):
        """From the config, the images of a batch of prompts, and the sizes of the three lists of prompts."""
        batches = max(1, prompts // config.prompts_per_step)
        updates = math.ceil(batches / config.gradient_accumulation_steps)
        steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * updates)
        epochs, rest = divmod(steps, updates)  # an epoch's last update takes the batches that are left
        drawn = epochs * batches + min(rest * config.gradient_accumulation_steps, batches)
        sheets = 2 + steps // config.sample_steps if config.sample_steps else 0
        return cls(
            steps, drawn, drawn * per_batch,
            evaluations=_evaluations(config, steps) * eval_prompts * config.eval_images_per_prompt,
            samples=sheets * config.num_sample_prompts,
            comparison=4 * test_images,  # base, adapter, and base in twice the steps
        )  # fmt: skip


def _evaluations(config: DiffusionConfig, steps: int) -> int:
    """How often a run of `steps` evaluates."""
    every = config.eval_steps or config.logging_steps
    every = int(every if every >= 1 else max(1, math.ceil(every * steps)))
    rounds = {
        "no": 0,
        "steps": sum(step >= config.eval_delay for step in range(every, steps + 1, every)),
        "epoch": math.ceil(config.num_train_epochs),
    }
    return rounds.get(config.eval_strategy.value, 0) + bool(config.eval_on_start)


def main(argv: Sequence[str]) -> int:
    """Takes what `es-trl train` takes."""
    argv = list(argv)
    gpu, argv = split_gpu(argv)
    if not argv or "-h" in argv or "--help" in argv:
        (sys.stdout if argv else sys.stderr).write(HELP)
        return 0 if argv else 2
    if gpu is not None:
        return answer(gpu, argv)
    with tempfile.TemporaryDirectory(prefix="es_trl-dry-run-") as folder:
        try:
            arguments, config = parse(args=argv)
            counts = [len(prompts or ()) for prompts in prompts_of(arguments)]
            trainer = _small_trainer(arguments, config, argv, folder)
        except (ValueError, TypeError, OSError, ImportError) as error:
            return refuse("dry-run", error)
        try:
            _run(trainer, arguments, config, counts, folder)
        except Exception as error:
            sys.stderr.write(f"es-trl dry-run: {type(error).__name__}: {error}\n{_advice(error)}")
            return 1
    return 0


def _small_trainer(arguments: RunArguments, config: DiffusionConfig, argv: list[str], folder: str) -> DiffusionTrainer:
    small = SMALL | {"output_dir": folder}
    if isinstance(config, ESConfig):
        small |= {"population_size": "2", "members_per_forward": str(min(2, config.members_per_forward))}
        small |= {"prompts_per_member": "1"}
    words = [word for name, value in small.items() for word in (f"--{name}", value)]
    _, small_config = parse(type(config), [*argv, *words])
    small_config.resume_from_checkpoint = None
    few = replace(arguments, max_train_prompts=config.prompts_per_step, eval_dataset_name=None, test_dataset_name=None)
    trainer = prepare(trainer_of(arguments.method or "es"), few, small_config)
    trainer.pop_callback(PrinterCallback)
    return trainer


def _run(
    trainer: DiffusionTrainer, arguments: RunArguments, config: DiffusionConfig, counts: list[int], folder: str
) -> None:
    adapter, device = trainer.adapter, trainer.args.device
    numbers = sum(parameter.numel() for parameter in adapter.theta.values())
    row("model", f"{trainer.base_model} ({type(adapter.pipe).__name__}), {config.dtype}, on {_device_name(device)}")
    row("adapter", f"{adapter.es_space} of rank {adapter.lora_config.r}, {numbers:,} numbers are trained")
    row("prompts", "{:,} for training, {:,} for evaluations, {:,} for the comparison".format(*counts))

    logging.disable(logging.WARNING)  # of two members nothing is learned, and a run would say so
    try:
        trainer.train()
    finally:
        logging.disable(logging.NOTSET)
    last = [entry for entry in trainer.state.log_history if "step_time" in entry][-1]
    found = [(name, last.get(f"rewards/{name}/mean")) for name in trainer.rewards.names]
    rewards = "".join(f"; {name} {value:.4g}" for name, value in found if value is not None)
    es, small = isinstance(config, ESConfig), trainer.images_per_batch
    row("one pair" if es else "one prompt", f"{small} images of one prompt in {duration(last['step_time'])}{rewards}")
    row("save and load", _round_trip(trainer, folder))

    batch = _images_per_forward(config)
    columns = {name: (trainer.train_dataset[name][:] * batch)[:batch] for name in trainer.train_dataset.column_names}
    prompts = columns.pop("prompt")
    draw, images = _timed(lambda: adapter.generate(prompts, _generators(batch), columns=columns), device)
    score, _ = _timed(lambda: trainer.rewards(prompts, images, columns, where="the dry run"), device)
    row("full batch", f"{batch} images in {duration(draw)}, their rewards in {duration(score)}")
    of = "GPU" if device.type == "cuda" else "process"
    row("memory", f"{peak_memory_gb(device):.2f} GB at the peak, of the {of}")

    prompts_per_batch = config.images_per_prompt * config.prompts_per_step
    per_batch = config.population_size * config.images_per_member if es else small * prompts_per_batch
    per_image = (draw + score) / batch / max(1, trainer.args.world_size)
    seconds = per_image * per_batch if es else last["step_time"] * prompts_per_batch / max(1, trainer.args.world_size)
    work = Workload.of(config, per_batch, counts[0], counts[1], counts[2] * arguments.test_images_per_prompt)
    accumulated = min(config.gradient_accumulation_steps, max(1, counts[0] // config.prompts_per_step))
    row("a step", f"{per_batch * accumulated:,} images, {duration(seconds * accumulated)}")
    total = 0.0
    for name, amount, taken in [
        (f"{work.steps:,} steps", work.training, seconds * work.batches),
        ("evaluations", work.evaluations, per_image * work.evaluations),
        ("samples", work.samples, per_image * work.samples),
        ("comparison", work.comparison, per_image * work.comparison),
    ]:
        if taken:
            total += taken
            row(name, f"{amount:,} images, {duration(taken)}")
    row("in all", f"about {duration(total)}, without loading the model and encoding {sum(counts):,} prompts")


def _images_per_forward(config: DiffusionConfig) -> int:
    """Images that training draws in one batch."""
    if isinstance(config, ESConfig):
        return min(config.members_per_forward, config.population_size) * config.images_per_member
    return getattr(config, "images_per_forward", config.prompts_per_step)


def _round_trip(trainer: DiffusionTrainer, folder: str) -> str:
    """Draws with the trained adapter and with its file; they must be the same picture."""
    adapter = trainer.adapter
    prompt = trainer.train_dataset["prompt"][:1]
    columns = {n: trainer.train_dataset[n][:1] for n in trainer.train_dataset.column_names if n != "prompt"}
    (trained,) = map(still_of, adapter.generate(prompt, _generators(1), columns=columns))
    trainer.save_model(folder)
    pipe = adapter.pipe
    with warnings.catch_warnings():  # peft warns of a second adapter, which is meant
        warnings.simplefilter("ignore", UserWarning)
        pipe.load_lora_weights(folder, adapter_name="from_file", use_safetensors=True)
        try:
            pipe.set_adapters("from_file")
            (loaded,) = map(still_of, adapter.generate(prompt, _generators(1), columns=columns))
        finally:
            pipe.set_adapters("default")
            pipe.delete_adapters("from_file")
    difference = int(np.abs(np.asarray(trained, np.int16) - np.asarray(loaded, np.int16)).max())
    if difference > (2 if trainer.args.dtype == "float32" else 24):
        raise RuntimeError(
            f"the saved LoRA draws another picture (pixels differ by up to {difference} of 255): please report this "
            "with the output of `es-trl env`."
        )
    return f"the saved LoRA draws the same picture (pixels differ by up to {difference} of 255)"


def _generators(number: int) -> list[torch.Generator]:
    return [make_generator(0, "dry_run", i) for i in range(number)]


def _timed(work: Callable, device: torch.device):
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _device_name(device: torch.device) -> str:
    on_cpu = f"{device.type} (threads: {torch.get_num_threads()})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu


def _advice(error: Exception) -> str:
    if not isinstance(error, torch.OutOfMemoryError):
        return ""
    text = "It does not fit. In this order: lower members_per_forward (results stay the same), set dtype: bfloat16, "
    return text + "lower prompts_per_step.\n"
