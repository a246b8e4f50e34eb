"""The fused forward: one batch through the frozen model in which every member has weights of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .noise import Factors


AT_ONCE = 2**22  # numbers of the members' matrices in one product: as many layers as fit, so that few launches do
_SAMPLE_NAMES = ("hidden_states", "sample", "x")  # what diffusers calls the first argument of a denoiser


class PopulationShapeError(RuntimeError):
    """The rows of a module's input cannot be told apart by member, so members must run one after the other."""


@dataclass
class Site:
    """
    A module whose weight differs from member to member.

    The weight of member `i` is `left (theta + s_i sigma E_i)`, or the frozen weight plus that when `additive`.

    Attributes:
        name (`str`): Name of the matrix; the key of its noise.
        module (`nn.Linear` or `nn.Conv2d`): The module that computes with it. A convolution's `(o, c, kh, kw)` kernel
            is read as an `o x (c kh kw)` matrix.
        theta (`nn.Parameter`): `(m, n)` fp32 master.
        left (`torch.Tensor`, *optional*): `(m', m)` constant factor (LoRA-XS: the scaled left singular vectors).
        additive (`bool`): The module's own weight is frozen and stays in place (space `weight`).
    """

    name: str
    module: nn.Module
    theta: nn.Parameter
    left: torch.Tensor | None = None
    additive: bool = False


@dataclass
class _Run:
    """One population pass: how many members, how many images each."""

    count: int
    rows: int


