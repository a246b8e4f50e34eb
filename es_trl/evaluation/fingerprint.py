"""What the scores of an evaluation depend on, as plain data that can be compared with what is on disk."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Of the list as JSON, so that order and borders count."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def columns_sha256(columns: dict[str, Sequence]) -> str | None:
    """Of the columns that rewards may read; `None` without any."""
    if not columns:
        return None
    return hashlib.sha256(json.dumps(columns, sort_keys=True, default=repr).encode()).hexdigest()


def weights_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """
    A number that changes when the values of a model change. Sums of bits as integers: the same on every device and
    for every number of threads, and as fast as the memory.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors):
        bits = tensor.detach().contiguous().view(_BITS[tensor.element_size()])
        digest.update(f"{name}|{tuple(tensor.shape)}|{bits.sum(dtype=torch.int64).item()}\n".encode())
    return digest.hexdigest()


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pipeline_checksum(pipe) -> str:
    """Of all weights of a pipeline but those of LoRAs on it."""
    tensors = [
        (f"{component}.{name.replace('.base_layer', '')}", tensor)
        for component, module in pipe.components.items()
        if isinstance(module, torch.nn.Module)
        for name, tensor in module.state_dict().items()
        if "lora_" not in name
    ]
    return weights_checksum(tensors)


def reward_identities(rewards) -> list[str]:
    """One line per reward: its name, and what its scores depend on where that can be seen."""
    scorers = rewards.scorers()
    lines = []
    for name, func in zip(rewards.names, rewards.functions(), strict=True):
        if name in scorers:
            scorer = scorers[name]
            lines.append(f"{name}: {type(func).__name__} {weights_checksum(scorer.model.state_dict().items())}")
        else:
            lines.append(f"{name}: {_source_hash(func)}")
    return lines


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not the same, as `name: there -> here`."""
    now = json.loads(json.dumps(now))
    names = sorted({*saved, *now})
    return [
        f"{name}: {_short(saved.get(name))} -> {_short(now.get(name))}"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _source_hash(func) -> str:
    """Of a reward's source code, so that an edited function does not continue the scores of the old one."""
    target = func if inspect.isroutine(func) else type(func)
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):
        return f"{target.__module__}.{target.__qualname__}"
    return f"{target.__qualname__} {hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
