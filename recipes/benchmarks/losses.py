"""
Where a population step's time goes besides the frozen model: adapter products, noise, latents, reward. JSON.

    python recipes/benchmarks/losses.py --models tiny sana-1.6b --spaces lora lora_xs

`tiny` is the shipped model and its own reward, in the demo's batches; `sana-1.6b` two random blocks of the true width
at 512 px, in float32, and a reward that costs nothing. Shares are of one `training_step`, medians over steps. Launches
are operations other than views of one draw, per LoRA layer, beside those of the plain pipeline.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict

import throughput
import torch
from build_random_sana_sprint import TRANSFORMER
from diffusers import SanaSprintPipeline, SanaTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_callback import PrinterCallback

from es_trl import ESConfig, ESTrainer
from es_trl.pipelines import load_pipeline


MODELS = {
    "tiny": {"population_size": 128, "members_per_forward": 64, "prompts_per_step": 4, "prompts_per_member": 1},
    "sana-1.6b": {"population_size": 4, "members_per_forward": 2, "prompts_per_step": 1},
}
VIEWS = {"view", "reshape", "_unsafe_view", "transpose", "permute", "expand", "slice", "select", "unsqueeze",
         "squeeze", "t", "detach", "alias", "as_strided", "split", "chunk", "unbind", "split_with_sizes", "narrow",
         "_reshape_alias", "unflatten", "empty", "empty_like", "movedim", "lift_fresh", "empty_strided"}  # fmt: skip


class Clock:
    """Seconds by name, of calls that are wrapped."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner, attribute: str, name: str) -> None:
        inner = getattr(owner, attribute)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        setattr(owner, attribute, timed)


class Launches(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


def pipeline(model: str) -> SanaSprintPipeline:
    pipe = load_pipeline("tiny-sana-sprint")
    if model == "tiny":
        return pipe
    torch.manual_seed(0)
    small = {"in_channels": 16, "out_channels": 16, "sample_size": 16, "num_layers": 2}
    shape = TRANSFORMER | small | {"caption_channels": pipe.text_encoder.config.hidden_size}
    return SanaSprintPipeline(**pipe.components | {"transformer": SanaTransformer2DModel(**shape).eval()})


def trainer_of(model: str, es_space: str, steps: int, folder: str) -> ESTrainer:
    call = throughput.CALL | (
        {} if model == "tiny" else {"height": 128, "width": 128}
    )  # 16 x 16 latents: 512 px there
    quiet = {"sample_steps": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "log_level": "error"}
    config = ESConfig(output_dir=folder, es_space=es_space, sigma=0.05, max_steps=steps, use_cpu=True, logging_steps=1,
                      **MODELS[model], **call, **quiet)  # fmt: skip
    reward = "tiny-pickscore" if model == "tiny" else lambda images, **_: list(range(len(images)))
    trainer = ESTrainer(pipeline(model), reward, args=config, train_dataset=throughput.PROMPTS)
    trainer.remove_callback(PrinterCallback)
    return trainer


def shares(model: str, es_space: str, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock, rows = trainer_of(model, es_space, steps, folder), Clock(), []
        for layer in trainer.adapter.space.layers.values():
            clock.wrap(layer.get_base_layer(), "forward", "base layers")
            clock.wrap(layer, "forward", "layers with LoRA")
        clock.wrap(trainer.adapter.denoiser, "forward", "denoiser")
        clock.wrap(trainer.adapter.pipe, "prepare_latents", "latents")
        clock.wrap(trainer.adapter.pipe.vae, "decode", "decode")
        clock.wrap(trainer.noise, "draw", "noise")
        step, begin = trainer.training_step, clock.seconds

        def timed(*args, **kwargs):
            begin.clear()
            began = time.perf_counter()
            loss = step(*args, **kwargs)
            rows.append(dict(begin) | {"step": time.perf_counter() - began})
            return loss

        trainer.training_step = timed
        trainer.train()
    logs = [log for log in trainer.state.log_history if "es/reward_time" in log]
    found = defaultdict(list)
    for row, log in list(zip(rows, logs, strict=True))[1:]:  # the first step checks itself and warms up
        row |= {"reward": log["es/reward_time"], "noise and update": log["es/overhead"] * log["step_time"]}
        row["adapter products"] = row.pop("layers with LoRA") - row.pop("base layers")
        for name in row:
            found[name].append(row[name] / (1 if name == "step" else row["step"]))
    return {"seconds" if n == "step" else n: round(statistics.median(v), 4) for n, v in found.items()}


def launches(es_space: str, steps: int) -> dict[str, float]:
    """Of one draw of the tiny model in so many denoising steps, 8 members of 2 images."""
    throughput.CALL["num_inference_steps"] = steps
    ways, counts = throughput.drawing_ways(throughput.Setting("tiny", es_space, 8, 2, 8)), {}
    for name in ("plain", "fused"):
        ways[name]()
        with Launches() as counted:
            ways[name]()
        counts[name] = sum(counted.count.values())
    return counts | {"more per LoRA layer": round((counts["fused"] - counts["plain"]) / 40, 2)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--spaces", nargs="+", default=["lora", "lora_xs"])
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for space in args.spaces:
        for steps in (4, 1):
            found = {"space": space, "denoising steps": steps, "launches of a draw": launches(space, steps)}
            print(json.dumps(found), flush=True)
        for model in args.models:
            print(json.dumps({"model": model, "space": space} | shares(model, space, args.steps)), flush=True)


if __name__ == "__main__":
    main()
