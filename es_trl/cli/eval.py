"""`es-trl eval`: base and adapters on the same prompts and noise, with intervals, into one folder."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from .arguments import option, split_names, value_of
from .keys import check_keys, check_options, read_config
from .messages import refuse, show_messages


if TYPE_CHECKING:
    from ..evaluation import Evaluation


@dataclass
class EvalArguments:
    """What is evaluated, on what, and where the tables go; docs/evaluation.md has more of each."""

    prompts: str = option("A file, a shipped list, showcase, or a Hub id.", MISSING)
    output_dir: str = option("Folder of the tables; an earlier evaluation there steps aside.", MISSING)
    rewards: list[str] = option("Rewards, separated by commas or spaces.", [])
    prompt_column: str = option("Column that holds the prompts.", "prompt")
    model: str | None = option("Base model; by default that of the adapters.")
    adapter: list[str] = option("Run folders, LoRA folders or Hub ids; name=source names a method.", [])
    trained_rewards: list[str] = option("Optimised rewards; by default what the run folders say.", [])
    judge: str | None = option("CLIP checkpoint that judges, never optimised.")
    images_per_prompt: int = option("Images per prompt and seed.", 1)
    seeds: list[int] = option("Seeds of the noise.", [0])
    num_inference_steps: int | None = option("Steps the adapters were trained for.")
    steps: list[int] = option("Steps of the table; by default trained for, and twice as many.", [])
    best_of: list[int] = option("Best of N of the base, by trained reward.", [])
    adapter_scales: list[float] = option("LoRA scales of the first adapter; 0 is the base.", [])
    guidance_scale: float | None = option("Guidance of the pipeline call.")
    height: int | None = option("Image height in pixels.")
    width: int | None = option("Image width in pixels.")
    max_sequence_length: int | None = option("Text tokens per prompt.")
    dtype: str | None = option("float32, bfloat16, float16; float64: exactly alike for any batch_size.")
    batch_size: int = option("Images drawn and scored at once.", 16)
    max_prompts: int | None = option("Only the first so many prompts.")
    resume: bool = option("Take the finished rows of this very command.", False)
    allow_partial: bool = option("Go on with a part of an adapter.", False)
    save_images: int = option("Prompts whose images are kept.", 24)
    use_cpu: bool = option("Leave a GPU alone.", False)


# what `evaluate` calls by the same names
AS_THEY_ARE = ("images_per_prompt", "batch_size", "judge", "best_of", "adapter_scales", "dtype", "max_prompts",
               "output_dir", "resume", "allow_partial", "save_images")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Evaluates from `--config` and the command line; arguments that cannot work are one line and exit code 2."""
    try:
        arguments = _parse(argv)
        run(arguments, shlex.join(["es-trl", "eval", *argv]))
    except (ValueError, OSError, ImportError) as error:
        # An error of the operating system has a number (a full disk); a missing data set or checkpoint has none.
        return refuse("eval", error, 1 if isinstance(error, OSError) and error.errno is not None else 2)
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
    for name in dict.fromkeys(options):
        count = options.count(name)
        if count > 1:  # only the last one would count
            raise ValueError(f"{name} is given {count} times: give it once, with all its values after it.")
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

    show_messages(_process_index() == 0)
    sources = find_adapters(arguments.adapter)
    model = arguments.model or run_value(sources, "base_model")
    if not model:
        raise ValueError("--model is missing, and no adapter says what it was trained on.")
    steps = list(arguments.steps)
    if arguments.num_inference_steps and arguments.num_inference_steps not in steps[:1]:
        steps = [arguments.num_inference_steps, *(steps or [2 * arguments.num_inference_steps])]
    prompts: Any = arguments.prompts
    if arguments.prompt_column != "prompt":
        prompts = load_prompts(prompts, column=arguments.prompt_column, max_prompts=arguments.max_prompts)
    return evaluate(
        model, prompts, arguments.rewards,
        seed=arguments.seeds, adapters=arguments.adapter, steps=steps or None,
        trained_rewards=arguments.trained_rewards or None, settings=CallSettings.of(arguments),
        device="cpu" if arguments.use_cpu else None, command=command,
        **{name: getattr(arguments, name) for name in AS_THEY_ARE},
    )  # fmt: skip
