"""What names an adapter: a digest of its tensors, the same in memory and in the file that was saved from it."""

import hashlib
import os
from collections.abc import Mapping

import torch


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes, in the order of the names; equal only where the tensors are, bit by bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """
    [`tensor_digest`] of a safetensors file; unlike that of its bytes it does not depend on how the header is ordered.
    Raises `OSError` or `safetensors.SafetensorError` for what is no such file.
    """
    from safetensors.torch import load_file

    return tensor_digest(load_file(os.fspath(path)))
