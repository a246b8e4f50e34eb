"""
The memory of a computation that is not carried out: its tensors are on torch's "meta" device and have shapes only.

What is counted are the bytes of all tensors that are alive at once. Kernels take scratch memory on top, of which only
that of convolutions is counted here (a copy of the input in a layout of their own); attention is counted as fused,
without its table of weights.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class LiveBytes(TorchDispatchMode):
    """
    Inside, the bytes of new tensors are counted, and operations take tensors with and without numbers together: real
    ones, as a schedule's times, stay real for as long as nothing without numbers gets into them.

    Attributes:
        live (`int`): Bytes that are alive now.
        peak (`int`): The most that were, since [`LiveBytes.begin`].
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._stack = ExitStack()

    def begin(self) -> None:
        """The peak starts again from what is alive now."""
        self.peak = self.live

    def __enter__(self):
        self._stack.enter_context(_fused_attention())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(_tensors([*args, *kwargs.values()]))
        for tensor in given:
            self._seen.setdefault(tensor.untyped_storage(), 0)  # weights, and what else was there before
        without = [tensor.is_meta for tensor in given]
        if any(without):
            if func in _INDEXING:
                args = (args[0], _without_masks(args[1]), *args[2:])
            if not all(without) or "device" in kwargs:
                args, kwargs = tree_map(_without_numbers, (args, kwargs))
        elif str(kwargs.get("device")) == "meta" and (given or _counts(func, kwargs)):
            kwargs = kwargs | {"device": torch.device("cpu")}  # numbers that are known stay known
        quick = _QUICK.get(func) if all(without) else None  # not for tensors with numbers
        out = quick(*args) if quick else func(*args, **kwargs)
        made = list(_tensors([out]))
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                size = self._seen[storage] = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._freed, size)
        scratch = given[0].nbytes if func is aten.convolution.default else 0
        self.peak = max(self.peak, self.live + scratch)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def _norm(x: torch.Tensor, *statistics: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(statistics), x.new_empty(statistics)


# What torch works out in Python, at length, and what it comes to.
_QUICK: dict[Any, Callable] = {
    aten.addmm.default: lambda bias, a, b, *_: a.new_empty(a.shape[0], b.shape[1]),
    aten.native_layer_norm.default: lambda x, shape, *_: _norm(x, *x.shape[: -len(shape)], *[1] * len(shape)),
    aten.native_group_norm.default: lambda x, w, b, n, c, hw, groups, eps: _norm(x, n, groups),
}


def _tensors(values: list | tuple) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as the fused kernels of GPUs and CPUs do it; on the meta device torch would write its table out."""
    own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args, **_kwargs) -> torch.Tensor:
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    """What the fused kernels keep for the backward pass."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _without_numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _counts(func: Callable, kwargs: dict) -> bool:
    """Whether a new tensor holds places or a mask, which decide what a model does."""
    dtype = kwargs.get("dtype")
    return func.overloadpacket is aten.arange or (dtype is not None and not dtype.is_floating_point)


def _without_masks(indices: list) -> list:
    """Which rows a mask picks is known as long as it has numbers."""
    found = []
    for index in indices:
        masked = index is not None and index.dtype == torch.bool and not index.is_meta
        found += index.nonzero().unbind(1) if masked else [index]
    return found
