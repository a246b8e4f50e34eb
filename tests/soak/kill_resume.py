"""
Kills a toy run with `kill -9` at random moments, resumes it, and looks whether it ends in the undisturbed run's bits.

Every trial is one run of 30 steps with a checkpoint every 3. It is killed once: at a random time, or (every second
trial) a random few milliseconds into the writing of a checkpoint; then it is resumed from what is there. One JSON line
per trial: where the kill hit, what it left, how many micro-batches were drawn twice, and whether the LoRA, the log and
the journal are those of the run that nobody killed.

    python tests/soak/kill_resume.py --kills 100 --output outputs/kills.jsonl
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from es_trl import ESConfig, ESTrainer  # noqa: E402
from es_trl.files import read_lines  # noqa: E402
from es_trl.pipelines import tensor_digest  # noqa: E402
from es_trl.run.checkpoint import last_checkpoint  # noqa: E402
from recipes.benchmarks.toy_pipeline import redness, toy_pipeline  # noqa: E402


PROMPTS = [f"prompt {i}" for i in range(12)]
CLOCK = ("time", "runtime", "per_second", "overhead", "train_loss", "memory")


def train(folder: Path) -> None:
    """The run of a trial, or what is left of it; notes every micro-batch that it draws."""
    config = ESConfig(
        output_dir=str(folder), max_steps=30, population_size=6, members_per_forward=2, prompts_per_step=2,
        lora_rank=2, lora_target_modules=["to_q", "to_out"], sample_steps=0, report_to="none", disable_tqdm=True,
        logging_steps=2, save_strategy="steps", save_steps=3, travel=5.0, use_cpu=True,
        optim="adamw_torch", es_space="lora", lr_scheduler_type="cosine",
    )  # fmt: skip
    trainer = ESTrainer(toy_pipeline(), redness, args=config, train_dataset=PROMPTS)
    draw, log = trainer.rollout.draw, os.open(folder / "draws.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(members, batch, factors, step, micro=0):
        images = draw(members, batch, factors, step, micro)
        os.write(log, f"{step} {members[0]}\n".encode())
        return images

    trainer.rollout.draw = noted
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    entries = [{k: v for k, v in e.items() if not any(w in k for w in CLOCK)} for e in trainer.state.log_history]
    (folder / "history.json").write_text(json.dumps([entry for entry in entries if "loss" in entry], sort_keys=True))


def start(folder: Path) -> int:
    """Forks a child that trains; everything is imported already, so it draws after a fraction of a second."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(folder / "output.log", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        train(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def finish(folder: Path) -> None:
    _, status = os.waitpid(start(folder), 0)
    if status:
        raise RuntimeError(f"the run in {folder} failed: {(folder / 'output.log').read_text()[-2000:]}")


def outcome(folder: Path) -> dict:
    steps = [entry for entry in read_lines(folder / "journal.jsonl") if "step" in entry]
    draws = (folder / "draws.log").read_text().split("\n")[:-1]
    return {
        "lora": tensor_digest(load_file(folder / "pytorch_lora_weights.safetensors")),
        "history": (folder / "history.json").read_text(),
        "journal": steps,
        "draws": draws,
    }


def kill_one(folder: Path, in_save: bool, seconds: float, rng: random.Random) -> dict:
    """Starts a run, kills it, and says what that left."""
    pid, began = start(folder), time.monotonic()
    nth, delay = rng.randint(1, 9), rng.uniform(0, seconds)
    seen: set[str] = set()
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if in_save:
            seen |= {name for name in os.listdir(folder) if name.startswith(".tmp-") and "checkpoint" in name}
            if len(seen) >= nth:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.0005)
        elif time.monotonic() - began >= delay:
            break
        else:
            time.sleep(0.001)
    else:
        return {"killed": False}
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    names = os.listdir(folder)
    whole = last_checkpoint(folder)
    journal = (folder / "journal.jsonl").read_bytes() if "journal.jsonl" in names else b""
    return {
        "killed": True,
        "seconds": round(time.monotonic() - began, 3),
        "torn_save": any(name.startswith(".tmp-") for name in names),
        "torn_line": bool(journal) and not journal.endswith(b"\n"),
        "resumed_from": int(whole.rpartition("-")[2]) if whole else None,
        "steps_done": journal.count(b'"step"'),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/kills.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng, scratch = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="es_trl-kills-"))
    os.makedirs(os.path.dirname(os.path.abspath(arguments.output)), exist_ok=True)
    (scratch / "whole").mkdir()
    began = time.monotonic()
    finish(scratch / "whole")
    seconds = time.monotonic() - began
    expected = outcome(scratch / "whole")
    kills, differing = 0, []
    while kills < arguments.kills:
        folder = scratch / f"trial-{kills}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        result = kill_one(folder, kills % 2 == 1, seconds, rng)
        if not result.pop("killed"):
            continue  # it was over before its time came: not a kill
        finish(folder)
        ended = outcome(folder)
        result |= {
            "kill": kills,
            "aimed_at": "a save" if kills % 2 else "any time",
            "drawn_twice": len(ended["draws"]) - len(expected["draws"]),
            **{f"same_{name}": ended[name] == expected[name] for name in ("lora", "history", "journal")},
        }
        with open(arguments.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        if not all(value for name, value in result.items() if name.startswith("same_")):
            differing.append(kills)
        kills += 1
        shutil.rmtree(folder)
    shutil.rmtree(scratch)
    print(f"{kills} kills, {len(differing)} of them ended in other bits: {differing}")
    sys.exit(int(bool(differing)))


if __name__ == "__main__":
    main()
