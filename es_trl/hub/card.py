"""The model card of an adapter: front matter by huggingface_hub, body by `card.md.j2`, all user text escaped."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup

from .. import assets
from ..formatting import METRICS, duration, interval, number, percent, whole
from .base_model import base_license, is_hub_id, shown_name
from .escaping import md_escape, one_line, redact
from .judged import judged
from .methods import SETTINGS, Method
from .tables import differences_table, judge_table, scores_table


TAGS = ("text-to-image", "diffusers", "diffusers-training", "lora", "es_trl", "template:sd-lora")
# What `PipelineAdapter.describe` says beside the keywords of the call.
NOT_OF_THE_CALL = {"pipeline", "es_space", "lora_rank", "lora_alpha", "lora_target_modules"}
_PLAIN = re.compile(r"[\w ,.'-]{1,120}")


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
    digest: str | None = None,
) -> ModelCard:
    """
    Builds the card of an adapter; `.save(path)` writes it, `.data` is the front matter.

    Args:
        adapter_info (`dict`): [`~es_trl.pipelines.PipelineAdapter.describe`]: pipeline class, its call, LoRA settings.
        config (`dict`): What ran: `method`, `base_model`, `reward_funcs`, `reward_weights`, `eval_reward_funcs`,
            `train_prompts`, and `config` with all settings. Missing entries are left out of the card.
        evaluation (`dict`, *optional*): `eval.json`. Without it the card says that nothing was measured.
        env (`dict`, *optional*): From [`~es_trl.hub.environment.environment`].
        samples (`Sequence[tuple[str, str]]`, *optional*): Prompt and relative path of pictures, for the gallery.
        repo_id (`str`, *optional*), revision (`str`, *optional*): Hub repository of the adapter, and the branch if it
            is not `main`; `None` is a folder.
        base_model, license (`str`, *optional*): By default what `config` and the base model's card say.
        dataset_name (`str`, *optional*): Training prompts: Hub id, shipped name or file.
        duration_seconds (`float`, *optional*), num_images (`int`, *optional*): What training took.
        picture (`str`, *optional*), sheets (`Sequence[tuple[str, str]]`, *optional*): Relative path of a before/after
            picture; caption and relative path of sample sheets, shown when there is none.
        tracker_urls (`Mapping[str, str]`, *optional*): Name of a tracker to the page of this run there.
        digest (`str`, *optional*): Of the adapter the card goes with ([`~es_trl.hub.adapter_digest`]). Results and
            pictures of an evaluation that judged another one are left out, and the card says so.

    Raises:
        ValueError: A picture's path is absolute or leaves the folder.
    """
    of_another = bool(evaluation) and digest is not None and not judged(evaluation, digest)
    if of_another:
        evaluation, samples, picture = None, (), None
    base_model = base_model or config.get("base_model")
    licence = {"license": license} if license else base_license(base_model)
    facts = _facts(config, base_model, repo_id, dataset_name)
    pictures = [(prompt, relative_url(path)) for prompt, path in samples]
    body = _template().render(
        facts, info=adapter_info, config=config, evaluation=evaluation, of_another=of_another, digest=digest, env=env,
        samples=[(prompt, Markup(url)) for prompt, url in pictures],
        sheets=[(caption, Markup(relative_url(path))) for caption, path in sheets],
        picture=Markup(relative_url(picture)) if picture else None, repo_id=repo_id, revision=revision,
        tracker_urls=[(title, Markup(url)) for title, url in (tracker_urls or {}).items() if _is_web_page(url)],
        licence=licence, num_images=num_images, seconds=duration_seconds, **_findings(evaluation),
        **_snippet(adapter_info, base_model, facts["base"], [prompt for prompt, _ in samples]),
    )  # fmt: skip
    data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=dataset_name if is_hub_id(dataset_name) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*TAGS, *facts["method"].tags, *map(one_line, tags)],
        widget=[{"text": one_line(prompt), "output": {"url": url}} for prompt, url in pictures] or None,
        model_name=facts["name"],
        eval_results=eval_results(evaluation) or None if evaluation else None,
        **licence,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{redact(body)}")


def _facts(
    config: dict[str, Any], base_model: str | None, repo_id: str | None, dataset_name: str | None
) -> dict[str, Any]:
    """What the card says of the run in words of its own: names, the method, the settings that matter."""
    method, settings = Method.of(config), config.get("config") or {}
    base = shown_name(base_model) if base_model else None
    fallback = f"{(base or 'model').split('/')[-1]}-{one_line(config.get('method') or 'es')}"
    return {
        "name": one_line(repo_id.split("/")[-1] if repo_id else fallback, 96),
        "method": method,
        "base": base,
        "dataset": shown_name(dataset_name) if dataset_name else None,
        "settings": {k: settings[k] for k in (*method.settings, *SETTINGS) if settings.get(k) is not None},
        "dtype": settings.get("dtype", "float32"),
        "frozen": _frozen(settings.get("frozen_adapters")),
    }


@cache
def _template() -> Template:
    """The body's template. Whatever it prints is escaped, except what the functions below have made as Markdown."""
    environment = Environment(
        loader=PackageLoader("es_trl.hub", ""),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else Markup(md_escape(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made_here: dict[str, Callable[..., str | None]] = {
        "number": number, "percent": percent, "interval": interval, "whole": whole, "duration": duration, "two": _two,
        "scores_table": scores_table, "differences_table": differences_table, "judge_table": judge_table,
    }  # fmt: skip
    environment.globals |= {name: _markup(function) for name, function in made_here.items()}
    environment.filters |= {"literal": _markup(literal), "is_hub_id": is_hub_id, "listed": _listed}
    return environment.get_template("card.md.j2")


def _markup(function: Callable[..., str | None]) -> Callable[..., Markup]:
    def call(*args: Any, **kwargs: Any) -> Markup:
        return Markup(function(*args, **kwargs) or "")

    return call


def _findings(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """What the evaluation says of the adapter against the base at equal steps."""
    found: dict[str, Any] = evaluation or {"rows": ()}
    roles = found.get("gap_closure_rows")
    pair = (roles["model"], roles["base"]) if roles else None

    def of_pair(name: str) -> list[dict[str, Any]]:
        return [entry for entry in found.get(name, ()) if (entry["row"], entry["against"]) == pair]

    judged = [entry for entry in of_pair("paired_judge") if entry["ci_low"] is not None]
    worse = [e for e in judged if (e["ci_low"] > 0 if e["metric"] == "frechet_distance" else e["ci_high"] < 0)]
    return {
        "roles": roles,
        "against_base": of_pair("paired"),
        "means": {row["name"]: row["rewards"] for row in found["rows"]},
        "judge_losses": [{**entry, "name": METRICS[entry["metric"]].partition(" (")[0]} for entry in worse],
        "missing": sum(reward["missing"] for row in found["rows"] for reward in row["rewards"].values()),
    }


def _snippet(info: dict[str, Any], base_model: str | None, base: str | None, prompts: Sequence[str]) -> dict[str, Any]:
    """What the section "Use it" fills in: plain diffusers, called the way the adapter was trained."""
    keywords = {k: v for k, v in info.items() if k not in NOT_OF_THE_CALL and v is not None}
    if info.get("pipeline") == "SanaSprintPipeline" and keywords.get("num_inference_steps") != 2:
        keywords.setdefault("intermediate_timesteps", None)  # the pipeline's default raises for any other number
    shipped = base_model in assets.SHIPPED
    source = base or "base-model"
    if not shipped and not is_hub_id(base_model):
        source = re.sub(r"[^\w. -]", "_", one_line(source, 96))
    prompt = next((text for text in prompts if _PLAIN.fullmatch(text)), "a red cat")
    return {"keywords": keywords, "shipped": shipped, "source": source, "prompt": prompt}


def _frozen(adapters: Sequence[str] | None) -> list[tuple[str, float]]:
    """The LoRAs that drew beside the trained one, with their scales; of local files only the name."""
    found = []
    for text in adapters or ():
        match = re.fullmatch(r"(.+)=([-+.\deE]+)", text)
        name, scale = (match[1], float(match[2])) if match else (text, 1.0)
        found.append((name if is_hub_id(name) else name.replace("\\", "/").rstrip("/").rpartition("/")[2], scale))
    return found


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


def literal(value: Any) -> str:
    """Python source of a value, strings in double quotes where that needs no escapes."""
    source = repr(value)
    return f'"{value}"' if isinstance(value, str) and source == f"'{value}'" and '"' not in value else source


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _is_web_page(url: str) -> bool:
    return bool(re.fullmatch(r"https://[\w.~/%-]+", url))