class PopulationForward:
    """
    Runs `M` members in one forward pass; rows are ordered member by member, `batch = copies x M x rows`, where
    `copies` counts the halves that classifier-free guidance stacks.

    LoRA factors are small: the `M` matrices of all layers of one shape are written out in one batched product, and a
    layer multiplies with its own in another; the frozen GEMM is shared by the whole batch. A frozen weight (space
    `weight`) keeps its shared GEMM and gets `s_i sigma / sqrt(r) (x V) U^T` added (EGGROLL, arXiv 2511.16652, section
    4). The sum `theta + s_i sigma E_i` is fp32 and only then cast to the dtype of the layer.

    Args:
        denoiser (`nn.Module`): Transformer or UNet; a hook on it reads the batch size of each call.
        sites (`Sequence[Site]`): What is perturbed.
        sigma (`float`): Standard deviation of the entries of the perturbation.
    """

    def __init__(self, denoiser: nn.Module, sites: Sequence[Site], sigma: float):
        self.denoiser, self.sites, self.sigma = denoiser, list(sites), sigma
        self._batch: int | None = None
        self._run: _Run | None = None
        self._weights: dict[str, Any] = {}
        # Made once and kept: torch.compile traces again for every new object it meets in a module's `forward`.
        self._forwards = {site.name: partial(self._forward_of(site), site) for site in self.sites}
        self._own = {site.name: site.module.forward for site in self.sites if site.additive}
        self._hook = self._read_batch

    @contextmanager
    def members(self, factors: Mapping[str, Factors], signs: torch.Tensor, rows: int) -> Iterator[None]:
        """
        Inside this context the denoiser draws with the weights of `M` members instead of its own.

        Args:
            factors (`Mapping[str, Factors]`): For every site the factors of the `M` members, `U (M, m, r)`,
                `V (M, n, r)`.
            signs (`torch.Tensor`): `(M,)` of +1 and -1.
            rows (`int`): Images asked for per member; the order is member by member.

        Raises:
            `PopulationShapeError`: during a forward whose rows cannot be mapped to members (M > 1 only).
        """
        if self._run is not None:
            raise RuntimeError("This denoiser draws with a population already: population contexts do not nest.")
        # Hooks of diffusers (casting, offloading) are forwards of a module's own as well.
        before = {site.name: vars(site.module).get("forward") for site in self.sites}
        self._run, self._weights = _Run(len(signs), rows), self._prepare(factors, signs)
        handle = self.denoiser.register_forward_pre_hook(self._hook, with_kwargs=True)
        try:
            for site in self.sites:
                site.module.forward = self._forwards[site.name]
            yield
        finally:
            handle.remove()
            self._batch, self._run, self._weights = None, None, {}
            for site in self.sites:
                vars(site.module).pop("forward", None)
                if before[site.name] is not None:
                    site.module.forward = before[site.name]

    def _forward_of(self, site: Site) -> Callable[[Site, torch.Tensor], torch.Tensor]:
        if isinstance(site.module, nn.Conv2d):
            return self._convolution
        return self._additive if site.additive else self._linear

    def _read_batch(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [*args[:1], *[kwargs[name] for name in _SAMPLE_NAMES if name in kwargs], *kwargs.values()]
        self._batch = None
        for value in inputs:  # as plain as torch 2.6 compiles it: no generator, no union of types
            if isinstance(value, (list, tuple, torch.Tensor)):
                self._batch = len(value)
                return

    def _prepare(self, factors: Mapping[str, Factors], signs: torch.Tensor) -> dict[str, Any]:
        """By site `(M, m', n)` weights of the members; of an additive site `s_i sigma / sqrt(r) U` and `V`."""
        alike: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            left = None if site.left is None else site.left.shape
            alike.setdefault((site.theta.shape, left, site.additive, site.module.weight.dtype), []).append(site)
        found: dict[str, Any] = {}
        for (shape, _, additive, dtype), sites in alike.items():
            at_once = max(1, AT_ONCE // (len(signs) * shape.numel()))
            for some in (sites[i : i + at_once] for i in range(0, len(sites), at_once)):
                U = torch.stack([factors[site.name].U for site in some])
                V = torch.stack([factors[site.name].V for site in some])
                U = U * (signs.to(U) * (self.sigma / U.shape[-1] ** 0.5))[:, None, None]
                values = zip(U, V, strict=True) if additive else self._matrices(some, U, V).to(dtype)
                found |= zip([site.name for site in some], values, strict=True)
        return found

    def _matrices(self, sites: list[Site], U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """`(S, M, m', n)`: members' weights of `S` sites of one shape, whose perturbations are `U V^T`."""
        count = U.shape[1]
        theta = torch.stack([site.theta.detach() for site in sites])
        weights = theta[:, None].expand(-1, count, -1, -1).flatten(0, 1)
        weights = torch.baddbmm(weights, U.flatten(0, 1), V.flatten(0, 1).transpose(1, 2))
        weights = weights.view(len(sites), count, *theta.shape[1:])
        if sites[0].left is None:
            return weights
        left = torch.stack([site.left for site in sites])
        rows = weights.transpose(2, 3).flatten(1, 2) @ left.transpose(1, 2)
        return rows.unflatten(1, (count, -1)).transpose(2, 3)

    def _by_member(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """
        `(batch, ...) -> (copies, M, rows, ...)`. A module that sees a multiple of the denoiser's batch has that many
        rows side by side for each of its entries (frames, tokens); one that sees fewer, some of the guidance copies.
        """
        run = self._run
        images, size = run.count * run.rows, x.shape[0]
        if self._batch is None or self._batch % images or size % images:
            raise PopulationShapeError(
                f"{site.name} sees {x.shape[0]} rows while the denoiser was called with {self._batch} for {run.count} "
                f"members of {run.rows} images: rows cannot be told apart by member."
            )
        side_by_side = size // self._batch if size % self._batch == 0 else 1
        return x.reshape(-1, run.count, run.rows * side_by_side, *x.shape[1:])

    def _tokens_first(self, x: torch.Tensor) -> bool:
        """Whether `x` is `(tokens, batch, ...)`, as some models have it."""
        return x.ndim > 2 and self._run.count > 1 and x.shape[1] == self._batch != x.shape[0]

    def _linear(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        if self._tokens_first(x):
            return self._linear(site, x.transpose(0, 1)).transpose(0, 1)
        weights = self._weights[site.name].to(x.dtype)
        if self._run.count == 1:
            return F.linear(x, weights[0], site.module.bias)
        y = self._by_member(site, x).flatten(2, -2) @ weights.transpose(1, 2)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if site.module.bias is None else y + site.module.bias

    def _convolution(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        module, run = site.module, self._run
        weights = self._weights[site.name].to(x.dtype).view(-1, *module.weight.shape)
        geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        if run.count == 1:
            return F.conv2d(x, weights[0], module.bias, groups=module.groups, **geometry)
        # One grouped convolution: members become groups of channels.
        by_member = self._by_member(site, x)
        rows = by_member.shape[2]
        grouped = by_member.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        y = F.conv2d(grouped, weights.flatten(0, 1), groups=run.count * module.groups, **geometry)
        y = y.view(-1, rows, run.count, module.weight.shape[0], *y.shape[2:]).transpose(1, 2).flatten(0, 2)
        return y if module.bias is None else y + module.bias[:, None, None]

    def _additive(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        if self._tokens_first(x):
            return self._additive(site, x.transpose(0, 1)).transpose(0, 1)
        U, V = (factor.to(x.dtype) for factor in self._weights[site.name])
        y = self._own[site.name](x) + F.linear(x, site.theta.detach().to(x.dtype))
        if self._run.count == 1:
            return y + F.linear(F.linear(x, V[0].T), U[0])
        low = self._by_member(site, x).flatten(2, -2) @ V
        return y + (low @ U.transpose(1, 2)).reshape(y.shape)
