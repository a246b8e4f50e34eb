"""Memory and time of one training image by model size: ES against GRPO and DPO, as multiples of plain inference.

Random Sana Sprints: 1.6 B and 0.6 B parameters in their true shape, 100 M and 10 M with the same blocks; the true
autoencoder, 256 px, bf16. Every measurement has a process of its own, all draw batches of as many images, and the peak
is counted from when the model is there. `inference` draws images with the adapter loaded. GRPO has no one-step policy.

    python recipes/benchmarks/memory_by_size.py --output outputs/memory_by_size.jsonl           # a quarter of an hour
    python recipes/benchmarks/memory_by_size.py --output outputs/memory_by_size.jsonl --table
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import build_random_sana_sprint as sana
import numpy as np
import torch
from peak_memory import peak_megabytes
from processor_clock import ProcessorClock

import es_trl


BATCH, SIZE, PROMPTS = 2, 256, ["a red apple"]
WIDTHS = {  # layers, heads of 32, cross-attention heads, their width
    "10M": {
        "num_layers": 4,
        "num_attention_heads": 12,
        "num_cross_attention_heads": 8,
        "cross_attention_head_dim": 48,
    },
    "100M": {
        "num_layers": 10,
        "num_attention_heads": 25,
        "num_cross_attention_heads": 10,
        "cross_attention_head_dim": 80,
    },
    "0.6B": sana.TRANSFORMERS["sana-0.6b"],
    "1.6B": sana.TRANSFORMERS["sana-1.6b"],
}
GROUP = {"num_generations": BATCH, "images_per_forward": BATCH, "images_per_backward": BATCH}
METHODS = {
    "inference": ("ES", {}),
    "ES": ("ES", {"population_size": BATCH, "members_per_forward": BATCH}),
    "GRPO": ("GRPO", GROUP),
    "DPO": ("DiffusionDPO", GROUP),
}


def redness(images, **_):
    return [float(np.asarray(image.convert("RGB"))[..., 0].mean()) / 255 for image in images]


def measure(size: str, method: str, steps: int) -> dict:
    """
    Peak memory in GB and processor seconds per image of a training step, or of as many drawn images. The second step
    is timed: in the first a run checks itself, which draws pictures that are not trained on.
    """
    torch.set_num_threads(1)
    sana.TRANSFORMERS["this"] = sana.TRANSFORMER | {"cross_attention_dim": 0} | WIDTHS[size]
    shape = sana.TRANSFORMERS["this"]
    shape["cross_attention_dim"] = shape["num_cross_attention_heads"] * shape["cross_attention_head_dim"]
    pipe = sana.build(model="this")
    name, settings = METHODS[method]
    trainer_class = getattr(es_trl, f"{name}Trainer")
    with tempfile.TemporaryDirectory() as folder:
        config = trainer_class.config_class(
            output_dir=folder, max_steps=2, prompts_per_step=1, num_inference_steps=steps, height=SIZE, width=SIZE,
            dtype="bfloat16",
            max_sequence_length=16, use_cpu=True, sample_steps=0, save_strategy="no", report_to="none",
            disable_tqdm=True, **({"sigma": 0.01} if name == "ES" else {}), **settings,
        )  # fmt: skip
        trainer = trainer_class(pipe, redness, args=config, train_dataset=PROMPTS)
        trainer.prepare_prompts(PROMPTS)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        if method == "inference":
            for _ in range(2):
                began = time.process_time()
                trainer.adapter.generate(PROMPTS * BATCH, [torch.Generator().manual_seed(i) for i in range(BATCH)])
                seconds = time.process_time() - began
        else:
            clock = ProcessorClock()
            trainer.add_callback(clock)
            trainer.train()
            seconds = clock.last
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    return {
        "size": size, "method": method, "steps": steps, "parameters": parameters,
        "peak_gb": round(peak_megabytes() / 1000, 2), "seconds_per_image": round(seconds / BATCH, 2),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown: one line per size and number of steps, each method as a multiple of inference."""
    lines = ["| transformer | steps | inference | ES | GRPO | DPO |", "|---|---|---|---|---|---|"]
    for size, steps in dict.fromkeys((row["size"], row["steps"]) for row in rows):
        found = {row["method"]: row for row in rows if (row["size"], row["steps"]) == (size, steps)}
        base = found["inference"]
        cells = [f"{base['peak_gb']:.2f} GB, {base['seconds_per_image']:.1f} s"]
        for method in ("ES", "GRPO", "DPO"):
            row = found.get(method)
            memory, seconds = (row and row[key] / base[key] for key in ("peak_gb", "seconds_per_image"))
            cells.append(f"{memory:.2f} x, {seconds:.2f} x" if row else "")
        lines.append(f"| {base['parameters'] / 1e6:,.0f} M | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/memory_by_size.jsonl"))
    parser.add_argument("--sizes", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--table", action="store_true", help="print the table of what is in the output file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # size, method, steps: what the processes are told
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.one[1], int(args.one[2]))))
        return
    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if args.table:
        print(table(done))
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        for steps in (1, 2):
            for method in METHODS:
                known = any((row["size"], row["method"], row["steps"]) == (size, method, steps) for row in done)
                if known or (method == "GRPO" and steps == 1):
                    continue
                command = [sys.executable, __file__, "--one", size, method, str(steps)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(out.splitlines()[-1], flush=True)
                with args.output.open("a") as file:
                    file.write(out.splitlines()[-1] + "\n")


if __name__ == "__main__":
    main()
