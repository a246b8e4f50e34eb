"""Equal blocks of a model without numbers are gone through once: what the others take and make is known by then."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .live_bytes import LiveBytes
from .replaced import replaced


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@contextmanager
def equal_blocks_once(live: LiveBytes, models: Iterable[nn.Module]) -> Iterator[None]:
    """
    Inside `live` and this, without a gradient, a block of a row (`nn.ModuleList`) whose like had inputs of that form
    is not gone through: tensors of the form of its outputs are made, and its share of the peak is counted.

    A block whose outputs are not tensors of their own, without numbers, is gone through each time.
    """
    rows = [row for model in models for row in model.modules() if isinstance(row, nn.ModuleList)]
    blocks = {block: None for row in rows for block in row if next(block.children(), None) is not None}
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    with ExitStack() as stack:
        for block in blocks:
            if "forward" not in vars(block):
                stack.enter_context(replaced(block, forward=_once(live, block, known)))
        yield


def kind_of(block: nn.Module) -> tuple[Any, ...]:
    """What equal blocks have in common: their class, and the names and shapes of their weights."""
    return (type(block), *((name, parameter.shape) for name, parameter in block.named_parameters()))


def _once(live: LiveBytes, block: nn.Module, known: dict[tuple[Any, ...], tuple[Any, ...]]) -> Callable[..., Any]:
    forward, kind = block.forward, kind_of(block)

    def gone_through(*args: Any, **kwargs: Any) -> Any:
        key = kind, _form(args), _form(tuple(kwargs.items()))
        owners = [value for value in kwargs.values() if hasattr(value, "__dict__") and not torch.is_tensor(value)]
        if key in known:
            pattern, forms, rise, left = known[key]
            live.peak = max(live.peak, live.live + rise)
            if left:  # the keys and values of a language model's layers
                vars(owners[0]).setdefault("_left", []).append(torch.empty(left, dtype=torch.uint8, device="meta"))
            made = [torch.empty_strided(*form[:2], dtype=form[2], device="meta") for form in forms]
            return _filled(pattern, made)
        before, start = live.peak, live.live
        live.peak = live.live
        out = forward(*args, **kwargs)
        rise, live.peak = live.peak - start, max(live.peak, before)
        tensors: list[torch.Tensor] = []
        pattern = _pattern(out, tensors)
        left = live.live - start - sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        if pattern is not None and _of_their_own(tensors, [*args, *kwargs.values()]):
            if left == 0 or left > 0 and len(owners) == 1:
                known[key] = pattern, [(t.shape, t.stride(), t.dtype) for t in tensors], rise, left
        return out

    return gone_through


def _form(value: Any) -> Any:
    """What decides the form of the output; an object by its identity, and not kept alive."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, list | tuple):
        return tuple(map(_form, value))
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)


def _pattern(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with a place in `tensors` for each tensor; None if there is anything else in it."""
    if isinstance(value, torch.Tensor):
        place = next((i for i, tensor in enumerate(tensors) if tensor is value), len(tensors))
        tensors += [value] if place == len(tensors) else []
        return place
    if type(value) not in (list, tuple):
        return None
    parts = [() if part is None else _pattern(part, tensors) for part in value]
    return None if any(part is None for part in parts) else type(value)(parts)


def _filled(pattern: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(pattern, int):
        return tensors[pattern]
    return type(pattern)(None if part == () else _filled(part, tensors) for part in pattern)


def _of_their_own(tensors: list[torch.Tensor], given: list[Any]) -> bool:
    """Whether the outputs hold no numbers and all of their memory, and share none with each other or an input."""
    inputs: list[torch.Tensor] = []
    for value in given:
        _pattern(value, inputs)
    places = [tensor.untyped_storage()._cdata for tensor in tensors]
    whole = all(t.is_meta and t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in tensors)
    return whole and len({*places}) == len(places) and not {*places} & {t.untyped_storage()._cdata for t in inputs}
