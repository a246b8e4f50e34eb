"""
Weak scaling from one process to several: twice the processes draw twice the population; how much of the double speed
is left? As JSON.

    python recipes/benchmarks/weak_scaling.py --output outputs/weak_scaling.json

Each round runs one process with a population of N, P processes (gloo, one thread each) that share a population of
P x N, and P processes that know nothing of each other, each with a population of N; every second round in the opposite
order, so that whatever else slows the machine slows all three. The efficiency of a round is the images per second of
the P processes over P times those of the one. That of the processes that share nothing is what the machine allows
(clock, caches and memory are shared); the ratio of the two is what working together costs. Step times are medians
without the first steps. It needs P idle cores: with fewer it measures how they are shared.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
WARM_UP = 2  # steps that are not counted
PROMPTS = 4  # per step


def work(model: str, population: int, steps: int, folder: str) -> None:
    """One process of a run; the first one writes the seconds of every step."""
    import time

    import torch
    from transformers import TrainerCallback

    from es_trl import ESConfig, ESTrainer
    from recipes.benchmarks.toy_pipeline import redness, toy_pipeline

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.began)

    torch.set_num_threads(1)
    options = {"lora_target_modules": ["to_q", "to_out"]} if model == "toy" else {
        "guidance_scale": 2.0, "max_sequence_length": 16
    }  # fmt: skip
    config = ESConfig(
        output_dir=folder, max_steps=WARM_UP + steps, population_size=population, members_per_forward=4,
        prompts_per_step=PROMPTS, lora_rank=4, sample_steps=0, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", save_strategy="no", **options,
    )  # fmt: skip
    prompts = ["a red apple", "two blue cats", "a green frog", "a pink dog"] * 4
    trainer = ESTrainer(
        toy_pipeline() if model == "toy" else model, redness, args=config, train_dataset=prompts, callbacks=[Clock()]
    )
    trainer.train()
    if trainer.is_world_process_zero():
        Path(folder, "seconds.json").write_text(json.dumps(Clock.seconds[WARM_UP:]))


def images_per_second(processes: int, together: bool, arguments: argparse.Namespace) -> float:
    """Of that many processes, which share one population or, not `together`, have one each."""
    ranks = processes if together else 1
    population = ranks * arguments.population
    command = [sys.executable, __file__, "--model", arguments.model, "--steps", str(arguments.steps)]
    command += ["--population", str(population), "--worker"]
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": free_port()}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="es_trl-scaling-") as root:
        folders = [Path(root, str(0 if together else number)) for number in range(processes)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        running = [
            subprocess.Popen(
                [*command, str(folder)],
                env=os.environ | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=None if rank == 0 else subprocess.DEVNULL,
            )
            for rank, folder in enumerate(folders)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"a run of {processes} processes failed")
        times = [json.loads(Path(folder, "seconds.json").read_text()) for folder in dict.fromkeys(folders)]
    return sum(population * PROMPTS / statistics.median(seconds) for seconds in times)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-sana-sprint", help='a model, or "toy"')
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--population", type=int, default=16, help="members per process, a multiple of 4")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", default="outputs/weak_scaling.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.model, arguments.population, arguments.steps, arguments.worker)
        return
    cases = {"alone": (1, False), "together": (arguments.processes, True), "apart": (arguments.processes, False)}
    rounds = []
    for number in range(arguments.rounds):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        rates = {case: images_per_second(*cases[case], arguments) for case in order}
        ideal = arguments.processes * rates["alone"]
        rounds.append({
            "images_per_second": rates,
            "efficiency": rates["together"] / ideal,
            "machine": rates["apart"] / ideal,
            "together_to_apart": rates["together"] / rates["apart"],
        })  # fmt: skip
        print(json.dumps(rounds[-1]), flush=True)
    result = {
        "model": arguments.model,
        "processes": arguments.processes,
        "members_per_process": arguments.population,
        "steps": arguments.steps,
        "cores": os.cpu_count(),
        "rounds": rounds,
        **{name: spread([entry[name] for entry in rounds]) for name in ("efficiency", "machine", "together_to_apart")},
    }
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: value for name, value in result.items() if isinstance(value, dict)}))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
