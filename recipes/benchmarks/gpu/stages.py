"""The stages of `run.py`: what is asked of a card, one function an item. Each returns figures as plain data."""

import contextlib
import gc
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import throughput
import torch
from build_random_sana_sprint import build
from peak_memory import peak_megabytes
from true_shape import SHAPES

import es_trl
from es_trl.cli import commands
from es_trl.es import NoiseBank
from es_trl.pipelines import CallSettings, load_pipeline, verify_population_forward


ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["a red apple", "two blue cats", "a green frog", "a pink dog"]
SPACES = ("lora", "lora_b", "lora_xs", "weight")


@dataclass
class Place:
    """Where to measure: `"cuda"`, or `"cpu"` for a rehearsal, in which everything is as small as it goes."""

    device: str
    rehearse: bool
    folder: Path = Path("outputs/gpu")  # of what an item leaves for others


@dataclass
class Item:
    """One thing to find out; `seconds` is how long it may take on a card, model included."""

    name: str
    seconds: int
    run: Callable[[Place], dict]


def redness(images, **_):
    return [float(np.asarray(image.convert("RGB"))[..., 0].mean()) / 255 for image in images]


def trainer_of(place: Place, folder: str, method: str = "ES", model="tiny-sana-sprint", **settings):
    """A trainer that writes nothing but what a setting asks for."""
    quiet = {"sample_steps": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    small = {"max_steps": 2, "prompts_per_step": 2, "use_cpu": place.device == "cpu", "log_level": "error"}
    if place.rehearse and method == "ES":
        small |= {"sigma": 0.05}  # the demo finds its own
    trainer = getattr(es_trl, f"{method}Trainer")
    config = trainer.config_class(output_dir=folder, **(quiet | small | settings))
    return trainer(model, redness, args=config, train_dataset=PROMPTS)


def theta_after(place: Place, folder: str, resume: str | None = None, **settings) -> dict[str, torch.Tensor]:
    trainer = trainer_of(place, folder, population_size=4, max_sequence_length=16, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.detach().cpu().clone() for name, value in trainer.adapter.theta.items()}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---- suite: is it right on a card ----


def fused_is_merged(place: Place, space: str, dtype: str) -> dict:
    pipe = load_pipeline("tiny-sana-sprint", getattr(torch, dtype)).to(place.device)
    settings = CallSettings(num_inference_steps=1, guidance_scale=2.0, max_sequence_length=16)
    check = verify_population_forward(pipe, es_space=space, settings=settings)
    return {"largest difference": f"{check.max_difference:.2g}", "spread of members": f"{check.spread:.2g}",
            "fused": check.fused}  # fmt: skip


def compiled_is_eager(place: Place) -> dict:
    from torch._dynamo.utils import counters

    with tempfile.TemporaryDirectory() as folder:
        eager = theta_after(place, f"{folder}/eager")
        counters.clear()
        compiled = theta_after(place, f"{folder}/compiled", compile_denoiser=True)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return {"difference of theta": f"{difference(eager, compiled):.2g}", "graphs": graphs, "graph breaks": breaks}


def resumed_is_uninterrupted(place: Place) -> dict:
    saving = {"save_strategy": "steps", "save_steps": 1}
    with tempfile.TemporaryDirectory() as folder:
        whole = theta_after(place, f"{folder}/whole", **saving)
        resumed = theta_after(place, f"{folder}/resumed", resume=f"{folder}/whole/checkpoint-1", **saving)
    return {"bit-identical": all(torch.equal(whole[name], resumed[name]) for name in whole)}


def noise_is_that_of_a_cpu(place: Place) -> dict:
    bank = NoiseBank(0, {"layer": (96, 64)})
    there, here = (bank.draw(3, range(4), device=device)["layer"] for device in (place.device, "cpu"))
    return {"bit-identical": torch.equal(there.U.cpu(), here.U) and torch.equal(there.V.cpu(), here.V)}


def first_ratio_of_grpo(place: Place, dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(
            place, folder, "GRPO", max_steps=1, dtype=dtype, max_sequence_length=16, num_generations=4
        )
        trainer.train()
    log = next(log for log in trainer.state.log_history if "policy/ratio" in log)
    return {"ratio": log["policy/ratio"], "largest deviation from 1": f"{log['policy/ratio_deviation']:.2g}"}


def suite(place: Place) -> list[Item]:
    spaces = SPACES[:1] if place.rehearse else SPACES
    dtypes = ("float32",) if place.rehearse else ("float32", "bfloat16")
    items = [
        Item(f"fused = merged, {space}, {dtype}", 20, partial(fused_is_merged, space=space, dtype=dtype))
        for space in spaces
        for dtype in dtypes
    ]
    items += [Item(f"GRPO's first ratio, {d}", 20, partial(first_ratio_of_grpo, dtype=d)) for d in dtypes]
    items += [Item("resumed = uninterrupted", 30, resumed_is_uninterrupted)]
    items += [Item("noise = that of a CPU", 5, noise_is_that_of_a_cpu)]
    return items if place.rehearse else [*items, Item("compiled = eager", 120, compiled_is_eager)]


# ---- speed: a fused population against plain inference with the adapter loaded ----


def setting_of(place: Place, model: str, size: int, members: int, compiled: bool) -> throughput.Setting:
    if place.rehearse:
        return throughput.Setting("tiny", "lora", 2 * members, 1, members)
    return throughput.Setting(
        model, "lora", max(members, 16), 1, members, dtype="bfloat16", size=size, compiled=compiled
    )


def speed_of(place: Place, model: str, size: int, members: int, compiled: bool) -> dict:
    found = throughput.measure_speed(
        setting_of(place, model, size, members, compiled), repeats=1 if place.rehearse else 5
    )
    ratio, images = found["throughput_ratio"], found["images_per_second"]
    return {"fused / plain": ratio["median"], "least": ratio["min"], "most": ratio["max"],
            "images per second, plain": images["plain"], "fused": images["fused"]}  # fmt: skip


def profile(place: Place, model: str, size: int, members: int) -> dict:
    """Where the time of a fused draw goes, beside plain: launches, and the share of the five longest kernels."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if place.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    ways = throughput.drawing_ways(setting_of(place, model, size, members, compiled=False))
    found = {}
    for name in ("plain", "fused"):
        ways[name]()
        with torch.profiler.profile(activities=activities) as record:
            ways[name]()
            if place.device == "cuda":
                torch.cuda.synchronize()
        events = record.key_averages()
        key = "self_device_time_total" if place.device == "cuda" else "self_cpu_time_total"
        total = sum(getattr(event, key) for event in events) or 1
        longest = sorted(events, key=lambda event: getattr(event, key), reverse=True)[:5]
        launches = sum(event.count for event in events if event.key in ("cudaLaunchKernel", "cuLaunchKernel"))
        found[f"{name}: launches"] = launches
        found[f"{name}: longest"] = "; ".join(f"{e.key[:40]} {getattr(e, key) / total:.0%}" for e in longest)
    return found


def speed(place: Place) -> list[Item]:
    if place.rehearse:
        return [Item("tiny, 2 members", 60, partial(speed_of, model="tiny", size=64, members=2, compiled=False)),
                Item("profile of tiny", 60, partial(profile, model="tiny", size=64, members=2))]  # fmt: skip
    items = []
    for model, size, members in (
        [("sana-0.6b", 512, m) for m in (1, 4, 16, 64)]
        + [("sana-1.6b", 512, m) for m in (1, 4, 16, 64)]
        + [("sana-1.6b", 1024, m) for m in (1, 4, 8)]
    ):
        for compiled in (False, True) if members in (1, 16) and size == 512 else (False,):
            name = f"{model}, {size} px, {members} members per forward" + ", compiled" * compiled
            run = partial(speed_of, model=model, size=size, members=members, compiled=compiled)
            items.append(Item(name, 150 if compiled else 60, run))
    run = partial(profile, model="sana-1.6b", size=512, members=16)
    return [*items, Item("profile of sana-1.6b, 512 px, 16 members", 90, run)]


# ---- memory: each method on the same model, against drawing alone ----

METHODS = {
    "inference": {},
    "ES": {"population_size": 16, "members_per_forward": 8},
    "GRPO": {"num_generations": 8, "images_per_forward": 8, "images_per_backward": 2},
    "DiffusionDPO": {"images_per_forward": 8, "images_per_backward": 2},
}


def model_of(place: Place, model: str, **change):
    if place.rehearse:
        return load_pipeline("tiny-sana-sprint")
    with torch.device(place.device):
        return build(model=model, **change)


def memory_of(place: Place, method: str, model: str, size: int) -> dict:
    """Peak memory and seconds per image of two steps; `inference` draws as many images in the same batches."""
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call = {"max_sequence_length": 16} if place.rehearse else {"height": size, "width": size, "dtype": "bfloat16"}
    pipe, settings = model_of(place, model), {} if place.rehearse else METHODS[method]
    if place.rehearse and method == "ES":
        settings = {"population_size": 4}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(place, folder, "ES" if method == "inference" else method, pipe, **call, **settings)
        trainer.prepare_prompts(PROMPTS)
        began = time.perf_counter()
        if method == "inference":
            images = 2 if place.rehearse else 32
            for _ in range(0, images, 8):
                rows = min(images, 8)
                generators = [torch.Generator().manual_seed(i) for i in range(rows)]
                trainer.adapter.generate(PROMPTS[:1] * rows, generators)
        else:
            trainer.train()
            images = trainer.images_drawn
        seconds = time.perf_counter() - began
    return {"peak GB": round(peak_megabytes(place.device) / 1000, 2), "seconds per image": round(seconds / images, 4)}


def memory(place: Place) -> list[Item]:
    sizes = [("tiny", 64)] if place.rehearse else [("sana-1.6b", 512), ("sana-1.6b", 1024)]
    return [
        Item(f"{method}, {model}, {size} px", 90, partial(memory_of, method=method, model=model, size=size))
        for model, size in sizes
        for method in METHODS
    ]


# ---- quantised: bases in fewer bits, where their libraries are there ----

WAYS = {
    "int8": ("torchao.quantization", "Int8WeightOnlyConfig"),
    "fp8": ("torchao.quantization", "Float8WeightOnlyConfig"),
    "nf4": ("bitsandbytes.nn", "Linear4bit"),
}


def quantised_step(place: Place, way: str) -> dict:
    """One ES step on the base with its Linear layers quantised: peak memory and seconds per image."""
    module, name = WAYS[way]
    try:
        tool = getattr(importlib.import_module(module), name)
    except ImportError:
        return {"not installed": module.partition(".")[0]}
    pipe = model_of(place, "sana-1.6b")
    if way == "nf4":
        to_nf4(pipe.transformer, tool)
        pipe.transformer.to(place.device)
    else:
        from torchao.quantization import quantize_

        quantize_(pipe.transformer, tool())
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call = {"max_sequence_length": 16} if place.rehearse else {"height": 512, "width": 512, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "es_space": "lora",
            "population_size": 4 if place.rehearse else 16,
            "members_per_forward": 4 if place.rehearse else 8,
        }
        trainer = trainer_of(place, folder, "ES", pipe, max_steps=1, **call, **settings)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return {"peak GB": round(peak_megabytes(place.device) / 1000, 2),
            "seconds per image": round(seconds / trainer.images_drawn, 4)}  # fmt: skip


def to_nf4(model: torch.nn.Module, kind: type) -> None:
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear:
            new = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4",
                       compute_dtype=layer.weight.dtype)  # fmt: skip
            new.load_state_dict({key: value.cpu() for key, value in layer.state_dict().items()})
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)


def quantised(place: Place) -> list[Item]:
    return [Item(way, 90, partial(quantised_step, way=way)) for way in (["int8"] if place.rehearse else WAYS)]


# ---- models: other models of true shape, one ES step each ----


def step_of(place: Place, name: str) -> dict:
    """Peak memory and seconds per image of an ES step, and what `es-trl dry-run --gpu` counts for that config."""
    shape, es = SHAPES[name], {"population_size": 4, "members_per_forward": 4, "prompts_per_step": 1, "max_steps": 1}
    call = shape.call | {"dtype": "bfloat16", "use_cpu": place.device == "cpu"}
    if place.rehearse:
        call |= {"num_inference_steps": 2, "dtype": "float32"} | shape.small
    with tempfile.TemporaryDirectory() as folder:
        model, told = Path(folder, "model"), io.StringIO()
        shape.pipeline(place.rehearse, place.device).save_pretrained(model)
        settings = {"model_name_or_path": model, "reward_funcs": "jpeg_compressibility", "dataset_name": "tiny-train",
                    "sample_steps": 0, "output_dir": Path(folder, "run")} | es | call  # fmt: skip
        words = [w for k, v in settings.items() for w in (f"--{k}", json.dumps(v) if isinstance(v, dict) else str(v))]
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = commands.main(["dry-run", "--gpu", "1000", *words])
        counted = re.search(r"^fits +([0-9.]+) of", told.getvalue(), re.MULTILINE)
        if code or counted is None:
            raise RuntimeError(f"es-trl dry-run: exit code {code}: {told.getvalue()[-300:]}")
        fresh_peak(place)
        trainer = trainer_of(place, str(Path(folder, "run")), "ES", str(model), **es | call)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return {"peak GB": round(peak_megabytes(place.device) / 1000, 2), "counted GB": float(counted[1]),
            "seconds per image": round(seconds / trainer.images_drawn, 3)}  # fmt: skip


def fresh_peak(place: Place) -> None:
    gc.collect()
    if place.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def models(place: Place) -> list[Item]:
    return [Item(f"{name}, {shape.parameters} B", 240, partial(step_of, name=name)) for name, shape in SHAPES.items()]


# ---- small: the model that ships with es_trl, in minutes ----


def recipe_of(place: Place, seed: int, config: str) -> dict:
    """A whole recipe: train, and compare with the base; the gain is the trained reward's, on held-out prompts."""
    small = ["--max_steps", "1", "--population_size", "4", "--prompts_per_step", "2", "--max_test_prompts", "2",
             "--max_eval_prompts", "2", "--use_cpu", "true", "--sample_steps", "0"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recipes/es_sana.py"), "--config", config, "--output_dir", folder]
        command += ["--seed", str(seed), "--report_to", "none", *(small if place.rehearse else [])]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:])
        rows = {row["name"]: row for row in json.loads(Path(folder, "eval.json").read_text())["rows"]}
    base, adapter = (rows[f"{name}@1"]["rewards"] for name in ("base", "adapter"))
    gains = {f"gain of {name}": round(adapter[name]["mean"] - base[name]["mean"], 4) for name in adapter}
    return {"minutes": round(seconds / 60, 2)} | gains


def small_model(place: Place) -> list[Item]:
    seeds = [0] if place.rehearse else [0, 1, 2]
    config = "recipes/tiny_sana_sprint/es/config.yaml"
    items = [Item(f"demo, seed {s}", 120, partial(recipe_of, seed=s, config=config)) for s in seeds]
    if place.rehearse:
        return items
    config = "recipes/tiny_sana_sprint/es/config_long.yaml"
    return items + [Item(f"long budget, seed {s}", 500, partial(recipe_of, seed=s, config=config)) for s in seeds]


STAGES: dict[str, Callable[[Place], list[Item]]] = {
    "suite": suite,
    "speed": speed,
    "memory": memory,
    "quantised": quantised,
    "models": models,
    "small": small_model,
}
ASKS = {
    "suite": "fused = merged in every space, fp32 and bf16; compiled = eager; GRPO's first ratio; resume bit by bit",
    "speed": "throughput of a fused population against plain inference with the adapter loaded",
    "memory": "memory and time per image: drawing, ES, GRPO, DPO",
    "quantised": "an ES step on int8, fp8 and nf4 bases",
    "models": "an ES step of Z-Image, FLUX.2 klein and SDXL of true shape, beside what the dry run counts",
    "small": "the demo and the long budget of the shipped model, three seeds",
}
