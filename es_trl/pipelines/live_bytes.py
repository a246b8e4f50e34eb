"""
The memory of a computation that is not carried out: its tensors are on torch's "meta" device and have shapes only.

What is counted are the bytes of all tensors that are alive at once. Kernels take scratch memory on top, of which only
that of convolutions is counted here (a copy of the input in a layout of their own); attention is counted as fused,
without its table of weights.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .replaced import replaced


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

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._counted: dict[int, int] = {}  # bytes by the address of what was made in here and is alive
        self._stack = ExitStack()

    def begin(self) -> None:
        """The peak starts again from what is alive now."""
        self.peak = self.live

    def __enter__(self) -> Self:
        # As the fused kernels of GPUs and CPUs do it; on the meta device torch would write its table of weights out.
        self._stack.enter_context(replaced(F, scaled_dot_product_attention=_attention))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors([*args, *kwargs.values()]))
        without = [tensor.is_meta for tensor in given]
        if any(without):
            if func in _INDEXING:
                args = (args[0], _without_masks(args[1]), *args[2:])
            if not all(without) or "device" in kwargs:
                args, kwargs = tree_map(_without_numbers, (args, kwargs))
        elif str(kwargs.get("device")) == "meta" and (given or _counts(func, kwargs)):
            kwargs = kwargs | {"device": torch.device("cpu")}  # numbers that are known stay known
        out = _like_before(func, args, kwargs) if given and all(without) else func(*args, **kwargs)
        for tensor in _tensors([out]):
            storage = tensor.untyped_storage()
            place = storage._cdata
            if place in self._counted or any(place == value.untyped_storage()._cdata for value in given):
                continue  # a part of what is counted, of a weight, or of what else was there before
            size = self._counted[place] = storage.nbytes()
            self.live += size
            weakref.finalize(storage, self._freed, place)
        scratch = given[0].nbytes if func is aten.convolution.default else 0
        self.peak = max(self.peak, self.live + scratch)
        return out

    def _freed(self, place: int) -> None:
        self.live -= self._counted.pop(place)


# What torch works out in Python, at length: once for all equal blocks.
_FORMS: dict[tuple[Any, ...], tuple[Any, ...] | None] = {}


def _like_before(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`; where that makes new tensors only, of the form that the same call made before."""
    if func is aten.addmm.default:  # 20 ms in torch
        return args[1].new_empty(args[1].shape[0], args[2].shape[1])
    if not _makes_new_tensors(func):
        return func(*args, **kwargs)
    key = (func, _form(args), _form(tuple(kwargs.items())))
    try:
        forms = _FORMS.get(key, ())
    except TypeError:  # something that has no hash
        return func(*args, **kwargs)
    if forms:
        made = [form and torch.empty_strided(*form[:2], dtype=form[2], device="meta") for form in forms]
        return made[0] if len(made) == 1 else tuple(made)
    out = func(*args, **kwargs)
    made = list(_tensors([out]))
    places = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *kwargs.values()])}
    if not places & {tensor.untyped_storage()._cdata for tensor in made}:  # unlike those of _unsafe_view
        outs = out if isinstance(out, tuple) else (out,)
        if all(value is None or isinstance(value, torch.Tensor) and value.is_meta for value in outs):
            _FORMS[key] = tuple(
                value if value is None else (value.shape, value.stride(), value.dtype) for value in outs
            )
    return out


@functools.cache
def _makes_new_tensors(func: Any) -> bool:
    values = [*func._schema.arguments, *func._schema.returns]
    return all(value.alias_info is None for value in values)


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_form, value)) if isinstance(value, list | tuple) else (type(value), value)


def _tensors(values: list[Any] | tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
) -> torch.Tensor:
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    """What the fused kernels keep for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _without_numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _counts(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a new tensor holds places or a mask, which decide what a model does."""
    dtype = kwargs.get("dtype")
    return func.overloadpacket is aten.arange or (dtype is not None and not dtype.is_floating_point)


def _without_masks(indices: list[Any]) -> list[Any]:
    """Which rows a mask picks is known as long as it has numbers."""
    masks = [index is not None and index.dtype == torch.bool and not index.is_meta for index in indices]
    rows = [index.nonzero().unbind(1) if mask else [index] for index, mask in zip(indices, masks, strict=True)]
    return [index for part in rows for index in part]
