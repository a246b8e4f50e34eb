"""
Stage `size`: a model ten times the shipped one, made by its recipe; then ES and GRPO on both at equal images.

Both are trained and judged by the scorers that ship, which see every picture at 64 pixels: the reward is one and the
same function, so that gains can be compared, and no scorer of another size has to be trusted. What only 128 pixels
show counts for neither method.
"""

import contextlib
import importlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from head_to_head import images_per_step
from PIL import Image
from stages import ROOT, Item, Place

import es_trl
from es_trl.evaluation import EvaluationRow, evaluate
from es_trl.pipelines import CallSettings, load_pipeline
from es_trl.rewards import RewardSet


sys.path.append(str(ROOT / "recipes" / "tiny_sana"))  # scripts beside each other, not a package

SHIPPED, LARGE = "tiny-sana-sprint", "64m"
SCORERS = ["tiny-pickscore", "tiny-clip-heldout"]  # what is optimised, and the judge
CALL = {"num_inference_steps": 1, "guidance_scale": 2.0, "max_sequence_length": 16}
MIXES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
PART = 240  # seconds: two parts fit into nine minutes


@dataclass
class Training:
    """A stage of recipes/tiny_sana: its module, checkpoint, steps and settings; `parts`, at most, of four minutes."""

    module: str
    checkpoint: str
    steps: int
    parts: int
    words: str
    rehearsed: str = "--shards 1 --shard 8"


# Learning rates fall with the width. None of these has been tried.
TRAININGS = {
    "autoencoder": Training("train_vae", "vae", 6000, 3, "--batch-size 64 --learning-rate 1e-3", ""),
    "teacher": Training("train_teacher", "teacher", 10000, 5, "--batch-size 256 --learning-rate 5e-4 --shards 64"),
    "student": Training("distill", "student", 4000, 3, "--batch-size 256 --learning-rate 3e-4 --shards 16"),
}
ASKED = "a model of 64 M parameters and 128 px, trained there; ES against GRPO on it and on the shipped one"


def runs_of(place: Place) -> Path:
    return place.folder / "size"


def steps_of(place: Place, name: str) -> int:
    return 1 if place.rehearse else TRAININGS[name].steps


def checkpoint_of(place: Place, name: str) -> Path:
    return runs_of(place) / f"{TRAININGS[name].checkpoint}.safetensors"


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """A stage of the recipe sets threads and attention kernels for a process of its own."""
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        torch.backends.cuda.enable_flash_sdp(flash)


def trained_for_a_part(place: Place, name: str) -> dict:
    """Goes on from the checkpoint for four minutes or to the end, whichever comes first."""
    from common import finished_steps

    training, steps, path = TRAININGS[name], steps_of(place, name), checkpoint_of(place, name)
    for earlier in list(TRAININGS)[: list(TRAININGS).index(name)]:
        done = finished_steps(checkpoint_of(place, earlier))
        if done < steps_of(place, earlier):
            raise RuntimeError(f"the {earlier} has {done} of {steps_of(place, earlier)} steps")
    before, began = finished_steps(path), time.perf_counter()
    if before < steps:
        words = ["--runs", str(runs_of(place)), "--device", place.device, "--steps", str(steps)]
        words += ["--seconds", str(PART)]
        if place.rehearse:
            words += ["--size", "rehearsal", "--workers", "1", "--batch-size", "2", *training.rehearsed.split()]
        else:
            words += ["--size", LARGE, "--workers", "8", *training.words.split()]
        with as_it_was():
            importlib.import_module(training.module).main(words)
    done = finished_steps(path)
    speed = (done - before) / (time.perf_counter() - began)
    return {"steps": f"{done} of {steps}"} | ({"steps per second": round(speed, 1)} if done > before else {})


def means(place: Place, pipe, steps: list[int]) -> list[float]:
    """The trained reward of a base on the validation prompts, for each number of steps."""
    result = evaluate(
        pipe, "tiny-validation", SCORERS[:1], steps=steps, settings=CallSettings(**CALL), batch_size=64, n_keep=0,
        device=place.device, max_prompts=2 if place.rehearse else None,
    )  # fmt: skip
    return [round(result.mean(f"base@{count}", SCORERS[0]), 3) for count in steps]


