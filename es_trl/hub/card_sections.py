"""The sections of a model card, each from its data; what is not known is left out or said to be unknown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .base_model import is_hub_id
from .escaping import md_escape
from .tables import METRICS, differences_table, interval, judge_table, number, percent, scores_table, table


METHODS = {
    "es": "evolution strategies ([EGGROLL](https://huggingface.co/papers/2511.16652))",
    "ddpo": "[DDPO](https://huggingface.co/papers/2305.13301)",
    "grpo": "[GRPO](https://huggingface.co/papers/2505.05470)",
    "pref_grpo": "[Pref-GRPO](https://huggingface.co/papers/2508.20751)",
    "dpo": "[Diffusion-DPO](https://huggingface.co/papers/2311.12908)",
}

# The settings that make a run what it is, in the order of the card. Everything else is in `es_config.json`.
SETTINGS = (
    "max_steps", "prompts_per_step", "images_per_prompt", "scale_rewards", "multi_objective_aggregation", "optim",
    "optim_args", "learning_rate", "lr_scheduler_type", "warmup_steps", "gradient_accumulation_steps", "max_grad_norm",
    "dtype", "seed",
)  # fmt: skip
_POLICY_SETTINGS = (
    "num_generations", "sample_num_steps", "intermediate_times", "output_noise", "noise_level", "init_same_noise",
    "num_iterations", "steps_per_generation", "epsilon", "epsilon_high", "advantage_clip", "sde_window_size", "beta",
    "loss_type", "per_prompt_stat_tracking", "win_rate_temperature", "weight_decay",
)  # fmt: skip
METHOD_SETTINGS = {
    "es": (
        "population_size", "prompts_per_member", "antithetic", "sigma", "noise_rank", "noise_reuse", "fitness_shaping",
        "anchor_decay", "max_update_norm", "max_adapter_norm", "members_per_forward",
    ),
    "ddpo": _POLICY_SETTINGS,
    "grpo": _POLICY_SETTINGS,
    "pref_grpo": _POLICY_SETTINGS,
    "dpo": (
        "online", "num_generations", "draw_with", "beta", "loss_type", "noise_draws", "noise_level_sampling",
        "min_noise_level", "max_noise_level", "num_iterations",
    ),
}  # fmt: skip


def introduction(
    name: str,
    adapter_info: dict[str, Any],
    config: dict[str, Any],
    evaluation: dict[str, Any] | None,
    base: str | None,
    num_images: int | None,
    duration_seconds: float | None,
    tracker_urls: Mapping[str, str] | None = None,
) -> str:
    """Title, what the adapter is, where the run was tracked, and what it gained."""
    text = f"# {md_escape(name)}\n\nA LoRA"
    if adapter_info.get("lora_rank"):
        text += f" of rank {adapter_info['lora_rank']}"
    text += f" for {_link(base)}" if base else " for a text-to-image diffusion model"
    method = METHODS.get(config.get("method", "es"), md_escape(config.get("method")))
    text += f", post-trained with {method} by es_trl"
    if config.get("reward_funcs"):
        text += f" to draw pictures that score higher under {_rewards(config)}"
    text += f".{_cost(num_images, duration_seconds, ' Training drew {} and took {}.')}"
    links = [f"[{md_escape(name)}]({url})" for name, url in (tracker_urls or {}).items() if _is_web_page(url)]
    if links:
        text += f"\n\nCurves and pictures of the run: {', '.join(links)}."
    gains = gain_lines(evaluation) if evaluation else []
    return text + ("\n\n" + "\n".join(gains) if gains else "")


def gain_lines(evaluation: dict[str, Any]) -> list[str]:
    """One line per reward: from where to where, the difference, and the share of the gap to more steps it closes."""
    roles = evaluation.get("gap_closure_rows")
    if not roles:
        return []
    means = {row["name"]: row["rewards"] for row in evaluation["rows"]}
    lines = [f"On {evaluation['protocol']['prompts']} evaluation prompts, against the base with the same noise:", ""]
    for entry in evaluation["paired"]:
        if (entry["row"], entry["against"]) != (roles["model"], roles["base"]) or entry["delta"] is None:
            continue
        reward = entry["reward"]
        before, after = means[roles["base"]][reward]["mean"], means[roles["model"]][reward]["mean"]
        line = f"- **{md_escape(reward)}** {number(before)} to {number(after)}:"
        line += f" {number(entry['delta'], sign=True)}{interval(entry['ci_low'], entry['ci_high'])},"
        line += f" better on {percent(entry['win_rate'])} of the prompts"
        closure = evaluation["gap_closure"].get(reward)
        if closure is not None:
            ends = interval(*evaluation["gap_closure_ci"][reward], show=_two)
            line += f"; {_two(closure)}{ends} of the gain that {md_escape(roles['target'])} brings"
        lines.append(line + ".")
    return lines


def pictures_section(
    samples: Sequence[tuple[str, str]], picture: str | None, sheets: Sequence[tuple[str, str]] = ()
) -> str | None:
    """The before/after picture, or else the sample sheets (caption, URL); and the gallery of samples (prompt, URL)."""
    sheets = () if picture else sheets
    if not samples and not picture and not sheets:
        return None
    parts = ["## Pictures"]
    if picture:
        parts.append(f"![The same prompts and noise before and after training]({picture})")
    if sheets:
        parts.append("Fixed prompts, always from the same noise.")
    for caption, url in sheets:
        parts += [f"{md_escape(caption)}:", f"![{md_escape(caption)}]({url})"]
    if samples:
        parts.append("<Gallery />")
        if not picture:  # the gallery is drawn by the Hub only
            parts += [f"![{md_escape(prompt)}]({url})" for prompt, url in samples]
    return "\n\n".join(parts)


def results_section(evaluation: dict[str, Any] | None, config: dict[str, Any]) -> str:
    """The tables of `eval.json`."""
    if not evaluation:
        return "## Results\n\nNothing was measured: this run was not compared with its base model."
    parts = ["## Results", "Means over prompts with their 95 % intervals."]
    parts.append(scores_table(evaluation, config.get("reward_funcs") or ()))
    if evaluation["paired"]:
        parts += ["Differences on the same prompts and noise, and how often the first is better:"]
        parts.append(differences_table(evaluation))
    judged = judge_table(evaluation)
    if judged:
        parts += ["What a judge sees that was never optimised:", judged]
    missing = sum(found["missing"] for row in evaluation["rows"] for found in row["rewards"].values())
    if missing:
        parts.append(f"{missing} scores are missing: a reward gave none. They are left out on both sides.")
    return "\n\n".join(parts)


def training_section(
    adapter_info: dict[str, Any],
    config: dict[str, Any],
    dataset: str | None,
    num_images: int | None,
    duration_seconds: float | None,
) -> str:
    """Reward, prompts, adapter, and the settings of the method."""
    settings = config.get("config") or {}
    rows = [("reward", _rewards(config)) if config.get("reward_funcs") else None]
    prompts = [_link(dataset)] if dataset else []
    if config.get("train_prompts"):
        prompts.append(f"{config['train_prompts']} prompts")
    rows.append(("training prompts", ", ".join(prompts)) if prompts else None)
    rows.append(("images drawn", f"{num_images:,}") if num_images else None)
    rows.append(("duration", _duration(duration_seconds)) if duration_seconds else None)
    rows += [(f"`{key}`", _value(value)) for key, value in adapter_info.items() if value is not None]
    if "complex_human_instruction" in adapter_info and adapter_info["complex_human_instruction"] is None:
        rows.append(("`complex_human_instruction`", "the pipeline's default, where it has one"))
    names = (*METHOD_SETTINGS.get(config.get("method", "es"), ()), *SETTINGS)
    rows += [(f"`{key}`", _value(settings[key])) for key in names if settings.get(key) is not None]
    return "## How it was trained\n\n" + table(["setting", "value"], [row for row in rows if row], right=2)


def evaluation_section(evaluation: dict[str, Any] | None) -> str | None:
    """The protocol in words, complete enough to repeat it."""
    if not evaluation:
        return None
    protocol = evaluation["protocol"]
    images = protocol["images_per_prompt"]
    lines = [
        f"- {protocol['prompts']} prompts (sha256 of the list: `{protocol['prompts_sha256'][:16]}`),"
        f" {images} image{'s' if images > 1 else ''} per prompt, seed {protocol['seed']}.",
        "- The initial noise of an image depends on seed, prompt and image number only, so all models share it.",
        "- The unit is the prompt: images of a prompt are averaged first.",
        f"- Intervals are percentiles of {protocol['resamples']:,} resamples of the prompts; differences are paired."
        " Win rates, with ties counted half, have Wilson intervals.",
        "- All numbers, and the settings of the pipeline, are in `eval.json`.",
    ]
    return "## How it was evaluated\n\n" + "\n".join(lines)


def versions_section(env: dict[str, Any] | None) -> str | None:
    """Software and hardware of the run."""
    if not env:
        return None
    packages = ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items() if version)
    hardware = env.get("gpus") or [env.get("cpu")]
    rows = [
        ("es_trl", " ".join(str(env[key]) for key in ("es_trl", "git_commit") if env.get(key))),
        ("packages", packages),
        ("Python", f"{env.get('python')} on {env.get('platform')}"),
        ("hardware", f"{', '.join(map(str, hardware))} ({env.get('cpu_cores')} CPU cores)"),
    ]
    return "## Software and hardware\n\n" + table(["", ""], [(name, md_escape(text, 400)) for name, text in rows], 2)


def limits_section(evaluation: dict[str, Any] | None, config: dict[str, Any]) -> str:
    """What the adapter does not do, and what the evaluation found to be worse."""
    lines = [f"- {line}" for line in losses(evaluation)] if evaluation else []
    lines += [
        "- A reward is not a person: a higher score is not always a better picture, and an adapter learns the reward's"
        " preferences and blind spots with it.",
        "- One training run: how much another seed would differ is not in the intervals.",
        "- It was trained and measured with the settings above; other steps, sizes, guidance and kinds of prompts were"
        " not tried.",
        "- It inherits the limits and biases of its base model.",
    ]
    return "## Limits\n\n" + "\n".join(lines)


def losses(evaluation: dict[str, Any]) -> list[str]:
    """Where the adapter is worse than the base, or not clearly better, at equal steps."""
    roles = evaluation.get("gap_closure_rows")
    if not roles:
        return []
    pair = (roles["model"], roles["base"])
    found = []
    for entry in evaluation["paired"]:
        if (entry["row"], entry["against"]) == pair and entry["ci_low"] is not None and entry["ci_low"] <= 0:
            verdict = "is lower than the base's" if entry["ci_high"] < 0 else "is not clearly above the base's"
            ends = interval(entry["ci_low"], entry["ci_high"])
            found.append(f"{md_escape(entry['reward'])} {verdict}: {number(entry['delta'], sign=True)}{ends}.")
    for entry in evaluation.get("paired_judge", ()):
        if (entry["row"], entry["against"]) != pair or entry["ci_low"] is None:
            continue
        lower_is_better = entry["metric"] == "frechet_distance"
        if entry["ci_low"] > 0 if lower_is_better else entry["ci_high"] < 0:
            show = number(entry["delta"], sign=True) + interval(entry["ci_low"], entry["ci_high"])
            found.append(f"The {METRICS[entry['metric']].partition(' (')[0]} got worse: {show}.")
    return found


def licence_section(base: str | None, licence: dict[str, str]) -> str:
    """The licence that the adapter takes over from its base model."""
    model = f"its base model {_link(base)}" if base else "its base model"
    if licence.get("license"):
        name = md_escape(licence.get("license_name") or licence["license"])
        text = f"An adapter is of use only with {model}, whose card names the licence **{name}**; it applies here too."
        if licence.get("license_link"):
            text += f" Licence text: {md_escape(licence['license_link'])}."
    else:
        text = f"The licence of {model} was not known when this card was written. Read its card before you use this."
    return f"## Licence\n\n{text}"


def _is_web_page(url: str) -> bool:
    return bool(re.fullmatch(r"https://[\w.~/%-]+", url))


def _link(name: str) -> str:
    return f"[{md_escape(name)}](https://huggingface.co/{name})" if is_hub_id(name) else f"**{md_escape(name)}**"


def _rewards(config: dict[str, Any]) -> str:
    names, weights = config["reward_funcs"], config.get("reward_weights")
    if not weights or len(names) == 1:
        return ", ".join(f"**{md_escape(name)}**" for name in names)
    return ", ".join(f"**{md_escape(name)}** x {weight:g}" for name, weight in zip(names, weights, strict=True))


def _value(value: Any) -> str:
    return md_escape(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cost(num_images: int | None, seconds: float | None, sentence: str) -> str:
    return sentence.format(f"{num_images:,} images", _duration(seconds)) if num_images and seconds else ""
