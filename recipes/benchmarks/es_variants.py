"""Which settings of ES to prefer: variants x seeds on the shipped model, judged on validation prompts.

Every run trains on `tiny-train`, is evaluated on `tiny-validation` (combinations unseen in training) against the base
at one and two steps with the trained reward, the held-out scorer, retrieval, hard negatives and Frechet distance, and
appends one JSON line to the output file. Runs that are in the file already are skipped, so it resumes.

    python recipes/benchmarks/es_variants.py --output outputs/es_variants.jsonl
    python recipes/benchmarks/es_variants.py --output outputs/es_variants.jsonl --table
"""

import argparse
import json
import logging
import os
import tempfile
import time
from pathlib import Path

import torch
import yaml

from es_trl import ESConfig, ESTrainer, load_prompts


logger = logging.getLogger("es_variants")

SHARED = {
    "guidance_scale": 2.0,
    "max_sequence_length": 16,
    "use_cpu": True,
    "save_strategy": "no",
    "sample_steps": 0,
    "report_to": "none",
    "eval_reward_funcs": ["tiny-clip-heldout"],
    "disable_tqdm": True,
    "logging_steps": 1000,
}
JUDGES = ("tiny-clip-heldout", "tiny-pickscore")  # the second one where it was evaluated
METRICS = ("retrieval_accuracy", "hard_negative_accuracy", "frechet_distance")


def run(name: str, settings: dict, seed: int, images: int, model: str) -> dict:
    """Trains one variant for a budget of `images` and returns its row."""
    settings = dict(settings)
    reward_funcs = settings.pop("reward_funcs", ["tiny-pickscore"])
    with tempfile.TemporaryDirectory() as folder:
        config = ESConfig(output_dir=folder, seed=seed, **(SHARED | settings))
        per_step = config.population_size * config.images_per_member
        config.max_steps = images // (per_step * config.gradient_accumulation_steps)
        trainer = ESTrainer(model, reward_funcs, config, train_dataset="tiny-train")
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        prompts = load_prompts("tiny-validation")
        result = trainer.compare_with_base(prompts, images_per_prompt=2, judge="tiny-clip-heldout").to_dict()
    base, adapter = result["rows"][:2]
    return {
        "variant": name,
        "seed": seed,
        "images": images,
        "steps": config.max_steps,
        "seconds": round(seconds, 1),
        "dimensions": sum(parameter.numel() for parameter in trainer.adapter.theta.values()),
        "gap_closure": result["gap_closure"],
        "base": {metric: value["mean"] for metric, value in base["judge"].items()},
        "adapter": {metric: value["mean"] for metric, value in adapter["judge"].items()},
        "settings": settings | {"reward_funcs": reward_funcs},
    }


def table(rows: list[dict]) -> str:
    """A Markdown table: one line per variant and budget, the seeds side by side."""
    header = "| variant | dimensions | images | held-out / reward gap closure | retrieval | hard negatives | Frechet |"
    lines = [header, "|---" * 7 + "|"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["dimensions"], row["images"]), []).append(row)
    for (name, dimensions, images), group in sorted(groups.items()):
        group.sort(key=lambda row: row["seed"])
        closures = [row["gap_closure"] for row in group]
        cells = [", ".join("/".join(f"{c[name]:.2f}" if name in c else "-" for name in JUDGES) for c in closures)]
        cells += [", ".join(f"{row['adapter'].get(metric, float('nan')):.3g}" for row in group) for metric in METRICS]
        lines.append(f"| {name} | {dimensions} | {images} | " + " | ".join(cells) + " |")
    base = " | ".join(f"{rows[0]['base'].get(metric, float('nan')):.3f}" for metric in METRICS)
    return "\n".join([*lines, f"| base, 1 step | | 0 | 0/0 | {base} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=str(Path(__file__).with_suffix(".yaml")), help="name: ESConfig fields")
    parser.add_argument("--only", nargs="*", help="names of variants to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=4096, help="training images per run")
    parser.add_argument("--model", default="tiny-sana-sprint")
    parser.add_argument("--output", default="outputs/es_variants.jsonl")
    parser.add_argument("--threads", type=int, default=1, help="one thread; run two processes on two cores")
    parser.add_argument("--table", action="store_true", help="print the table of what is in the output file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    if args.table:
        print(table(done))
        return
    variants = yaml.safe_load(Path(args.variants).read_text())
    os.makedirs(output.parent, exist_ok=True)
    for seed in args.seeds:
        for name in args.only or variants:
            if any((row["variant"], row["seed"], row["images"]) == (name, seed, args.images) for row in done):
                continue
            row = run(name, variants[name], seed, args.images, args.model)
            print(json.dumps(row), flush=True)
            with output.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
