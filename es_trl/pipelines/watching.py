"""Watching one call of a pipeline: which of its pictures are made of numbers, and where its noise comes from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from .replaced import replaced


# Methods of diffusers that turn numbers into 8-bit pictures, in which NaN is black.
CONVERSIONS = ("postprocess_video", "postprocess", "numpy_to_pil")


class CallWatch:
    """
    What was seen of one call that draws `rows` pictures.

    The denoiser's output is looked at as well, unless it is compiled.

    Attributes:
        numbers (`list[torch.Tensor]`): With `keep`, the numbers of every picture before they became 8-bit, if the
            pipeline converts them with a method of diffusers; else empty.
        used_global_noise (`bool`): Whether torch's global generators moved.
    """

    def __init__(self, pipe: Any, denoiser: torch.nn.Module, rows: int, keep: bool = False) -> None:
        self.pipe, self.denoiser, self.rows, self.keep = pipe, denoiser, rows, keep
        self.numbers: list[torch.Tensor] = []
        self.used_global_noise = False
        self._denoised: torch.Tensor | None = None  # (rows,) bool
        self._converted: list[torch.Tensor] = []  # bool, in the order of conversion
        self._depth = 0

    @contextmanager
    def watching(self) -> Iterator["CallWatch"]:
        """Around the call."""
        with ExitStack() as stack:
            for owner in (self.pipe, *vars(self.pipe).values()):
                for name in CONVERSIONS:
                    if callable(getattr(owner, name, None)) and name not in vars(owner):
                        stack.enter_context(replaced(owner, **{name: self._wrapped(getattr(owner, name))}))
            if getattr(self.denoiser, "_compiled_call_impl", None) is None:
                stack.enter_context(self.denoiser.register_forward_hook(self._look_at_denoiser))
            before = _global_states(self.denoiser)
            try:
                yield self
            finally:
                after = _global_states(self.denoiser)
                self.used_global_noise = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def not_finite(self) -> dict[int, str]:
        """By picture that is not made of numbers: where that showed first, `"denoiser"` or `"decoder"`."""
        denoised = torch.ones(self.rows, dtype=torch.bool) if self._denoised is None else self._denoised.cpu()
        found = {i: "denoiser" for i in range(self.rows) if not denoised[i]}
        for flags in self._by_picture(self._converted):
            found |= {i: found.get(i, "decoder") for i in range(self.rows) if not flags[i]}
        return found

    def _by_picture(self, flags: list[torch.Tensor]) -> list[torch.Tensor]:
        """Flags `(rows,)`: of every conversion of the whole batch, or of all conversions picture by picture."""
        if all(len(part) == self.rows for part in flags):
            return flags
        joined = torch.cat(flags)
        if len(joined) % self.rows == 0:
            return [joined.view(self.rows, -1).all(dim=1)]
        return [joined.all().expand(self.rows)]  # nobody knows whose they are

    def _look_at_denoiser(self, _module: Any, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
        if not isinstance(first, torch.Tensor) or not first.is_floating_point() or len(first) % self.rows:
            return
        finite = torch.isfinite(first.detach()).flatten(1).all(dim=1).view(-1, self.rows).all(dim=0)
        self._denoised = finite if self._denoised is None else self._denoised & finite

    def _wrapped(self, convert: Callable[..., Any]) -> Callable[..., Any]:
        def converting(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._look_at_pictures(args[0] if args else next(iter(kwargs.values())))
                return convert(*args, **kwargs)
            finally:
                self._depth -= 1

        return converting

    def _look_at_pictures(self, value: Any) -> None:
        for batch in value if isinstance(value, list | tuple) else [value]:
            if isinstance(batch, np.ndarray):
                batch = torch.from_numpy(batch)
            if isinstance(batch, torch.Tensor) and batch.ndim >= 3:
                batch = batch.detach()[None] if batch.ndim == 3 else batch.detach()
                self._converted.append(torch.isfinite(batch).flatten(1).all(dim=1).cpu())
                self.numbers += [row.float().cpu() for row in batch] if self.keep else []


def _global_states(module: torch.nn.Module) -> list[torch.Tensor]:
    states = [torch.random.get_rng_state()]
    device = device_of(module)
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def dtype_of(module: torch.nn.Module) -> torch.dtype:
    """What a module computes in."""
    own = getattr(module, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
