"""The differentiable adapter: inside a context the denoiser's output depends on theta, so a loss has a gradient."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import PipelineAdapter
from .replaced import replaced


class DifferentiableForward:
    """
    Lets gradients flow from the denoiser's output to `adapter.theta`.

    The LoRA modules of the pipeline hold copies of theta in the pipeline's dtype and take no gradients. Inside
    [`enabled`] they compute with what theta exports, cast to the dtype of their input, so that the output is bit for
    bit what the pipeline draws with, and `.backward()` adds to the fp32 `.grad` of theta and of nothing else. The
    frozen base (`adapter.adapter_disabled()`) may be called inside as well.

    Args:
        adapter (`PipelineAdapter`): The adapter; any search space but `"weight"`, whose export is not differentiable.

    Raises:
        `ValueError`: for `es_space="weight"`.
    """

    def __init__(self, adapter: PipelineAdapter):
        if adapter.space.base_only:
            raise ValueError(
                f"es_space={adapter.es_space!r} has no gradient: its export is a truncated SVD. Use 'lora', 'lora_b' "
                "or 'lora_xs'."
            )
        self.adapter = adapter
        # Made once and kept: torch.compile traces again for every new object it meets in a module's `forward`.
        self._forwards = [
            (module, partial(self._forward, name, layer, part, module))
            for name, layer in adapter.space.layers.items()
            for part, module in enumerate(adapter.space.modules(layer))
        ]

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Inside, the denoiser computes with theta. With gradient checkpointing, `.backward()` belongs inside too."""
        if any("forward" in vars(module) for module, _ in self._forwards):
            raise RuntimeError("A LoRA module has a forward of its own already: these contexts do not nest.")
        with ExitStack() as stack:
            for module, forward in self._forwards:
                stack.enter_context(replaced(module, forward=forward))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_named, _as_it_was))
            yield

    def _forward(self, name: str, layer: nn.Module, part: int, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = self.adapter.space.export(name, layer)[part].to(x.dtype).view_as(module.weight)
        if not isinstance(module, nn.Conv2d):
            return F.linear(x, weight, module.bias)
        geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        return F.conv2d(x, weight, module.bias, groups=module.groups, **geometry)


def _named(tensor: torch.Tensor) -> torch.Tensor | tuple[nn.Parameter, torch.dtype]:
    """Weights that are cast for their layer's forward alone are in their storage dtype again before the backward."""
    return (tensor, tensor.dtype) if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else tensor


def _as_it_was(saved: torch.Tensor | tuple[nn.Parameter, torch.dtype]) -> torch.Tensor:
    return saved[0].to(saved[1]) if isinstance(saved, tuple) else saved
