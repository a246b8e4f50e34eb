"""
A toy run of 2,000 steps with a checkpoint every 10: memory, open files and disk, as JSON.

    python tests/soak/long_run.py --output outputs/long_run.json
    python tests/soak/long_run.py --logging_steps 0 --sample_steps 0

The slope of the memory is that of a line through the second half of the run, with its standard error: flat means that
the one is not larger than twice the other. The Trainer keeps every log in memory and writes all of them into every
checkpoint, and every sheet of samples stays on disk, so a run with these grows by design; with both at 0 it has to be
flat.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from es_trl import ESConfig, ESTrainer  # noqa: E402
from recipes.benchmarks.toy_pipeline import redness, toy_pipeline  # noqa: E402


EVERY = 20  # steps between two readings
READINGS = (
    "step", "rss_kb", "heap_kb", "python_blocks", "open_files", "threads", "files", "bytes_without_journal",
    "journal_bytes",
)  # fmt: skip


class Gauge(TrainerCallback):
    """
    Resident memory, what of it is in use (by malloc, in Python objects), open files, threads, files and bytes in the
    run folder. Its own memory is taken beforehand.
    """

    def __init__(self, steps: int):
        self.rows, self.process = np.ones((steps // EVERY, len(READINGS))), psutil.Process()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY == 0:
            gc.collect()
            files = [path for path in Path(args.output_dir).rglob("*") if path.is_file()]
            journal = Path(args.output_dir, "journal.jsonl").stat().st_size
            self.rows[state.global_step // EVERY - 1] = (
                state.global_step,
                self.process.memory_info().rss / 1024,
                heap_in_use() / 1024,
                sys.getallocatedblocks(),
                self.process.num_fds(),
                self.process.num_threads(),
                len(files),
                sum(path.stat().st_size for path in files) - journal,
                journal,
            )


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def heap_in_use() -> int:
    """Bytes that malloc has handed out and not got back; 0 where there is no glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = MallInfo
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd


def slope(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Least-squares slope per step and its standard error."""
    x = steps - steps.mean()
    b = (x * values).sum() / (x * x).sum()
    residuals = values - values.mean() - b * x
    return float(b), float(np.sqrt((residuals**2).sum() / (len(x) - 2) / (x * x).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--logging_steps", type=int, default=10, help="steps between two logs; 0 logs nothing")
    parser.add_argument(
        "--sample_steps", type=int, default=200, help="steps between two sheets of samples; 0 for none"
    )
    parser.add_argument("--output", default="outputs/long_run.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gauge, began = Gauge(arguments.steps), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="es_trl-long-") as folder:
        config = ESConfig(
            output_dir=folder, max_steps=arguments.steps, population_size=6, members_per_forward=2, prompts_per_step=2,
            lora_rank=2, lora_target_modules=["to_q", "to_out"], sample_steps=arguments.sample_steps, report_to="none",
            use_cpu=True, disable_tqdm=True, logging_strategy="steps" if arguments.logging_steps else "no",
            logging_steps=arguments.logging_steps or 10, save_strategy="steps", save_steps=10, travel=5.0,
        )  # fmt: skip
        prompts = [f"prompt {i}" for i in range(12)]
        trainer = ESTrainer(toy_pipeline(), redness, args=config, train_dataset=prompts, callbacks=[gauge])
        trainer.train()
        checkpoints = sorted(name for name in os.listdir(folder) if name.startswith("checkpoint-"))
    half = gauge.rows[len(gauge.rows) // 2 :]
    fits = {name: slope(half[:, 0], column) for name, column in zip(READINGS[1:], half.T[1:], strict=True)}
    result = {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - began, 1),
        "logs": len(trainer.state.log_history),
        "logs_as_json_bytes": len(json.dumps(trainer.state.log_history)),
        "checkpoints_kept": checkpoints,
        "per_step": {name: {"slope": b, "standard_error": error} for name, (b, error) in fits.items()},
        **{
            name: dict(zip(READINGS, row.tolist(), strict=True))
            for name, row in (("first", gauge.rows[0]), ("middle", half[0]), ("last", gauge.rows[-1]))
        },
    }
    os.makedirs(os.path.dirname(os.path.abspath(arguments.output)), exist_ok=True)
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["per_step"], indent=2))


if __name__ == "__main__":
    main()
