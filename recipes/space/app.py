# /// script
# requires-python = ">=3.11"
# dependencies = ["es-trl", "gradio>=6"]
# ///
"""Base against adapter, side by side: the same prompt and noise, and a slider for the strength of the LoRA.

    python recipes/space/app.py outputs/demo          # a run folder
    python recipes/space/app.py user/adapter          # an adapter on the Hub

As a Space, put this folder into it and set the variable ADAPTER to the adapter's Hub id. The adapter's own settings
(`es_config.json`) say which base it belongs to and how that is called; BASE_MODEL overrides the base.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from PIL import Image

from es_trl.hub import find_adapter
from es_trl.pipelines import CallSettings, load_pipeline


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
EXAMPLES = ["four red trees", "a yellow house on a pink background", "three gray foxes"]

try:  # ZeroGPU lends a GPU for the length of one call
    from spaces import GPU as on_gpu
except ImportError:

    def on_gpu(function):
        return function


class Painter:
    """Draws a prompt with and without the adapter from the same noise."""

    def __init__(self, adapter: str, base_model: str | None = None, revision: str | None = None):
        file = Path(find_adapter(adapter, revision))
        about = file.with_name("es_config.json")
        saved = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        config = saved.get("config", {})
        self.adapter, self.base_model = adapter, base_model or saved.get("base_model")
        if not self.base_model:
            raise ValueError(f"{adapter!r} has no es_config.json: name its base model in BASE_MODEL.")
        names = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")
        known = {name: config[name] for name in names if config.get(name) is not None}
        instruction = config.get("complex_human_instruction")
        self.settings = CallSettings(
            **known, complex_human_instruction=instruction, extra=config.get("pipeline_kwargs") or {}
        )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES.get(config.get("dtype")) if self.device == "cuda" else None
        self.pipe = load_pipeline(self.base_model, dtype).to(self.device)
        self.pipe.load_lora_weights(
            str(file.parent), weight_name=file.name, adapter_name="trained", use_safetensors=True
        )
        self.pipe.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, scale: float) -> tuple[Image.Image, Image.Image]:
        """The base's picture and the adapter's; at `scale` 0 they are the same."""
        self.pipe.set_adapters("trained", float(scale))
        self.pipe.disable_lora()
        base = self._picture(prompt, seed)
        self.pipe.enable_lora()
        return base, self._picture(prompt, seed)

    def _picture(self, prompt: str, seed: int) -> Image.Image:
        call = self.settings.call_kwargs(self.pipe) | self.settings.text_kwargs(self.pipe)
        image = self.pipe(prompt, **call, generator=torch.Generator("cpu").manual_seed(int(seed))).images[0]
        factor = max(1, 384 // max(image.size))  # small models would be stamps on the page
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.LANCZOS)


def build(painter: Painter):
    """The page."""
    import gradio as gr

    @on_gpu
    def draw(prompt, seed, scale):
        if not str(prompt).strip():
            raise gr.Error("Write a prompt first.")
        return painter.draw(str(prompt)[:1000], seed, scale)

    steps = painter.settings.num_inference_steps or "default"
    with gr.Blocks(title="Base and adapter") as page:
        gr.Markdown("# Base and adapter")
        gr.Markdown(
            f"Base **{Path(painter.base_model).name}**, adapter **{Path(painter.adapter).name}**, steps: {steps}. "
            "Both pictures start from the same noise; only the LoRA differs."
        )
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(EXAMPLES[0], label="Prompt", scale=4, min_width=300)
            button = gr.Button("Draw", variant="primary", scale=1, min_width=100)
        with gr.Row():
            base = gr.Image(label="Base", format="png", interactive=False)
            adapter = gr.Image(label="Adapter", format="png", interactive=False)
        with gr.Row(equal_height=True):
            scale = gr.Slider(
                0.0, 2.0, 1.0, step=0.05, label="Strength of the adapter (0 is the base, 1 as trained)", scale=4
            )
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, scale=1, min_width=100)
            new_seed = gr.Button("New seed", scale=1, min_width=100)
        gr.Examples(EXAMPLES, prompt)
        inputs, outputs = [prompt, seed, scale], [base, adapter]
        button.click(draw, inputs, outputs)
        prompt.submit(draw, inputs, outputs)
        scale.release(draw, inputs, outputs)
        new_seed.click(lambda: random.randrange(2**31), None, seed).then(draw, inputs, outputs)
        page.load(draw, inputs, outputs)
    return page


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("ADAPTER")
    if not name:
        sys.exit("Name the adapter: python app.py FOLDER_OR_HUB_ID, or the variable ADAPTER of the Space.")
    build(Painter(name, os.environ.get("BASE_MODEL"), os.environ.get("REVISION"))).launch()
