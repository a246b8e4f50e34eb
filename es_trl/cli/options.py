"""The options of `es-trl train`: help in groups, and one line for what cannot be read."""

import dataclasses
from collections.abc import Sequence

from trl import TrlParser


# What `--help` shows of each class; `--help-all` shows everything.
SHOWN = {
    "What is trained": (
        "config", "method", "model_name_or_path", "reward_funcs", "reward_weights", "dataset_name",
        "dataset_prompt_column", "max_train_prompts", "output_dir", "resume_from_checkpoint",
    ),
    "What it is measured on": (
        "eval_dataset_name", "eval_reward_funcs", "eval_strategy", "eval_steps", "max_eval_prompts",
        "test_dataset_name", "max_test_prompts", "test_images_per_prompt", "judge", "early_warning",
    ),
    "How pictures are drawn": (
        "num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length", "dtype", "use_cpu",
    ),
    "What is moved": ("lora_rank", "lora_alpha", "lora_target_modules"),
    "How long, how far": (
        "max_steps", "prompts_per_step", "images_per_prompt", "learning_rate", "lr_scheduler_type", "seed",
    ),
    "What is kept and shown": (
        "live", "logging_steps", "sample_steps", "save_steps", "save_total_limit", "load_best_model_at_end",
        "report_to", "push_to_hub", "hub_model_id",
    ),
}  # fmt: skip
CONFIG_HELP = "YAML file with any of these options; the command line overrides it."


class LineParser(TrlParser):
    """A parser that raises `ValueError` with one line where argparse prints its usage and leaves."""

    def error(self, message: str):
        raise ValueError(message)


def help_text(program: str, classes: Sequence[type], method: str, everything: bool = False) -> str:
    """
    The options in groups, one line each: the fields of some dataclasses, of which the last is the `method`'s config.
    What few runs ever need is shown where `everything` is asked for.
    """
    found = {f.name: f for cls in classes for f in dataclasses.fields(cls) if f.init}
    own = [f.name for f in dataclasses.fields(classes[-1]) if f.name in vars(classes[-1]).get("__annotations__", {})]
    shown = [name for names in SHOWN.values() for name in names]
    groups = {title: [name for name in names if name in found or name == "config"] for title, names in SHOWN.items()}
    groups[f"The method: {method}"] = [name for name in own if name not in shown]
    if everything:
        left = [name for name in found if not any(name in names for names in groups.values())]
        groups["Everything else (docs of transformers.TrainingArguments)"] = left
    width = max(len(name) for names in groups.values() for name in names) + 2
    lines = [f"usage: {program} --config FILE [--option value ...]", ""]
    for title, names in groups.items():
        lines += [f"{title}:", *(_line(name, found.get(name), width) for name in names), ""]
    if not everything:
        lines.append(f"{program} --help-all shows {len(found) + 1 - sum(map(len, groups.values()))} more options.")
    return "\n".join(lines).rstrip() + "\n"


def _line(name: str, field: dataclasses.Field | None, width: int) -> str:
    text = CONFIG_HELP if field is None else " ".join(str(field.metadata.get("help") or "").split())
    text = text.replace("%%", "%")
    if field is not None and field.default not in (None, dataclasses.MISSING, "") and field.default is not False:
        text += f" [{getattr(field.default, 'value', field.default)}]"
    limit = 119 - width - 4
    return f"  --{name:<{width}}{text if len(text) <= limit else text[: limit - 3].rstrip() + '...'}".rstrip()
