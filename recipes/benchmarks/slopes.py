"""Slopes of a healthy run and of a hacked one, side by side: when each would have stopped, and what the judge said.

Both train the shipped model and ignore what the slopes say (`when_margin_turns: ignore`). The healthy one maximises
`tiny-pickscore`, and its margin is watched; the hacked one maximises small JPEG files under the guard
`tiny-pickscore`. `tiny-clip-heldout` judges the validation prompts on the way and takes part in neither.

    python recipes/benchmarks/slopes.py --output outputs/slopes        # four minutes of one core
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from es_trl import ESConfig, ESTrainer
from es_trl.es import Turn
from es_trl.report import charts, slopes, svg


JUDGE = "tiny-clip-heldout"
RUNS = {
    "healthy": {"reward_funcs": "tiny-pickscore", "max_steps": 32},
    "hacked": {"reward_funcs": "jpeg_compressibility", "guard_reward_funcs": ["tiny-pickscore"], "max_steps": 8},
}
SHARED = {"guidance_scale": 2.0, "max_sequence_length": 16, "members_per_forward": 64, "use_cpu": True,
          "logging_steps": 1,
          "when_margin_turns": "ignore", "eval_strategy": "steps", "eval_on_start": True, "sample_steps": 0,
          "save_strategy": "no", "disable_tqdm": True, "per_device_eval_batch_size": 64}  # fmt: skip


def train(settings: dict, folder: Path, seed: int) -> list[dict]:
    """The log of a run."""
    settings = dict(settings)
    rewards, steps = settings.pop("reward_funcs"), settings["max_steps"]
    config = ESConfig(
        output_dir=str(folder), seed=seed, eval_steps=max(1, steps // 8), eval_reward_funcs=[JUDGE],
        slope_reward_funcs=[JUDGE], **SHARED, **settings,
    )  # fmt: skip
    trainer = ESTrainer(
        "tiny-sana-sprint", rewards, config, train_dataset="tiny-train", eval_dataset="tiny-validation"
    )
    trainer.train()
    trainer.save_state()
    return trainer.state.log_history


def would_have_turned(history: list[dict], watched: str) -> tuple[int, int] | None:
    """The step at which what is watched had surely fallen, and the one whose theta the run would have gone back to."""
    turn, top, length = Turn(), 0, None
    for entry in history:
        if f"es/slope/{watched}" in entry and length:
            verdict = turn.add(entry[f"es/slope/{watched}"] * length, entry[f"es/slope_error/{watched}"] * length)
            if verdict == "top":
                top = entry["step"] - 1  # the members of a step stand where the step before has led
            if verdict == "turned":
                return entry["step"], top
        if "es/update_norm" in entry:
            length = entry["es/update_norm"] / entry["es/sigma"]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/slopes"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    drawn = []
    for name, settings in RUNS.items():
        log = args.output / name / "log.json"
        if not log.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(json.dumps(train(settings, log.parent, args.seed)))
        history = json.loads(log.read_text())
        way = slopes.read_way(history)
        key = f"eval_rewards/{JUDGE}/mean"
        judged = np.array([(entry["num_images"], entry[key]) for entry in history if key in entry])
        found = would_have_turned(history, way.watched)
        if found is not None:
            images = next(entry["num_images"] for entry in history if entry["step"] == found[0] and "loss" in entry)
            way.turns = [(found[0], images)]
        print(f"{name}: judge {judged[0, 1]:.2f} at the start, best {judged[:, 1].max():.2f} after "
              f"{judged[judged[:, 1].argmax(), 0]:.0f} images, {judged[-1, 1]:.2f} at the end; "
              + (f"turned at step {found[0]}, back to step {found[1]}" if found else "no turn"))  # fmt: skip
        title = f"{name}: {settings['reward_funcs']}"
        drawn.append(slopes.slope_chart(way, slopes.shown_slopes(way, [JUDGE]), title, (JUDGE, judged)))
    svg.save_png(charts.side_by_side(drawn), args.output / "slopes.png")
    print(f"{args.output / 'slopes.png'}")


if __name__ == "__main__":
    main()
