"""Several processes, one table: which prompts a process draws, and how the parts come together again."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from PIL import Image

from ..pictures import rgb


def launched_processes(use_cpu: bool) -> dict[str, Any]:
    """
    The keywords `process_index`, `num_processes` and `gather` of [`evaluate`] under `torchrun` or `accelerate launch`;
    empty without them.

    Args:
        use_cpu (`bool`): Processes talk over gloo instead of NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return {}
    from accelerate import PartialState

    # A process that finishes its share waits for the slowest one, which may take hours.
    state = PartialState(cpu=use_cpu, timeout=timedelta(days=2))

    def gather(part: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(part)).to(state.device)
        parts = [torch.empty_like(tensor) for _ in range(state.num_processes)]
        torch.distributed.all_gather(parts, tensor)
        return np.stack([one.cpu().numpy() for one in parts])

    return {"process_index": state.process_index, "num_processes": state.num_processes, "gather": gather}


class PromptShare:
    """
    Of an evaluation's number of prompts those of one process: p, p + W, p + 2W, ... of W processes. `gather` is given
    an array of one shape on all processes, and returns those of all in order, stacked or joined along the first axis.
    """

    def __init__(
        self,
        prompts: int,
        process_index: int = 0,
        num_processes: int = 1,
        gather: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index is {process_index}; it must lie in [0, num_processes = {num_processes}).")
        if num_processes > 1 and gather is None:
            raise ValueError(f"num_processes is {num_processes}; give gather, or each process sees only its part.")
        self.prompts = prompts
        self.process_index, self.num_processes = process_index, num_processes
        self.gather = gather or (lambda part: part[None])  # alone, all there is
        self.mine = range(process_index, prompts, num_processes)

    def barrier(self) -> None:
        """Waits for all processes."""
        self.gather(np.zeros(1))

    def empty(self, shape: tuple[int, ...], fill: float = np.nan, dtype: DTypeLike = np.float64) -> np.ndarray:
        """An array (slots, *shape), equal on all processes; prompt p of this process belongs into `slot(p)`."""
        return np.full((-(-self.prompts // self.num_processes), *shape), fill, dtype)

    def slot(self, prompt: int) -> int:
        """Place of one of this process's prompts in its arrays."""
        return prompt // self.num_processes

    def collect(self, part: np.ndarray) -> np.ndarray:
        """Joins the parts (slots, ...) of all processes to (prompts, ...), in the order of the prompts."""
        parts = np.asarray(self.gather(part)).reshape(self.num_processes, *part.shape)
        return np.swapaxes(parts, 0, 1).reshape(-1, *part.shape[1:])[: self.prompts]

    def collect_images(self, images: dict[tuple[int, int], Image.Image], per_prompt: int) -> list[list[Image.Image]]:
        """Joins pictures of one size, this process's by (prompt, image index), to one list per prompt, in order."""
        if self.num_processes == 1 or not self.prompts:
            return [[images[prompt, image] for image in range(per_prompt)] for prompt in range(self.prompts)]
        size = max((image.size for image in images.values()), default=(0, 0))
        size = np.asarray(self.gather(np.array([size]))).reshape(-1, 2).max(axis=0)  # a process may have none
        pixels = self.empty((per_prompt, size[1], size[0], 3), 0, np.uint8)
        for (prompt, image), picture in images.items():
            pixels[self.slot(prompt), image] = np.asarray(rgb(picture))
        return [[Image.fromarray(picture) for picture in row] for row in self.collect(pixels)]
