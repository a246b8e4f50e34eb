"""Gradients of several processes, summed so that their number changes no bit."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .processes import Peers


class BlockGradients:
    """
    Sums the gradients of `blocks` of work in the order of the blocks, whoever computed them: any number of processes
    ends with the same numbers, bit by bit. `owner` gives the process of a block.

    Attributes:
        is_finite (`bool`): Whether the sum is, once it has been written.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], blocks: Sequence[int], owner: Callable[[int], int], peers: Peers
    ):
        self.parameters: list[nn.Parameter] = list(parameters)
        self.blocks, self.owner, self.peers = list(blocks), owner, peers
        self.kept = [parameter.grad for parameter in self.parameters]
        self.total: torch.Tensor | None = None
        self.own: list[torch.Tensor] = []
        self.is_finite = True

    @property
    def mine(self) -> list[int]:
        """The blocks of this process, in order."""
        return [block for block in self.blocks if self.owner(block) == self.peers.process_index]

    def begin_block(self) -> None:
        """Before the backward passes of a block of this process."""
        for parameter in self.parameters:
            parameter.grad = None

    def end_block(self) -> None:
        """After them."""
        flat = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in self.parameters])
        if self.peers.num_processes == 1:
            self.total = flat if self.total is None else self.total + flat
        else:
            self.own.append(flat)

    @torch.no_grad()
    def write(self, scale: float = 1.0) -> None:
        """Adds the sum over all blocks of all processes, times `scale`, to what stood in `.grad` at first."""
        total = self._sum_in_order() if self.total is None else self.total
        self.is_finite = bool(torch.isfinite(total).all())
        offset = 0
        for parameter, before in zip(self.parameters, self.kept, strict=True):
            grad = scale * total[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = grad if before is None else before + grad
            offset += parameter.numel()

    def _sum_in_order(self) -> torch.Tensor:
        of_process = [[b for b in self.blocks if self.owner(b) == w] for w in range(self.peers.num_processes)]
        rounds = max(len(blocks) for blocks in of_process)
        empty = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        by_block: dict[int, torch.Tensor] = {}
        for index in range(rounds):
            everyone = self.peers.gather(self.own[index] if index < len(self.own) else empty)
            by_block |= {blocks[index]: everyone[w] for w, blocks in enumerate(of_process) if index < len(blocks)}
        total = None
        for block in self.blocks:
            total = by_block[block] if total is None else total + by_block[block]
        return total
