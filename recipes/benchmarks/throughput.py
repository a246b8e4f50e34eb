"""
What a population costs: throughput ratio, step overhead and memory ratio as JSON. README.md has the definitions.

    python recipes/benchmarks/throughput.py
    python recipes/benchmarks/throughput.py --models tiny --spaces lora_xs --threads 1

Every repeat draws the same images three ways, in turn: with the plain diffusers pipeline and the adapter loaded, as a
fused population, and as members one after the other.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from build_random_sana_sprint import TRANSFORMERS, build
from diffusers import DiffusionPipeline, SanaSprintPipeline, SanaTransformer2DModel
from peak_memory import peak_megabytes
from PIL import Image

from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline


# Members, prompts, members per batch: the tiny model in batches like the demo, the wide one in few enough for a CPU.
SIZES = {
    "tiny": {"population_size": 32, "prompts": 4, "members_per_forward": 16},
    "wide": {"population_size": 8, "prompts": 2, "members_per_forward": 4},
}
PROMPTS = [f"{number} {colour} cats" for number in ("two", "three", "four") for colour in ("red", "blue", "green")]
CALL = {"num_inference_steps": 1, "guidance_scale": 2.0, "max_sequence_length": 16}
SIGMA = 0.05


@dataclass
class Setting:
    """One line of the table: a model, a search space, and how many images in which batches."""

    model: str
    es_space: str
    population_size: int
    prompts: int
    members_per_forward: int
    dtype: str = "float32"
    size: int | None = None  # height and width in pixels, where it is not the model's own
    compiled: bool = False  # the denoiser, in both

    @property
    def call(self) -> dict:
        return CALL | ({"height": self.size, "width": self.size} if self.size else {})

    @property
    def images(self) -> int:
        return self.population_size * self.prompts

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


def build_pipeline(model: str, dtype: str) -> DiffusionPipeline:
    """
    `tiny`: the shipped model. `wide`: its text encoder and VAE around random Sana blocks of width 1152. `sana-0.6b`,
    `sana-1.6b`: the true shapes with random weights, in bf16.
    """
    if model in TRANSFORMERS:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return build(model=model)
    pipe = load_pipeline("tiny-sana-sprint", getattr(torch, dtype))
    if model == "tiny":
        return pipe
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=pipe.vae.config.latent_channels,
        out_channels=pipe.vae.config.latent_channels,
        sample_size=16,  # 16 x 16 latents, 256 tokens
        patch_size=1,
        num_layers=2,
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
        caption_channels=pipe.text_encoder.config.hidden_size,
        mlp_ratio=2.5,
        guidance_embeds=True,
        guidance_embeds_scale=0.1,
        qk_norm="rms_norm_across_heads",
        interpolation_scale=None,
    )
    components = pipe.components | {"transformer": transformer.to(getattr(torch, dtype)).eval()}
    return SanaSprintPipeline(**components)


# ---- three ways to draw the same images ----


def drawing_ways(setting: Setting, sigma: float = SIGMA) -> dict[str, Callable[[], list[Image.Image]]]:
    """`plain`, `fused`, `one_by_one`: each draws all images of one step, `plain` with the adapter unperturbed."""
    from es_trl.es import NoiseBank, Population
    from es_trl.trainer.rollout import PopulationRollout, PromptBatch

    adapter = PipelineAdapter(
        build_pipeline(setting.model, setting.dtype), es_space=setting.es_space, settings=CallSettings(**setting.call)
    ).to(setting.device)
    torch.manual_seed(0)
    for parameter in adapter.theta.values():  # an adapter that does something, as after some training
        parameter.data.add_(torch.randn(parameter.shape).to(parameter), alpha=SIGMA)
    population = Population(setting.population_size)
    chunks = population.chunks(setting.members_per_forward)
    shapes = {site.name: tuple(site.theta.shape) for site in adapter.space.sites}
    factors = NoiseBank(0, shapes).draw(0, range(population.num_directions), device=setting.device)
    batch = PromptBatch(PROMPTS[: setting.prompts])
    plain = plain_drawing(setting, adapter)
    if setting.compiled:
        adapter.denoiser.compile(fullgraph=True)

    def draw_plain() -> list[Image.Image]:
        generators = [[batch.generator(j, 0, 0, 0) for _ in members for j in range(len(batch))] for members in chunks]
        return [image for row in generators for image in plain(batch.prompts * (len(row) // len(batch)), row)]

    def draw_population(members_per_forward: int) -> list[Image.Image]:
        rollout = PopulationRollout(adapter, None, population, sigma, members_per_forward, seed=0)
        chunks = population.chunks(members_per_forward)
        return [image for members in chunks for image in rollout.draw(members, batch, factors, step=0)]

    return {
        "plain": draw_plain,
        "fused": lambda: draw_population(setting.members_per_forward),
        "one_by_one": lambda: draw_population(1),
    }


def measure_speed(setting: Setting, repeats: int) -> dict:
    """Seconds of each way, interleaved; ratios are taken within a repeat, so that a busy machine hits both sides."""
    ways = drawing_ways(setting)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        order = list(ways)[repeat % 3 :] + list(ways)[: repeat % 3]
        for name in order:
            took = clock(ways[name], setting.device)
            if repeat:  # the first round warms caches and allocators up
                seconds[name].append(took)
    faster = {
        other: [slow / fast for slow, fast in zip(seconds[other], seconds["fused"], strict=True)]
        for other in ("plain", "one_by_one")
    }
    return {
        "throughput_ratio": spread(faster["plain"]),
        "speedup_over_one_by_one": spread(faster["one_by_one"]),
        "images_per_second": {n: round(setting.images / statistics.median(s), 2) for n, s in seconds.items()},
    }


def plain_drawing(setting: Setting, adapter: PipelineAdapter) -> Callable:
    """`draw(prompts, generators)` of a stock pipeline with this adapter loaded from its file; prompts encoded once."""
    pipe = build_pipeline(setting.model, setting.dtype).to(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_lora(folder)
        pipe.load_lora_weights(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if setting.compiled:
        pipe.transformer.compile(fullgraph=True)
    call = adapter.settings.call_kwargs(adapter.pipe)
    pipe.encode_prompt = adapter.prompts.stand_in(pipe.encode_prompt)

    def draw(prompts, generators):
        return pipe(**adapter.prompts.rows(prompts), generator=generators, **call).images

    return draw


def clock(work: Callable, device: str) -> float:
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(values: list[float]) -> dict:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


# ---- a training step ----


def train(setting: Setting, steps: int):
    """A few steps of `ESTrainer`, with a clock on what the Trainer does outside `training_step`."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from es_trl import ESConfig, ESTrainer

    class Clock(TrainerCallback):
        """Seconds of each step, and of what follows the gradient: optimizer, bounds on theta, schedule."""

        def __init__(self):
            self.step, self.optimizer = [], []

        def on_step_begin(self, args, state, control, **kwargs):
            self.step.append(time.perf_counter())

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.optimizer.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            for series in (self.step, self.optimizer):
                series[-1] = time.perf_counter() - series[-1]

    timing = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ESTrainer(
            model=build_pipeline(setting.model, setting.dtype),
            reward_funcs="jpeg_compressibility",
            args=ESConfig(
                output_dir=folder,
                max_steps=steps,
                population_size=setting.population_size,
                members_per_forward=setting.members_per_forward,
                prompts_per_step=setting.prompts,
                es_space=setting.es_space,
                sigma=SIGMA,
                dtype=setting.dtype,
                logging_steps=1,
                sample_steps=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                log_level="error",
                **CALL,
            ),
            train_dataset=PROMPTS[: setting.prompts],
            callbacks=[timing],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer, timing


def measure_overhead(setting: Setting, steps: int) -> dict:
    """Share of a step that goes into noise, gathering the scores, the estimate and the optimizer."""
    trainer, timing = train(setting, steps)
    logs = [log for log in trainer.state.log_history if "es/overhead" in log]
    shares = [
        (log["es/overhead"] * log["step_time"] + optimizer) / step
        for log, optimizer, step in zip(logs, timing.optimizer, timing.step, strict=True)
    ]
    seconds = round(statistics.median(timing.step), 3)
    return {"step_overhead": spread(shares[1:] or shares) | {"step_seconds": seconds}}


# ---- memory, each in a process of its own ----


def peak_of(what: str, setting: Setting) -> float:
    """MB that this process needed at most for two steps of training, or for as many images in the same batches."""
    if what == "training":
        train(setting, steps=2)
        return peak_megabytes(setting.device)
    import es_trl.trainer.es  # noqa: F401  # the same libraries in both processes: the ratio is about the work

    pipe = build_pipeline(setting.model, setting.dtype)
    adapter = PipelineAdapter(pipe, es_space=setting.es_space, settings=CallSettings(**CALL)).to(setting.device)
    rows = setting.prompts * setting.members_per_forward
    for _ in range(2 * setting.images // rows):
        generators = [torch.Generator().manual_seed(i) for i in range(rows)]
        adapter.generate(PROMPTS[: setting.prompts] * setting.members_per_forward, generators)
    return peak_megabytes(setting.device)


def measure_memory(setting: Setting, threads: int) -> dict:
    peaks = {}
    for what in ("inference", "training"):
        command = [sys.executable, __file__, "--peak_of", what, "--threads", str(threads), json.dumps(vars(setting))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The process that measures the memory of {what} failed:\n{done.stderr[-2000:]}")
        peaks[what] = float(done.stdout)
    return {
        "memory_ratio": round(peaks["training"] / peaks["inference"], 3),
        "peak_megabytes": {name: round(value) for name, value in peaks.items()},
    }


# ---- command line ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--spaces", nargs="+", default=["lora", "lora_xs"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the three ways of drawing")
    parser.add_argument("--steps", type=int, default=4, help="training steps for the overhead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--skip_memory", action="store_true", help="leave out what starts two processes a line")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    for name in SIZES["tiny"]:
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    parser.add_argument("--peak_of", choices=["inference", "training"], help=argparse.SUPPRESS)
    parser.add_argument("setting", nargs="?", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, model: str, es_space: str) -> dict:
    sizes = {name: getattr(args, name) or value for name, value in SIZES[model].items()}
    setting = Setting(model, es_space, **sizes, dtype=args.dtype)
    print(f"{model} {es_space}: {setting.images} images per round", file=sys.stderr)
    result = vars(setting) | measure_speed(setting, args.repeats) | measure_overhead(setting, args.steps)
    return result if args.skip_memory else result | measure_memory(setting, args.threads)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        with contextlib.redirect_stdout(sys.stderr):
            peak = peak_of(args.peak_of, Setting(**json.loads(args.setting)))
        print(peak)
        return None
    load = os.getloadavg()
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its logs; stdout is for the report
        results = [measure(args, model, space) for model in args.models for space in args.spaces]
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpus": os.cpu_count(),
        "threads": args.threads,
        "load_average_before": [round(value, 2) for value in load],
        "torch": torch.__version__,
    }
    report = {"machine": machine, "results": results}
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
