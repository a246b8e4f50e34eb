"""
Copies of this process that may be killed, and groups of them: all is imported there already, which takes a process
of its own nine seconds. `test_trainer_distributed.py` starts its group as torchrun does.
"""

import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState


def fork(function, *args, output: Path | None = None, **environment) -> int:
    """Runs `function` in a copy of this process, its output appended to a file. Returns its pid."""
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


def fork_beside(root: Path, code: str, output: Path) -> int:
    """Runs `code` in a copy of this process that has the libraries but imports es_trl anew, from `root`, and waits."""

    def run() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "es_trl"]:
            del sys.modules[name]
        sys.path.insert(0, str(root))
        os.chdir(root)
        sys.stdout = open(1, "w", closefd=False)  # pytest's own writes elsewhere
        exec(compile(code, "code", "exec"), {"__name__": "code"})
        sys.stdout.flush()

    return wait(fork(run, output=output))


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
