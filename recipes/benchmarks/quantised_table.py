"""
What ES does on the small model in every storage of its denoiser: writes the table of docs/bases.md.

    python recipes/benchmarks/quantised_table.py [--rows rows.jsonl] [--seeds 0 1 2] [--output docs/bases.md]

Every storage and seed is a process of its own, so that its peak memory is its own; rows that `--rows` has are kept.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from es_trl import ESConfig, ESTrainer, assets
from es_trl.es import make_generator
from es_trl.evaluation import EvaluationRow, evaluate
from es_trl.pipelines import SPACES, CallSettings, LoadedAdapters, PipelineAdapter, verify_population_forward
from recipes.benchmarks.peak_memory import training_megabytes
from recipes.benchmarks.storages import STORAGES, quantised_sprint


CALL = {"num_inference_steps": 1, "guidance_scale": 2.0, "max_sequence_length": 16}
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"])
PROMPTS = ["a red apple", "two blue cats"]
NAMES = {"float32": None} | {storage.__name__: storage for storage in STORAGES}
TITLES = {
    "float32": "float32", "torchao_int8": "torchao int8", "quanto_int8": "quanto int8", "gguf_q8_0": "GGUF Q8_0",
    "bnb_int8": "bitsandbytes int8 (layers on the CPU)", "bnb_nf4": "bitsandbytes nf4 (layers on the CPU)",
    "fp8_casting": "fp8 layerwise casting",
}  # fmt: skip
BEGIN, END = "<!-- quantised_table.py -->", "<!-- end -->"


@torch.no_grad()
def exactness(storage) -> dict[str, list[float]]:
    """By space: fused against alone, and the saved file loaded against the picture in training, as shares."""
    found = {}
    for space in SPACES:
        adapter = PipelineAdapter(quantised_sprint(storage), LORA, space, CallSettings(**CALL))
        check = verify_population_forward(adapter, PROMPTS, sigma=0.05)
        generator = make_generator(0, "table")
        for theta in adapter.theta.values():
            theta.add_(0.1 * torch.randn(theta.shape, generator=generator))

        def latents(which) -> torch.Tensor:
            return which.generate(PROMPTS, [make_generator(0, "bases", i) for i in range(2)], output_type="latent")

        trained = latents(adapter)
        with adapter.adapter_disabled():
            moved = (trained - latents(adapter)).abs().max()
        with tempfile.TemporaryDirectory() as folder:
            adapter.save_lora(folder)
            loaded = LoadedAdapters(quantised_sprint(storage), {"it": folder}, CallSettings(**CALL))
            with loaded.chosen("it"):
                file = float((latents(loaded) - trained).abs().max() / moved)
        found[space] = [check.max_difference / check.spread if check.fused else float("nan"), file]
    return found


def train(storage, seed: int) -> dict:
    """1,024 images of ES with its defaults, and the gain of the reward on prompts that were not trained on."""
    pipe = quantised_sprint(storage)
    with tempfile.TemporaryDirectory() as folder:
        config = ESConfig(
            folder, seed=seed, max_steps=16, population_size=64, prompts_per_step=4, members_per_forward=8,
            use_cpu=True, sample_steps=0, save_strategy="no", report_to="none", disable_tqdm=True, **CALL,
        )  # fmt: skip
        trainer = ESTrainer(pipe, "tiny-pickscore", config, train_dataset="tiny-train")
        started = time.perf_counter()
        megabytes = training_megabytes(trainer.train)
        seconds = time.perf_counter() - started
        prompts = Path(assets.resolve("tiny-test")).read_text(encoding="utf-8").splitlines()[:128]
        rows = [EvaluationRow("base", adapter=False), EvaluationRow("adapter")]
        result = evaluate(trainer.adapter, prompts, "tiny-pickscore", rows=rows, images_per_prompt=1, seed=7)
    scores = [result.of(row.name, "tiny-pickscore").mean(axis=1) for row in rows]
    gain = (scores[1] - scores[0]).round(5).tolist()
    return {"megabytes": megabytes, "seconds": seconds, "gain": gain}


def stored_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor, or of those that a packed one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def interval(draws: np.ndarray) -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"[{low:+.2f}, {high:+.2f}]"


def table(rows: dict[str, dict]) -> str:
    """The table, of the storages that were measured, with intervals over prompts of the means of seeds."""
    gains = {
        name: {key.split()[-1]: np.array(row["gain"]) for key, row in rows.items() if key.startswith(f"{name} seed")}
        for name in NAMES
    }
    lines = [
        "| storage | fused: lora, lora_b, lora_xs, weight | saved file | denoiser, MB | training, MB | gain | "
        "against float32 |",
        "|---|---|---|---:|---:|---|---|",
    ]
    number = len(next(iter(gains["float32"].values())))
    picks = np.random.default_rng(0).integers(0, number, (4000, number))
    for name, title in TITLES.items():
        own, exact = gains[name], rows.get(f"{name} exact")
        if not own or exact is None:
            continue
        fused, files = zip(*(exact[space] for space in ("lora", "lora_b", "lora_xs", "weight")), strict=True)
        mean = np.mean(list(own.values()), axis=0)
        other = mean - np.mean([gains["float32"][seed] for seed in own], axis=0)
        against = "" if name == "float32" else f"{other.mean():+.2f} {interval(other[picks].mean(axis=1))}"
        stored = sum(stored_bytes(p) for p in quantised_sprint(NAMES[name]).transformer.parameters()) / 1e6
        most = max(rows[f"{name} seed {seed}"]["megabytes"] for seed in own)
        lines.append(
            f"| {title} | {', '.join(f'{value:.0e}' for value in fused)} | {max(files):.0e} | {stored:.1f} | "
            f"{most:.0f} | {mean.mean():+.2f} {interval(mean[picks].mean(axis=1))}, {len(own)} seed(s) | {against} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", default="quantised.jsonl", help="a JSON line per measurement, kept and added to")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--storages", nargs="*", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--output", help="a page with the table's markers")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        name, what = args.one
        print(json.dumps(exactness(NAMES[name]) if what == "exact" else train(NAMES[name], int(what))), flush=True)
        return
    path = Path(args.rows)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = {key: row for line in lines for key, row in json.loads(line).items()}
    for what in ["exact", *map(str, args.seeds)]:
        for name in args.storages:
            key = f"{name} {what}" if what == "exact" else f"{name} seed {what}"
            if key in rows:
                continue
            command = [sys.executable, __file__, "--one", name, what]
            run = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
            rows[key] = json.loads(run.stdout.splitlines()[-1])
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: rows[key]}) + "\n")
            print(key, flush=True)
    if args.output:
        page = Path(args.output)
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
