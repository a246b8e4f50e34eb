"""Arguments of a training run: which model, rewards and prompts; and reading them from YAML and the command line."""

import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..trainer import METHODS, check_method, config_of
from .keys import check_keys, check_options, config_keys, read_config
from .recipes import with_recipes


if TYPE_CHECKING:
    from ..trainer import DiffusionConfig


def option(text: str, default: Any = None) -> Any:
    """A field with its help and its default; `MISSING` is none."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class RunArguments:
    r"""
    What a recipe trains, on top of its config.

    Args:
        model_name_or_path (`str`):
            A shipped name (`tiny-sana-sprint`), a folder, or a Hub id.
        method (`str`, *optional*):
            `es`, `ddpo`, `grpo`, `pref_grpo` or `dpo`; by default that of the recipe script, or `es`.
        reward_funcs (`list[str]`):
            Reward names, `name:checkpoint`, CLIP checkpoints, or `file.py:function`.
        dataset_name (`str`):
            Training prompts: a shipped name (`tiny-train`), a file, or a Hub id.
        dataset_config (`str`, *optional*):
            Configuration of a Hub data set that has several.
        dataset_revision (`str`, *optional*):
            Branch, tag or commit of a Hub data set; a commit pins it.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set.
        dataset_prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the training prompts.
        max_train_prompts (`int`, *optional*):
            Use only the first so many training prompts.
        eval_dataset_name (`str`, *optional*):
            Prompts of the evaluations during training.
        eval_dataset_prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds them.
        max_eval_prompts (`int`, *optional*):
            Use only the first so many of them.
        test_dataset_name (`str`, *optional*):
            Prompts of the evaluation after training: base, adapter, and base with twice the steps.
        test_dataset_prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds them.
        max_test_prompts (`int`, *optional*):
            Use only the first so many of them.
        test_images_per_prompt (`int`, *optional*, defaults to `1`):
            Images per test prompt.
        judge (`str`, *optional*):
            CLIP checkpoint that measures retrieval, hard negatives and Frechet distance after training; it is never
            optimised.
        live (`bool`, *optional*, defaults to `False`):
            Serve the run's page while it trains, on this machine only; the log has its address.
        live_port (`int`, *optional*, defaults to `0`):
            Its port; 0 takes a free one.
    """

    model_name_or_path: str = option("A shipped name, a folder, or a Hub id.", MISSING)
    method: str | None = option("es, ddpo, grpo, pref_grpo or dpo; by default that of the recipe script, or es.")
    reward_funcs: list[str] = option("Reward names, name:checkpoint, CLIP checkpoints, or file.py:function.", [])
    dataset_name: str | None = option("Training prompts: a shipped name, a file, or a Hub id.")
    dataset_config: str | None = option("Configuration of a Hub data set.")
    dataset_revision: str | None = option("Branch, tag or commit of a Hub data set; a commit pins it.")
    dataset_train_split: str = option("Split of a Hub data set.", "train")
    dataset_prompt_column: str = option("Column of the training prompts.", "prompt")
    max_train_prompts: int | None = option("Use only the first so many training prompts, at least 1.")
    eval_dataset_name: str | None = option("Prompts of the evaluations during training.")
    eval_dataset_prompt_column: str = option("Column of the evaluation prompts.", "prompt")
    max_eval_prompts: int | None = option("Use only the first so many, at least 1.")
    test_dataset_name: str | None = option("Prompts of the evaluation of base and adapter after training.")
    test_dataset_prompt_column: str = option("Column of the test prompts.", "prompt")
    max_test_prompts: int | None = option("Use only the first so many, at least 1.")
    test_images_per_prompt: int = option("Images per test prompt, at least 1.", 1)
    judge: str | None = option("CLIP checkpoint that judges the result and is never optimised.")
    live: bool = option("Serve the run's page while it trains, on this machine only.", False)
    live_port: int = option("Port of the live page; 0 takes a free one.", 0)

    def __post_init__(self):
        self.reward_funcs = split_names(self.reward_funcs)
        if not self.reward_funcs:
            raise ValueError("reward_funcs is missing: name at least one, for example `reward_funcs: [pickscore]`.")
        if not self.dataset_name:
            raise ValueError("dataset_name is missing: give training prompts (a file, a Hub id or a shipped name).")


def split_names(names: Sequence[str] | str | None) -> list[str]:
    """Names given one by one, or several in a string with commas between them."""
    names = [names] if isinstance(names, str) else list(names or ())
    return [name.strip() for text in names for name in text.split(",") if name.strip()]


def parse(
    config_class: "type[DiffusionConfig] | None" = None, args: Sequence[str] | None = None
) -> "tuple[RunArguments, DiffusionConfig]":
    """
    Reads `--config` (a file, or a recipe's name) and the command line; the command line overrides the file, the file
    the defaults.

    Args:
        config_class (`type`, *optional*): The method's config; by default that of `method`, which is `es` unless the
            command line or the file names another one.
        args (`Sequence[str]`, *optional*): Arguments; `sys.argv[1:]` by default.

    Returns:
        The arguments, with `method` filled in, and the config.

    Raises:
        `ValueError`: for an unknown method or key of the file (with the nearest known one), or a value that cannot
            work.
    """
    args = with_recipes(sys.argv[1:] if args is None else args)
    method = check_names(args, config_class)
    from .options import LineParser  # only now: what is wrong by then is said without it

    parser = LineParser([RunArguments, config_class or config_of(method or "es")])
    arguments, config = parser.parse_args_and_config(args=args)
    arguments.method = method
    return arguments, config


def check_names(
    args: Sequence[str], config_class: "type[DiffusionConfig] | None" = None, beside: Sequence[str] = ()
) -> str | None:
    """
    The method, once the names of all options and keys are known to be settings of it, or are options `beside` them;
    imports no library for that.

    Raises:
        `ValueError`: as [`parse`].
    """
    args = with_recipes(args)
    path = value_of("--config", args)
    file = read_config(path) if path is not None else {}
    method = _method(config_class, value_of("--method", args) or file.get("method"))
    known = {f.name for f in fields(RunArguments)}
    known |= {f.name for f in fields(config_class)} if config_class and not method else config_keys(method or "es")
    check_keys(path, file, known, method)
    check_options(args, known | {*beside})
    if path is None and not value_of("--model_name_or_path", args):
        raise ValueError(
            "nothing says what to train: give --config FILE, or --model_name_or_path, --reward_funcs, --dataset_name "
            "and --output_dir; --help has the options."
        )
    return method


def method_of(args: Sequence[str]) -> str:
    """The method that the command line or its config file names, `es` when none does."""
    args = with_recipes(args)
    path = value_of("--config", args)
    named = value_of("--method", args) or (read_config(path).get("method") if path else None)
    return _method(None, named) or "es"


def load_config(
    path: str, config_class: "type[DiffusionConfig] | None" = None, overrides: Sequence[str] = ()
) -> "tuple[RunArguments, DiffusionConfig]":
    """The arguments of a YAML file, with `--name value` overrides."""
    return parse(config_class, ["--config", str(path), *overrides])


def value_of(option: str, args: Sequence[str]) -> str | None:
    """The last value of `--option value` or `--option=value`, as argparse takes it."""
    found = None
    for i, word in enumerate(args):
        if word == option and i + 1 < len(args):
            found = args[i + 1]
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _method(config_class: "type[DiffusionConfig] | None", named: str | None) -> str | None:
    """What trains: the method that is named, which has to be the one of `config_class` if that is given."""
    if named is not None:
        check_method(named)
    if config_class is None:
        return named or "es"
    own = next((m for m, (config, _) in METHODS.items() if config.endswith(f":{config_class.__name__}")), None)
    if named is not None and own is not None and named != own:
        raise ValueError(
            f"method is {named!r}, but this script trains {own!r}: run `es-trl train --method {named}` or "
            f"recipes/{named}_sana.py."
        )
    return own
