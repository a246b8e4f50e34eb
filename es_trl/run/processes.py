"""Several processes: only scores travel, all of them stop together, and one that is gone is named."""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from .stopping import StopRequested


logger = logging.getLogger(__name__)

RUNNING, STOPPED, FAILED = 0, 1, 2
MESSAGE_BYTES = 1024
LAST_WORDS_SECONDS = 60.0  # that a process which ends waits for the others, to tell them why


class PeerFailed(RuntimeError):
    """Another process failed, or did not come."""


class Peers:
    """
    The processes of a run, and what they tell each other.

    They meet once per step, and wherever work is shared. Each brings how it fared, so that an error or a stop request
    in one of them ends the work in all of them, and then its scores. All of it goes over gloo between the CPUs, also
    when the run is on GPUs: the scores are there, they are few, and gloo can say which process did not come. A process
    waits `timeout` seconds for the others; `bytes_sent` is what it has given to them so far.
    """

    def __init__(self, process_index: int = 0, num_processes: int = 1, timeout: float = 1800.0):
        self.process_index, self.num_processes, self.timeout = process_index, num_processes, timeout
        self.bytes_sent = 0
        self._told: BaseException | None = None
        self._group = None
        if num_processes > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """
        Work that every process does its share of. Ends in all of them as it ended in the worst: with this process's
        own error, or one that quotes the error of another.

        Raises:
            `StopRequested`: if any of them was asked to stop.
            `PeerFailed`: if another one failed or did not come within the timeout.
        """
        try:
            yield
        except StopRequested:
            self._meet(STOPPED, what)
            raise
        except Exception as error:
            self.tell(error, what, self.timeout)
            raise
        self._meet(RUNNING, what)

    def tell(self, error: Exception, what: str, timeout: float = LAST_WORDS_SECONDS) -> None:
        """
        Quotes an error of this process, at the work `what`, to the others at their next meeting, wherever that is;
        once, and not one that came from them. Waits `timeout` seconds for them.
        """
        if self.num_processes == 1 or any(e is self._told or isinstance(e, PeerFailed) for e in _causes(error)):
            return
        self._told = error
        try:
            self._meet(FAILED, what, f"{what}: {type(error).__name__}: {error}", min(timeout, self.timeout))
        except (PeerFailed, StopRequested) as other:
            logger.debug("The others ended too: %s", other)

    def stop_if_any(self, stop: bool, what: str) -> None:
        """Raises `StopRequested` in every process if `stop` is true in any."""
        self._meet(STOPPED if stop else RUNNING, what)
        if stop:
            raise StopRequested

    def share(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """As `gather`, in the middle of work done `together`: none waits here for one that has failed."""
        self._meet(RUNNING, what)
        return self.gather(tensor)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(W, *tensor.shape)`: the tensor of every process, in order, on the device of this one's."""
        if self.num_processes == 1:
            return tensor[None]
        own = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.num_processes)]
        try:
            dist.all_gather(parts, own, group=self._group)
        except RuntimeError as error:
            raise PeerFailed(f"A process has gone while numbers were exchanged. gloo says: {error}") from error
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return torch.stack(parts).to(tensor.device)

    def gather_json(self, data: Any) -> list[Any]:
        """What every process gives, in order; anything that JSON takes."""
        if self.num_processes == 1:
            return [data]
        text = json.dumps(data).encode()
        longest = int(self.gather(torch.tensor([len(text)])).max())
        rows = self.gather(torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8))
        return [json.loads(bytes(row.tolist())) for row in rows]

    def _meet(self, status: int, what: str, message: str = "", timeout: float | None = None) -> None:
        if self.num_processes == 1:
            return
        timeout = self.timeout if timeout is None else timeout
        try:
            dist.monitored_barrier(self._group, timedelta(seconds=timeout), wait_all_ranks=True)
            states = self.gather(torch.tensor([status], dtype=torch.int64)).flatten().tolist()
            texts = self._messages(message) if FAILED in states else []
        except RuntimeError as error:
            raise PeerFailed(
                f"Process {self.process_index} waited for the others at {what}, and not all of them came within "
                f"ddp_timeout={timeout:g} s; a process has died or hangs. gloo says: {error}"
            ) from error
        for index, text in enumerate(texts):
            if states[index] == FAILED and index != self.process_index:
                raise PeerFailed(f"Process {index} failed at {text}")
        if STOPPED in states and status == RUNNING:
            raise StopRequested

    def _messages(self, message: str) -> list[str]:
        data = message.encode("utf-8", "replace")[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
        rows = self.gather(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "replace") for row in rows]


def same_numbers(tensors: Iterable[torch.Tensor], num_processes: int) -> None:
    """Every process takes the numbers of the first one, even where devices round differently."""
    if num_processes > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def warn_if_fewer_processes(world_size: int, command: list[str] | None = None) -> None:
    """
    `accelerate launch --cpu --num_processes 2` starts one process and says nothing. `command` is the launching command
    line, by default that of the parent process.
    """
    if command is None:
        try:
            command = psutil.Process().parent().cmdline()
        except (psutil.Error, AttributeError):
            return
    if not any("accelerate" in word for word in command[:3]):
        return
    for option, asked in itertools.pairwise(command):
        if option in ("--num_processes", "--num-processes") and asked.isdigit() and int(asked) > world_size:
            logger.warning(
                f"accelerate was asked for {asked} processes but only {world_size} runs: on CPU use `torchrun "
                f"--nproc_per_node {asked}` (or `accelerate launch --multi_gpu --num_processes {asked}`)."
            )


def warn_if_idle(num_processes: int, shares: int, raise_field: str, lower_field: str) -> None:
    """
    Says it if a step is dealt out in fewer `shares` than there are processes: the result would be the same, the wait
    too. The two settings make more of them when raised or lowered.
    """
    if shares < num_processes:
        logger.warning(
            f"Only {shares} of {num_processes} processes have work in a step: raise {raise_field} or lower "
            f"{lower_field}, so that there are at least as many pieces of work as processes."
        )
