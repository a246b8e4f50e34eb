"""
A recipe's model with random weights, in its true widths but with few blocks, to run the recipe where the real model
cannot be downloaded. It draws noise, so it proves nothing about learning.

    python recipes/benchmarks/true_widths.py z_image_turbo/es/config_12gb /tmp/z_image   # one small step of the recipe
    python recipes/benchmarks/true_widths.py --memory                                    # the table of docs/scale.md

A step has tiny rewards and prompts, few small pictures, and torchao's int8 in place of bitsandbytes, which needs a
GPU. The model stays in the folder. `--memory` draws with some of them (or goes backward), each in a process of its
own, and compares the memory that this took with what `es-trl dry-run --gpu` counts for the same shapes. Linux only.
"""

import argparse
import copy
import ctypes
import dataclasses
import gc
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from es_trl.cli import parse, plan_memory, prepare
from es_trl.es import make_generator
from es_trl.pipelines import CallSettings, DifferentiableForward, PipelineAdapter, build_pipeline, known_shapes
from es_trl.trainer import DiffusionTrainer, trainer_of


sys.path.insert(0, str(Path(__file__).parent))
from peak_memory import current_megabytes, peak_megabytes, training_megabytes  # noqa: E402


BLOCKS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers", "num_hidden_layers", "depth")
VOCABULARY = 2048  # of the small tokenizer, and room
SANA, Z_IMAGE = "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers", "Tongyi-MAI/Z-Image-Turbo"

# What cannot be had here: the model, prompts and rewards of the Hub, a GPU; and a run of a minute instead of hours.
SMALL = {
    "dataset_name": "tiny-train", "max_train_prompts": 4, "eval_dataset_name": "tiny-validation",
    "max_eval_prompts": 2, "reward_funcs": "tiny-pickscore", "eval_reward_funcs": "tiny-clip-heldout",
    "use_cpu": True, "height": 32, "width": 32, "max_steps": 1, "eval_steps": 1, "save_strategy": "no",
    "load_best_model_at_end": False, "num_sample_prompts": 2, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
SMALL_OF = {
    "es": {"population_size": 4, "prompts_per_step": 1, "sigma": 0.05},
    "grpo": {"num_generations": 2, "prompts_per_step": 1},
    "dpo": {"num_generations": 2, "prompts_per_step": 1, "noise_draws": 1},
}
INT8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}


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


def frozen_lora(pipe, path: Path) -> None:
    """Adds a LoRA as Lightning is one: on every attention layer, made elsewhere; and saves it."""
    name = next(name for name in pipe._lora_loadable_modules if hasattr(pipe, name) and "encoder" not in name)
    denoiser = getattr(pipe, name)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    tensors = {f"{name}.{key}": value.contiguous() for key, value in get_peft_model_state_dict(denoiser).items()}
    save_file(tensors, path)


def small_trainer(name: str, model: Path, output_dir: Path, **changes) -> DiffusionTrainer:
    """The trainer of a recipe as its file says, but for what is not here; a frozen LoRA is beside the `model`."""
    arguments, config = parse(args=["--config", name, "--use_cpu", "True"])
    pipeline = getattr(diffusers, known_shapes()[arguments.model_name_or_path]["pipeline"])
    known = inspect.signature(pipeline.__call__).parameters
    small = SMALL | SMALL_OF[arguments.method] | {"model_name_or_path": model, "output_dir": output_dir}
    if arguments.test_dataset_name:
        small["test_dataset_name"] = "tiny-test"
    if config.quantization_config:
        small["quantization_config"] = json.dumps(INT8)
    if config.frozen_adapters:
        small["frozen_adapters"] = Path(model, "frozen.safetensors")
    if "text_encoder_out_layers" in known:
        small["pipeline_kwargs"] = json.dumps({"text_encoder_out_layers": [0, 1, 2]})  # a text encoder has few here
    if "max_sequence_length" in known:
        small["max_sequence_length"] = 16
    words = [word for key, value in (small | changes).items() for word in (f"--{key}", str(value))]
    arguments, config = parse(args=["--config", name, *words])
    return prepare(trainer_of(arguments.method), arguments, config)


def one_step(name: str, folder: Path, blocks: int) -> dict:
    """Makes the model of a recipe, and goes through one step; what that was."""
    arguments, config = parse(args=["--config", name, "--use_cpu", "True"])
    torch.manual_seed(0)
    pipe = build_pipeline(few_blocks(arguments.model_name_or_path, blocks), getattr(torch, config.dtype))
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = sum(parameter.numel() for part in parts for parameter in part.parameters())
    pipe.save_pretrained(folder)
    if config.frozen_adapters:
        frozen_lora(pipe, folder / "frozen.safetensors")
    del pipe, parts
    gc.collect()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = small_trainer(name, folder, Path(output_dir), height=64, width=64)
        trainer.train()
        trainer.save_model()
    step = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return {
        "recipe": name, "million_weights": round(weights / 1e6), "reward": step["reward"],
        "grad_norm": step["grad_norm"], "peak_gb": round(peak_megabytes() / 1000, 1),
        "cpu_s": round(time.process_time()),
    }  # fmt: skip


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
        print(json.dumps(one_step(args.recipe, Path(args.folder), args.blocks)))


if __name__ == "__main__":
    main()
