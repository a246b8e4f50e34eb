"""Which part of what `encode_prompt` returns belongs to which prompt, found by encoding two texts and three."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map


class Unsplittable(ValueError):
    """What was returned has no axis of prompts."""


@dataclass
class _Part:
    """One prompt's part of a tensor; `length` is that of axis 1 before masked padding was cut off."""

    values: torch.Tensor
    length: int | None = None


class RowSplit:
    """
    Takes the result of `encode_prompt` apart by prompt and puts rows together again.

    A result is a tensor, None, a number, or a list, tuple or dict of results. A tensor's axis of prompts is the one
    that is `2 k` long for two prompts and `3 k` for three (k copies, for guidance, one after the other); a list with
    one entry per prompt is seen the same way. Where texts of one length have no mask, theirs is all ones.

    Args:
        two, three: Results for two texts of different length, and for three.

    Attributes:
        separable (`bool`): Whether a prompt's rows do not depend on the prompts it is encoded with. Set by `check`.

    Raises:
        `Unsplittable`: if no axis fits.
    """

    def __init__(self, two: Any, three: Any):
        self.plan = _plan(two, three)
        self.separable = True

    def check(self, encode: Callable[[Sequence[Any]], Any], texts: Sequence[Any]) -> None:
        """
        Encodes two different texts together and alone.

        Raises:
            `Unsplittable`: if the rows of two texts in one call cannot be told apart.
        """
        together = self.rows(encode(texts), len(texts))
        again = self.rows(encode(texts[::-1]), len(texts))[::-1]
        if not all(_same(a, b) for a, b in zip(together, again, strict=True)):
            raise Unsplittable("the order of the prompts changes what encode_prompt returns for each")
        alone = [self.rows(encode([text]), 1)[0] for text in texts]
        joined, apart = self.join(together, "cpu"), self.join(alone, "cpu")
        self.separable = _same(joined, apart)

    def rows(self, result: Any, count: int) -> list[Any]:
        """The parts of `result` by prompt, on the CPU, without masked padding."""
        return [_take(self.plan, result, row, count) for row in range(count)]

    def same_lengths(self, rows: Iterable[Any]) -> bool:
        """Whether rows can be joined without padding."""
        return (
            len({tuple(part.values.shape for part in tree_leaves(row) if isinstance(part, _Part)) for row in rows})
            == 1
        )

    def join(self, rows: Sequence[Any], device: torch.device | str) -> Any:
        """A result for these rows, shorter ones padded with zeros."""
        return _join(self.plan, rows, device)


def _plan(two: Any, three: Any) -> Any:
    if isinstance(two, torch.Tensor) and isinstance(three, torch.Tensor) and two.ndim == three.ndim:
        if two.shape == three.shape:
            return "shared"
        axes = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
        axis = axes[0]
        if len(axes) > 1 or two.shape[axis] * 3 != three.shape[axis] * 2:
            raise Unsplittable(f"encode_prompt returns {tuple(two.shape)} for 2 prompts, {tuple(three.shape)} for 3")
        return "tensor", axis, two.shape[axis] // 2, two.dtype
    if isinstance(two, list | tuple) and isinstance(three, list | tuple):
        if len(two) == len(three):
            return type(two), [_plan(a, b) for a, b in zip(two, three, strict=True)]
        if len(two) * 3 == len(three) * 2:
            return "list", len(two) // 2
    if isinstance(two, Mapping) and isinstance(three, Mapping) and two.keys() == three.keys():
        return dict, {name: _plan(two[name], three[name]) for name in two}
    if two is None and three is None or isinstance(two, bool | int | float | str) and two == three:
        return "shared"
    raise Unsplittable(f"encode_prompt returns a {type(two).__name__} that cannot be told apart by prompt")


def _take(plan: Any, result: Any, row: int, count: int) -> Any:
    if plan == "shared":
        return _moved(result, "cpu")
    if plan[0] == "tensor":
        _, axis, copies, _ = plan
        if result is None:
            return None
        if result.shape[axis] != copies * count:
            raise Unsplittable(f"encode_prompt returns {tuple(result.shape)} for {count} prompts")
        index = torch.arange(row, copies * count, count, device=result.device)
        return _Part(result.index_select(axis, index).cpu())
    if plan[0] == "list":
        if len(result) != plan[1] * count:
            raise Unsplittable(f"encode_prompt returns a list of {len(result)} for {count} prompts")
        return [_moved(result[i], "cpu") for i in range(row, plan[1] * count, count)]
    if plan[0] is dict:
        return {name: _take(part, result[name], row, count) for name, part in plan[1].items()}
    parts = [_take(part, value, row, count) for part, value in zip(plan[1], result, strict=True)]
    for i, (embeds, mask) in enumerate(zip(parts, parts[1:], strict=False), 1):
        if mask is None and plan[1][i][0] == "tensor" and isinstance(embeds, _Part):
            parts[i] = mask = _Part(torch.ones(embeds.values.shape[:2], dtype=plan[1][i][3]))
        _cut_padding(embeds, mask)
    return parts


def _cut_padding(embeds: Any, mask: Any) -> None:
    """Padding is masked out of attention, so it is not stored: 300 tokens of Gemma are 1.4 MB a prompt."""
    if not (isinstance(embeds, _Part) and isinstance(mask, _Part)):
        return
    values = mask.values
    whole = values.ndim == 2 and len(values) == 1 and embeds.values.shape[:2] == values.shape
    if not whole or embeds.values.ndim < 3 or not ((values == 0) | (values == 1)).all():
        return
    used = int(values[0].nonzero().max()) + 1 if values.any() else 1
    for part in (embeds, mask):
        part.length, part.values = part.values.shape[1], part.values[:, :used].clone()


def _join(plan: Any, rows: Sequence[Any], device: torch.device | str) -> Any:
    if plan == "shared":
        return _moved(rows[0], device)
    if plan[0] == "tensor":
        _, axis, copies, _ = plan
        sizes = [max(row.values.shape[i] for row in rows) for i in range(rows[0].values.ndim)]
        if rows[0].length is not None:
            sizes[1] = max(row.length for row in rows)
        padded = [_padded(row.values, sizes, axis) for row in rows]
        return torch.cat([row.narrow(axis, c, 1) for c in range(copies) for row in padded], dim=axis).to(device)
    if plan[0] == "list":
        return [_moved(row[c], device) for c in range(plan[1]) for row in rows]
    if plan[0] is dict:
        return {name: _join(part, [row[name] for row in rows], device) for name, part in plan[1].items()}
    return plan[0](_join(part, [row[i] for row in rows], device) for i, part in enumerate(plan[1]))


def _padded(values: torch.Tensor, sizes: Sequence[int], axis: int) -> torch.Tensor:
    padding = []
    for i in reversed(range(values.ndim)):
        padding += [0, 0 if i == axis else sizes[i] - values.shape[i]]
    return torch.nn.functional.pad(values, padding) if any(padding) else values


def _moved(value: Any, device: torch.device | str) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def _same(a: Any, b: Any) -> bool:
    """Equal up to what another batch size changes in the last bits."""
    (ours, form), (theirs, other) = tree_flatten(a), tree_flatten(b)
    return form == other and all(map(_close, ours, theirs))


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, _Part):
        a, b = a.values, b.values
    if not isinstance(a, torch.Tensor):
        return a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    limit = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return float((a.float() - b.float()).abs().max()) <= limit * max(float(b.float().abs().max()), 1e-6)
