"""A launch that silently runs fewer processes than it was asked for is said aloud."""

import logging

import psutil


logger = logging.getLogger(__name__)


def warn_if_fewer_processes(world_size: int, command: list[str] | None = None) -> None:
    """
    `accelerate launch --cpu --num_processes 2` starts one process and says nothing.

    Args:
        world_size (`int`): Processes that run.
        command (`list[str]`, *optional*): The launching command line; that of the parent process by default.
    """
    if command is None:
        try:
            command = psutil.Process().parent().cmdline()
        except (psutil.Error, AttributeError):
            return
    if not any("accelerate" in word for word in command[:3]):
        return
    for option in ("--num_processes", "--num-processes"):
        if option in command[:-1]:
            asked = command[command.index(option) + 1]
            if asked.isdigit() and int(asked) > world_size:
                logger.warning(
                    "accelerate was asked for %s processes but only %d runs: on CPU use `torchrun --nproc_per_node "
                    "%s` (or `accelerate launch --multi_gpu --num_processes %s`).",
                    asked,
                    world_size,
                    asked,
                    asked,
                )
