"""Two processes compute, bit by bit, what one computes, and write the same files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import PROMPTS, files_in, theta_of, tiny_trainer

from es_trl.report import write_report


LORA = "pytorch_lora_weights.safetensors"

# Three micro-batches for two processes: one of them draws twice as much. The second holds members of both groups.
RUN = {"max_steps": 2, "population_size": 6, "members_per_forward": 2, "save_strategy": "steps", "save_steps": 1,
       "eval_dataset": PROMPTS[:3], "eval_strategy": "steps", "eval_steps": 2, "sample_steps": 2,
       "num_sample_prompts": 1, "gradient_accumulation_steps": 2, "prompts_per_step": 2,
       "prompts_per_member": 1}  # fmt: skip

SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from test_trainer_distributed import RUN
from tiny_runs import tiny_trainer
from es_trl.files import write_json
from es_trl.report import write_report

def train():
    trainer = tiny_trainer({folder!r}, **RUN)
    trainer.train()
    trainer.save_model()
    process = trainer.args.process_index
    write_json({folder!r} + "/process-%d.json" % process, {{
        "world_size": trainer.args.world_size,
        "theta": {{name: value.tolist() for name, value in trainer.adapter.theta.items()}},
        "log_history": trainer.state.log_history,
    }})

launch = dict(run_id="two", rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **launch), train)()
write_report({reported!r})
"""
HASH_SEED = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not this process's


@pytest.fixture(scope="module")
def redrawn(one_process, tmp_path_factory):
    """A copy of the run of one process, of which the others draw the page again."""
    folder = tmp_path_factory.mktemp("redrawn") / Path(one_process.args.output_dir).name
    shutil.copytree(one_process.args.output_dir, folder, ignore=shutil.ignore_patterns("report"))
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, redrawn):
    """
    Started by what torchrun is made of, but copied from one process that has imported everything. The order of
    Python's sets is another there, and that of safetensors' hash tables.
    """
    folder = tmp_path_factory.mktemp("two")
    here = Path(__file__).parent
    script = folder.parent / "two_processes.py"
    paths = [str(here), str(here.parent)]
    script.write_text(SCRIPT.format(paths=paths, folder=str(folder), reported=str(redrawn)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": HASH_SEED}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    trainer = tiny_trainer(tmp_path_factory.mktemp("one"), **RUN)
    trainer.train()
    trainer.save_model()
    write_report(trainer.args.output_dir)
    return trainer


def test_two_processes_are_bit_identical_to_one(two_processes, one_process):
    expected = {name: value.tolist() for name, value in theta_of(one_process).items()}
    for process in (0, 1):
        result = json.loads((two_processes / f"process-{process}.json").read_text())
        assert result["world_size"] == 2
        assert result["theta"] == expected
    files = [Path(folder, LORA).read_bytes() for folder in (one_process.args.output_dir, two_processes)]
    assert files[0] == files[1]


def test_the_card_differs_in_the_seconds_it_took_alone(two_processes, one_process):
    cards = [Path(folder, "README.md").read_text() for folder in (one_process.args.output_dir, two_processes)]
    assert len({re.sub(r"[\d.]+ m?s\b", "_ s", card) for card in cards}) == 1


def test_the_page_is_the_same_file(two_processes, one_process, redrawn):
    first, again = Path(one_process.args.output_dir, "report"), redrawn / "report"
    names = sorted(path.name for path in first.iterdir())
    assert "index.html" in names
    assert [name for name in names if (first / name).read_bytes() != (again / name).read_bytes()] == []


def test_metrics_and_evaluation_are_those_of_the_whole_run(two_processes, one_process):
    logged = json.loads((two_processes / "process-0.json").read_text())["log_history"]
    for theirs, ours in zip(logged, one_process.state.log_history, strict=True):
        assert theirs.keys() == ours.keys()
        for name in ("reward", "reward_std", "num_images", "loss", "es/valid_pairs", "es/update_norm"):
            assert theirs.get(name) == ours.get(name), name
        if "eval_reward" in ours:
            assert theirs["eval_reward"] == pytest.approx(ours["eval_reward"], rel=1e-6)


def test_only_one_process_writes(two_processes, one_process):
    written = [name for name in files_in(two_processes) if not name.startswith("process-")]
    assert written == [name for name in files_in(Path(one_process.args.output_dir)) if "report/" not in name]


def test_a_run_of_two_processes_resumes_in_one(two_processes, one_process):
    trainer = tiny_trainer(two_processes, **RUN)
    trainer.train(resume_from_checkpoint=str(two_processes / "checkpoint-1"))
    assert all((value == theta_of(one_process)[name]).all() for name, value in theta_of(trainer).items())
