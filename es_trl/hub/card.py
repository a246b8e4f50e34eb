"""The model card of an adapter, built from data: front matter by the YAML dumper, user text through one escape."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .base_model import base_license, is_hub_id, shown_name
from .card_sections import (
    evaluation_section,
    introduction,
    licence_section,
    limits_section,
    pictures_section,
    results_section,
    training_section,
    versions_section,
)
from .citation import citation_section
from .escaping import one_line, redact
from .snippet import usage_section


TAGS = ("text-to-image", "diffusers", "diffusers-training", "lora", "es_trl", "template:sd-lora")
METHOD_TAGS = {
    "es": ("evolution-strategies", "eggroll"),
    "ddpo": ("ddpo", "reinforcement-learning"),
    "grpo": ("grpo", "flow-grpo", "reinforcement-learning"),
    "pref_grpo": ("pref-grpo", "grpo", "reinforcement-learning"),
    "dpo": ("diffusion-dpo", "dpo"),
}


def model_card(
    adapter_info: dict[str, Any],
    config: dict[str, Any],
    evaluation: dict[str, Any] | None = None,
    env: dict[str, Any] | None = None,
    samples: Sequence[tuple[str, str]] = (),
    repo_id: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    dataset_name: str | None = None,
    duration_seconds: float | None = None,
    num_images: int | None = None,
    picture: str | None = None,
    sheets: Sequence[tuple[str, str]] = (),
    license: str | None = None,
    tags: Sequence[str] = (),
    tracker_urls: Mapping[str, str] | None = None,
) -> ModelCard:
    """
    Builds the card of an adapter.

    Args:
        adapter_info (`dict`): [`~es_trl.pipelines.PipelineAdapter.describe`]: pipeline class, its call, LoRA settings.
        config (`dict`): What ran: `method`, `base_model`, `reward_funcs`, `reward_weights`, `eval_reward_funcs`,
            `train_prompts`, and `config` with all settings. Missing entries are left out of the card.
        evaluation (`dict`, *optional*): `eval.json`, from [`~es_trl.evaluation.Evaluation.to_dict`]. Without it the
            card says that nothing was measured.
        env (`dict`, *optional*): From [`~es_trl.hub.environment.environment`].
        samples (`Sequence[tuple[str, str]]`, *optional*): Prompt and relative path of pictures, for the gallery.
        repo_id (`str`, *optional*), revision (`str`, *optional*): Hub repository of the adapter, and the branch if it
            is not `main`; `None` is a folder.
        base_model (`str`, *optional*): Shipped name, Hub id or folder of the base; by default that of `config`.
        dataset_name (`str`, *optional*): Training prompts: Hub id, shipped name or file.
        duration_seconds (`float`, *optional*), num_images (`int`, *optional*): What training took.
        picture (`str`, *optional*): Relative path of a before/after picture.
        sheets (`Sequence[tuple[str, str]]`, *optional*): Caption and relative path of sample sheets, shown when there
            is no before/after picture.
        license (`str`, *optional*): Overrides the licence of the base model's card.
        tags (`Sequence[str]`, *optional*): Further tags.
        tracker_urls (`Mapping[str, str]`, *optional*): Name of a tracker to the page of this run there.

    Returns:
        `huggingface_hub.ModelCard`: `.save(path)` writes it, `.data` is the front matter.

    Raises:
        ValueError: A picture's path is absolute or leaves the folder.
    """
    base_model = base_model or config.get("base_model")
    base = shown_name(base_model) if base_model else None
    licence = {"license": license} if license else base_license(base_model)
    dataset = shown_name(dataset_name) if dataset_name else None
    name = one_line(repo_id.split("/")[-1] if repo_id else f"{(base or 'model').split('/')[-1]}-{_method(config)}", 96)
    samples = [(prompt, relative_url(path)) for prompt, path in samples]

    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=dataset_name if is_hub_id(dataset_name) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *METHOD_TAGS.get(config.get("method"), ()), *map(one_line, tags)],
        widget=[{"text": one_line(prompt), "output": {"url": url}} for prompt, url in samples] or None,
        model_name=name,
        eval_results=eval_results(evaluation) or None if evaluation else None,
        **licence,
    )
    sections = [
        introduction(name, adapter_info, config, evaluation, base, num_images, duration_seconds, tracker_urls),
        pictures_section(
            samples, relative_url(picture) if picture else None, [(text, relative_url(path)) for text, path in sheets]
        ),
        results_section(evaluation, config),
        usage_section(adapter_info, config, base_model, repo_id, [prompt for prompt, _ in samples], revision),
        training_section(adapter_info, config, dataset, num_images, duration_seconds),
        evaluation_section(evaluation),
        versions_section(env),
        limits_section(evaluation, config),
        licence_section(base, licence),
        citation_section(_method(config)),
    ]
    body = redact("\n\n".join(section for section in sections if section))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def relative_url(path: str) -> str:
    """A path below the card's folder as a URL."""
    parts = str(path).replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or ":" in parts[0]:
        raise ValueError(f"picture {path!r} must be a relative path below the folder of the card.")
    return quote("/".join(parts))


def eval_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """The means of an evaluation (`eval.json`) for `model-index`, one per row and reward, with their intervals."""
    protocol = evaluation["protocol"]
    arguments = {key: protocol[key] for key in ("prompts", "prompts_sha256", "images_per_prompt", "seed")}
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{protocol['prompts']} evaluation prompts",
            dataset_revision=protocol["prompts_sha256"][:12],
            dataset_args=arguments,
            metric_type=one_line(reward),
            metric_name=one_line(f"{reward}, {row['name']}"),
            metric_value=found["mean"],
            metric_args={"row": row["name"], "ci_low": found["ci_low"], "ci_high": found["ci_high"]},
        )
        for row in evaluation["rows"]
        for reward, found in row["rewards"].items()
        if found["mean"] is not None
    ]


def _method(config: dict[str, Any]) -> str:
    return one_line(config.get("method") or "es")
