"""ES, DDPO, GRPO, Pref-GRPO and DPO with equal tuning, at equal images and at equal seconds, on the shipped model.

Stages, each run a process of its own with one thread: every method tries its settings of head_to_head.yaml on
`tiny-train` and is judged on `tiny-validation` (tune); the best ones train with several seeds for as many images, for
three rewards (images), and for as many processor seconds (seconds), and with the margin as objective or beside the
reward (objectives); every method trains at the defaults of its config, which is what a user gets (untuned), ES for
other budgets as well (budgets); rules of others train at their defaults (opponents). Tables are on `tiny-test`.

    python recipes/benchmarks/head_to_head.py --output outputs/head_to_head
    python recipes/benchmarks/head_to_head.py --output outputs/head_to_head --table > table.md
    python recipes/benchmarks/head_to_head.py --output outputs/quick --quick
    python recipes/benchmarks/head_to_head.py --output outputs/head_to_head --stage untuned budgets --methods es
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
from head_to_head_tables import BASE, CALLS, HELD_OUT, PER_PROMPT, SCORERS, STAGES, TRAINED, read, tables


logger = logging.getLogger("head_to_head")

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
NEED_TRIALS = ("images", "seconds", "objectives")
TUNING_SEED, EVALUATION_SEED = 100, 4321


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
    trainer.save_model()
    trainer.save_state()
    table, _ = evaluated(trainer.adapter, prompts, job, folder, rows)
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
    from processor_clock import ProcessorClock

    config_class, trainer_class = classes_of(job.get("of", job["method"]))
    config = config_class(output_dir=str(folder), seed=job["seed"], eval_reward_funcs=[HELD_OUT], **job["settings"])
    config.max_steps = max(1, job["budget_images"] // images_per_step(config))
    if job["stage"] != "tune":  # curves of the held-out prompts, for es-trl compare
        config.eval_strategy, config.eval_steps = type(config.eval_strategy)("steps"), max(1, config.max_steps // 4)
    clock = ProcessorClock()
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


def classes_of(method: str):
    """Config and trainer of a method of the library, or of one that is here for comparison."""
    from es_trl.trainer import config_of, trainer_of

    if method == "nft":
        from nft import NFTConfig, NFTTrainer

        return NFTConfig, NFTTrainer
    return config_of(method), trainer_of(method)


def images_per_step(config) -> int:
    """Images that a step of these settings draws."""
    if hasattr(config, "population_size"):
        return config.population_size * config.images_per_member
    return config.num_generations * config.prompts_per_step


def evaluated(adapter, prompts: list[str], job: dict, folder: Path, rows: list[tuple[bool, int]], images: int = 2):
    """Draws rows (adapter or base, steps) and writes eval.json and per_prompt.json: means of rows, and all scores."""
    import numpy as np

    from es_trl import RewardSet, evaluate
    from es_trl.evaluation import EvaluationRow, load_judge
    from es_trl.hub import adapter_digest

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
    result.details["judged"] = {"adapter": adapter_digest(folder)}  # pages show nothing of another adapter's
    result.save(folder / "eval.json")
    scores = {row.name: {name: result.of(row.name, name) for name in SCORERS} for row in rows}
    for row in rows:
        scores[row.name] |= result.judge_scores[row.name]
    return write_per_prompt(scores, folder), {name: np.asarray(values) for name, values in scores["base@1"].items()}


def write_per_prompt(scores: dict, folder: Path) -> dict:
    """Writes every row's mean of each prompt, so that tables can be made of several runs; returns the rows' means."""
    import numpy as np

    per_prompt = {
        row: {k: np.nanmean(v, axis=1).round(5).tolist() for k, v in of.items()} for row, of in scores.items()
    }
    (folder / PER_PROMPT).write_text(json.dumps(per_prompt))
    return {row: {name: float(np.mean(value)) for name, value in of.items()} for row, of in per_prompt.items()}


def base_line(job: dict, prompts: list[str], folder: Path) -> dict:
    """The base with one step, the best of several of its images, and of as many of a search over the noise."""
    import numpy as np
    import torch
    from noise_search import search_noise

    from es_trl import RewardSet
    from es_trl.evaluation import load_judge
    from es_trl.pipelines import CallSettings, PipelineAdapter, load_pipeline

    names = ("guidance_scale", "max_sequence_length", "num_inference_steps")
    settings = CallSettings(**{name: job["settings"][name] for name in names})
    adapter = PipelineAdapter(load_pipeline("tiny-sana-sprint", torch.float32), settings=settings)
    table, scores = evaluated(adapter, prompts, job, folder, [(False, 1)], images=max(CALLS))
    trained, judge = job["reward"] if job["reward"] in SCORERS else TRAINED, load_judge(HELD_OUT, prompts)
    reward = RewardSet(trained)
    rows = {"base@1": scores}
    for calls in CALLS:
        chosen = scores[trained][:, :calls].argmax(axis=1)
        rows[f"best of {calls}"] = {
            name: values[np.arange(len(prompts)), chosen][:, None]
            for name, values in scores.items()
            if values.shape[1] == max(CALLS)
        }
    found = search_noise(adapter, prompts, lambda texts, images: reward(texts, images)[:, 0], CALLS, EVALUATION_SEED)
    for calls, pictures in found.items():
        values = RewardSet(list(SCORERS))(prompts, pictures)
        searched = {name: values[:, [k]] for k, name in enumerate(SCORERS)}
        searched |= judge.prompt_scores(prompts, judge.image_features(pictures)[:, None])
        rows[f"noise search {calls}"] = searched
    return job | {"table": table | write_per_prompt(rows, folder)}


# ---- the plan ----


class Plan:
    """
    What is to be run, given what has been.

    Args:
        settings (`dict`): head_to_head.yaml.
        size (`dict`): Its part `full` or `quick`.
        done (`dict[str, dict]`): Finished runs by name.
        only (`Sequence[str]`): Stages to run, and what they need; all of them by default.
        methods (`Sequence[str]`, *optional*): Methods to run; all of them by default.
    """

    def __init__(self, settings: dict, size: dict, done: dict[str, dict], only=(), methods=None):
        self.settings, self.size, self.done, self.only = settings, size, done, set(only)
        self.methods = list(methods or settings["methods"])
        self.entries = settings["methods"] | settings["opponents"] | {BASE: {"speed": {}}}
        self.rewards = list(settings["rewards"])[: size["rewards"]]
        self.first_reward = self.rewards[0]

    def stages(self):
        """Lists of jobs; those of a list do not depend on each other, but on the lists before."""
        if self.wanted("tune", *NEED_TRIALS):
            yield [self.job("tune", method, number, self.first_reward, TUNING_SEED, self.size["trial_images"])
                   for method in self.methods
                   for number in range(min(self.size["trials"], len(self.entries[method]["trials"])))]  # fmt: skip
        if self.wanted("images", "seconds"):
            bases = [self.job(BASE, BASE, None, reward, 0, 0) for reward in self.rewards if reward in SCORERS]
            yield bases + self.jobs("images", self.rewards)
        if self.wanted("seconds"):
            yield self.jobs("seconds", self.rewards[:1])
        if self.wanted("untuned"):
            yield self.jobs("untuned", self.rewards)
        if self.wanted("budgets"):
            yield [self.job("budgets", method, None, self.first_reward, seed, images)
                   for method, budgets in self.settings["budgets"].items() if method in self.methods
                   for images in budgets[: self.size["budgets"]] for seed in self.size["seeds"]]  # fmt: skip
        if self.wanted("objectives"):
            yield self.jobs("objectives", list(self.settings["objectives"])[: self.size["objectives"]])
        if self.wanted("opponents"):
            yield [self.job("opponents", name, 0, self.first_reward, seed, self.size["images"])
                   for name in list(self.settings["opponents"])[: self.size["opponents"]]
                   for seed in self.size["seeds"]]  # fmt: skip

    def wanted(self, *stages: str) -> bool:
        """Whether one of `stages` is to be run."""
        return not self.only or bool(self.only & set(stages))

    def jobs(self, stage: str, rewards: list[str]) -> list[dict]:
        """A stage of every method with every reward and seed: its best trial, or its defaults."""
        best = {method: self.best_trial(method) if stage in NEED_TRIALS else None for method in self.methods}
        images = dict.fromkeys(self.methods, self.size["images"])
        if stage == "seconds":
            images = {method: self.images_in_time(method) for method in self.methods}
        return [
            self.job(stage, method, best[method], reward, seed, images[method])
            for reward in rewards
            for seed in self.size["seeds"]
            for method in self.methods
        ]

    def job(self, stage: str, method: str, trial: int | None, reward: str, seed: int, images: int) -> dict:
        """One run as plain data."""
        entry = self.entries[method]
        settings = self.settings["shared"] | entry["speed"]
        if trial is not None:
            settings |= entry.get("fixed", {}) | entry["trials"][trial]
        tune = stage == "tune"
        parts = [stage, method, str(trial)] if tune else [stage, reward, method, str(seed)]
        if stage == "budgets":
            parts.insert(3, str(images))
        return {
            "name": "-".join(parts if stage != BASE else [BASE, reward]),
            "stage": stage,
            "method": method,
            **({"of": entry["of"]} if "of" in entry else {}),
            "trial": trial,
            "tried": entry["trials"][trial] if trial is not None else {},
            "settings": settings,
            "reward": reward,
            "reward_funcs": (self.settings["rewards"] | self.settings["objectives"])[reward],
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


def read_settings(path: Path) -> dict:
    """Methods, trials, budgets, and the opponents, which have a file of their own."""
    settings = yaml.safe_load(path.read_text())
    return settings | {"opponents": yaml.safe_load((HERE.parent / settings["opponents"]).read_text())}


def everything(args) -> int:
    """Runs what has not been run; returns the exit code."""
    settings = read_settings(Path(args.settings))
    size = settings["quick" if args.quick else "full"]
    results = args.output / "results.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    done = {row["name"]: row for row in read(results)}
    failed = 0
    for jobs in filter(None, Plan(settings, size, done, args.stage, args.methods).stages()):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/head_to_head"))
    parser.add_argument("--settings", default=str(HERE.with_suffix(".yaml")), help="methods, trials and budgets")
    parser.add_argument("--quick", action="store_true", help="few images, one seed: shows that it runs, no more")
    parser.add_argument("--stage", nargs="+", choices=["tune", *STAGES], default=[], help="what to run; else all")
    parser.add_argument("--methods", nargs="+", help="of the settings; all of them by default")
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
