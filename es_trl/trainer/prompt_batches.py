"""Prompt batches as a function of (seed, epoch): the same on every process, whatever was drawn before."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from ..es import make_generator


class PromptBatchSampler(Sampler[list[int]]):
    """
    Batches of `prompts_per_step` distinct prompts in shuffled order; an incomplete last batch is left out.

    Args:
        num_prompts (`int`): Size of the data set, at least `prompts_per_step`.
        prompts_per_step (`int`): Prompts per batch.
        seed (`int`): Seed of the run (`data_seed` if set).
    """

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

    # The Trainer looks for the sampler to tell the epoch one level below `dataloader.batch_sampler`.
    batch_sampler = property(lambda self: self)


def prompt_dataloader(dataset, prompts_per_step: int, seed: int) -> DataLoader:
    """A loader of lists of rows (dicts); not sharded over processes, since members are what is shared out."""
    sampler = PromptBatchSampler(len(dataset), prompts_per_step, seed)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=list)
