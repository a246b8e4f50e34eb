"""
What a population costs: throughput ratio, step overhead and memory ratio (docs/benchmarks: README.md), as JSON.

    python recipes/benchmarks/throughput.py
    python recipes/benchmarks/throughput.py --models tiny --spaces lora_xs --threads 1

Every repeat draws the same images three ways, in turn: with the plain diffusers pipeline and the adapter loaded, as a
fused population, and as members one after the other.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, SanaSprintPipeline, SanaTransformer2DModel

from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline


# Members, prompts and the batch in which they are drawn. The tiny model has rows of a micro-batch like the demo's, the
# wide one as few as keep a CPU run short: few rows per member are the harder case for a fused forward.
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

    @property
    def images(self) -> int:
        return self.population_size * self.prompts

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"


def build_pipeline(model: str, dtype: str) -> DiffusionPipeline:
    """`tiny`: the shipped model. `wide`: its text encoder and VAE around random Sana blocks of width 1152."""
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


def measure_speed(setting: Setting, repeats: int) -> dict:
    """Seconds of each way, interleaved; ratios are taken within a repeat, so that a busy machine hits both sides."""
    from es_trl.es import NoiseBank, Population
    from es_trl.trainer.rollout import PopulationRollout, PromptBatch

    adapter = PipelineAdapter(
        build_pipeline(setting.model, setting.dtype), es_space=setting.es_space, settings=CallSettings(**CALL)
    ).to(setting.device)
    population = Population(setting.population_size)
    shapes = {site.name: tuple(site.theta.shape) for site in adapter.space.sites}
    factors = NoiseBank(0, shapes).draw(0, range(population.num_directions), device=setting.device)
    batch = PromptBatch(PROMPTS[: setting.prompts])
    plain = plain_drawing(setting, adapter)

    def drawing(members_per_forward: int):
        rollout = PopulationRollout(adapter, None, population, SIGMA, members_per_forward, seed=0)
        return lambda: [rollout.draw(m, batch, factors, 0) for m in population.chunks(members_per_forward)]

    def draw_plain():
        for members in population.chunks(setting.members_per_forward):
            plain(batch.prompts * len(members), [g for _ in members for g in batch.generators(0, 0, 0)])

    ways = {"plain": draw_plain, "fused": drawing(setting.members_per_forward), "one_by_one": drawing(1)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        order = list(ways)[repeat % 3 :] + list(ways)[: repeat % 3]
        for name in order:
            took = clock(ways[name], setting.device)
            if repeat:  # the first round warms caches and allocators up
                seconds[name].append(took)
    return {
        "throughput_ratio": spread([p / f for p, f in zip(seconds["plain"], seconds["fused"], strict=True)]),
        "speedup_over_one_by_one": spread([o / f for o, f in zip(seconds["one_by_one"], seconds["fused"], strict=True)]),
        "images_per_second": {n: round(setting.images / statistics.median(s), 2) for n, s in seconds.items()},
    }


def plain_drawing(setting: Setting, adapter: PipelineAdapter):
    """`draw(prompts, generators)` of a stock pipeline that loaded this adapter from its file; prompts are encoded once."""
    pipe = build_pipeline(setting.model, setting.dtype).to(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_lora(folder)
        pipe.load_lora_weights(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    call = adapter.settings.call_kwargs(adapter.pipe)
    adapter.prompts.encode(PROMPTS[: setting.prompts])

    def draw(prompts, generators):
        return pipe(**adapter.prompts.rows(prompts), generator=generators, **call).images

    return draw


def clock(work, device: str) -> float:
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

    from es_trl import ESConfig, ESTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.step, self.optimizer = [], []

        def on_step_begin(self, args, state, control, **kwargs):
            self.step.append(time.perf_counter())

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.optimizer.append(time.perf_counter())

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.optimizer[-1] = time.perf_counter() - self.optimizer[-1]

        def on_step_end(self, args, state, control, **kwargs):
            self.step[-1] = time.perf_counter() - self.step[-1]

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
    return {"step_overhead": {**spread(shares[1:] or shares), "step_seconds": round(statistics.median(timing.step), 3)}}


# ---- memory, each in a process of its own ----


def peak_megabytes(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1e-6 if sys.platform == "darwin" else 1.024e-3)


def peak_of(what: str, setting: Setting) -> float:
    """MB that this process needed at most for two steps of training, or for as many plain images in the same batches."""
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
        peaks[what] = float(done.stdout.split()[-1])
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
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    for name in SIZES["tiny"]:
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    parser.add_argument("--peak_of", choices=["inference", "training"], help=argparse.SUPPRESS)
    parser.add_argument("setting", nargs="?", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(args.peak_of, Setting(**json.loads(args.setting))))
        return None
    load = os.getloadavg()
    results = []
    for model in args.models:
        own = {name: getattr(args, name) or value for name, value in SIZES[model].items()}
        for space in args.spaces:
            setting = Setting(model, space, **own, dtype=args.dtype)
            print(f"{model} {space}: {setting.images} images per round", file=sys.stderr)
            results.append(
                vars(setting)
                | measure_speed(setting, args.repeats)
                | measure_overhead(setting, args.steps)
                | measure_memory(setting, args.threads)
            )
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
