"""Run folders as training leaves them, without a model: made-up scores, plain pictures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from es_trl.evaluation import gap_closure, mean_estimate, paired_difference
from es_trl.run.samples import tiles


TRAINED, HELD_OUT = "tiny-pickscore", "tiny-clip-heldout"
ROWS = {"base@1": (False, 1, 0.0), "adapter@1": (True, 1, 1.0), "base@2": (False, 2, 0.8)}
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "green") for thing in ("cat", "house", "star", "fish")]
COLOURS = {"base@1": "gray", "adapter@1": "orange", "base@2": "navy"}


def run_folder(path: Path, seed: int = 0, gain: float = 1.0, prompts: list[str] | None = None, **settings) -> Path:
    """A finished run with everything in it; `gain` is what the adapter adds to every score."""
    prompts = PROMPTS if prompts is None else prompts
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    ease = np.random.default_rng(99).normal(size=(len(prompts), 1))
    scores = {}
    for row, (adapter, _, level) in ROWS.items():
        for k, reward in enumerate((TRAINED, HELD_OUT)):
            noise = 0.1 * rng.normal(size=(len(prompts), 2))
            scores[row, reward] = 20 + k + ease + (gain * level if adapter else level) + noise
    write_evaluation(path, scores, prompts)
    write_log(path, gain)
    config = {"seed": seed, "output_dir": str(path), "sigma": 0.1, "population_size": 4, **settings}
    top = {
        "method": "es",
        "about": {"label": "ES"},
        "base_model": "tiny-sana-sprint",
        "reward_funcs": [TRAINED],
        "eval_reward_funcs": [HELD_OUT],
    }
    (path / "es_config.json").write_text(json.dumps({**top, "train_prompts": 512, "config": config}))
    env = {"es_trl": "0.1.0", "packages": {"torch": "2.14.1"}, "cpu": "a CPU", "cpu_cores": 2, "gpus": []}
    (path / "env.json").write_text(json.dumps(env))
    (path / "rerun.yaml").write_text("max_steps: 4\n")
    write_samples(path)
    return path


def write_evaluation(path: Path, scores: dict, prompts: list[str]) -> None:
    """eval.json, scores.parquet and pictures in the layout of docs/evaluation.md."""
    rewards = (TRAINED, HELD_OUT)
    rows, paired, lines = [], [], []
    for row, (adapter, steps, _) in ROWS.items():
        entry = {"name": row, "adapter": adapter, "num_inference_steps": steps, "adapter_scale": 1.0, "rewards": {}}
        for reward in rewards:
            found = mean_estimate(scores[row, reward], resamples=200)
            summary = {"mean": found.value, "ci_low": found.low, "ci_high": found.high, "prompts": len(prompts)}
            entry["rewards"][reward] = summary | {"missing": 0}
            if row != "base@1":
                diff = paired_difference(scores[row, reward], scores["base@1", reward], resamples=200)
                paired.append({
                    "row": row, "against": "base@1", "reward": reward, "delta": diff.delta, "ci_low": diff.low,
                    "ci_high": diff.high, "win_rate": diff.win_rate, "win_rate_ci_low": diff.win_low,
                    "win_rate_ci_high": diff.win_high, "prompts": len(prompts), "missing": 0, "holm_p": 0.0004,
                })  # fmt: skip
        rows.append(entry)
        for p in range(len(prompts)):
            for j in range(2):
                values = {f"reward/{reward}": scores[row, reward][p, j] for reward in rewards}
                lines.append({"row": row, "prompt_index": p, "image": j, "image_index": j, **values})
    gaps = {
        reward: gap_closure(*(scores[row, reward] for row in ("adapter@1", "base@1", "base@2")), resamples=200)
        for reward in rewards
    }
    table = {
        "rows": rows,
        "paired": paired,
        "gap_closure": {reward: gap.value for reward, gap in gaps.items()},
        "gap_closure_ci": {reward: [gap.low, gap.high] for reward, gap in gaps.items()},
        "gap_closure_rows": {"model": "adapter@1", "base": "base@1", "target": "base@2"},
        "exploratory": {"note": "", "entries": [
            {"by": "category", "value": value, "row": "adapter@1", "against": "base@1", "reward": HELD_OUT,
             "prompts": 4, "delta": delta, "ci_low": delta - 0.2, "ci_high": delta + 0.2, "win_rate": 0.7}
            for value, delta in (("Animals", 0.4), ("Food & Beverage", -0.3))
        ]},
        "pictures": pictures(path, scores, prompts),
        "protocol": {"prompts": len(prompts), "prompts_sha256": f"{len(prompts):064d}", "images_per_prompt": 2,
                     "seed": 7, "resamples": 200, "confidence": 0.95, "unit": "prompt",
                     "pipeline": {"pipeline": "SanaSprintPipeline", "num_inference_steps": 1}},
    }  # fmt: skip
    (path / "eval.json").write_text(json.dumps(table, default=float))
    pd.DataFrame(lines).to_parquet(path / "scores.parquet")


def pictures(path: Path, scores: dict, prompts: list[str]) -> list[dict]:
    """Every prompt as a pair, best first by the held-out change, the files on disk."""
    entries = []
    change = (scores["adapter@1", HELD_OUT] - scores["base@1", HELD_OUT]).mean(axis=1)
    order = np.argsort(-change)
    for place, p in enumerate(map(int, order)):
        files = {}
        for row, colour in COLOURS.items():
            files[row] = f"images/{row.replace('@', '-')}/{p:05d}-00.jpg"
            (path / files[row]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(path / files[row])
        kind = ("best", "typical", "worst")[3 * place // len(order)]
        entries.append({"prompt_index": p, "image": 0, "prompt": prompts[p], "kind": kind, "change": change[p],
                        "reward": HELD_OUT, "row": "adapter@1", "against": "base@1", "files": files})  # fmt: skip
    return entries


def write_log(path: Path, gain: float) -> None:
    """trainer_state.json with four steps and two evaluations."""
    log = []
    for step in range(1, 5):
        budget = {"step": step, "num_images": 8 * step, "train_time": 30.0 * step}
        log.append({f"rewards/{TRAINED}/mean": 20 + gain * step / 4, "step_time": 30.0, **budget})
        if step % 2 == 0:
            values = {f"eval_rewards/{name}/mean": 20 + gain * step / 4 for name in (TRAINED, HELD_OUT)}
            log.append({**values, "eval_reward": 20.0, **budget})
    (path / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def write_samples(path: Path) -> None:
    """Sample sheets and one population, as SampleCallback leaves them."""
    folder = path / "samples"
    folder.mkdir()
    lines = []
    for step in (0, 4):
        name = f"step-{step:06d}.jpg"
        Image.new("RGB", (40, 20), (step * 20, 90, 90)).save(folder / name)
        lines.append({"file_name": name, "step": step, "prompts": PROMPTS[:2]})
    members = [{"label": label, "reward": 20.0 - i} for i, label in enumerate(("best", "median", "worst"))]
    tiles([[Image.new("RGB", (8, 8), (80 * i, 0, 0))] * 2 for i in range(3)]).save(folder / "members-000004-tiles.jpg")
    entry = {"file_name": "members-000004.jpg", "tiles": "members-000004-tiles.jpg", "step": 4, "members": members}
    lines.append({**entry, "prompts": PROMPTS[:2]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
