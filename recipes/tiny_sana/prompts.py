"""The prompt files of the package: train; validation and test, whose every prompt has an unseen combination."""

import argparse
import json
from pathlib import Path

import numpy as np
from world import Scene, hard_negatives, sample_scene


ASSETS = Path(__file__).parents[2] / "es_trl" / "assets"
SIZES = {"train": 512, "validation": 128, "test": 512}
NEGATIVES = 7


def draw(seed: int) -> dict[str, list[Scene]]:
    """Distinct scenes of every split; no prompt is in two splits."""
    rng, used, splits = np.random.default_rng(seed), set(), {}
    for name, size in SIZES.items():
        scenes: list[Scene] = []
        while len(scenes) < size:
            scene = sample_scene(rng, unseen=name != "train")
            if scene.prompt not in used and len(hard_negatives(scene, rng, NEGATIVES)) == NEGATIVES:
                used.add(scene.prompt)
                scenes.append(scene)
        splits[name] = scenes
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "prompts")
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, scenes in draw(args.seed).items():
        (args.out / f"{name}.txt").write_text("".join(scene.prompt + "\n" for scene in scenes))
        if name != "train":
            rng = np.random.default_rng([args.seed, len(scenes)])
            rows = [{"prompt": s.prompt, "hard_negatives": hard_negatives(s, rng, NEGATIVES)} for s in scenes]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (args.out / f"{name}_hard_negatives.jsonl").write_text(text)


if __name__ == "__main__":
    main()
