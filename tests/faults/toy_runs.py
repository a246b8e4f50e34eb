"""Runs of a second on the toy pipeline, in this process or in one of their own that may be killed."""

import dataclasses
import logging
import os
import signal
import socket
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from es_trl import ESConfig, ESTrainer
from recipes.benchmarks.toy_pipeline import redness, toy_pipeline


PROMPTS = ["a red apple", "two blue cats", "a green frog", "a pink dog", "three yellow stars", "a brown chair"]
RUN = {
    "max_steps": 6, "population_size": 6, "members_per_forward": 2, "prompts_per_step": 2, "lora_rank": 2,
    "lora_target_modules": ["to_q", "to_out"], "sample_steps": 0, "report_to": "none", "disable_tqdm": True,
    "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "sigma": 0.1, "prompts_per_member": None,
    "travel": 2.0, "use_cpu": True,
}  # fmt: skip


def toy_trainer(output_dir, reward_funcs=redness, **options) -> ESTrainer:
    """Keywords that are not the trainer's go to the config."""
    fields = {field.name for field in dataclasses.fields(ESConfig)}
    config = RUN | {name: options.pop(name) for name in list(options) if name in fields}
    options = {"train_dataset": PROMPTS} | options
    return ESTrainer(toy_pipeline(), reward_funcs, args=ESConfig(output_dir=str(output_dir), **config), **options)


def train(output_dir, resume=None, **options) -> ESTrainer:
    trainer = toy_trainer(output_dir, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


CLOCK = ("time", "runtime", "per_second", "overhead", "train_loss", "comm_bytes", "memory")


def history(trainer):
    """All that was logged, without what a clock measured."""
    entries = [{k: v for k, v in e.items() if not any(word in k for word in CLOCK)} for e in trainer.state.log_history]
    return [entry for entry in entries if "loss" in entry or "eval_reward" in entry]


def fork(function, *args, output: Path | None = None, **environment) -> int:
    """
    Runs `function` in a copy of this process that may be killed: all is imported there already. Returns its pid.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        if output is not None:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            logging.getLogger("es_trl").addHandler(logging.StreamHandler(os.fdopen(2, "w")))
            logging.getLogger("es_trl").setLevel(logging.INFO)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        function(*args)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(code)


def wait(pid: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ranks(processes: int, function, *args, folder: Path) -> tuple[list[int], list[str]]:
    """Runs `function` in a gloo group of that many processes; their exit codes and what they wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outputs = [Path(folder, f"rank-{rank}.log") for rank in range(processes)]
    pids = [
        fork(
            _in_group, function, *args, output=outputs[rank], RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank in range(processes)
    ]  # fmt: skip
    return [wait(pid) for pid in pids], [path.read_text() for path in outputs]


def _in_group(function, *args) -> None:
    for state in (PartialState, AcceleratorState, GradientState):
        state._shared_state.clear()  # what the parent knew about processes
    function(*args)
