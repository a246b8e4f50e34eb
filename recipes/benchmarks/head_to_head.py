"""ES, DDPO, GRPO, Pref-GRPO and DPO with equal tuning, at equal images and at equal seconds, on the shipped model.

Three stages, each run a process of its own with one thread: every method tries its settings of head_to_head.yaml on
`tiny-train` and is judged on `tiny-validation` (stage tune); the best ones train with several seeds for as many images
(stage images), for three rewards, and for as many processor seconds (stage seconds); and every method trains at the
defaults of its config, which is what a user gets (stage untuned). Tables are on `tiny-test`.

    python recipes/benchmarks/head_to_head.py --output outputs/head_to_head
    python recipes/benchmarks/head_to_head.py --output outputs/head_to_head --table > table.md
    python recipes/benchmarks/head_to_head.py --output outputs/quick --quick
    python recipes/benchmarks/head_to_head.py --output outputs/untuned --stage untuned
    es-trl compare outputs/head_to_head/runs/images-tiny-pickscore-* --output_dir outputs/page

A finished run is one line of OUTPUT/results.jsonl and a run folder OUTPUT/runs/<name>. Finished runs are skipped; one
that was killed is done again, as is one whose settings have been changed since.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import yaml


logger = logging.getLogger("head_to_head")

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
TRAINED, HELD_OUT = "tiny-pickscore", "tiny-clip-heldout"
SCORERS = (
    TRAINED,
    "jpeg_compressibility",
    HELD_OUT,
)  # scored in every evaluation; a noisy reward is judged by TRAINED
STAGES = ("images", "seconds", "untuned")
BASE = "base"
TUNING_SEED, EVALUATION_SEED = 100, 4321
PER_PROMPT = "per_prompt.json"


# ---- one run, in a process of its own ----


def run(job: dict, folder: Path) -> dict:
    """Trains and evaluates one job and returns its line of the results."""
    import torch

    from es_trl import load_prompts

    torch.set_num_threads(1)
    prompts = load_prompts(job["prompts"], max_prompts=job["max_prompts"])["prompt"]
    if job["stage"] == BASE:
        return base_line(job, prompts, folder)
    trainer, seconds, megabytes = train(job, folder)
    steps = (1,) if job["stage"] == "tune" else (1, 2)
    rows = [(adapter, count) for count in steps for adapter in (False, True)]
    table, _ = evaluated(trainer.adapter, prompts, job, folder, rows)
    trainer.save_model()
    trainer.save_state()
    return job | {
        "images": trainer.images_drawn,
        "steps": trainer.state.global_step,
        "cpu_seconds": round(seconds, 1),
        "training_megabytes": round(megabytes),
        "dimensions": sum(parameter.numel() for parameter in trainer.adapter.theta.values()),
        "table": table,
    }


def train(job: dict, folder: Path):
    """The trained trainer, the processor seconds of its steps, and the memory that training took."""
    from peak_memory import training_megabytes

    from es_trl.trainer import method_classes

    config_class, trainer_class = method_classes(job["method"])
    config = config_class(output_dir=str(folder), seed=job["seed"], eval_reward_funcs=[HELD_OUT], **job["settings"])
    config.max_steps = max(1, job["budget_images"] // images_per_step(config))
    if job["stage"] != "tune":  # curves of the held-out prompts, for es-trl compare
        config.eval_strategy, config.eval_steps = type(config.eval_strategy)("steps"), max(1, config.max_steps // 4)
    clock = processor_clock()
    trainer = trainer_class(
        "tiny-sana-sprint",
        job["reward_funcs"],
        config,
        train_dataset="tiny-train",
        eval_dataset="tiny-validation",
        callbacks=[clock],
    )
    trainer.rewards.load()
    megabytes = training_megabytes(trainer.train)
    return trainer, clock.seconds, megabytes


def images_per_step(config) -> int:
    """Images that a step of these settings draws."""
    if hasattr(config, "population_size"):
        return config.population_size * config.images_per_member
    return config.num_generations * config.prompts_per_step


def processor_clock():
    """Processor time of steps, without evaluations: what other processes of the machine do does not enter."""
    from transformers import TrainerCallback

    class ProcessorClock(TrainerCallback):
        seconds, started = 0.0, 0.0

        def on_step_begin(self, *args, **kwargs):
            self.started = time.process_time()

        def on_step_end(self, *args, **kwargs):
            self.seconds += time.process_time() - self.started

    return ProcessorClock()


def evaluated(adapter, prompts: list[str], job: dict, folder: Path, rows: list[tuple[bool, int]], images: int = 2):
    """Draws rows (adapter or base, steps) and writes eval.json and per_prompt.json: means of rows, and all scores."""
    import numpy as np

    from es_trl import RewardSet, evaluate
    from es_trl.evaluation import EvaluationRow, load_judge

    rows = [EvaluationRow(f"{'adapter' if on else 'base'}@{n}", adapter=on, num_inference_steps=n) for on, n in rows]
    result = evaluate(
        adapter,
        prompts,
        RewardSet(list(SCORERS)),
        rows=rows,
        images_per_prompt=images,
        seed=EVALUATION_SEED,
        batch_size=64,
        judge=load_judge(HELD_OUT, prompts),
        n_keep=0,
    )
    folder.mkdir(parents=True, exist_ok=True)
    result.save(folder / "eval.json")
    scores = {row.name: {name: result.of(row.name, name) for name in SCORERS} for row in rows}
    for row in rows:
        scores[row.name] |= result.judge_scores[row.name]
    return write_per_prompt(scores, folder), {name: np.asarray(scores["base@1"][name]) for name in SCORERS}


def write_per_prompt(scores: dict, folder: Path) -> dict:
    """Writes every row's mean of each prompt, so that tables can be made of several runs; returns the rows' means."""
    import numpy as np

    per_prompt = {
        row: {k: np.nanmean(v, axis=1).round(5).tolist() for k, v in of.items()} for row, of in scores.items()
    }
    (folder / PER_PROMPT).write_text(json.dumps(per_prompt))
    return {row: {name: float(np.mean(value)) for name, value in of.items()} for row, of in per_prompt.items()}


def base_line(job: dict, prompts: list[str], folder: Path) -> dict:
    """The base with one step, and the best of its 4 and 8 images by the trained reward: no training at all."""
    import numpy as np
    import torch

    from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline

    names = ("guidance_scale", "max_sequence_length", "num_inference_steps")
    settings = CallSettings(**{name: job["settings"][name] for name in names})
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint", torch.float32), settings=settings)
    table, scores = evaluated(adapter, prompts, job, folder, [(False, 1)], images=8)
    best = {}
    for tries in (4, 8):
        chosen = scores[job["reward"] if job["reward"] in SCORERS else TRAINED][:, :tries].argmax(axis=1)
        picked = {name: values[np.arange(len(prompts)), chosen][:, None] for name, values in scores.items()}
        best[f"best of {tries}"] = picked
    return job | {"table": table | write_per_prompt({"base@1": scores} | best, folder)}


# ---- the plan ----


class Plan:
    """
    What is to be run, given what has been.

    Args:
        settings (`dict`): head_to_head.yaml.
        size (`dict`): Its part `full` or `quick`.
        done (`dict[str, dict]`): Finished runs by name.
    """

    def __init__(self, settings: dict, size: dict, done: dict[str, dict]):
        self.settings, self.size, self.done = settings, size, done
        self.rewards = list(settings["rewards"])[: size["rewards"]]
        self.first_reward = self.rewards[0]

    def stages(self):
        """Lists of jobs; those of a list do not depend on each other, but on the lists before."""
        yield [self.job("tune", method, number, self.first_reward, TUNING_SEED, self.size["trial_images"])
               for method, entry in self.settings["methods"].items()
               for number in range(min(self.size["trials"], len(entry["trials"])))]  # fmt: skip
        best = {method: self.best_trial(method) for method in self.settings["methods"]}
        images = [
            self.job("images", method, best[method], reward, seed, self.size["images"])
            for reward in self.rewards
            for seed in self.size["seeds"]
            for method in best
        ]
        bases = [self.job(BASE, BASE, None, reward, 0, 0) for reward in self.rewards if reward in SCORERS]
        yield bases + images
        yield [self.job("seconds", method, best[method], self.first_reward, seed, self.images_in_time(method))
               for seed in self.size["seeds"] for method in best]  # fmt: skip
        yield self.untuned()

    def untuned(self) -> list[dict]:
        """Every method at its defaults; depends on no other stage."""
        return [
            self.job("untuned", method, None, reward, seed, self.size["images"])
            for reward in self.rewards
            for seed in self.size["seeds"]
            for method in self.settings["methods"]
        ]

    def job(self, stage: str, method: str, trial: int | None, reward: str, seed: int, images: int) -> dict:
        """One run as plain data."""
        entry = self.settings["methods"].get(method, {"speed": {}, "trials": []})
        settings = self.settings["shared"] | entry["speed"]
        if trial is not None:
            settings |= entry.get("fixed", {}) | entry["trials"][trial]
        tune = stage == "tune"
        parts = [stage, method, str(trial)] if tune else [stage, reward, method, str(seed)]
        return {
            "name": "-".join(parts if stage != BASE else [BASE, reward]),
            "stage": stage,
            "method": method,
            "trial": trial,
            "tried": entry["trials"][trial] if trial is not None else {},
            "settings": settings,
            "reward": reward,
            "reward_funcs": self.settings["rewards"][reward],
            "seed": seed,
            "budget_images": images,
            "prompts": "tiny-validation" if tune else "tiny-test",
            "max_prompts": None if tune else self.size["test_prompts"],
        }

    def best_trial(self, method: str) -> int:
        """The trial with the highest trained reward on the validation prompts, at one step."""
        trials = [row for row in self.done.values() if row["stage"] == "tune" and row["method"] == method]
        return max(trials, key=lambda row: row["table"]["adapter@1"][self.first_reward])["trial"]

    def images_in_time(self, method: str) -> int:
        """How many images the method draws in the seconds of the budget, at the speed of its runs of stage images."""
        runs = [row for row in self.done.values() if row["stage"] == "images" and row["method"] == method]
        rate = median(row["images"] / row["cpu_seconds"] for row in runs if row["reward"] == self.first_reward)
        return int(rate * self.size["seconds"])


def execute(job: dict, output: Path) -> dict | None:
    """Runs a job in a process of its own; `None` if it failed, which is logged."""
    folder = output / "runs" / job["name"]
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job, indent=2))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    command = [sys.executable, str(HERE), "--output", str(output), "--run", job["name"]]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        (folder / "error.txt").write_text(done.stderr)
        logger.error("%s failed:\n%s", job["name"], done.stderr[-2000:])
        return None
    row = json.loads((folder / "result.json").read_text())
    reached = row["table"].get("adapter@1", row["table"]["base@1"])
    shown = ", ".join(f"{name} {reached[name]:.3f}" for name in SCORERS)
    logger.warning("%s: %s (%.0f s)", job["name"], shown, time.perf_counter() - started)
    return row


def everything(args) -> int:
    """Runs what has not been run; returns the exit code."""
    settings = yaml.safe_load(Path(args.settings).read_text())
    size = settings["quick" if args.quick else "full"]
    results = args.output / "results.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    done = {row["name"]: row for row in read(results)}
    failed = 0
    plan = Plan(settings, size, done)
    for jobs in [plan.untuned()] if args.stage == "untuned" else plan.stages():
        waiting = [job for job in jobs if not is_done(job, done)]
        for name in {job["name"] for job in waiting} & set(done):
            logger.warning("%s: its settings have changed since it ran", name)
            del done[name]
        whole = results.with_suffix(".tmp")  # without a last line that a kill has cut off, or what is run again
        whole.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
        os.replace(whole, results)
        logger.warning("%s: %d runs, %d to do", jobs[-1]["stage"], len(jobs), len(waiting))
        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(lambda job: execute(job, args.output), waiting):
                if row is None:
                    failed += 1
                    continue
                done[row["name"]] = row
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
        if failed:  # what follows is chosen by what these would have shown
            logger.error("%d runs failed; run the command again to repeat them", failed)
            return 1
    return 0


def is_done(job: dict, done: dict[str, dict]) -> bool:
    """Whether `job` has been run as it is planned now."""
    return {name: done.get(job["name"], {}).get(name) for name in job} == job


def read(results: Path) -> list[dict]:
    """The finished runs; a line that was cut off by a kill does not count."""
    rows = []
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("passing over a line of %s that is not whole", results)
    return rows


# ---- tables ----


def cell(runs: list[dict], row: str, name: str, others: list[dict] | None = None, other_row: str = "base@1") -> str:
    """
    Difference of a row of `runs` to a row of `others` (by default to the base with one step), with its 95 % interval
    over training seeds and prompts.
    """
    from es_trl.evaluation import runs_difference

    models = [run["per_prompt"][row][name] for run in runs]
    references = [run["per_prompt"][other_row][name] for run in (runs[:1] if others is None else others)]
    found = runs_difference(models, references)
    if not found.low < found.high:  # too few prompts, or all differ alike: nothing to estimate a width from
        return f"{found.delta:+.3f}"
    return f"{found.delta:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def tables(output: Path) -> str:
    """Markdown: per stage and reward a table of methods, and the trials."""
    from es_trl.trainer import METHODS

    order = [BASE, "tune", *STAGES, *METHODS]  # what was run again comes last in the file
    rows = sorted(read(output / "results.jsonl"), key=lambda row: [order.index(row[k]) for k in ("stage", "method")])
    for row in rows:
        row["per_prompt"] = json.loads((output / "runs" / row["name"] / PER_PROMPT).read_text())
    parts = []
    for stage, reward in dict.fromkeys((row["stage"], row["reward"]) for row in rows if row["stage"] in STAGES):
        runs = [row for row in rows if (row["stage"], row["reward"]) == (stage, reward)]
        base = next((row for row in rows if row["stage"] == BASE and row["reward"] == reward), None)
        parts += [f"### Equal {stage}, trained on {reward}", "", method_table(runs, base, reward), ""]
        parts += [against_es(runs, reward), ""]
    trials = [row for row in rows if row["stage"] == "tune"]
    if trials:
        parts += ["### Trials", "", trial_table(trials), ""]
    return "\n".join(parts)


def method_table(runs: list[dict], base: dict | None, reward: str) -> str:
    """One line per method, over its seeds; the base with two steps and the best of several of its images."""
    trained = reward if reward in SCORERS else TRAINED
    header = ["method", "seeds", "images", "CPU s", "training MB", f"{trained}, 1 step", f"{HELD_OUT}, 1 step",
              f"{trained}, 2 steps", f"{HELD_OUT}, 2 steps", "hard negatives", "diversity"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        numbers = [str(len(own)), f"{median(run['images'] for run in own):.0f}"]
        numbers += [f"{median(run[name] for run in own):.0f}" for name in ("cpu_seconds", "training_megabytes")]
        cells = [cell(own, f"adapter@{n}", name) for n in (1, 2) for name in (trained, HELD_OUT)]
        judged = [mean_of(own, "adapter@1", name) for name in ("hard_negative_accuracy", "diversity")]
        lines.append("| " + " | ".join([method, *numbers, *cells, *judged]) + " |")
    judged = [
        [mean_of(runs[:1], f"base@{n}", name) for name in ("hard_negative_accuracy", "diversity")] for n in (1, 2)
    ]
    two = [cell(runs[:1], "base@2", name) for name in (trained, HELD_OUT)]
    lines.append("| " + " | ".join(["base", "", "0", "0", "", "0", "0", *two, *judged[0]]) + " |")
    for name in ("best of 4", "best of 8") if base is not None else ():
        cells = [cell([base], name, scorer) for scorer in (trained, HELD_OUT)]
        lines.append("| " + " | ".join([f"base, {name}", "", "0", "0", "", *cells, "", "", "", ""]) + " |")
    return "\n".join(lines)


def against_es(runs: list[dict], reward: str) -> str:
    """One line per other method: how far ES is ahead of it."""
    trained = reward if reward in SCORERS else TRAINED
    header = ["ES minus", *(f"{name}, {n} step{'s' * (n > 1)}" for n in (1, 2) for name in (trained, HELD_OUT))]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    own = [run for run in runs if run["method"] == "es"]
    for method in dict.fromkeys(run["method"] for run in runs if run["method"] != "es"):
        others = [run for run in runs if run["method"] == method]
        rows = [(f"adapter@{n}", name) for n in (1, 2) for name in (trained, HELD_OUT)]
        cells = [cell(own, row, name, others, row) for row, name in rows]
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines)


def mean_of(runs: list[dict], row: str, name: str) -> str:
    values = [run["table"][row][name] for run in runs if name in run["table"][row]]
    return f"{sum(values) / len(values):.3f}" if values else ""


def trial_table(trials: list[dict]) -> str:
    """Every trial on the validation prompts, so that the choice can be checked."""
    lines = ["| method | trial | settings | " + " | ".join(SCORERS) + " | CPU s |", "|---" * (len(SCORERS) + 4) + "|"]
    for row in sorted(trials, key=lambda row: (row["method"], row["trial"])):
        scores = " | ".join(cell([row], "adapter@1", name) for name in SCORERS)
        shown = ", ".join(f"{key} {value}" for key, value in row["tried"].items())
        lines.append(f"| {row['method']} | {row['trial']} | {shown} | {scores} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/head_to_head"))
    parser.add_argument("--settings", default=str(HERE.with_suffix(".yaml")), help="methods, trials and budgets")
    parser.add_argument("--quick", action="store_true", help="few images, one seed: shows that it runs, no more")
    parser.add_argument("--stage", choices=["all", "untuned"], default="all", help="what to run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--table", action="store_true", help="print the tables of what has been run")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the name of one run: what the processes are started with
    args = parser.parse_args()
    args.output = args.output.resolve()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if args.table:
        print(tables(args.output))
        return 0
    if args.run is None:
        return everything(args)
    folder = args.output / "runs" / args.run
    row = run(json.loads((folder / "job.json").read_text()), folder)
    (folder / "result.json").write_text(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
