"""The few lines that draw with a published adapter, the way it was trained to be called."""

import re
from collections.abc import Sequence
from typing import Any

from .. import assets
from .base_model import is_hub_id, shown_name
from .escaping import one_line


# What `PipelineAdapter.describe` says beside the keywords of the call.
NOT_OF_THE_CALL = {"pipeline", "es_space", "lora_rank", "lora_alpha", "lora_target_modules"}
_PLAIN = re.compile(r"[\w ,.'-]{1,120}")


def call_keywords(adapter_info: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the pipeline call that the adapter was trained with, from `PipelineAdapter.describe`."""
    keywords = {k: v for k, v in adapter_info.items() if k not in NOT_OF_THE_CALL and v is not None}
    if adapter_info.get("pipeline") == "SanaSprintPipeline" and keywords.get("num_inference_steps") != 2:
        keywords.setdefault("intermediate_timesteps", None)  # the pipeline's default raises for any other number
    return keywords


def usage_section(
    adapter_info: dict[str, Any],
    config: dict[str, Any],
    base_model: str | None,
    repo_id: str | None,
    prompts: Sequence[str] = (),
    revision: str | None = None,
) -> str:
    """
    The section "Use it": loads base and adapter in plain diffusers and draws one picture.

    Args:
        adapter_info (`dict`): From [`~es_trl.pipelines.PipelineAdapter.describe`].
        config (`dict`): As for [`~es_trl.hub.card.model_card`]; its `dtype` is used.
        base_model (`str`, *optional*): Shipped name, Hub id or folder.
        repo_id (`str`, *optional*): Hub repository of the adapter; `None` loads from the current folder.
        prompts (`Sequence[str]`, *optional*): The first plain one is drawn.
        revision (`str`, *optional*): Branch of the repository, if not `main`.
    """
    pipeline = adapter_info.get("pipeline", "DiffusionPipeline")
    prompt = next((text for text in prompts if _PLAIN.fullmatch(text)), "a red cat")
    dtype = config.get("config", {}).get("dtype", "float32")
    shipped = base_model in assets.SHIPPED
    name = shown_name(base_model) if base_model else "base-model"
    name = name if shipped or is_hub_id(base_model) else re.sub(r"[^\w. -]", "_", one_line(name, 96))
    source = f"resolve({_literal(name)})" if shipped else _literal(name)
    precision = "" if dtype == "float32" else f", dtype=torch.{dtype}"
    keywords = "".join(f"    {name}={_literal(value)},\n" for name, value in call_keywords(adapter_info).items())
    weights = _literal(repo_id or ".") + (f", revision={_literal(revision)}" if repo_id and revision else "")
    notes = []
    if not repo_id:
        notes.append('`"."` is this folder: start Python here, or give its path.')
    if shipped:
        notes.append(f"The base model `{base_model}` ships with es_trl; `resolve` gives its folder.")
    elif base_model and not is_hub_id(base_model):
        notes.append("The base model was a local folder: put in where it lies on your machine.")
    notes.append("There is no trigger word.")
    return f"""\
## Use it

```python
import torch
from diffusers import {pipeline}
{"from es_trl.assets import resolve" + chr(10) if shipped else ""}
device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = {pipeline}.from_pretrained({source}{precision}).to(device)
pipe.load_lora_weights({weights}, use_safetensors=True)
image = pipe(
    {_literal(prompt)},
{keywords}    generator=torch.Generator("cpu").manual_seed(0),
).images[0]
image.save("image.png")
```

{" ".join(notes)}"""


def _literal(value: Any) -> str:
    """Python source of a value, strings in double quotes where that needs no escapes."""
    source = repr(value)
    return f'"{value}"' if isinstance(value, str) and source == f"'{value}'" and '"' not in value else source