def mixed(place: Place) -> dict:
    """
    Writes the mix of teacher and student whose one-step pictures score most like the shipped model's.

    Both then start from the same score; how far two steps and real renderings are above it says what there is to gain.
    """
    from mix import build_pipeline
    from models import SIZES
    from world import render_prompts

    size = SIZES["rehearsal" if place.rehearse else LARGE]
    build = partial(build_pipeline, runs_of(place), size=size, device=place.device)
    shipped = means(place, load_pipeline(SHIPPED), [1, 2])
    scores = {mix: means(place, build(mix).to(torch.bfloat16), [1, 2]) for mix in MIXES[3:4] * place.rehearse or MIXES}
    mix = min(scores, key=lambda mix: abs(scores[mix][0] - shipped[0]))
    pipe = build(mix).to(torch.bfloat16)
    pipe.save_pretrained(runs_of(place) / "pipeline")
    prompts = es_trl.load_prompts("tiny-validation", max_prompts=2 if place.rehearse else None)["prompt"]
    real = [Image.fromarray(picture) for picture in render_prompts(prompts, 0, size.side)]
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    return {
        "million parameters": round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1),
        "mix": mix,
        "reward at one and two steps": scores[mix],
        "the shipped model's": shipped,
        "real renderings'": round(float(RewardSet(SCORERS[0])(prompts, real).mean()), 3),
        "at other mixes": {str(other): found for other, found in scores.items() if other != mix},
    }


def gains_of(place: Place, method: str, model: str, seed: int) -> dict:
    """A method at its defaults for 4,096 images; its gains on prompts with combinations that training never showed."""
    name = SHIPPED if model == "6m" else str(runs_of(place) / "pipeline")
    if model != "6m" and not Path(name, "model_index.json").exists():
        raise RuntimeError("there is no pipeline yet: its item has not been finished")
    trainer_class = getattr(es_trl, f"{method}Trainer")
    speed = {"ES": {"members_per_forward": 64}, "GRPO": {"images_per_forward": 64, "images_per_backward": 64}}[method]
    settings = (
        CALL | speed | {"seed": seed, "use_cpu": place.device == "cpu", "report_to": "none", "disable_tqdm": True}
    )
    settings |= {"sample_steps": 0, "save_strategy": "no", "log_level": "error", "logging_steps": 8}
    if place.rehearse:
        settings |= {"prompts_per_step": 2} | ({"population_size": 4} if method == "ES" else {"num_generations": 2})
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_class.config_class(output_dir=folder, **settings)
        config.max_steps = 1 if place.rehearse else 4096 // images_per_step(config)
        trainer = trainer_class(name, SCORERS[0], config, train_dataset="tiny-train")
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        result = evaluate(
            trainer.adapter, "tiny-test", SCORERS, seed=4321, images_per_prompt=2, batch_size=64, n_keep=0,
            rows=[EvaluationRow(row, adapter=row == "adapter", num_inference_steps=1) for row in ("base", "adapter")],
            max_prompts=2 if place.rehearse else 256,
        )  # fmt: skip
    gains = {f"gain of {s}": round(result.mean("adapter", s) - result.mean("base", s), 3) for s in SCORERS}
    return {"images": trainer.images_drawn, "seconds per image": round(seconds / trainer.images_drawn, 4)} | gains


def size(place: Place) -> list[Item]:
    items = []
    for name, training in TRAININGS.items():
        parts = 1 if place.rehearse else training.parts
        run = partial(trained_for_a_part, name=name)
        items += [Item(f"{name}, part {part} of {parts}", PART + 40, run) for part in range(1, parts + 1)]
    items += [Item("mix of teacher and student", 200, mixed)]
    return items + [
        Item(f"{method}, {model}, seed {seed}", 150, partial(gains_of, method=method, model=model, seed=seed))
        for seed in ([0] if place.rehearse else [0, 1, 2])
        for model in ([LARGE] if place.rehearse else ["6m", LARGE])
        for method in ("ES", "GRPO")
    ]
