"""
Toy runs on a disk that is really full: a small file system in memory, filled to the last byte in step 4.

    sudo python tests/soak/full_disk.py     # it mounts a tmpfs, which takes root

With `save_failure="raise"` the run ends; with `"warn"` it goes on, and the disk is emptied again in step 7. Then the
run that ended is resumed. JSON: how each ended, what it said, which checkpoints stood, whether the last adapter is
that of a run with enough room, and whether the journal gives that adapter.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from safetensors.torch import load_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from es_trl import ESConfig, ESTrainer  # noqa: E402
from es_trl.pipelines import tensor_digest  # noqa: E402
from es_trl.replay import verify_run  # noqa: E402
from recipes.benchmarks.toy_pipeline import redness, toy_pipeline  # noqa: E402


class Filler(TrainerCallback):
    """Fills the file system at the end of step 4 and empties it at the end of step 7."""

    def __init__(self, path: Path):
        self.path = path

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            with contextlib.suppress(OSError), open(self.path, "wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * 512)
        elif state.global_step == 7:
            self.path.unlink(missing_ok=True)


def train(folder: Path, save_failure: str = "raise", resume: str | None = None, callbacks=()) -> None:
    config = ESConfig(
        output_dir=str(folder), max_steps=10, population_size=6, members_per_forward=2, prompts_per_step=2,
        lora_rank=2, lora_target_modules=["to_q", "to_out"], sample_steps=2, report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="steps", save_steps=2, save_failure=save_failure, use_cpu=True,
    )  # fmt: skip
    prompts = [f"prompt {i}" for i in range(12)]
    trainer = ESTrainer(toy_pipeline(), redness, args=config, train_dataset=prompts, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()


def adapter(folder: Path) -> str:
    return tensor_digest(load_file(folder / "pytorch_lora_weights.safetensors"))


def attempt(save_failure: str, expected: str) -> dict:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("es_trl").addHandler(handler)
    with tempfile.TemporaryDirectory(prefix="es_trl-full-") as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
        try:
            folder, filler = Path(place, "run"), Filler(Path(place, "filler"))
            try:
                train(folder, save_failure, callbacks=[filler])
                ended = "to its end"
            except OSError as error:
                ended = f"{type(error).__name__}: {error}"
            stood = sorted(name for name in os.listdir(folder) if "checkpoint" in name)
            filler.path.unlink(missing_ok=True)
            if ended != "to its end":
                train(folder, resume="latest")
            same, proven = adapter(folder) == expected, verify_run(folder, toy_pipeline).proven
        finally:
            subprocess.run(["umount", place], check=True)
            logging.getLogger("es_trl").removeHandler(handler)
    return {"ended": ended, "said": said, "checkpoints": stood, "same_adapter": same, "journal_proves_it": proven}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train(Path(folder))
        expected = adapter(Path(folder))
        found = {save_failure: attempt(save_failure, expected) for save_failure in ("raise", "warn")}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
