"""`es-trl eval`: base and adapters on the same prompts and noise, with intervals, into one folder."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from .arguments import split_names, value_of
from .keys import check_keys, check_options, read_config


if TYPE_CHECKING:
    from ..evaluation import Evaluation


@dataclass
class EvalArguments:
    """What is evaluated, on what, and where the tables go; docs/evaluation.md has more of each."""

    prompts: str = field(metadata={"help": "A file, a shipped list, showcase, or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder of the tables; an earlier evaluation there steps aside."})
    rewards: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards, separated by commas or spaces."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    model: str | None = field(default=None, metadata={"help": "Base model; by default that of the adapters."})
    adapter: list[str] = field(
        default_factory=list, metadata={"help": "Run folders, LoRA folders or Hub ids; name=source names a method."}
    )
    trained_rewards: list[str] = field(
        default_factory=list, metadata={"help": "Optimised rewards; by default what the run folders say."}
    )
    judge: str | None = field(default=None, metadata={"help": "CLIP checkpoint that judges, never optimised."})
    images_per_prompt: int = field(default=1, metadata={"help": "Images per prompt and seed."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the noise."})
    num_inference_steps: int | None = field(default=None, metadata={"help": "Steps the adapters were trained for."})
    steps: list[int] = field(
        default_factory=list, metadata={"help": "Steps of the table; by default trained for, and twice as many."}
    )
    best_of: list[int] = field(default_factory=list, metadata={"help": "Best of N of the base, by trained reward."})
    adapter_scales: list[float] = field(
        default_factory=list, metadata={"help": "LoRA scales of the first adapter; 0 is the base."}
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "Guidance of the pipeline call."})
    height: int | None = field(default=None, metadata={"help": "Image height in pixels."})
    width: int | None = field(default=None, metadata={"help": "Image width in pixels."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Text tokens per prompt."})
    dtype: str | None = field(
        default=None, metadata={"help": "float32, bfloat16, float16; float64: exactly alike for any batch_size."}
    )
    batch_size: int = field(default=16, metadata={"help": "Images drawn and scored at once."})
    max_prompts: int | None = field(default=None, metadata={"help": "Only the first so many prompts."})
    resume: bool = field(default=False, metadata={"help": "Take the finished rows of this very command."})
    allow_partial: bool = field(default=False, metadata={"help": "Go on with a part of an adapter."})
    save_images: int = field(default=24, metadata={"help": "Prompts whose images are kept."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})


def main(argv: Sequence[str]) -> int:
    """Evaluates from `--config` and the command line; arguments that cannot work are one line and exit code 2."""
    try:
        arguments = _parse(argv)
        run(arguments, shlex.join(["es-trl", "eval", *argv]))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"es-trl eval: {' '.join(str(error).split())}\n")
        # An error of the operating system has a number (a full disk); a missing data set or checkpoint has none.
        return 1 if isinstance(error, OSError) and error.errno is not None else 2
    if _process_index() == 0:
        from ..report import evaluation_text, read_folder, write_report

        page = write_report(arguments.output_dir)
        sys.stdout.write(f"{evaluation_text(read_folder(arguments.output_dir))}\n")
        for path in (os.path.join(arguments.output_dir, "eval.md"), *([page] if page else [])):
            sys.stdout.write(f"{path}\n")
    return 0


def _process_index() -> int:
    return int(os.environ.get("RANK", "0"))


def _parse(argv: Sequence[str]) -> EvalArguments:
    """Raises `ValueError` where argparse would print its usage and leave."""
    known = [setting.name for setting in fields(EvalArguments)]
    check_options(argv, [*known, "help"])
    options = ["--" + word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    for option in dict.fromkeys(options):
        count = options.count(option)
        if count > 1:  # only the last one would count
            raise ValueError(f"{option} is given {count} times: give it once, with all its values after it.")
    path = value_of("--config", argv)
    if path is not None:
        check_keys(path, read_config(path), known)
    from .options import LineParser  # only now: what is wrong by then is said without it

    parser = LineParser([EvalArguments], prog="es-trl eval", description=__doc__.split("\n")[0])
    (arguments,) = parser.parse_args_and_config(args=list(argv))
    arguments.rewards, arguments.trained_rewards = map(split_names, (arguments.rewards, arguments.trained_rewards))
    if not arguments.rewards:
        raise ValueError("--rewards is missing: name at least one, for example --rewards pickscore,clip_text.")
    if arguments.dtype not in (None, "float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"--dtype is {arguments.dtype!r}: use float32, bfloat16, float16 or float64.")
    return arguments


def run(arguments: EvalArguments, command: str | None = None) -> "Evaluation":
    """Evaluates; the command line's arguments are those of [`evaluate`]."""
    from ..data import load_prompts
    from ..evaluation import evaluate, find_adapters, run_value
    from ..pipelines import CallSettings
    from .messages import show_messages

    show_messages(_process_index() == 0)
    sources = find_adapters(arguments.adapter)
    model = arguments.model or run_value(sources, "base_model")
    if not model:
        raise ValueError("--model is missing, and no adapter says what it was trained on.")
    steps = list(arguments.steps)
    if arguments.num_inference_steps and arguments.num_inference_steps not in steps[:1]:
        steps = [arguments.num_inference_steps, *(steps or [2 * arguments.num_inference_steps])]
    return evaluate(
        model,
        load_prompts(arguments.prompts, column=arguments.prompt_column, max_prompts=arguments.max_prompts)
        if arguments.prompt_column != "prompt"
        else arguments.prompts,
        arguments.rewards,
        images_per_prompt=arguments.images_per_prompt,
        seed=arguments.seeds,
        batch_size=arguments.batch_size,
        judge=arguments.judge,
        adapters=arguments.adapter,
        steps=steps or None,
        best_of=arguments.best_of,
        adapter_scales=arguments.adapter_scales,
        trained_rewards=arguments.trained_rewards or None,
        settings=CallSettings.of(arguments),
        dtype=arguments.dtype,
        device="cpu" if arguments.use_cpu else None,
        max_prompts=arguments.max_prompts,
        output_dir=arguments.output_dir,
        resume=arguments.resume,
        allow_partial=arguments.allow_partial,
        save_images=arguments.save_images,
        command=command,
    )
