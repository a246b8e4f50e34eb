"""
A recipe's model with random weights, in its true widths but with few blocks, to run the recipe where the real model
cannot be downloaded. It draws noise, so it proves nothing about learning.

    python recipes/benchmarks/true_widths.py z_image_turbo/es/config_12gb /tmp/z_image   # a folder to train on
    python recipes/benchmarks/true_widths.py --memory                                    # the table of docs/scale.md

`--memory` draws with some of them (or goes backward), each in a process of its own, and compares the memory that this
took with what `es-trl dry-run --gpu` counts for the same shapes. Linux only.
"""

import argparse
import copy
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig

from es_trl.cli import parse, plan_memory
from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, DifferentiableForward, PipelineAdapter, build_pipeline, known_shapes


sys.path.insert(0, str(Path(__file__).parent))
from peak_memory import current_megabytes, training_megabytes  # noqa: E402


BLOCKS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "num_hidden_layers", "depth")
VOCABULARY = 2048  # of the small tokenizer, and room
SANA, Z_IMAGE = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", "Tongyi-MAI/Z-Image-Turbo"


@dataclasses.dataclass
class Case:
    """One row: a model, how many blocks of each kind it has, and what is done with it."""

    model: str
    blocks: int
    images: int
    pixels: int
    dtype: str = "float32"
    backward: bool = False
    sliced: bool = False


CASES = {
    "Sana Sprint 0.6B, 4 images": Case(SANA, 2, 4, 256),
    "Sana Sprint 0.6B, 4 images, sliced": Case(SANA, 2, 4, 256, sliced=True),
    "Z-Image-Turbo, 2 images": Case(Z_IMAGE, 2, 2, 256, "bfloat16"),
    "Sana Sprint 0.6B, backward of 4 images": Case(SANA, 8, 4, 512, backward=True),
}


def few_blocks(model: str, blocks: int) -> dict:
    """The shapes of `model` with `blocks` of each kind of block, and a small vocabulary."""
    shapes = copy.deepcopy(known_shapes()[model])

    def reduce(config: dict) -> None:
        for key, value in config.items():
            if isinstance(value, dict):
                reduce(value)
            elif key in BLOCKS and isinstance(value, int):
                config[key] = min(value, blocks)
            elif key == "vocab_size":
                config[key] = VOCABULARY
            elif key == "deepstack_visual_indexes":
                config[key] = [0]
            elif key == "text_encoder_select_layers":
                config[key] = [i % blocks for i in range(len(value))]

    reduce(shapes["components"])
    return shapes


def save_shapes(pipe, folder: Path) -> None:
    """The configuration files of a pipeline, without its weights."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif hasattr(part, "config"):
            part.config.save_pretrained(folder / name)


def give_back_freed_memory() -> None:
    """Tells glibc to, at once: what it keeps for later would count as used."""
    for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL("libc.so.6").mallopt(setting, 65536)


def options_of(case: Case, folder: str) -> list[str]:
    """A config that draws, or goes backward, as `case` does."""
    method = "--method es --es_space lora --lora_rank 8 --population_size 8 --members_per_forward {n}"
    if case.backward:
        method = "--method grpo --images_per_forward 2 --images_per_backward {n}"
    return (
        f"--model_name_or_path {folder} --output_dir {folder}/run --reward_funcs jpeg_compressibility --dataset_name "
        f"tiny-train --use_cpu True --sample_steps 0 --num_inference_steps 1 --height {case.pixels} --width "
        f"{case.pixels} --max_sequence_length 16 --dtype {case.dtype} --vae_slicing {case.sliced} "
        f"{method.format(n=case.images)}"
    ).split()


def work_of(case: Case, adapter: PipelineAdapter):
    """What takes the memory."""
    prompts = ["a red fox beside a blue bird"] * case.images
    generators = [make_generator(0, "true_widths", i) for i in range(case.images)]
    call = adapter.settings.call_kwargs(adapter.pipe) | adapter.prompts.rows(prompts)

    def draw() -> None:
        with torch.no_grad():
            adapter.pipe(**call, generator=generators, output_type="pt")

    if not case.backward:
        return draw
    calls: list[tuple] = []
    handle = adapter.denoiser.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        adapter.pipe(**call, generator=generators, output_type="latent")
    handle.remove()

    def backward() -> None:
        with DifferentiableForward(adapter).enabled():
            output = adapter.denoiser(*calls[0][0], **calls[0][1])[0]
            output.float().square().mean().backward()

    return backward


def measure(name: str) -> dict:
    """GB that a case needed and that were counted, in this process."""
    give_back_freed_memory()
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        gc.collect()
        before = current_megabytes()
        torch.manual_seed(0)
        pipe = build_pipeline(few_blocks(case.model, case.blocks), getattr(torch, case.dtype))
        save_shapes(pipe, Path(folder))
        if case.sliced:
            pipe.vae.enable_slicing()
        settings = CallSettings(1, None, case.pixels, case.pixels, 16)
        adapter = PipelineAdapter(pipe, LoraConfig(r=8, lora_alpha=8), "lora", settings)
        gc.collect()
        weights = current_megabytes() - before
        grown = training_megabytes(work_of(case, adapter))
        plan = plan_memory(*parse(args=options_of(case, folder)))
    moments = [m for m in plan.moments if m.name.startswith("backward") == case.backward and m.name != "scoring"]
    peak = max(moments, key=lambda moment: moment.total)
    counted = {**peak.parts, "noise of its members": 0.0}
    activations = counted.pop("activations")
    return {"case": name, "pixels": case.pixels, "dtype": case.dtype, "when": peak.name,
            "measured": [weights / 1e3, grown / 1e3], "counted": [sum(counted.values()), activations]}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Measured against counted."""
    lines = ["| model in true widths, few blocks | pixels, dtype | measured, GB | counted, GB | off by |"]
    lines += ["|---|---|---:|---:|---:|"]
    for row in rows:
        both = [row["measured"], row["counted"]]
        texts = [f"{sum(pair):.2f} ({pair[0]:.2f} + {pair[1]:.2f})" for pair in both]
        off = 100 * (sum(row["counted"]) / sum(row["measured"]) - 1)
        lines.append(f"| {row['case']} | {row['pixels']}, {row['dtype']} | {texts[0]} | {texts[1]} | {off:+.0f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("recipe", nargs="?", help="a recipe's name")
    parser.add_argument("folder", nargs="?", help="where the pipeline is written")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--case", help="one of the measurements, in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case)))
    elif args.memory:
        rows = []
        for case in CASES:
            command = [sys.executable, __file__, "--case", case]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(rows))
    else:
        arguments, config = parse(args=["--config", args.recipe, "--use_cpu", "True"])
        shapes = few_blocks(arguments.model_name_or_path, args.blocks)
        build_pipeline(shapes, getattr(torch, config.dtype)).save_pretrained(args.folder)
        print(f"Saved to {args.folder}")


if __name__ == "__main__":
    main()
