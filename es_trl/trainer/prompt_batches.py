"""Prompt batches as a function of (seed, epoch): the same on every process, whatever was drawn before."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..es import make_generator


class PromptBatchSampler(Sampler[list[int]]):
    """Batches of `prompts_per_step` distinct prompts in shuffled order; an incomplete last batch is left out."""

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int):
        self.num_prompts, self.prompts_per_step, self.seed, self.epoch = num_prompts, prompts_per_step, seed, 0

    def __len__(self) -> int:
        return self.num_prompts // self.prompts_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_prompts, generator=make_generator(self.seed, "prompt_order", self.epoch))
        for start in range(0, len(self) * self.prompts_per_step, self.prompts_per_step):
            yield order[start : start + self.prompts_per_step].tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class TellEpoch(TrainerCallback):
    """
    Tells the sampler the epoch. The Trainer does so in some versions only, and in fewer where a resumed run begins
    within an epoch: what then skips its first batches is a loader of accelerate's.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.batch_sampler.set_epoch(int(state.epoch or 0))


def prompt_dataloader(
    dataset, prompts_per_step: int, seed: int, collate: Callable[[list[dict]], list[dict]] = list
) -> DataLoader:
    """A loader of lists of rows (dicts); not sharded over processes, since members are what is shared out."""
    sampler = PromptBatchSampler(len(dataset), prompts_per_step, seed)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


class PromptBlocks:
    """
    Encodes prompts when they are first drawn, always together with the same others: rounding depends on what is in a
    batch, and a resumed run, which draws them in another order, has to get the same bits. `show`: whether a bar shows
    it on a terminal where it takes a while.
    """

    def __init__(self, encoder, show: bool = False):
        self.encoder, self.show = encoder, show
        self._block_of: dict[str, tuple[str, ...]] = {}
        self._columns: dict[str, dict[str, Any]] = {}
        self._encoded: set[tuple[str, ...]] = set()

    def plan(self, prompts: Sequence[str], columns: Mapping[str, Sequence] | None = None) -> None:
        """Puts those of `prompts` that are in no block yet into blocks, in this order; a block keeps their columns."""
        columns = {name: values[:] for name, values in (columns or {}).items()}
        for i, prompt in enumerate(prompts):
            self._columns.setdefault(prompt, {name: values[i] for name, values in columns.items()})
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._block_of]
        for start in range(0, len(new), self.encoder.batch_size):
            block = tuple(new[start : start + self.encoder.batch_size])
            self._block_of |= dict.fromkeys(block, block)

    def encode(self, prompts: Sequence[str]) -> None:
        """Encodes the blocks of `prompts` that are not yet, with a bar once this takes more than half a second."""
        blocks = dict.fromkeys(self._block_of[prompt] for prompt in prompts if prompt in self._block_of)
        missing = [block for block in blocks if block not in self._encoded]
        hidden = None if self.show and len(missing) > 1 else True  # None: shown where there is a terminal
        for block in tqdm(missing, "Encoding prompts", disable=hidden, delay=0.5, leave=False):
            rows = [self._columns[prompt] for prompt in block]
            names = set.intersection(*map(set, rows))
            self.encoder.encode(block, {name: [row[name] for row in rows] for name in sorted(names)})
            self._encoded.add(block)

    def encode_rows(self, rows: list[dict]) -> list[dict]:
        """The rows of a step, once their prompts are encoded."""
        self.encode([row["prompt"] for row in rows])
        return list(rows)


def columns_of(rows: Sequence[dict], but: tuple[str, ...] = ()) -> dict[str, list]:
    """What is known of prompts beside their text; without `but`."""
    names = [name for name in (rows[0] if rows else ()) if name not in ("prompt", *but)]
    return {name: [row[name] for row in rows] for name in names}
