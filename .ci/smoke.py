"""
Does an installed es_trl work: train, checkpoint, resume, load elsewhere, evaluate, card, page, every method, every recipe.

    cd /somewhere/else && python /path/to/.ci/smoke.py          # prints one line a part; exit code 1 at the first failure
    python .ci/smoke.py --only import train resume              # some parts

Nothing of the repository is read; what is tested is the es_trl that this Python imports.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
PROMPTS = ["a red apple", "two blue cats", "a green frog", "a pink dog"]
TINY = {"max_sequence_length": 16, "sample_steps": 0, "lora_rank": 2, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, "prompts_per_step": 2, "max_steps": 2}  # fmt: skip
WORDS = {"max_sequence_length": "16", "population_size": "4", "prompts_per_step": "2", "max_steps": "1",
         "use_cpu": "true", "report_to": "none", "sample_steps": "0", "max_eval_prompts": "2",
         "max_test_prompts": "2"}  # fmt: skip


def redness(images, **_):
    return [image.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]


def trainer_of(folder: Path, method: str = "ES", **settings):
    import es_trl

    trainer = getattr(es_trl, f"{method}Trainer")
    config = trainer.config_class(output_dir=str(folder), **(TINY | settings))
    return trainer("tiny-sana-sprint", redness, args=config, train_dataset=PROMPTS)


def imports(folder: Path) -> None:
    import es_trl.cli
    import es_trl.evaluation
    import es_trl.hub
    import es_trl.report
    import es_trl.trainer  # noqa: F401


def train(folder: Path) -> None:
    trainer = trainer_of(folder / "run", population_size=4, save_strategy="steps", save_steps=1, sample_steps=1)
    trainer.train()
    trainer.save_model()


def resume(folder: Path) -> None:
    from safetensors.torch import load_file

    settings = {"population_size": 4, "save_strategy": "steps", "save_steps": 1, "sample_steps": 1}
    trainer = trainer_of(folder / "again", **settings)
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-1"))
    trainer.save_model()
    name = "pytorch_lora_weights.safetensors"
    one, two = (load_file(folder / run / name) for run in ("run", "again"))
    assert all((one[key] == two[key]).all() for key in one), "a resumed run is another run"


def load(folder: Path) -> None:
    from es_trl.pipelines import load_pipeline

    pipe = load_pipeline("tiny-sana-sprint")
    pipe.load_lora_weights(str(folder / "run"), weight_name="pytorch_lora_weights.safetensors")
    assert pipe.get_list_adapters(), "the adapter was not loaded"


def command(*words: str) -> None:
    from es_trl.cli import main

    code = main(list(words))
    assert code == 0, f"es-trl {' '.join(words)}: exit code {code}"


def evaluate(folder: Path) -> None:
    Path(folder, "prompts.txt").write_text("\n".join(PROMPTS))
    command("eval", "--adapter", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), "--rewards",
            "jpeg_compressibility", "--output_dir", str(folder / "eval"))  # fmt: skip
    assert json.loads(Path(folder, "eval", "eval.json").read_text())["rows"]


def page(folder: Path) -> None:
    command("report", str(folder / "run"))
    assert Path(folder, "run", "report", "index.html").stat().st_size > 1000
    assert "tiny-sana-sprint" in Path(folder, "run", "README.md").read_text(encoding="utf-8")


def scorers(folder: Path) -> None:
    from PIL import Image

    from es_trl.rewards import RewardSet

    picture = Image.new("RGB", (64, 64), "red")
    names = ["tiny-clip-heldout", "tiny-pickscore", "jpeg_compressibility"]
    assert RewardSet(names)(PROMPTS[:1], [picture]).shape == (1, len(names))


def methods(folder: Path) -> None:
    for method in ("GRPO", "DiffusionDPO"):
        trainer_of(folder / method, method, max_steps=1).train()


def recipes(folder: Path) -> None:
    from es_trl.cli.recipes import recipes

    command("recipes", "list")
    assert recipes(), "no recipe travels with this installation"
    for name in recipes():  # models that are not here are counted from their shapes
        plan = [] if name.startswith("tiny") else ["--gpu", "80GB"]
        command("dry-run", "--config", name, "--output_dir", str(folder / "dry"), "--use_cpu", "true", *plan)
    words = [word for key, value in WORDS.items() for word in (f"--{key}", value)]
    command("train", "--config", "tiny_sana_sprint/es", "--output_dir", str(folder / "recipe"), *words)


PARTS = {"import": imports, "train": train, "resume": resume, "load": load, "eval": evaluate, "page": page,
         "scorers": scorers, "methods": methods, "recipes": recipes}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    chosen = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="es_trl-smoke-") as place:
        for name in chosen:
            started = time.perf_counter()
            try:
                PARTS[name](Path(place))
            except Exception as error:
                print(f"{name}: FAILED, {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
                return 1
            print(f"{name}: passed in {time.perf_counter() - started:.0f} s", flush=True)
    import es_trl

    print(f"es_trl {es_trl.__version__} in {Path(es_trl.__file__).parent}: {len(chosen)} parts passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
